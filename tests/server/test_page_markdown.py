"""The page's own Markdown, in Chromium."""

from __future__ import annotations

import random
import re

import pytest
from tests.server.browser import Visit

RENDER = """text => {
  const root = document.createElement("div");
  new hexad.Markdown(root).update(text, true);
  return root.innerHTML;
}"""
STREAM = """text => {
  const root = document.createElement("div"), view = new hexad.Markdown(root);
  for (let i = 0; i <= text.length; i++) view.update(text.slice(0, i));
  view.update(text, true);
  return root.innerHTML;
}"""
MEASURE = """text => {
  const root = document.createElement("div");
  new hexad.Markdown(root).update(text, true);
  let deepest = 0;
  const walk = (node, depth) => {
    deepest = Math.max(deepest, depth);
    for (const child of node.children) walk(child, depth + 1);
  };
  walk(root, 0);
  return [deepest, root.textContent.length];
}"""
GROW = """() => {
  const root = document.createElement("div"), view = new hexad.Markdown(root);
  const text = "# a\\n\\nfirst\\n\\n```\\ncode";
  view.update(text);
  const before = [...root.children], leaf = before[2].querySelector("code").firstChild;
  view.update(text + " grows\\nmore");
  view.update(text + " grows\\nmore\\n```\\n\\nlast\\n\\nx");
  return before.every((node, i) => node === root.children[i]) && root.contains(leaf) && leaf.data;
}"""


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("a *b **c*** d_e_f ~~g~~", "<p>a <em>b <strong>c</strong></em> d_e_f <del>g</del></p>"),
        ("***a** b* and **not closed", "<p><em><strong>a</strong> b</em> and **not closed</p>"),
        ("`` a`b `` \\*c\\*", "<p><code>a`b</code> *c*</p>"),
        ("# T #\n## U", "<h1>T</h1><h2>U</h2>"),
        ("T\n===\nU\n---", "<h1>T</h1><h2>U</h2>"),
        ("3. a\n4. b\n   - c\n\nd", '<ol start="3"><li>a</li><li>b<ul><li>c</li></ul></li></ol><p>d</p>'),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("> a\nb\n\nc", "<blockquote><p>a\nb</p></blockquote><p>c</p>"),
        ("a  \nb<br>c\n***", "<p>a  <br>b<br>c</p><hr>"),
        ("[ ] x [y] (z)", "<p>[ ] x [y] (z)</p>"),
    ],
)  # fmt: skip
def test_markdown(visit: Visit, source: str, html: str) -> None:
    assert visit().evaluate(RENDER, source) == html


def test_markdown_of_code_tables_and_links(visit: Visit) -> None:
    page = visit()
    table = page.evaluate(RENDER, "|a|b|c|\n|:-:|--:|---|\n|`x|y`|1\\|2|\n\nend")
    assert '<th class="center">a</th><th class="right">b</th><th>c</th>' in table
    assert '<td class="center"><code>x|y</code></td><td class="right">1|2</td><td></td>' in table
    assert table.endswith("<p>end</p>")
    code = page.evaluate(RENDER, "- x\n  ```python\n  def f(): # y\n      return '*a*'\n  ```\nz")
    assert re.sub("<[^>]+>", "", code) == "xpythonCopydef f(): # y\n    return '*a*'z", code
    assert page.evaluate(RENDER, "```\nopen").count("<figure>") == 1
    links = page.evaluate(
        RENDER, "See https://a.example/b_(c). Or [d *e*](http://f.example) <mailto:g@h.example>"
    )
    assert re.findall('href="([^"]*)"', links) == [
        "https://a.example/b_(c)", "http://f.example/", "mailto:g@h.example",
    ]  # fmt: skip


def test_markdown_that_streams_ends_as_if_it_came_at_once(visit: Visit) -> None:
    page = visit()
    pieces = [
        "\n",
        "\n",
        "\n\n",
        "  ",
        "    ",
        "- ",
        "1. ",
        ">",
        "#",
        "`",
        "```",
        "*",
        "**",
        "_",
        "a",
        "b c",
        "[",
    ]
    pieces += [
        "](http://a)",
        "=",
        "---",
        "\\",
        "~~",
        "<br>",
        "[ ] ",
        "x ",
        "y",
        "0",
        "|",
        "|---|---|",
        "|a|b|",
    ]
    chance = random.Random(5)
    for _ in range(400):
        source = "".join(chance.choice(pieces) for _ in range(chance.randrange(3, 40)))
        assert page.evaluate(STREAM, source) == page.evaluate(RENDER, source), repr(source)


def test_markdown_of_endless_marks(visit: Visit) -> None:
    """A model that repeats itself neither overflows a stack nor nests without bound."""
    page = visit()
    for marks in (
        "> ",
        "- ",
        "1. ",
        "[",
        "*a ",
        "**a",
        "_a ",
        "~~",
        "`",
        "|",
        "[a](",
        "![",
        "\\",
        "<br>",
        "- a\n  ",
    ):
        depth, length = page.evaluate(MEASURE, marks * 20_000)
        assert depth < 250, marks
        assert length > 0 or marks in ("> ", "- ", "1. ", "\\", "<br>"), marks


def test_settled_blocks_are_left_alone(visit: Visit) -> None:
    assert visit().evaluate(GROW) == "code grows\nmore"
