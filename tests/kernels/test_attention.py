"""Paged attention on every ISA, in every cache type, against its definition in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.kernels.programs import ISAS, RowProgram, assert_within, gamma, quantise
from tests.tiny_models import dense, limits_for, make_batch, one_sequence

from hexad.backends.backend import CompileOptions
from hexad.backends.cpu import CpuBackend
from hexad.backends.reference import ReferenceBackend, from_cache, to_cache
from hexad.config import BLOCK_TOKENS
from hexad.graph import Graph, RopeSpec
from hexad.graph.fuse import fuse

pytestmark = pytest.mark.parametrize("isa", ISAS)

KV_DTYPES = ["f32", "f16", "q8"]

Sequences = list[tuple[range, int, Sequence[int]]]


@dataclass
class Case:
    """Random queries, keys and values of `rows` tokens, and one more of the largest numbers there are."""

    rows: int
    head_dim: int
    group: int
    kv_heads: int = 2
    window: int | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.rows + self.head_dim)
        widths = (self.heads * self.head_dim, *[self.kv_heads * self.head_dim] * 2)
        self.tables = [rng.normal(0, 1.5, (self.rows + 1, width)).astype(np.float32) for width in widths]
        for table in self.tables:
            table[-1] = np.finfo(np.float32).max

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def program(self, rope: RopeSpec | None = None, **settings: Any) -> RowProgram:
        q, k, v = self.tables

        def build(graph: Graph, queries: int) -> int:
            keys, values = graph.embed("k"), graph.embed("v")
            if rope is not None:
                queries, keys = graph.rope(queries, rope), graph.rope(keys, rope)
            return graph.attention(
                queries, keys, values,
                layer=1, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim, scale=self.scale,
                window=self.window,
            )  # fmt: skip

        weights = {"k.weight": dense(k), "v.weight": dense(v)}
        settings.setdefault("rows", max(self.rows, 512))
        return RowProgram(q, build, q.shape[1], weights, **settings)

    def cached(self, table: NDArray[np.float32], kv_dtype: str) -> NDArray[np.float64]:
        """Keys or values as the cache keeps them, [rows, kv heads, head_dim]."""
        heads = table.reshape(len(table), self.kv_heads, self.head_dim)
        if kv_dtype != "q8":
            return heads.astype(np.float16 if kv_dtype == "f16" else np.float32).astype(np.float64)
        codes, scales = quantise(heads)
        return codes.astype(np.float64) * scales[..., None]

    def expected(
        self, tokens: range, rows: Sequence[int], kv_dtype: str
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Outputs of these rows of a sequence and their bounds, both [rows, heads · head_dim].

        A score is a chain of head_dim roundings, off by γ(D + 4)·S for the largest Σ|q||k|·scale, S; so is,
        relatively, its weight, twice since the largest score is subtracted. exp itself is good to 2⁻²¹, and
        so is each of the B times by which a block rescales what came before. The weighted sum is a chain of
        T terms, which q8 rounds once more. The quotient doubles it all: 2 · (2γ(D + 4)·S + (B + 2)·2⁻²¹ +
        γ(T + 1 + 2B)) · Σ p|v|.
        """
        q = self.tables[0][tokens].astype(np.float64).reshape(len(tokens), self.heads, -1)
        k, v = (self.cached(table[tokens], kv_dtype) for table in self.tables[1:])
        outputs, bounds = [], []
        for row in rows:
            first = 0 if self.window is None else max(0, row - self.window + 1)
            for head in range(self.heads):
                keys, values = (x[first : row + 1, head // self.group] for x in (k, v))
                scores = keys @ q[row, head] * self.scale
                p = np.exp(scores - scores.max())
                p /= p.sum()
                largest = (np.abs(keys) @ np.abs(q[row, head])).max() * self.scale
                blocks = row // BLOCK_TOKENS - first // BLOCK_TOKENS + 1
                relative = (
                    2 * gamma(self.head_dim + 4) * largest
                    + (blocks + 2) * 2**-21
                    + gamma(row - first + 2 + 2 * blocks)
                )
                outputs.append(p @ values)
                bounds.append(2 * relative * (p @ np.abs(values)))
        shape = (len(rows), self.heads * self.head_dim)
        return np.reshape(outputs, shape), np.reshape(bounds, shape)


def scattered(lengths: Sequence[int], blocks: int) -> Sequences:
    """Sequences of these lengths, one after another in the tables, in blocks that lie anywhere."""
    order = [int(block) for block in np.random.default_rng(0).permutation(blocks)]
    sequences, first = [], 0
    for length in lengths:
        table = [order.pop() for _ in range(-(-length // BLOCK_TOKENS))]
        sequences.append((range(first, first + length), 0, table))
        first += length
    return sequences


def litter(case: Case, program: RowProgram, blocks: int) -> None:
    """Fills every slot of the pool with the largest keys and values, as a sequence that was there before."""
    for first in range(0, blocks, 16):
        table = list(range(first, min(first + 16, blocks)))
        program.executable.forward(make_batch([([case.rows] * (32 * len(table)), 0, table)]))


def check(case: Case, lengths: Sequence[int], isa: str, kv_dtype: str, threads: int = 1) -> None:
    blocks = sum(-(-length // BLOCK_TOKENS) for length in lengths) + 3
    program = case.program(isa=isa, kv_dtype=kv_dtype, kv_blocks=blocks, threads=threads)
    litter(case, program, blocks)
    sequences = scattered(lengths, blocks)
    batch = make_batch(sequences)
    w = case.window or 0
    edges = {0, w - 1, w, 511, 512, 511 + w, 512 + w, *(range(w - 3, w + 31, 8))} if w else {0}
    wanted = [sorted(edges & set(range(n)) | {*range(max(0, n - 2), n), n // 2}) for n in lengths]
    rows = [int(start) + row for start, some in zip(batch.row_starts, wanted, strict=False) for row in some]
    found = program.step(replace(batch, sample_rows=np.array(rows, np.int32)))
    for (tokens, _, _), some in zip(sequences, wanted, strict=True):
        expected, bound = case.expected(tokens, some, kv_dtype)
        assert_within(found[: len(some)], expected, bound)
        found = found[len(some) :]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("head_dim", [20, 32, 64, 80, 128])
def test_short(head_dim: int, group: int, kv_dtype: str, isa: str) -> None:
    lengths = [1, 31, 32, 33, 5, 64, 70]
    check(Case(sum(lengths), head_dim, group), lengths, isa, kv_dtype, threads=2)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("group", [1, 3])
def test_segments(group: int, kv_dtype: str, isa: str) -> None:
    """Contexts on both sides of one segment of 512 keys, and of two."""
    lengths = [511, 512, 513, 1100]
    check(Case(sum(lengths), 36, group, kv_heads=1), lengths, isa, kv_dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_chunks_company_and_threads_change_no_bit(kv_dtype: str, isa: str) -> None:
    """Whole, in chunks, alone, in company, on 1 to 3 threads, in blocks that held others: the same."""
    lengths = [600, 40, 1, 77]
    case = Case(sum(lengths), 32, 3)
    rope = RopeSpec(32, 32, 10_000.0)
    blocks = 30
    sequences = scattered(lengths, blocks)
    program = case.program(rope, isa=isa, kv_dtype=kv_dtype, kv_blocks=blocks)
    whole = program.step(make_batch(sequences, sample="all"))
    for threads in (1, 2, 3):
        program = case.program(rope, isa=isa, kv_dtype=kv_dtype, kv_blocks=blocks, threads=threads)
        assert np.array_equal(program.step(make_batch(sequences, sample="all")), whole)
        litter(case, program, blocks)
        tokens = sequences[0][0]
        table = sequences[0][2][::-1]
        done = 0
        for size in (1, 7, 100, 32, 250, 200, 1, 1, 8):  # 600 in all
            chunk = make_batch([(tokens[done : done + size], done, table)], sample="all")
            assert np.array_equal(program.step(chunk), whole[done : done + size])
            done += size


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("rotary_dim", [8, 20])
def test_fused_rope_changes_no_bit(rotary_dim: int, kv_dtype: str, isa: str) -> None:
    lengths = [33, 70]
    case = Case(sum(lengths), 20, 3)
    batch = make_batch(scattered(lengths, 8), sample="all")
    plain, fused = (
        case.program(RopeSpec(20, rotary_dim, 100.0), isa=isa, kv_dtype=kv_dtype, fused=fused).step(batch)
        for fused in (False, True)
    )
    assert np.array_equal(plain, fused)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_copied_blocks(kv_dtype: str, isa: str) -> None:
    """A copied block serves as the original, also after that is overwritten."""
    case = Case(140, 32, 2)
    program = case.program(isa=isa, kv_dtype=kv_dtype)
    whole = program.step(make_batch([(range(70), 0, [4, 2, 9])], sample="all"))
    program.step(make_batch([(range(64), 0, [4, 2])]))
    program.executable.copy_blocks([(4, 0), (2, 7)])
    program.step(make_batch([(range(70, 134), 0, [4, 2])]))
    assert np.array_equal(
        program.step(make_batch([(range(64, 70), 64, [0, 7, 1])], sample="all")), whole[64:]
    )


def test_f16_cache_saturates(isa: str) -> None:
    """Keys and values beyond 65504 are stored as that, not as infinity."""
    case = Case(40, 32, 1, kv_heads=1)
    case.tables[1][:] = 0  # all keys alike: the mean of the values
    case.tables[2][:] = 1e6
    found = case.program(isa=isa, kv_dtype="f16")(range(40))
    assert np.abs(found - 65504).max() <= 65504 * 1e-5


@pytest.mark.parametrize("head_dim", [20, 64, 100])
def test_q8_codes(head_dim: int, isa: str) -> None:
    """A token alone gets its value back: code × scale to the bit, as the reference backend keeps it, whatever
    the value's size and where it is not finite."""
    case = Case(200, head_dim, 2)
    rng = np.random.default_rng(5)
    values = case.tables[2]
    values *= 10.0 ** rng.integers(-44, 36, (len(values), 1))
    values[0], values[1] = 0, 1e-36
    for row, value in enumerate((np.nan, np.inf, -np.inf, 3e38, -3e38, 127, 126.5, 2.5), 2):
        values[row, ::7] = value
        values[row, 1::5] = value
    program = case.program(isa=isa, kv_dtype="q8", rows=16)
    batches = [range(first, min(first + 16, 200)) for first in range(0, 200, 16)]
    found = np.concatenate(
        [program.step(make_batch([([t], 0, [t % 16]) for t in tokens], sample="all")) for tokens in batches]
    )
    heads = values[:200].reshape(200, 2, head_dim)
    kept = from_cache(to_cache(heads, "q8"))
    assert np.array_equal(found.reshape(200, 2, 2, head_dim), np.repeat(kept[:, :, None], 2, axis=2))
    finite = np.isfinite(heads).all(axis=-1)
    codes, scales = quantise(heads[finite])
    assert np.array_equal(kept[finite], codes * scales[..., None])
    assert np.isfinite(kept).all()


def test_q8_takes_keys_that_are_not_finite_for_finite_ones(isa: str) -> None:
    """Infinities for 3.4e38, a NaN for 0, and the rest of the head goes by their scale."""
    case = Case(40, 32, 2)
    case.tables[0] *= 1e-37
    keys = case.tables[1]
    keys[3, 5], keys[7, 40], keys[11, 9] = np.nan, np.inf, -np.inf
    found = case.program(isa=isa, kv_dtype="q8")(range(40))
    keys[3, 5], keys[7, 40], keys[11, 9] = 0, 3.4e38, -3.4e38
    assert np.isfinite(found).all()
    assert np.array_equal(found, case.program(isa=isa, kv_dtype="q8")(range(40)))


WINDOWS = [1, 2, 31, 32, 33, 100, 512, 600]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_window(window: int, kv_dtype: str, isa: str) -> None:
    """Windows within a block, over blocks and over segments, in contexts before and after they fill."""
    lengths = [20, 600, 1250]
    check(Case(sum(lengths), 36, 3, kv_heads=1, window=window), lengths, isa, kv_dtype)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("window", WINDOWS)
def test_chunks_change_no_bit_of_a_window(window: int, kv_dtype: str, isa: str) -> None:
    """Whole, in chunks and token by token, beside another sequence, whatever is in the blocks behind."""
    case = Case(1250, 32, 3, kv_heads=1, window=window)
    blocks = 50
    (tokens, _, table), other = scattered([1200, 50], blocks)
    program = case.program(isa=isa, kv_dtype=kv_dtype, kv_blocks=blocks)
    whole = program.step(make_batch([(tokens, 0, table), other], sample="all"))
    assert np.isfinite(whole).all()
    litter(case, program, blocks)
    spoilt = next(block for block in range(blocks) if block not in table)
    done = 0
    for size in (1, 7, 100, 32, 250, 120, *[1] * 40, 300, 200, *[1] * 34, 116):  # 1200 in all
        behind = max(0, done - window + 1) // BLOCK_TOKENS  # blocks that no row sees any more
        seen = [*[spoilt] * behind, *table[behind:]]
        chunk = make_batch([(tokens[done : done + size], done, seen)], sample="all")
        assert np.array_equal(program.step(chunk), whole[done : done + size])
        done += size
    assert done == 1200


def test_a_window_as_long_as_the_context_is_none(isa: str) -> None:
    lengths = [70, 600]
    cases = [Case(sum(lengths), 32, 2, window=window) for window in (None, 600, 2**31 - 1)]
    batch = make_batch(scattered(lengths, 30), sample="all")
    free, *bounded = (case.program(isa=isa).step(batch) for case in cases)
    for found in bounded:
        assert np.array_equal(found, free)


@pytest.mark.parametrize("rope", [None, RopeSpec(36, 20, 100.0, magnitude=1.25)])
@pytest.mark.parametrize("normed", ["qk", "q", "k"])
def test_fused_norms_change_no_bit(normed: str, rope: RopeSpec | None, isa: str) -> None:
    """Norms of each head of q and k and their rotation where they lie, and as nodes of their own."""
    case = Case(120, 36, 3)
    q, k, v = case.tables
    rng = np.random.default_rng(6)
    weights = {"k.weight": dense(k), "v.weight": dense(v)} | {
        f"{name}_norm.weight": dense(rng.uniform(0.5, 2, 36).astype(np.float32)) for name in "qk"
    }
    shape = {"layer": 0, "heads": 6, "kv_heads": 2, "head_dim": 36, "scale": 0.3, "window": 50}

    def plain(graph: Graph, queries: int) -> int:
        keys = graph.embed("k")
        if "q" in normed:
            queries = graph.norm(queries, "q_norm", eps=1e-3, heads=6)
        if "k" in normed:
            keys = graph.norm(keys, "k_norm", eps=1e-3, heads=2)
        if rope is not None:
            queries, keys = graph.rope(queries, rope), graph.rope(keys, rope)
        return graph.attention(queries, keys, graph.embed("v"), **shape)

    def together(graph: Graph, queries: int) -> int:
        norms = tuple(f"{name}_norm.weight" if name in normed else None for name in "qk")
        return graph.append(
            "fused_attention", (queries, graph.embed("k"), graph.embed("v")),
            tuple(name for name in norms if name),
            **shape, norms=norms, norm_eps=1e-3, rope=rope, offsets=(0, 0, 0),
        )  # fmt: skip

    batch = make_batch(scattered([33, 70], 8), sample="all")
    found = [
        RowProgram(q, build, q.shape[1], weights, isa=isa, fused=False).step(batch)
        for build in (plain, together)
    ]
    assert np.array_equal(*found)
    assert not np.array_equal(found[0], case.program(rope, isa=isa).step(batch))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_later_tokens_never_influence_earlier_ones(value: float, kv_dtype: str, isa: str) -> None:
    """Not even where their keys and values are not finite, in the same tile of rows."""
    case = Case(45, 32, 3)
    clean = case.program(isa=isa, kv_dtype=kv_dtype)(range(45))
    for table in case.tables:
        table[20] = value
    found = case.program(isa=isa, kv_dtype=kv_dtype)(range(45))
    assert np.array_equal(found[:20], clean[:20])


@pytest.mark.parametrize("alias", ["values are keys", "queries are keys"])
def test_rotation_leaves_other_readers_values_alone(isa: str, alias: str) -> None:
    """Keys that are values too, or queries that are keys: rotated once, and only for those who want it."""
    rng = np.random.default_rng(3)
    widths = {"embed": (50, 64), "q": (64, 64), "k": (64, 64), "v": (64, 64), "head": (50, 64)}
    weights = {
        f"{name}.weight": dense(rng.normal(0, 0.3, shape).astype(np.float32))
        for name, shape in widths.items()
    }
    graph, rope = Graph(weights), RopeSpec(32, 32, 1e4)
    x = graph.embed("embed")
    k = graph.linear(x, "k")
    q, v = (graph.linear(x, "q"), k) if alias == "values are keys" else (k, graph.linear(x, "v"))
    y = graph.attention(
        graph.rope(q, rope), graph.rope(k, rope), v, layer=0, heads=2, kv_heads=2, head_dim=32, scale=0.2
    )
    graph.logits(graph.take_rows(y), "head")
    options, limits, batch = CompileOptions("float", "f32", 2), limits_for(), one_sequence(range(40))
    results = []
    for executable in (
        CpuBackend(isa).compile(fuse(graph), weights, options, limits),
        ReferenceBackend().compile(graph, weights, options, limits),
    ):
        executable.forward(batch)
        results.append(executable.logits())
    # Sums of 64 terms, three deep, of numbers up to about 20: a rotation too many is wrong by whole units.
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-3)
