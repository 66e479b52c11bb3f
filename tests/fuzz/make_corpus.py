"""Writes tests/fuzz/corpus/gguf and …/folder: the inputs by hand, each named for what it is about.

`python -m tests.fuzz.make_corpus`, after a row is added. Cases that the fuzzer found are copied
there instead.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.fuzz.case import Case
from tests.fuzz.gguf_cases import gpt2_vocabulary, llama_vocabulary, one_gguf
from tests.gguf_writer import (
    ARRAY,
    BOOL,
    F32,
    I8,
    I32,
    STRING,
    U8,
    U16,
    U64,
    Tensor,
    Typed,
    llama,
    write_parts,
)
from tests.safetensors_writer import assemble

CORPUS = Path(__file__).parent / "corpus"

ONE = Tensor("token_embd.weight", (1,), 0, bytes(4))


def array(element: int, count: int, rest: bytes = b"") -> Typed:
    """An array whose header says what it likes."""
    return Typed(ARRAY, struct.pack("<IQ", element, count) + rest)


def nest(levels: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * (levels - 1) + struct.pack("<IQ", U8, 0)


def tokenizer(**changes: Any) -> Case:
    """The vocabulary alone, without a model around it."""
    keys = {"general.architecture": "llama"} | gpt2_vocabulary()
    return one_gguf(
        keys | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}, []
    )


def spm(**changes: Any) -> Case:
    keys = {"general.architecture": "llama"} | llama_vocabulary()
    return one_gguf(
        keys | {f"tokenizer.{key.replace('__', '.')}": value for key, value in changes.items()}, []
    )


def parts(**changes: Any) -> Case:
    files = write_parts(
        {"general.architecture": "llama"} | {k.replace("__", "."): v for k, v in changes.items()},
        [ONE],
        [0, 1],
    )
    return Case(files, min(files))


GGUF = {
    "counts-of-2-to-the-64-less-1": one_gguf({}, [], key_count=2**64 - 1, tensor_count=2**64 - 1),
    "key-of-2-to-the-63-bytes": Case({"model.gguf": b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63)}),
    "array-of-2-to-the-61-f64": one_gguf({"a": array(12, 2**61)}, []),
    "array-of-2-to-the-62-strings": one_gguf({"a": array(STRING, 2**62)}, []),
    "string-that-wraps-round": one_gguf({"a": array(STRING, 2, struct.pack("<QQ", 2**64 - 16, 0))}, []),
    "arrays-nested-1000-deep": one_gguf({"a": Typed(ARRAY, nest(1000))}, []),
    "arrays-65537-in-one": one_gguf({"a": array(ARRAY, 65537, nest(1) * 40)}, []),
    "shape-whose-product-wraps-to-0": one_gguf({}, [Tensor("a", (2**63, 2, 2), 0, b"")]),
    "shape-of-2-to-the-62-blocks": one_gguf({}, [Tensor("a", (2**57, 32), 2, bytes(18))]),
    "offset-of-2-to-the-64-less-32": one_gguf({}, [Tensor("a", (1,), 0, bytes(4), 2**64 - 32)]),
    "alignment-of-2-to-the-63": one_gguf({"general.alignment": Typed(U64, 2**63)}, [ONE]),
    "bool-of-2": one_gguf({"a": array(BOOL, 1, b"\2")}, []),
    "layers-4096-and-no-tensors": one_gguf(llama()[0] | {"llama.block_count": 4096}, [ONE]),
    "heads-of-2-to-the-31": one_gguf(
        llama()[0]
        | {
            "llama.attention.key_length": 2**31 - 2,
            "llama.attention.value_length": 2**31 - 2,
            "llama.rope.dimension_count": 2**31 - 2,
        },
        llama()[1][:2],
    ),
    "architecture-is-an-array": one_gguf({"general.architecture": ["llama"]}, []),
    "tokens-of-bytes": tokenizer(ggml__tokens=Typed(ARRAY, [1, 2, 3], U8)),
    "tokens-none": tokenizer(ggml__tokens=Typed(ARRAY, [], STRING)),
    "tokens-all-empty": tokenizer(ggml__tokens=["", "", ""]),
    "tokens-not-utf8": tokenizer(ggml__tokens=Typed(ARRAY, [b"\xff", b"\xed\xa0\x80"], STRING)),
    "token-of-3000-characters-twice": tokenizer(
        ggml__tokens=["x" * 3000] * 2, ggml__merges=Typed(ARRAY, [], STRING)
    ),
    "token-types-of-nested-arrays": tokenizer(ggml__token_type=array(ARRAY, 2, nest(1) * 2)),
    "merges-of-int8": tokenizer(ggml__merges=Typed(ARRAY, [-9] * 64, I8)),
    "merge-of-3000-characters": tokenizer(ggml__merges=["x" * 3000]),
    "merge-of-two-spaces": tokenizer(ggml__merges=["  "]),
    "kind-of-3000-characters": tokenizer(ggml__model="x" * 3000),
    "pre-tokenizer-of-3000-characters": tokenizer(ggml__pre="x" * 3000),
    "bos-of-2-to-the-64-less-1": tokenizer(ggml__bos_token_id=Typed(U64, 2**64 - 1)),
    "template-that-loops-for-ever": tokenizer(chat_template="{% for i in range(10**9) %}x{% endfor %}"),
    "template-of-2000-brackets": tokenizer(chat_template="{{ " + "(" * 2000),
    "scores-that-are-nan": spm(ggml__scores=Typed(ARRAY, [float("nan")] * 31, F32)),
    "scores-too-few": spm(ggml__scores=[0.0]),
    "byte-tokens-malformed": spm(
        ggml__tokens=["<0x>", "<0xGG>", "<0x100>", "<0x-1>"],
        ggml__scores=[0.0] * 4,
        ggml__token_type=Typed(ARRAY, [6] * 4, I32),
    ),
    "parts-65535-but-two-are-there": parts(split__count=Typed(U16, 65535)),
    "parts-with-a-negative-total": parts(split__tensors__count=Typed(I32, -1)),
    "part-missing": Case(dict([min(parts().files.items())])),
}


def header(text: bytes, length: int | None = None) -> Case:
    """A folder of a header alone, after its config."""
    raw = assemble(text, bytes(4), align=1)
    raw = raw if length is None else length.to_bytes(8, "little") + raw[8:]
    return Case({"config.json": CONFIG, "model.safetensors": raw})


def tensor(**fields: Any) -> Case:
    fields = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | fields
    return header(
        json.dumps({"model.norm.weight": {k: v for k, v in fields.items() if v is not None}}).encode()
    )


CONFIG = json.dumps({
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 21,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}).encode()  # fmt: skip


def config(text: bytes) -> Case:
    return Case({"config.json": text, "model.safetensors": assemble(b"{}", b"")})


def index(weight_map: Any) -> Case:
    text = json.dumps({"weight_map": weight_map}).encode()
    return Case({"config.json": CONFIG, "model.safetensors.index.json": text})


FOLDERS = {
    "header-of-2-to-the-63-bytes": header(b"{}", 2**63),
    "header-of-2-to-the-64-less-8-bytes": header(b"{}", 2**64 - 8),
    "header-longer-by-one": header(b"{}", 3),
    "header-empty": header(b""),
    "header-is-a-list": header(b"[]"),
    "header-nested-5000-deep": header(b'{"a":' * 5000),
    "header-with-an-integer-of-5000-digits": header(b'{"a":' + b"1" * 5000 + b"}"),
    "header-with-a-lone-surrogate": header(
        b'{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    ),
    "header-not-utf8": header(b'{"\xff": 1}'),
    "header-with-a-name-twice": header(
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},' * 2 + b'"b":1}'
    ),
    "metadata-is-a-number": header(b'{"__metadata__": 7}'),
    "shape-of-minus-1": tensor(shape=[-1]),
    "shape-whose-product-wraps-to-1": tensor(shape=[2**64 + 1]),
    "shape-of-300-dimensions": tensor(shape=[1] * 300),
    "shape-of-2-to-the-40-by-0": tensor(shape=[2**40, 0], data_offsets=[0, 0]),
    "shape-of-true": tensor(shape=[True]),
    "offsets-the-wrong-way-round": tensor(data_offsets=[4, 0]),
    "offsets-past-the-end": tensor(data_offsets=[2**62, 2**62 + 4]),
    "offsets-of-floats": tensor(data_offsets=[0.0, 4.0]),
    "offsets-of-400-digits": tensor(data_offsets=[0, 10**400]),
    "offsets-missing": tensor(data_offsets=None),
    "dtype-is-a-list": tensor(dtype=["F32"]),
    "config-nested-5000-deep": config(b"[" * 5000),
    "config-with-an-integer-of-5000-digits": config(CONFIG[:-1] + b', "head_dim": ' + b"1" * 5000 + b"}"),
    "config-with-infinite-theta": config(CONFIG[:-1] + b', "rope_theta": 1e999}'),
    "config-of-a-model-elsewhere": config(CONFIG.replace(b'"llama"', b'"../../llama"')),
    "config-is-a-list": config(b"[]"),
    "config-not-utf8": config(b'{"model_type": "\xff"}'),
    "config-of-a-lone-surrogate": config(CONFIG.replace(b'"llama"', b'"\\ud800"')),
    "index-that-leaves-the-folder": index({"model.norm.weight": "../../../../../etc/passwd"}),
    "index-of-a-device": index({"model.norm.weight": "/dev/zero"}),
    "index-of-the-folder": index({"model.norm.weight": "."}),
    "index-with-a-nul": index({"model.norm.weight": "a\0b"}),
    "index-with-a-lone-surrogate": index({"model.norm.weight": "\ud800.safetensors"}),
    "index-is-a-list": index([]),
}


def main() -> None:
    for name, case in GGUF.items():
        if list(case.files) == ["model.gguf"]:
            (CORPUS / "gguf").mkdir(parents=True, exist_ok=True)
            (CORPUS / "gguf" / f"{name}.gguf").write_bytes(case.files["model.gguf"])
        else:
            case.save(CORPUS / "gguf" / name)
    for name, case in FOLDERS.items():
        case.save(CORPUS / "folder" / name)


if __name__ == "__main__":
    main()
