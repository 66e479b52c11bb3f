"""A bounds-checked reader of safetensors (https://github.com/huggingface/safetensors, "Format").

A file is a 64-bit little-endian length, a JSON header of that length that gives every tensor's dtype, shape
and place, and the tensors' bytes without gaps. It is mapped, not read, and untrusted: every number is
compared with the bytes there are before anything is allocated.

The `safetensors` library is not used: into NumPy it reads no BF16, a type that NumPy lacks, and it copies
every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from hexad.checkpoint.files import map_file, parse_json, release
from hexad.errors import CheckpointError, UnsupportedError
from hexad.weights import BF16, F16, F32, Place, Weight
from hexad.weights.dense import DenseFormat

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 8

FORMATS: Mapping[str, DenseFormat] = {"F32": F32, "F16": F16, "BF16": BF16}
"""The dtypes hexad reads."""

_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Bits of one element, by the format's names of dtypes."""


class TensorInfo(NamedTuple):
    """What the header says of a tensor. start, end: its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """An open safetensors file. infos: of each tensor, by name, in the header's order.

    Raises CheckpointError for a file that cannot be read, is truncated or breaks the format, and
    UnsupportedError for a dtype of which not even the size is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map, self._file = map_file(path)
        self.infos: Mapping[str, TensorInfo] = self._read_infos()

    def weight(self, name: str) -> Weight:
        """A tensor, as a view of the map where that can be: CPUs want numbers at multiples of their size, so
        others are copied when read. Raises UnsupportedError for a dtype hexad does not read."""
        info = self.infos[name]
        format = FORMATS.get(info.dtype)
        if format is None:
            raise UnsupportedError(
                f"{self.path}: tensor {name!r:.200} is {info.dtype}; hexad reads {', '.join(FORMATS)}. For a "
                "quantised model choose its original or a GGUF file; others save as BF16 with transformers: "
                'from_pretrained(..., dtype="bfloat16"), then save_pretrained(...).'
            )
        raw = np.frombuffer(self._map, np.uint8, info.end - info.start, info.start)
        place = Place(self._file, info.start)
        if info.start % format.block_bytes == 0:
            return replace(format.from_bytes(raw, info.shape), place=place)
        return Weight(format, info.shape, _Aligned(raw, format, info.shape), place)

    def release(self) -> None:
        """Lets go of the pages that were read."""
        release(self._map)

    def close(self) -> None:
        """Unmaps the file, once the last view of it is gone."""
        self.infos = {}
        with suppress(BufferError):  # views are alive and keep the mapping; it goes with them
            self._map.close()

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def _read_infos(self) -> dict[str, TensorInfo]:
        size = len(self._map)
        length = int.from_bytes(self._map[:8], "little")
        if size < 8 or length > size - 8:
            self._fail(
                f"not a whole safetensors file: {size} bytes long, with a header of {length} bytes from 8 "
                "on. It is truncated, damaged or something else; fetch it again."
            )
        if length > MAX_HEADER_BYTES:
            self._fail(f"its header has {length} bytes; the limit is {MAX_HEADER_BYTES}")
        header = parse_json(self._map[8 : 8 + length], self.path, "the header")
        header.pop("__metadata__", None)  # free text, of no use here
        infos = {name: self._read_info(name, entry, 8 + length) for name, entry in header.items()}
        self._check_places(infos, 8 + length)
        return infos

    def _read_info(self, name: str, entry: Any, data_start: int) -> TensorInfo:
        """One entry of the header, everything checked but its place among the others."""
        what = f"tensor {name!r:.200}"
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            self._fail(f"{what} is not described by just dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str):
            self._fail(f"{what} has dtype {dtype!r:.80}; a name expected")
        if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
            self._fail(f"{what} has shape {shape!r:.80}; at most {MAX_DIMENSIONS} sizes expected")
        if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._fail(f"{what} has data_offsets {offsets!r:.80}; begin and end expected")
        if dtype not in _BITS:
            raise UnsupportedError(
                f"{self.path}: {what} has the unknown dtype {dtype!r:.80}; hexad reads {', '.join(FORMATS)}"
            )
        begin, end = offsets
        if math.prod(shape) * _BITS[dtype] != 8 * (end - begin):
            self._fail(
                f"{what} of dtype {dtype} and shape {shape!r:.80} has {end - begin} bytes, "
                f"not {math.prod(shape) * _BITS[dtype] / 8:g}"
            )
        return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)

    def _check_places(self, infos: Mapping[str, TensorInfo], data_start: int) -> None:
        """The tensors fill the file behind the header, one after another."""
        position, before = data_start, "the header"
        for name, info in sorted(infos.items(), key=lambda item: item[1][2:]):
            what = f"tensor {name!r:.200}"
            if info.start < position:
                self._fail(f"{before} and {what} overlap")
            if info.start > position:
                self._fail(f"between {before} and {what} are {info.start - position} bytes of no tensor")
            position, before = info.end, what
        size = len(self._map)
        if position > size:
            self._fail(
                f"its tensors need {position} bytes, but the file has {size}. It is truncated; "
                "fetch it again."
            )
        if position < size:
            self._fail(f"behind {before} are {size - position} bytes of no tensor")


def _counts(values: object) -> bool:
    """Whether this is a list of integers that 64 bits can hold, none below 0."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


class _Aligned(Mapping[str, NDArray[np.generic]]):
    """The array of a dense weight whose bytes begin at an odd place: a copy, made when read and not kept."""

    def __init__(self, raw: NDArray[np.uint8], format: DenseFormat, shape: tuple[int, ...]) -> None:
        self._raw, self._format, self._shape = raw, format, shape

    def __getitem__(self, role: str) -> NDArray[np.generic]:
        return self._format.from_bytes(self._raw.copy(), self._shape).arrays[role]

    def __iter__(self) -> Iterator[str]:
        return iter(("data",))

    def __len__(self) -> int:
        return 1
