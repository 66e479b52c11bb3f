"""Mutations of bytes and of JSON, drawn from a `random.Random`, so that a seed repeats them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

INTEGERS = (0, 1, 2, 7, 31, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32,
            2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1)  # fmt: skip
"""Where sizes, signs and products go wrong; 2^64 − 1 is also −1."""

FLOATS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e38, math.inf, -math.inf, math.nan)

TEXTS: tuple[str | bytes, ...] = (
    "", " ", "\0", "a", "ab", "▁", "▁▁", "<0x00>", "<0xFF>", "<0xZZ>", "<s>", "</s>", "<unk>", "<|im_end|>",
    "Ġ", "é", "e\u0301", "\U0001f966", "\ufffd", "n" * 3000, "../../etc/passwd", "none", "linear", "yarn",
    "llama3", "longrope", "dynamic", "gpt2", "llama", "bert", "t5", "qwen2", "default", "tekken", "model",
    "adapter", "1", "-1", "nan", "{{ 1 // 0 }}", "{% for m in messages %}", "{{ 'x' * 99999 }}",
    b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\xf4\x90\x80\x80",
)  # fmt: skip
"""Names and settings that mean something, and bytes that are no UTF-8."""

Spans = Mapping[str, Sequence[tuple[int, int]]]
"""Where a file's integers are, (start, size) by what they count, and under "text" its strings."""


def mutate_bytes(random: Random, raw: bytes, spans: Spans, head: int, other: bytes) -> bytes:
    """raw with one to a few changes.

    spans: of raw, and used until a change moves what follows it. head: how many of the first bytes describe
    the rest, which most changes shall hit. other: another file, to take slices of.
    """
    data = bytearray(raw)
    for _ in range(min(1 + int(random.expovariate(0.8)), 8)):
        if not data:
            break
        moved = False
        groups = [group for group in spans if group != "text" and spans[group]]
        if groups and random.random() < 0.5:
            start, size = random.choice(spans[random.choice(groups)])
            _set_integer(random, data, start, size)
        else:
            length = len(data)
            random.choice(_EDITS)(random, data, min(head, length) if random.random() < 0.8 else length, other)
            moved = len(data) != length
        if moved:
            spans = {}
    return bytes(data)


def _set_integer(random: Random, data: bytearray, start: int, size: int) -> None:
    """Writes a number of interest, one next to what was there, or one near the file's size."""
    if start + size > len(data):
        return
    value = int.from_bytes(data[start : start + size], "little")
    near = (
        value + random.choice((-1, 1, 8, -8, 32)),
        value * 2,
        value << 32 | value,
        len(data) - start,
        ~value,
    )
    value = random.choice(INTEGERS if random.random() < 0.6 else near)
    data[start : start + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")


def _integer_anywhere(random: Random, data: bytearray, end: int, other: bytes) -> None:
    size = random.choice((1, 2, 4, 8))
    start = random.randrange(end)
    _set_integer(random, data, start - start % size if random.random() < 0.5 else start, size)


def _flip_bit(random: Random, data: bytearray, end: int, other: bytes) -> None:
    data[random.randrange(end)] ^= 1 << random.randrange(8)


def _set_byte(random: Random, data: bytearray, end: int, other: bytes) -> None:
    data[random.randrange(end)] = random.choice((0, 1, 9, 34, 92, 127, 128, 255, random.randrange(256)))


def _truncate(random: Random, data: bytearray, end: int, other: bytes) -> None:
    del data[random.randrange(end) :]


def _remove(random: Random, data: bytearray, end: int, other: bytes) -> None:
    start = random.randrange(end)
    del data[start : start + _length(random)]


def _insert(random: Random, data: bytearray, end: int, other: bytes) -> None:
    start = random.randrange(end)
    data[start:start] = random.randbytes(_length(random)) if random.random() < 0.5 else bytes(_length(random))


def _duplicate(random: Random, data: bytearray, end: int, other: bytes) -> None:
    start = random.randrange(end)
    data[start:start] = data[start : start + _length(random)] * random.choice((1, 1, 2, 100))


def _swap(random: Random, data: bytearray, end: int, other: bytes) -> None:
    size = min(_length(random), end)
    a, b = (random.randrange(end - size + 1) for _ in range(2))
    data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]


def _splice(random: Random, data: bytearray, end: int, other: bytes) -> None:
    if other:
        start, source = random.randrange(end), random.randrange(len(other))
        size = _length(random)
        replaced = size if random.random() < 0.5 else 0
        data[start : start + replaced] = other[source : source + size]


def _append(random: Random, data: bytearray, end: int, other: bytes) -> None:
    data += bytes(random.choice((1, 31, 4096, 100_000)))


def _length(random: Random) -> int:
    return random.choice((1, 2, 4, 8, 12, 16, 32, random.randrange(1, 300)))


_EDITS: tuple[Callable[[Random, bytearray, int, bytes], None], ...] = (
    _integer_anywhere, _integer_anywhere, _flip_bit, _set_byte, _truncate, _remove, _insert, _duplicate,
    _swap, _splice, _append,
)  # fmt: skip


# --- JSON ---

NOT_JSON = (
    b"", b"\0", b"nul", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b"\xef\xbb\xbf{}", b"\xff\xfe{\0}\0",
    b'{"a": "\xff"}', b'{"a": 1e999}', b'{"a": NaN}', b'{"a": 1, "a": 2}', b"{} {}", b'{"\\ud800": 1}', b"[]",
    b"null", b"7", b'"text"',
)  # fmt: skip
"""What is no JSON, no object, or only just."""


def any_json(random: Random, depth: int = 0) -> Any:
    """A value that a careful reader has met before."""
    kinds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: random.random() < 0.5,
        lambda: random.choice((1, -1)) * random.choice((*INTEGERS, 10**400, 3, 10**30)),
        lambda: random.choice((*FLOATS, 0.5, 1e300, 64.0)),
        lambda: text if isinstance(text := random.choice(TEXTS), str) else "\ud800",
        list,
        dict,
    ]
    if depth < 2:
        kinds += [
            lambda: [any_json(random, depth + 1) for _ in range(random.randrange(4))],
            lambda: {str(any_json(random, 2)): any_json(random, depth + 1) for _ in range(3)},
        ]
    return random.choice(kinds)()


def mutate_json(random: Random, raw: bytes, hints: Mapping[str, Sequence[Any]] = {}) -> bytes:
    """JSON with values replaced, removed, renamed, repeated or added, and sometimes no JSON any more.

    hints: values to give a key besides `any_json`'s; a key that is not there may be added.
    """
    if random.random() < 0.08:
        return random.choice(NOT_JSON)
    root = json.loads(raw)
    for _ in range(min(1 + int(random.expovariate(0.8)), 6)):
        if not isinstance(root, dict | list):
            break
        if hints and isinstance(root, dict) and random.random() < 0.4:
            key = random.choice(list(hints))
            root[key] = random.choice(hints[key]) if random.random() < 0.7 else any_json(random)
            continue
        holder, key = _place(random, root)
        if key is None:
            root = any_json(random)
        else:
            _change(random, root, holder, key)
    text = json.dumps(root, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    return mutate_bytes(random, text, {}, len(text), raw) if random.random() < 0.15 else text


def _place(random: Random, root: Any) -> tuple[Any, Any]:
    """A list or dict somewhere in root and a key of it; (root, None) if root is empty."""
    holder, key = root, None
    value = root
    while isinstance(value, dict | list) and value:
        holder, key = value, random.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = holder[key]
        if random.random() < 0.3:
            break
    return holder, key


def _change(random: Random, root: Any, holder: Any, key: Any) -> None:
    match random.randrange(5):
        case 0:
            del holder[key]
        case 1:  # a copy of something else in it
            other, place = _place(random, root)
            copied = json.loads(json.dumps(other[place]))
            if isinstance(holder, list):
                holder.insert(key, copied)
            else:
                holder[key] = copied
        case 2 if isinstance(holder, dict):
            holder[str(any_json(random, 2))] = holder.pop(key)
        case 3 if type(holder[key]) is int or (type(holder[key]) is float and math.isfinite(holder[key])):
            holder[key] = random.choice(
                (holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, str(holder[key]))
            )
        case _:
            holder[key] = any_json(random)
