"""What the pages say is so: their programs and the examples run, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hexad.errors
from hexad.errors import HexadError

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def run_python(*arguments: str) -> str:
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_examples_run(example: Path, smollm2_path: Path) -> None:
    assert run_python(str(example), str(smollm2_path)).strip()


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_programs_on_pages_run(page: str, smollm2_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert programs
    for program in programs:
        assert run_python("-c", program).strip()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    files = re.findall(r"`((?:src|csrc|tests|docs|scripts|benchmarks|examples)/[\w./-]+)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [file for file in files if not (ROOT / file).exists()]
    assert not missing


def test_the_error_tree_is_drawn_as_it_is() -> None:
    drawing = hexad.errors.__doc__ or ""
    depth_of = {
        match[2]: len(match[1]) // 4 for match in re.finditer(r"^    ([│├└─ ]*)(\w+)", drawing, re.MULTILINE)
    }
    errors = [value for value in vars(hexad.errors).values() if isinstance(value, type)]
    assert {error.__name__ for error in errors} == depth_of.keys()
    for error in errors:
        ancestors = [base for base in error.__mro__[1:] if issubclass(base, HexadError)]
        assert depth_of[error.__name__] == len(ancestors), error.__name__


def test_the_changelog_has_a_place_for_what_comes() -> None:
    assert "\n## Unreleased" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
