"""Writes GGUF bytes for tests, valid or broken in one chosen place. Independent of hexad's reader.

write(metadata, tensors) → bytes. `metadata` is a dict (or, to repeat a key, a list of pairs) of Python values
or `Typed` ones; `tensors` a list of `Tensor`. `llama(...)` gives both for a tiny random model, and
`write_parts(...)` writes a model into several files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "B",
    U64: "Q",
    I64: "q",
    F64: "d",
}

# id: (name, weights per block, bytes per block)
TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 8: ("Q8_0", 32, 34),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 30: ("BF16", 1, 2),
}  # fmt: skip
TYPE_F32, TYPE_F16, TYPE_Q4_0, TYPE_Q4_1, TYPE_Q8_0 = list(TYPES)[:5]

# Of a block format: where its fp16 scale d and minimum m lie; the standard deviation of weights under d = 1
# when all other bytes are random and their mean is taken away; the m, as a multiple of d, that takes it away.
SCALES: dict[str, tuple[int, int | None, float, float]] = {
    "Q4_0": (0, None, 4.6, 0), "Q4_1": (0, 2, 4.6, -7.5), "Q8_0": (0, None, 73.9, 0),
    "Q5_0": (0, None, 9.2, 0), "Q5_1": (0, 2, 9.2, -15.5), "Q2_K": (80, 82, 13.9, 1.5),
    "Q3_K": (108, None, 43, 0), "Q4_K": (0, 2, 258, 7.5), "Q5_K": (0, 2, 530, 15.5),
    "Q6_K": (208, None, 1367, 0),
}  # fmt: skip


@dataclass(frozen=True)
class Typed:
    """A value of a chosen type. An array's `value` is a list and `element` its elements' type.

    Bytes stand for themselves, so that anything can be written.
    """

    type: int
    value: Any
    element: int = U32


@dataclass(frozen=True)
class Tensor:
    """shape is row-major. data: the stored bytes. offset: None places it after the tensor before."""

    name: str
    shape: tuple[int, ...]
    type: int
    data: bytes
    offset: int | None = None


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def _payload(kind: int, value: Any, element: int = U32) -> bytes:
    if isinstance(value, bytes) and kind != STRING:
        return value
    if kind == STRING:
        return string(value)
    if kind == ARRAY:
        items = b"".join(
            _payload(item.type, item.value, item.element)
            if isinstance(item, Typed)
            else _payload(element, item)
            for item in value
        )
        return struct.pack("<IQ", element, len(value)) + items
    return struct.pack("<" + _CODES[kind], value)


def _typed(value: Any) -> Typed:
    match value:
        case Typed():
            return value
        case bool():
            return Typed(BOOL, value)
        case int():
            return Typed(U32, value)
        case float():
            return Typed(F32, value)
        case str():
            return Typed(STRING, value)
        case [str(), *_]:
            return Typed(ARRAY, value, STRING)
        case [float(), *_]:
            return Typed(ARRAY, value, F32)
        case [int(), *_]:
            return Typed(ARRAY, value, I32)
    raise TypeError(f"give a Typed for {value!r}")


def write(
    metadata: Mapping[str, Any] | Iterable[tuple[str | bytes, Any]],
    tensors: Iterable[Tensor] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    alignment: int = 32,
    key_count: int | None = None,
    tensor_count: int | None = None,
) -> bytes:
    """The file's bytes. alignment is what the layout uses; the key general.alignment is yours to set."""
    pairs = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    tensors = list(tensors)
    head = magic + struct.pack("<I", version)
    head += struct.pack("<Q", len(tensors) if tensor_count is None else tensor_count)
    head += struct.pack("<Q", len(pairs) if key_count is None else key_count)
    for key, value in pairs:
        typed = _typed(value)
        head += string(key) + struct.pack("<I", typed.type) + _payload(typed.type, typed.value, typed.element)
    data = b""
    for tensor in tensors:
        offset = len(data) if tensor.offset is None else tensor.offset
        dims = struct.pack(f"<{len(tensor.shape)}Q", *tensor.shape[::-1])
        head += string(tensor.name) + struct.pack("<I", len(tensor.shape)) + dims
        head += struct.pack("<IQ", tensor.type, offset)
        data += tensor.data + bytes(-len(tensor.data) % alignment)
    return head + bytes(-len(head) % alignment) + data


def write_parts(
    metadata: Mapping[str, Any], tensors: Sequence[Tensor], sizes: Sequence[int], name: str = "model"
) -> dict[str, bytes]:
    """The files of a model in several by their names; sizes: how many tensors each has."""
    files = {}
    rest = iter(tensors)
    for i, size in enumerate(sizes):
        keys = {
            **(metadata if i == 0 else {}),
            "split.no": Typed(U16, i),
            "split.count": Typed(U16, len(sizes)),
            "split.tensors.count": Typed(I32, len(tensors)),
        }
        part = f"{name}-{i + 1:05}-of-{len(sizes):05}.gguf"
        files[part] = write(keys, [next(rest) for _ in range(size)])
    return files


def random_blocks(rng: np.random.Generator, type_id: int, shape: tuple[int, ...]) -> bytes:
    """Random weights of about ±1/8: random codes under sane scales."""
    name, block_size, _ = TYPES[type_id]
    count = int(np.prod(shape)) // block_size
    if block_size == 1:
        values = (rng.standard_normal(count) / 8).astype("<f2" if name == "F16" else "<f4")
        return (values.view("<u2")[1::2] if name == "BF16" else values).tobytes()
    return blocks_of(rng, name, (count,), 1 / 18).tobytes()


def blocks_of(rng: np.random.Generator, name: str, shape: tuple[int, ...], std: float) -> NDArray[np.uint8]:
    """Blocks of a format, uint8 [*shape, bytes of a block], whose weights have this standard deviation.

    Random codes under scales that are no two alike, from half to one and a half of what gives it.
    """
    block_bytes = next(size for known, _, size in TYPES.values() if known == name)
    d_offset, m_offset, spread, m_ratio = SCALES[name]
    blocks = rng.integers(0, 256, (*shape, block_bytes), dtype=np.uint8)
    d = (std / spread * rng.uniform(0.5, 1.5, (*shape, 1))).astype("<f2")
    blocks[..., d_offset : d_offset + 2] = d.view(np.uint8)
    if m_offset is not None:
        m = (d.astype(np.float32) * m_ratio * rng.uniform(2 / 3, 4 / 3, d.shape)).astype("<f2")
        blocks[..., m_offset : m_offset + 2] = m.view(np.uint8)
    return blocks


def random_tensor(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], type_id: int = TYPE_F32
) -> Tensor:
    return Tensor(name, shape, type_id, random_blocks(rng, type_id, shape))


def llama(
    *,
    layers: int = 2,
    hidden: int = 64,
    intermediate: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 40,
    tied: bool = True,
    biases: bool = False,
    type_id: int = TYPE_Q4_0,
    seed: int = 0,
    **metadata: Any,
) -> tuple[dict[str, Any], list[Tensor]]:
    """Metadata and tensors of a tiny random llama model without a tokenizer.

    Further keywords are metadata, "__" for ".": llama__rope__freq_base=1e4; None removes a key.
    """
    rng = np.random.default_rng(seed)
    keys: dict[str, Any] = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "llama.block_count": layers,
        "llama.context_length": 128,
        "llama.embedding_length": hidden,
        "llama.feed_forward_length": intermediate,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": kv_heads,
        "llama.attention.key_length": head_dim,
        "llama.attention.value_length": head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "llama.rope.dimension_count": head_dim,
        "llama.vocab_size": vocab,
    }
    keys |= {name.replace("__", "."): value for name, value in metadata.items()}

    def norm(name: str) -> Tensor:
        tensor = random_tensor(rng, name, (hidden,))
        return replace(tensor, data=(1 + np.frombuffer(tensor.data, "<f4")).astype("<f4").tobytes())

    tensors = [
        random_tensor(rng, "token_embd.weight", (vocab, hidden), TYPE_Q8_0),
        norm("output_norm.weight"),
    ]
    if not tied:
        tensors.append(random_tensor(rng, "output.weight", (vocab, hidden), TYPE_Q8_0))
    for layer in range(layers):
        prefix = f"blk.{layer}."
        tensors += [norm(f"{prefix}attn_norm.weight"), norm(f"{prefix}ffn_norm.weight")]
        for name, shape in {
            "attn_q": (heads * head_dim, hidden),
            "attn_k": (kv_heads * head_dim, hidden),
            "attn_v": (kv_heads * head_dim, hidden),
            "attn_output": (hidden, heads * head_dim),
            "ffn_gate": (intermediate, hidden),
            "ffn_up": (intermediate, hidden),
            "ffn_down": (hidden, intermediate),
        }.items():
            tensors.append(random_tensor(rng, f"{prefix}{name}.weight", shape, type_id))
            if biases:
                tensors.append(random_tensor(rng, f"{prefix}{name}.bias", shape[:1]))
    return {key: value for key, value in keys.items() if value is not None}, tensors
