"""llama-server's own API: completion, infill and what its clients ask of the server."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from json.encoder import encode_basestring as quoted
from typing import Any, get_args

from fastapi import APIRouter, Request
from starlette.responses import Response

from hexad import __version__
from hexad.errors import HexadError
from hexad.outputs import CompletionOutput, Logprob, RequestOutput
from hexad.params import PoolingParams, SamplerName, SamplingParams
from hexad.prompts import TokenPrompt
from hexad.server.chat import ChatRequest, served
from hexad.server.dialects import LLAMA_DEFAULTS, Timings, constraint, refuse, sampling_params
from hexad.server.errors import ApiError, api_error
from hexad.server.http import EventStream, JSONResponse, encode, unless_gone
from hexad.server.infill import infill_of
from hexad.server.llama_schemas import (
    NEUTRAL,
    CompletionFields,
    CompletionRequest,
    EmbeddingRequest,
    InfillRequest,
    TemplateRequest,
)
from hexad.server.openai import models
from hexad.server.service import Generation, Service

router = APIRouter(tags=["llama-server"])

_KINDS: Mapping[int | str | None, str] = {
    401: "authentication_error", 404: "not_found_error", 503: "unavailable_error",
    "context_length_exceeded": "exceed_context_size_error", "not_supported": "not_supported_error",
}  # fmt: skip

# What llama-server calls samplers, in full and by a letter.
_SAMPLER_NAMES: Mapping[str, SamplerName] = {
    **{name: name for name in get_args(SamplerName)}, "typ_p": "typical_p", "typical": "typical_p",
    "temp": "temperature",
}  # fmt: skip
_SAMPLER_LETTERS: Mapping[str, SamplerName] = {
    "e": "penalties", "d": "dry", "s": "top_n_sigma", "k": "top_k", "y": "typical_p", "p": "top_p",
    "m": "min_p", "x": "xtc", "t": "temperature",
}  # fmt: skip


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as llama-server writes it; the rest is for vLLM's clients, whose paths are the same."""
    other = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.code) or _KINDS.get(error.status, other)
    return {
        "error": {"code": error.status, "message": error.message, "type": kind, "param": error.param},
    }


router.get("/models")(models)


@router.post("/completion")
@router.post("/completions", include_in_schema=False)
async def completion(request: Request, body: CompletionRequest) -> Response:
    """Continues prompts."""
    service = served(request).service
    try:
        prompts = _prompts(body.prompt)
    except HexadError as error:
        raise api_error(error) from error
    return await _complete(
        request, body, service, lambda: [_read(service, prompt) for prompt in prompts], many=len(prompts) > 1
    )


@router.post("/infill")
async def infill(request: Request, body: InfillRequest) -> Response:
    """Writes what goes between a prefix and a suffix."""
    service = served(request).service
    fim = infill_of(service)
    most = _max_tokens(body)

    def read() -> list[TokenPrompt]:
        files = [(file.filename, file.text) for file in body.input_extra or ()]
        return [
            fim.prompt(
                service, body.input_prefix, body.input_suffix, start=body.prompt or "", files=files,
                max_tokens=most,
            )
        ]  # fmt: skip

    return await _complete(request, body, service, read, ends=fim.ends)


async def _complete(
    request: Request,
    body: CompletionFields,
    service: Service,
    read: Callable[[], list[TokenPrompt]],
    *,
    many: bool = False,
    ends: Sequence[int] = (),
) -> Response:
    name = service.check_model(body.model)
    refuse(body, NEUTRAL)
    most = _max_tokens(body)
    try:
        params = _params(body, service, most, ends)
    except HexadError as error:
        raise api_error(error) from error
    generation = await service.start(read, params, stream=bool(body.stream), generate=most != 0)
    reply = _Reply(service, name, body, params)
    if body.stream:
        return EventStream(_events(generation, reply, params.n))
    outputs = await unless_gone(request, generation.collect())
    replies = []
    for i, output in enumerate(outputs):
        for one in output.outputs:
            final = reply.final(
                i * params.n + one.index, output, one, one.text, one.token_ids, len(one.token_ids),
                reply.text_of(generation.prompts[i]),
            )  # fmt: skip
            if body.n_probs and one.logprobs is not None:
                final["completion_probabilities"] = reply.probabilities(one)
            replies.append(reply.chosen(final))
    return JSONResponse(replies if many or params.n > 1 else replies[0])


async def _events(generation: Generation, reply: _Reply, n: int) -> AsyncIterator[bytes]:
    counts: dict[int, int] = {}
    lines: set[int] = set()
    with contextlib.closing(generation):
        try:
            async for i, output in generation:
                for one in output.outputs:
                    index = i * n + one.index
                    count = counts[index] = counts.get(index, 0) + len(one.token_ids)
                    if "\n" in one.text:
                        lines.add(index)
                    if one.text or one.token_ids:
                        yield reply.chunk(index, output, one, count)
                    if one.finished:
                        prompt = reply.text_of(generation.prompts[i])
                        final = reply.final(index, output, one, "", [], count, prompt)
                        final["has_new_line"] = index in lines
                        yield b"data: " + encode(reply.chosen(final)) + b"\n\n"
        except ApiError as error:
            yield b"data: " + encode(error_body(error)) + b"\n\n"


class _Reply:
    """Writes the answers to one request."""

    def __init__(self, service: Service, name: str, body: CompletionFields, params: SamplingParams) -> None:
        self._service = service
        self._name = name
        self._body = body
        self._settings = settings(service, params, body)
        self._fields = body.response_fields

    def text_of(self, prompt: TokenPrompt) -> str:
        """A prompt as text."""
        text = prompt.text
        return self._service.tokenizer.decode(prompt.token_ids, skip_special=False) if text is None else text

    def chunk(self, index: int, output: RequestOutput, one: CompletionOutput, count: int) -> bytes:
        """An event with what is new. count: tokens so far."""
        more = ""
        if self._body.timings_per_token:
            more += f',"timings":{json.dumps(timings(Timings.of(output, count)))}'
        if self._body.n_probs and one.logprobs is not None:
            probabilities = json.dumps(self.probabilities(one), ensure_ascii=False)
            more += f',"completion_probabilities":{probabilities}'
        return (
            f'data: {{"index":{index},"content":{quoted(one.text)},"tokens":{one.token_ids},"stop":false,'
            f'"id_slot":-1,"tokens_predicted":{count},"tokens_evaluated":{len(output.prompt_token_ids)}{more}}}'
            "\n\n"
        ).encode()

    def final(
        self,
        index: int,
        output: RequestOutput,
        one: CompletionOutput,
        text: str,
        token_ids: Sequence[int],
        count: int,
        prompt: str,
    ) -> dict[str, Any]:
        """The last event, or all of an answer that is not streamed."""
        num_prompt = len(output.prompt_token_ids)
        word = one.stop_reason if isinstance(one.stop_reason, str) else ""
        limited = one.finish_reason == "length"
        return {
            "index": index,
            "content": text,
            "tokens": list(token_ids) if self._body.return_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self._name,
            "tokens_predicted": count,
            "tokens_evaluated": num_prompt,
            "generation_settings": self._settings,
            "prompt": prompt,
            "has_new_line": "\n" in text,
            "truncated": limited and num_prompt + count >= self._service.max_model_len,
            "stop_type": "limit" if limited else "word" if word else "eos",
            "stopping_word": word,
            "tokens_cached": output.num_cached_tokens,
            "timings": timings(Timings.of(output, count)),
        }

    def chosen(self, final: dict[str, Any]) -> dict[str, Any]:
        """Of an answer what response_fields asks for, under the last part of its path."""
        if not self._fields:
            return final
        found: dict[str, Any] = {}
        for path in self._fields:
            value: Any = final
            for key in (parts := path.split("/")):
                value = value.get(key, _ABSENT) if isinstance(value, dict) else _ABSENT
            if value is not _ABSENT:
                found[parts[-1]] = value
        return found

    def probabilities(self, one: CompletionOutput) -> list[dict[str, Any]]:
        """The logprobs of new tokens."""
        tokenizer, count = self._service.tokenizer, self._body.n_probs or 0

        def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
            return {
                "id": token_id,
                "token": logprob.decoded_token,
                "bytes": list(tokenizer.token_bytes(token_id)),
                "logprob": max(logprob.logprob, -3.4028235e38),  # JSON has no −∞
            }

        listed = []
        for token_id, position in zip(one.token_ids, one.logprobs or (), strict=True):
            top = sorted(position.items(), key=lambda item: item[1].rank or 0)[:count]
            listed.append(
                {**entry(token_id, position[token_id]), "top_logprobs": [entry(*item) for item in top]}
            )
        return listed


_ABSENT = object()


def timings(times: Timings) -> dict[str, Any]:
    """Times as llama-server writes them."""
    return {
        "cache_n": times.cached,
        **_pace("prompt", times.computed, times.prompt),
        **_pace("predicted", times.generated, times.generation),
    }


def _pace(what: str, tokens: int, seconds: float) -> dict[str, Any]:
    return {
        f"{what}_n": tokens,
        f"{what}_ms": seconds * 1e3,
        f"{what}_per_token_ms": seconds * 1e3 / tokens if tokens else 0.0,
        f"{what}_per_second": tokens / seconds if seconds > 0 else 0.0,
    }


def settings(
    service: Service, params: SamplingParams, body: CompletionFields | None = None
) -> dict[str, Any]:
    """How an answer is generated, by llama-server's names."""
    most = None if body is None else _max_tokens(body)
    most = -1 if most is None else most
    names = {"typical_p": "typ_p"}
    constrained = params.structured_outputs
    return {
        "n_ctx": service.max_model_len,
        "seed": 2**32 - 1 if params.seed is None else params.seed,
        **{
            name: getattr(params, name)
            for name in (
                "temperature", "dynatemp_range", "dynatemp_exponent", "top_k", "top_p", "min_p",
                "top_n_sigma", "xtc_probability", "xtc_threshold", "typical_p", "repeat_last_n",
                "presence_penalty", "frequency_penalty", "dry_multiplier", "dry_base",
                "dry_allowed_length", "dry_penalty_last_n", "mirostat", "mirostat_tau", "mirostat_eta",
            )
        },
        "repeat_penalty": params.repetition_penalty,
        "dry_sequence_breakers": list(params.dry_sequence_breakers),
        "stop": list(params.stop_strings),
        "max_tokens": most,
        "n_predict": most,
        "ignore_eos": params.ignore_eos,
        "stream": body is not None and bool(body.stream),
        "logit_bias": [{"token": i, "bias": bias} for i, bias in (params.logit_bias or {}).items()],
        "n_probs": params.logprobs or 0,
        "grammar": (constrained.grammar or "") if constrained is not None else "",
        "samplers": [names.get(name, name) for name in params.samplers],
        "timings_per_token": body is not None and bool(body.timings_per_token),
        "post_sampling_probs": False,
        "lora": [],
    }  # fmt: skip


@router.post("/apply-template")
async def apply_template(request: Request, body: TemplateRequest) -> Response:
    """A conversation as the prompt it makes."""
    chat = served(request)
    chat.service.check_model(body.model)
    conversation = ChatRequest(
        messages=body.messages,
        params=LLAMA_DEFAULTS,
        tools=body.tools or (),
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs or {},
    )
    try:
        prompt = await asyncio.to_thread(chat.prompt, conversation)
    except HexadError as error:
        raise api_error(error) from error
    return JSONResponse({"prompt": prompt.text})


@router.get("/props")
async def props(request: Request) -> Response:
    """What the server is set to."""
    service = served(request).service
    tokenizer = service.tokenizer
    template = tokenizer.chat_template.text if tokenizer.chat_template is not None else ""
    bos, eos = ("" if i is None else tokenizer.token_text(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    return JSONResponse(
        {
            "default_generation_settings": {
                **_slot(service, 0, busy=False),
                "params": settings(service, LLAMA_DEFAULTS),
            },
            "total_slots": service.settings.max_num_seqs,
            "model_alias": service.names[0],
            "model_path": service.names[0],  # where it lies is nobody's business
            "chat_template": service.settings.chat_template or template,
            "bos_token": bos,
            "eos_token": eos,
            "modalities": {"vision": False, "audio": False},
            "build_info": f"hexad {__version__}",
            "is_sleeping": service.llm.engine.is_sleeping,
        }
    )


@router.get("/slots")
async def slots(request: Request, fail_on_no_slot: int = 0) -> Response:
    """A slot for each sequence that can run at once; which of them work says only how many do."""
    service = served(request).service
    total = service.settings.max_num_seqs
    if fail_on_no_slot and service.in_flight >= total:
        raise ApiError(503, f"No slot is free: {service.in_flight} sequences run or wait, of {total} slots.")
    return JSONResponse([_slot(service, i, busy=i < service.in_flight) for i in range(total)])


def _slot(service: Service, index: int, *, busy: bool) -> dict[str, Any]:
    return {
        "id": index,
        "id_task": -1,
        "n_ctx": service.max_model_len,
        "speculative": False,
        "is_processing": busy,
    }


@router.post("/embedding")
@router.post("/embeddings", include_in_schema=False)
async def embedding(request: Request, body: EmbeddingRequest) -> Response:
    """The embeddings of prompts: the mean of their hidden states."""
    service = served(request).service
    service.check_model(body.model)
    content = body.input if body.content is None else body.content
    if content is None:
        raise ApiError(400, "content is missing: the text to embed.", param="content")
    try:
        prompts = _prompts(content)
    except HexadError as error:
        raise api_error(error) from error
    params = PoolingParams(normalize=body.embd_normalize == 2)
    answer = service.embed(lambda: [_read(service, prompt) for prompt in prompts], params)
    outputs = await unless_gone(request, answer)
    return JSONResponse(
        [
            {"index": i, "embedding": [_normalised(output.outputs.embedding, body.embd_normalize)]}
            for i, output in enumerate(outputs)
        ]
    )


def _normalised(vector: list[float], norm: int) -> list[float]:
    if norm in (-1, 2):
        return vector
    largest = max(map(abs, vector)) or 1.0
    if norm == 0:
        return [32760 * value / largest for value in vector]  # as 16-bit integers would hold them
    length = largest * sum((abs(value) / largest) ** norm for value in vector) ** (1 / norm)
    return [value / length for value in vector]


def _max_tokens(body: CompletionFields) -> int | None:
    """None: to the end of the context; 0: the prompt is computed and no more."""
    most = body.max_tokens if body.n_predict is None else body.n_predict
    return None if most is None or most < 0 else most


def _params(
    body: CompletionFields, service: Service, most: int | None, ends: Sequence[int]
) -> SamplingParams:
    biases, banned = _biases(body.logit_bias, service)
    if body.ignore_eos:  # and it is not drawn, either
        banned += service.tokenizer.eos_ids
    count = body.n if body.n_cmpl is None else body.n_cmpl
    return sampling_params(
        body,
        LLAMA_DEFAULTS,
        n=count,
        max_tokens=most or None,
        repetition_penalty=body.repeat_penalty,
        dry_sequence_breakers=body.dry_sequence_breakers,
        ignore_eos=body.ignore_eos,
        structured_outputs=constraint(body.grammar, body.json_schema),
        logit_bias=biases or None,
        banned_token_ids=banned or None,
        stop_token_ids=ends or None,
        logprobs=body.n_probs or None,
        samplers=_samplers(body.samplers),
        skip_reading_prefix_cache=True if body.cache_prompt is False else None,
    )


def _samplers(given: list[str] | str | None) -> tuple[SamplerName, ...] | None:
    if given is None:
        return None
    known = _SAMPLER_LETTERS if isinstance(given, str) else _SAMPLER_NAMES
    for name in given:
        if name not in known:
            names = ", ".join(map(repr, known))
            raise ApiError(400, f"There is no sampler {name[:100]!r}; there are {names}.", param="samplers")
    return tuple(dict.fromkeys(known[name] for name in given))


def _biases(given: list[Any] | dict[str, Any] | None, service: Service) -> tuple[dict[int, float], list[int]]:
    """(biases by token, tokens never to be drawn). Texts stand for each of their tokens."""
    biases: dict[int, Any] = {}
    banned: list[int] = []
    pairs = [(key, value) for key, value in given.items()] if isinstance(given, dict) else given or ()
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ApiError(
                400, "Each of logit_bias must be [token id or text, bias or false].", param="logit_bias"
            )
        key, value = pair
        if isinstance(given, dict) and key.isascii() and key.isdigit() and len(key) < 12:
            key = int(key)
        if isinstance(key, str):
            service.check_length(len(key))
            ids = service.tokenizer.encode(key, add_special=False)
        elif _is_token(key):
            ids = [key]
        else:
            raise ApiError(400, "logit_bias must be of token ids and texts.", param="logit_bias")
        if value is False:
            banned += ids
        else:
            biases.update(dict.fromkeys(ids, value))
    return biases, banned


_Prompt = str | list[Any]


def _prompts(given: str | list[Any] | dict[str, Any]) -> list[_Prompt]:
    """The prompts that a field holds: a list with a token id in it is one of them. Raises ApiError."""
    if isinstance(given, list) and not any(_is_token(item) for item in given):
        if not given:
            raise ApiError(400, "prompt must not be an empty list.", param="prompt")
        return [_prompt(item) for item in given]
    return [_prompt(given)]


def _prompt(given: Any) -> _Prompt:
    if isinstance(given, dict) and not given.get("multimodal_data"):
        given = given.get("prompt_string")
    if isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(_is_token(i) or isinstance(i, str) for i in given):
        return given
    raise ApiError(
        400,
        "A prompt must be a text, or a list of token ids and texts, or {'prompt_string': text}; this model "
        "takes no multimodal_data.",
        param="prompt",
    )


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read(service: Service, prompt: _Prompt) -> TokenPrompt:
    """A prompt's tokens; a text at its beginning begins the sequence. Raises PromptError."""
    if isinstance(prompt, str):
        return service.read(prompt)
    service.check_length(sum(len(item) for item in prompt if isinstance(item, str)))
    ids: list[int] = []
    for i, item in enumerate(prompt):
        ids += service.tokenizer.encode(item, add_special=i == 0) if isinstance(item, str) else [item]
    return TokenPrompt(None, ids)
