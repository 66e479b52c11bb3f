"""fuse: rewrites a graph into the few large ops that backends run.

Pure and structural: it looks at ops and edges, never at weight formats or sizes. A llama layer becomes
five nodes:

    norm, q, k, v                →  fused_linear "store"
    rope, rope, attention        →  fused_attention, reading columns of the former; so go norms of their heads
    o, add                       →  fused_linear "add"
    norm, gate, up, gated        →  fused_linear "gated"
    down, add                    →  fused_linear "add"

What matches no pattern keeps its plain node, so every graph stays valid. A linear, an attention or the
logits alone are the smallest match: after fuse there is none of these as a plain node. Nodes that nothing
reads are dropped.

A node goes into another only where nobody else reads its value. Those of q and k before their norm and
rotation nobody else may read either, and q, k and v must be three values: backends norm and rotate q and k
where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from hexad.graph.graph import Graph
from hexad.graph.node import Node, Value


def fuse(graph: Graph) -> Graph:
    """The fused graph over the same weights; the given graph is left as it is."""
    return _Fuser(graph).run()


class _Fused(NamedTuple):
    """A node to be: `Graph.append` finds its width."""

    op: str
    inputs: tuple[Value, ...]
    weights: tuple[str, ...]
    attrs: Mapping[str, Any]


class _Fuser:
    """replaced: the fused node that stands in a node's place. absorbed: nodes that went into one.
    home: for a value that became columns of a fused node, the place of that node."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.nodes
        self.users = _users(graph.nodes)
        self.replaced: dict[Value, _Fused] = {}
        self.absorbed: set[Value] = set()
        self.home: dict[Value, Value] = {}

    def run(self) -> Graph:
        patterns = (
            ("attention", self._attention),
            ("gated", self._gated),
            ("add", self._add),
            ("linear", self._linear),
            ("logits", self._logits),
        )
        for op, pattern in patterns:
            for place, node in enumerate(self.nodes):
                taken = place in self.absorbed or place in self.replaced
                if node.op == op and self._live(place) and not taken:
                    pattern(place)
        return self._renumbered()

    # Patterns.

    def _attention(self, place: Value) -> None:
        node = self.nodes[place]
        q, k, v = node.inputs
        readers = {place}  # and what goes into it
        attrs = {**node.attrs, "rope": None, "norms": (None, None), "norm_eps": 0.0}
        ropes = self._in_place("rope", q, k, v, readers)
        if ropes and ropes[0].attrs == ropes[1].attrs:
            attrs["rope"] = ropes[0].attrs["rope"]
            readers |= {q, k}
            q, k = (rope.inputs[0] for rope in ropes)
        norms = self._in_place("norm", q, k, v, readers)
        heads = [node.attrs["heads"], node.attrs["kv_heads"]]
        if norms and [n.attrs["heads"] for n in norms] == heads and len({n.attrs["eps"] for n in norms}) == 1:
            attrs["norms"] = tuple(norm.weights[0] for norm in norms)
            attrs["norm_eps"] = norms[0].attrs["eps"]
            readers |= {q, k}
            q, k = (norm.inputs[0] for norm in norms)
        self.absorbed |= readers - {place}
        attrs["offsets"] = self._side_by_side((q, k, v), readers)
        names = tuple(name for name in attrs["norms"] if name is not None)
        self.replaced[place] = _Fused("fused_attention", (q, k, v), names, attrs)

    def _in_place(self, op: str, q: Value, k: Value, v: Value, readers: set[Value]) -> list[Node]:
        """The nodes that make q and k, if both are of this op, nobody but `readers` reads them and nobody but
        them what they read, and that and v are three values; else none."""
        nodes = [self.nodes[value] for value in (q, k)]
        if any(node.op != op for node in nodes) or not self._read_only_by({q, k}, readers):
            return []
        read = [node.inputs[0] for node in nodes]
        alone = self._read_only_by({read[0]}, {q}) and self._read_only_by({read[1]}, {k})
        return nodes if alone and len({*read, v}) == 3 else []

    def _side_by_side(self, values: tuple[Value, Value, Value], readers: set[Value]) -> tuple[int, ...]:
        """Puts those of `values` that are linears of one input, and are read by `readers` alone, into one
        node; gives each value's first column."""
        first = values[0]
        members = [
            value
            for value in dict.fromkeys(values)
            if self.nodes[value].op == "linear"
            and self.nodes[value].inputs == self.nodes[first].inputs
            and self._read_only_by({value}, readers)
        ]
        if len(members) < 2:
            return (0, 0, 0)
        columns, width = {}, 0
        for value in members:
            columns[value] = width
            width += self.nodes[value].features
        place = max(members)
        self.absorbed |= set(members) - {place}
        self.home |= dict.fromkeys(members, place)
        self.replaced[place] = self._fused_linear(members, "store")
        return tuple(columns.get(value, 0) for value in values)

    def _gated(self, place: Value) -> None:
        gate, up = members = self.nodes[place].inputs
        same_input = self.nodes[gate].inputs == self.nodes[up].inputs
        if gate != up and same_input and all(self._is_free_linear(value, {place}) for value in members):
            self.absorbed |= set(members)
            act = self.nodes[place].attrs["act"]
            self.replaced[place] = self._fused_linear(members, "gated", act=act)

    def _add(self, place: Value) -> None:
        a, b = self.nodes[place].inputs
        for linear, residual in ((b, a), (a, b)):
            if a != b and self._is_free_linear(linear, {place}):
                self.absorbed.add(linear)
                self.replaced[place] = self._fused_linear((linear,), "add", residual=(residual,))
                return

    def _linear(self, place: Value) -> None:
        self.replaced[place] = self._fused_linear((place,), "store")

    def _logits(self, place: Value) -> None:
        node = self.nodes[place]
        x, norm, eps = self._normed(node.inputs[0], {place})
        names = (*_present(norm), *node.weights)
        self.replaced[place] = _Fused("fused_logits", (x,), names, {"norm": norm, "eps": eps})

    def _fused_linear(
        self,
        members: Sequence[Value],
        epilogue: str,
        *,
        act: str | None = None,
        residual: tuple[Value, ...] = (),
    ) -> _Fused:
        nodes = [self.nodes[value] for value in members]
        x, norm, eps = self._normed(nodes[0].inputs[0], set(members))
        projections = tuple((n.weights[0], n.weights[1] if len(n.weights) == 2 else None) for n in nodes)
        names = (*_present(norm), *(name for n in nodes for name in n.weights))
        attrs = {"norm": norm, "eps": eps, "projections": projections, "epilogue": epilogue, "act": act}
        return _Fused("fused_linear", (x, *residual), names, attrs)

    def _normed(self, x: Value, readers: set[Value]) -> tuple[Value, str | None, float]:
        """What to read instead of x, and the norm to do first: x's own, if nobody else wants its output."""
        node = self.nodes[x]
        if node.op != "norm" or node.attrs["heads"] is not None or not self._read_only_by({x}, readers):
            return x, None, 0.0
        self.absorbed.add(x)
        return node.inputs[0], node.weights[0], node.attrs["eps"]

    # Questions about the graph.

    def _live(self, value: Value) -> bool:
        return bool(self.users[value]) or value == len(self.nodes) - 1

    def _read_only_by(self, values: set[Value], readers: set[Value]) -> bool:
        last = len(self.nodes) - 1
        return last not in values and all(self.users[value] <= readers for value in values)

    def _is_free_linear(self, value: Value, readers: set[Value]) -> bool:
        return (
            self.nodes[value].op == "linear"
            and value not in self.absorbed
            and value not in self.home
            and self._read_only_by({value}, readers)
        )

    def _renumbered(self) -> Graph:
        fused = Graph(self.graph.weights)
        number: dict[Value, Value] = {}
        for place, plain in enumerate(self.nodes):
            if place in self.absorbed or not self._live(place):
                continue
            node = self.replaced.get(place, plain)
            inputs = tuple(number[self.home.get(value, value)] for value in node.inputs)
            number[place] = fused.append(node.op, inputs, node.weights, **node.attrs)
        return fused


def _users(nodes: Sequence[Node]) -> list[set[Value]]:
    """For each value, the nodes that read it and are themselves needed for the last one."""
    users: list[set[Value]] = [set() for _ in nodes]
    for place in range(len(nodes) - 1, -1, -1):
        if users[place] or place == len(nodes) - 1:
            for value in nodes[place].inputs:
                users[value].add(place)
    return users


def _present(name: str | None) -> tuple[str, ...]:
    return () if name is None else (name,)
