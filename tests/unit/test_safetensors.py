"""The safetensors reader: what it reads is what was written, and what breaks the format is refused."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.safetensors_writer import assemble, describe, random_tensors, write

from hexad.checkpoint.safetensors import SafetensorsFile
from hexad.errors import CheckpointError, HexadError, UnsupportedError

TENSORS = random_tensors()
HEADER, DATA = describe(TENSORS)


def save(folder: Path, raw: bytes) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("pad", range(8))
def test_reads_what_was_written(tmp_path: Path, pad: int) -> None:
    """Wherever the data begin: with `pad`, at places that are no multiples of a number's size."""
    file = SafetensorsFile(save(tmp_path, assemble(HEADER, DATA, pad=pad)))
    assert list(file.infos) == list(TENSORS)
    for name, array in TENSORS.items():
        weight = file.weight(name)
        assert weight.format.name == HEADER[name]["dtype"]
        assert weight.shape == array.shape
        assert weight.nbytes == array.nbytes
        (stored,) = weight.arrays.values()
        assert stored.dtype == array.dtype
        assert stored.flags.aligned
        assert stored.tobytes() == array.tobytes()
        assert (
            weight.take_rows(np.array([1, 0])).dequantise().tobytes() == weight.dequantise()[[1, 0]].tobytes()
        )
    wide = (TENSORS["c"].astype(np.uint32) << 16).view(np.float32)
    assert file.weight("c").dequantise().tobytes() == wide.tobytes()
    with np.errstate(invalid="ignore"):
        assert file.weight("b").dequantise().tobytes() == TENSORS["b"].astype(np.float32).tobytes()


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors = {
        "z": np.arange(6, dtype="<f4").reshape(2, 3),
        "e": np.zeros((0, 3), "<f2"),
        "s": np.array(2.5, "<f2"),
    }
    path = tmp_path / "m.safetensors"
    library.save_file(tensors, path, metadata={"format": "pt"})
    file = SafetensorsFile(path)
    assert set(file.infos) == set(tensors)
    for name, array in tensors.items():
        np.testing.assert_array_equal(file.weight(name).dequantise().reshape(array.shape), array)


def test_the_library_reads_what_the_tests_write(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    tensors = {name: TENSORS[name] for name in "ab"}
    for name, array in library.load_file(save(tmp_path, write(tensors))).items():
        assert array.tobytes() == tensors[name].tobytes()


def test_weights_are_views_of_the_file(tmp_path: Path) -> None:
    big = {"w": np.zeros((1024, 4096), "<f4")}
    path = save(tmp_path, write(big))
    tracemalloc.start()
    file = SafetensorsFile(path)
    array = file.weight("w").arrays["data"]
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
    assert not array.flags.owndata
    assert not array.flags.writeable
    file.close()
    assert array.sum() == 0  # the mapping goes with the last view


def test_dtypes_hexad_does_not_read_are_refused_when_asked_for(tmp_path: Path) -> None:
    tensors = {"mask": np.ones(3, np.uint8), "w": np.zeros(2, "<f4"), "d": np.zeros(1, "<f8")}
    path = save(tmp_path, write(tensors))
    file = SafetensorsFile(path)
    assert file.weight("w").shape == (2,)
    for name, dtype in (("mask", "U8"), ("d", "F64")):
        with pytest.raises(
            UnsupportedError, match=f"tensor '{name}' is {dtype}; hexad reads F32, F16, BF16.*GGUF"
        ) as caught:
            file.weight(name)
        assert str(path) in str(caught.value)


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}


A = json.dumps(entry()).encode()

# header, data, what the message says
BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "no JSON": (b"{nonsense", b"", "the header is not JSON"),
    "no UTF-8": (b'{"\xff":{}}', b"", "the header is not JSON"),
    "no object": (b"[1]", b"", "no JSON object, but a list"),
    "nested deeply": (b'{"a":' + b"[" * 100_000, b"", "nested too deeply"),
    "nested deeply, brackets": (b"{" + b'"a":{' * 100_000, b"", "nested too deeply"),
    "brackets": (b"{" + b"[]," * 200_001, b"", "200002 brackets"),
    "commas": (b"{" + b"1," * 2**21, b"", "2097152 commas"),
    "long integer": (b'{"a":' + b"9" * 5000 + b"}", b"", "the header is not JSON"),
    "twice": (b'{"a":' + A + b',"a":' + A + b"}", bytes(8), "'a' twice"),
    "key twice": (b'{"a":' + A.replace(b"shape", b"dtype") + b"}", bytes(8), "'dtype' twice"),
    "entry": ({"a": [1]}, b"", "not described by just dtype"),
    "key missing": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "not described by just dtype"),
    "key too many": ({"a": entry(strides=[1])}, bytes(8), "not described by just dtype"),
    "dtype": ({"a": entry(7)}, bytes(8), "dtype 7; a name expected"),
    "shape": ({"a": entry(shape=8)}, bytes(8), "shape 8"),
    "negative": ({"a": entry(shape=[-2])}, bytes(8), r"shape \[-2\]"),
    "negative twice": ({"a": entry(shape=[-1, -2])}, bytes(8), r"shape \[-1, -2\]"),
    "fraction": ({"a": entry(shape=[2.0])}, bytes(8), r"shape \[2.0\]"),
    "bool": ({"a": entry(shape=[True, 2])}, bytes(8), r"shape \[True, 2\]"),
    "dimensions": ({"a": entry(shape=[1] * 8 + [2])}, bytes(8), "at most 8 sizes"),
    "vast": ({"a": entry(shape=[2**62] * 8)}, bytes(8), r"has 8 bytes, not 8.18348e\+149"),
    "vaster": ({"a": entry(shape=[2**64])}, bytes(8), "at most 8 sizes"),
    "size": ({"a": entry(shape=[3])}, bytes(8), "has 8 bytes, not 12"),
    "half a byte": ({"a": entry("F4", [1], [0, 1])}, bytes(1), "has 1 bytes, not 0.5"),
    "offsets": ({"a": entry(offsets=[0, 4, 8])}, bytes(8), "begin and end expected"),
    "backwards": ({"a": entry(offsets=[8, 0])}, bytes(8), "begin and end expected"),
    "negative offset": ({"a": entry(offsets=[-8, 0])}, bytes(8), "begin and end expected"),
    "null offsets": ({"a": entry(offsets=None)}, bytes(8), "begin and end expected"),
    "truncated": ({"a": entry()}, bytes(7), "need .* bytes, but the file has .*truncated"),
    "far away": ({"a": entry(offsets=[2**60, 2**60 + 8])}, bytes(8), "between the header and tensor 'a' are"),
    "hole before": ({"a": entry(offsets=[4, 12])}, bytes(12), "the header and tensor 'a' are 4 bytes"),
    "hole": ({"a": entry(), "b": entry(offsets=[12, 20])}, bytes(20), "tensor 'b' are 4 bytes"),
    "behind": ({"a": entry()}, bytes(9), "behind tensor 'a' are 1 bytes"),
    "data of no tensor": ({}, bytes(9), "behind the header are 9 bytes"),
    "overlap": ({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12), "tensor 'a' and tensor 'b' overlap"),
    "same place": ({"a": entry(), "b": entry()}, bytes(8), "tensor 'a' and tensor 'b' overlap"),
    "within": ({"a": entry(shape=[4], offsets=[0, 16]), "b": entry(offsets=[4, 12])}, bytes(16), "overlap"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused(tmp_path: Path, case: str) -> None:
    header, data, reason = BROKEN[case]
    path = save(tmp_path, assemble(header, data))
    with pytest.raises(CheckpointError, match=reason) as caught:
        SafetensorsFile(path)
    assert type(caught.value) is CheckpointError
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"\x02", "not a whole safetensors file: 1 bytes long"),
        (b"\x02\0\0\0\0\0\0\0{", "with a header of 2 bytes"),
        (b"\xff" * 8 + b"{}", "with a header of 18446744073709551615 bytes"),
        (write(TENSORS)[:100], "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\n", "not a whole safetensors file"),
    ],
)
def test_files_that_end_too_soon_are_refused(tmp_path: Path, raw: bytes, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        SafetensorsFile(save(tmp_path, raw))


def test_a_header_beyond_the_formats_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write((2**40).to_bytes(8, "little"))
        file.truncate(2**41)
    with pytest.raises(CheckpointError, match=f"{2**40} bytes; the limit is 100000000"):
        SafetensorsFile(path)


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="tensor 'a' has the unknown dtype 'F9'"):
        SafetensorsFile(save(tmp_path, assemble({"a": entry("F9")}, bytes(8))))


def test_names_that_steer_terminals_are_escaped(tmp_path: Path) -> None:
    header = {"\x1b[31m\ud800" + "x" * 1000: entry(shape=[3])}
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(save(tmp_path, assemble(header, bytes(8))))
    assert "\\x1b[31m\\ud800" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("piece", ["[]", "{}", '{"a":{}}', '"ab"', "257", '{"a":1}', "[[[]]]"])
def test_memory_is_bounded_by_the_file(tmp_path: Path, piece: str) -> None:
    """Of what is made of hostile JSON: ten times the file, and 50 MB."""
    header = ('{"a":[' + ",".join([piece] * 199_000) + "]}").encode()
    path = save(tmp_path, assemble(header, b""))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(header) + 50e6


WHOLE = write(TENSORS)
HEAD = 8 + int.from_bytes(WHOLE[:8], "little")


@settings(max_examples=500, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(st.tuples(st.integers(0, HEAD - 1), st.integers(0, 255)), max_size=4),
    end=st.integers(0, len(WHOLE)) | st.just(len(WHOLE)),
)
def test_mutated_files_raise_nothing_but_our_errors(
    tmp_path: Path, edits: list[tuple[int, int]], end: int
) -> None:
    raw = bytearray(WHOLE)
    for position, byte in edits:
        raw[position] = byte
    path = save(tmp_path, bytes(raw[:end]))
    message = str(path)
    try:
        file = SafetensorsFile(path)
        for name in file.infos:
            file.weight(name).dequantise()
        file.close()
    except HexadError as error:
        message = str(error)
    assert str(path) in message
