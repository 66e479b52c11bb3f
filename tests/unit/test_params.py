"""SamplingParams: vLLM's defaults, and errors that name field, value and range."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hexad.errors import HexadError, ParamsError
from hexad.params import SamplingParams


def test_defaults_are_vllms() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "seed": None,
        "max_tokens": 16,
        "ignore_eos": False,
    }


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0, 0.01, 1, 2.0]),
        ("top_k", [-1, 0, 1, 200_000, 2**31 - 1]),
        ("top_p", [1e-3, 0.5, 1, 1.0]),
        ("min_p", [0, 0.05, 1]),
        ("seed", [None, 0, 2**64 - 1]),
        ("max_tokens", [None, 1, 10**9]),
    ],
)
def test_accepts_the_whole_range(field: str, values: list[Any]) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("temperature", -0.1, "between 0 and 2"),
        ("temperature", 2.1, "between 0 and 2"),
        ("temperature", float("nan"), "between 0 and 2"),
        ("temperature", "1", "a number"),
        ("temperature", True, "a number"),
        ("temperature", None, "a number"),
        ("top_k", -2, "from -1 to 2**31 - 1"),
        ("top_k", 2**31, "from -1 to 2**31 - 1"),
        ("top_k", 1.5, "from -1 to 2**31 - 1"),
        ("top_k", True, "from -1 to 2**31 - 1"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", float("inf"), "above 0 and at most 1"),
        ("min_p", -0.01, "between 0 and 1"),
        ("min_p", 1.01, "between 0 and 1"),
        ("seed", -2, "from -1 to 2**64 - 1"),
        ("seed", 2**64, "from -1 to 2**64 - 1"),
        ("seed", 1.0, "from -1 to 2**64 - 1"),
        ("max_tokens", 0, "at least 1"),
        ("max_tokens", 3.0, "at least 1"),
        ("max_tokens", True, "at least 1"),
    ],
)
def test_refuses_with_field_value_and_range(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ParamsError) as caught:
        SamplingParams(**{field: value})
    message = str(caught.value)
    assert message.startswith(field)
    assert allowed in message
    assert str(value) in message
    assert isinstance(caught.value, HexadError)
    assert isinstance(caught.value, ValueError)


def test_seed_minus_one_is_none() -> None:
    assert SamplingParams(seed=-1) == SamplingParams()


@pytest.mark.parametrize("field", ["temperature", "top_k", "top_p", "min_p", "seed"])
@pytest.mark.parametrize("digits", [400, 5000])  # more than a float holds, and than Python writes out
def test_refuses_huge_integers_too(field: str, digits: int) -> None:
    for value in (10**digits, -(10**digits)):
        with pytest.raises(ParamsError, match=f"^{field} must be") as caught:
            SamplingParams(**{field: value})
        assert len(str(caught.value)) < 160


@pytest.mark.parametrize("temperature", [1e-9, 9e-6, 0.00999])
def test_tiny_temperatures_are_raised_with_a_warning(
    temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    assert SamplingParams(temperature=temperature).temperature == 0.01
    (warning,) = caplog.records
    assert warning.getMessage() == f"temperature {temperature} is raised to 0.01; 0 is greedy."


def test_other_temperatures_are_taken_silently(caplog: pytest.LogCaptureFixture) -> None:
    assert [SamplingParams(temperature=t).temperature for t in (0, 0.01, 0.5)] == [0, 0.01, 0.5]
    assert not caplog.records


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]
