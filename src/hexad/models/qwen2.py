"""Qwen2 (Yang et al. 2024, arXiv:2407.10671) and Qwen2.5: Llama with a bias on q, k and v, and an optional
sliding window in its upper layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hexad.models import llama
from hexad.models.llama import build

__all__ = ["Config", "build"]


class Config(llama.Config):
    """Llama's hyperparameters, and use_sliding_window, max_window_layers or layer_types."""

    qkv_bias = True

    @staticmethod
    def layer_types(config: Mapping[str, Any], layers: int) -> Sequence[str]:
        """As listed; else the first max_window_layers see everything."""
        if not config.get("use_sliding_window") or config.get("sliding_window") is None:
            return ["full_attention"] * layers
        types: Sequence[str] | None = config.get("layer_types")
        if types is not None:
            return types
        first = config.get("max_window_layers", 28)
        return ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
