"""LLM.generate and LLM.stream on a tiny random model: order, refusals, interruptions, progress."""

from __future__ import annotations

import gc
import io
import itertools
import os
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
from tests.character_tokenizer import VOCAB

from hexad import LLM, BeamSearchParams, RequestOutputKind, SamplingParams
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.engine.request import Request
from hexad.engine.step import ScheduledStep, StepResult
from hexad.errors import (
    BackendError,
    EngineError,
    ParamsError,
    PromptError,
)
from hexad.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6)


def texts(llm: LLM, prompts: Any, params: Any = GREEDY) -> list[str]:
    return [o.outputs[0].text for o in llm.generate(prompts, params, use_tqdm=False)]


def test_every_form_of_a_prompt_is_the_same_prompt(llm: LLM) -> None:
    (expected,) = texts(llm, "abc")
    assert len(expected) == 6
    forms = [[97, 98, 99], (97, 98, 99), {"prompt": "abc"}, {"prompt_token_ids": [97, 98, 99]}]
    for form in forms:
        assert texts(llm, form) == [expected]
    assert texts(llm, ["abc", *forms]) == [expected] * 5
    (output,) = llm.generate({"prompt": "shown", "prompt_token_ids": [97, 98, 99]}, GREEDY)
    assert (output.prompt, output.prompt_token_ids, output.outputs[0].text) == (
        "shown",
        [97, 98, 99],
        expected,
    )


def test_outputs_are_in_the_order_of_the_prompts_and_as_if_alone(llm: LLM) -> None:
    prompts = [chr(97 + i) * length for i, length in enumerate((70, 1, 33, 5, 64, 2, 40))]
    params = [
        SamplingParams(temperature=t, max_tokens=n, seed=5)
        for t, n in zip((0, 1, 0.5, 0, 2, 1, 0), (3, 40, 20, 1, 7, 33, 9), strict=True)
    ]
    together = llm.generate(prompts, params)
    assert [o.prompt for o in together] == prompts
    for prompt, param, output in zip(prompts, params, together, strict=True):
        (alone,) = llm.generate(prompt, param)
        assert alone.outputs == output.outputs
        assert output.finished
        assert len(output.outputs[0].token_ids) <= (param.max_tokens or 0)


def test_priorities_say_who_goes_first(checkpoints: list[Checkpoint]) -> None:
    settings: dict[str, Any] = {"backend": "reference", "max_num_seqs": 1, "scheduling_policy": "priority"}
    with LLM("tiny", **settings) as llm:
        outputs = llm.generate(["a", "b", "c"], GREEDY, priority=[2, 0, 1])
        times = [output.metrics.first_scheduled_time for output in outputs if output.metrics]
        assert times[1] < times[2] < times[0]  # type: ignore[operator]
        assert [output.prompt for output in outputs] == ["a", "b", "c"]


def test_unseeded_requests_follow_the_seed_of_the_engine(checkpoints: list[Checkpoint]) -> None:
    params = SamplingParams(max_tokens=12, temperature=2)

    def both(seed: int) -> list[str]:
        with LLM("tiny", backend="reference", seed=seed) as llm:
            return texts(llm, ["abc", "abc"], params)

    first = both(1)
    assert first[0] != first[1]
    assert both(1) == first
    assert both(2) != first


def test_no_prompts_no_outputs(llm: LLM) -> None:
    assert llm.generate([]) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ([1, VOCAB], f"Token id {VOCAB} at position 1"),
        ("x" * 256, "has 256 tokens; with a context of 256"),
        (None, "not NoneType None"),
        ({"text": "abc"}, r"not \['text'\]"),
    ],
)
def test_a_bad_prompt_refuses_the_call_before_anything_runs(
    llm: LLM, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beams = BeamSearchParams(beam_width=2, max_tokens=4)
    calls: list[Any] = [
        lambda prompts: llm.generate(prompts, GREEDY),
        lambda prompts: llm.beam_search(prompts, beams),
    ]
    if not isinstance(bad, str) or len(bad) < 256:  # which has room where nothing is generated
        calls += [llm.embed, llm.score]
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
        for call in calls:
            with pytest.raises(PromptError, match=message) as caught:
                call(bad)
            assert not hasattr(caught.value, "__notes__")
            with pytest.raises(PromptError, match=message) as caught:
                call(["good", bad, "good"])
            assert caught.value.__notes__ == ["It is prompt 1 of the 3 given, counted from 0."]
        with pytest.raises(PromptError, match=message):
            next(llm.stream(bad, GREEDY))
        assert not llm.engine.has_unfinished
    assert len(texts(llm, "good")[0]) == 6


def test_bad_params(llm: LLM) -> None:
    calls: Any = llm
    with pytest.raises(ParamsError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ParamsError, match=r"must be a SamplingParams or a list of them, not dict"):
        calls.generate("a", {"temperature": 0})
    with pytest.raises(ParamsError, match="not list"):
        calls.generate(["a", "b"], [GREEDY, None])
    with pytest.raises(ParamsError, match="not SamplingParams"):
        calls.embed("a", pooling_params=GREEDY)
    with pytest.raises(ParamsError, match="must be a BeamSearchParams or a list of them, not NoneType None"):
        calls.beam_search("a", None)
    for priority in ([1], [1, "high"], 0.5):
        with pytest.raises(ParamsError, match="priority must be an int, or 2 of them"):
            calls.generate(["a", "b"], GREEDY, priority=priority)
    # What only the engine can refuse says which prompt it belongs to.
    with pytest.raises(ParamsError) as caught:
        llm.generate(["a", "b"], [GREEDY, SamplingParams(allowed_token_ids=[VOCAB])])
    assert caught.value.__notes__ == ["It is prompt 1 of the 2 given, counted from 0."]


def interrupt_at(llm: LLM, step_number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    execute, steps = llm.engine.executor.execute, itertools.count()

    def failing(step: ScheduledStep) -> StepResult:
        if next(steps) == step_number:
            raise error
        return execute(step)

    patch.setattr(llm.engine.executor, "execute", failing)


@pytest.mark.parametrize("step", [0, 3])
def test_interrupted_calls_free_everything(llm: LLM, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = texts(llm, "abc")
    with monkeypatch.context() as patch:
        interrupt_at(llm, step, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(["a" * 40, "b", "c" * 100, "d", "e", "f"], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.engine.blocks.num_allocated == 0
    assert texts(llm, "abc") == expected


def test_ctrl_c_waits_for_the_end_of_a_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    execute, ended = llm.engine.executor.execute, []

    def pressed(step: ScheduledStep) -> StepResult:
        os.kill(os.getpid(), signal.SIGINT)
        ended.append(execute(step))
        return ended[-1]

    monkeypatch.setattr(llm.engine.executor, "execute", pressed)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["abc", "xyz"], GREEDY)
    assert len(ended) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    # Neither another's handler nor another thread is interfered with.
    heard: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    try:
        outputs = llm.generate("abc", GREEDY)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert heard == [signal.SIGINT] * len(outputs[0].outputs[0].token_ids)
    monkeypatch.undo()
    thread = threading.Thread(target=lambda: outputs.extend(llm.generate("abc", GREEDY)))
    thread.start()
    thread.join()
    assert outputs[1].outputs == outputs[0].outputs


def test_a_step_that_fails_ends_its_requests_and_no_others(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    (expected,) = texts(llm, "abc")
    with monkeypatch.context() as patch:
        interrupt_at(llm, 2, BackendError("lost"), patch)
        failed, waited = llm.generate(["a" * 20, "x" * 200], [GREEDY, GREEDY])[0], "abc"
    completion = failed.outputs[0]
    assert completion.finish_reason == "error"
    assert "lost" in (completion.error or "")
    assert len(completion.token_ids) == 2
    assert texts(llm, waited) == [expected]
    calls: list[Any] = [
        llm.embed,
        llm.score,
        lambda p: llm.beam_search(p, BeamSearchParams(beam_width=2, max_tokens=3)),
    ]
    for call in calls:
        with monkeypatch.context() as patch:
            interrupt_at(llm, 0, BackendError("lost"), patch)
            with pytest.raises(BackendError, match="lost"):
                call("abc")
    assert texts(llm, "abc") == [expected]


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (expected,) = llm.generate("abc", GREEDY)
    outputs = list(llm.stream("abc", GREEDY))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6]
    assert [o.finished for o in outputs] == [False] * 5 + [True]
    for earlier, later in itertools.pairwise(outputs):
        assert later.outputs[0].text.startswith(earlier.outputs[0].text)
    assert outputs[-1].outputs == expected.outputs


def test_streams_hold_what_output_kind_says(llm: LLM) -> None:
    def stream(kind: RequestOutputKind, **more: Any) -> list[RequestOutput]:
        params = SamplingParams(
            max_tokens=9, temperature=1, seed=3, output_kind=kind, ignore_eos=True, **more
        )
        return list(llm.stream("abc", params))

    whole = stream(RequestOutputKind.CUMULATIVE)[-1]
    deltas = stream(RequestOutputKind.DELTA, logprobs=1)
    (final,) = stream(RequestOutputKind.FINAL_ONLY)
    assert final.outputs == whole.outputs
    assert [len(o.outputs[0].token_ids) for o in deltas] == [1] * 9
    assert [len(o.outputs[0].logprobs or ()) for o in deltas] == [1] * 9
    assert [t for o in deltas for t in o.outputs[0].token_ids] == whole.outputs[0].token_ids
    assert "".join(o.outputs[0].text for o in deltas) == whole.outputs[0].text
    assert [o.finished for o in deltas] == [False] * 8 + [True]


def test_a_stream_of_several_continuations_gives_each_whole(llm: LLM) -> None:
    params = SamplingParams(n=3, max_tokens=7, seed=1, temperature=2)
    (whole,) = llm.generate("abc", params)
    assert len({tuple(completion.token_ids) for completion in whole.outputs}) == 3
    *_, last = llm.stream("abc", params)
    assert last.outputs == whole.outputs
    collected = dict.fromkeys(range(3), "")
    delta = SamplingParams(n=3, max_tokens=7, seed=1, temperature=2, output_kind=RequestOutputKind.DELTA)
    for output in llm.stream("abc", delta):
        for completion in output.outputs:
            collected[completion.index] += completion.text
    assert list(collected.values()) == [completion.text for completion in whole.outputs]


def test_outputs_are_made_when_they_are_wanted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By generate once for each request, by stream at each of its own steps, however many run beside it."""
    made, output = [], Request.output

    def counted(request: Request, delta: bool = False) -> RequestOutput:
        made.append(request.request_id)
        return output(request, delta)

    monkeypatch.setattr(Request, "output", counted)
    stream = llm.stream("abc", SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    first = next(stream)
    assert made == [first.request_id]
    outputs = llm.generate(["abc", "xyz"], GREEDY)
    assert made[1:] == [o.request_id for o in outputs]
    seen = list(stream)  # what came while it was not looked at comes at once
    assert len(seen[0].outputs[0].token_ids) > 2
    assert made[3:] == [first.request_id] * len(seen)


def test_closing_a_stream_aborts_it(llm: LLM) -> None:
    stream = llm.stream("a" * 40, SamplingParams(max_tokens=None, ignore_eos=True))
    next(stream)
    assert llm.engine.blocks.num_allocated == 2
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.blocks.num_allocated == 0
    assert not llm.engine.has_unfinished


def test_streams_and_generate_do_not_disturb_each_other(llm: LLM) -> None:
    alone = {prompt: list(llm.stream(prompt, GREEDY))[-1].outputs for prompt in ("abc", "xyz")}
    first, second = llm.stream("abc", GREEDY), llm.stream("xyz", GREEDY)
    next(first), next(second)
    assert texts(llm, ["abc", "xyz"]) == [alone["abc"][0].text, alone["xyz"][0].text]
    assert list(first)[-1].outputs == alone["abc"]
    assert list(second)[-1].outputs == alone["xyz"]


def test_close(checkpoints: list[Checkpoint]) -> None:
    llm = LLM("tiny", backend="reference")
    stream = llm.stream("abc", GREEDY)
    next(stream)
    llm.close()
    llm.close()
    assert not llm.engine.has_unfinished
    assert checkpoints[0].weights == {}
    with pytest.raises(EngineError, match="closed"):
        llm.generate("abc")
    with pytest.raises(EngineError, match="closed"):
        next(stream)
    assert not llm.engine.has_unfinished


def test_close_lets_go_of_the_weights(checkpoints: list[Checkpoint]) -> None:
    llm = LLM("tiny", backend="reference")
    llm.generate("abc", GREEDY)
    weights = checkpoints[0].weights.values()
    arrays = [weakref.ref(array) for weight in weights for array in weight.arrays.values()]
    del weights
    llm.close()
    gc.collect()
    assert [array() for array in arrays] == [None] * len(arrays)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals_and_can_be_turned_off(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = {}
    for name, stderr, use_tqdm in (
        ("terminal", Terminal(), True),
        ("turned off", Terminal(), False),
        ("file", io.StringIO(), True),
    ):
        with monkeypatch.context() as patch:
            patch.setenv("TERM", "xterm")
            patch.setattr(sys, "stderr", stderr)
            llm.generate(["abc", "xyz"], GREEDY, use_tqdm=use_tqdm)
        shown[name] = stderr.getvalue()
    assert "2/2" in shown["terminal"]
    assert "in 0 tok/s, out 0 tok/s" in shown["terminal"]  # at first, and in the end what it came to
    assert shown["terminal"].rindex("tok/s") > shown["terminal"].rindex("out 0 tok/s") + len("out 0 tok/s")
    assert shown["turned off"] == shown["file"] == ""


def test_smollm2_knows_paris(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), backend="reference", max_model_len=128, max_num_seqs=2) as llm:
        params = SamplingParams(temperature=0, max_tokens=2)
        france, hot = llm.generate(["The capital of France is", "The opposite of hot is"], params)
        assert "Paris" in france.outputs[0].text
        assert "cold" in hot.outputs[0].text
