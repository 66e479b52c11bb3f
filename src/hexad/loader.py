"""From a model's name and settings to an engine ready to run: what LLM and AsyncLLM begin with."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from hexad.checks import check_integer, shown
from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.engine.engine import Engine
from hexad.errors import CheckpointError, ConfigError
from hexad.params import SamplingParams

if TYPE_CHECKING:
    from hexad.checkpoint.checkpoint import Checkpoint
    from hexad.checkpoint.tokenizer import Tokenizer
    from hexad.placement.plan import Plan
    from hexad.runner.model_runner import ModelRunner

# vLLM's LLM(...) arguments that need nothing done here, so that a script need not drop them, and the values
# for which that is so: they describe what hexad does anyway. None: any value, for the argument is about what
# hexad has not got (GPU memory, CUDA graphs) or about reports.
_NOTHING_TO_DO: Mapping[str, tuple[object, ...] | None] = {
    "async_scheduling": None,
    "block_size": (None, BLOCK_TOKENS),
    "chat_template": (None,),
    "compilation_config": None,
    "cpu_offload_gb": (0,),
    "data_parallel_size": (1,),
    "disable_custom_all_reduce": None,
    "disable_log_stats": None,
    "distributed_executor_backend": (None, "uni"),
    "dtype": ("auto", "float", "float32"),
    "enable_chunked_prefill": (None, True),
    "enable_lora": (False,),
    "enable_sleep_mode": (True, False),
    "enforce_eager": None,
    "gpu_memory_utilization": None,
    "hf_overrides": (None, {}),
    "kv_cache_dtype": ("auto", "int8_per_token_head"),
    "limit_mm_per_prompt": None,
    "load_format": ("auto", "gguf", "safetensors"),
    "logits_processors": (None,),
    "logprobs_mode": ("raw_logprobs",),
    "pipeline_parallel_size": (1,),
    "quantization": (None, "gguf"),
    "revision": (None,),
    "runner": ("auto", "generate", "pooling"),
    "skip_tokenizer_init": (False,),
    "speculative_config": (None,),
    "swap_space": None,
    "task": (None, "auto", "generate", "embed"),
    "tensor_parallel_size": (1,),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "tokenizer_revision": (None,),
    "trust_remote_code": None,
}


@dataclass(slots=True, eq=False)
class Loaded:
    """An open model and the engine that runs it; `close` it.

    default_params: of a request that brings none. seconds: what loading took: "open" (finding and reading the
    header), "plan" (graph, memory, buffers), "weights" (packing), "tokenizer" (made meanwhile: what it took
    longer).
    """

    config: EngineConfig
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    runner: ModelRunner
    engine: Engine
    default_params: SamplingParams
    seconds: Mapping[str, float]

    @property
    def plan(self) -> Plan:
        """How much memory each part was given."""
        return self.runner.plan

    def close(self) -> None:
        """Aborts what runs and frees the model. It can be called twice."""
        for request_id in list(self.engine.requests):
            self.engine.abort(request_id)
        self.runner.close()
        self.checkpoint.close()


class _Laps:
    """seconds: between the ends of phases that follow each other, by their names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def load(
    model: str | os.PathLike[str], backend: str, config: EngineConfig, *, generation_config: str = "auto"
) -> Loaded:
    """Opens a model and makes its engine.

    model: a path, "hf:owner/repo[:file]" or an alias; see `hexad.checkpoint.store`. backend: "cpu" or
    "reference". generation_config: where the parameters of a request that brings none are from; "auto": what
    the checkpoint recommends, "vllm": the defaults of SamplingParams.

    Raises ConfigError, ModelNotFoundError, CheckpointError, and before loading anything
    InsufficientMemoryError.
    """
    from hexad import _native
    from hexad.checkpoint.open import open_checkpoint
    from hexad.checkpoint.store import resolve
    from hexad.runner.executor import LocalExecutor
    from hexad.runner.model_runner import ModelRunner

    if generation_config not in ("auto", "vllm"):
        raise ConfigError(f"generation_config must be 'auto' or 'vllm', not {shown(generation_config)}.")
    laps = _Laps()
    checkpoint = open_checkpoint(resolve(model))
    laps.end("open")
    try:
        checkpoint.check_tokenizer()
        # All that is Python's is done beside packing, which it does not hold up: that needs no GIL.
        with ThreadPoolExecutor(1) as thread:
            beside: list[Future[Tokenizer]] = []

            def packing() -> None:
                laps.end("plan")
                beside.append(thread.submit(checkpoint.tokenizer))

            runner = ModelRunner(checkpoint, config, backend, packing=packing)
            laps.end("weights")
            tokenizer = beside[0].result()
            laps.end("tokenizer")
        checkpoint.release()
        _native.trim_heap()  # making a tokenizer takes twice what it keeps
        _check_vocabulary(checkpoint, tokenizer.vocab_size, runner.graph.vocab_size)
        defaults = checkpoint.generation_defaults if generation_config == "auto" else {}
        engine = Engine(
            LocalExecutor(runner),
            config,
            max_model_len=runner.limits.max_model_len,
            kv_blocks=runner.limits.kv_blocks,
            vocab_size=runner.graph.vocab_size,
            eos_ids=tokenizer.eos_ids,
            new_stream=lambda params: tokenizer.stream(
                skip_special=params.skip_special_tokens,
                spaces_between_special=params.spaces_between_special_tokens,
            ),
            token_text=tokenizer.token_text,
        )
        params = SamplingParams(**defaults)
        return Loaded(config, checkpoint, tokenizer, runner, engine, params, laps.seconds)
    except BaseException:
        checkpoint.close()
        raise


def _check_vocabulary(checkpoint: Checkpoint, tokens: int, logits: int) -> None:
    """Logits may be wider than the vocabulary (padded embeddings), but every token must have one."""
    if tokens > logits:
        raise CheckpointError(
            f"{checkpoint.path}: its tokenizer has {tokens} tokens, but its model has logits for {logits} "
            "only; the two do not belong together."
        )


def engine_config(settings: Mapping[str, Any]) -> EngineConfig:
    """The EngineConfig that keyword arguments ask for: its own fields, and those of vLLM's LLM that can be
    met.

    kv_cache_memory_bytes is kv_cache_gib in bytes, and kv_cache_dtype="int8_per_token_head" is kv_dtype="q8".
    Raises ConfigError for all others.
    """
    known = {field.name for field in fields(EngineConfig)}
    asked = dict(settings)
    if (size := asked.pop("kv_cache_memory_bytes", None)) is not None:
        check_integer(ConfigError, "kv_cache_memory_bytes", size, "a positive integer", lambda v: v > 0)
        if asked.get("kv_cache_gib") is not None:
            raise ConfigError(
                "kv_cache_gib and kv_cache_memory_bytes are two ways to say one thing; give one."
            )
        asked["kv_cache_gib"] = size / 2**30
    if asked.get("kv_cache_dtype") == "int8_per_token_head" and asked.setdefault("kv_dtype", "q8") != "q8":
        raise ConfigError("kv_dtype and kv_cache_dtype are two ways to say one thing; give one.")
    for name in asked.keys() - known:
        if name not in _NOTHING_TO_DO:
            raise ConfigError(f"There is no setting {name!r}; the settings are {', '.join(sorted(known))}.")
        value, accepted = asked.pop(name), _NOTHING_TO_DO[name]
        if accepted is not None and value not in accepted:
            raise ConfigError(
                f"{name}={shown(value)} asks for something that hexad does not do; leave it out, or give "
                f"{' or '.join(map(repr, accepted))}."
            )
    return EngineConfig(**asked)
