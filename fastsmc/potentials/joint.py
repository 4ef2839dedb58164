"""One potential in the place of several: those of groups that are asked together (`Potential.per_particle`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastsmc.potentials.base import Potential


def _levels(potentials: Sequence[Potential]) -> Iterator[Sequence[Potential]]:
    """Lists potentials of one origin, then what they are made of, each with its like."""
    yield potentials
    for name in potentials[0].made_of:
        held = [getattr(potential, name) for potential in potentials]
        for like in zip(*held, strict=True) if isinstance(held[0], tuple) else [held]:
            yield from _levels(like)


def is_joinable(potential: Potential) -> bool:
    """Says whether a potential, and all that it is made of, may be asked for several groups at once.

    What a base class says is not enough: a subclass may hold more per particle.
    """
    levels = (level[0] for level in _levels([potential]))
    return all("per_particle" in vars(type(each)) and each.per_particle is not None for each in levels)


def check(potential: Potential, n: int) -> None:
    """Checks that what a potential names in `per_particle` has `n` entries.

    Raises:
        ValueError: naming class and attribute.
    """
    for (each,) in _levels([potential]):
        for name in each.per_particle or ():
            value = getattr(each, name, "missing")
            if value is not None and not (isinstance(value, torch.Tensor) and value.dim() and len(value) == n):
                what = tuple(value.shape) if isinstance(value, torch.Tensor) else repr(value)
                raise ValueError(
                    f"potential {type(each).__name__}: per_particle names {name!r}, which must be a tensor of {n} rows "
                    f"or None after reset; it is {what}"
                )


def join(potentials: Sequence[Potential]) -> None:
    """Makes the first of `potentials` hold the particles of all, one potential's behind the other's."""
    for level in _levels(potentials):
        for name in level[0].per_particle or ():
            values = [getattr(potential, name) for potential in level]
            if values[0] is not None:
                setattr(level[0], name, torch.cat(values))


def part(potentials: Sequence[Potential], sizes: Sequence[int]) -> None:
    """Gives each of `potentials`, whose first was joined, its own particles again, and numbers that have changed."""
    for level in _levels(potentials):
        numbers = {name: value for name, value in vars(level[0]).items() if type(value) in (int, float, bool)}
        for potential in level[1:]:
            vars(potential).update(numbers)
        for name in level[0].per_particle or ():
            joint = getattr(level[0], name)
            pieces = [None] * len(level) if joint is None else [piece.clone() for piece in joint.split(sizes)]
            for potential, piece in zip(level, pieces, strict=True):
                setattr(potential, name, piece)
