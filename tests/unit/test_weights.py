"""Weight formats: bit-equal to the gguf package, sized, cut by rows, and calm on damaged scales."""

from __future__ import annotations

import numpy as np
import pytest
from tests.gguf_writer import SCALES, TYPES, random_blocks
from tests.tiny_models import dense

from hexad.weights import BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q6_K, Q8_0
from hexad.weights.blocks import BlockFormat
from hexad.weights.ggml import FORMATS, TYPE_NAMES

BLOCK_FORMATS = [format for format in FORMATS.values() if isinstance(format, BlockFormat)]
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
@pytest.mark.parametrize("shape", [(2,), (7, 3), (3, 5, 1)])
def test_dequantise_is_bit_equal_to_the_gguf_package(type_id, shape):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    shape = (*shape[:-1], shape[-1] * max(32, FORMATS[type_id].block_size))
    weight = weight_of(type_id, shape)
    stored = next(iter(weight.arrays.values()))
    expected = quants.dequantize(stored.view(np.uint8), constants.GGMLQuantizationType(type_id)).reshape(
        shape
    )
    actual = weight.dequantise()
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    assert actual.shape == shape
    np.testing.assert_array_equal(bits(actual), bits(expected))


@pytest.mark.oracle
@pytest.mark.parametrize("format", BLOCK_FORMATS, ids=lambda format: format.name)
def test_dequantise_agrees_with_the_gguf_package_for_every_scale(format):
    """Every fp16 as d, and as m, above random codes and small scales."""
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    rng = np.random.default_rng(1)
    every = np.arange(2**16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    for offset in (offset for offset in SCALES[format.name][:2] if offset is not None):
        blocks = rng.integers(0, 256, (2**16, format.block_bytes), dtype=np.uint8)
        blocks[:, offset : offset + 2] = every
        with np.errstate(all="ignore"):
            expected = quants.dequantize(blocks, constants.GGMLQuantizationType[format.name])
        actual = format.from_bytes(blocks.reshape(-1), (2**16, format.block_size)).dequantise()
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
    high = np.arange(32) % 3 == 0
    fifth = np.packbits(high, bitorder="little").tobytes()
    np.testing.assert_array_equal(dequantise(Q5_0, half + fifth + nibbles), 0.5 * (q + 16 * high - 16))
    np.testing.assert_array_equal(dequantise(Q5_1, half + one + fifth + nibbles), 0.5 * (q + 16 * high) + 1)


def test_a_k_quant_by_hand():
    """Q6_K, weight by weight as ggml's documentation of the block says."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, 210, dtype=np.uint8)
    raw[208:] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    expected = np.zeros(256, np.float32)
    scales = raw[192:208].view(np.int8)
    for i in range(256):
        part, k = divmod(i, 128)
        run, byte = divmod(k, 32)
        low = raw[64 * part + 32 * (run % 2) + byte] >> 4 * (run // 2) & 15
        high = raw[128 + 32 * part + byte] >> 2 * run & 3
        expected[i] = 0.5 * int(scales[i // 16]) * (int(low) + 16 * int(high) - 32)
    np.testing.assert_array_equal(Q6_K.from_bytes(raw, (256,)).dequantise(), expected)


def test_bfloat16_is_the_upper_half_of_a_float32():
    values = np.array([1.0, -2.5, np.inf, 3e38, 1e-40], np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2")
    cut = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    np.testing.assert_array_equal(BF16.from_bytes(raw.view(np.uint8), (5,)).dequantise(), cut)


@every_format
def test_take_rows_is_indexing(type_id):
    rows = np.array([4, 0, 0, 2])
    size = max(32, FORMATS[type_id].block_size)
    for shape in [(5, 2 * size), (5, 3, size)]:
        weight = weight_of(type_id, shape)
        taken = weight.take_rows(rows)
        assert taken.shape == (4, *shape[1:])
        assert (
            taken.nbytes
            == FORMATS[type_id].nbytes(taken.shape)
            == sum(a.nbytes for a in taken.arrays.values())
        )
        np.testing.assert_array_equal(taken.dequantise(), weight.dequantise()[rows])


@pytest.mark.parametrize("format", [F32, F16, BF16], ids=lambda format: format.name)
def test_take_rows_of_a_dense_vector(format):
    weight = dense(np.arange(6.0), format)
    np.testing.assert_array_equal(weight.take_rows(np.array([5, 1])).dequantise(), [5, 1])


@pytest.mark.parametrize("format", BLOCK_FORMATS, ids=lambda format: format.name)
def test_block_formats_refuse_what_blocks_cannot_do(format):
    size = format.block_size
    with pytest.raises(ValueError, match=f"multiples of {size}, not {size + 16}"):
        format.nbytes((4, size + 16))
    vector = format.from_bytes(np.zeros(format.block_bytes, np.uint8), (size,))
    with pytest.raises(ValueError, match="cannot be taken singly"):
        vector.take_rows(np.array([0]))


@every_format
def test_arrays_are_views(type_id):
    raw = np.frombuffer(random_blocks(np.random.default_rng(0), type_id, (4, 512)), np.uint8)
    weight = FORMATS[type_id].from_bytes(raw, (4, 512))
    assert all(np.shares_memory(array, raw) for array in weight.arrays.values())
    assert weight.nbytes == raw.nbytes
