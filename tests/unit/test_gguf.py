"""The GGUF reader: what it reads, and that a broken file gets nothing but a typed error out of it."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tests.gguf_writer import (
    ARRAY,
    BOOL,
    F64,
    I8,
    I16,
    I64,
    STRING,
    TYPE_F16,
    TYPE_F32,
    TYPE_Q4_0,
    TYPE_Q4_1,
    TYPE_Q8_0,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    Typed,
    random_tensor,
    string,
    write,
)

from hexad.checkpoint.gguf import MAX_DEPTH, GGUFFile, LazyArray
from hexad.errors import CheckpointError, HexadError, UnsupportedError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.gguf"


def opened(path, raw):
    path.write_bytes(raw)
    return GGUFFile(path)


def sample(version=3):
    """A small file with one of everything."""
    rng = np.random.default_rng(0)
    metadata = {
        "general.architecture": "llama",
        "a.u8": Typed(U8, 200),
        "a.i8": Typed(I8, -100),
        "a.u16": Typed(U16, 60000),
        "a.i16": Typed(I16, -30000),
        "a.u64": Typed(U64, 2**63),
        "a.i64": Typed(I64, -(2**62)),
        "a.f32": 0.5,
        "a.f64": Typed(F64, 0.1),
        "a.bool": True,
        "a.text": "ein Löffel 🥄",
        "a.empty": "",
        "a.strings": ["", "ab", "ü", "日本"],
        "a.ints": [3, -1, 4],
        "a.floats": [0.5, -2.0],
        "a.bools": Typed(ARRAY, [True, False], BOOL),
        "a.none": Typed(ARRAY, [], STRING),
        "a.nested": Typed(ARRAY, [Typed(ARRAY, ["x"], STRING), Typed(ARRAY, [1, 2], U8)], ARRAY),
    }
    tensors = [
        random_tensor(rng, name, shape, type_id)
        for name, shape, type_id in (
            ("f32", (3,), TYPE_F32),
            ("f16", (2, 5), TYPE_F16),
            ("q4_0", (3, 64), TYPE_Q4_0),
            ("q4_1", (2, 32), TYPE_Q4_1),
            ("q8_0", (2, 2, 32), TYPE_Q8_0),
        )
    ]
    return write(metadata, tensors, version=version), metadata, tensors


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_kind_of_value_and_tensor(path, version):
    raw, _, tensors = sample(version)
    file = opened(path, raw)
    assert file.version == version
    scalars = {key: value for key, value in file.metadata.items() if not isinstance(value, LazyArray)}
    assert scalars == {
        "general.architecture": "llama",
        "a.u8": 200,
        "a.i8": -100,
        "a.u16": 60000,
        "a.i16": -30000,
        "a.u64": 2**63,
        "a.i64": -(2**62),
        "a.f32": 0.5,
        "a.f64": 0.1,
        "a.bool": True,
        "a.text": "ein Löffel 🥄",
        "a.empty": "",
    }
    assert type(scalars["a.bool"]) is bool
    assert type(scalars["a.u8"]) is int
    assert file.metadata["a.strings"].tolist() == ["", "ab", "ü", "日本"]
    assert file.metadata["a.ints"].tolist() == [3, -1, 4]
    assert file.metadata["a.floats"].tolist() == [0.5, -2.0]
    assert file.metadata["a.bools"].tolist() == [True, False]
    assert file.metadata["a.none"].tolist() == []
    assert [inner.tolist() for inner in file.metadata["a.nested"]] == [["x"], [1, 2]]
    assert list(file.tensors) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        weight = file.tensors[tensor.name]
        assert weight.shape == tensor.shape
        assert b"".join(array.tobytes() for array in weight.arrays.values()) == tensor.data


def test_arrays_index_and_slice_like_lists(path):
    file = opened(path, sample()[0])
    for key in ("a.strings", "a.ints", "a.floats", "a.none"):
        array, items = file.metadata[key], file.metadata[key].tolist()
        assert len(array) == len(items)
        assert list(array) == items
        assert [array[i] for i in range(-len(items), len(items))] == items + items
        assert array[1:] == items[1:]
        assert array[::-1] == items[::-1]
        with pytest.raises(IndexError):
            array[len(items)]
    assert file.metadata["a.nested"][1].tolist() == [1, 2]
    assert "ab" in file.metadata["a.strings"]


def test_tensors_are_views_of_the_mapped_file_and_outlive_close(path):
    raw, _, tensors = sample()
    file = opened(path, raw)
    arrays = {name: next(iter(weight.arrays.values())) for name, weight in file.tensors.items()}
    strings = file.metadata["a.strings"]
    for array in arrays.values():
        assert not array.flags.writeable
        assert not array.flags.owndata
    file.close()
    assert {tensor.name: tensor.data for tensor in tensors} == {n: a.tobytes() for n, a in arrays.items()}
    del arrays, array
    file.close()
    with pytest.raises(CheckpointError, match="closed"):
        strings.tolist()


def test_alignment_is_followed(path):
    tensors = [
        Tensor("a", (1,), TYPE_F32, struct.pack("<f", 1.5)),
        Tensor("b", (1,), TYPE_F32, struct.pack("<f", 2.5)),
    ]
    for alignment in (8, 64, 4096):
        file = opened(path, write({"general.alignment": alignment}, tensors, alignment=alignment))
        assert [weight.dequantise()[0] for weight in file.tensors.values()] == [1.5, 2.5]


def test_metadata_alone_is_a_file(path):
    assert opened(path, write({"general.name": "vocabulary"})).metadata == {"general.name": "vocabulary"}


def test_three_hundred_thousand_strings_open_in_half_a_second(path):
    """150,000 tokens and as many merges, the size of Qwen's: arrays are passed over, not decoded."""
    tokens = [f"token{i}" for i in range(150_000)]
    merges = [f"left{i} right" for i in range(150_000)]
    path.write_bytes(write({"tokens": tokens, "merges": merges}))
    start = time.perf_counter()
    file = GGUFFile(path)
    seconds = time.perf_counter() - start
    assert file.metadata["tokens"][149_999] == "token149999"
    assert file.metadata["merges"].tolist() == merges
    assert seconds < 0.5


# Broken files. Each row: what it is, its bytes, the error's type, and what its message says.

F32_ONE = struct.pack("<f", 1.0)
ONE = Tensor("one", (1,), TYPE_F32, F32_ONE)


def deep(levels):
    value = Typed(ARRAY, [1], U8)
    for _ in range(levels - 1):
        value = Typed(ARRAY, [value], ARRAY)
    return value


def array_header(element, count):
    return Typed(ARRAY, struct.pack("<IQ", element, count))


def one_key(*words):
    """A file whose only value is a type and u64 words."""
    type_id, *rest = words
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + string("a")
    return head + struct.pack(f"<I{len(rest)}Q", type_id, *rest) + bytes(8)


BROKEN = {
    "empty": (b"", CheckpointError, "empty"),
    "other magic": (write({}, magic=b"GGML"), CheckpointError, "not a GGUF file: it begins with b'GGML'"),
    "text": (b"Hello, I am no model.", CheckpointError, "not a GGUF file"),
    "version 1": (write({}, version=1), UnsupportedError, "GGUF version 1"),
    "version 4": (write({}, version=4), UnsupportedError, "GGUF version 4"),
    "version 0": (write({}, version=0), UnsupportedError, "GGUF version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), UnsupportedError, "big-endian"),
    "key count": (write({"a": 1}, key_count=2**64 - 1), CheckpointError, "key count is 18446744073709551615"),
    "key count, within limits": (write({"a": 1}, key_count=9999), CheckpointError, "key count is 9999"),
    "tensor count": (write({}, [ONE], tensor_count=2**63), CheckpointError, "tensor count is 92233720"),
    "key length": (
        b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63) + bytes(64),
        CheckpointError,
        "key 0 is 9223372036854775808 bytes long",
    ),
    "key too long": (write({"k" * 65536: 1}), CheckpointError, "65536 bytes long; the limit is 65535"),
    "key not UTF-8": (write([(b"\xff\xfe", 1)]), CheckpointError, "key 0 is not UTF-8"),
    "key twice": (write([("a", 1), ("a", 2)]), CheckpointError, "key 'a' occurs twice"),
    "value type": (write({"a": Typed(13, b"")}), CheckpointError, "unknown value type 13"),
    "array element type": (write({"a": array_header(77, 1)}), CheckpointError, "unknown value type 77"),
    "array count": (write({"a": array_header(U32, 2**62)}), CheckpointError, "is 4611686018427387904"),
    "string count": (write({"a": array_header(STRING, 2**62)}), CheckpointError, "is 4611686018427387904"),
    "string in array too long": (
        write({"a": Typed(ARRAY, struct.pack("<IQQ", STRING, 1, 2**64 - 1))}),
        CheckpointError,
        "runs past the end",
    ),
    "nested too deep": (write({"a": deep(MAX_DEPTH + 1)}), CheckpointError, "more than 4 deep"),
    "string length": (one_key(STRING, 2**40), CheckpointError, "the limit is 67108864"),
    "string past the end": (one_key(STRING, 1000), CheckpointError, "value of 'a' needs 1000 bytes"),
    "string not UTF-8": (write({"a": Typed(STRING, b"\xc3(")}), CheckpointError, "value of 'a' is not UTF-8"),
    "bool of 2": (write({"a": Typed(BOOL, 2)}), CheckpointError, "is a bool, but holds 2"),
    "alignment 0": (write({"general.alignment": 0}), CheckpointError, "general.alignment is 0"),
    "alignment 4": (write({"general.alignment": 4}), CheckpointError, "general.alignment is 4"),
    "alignment 24": (write({"general.alignment": 24}), CheckpointError, "general.alignment is 24"),
    "alignment of text": (write({"general.alignment": "32"}), CheckpointError, "general.alignment is '32'"),
    "alignment past the end": (
        write({"general.alignment": Typed(U64, 2**63)}, [ONE]),
        CheckpointError,
        "the file ends at",
    ),
    "tensor twice": (write({}, [ONE, ONE]), CheckpointError, "tensor 'one' occurs twice"),
    "tensor name too long": (write({}, [replace(ONE, name="n" * 65)]), CheckpointError, "limit is 64"),
    "no dimensions": (write({}, [replace(ONE, shape=())]), CheckpointError, "has 0 dimensions"),
    "five dimensions": (write({}, [replace(ONE, shape=(1,) * 5)]), CheckpointError, "has 5 dimensions"),
    "dimension 0": (write({}, [replace(ONE, shape=(2, 0))]), CheckpointError, r"has shape \(2, 0\)"),
    "product overflow": (write({}, [replace(ONE, shape=(2**32, 2**32))]), CheckpointError, "more elements"),
    "product wraps to 0": (write({}, [replace(ONE, shape=(2**63, 2, 2))]), CheckpointError, "more elements"),
    "unknown type": (write({}, [replace(ONE, type=99)]), UnsupportedError, r"'one' has type .* \(id 99\)"),
    "removed type": (write({}, [replace(ONE, type=4)]), UnsupportedError, r"'one' has type .* \(id 4\)"),
    "type not read": (write({}, [replace(ONE, type=16)]), UnsupportedError, r"has type IQ2_XXS \(id 16\)"),
    "part of a block": (
        write({}, [Tensor("q", (2, 48), TYPE_Q4_0, bytes(54))]),
        CheckpointError,
        "multiples of 32, not 48",
    ),
    "offset unaligned": (write({}, [replace(ONE, offset=4)]), CheckpointError, "offset 4, not a multiple"),
    "offset out of range": (write({}, [replace(ONE, offset=2**40)]), CheckpointError, "the file ends at"),
    "offset at the top": (write({}, [replace(ONE, offset=2**64 - 32)]), CheckpointError, "the file ends at"),
    "larger than the file": (write({}, [replace(ONE, shape=(1000,))]), CheckpointError, "has 4000 bytes"),
    "overlap": (
        write({}, [ONE, Tensor("two", (1,), TYPE_F32, F32_ONE, offset=0)]),
        CheckpointError,
        "tensors 'one' and 'two' overlap",
    ),
    "overlap out of order": (
        write({}, [replace(ONE, name="b", offset=32), Tensor("a", (9,), TYPE_F32, bytes(36), offset=0)]),
        CheckpointError,
        "tensors 'a' and 'b' overlap",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_with_the_reason(path, case):
    raw, error, reason = BROKEN[case]
    path.write_bytes(raw)
    with pytest.raises(error, match=reason) as caught:
        GGUFFile(path)
    assert type(caught.value) is error
    assert str(caught.value).startswith(f"{path}: ")


def test_depth_just_allowed(path):
    value = opened(path, write({"a": deep(MAX_DEPTH)})).metadata["a"]
    for _ in range(MAX_DEPTH):
        value = value[0]
    assert value == 1


def test_strings_in_arrays_are_checked_when_decoded(path):
    file = opened(path, write({"a": Typed(ARRAY, ["good", b"\xff"], STRING)}))
    assert file.metadata["a"][0] == "good"
    with pytest.raises(CheckpointError, match=r"model.gguf: value of 'a' \[1\] is not UTF-8"):
        file.metadata["a"].tolist()


def test_every_truncation_is_refused(path):
    raw = sample()[0]
    unpadded = len(raw.rstrip(b"\0"))  # the padding after the last tensor may go
    for size in range(unpadded):
        path.write_bytes(raw[:size])
        with pytest.raises(CheckpointError) as caught:
            GGUFFile(path)
        assert str(path) in str(caught.value)


def test_what_is_no_file_is_refused(tmp_path):
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for path, reason in (
        (tmp_path, "regular file"),
        (fifo, "regular file"),
        (tmp_path / "none", "No such file"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            GGUFFile(path)


def test_huge_sparse_files_of_empty_strings_end_soon(path):
    """A file can claim what it likes at no cost to its author; the counts are capped whatever its size."""
    head = write({"a": array_header(STRING, 2**28)}, key_count=1).rstrip(b"\0")
    path.write_bytes(head)
    os.truncate(path, 2**33)
    with pytest.raises(CheckpointError, match="the limit is 16777216"):
        GGUFFile(path)


def read_all(path):
    """Opens and decodes everything there is."""
    with GGUFFile(path) as file:
        pending = list(file.metadata.values())
        while pending:
            value = pending.pop()
            if isinstance(value, LazyArray):
                pending += value.tolist()
                pending += value[:1]
        for weight in file.tensors.values():
            weight.dequantise()


SAMPLE = sample()[0]
EXTREMES = [0, 1, 2, 7, 8, 9, 127, 255]


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(SAMPLE) - 1), st.sampled_from(EXTREMES) | st.integers(0, 255)),
        max_size=8,
    ),
    words=st.lists(
        st.tuples(
            st.integers(0, len(SAMPLE) - 9),
            st.sampled_from([0, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]),
        ),
        max_size=2,
    ),
    size=st.integers(0, len(SAMPLE)) | st.just(len(SAMPLE)),
)
@example(edits=[], words=[], size=len(SAMPLE))
def test_mutated_files_raise_nothing_but_our_errors(path, edits, words, size):
    raw = bytearray(SAMPLE)
    for position, value in words:
        raw[position : position + 8] = struct.pack("<Q", value)
    for position, byte in edits:
        raw[position] = byte
    path.write_bytes(raw[:size])
    message = str(path)
    tracemalloc.start()
    try:
        read_all(path)
    except HexadError as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert str(path) in message
    assert peak < 2**22


# Against the gguf package.


@pytest.mark.oracle
def test_reads_what_the_gguf_package_writes(path):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_uint32("x.count", 7)
    writer.add_float64("x.double", 0.1)
    writer.add_bool("x.flag", True)
    writer.add_array("x.words", ["a", "ü", ""])
    writer.add_array("x.scores", [0.5, -1.0])
    stored = {}
    for name in ("F32", "F16", "Q4_0", "Q4_1", "Q8_0"):
        type_id = gguf.GGMLQuantizationType[name]
        data = gguf.quants.quantize(rng.standard_normal((6, 64)).astype(np.float32), type_id)
        writer.add_tensor(f"w.{name}", data, raw_dtype=type_id)
        stored[f"w.{name}"] = gguf.quants.dequantize(data, type_id)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["general.alignment"] == 64
    assert file.metadata["x.count"] == 7
    assert file.metadata["x.double"] == 0.1
    assert file.metadata["x.flag"] is True
    assert file.metadata["x.words"].tolist() == ["a", "ü", ""]
    assert file.metadata["x.scores"].tolist() == [0.5, -1.0]
    assert list(file.tensors) == list(stored)
    for name, expected in stored.items():
        assert file.tensors[name].format.name == name.removeprefix("w.")
        np.testing.assert_array_equal(file.tensors[name].dequantise(), expected)


@pytest.mark.oracle
def test_our_writer_is_read_by_the_gguf_package(path):
    gguf = pytest.importorskip("gguf")
    raw, _, tensors = sample()
    path.write_bytes(raw)
    reader = gguf.GGUFReader(path)
    assert reader.get_field("a.text").contents() == "ein Löffel 🥄"
    assert [(t.name, tuple(t.shape[::-1]), t.data.tobytes()) for t in reader.tensors] == [
        (t.name, t.shape, t.data) for t in tensors
    ]
