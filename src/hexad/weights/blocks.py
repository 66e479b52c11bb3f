"""BlockFormat: rows of packed blocks, each with scales of its own."""

from __future__ import annotations

import math
from abc import abstractmethod

import numpy as np
from numpy.typing import NDArray

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


def half(blocks: NDArray[np.uint8], offset: int) -> NDArray[np.float32]:
    """The fp16 at this byte of every block, float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view(_F16).astype(np.float32)
