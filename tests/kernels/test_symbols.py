"""Objects compiled for a higher ISA give the linker nothing that other code could end up calling.

An inline function that two objects share is kept once, whichever is met first. Compiled with AVX-512 and met
first, it would be an illegal instruction on every other machine. So each object of an ISA may define, beside
local symbols, nothing but the functions by which its kernel table is filled.
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
MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def isa_flags() -> dict[str, list[str]]:
    """Compiler options by ISA, out of CMakeLists.txt, without generator expressions."""
    calls = re.findall(r"^ *hexad_isa\((\w+)\s+([^()]*(?:\$<.*>)?[^()]*)\)", CMAKE, re.MULTILINE)
    return {name: [flag for flag in flags.split() if flag.startswith("-")] for name, flags in calls}


def tools(isa: str) -> tuple[str, str]:
    """g++ and nm for an ISA: this machine's own or a cross compiler; skips where there is none."""
    machine = "aarch64" if any(flag.startswith("-march=armv8") for flag in isa_flags()[isa]) else "x86_64"
    prefix = "" if machine == MACHINE else f"{machine}-linux-gnu-"
    compiler, nm = shutil.which(f"{prefix}g++"), shutil.which(f"{prefix}nm")
    if compiler is None or nm is None:
        pytest.skip(f"{prefix}g++ and {prefix}nm are needed")
    return compiler, nm


def isa_sources() -> list[str]:
    (sources,) = re.findall(r"add_library\(isa_\$\{NAME\} OBJECT ([^)]*)\)", CMAKE)
    return sources.split()


def test_what_is_checked() -> None:
    assert {"generic", "avx512vnni", "neon", "neoni8mm"} <= isa_flags().keys()
    assert {"-O3", "-mavx512vnni"} <= set(isa_flags()["avx512vnni"])
    assert {"-O3", "-march=armv8.2-a+dotprod"} <= set(isa_flags()["neon"])
    assert "-O2" in isa_flags()["generic"]
    assert "csrc/ops/linear.cpp" in isa_sources()


@pytest.mark.parametrize("isa", [name for name in isa_flags() if name != "generic"])
@pytest.mark.parametrize("source", isa_sources(), ids=lambda source: Path(source).stem)
def test_isa_objects_leak_nothing(source: str, isa: str, tmp_path: Path) -> None:
    compiler, nm = tools(isa)
    built = tmp_path / "object.o"
    subprocess.run(
        [
            # As CMake's Release build does: what stays a function of its own depends on inlining.
            compiler, "-O3", "-DNDEBUG", *isa_flags()[isa],
            "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-w",
            f"-DHEXAD_NAMESPACE={isa}", f'-DHEXAD_ISA_HEADER="simd/{isa}.h"', f"-I{ROOT / 'csrc'}",
            "-c", str(ROOT / source), "-o", str(built),
        ],
        check=True, timeout=120,
    )  # fmt: skip
    listing = subprocess.run([nm, "-C", str(built)], check=True, capture_output=True, text=True).stdout
    symbols = [line.split(maxsplit=2) for line in listing.splitlines() if line[:1] != " "]
    # Capitals are global, v, w and u are weak or unique; small letters are local.
    seen = {name for _, kind, name in symbols if kind.isupper() or kind in "vwu"}
    assert seen
    leaked = {name for name in seen if not re.fullmatch(rf"hexad::{isa}::fill_\w+\(hexad::Kernels&\)", name)}
    assert not leaked
