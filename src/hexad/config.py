"""EngineConfig: what the user asked for. Frozen; nothing in hexad writes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hexad.checks import check_choice, check_integer, check_number
from hexad.errors import ConfigError

Compute = Literal["int8", "float"]
CacheDtype = Literal["f32", "f16", "q8"]
KVDtype = Literal["auto", CacheDtype]
SchedulingPolicy = Literal["fcfs", "priority"]

BLOCK_TOKENS = 32
"""Tokens in one KV cache block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    compute: "int8" quantises activations per 32 values for quantised weights; "float" keeps them in float32.
    kv_dtype: type of the KV cache; "auto" is f16 for compute="int8" and f32 for compute="float"; "q8" keeps
        8-bit integers and a float32 scale per token and KV head.
    max_model_len: longest sequence in tokens; None takes the model's own context length.
    max_num_seqs: most sequences in one step.
    max_num_batched_tokens: most tokens in one step.
    max_step_ms: longest that a step may take while streams run, in milliseconds, which bounds the chunks of
        prompts beside them; None: twice a step of those streams alone. Never more than a second.
    scheduling_policy: "fcfs" serves in order of arrival, "priority" by the requests' priority, lowest first.
    enable_prefix_caching: keep the KV of finished sequences for others that begin alike.
    kv_cache_gib, kv_cache_tokens: memory for the KV cache in GiB, or the tokens it is to hold; at most one of
        them. Both None leave it to the plan.
    prefault: take the memory of the KV cache and the workspace at once, instead of as it is used.
    max_logprobs: most logprobs a request may ask for per position; -1 allows the whole vocabulary.
    threads: CPU threads, at most what affinity and the cgroup quota allow; None takes all of these.
    seed: seeds the requests that bring no seed of their own; None draws one.

    Raises ConfigError.
    """

    compute: Compute = "int8"
    kv_dtype: KVDtype = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    max_step_ms: float | None = None
    scheduling_policy: SchedulingPolicy = "fcfs"
    enable_prefix_caching: bool = True
    kv_cache_gib: float | None = None
    kv_cache_tokens: int | None = None
    prefault: bool = False
    max_logprobs: int = 20
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        for field, choices in (
            ("compute", ("int8", "float")),
            ("kv_dtype", ("auto", "f32", "f16", "q8")),
            ("scheduling_policy", ("fcfs", "priority")),
            ("enable_prefix_caching", (True, False)),
            ("prefault", (True, False)),
        ):
            check_choice(ConfigError, field, getattr(self, field), choices)
        for field in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_tokens",
            "threads",
        ):
            value = getattr(self, field)
            if value is None and field in ("max_model_len", "kv_cache_tokens", "threads"):
                continue
            allowed = "a positive integer, at most 2**31 - 1"
            check_integer(ConfigError, field, value, allowed, lambda v: 1 <= v < 2**31)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs a token per step."
            )
        if self.max_step_ms is not None:
            check_number(
                ConfigError,
                "max_step_ms",
                self.max_step_ms,
                "above 0 and at most 1000",
                lambda v: 0 < v <= 1000,
            )
        if self.kv_cache_gib is not None:
            # No machine can address 2**33 GiB.
            check_number(
                ConfigError, "kv_cache_gib", self.kv_cache_gib, "above 0 and below 2**33",
                lambda v: 0 < v < 2**33,
            )  # fmt: skip
            if self.kv_cache_tokens is not None:
                raise ConfigError("kv_cache_gib and kv_cache_tokens are two ways to say one thing; give one.")
        check_integer(
            ConfigError, "max_logprobs", self.max_logprobs, "an integer from -1 to 2**31 - 1",
            lambda v: -1 <= v < 2**31,
        )  # fmt: skip
        if self.seed is not None:
            check_integer(ConfigError, "seed", self.seed, "None or an integer", lambda v: True)

    @property
    def resolved_kv_dtype(self) -> CacheDtype:
        """The KV cache's type with "auto" resolved."""
        if self.kv_dtype == "auto":
            return "f16" if self.compute == "int8" else "f32"
        return self.kv_dtype
