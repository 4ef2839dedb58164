"""Single values where they come in and go out: checks that name the argument, and numbers that JSON has.

It imports nothing of fastsmc, so that parameters, potentials and ops can all use it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any


def as_int(value: Any) -> int | None:
    """Reads an integer, NumPy's and torch's too; None for what is none, as a bool is."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Reads an integer, as `as_int` does, from `low` to `high`, or without an end.

    Raises:
        ValueError: naming the argument, its value and what is allowed; as all checks here.
    """
    number = as_int(value)
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r}: must be an integer {allowed}")
    return number


def check_float(name: str, value: Any, low: float, high: float) -> float:
    """Reads a number in [low, high]."""
    try:
        number = float(value) if not isinstance(value, (bool, str)) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise ValueError(f"{name}={value!r}: must be a number in [{low:g}, {high:g}]")
    return number


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuses what is not among `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def json_safe(value: Any) -> Any:
    """Puts None for each number that JSON lacks (NaN, ±inf), in dicts and lists too; NumPy's become Python's."""
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
