"""The native CPU core; documented in csrc/bindings.cpp and csrc/program.h."""

from typing import Any

from numpy.typing import NDArray

def isas() -> list[str]: ...
def isa() -> str: ...
def probe_bandwidth(threads: int) -> float: ...
def probe_int8(threads: int) -> float: ...

class Program:
    def __init__(
        self,
        *,
        isa: str,
        threads: int,
        quantised: bool,
        kv_dtype: str,
        max_rows: int,
        max_seqs: int,
        kv_blocks: int,
    ) -> None: ...
    def add_weight(self, stored: str, rows: int, columns: int) -> int: ...
    def pack_weight(self, weight: int, stored: str, data: NDArray[Any]) -> None: ...
    def add_vector(self, values: NDArray[Any]) -> int: ...
    def add_buffer(self, features: int) -> int: ...
    def add_rope(self, inv_freq: NDArray[Any], magnitude: float) -> int: ...
    def set_cache(self, layers: int, kv_heads: int, head_dim: int) -> None: ...
    def op_embed(self, weight: int, out: int) -> None: ...
    def op_norm(self, x: int, weight: int, eps: float, heads: int, out: int) -> None: ...
    def op_linear(
        self,
        x: int,
        norm: int,
        eps: float,
        projections: list[tuple[int, int]],
        epilogue: str,
        residual: int,
        out: int,
    ) -> None: ...
    def op_rope(self, x: int, rope: int, head_dim: int, out: int) -> None: ...
    def op_gated(self, gate: int, up: int, out: int) -> None: ...
    def op_add(self, a: int, b: int, out: int) -> None: ...
    def op_attention(
        self,
        q: int,
        q_column: int,
        k: int,
        k_column: int,
        v: int,
        v_column: int,
        rope: int,
        q_norm: int,
        k_norm: int,
        norm_eps: float,
        layer: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        window: int,
        out: int,
    ) -> None: ...
    def op_take_rows(self, x: int, out: int) -> None: ...
    def op_logits(self, x: int, norm: int, eps: float, weight: int) -> None: ...
    def seal(self) -> None: ...
    def forward(
        self,
        tokens: NDArray[Any],
        row_starts: NDArray[Any],
        starts: NDArray[Any],
        block_tables: NDArray[Any],
        sample_rows: NDArray[Any],
    ) -> None: ...
    def logits(self, out: NDArray[Any]) -> None: ...
    def hidden(self, out: NDArray[Any]) -> None: ...
    def sample(
        self,
        rows: NDArray[Any],
        history: NDArray[Any],
        history_starts: NDArray[Any],
        bias_ids: NDArray[Any],
        bias_values: NDArray[Any],
        bias_starts: NDArray[Any],
        ask_ids: NDArray[Any],
        ask_starts: NDArray[Any],
        masks: NDArray[Any],
        tokens: NDArray[Any],
        mirostat_mu: NDArray[Any],
        logprobs: NDArray[Any],
        ranks: NDArray[Any],
        top_ids: NDArray[Any],
        top_logprobs: NDArray[Any],
        ask_logprobs: NDArray[Any],
        ask_ranks: NDArray[Any],
    ) -> None: ...
    def copy_blocks(self, pairs: NDArray[Any]) -> None: ...
    @property
    def samples(self) -> int: ...
    @property
    def vocab(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def weight_bytes(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
