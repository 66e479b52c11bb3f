"""SamplingParams and its kin: how one request is turned into tokens."""

from __future__ import annotations

import copy
import json as jsonlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from operator import attrgetter
from typing import Any, Literal, get_args

from hexad.checks import check_choice, check_integer, check_number, shown
from hexad.errors import ParamsError

GREEDY_EPSILON = 1e-5
"""Temperatures below this mean greedy decoding, as in vLLM."""

MIN_TEMPERATURE = 0.01
"""Temperatures above 0 are raised to at least this, as in vLLM."""

SamplerName = Literal[
    "penalties", "dry", "temperature", "top_n_sigma", "typical_p", "min_p", "top_k", "top_p", "xtc"
]

DEFAULT_SAMPLERS: tuple[SamplerName, ...] = (
    "penalties", "dry", "temperature", "top_n_sigma", "typical_p", "min_p", "top_k", "top_p", "xtc",
)  # fmt: skip
"""vLLM's order, with llama.cpp's samplers where they do not change what vLLM's do."""

MAX_LOGPROB_TOKEN_IDS = 128
"""Most `logprob_token_ids` of one request, as in vLLM."""

logger = logging.getLogger(__name__)

Rule = Callable[[str, Any], Any]
"""(field, value) → the value as it is stored. Raises ParamsError where the value is wrong."""


class _Rules:
    """One rule for each field of a class of parameters."""

    def __init__(self, cls: type[Any], rules: Mapping[str, Rule]) -> None:
        defaults = {field.name: field.default for field in fields(cls)}
        assert defaults.keys() == rules.keys(), defaults.keys() ^ rules.keys()
        self._values = attrgetter(*defaults)
        self._rules = tuple((name, default, rules[name]) for name, default in defaults.items())

    def apply(self, params: object) -> None:
        """Checks all fields and stores each as its rule has it; defaults are right as they are."""
        for value, (name, default, rule) in zip(self._values(params), self._rules, strict=True):
            if value is not default:
                object.__setattr__(params, name, rule(name, value))


def _number(low: float, high: float, *, above: bool = False) -> Rule:
    """A number from low to high; with `above`, low itself is wrong."""
    allowed = f"above {low} and at most {high}" if above else f"between {low} and {high}"

    def rule(field: str, value: Any) -> Any:
        check_number(
            ParamsError, field, value, allowed, lambda v: low <= v <= high and not (above and v == low)
        )
        return value

    return rule


def _integer(low: int, bits: int = 0, *, high: int = 0, none: int | None = None) -> Rule:
    """An integer from low to high, or to 2**bits - 1. none: a number that says None."""
    top, shown_top = (2**bits - 1, f"2**{bits} - 1") if bits else (high, str(high))
    allowed = f"an integer from {low} to {shown_top}"

    def rule(field: str, value: Any) -> Any:
        check_integer(ParamsError, field, value, allowed, lambda v: low <= v <= top)
        return None if value == none else value

    return rule


def _optional(rule: Rule) -> Rule:
    """The same for a field whose default is not None, but which may be None."""
    return lambda field, value: None if value is None else rule(field, value)


def _choice(*choices: object) -> Rule:
    def rule(field: str, value: Any) -> Any:
        check_choice(ParamsError, field, value, choices)
        return value

    return rule


def _instance(cls: type[Any]) -> Rule:
    def rule(field: str, value: Any) -> Any:
        if not isinstance(value, cls):
            raise ParamsError(f"{field} must be a {cls.__name__}, not {shown(value)}.")
        return value

    return rule


def _text(field: str, value: Any) -> Any:
    try:
        valid = isinstance(value, str) and value.encode() != b""
    except UnicodeEncodeError:  # half of a surrogate pair
        valid = False
    if not valid:
        raise ParamsError(f"{field} must be a non-empty string of valid Unicode, not {shown(value)}.")
    return value


def _each(
    item: Rule,
    *,
    least: int = 0,
    most: int | None = None,
    repeats: Literal["keep", "drop", "refuse"] = "keep",
) -> Rule:
    """A sequence of values that follow one rule, stored as a tuple."""

    def rule(field: str, value: Any) -> Any:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes | bytearray):
            raise ParamsError(f"{field} must be a list, not {shown(value)}.")
        each = f"each of {field}"
        items = tuple(item(each, entry) for entry in value)
        if len(items) < least or (most is not None and len(items) > most):
            number = f"at least {least}" if most is None else f"{least} to {most}"
            raise ParamsError(f"{field} must have {number} entries, not {len(items)}: {shown(value)}.")
        if repeats == "keep":
            return items
        unique = tuple(dict.fromkeys(items))
        if repeats == "refuse" and len(unique) < len(items):
            raise ParamsError(f"{field} must have no entry twice, not {shown(value)}.")
        return unique

    return rule


_TEXTS = _each(_text)


def _stop(field: str, value: Any) -> Any:
    return _TEXTS(field, (value,) if isinstance(value, str) else value)


def _mapping(field: str, value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ParamsError(f"{field} must be a dict, not {shown(value)}.")
    return dict(value)


def _logit_bias(field: str, value: Any) -> Any:
    biases = {}
    for token, bias in _mapping(field, value).items():
        if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
            token = int(token)  # JSON has only strings for keys
        _TOKEN_ID(f"each key of {field}", token)
        biases[token] = max(-100.0, min(100.0, _BIAS(f"{field}[{token}]", bias)))
    return biases


def _json_schema(field: str, value: Any) -> Any:
    """A JSON schema, stored as its text, which no later change of the caller's dict can reach."""
    try:
        text = jsonlib.dumps(dict(value), allow_nan=False) if isinstance(value, Mapping) else value
        is_schema = isinstance(text, str) and isinstance(jsonlib.loads(_text(field, text)), dict | bool)
    except ParamsError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise ParamsError(f"{field} must be a JSON schema, not {shown(value)}: {error}.") from error
    if not is_schema:
        raise ParamsError(f"{field} must be a JSON schema, as a dict or as text, not {shown(value)}.")
    return text


_FLAG = _choice(True, False)
_TOKEN_ID = _integer(0, 31)
_LARGE = 1e30  # leaves room in float32, in which samplers compute
_BIAS = _number(-_LARGE, _LARGE)


class RequestOutputKind(Enum):
    """What a stream's outputs hold: all so far, only what is new, or nothing until the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the generated text must match; exactly one of these.

    json: a JSON schema, as text or as a dict, and stored as text. regex: a regular expression that the whole
    text matches. choice: the text is one of these. grammar: a grammar in Lark's or llama.cpp's (GBNF)
    notation. json_object: any JSON object.
    structural_tag: tags that begin constrained parts of a free text, as in vLLM.
    whitespace_pattern: for JSON, a regular expression for the space between its parts.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        _STRUCTURED_OUTPUTS.apply(self)
        given = [field for field in _CONSTRAINTS if getattr(self, field) is not None]
        if len(given) != 1:
            raise ParamsError(
                f"structured outputs must have exactly one of {', '.join(_CONSTRAINTS)}, "
                f"not {' and '.join(given) or 'none'}."
            )
        if self.whitespace_pattern is not None and given[0] not in ("json", "json_object"):
            raise ParamsError(
                f"whitespace_pattern must be None without json or json_object, "
                f"not {shown(self.whitespace_pattern)}."
            )


_STRUCTURED_OUTPUTS = _Rules(
    StructuredOutputsParams,
    {
        "json": _json_schema,
        "regex": _text,
        "choice": _each(_text, least=1),
        "grammar": _text,
        "json_object": _choice(True),
        "structural_tag": _text,
        "whitespace_pattern": _text,
    },
)
_CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetectionParams:
    """Ends a generation that has begun to repeat itself: when the last min_count runs of k tokens are equal,
    for some k from min_pattern_size to max_pattern_size. max_pattern_size 0 is off.
    """

    max_pattern_size: int = 0
    min_pattern_size: int = 1
    min_count: int = 2

    def __post_init__(self) -> None:
        _REPETITION_DETECTION.apply(self)
        if self.min_pattern_size == 0:  # vLLM's default, and its way to say 1
            object.__setattr__(self, "min_pattern_size", 1)
        if self.max_pattern_size == 0:
            return
        if self.min_count < 2:
            raise ParamsError(f"min_count must be at least 2, not {self.min_count}: once is no repetition.")
        if self.min_pattern_size > self.max_pattern_size:
            raise ParamsError(
                f"min_pattern_size must be at most max_pattern_size ({self.max_pattern_size}), "
                f"not {self.min_pattern_size}."
            )


_REPETITION_DETECTION = _Rules(
    RepetitionDetectionParams,
    {"max_pattern_size": _integer(0, 31), "min_pattern_size": _integer(0, 31), "min_count": _integer(0, 31)},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Parameters of one request. Names, defaults and rules are vLLM's; llama.cpp's samplers have their names.

    n: continuations of the prompt, 1 … 16384.
    presence_penalty, frequency_penalty: -2 … 2; taken from the logits of tokens that were generated: once,
        and for each time.
    repetition_penalty: 1e-30 … 1e30; divides (multiplies, where negative) the logits of tokens in prompt or
        output.
    temperature: 0 … 2. With 0 decoding is greedy, and nothing that truncates has an effect; between 0 and
        0.01 it is raised to 0.01, with a warning.
    top_k: keep the k most likely tokens, at most 2**31 - 1; 0 and -1 keep all.
    top_p: keep the smallest set of tokens whose probabilities reach top_p, in (0, 1].
    min_p: drop tokens less likely than min_p × the most likely one, in [0, 1].
    seed: fixes the random numbers of this request, 0 … 2**64 - 1; None and -1 draw a fresh seed.
    stop: strings that end the text, which is cut before them unless include_stop_str_in_output.
    stop_token_ids: tokens that end it, and stay in token_ids.
    ignore_eos: go on past end-of-generation tokens (for benchmarks).
    max_tokens: most tokens to generate; None means up to the end of the context.
    min_tokens: no end of generation and no stop before this many.
    logprobs: report the logprobs of the drawn and of this many likeliest tokens; -1 is the whole vocabulary.
    prompt_logprobs: the same for the prompt's tokens.
    logprob_token_ids: report the logprobs of these tokens, too; at most 128.
    prompt_logprob_token_ids, prompt_logprob_start: report the logprobs of these tokens for the prompt tokens
        that follow position prompt_logprob_start and later ones.
    detokenize: make text; without it `text` is "", and stop strings are refused.
    skip_special_tokens: leave control tokens out of the text.
    spaces_between_special_tokens: put spaces between special tokens that are shown.
    logit_bias: token id → number added to its logit, clamped to ±100.
    allowed_token_ids: draw no others. banned_token_ids: never draw these.
    bad_words: texts that must not be generated.
    structured_outputs: what the text must match.
    thinking_token_budget: most tokens between <think> and </think>, which is then written for the model;
        -1: no limit.
    repetition_detection: end a generation that repeats itself.
    output_kind: what streamed outputs hold.
    skip_reading_prefix_cache: compute the whole prompt; None: only where the outcome needs it.
    extra_args: for extensions; hexad does not read it.

    typical_p: keep the tokens whose surprise is nearest the entropy until they reach this probability, in
        (0, 1] (Meister et al. 2022, arXiv:2202.00666).
    top_n_sigma: keep logits within n standard deviations of the largest (Tang et al. 2024, arXiv:2411.07641);
        ≤ 0: off.
    xtc_probability, xtc_threshold: with this probability drop all tokens at least as likely as the threshold
        but the least likely of them; a threshold above 0.5 is off.
    dry_multiplier, dry_base, dry_allowed_length, dry_penalty_last_n, dry_sequence_breakers: DRY takes
        multiplier × base ** (length − allowed_length) from tokens that would prolong a repetition of at least
        allowed_length tokens within the last_n (-1: all); no repetition reaches across a token whose text has
        a breaker in it. Multiplier 0: off.
    repeat_last_n: how many of the last tokens the penalties look at; -1: all, 0: none.
    dynatemp_range, dynatemp_exponent: dynamic temperature, temperature ± range by (entropy / largest entropy)
        ** exponent. Range 0: off.
    mirostat, mirostat_tau, mirostat_eta: 1 or 2 instead of everything that truncates (Basu et al. 2021,
        arXiv:2007.14966). 0: off.
    samplers: their order; those left out are not applied.

    Raises ParamsError naming the field, its value and the range.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_token_ids: Sequence[int] | None = None
    prompt_logprob_start: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    banned_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_token_budget: int | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool | None = None
    extra_args: Mapping[str, Any] | None = None

    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_sequence_breakers: Sequence[str] = ("\n", ":", '"', "*")
    repeat_last_n: int = -1
    dynatemp_range: float = 0.0
    dynatemp_exponent: float = 1.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    samplers: Sequence[SamplerName] = DEFAULT_SAMPLERS

    def __post_init__(self) -> None:
        _SAMPLING.apply(self)
        _raise_tiny_temperature(self)
        if self.greedy:
            if self.n > 1:
                raise ParamsError(f"n must be 1 where temperature is 0, not {self.n}: all would be the same.")
            for field, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)):
                object.__setattr__(self, field, off)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParamsError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), not {self.min_tokens}."
            )
        if self.stop and not self.detokenize:
            raise ParamsError(
                f"stop must be None where detokenize is False, not {shown(self.stop)}: without text there "
                f"is nothing to find it in."
            )
        if self.logprob_token_ids is not None and self.logprobs not in (None, len(self.logprob_token_ids)):
            raise ParamsError(
                f"logprobs must be None or as many as logprob_token_ids ({len(self.logprob_token_ids)}), "
                f"not {self.logprobs}."
            )
        if self.prompt_logprob_start is not None and self.prompt_logprob_token_ids is None:
            raise ParamsError(
                f"prompt_logprob_start must be None without prompt_logprob_token_ids, "
                f"not {self.prompt_logprob_start}."
            )

    def check_vocabulary(self, vocab_size: int, max_logprobs: int) -> None:
        """Raises ParamsError for token ids outside a vocabulary of vocab_size tokens, and for more logprobs
        per position than max_logprobs (-1: the whole vocabulary) or than there are tokens.
        """
        for field in _TOKEN_ID_FIELDS:
            largest = max(getattr(self, field) or (), default=-1)
            if largest >= vocab_size:
                raise ParamsError(
                    f"{field} must be of the model's vocabulary, token ids from 0 to {vocab_size - 1}, "
                    f"not {largest}."
                )
        most = vocab_size if max_logprobs == -1 else min(max_logprobs, vocab_size)
        for field in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, field)
            if asked is not None and (vocab_size if asked == -1 else asked) > most:
                whole = f", the whole vocabulary of {vocab_size}" if asked == -1 else ""
                raise ParamsError(
                    f"{field} must be at most {most}, not {asked}{whole}. "
                    f"The engine's max_logprobs is {max_logprobs}."
                )

    def clone(self) -> SamplingParams:
        """A deep copy."""
        return copy.deepcopy(self)

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY_EPSILON

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, empty for None."""
        return tuple(self.stop or ())  # `stop` is no string any more


_SAMPLING = _Rules(
    SamplingParams,
    {
        "n": _integer(1, high=16384),
        "presence_penalty": _number(-2, 2),
        "frequency_penalty": _number(-2, 2),
        "repetition_penalty": _number(1e-30, _LARGE),
        "temperature": _number(0, 2),
        "top_p": _number(0, 1, above=True),
        "top_k": _integer(-1, 31),
        "min_p": _number(0, 1),
        "seed": _integer(-1, 64, none=-1),
        "stop": _stop,
        "stop_token_ids": _each(_TOKEN_ID, repeats="drop"),
        "include_stop_str_in_output": _FLAG,
        "ignore_eos": _FLAG,
        "max_tokens": _optional(_integer(1, 63)),
        "min_tokens": _integer(0, 63),
        "logprobs": _integer(-1, 31),
        "prompt_logprobs": _integer(-1, 31),
        "logprob_token_ids": _each(_TOKEN_ID, least=1, most=MAX_LOGPROB_TOKEN_IDS, repeats="refuse"),
        "prompt_logprob_token_ids": _each(_TOKEN_ID, least=1, repeats="refuse"),
        "prompt_logprob_start": _integer(0, 31),
        "detokenize": _FLAG,
        "skip_special_tokens": _FLAG,
        "spaces_between_special_tokens": _FLAG,
        "logit_bias": _logit_bias,
        "allowed_token_ids": _each(_TOKEN_ID, least=1, repeats="drop"),
        "banned_token_ids": _each(_TOKEN_ID, repeats="drop"),
        "bad_words": _TEXTS,
        "structured_outputs": _instance(StructuredOutputsParams),
        "thinking_token_budget": _integer(-1, 63, none=-1),
        "repetition_detection": _instance(RepetitionDetectionParams),
        "output_kind": _instance(RequestOutputKind),
        "skip_reading_prefix_cache": _FLAG,
        "extra_args": _mapping,
        "typical_p": _number(0, 1, above=True),
        "top_n_sigma": _number(-_LARGE, _LARGE),
        "xtc_probability": _number(0, 1),
        "xtc_threshold": _number(0, 1),
        "dry_multiplier": _number(0, 100),
        "dry_base": _number(1, 100),
        "dry_allowed_length": _integer(1, 31),
        "dry_penalty_last_n": _integer(-1, 31),
        "dry_sequence_breakers": _TEXTS,
        "repeat_last_n": _integer(-1, 31),
        "dynatemp_range": _number(0, 10),
        "dynatemp_exponent": _number(0, 100),
        "mirostat": _integer(0, high=2),
        "mirostat_tau": _number(0, 100),
        "mirostat_eta": _number(0, 1),
        "samplers": _each(_choice(*get_args(SamplerName)), repeats="refuse"),
    },
)
_TOKEN_ID_FIELDS = (
    "stop_token_ids", "logprob_token_ids", "prompt_logprob_token_ids", "logit_bias", "allowed_token_ids",
    "banned_token_ids",
)  # fmt: skip


def _raise_tiny_temperature(params: SamplingParams | BeamSearchParams) -> None:
    if 0 < params.temperature < MIN_TEMPERATURE:
        logger.warning("temperature %s is raised to %s; 0 is greedy.", params.temperature, MIN_TEMPERATURE)
        object.__setattr__(params, "temperature", MIN_TEMPERATURE)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingParams:
    """How a prompt's hidden states, after the last norm, become one embedding.

    pooling: "mean" of all, summed in the order of the tokens, or that of the "last" token. normalize: to
    length 1.
    """

    pooling: Literal["mean", "last"] = "mean"
    normalize: bool = True

    def __post_init__(self) -> None:
        _POOLING.apply(self)


_POOLING = _Rules(PoolingParams, {"pooling": _choice("mean", "last"), "normalize": _FLAG})


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Parameters of a beam search.

    beam_width: beams kept at each step, and returned. max_tokens: most tokens of a beam. ignore_eos: go on
    past end-of-generation tokens. temperature: as in vLLM, beams are ranked by the model's own logprobs
    whatever it is. length_penalty: beams are ranked by cum_logprob / length ** length_penalty.
    include_stop_str_in_output: keep the end-of-generation token's text. structured_outputs: refused by the
    engine, which cannot hold beams to a grammar.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        _BEAM_SEARCH.apply(self)
        _raise_tiny_temperature(self)


_BEAM_SEARCH = _Rules(
    BeamSearchParams,
    {
        "beam_width": _integer(1, high=16384),
        "max_tokens": _integer(1, 63),
        "ignore_eos": _FLAG,
        "temperature": _number(0, 2),
        "length_penalty": _number(-10, 10),
        "include_stop_str_in_output": _FLAG,
        "structured_outputs": _instance(StructuredOutputsParams),
    },
)
