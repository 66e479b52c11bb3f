"""What the definition of sampling draws, against sets worked out by hand and against transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from tests.sampling import make_batch

from hexad.backends.reference_sampler import Kept, kept, mask_bits, philox4x32, sample, uniforms
from hexad.backends.sampling import SampleOutput

P = [0.08, 0.40, 0.02, 0.20, 0.10, 0.15, 0.01, 0.04]
LOGITS = np.log(P).astype(np.float32) + np.float32(3)
LIKELIEST_FIRST = [1, 3, 5, 4, 0, 7, 2, 6]
ENTROPY = -math.fsum(p * math.log(p) for p in P)  # 1.658
HEADS = next(seed for seed in range(99) if uniforms(make_batch([{"seed": seed}], 8).rows[0])[1] < 0.5)
TAILS = next(seed for seed in range(99) if uniforms(make_batch([{"seed": seed}], 8).rows[0])[1] > 0.5)


def keep(logits: Any = LOGITS, history: Sequence[int] = (), breakers: Iterable[int] = (), **row: Any) -> Kept:
    x = np.array(logits, np.float32)
    batch = make_batch([row], len(x), history=[history], masks=[breakers])
    return kept(x, batch.rows[0], batch.history, mask_bits(batch.masks[0], len(x)))


def ids(*args: Any, **row: Any) -> list[int]:
    """The tokens kept, in the order in which they are drawn."""
    return keep(*args, **row).ids.tolist()


def changed(logits: Sequence[float], history: Sequence[int], **row: Any) -> list[float]:
    """All x after penalties and dry."""
    k = keep(logits, history, **row)
    assert k.ids.tolist() == list(range(len(logits)))
    return k.x.tolist()


def draw(logits: Any = LOGITS, **row: Any) -> int:
    x = np.array(logits, np.float32)
    return int(sample(x[None], make_batch([row], len(x))).tokens[0])


def draw_many(logits: Any, rows: list[dict[str, Any]], **arrays: Any) -> SampleOutput:
    x = np.array(logits, np.float32)
    return sample(np.broadcast_to(x, (len(rows), len(x))), make_batch(rows, len(x), **arrays))


# What each sampler keeps.


def test_a_neutral_row_keeps_all_by_id() -> None:
    k = keep()
    assert k.ids.tolist() == list(range(8))
    assert k.temperature == 1
    np.testing.assert_allclose(k.weights() / k.weights().sum(), P, rtol=1e-6)
    assert ids([1, -np.inf, np.nan, 0]) == [0, 3]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 5]),
        ({"top_k": 7}, LIKELIEST_FIRST[:7]),
        ({"top_k": 8}, list(range(8))),  # the vocabulary's size and more is off
        ({"top_k": -1}, list(range(8))),
        ({"top_p": 0.01}, [1]),
        ({"top_p": 0.59}, [1, 3]),
        ({"top_p": 0.61}, [1, 3, 5]),
        ({"top_p": 0.9999}, LIKELIEST_FIRST),
        ({"min_p": 1.0}, [1]),
        ({"min_p": 0.24}, [1, 3, 4, 5]),  # p ≥ 0.096
        ({"min_p": 0.26}, [1, 3, 5]),
        ({"min_p": 0.49, "temperature": 2.0}, [1, 3, 4, 5]),  # √(p / 0.4) ≥ 0.49
        ({"min_p": 0.24, "temperature": 2.0}, [0, 1, 3, 4, 5, 7]),
        # |−ln p − H|: 0.049 of 3, 0.24 of 5, 0.64 of 4, 0.74 of 1, 0.87 of 0, 1.6 of 7
        ({"typical_p": 0.1}, [3]),
        ({"typical_p": 0.3}, [3, 5]),
        ({"typical_p": 0.4}, [3, 5, 4]),
        ({"typical_p": 0.5}, [1, 3, 5, 4]),
        ({"typical_p": 0.9}, [1, 3, 5, 4, 0]),
        # ln p has a mean of −2.6234 and a standard deviation of 1.1470; the largest is −0.9163
        ({"top_n_sigma": 0.5}, [1]),
        ({"top_n_sigma": 1.0}, [1, 3, 5]),
        ({"top_n_sigma": 1.3}, [1, 3, 4, 5]),
        ({"top_n_sigma": 2.0}, [0, 1, 3, 4, 5]),
        ({"top_n_sigma": 1.3, "temperature": 0.1}, [1, 3, 4, 5]),  # the temperature cancels out
        ({"top_n_sigma": 0.0}, list(range(8))),
        ({"seed": HEADS, "xtc_probability": 0.5, "xtc_threshold": 0.12}, [0, 2, 4, 5, 6, 7]),
        ({"seed": TAILS, "xtc_probability": 0.5, "xtc_threshold": 0.12}, list(range(8))),
        ({"seed": TAILS, "xtc_probability": 1.0, "xtc_threshold": 0.12}, [0, 2, 4, 5, 6, 7]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.3}, list(range(8))),  # only one is that likely
        ({"xtc_probability": 1.0, "xtc_threshold": 0.45}, list(range(8))),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.0}, [6]),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.12, "top_k": 4}, [5, 4]),
        ({"mirostat": 2, "mirostat_mu": 1.0}, [1]),  # −log₂ p: 1.32, 2.32, 2.74, 3.32
        ({"mirostat": 2, "mirostat_mu": 2.4}, [1, 3]),
        ({"mirostat": 2, "mirostat_mu": 3.0}, [1, 3, 5]),
        ({"mirostat": 2, "mirostat_mu": 3.0, "top_k": 1, "top_p": 0.1, "min_p": 1.0}, [1, 3, 5]),
        ({"mirostat": 2, "mirostat_mu": -5.0}, [1]),
        ({"mirostat": 2, "mirostat_mu": 3.0, "temperature": 0.5}, [1, 3]),  # −log₂ p²/Σ: 0.59, 2.59, 3.42
    ],
)
def test_the_exact_set(row: dict[str, Any], expected: list[int]) -> None:
    assert ids(**row) == expected
    assert draw(**row) in expected


def test_equals_are_taken_by_id() -> None:
    flat = [0, 1, 1, 0, 1, 1]
    assert ids(flat, top_k=3) == [1, 2, 4]
    assert ids(flat, top_k=5) == [1, 2, 4, 5, 0]
    assert ids([1] * 4, top_p=0.5) == [0, 1]
    assert ids([1] * 4, typical_p=0.7) == [0, 1, 2]
    assert ids([1] * 4, xtc_probability=1.0, xtc_threshold=0.2) == [3]
    assert ids([1, 1], xtc_probability=1.0, xtc_threshold=0.5) == [1]
    assert ids([1, 1], xtc_probability=1.0, xtc_threshold=0.51) == [0, 1]
    assert draw(flat, temperature=0.0) == 1


@pytest.mark.parametrize(
    ("row", "logits", "expected"),
    [
        ({"temperature": 0.7}, LOGITS, 0.7),
        ({"temperature": 1.0, "dynatemp_range": 0.5}, [2.0] * 8, 1.5),  # the largest entropy
        ({"temperature": 1.0, "dynatemp_range": 0.5}, [200.0, *[0.0] * 7], 0.5),  # the least
        ({"temperature": 1.0, "dynatemp_range": 0.5}, [2.0, *[-np.inf] * 7], 1.5),
        ({"temperature": 0.5, "dynatemp_range": 0.8}, [200.0, *[0.0] * 7], 0.01),
        ({"temperature": 1.0, "dynatemp_range": 0.5}, LOGITS, 0.5 + ENTROPY / math.log(8)),
        (
            {"temperature": 0.4, "dynatemp_range": 0.8, "dynatemp_exponent": 2.0},
            LOGITS,
            1.2 * (ENTROPY / math.log(8)) ** 2,
        ),
        # entropy of what is left: 2/3 and 1/3
        (
            {"temperature": 1.0, "dynatemp_range": 0.5, "top_k": 2, "order": ["top_k", "temperature"]},
            LOGITS,
            0.5 + (math.log(3) - 2 / 3 * math.log(2)) / math.log(2),
        ),
    ],
)
def test_the_temperature(row: dict[str, Any], logits: Any, expected: float) -> None:
    assert keep(logits, **row).temperature == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # 0 and 1 are prompt, then 1 and 2 were generated, 2 twice; 4 is nowhere
        ({"repetition_penalty": 2.0}, [1.0, -2.0, 1.5, 0.0, 0.5]),
        ({"repetition_penalty": 0.5}, [4.0, -0.5, 6.0, 0.0, 0.5]),
        ({"presence_penalty": 0.25}, [2.0, -1.25, 2.75, 0.0, 0.5]),
        ({"frequency_penalty": 0.5}, [2.0, -1.5, 2.0, 0.0, 0.5]),
        ({"frequency_penalty": -0.5, "presence_penalty": -1.0}, [2.0, 0.5, 5.0, 0.0, 0.5]),
        (
            {"repetition_penalty": 2.0, "presence_penalty": 0.25, "frequency_penalty": 0.5},
            [1.0, -2.75, 0.25, 0.0, 0.5],
        ),
        *(
            ({"repetition_penalty": 2.0, "frequency_penalty": 1.0, "repeat_last_n": n}, expected)
            for n, expected in (
                (0, [2.0, -1.0, 3.0, 0.0, 0.5]),
                (1, [2.0, -1.0, 0.5, 0.0, 0.5]),
                (4, [2.0, -3.0, -0.5, 0.0, 0.5]),
                (5, [1.0, -3.0, -0.5, 0.0, 0.5]),
                (99, [1.0, -3.0, -0.5, 0.0, 0.5]),
            )
        ),
    ],
)
def test_penalties(row: dict[str, Any], expected: list[float]) -> None:
    assert changed([2.0, -1.0, 3.0, 0.0, 0.5], [0, 1, 1, 2, 2], num_prompt=2, **row) == expected


@pytest.mark.parametrize(
    ("history", "row", "penalised"),  # penalised: token → length of the repetition
    [
        ([1, 2, 3, 1, 2], {}, {3: 2}),
        ([1, 2, 3, 1, 2], {"dry_allowed_length": 3}, {}),
        ([1, 2, 3, 1, 2], {"dry_allowed_length": 1}, {3: 2}),
        ([1, 2, 3, 1, 2], {"dry_allowed_length": 0}, {1: 0, 2: 0, 3: 2}),
        ([7, 7, 7, 7], {}, {7: 3}),
        ([1, 2, 1, 2, 1], {}, {2: 3}),
        ([2, 3, 1, 2, 3, 0, 1, 2], {}, {3: 2}),  # the longer of the two that 3 would prolong
        ([1, 2, 3, 0, 2, 3, 1, 2], {}, {3: 2}),
        ([2, 3, 2, 4, 2], {"dry_allowed_length": 1}, {3: 1, 4: 1}),
        ([1, 9, 2, 3, 1, 9, 2], {}, {3: 3}),
        ([1, 9, 2, 3, 1, 9, 2], {"breakers": [9]}, {}),  # not across a 9
        ([1, 9, 2, 3, 1, 9, 2], {"breakers": [9], "dry_allowed_length": 1}, {3: 1}),
        ([1, 2, 9, 1, 2], {}, {9: 2}),
        ([1, 2, 9, 1, 2], {"breakers": [9]}, {}),  # nor is a 9 penalised itself
        ([1, 9, 3, 1, 9], {"breakers": [9], "dry_allowed_length": 1}, {}),
        ([1, 2, 3, 0, 1, 2], {"dry_last_n": 6}, {3: 2}),
        ([1, 2, 3, 0, 1, 2], {"dry_last_n": 5}, {}),
        ([1, 2, 3, 0, 1, 2], {"dry_last_n": 5, "dry_allowed_length": 1}, {3: 1}),
        ([1, 2, 3, 0, 1, 2], {"dry_last_n": 4, "dry_allowed_length": 1}, {}),
        ([1, 2, 3, 1, 2], {"dry_last_n": 0, "dry_allowed_length": 0}, {}),
        ([1, 2, 3, 1, 2], {"dry_multiplier": 0.0}, {}),
        ([], {"dry_allowed_length": 0}, {}),
    ],
)
def test_dry(history: list[int], row: dict[str, Any], penalised: dict[int, int]) -> None:
    row = {"dry_multiplier": 0.5, "dry_base": 2.0, "dry_allowed_length": 2} | row
    expected = [0.0] * 10
    for token, length in penalised.items():
        expected[token] = -0.5 * 2.0 ** (length - row["dry_allowed_length"])
    assert changed([0.0] * 10, history, **row) == expected


def test_breakers_are_a_mask() -> None:
    row = {"dry_multiplier": 1.0, "temperature": 0.0, "dry_allowed_length": 1}
    output = draw_many(
        [0, 2, 1, 2.5], [row, row | {"dry_breakers": 1}], history=[[0, 3, 0]] * 2, masks=[[1], [0]]
    )
    assert output.tokens.tolist() == [1, 3]


def test_an_endless_repetition_leaves_its_token_drawable() -> None:
    row = {"dry_multiplier": 1.0, "dry_base": 4.0, "temperature": 0.0, "mask": 0}
    history = [3] * 700  # 4 ** 698 is no float64
    for masks, expected in (([[3]], 3), ([[3, 5]], 5)):
        assert draw_many([0.0] * 6, [row], history=[history], masks=masks).tokens.tolist() == [expected]


def test_mirostat_1_on_zipfs_law() -> None:
    """p ∝ 1 / (i + 1)² has the exponent 2, so k = √(2^mu / (1 − 1/vocab))."""
    zipf = -2 * np.log(np.arange(1, 1001))[::-1]
    order = list(range(999, -1, -1))
    for mu, count in ((-3.0, 1), (2.5, 2), (5.0, 5), (6.0, 8), (10.0, 32), (25.0, 1000)):
        assert ids(zipf, mirostat=1, mirostat_mu=mu) == order[:count], mu
    # half the temperature is twice the exponent: k = (3 · 2^mu / (1 − 1/vocab³)) ** ¼
    assert ids(zipf, mirostat=1, mirostat_mu=10.0, temperature=0.5) == order[:7]
    # one token has no slope; the tail does not matter
    assert ids([1.0, -np.inf], mirostat=1, mirostat_mu=3.0) == [0]
    few = np.append(zipf[-4:], [-np.inf] * 996)  # 1/vocab counts tokens that do not exist, too
    assert ids(few, mirostat=1, mirostat_mu=3.1) == [3, 2]
    cut = np.where(np.arange(1000) < 900, -50.0, zipf)
    assert ids(cut, mirostat=1, mirostat_mu=6.0) == order[:8]


@pytest.mark.parametrize("version", [1, 2])
def test_mu_follows_the_surprise(version: int) -> None:
    # version 1: ŝ of P is such that two tokens are kept, as with version 2
    row = {"mirostat": version, "mirostat_mu": 2.4, "mirostat_tau": 3.0, "mirostat_eta": 0.1}
    kept_ids = ids(**row)
    mass = sum(P[token] for token in kept_ids)
    output = draw_many(LOGITS, [row | {"position": i} for i in range(30)])
    assert len(kept_ids) > 1
    assert set(output.tokens.tolist()) == set(kept_ids)
    for token, mu in zip(output.tokens, output.mirostat_mu, strict=True):
        assert mu == pytest.approx(2.4 - 0.1 * (-math.log2(P[token] / mass) - 3.0), rel=1e-6)


def test_mu_stays_where_mirostat_does_not_draw() -> None:
    row = {"mirostat": 2, "mirostat_mu": 2.4}
    rows = [row | {"temperature": 0.0}, row | {"draw": 0}, row | {"mirostat": 0}, row | {"mask": 0}]
    output = draw_many(LOGITS, rows, masks=[[]])
    assert output.tokens[:2].tolist() == [1, -1]
    assert output.tokens[3] == -1
    assert (output.mirostat_mu == np.float32(2.4)).all()


# Samplers together.


@pytest.mark.parametrize(
    ("order", "row", "history", "expected"),
    [
        # √p: 0.63, 0.45, 0.39 … of 2.51
        (["temperature", "top_p"], {"temperature": 2.0, "top_p": 0.5}, [], [1, 3, 5]),
        (["top_p", "temperature"], {"temperature": 2.0, "top_p": 0.5}, [], [1, 3]),
        (["top_k", "top_p"], {"top_k": 2, "top_p": 0.55}, [], [1]),
        (["top_p", "top_k"], {"top_k": 2, "top_p": 0.55}, [], [1, 3]),
        (["xtc", "top_k"], {"xtc_probability": 1.0, "xtc_threshold": 0.12, "top_k": 2}, [], [5, 4]),
        (["top_k", "xtc"], {"xtc_probability": 1.0, "xtc_threshold": 0.12, "top_k": 2}, [], [3]),
        # 2.08 of token 1 becomes 0.69, less than 1.39 of 3 and 1.10 of 5
        (["penalties", "top_k"], {"repetition_penalty": 3.0, "top_k": 2}, [1], [3, 5]),
        (["top_k", "penalties"], {"repetition_penalty": 3.0, "top_k": 2}, [1], [3, 1]),
        (["dry", "top_k"], {"dry_multiplier": 9.0, "top_k": 2}, [4, 2, 1, 4, 2], [3, 5]),
        (["top_k", "dry"], {"dry_multiplier": 9.0, "top_k": 2}, [4, 2, 1, 4, 2], [3, 1]),
        # of 1, 3 and 5 alone p is 0.53, 0.27, 0.2, and 3 the nearest to the entropy of 1.01, then 1
        (["top_n_sigma", "typical_p"], {"top_n_sigma": 1.0, "typical_p": 0.3}, [], [1, 3]),
        (["typical_p", "top_n_sigma"], {"top_n_sigma": 1.0, "typical_p": 0.3}, [], [3]),
        (["min_p", "temperature"], {"min_p": 0.24, "temperature": 2.0}, [], [1, 3, 4, 5]),
    ],
)
def test_the_order_counts(
    order: list[str], row: dict[str, Any], history: list[int], expected: list[int]
) -> None:
    assert ids(order=order, history=history, **row) == expected


EVERYTHING: dict[str, Any] = {
    "temperature": 0.5, "top_p": 0.1, "min_p": 1.0, "typical_p": 0.1, "top_n_sigma": 0.1, "top_k": 1,
    "xtc_probability": 1.0, "repetition_penalty": 9.0, "dry_multiplier": 9.0, "dynatemp_range": 0.3,
}  # fmt: skip


def test_what_the_order_leaves_out_is_not_applied() -> None:
    k = keep(history=[1, 1, 1, 1], order=[], **EVERYTHING)
    assert k.ids.tolist() == list(range(8))
    assert k.x.tolist() == LOGITS.tolist()
    assert k.temperature == 1


def test_greedy_heeds_only_penalties_and_dry() -> None:
    assert ids(**EVERYTHING | {"temperature": 0.0}) == [1]
    assert ids(history=[1], **EVERYTHING | {"temperature": 9e-6}) == [3]
    assert ids(history=[4, 2, 1, 4, 2], temperature=0.0, dry_multiplier=9.0) == [3]
    assert ids(history=[1], temperature=0.0, repetition_penalty=9.0, order=["top_k"]) == [1]
    for mirostat in (0, 1, 2):
        assert ids(temperature=0.0, mirostat=mirostat, xtc_probability=1.0, xtc_threshold=0.0) == [1]
        assert ids(temperature=0.0, mirostat=mirostat, typical_p=0.1) == [1]


# Tokens that cannot be drawn.


@pytest.mark.parametrize(
    "row", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.01}, {"temperature": 0.0}, {"mirostat": 2}]
)
def test_nans_are_as_if_they_were_not_there(row: dict[str, Any]) -> None:
    holes = np.insert(LOGITS, [0, 2, 8], np.nan)
    there = np.flatnonzero(~np.isnan(holes))
    rows = [row | {"position": i} for i in range(50)]
    np.testing.assert_array_equal(draw_many(holes, rows).tokens, there[draw_many(LOGITS, rows).tokens])
    for broken in (
        [np.nan] * 8,
        [-np.inf] * 8,
        [*LOGITS, np.inf],
        [*LOGITS, np.nan, np.inf],
        [-np.inf, np.nan],
    ):
        assert draw(broken, **row) == -1


def test_masks_and_biases() -> None:
    x = [*LOGITS, *[0.0] * 32]  # 40 tokens: two words, the second not full
    rows = [
        {"mask": 0, "temperature": 0.0},
        {"mask": 1, "temperature": 0.0},
        {"mask": 2},
        {"mask": -1, "top_k": 1},
    ]
    output = draw_many(x, rows, masks=[[2, 3, 5], [39], []])
    assert output.tokens.tolist() == [3, 39, -1, 1]
    bias = [
        {1: -np.inf},
        {1: -np.inf, 3: -100.0},
        {6: 100.0},
        {},
        {1: np.inf},
        dict.fromkeys(range(8), -np.inf),
    ]
    output = draw_many(LOGITS, [{"temperature": 0.0}] * 6, bias=bias)
    assert output.tokens.tolist() == [3, 5, 6, 1, -1, -1]
    # a mask hides what would else make the row undrawable; a bias on the only one allowed forbids it
    output = draw_many(
        [1.0, np.inf, 0.0], [{"mask": 0}, {"mask": 1}], bias=[{}, {2: -np.inf}], masks=[[0], [2]]
    )
    assert output.tokens.tolist() == [0, -1]
    assert draw_many([1.0, np.inf], [{}], bias=[{1: -np.inf}]).tokens.tolist() == [0]


def test_biases_come_before_everything_else() -> None:
    # +1 makes token 4 (0.70 → 1.70) the second likeliest after 2.08, before 1.39; halved it is not
    rows = [{"top_k": 2, "repetition_penalty": 2.0, "position": i} for i in range(40)]
    bias = [{4: 1.0}] * 40
    assert set(draw_many(LOGITS, rows, bias=bias).tokens.tolist()) == {1, 4}
    assert set(draw_many(LOGITS, rows, bias=bias, history=[[4]] * 40).tokens.tolist()) == {1, 3}
    assert set(draw_many(LOGITS, rows).tokens.tolist()) == {1, 3}


def test_several_biases_of_a_token_add_up() -> None:
    """Bad words and minimum lengths come on top of the logit_bias asked for."""
    batch = make_batch([{"temperature": 0.0}], 8, bias=[{3: 0.5, 5: 0.9, 1: 0.0}])
    batch.bias_ids[2] = 3
    batch.bias_values[2] = 0.3  # token 3: 1.39 + 0.5 + 0.3, more than 2.08 of token 1
    assert sample(LOGITS[None], batch).tokens.tolist() == [3]
    batch.bias_values[2] = -np.inf
    assert sample(LOGITS[None], batch).tokens.tolist() == [1]


# The draw.


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


def test_a_draw_depends_on_seed_sequence_and_position_and_on_nothing_else() -> None:
    base = {"seed": 2**63 + 5, "sequence": 2, "position": 7}
    others = [{"seed": 5}, {"seed": 2**63 + 6}, {"sequence": 3}, {"position": 8}]
    rows = [base, *(base | other for other in others), base | {"num_logprobs": 3}, base]
    tokens = draw_many(np.zeros(10_000), rows).tokens.tolist()
    assert len(set(tokens[:5])) == 5
    assert tokens[5] == tokens[6] == tokens[0] == draw(np.zeros(10_000), **base)


def test_the_draw_inverts_the_distribution_function() -> None:
    row = {"seed": 7 + (3 << 32), "sequence": 4, "position": 9}
    u = int(philox4x32((9, 4, 0, 0), (7, 3))[0] >> 8) * 2.0**-24
    assert draw(np.zeros(1000), **row) == math.floor(u * 1000)
    # where u falls right between two tokens it is the second
    words = (int(philox4x32((position, 0, 0, 0), (1, 0))[0]) for position in range(10_000))
    position, word = next((place, word) for place, word in enumerate(words) if word >> 8 & 0x3FF == 0)
    assert draw(np.zeros(2**14), position=position) == word >> 18
    # by id, unless a sampler that needs the likeliest first was applied, whether or not it dropped any
    rising = np.linspace(0, 1e-3, 1000)
    by_id = [{}, {"min_p": 0.01}, {"top_n_sigma": 9.0}, {"xtc_probability": 1.0, "xtc_threshold": 0.5}]
    for changes in by_id:
        assert draw(rising, **row | changes) == pytest.approx(u * 1000, abs=2), changes
    for changes in ({"top_p": 0.999999}, {"top_k": 999}, {"typical_p": 0.999999}, {"mirostat": 2}):
        assert draw(rising, **row | changes) == pytest.approx(999 - u * 1000, abs=2), changes


def test_the_likeliest_first_are_so_by_what_their_x_is_in_the_end() -> None:
    row = {"order": ["top_k", "penalties"], "top_k": 4, "presence_penalty": 2.0}
    assert ids(history=[1, 3], **row) == [5, 4, 1, 3]


def softmax_over(tokens: Iterable[int], temperature: float = 1.0, x: Any = LOGITS) -> list[float]:
    """Probabilities of all eight tokens where only these are kept."""
    tokens = set(tokens)
    weights = [math.exp(x[token] / temperature) if token in tokens else 0.0 for token in range(8)]
    return [weight / math.fsum(weights) for weight in weights]


XTC = [0.7 * p + 0.3 * q for p, q in zip(P, softmax_over([0, 2, 4, 5, 6, 7]), strict=True)]
PENALISED = [x - {1: 1.0, 4: 0.5}.get(token, 0.0) for token, x in enumerate(LOGITS.tolist())]


@pytest.mark.parametrize(
    ("row", "history", "expected"),
    [
        ({}, [], P),
        ({"temperature": 0.6}, [], softmax_over(range(8), 0.6)),
        # (p / 0.4) ** 1.25 of 2 and 6: 0.024, 0.010; without 7 there is 0.97 of the rest
        (
            {"temperature": 0.8, "top_k": 5, "top_p": 0.97, "min_p": 0.05},
            [],
            softmax_over([0, 1, 3, 4, 5], 0.8),
        ),
        ({"typical_p": 0.5}, [], softmax_over([1, 3, 4, 5])),
        ({"top_n_sigma": 2.0, "temperature": 1.7}, [], softmax_over([0, 1, 3, 4, 5], 1.7)),
        ({"xtc_probability": 0.3, "xtc_threshold": 0.12}, [], XTC),
        ({"mirostat": 2, "mirostat_mu": 3.5}, [], softmax_over([1, 3, 4, 5])),
        ({"frequency_penalty": 0.5}, [1, 1, 4], softmax_over(range(8), x=PENALISED)),
    ],
    ids=["plain", "temperature", "vllm", "typical", "top-n-sigma", "xtc", "mirostat", "penalties"],
)
def test_frequencies_are_the_probabilities(
    row: dict[str, Any], history: list[int], expected: list[float]
) -> None:
    """χ² of 20,000 draws, which a correct sampler exceeds for one seed in a million."""
    count = 20_000
    rows = [row | {"seed": 11, "position": i} for i in range(count)]
    found = np.bincount(draw_many(LOGITS, rows, history=[history] * count).tokens, minlength=8)
    p = np.array(expected)
    possible = p > 0
    assert found[possible].sum() == count
    chi_square = ((found - count * p)[possible] ** 2 / (count * p[possible])).sum()
    assert chi_square < chi_square_quantile(int(possible.sum()) - 1)


def chi_square_quantile(freedom: int) -> float:
    """What χ² exceeds with a probability of 10⁻⁶ (Wilson and Hilferty 1931)."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.7534 * math.sqrt(spread)) ** 3


# Against transformers, whose warpers mark what they drop with −∞.


@pytest.mark.oracle
@pytest.mark.parametrize("seed", range(5))
def test_the_sets_are_those_of_transformers(seed: int) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    x = np.random.default_rng(seed).normal(0, 2, 600).astype(np.float32)
    for warper, name, values in (
        (transformers.TopKLogitsWarper, "top_k", (1, 40, 599)),
        (transformers.TopPLogitsWarper, "top_p", (0.05, 0.5, 0.9, 0.999)),
        (transformers.MinPLogitsWarper, "min_p", (0.01, 0.05, 0.5, 1.0)),
        (transformers.TypicalLogitsWarper, "typical_p", (0.05, 0.5, 0.9, 0.999)),
    ):
        for value in values:
            scores = warper(value)(None, torch.tensor(x[None], dtype=torch.float64))[0].numpy()
            expected = np.flatnonzero(scores > -np.inf).tolist()
            assert sorted(ids(x, **{name: value})) == expected, (name, value)


@pytest.mark.oracle
@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.3])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, 100).astype(np.float32)
    history = rng.integers(0, 100, 50).tolist()
    penalise = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    scores = penalise(torch.tensor([history]), torch.tensor(x[None]))[0].numpy()
    np.testing.assert_allclose(changed(x.tolist(), history, repetition_penalty=penalty), scores, rtol=3e-7)
