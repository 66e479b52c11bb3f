"""Who may import whom. Arrows point down only, and what a package does not list it does not need.

Every import counts: inside functions, under TYPE_CHECKING, and a module's name in a string ("hexad.llm"),
which is how imports are put off.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "hexad"

EVERYWHERE = {"errors", "checks", "config", "params", "outputs"}

# For each part of hexad what it may import: parts above it in this table, and other people's packages.
MAY_IMPORT = {
    "errors": "",
    "checks": "",
    "config": "errors checks",
    "params": "errors checks",
    "outputs": "",
    "_native": "",
    "weights": "numpy",
    "graph": "weights numpy",
    "models": "graph weights",
    "checkpoint": "weights _native numpy tokenizers jinja2 huggingface_hub",
    "placement": "_native",
    "backends": "graph weights placement _native numpy",
    "engine": "",
    "runner": "models backends checkpoint placement graph engine.step numpy llguidance",
    "loader": "_native engine runner checkpoint placement",
    "prompts": "checkpoint",
    "llm": "loader prompts engine checkpoint placement rich",
    "async_llm": "loader prompts engine checkpoint placement",
    "": "errors config params outputs llm async_llm",
    "server": "async_llm loader prompts engine checkpoint fastapi starlette uvicorn pydantic"
    " prometheus_client",
    "cli": "llm server engine checkpoint models graph placement backends runner typer rich matplotlib",
    "__main__": "cli",
}


def part_of(file: Path) -> str:
    """The part a file of hexad belongs to: its package or module right under hexad, "" for hexad itself."""
    return file.relative_to(SOURCE).with_suffix("").parts[0].removeprefix("__init__")


def imports_of(source: str, package: str) -> Iterator[tuple[int, str]]:
    """(line, module or module.name) for every import in the source of a module of `package`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"hexad(\.\w+)+", str(node.value)):
            yield node.lineno, str(node.value)


def is_allowed(part: str, name: str) -> bool:
    """Whether a part may import this module or name."""
    head, *rest = name.split(".")
    if head != "hexad":
        return head in sys.stdlib_module_names or head in MAY_IMPORT[part].split()
    if not rest or rest[0] == "__version__":
        return part in ("cli", "server")
    if rest[0] == part or (rest[0] in EVERYWHERE and part not in EVERYWHERE):
        return True
    return any(f"{name}.".startswith(f"hexad.{allowed}.") for allowed in MAY_IMPORT[part].split())


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_point_down(file: Path) -> None:
    part = part_of(file)
    package = ".".join(("hexad", *file.relative_to(SOURCE).parent.parts))
    found = imports_of(file.read_text(encoding="utf-8"), package)
    refused = [f"line {line}: {name}" for line, name in found if not is_allowed(part, name)]
    assert not refused, f"{part or 'hexad'} must not import what is not in its row of MAY_IMPORT"


def test_the_table_covers_the_source() -> None:
    assert {part_of(file) for file in FILES} == MAY_IMPORT.keys() - {"_native"}


def test_the_table_points_down() -> None:
    above: set[str] = set()
    for part, allowed in MAY_IMPORT.items():
        own = {name.split(".")[0] for name in allowed.split()} & MAY_IMPORT.keys()
        assert own <= above, f"{part} may import {own - above}, which stand below it"
        above.add(part)


def test_torch_is_nowhere() -> None:
    assert not [part for part, allowed in MAY_IMPORT.items() if "torch" in allowed.split()]


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("engine", "numpy"),
        ("engine", "hexad.runner.batch.make_batch"),
        ("graph", "hexad.backends"),
        ("runner", "hexad.engine.engine.Engine"),
        ("runner", "hexad.engine"),
        ("models", "hexad.checkpoint.names"),
        ("backends", "torch"),
        ("config", "hexad.params"),
        ("llm", "hexad"),
    ],
)
def test_refuses(part: str, name: str) -> None:
    assert not is_allowed(part, name)


def test_sees_every_spelling() -> None:
    source = """
import numpy as np
from hexad.graph import Graph
from ..backends import backend
if TYPE_CHECKING:
    import torch
def f():
    from hexad.llm import LLM
    import_module("hexad.cli")
"""
    assert {name for _, name in imports_of(source, "hexad.engine")} == {
        "numpy",
        "hexad.graph.Graph",
        "hexad.backends.backend",
        "torch",
        "hexad.llm.LLM",
        "hexad.cli",
    }
