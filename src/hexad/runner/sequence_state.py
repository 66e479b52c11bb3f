"""SequenceState: what a sequence's draws and reports depend on beside its row in the sampler's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hexad.engine.step import SequenceSpec
from hexad.params import PoolingParams, SamplingParams

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer
    from hexad.runner.grammar import Grammar

Mask = NDArray[np.uint32]
"""uint32 [⌈vocab / 32⌉]: bit t % 32 of word t // 32 stands for token t."""

_NO_TOKENS = np.empty(0, np.int32)


class Vocabulary:
    """What a sampler must know of a model's tokens. The tokenizer is asked for when it is first needed.

    size: width of the logits. num_words: length of a mask.
    """

    def __init__(self, size: int, tokenizer: Callable[[], Tokenizer]) -> None:
        self.size = size
        self.num_words = -(-size // 32)
        self._tokenizer = tokenizer
        self._breakers = lru_cache(maxsize=16)(self._find_breakers)

    @property
    def eos_ids(self) -> frozenset[int]:
        """The tokens that end a generation."""
        return self._tokenizer().eos_ids

    @cached_property
    def think_markers(self) -> tuple[list[int], list[int]]:
        """The tokens that open and close a model's thinking."""
        opening, closing = (self._encode(marker) for marker in ("<think>", "</think>"))
        return opening, closing

    def count(self, logprobs: int) -> int:
        """How many logprobs a request asks for; −1 is the whole vocabulary."""
        return self.size if logprobs == -1 else min(logprobs, self.size)

    def mask(self, token_ids: Iterable[int]) -> Mask:
        """The mask of these tokens."""
        bits = np.zeros(32 * self.num_words, bool)
        bits[list(token_ids)] = True
        return np.packbits(bits, bitorder="little").view("<u4")

    def breakers(self, texts: Sequence[str]) -> Mask:
        """The mask of the tokens with any of these texts in them."""
        return self._breakers(tuple(texts))

    def _find_breakers(self, texts: tuple[str, ...]) -> Mask:
        return self.mask(self._tokenizer().tokens_containing(texts))

    def prepare(self, params: SamplingParams) -> None:
        """Does now what would hold up the step in which a sequence begins, and is kept."""
        if _has_dry(params) and params.dry_sequence_breakers:
            self.breakers(params.dry_sequence_breakers)

    def bad_words(self, words: Sequence[str]) -> list[list[int]]:
        """The tokens of each word as it begins a text, and as it follows a space."""
        spelt = (self._encode(space + word.lstrip()) for word in words for space in ("", " "))
        return [
            list(tokens) for tokens in dict.fromkeys(map(tuple, spelt)) if tokens and max(tokens) < self.size
        ]

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer().encode(text, add_special=False)


class History:
    """A sequence's tokens, int32, prompt first."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._length = len(prompt_token_ids)
        self._tokens = np.empty(self._length + 64, np.int32)
        self._tokens[: self._length] = prompt_token_ids

    @property
    def tokens(self) -> NDArray[np.int32]:
        """A view, good until the next append."""
        return self._tokens[: self._length]

    def append(self, token_id: int) -> None:
        if self._length == len(self._tokens):
            self._tokens = np.concatenate([self._tokens, np.empty_like(self._tokens)])
        self._tokens[self._length] = token_id
        self._length += 1

    def ends_with(self, token_ids: Sequence[int], start: int = 0) -> bool:
        """Whether the tokens from position `start` on end with these."""
        first = self._length - len(token_ids)
        return first >= start and self._tokens[first : self._length].tolist() == list(token_ids)


class ThinkingBudget:
    """Follows a sequence's <think> … </think>, and says what must come once the budget between them is spent.

    markers: the tokens of <think> and of </think>. history: the sequence's own, to which it appends.
    """

    def __init__(self, budget: int, markers: tuple[list[int], list[int]], history: History) -> None:
        self.budget = budget
        self.opening, self.closing = markers
        self._history = history
        self._start: int | None = None  # position of the first token after an open <think>
        self._longest = max(map(len, markers))
        tokens: list[int] = history.tokens.tolist()
        for length in range(1, len(tokens) + 1):
            self._follow(tokens[max(0, length - self._longest) : length], length)

    def accept(self) -> None:
        """Takes note of the token that was just appended to the history."""
        tokens = self._history.tokens
        self._follow(tokens[-self._longest :].tolist(), len(tokens))

    def forced(self) -> int | None:
        """The token that must come next, if one must: the rest of </think> where it has been begun."""
        if self._start is None or len(self._history.tokens) - self._start < self.budget:
            return None
        begun = range(len(self.closing) - 1, 0, -1)
        written = next((n for n in begun if self._history.ends_with(self.closing[:n], self._start)), 0)
        return self.closing[written]

    def _follow(self, last_tokens: list[int], length: int) -> None:
        marker = self.opening if self._start is None else self.closing
        if last_tokens[-len(marker) :] == marker:
            self._start = length if self._start is None else None


class Bias:
    """What is added to logits, by token id, as a SampleBatch has it: ids int32 and values float32."""

    def __init__(self, by_token: Mapping[int, float]) -> None:
        self.ids = np.fromiter(by_token.keys(), np.int32, len(by_token))
        self.values = np.fromiter(by_token.values(), np.float32, len(by_token))

    def forbid(self, token_ids: Iterable[int]) -> Bias:
        """The same with −∞ for these tokens."""
        both = dict(zip(self.ids.tolist(), self.values.tolist(), strict=True))
        return Bias(both | dict.fromkeys(token_ids, -np.inf))


class SequenceState:
    """What a row of the table cannot say of a sequence.

    reports: positions still to be reported on: those whose next token is in the prompt and its logprob
        wanted, or those to be pooled. pooled: sum of the hidden states so far, float64 [hidden size].
    history, thinking, grammar, allowed, breakers: None where the params need none.
    mirostat: a draw changes its mu.
    bias: added to the logits; early_bias: instead of it before position min_end: min_tokens forbids an end.
    bad_words: of two tokens and more; the bias forbids the shorter ones.
    asks: int32, ids whose logprobs are wanted with each token drawn. prompt_asks: the same after the prompt's
        positions from prompt_asks_start on. num_prompt_logprobs: likeliest tokens to report there.
    """

    def __init__(self, spec: SequenceSpec, vocabulary: Vocabulary, grammar: Grammar | None) -> None:
        self.spec = spec
        self.vocabulary = vocabulary
        self.grammar = grammar
        self.reports = range(0)
        self.pooled: NDArray[np.float64] | None = None
        self.history: History | None = None
        self.thinking: ThinkingBudget | None = None
        self.allowed: Mask | None = None
        self.breakers: Mask | None = None
        self.mirostat = False
        self.bias = self.early_bias = Bias({})
        self.min_end = 0
        self.bad_words: list[list[int]] = []
        self.asks = self.prompt_asks = _NO_TOKENS
        self.prompt_asks_start = 0
        self.num_prompt_logprobs = 0
        params, num_prompt = spec.params, len(spec.prompt_token_ids)
        if isinstance(params, PoolingParams):
            self.reports = range(0 if params.pooling == "mean" else num_prompt - 1, num_prompt)
        else:
            self._set_reports(params, num_prompt)
            self._set_draws(params, num_prompt)

    def _set_reports(self, params: SamplingParams, num_prompt: int) -> None:
        if params.logprob_token_ids:
            self.asks = np.array(params.logprob_token_ids, np.int32)
        if self.spec.index:  # its prompt was reported on before a sibling drew the first token
            return
        if params.prompt_logprob_token_ids:
            self.prompt_asks = np.array(params.prompt_logprob_token_ids, np.int32)
            self.prompt_asks_start = params.prompt_logprob_start or 0
            self.reports = range(self.prompt_asks_start, num_prompt - 1)
        if params.prompt_logprobs is not None:
            self.num_prompt_logprobs = self.vocabulary.count(params.prompt_logprobs)
            self.reports = range(num_prompt - 1)

    def _set_draws(self, params: SamplingParams, num_prompt: int) -> None:
        budget = params.thinking_token_budget
        thinks = budget is not None and budget >= 0
        bad_words = self.vocabulary.bad_words(params.bad_words) if params.bad_words else []
        self.bad_words = [tokens for tokens in bad_words if len(tokens) > 1]
        if thinks or self.bad_words or _penalises(params) or _has_dry(params):
            self.history = History(self.spec.prompt_token_ids)
        if thinks:
            assert budget is not None
            assert self.history is not None
            self.thinking = ThinkingBudget(budget, self.vocabulary.think_markers, self.history)
        if params.allowed_token_ids is not None:
            self.allowed = self.vocabulary.mask(params.allowed_token_ids)
        if _has_dry(params) and params.dry_sequence_breakers:
            self.breakers = self.vocabulary.breakers(params.dry_sequence_breakers)
        self.mirostat = params.mirostat != 0
        banned = [*(params.banned_token_ids or ()), *(tokens[0] for tokens in bad_words if len(tokens) == 1)]
        self.bias = Bias(params.logit_bias or {}).forbid(banned)
        if params.min_tokens:
            self.min_end = num_prompt + params.min_tokens
            self.early_bias = self.bias.forbid(self.vocabulary.eos_ids.union(params.stop_token_ids or ()))

    @property
    def is_plain(self) -> bool:
        """Whether the table says it all."""
        return (
            isinstance(self.spec.params, SamplingParams)
            and self.history is None
            and self.grammar is None
            and self.allowed is None
            and not (self.reports or self.bias.ids.size or self.min_end or self.mirostat or self.asks.size)
        )

    def bias_at(self, position: int) -> Bias:
        """What is added to the logits of the token being drawn."""
        bias = self.early_bias if position < self.min_end else self.bias
        if self.history is None or not self.bad_words:
            return bias
        start = len(self.spec.prompt_token_ids)
        ends = [word[-1] for word in self.bad_words if self.history.ends_with(word[:-1], start)]
        return bias.forbid(ends) if ends else bias

    def mask(self) -> Mask | None:
        """The tokens that may be drawn, as far as a grammar has no say in it; None: all."""
        token_id = self.thinking.forced() if self.thinking is not None else None
        if token_id is None:
            return self.allowed
        forced = self.vocabulary.mask([token_id])
        return forced if self.allowed is None else forced & self.allowed

    def why_none(self, position: int) -> str | None:
        """Why nothing was left to draw at this position; None if nothing is forbidden."""
        if self.grammar is not None and self.grammar.error is not None:
            return f"The text cannot follow structured_outputs any further: {self.grammar.error}"
        params = self.spec.params
        assert isinstance(params, SamplingParams)
        limits = {
            "structured_outputs": self.grammar is not None,
            "allowed_token_ids": self.allowed is not None,
            "banned_token_ids": bool(params.banned_token_ids),
            "bad_words": bool(params.bad_words),
            f"min_tokens ({params.min_tokens})": position < self.min_end,
            f"thinking_token_budget ({params.thinking_token_budget})": self.thinking is not None,
        }
        names = [name for name, holds in limits.items() if holds]
        if not names:
            return None
        what = f"{' and '.join(names)} {'forbids' if len(names) == 1 else 'together forbid'} every token"
        return f"Nothing is left to draw: {what} whose logit is a number. Loosen what contradicts."

    def prompt_asks_at(self, position: int) -> NDArray[np.int32]:
        """The ids to report after a position of the prompt: first the token that stands there."""
        asked = self.prompt_asks if position >= self.prompt_asks_start else _NO_TOKENS
        return np.concatenate([[self.spec.prompt_token_ids[position + 1]], asked], dtype=np.int32)

    def pool(self, hidden: NDArray[np.float32]) -> None:
        """Adds a hidden state, float32 [hidden size]: one by one, so that chunks change no bit of the sum."""
        if self.pooled is None:
            self.pooled = np.zeros(len(hidden))
        self.pooled += hidden

    def embedding(self) -> NDArray[np.float64]:
        """What the hidden states come to, float64 [hidden size]."""
        params = self.spec.params
        assert self.pooled is not None
        assert isinstance(params, PoolingParams)
        mean = self.pooled / (len(self.spec.prompt_token_ids) if params.pooling == "mean" else 1)
        length = np.sqrt(np.sum(mean * mean)) if params.normalize else 0
        return mean / length if length else mean

    def accept(self, token_id: int) -> None:
        """Takes note of the token drawn."""
        if self.history is not None:
            self.history.append(token_id)
        if self.thinking is not None:
            self.thinking.accept()
        if self.grammar is not None:
            self.grammar.accept(token_id)


def _penalises(params: SamplingParams) -> bool:
    neutral = params.repetition_penalty == 1 and params.presence_penalty == params.frequency_penalty == 0
    return not neutral and params.repeat_last_n != 0 and "penalties" in params.samplers


def _has_dry(params: SamplingParams) -> bool:
    return params.dry_multiplier != 0 and params.dry_penalty_last_n != 0 and "dry" in params.samplers
