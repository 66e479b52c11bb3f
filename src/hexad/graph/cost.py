"""The cost model: multiply-adds and bytes of a graph, and the speed a machine can at best reach with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from hexad.config import CacheDtype
from hexad.graph.graph import Graph
from hexad.graph.node import Node
from hexad.graph.ops import OPS, taken_rows
from hexad.weights import Weight

FLOAT_SHARE = 4
"""int8 multiply-adds per float32 multiply-add in one vector register: the assumed ratio of the two rates."""


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One node's share of a step. Bytes are those that must move once; *_macs and other_flops: see ops.Work.

    activation_bytes: float32 rows read and written, each distinct input once.
    """

    linear_macs: int
    attention_macs: int
    other_flops: int
    weight_bytes: int
    kv_read_bytes: int
    kv_written_bytes: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        """Floating-point operations, a multiply-add being two."""
        return 2 * (self.linear_macs + self.attention_macs) + self.other_flops


@dataclass(frozen=True, slots=True)
class Cost:
    """A step: each node's cost, and the sum.

    In `total` a tensor read by several nodes counts once: a tied embedding table is read whole for the
    logits, so the rows that `embed` takes from it cost nothing more.
    """

    nodes: tuple[NodeCost, ...]
    total: NodeCost


@dataclass(frozen=True, slots=True)
class SpeedLimits:
    """Tokens per second no implementation of the same arithmetic can pass on a machine."""

    decode: float
    prefill: float


class StepNumbers(NamedTuple):
    """What any step costs is a sum of these; see `step_numbers`."""

    step_bytes: int
    token_macs: int
    draw_macs: int
    pair_macs: int
    position_bytes: int

    @classmethod
    def of(cls, idle: NodeCost, drawing: NodeCost) -> StepNumbers:
        """Of the costs of one token's step in which nothing and one row of logits is wanted."""
        return cls(
            step_bytes=drawing.weight_bytes,
            token_macs=idle.linear_macs,
            draw_macs=drawing.linear_macs - idle.linear_macs,
            pair_macs=idle.attention_macs,
            position_bytes=idle.kv_read_bytes,
        )


def cost(
    graph: Graph,
    weights: Mapping[str, Weight],
    *,
    rows: int,
    context: int,
    kv_dtype: CacheDtype,
    sample_rows: int = 1,
    weight_bytes: Mapping[str, int] | None = None,
) -> Cost:
    """The cost of one step that computes the last `rows` positions of one sequence of `context` tokens.

    A decoded token is rows=1; a whole prompt is rows=context. sample_rows: rows whose logits are wanted.
    weight_bytes: bytes of tensors by name where they differ from the checkpoint's, e.g. packed ones.
    """
    taken = taken_rows(graph)
    reads: dict[str, int] = {}
    nodes = []
    for number, node in enumerate(graph.nodes):
        node_rows = sample_rows if taken[number] else rows
        inputs = [graph.nodes[value].features for value in node.inputs]
        work = OPS[node.op].work(node, inputs, node_rows, context)
        read = {name: _bytes_read(node, name, node_rows, weights, weight_bytes) for name in node.weights}
        for name, amount in read.items():
            reads[name] = max(reads.get(name, 0), amount)
        head_dim = node.attrs.get("head_dim", 1)  # what has no heads moves no KV
        widths = sum(graph.nodes[value].features for value in set(node.inputs))
        nodes.append(
            NodeCost(
                linear_macs=work.linear_macs,
                attention_macs=work.attention_macs,
                other_flops=work.other_flops,
                weight_bytes=sum(read.values()),
                kv_read_bytes=kv_bytes(work.kv_read, head_dim, kv_dtype),
                kv_written_bytes=kv_bytes(work.kv_written, head_dim, kv_dtype),
                activation_bytes=4 * node_rows * (widths + node.features),
            )
        )
    total = NodeCost(
        linear_macs=sum(node.linear_macs for node in nodes),
        attention_macs=sum(node.attention_macs for node in nodes),
        other_flops=sum(node.other_flops for node in nodes),
        weight_bytes=sum(reads.values()),
        kv_read_bytes=sum(node.kv_read_bytes for node in nodes),
        kv_written_bytes=sum(node.kv_written_bytes for node in nodes),
        activation_bytes=sum(node.activation_bytes for node in nodes),
    )
    return Cost(tuple(nodes), total)


def step_numbers(
    graph: Graph,
    weights: Mapping[str, Weight],
    *,
    kv_dtype: CacheDtype,
    weight_bytes: Mapping[str, int] | None = None,
) -> StepNumbers:
    """The terms of a step's cost, which is linear in what the step holds; sliding windows, which are not, do
    not count.

    step_bytes: read once a step, the weights. token_macs: multiply-adds with weights per token; draw_macs:
    per row of logits. pair_macs: multiply-adds of attention per pair of a token and a position it looks at.
    position_bytes: of KV, per position that a sequence looks back on. weight_bytes: see `cost`.
    """
    return StepNumbers.of(*(c.total for c in _token_costs(graph, weights, kv_dtype, weight_bytes)))


def node_numbers(graph: Graph, weights: Mapping[str, Weight], *, kv_dtype: CacheDtype) -> list[StepNumbers]:
    """`step_numbers` of each node by itself. What several nodes read counts for each of them."""
    idle, drawing = _token_costs(graph, weights, kv_dtype, None)
    return [StepNumbers.of(*pair) for pair in zip(idle.nodes, drawing.nodes, strict=True)]


def _token_costs(
    graph: Graph,
    weights: Mapping[str, Weight],
    kv_dtype: CacheDtype,
    weight_bytes: Mapping[str, int] | None,
) -> tuple[Cost, Cost]:
    """Of a step of one token, without and with its logits."""
    idle, drawing = (
        cost(
            graph, weights, rows=1, context=1, kv_dtype=kv_dtype, sample_rows=rows, weight_bytes=weight_bytes
        )
        for rows in (0, 1)
    )
    return idle, drawing


def kv_bytes(numbers: int, head_dim: int, kv_dtype: CacheDtype) -> int:
    """Bytes of this many numbers in the KV cache: whole heads, of which each has a scale in q8."""
    head = {"f32": 4 * head_dim, "f16": 2 * head_dim, "q8": head_dim + 4}[kv_dtype]
    return numbers // head_dim * head


def kv_bytes_per_token(graph: Graph, kv_dtype: CacheDtype, *, head_multiple: int = 1) -> int:
    """Bytes of KV cache that one token takes over all layers.

    head_multiple: the features of a head fill up to a multiple of it. Padding is a backend's matter: the
    model needs none, which is what `cost` counts; a backend that allocates knows its own.
    """
    total = 0
    for node in graph.nodes:
        if node.op in ("attention", "fused_attention"):
            head = -(-node.attrs["head_dim"] // head_multiple) * head_multiple
            total += kv_bytes(2 * node.attrs["kv_heads"] * head, head, kv_dtype)
    return total


def limits(decode: Cost, prefill: Cost, *, prompt: int, bandwidth: float, int8_rate: float) -> SpeedLimits:
    """The limits that bandwidth [bytes/s] and int8 rate [multiply-adds/s] set.

    decode: the cost of one decoded token; its weights and its KV must be read, so it takes at least their
    bytes ÷ bandwidth. prefill: the cost of `prompt` tokens at once; their multiply-adds with weights go at
    the int8 rate, those of attention at the float32 rate, which is taken to be int8_rate / FLOAT_SHARE.
    """
    moved = decode.total.weight_bytes + decode.total.kv_read_bytes + decode.total.kv_written_bytes
    seconds = (prefill.total.linear_macs + FLOAT_SHARE * prefill.total.attention_macs) / int8_rate
    return SpeedLimits(decode=bandwidth / moved, prefill=prompt / seconds)


def _bytes_read(
    node: Node, name: str, rows: int, weights: Mapping[str, Weight], weight_bytes: Mapping[str, int] | None
) -> int:
    """Bytes of tensor `name` that a node of this many rows reads: all of it, or the rows `embed` looks up."""
    whole: int = (weight_bytes or {}).get(name, weights[name].nbytes)
    if rows == 0:
        return 0
    if node.op != "embed":
        return whole
    vocabulary = weights[name].shape[0]
    return whole * min(rows, vocabulary) // vocabulary
