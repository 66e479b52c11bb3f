"""ApiError: what a request over HTTP ends with that cannot be answered. Each API writes it in its own way."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hexad.errors import (
    BackendError,
    ConfigError,
    EngineError,
    HexadError,
    ParamsError,
    PromptError,
    TokenizerError,
)
from hexad.params import SamplingParams


class ApiError(Exception):
    """An HTTP status with the reason in words.

    kind: OpenAI's `type`, such as "invalid_request_error". param: the field that is wrong. code: OpenAI's
    `code`, for programs. headers: to send along.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = (
            kind or _KINDS.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
        )
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}

_FIELDS = frozenset(SamplingParams.__dataclass_fields__)


def api_error(error: HexadError) -> ApiError:
    """The ApiError that says what one of hexad's errors says. What a caller can set right is a 400."""
    message = " ".join([str(error), *getattr(error, "__notes__", [])])
    if isinstance(error, PromptError):
        too_long = "with a context of" in message or "can grow to" in message
        field = re.match(r"messages|tools", message)
        return ApiError(
            400,
            message,
            param=field[0] if field else None,
            code="context_length_exceeded" if too_long else None,
        )
    if isinstance(error, ParamsError | ConfigError | TokenizerError):
        first = re.match(r"(?:each (?:key )?of )?(\w+)", message)
        return ApiError(400, message, param=first[1] if first and first[1] in _FIELDS else None)
    if isinstance(error, EngineError):
        return ApiError(503, message)
    assert isinstance(error, BackendError | HexadError)
    return ApiError(500, message)


class ClientGone(Exception):
    """The client hung up: nobody is left to answer."""
