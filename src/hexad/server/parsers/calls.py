"""Tool calls written as JSON: {"name": …, "arguments": …}, and the scanner of JSON values under it.

The scanner follows strings, escapes and brackets, so as to know where a value ends; what stands between the
brackets is the model's business. Text outside strings that no JSON has, or a bracket that closes another's,
ends it before that character.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from hexad.server.parsers.text import SPACE, Reading, Text

_CLOSING = {"{": "}", "[": "]"}
_SCALAR = frozenset("+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_BETWEEN = frozenset(",:" + SPACE)

_ARGUMENTS = ("arguments", "parameters")
_MEMBERS = frozenset(["name", *_ARGUMENTS, "type", "id"])
"""What may come before a call is known to be one. Any other JSON is released as soon as its first key shows
it to be something else."""


class NotACallError(Exception):
    """What is held is no call."""


class BrokenArgumentsError(Exception):
    """The arguments of a call that has begun go on with what is no JSON."""


def read_value(text: Text, give: Callable[[str], None]) -> Reading[None]:
    """Reads a JSON value, and gives each character of it. Raises NotACallError before one that cannot be."""
    closing: list[str] = []
    while True:
        char = yield from text.peek()
        if char == '"':
            yield from _read_string(text, give)
        elif char in _SCALAR:
            while (yield from text.peek()) in _SCALAR:
                give(text.take())
        elif char in _CLOSING:
            closing.append(_CLOSING[char])
            give(text.take())
        elif closing and char == closing[-1]:
            closing.pop()
            give(text.take())
        elif closing and char in _BETWEEN:
            give(text.take())
        else:
            raise NotACallError
        if not closing:
            return


def read_call(text: Text) -> Reading[None]:
    """Reads an object that is a call: its name and its arguments, in any order.

    The arguments are an object, or a string that holds one's JSON, or null or "" for an empty one; they may
    be missing where it is known which tools there are. Once the call is complete, whatever else the object
    has, or lacks, makes no difference.

    Raises NotACallError, with all of it held; BrokenArgumentsError.
    """
    before = text.num_calls
    try:
        yield from _read_members(text)
    except NotACallError:
        if text.num_calls == before:
            raise


def read_arguments(text: Text, name: str) -> Reading[None]:
    """Reads an object that is the arguments of a call, which it begins. Raises NotACallError where something
    else stands there; BrokenArgumentsError."""
    if (yield from text.peek()) != "{":
        raise NotACallError
    text.begin_call(name)

    def give(char: str) -> None:
        text.release(text.arguments)

    try:
        yield from read_value(text, give)
    except NotACallError as error:
        raise BrokenArgumentsError from error


def is_tool(text: Text, name: str) -> bool:
    return bool(name) and (text.tool_names is None or name in text.tool_names)


def _read_members(text: Text) -> Reading[None]:
    before = text.num_calls
    name = arguments = None
    yield from _expect(text, "{")
    yield from text.skip()
    while (yield from text.peek()) != "}":
        key = yield from _read_text(text)
        if key not in _MEMBERS and text.num_calls == before:
            raise NotACallError
        yield from text.skip()
        yield from _expect(text, ":")
        yield from text.skip()
        if text.num_calls > before:
            yield from read_value(text, text.syntax)
        elif key == "name" and name is None:
            name = yield from _read_text(text)
            if not is_tool(text, name):
                raise NotACallError
        elif key in _ARGUMENTS and arguments is None:
            if name is not None and (yield from text.peek()) == "{":
                yield from read_arguments(text, name)
            else:
                arguments = yield from _read_held_arguments(text)
        else:
            yield from read_value(text, text.syntax)
        if name is not None and arguments is not None and text.num_calls == before:
            text.begin_call(name)
            text.arguments(arguments)
        yield from text.skip()
        if (yield from text.peek()) == ",":
            text.take()
            yield from text.skip()
        elif (yield from text.peek()) != "}":
            raise NotACallError
    if text.num_calls == before:
        if name is None or text.tool_names is None:
            raise NotACallError
        text.take()
        text.begin_call(name)
        text.arguments("{}")
    else:
        text.take()


def _read_held_arguments(text: Text) -> Reading[str]:
    """Reads arguments that cannot be given yet, or only once they are complete, and returns their JSON."""
    pieces: list[str] = []
    yield from read_value(text, pieces.append)
    written = "".join(pieces)
    if written in ("null", '""'):
        return "{}"
    if written.startswith('"'):
        inner = _decoded(written)
        return inner if _is_object(inner) else written
    if not written.startswith("{"):
        raise NotACallError
    return written


def _read_text(text: Text) -> Reading[str]:
    """Reads a string, and returns what it says."""
    pieces: list[str] = []
    yield from _read_string(text, pieces.append)
    return _decoded("".join(pieces))


def _read_string(text: Text, give: Callable[[str], None]) -> Reading[None]:
    if (yield from text.peek()) != '"':
        raise NotACallError
    give(text.take())
    while True:
        char = yield from text.peek()
        give(text.take())
        if char == '"':
            return
        if char == "\\":
            yield from text.peek()
            give(text.take())


def _expect(text: Text, char: str) -> Reading[None]:
    if (yield from text.peek()) != char:
        raise NotACallError
    text.take()


def _decoded(string: str) -> str:
    """What a JSON string says; half of a surrogate pair says U+FFFD."""
    try:
        said: str = json.loads(string, strict=False)
    except ValueError as error:
        raise NotACallError from error
    return said.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_object(written: str) -> bool:
    try:
        return isinstance(json.loads(written), dict)
    except (ValueError, RecursionError):
        return False
