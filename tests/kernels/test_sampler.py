"""The native sampler against its definition, `backends.reference_sampler`, on fixed logits.

The two may differ where a bound falls within the last bit of exp; on these seeds none does.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.kernels.programs import ISAS, logits_program
from tests.sampling import make_batch
from tests.tiny_models import dense, limits_for, random_weight
from tests.tiny_models import make_batch as make_step

from hexad.backends import reference_sampler
from hexad.backends.backend import Batch, CompileOptions
from hexad.backends.cpu import CpuBackend, CpuExecutable
from hexad.backends.reference_sampler import philox4x32
from hexad.backends.sampling import SAMPLER_IDS, SampleBatch, SampleOutput
from hexad.errors import BackendError
from hexad.graph import Graph
from hexad.graph.fuse import fuse
from hexad.weights import F32

Row = Mapping[str, Any]

VOCABS = [1, 2, 31, 65, 256, 257, 300, 777]
"""Around words of masks, chunks of 64 and blocks of 256."""


class Sampler:
    """Draws from given logits, float32 [kinds, vocab]: each kind is a column of the output table, and a
    one-hot row picks it (x·1 plus zeros is x), so logits must be finite where there are several kinds."""

    def __init__(self, logits: NDArray[np.float32], isa: str) -> None:
        one_hot = np.eye(len(logits), dtype=np.float32)
        self.executable = logits_program(one_hot, dense(logits.T), isa=isa)

    def check(self, wanted: SampleBatch, kinds: Sequence[int] | None = None) -> SampleOutput:
        """Samples and compares all of the output with the definition's."""
        kinds = [0] * len(wanted.rows) if kinds is None else kinds
        self.executable.forward(make_step([(kinds, 0, range(8))], sample="all"))
        found = self.executable.sample(wanted)
        with np.errstate(all="ignore"):
            assert_same(found, reference_sampler.sample(self.executable.logits(), wanted))
        return found


def assert_same(found: SampleOutput, expected: SampleOutput) -> None:
    """Tokens and ranks are equal. A logprob is a float32 of magnitude up to 2⁵: the rounding of the largest
    makes 2⁻²⁰, and exp in float32 may be off by two units of 2⁻²³ in the sum."""
    for name in ("tokens", "ranks", "top_ids", "ask_ranks"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=name)
    for name in ("mirostat_mu", "logprobs", "top_logprobs", "ask_logprobs"):
        np.testing.assert_allclose(
            getattr(found, name), getattr(expected, name), rtol=1e-6, atol=2.0**-20, err_msg=name
        )


def assert_bitwise(a: SampleOutput, b: SampleOutput) -> None:
    for field in fields(SampleOutput):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert x.tobytes() == y.tobytes(), field.name


def at_positions(row: Row, n: int = 60) -> list[dict[str, Any]]:
    """The row, drawing with n different random numbers."""
    return [{**row, "seed": 2**63 + 12345 * i, "position": i, "sequence": i % 3} for i in range(n)]


SINGLE = [
    {}, {"temperature": 0.2}, {"temperature": 2.0}, {"temperature": 0.0},
    *({"top_k": k} for k in (1, 2, 40, 299, 300, 5000, -1)),
    *({"top_p": p} for p in (0.01, 0.5, 0.9, 0.9999)),
    *({"min_p": p} for p in (0.01, 0.3, 1.0)),
    *({"typical_p": p} for p in (0.05, 0.5, 0.9, 0.9999)),
    *({"top_n_sigma": n} for n in (0.5, 1.0, 3.0)),
    *({"xtc_probability": p, "xtc_threshold": t} for p in (0.5, 1.0) for t in (0.0, 0.02, 0.1, 0.5, 0.51)),
    *({"dynatemp_range": r, "dynatemp_exponent": e} for r in (0.3, 1.5) for e in (0.5, 1.0, 2.0)),
    *({"mirostat": 1, "mirostat_mu": mu} for mu in (0.5, 3.0, 8.0)),
    *({"mirostat": 2, "mirostat_mu": mu} for mu in (-1.0, 0.5, 3.0, 8.0)),
    {"top_k": 20, "top_p": 0.7}, {"top_k": 50, "min_p": 0.02}, {"top_p": 0.95, "min_p": 0.01},
    {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05},
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", SINGLE, ids=str)
def test_every_sampler_alone(row: Row, isa: str) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (2, 300)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many equals
    found = Sampler(logits, isa).check(make_batch(at_positions(row), 300), [i % 2 for i in range(60)])
    assert (found.tokens >= 0).all()
    if row in ({}, {"temperature": 2.0}):
        assert len(set(found.tokens)) > 20


HISTORY = [1, 2, 3, 9, 1, 2, 3, 4, 5, 1, 2, 3, 9, 1, 2, 3]

REPETITION = [
    {"repetition_penalty": 1.7}, {"repetition_penalty": 0.6}, {"repetition_penalty": 2.0, "repeat_last_n": 3},
    {"presence_penalty": 1.5}, {"frequency_penalty": -0.7}, {"repetition_penalty": 3.0, "repeat_last_n": 0},
    {"repetition_penalty": 1.1, "presence_penalty": 0.3, "frequency_penalty": 0.2, "repeat_last_n": 10},
    {"dry_multiplier": 0.8}, {"dry_multiplier": 1.0, "dry_allowed_length": 0},
    {"dry_multiplier": 1.0, "dry_last_n": 9}, {"dry_multiplier": 1.0, "dry_last_n": 0},
    {"dry_multiplier": 1.0, "dry_breakers": 0}, {"dry_multiplier": 1.0, "dry_base": 1e30},
    {"dry_multiplier": 0.7, "repetition_penalty": 1.2, "order": ["top_k", "dry", "penalties"], "top_k": 7},
    {"presence_penalty": -20.0, "min_p": 0.2, "order": ["min_p", "penalties", "top_p"], "top_p": 0.9},
]  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("row", REPETITION, ids=str)
def test_repetition(row: Row, isa: str) -> None:
    """Penalties and DRY, also after samplers that have dropped tokens: those do not come back."""
    logits = np.random.default_rng(1).normal(0, 2, (1, 12)).astype(np.float32)
    rows = [{**r, "num_prompt": 5} for r in at_positions(row, 40)]
    history = [HISTORY if i % 4 else HISTORY[: i // 4] for i in range(40)]
    Sampler(logits, isa).check(make_batch(rows, 12, history=history, masks=[[2]]))


@pytest.mark.parametrize("isa", ISAS)
def test_long_runs(isa: str) -> None:
    """DRY's runs in histories of few tokens, which overlap themselves in every way."""
    rng = np.random.default_rng(2)
    history = [rng.integers(0, 1 + i % 3, 10 * i).tolist() for i in range(40)]
    rows = at_positions({"dry_multiplier": 0.01, "dry_base": 1.05, "dry_breakers": 0}, 40)
    breakers = [[], [2]]
    rows = [{**row, "dry_breakers": i % 2} for i, row in enumerate(rows)]
    logits = np.zeros((1, 5), np.float32)
    Sampler(logits, isa).check(make_batch(rows, 5, history=history, masks=breakers))


def random_row(rng: np.random.Generator, vocab: int) -> dict[str, Any]:
    """Anything at all: each parameter is off, or one of a few values."""
    order = list(SAMPLER_IDS)
    if rng.random() < 0.5:
        order = [str(name) for name in rng.permutation(order) if rng.random() < 0.8]
    row: dict[str, Any] = {
        "order": order,
        "seed": int(rng.integers(0, 2**63)),
        "temperature": rng.choice([0, 0.3, 0.7, 1, 1.5]),
        "num_prompt": int(rng.integers(0, 30)),
    }
    for share, options in (
        (0.3, {
            "top_p": [0.01, 0.5, 0.9, 0.9999], "min_p": [0.01, 0.3, 1], "typical_p": [0.1, 0.5, 0.9],
            "top_n_sigma": [0.5, 1, 3], "top_k": [1, 2, 5, vocab - 1, vocab, -1],
            "xtc_probability": [0.5, 1], "xtc_threshold": [0, 0.05, 0.2, 0.5],
            "repetition_penalty": [0.5, 1.2, 2], "presence_penalty": [-1, 0.5],
            "frequency_penalty": [-0.5, 0.7], "repeat_last_n": [0, 3, 10],
            "dry_multiplier": [0.8, 2], "dry_allowed_length": [0, 1, 3], "dry_last_n": [0, 5, 20],
            "dry_breakers": [0], "dynatemp_range": [0.3, 0.9], "dynatemp_exponent": [0.5, 2],
            "mask": [1, 2], "num_logprobs": [0, 1, 5, vocab],
        }),
        (0.1, {"mirostat": [1, 2], "mirostat_mu": [1, 4], "draw": [0]}),
    ):  # fmt: skip
        row |= {name: rng.choice(values).item() for name, values in options.items() if rng.random() < share}
    return row


def random_batch(rng: np.random.Generator, rows: int, vocab: int) -> SampleBatch:
    few = min(vocab, 6)
    return make_batch(
        [random_row(rng, vocab) for _ in range(rows)],
        vocab,
        history=[rng.integers(0, few, rng.integers(0, 60)).tolist() for _ in range(rows)],
        bias=[
            {int(t): float(rng.choice([-np.inf, 3, -2])) for t in rng.integers(0, vocab, rng.integers(0, 4))}
            for _ in range(rows)
        ],
        asks=[rng.integers(0, vocab, rng.integers(0, 4)).tolist() for _ in range(rows)],
        masks=[[few - 1], rng.permutation(vocab)[: (vocab + 1) // 2].tolist(), range(0, vocab, 7)],
    )


def random_logits(rng: np.random.Generator, vocab: int) -> NDArray[np.float32]:
    logits = rng.normal(0, rng.choice([0.5, 2, 4, 9]), (1, vocab)).astype(np.float32)
    if rng.random() < 0.4:
        logits = np.round(logits)
    for value in (np.nan, -np.inf):
        if rng.random() < 0.2:
            logits[0, rng.integers(0, vocab, vocab // 3)] = value
    return logits


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_random_chains(vocab: int, isa: str) -> None:
    """Samplers in any order with any parameters, masks, biases, histories, logprobs and ranks."""
    for seed in range(6):
        rng = np.random.default_rng([vocab, seed])
        Sampler(random_logits(rng, vocab), isa).check(random_batch(rng, 40, vocab))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("std", [0.0, 0.1, 1.0, 5.0])
def test_large_vocabulary(std: float, isa: str) -> None:
    """More candidates than fit one range, and bounds by blocks and by counting."""
    vocab = 20_011
    logits = np.random.default_rng(3).normal(0, std, (1, vocab)).astype(np.float32)
    rows = [
        {**row, "position": i, "num_logprobs": i % 3 * 50}
        for i, row in enumerate(
            {"top_p": p, "top_k": k, "typical_p": t, "min_p": m}
            for p in (0.005, 0.3, 0.95, 1.0)
            for k in (0, 70, 300, 15_000)
            for t in (0.3, 1.0)
            for m in (0.0, 0.01)
        )
    ]
    Sampler(logits, isa).check(make_batch(rows, vocab))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "row", [{"top_p": 0.9}, {"top_k": 100}, {"typical_p": 0.9}, {"xtc_probability": 1}], ids=str
)
def test_outliers(row: Row, isa: str) -> None:
    """Logits so far from the others that ranges of equal width tell nothing apart."""
    logits = np.random.default_rng(4).normal(0, 1, (1, 3000)).astype(np.float32)
    logits[0, :6] = [-3e38, -1e30, -1e20, -1e10, -1e5, -1e3]
    for shift in (0.0, 1e4):
        sampler = Sampler(logits + np.float32(shift), isa)
        sampler.check(make_batch(at_positions(row, 20), 3000))


@pytest.mark.parametrize("isa", ISAS)
def test_random_numbers(isa: str) -> None:
    """Equal weights turn the draw into ⌊u · vocab⌋, exactly: Philox's word by seed, sequence and position."""
    vocab = 1024
    keys = [
        (0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (0x299F31D0A4093822, 0x85A308D3, 0x243F6A88),
        (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**31, 5),
    ]  # fmt: skip
    words = [int(philox4x32((p, q, 0, 0), (s & 0xFFFFFFFF, s >> 32))[0]) for s, q, p in keys]
    assert words[0] == 0x6627E8D5  # the known answer for a counter and key of zeros (Random123's kat_vectors)
    assert len({word >> 22 for word in words}) == len(keys)
    rows = [{"seed": s, "sequence": q, "position": p} for s, q, p in keys]
    found = Sampler(np.zeros((1, vocab), np.float32), isa).check(make_batch(rows, vocab))
    assert found.tokens.tolist() == [word >> 22 for word in words]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy(temperature: float, isa: str) -> None:
    """The largest logit and of equals the lowest id, whatever vector or rest it lies in; filters are moot."""
    logits = np.random.default_rng(2).normal(0, 1, (40, 307)).astype(np.float32)
    ties = [sorted({kind, (kind * 37 + 5) % 307, 306 - kind}) for kind in range(40)]
    for row, ids in zip(logits, ties, strict=True):
        row[ids] = 9
    logits[0] = -3  # all equal
    ties[0] = [0]
    row = {"temperature": temperature, "top_k": 3, "top_p": 0.1, "min_p": 1.0, "mirostat": 2}
    found = Sampler(logits, isa).check(make_batch(at_positions(row, 40), 307), list(range(40)))
    assert found.tokens.tolist() == [ids[0] for ids in ties]


@pytest.mark.parametrize("isa", ISAS)
def test_ties_at_the_cut(isa: str) -> None:
    """Of equals at the cut of top-k or top-p the lowest ids stay; min-p keeps them all."""
    sampler = Sampler(np.array([[0, 1, 1, 0, 1, 1]], np.float32), isa)
    for filters, kept in (
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.3}, {1, 2}),  # each of four weighs 0.21
        ({"min_p": 0.9}, {1, 2, 4, 5}),
        ({"top_k": 5}, {0, 1, 2, 4, 5}),
    ):
        found = sampler.check(make_batch(at_positions(filters, 100), 6))
        assert set(found.tokens.tolist()) == kept


@pytest.mark.parametrize("isa", ISAS)
def test_frequencies(isa: str) -> None:
    """4,000 draws of four tokens of known probability: each count within 4.5 standard deviations."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(np.log(p).astype(np.float32)[None], isa)
    counts = np.zeros(4, int)
    for first in range(0, 4000, 200):
        found = sampler.check(make_batch([{"seed": 3, "position": first + i} for i in range(200)], 4))
        counts += np.bincount(found.tokens, minlength=4)
    assert (np.abs(counts - 4000 * p) <= 4.5 * np.sqrt(4000 * p * (1 - p))).all()


BROKEN = ["nan", "inf", "-inf", "one nan", "one inf", "one number"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", BROKEN, ids=[value.replace(" ", "-") for value in BROKEN])
def test_broken_logits(value: str, isa: str) -> None:
    """The definition's answer whatever a broken model makes, −1 for "none": no crash, no hang."""
    logits = np.linspace(-1, 1, 70, dtype=np.float32)[None].copy()
    if value.startswith("one"):
        if value == "one number":
            logits[0, np.arange(70) != 33] = np.nan
        else:
            logits[0, 33] = float(value.split()[1])
    else:
        logits[:] = float(value)
    rows = [
        {**row, "temperature": temperature, "seed": seed, "num_logprobs": 70}
        for row in (*SINGLE, {"repetition_penalty": 2.0}, {"dry_multiplier": 1.0})
        for temperature in (0.0, 0.5)
        for seed in range(2)
    ]
    sampler = Sampler(logits, isa)
    for first in range(0, len(rows), 50):
        some = rows[first : first + 50]
        batch = make_batch(some, 70, history=[HISTORY] * len(some), asks=[[0, 33]] * len(some))
        tokens = sampler.check(batch).tokens
        if value == "one number":
            assert (tokens == 33).all()
        elif value == "one nan":
            assert ((tokens >= 0) & (tokens != 33)).all()
        else:
            assert (tokens == -1).all()


@pytest.mark.parametrize("isa", ISAS)
def test_nothing_left(isa: str) -> None:
    """A mask of nothing, biases that forbid everything, and what is drawn from one token."""
    sampler = Sampler(np.zeros((1, 40), np.float32), isa)
    rows = [{"mask": 0}, {}, {"mask": 1}, {"mask": 0, "temperature": 0.0}, {"mask": 1, "mirostat": 1}]
    bias = [{}, dict.fromkeys(range(40), -np.inf), {}, {}, {}]
    found = sampler.check(make_batch(rows, 40, bias=bias, masks=[[], [39]]))
    assert found.tokens.tolist() == [-1, -1, 39, -1, 39]


def some(batch: SampleBatch, chosen: Sequence[int]) -> SampleBatch:
    """The chosen rows of a batch."""

    def ragged(starts: NDArray[np.int64], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        parts = [slice(starts[i], starts[i + 1]) for i in chosen]
        joined = [np.concatenate([array[:0], *(array[part] for part in parts)]) for array in arrays]
        return [*joined, np.cumsum([0, *(starts[i + 1] - starts[i] for i in chosen)], dtype=np.int64)]

    return SampleBatch(
        batch.rows[list(chosen)],
        *ragged(batch.history_starts, batch.history),
        *ragged(batch.bias_starts, batch.bias_ids, batch.bias_values),
        *ragged(batch.ask_starts, batch.ask_ids),
        batch.masks,
    )


def random_program(vocab: int, isa: str, threads: int = 1, rows: int = 256) -> CpuExecutable:
    """A table of 64 random rows, normed, times a random output table."""
    rng = np.random.default_rng(6)
    weights = {
        "rows.weight": dense(rng.normal(0, 1, (64, 32))),
        "norm.weight": dense(rng.uniform(0.5, 1.5, 32)),
        "w.weight": random_weight(rng, (vocab, 32), F32, std=0.5),
    }
    graph = Graph(weights)
    graph.logits(graph.norm(graph.take_rows(graph.embed("rows")), "norm", eps=1e-5), "w")
    options = CompileOptions(threads=threads)
    return CpuBackend(isa).compile(fuse(graph), weights, options, limits_for(batch_rows=rows))


def all_rows(n: int) -> Batch:
    return make_step([([i % 64 for i in range(n)], 0, range(8))], sample="all")


@pytest.mark.parametrize("isa", ISAS)
def test_alone_or_in_a_batch(isa: str) -> None:
    """Bit for bit, in a batch of several tiles, two at a time in reverse, and alone."""
    vocab, n = 523, 70
    executable = random_program(vocab, isa)
    batch = random_batch(np.random.default_rng(7), n, vocab)
    executable.forward(all_rows(n))
    whole = executable.sample(batch)
    logprobs = np.nan_to_num(whole.logprobs, nan=-1)
    for i in range(n):
        executable.forward(make_step([([i % 64], 0, [0])]))
        alone = executable.sample(some(batch, [i]))
        asks = slice(batch.ask_starts[i], batch.ask_starts[i + 1])
        width = alone.top_ids.shape[1]
        assert alone.tokens[0] == whole.tokens[i]
        assert alone.mirostat_mu[0] == whole.mirostat_mu[i]
        assert np.nan_to_num(alone.logprobs[0], nan=-1) == logprobs[i]
        assert alone.ranks[0] == whole.ranks[i]
        assert alone.top_ids.tobytes() == whole.top_ids[i, :width].tobytes()
        assert alone.top_logprobs.tobytes() == whole.top_logprobs[i, :width].tobytes()
        assert alone.ask_logprobs.tobytes() == whole.ask_logprobs[asks].tobytes()
        assert alone.ask_ranks.tobytes() == whole.ask_ranks[asks].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_threads(isa: str) -> None:
    """Bit for bit, whoever does which row."""
    batch = random_batch(np.random.default_rng(8), 70, 523)
    outputs = []
    for threads in (1, 2, 3):
        executable = random_program(523, isa, threads)
        executable.forward(all_rows(70))
        outputs.append(executable.sample(batch))
    assert_bitwise(outputs[0], outputs[1])
    assert_bitwise(outputs[0], outputs[2])


@pytest.mark.parametrize("isa", ISAS)
def test_an_output_is_used_again(isa: str) -> None:
    executable = random_program(523, isa, 2)
    executable.forward(all_rows(20))
    batches = [random_batch(np.random.default_rng(seed), 20, 523) for seed in (8, 9)]
    for batch in batches:
        batch.rows["num_logprobs"] = 3
    batches[1] = replace(batches[1], ask_ids=batches[0].ask_ids, ask_starts=batches[0].ask_starts)
    expected = executable.sample(batches[1])
    first = executable.sample(batches[0])
    again = executable.sample(batches[1], first)
    assert again is first
    assert_bitwise(again, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_several_times(isa: str) -> None:
    """A row that several tokens are drawn from has the same logits each time; draws may outnumber rows."""
    executable = random_program(523, isa)
    step = all_rows(3)
    executable.forward(step)
    logits, hidden = executable.logits(), executable.hidden()
    wanted = [0, 1, 1, 1, 1, 2, 2]
    executable.forward(replace(step, sample_rows=np.array(wanted, np.int32)))
    assert np.array_equal(executable.logits(), logits[wanted])
    assert np.array_equal(executable.hidden(), hidden[wanted])
    batch = make_batch(at_positions({}, 7), 523)
    assert_same(executable.sample(batch), reference_sampler.sample(logits[wanted], batch))


@pytest.mark.parametrize("isa", ISAS)
def test_rows_that_want_nothing(isa: str) -> None:
    """Whole tiles of them, and single ones between others."""
    executable = random_program(523, isa)
    executable.forward(all_rows(100))
    rows = [{"draw": int(i in (3, 97)), "num_logprobs": 2 if i == 98 else -1} for i in range(100)]
    batch = make_batch(rows, 523, asks=[[7, 5] if i == 99 else [] for i in range(100)])
    found = executable.sample(batch)
    assert_same(found, reference_sampler.sample(executable.logits(), batch))
    assert np.flatnonzero(found.tokens >= 0).tolist() == [3, 97]


@pytest.mark.parametrize("isa", ISAS)
def test_hidden(isa: str) -> None:
    """What the output table multiplies: with the identity for one, the logits themselves."""
    rng = np.random.default_rng(9)
    weights = {
        "rows.weight": dense(rng.normal(0, 1, (40, 48))),
        "norm.weight": dense(rng.uniform(0.5, 1.5, 48)),
        "w.weight": dense(np.eye(48)),
    }
    for normed in (True, False):
        graph = Graph(weights)
        rows = graph.take_rows(graph.embed("rows"))
        graph.logits(graph.norm(rows, "norm", eps=1e-5) if normed else rows, "w")
        for whole in (graph, fuse(graph)):
            executable = CpuBackend(isa).compile(whole, weights, CompileOptions(threads=1), limits_for())
            executable.forward(make_step([(range(40), 0, range(2))], sample="all"))
            assert executable.hidden().dtype == np.float32
            assert np.array_equal(executable.hidden(), executable.logits())


MEMORY = """
import resource
import numpy as np
from tests.kernels.test_sampler import ISAS, random_program
from tests.sampling import make_batch
from tests.tiny_models import make_batch as make_step

vocab, n = 151_936, 2000
executable = random_program(vocab, ISAS[0], threads=2, rows=n)
executable.forward(make_step([([i % 64 for i in range(n)], 0, range(63))], sample="all"))
row = {"draw": 0, "num_logprobs": 5}
batch = make_batch([row] * n, vocab, asks=[[i] for i in range(n)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = executable.sample(batch)
assert np.isfinite(found.top_logprobs).all() and (found.ask_ranks > 0).all()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_prompt_logprobs_take_little_memory() -> None:
    """Logprobs of 2,000 positions and 151,936 tokens: of 1.2 GB of logits, 32 rows exist at a time."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 100e6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"history": np.array([0, 40], np.int32)}, "history token 40 is outside the vocabulary of 40"),
        ({"history": np.array([-1, 0], np.int32)}, "history token -1"),
        ({"history": np.array([0], np.int32)}, "history starts do not divide 1 tokens among 2 rows"),
        ({"history_starts": np.array([0, 3, 2], np.int64)}, "history starts"),
        ({"history_starts": np.array([1, 1, 2], np.int64)}, "history starts"),
        ({"history_starts": np.array([0, 2], np.int64)}, "starts of a ragged array"),
        ({"bias_ids": np.array([40], np.int32)}, "bias token 40"),
        ({"bias_values": np.zeros(2, np.float32)}, "belong together"),
        ({"ask_ids": np.array([2**31 - 1], np.int32)}, "ask token"),
        ({"ask_starts": np.array([0, 2**62, 1], np.int64)}, "ask starts"),
        ({"masks": np.zeros((1, 1), np.uint32)}, "masks of 1 words for a vocabulary of 40"),
        ({"masks": np.zeros((0, 2), np.uint32)}, "mask 0 of 0"),
        ({"rows": {"mask": 1}}, "mask 1 of 1"),
        ({"rows": {"dry_breakers": -2}}, "mask -2 of 1"),
        ({"rows": {"order": [10] + [0] * 11}}, "no sampler has the number 10"),
        ({"rows": {"mirostat": 3}}, "mirostat 3"),
        ({"rows": {"temperature": np.inf}}, "temperature is not finite"),
        ({"history": np.zeros(2, np.int64)}, "incompatible"),
    ],
    ids=str,
)  # fmt: skip
def test_contradictions(wrong: dict[str, Any], message: str) -> None:
    """Refused before anything is computed; the program works on afterwards."""
    sampler = Sampler(np.zeros((1, 40), np.float32), ISAS[0])
    good = make_batch([{"mask": 0}, {}], 40, [[3], [4]], [{5: 1.0}, {}], [[6], []], [[1, 2]])
    expected = sampler.check(good)
    rows = good.rows.copy()
    for name, value in wrong.get("rows", {}).items():
        rows[name][1] = value
    with pytest.raises(BackendError, match=message):
        sampler.executable.sample(replace(good, **{**wrong, "rows": rows}))
    assert_bitwise(sampler.executable.sample(good), expected)


def test_other_numbers_of_rows() -> None:
    sampler = Sampler(np.zeros((1, 40), np.float32), ISAS[0])
    sampler.check(make_batch([{}, {}], 40))
    for n in (0, 1, 3):
        with pytest.raises(BackendError, match=f"{n} rows; the last step has 2 sample rows"):
            sampler.executable.sample(make_batch([{}] * n, 40))
