"""The catalogue of ops: what each one computes, the shapes it allows, and the work it does.

A class here defines one op; its docstring is the definition that every backend's kernel is tested against.
x is the first input [rows, features]; W, b and w are weight matrices, biases and vectors by checkpoint name.
The ops that `fuse` makes are defined by the plain ops they stand for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from hexad.graph.graph import Graph, Node

Shape = tuple[int, ...]


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
    """One op. arity: how many inputs it may have."""

    arity: tuple[int, ...] = (1,)

    @abstractmethod
    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        """Width of the output for these input widths and weight shapes. Raises ValueError where they do
        not fit."""

    @abstractmethod
    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        """Work on `rows` output rows: the last `rows` positions of one sequence of `context` tokens."""


class Embed(Op):
    """Row t of W [vocab, features] for each token t."""

    arity = (0,)

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        (table,) = weights
        return _matrix(table)[1]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work()


class Norm(Op):
    """RMS norm (Zhang and Sennrich 2019, arXiv:1910.07467): x / √(mean(x²) + eps) × w, the mean over
    features."""

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        (width,), (scale,) = inputs, weights
        _expect(scale == (width,), f"norm weight {scale} for {width} features")
        return width

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=4 * rows * inputs[0])


class Linear(Op):
    """x · Wᵀ + b, for W [out, in] and an optional b [out]."""

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        return _project(inputs[0], *weights)

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(linear_macs=rows * inputs[0] * node.features)


class Rope(Op):
    """Rotates features i and i + rotary_dim/2 of each head by the angle position × inv_freq[i]:
    (a, b) → (a cos − b sin, b cos + a sin). The angle is a float32 product; see RopeSpec."""

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        _expect(inputs[0] % node.attrs["rope"].head_dim == 0, f"{inputs[0]} features are no whole heads")
        return inputs[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        rope = node.attrs["rope"]
        return Work(other_flops=3 * rows * inputs[0] * rope.rotary_dim // rope.head_dim)


class Attention(Op):
    """Writes k and v of every row to the paged cache of `layer`; then, for query head h of the row at
    position p, softmax(scale · q_h · Kᵀ) · V over positions 0 … p of the row's own sequence, where K and V
    are those of KV head h // (heads / kv_heads), read back from the cache in the cache's dtype."""

    arity = (3,)

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        query, key = _heads(node)
        _expect(
            tuple(inputs) == (query, key, key),
            f"q, k, v of {tuple(inputs)} features, not {(query, key, key)}",
        )
        return query

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        query, key = _heads(node)
        pairs = rows * context - rows * (rows - 1) // 2  # (query, key) pairs that causality leaves
        return Work(
            attention_macs=2 * pairs * query,
            other_flops=4 * pairs * node.attrs["heads"],  # scale, subtract the maximum, exponential, sum
            kv_read=2 * context * key,  # once for all rows and for all query heads of a group
            kv_written=2 * rows * key,
        )


class Gated(Op):
    """act(x) × y for a gate x and y, both [rows, features]; silu(x) = x / (1 + e^−x)."""

    arity = (2,)

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        _expect(inputs[0] == inputs[1], f"a gate of {inputs[0]} features on {inputs[1]}")
        _expect(node.attrs["act"] == "silu", f"unknown activation {node.attrs['act']!r}")
        return inputs[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=4 * rows * node.features)


class Add(Op):
    """x + y."""

    arity = (2,)

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        _expect(inputs[0] == inputs[1], f"{inputs[0]} features plus {inputs[1]}")
        return inputs[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        return Work(other_flops=rows * node.features)


class TakeRows(Op):
    """The rows of x whose logits the batch asks for (`Batch.sample_rows`)."""

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
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

    arity = (1, 2)

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        shapes = dict(zip(node.weights, weights, strict=True))
        norm, epilogue = node.attrs["norm"], node.attrs["epilogue"]
        if norm is not None:
            _expect(shapes[norm] == (inputs[0],), f"norm weight {shapes[norm]} for {inputs[0]} features")
        widths = [
            _project(inputs[0], shapes[weight], *([] if bias is None else [shapes[bias]]))
            for weight, bias in node.attrs["projections"]
        ]
        _expect(len(inputs) == (2 if epilogue == "add" else 1), f"{len(inputs)} inputs for {epilogue!r}")
        if epilogue == "store":
            return sum(widths)
        if epilogue == "add":
            _expect(widths == [inputs[1]], f"projections of {widths} features onto a residual of {inputs[1]}")
            return widths[0]
        _expect(epilogue == "gated", f"unknown epilogue {epilogue!r}")
        _expect(len(widths) == 2 and widths[0] == widths[1], f"a gate and an up of {widths} features")
        return widths[0]

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        epilogue = node.attrs["epilogue"]
        outputs = 2 * node.features if epilogue == "gated" else node.features
        flops = {"store": 0, "add": 1, "gated": 4}[epilogue] * node.features
        if node.attrs["norm"] is not None:
            flops += 4 * inputs[0]
        return Work(linear_macs=rows * inputs[0] * outputs, other_flops=rows * flops)


class FusedAttention(Attention):
    """`attention` of columns of its three inputs, q and k rotated first.

    attrs: those of attention, and offsets: the first column of q, k and v in their inputs (which may be
    the same value); rope: a RopeSpec or None.
    """

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        query, key = _heads(node)
        for offset, width, columns in zip(node.attrs["offsets"], inputs, (query, key, key), strict=True):
            _expect(0 <= offset <= width - columns, f"columns {offset}…{offset + columns} of {width}")
        return query

    def work(self, node: Node, inputs: Sequence[int], rows: int, context: int) -> Work:
        query, key = _heads(node)
        work = super().work(node, inputs, rows, context)
        rope = node.attrs["rope"]
        rotated = (query + key) * rope.rotary_dim // rope.head_dim if rope is not None else 0
        return Work(
            attention_macs=work.attention_macs,
            other_flops=work.other_flops + 3 * rows * rotated,
            kv_read=work.kv_read,
            kv_written=work.kv_written,
        )


class FusedLogits(Op):
    """`logits` of `norm` (weight name or None) of x. weights: norm first, then the table."""

    def features(self, node: Node, inputs: Sequence[int], weights: Sequence[Shape]) -> int:
        *norm, table = weights
        _expect(all(shape == (inputs[0],) for shape in norm), f"norm weight {norm} for {inputs[0]} features")
        return _project(inputs[0], table)

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


def check(graph: Graph) -> None:
    """Holds every node to its op's shape rule. Raises ValueError naming the node."""
    for number, node in enumerate(graph.nodes):
        where = f"node {number} ({node.op})"
        op = OPS.get(node.op)
        if op is None:
            raise ValueError(f"{where}: unknown op; known are {', '.join(OPS)}")
        if len(node.inputs) not in op.arity:
            raise ValueError(
                f"{where}: {len(node.inputs)} inputs; it takes {' or '.join(map(str, op.arity))}"
            )
        if any(not 0 <= value < number for value in node.inputs):
            raise ValueError(f"{where}: reads {node.inputs}, which are not all made before it")
        missing = [name for name in node.weights if name not in graph.weights]
        if missing:
            raise ValueError(f"{where}: tensor {missing[0]} is missing")
        try:
            features = op.features(
                node,
                [graph.nodes[value].features for value in node.inputs],
                [graph.weights[name].shape for name in node.weights],
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if node.features != features:
            raise ValueError(f"{where}: makes {features} features, not {node.features}")
    taken_rows(graph)


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _matrix(shape: Shape) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"a matrix of shape {shape}")
    return shape[0], shape[1]


def _project(width: int, weight: Shape, bias: Shape | None = None) -> int:
    rows, columns = _matrix(weight)
    _expect(columns == width, f"a weight of {columns} input features on {width}")
    _expect(bias is None or bias == (rows,), f"bias {bias} for {rows} features")
    return rows


def _heads(node: Node) -> tuple[int, int]:
    """Width of all query heads and of all KV heads."""
    head_dim = node.attrs["head_dim"]
    return node.attrs["heads"] * head_dim, node.attrs["kv_heads"] * head_dim
