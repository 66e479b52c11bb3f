"""Llama (Touvron et al. 2023, arXiv:2302.13971 and arXiv:2307.09288), Llama 3.x, SmolLM2, TinyLlama.

A pre-norm decoder: RMS norm, grouped-query attention with rotary positions, a SiLU-gated MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph import Graph, RopeSpec
from hexad.graph.config import integer, number
from hexad.graph.rope import read_rope


@dataclass(frozen=True, slots=True)
class Config:
    """The hyperparameters, under their Hugging Face names.

    rope: see `read_rope`. windows: for each layer how many positions a row sees, None for all.
    qkv_bias: whether q, k and v must have a bias; else they have one where the checkpoint does.
    qk_norm: whether each head of q and k is normed before its rotation.
    """

    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    windows: tuple[int | None, ...]
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Reads and checks a config. Raises CheckpointError naming the key, UnsupportedError for what is
        not built."""
        if config.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"hidden_act is {config['hidden_act']!r}; only 'silu' is supported")
        hidden = integer(config, "hidden_size")
        heads = integer(config, "num_attention_heads")
        if config.get("head_dim") is None and hidden % heads:
            raise CheckpointError(f"hidden_size {hidden} is not divisible by num_attention_heads {heads}")
        head_dim = integer(config, "head_dim", hidden // heads)
        layers = integer(config, "num_hidden_layers")
        if layers > 4096:
            raise CheckpointError(f"the config's num_hidden_layers is {layers}; at most 4096 expected")
        return cls(
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=integer(config, "num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=number(config, "rms_norm_eps"),
            rope=read_rope(config, head_dim),
            windows=_windows(config, cls.layer_types(config, layers), layers),
            vocab_size=integer(config, "vocab_size"),
            max_position_embeddings=integer(config, "max_position_embeddings"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )

    @staticmethod
    def layer_types(config: Mapping[str, Any], layers: int) -> Sequence[str]:
        """For each layer "full_attention" or "sliding_attention", through a window of sliding_window."""
        return ["full_attention"] * layers


def build(cfg: Config, g: Graph) -> None:
    """Appends the model to g. Raises CheckpointError for a missing or misshapen tensor."""
    heads = {"heads": cfg.num_attention_heads, "kv_heads": cfg.num_key_value_heads, "head_dim": cfg.head_dim}
    x = g.embed("model.embed_tokens")
    for i, window in enumerate(cfg.windows):
        layer = f"model.layers.{i}"
        h = g.norm(x, f"{layer}.input_layernorm", eps=cfg.rms_norm_eps)
        q, k, v = (g.linear(h, f"{layer}.self_attn.{name}_proj", bias=cfg.qkv_bias) for name in "qkv")
        if cfg.qk_norm:
            q = g.norm(q, f"{layer}.self_attn.q_norm", eps=cfg.rms_norm_eps, heads=cfg.num_attention_heads)
            k = g.norm(k, f"{layer}.self_attn.k_norm", eps=cfg.rms_norm_eps, heads=cfg.num_key_value_heads)
        q, k = g.rope(q, cfg.rope), g.rope(k, cfg.rope)
        a = g.attention(q, k, v, layer=i, **heads, scale=cfg.head_dim**-0.5, window=window)
        x = g.add(x, g.linear(a, f"{layer}.self_attn.o_proj"))
        h = g.norm(x, f"{layer}.post_attention_layernorm", eps=cfg.rms_norm_eps)
        gate, up = g.linear(h, f"{layer}.mlp.gate_proj"), g.linear(h, f"{layer}.mlp.up_proj")
        x = g.add(x, g.linear(g.gated(gate, up, "silu"), f"{layer}.mlp.down_proj"))
    # A head that is stored is meant, whatever the config says: so transformers reads it too.
    tied = cfg.tie_word_embeddings and "lm_head.weight" not in g.weights
    x = g.norm(g.take_rows(x), "model.norm", eps=cfg.rms_norm_eps)
    g.logits(x, "model.embed_tokens" if tied else "lm_head")
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


def _windows(config: Mapping[str, Any], types: Sequence[str], layers: int) -> tuple[int | None, ...]:
    """Each layer's window. One that holds the whole context is none."""
    if not isinstance(types, list | tuple) or len(types) != layers:
        raise CheckpointError(
            f"the config's layer_types are {types!r:.80}; one for each of {layers} layers expected"
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(
                f"layer_types has {kind!r:.80}; only full and sliding attention are supported"
            )
    if "sliding_attention" not in types:
        return (None,) * layers
    window: int | None = integer(config, "sliding_window")
    if window is not None and window >= integer(config, "max_position_embeddings"):
        window = None
    return tuple(window if kind == "sliding_attention" else None for kind in types)
