"""What `hexad bench` has a model do: prompts of random tokens, or those of a file."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from hexad.checks import shown
from hexad.errors import ConfigError

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

DEFAULT_PROMPTS = 64
DEFAULT_LEN = 128

T = TypeVar("T")


class Job(NamedTuple):
    """One request: its prompt, and how many tokens are generated after it."""

    token_ids: list[int]
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Which jobs there are. None is the default: 64 prompts, or all that the dataset has; 128 tokens.

    input_len, output_len: tokens of each prompt and of what is generated. range_ratio: each job's lengths are
    drawn evenly from within ± this fraction of them; 0: they are all alike. prefix_len: tokens that all
    prompts begin with, before those of their own. dataset: a file of prompts instead; see `read_prompts`.
    seed: of the random tokens and lengths.

    Raises ConfigError.
    """

    num_prompts: int | None = None
    input_len: int | None = None
    output_len: int | None = None
    range_ratio: float = 0.0
    prefix_len: int = 0
    dataset: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset and (self.input_len or self.range_ratio or self.prefix_len):
            raise ConfigError(
                "--dataset brings prompts with lengths of their own; leave out --input-len, "
                "--random-range-ratio and --prefix-len."
            )

    def jobs(self, tokenizer: Tokenizer) -> list[Job]:
        """The jobs, the same for the same seed. Raises ConfigError; see `read_prompts`."""
        if self.dataset is not None:
            return read_dataset(self.dataset, tokenizer, self.output_len or DEFAULT_LEN, self.num_prompts)
        reserved = tokenizer.special_ids | tokenizer.eos_ids
        ordinary = [token_id for token_id in range(tokenizer.vocab_size) if token_id not in reserved]
        return [Job(ids, output_len) for ids, output_len in self.random_prompts(ordinary)]

    def random_prompts(self, tokens: Sequence[T]) -> list[tuple[list[T], int]]:
        """Prompts of these tokens, and how many are generated after each; the same for the same seed."""
        rng = random.Random(self.seed)
        prefix = rng.choices(tokens, k=self.prefix_len)
        prompts = []
        for _ in range(self.num_prompts or DEFAULT_PROMPTS):
            own = rng.choices(tokens, k=self._draw(rng, self.input_len or DEFAULT_LEN))
            prompts.append((prefix + own, self._draw(rng, self.output_len or DEFAULT_LEN)))
        return prompts

    def _draw(self, rng: random.Random, length: int) -> int:
        low, high = (length * (1 + sign * self.range_ratio) for sign in (-1, 1))
        return rng.randint(max(1, math.floor(low)), math.ceil(high))


def read_dataset(path: Path, tokenizer: Tokenizer, output_len: int, num_prompts: int | None) -> list[Job]:
    """The jobs of `read_prompts`, with `output_len` where a prompt brings none. Raises ConfigError."""
    return [
        Job(tokenizer.encode(prompt), length or output_len)
        for prompt, length in read_prompts(path, num_prompts)
    ]


def read_prompts(path: Path, num_prompts: int | None) -> list[tuple[str, int | None]]:
    """The first `num_prompts` prompts of a file, or all, and how many tokens each asks for.

    Each line that is not blank is a prompt: plain text, or, if the first of them is a JSON object, an object
    with "prompt" and perhaps "output_len" or "max_tokens".

    Raises ConfigError for a file that cannot be read, has too few prompts or a line of another form.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ConfigError(f"The dataset {path} cannot be read: {reason}.") from error
    # Not splitlines(): a JSON string may hold any of the other line ends.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines or len(lines) < (num_prompts or 0):
        asked = f"; --num-prompts asks for {num_prompts}" if lines else ""
        raise ConfigError(f"The dataset {path} has {len(lines) or 'no'} prompts{asked}.")
    as_json = isinstance(_parsed(lines[0][1]), dict)
    return [
        _read_object(path, number, line) if as_json else (line, None) for number, line in lines[:num_prompts]
    ]


def _read_object(path: Path, number: int, line: str) -> tuple[str, int | None]:
    entry = _parsed(line)
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ConfigError(
            f"{path}, line {number}: it must be a JSON object with the text of a 'prompt', not {shown(line)}."
        )
    for key in ("output_len", "max_tokens"):
        length = entry.get(key)
        if length is not None:
            if type(length) is not int or length < 1:
                raise ConfigError(
                    f"{path}, line {number}: {key} must be a positive integer, not {shown(length)}."
                )
            return entry["prompt"], length
    return entry["prompt"], None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
