"""Formats that store every weight as a number of its own: F32, F16, BF16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hexad.weights.weight import Weight, WeightFormat


class DenseFormat(WeightFormat):
    """One little-endian float per weight, in one array "data" of the logical shape."""

    block_size = 1

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype: np.dtype[np.generic] = np.dtype(dtype)
        self.block_bytes = self.dtype.itemsize

    def from_bytes(self, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Weight:
        return Weight(self, shape, {"data": raw.view(self.dtype).reshape(shape)})

    def dequantise(self, weight: Weight) -> NDArray[np.float32]:
        """float32 of the logical shape; for F32 the stored array itself, read-only if that is."""
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            return np.ascontiguousarray(weight.arrays["data"], dtype=np.float32)

    def take_rows(self, weight: Weight, rows: NDArray[np.int64]) -> Weight:
        return Weight(self, (len(rows), *weight.shape[1:]), {"data": weight.arrays["data"][rows]})


class Bfloat16(DenseFormat):
    """The upper half of a float32. NumPy has no such type: "data" holds the bits, uint16."""

    def __init__(self) -> None:
        super().__init__("BF16", "<u2")

    def dequantise(self, weight: Weight) -> NDArray[np.float32]:
        return (weight.arrays["data"].astype(np.uint32, order="C") << 16).view(np.float32)


F32 = DenseFormat("F32", "<f4")
F16 = DenseFormat("F16", "<f2")
BF16 = Bfloat16()
