"""fuse: what becomes one node, what stays, and that nothing changes but the shape of the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.tiny_models import dense, limits_for, one_sequence, random_weight, tiny_llama

from hexad.backends.backend import CompileOptions
from hexad.backends.reference import ReferenceBackend
from hexad.graph import Graph, RopeSpec, ops
from hexad.graph.fuse import fuse

ROPE = RopeSpec(head_dim=8, rotary_dim=8, theta=1e4)


def logits(graph: Graph) -> np.ndarray:
    executable = ReferenceBackend().compile(
        graph, graph.weights, CompileOptions(kv_dtype="f32"), limits_for(kv_blocks=4)
    )
    executable.forward(one_sequence([5, 3, 9, 9, 1, 30, 2], sample="all"))
    return executable.logits()


def assert_same(graph: Graph) -> Graph:
    """The graph fused: valid, free of dead nodes, and the same function to float32 noise."""
    before = list(graph.nodes)
    fused = fuse(graph)
    assert graph.nodes == before
    ops.taken_rows(fused)
    read = {value for node in fused.nodes for value in node.inputs}
    assert read == set(range(len(fused.nodes) - 1))
    expected = logits(graph)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(logits(fused), expected, rtol=1e-4, atol=1e-5)
    return fused


def names(graph: Graph) -> list[str]:
    return [
        f"{node.op} {node.attrs['epilogue']}" if node.op == "fused_linear" else node.op
        for node in graph.nodes
    ]


class Odd:
    """A builder over random weights made on first use; every width is 32, 4 heads of 8."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(1)
        self.weights: dict[str, Any] = {"table.weight": random_weight(self.rng, (40, 32), std=1.0)}
        self.graph = Graph(self.weights)
        self.x = self.graph.embed("table")

    def linear(self, x: int, name: str, *, bias: bool = False) -> int:
        self.weights[f"{name}.weight"] = random_weight(self.rng, (32, 32))
        if bias:
            self.weights[f"{name}.bias"] = random_weight(self.rng, (32,))
        return self.graph.linear(x, name)

    def norm(self, x: int, name: str, *, heads: int | None = None, eps: float = 1e-5) -> int:
        self.weights[f"{name}.weight"] = dense(self.rng.uniform(0.5, 1.5, 32 // (heads or 1)))
        return self.graph.norm(x, name, eps=eps, heads=heads)

    def attention(self, q: int, k: int, v: int, layer: int = 0) -> int:
        return self.graph.attention(q, k, v, layer=layer, heads=4, kv_heads=4, head_dim=8, scale=8**-0.5)

    def done(self, x: int) -> Graph:
        self.graph.logits(self.graph.take_rows(x), "table")
        return self.graph


@pytest.mark.parametrize("shape", [{}, {"attention_bias": True}, {"tied": False, "kv_heads": 4, "layers": 1}])
def test_a_llama_layer_is_five_nodes(shape: dict[str, Any]) -> None:
    model = tiny_llama(**shape)
    fused = assert_same(model.graph())
    layer = [
        "fused_linear store",
        "fused_attention",
        "fused_linear add",
        "fused_linear gated",
        "fused_linear add",
    ]
    layers = model.config["num_hidden_layers"]
    assert names(fused) == ["embed", *layer * layers, "take_rows", "fused_logits"]


def test_the_fused_nodes_say_what_they_hold() -> None:
    fused = fuse(tiny_llama(attention_bias=True).graph())
    qkv, attention, out, mlp, down = fused.nodes[1:6]
    self_attn = "model.layers.0.self_attn"
    assert qkv.attrs["norm"] == "model.layers.0.input_layernorm.weight"
    assert qkv.attrs["eps"] == 1e-5
    assert qkv.attrs["projections"] == tuple(
        (f"{self_attn}.{name}_proj.weight", f"{self_attn}.{name}_proj.bias") for name in "qkv"
    )
    assert qkv.weights[:3] == (
        "model.layers.0.input_layernorm.weight", f"{self_attn}.q_proj.weight", f"{self_attn}.q_proj.bias",
    )  # fmt: skip
    assert qkv.features == 64 + 32 + 32
    assert attention.inputs == (1, 1, 1)
    assert attention.attrs["offsets"] == (0, 64, 96)
    assert attention.attrs["rope"] == RopeSpec(16, 16, 1e4)
    assert out.inputs == (2, 0)
    assert out.attrs["norm"] is None
    assert mlp.attrs["projections"] == tuple(
        (f"model.layers.0.mlp.{n}_proj.weight", None) for n in ("gate", "up")
    )
    assert mlp.attrs["act"] == "silu"
    assert mlp.features == 96
    assert down.inputs == (4, 3)
    head = fused.nodes[-1]
    assert head.attrs == {"norm": "model.norm.weight", "eps": 1e-5}
    assert head.weights == ("model.norm.weight", "model.embed_tokens.weight")


def test_a_norm_with_another_reader_stays() -> None:
    odd = Odd()
    h = odd.norm(odd.x, "n")
    x = odd.graph.add(h, odd.linear(h, "a"))
    assert names(assert_same(odd.done(x))) == [
        "embed",
        "norm",
        "fused_linear add",
        "take_rows",
        "fused_logits",
    ]


def test_a_linear_with_two_readers_is_not_folded() -> None:
    odd = Odd()
    y = odd.linear(odd.norm(odd.x, "n"), "a", bias=True)
    x = odd.graph.add(odd.graph.gated(y, y, "silu"), odd.graph.add(y, y))
    kept = ["embed", "fused_linear store", "gated", "add", "add", "take_rows", "fused_logits"]
    assert names(assert_same(odd.done(x))) == kept


def test_a_gate_and_an_up_of_different_inputs_stay_apart() -> None:
    odd = Odd()
    h = odd.norm(odd.x, "n")
    x = odd.graph.gated(odd.linear(h, "gate"), odd.linear(odd.x, "up"), "silu")
    kept = ["embed", "fused_linear store", "fused_linear store", "gated", "take_rows", "fused_logits"]
    fused = assert_same(odd.done(x))
    assert names(fused) == kept
    assert fused.nodes[1].attrs["norm"] == "n.weight"  # the gate is the norm's only reader
    assert fused.nodes[2].attrs["norm"] is None


def test_of_two_linears_added_one_becomes_the_residual() -> None:
    odd = Odd()
    x = odd.graph.add(odd.linear(odd.x, "a"), odd.linear(odd.x, "b"))
    fused = assert_same(odd.done(x))
    assert names(fused) == ["embed", "fused_linear store", "fused_linear add", "take_rows", "fused_logits"]
    assert fused.nodes[2].inputs == (0, 1)


def test_a_linear_on_the_left_of_an_add_is_folded_too() -> None:
    odd = Odd()
    fused = assert_same(odd.done(odd.graph.add(odd.linear(odd.x, "a"), odd.x)))
    assert names(fused) == ["embed", "fused_linear add", "take_rows", "fused_logits"]


def test_attention_without_positions() -> None:
    odd = Odd()
    x = odd.attention(*(odd.linear(odd.x, name) for name in "qkv"))
    fused = assert_same(odd.done(x))
    assert names(fused) == ["embed", "fused_linear store", "fused_attention", "take_rows", "fused_logits"]
    assert fused.nodes[2].attrs["rope"] is None


@pytest.mark.parametrize("other", [RopeSpec(8, 4, 1e4), RopeSpec(8, 8, 1e6)])
def test_two_different_ropes_stay(other: RopeSpec) -> None:
    odd = Odd()
    q, k, v = (odd.linear(odd.x, name) for name in "qkv")
    x = odd.attention(odd.graph.rope(q, ROPE), odd.graph.rope(k, other), v)
    fused = assert_same(odd.done(x))
    assert names(fused)[1:7] == [*["fused_linear store"] * 3, "rope", "rope", "fused_attention"]
    assert fused.nodes[6].attrs["offsets"] == (0, 0, 0)


def test_a_rotated_key_that_is_read_elsewhere_stays() -> None:
    odd = Odd()
    q, k, v = (odd.linear(odd.x, name) for name in "qkv")
    k = odd.graph.rope(k, ROPE)
    x = odd.graph.add(odd.attention(odd.graph.rope(q, ROPE), k, v), k)
    assert names(assert_same(odd.done(x))).count("rope") == 2


@pytest.mark.parametrize("positions", [True, False])
def test_norms_of_heads_go_with_the_rotation(positions: bool) -> None:
    odd = Odd()
    h = odd.norm(odd.x, "n")
    q, k, v = (odd.linear(h, name) for name in "qkv")
    q, k = odd.norm(q, "qn", heads=4), odd.norm(k, "kn", heads=4)
    if positions:
        q, k = odd.graph.rope(q, ROPE), odd.graph.rope(k, ROPE)
    fused = assert_same(odd.done(odd.attention(q, k, v)))
    assert names(fused) == ["embed", "fused_linear store", "fused_attention", "take_rows", "fused_logits"]
    qkv, attention = fused.nodes[1:3]
    assert qkv.attrs["norm"] == "n.weight"
    assert attention.inputs == (1, 1, 1)
    assert attention.weights == attention.attrs["norms"] == ("qn.weight", "kn.weight")
    assert attention.attrs["norm_eps"] == 1e-5
    assert attention.attrs["offsets"] == (0, 32, 64)
    assert attention.attrs["rope"] == (ROPE if positions else None)


@pytest.mark.parametrize("odd_one", ["none", "heads", "whole", "eps", "read", "source"])
def test_norms_that_do_not_fit_stay(odd_one: str) -> None:
    """k's norm is absent, or of other heads, the whole width, another eps, or it or its input is read."""
    odd = Odd()
    q, key, v = (odd.linear(odd.x, name) for name in "qkv")
    q, k = odd.norm(q, "qn", heads=4), key
    if odd_one != "none":
        heads = {"heads": 2, "whole": None}.get(odd_one, 4)
        k = odd.norm(k, "kn", heads=heads, eps=1e-3 if odd_one == "eps" else 1e-5)
    x = odd.attention(odd.graph.rope(q, ROPE), odd.graph.rope(k, ROPE), v)
    if odd_one in ("read", "source"):
        x = odd.graph.add(x, k if odd_one == "read" else key)
    fused = assert_same(odd.done(x))
    assert names(fused).count("norm") == (1 if odd_one == "none" else 2)
    attention = next(node for node in fused.nodes if node.op == "fused_attention")
    assert attention.attrs["norms"] == (None, None)
    assert attention.weights == ()
    assert names(fused).count("rope") == (2 if odd_one == "read" else 0)


def test_norms_of_one_value_for_queries_and_keys_stay() -> None:
    odd = Odd()
    y, v = odd.linear(odd.x, "y"), odd.linear(odd.x, "v")
    q, k = odd.norm(y, "qn", heads=4), odd.norm(y, "kn", heads=4)
    assert names(assert_same(odd.done(odd.attention(q, k, v)))).count("norm") == 2


def test_a_norm_of_heads_goes_into_no_linear() -> None:
    odd = Odd()
    x = odd.linear(odd.norm(odd.x, "n", heads=4), "a")
    odd.graph.logits(odd.norm(odd.graph.take_rows(x), "m", heads=2), "table")
    kept = ["embed", "norm", "fused_linear store", "take_rows", "norm", "fused_logits"]
    assert names(assert_same(odd.graph)) == kept


def test_projections_of_different_inputs_share_what_they_can() -> None:
    odd = Odd()
    h = odd.norm(odd.x, "n")
    q, k, v = odd.linear(h, "q"), odd.linear(h, "k"), odd.linear(odd.x, "v")
    x = odd.attention(odd.graph.rope(q, ROPE), odd.graph.rope(k, ROPE), v)
    fused = assert_same(odd.done(x))
    assert names(fused)[1:4] == ["fused_linear store", "fused_linear store", "fused_attention"]
    assert fused.nodes[3].attrs["offsets"] == (0, 32, 0)
    assert fused.nodes[3].inputs == (1, 1, 2)


def test_one_projection_for_keys_and_values() -> None:
    odd = Odd()
    q, kv = odd.linear(odd.x, "q"), odd.linear(odd.x, "kv")
    fused = assert_same(odd.done(odd.attention(odd.graph.rope(q, ROPE), odd.graph.rope(kv, ROPE), kv)))
    # The values are the keys as they were before rotation, so the rotation may not happen in place.
    assert names(fused)[1:6] == [*["fused_linear store"] * 2, "rope", "rope", "fused_attention"]
    assert fused.nodes[5].attrs["rope"] is None


def test_queries_that_are_keys_and_values() -> None:
    odd = Odd()
    y = odd.graph.rope(odd.linear(odd.x, "y"), ROPE)
    assert names(assert_same(odd.done(odd.attention(y, y, y))))[1:4] == [
        "fused_linear store", "rope", "fused_attention",
    ]  # fmt: skip


def test_a_projection_that_two_attentions_read_stays_whole() -> None:
    odd = Odd()
    q, k, v = (odd.linear(odd.x, name) for name in "qkv")
    second = odd.linear(odd.x, "q2")
    x = odd.graph.add(odd.attention(q, k, v, layer=0), odd.attention(second, k, v, layer=1))
    fused = assert_same(odd.done(x))
    assert names(fused).count("fused_linear store") == 4


def test_dead_nodes_go_and_do_not_count_as_readers() -> None:
    odd = Odd()
    h = odd.norm(odd.x, "n")
    odd.graph.add(odd.linear(h, "dead"), h)
    x = odd.graph.add(odd.x, odd.linear(h, "a"))
    fused = assert_same(odd.done(x))
    assert names(fused) == ["embed", "fused_linear add", "take_rows", "fused_logits"]
    assert fused.nodes[1].attrs["norm"] == "n.weight"


def test_a_graph_may_end_in_any_op() -> None:
    odd = Odd()
    odd.linear(odd.norm(odd.x, "n"), "a")
    fused = assert_same(odd.graph)
    assert names(fused) == ["embed", "fused_linear store"]


def test_fusing_does_not_look_at_formats() -> None:
    from hexad.weights import Q4_0, Q8_0

    mixed = tiny_llama(intermediate=128, formats={"v_proj": Q8_0, "down_proj": Q4_0})
    plain = tiny_llama(intermediate=128)
    assert fuse(mixed.graph()).nodes == fuse(plain.graph()).nodes
