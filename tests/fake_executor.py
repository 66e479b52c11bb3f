"""An executor without a model, for tests of the engine.

It keeps a paged "KV cache" of token ids, writes what a step computes through the block tables, and reads
every sequence back through them. The next token is a hash of all tokens read back and of the sample's seed
and position, so a block given to two sequences, a token lost or computed twice, or a wrong position changes
what comes out.
"""

from __future__ import annotations

import hashlib

from hexad.config import BLOCK_TOKENS
from hexad.engine.step import ScheduledSequence, ScheduledStep, StepResult


def next_token(token_ids: list[int], seed: int, vocab_size: int) -> int:
    """The fake model: the token after `token_ids`, a pure function of them and of the seed."""
    data = repr((token_ids, len(token_ids), seed)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) % vocab_size


def generate_alone(
    prompt: list[int], *, seed: int, max_len: int, stop_ids: frozenset[int], vocab_size: int
) -> tuple[list[int], str]:
    """What a request must come to, whatever runs beside it: its new tokens and the finish reason."""
    token_ids = list(prompt)
    while len(token_ids) < max_len:
        token_ids.append(next_token(token_ids, seed, vocab_size))
        if token_ids[-1] in stop_ids:
            return token_ids[len(prompt) :], "stop"
    return token_ids[len(prompt) :], "length"


class FakeExecutor:
    """Keeps the steps it was given in `steps`. `fail_next` makes the next one raise."""

    def __init__(self, *, kv_blocks: int, vocab_size: int) -> None:
        self.kv_blocks = kv_blocks
        self.vocab_size = vocab_size
        self.steps: list[ScheduledStep] = []
        self.fail_next = False
        self._cache: list[int | None] = [None] * (kv_blocks * BLOCK_TOKENS)

    def execute(self, step: ScheduledStep) -> StepResult:
        self.steps.append(step)
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the fake executor was told to fail")
        assert step.sequences, "an empty step"
        tables = [block for s in step.sequences for block in s.block_table]
        assert len(tables) == len(set(tables)), "two sequences share a block"
        assert all(0 <= block < self.kv_blocks for block in tables)
        # All writes come before all reads, as they may in a real batch.
        for s in step.sequences:
            assert s.token_ids, "a sequence without tokens"
            end = s.start + len(s.token_ids)
            assert len(s.block_table) == -(-end // BLOCK_TOKENS)
            for position, token_id in enumerate(s.token_ids, s.start):
                self._cache[self._slot(s.block_table, position)] = token_id
        return StepResult([self._sample(s) for s in step.sequences])

    def _sample(self, s: ScheduledSequence) -> list[int]:
        if s.sample is None:
            return []
        length = s.start + len(s.token_ids)
        assert s.sample.position == length
        known = [self._cache[self._slot(s.block_table, p)] for p in range(length)]
        return [next_token(known, s.sample.seed, self.vocab_size)]

    @staticmethod
    def _slot(block_table: list[int], position: int) -> int:
        return block_table[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS


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
