"""The bodies of KoboldAI's API, with koboldcpp's extensions."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from hexad.server.dialects import CommonFields
from hexad.server.sampling import Body


class GenerateRequest(CommonFields):
    """POST /api/v1/generate.

    memory: a beginning that stays when the prompt is too long. max_context_length: most tokens of both and
    the answer. rep_pen, rep_pen_range, typical, nsigma: what other APIs call repeat_penalty, repeat_last_n,
    typical_p and top_n_sigma. sampler_order: 0 top_k, 1 top_a, 2 top_p and min_p, 3 tfs, 4 typical, 5
    temperature, 6 rep_pen (whose slope is ignored). genkey: a secret of the client's, by which it may check
    on the request or abort it.
    """

    prompt: str = ""
    memory: str | None = None
    max_context_length: int | None = Field(None, ge=1)
    max_length: int | None = Field(None, ge=1)
    genkey: str | None = Field(None, max_length=256)
    rep_pen: float | None = None
    rep_pen_range: int | None = Field(None, ge=-1)
    typical: float | None = None
    nsigma: float | None = None
    dry_sequence_breakers: list[str] | str | None = None
    sampler_order: list[int] | None = None
    sampler_seed: int | None = None
    stop_sequence: list[str] | None = None
    trim_stop: bool | None = None
    banned_tokens: list[str] | None = None
    banned_strings: list[str] | None = None
    custom_token_bans: str | None = None
    logit_bias: dict[str, float] | None = None
    grammar: str | None = None
    use_default_badwordsids: bool | None = None
    ban_eos_token: bool | None = None
    bypass_eos: bool | None = None
    render_special: bool | None = None
    # Not done here; see NEUTRAL.
    top_a: float | None = None
    tfs: float | None = None
    smoothing_factor: float | None = None
    grammar_retain_state: bool | None = None
    guidance_scale: float | None = None
    adaptive_target: float | None = None
    images: list[Any] | None = None
    audio: list[Any] | None = None


NEUTRAL: dict[str, list[Any]] = {
    "top_a": [0],
    "tfs": [1, 0],
    "smoothing_factor": [0],
    "grammar_retain_state": [False],
    "guidance_scale": [1],
    "adaptive_target": [-1, 0],
    "images": [[]],
    "audio": [[]],
}


class GenerationKey(Body):
    """Which request to check on or to abort; "": the one without a key, if there is one such."""

    genkey: str | None = None


class TokenCountRequest(Body):
    """POST /api/extra/tokencount. special: count the tokens that go around every text, too."""

    prompt: str
    special: bool = True
