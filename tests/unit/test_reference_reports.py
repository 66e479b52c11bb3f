"""What the definition of sampling reports of a row, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from tests.sampling import make_batch

from hexad.backends.reference_sampler import sample
from hexad.backends.sampling import SampleOutput
from hexad.errors import BackendError

P = [0.08, 0.40, 0.02, 0.20, 0.10, 0.15, 0.01, 0.04]
LOGITS = np.log(P).astype(np.float32) + np.float32(3)


def draw_many(logits: Any, rows: list[dict[str, Any]], **arrays: Any) -> SampleOutput:
    x = np.array(logits, np.float32)
    return sample(np.broadcast_to(x, (len(rows), len(x))), make_batch(rows, len(x), **arrays))


def test_logprobs_are_those_of_the_logits_as_they_came() -> None:
    """Without temperature, penalties, biases and masks."""
    rng = np.random.default_rng(5)
    x = rng.normal(0, 4, 500).astype(np.float32)
    row = {"temperature": 0.3, "num_logprobs": 4, "repetition_penalty": 5.0, "top_k": 9, "mask": 0}
    allowed = rng.integers(0, 500, 40).tolist()
    output = draw_many(
        x,
        [row | {"position": i} for i in range(9)],
        history=[allowed[:9]] * 9,
        bias=[{allowed[0]: 3.0}] * 9,
        masks=[allowed],
        asks=[allowed[:3]] * 9,
    )
    total = math.log(math.fsum(math.exp(value) for value in x.tolist()))
    exact = np.array([value - total for value in x.tolist()])
    best = sorted(range(500), key=lambda token: -x[token])
    for i, token in enumerate(output.tokens.tolist()):
        assert token in allowed
        assert output.logprobs[i] == np.float32(exact[token])
        assert best[output.ranks[i] - 1] == token
        assert output.top_ids[i].tolist() == best[:4]
        np.testing.assert_allclose(output.top_logprobs[i], exact[best[:4]], rtol=1e-7)
    np.testing.assert_allclose(output.ask_logprobs.reshape(9, 3), [exact[allowed[:3]]] * 9, rtol=1e-7)
    ranks = [best.index(token) + 1 for token in allowed[:3]]
    assert output.ask_ranks.reshape(9, 3).tolist() == [ranks] * 9


def test_a_row_reports_what_it_asks_for() -> None:
    rows: list[dict[str, Any]] = [
        {"num_logprobs": -1},
        {"num_logprobs": 0},
        {"num_logprobs": 2},
        {"num_logprobs": 5, "draw": 0},
        {"draw": 0},
        {"num_logprobs": 1, "mask": 0},
    ]
    output = draw_many(LOGITS, rows, asks=[[], [], [7, 1], [], [3], []], masks=[[]])
    assert np.isnan(output.logprobs).tolist() == [True, False, False, True, True, True]
    assert (output.ranks > 0).tolist() == [False, True, True, False, False, False]
    assert (output.tokens >= 0).tolist() == [True, True, True, False, False, False]
    top = [[], [], [1, 3], [1, 3, 5, 4, 0], [], [1]]
    assert output.top_ids.tolist() == [tokens + [-1] * (5 - len(tokens)) for tokens in top]
    assert (np.isnan(output.top_logprobs) == (output.top_ids < 0)).all()
    np.testing.assert_allclose(output.ask_logprobs, np.log([P[7], P[1], P[3]]), rtol=1e-6)
    assert output.ask_ranks.tolist() == [6, 1, 2]
    assert draw_many(LOGITS, [{}, {"num_logprobs": 0}]).top_ids.shape == (2, 0)
    empty = sample(np.zeros((0, 8), np.float32), make_batch([], 8))
    assert (empty.tokens.shape, empty.top_ids.shape, empty.ask_ranks.shape) == ((0,), (0, 0), (0,))


def test_ranks_and_likeliest_of_equals() -> None:
    x = [1.0, 2.0, np.nan, 2.0, -np.inf, 1.0]
    output = draw_many(x, [{"num_logprobs": 6, "temperature": 0.0}], asks=[[0, 1, 2, 3, 4, 5]])
    total = math.log(2 * math.exp(1) + 2 * math.exp(2))
    expected = [1 - total, 2 - total, np.nan, 2 - total, -np.inf, 1 - total]
    np.testing.assert_allclose(output.ask_logprobs, expected, rtol=1e-6)
    assert output.ask_ranks.tolist() == [3, 1, 0, 1, 5, 3]
    assert output.top_ids.tolist() == [[1, 3, 0, 5, 4, -1]]
    np.testing.assert_allclose(output.top_logprobs[0], [expected[i] for i in (1, 3, 0, 5, 4, 2)], rtol=1e-6)
    assert (output.tokens[0], output.ranks[0]) == (1, 1)


def test_logits_that_are_no_distribution_have_no_logprobs() -> None:
    for x in ([1.0, np.inf], [-np.inf, -np.inf], [np.nan, np.nan]):
        output = draw_many(x, [{"num_logprobs": 1}], asks=[[0]])
        assert output.tokens[0] == -1
        assert np.isnan([output.logprobs[0], output.top_logprobs[0, 0], output.ask_logprobs[0]]).all()


def test_a_beam_step() -> None:
    """Beam search does without chance: it takes the 2 · width likeliest with their logprobs."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (3, 100)).astype(np.float32)
    output = sample(logits, make_batch([{"temperature": 0.0, "num_logprobs": 8}] * 3, 100))
    for row, x in enumerate(logits.astype(np.float64)):
        exact = x - np.log(np.exp(x).sum())
        assert output.top_ids[row].tolist() == np.argsort(-x)[:8].tolist()
        np.testing.assert_allclose(output.top_logprobs[row], np.sort(exact)[::-1][:8], rtol=1e-6)
    assert (output.tokens == output.top_ids[:, 0]).all()
    assert (output.logprobs == output.top_logprobs[:, 0]).all()


def test_neighbours_do_not_matter() -> None:
    """A row of a batch gets what it gets alone, with its own stretch of every ragged array."""
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (12, 70)).astype(np.float32)

    def some(count: int) -> list[int]:
        return rng.integers(0, 70, count).tolist()

    common = {"repetition_penalty": 1.5, "dry_multiplier": 0.8, "dry_allowed_length": 1, "top_p": 0.9}
    rows = [
        common
        | {"position": i, "num_logprobs": i % 4 - 1, "draw": i % 5 > 0}
        | {"mask": i % 3 - 1, "dry_breakers": -(i % 2), "mirostat": 2 * (i % 2)}
        for i in range(12)
    ]
    history = [some(3 * i) for i in range(12)]
    bias = [dict.fromkeys(some(i % 3), 1.5) for i in range(12)]
    asks = [some((i + 1) % 3) for i in range(12)]
    masks = [some(30), some(30)]
    together = sample(logits, make_batch(rows, 70, history, bias, asks, masks))
    asked = 0
    for i, row in enumerate(rows):
        alone = sample(logits[[i]], make_batch([row], 70, [history[i]], [bias[i]], [asks[i]], masks))
        for name in ("tokens", "mirostat_mu", "logprobs", "ranks"):
            np.testing.assert_array_equal(getattr(together, name)[i], getattr(alone, name)[0], name)
        for name in ("top_ids", "top_logprobs"):
            found, expected = getattr(together, name)[i], getattr(alone, name)[0]
            np.testing.assert_array_equal(found[: len(expected)], expected, name)
        for name in ("ask_logprobs", "ask_ranks"):
            found = getattr(together, name)[asked : asked + len(asks[i])]
            np.testing.assert_array_equal(found, getattr(alone, name), name)
        asked += len(asks[i])


# What does not fit.


@pytest.mark.parametrize(
    ("rows", "arrays", "message"),
    [
        ([{}, {}], {}, "parameters of 2 rows for 1"),
        ([{}], {"history": [[8]]}, "history has token ids outside the vocabulary of 8"),
        ([{}], {"bias": [{-1: 0.0}]}, "bias has token ids outside"),
        ([{}], {"asks": [[9]]}, "ask has token ids outside"),
        ([{"mask": 1}], {}, "mask 1 is outside the 1 masks"),
        ([{"dry_breakers": 3}], {}, "dry_breakers 3 is outside the 1 masks"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(
    rows: list[dict[str, Any]], arrays: dict[str, Any], message: str
) -> None:
    with pytest.raises(BackendError, match=message):
        sample(LOGITS[None], make_batch(rows, 8, masks=[[1]], **arrays))


def test_ragged_arrays_and_masks_of_other_sizes_are_refused() -> None:
    batch = make_batch([{}], 8, history=[[1, 2]])
    batch.history_starts[1] = 1
    with pytest.raises(BackendError, match=r"history starts \[0, 1\] do not divide 2 tokens among 1 rows"):
        sample(LOGITS[None], batch)
    with pytest.raises(BackendError, match="masks of 2 words for a vocabulary of 8"):
        sample(LOGITS[None], make_batch([{}], 40, masks=[[1]]))
