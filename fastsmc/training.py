"""Learning twists: CTL, RL (soft Q), SIXO, FUDGE and DPG, in plain PyTorch over a Hugging Face trunk.

    groups of a `HFEngine` → Samples (tokens, log p0/q, log φ) → hidden states → log ψ at the tokens → loss → AdamW

A step has two sorts of sequences. *Samples* are drawn without resampling, from p0 or from the present twist's proposal,
so that for every t their weights p0/q · ψ_t make them a sample of π_t. *Positives* are of σ = p0·φ/Z: exact by
rejection or given as data, or the samples themselves under their final weights. With a frozen trunk (kinds `linear`
and `mlp`) hidden states are computed once per sequence; `refresh` steps share one set of samples.

The losses are functions of log ψ at the tokens, weights and masks, so that they can be read beside docs/mathematics.md
§5. Their names: B sequences, T columns, column t holds token t + 1 and log ψ_{t+1} of the history up to and with it.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastsmc import evaluate, plots
from fastsmc.hf import SCORE_ELEMENTS, HFEngine
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Final, Potential
from fastsmc.trunk import Trunk
from fastsmc.twists import KINDS, LOSSES, Card, Head, Twist, add_lora, tokenizer_hash
from fastsmc.values import check_choice, check_int, json_safe

SAMPLES = ("twisted", "base")
POSITIVES = ("smc", "rejection", "data")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwistConfig:
    """Says how a twist is trained.

    Args:
        loss: 'ctl', 'rl', 'sixo', 'fudge' or 'dpg'.
        kind: 'linear', 'mlp', 'lora' or 'model'; see `fastsmc.twists`.
        rank: features of the perceptron of all kinds but 'linear'.
        steps: gradient steps.
        batch_size: samples per step, and positives per step.
        refresh: how many steps share one set of `SMCParams.n_particles` samples.
        samples: drawn from 'twisted', the present twist's proposal, or 'base', p0. SIXO and FUDGE need 'base'.
        positives: 'smc', the samples under their final weights; 'rejection' (φ <= 1); 'data', given. RL and FUDGE have
            none.
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
    steps: int = 500
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
        for name, low in {**least, "lora_rank": 1, "eval_particles": 1, "eval_runs": 2}.items():
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
        if (self.kind == "model") != (self.trunk is not None):
            raise ValueError(f"trunk={self.trunk!r}: a path goes with kind='model', and only with it")

    @property
    def needs_positives(self) -> bool:
        return self.loss in ("ctl", "sixo", "dpg")


# -- losses ------------------------------------------------------------------------------------------------------------
def ctl_loss(
    positive: Tensor, positive_mask: Tensor, positive_weights: Tensor, log_psi: Tensor, mask: Tensor, weights: Tensor
) -> Tensor:
    """Computes the contrastive loss −[Σ_k W_k mean_t log ψ_t(s^k) − mean_t Σ_k W_{t,k} log ψ_t(s^k)].

    Args:
        positive, log_psi: (K, T), (B, T) log ψ of positives and samples; their masks (bool) say where there is a token.
        positive_weights: (K,) sum 1; weights: (B, T), columns sum to 1: of the samples as a sample of π_t.
    """
    up = (positive_weights[:, None] * positive * positive_mask).sum()
    down = (weights * log_psi * mask).sum()
    return (down - up) / log_psi.shape[1]


def rl_loss(log_psi: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Computes the soft Q loss: mean over tokens of (log ψ_t − target)²; all are (B, T).

    Args:
        target: log Σ_v p0 ψ_{t+1}, at the end log φ.
    """
    return (F.mse_loss(log_psi, target.where(mask, log_psi.detach()), reduction="none") * mask).sum() / mask.sum()


def sixo_loss(
    positive: Tensor, positive_mask: Tensor, positive_weights: Tensor, log_psi: Tensor, mask: Tensor
) -> Tensor:
    """Computes the density ratio loss −Σ_k W_k mean_t log sigmoid(log ψ_t(s^k)) − mean_{p0} log(1 − sigmoid(log ψ_t)).

    The arguments are as in `ctl_loss`.
    """
    up = (positive_weights[:, None] * F.logsigmoid(positive) * positive_mask).sum()
    down = (F.logsigmoid(-log_psi) * mask).sum() / len(log_psi)
    return -(up + down) / log_psi.shape[1]


def fudge_loss(raw: Tensor, mask: Tensor, log_phi: Tensor) -> Tensor:
    """Computes the cross-entropy of ψ_t = sigmoid(raw), (B, T), against a roll-out's chance φ (B,) of the class."""
    phi = log_phi.exp()[:, None].expand_as(raw).to(raw.dtype)
    return (F.binary_cross_entropy_with_logits(raw, phi, reduction="none") * mask).sum() / mask.sum()


def dpg_loss(log_psi: Tensor, log_norm: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Computes the loss −Σ_k W_k mean_t [log ψ_t(s_t) − log Σ_v p0 ψ_t(v)].

    Its gradient is that of −log ψ_t(s_t) + E_{v~q} log ψ_t(v).

    Args:
        log_psi, log_norm, mask: (K, T) at positives; weights: (K,) sum 1.
    """
    return -(weights[:, None] * (log_psi - log_norm) * mask).sum() / log_psi.shape[1]


# -- sequences ---------------------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Sequences:
    """Holds B sequences as tensors.

    Attributes:
        tokens: (B, T) int64, −1 after the end.
        log_ratio: (B, T) float64, log p0/q of the tokens up to each.
        log_phi: (B,) float64.
        hidden: (B, T, H) of a frozen trunk before each token, or None.
        base_hidden: the same of the base model, where it is needed and another.
    """

    tokens: Tensor
    log_ratio: Tensor
    log_phi: Tensor
    hidden: Tensor | None = None
    base_hidden: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        return self.tokens >= 0

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, rows: Tensor) -> Sequences:
        picked: dict[str, Any] = {k: None if v is None else v[rows] for k, v in vars(self).items()}
        return Sequences(**picked)


def _padded(sequences: Sequence[Sequence[int]], width: int) -> Tensor:
    out = torch.full((len(sequences), width), -1, dtype=torch.int64)
    for i, ids in enumerate(sequences):
        out[i, : len(ids)] = torch.tensor(list(ids), dtype=torch.int64)
    return out


# -- the trainer -------------------------------------------------------------------------------------------------------
class Trainer:
    """Trains one twist for one prompt and potential.

    Args:
        engine: the base model.
        prompt: text or token ids.
        params: n_particles samples at a time, max_tokens, temperature, stop tokens and seed; the rest is set here.
        potential: φ.
        config: how.
        directory: where the run leaves its files; None: nowhere.
        exact: exact samples of the target, for positives='data' and for the upper bound.
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
        prompt: str | Sequence[int],
        params: SMCParams,
        potential: Potential,
        config: TwistConfig,
        directory: str | os.PathLike | None = None,
        *,
        exact: Sequence[Sequence[int]] | None = None,
        name: str | None = None,
        args: dict[str, Any] | None = None,
    ) -> None:
        if config.positives == "data" and config.needs_positives and not exact:
            raise ValueError("exact: positives='data' needs exact samples of the target")
        self.engine, self.config, self.potential = engine, config, potential
        plain = {name: off for name, off in SMCParams().p0().items() if name != "temperature"}
        others = params.stop or params.force_stop or params.powered
        if params.p0() != {**plain, "temperature": params.temperature} or others:
            raise ValueError(
                f"params={params}: twists are trained without settings of p0, `stop`, `force_stop` and `power`"
            )
        self.params = dataclasses.replace(params, ess_threshold=0.0)
        self.prompt = engine.encode(prompt)
        self.exact = [list(ids) for ids in exact or []]
        self.directory = None if directory is None else Path(directory)
        self.history: list[dict[str, Any]] = []
        torch.manual_seed(params.seed)
        self.twist = self._make_twist(prompt, name, args or {})
        self._target = potential if config.compose else Final(potential)
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
        self._samples: Sequences | None = None
        self._positives: Sequences | None = None
        self._drawn = 0  # base draws that rejection has seen

    def _make_twist(self, prompt: Any, name: str | None, args: dict[str, Any]) -> Twist:
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
        head = Head(size, base.vocab_size, None if config.kind == "linear" else config.rank).to(base.device)
        head.start_from((trunk or base).unembedding())
        card = Card(
            kind=config.kind,
            loss=config.loss,
            base_model=str(self.engine.engine.model_name),
            vocab_size=base.vocab_size,
            hidden_size=base.hidden_size,
            tokenizer=tokenizer_hash(self.engine.get_tokenizer()),
            input_size=size,
            rank=size if config.kind == "linear" else config.rank,
            prompt=prompt if isinstance(prompt, str) else list(prompt),
            potential=name,
            potential_args=args,
            temperature=self.params.temperature,
            compose=config.compose,
            lora_rank=config.lora_rank if config.kind == "lora" else 0,
            lora_alpha=config.lora_alpha if config.kind == "lora" else 0.0,
            settings={**dataclasses.asdict(config), "params": dataclasses.asdict(self.params)},
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
        self.twist.card = dataclasses.replace(self.twist.card, steps=self._step)
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
        if self._samples is None or self._step % config.refresh == 0:
            self._draw()
        assert self._samples is not None
        batch = self._batch(self._samples)
        device = self.engine.trunk.device
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            loss, extra = self._loss(batch)
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"step {self._step}: the loss is {float(loss)}; a smaller lr may help")
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, config.clip)
        self._optimizer.step()
        self._schedule.step()
        self._step += 1
        return {
            "step": self._step,
            "loss": float(loss.detach()),
            "lr": float(self._schedule.get_last_lr()[0]),
            "grad_norm": float(norm),
            **extra,
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
        """Draws new samples, and takes what positives they give."""
        config, first = self.config, self._step // self.config.refresh
        params = dataclasses.replace(self.params, group=first, proposal=config.samples)
        if config.samples == "base":
            population = self.engine.smc(self.prompt, params, Final(self.potential))
            self._samples = self._of(population, base=True)
        else:
            population = self.engine.smc(self.prompt, params, self.twist * self._target)
            self._samples = self._of(population, base=False)
        if not config.needs_positives or config.positives == "smc":
            return
        if config.positives == "rejection":
            if config.samples != "base":
                params = dataclasses.replace(params, proposal="base")
                population = self.engine.smc(self.prompt, params, Final(self.potential))
            self._drawn += len(population)
            self.exact += evaluate.accept(population, self._accepting)
            self.exact = self.exact[-8 * max(config.batch_size, 128) :]
            if not self.exact:
                if self._drawn >= 1 << 20:
                    raise ValueError(f"positives='rejection': none of {self._drawn} draws was kept; φ is too small")
                return self._draw_more()
        known = 0 if self._positives is None else len(self._positives)
        if config.positives == "rejection" or known != len(self.exact):
            self._positives = self._hidden(self._exact_sequences(self.exact))

    def _draw_more(self) -> None:
        """Draws another set, under other random numbers, because nothing has been accepted yet."""
        self.params = dataclasses.replace(self.params, seed=self.params.seed + 1)
        self._draw()

    def _exact_sequences(self, exact: Sequence[Sequence[int]]) -> Sequences:
        tokens = _padded(exact, self.params.max_tokens).to(self.engine.trunk.device)
        zeros = torch.zeros(tokens.shape, dtype=torch.float64, device=tokens.device)
        return Sequences(tokens, zeros, zeros[:, 0])

    @torch.no_grad()
    def _of(self, population: Population, base: bool) -> Sequences:
        """Makes sequences of a population that was never resampled. log φ is no NaN: groups refuse that."""
        out = self._exact_sequences(population.token_ids)
        log_w = torch.as_tensor(population.log_weights, device=out.tokens.device)
        if base:
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
            hidden = self.engine.trunk.frozen_hidden(self.prompt, sequences.tokens).float()
            sequences.hidden = hidden if frozen else None
            sequences.base_hidden = hidden if wants_base else None
        return sequences

    # ------------------------------------------------------------------------------------------------- log ψ
    def _states(self, sequences: Sequences) -> Tensor:
        """Gives the hidden states that the head reads, (B, T, H)."""
        if self.twist.trunk is None:
            assert sequences.hidden is not None  # `_hidden` has added them
            return sequences.hidden
        return self.twist.trunk.hidden(self.prompt, sequences.tokens).float()

    def _log_psi(self, sequences: Sequences, states: Tensor | None = None, raw: bool = False) -> Tensor:
        """Computes log ψ at the tokens, (B, T) float32; arbitrary where there is no token."""
        states = self._states(sequences) if states is None else states
        scores = self.twist.head.score(states, sequences.tokens.clamp(min=0)).float()
        return scores if raw else self.twist._link(scores)

    def _log_norm(self, sequences: Sequences, states: Tensor) -> Tensor:
        """Computes log Σ_v p0(v) ψ(v) at each token's place, (B, T)."""
        trunk, out = self.engine.trunk, []
        assert sequences.base_hidden is not None  # `_hidden` has added them
        flat, base = states.flatten(0, 1), sequences.base_hidden.flatten(0, 1)
        size = max(1, SCORE_ELEMENTS // trunk.vocab_size)
        for part, base_part in zip(flat.split(size), base.split(size), strict=True):
            with torch.no_grad():
                logits = trunk.logits(base_part.to(trunk.unembedding().dtype)).float()
                log_p0 = (logits / self.params.temperature).log_softmax(-1)
            out.append((log_p0 + self.twist.head(part).float()).logsumexp(-1))
        return torch.cat(out).reshape(states.shape[:2])

    def _weights(self, log_w: Tensor) -> Tensor:
        """Normalises weights over dimension 0; a column without any weight is zero."""
        return torch.softmax(log_w, 0).nan_to_num(0.0).float()

    # ------------------------------------------------------------------------------------------------- the loss
    def _loss(self, batch: Sequences) -> tuple[Tensor, dict[str, float]]:
        config, mask, extra = self.config, batch.mask, {}
        from_samples = config.positives == "smc"
        if config.needs_positives:
            if from_samples:
                positive = batch
            else:
                assert self._positives is not None  # `_draw` has set them
                positive = self._batch(self._positives)
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
        """Bounds log Z with the present twist, from above too where exact samples are known."""
        config = self.config
        params = dataclasses.replace(
            self.params,
            n_particles=config.eval_particles,
            ess_threshold=0.5,
            proposal="twisted",
            seed=self.params.seed + 7,
        )
        guided = self.twist * self._target
        record: dict[str, float] = {"step": self._step}
        if self.exact:
            bounds = evaluate.log_z_bounds(
                self.engine, self.prompt, params, guided, exact=self.exact[-config.eval_runs :], runs=config.eval_runs
            )
            record |= {"upper": bounds.upper_mean, "upper_se": bounds.upper_se}
            lower = bounds.lower
        else:
            lower = np.array([p.log_z for p in self.engine.smc([self.prompt] * config.eval_runs, params, guided)])
        return record | {"lower": float(lower.mean()), "lower_se": float(lower.std(ddof=1) / math.sqrt(len(lower)))}

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
        samples, positives = self._samples, self._positives
        assert self.directory is not None  # without one nothing is kept
        state = {
            "card": json.dumps(self.twist.card.settings),
            "step": self._step,
            "parameters": [p.detach() for p in self._parameters],
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": self._random.get_state(),
            "accepting": json.dumps(self._accepting.bit_generator.state),
            "seed": self.params.seed,
            "drawn": self._drawn,
            "exact": self.exact,
            "samples": vars(samples),
            "positives": None if positives is None else vars(positives),
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
        if state["card"] != json.dumps(self.twist.card.settings):
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
        self._samples = Sequences(**state["samples"])
        self._positives = None if state["positives"] is None else Sequences(**state["positives"])
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        self.history = [line for line in lines if line["step"] <= self._step]
        log.write_text("".join(json.dumps(line) + "\n" for line in self.history))


def plot_history(history: Sequence[dict[str, Any]], path: str | os.PathLike | None = None) -> Any:
    """Draws loss and bounds on log Z over steps: a matplotlib Figure, written to `path` where there is one."""
    return plots.training(history, path)
