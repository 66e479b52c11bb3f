"""The prefix cache: how much sooner the first token comes if another request has had the same beginning.

    scripts/bench prefix [--model NAME] [--slack FACTOR]

RUNS times a prompt of PREFIX + 16 tokens is answered, and then another one with the same PREFIX; every run
has a prefix of its own. The exit status is 1 if the median time to the second's first token is more than
BOUND of that to the first's; --slack widens the bound, for machines that are busy with other things.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time

from benchmarks.report import table, write
from hexad import LLM, SamplingParams

RUNS = 7
PREFIX = 512
BOUND = 1 / 5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2:135m", metavar="NAME")
    parser.add_argument("--slack", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args()
    rng = random.Random(0)
    seconds: list[list[float]] = [[], []]
    cached: list[set[int]] = [set(), set()]
    with LLM(options.model, max_model_len=1024) as llm:
        vocab = llm.get_tokenizer().vocab_size
        for run in range(RUNS + 1):
            prefix = [rng.randrange(vocab) for _ in range(PREFIX)]
            for which in (0, 1):
                taken, tokens = _first_token(llm, prefix + [rng.randrange(vocab) for _ in range(16)])
                if run:  # the first one warms up
                    seconds[which].append(taken)
                    cached[which].add(tokens)
    first, second = map(statistics.median, seconds)
    figures = {"first": 1e3 * first, "second": 1e3 * second, "ratio": second / first}
    rows = [
        ["the first request", figures["first"], *cached[0]],
        ["another with its prefix", figures["second"], *cached[1]],
    ]
    print(table(["time to first token", "ms, median", "tokens cached"], rows))
    print(f"\nratio {figures['ratio']:.3f}, bound {BOUND}")
    settings = {"model": options.model, "runs": RUNS, "prefix": PREFIX}
    print(f"written to {write('prefix', settings, figures)}")
    sys.exit(f"The ratio is over the bound of {BOUND}." if figures["ratio"] > BOUND * options.slack else 0)


def _first_token(llm: LLM, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of a prompt, and how many of its tokens were cached."""
    begin = time.perf_counter()
    (output,) = llm.generate(
        {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    return time.perf_counter() - begin, output.num_cached_tokens


if __name__ == "__main__":
    main()
