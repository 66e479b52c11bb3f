"""The reference backend by itself: paging, batching, its refusals, and what it hands out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.sampling import make_batch as sample_batch
from tests.tiny_models import limits_for, make_batch, one_sequence, tiny_llama

from hexad.backends.backend import Batch, CompileOptions, Limits
from hexad.backends.reference import (
    ReferenceBackend,
    ReferenceExecutable,
    from_cache,
    rms_norm,
    rotate,
    silu,
    to_cache,
)
from hexad.backends.reference_sampler import sample
from hexad.errors import BackendError
from hexad.graph import Node, RopeSpec
from hexad.graph.fuse import fuse

NOISE = 1e-4
"""BLAS adds in an order that depends on the shapes; logits are about 10, and 1e-5 has been seen."""

PROMPT = [int(token) for token in np.random.default_rng(3).integers(0, 160, 75)]
OTHER = [int(token) for token in np.random.default_rng(4).integers(0, 160, 40)]


def compiled(kv_dtype: Any = "f32", limits: Limits | None = None, **model: Any) -> ReferenceExecutable:
    graph = tiny_llama(**model).graph()
    options = CompileOptions(kv_dtype=kv_dtype)
    return ReferenceBackend().compile(graph, graph.weights, options, limits or limits_for())


def logits(executable: ReferenceExecutable, *batches: Batch) -> np.ndarray:
    rows = []
    for batch in batches:
        executable.forward(batch)
        rows.append(executable.logits())
    return np.concatenate(rows)


WHOLE = logits(compiled(), one_sequence(PROMPT))


@pytest.mark.parametrize("chunk", [1, 7, 32, 33])
def test_a_prompt_in_chunks_is_the_prompt(chunk: int) -> None:
    table = [5, 2, 9]
    batches = [
        make_batch([(PROMPT[start : start + chunk], start, table)], sample="all")
        for start in range(0, len(PROMPT), chunk)
    ]
    np.testing.assert_allclose(logits(compiled(), *batches), WHOLE, atol=NOISE)


def test_a_sequence_among_others_is_itself() -> None:
    executable = compiled()
    executable.forward(make_batch([(OTHER[:30], 0, [7]), (PROMPT[:50], 0, [3, 4])], sample="all"))
    found = executable.logits()[30:]
    executable.forward(make_batch([(PROMPT[50:], 50, [3, 4, 1]), (OTHER[30:], 30, [7, 0])], sample="all"))
    found = np.concatenate([found, executable.logits()[:25]])
    np.testing.assert_allclose(found, WHOLE, atol=NOISE)
    expected = logits(compiled(), one_sequence(OTHER))
    np.testing.assert_allclose(executable.logits()[25:], expected[30:], atol=NOISE)


def test_only_the_wanted_rows_have_logits() -> None:
    executable = compiled()
    executable.forward(one_sequence(PROMPT, sample="last"))
    assert executable.logits().shape == (1, 160)
    np.testing.assert_allclose(executable.logits()[0], WHOLE[-1], atol=NOISE)
    nothing = one_sequence(PROMPT)
    nothing = Batch(
        nothing.tokens, nothing.row_starts, nothing.starts, nothing.block_tables, nothing.tokens[:0]
    )
    executable.forward(nothing)
    assert executable.logits().shape == (0, 160)


def test_a_token_is_not_seen_by_those_before_it() -> None:
    changed = [*PROMPT[:60], 1 - min(PROMPT[60], 1), *PROMPT[61:]]
    found = logits(compiled(), one_sequence(changed))
    np.testing.assert_allclose(found[:60], WHOLE[:60], atol=NOISE)
    assert (np.abs(found[60:] - WHOLE[60:]).max(axis=1) > 1e-3).all()


def test_copied_blocks_continue_the_sequence() -> None:
    executable = compiled()
    executable.forward(make_batch([(PROMPT[:64], 0, [0, 1])]))
    executable.copy_blocks([(0, 10), (1, 11)])
    executable.forward(make_batch([(OTHER[:40], 0, [0, 1])]))  # overwrites the source
    found = logits(executable, make_batch([(PROMPT[64:], 64, [10, 11, 12])], sample="all"))
    np.testing.assert_allclose(found, WHOLE[64:], atol=NOISE)
    for copy in ((0, 64), (-1, 0)):
        with pytest.raises(BackendError, match="outside 64 blocks"):
            executable.copy_blocks([copy])


def test_the_cache_lies_block_by_block_in_the_dtype_asked_for() -> None:
    executable = compiled("f16")
    assert executable.kv.shape == (64, 2, 2, 2, 32, 16)
    assert executable.kv.dtype == np.float16
    executable.forward(make_batch([(PROMPT[:40], 0, [8, 3])]))
    written = np.abs(executable.kv).sum(axis=(1, 2, 3, 5)) > 0
    assert written[8].all()
    assert written[3, :8].all()
    assert written.sum() == 40
    error = np.abs(logits(compiled("f16"), one_sequence(PROMPT)) - WHOLE).max()
    assert 0 < error < 2e-2


def test_the_q8_cache_keeps_codes_and_their_scales() -> None:
    executable = compiled("q8")
    assert executable.kv.shape == (64, 2, 2, 2, 32)
    assert executable.kv.nbytes == 64 * ReferenceBackend().kv_block_bytes(executable.graph, "q8")
    executable.forward(make_batch([(PROMPT[:40], 0, [8, 3])]))
    exact = compiled()
    exact.forward(make_batch([(PROMPT[:40], 0, [8, 3])]))
    for found, true in ((executable.kv[block, 0], exact.kv[block, 0]) for block in (8, 3)):
        largest = np.abs(true).max(axis=-1)
        np.testing.assert_allclose(found["scale"], largest / 127, rtol=1e-5)
        assert np.abs(found["codes"].astype(int)).max(axis=-1)[largest > 0].min() == 127
        assert (np.abs(from_cache(found) - true) <= 0.501 * found["scale"][..., None]).all()
    assert (executable.kv["scale"] > 0).sum() == 40 * 2 * 2 * 2
    error = np.abs(logits(compiled("q8"), one_sequence(PROMPT)) - WHOLE).max()
    assert 1e-3 < error < 0.2


def test_q8_by_hand() -> None:
    x = np.array([[127, -63.4, 0.6, 0], [0, 1e-36, 0, 0], [np.nan, np.inf, -np.inf, 1e37]], np.float32)
    packed = to_cache(x, "q8")
    assert packed["codes"].tolist() == [[127, -63, 1, 0], [0, 0, 0, 0], [0, 127, -127, 4]]
    assert packed["scale"].tolist() == [1, 0, np.float32(3.4e38) / np.float32(127)]
    assert from_cache(packed)[0].tolist() == [127, -63, 1, 0]


def test_rotation_by_hand() -> None:
    rope = RopeSpec(head_dim=6, rotary_dim=4, theta=100.0)
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 12)
    found = rotate(x, np.array([3]), rope).reshape(2, 6)
    for head, (a, b, c, d, *rest) in zip(found, x.reshape(2, 6).tolist(), strict=True):
        slow = 3 * 100.0**-0.5
        expected = [
            a * math.cos(3) - c * math.sin(3),
            b * math.cos(slow) - d * math.sin(slow),
            c * math.cos(3) + a * math.sin(3),
            d * math.cos(slow) + b * math.sin(slow),
        ]
        np.testing.assert_allclose(head, [*expected, *rest], rtol=1e-5)


def test_rotation_has_its_magnitude_and_divisors() -> None:
    x, positions = np.random.default_rng(0).normal(size=(3, 12)).astype(np.float32), np.array([0, 5, 40])
    plain = rotate(x, positions, RopeSpec(6, 4, 100.0)).reshape(3, 2, 6)
    larger = rotate(x, positions, RopeSpec(6, 4, 100.0, magnitude=1.5)).reshape(3, 2, 6)
    np.testing.assert_allclose(larger[..., :4], 1.5 * plain[..., :4], atol=1e-6)
    np.testing.assert_array_equal(larger[..., 4:], plain[..., 4:])
    slower = rotate(x, positions * 8, RopeSpec(6, 4, 100.0, divisors=(8.0, 8.0)))
    np.testing.assert_allclose(slower.reshape(plain.shape), plain, atol=1e-5)


def test_norm_of_heads_is_each_ones_own() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(5, 12)).astype(np.float32), rng.uniform(0.5, 1.5, 4).astype(np.float32)
    found = rms_norm(x, weight, 1e-5, heads=3)
    for head in range(3):
        columns = slice(4 * head, 4 * head + 4)
        np.testing.assert_allclose(found[:, columns], rms_norm(x[:, columns], weight, 1e-5), rtol=1e-6)
    assert np.abs(found - rms_norm(x, np.tile(weight, 3), 1e-5)).max() > 0.1


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("window", [1, 9, 32, 40])
def test_a_window_hides_what_lies_before_it(window: int, fused: bool) -> None:
    """One layer: each row is that of the prompt cut off before its window, positions being relative."""
    model = tiny_llama(layers=1, model_type="mistral")
    model.config["sliding_window"] = window
    graph = fuse(model.graph()) if fused else model.graph()
    executable = ReferenceBackend().compile(
        graph, model.weights, CompileOptions(kv_dtype="f32"), limits_for()
    )
    for chunk in (75, 13):
        batches = [
            make_batch([(PROMPT[start : start + chunk], start, [5, 2, 9])], sample="all")
            for start in range(0, len(PROMPT), chunk)
        ]
        found = logits(executable, *batches)
        for row in (0, window - 1, window, 60, 74):
            seen = PROMPT[max(0, row - window + 1) : row + 1]
            np.testing.assert_allclose(found[row], logits(executable, one_sequence(seen))[-1], atol=NOISE)


def test_silu_has_no_overflow() -> None:
    found = silu(np.array([-1e4, -1.0, 0.0, 1.0, 1e4], np.float32))
    np.testing.assert_allclose(found, [0, -1 / (1 + math.e), 0, 1 / (1 + math.exp(-1)), 1e4], rtol=1e-6)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (make_batch([([160], 0, [0])]), "token ids outside the vocabulary of 160"),
        (make_batch([([-1], 0, [0])]), "token ids outside"),
        (make_batch([([1] * 33, 0, [0])]), "outside the block table"),
        (make_batch([([1], 0, [-1])]), "outside 64 KV blocks"),
        (make_batch([([1], 0, [64])]), "outside 64 KV blocks"),
        (make_batch([([1], -1, [0])]), "outside the block table"),
        (make_batch([([1], 256, range(9))]), "outside the block table or context"),
        (make_batch([([1], 0, [0])] * 17), "exceed Limits"),
        (make_batch([([1] * 513, 0, range(20))]), "exceed Limits"),
        (make_batch([([1], 0, [0]), ([], 0, [1])]), "do not divide 1 rows among 2"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(batch: Batch, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        compiled().forward(batch)


def test_a_graph_it_cannot_run_is_refused() -> None:
    graph = tiny_llama().graph()
    limits = limits_for()
    graph.nodes.append(Node("moe", (0,), (), 64))
    with pytest.raises(BackendError, match=r"does not know the ops \['moe'\]"):
        ReferenceBackend().compile(graph, graph.weights, CompileOptions(), limits)


# What is made of the logits.


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("transform", [lambda graph: graph, fuse], ids=["plain", "fused"])
def test_hidden_states_are_what_logits_are_made_of(transform: Any, tied: bool) -> None:
    model = tiny_llama(tied=tied)
    graph = transform(model.graph())
    executable = ReferenceBackend().compile(
        graph, graph.weights, CompileOptions(kv_dtype="f32"), limits_for()
    )
    assert executable.hidden().shape == (0, 64)
    executable.forward(make_batch([(PROMPT[:9], 0, [0]), (OTHER[:5], 0, [1])], sample="all"))
    hidden = executable.hidden()
    assert (hidden.dtype, hidden.shape) == (np.float32, (14, 64))
    # after the norm: of the size of its weights
    size = hidden / model.weights["model.norm.weight"].dequantise()
    np.testing.assert_allclose(np.sqrt((size**2).mean(axis=1)), 1, rtol=1e-4)
    head = model.weights["model.embed_tokens.weight" if tied else "lm_head.weight"].dequantise()
    np.testing.assert_allclose(hidden @ head.T, executable.logits(), atol=NOISE)


def test_sample_draws_and_reports_for_each_sample_row() -> None:
    executable = compiled()
    batch = make_batch([(PROMPT[:9], 0, [0]), (OTHER[:5], 0, [1])])
    # the first prompt's last row draws for two sequences; the second's reports, then wants nothing
    batch = replace(batch, sample_rows=np.array([8, 8, 13, 13], np.int32))
    executable.forward(batch)
    logits = executable.logits()
    assert (logits[0] == logits[1]).all()
    assert executable.hidden().shape == (4, 64)
    hot = {"temperature": 20.0}
    wanted = sample_batch([hot, hot | {"sequence": 1}, {"draw": 0, "num_logprobs": 2}, {"draw": 0}], 160)
    output = executable.sample(wanted)
    assert (output.tokens >= 0).tolist() == [True, True, False, False]
    assert output.tokens[0] != output.tokens[1]
    assert output.top_ids.tolist() == [[-1, -1]] * 2 + [np.argsort(-logits[2])[:2].tolist()] + [[-1, -1]]
    np.testing.assert_array_equal(output.tokens, sample(logits, wanted).tokens)
    executable.forward(make_batch([(PROMPT[:9], 0, [0])]))
    with pytest.raises(BackendError, match="parameters of 4 rows for 1"):
        executable.sample(wanted)
