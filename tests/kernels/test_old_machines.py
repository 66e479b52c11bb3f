"""The binary runs on older x86-64 machines, on the best kernels they have, and answers as these do here.

The machines are emulated by qemu's user mode, which raises an illegal instruction where the CPU it plays
would. Debian and Ubuntu have it as `qemu-user` or `qemu-user-static`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

QEMU = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")

pytestmark = [
    pytest.mark.skipif(QEMU is None, reason="neither qemu-x86_64 nor qemu-x86_64-static is on PATH"),
    pytest.mark.skipif(
        sys.platform != "linux" or platform.machine() != "x86_64",
        reason="qemu's user mode runs this machine's own binaries",
    ),
]

ISAS = "from hexad import _native; print(_native.isa(), *_native.isas())"

ANSWER = """
import json, sys
from hexad import LLM, SamplingParams

with LLM(sys.argv[1], max_model_len=64) as llm:
    greedy = SamplingParams(temperature=0, max_tokens=4)
    (output,) = llm.generate("The capital of France is", greedy, use_tqdm=False)
print(json.dumps([output.outputs[0].token_ids, output.outputs[0].text]))
"""


def run(*arguments: str, cpu: str | None = None, isa: str | None = None) -> str:
    """What a fresh interpreter prints, on an emulated CPU or with the kernels of `isa`."""
    # OpenBLAS may be told in the environment which of its kernels to use; NumPy would crash on other CPUs.
    chosen = ("HEXAD_ISA", "OPENBLAS_CORETYPE")
    env = {name: value for name, value in os.environ.items() if name not in chosen}
    if isa is not None:
        env["HEXAD_ISA"] = isa
    emulator = [] if cpu is None else [str(QEMU), "-cpu", cpu]
    done = subprocess.run(
        [*emulator, sys.executable, "-c", *arguments],
        env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if "CPUID.07H:EBX.avx2" in done.stderr:  # "TCG doesn't support requested feature"
        pytest.skip("this version of qemu does not emulate AVX2; 7.2 does")
    return done.stdout


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        ("Nehalem", ["generic"]),  # x86-64-v2, and nothing more
        ("SandyBridge", ["generic"]),  # AVX
        ("Haswell", ["avx2", "generic"]),
        ("Haswell,-fma", ["generic"]),
        ("Haswell,-f16c", ["generic"]),
        ("Haswell,-xsave", ["generic"]),  # the system does not save the registers
    ],
)
def test_best_kernels_are_chosen(cpu: str, expected: list[str]) -> None:
    best, *supported = run(ISAS, cpu=cpu).split()
    assert supported == expected
    assert best == expected[0]


@pytest.mark.parametrize(("cpu", "isa"), [("Nehalem", "generic"), ("Haswell", "avx2")])
def test_answers(cpu: str, isa: str, smollm2_path: Path) -> None:
    """Token for token, through the whole of hexad; the machine's own choice against that ISA forced here."""
    if isa not in run(ISAS).split():
        pytest.skip(f"this machine has no {isa} to compare with")
    ids, text = json.loads(run(ANSWER, str(smollm2_path), cpu=cpu))
    assert [ids, text] == json.loads(run(ANSWER, str(smollm2_path), isa=isa))
    assert "Paris" in text
