"""Detokenizer: a request's tokens become text as they arrive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class TextStream(Protocol):
    """Decodes one sequence token by token; a tokenizer makes one per request."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; it may be empty where a character needs more tokens."""

    def flush(self) -> str:
        """The text still held back."""


class Detokenizer:
    """Collects the text of one request in `text`."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self.text = ""

    def push(self, token_ids: Iterable[int]) -> None:
        """Adds the text that these tokens complete."""
        for token_id in token_ids:
            self.text += self._stream.push(token_id)

    def finish(self) -> None:
        """Adds what was held back: no more tokens will come."""
        self.text += self._stream.flush()
