"""Parsers of generated text: every format's examples, cut in every way, and through an engine by bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.byte_tokenizer import EOS, TOKENIZER
from tests.fake_executor import ScriptedExecutor
from tests.parser_examples import EXAMPLES, TOOLS, WEATHER, Example, hermes

from hexad.config import EngineConfig
from hexad.engine.engine import Engine
from hexad.errors import ParamsError
from hexad.params import RequestOutputKind, SamplingParams
from hexad.server.parsers.deltas import Delta, ToolCallDelta
from hexad.server.parsers.formats import TOOL_FORMATS, detect_tool_format
from hexad.server.parsers.parser import MessageParser
from hexad.server.parsers.reasoning import MAGISTRAL, THINK, ReasoningFormat, detect_reasoning_format
from hexad.server.parsers.text import Markers


def parser_of(example: Example) -> MessageParser:
    return MessageParser(
        tools=TOOL_FORMATS[example.format] if example.format else None,
        reasoning=example.thinks,
        starts_in_reasoning=example.started,
        tool_names=TOOLS,
        special_tokens=example.special,
    )


class Message(NamedTuple):
    content: str
    calls: list[tuple[str, str]]
    reasoning: str


def join(deltas: Iterable[Delta], id_pattern: str = "call_[0-9a-f]{24}") -> Message:
    """Joins deltas, and checks that every call begins once, in order, and goes on to its end."""
    deltas = list(deltas)
    calls: list[tuple[str, str]] = []
    ids = set()
    for piece in (piece for delta in deltas for piece in delta.tool_calls):
        if piece.index == len(calls):
            assert piece.id is not None
            assert re.fullmatch(id_pattern, piece.id)
            assert piece.name
            ids.add(piece.id)
            calls.append((piece.name, piece.arguments))
        else:
            assert (piece.index, piece.id, piece.name) == (len(calls) - 1, None, None)
            assert piece.arguments
            name, arguments = calls[-1]
            calls[-1] = (name, arguments + piece.arguments)
    assert len(ids) == len(calls)
    return Message(
        "".join(delta.content for delta in deltas), calls, "".join(delta.reasoning for delta in deltas)
    )


def parse(example: Example, pieces: Iterable[str]) -> Message:
    parser = parser_of(example)
    deltas = [*map(parser.push, pieces), parser.finish()]
    assert parser.finish() == Delta()
    pattern = "[0-9a-zA-Z]{9}" if example.format == "mistral" else "call_[0-9a-f]{24}"
    message = join(deltas, pattern)
    assert parser.made_tool_calls == bool(message.calls)
    return message


def expected(example: Example) -> Message:
    return Message(example.content, example.calls, example.reasoning)


every_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())


@every_example
def test_examples(example: Example) -> None:
    assert parse(example, [example.text]) == expected(example)


@every_example
def test_examples_in_two_pieces(example: Example) -> None:
    for cut in range(len(example.text) + 1):
        assert parse(example, [example.text[:cut], example.text[cut:]]) == expected(example), cut


@every_example
def test_examples_character_by_character(example: Example) -> None:
    assert parse(example, example.text) == expected(example)


@given(st.data(), st.sampled_from(sorted(EXAMPLES)))
def test_examples_in_any_pieces(data: st.DataObject, name: str) -> None:
    example = EXAMPLES[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(example.text)), max_size=12)))
    pieces = [
        example.text[start:end] for start, end in zip([0, *cuts], [*cuts, len(example.text)], strict=True)
    ]
    assert parse(example, pieces) == expected(example)


FRAGMENTS = [
    "<tool_call>", "</tool_call>", "<think>", "</think>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]",
    "<|python_tag|>", '{"name": "f", "arguments": ', '"name"', '"arguments"', "[", "]", "{", "}", ":", ",",
    ";", '"', "\\", "\n", " ", "f", '"f"', "1", "{}", "<", "🦊", WEATHER, "<|im_end|>",
]  # fmt: skip


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from(FRAGMENTS), max_size=14),
    st.sampled_from([None, "hermes", "llama3", "mistral"]),
    st.sampled_from([None, THINK]),
    st.booleans(),
    st.sampled_from([(), ("<|im_end|>",)]),
)
def test_any_text_comes_to_the_same_however_it_is_cut(
    fragments: list[str], format: str | None, thinks: ReasoningFormat | None, started: bool, special: Any
) -> None:
    example = Example(format, "".join(fragments), started=started, thinks=thinks, special=special)
    whole = parse(example, [example.text])
    assert parse(example, example.text) == parse(example, fragments) == whole
    if not whole.calls and not thinks and not special:
        assert whole.content == example.text  # nothing is lost


# What comes when.


def deltas_of(parser: MessageParser, text: str) -> list[Delta]:
    return [parser.push(char) for char in text]


def test_arguments_come_as_they_are_written() -> None:
    parser = parser_of(EXAMPLES["hermes"])
    assert not any(deltas_of(parser, '<tool_call>\n{"name": "f", "arguments": '))
    (first,) = parser.push("{").tool_calls
    assert (first.index, first.name, first.arguments) == (0, "f", "{")
    for char in '"a": "}\\"🦊"}':
        assert parser.push(char) == Delta(tool_calls=(ToolCallDelta(0, None, None, char),))
    assert not any(deltas_of(parser, "}\n</tool_call>\n"))


def test_content_comes_as_soon_as_it_is_certain() -> None:
    parser = parser_of(EXAMPLES["hermes"])
    given = [delta.content for delta in deltas_of(parser, "a <b <tool x\ny")]
    assert given == ["a", "", "", " <b", "", "", "", "", "", "", " <tool", " x", "", "\ny"]


def test_json_that_is_no_call_is_not_held() -> None:
    parser = parser_of(EXAMPLES["llama"])
    given = [delta.content for delta in deltas_of(parser, '{"answer": 1}')]
    assert given == [""] * 8 + ['{"answer"', ":", " ", "1", "}"]


def test_reasoning_comes_as_it_is_written() -> None:
    parser = parser_of(EXAMPLES["think"])
    assert [delta.reasoning for delta in deltas_of(parser, "<think>\na\nb<")][8:] == ["a", "", "\nb", ""]


def test_any_name_will_do_where_tools_are_not_known() -> None:
    parser = MessageParser(tools=TOOL_FORMATS["hermes"], reasoning=None)
    message = join([parser.push(hermes('{"name": "x", "arguments": {}}') + hermes('{"name": "x"}'))])
    assert message == Message(hermes('{"name": "x"}'), [("x", "{}")], "")


def test_names_are_valid_unicode() -> None:
    parser = MessageParser(tools=TOOL_FORMATS["hermes"], reasoning=None)
    message = join([parser.push(hermes(r'{"name": "a\ud83e", "arguments": {}}'))])
    assert message.calls == [("a\ufffd", "{}")]


def test_arguments_in_a_string_may_nest_as_deep_as_they_like() -> None:
    inner = json.dumps('{"a": ' + "[" * 100_000)
    message = parse(EXAMPLES["hermes"], [hermes('{"name": "f", "arguments": ' + inner + "}")])
    assert message.calls == [("f", inner)]


def test_a_long_text_takes_time_in_proportion() -> None:
    """Not timed: what grew with the square of the length would be felt."""
    size = 100_000
    for text in (
        " " * size,
        "<" * size,
        '<tool_call>{"arguments": "' + "x" * size,
        "<tool_call>" + "[" * size,
    ):
        parser = parser_of(EXAMPLES["hermes"])
        assert join([*map(parser.push, text), parser.finish()]).content == text


# Through an engine that says one byte at a time.


@every_example
def test_examples_through_an_engine(example: Example) -> None:
    size = TOKENIZER.vocab_size
    script = [*example.text.encode(), EOS]
    executor = ScriptedExecutor(script, kv_blocks=64, vocab_size=size)
    ids = [TOKENIZER.encode(chr(byte))[0] for byte in range(128)]
    assert ids == list(range(128))
    engine = Engine(
        executor, EngineConfig(), max_model_len=1024, kv_blocks=64, vocab_size=size, eos_ids=frozenset([EOS]),
        new_stream=lambda params: TOKENIZER.stream(skip_special=params.skip_special_tokens),
        token_text=TOKENIZER.token_text,
    )  # fmt: skip
    params = SamplingParams(max_tokens=1000, output_kind=RequestOutputKind.DELTA, skip_special_tokens=False)
    engine.add_request("r", [1, 2, 3], params)
    pieces = []
    while engine.has_unfinished:
        pieces += [request.output(delta=True).outputs[0].text for request in engine.step()]
    assert "".join(pieces) == example.text
    assert len(pieces) == len(script)
    assert parse(example, pieces) == expected(example)


# Which format a model has.


@pytest.mark.parametrize(
    ("template", "tokens", "name"),
    [
        (None, [], "hermes"),
        ("{{ messages }}", ["<|im_end|>"], "hermes"),
        ("…<tool_call>\n{{ tool_call }}…", ["[TOOL_CALLS]"], "hermes"),
        ("…[TOOL_CALLS] [{{ tool_call }}]…", ["<tool_call>"], "mistral"),
        ("…[TOOL_CALLS]{{ name }}[ARGS]{{ arguments }}…", [], "mistral_v11"),
        (None, ["<s>", "[TOOL_CALLS]"], "mistral"),
        (None, ["[TOOL_CALLS]", "[ARGS]"], "mistral_v11"),
        ("…<|python_tag|>…", [], "llama3"),
        ('…{"name": function name, "parameters": dictionary of…', [], "llama3"),
        ("", ["<|eot_id|>", "<|python_tag|>"], "llama3"),
    ],
)
def test_detects_tool_formats(template: str | None, tokens: list[str], name: str) -> None:
    assert detect_tool_format(template, tokens) is TOOL_FORMATS[name]


def test_detects_reasoning_formats() -> None:
    assert detect_reasoning_format(None) is None
    assert detect_reasoning_format("{{ messages }}") is None
    assert detect_reasoning_format("content.split('</think>')[-1]") is THINK
    assert detect_reasoning_format("[THINK]") is MAGISTRAL
    assert THINK.is_opened_by("<|im_start|>assistant\n<think>\n")
    assert not THINK.is_opened_by("<|im_start|>assistant\n<think>\n\n</think>\n\n")


# What is asked of a model. What comes of the constraints is in tests/models/test_tool_constraints.py.

FUNCTION = {"name": "f", "description": "Does.", "parameters": {"type": "object", "properties": {"ß": {}}}}


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_instructions_describe_tools_and_format(name: str) -> None:
    format = TOOL_FORMATS[name]
    told = format.instructions([{"type": "function", "function": FUNCTION}, {"name": "g"}])
    described = re.search(r"<tools>\n(.*)\n</tools>", told, re.DOTALL)
    assert described is not None
    lines = [json.loads(line) for line in described[1].splitlines()]
    assert lines == [{"type": "function", "function": tool} for tool in (FUNCTION, {"name": "g"})]
    assert "ß" in told
    assert all(told != format.instructions([FUNCTION], choice) for choice in ("required", "f"))
    assert "call of f." in format.instructions([FUNCTION], "f")
    if format.trigger is not None:
        assert format.trigger in told


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda format: format.constraint([FUNCTION], "g", True), "tool_choice names 'g'"),
        (lambda format: format.constraint([], "required", True), "no tools"),
        (
            lambda format: format.constraint([{"name": "f", "parameters": [1]}], "required", True),
            r"parameters of f must be a JSON schema of an object, not \[1\]",
        ),
    ],
)
def test_refuses_what_cannot_be_called(call: Callable[[Any], object], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        call(TOOL_FORMATS["hermes"])


def test_llama_has_no_trigger() -> None:
    assert TOOL_FORMATS["llama3"].auto_constraint([FUNCTION], True) is None
    assert TOOL_FORMATS["hermes"].auto_constraint([], True) is None


def test_markers_are_found_wherever_they_begin() -> None:
    markers, tail, found = Markers(["<ab>", "<cd>"]), "", []
    for end, char in enumerate("<a<ab<cd<ab>cd><cd>", 1):
        tail = markers.advance(tail, char)
        if tail in markers.texts:
            found.append((tail, end))
            tail = ""
    assert found == [("<ab>", 12), ("<cd>", 19)]
