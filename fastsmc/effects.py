"""Effects of interventions on log Z, and probabilities of necessity and sufficiency, by SMC: methods of any engine.

    effect       log Z under do(intervention) less log Z: over all texts that the model may write
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
        """Estimates log Z under do(intervention) less log Z.

        The estimate is the log of the ratio of both arms' mean Ẑ; its standard error leaves out one pair of runs after
        the other (jackknife). With exact samples, E[log Ẑ] ≤ log Z ≤ E[log Ẑ*] bounds each arm, and so their
        difference. Run r of both arms has one seed.

        Args:
            prompt: one prompt.
            exact: exact samples of the target under the intervention, and of that without it; lists of token ids.
            twist: of the potential, for both arms.

        Raises:
            ValueError: no runs, no exact samples in one of the two lists, or an arm without any weight in all its runs.
            SMCError: a run failed.
        """
        check_int("runs", runs, 1)
        kept = None if exact is None else [read_samples(f"exact[{i}]", one) for i, one in enumerate(exact)]
        if kept is not None and (len(kept) != 2 or not all(kept)):
            raise ValueError("exact: must be two lists of samples, under the intervention and without it")

        def log_z(settings: SMCParams, change: Any, **more: Any) -> np.ndarray:
            engine: Any = self
            found = engine.smc([prompt] * runs, settings, potential, twist=twist, intervention=change, **more)
            return np.array([population.log_z for population in found])

        do, base = (log_z(params, change) for change in (intervention, None))
        estimate = _log_mean(do) - _log_mean(base)
        if not math.isfinite(estimate):
            arm = "under the intervention" if math.isinf(_log_mean(do)) else "without the intervention"
            raise ValueError(
                f"params.n_particles={params.n_particles}: no run {arm} has any weight; more particles may find some"
            )
        se = math.nan
        if runs > 1:
            left_out = np.array([_log_mean(np.delete(do, r)) - _log_mean(np.delete(base, r)) for r in range(runs)])
            se = math.sqrt((runs - 1) / runs * np.square(left_out - left_out.mean()).sum())
        lower = upper = None
        if kept is not None:
            later = dataclasses.replace(params, group=params.group + runs)
            above = [
                log_z(later, change, exact=[[samples[r % len(samples)]] for r in range(runs)]).mean()
                for change, samples in zip((intervention, None), kept, strict=True)
            ]
            lower, upper = float(do.mean() - above[1]), float(above[0] - base.mean())
        return Effect(estimate, se, lower, upper, runs, True)

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


def _log_mean(values: np.ndarray) -> float:
    return float(np.logaddexp.reduce(values) - math.log(len(values)))
