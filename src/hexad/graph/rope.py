"""read_rope: what a model's config says about RoPE, and the ways to stretch it over longer contexts.

Each of these divides the frequencies, every one by a number of its own, so that positions turn the slow ones
no further than in training:

    linear    all alike: Chen et al. 2023, "position interpolation", arXiv:2306.15595
    yarn      the slow ones only, and cos and sin get a magnitude: Peng et al. 2023, arXiv:2309.00071
    llama3    the slow ones only: Llama 3.1 (Grattafiori et al. 2024, arXiv:2407.21783)
    divisors  as the file lists them: GGUF's tensor rope_freqs

Slow and fast are told by how many turns a frequency makes over the context of the training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hexad.errors import CheckpointError, UnsupportedError
from hexad.graph.config import integer, number
from hexad.graph.node import RopeSpec


def read_rope(config: Mapping[str, Any], head_dim: int) -> RopeSpec:
    """The rotation of heads of this size, from Hugging Face's keys rope_theta, rope_scaling and
    partial_rotary_factor, or for the latter rotary_dim, the number of features.

    Raises CheckpointError naming the key, and UnsupportedError naming a kind of scaling hexad does not know.
    """
    rotary_dim = integer(config, "rotary_dim", int(head_dim * number(config, "partial_rotary_factor", 1.0)))
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise CheckpointError(
            f"the config's rotary_dim is {rotary_dim}; an even number of at most {head_dim} expected"
        )
    rope = RopeSpec(head_dim, rotary_dim, number(config, "rope_theta", 10_000.0))
    scaling = config.get("rope_scaling")
    if not scaling:
        return rope
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"the config's rope_scaling is {scaling!r:.80}; a mapping expected")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    try:
        match kind:
            case "default":
                return rope
            case "linear":
                return _divided(rope, np.full(rotary_dim // 2, number(scaling, "factor")))
            case "llama3":
                return _divided(rope, _llama3(rope, scaling, _original_context(config, scaling)))
            case "yarn":
                return _yarn(rope, config, scaling)
            case "divisors":
                return _divided(rope, _given(scaling.get("divisors"), rotary_dim // 2))
    except UnsupportedError:
        raise
    except CheckpointError as error:
        raise CheckpointError(f"rope_scaling {kind}: {error}") from None
    raise UnsupportedError(
        f"rope_scaling of type {kind!r:.80} is not supported; hexad knows linear, llama3 and yarn"
    )


def _divided(rope: RopeSpec, divisors: NDArray[np.float64], magnitude: float = 1.0) -> RopeSpec:
    return replace(rope, divisors=tuple(divisors.tolist()), magnitude=magnitude)


def _original_context(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> int:
    """Tokens of the context before it was stretched."""
    return integer(scaling, "original_max_position_embeddings", integer(config, "max_position_embeddings"))


def _llama3(rope: RopeSpec, scaling: Mapping[str, Any], context: int) -> NDArray[np.float64]:
    """factor for frequencies of at most low_freq_factor turns over the context, 1 from high_freq_factor on;
    between them the frequency is a mean of both, weighted by the turns."""
    factor, low, high = (number(scaling, key) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise CheckpointError(
            f"low_freq_factor is {low:g} and high_freq_factor {high:g}; a higher one expected"
        )
    turns = context * rope.inv_freq().astype(np.float64) / (2 * math.pi)
    return _mixed(np.clip((turns - low) / (high - low), 0, 1), factor)


def _yarn(rope: RopeSpec, config: Mapping[str, Any], scaling: Mapping[str, Any]) -> RopeSpec:
    """Like llama3, but the weights fall evenly from frequency to frequency: from the one with beta_fast turns
    over the context to the one with beta_slow, rounded outwards to whole ones if `truncate`."""
    if rope.theta <= 1:
        raise CheckpointError(f"rope_theta is {rope.theta:g}; more than 1 expected")
    context = _original_context(config, scaling)
    factor = number(scaling, "factor", integer(config, "max_position_embeddings") / context)
    half, ends = rope.rotary_dim // 2, []
    for key, turns, rounded in (("beta_fast", 32.0, math.floor), ("beta_slow", 1.0, math.ceil)):
        turns = number(scaling, key, turns)
        end = rope.rotary_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        ends.append(float(rounded(end)) if scaling.get("truncate", True) else end)
    first, last = max(ends[0], 0.0), min(ends[1], rope.rotary_dim - 1.0)
    if first == last:
        last += 0.001
    slow = np.clip((np.arange(half) - first) / (last - first), 0, 1)
    return _divided(rope, _mixed(1 - slow, factor), _yarn_magnitude(scaling, factor))


def _yarn_magnitude(scaling: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by: as given; else 0.1 ln(factor) + 1, which the paper found best, or,
    with mscale and mscale_all_dim (DeepSeek-V2), the quotient of two such numbers."""

    def size(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if scaling.get("attention_factor") is not None:
        return number(scaling, "attention_factor")
    if scaling.get("mscale") and scaling.get("mscale_all_dim"):
        return size(number(scaling, "mscale")) / size(number(scaling, "mscale_all_dim"))
    return size(1.0)


def _mixed(kept: NDArray[np.float64], factor: float) -> NDArray[np.float64]:
    """Divisors: the frequency is to be `kept` of itself and the rest of itself / factor."""
    return 1 / (kept + (1 - kept) / factor)


def _given(divisors: object, count: int) -> NDArray[np.float64]:
    if not isinstance(divisors, tuple | list) or len(divisors) != count:
        raise CheckpointError(f"the divisors are {divisors!r:.80}; {count} numbers expected")
    return np.array([number({"divisor": divisor}, "divisor") for divisor in divisors])
