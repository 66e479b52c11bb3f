"""The packed layouts of the CPU backend: which one a stored format gets, and how many bytes it takes.

A layout holds a matrix [rows, columns] as panels of 32 rows, one vector lane per row; csrc/formats/ defines
each one's struct. Rows are padded to whole panels.
"""

from __future__ import annotations

from dataclasses import dataclass

from hexad.weights import Weight

PANEL_ROWS = 32


@dataclass(frozen=True, slots=True)
class Layout:
    """group: columns that share a scale; group_bytes: bytes of 32 rows × one group. quantised: whether
    compute="int8" multiplies it with int8 activations."""

    name: str
    group: int
    group_bytes: int
    quantised: bool

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a packed matrix of this shape."""
        rows, columns = shape
        return -(-rows // PANEL_ROWS) * (columns // self.group) * self.group_bytes


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("w4", 32, 64 + 512, quantised=True),
        Layout("w4m", 32, 128 + 512, quantised=True),
        Layout("w8", 32, 64 + 1024, quantised=True),
        Layout("f16", 1, 64, quantised=False),
        Layout("f32", 1, 128, quantised=False),
    )
}

_LAYOUT_OF_FORMAT = {"Q4_0": "w4", "Q4_1": "w4m", "Q8_0": "w8", "F16": "f16", "F32": "f32"}


def layout_of(weight: Weight) -> Layout:
    """The layout a matrix is packed into; formats without one of their own expand to "f32"."""
    return LAYOUTS[_LAYOUT_OF_FORMAT.get(weight.format.name, "f32")]
