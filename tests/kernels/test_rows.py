"""Embedding, norm, RoPE, gate, addition and row selection on every ISA, against definitions in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tests.kernels.programs import FORMATS, ISAS, RowProgram, assert_within, gamma, whole_blocks
from tests.tiny_models import dense, make_batch, random_weight

from hexad.graph import RopeSpec

pytestmark = pytest.mark.parametrize("isa", ISAS)

WIDTHS = [1, 15, 16, 17, 48, 100, 576]
"""Around one vector of 16, and with and without a rest."""

U = 2.0**-24


@pytest.mark.parametrize("layout", FORMATS)
def test_embed(layout: str, isa: str) -> None:
    """A dequantised row is exact: one or two roundings, the same in the definition."""
    rng = np.random.default_rng(0)
    shapes = [
        (vocab, whole_blocks(width, layout)) for vocab, width in [(1, 32), (33, 96), (100, 320), (70, 768)]
    ]
    for vocab, width in shapes + ([(70, 20), (5, 1)] if FORMATS[layout].block_size == 1 else []):
        table = random_weight(rng, (vocab, width), FORMATS[layout], std=1.0)
        program = RowProgram(table, lambda graph, rows: rows, width, isa=isa)
        tokens = rng.integers(0, vocab, 33)
        assert np.array_equal(program(tokens), table.dequantise()[tokens])


@pytest.mark.parametrize("width", WIDTHS)
def test_norm(width: int, isa: str) -> None:
    """The squares are summed in 16 lanes and a tree: at most width/16 + 6 roundings, halved by the root; the
    rest are 5 more."""
    rng = np.random.default_rng(1)
    x = (rng.normal(0, 1, (33, width)) * rng.choice([1e-4, 1, 1e4], (33, 1))).astype(np.float32)
    x[4] = 0
    scale = rng.uniform(0.5, 1.5, width).astype(np.float32)
    program = RowProgram(
        x, lambda graph, rows: graph.norm(rows, "n", eps=1e-5), width, {"n.weight": dense(scale)}, isa=isa
    )
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + np.float32(1e-5)) * scale
    assert_within(program(range(33)), expected, gamma((width / 16 + 6) / 2 + 5) * np.abs(expected))


@pytest.mark.parametrize(("heads", "size"), [(1, 33), (3, 20), (9, 64), (2, 128)])
def test_norm_of_heads(heads: int, size: int, isa: str) -> None:
    """Each head is normed as a row of its size is."""
    rng = np.random.default_rng(8)
    x = (rng.normal(0, 1, (33, heads, size)) * rng.choice([0.1, 10], (33, heads, 1))).astype(np.float32)
    weights = {"n.weight": dense(rng.uniform(0.5, 1.5, size).astype(np.float32))}
    together = RowProgram(
        x.reshape(33, -1),
        lambda graph, rows: graph.norm(rows, "n", eps=1e-5, heads=heads),
        heads * size, weights, isa=isa,
    )  # fmt: skip
    alone = RowProgram(
        x.reshape(-1, size), lambda graph, rows: graph.norm(rows, "n", eps=1e-5), size, weights,
        isa=isa, rows=33 * heads,
    )  # fmt: skip
    assert np.array_equal(together(range(33)).reshape(-1, size), alone(range(33 * heads)))


@pytest.mark.parametrize("magnitude", [1.0, 1.2079442])
@pytest.mark.parametrize("start", [0, 31, 8000])
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(2, 2), (20, 20), (64, 64), (80, 32), (128, 128)])
def test_rope(head_dim: int, rotary_dim: int, start: int, magnitude: float, isa: str) -> None:
    """The angle is a float32 product by definition. Its sine and cosine may be off by an ulp, 2u, and each
    product and the sum by u, as may be a magnitude and its products; features past rotary_dim stay as they
    are."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 1, (33, 3 * head_dim)).astype(np.float32)
    rope = RopeSpec(head_dim, rotary_dim, 10_000.0, magnitude=magnitude)
    program = RowProgram(x, lambda graph, rows: graph.rope(rows, rope), 3 * head_dim, isa=isa, kv_blocks=300)
    found = program.step(make_batch([(range(33), start, range(300))], sample="all")).reshape(33, 3, -1)
    positions = np.arange(start, start + 33, dtype=np.float32)
    angles = (positions[:, None] * rope.inv_freq()).astype(np.float64)[:, None]
    heads, half = x.reshape(33, 3, head_dim), rotary_dim // 2
    a, b = heads[..., :half].astype(np.float64), heads[..., half:rotary_dim].astype(np.float64)
    bound = (4 if magnitude == 1 else 6 * magnitude) * U * (np.abs(a) + np.abs(b))
    cos, sin = np.cos(angles) * magnitude, np.sin(angles) * magnitude
    assert_within(found[..., :half], a * cos - b * sin, bound)
    assert_within(found[..., half:rotary_dim], b * cos + a * sin, bound)
    assert np.array_equal(found[..., rotary_dim:], heads[..., rotary_dim:])


def test_rope_of_ragged_sequences(isa: str) -> None:
    """Each row has the position in its own sequence."""
    x = np.random.default_rng(3).normal(0, 1, (33, 32)).astype(np.float32)
    program = RowProgram(x, lambda graph, rows: graph.rope(rows, RopeSpec(16, 16, 100.0)), 32, isa=isa)
    together = program.step(
        make_batch([(range(5), 40, [0, 1]), (range(5, 6), 0, [2]), (range(6, 33), 7, [3, 4])], sample="all")
    )
    alone = [
        program.step(make_batch([(tokens, start, [0, 1])], sample="all"))
        for tokens, start in ((range(5), 40), (range(5, 6), 0), (range(6, 33), 7))
    ]
    assert np.array_equal(together, np.concatenate(alone))


@pytest.mark.parametrize("width", WIDTHS)
def test_gated(width: int, isa: str) -> None:
    """silu is good to 2⁻²⁰ (the exponential's polynomial to 2⁻²¹); its sigmoid never falls below e⁻⁸⁷."""
    rng = np.random.default_rng(4)
    gate, up = (rng.normal(0, std, (33, width)).astype(np.float32) for std in (5, 1))
    gate[:, 0] = np.resize([0, -0.0, 1e-30, 20, 88, 200, 1e30, -20, -86.9, -87.1, -103, -1e4], 33)
    program = RowProgram(
        gate,
        lambda graph, rows: graph.gated(rows, graph.embed("up"), "silu"),
        width,
        {"up.weight": dense(up)},
        isa=isa,
    )
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    bound = 2**-20 * np.abs(expected) + np.exp(-86.9) * np.abs(gate.astype(np.float64) * up)
    assert_within(program(range(33)), expected, bound)


@pytest.mark.parametrize("width", WIDTHS)
def test_add(width: int, isa: str) -> None:
    rng = np.random.default_rng(5)
    a, b = (rng.normal(0, 1, (33, width)).astype(np.float32) for _ in range(2))
    program = RowProgram(
        a, lambda graph, rows: graph.add(rows, graph.embed("b")), width, {"b.weight": dense(b)}, isa=isa
    )
    assert np.array_equal(program(range(33)), a + b)


def test_take_rows(isa: str) -> None:
    """The wanted rows in order; none at all is a step that only writes the cache."""
    x = np.random.default_rng(6).normal(0, 1, (100, 24)).astype(np.float32)
    program = RowProgram(x, lambda graph, rows: rows, 24, isa=isa)
    batch = make_batch([(range(60), 0, [0, 1]), (range(60, 100), 3, [2, 3])])
    for wanted in ([], [0], [99], [3, 59, 60, 98], range(1, 100, 2)):
        assert np.array_equal(
            program.step(replace(batch, sample_rows=np.array(wanted, np.int32))), x[list(wanted)]
        )


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads(threads: int, isa: str) -> None:
    """More members than rows, or than cores: every row is done once."""
    x = np.random.default_rng(7).normal(0, 1, (100, 40)).astype(np.float32)
    program = RowProgram(x, lambda graph, rows: graph.add(rows, rows), 40, isa=isa, threads=threads)
    for rows in (1, 2, 7, 100):
        assert np.array_equal(program(range(rows)), 2 * x[:rows])
