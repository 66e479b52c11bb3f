"""A model of Hugging Face's as a GGUF file, the way llama.cpp's converter writes it; nothing is quantised."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tests.gguf_writer import ARRAY, BOOL, TYPE_F32, Tensor, Typed, write

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_of(config: Mapping[str, Any], weights: Mapping[str, NDArray[np.float32]]) -> bytes:
    """config: Hugging Face's keys, RoPE's as rope_theta and rope_scaling. weights: by its names."""
    kind = {"qwen2": "qwen2", "qwen3": "qwen3"}.get(config["model_type"], "llama")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    keys: dict[str, Any] = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": config["rope_theta"],
        "rope.dimension_count": head_dim,
    }
    tensors = [_tensor(name, array, kind, heads, kv_heads) for name, array in weights.items()]
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    if scaling["rope_type"] == "llama3":
        values = _rope_freqs(scaling, config["rope_theta"], head_dim)
        tensors.append(
            Tensor("rope_freqs.weight", (head_dim // 2,), TYPE_F32, np.array(values, "<f4").tobytes())
        )
    elif scaling["rope_type"] != "default":
        stored = {
            "rope_type": "type",
            "factor": "factor",
            "original_max_position_embeddings": "original_context_length",
            "attention_factor": "yarn_attn_factor",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        keys |= {f"rope.scaling.{stored[key]}": value for key, value in scaling.items() if key in stored}
    if config.get("sliding_window"):
        keys["attention.sliding_window"] = config["sliding_window"]
        if config.get("layer_types"):
            slides = [kind == "sliding_attention" for kind in config["layer_types"]]
            keys["attention.sliding_window_pattern"] = Typed(ARRAY, slides, BOOL)
    return write(
        {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in keys.items()}}, tensors
    )


def _tensor(name: str, array: NDArray[np.float32], kind: str, heads: int, kv_heads: int) -> Tensor:
    base, suffix = name.rsplit(".", 1)
    prefix = ""
    if base.startswith("model.layers."):
        layer, base = base.removeprefix("model.layers.").split(".", 1)
        prefix = f"blk.{layer}."
    if kind == "llama" and base in ("self_attn.q_proj", "self_attn.k_proj"):
        # The halves of a head, row by row in turn.
        halves = array.reshape(heads if "q_proj" in base else kv_heads, 2, -1, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    data = np.ascontiguousarray(array, "<f4").tobytes()
    return Tensor(f"{prefix}{NAMES[base]}.{suffix}", array.shape, TYPE_F32, data)


def _rope_freqs(scaling: Mapping[str, Any], theta: float, head_dim: int) -> list[float]:
    factor, context = scaling["factor"], scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * theta ** (i / head_dim)
        if wavelength < context / high:
            divisors.append(1.0)
        elif wavelength > context / low:
            divisors.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return divisors
