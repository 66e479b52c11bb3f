"""The tables of names.py: what GGUF calls the keys and tensors of each architecture, and what hexad does.

One `Architecture` holds the rows for one `general.architecture`; another one is more rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Key:
    """A metadata key, less its "{architecture}." prefix, and the config key it becomes.

    kind: an int ≥ 1 or a finite float > 0. maximum: largest value believed.
    default: the value where the key is absent, from the config so far; None if it may not be absent.
    """

    gguf: str
    config: str
    kind: Literal["int", "float"] = "int"
    maximum: float = 2**31 - 1
    default: Callable[[Mapping[str, Any]], Any] | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the file and in hexad, less its ".weight" or ".bias" and its layer's prefix.

    bias: whether the model adds a bias where the file has one. optional: whether the file may leave it out.
    rope_heads: the config key that counts the heads its rows make up, where these are stored with RoPE's
    pairs side by side.
    """

    gguf: str
    name: str
    bias: bool = False
    optional: bool = False
    rope_heads: str | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """The rows for one `general.architecture`.

    tensors: outside layers. layer_tensors: in each layer, after "blk.{i}." or "model.layers.{i}.".
    neutral: further keys, accepted only at values that mean "not used"; an empty tuple accepts any value.
    ignored: layer tensors that may be present and are not needed.
    """

    model_type: str
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    layer_tensors: tuple[Tensor, ...]
    neutral: Mapping[str, tuple[Any, ...]]
    ignored: tuple[str, ...] = ()


ROPE_SCALING = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.attn_factor",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
"""Keys that together become rope_scaling."""

WINDOW = ("attention.sliding_window", "attention.sliding_window_pattern")
"""Keys that together become sliding_window and layer_types."""

_LLAMA = Architecture(
    model_type="llama",
    keys=(
        Key("block_count", "num_hidden_layers", maximum=4096),
        Key("context_length", "max_position_embeddings"),
        Key("embedding_length", "hidden_size"),
        Key("feed_forward_length", "intermediate_size"),
        Key("attention.head_count", "num_attention_heads"),
        Key("attention.head_count_kv", "num_key_value_heads", default=itemgetter("num_attention_heads")),
        Key(
            "attention.key_length",
            "head_dim",
            default=lambda config: config["hidden_size"] // config["num_attention_heads"],
        ),
        Key("attention.value_length", "value_head_dim", default=itemgetter("head_dim")),
        Key("attention.layer_norm_rms_epsilon", "rms_norm_eps", "float", maximum=1.0),
        Key("rope.freq_base", "rope_theta", "float", maximum=1e15, default=lambda _: 10000.0),
        Key("rope.dimension_count", "rotary_dim", default=itemgetter("head_dim")),
    ),
    tensors=(
        Tensor("token_embd", "model.embed_tokens"),
        Tensor("output_norm", "model.norm"),
        Tensor("output", "lm_head", optional=True),
    ),
    layer_tensors=(
        Tensor("attn_norm", "input_layernorm"),
        Tensor("attn_q", "self_attn.q_proj", bias=True, rope_heads="num_attention_heads"),
        Tensor("attn_k", "self_attn.k_proj", bias=True, rope_heads="num_key_value_heads"),
        Tensor("attn_v", "self_attn.v_proj", bias=True),
        Tensor("attn_output", "self_attn.o_proj", bias=True),
        Tensor("ffn_norm", "post_attention_layernorm"),
        Tensor("ffn_gate", "mlp.gate_proj", bias=True),
        Tensor("ffn_up", "mlp.up_proj", bias=True),
        Tensor("ffn_down", "mlp.down_proj", bias=True),
    ),
    neutral={
        **dict.fromkeys(ROPE_SCALING, ()),
        **dict.fromkeys(WINDOW, ()),
        "vocab_size": (),  # the embedding table has it; the two are compared
        "tensor_data_layout": (),  # where the converter had the weights from
        "rope.scaling.finetuned": (),
        "expert_count": (0,),
        "expert_used_count": (0,),
        "attention.causal": (True,),
        "use_parallel_residual": (False,),
        "logit_scale": (0.0, 1.0),
    },
    ignored=("attn_rot_embd.weight",),  # the RoPE frequencies, which follow from rope.freq_base
)

# Files of these hold q and k as Hugging Face does: no row is out of its place.
_QWEN2 = replace(
    _LLAMA,
    model_type="qwen2",
    layer_tensors=tuple(replace(row, rope_heads=None) for row in _LLAMA.layer_tensors),
)

_QWEN3 = replace(
    _QWEN2,
    model_type="qwen3",
    layer_tensors=(
        *_QWEN2.layer_tensors,
        Tensor("attn_q_norm", "self_attn.q_norm"),
        Tensor("attn_k_norm", "self_attn.k_norm"),
    ),
)

ARCHITECTURES = {"llama": _LLAMA, "qwen2": _QWEN2, "qwen3": _QWEN3}
"""By `general.architecture`. Mistral models call themselves "llama" too."""
