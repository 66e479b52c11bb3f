"""Writes safetensors files, sound ones and any others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",
    "float64": "F64",
    "int64": "I64",
    "uint8": "U8",
}
"""The dtype that an array is stored as; uint16 is taken for the bits of BF16."""


def describe(tensors: Mapping[str, NDArray[Any]]) -> tuple[dict[str, Any], bytes]:
    """The header's entries and the data of these arrays."""
    entries, data = {}, b""
    for name, array in tensors.items():
        end = len(data) + array.nbytes
        entries[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), end],
        }
        data += array.tobytes()
    return entries, data


def assemble(header: Any, data: bytes, *, align: int = 8, pad: int = 0) -> bytes:
    """A file of this header (JSON, if it is no bytes), padded with spaces to `align`, and `pad` more."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (-len(raw) % align + pad)
    return len(raw).to_bytes(8, "little") + raw + data


def write(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A file of these arrays."""
    return assemble(*describe(tensors))


def random_tensors(seed: int = 0) -> dict[str, NDArray[Any]]:
    """One of each dtype that hexad reads, with every kind of number in it."""
    rng = np.random.default_rng(seed)
    odd = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 65504.0]
    return {
        "a": np.concatenate([rng.standard_normal(24), odd]).astype("<f4").reshape(4, 8),
        "b": np.concatenate([rng.standard_normal(25), odd]).astype("<f2").reshape(33),
        "c": rng.integers(0, 2**16, (2, 3, 5)).astype("<u2"),
    }
