"""The scheduler by its invariants: arrivals, aborts and steps in any order, on a fake paged executor."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule
from tests.fake_executor import FakeExecutor, FakeStream, generate_alone, text_of
from tests.strategies import prompts, sampling_params

from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.engine.block_manager import BlockManager, blocks_for
from hexad.engine.detokenizer import Detokenizer
from hexad.engine.engine import Engine
from hexad.engine.request import Request, RequestStatus
from hexad.engine.scheduler import Scheduler
from hexad.engine.step import ScheduledStep, StepResult
from hexad.outputs import RequestOutput
from hexad.params import SamplingParams

VOCAB = 20
EOS = frozenset({3, 11})
MAX_LEN = 100


class EngineMachine(RuleBasedStateMachine):
    """Holds the engine to what it promises whatever happens to it."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.requests: dict[str, Request] = {}
        self.outputs: dict[str, RequestOutput] = {}
        self.admitted: list[str] = []
        self.aborted: set[str] = set()
        self.ready = False

    @initialize(
        max_num_seqs=st.integers(1, 5),
        extra_budget=st.sampled_from([0, 1, 7, 40, 500]),
        extra_blocks=st.integers(0, 8),
        seed=st.none() | st.integers(0, 9),
    )
    def start(self, max_num_seqs: int, extra_budget: int, extra_blocks: int, seed: int | None) -> None:
        self.config = EngineConfig(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_seqs + extra_budget, seed=seed
        )
        self.kv_blocks = blocks_for(MAX_LEN - 1) + extra_blocks
        self.executor = FakeExecutor(kv_blocks=self.kv_blocks, vocab_size=VOCAB)
        self.engine = Engine(
            self.executor,
            self.config,
            max_model_len=MAX_LEN,
            kv_blocks=self.kv_blocks,
            vocab_size=VOCAB,
            eos_ids=EOS,
            new_stream=FakeStream,
        )
        self.ready = True

    @rule(target=ids, prompt=prompts(VOCAB, MAX_LEN - 1), params=sampling_params(50))
    def add(self, prompt: list[int], params: SamplingParams) -> str:
        request_id = f"r{len(self.requests)}"
        self.engine.add_request(request_id, prompt, params)
        self.requests[request_id] = self.engine.scheduler.requests[request_id]
        return request_id

    @rule(request_id=consumes(ids))
    def abort(self, request_id: str) -> None:
        output = self.engine.abort(request_id)
        finished_before = request_id in self.outputs and self.outputs[request_id].finished
        assert (output is None) == finished_before
        if output is not None:
            assert output.finished
            assert output.outputs[0].finish_reason == "abort"
            assert self.requests[request_id].block_table == []
            self.outputs[request_id] = output
            self.aborted.add(request_id)
        assert self.engine.abort(request_id) is None

    @rule()
    def step(self) -> None:
        if self.engine.has_unfinished:
            self._step()

    @rule()
    def fail(self) -> None:
        """A failing step leaves every request where it was."""
        if not self.engine.has_unfinished:
            return
        before = {i: (r.num_computed, r.token_ids.copy()) for i, r in self.requests.items()}
        self.executor.fail_next = True
        try:
            self.engine.step()
        except RuntimeError:
            failed = self.executor.steps.pop()
        self._note_admissions(failed)
        assert before == {i: (r.num_computed, r.token_ids) for i, r in self.requests.items()}
        self._step()

    def _step(self) -> None:
        scheduler = self.engine.scheduler
        running_before = list(scheduler.running)
        outputs = [request.output() for request in self.engine.step()]
        step = self.executor.steps[-1]
        scheduled = [s.request_id for s in step.sequences]
        self._note_admissions(step)
        # Budget and seats are respected, and everybody who runs gets something.
        assert 1 <= step.num_tokens <= self.config.max_num_batched_tokens
        assert len(scheduled) <= self.config.max_num_seqs
        assert scheduled[: len(running_before)] == [r.request_id for r in running_before]
        # Every caught-up sequence has its token and the others none.
        assert [o.request_id for o in outputs] == [s.request_id for s in step.sequences if s.sample]
        for output in outputs:
            before = self.outputs.get(output.request_id)
            tokens = output.outputs[0].token_ids
            if before is not None:
                assert not before.finished
                assert tokens[:-1] == before.outputs[0].token_ids
                assert output.outputs[0].text.startswith(before.outputs[0].text)
            assert output.finished == (output.outputs[0].finish_reason is not None)
            self.outputs[output.request_id] = output
        # Nobody waits without a reason.
        if scheduler.waiting and len(scheduled) < self.config.max_num_seqs:
            promised = sum(blocks_for(self.requests[i].max_computed) for i in scheduled)
            head = blocks_for(scheduler.waiting[0].max_computed)
            budget_spent = step.num_tokens == self.config.max_num_batched_tokens
            assert budget_spent or promised + head > self.kv_blocks

    def _note_admissions(self, step: ScheduledStep) -> None:
        self.admitted += [s.request_id for s in step.sequences if s.request_id not in self.admitted]

    @invariant()
    def blocks_hold_what_they_must_and_no_more(self) -> None:
        if not self.ready:
            return
        scheduler = self.engine.scheduler
        assert scheduler.blocks.num_allocated <= self.kv_blocks
        expected = sum(blocks_for(r.num_computed) for r in scheduler.running)
        assert scheduler.blocks.num_allocated == expected
        for request in scheduler.running:
            assert request.status is RequestStatus.RUNNING
            assert request.num_computed <= request.max_computed
        for request in scheduler.waiting:
            assert request.status is RequestStatus.WAITING
            assert request.block_table == []

    @invariant()
    def admitted_in_order_of_arrival(self) -> None:
        arrivals = [i for i in self.requests if i in self.admitted]
        assert self.admitted == arrivals

    def teardown(self) -> None:
        if not self.ready:
            return
        # Each step brings at least one running request a token nearer to its end: nobody starves.
        left = sum(r.max_len - r.num_computed for r in self.requests.values())
        for _ in range(left):
            if not self.engine.has_unfinished:
                break
            self._step()
        assert not self.engine.has_unfinished
        assert self.engine.scheduler.blocks.num_allocated == 0
        assert self.engine.scheduler._promised_blocks == 0
        for request_id, request in self.requests.items():
            self._check_alone(self.outputs[request_id], request)

    def _check_alone(self, output: RequestOutput, request: Request) -> None:
        stop_ids = frozenset() if request.params.ignore_eos else EOS
        max_len = min(MAX_LEN, len(output.prompt_token_ids) + (request.params.max_tokens or MAX_LEN))
        tokens, reason = generate_alone(
            output.prompt_token_ids, seed=request.seed, max_len=max_len, stop_ids=stop_ids, vocab_size=VOCAB
        )
        got = output.outputs[0]
        if output.request_id in self.aborted:
            assert got.token_ids == tokens[: len(got.token_ids)]
            assert got.text == text_of(got.token_ids)
        else:
            assert (got.token_ids, got.finish_reason) == (tokens, reason)
            assert got.text == text_of(tokens, stop_ids)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def make_request(request_id: str, prompt_len: int, max_tokens: int) -> Request:
    return Request(
        request_id=request_id,
        prompt=None,
        token_ids=list(range(prompt_len)),
        params=SamplingParams(max_tokens=max_tokens),
        seed=0,
        max_len=prompt_len + max_tokens,
        stop_ids=frozenset(),
        detokenizer=Detokenizer(FakeStream()),
    )


def run_step(scheduler: Scheduler) -> dict[str, tuple[int, int]]:
    """Runs a step that draws zeros. Returns (start, number of tokens) of each sequence in it."""
    step = scheduler.schedule()
    scheduler.update(step, StepResult([[0] if s.sample else [] for s in step.sequences]))
    return {s.request_id: (s.start, len(s.token_ids)) for s in step.sequences}


def test_prompt_is_chunked_beside_running_requests() -> None:
    scheduler = Scheduler(BlockManager(100), max_num_seqs=4, max_num_batched_tokens=16)
    scheduler.add(make_request("a", 10, 50))
    scheduler.add(make_request("b", 40, 50))
    scheduler.add(make_request("c", 3, 50))
    assert run_step(scheduler) == {"a": (0, 10), "b": (0, 6)}
    assert run_step(scheduler) == {"a": (10, 1), "b": (6, 15)}
    assert run_step(scheduler) == {"a": (11, 1), "b": (21, 15)}
    assert run_step(scheduler) == {"a": (12, 1), "b": (36, 4), "c": (0, 3)}
    assert run_step(scheduler) == {"a": (13, 1), "b": (40, 1), "c": (3, 1)}


def test_waits_for_blocks_that_others_may_still_need() -> None:
    scheduler = Scheduler(BlockManager(4), max_num_seqs=8, max_num_batched_tokens=512)
    scheduler.add(make_request("a", 10, 2 * BLOCK_TOKENS))  # may come to 3 blocks, starts with one
    scheduler.add(make_request("b", 10, BLOCK_TOKENS))  # may come to 2
    scheduler.add(make_request("c", 1, 1))  # would fit, but nobody overtakes
    assert run_step(scheduler).keys() == {"a"}
    assert scheduler.blocks.num_allocated == 1
    scheduler.finish(scheduler.requests["a"], "abort")
    assert run_step(scheduler).keys() == {"b", "c"}


@pytest.mark.parametrize("drawn", [[[0]], [[0], [0], []], [[0], []], [[0], [0, 0]], []])
def test_a_result_that_does_not_fit_changes_nothing(drawn: list[list[int]]) -> None:
    scheduler = Scheduler(BlockManager(100), max_num_seqs=4, max_num_batched_tokens=16)
    requests = [make_request(name, 5, 1) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    step = scheduler.schedule()
    with pytest.raises(AssertionError, match="tokens were drawn"):
        scheduler.update(step, StepResult(drawn))
    assert [(r.num_computed, r.num_generated, r.finished) for r in requests] == [(0, 0, False)] * 2
    assert len(scheduler.update(step, StepResult([[0], [0]]))) == 2


def test_last_token_needs_no_block() -> None:
    scheduler = Scheduler(BlockManager(1), max_num_seqs=1, max_num_batched_tokens=64)
    scheduler.add(make_request("a", BLOCK_TOKENS, 1))
    assert run_step(scheduler) == {"a": (0, BLOCK_TOKENS)}
    assert not scheduler.requests
    assert scheduler.blocks.num_allocated == 0
