"""What all interventions are, and the maps that those of layers make."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsmc.potentials.tokens import short
from fastsmc.values import check_int

#: where a hidden state can be changed: what a layer puts out, or the product with its MLP's last weight
BLOCK, DOWN_PROJ = "block", "down_proj"
#: entries of |BBᵀ − I| that a basis B may have
ORTHONORMAL = 1e-4


class Sizes(NamedTuple):
    """Says what a model is, as far as interventions must fit it.

    Attributes:
        n_layers: decoder layers.
        hidden: H.
        inner: what down_proj reads; None: the model has no such weight.
        vocab: V.
    """

    n_layers: int
    hidden: int
    inner: int | None
    vocab: int


class Step(NamedTuple):
    """Is a map x + upᵀ (down · y) + shift: down (r, K), up (r, H), shift (H,), all float64.

    Attributes:
        replaces: x is not added, so that the map is the constant `shift`; it has no factors then.
    """

    down: Tensor
    up: Tensor
    shift: Tensor
    replaces: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Intervention:
    """Is the base of all interventions. Tensors are float32, on the CPU, and copies of what was given."""

    #: fields that are tensors, or may be
    TENSORS: ClassVar[tuple[str, ...]] = ()

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and all(
            torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
            for a, b in ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        )

    def __hash__(self) -> int:
        return hash(type(self))

    def _put(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _put_tensor(self, name: str, n_dims: int) -> Tensor:
        tensor = read_tensor(name, getattr(self, name), n_dims)
        self._put(name, tensor)
        return tensor

    def check(self, sizes: Sizes) -> None:
        """Refuses what does not fit a model.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """


@dataclasses.dataclass(frozen=True, eq=False)
class LayerIntervention(Intervention):
    """Is an intervention on what one layer puts out.

    Args:
        layer: 0 to the number of the model's layers − 1.
    """

    layer: int

    @property
    def place(self) -> str:
        """Says where in its layer it is made: BLOCK or DOWN_PROJ."""
        return BLOCK

    def __post_init__(self) -> None:
        self._put("layer", check_int("layer", self.layer, 0))

    @property
    def listed(self) -> tuple[int, ...]:
        """Lists, ascending, the positions that it names; (): it names none."""
        return ()

    def reaches(self, position: int, prompt_len: int) -> bool:
        """Says whether the token at a position is reached, after a prompt of so many tokens."""
        return not self.listed or position in self.listed

    @property
    def width(self) -> int:
        """Gives the H that the intervention is for."""
        raise NotImplementedError

    @property
    def is_nothing(self) -> bool:
        """Says whether it changes nothing, whatever x is, so that it need not be made."""
        return False

    def step(self) -> Step:
        """Makes the map."""
        raise NotImplementedError

    def check_registered(self) -> None:
        """Refuses what only a prompt makes definite. ValueError: it is such."""

    def check(self, sizes: Sizes) -> None:
        if self.layer >= sizes.n_layers:
            raise ValueError(f"layer={self.layer}: must be in [0, {sizes.n_layers}), the layers of this model")
        if self.width != sizes.hidden:
            name = type(self).__name__
            raise ValueError(f"{name}: is for hidden states of {self.width} elements, this model has {sizes.hidden}")


def read_tensor(name: str, value: Any, n_dims: int | None) -> Tensor:
    """Copies numbers into a float32 tensor of so many dimensions, none of them empty; logits alone may be −inf.

    Raises:
        ValueError: naming the argument.
    """
    try:
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True).contiguous()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name}={short(value)}: must be numbers") from None
    if (n_dims is not None and tensor.ndim != n_dims) or 0 in tensor.shape:
        what = {1: "a vector", 2: "a matrix"}.get(n_dims or 0, "a vector or a matrix")
        raise ValueError(f"{name}: has the shape {tuple(tensor.shape)}, must be {what}")
    bad = tensor.isnan() | (tensor == torch.inf) | ((tensor == -torch.inf) & (name != "logits"))
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(f"{name}[{', '.join(map(str, at))}]={float(tensor[at])}: must be finite")
    return tensor


def check_orthonormal(rows: Tensor, what: str) -> None:
    """Refuses a basis whose rows are not orthonormal to `ORTHONORMAL`; `what` they are called. ValueError."""
    off = (rows.double() @ rows.double().T - torch.eye(len(rows), device=rows.device)).abs()
    if len(rows) > rows.shape[1] or not float(off.max()) <= ORTHONORMAL:
        raise ValueError(
            f"basis: its {what} are not orthonormal, their products are off the identity by up to "
            f"{float(off.max()):.3g}; at most {ORTHONORMAL:g} is allowed"
        )
