"""The error of log Ẑ from the genealogy of the one run that gave it. NumPy only; derived in docs/mathematics.md §9."""

from __future__ import annotations

import math

import numpy as np

#: why a bound has no standard error
RETAINED = "exact samples were retained: log Ẑ is a bound on log Z, not an estimate of it"

#: why islands that migrate have none
MIGRATES = "islands migrate, so they are not independent; pool such runs, whose spread gives it"


def find_roots(ancestors: np.ndarray) -> np.ndarray:
    """Finds the row of the first step that each final particle descends from, (N,) int64, of ancestors (T, N)."""
    roots = np.arange(ancestors.shape[1])
    for rows in ancestors:
        roots = roots[rows]
    return roots


def normalise(log_weights: np.ndarray) -> np.ndarray:
    """Normalises log weights (N,), not all of them −inf: (N,) float64 of sum 1."""
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def relative_variance(
    ancestors: np.ndarray, resampled: np.ndarray, weighed: np.ndarray, kept: np.ndarray, log_weights: np.ndarray
) -> float:
    """Estimates the variance of Ẑ / Z from one run of N >= 2 particles, at least 0.

    V = N/(N − 1) Σ_j g_j², with g_j what root j's descendants gain of the whole weight by weighing, added up over the
    intervals between resamplings: their share at its end less their share at its beginning. What they gain or lose by a
    resampling itself does not count, since it averages out (docs/mathematics.md §9). Without a resampling it is the
    usual variance of the mean of N weights.

    Args:
        ancestors: (T, N), resampled: (T,) bool, as of a `Population`.
        weighed: (T, N) float64; where resampled[t], weighed[t] are the log weights of rows of step t − 1 before it.
        kept: (T,) float64, the power of its weight that a particle's children keep, 1 − 1/τ.
        log_weights: (N,) float64, final ones.
    """
    n = len(log_weights)
    roots, share, gain = np.arange(n), np.full(n, 1.0 / n), np.zeros(n)
    for t in np.flatnonzero(resampled):
        gain += np.bincount(roots, normalise(weighed[t]), n) - share
        roots = roots[ancestors[t]]
        share = np.bincount(roots, normalise(kept[t] * weighed[t][ancestors[t]]), n)
    gain += np.bincount(roots, normalise(log_weights), n) - share
    return float(np.square(gain).sum() * n / (n - 1))


def log_z_stderr(
    ancestors: np.ndarray,
    resampled: np.ndarray,
    weighed: np.ndarray,
    kept: np.ndarray,
    log_weights: np.ndarray,
    *,
    equal_by_law: bool,
    retains: bool,
    migrates: bool = False,
) -> tuple[float, str | None]:
    """Gives the standard error of log Ẑ, √V by the delta method, and None; or NaN, and why there is none.

    Args:
        ancestors, resampled, weighed, kept, log_weights: as of `relative_variance`.
        equal_by_law: no potential, power or forced end makes weights differ: Z is 1 by definition, and where they are
            equal the error is exactly 0.
        retains: exact samples were given, so that log Ẑ is no estimate but a bound.
        migrates: there are islands, which migrate.
    """
    if retains:
        return math.nan, RETAINED
    if np.isneginf(log_weights).all():
        return math.nan, "all weights are zero"
    if equal_by_law and not log_weights.any():
        return 0.0, None
    if migrates:
        return math.nan, MIGRATES
    if len(log_weights) == 1:
        return math.nan, "a single particle shows no spread"
    if len(set(find_roots(ancestors)[log_weights > -math.inf].tolist())) < 2:
        return math.nan, "all particles with weight descend from one root"
    variance = relative_variance(ancestors, resampled, weighed, kept, log_weights)
    if variance <= 0.0:
        return math.nan, "all weights are equal, which says nothing of their spread"
    return math.sqrt(variance), None
