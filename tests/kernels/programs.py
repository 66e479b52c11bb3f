"""Small native programs around one op, and the definitions in NumPy that their kernels are held to.

Bounds are written with u = 2⁻²⁴, the unit roundoff of float32: a chain of n roundings is off by at most
γ(n) = n·u / (1 − n·u), relative to the sum of its terms' magnitudes (Higham 2002, Accuracy and Stability of
Numerical Algorithms, §3.1). Fused and unfused multiply-adds both satisfy them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tests.kernels.block_parts import block_parts
from tests.tiny_models import dense, make_batch

from hexad import _native
from hexad.backends.backend import Batch, CompileOptions, Limits
from hexad.backends.cpu import CpuBackend, CpuExecutable
from hexad.config import BLOCK_TOKENS, CacheDtype
from hexad.graph import Graph
from hexad.graph.fuse import fuse
from hexad.weights import Weight
from hexad.weights.ggml import FORMATS as STORED

ISAS = _native.isas()
FORMATS = {_native.layout_of(format.name)[0]: format for format in STORED.values()}
"""A stored format for each packed layout."""

Build = Callable[[Graph, int], int]


def assert_within(
    found: NDArray[np.floating], expected: NDArray[np.floating], bound: NDArray[np.floating] | float
) -> None:
    """|found − expected| ≤ bound everywhere; a NaN is beyond any bound."""
    excess = np.abs(found.astype(np.float64) - expected) - bound
    assert not np.isnan(excess).any(), f"{np.isnan(excess).sum()} values are NaN"
    assert excess.max() <= 0, f"off by {excess.max():g} more than its bound, at {np.argmax(excess)}"


def whole_blocks(columns: int, *layouts: str) -> int:
    """So many columns, or the next more that are whole blocks of all these layouts."""
    block = max(FORMATS[layout].block_size for layout in layouts)
    return -(-columns // block) * block


def gamma(roundings: float) -> float:
    """γ(n), for float32."""
    u = 2.0**-24
    return roundings * u / (1 - roundings * u)


class RowProgram:
    """Rows of a float table go through `build` and come out unrounded.

    The table is the embedding and the output table the identity: x·1 plus zeros is x. `build` gets the graph
    and the value of the rows and returns the value to read; width is that value's.
    """

    def __init__(
        self,
        table: NDArray[np.floating] | Weight,
        build: Build,
        width: int,
        weights: Mapping[str, Weight] | None = None,
        *,
        isa: str,
        compute: Literal["int8", "float"] = "float",
        kv_dtype: CacheDtype = "f32",
        threads: int = 1,
        fused: bool = True,
        rows: int = 256,
        seqs: int = 16,
        kv_blocks: int = 64,
    ) -> None:
        everything = {
            "rows.weight": table if isinstance(table, Weight) else dense(table),
            "identity.weight": dense(np.eye(width, dtype=np.float32)),
            **(weights or {}),
        }
        graph = Graph(everything)
        graph.logits(graph.take_rows(build(graph, graph.embed("rows"))), "identity")
        self.graph = fuse(graph) if fused else graph
        limits = Limits(max_rows=rows, max_seqs=seqs, max_model_len=rows * seqs, kv_blocks=kv_blocks)
        options = CompileOptions(compute=compute, kv_dtype=kv_dtype, threads=threads)
        self.executable: CpuExecutable = CpuBackend(isa).compile(self.graph, everything, options, limits)

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The outputs for these rows of the table as one sequence, float32 [tokens, width]."""
        return self.step(make_batch([(tokens, 0, range(-(-len(tokens) // BLOCK_TOKENS)))], sample="all"))

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """The outputs of a batch's sample rows, float32 [n, width]."""
        self.executable.forward(batch)
        return self.executable.logits()


def logits_program(table: NDArray[np.floating], weight: Weight, **settings: Any) -> CpuExecutable:
    """Rows of a float table times `weight` as the output table: the logits are one linear op alone."""
    weights = {"rows.weight": dense(table), "w.weight": weight}
    graph = Graph(weights)
    graph.logits(graph.take_rows(graph.embed("rows")), "w")
    isa = settings.pop("isa")
    limits = Limits(max_rows=256, max_seqs=16, max_model_len=256, kv_blocks=16)
    return CpuBackend(isa).compile(graph, weights, CompileOptions(threads=1, **settings), limits)


def int8_linear(x: NDArray[np.float32], weight: Weight) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The int8 arithmetic of csrc/ops/linear.h, exact from the quantised operands on.

    x [rows, K] is quantised per group of 32 in float32 just as csrc/ops/rows.h says, outlier groups once more
    with what rounding left. The products and sums are float64.
    Returns y and the bound on what float32 sums may be off, both [rows, out]: each of n terms is rounded
    twice where it is formed and then once by each addition it goes through, so γ(n + 2) · Σ|term|.
    """
    quants, d, m = block_parts(weight)  # [out, parts, columns of a part], [out, parts], [out, parts]
    groups = x.reshape(len(x), -1, 32)
    q, dx = quantise(groups)
    squares = np.zeros(len(x), np.float32)
    for i in range(groups.shape[1]):
        squares = squares + dx[:, i] * dx[:, i]
    limit = np.float32(4) * (squares / np.float32(groups.shape[1]))
    outlier = dx * dx > limit[:, None]
    outlier &= np.cumsum(outlier, axis=1) <= (groups.shape[1] - 1) // 4  # rounding could let one more pass
    rest_q, rest_d = quantise(groups - dx[..., None] * q)
    rest_d = np.where(outlier, rest_d, np.float32(0))

    parts = 32 // quants.shape[2]  # per group
    y = np.zeros((len(x), len(quants)))
    size = np.zeros_like(y)
    for codes, scale in ((q, dx), (rest_q, rest_d)):
        codes = codes.reshape(len(x), *quants.shape[1:])
        scale = scale.repeat(parts, axis=1)
        for p in range(quants.shape[1]):
            product = codes[:, p].astype(np.float64) @ quants[:, p].T * d[:, p] * scale[:, p, None]
            total = (scale[:, p] * codes[:, p].sum(axis=1, dtype=np.float32)).astype(np.float64)
            minimum = total[:, None] * m[:, p]
            y += product + minimum
            size += np.abs(product) + np.abs(minimum)
    # A slot that is no outlier in its tile adds zeros, which round nothing.
    terms = (groups.shape[1] + outlier.sum(axis=1)) * parts * (2 if np.any(m) else 1)
    return y, np.array([gamma(n + 2) for n in terms])[:, None] * size


def quantise(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Integers (in float32) and scales of finite groups [..., n]: d = max|x| / 127, q = x/d to even."""
    d = np.abs(x).max(axis=-1) / np.float32(127)
    d[d < 1e-36] = 0  # 1/d would overflow
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    return np.rint(x * inverse[..., None]), d
