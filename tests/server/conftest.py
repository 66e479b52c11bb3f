"""One server for all tests that only talk to it."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from tests.server.browser import browser as browser
from tests.server.browser import visit as visit
from tests.server.process import ServerProcess

from hexad import LLM

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="session")
def strict_server() -> Iterator[ServerProcess]:
    """One that wants KEY, takes one sequence at a time for 3 seconds at most, keeps two responses, and reads
    <think> sections."""
    limits = ("--max-num-seqs", "1", "--max-waiting", "0", "--request-timeout", "3")
    with ServerProcess(
        "--api-key", KEY, *limits, "--max-stored-responses", "2", "--reasoning-parser", "think"
    ) as process:
        yield process


@pytest.fixture(scope="session")
def server() -> Iterator[ServerProcess]:
    """`hexad serve smollm2:135m`, ready."""
    with ServerProcess() as process:
        yield process


@pytest.fixture(scope="session")
def llm() -> Iterator[LLM]:
    """The same model without a server."""
    model = LLM("smollm2:135m", max_model_len=1024, threads=1)
    yield model
    model.close()


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's client of `server`."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def strict_client(strict_server: ServerProcess) -> Iterator[openai.OpenAI]:
    """OpenAI's client of `strict_server`, with its key."""
    with openai.OpenAI(base_url=f"{strict_server.url}/v1", api_key=KEY, max_retries=0) as client:
        yield client
