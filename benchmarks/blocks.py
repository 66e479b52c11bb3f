"""How well the KV cache's blocks are used on the committed trace (benchmarks/trace.jsonl), without a model.

    scripts/bench blocks [--kv-blocks N]

After every step it is asserted that each sequence holds ⌈tokens/32⌉ blocks and no more, and that the blocks
allocated are those of all sequences, shared ones counted once; at the end all are free. The table shows,
summed over the steps:

- slots used: KV slots with a token in them ÷ slots of the blocks allocated, with a shared block counted once;
- blocks saved by sharing: 1 − blocks allocated ÷ the blocks that all sequences would need on their own.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import trace
from benchmarks.fake_executor import EOS, VOCAB_SIZE, FakeExecutor, make_engine
from benchmarks.report import table, write
from hexad.config import BLOCK_TOKENS, EngineConfig
from hexad.engine.engine import Engine
from hexad.engine.request import Status
from hexad.params import SamplingParams

MAX_MODEL_LEN = 2048


@dataclass
class Usage:
    """Sums over steps. slots: used by tokens. allocated: blocks. alone: blocks if none were shared."""

    steps: int = 0
    slots: int = 0
    allocated: int = 0
    alone: int = 0
    most_allocated: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def observe(self, engine: Engine) -> None:
        """Counts the blocks as they are now; raises AssertionError if there is one too many or too few."""
        fill: dict[int, int] = {}
        alone = 0
        for request in engine.requests.values():
            for sequence in request.sequences:
                if sequence.status is Status.FINISHED:
                    continue
                blocks, tokens = sequence.block_table, sequence.num_computed
                assert len(blocks) == -(-tokens // BLOCK_TOKENS), (len(blocks), tokens)
                alone += len(blocks)
                for i, block in enumerate(blocks):
                    fill[block] = max(fill.get(block, 0), min(BLOCK_TOKENS, tokens - i * BLOCK_TOKENS))
        allocated = engine.blocks.num_allocated
        assert allocated == len(fill), (allocated, len(fill))
        self.steps += 1
        self.slots += sum(fill.values())
        self.allocated += allocated
        self.alone += alone
        self.most_allocated = max(self.most_allocated, allocated)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kv-blocks", type=int, default=256)
    options = parser.parse_args()
    runs = {
        f"{blocks} blocks, prefix cache {'on' if caching else 'off'}": replay(blocks, caching)
        for blocks in (options.kv_blocks, 4096)
        for caching in (True, False)
    }
    rows: list[list[object]] = [
        [
            name,
            usage.steps,
            f"{usage.slots / (usage.allocated * BLOCK_TOKENS):.1%}",
            f"{1 - usage.allocated / usage.alone:.1%}",
            usage.most_allocated,
            usage.preemptions,
            f"{usage.cached_tokens / usage.prompt_tokens:.1%}",
        ]
        for name, usage in runs.items()
    ]
    header = ["", "steps", "slots used", "saved", "most blocks", "preemptions", "prompt tokens cached"]
    print(table(header, rows))
    results = {name: asdict(usage) for name, usage in runs.items()}
    print(f"\nwritten to {write('blocks', {'trace': trace.PATH.name, 'max_num_seqs': 64}, results)}")


def replay(kv_blocks: int, caching: bool) -> Usage:
    """Runs the trace and watches every step."""
    executor = FakeExecutor()
    config = EngineConfig(enable_prefix_caching=caching)
    engine = make_engine(executor, config, max_model_len=MAX_MODEL_LEN, kv_blocks=kv_blocks)
    # Steps as long as predicted, so that they hold the same on every machine.
    engine.scheduler.pace.end = lambda seconds: None  # type: ignore[method-assign]
    waiting = trace.read()[::-1]
    usage = Usage()
    step = 0
    while waiting or engine.has_unfinished:
        while waiting and waiting[-1].arrival_step <= step:
            name = str(len(waiting))
            engine.add_request(name, **_request(name, waiting.pop()))
        if engine.has_unfinished:
            engine.step()
            usage.observe(engine)
        step += 1
    assert engine.blocks.num_allocated == 0
    usage.preemptions = engine.stats.preemptions
    usage.prompt_tokens, usage.cached_tokens = engine.stats.prompt_tokens, engine.stats.prefix_hits
    return usage


def _request(name: str, arrival: trace.Arrival) -> dict[str, Any]:
    own = arrival.prompt_len - arrival.shared_len
    return {
        "prompt_token_ids": _tokens(arrival.group or "", arrival.shared_len) + _tokens(name, own),
        "params": SamplingParams(
            n=arrival.n, max_tokens=arrival.output_len, ignore_eos=True, detokenize=False, seed=0
        ),
    }


def _tokens(name: str, length: int) -> list[int]:
    return random.Random(name).choices(range(EOS + 1, VOCAB_SIZE), k=length)


if __name__ == "__main__":
    main()
