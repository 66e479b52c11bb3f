"""The trace that benchmarks.blocks runs: 200 requests as a server may see them, from a seeded generator.

    scripts/bench trace      writes benchmarks/trace.jsonl anew, the same to the byte

One JSON object a line: arrival_step (of the engine); prompt_len, output_len in tokens; group: requests of one
begin with the same shared_len tokens (null: with none of others'); n: sequences that grow from the prompt.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_suffix(".jsonl")

REQUESTS = 200
SEED = 20261122
GROUPS = {"assistant": 180, "translator": 75, "extractor": 510, "few-shot": 901}
"""Groups and their shared_len: system prompts of several lengths, none a multiple of a block."""


class Arrival(NamedTuple):
    """One line of the trace."""

    arrival_step: int
    prompt_len: int
    output_len: int
    group: str | None
    shared_len: int
    n: int


def main() -> None:
    lines = [json.dumps(arrival._asdict()) for arrival in generate()]
    PATH.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} requests written to {PATH.relative_to(Path.cwd())}")


def generate() -> list[Arrival]:
    """Requests come in bursts; lengths are log-normal, as those of real traffic are."""
    rng = random.Random(SEED)
    arrivals = []
    step = 0
    for _ in range(REQUESTS):
        if rng.random() < 0.4:
            step += round(rng.expovariate(1 / 12))
        group = rng.choice([*GROUPS, None, None])
        shared = GROUPS[group] if group else 0
        prompt = shared + _length(rng, median=90, most=700)
        output = _length(rng, median=110, most=600)
        arrivals.append(Arrival(step, prompt, output, group, shared, rng.choice([1] * 9 + [4])))
    return arrivals


def read() -> list[Arrival]:
    """The committed trace."""
    return [Arrival(**json.loads(line)) for line in PATH.read_text(encoding="utf-8").splitlines()]


def _length(rng: random.Random, *, median: int, most: int) -> int:
    return max(1, min(most, round(median * rng.lognormvariate(0, 0.9))))


if __name__ == "__main__":
    main()
