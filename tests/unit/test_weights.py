"""Weight formats: bit-equal to the gguf package, sized, cut by rows, and calm on damaged scales."""

from __future__ import annotations

import numpy as np
import pytest
from tests.gguf_writer import TYPES, random_blocks

from hexad.weights import F16, F32, Q4_0, Q4_1, Q8_0
from hexad.weights.ggml import FORMATS, TYPE_NAMES

every_format = pytest.mark.parametrize("type_id", FORMATS, ids=lambda type_id: FORMATS[type_id].name)


def weight_of(type_id, shape, seed=0):
    raw = random_blocks(np.random.default_rng(seed), type_id, shape)
    return FORMATS[type_id].from_bytes(np.frombuffer(raw, np.uint8), shape)


def bits(array):
    return array.view(np.uint32)


@every_format
def test_registered_as_gguf_defines_it(type_id):
    format = FORMATS[type_id]
    assert (format.name, format.block_size, format.block_bytes) == TYPES[type_id]
    assert TYPE_NAMES[type_id] == format.name


@pytest.mark.oracle
@every_format
@pytest.mark.parametrize("shape", [(64,), (7, 96), (3, 5, 32)])
def test_dequantise_is_bit_equal_to_the_gguf_package(type_id, shape):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    weight = weight_of(type_id, shape)
    stored = next(iter(weight.arrays.values()))
    expected = quants.dequantize(stored, constants.GGMLQuantizationType(type_id)).reshape(shape)
    actual = weight.dequantise()
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    assert actual.shape == shape
    np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.oracle
@pytest.mark.parametrize("format", [Q4_0, Q4_1, Q8_0], ids=lambda format: format.name)
def test_dequantise_agrees_with_the_gguf_package_for_every_scale(format):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    rng = np.random.default_rng(1)
    blocks = rng.integers(0, 256, (2**16, format.block_bytes), dtype=np.uint8)
    blocks[:, :2] = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, constants.GGMLQuantizationType[format.name])
    actual = format.from_bytes(blocks.reshape(-1), (2**16, 32)).dequantise()
    np.testing.assert_array_equal(actual, expected)  # NaNs equal, whatever their payload
    finite = np.isfinite(expected)
    assert finite.any()
    np.testing.assert_array_equal(bits(actual)[finite], bits(expected)[finite])


def test_blocks_by_hand():
    half, one = np.float16(0.5).tobytes(), np.float16(1.0).tobytes()
    nibbles = bytes(j | (15 - j) << 4 for j in range(16))
    q = np.array([*range(16), *range(15, -1, -1)], np.float32)
    codes = np.arange(-16, 16, dtype=np.int8)

    def dequantise(format, raw):
        return format.from_bytes(np.frombuffer(raw, np.uint8), (1, 32)).dequantise()[0]

    np.testing.assert_array_equal(dequantise(Q4_0, half + nibbles), 0.5 * (q - 8))
    np.testing.assert_array_equal(dequantise(Q4_1, half + one + nibbles), 0.5 * q + 1)
    np.testing.assert_array_equal(dequantise(Q8_0, half + codes.tobytes()), 0.5 * codes)


@every_format
def test_take_rows_is_indexing(type_id):
    rows = np.array([4, 0, 0, 2])
    for shape in [(5, 64), (5, 3, 32)]:
        weight = weight_of(type_id, shape)
        taken = weight.take_rows(rows)
        assert taken.shape == (4, *shape[1:])
        assert (
            taken.nbytes
            == FORMATS[type_id].nbytes(taken.shape)
            == sum(a.nbytes for a in taken.arrays.values())
        )
        np.testing.assert_array_equal(taken.dequantise(), weight.dequantise()[rows])


@pytest.mark.parametrize("format", [F32, F16], ids=lambda format: format.name)
def test_take_rows_of_a_dense_vector(format):
    values = np.arange(6, dtype=format.dtype)
    weight = format.from_bytes(values.view(np.uint8), (6,))
    np.testing.assert_array_equal(weight.take_rows(np.array([5, 1])).dequantise(), [5, 1])


@pytest.mark.parametrize("format", [Q4_0, Q4_1, Q8_0], ids=lambda format: format.name)
def test_block_formats_refuse_what_blocks_cannot_do(format):
    with pytest.raises(ValueError, match="multiples of 32, not 48"):
        format.nbytes((4, 48))
    vector = format.from_bytes(np.zeros(format.block_bytes, np.uint8), (32,))
    with pytest.raises(ValueError, match="cannot be taken singly"):
        vector.take_rows(np.array([0]))


@every_format
def test_arrays_are_views(type_id):
    raw = np.frombuffer(random_blocks(np.random.default_rng(0), type_id, (4, 64)), np.uint8)
    weight = FORMATS[type_id].from_bytes(raw, (4, 64))
    assert all(np.shares_memory(array, raw) for array in weight.arrays.values())
    assert weight.nbytes == raw.nbytes
