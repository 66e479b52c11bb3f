"""/docs in Chromium: it shows what /openapi.json says, and asks nobody else for anything."""

from __future__ import annotations

import json
from typing import Any

from tests.server.process import ServerProcess


def test_the_page_of_the_api(server: ServerProcess, browser: Any) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 800})
    page, asked, errors = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.url + "/docs")
    page.wait_for_selector("details")
    paths = json.loads(server.get("/openapi.json")[1])["paths"]
    assert page.locator("details").count() == sum(map(len, paths.values()))

    page.get_by_label("Filter paths").fill("/v1/comp")
    (shown,) = page.locator("details:visible").all()
    shown.locator("summary").click()
    shown.get_by_text("max_tokens").first.wait_for()  # what is opened is drawn then
    text = shown.inner_text()
    for expected in ("POST", "max_tokens", "prompt (required)", "string | [string] | [integer]", "429"):
        assert expected in text
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(url.startswith(server.url) for url in asked)
    assert not [error for error in errors if "favicon" not in error]
    context.close()
