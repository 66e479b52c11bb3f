"""BeamSearch by hand, against all there is, and in the engine where it could go wrong."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
from tests.fake_executor import FakeExecutor, FakeStream, likeliest, logprob_of

from hexad.config import EngineConfig
from hexad.engine.beam import Beam, BeamSearch
from hexad.engine.engine import Engine
from hexad.params import BeamSearchParams, SamplingParams

EOS, A, B = 0, 1, 2
Model = Callable[[list[int]], list[tuple[int, float]]]


def run(search: BeamSearch, model: Model) -> list[Beam]:
    """The whole search. model: tokens so far → (token, logprob) of all tokens, the likeliest first."""
    live: list[list[int]] = [[]]
    while live:
        moves = search.advance([model(tokens)[: search.num_candidates] for tokens in live])
        live = [[*live[parent], token_id] for parent, token_id in moves]
    return search.results()


def beam_search(
    model: Model, *, width: int, max_tokens: int, eos_ids: frozenset[int] = frozenset({EOS}), **params: Any
) -> list[Beam]:
    params_ = BeamSearchParams(beam_width=width, max_tokens=max_tokens, **params)
    return run(BeamSearch(params_, max_tokens, eos_ids), model)


def table(rows: dict[tuple[int, ...], dict[int, float]]) -> Model:
    """A model by the probabilities it gives; after other tokens, the three are all but impossible."""

    def model(tokens: list[int]) -> list[tuple[int, float]]:
        row = {EOS: 1e-9, A: 1.1e-9, B: 1.2e-9} | rows.get(tuple(tokens), {})
        return sorted(((t, math.log(p)) for t, p in row.items()), key=lambda entry: -entry[1])

    return model


def hashed(vocab_size: int, seed: int) -> Model:
    """A model with as many different logprobs as one could wish for."""

    def model(tokens: list[int]) -> list[tuple[int, float]]:
        entry = likeliest([seed, *tokens], vocab_size, vocab_size)
        return list(zip(entry.token_ids, entry.logprobs, strict=True))

    return model


def shown(beams: list[Beam]) -> list[tuple[list[int], float, str]]:
    """Beams with probabilities in the place of sums of logprobs."""
    return [(b.token_ids, round(math.exp(b.cum_logprob), 6), b.finish_reason) for b in beams]


def test_finds_what_greedy_search_misses() -> None:
    model = table({(): {A: 0.55, B: 0.45}, (A,): {A: 0.5, B: 0.4}, (B,): {A: 0.9}})
    assert shown(beam_search(model, width=2, max_tokens=2)) == [
        ([B, A], 0.405, "length"),
        ([A, A], 0.275, "length"),
    ]
    assert shown(beam_search(model, width=1, max_tokens=2)) == [([A, A], 0.275, "length")]


# A likely beam that may end at every step, beside others of next to no probability.
LINE = table(
    {
        (): {EOS: 0.3, A: 0.7},
        (A,): {EOS: 0.2, A: 0.8},
        (A, A): {EOS: 0.6, A: 0.4},
        (A, A, A): {EOS: 0.9, A: 0.1},
    }
)
ENDS = {
    1: ([EOS], 0.3, "stop"),
    2: ([A, EOS], 0.14, "stop"),
    3: ([A, A, EOS], 0.336, "stop"),
    4: ([A, A, A, EOS], 0.2016, "stop"),
}


@pytest.mark.parametrize(
    ("penalty", "lengths"),
    [
        # Scores of the ends: −1.20, −1.97, −1.09, −1.60. Over after three steps: −1.50 lives, below −1.20.
        (0, [3, 1]),
        # −1.20, −0.98, −0.36, −0.40. Not over after three steps: −0.50 lives, above −0.98.
        (1, [3, 4]),
        # −1.20, −0.49, −0.121, −0.100
        (2, [4, 3]),
        # −1.20, −3.93, −3.27. Not over after two steps: −1.16 lives, above −3.93.
        (-1, [1, 3]),
    ],
)
def test_length_penalty_ranks_and_ends(penalty: float, lengths: list[int]) -> None:
    found = beam_search(LINE, width=2, max_tokens=50, length_penalty=penalty)
    assert shown(found) == [ENDS[length] for length in lengths]


def test_live_beams_are_results_only_at_the_limit() -> None:
    assert shown(beam_search(LINE, width=2, max_tokens=3)) == [ENDS[3], ([A, A, A], 0.224, "length")]
    # An end at the limit is an end all the same, and a place is taken only by one of the first two.
    assert shown(beam_search(LINE, width=2, max_tokens=2)) == [([A, A], 0.56, "length"), ENDS[2]]
    assert shown(beam_search(LINE, width=2, max_tokens=1)) == [([A], 0.7, "length"), ENDS[1]]


def test_an_end_that_is_not_among_the_first_is_dropped() -> None:
    model = table({(): {A: 0.6, EOS: 0.4}, (A,): {EOS: 0.2, A: 0.8}, (A, A): {EOS: 1}})
    assert shown(beam_search(model, width=1, max_tokens=9)) == [([A, A, EOS], 0.48, "stop")]


def test_stops_when_the_best_live_beam_is_as_good_as_the_worst_ended_one() -> None:
    model = table({(): {EOS: 0.5, A: 0.5}, (A,): {EOS: 1}})
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=9), 9, frozenset({EOS}))
    assert search.advance([[(EOS, math.log(0.5)), (A, math.log(0.5))]]) == []
    assert shown(search.results()) == [([EOS], 0.5, "stop")]
    # Were the other first, it would live on; the end, then in the second place, would not count.
    search = BeamSearch(BeamSearchParams(beam_width=1, max_tokens=9), 9, frozenset({EOS}))
    assert search.advance([[(A, math.log(0.5)), (EOS, math.log(0.5))]]) == [(0, A)]
    assert search.advance([model([A])]) == []
    assert shown(search.results()) == [([A, EOS], 0.5, "stop")]


def test_ignore_eos() -> None:
    found = beam_search(LINE, width=2, max_tokens=2, ignore_eos=True)
    assert [(b.token_ids, b.finish_reason) for b in found] == [([A, A], "length"), ([A, EOS], "length")]
    through = table({(): {EOS: 0.9, A: 0.1}, (EOS,): {A: 0.9, EOS: 0.1}})
    assert shown(beam_search(through, width=1, max_tokens=2, ignore_eos=True)) == [([EOS, A], 0.81, "length")]


def test_equals_keep_their_order() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=3, max_tokens=2), 2, frozenset())
    assert search.advance([[(7, -1.0), (3, -1.0), (5, -1.0)]]) == [(0, 7), (0, 3), (0, 5)]
    assert search.advance([[(1, -1.0), (2, -2.0)], [(4, -1.0)], [(9, -1.0)]]) == []
    assert [b.token_ids for b in search.results()] == [[7, 1], [3, 4], [5, 9]]


def test_a_tiny_vocabulary_has_fewer_beams() -> None:
    search = BeamSearch(BeamSearchParams(beam_width=4, max_tokens=3), 3, frozenset({EOS}))
    after = [(A, -0.5), (B, -1.0), (EOS, -9.0)]
    assert search.advance([after]) == [(0, A), (0, B)]
    assert search.advance([after, after]) == [(0, A), (0, B), (1, A), (1, B)]
    assert search.advance([after] * 4) == []
    assert len(search.results()) == 4
    nothing_but_ends = BeamSearch(BeamSearchParams(beam_width=2, max_tokens=9), 9, frozenset({EOS}))
    assert nothing_but_ends.advance([[(EOS, 0.0)]]) == []
    assert shown(nothing_but_ends.results()) == [([EOS], 1.0, "stop")]


@pytest.mark.parametrize("penalty", [0.5, 1, 2])
@pytest.mark.parametrize("eos_ids", [frozenset(), frozenset({EOS}), frozenset({EOS, A})], ids=len)
def test_a_width_beyond_all_continuations_ranks_them_all(penalty: float, eos_ids: frozenset[int]) -> None:
    vocab, limit = 3, 4
    for seed in range(5):
        model = hashed(vocab, seed)
        expected = []
        for length in range(1, limit + 1):
            for tokens in itertools.product(range(vocab), repeat=length):
                ends = tokens[-1] in eos_ids
                if (ends or length == limit) and not eos_ids & set(tokens[:-1]):
                    total = sum(logprob_of([seed, *tokens[:i]], t, vocab) for i, t in enumerate(tokens))
                    expected.append((total / length**penalty, list(tokens), "stop" if ends else "length"))
        expected.sort(key=lambda entry: -entry[0])
        width = vocab**limit
        found = beam_search(model, width=width, max_tokens=limit, eos_ids=eos_ids, length_penalty=penalty)
        assert [(b.token_ids, b.finish_reason) for b in found] == [entry[1:] for entry in expected]
        for beam, (score, tokens, _) in zip(found, expected, strict=True):
            assert beam.cum_logprob == pytest.approx(score * len(tokens) ** penalty)


@pytest.mark.parametrize("width", [1, 2, 5])
@pytest.mark.parametrize("eos_ids", [frozenset(), frozenset({3}), frozenset({1, 3, 4})], ids=len)
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_more_candidates_change_nothing(width: int, eos_ids: frozenset[int], ignore_eos: bool) -> None:
    class Whole(BeamSearch):
        num_candidates = 12  # type: ignore[assignment]

    params = BeamSearchParams(beam_width=width, max_tokens=8, ignore_eos=ignore_eos)
    reasons = set()
    for seed in range(20):
        model = hashed(12, seed)
        search = BeamSearch(params, 8, eos_ids)
        assert search.num_candidates < 12
        found = run(search, model)
        assert found == run(Whole(params, 8, eos_ids), model)
        assert len(found) == width
        reasons |= {beam.finish_reason for beam in found}
    assert ("stop" in reasons) == (not ignore_eos and bool(eos_ids))


def make_engine(**settings: Any) -> Engine:
    return Engine(
        FakeExecutor(kv_blocks=16, vocab_size=11),
        EngineConfig(**settings),
        max_model_len=64,
        kv_blocks=16,
        vocab_size=11,
        eos_ids=frozenset({3}),
        new_stream=lambda params: FakeStream(),
        token_text=str,
    )


BEAMS = BeamSearchParams(beam_width=3, max_tokens=9, ignore_eos=True)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_beam_that_fails_ends_its_search(steps: int, broken: int) -> None:
    engine = make_engine(max_num_seqs=4)
    request = engine.add_request("beams", [1, 2], BEAMS)
    other = engine.add_request("other", [5], SamplingParams(max_tokens=20, ignore_eos=True))
    for _ in range(steps):
        engine.step()
    engine.executor.broken.add(request.sequences[broken].sequence_id)  # type: ignore[attr-defined]
    assert request in engine.step()
    assert request.finished
    assert request.beams is None
    assert {o.finish_reason for o in request.output().outputs} == {"error"}
    while engine.has_unfinished:
        assert engine.step() == [other]
    assert other.num_generated == 20
    assert engine.blocks.num_allocated == 0


def test_beams_that_no_step_has_named_are_not_forgotten_either() -> None:
    engine = make_engine()
    request = engine.add_request("beams", [1, 2], BEAMS)
    engine.step()
    assert len(request.sequences) == 3  # of which the runner knows one
    engine.abort("beams")
    engine.add_request("next", [1], SamplingParams(max_tokens=1))
    engine.step()
    step = engine.executor.steps[-1]  # type: ignore[attr-defined]
    assert (len(step.new), len(step.finished)) == (1, 1)


def test_more_candidates_than_tokens() -> None:
    engine = make_engine(max_num_seqs=16)
    request = engine.add_request("beams", [1], BeamSearchParams(beam_width=16, max_tokens=2))
    engine.step()
    assert len(request.sequences) == 10  # all tokens but the one that ends a beam
    engine.step()
    assert request.beams is not None
    assert len(request.beams) == 16


def test_the_text_leaves_out_only_what_ended_the_beam() -> None:
    def ends(**params: bool) -> set[tuple[str, bool]]:
        """Of the beams whose last token is an end token: why they ended, and whether their text has it."""
        engine = make_engine()
        request = engine.add_request("beams", [2], BeamSearchParams(beam_width=8, max_tokens=2, **params))
        while engine.has_unfinished:
            engine.step()
        assert request.beams is not None
        return {(b.finish_reason, b.text.endswith("<3>")) for b in request.beams if b.tokens[-1] == 3}

    assert ends() == {("stop", False)}
    assert ends(include_stop_str_in_output=True) == {("stop", True)}
    assert ends(ignore_eos=True) == {("length", True)}
