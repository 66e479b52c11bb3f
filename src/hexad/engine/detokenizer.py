"""Detokenizer: a request's tokens become text as they arrive."""

from __future__ import annotations

from typing import Protocol


class TextStream(Protocol):
    """Decodes one sequence token by token; a tokenizer makes one per request. It never raises: any token that
    the model can draw may come, in any order."""

    def push(self, token_id: int) -> str:
        """The text that this token completes: "" where a character needs more tokens, or where the tokenizer
        knows no such token (logits may be wider than the vocabulary)."""

    def flush(self) -> str:
        """The text still held back."""


class Detokenizer:
    """Collects the text of one request."""

    def __init__(self, stream: TextStream) -> None:
        self._stream = stream
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """The text so far."""
        self._pieces = ["".join(self._pieces)]
        return self._pieces[0]

    def push(self, token_id: int) -> None:
        """Adds the text that this token completes."""
        self._pieces.append(self._stream.push(token_id))

    def finish(self) -> None:
        """Adds what was held back: no more tokens will come."""
        self._pieces.append(self._stream.flush())
