"""The page of `hexad serve`, in Chromium, against a server with a model.

Screenshots go to the folder that HEXAD_SCREENSHOTS names, or to pytest's own.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
from tests.server.browser import CHAT, DONE, Visit, ask, failure, piece, scripted, send, sent, settle
from tests.server.process import ServerProcess

expect = pytest.importorskip("playwright.sync_api", reason="playwright is not installed").expect

WATCH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const length = document.querySelector(".streaming .body > .md")?.textContent.length;
    if (length !== undefined && length !== lengths.at(-1)) lengths.push(length);
  }).observe(document.querySelector("#messages"), { childList: true, subtree: true, characterData: true });
}"""
FILL = """() => {
  for (let part = "x".repeat(1 << 20), i = 0; part; ) {
    try { localStorage.setItem("filler" + i++, part); } catch { part = part.slice(0, part.length / 2); }
  }
}"""
UNNAMED = """[...document.querySelectorAll("button, input, textarea, select")].filter(node =>
  !(node.getAttribute("aria-label") || node.textContent.trim() || node.labels?.length || node.hidden)
).map(node => node.outerHTML)"""
LIST = {"type": "array", "items": {"type": "integer"}, "minItems": 2000}
LONG = "Write a very long story about a lighthouse keeper and her brother."
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def shoot(page: Any, folder: Path, name: str) -> None:
    target = Path(os.environ.get("HEXAD_SCREENSHOTS") or folder)
    target.mkdir(parents=True, exist_ok=True)
    page.wait_for_timeout(300)  # what slides in has arrived
    page.screenshot(path=target / f"{name}.png")
    assert (target / f"{name}.png").stat().st_size > 10_000


# ── Talking ──────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_streams_and_outlives_a_reload(visit: Visit) -> None:
    page = visit()
    bodies = sent(page)
    settle(page, temperature="0", max_tokens="120")
    page.evaluate(WATCH)
    answer = ask(page, "Explain in a few sentences why the sky is blue.")
    lengths = page.evaluate("lengths")
    assert len(lengths) > 5
    assert lengths == sorted(lengths), "the text grows piece by piece"
    assert len(answer) > 80
    assert bodies[0]["messages"] == [
        {"role": "user", "content": "Explain in a few sentences why the sky is blue."}
    ]
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"], bodies[0]["stream"]) == (0, 120, True)
    assert "seed" not in bodies[0]
    stats = page.locator(".stats").inner_text()
    assert re.search(r"\d+ tokens.*[\d.]+ tok/s.*first token [\d.]+ s.*prompt \d+", stats, re.S), stats

    page.reload()
    expect(page.locator(".assistant .stats")).to_have_text(re.compile("tok/s"))
    assert page.locator(".assistant .md").last.inner_text() == answer
    assert page.locator(".user .body").inner_text() == "Explain in a few sentences why the sky is blue."
    assert page.locator("#f-temperature").input_value() == "0"
    ask(page, "And at sunset?")
    assert [m["role"] for m in bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert page.locator("#chats .open").all_inner_texts() == [
        "Explain in a few sentences why the sky is blue."
    ]


def test_a_long_answer_is_stopped_by_key_and_by_button(visit: Visit, server: ServerProcess) -> None:
    page = visit()
    settle(
        page,
        temperature="1",
        seed="3",
        schema=json.dumps({"type": "array", "items": {"type": "string"}, "minItems": 500}),
    )
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#send")):
        send(page, LONG)
        expect(page.locator(".streaming .body > .md")).to_have_text(re.compile(".{60}", re.S), timeout=30_000)
        assert page.locator("#send").get_attribute("aria-label") == "Stop"
        stop()
        page.wait_for_selector(".assistant:last-child:not(.streaming)")
        expect(page.locator(".assistant:last-child .stats")).to_contain_text("Stopped")
        before = page.locator(".assistant .md").last.inner_text()
        page.wait_for_timeout(400)
        assert page.locator(".assistant .md").last.inner_text() == before
        assert page.locator("#send").get_attribute("aria-label") == "Send"
    expect(page.locator("#live-running dd span")).to_have_text("0")
    assert server.metric("hexad:num_requests_running") == 0


def test_regenerating_and_editing_add_versions(visit: Visit) -> None:
    page = visit()
    bodies = sent(page)
    settle(page, temperature="1.2", max_tokens="24")
    first = ask(page, "Name a colour and say why.")
    page.click(".assistant [data-act=again]")
    expect(page.locator(".assistant .count")).to_have_text("2/2")
    page.wait_for_selector(DONE)
    assert bodies[1]["messages"] == bodies[0]["messages"]
    page.click(".assistant [data-act=previous]")
    expect(page.locator(".assistant .count")).to_have_text("1/2")
    assert page.locator(".assistant .md").last.inner_text() == first

    page.focus("#input")
    page.keyboard.press("ArrowUp")
    expect(page.locator(".edit textarea")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("#input")).to_be_focused()
    assert len(bodies) == 2
    page.keyboard.press("ArrowUp")
    page.fill(".edit textarea", "Name an animal.")
    page.keyboard.press("Enter")
    expect(page.locator(".user .count")).to_have_text("2/2")
    page.wait_for_selector(DONE)
    assert bodies[2]["messages"] == [{"role": "user", "content": "Name an animal."}]
    page.hover(".user")
    page.click(".user [data-act=previous]")
    assert page.locator(".user .body").inner_text() == "Name a colour and say why."
    assert page.locator(".assistant").count() == 1

    page.click(".assistant [data-act=delete]")  # the version shown; the other is there still
    expect(page.locator(".assistant .count")).to_have_count(0)
    page.click(".toast button")
    expect(page.locator(".assistant .count")).to_have_text(re.compile("./2"))
    page.reload()
    expect(page.locator(".assistant .count")).to_have_text(re.compile("./2"))


def test_a_system_prompt_and_a_schema_shape_the_answer(visit: Visit) -> None:
    page = visit()
    bodies = sent(page)
    page.click("#settings-toggle")
    page.fill("#f-schema", '{"type": "obj')
    expect(page.locator("#schema-note")).to_have_class(re.compile("bad"))
    page.fill("#input", "Describe a person.")
    page.focus("#input")
    page.keyboard.press("Enter")
    expect(page.locator("#f-schema")).to_be_focused()
    assert not bodies, "nothing is sent while the schema is not valid"
    page.fill("#f-schema", json.dumps(PERSON))
    expect(page.locator("#schema-note")).to_have_class(re.compile("good"))
    page.fill("#f-system", "You invent people.")
    page.fill("#f-top_p", "7")
    expect(page.locator("#f-top_p")).to_have_attribute("aria-invalid", "true")
    page.fill("#f-stop", "END\n\\n\\n")
    page.focus("#input")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE)
    assert bodies[0]["messages"][0] == {"role": "system", "content": "You invent people."}
    assert bodies[0]["response_format"]["json_schema"]["schema"] == PERSON
    assert bodies[0]["stop"] == ["END", "\n\n"]
    assert "top_p" not in bodies[0]
    assert json.loads(page.locator(".assistant code").inner_text()).keys() == {"name", "age"}
    assert page.locator("#chips").inner_text().split("\n") == ["System prompt", "JSON schema", "Stop strings"]


def test_two_conversations_are_answered_at_once(visit: Visit) -> None:
    page = visit()
    settle(page, schema=json.dumps(LIST))
    send(page, "First")
    first = page.locator(".streaming .body > .md")
    expect(first).to_have_text(re.compile(".{40}", re.S), timeout=30_000)
    page.keyboard.press("Control+k")
    expect(page.locator("#empty")).to_be_visible()
    send(page, "Second")
    expect(first).to_have_text(re.compile(".{40}", re.S), timeout=30_000)
    assert page.locator("#chats .busy").all_inner_texts() == ["Second", "First"]
    page.keyboard.press("Escape")
    expect(page.locator("#chats .busy")).to_have_text("First")
    page.click("#chats .busy")
    expect(first).not_to_have_text(first.text_content(), timeout=30_000)

    # Deleted while it is answered, it stays deleted.
    page.click("#chat-menu")
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.locator("#chats .open")).to_have_text("Second")
    page.reload()
    expect(page.locator("#chats .open")).to_have_text("Second")


def test_the_end_stays_in_sight_until_somebody_scrolls(visit: Visit) -> None:
    page = visit()
    settle(page, schema=json.dumps({**LIST, "items": {"type": "object"}}))
    below = "(() => { const s = document.querySelector('#scroll'); return s.scrollHeight - s.scrollTop - s.clientHeight; })()"  # noqa: E501
    page.route(CHAT, scripted(piece(content="line\n\n" * 100)))
    ask(page, "Long")
    page.unroute(CHAT)
    assert page.evaluate(below) < 2
    send(page, "Count")
    expect(page.locator(".streaming .body > .md")).to_have_text(re.compile(".{60}", re.S), timeout=30_000)
    assert page.evaluate(below) < 2
    page.hover("#scroll")
    page.mouse.wheel(0, -200)
    expect(page.locator("#jump")).to_be_visible()
    page.wait_for_timeout(300)
    assert page.evaluate(below) > 100
    page.click("#jump")
    assert page.evaluate(below) < 40


def test_behind_a_path(visit: Visit, server: ServerProcess) -> None:
    page = visit(ready=False)
    page.route(
        "**/team/llm/**", lambda route: route.continue_(url=route.request.url.replace("/team/llm", ""))
    )
    page.route("**/team/llm", lambda route: route.continue_(url=server.url + "/"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    for address in ("/team/llm/", "/team/llm"):
        page.goto(server.url + address)
        expect(page.locator("#where")).to_have_attribute("data-state", "ready")
    settle(page, max_tokens="3")
    ask(page, "Hello")
    assert all(url.startswith((server.url + "/team/llm", "data:")) for url in asked), asked


# ── When things go wrong ─────────────────────────────────────────────────────────────────────────


def test_an_error_of_the_server_is_shown_and_retried(visit: Visit) -> None:
    page = visit(expected="status of 400")
    settle(page, max_tokens="8", schema='{"type": "nonsense"}')
    send(page, "Say hello.")
    expect(page.locator(".fault")).to_contain_text("nonsense")
    settle(page, schema="")
    page.click(".fault button")
    page.wait_for_selector(DONE)
    assert page.locator(".fault").count() == 0
    assert page.locator(".assistant").count() == 1
    assert page.locator(".assistant .count").count() == 0, "the failure is no version"


def test_streams_that_fail_keep_what_came(visit: Visit) -> None:
    page = visit(expected="ERR_FAILED")
    page.route(CHAT, scripted(piece(content="Half a "), {"error": {"message": "The engine stopped."}}))
    send(page, "one")
    expect(page.locator(".fault")).to_contain_text("The engine stopped.")
    assert page.locator(".assistant .md").last.inner_text() == "Half a"
    page.unroute(CHAT)
    page.route(CHAT, scripted(piece(content="cut"), end=""))
    send(page, "two")
    expect(page.locator(".fault").last).to_contain_text("before the answer was complete")
    page.unroute(CHAT)
    page.route(CHAT, lambda route: route.abort())
    send(page, "three")
    expect(page.locator(".fault").last).to_contain_text("No connection")
    page.reload()
    assert page.locator(".fault").count() == 3


def test_a_message_waits_while_the_model_loads(visit: Visit) -> None:
    page = visit(expected="status of 503")
    page.route("**/health", failure(503, "The model is still loading."))
    page.route(CHAT, failure(503, "The model is still loading."))
    settle(page, max_tokens="5")
    send(page, "Say hello.")
    expect(page.locator(".streaming")).to_contain_text("The model is loading")
    expect(page.locator("#where")).to_have_attribute("data-state", "loading")
    page.unroute(CHAT)
    page.unroute("**/health")
    page.wait_for_selector(DONE)
    assert page.locator(".assistant .md").last.inner_text()
    expect(page.locator("#where")).to_have_attribute("data-state", "ready")


def test_a_key_is_asked_for_and_kept(visit: Visit) -> None:
    with ServerProcess("--api-key", "open sesame", "--max-model-len", "512") as locked:
        page = visit(expected="status of 401", ready=False)
        page.goto(locked.url + "/")
        box = page.locator("#key-box")
        expect(box).to_be_visible()
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-note")).to_contain_text("not accepted")
        expect(box).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#where")).to_have_attribute("data-state", "locked")
        page.click("#state")
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#where")).to_have_attribute("data-state", "ready")
        settle(page, max_tokens="4")
        assert ask(page, "Hello")
        page.reload()
        expect(page.locator("#where")).to_have_attribute("data-state", "ready")
        expect(box).to_be_hidden()
        with page.expect_download() as download:
            page.click("[data-do=export-all]")
        assert "sesame" not in Path(download.value.path()).read_text()


def test_full_storage_is_said(visit: Visit) -> None:
    page = visit()
    page.evaluate(FILL)
    page.route(CHAT, scripted(piece(content="An answer.")))
    send(page, "Will this be kept?")
    expect(page.locator("#banner")).to_contain_text("storage is full")
    assert page.locator(".assistant .md").last.inner_text() == "An answer."


# ── What is kept ─────────────────────────────────────────────────────────────────────────────────


def test_conversations_are_exported_deleted_and_imported(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    page.route(CHAT, scripted(piece(reasoning_content="Hm. "), piece(content="# An *answer*")))
    settle(page, system="Be brief.", temperature="0.5")
    ask(page, "First question")
    page.keyboard.press("Control+k")
    ask(page, "Second question")
    assert page.locator("#chats .open").all_inner_texts() == ["Second question", "First question"]

    def item(name: str) -> None:
        page.click("#chat-menu")
        page.get_by_role("menuitem", name=name).click()

    with page.expect_download() as download:
        item("Export Markdown")
    assert download.value.suggested_filename == "second-question.md"
    text = Path(download.value.path()).read_text()
    assert "## System\n\nBe brief.\n\n## You\n\nSecond question\n\n" in text
    assert "# An *answer*" in text
    with page.expect_download() as download:
        page.click("[data-do=export-all]")
    saved = tmp_path / "all.json"
    download.value.save_as(saved)
    assert len(json.loads(saved.read_text())["conversations"]) == 2

    item("Delete")
    expect(page.locator("#chats .open")).to_have_count(1)
    page.click(".toast button")
    expect(page.locator("#chats .open")).to_have_count(2)
    item("Delete")
    page.click("#chats .open")
    item("Delete")
    expect(page.locator("#chats .open")).to_have_count(0)
    page.reload()
    expect(page.locator("#chats .open")).to_have_count(0)

    page.set_input_files("#file", saved)
    expect(page.locator("#chats .open")).to_have_count(2)
    page.click("#chats .open >> text=First question")
    assert page.locator(".assistant h1").inner_text() == "An answer"
    assert page.locator(".think").inner_text().startswith("Thought")
    assert page.locator("#f-system").input_value() == "Be brief."
    page.fill("#search", "second")
    expect(page.locator("#chats .open")).to_have_count(1)
    broken = tmp_path / "broken.json"
    broken.write_text('{"conversations": [{"messages": "none"}, null, 3]}')
    page.set_input_files("#file", broken)
    expect(page.locator("#banner")).to_contain_text("no conversations in it")


def test_two_tabs_keep_each_others_conversations(visit: Visit) -> None:
    one = visit()
    two = one.context.new_page()
    two.goto(one.url)
    for page in (one, two):
        page.route(CHAT, scripted(piece(content="Yes.")))
    ask(one, "From the first tab")
    expect(two.locator("#chats .open")).to_have_text("From the first tab")
    ask(two, "From the second tab")
    expect(one.locator("#chats .open")).to_have_count(2)


# ── Text that comes from a model ─────────────────────────────────────────────────────────────────

HOSTILE = """<script>pwned = 1</script><img src=x onerror="pwned = 1"> <b>bold</b>
[a](javascript:pwned=1) [b](JaVaScRiPt:pwned=1) [c](data:text/html,<script>pwned=1</script>)
<javascript:pwned=1>
![i](http://outside.example/beacon.png) [d]( https://e.example/"onmouseover="pwned=1 )
<https://f.example/"onclick=x>

```"><img src=x onerror=pwned=1>
</code></pre><script>pwned = 1</script>
```
| <svg onload=pwned=1> | `</td><script>pwned=1</script>` |
|---|---|
| <iframe src="javascript:pwned=1"> | x |
"""


def test_hostile_text_stays_text(visit: Visit, tmp_path: Path) -> None:
    page = visit()
    page.route(
        CHAT,
        scripted(
            *(
                piece(content=HOSTILE[i : i + 3], reasoning_content="<img src=x onerror=pwned=1>")
                for i in range(0, len(HOSTILE), 3)
            )
        ),
    )
    ask(page, HOSTILE)
    image = "<img src=x onerror=pwned=1>"
    answer = {"id": "2", "role": "assistant", "parent": "__proto__", "content": HOSTILE}
    answer |= {"error": {"title": HOSTILE, "text": HOSTILE}, "stats": {"tokens": HOSTILE, "thought": image}}
    bad = {
        "id": image,
        "title": HOSTILE,
        "messages": [{"id": '"><script>pwned=1</script>', "role": "user", "content": HOSTILE}, answer],
        "settings": {"model": HOSTILE, "temperature": "<b>"},
    }
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    page.set_input_files("#file", tmp_path / "bad.json")
    expect(page.locator("#chats .open")).to_have_count(2)
    for chat in page.locator("#chats .open").all():
        chat.click()
        page.wait_for_timeout(100)
        main = page.locator("#app")
        assert main.locator("script, img, iframe, [onerror], [onclick], [onmouseover], [onload]").count() == 0
        assert {link.get_attribute("rel") for link in page.locator(".md a").all()} == {
            "noopener noreferrer nofollow"
        }
        for link in page.locator(".md a").all():
            assert re.match("https?://", link.get_attribute("href"))
        assert "<script>pwned = 1</script>" in page.locator(".assistant").last.inner_text()
    assert page.evaluate("typeof pwned") == "undefined"


# ── How it looks and feels ───────────────────────────────────────────────────────────────────────

SHOWN = """A **hash map** finds a key in *constant* time.

## How it works

1. Hash the key: `h = hash(key)`
2. Walk the bucket:
   - compare, and stop when equal

```python
def get(self, key, default=None):  # one bucket only
    return dict(self.buckets[hash(key) % 64]).get(key, default)
```

| Operation | Average | Worst |
|---|:-:|--:|
| lookup | O(1) | O(n) |

> A seeded hash makes the worst case unlikely.
"""


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("light", {"color_scheme": "light"}),
        ("dark", {"color_scheme": "dark"}),
        ("phone", {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True}),
    ],
)
def test_screenshots(visit: Visit, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    page = visit(**options)
    shoot(page, tmp_path, f"{name}-empty")
    page.fill("#input", "Tell me about the sea.")
    page.click("#send")  # Enter starts a line where there is no keyboard
    page.wait_for_selector(".streaming .md p")
    shoot(page, tmp_path, f"{name}-streaming")
    page.wait_for_timeout(1500)
    page.keyboard.press("Escape")
    page.wait_for_selector(".assistant:last-child:not(.streaming)")
    usage = {"prompt_tokens": 812, "completion_tokens": 143, "prompt_tokens_details": {"cached_tokens": 640}}
    page.route(
        CHAT,
        scripted(
            piece(reasoning_content="Let me think."), piece(content=SHOWN), {"choices": [], "usage": usage}
        ),
    )
    page.fill("#input", "How does a hash map work?")
    page.click("#send")
    page.wait_for_selector(f"{DONE} >> text=143")
    shoot(page, tmp_path, f"{name}-answer")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    red = int(re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[0])
    assert red < 60 if name == "dark" else red > 240
    page.click("#settings-toggle")
    shoot(page, tmp_path, f"{name}-settings")
    page.keyboard.press("Escape")
    if name == "phone":
        expect(page.locator("#sidebar")).to_be_hidden()
        page.click("#nav-open")
        shoot(page, tmp_path, "phone-conversations")
        page.click("#chats .open")
        expect(page.locator("#sidebar")).to_be_hidden()


def test_themes_are_chosen_and_kept(visit: Visit) -> None:
    page = visit(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("#theme")
    light = page.evaluate(ground)
    assert light != dark
    page.reload()
    assert page.evaluate(ground) == light
    page.click("#theme")
    assert page.evaluate(ground) == dark


def test_everything_by_keyboard(visit: Visit) -> None:
    page = visit()
    expect(page.locator("#input")).to_be_focused()
    press, write = page.keyboard.press, page.keyboard.type
    write("Line one")
    press("Shift+Enter")
    write("line two")
    page.route(CHAT, scripted(piece(content="Good.")))
    press("Enter")
    page.wait_for_selector(DONE)
    assert page.locator(".user .body").inner_text() == "Line one\nline two"
    expect(page.locator("#input")).to_be_focused()
    press("Control+k")
    expect(page.locator("#empty")).to_be_visible()
    press("Shift+Tab")  # out of the box, where letters are commands
    press("?")
    expect(page.locator("#help")).to_be_visible()
    press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    press("s")
    expect(page.locator("#f-system")).to_be_focused()
    press("Escape")
    expect(page.locator("#settings-toggle")).to_be_focused()
    press("l")
    expect(page.locator("#live")).to_be_hidden()
    press("c")
    expect(page.locator("#sidebar")).to_be_hidden()
    press("c")
    page.locator("#chats .open").focus()
    press("Enter")
    expect(page.locator(".user")).to_have_count(1)
    expect(page.locator("#input")).to_be_focused()
    assert page.evaluate(UNNAMED) == [], "everything has a name that is read out"


def test_the_live_panel_shows_what_the_server_does(visit: Visit) -> None:
    page = visit()
    asked: list[str] = []
    page.on(
        "request", lambda request: asked.append(request.url) if request.url.endswith("/metrics") else None
    )
    settle(page, schema=json.dumps(LIST))
    send(page, "Count.")
    running = page.locator("#live-running dd span")
    expect(running).to_have_text("1", timeout=15_000)
    for figure in ("out", "kv"):
        expect(page.locator(f"#live-{figure} dd span")).not_to_have_text(
            re.compile("^(–|0)$"), timeout=15_000
        )
    page.keyboard.press("Escape")
    expect(running).to_have_text("0", timeout=15_000)
    page.click("#live-toggle")
    asked.clear()
    page.wait_for_timeout(2500)
    assert not asked, "nobody looks, nobody asks"
