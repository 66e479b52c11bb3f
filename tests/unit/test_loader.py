"""What LLM and AsyncLLM begin with: settings, memory, tokenizer, default parameters."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.character_tokenizer import VOCAB, CharacterTokenizer
from tests.gguf_writer import llama, write

import hexad.checkpoint.open
from hexad import LLM, SamplingParams
from hexad.checkpoint.checkpoint import Checkpoint
from hexad.checkpoint.store import DEFAULT_MODEL
from hexad.config import EngineConfig
from hexad.errors import (
    CheckpointError,
    ConfigError,
    HexadError,
    InsufficientMemoryError,
    ModelNotFoundError,
    PromptError,
    TokenizerError,
    UnsupportedError,
)
from hexad.loader import engine_config


def test_default_params_are_the_checkpoints_where_it_has_any(
    checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM("tiny", backend="reference") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        assert len(llm.generate("abc")[0].outputs[0].token_ids) <= 16
    recommended = {"temperature": 0.0, "max_tokens": 3}
    plain = hexad.checkpoint.open.open_checkpoint
    monkeypatch.setattr(
        "hexad.checkpoint.open.open_checkpoint",
        lambda path: replace(plain(path), generation_defaults=recommended),
    )
    with LLM("tiny", backend="reference") as llm:
        assert llm.get_default_sampling_params() == SamplingParams(**recommended)
        (output,) = llm.generate("abc")
        assert output.outputs == llm.generate("abc", SamplingParams(**recommended))[0].outputs
        assert len(output.outputs[0].token_ids) == 3
        assert next(llm.stream("abc")).outputs[0].token_ids == output.outputs[0].token_ids[:1]
    with LLM("tiny", backend="reference", generation_config="vllm") as llm:
        assert llm.get_default_sampling_params() == SamplingParams()


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
    ("kind", "error"), [("rwkv", UnsupportedError), (None, TokenizerError), (3, TokenizerError)]
)
def test_a_tokenizer_of_an_unknown_kind_is_refused_before_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, error: type[HexadError]
) -> None:
    path = tmp_path / "rwkv.gguf"
    path.write_bytes(write(*llama(tokenizer__ggml__model=kind)))
    monkeypatch.setattr("hexad.runner.model_runner.ModelRunner", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(error, match=r"rwkv\.gguf.*tokenizer"):
        LLM(path)


@pytest.mark.parametrize("tokens", [VOCAB - 9, VOCAB, VOCAB + 1])
def test_a_tokenizer_may_be_smaller_than_the_vocabulary_but_not_larger(
    checkpoints: list[Checkpoint], monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    monkeypatch.setattr(CharacterTokenizer, "vocab_size", tokens)
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
    with pytest.raises(ConfigError, match=r"no setting 'max_length'; .*max_model_len"):
        LLM("tiny", max_length=9)
    assert checkpoints == []


def test_a_vllm_script_need_not_drop_arguments_that_ask_for_nothing(checkpoints: list[Checkpoint]) -> None:
    idle: dict[str, Any] = {
        "tensor_parallel_size": 1,
        "dtype": "auto",
        "gpu_memory_utilization": 0.9,
        "enforce_eager": True,
        "trust_remote_code": True,
        "swap_space": 4,
        "tokenizer": None,
        "quantization": None,
        "enable_chunked_prefill": True,
        "block_size": 32,
        "generation_config": "vllm",
    }
    with LLM("tiny", backend="reference", max_model_len=64, kv_cache_memory_bytes=2**20, **idle) as llm:
        assert llm.config == EngineConfig(max_model_len=64, kv_cache_gib=2**-10)
        assert llm.plan.kv_bytes <= 2**20 < llm.plan.kv_bytes * (llm.plan.kv_blocks + 1) / llm.plan.kv_blocks


@pytest.mark.parametrize(
    ("settings", "resolved"),
    [
        ({"kv_cache_dtype": "auto"}, "f16"),
        ({"kv_cache_dtype": "auto", "kv_dtype": "q8"}, "q8"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "q8"),
        ({"kv_cache_dtype": "int8_per_token_head", "kv_dtype": "q8"}, "q8"),
    ],
)
def test_kv_cache_dtype(settings: dict[str, Any], resolved: str) -> None:
    assert engine_config(settings).resolved_kv_dtype == resolved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tensor_parallel_size": 2}, r"tensor_parallel_size=2 asks for something .* or give 1\."),
        ({"dtype": "bfloat16"}, "dtype='bfloat16' .* give 'auto' or 'float' or 'float32'"),
        ({"tokenizer": "other/model"}, "tokenizer='other/model'"),
        ({"block_size": 16}, "block_size=16"),
        ({"enable_chunked_prefill": False}, "enable_chunked_prefill=False"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes must be a positive integer, not 0"),
        ({"kv_cache_memory_bytes": 2**30, "kv_cache_gib": 1}, "two ways to say one thing"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype='fp8' .* give 'auto' or 'int8_per_token_head'"),
        ({"kv_cache_dtype": "int8_per_token_head", "kv_dtype": "f16"}, "two ways to say one thing"),
        ({"generation_config": "./folder"}, r"generation_config must be 'auto' or 'vllm', not '\./folder'"),
    ],
)
def test_arguments_that_ask_for_what_hexad_does_not_do(
    checkpoints: list[Checkpoint], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("tiny", **settings)
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
