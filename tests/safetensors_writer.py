"""Writes safetensors bytes for tests, valid or broken in one chosen place. Independent of hexad's reader.

The format: the header's length (u64), the header (JSON: dtype, shape and data_offsets by name), the data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "uint8": "U8"}


def bfloat16(values: NDArray[np.float32]) -> bytes:
    """The upper halves of float32 numbers, cut off."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") >> 16).astype("<u2").tobytes()


def write(
    tensors: Mapping[str, NDArray[Any] | tuple[str, tuple[int, ...], bytes]],
    metadata: Mapping[str, str] | None = None,
    *,
    header: bytes | None = None,
    length: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> bytes:
    """The file's bytes. tensors: arrays, or (dtype, shape, data).

    header: instead of the one that belongs to the tensors. length: that the file states for its header.
    changes: entries of the header to replace or to add.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            dtype, shape, raw = tensor
        else:
            dtype, shape, raw = DTYPES[tensor.dtype.name], tensor.shape, tensor.tobytes()
        offsets = [len(data), len(data) + len(raw)]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
        data += raw
    if header is None:
        header = json.dumps(entries | dict(changes or {}), separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data
