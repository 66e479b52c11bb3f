"""lower: turns a graph into calls that build a native program, with its buffers planned by liveness."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hexad import _native
from hexad.errors import BackendError, CheckpointError
from hexad.graph import Graph, Node, RopeSpec
from hexad.weights import Weight


@dataclass(frozen=True, slots=True)
class Buffers:
    """features[i]: width of buffer i. of_value[v]: the buffer value v lies in; None for the logits."""

    features: list[int]
    of_value: list[int | None]


def plan_buffers(graph: Graph) -> Buffers:
    """Gives every value a buffer; one is used again once its value's last reader is done.

    An op that adds to its residual element by element may write where it read, so the residual stream stays
    in one place. Nothing else writes its own input.
    """
    readers: list[list[int]] = [[] for _ in graph.nodes]
    for place, node in enumerate(graph.nodes):
        for value in dict.fromkeys(node.inputs):
            readers[value].append(place)
    features: list[int] = []
    free: list[int] = []
    of_value: list[int | None] = []
    for place, node in enumerate(graph.nodes):
        dying = [v for v in dict.fromkeys(node.inputs) if readers[v][-1] == place]
        residual = _residual(node)
        chosen: int | None = None
        if node.op not in ("logits", "fused_logits"):
            if residual is not None and residual in dying:
                chosen = of_value[residual]
                dying.remove(residual)
            else:
                chosen = next((b for b in free if features[b] == node.features), None)
                if chosen is None:
                    chosen = len(features)
                    features.append(node.features)
                else:
                    free.remove(chosen)
        of_value.append(chosen)
        free += [buffer for v in dying if (buffer := of_value[v]) is not None]
    return Buffers(features, of_value)


def _residual(node: Node) -> int | None:
    """The input whose buffer the node may overwrite, if there is one."""
    if node.op == "fused_linear" and node.attrs["epilogue"] == "add" and node.inputs[0] != node.inputs[1]:
        return node.inputs[1]
    return None


def lower(
    graph: Graph, weights: Mapping[str, Weight], program: _native.Program
) -> tuple[list[int], list[Weight]]:
    """Builds `program` from `graph`. Returns each node's place among the program's ops, logits last,
    and the matrices that it is to pack, in its order. Raises BackendError for an op it does not know."""
    lowering = _Lowering(graph, weights, program)
    places = lowering.run()
    return places, [weights[name] for name in lowering.matrices]


def pack(matrices: Sequence[Weight], program: _native.Program) -> None:
    """Packs what `lower` returned: of a file straight from there, without holding its bytes in memory.

    Raises CheckpointError where the file cannot be read.
    """
    try:
        program.pack([_source(weight) for weight in matrices])
    except OSError as error:
        path = next(
            w.place.file.path for w in matrices if w.place and w.place.file.descriptor == error.filename
        )
        what = f"{error.strerror}. It has changed since it was opened, or cannot be read; fetch it again."
        raise CheckpointError(f"{path}: {what}") from error


def _source(weight: Weight) -> NDArray[np.uint8] | tuple[int, int, NDArray[np.int64] | None]:
    if (place := weight.place) is not None:
        return place.file.descriptor, place.start, place.order
    (array,) = weight.arrays.values()
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1)


class _Lowering:
    def __init__(self, graph: Graph, weights: Mapping[str, Weight], program: _native.Program) -> None:
        self.graph = graph
        self.weights = weights
        self.program = program
        self.buffers = plan_buffers(graph)
        self.matrices: dict[str, int] = {}
        self.vectors: dict[str, int] = {}
        self.ropes: dict[RopeSpec, int] = {}

    def run(self) -> list[int]:
        for features in self.buffers.features:
            self.program.add_buffer(features)
        self._cache()
        for node in self.graph.nodes:
            rope: RopeSpec | None = node.attrs.get("rope")
            if rope is not None and rope not in self.ropes:
                self.ropes[rope] = self.program.add_rope(rope.inv_freq(), rope.magnitude)
        for place, node in enumerate(self.graph.nodes):
            emit = getattr(self, f"_{node.op}", None)
            if emit is None:
                raise BackendError(f"The CPU backend does not know the op {node.op!r}.")
            emit(node, self.buffers.of_value[place])
        self.program.seal()
        # The tables of the ropes come first.
        first, head = len(self.ropes), ("logits", "fused_logits")
        ops = first + sum(node.op not in head for node in self.graph.nodes)
        places = iter(range(first, ops))
        return [ops if node.op in head else next(places) for node in self.graph.nodes]

    def _cache(self) -> None:
        attention = [n.attrs for n in self.graph.nodes if n.op in ("attention", "fused_attention")]
        shapes = {(attrs["kv_heads"], attrs["head_dim"]) for attrs in attention}
        if len(shapes) > 1:
            raise BackendError(f"Layers differ in their KV heads and head size: {sorted(shapes)}.")
        for kv_heads, head_dim in shapes:
            layers = 1 + max(attrs["layer"] for attrs in attention)
            self.program.set_cache(layers, kv_heads, head_dim)

    # Operands.

    def _in(self, value: int) -> int:
        buffer = self.buffers.of_value[value]
        assert buffer is not None
        return buffer

    def _matrix(self, name: str) -> int:
        """Adds a matrix on first use: a tied table is stored once."""
        if name not in self.matrices:
            weight = self.weights[name]
            self.matrices[name] = self.program.add_weight(weight.format.name, *weight.shape)
        return self.matrices[name]

    def _vector(self, name: str | None) -> int:
        if name is None:
            return -1
        if name not in self.vectors:
            self.vectors[name] = self.program.add_vector(self.weights[name].dequantise())
        return self.vectors[name]

    # One method per op.

    def _embed(self, node: Node, out: int) -> None:
        self.program.op_embed(self._matrix(node.weights[0]), out)

    def _norm(self, node: Node, out: int) -> None:
        self.program.op_norm(
            self._in(node.inputs[0]), self._vector(node.weights[0]),
            node.attrs["eps"], node.attrs["heads"] or 1, out,
        )  # fmt: skip

    def _linear(self, node: Node, out: int) -> None:
        bias = self._vector(node.weights[1]) if len(node.weights) == 2 else -1
        projections = [(self._matrix(node.weights[0]), bias)]
        self.program.op_linear(self._in(node.inputs[0]), -1, 0.0, projections, "store", -1, out)

    def _fused_linear(self, node: Node, out: int) -> None:
        attrs = node.attrs
        self._check_act(node)
        projections = [(self._matrix(weight), self._vector(bias)) for weight, bias in attrs["projections"]]
        residual = self._in(node.inputs[1]) if attrs["epilogue"] == "add" else -1
        self.program.op_linear(
            self._in(node.inputs[0]), self._vector(attrs["norm"]), attrs["eps"],
            projections, attrs["epilogue"], residual, out,
        )  # fmt: skip

    def _rope(self, node: Node, out: int) -> None:
        rope: RopeSpec = node.attrs["rope"]
        self.program.op_rope(self._in(node.inputs[0]), self.ropes[rope], rope.head_dim, out)

    def _attention(self, node: Node, out: int) -> None:
        self._attend(node, (0, 0, 0), None, (None, None), 0.0, out)

    def _fused_attention(self, node: Node, out: int) -> None:
        # The program norms and rotates queries and keys where they lie: fuse sees to it that nobody else
        # reads them.
        attrs = node.attrs
        self._attend(node, attrs["offsets"], attrs["rope"], attrs["norms"], attrs["norm_eps"], out)

    def _attend(
        self,
        node: Node,
        offsets: tuple[int, int, int],
        rope: RopeSpec | None,
        norms: tuple[str | None, str | None],
        norm_eps: float,
        out: int,
    ) -> None:
        attrs = node.attrs
        (q, k, v), (q_column, k_column, v_column) = (self._in(value) for value in node.inputs), offsets
        self.program.op_attention(
            q, q_column, k, k_column, v, v_column, -1 if rope is None else self.ropes[rope],
            self._vector(norms[0]), self._vector(norms[1]), norm_eps,
            attrs["layer"], attrs["heads"], attrs["kv_heads"], attrs["head_dim"], attrs["scale"],
            attrs["window"] or 0, out,
        )  # fmt: skip

    @staticmethod
    def _check_act(node: Node) -> None:
        if node.attrs.get("act") not in (None, "silu"):
            raise BackendError(f"The CPU backend does not know the activation {node.attrs['act']!r}.")

    def _gated(self, node: Node, out: int) -> None:
        self._check_act(node)
        self.program.op_gated(self._in(node.inputs[0]), self._in(node.inputs[1]), out)

    def _add(self, node: Node, out: int) -> None:
        self.program.op_add(self._in(node.inputs[0]), self._in(node.inputs[1]), out)

    def _take_rows(self, node: Node, out: int) -> None:
        self.program.op_take_rows(self._in(node.inputs[0]), out)

    def _logits(self, node: Node, _: int | None) -> None:
        self.program.op_logits(self._in(node.inputs[0]), -1, 0.0, self._matrix(node.weights[0]))

    def _fused_logits(self, node: Node, _: int | None) -> None:
        *norm, table = node.weights
        self.program.op_logits(
            self._in(node.inputs[0]),
            self._vector(norm[0] if norm else None),
            node.attrs["eps"],
            self._matrix(table),
        )
