"""The K-quants of ggml: blocks of 256 weights whose scales are themselves small integers.

A block is 8 groups of 32 weights or 16 of 16. Each has an integer scale (and minimum), which the block's fp16
`d` (and `dmin`) multiply. Codes lie in bit planes: in one of 2 bits, byte l of a run of 32 has the weights l,
l + 32, l + 64 and l + 96, lowest bits first. Layouts: ggml's `block_q2_K` and siblings.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hexad.weights.blocks import BlockFormat, half

_BLOCK = 256


class Q2K(BlockFormat):
    """16 bytes of scale (low nibble) and minimum (high), 64 of 2-bit codes, d, dmin. y = d·sc·q − dmin·mn."""

    name, block_size, block_bytes = "Q2_K", _BLOCK, 84

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        scales = blocks[:, :16]
        out[:] = _fields(blocks[:, 16:80], run=32, bits=2)
        _scale(out, half(blocks, 80) * (scales & 15))
        _subtract(out, half(blocks, 82) * (scales >> 4))


class Q3K(BlockFormat):
    """32 bytes of high bits, 64 of low 2 bits, 12 of 6-bit scales, d. y = d·(sc − 32)·(q − 4)."""

    name, block_size, block_bytes = "Q3_K", _BLOCK, 110

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        low = _fields(blocks[:, 96:104], run=8, bits=4)
        scales = low | _fields(blocks[:, 104:108], run=4, bits=2) << 4
        codes = _fields(blocks[:, 32:96], run=32, bits=2) | _fields(blocks[:, :32], run=32, bits=1) << 2
        out[:] = codes
        out -= 4
        _scale(out, half(blocks, 108) * (scales.astype(np.float32) - 32))


class Q4K(BlockFormat):
    """d, dmin, 12 bytes of 6-bit scales and minimums, 128 of 4-bit codes. y = d·sc·q − dmin·mn."""

    name, block_size, block_bytes = "Q4_K", _BLOCK, 144

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        scales, minimums = _scales_and_minimums(blocks[:, 4:16])
        out[:] = _fields(blocks[:, 16:], run=32, bits=4)
        _scale(out, half(blocks, 0) * scales)
        _subtract(out, half(blocks, 2) * minimums)


class Q5K(BlockFormat):
    """d, dmin, 12 bytes of scales and minimums as in Q4_K, 32 of high bits, 128 of low 4 bits."""

    name, block_size, block_bytes = "Q5_K", _BLOCK, 176

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        scales, minimums = _scales_and_minimums(blocks[:, 4:16])
        out[:] = _fields(blocks[:, 48:], run=32, bits=4) | _fields(blocks[:, 16:48], run=32, bits=1) << 4
        _scale(out, half(blocks, 0) * scales)
        _subtract(out, half(blocks, 2) * minimums)


class Q6K(BlockFormat):
    """128 bytes of low 4 bits, 64 of high 2 bits, 16 int8 scales, d. y = d·sc·(q − 32)."""

    name, block_size, block_bytes = "Q6_K", _BLOCK, 210

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        out[:] = _fields(blocks[:, :128], run=64, bits=4) | _fields(blocks[:, 128:192], run=32, bits=2) << 4
        out -= 32
        _scale(out, half(blocks, 208) * blocks[:, 192:208].view(np.int8))


def _fields(packed: NDArray[np.uint8], run: int, bits: int) -> NDArray[np.uint8]:
    """Each run of bytes gives its lowest fields of this many bits, then its next ones: uint8 [n, fields]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return (runs >> shifts & np.uint8(2**bits - 1)).reshape(len(packed), -1)


def _scales_and_minimums(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Eight 6-bit scales and minimums from 12 bytes: the first four of each are the low bits of bytes 0–3 and
    4–7; the others have their low nibbles in bytes 8–11 and their high bits above the first four."""
    first, second, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.hstack([first & 63, low & 15 | first >> 6 << 4])
    minimums = np.hstack([second & 63, low >> 4 | second >> 6 << 4])
    return scales, minimums


def _scale(out: NDArray[np.float32], scales: NDArray[np.float32]) -> None:
    """Multiplies out [n, 256] by scales [n, groups], group by group."""
    groups = out.reshape(*scales.shape, -1)
    groups *= scales[..., None]


def _subtract(out: NDArray[np.float32], minimums: NDArray[np.float32]) -> None:
    groups = out.reshape(*minimums.shape, -1)
    groups -= minimums[..., None]


Q2_K = Q2K()
Q3_K = Q3K()
Q4_K = Q4K()
Q5_K = Q5K()
Q6_K = Q6K()
