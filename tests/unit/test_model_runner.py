"""ModelRunner: what it does with a step, what it keeps of sequences, and what it counts as memory."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.byte_tokenizer import END_THINK, EOS, THINK, TOKENIZER, ids
from tests.tiny_models import TinyModel, dense, tiny_llama

from hexad.backends.backend import CompileOptions, Limits
from hexad.backends.cpu import CpuBackend
from hexad.backends.reference import ReferenceBackend
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.config import EngineConfig
from hexad.engine.step import ScheduledStep, SequenceSpec, StepResult, TokenLogprobs
from hexad.errors import BackendError, InsufficientMemoryError, ParamsError
from hexad.graph.fuse import fuse
from hexad.params import PoolingParams, SamplingParams, StructuredOutputsParams
from hexad.runner import model_runner
from hexad.runner.executor import LocalExecutor
from hexad.runner.model_runner import ModelRunner, make_backend, weight_bytes
from hexad.weights import F16, Q4_0, Q4_1, Q8_0

MODEL = tiny_llama(vocab=270, tied=False)  # a head of its own, whose logits leave something to chance
PROMPT = [(7 * i + 3) % 160 for i in range(40)]
GREEDY = SamplingParams(temperature=0)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "reference"])


def make_runner(model: TinyModel = MODEL, backend: str = "reference", **settings: Any) -> ModelRunner:
    checkpoint = Checkpoint(Path("tiny"), model.config, model.weights, lambda: TOKENIZER, lambda: None)
    return ModelRunner(checkpoint, EngineConfig(**{"max_num_seqs": 4, **settings}), backend)


def damaged(name: str = "model.norm.weight") -> TinyModel:
    broken = np.full(MODEL.weights[name].shape, np.nan, np.float32)
    return TinyModel(MODEL.config, {**MODEL.weights, name: dense(broken)})


def spec(
    sequence_id: int,
    params: SamplingParams | PoolingParams = GREEDY,
    prompt: Sequence[int] = PROMPT,
    index: int = 0,
) -> SequenceSpec:
    return SequenceSpec(sequence_id, index, seed=3, prompt_token_ids=list(prompt), params=params)


def part(
    sequence_id: int, tokens: Sequence[int], start: int = 0, draws: Sequence[int] = (), blocks: Any = None
) -> ScheduledStep:
    """A step of one sequence, which has its own blocks unless others are given."""
    table = [*range(8 * sequence_id, 8 * sequence_id + 8)] if blocks is None else blocks
    return ScheduledStep([sequence_id], [len(tokens)], [start], [*tokens], [table], [tuple(draws)])


def join(*steps: ScheduledStep, **changes: Any) -> ScheduledStep:
    """One step of all of them."""
    joined = ScheduledStep()
    for step in steps:
        for name in ("sequence_ids", "counts", "starts", "tokens", "block_tables", "draws"):
            getattr(joined, name).extend(getattr(step, name))
    return replace(joined, **changes)


def generate(runner: ModelRunner, sequence: SequenceSpec, count: int) -> list[int]:
    """So many tokens of a sequence alone."""
    i, tokens = sequence.sequence_id, list(sequence.prompt_token_ids)
    result = runner.execute(join(part(i, tokens, draws=[i]), new=[sequence]))
    for _ in range(count):
        assert not result.errors
        tokens += result.token_ids[0]
        result = runner.execute(part(i, tokens[-1:], len(tokens) - 1, draws=[i]))
    return tokens[len(sequence.prompt_token_ids) :]


def in_chunks(
    runner: ModelRunner, sequence: SequenceSpec, sizes: Sequence[int], draw: bool = False
) -> list[StepResult]:
    """The results of the steps in which chunks of these sizes compute a prompt."""
    i, prompt = sequence.sequence_id, sequence.prompt_token_ids
    assert sum(sizes) == len(prompt)
    results, start = [], 0
    for size in sizes:
        draws = [i] if draw and start + size == len(prompt) else []
        step = part(i, prompt[start : start + size], start, draws)
        results.append(runner.execute(replace(step, new=[] if start else [sequence])))
        start += size
    return results


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.fixture
def runner() -> ModelRunner:
    return make_runner()


class TestTokens:
    def test_stand_where_they_were_asked_for(self, runner: ModelRunner) -> None:
        ((expected,),) = runner.execute(
            join(part(0, PROMPT, draws=[0]), new=[spec(0), spec(1), spec(2)])
        ).token_ids
        assert runner.execute(part(1, PROMPT[:20])).token_ids == [[]]
        step = join(part(2, [1, 2]), part(1, PROMPT[20:], 20, draws=[1]))
        assert runner.execute(step).token_ids == [[], [expected]]

    def test_blocks_are_copied_before_anything_is_computed(self, runner: ModelRunner) -> None:
        runner.execute(join(part(0, PROMPT, blocks=[3, 1]), new=[spec(0), spec(1)]))
        expected = runner.execute(part(0, [9], 40, [0], blocks=[3, 1])).token_ids
        overwrite = part(1, PROMPT[::-1], blocks=[3, 1])
        copied = part(0, [9], 40, [0], blocks=[6, 8])
        step = join(overwrite, copied, block_copies=[(3, 6), (1, 8)])
        assert runner.execute(step).token_ids == [[], *expected]

    def test_siblings_draw_from_one_row_as_each_would_alone(self, runner: ModelRunner) -> None:
        params = SamplingParams(temperature=2, frequency_penalty=0.5)
        siblings = [spec(i, params, index=i) for i in range(3)]
        step = join(part(0, PROMPT, draws=[0, 1, 2]), new=siblings)
        ((*drawn,),) = runner.execute(step).token_ids
        alone = [generate(make_runner(), sibling, 1) for sibling in siblings]
        assert [[token] for token in drawn] == alone
        assert len(set(drawn)) > 1

    def test_do_not_depend_on_the_batch(self, runner: ModelRunner) -> None:
        params = SamplingParams(temperature=1.5, top_p=0.9, repetition_penalty=1.3)
        alone = generate(runner, spec(0, params), 6)
        runner.execute(ScheduledStep(finished=[0]))
        others = [spec(1, SamplingParams(temperature=1)), spec(2, GREEDY)]
        for other in others:
            in_chunks(runner, other, [40])
        tokens = list(PROMPT)
        result = runner.execute(join(part(3, PROMPT, draws=[3]), new=[spec(3, params)]))
        for n in range(5):
            tokens += result.token_ids[-1]
            beside = [part(i, [5], 40 + n, draws=[i]) for i in (1, 2)]
            result = runner.execute(join(*beside, part(3, tokens[-1:], len(tokens) - 1, draws=[3])))
        assert tokens[40:] + result.token_ids[-1] == alone

    def test_finished_sequences_are_forgotten(self, runner: ModelRunner) -> None:
        sampler = runner._sampler
        structured = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a+"))
        runner.execute(join(part(0, [1]), new=[spec(0), spec(1, structured), spec(2, PoolingParams())]))
        assert len(sampler) == 3
        assert sampler.states.keys() == {1, 2}
        assert runner.execute(ScheduledStep(finished=[0, 2, 1, 77])) == StepResult([])
        assert len(sampler) == len(sampler.states) == 0

    def test_reference_runs_the_graph_as_written(self, runner: ModelRunner) -> None:
        assert not any(node.op.startswith("fused") for node in runner.graph.nodes)


class TestConstraints:
    def test_min_tokens(self, runner: ModelRunner) -> None:
        params = SamplingParams(
            temperature=2,
            allowed_token_ids=[EOS, 30, 31],
            logit_bias={EOS: 2},
            stop_token_ids=[31],
            min_tokens=5,
        )
        drawn = generate(runner, spec(0, params), 40)
        assert drawn[:5] == [30] * 5
        assert set(drawn) == {EOS, 30, 31}

    def test_allowed_token_ids(self, runner: ModelRunner) -> None:
        params = SamplingParams(temperature=2, allowed_token_ids=[3, 30, 200])
        assert set(generate(runner, spec(0, params), 20)) == {3, 30, 200}

    def test_logit_bias(self, runner: ModelRunner) -> None:
        params = SamplingParams(temperature=0, logit_bias={77: 100})
        assert generate(runner, spec(0, params), 3) == [77] * 3

    def test_bad_words(self, runner: ModelRunner) -> None:
        a, b = ids("ab")
        params = SamplingParams(temperature=2, allowed_token_ids=[a, b])
        free = generate(runner, spec(0, params), 40)
        assert (a, b) in pairwise(free)
        bound = generate(runner, spec(1, replace(params, bad_words=["ab", "bbb"])), 40)
        assert (a, b) not in pairwise(bound)
        assert bound.count(b) <= 2

    def test_thinking_token_budget(self, runner: ModelRunner) -> None:
        params = SamplingParams(temperature=0, thinking_token_budget=3, logit_bias={END_THINK: -100})
        drawn = generate(runner, spec(0, params, [*PROMPT, THINK, 9]), 6)
        assert [i for i, token in enumerate(drawn) if token == END_THINK] == [2]

    def test_structured_outputs(self, runner: ModelRunner) -> None:
        grammar = StructuredOutputsParams(regex="[ab]{4}c")
        params = SamplingParams(temperature=2, structured_outputs=grammar)
        siblings = [spec(i, params, index=i) for i in (0, 1)]
        result = runner.execute(join(part(0, PROMPT, draws=[0, 1]), new=siblings))
        drawn = [[token] for token in result.token_ids[0]]
        copies = [(0, 8), (1, 9)]  # the second goes on in blocks of its own
        for length in range(40, 45):
            step = join(*(part(i, drawn[i][-1:], length, [i]) for i in (0, 1)), block_copies=copies)
            copies = []
            for sequence, tokens in zip(drawn, runner.execute(step).token_ids, strict=True):
                sequence += tokens
        texts = [TOKENIZER.decode(sequence[:-1]) for sequence in drawn]
        assert all(re.fullmatch("[ab]{4}c", text) for text in texts)
        assert texts[0] != texts[1]
        assert [sequence[-1] for sequence in drawn] == [EOS, EOS]

    def test_check_refuses_a_grammar(self, runner: ModelRunner) -> None:
        executor = LocalExecutor(runner)
        executor.check(PoolingParams())
        executor.check(SamplingParams(structured_outputs=StructuredOutputsParams(regex="a|b")))
        with pytest.raises(ParamsError, match="regex"):
            executor.check(SamplingParams(structured_outputs=StructuredOutputsParams(regex="(")))


class TestErrors:
    @BACKENDS
    def test_a_damaged_model_is_an_error_and_no_answer(self, backend: str) -> None:
        runner = make_runner(damaged(), backend)
        step = join(
            part(0, PROMPT, draws=[0]), part(1, PROMPT), part(2, PROMPT), part(3, PROMPT, draws=[3]),
            new=[spec(0), spec(1, SamplingParams(prompt_logprobs=1)), spec(2, PoolingParams()),
                 spec(3, SamplingParams(logprobs=2))],
        )  # fmt: skip
        result = runner.execute(step)
        assert result.token_ids == [[-1], [], [], [-1]]
        assert result.errors.keys() == {0, 1, 2, 3}
        assert all("not finite" in error for error in result.errors.values())
        assert not result.embeddings
        assert result.logprobs[3].token_ids[0] == -1

    @BACKENDS
    def test_nothing_left_to_draw(self, backend: str) -> None:
        runner = make_runner(backend=backend)
        alone = generate(runner, spec(0), 2)
        impossible = SamplingParams(allowed_token_ids=[EOS], min_tokens=1)
        step = join(
            part(1, PROMPT, draws=[1]), part(2, PROMPT, draws=[2]), new=[spec(1, impossible), spec(2)]
        )
        result = runner.execute(step)
        assert result.token_ids == [[-1], alone[:1]]
        assert result.errors.keys() == {1}
        assert "allowed_token_ids and min_tokens (1) together forbid every token" in result.errors[1]
        result = runner.execute(part(2, alone[:1], 40, [2]))
        assert result == StepResult([alone[1:]])

    def test_a_closed_model(self, runner: ModelRunner) -> None:
        runner.close()
        for call in (lambda: runner.execute(part(0, [1])), runner.wake):
            with pytest.raises(BackendError, match="closed"):
                call()


class TestLogprobs:
    @BACKENDS
    def test_of_drawn_tokens(self, backend: str) -> None:
        runner = make_runner(backend=backend)
        params = SamplingParams(temperature=2, logprobs=4, logprob_token_ids=[5, 6, 7, 8], top_k=9)
        step = join(
            part(0, PROMPT[:9], draws=[0]), part(1, PROMPT, draws=[1]), new=[spec(0), spec(1, params)]
        )
        result = runner.execute(step)
        expected = log_softmax(runner.executable.logits())[1]
        assert result.logprobs.keys() == {1}
        entry, drawn = result.logprobs[1], result.token_ids[1]
        assert entry.token_ids == [*drawn, 5, 6, 7, 8, *np.argsort(-expected, kind="stable")[:4]]
        np.testing.assert_allclose(entry.logprobs, expected[entry.token_ids], atol=1e-5)
        assert entry.ranks == [1 + int((expected > expected[token]).sum()) for token in entry.token_ids]

    @BACKENDS
    def test_of_the_prompt(self, backend: str) -> None:
        runner = make_runner(backend=backend)
        params = SamplingParams(prompt_logprobs=2, prompt_logprob_token_ids=[9], logprobs=1)
        (whole,) = in_chunks(runner, spec(0, params), [40], draw=True)
        expected = log_softmax(runner.executable.logits())
        entries = whole.prompt_logprobs[0]
        assert len(entries) == 39
        for row, entry in enumerate(entries):
            assert entry.token_ids == [PROMPT[row + 1], 9, *np.argsort(-expected[row], kind="stable")[:2]]
            np.testing.assert_allclose(entry.logprobs, expected[row, entry.token_ids], atol=1e-5)
        assert whole.logprobs[0].token_ids[0] == whole.token_ids[0][0]

    @pytest.mark.parametrize("sizes", [[1] * 40, [33, 7], [5, 30, 4, 1]])
    def test_chunks_change_no_bit(self, sizes: list[int]) -> None:
        runner = make_runner(backend="cpu")
        params = SamplingParams(prompt_logprobs=3)
        (whole,) = in_chunks(runner, spec(0, params), [40], draw=True)
        chunks = in_chunks(runner, spec(1, params), sizes, draw=True)
        joined = [entry for result in chunks for entry in result.prompt_logprobs.get(1, [])]
        assert joined == whole.prompt_logprobs[0]
        assert chunks[-1].token_ids == whole.token_ids

    def test_one_entry_per_position_from_the_first_on(self, runner: ModelRunner) -> None:
        nothing = TokenLogprobs([], [], [])
        params = SamplingParams(prompt_logprob_token_ids=[9], prompt_logprob_start=3)
        first, second = in_chunks(runner, spec(0, params, PROMPT[:8]), [5, 3], draw=True)
        assert first.prompt_logprobs[0][:3] == [nothing] * 3
        assert [entry.token_ids for entry in first.prompt_logprobs[0][3:]] == [[PROMPT[4], 9], [PROMPT[5], 9]]
        assert [entry.token_ids[0] for entry in second.prompt_logprobs[0]] == PROMPT[6:8]

    def test_a_preempted_prompt_reports_only_what_it_had_not(self, runner: ModelRunner) -> None:
        sequence = spec(0, SamplingParams(prompt_logprobs=0), PROMPT[:8])
        runner.execute(join(part(0, PROMPT[:5]), new=[sequence]))
        again = runner.execute(part(0, PROMPT[:8], draws=[0]))
        entries = again.prompt_logprobs[0]
        assert [len(entry.token_ids) for entry in entries] == [0] * 5 + [1] * 2
        tokens = PROMPT[:8] + again.token_ids[0]
        assert not runner.execute(part(0, tokens, draws=[0])).prompt_logprobs


class TestEmbeddings:
    @BACKENDS
    @pytest.mark.parametrize("pooling", ["mean", "last"])
    def test_pool_the_hidden_states(self, backend: str, pooling: Any) -> None:
        runner = make_runner(backend=backend)
        plain = PoolingParams(pooling=pooling, normalize=False)
        step = join(part(0, PROMPT[:7], draws=[0]), part(1, PROMPT), new=[spec(0), spec(1, plain)])
        result = runner.execute(step)
        hidden = runner.executable.hidden()[1:].astype(np.float64)
        assert len(hidden) == {"mean": 40, "last": 1}[pooling]
        np.testing.assert_allclose(result.embeddings[1], hidden.mean(axis=0), rtol=1e-12)
        assert len(result.token_ids[0]) == 1
        assert result.token_ids[1] == []
        (normal,) = in_chunks(runner, spec(2, PoolingParams(pooling=pooling)), [40])
        length = np.linalg.norm(result.embeddings[1])
        np.testing.assert_allclose(normal.embeddings[2], result.embeddings[1] / length, atol=1e-5)
        assert normal.token_ids == [[]]

    @pytest.mark.parametrize("pooling", ["mean", "last"])
    @pytest.mark.parametrize("sizes", [[1] * 40, [33, 7]])
    def test_chunks_change_no_bit(self, pooling: Any, sizes: list[int]) -> None:
        runner = make_runner(backend="cpu")
        params = PoolingParams(pooling=pooling)
        (whole,) = in_chunks(runner, spec(0, params), [40])
        *others, last = in_chunks(runner, spec(1, params), sizes)
        assert not any(result.embeddings for result in others)
        assert last.embeddings[1] == whole.embeddings[0]

    def test_a_preempted_prompt_is_pooled_once(self, runner: ModelRunner) -> None:
        params = PoolingParams()
        (whole,) = in_chunks(runner, spec(0, params), [40])
        runner.execute(join(part(1, PROMPT[:25]), new=[spec(1, params)]))
        again = runner.execute(part(1, PROMPT))
        np.testing.assert_allclose(again.embeddings[1], whole.embeddings[0], rtol=1e-5, atol=1e-7)


class TestSleep:
    def test_wakes_as_it_was(self, runner: ModelRunner) -> None:
        expected = generate(runner, spec(0), 3)
        executor = LocalExecutor(runner)
        executor.sleep()
        with pytest.raises(BackendError, match="asleep"):
            executor.execute(part(1, [1]))
        executor.wake()
        executor.wake()  # of one that is awake changes nothing
        assert generate(runner, spec(0), 3) == expected

    def test_without_room_it_sleeps_on(self, runner: ModelRunner, monkeypatch: pytest.MonkeyPatch) -> None:
        runner.sleep()
        with monkeypatch.context() as patch:
            patch.setattr(model_runner, "free_memory", lambda: 1000)
            with pytest.raises(InsufficientMemoryError, match="cannot wake"):
                runner.wake()
        runner.wake()
        assert generate(runner, spec(0), 1)

    def test_memory_really_falls(self) -> None:
        model = tiny_llama(hidden=512, intermediate=1024, vocab=16384, context=4096)
        runner = make_runner(model, "cpu", max_num_seqs=8)
        generate(runner, spec(0), 1)
        awake = resident_bytes()
        runner.sleep()
        asleep = resident_bytes()
        assert awake - asleep > 0.9 * runner.plan.weight_bytes
        runner.wake()
        assert resident_bytes() - asleep > 0.9 * runner.plan.weight_bytes


def resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@BACKENDS
def test_step_cost_counts_weights_as_packed(backend: str) -> None:
    model = tiny_llama(format=Q4_1)
    runner = make_runner(model, backend, kv_dtype="f32")
    found = LocalExecutor(runner).step_cost
    packed = weight_bytes(runner.graph, runner.backend)
    assert found.step_bytes == sum(packed.values())
    assert found.position_bytes == 2 * 2 * 32 * 4  # layers, keys and values, features, bytes
    assert found.draw_macs == 64 * 160


@pytest.mark.parametrize("threads", [1, 16])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_planned_is_what_the_program_takes(tied: bool, threads: int) -> None:
    formats: Any = {"q_proj": Q4_0, "v_proj": Q8_0, "lm_head": Q8_0, "down_proj": F16}
    model = tiny_llama(tied=tied, format=Q4_1, formats=formats, vocab=130, intermediate=416, head_dim=40)
    graph, backend = fuse(model.graph()), CpuBackend()
    options, limits = CompileOptions(threads=threads), Limits(500, 8, 256, 8)
    program = backend.compile(graph, model.weights, options, limits).program
    assert sum(weight_bytes(graph, backend).values()) == program.weight_bytes
    planned = backend.workspace_bytes(graph, options, limits)
    assert program.workspace_bytes <= 1.01 * planned  # sizes are rounded here and there
    assert planned <= 1.1 * program.workspace_bytes


def test_weight_bytes_of_the_reference_are_float32() -> None:
    model = tiny_llama(format=Q4_1, vocab=130)
    sizes = weight_bytes(model.graph(), make_backend("reference"))
    assert sizes["model.embed_tokens.weight"] == 130 * 64 * 4
    assert sizes["model.norm.weight"] == 64 * 4


def test_kv_block_bytes() -> None:
    graph = tiny_llama(layers=3, kv_heads=2, head_dim=40, heads=4).graph()
    assert CpuBackend().kv_block_bytes(graph, "f16") == 3 * 2 * 2 * 32 * 64 * 2  # heads padded to 64
    assert CpuBackend().kv_block_bytes(graph, "q8") == 3 * 2 * 2 * 32 * (64 + 4)
    assert ReferenceBackend().kv_block_bytes(graph, "q8") == 3 * 2 * 2 * 32 * (40 + 4)
    assert CpuBackend().kv_block_bytes(fuse(graph), "f32") == 3 * 2 * 2 * 32 * 64 * 4
    assert ReferenceBackend().kv_block_bytes(graph, "f32") == 3 * 2 * 2 * 32 * 40 * 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_prefault_takes_the_planned_memory_at_once() -> None:
    before = resident()
    pool = 96 * 2**20
    lazy = make_runner(backend="cpu", kv_cache_gib=pool / 2**30)
    assert resident() - before < pool / 2
    after_lazy = resident()
    runner = make_runner(backend="cpu", kv_cache_gib=pool / 2**30, max_num_batched_tokens=4096, prefault=True)
    held = resident()
    assert held - after_lazy >= 0.98 * (runner.plan.kv_bytes + runner.plan.workspace_bytes)
    generate(runner, spec(0), 20)
    assert resident() - held < 4 * 2**20  # what steps touch of it is there already
    lazy.close()
    runner.close()
    assert resident() < held - 0.9 * pool


def resident() -> int:
    """Bytes of anonymous memory this process has in RAM."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]
