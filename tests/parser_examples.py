"""Texts as models write them, and what they come to."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from hexad.server.parsers.reasoning import MAGISTRAL, THINK, ReasoningFormat

TOOLS = ["f", "get_weather", "naïve_工具"]

NESTED = (
    '{"a": {"b": [1, {"c": "}]\\"{["}], "d": null}, "é": "日本 🦊 \\\\", "e": -1.5e3, "f": "\\ud83e\\udd8a"}'
)


class Example(NamedTuple):
    """calls: names and arguments."""

    format: str | None
    text: str
    content: str = ""
    calls: list[tuple[str, str]] = []  # noqa: RUF012
    reasoning: str = ""
    started: bool = False
    thinks: ReasoningFormat | None = None
    special: tuple[str, ...] = ()


def same(format: str | None, text: str, **more: Any) -> Example:
    """A text that is content, all of it."""
    return Example(format, text, text, **more)


def hermes(call: str) -> str:
    return f"<tool_call>\n{call}\n</tool_call>"


WEATHER = '{"name": "get_weather", "arguments": {"city": "Zürich"}}'
F_NESTED = f'{{"name": "f", "arguments": {NESTED}}}'
F_STRING = f'{{"name": "f", "arguments": {json.dumps(NESTED)}}}'
ZURICH = ("get_weather", '{"city": "Zürich"}')

EXAMPLES = {
    "plain": same(None, "<tool_call> <think>x</think>"),
    "empty": Example("hermes", ""),
    "hermes": Example("hermes", hermes(WEATHER), calls=[ZURICH]),
    "hermes, content before": Example(
        "hermes", "Let me look.\n\n" + hermes(WEATHER) + "\n", "Let me look.", [ZURICH]
    ),
    "hermes, content around": Example("hermes", "A " + hermes(WEATHER) + " B\n", "AB\n", [ZURICH]),
    "hermes, several": Example(
        "hermes",
        "\n".join([hermes(WEATHER), hermes('{"name": "f", "arguments": {}}'), hermes(WEATHER)]),
        calls=[ZURICH, ("f", "{}"), ZURICH],
    ),
    "hermes, nested": Example("hermes", hermes(F_NESTED), calls=[("f", NESTED)]),
    "hermes, no layout": Example("hermes", f"<tool_call>{WEATHER}</tool_call>" * 2, calls=[ZURICH, ZURICH]),
    "hermes, odd layout": Example(
        "hermes",
        hermes('{\n  "name" : "f" ,\n  "arguments" :\n { "a" :\t[ ] }\n}'),
        calls=[("f", '{ "a" :\t[ ] }')],
    ),
    "hermes, arguments first": Example(
        "hermes", hermes('{"arguments": ' + NESTED + ', "name": "f"}'), calls=[("f", NESTED)]
    ),
    "hermes, parameters": Example(
        "hermes", hermes('{"name": "f", "parameters": {"a": 1}}'), calls=[("f", '{"a": 1}')]
    ),
    "hermes, more members": Example(
        "hermes",
        hermes('{"type": "function", "id": 7, "name": "f", "arguments": {}, "x": [1, "}"]}'),
        calls=[("f", "{}")],
    ),
    "hermes, no arguments": Example("hermes", hermes('{"name": "f"}'), calls=[("f", "{}")]),
    "hermes, null arguments": Example(
        "hermes", hermes('{"name": "f", "arguments": null}'), calls=[("f", "{}")]
    ),
    "hermes, empty arguments": Example(
        "hermes", hermes('{"name": "f", "arguments": ""}'), calls=[("f", "{}")]
    ),
    "hermes, arguments in a string": Example("hermes", hermes(F_STRING), calls=[("f", NESTED)]),
    "hermes, arguments in a string, first": Example(
        "hermes", hermes('{"arguments": ' + json.dumps(NESTED) + ', "name": "f"}'), calls=[("f", NESTED)]
    ),
    "hermes, a string that holds none": Example(
        "hermes", hermes('{"name": "f", "arguments": "half {"}'), calls=[("f", '"half {"')]
    ),
    "hermes, an array for arguments": same("hermes", hermes('{"name": "f", "arguments": [1]}')),
    "hermes, escaped name": Example(
        "hermes",
        hermes('{"name": "na\\u00efve_\\u5de5\\u5177", "arguments": {}}'),
        calls=[("naïve_工具", "{}")],
    ),
    "hermes, half a character for a name": same("hermes", hermes('{"name": "\\ud83e", "arguments": {}}')),
    "hermes, marker in a string": Example(
        "hermes",
        hermes('{"name": "f", "arguments": {"a": "</tool_call><tool_call>"}}'),
        calls=[("f", '{"a": "</tool_call><tool_call>"}')],
    ),
    "hermes, another tool": Example(
        "hermes",
        "x\n" + hermes('{"name": "g", "arguments": {"a": 1}}') + "\n" + hermes(WEATHER),
        "x\n" + hermes('{"name": "g", "arguments": {"a": 1}}'),
        [ZURICH],
    ),
    "hermes, no JSON": Example("hermes", hermes("get_weather()") + " \n", hermes("get_weather()") + " \n"),
    "hermes, another beginning in it": Example(
        "hermes", f"<tool_call>\n<tool_call>{WEATHER}</tool_call>", "<tool_call>\n", [ZURICH]
    ),
    "hermes, beginnings of markers": same("hermes", "a < b <t <tool <tool_ call> <<tool_cal"),
    "hermes, cut in the marker": same("hermes", "Well \n <tool_ca"),
    "hermes, cut in the name": same("hermes", 'x <tool_call>\n{"name": "f'),
    "hermes, cut in the arguments": Example(
        "hermes", 'x <tool_call>\n{"name": "f", "arguments": {"a": "b\\', "x", [("f", '{"a": "b\\')]
    ),
    "hermes, cut after the arguments": Example(
        "hermes", '<tool_call>{"name": "f", "arguments": {} ', calls=[("f", "{}")]
    ),
    "hermes, cut in the end": Example("hermes", hermes(WEATHER)[:-3], calls=[ZURICH]),
    "hermes, a brace too few": Example(
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}\n</tool_call>\nx',
        "x",
        [("f", '{"a": 1}')],
    ),
    "hermes, a brace too many": Example(
        "hermes",
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}}\n</tool_call>',
        "}\n</tool_call>",
        [("f", '{"a": 1}')],
    ),
    "hermes, broken arguments": Example(
        "hermes",
        hermes('{"name": "f", "arguments": {"a": [1}}') + "\n" + hermes(WEATHER),
        calls=[("f", '{"a": [1}}'), ZURICH],
    ),
    "hermes, crossed brackets": Example(
        "hermes",
        hermes('{"name": "f", "arguments": {"a": [1}, "b": 2}}'),
        calls=[("f", '{"a": [1}, "b": 2}}')],
    ),
    "hermes, half a character in a string": Example(
        "hermes",
        hermes(r'{"name": "f", "arguments": "{\"a\": \"\ud83e \ud83e\udd8a\"}"}'),
        calls=[("f", '{"a": "\ufffd 🦊"}')],
    ),
    "hermes, Python's quotes": Example(
        "hermes", hermes("""{"name": "f", "arguments": {'a': 1}}"""), calls=[("f", "{'a': 1}}")]
    ),
    "hermes, no end, another": Example(
        "hermes", f"<tool_call>\n{WEATHER}\n" + hermes(WEATHER), calls=[ZURICH, ZURICH]
    ),
    "llama": Example("llama3", F_NESTED.replace("arguments", "parameters"), calls=[("f", NESTED)]),
    "llama, tagged": Example(
        "llama3", '\n<|python_tag|>{"name": "f", "parameters": {}}', calls=[("f", "{}")]
    ),
    "llama, several": Example(
        "llama3",
        '{"name": "f", "parameters": {}}; {"type": "function", "name": "f", "parameters": {"a": "; "}};',
        calls=[("f", "{}"), ("f", '{"a": "; "}')],
    ),
    "llama, arguments": Example("llama3", WEATHER + "\n" + WEATHER, calls=[ZURICH, ZURICH]),
    "llama, no call": same("llama3", '{"answer": {"name": "f"}}'),
    "llama, another tool": same("llama3", ' {"name": "g", "parameters": {"a": 1}}'),
    "llama, a name and more": same("llama3", '{"name": "f", "age": 3}'),
    "llama, name is no text": same("llama3", '{"name": ["f"], "parameters": {}}'),
    "llama, Python": same("llama3", '[f(a=1), f(b="{")]'),
    "llama, tagged code": same("llama3", '<|python_tag|>f.call(q="x")'),
    "llama, text before": Example("llama3", "I call " + WEATHER, "I call " + WEATHER),
    "llama, text after": Example("llama3", WEATHER + " I hope.\n", "I hope.\n", [ZURICH]),
    "llama, no call after": Example("llama3", WEATHER + '; {"a": 1}', '; {"a": 1}', [ZURICH]),
    "llama, cut in the second": Example("llama3", WEATHER + '; {"na', '; {"na', [ZURICH]),
    "llama, cut": same("llama3", '{"name": "f", "parameters"'),
    "llama, cut in the tag": same("llama3", "<|python_"),
    "llama, cut in the arguments": Example(
        "llama3", '{"name": "f", "parameters": {"a": [', calls=[("f", '{"a": [')]
    ),
    "llama, broken arguments": Example(
        "llama3", '{"name": "f", "parameters": {"a": (1)}} x', calls=[("f", '{"a": (1)}} x')]
    ),
    "llama, trailing comma": Example(
        "llama3", '{"name": "f", "parameters": {"a": 1,},}', calls=[("f", '{"a": 1,}')]
    ),
    "mistral": Example("mistral", f"[TOOL_CALLS][{WEATHER}]", calls=[ZURICH]),
    "mistral, several": Example(
        "mistral",
        f'[TOOL_CALLS] [ {WEATHER},\n{{"arguments": {NESTED}, "name": "f", "id": "abcdefghi"}} ] \n',
        calls=[ZURICH, ("f", NESTED)],
    ),
    "mistral, arguments in a string": Example("mistral", f"[TOOL_CALLS][{F_STRING}]", calls=[("f", NESTED)]),
    "mistral, object": Example("mistral", f"[TOOL_CALLS]{WEATHER}", calls=[ZURICH]),
    "mistral, named": Example("mistral", f"[TOOL_CALLS]f[ARGS]{NESTED}", calls=[("f", NESTED)]),
    "mistral, named, several": Example(
        "mistral",
        'Sure!\n[TOOL_CALLS]f{"a": "[TOOL_CALLS]"}[TOOL_CALLS]get_weather[ARGS] {}',
        "Sure!",
        [("f", '{"a": "[TOOL_CALLS]"}'), ("get_weather", "{}")],
    ),
    "mistral, named, with an id": Example(
        "mistral", "[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{}", calls=[("f", "{}")]
    ),
    "mistral, text around": Example("mistral", f"A\n[TOOL_CALLS][{WEATHER}] B", "AB", [ZURICH]),
    "mistral, another tool": same("mistral", ' [TOOL_CALLS]g[ARGS]{"a": 1}'),
    "mistral, second is another": Example(
        "mistral",
        f'[TOOL_CALLS][{WEATHER}, {{"name": "g", "arguments": {{}}}}]',
        ', {"name": "g", "arguments": {}}]',
        [ZURICH],
    ),
    "mistral, no call": same("mistral", "[TOOL_CALLS] [TOOL_] [1]"),
    "mistral, no arguments": same("mistral", "[TOOL_CALLS]f[ARGH]{}"),
    "mistral, no arguments after an id": same("mistral", "[TOOL_CALLS]f[CALL_ID]1{}"),
    "mistral, broken id": same("mistral", "[TOOL_CALLS]f[CAL]{}"),
    "mistral, arguments in a list": same("mistral", "[TOOL_CALLS]f[ARGS][1]"),
    "mistral, cut in the marker": same("mistral", "x [TOOL_CAL"),
    "mistral, cut in the list": Example("mistral", f"[TOOL_CALLS][{WEATHER}, ", calls=[ZURICH]),
    "mistral, cut in the second": Example("mistral", f'[TOOL_CALLS][{WEATHER}, {{"na', ', {"na', [ZURICH]),
    "mistral, list not closed": Example("mistral", f"[TOOL_CALLS][{WEATHER} or so", "or so", [ZURICH]),
    "mistral, list not closed, cut in a marker": Example(
        "mistral", f"[TOOL_CALLS][{WEATHER} x[TOOL_", "x[TOOL_", [ZURICH]
    ),
    "mistral, broken arguments": Example(
        "mistral", '[TOOL_CALLS]f{"a": <1>} \n[TOOL_CALLS]f{}', calls=[("f", '{"a": <1>}'), ("f", "{}")]
    ),
    "mistral, broken arguments, then no call": Example(
        "mistral", '[TOOL_CALLS]f{"a": <1>} [TOOL_CALLS]', " [TOOL_CALLS]", [("f", '{"a": <1>}')]
    ),
    "think": Example(
        None,
        "<think>\nWell …\n\nso.\n</think>\n\nYes 🦊\n",
        "Yes 🦊\n",
        reasoning="Well …\n\nso.",
        thinks=THINK,
    ),
    "think, on one line": Example(None, " <think>a</think>b", "b", reasoning="a", thinks=THINK),
    "think, empty": Example(None, "<think>\n\n</think>\n\nYes", "Yes", thinks=THINK),
    "think, nothing else": Example(None, "<think>a</think>\n\n", reasoning="a", thinks=THINK),
    "think, opened": Example(
        None, "\nWell\n</think>\nYes", "Yes", reasoning="Well", started=True, thinks=THINK
    ),
    "think, opened twice": Example(
        None, "<think>\nWell</think>Yes", "Yes", reasoning="Well", started=True, thinks=THINK
    ),
    "think, never closed": Example(
        None, "<think>\nWell <tool_call></thin", reasoning="Well <tool_call></thin", thinks=THINK
    ),
    "think, opened, never closed": Example(
        "hermes", " W <think>", reasoning=" W <think>", started=True, thinks=THINK
    ),
    "think, later": same(None, "a <think>b</think>", thinks=THINK),
    "think, cut": same(None, " <thi", thinks=THINK),
    "think, opened, cut": Example(None, "<thi", reasoning="<thi", started=True, thinks=THINK),
    "think, again": Example(None, "<think>a</think>b</think>", "b</think>", reasoning="a", thinks=THINK),
    "think, then a call": Example(
        "hermes",
        f"<think>\nI could {hermes(WEATHER)}.\n</think>\n\n{hermes(WEATHER)}",
        calls=[ZURICH],
        reasoning=f"I could {hermes(WEATHER)}.",
        thinks=THINK,
    ),
    "think, then Llama's call": Example(
        "llama3", f"<think>a</think>\n\n{WEATHER}", calls=[ZURICH], reasoning="a", thinks=THINK
    ),
    "no thought, a call": Example("hermes", hermes(WEATHER), calls=[ZURICH], thinks=THINK),
    "Magistral": Example(
        "mistral",
        f"[THINK]a [TOOL_CALLS]f\n[/THINK][TOOL_CALLS][{WEATHER}]",
        calls=[ZURICH],
        reasoning="a [TOOL_CALLS]f",
        thinks=MAGISTRAL,
    ),
    "special tokens": Example(
        "hermes",
        "<think>a<|pad|>b</think><|im_|im_end|><|im_end|>c<|im\n<tool_<|im_end|>call>"
        f"{WEATHER}</tool_call><|im_end",
        "<|im_|im_end|>c<|im<|im_end",
        [ZURICH],
        "ab",
        thinks=THINK,
        special=("<|im_end|>", "<|pad|>", "<tool_call>", "<think>", ""),
    ),
    "special tokens, nothing else": Example(None, "a<|im_end|> b<|im", "a b<|im", special=("<|im_end|>",)),
}
