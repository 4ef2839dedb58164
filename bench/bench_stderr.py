"""Whether log Ẑ ± 2 standard errors of its own run holds log Z, by many runs of models whose Z is known.

    python bench/bench_stderr.py --json FILE          15 minutes, no engine

A model is a Markov chain over 16 tokens with a table of its own per step and φ = exp(Σ value[t, s_t]), whose Z is a sum
over states; groups are those of `fastsmc.smc`, all runs of a setting in one cohort. Per model, scheme and threshold:

    relative sd   of Ẑ / Z over the runs, which is what a standard error is of
    finite        share of runs that have one
    coverage      share of those with |log Ẑ − log Z| <= 2 standard errors
    ratio         median standard error over the relative sd

and the same of the figure of Lee & Whiteley 2018 with the exponent that suits the scheme (docs/mathematics.md §9).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from typing import Any

import numpy as np
import torch
from machine import write_result
from torch import Tensor

from fastsmc import Population, Potential, SMCParams
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.potentials import State
from fastsmc.smc import Group, arrange, finish

STATES, RUNS, PARTICLES = 16, 200, 400
THRESHOLDS = (0.5, 1.0)


@dataclasses.dataclass(frozen=True)
class Model:
    """Is a chain of so many steps with values of a spread; `share` of them is the twist's, 1 being all so far.

    Attributes:
        heavy: a target of few heavy particles, for which no standard error of one run can cover.
    """

    name: str
    steps: int
    spread: float
    proposal: str
    share: float = 1.0
    heavy: bool = False

    def tables(self) -> tuple[Tensor, Tensor, float]:
        """Makes logits (T, V, V) float32, values (T, V) float64, and log Z of a chain that begins in state 0."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.steps, STATES, STATES, generator=generator)
        value = self.spread * torch.randn(self.steps, STATES, generator=generator, dtype=torch.float64)
        ahead = torch.ones(STATES, dtype=torch.float64)
        for p, v in zip(logits.double().softmax(2).flip(0), value.flip(0), strict=True):
            ahead = p @ (v.exp() * ahead)
        return logits, value, float(ahead[0].log())


MODELS = (
    Model("4 steps, base proposal", 4, 0.5, "base"),
    Model("12 steps, base proposal", 12, 0.3, "base"),
    Model("12 steps, twisted proposal", 12, 0.6, "twisted", 0.5),
    Model("12 steps, base proposal, heavy tail", 12, 1.5, "base", heavy=True),
)


class Values(Potential):
    """φ = exp(Σ value[t, s_t]), ψ_t = exp(share · the same so far)."""

    per_particle = ()

    def __init__(self, value: Tensor, share: float) -> None:
        self.value, self.share = value, share

    def complete(self, state: State) -> Tensor:
        drawn = state.tokens
        if drawn.shape[1] == 0:
            return torch.zeros(len(state.finished), dtype=torch.float64)
        return self.value[: drawn.shape[1]].T[drawn, torch.arange(drawn.shape[1])].sum(1)

    def prefix(self, state: State) -> Tensor:
        return self.share * self.complete(state)

    def logw_next(self, state: State) -> Tensor:
        return (self.share * self.value[state.step]).expand(len(state.finished), -1)


def sample(model: Model, scheme: str, threshold: float, runs: int, n: int) -> tuple[list[Population], float]:
    """Runs groups of n particles side by side; their populations, and log Z."""
    logits, value, log_z = model.tables()
    potential = Values(value, model.share)
    params = SMCParams(
        n_particles=n, max_tokens=model.steps, ess_threshold=threshold, resampling=scheme, proposal=model.proposal
    )
    groups = [Group(dataclasses.replace(params, group=i), potential, [0]) for i in range(runs)]
    for table in logits:
        for cohort in arrange(groups):
            wants = cohort.wants()
            finish(cohort.take(table[wants.tokens], None))
    return [group.population() for group in groups], log_z


def lee_whiteley(population: Population) -> float:
    """Computes √(1 − (N/(N−1))^e (1 − Σ_j S_j²)), with e = m + 1 of multinomial resampling and 1 of others; or NaN."""
    n = population.n_particles
    shares = np.bincount(population.roots, population.weights, n)
    exponent = 1 + int(population.resampled.sum()) if population.params.resampling == "multinomial" else 1
    variance = 1 - (n / (n - 1)) ** exponent * (1 - np.square(shares).sum())
    return math.sqrt(variance) if variance > 0 else math.nan


def judge(errors: np.ndarray, stderrs: np.ndarray, sd: float) -> dict[str, float]:
    """Says how standard errors (R,), some of them NaN, do for errors of log Ẑ (R,)."""
    known = np.isfinite(stderrs)
    return {
        "finite": float(known.mean()),
        "coverage": float((np.abs(errors[known]) <= 2 * stderrs[known]).mean()) if known.any() else math.nan,
        "ratio": float(np.median(stderrs[known]) / sd) if known.any() else math.nan,
    }


def simulate(model: Model, scheme: str, threshold: float, runs: int = RUNS, n: int = PARTICLES) -> dict[str, Any]:
    """Runs a model and judges both figures."""
    populations, log_z = sample(model, scheme, threshold, runs, n)
    errors = np.array([population.log_z for population in populations]) - log_z
    ratios = np.exp(errors)
    sd = float(ratios.std(ddof=1))
    return {
        "relative_sd": sd,
        "z_over_z": float(ratios.mean()),
        "z_over_z_se": sd / math.sqrt(runs),
        "final_ess": float(np.median([population.final_ess for population in populations])),
        "roots": float(np.median([population.n_roots for population in populations])),
        "resamplings": float(np.mean([population.resampled.sum() for population in populations])),
        "gains": judge(errors, np.array([population.log_z_stderr for population in populations]), sd),
        "lee_whiteley": judge(errors, np.array([lee_whiteley(population) for population in populations]), sd),
    }


def run(json_path: str | None = None) -> list[dict[str, Any]]:
    """Measures every model, scheme and threshold; writes and returns the records."""
    records = []
    for model in MODELS:
        for threshold in THRESHOLDS:
            for scheme in RESAMPLING_SCHEMES:
                found = simulate(model, scheme, threshold, RUNS, PARTICLES)
                where = {"model": model.name, "heavy": model.heavy, "threshold": threshold, "scheme": scheme}
                records.append({**where, **found})
                figures = "  ".join(
                    f"{name} " + " ".join(f"{key} {value:.3f}" for key, value in found[name].items())
                    for name in ("gains", "lee_whiteley")
                )
                print(*where.values(), f"sd {found['relative_sd']:.3f}", figures, flush=True)
    if json_path:
        write_result(json_path, {"bench": "stderr", "runs": RUNS, "n_particles": PARTICLES, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    run(parser.parse_args().json)


if __name__ == "__main__":
    main()
