"""The block formats of ggml, and every tensor type of GGUF by its id.

A row is a whole number of blocks, each with its own fp16 scale `d` (and minimum `m`). Layouts:
ggml's `block_q4_0` and siblings. A new format is one class here and one row in FORMATS.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

from hexad.weights.dense import F16, F32
from hexad.weights.weight import Weight, WeightFormat

_F16 = np.dtype("<f2")


class BlockFormat(WeightFormat):
    """Rows of packed blocks in one array "blocks", uint8 [rows, bytes per row].

    Rows are all axes of the shape but the last, flattened.
    """

    def dequantise(self, weight: Weight) -> NDArray[np.float32]:
        blocks = weight.arrays["blocks"].view(np.uint8).reshape(-1, self.block_bytes)
        out = np.empty((len(blocks), self.block_size), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):  # scales of a damaged file may be inf or NaN
            self.dequantise_blocks(blocks, out)
        return out.reshape(weight.shape)

    def take_rows(self, weight: Weight, rows: NDArray[np.int64]) -> Weight:
        if len(weight.shape) < 2:
            raise ValueError(f"a {self.name} vector is one row of blocks; its weights cannot be taken singly")
        shape = (len(rows), *weight.shape[1:])
        blocks = weight.arrays["blocks"].reshape(weight.shape[0], -1)
        return Weight(self, shape, {"blocks": blocks[rows].reshape(math.prod(shape[:-1]), -1)})

    @abstractmethod
    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        """Writes blocks, uint8 [n, block_bytes], to out, float32 [n, block_size]."""


class Q4Zero(BlockFormat):
    """d, then 16 bytes: byte j has weight j in its low and weight j + 16 in its high nibble. y = d(q − 8)."""

    name, block_size, block_bytes = "Q4_0", 32, 18

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 2:], out)
        out -= 8
        out *= _half(blocks, 0)


class Q4One(BlockFormat):
    """d, m, then 16 bytes of nibbles as in Q4_0. y = d·q + m."""

    name, block_size, block_bytes = "Q4_1", 32, 20

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        _unpack_nibbles(blocks[:, 4:], out)
        out *= _half(blocks, 0)
        out += _half(blocks, 2)


class Q8Zero(BlockFormat):
    """d, then 32 int8. y = d·q."""

    name, block_size, block_bytes = "Q8_0", 32, 34

    def dequantise_blocks(self, blocks: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
        out[:] = blocks[:, 2:].view(np.int8)
        out *= _half(blocks, 0)


def _half(blocks: NDArray[np.uint8], offset: int) -> NDArray[np.float32]:
    """The fp16 at this byte of every block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(_F16).astype(np.float32)


def _unpack_nibbles(packed: NDArray[np.uint8], out: NDArray[np.float32]) -> None:
    """Low nibbles to the first half of each block, high nibbles to the second."""
    half = packed.shape[1]
    np.bitwise_and(packed, 0x0F, out=out[:, :half])
    np.right_shift(packed, 4, out=out[:, half:])


Q4_0 = Q4Zero()
Q4_1 = Q4One()
Q8_0 = Q8Zero()

FORMATS: dict[int, WeightFormat] = {0: F32, 1: F16, 2: Q4_0, 3: Q4_1, 8: Q8_0}
"""The tensor types hexad reads, by GGUF type id."""

TYPE_NAMES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K",
    16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S",
    23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 30: "BF16",
    34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0", 42: "Q2_0",
}  # fmt: skip
"""What GGUF calls its tensor types, read by hexad or not, by type id."""
