"""One server for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.server.browser import browser as browser
from tests.server.browser import visit as visit
from tests.server.process import ServerProcess


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """`hexad serve smollm2:135m`, ready."""
    with ServerProcess() as process:
        yield process
