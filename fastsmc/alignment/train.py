"""Training of alignments over a frozen model: pairs of a causal model → `Frozen` → a `BoundlessDAS` per site.

A run leaves in its directory the alignment itself, `metrics.jsonl` and, while it runs, `checkpoint.pt`; a sweep has a
directory for each site in it. The same call goes on where a checkpoint was left, to the same numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.alignment.causal import CausalModel, Pairs, Sampler, answer_ids, pairs
from fastsmc.alignment.das import BoundlessDAS, Card, Fit, FitConfig, check_basis
from fastsmc.alignment.frozen import Frozen, Place, without_gradients
from fastsmc.arguments import read_prompts
from fastsmc.editing import trunk_of
from fastsmc.interchange import read_positions
from fastsmc.potentials.tokens import short
from fastsmc.trunk import Trunk
from fastsmc.values import as_int, check_int, json_safe

#: a position from 0, one negative from the end, or what finds it in a prompt of the inputs
Position = int | Callable[[Mapping[str, Any]], int]
#: bytes of memory that the cache may take, unless said otherwise
MAX_CACHE_BYTES = 1 << 32


def train_alignment(
    trunk: Any,
    causal_model: CausalModel,
    layer: int | Sequence[int],
    position: Position | Sequence[Position],
    *,
    variable: str | Sequence[str],
    sampler: Sampler,
    n_pairs: int = 1024,
    n_eval: int = 256,
    steps: int = 1000,
    batch: int = 64,
    lr: float = 1e-3,
    boundary_lr: float = 1e-2,
    boundary_weight: float = 1.0,
    temperature: tuple[float, float] = (50.0, 0.1),
    rank: int | None = None,
    seed: int = 0,
    eval_every: int = 0,
    checkpoint_every: int = 100,
    directory: str | os.PathLike | None = None,
    max_cache_bytes: int = MAX_CACHE_BYTES,
    use_tqdm: bool = True,
) -> Any:
    """Trains which subspace of what a layer puts out at a position plays a variable, over a model that stays frozen.

    What lies below the layer, and all keys and values before the position, are computed once, of each distinct base
    and source, for all layers and positions of a sweep; a step runs the layers above, from the position on. The loss
    is cross entropy of the label's token over the whole vocabulary at the last position, as pyvene's is, plus
    boundary_weight · b.

    Args:
        trunk: an `HFEngine`, an `LLM` (whose model is loaded anew), or a `Trunk` (prompts and answers are token ids).
        causal_model: with `prompt` and `answers`.
        layer: from 0, or a list.
        position: in the prompt, of base and source alike: from 0 (prompts of one length), negative from the end, or a
            callable, inputs → such a number; or a list of these.
        variable, sampler: as in `pairs`.
        n_pairs, n_eval: pairs to train on, and others to evaluate on.
        steps, batch, lr, boundary_lr, boundary_weight, temperature: as in `BoundlessDAS.fit`.
        rank, seed: as in `BoundlessDAS`; `seed` also of the pairs.
        eval_every: steps between evaluations, 0: at the end only.
        checkpoint_every: steps between checkpoints, 0: none.
        directory: where the run leaves files; None: nowhere.
        max_cache_bytes: what more than that takes is mapped from disk, from a file in `directory`.
        use_tqdm: a progress bar, and a line with the cache's size before it is filled; both on stderr.

    Returns:
        the `BoundlessDAS`, its `card.iia` measured with the hard basis on the other pairs; of lists
        {(layer, position): BoundlessDAS}.

    Raises:
        ValueError: naming the argument, its value and what is allowed; or a model whose layers are not known.
    """
    sweep = _is_list(layer) or _is_list(position)
    layers, positions = _as_list("layer", layer), _as_list("position", position)
    trunk, tokenizer, name = _read_trunk(trunk)
    layers = [check_int("layer", one, 0, trunk.sizes.n_layers - 1) for one in layers]
    for what, value, low in (
        ("n_eval", n_eval, 2), ("eval_every", eval_every, 0), ("checkpoint_every", checkpoint_every, 0),
        ("max_cache_bytes", max_cache_bytes, 0),
    ):  # fmt: skip
        check_int(what, value, low)
    config = FitConfig(steps, batch, lr, boundary_lr, boundary_weight, temperature)
    if causal_model.prompt is None or causal_model.answers is None:
        raise ValueError("causal_model: must have prompt= and answers=, which say it to a language model")
    train = pairs(causal_model, sampler, variable, n_pairs, seed)
    held = pairs(causal_model, sampler, variable, n_eval, seed + 1)
    both = _Task.read(trunk, tokenizer, [train, held], positions)
    settings = {**dataclasses.asdict(config), "n_pairs": n_pairs, "n_eval": n_eval, "pairs": both.fingerprint}
    start = BoundlessDAS(trunk.hidden_size, seed, rank).card
    run = _Run(both, n_pairs, config, eval_every, checkpoint_every)
    jobs = {}
    for one, (j, where) in itertools.product(layers, enumerate(positions)):
        said, path = _said(where), None if directory is None else Path(directory)
        if path is not None and sweep:
            path /= f"layer{one}_position{where}" if isinstance(where, int) else f"layer{one}_position_{j}"
        card = dataclasses.replace(
            start, base_model=name, layer=one, position=said, variable=train.variable, settings=json_safe(settings)
        )
        jobs[one, where] = _Job(run, card, one, j, path)
    _run(both, list(jobs.values()), directory, max_cache_bytes, use_tqdm)
    done = {key: job.das for key, job in jobs.items()}
    return done if sweep else next(iter(done.values()))


def frozen_iia(
    trunk: Any,
    basis: Tensor | BoundlessDAS | None,
    pairs: Pairs,
    layer: int,
    position: Position,
    *,
    batch: int = 64,
    max_cache_bytes: int = MAX_CACHE_BYTES,
) -> float:
    """Computes IIA: the share of pairs whose label is the likeliest token with the source's part of a subspace put in.

    Args:
        trunk, layer, position, max_cache_bytes: as in `train_alignment`.
        basis: (H, k) with orthonormal columns, an alignment, or None: the whole hidden state.
        batch: pairs that go through the layers above at once.

    Raises:
        ValueError: as there; or no label is changed by the interchange.
    """
    trunk, tokenizer, _ = _read_trunk(trunk)
    layer, batch = check_int("layer", layer, 0, trunk.sizes.n_layers - 1), check_int("batch", batch, 1)
    pairs.check_changed()
    if basis is not None:
        basis = basis.basis() if isinstance(basis, BoundlessDAS) else basis
        basis = check_basis(basis, trunk.hidden_size).to(trunk.device)
    task = _Task.read(trunk, tokenizer, [pairs], [position])
    frozen = Frozen(trunk, task.bases, task.sources, [layer], task.places, max_bytes=max_cache_bytes)
    frozen.fill()
    return _agreement(frozen, layer, 0, basis, task.labels, range(len(pairs)), batch)


@torch.no_grad()
def _agreement(
    frozen: Frozen, layer: int, place: int, basis: Tensor | None, labels: Tensor, rows: Sequence[int], batch: int
) -> float:
    right = 0
    for i in range(0, len(rows), batch):
        part = list(rows[i : i + batch])
        hb, hs = frozen.states(layer, place, part)
        h = hs if basis is None else hb + (hs - hb) @ basis @ basis.T
        right += int((frozen.logits(layer, place, h, part).argmax(1) == labels[part]).sum())
    return right / len(rows)


# -- what is asked -----------------------------------------------------------------------------------------------------
def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple, range))


def _as_list(name: str, value: Any) -> list[Any]:
    values = [one if as_int(one) is None else as_int(one) for one in (value if _is_list(value) else [value])]
    if not values or any(_is_list(one) for one in values) or len(set(values)) < len(values):
        raise ValueError(f"{name}={short(value)}: must be one, or a list of at least one, each once")
    return values


def _said(position: Position) -> Any:
    """Gives a position as a card has it: a number, or the name of what finds it."""
    return position if isinstance(position, int) else getattr(position, "__name__", repr(position))


def _read_trunk(trunk: Any) -> tuple[Trunk, Any, str]:
    """Finds the model, its tokenizer and its name."""
    if isinstance(trunk, Trunk):
        return trunk, None, str(trunk.model.config.name_or_path)
    found, tokenizer = trunk_of(trunk)
    return found, tokenizer, str(found.model.config.name_or_path)


class _Task(NamedTuple):
    """Holds pairs as token ids, and where a hidden state is taken and put.

    Attributes:
        trunk: the model.
        bases, sources: of n pairs.
        labels: (n,) int64.
        places: of each position asked for.
    """

    trunk: Trunk
    bases: list[list[int]]
    sources: list[list[int]]
    labels: Tensor
    places: list[Place]

    @classmethod
    def read(cls, trunk: Trunk, tokenizer: Any, each: Sequence[Pairs], positions: Sequence[Position]) -> _Task:
        """Reads several sets of pairs. ValueError: a prompt, a label or a position cannot be."""
        sides = []
        for what, prompts, inputs in (
            ("base", [p for one in each for p in one.bases], [x for one in each for x in one.base_inputs]),
            ("source", [p for one in each for p in one.sources], [x for one in each for x in one.source_inputs]),
        ):
            ids, _ = read_prompts(prompts, tokenizer, trunk.vocab_size)
            longest = max(map(len, ids))
            if trunk.max_positions is not None and longest > trunk.max_positions:
                raise ValueError(f"prompt: has {longest} tokens, this model at most {trunk.max_positions} positions")
            sides.append((ids, [_positions(position, ids, inputs, what) for position in positions]))
        (bases, at), (sources, source_at) = sides
        labels = answer_ids([label for one in each for label in one.labels], tokenizer, trunk.vocab_size)
        places = [Place(*where) for where in zip(at, source_at, strict=True)]
        return cls(trunk, bases, sources, torch.tensor(labels, device=trunk.device), places)

    @property
    def fingerprint(self) -> str:
        """Gives a hash of all that is asked."""
        what = [self.bases, self.sources, self.labels.tolist(), self.places]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _positions(
    position: Position, prompts: Sequence[list[int]], inputs: Sequence[Mapping[str, Any]], what: str
) -> list[int]:
    """Reads a position in each prompt, from 0. ValueError: as of `read_positions`."""
    given = [position(each) for each in inputs] if callable(position) else position
    return read_positions("position", given, [len(ids) for ids in prompts], what)


# -- runs --------------------------------------------------------------------------------------------------------------
class _Run(NamedTuple):
    """Holds what all sites of a run share.

    Attributes:
        task: the pairs.
        n_pairs: those before are trained on, the others evaluated on.
        config, eval_every, checkpoint_every: as in `train_alignment`.
    """

    task: _Task
    n_pairs: int
    config: FitConfig
    eval_every: int
    checkpoint_every: int


class _Job:
    """Trains an alignment at one site.

    Args:
        run: what is shared.
        card: of the alignment before it is trained.
        layer, place: the site.
        directory: of its files, or None.

    Attributes:
        das: the alignment, once it is begun.
    """

    def __init__(self, run: _Run, card: Card, layer: int, place: int, directory: Path | None) -> None:
        self.run, self.card, self.layer, self.place, self.directory = run, card, layer, place, directory
        self.das: Any = None

    def is_done(self) -> bool:
        """Says whether an earlier run has finished, and takes its alignment. ValueError: of another configuration."""
        if self.directory is None or not (self.directory / "card.json").exists():
            return False
        das = BoundlessDAS.load(self.directory)
        if dataclasses.replace(das.card, iia=None, steps=0) != self.card:
            raise self._other(self.directory / "card.json")
        das.history, self.das = self._lines(das.card.steps), das
        return True

    def _other(self, path: Path) -> ValueError:
        return ValueError(f"{path}: is of another configuration; train into another directory, or remove it")

    def train(self, frozen: Frozen, bar: Any) -> None:
        """Trains to the end, from a checkpoint where there is one, and saves."""
        run, labels, card = self.run, self.run.task.labels, self.card
        das = self.das = BoundlessDAS(card.d, card.seed, card.rank).to(labels.device)
        das.card = card
        fit = Fit(das, run.n_pairs, run.config)
        self._resume(fit)
        bar.update(fit.taken)
        held = range(run.n_pairs, len(labels))
        while not fit.done:
            rows = fit.rows().tolist()
            head = partial(frozen.logits, self.layer, self.place, rows=rows)
            record = fit.step(*frozen.states(self.layer, self.place, rows), labels[rows], head)
            if fit.done or (run.eval_every and fit.taken % run.eval_every == 0):
                basis = das.basis().to(labels.device)
                record["iia"] = _agreement(frozen, self.layer, self.place, basis, labels, held, run.config.batch)
            bar.set_postfix(loss=f"{record['loss']:.4g}", boundary=f"{record['boundary']:.3f}", refresh=False)
            bar.update()
            self._log(record)
            if run.checkpoint_every and fit.taken % run.checkpoint_every == 0 and not fit.done:
                self._save_checkpoint(fit)
        das.card = dataclasses.replace(card, steps=fit.taken, iia=das.history[-1]["iia"])
        if self.directory is not None:
            das.save(self.directory)
            (self.directory / "checkpoint.pt").unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------------- files
    def _log(self, record: dict[str, float]) -> None:
        self.das.history.append(record)
        if self.directory is not None:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(json_safe(record)) + "\n")

    def _lines(self, steps: int) -> list[dict[str, float]]:
        assert self.directory is not None  # without one nothing was kept
        log, lines = self.directory / "metrics.jsonl", []
        for text in log.read_text().splitlines() if log.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:  # the last one of a run that ended while it wrote
                break
            if line["step"] <= steps:
                lines.append(line)
        return lines

    def _save_checkpoint(self, fit: Fit) -> None:
        if self.directory is None:
            return
        temporary = self.directory / "checkpoint.tmp"
        torch.save({"card": json.dumps(dataclasses.asdict(self.card)), **fit.state()}, temporary)
        temporary.replace(self.directory / "checkpoint.pt")

    def _resume(self, fit: Fit) -> None:
        """Goes on where a checkpoint was left. ValueError: the checkpoint has another configuration."""
        if self.directory is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / "checkpoint.pt"
        if path.exists():
            try:
                state = torch.load(path, weights_only=True, map_location=fit.das._turn.device)
            except (OSError, EOFError, LookupError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
                said = str(error).partition("\n")[0]
                raise ValueError(f"{path}: cannot be read ({said}); remove it, and training begins anew") from None
            if state["card"] != json.dumps(dataclasses.asdict(self.card)):
                raise self._other(path)
            fit.resume(state)
        self.das.history = self._lines(fit.taken)
        temporary = self.directory / "metrics.tmp"
        temporary.write_text("".join(json.dumps(line) + "\n" for line in self.das.history))
        temporary.replace(self.directory / "metrics.jsonl")


def _run(
    task: _Task, jobs: Sequence[_Job], directory: str | os.PathLike | None, max_bytes: int, use_tqdm: bool
) -> None:
    """Trains all sites that are not trained yet over one store of what is frozen."""
    from tqdm.auto import tqdm

    waiting = [job for job in jobs if not job.is_done()]
    if not waiting:
        return
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    layers = [job.layer for job in jobs]
    say = partial(tqdm.write, file=sys.stderr) if use_tqdm else lambda line: None
    with without_gradients(task.trunk.model):
        frozen = Frozen(
            task.trunk, task.bases, task.sources, layers, task.places, max_bytes=max_bytes, directory=directory, say=say
        )
        off = not use_tqdm
        with tqdm(total=frozen.n_tokens, disable=off, file=sys.stderr, desc="what is frozen", unit="token") as bar:
            frozen.fill(bar.update)
        total = sum(job.run.config.steps for job in waiting)
        with tqdm(total=total, disable=off, file=sys.stderr, desc="alignment") as bar:
            for job in waiting:
                job.train(frozen, bar)
