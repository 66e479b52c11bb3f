"""The linear kernels: every packed layout, ISA and arithmetic, odd shapes, 1 to 33 rows and more."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.kernels.programs import (
    FORMATS,
    ISAS,
    RowProgram,
    assert_within,
    gamma,
    int8_linear,
    logits_program,
    whole_blocks,
)
from tests.tiny_models import dense, make_batch, random_weight

from hexad.backends.reference import silu
from hexad.graph import Graph, Node
from hexad.weights import Weight
from hexad.weights.blocks import BlockFormat

ROWS = (*range(1, 34), 100, 200)
"""Every tile width and both sides of the number of tiles from which panels are unpacked into strips."""

# (out features, K): panels of 32 partly filled, K of one group, around the strip of 512 and past two of them.
# For layouts of 256-column blocks K is rounded up: 256, 512, 768, 1280.
SHAPES = [(1, 32), (31, 64), (33, 288), (70, 512), (40, 544), (65, 1056)]
QUANTISED = [name for name, format in FORMATS.items() if isinstance(format, BlockFormat)]


def rows_of(rng: np.random.Generator, rows: int, columns: int) -> NDArray[np.float32]:
    """Activations as models have them: normal, some features 20 times larger, rows tiny and huge, one 0."""
    x = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    x[:, rng.integers(0, columns, max(1, columns // 150))] *= 20
    x[::5] *= rng.choice([1e-6, 1e5], (len(x[::5]), 1))
    x[3:4] = 0
    return x


def float_bound(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float64]:
    """γ(K + 1) · Σ|w||x|: each product is rounded once and goes through at most K additions."""
    return gamma(w.shape[1] + 1) * (np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T)


def exact(x: NDArray[np.float32], w: NDArray[np.float32]) -> NDArray[np.float64]:
    return x.astype(np.float64) @ w.astype(np.float64).T


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", FORMATS)
def test_float(layout: str, shape: tuple[int, int], isa: str) -> None:
    rng = np.random.default_rng(1)
    columns = whole_blocks(shape[1], layout)
    weight = random_weight(rng, (shape[0], columns), FORMATS[layout])
    x = rows_of(rng, 33, columns)
    w = weight.dequantise()
    expected, bound = exact(x, w), float_bound(x, w)
    program = logits_program(x, weight, isa=isa, compute="float")
    for rows in range(1, 34):
        program.forward(make_batch([(range(rows), 0, [0, 1])], sample="all"))
        assert_within(program.logits(), expected[:rows], bound[:rows])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", QUANTISED)
def test_int8(layout: str, shape: tuple[int, int], isa: str) -> None:
    rng = np.random.default_rng(2)
    columns = whole_blocks(shape[1], layout)
    weight = random_weight(rng, (shape[0], columns), FORMATS[layout])
    x = rows_of(rng, 33, columns)
    expected, bound = int8_linear(x, weight)
    program = logits_program(x, weight, isa=isa, compute="int8")
    for rows in range(1, 34):
        program.forward(make_batch([(range(rows), 0, [0, 1])], sample="all"))
        assert_within(program.logits(), expected[:rows], bound[:rows])


@pytest.mark.parametrize("layout", QUANTISED)
def test_int8_against_float(layout: str) -> None:
    """Rounding to d · q is off by at most d/2 per activation, and d/254 of that where rounding is repeated:
    |Δ| ≤ Σ_g Σ_k |w_k| · d_g/2 (· 1/127), with 1 % for the float32 arithmetic of it all. An outlier group
    without its second pass would break the bound."""
    rng = np.random.default_rng(3)
    columns = whole_blocks(576, layout)
    groups = columns // 32
    weight = random_weight(rng, (64, columns), FORMATS[layout])
    x = rng.normal(0, 1, (30, columns)).astype(np.float32)
    x[:, [5, 300]] = rng.choice([-1, 1], (30, 2)) * rng.uniform(30, 40, (30, 2))  # in groups 0 and 9
    w = weight.dequantise()
    d = np.abs(x).reshape(30, groups, 32).max(axis=2) / 127
    outlier = d**2 > 4 * np.mean(d**2, axis=1, keepdims=True)
    assert outlier[:, [0, 9]].all()
    assert outlier.sum() == 60
    worst = np.where(outlier, d / 127, d) / 2
    bound = 1.01 * worst @ np.abs(w).reshape(64, groups, 32).sum(axis=2).T.astype(np.float64)
    program = logits_program(x, weight, isa=ISAS[0], compute="int8")
    program.forward(make_batch([(range(30), 0, [0])], sample="all"))
    assert_within(program.logits(), exact(x, w), bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("groups", "layout"),
    [(9, "w8"), (12, "w8"), (20, "w8"), (24, "w8"), (24, "w2k"), (24, "w6k"), (40, "w5k")],
)
def test_most_outliers(groups: int, layout: str, isa: str) -> None:
    """As many outlier groups as a tile can have: each row has a quarter of all groups, equally large and its
    own, and nothing else. In exact arithmetic a whole quarter is just no outlier; these numbers are such that
    float32 rounds the mean of squares down, and it would be. All but the last of them have room."""
    rng = np.random.default_rng(4)
    quarter = groups // 4
    x = np.zeros((200, groups, 32), np.float32)
    for i, row in enumerate(x):
        top = next(value for value in rng.uniform(0.5, 2, 1000) if all_outliers(value, quarter, groups))
        first = i % 4 * quarter
        row[first : first + quarter] = rng.uniform(-0.9, 0.9, (quarter, 32)) * top
        row[first : first + quarter, 5] = top
    x = x.reshape(200, -1)
    weight = random_weight(rng, (33, groups * 32), FORMATS[layout])
    expected, bound = int8_linear(x, weight)
    program = RowProgram(
        x, lambda graph, rows: graph.linear(rows, "w"), 33, {"w.weight": weight}, isa=isa, compute="int8"
    )
    for rows in (1, 2, 4, 8, 16, 33, 200):
        assert_within(program(range(rows)), expected[:rows], bound[:rows])


def all_outliers(largest: float, count: int, groups: int) -> bool:
    """Whether `count` groups with this largest value, and no others, are outliers in float32."""
    square = (np.float32(largest) / np.float32(127)) ** 2
    total = np.float32(0)
    for _ in range(count):
        total += square
    return bool(square > np.float32(4) * (total / np.float32(groups)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("columns", [544, 768])
def test_rows_do_not_see_each_other(columns: int, compute: str, isa: str) -> None:
    """A row's result is the same bits in any tile, block and company: 1 to 33 rows, 100 and 200."""
    rng = np.random.default_rng(5)
    formats = {name: format for name, format in FORMATS.items() if columns % format.block_size == 0}
    weights = {
        f"{name}.weight": random_weight(rng, (40, columns), format) for name, format in formats.items()
    }
    x = rows_of(rng, 200, columns)

    def build(graph: Graph, value: int) -> int:
        parts = [graph.linear(value, name) for name in formats]
        total = parts[0]
        for part in parts[1:]:
            total = graph.add(total, part)
        return total

    program = RowProgram(x, build, 40, weights, isa=isa, compute=compute)
    everything = program(range(200))
    for rows in ROWS:
        assert np.array_equal(program(range(rows)), everything[:rows])
    assert np.array_equal(program([7]), everything[7:8])


def project(x: np.ndarray, weight: Weight, bias: np.ndarray, compute: str) -> tuple[np.ndarray, np.ndarray]:
    """x · Wᵀ + b and its bound in one of the two arithmetics; the bias is one more addition."""
    if compute == "int8" and isinstance(weight.format, BlockFormat):
        y, bound = int8_linear(x, weight)
    else:
        w = weight.dequantise()
        y, bound = exact(x, w), float_bound(x, w)
    return y + bias, bound + gamma(1) * (np.abs(y + bias) + bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("pair", list(itertools.product(FORMATS, ["w4m", "f16"])), ids="-".join)
def test_mixed_formats_biases_and_epilogues(pair: tuple[str, str], compute: str, isa: str) -> None:
    """Projections of two formats read one x: side by side, gated, and added to a residual."""
    rng = np.random.default_rng(6)
    out, columns, rows = 45, whole_blocks(320, *pair), 33
    x = rng.normal(0, 1, (rows, columns)).astype(np.float32)
    a, b = (random_weight(rng, (out, columns), FORMATS[name]) for name in pair)
    back = random_weight(rng, (columns, columns), FORMATS[pair[0]])
    biases = [rng.normal(0, 1, out).astype(np.float32) for _ in range(2)]
    shift = rng.normal(0, 1, columns).astype(np.float32)
    weights = {
        "a.weight": a, "a.bias": dense(biases[0]), "b.weight": b, "b.bias": dense(biases[1]),
        "back.weight": back, "back.bias": dense(shift),
    }  # fmt: skip
    (ya, ba), (yb, bb) = project(x, a, biases[0], compute), project(x, b, biases[1], compute)

    def side_by_side(graph: Graph, value: int) -> int:
        projections = (("a.weight", "a.bias"), ("b.weight", "b.bias"))
        attrs = {"norm": None, "eps": 0.0, "projections": projections, "epilogue": "store", "act": None}
        names = tuple(name for projection in projections for name in projection)
        graph.nodes.append(Node("fused_linear", (value,), names, 2 * out, attrs))
        return value + 1

    found = RowProgram(x, side_by_side, 2 * out, weights, isa=isa, compute=compute, fused=False)(range(rows))
    assert_within(found, np.hstack([ya, yb]), np.hstack([ba, bb]))

    def gated(graph: Graph, value: int) -> int:
        return graph.gated(graph.linear(value, "a"), graph.linear(value, "b"), "silu")

    program = RowProgram(x, gated, out, weights, isa=isa, compute=compute)
    assert [node.attrs.get("epilogue") for node in program.graph.nodes] == [None, "gated", None, None]
    # |silu′| ≤ 1.1; the activation's own error is at most 2⁻²⁰, as test_rows.py shows.
    expected = silu(ya) * yb
    bound = 1.1 * ba * (np.abs(yb) + bb) + np.abs(silu(ya)) * bb + 2**-20 * np.abs(expected)
    assert_within(program(range(rows)), expected, bound)

    def added(graph: Graph, value: int) -> int:
        return graph.add(value, graph.linear(value, "back"))

    program = RowProgram(x, added, columns, weights, isa=isa, compute=compute)
    assert [node.attrs.get("epilogue") for node in program.graph.nodes] == [None, "add", None, None]
    y, bound = project(x, back, shift, compute)
    assert_within(program(range(rows)), x + y, bound + gamma(1) * (np.abs(x + y) + bound))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_fusing_changes_no_bit(compute: str, isa: str) -> None:
    """Norm, projections of every format, gate, residual: fused or one op at a time, the same bits."""
    rng = np.random.default_rng(7)
    columns = 512
    x = rows_of(rng, 40, columns)
    weights = {"n.weight": dense(rng.uniform(0.5, 1.5, columns))}
    for name, format in FORMATS.items():
        weights[f"{name}.weight"] = random_weight(rng, (columns, columns), format)
        weights[f"{name}.bias"] = dense(rng.normal(0, 1, columns))

    def build(graph: Graph, value: int) -> int:
        value = graph.add(value, graph.linear(graph.norm(value, "n", eps=1e-5), "w8"))
        for gate, up, down in (
            ("w4", "f16", "w4m"), ("w4k", "w6k", "w5"), ("w2k", "w3k", "bf16"), ("w5m", "w5k", "w8"),
        ):  # fmt: skip
            normed = graph.norm(value, "n", eps=1e-5)
            gated = graph.gated(graph.linear(normed, gate), graph.linear(normed, up), "silu")
            value = graph.add(value, graph.linear(gated, down))
        return graph.linear(graph.norm(value, "n", eps=1e-5), "f32")

    found = [
        RowProgram(x, build, columns, weights, isa=isa, compute=compute, fused=fused)(range(40))
        for fused in (False, True)
    ]
    assert np.isfinite(found[0]).all()
    assert np.array_equal(*found)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", FORMATS)
def test_logits_of_many_rows(layout: str, isa: str) -> None:
    """More sample rows than logits exist at a time (32), and not adjacent."""
    rng = np.random.default_rng(8)
    columns = whole_blocks(64, layout)
    x = rng.normal(0, 1, (150, columns)).astype(np.float32)
    weight = random_weight(rng, (77, columns), FORMATS[layout])
    program = logits_program(x, weight, isa=isa, compute="float")
    batch = make_batch([(range(150), 0, range(5))], sample="all")
    program.forward(batch)
    everything = program.logits()
    w = weight.dequantise()
    assert_within(everything, exact(x, w), float_bound(x, w))
    wanted = np.flatnonzero(rng.random(150) < 0.6).astype(np.int32)
    assert len(wanted) > 64
    program.forward(replace(batch, sample_rows=wanted))
    assert np.array_equal(program.logits(), everything[wanted])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", QUANTISED)
def test_int8_of_what_is_not_finite(layout: str, isa: str) -> None:
    """A NaN or an infinity makes its own row NaN and no other of its tile; what is all but zero is zero."""
    rng = np.random.default_rng(9)
    columns = whole_blocks(320, layout)
    weight = random_weight(rng, (33, columns), FORMATS[layout])
    x = rng.normal(0, 1, (24, columns)).astype(np.float32)
    program = logits_program(x, weight, isa=isa, compute="int8")
    program.forward(make_batch([(range(24), 0, [0])], sample="all"))
    clean = program.logits()
    x[3, 7], x[8, 300], x[15, 64], x[20, :32] = np.nan, np.inf, -np.inf, np.nan
    x[11] = np.float32(1e-42)
    program = logits_program(x, weight, isa=isa, compute="int8")
    program.forward(make_batch([(range(24), 0, [0])], sample="all"))
    found = program.logits()
    broken = [3, 8, 15, 20]
    assert np.isnan(found[broken]).all()
    assert not found[11].any()
    others = np.delete(np.arange(24), [*broken, 11])
    assert np.array_equal(found[others], clean[others])
