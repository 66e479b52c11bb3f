"""An executor without a model, for tests of the engine.

It keeps a paged "KV cache" of token ids, writes what a step computes through the block tables, and reads
every sequence back through them. The next token is a hash of all tokens read back, of the request's seed and
of the sequence's index, so a block given to two sequences, a token lost or computed twice, or a wrong
position changes what comes out.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import Any

from hexad.config import BLOCK_TOKENS
from hexad.engine.step import ScheduledStep, SequenceSpec, StepCost, StepResult, TokenLogprobs
from hexad.errors import ParamsError
from hexad.params import PoolingParams, SamplingParams

FORBIDDEN_SEED = 666
"""`check` refuses this seed, as a real executor refuses a grammar."""


def next_token(token_ids: list[int], seed: int, vocab_size: int, index: int = 0) -> int:
    """The fake model: the token after `token_ids`, a pure function of them, the seed and the index."""
    data = repr((token_ids, len(token_ids), seed, index)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) % vocab_size


def logprob_of(token_ids: list[int], token_id: int, vocab_size: int) -> float:
    """The fake model's logprob of a token after `token_ids`; they sum to one."""
    weights = [1 + next_token(token_ids, t, 997) for t in range(vocab_size)]
    return math.log(weights[token_id] / sum(weights))


def likeliest(token_ids: list[int], count: int, vocab_size: int) -> TokenLogprobs:
    """The fake model's `count` likeliest tokens."""
    weights = [1 + next_token(token_ids, t, 997) for t in range(vocab_size)]
    order = sorted(range(vocab_size), key=lambda t: (-weights[t], t))[:count]
    logprobs = [math.log(weights[t] / sum(weights)) for t in order]
    return TokenLogprobs(order, logprobs, [1 + sum(w > weights[t] for w in weights) for t in order])


def generate_alone(
    prompt: list[int],
    *,
    seed: int,
    max_len: int,
    stop_ids: frozenset[int],
    vocab_size: int,
    index: int = 0,
) -> tuple[list[int], str]:
    """What a sequence must come to, whatever runs beside it: its new tokens and the finish reason."""
    token_ids = list(prompt)
    while len(token_ids) < max_len:
        token_ids.append(next_token(token_ids, seed, vocab_size, index))
        if token_ids[-1] in stop_ids:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


class ViolationError(BaseException):
    """The engine broke a rule of steps. No Exception, for those are what steps may fail with."""


class FakeExecutor:
    """Keeps the steps it was given in `steps`, as they were (if `keep`), and `specs` of the sequences it was
    told of.

    `fail_next` makes the next step raise; sequences whose ids are in `broken` get errors instead of tokens;
    while it is `late`, it gives up what it may.
    """

    step_cost = StepCost(100_000_000, 100_000_000, 30_000_000, 20_000, 20_000)

    def __init__(self, *, kv_blocks: int, vocab_size: int, keep: bool = True) -> None:
        self.kv_blocks = kv_blocks
        self.vocab_size = vocab_size
        self.keep = keep
        self.steps: list[ScheduledStep] = []
        self.specs: dict[int, SequenceSpec] = {}
        self.broken: set[int] = set()
        self.fail_next = False
        self.late = False
        self.asleep = False
        self._cache: list[int | None] = [None] * (kv_blocks * BLOCK_TOKENS)

    def check(self, params: SamplingParams | PoolingParams) -> None:
        if isinstance(params, SamplingParams) and params.seed == FORBIDDEN_SEED:
            raise ParamsError(f"seed must not be {FORBIDDEN_SEED}.")

    def sleep(self) -> None:
        assert not self.specs
        self.asleep = True
        self._cache = []

    def wake(self) -> None:
        self.asleep = False
        self._cache = [None] * (self.kv_blocks * BLOCK_TOKENS)

    def execute(self, step: ScheduledStep) -> StepResult:
        try:
            return self._execute(step)
        except (AssertionError, LookupError) as error:
            raise ViolationError(str(error)) from error

    def _execute(self, step: ScheduledStep) -> StepResult:
        if self.keep:
            self.steps.append(copy.deepcopy(step))
        assert not self.asleep
        for sequence_id in step.finished:
            del self.specs[sequence_id]
        named = {*step.sequence_ids, *(i for draws in step.draws for i in draws)}
        for spec in step.new:
            assert spec.sequence_id not in self.specs
            assert spec.sequence_id in named, "a failing step would lose a sequence it does not name"
            self.specs[spec.sequence_id] = spec
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake executor was told to fail")
        assert step.sequence_ids, "an empty step"
        lists = (step.counts, step.starts, step.block_tables, step.draws)
        assert {len(values) for values in lists} == {len(step.sequence_ids)}
        assert len(set(step.sequence_ids)) == len(step.sequence_ids)
        for source, destination in step.block_copies:
            for slot in range(BLOCK_TOKENS):
                self._cache[destination * BLOCK_TOKENS + slot] = self._cache[source * BLOCK_TOKENS + slot]
        self._write(step)
        result = StepResult([], given_up=self.late and step.optional > 0)
        needed = len(step.sequence_ids) - (step.optional if result.given_up else 0)
        for i, sequence_id in enumerate(step.sequence_ids):
            if i < needed:
                result.token_ids.append(self._sample(step, i, sequence_id, result))
                continue
            assert not step.draws[i]
            result.token_ids.append([])
            for position in range(step.starts[i], step.starts[i] + step.counts[i]):
                self._cache[self._slot(step.block_tables[i], position)] = None
        return result

    def _write(self, step: ScheduledStep) -> None:
        # All writes come before all reads, as they may in a real batch.
        tokens = iter(step.tokens)
        written: dict[int, int] = {}
        for count, start, table in zip(step.counts, step.starts, step.block_tables, strict=True):
            assert count > 0, "a sequence without tokens"
            assert len(table) == -(-(start + count) // BLOCK_TOKENS)
            assert all(0 <= block < self.kv_blocks for block in table)
            for position in range(start, start + count):
                slot, token_id = self._slot(table, position), next(tokens)
                assert slot not in written, "two sequences write to one slot"
                written[slot] = self._cache[slot] = token_id
        assert next(tokens, None) is None

    def _sample(self, step: ScheduledStep, i: int, sequence_id: int, result: StepResult) -> list[int]:
        spec, start, count, table = (
            self.specs[sequence_id],
            step.starts[i],
            step.counts[i],
            step.block_tables[i],
        )
        known = [self._cache[self._slot(table, p)] for p in range(start + count)]
        params, prompt = spec.params, spec.prompt_token_ids
        assert known[: len(prompt)] == prompt[: len(known)], "the cache holds another's tokens"
        if isinstance(params, PoolingParams):
            if len(known) == len(prompt):
                result.embeddings[sequence_id] = [float(sum(known))]
            return []
        if params.prompt_logprobs is not None:
            entries = []
            for position in range(start + 1, min(start + count + 1, len(prompt))):
                logprob = logprob_of(known[:position], prompt[position], self.vocab_size)
                entries.append(TokenLogprobs([prompt[position]], [logprob], [1]))
            if entries:
                result.prompt_logprobs[sequence_id] = entries
        drawn = []
        for drawing in step.draws[i]:
            spec = self.specs[drawing]
            token_id = next_token(known, spec.seed, self.vocab_size, spec.index)
            if drawing in self.broken:
                token_id = -1
                result.errors[drawing] = "the fake model broke"
            drawn.append(token_id)
            if params.logprobs is not None:
                own = TokenLogprobs([token_id], [logprob_of(known, token_id, self.vocab_size)], [1])
                top = likeliest(known, params.logprobs, self.vocab_size)
                result.logprobs[drawing] = TokenLogprobs(*(a + b for a, b in zip(own, top, strict=True)))
        return drawn

    @staticmethod
    def _slot(block_table: list[int], position: int) -> int:
        return block_table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


class ScriptedExecutor(FakeExecutor):
    """Has every sequence say the same tokens, `script`, whatever its prompt; and the last of them again after
    it."""

    def __init__(self, script: list[int], **settings: Any) -> None:
        super().__init__(**settings)
        self.script = script

    def _sample(self, step: ScheduledStep, i: int, sequence_id: int, result: StepResult) -> list[int]:
        generated = step.starts[i] + step.counts[i] - len(self.specs[sequence_id].prompt_token_ids)
        scripted = self.script[min(generated, len(self.script) - 1)]
        return [scripted for _ in super()._sample(step, i, sequence_id, result)]


class FakeStream:
    """Decodes token 7 to "<7>", and like a real stream holds the latest piece back until it is sure of it."""

    def __init__(self) -> None:
        self._held = ""

    def push(self, token_id: int) -> str:
        text, self._held = self._held, f"<{token_id}>"
        return text

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def text_of(token_ids: list[int], stop_ids: frozenset[int] = frozenset()) -> str:
    """What FakeStream makes of a finished generation: all tokens but the one that stopped it."""
    kept = token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids
    return "".join(f"<{t}>" for t in kept)
