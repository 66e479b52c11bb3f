"""A tokenizer without a vocabulary, for tests of what stands above the engine."""

from __future__ import annotations

from typing import Any

from hexad.errors import PromptError

VOCAB = 160


class CharacterStream:
    def push(self, token_id: int) -> str:
        return chr(token_id)

    def flush(self) -> str:
        return ""


class CharacterTokenizer:
    """A token is a character. A conversation is written "u:hi|a:", each turn by the initial of its role."""

    vocab_size = VOCAB
    eos_ids = frozenset({VOCAB - 1})
    special_ids = frozenset({0, 1, 2})

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def stream(self, **options: bool) -> CharacterStream:
        return CharacterStream()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)

    def tokens_containing(self, texts: Any) -> list[int]:
        return [i for i in range(VOCAB) if chr(i) in texts]

    def apply_chat_template(
        self,
        messages: Any,
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Any,
        tokenize: bool,
        mood: str = "",
    ) -> str:
        assert not tokenize
        if not messages:
            raise PromptError("The conversation is empty.")
        turns = [f"{message['role'][0]}:{message['content']}" for message in messages]
        last = "a:" if add_generation_prompt else ""
        begin = "".join([chat_template or "", *(tool["name"] for tool in tools or ()), mood])
        return begin + "|".join([*turns, last][: len(turns) if continue_final_message else None])
