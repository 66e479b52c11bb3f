"""The native sampler against its definition, `backends.reference.sample_token`, on fixed logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.kernels.programs import ISAS, logits_program
from tests.tiny_models import dense, make_batch

from hexad.backends.backend import SampleBatch
from hexad.backends.reference import philox4x32, sample_token

pytestmark = pytest.mark.parametrize("isa", ISAS)


class Sampler:
    """Draws from given logits, float32 [kinds, vocab]: each kind is a column of the output table, and a
    one-hot row picks it (x·1 plus zeros is x), so logits must be finite where there are several kinds."""

    def __init__(self, logits: NDArray[np.float32], isa: str) -> None:
        self.logits = logits
        one_hot = np.eye(len(logits), dtype=np.float32)
        self.executable = logits_program(one_hot, dense(logits.T), isa=isa)

    def draw(self, kinds: list[int], params: list[dict[str, Any]]) -> list[int]:
        self.executable.forward(make_batch([(kinds, 0, range(8))], sample="all"))
        return [int(token) for token in self.executable.sample(sample_batch(params))]

    def expected(self, kinds: list[int], params: list[dict[str, Any]]) -> list[int]:
        return [sample_token(self.logits[kind], **p) for kind, p in zip(kinds, params, strict=True)]


def params(
    temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
    seed: int = 0, sequence: int = 0, position: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Sampling parameters as both take them: the floats are float32 in a SampleBatch."""
    floats = {"temperature": temperature, "top_p": top_p, "min_p": min_p}
    return {name: float(np.float32(value)) for name, value in floats.items()} | {
        "top_k": top_k, "seed": seed, "sequence": sequence, "position": position,
    }  # fmt: skip


def sample_batch(params: list[dict[str, Any]]) -> SampleBatch:
    dtypes = {
        "temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "min_p": np.float32,
        "seed": np.uint64, "sequence": np.uint32, "position": np.uint32,
    }  # fmt: skip
    return SampleBatch(**{name: np.array([p[name] for p in params], dtype) for name, dtype in dtypes.items()})


FILTERS = [
    {},
    {"top_k": 1}, {"top_k": 2}, {"top_k": 40}, {"top_k": 299}, {"top_k": 300}, {"top_k": 5000}, {"top_k": -1},
    {"top_p": 0.01}, {"top_p": 0.5}, {"top_p": 0.9}, {"top_p": 0.9999},
    {"min_p": 0.01}, {"min_p": 0.3}, {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7}, {"top_k": 50, "min_p": 0.02}, {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.005},
]  # fmt: skip


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_definition(filters: dict[str, Any], temperature: float, isa: str) -> None:
    """The same tokens, draw for draw. The two may differ by the last bit of exp: a draw on a boundary within
    2⁻²⁴ or so could fall to either side, and none of these does."""
    logits = np.random.default_rng(0).normal(0, 3, (2, 300)).astype(np.float32)
    logits[1] = np.round(logits[1])  # many equals
    sampler = Sampler(logits, isa)
    kinds = [i % 2 for i in range(60)]
    wanted = [
        params(temperature, **filters, seed=2**63 + 12345 * i, sequence=i % 3, position=i) for i in range(60)
    ]
    found = sampler.draw(kinds, wanted)
    assert found == sampler.expected(kinds, wanted)
    if not filters:
        assert len(set(found)) > 5


def test_large_vocabulary(isa: str) -> None:
    """More candidates than the fronts that top-p sorts at first: 256, 2048, 16384."""
    logits = np.random.default_rng(1).normal(0, 0.1, (1, 20_000)).astype(np.float32)
    sampler = Sampler(logits, isa)
    wanted = [
        params(1.0, top_p=top_p, top_k=top_k, seed=7, position=i)
        for i, (top_p, top_k) in enumerate(
            (p, k) for p in (0.005, 0.05, 0.3, 0.95, 1.0) for k in (0, 100, 15_000)
        )
    ]
    assert sampler.draw([0] * 15, wanted) == sampler.expected([0] * 15, wanted)


def test_random_numbers(isa: str) -> None:
    """Equal weights turn the draw into ⌊u · vocab⌋, exactly: Philox's word by seed, sequence and position."""
    vocab = 1024
    sampler = Sampler(np.zeros((1, vocab), np.float32), isa)
    keys = [
        (0, 0, 0), (2**64 - 1, 2**32 - 1, 2**32 - 1), (0x299F31D0A4093822, 0x85A308D3, 0x243F6A88),
        (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2**31, 5),
    ]  # fmt: skip
    words = [int(philox4x32((p, q, 0, 0), (s & 0xFFFFFFFF, s >> 32))[0]) for s, q, p in keys]
    assert words[0] == 0x6627E8D5  # the known answer for a counter and key of zeros (Random123's kat_vectors)
    assert len({word >> 22 for word in words}) == len(keys)
    wanted = [params(seed=s, sequence=q, position=p) for s, q, p in keys]
    assert sampler.draw([0] * len(keys), wanted) == [word >> 22 for word in words]


@pytest.mark.parametrize("temperature", [0.0, 9e-6])
def test_greedy(temperature: float, isa: str) -> None:
    """The largest logit and of equals the lowest id, whatever vector or rest it lies in; filters are moot."""
    logits = np.random.default_rng(2).normal(0, 1, (40, 107)).astype(np.float32)
    ties = [sorted({kind, (kind * 37 + 5) % 107, 106 - kind}) for kind in range(40)]
    for row, ids in zip(logits, ties, strict=True):
        row[ids] = 9
    logits[0] = -3  # all equal
    ties[0] = [0]
    wanted = [params(temperature, top_k=3, top_p=0.1, min_p=1.0, seed=i) for i in range(40)]
    sampler = Sampler(logits, isa)
    assert sampler.draw(list(range(40)), wanted) == [ids[0] for ids in ties]


def test_ties_at_the_cut(isa: str) -> None:
    """Of equals at the cut of top-k or top-p the lowest ids stay; min-p keeps them all."""
    sampler = Sampler(np.array([[0, 1, 1, 0, 1, 1]], np.float32), isa)
    for filters, kept in (
        ({"top_k": 2}, {1, 2}),
        ({"top_p": 0.3}, {1, 2}),  # each of four weighs 0.21
        ({"min_p": 0.9}, {1, 2, 4, 5}),
        ({"top_k": 5}, {0, 1, 2, 4, 5}),
    ):
        wanted = [params(**filters, seed=i) for i in range(100)]
        found = sampler.draw([0] * 100, wanted)
        assert set(found) == kept
        assert found == sampler.expected([0] * 100, wanted)


def test_frequencies(isa: str) -> None:
    """4,000 draws of four tokens of known probability: each count within 4.5 standard deviations."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(np.log(p).astype(np.float32)[None], isa)
    found = [
        token
        for first in range(0, 4000, 200)
        for token in sampler.draw([0] * 200, [params(seed=3, position=first + i) for i in range(200)])
    ]
    counts = np.bincount(found, minlength=4)
    assert (np.abs(counts - 4000 * p) <= 4.5 * np.sqrt(4000 * p * (1 - p))).all()


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize(
    "value", ["nan", "inf", "-inf", "one nan", "one inf", "one number"], ids=lambda v: v.replace(" ", "-")
)
def test_broken_logits(value: str, filters: dict[str, Any], isa: str) -> None:
    """The definition's answer whatever a broken model makes, −1 for "none": no crash, no hang."""
    logits = np.linspace(-1, 1, 70, dtype=np.float32)[None].copy()
    if value.startswith("one"):
        if value == "one number":
            logits[0, np.arange(70) != 33] = np.nan
        else:
            logits[0, 33] = float(value.split()[1])
    else:
        logits[:] = float(value)
    for temperature in (0.0, 0.5, 2.0):
        for seed in range(5):
            sampler, wanted = Sampler(logits, isa), [params(temperature, **filters, seed=seed)]
            (token,) = sampler.draw([0], wanted)
            assert [token] == sampler.expected([0], wanted)
            if value == "one number":
                assert token == 33
            elif value != "one nan":
                assert token == -1
            if value == "one nan":
                assert token == 69 if temperature == 0 else token != 33
