"""MessageParser: reasoning, content and tool calls of one continuation, told apart while it streams."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache

from hexad.server.parsers.deltas import Delta
from hexad.server.parsers.formats import ToolFormat
from hexad.server.parsers.reasoning import ReasoningFormat
from hexad.server.parsers.text import Markers, Reading, Text


class MessageParser:
    """Reads the text of one generated continuation as it comes. It never raises: what is malformed is
    content, or stands in a call's arguments as it is.

    However the text is cut, the deltas join to the same message. All of the text is in it but the formats'
    own words (markers, and the JSON around a call's arguments) and the white space around them.

    tools: how the model writes calls; None: it is not to make any, and nothing is looked for.
    reasoning: how it writes its reasoning; None: it is not told apart.
    starts_in_reasoning: the prompt has opened the reasoning already.
    tool_names: of the tools there are; a call of another is content. None: any name will do.
    special_tokens: texts that are left out wherever they stand, the formats' own markers excepted: special
        tokens' that shall not be seen although the text was decoded with them. A model that spells one out
        in plain letters loses it, so this is no place for such as "<s>", which is HTML as well.
    """

    def __init__(
        self,
        *,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        starts_in_reasoning: bool = False,
        tool_names: Collection[str] | None = None,
        special_tokens: Collection[str] = (),
    ) -> None:
        self._text = Text(tools.new_id if tools else str, tool_names)
        self._tools = tools
        self._reasoning = reasoning
        markers = {*(tools.markers if tools else ()), *(reasoning.markers if reasoning else ())}
        dropped = frozenset(special_tokens) - markers
        self._dropped = _markers(dropped) if dropped else None
        self._tail = ""
        self._reading: Reading[None] | None = self._read(starts_in_reasoning)
        self._advance(None)

    @property
    def made_tool_calls(self) -> bool:
        """Whether a call has begun: the finish reason is "tool_calls" then."""
        return self._text.num_calls > 0

    def push(self, text: str) -> Delta:
        """What is certain once this much more text is known."""
        self._feed(self._without_dropped(text))
        return self._text.take_delta()

    def finish(self) -> Delta:
        """What was held back. Nothing is pushed after it."""
        tail, self._tail = self._tail, ""
        self._feed(tail)
        if self._reading is not None:
            self._reading.close()
            self._reading = None
            self._text.leftover(self._text.unread_rest())
        return self._text.take_delta()

    def _read(self, starts_in_reasoning: bool) -> Reading[None]:
        if self._reasoning is not None:
            yield from self._reasoning.read(self._text, starts_in_reasoning)
        if self._tools is not None:
            yield from self._tools.read(self._text)

    def _feed(self, text: str) -> None:
        for i, char in enumerate(text):
            if self._reading is None:
                self._text.content(text[i:])
                return
            self._advance(char)

    def _advance(self, char: str | None) -> None:
        """Reads one more character; None to begin with. Once the formats have read all that is theirs, the
        rest is content."""
        assert self._reading is not None
        try:
            if char is None:
                next(self._reading)
            else:
                self._reading.send(char)
        except StopIteration:
            self._reading = None
            self._text.content(self._text.unread_rest())

    def _without_dropped(self, text: str) -> str:
        if self._dropped is None:
            return text
        kept = []
        for char in text:
            known = self._tail + char
            self._tail = self._dropped.advance(self._tail, char)
            kept.append(known[: len(known) - len(self._tail)])
            if self._tail in self._dropped.texts:
                self._tail = ""
        return "".join(kept)


_markers = lru_cache(maxsize=16)(Markers)  # Llama 3 has 256 special tokens
