"""Learned twists: log ψ_{t+1}(s, v) of every next token v from the last hidden state, as a potential.

    hidden state (R, H) → features (R, r) → ·outᵀ + bias → log ψ (R, V) → weigh, draw

`Head` is the part after the hidden state, `Twist` the potential around it. Kinds of twists differ in where the hidden
state comes from and how it becomes features:

    linear   the base model's own; features are the hidden state
    mlp      the base model's own; features are a two-layer perceptron's, of rank r
    lora     of a copy of the base model with low-rank adapters, then an mlp head
    model    of a separate, smaller Hugging Face model with the same vocabulary, then an mlp head

A twist says nothing about φ: `twist.guide(potential)` is a product whose φ is the potential's and whose ψ is the
twist's. A twist was trained either to be all of ψ (the default), or to `compose` with the potential's own, as with a
mask: then log weights of both add up. Whatever the twist says, weights stay exact.

A conditional twist is ψ_t(s, c), with c what must follow: `guide` finds c in the `Infill` that it guides towards, so
one twist serves any continuation. Its perceptron adds a code of c to the hidden layer, computed once per group. Source:
Zhao et al. 2024 (arXiv 2404.17546), whose conditional twists read an embedding of c beside the hidden state.

The contract wants log ψ_{t+1}(s, v) − log ψ_t(s). The subtraction is part of the matrix product: the features get
(1, −log ψ_t) as two further columns, `out` gets (bias, 1).

On disk a twist is a directory: `card.json` and `twist.safetensors`; kind `model` has the model in `trunk/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmc.potentials import Engine, Final, Infill, Potential, Product, Rows, State, resolve
from fastsmc.potentials.base import parts
from fastsmc.trunk import Trunk
from fastsmc.values import check_choice, check_int

FORMAT, VERSION = "fastsmc.twist", 1
KINDS = ("linear", "mlp", "lora", "model")
LOSSES = ("ctl", "rl", "sixo", "fudge", "dpg")


# -- the card ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """Says what a twist is for and how it was made.

    Args:
        kind: one of `KINDS`.
        loss: one of `LOSSES`. `dpg` makes a twist proposal-only: its ψ has a free constant in every prefix.
        base_model: name or path of the model p0; models are told apart by the last component of it.
        vocab_size, hidden_size: of the base model.
        tokenizer: `tokenizer_hash` of its tokenizer, or None.
        input_size: size of the hidden state that the head reads: the base model's but for kind `model`.
        rank: features r.
        prompt: the prompt's text or tokens that it was trained for, for the record; None if there were several.
        prompts: of a twist that was trained for several: their `count`, and the `sha256` of what they are.
        held_out: of prompts that it was not trained for: the same, and bounds on their log Z `before` training and
            `after` it, as far as they were evaluated; see `fastsmc.training`.
        continuation_tokens: ψ is conditional on so many first tokens of what must follow; 0: on nothing but s.
        potential, potential_args: registered name and arguments of what it was trained for; None if it has no name.
        temperature: of p0.
        compose: it was trained beside the potential's own ψ, not in its place.
        steps: gradient steps.
        lora_rank, lora_alpha: of kind `lora`, else 0.
        settings: the whole training configuration, for the record.

    Raises:
        ValueError: naming the argument.
    """

    kind: str
    loss: str
    base_model: str
    vocab_size: int
    hidden_size: int
    tokenizer: str | None
    input_size: int
    rank: int
    prompt: Any = None
    prompts: dict[str, Any] | None = None
    held_out: dict[str, Any] | None = None
    continuation_tokens: int = 0
    potential: str | None = None
    potential_args: dict[str, Any] = dataclasses.field(default_factory=dict)
    temperature: float = 1.0
    compose: bool = False
    steps: int = 0
    lora_rank: int = 0
    lora_alpha: float = 0.0
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("loss", self.loss, LOSSES)
        for name in ("vocab_size", "hidden_size", "input_size", "rank"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), 1))  # NumPy's is no JSON
        object.__setattr__(self, "continuation_tokens", check_int("continuation_tokens", self.continuation_tokens, 0))
        check_conditional(self.kind, self.continuation_tokens)

    @property
    def bounded(self) -> bool:
        """Says whether ψ is a probability, as FUDGE's is: log ψ = log sigmoid of what the head gives."""
        return self.loss == "fudge"

    @classmethod
    def read(cls, path: str | os.PathLike) -> Card:
        """Reads the card of the twist in directory `path`.

        Raises:
            ValueError: there is no card, or the file is none; names the path.
        """
        file = Path(path) / "card.json"
        try:
            fields = json.loads(file.read_text())
            if fields.pop("format", None) != FORMAT:
                raise ValueError("it is not the card of a fastsmc twist")
            if (version := fields.pop("version", None)) != VERSION:
                raise ValueError(f"its version is {version!r}; this fastsmc reads {VERSION}")
            return cls(**fields)
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"twist {os.fspath(path)!r}: cannot read {file.name}: {error}") from None

    def write(self, path: Path) -> None:
        fields = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        (path / "card.json").write_text(json.dumps(fields, indent=1) + "\n")


def card_potential(path: str | os.PathLike) -> Potential:
    """Builds the potential that a saved twist was trained for, by its registered name. ValueError: it has none."""
    card = Card.read(path)
    if card.continuation_tokens:
        raise ValueError(
            f"twist {os.fspath(path)!r}: is conditional on what must follow; give the potential, 'infill' with a "
            "continuation"
        )
    if card.potential is None:
        raise ValueError(f"twist {os.fspath(path)!r}: was trained for a potential without a name; give potential=")
    return resolve(card.potential, card.potential_args)


def check_conditional(kind: str, continuation_tokens: int) -> None:
    """Refuses a conditional twist of a kind that has no place for the code of what must follow."""
    if kind == "linear" and continuation_tokens:
        raise ValueError(
            f"continuation_tokens={continuation_tokens}: must be 0 with kind='linear', which has no perceptron to read "
            "a continuation"
        )


def card_stamp(path: str | os.PathLike) -> int:
    """Gives the time the card was written, so that a twist trained anew is loaded anew; 0 if there is no card."""
    try:
        return (Path(path) / "card.json").stat().st_mtime_ns
    except OSError:
        return 0


def tokenizer_hash(tokenizer: Any) -> str | None:
    """Computes the SHA-256 of a tokenizer's vocabulary with its ids; None for None."""
    if tokenizer is None:
        return None
    entries = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _last_part(name: str | None) -> str | None:
    return None if name is None else os.path.basename(str(name).rstrip("/"))


# -- the head ----------------------------------------------------------------------------------------------------------
class Head(nn.Module):
    """Maps a hidden state (…, H) to log ψ before the link, (…, V). At the start that is 0 everywhere.

    Args:
        input_size: H.
        vocab_size: V.
        rank: r, the features of a perceptron; None: linear, the features are the hidden state.
        continuation_tokens: M, of a perceptron that is conditional on so many first tokens of a continuation; 0: not.
    """

    def __init__(self, input_size: int, vocab_size: int, rank: int | None, continuation_tokens: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        if rank is None:
            self.features: nn.Module = nn.Identity()
            self.out = nn.Parameter(torch.zeros(vocab_size, input_size))
        else:
            last = nn.Linear(rank, rank)
            nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
            self.features = nn.Sequential(nn.LayerNorm(input_size), nn.Linear(input_size, rank), nn.GELU(), last)
            self.out = nn.Parameter(torch.randn(vocab_size, rank) / math.sqrt(rank))
        if rank is not None and continuation_tokens:
            halves = 0.5 ** torch.arange(1, continuation_tokens + 1)  # what comes first says most
            self.places = nn.Parameter(torch.randn(continuation_tokens, rank, rank) * halves[:, None, None])

    def start_from(self, unembedding: Tensor) -> None:
        """Lets a perceptron's `out` begin as the model's (V, H) output embedding, projected: like tokens share ψ."""
        if isinstance(self.features, nn.Identity):
            return
        rank = self.out.shape[1]
        with torch.no_grad():
            e = unembedding.float() - unembedding.float().mean(0)
            projected = e @ torch.randn(e.shape[1], rank, device=e.device)
            self.out.copy_(projected / projected.norm(dim=1).mean().clamp(min=1e-6))

    def code(self, continuation: Tensor) -> Tensor:
        """Computes codes (…, r) of continuations (…, n) int64: Σ_j out[c_j] · places[j], over their first M tokens."""
        ids = continuation[..., : len(self.places)]
        return torch.einsum("...jr,jrs->...s", self.out[ids], self.places[: ids.shape[-1]])

    def read(self, hidden: Tensor, code: Tensor | None = None) -> Tensor:
        """Computes features (…, r) of hidden states (…, H), beside codes (…, r) of continuations."""
        if code is None:
            return self.features(hidden)
        assert isinstance(self.features, nn.Sequential)  # only a perceptron has places
        norm, first, *later = self.features
        x = first(norm(hidden)) + code
        for layer in later:
            x = layer(x)
        return x

    def forward(self, hidden: Tensor, code: Tensor | None = None) -> Tensor:
        return F.linear(self.read(hidden, code), self.out, self.bias)

    def score(self, hidden: Tensor, tokens: Tensor, code: Tensor | None = None) -> Tensor:
        """Computes `forward` at tokens (…) alone, (…), from hidden states (…, H)."""
        return (self.read(hidden, code) * self.out[tokens]).sum(-1) + self.bias[tokens]


# -- LoRA --------------------------------------------------------------------------------------------------------------
class LoraLinear(nn.Module):
    """Adds to a frozen linear layer W a low-rank change (alpha / r) · B A; B is 0 at the start.

    Source: Hu et al. 2021 (arXiv 2106.09685).
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), alpha / rank
        weight = base.weight
        self.a = nn.Parameter(torch.randn(rank, weight.shape[1], device=weight.device) / math.sqrt(weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype)) * self.scale


def add_lora(model: Any, rank: int, alpha: float) -> dict[str, LoraLinear]:
    """Freezes a model and puts an adapter on every linear layer but the output embedding; gives them by name."""
    model.requires_grad_(False)
    unembed = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not unembed]
    if not names:
        raise ValueError(f"LoRA: {type(model).__name__} has no torch.nn.Linear layers")
    added = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        added[name] = LoraLinear(getattr(owner, child), rank, alpha)
        setattr(owner, child, added[name])
    return added


# -- the potential -----------------------------------------------------------------------------------------------------
class Twist(Potential):
    """Gives a learned ψ. It has no φ: `guide` joins it to the potential that has.

    Args:
        card: what the twist is.
        head: what makes log ψ of a hidden state.
        trunk: where the hidden state comes from, with kinds `lora` and `model`.
    """

    shared_by_groups = ("card", "head", "trunk", "_lora", "_weight")

    def __init__(self, card: Card, head: Head, trunk: Trunk | None = None) -> None:
        self.card, self.head, self.trunk = card, head, trunk
        self.proposal_only = card.loss == "dpg"
        self._lora: dict[str, Tensor] | None = None
        self._trunk_path: str | None = None

    # ------------------------------------------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike) -> None:
        """Writes the directory `path`, in the place of a twist that was there."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {f"head.{name}": value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        if self.trunk is not None and self.card.kind == "lora":
            for name, module in self.trunk.model.named_modules():
                if isinstance(module, LoraLinear):
                    tensors[f"lora.{name}.a"] = module.a.detach().cpu().contiguous()
                    tensors[f"lora.{name}.b"] = module.b.detach().cpu().contiguous()
        if self.trunk is not None and self.card.kind == "model":
            self.trunk.model.save_pretrained(path / "trunk")
        save_file(tensors, path / "twist.safetensors")
        self.card.write(path)  # last: a directory with a card is whole

    @classmethod
    def load(cls, path: str | os.PathLike) -> Twist:
        """Reads what `save` wrote. The trunk of kinds `lora` and `model` is loaded by `setup`.

        Raises:
            ValueError: naming the path and what is wrong with it.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        card = Card.read(path)
        try:
            tensors = load_file(Path(path) / "twist.safetensors")
            if not all(v.is_floating_point() for v in tensors.values()):
                raise ValueError("twist.safetensors holds tensors that are not floating-point")
            with torch.device("meta"):  # no memory for what the card says before the file has it
                rank = None if card.kind == "linear" else card.rank
                head = Head(card.input_size, card.vocab_size, rank, card.continuation_tokens)
            state = {k.removeprefix("head."): v.clone() for k, v in tensors.items() if k.startswith("head.")}
            head.load_state_dict(state, assign=True)
        except (OSError, RuntimeError, ValueError, TypeError, OverflowError, SafetensorError) as error:
            raise ValueError(f"twist {os.fspath(path)!r}: {error}") from None
        twist = cls(card, head)
        twist._lora = {k.removeprefix("lora."): v for k, v in tensors.items() if k.startswith("lora.")}
        twist._trunk_path = os.path.join(os.path.abspath(path), "trunk")
        return twist

    # ------------------------------------------------------------------------------------------- as a potential
    def guide(self, potential: Potential) -> Product:
        """Joins this twist to a potential's φ, and to its ψ too if the twist was trained beside that.

        Raises:
            ValueError: the twist is conditional, and the potential is no `Infill`, nor made of exactly one.
        """
        target = potential if self.card.compose else Final(potential)
        return _Conditioned(self, target) if self.card.continuation_tokens else Product(self, target)

    def setup(self, engine: Engine) -> None:
        """Refuses an engine that the twist was not trained for; else moves the twist to its device.

        Raises:
            ValueError: naming what does not match, the card's value and the engine's.
        """
        card = self.card
        for what, trained, found in (
            ("base_model", _last_part(card.base_model), _last_part(engine.model_name)),
            ("vocab_size", card.vocab_size, engine.vocab_size),
            ("hidden_size", card.hidden_size, engine.hidden_size),
            ("tokenizer", card.tokenizer, tokenizer_hash(engine.tokenizer)),
        ):
            if trained != found and not (what == "tokenizer" and None in (trained, found)):
                raise ValueError(f"the twist was trained for {what}={trained!r}, this engine has {found!r}")
        if self.trunk is None and card.kind in ("lora", "model"):
            self.trunk = self._load_trunk(engine)
        self.head.to(engine.device).float()
        ones = torch.ones(card.vocab_size, 1, device=engine.device)
        with torch.no_grad():
            self._weight = torch.cat([self.head.out, self.head.bias[:, None], ones], dim=1)

    def _load_trunk(self, engine: Engine) -> Trunk:
        assert self._trunk_path is not None and self._lora is not None  # `load` has set them
        if self.card.kind == "model":
            return Trunk.load(self._trunk_path, device=str(engine.device))
        assert engine.model_name is not None  # `setup` has compared it with the card's
        trunk = Trunk.load(engine.model_name, device=str(engine.device))
        scale = self.card.lora_alpha / self.card.lora_rank
        with torch.no_grad():
            for name in {key.rpartition(".")[0] for key in self._lora}:
                weight = trunk.model.get_submodule(name).weight
                weight += scale * self._lora[f"{name}.b"].to(weight) @ self._lora[f"{name}.a"].to(weight)
        return trunk

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._code: Tensor | None = None  # (r,) of what must follow
        self._features: Tensor | None = None  # (N, r + 2), of the history that the model has seen last
        self._log_psi: Tensor | None = None  # (N,) of the same
        self._last: Tensor | None = None  # (N,) what `prefix` last saw drawn
        self._rows: Tensor | None = None  # (N,) of the trunk's cache
        self._cache: Any = None

    @torch.no_grad()
    def follow(self, continuation: list[int]) -> None:
        """Makes ψ conditional on a continuation, from `reset` to the next; only its first M tokens count."""
        self._code = self.head.code(torch.tensor(continuation, device=self._weight.device))

    @property
    def per_particle(self) -> tuple[str, ...] | None:  # type: ignore[override]
        """Names what it has per particle, on a GPU.

        On a CPU a row of the head's product has other bits among other numbers of rows, so a group's population would
        hang on who is asked with it. A trunk has the KV cache of one group.
        """
        apart = self.card.kind in ("lora", "model") or self._weight.device.type == "cpu"
        return None if apart else ("_features", "_log_psi", "_last")

    def reindex(self, ancestors: Tensor) -> None:
        for name in ("_features", "_log_psi", "_last", "_rows"):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, values[ancestors])

    def _advance(self, state: State, last_tokens: Tensor | None) -> tuple[Tensor, Tensor]:
        """Computes features (R, r) and log ψ (R,) float32 of the distinct histories that the model has just seen.

        Args:
            last_tokens: (N,) int64, the last token of each particle's history; None before the first token.
        """
        if self.card.continuation_tokens and self._code is None:
            raise ValueError("the twist is conditional on what must follow: use twist.guide(Infill(continuation))")
        if self.trunk is not None and state.segments is not None:
            raise ValueError(f"a twist of kind {self.card.kind!r} cannot be used with segments: its trunk never waits")
        rows, seen = state.rows, torch.nonzero(state.rows >= 0).squeeze(1)
        hidden = state.hidden_rows
        if self.trunk is None and hidden is None:
            raise ValueError(f"a twist of kind {self.card.kind!r} needs hidden states, and this engine gives none")
        if self.trunk is None and hidden is not None:
            n_rows = len(hidden)
        else:
            n_rows = 1 if last_tokens is None else int(rows.max()) + 1
        particle = torch.zeros(n_rows, dtype=torch.int64, device=rows.device)  # one that has each history
        particle[rows[seen]] = seen
        log_psi = torch.zeros(n_rows, dtype=torch.float32, device=rows.device)
        if last_tokens is not None:
            assert self._features is not None and self._log_psi is not None  # an earlier step has set them
            last = last_tokens[particle]
            log_psi = self._log_psi[particle] + self._link((self._features[particle] * self._weight[last]).sum(1))
        if self.trunk is not None and last_tokens is None:
            hidden, self._cache = self.trunk.start(state.prompt)
        elif self.trunk is not None:
            assert self._rows is not None  # as above
            hidden, self._cache = self.trunk.next(self._cache, self._rows[particle], last)
        assert hidden is not None  # the engine's, or the trunk's
        return self.head.read(hidden.float(), self._code), log_psi

    def _keep(self, features: Tensor, log_psi: Tensor, rows: Tensor) -> None:
        """Keeps (R, r + 2) and (R,) for each particle (N,); those that the model has not seen now have theirs."""
        at, seen = rows.clamp(min=0), rows >= 0
        features, log_psi = features[at], log_psi[at]
        if self._features is not None and self._log_psi is not None:
            features = torch.where(seen[:, None], features, self._features)
            log_psi = torch.where(seen, log_psi, self._log_psi)
        self._features, self._log_psi = features, log_psi
        self._rows = None if self.trunk is None else rows

    def _link(self, raw: Tensor) -> Tensor:
        return F.logsigmoid(raw) if self.card.bounded else raw

    @torch.no_grad()
    def logw_next(self, state: State) -> Rows:
        features, log_psi = self._advance(state, state.last_tokens)
        bounded = self.card.bounded
        shift = torch.zeros_like(log_psi) if bounded else log_psi  # a link comes before the subtraction
        features = torch.cat([features, torch.ones_like(log_psi)[:, None], -shift[:, None]], dim=1)
        values = F.linear(features, self._weight)
        if bounded:
            values = F.logsigmoid(values).sub_(log_psi[:, None])
        self._keep(features, shift, state.rows)
        return Rows(values, state.rows.clamp(min=0))

    @torch.no_grad()
    def prefix(self, state: State) -> Tensor:
        """Computes log ψ_t of the tokens drawn, the last included: it is asked after a draw from the base proposal."""
        zeros = torch.zeros(len(state.finished), dtype=torch.float64, device=state.finished.device)
        if state.step == 0 or self.proposal_only:
            return zeros
        if self._rows is not None and self._last is None:  # logw_next has moved the trunk
            raise ValueError(
                f"a twist of kind {self.card.kind!r} cannot stand beside a proposal-only one, nor be used with "
                "proposal='rejection': it would be asked twice a step, and its trunk goes on by one token each time"
            )
        features, log_psi = self._advance(state, self._last)
        self._last = state.last_tokens
        features = torch.cat([features, torch.ones(len(features), 1, device=features.device)], dim=1)
        features = F.pad(features, (0, 1))
        self._keep(features, torch.zeros_like(log_psi), state.rows)
        assert state.last_tokens is not None and self._features is not None  # a token has been drawn
        return self._link((self._features * self._weight[state.last_tokens.clamp(min=0)]).sum(1)).double()

    def complete(self, state: State) -> Tensor:
        return torch.zeros(len(state.finished), dtype=torch.float64, device=state.finished.device)


class _Conditioned(Product):
    """Joins a conditional twist to φ, and tells it what must follow: the continuation of the `Infill` within φ."""

    per_particle = ()

    def __init__(self, twist: Twist, target: Potential) -> None:
        super().__init__(twist, target)
        found = list(_infills(target))
        if len(found) != 1:
            raise ValueError(
                f"the twist is conditional on what must follow: it guides a potential with one Infill, not {len(found)}"
            )

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        super().reset(n_particles, prompt)
        twist, target = self.factors
        assert isinstance(twist, Twist)
        (infill,) = _infills(target)
        assert infill.continuation is not None  # since `prepare`
        twist.follow(infill.continuation)


def _infills(potential: Potential) -> Iterator[Infill]:
    """Lists the `Infill` potentials that one is, or is made of."""
    if isinstance(potential, Infill):
        yield potential
    for part in parts(potential):
        yield from _infills(part)
