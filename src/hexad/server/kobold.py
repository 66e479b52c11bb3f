"""KoboldAI's API with koboldcpp's extensions, as KoboldAI Lite and SillyTavern speak it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from json.encoder import encode_basestring as quoted
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad.errors import HexadError
from hexad.params import SamplerName, SamplingParams, StructuredOutputsParams
from hexad.prompts import TokenPrompt
from hexad.server.chat import served
from hexad.server.dialects import LLAMA_DEFAULTS, Timings, constraint, finish_reason, refuse, sampling_params
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.kobold_schemas import NEUTRAL, GenerateRequest, GenerationKey, TokenCountRequest
from hexad.server.service import Generation, Service

router = APIRouter(tags=["KoboldAI"])

VERSION = "1.101"
"""The koboldcpp whose API this is: front ends turn on what it can do by this number."""

DEFAULT_MAX_LENGTH = 768

# What each of sampler_order's numbers applies; top_a (1) and tfs (3) are never on.
_SAMPLERS: Mapping[int, tuple[SamplerName, ...]] = {
    0: ("top_k",),
    1: (),
    2: ("top_p", "min_p"),
    3: (),
    4: ("typical_p",),
    5: ("temperature", "top_n_sigma"),
    6: ("penalties",),
}
_ORDER = (6, 0, 1, 3, 4, 2, 5)

_REASONS = {"stop": 1, "length": 0}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as koboldcpp writes it."""
    kind = "service_unavailable" if error.status in (429, 503) else error.kind
    return {"detail": {"msg": error.message, "type": kind, "field": error.param}}


class Session:
    """One request under way. text: so far. aborted: by its key."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.text = ""
        self.aborted = False
        self._generation: Generation | None = None

    def begin(self, generation: Generation) -> None:
        """The request is queued; it ends at once if it was aborted before."""
        self._generation = generation
        if self.aborted:
            generation.close()

    def abort(self) -> None:
        """Ends the request with the text so far."""
        self.aborted = True
        self.close()

    def close(self) -> None:
        """Ends the request."""
        if self._generation is not None:
            self._generation.close()


class Sessions:
    """All requests under way, and what is known of the last one that ended."""

    def __init__(self) -> None:
        self._running: list[Session] = []
        self.began = time.monotonic()
        self.finished = 0
        self.last: Timings | None = None
        self.last_reason = "stop"
        self.last_seed = -1

    @contextlib.contextmanager
    def open(self, key: str) -> Iterator[Session]:
        """A request, from before it is queued until it is answered."""
        session = Session(key)
        self._running.append(session)
        try:
            yield session
        finally:
            session.close()
            self._running.remove(session)

    def find(self, key: str) -> list[Session]:
        """Those with this key, the latest last. Who has no key gets a request only where it must be theirs:
        the only one without a key."""
        found = [session for session in self._running if session.key == key]
        return found if key or len(found) == 1 else []

    def end(self, timings: Timings, reason: str, seed: int | None) -> None:
        """Counts a request that has ended."""
        self.finished += 1
        self.last, self.last_reason, self.last_seed = timings, reason, -1 if seed is None else seed


def _sessions(request: Request) -> Sessions:
    sessions: Sessions = request.app.state.kobold
    return sessions


@router.post("/api/v1/generate")
@router.post("/api/latest/generate", include_in_schema=False)
async def generate(request: Request, body: GenerateRequest) -> Response:
    """Continues a story."""
    return await unless_gone(request, _generated(_sessions(request), served(request).service, body))


async def _generated(sessions: Sessions, service: Service, body: GenerateRequest) -> Response:
    with sessions.open(body.genkey or "") as session:
        generation = await _start(session, service, body)
        *_, end = [piece async for piece in _pieces(sessions, session, generation, body)]
        result: dict[str, Any] = {
            "text": session.text,
            "finish_reason": end.reason,
            "logprobs": None,
            "tool_calls": [],
            "prompt_tokens": generation.num_prompt_tokens,
            "completion_tokens": end.generated,
        }
    return JSONResponse({"results": [result]})


@router.post("/api/extra/generate/stream")
async def generate_stream(request: Request, body: GenerateRequest) -> Response:
    """`generate`, as server-sent events."""
    sessions = _sessions(request)
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(sessions.open(body.genkey or ""))
        generation = await _start(session, served(request).service, body)
        return EventStream(_events(_pieces(sessions, session, generation, body), stack.pop_all()))


async def _events(pieces: AsyncIterator[_Piece], stack: contextlib.ExitStack) -> AsyncIterator[bytes]:
    with stack:
        try:
            async for piece in pieces:
                if piece.text or piece.reason:
                    reason = json.dumps(piece.reason)
                    yield (
                        f'event: message\ndata: {{"token":{quoted(piece.text)},"finish_reason":{reason}}}\n\n'
                    ).encode()
        except ApiError as error:
            yield b"event: error\ndata: " + encode(error_body(error)) + b"\n\n"


class _Piece(NamedTuple):
    """What is new of a request. reason: why it has ended. generated: tokens so far."""

    text: str
    reason: str | None = None
    generated: int = 0


async def _pieces(
    sessions: Sessions, session: Session, generation: Generation, body: GenerateRequest
) -> AsyncIterator[_Piece]:
    """All of a request; the last has a reason. Raises ApiError."""
    generated, output = 0, None
    try:
        async for _, output in generation:
            (one,) = output.outputs
            generated += len(one.token_ids)
            session.text += one.text
            piece = _Piece(one.text, finish_reason(one), generated)
            if piece.reason is not None:
                sessions.end(Timings.of(output, generated), piece.reason, body.sampler_seed)
            yield piece
    except ApiError:
        if not session.aborted:
            raise
        if output is not None:
            sessions.end(Timings.of(output, generated), "stop", body.sampler_seed)
        yield _Piece("", "stop", generated)


async def _start(session: Session, service: Service, body: GenerateRequest) -> Generation:
    refuse(body, NEUTRAL)
    context = min(body.max_context_length or service.max_model_len, service.max_model_len)
    # A fifth of the context, or 16 tokens, are for the prompt in any case.
    least = max(min(context - 4, 16), context // 5, 1)
    most = max(1, min(body.max_length or DEFAULT_MAX_LENGTH, context - least))
    try:
        params = _params(body, service, most)
    except HexadError as error:
        raise api_error(error) from error
    generation = await service.start(
        lambda: [_prompt(service, body.memory or "", body.prompt, context - most)], params, stream=True
    )
    session.begin(generation)
    return generation


def _params(body: GenerateRequest, service: Service, most: int) -> SamplingParams:
    listed = map(str.strip, (body.custom_token_bans or "").split(","))
    banned = [int(i) for i in listed if i.isdecimal() and len(i) < 12]
    ban_end = body.ban_eos_token or body.use_default_badwordsids
    if ban_end:
        banned += service.tokenizer.eos_ids
    breakers = body.dry_sequence_breakers
    if isinstance(breakers, str):  # SillyTavern's JSON in JSON
        try:
            breakers = json.loads(breakers)
        except (ValueError, RecursionError):
            raise ApiError(
                400, "dry_sequence_breakers must be a list of texts, or one in JSON.",
                param="dry_sequence_breakers",
            ) from None  # fmt: skip
    return sampling_params(
        body,
        replace(
            LLAMA_DEFAULTS, temperature=0.75, top_k=100, top_p=0.92, min_p=0.0, repeat_last_n=320,
            xtc_threshold=0.2, dry_penalty_last_n=320, dry_sequence_breakers=(),
        ),
        max_tokens=most,
        seed=body.sampler_seed,
        stop=body.stop_sequence,
        include_stop_str_in_output=body.trim_stop is False,
        repetition_penalty=body.rep_pen,
        repeat_last_n=body.rep_pen_range,
        typical_p=body.typical,
        top_n_sigma=body.nsigma,
        dry_sequence_breakers=breakers,
        samplers=_samplers(body.sampler_order),
        bad_words=[text for text in body.banned_tokens or body.banned_strings or () if text] or None,
        banned_token_ids=banned or None,
        logit_bias=body.logit_bias,
        ignore_eos=bool(ban_end or body.bypass_eos),
        skip_special_tokens=not body.render_special,
        structured_outputs=_constraint(body.grammar),
    )  # fmt: skip


def _samplers(order: list[int] | None) -> tuple[SamplerName, ...]:
    """DRY goes before all others and XTC after them."""
    for number in order or ():
        if number not in _SAMPLERS:
            raise ApiError(
                400, f"sampler_order must be of the numbers from 0 to 6, not {number}.", param="sampler_order"
            )
    middle = [name for number in order or _ORDER for name in _SAMPLERS[number]]
    return tuple(dict.fromkeys(("dry", *middle, "xtc")))


def _constraint(grammar: str | None) -> StructuredOutputsParams | None:
    """A grammar in GBNF, or a JSON schema in its place."""
    if grammar and grammar.lstrip().startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            return constraint(None, json.loads(grammar))
    return constraint(grammar, None)


def _prompt(service: Service, memory: str, text: str, room: int) -> TokenPrompt:
    """Memory and as much of the prompt's end as there is room for, in tokens. Raises PromptError."""
    tokenizer, most = service.tokenizer, service.max_prompt_chars
    head = tokenizer.encode(memory[-most:]) if memory else []
    tail = tokenizer.encode(text[-most:], add_special=not memory) if text or not memory else []
    head = head[max(0, len(head) - room) :]
    first = tail[:1] if not memory and tail[:1] == [tokenizer.bos_id] else []
    kept = room - len(head) - len(first)
    tail = tail[len(first) :]
    ids = [*head, *first, *tail[max(0, len(tail) - kept) :]]
    if not ids and tokenizer.bos_id is not None:  # an empty page
        ids = [tokenizer.bos_id]
    return TokenPrompt(None, ids)


@router.get("/api/extra/generate/check")
async def check(request: Request) -> Response:
    """The text so far of the request that was given no key, if there is one such."""
    return await check_key(request)


@router.post("/api/extra/generate/check")
async def check_key(request: Request, body: GenerationKey | None = None) -> Response:
    """The text so far of the request with a key."""
    found = _sessions(request).find(body.genkey or "" if body is not None else "")
    return JSONResponse({"results": [{"text": found[-1].text if found else ""}]})


@router.post("/api/extra/abort")
async def abort(request: Request, body: GenerationKey | None = None) -> Response:
    """Ends the requests with a key; they are answered with their text so far."""
    found = _sessions(request).find(body.genkey or "" if body is not None else "")
    for session in found:
        session.abort()
    done = "true" if found else "false"
    return JSONResponse({"success": done, "done": done})


@router.post("/api/extra/tokencount")
async def token_count(request: Request, body: TokenCountRequest) -> Response:
    """How many tokens a text is, and which."""
    service = served(request).service
    try:
        service.check_length(len(body.prompt))
        ids = await asyncio.to_thread(service.tokenizer.encode, body.prompt, add_special=body.special)
    except HexadError as error:
        raise api_error(error) from error
    return JSONResponse({"value": len(ids), "ids": ids})


@router.get("/api/extra/version")
async def extra_version(request: Request) -> Response:
    """What the server can do."""
    protected = bool(served(request).service.settings.api_keys)
    absent = (
        "txt2img", "vision", "audio", "transcribe", "multiplayer", "websearch", "tts", "embeddings", "music",
        "savedata", "guidance",
    )  # fmt: skip
    can = {"protected": protected, "llm": True, **dict.fromkeys(absent, False), "admin": 0}
    return JSONResponse({"result": "KoboldCpp", "version": VERSION, **can})


@router.get("/api/extra/perf")
async def perf(request: Request) -> Response:
    """How busy the server is, and how fast the last request was."""
    sessions, service = _sessions(request), served(request).service
    last = sessions.last or Timings(0.0, 0.0, 0.0, 0, 0, 0)
    return JSONResponse(
        {
            "last_process": last.prompt * 1e3 / last.computed if last.computed else 0.0,
            "last_eval": last.generation * 1e3 / last.generated if last.generated else 0.0,
            "last_token_count": last.generated,
            "last_input_count": last.computed,
            "last_process_time": last.prompt,
            "last_eval_time": last.generation,
            "last_process_speed": last.computed / last.prompt if last.prompt else 0.0,
            "last_eval_speed": last.generated / last.generation if last.generation else 0.0,
            "last_seed": sessions.last_seed,
            "total_gens": sessions.finished,
            "stop_reason": _REASONS.get(sessions.last_reason, 1),
            "queue": max(0, service.in_flight - service.settings.max_num_seqs),
            "idle": int(service.in_flight == 0),
            "hordeexitcounter": 0,
            "uptime": time.monotonic() - sessions.began,
        }
    )


@router.get("/api/extra/true_max_context_length")
async def true_max_context_length(request: Request) -> Response:
    """The context in tokens."""
    return JSONResponse({"value": served(request).service.max_model_len})


@router.get("/api/v1/config/max_context_length")
@router.get("/api/latest/config/max_context_length", include_in_schema=False)
async def max_context_length(request: Request) -> Response:
    """The context in tokens."""
    return await true_max_context_length(request)


@router.get("/api/v1/config/max_length")
@router.get("/api/latest/config/max_length", include_in_schema=False)
async def max_length(request: Request) -> Response:
    """Tokens that are generated where the request does not say."""
    context = served(request).service.max_model_len
    return JSONResponse({"value": min(DEFAULT_MAX_LENGTH, max(1, context // 2))})


@router.get("/api/v1/model")
@router.get("/api/latest/model", include_in_schema=False)
async def model(request: Request) -> Response:
    """The model's name."""
    return JSONResponse({"result": served(request).service.names[0]})


@router.get("/api/v1/info/version")
@router.get("/api/latest/info/version", include_in_schema=False)
async def info_version() -> Response:
    """The version of KoboldAI's own API."""
    return JSONResponse({"result": "1.2.5"})


@router.get("/api/v1/config/soft_prompt")
@router.get("/api/latest/config/soft_prompt", include_in_schema=False)
async def soft_prompt() -> Response:
    """There is none."""
    return JSONResponse({"value": ""})


@router.get("/api/v1/config/soft_prompts_list")
@router.get("/api/latest/config/soft_prompts_list", include_in_schema=False)
async def soft_prompts() -> Response:
    """There are none."""
    return JSONResponse({"values": []})
