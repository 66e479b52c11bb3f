"""A tiny model that LLM opens by the name "tiny", and a store of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.character_tokenizer import VOCAB, CharacterTokenizer
from tests.tiny_models import tiny_llama

from hexad import LLM
from hexad.checkpoint.checkpoint import Checkpoint


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
    """LLM("tiny") opens a fresh checkpoint of a tiny model; all those opened are listed."""
    opened: list[Checkpoint] = []

    def open_checkpoint(path: Path) -> Checkpoint:
        model = tiny_llama(vocab=VOCAB, context=256)
        tokenizer: Any = CharacterTokenizer()
        opened.append(Checkpoint(path, model.config, model.weights, lambda: tokenizer, lambda: None))
        return opened[-1]

    monkeypatch.setattr("hexad.checkpoint.store.resolve", Path)
    monkeypatch.setattr("hexad.checkpoint.open.open_checkpoint", open_checkpoint)
    return opened


@pytest.fixture
def llm(checkpoints: list[Checkpoint]) -> Iterator[LLM]:
    with LLM("tiny", backend="reference", max_num_seqs=4, max_num_batched_tokens=48, seed=0) as llm:
        yield llm
        assert not llm.engine.has_unfinished
        assert llm.engine.blocks.num_allocated == 0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model store that nobody has used."""
    folder = tmp_path / "home"
    monkeypatch.setenv("HEXAD_HOME", str(folder))
    return folder
