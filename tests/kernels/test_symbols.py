"""One binary for every x86-64 machine: what runs anywhere has no AVX in it, and no AVX gets into it.

An inline function that two objects share is kept once, whichever is met first. Compiled with AVX-512 and met
first, it would be an illegal instruction on every other machine. So each object of an ISA may define, beside
local symbols, nothing but the functions by which its kernel table is filled; and all other objects hold no
instruction that is encoded as AVX's are.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CMAKE = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
PYTHONS = ("csrc/bindings.cpp", "csrc/gguf_strings.cpp")
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def isa_flags() -> dict[str, list[str]]:
    """Compiler options by ISA, out of CMakeLists.txt, without generator expressions."""
    calls = re.findall(r"^ *hexad_isa\((\w+)\s+([^()]*(?:\$<.*>)?[^()]*)\)", CMAKE, re.MULTILINE)
    return {name: [flag for flag in flags.split() if flag.startswith("-")] for name, flags in calls}


def tool(name: str, isa: str | None) -> str:
    """g++, nm or objdump for an ISA: this machine's own or a cross compiler's; skips where there is none."""
    flags = () if isa is None else isa_flags()[isa]
    machine = "aarch64" if any(flag.startswith("-march=armv8") for flag in flags) else "x86_64"
    prefix = "" if machine == MACHINE or isa in (None, "generic") else f"{machine}-linux-gnu-"
    found = shutil.which(f"{prefix}{name}")
    if found is None:
        pytest.skip(f"{prefix}{name} is needed")
    return found


def isa_sources() -> list[str]:
    (sources,) = re.findall(r"add_library\(isa_\$\{NAME\} OBJECT ([^)]*)\)", CMAKE)
    return sources.split()


def core_sources() -> list[str]:
    """What is compiled once, without an ISA; all but what Python sees, whose headers are the build's."""
    (sources,) = re.findall(r"nanobind_add_module\(_native ([^)]*)\)", CMAKE)
    return [name for name in sources.split() if name.endswith(".cpp") and name not in PYTHONS]


def test_what_is_checked() -> None:
    assert {"generic", "avx2", "avx512", "avx512vnni", "neon", "neoni8mm"} <= isa_flags().keys()
    assert {"-O3", "-mavx2"} <= set(isa_flags()["avx2"])
    assert {"-O3", "-mavx512vnni"} <= set(isa_flags()["avx512vnni"])
    assert {"-O3", "-march=armv8.2-a+dotprod"} <= set(isa_flags()["neon"])
    assert "-O2" in isa_flags()["generic"]
    assert "csrc/ops/linear.cpp" in isa_sources()
    assert "csrc/sampler.cpp" in core_sources()


def compiled(source: str, isa: str | None, path: Path) -> Path:
    """The object of a source as CMake's Release build makes it: what stays a function of its own depends on
    inlining. isa None: outside all ISAs."""
    (everywhere,) = re.findall(r"^add_compile_options\((.*)\)", CMAKE, re.MULTILINE)
    options = [*everywhere.split(), "-w"]
    if isa is not None:
        options += [*isa_flags()[isa], f"-DHEXAD_NAMESPACE={isa}", f'-DHEXAD_ISA_HEADER="simd/{isa}.h"']
    built = path / "object.o"
    subprocess.run(
        [
            tool("g++", isa), "-O3", "-DNDEBUG", "-std=c++20", "-fPIC", "-fvisibility=hidden", *options,
            f"-I{ROOT / 'csrc'}", "-c", str(ROOT / source), "-o", str(built),
        ],
        check=True, timeout=120,
    )  # fmt: skip
    return built


@pytest.mark.parametrize("isa", [name for name in isa_flags() if name != "generic"])
@pytest.mark.parametrize("source", isa_sources(), ids=lambda source: Path(source).stem)
def test_isa_objects_leak_nothing(source: str, isa: str, tmp_path: Path) -> None:
    built = compiled(source, isa, tmp_path)
    listing = subprocess.run(
        [tool("nm", isa), "-C", str(built)], check=True, capture_output=True, text=True
    ).stdout
    symbols = [line.split(maxsplit=2) for line in listing.splitlines() if line[:1] != " "]
    # Capitals are global, v, w and u are weak or unique; small letters are local.
    seen = {name for _, kind, name in symbols if kind.isupper() or kind in "vwu"}
    assert seen
    leaked = {name for name in seen if not re.fullmatch(rf"hexad::{isa}::fill_\w+\(hexad::Kernels&\)", name)}
    assert not leaked


def vector_extensions(path: Path) -> list[str]:
    """Instructions with a VEX or EVEX prefix: all of AVX, FMA, F16C and AVX-512, and most of BMI."""
    listing = subprocess.run(
        [tool("objdump", None), "-d", "-w", str(path)], check=True, capture_output=True, text=True
    ).stdout
    instructions = re.findall(r"^ *[0-9a-f]+:\t([0-9a-f ]+)\t(.*)$", listing, re.MULTILINE)
    assert instructions
    # In 64-bit mode these bytes begin nothing else. Segment and address size prefixes may stand before them.
    return [
        text for code, text in instructions if re.match(r"(?:(?:26|2e|36|3e|64|65|67) )*(?:c4|c5|62) ", code)
    ]


@pytest.mark.skipif(MACHINE != "x86_64", reason="AVX is x86-64's")
@pytest.mark.parametrize(
    ("source", "isa"),
    [*((source, None) for source in core_sources()), *((source, "generic") for source in isa_sources())],
    ids=lambda value: Path(value).stem if value else "core",
)
def test_other_objects_run_anywhere(source: str, isa: str | None, tmp_path: Path) -> None:
    assert not vector_extensions(compiled(source, isa, tmp_path))


@pytest.mark.skipif(MACHINE != "x86_64", reason="AVX is x86-64's")
@pytest.mark.parametrize(
    ("isa", "typical"), [("avx2", "vpmaddubsw"), ("avx512", "zmm"), ("avx512vnni", "vpdpbusd")]
)
def test_vector_extensions_are_seen(isa: str, typical: str, tmp_path: Path) -> None:
    found = vector_extensions(compiled("csrc/ops/rows.cpp", isa, tmp_path))
    assert any(typical in text for text in found)
