"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama with an optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from hexad.errors import UnsupportedError
from hexad.models import llama
from hexad.models.llama import build

__all__ = ["Config", "build"]


class Config(llama.Config):
    """Llama's hyperparameters; a window as long as the context is no window."""

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        cfg = super().from_dict(config)
        window = config.get("sliding_window")
        if window is not None and window < cfg.max_position_embeddings:
            raise UnsupportedError(
                f"sliding_window {window} is shorter than the context of {cfg.max_position_embeddings}; "
                f"windowed attention is not supported yet"
            )
        return cfg
