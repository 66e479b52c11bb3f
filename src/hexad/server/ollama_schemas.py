"""The bodies of Ollama's API."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from hexad.server.dialects import CommonFields
from hexad.server.sampling import Body


class Options(CommonFields):
    """How an answer is generated. Options about how a model is loaded are ignored: it is."""

    num_predict: int | None = None
    repeat_penalty: float | None = None
    tfs_z: float | None = None


NEUTRAL_OPTIONS = {"tfs_z": [1]}


class GenerationBody(Body):
    """What /api/generate and /api/chat have in common. format: "json", or a JSON schema. think: whether to
    reason, or how much. keep_alive is ignored: the model stays."""

    model: str
    stream: bool | None = True
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high"] | None = None
    keep_alive: float | str | None = None


class GenerateRequest(GenerationBody):
    """POST /api/generate. raw: the prompt as it is, without the chat template. suffix: fill in what goes
    before it. context: tokens to go on from, of an earlier answer."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    raw: bool | None = False
    context: list[int] | None = None
    # Not done here; see NEUTRAL.
    template: str | None = None
    images: list[Any] | None = None


NEUTRAL: dict[str, list[Any]] = {"template": [""], "images": [[]]}


class ChatRequest(GenerationBody):
    """POST /api/chat."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class ShowRequest(Body):
    """POST /api/show. name: the model's older name."""

    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


class EmbedRequest(Body):
    """POST /api/embed. truncate: cut what is too long, instead of refusing it."""

    model: str
    input: str | list[str]
    truncate: bool | None = True
    dimensions: int | None = Field(None, ge=1)
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None


class OldEmbeddingRequest(Body):
    """POST /api/embeddings."""

    model: str
    prompt: str
    options: dict[str, Any] | None = None
    keep_alive: float | str | None = None
