"""The ASGI application: the APIs' routes behind one gate, and what they share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from hexad import __version__
from hexad.server import (
    anthropic,
    embeddings,
    kobold,
    llama_server,
    ollama,
    openai,
    operations,
    responses,
    tokens,
)
from hexad.server.chat import Chat
from hexad.server.errors import ApiError
from hexad.server.http import ErrorBody, Gate, JSONResponse
from hexad.server.metrics import Metrics
from hexad.server.response_store import ResponseStore
from hexad.server.settings import ServerSettings
from hexad.server.tracing import Tracer

WEB = Path(__file__).with_name("web")

_APIS: tuple[tuple[str, ErrorBody], ...] = (
    *((path, kobold.error_body) for path in ("/api/extra/", "/api/v1/", "/api/latest/")),
    ("/api/", ollama.error_body),
    *(
        (path, llama_server.error_body)
        for path in (
            "/completion", "/infill", "/embedding", "/tokenize", "/detokenize", "/apply-template", "/props",
            "/slots", "/models",
        )
    ),
    ("/v1/messages", anthropic.error_body),
    ("", openai.error_body),
)  # fmt: skip
"""Prefixes of paths, the longest first, and how errors are written below them."""

_OPEN = frozenset({"/", "/docs", "/openapi.json", "/health", "/ping", "/version", "/favicon.ico"})
"""Paths that need no key."""

_BESIDE = frozenset({"/metrics", "/load"})
"""Paths that are answered without the model, too."""

# No outside requests, and nothing from elsewhere in the page.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)


class State:
    """How the server is: `chat` is there once the model is loaded; `draining`: it takes nothing new."""

    def __init__(self) -> None:
        self.chat: Chat | None = None
        self.draining = False
        self.broken = False
        self.metrics = Metrics()

    def refusal(self, path: str = "") -> ApiError | None:
        """Why nothing is answered now."""
        if self.broken:
            return ApiError(503, "The engine broke; the server is going down.", code="engine_broken")
        if self.draining:
            return ApiError(503, "The server is shutting down.", code="shutting_down")
        if self.chat is None:
            return ApiError(503, "The model is still loading.", code="loading", headers={"Retry-After": "1"})
        return None


def create_app(settings: ServerSettings, state: State, tracer: Tracer | None = None) -> ASGIApp:
    """The application. `state` is filled in as the server comes up. Raises ConfigError for keys that cannot
    be read."""
    app = FastAPI(
        title="hexad",
        version=__version__,
        description="Large language models on a plain CPU, behind the APIs that clients already speak.",
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json",
        root_path=settings.root_path,
        responses={
            400: {"description": "What was asked is wrong; the message says what."},
            401: {"description": "The API key is missing or wrong."},
            404: {"description": "There is no such model or thing."},
            408: {"description": "The body did not come in time."},
            413: {"description": "The body is too long."},
            429: {"description": "Too many requests wait; Retry-After says for how long."},
            500: {"description": "The server failed."},
            503: {"description": "The model is loading, or the server is shutting down."},
            504: {"description": "The request took too long."},
        },
    )
    app.state.server = state
    app.state.responses = ResponseStore(settings.max_stored_responses, int(settings.max_stored_mib * 2**20))
    app.state.kobold = kobold.Sessions()
    doors = operations, openai, embeddings, responses, anthropic, llama_server, tokens, kobold, ollama
    for door in doors:
        app.include_router(door.router)

    for path, name in (("/", "index.html"), ("/docs", "docs.html")):
        app.add_route(path, _page(WEB / name), include_in_schema=False)

    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(ApiError, _failed)
    app.add_exception_handler(Exception, _broke)
    app.openapi = _with_our_errors(app.openapi)  # type: ignore[method-assign]
    gate = Gate(
        app,
        keys=settings.api_keys,
        open_paths=_OPEN,
        root_path=settings.root_path,
        max_body=int(settings.max_body_mib * 2**20),
        body_timeout=settings.body_timeout,
        refusal=lambda path: None if path in _BESIDE else state.refusal(),
        error_body=error_body,
        metrics=state.metrics,
        tracer=tracer,
    )
    if not settings.cors:
        return gate
    # Outermost, so that a page may read what the gate refuses, too.
    return CORSMiddleware(
        gate,
        allow_origins=settings.cors,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Retry-After"],
    )


def _page(file: Path) -> Callable[[Request], Response]:
    def page(request: Request) -> Response:
        headers = {"Content-Security-Policy": _POLICY, "Cache-Control": "no-cache"}
        return Response(file.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)

    return page


def error_body(path: str) -> ErrorBody:
    """How errors are written at a path."""
    return next(body for prefix, body in _APIS if path.startswith(prefix))


def _write(request: Request, error: ApiError) -> Response:
    return JSONResponse(error_body(request.scope["hexad:path"])(error), error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _write(request, error)


async def _broke(request: Request, error: Exception) -> Response:
    """What nobody foresaw, in the API's form; the gate logs it."""
    if isinstance(error, RecursionError):
        return _write(request, ApiError(400, "The body nests too deep."))
    return _write(request, ApiError(500, "The server failed at this request; its log says why."))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.__cause__ is not None:  # while FastAPI read the body
        return _write(request, _of_body(error.__cause__))
    if error.status_code == 404:
        message = f"There is nothing at {request.method} {request.url.path}; /docs lists what there is."
    elif error.status_code == 405:
        message = f"{request.method} is not what {request.url.path} takes."
    else:
        message = str(error.detail)
    return _write(request, ApiError(error.status_code, message, headers=error.headers))


def _of_body(cause: BaseException) -> ApiError:
    """What is wrong with a body that could not be read as JSON."""
    if isinstance(cause, ApiError):  # the gate's: it is too long, or too slow
        return cause
    if isinstance(cause, RecursionError):
        return ApiError(400, "The body nests too deep.", code="invalid_json")
    if isinstance(cause, UnicodeDecodeError):
        return ApiError(
            400, f"The body is not UTF-8: {cause.reason} at byte {cause.start}.", code="invalid_json"
        )
    return ApiError(400, f"The body cannot be read: {str(cause)[:200]}.", code="invalid_json")


async def _invalid(request: Request, error: Exception) -> Response:
    """The first thing that is wrong with a body, with its field."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    path = [part for part in first["loc"] if part not in ("body", "query", "path")]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return _write(request, ApiError(400, f"The body is not valid JSON: {reason}.", code="invalid_json"))
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    if not path:
        message = "The body must be a JSON object, sent as 'Content-Type: application/json'."
        return _write(request, ApiError(400, message))
    message = f"{field}: {first['msg']}."
    return _write(request, ApiError(400, message, param=str(path[0])))


def _with_our_errors(describe: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The OpenAPI document as it is true of this server: what is wrong with a body is a 400, not FastAPI's
    422; errors are JSON; what can stream, answers in events where it is asked to; a key may be needed."""

    def described() -> dict[str, Any]:
        document = describe()
        components = document.setdefault("components", {})
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{}, {"key": []}]
        for path, operations_ in document["paths"].items():
            for operation in operations_.values():
                responses = operation["responses"]
                responses.pop("422", None)
                for status, response in responses.items():
                    if status >= "400":
                        response["content"] = {"application/json": {"schema": {"type": "object"}}}
                if path == "/metrics":
                    responses["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
                elif "requestBody" in operation and "200" in responses:
                    responses["200"].setdefault("content", {})["text/event-stream"] = {}
        return document

    return described
