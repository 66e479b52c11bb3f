"""The catalogue of ops: what each one computes, the shapes it allows, and the work it does.

A class here defines one op; its docstring is the definition that every backend's kernel is tested against.
x is the first input [rows, features]; W, b and w are weight matrices, biases and vectors by checkpoint name.
The ops that `fuse` makes are defined by the plain ops they stand for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hexad.errors import CheckpointError
from hexad.graph.node import Node

if TYPE_CHECKING:
    from hexad.graph.graph import Graph

Tensor = tuple[str, tuple[int, ...]]
"""A tensor's name and its shape."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one node does in one step, in counts that know no dtype.

    linear_macs: multiply-adds with weights. attention_macs: multiply-adds of queries with keys and of
    probabilities with values. other_flops: everything else, an exponential counted as one (a bias is free:
    the sum starts with it).
    kv_read, kv_written: numbers that go through the KV cache.
    """

    linear_macs: int = 0
    attention_macs: int = 0
    other_flops: int = 0
    kv_read: int = 0
    kv_written: int = 0


class Op(ABC):
    """One op."""

    @abstractmethod
    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        """The shape rule: width of the output for inputs of these widths. Raises CheckpointError where
        inputs and weights do not fit, ValueError for attrs no model may have."""

    @abstractmethod
    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        """Work on `rows` output rows: the last `rows` positions of one sequence of `context` tokens."""


class Embed(Op):
    """Row t of W [vocab, features] for each token t."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        (table,) = weights
        return _matrix(*table)[1]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work()


class Norm(Op):
    """RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467): x / √(mean(x²) + eps) × w, the mean over
    features. With attr `heads`, each of so many equal parts of x by itself, all with the same
    w [features / heads]."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        (width,), (scale,), heads = inputs, weights, attrs["heads"] or 1
        _expect(width % heads == 0, f"{width} features are no {heads} equal heads")
        _vector(*scale, width // heads)
        return width

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=4 * rows * inputs[0])


class Linear(Op):
    """x · Wᵀ + b, for W [out, in] and an optional b [out]."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        return _project(inputs[0], *weights)

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(linear_macs=rows * inputs[0] * node.features)


class Rope(Op):
    """Rotates features i and i + rotary_dim/2 of each head by the angle position × inv_freq[i]:
    (a, b) → (a cos − b sin, b cos + a sin), cos and sin multiplied by the magnitude. The angle is a float32
    product; see RopeSpec."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        (width,), head_dim = inputs, attrs["rope"].head_dim
        _expect(width % head_dim == 0, f"{width} features are no whole heads of {head_dim}")
        return width

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        rope = node.attrs["rope"]
        return Work(other_flops=3 * rows * inputs[0] * rope.rotary_dim // rope.head_dim)


class Attention(Op):
    """Writes k and v of every row to the paged cache of `layer`; then, for query head h of the row at
    position p, softmax(scale · q_h · Kᵀ) · V over positions 0 … p of the row's own sequence, where K and V
    are those of KV head h // (heads / kv_heads), read back from the cache in the cache's dtype. With attr
    `window`, over the last `window` of these positions only: p − window + 1 … p."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        heads, kv_heads, head_dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
        counts = {"query": heads, "key": kv_heads, "value": kv_heads}
        for width, (what, count) in zip(inputs, counts.items(), strict=True):
            _expect(
                width == count * head_dim,
                f"the {what} projection makes {width} features; "
                f"{count} heads of {head_dim} need {count * head_dim}",
            )
        _expect(heads % kv_heads == 0, f"{heads} query heads do not share {kv_heads} KV heads evenly")
        if attrs["window"] is not None and attrs["window"] < 1:
            raise ValueError(f"a window of {attrs['window']} positions; at least 1 expected")
        return inputs[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        query, key = _heads(node.attrs)
        start, window = context - rows, node.attrs["window"] or context
        # (query, key) pairs that causality leaves, less those that the window takes away
        pairs = (
            _triangle(context) - _triangle(start) - _triangle(context - window) + _triangle(start - window)
        )
        return Work(
            attention_macs=2 * pairs * query,
            other_flops=4 * pairs * node.attrs["heads"],  # scale, subtract the maximum, exponential, sum
            # once for all rows and for all query heads of a group
            kv_read=2 * min(context, rows + window - 1) * key,
            kv_written=2 * rows * key,
        )


class Gated(Op):
    """act(x) × y for a gate x and y, both [rows, features]; silu(x) = x / (1 + e^−x)."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        gate, up = inputs
        _expect(gate == up, f"gate has {gate} features and up {up}")
        if attrs["act"] != "silu":
            raise ValueError(f"unknown activation {attrs['act']!r}")
        return gate

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=4 * rows * node.features)


class Add(Op):
    """x + y."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        a, b = inputs
        _expect(a == b, f"cannot add {a} to {b} features")
        return a

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=rows * node.features)


class TakeRows(Op):
    """The rows of x whose logits the batch asks for (`Batch.sample_rows`)."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        return inputs[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work()


class Logits(Linear):
    """x · Wᵀ for W [vocab, features]: one score per vocabulary entry, always in float32."""


class FusedLinear(Op):
    """One norm (if any), one to many linears that read it, and what follows them.

    attrs: norm (weight name or None), eps, projections ((W, b or None), …), epilogue, act. With
    y_i = norm(x) · W_iᵀ + b_i the epilogue "store" gives [y_0, y_1, …] side by side; "add" gives y_0 +
    residual, the second input; "gated" gives act(y_0) × y_1.
    """

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        x, *residual = inputs
        shapes, norm, epilogue = dict(weights), attrs["norm"], attrs["epilogue"]
        if norm is not None:
            _vector(norm, shapes[norm], x)
        widths = [
            _project(x, *((name, shapes[name]) for name in names if name is not None))
            for names in attrs["projections"]
        ]
        if epilogue == "store":
            return sum(widths)
        if epilogue == "add":
            return Add().features((*widths, *residual), (), {})
        if epilogue == "gated":
            return Gated().features(widths, (), attrs)
        raise ValueError(f"unknown epilogue {epilogue!r}")

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        epilogue = node.attrs["epilogue"]
        outputs = 2 * node.features if epilogue == "gated" else node.features
        flops = {"store": 0, "add": 1, "gated": 4}[epilogue] * node.features
        if node.attrs["norm"] is not None:
            flops += 4 * inputs[0]
        return Work(linear_macs=rows * inputs[0] * outputs, other_flops=rows * flops)


class FusedAttention(Attention):
    """`attention` of columns of its three inputs, q and k first normed head by head and then rotated.

    attrs: those of attention, and offsets: the first column of q, k and v in their inputs (which may be
    the same value); norms: the weight names [head_dim] of q's and k's norm, each may be None, and norm_eps;
    rope: a RopeSpec or None. weights: the names in norms.
    """

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        query, key = _heads(attrs)
        for scale in weights:
            _vector(*scale, attrs["head_dim"])
        columns = (query, key, key)
        for offset, width, count in zip(attrs["offsets"], inputs, columns, strict=True):
            _expect(0 <= offset <= width - count, f"columns {offset}…{offset + count} of {width}")
        return super().features(columns, weights, attrs)

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        query, key = _heads(node.attrs)
        work = super().work(node, inputs, rows, context)
        rope = node.attrs["rope"]
        rotated = (query + key) * rope.rotary_dim // rope.head_dim if rope is not None else 0
        normed = sum(width for width, name in zip((query, key), node.attrs["norms"], strict=True) if name)
        return Work(
            attention_macs=work.attention_macs,
            other_flops=work.other_flops + rows * (3 * rotated + 4 * normed),
            kv_read=work.kv_read,
            kv_written=work.kv_written,
        )


class FusedLogits(Op):
    """`logits` of `norm` (weight name or None) of x. weights: norm first, then the table."""

    def features(self, inputs: Sequence[int], weights: Sequence[Tensor], attrs: Mapping[str, Any]) -> int:
        (width,), (*norm, table) = inputs, weights
        for scale in norm:
            _vector(*scale, width)
        return _project(width, table)

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        norm = 4 * rows * inputs[0] if node.attrs["norm"] is not None else 0
        return Work(linear_macs=rows * inputs[0] * node.features, other_flops=norm)


OPS: dict[str, Op] = {
    "embed": Embed(),
    "norm": Norm(),
    "linear": Linear(),
    "rope": Rope(),
    "attention": Attention(),
    "gated": Gated(),
    "add": Add(),
    "take_rows": TakeRows(),
    "logits": Logits(),
    "fused_linear": FusedLinear(),
    "fused_attention": FusedAttention(),
    "fused_logits": FusedLogits(),
}

_ALL_ROWS = frozenset({"rope", "attention", "take_rows", "fused_attention"})


def taken_rows(graph: Graph) -> list[bool]:
    """For each value: whether its rows are those of `take_rows` rather than all rows of the batch.

    Raises ValueError where an op would mix the two, or needs all rows and gets the taken ones.
    """
    taken: list[bool] = []
    for number, node in enumerate(graph.nodes):
        over = {taken[value] for value in node.inputs}
        if len(over) > 1:
            raise ValueError(f"node {number} ({node.op}): mixes all rows of the batch with the taken ones")
        if over == {True} and node.op in _ALL_ROWS:
            raise ValueError(f"node {number} ({node.op}): needs all rows of the batch, not the taken ones")
        taken.append(over == {True} or node.op == "take_rows")
    return taken


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise CheckpointError(message)


def _vector(name: str, shape: tuple[int, ...], size: int) -> None:
    _expect(shape == (size,), f"tensor {name} has shape {shape}; {(size,)} expected")


def _matrix(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise CheckpointError(f"tensor {name} has shape {shape}; 2 dimensions expected")
    return shape[0], shape[1]


def _project(width: int, weight: Tensor, bias: Tensor | None = None) -> int:
    rows, columns = _matrix(*weight)
    _expect(columns == width, f"tensor {weight[0]} has {columns} input features; {width} expected")
    if bias is not None:
        _vector(*bias, rows)
    return rows


def _triangle(n: int) -> int:
    """1 + 2 + … + n; 0 for n < 0."""
    return n * (n + 1) // 2 if n > 0 else 0


def _heads(attrs: Mapping[str, Any]) -> tuple[int, int]:
    """Width of all query heads and of all KV heads."""
    return attrs["heads"] * attrs["head_dim"], attrs["kv_heads"] * attrs["head_dim"]
