"""A bounds-checked reader of GGUF, the container of ggml models (versions 2 and 3, little-endian).

A file is a header, key–value metadata, tensor infos, padding, and tensor data. It is mapped, not read:
tensors are views, arrays are decoded when asked for. It is untrusted: every count, length, dimension and
offset is compared with the bytes that are left before anything is allocated.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, overload

import numpy as np
from numpy.typing import NDArray

from hexad import _native
from hexad.checkpoint.files import map_file, release
from hexad.errors import CheckpointError, UnsupportedError
from hexad.weights import OpenFile, Place, Weight, WeightFormat
from hexad.weights.ggml import FORMATS, TYPE_NAMES

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# Bounds far beyond any real model, so that a hostile file (which may be sparse, and huge) ends soon.
MAX_KEYS = 2**16
MAX_TENSORS = 2**17
MAX_STRINGS = 2**24  # in all arrays together
MAX_NESTED_ARRAYS = 2**16
MAX_DEPTH = 4  # of arrays in arrays
MAX_KEY_BYTES = 2**16 - 1
MAX_STRING_BYTES = 2**26
MAX_NAME_BYTES = 64
MAX_DIMENSIONS = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {
    type_id: np.dtype(code)
    for type_id, code in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4",
        _BOOL: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_STRINGS_AT_ONCE = 4096
_KEY_MIN_BYTES = 8 + 4 + 1  # empty key, type, one byte
_TENSOR_MIN_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, one dimension


class GGUFFile:
    """An open GGUF file.

    version: 2 or 3.
    metadata: int, float, bool and str values by key; arrays as `LazyArray`.
    tensors: `Weight`s by the file's own names, in its order; their arrays are read-only views of the map.

    Raises CheckpointError for a file that cannot be read, is truncated or breaks the format, and
    UnsupportedError for a version, byte order or tensor type hexad does not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map, file = map_file(path)
        reader = _Reader(self._map, path)
        self.version, tensor_count, key_count = _read_header(reader)
        self.metadata: Mapping[str, Any] = _read_metadata(reader, key_count)
        alignment = _alignment(self.metadata, path)
        self.tensors: Mapping[str, Weight] = _read_tensors(reader, tensor_count, alignment, file)

    def release(self) -> None:
        """Lets go of the pages that were read."""
        release(self._map)

    def close(self) -> None:
        """Unmaps the file, once the last view of it is gone. Arrays not decoded by then cannot be read."""
        self.tensors = {}
        with suppress(BufferError):  # views are alive and keep the mapping; it goes with them
            self._map.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class LazyArray(Sequence[Any]):
    """An array value: a place in the mapped file, decoded when read.

    kind: what its elements are decoded into. Look first: small integers take 48 times their bytes.
    `tolist()` decodes all of it in one pass, into int, float, bool, str or, for nested arrays, LazyArray.
    Raises CheckpointError for a string that is not UTF-8, or when the file is closed.
    """

    def __init__(self, reader: _Reader, key: str, element_type: int, count: int, start: int) -> None:
        self._reader, self._key = reader, key
        self._type, self._count, self._start = element_type, count, start

    @property
    def kind(self) -> type[Any]:
        """int, float, bool, str or LazyArray."""
        dtype = _SCALARS.get(self._type)
        if dtype is None:
            return str if self._type == _STRING else LazyArray
        return bool if self._type == _BOOL else float if dtype.kind == "f" else int

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        """The elements; not all of a large array of strings at once."""
        if self._type != _STRING:
            return iter(self.tolist())
        return self._iter_strings()

    def _iter_strings(self) -> Iterator[str]:
        reader = self._reader.at(self._start)
        for first in range(0, self._count, _STRINGS_AT_ONCE):
            yield from reader.strings(min(_STRINGS_AT_ONCE, self._count - first), self._key, first)

    def __repr__(self) -> str:
        return f"LazyArray({self._key}, {self._count} elements)"

    def tolist(self) -> list[Any]:
        """All elements."""
        return self._decode(self._start, self._count)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        i = range(self._count)[index]
        dtype = _SCALARS.get(self._type)
        start = self._starts[i] if dtype is None else self._start + i * dtype.itemsize
        return self._decode(int(start), 1)[0]

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """Where each string or nested array begins."""
        reader = self._reader.at(self._start)
        starts = np.empty(self._count, np.int64)
        for i in range(self._count):
            starts[i] = reader.position
            reader.skip(self._type, self._key)
        return starts

    def _decode(self, start: int, count: int) -> list[Any]:
        reader = self._reader.at(start)
        if self._type == _STRING:
            return reader.strings(count, self._key)
        if self._type == _ARRAY:
            return [reader.array(self._key) for _ in range(count)]
        return reader.scalars(self._type, count, self._key)


class _Reader:
    """A cursor over the mapped file that cannot leave it."""

    def __init__(self, buffer: mmap.mmap, path: Path, position: int = 0) -> None:
        self.buffer, self.path, self.position = buffer, path, position
        self._strings_left, self._arrays_left = MAX_STRINGS, MAX_NESTED_ARRAYS
        try:
            self.end = len(buffer)
        except ValueError:
            self.fail("the file has been closed")

    def at(self, position: int) -> _Reader:
        """Another cursor over the same file."""
        return _Reader(self.buffer, self.path, position)

    def fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def take(self, size: int, what: str) -> int:
        """Moves past the next `size` bytes; returns where they start."""
        start = self.position
        if size > self.end - start:
            self.fail(
                f"{what} needs {size} bytes at offset {start}, but the file ends at {self.end}. "
                "It is truncated or damaged; fetch it again."
            )
        self.position = start + size
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.buffer, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.buffer, self.take(8, what))[0])

    def count(self, what: str, limit: int, item_bytes: int) -> int:
        """A u64 count of items that take at least `item_bytes` each."""
        count = self.u64(what)
        if count > limit or count * item_bytes > self.end - self.position:
            self.fail(
                f"{what} is {count}, but the limit is {limit} and {self.end - self.position} bytes are left"
            )
        return count

    def string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        size = self.u64(what)
        if size > limit:
            self.fail(f"{what} is {size} bytes long; the limit is {limit}")
        start = self.take(size, what)
        try:
            return self.buffer[start : start + size].decode()
        except UnicodeDecodeError as error:
            self.fail(f"{what} is not UTF-8: {error.reason} at byte {start + error.start}")

    def strings(self, count: int, what: str, first: int = 0) -> list[str]:
        """Strings already skipped over once, so known to lie within the file."""
        items = _native.strings(self.buffer, self.position, count)
        read = len(items)
        self.position = _native.end_of_strings(self.buffer, self.position, read)
        if read < count:
            self.string(f"{what} [{first + read}]")  # raises
        return items

    def scalars(self, type_id: int, count: int, what: str) -> list[Any]:
        dtype = _SCALARS[type_id]
        start = self.take(count * dtype.itemsize, what)
        values = np.frombuffer(self.buffer, dtype, count, start)
        if type_id == _BOOL:
            if values.max(initial=0) > 1:
                self.fail(f"{what} is a bool, but holds {values.max()}")
            values = values.astype(np.bool_)
        items: list[Any] = values.tolist()
        return items

    def array(self, what: str, depth: int = 1) -> LazyArray:
        """An array value, skipped over; checks that all of it lies within the file."""
        if depth > MAX_DEPTH:
            self.fail(f"{what} nests arrays more than {MAX_DEPTH} deep")
        type_id = self.u32(what)
        dtype = _SCALARS.get(type_id)
        if dtype is not None:
            count = self.count(f"length of {what}", self.end, dtype.itemsize)
            start = self.take(count * dtype.itemsize, what)
        elif type_id == _STRING:
            count = self.count(f"length of {what}", self._strings_left, 8)
            self._strings_left -= count
            start = self.position
            self._skip_strings(count, what)
        elif type_id == _ARRAY:
            count = self.count(f"length of {what}", self._arrays_left, 12)
            self._arrays_left -= count
            start = self.position
            for _ in range(count):
                self.array(what, depth + 1)
        else:
            self.fail(f"{what} is an array of unknown value type {type_id}")
        return LazyArray(self, what, type_id, count, start)

    def skip(self, type_id: int, what: str) -> None:
        """Moves past one string or array."""
        if type_id == _STRING:
            self._skip_strings(1, what)
        else:
            self.array(what)

    def _skip_strings(self, count: int, what: str) -> None:
        position = _native.end_of_strings(self.buffer, self.position, count)
        if position < 0:
            self.fail(f"{what} runs past the end of the file at {self.end}. It is truncated; fetch it again.")
        self.position = position

    def value(self, what: str) -> Any:
        """A metadata value with its type."""
        type_id = self.u32(f"type of {what}")
        if type_id == _STRING:
            return self.string(what)
        if type_id == _ARRAY:
            return self.array(what)
        if type_id not in _SCALARS:
            self.fail(f"{what} has unknown value type {type_id}")
        return self.scalars(type_id, 1, what)[0]


def _read_header(reader: _Reader) -> tuple[int, int, int]:
    """Version, number of tensors, number of keys."""
    magic = reader.buffer[reader.take(4, "the magic number") : 4]
    if magic != MAGIC:
        reader.fail(f"not a GGUF file: it begins with {magic!r}, not {MAGIC!r}")
    version = reader.u32("the version")
    if version not in VERSIONS:
        if version and version & 0xFFFF == 0:  # the same small number, with its bytes swapped
            raise UnsupportedError(f"{reader.path}: a big-endian GGUF file; hexad reads little-endian ones")
        raise UnsupportedError(f"{reader.path}: GGUF version {version}; hexad reads versions 2 and 3")
    tensor_count = reader.count("the tensor count", MAX_TENSORS, _TENSOR_MIN_BYTES)
    return version, tensor_count, reader.count("the key count", MAX_KEYS, _KEY_MIN_BYTES)


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = reader.string(f"key {i}", MAX_KEY_BYTES)
        if key in metadata:
            reader.fail(f"key {key!r:.80} occurs twice")
        metadata[key] = reader.value(f"value of {key!r:.80}")
    return metadata


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    valid = isinstance(alignment, int) and not isinstance(alignment, bool)
    if not valid or alignment < 8 or alignment & (alignment - 1):
        raise CheckpointError(
            f"{path}: general.alignment is {alignment!r}; a power of two from 8 up expected"
        )
    return int(alignment)


class _TensorInfo(NamedTuple):
    """Where a tensor is: offset in the data section and size, in bytes; shape is row-major."""

    name: str
    format: WeightFormat
    shape: tuple[int, ...]
    offset: int
    size: int


def _read_tensors(reader: _Reader, count: int, alignment: int, file: OpenFile) -> dict[str, Weight]:
    infos = [_read_tensor_info(reader, i, alignment) for i in range(count)]
    data_start = -(-reader.position // alignment) * alignment
    raw = np.frombuffer(reader.buffer, np.uint8)
    tensors: dict[str, Weight] = {}
    for name, format, shape, offset, size in infos:
        if name in tensors:
            reader.fail(f"tensor {name!r} occurs twice")
        start = data_start + offset
        if size > reader.end - start:
            reader.fail(
                f"tensor {name!r} has {size} bytes at offset {start}, but the file ends at {reader.end}. "
                "It is truncated or damaged; fetch it again."
            )
        weight = format.from_bytes(raw[start : start + size], shape)
        tensors[name] = replace(weight, place=Place(file, start))
    infos.sort(key=lambda info: info.offset)
    for info, following in pairwise(infos):
        if info.offset + info.size > following.offset:
            reader.fail(f"tensors {info.name!r} and {following.name!r} overlap")
    return tensors


def _read_tensor_info(reader: _Reader, index: int, alignment: int) -> _TensorInfo:
    """One tensor info, everything checked but its place against the file's end."""
    name = reader.string(f"name of tensor {index}", MAX_NAME_BYTES)
    what = f"tensor {name!r}"
    dimensions = reader.u32(f"dimension count of {what}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        reader.fail(f"{what} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} expected")
    shape = tuple(reader.u64(f"dimensions of {what}") for _ in range(dimensions))[
        ::-1
    ]  # stored innermost first
    if 0 in shape:
        reader.fail(f"{what} has shape {shape}; dimensions are at least 1")
    if math.prod(shape) >= 2**63:
        reader.fail(f"{what} has shape {shape}, more elements than 64 bits count")
    type_id = reader.u32(f"type of {what}")
    offset = reader.u64(f"offset of {what}")
    format = FORMATS.get(type_id)
    if format is None:
        known = ", ".join(format.name for format in FORMATS.values())
        type_name = TYPE_NAMES.get(type_id, "unknown")
        raise UnsupportedError(
            f"{reader.path}: {what} has type {type_name} (id {type_id}); hexad reads {known}"
        )
    try:
        size = format.nbytes(shape)
    except ValueError as error:
        reader.fail(f"{what} has shape {shape}: {error}")
    if offset % alignment:
        reader.fail(f"{what} is at offset {offset}, not a multiple of the alignment {alignment}")
    return _TensorInfo(name, format, shape, offset, size)
