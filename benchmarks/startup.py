"""How light hexad is: seconds to import it and to the first token of a fresh process, and megabytes on disk.

    scripts/bench startup [--slack FACTOR]

The model is fetched first if it is not cached. Each time is the best of RUNS fresh processes: what users see
from the second start on. The exit status is 1 if a figure exceeds its bound; --slack widens the bounds of the
times, for machines that are busy with other things.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from benchmarks.report import table, write

RUNS = 5
HEXAD = str(Path(sysconfig.get_path("scripts")) / "hexad")
IMPORT = "import time; begin = time.perf_counter(); import hexad; print(time.perf_counter() - begin)"
PROMPT = "What is the capital of France?"
BOUNDS = {"import hexad, s": 0.3, "process start to first token, s": 1.0, "environment, MB": 300.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slack", type=float, default=1.0, metavar="FACTOR")
    options = parser.parse_args()
    subprocess.run([HEXAD, "pull"], check=True, stdout=subprocess.DEVNULL)
    figures = {
        "import hexad, s": min(_import_seconds() for _ in range(RUNS)),
        "process start to first token, s": min(
            first_token_seconds("--max-tokens", "2", PROMPT) for _ in range(RUNS)
        ),
        "environment, MB": _environment_bytes() / 1e6,
    }
    bounds = [bound * options.slack if name.endswith(" s") else bound for name, bound in BOUNDS.items()]
    print(table(["", "measured", "bound"], [[name, value, BOUNDS[name]] for name, value in figures.items()]))
    print(f"\nwritten to {write('startup', {'runs': RUNS, 'prompt': PROMPT}, figures)}")
    over = [
        f"{name}: {value:.3g} is over the bound of {bound:.3g}"
        for (name, value), bound in zip(figures.items(), bounds, strict=True)
        if value > bound
    ]
    sys.exit("\n".join(over) or 0)


def _import_seconds() -> float:
    done = subprocess.run([sys.executable, "-c", IMPORT], check=True, capture_output=True, text=True)
    return float(done.stdout)


def first_token_seconds(*arguments: str) -> float:
    """`hexad run`: from before the process exists until the first byte of the answer can be read."""
    begin = time.perf_counter()
    command = [HEXAD, "run", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        seconds = time.perf_counter() - begin
        process.stdout.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit status {process.returncode}.")
    return seconds


def _environment_bytes() -> int:
    """Bytes of the installed packages, hexad and everything it brought along."""
    packages = Path(sysconfig.get_path("purelib"))
    return sum(file.lstat().st_size for file in packages.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()
