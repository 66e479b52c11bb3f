"""The public list, and that importing it costs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import hexad


def test_every_public_name_is_there() -> None:
    assert set(dir(hexad)) >= set(hexad.__all__)
    for name in hexad.__all__:
        assert getattr(hexad, name) is not None
    assert hexad.LLM.__module__ == "hexad.llm"
    assert hexad.errors.PromptError.__module__ == "hexad.errors"
    assert hexad.__version__[0].isdigit()


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'hexad' has no attribute 'LMM'"):
        hexad.LMM  # noqa: B018


def imported_by(code: str) -> set[str]:
    """Modules a fresh interpreter has after running `code`."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def test_importing_hexad_imports_nothing_heavy() -> None:
    modules = imported_by("import hexad")
    assert not {m for m in modules if m.startswith("hexad.")}
    assert not modules & {"numpy", "torch", "tokenizers", "rich", "typer"}


def test_importing_the_llm_brings_no_torch_and_no_front_end() -> None:
    modules = imported_by("from hexad import LLM, SamplingParams")
    assert not modules & {"torch", "transformers", "tokenizers", "huggingface_hub", "rich", "typer", "numpy"}


def test_the_engine_is_plain_python() -> None:
    modules = imported_by("import hexad.engine.engine")
    engine = (
        "beam", "block_manager", "detokenizer", "engine", "metrics", "pace", "request", "scheduler", "step",
    )  # fmt: skip
    expected = {
        "checks",
        "config",
        "errors",
        "outputs",
        "params",
        "engine",
        *(f"engine.{name}" for name in engine),
    }
    assert {m for m in modules if m.startswith("hexad.")} == {f"hexad.{name}" for name in expected}
    assert "numpy" not in modules
