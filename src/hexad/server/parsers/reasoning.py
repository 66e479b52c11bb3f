"""How models mark their reasoning: a section at the beginning of a message."""

from __future__ import annotations

from dataclasses import dataclass

from hexad.server.parsers.text import Markers, Reading, Text


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """Reasoning between two markers, at the beginning of a message; anywhere else they are content.

    Newlines right inside the markers and after the closing one are layout, as in the
    "<think>\\n…\\n</think>\\n\\n" of Qwen3 and DeepSeek-R1, and belong to neither reasoning nor content.
    Reasoning that is never closed remains reasoning; so do markers of tool calls in it.

    needs_special_tokens: whether the markers are special tokens, so that the text must be decoded with them.
    """

    opening: str
    closing: str
    needs_special_tokens: bool = False

    @property
    def markers(self) -> tuple[str, str]:
        return self.opening, self.closing

    def is_opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends inside reasoning: a chat template has opened it for the model."""
        return prompt.rstrip().endswith(self.opening)

    def read(self, text: Text, started: bool) -> Reading[None]:
        """Reads the reasoning, if there is any. started: it has been opened before the text begins; a model
        may open it once more."""
        if started:
            text.leftover = text.reasoning
        yield from text.skip()
        if (yield from text.literal(self.opening)):
            text.release(text.syntax)
        else:
            text.unread()
            if not started:
                return
        text.leftover = text.reasoning
        yield from text.skip("\n")
        text.release(text.syntax)
        yield from text.until(Markers([self.closing]), text.reasoning, "\n")
        text.leftover = text.syntax
        yield from text.skip("\n")
        text.end_syntax()


THINK = ReasoningFormat("<think>", "</think>")
"""Qwen3, DeepSeek-R1, SmolLM3 and many others."""

MAGISTRAL = ReasoningFormat("[THINK]", "[/THINK]", needs_special_tokens=True)


def detect_reasoning_format(chat_template: str | None) -> ReasoningFormat | None:
    """How a model marks its reasoning, by what its chat template writes or takes out; None: not at all."""
    for format in (MAGISTRAL, THINK):
        if chat_template and any(marker in chat_template for marker in format.markers):
            return format
    return None
