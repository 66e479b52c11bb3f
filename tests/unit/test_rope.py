"""RoPE out of configs: each kind of scaling against transformers, and by what it is meant to do."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph import RopeSpec
from hexad.graph.rope import read_rope

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


def rope(scaling: dict[str, Any] | None, head_dim: int = 128, theta: float = 1e6, **config: Any) -> RopeSpec:
    config = {"rope_theta": theta, "rope_scaling": scaling, "max_position_embeddings": 131072, **config}
    return read_rope(config, head_dim)


def test_without_scaling() -> None:
    expected = RopeSpec(128, 128, 1e6)
    for scaling in (None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 1e6}):
        assert rope(scaling) == expected
    assert read_rope({}, 64) == RopeSpec(64, 64, 10_000.0)
    np.testing.assert_allclose(expected.inv_freq()[[0, 32, 63]], [1, 1e-3, 1e6 ** (-126 / 128)], rtol=1e-6)
    assert expected.magnitude == 1


@pytest.mark.parametrize("partial", [{"rotary_dim": 32}, {"partial_rotary_factor": 0.25}])
def test_partial(partial: dict[str, Any]) -> None:
    assert rope(None, **partial) == RopeSpec(128, 32, 1e6)
    assert rope({"rope_type": "linear", "factor": 2.0}, **partial).inv_freq().shape == (16,)


def test_a_rope_is_a_key() -> None:
    scaled = [rope(LLAMA3), rope(YARN), rope(YARN | {"factor": 2.0}), rope(None)]
    assert len({*scaled, rope(dict(LLAMA3)), rope(dict(YARN))}) == 4


def test_linear_divides_every_frequency() -> None:
    found = rope({"type": "linear", "factor": 4})  # as files before "rope_type" say it
    np.testing.assert_allclose(found.inv_freq() * 4, rope(None).inv_freq(), rtol=1e-6)
    assert found.magnitude == 1


def test_divisors_are_taken_as_they_are() -> None:
    divisors = np.linspace(1, 8, 64)
    found = rope({"rope_type": "divisors", "divisors": tuple(divisors.tolist())})
    np.testing.assert_allclose(found.inv_freq() * divisors, rope(None).inv_freq(), rtol=1e-6)


@pytest.mark.parametrize(("scaling", "fast", "slow"), [(LLAMA3, 4.0, 1.0), (YARN, 32.0, 1.0)])
def test_slow_frequencies_are_divided_and_fast_ones_kept(
    scaling: dict[str, Any], fast: float, slow: float
) -> None:
    plain = rope(None).inv_freq()
    divisors = plain / rope(scaling).inv_freq()
    turns = scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
    assert ((turns < slow).sum(), (turns > fast).sum()) > (5, 5)
    np.testing.assert_allclose(divisors[turns > fast * 1.3], 1, rtol=1e-6)
    np.testing.assert_allclose(divisors[turns < slow / 1.3], scaling["factor"], rtol=1e-6)
    assert (np.diff(divisors) >= -1e-6).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": 0.5}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1.25, "mscale": 2.0, "mscale_all_dim": 1.0}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
        ({"mscale": 2.0}, 0.1 * math.log(4) + 1),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
    ],
)
def test_yarns_magnitude(change: dict[str, Any], expected: float) -> None:
    assert rope(YARN | change).magnitude == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "proportional", "su", "mrope", None, 3])
def test_another_kind_is_named(kind: object) -> None:
    with pytest.raises(UnsupportedError, match=f"of type {kind!r} is not supported"):
        rope({"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        (["yarn"], "rope_scaling is .'yarn'.; a mapping expected"),
        ({"rope_type": "linear"}, "rope_scaling linear: the config's factor is None"),
        ({"rope_type": "linear", "factor": 0}, "factor is 0; a positive number"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor is nan"),
        (LLAMA3 | {"low_freq_factor": None}, "rope_scaling llama3: the config's low_freq_factor is None"),
        (LLAMA3 | {"high_freq_factor": 1.0}, "low_freq_factor is 1 and high_freq_factor 1"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0"),
        (YARN | {"beta_fast": -1}, "beta_fast is -1"),
        (YARN | {"attention_factor": "2"}, "attention_factor is '2'"),
        ({"rope_type": "divisors"}, "divisors are None; 64 numbers expected"),
        ({"rope_type": "divisors", "divisors": (1.0,)}, "64 numbers expected"),
        ({"rope_type": "divisors", "divisors": (0.0,) * 64}, "divisor is 0.0; a positive number"),
    ],
)
def test_an_ill_value_is_named(scaling: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        rope(scaling)
    assert type(caught.value) is CheckpointError


def test_yarn_needs_a_base_above_one() -> None:
    with pytest.raises(CheckpointError, match="rope_theta is 1; more than 1 expected"):
        rope(YARN, theta=1.0)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("head_dim", "theta"), [(128, 1e6), (64, 500_000.0), (80, 10_000.0), (16, 100.0)], ids=str
)
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 8.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0},
        LLAMA3 | {"low_freq_factor": 2, "high_freq_factor": 16, "original_max_position_embeddings": 512},
        YARN,
        YARN | {"truncate": False},
        YARN | {"beta_fast": 16, "beta_slow": 2, "factor": 2.5},
        YARN | {"factor": None},
        {"rope_type": "yarn", "factor": 16.0},  # the original context is the context
        YARN | {"original_max_position_embeddings": 16},
        YARN | {"original_max_position_embeddings": 4},  # the ramp begins and ends before the first frequency
        YARN | {"mscale": 0.707, "mscale_all_dim": 0.9, "factor": 40},
        YARN | {"attention_factor": 0.5},
    ],
    ids=str,
)
def test_frequencies_are_transformers(scaling: dict[str, Any], head_dim: int, theta: float) -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    hf = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters={**scaling, "rope_theta": theta},
    )  # fmt: skip
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding
    make = ROPE_INIT_FUNCTIONS.get(scaling["rope_type"], rotary.compute_default_rope_parameters)
    expected, magnitude = make(hf)
    found = rope(scaling, head_dim, theta)
    # transformers raises to powers and divides in float32: up to some roundings of 6e-8
    np.testing.assert_allclose(found.inv_freq(), expected.numpy(), rtol=1e-6)
    assert found.magnitude == pytest.approx(magnitude, rel=1e-12)
