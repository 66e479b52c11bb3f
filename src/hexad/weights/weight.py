"""Weight and WeightFormat: packed arrays with a logical shape; how to size, cut and dequantise them."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

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


class OpenFile:
    """A file that weights are read from, open as long as any of them needs it.

    descriptor: for reading at offsets; nobody moves its position. Raises OSError.
    """

    __slots__ = ("descriptor", "path")

    def __init__(self, path: Path) -> None:
        self.descriptor = -1
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where a weight's stored bytes lie, so that they can be read without becoming part of this process's
    memory, as the pages of a mapped file do.

    start: offset in the file, in bytes. order: int64 [rows], which of the rows there each row of the weight
    is; None: they lie as they are.
    """

    file: OpenFile
    start: int
    order: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Weight:
    """A stored tensor.

    shape: logical, row-major: a linear layer's weight is (out_features, in_features).
    arrays: the stored bytes by role; block formats have one, "blocks": uint8 [rows, bytes per row]; dense
        formats one, "data", of the stored dtype and the logical shape. They may be views of a mapped file.
    place: where a file has the same bytes, if one does.
    """

    format: WeightFormat
    shape: tuple[int, ...]
    arrays: Mapping[str, NDArray[np.generic]]
    place: Place | None = None

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
