"""Mistral 7B (Jiang et al. 2023, arXiv:2310.06825): Llama with an optional sliding window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hexad.models import llama
from hexad.models.llama import build

__all__ = ["Config", "build"]


class Config(llama.Config):
    """Llama's hyperparameters, and sliding_window."""

    @staticmethod
    def layer_types(config: Mapping[str, Any], layers: int) -> Sequence[str]:
        """All alike."""
        return ["full_attention" if config.get("sliding_window") is None else "sliding_attention"] * layers
