"""EngineConfig: ranges, and what contradicts what."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hexad.config import EngineConfig
from hexad.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute": "fp8"}, "compute .* 'int8' or 'float', not 'fp8'"),
        ({"kv_dtype": "q8"}, "kv_dtype .* not 'q8'"),
        ({"max_model_len": 0}, "max_model_len .* not 0"),
        ({"max_num_seqs": -1}, "max_num_seqs .* not -1"),
        ({"max_num_seqs": None}, "max_num_seqs .* not None"),
        ({"max_num_seqs": 2.0}, r"max_num_seqs .* not 2\.0"),
        ({"max_num_batched_tokens": True}, "max_num_batched_tokens .* not True"),
        ({"threads": 0}, "threads .* not 0"),
        ({"max_num_seqs": 65, "max_num_batched_tokens": 64}, r"\(64\) must be at least max_num_seqs \(65\)"),
        ({"kv_cache_gib": 0}, "kv_cache_gib .* not 0"),
        ({"kv_cache_gib": -0.5}, r"kv_cache_gib .* not -0\.5"),
        ({"kv_cache_gib": float("nan")}, "kv_cache_gib .* not nan"),
        ({"kv_cache_gib": float("inf")}, "kv_cache_gib .* not inf"),
        ({"kv_cache_gib": 1e300}, r"kv_cache_gib .* below 2\*\*33, not 1e\+300"),
        ({"kv_cache_gib": 10**400}, r"kv_cache_gib .* not 10+\.\.\."),
        ({"kv_cache_gib": 10**5000}, "kv_cache_gib .* more digits than can be shown"),
        ({"kv_cache_gib": "2"}, "kv_cache_gib must be a number .* not '2'"),
        ({"kv_cache_gib": True}, "kv_cache_gib must be a number .* not True"),
        ({"seed": [1]}, r"seed must be None or an integer, not \[1\]"),
        ({"seed": "x"}, "seed must be None or an integer, not 'x'"),
        ({"seed": True}, "seed .* not True"),
        ({"threads": 2**31}, "threads .* not 2147483648"),
        ({"compute": 10**5000}, "compute .* more digits than can be shown"),
    ],
)
def test_refuses(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**settings)


@pytest.mark.parametrize(
    ("compute", "kv_dtype", "resolved"),
    [("int8", "auto", "f16"), ("float", "auto", "f32"), ("int8", "f32", "f32"), ("float", "f16", "f16")],
)
def test_kv_dtype_follows_compute(compute: Any, kv_dtype: Any, resolved: str) -> None:
    assert EngineConfig(compute=compute, kv_dtype=kv_dtype).resolved_kv_dtype == resolved


def test_accepts() -> None:
    config = EngineConfig(kv_cache_gib=2, seed=-(2**70), threads=2**31 - 1)
    assert (config.kv_cache_gib, config.seed, config.threads) == (2, -(2**70), 2**31 - 1)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().threads = 4  # type: ignore[misc]
