"""How good a sampler is: bounds on log Z, divergences, effective sample sizes, and plain sampling at equal cost.

`llm` is `fastsmc.LLM` or `fastsmc.hf.HFEngine`; `exact` are exact samples of the target σ = p0·φ/Z as lists of token
ids (`rejection` makes some where φ <= 1). Everything random is keyed by `params.seed` and
`params.group`; run r of a function takes group + r, the next kind of run the groups after that.

    log_z_bounds    E[log Ẑ] <= log Z <= E[log Ẑ*], by ordinary and by conditional SMC
    kl              KL(q‖σ) and KL(σ‖q) of the proposal q that `params` and `potential` make
    baselines       rejection and best-of-n with the tokens that SMC would have used
    particle_gibbs  a Markov chain of sequences that leaves σ invariant, by conditional SMC
    report          all of it, as JSON values; `table` and `plot` show a report

Sources: Grosse et al. 2015 (arXiv 1511.02543), Zhao et al. 2024 (arXiv 2404.17546), Bennett 1976, Andrieu, Doucet &
Holenstein 2010 (particle Gibbs), Gelman et al. 2013 and Geyer 1992 (autocorrelation over chains).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from fastsmc import plots
from fastsmc.arguments import read_samples
from fastsmc.params import SMCParams
from fastsmc.plots import Z95
from fastsmc.population import Population, draw_indices
from fastsmc.potentials import Potential
from fastsmc.values import check_int, json_safe


def _check_proposal(params: SMCParams) -> None:
    if params.proposal == "rejection":
        raise ValueError("params.proposal='rejection': its q has no density that is known; use 'twisted' or 'base'")
    if params.islands > 1:
        raise ValueError(f"params.islands={params.islands}: must be 1, since exact samples are retained in other runs")


def _check(exact: Any, runs: int, params: SMCParams) -> list[list[int]]:
    check_int("runs", runs, 1)
    _check_proposal(params)
    return read_samples("exact", exact)


def _run(
    llm: Any, prompt: Any, params: SMCParams, potential: Potential | None, twist: Any, runs: int, first: int, exact=None
) -> list[Population]:
    """Runs `runs` groups of one prompt, numbered from params.group + first."""
    params = dataclasses.replace(params, group=params.group + first)
    return llm.smc([prompt] * runs, params, potential, twist=twist, exact=exact)


def _mean(values: np.ndarray, clusters: np.ndarray | None = None) -> tuple[float, float]:
    """Gives mean and standard error, NaN for a single value; the values of a cluster count as one observation."""
    mean = float(np.mean(values))
    if not math.isfinite(mean) or len(values) == 1:
        return mean, math.nan
    if clusters is not None:
        n = len(set(clusters.tolist()))
        if n == 1:
            return mean, math.nan
        sums = np.bincount(clusters, values - mean, minlength=n)
        return mean, float(np.sqrt(np.square(sums).sum() * n / (n - 1)) / len(values))
    return mean, float(np.std(values, ddof=1) / math.sqrt(len(values)))


# -- bounds ------------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(eq=False, repr=False)
class LogZBounds:
    """Holds two-sided bounds on log Z.

    Attributes:
        lower: (R,) float64, log Ẑ of ordinary runs; their mean is at most log Z, and exp(lower) is unbiased for Z.
        upper: (R,) float64, log Ẑ* of conditional runs; their mean is at least log Z, and exp(-upper) is unbiased for
            1/Z.
        sample: (R,) int64, which exact sample each conditional run kept.
        ess: (R, T) float64, effective sample sizes of the ordinary runs; those that ended early stay as they ended.
        n_particles: N.
    """

    lower: np.ndarray
    upper: np.ndarray
    sample: np.ndarray
    ess: np.ndarray
    n_particles: int

    @property
    def lower_mean(self) -> float:
        return _mean(self.lower)[0]

    @property
    def lower_se(self) -> float:
        return _mean(self.lower)[1]

    @property
    def upper_mean(self) -> float:
        return _mean(self.upper)[0]

    @property
    def upper_se(self) -> float:
        """Counts runs that kept the same exact sample as one observation; NaN with a single sample."""
        return _mean(self.upper, self.sample)[1]

    @property
    def gap(self) -> float:
        """Subtracts the lower bound from the upper; on average at least the symmetrised KL divergence of one sample."""
        return self.upper_mean - self.lower_mean

    @property
    def gap_se(self) -> float:
        return math.hypot(self.lower_se, self.upper_se)

    def interval(self) -> tuple[float, float]:
        """Gives the interval from 1.96 standard errors below the lower bound to 1.96 above the upper."""
        return self.lower_mean - Z95 * self.lower_se, self.upper_mean + Z95 * self.upper_se

    def log_z(self) -> tuple[float, float]:
        """Estimates log Z and its standard error from both sides; see `bridge`."""
        return bridge(self.lower, self.upper)

    def to_dict(self) -> dict[str, Any]:
        """Gives plain JSON values; a number that JSON lacks is None."""
        log_z, se = self.log_z()
        numbers = {
            "lower": self.lower_mean,
            "lower_se": self.lower_se,
            "upper": self.upper_mean,
            "upper_se": self.upper_se,
            "gap": self.gap,
            "gap_se": self.gap_se,
            "log_z": log_z,
            "log_z_se": se,
        }
        return {
            "n_particles": self.n_particles,
            "runs": len(self.lower),
            **json_safe(numbers),
            "lower_runs": json_safe(self.lower),
            "upper_runs": json_safe(self.upper),
        }

    def __repr__(self) -> str:
        return (
            f"LogZBounds(N={self.n_particles}, R={len(self.lower)}, lower={self.lower_mean:.4f}±{self.lower_se:.4f}, "
            f"upper={self.upper_mean:.4f}±{self.upper_se:.4f})"
        )


def log_z_bounds(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential | None,
    *,
    exact: Sequence[Sequence[int]],
    runs: int = 16,
    twist: str | os.PathLike | None = None,
) -> LogZBounds:
    """Bounds log Z by `runs` ordinary and `runs` conditional runs; conditional run r keeps exact[r % len(exact)].

    Conditional runs resample multinomially whatever `params.resampling` says (see `fastsmc.smc.group`), so their bound
    is right, but looser than that of systematic resampling would be.

    Raises:
        ValueError: no exact samples, no runs, or the rejection proposal.
        SMCError: a run failed; also if an exact sample has weight zero.
    """
    exact = _check(exact, runs, params)
    ordinary = _run(llm, prompt, params, potential, twist, runs, 0)
    sample = np.arange(runs) % len(exact)
    kept = _run(llm, prompt, params, potential, twist, runs, runs, [[exact[i]] for i in sample])
    return LogZBounds(
        np.array([p.log_z for p in ordinary]),
        np.array([p.log_z for p in kept]),
        sample,
        _ess_curves(ordinary),
        params.n_particles,
    )


def _ess_curves(populations: Sequence[Population]) -> np.ndarray:
    longest = max(p.T for p in populations)
    return np.stack([np.append(p.ess, np.full(longest - p.T, p.ess[-1])) for p in populations])


def bridge(lower: np.ndarray, upper: np.ndarray) -> tuple[float, float]:
    """Estimates log Z and its standard error from log weights under the proposal and under the target.

    `lower` are log(σ̃/q) of draws from q, `upper` of draws from σ; SMC's log Ẑ and log Ẑ* are such weights on the space
    of all particles. Bennett's acceptance ratio, the estimator of least variance from both: the c at which
    n₀ E_q[f(w − c')] = n₁ E_σ[f(c' − w)] with f the logistic function and c' = c − log(n₁/n₀). NaN if no draw from q
    has any weight.
    """
    lower, upper = np.asarray(lower, float), np.asarray(upper, float)
    if not np.isfinite(lower).any():
        return math.nan, math.nan
    shift = math.log(len(upper) / len(lower))

    def parts(c: float) -> tuple[np.ndarray, np.ndarray]:
        with np.errstate(over="ignore"):
            # the share of σ in the mixture at a draw of q, and of q at a draw of σ
            return 1 / (1 + np.exp(c - shift - lower)), 1 / (1 + np.exp(upper - c + shift))

    finite = np.concatenate([lower[np.isfinite(lower)], upper])
    low, high = finite.min() - 50.0, finite.max() + 50.0
    for _ in range(200):
        c = (low + high) / 2
        of_q, of_target = parts(c)
        low, high = (c, high) if of_q.sum() > of_target.sum() else (low, c)
    of_q, of_target = parts(c)
    relative = sum(np.mean(f**2) / np.mean(f) ** 2 / len(f) - 1 / len(f) for f in (of_q, of_target))
    return float(c), float(math.sqrt(max(relative, 0.0)))


# -- divergences -------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class KL:
    """Holds divergences in nats between the proposal q and the target σ, with standard errors.

    Attributes:
        q_sigma, q_sigma_se: KL(q‖σ) = log Z − E_q[log p0 φ / q]; infinite if a draw of q has φ = 0.
        sigma_q, sigma_q_se: KL(σ‖q) = E_σ[log p0 φ / q] − log Z.
        log_z, log_z_se: what log Z was taken to be.
        draws, samples: number of draws from q, and of exact samples.
    """

    q_sigma: float
    q_sigma_se: float
    sigma_q: float
    sigma_q_se: float
    log_z: float
    log_z_se: float
    draws: int
    samples: int


def kl(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential | None,
    *,
    exact: Sequence[Sequence[int]],
    runs: int = 16,
    twist: str | os.PathLike | None = None,
    log_z: float | None = None,
    bounds: LogZBounds | None = None,
) -> KL:
    """Estimates KL(q‖σ) and KL(σ‖q), with q the law of one particle that is never resampled; σ has p0^α for a power α.

    q is the proposal of `params`: p0·ψ normalised token by token, or p0. It is sampled with `runs` groups of
    n_particles; every exact sample is weighed once.

    Args:
        log_z: log Z where it is known; else it comes from `bounds`, and else from `log_z_bounds` with these arguments.

    Raises:
        As `log_z_bounds`.
    """
    exact = _check(exact, runs, params)
    log_z_se = 0.0
    if log_z is None:
        if bounds is None:
            bounds = log_z_bounds(llm, prompt, params, potential, exact=exact, runs=runs, twist=twist)
        log_z, log_z_se = bounds.log_z()
    params = dataclasses.replace(params, ess_threshold=0.0)
    drawn = _run(llm, prompt, params, potential, twist, runs, 2 * runs)
    # a run's particles share strata, so runs are what is independent
    of_q, of_q_se = _mean(np.array([p.log_weights.mean() for p in drawn]))
    weights = weigh(llm, prompt, params, potential, exact, twist)
    of_sigma, of_sigma_se = _mean(weights)
    return KL(
        q_sigma=log_z - of_q,
        q_sigma_se=math.hypot(of_q_se, log_z_se) if math.isfinite(of_q) else math.nan,
        sigma_q=of_sigma - log_z,
        sigma_q_se=math.hypot(of_sigma_se, log_z_se),
        log_z=log_z,
        log_z_se=log_z_se,
        draws=runs * params.n_particles,
        samples=len(exact),
    )


def weigh(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential | None,
    exact: Sequence[Sequence[int]],
    twist: str | os.PathLike | None = None,
) -> np.ndarray:
    """Computes log p0^α φ / q of complete sequences, (K,) float64, with n_particles of them per group."""
    exact = read_samples("exact", exact)
    populations = _weigh(llm, prompt, params, potential, exact, twist)
    return np.concatenate([p.log_weights for p in populations])[: len(exact)]


def _weigh(
    llm: Any, prompt: Any, params: SMCParams, potential: Potential | None, exact: list[list[int]], twist: Any
) -> list[Population]:
    """Runs the groups that weigh complete sequences, the last of them filled up by its first."""
    size = min(params.n_particles, len(exact))
    chunks = [list(exact[i : i + size]) for i in range(0, len(exact), size)]
    fill = size - len(chunks[-1])
    chunks[-1] = chunks[-1] + chunks[-1][:1] * fill
    params = dataclasses.replace(params, n_particles=size, ess_threshold=0.0)
    return _run(llm, prompt, params, potential, twist, len(chunks), 0, chunks)


# -- plain sampling ----------------------------------------------------------------------------------------------------
def baselines(
    llm: Any, prompt: str | Sequence[int], params: SMCParams, potential: Potential | None, runs: int = 4
) -> dict[str, float | None]:
    """Measures what plain sampling makes of as many tokens as SMC has: N particles per run, drawn from p0.

    With a power α of p0 φ stands for p0^(α−1) φ, what the target is beside p0.

    Returns:
        acceptance: E[φ] / max(1, largest φ seen): the share of draws that rejection sampling keeps (exact for φ <= 1).
        accepted_per_run: how many of N that is.
        log_phi_best_of_n: mean over runs of the largest log φ of N draws; log_prob_best_of_n: their log p0.
        log_phi_base: mean log φ of a draw; None if it is −inf.
    """
    populations = _run(llm, prompt, _plain(params), potential, None, runs, 4 * runs)
    log_phi = np.stack([_log_beside_p0(p, params.power) for p in populations])
    log_p = np.stack([p.log_probs for p in populations])
    best = log_phi.argmax(axis=1)
    rows = np.arange(runs)
    top = max(0.0, float(log_phi.max()))
    acceptance = float(np.exp(log_phi - top).mean())
    mean = float(log_phi.mean())
    return {
        "acceptance": acceptance,
        "accepted_per_run": acceptance * params.n_particles,
        "log_phi_best_of_n": json_safe(log_phi[rows, best].mean()),
        "log_prob_best_of_n": json_safe(log_p[rows, best].mean()),
        "log_phi_base": json_safe(mean),
    }


def _plain(params: SMCParams) -> SMCParams:
    """Gives the parameters of draws from p0."""
    return dataclasses.replace(params, ess_threshold=0.0, proposal="base", power=1.0, power_ramp=None)


def _log_beside_p0(population: Population, power: float) -> np.ndarray:
    """Computes what the target p0^α φ is beside p0, (N,) log, of a population of `_plain`."""
    return population.log_weights + (power - 1.0) * population.log_probs


def rejection(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential,
    count: int,
    *,
    max_draws: int = 1 << 20,
) -> list[list[int]]:
    """Makes `count` exact samples of p0·φ/Z where φ <= 1, by keeping each draw from p0 with chance φ.

    With a power α >= 1 the target is p0^α·φ, and each draw is kept with chance p0^(α−1) φ.

    Raises:
        ValueError: the power is below 1, a draw has φ > 1, or fewer than `count` of `max_draws` draws were kept; it
            says how many.
    """
    if params.power < 1.0:
        raise ValueError(f"power={params.power:g}: must be at least 1 for rejection, whose chances would exceed 1")
    free = _plain(params)
    rng = np.random.default_rng([params.seed, params.group])
    kept: list[list[int]] = []
    for first in range(-(-max_draws // params.n_particles)):
        population = _run(llm, prompt, free, potential, None, 1, first)[0]
        kept += accept(population, rng, params.power)
        if len(kept) >= count:
            return kept[:count]
    raise ValueError(f"rejection: {len(kept)} of {max_draws} draws were kept, {count} are wanted; φ is too small")


def accept(population: Population, rng: np.random.Generator, power: float = 1.0) -> list[list[int]]:
    """Keeps draws from p0, whose weights are their log φ, each with chance p0^(power − 1) φ.

    They come in random order: siblings draw in strata, so the first few in the order of particles would be no samples.

    Raises:
        ValueError: a φ is above 1.
    """
    log_phi = population.log_weights
    if (log_phi > 1e-6).any():
        raise ValueError(f"rejection: a draw has log φ = {log_phi.max():.4g}; φ must be at most 1")
    hits = np.flatnonzero(np.log(rng.random(len(log_phi))) < _log_beside_p0(population, power))
    return [population.token_ids[i] for i in rng.permutation(hits)]


# -- particle Gibbs ---------------------------------------------------------------------------------------------------
@dataclasses.dataclass(eq=False, repr=False)
class ParticleGibbs:
    """Holds C chains of S sweeps, each after the state that it began with.

    Attributes:
        token_ids: C lists of S + 1 states, each a list of token ids; the first is the initial one.
        texts: as token_ids, what each adds to the prompt's text; None without a tokenizer.
        log_probs: (C, S + 1) float64, log p0 of each state.
        log_phi: (C, S + 1) float64, log φ of each state.
        log_z: (C, S) float64, log Ẑ* of each sweep's conditional run; in equilibrium E[1/Ẑ*] = 1/Z.
        moved: (C, S) bool, whether a sweep ended in another sequence than it began with.
        initial: says in a sentence how the first states came about.
        n_particles: N.
        power: α of the target p0^α·φ.
    """

    token_ids: list[list[list[int]]]
    texts: list[list[str]] | None
    log_probs: np.ndarray
    log_phi: np.ndarray
    log_z: np.ndarray
    moved: np.ndarray
    initial: str
    n_particles: int
    power: float = 1.0

    @property
    def log_target(self) -> np.ndarray:
        """Adds log φ to α log p0: (C, S + 1) float64, log σ up to log Z."""
        return self.power * self.log_probs + self.log_phi

    @property
    def acceptance(self) -> float:
        """Gives the share of sweeps that ended in another sequence."""
        return float(self.moved.mean())

    @property
    def acceptance_by_position(self) -> np.ndarray:
        """Gives for each position the share of sweeps that changed its token, or whether it has any: (T,) float64.

        T is the length of the longest state. A retained sequence's first tokens change least: most of the final
        particles descend from it there.
        """
        longest = max(len(ids) for chain in self.token_ids for ids in chain)
        padded = np.array([[[*ids, *[-1] * (longest - len(ids))] for ids in chain] for chain in self.token_ids])
        return (padded[:, 1:] != padded[:, :-1]).mean(axis=(0, 1))

    def autocorrelation(self, burn_in: int = 0) -> np.ndarray:
        """Estimates the autocorrelation of log p0·φ over all chains, (S − burn_in,) float64 by lag in sweeps.

        Chains that have not mixed show as correlation, since the variance is that within and between them. NaN where
        log p0·φ never changes.

        Args:
            burn_in: so many sweeps, and the initial states, are left out; at most S − 2.
        """
        if (sweeps := self.moved.shape[1]) < 2:
            raise ValueError(f"autocorrelation: needs at least 2 sweeps, there are {sweeps}")
        burn_in = check_int("burn_in", burn_in, 0, sweeps - 2)
        values = self.log_target[:, 1 + burn_in :]
        n = values.shape[1]
        centred = values - values.mean(axis=1, keepdims=True)
        lagged = np.array([(centred[:, : n - lag] * centred[:, lag:]).sum(axis=1).mean() / n for lag in range(n)])
        within = lagged[0] * n / (n - 1)
        between = float(np.var(values.mean(axis=1), ddof=1)) if len(values) > 1 else 0.0
        total = lagged[0] + between
        return 1 - (within - lagged) / total if total > 0 else np.full(n, math.nan)

    def effective_samples(self, burn_in: int = 0) -> float:
        """Estimates how many independent draws say as much about the mean of log p0·φ: at most C·(S − burn_in).

        The sum over lags ends by Geyer's initial monotone sequence. NaN where log p0·φ never changes.
        """
        rho = self.autocorrelation(burn_in)
        if math.isnan(rho[0]):
            return math.nan
        rho[0] = 1.0
        pairs = rho[: len(rho) // 2 * 2].reshape(-1, 2).sum(axis=1)
        kept = np.minimum.accumulate(pairs[: int((pairs <= 0).argmax()) if (pairs <= 0).any() else len(pairs)])
        return len(self.moved) * len(rho) / max(2 * float(kept.sum()) - 1, 1.0)

    def __repr__(self) -> str:
        chains, sweeps = self.moved.shape
        return f"ParticleGibbs(C={chains}, S={sweeps}, N={self.n_particles}, acceptance={self.acceptance:.3f})"


def particle_gibbs(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential | None,
    *,
    sweeps: int,
    initial: Sequence[Sequence[int]] | None = None,
    chains: int = 1,
    twist: str | os.PathLike | None = None,
) -> ParticleGibbs:
    """Runs Markov chains of sequences that leave σ invariant: a sweep is a conditional run that retains the state, and
    one draw by its final weights is the next.

    The runs of a sweep share their passes. Ancestors are not redrawn, so that with few particles and long sequences
    first tokens seldom change (`acceptance_by_position`): more particles, or a better twist, help.

    Args:
        sweeps: S, at least 1.
        initial: complete sequences of token ids that φ allows, one for all chains or one per chain. None: each chain
            begins with one draw by weight of an ordinary run, which is no draw from σ: the first sweeps are burn-in.
        chains: C, at least 1; independent.

    Raises:
        ValueError: an argument that cannot be; n_particles below 2, with which no state changes; a potential that is
            proposal-only, since log φ is asked by the base proposal; a chain's ordinary run has no weight.
        SMCError: a run failed; also if an initial sequence has weight zero, or is not complete.
    """
    _check_proposal(params)
    sweeps, chains = check_int("sweeps", sweeps, 1), check_int("chains", chains, 1)
    check_int("n_particles", params.n_particles, 2)
    if potential is None and twist is not None:
        from fastsmc.twists import card_potential

        potential = card_potential(twist)
    if potential is not None and potential.proposal_only:
        raise ValueError(f"potential={type(potential).__name__}: is proposal-only, so its φ cannot be told from its ψ")
    rng, how = np.random.default_rng([params.seed, params.group]), "given"
    if initial is None:
        how = f"drawn by weight from an ordinary run of {params.n_particles} particles: needs burn-in"
        runs = _run(llm, prompt, params, potential, twist, chains, 0)
        if any(population.degenerate for population in runs):
            raise ValueError("initial=None: an ordinary run has no weight left to draw from; give initial sequences")
        states = [_draw_state(population, rng) for population in runs]
    else:
        states = read_samples("initial", initial)
        if len(states) not in (1, chains):
            raise ValueError(f"initial: {len(states)} sequences for {chains} chains; give one, or one per chain")
        states = states * (chains // len(states))
    token_ids, log_z = [[state] for state in states], np.empty((chains, sweeps))
    for sweep in range(sweeps):
        retained = [[chain[-1]] for chain in token_ids]
        runs = _run(llm, prompt, params, potential, twist, chains, (sweep + 1) * chains, retained)
        log_z[:, sweep] = [population.log_z for population in runs]
        for chain, population in zip(token_ids, runs, strict=True):
            chain.append(_draw_state(population, rng))
    known = _look_up(llm, prompt, params, potential, token_ids)
    columns = [[known[tuple(ids)] for ids in chain] for chain in token_ids]
    return ParticleGibbs(
        token_ids=token_ids,
        texts=None if runs[0].texts is None else [[text for *_, text in chain] for chain in columns],
        log_probs=np.array([[log_prob for log_prob, *_ in chain] for chain in columns]),
        log_phi=np.array([[log_phi for _, log_phi, _ in chain] for chain in columns]),
        log_z=log_z,
        moved=np.array([[a != b for a, b in itertools.pairwise(chain)] for chain in token_ids]),
        initial=how,
        n_particles=params.n_particles,
        power=params.power,
    )


def _draw_state(population: Population, rng: np.random.Generator) -> list[int]:
    return population.token_ids[int(draw_indices(population.weights, rng.random(1))[0])]


def _look_up(
    llm: Any, prompt: Any, params: SMCParams, potential: Potential | None, token_ids: list[list[list[int]]]
) -> dict[tuple[int, ...], tuple[float, float, str]]:
    """Finds log p0, log φ and text of each state; under the base proposal, unforced, a weight is φ."""
    plain = dataclasses.replace(_plain(params), force_stop=False)
    distinct = [list(ids) for ids in dict.fromkeys(tuple(ids) for chain in token_ids for ids in chain)]
    found = {}
    for population in _weigh(llm, prompt, plain, potential, distinct, None):
        for i, ids in enumerate(population.token_ids):
            text = "" if population.texts is None else population.texts[i]
            found[tuple(ids)] = float(population.log_probs[i]), float(population.log_weights[i]), text
    return found


# -- the whole ---------------------------------------------------------------------------------------------------------
def report(
    llm: Any,
    prompt: str | Sequence[int],
    params: SMCParams,
    potential: Potential,
    *,
    exact: Sequence[Sequence[int]],
    runs: int = 16,
    twist: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Evaluates one sampler beside the base proposal and plain sampling, in plain JSON values.

    `samplers` has an entry for the sampler asked about and one for `base` (draws from p0), each with bounds,
    divergences and the mean ESS curve.
    """
    _check_proposal(params)
    ways: dict[str, tuple[SMCParams, str | os.PathLike | None]] = {
        "base": (dataclasses.replace(params, proposal="base"), None)
    }
    if params.proposal == "twisted":
        ways["twisted"] = (params, twist)
    samplers = {}
    for name, (sampler, guide) in ways.items():
        bounds = log_z_bounds(llm, prompt, sampler, potential, exact=exact, runs=runs, twist=guide)
        divergence = kl(llm, prompt, sampler, potential, exact=exact, runs=runs, twist=guide, bounds=bounds)
        samplers[name] = {
            "bounds": bounds.to_dict(),
            "kl": json_safe(dataclasses.asdict(divergence)),
            "ess": bounds.ess.mean(axis=0).tolist(),
        }
    return {
        "params": dataclasses.asdict(params),
        "exact_samples": len(exact),
        "runs": runs,
        "samplers": samplers,
        "baselines": baselines(llm, prompt, params, potential),
    }


def table(result: dict[str, Any]) -> str:
    """Sets a report as lines of text."""

    def cell(value: float | None, se: float | None = None) -> str:
        if value is None:
            return "–"
        return f"{value:.3f}" + (f" ± {Z95 * se:.3f}" if se is not None else "")

    lines = [f"{'':<10}{'log Z from below':>20}{'from above':>20}{'gap':>10}{'KL(q‖σ)':>18}{'KL(σ‖q)':>18}"]
    for name, sampler in result["samplers"].items():
        b, d = sampler["bounds"], sampler["kl"]
        lines.append(
            f"{name:<10}{cell(b['lower'], b['lower_se']):>20}{cell(b['upper'], b['upper_se']):>20}"
            f"{cell(b['gap']):>10}{cell(d['q_sigma'], d['q_sigma_se']):>18}{cell(d['sigma_q'], d['sigma_q_se']):>18}"
        )
    plain, n = result["baselines"], result["params"]["n_particles"]
    lines.append("")
    lines.append(
        f"rejection keeps {plain['acceptance']:.3%} of draws, {plain['accepted_per_run']:.2f} of {n}; the best of {n} "
        f"draws has log φ {cell(plain['log_phi_best_of_n'])}"
    )
    lines.append(f"N = {n}, {result['runs']} runs, {result['exact_samples']} exact samples; ± is 95 %, in nats")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: str | os.PathLike | None = None) -> Any:
    """Draws the samplers' bounds beside their ESS curves: a matplotlib Figure, written to `path` if given."""
    return plots.report(result, path)
