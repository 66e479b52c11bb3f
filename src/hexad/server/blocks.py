"""A message as a row of blocks, of which one is open at a time: how the Responses and Anthropic stream it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hexad.server.parsers.deltas import Delta

Kind = Literal["reasoning", "text", "call"]


@dataclass(slots=True)
class Block:
    """A piece of a message, so far. text: a call's arguments, as JSON. id, name: a call's."""

    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


class Blocks:
    """Puts a message together.

    `push` and `close` yield what happens: ("begin", block, ""), ("more", block, text) for text that has come
    to it, ("end", block, ""). The block is the last of `blocks`, which has changed already.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open = False

    def push(self, delta: Delta) -> Iterator[tuple[str, Block, str]]:
        """Takes what has come to the message."""
        calls = delta.tool_calls
        if calls and calls[0].name is None:  # it goes on before anything else begins
            yield self._add(calls[0].arguments)
            calls = calls[1:]
        if delta.reasoning:
            yield from self._more("reasoning", delta.reasoning)
        if delta.content:
            yield from self._more("text", delta.content)
        for call in calls:
            if call.name is not None:
                yield from self._begin(Block("call", id=call.id or "", name=call.name))
            if call.arguments:
                yield self._add(call.arguments)

    def close(self) -> Iterator[tuple[str, Block, str]]:
        """Ends the block that is open."""
        if self._open:
            self._open = False
            yield "end", self.blocks[-1], ""

    def _more(self, kind: Kind, text: str) -> Iterator[tuple[str, Block, str]]:
        if not self._open or self.blocks[-1].kind != kind:
            yield from self._begin(Block(kind))
        yield self._add(text)

    def _begin(self, block: Block) -> Iterator[tuple[str, Block, str]]:
        yield from self.close()
        self._open = True
        self.blocks.append(block)
        yield "begin", block, ""

    def _add(self, text: str) -> tuple[str, Block, str]:
        self.blocks[-1].text += text
        return "more", self.blocks[-1], text


def call_arguments(text: str) -> dict[str, Any] | None:
    """A call's arguments; None where the model was cut off in them, or wrote no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
