"""The engine under whatever may come, as a state machine: every request comes to what it would alone, and the
blocks that are allocated are just those that the tokens need."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.fake_executor import FakeExecutor, FakeStream, generate_alone, likeliest, logprob_of, text_of

from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.engine.beam import BeamSearch
from hexad.engine.engine import Engine
from hexad.engine.request import Request, Status
from hexad.engine.step import ScheduledStep, StepResult
from hexad.outputs import BeamSearchSequence
from hexad.params import BeamSearchParams, PoolingParams, SamplingParams

VOCAB = 11
EOS = 3
MAX_LEN = 5 * BLOCK_TOKENS

# Prompts that begin alike, in whole blocks and in parts of them.
STEMS = [[1 + i % 2 for i in range(n)] for n in (0, 31, 32, 33, 70)]
PROMPTS = st.builds(
    lambda stem, rest: stem + rest,
    st.sampled_from(STEMS),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=50),
)


def beams_alone(prompt: list[int], params: BeamSearchParams) -> list[BeamSearchSequence]:
    """What a beam search must come to, whatever runs beside it."""
    search = BeamSearch(params, min(params.max_tokens, MAX_LEN - len(prompt)), frozenset({EOS}))
    live = [prompt]
    while live:
        after = [likeliest(tokens, search.num_candidates, VOCAB) for tokens in live]
        moves = search.advance([list(zip(a.token_ids, a.logprobs, strict=True)) for a in after])
        live = [[*live[parent], token_id] for parent, token_id in moves]
    return [
        BeamSearchSequence(
            tokens=[*prompt, *beam.token_ids],
            text=text_of(beam.token_ids, frozenset() if params.ignore_eos else frozenset({EOS})),
            cum_logprob=beam.cum_logprob,
            finish_reason=beam.finish_reason,
        )
        for beam in search.results()
    ]


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        kv_blocks=st.sampled_from([5, 6, 7, 12, 60]),
        budget=st.sampled_from([16, 64, 2048]),
        seqs=st.sampled_from([1, 2, 4, 5, 8, 16]),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority"]),
        max_step_ms=st.sampled_from([None, 0.01, 1000]),
        late=st.booleans(),
    )
    def begin(self, kv_blocks: int, budget: int, seqs: int, **config: Any) -> None:
        self.executor = FakeExecutor(kv_blocks=kv_blocks, vocab_size=VOCAB, keep=False)
        self.engine = Engine(
            self.executor,
            EngineConfig(
                max_num_batched_tokens=budget,
                max_num_seqs=seqs,
                enable_prefix_caching=config["caching"],
                scheduling_policy=config["policy"],
                max_step_ms=config["max_step_ms"],
            ),
            max_model_len=MAX_LEN,
            kv_blocks=kv_blocks,
            vocab_size=VOCAB,
            eos_ids=frozenset({EOS}),
            new_stream=lambda params: FakeStream(),
            token_text=lambda token_id: f"<{token_id}>",
        )
        # With the times that steps really take, no run would go as the one before.
        pace, times = self.engine.scheduler.pace, random.Random(budget)
        pace.end = functools.partial(lambda end, seconds: end(times.uniform(0, 0.02)), pace.end)
        self.executor.late = config["late"]
        self.engine.scheduler._settling = 0
        self.requests: dict[str, Request] = {}
        self.ended: set[str] = set()

    def add(self, prompt: list[int], params: Any, **options: Any) -> None:
        name = str(len(self.requests))
        self.requests[name] = self.engine.add_request(name, prompt, params, **options)

    @rule(
        prompt=PROMPTS,
        seed=st.integers(0, 2),
        max_tokens=st.integers(1, 50),
        n=st.sampled_from([1, 1, 1, 2, 4, 7]),
        ignore_eos=st.booleans(),
        salt=st.sampled_from([None, None, "salt"]),
        priority=st.integers(0, 2),
    )
    def generate(
        self,
        prompt: list[int],
        seed: int,
        max_tokens: int,
        n: int,
        ignore_eos: bool,
        salt: str | None,
        priority: int,
    ) -> None:
        params = SamplingParams(n=n, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos)
        self.add(prompt, params, cache_salt=salt, priority=priority)

    @rule(prompt=PROMPTS, n=st.integers(1, 3), generate=st.booleans())
    def report_logprobs(self, prompt: list[int], n: int, generate: bool) -> None:
        params = SamplingParams(n=n, seed=1, max_tokens=5, logprobs=2, prompt_logprobs=0)
        self.add(prompt, params, generate=generate)

    @rule(prompt=PROMPTS)
    def embed(self, prompt: list[int]) -> None:
        self.add(prompt, PoolingParams())

    @precondition(lambda self: self.engine.config.max_num_seqs >= 2)
    @rule(data=st.data(), prompt=PROMPTS, max_tokens=st.integers(1, 40), ignore_eos=st.booleans())
    def search_beams(self, data: st.DataObject, prompt: list[int], max_tokens: int, ignore_eos: bool) -> None:
        width = data.draw(st.integers(1, min(4, self.engine.config.max_num_seqs)), "width")
        self.add(prompt, BeamSearchParams(beam_width=width, max_tokens=max_tokens, ignore_eos=ignore_eos))

    @precondition(lambda self: self.engine.has_unfinished)
    @rule(times=st.integers(1, 30))
    def step(self, times: int) -> None:
        for _ in range(times):
            if not self.engine.has_unfinished:
                break
            for request in self.engine.step():
                if request.finished:
                    self.check_ended(request)

    @precondition(lambda self: self.engine.has_unfinished)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.engine.requests)))
        self.engine.abort(name)
        self.ended.add(name)
        request = self.requests[name]
        assert request.finished
        assert all(o.finish_reason is not None for o in request.output().outputs)

    @rule()
    def reset_prefix_cache(self) -> None:
        self.engine.reset_prefix_cache()

    @precondition(lambda self: self.engine.has_unfinished)
    @rule()
    def fail(self) -> None:
        self.executor.fail_next = True
        running = set(self.engine.requests)
        failed = self.engine.step()
        assert failed
        for request in failed:
            assert request.finished
            assert {o.finish_reason for o in request.output().outputs} <= {"error", "stop", "length"}
            self.ended.add(request.request_id)
        assert set(self.engine.requests) == running - {r.request_id for r in failed}

    @invariant()
    def blocks_are_those_the_tokens_need(self) -> None:
        if not hasattr(self, "engine"):
            return
        tables = []
        for request in self.engine.requests.values():
            for sequence in request.sequences:
                if sequence.status is not Status.FINISHED:
                    assert len(sequence.block_table) == -(-sequence.num_computed // BLOCK_TOKENS)
                assert sequence.status is Status.RUNNING or not sequence.block_table
                tables += sequence.block_table
        assert self.engine.blocks.num_allocated == len(set(tables))

    def check_ended(self, request: Request) -> None:
        assert request.request_id not in self.ended
        self.ended.add(request.request_id)
        prompt, params, output = request.prompt_token_ids, request.params, request.output()
        if isinstance(params, PoolingParams):
            assert request.embedding == [float(sum(prompt))]
            return
        if request.prompt_logprobs is not None:
            assert output.prompt_logprobs is not None
            assert output.prompt_logprobs[0] is None
            for i in range(1, len(prompt)):
                entry = output.prompt_logprobs[i]
                assert entry is not None
                assert entry[prompt[i]].logprob == logprob_of(prompt[:i], prompt[i], VOCAB)
            assert len(output.prompt_logprobs) == len(prompt)
        if request.search is not None:
            assert request.beams == beams_alone(prompt, request.search.params)
            return
        if not request.generate:
            return
        assert [o.index for o in output.outputs] == list(range(params.n))
        for completion in output.outputs:
            stop_ids = frozenset() if params.ignore_eos else frozenset({EOS})
            tokens, reason = generate_alone(
                prompt,
                seed=params.seed or 0,
                max_len=min(MAX_LEN, len(prompt) + (params.max_tokens or 0)),
                stop_ids=stop_ids,
                vocab_size=VOCAB,
                index=completion.index,
            )
            assert (completion.token_ids, completion.finish_reason) == (tokens, reason)
            assert completion.text == text_of(tokens, stop_ids)
            if params.logprobs is not None:
                assert completion.logprobs is not None
                assert len(completion.logprobs) == len(tokens)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        steps = 0
        while self.engine.has_unfinished:
            self.step(1)
            steps += 1
            assert steps < 20_000, "the engine does not come to an end"
        assert self.ended == set(self.requests)
        assert self.engine.blocks.num_allocated == 0
        assert self.engine.scheduler.num_waiting == 0
        self.engine.add_request("last", [1], SamplingParams(max_tokens=1))
        self.engine.step()
        assert len(self.executor.specs) == 1, "the runner was not told to forget"


TestEngineMachine = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")(
    EngineMachine.TestCase
)
TestEngineMachine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, phases=[Phase.generate]
)


def make_engine(executor: FakeExecutor, **config: Any) -> Engine:
    return Engine(
        executor,
        EngineConfig(**config),
        max_model_len=4096,
        kv_blocks=executor.kv_blocks,
        vocab_size=VOCAB,
        eos_ids=frozenset({EOS}),
        new_stream=lambda params: FakeStream(),
        token_text=lambda token_id: f"<{token_id}>",
    )


@pytest.mark.parametrize("kv_blocks", [3, 4, 5])
@pytest.mark.parametrize("length", [5, 31, 32, 40])
def test_sequences_of_a_prompt_that_has_to_be_computed_again(kv_blocks: int, length: int) -> None:
    executor = FakeExecutor(kv_blocks=kv_blocks, vocab_size=VOCAB, keep=False)
    engine = make_engine(executor, max_num_seqs=5, max_num_batched_tokens=64, enable_prefix_caching=False)
    engine.add_request("first", [1] * 10, SamplingParams(seed=1, max_tokens=50, ignore_eos=True))
    request = engine.add_request(
        "many", [2] * length, SamplingParams(n=7, seed=1, max_tokens=40, ignore_eos=True)
    )
    for _ in range(2000):
        if not engine.has_unfinished:
            break
        engine.step()
    assert engine.scheduler.num_preemptions > 0
    for completion in request.output().outputs:
        expected = generate_alone(
            [2] * length,
            seed=1,
            max_len=length + 40,
            stop_ids=frozenset(),
            vocab_size=VOCAB,
            index=completion.index,
        )
        assert (completion.token_ids, completion.finish_reason) == expected
    assert engine.blocks.num_allocated == 0


class BrokenPrompts(FakeExecutor):
    """Every prompt that is reported on has an error in its first step."""

    def execute(self, step: ScheduledStep) -> StepResult:
        result = super().execute(step)
        result.errors |= dict.fromkeys(result.prompt_logprobs, "broken")
        return result


def test_a_prompt_that_breaks_ends_all_that_would_have_grown_from_it() -> None:
    executor = BrokenPrompts(kv_blocks=20, vocab_size=VOCAB)
    engine = make_engine(executor, max_num_seqs=4, max_num_batched_tokens=16)
    request = engine.add_request("a", [1] * 40, SamplingParams(n=3, max_tokens=5, prompt_logprobs=0))
    assert engine.step() == [request]
    assert request.finished
    assert not engine.has_unfinished
    assert {(o.finish_reason, o.error) for o in request.output().outputs} == {("error", "broken")}


def test_a_draw_that_fails_has_no_logprobs() -> None:
    executor = FakeExecutor(kv_blocks=20, vocab_size=VOCAB)
    engine = make_engine(executor)
    request = engine.add_request("a", [1] * 40, SamplingParams(max_tokens=5, ignore_eos=True, logprobs=1))
    engine.step()
    executor.broken = {0}
    engine.step()
    (completion,) = request.output().outputs
    assert completion.finish_reason == "error"
    assert completion.logprobs is not None
    assert len(completion.token_ids) == len(completion.logprobs) == 1
    assert completion.cumulative_logprob == completion.logprobs[0][completion.token_ids[0]].logprob


def test_streams_leave_a_prompt_that_goes_before_them_its_blocks() -> None:
    executor = FakeExecutor(kv_blocks=100, vocab_size=VOCAB, keep=False)
    engine = make_engine(
        executor,
        max_num_seqs=17,
        max_num_batched_tokens=33,
        scheduling_policy="priority",
        enable_prefix_caching=False,
    )
    for i in range(16):
        params = SamplingParams(max_tokens=900, ignore_eos=True, seed=1)
        engine.add_request(str(i), [1] * 24, params, priority=1)
    for _ in range(20):
        engine.step()
    urgent = engine.add_request("urgent", [2] * 2048, SamplingParams(max_tokens=1, ignore_eos=True))
    computed = 0
    while not urgent.finished:
        engine.step()
        assert urgent.sequences[0].num_computed > computed
        computed = urgent.sequences[0].num_computed
    assert engine.scheduler.num_preemptions > 0
