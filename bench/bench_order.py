"""Two orders of the children after a resampling, by what they cost: spread of log Ẑ, and rows that move.

    python bench/bench_order.py --json bench/results/resample_order.json          two minutes, no engine

    in place   a survivor keeps its slot, dead slots take the surplus children (what `ops.resample` gives)
    sorted     particle i repeated counts[i] times, so that relatives lie side by side

Both start from the same counts and are equally unbiased, but systematic and stratified resampling look at the
particles in their order, so the next counts differ (docs/mathematics.md §3). Two models, both with a known Z, each with
many groups at a time:

    drift      x_t = 0.95 x_{t−1} + noise, observed with noise, drawn from the prior: relatives stay alike for long
    chain      a Markov chain of 32 tokens with a twist that knows 60 % of φ: draw from p0·ψ, stratified among siblings
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import numpy as np
import torch
from machine import write_result
from torch import Tensor

from fastsmc import ops
from fastsmc.params import RESAMPLING_SCHEMES

STEPS, STATES, RUNS = 32, 32, 2000
PARTICLES = (64, 256)
THRESHOLDS = (0.5, 1.0)


def in_place(done: ops.Resampled) -> tuple[Tensor, Tensor]:
    return done.ancestors, done.rank


def in_order(done: ops.Resampled) -> tuple[Tensor, Tensor]:
    """The same counts, sorted: (ancestors, index of a slot among the children of its parent)."""
    ends, slots = done.counts.cumsum(1), torch.arange(done.counts.shape[1]).expand_as(done.counts).contiguous()
    ancestors = torch.searchsorted(ends, slots, right=True)
    return ancestors, slots - (ends - done.counts).gather(1, ancestors)


ORDERS: dict[str, Callable[[ops.Resampled], tuple[Tensor, Tensor]]] = {"inplace": in_place, "sorted": in_order}


class Drift:
    """x_t = ρ x_{t−1} + s·noise; weight N(0; x_t, 1). log Z is a Gaussian density."""

    rho, spread = 0.95, 0.5

    def __init__(self) -> None:
        covariance, kept = np.eye(STEPS), 0.0
        for t in range(STEPS):
            kept = self.rho**2 * kept + self.spread**2
            for later in range(t, STEPS):
                covariance[t, later] = covariance[later, t] = kept * self.rho ** (later - t) + (later == t)
        self.log_z = -0.5 * (STEPS * math.log(2 * math.pi) + np.linalg.slogdet(covariance)[1])

    def start(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def step(self, t: int, x: Tensor, resample: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        x = self.rho * x + self.spread * torch.randn(x.shape, dtype=x.dtype)
        ancestors, _ = resample(-0.5 * (x * x + math.log(2 * math.pi)))
        return x.gather(1, ancestors)


class Chain:
    """φ = exp(Σ value[s_t]), ψ_t = exp(0.6 · the same so far): the step's order is weigh, resample, draw."""

    share = 0.6

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        p = (1.5 * torch.randn(STATES, STATES, generator=generator, dtype=torch.float64)).softmax(1)
        value = 0.8 * torch.randn(STATES, generator=generator, dtype=torch.float64)
        ahead = torch.ones(STATES, dtype=torch.float64)
        for _ in range(STEPS):
            ahead = p @ (value.exp() * ahead)
        self.log_z = float(ahead[0].log())
        joint = p * (self.share * value).exp()
        self.log_weight = joint.sum(1).log()
        # row after row, each one higher than the one before: a search among them all
        self.cdf = (joint.cumsum(1) / joint.sum(1, keepdim=True) + torch.arange(STATES)[:, None]).view(-1)
        self.rest = (1.0 - self.share) * value

    def start(self, shape: tuple[int, int]) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    def step(self, t: int, state: Tensor, resample: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        # what the last token's φ has over its ψ is weighed with the next token's normaliser, as at an end
        ancestors, u = resample(self.log_weight[state] + (self.rest[state] if t else 0.0))
        state = state.gather(1, ancestors)
        return (torch.searchsorted(self.cdf, state + u, right=True) - STATES * state).clamp_(max=STATES - 1)

    def last(self, state: Tensor) -> Tensor:
        return self.rest[state]


def simulate(model: Drift | Chain, n: int, scheme: str, threshold: float, order: str) -> dict[str, float]:
    """Runs `RUNS` groups of n particles side by side."""
    torch.manual_seed(n)
    log_w, log_z = torch.zeros(RUNS, n, dtype=torch.float64), torch.zeros(RUNS, dtype=torch.float64)
    moved = resampled = 0
    x = model.start((RUNS, n))

    def resample(increments: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal log_w, log_z, moved, resampled
        done = ops.resample(log_w + increments, torch.rand_like(log_w), scheme=scheme, threshold=threshold)
        went = done.resampled[:, None]
        ancestors, rank = ORDERS[order](done)
        log_z = log_z + torch.where(done.resampled, done.log_mean, 0.0)
        log_w = torch.where(went, 0.0, log_w + increments)
        moved += int((ancestors != torch.arange(n)).sum())
        resampled += int(done.resampled.sum())
        u = torch.rand_like(log_w)
        return ancestors, torch.where(went, ops.stratify(u, rank, done.counts.gather(1, ancestors)), u)

    for t in range(STEPS):
        x = model.step(t, x, resample)
    if isinstance(model, Chain):
        log_w = log_w + model.last(x)
    error = log_z + log_w.logsumexp(1) - math.log(n) - model.log_z
    ratio = error.exp()
    return {
        "variance": float(error.var()),
        "mean_z_over_z": float(ratio.mean()),
        "mean_z_over_z_se": float(ratio.std() / RUNS**0.5),
        "moved_share": moved / (resampled * n),
        "resamplings": resampled / RUNS,
    }


def run(json_path: str | None = None) -> list[dict]:
    """Measures every model, N, scheme and threshold with both orders; writes and returns the records."""
    records = []
    for model in (Drift(), Chain()):
        for n in PARTICLES:
            for threshold in THRESHOLDS:
                for scheme in RESAMPLING_SCHEMES:
                    both = {order: simulate(model, n, scheme, threshold, order) for order in ORDERS}
                    ratio = both["inplace"]["variance"] / both["sorted"]["variance"]
                    where = {"model": type(model).__name__.lower(), "n": n, "threshold": threshold, "scheme": scheme}
                    records.append({**where, **both, "variance_inplace_over_sorted": ratio})
                    print(
                        *where.values(),
                        f"var log Ẑ in place {both['inplace']['variance']:.5f} sorted {both['sorted']['variance']:.5f} "
                        f"ratio {ratio:.3f} ± {2 / RUNS**0.5:.3f}  moved {both['inplace']['moved_share']:.2f} "
                        f"{both['sorted']['moved_share']:.2f}  Ẑ/Z "
                        + " ".join(f"{r['mean_z_over_z']:.4f} ± {r['mean_z_over_z_se']:.4f}" for r in both.values()),
                        flush=True,
                    )
    if json_path:
        write_result(json_path, {"bench": "order", "runs": RUNS, "steps": STEPS, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    run(parser.parse_args().json)


if __name__ == "__main__":
    main()
