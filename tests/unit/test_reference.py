"""The reference backend by itself: paging, batching, its refusals, and the definition of sampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.tiny_models import limits_for, make_batch, one_sequence, tiny_llama

from hexad.backends.backend import Batch, CompileOptions, Limits, SampleBatch
from hexad.backends.reference import (
    ReferenceBackend,
    ReferenceExecutable,
    philox4x32,
    rotate,
    sample_token,
    silu,
)
from hexad.errors import BackendError
from hexad.graph import Node, RopeSpec

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


# Sampling.


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known answers of the Random123 distribution
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: str) -> None:
    assert " ".join(f"{word:08x}" for word in philox4x32(counter, key)) == words


LOGITS = np.array([1.0, 3.0, 2.0, 3.0, -1.0, 0.0, -np.inf], np.float32)


def draw(logits: np.ndarray = LOGITS, **changes: Any) -> int:
    params: dict[str, Any] = {
        "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "sequence": 0, "position": 0,
    }  # fmt: skip
    return sample_token(logits, **params | changes)


def drawn(**changes: Any) -> set[int]:
    return {draw(seed=seed, **changes) for seed in range(300)}


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert {draw(temperature=0.0, seed=seed) for seed in range(20)} == {1}
    assert draw(temperature=9e-6, top_k=1) == 1


@pytest.mark.parametrize("changes", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.0}])
def test_nans_are_passed_over(changes: dict[str, Any]) -> None:
    """As if their tokens did not exist: the draws are those of the other logits alone."""
    holes = np.insert(LOGITS, [0, 2, 7], np.nan)
    ids = np.flatnonzero(~np.isnan(holes))
    for seed in range(50):
        assert draw(holes, seed=seed, **changes) == ids[draw(seed=seed, **changes)]
        for broken in (np.full(7, np.nan), np.full(7, -np.inf), np.append(LOGITS, np.inf)):
            assert draw(broken.astype(np.float32), seed=seed, **changes) == -1


def test_what_each_rule_keeps() -> None:
    assert drawn(temperature=2.0) == {0, 1, 2, 3, 4, 5}
    assert drawn(top_k=1) == {1}
    assert drawn(top_k=2) == {1, 3}
    assert drawn(top_k=3) == {1, 3, 2}
    assert drawn(top_k=100, temperature=2.0) == drawn(top_k=-1, temperature=2.0) == {0, 1, 2, 3, 4, 5}
    assert drawn(min_p=1.0) == {1, 3}
    assert drawn(min_p=0.3) == {1, 3, 2}
    assert drawn(min_p=math.exp(-1.99)) == {1, 3, 2}
    assert drawn(min_p=math.exp(-2.01)) == {0, 1, 3, 2}
    # of the mass of 1, 3, 2, 0 …: 0.387, 0.774, 0.916, 0.969
    assert drawn(top_p=0.3) == {1}
    assert drawn(top_p=0.5) == {1, 3}
    assert drawn(top_p=0.9) == {1, 3, 2}
    assert drawn(top_p=0.95, temperature=1.0) == {1, 3, 2, 0}


def test_the_rules_apply_in_order() -> None:
    # top_p counts what top_k has left: of the mass of 1 and 3 alone, one holds a half
    assert drawn(top_k=2, top_p=0.5) == {1}
    assert drawn(top_k=2, top_p=0.51) == {1, 3}
    # min_p is relative to the most likely token and takes the temperature into account
    assert drawn(min_p=0.3, temperature=2.0) == {1, 3, 2, 0}
    assert drawn(min_p=0.3, top_p=0.6) == {1, 3}


def test_frequencies_are_the_probabilities() -> None:
    count = 20_000
    for changes in ({}, {"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}, {"temperature": 0.5}):
        temperature = changes.get("temperature", 1.0)
        kept = {"top_k": [1, 3, 2, 0], "top_p": [1, 3, 2], "min_p": [1, 3, 2, 0]}
        ids = next((kept[key] for key in changes if key in kept), list(range(7)))
        weights = np.zeros(7)
        weights[ids] = np.exp(LOGITS[ids] / temperature)
        expected = weights / weights.sum()
        found = np.bincount([draw(position=i, **changes) for i in range(count)], minlength=7) / count
        # five standard deviations of a binomial share
        assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all(), changes


def test_a_draw_depends_on_seed_sequence_and_position_and_on_nothing_else() -> None:
    wide = np.zeros(10_000, np.float32)
    base = draw(wide, seed=2**63 + 5, sequence=2, position=7)
    assert base == draw(wide, seed=2**63 + 5, sequence=2, position=7)
    others = [
        draw(wide, seed=5, sequence=2, position=7),
        draw(wide, seed=2**63 + 6, sequence=2, position=7),
        draw(wide, seed=2**63 + 5, sequence=3, position=7),
        draw(wide, seed=2**63 + 5, sequence=2, position=8),
    ]
    assert len({base, *others}) == 5


def test_the_draw_inverts_the_distribution_function() -> None:
    u = int(philox4x32((9, 4, 0, 0), (7, 0))[0] >> 8) * 2.0**-24
    assert 0 <= u < 1
    wide = np.zeros(1000, np.float32)
    assert draw(wide, seed=7, sequence=4, position=9) == math.floor(u * 1000)
    # with top_p the likeliest come first: the logits' order, not that of the ids
    rising = np.linspace(0, 1e-3, 1000, dtype=np.float32)
    assert draw(rising, seed=7, sequence=4, position=9, top_p=0.999999) == pytest.approx(
        999 - u * 1000, abs=2
    )


def test_sample_draws_a_token_per_row() -> None:
    executable = compiled()
    executable.forward(make_batch([(PROMPT[:9], 0, [0]), (OTHER[:5], 0, [1]), (OTHER[:5], 0, [2])]))
    params = SampleBatch(
        temperature=np.array([0, 1, 1], np.float32),
        top_k=np.array([0, 20, 20], np.int32),
        top_p=np.array([1, 0.9, 0.9], np.float32),
        min_p=np.array([0, 0.01, 0.01], np.float32),
        seed=np.array([1, 2**64 - 1, 2**64 - 1], np.uint64),
        sequence=np.array([0, 1, 1], np.uint32),
        position=np.array([9, 5, 5], np.uint32),
    )
    tokens = executable.sample(params)
    assert tokens.dtype == np.int32
    assert tokens[0] == executable.logits()[0].argmax()
    assert tokens[1] == tokens[2]
    top_p, min_p = float(np.float32(0.9)), float(np.float32(0.01))
    assert tokens[1] == draw(
        executable.logits()[1], top_k=20, top_p=top_p, min_p=min_p, seed=2**64 - 1, sequence=1, position=5
    )
    executable.forward(make_batch([(PROMPT[:9], 0, [0])]))
    with pytest.raises(BackendError, match="parameters of 3 rows for 1"):
        executable.sample(params)
