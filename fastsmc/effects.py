"""Effects of interventions on log Z, and probabilities of necessity and sufficiency, by SMC: methods of any engine.

    effect       log Z under do(intervention) less log Z: over all texts that the model may write; `effects` of several
    necessity    P(not φ(counterfactual) | a text with φ)
    sufficiency  P(φ(counterfactual) | a text without φ)

The last two are Pearl's (Causality, 2nd ed., ch. 9), of one text, with φ for the outcome and the intervention for the
absence, or presence, of the cause.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsmc.arguments import read_samples
from fastsmc.interventions import Facts
from fastsmc.params import SMCParams
from fastsmc.potentials import Potential
from fastsmc.potentials.tokens import short
from fastsmc.values import check_int


@dataclasses.dataclass(frozen=True)
class Effect:
    """Holds an estimate over independent runs.

    Attributes:
        estimate, se: and its standard error; NaN of a single run.
        lower, upper: bounds that hold on average, where exact samples were given; else None.
        runs: how many, per arm where there are two.
        shared_seeds: whether run r of both arms has one seed, so that their difference varies less.
    """

    estimate: float
    se: float
    lower: float | None
    upper: float | None
    runs: int
    shared_seeds: bool


class Effects:
    """Adds effects to an engine, which has `smc`, `counterfactual` and `get_tokenizer`."""

    def effect(
        self,
        prompt: Any,
        params: SMCParams,
        potential: Potential,
        intervention: Any,
        runs: int = 8,
        exact: tuple[Sequence, Sequence] | None = None,
        *,
        twist: str | os.PathLike | None = None,
    ) -> Effect:
        """Estimates log Z under do(intervention) less log Z: `effects` of a single one.

        Args:
            exact: exact samples of the target under the intervention, and of that without it; lists of token ids.

        Returns, raises: as there.
        """
        if exact is not None and (not isinstance(exact, (list, tuple)) or len(exact) != 2):
            raise ValueError("exact: must be two lists of samples, under the intervention and without it")
        return self.effects(prompt, params, potential, [intervention], runs, exact, twist=twist)[0]

    def effects(
        self,
        prompt: Any,
        params: SMCParams,
        potential: Potential,
        interventions: Sequence[Any],
        runs: int = 8,
        exact: Sequence[Sequence] | None = None,
        *,
        twist: str | os.PathLike | None = None,
    ) -> list[Effect]:
        """Estimates, for each of some interventions, log Z under do(intervention) less log Z.

        Arms (one for each intervention, and one without any) share forward passes, and random numbers: those of run r,
        particle i and step t are the same in all, so that effects differ by what the interventions do. The estimate is
        the log of the ratio of two arms' mean Ẑ; its standard error leaves out one run after the other of both
        (jackknife). With exact samples, E[log Ẑ] ≤ log Z ≤ E[log Ẑ*] bounds each arm, and so their difference.

        Args:
            prompt: one prompt.
            interventions: each as `smc` takes it for one prompt.
            runs: of each arm.
            exact: exact samples of the target under each intervention, and last of that without any.
            twist: of the potential, for all arms.

        Raises:
            ValueError: no runs, no interventions, no exact samples for an arm, or an arm without any weight in all its
                runs.
            SMCError: a run failed.
        """
        check_int("runs", runs, 1)
        if not isinstance(interventions, (list, tuple)) or not interventions:
            raise ValueError(f"interventions={short(interventions)}: must be a list of at least one intervention")
        if not isinstance(params, SMCParams):
            raise ValueError(f"params={short(params)}: must be SMCParams")
        if exact is not None and not isinstance(exact, (list, tuple)):
            raise ValueError(f"exact={short(exact)}: must be a list of exact samples for each arm")
        arms = [*interventions, None]
        kept = None if exact is None else [read_samples(f"exact[{i}]", one) for i, one in enumerate(exact)]
        if kept is not None and len(kept) != len(arms):
            raise ValueError(f"exact: {len(kept)} lists of samples for {len(arms)} arms, of which the last is without")

        def log_z(first_group: int, **more: Any) -> np.ndarray:
            engine: Any = self
            groups = [dataclasses.replace(params, group=params.group + first_group + r) for r in range(runs)]
            found = engine.smc(
                [prompt] * (runs * len(arms)), groups * len(arms), potential, twist=twist,
                intervention=[arm if arm is None else _listed(arm) for arm in arms for _ in range(runs)], **more,
            )  # fmt: skip
            return np.array([population.log_z for population in found]).reshape(len(arms), runs)

        found, above = log_z(0), None
        if kept is not None:
            samples = [[rows[r % len(rows)]] for rows in kept for r in range(runs)]
            above = log_z(runs, exact=samples).mean(1)
        for i, arm in enumerate(found):
            if not np.isfinite(arm).any():
                which = "without an intervention" if i == len(arms) - 1 else f"under interventions[{i}]"
                raise ValueError(
                    f"params.n_particles={params.n_particles}: no run {which} has any weight; more particles may find "
                    "some"
                )
        base = found[-1]
        out = []
        for i, do in enumerate(found[:-1]):
            lower = upper = None
            if above is not None:
                lower, upper = float(do.mean() - above[-1]), float(above[i] - base.mean())
            estimate = _log_mean(do) - _log_mean(base)
            out.append(Effect(estimate, _standard_error(do, base), lower, upper, runs, True))
        return out

    def necessity(
        self, prompt: Any, text: Any, potential: Potential, intervention: Any, params: SMCParams, runs: int = 8
    ) -> Effect:
        """Estimates the probability that a text with φ would have been without it under the intervention.

        Args:
            prompt, text: one of each, as `counterfactual` takes them; or `Facts` of this model, and None.
            potential: φ, of values 0 and 1.

        Raises:
            ValueError: φ(text) is not 1, or the facts are another model's.
        """
        estimate, se = self._share(prompt, text, potential, intervention, params, runs, 1.0)
        return Effect(1.0 - estimate, se, None, None, runs, False)

    def sufficiency(
        self, prompt: Any, text: Any, potential: Potential, intervention: Any, params: SMCParams, runs: int = 8
    ) -> Effect:
        """Estimates the probability that a text without φ would have been one with it under the intervention.

        Args, raises: as `necessity`; φ(text) is 0 here.
        """
        return Effect(*self._share(prompt, text, potential, intervention, params, runs, 0.0), None, None, runs, False)

    def _share(
        self,
        prompt: Any,
        text: Any,
        potential: Potential,
        intervention: Any,
        params: SMCParams,
        runs: int,
        wanted: float,
    ) -> tuple[float, float]:
        """Estimates φ's mean over counterfactuals, and its standard error, after a look at φ of the text itself."""
        check_int("runs", runs, 1)
        engine: Any = self
        if isinstance(text, str) and (tokenizer := engine.get_tokenizer()) is not None:
            text = tokenizer.encode(text, add_special_tokens=False)
        ids = prompt.token_ids if isinstance(prompt, Facts) else text
        if ids is None:
            raise ValueError("text=None: φ is asked of a text; give it")
        alone = dataclasses.replace(
            params, n_particles=1, max_tokens=max(1, len(ids)), proposal="base", ess_threshold=0.0
        )
        itself = engine.counterfactual(prompt, text, params=alone, potential=potential)  # under nothing: the text
        if isinstance(itself, list):
            raise ValueError(f"prompt: must be one prompt, got {len(itself)}")
        seen = itself.token_ids[0]  # less than the text where no weight is left before its end
        if seen != list(ids[: len(seen)]):
            raise ValueError(
                "prompt: these Facts are of another model than the engine's, which cannot look at φ of the text"
            )
        phi = math.exp(itself.log_weights[0])
        if abs(phi - wanted) > 1e-9:
            raise ValueError(f"text: its potential is {phi:.6g}, must be {wanted:.0f}; of values 0 and 1 altogether")
        texts = None if text is None else [text] * runs
        found = engine.counterfactual([prompt] * runs, texts, intervention, params=params, potential=potential)
        z = np.exp([each.log_z for each in found])
        return float(z.mean()), float(z.std(ddof=1) / math.sqrt(runs)) if runs > 1 else math.nan


def _listed(intervention: Any) -> list:
    return list(intervention) if isinstance(intervention, (list, tuple)) else [intervention]


def _standard_error(do: np.ndarray, base: np.ndarray) -> float:
    """Estimates that of log(mean Ẑ) of one arm less that of the other, by leaving out one run after the other."""
    runs = len(do)
    if runs == 1:
        return math.nan
    left_out = np.array([_log_mean(np.delete(do, r)) - _log_mean(np.delete(base, r)) for r in range(runs)])
    return math.sqrt((runs - 1) / runs * np.square(left_out - left_out.mean()).sum())


def _log_mean(values: np.ndarray) -> float:
    return float(np.logaddexp.reduce(values) - math.log(len(values)))
