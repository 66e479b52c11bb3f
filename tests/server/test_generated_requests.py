"""Requests generated from the OpenAPI document, right ones and wrong ones: none is answered with a 5xx."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.server.process import ServerProcess

LEAST = 2000


def test_no_generated_request_is_answered_with_a_5xx(tmp_path: Path) -> None:
    with ServerProcess("--max-model-len", "128", "--log-level", "warning") as server:
        run = subprocess.run(
            [
                sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json",
                "--checks", "not_a_server_error", "--continue-on-failure", "--workers", "1",
                "--max-examples", "30", "--seed", "1", "--request-timeout", "60",
                "--suppress-health-check", "all", "--warnings", "off",
                "--report", "json", "--report-json-path", str(tmp_path / "report.json"),
            ],
            capture_output=True, text=True, timeout=600, cwd=tmp_path,
        )  # fmt: skip
        assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
        report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
        assert report["test_cases"]["generated"] >= LEAST

        # What was asked for has come to its end, or was ended with its connection.
        deadline = time.monotonic() + 10
        while server.metric("hexad:num_requests_running") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert server.metric("hexad:num_requests_running") == 0
        assert server.metric("hexad:num_requests_waiting") == 0
        assert server.metric("hexad:kv_cache_usage_perc") == 0
        assert server.get("/health")[0] == 200
        assert "Traceback" not in server.output
        assert server.terminate() == 0
