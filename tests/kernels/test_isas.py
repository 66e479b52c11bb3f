"""What separates instruction sets: the AVX ones agree in every bit, and none saturates."""

from __future__ import annotations

import numpy as np
import pytest
from tests.kernels.programs import FORMATS, ISAS, assert_within, int8_linear, logits_program
from tests.tiny_models import dense, make_batch, random_weight, tiny_llama

from hexad.backends.backend import CompileOptions, Limits
from hexad.backends.cpu import CpuBackend
from hexad.graph.fuse import fuse
from hexad.weights import Weight
from hexad.weights.ggml import BlockFormat

AVX = [isa for isa in ISAS if isa.startswith("avx")]
LIMITS = Limits(max_rows=256, max_seqs=4, max_model_len=512, kv_blocks=32)


@pytest.mark.skipif(len(AVX) < 2, reason="this machine or build has not two of them to compare")
@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("layout", FORMATS)
def test_avx_paths_agree(layout: str, compute: str) -> None:
    """All form their float sums in one order with the same fused multiply-adds, and integers are exact. So a
    saturated or lost product anywhere in one of them would show."""
    model = tiny_llama(
        hidden=512, intermediate=768, heads=8, head_dim=64, vocab=200, context=512, attention_bias=True,
        format=FORMATS[layout],
    )  # fmt: skip
    rng = np.random.default_rng(0)
    for name, weight in model.weights.items():
        if "norm" in name:  # some features much larger than the rest: outliers
            scale = weight.dequantise().copy()
            scale[rng.integers(0, len(scale), 3)] *= 25
            model.weights[name] = dense(scale)
    sequences = [(range(n), 0, range(8 * i, 8 * i + 8)) for i, n in enumerate((1, 5, 33, 150))]
    found = []
    for isa in AVX:
        options = CompileOptions(compute=compute, threads=1)  # type: ignore[arg-type]
        executable = CpuBackend(isa).compile(fuse(model.graph()), model.weights, options, LIMITS)
        executable.forward(make_batch(sequences, sample="all"))
        found.append(executable.logits())
    assert np.isfinite(found[0]).all()
    for isa, logits in zip(AVX, found, strict=True):
        assert np.array_equal(logits, found[0]), isa


# Where a block's fp16 scales and minimums lie; all else are codes, and integers of up to 8 bits.
HALVES = {
    "Q4_0": slice(0, 2), "Q4_1": slice(0, 4), "Q5_0": slice(0, 2), "Q5_1": slice(0, 4), "Q8_0": slice(0, 2),
    "Q2_K": slice(80, 84), "Q3_K": slice(108, 110), "Q4_K": slice(0, 4), "Q5_K": slice(0, 4),
    "Q6_K": slice(208, 210),
}  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", [name for name, format in FORMATS.items() if format.name in HALVES])
def test_extreme_codes(layout: str, isa: str) -> None:
    """The smallest and the largest codes there are, against activations of ±127: nothing saturates."""
    rng = np.random.default_rng(1)
    format = FORMATS[layout]
    assert isinstance(format, BlockFormat)
    weight = random_weight(rng, (70, 512), format)
    blocks = weight.arrays["blocks"].reshape(70, -1, format.block_bytes).copy()
    halves = blocks[..., HALVES[format.name]].copy()
    blocks[:] = np.resize([0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0], 70).astype(np.uint8)[:, None, None]
    blocks[..., HALVES[format.name]] = halves
    weight = Weight(format, (70, 512), {"blocks": blocks.reshape(70, -1)})
    signs = [np.ones(512), -np.ones(512), np.resize([1, -1], 512), np.resize([1, 1, -1, -1], 512)]
    x = np.array([3.0 * signs[i % 4] for i in range(40)], np.float32)
    expected, bound = int8_linear(x, weight)
    program = logits_program(x, weight, isa=isa, compute="int8")
    for rows in (*range(1, 7), 40):
        program.forward(make_batch([(range(rows), 0, [0, 1])], sample="all"))
        assert_within(program.logits(), expected[:rows], bound[:rows])
