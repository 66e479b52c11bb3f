"""Weight and WeightFormat: packed arrays with a logical shape; how to size, cut and dequantise them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


class WeightFormat(ABC):
    """One way to store a matrix. Its `dequantise` is the definition everything fast is tested against.

    name: the field's name for it, e.g. "Q4_0".
    block_size: weights in one block along a row; a row is a whole number of blocks.
    block_bytes: bytes of one block.
    """

    name: str
    block_size: int
    block_bytes: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a weight of this shape. Raises ValueError if a row is no whole number of blocks."""
        columns = shape[-1] if shape else 1
        if columns % self.block_size:
            raise ValueError(f"{self.name} rows are multiples of {self.block_size}, not {columns}")
        return math.prod(shape[:-1]) * (columns // self.block_size) * self.block_bytes

    def from_bytes(self, raw: NDArray[np.uint8], shape: tuple[int, ...]) -> Weight:
        """The weight of this shape stored in raw, uint8 [nbytes(shape)]: a view, as one array "blocks"
        unless the format stores something else."""
        return Weight(self, shape, {"blocks": raw.reshape(math.prod(shape[:-1]), -1)})

    @abstractmethod
    def dequantise(self, weight: Weight) -> NDArray[np.float32]:
        """The weight as float32, C-contiguous, of its logical shape."""

    @abstractmethod
    def take_rows(self, weight: Weight, rows: NDArray[np.int64]) -> Weight:
        """The weight made of these rows (first axis), in this order, without dequantising."""


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A stored tensor.

    shape: logical, row-major: a linear layer's weight is (out_features, in_features).
    arrays: the stored bytes by role; block formats have one, "blocks": uint8 [rows, bytes per row]; dense
        formats one, "data", of the stored dtype and the logical shape. They may be views of a mapped file.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    arrays: Mapping[str, NDArray[np.generic]]

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.format.nbytes(self.shape)

    def dequantise(self) -> NDArray[np.float32]:
        """The weight as float32, C-contiguous, of its logical shape."""
        return self.format.dequantise(self)

    def take_rows(self, rows: NDArray[np.int64]) -> Weight:
        """The weight made of these rows, in this order."""
        return self.format.take_rows(self, rows)
