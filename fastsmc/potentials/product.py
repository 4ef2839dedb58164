"""Potentials made of others: `Product`, and `Final`, a φ without its ψ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, Rows, State, check_next, check_rows, check_scores


class Product(Potential):
    """ψ = product of the factors' ψ, φ of their φ; also written `p * q`.

    With the twisted proposal the factors that give `logw_next` guide every step, and the others come in with their
    `complete` when a particle ends.
    """

    _apart = ("factors",)  # a group's copy has a copy per factor, even of one that stands twice

    def __init__(self, *factors: Potential) -> None:
        if not factors or not all(isinstance(f, Potential) for f in factors):
            raise ValueError("Product: give one or more potentials")
        self.factors = factors

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return max(f.lookahead for f in self.factors)

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return all(f.capturable for f in self.factors)

    @property
    def proposal_only(self) -> bool:  # type: ignore[override]
        return any(f.proposal_only for f in self.factors)

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
        return sum(check_scores(f, "prefix", f.prefix(state), state.finished) for f in self.factors)

    def complete(self, state: State) -> Tensor:
        return sum(check_scores(f, "complete", f.complete(state), state.finished) for f in self.factors)

    def logw_next(self, state: State) -> Tensor | Rows | None:
        total = None
        for f in self.factors:
            change = check_next(f, f.logw_next(state), state.finished)
            if isinstance(change, Rows):
                change = check_rows(f, change, ~state.finished)
            if total is None or change is None:
                total = change if total is None else total
                continue
            a, b = (
                r if isinstance(r, Rows) else Rows(r, torch.arange(len(r), device=r.device)) for r in (total, change)
            )
            pairs, index = torch.unique(a.index * len(b.values) + b.index, return_inverse=True)
            one, other = a.values[pairs // len(b.values)], b.values[pairs % len(b.values)]
            total = Rows(one.float() + other.float(), index)
        return total


class Final(Potential):
    """Another potential's φ without its ψ: what particles are weighed with when they end, and nothing before."""

    _apart = ("potential",)

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

    def complete(self, state: State) -> Tensor:
        return check_scores(self.potential, "complete", self.potential.complete(state), state.finished)
