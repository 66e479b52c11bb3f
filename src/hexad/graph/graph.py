"""Graph: a model as a list of nodes, and the builder a model file calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hexad.errors import CheckpointError
from hexad.graph.node import Node, RopeSpec, Value
from hexad.graph.ops import OPS
from hexad.weights import Weight


class Graph:
    """Nodes in execution order. Each builder method appends one node and returns its value.

    Weights are named as Hugging Face names them; widths come from their shapes, and a bias is used where the
    checkpoint has one. A missing weight or a wrong shape raises CheckpointError naming the tensor.
    """

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self.weights = weights
        self.nodes: list[Node] = []

    # The ops. Definitions, shape rules and costs: graph/ops.py.

    def embed(self, name: str) -> Value:
        """Rows of the table `name.weight` [vocab, features], one per token."""
        return self.append("embed", (), (f"{name}.weight",))

    def norm(self, x: Value, name: str, *, eps: float, heads: int | None = None) -> Value:
        """RMS norm: x / √(mean(x²) + eps) × `name.weight`, of each of `heads` heads by itself if given."""
        return self.append("norm", (x,), (f"{name}.weight",), eps=eps, heads=heads)

    def linear(self, x: Value, name: str, *, bias: bool = False) -> Value:
        """x · `name.weight`ᵀ, plus `name.bias` where the checkpoint has it; with `bias` it must."""
        bias = bias or f"{name}.bias" in self.weights
        names = (f"{name}.weight", f"{name}.bias") if bias else (f"{name}.weight",)
        return self.append("linear", (x,), names)

    def rope(self, x: Value, rope: RopeSpec) -> Value:
        """Rotates each head of x by its row's position."""
        return self.append("rope", (x,), rope=rope)

    def attention(
        self, q: Value, k: Value, v: Value, *,
        layer: int, heads: int, kv_heads: int, head_dim: int, scale: float, window: int | None = None,
    ) -> Value:  # fmt: skip
        """Causal attention of every row over its own sequence; writes k and v to the paged cache of `layer`.

        Query head h reads KV head h // (heads / kv_heads). window: how many positions a row sees, its own
        being the last; None for all.
        """
        return self.append(
            "attention", (q, k, v),
            layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale, window=window,
        )  # fmt: skip

    def gated(self, gate: Value, up: Value, act: str) -> Value:
        """act(gate) × up; act is "silu"."""
        return self.append("gated", (gate, up), act=act)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        return self.append("add", (a, b))

    def take_rows(self, x: Value) -> Value:
        """The rows whose logits the batch asks for."""
        return self.append("take_rows", (x,))

    def logits(self, x: Value, name: str) -> Value:
        """x · `name.weight`ᵀ: one score per vocabulary entry."""
        return self.append("logits", (x,), (f"{name}.weight",))

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.nodes[-1].features

    def append(
        self, op: str, inputs: tuple[Value, ...], weights: tuple[str, ...] = (), /, **attrs: Any
    ) -> Value:
        """Appends a node of the catalogue, as wide as the op's shape rule makes it."""
        for name in weights:
            if name not in self.weights:
                raise CheckpointError(f"tensor {name} is missing")
        widths = [self.nodes[value].features for value in inputs]
        tensors = [(name, self.weights[name].shape) for name in weights]
        try:
            features = OPS[op].features(widths, tensors, attrs)
        except CheckpointError as error:
            made_by = [name for value in inputs for name in self._made_by(value)]
            if weights or not made_by:  # the rule of an op with weights has named the one that does not fit
                raise
            raise CheckpointError(f"after {', '.join(made_by)}: {error}") from None
        self.nodes.append(Node(op, inputs, weights, features, attrs))
        return len(self.nodes) - 1

    def _made_by(self, value: Value) -> tuple[str, ...]:
        """The tensor a value is the product of, if it is of one, perhaps rotated since."""
        node = self.nodes[value]
        return node.weights[:1] or (self._made_by(node.inputs[0]) if len(node.inputs) == 1 else ())
