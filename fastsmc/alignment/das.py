"""Boundless DAS: the subspace of a hidden state that plays a variable of a causal model, found by gradients.

    hb, hs (n, d) → R (d, m), mask (m,) → h' = hb + R (mask · Rᵀ (hs − hb)) → head → logits → cross entropy + boundary

R has orthonormal columns, m = d of them or `rank`; the mask lets the first b·m through, b the boundary, ever more
sharply as the temperature falls. (Wu et al., arXiv 2305.08809.)

R is Q (I − A/2)⁻¹ (I + A/2) with a skew-symmetric A, Cayley's map: as exactly orthogonal as the matrix exponential that
torch's `orthogonal` and pyvene take, for one LU decomposition. With a rank, A = P Qᵀ − Q Pᵀ, and all that is solved is
a system of 2·rank unknowns (Wen and Yin, 2013).

On disk an alignment is a directory: `card.json` and `alignment.safetensors`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastsmc.interventions import check_orthonormal
from fastsmc.values import check_choice, check_float, check_int, json_safe

FORMAT, VERSION = "fastsmc.alignment", 1
MASKS = ("one-sided", "pyvene")
#: the boundary is at least this share of the columns
LEAST = 1e-3
#: the largest rate or weight
MOST = 1e6


# -- the card ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Says what an alignment is of, and how it was made.

    Args:
        d, rank, seed, mask: as in `BoundlessDAS`.
        steps: gradient steps.
        base_model: name or path of the model; None: hidden states came from elsewhere.
        layer, position, variable: what was aligned, of a model and a causal model.
        iia: on pairs that were not trained on, by the trainer.
        settings: the whole training configuration, for the record.
    """

    d: int
    rank: int | None = None
    seed: int = 0
    mask: str = "one-sided"
    steps: int = 0
    base_model: str | None = None
    layer: int | None = None
    position: Any = None
    variable: tuple[str, ...] = ()
    iia: float | None = None
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str | os.PathLike) -> Card:
        """Reads the card of the alignment in directory `path`. ValueError: there is none; names the path."""
        file = Path(path) / "card.json"
        try:
            fields = json.loads(file.read_text())
            if fields.pop("format", None) != FORMAT:
                raise ValueError("it is not the card of a fastsmc alignment")
            if (version := fields.pop("version", None)) != VERSION:
                raise ValueError(f"its version is {version!r}; this fastsmc reads {VERSION}")
            return cls(**fields | {"variable": tuple(fields.get("variable", ()))})
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"alignment {os.fspath(path)!r}: cannot read {file.name}: {error}") from None

    def write(self, path: Path) -> None:
        fields = {"format": FORMAT, "version": VERSION, **json_safe(dataclasses.asdict(self))}
        temporary = path / "card.tmp"  # a directory has a whole card, or none
        temporary.write_text(json.dumps(fields, indent=1) + "\n")
        temporary.replace(path / "card.json")


def check_basis(basis: Any, d: int) -> Tensor:
    """Reads a basis as (d, k) float32, and refuses one whose columns are not orthonormal. ValueError."""
    basis = torch.as_tensor(basis).detach()
    if basis.ndim != 2 or basis.shape[0] != d or not 1 <= basis.shape[1] <= d or not basis.is_floating_point():
        raise ValueError(f"basis: is {tuple(basis.shape)}; must be ({d}, k) of floating point, k from 1 to {d}")
    basis = basis.float()
    check_orthonormal(basis.T, "columns")
    return basis


# -- the alignment -----------------------------------------------------------------------------------------------------
class BoundlessDAS:
    """Learns which subspace of hidden states plays a variable.

    Args:
        d: size of the hidden state.
        seed: of the rotation at the start, and of the order in which `fit` takes pairs.
        rank: m, columns of the rotation; None: d.
        mask: 'one-sided', σ((b·m − i − ½)/T) of column i; 'pyvene', its σ(i/T)·σ((b·m − i)/T), of which column 0 is
            always half, with a rotation by the matrix exponential: what pyvene 0.1.8 does, to compare with it.

    Attributes:
        card: what it is.
        history: per step of the last `fit`, its loss, boundary and temperature.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    def __init__(self, d: int, seed: int = 0, rank: int | None = None, mask: str = "one-sided") -> None:
        d, seed = check_int("d", d, 1), check_int("seed", seed, 0)
        rank = None if rank is None else check_int("rank", rank, 1, d)
        check_choice("mask", mask, MASKS)
        if mask == "pyvene" and rank is not None:
            raise ValueError(f"rank={rank}: pyvene has none; must be None with mask='pyvene'")
        self.card = Card(d=d, rank=rank, seed=seed, mask=mask)
        self.history: list[dict[str, float]] = []
        noise = torch.randn(d, rank or d, generator=torch.Generator().manual_seed(seed))
        self._begin(torch.linalg.qr(noise).Q, 0.5)

    def _begin(self, rotation: Tensor, boundary: float) -> None:
        """Starts from a rotation (d, m)."""
        self._start = rotation.contiguous()
        self._turn = torch.zeros_like(self._start, requires_grad=True)  # makes A
        self._b = torch.tensor(boundary, device=rotation.device, requires_grad=True)

    def to(self, device: torch.device | str) -> BoundlessDAS:
        """Moves to a device."""
        for name in ("_start", "_turn", "_b"):
            value = getattr(self, name).detach().to(device)
            setattr(self, name, value.requires_grad_(name != "_start"))
        return self

    @property
    def boundary(self) -> float:
        """Gives b, in (0, 1]: the share of columns that the mask lets through."""
        return float(self._b.detach())

    def rotation(self) -> Tensor:
        """Computes R (d, m), with gradients."""
        q, x = self._start, self._turn
        if self.card.rank is not None:
            u, v = torch.cat([x, -q], 1), torch.cat([q, x], 1)
            eye = torch.eye(u.shape[1], dtype=q.dtype, device=q.device)
            return q + u @ torch.linalg.solve(eye - 0.5 * (v.T @ u), v.T @ q)
        lower = x.tril(-1)
        a = lower - lower.T
        eye = torch.eye(len(a), dtype=q.dtype, device=q.device)
        if self.card.mask == "pyvene":
            return q @ torch.linalg.matrix_exp(a)
        return 2.0 * torch.linalg.solve(eye - 0.5 * a, q, left=False) - q

    def _edges(self) -> Tensor:
        """Computes b·m − i − ½ of each column i, (m,)."""
        m = self._start.shape[1]
        return self._b * m - torch.arange(m, device=self._b.device) - 0.5

    def mask(self, temperature: float) -> Tensor:
        """Computes how much of each column passes, (m,), with gradients."""
        if self.card.mask == "pyvene":
            columns = torch.arange(self._start.shape[1], device=self._b.device)
            return torch.sigmoid(columns / temperature) * torch.sigmoid((self._edges() + 0.5) / temperature)
        return torch.sigmoid(self._edges() / temperature)

    def swap(self, hb: Tensor, hs: Tensor, temperature: float) -> Tensor:
        """Computes h' (B, d) of bases and sources (B, d) at a temperature, with gradients."""
        r = self.rotation()
        return hb + ((hs - hb) @ r * self.mask(temperature)) @ r.T

    @torch.no_grad()
    def basis(self) -> Tensor:
        """Computes the columns with b·m − i − ½ > 0, at least one: (d, k) float32, on the CPU, orthonormal to 1e-4."""
        k = max(1, int((self._edges() > 0).sum()))
        return check_basis(self.rotation()[:, :k], self.card.d).cpu().contiguous()

    def fit(
        self,
        hb: Tensor,
        hs: Tensor,
        labels: Tensor,
        head: Callable[[Tensor], Tensor],
        steps: int,
        batch: int = 64,
        lr: float = 1e-3,
        boundary_lr: float = 1e-2,
        boundary_weight: float = 1.0,
        temperature: tuple[float, float] = (50.0, 0.1),
    ) -> BoundlessDAS:
        """Takes gradient steps with Adam on cross entropy + boundary_weight · b, and returns itself.

        Args:
            hb, hs: (n, d), hidden states of bases and of sources.
            labels: (n,) int64, which of the head's C logits is to be the largest with the source's variable.
            head: maps h' (B, d) float32 to logits (B, C); its parameters are left as they are.
            steps: gradient steps; each pass over the pairs takes them in another order, without repeating any.
            batch: pairs per step.
            lr, boundary_lr: rates of rotation and boundary.
            temperature: at the first step and at the last, on a straight line between.

        Raises:
            ValueError: naming the argument: another shape, unequal numbers, hidden states that are not finite, a label
                that is no logit of the head's, steps < 1, a temperature that is not positive or rises; or a loss that
                is not finite.
        """
        states = read_states("hb", hb, self.card.d), read_states("hs", hs, self.card.d)
        labels = read_labels(labels)
        if not len(states[0]) == len(states[1]) == len(labels):
            raise ValueError(f"hb, hs, labels: are {len(hb)}, {len(hs)} and {len(labels)}; must be as many")
        fit = Fit(self, len(labels), FitConfig(steps, batch, lr, boundary_lr, boundary_weight, temperature))
        device = self._start.device
        base, source, labels = states[0].to(device), states[1].to(device), labels.to(device)
        self.history = []
        while not fit.done:
            rows = fit.rows().to(device)
            self.history.append(fit.step(base[rows], source[rows], labels[rows], head))
        self.card = dataclasses.replace(self.card, steps=fit.taken, settings=json_safe(dataclasses.asdict(fit.config)))
        return self

    # ------------------------------------------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike) -> None:
        """Writes the directory `path`, in the place of an alignment that was there."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / "card.json").unlink(missing_ok=True)
        with torch.no_grad():
            tensors = {"rotation": self.rotation().cpu().contiguous(), "boundary": self._b.detach().cpu()}
        save_file(tensors, path / "alignment.safetensors")
        self.card.write(path)  # last: a directory with a card is whole

    @classmethod
    def load(cls, path: str | os.PathLike) -> BoundlessDAS:
        """Reads what `save` wrote.

        Raises:
            ValueError: naming the path and what is wrong with it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        card = Card.read(path)
        try:
            check_choice("mask", card.mask, MASKS)
            tensors = load_file(Path(path) / "alignment.safetensors")
            rotation, boundary = tensors["rotation"], float(tensors["boundary"])
            if rotation.shape != (card.d, card.rank or card.d):
                raise ValueError(f"rotation is {tuple(rotation.shape)}, the card says d={card.d}, rank={card.rank}")
            das = cls.__new__(cls)
            das.card, das.history = card, []
            das._begin(check_basis(rotation, card.d), check_float("boundary", boundary, LEAST / 2, 1.0))
        except (OSError, KeyError, RuntimeError, ValueError, TypeError, SafetensorError) as error:
            raise ValueError(f"alignment {os.fspath(path)!r}: {error}") from None
        return das


def read_states(name: str, states: Any, d: int) -> Tensor:
    """Reads hidden states as (n, d) float32. ValueError: another shape, none, or some that are not finite."""
    states = torch.as_tensor(states).detach()
    if states.ndim != 2 or states.shape[1] != d or not len(states):
        raise ValueError(f"{name}: is {tuple(states.shape)}; must be (n, {d}), n at least 1")
    if len(bad := (~states.isfinite().all(1)).nonzero()):
        raise ValueError(f"{name}[{int(bad[0])}]: is NaN or infinite, as are {len(bad)} of {len(states)}")
    return states.float()


def read_labels(labels: Any) -> Tensor:
    """Reads (n,) int64 of at least 0. ValueError: it is none."""
    labels = torch.as_tensor(labels)
    if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: is {tuple(labels.shape)} of {labels.dtype}; must be (n,) of integers")
    if len(labels) and int(labels.min()) < 0:
        raise ValueError(f"labels: has {int(labels.min())}; must be at least 0")
    return labels.long()


def _read_temperature(temperature: Any) -> tuple[float, float]:
    """Reads the first and the last temperature. ValueError: they are not positive, or rise."""
    if not isinstance(temperature, (list, tuple)) or len(temperature) != 2:
        raise ValueError(f"temperature={temperature!r}: must be two numbers, the first and the last")
    first, last = (check_float(f"temperature[{i}]", value, 1e-6, MOST) for i, value in enumerate(temperature))
    if last > first:
        raise ValueError(f"temperature={temperature!r}: rises; must fall or stay")
    return first, last


@dataclasses.dataclass(frozen=True)
class FitConfig:
    """Says how a `BoundlessDAS` is fitted; arguments as in `BoundlessDAS.fit`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    steps: int
    batch: int = 64
    lr: float = 1e-3
    boundary_lr: float = 1e-2
    boundary_weight: float = 1.0
    temperature: tuple[float, float] = (50.0, 0.1)

    def __post_init__(self) -> None:
        for name in ("steps", "batch"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1))
        for name in ("lr", "boundary_lr", "boundary_weight"):
            object.__setattr__(self, name, check_float(name, getattr(self, name), 0.0, MOST))
        object.__setattr__(self, "temperature", _read_temperature(self.temperature))


class Fit:
    """Takes gradient steps with a `BoundlessDAS`, from any state that it was left in.

    Args:
        das: what is fitted.
        n: pairs.
        config: how.

    Attributes:
        taken: steps.
    """

    def __init__(self, das: BoundlessDAS, n: int, config: FitConfig) -> None:
        self.das, self.n, self.config, self.taken = das, n, config, 0
        groups = [{"params": [das._turn], "lr": config.lr}, {"params": [das._b], "lr": config.boundary_lr}]
        self._optimizer = torch.optim.Adam(groups)
        self._order: tuple[int, Tensor] | None = None

    @property
    def done(self) -> bool:
        return self.taken == self.config.steps

    @property
    def temperature(self) -> float:
        """Gives that of the next step."""
        first, last = self.config.temperature
        return first + (last - first) * self.taken / max(self.config.steps - 1, 1)

    def rows(self) -> Tensor:
        """Gives the pairs of the next step, (B,) int64: all in turn where they are no more than a batch."""
        batch = self.config.batch
        if self.n <= batch:
            return torch.arange(self.n)
        epoch, part = divmod(self.taken, -(-self.n // batch))
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed((self.das.card.seed + 1) * 1_000_003 + epoch)
            self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[1][part * batch : (part + 1) * batch]

    @torch.enable_grad()
    def step(self, hb: Tensor, hs: Tensor, labels: Tensor, head: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Takes one step on hb, hs (B, d), labels (B,), and gives its record."""
        das, temperature = self.das, self.temperature
        logits = head(das.swap(hb, hs, temperature))
        if logits.ndim != 2 or len(logits) != len(hb):
            raise ValueError(f"head: gives {tuple(logits.shape)} for {len(hb)} pairs; must be ({len(hb)}, C)")
        if not logits.requires_grad:
            raise ValueError("head: gives logits without gradients; h' must reach them")
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"labels: has {int(labels.max())}; the head has {logits.shape[1]} logits")
        loss = F.cross_entropy(logits.float(), labels) + self.config.boundary_weight * das._b
        record = {
            "step": self.taken + 1, "loss": float(loss.detach()), "boundary": das.boundary, "temperature": temperature,
        }  # fmt: skip
        if not torch.isfinite(loss):
            raise ValueError(f"step {self.taken + 1}: the loss is {record['loss']}; a smaller lr may help")
        das._turn.grad, das._b.grad = torch.autograd.grad(loss, [das._turn, das._b])  # a head's parameters get none
        self._optimizer.step()
        with torch.no_grad():
            das._b.clamp_(LEAST, 1.0)
        self.taken += 1
        return record

    def state(self) -> dict[str, Any]:
        """Gives what `resume` needs."""
        das = self.das
        return {
            "taken": self.taken,
            "turn": das._turn.detach().cpu(),
            "boundary": das._b.detach().cpu(),
            "optimizer": self._optimizer.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Goes on where `state` was taken."""
        with torch.no_grad():
            self.das._turn.copy_(state["turn"])
            self.das._b.copy_(state["boundary"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.taken = state["taken"]
