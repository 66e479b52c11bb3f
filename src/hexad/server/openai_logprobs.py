"""Logprobs as OpenAI's APIs list them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hexad.outputs import CompletionOutput, Logprob, PositionLogprobs, RequestOutput
from hexad.server.openai_schemas import GenerationBody
from hexad.server.service import Service


def prompt_logprobs(body: GenerationBody, output: RequestOutput) -> dict[str, Any]:
    """vLLM's field, where it was asked for."""
    if body.prompt_logprobs is None or output.prompt_logprobs is None:
        return {}
    return {
        "prompt_logprobs": [
            None if entry is None else {str(i): _logprob(logprob) for i, logprob in entry.items()}
            for entry in output.prompt_logprobs
        ]
    }


def _logprob(logprob: Logprob) -> dict[str, Any]:
    return {
        "logprob": _finite(logprob.logprob),
        "rank": logprob.rank,
        "decoded_token": logprob.decoded_token,
    }


def _finite(logprob: float) -> float:
    """JSON has no -inf."""
    return max(logprob, -9999.0)


def chat_logprobs(service: Service, completion: CompletionOutput, as_ids: bool) -> dict[str, Any] | None:
    """Of a chat's choice; None where none were asked for."""
    if completion.logprobs is None:
        return None

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        return {
            "token": _token(token_id, logprob, as_ids),
            "logprob": _finite(logprob.logprob),
            "bytes": list(service.tokenizer.token_bytes(token_id)),
        }

    return {
        "content": [
            {
                **entry(token_id, position[token_id]),
                "top_logprobs": [entry(i, logprob) for i, logprob in _likeliest(position, token_id)],
            }
            for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    }


def _likeliest(position: PositionLogprobs, drawn: int) -> list[tuple[int, Logprob]]:
    """The entries that are there for being likely: the drawn token is one of them only by its rank."""
    count = len(position)
    ranked = sorted(position.items(), key=lambda item: item[1].rank or 0)
    if (position[drawn].rank or 0) > count - 1:
        return [item for item in ranked if item[0] != drawn]
    return ranked


def _token(token_id: int, logprob: Logprob, as_ids: bool) -> str:
    return f"token_id:{token_id}" if as_ids else (logprob.decoded_token or "")


class CompletionLogprobs:
    """Logprobs as /v1/completions lists them."""

    def __init__(self, service: Service, as_ids: bool) -> None:
        self._service = service
        self._as_ids = as_ids
        self._offset = 0
        self._lists: dict[str, list[Any]] = {}
        self.take()

    def add(
        self, token_ids: Sequence[int], positions: Sequence[PositionLogprobs | None]
    ) -> CompletionLogprobs:
        """Takes more tokens."""
        lists = self._lists
        for token_id, position in zip(token_ids, positions, strict=True):
            if position is None:  # the first token of a prompt
                position = {token_id: Logprob(0.0, None, self._service.tokenizer.token_text(token_id))}
                lists["token_logprobs"].append(None)
                lists["top_logprobs"].append(None)
            else:
                lists["token_logprobs"].append(_finite(position[token_id].logprob))
                lists["top_logprobs"].append(
                    {_token(i, one, self._as_ids): _finite(one.logprob) for i, one in position.items()}
                )
            token = _token(token_id, position[token_id], self._as_ids)
            lists["tokens"].append(token)
            lists["text_offset"].append(self._offset)
            self._offset += len(token)
        return self

    def value(self) -> dict[str, list[Any]]:
        """All that is not taken yet."""
        return self._lists

    def take(self) -> dict[str, list[Any]]:
        """`value`; it is taken then."""
        value = self._lists
        self._lists = {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}
        return value
