"""Faults: numbers that must not be, found on the device while a step runs, and what a group's error says of them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

#: kinds, in the order in which a step finds them
MODEL, PSI_INDEX, MASK_INDEX, NEXT_ROW, NEXT, PREFIX, COMPLETE, RULED_OUT, NO_WEIGHT, POOL = range(1, 11)

#: whose answer it was
METHODS = {
    PSI_INDEX: "logw_next",
    MASK_INDEX: "logw_next",
    NEXT_ROW: "logw_next",
    NEXT: "logw_next",
    PREFIX: "prefix",
    COMPLETE: "complete",
}


class Fault(NamedTuple):
    """Says which particles, `bad` (M,) bool, got numbers that must not be, and `values` (M,) if they are known.

    Attributes:
        later: how many steps after this one the potential was asked about.
    """

    kind: int
    bad: Tensor
    values: Tensor | None
    later: int


def describe(kind: int, particle: int, value: float, sizes: tuple[int, int]) -> str:
    """Says what a potential did wrong.

    Args:
        value: what it answered.
        sizes: rows of log ψ and of the mask in its answer.
    """
    if kind in (PSI_INDEX, MASK_INDEX):
        n, what = (sizes[1], "bits") if kind == MASK_INDEX else (sizes[0], "values")
        return f"returned index[{particle}]={int(value)}; must be in [0, {n}), the rows of {what}"
    got = "NaN or +inf" if kind == NEXT_ROW else value
    return f"particle {particle} got {got}; must be finite or -inf"
