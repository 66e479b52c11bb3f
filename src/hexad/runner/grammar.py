"""Structured output: which tokens may come next, by llguidance, and masks computed beside the forward pass.

Nothing fails open: what cannot be enforced is refused when it is compiled, and a sequence whose grammar
breaks later (a limit of llguidance is met, or a token accepted that its mask forbade) gets masks without any.

What llguidance makes of each kind: regular expressions are those of Rust's regex crate, without look-around
and back references, and their words and digits are Unicode's. Properties of a JSON schema come in the order
in which it names them, and every February of the format "date" has 29 days. Lark is a dialect whose terminals
are greedy.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hexad.checks import shown
from hexad.errors import ParamsError
from hexad.params import StructuredOutputsParams
from hexad.runner.gbnf import escaped, gbnf_to_lark, is_gbnf
from hexad.runner.structural_tag import structural_tag_to_lark

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

    from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

    from hexad.checkpoint.tokenizer import Tokenizer

MAX_GRAMMAR_BYTES = 1 << 18
"""Longest grammar, as UTF-8: what llguidance compiles within seconds."""

MAX_REGEX_BYTES = 1 << 14
"""Longest regular expression: the time to compile a spiteful one grows with the square of its length."""

MAX_STEP_ITEMS = 500_000
"""Most items of the Earley parser for one mask: what it makes within some 25 ms. llguidance's default, a
tenth of that, is met by grammars of single characters with large vocabularies."""

_STACK_PER_BYTE = 1024
"""llguidance's compiler is recursive, and a stack that overflows ends the process. A level of recursion takes
up to 4 KiB, and in the grammar a definition of 8 bytes or more, which refers to the next one."""

CACHED_GRAMMARS = 32
"""Compiled grammars kept for requests that ask for the same again; a large one takes some megabytes."""

JSON_WHITESPACE = r" |\n[ \t]{0,32}"
"""Space between the parts of a JSON text: enough for every usual layout, but bounded, since a model in doubt
is fond of writing spaces without end."""

_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[ \n\r\t]+", *(f"{_CHARACTER}{{1,{most}}}" for most in (3, 6, 10, 30)), f"{_CHARACTER}+"]
"""Kinds of tokens that llguidance allows or refuses at once instead of one by one: JSON's white space, and
texts that may stand in its strings, by length, for strings that have but so many characters left. Measured on
Qwen's vocabulary: a quarter off the 99th percentile of llguidance's own three lengths, and more of them, each
a tree of its own to walk, gain nothing."""

_EXACT_INTEGER = 2**53  # llguidance computes with float64

_ANNOTATIONS = {"title", "description", "default", "examples", "$comment", "$schema", "$id"}
_NAMED_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
_VALUES = {"const", "enum"}
_STACK_SIZE = threading.Lock()  # it is one setting for the whole process

_NOT_CARRIED_OUT = re.compile(r"^\s*[\w-]+\s*\[[^\]\n]*\b(stop|temperature)\s*=", re.MULTILINE)


class GrammarCompiler:
    """Compiles what texts must match, for one model's vocabulary. Costs nothing before the first grammar.

    tokenizer: gives the tokenizer; called once. vocab_size: width of the logits, perhaps wider than the
    tokenizer's vocabulary. Methods may be called from any thread.
    """

    def __init__(self, tokenizer: Callable[[], Tokenizer], vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary: _Vocabulary | None = None
        self._matcher = lru_cache(maxsize=CACHED_GRAMMARS)(self._compile)

    def compile(self, spec: StructuredOutputsParams) -> Grammar:
        """A fresh state at the beginning of the text. The same grammar again costs next to nothing.

        Raises ParamsError, with the reason, for what does not compile, cannot be enforced or is too large.
        """
        return Grammar(self._matcher(spec).deep_copy(), self._load_vocabulary())

    def _load_vocabulary(self) -> _Vocabulary:
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = _Vocabulary(self._tokenizer(), self.vocab_size)
            return self._vocabulary

    def _compile(self, spec: StructuredOutputsParams) -> LLMatcher:
        from concurrent.futures import ThreadPoolExecutor

        vocabulary = self._load_vocabulary()
        try:
            field, grammar = _translate(spec, vocabulary.control_ids)
        except RecursionError as error:
            raise ParamsError("structured_outputs is nested too deeply.") from error
        _check_size(field, grammar)
        with ThreadPoolExecutor(1) as pool:
            with _STACK_SIZE:
                before = threading.stack_size((1 << 20) + len(grammar.encode()) * _STACK_PER_BYTE)
                try:
                    compiled = pool.submit(_compile, field, grammar, vocabulary)
                finally:
                    threading.stack_size(before)
            return compiled.result()


class Grammar:
    """How far one sequence has come in its grammar. Not thread-safe: one call at a time."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but an end-of-generation token can follow."""
        return self._ended or (self._matcher.is_stopped() and not self._matcher.is_error())

    @property
    def error(self) -> str | None:
        """Why the sequence cannot go on: a limit of llguidance was met, or a forbidden token accepted."""
        return _message(self._matcher.get_error()) if self._matcher.is_error() else None

    def fill_mask(self, out: NDArray[np.uint32]) -> None:
        """Sets the bits of the tokens that may come next, and clears all others.

        out: uint32 [⌈vocab_size / 32⌉], C-contiguous; token t is bit t % 32 of word t // 32. Where the text
        may end, all end-of-generation tokens are allowed, and nowhere else. After an error no token is.
        """
        matcher, vocabulary = self._matcher, self._vocabulary
        words = vocabulary.words
        assert out.dtype == np.uint32
        assert out.flags.c_contiguous
        assert out.size >= words
        if self.finished:
            out[:] = 0
            out[:words] = vocabulary.end_mask
            return
        matcher.unsafe_compute_mask_ptr(out.ctypes.data, words * 4)
        out[words:] = 0
        if matcher.is_error():  # llguidance would end the text here, as though it were complete
            out[:] = 0

    def accept(self, token_id: int) -> None:
        """Goes on by one token. Never raises; a token that the mask forbade leads to `error`."""
        if self._ended:
            return
        if token_id in self._vocabulary.eos_ids and (self.finished or self._matcher.is_accepting()):
            self._ended = True
        else:
            self._matcher.consume_token(token_id)

    def copy(self) -> Grammar:
        """The same state, to go on independently."""
        other = Grammar(self._matcher.deep_copy(), self._vocabulary)
        other._ended = self._ended
        return other


class MaskPool:
    """Fills masks in a background thread, while the engine's thread is in the native forward pass."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[None] | None = None

    def start(self, grammars: list[Grammar], out: NDArray[np.uint32]) -> None:
        """Begins to fill row i of `out`, uint32 [n, ⌈vocab_size / 32⌉], for grammar i. Follow it with `wait`
        before touching either."""
        assert self._pending is None, "start without wait"
        if not grammars:
            return
        if self._executor is None:
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(1, thread_name_prefix="hexad-masks")
        self._pending = self._executor.submit(_fill, grammars, out)

    def wait(self) -> None:
        """Returns when the masks are filled."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Ends the thread. The pool may be used again."""
        executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown()
        self._pending = None


def _fill(grammars: list[Grammar], out: NDArray[np.uint32]) -> None:
    for grammar, row in zip(grammars, out, strict=True):
        grammar.fill_mask(row)


class _Vocabulary:
    """A tokenizer as llguidance wants to have it: the attributes are those of its TokenizerWrapper.

    tokenizer: llguidance's own. words: length of its masks. end_mask: uint32 [words] of the end-of-generation
    tokens. control_ids: ids of the tokens that have no text of their own, by name.
    """

    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        from llguidance import LLTokenizer

        size = min(vocab_size, tokenizer.vocab_size)
        self.tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.eos_ids = frozenset(i for i in tokenizer.eos_ids if i < size)
        if not self.eos_ids:
            raise ParamsError(
                "structured_outputs needs a token that ends the text, and this model's vocabulary names none."
            )
        special = tokenizer.special_ids | self.eos_ids
        self.special_token_ids = sorted(i for i in special if i < size and self.tokens[i])
        self.eos_token_id = min(self.eos_ids)
        self.bos_token_id = tokenizer.bos_id
        self.control_ids = {self.tokens[i].decode("utf-8", "replace"): i for i in self.special_token_ids}
        self.words = (size + 31) // 32
        self.end_mask = np.zeros(self.words, np.uint32)
        for token_id in self.eos_ids:
            self.end_mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._encode = tokenizer.encode
        self._special = frozenset(self.special_token_ids)
        self.tokenizer: LLTokenizer = LLTokenizer(
            cast("TokenizerWrapper", self), eos_token=sorted(self.eos_ids), slices=_SLICES
        )

    def __call__(self, text: str) -> list[int]:
        """Tokens for a text that the grammar leaves no choice about; it must not raise.

        They are the tokenizer's own where these spell just this text: not where a control token's name stands
        in it, or where the tokenizer normalises it.
        """
        ids = self._encode(text, add_special=False)
        size = len(self.tokens)
        plain = all(i < size and i not in self._special for i in ids)
        if plain and b"".join(self.tokens[i] for i in ids) == text.encode():
            return ids
        return self.tokenizer.greedy_tokenize(text)


def _translate(spec: StructuredOutputsParams, control_ids: Mapping[str, int]) -> tuple[str, str]:
    """The field of `spec` that is set, and llguidance's grammar for it."""
    space = JSON_WHITESPACE if spec.whitespace_pattern is None else spec.whitespace_pattern

    def schema(value: Any) -> str:
        return json.dumps(_checked_schema(value) | {"x-guidance": {"whitespace_pattern": space}})

    if spec.json is not None:
        return "json", _json_grammar(schema(spec.json))
    if spec.json_object:
        return "json_object", _json_grammar(schema({"type": "object"}))
    if spec.regex is not None:
        _check_size("regex", spec.regex, MAX_REGEX_BYTES)
        return "regex", _regex_grammar(spec.regex)
    if spec.choice is not None:
        return "choice", _regex_grammar(_choice_regex(spec.choice))
    if spec.grammar is not None:
        _check_size("grammar", spec.grammar)
        if is_gbnf(spec.grammar):
            return "grammar", _lark_grammar(gbnf_to_lark(spec.grammar))
        _check_lark(spec.grammar)
        return "grammar", _lark_grammar(spec.grammar)
    assert spec.structural_tag is not None  # exactly one is given, says StructuredOutputsParams
    _check_size("structural_tag", spec.structural_tag)
    lark = structural_tag_to_lark(spec.structural_tag, control_ids, schema)
    return "structural_tag", _lark_grammar(lark)


def _compile(field: str, grammar: str, vocabulary: _Vocabulary) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(step_max_items=MAX_STEP_ITEMS)
    matcher = LLMatcher(vocabulary.tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise ParamsError(f"structured_outputs.{field} does not compile: {_message(matcher.get_error())}")
    if warnings := matcher.get_grammar_warnings():
        raise ParamsError(f"structured_outputs.{field} cannot be enforced: {_message('; '.join(warnings))}")
    # The first mask tells whether there is any text at all, and spares every copy its cost.
    matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error()
        why = "no text matches it" if reason.startswith("NoExtension") else _message(reason)
        raise ParamsError(f"structured_outputs.{field} cannot be followed: {why}.")
    return matcher


def _json_grammar(schema: str) -> str:
    return f'{{"grammars": [{{"json_schema": {schema}}}]}}'


def _lark_grammar(lark: str) -> str:
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _regex_grammar(regex: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def _choice_regex(choices: Sequence[str]) -> str:
    """A regular expression that matches just these texts."""
    _check_size("choice", "|".join(choices))
    return "|".join("".join(map(escaped, choice)) for choice in choices)


def _check_lark(lark: str) -> None:
    """Refuses what llguidance would take and then not hold to."""
    if found := _NOT_CARRIED_OUT.search(lark):
        raise ParamsError(f"structured_outputs.grammar: a rule's option {found[1]!r} is not supported.")
    for found in re.finditer(r"%json\s*", lark):
        try:
            schema, _ = json.JSONDecoder().raw_decode(lark, found.end())
        except ValueError as error:
            raise ParamsError(f"structured_outputs.grammar: the schema after %json: {error}.") from error
        _checked_schema(schema)


def _checked_schema(schema: Any) -> dict[str, Any]:
    """The schema as a dict, if it has nothing that llguidance would take and then not hold to."""
    if isinstance(schema, str):
        _check_size("json", schema)
        schema = json.loads(schema)
    if schema is True:
        return {}
    if not isinstance(schema, Mapping):
        raise ParamsError(
            f"structured_outputs.json must be a JSON schema that something matches, not {shown(schema)}."
        )
    if "x-guidance" in schema:
        raise ParamsError("structured_outputs.json: 'x-guidance' is not supported; use whitespace_pattern.")
    _check_schema(schema)
    return dict(schema)


def _check_schema(schema: Any) -> None:
    if isinstance(schema, list):
        for item in schema:
            _check_schema(item)
    elif not isinstance(schema, Mapping):
        _check_value(schema)
    else:
        # Keys that no `properties` names may come twice, and count twice.
        least, required = schema.get("minProperties", 0), schema.get("required", ())
        if (
            isinstance(least, int)
            and isinstance(required, list | tuple)
            and all(isinstance(name, str) for name in required)  # anything else is refused when compiled
            and least > max(1, len(set(required)))
        ):
            raise ParamsError(
                f"structured_outputs.json: minProperties {least} can only be enforced up to 1, or up to the "
                f"number of properties that are required (here {len(set(required))})."
            )
        for key, value in schema.items():
            if key in _VALUES:
                _check_value(value)
            elif key in _NAMED_SCHEMAS and isinstance(value, Mapping):
                for part in value.values():
                    _check_schema(part)
            elif key not in _ANNOTATIONS:
                _check_schema(value)


def _check_value(value: Any) -> None:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            _check_value(item)
    elif isinstance(value, int) and abs(value) > _EXACT_INTEGER:
        raise ParamsError(
            f"structured_outputs.json: integers beyond ±2**53 would not be exact, and {shown(value)} is one."
        )
    elif isinstance(value, float) and not math.isfinite(value):
        raise ParamsError(f"structured_outputs.json: {value} is no JSON number.")


def _check_size(field: str, text: str, most: int = MAX_GRAMMAR_BYTES) -> None:
    size = len(text.encode())
    if size > most:
        raise ParamsError(
            f"structured_outputs.{field} has {size:,} bytes; at most {most:,} are compiled. Simplify it."
        )


def _message(message: str) -> str:
    """llguidance's message without the dump of its state, and not longer than anyone reads."""
    text = " ".join(message.partition("\n<state>")[0].split()).rstrip(".")
    return text if len(text) <= 500 else f"{text[:500]}…"
