"""Calls that a model is held to, with SmolLM2: the parser reads them back, and their arguments are valid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hexad import LLM, SamplingParams
from hexad.outputs import CompletionOutput
from hexad.params import StructuredOutputsParams
from hexad.server.parsers.formats import TOOL_FORMATS, ToolFormat
from hexad.server.parsers.parser import MessageParser
from hexad.server.parsers.reasoning import THINK

SCHEMAS: dict[str, dict[str, Any]] = {
    "get": {
        "type": "object",
        "properties": {
            "city": {"enum": ["Zürich", 'The "Hague"', "São {Paulo}", "京都"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "get_time": {
        "properties": {"zone": {"$ref": "#/$defs/zone"}},
        "$defs": {"zone": {"enum": ["UTC", "CET"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
    "stop-it": {"type": "object", "properties": {}, "additionalProperties": False},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
FORMATS = {name: TOOL_FORMATS[name] for name in ("hermes", "llama3", "mistral", "mistral_v11")}
QUESTIONS = [
    "How warm is it in Zürich?",
    "Tell me a joke.",
    "What is the time?",
    "Weather in Kyoto and Zürich?",
]

SEPARATORS = {
    FORMATS["hermes"]: ("", "}\n</tool_call>\n"),
    FORMATS["llama3"]: ("", "}; "),
    FORMATS["mistral"]: ("[TOOL_CALLS][", "}, "),
    FORMATS["mistral_v11"]: ("", ""),
}
"""What begins a list of calls, and what stands between the arguments of one and the next."""

every_format = pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(smollm2_path, max_model_len=1024) as llm:
        yield llm


def ask(
    llm: LLM, format: ToolFormat, spec: StructuredOutputsParams | None, *, choice: str, max_tokens: int = 200
) -> list[CompletionOutput]:
    """Answers to the questions, the first ones greedy and the others random."""
    system = {"role": "system", "content": format.instructions(TOOLS, choice)}
    outputs = llm.chat(
        [[system, {"role": "user", "content": question}] for question in QUESTIONS],
        [
            SamplingParams(temperature=float(i >= 2), seed=i, max_tokens=max_tokens, structured_outputs=spec)
            for i in range(len(QUESTIONS))
        ],
        use_tqdm=False,
    )
    return [output.outputs[0] for output in outputs]


def read(format: ToolFormat, text: str, *, thinks: bool = False, started: bool = False) -> tuple[Any, ...]:
    """Reasoning, content and calls; the calls' arguments have been checked."""
    parser = MessageParser(
        tools=format, reasoning=THINK if thinks else None, starts_in_reasoning=started, tool_names=SCHEMAS
    )
    delta, rest = parser.push(text), parser.finish()
    assert not rest.tool_calls
    calls = [(call.name, json.loads(call.arguments)) for call in delta.tool_calls]
    for name, arguments in calls:
        assert isinstance(arguments, dict)
        jsonschema.validate(arguments, SCHEMAS[name])
    return delta.reasoning + rest.reasoning, delta.content + rest.content, calls


@every_format
def test_required(smollm2: LLM, format: ToolFormat) -> None:
    for output in ask(smollm2, format, format.constraint(TOOLS, "required", False), choice="required"):
        assert output.finish_reason == "stop"
        _, content, calls = read(format, output.text)
        assert (content, len(calls)) == ("", 1), output.text


@every_format
def test_named(smollm2: LLM, format: ToolFormat) -> None:
    for choice in SCHEMAS:
        for output in ask(smollm2, format, format.constraint(TOOLS, choice, True), choice=choice):
            assert output.finish_reason == "stop"
            _, content, calls = read(format, output.text)
            assert (content, [name for name, _ in calls]) == ("", [choice]), output.text


@every_format
def test_parallel(smollm2: LLM, format: ToolFormat) -> None:
    """One model of this size goes on and on, and another stops at once: whatever is complete is right."""
    spec = format.constraint(TOOLS, "required", True)
    for output in ask(smollm2, format, spec, choice="required"):
        text = output.text
        if output.finish_reason == "length":  # up to the last call that is complete
            text = text[: text.rfind("}", 0, text.rfind('"name"' if '"name"' in text else "[TOOL")) + 1]
        _, content, calls = read(format, text)
        assert content == "", output.text
        assert calls


@every_format
@pytest.mark.parametrize("parallel", [False, True])
def test_several_calls(smollm2: LLM, format: ToolFormat, parallel: bool) -> None:
    compiled = held_to(smollm2, format.constraint(TOOLS, "required", parallel))
    tag = plain_tag(format)
    first, second = '{"city": "京都", "days": 2}', '{"zone": "CET"}'
    head, between = SEPARATORS[format]
    call = tag["begin"] + first
    several = (
        call + between + tag["begin"].removeprefix(head).replace("get", "get_time") + second + tag["end"]
    )
    assert compiled(call + tag["end"])
    assert compiled(several) is parallel
    calls = [("get", json.loads(first)), ("get_time", json.loads(second))]
    assert read(format, several) == ("", "", calls)


@every_format
def test_any_object_where_no_schema_is_given(smollm2: LLM, format: ToolFormat) -> None:
    spec = format.constraint([{"type": "function", "function": {"name": "get"}}], "required", False)
    for output in ask(smollm2, format, spec, choice="required", max_tokens=300):
        parser = MessageParser(tools=format, reasoning=None, tool_names=["get"])
        (call,) = parser.push(output.text).tool_calls
        assert call.name == "get"
        assert output.finish_reason == "length" or isinstance(json.loads(call.arguments), dict)


@every_format
@pytest.mark.parametrize("started", [False, True])
def test_required_after_reasoning(smollm2: LLM, format: ToolFormat, started: bool) -> None:
    spec = format.constraint(TOOLS, "get", False, reasoning=THINK, starts_in_reasoning=started)
    compiled = held_to(smollm2, spec)
    call = json.dumps({"city": "京都", "days": 2}, ensure_ascii=False)
    tag = plain_tag(format)
    written = tag["begin"] + call + tag["end"]
    thought = ("" if started else "<think>") + "So <tool_call> or [TOOL_CALLS]{"
    good = f"{thought}</think>\n\n{written}"
    assert compiled(good)
    assert read(format, good, thinks=True, started=started)[1:] == ("", [("get", json.loads(call))])
    assert compiled(written) is not started
    assert not compiled(f"{thought}</think>\n\nNo.")
    assert not compiled(thought)


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_v11"])
@pytest.mark.parametrize("parallel", [False, True])
def test_auto(smollm2: LLM, name: str, parallel: bool) -> None:
    format = TOOL_FORMATS[name]
    compiled = held_to(smollm2, format.auto_constraint(TOOLS, parallel))
    good = '{"city": "京都", "days": 2}'
    bad = '{"city": "Bern", "days": 2}'
    tag = plain_tag(format)
    call = tag["begin"] + good + tag["end"]
    assert compiled("Just text, with a < and a [.")
    assert compiled("Let me see.\n" + call)
    assert read(format, "Let me see.\n" + call)[1:] == ("Let me see.", [("get", json.loads(good))])
    assert not compiled("Let me see.\n" + tag["begin"] + bad + tag["end"])
    assert not compiled(call.replace("get", "git"))
    assert compiled(call + "\n" + call) is parallel
    assert compiled(call + "\nDone.") is parallel


@pytest.mark.parametrize("name", ["hermes", "mistral", "mistral_v11"])
def test_auto_after_reasoning(smollm2: LLM, name: str) -> None:
    format = TOOL_FORMATS[name]
    compiled = held_to(smollm2, format.auto_constraint(TOOLS, True, reasoning=THINK))
    trigger = format.trigger
    assert compiled(f"<think>I could {trigger}.</think>\n\nNo.")
    assert not compiled(f"<think>I could.</think>\n\n{trigger}.")
    assert compiled("No.")
    assert not compiled(f"No {trigger}.")


def plain_tag(format: ToolFormat) -> dict[str, Any]:
    """The tag of a call of "get", whole."""
    spec = format.constraint(TOOLS, "get", False)
    assert spec.structural_tag is not None
    tag: dict[str, Any] = json.loads(spec.structural_tag)["format"]["tags"][0]
    if "tags" in tag["content"]:  # Mistral's list
        inner = tag["content"]["tags"][0]
        tag = {"begin": tag["begin"] + inner["begin"], "end": inner["end"] + tag["end"]}
    return tag


def held_to(llm: LLM, spec: StructuredOutputsParams | None) -> Any:
    """Tells of a text whether the model, held to `spec`, could write just that and end."""
    from hexad.runner.grammar import GrammarCompiler

    assert spec is not None
    tokenizer = llm.get_tokenizer()
    compiler = GrammarCompiler(lambda: tokenizer, tokenizer.vocab_size)

    def accepts(text: str) -> bool:
        grammar = compiler.compile(spec)
        for token_id in tokenizer.encode(text, add_special=False):
            grammar.accept(token_id)
            if grammar.error:
                return False
        grammar.accept(tokenizer.eos_id)
        return grammar.finished and grammar.error is None

    return accepts
