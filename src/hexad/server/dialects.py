"""What the APIs of llama.cpp's kin (llama-server, KoboldAI, Ollama) have in common: how samplers are asked
for, and what is reported of time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from hexad.errors import ParamsError
from hexad.outputs import CompletionOutput, RequestOutput
from hexad.params import SamplingParams, StructuredOutputsParams
from hexad.server.errors import ApiError
from hexad.server.sampling import Body


class CommonFields(Body):
    """Fields that llama.cpp and its kin call by the names of SamplingParams; None stands for the default.

    Where there are no bounds, `sampling_params` knows what is beyond them.
    """

    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    temperature: float | None = Field(None, le=2)
    top_p: float | None = None
    top_k: int | None = Field(None, lt=2**31)
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dry_multiplier: float | None = Field(None, ge=0, le=100)
    dry_base: float | None = Field(None, le=100)
    dry_allowed_length: int | None = Field(None, ge=1, lt=2**31)
    dry_penalty_last_n: int | None = Field(None, ge=-1, lt=2**31)
    repeat_last_n: int | None = Field(None, ge=-1, lt=2**31)
    dynatemp_range: float | None = Field(None, le=10)
    dynatemp_exponent: float | None = Field(None, ge=0, le=100)
    mirostat: int | None = None
    mirostat_tau: float | None = Field(None, ge=0, le=100)
    mirostat_eta: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, lt=2**64)
    stop: str | list[str] | None = None


LLAMA_DEFAULTS = SamplingParams(
    temperature=0.8,
    top_k=40,
    top_p=0.95,
    min_p=0.05,
    repeat_last_n=64,
    max_tokens=None,
    samplers=(
        "penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature",
    ),
)  # fmt: skip
"""What llama-server does where it is not told otherwise. A request goes on to the end of the context."""

_LEAST = 1e-9  # of a share of probability: only the likeliest token is left


def _within(low: float, high: float) -> Callable[[Any], Any]:
    def limit(value: Any) -> Any:
        return low if value < low else high if value > high else value  # NaN stays, and is refused later

    return limit


_RULES: Mapping[str, Callable[[Any], Any]] = {
    "temperature": lambda value: 0.0 if value < 0 else value,
    "top_k": lambda value: max(0, value),
    "top_p": _within(_LEAST, 1.0),
    "typical_p": _within(_LEAST, 1.0),
    "min_p": _within(0.0, 1.0),
    "xtc_probability": _within(0.0, 1.0),
    "xtc_threshold": _within(0.0, 1.0),
    "dry_base": lambda value: None if value < 1 else value,
    "dynatemp_range": lambda value: 0.0 if value < 0 else value,
    "mirostat": lambda value: value if value in (1, 2) else 0,
    "seed": lambda value: -1 if value < 0 or value == 2**32 - 1 else value,
    "stop": lambda value: [text for text in ([value] if isinstance(value, str) else value) if text],
}
"""What is off, or greedy, or random beyond a bound in llama.cpp, and refused in vLLM."""


def sampling_params(fields: CommonFields, defaults: SamplingParams, **more: Any) -> SamplingParams:
    """SamplingParams by llama.cpp's rules: what is out of a sampler's range turns it off.

    more: those whose names differ, and what else is to be set; None leaves the default.

    Raises ParamsError for values that mean nothing.
    """
    given = {name: getattr(fields, name) for name in CommonFields.model_fields}
    given |= {name: value for name, value in more.items() if value is not None}
    for name, rule in _RULES.items():
        if given[name] is not None:
            given[name] = rule(given[name])
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


def refuse(body: Body, neutral: Mapping[str, Sequence[Any]]) -> None:
    """Raises ApiError for a field that asks for what is not done here: a value that is not one of its neutral
    ones (None is, always)."""
    for name, values in neutral.items():
        value = getattr(body, name)
        if value is not None and value not in values:
            shown = " or ".join(json.dumps(one) for one in values)
            raise ApiError(
                400, f"{name} is not supported here; leave it out{f', or give {shown}' if shown else ''}.",
                param=name,
            )  # fmt: skip


def constraint(grammar: str | None, schema: Any) -> StructuredOutputsParams | None:
    """What a text must match, by a grammar in GBNF ("": none) or else a JSON schema (None: none).

    Raises ApiError for both at once, ParamsError for a schema that is none.
    """
    if schema is not None:
        if grammar:
            raise ApiError(400, "grammar and json_schema exclude each other.", param="grammar")
        if not isinstance(schema, dict | bool):
            raise ParamsError("json_schema must be a JSON schema: an object, or true or false.")
        return StructuredOutputsParams(json=json.dumps(schema))
    return StructuredOutputsParams(grammar=grammar) if grammar else None


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a request took so far. Times in seconds; numbers of tokens.

    total: since it arrived. prompt: from its first step to its first token. generation: since then. cached:
    tokens of the prompt that the prefix cache had. computed: the others.
    """

    total: float
    prompt: float
    generation: float
    cached: int
    computed: int
    generated: int

    @classmethod
    def of(cls, output: RequestOutput, generated: int) -> Timings:
        """generated: tokens so far."""
        metrics = output.metrics
        assert metrics is not None
        end = metrics.finished_time or time.monotonic()
        scheduled = end if metrics.first_scheduled_time is None else metrics.first_scheduled_time
        first = end if metrics.first_token_time is None else metrics.first_token_time
        return cls(
            end - metrics.arrival_time,
            first - scheduled,
            end - first,
            output.num_cached_tokens,
            len(output.prompt_token_ids) - output.num_cached_tokens,
            generated,
        )


def finish_reason(completion: CompletionOutput) -> str | None:
    """OpenAI's two reasons, which Ollama and KoboldAI have, too."""
    return "stop" if completion.finish_reason == "repetition" else completion.finish_reason
