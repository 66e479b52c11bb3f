"""The items of the Responses API: what goes in, in one form; as a conversation; and what comes out."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from hexad.server.blocks import Block
from hexad.server.errors import ApiError

Item = dict[str, Any]

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
_STATUSES = ("in_progress", "completed", "incomplete")


def new_id(prefix: str) -> str:
    """An id for an item or a response."""
    return f"{prefix}_{secrets.token_hex(16)}"


def input_items(value: str | Sequence[Mapping[str, Any]]) -> list[Item]:
    """A request's `input` as items with ids, contents in parts. Raises ApiError naming what is malformed."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    return [_input_item(item, f"input[{i}]") for i, item in enumerate(value)]


def conversation(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Items as the messages of a chat. Raises ApiError for the output of a call that is not among them.

    A call that was cut off is left out, and what answers it: no template can show it.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    called = {item["call_id"]: item["status"] for item in items if item["type"] == "function_call"}
    reasoning = ""
    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            parts = item.get("content") or item["summary"]
            reasoning += "\n".join(part["text"] for part in parts)
        elif kind == "function_call_output":
            if item["call_id"] not in called:
                raise _wrong(f"input has the output of a call {item['call_id'][:100]!r} that is not in it.")
            if called[item["call_id"]] != "incomplete":
                content = _joined(item["output"])
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": content})
        elif kind == "message":
            message = {"role": item["role"], "content": _joined(item["content"])}
            if item["role"] == "assistant" and reasoning:
                message["reasoning_content"], reasoning = reasoning, ""
            messages.append(message)
        elif item["status"] != "incomplete":
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            if not messages or messages[-1]["role"] != "assistant" or reasoning:
                messages.append({"role": "assistant", "content": ""})
                if reasoning:
                    messages[-1]["reasoning_content"], reasoning = reasoning, ""
            messages[-1].setdefault("tool_calls", []).append(call)
    return messages


def output_item(block: Block, id: str, status: str, logprobs: Sequence[Any] = ()) -> Item:
    """A piece of the model's message as an item."""
    if block.kind == "call":
        return {
            "id": id,
            "type": "function_call",
            "status": status,
            "call_id": block.id,
            "name": block.name,
            "arguments": block.text,
        }
    content = [] if status == "in_progress" else [output_part(block, logprobs)]
    if block.kind == "reasoning":
        return {"id": id, "type": "reasoning", "status": status, "summary": [], "content": content}
    return {"id": id, "type": "message", "status": status, "role": "assistant", "content": content}


def output_part(block: Block, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
    """The content of an item."""
    if block.kind == "reasoning":
        return {"type": "reasoning_text", "text": block.text}
    return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": list(logprobs)}


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as chat has them. Raises ApiError for tools that are no functions."""
    for i, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise ApiError(
                400,
                f"tools[{i}] is of type {str(tool.get('type'))[:100]!r}; this server has only 'function' "
                "tools.",
                param="tools",
            )
    return [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
        for tool in tools
    ]


def _input_item(item: Mapping[str, Any], where: str) -> Item:
    kind = item.get("type", "message")
    given = item.get("id")
    head = {"type": kind, "status": item.get("status")}
    if head["status"] not in _STATUSES:
        head["status"] = "completed"
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise _wrong(f"{where}.role must be one of {', '.join(_ROLES)}, not {str(role)[:100]!r}.")
        own = "output_text" if role == "assistant" else "input_text"
        content = _parts(item.get("content"), f"{where}.content", own)
        return {"id": _id(given, "msg"), **head, "role": role, "content": content}
    if kind == "function_call":
        texts = {key: _text(item, key, where) for key in ("call_id", "name", "arguments")}
        return {"id": _id(given, "fc"), **head, **texts}
    if kind == "function_call_output":
        output = item.get("output")
        if not isinstance(output, str):
            output = _parts(output, f"{where}.output", "input_text")
        return {"id": _id(given, "fco"), **head, "call_id": _text(item, "call_id", where), "output": output}
    if kind == "reasoning":
        summary = _parts(item.get("summary") or [], f"{where}.summary", "summary_text")
        content = _parts(item.get("content") or [], f"{where}.content", "reasoning_text")
        return {"id": _id(given, "rs"), **head, "summary": summary, "content": content}
    raise _wrong(
        f"{where} is of type {str(kind)[:100]!r}; this server takes 'message', 'function_call', "
        "'function_call_output' and 'reasoning'."
    )


def _parts(content: Any, where: str, kind: str) -> list[dict[str, Any]]:
    """A content as a list of parts of a kind; all that is text becomes it."""
    if isinstance(content, str):
        content = [{"type": kind, "text": content}]
    if not isinstance(content, list):
        raise _wrong(f"{where} must be a string or a list of parts.")
    parts: list[dict[str, Any]] = []
    for i, part in enumerate(content):
        given = part.get("type") if isinstance(part, Mapping) else None
        if given == "refusal":
            text = part.get("refusal")
        elif given == kind or given in _TEXTS:
            text = part.get("text")
        else:
            raise _wrong(f"{where}[{i}] is a part of type {str(given)[:100]!r}; this model takes only text.")
        if not isinstance(text, str):
            raise _wrong(f"{where}[{i}].text must be a string.")
        annotations = {"annotations": list[Any]()} if kind == "output_text" else {}
        parts.append({"type": kind, "text": text, **annotations})
    return parts


def _joined(content: str | Sequence[Mapping[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{key} must be a string.")
    return value


def _id(given: Any, prefix: str) -> str:
    return given if isinstance(given, str) and 0 < len(given) <= 128 else new_id(prefix)


def _wrong(message: str) -> ApiError:
    return ApiError(400, message, param="input")
