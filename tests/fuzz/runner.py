"""Runs workers and gathers what they find; a worker that a case killed is started anew after that case."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORKER = "tests.fuzz.worker"


@dataclass(frozen=True)
class Finding:
    """A case that broke a rule. case: its number, or the path it is saved at."""

    case: int | str
    reason: str


def fuzz(
    kind: str, seed: int, *, count: int | None = None, seconds: float | None = None, processes: int = 1
) -> tuple[int, list[Finding]]:
    """How many cases of this kind were run, and the findings. Ends after `count` cases or `seconds`."""
    with (
        tempfile.TemporaryDirectory(prefix="hexad-fuzz-") as scratch,
        ThreadPoolExecutor(processes) as threads,
    ):
        jobs: list[dict[str, Any]] = [
            {"kind": kind, "seed": seed, "first": i, "step": processes, "count": count, "seconds": seconds,
             "scratch": f"{scratch}/{i}"}
            for i in range(processes)
        ]  # fmt: skip
        results = list(threads.map(_work, jobs))
    findings = [finding for _, found in results for finding in found]
    return sum(done for done, _ in results), sorted(findings, key=lambda finding: finding.case)


def replay(paths: Sequence[Path]) -> list[Finding]:
    """The findings among saved cases."""
    names = [str(path) for path in paths]
    _, findings = _work({"paths": names, "first": 0, "step": 1})
    return [Finding(names[int(finding.case)], finding.reason) for finding in findings]


def _work(job: dict[str, Any]) -> tuple[int, list[Finding]]:
    """Runs a job to its end, in as many processes as it takes."""
    end = None if job.get("seconds") is None else time.monotonic() + job["seconds"]
    done, findings = 0, []
    while True:
        at = None
        with (
            tempfile.TemporaryFile("w+") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", WORKER, json.dumps(job)],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True,
                env={**os.environ, "RUST_BACKTRACE": "0"},  # to resolve its symbols takes memory
            ) as worker,
        ):  # fmt: skip
            assert worker.stdout is not None
            for line in worker.stdout:
                event = json.loads(line)
                if "finding" in event:
                    findings.append(Finding(event["index"], event["finding"]))
                elif "at" in event:
                    at = event["at"]
                    done += 1
                else:
                    return done, findings
            worker.wait()
            stderr.seek(0)
            last_words = stderr.read()[-4000:]
        if at is None:
            raise RuntimeError(f"the worker did not begin (exit status {worker.returncode}): {last_words}")
        findings.append(Finding(at, f"killed the process (exit status {worker.returncode}): {last_words}"))
        job = job | {"first": at + job["step"]}
        if end is not None:
            if time.monotonic() > end:
                return done, findings
            job["seconds"] = end - time.monotonic()
