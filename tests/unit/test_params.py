"""Parameters: vLLM's names, defaults and rules, and errors that name field, value and range."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hexad.errors import HexadError, ParamsError
from hexad.params import (
    DEFAULT_SAMPLERS,
    BeamSearchParams,
    PoolingParams,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    StructuredOutputsParams,
)

JSON = StructuredOutputsParams(json_object=True)
REPETITION = RepetitionDetectionParams(max_pattern_size=8)
NAN, INF = float("nan"), float("inf")
HUGE = 10**5000  # more digits than Python writes out, and more than a float holds

VLLM_DEFAULTS = {
    "n": 1, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "temperature": 1,
    "top_p": 1, "top_k": 0, "min_p": 0, "seed": None, "stop": None, "stop_token_ids": None,
    "include_stop_str_in_output": False, "ignore_eos": False, "max_tokens": 16, "min_tokens": 0,
    "logprobs": None, "prompt_logprobs": None, "logprob_token_ids": None, "prompt_logprob_token_ids": None,
    "prompt_logprob_start": None, "detokenize": True, "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "logit_bias": None, "allowed_token_ids": None, "bad_words": None,
    "structured_outputs": None, "thinking_token_budget": None, "repetition_detection": None,
    "output_kind": RequestOutputKind.CUMULATIVE, "skip_reading_prefix_cache": None, "extra_args": None,
}  # fmt: skip
LLAMA_CPP_DEFAULTS = {
    "typical_p": 1, "top_n_sigma": -1, "xtc_probability": 0, "xtc_threshold": 0.1, "dry_multiplier": 0,
    "banned_token_ids": None, "dry_base": 1.75, "dry_allowed_length": 2, "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ("\n", ":", '"', "*"), "repeat_last_n": -1, "dynatemp_range": 0,
    "dynatemp_exponent": 1, "mirostat": 0, "mirostat_tau": 5, "mirostat_eta": 0.1,
    "samplers": DEFAULT_SAMPLERS,
}  # fmt: skip

# What stands in these fields wherever another one needs it.
BESIDE: dict[str, dict[str, Any]] = {
    "min_tokens": {"max_tokens": None},
    "prompt_logprob_start": {"prompt_logprob_token_ids": [1]},
}

# field → (values that are stored as they are, values that are refused, what the message says of the range)
NUMBERS: dict[str, tuple[list[Any], list[Any], str]] = {
    "presence_penalty": ([-2, 0.5, 2.0], [-2.01, 2.01], "between -2 and 2"),
    "frequency_penalty": ([-2, 0.5, 2.0], [-2.01, 2.01], "between -2 and 2"),
    "repetition_penalty": ([1e-30, 0.5, 1, 1.1, 1e30], [0, -1, 0.0, 1e31], "between 1e-30 and 1e+30"),
    "temperature": ([0, 0.01, 1, 2.0], [-0.1, 2.1], "between 0 and 2"),
    "top_p": ([1e-3, 0.5, 1, 1.0], [0, 0.0, -0.5, 1.01], "above 0 and at most 1"),
    "min_p": ([0, 0.05, 1], [-0.01, 1.01], "between 0 and 1"),
    "typical_p": ([1e-3, 0.5, 1], [0, 1.01], "above 0 and at most 1"),
    "top_n_sigma": ([-1, 0, 1.5, 1e30], [1e31, -1e31], "between -1e+30 and 1e+30"),
    "xtc_probability": ([0, 0.5, 1], [-0.1, 1.1], "between 0 and 1"),
    "xtc_threshold": ([0, 0.1, 0.6, 1], [-0.1, 1.1], "between 0 and 1"),
    "dry_multiplier": ([0, 0.8, 100], [-0.1, 101], "between 0 and 100"),
    "dry_base": ([1, 1.75, 100], [0.99, 101], "between 1 and 100"),
    "dynatemp_range": ([0, 0.5, 10], [-0.1, 10.5], "between 0 and 10"),
    "dynatemp_exponent": ([0, 1.5, 100], [-0.1, 101], "between 0 and 100"),
    "mirostat_tau": ([0, 5.0, 100], [-0.1, 101], "between 0 and 100"),
    "mirostat_eta": ([0, 0.1, 1], [-0.1, 1.1], "between 0 and 1"),
}
INTEGERS: dict[str, tuple[list[Any], list[Any], str]] = {
    "n": ([1, 2, 16384], [0, -1, 16385], "an integer from 1 to 16384"),
    "top_k": ([-1, 0, 1, 200_000, 2**31 - 1], [-2, 2**31], "an integer from -1 to 2**31 - 1"),
    "seed": ([None, 0, 2**64 - 1], [-2, 2**64], "an integer from -1 to 2**64 - 1"),
    "max_tokens": ([None, 1, 10**9, 2**63 - 1], [0, -1, 2**63], "an integer from 1 to 2**63 - 1"),
    "min_tokens": ([0, 7, 2**63 - 1], [-1, 2**63], "an integer from 0 to 2**63 - 1"),
    "logprobs": ([None, -1, 0, 20, 2**31 - 1], [-2, 2**31], "an integer from -1 to 2**31 - 1"),
    "prompt_logprobs": ([None, -1, 0, 20, 2**31 - 1], [-2, 2**31], "an integer from -1 to 2**31 - 1"),
    "prompt_logprob_start": ([None, 0, 2**31 - 1], [-1, 2**31], "an integer from 0 to 2**31 - 1"),
    "thinking_token_budget": ([None, 0, 500], [-2, 2**63], "an integer from -1 to 2**63 - 1"),
    "dry_allowed_length": ([1, 2, 2**31 - 1], [0, -1, 2**31], "an integer from 1 to 2**31 - 1"),
    "dry_penalty_last_n": ([-1, 0, 64], [-2, 2**31], "an integer from -1 to 2**31 - 1"),
    "repeat_last_n": ([-1, 0, 64], [-2, 2**31], "an integer from -1 to 2**31 - 1"),
    "mirostat": ([0, 1, 2], [-1, 3], "an integer from 0 to 2"),
}
FLAGS = (
    "include_stop_str_in_output", "ignore_eos", "detokenize", "skip_special_tokens",
    "spaces_between_special_tokens", "skip_reading_prefix_cache",
)  # fmt: skip
OPTIONAL = {name for name, default in VLLM_DEFAULTS.items() if default is None} | {"max_tokens"}

# field → (value, as what it is stored)
STORED: dict[str, list[tuple[Any, Any]]] = {
    **{flag: [(True, True), (False, False)] for flag in FLAGS},
    "stop": [("a", ("a",)), (["a", "\n"], ("a", "\n")), ([], ()), (("x",), ("x",))],
    "stop_token_ids": [([], ()), ([5, 2, 5], (5, 2)), ((0, 2**31 - 1), (0, 2**31 - 1)), (range(2), (0, 1))],
    "logprob_token_ids": [([5, 2], (5, 2)), (range(128), tuple(range(128)))],
    "prompt_logprob_token_ids": [([5, 2], (5, 2)), (range(200), tuple(range(200)))],
    "allowed_token_ids": [([5, 2, 5], (5, 2))],
    "banned_token_ids": [([], ()), ([5, 2, 5], (5, 2))],
    "logit_bias": [({}, {}), ({5: 1.5}, {5: 1.5}), ({"7": -1}, {7: -1}),
                   ({1: 1e9, 2: -101}, {1: 100, 2: -100})],
    "bad_words": [([], ()), (["a", "b c"], ("a", "b c"))],
    "structured_outputs": [(JSON, JSON)],
    "repetition_detection": [(REPETITION, REPETITION)],
    "output_kind": [(kind, kind) for kind in RequestOutputKind],
    "extra_args": [({"a": [1]}, {"a": [1]})],
    "dry_sequence_breakers": [([], ()), (["\n", "###"], ("\n", "###"))],
    "samplers": [([], ()), (["top_p", "dry"], ("top_p", "dry")), (DEFAULT_SAMPLERS, DEFAULT_SAMPLERS)],
}  # fmt: skip

# (value, what the message says, at what the message points if not at the whole value)
Wrong = list[tuple[Any, str] | tuple[Any, str, Any]]
ID = "each of {} must be an integer from 0 to 2**31 - 1"
NO_IDS: Wrong = [
    ([-1], ID, -1), ([3, 2**31], ID, 2**31), ([1.0], ID, 1.0), ([True], ID, True), (["1"], ID, "1"),
    ([HUGE], ID, HUGE),
    *((value, "{} must be a list") for value in (7, "12", b"12", {1}, {1: 2})),
]  # fmt: skip
TEXT = "each of {} must be a non-empty string of valid Unicode"
NO_TEXTS: Wrong = [
    ([""], TEXT, ""), (["a", 5], TEXT, 5), ([None], TEXT, None), (["\ud800"], TEXT, "\ud800"),
    *((value, "{} must be a list") for value in (7, b"a", {"a"}, {"a": 1})),
]  # fmt: skip
REFUSED: dict[str, Wrong] = {
    **{flag: [(value, "{} must be True or False") for value in (1, 0, 1.0, "yes", [])] for flag in FLAGS},
    "stop": [("", TEXT), *NO_TEXTS],
    "stop_token_ids": NO_IDS,
    "logprob_token_ids": [
        *NO_IDS, ([], "{} must have 1 to 128 entries, not 0"), (range(129), "1 to 128 entries, not 129"),
        ([4, 1, 4], "{} must have no entry twice"),
    ],
    "prompt_logprob_token_ids": [
        *NO_IDS, ([], "{} must have at least 1 entries, not 0"), ([4, 1, 4], "{} must have no entry twice"),
    ],
    "allowed_token_ids": [*NO_IDS, ([], "{} must have at least 1 entries, not 0")],
    "banned_token_ids": NO_IDS,
    "logit_bias": [
        ([(1, 2)], "{} must be a dict"),
        *(({key: 1}, "each key of {} must be an integer from 0 to 2**31 - 1", key)
          for key in (-1, 2**31, "x", "-5", "²", "9" * 5000, True, 1.0)),
        *(({5: bias}, "{}[5] must be between -1e+30 and 1e+30", bias) for bias in (NAN, INF, -INF, HUGE)),
        *(({5: bias}, "{}[5] must be a number between -1e+30 and 1e+30", bias) for bias in ("1", None, True)),
    ],
    "bad_words": [("abc", "{} must be a list"), *NO_TEXTS],
    "structured_outputs": [(v, "{} must be a StructuredOutputsParams") for v in ({"regex": "a"}, "a", 1)],
    "repetition_detection": [(v, "{} must be a RepetitionDetectionParams") for v in ({"min_count": 2}, 2)],
    "output_kind": [(value, "{} must be a RequestOutputKind") for value in (1, "DELTA", None)],
    "extra_args": [(value, "{} must be a dict") for value in ([1], "a", 1)],
    "dry_sequence_breakers": [(None, "{} must be a list"), ("abc", "{} must be a list"), *NO_TEXTS],
    "samplers": [
        (None, "{} must be a list"), ("top_k", "{} must be a list"),
        *(([v], "each of {} must be 'penalties', 'dry', ", v) for v in ("greedy", 1, ["top_k"], None)),
        (["top_k", "dry", "top_k"], "{} must have no entry twice"),
    ],
}  # fmt: skip


def refusal(kind: Any, **settings: Any) -> str:
    """The message with which the settings are refused."""
    with pytest.raises(ParamsError) as caught:
        kind(**settings)
    assert isinstance(caught.value, HexadError)
    assert isinstance(caught.value, ValueError)
    message = str(caught.value)
    assert message.endswith(".")
    assert len(message) < 300
    return message


def shown(value: Any) -> str:
    """The beginning of a value's repr, which a message must have in it."""
    return "int of more digits" if value in (HUGE, -HUGE) else repr(value)[:50]


# SamplingParams.


def test_fields_and_defaults_are_those_of_vllm_and_llama_cpp() -> None:
    found = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    assert found == VLLM_DEFAULTS | LLAMA_CPP_DEFAULTS
    params = SamplingParams()
    assert {name: getattr(params, name) for name in found} == found


def test_every_field_is_tested_below() -> None:
    names = sorted(field.name for field in dataclasses.fields(SamplingParams))
    assert sorted([*NUMBERS, *INTEGERS, *STORED]) == sorted([*NUMBERS, *INTEGERS, *REFUSED]) == names


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS])
def test_numbers_in_their_range_are_stored_as_they_are(field: str) -> None:
    for value in (NUMBERS | INTEGERS)[field][0]:
        stored = getattr(SamplingParams(**BESIDE.get(field, {}), **{field: value}), field)
        assert stored == value
        assert type(stored) is type(value)


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS])
def test_numbers_out_of_range_are_refused_with_field_value_and_range(field: str) -> None:
    _, wrong, allowed = (NUMBERS | INTEGERS)[field]
    for value in [*wrong, NAN, INF, -INF, HUGE, -HUGE, 10**400]:
        message = refusal(SamplingParams, **BESIDE.get(field, {}), **{field: value})
        assert message.startswith(f"{field} must be {allowed}, not {shown(value)}")


@pytest.mark.parametrize("field", [*NUMBERS, *INTEGERS])
def test_what_is_no_number_is_refused_with_field_value_and_range(field: str) -> None:
    _, _, allowed = (NUMBERS | INTEGERS)[field]
    wrong = [True, False, "1", [1], 1j, *([] if field in OPTIONAL else [None])]
    for value in wrong if field in NUMBERS else [*wrong, 1.0]:
        message = refusal(SamplingParams, **BESIDE.get(field, {}), **{field: value})
        a_number = "a number " if field in NUMBERS else ""
        assert message == f"{field} must be {a_number}{allowed}, not {value!r}."


@pytest.mark.parametrize("field", STORED)
def test_other_values_are_stored_by_their_rule(field: str) -> None:
    for value, stored in STORED[field]:
        found = getattr(SamplingParams(**{field: value}), field)
        assert found == stored
        assert type(found) is type(stored)


@pytest.mark.parametrize("field", REFUSED)
def test_other_values_are_refused_with_field_value_and_rule(field: str) -> None:
    for value, said, *blamed in REFUSED[field]:
        message = refusal(SamplingParams, **{field: value})
        assert said.format(field) in message
        assert shown(blamed[0] if blamed else value) in message


@pytest.mark.parametrize("field", sorted(OPTIONAL))
def test_none_says_that_a_field_is_not_used(field: str) -> None:
    assert getattr(SamplingParams(**{field: None}), field) is None


def test_minus_one_is_none_where_it_says_that_something_is_off() -> None:
    assert SamplingParams(seed=-1, thinking_token_budget=-1) == SamplingParams()
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 2, "temperature": 0}, "n must be 1 where temperature is 0, not 2"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens (16), not 17"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens must be at most max_tokens (4), not 5"),
        ({"stop": "a", "detokenize": False}, "stop must be None where detokenize is False, not ('a',)"),
        ({"logprob_token_ids": [1, 2], "logprobs": 3}, "as many as logprob_token_ids (2), not 3"),
        ({"logprob_token_ids": [1, 2], "logprobs": -1}, "as many as logprob_token_ids (2), not -1"),
        ({"prompt_logprob_start": 3}, "must be None without prompt_logprob_token_ids, not 3"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    assert message in refusal(SamplingParams, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"n": 2, "temperature": 0.01},
        {"n": 1, "temperature": 0},
        {"min_tokens": 16},
        {"min_tokens": 100, "max_tokens": None},
        {"stop": [], "detokenize": False},
        {"stop_token_ids": [1], "detokenize": False},
        {"logprob_token_ids": [1, 2], "logprobs": 2},
        {"prompt_logprob_token_ids": [1], "prompt_logprob_start": 3},
    ],
)
def test_fields_that_go_together_are_taken(settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        stored = getattr(SamplingParams(**settings), name)
        assert stored == (tuple(value) if isinstance(value, list) else value)


def test_greedy_has_nothing_to_truncate() -> None:
    params = SamplingParams(temperature=0, top_p=0.5, top_k=40, min_p=0.1, repetition_penalty=1.2)
    assert params.greedy
    assert (params.top_p, params.top_k, params.min_p) == (1, 0, 0)
    assert params.repetition_penalty == 1.2
    sampled = SamplingParams(temperature=0.01, top_p=0.5, top_k=40, min_p=0.1)
    assert not sampled.greedy
    assert (sampled.top_p, sampled.top_k, sampled.min_p) == (0.5, 40, 0.1)


@pytest.mark.parametrize("temperature", [1e-9, 9e-6, 0.00999])
@pytest.mark.parametrize("kind", [SamplingParams, BeamSearchParams])
def test_tiny_temperatures_are_raised_with_a_warning(
    kind: Any, temperature: float, caplog: pytest.LogCaptureFixture
) -> None:
    beams = {"beam_width": 2, "max_tokens": 8} if kind is BeamSearchParams else {}
    params = kind(temperature=temperature, **beams)
    assert params.temperature == 0.01
    (warning,) = caplog.records
    assert warning.getMessage() == f"temperature {temperature} is raised to 0.01; 0 is greedy."
    assert dataclasses.replace(params, max_tokens=9).temperature == 0.01
    assert len(caplog.records) == 1


def test_other_temperatures_are_taken_silently(caplog: pytest.LogCaptureFixture) -> None:
    assert [SamplingParams(temperature=t).temperature for t in (0, 0.01, 0.5)] == [0, 0.01, 0.5]
    assert not caplog.records


def test_stop_strings_are_a_tuple() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    assert SamplingParams(stop=["b", "a"]).stop_strings == ("b", "a")


FULL = {
    "stop": ["a"], "stop_token_ids": [1], "logit_bias": {5: 1.0}, "bad_words": ["b"], "seed": 3, "n": 4,
    "allowed_token_ids": [5], "structured_outputs": StructuredOutputsParams(json={"type": "object"}),
    "repetition_detection": REPETITION, "extra_args": {"a": [1]}, "samplers": ["top_p"],
}  # fmt: skip


def test_is_a_value() -> None:
    params = SamplingParams(**FULL)
    assert params == SamplingParams(**FULL)
    assert params != SamplingParams(**FULL | {"seed": 4})
    assert pickle.loads(pickle.dumps(params)) == params
    assert copy.copy(params) == params
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(0.5)  # type: ignore[misc]


def test_without_dicts_it_is_hashable() -> None:
    without = {name: value for name, value in FULL.items() if name not in ("logit_bias", "extra_args")}
    assert len({SamplingParams(**without), SamplingParams(**without), SamplingParams()}) == 2


def test_later_changes_of_what_was_given_do_not_matter() -> None:
    stop, bias, extra, schema = ["a"], {5: 1.0}, {"a": 1}, {"properties": {"x": {"type": "string"}}}
    structured = StructuredOutputsParams(json=schema)
    params = SamplingParams(stop=stop, logit_bias=bias, extra_args=extra, structured_outputs=structured)
    as_it_was = copy.deepcopy(params)
    stop.append("b")
    bias[6] = 2.0
    extra["b"] = 2
    schema["properties"]["x"]["type"] = "null"
    assert params == as_it_was


def test_a_clone_is_equal_and_shares_nothing_that_changes() -> None:
    params = SamplingParams(**FULL)
    clone = params.clone()
    assert clone == params
    assert clone is not params
    params.extra_args["a"].append(2)  # type: ignore[index]
    params.logit_bias[6] = 1.0  # type: ignore[index]
    assert clone == SamplingParams(**FULL | {"extra_args": {"a": [1]}})


def test_replace_keeps_what_it_does_not_name_and_checks_again() -> None:
    params = SamplingParams(**FULL)
    assert dataclasses.replace(params, seed=9) == SamplingParams(**FULL | {"seed": 9})
    assert dataclasses.replace(params) == params
    with pytest.raises(ParamsError, match="n must be 1 where temperature is 0, not 4"):
        dataclasses.replace(params, temperature=0)


# What depends on the vocabulary.


def test_ids_of_the_vocabulary_are_taken() -> None:
    ids = [0, 99]
    params = SamplingParams(
        stop_token_ids=ids, logprob_token_ids=ids, prompt_logprob_token_ids=ids, allowed_token_ids=ids,
        banned_token_ids=ids, logit_bias=dict.fromkeys(ids, 1.0),
    )  # fmt: skip
    params.check_vocabulary(100, 20)
    SamplingParams().check_vocabulary(1, 0)
    SamplingParams(stop_token_ids=[], logit_bias={}).check_vocabulary(1, 0)


@pytest.mark.parametrize(
    "field",
    [
        "stop_token_ids",
        "logprob_token_ids",
        "prompt_logprob_token_ids",
        "allowed_token_ids",
        "banned_token_ids",
        "logit_bias",
    ],
)
def test_ids_outside_the_vocabulary_are_refused(field: str) -> None:
    params = SamplingParams(**{field: {5: 1.0, 100: 1.0} if field == "logit_bias" else [100, 5]})
    params.check_vocabulary(101, 20)
    with pytest.raises(ParamsError, match=rf"^{field} must be .* token ids from 0 to 99, not 100\."):
        params.check_vocabulary(100, 20)


@pytest.mark.parametrize("field", ["logprobs", "prompt_logprobs"])
@pytest.mark.parametrize(
    ("asked", "most", "fits"),
    [
        (0, 0, True), (20, 20, True), (21, 20, False), (1, 0, False), (100, -1, True), (101, -1, False),
        (101, 1000, False), (-1, -1, True), (-1, 100, True), (-1, 1000, True), (-1, 99, False),
    ],
)  # fmt: skip
def test_logprobs_are_bounded(field: str, asked: int, most: int, fits: bool) -> None:
    params = SamplingParams(**{field: asked})
    if fits:
        params.check_vocabulary(100, most)
        return
    bound = 100 if most == -1 else min(most, 100)
    with pytest.raises(
        ParamsError, match=rf"^{field} must be at most {bound}, not {asked}\b.*max_logprobs is {most}\."
    ):
        params.check_vocabulary(100, most)


# Structured outputs.

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}}


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


def test_a_schema_is_stored_as_text() -> None:
    params = StructuredOutputsParams(json=SCHEMA)
    assert isinstance(params.json, str)
    assert json.loads(params.json) == SCHEMA
    assert dataclasses.replace(params).json == params.json
    text = '{"type" : "string"}'
    assert StructuredOutputsParams(json=text).json == text
    assert StructuredOutputsParams(json=MappingProxyType(SCHEMA)) == params
    assert StructuredOutputsParams(json="true").json == "true"


@pytest.mark.parametrize(
    ("field", "value", "stored"),
    [
        ("regex", "a+", "a+"),
        ("choice", ["yes", "no"], ("yes", "no")),
        ("grammar", "start: /a/", "start: /a/"),
        ("json_object", True, True),
        ("structural_tag", "{}", "{}"),
    ],
)
def test_one_constraint_is_taken(field: str, value: Any, stored: Any) -> None:
    params = StructuredOutputsParams(**{field: value})
    found = dataclasses.asdict(params)
    assert found.pop(field) == stored
    assert set(found.values()) == {None}
    assert pickle.loads(pickle.dumps(params)) == params
    assert hash(params) == hash(dataclasses.replace(params))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "exactly one of json, regex, choice, grammar, json_object, structural_tag, not none"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of .*, not regex and choice"),
        ({"json": {}, "json_object": True}, "exactly one of .*, not json and json_object"),
        ({"whitespace_pattern": " ?"}, "exactly one of .*, not none"),
        ({"regex": "a", "whitespace_pattern": " ?"}, "pattern must be None without json .* not ' \\?'"),
        ({"json_object": True, "whitespace_pattern": ""}, "pattern must be a non-empty string .* not ''"),
        ({"json_object": False}, "json_object must be True, not False"),
        ({"json_object": 1}, "json_object must be True, not 1"),
        *(({field: wrong}, f"{field} must be a non-empty string of valid Unicode, not ")
          for field in ("regex", "grammar", "structural_tag", "whitespace_pattern")
          for wrong in ("", 5, b"a", ["a"], {"a": 1}, "\udfff")),
        ({"choice": []}, "choice must have at least 1 entries, not 0"),
        ({"choice": ["a", ""]}, "each of choice must be a non-empty string .* not ''"),
        ({"choice": ["a", 1]}, "each of choice must be a non-empty string .* not 1"),
        ({"choice": "abc"}, "choice must be a list, not 'abc'"),
        ({"json": ""}, "json must be a non-empty string .* not ''"),
        ({"json": "{"}, "json must be a JSON schema, not '{': "),
        ({"json": "[1]"}, r"json must be a JSON schema, as a dict or as text, not '\[1\]'"),
        ({"json": 5}, "json must be a JSON schema, as a dict or as text, not 5"),
        ({"json": ["a"]}, r"json must be a JSON schema, as a dict or as text, not \['a'\]"),
        ({"json": {"a": {1, 2}}}, "json must be a JSON schema, not .*set is not JSON"),
        ({"json": {"minimum": NAN}}, "json must be a JSON schema, not .*nan"),
        ({"json": {(1, 2): 3}}, "json must be a JSON schema, not .*keys must be"),
        ({"json": nested(100_000)}, "json must be a JSON schema, not dict nested too deeply"),
    ],
)  # fmt: skip
def test_other_constraints_are_refused(settings: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(StructuredOutputsParams, **settings))


def test_whitespace_goes_with_json() -> None:
    for constraint in ({"json": SCHEMA}, {"json_object": True}):
        assert StructuredOutputsParams(**constraint, whitespace_pattern=" ?").whitespace_pattern == " ?"


# The others.


def test_repetition_detection() -> None:
    kind = RepetitionDetectionParams
    assert dataclasses.asdict(kind()) == {"max_pattern_size": 0, "min_pattern_size": 1, "min_count": 2}
    assert kind(max_pattern_size=5, min_pattern_size=0, min_count=3) == kind(max_pattern_size=5, min_count=3)
    assert kind(max_pattern_size=5, min_pattern_size=5).min_pattern_size == 5
    assert kind(max_pattern_size=0, min_pattern_size=9, min_count=0).max_pattern_size == 0  # off


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(({field: wrong}, rf"{field} must be an integer from 0 to 2\*\*31 - 1, not {wrong}")
          for field in ("max_pattern_size", "min_pattern_size", "min_count")
          for wrong in (-1, 2**31, 1.5, True, None)),
        ({"max_pattern_size": 5, "min_count": 1}, "min_count must be at least 2, not 1"),
        ({"max_pattern_size": 5, "min_pattern_size": 6}, r"at most max_pattern_size \(5\), not 6"),
    ],
)  # fmt: skip
def test_repetition_detection_refuses(settings: dict[str, Any], message: str) -> None:
    assert re.search(message, refusal(RepetitionDetectionParams, **settings))


def test_pooling() -> None:
    assert dataclasses.asdict(PoolingParams()) == {"pooling": "mean", "normalize": True}
    assert PoolingParams(pooling="last", normalize=False).pooling == "last"
    assert refusal(PoolingParams, pooling="max") == "pooling must be 'mean' or 'last', not 'max'."
    assert refusal(PoolingParams, pooling=None) == "pooling must be 'mean' or 'last', not None."
    assert refusal(PoolingParams, normalize=1) == "normalize must be True or False, not 1."


def test_beam_search() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=32)
    assert dataclasses.asdict(params) == {
        "beam_width": 4, "max_tokens": 32, "ignore_eos": False, "temperature": 0, "length_penalty": 1,
        "include_stop_str_in_output": False, "structured_outputs": None,
    }  # fmt: skip
    changed = dataclasses.replace(params, length_penalty=-10, temperature=2, structured_outputs=JSON)
    assert (changed.length_penalty, changed.temperature, changed.structured_outputs) == (-10, 2, JSON)


@pytest.mark.parametrize(
    ("field", "wrong", "allowed"),
    [
        *(("beam_width", wrong, "an integer from 1 to 16384") for wrong in (0, 16385, 2.0, True, None)),
        *(("max_tokens", wrong, "an integer from 1 to 2**63 - 1") for wrong in (0, 2**63, 2.0, True, None)),
        *(("temperature", wrong, "between 0 and 2") for wrong in (-0.1, 2.1, NAN, INF)),
        *(("temperature", wrong, "a number between 0 and 2") for wrong in (True, None, "1")),
        *(("length_penalty", wrong, "between -10 and 10") for wrong in (-10.5, 11, NAN, INF)),
        *(("length_penalty", wrong, "a number between -10 and 10") for wrong in (True, None, "1")),
        *((flag, wrong, "True or False") for flag in ("ignore_eos", "include_stop_str_in_output")
          for wrong in (0, 1, None, "yes")),
        ("structured_outputs", "json", "a StructuredOutputsParams"),
    ],
)  # fmt: skip
def test_beam_search_refuses_with_field_value_and_range(field: str, wrong: Any, allowed: str) -> None:
    message = refusal(BeamSearchParams, **{"beam_width": 2, "max_tokens": 8, field: wrong})
    assert message.startswith(f"{field} must be {allowed}, not {shown(wrong)}")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=5,
)


@given(field=st.sampled_from([field.name for field in dataclasses.fields(SamplingParams)]), value=ANYTHING)
def test_whatever_is_given_is_taken_or_refused(field: str, value: Any) -> None:
    try:
        params = SamplingParams(**{field: value})
    except ParamsError:
        assert field in refusal(SamplingParams, **{field: value})
        return
    assert dataclasses.replace(params) == params == pickle.loads(pickle.dumps(params))
