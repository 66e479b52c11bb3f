"""How models write tool calls: what a parser looks for, and what a grammar holds a model to.

The texts are those that the models' own chat templates make of earlier calls.
"""

from __future__ import annotations

import json
import secrets
import string
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from hexad.checks import shown
from hexad.errors import ParamsError
from hexad.params import StructuredOutputsParams
from hexad.server.parsers.calls import (
    BrokenArgumentsError,
    NotACallError,
    is_tool,
    read_arguments,
    read_call,
)
from hexad.server.parsers.reasoning import ReasoningFormat
from hexad.server.parsers.text import SPACE, Markers, Reading, Text

_ALPHANUMERIC = string.ascii_letters + string.digits
_IN_NAMES = frozenset(_ALPHANUMERIC + "_-.:/")


class ToolFormat(ABC):
    """One way of writing tool calls. Tools are OpenAI's: {"type": "function", "function": {"name", …}}, or
    only what stands under "function".

    markers: texts that begin or end calls. trigger: the marker that no other text has, or None.
    needs_special_tokens: whether markers may be special tokens, so that the text must be decoded with them.
    """

    markers: ClassVar[tuple[str, ...]]
    trigger: ClassVar[str | None]
    needs_special_tokens: ClassVar[bool]

    @abstractmethod
    def read(self, text: Text) -> Reading[None]:
        """Sorts a message into content and calls. White space around calls belongs to neither. It returns
        when all that comes is content."""

    @abstractmethod
    def _calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
        """The structural tag's format for one or more calls, or just one."""

    @abstractmethod
    def _how_to_call(self) -> str:
        """A sentence that says how calls are written."""

    def new_id(self) -> str:
        """An id for a call, as the model's template wants to see it again."""
        return f"call_{secrets.token_hex(12)}"

    def constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        choice: str,
        parallel: bool,
        *,
        reasoning: ReasoningFormat | None = None,
        starts_in_reasoning: bool = False,
    ) -> StructuredOutputsParams:
        """Has the model call tools, in the format that `read` reads, with arguments by their schemas.

        choice: "required", for one call or (parallel) any number, or the name of the tool to call, once.
        reasoning: free text between its markers may come first.

        Raises ParamsError where there is no such tool.
        """
        if choice != "required":
            tools = [tool for tool in tools if _function(tool)["name"] == choice]
            parallel = False
        if not tools:
            raise ParamsError(
                "tool_choice is required, but there are no tools."
                if choice == "required"
                else f"tool_choice names {choice!r}, which is none of the tools."
            )
        return _after_reasoning(self._calls(tools, parallel), reasoning, starts_in_reasoning)

    def auto_constraint(
        self,
        tools: Sequence[Mapping[str, Any]],
        parallel: bool,
        *,
        reasoning: ReasoningFormat | None = None,
        starts_in_reasoning: bool = False,
    ) -> StructuredOutputsParams | None:
        """Free text in which each call, once its trigger is written, is one of a tool that there is, with
        arguments by its schema. None where no text is sure to be a call's beginning.

        parallel: False ends the text with the first call. reasoning: text between its markers is not looked
        at, and where the first marker stands later than it should, nor are calls between the two.
        """
        if self.trigger is None or not tools:
            return None
        free = {
            "type": "triggered_tags",
            "triggers": [self.trigger],
            "tags": self._triggered(tools, parallel),
            "stop_after_first": not parallel,
        }
        return _after_reasoning(free, reasoning, starts_in_reasoning, free=True)

    def _triggered(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> list[dict[str, Any]]:
        """Tags that begin with the trigger."""
        tags: list[dict[str, Any]] = self._calls(tools, parallel)["tags"]
        return tags

    def instructions(self, tools: Sequence[Mapping[str, Any]], choice: str = "auto") -> str:
        """A system message about the tools, for a model whose chat template says nothing of them.

        choice: "auto", "required" or a tool's name.
        """
        described = "\n".join(_compact({"type": "function", "function": _function(tool)}) for tool in tools)
        when = {
            "auto": "Call one whenever it helps to answer, and otherwise answer in plain words.",
            "required": "Answer with at least one call.",
        }.get(choice, f"Answer with a call of {choice}.")
        return (
            "You can call functions. Here they are, each with a JSON schema of its parameters:\n"
            f"<tools>\n{described}\n</tools>\n{when} {self._how_to_call()}"
        )


class HermesFormat(ToolFormat):
    """Hermes 2 and 3, Qwen2.5, Qwen3 and many others: objects in <tool_call>…</tool_call>, after content."""

    markers = ("<tool_call>", "</tool_call>")
    trigger = "<tool_call>"
    needs_special_tokens = True  # they are in some models
    _begin = Markers(["<tool_call>"])
    _end = Markers(["</tool_call>"])

    def read(self, text: Text) -> Reading[None]:
        while True:
            yield from text.until(self._begin, text.content, SPACE)
            try:
                yield from text.skip()
                yield from read_call(text)
            except NotACallError:
                text.release(text.content)
                continue
            except BrokenArgumentsError:
                yield from text.until(self._end, text.arguments, SPACE)
            else:
                yield from text.skip()
                text.release(text.syntax)
                if not (yield from text.literal("</tool_call>")):
                    text.unread()
                    text.end_syntax()
                    continue
            yield from text.skip()
            text.end_syntax()

    def _calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
        return _separated(
            [_tag('<tool_call>\n{"name": %s, "arguments": ', tool, "}\n</tool_call>") for tool in tools],
            "\n",
            parallel,
        )

    def _how_to_call(self) -> str:
        return (
            "A call is a JSON object with the function's name and its arguments, between two tags:\n"
            '<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>'
        )


class Llama3Format(ToolFormat):
    """Llama 3.1 to 3.3: the whole message is one object, or several with semicolons between them, perhaps
    after <|python_tag|>. Anything else, Python's notation included, is content."""

    markers = ("<|python_tag|>",)
    trigger = None
    needs_special_tokens = False  # the message is recognised without its tag
    _never = Markers([])

    def read(self, text: Text) -> Reading[None]:
        yield from text.skip()
        yield from text.literal("<|python_tag|>")
        while True:
            try:
                yield from text.skip()
                yield from read_call(text)
            except NotACallError:
                break
            except BrokenArgumentsError:
                yield from text.until(self._never, text.arguments, "")
            yield from text.skip()
            text.release(text.syntax)
            if (yield from text.peek()) == ";":
                text.take()
                yield from text.skip()
            text.leftover = text.content
        # What is held, a semicolon before it included, is content.

    def _calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
        return _separated([_tag('{"name": %s, "parameters": ', tool, "}") for tool in tools], "; ", parallel)

    def _how_to_call(self) -> str:
        return (
            "A call is a JSON object, and the whole answer; put semicolons between several:\n"
            '{"name": <name>, "parameters": <object>}'
        )


class MistralFormat(ToolFormat):
    """Mistral's models: [TOOL_CALLS] and a list of objects, or since tokenizer v11 [TOOL_CALLS] before every
    call, which is a name, [ARGS] or nothing, and the arguments. Both are read.

    named: whether calls are made in the newer way.
    """

    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    trigger = "[TOOL_CALLS]"
    needs_special_tokens = True
    _begin = Markers(["[TOOL_CALLS]"])

    def __init__(self, *, named: bool = False) -> None:
        self._named = named

    def new_id(self) -> str:
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(9))

    def read(self, text: Text) -> Reading[None]:
        give = text.content
        while True:
            yield from text.until(self._begin, give, SPACE)
            give = text.content
            text.leftover = text.content
            try:
                yield from text.skip()
                yield from self._read_calls(text)
            except NotACallError:
                text.release(text.content)
            except BrokenArgumentsError:
                give = text.arguments
            else:
                yield from text.skip()
                text.end_syntax()

    def _read_calls(self, text: Text) -> Reading[None]:
        """Reads what follows the marker. Raises NotACallError, with what is not a call's held."""
        first = yield from text.peek()
        if first == "{":
            yield from read_call(text)
        elif first == "[":
            text.take()
            while True:
                yield from text.skip()
                text.leftover = text.content
                yield from read_call(text)
                yield from text.skip()
                text.release(text.syntax)
                char = yield from text.peek()
                if char not in ",]":
                    text.leftover = text.content
                    raise NotACallError
                text.take()
                if char == "]":
                    return
        else:
            yield from self._read_named(text)

    def _read_named(self, text: Text) -> Reading[None]:
        name = ""
        while (yield from text.peek()) in _IN_NAMES:
            name += text.take()
        if not is_tool(text, name):
            raise NotACallError
        if (yield from text.peek()) == "[":
            text.take()
            if (yield from text.peek()) == "C":
                if not (yield from text.literal("CALL_ID]")):
                    raise NotACallError
                while (yield from text.peek()) in _ALPHANUMERIC:
                    text.take()
                yield from text.literal("[")
            if not (yield from text.literal("ARGS]")):
                raise NotACallError
        yield from text.skip()
        yield from read_arguments(text, name)

    def _calls(self, tools: Sequence[Mapping[str, Any]], parallel: bool) -> dict[str, Any]:
        if self._named:
            return _separated([_tag("[TOOL_CALLS]%s[ARGS]", tool, "") for tool in tools], "", parallel)
        objects = _separated(
            [_tag('{"name": %s, "arguments": ', tool, "}") for tool in tools], ", ", parallel
        )
        return _separated([{"begin": "[TOOL_CALLS][", "content": objects, "end": "]"}], "", False)

    def _how_to_call(self) -> str:
        if self._named:
            return "A call is written as [TOOL_CALLS]<name>[ARGS]<object>, with the arguments as JSON."
        return (
            "Calls are written as a JSON list, with the function's name and its arguments for each:\n"
            '[TOOL_CALLS][{"name": <name>, "arguments": <object>}]'
        )


_HERMES, _LLAMA3 = HermesFormat(), Llama3Format()

TOOL_FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {
        "hermes": _HERMES,
        "qwen": _HERMES,
        "qwen25": _HERMES,
        "llama3": _LLAMA3,
        "llama3_json": _LLAMA3,
        "llama4_json": _LLAMA3,
        "mistral": MistralFormat(),
        "mistral_v11": MistralFormat(named=True),
    }
)
"""By name; vLLM's and SGLang's names are among them."""


def detect_tool_format(chat_template: str | None, special_tokens: Collection[str] = ()) -> ToolFormat:
    """How a model writes calls, by what its chat template has in it, or else by its tokens' texts; Hermes's
    way where neither tells."""
    template = chat_template or ""
    for known in (template, special_tokens):
        if "[TOOL_CALLS]" in known:
            return TOOL_FORMATS["mistral_v11" if "[ARGS]" in known else "mistral"]
        if "<tool_call>" in known:
            return TOOL_FORMATS["hermes"]
        if "<|python_tag|>" in known or '"name": function name, "parameters":' in known:
            return TOOL_FORMATS["llama3"]
    return TOOL_FORMATS["hermes"]


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function: Mapping[str, Any] = tool.get("function", tool)
    return function


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tag(begin: str, tool: Mapping[str, Any], end: str) -> dict[str, Any]:
    """A call of one tool. begin: has %s for its name, as JSON where more JSON follows it."""
    function = _function(tool)
    name = function["name"]
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping):
        raise ParamsError(
            f"the parameters of {name} must be a JSON schema of an object, not {shown(schema)}."
        )
    return {
        "begin": begin.replace("%s", _compact(name) if "{" in begin else name),
        "content": {"type": "json_schema", "json_schema": {"type": "object"} | dict(schema)},
        "end": end,
    }


def _separated(tags: Sequence[Mapping[str, Any]], separator: str, parallel: bool) -> dict[str, Any]:
    return {
        "type": "tags_with_separator",
        "tags": tags,
        "separator": separator,
        "at_least_one": True,
        "stop_after_first": not parallel,
    }


def _after_reasoning(
    format: dict[str, Any], reasoning: ReasoningFormat | None, started: bool, *, free: bool = False
) -> StructuredOutputsParams:
    """A constraint on what comes after the reasoning; if that has not started, there may be none.

    free: the format begins with free text. No grammar tells that from an opening marker unless both are
    searched for in the same way, so the marker, too, may have free text before it.
    """
    if reasoning is not None:
        any_text = {"type": "any_text"}
        elements = [{"type": "tag", "begin": "", "content": any_text, "end": reasoning.closing}, format]
        if not free:
            elements.insert(1, {"type": "const_string", "value": "\n\n"})
        if not started and free:
            elements.insert(0, {"type": "tag", "begin": "", "content": any_text, "end": reasoning.opening})
        elif not started:
            elements[0]["begin"] = reasoning.opening
        after = {"type": "sequence", "elements": elements}
        format = after if started else {"type": "or", "elements": [after, format]}
    tag = json.dumps({"type": "structural_tag", "format": format}, ensure_ascii=False)
    return StructuredOutputsParams(structural_tag=tag)
