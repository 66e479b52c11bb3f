"""Detokenizer: a sequence's tokens become text as they arrive, up to a stop string."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol


class TextStream(Protocol):
    """Decodes one sequence token by token; a tokenizer makes one for each. It never raises: any token that
    the model can draw may come, in any order."""

    def push(self, token_id: int) -> str:
        """The text that this token completes: "" where a character needs more tokens, or where the tokenizer
        knows no such token (logits may be wider than the vocabulary)."""

    def flush(self) -> str:
        """The text still held back."""


class Detokenizer:
    """Collects the text of one sequence, and watches it for stop strings.

    stream: decodes the tokens. stop: strings, none of them empty. include_stop: the text ends after the stop
    string, not before it.

    The stop string that is complete first wins; of those that end at the same character, the longest.
    What could be the beginning of one is held back, so no text is shown that is cut off later.
    """

    __slots__ = ("_held", "_include_stop", "_matcher", "_pieces", "_state", "_stopped", "_stream", "_untaken")

    def __init__(self, stream: TextStream, stop: tuple[str, ...] = (), *, include_stop: bool = False) -> None:
        self._stream = stream
        self._matcher = _matcher(stop) if stop else None
        self._include_stop = include_stop
        self._state = 0
        self._held = ""  # the end of the text that is not shown yet
        self._stopped = False
        # What is shown, twice: `text` joins the one, `take` empties the other.
        self._pieces: list[str] = []
        self._untaken: list[str] = []

    @property
    def text(self) -> str:
        """What is known to be in the final text; after `finish`, all of it."""
        if len(self._pieces) > 1:
            self._pieces = ["".join(self._pieces)]
        return self._pieces[0] if self._pieces else ""

    def take(self) -> str:
        """What has come to `text` since the last call."""
        taken = "".join(self._untaken)
        self._untaken.clear()
        return taken

    def push(self, token_id: int, *, check_stop: bool = True) -> str | None:
        """Adds the text that a token completes. Returns the stop string that this text completes, if any; the
        text ends there, and there is nothing more to push.

        check_stop: False for a token too early to stop at: no stop string ends in its text, though one that
            ends in a later token's may begin there.
        """
        return self._add(self._stream.push(token_id), check_stop)

    def finish(self) -> str | None:
        """Adds what the stream holds back, and shows all that was held back: no more tokens will come.
        Returns the stop string that this completes, if any. After a stop it does nothing."""
        if self._stopped:
            return None
        found = self._add(self._stream.flush(), True)
        self._show(self._held)
        self._held = ""
        return found

    def _add(self, new: str, check_stop: bool) -> str | None:
        matcher = self._matcher
        if matcher is None:
            self._show(new)
            return None
        if not new:
            return None
        text = self._held + new
        self._state, length, end = matcher.advance(self._state, new, check_stop)
        if length:
            end += len(self._held)
            stop = text[end - length : end]
            self._show(text[: end if self._include_stop else end - length])
            self._held = ""
            self._stopped = True
            return stop
        shown = len(text) - matcher.hold_back[self._state]
        self._show(text[:shown])
        self._held = text[shown:]
        return None

    def _show(self, text: str) -> None:
        if text:
            self._pieces.append(text)
            self._untaken.append(text)


class _Matcher:
    """The automaton of Aho and Corasick (1975, doi:10.1145/360825.360855) for a set of strings.

    A state is the longest end of the text that one of the strings begins with; the text costs the same per
    character however many and long the strings are.

    hold_back: per state, how many of the text's last characters can yet become one of the strings.
    """

    def __init__(self, strings: tuple[str, ...]) -> None:
        edges: list[dict[str, int]] = [{}]
        depth, match = [0], [0]  # match: length of the longest string that ends in this state
        for string in strings:
            state = 0
            for char in string:
                following = edges[state].setdefault(char, len(edges))
                if following == len(edges):
                    edges.append({})
                    depth.append(depth[state] + 1)
                    match.append(0)
                state = following
            match[state] = len(string)
        # Breadth first, so that the shorter end that a state falls back to is always done before it.
        fallback = [0] * len(edges)
        queue = list(edges[0].values())
        for state in queue:
            match[state] = match[state] or match[fallback[state]]
            for char, following in edges[state].items():
                shorter = fallback[state]
                while shorter and char not in edges[shorter]:
                    shorter = fallback[shorter]
                fallback[following] = edges[shorter].get(char, 0)
                queue.append(following)
        self.hold_back = depth
        for state in queue:
            if not edges[state]:  # a whole string that begins no longer one
                self.hold_back[state] = self.hold_back[fallback[state]]
        self._edges, self._fallback, self._match = edges, fallback, match

    def advance(self, state: int, text: str, stop: bool) -> tuple[int, int, int]:
        """Reads on from a state, up to the first place where a string ends if it shall `stop` there. Returns
        the new state, that string's length and its end in this text; (state, 0, 0) where it read all."""
        edges, fallback, match = self._edges, self._fallback, self._match
        for end, char in enumerate(text, 1):
            while state and char not in edges[state]:
                state = fallback[state]
            state = edges[state].get(char, 0)
            if stop and match[state]:
                return state, match[state], end
        return state, 0, 0


_matcher = lru_cache(maxsize=16)(_Matcher)  # building takes about a microsecond per character
