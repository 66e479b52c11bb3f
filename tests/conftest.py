"""Fixtures for every test."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct Q4_1, out of the user's own store; downloaded there if need be."""
    from hexad.checkpoint.store import resolve

    return resolve("smollm2:135m")
