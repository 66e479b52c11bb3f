"""hexad is light: quick to import, and complete without torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import hexad

IMPORT = "import time; begin = time.perf_counter(); import hexad; print(time.perf_counter() - begin)"


def fresh(code: str) -> str:
    """What a fresh interpreter prints."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_takes_at_most_three_tenths_of_a_second() -> None:
    assert min(float(fresh(IMPORT)) for _ in range(5)) <= 0.3


def test_every_module_can_do_without_torch() -> None:
    modules = [module.name for module in pkgutil.walk_packages(hexad.__path__, "hexad.")]
    assert "hexad.llm" in modules
    imports = "".join(f"import {name}\n" for name in modules if not name.endswith("__main__"))
    fresh(f"import sys; sys.modules['torch'] = None\n{imports}")
