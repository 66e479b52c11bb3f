"""Conversations and tools as Anthropic writes them, brought into the form that chat has."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hexad.server.errors import ApiError

Message = dict[str, Any]


def conversation(
    messages: Sequence[Mapping[str, Any]], system: str | Sequence[Mapping[str, Any]] | None
) -> list[Message]:
    """Messages as chat has them; successive turns of one role are one turn. Raises ApiError."""
    turns: list[Message] = []
    if system:
        turns.append({"role": "system", "content": _text(system, "system")})
    for i, message in enumerate(messages):
        for turn in _turns(message, f"messages[{i}]"):
            last = turns[-1] if turns else {}
            if turn["role"] == last.get("role") != "tool":
                last["content"] = "\n".join(text for text in (last["content"], turn["content"]) if text)
                if reasoning := turn.get("reasoning_content"):
                    last["reasoning_content"] = last.get("reasoning_content", "") + reasoning
                if calls := turn.get("tool_calls"):
                    last.setdefault("tool_calls", []).extend(calls)
            else:
                turns.append(turn)
    return turns


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as chat has them. Raises ApiError for Anthropic's own, which run on its servers."""
    functions = []
    for i, tool in enumerate(tools):
        kind, name, schema = tool.get("type"), tool.get("name"), tool.get("input_schema")
        if kind not in (None, "custom"):
            raise _wrong(
                f"tools[{i}] is of type {str(kind)[:100]!r}; there are only 'custom' tools here.", "tools"
            )
        if not isinstance(name, str) or not name:
            raise _wrong(f"tools[{i}].name must be a non-empty string.", "tools")
        if not isinstance(schema, Mapping):
            raise _wrong(f"tools[{i}].input_schema must be a JSON schema.", "tools")
        function = {"name": name, "description": tool.get("description") or "", "parameters": schema}
        functions.append({"type": "function", "function": function})
    return functions


def _turns(message: Mapping[str, Any], where: str) -> list[Message]:
    """A message as one of chat's, after the results of tools that are in it."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise _wrong(f"{where}.role must be 'user', 'assistant' or 'system', not {str(role)[:100]!r}.")
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list) or not content:
        raise _wrong(f"{where}.content must be a string or a non-empty list of blocks.")
    results: list[Message] = []
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    reasoning = ""
    for i, block in enumerate(content):
        here = f"{where}.content[{i}]"
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "text":
            texts.append(_string(block, "text", here))
        elif kind == "thinking" and role == "assistant":
            reasoning += _string(block, "thinking", here)
        elif kind == "redacted_thinking" and role == "assistant":
            continue  # nobody here can read it
        elif kind == "tool_use" and role == "assistant":
            calls.append(_call(block, here))
        elif kind == "tool_result" and role == "user":
            text = _text(block.get("content") or "", f"{here}.content")
            if block.get("is_error"):
                text = f"Error: {text}"
            results.append(
                {"role": "tool", "tool_call_id": _string(block, "tool_use_id", here), "content": text}
            )
        else:
            raise _wrong(
                f"{here} is a block of type {str(kind)[:100]!r}, which this model does not take in a message "
                f"of the {role}."
            )
    turn: Message = {"role": role, "content": "\n".join(texts)}
    if reasoning:
        turn["reasoning_content"] = reasoning
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn] if texts or calls or reasoning or not results else results


def _call(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    given = block.get("input")
    if not isinstance(given, Mapping):
        raise _wrong(f"{where}.input must be a JSON object.")
    function = {"name": _string(block, "name", where), "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": _string(block, "id", where), "type": "function", "function": function}


def _text(content: Any, where: str) -> str:
    """A text, or the texts of blocks."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _wrong(f"{where} must be a string or a list of blocks.", where.split("[")[0])
    texts = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind != "text":
            raise _wrong(
                f"{where}[{i}] is a block of type {str(kind)[:100]!r}; this model takes only text there.",
                where.split("[")[0],
            )
        texts.append(_string(block, "text", f"{where}[{i}]"))
    return "\n".join(texts)


def _string(block: Mapping[str, Any], key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise _wrong(f"{where}.{key} must be a string.", where.split("[")[0])
    return value


def _wrong(message: str, param: str = "messages") -> ApiError:
    return ApiError(400, message, param=param)
