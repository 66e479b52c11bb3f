"""A generated text as the formats read it: one character at a time, and sorted as soon as it is certain.

Formats are generators that stop where they need a character that has not come yet, so they read like any
recursive descent, and how the text was cut into pieces cannot make a difference.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Generator
from typing import TypeAlias, TypeVar

from hexad.server.parsers.deltas import Delta, ToolCallDelta

T = TypeVar("T")
Reading: TypeAlias = Generator[None, str, T]
"""Reads a part of the text and returns something; waits, at a `yield`, to be sent one more character."""

SPACE = " \t\r\n"


class Markers:
    """Texts to look for in a longer one as it arrives. None may be part of another, or have white space."""

    def __init__(self, texts: Collection[str]) -> None:
        self.texts = frozenset(texts) - {""}
        self._beginnings = frozenset(text[:end] for text in self.texts for end in range(1, len(text) + 1))

    def advance(self, tail: str, char: str) -> str:
        """The longest end of `tail` and `char` that a marker begins with. It is one of `texts` where a marker
        is complete; then go on with ""."""
        tail += char
        while tail and tail not in self._beginnings:
            tail = tail[1:]
        return tail


class Text:
    """What is read, in this order: characters not read yet, those held (read, but not known to be what), and
    what they were sorted into.

    new_id: makes a tool call's id. tool_names: tools there are; None for any.
    """

    def __init__(self, new_id: Callable[[], str], tool_names: Collection[str] | None) -> None:
        self.tool_names = tool_names
        self.num_calls = 0
        self.leftover: Callable[[str], None] = self.content
        """Where what is held belongs if nothing follows it."""
        self._new_id = new_id
        self._ahead: deque[str] = deque()
        self._held: list[str] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[tuple[int, str | None, str | None, list[str]]] = []

    def take_delta(self) -> Delta:
        """What was sorted since the last time."""
        calls = tuple(
            ToolCallDelta(index, id, name, "".join(pieces)) for index, id, name, pieces in self._calls
        )
        delta = Delta("".join(self._reasoning), "".join(self._content), calls)
        self._reasoning.clear()
        self._content.clear()
        self._calls.clear()
        return delta

    # Sorting

    def reasoning(self, text: str) -> None:
        if text:
            self._reasoning.append(text)

    def content(self, text: str) -> None:
        if text:
            self._content.append(text)

    def arguments(self, text: str) -> None:
        """More of the latest call's arguments."""
        if not text:
            return
        if not self._calls:
            self._calls.append((self.num_calls - 1, None, None, []))
        self._calls[-1][3].append(text)

    def syntax(self, text: str) -> None:
        """What belongs to the format, and not to the message."""

    def begin_call(self, name: str) -> None:
        """What is held, and all up to the next content, is a call's."""
        self._held.clear()
        self._calls.append((self.num_calls, self._new_id(), name, []))
        self.num_calls += 1
        self.leftover = self.syntax

    def end_syntax(self) -> None:
        """What is held was still the format's; what comes is content until something else is known."""
        self.release(self.syntax)
        self.leftover = self.content

    def release(self, give: Callable[[str], None], *, keep: int = 0) -> None:
        """Gives what is held, but for the last `keep` characters."""
        end = len(self._held) - keep
        give("".join(self._held[:end]))
        del self._held[:end]

    # Reading

    def peek(self) -> Reading[str]:
        """The next character, which stays where it is."""
        if not self._ahead:
            self._ahead.append((yield))
        return self._ahead[0]

    def take(self) -> str:
        """Reads the character that `peek` has seen, and holds it."""
        char = self._ahead.popleft()
        self._held.append(char)
        return char

    def unread(self) -> None:
        """What is held is to be read again."""
        self._ahead.extendleft(reversed(self._held))
        self._held.clear()

    def unread_rest(self) -> str:
        """All that is not sorted; none of it will be read again."""
        self.unread()
        rest = "".join(self._ahead)
        self._ahead.clear()
        return rest

    def skip(self, chars: str = SPACE) -> Reading[None]:
        """Reads these characters, however many there are, and holds them."""
        while (yield from self.peek()) in chars:
            self.take()

    def literal(self, expected: str) -> Reading[bool]:
        """Reads this text and holds it, or as much of it as there is. Returns whether it was all there."""
        for char in expected:
            if (yield from self.peek()) != char:
                return False
            self.take()
        return True

    def until(self, markers: Markers, give: Callable[[str], None], padding: str) -> Reading[str]:
        """Gives what comes before a marker. Held are the marker, which is returned, or what could yet become
        one, and `padding` right before it."""
        tail = ""
        while True:
            char = yield from self.peek()
            self.take()
            before, tail = tail, markers.advance(tail, char)
            if tail in markers.texts:
                return tail
            if char in padding if not before else len(tail) > len(before):
                continue  # only what is held has become more
            end = len(self._held) - len(tail)
            while end and self._held[end - 1] in padding:
                end -= 1
            self.release(give, keep=len(self._held) - end)
