"""LLM on a tiny random model: prompts in every form, order, refusals, interruption, streams."""

from __future__ import annotations

import gc
import inspect
import io
import itertools
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.gguf_writer import llama, write
from tests.tiny_models import tiny_llama

from hexad import LLM, SamplingParams
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.store import DEFAULT_MODEL
from hexad.engine.request import Request
from hexad.engine.step import ScheduledStep, StepResult
from hexad.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    HexadError,
    InsufficientMemoryError,
    ModelNotFoundError,
    ParamsError,
    PromptError,
    TokenizerError,
    UnsupportedError,
)
from hexad.outputs import RequestOutput

GREEDY = SamplingParams(temperature=0, max_tokens=6)
VOCAB = 160


class ByteStream:
    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


class ByteTokenizer:
    """A token is a character."""

    vocab_size = VOCAB
    eos_ids = frozenset({VOCAB - 1})

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def stream(self) -> ByteStream:
        return ByteStream()


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """LLM("tiny") opens a fresh checkpoint of a tiny model; all those opened are listed."""
    opened: list[Checkpoint] = []

    def open_checkpoint(path: Path) -> Checkpoint:
        model = tiny_llama(vocab=VOCAB, context=256)
        tokenizer: Any = ByteTokenizer()
        opened.append(Checkpoint(path, model.config, model.weights, lambda: tokenizer, lambda: None))
        return opened[-1]

    monkeypatch.setattr("hexad.checkpoint.store.resolve", Path)
    monkeypatch.setattr("hexad.checkpoint.open.open_checkpoint", open_checkpoint)
    return opened


@pytest.fixture
def llm(checkpoints: list[Checkpoint]) -> Iterator[LLM]:
    with LLM("tiny", backend="reference", max_num_seqs=4, max_num_batched_tokens=48, seed=0) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.scheduler.blocks.num_allocated == 0


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


def test_default_params_are_those_of_sampling_params(llm: LLM) -> None:
    (output,) = llm.generate("abc")
    completion = output.outputs[0]
    assert len(completion.token_ids) == 16 or completion.finish_reason == "stop"


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
        ([1, -1], "Token id -1"),
        ("x" * 256, "has 256 tokens; with a context of 256"),
        (17, "not int 17"),
        (None, "not NoneType None"),
        (b"abc", "not bytes"),
        ({"text": "abc"}, r"'prompt_token_ids' or both, not \['text'\]"),
        ({}, r"not \[\]"),
        ({"prompt": 5}, "'prompt' must be a str, not int 5"),
        ({"prompt_token_ids": "abc"}, "not str 'abc'"),
        ([1, 2.5], r"not list \[1, 2\.5\]"),
        ([1, True], "not list"),
        ([1, "a"], "not list"),
        ([[1], 3], "not int 3"),
    ],
)
def test_a_bad_prompt_refuses_the_call_before_anything_runs(
    llm: LLM, bad: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", lambda: pytest.fail("a step ran"))
        with pytest.raises(PromptError, match=message):
            llm.generate(bad, GREEDY)
        if isinstance(bad, list):
            return
        with pytest.raises(PromptError, match=message) as caught:
            llm.generate(["good", bad, "good"], GREEDY)
        assert caught.value.__notes__ == ["It is prompt 1 of the 3 given, counted from 0."]
        with pytest.raises(PromptError, match=message):
            next(llm.stream(bad, GREEDY))
        assert not llm.engine.has_unfinished
    assert len(texts(llm, "good")[0]) == 6


def test_bad_params(llm: LLM) -> None:
    with pytest.raises(ParamsError, match="1 sampling_params for 2 prompts"):
        llm.generate(["a", "b"], [GREEDY])
    with pytest.raises(ParamsError, match="not dict"):
        llm.generate("a", {"temperature": 0})  # type: ignore[arg-type]
    with pytest.raises(ParamsError, match="not list"):
        llm.generate(["a", "b"], [GREEDY, None])  # type: ignore[list-item]


def interrupt_at(llm: LLM, step_number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    execute, steps = llm.engine.executor.execute, itertools.count()

    def failing(step: ScheduledStep) -> StepResult:
        if next(steps) == step_number:
            raise error
        return execute(step)

    patch.setattr(llm.engine.executor, "execute", failing)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BackendError("lost")])
def test_interrupted_generate_frees_everything(
    llm: LLM, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = texts(llm, "abc")
    with monkeypatch.context() as patch:
        interrupt_at(llm, 3, error, patch)
        with pytest.raises(type(error)):
            llm.generate(["a" * 40, "b", "c" * 100, "d", "e", "f"], GREEDY)
    assert not llm.engine.has_unfinished
    assert llm.engine.scheduler.blocks.num_allocated == 0
    assert texts(llm, "abc") == expected


def test_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (expected,) = llm.generate("abc", GREEDY)
    outputs = list(llm.stream("abc", GREEDY))
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2, 3, 4, 5, 6]
    assert [o.finished for o in outputs] == [False] * 5 + [True]
    for earlier, later in itertools.pairwise(outputs):
        assert later.outputs[0].text.startswith(earlier.outputs[0].text)
    assert outputs[-1].outputs == expected.outputs


def test_outputs_are_made_when_they_are_wanted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """By generate once for each request, by stream at each of its own steps, however many run beside it."""
    made, output = [], Request.output

    def counted(request: Request) -> RequestOutput:
        made.append(request.request_id)
        return output(request)

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
    assert llm.engine.scheduler.blocks.num_allocated == 2
    stream.close()  # type: ignore[attr-defined]
    assert llm.engine.scheduler.blocks.num_allocated == 0
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
    with pytest.raises(BackendError, match="closed"):
        llm.generate("abc")
    with pytest.raises(BackendError, match="closed"):
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


def test_plan_and_config(checkpoints: list[Checkpoint]) -> None:
    with LLM("tiny", backend="reference", max_model_len=100, max_num_seqs=3, kv_dtype="f32") as llm:
        assert llm.config.max_model_len == 100
        assert llm.plan.max_model_len == 100
        assert llm.plan.kv_blocks == 3 * 4
        # 2 layers × K and V × 2 heads × 32 tokens × 16 features × 4 bytes
        assert llm.plan.kv_bytes == 12 * 2 * 2 * 2 * 32 * 16 * 4
        stored = checkpoints[0].weights.values()
        assert llm.plan.weight_bytes == sum(w.nbytes for w in stored)
        assert "KV cache" in str(llm.plan)
        with pytest.raises(PromptError, match="context of 100"):
            llm.generate("x" * 100)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": "tpu"}, ConfigError, "no backend 'tpu'; there are 'cpu' and 'reference'"),
        ({"max_model_len": 257}, ConfigError, "257 .* 256"),
        ({"kv_cache_gib": 1e-6}, ConfigError, "kv_cache_gib"),
        ({"kv_cache_gib": 1e9}, InsufficientMemoryError, "does not fit"),
    ],
)
def test_refused_before_loading(
    checkpoints: list[Checkpoint],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    error: type[HexadError],
    message: str,
) -> None:
    monkeypatch.setattr(
        "hexad.backends.reference.ReferenceBackend.compile", lambda *_: pytest.fail("the model was loaded")
    )
    with pytest.raises(error, match=message):
        LLM("tiny", **{"backend": "reference", **settings})
    assert checkpoints[0].weights == {}, "the checkpoint was not closed"


@pytest.mark.parametrize(
    ("kind", "error"), [("llama", UnsupportedError), (None, TokenizerError), (3, TokenizerError)]
)
def test_a_tokenizer_of_an_unknown_kind_is_refused_before_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, error: type[HexadError]
) -> None:
    path = tmp_path / "sentencepiece.gguf"
    path.write_bytes(write(*llama(tokenizer__ggml__model=kind)))
    monkeypatch.setattr("hexad.runner.model_runner.ModelRunner", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(error, match=r"sentencepiece\.gguf.*tokenizer"):
        LLM(path)


@pytest.mark.parametrize("tokens", [VOCAB - 9, VOCAB, VOCAB + 1])
def test_a_tokenizer_may_be_smaller_than_the_vocabulary_but_not_larger(
    checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(ByteTokenizer, "vocab_size", tokens)
    if tokens <= VOCAB:
        LLM("tiny", backend="reference").close()
        return
    with pytest.raises(CheckpointError, match=f"tiny: its tokenizer has {tokens} tokens.* for {VOCAB} only"):
        LLM("tiny", backend="reference")
    assert checkpoints[0].weights == {}, "the checkpoint was not closed"


def test_weights_that_do_not_fit(checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hexad.runner.model_runner.free_memory", lambda: 200_000)
    with pytest.raises(InsufficientMemoryError, match=r"weights .* free"):
        LLM("tiny", backend="reference")


def test_unknown_setting(checkpoints: list[Checkpoint]) -> None:
    with pytest.raises(ConfigError, match=r"no setting 'gpu_memory_utilization'; .*max_model_len"):
        LLM("tiny", gpu_memory_utilization=0.9)
    assert checkpoints == []


def test_the_default_model_is_the_stores() -> None:
    assert inspect.signature(LLM).parameters["model"].default == DEFAULT_MODEL


def test_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"nothing\.gguf"):
        LLM(str(tmp_path / "nothing.gguf"))
    with pytest.raises(ModelNotFoundError, match=r"nothing\.gguf"):
        LLM(tmp_path / "nothing.gguf")
    model: Any
    for model in (None, 5, "x" * 5000, "~nosuch/x.gguf"):
        with pytest.raises(ModelNotFoundError):
            LLM(model)


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
    assert "tok/s" in shown["terminal"]
    assert shown["turned off"] == shown["file"] == ""


def test_smollm2_knows_paris(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path), backend="reference", max_model_len=128, max_num_seqs=2) as llm:
        params = SamplingParams(temperature=0, max_tokens=2)
        france, hot = llm.generate(["The capital of France is", "The opposite of hot is"], params)
        assert "Paris" in france.outputs[0].text
        assert "cold" in hot.outputs[0].text
