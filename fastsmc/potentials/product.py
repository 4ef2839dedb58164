"""Potentials made of others: `Product`, and `Final`, a φ without its ψ."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.answers import check_next, check_rows, check_scores
from fastsmc.potentials.base import Engine, Masked, Potential, Rows, State, parts


class Product(Potential):
    """Multiplies: ψ is the product of the factors' ψ, φ of their φ; also written `p * q`.

    With the twisted proposal the factors that give `logw_next` guide every step, and the others come in with their
    `complete` when a particle ends.
    """

    made_of = ("factors",)  # a group's copy has a copy per factor, even of one that stands twice
    per_particle = ()

    def __init__(self, *factors: Potential) -> None:
        if not factors or not all(isinstance(f, Potential) for f in factors):
            raise ValueError("Product: give one or more potentials")
        self.factors = factors

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return max(f.lookahead for f in self.factors)

    @property
    def continuation(self) -> list[int] | None:  # type: ignore[override]
        """Gives that of the first factor that has one; others have theirs scored when they ask."""
        return next((f.continuation for f in self.factors if f.continuation is not None), None)

    @property
    def continuation_in_prefix(self) -> bool:  # type: ignore[override]
        return next((f.continuation_in_prefix for f in self.factors if f.continuation is not None), False)

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return all(f.capturable for f in self.factors)

    @property
    def proposal_only(self) -> bool:  # type: ignore[override]
        return any(f.proposal_only for f in self.factors) or (self.needs_prefix and guides(self))

    @property
    def needs_prefix(self) -> bool:  # type: ignore[override]
        return any(f.needs_prefix for f in self.factors)

    def prepare(self, tokenizer: Any) -> None:
        for f in self.factors:
            f.prepare(tokenizer)

    def setup(self, engine: Engine) -> None:
        for f in self.factors:
            f.setup(engine)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        for f in self.factors:
            f.reset(n_particles, prompt)

    def reindex(self, ancestors: Tensor) -> None:
        for f in self.factors:
            f.reindex(ancestors)

    def prefix(self, state: State) -> Tensor:
        return _sum(check_scores(f, "prefix", f.prefix(state), state.finished) for f in self.factors)

    def complete(self, state: State) -> Tensor:
        return _sum(check_scores(f, "complete", f.complete(state), state.finished) for f in self.factors)

    def logw_next(self, state: State) -> Tensor | Rows | Masked | None:
        values: Tensor | Rows | None = None
        masks: Rows | None = None  # of bits; they stay packed
        for f in self.factors:
            change = check_next(f, f.logw_next(state), state.finished)
            if change is not None:
                change = check_rows(f, change, ~state.finished)
            if isinstance(change, Masked):
                bits = Rows(change.bits, change.index)
                masks = bits if masks is None else _by_pairs(torch.bitwise_and, masks, bits)
                change = change.values
            if change is not None:
                values = change if values is None else _by_pairs(_add, _rows(values), _rows(change))
        return values if masks is None else Masked(*masks, values)


Potential._product = Product  # here, since base.py cannot import what is made of it


def _sum(scores: Iterable[Tensor]) -> Tensor:
    return functools.reduce(operator.add, scores)


def _add(a: Tensor, b: Tensor) -> Tensor:
    return a.float() + b.float()


def _rows(matrix: Tensor | Rows) -> Rows:
    return matrix if isinstance(matrix, Rows) else Rows(matrix, torch.arange(len(matrix), device=matrix.device))


def _by_pairs(combine: Callable[[Tensor, Tensor], Tensor], a: Rows, b: Rows) -> Rows:
    """Computes combine(row of a, row of b) of every particle, once for each pair of rows that there is."""
    pairs, index = torch.unique(a.index * len(b.values) + b.index, return_inverse=True)
    return Rows(combine(a.values[pairs // len(b.values)], b.values[pairs % len(b.values)]), index)


class Final(Potential):
    """Has another potential's φ without its ψ: particles are weighed with it when they end, and not before."""

    made_of = ("potential",)
    per_particle = ()

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.potential.capturable

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return self.potential.lookahead

    def prepare(self, tokenizer: Any) -> None:
        self.potential.prepare(tokenizer)

    def setup(self, engine: Engine) -> None:
        self.potential.setup(engine)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self.potential.reset(n_particles, prompt)

    def reindex(self, ancestors: Tensor) -> None:
        self.potential.reindex(ancestors)

    @property
    def continuation(self) -> list[int] | None:  # type: ignore[override]
        return self.potential.continuation

    def fetch(self, state: State, about: Tensor) -> Future[None] | None:
        about = about & state.finished  # the others are not asked about
        return self.potential.fetch(state, about) if about.any() else None

    def complete(self, state: State) -> Tensor:
        return check_scores(self.potential, "complete", self.potential.complete(state), state.finished)


def guides(potential: Potential) -> bool:
    """Says whether a potential, or one that it is made of, has `logw_next`."""
    if isinstance(potential, (Final, Product)):
        return isinstance(potential, Product) and any(map(guides, potential.factors))
    return type(potential).logw_next is not Potential.logw_next


def fetches(potential: Potential) -> bool:
    """Says whether a potential, or one that it is made of, defines `fetch`."""
    own = type(potential).fetch not in (Potential.fetch, Final.fetch)  # which hand on what others define
    return own or any(map(fetches, parts(potential)))
