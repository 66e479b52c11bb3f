"""The reference backend: NumPy, float32, dequantise-then-multiply. It is the definition and the oracle.

It runs plain and fused graphs alike, always in float32 (`compute` is not its business), with the KV cache
in the dtype asked for. Written to be read, not to be fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod
from typing import Any, ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from hexad.backends.backend import Batch, CompileOptions, Limits, OpTime, Profile
from hexad.backends.reference_sampler import sample
from hexad.backends.sampling import SampleBatch, SampleOutput
from hexad.config import BLOCK_TOKENS, CacheDtype
from hexad.errors import BackendError
from hexad.graph import Graph, Node, RopeSpec
from hexad.graph.cost import kv_bytes_per_token
from hexad.graph.ops import taken_rows
from hexad.weights import Weight

Array = NDArray[np.float32]


class ReferenceBackend:
    """Implements `Backend`."""

    name = "reference"

    def weight_bytes(self, weight: Weight) -> int:
        """Every weight is kept as float32."""
        return 4 * prod(weight.shape)

    def kv_block_bytes(self, graph: Graph, kv_dtype: CacheDtype) -> int:
        """Bytes of one KV block."""
        return kv_bytes_per_token(graph, kv_dtype) * BLOCK_TOKENS

    def workspace_bytes(self, graph: Graph, options: CompileOptions, limits: Limits) -> int:
        """An estimate: four values alive at once, each the widest there is; logits of every sequence."""
        widest = [0, 0]
        for node, taken in zip(graph.nodes, taken_rows(graph), strict=True):
            widest[taken] = max(widest[taken], node.features)
        return 4 * 4 * (limits.max_rows * widest[False] + limits.max_seqs * widest[True])

    def compile(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        options: CompileOptions,
        limits: Limits,
        packing: Callable[[], None] = lambda: None,
    ) -> ReferenceExecutable:
        """Allocates the KV cache. Raises BackendError for an op it does not know."""
        unknown = {node.op for node in graph.nodes} - ReferenceExecutable.KERNELS.keys()
        if unknown:
            raise BackendError(f"the reference backend does not know the ops {sorted(unknown)}")
        packing()
        return ReferenceExecutable(graph, weights, options, limits)


class ReferenceExecutable:
    """Implements `Executable`.

    kv: the cache, [block, layer, K or V, kv head, token in block, head_dim], or for q8 without the last axis
    but of records, each a head's codes and their scale. Dequantised weights are kept.
    """

    def __init__(
        self, graph: Graph, weights: Mapping[str, Weight], options: CompileOptions, limits: Limits
    ) -> None:
        self.graph = graph
        self.weights = weights
        self.limits = limits
        attention = [node.attrs for node in graph.nodes if node.op in ("attention", "fused_attention")]
        shapes = {(attrs["kv_heads"], attrs["head_dim"]) for attrs in attention} or {(0, 0)}
        if len(shapes) > 1:
            raise BackendError(f"layers differ in their KV heads and head size: {sorted(shapes)}")
        ((kv_heads, head_dim),) = shapes
        layers = 1 + max((attrs["layer"] for attrs in attention), default=-1)
        self.kv_dtype = options.kv_dtype
        empty = np.zeros((layers, 2, kv_heads, BLOCK_TOKENS, head_dim), np.float32)
        self.kv = np.stack([to_cache(empty, self.kv_dtype)] * limits.kv_blocks)
        self._dequantised: dict[str, Array] = {}
        self._times = [OpTime()] * len(graph.nodes)
        self._sampling = OpTime()
        self._logits: Array = np.zeros((0, graph.vocab_size), np.float32)
        self._hidden: Array = np.zeros((0, graph.nodes[graph.nodes[-1].inputs[0]].features), np.float32)

    def forward(self, batch: Batch) -> bool:
        """See `Executable`. Raises BackendError where the batch contradicts itself or the limits."""
        self._check(batch)
        self._batch = batch
        counts = np.diff(batch.row_starts)
        self._positions = np.concatenate(
            [np.arange(start, start + count) for start, count in zip(batch.starts, counts, strict=True)]
        )
        last_use = {value: place for place, node in enumerate(self.graph.nodes) for value in node.inputs}
        values: dict[int, Array] = {}
        for place, node in enumerate(self.graph.nodes):
            begin = time.perf_counter()
            values[place] = self.KERNELS[node.op](self, node, *(values[value] for value in node.inputs))
            self._times[place] = self._times[place].plus(OpTime(1, 0, time.perf_counter() - begin))
            for value in set(node.inputs):
                if last_use[value] == place:
                    del values[value]
        self._logits = values[len(self.graph.nodes) - 1]
        return True

    def logits(self) -> Array:
        """float32 [n, vocab]."""
        return self._logits

    def hidden(self) -> Array:
        """float32 [n, hidden size]."""
        return self._hidden

    def sample(self, wanted: SampleBatch, output: SampleOutput | None = None) -> SampleOutput:
        """See `reference_sampler`. Raises BackendError where `wanted` does not fit."""
        begin = time.perf_counter()
        output = sample(self._logits, wanted)
        self._sampling = self._sampling.plus(OpTime(1, 0, time.perf_counter() - begin))
        return output

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies whole KV blocks, (source, destination) in order."""
        for source, destination in copies:
            if not (0 <= source < len(self.kv) and 0 <= destination < len(self.kv)):
                raise BackendError(f"KV block copy {source} → {destination} outside {len(self.kv)} blocks")
            self.kv[destination] = self.kv[source]

    def profile(self) -> Profile:
        """See `Executable`. It is timed throughout."""
        calls = reduce(OpTime.plus, self._times, self._sampling)
        return Profile(list(self._times), {"sampling": self._sampling}, calls)

    def _check(self, batch: Batch) -> None:
        rows, starts = len(batch.tokens), batch.row_starts
        counts = np.diff(starts)
        if len(starts) != len(batch.starts) + 1 or starts[0] != 0 or starts[-1] != rows or (counts < 1).any():
            raise BackendError(
                f"row_starts {starts.tolist()} do not divide {rows} rows among {len(batch.starts)}"
            )
        if rows > self.limits.max_rows or len(batch.starts) > self.limits.max_seqs:
            raise BackendError(f"{rows} rows of {len(batch.starts)} sequences exceed {self.limits}")
        if len(batch.block_tables) != len(batch.starts):
            raise BackendError(f"{len(batch.block_tables)} block tables for {len(batch.starts)} sequences")
        for start, count, table in zip(batch.starts, counts, batch.block_tables, strict=True):
            used = table[: -(-(start + count) // BLOCK_TOKENS)]
            if (
                start < 0
                or start + count > len(used) * BLOCK_TOKENS
                or start + count > self.limits.max_model_len
            ):
                raise BackendError(
                    f"positions {start}…{start + count - 1} are outside the block table or context"
                )
            if (used < 0).any() or (used >= len(self.kv)).any():
                raise BackendError(f"block table {used.tolist()} outside {len(self.kv)} KV blocks")
        if (batch.sample_rows < 0).any() or (batch.sample_rows >= rows).any():
            raise BackendError(f"sample rows {batch.sample_rows.tolist()} outside {rows} rows")

    # The ops, as graph/ops.py defines them.

    def _weight(self, name: str) -> Array:
        if name not in self._dequantised:
            self._dequantised[name] = self.weights[name].dequantise()
        return self._dequantised[name]

    def _embed(self, node: Node) -> Array:
        table, tokens = self._weight(node.weights[0]), self._batch.tokens
        if (tokens < 0).any() or (tokens >= len(table)).any():
            raise BackendError(f"token ids outside the vocabulary of {len(table)}")
        return table[tokens]

    def _norm(self, node: Node, x: Array) -> Array:
        return rms_norm(x, self._weight(node.weights[0]), node.attrs["eps"], node.attrs["heads"] or 1)

    def _linear(self, node: Node, x: Array) -> Array:
        return self._project(x, *node.weights)

    def _project(self, x: Array, weight: str, bias: str | None = None) -> Array:
        y = x @ self._weight(weight).T
        return y if bias is None else y + self._weight(bias)

    def _rope(self, node: Node, x: Array) -> Array:
        return rotate(x, self._positions, node.attrs["rope"])

    def _gated(self, node: Node, gate: Array, up: Array) -> Array:
        return silu(gate) * up

    def _add(self, node: Node, a: Array, b: Array) -> Array:
        return a + b

    def _take_rows(self, node: Node, x: Array) -> Array:
        return x[self._batch.sample_rows]

    def _attention(self, node: Node, q: Array, k: Array, v: Array) -> Array:
        attrs, batch = node.attrs, self._batch
        heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
        cache = self.kv[:, attrs["layer"]]  # [block, K or V, kv head, token, head_dim]
        output = np.empty_like(q, shape=(len(q), heads, head_dim))
        q = q.reshape(-1, kv_heads, heads // kv_heads, head_dim)
        new = np.stack([k, v], axis=1).reshape(-1, 2, kv_heads, head_dim)
        for s, start in enumerate(batch.starts):
            rows = slice(batch.row_starts[s], batch.row_starts[s + 1])
            positions = self._positions[rows]
            table = batch.block_tables[s]
            cache[table[positions // BLOCK_TOKENS], :, :, positions % BLOCK_TOKENS] = to_cache(
                new[rows], self.kv_dtype
            )
            seen = np.arange(start + len(positions))
            pages = from_cache(cache[table[seen // BLOCK_TOKENS], :, :, seen % BLOCK_TOKENS])
            keys, values = pages.transpose(1, 2, 0, 3)  # each [kv head, seen, head_dim]
            queries = q[rows].transpose(1, 2, 0, 3)  # [kv head, query head of its group, row, head_dim]
            scores = queries @ keys[:, None].transpose(0, 1, 3, 2) * np.float32(attrs["scale"])
            visible = seen <= positions[:, None]
            if attrs["window"] is not None:
                visible &= seen > positions[:, None] - attrs["window"]
            scores[..., ~visible] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            output[rows] = (scores @ values[:, None]).transpose(2, 0, 1, 3).reshape(-1, heads, head_dim)
        return output.reshape(len(output), heads * head_dim)

    def _logits_of(self, node: Node, x: Array) -> Array:
        self._hidden = x
        return self._project(x, node.weights[-1])

    def _fused_linear(self, node: Node, x: Array, residual: Array | None = None) -> Array:
        attrs = node.attrs
        if attrs["norm"] is not None:
            x = rms_norm(x, self._weight(attrs["norm"]), attrs["eps"])
        outputs = [self._project(x, weight, bias) for weight, bias in attrs["projections"]]
        if residual is not None:
            return outputs[0] + residual
        if attrs["epilogue"] == "gated":
            return silu(outputs[0]) * outputs[1]
        return np.concatenate(outputs, axis=1)

    def _fused_attention(self, node: Node, q: Array, k: Array, v: Array) -> Array:
        attrs = node.attrs
        widths = [attrs[count] * attrs["head_dim"] for count in ("heads", "kv_heads", "kv_heads")]
        q, k, v = (
            x[:, offset : offset + width]
            for x, offset, width in zip((q, k, v), attrs["offsets"], widths, strict=True)
        )
        q, k = (
            x if name is None else rms_norm(x, self._weight(name), attrs["norm_eps"], heads)
            for x, name, heads in zip(
                (q, k), attrs["norms"], (attrs["heads"], attrs["kv_heads"]), strict=True
            )
        )
        if attrs["rope"] is not None:
            q, k = (rotate(x, self._positions, attrs["rope"]) for x in (q, k))
        return self._attention(node, q, k, v)

    def _fused_logits(self, node: Node, x: Array) -> Array:
        if node.attrs["norm"] is not None:
            x = rms_norm(x, self._weight(node.attrs["norm"]), node.attrs["eps"])
        return self._logits_of(node, x)

    KERNELS: ClassVar[Mapping[str, Callable[..., Array]]] = {
        "embed": _embed,
        "norm": _norm,
        "linear": _linear,
        "rope": _rope,
        "attention": _attention,
        "gated": _gated,
        "add": _add,
        "take_rows": _take_rows,
        "logits": _logits_of,
        "fused_linear": _fused_linear,
        "fused_attention": _fused_attention,
        "fused_logits": _fused_logits,
    }


def rms_norm(x: Array, weight: Array, eps: float, heads: int = 1) -> Array:
    """x / √(mean(x²) + eps) × weight over each of `heads` equal parts of the last axis, float32."""
    parts = x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)
    mean = np.mean(parts * parts, axis=-1, keepdims=True)
    return cast(Array, (parts / np.sqrt(mean + np.float32(eps)) * weight).reshape(x.shape))


def to_cache(x: Array, kv_dtype: CacheDtype) -> NDArray[Any]:
    """x [..., head_dim] as the KV cache keeps it. In q8, records of int8 codes [head_dim] and the float32
    scale d = max|x| / 127 that they count, after infinities became ±3.4e38 and NaNs 0."""
    if kv_dtype != "q8":
        return x.astype({"f32": np.float32, "f16": np.float16}[kv_dtype])
    x = np.clip(np.nan_to_num(x), np.float32(-3.4e38), np.float32(3.4e38))
    d = np.abs(x).max(axis=-1, initial=0) / np.float32(127)
    d[d < 1e-36] = 0  # 1/d would overflow
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    packed = np.empty(d.shape, [("codes", np.int8, x.shape[-1:]), ("scale", np.float32)])
    packed["codes"], packed["scale"] = np.rint(x * inverse[..., None]), d
    return packed


def from_cache(kv: NDArray[Any]) -> Array:
    """What `to_cache` made, as float32 [..., head_dim]."""
    if kv.dtype.names is None:
        return kv.astype(np.float32)
    return cast(Array, kv["codes"] * kv["scale"][..., None])


def silu(x: Array) -> Array:
    """x / (1 + e^−x), float32."""
    with np.errstate(over="ignore"):  # e^−x may become infinite; the quotient is then −0, as it should be
        return cast(Array, x / (np.float32(1) + np.exp(-x)))


def rotate(x: Array, positions: NDArray[np.integer], rope: RopeSpec) -> Array:
    """x [rows, heads × head_dim] with each head rotated by its row's position [rows]; see RopeSpec."""
    angles = positions.astype(np.float32)[:, None] * rope.inv_freq()
    cos, sin = (turn(angles)[:, None, :] * np.float32(rope.magnitude) for turn in (np.cos, np.sin))
    heads = x.reshape(len(x), -1, rope.head_dim)
    half = rope.rotary_dim // 2
    a, b = heads[..., :half], heads[..., half : 2 * half]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, heads[..., 2 * half :]], axis=-1).reshape(
        x.shape
    )
