"""What a block-quantised matrix is made of: integers, scales and minimums, as int8 arithmetic has them.

Written weight by weight as the formats are described, apart from hexad's own definitions, and slow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hexad.weights import Weight

Bytes = NDArray[np.int64]
"""[rows, blocks, bytes of a block]."""


def half(b: Bytes, at: int) -> NDArray[np.float64]:
    return (b[..., at] + 256 * b[..., at + 1]).astype(np.uint16).view(np.float16).astype(np.float64)


def signed(byte: Bytes) -> Bytes:
    return np.where(byte < 128, byte, byte - 256)


def nibble(b: Bytes, at: int, i: int) -> Bytes:
    """Of 32: byte j has weight j in its low and j + 16 in its high half."""
    return b[..., at + i % 16] >> (4 if i >= 16 else 0) & 15


def bit(b: Bytes, at: int, i: int) -> Bytes:
    return b[..., at + i // 8] >> i % 8 & 1


def pair(b: Bytes, at: int, i: int) -> Bytes:
    """Of 256: each 128 take 32 bytes, two bits of each byte after another."""
    return b[..., at + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3


def chunk_nibble(b: Bytes, at: int, i: int) -> Bytes:
    """Of 256: each 64 take 32 bytes, first their low nibbles."""
    return b[..., at + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15


def six_bits(b: Bytes, at: int, j: int) -> tuple[Bytes, Bytes]:
    """Scale and minimum j of Q4_K and Q5_K."""
    if j < 4:
        return b[..., at + j] & 63, b[..., at + j + 4] & 63
    low, first, second = b[..., at + j + 4], b[..., at + j - 4], b[..., at + j]
    return low & 15 | first >> 6 << 4, low >> 4 | second >> 6 << 4


def q3_k_scale(b: Bytes, j: int) -> Bytes:
    low = b[..., 96 + j] & 15 if j < 8 else b[..., 96 + j - 8] >> 4
    return (low | (b[..., 104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32


def q6_k_code(b: Bytes, i: int) -> Bytes:
    part, k = divmod(i, 128)
    low = b[..., 64 * part + k % 64] >> 4 * (k // 64) & 15
    high = b[..., 128 + 32 * part + k % 32] >> 2 * (k // 32) & 3
    return low + 16 * high - 32


Number = Callable[[Bytes, int], NDArray[np.float64] | Bytes]

# columns per block, columns per scale, integer of weight i, scale j, minimum j
FORMATS: dict[str, tuple[int, int, Number, Number, Number | None]] = {
    "Q4_0": (32, 32, lambda b, i: nibble(b, 2, i) - 8, lambda b, _: half(b, 0), None),
    "Q4_1": (32, 32, lambda b, i: nibble(b, 4, i), lambda b, _: half(b, 0), lambda b, _: half(b, 2)),
    "Q5_0": (
        32, 32, lambda b, i: nibble(b, 6, i) + 16 * bit(b, 2, i) - 16, lambda b, _: half(b, 0), None,
    ),
    "Q5_1": (
        32, 32, lambda b, i: nibble(b, 8, i) + 16 * bit(b, 4, i),
        lambda b, _: half(b, 0), lambda b, _: half(b, 2),
    ),
    "Q8_0": (32, 32, lambda b, i: signed(b[..., 2 + i]), lambda b, _: half(b, 0), None),
    "Q2_K": (
        256, 16, lambda b, i: pair(b, 16, i),
        lambda b, j: half(b, 80) * (b[..., j] & 15), lambda b, j: -half(b, 82) * (b[..., j] >> 4),
    ),
    "Q3_K": (
        256, 16, lambda b, i: pair(b, 32, i) - 4 * (1 - (b[..., i % 32] >> i // 32 & 1)),
        lambda b, j: half(b, 108) * q3_k_scale(b, j), None,
    ),
    "Q4_K": (
        256, 32, lambda b, i: chunk_nibble(b, 16, i),
        lambda b, j: half(b, 0) * six_bits(b, 4, j)[0], lambda b, j: -half(b, 2) * six_bits(b, 4, j)[1],
    ),
    "Q5_K": (
        256, 32, lambda b, i: chunk_nibble(b, 48, i) + 16 * (b[..., 16 + i % 32] >> i // 32 & 1),
        lambda b, j: half(b, 0) * six_bits(b, 4, j)[0], lambda b, j: -half(b, 2) * six_bits(b, 4, j)[1],
    ),
    "Q6_K": (256, 16, q6_k_code, lambda b, j: half(b, 208) * signed(b[..., 192 + j]), None),
}  # fmt: skip


def block_parts(
    weight: Weight,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Integers with the zero point taken off, [rows, parts, columns of a part], and the parts' scales and
    minimums, [rows, parts]."""
    columns, part, integer, scale, minimum = FORMATS[weight.format.name]
    rows = weight.shape[0]
    b = weight.arrays["blocks"].reshape(rows, weight.shape[1] // columns, -1).astype(np.int64)

    def stacked(number: Number, count: int) -> NDArray[np.float64]:
        return np.stack([number(b, i) for i in range(count)], axis=-1).astype(np.float64).reshape(rows, -1)

    scales = stacked(scale, columns // part)
    minimums = np.zeros_like(scales) if minimum is None else stacked(minimum, columns // part)
    return stacked(integer, columns).reshape(rows, -1, part), scales, minimums
