"""ggml's blocks of 32 weights, and every tensor type of GGUF by its id.

A block has its own fp16 scale `d` (and minimum `m`). Layouts: ggml's `block_q4_0` and siblings. A new format
is one class, here or in kquants.py, and one row in FORMATS.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hexad.weights.blocks import BlockFormat, half
from hexad.weights.dense import BF16, F16, F32
from hexad.weights.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from hexad.weights.weight import WeightFormat


class Q4Zero(BlockFormat):
    """d, then 16 bytes: byte j has weight j in its low and weight j + 16 in its high nibble. y = d(q − 8)."""

    name, block_size, block_bytes = "Q4_0", 32, 18

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 2:], out)
        out -= 8
        out *= half(blocks, 0)


class Q4One(BlockFormat):
    """d, m, then 16 bytes of nibbles as in Q4_0. y = d·q + m."""

    name, block_size, block_bytes = "Q4_1", 32, 20

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 4:], out)
        out *= half(blocks, 0)
        out += half(blocks, 2)


class Q5Zero(BlockFormat):
    """d, 32 high bits in order, then 16 bytes of nibbles as in Q4_0. y = d(q − 16)."""

    name, block_size, block_bytes = "Q5_0", 32, 22

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 6:], out)
        out += 16.0 * _bits(blocks[:, 2:6])
        out -= 16
        out *= half(blocks, 0)


class Q5One(BlockFormat):
    """d, m, 32 high bits in order, then 16 bytes of nibbles as in Q4_0. y = d·q + m."""

    name, block_size, block_bytes = "Q5_1", 32, 24

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 8:], out)
        out += 16.0 * _bits(blocks[:, 4:8])
        out *= half(blocks, 0)
        out += half(blocks, 2)


class Q8Zero(BlockFormat):
    """d, then 32 int8. y = d·q."""

    name, block_size, block_bytes = "Q8_0", 32, 34

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        out[:] = blocks[:, 2:].view(np.int8)
        out *= half(blocks, 0)


def _unpack_nibbles(packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Low nibbles to the first half of each block, high nibbles to the second."""
    half = packed.shape[1]
    np.bitwise_and(packed, 0x0F, out=out[:, :half])
    np.right_shift(packed, 4, out=out[:, half:])


def _bits(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """One number per bit, the lowest of each byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little").astype(np.float32)


Q4_0 = Q4Zero()
Q4_1 = Q4One()
Q5_0 = Q5Zero()
Q5_1 = Q5One()
Q8_0 = Q8Zero()

FORMATS: dict[int, WeightFormat] = {
    0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 6: Q5_0, 7: Q5_1, 8: Q8_0,
    10: Q2_K, 11: Q3_K, 12: Q4_K, 13: Q5_K, 14: Q6_K, 30: BF16,
}  # fmt: skip
"""The tensor types hexad reads, by GGUF type id."""

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
"""What GGUF calls its tensor types, read by hexad or not, by type id."""
