"""CpuBackend: packs the weights, lowers the graph to a native program, and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from hexad import _native
from hexad.backends.backend import Batch, CompileOptions, Limits, OpTime, Profile
from hexad.backends.cpu.layouts import layout_of
from hexad.backends.cpu.lower import lower, pack, plan_buffers
from hexad.backends.sampling import SampleBatch, SampleOutput
from hexad.config import BLOCK_TOKENS, CacheDtype
from hexad.errors import BackendError, HexadError
from hexad.graph import Graph
from hexad.graph.cost import kv_bytes_per_token
from hexad.placement.hardware import cpu_count, thread_cpus
from hexad.weights import Weight

T = TypeVar("T")

_TILE_ROWS = 6
"""Rows of an activation tile (csrc/kernels.h)."""
_KERNEL_SCRATCH = 2 * 192 * 32 * 4 + 24 * 1024
"""Bytes of a thread's panel outputs and unpacked strip (csrc/program_ops.h, csrc/ops/linear.h)."""
_PARTIAL_BYTES = 8 << 20
"""Bytes for attention over segments (csrc/program.cpp)."""
_SAMPLER_BYTES = 20
"""Bytes per token of the vocabulary that a thread's sampler takes: a row, its candidates, its marks
(csrc/sampler.h)."""


class CpuBackend:
    """Implements `Backend`.

    isa: kernels to use, one of `_native.isas()`; None takes the best, or what HEXAD_ISA names.
    """

    name = "cpu"

    def __init__(self, isa: str | None = None) -> None:
        self.isa = isa

    def compile(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        options: CompileOptions,
        limits: Limits,
        packing: Callable[[], None] = lambda: None,
    ) -> CpuExecutable:
        """Allocates buffers and cache, packs every weight once. Raises BackendError for what it cannot do,
        CheckpointError for a file that cannot be read."""
        threads = options.threads or cpu_count()
        program = _checked(
            lambda: _native.Program(
                isa=self.isa or "",
                threads=threads,
                quantised=options.compute == "int8",
                kv_dtype=options.kv_dtype,
                max_rows=limits.max_rows,
                max_seqs=limits.max_seqs,
                kv_blocks=limits.kv_blocks,
                cpus=thread_cpus(threads),
            )
        )
        nodes, matrices = _checked(lambda: lower(graph, weights, program))
        packing()
        _checked(lambda: pack(matrices, program))
        if options.prefault:
            _checked(program.prefault)
        return CpuExecutable(program, nodes)

    def weight_bytes(self, weight: Weight) -> int:
        """Matrices are packed into panels; the rest is float32."""
        return layout_of(weight).nbytes(weight.shape) if len(weight.shape) == 2 else 4 * prod(weight.shape)

    def kv_block_bytes(self, graph: Graph, kv_dtype: CacheDtype) -> int:
        """Bytes of one KV block; heads are padded to 32 features (csrc/ops/attention.h)."""
        return BLOCK_TOKENS * kv_bytes_per_token(graph, kv_dtype, head_multiple=32)

    def workspace_bytes(self, graph: Graph, options: CompileOptions, limits: Limits) -> int:
        """Bytes of what csrc/program.cpp allocates: value buffers, activation tiles, RoPE tables, 32 rows of
        logits, attention's segments, each thread's scratch."""
        features = plan_buffers(graph).features
        widest = _padded(max(features, default=1))
        groups = widest // 32
        outliers = min(groups, _TILE_ROWS * ((groups - 1) // 4))
        tile = _TILE_ROWS * (4 * widest + 48 * (groups + outliers))  # float32 and int8
        ropes = {node.attrs["rope"] for node in graph.nodes if node.attrs.get("rope") is not None}
        per_row: int = 4 * (sum(features) + sum(rope.rotary_dim for rope in ropes))
        attention: int = max(
            (
                (3 * _padded(n.attrs["head_dim"]) + 36) * max(48, n.attrs["heads"] // n.attrs["kv_heads"])
                + 64 * _padded(n.attrs["head_dim"])
                for n in graph.nodes
                if n.op in ("attention", "fused_attention")
            ),
            default=0,
        )
        per_thread: int = (
            4 * _TILE_ROWS * widest
            + tile
            + 4 * attention
            + _SAMPLER_BYTES * graph.vocab_size
            + _KERNEL_SCRATCH
        )
        return (
            (_PARTIAL_BYTES if attention else 0)
            + limits.max_rows * per_row
            + (-(-limits.max_rows // _TILE_ROWS) + 1) * tile  # tiles of 5 may leave more slots empty
            + 32 * 4 * graph.vocab_size
            + (options.threads or cpu_count()) * per_thread
        )


def _padded(features: int) -> int:
    return -(-features // 32) * 32


class CpuExecutable:
    """Implements `Executable` over one native program. nodes: see `lower`."""

    def __init__(self, program: _native.Program, nodes: Sequence[int]) -> None:
        self.program = program
        self._nodes = nodes

    def forward(self, batch: Batch) -> bool:
        """See `Executable`. Raises BackendError where the batch contradicts itself or the limits."""
        return _checked(
            lambda: self.program.forward(
                batch.tokens, batch.row_starts, batch.starts, batch.block_tables, batch.sample_rows,
                batch.optional_rows, batch.expected_seconds,
            )
        )  # fmt: skip

    def logits(self) -> NDArray[np.float32]:
        """float32 [n, vocab]."""
        out = np.empty((self.program.samples, self.program.vocab), np.float32)
        _checked(lambda: self.program.logits(out))
        return out

    def sample(self, wanted: SampleBatch, output: SampleOutput | None = None) -> SampleOutput:
        """See `Executable`. Raises BackendError where `wanted` contradicts itself or the last forward."""
        rows = wanted.rows
        if output is None:
            n, width = len(rows), int(rows["num_logprobs"].max(initial=0))
            output = SampleOutput(
                tokens=np.empty(n, np.int32),
                mirostat_mu=np.empty(n, np.float32),
                logprobs=np.empty(n, np.float32),
                ranks=np.empty(n, np.int32),
                top_ids=np.empty((n, width), np.int32),
                top_logprobs=np.empty((n, width), np.float32),
                ask_logprobs=np.empty(len(wanted.ask_ids), np.float32),
                ask_ranks=np.empty(len(wanted.ask_ids), np.int32),
            )
        _checked(
            lambda: self.program.sample(
                rows, wanted.history, wanted.history_starts,
                wanted.bias_ids, wanted.bias_values, wanted.bias_starts,
                wanted.ask_ids, wanted.ask_starts, wanted.masks,
                output.tokens, output.mirostat_mu, output.logprobs, output.ranks,
                output.top_ids, output.top_logprobs, output.ask_logprobs, output.ask_ranks,
            )
        )  # fmt: skip
        return output

    def hidden(self) -> NDArray[np.float32]:
        """float32 [n, hidden size]."""
        out = np.empty((self.program.samples, self.program.hidden_size), np.float32)
        _checked(lambda: self.program.hidden(out))
        return out

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks, (source, destination) in order."""
        pairs = np.array(copies, np.int64).reshape(-1, 2)
        _checked(lambda: self.program.copy_blocks(pairs))

    def profile(self) -> Profile:
        """See `Executable`. Tables of rotations and drawing tokens are no nodes."""
        *ops, sampling, calls = (OpTime(*times) for times in self.program.profile())
        ropes = [ops[i] for i in range(len(ops)) if i not in self._nodes]
        tables = reduce(OpTime.plus, ropes, OpTime())
        others = {"rope table": tables, "sampling": sampling}
        return Profile([ops[i] for i in self._nodes], others, calls)


def _checked(call: Callable[[], T]) -> T:
    """The native core speaks in Python's own errors; its callers in BackendError."""
    try:
        return call()
    except HexadError:
        raise
    except (ValueError, TypeError, RuntimeError) as error:
        raise BackendError(f"The CPU backend refused: {error}") from error
    except MemoryError as error:
        raise BackendError(
            "The CPU backend could not get the memory it planned for. Free memory, or lower kv_cache_gib, "
            "max_model_len or max_num_batched_tokens."
        ) from error
