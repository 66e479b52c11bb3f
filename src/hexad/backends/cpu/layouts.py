"""The packed layouts of the CPU backend: which one a stored format gets, and how many bytes it takes.

A layout holds a matrix [rows, columns] as panels of 32 rows, one vector lane per row; csrc/formats/ defines
them. Rows are padded to whole panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from hexad import _native
from hexad.errors import BackendError
from hexad.weights import Weight

PANEL_ROWS = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """block: columns of a block, of which a row has a whole number; block_bytes: bytes of 32 rows × one."""

    name: str
    block: int
    block_bytes: int

    @property
    def quantised(self) -> bool:
        """Whether compute="int8" multiplies it with int8 activations."""
        return self.block > 1

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed matrix of this shape."""
        rows, columns = shape
        return -(-rows // PANEL_ROWS) * (columns // self.block) * self.block_bytes


def layout_of(weight: Weight) -> Layout:
    """The layout a matrix is packed into. Raises BackendError for a format that has none."""
    return _layout(weight.format.name)


@cache
def _layout(format: str) -> Layout:
    try:
        return Layout(*_native.layout_of(format))
    except ValueError as error:
        raise BackendError(f"The CPU backend has no packed layout for {format} weights.") from error
