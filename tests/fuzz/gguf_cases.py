"""GGUF files for the fuzzer: valid ones of every shape, and what becomes of them."""

from __future__ import annotations

import struct
from functools import cache
from random import Random
from typing import Any

import numpy as np
from tests.fuzz.case import Case
from tests.fuzz.mutate import FLOATS, INTEGERS, TEXTS, mutate_bytes
from tests.gguf_writer import (
    _CODES,
    ARRAY,
    BOOL,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    STRING,
    TYPE_F32,
    TYPES,
    U8,
    U16,
    U32,
    U64,
    Tensor,
    Typed,
    llama,
    random_tensor,
    write,
    write_parts,
)

TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
SIZES = {value_type: struct.calcsize(code) for value_type, code in _CODES.items()}

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "clip", "")
SETTINGS: dict[str, tuple[Any, ...]] = {
    "general.alignment": (8, 16, 64, 4096, 0, 3, Typed(U64, 2**63), "32"),
    "general.type": ("model", "adapter"),
    "general.sampling.temp": FLOATS,
    "general.sampling.top_k": (Typed(I32, 20), Typed(U64, 2**64 - 1)),
    "general.sampling.sequence": ("top-k;temp", ";;;", "\0"),
    "split.count": (Typed(U16, 0), Typed(U16, 2), Typed(U16, 65535)),
    "split.no": (Typed(U16, 1),),
    "split.tensors.count": (Typed(I32, -1),),
    "{arch}.rope.scaling.type": ("none", "linear", "yarn", "longrope"),
    "{arch}.rope.scaling.factor": (*FLOATS, 4.0, 1e30),
    "{arch}.rope.scaling.original_context_length": (64, 1, 2**32 - 1),
    "{arch}.rope.scaling.attn_factor": FLOATS,
    "{arch}.rope.scaling.yarn_beta_fast": FLOATS,
    "{arch}.rope.scaling.yarn_log_multiplier": FLOATS,
    "{arch}.rope.scale_linear": FLOATS,
    "{arch}.rope.freq_base": FLOATS,
    "{arch}.attention.sliding_window": (0, 1, 64, 2**31, Typed(U64, 2**63)),
    "{arch}.attention.sliding_window_pattern": (2, Typed(ARRAY, [True, False], BOOL)),
    "{arch}.expert_count": (0, 8),
    "tokenizer.ggml.model": ("gpt2", "llama", "bert", "t5", "rwkv", "no_vocab", ""),
    "tokenizer.ggml.pre": ("llama-bpe", "qwen2", "tekken", "deepseek-v3", "falcon", "mpt", "x" * 5000),
    "tokenizer.ggml.bos_token_id": (0, 2**32 - 1, Typed(I32, -1), Typed(U64, 2**64 - 1)),
    "tokenizer.ggml.eos_token_id": (1, 10**6, Typed(ARRAY, [1, 2], U32)),
    "tokenizer.ggml.unknown_token_id": (0, 10**6),
    "tokenizer.ggml.add_bos_token": (True, False, 1),
    "tokenizer.ggml.add_space_prefix": (True, False, "yes"),
    "tokenizer.ggml.remove_extra_whitespaces": (True, False),
    "tokenizer.ggml.precompiled_charsmap": (Typed(ARRAY, [0, 1, 255], U8),),
    "tokenizer.chat_template": (
        TEMPLATE,
        "{{",
        "{{ raise_exception('no') }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ),
    "tokenizer.chat_template.tool_use": (TEMPLATE,),
}


@cache
def seeds() -> list[Case]:
    """One of everything; models with each kind of tokenizer and of tensor; models in parts."""
    rng = np.random.default_rng(0)
    numbers = {f"a.{kind}": Typed(kind, 1) for kind in SIZES}
    arrays = {f"b.{kind}": Typed(ARRAY, [0, 1, 1], kind) for kind in SIZES}
    nested = Typed(
        ARRAY, [Typed(ARRAY, [Typed(ARRAY, ["x", ""], STRING)], ARRAY), Typed(ARRAY, [], U8)], ARRAY
    )
    everything = numbers | arrays | {"c.text": "Löffel 🥄", "c.texts": ["", "ab", "日本"], "c.nested": nested}
    every_type = [random_tensor(rng, TYPES[t][0], (2, max(TYPES[t][1], 3)), t) for t in TYPES]
    cases = [
        one_gguf(everything, every_type),
        one_gguf(everything, every_type[:2], version=2),
        one_gguf({"general.alignment": 64} | everything, every_type, alignment=64),
        one_gguf({}, []),
    ]
    for vocabulary in (gpt2_vocabulary(), llama_vocabulary()):
        metadata, tensors = _model(vocabulary)
        cases.append(one_gguf(metadata, tensors))
        for sizes in ((0, len(tensors)), (5, 3, len(tensors) - 8)):
            files = write_parts(metadata, tensors, sizes)
            cases.append(Case(files, min(files)))
    return cases


def mutated(random: Random) -> Case:
    """A seed, or a model that was changed before it was written, most often with its bytes changed too."""
    if random.random() < 0.4:
        case = random.choice(seeds())
    else:
        case = _changed_model(random)
        if random.random() < 0.6:
            return case
    if len(case.files) > 1 and random.random() < 0.1:
        return _shuffled(random, case)
    name = random.choice(list(case.files))
    raw = case.files[name]
    other = random.choice(list(random.choice(seeds()).files.values()))
    try:
        head, spans = layout(raw)
    except (struct.error, IndexError, KeyError, UnicodeDecodeError):  # of what was changed past reading
        head, spans = len(raw), {}
    if spans.get("text") and random.random() < 0.2:
        return Case(case.files | {name: _retext(random, raw, head, spans["text"])}, case.opened)
    return Case(case.files | {name: mutate_bytes(random, raw, spans, head, other)}, case.opened)


def layout(raw: bytes) -> tuple[int, dict[str, list[tuple[int, int]]]]:
    """Where the tensor infos of a valid file end, and where its integers are: (start, size) by their use."""
    spans: dict[str, list[tuple[int, int]]] = {
        group: [] for group in ("count", "length", "type", "dims", "offset", "value", "text")
    }
    position = 8

    def number(group: str, size: int) -> int:
        nonlocal position
        spans[group].append((position, size))
        position += size
        return int.from_bytes(raw[position - size : position], "little")

    def text() -> None:
        nonlocal position
        size = number("length", 8)
        spans["text"].append((position, size))
        position += size

    def value(kind: int) -> None:
        if kind == STRING:
            text()
        elif kind == ARRAY:
            element, count = number("type", 4), number("count", 8)
            for _ in range(count):
                value(element)
        else:
            number("value", SIZES[kind])

    tensors, keys = number("count", 8), number("count", 8)
    for _ in range(keys):
        text()
        value(number("type", 4))
    for _ in range(tensors):
        text()
        for _ in range(number("count", 4)):
            number("dims", 8)
        number("type", 4)
        number("offset", 8)
    return position, spans


def _retext(random: Random, raw: bytes, head: int, texts: list[tuple[int, int]]) -> bytes:
    """raw with one of its strings replaced, and all else where it belongs."""
    start, size = random.choice(texts)
    text = random.choice(TEXTS)
    text = text.encode() if isinstance(text, str) else text
    longer = raw[: start - 8] + struct.pack("<Q", len(text)) + text + raw[start + size : head]
    return longer + bytes(-len(longer) % 32) + raw[head + -head % 32 :]


def _shuffled(random: Random, case: Case) -> Case:
    """A model in parts with one missing, taking another's place, or under another name."""
    files = dict(case.files)
    a, b = random.choices(list(files), k=2)
    match random.randrange(3):
        case 0:
            del files[a]
        case 1:
            files[a] = files[b]
        case _:
            files[a.replace("of-0000", "of-0001")] = files.pop(a)
    return Case(
        files, random.choice([case.opened if case.opened in files else min(files, default=""), *files])
    )


def one_gguf(metadata: Any, tensors: list[Tensor], **settings: Any) -> Case:
    """A model in one file."""
    return Case({"model.gguf": write(metadata, tensors, **settings)}, "model.gguf")


def _model(vocabulary: dict[str, Any], **settings: Any) -> tuple[dict[str, Any], list[Tensor]]:
    """A model of one layer that is mostly structure: few weights, small vocabulary."""
    metadata, tensors = llama(
        layers=1, hidden=32, intermediate=32, heads=2, kv_heads=1, head_dim=16,
        vocab=len(vocabulary["tokenizer.ggml.tokens"]), **settings,
    )  # fmt: skip
    return metadata | vocabulary, tensors


def gpt2_vocabulary() -> dict[str, Any]:
    tokens = [*"abcdehlorwĠ!", "he", "ll", "hell", "hello", "<s>", "</s>", "<|im_end|>", "<user>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": Typed(ARRAY, [1] * (len(tokens) - 4) + [3, 3, 3, 4], I32),
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o"],
        "tokenizer.ggml.bos_token_id": len(tokens) - 4,
        "tokenizer.ggml.eos_token_id": len(tokens) - 3,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def llama_vocabulary() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(0, 256, 16)), *"▁abcdehlorw"]
    tokens += ["he", "ll", "hell", "▁hello"]
    types = [2, 3, 3] + [6] * 16 + [1] * (len(tokens) - 19)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": Typed(ARRAY, [-float(i) for i in range(len(tokens))], F32),
        "tokenizer.ggml.token_type": Typed(ARRAY, types, I32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": True,
        "tokenizer.chat_template": TEMPLATE,
    }


def _changed_model(random: Random) -> Case:
    """A model written after changes to what it sets and holds, so that the bytes still are a GGUF file."""
    vocabulary = random.choice((gpt2_vocabulary, llama_vocabulary))()
    type_id = random.choice([t for t in TYPES if TYPES[t][1] <= 32])
    metadata, tensors = _model(
        vocabulary, biases=random.random() < 0.3, tied=random.random() < 0.5, type_id=type_id
    )
    architecture = random.choice(ARCHITECTURES) if random.random() < 0.4 else "llama"
    metadata = {key.replace("llama.", f"{architecture}."): value for key, value in metadata.items()}
    metadata["general.architecture"] = architecture
    pairs = list(metadata.items())
    for _ in range(random.randrange(4)):
        _change_metadata(random, pairs, architecture)
    tensors = list(tensors)
    for _ in range(random.choice((0, 0, 1, 2))):
        _change_tensors(random, tensors)
    if random.random() < 0.15:
        cut = random.randrange(len(tensors) + 1)
        files = write_parts(dict(pairs), tensors, (cut, len(tensors) - cut))
        return Case(files, random.choice(list(files)))
    return one_gguf(pairs, tensors)


def _change_metadata(random: Random, pairs: list[tuple[str | bytes, Any]], architecture: str) -> None:
    place = random.randrange(len(pairs))
    key, value = pairs[place]
    match random.randrange(7):
        case 0:
            if len(pairs) > 1:
                del pairs[place]
        case 1:
            pairs[place] = random.choice(TEXTS), value
        case 2:
            pairs[place] = key, _value(random)
        case 3:
            pairs[place] = key, _elements(random, value)
        case _:
            setting = random.choice(list(SETTINGS))
            name = setting.format(arch=architecture)
            chosen = random.choice(SETTINGS[setting]) if random.random() < 0.7 else _value(random)
            pairs[:] = [pair for pair in pairs if pair[0] != name] + [(name, chosen)]


def _value(random: Random, depth: int = 0) -> Typed:
    kind = random.choice((U8, I8, U16, I16, U32, I32, U64, I64, F32, F64, BOOL, STRING, ARRAY))
    if kind == ARRAY and depth < 5:
        element = _value(random, depth + 1)
        count = random.choice((0, 1, 2, 37, 1000 if depth == 0 else 1))
        return Typed(ARRAY, [element if element.type == ARRAY else element.value] * count, element.type)
    if kind in (STRING, ARRAY):
        return Typed(STRING, random.choice(TEXTS))
    if kind in (F32, F64):
        return Typed(kind, random.choice(FLOATS))
    size = SIZES[kind]
    return Typed(kind, (random.choice(INTEGERS) & (1 << 8 * size) - 1).to_bytes(size, "little"))


def _elements(random: Random, value: Any) -> Any:
    """An array with elements changed, removed or repeated; anything else replaced."""
    typed = value if isinstance(value, Typed) else None
    items = (
        list(typed.value if typed else value) if isinstance(typed.value if typed else value, list) else None
    )
    if not items:
        return _value(random)
    place = random.randrange(len(items))
    match random.randrange(4):
        case 0:
            del items[place]
        case 1:
            items.insert(place, random.choice(items))
        case 2:
            items[place] = random.choice(items)
        case _:
            if isinstance(items[0], str):
                items[place] = random.choice(TEXTS)
            elif isinstance(items[0], float):
                items[place] = random.choice(FLOATS)
            else:
                items[place] = random.choice((-1, 0, 1, 2, 3, 4, 5, 6, 7, 2**31 - 1))
    kind = typed.element if typed else STRING if isinstance(items[0] if items else "", str | bytes) else F32
    return Typed(ARRAY, items, kind)


def _change_tensors(random: Random, tensors: list[Tensor]) -> None:
    if not tensors:
        return
    place = random.randrange(len(tensors))
    tensor = tensors[place]
    rng = np.random.default_rng(random.randrange(1000))
    match random.randrange(6):
        case 0:
            del tensors[place]
        case 1:
            name = random.choice(
                (
                    "rope_freqs.weight",
                    "blk.0.attn_q_norm.weight",
                    "blk.0.attn_rot_embd.weight",
                    "blk.0.ffn_gate_exps.weight",
                    "output.bias",
                    "blk.7.attn_q.weight",
                    "",
                    "n" * 65,
                )
            )
            values = rng.standard_normal(random.choice((1, 8, 16, 32))).astype("<f4")
            values[: random.randrange(3)] = random.choice(FLOATS)
            tensors.append(Tensor(name, values.shape, TYPE_F32, values.tobytes()))
        case 2:
            tensors[place] = Tensor(random.choice(tensors).name, tensor.shape, tensor.type, tensor.data)
        case 3:  # another shape of as many weights
            shape = random.choice(
                (tensor.shape[::-1], (1, *tensor.shape), (*tensor.shape, 1), (int(np.prod(tensor.shape)),))
            )
            tensors[place] = Tensor(tensor.name, shape, tensor.type, tensor.data)
        case 4:
            shape = tuple(random.choice((size, size, 1, size + 32, 2 * size)) for size in tensor.shape)
            fitting = [t for t in TYPES if shape[-1] % TYPES[t][1] == 0]
            tensors[place] = random_tensor(rng, tensor.name, shape, random.choice(fitting))
        case _:
            tensors[place] = Tensor(
                tensor.name, tensor.shape, tensor.type, tensor.data, random.choice(INTEGERS)
            )
