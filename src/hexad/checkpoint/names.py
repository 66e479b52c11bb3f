"""From GGUF's names to Hugging Face's, which are hexad's: config keys and tensor names.

The tables are in architectures.py. Whatever a file sets or holds that no row knows is refused, because
leaving it out could change the numbers without a word.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from hexad.checkpoint.architectures import ARCHITECTURES, Architecture, Key
from hexad.checkpoint.gguf import GGUFFile, LazyArray
from hexad.errors import CheckpointError, ParamsError, UnsupportedError
from hexad.params import SamplingParams
from hexad.weights import Weight

_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_repeat": "repetition_penalty",
    "penalty_last_n": "repeat_last_n",
    "mirostat": "mirostat",
    "mirostat_tau": "mirostat_tau",
    "mirostat_eta": "mirostat_eta",
    "sequence": "samplers",
}
"""Keys after "general.sampling.", and the field of SamplingParams that each is."""

_SAMPLERS = {
    "temp": "temperature",
    "typ_p": "typical_p",
    "typ": "typical_p",
    "typical": "typical_p",
    "nucleus": "top_p",
}
"""llama.cpp's other names of samplers, "-" being "_"."""

_ROPE_FREQS = "rope_freqs.weight"
"""A tensor that is read into the config."""

_REASONS = {
    "_exps": "experts of a mixture-of-experts model",
    "ffn_gate_inp": "the router of a mixture-of-experts model",
}


def read_config(file: GGUFFile) -> dict[str, Any]:
    """The model's config under Hugging Face's keys, every number checked.

    Raises CheckpointError for a key that is missing, of the wrong type, out of range or at odds with another,
    and UnsupportedError for an architecture or a setting hexad does not know.
    """
    architecture = _architecture(file)
    prefix = file.metadata["general.architecture"] + "."
    _refuse_unknown_keys(file, architecture, prefix)

    name = file.metadata.get("general.name")
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "name": name if isinstance(name, str) and name else file.path.stem,
    }
    for key in architecture.keys:
        config[key.config] = _read_key(file, key, prefix + key.gguf, config)
    config["vocab_size"] = _vocab_size(file, prefix + "vocab_size")
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    _check_heads(file, config)
    config["rope_scaling"] = _rope_scaling(file, prefix, config)
    config |= _windows(file, prefix, config)
    return config


def map_weights(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Weight]:
    """The file's tensors under Hugging Face's names, query and key rows in the order of half-split RoPE.

    config: what `read_config` made of the file, once it had found the architecture to be a known one.

    Raises CheckpointError for a missing tensor, and UnsupportedError for one hexad has no use for.
    """
    architecture = ARCHITECTURES[file.metadata["general.architecture"]]
    layers = range(config["num_hidden_layers"])
    rows = [("", "", row) for row in architecture.tensors]
    rows += [(f"blk.{i}.", f"model.layers.{i}.", row) for i in layers for row in architecture.layer_tensors]

    weights: dict[str, Weight] = {}
    unused = dict.fromkeys(name for name in file.tensors if name != _ROPE_FREQS)
    for stored_prefix, prefix, row in rows:
        for suffix in (".weight", ".bias") if row.bias else (".weight",):
            stored = stored_prefix + row.gguf + suffix
            if stored in file.tensors:
                del unused[stored]
                weight = file.tensors[stored]
                if row.rope_heads is not None:
                    weight = _half_split(file, stored, weight, config[row.rope_heads], config)
                weights[prefix + row.name + suffix] = weight
            elif suffix == ".weight" and not row.optional:
                _fail(file, f"tensor {stored} is missing")
    ignored = {f"blk.{i}.{name}" for i in layers for name in architecture.ignored}
    for stored in unused:
        if stored not in ignored:
            reason = next((why for part, why in _REASONS.items() if part in stored), "not part of this model")
            raise UnsupportedError(f"{file.path}: tensor {stored!r} is not supported: {reason}")
    return weights


def read_generation_defaults(file: GGUFFile) -> dict[str, Any]:
    """The recommended sampling parameters, by the names of SamplingParams.

    Wrong ones are left out: they only advise, and no model is the worse for their want.
    """
    defaults: dict[str, Any] = {}
    for key, name in _SAMPLING.items():
        value: Any = file.metadata.get(f"general.sampling.{key}")
        if isinstance(value, float):
            value = float(f"{value:.7g}")  # the decimal number that was meant: 0.6, not 0.6 in 32 bits
        elif name == "samplers" and isinstance(value, str):
            words = [word.strip().replace("-", "_") for word in value.split(";")]
            value = tuple(_SAMPLERS.get(word, word) for word in words if word) or None
        if value is not None:
            with suppress(ParamsError):
                defaults[name] = getattr(SamplingParams(**{name: value}), name)
    return defaults


def half_split_rows(heads: int, head_dim: int, rotary_dim: int) -> NDArray[np.int64]:
    """Rows of a stored q or k projection in the order half-split RoPE wants them, int64 [heads × head_dim].

    Converters store llama's rotated rows as pairs, for a RoPE that turns rows 2i and 2i + 1 together;
    half-split RoPE turns i and i + rotary_dim/2. Rows past rotary_dim are not rotated and stay in place.
    Queries and keys are reordered alike, so their products do not change.
    """
    head = np.arange(head_dim)
    head[:rotary_dim] = np.arange(rotary_dim).reshape(-1, 2).T.ravel()
    return (np.arange(heads)[:, None] * head_dim + head).ravel()


class _ReorderedRows(Mapping[str, NDArray[np.generic]]):
    """The arrays of `weight.take_rows(rows)`, gathered when read and not kept.

    So opening or inspecting a model touches no weight, and only whoever packs them holds a copy.
    """

    def __init__(self, weight: Weight, rows: NDArray[np.int64]) -> None:
        self._weight, self._rows = weight, rows

    def __getitem__(self, role: str) -> NDArray[np.generic]:
        if role not in self._weight.arrays:
            raise KeyError(role)
        return self._weight.take_rows(self._rows).arrays[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weight.arrays)

    def __len__(self) -> int:
        return len(self._weight.arrays)


def _half_split(file: GGUFFile, name: str, weight: Weight, heads: int, config: Mapping[str, Any]) -> Weight:
    """The weight with its rows in the order of `half_split_rows`."""
    head_dim = config["head_dim"]
    if weight.shape[0] != heads * head_dim:
        _fail(file, f"tensor {name} has {weight.shape[0]} rows; {heads} heads of {head_dim} expected")
    if len(weight.shape) == 1 and weight.format.block_size > 1:
        raise UnsupportedError(
            f"{file.path}: tensor {name} is a vector in {weight.format.name}; F32 expected"
        )
    rows = half_split_rows(heads, head_dim, config["rotary_dim"])
    place = weight.place and replace(weight.place, order=rows)
    return Weight(weight.format, weight.shape, _ReorderedRows(weight, rows), place)


def _architecture(file: GGUFFile) -> Architecture:
    metadata = file.metadata
    name = metadata.get("general.architecture")
    if name is None:
        _fail(file, "key general.architecture is missing")
    if not isinstance(name, str):
        _fail(file, f"general.architecture is {name!r:.80}; a string expected")
    if metadata.get("general.type", "model") != "model":
        raise UnsupportedError(f"{file.path}: holds {metadata['general.type']!r:.80}, not a model")
    if name not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedError(
            f"{file.path}: architecture {name!r:.80} is not supported; hexad knows {known}"
        )
    return ARCHITECTURES[name]


def _refuse_unknown_keys(file: GGUFFile, architecture: Architecture, prefix: str) -> None:
    known = {prefix + key.gguf for key in architecture.keys}
    for name, value in file.metadata.items():
        if not name.startswith(prefix) or name in known:
            continue
        allowed = architecture.neutral.get(name.removeprefix(prefix))
        if allowed is None or (allowed and value not in allowed):
            _refuse_setting(file, name)


def _refuse_setting(file: GGUFFile, name: str) -> NoReturn:
    value = file.metadata[name]
    raise UnsupportedError(f"{file.path}: sets {name!r:.80} to {value!r:.80}, which is not supported")


def _read_key(file: GGUFFile, key: Key, name: str, config: Mapping[str, Any]) -> Any:
    if name not in file.metadata:
        if key.default is None:
            _fail(file, f"key {name} is missing")
        return key.default(config)
    value = file.metadata[name]
    if isinstance(value, LazyArray) and "num_hidden_layers" in config:
        value = _same_in_all_layers(file, name, value, config["num_hidden_layers"])
    if isinstance(value, bool) or not isinstance(value, int if key.kind == "int" else (int, float)):
        _fail(file, f"{name} is {value!r:.80}; {key.kind} expected")
    if not 0 < value <= key.maximum:  # also refuses NaN
        _fail(file, f"{name} is {value!r}; a positive {key.kind} up to {key.maximum:g} expected")
    return value if key.kind == "int" else float(value)


def _same_in_all_layers(file: GGUFFile, name: str, values: LazyArray, layers: int) -> Any:
    if len(values) != layers:
        _fail(file, f"{name} has {len(values)} values for {layers} layers")
    first, *others = values.tolist()
    if any(value != first for value in others):
        raise UnsupportedError(f"{file.path}: {name} differs between layers, which is not supported")
    return first


def _vocab_size(file: GGUFFile, name: str) -> int:
    table = file.tensors.get("token_embd.weight")
    if table is None:
        _fail(file, "tensor token_embd.weight is missing")
    rows = table.shape[0]
    stated = file.metadata.get(name, rows)
    if stated != rows:
        _fail(file, f"{name} is {stated!r:.80}, but token_embd.weight has {rows} rows")
    return rows


def _check_heads(file: GGUFFile, config: dict[str, Any]) -> None:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim, rotary_dim, value_dim = config["head_dim"], config["rotary_dim"], config.pop("value_head_dim")
    if heads % kv_heads:
        _fail(file, f"{heads} query heads do not share {kv_heads} KV heads evenly")
    if head_dim < 2 or head_dim % 2:
        _fail(file, f"heads have {head_dim} features; RoPE needs an even number")
    if rotary_dim % 2 or rotary_dim > head_dim:
        _fail(file, f"RoPE turns {rotary_dim} of {head_dim} features; an even number of them expected")
    if value_dim != head_dim:
        raise UnsupportedError(
            f"{file.path}: heads have keys of {head_dim} and values of {value_dim} features, not equal ones"
        )


def _rope_scaling(file: GGUFFile, prefix: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Hugging Face's rope_scaling. Where Llama 3.1 scales, converters store the divisors it comes to."""
    kind = file.metadata.get(f"{prefix}rope.scaling.type", "linear")
    factor = _optional(file, f"{prefix}rope.scaling.factor")
    factor = factor or _optional(file, f"{prefix}rope.scale_linear") or 1.0
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = _yarn(file, f"{prefix}rope.scaling.", factor, config)
    elif kind not in ("none", "linear"):
        _refuse_setting(file, f"{prefix}rope.scaling.type")
    elif _optional(file, f"{prefix}rope.scaling.attn_factor") not in (None, 1.0):
        _refuse_setting(file, f"{prefix}rope.scaling.attn_factor")
    elif kind == "linear" and factor != 1.0:
        scaling = {"rope_type": "linear", "factor": factor}
    tensor = file.tensors.get(_ROPE_FREQS)
    if tensor is None:
        return scaling
    if scaling is not None:
        raise UnsupportedError(f"{file.path}: scales RoPE by {kind!r} and by tensor {_ROPE_FREQS!r} at once")
    if tensor.format.name != "F32" or tensor.shape != (config["rotary_dim"] // 2,):
        _fail(
            file,
            f"tensor {_ROPE_FREQS} is {tensor.format.name} of shape {tensor.shape}; F32 of shape "
            f"{(config['rotary_dim'] // 2,)} expected",
        )
    return {"rope_type": "divisors", "divisors": tuple(tensor.dequantise().tolist())}


def _yarn(file: GGUFFile, prefix: str, factor: float, config: Mapping[str, Any]) -> dict[str, Any]:
    """YaRN as llama.cpp computes it: cos and sin are multiplied by attn_factor, and by what the factor makes
    of the paper's formula, less the part for which yarn_log_multiplier makes up elsewhere. Converters put
    Hugging Face's attention_factor, which takes the formula's place, into yarn_attn_factor."""
    if file.metadata.get(f"{prefix}yarn_ext_factor", 1.0) != 1.0:
        _refuse_setting(file, f"{prefix}yarn_ext_factor")  # how much of YaRN is mixed with linear scaling
    context = _optional(file, f"{prefix}original_context_length", "int")
    growth = 0.1 * math.log(max(factor, 1.0))
    shared = growth * (_optional(file, f"{prefix}yarn_log_multiplier") or 0.0)
    magnitude = _optional(file, f"{prefix}yarn_attn_factor") or (1 + growth) / (1 + shared)
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": context or config["max_position_embeddings"],
        "attention_factor": magnitude * (_optional(file, f"{prefix}attn_factor") or 1.0),
        "beta_fast": _optional(file, f"{prefix}yarn_beta_fast"),
        "beta_slow": _optional(file, f"{prefix}yarn_beta_slow"),
    }


def _windows(file: GGUFFile, prefix: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of sliding windows. "llama" files with one are Mistral's or Ministral's."""
    name, layers = f"{prefix}attention.sliding_window", f"{prefix}attention.sliding_window_pattern"
    window = _optional(file, name, "int")
    if window is None or window >= config["max_position_embeddings"]:
        return {"sliding_window": None, "layer_types": None}
    found: dict[str, Any] = {"sliding_window": window, "layer_types": None}
    if layers in file.metadata:
        pattern = file.metadata[layers]
        slides = pattern.tolist() if isinstance(pattern, LazyArray) else []
        if len(slides) != config["num_hidden_layers"] or not all(isinstance(s, bool) for s in slides):
            _refuse_setting(file, layers)  # a period, which means one thing here and another there
        found["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    if config["model_type"] == "llama":
        return found | {"model_type": "mistral" if found["layer_types"] is None else "ministral"}
    if found["layer_types"] is None:
        _refuse_setting(file, name)  # it does not hold for all layers, and nothing says for which
    return found | {"use_sliding_window": True}


def _optional(file: GGUFFile, name: str, kind: Literal["int", "float"] = "float") -> Any:
    """The checked value of a key; None where it is absent or 0, which llama.cpp takes for unset."""
    if file.metadata.get(name, 0) == 0:
        return None
    return _read_key(file, Key(name, name, kind), name, {})


def _fail(file: GGUFFile, reason: str) -> NoReturn:
    raise CheckpointError(f"{file.path}: {reason}")
