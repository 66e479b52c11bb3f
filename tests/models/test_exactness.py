"""Exactness: a sequence's logits and tokens are the same bits however the work is cut up.

Whole or in chunks of 1, 7, 32 or 100 tokens, alone or among eight ragged others, on 1, 2 or 3 threads, in any
KV blocks of every type, in both arithmetics, with and without a window, on every ISA. No tolerance anywhere
in this file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.kernels.programs import quantise
from tests.tiny_models import TinyModel, dense, make_batch, tiny_llama

from hexad import LLM, SamplingParams, _native
from hexad.backends.backend import CompileOptions, Limits
from hexad.backends.cpu import CpuBackend, CpuExecutable
from hexad.backends.reference import rms_norm
from hexad.checkpoint.open import open_checkpoint
from hexad.config import BLOCK_TOKENS, EngineConfig, KVDtype
from hexad.errors import BackendError
from hexad.graph import Graph
from hexad.graph.fuse import fuse
from hexad.models import build_graph
from hexad.weights import Weight
from hexad.weights.ggml import FORMATS

Compute = Literal["int8", "float"]
CHUNKS = (1, 7, 32, 100)
COMPANY = (1, 3, 17, 31, 32, 33, 64, 90)
"""Lengths of the eight others."""

LOUD = (3, 40, 170)  # features that a norm makes much larger than the rest: outliers in int8 arithmetic


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    """Every packed layout, 9 and 16 groups in K, grouped queries, heads off the vector width, outliers."""
    formats = {format.name: format for format in FORMATS.values()}
    chosen = {
        "0.self_attn.q": "Q4_K", "0.self_attn.k": "Q4_1", "0.self_attn.v": "Q8_0", "0.self_attn.o": "F16",
        "0.mlp.gate": "Q2_K", "0.mlp.up": "Q3_K", "0.mlp.down": "Q4_0",
        "1.self_attn.q": "Q5_K", "1.self_attn.k": "Q6_K", "1.self_attn.v": "Q5_1", "1.self_attn.o": "Q5_0",
        "1.mlp.gate": "BF16", "1.mlp.up": "Q6_K", "1.mlp.down": "Q4_1", "embed": "Q8_0",
    }  # fmt: skip
    model = tiny_llama(
        hidden=512, intermediate=288, layers=2, heads=6, kv_heads=2, head_dim=48, vocab=200, context=1024,
        attention_bias=True, formats={key: formats[name] for key, name in chosen.items()},
    )  # fmt: skip
    assert {weight.format for weight in model.weights.values()} == set(FORMATS.values())
    for name, weight in model.weights.items():
        if "norm" in name:
            scale = weight.dequantise().copy()
            scale[list(LOUD)] *= 25
            model.weights[name] = dense(scale)
    return model


def test_the_tiny_model_has_outliers(tiny: TinyModel) -> None:
    """Else the second pass of csrc/ops/linear.h would go untested here."""
    norm = tiny.weights["model.layers.0.input_layernorm.weight"].dequantise()
    x = rms_norm(tiny.weights["model.embed_tokens.weight"].dequantise(), norm, 1e-5)
    _, d = quantise(x.reshape(len(x), -1, 32))
    outliers = (d**2 > 4 * np.mean(d**2, axis=1, keepdims=True)).sum(axis=1)
    assert (outliers > 0).mean() > 0.5
    assert len(set(outliers)) > 1  # rows of one tile differ


class Runner:
    """Runs sequences over one executable; block numbers are drawn anew for every schedule."""

    BLOCKS = 64

    def __init__(
        self,
        graph: Graph,
        weights: Mapping[str, Weight],
        *,
        compute: Compute,
        threads: int,
        isa: str | None,
        kv_dtype: KVDtype = "auto",
    ) -> None:
        resolved = EngineConfig(compute=compute, kv_dtype=kv_dtype).resolved_kv_dtype
        options = CompileOptions(compute=compute, kv_dtype=resolved, threads=threads)
        limits = Limits(max_rows=1024, max_seqs=16, max_model_len=1024, kv_blocks=self.BLOCKS)
        self.executable: CpuExecutable = CpuBackend(isa).compile(fuse(graph), weights, options, limits)
        self.rng = np.random.default_rng(threads)

    def tables(self, lengths: Sequence[int]) -> list[list[int]]:
        order = [int(block) for block in self.rng.permutation(self.BLOCKS)]
        return [[order.pop() for _ in range(-(-length // BLOCK_TOKENS))] for length in lengths]

    def alone(self, prompt: Sequence[int], chunk: int) -> NDArray[np.float32]:
        """Logits of every position, the prompt computed `chunk` tokens at a time."""
        (table,) = self.tables([len(prompt)])
        parts = []
        for start in range(0, len(prompt), chunk):
            self.executable.forward(make_batch([(prompt[start : start + chunk], start, table)], sample="all"))
            parts.append(self.executable.logits())
        return np.concatenate(parts)

    def among(
        self, prompt: Sequence[int], others: Sequence[Sequence[int]], chunk: int
    ) -> NDArray[np.float32]:
        """The same while others come, go and stand before and after it in the batch."""
        prompts = [*others[:4], prompt, *others[4:]]
        tables = self.tables([len(tokens) for tokens in prompts])
        done = [0] * len(prompts)
        # Every sequence advances at a pace of its own, so that each step's rows are ragged.
        paces = [1 + (5 * i) % 13 for i in range(len(prompts))]
        paces[4] = chunk
        parts = []
        while done[4] < len(prompt):
            step, mine = [], 0
            for i, tokens in enumerate(prompts):
                if done[i] == len(tokens):
                    continue
                if i == 4:
                    mine = sum(len(part) for part, _, _ in step)
                part = tokens[done[i] : done[i] + paces[i]]
                step.append((part, done[i], tables[i]))
                done[i] += len(part)
                if i == 4:
                    count = len(part)
            batch = make_batch(step)
            rows = np.arange(mine, mine + count, dtype=np.int32)
            self.executable.forward(replace(batch, sample_rows=rows))
            parts.append(self.executable.logits())
        return np.concatenate(parts)


def prompts_for(vocab: int, length: int) -> tuple[list[int], list[list[int]]]:
    rng = np.random.default_rng(7)
    prompt, *others = ([int(t) for t in rng.integers(0, vocab, n)] for n in (length, *COMPANY))
    return prompt, others


def windowed(model: TinyModel, window: int | None) -> Graph:
    """The model with a window in its first layer."""
    graph = Graph(model.weights)
    for node in model.graph().nodes:
        attrs = dict(node.attrs)
        if attrs.get("layer") == 0:
            attrs["window"] = window
        graph.append(node.op, node.inputs, node.weights, **attrs)
    return graph


def check_schedules(
    graph: Graph,
    weights: Mapping[str, Weight],
    compute: Compute,
    length: int,
    isa: str | None,
    kv_dtype: KVDtype = "auto",
) -> None:
    prompt, others = prompts_for(graph.vocab_size, length)
    expected: NDArray[np.float32] | None = None
    for threads in (1, 2, 3):
        runner = Runner(graph, weights, compute=compute, threads=threads, isa=isa, kv_dtype=kv_dtype)
        whole = runner.alone(prompt, length)
        if expected is None:
            expected = whole
            assert np.isfinite(whole).all()
            assert whole.std() > 0.1
        assert np.array_equal(whole, expected), f"{threads} threads"
        for chunk in CHUNKS if threads < 3 else CHUNKS[1:2]:
            assert np.array_equal(runner.alone(prompt, chunk), expected), (
                f"chunks of {chunk}, {threads} threads"
            )
        for chunk in (length, *CHUNKS) if threads == 2 else (length,):
            among = runner.among(prompt, others, chunk)
            assert np.array_equal(among, expected), f"among others, chunks of {chunk}, {threads} threads"


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("isa", _native.isas())
def test_tiny(tiny: TinyModel, compute: Compute, isa: str) -> None:
    check_schedules(tiny.graph(), tiny.weights, compute, 130, isa)


@pytest.mark.parametrize("isa", _native.isas())
def test_tiny_with_a_q8_cache_and_a_window(tiny: TinyModel, isa: str) -> None:
    """A window of 41 keys in the first layer, none in the second."""
    check_schedules(windowed(tiny, 41), tiny.weights, "int8", 130, isa, "q8")


@pytest.mark.parametrize("window", [None, 41, 530])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "q8"])
@pytest.mark.parametrize("compute", ["int8", "float"])
def test_tiny_past_a_segment(
    tiny: TinyModel, compute: Compute, kv_dtype: KVDtype, window: int | None
) -> None:
    """Contexts of more than 512 keys, which attention takes in two segments."""
    prompt, _ = prompts_for(200, 560)
    graph = windowed(tiny, window)
    runner = Runner(graph, tiny.weights, compute=compute, threads=2, isa=None, kv_dtype=kv_dtype)
    whole = runner.alone(prompt, 560)
    for chunk in CHUNKS:
        assert np.array_equal(runner.alone(prompt, chunk), whole)
    if window is not None:
        free = Runner(tiny.graph(), tiny.weights, compute=compute, threads=2, isa=None, kv_dtype=kv_dtype)
        differs = (free.alone(prompt, 560) != whole).any(axis=1)
        assert not differs[:window].any()
        assert differs[window + 1 :].all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("expected", [1e-9, 1e-5, 1e-4, 1e-3, 1e3])
def test_rows_given_up_change_no_other(tiny: TinyModel, expected: float, threads: int) -> None:
    """At once, on the way, or not at all; what was given up can be computed again. The second of the others
    is past a segment."""
    prompt, _ = prompts_for(200, 90)
    long, _ = prompts_for(200, 600)
    runner = Runner(tiny.graph(), tiny.weights, compute="int8", threads=threads, isa=None)
    mine, others = runner.alone(prompt, 90), runner.alone(long, 600)
    tables = runner.tables([90, 600, 90])
    parts, complete = [], []
    runner.executable.forward(make_batch([(long[:560], 0, tables[1])]))
    for start in range(0, 90, 30):
        batch = make_batch([
            (prompt[start : start + 30], start, tables[0]),
            (long[560:], 560, tables[1]),
            (prompt, 0, tables[2]),
        ])  # fmt: skip
        batch = replace(batch, sample_rows=np.arange(30, dtype=np.int32))
        complete.append(
            runner.executable.forward(replace(batch, optional_rows=130, expected_seconds=expected))
        )
        parts.append(runner.executable.logits())
    assert np.array_equal(np.concatenate(parts), mine)
    if expected in (1e-9, 1e3):
        assert complete == [expected > 1] * 3
    runner.executable.forward(make_batch([(long[560:], 560, tables[1])], sample="all"))
    assert np.array_equal(runner.executable.logits(), others[560:])


def test_only_whole_sequences_that_nothing_is_wanted_of_can_be_given_up(tiny: TinyModel) -> None:
    runner = Runner(tiny.graph(), tiny.weights, compute="int8", threads=1, isa=None)
    batch = make_batch([([1, 2, 3], 0, [0]), ([4, 5], 0, [1])])
    for optional in (-1, 1, 2, 3, 5, 6):  # of two rows the last is sampled
        with pytest.raises(BackendError, match="given up"):
            runner.executable.forward(replace(batch, optional_rows=optional))


@pytest.mark.parametrize(("compute", "kv_dtype"), [("int8", "auto"), ("float", "auto"), ("int8", "q8")])
def test_smollm2(smollm2_path: Path, compute: Compute, kv_dtype: KVDtype) -> None:
    with open_checkpoint(smollm2_path) as checkpoint:
        graph = build_graph(checkpoint.config, checkpoint.weights)
        check_schedules(graph, checkpoint.weights, compute, 107, None, kv_dtype)


# Through the front door: the scheduler cuts and mixes as it likes.

QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "def fibonacci(n):",
    "One, two, three,",
    "Name three colours of the rainbow and say something about each of them, briefly. " * 6,
    "Why is the sky blue?",
    "x",
    "The quick brown fox jumps over the lazy dog, and then",
    "Translate to French: good morning. " * 4,
]
SETTINGS: list[dict[str, Any]] = [
    {"threads": 2, "max_num_batched_tokens": 512},
    {"threads": 1, "max_num_batched_tokens": 64},
]


@pytest.fixture(scope="module", params=["int8", "float"])
def llms(request: pytest.FixtureRequest, smollm2_path: Path) -> Iterator[list[LLM]]:
    made = [
        LLM(str(smollm2_path), compute=request.param, max_model_len=512, max_num_seqs=16, **settings)
        for settings in SETTINGS
    ]
    yield made
    for llm in made:
        llm.close()


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "seeded"])
def test_generate(llms: list[LLM], sampled: bool) -> None:
    """Nine prompts in one batch or one by one, with steps of 512 or 64 tokens: the same tokens."""
    params = [
        SamplingParams(
            temperature=0.9 if sampled else 0, top_p=0.95, top_k=50, seed=i, max_tokens=8 + i, ignore_eos=True
        )
        for i in range(len(QUESTIONS))
    ]

    def tokens(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    expected = tokens(llms[0], QUESTIONS, params)
    assert [len(answer) for answer in expected] == [p.max_tokens for p in params]
    assert len({tuple(answer) for answer in expected}) == len(QUESTIONS)
    for llm in llms:
        assert tokens(llm, QUESTIONS, params) == expected
        # In another order, so that each has other company and other blocks.
        assert tokens(llm, QUESTIONS[::-1], params[::-1]) == expected[::-1]
    for question, p, answer in zip(QUESTIONS, params, expected, strict=True):
        assert tokens(llms[1], [question], [p]) == [answer]
