"""The server's page in Chromium: fixtures and steps of its tests."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.server.process import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHAT = "**/v1/chat/completions"
DONE = ".assistant:last-child:not(.streaming) .stats"

Visit = Callable[..., Any]
"""Opens the page: see `visit`."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, server: ServerProcess) -> Iterator[Visit]:
    """visit(…) opens the page, ready, as somebody new would see it; keywords are Chromium's.

    It fails the test where the page asked another host for anything, or where an error was logged that the
    test does not expect: expected=pattern.
    """
    contexts: list[Any] = []
    outside: list[str] = []
    errors: list[str] = []

    def open_page(url: str = server.url, expected: str = "$^", ready: bool = True, **options: Any) -> Any:
        def log(text: str) -> None:
            if not re.search(expected, text):
                errors.append(text)

        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 820}, "accept_downloads": True, **options}
        )
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: log(message.text) if message.type == "error" else None)
        page.on("request", lambda request: outside.append(request.url))
        # Interception begins before there is anything to intercept: past a first route that is set later, one
        # request in some seventy still gets to the server.
        page.route("**/nowhere", lambda route: route.abort())
        if ready:
            page.goto(url + "/")
            page.wait_for_selector("#where[data-state=ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
    assert [
        url for url in outside if not url.startswith((server.url, "data:", "blob:", "http://127.0.0.1:"))
    ] == []


def send(page: Any, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def ask(page: Any, text: str) -> str:
    """Sends a message and waits for the whole answer."""
    send(page, text)
    page.wait_for_selector(DONE)
    return page.locator(".assistant .md").last.inner_text()


def settle(page: Any, **values: Any) -> None:
    """Fills in settings."""
    page.click("#settings-toggle")
    for name, value in values.items():
        page.fill(f"#f-{name}", str(value))
    page.keyboard.press("Escape")
    page.wait_for_selector("#settings", state="hidden")


def sent(page: Any) -> list[dict[str, Any]]:
    """The bodies of the page's requests for answers, from now on."""
    bodies: list[dict[str, Any]] = []
    page.on(
        "request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None
    )
    return bodies


def scripted(*events: object, end: str = "data: [DONE]\n\n") -> Callable[[Any], None]:
    """A handler that answers with these events instead of the server."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + end

    def answer(route: Any) -> None:
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    return answer


def piece(**delta: str) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


def failure(status: int, message: str) -> Callable[[Any], None]:
    return lambda route: route.fulfill(status=status, json={"error": {"message": message, "type": "error"}})
