"""Graph and Node: a model as a list of ops over 2-D values, and the builder a model file calls.

A value is a float array [rows, features]; a row is one token of the ragged batch or, after `take_rows`, one
position whose logits are wanted. A value is named by the index of the node that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexad.errors import CheckpointError
from hexad.weights import Weight

Value = int


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split form.

    In each head the first `rotary_dim` features are rotated: features i and i + rotary_dim/2 by the angle
    position × theta^(−2i/rotary_dim), computed as a float32 product.
    """

    head_dim: int
    rotary_dim: int
    theta: float

    def inv_freq(self) -> NDArray[np.float32]:
        """Angle per position, float32 [rotary_dim / 2]."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        frequencies: NDArray[np.float64] = 1.0 / np.power(np.float64(self.theta), exponents)
        return frequencies.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Node:
    """One op: frozen, plain data.

    inputs: values it reads. weights: names of checkpoint tensors it reads. features: width of its output.
    """

    op: str
    inputs: tuple[Value, ...]
    weights: tuple[str, ...]
    features: int
    attrs: Mapping[str, Any] = field(default_factory=dict)


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
        weight = self._weight(f"{name}.weight", 2)
        return self._append("embed", (), (f"{name}.weight",), weight.shape[1])

    def norm(self, x: Value, name: str, *, eps: float) -> Value:
        """RMS norm: x / √(mean(x²) + eps) × `name.weight`."""
        features = self.nodes[x].features
        self._weight(f"{name}.weight", 1, (features,))
        return self._append("norm", (x,), (f"{name}.weight",), features, eps=eps)

    def linear(self, x: Value, name: str) -> Value:
        """x · `name.weight`ᵀ, plus `name.bias` where the checkpoint has it."""
        weight = self._weight(f"{name}.weight", 2)
        if weight.shape[1] != self.nodes[x].features:
            raise CheckpointError(
                f"tensor {name}.weight has {weight.shape[1]} input features; "
                f"{self.nodes[x].features} expected"
            )
        names = [f"{name}.weight"]
        if f"{name}.bias" in self.weights:
            self._weight(f"{name}.bias", 1, (weight.shape[0],))
            names.append(f"{name}.bias")
        return self._append("linear", (x,), tuple(names), weight.shape[0])

    def rope(self, x: Value, rope: RopeSpec) -> Value:
        """Rotates each head of x by its row's position."""
        return self._append("rope", (x,), (), self.nodes[x].features, rope=rope)

    def attention(
        self, q: Value, k: Value, v: Value, *,
        layer: int, heads: int, kv_heads: int, head_dim: int, scale: float,
    ) -> Value:  # fmt: skip
        """Causal attention of every row over its own sequence; writes k and v to the paged cache of `layer`.

        Query head h reads KV head h // (heads / kv_heads).
        """
        for value, count, what in ((q, heads, "query"), (k, kv_heads, "key"), (v, kv_heads, "value")):
            if self.nodes[value].features != count * head_dim:
                raise CheckpointError(
                    f"layer {layer}: the {what} projection makes {self.nodes[value].features} features; "
                    f"{count} heads of {head_dim} need {count * head_dim}"
                )
        if heads % kv_heads:
            raise CheckpointError(
                f"layer {layer}: {heads} query heads do not share {kv_heads} KV heads evenly"
            )
        return self._append(
            "attention", (q, k, v), (), heads * head_dim,
            layer=layer, heads=heads, kv_heads=kv_heads, head_dim=head_dim, scale=scale,
        )  # fmt: skip

    def gated(self, gate: Value, up: Value, act: str) -> Value:
        """act(gate) × up; act is "silu"."""
        features = self.nodes[gate].features
        if self.nodes[up].features != features:
            raise CheckpointError(f"gate has {features} features and up {self.nodes[up].features}")
        return self._append("gated", (gate, up), (), features, act=act)

    def add(self, a: Value, b: Value) -> Value:
        """a + b."""
        if self.nodes[a].features != self.nodes[b].features:
            raise CheckpointError(f"cannot add {self.nodes[a].features} to {self.nodes[b].features} features")
        return self._append("add", (a, b), (), self.nodes[a].features)

    def take_rows(self, x: Value) -> Value:
        """The rows whose logits the batch asks for."""
        return self._append("take_rows", (x,), (), self.nodes[x].features)

    def logits(self, x: Value, name: str) -> Value:
        """x · `name.weight`ᵀ: one score per vocabulary entry."""
        weight = self._weight(f"{name}.weight", 2)
        if weight.shape[1] != self.nodes[x].features:
            raise CheckpointError(
                f"tensor {name}.weight has {weight.shape[1]} input features; "
                f"{self.nodes[x].features} expected"
            )
        return self._append("logits", (x,), (f"{name}.weight",), weight.shape[0])

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.nodes[-1].features

    def _append(
        self, op: str, inputs: tuple[Value, ...], weights: tuple[str, ...], features: int, **attrs: Any
    ) -> Value:
        self.nodes.append(Node(op, inputs, weights, features, attrs))
        return len(self.nodes) - 1

    def _weight(self, name: str, dims: int, shape: tuple[int, ...] | None = None) -> Weight:
        weight = self.weights.get(name)
        if weight is None:
            raise CheckpointError(f"tensor {name} is missing")
        if len(weight.shape) != dims or (shape is not None and weight.shape != shape):
            expected = shape if shape is not None else f"{dims} dimensions"
            raise CheckpointError(f"tensor {name} has shape {weight.shape}; {expected} expected")
        return weight
