"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), dense: Qwen2 with normed heads of q and k, not biases."""

from __future__ import annotations

from hexad.models import qwen2
from hexad.models.llama import build

__all__ = ["Config", "build"]


class Config(qwen2.Config):
    """Qwen2's hyperparameters."""

    qkv_bias = False
    qk_norm = True
