"""Learning twists: CTL, RL (soft Q), SIXO, FUDGE and DPG, in plain PyTorch over a Hugging Face trunk.

    groups of a `HFEngine` → Samples (tokens, log p0/q, log φ) → hidden states → log ψ at the tokens → loss → AdamW

A step has two sorts of sequences. *Samples* are drawn without resampling, from p0 or from the present twist's proposal,
so that for every t their weights p0/q · ψ_t make them a sample of π_t. *Positives* are of σ = p0·φ/Z: exact by
rejection or given as data, or the samples themselves under their final weights. With a frozen trunk (kinds `linear`
and `mlp`) hidden states are computed once per sequence; `refresh` steps share one set of samples.

A twist may be trained for many prompts, and conditional on what must follow each of them. A step then has a set of
samples for each of `prompts_per_step` prompts, and its loss is the mean of theirs: weights are compared within a set
only, since those of two prompts have two normalisers. Where sequences (s, c) are drawn from p0, s is an exact sample of
σ(· | c) (`positives="joint"`): the samples of a prompt then serve all continuations that were drawn with it.

A run leaves in its directory: the twist itself, `metrics.jsonl`, `bounds.png`, `checkpoint.pt` (while it runs) and,
where TensorBoard is installed, its event file. The same command goes on where a checkpoint was left.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmc import evaluate, plots
from fastsmc.hf import SCORE_ELEMENTS, HFEngine
from fastsmc.losses import ctl_loss, dpg_loss, fudge_loss, rl_loss, sixo_loss
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Final, Infill, Potential
from fastsmc.prompts import Target, TwistPrompt, describe, tokenize
from fastsmc.trunk import Trunk
from fastsmc.twists import KINDS, LOSSES, Card, Head, Twist, add_lora, check_conditional, tokenizer_hash
from fastsmc.values import check_choice, check_int, json_safe

SAMPLES = ("twisted", "base")
POSITIVES = ("smc", "rejection", "data", "joint")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwistConfig:
    """Says how a twist is trained.

    Args:
        loss: 'ctl', 'rl', 'sixo', 'fudge' or 'dpg'.
        kind: 'linear', 'mlp', 'lora' or 'model'; see `fastsmc.twists`.
        rank: features of the perceptron of all kinds but 'linear'.
        continuation_tokens: the twist is conditional on so many first tokens of what must follow (`Infill`); 0: not.
        steps: gradient steps.
        prompts_per_step: prompts whose losses a step averages, with samples of each.
        pairs_per_prompt: of positives='joint', how many pairs (s, c) are drawn with each prompt.
        batch_size: samples per step and prompt, and positives as many.
        refresh: how many steps share one set of `SMCParams.n_particles` samples.
        samples: drawn from 'twisted', the present twist's proposal, or 'base', p0. SIXO and FUDGE need 'base'.
        positives: 'smc', the samples under their final weights; 'rejection' (φ <= 1) or 'data', given, of a twist for
            one prompt and φ; 'joint', by CTL on 'base' samples: `max_tokens` tokens of a draw of p0 are a positive, and
            the `continuation_tokens` that follow are what must. RL and FUDGE have none.
        compose: the potential's own ψ stays in force beside the twist (masks); CTL on twisted samples only.
        lr, weight_decay: for AdamW; the rate falls to 0 on a cosine.
        clip: largest norm of the gradient.
        amp: whether trunk and head run under bfloat16 autocast.
        lora_rank, lora_alpha: for kind 'lora'.
        trunk: name or path of the small model, for kind 'model'.
        eval_every: steps between evaluations of the bounds, 0: never.
        eval_particles, eval_runs: particles per run of such an evaluation, and its runs.
        checkpoint_every: steps between checkpoints, 0: never.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    loss: str = "ctl"
    kind: str = "mlp"
    rank: int = 256
    continuation_tokens: int = 0
    steps: int = 500
    prompts_per_step: int = 1
    pairs_per_prompt: int = 16
    batch_size: int = 1024
    refresh: int = 1
    samples: str = "base"
    positives: str = "smc"
    compose: bool = False
    lr: float = 1e-3
    weight_decay: float = 0.0
    clip: float = 1.0
    amp: bool = False
    lora_rank: int = 8
    lora_alpha: float = 16.0
    trunk: str | None = None
    eval_every: int = 0
    eval_particles: int = 16
    eval_runs: int = 8
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("loss", LOSSES), ("kind", KINDS), ("samples", SAMPLES), ("positives", POSITIVES),
        ):  # fmt: skip
            check_choice(name, getattr(self, name), choices)
        least = {"rank": 1, "steps": 1, "batch_size": 1, "refresh": 1, "eval_every": 0, "checkpoint_every": 0}
        least |= {"continuation_tokens": 0, "prompts_per_step": 1, "pairs_per_prompt": 1, "lora_rank": 1}
        least |= {"eval_particles": 1, "eval_runs": 2}
        for name, low in least.items():
            object.__setattr__(self, name, check_int(name, getattr(self, name), low))
        for name in ("lr", "clip", "lora_alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be a positive number")
        if self.loss in ("sixo", "fudge") and self.samples != "base":
            raise ValueError(f"samples={self.samples!r}: {self.loss} learns from 'base' samples, roll-outs of p0")
        if self.compose and (self.loss != "ctl" or self.samples != "twisted"):
            raise ValueError(
                f"compose=True: needs loss='ctl' and samples='twisted', not {self.loss!r}, {self.samples!r}"
            )
        check_conditional(self.kind, self.continuation_tokens)
        if self.continuation_tokens and self.compose:
            raise ValueError("compose=True: must be False with continuation_tokens; Infill has no ψ to stand beside")
        if self.positives == "joint" and not (
            self.continuation_tokens and self.loss == "ctl" and self.samples == "base"
        ):
            raise ValueError("positives='joint': needs continuation_tokens, loss='ctl' and samples='base'")
        if (self.kind == "model") != (self.trunk is not None):
            raise ValueError(f"trunk={self.trunk!r}: a path goes with kind='model', and only with it")

    @property
    def needs_positives(self) -> bool:
        return self.loss in ("ctl", "sixo", "dpg")


# -- sequences ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Sequences:
    """Holds B sequences of one prompt as tensors.

    Attributes:
        tokens: (B, T) int64, −1 after the end.
        log_ratio: (B, T) float64, log p0/q of the tokens up to each.
        log_phi: (B,) float64.
        prompt: what they go on from, token ids.
        continuation: what must follow all of them, with a conditional twist; else None.
        following: (B, C) int64, what follows each of them, of joint draws; else None.
        hidden: (B, T, H) of a frozen trunk before each token, or None.
        base_hidden: the same of the base model, where it is needed and another.
    """

    tokens: Tensor
    log_ratio: Tensor
    log_phi: Tensor
    prompt: list[int]
    continuation: list[int] | None = None
    following: Tensor | None = None
    hidden: Tensor | None = None
    base_hidden: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.tokens >= 0

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, rows: Tensor) -> Sequences:
        picked: dict[str, Any] = {k: v[rows] if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return Sequences(**picked)


def _padded(sequences: Sequence[Sequence[int]], width: int) -> Tensor:
    out = torch.full((len(sequences), width), -1, dtype=torch.int64)
    for i, ids in enumerate(sequences):
        out[i, : len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
    return out


# -- the trainer -------------------------------------------------------------------------------------------------------
class Trainer:
    """Trains one twist, for one prompt or many, and for one potential or any continuation.

    Args:
        engine: the base model.
        prompt: text or token ids; or a list of `TwistPrompt`, which are gone through in an order that the seed shuffles
            anew each time.
        params: n_particles samples per prompt at a time, max_tokens, temperature, stop tokens and seed; the rest is set
            here.
        potential: φ; None for a conditional twist, whose φ is `Infill` of each prompt's continuation.
        config: how.
        directory: where the run leaves its files; None: nowhere.
        exact: exact samples of one prompt's target, for positives='data' and for the upper bound.
        held_out: prompts to evaluate on, none of which is trained on; None: the one prompt. With a conditional twist,
            one without a continuation has a joint draw as its continuation and exact sample.
        name, args: under which the potential is registered, for the card.

    Attributes:
        twist: the twist as it stands.
        history: list of dict, what `metrics.jsonl` has.

    Raises:
        ValueError: an argument that cannot be.
    """

    def __init__(
        self,
        engine: HFEngine,
        prompt: str | Sequence[int] | Sequence[TwistPrompt],
        params: SMCParams,
        potential: Potential | None,
        config: TwistConfig,
        directory: str | os.PathLike | None = None,
        *,
        exact: Sequence[Sequence[int]] | None = None,
        held_out: Sequence[TwistPrompt] | None = None,
        name: str | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        if config.positives == "data" and config.needs_positives and not exact:
            raise ValueError("exact: positives='data' needs exact samples of the target")
        conditional = config.continuation_tokens > 0
        if conditional == (potential is not None):
            allowed = "None, since the twist is conditional on continuations" if conditional else "a Potential"
            raise ValueError(f"potential={type(potential).__name__}: must be {allowed}")
        self.engine, self.config, self.potential = engine, config, potential
        plain = {name: off for name, off in SMCParams().p0().items() if name != "temperature"}
        others = params.stop or params.force_stop or params.powered or params.islands > 1
        if params.p0() != {**plain, "temperature": params.temperature} or others:
            raise ValueError(
                f"params={params}: twists are trained without settings of p0, `stop`, `force_stop`, `power`, `islands`"
            )
        self.params = dataclasses.replace(params, ess_threshold=0.0)
        several = isinstance(prompt, list | tuple) and any(isinstance(each, TwistPrompt) for each in prompt)
        prompts: Any = prompt if several else [TwistPrompt(prompt)]  # type: ignore[arg-type]  # it checks what it is
        self.targets = self._read("prompts", prompts, trained=True)
        if (several or conditional) and (exact or config.positives in ("rejection", "data")):
            what = f"positives={config.positives!r}" + " with exact samples" * bool(exact)
            raise ValueError(f"{what}: with several prompts, or a conditional twist, positives are 'smc' or 'joint'")
        self._judged = self._read("held_out", held_out or [], trained=False) or self.targets
        if config.eval_every and not held_out and len(self.targets) > 1:
            raise ValueError(f"eval_every={config.eval_every}: with several prompts needs held_out, to evaluate on")
        self.exact = [list(ids) for ids in exact or []]
        self.directory = None if directory is None else Path(directory)
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(params.seed)
        data: dict[str, Any] = {"prompts": describe(self.targets)} if several else {"prompt": prompts[0].prompt}
        data |= {"held_out": describe(self._judged)} if held_out else {}
        data |= {"potential": "infill"} if conditional else {"potential": name, "potential_args": args or {}}
        self.twist = self._make_twist(data)
        card = self.twist.card
        self._configuration = json.dumps([card.settings, card.prompts, card.held_out])
        if self.twist.trunk is None:
            parameters = list(self.twist.head.parameters())
        else:
            parameters = [p for p in self.twist.trunk.model.parameters() if p.requires_grad]
            parameters += list(self.twist.head.parameters())
        self._parameters = parameters
        self._optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
        self._schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, config.steps)
        self._random = torch.Generator().manual_seed(params.seed)
        self._accepting = np.random.default_rng([params.seed, 1])
        self._step = 0
        self._samples: list[Sequences] = []  # of each prompt of a step
        self._positives: list[Sequences | None] = []
        self._drawn = 0  # base draws that rejection has seen
        self._seed = params.seed
        self._pairs: dict[int, tuple[Target, list[int]]] = {}  # of held-out prompts without a continuation

    def _read(self, name: str, prompts: Sequence[TwistPrompt], trained: bool) -> list[Target]:
        """Reads prompts to train on, or those that are held out.

        Raises:
            ValueError: naming the prompt by its index, and what is wrong with it.
        """
        config, targets = self.config, tokenize(name, prompts, self.engine)
        joint = config.positives == "joint"
        known = set() if trained else {self._identity(target) for target in self.targets}
        if joint and self.engine.stops(self.params):
            raise ValueError("positives='joint': needs ignore_eos=True and no stop tokens, so that lengths are fixed")
        for i, target in enumerate(targets):
            has, wants = target.continuation is not None, config.continuation_tokens > 0 and not joint
            if has and not config.continuation_tokens:
                raise ValueError(f"{name}[{i}]: has a continuation, which a twist without continuation_tokens ignores")
            if trained and has != wants:
                what = "has no continuation" if wants else "has a continuation, which positives='joint' draws itself"
                raise ValueError(f"{name}[{i}]: {what}")
            if not trained and wants and not has:
                raise ValueError(f"{name}[{i}]: has no continuation")
            if self._identity(target) in known:
                raise ValueError(f"{name}[{i}]: is among the prompts that are trained on")
            ahead = self._potential(target if has or not joint else Target([], [0] * config.continuation_tokens))
            try:
                self.engine.check_context(target.prompt, self.params, ahead)
            except ValueError as error:
                raise ValueError(f"{name}[{i}]: {error}") from None
        return targets

    def _identity(self, target: Target) -> tuple[tuple[int, ...], ...]:
        """Gives what two targets share if they are one: the prompt alone where continuations are drawn."""
        follows = [] if self.config.positives == "joint" else [tuple(target.continuation or ())]
        return (tuple(target.prompt), *follows)

    def _potential(self, target: Target) -> Potential:
        """Gives φ of a prompt."""
        if self.potential is not None:
            return self.potential
        assert target.continuation is not None  # `_read` has seen to it, or `_pair` has drawn it
        return Infill(target.continuation)

    def _make_twist(self, data: dict[str, Any]) -> Twist:
        config, base = self.config, self.engine.trunk
        trunk = None
        if config.kind == "lora":
            import copy

            trunk = Trunk(copy.deepcopy(base.model))
            add_lora(trunk.model, config.lora_rank, config.lora_alpha)
        elif config.kind == "model":
            assert config.trunk is not None  # TwistConfig has seen to it
            trunk = Trunk.load(config.trunk, device=str(base.device))
            if trunk.vocab_size != base.vocab_size:
                raise ValueError(
                    f"trunk={config.trunk!r}: its vocabulary of {trunk.vocab_size} is not the base model's "
                    f"{base.vocab_size}"
                )
        size = (trunk or base).hidden_size
        rank = None if config.kind == "linear" else config.rank
        head = Head(size, base.vocab_size, rank, config.continuation_tokens).to(base.device)
        head.start_from((trunk or base).unembedding())
        card = Card(
            kind=config.kind,
            loss=config.loss,
            base_model=str(self.engine.engine.model_name),
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            tokenizer=tokenizer_hash(self.engine.get_tokenizer()),
            input_size=size,
            rank=rank or size,
            continuation_tokens=config.continuation_tokens,
            temperature=self.params.temperature,
            compose=config.compose,
            lora_rank=config.lora_rank if config.kind == "lora" else 0,
            lora_alpha=config.lora_alpha if config.kind == "lora" else 0.0,
            settings={**dataclasses.asdict(config), "params": dataclasses.asdict(self.params)},
            **data,
        )
        return Twist(card, head, trunk)

    # ------------------------------------------------------------------------------------------------- a run
    def run(self, progress: bool = False) -> Twist:
        """Trains to the end, from a checkpoint where there is one, and saves.

        Raises:
            ValueError: log φ is above 0 where the loss or rejection needs φ <= 1, or −inf where it must be finite.
            SMCError: a group failed.
        """
        from tqdm.auto import tqdm

        config = self.config
        if self.directory is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._resume()
        board = self._tensorboard()
        bar = tqdm(total=config.steps, initial=self._step, disable=not progress, file=sys.stderr, desc=config.loss)
        if config.eval_every and self._step == 0:
            self._log(self._evaluate(), board)
        while self._step < config.steps:
            record = self.step()
            bar.update()
            bar.set_postfix(loss=f"{record['loss']:.4g}", refresh=False)
            if config.eval_every and self._step % config.eval_every == 0:
                record |= self._evaluate()
            self._log(record, board)
            if self.directory and config.checkpoint_every and self._step % config.checkpoint_every == 0:
                self._save_checkpoint()
        bar.close()
        self.twist.card = dataclasses.replace(self.twist.card, steps=self._step, held_out=self._held_out())
        if self.directory is not None:
            self.twist.save(self.directory)
            if config.eval_every:
                plot_history(self.history, self.directory / "bounds.png")
            (self.directory / "checkpoint.pt").unlink(missing_ok=True)
        if board is not None:
            board.close()
        return self.twist

    def step(self) -> dict[str, float]:
        """Takes one gradient step and gives its record."""
        start, config = time.perf_counter(), self.config
        if self._step % config.refresh == 0 or not self._samples:
            self._draw()
        device, losses, extras = self.engine.trunk.device, [], []
        self._optimizer.zero_grad(set_to_none=True)
        for samples, positives in zip(self._samples, self._positives, strict=True):
            batch = self._batch(samples)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                loss, extra = self._loss(batch, positives)
            if not bool(torch.isfinite(loss)):
                raise ValueError(f"step {self._step}: the loss is {float(loss)}; a smaller lr may help")
            (loss / len(self._samples)).backward()
            losses.append(float(loss.detach()))
            extras.append(extra)
        norm = nn.utils.clip_grad_norm_(self._parameters, config.clip)
        self._optimizer.step()
        self._schedule.step()
        self._step += 1
        return {
            "step": self._step,
            "loss": sum(losses) / len(losses),
            "lr": float(self._schedule.get_last_lr()[0]),
            "grad_norm": float(norm),
            **{name: _mean(extra[name] for extra in extras if name in extra) for name in sorted(set().union(*extras))},
            "seconds": time.perf_counter() - start,
        }

    def _batch(self, sequences: Sequences) -> Sequences:
        """Picks `batch_size` sequences at random, all if there are fewer."""
        if len(sequences) <= self.config.batch_size:
            return sequences
        rows = torch.randperm(len(sequences), generator=self._random)[: self.config.batch_size]
        return sequences.pick(rows.to(sequences.tokens.device))

    # ------------------------------------------------------------------------------------------------- sampling
    def _draw(self) -> None:
        """Draws new samples for the next prompts, and takes what positives they give."""
        config = self.config
        first = self._step // config.refresh * config.prompts_per_step
        self._samples, pairs = [], []
        for place in range(first, first + config.prompts_per_step):
            target = self._next(place)
            params = dataclasses.replace(self.params, group=place, proposal=config.samples)
            if config.positives == "joint":
                pairs.append(self._hidden(self._joint(target, config.pairs_per_prompt, place, 11)))
                drawn = self.engine.smc(target.prompt, params).token_ids
                self._samples.append(self._hidden(self._exact_sequences(drawn, target)))
                continue
            potential, base = self._potential(target), Final(self._potential(target))
            guided = base if config.samples == "base" else self.twist.guide(potential)
            population = self.engine.smc(target.prompt, params, guided)
            self._samples.append(self._of(population, target))
            if config.needs_positives and config.positives == "rejection":
                if config.samples != "base":
                    params = dataclasses.replace(params, proposal="base")
                    population = self.engine.smc(target.prompt, params, base)
                self._drawn += len(population)
                self.exact += evaluate.accept(population, self._accepting)
        if not config.needs_positives or config.positives == "smc":
            self._positives = [None] * config.prompts_per_step
            return
        if config.positives == "joint":
            self._positives = [*pairs]
            return
        if config.positives == "rejection":
            self.exact = self.exact[-8 * max(config.batch_size, 128) :]
            if not self.exact:
                if self._drawn >= 1 << 20:
                    raise ValueError(f"positives='rejection': none of {self._drawn} draws was kept; φ is too small")
                return self._draw_more()
        if config.positives == "rejection" or not self._positives:  # those that are given do not change
            known = self._hidden(self._exact_sequences(self.exact, self.targets[0]))
            self._positives = [known] * config.prompts_per_step

    def _next(self, place: int) -> Target:
        """Gives the target of a place in the order of all draws: every prompt once, then anew in another order."""
        lap, at = divmod(place, len(self.targets))
        return self.targets[np.random.default_rng([self._seed, 2, lap]).permutation(len(self.targets))[at]]

    def _joint(self, target: Target, n: int, place: int, stream: int) -> Sequences:
        """Draws n pairs (s, c) from p0: s are exact samples of the posteriors under the c that follow them."""
        length, seed = self.params.max_tokens, self._seed + stream
        longer = length + self.config.continuation_tokens
        params = dataclasses.replace(self.params, n_particles=n, max_tokens=longer, group=place, seed=seed)
        drawn = self.engine.smc(target.prompt, params).token_ids
        pairs = self._exact_sequences([tokens[:length] for tokens in drawn], target)
        pairs.following = torch.tensor([tokens[length:] for tokens in drawn], device=pairs.tokens.device)
        return pairs

    def _draw_more(self) -> None:
        """Draws another set, under other random numbers, because nothing has been accepted yet."""
        self.params = dataclasses.replace(self.params, seed=self.params.seed + 1)
        self._draw()

    def _exact_sequences(self, exact: Sequence[Sequence[int]], target: Target) -> Sequences:
        tokens = _padded(exact, self.params.max_tokens).to(self.engine.trunk.device)
        zeros = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        return Sequences(tokens, zeros, zeros[:, 0], target.prompt, target.continuation)

    @torch.no_grad()
    def _of(self, population: Population, target: Target) -> Sequences:
        """Makes sequences of a population that was never resampled. log φ is no NaN: groups refuse that."""
        out = self._exact_sequences(population.token_ids, target)
        log_w = torch.as_tensor(population.log_weights, device=out.tokens.device)
        if self.config.samples == "base":
            out.log_phi = log_w
            return self._hidden(out)
        out = self._hidden(out)
        if self.twist.proposal_only:  # only the final weights are of use
            out.log_phi = log_w
            return out
        steps = torch.as_tensor(population.step_log_weights, device=out.tokens.device).T  # with ψ of the token drawn
        width = out.tokens.shape[1]
        steps = F.pad(steps, (0, width - steps.shape[1]))
        ratio = steps - self._log_psi(out).double()
        last = (out.mask.sum(1) - 1)[:, None]
        ratio = torch.where(out.mask, ratio, ratio.gather(1, last))
        out.log_ratio, out.log_phi = ratio, log_w - ratio[:, -1]
        return out

    @torch.no_grad()
    def _hidden(self, sequences: Sequences) -> Sequences:
        """Adds hidden states of trunks that are not trained."""
        config = self.config
        frozen, wants_base = self.twist.trunk is None, config.loss in ("rl", "dpg")
        if frozen or wants_base:
            hidden = self.engine.trunk.frozen_hidden(sequences.prompt, sequences.tokens).float()
            sequences.hidden = hidden if frozen else None
            sequences.base_hidden = hidden if wants_base else None
        return sequences

    # ------------------------------------------------------------------------------------------------- log ψ
    def _states(self, sequences: Sequences) -> Tensor:
        """Gives the hidden states that the head reads, (B, T, H)."""
        if self.twist.trunk is None:
            assert sequences.hidden is not None  # `_hidden` has added them
            return sequences.hidden
        return self.twist.trunk.hidden(sequences.prompt, sequences.tokens).float()

    def _code(self, sequences: Sequences) -> Tensor | None:
        """Computes the code of what must follow, with a conditional twist: (r,) of all, or (B, 1, r) of each."""
        if sequences.following is not None:
            return self.twist.head.code(sequences.following)[:, None]
        if sequences.continuation is None:
            return None
        return self.twist.head.code(torch.tensor(sequences.continuation, device=sequences.tokens.device))

    def _log_psi(self, sequences: Sequences, states: Tensor | None = None, raw: bool = False) -> Tensor:
        """Computes log ψ at the tokens, (B, T) float32; arbitrary where there is no token."""
        states = self._states(sequences) if states is None else states
        tokens = sequences.tokens.clamp(min=0)
        scores = self.twist.head.score(states, tokens, self._code(sequences)).float()
        return scores if raw else self.twist._link(scores)

    def _log_norm(self, sequences: Sequences, states: Tensor) -> Tensor:
        """Computes log Σ_v p0(v) ψ(v) at each token's place, (B, T)."""
        trunk, out = self.engine.trunk, []
        assert sequences.base_hidden is not None  # `_hidden` has added them
        flat, base, code = states.flatten(0, 1), sequences.base_hidden.flatten(0, 1), self._code(sequences)
        size = max(1, SCORE_ELEMENTS // trunk.vocab_size)
        for part, base_part in zip(flat.split(size), base.split(size), strict=True):
            with torch.no_grad():
                logits = trunk.logits(base_part.to(trunk.unembedding().dtype)).float()
                log_p0 = (logits / self.params.temperature).log_softmax(-1)
            out.append((log_p0 + self.twist.head(part, code).float()).logsumexp(-1))
        return torch.cat(out).reshape(states.shape[:2])

    def _weights(self, log_w: Tensor) -> Tensor:
        """Normalises weights over dimension 0; a column without any weight is zero."""
        return torch.softmax(log_w, 0).nan_to_num(0.0).float()

    # ------------------------------------------------------------------------------------------------- the loss
    def _loss(self, batch: Sequences, positives: Sequences | None) -> tuple[Tensor, dict[str, float]]:
        config, mask = self.config, batch.mask
        extra: dict[str, float] = {}
        if config.positives == "joint":
            assert positives is not None  # `_draw` has set them
            return self._joint_loss(batch, positives), extra
        from_samples = config.positives == "smc"
        if config.needs_positives:
            if from_samples:
                positive = batch
            else:
                assert positives is not None  # `_draw` has set them
                positive = self._batch(positives)
            if from_samples:
                w = self._weights(batch.log_ratio[:, -1] + batch.log_phi)
                if not bool(w.any()):  # nothing of σ among them: nothing to learn from
                    return self._log_psi(batch).sum() * 0.0, {"positive_ess": 0.0}
                extra["positive_ess"] = float(1 / w.square().sum())
            else:
                w = torch.full((len(positive),), 1 / len(positive), device=mask.device)
        if config.loss == "dpg":
            states = self._states(positive)
            log_psi, log_norm = self._log_psi(positive, states), self._log_norm(positive, states)
            return dpg_loss(log_psi, log_norm, positive.mask, w), extra
        if config.loss == "rl":
            return self._rl(batch), extra
        if config.loss == "fudge":
            if bool((batch.log_phi > 1e-6).any()):
                raise ValueError(f"loss='fudge': log φ = {float(batch.log_phi.max()):.4g}; φ must be a probability")
            return fudge_loss(self._log_psi(batch, raw=True), mask, batch.log_phi), extra
        log_psi = self._log_psi(batch)
        up = log_psi if from_samples else self._log_psi(positive)
        if config.loss == "sixo":
            return sixo_loss(up, positive.mask, w, log_psi, mask), extra
        # those that ended before hold φ, and no gradient
        held = torch.where(mask, log_psi.detach().double(), batch.log_phi[:, None])
        weights = self._weights(batch.log_ratio + held)
        extra["sample_ess"] = float((1 / weights.square().sum(0).clamp(min=1e-30)).min())
        return ctl_loss(up, positive.mask, w, log_psi, mask, weights), extra

    def _joint_loss(self, batch: Sequences, pairs: Sequences) -> Tensor:
        """Computes the mean of `ctl_loss` over K pairs (s, c): the negatives are the samples, weighed by ψ(·, c).

        None of them has ended, so π_t(· | c) is p0·ψ_t(·, c) for each.
        """
        codes, states, tokens = self._code(pairs), self._states(batch), batch.tokens
        assert codes is not None  # joint draws have continuations
        log_psi = self.twist._link(self.twist.head.score(states, tokens, codes[:, None]).float())  # (K, B, T)
        up, n = self._log_psi(pairs), len(pairs)
        weights = torch.softmax(log_psi.detach(), 1) / n
        share = torch.full((n,), 1 / n, device=tokens.device)
        return ctl_loss(up, pairs.mask, share, log_psi.flatten(0, 1), batch.mask.repeat(n, 1), weights.flatten(0, 1))

    def _rl(self, batch: Sequences) -> Tensor:
        if bool((batch.log_phi == -math.inf).any()):
            raise ValueError("loss='rl': a sample has log φ = -inf; give φ a floor, or use another loss")
        states = self._states(batch)
        with torch.no_grad():
            norm = self._log_norm(batch, states).double()
        target = torch.cat([norm[:, 1:], norm[:, :1]], dim=1)
        last = batch.mask.sum(1) - 1
        target[torch.arange(len(batch), device=last.device), last] = batch.log_phi
        return rl_loss(self._log_psi(batch, states), batch.mask, target.float())

    # ------------------------------------------------------------------------------------------------- records
    def _evaluate(self) -> dict[str, float]:
        """Bounds log Z with the present twist, from above too where exact samples are known; the mean over prompts.

        `lower_se` and `upper_se` are the errors of the mean over these very prompts (NaN for an upper bound with one
        exact sample per prompt); `gap_se` is that of the mean over all such prompts.
        """
        config = self.config
        params = dataclasses.replace(
            self.params,
            n_particles=config.eval_particles,
            ess_threshold=0.5,
            proposal="twisted",
            seed=self.params.seed + 7,
        )
        sides: dict[str, list[tuple[float, float]]] = {"lower": [], "upper": []}
        for place, judged in enumerate(self._judged):
            target, exact = self._exact_of(place, judged)
            params = dataclasses.replace(params, group=2 * config.eval_runs * place)
            guided = self.twist.guide(self._potential(target))
            if exact:
                bounds = evaluate.log_z_bounds(
                    self.engine, target.prompt, params, guided, exact=exact[-config.eval_runs :], runs=config.eval_runs
                )
                sides["upper"].append((bounds.upper_mean, bounds.upper_se))
                lower = bounds.lower
            else:
                runs = self.engine.smc([target.prompt] * config.eval_runs, params, guided)
                lower = np.array([population.log_z for population in runs])
            sides["lower"].append((float(lower.mean()), float(lower.std(ddof=1) / math.sqrt(len(lower)))))
        n = len(self._judged)
        record: dict[str, float] = {"step": self._step}
        for side, found in sides.items():
            if len(found) == n:
                record |= {side: _mean(mean for mean, _ in found), f"{side}_se": math.hypot(*(e for _, e in found)) / n}
        if n > 1 and len(sides["upper"]) == n:
            gaps = np.array([up[0] - low[0] for low, up in zip(sides["lower"], sides["upper"], strict=True)])
            record |= {"gap": float(gaps.mean()), "gap_se": float(gaps.std(ddof=1) / math.sqrt(n))}
        return record

    def _exact_of(self, place: int, target: Target) -> tuple[Target, list[list[int]]]:
        """Gives a target to evaluate on, and exact samples of it as far as they are known."""
        if self.config.positives != "joint" or target.continuation is not None:
            return target, self.exact if self._judged is self.targets else []
        if place not in self._pairs:
            pair = self._joint(target, 1, place, 12)
            assert pair.following is not None
            self._pairs[place] = Target(target.prompt, pair.following[0].tolist()), pair.tokens[0].tolist()
        target, tokens = self._pairs[place]
        return target, [tokens]

    def _held_out(self) -> dict[str, Any] | None:
        """Says for the card what held-out prompts there were, and their bounds before training and after it."""
        known, card = [r for r in self.history if "lower" in r], self.twist.card
        if card.held_out is None or not known:
            return card.held_out
        names = ("step", "lower", "lower_se", "upper", "upper_se", "gap", "gap_se")
        before, after = ({name: r[name] for name in names if name in r} for r in (known[0], known[-1]))
        return {**card.held_out, "before": before, "after": after}

    def _log(self, record: dict[str, float], board: Any) -> None:
        plain = json_safe(record)
        self.history.append(plain)
        if self.directory is not None:
            with open(self.directory / "metrics.jsonl", "a") as file:
                file.write(json.dumps(plain) + "\n")
        if board is not None:
            for key, value in record.items():
                if key != "step":
                    board.add_scalar(key, value, record["step"])

    def _tensorboard(self) -> Any:
        if self.directory is None:
            return None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return SummaryWriter(str(self.directory))

    # ------------------------------------------------------------------------------------------------- checkpoints
    def _save_checkpoint(self) -> None:
        assert self.directory is not None  # without one nothing is kept
        state = {
            "card": self._configuration,
            "step": self._step,
            "parameters": [p.detach() for p in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": self._random.get_state(),
            "accepting": json.dumps(self._accepting.bit_generator.state),
            "seed": self.params.seed,
            "drawn": self._drawn,
            "exact": self.exact,
            "samples": [vars(samples) for samples in self._samples],
            "positives": [None if positives is None else vars(positives) for positives in self._positives],
        }
        temporary = self.directory / "checkpoint.tmp"
        torch.save(state, temporary)
        temporary.replace(self.directory / "checkpoint.pt")

    def _resume(self) -> None:
        """Goes on where a checkpoint was left. ValueError: the checkpoint has another configuration."""
        assert self.directory is not None  # without one nothing was kept
        path, log = self.directory / "checkpoint.pt", self.directory / "metrics.jsonl"
        if not path.exists():
            log.unlink(missing_ok=True)
            return
        state = torch.load(path, weights_only=True, map_location=self.engine.trunk.device)
        if state["card"] != self._configuration:
            raise ValueError(f"{path}: is of another configuration; train into another directory, or remove it")
        with torch.no_grad():
            for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._random.set_state(state["random"].cpu())
        self._accepting.bit_generator.state = json.loads(state["accepting"])
        self._step, self._drawn, self.exact = state["step"], state["drawn"], state["exact"]
        self.params = dataclasses.replace(self.params, seed=state["seed"])
        self._samples = [Sequences(**samples) for samples in state["samples"]]
        self._positives = [None if values is None else Sequences(**values) for values in state["positives"]]
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        self.history = [line for line in lines if line["step"] <= self._step]
        log.write_text("".join(json.dumps(line) + "\n" for line in self.history))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def plot_history(history: Sequence[dict[str, Any]], path: str | os.PathLike | None = None) -> Any:
    """Draws loss and bounds on log Z over steps: a matplotlib Figure, written to `path` where there is one."""
    return plots.training(history, path)
