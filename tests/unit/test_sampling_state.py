"""Sampler: what a step's SampleBatch says of each sequence, from its params and the tokens before."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.byte_tokenizer import END_THINK, EOS, THINK, TOKENIZER, ids

from hexad.backends.sampling import ROW_DTYPE, SAMPLER_IDS, SampleBatch, SampleOutput
from hexad.engine.step import ScheduledStep, SequenceSpec
from hexad.params import PoolingParams, SamplingParams, StructuredOutputsParams
from hexad.runner.batch import make_batch
from hexad.runner.grammar import Grammar, GrammarCompiler
from hexad.runner.sampling import Sampler, token_logprobs
from hexad.runner.sequence_state import History, ThinkingBudget, Vocabulary

VOCAB = 270  # wider than the tokenizer's, as padded embeddings are


class Steps:
    """One sampler, and a way to draw from its sequences."""

    def __init__(self) -> None:
        self.sampler = Sampler(Vocabulary(VOCAB, lambda: TOKENIZER))
        self.lengths: dict[int, int] = {}
        self.prompts: dict[int, int] = {}

    def add(
        self,
        params: SamplingParams | PoolingParams,
        prompt: Sequence[int] = (1, 2, 3),
        grammar: Grammar | None = None,
        **spec: Any,
    ) -> int:
        """A sequence; returns its id."""
        sequence_id = 10 + len(self.lengths)
        given = {"index": 0, "seed": 1, **spec}
        self.sampler.add(
            SequenceSpec(sequence_id, prompt_token_ids=list(prompt), params=params, **given), grammar
        )
        self.lengths[sequence_id] = self.prompts[sequence_id] = len(prompt)
        return sequence_id

    def wanted(self, *draws: int) -> SampleBatch:
        """What is asked where these sequences draw their next tokens."""
        return self.sampler.make(self.sampler.rows(self.step(*draws)))

    def step(self, *draws: int) -> ScheduledStep:
        starts = [self.lengths[i] - 1 for i in draws]
        n = len(draws)
        return ScheduledStep([*draws], [1] * n, starts, [0] * n, [[0]] * n, [(i,) for i in draws])

    def draw(self, sequence_id: int, *tokens: int, mu: float = 0.0) -> None:
        for token in tokens:
            rows = self.sampler.rows(self.step(sequence_id))
            self.sampler.accept(rows, [token], np.array([mu], np.float32))
            self.lengths[sequence_id] += 1


@pytest.fixture
def steps() -> Steps:
    return Steps()


def bias_of(wanted: SampleBatch, row: int = 0) -> dict[int, float]:
    part = slice(*wanted.bias_starts[row : row + 2])
    return dict(zip(wanted.bias_ids[part].tolist(), wanted.bias_values[part].tolist(), strict=True))


def forbidden(wanted: SampleBatch, row: int = 0) -> set[int]:
    return {token for token, value in bias_of(wanted, row).items() if value == -np.inf}


def tokens_of(mask: NDArray[np.uint32]) -> set[int]:
    assert mask.shape == (-(-VOCAB // 32),)
    return {t for t in range(32 * len(mask)) if mask[t // 32] >> (t % 32) & 1}


def allowed(wanted: SampleBatch, row: int = 0) -> set[int] | None:
    number = wanted.rows["mask"][row]
    return None if number < 0 else tokens_of(wanted.masks[number])


def history_of(wanted: SampleBatch, row: int = 0) -> list[int]:
    part = slice(*wanted.history_starts[row : row + 2])
    history: list[int] = wanted.history[part].tolist()
    return history


def test_a_row_has_the_params(steps: Steps) -> None:
    names = "temperature top_p min_p typical_p top_n_sigma xtc_probability xtc_threshold repetition_penalty"
    names += " presence_penalty frequency_penalty dry_multiplier dry_base mirostat_tau mirostat_eta"
    names += " dynatemp_range dynatemp_exponent"
    given: dict[str, Any] = {name: 0.25 + i / 64 for i, name in enumerate(names.split())}
    given |= {"dry_base": 1.5, "xtc_threshold": 0.5, "mirostat_tau": 4.0}
    given |= {"top_k": 2**31 - 1, "repeat_last_n": 5, "dry_allowed_length": 3, "mirostat": 2}
    params = SamplingParams(
        **given, dry_penalty_last_n=9, logprobs=4, samplers=("top_k", "dry", "penalties", "temperature")
    )
    first = steps.add(params, seed=2**64 - 1, index=2**32 - 1, prompt=[4] * 6)
    row = steps.wanted(first).rows[0]
    for name, value in given.items():
        assert row[name] == (np.float32(value) if isinstance(value, float) else value), name
    assert (row["seed"], row["sequence"], row["position"]) == (2**64 - 1, 2**32 - 1, 6)
    assert (row["num_prompt"], row["dry_last_n"], row["num_logprobs"], row["draw"]) == (6, 9, 4, 1)
    assert row["mirostat_mu"] == 8
    expected = [SAMPLER_IDS[name] for name in ("top_k", "dry", "penalties", "temperature")]
    assert row["order"].tolist() == expected + [0] * 8


def test_plain_sequences_have_nothing_but_a_row(steps: Steps) -> None:
    draws = [steps.add(SamplingParams(temperature=0.7, top_k=i + 1, logprobs=2)) for i in range(3)]
    assert not steps.sampler.states
    wanted = steps.wanted(draws[2], draws[0])
    assert wanted.rows["top_k"].tolist() == [3, 1]
    assert wanted.rows["mask"].tolist() == wanted.rows["dry_breakers"].tolist() == [-1, -1]
    for starts in (wanted.history_starts, wanted.bias_starts, wanted.ask_starts):
        assert starts.dtype == np.int64
        assert starts.tolist() == [0, 0, 0]
    for array, dtype in (
        (wanted.history, np.int32), (wanted.bias_ids, np.int32), (wanted.bias_values, np.float32),
        (wanted.ask_ids, np.int32),
    ):  # fmt: skip
        assert (array.dtype, array.shape) == (dtype, (0,))
    assert wanted.masks.shape == (0, -(-VOCAB // 32))
    assert wanted.rows.dtype == ROW_DTYPE


def test_rows_are_reused_and_grow(steps: Steps) -> None:
    many = [steps.add(SamplingParams(top_k=i + 1)) for i in range(200)]
    assert steps.wanted(*many).rows["top_k"].tolist() == [*range(1, 201)]
    for sequence_id in many[:100]:
        steps.sampler.drop(sequence_id)
        steps.sampler.drop(sequence_id)  # a second time changes nothing
    more = [steps.add(SamplingParams(top_k=1000 + i)) for i in range(150)]
    assert len(steps.sampler) == 250
    found = steps.wanted(*many[100:], *more).rows["top_k"].tolist()
    assert found == [*range(101, 201), *range(1000, 1150)]


@pytest.mark.parametrize("seed", range(8))
def test_a_step_owes_nothing_to_the_one_before(seed: int) -> None:
    """Whoever drew before, comes and goes: what is wanted is what a sampler says that knows only those who
    draw now."""
    rng = random.Random(seed)
    kinds = [SamplingParams(temperature=0.5), SamplingParams(logprobs=2), SamplingParams(logit_bias={3: 1.0})]
    steps, params = Steps(), dict[int, SamplingParams]()
    draws: list[int] = []
    for _ in range(200):
        if not params or rng.random() < 0.2:
            given = rng.choices(kinds, [6, 2, 1])[0]
            params[steps.add(given, prompt=[1] * rng.randint(1, 9))] = given
        elif rng.random() < 0.15:
            gone = rng.choice(sorted(params))
            steps.sampler.drop(gone)
            del params[gone]
        if rng.random() < 0.4 or not set(draws) <= params.keys():
            draws = rng.sample(sorted(params), rng.randint(0, len(params)))
        fresh = Steps()
        for i in draws:
            spec = SequenceSpec(i, 0, 1, [1] * steps.prompts[i], params[i])
            fresh.sampler.add(spec)
        fresh.lengths = steps.lengths
        found, expected = steps.wanted(*draws), fresh.wanted(*draws)
        for field in fields(SampleBatch):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))
        for i in draws:
            steps.draw(i, 7)


def test_history_grows_by_what_is_drawn(steps: Steps) -> None:
    penalised = steps.add(SamplingParams(presence_penalty=0.5), prompt=[5, 6])
    plain = steps.add(SamplingParams())
    dry = steps.add(SamplingParams(dry_multiplier=0.8), prompt=[9])
    drawn = [i % 250 for i in range(150)]  # more than is set aside at first
    steps.draw(penalised, *drawn)
    wanted = steps.wanted(plain, penalised, dry)
    assert history_of(wanted, 0) == []
    assert history_of(wanted, 1) == [5, 6, *drawn]
    assert history_of(wanted, 2) == [9]
    assert wanted.rows["num_prompt"][1] == 2
    assert wanted.rows["position"].tolist() == [3, 152, 1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.2, repeat_last_n=0),
        SamplingParams(repetition_penalty=1.2, samplers=("temperature",)),
        SamplingParams(dry_multiplier=1, samplers=("penalties",)),
        SamplingParams(dry_multiplier=1, dry_penalty_last_n=0),
    ],
)
def test_no_history_where_nothing_looks_at_it(steps: Steps, params: SamplingParams) -> None:
    steps.add(params)
    assert not steps.sampler.states


def test_siblings_go_on_from_one_row(steps: Steps) -> None:
    params = SamplingParams(n=3, frequency_penalty=0.1)
    a, b, c = (steps.add(params, prompt=[5, 6], index=i) for i in range(3))
    step = ScheduledStep([a], [2], [0], [5, 6], [[0]], [(a, b, c)])
    rows = steps.sampler.rows(step)
    assert (rows.sequence_ids, rows.positions, rows.reported) == ([a, b, c], [2, 2, 2], [])
    wanted = steps.sampler.make(rows)
    assert [history_of(wanted, i) for i in range(3)] == [[5, 6]] * 3
    assert wanted.rows["sequence"].tolist() == [0, 1, 2]
    steps.sampler.accept(rows, [7, 8, 9], np.zeros(3, np.float32))
    steps.lengths |= dict.fromkeys((a, b, c), 3)
    wanted = steps.wanted(c, a, b)
    assert [history_of(wanted, i) for i in range(3)] == [[5, 6, 9], [5, 6, 7], [5, 6, 8]]


def test_logit_bias(steps: Steps) -> None:
    biased = steps.add(SamplingParams(logit_bias={7: 1.5, 200: -100}))
    wanted = steps.wanted(steps.add(SamplingParams()), biased)
    assert bias_of(wanted, 0) == {}
    assert bias_of(wanted, 1) == {7: 1.5, 200: -100}


def test_min_tokens_forbid_every_end(steps: Steps) -> None:
    sequence = steps.add(SamplingParams(min_tokens=2, stop_token_ids=[40], logit_bias={40: 5, 41: 1}))
    for _ in range(2):
        wanted = steps.wanted(sequence)
        assert forbidden(wanted) == {EOS, 40}
        assert bias_of(wanted)[41] == 1
        steps.draw(sequence, 9)
    assert bias_of(steps.wanted(sequence)) == {40: 5, 41: 1}


def test_bad_words(steps: Steps) -> None:
    sequence = steps.add(SamplingParams(bad_words=["x", "abc"]), prompt=ids("ab"))
    x, a, b, c, space = ids("xabc ")
    assert forbidden(steps.wanted(sequence)) == {x}  # what stands in the prompt is not the model's
    steps.draw(sequence, a)
    assert forbidden(steps.wanted(sequence)) == {x}
    steps.draw(sequence, b)
    assert forbidden(steps.wanted(sequence)) == {x, c}
    steps.draw(sequence, space)
    assert forbidden(steps.wanted(sequence)) == {x}
    steps.draw(sequence, a, b)
    assert forbidden(steps.wanted(sequence)) == {x, c}


def test_banned_tokens(steps: Steps) -> None:
    params = SamplingParams(banned_token_ids=[40, 41], bad_words=["x"], logit_bias={40: 5, 42: 1})
    wanted = steps.wanted(steps.add(params))
    assert forbidden(wanted) == {40, 41, *ids("x")}
    assert bias_of(wanted)[42] == 1


def test_bad_words_are_spelt_with_and_without_a_space() -> None:
    assert Vocabulary(VOCAB, lambda: TOKENIZER).bad_words([" no"]) == [ids("no"), ids(" no")]


def test_masks_are_shared(steps: Steps) -> None:
    only = SamplingParams(allowed_token_ids=[0, 31, 32, 269])
    dry = [steps.add(SamplingParams(dry_multiplier=0.5)) for _ in range(2)]
    other = steps.add(SamplingParams(dry_multiplier=0.5, dry_sequence_breakers=["z"]))
    wanted = steps.wanted(dry[0], steps.add(only), dry[1], other, steps.add(SamplingParams()))
    assert [allowed(wanted, i) for i in range(5)] == [None, {0, 31, 32, 269}, None, None, None]
    breakers = wanted.rows["dry_breakers"].tolist()
    assert breakers[0] == breakers[2] != breakers[3]
    assert breakers[1] == breakers[4] == -1
    assert tokens_of(wanted.masks[breakers[0]]) == set(ids('\n:"*'))
    assert tokens_of(wanted.masks[breakers[3]]) == set(ids("z"))
    assert len(wanted.masks) == 3


def test_a_grammars_mask_is_narrowed(steps: Steps) -> None:
    compiler = GrammarCompiler(lambda: TOKENIZER, VOCAB)
    x, y, z = ids("xyz")
    free = steps.add(SamplingParams())
    bound, narrowed = (
        steps.add(params, grammar=compiler.compile(StructuredOutputsParams(regex="[xy]z")))
        for params in (SamplingParams(), SamplingParams(allowed_token_ids=[x, z]))
    )

    def found() -> list[set[int] | None]:
        rows = steps.sampler.rows(steps.step(free, narrowed, bound))
        grammars = steps.sampler.grammars(rows)
        masks = np.empty((len(grammars), -(-VOCAB // 32)), np.uint32)
        for grammar, mask in zip(grammars.values(), masks, strict=True):
            grammar.fill_mask(mask)
        wanted = steps.sampler.make(rows, grammars, masks)
        return [allowed(wanted, i) for i in range(3)]

    assert found() == [None, {x}, {x, y}]
    steps.draw(bound, y)
    assert found() == [None, {x}, {z}]


def test_mirostat_keeps_its_mu(steps: Steps) -> None:
    other = steps.add(SamplingParams(mirostat_tau=3))
    sequence = steps.add(SamplingParams(mirostat=2, mirostat_tau=3))
    assert steps.wanted(sequence).rows["mirostat_mu"] == 6
    steps.draw(sequence, 5, mu=4.25)
    steps.draw(other, 5, mu=1)
    assert steps.wanted(sequence, other).rows["mirostat_mu"].tolist() == [4.25, 6]


class TestThinkingBudget:
    @pytest.mark.parametrize("budget", [None, -1])
    def test_without_one(self, steps: Steps, budget: int | None) -> None:
        sequence = steps.add(SamplingParams(thinking_token_budget=budget), prompt=[THINK])
        steps.draw(sequence, *range(10))
        assert allowed(steps.wanted(sequence)) is None

    def test_ends_the_thinking(self, steps: Steps) -> None:
        sequence = steps.add(SamplingParams(thinking_token_budget=2))
        steps.draw(sequence, 1, 2, 3, THINK, 4)
        assert allowed(steps.wanted(sequence)) is None
        steps.draw(sequence, 5)
        assert allowed(steps.wanted(sequence)) == {END_THINK}
        steps.draw(sequence, END_THINK, 1, 2, 3)
        assert allowed(steps.wanted(sequence)) is None
        steps.draw(sequence, THINK, 1, 2)  # once more, with a new budget
        assert allowed(steps.wanted(sequence)) == {END_THINK}

    def test_in_the_prompt(self, steps: Steps) -> None:
        params = SamplingParams(thinking_token_budget=2)
        began = steps.add(params, prompt=[THINK, 1, END_THINK, 7, THINK, 5])
        over = steps.add(params, prompt=[THINK, 1, 2, 3, END_THINK, 7])
        assert allowed(steps.wanted(began)) is None
        steps.draw(began, 6)
        wanted = steps.wanted(over, began)
        assert [allowed(wanted, i) for i in range(2)] == [None, {END_THINK}]

    def test_zero(self, steps: Steps) -> None:
        sequence = steps.add(SamplingParams(thinking_token_budget=0), prompt=[THINK])
        assert allowed(steps.wanted(sequence)) == {END_THINK}

    def test_of_several_tokens(self) -> None:
        def begun(*tokens: int) -> int | None:
            history = History(tokens)
            return ThinkingBudget(3, ([1, 2], [1, 1, 3]), history).forced()

        assert begun(1, 2, 8, 8) is None
        assert begun(1, 2, 8, 8, 8) == 1
        assert begun(1, 2, 8, 8, 1) == 1  # the model itself has begun
        assert begun(1, 2, 8, 1, 1) == 3
        assert begun(1, 2, 1, 1, 1) == 3
        assert begun(1, 2, 1, 1, 3) is None


class TestReports:
    def test_prompt_logprobs(self, steps: Steps) -> None:
        plain = steps.add(SamplingParams(), prompt=[1, 2, 3])
        sequence = steps.add(SamplingParams(prompt_logprobs=3, logprobs=1), prompt=[5, 6, 7, 8])
        step = ScheduledStep([plain, sequence], [3, 4], [0, 0], [0] * 7, [[0], [1]], [(plain,), (sequence,)])
        reports = steps.sampler.reports(step)
        assert reports == {1: range(3)}
        rows = steps.sampler.rows(step, reports)
        assert rows.sequence_ids == [plain, *[sequence] * 4]
        assert (rows.positions, rows.reported) == ([3, 0, 1, 2, 4], [1, 2, 3])
        assert make_batch(step, reports).sample_rows.tolist() == [2, 3, 4, 5, 6]
        wanted = steps.sampler.make(rows)
        assert wanted.rows["draw"].tolist() == [1, 0, 0, 0, 1]
        assert wanted.rows["num_logprobs"].tolist() == [-1, 3, 3, 3, 1]
        assert wanted.ask_ids.tolist() == [6, 7, 8]
        assert wanted.ask_starts.tolist() == [0, 0, 1, 2, 3, 3]

    def test_each_position_once(self, steps: Steps) -> None:
        sequence = steps.add(SamplingParams(prompt_logprobs=0), prompt=[5, 6, 7, 8, 9])

        def run(start: int, count: int, draws: tuple[int, ...] = ()) -> range | None:
            step = ScheduledStep([sequence], [count], [start], [0] * count, [[0]], [draws])
            reports = steps.sampler.reports(step)
            rows = steps.sampler.rows(step, reports)
            steps.sampler.accept(rows, [-1] * len(rows.reported) + [3] * len(draws), np.zeros(9, np.float32))
            return reports.get(0)

        assert run(0, 2) == range(2)
        assert run(0, 3) == range(2, 3)  # preempted, and computed again
        assert run(3, 2, (sequence,)) == range(3, 4)
        assert run(0, 6, (sequence,)) is None

    def test_token_ids_from_a_position_on(self, steps: Steps) -> None:
        params = SamplingParams(prompt_logprob_token_ids=[50, 60], prompt_logprob_start=2)
        sequence = steps.add(params, prompt=[5, 6, 7, 8, 9])
        step = ScheduledStep([sequence], [5], [0], [0] * 5, [[0]], [()])
        reports = steps.sampler.reports(step)
        assert reports == {0: range(2, 4)}
        wanted = steps.sampler.make(steps.sampler.rows(step, reports))
        assert wanted.ask_ids.tolist() == [8, 50, 60, 9, 50, 60]
        assert wanted.rows["num_logprobs"].tolist() == [0, 0]

    def test_token_ids_beside_prompt_logprobs(self, steps: Steps) -> None:
        params = SamplingParams(prompt_logprobs=1, prompt_logprob_token_ids=[50], prompt_logprob_start=1)
        sequence = steps.add(params, prompt=[5, 6, 7])
        step = ScheduledStep([sequence], [3], [0], [0] * 3, [[0]], [()])
        wanted = steps.sampler.make(steps.sampler.rows(step, steps.sampler.reports(step)))
        assert wanted.ask_ids.tolist() == [6, 7, 50]
        assert wanted.ask_starts.tolist() == [0, 1, 3]

    def test_of_drawn_tokens(self, steps: Steps) -> None:
        draws = [
            steps.add(params)
            for params in (
                SamplingParams(logprob_token_ids=[4, 5]),
                SamplingParams(logprobs=-1),
                SamplingParams(logprobs=0),
            )
        ]
        wanted = steps.wanted(*draws)
        assert wanted.rows["num_logprobs"].tolist() == [0, VOCAB, 0]
        assert wanted.ask_ids.tolist() == [4, 5]
        assert wanted.ask_starts.tolist() == [0, 2, 2, 2]

    @pytest.mark.parametrize(("pooling", "expected"), [("mean", range(3)), ("last", range(2, 3))])
    def test_pooling_wants_no_logits(self, steps: Steps, pooling: Any, expected: range) -> None:
        sequence = steps.add(PoolingParams(pooling=pooling))
        step = ScheduledStep([sequence], [3], [0], [0] * 3, [[0]], [()])
        reports = steps.sampler.reports(step)
        assert reports == {0: expected}
        wanted = steps.sampler.make(steps.sampler.rows(step, reports))
        assert not wanted.rows["draw"].any()
        assert (wanted.rows["num_logprobs"] == -1).all()
        assert not wanted.ask_ids.size


def test_logprobs_in_the_documented_order() -> None:
    rows = np.zeros(3, ROW_DTYPE)
    rows["draw"] = [1, 0, 0]
    rows["num_logprobs"] = [2, 3, -1]
    none = np.empty(0, np.int32)
    wanted = SampleBatch(
        rows=rows, history=none, history_starts=np.zeros(4, np.int64), bias_ids=none,
        bias_values=np.empty(0, np.float32), bias_starts=np.zeros(4, np.int64),
        ask_ids=np.array([40, 41, 42], np.int32), ask_starts=np.array([0, 2, 3, 3]),
        masks=np.empty((0, 9), np.uint32),
    )  # fmt: skip
    output = SampleOutput(
        tokens=np.array([7, -1, -1], np.int32),
        mirostat_mu=np.zeros(3, np.float32),
        logprobs=np.array([-1.5, 0, 0], np.float32),
        ranks=np.array([2, 0, 0], np.int32),
        top_ids=np.array([[6, 7, 0], [1, 2, 3], [0, 0, 0]], np.int32),
        top_logprobs=np.array([[-0.5, -1.5, 0], [-1, -1, -2], [0, 0, 0]], np.float32),
        ask_logprobs=np.array([-4, -5, -6], np.float32),
        ask_ranks=np.array([14, 15, 16], np.int32),
    )
    found = dict(token_logprobs(wanted, output))
    assert found == {
        0: ([7, 40, 41, 6, 7], [-1.5, -4, -5, -0.5, -1.5], [2, 14, 15, 1, 2]),
        1: ([42, 1, 2, 3], [-6, -1, -1, -2], [16, 1, 1, 3]),  # of equals no one is larger
    }
