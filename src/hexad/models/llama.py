"""Llama (Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288), Llama 3, SmolLM, TinyLlama.

A pre-norm decoder: RMS norm, grouped-query attention with rotary positions, a SiLU-gated MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph import Graph, RopeSpec


@dataclass(frozen=True, slots=True)
class Config:
    """The hyperparameters, under their Hugging Face names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads and checks a config. Raises CheckpointError naming the key, UnsupportedError for what is
        not built."""
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
        if config.get("rope_scaling"):
            raise UnsupportedError(f"rope_scaling {config['rope_scaling']!r} is not supported yet")
        hidden = _integer(config, "hidden_size")
        heads = _integer(config, "num_attention_heads")
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        head_dim = _integer(config, "head_dim", hidden // heads)
        cfg = cls(
            hidden_size=hidden,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=_integer(config, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_integer(config, "num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=_number(config, "rms_norm_eps"),
            rope_theta=_number(config, "rope_theta", 10_000.0),
            rotary_dim=_integer(config, "rotary_dim", head_dim),
            vocab_size=_integer(config, "vocab_size"),
            max_position_embeddings=_integer(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        if cfg.rotary_dim % 2 or cfg.rotary_dim > head_dim:
            raise CheckpointError(
                f"rotary_dim is {cfg.rotary_dim}; an even number of at most {head_dim} expected"
            )
        return cfg


def build(cfg: Config, g: Graph) -> None:
    """Appends the model to g. Raises CheckpointError for a missing or misshapen tensor."""
    rope = RopeSpec(cfg.head_dim, cfg.rotary_dim, cfg.rope_theta)
    heads = {"heads": cfg.num_attention_heads, "kv_heads": cfg.num_key_value_heads, "head_dim": cfg.head_dim}
    x = g.embed("model.embed_tokens")
    for i in range(cfg.num_hidden_layers):
        layer = f"model.layers.{i}"
        h = g.norm(x, f"{layer}.input_layernorm", eps=cfg.rms_norm_eps)
        q, k, v = (g.linear(h, f"{layer}.self_attn.{name}_proj") for name in "qkv")
        q, k = g.rope(q, rope), g.rope(k, rope)
        a = g.attention(q, k, v, layer=i, **heads, scale=cfg.head_dim**-0.5)
        x = g.add(x, g.linear(a, f"{layer}.self_attn.o_proj"))
        h = g.norm(x, f"{layer}.post_attention_layernorm", eps=cfg.rms_norm_eps)
        gate, up = g.linear(h, f"{layer}.mlp.gate_proj"), g.linear(h, f"{layer}.mlp.up_proj")
        x = g.add(x, g.linear(g.gated(gate, up, "silu"), f"{layer}.mlp.down_proj"))
    head = "model.embed_tokens" if cfg.tie_word_embeddings else "lm_head"
    g.logits(g.norm(g.take_rows(x), "model.norm", eps=cfg.rms_norm_eps), head)
    _agrees(g, cfg)


def _agrees(g: Graph, cfg: Config) -> None:
    """The widths came from the tensors, which fit one another; the config must say the same."""
    sizes = [
        ("hidden_size", g.nodes[0].features, cfg.hidden_size),
        ("vocab_size", g.weights["model.embed_tokens.weight"].shape[0], cfg.vocab_size),
        ("vocab_size", g.vocab_size, cfg.vocab_size),
        *(("intermediate_size", n.features, cfg.intermediate_size) for n in g.nodes if n.op == "gated"),
    ]
    for key, found, expected in sizes:
        if found != expected:
            raise CheckpointError(f"the config's {key} is {expected}, but the tensors have {found}")


def _integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the config's {key} is {value!r}; a positive integer expected")
    return value


def _number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"the config's {key} is {value!r}; a positive number expected")
    return float(value)
