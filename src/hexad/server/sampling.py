"""The fields of a body that say how tokens are drawn: OpenAI's, vLLM's and llama.cpp's names for them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hexad.params import RepetitionDetectionParams, SamplingParams, StructuredOutputsParams
from hexad.server.errors import ApiError


class Body(BaseModel):
    """A request's body. Types are taken as they are, a number is no string; fields not known are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=())


class StructuredOutputs(Body):
    """vLLM's: what the text must match; exactly one."""

    json_schema: str | dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None

    def params(self) -> StructuredOutputsParams:
        """Raises ParamsError."""
        return StructuredOutputsParams(
            json=self.json_schema,
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
            json_object=self.json_object or None,
            structural_tag=self.structural_tag,
            whitespace_pattern=self.whitespace_pattern,
        )


class RepetitionDetection(Body):
    """vLLM's; see RepetitionDetectionParams."""

    max_pattern_size: int = 0
    min_pattern_size: int = 1
    min_count: int = 2


class SamplingFields(Body):
    """Fields of SamplingParams under their own names; None stands for the server's default.

    The bounds stand in the OpenAPI document, too; SamplingParams has the last word.
    """

    n: int | None = Field(None, ge=1, le=16384)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(None, ge=0)
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    structured_outputs: StructuredOutputs | None = None
    thinking_token_budget: int | None = Field(None, ge=-1)
    repetition_detection: RepetitionDetection | None = None

    typical_p: float | None = Field(None, gt=0, le=1)
    top_n_sigma: float | None = None
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=1)
    dry_multiplier: float | None = Field(None, ge=0, le=100)
    dry_base: float | None = Field(None, ge=1, le=100)
    dry_allowed_length: int | None = Field(None, ge=1)
    dry_penalty_last_n: int | None = Field(None, ge=-1)
    dry_sequence_breakers: list[str] | None = None
    repeat_last_n: int | None = Field(None, ge=-1)
    dynatemp_range: float | None = Field(None, ge=0, le=10)
    dynatemp_exponent: float | None = Field(None, ge=0, le=100)
    mirostat: int | None = Field(None, ge=0, le=2)
    mirostat_tau: float | None = Field(None, ge=0, le=100)
    mirostat_eta: float | None = Field(None, ge=0, le=1)
    samplers: list[str] | None = None

    def sampling_params(self, defaults: SamplingParams, **more: Any) -> SamplingParams:
        """SamplingParams with what was given; `more` goes before it, None excepted.

        Raises ParamsError for values out of range.
        """
        given = {name: getattr(self, name) for name in _SAME_NAME}
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.params()
        if self.repetition_detection is not None:
            given["repetition_detection"] = RepetitionDetectionParams(
                **self.repetition_detection.model_dump()
            )
        if self.seed is not None and self.seed < -1:  # OpenAI's are signed
            given["seed"] = self.seed % 2**64
        if given["stop"] in ("", []):  # clients send these for none
            given["stop"] = None
        given |= {name: value for name, value in more.items() if value is not None}
        return replace(defaults, **{name: value for name, value in given.items() if value is not None})


_SAME_NAME = frozenset(SamplingFields.model_fields) - {"structured_outputs", "repetition_detection"}


def response_format(
    value: dict[str, Any] | None, field: str = "response_format"
) -> StructuredOutputsParams | None:
    """OpenAI's `response_format`, or what stands in another `field`, as what the text must match; None for
    free text.

    Raises ApiError where it is malformed, ParamsError where its schema is.
    """
    if value is None:
        return None
    kind = value.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        schema = value.get("schema")  # llama.cpp's
        return StructuredOutputsParams(json=schema) if schema else StructuredOutputsParams(json_object=True)
    if kind == "json_schema":
        inner = value.get("json_schema", value)
        schema = inner.get("schema", inner.get("json_schema")) if isinstance(inner, dict) else None
        if not isinstance(schema, dict | bool):
            raise ApiError(
                400,
                f"{field} of type 'json_schema' must have its schema in "
                f"{'json_schema.' if field == 'response_format' else ''}schema.",
                param=field,
            )
        return StructuredOutputsParams(json=json.dumps(schema))
    if kind == "structural_tag":
        return StructuredOutputsParams(structural_tag=json.dumps(value))
    raise ApiError(
        400,
        f"{field}.type must be 'text', 'json_object', 'json_schema' or 'structural_tag', "
        f"not {str(kind)[:100]!r}.",
        param=field,
    )
