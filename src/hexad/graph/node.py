"""Node and RopeSpec: what graphs are made of.

A value is a float array [rows, features]; a row is one token of the ragged batch or, after `take_rows`, one
position whose logits are wanted. A value is named by the index of the node that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Value = int
"""Index of the node that makes a value."""


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (Su et al. 2021, arXiv:2104.09864) in the half-split form.

    In each head the first `rotary_dim` features are rotated: features i and i + rotary_dim/2 by the angle
    position × inv_freq[i], computed as a float32 product, and multiplied by `magnitude`.

    divisors: what scaling for longer contexts divides the frequencies theta^(−2i/rotary_dim) by, one for
    each; None for 1. Every kind of scaling comes down to these and the magnitude: see graph/rope.py.
    """

    head_dim: int
    rotary_dim: int
    theta: float
    divisors: tuple[float, ...] | None = None
    magnitude: float = 1.0

    def inv_freq(self) -> NDArray[np.float32]:
        """Angle per position, float32 [rotary_dim / 2]."""
        exponents = np.arange(0, self.rotary_dim, 2, dtype=np.float32) / np.float32(self.rotary_dim)
        frequencies: NDArray[np.float64] = 1.0 / np.power(np.float64(self.theta), exponents)
        if self.divisors is not None:
            frequencies /= np.array(self.divisors)
        return frequencies.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Node:
    """One op: frozen, plain data.

    inputs: values it reads. weights: names of checkpoint tensors it reads. features: width of its output.
    """

    op: str
    inputs: tuple[Value, ...]
    weights: tuple[str, ...]
    features: int
    attrs: Mapping[str, Any] = field(default_factory=dict)
