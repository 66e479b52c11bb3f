"""config.json and generation_config.json: from what transformers has written over the years to hexad's keys.

One `Family` holds what is peculiar to one `model_type`. What a config sets and no table here knows is
refused, because leaving it out could change the numbers without a word; null is as good as not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from hexad.checks import shown
from hexad.errors import CheckpointError, ParamsError, UnsupportedError
from hexad.params import SamplingParams
from hexad.weights import Weight


@dataclass(frozen=True, slots=True)
class Family:
    """What one `model_type` differs in.

    defaults: of keys that a config.json may leave out. neutral: its own further keys, accepted only at values
    that mean "not used"; an empty tuple accepts any value. biases: for each projection of a layer that may
    have a bias whether it has, or the key that says so. windows: which layers have a sliding window, where
    sliding_window is set: none; all; those listed in layer_types, else all; or, "flagged", if
    use_sliding_window, those listed in layer_types, else all but the first max_window_layers.
    """

    defaults: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    biases: Mapping[str, bool | str] = field(default_factory=dict)
    windows: Literal["none", "all", "listed", "flagged"] = "none"


_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_MISTRAL_DEFAULTS = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN_DEFAULTS = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_NO_WINDOW = {"sliding_window": (), "use_sliding_window": (False,), "max_window_layers": ()}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        defaults={"max_position_embeddings": 2048},
        neutral={
            **_NO_WINDOW,  # transformers' llama has no windows, whatever a config says
            "is_llama_config": (),
            "rope_interleaved": (False,),
        },
        biases={**dict.fromkeys(_ATTENTION, "attention_bias"), **dict.fromkeys(_MLP, "mlp_bias")},
    ),
    "mistral": Family(
        defaults=_MISTRAL_DEFAULTS,
        neutral={"use_sliding_window": (), "max_window_layers": ()},  # transformers' mistral reads neither
        windows="all",
    ),
    "ministral": Family(defaults=_MISTRAL_DEFAULTS, windows="listed"),
    "qwen2": Family(
        defaults=_QWEN_DEFAULTS,
        neutral={"use_mrope": (False,)},
        biases=dict.fromkeys(_ATTENTION[:3], True),
        windows="flagged",
    ),
    "qwen3": Family(
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        biases=dict.fromkeys(_ATTENTION, "attention_bias"),
        windows="flagged",
    ),
}
"""By model_type. Defaults are those of transformers' configuration classes."""

_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
}
"""Keys of all models that are accepted only at these values."""

_READ = frozenset(
    {
        "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings",
        "rms_norm_eps", "tie_word_embeddings", "rope_theta",
        "rope_scaling", "rope_parameters", "partial_rotary_factor", "layer_types",
    }
)  # fmt: skip

_METADATA = frozenset(
    {
        "architectures", "auto_map", "transformers_version", "transformers.js_config", "torch_dtype",
        "dtype", "use_cache", "name_or_path", "task_specific_params", "id2label", "label2id",
        "num_labels", "problem_type", "finetuning_task", "tokenizer_class", "bos_token_id",
        "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "unk_token_id",
        "decoder_start_token_id", "prefix", "initializer_range", "attention_dropout", "hidden_dropout",
        "resid_pdrop", "embd_pdrop", "attn_pdrop", "gradient_checkpointing", "output_attentions",
        "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "is_decoder",
        "tie_last_hidden_states", "chunk_size_feed_forward", "pretraining_tp", "attn_implementation",
        "experts_implementation", "num_logits_to_keep", "max_sequence_length", "model_max_length",
        "tokenizer_model_max_length", "unsloth_version", "unsloth_fixed", "max_length", "min_length",
        "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty",
        "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences",
        "output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id",
        "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
        "begin_suppress_tokens", "max_new_tokens",
    }
)  # fmt: skip
"""Keys that say nothing about what the layers compute: of training, of generation, about files, or, such as
pretraining_tp, about how a sum is divided."""

ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "mscale",
        "mscale_all_dim", "truncate",
    ),
}  # fmt: skip
"""What each kind of RoPE reads; of these those in _ROPE_REQUIRED have to be there."""

_ROPE_REQUIRED = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE_METADATA = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}

_SAMPLING = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
"""Keys of generation_config.json, and the field of SamplingParams that each is."""

_LARGEST = 2**31 - 1


def read_config(raw: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The model's config under hexad's keys (see `Checkpoint.config`; "name" apart), every value checked.

    raw: what config.json holds. path: of that file, for messages.

    Raises CheckpointError for a key that is missing, of the wrong type or out of range, and UnsupportedError
    for a model or a setting hexad does not know.
    """
    return _Reader(raw, path).read()


def check_biases(raw: Mapping[str, Any], weights: Mapping[str, Weight], path: Path) -> None:
    """Compares the biases stored with those that the model has: transformers ignores one too many, and makes
    one up that is missing.

    raw, path: as in `read_config`, which has been called. Raises CheckpointError.
    """
    family = FAMILIES[raw["model_type"]]
    for i in range(raw["num_hidden_layers"]):
        for projection in (*_ATTENTION, *_MLP):
            name, says = f"model.layers.{i}.{projection}.bias", family.biases.get(projection, False)
            wanted = raw.get(says, False) if isinstance(says, str) else says
            if wanted and name not in weights:
                raise CheckpointError(f"{path}: the model's tensor {name} is missing")
            if not wanted and name in weights:
                raise CheckpointError(f"{path}: says that there is no bias {name}, but it is stored")


def read_generation_defaults(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The recommended sampling parameters, by the names of SamplingParams.

    raw: what generation_config.json holds. One that says do_sample = false recommends to be greedy. Wrong
    values are left out: they only advise, and no model is the worse for their want.
    """
    defaults: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        if (value := raw.get(key)) is not None:
            with suppress(ParamsError):
                defaults[name] = getattr(SamplingParams(**{name: value}), name)
    if raw.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


class _Reader:
    """A config.json being read."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path
        self.family = self._family()

    def read(self) -> dict[str, Any]:
        self._refuse_unknown_keys()
        for says in set(self.family.biases.values()):
            if isinstance(says, str):
                self._flag(says)
        config: dict[str, Any] = {"model_type": self.raw["model_type"]}
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "vocab_size",
            "max_position_embeddings",
        ):
            config[key] = self._integer(key)
        config["num_hidden_layers"] = self._integer("num_hidden_layers", maximum=4096)
        heads = config["num_attention_heads"]
        config["num_key_value_heads"] = self._integer("num_key_value_heads", default=heads)
        config["head_dim"] = self._integer("head_dim", default=max(1, config["hidden_size"] // heads))
        config["rms_norm_eps"] = self._number("rms_norm_eps", 1e-6, maximum=1.0)
        config["tie_word_embeddings"] = self._flag("tie_word_embeddings")
        self._read_rope(config)
        self._read_windows(config)
        return config

    def _family(self) -> Family:
        model_type, architectures = self.raw.get("model_type"), self.raw.get("architectures")
        if not isinstance(model_type, str):
            self._fail(f"model_type is {shown(model_type)}; a name expected")
        if quantised := self.raw.get("quantization_config") or self.raw.get("compression_config"):
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            self._refuse(
                f"the model is quantised by {shown(method)}, which is not supported yet. Choose the original "
                "model or a GGUF file of it"
            )
        if model_type not in FAMILIES:
            self._refuse(
                f"model_type {shown(model_type)} is not supported; hexad knows {', '.join(FAMILIES)}"
            )
        if architectures is not None:
            if not isinstance(architectures, list) or not all(
                isinstance(name, str) for name in architectures
            ):
                self._fail(f"architectures is {shown(architectures)}; a list of names expected")
            for name in architectures:
                if not name.endswith("ForCausalLM"):
                    self._refuse(
                        f"holds a {shown(name)}; of these models hexad runs the ForCausalLM ones only"
                    )
        return FAMILIES[model_type]

    def _refuse_unknown_keys(self) -> None:
        known = _READ | _METADATA | {says for says in self.family.biases.values() if isinstance(says, str)}
        if self.family.windows != "none":
            known |= {"sliding_window"}
        if self.family.windows == "flagged":
            known |= {"use_sliding_window", "max_window_layers"}
        neutral = {"attention_bias": (False,), "mlp_bias": (False,), **_NEUTRAL, **self.family.neutral}
        for key, value in self.raw.items():
            if value is None or key in known or key.startswith("_"):
                continue
            allowed = neutral.get(key)
            if allowed is None or (allowed and value not in allowed):
                self._refuse(f"sets {key!r:.80} to {shown(value)}, which is not supported")

    def _read_rope(self, config: dict[str, Any]) -> None:
        """rope_theta, rotary_dim and rope_scaling; a scaled context is as long as what it is scaled to.

        transformers 5 has one dict, rope_parameters, where there were rope_theta, rope_scaling and
        partial_rotary_factor; where a file has several, it is the older that hold there.
        """
        name = "rope_scaling" if self.raw.get("rope_scaling") else "rope_parameters"
        rope = self.raw.get(name) or {}
        if not isinstance(rope, Mapping):
            self._fail(f"{name} is {shown(rope)}; an object expected")
        if any(isinstance(value, Mapping) for value in rope.values()):
            self._refuse(f"{name} {shown(rope)} differs between layers, which is not supported")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if not isinstance(kind, str):
            self._fail(f"{name}'s rope_type is {shown(kind)}; a name expected")
        if kind not in ROPE_KEYS:
            self._refuse(f"RoPE scaling {shown(kind)} is not supported; hexad knows {', '.join(ROPE_KEYS)}")
        known = _ROPE_METADATA.union(*ROPE_KEYS.values())
        for key, value in rope.items():
            if key not in known and value is not None:
                self._refuse(f"{name} sets {key!r:.80} to {shown(value)}, which is not supported")

        outer = self._number("rope_theta", 10_000.0, maximum=1e15)
        config["rope_theta"] = self._number("rope_theta", outer, 1e15, rope, f"{name}'s ")
        part = self._number("partial_rotary_factor", 1.0, maximum=1.0)
        part = self._number("partial_rotary_factor", part, 1.0, rope, f"{name}'s ")
        config["rotary_dim"] = int(config["head_dim"] * part)
        if config["rotary_dim"] < 2 or config["rotary_dim"] % 2:
            self._fail(f"RoPE turns {config['rotary_dim']} features of a head; an even number expected")

        scaling: dict[str, Any] = {"rope_type": kind}
        context = config["max_position_embeddings"]
        for key in ROPE_KEYS[kind]:
            if key == "original_max_position_embeddings":
                scaling[key] = self._integer(key, default=context, source=rope, prefix=f"{name}'s ")
            elif key == "truncate":
                if rope.get(key) is not None:
                    scaling[key] = self._flag(key, rope, f"{name}'s ")
            elif rope.get(key) is not None or key in _ROPE_REQUIRED:
                scaling[key] = self._number(key, None, 1e6, rope, f"{name}'s ")
        config["rope_scaling"] = None if kind == "default" else scaling
        # As in vLLM: what RoPE is scaled by comes on top of the context that the model was trained for.
        if kind in ("linear", "yarn"):
            original = scaling.get("original_max_position_embeddings", context)
            config["max_position_embeddings"] = min(max(context, int(original * scaling["factor"])), _LARGEST)

    def _read_windows(self, config: dict[str, Any]) -> None:
        """sliding_window, and layer_types for each layer; None and False where no layer has a window."""
        layers, windows = config["num_hidden_layers"], self.family.windows
        window = self.raw.get("sliding_window", self.family.defaults.get("sliding_window"))
        if windows == "none" or (windows == "flagged" and not self._flag("use_sliding_window")):
            window = None
        if window is not None:
            window = self._integer("sliding_window")
        types = self.raw.get("layer_types")
        if types is None:
            whole = self._integer("max_window_layers", minimum=0) if windows == "flagged" else 0
            kind = "full_attention" if window is None else "sliding_attention"
            types = ["full_attention" if i < whole else kind for i in range(layers)]
        elif not isinstance(types, list) or len(types) != layers:
            self._fail(f"layer_types is {shown(types)}; a list of {layers} names expected")
        for kind in types:
            if kind not in ("full_attention", "sliding_attention"):
                self._refuse(
                    f"layer_types has {shown(kind)}; hexad knows full_attention and sliding_attention"
                )
        sliding = types.count("sliding_attention")
        if sliding and window is None:
            self._fail("layer_types has sliding_attention, but there is no sliding_window")
        if windows == "all" and window is not None and sliding < layers:
            self._refuse("layer_types leaves some layers without the sliding_window, which is not supported")
        config["sliding_window"] = window if sliding else None
        config["layer_types"] = types if sliding else None
        config["use_sliding_window"] = sliding > 0

    def _integer(
        self,
        key: str,
        *,
        default: int | None = None,
        minimum: int = 1,
        maximum: int = _LARGEST,
        source: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> int:
        """An integer in the range. default: where null and, unless the family has another, where absent."""
        source = self.raw if source is None else source
        value = source.get(key, self.family.defaults.get(key) if source is self.raw else None)
        value = default if value is None else value
        if value is None:
            self._fail(f"{prefix}{key} is missing")
        if type(value) is not int or not minimum <= value <= maximum:
            self._fail(f"{prefix}{key} is {shown(value)}; an integer from {minimum} to {maximum} expected")
        return value

    def _number(
        self,
        key: str,
        default: float | None,
        maximum: float,
        source: Mapping[str, Any] | None = None,
        prefix: str = "",
    ) -> float:
        """A number above 0. default: where absent or null."""
        value = (self.raw if source is None else source).get(key)
        value = default if value is None else value
        if value is None:
            self._fail(f"{prefix}{key} is missing")
        if type(value) not in (int, float) or not 0 < value <= maximum:  # also refuses NaN
            self._fail(f"{prefix}{key} is {shown(value)}; a number above 0 and up to {maximum:g} expected")
        return float(value)

    def _flag(self, key: str, source: Mapping[str, Any] | None = None, prefix: str = "") -> bool:
        """true or false; false where absent or null."""
        value = (self.raw if source is None else source).get(key)
        if value is not None and not isinstance(value, bool):
            self._fail(f"{prefix}{key} is {shown(value)}; true or false expected")
        return bool(value)

    def _fail(self, reason: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {reason}")

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedError(f"{self.path}: {reason}")
