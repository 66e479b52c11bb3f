"""Prompts in every form a caller may write them, and conversations, become token ids."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard, TypeVar

from hexad.checks import shown
from hexad.errors import HexadError, PromptError

if TYPE_CHECKING:
    from hexad.checkpoint.tokenizer import Tokenizer

T = TypeVar("T")

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text; token ids; or a dict with "prompt" (text) or "prompt_token_ids" or both, and perhaps "cache_salt":
a text; the prefix cache is shared among prompts of the same salt only."""

Messages = Sequence[Mapping[str, Any]]
"""A conversation, as OpenAI writes it: [{"role": "user", "content": "Hi!"}, …]."""

_KEYS = {"prompt", "prompt_token_ids", "cache_salt"}


class TokenPrompt(NamedTuple):
    """A prompt as the engine takes it. text: None where only the tokens are known."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


class PromptReader:
    """Reads prompts with a model's tokenizer and chat template. It may be used from any thread."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def read(self, prompt: Prompt) -> TokenPrompt:
        """A prompt's text, if it has one, and its tokens. Raises PromptError where it is of no known form."""
        salt = None
        if isinstance(prompt, Mapping):
            text, token_ids, salt = (prompt.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
            if prompt.keys() - _KEYS or (text is None and token_ids is None):
                raise PromptError(
                    "A prompt dict has the keys 'prompt' or 'prompt_token_ids' or both, and perhaps "
                    f"'cache_salt', not {sorted(map(str, prompt))}."
                )
            for key, value in (("prompt", text), ("cache_salt", salt)):
                if value is not None and not isinstance(value, str):
                    raise PromptError(f"{key!r} must be a str, not {_described(value)}.")
        elif isinstance(prompt, str):
            text, token_ids = prompt, None
        else:
            text, token_ids = None, prompt
        if text is not None and token_ids is None:
            return TokenPrompt(text, self._tokenizer.encode(text), salt)
        if not is_list(token_ids) or not all(_is_token_id(i) for i in token_ids):
            raise PromptError(
                f"A prompt is a str, a list of int token ids or a dict, not {_described(token_ids)}."
            )
        return TokenPrompt(text, list(token_ids), salt)

    def chat(
        self, messages: Messages, *, variables: Mapping[str, Any] | None = None, **options: Any
    ) -> TokenPrompt:
        """A conversation in the model's chat template.

        options: those of `Tokenizer.apply_chat_template`. variables: more for the template to see; they go
        before options of the same name, as in vLLM.

        Raises PromptError where the messages are malformed or refused, TokenizerError where there is no
        template.
        """
        options |= dict(variables or {})
        if "messages" in options:
            raise PromptError("chat_template_kwargs must not set 'messages'; they are given by themselves.")
        text = self._tokenizer.apply_chat_template(messages, **{**options, "tokenize": False})
        # The template's text has the special tokens already.
        return TokenPrompt(text, self._tokenizer.encode(text, add_special=False))


def prompt_list(prompts: Any) -> list[Any]:
    """A list of prompts; one prompt is a list of one. A list that starts with an int is one prompt."""
    return [prompts] if not is_list(prompts) or (prompts and isinstance(prompts[0], int)) else list(prompts)


def conversation_list(messages: Any) -> list[Any]:
    """A list of conversations; one conversation is a list of one."""
    return list(messages) if is_list(messages) and all(map(is_list, messages)) else [messages]


def read_each(items: Sequence[Any], read: Callable[[Any], T]) -> list[T]:
    """What `read` makes of every item; an error says which of several items it is about."""
    results = []
    for i, item in enumerate(items):
        with naming_prompt(i, len(items)):
            results.append(read(item))
    return results


@contextmanager
def naming_prompt(index: int, total: int) -> Iterator[None]:
    """Adds to hexad's errors, as a note, which of several prompts they are about."""
    try:
        yield
    except HexadError as error:
        if total > 1:
            error.add_note(f"It is prompt {index} of the {total} given, counted from 0.")
        raise


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether a value is a sequence of other things than characters or bytes."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _described(value: object) -> str:
    return f"{type(value).__name__} {shown(value)}"
