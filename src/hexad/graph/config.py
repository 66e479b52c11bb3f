"""Values out of a model's config, checked as they are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from hexad.errors import CheckpointError


def integer(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """config[key], or the default where it is absent or None. Raises CheckpointError unless it is ≥ 1."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"the config's {key} is {value!r:.80}; a positive integer expected")
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """The same for a finite number > 0."""
    value = config.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"the config's {key} is {value!r:.80}; a positive number expected")
    return float(value)
