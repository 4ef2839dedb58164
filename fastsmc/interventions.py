"""Interventions: what a model does otherwise than it was trained to, as frozen values that can be kept and sent.

    Steer        x + scale·vector                    Subspace     at one position, a source's part in a subspace
    Affine       A x + b                             RankOne      W + u vᵀ, W the weight of down_proj
    Project      x without its part in a subspace,   Prompt       another prompt
                 or with a given one there           Temperature  another temperature
    Interchange  at one position, a source's x       Facts        another model's logits along a text

x is the hidden state that a layer puts out (the residual stream). A list of interventions is one, made in its order;
`fastsmc.maps` makes of it what `ops.intervene` runs. Helpers fit some of them: `Steer.from_contrast`, `Affine.mimic`,
`RankOne.edit`.

Positions count from 0 over prompt and generated tokens. A token that is generated at position p goes through the model
there, so "generated" changes logits from the second generated token on; the first one's are the prompt's.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsmc.p0 import P0, restrict
from fastsmc.params import SMCParams
from fastsmc.potentials.tokens import short, token_list
from fastsmc.values import as_int, check_choice, check_float, check_int

#: where a hidden state can be changed: what a layer puts out, or the product with its MLP's last weight
BLOCK, DOWN_PROJ = "block", "down_proj"
#: names of `Steer.at`
REACHES = ("all", "prompt", "generated")
#: entries of |BBᵀ − I| that a basis B may have
ORTHONORMAL = 1e-4
#: the largest rank of A − I for which `Affine` is factored
FEW = 64
#: elements of `Facts.logits`
FACTS_ELEMENTS = 1 << 28
FORMAT, VERSION = "fastsmc interventions", 1


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


def check_orthonormal(rows: Tensor, what: str) -> None:
    """Refuses a basis whose rows are not orthonormal to `ORTHONORMAL`; `what` they are called. ValueError."""
    off = (rows.double() @ rows.double().T - torch.eye(len(rows), device=rows.device)).abs()
    if len(rows) > rows.shape[1] or not float(off.max()) <= ORTHONORMAL:
        raise ValueError(
            f"basis: its {what} are not orthonormal, their products are off the identity by up to "
            f"{float(off.max()):.3g}; at most {ORTHONORMAL:g} is allowed"
        )


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


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt(Intervention):
    """Puts another prompt in the place of the prompt."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = token_list("token_ids", self.token_ids)
        if not ids:
            raise ValueError("token_ids=[]: a prompt needs at least one token")
        self._put("token_ids", tuple(ids))

    def check(self, sizes: Sizes) -> None:
        token_list("token_ids", self.token_ids, sizes.vocab)


@dataclasses.dataclass(frozen=True, eq=False)
class Temperature(Intervention):
    """Puts another temperature in the place of the temperature, as `SMCParams` takes it."""

    t: float

    def __post_init__(self) -> None:
        self._put("t", check_float("t", self.t, 0.01, 1e6))


@dataclasses.dataclass(frozen=True, eq=False)
class Facts(Intervention):
    """Holds what another model said along a text, so that a pair of models can be compared without both in one process.

    Args:
        logits: (T, V), row t before token t of the text; −inf is allowed, at most 2**28 elements.
        token_ids: the text, T tokens, at least one.
        prompt_token_ids: what it followed.
        p0: settings of the draw that made the text, as `SMCParams.p0` gives them; {}: temperature 1 and nothing else.
        tokenizer: `fastsmc.twists.tokenizer_hash` of the model's tokenizer; None: unknown.
    """

    TENSORS = ("logits",)
    logits: Tensor
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    p0: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        logits = self._put_tensor("logits", 2)
        n, vocab = logits.shape
        check_facts_size(n, vocab)
        for name in ("token_ids", "prompt_token_ids"):
            ids = token_list(name, getattr(self, name), vocab)
            if not ids:
                raise ValueError(f"{name}=[]: must hold at least one token")
            self._put(name, tuple(ids))
        if len(self.token_ids) != n:
            raise ValueError(f"token_ids: {len(self.token_ids)} tokens for {n} rows of logits")
        self._check_possible()

    def _check_possible(self) -> None:
        """Refuses a token that the stated draw cannot have made."""
        params = self.params()
        settings, n = P0(params, (), self.logits.device), len(self.token_ids)
        logits = restrict(self.logits.clone(), [settings], [0, n], torch.arange(n))
        for t, token in enumerate(self.token_ids):
            if logits[t, token] == -torch.inf:
                raise ValueError(f"token_ids[{t}]={token}: is impossible there under p0={params.p0()}")

    def params(self) -> SMCParams:
        """Makes parameters of `p0`, of as many tokens as the text has; of more, where `min_tokens` asks for them.

        Raises:
            ValueError: `p0` holds something else.
        """
        n = len(self.token_ids)
        try:
            return SMCParams(**{**self.p0, "max_tokens": max(n, self.p0.get("min_tokens", 0))})
        except TypeError:
            raise ValueError(f"p0={self.p0!r}: must hold settings that SMCParams.p0 gives") from None

    def check(self, sizes: Sizes) -> None:
        if self.logits.shape[1] != sizes.vocab:
            raise ValueError(
                f"facts: are of a vocabulary of {self.logits.shape[1]} tokens, this model's is {sizes.vocab}"
            )

    def check_tokenizer(self, tokenizer: str | None) -> None:
        """Refuses facts of another tokenizer, where both hashes are known."""
        if tokenizer != self.tokenizer and None not in (tokenizer, self.tokenizer):
            raise ValueError(
                f"facts: are of another tokenizer, {str(self.tokenizer)[:12]}…; this model's is {str(tokenizer)[:12]}…"
            )


def check_facts_size(n_tokens: int, vocab: int) -> None:
    """Refuses facts of more than 2**28 elements. ValueError: they are."""
    if n_tokens * vocab > FACTS_ELEMENTS:
        raise ValueError(f"facts: {n_tokens} rows of {vocab} logits are over {FACTS_ELEMENTS} elements")


KINDS: dict[str, type[Intervention]] = {
    kind.__name__: kind for kind in (Steer, Affine, Project, Interchange, Subspace, RankOne, Prompt, Temperature, Facts)
}


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


# ------------------------------------------------------------------------------------------- the arguments of a call
class Reading(NamedTuple):
    """Is an intervention of one prompt, taken apart: the layers' part, and what becomes of prompt and parameters."""

    layers: tuple[LayerIntervention, ...]
    prompt: list[int]
    params: SMCParams


def read_interventions(given: Any, n_prompts: int, sizes: Sizes) -> list[tuple[Intervention, ...]]:
    """Reads the intervention of each prompt of a call of `smc`.

    Args:
        given: None; an intervention or a list of them, which is one, for all prompts; or a list of one of these for
            each prompt, at least one of which is None or a list.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    several = isinstance(given, (list, tuple)) and any(not isinstance(one, Intervention) for one in given)
    if several and len(given) != n_prompts:
        raise ValueError(f"intervention: {len(given)} interventions for {n_prompts} prompts")
    each = [_read_one(one, f"intervention[{i}]") for i, one in enumerate(given)] if several else None
    each = [_read_one(given, "intervention")] * n_prompts if each is None else each
    for one in {id(one): one for one in each}.values():
        for part in one:
            part.check(sizes)
            if isinstance(part, Facts):
                raise ValueError("intervention: Facts are a text to ask about, and change no draw")
        for kind in (Prompt, Temperature):
            if sum(isinstance(part, kind) for part in one) > 1:
                raise ValueError(f"intervention: has more than one {kind.__name__}")
    return each


def _read_one(given: Any, name: str) -> tuple[Intervention, ...]:
    parts = () if given is None else given if isinstance(given, (list, tuple)) else (given,)
    for part in parts:
        if not isinstance(part, Intervention) or type(part).__name__ not in KINDS:
            raise ValueError(f"{name}={short(part)}: must be one of {', '.join(KINDS)}, or a list of them")
    return tuple(parts)


def take_apart(parts: Sequence[Intervention], prompt: list[int], params: SMCParams) -> Reading:
    """Applies `Prompt` and `Temperature` to what they change, and leaves what the model must do.

    What changes nothing is left out: a prompt has no KV of its own then, which would have other last digits than that
    which vLLM has written.
    """
    for part in parts:
        if isinstance(part, Prompt):
            prompt = list(part.token_ids)
        elif isinstance(part, Temperature):
            params = dataclasses.replace(params, temperature=part.t)
    end = len(prompt) + params.max_tokens - 1
    made = (part.of_prompt(len(prompt), end) if isinstance(part, Swap) else part for part in parts)
    layers = tuple(part for part in made if isinstance(part, LayerIntervention) and not part.is_nothing)
    return Reading(layers, prompt, params)


# ------------------------------------------------------------------------------------------------------ kept and sent
def to_bytes(parts: Sequence[Intervention]) -> bytes:
    """Makes one safetensors file in memory: tensors, and the rest as JSON in its metadata."""
    from safetensors.torch import save

    tensors, entries = {}, []
    for i, part in enumerate(_read_one(list(parts), "parts")):
        entry: dict[str, Any] = {"kind": type(part).__name__}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                tensors[f"{i}.{field.name}"] = value.clone()  # one object may stand twice in a list
            else:
                entry[field.name] = value
        entries.append(entry)
    return save(tensors, {"interventions": json.dumps({"format": FORMAT, "version": VERSION, "list": entries})})


def from_bytes(data: bytes, source: str = "interventions") -> list[Intervention]:
    """Reads what `to_bytes` made.

    Raises:
        ValueError: naming `source` and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["interventions"])
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is {meta['format']!r} {meta['version']!r}, not {FORMAT!r} {VERSION}")
        out = []
        for i, entry in enumerate(meta["list"]):
            kind = KINDS[entry.pop("kind")]
            entry |= {name: tensors[f"{i}.{name}"] for name in kind.TENSORS if f"{i}.{name}" in tensors}
            out.append(kind(**entry))
        return out
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: holds no interventions ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def save(parts: Sequence[Intervention], path: str | os.PathLike) -> None:
    """Writes one file at exactly `path`. OSError if that cannot be done."""
    data = to_bytes(parts)
    with open(path, "wb") as file:
        file.write(data)


def load(path: str | os.PathLike) -> list[Intervention]:
    """Reads what `save` wrote. OSError if the file cannot be opened, ValueError naming it if it is not one."""
    with open(path, "rb") as file:
        return from_bytes(file.read(), os.fspath(path))
