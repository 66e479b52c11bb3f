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
        ({"kv_dtype": "q4"}, "kv_dtype .* 'q8', not 'q4'"),
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
        ({"kv_cache_tokens": 0}, "kv_cache_tokens .* not 0"),
        ({"kv_cache_tokens": 2**31}, "kv_cache_tokens .* not 2147483648"),
        ({"kv_cache_tokens": 1.5}, r"kv_cache_tokens .* not 1\.5"),
        ({"kv_cache_gib": 1, "kv_cache_tokens": 64}, "kv_cache_gib and kv_cache_tokens .* give one"),
        ({"max_step_ms": 0}, "max_step_ms must be above 0 and at most 1000, not 0"),
        ({"max_step_ms": 1000.5}, r"max_step_ms must be above 0 and at most 1000, not 1000\.5"),
        ({"max_step_ms": float("nan")}, "max_step_ms .* not nan"),
        ({"max_step_ms": "9"}, "max_step_ms must be a number .* not '9'"),
        ({"scheduling_policy": "lifo"}, "scheduling_policy must be 'fcfs' or 'priority', not 'lifo'"),
        ({"scheduling_policy": None}, "scheduling_policy .* not None"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching must be True or False, not 1"),
        ({"prefault": 1}, "prefault must be True or False, not 1"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching .* not 'yes'"),
        ({"enable_prefix_caching": None}, "enable_prefix_caching .* not None"),
        ({"max_logprobs": -2}, r"max_logprobs must be an integer from -1 to 2\*\*31 - 1, not -2"),
        ({"max_logprobs": 2**31}, "max_logprobs .* not 2147483648"),
        ({"max_logprobs": 20.0}, r"max_logprobs .* not 20\.0"),
        ({"max_logprobs": False}, "max_logprobs .* not False"),
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
    [
        ("int8", "auto", "f16"),
        ("float", "auto", "f32"),
        ("int8", "f32", "f32"),
        ("float", "f16", "f16"),
        ("int8", "q8", "q8"),
        ("float", "q8", "q8"),
    ],
)
def test_kv_dtype_follows_compute(compute: Any, kv_dtype: Any, resolved: str) -> None:
    assert EngineConfig(compute=compute, kv_dtype=kv_dtype).resolved_kv_dtype == resolved


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("kv_cache_gib", [None, 1e-3, 2, 2.5]),
        ("kv_cache_tokens", [None, 1, 2**31 - 1]),
        ("max_step_ms", [None, 0.5, 1, 1000]),
        ("scheduling_policy", ["fcfs", "priority"]),
        ("enable_prefix_caching", [True, False]),
        ("prefault", [True, False]),
        ("max_logprobs", [-1, 0, 20, 2**31 - 1]),
        ("seed", [None, 0, -(2**70)]),
        ("threads", [None, 1, 2**31 - 1]),
    ],
)
def test_accepts(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(EngineConfig(**{field: value}), field) == value


def test_defaults() -> None:
    config = EngineConfig()
    assert config.scheduling_policy == "fcfs"
    assert config.enable_prefix_caching
    assert config.max_logprobs == 20
    assert (config.max_step_ms, config.kv_cache_gib, config.kv_cache_tokens) == (None, None, None)


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().threads = 4  # type: ignore[misc]
