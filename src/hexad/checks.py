"""Checks of the values a user sets, shared by the classes of parameters and EngineConfig."""

from __future__ import annotations

import math
from collections.abc import Callable


def check_number(
    error: type[Exception], field: str, value: object, allowed: str, holds: Callable[[float], bool]
) -> None:
    """Raises `error`, naming the field, its value and the range, unless it is a finite number in the range.

    allowed: the range in words. holds: whether a number is in it.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise error(f"{field} must be a number {allowed}, not {shown(value)}.")
    # The range comes first: `isfinite` fails with integers that no float can hold.
    if not (holds(value) and math.isfinite(value)):
        raise error(f"{field} must be {allowed}, not {shown(value)}.")


def check_integer(
    error: type[Exception], field: str, value: object, allowed: str, holds: Callable[[int], bool]
) -> None:
    """Like `check_number`, for integers."""
    if isinstance(value, bool) or not isinstance(value, int) or not holds(value):
        raise error(f"{field} must be {allowed}, not {shown(value)}.")


def check_choice(error: type[Exception], field: str, value: object, choices: tuple[object, ...]) -> None:
    """Raises `error` unless the value is one of the choices, and of its type: 1 is not True."""
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        allowed = f"{', '.join(others)} or {last}" if others else last
        raise error(f"{field} must be {allowed}, not {shown(value)}.")


def shown(value: object) -> str:
    """A value as an error message shows it: its repr, cut off after 60 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out an integer of more than 4,300 digits
        text = f"{type(value).__name__} of more digits than can be shown"
    except RecursionError:
        text = f"{type(value).__name__} nested too deeply to be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."
