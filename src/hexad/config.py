"""EngineConfig: what the user asked for. Frozen; nothing in hexad writes to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hexad.checks import check_integer, check_number, shown
from hexad.errors import ConfigError

Compute = Literal["int8", "float"]
KVDtype = Literal["auto", "f32", "f16"]

BLOCK_TOKENS = 32
"""Tokens in one KV cache block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of one engine.

    compute: "int8" quantises activations per 32 values for quantised weights; "float" keeps them in float32.
    kv_dtype: type of the KV cache; "auto" is f16 for compute="int8" and f32 for compute="float".
    max_model_len: longest sequence in tokens; None takes the model's own context length.
    max_num_seqs: most sequences in one step.
    max_num_batched_tokens: most tokens in one step.
    kv_cache_gib: memory for the KV cache in GiB; None leaves it to the plan.
    threads: CPU threads, at most what affinity and the cgroup quota allow; None takes all of these.
    seed: seeds the requests that bring no seed of their own; None draws one.

    Raises ConfigError.
    """

    compute: Compute = "int8"
    kv_dtype: KVDtype = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_cache_gib: float | None = None
    threads: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.compute not in ("int8", "float"):
            raise ConfigError(f"compute must be 'int8' or 'float', not {shown(self.compute)}.")
        if self.kv_dtype not in ("auto", "f32", "f16"):
            raise ConfigError(f"kv_dtype must be 'auto', 'f32' or 'f16', not {shown(self.kv_dtype)}.")
        for field in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "threads"):
            value = getattr(self, field)
            if value is None and field in ("max_model_len", "threads"):
                continue
            allowed = "a positive integer, at most 2**31 - 1"
            check_integer(ConfigError, field, value, allowed, lambda v: 1 <= v < 2**31)
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): each running sequence needs a token per step."
            )
        if self.kv_cache_gib is not None:
            # No machine can address 2**33 GiB.
            check_number(
                ConfigError, "kv_cache_gib", self.kv_cache_gib, "above 0 and below 2**33",
                lambda v: 0 < v < 2**33,
            )  # fmt: skip
        if self.seed is not None:
            check_integer(ConfigError, "seed", self.seed, "None or an integer", lambda v: True)

    @property
    def resolved_kv_dtype(self) -> Literal["f32", "f16"]:
        """The KV cache's type with "auto" resolved."""
        if self.kv_dtype == "auto":
            return "f16" if self.compute == "int8" else "f32"
        return self.kv_dtype
