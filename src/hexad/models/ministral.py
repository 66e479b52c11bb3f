"""Ministral 8B (Mistral AI 2024): Mistral with a sliding window in some layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hexad.models import mistral
from hexad.models.llama import build

__all__ = ["Config", "build"]


class Config(mistral.Config):
    """Mistral's hyperparameters, and layer_types."""

    @staticmethod
    def layer_types(config: Mapping[str, Any], layers: int) -> Sequence[str]:
        """As listed."""
        types: Sequence[str] | None = config.get("layer_types")
        return mistral.Config.layer_types(config, layers) if types is None else types
