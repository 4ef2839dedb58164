"""Interventions that put a source's hidden state, or its part in a subspace, into a base, at one position."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsmc.interventions.base import LayerIntervention, Sizes, Step, check_orthonormal
from fastsmc.potentials.tokens import short
from fastsmc.values import as_int


@dataclasses.dataclass(frozen=True, eq=False)
class Swap(LayerIntervention):
    """Is an intervention that takes what a layer puts out at one position from a source.

    In configurations of `interchange`, positions may be lists of one per pair, and the sources are that call's. Where a
    draw is under it, there is one position, and `value` says what the source had there.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("value",)

    def __post_init__(self: Any) -> None:  # each kind has its fields in an order of its own
        super().__post_init__()
        self._put("position", read_position("position", self.position))
        if self.source_position is not None:
            self._put("source_position", read_position("source_position", self.source_position))
        if self.value is not None:
            self._put_tensor("value", 1)

    @property
    def listed(self: Any) -> tuple[int, ...]:
        assert isinstance(self.position, int) and self.position >= 0  # `of_prompt` or `check_registered` has seen to it
        return (self.position,)

    def of_prompt(self: Any, prompt_len: int, end: int) -> Swap:
        """Checks that a draw can be under it, after a prompt of so many tokens, and counts its position from 0.

        Args:
            end: positions at which tokens go through the model are below.

        Raises:
            ValueError: there is no value, a list of positions, or one outside.
        """
        self._check_drawn()
        if not -prompt_len <= self.position < end:
            raise ValueError(
                f"position={self.position}: must be in [{-prompt_len}, {end}), as the prompt has {prompt_len} tokens"
            )
        return self if self.position >= 0 else dataclasses.replace(self, position=self.position + prompt_len)

    def _check_drawn(self: Any) -> None:
        name = type(self).__name__
        if self.value is None:
            raise ValueError(f"{name}: value=None: a draw needs the source's hidden state (see `activations`)")
        if not isinstance(self.position, int):
            raise ValueError(f"{name}: position={short(self.position)}: a draw needs a single one")

    def check_registered(self: Any) -> None:
        self._check_drawn()
        if self.position < 0:
            raise ValueError(f"position={self.position}: is one from a prompt's end, which is not known here")

    def check(self, sizes: Sizes) -> None:
        if self.width:
            super().check(sizes)
        elif self.layer >= sizes.n_layers:
            raise ValueError(f"layer={self.layer}: must be in [0, {sizes.n_layers}), the layers of this model")


def read_position(name: str, given: Any) -> int | tuple[int, ...]:
    """Reads a position, or a list of them. ValueError: it is neither."""
    several = isinstance(given, (list, tuple)) or getattr(given, "ndim", 0) == 1
    each = [as_int(one) for one in (given if several else (given,))]
    if not each or None in each:
        raise ValueError(f"{name}={short(given)}: must be an integer, from 0, or negative from the end, or a list")
    return tuple(each) if several else each[0]  # type: ignore[arg-type, return-value]  # there is no None


@dataclasses.dataclass(frozen=True, eq=False)
class Interchange(Swap):
    """Puts a source's hidden state in the place of what a layer puts out at one position.

    Args:
        position: from 0, or negative from the prompt's end; a list gives one per pair.
        source_position: where the source's state stands; None: at the same position.
        value: (H,), the source's hidden state, as `activations` reads it; None: `interchange` reads it.
    """

    position: int | tuple[int, ...]
    source_position: int | tuple[int, ...] | None = None
    value: Tensor | None = None

    @property
    def width(self) -> int:
        return 0 if self.value is None else len(self.value)

    def step(self, width: int | None = None) -> Step:
        """Makes the map; of a value of zero and this width, where there is none."""
        value = torch.zeros(width or 0, dtype=torch.float64) if self.value is None else self.value.double()
        none = value.new_zeros((0, len(value)))
        return Step(none, none, value, replaces=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Subspace(Swap):
    """Puts a source's part in a subspace in the place of what a layer puts out at one position: x + B Bᵀ(value − x).

    Args:
        position, source_position, value: as of `Interchange`.
        basis: B (H, k), orthonormal columns, as `BoundlessDAS.basis` gives it.
    """

    TENSORS = ("basis", "value")
    position: int | tuple[int, ...]
    basis: Tensor
    source_position: int | tuple[int, ...] | None = None
    value: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        basis = self._put_tensor("basis", 2)
        check_orthonormal(basis.T, "columns")
        if self.value is not None and len(self.value) != len(basis):
            raise ValueError(f"value: has {len(self.value)} elements, must have {len(basis)}, as the basis")

    @property
    def width(self) -> int:
        return len(self.basis)

    def step(self, width: int | None = None) -> Step:
        basis = self.basis.double().T
        value = basis.new_zeros(self.width) if self.value is None else self.value.double()
        return Step(basis, -basis, basis.T @ (basis @ value))
