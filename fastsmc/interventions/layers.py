"""Interventions on what layers put out, at all positions of a kind: vectors, affine maps, projections, an edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.interventions.base import DOWN_PROJ, LayerIntervention, Sizes, Step, check_orthonormal, read_tensor
from fastsmc.potentials.tokens import token_list
from fastsmc.values import check_choice, check_float

#: names of `Steer.at`
REACHES = ("all", "prompt", "generated")
#: the largest rank of A − I for which `Affine` is factored
FEW = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Steer(LayerIntervention):
    """Adds scale·vector to what a layer puts out.

    Args:
        vector: (H,), finite, as is scale·vector.
        scale: a number; 0 changes nothing, bit for bit.
        at: "all", "prompt" or "generated", or a list of positions.
    """

    TENSORS = ("vector",)
    vector: Tensor
    scale: float = 1.0
    at: str | tuple[int, ...] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        vector = self._put_tensor("vector", 1)
        self._put("scale", check_float("scale", self.scale, -1e30, 1e30))
        if not (self.scale * vector).isfinite().all():
            raise ValueError(f"scale={self.scale!r}: times the vector is not finite in float32")
        if isinstance(self.at, str):
            check_choice("at", self.at, REACHES)
        else:
            positions = token_list("at", self.at)
            if not positions:
                raise ValueError(f"at={self.at!r}: must be one of {', '.join(map(repr, REACHES))}, or positions")
            self._put("at", tuple(sorted(set(positions))))

    @property
    def listed(self) -> tuple[int, ...]:
        return self.at if isinstance(self.at, tuple) else ()

    def reaches(self, position: int, prompt_len: int) -> bool:
        if self.listed:
            return position in self.listed
        return self.at == "all" or (self.at == "prompt") == (position < prompt_len)

    @property
    def width(self) -> int:
        return len(self.vector)

    @property
    def is_nothing(self) -> bool:
        return not (self.scale * self.vector).any()

    def step(self) -> Step:
        none = self.vector.new_zeros((0, self.width), dtype=torch.float64)
        return Step(none, none, self.scale * self.vector.double())

    @classmethod
    def from_contrast(cls, llm: Any, positive: Sequence[Any], negative: Sequence[Any], layer: int) -> Steer:
        """Takes the mean hidden state at the last token of `positive` texts less that of `negative` ones.

        Args:
            llm: `HFEngine`, or an `LLM`, whose weights are loaded once more, by transformers.
            positive, negative: texts, or lists of token ids.
            layer: whose output is read, and steered.

        Raises:
            ValueError: naming the argument; no text, or a layer that is not there.
        """
        from fastsmc.editing import contrast

        return cls(layer, contrast(llm, positive, negative, layer))


@dataclasses.dataclass(frozen=True, eq=False)
class Affine(LayerIntervention):
    """Makes A x + b of what a layer puts out, x: A is (H, H), b (H,)."""

    TENSORS = ("A", "b")
    A: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        a, b = self._put_tensor("A", 2), self._put_tensor("b", 1)
        if a.shape != (len(b), len(b)):
            raise ValueError(f"A: is {tuple(a.shape)}, must be ({len(b)}, {len(b)}), as b has {len(b)} elements")

    @property
    def width(self) -> int:
        return len(self.b)

    def step(self) -> Step:
        """Makes the map of A − I, of the rank that it has up to `FEW`, else of H factors.

        A random projection finds the rank; all of the matrix then says whether it is that to float32's last digits.
        """
        unit = torch.eye(self.width, dtype=torch.float64)
        matrix = self.A.double() - unit
        scale = max(1.0, float(matrix.abs().max()))
        sketch = torch.randn(self.width, FEW + 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        u, s, _ = torch.linalg.svd(matrix @ sketch, full_matrices=False)
        basis = u[:, s > 1e-6 * scale * self.width**0.5]  # the span of A − I without what rounding A has put there
        down = basis.T @ matrix
        if basis.shape[1] <= FEW and float((matrix - basis @ down).abs().max()) <= 2.0**-22 * scale:
            return Step(down, basis.T, self.b.double())
        return Step(unit, matrix.T, self.b.double())

    @classmethod
    def mimic(cls, x0: Any, x1: Any, layer: int, shrink: float = 1e-4) -> Affine:
        """Fits the affine map that carries samples x0 (n, H) to the mean and covariance of x1 (m, H), with least moves.

        It is the optimal transport between two normal distributions (MiMiC, arXiv 2402.09631). `shrink` times the mean
        variance is added to the diagonals of both covariances, which few samples leave singular.

        Raises:
            ValueError: fewer than two samples, or samples of different widths.
        """
        from fastsmc.editing import transport

        return cls(layer, *transport(read_tensor("x0", x0, 2), read_tensor("x1", x1, 2), shrink))


@dataclasses.dataclass(frozen=True, eq=False)
class Project(LayerIntervention):
    """Takes the part in a subspace out of what a layer puts out, or sets it.

    Args:
        basis: (k, H), orthonormal rows; (H,), a single one.
        value: (k,), the coordinates that x gets there; None: 0.
    """

    TENSORS = ("basis", "value")
    basis: Tensor
    value: Tensor | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.basis
        if not isinstance(given, Tensor):
            given = read_tensor("basis", given, None)
        self._put("basis", given[None] if given.ndim == 1 else given)
        basis = self._put_tensor("basis", 2)
        check_orthonormal(basis, "rows")
        if self.value is not None and self._put_tensor("value", 1).shape != (len(basis),):
            raise ValueError(f"value: has {len(self.value)} elements, must have {len(basis)}, one per row of the basis")

    @property
    def width(self) -> int:
        return self.basis.shape[1]

    def step(self) -> Step:
        basis = self.basis.double()
        value = basis.new_zeros(len(basis)) if self.value is None else self.value.double()
        return Step(basis, -basis, basis.T @ value)


@dataclasses.dataclass(frozen=True, eq=False)
class RankOne(LayerIntervention):
    """Adds u vᵀ to the weight of a layer's down_proj, the last of its MLP.

    Args:
        u: (H,); v: (K,), K the width within the MLP.
        site: "down_proj".
    """

    TENSORS = ("u", "v")
    u: Tensor
    v: Tensor
    site: str = DOWN_PROJ

    def __post_init__(self) -> None:
        super().__post_init__()
        self._put_tensor("u", 1), self._put_tensor("v", 1)
        check_choice("site", self.site, (DOWN_PROJ,))

    @property
    def place(self) -> str:
        return self.site

    @property
    def width(self) -> int:
        return len(self.u)

    def step(self) -> Step:
        return Step(self.v.double()[None], self.u.double()[None], torch.zeros(self.width, dtype=torch.float64))

    def check(self, sizes: Sizes) -> None:
        super().check(sizes)
        if sizes.inner is None:
            raise ValueError("RankOne: the layers of this model have no mlp.down_proj")
        if len(self.v) != sizes.inner:
            raise ValueError(f"v: has {len(self.v)} elements, the down_proj of this model reads {sizes.inner}")

    @classmethod
    def edit(
        cls, llm: Any, prompt: Any, subject: str, target: Any, layer: int, texts: Sequence[Any], steps: int = 25
    ) -> RankOne:
        """Writes one fact into a layer: after `prompt` the model says `target`. ROME (arXiv 2202.05262), closed form.

        With k what down_proj reads at the subject's last token, C the mean of such outer products over `texts`, and t
        the output there that makes the target likely (found by gradient): v = C⁻¹k, u = (t − W k) / (vᵀ k).

        Args:
            llm: `HFEngine`, or an `LLM`, whose weights are loaded once more, by transformers.
            prompt: a text that holds `subject`.
            target: a text, or token ids.
            texts: what keys are common; some thousands of tokens, so that C has an inverse worth the name.
            steps: of the search for t.

        Raises:
            ValueError: naming the argument and what is wrong with it.
        """
        from fastsmc.editing import rank_one

        return cls(layer, *rank_one(llm, prompt, subject, target, layer, texts, steps))
