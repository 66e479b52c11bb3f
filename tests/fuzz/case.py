"""One input of the fuzzer: files, and which of them is opened."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random


@dataclass(frozen=True)
class Case:
    """files: contents by name. opened: the file that a user would give; "" for the folder they lie in."""

    files: dict[str, bytes]
    opened: str = ""

    def save(self, folder: Path) -> Path:
        """Writes the files as all that is in this folder; returns what to open."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name, raw in self.files.items():
            (folder / name).write_bytes(raw)
        return folder / self.opened


def opened(path: Path) -> Path:
    """What to open of a saved case: a GGUF file, the first of several, or a folder."""
    ggufs = sorted(path.glob("*.gguf")) if path.is_dir() else []
    return ggufs[0] if ggufs else path


def make(kind: str, seed: int, index: int) -> Case:
    """The case of this number: always the same one. kind: of KINDS."""
    return KINDS[kind](Random(f"{kind} {seed} {index}"))


def valid(kind: str) -> list[Case]:
    """Cases without a fault, one of each shape that the kind's mutations begin from."""
    return SEEDS[kind]()


def _kinds() -> tuple[dict[str, Callable[[Random], Case]], dict[str, Callable[[], list[Case]]]]:
    from tests.fuzz import gguf_cases, hf_cases

    mutated = {
        "gguf": gguf_cases.mutated,
        "safetensors": hf_cases.mutated_safetensors,
        "folder": hf_cases.mutated_folder,
    }
    seeds = {"gguf": gguf_cases.seeds, "safetensors": hf_cases.seeds, "folder": hf_cases.seeds}
    return mutated, seeds


KINDS, SEEDS = _kinds()
