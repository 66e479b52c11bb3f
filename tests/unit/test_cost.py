"""The cost model, against counts done by hand and by brute force."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.tiny_models import TinyModel, dense, tiny_llama

from hexad.graph import Graph
from hexad.graph.cost import (
    FLOAT_SHARE,
    Cost,
    NodeCost,
    cost,
    kv_bytes_per_token,
    limits,
    node_numbers,
    step_numbers,
)
from hexad.graph.fuse import fuse
from hexad.weights import Q4_0

H, FF, V, Q, KV, LAYERS = 64, 96, 160, 64, 32, 2
MATRICES = LAYERS * (H * (Q + 2 * KV) + Q * H + 3 * H * FF)


def of(model: TinyModel, graph: Graph | None = None, **changes: Any) -> Cost:
    kwargs: dict[str, Any] = {"rows": 1, "context": 1, "kv_dtype": "f32", **changes}
    return cost(graph or model.graph(), model.weights, **kwargs)


def test_a_decoded_token_by_hand() -> None:
    total = of(tiny_llama(), context=100).total
    assert total.linear_macs == MATRICES + H * V
    assert total.attention_macs == LAYERS * 100 * Q * 2
    norms = 2 * LAYERS + 1
    assert total.weight_bytes == 4 * (MATRICES + H * V + norms * H)
    assert total.kv_read_bytes == LAYERS * 100 * 2 * KV * 4
    assert total.kv_written_bytes == LAYERS * 2 * KV * 4
    other = norms * 4 * H + LAYERS * (3 * (Q + KV) + 4 * 100 * 4 + 4 * FF + 2 * H)
    assert total.other_flops == other
    assert total.flops == 2 * (total.linear_macs + total.attention_macs) + other


@pytest.mark.parametrize(("rows", "context"), [(1, 1), (7, 7), (5, 40), (64, 64)])
def test_a_prompt_counts_the_pairs_that_causality_leaves(rows: int, context: int) -> None:
    total = of(tiny_llama(), rows=rows, context=context).total
    pairs = sum(1 for query in range(context - rows, context) for key in range(context) if key <= query)
    assert total.attention_macs == LAYERS * 2 * pairs * Q
    assert total.linear_macs == rows * MATRICES + H * V
    assert total.kv_read_bytes == LAYERS * context * 2 * KV * 4
    assert total.kv_written_bytes == LAYERS * rows * 2 * KV * 4


@pytest.mark.parametrize("window", [1, 5, 32, 64, 100])
@pytest.mark.parametrize(("rows", "context"), [(1, 1), (7, 7), (5, 40), (40, 45), (64, 64)])
def test_a_window_limits_pairs_and_what_is_read(rows: int, context: int, window: int) -> None:
    model = tiny_llama(context=1000, model_type="mistral")
    model.config["sliding_window"] = window
    total = of(model, rows=rows, context=context).total
    seen = [range(max(0, p - window + 1), p + 1) for p in range(context - rows, context)]
    assert total.attention_macs == LAYERS * 2 * sum(map(len, seen)) * Q
    assert total.kv_read_bytes == LAYERS * len({p for keys in seen for p in keys}) * 2 * KV * 4
    assert total.kv_written_bytes == LAYERS * rows * 2 * KV * 4


def test_chunks_of_a_prompt_do_its_work() -> None:
    model = tiny_llama(model_type="mistral")
    model.config["sliding_window"] = 17
    whole = of(model, rows=50, context=50, sample_rows=0).total
    chunks = [of(model, rows=10, context=10 * (i + 1), sample_rows=0).total for i in range(5)]
    for field in ("linear_macs", "attention_macs", "other_flops", "kv_written_bytes", "activation_bytes"):
        assert getattr(whole, field) == sum(getattr(chunk, field) for chunk in chunks), field


def test_an_untied_table_costs_the_rows_looked_up() -> None:
    tied, untied = tiny_llama(), tiny_llama(tied=False)
    assert of(untied).total.weight_bytes == of(tied).total.weight_bytes + H * 4
    assert of(untied, rows=3, context=3).total.weight_bytes == of(tied).total.weight_bytes + 3 * H * 4
    table = V * H * 4
    assert of(untied, rows=3, context=3, sample_rows=0).nodes[0].weight_bytes == 3 * H * 4
    assert of(untied, rows=10**6, context=10**6).nodes[0].weight_bytes == table


def test_without_samples_the_head_costs_nothing() -> None:
    model = tiny_llama()
    nodes = of(model, rows=3, context=3, sample_rows=0).nodes
    assert nodes[-1] == NodeCost(0, 0, 0, 0, 0, 0, 0)
    assert of(model, rows=3, context=3, sample_rows=3).nodes[-1].linear_macs == 3 * H * V


def test_fusing_saves_activations_and_changes_no_other_cost() -> None:
    model = tiny_llama(attention_bias=True, tied=False, model_type="qwen3")
    for layer in range(LAYERS):
        for name in "qk":
            model.weights[f"model.layers.{layer}.self_attn.{name}_norm.weight"] = dense(np.ones(16))
    graph = model.graph()
    plain = of(model, graph, rows=9, context=30).total
    fused = of(model, fuse(graph), rows=9, context=30).total
    for field in NodeCost.__dataclass_fields__:
        if field != "activation_bytes":
            assert getattr(fused, field) == getattr(plain, field), field
    assert fused.activation_bytes < plain.activation_bytes / 2


def test_bytes_are_the_files_unless_others_are_given() -> None:
    model = tiny_llama(format=Q4_0)
    total = of(model).total
    norms = (2 * LAYERS + 1) * H * 4
    assert total.weight_bytes == (MATRICES + V * H) * 18 // 32 + norms
    packed = dict.fromkeys(model.weights, 1000)
    assert of(model, weight_bytes=packed).total.weight_bytes == 1000 * len(model.weights)
    assert of(model, weight_bytes={"model.norm.weight": 0}).total.weight_bytes == total.weight_bytes - H * 4


@pytest.mark.parametrize(("kv_dtype", "size"), [("f32", 4), ("f16", 2)])
def test_kv_bytes(kv_dtype: Any, size: int) -> None:
    model = tiny_llama()
    for graph in (model.graph(), fuse(model.graph())):
        assert kv_bytes_per_token(graph, kv_dtype) == LAYERS * 2 * KV * size
        assert kv_bytes_per_token(graph, kv_dtype, head_multiple=16) == LAYERS * 2 * KV * size
        assert kv_bytes_per_token(graph, kv_dtype, head_multiple=24) == LAYERS * 2 * KV // 16 * 24 * size
        assert of(model, graph, kv_dtype=kv_dtype).total.kv_written_bytes == LAYERS * 2 * KV * size


def test_kv_bytes_of_q8_have_a_scale_for_each_head() -> None:
    model = tiny_llama()  # 2 KV heads of 16
    for graph in (model.graph(), fuse(model.graph())):
        assert kv_bytes_per_token(graph, "q8") == LAYERS * 2 * 2 * 20
        assert kv_bytes_per_token(graph, "q8", head_multiple=32) == LAYERS * 2 * 2 * 36
        total = of(model, graph, rows=3, context=9, kv_dtype="q8").total
        assert total.kv_written_bytes == 3 * LAYERS * 2 * 2 * 20
        assert total.kv_read_bytes == 9 * LAYERS * 2 * 2 * 20


def test_limits() -> None:
    model = tiny_llama()
    decode, prefill = of(model, context=64), of(model, rows=64, context=64)
    found = limits(decode, prefill, prompt=64, bandwidth=1e9, int8_rate=1e12)
    moved = decode.total.weight_bytes + LAYERS * 65 * 2 * KV * 4
    assert found.decode == pytest.approx(1e9 / moved)
    seconds = prefill.total.linear_macs / 1e12 + prefill.total.attention_macs / (1e12 / FLOAT_SHARE)
    assert found.prefill == pytest.approx(64 / seconds)


def test_step_numbers_add_up_to_any_step() -> None:
    model = tiny_llama(format=Q4_0)
    numbers = step_numbers(model.graph(), model.weights, kv_dtype="f16")
    for rows, context, draws in ((1, 100, 1), (30, 64, 0), (7, 7, 3)):
        whole = of(model, rows=rows, context=context, sample_rows=draws, kv_dtype="f16").total
        pairs = sum(range(context - rows + 1, context + 1))
        assert rows * numbers.token_macs + draws * numbers.draw_macs == whole.linear_macs
        assert pairs * numbers.pair_macs == whole.attention_macs
        assert context * numbers.position_bytes == whole.kv_read_bytes
    assert numbers.step_bytes == whole.weight_bytes
    packed = dict.fromkeys(model.weights, 1000)
    assert step_numbers(
        model.graph(), model.weights, kv_dtype="f16", weight_bytes=packed
    ).step_bytes == 1000 * len(packed)


def test_node_numbers_add_up_to_the_steps() -> None:
    model = tiny_llama(tied=False)
    graph = fuse(model.graph())
    numbers = node_numbers(graph, model.weights, kv_dtype="q8")
    assert len(numbers) == len(graph.nodes)
    total = step_numbers(graph, model.weights, kv_dtype="q8")
    assert tuple(map(sum, zip(*numbers, strict=True))) == total
    heads = [place for place, node in enumerate(graph.nodes) if node.op == "fused_logits"]
    assert [place for place, n in enumerate(numbers) if n.draw_macs] == heads
