"""Populations of independent runs, islands, as one population (`Population.pool`). NumPy only.

    islands  →  rows side by side, shorter ones padded at their end  →  one population, its weights on one scale

The log weights of an island have Ẑ_k for their mean, so those of all islands, laid side by side, have the mean
Σ N_k Ẑ_k / Σ N_k for theirs, which is unbiased whatever the N_k are (docs/mathematics.md §9).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmc.genealogy import RETAINED
from fastsmc.params import SMCParams

if TYPE_CHECKING:
    from fastsmc.population import Population

#: from so many islands on their spread gives the standard error; it rests on nothing but their independence
SPREAD_FROM = 8
#: what islands of one target may differ in
_FREE = ("n_particles", "seed", "group")


def pool(parts: Sequence[Population]) -> dict[str, Any]:
    """Gives the fields of the population that islands are together; what `Population.pool` says."""
    _check(parts)
    steps, sizes = max(part.T for part in parts), [part.n_particles for part in parts]
    rows = [0, *itertools.accumulate(sizes)]
    islands = [0, *itertools.accumulate(part.n_islands for part in parts)]

    def beside(name: str, columns: Sequence[int], after: Callable[[Population], Any]) -> np.ndarray:
        """Lays what populations have per step side by side, (T, …); `after` is what a shorter one has at its end."""
        out: np.ndarray = np.empty((steps, columns[-1]), parts[0].ARRAYS[name][0])
        for part, begin, end in zip(parts, columns, columns[1:], strict=False):
            out[: part.T, begin:end] = getattr(part, name)
            out[part.T :, begin:end] = after(part)
        return out

    log_weights = np.concatenate([part.log_weights for part in parts])
    island = np.concatenate([part.island + first for part, first in zip(parts, islands, strict=False)])
    step_log_weights = beside("step_log_weights", rows, lambda part: part.log_weights)
    island_resampled = beside("island_resampled", islands, lambda _: False)
    ancestors = beside("ancestors", rows, lambda part: np.arange(part.n_particles))
    ancestors += np.repeat(np.array(rows[:-1], np.int32), sizes)
    token_log_probs = np.zeros((rows[-1], steps))
    for part, begin, end in zip(parts, rows, rows[1:], strict=False):
        token_log_probs[begin:end, : part.T] = part.token_log_probs
    log_z = _log_mean(log_weights)
    run = island // parts[0].params.islands  # within one they migrate
    stderr, reason = _stderr(parts, log_weights, run, log_z)
    return {
        "token_ids": [ids for part in parts for ids in part.token_ids],
        "log_weights": log_weights,
        "log_z": log_z,
        "log_z_stderr": stderr,
        "log_z_stderr_reason": reason,
        "log_probs": np.concatenate([part.log_probs for part in parts]),
        "token_log_probs": token_log_probs,
        "ess": np.array([_ess(row) for row in step_log_weights]),
        "resampled": island_resampled.any(axis=1),
        "ancestors": ancestors,
        "tokens": beside("tokens", rows, lambda _: -1),
        "step_log_weights": step_log_weights,
        "prompt_token_ids": parts[0].prompt_token_ids,
        "params": dataclasses.replace(parts[0].params, n_particles=len(log_weights)),
        "finish_reasons": _joined([part.finish_reasons for part in parts]),
        "texts": _joined([part.texts for part in parts]),
        "questions": _added([part.questions for part in parts]),
        "island": island,
        "lost_islands": sum(part.lost_islands for part in parts),
        "island_resampled": island_resampled,
        "segments": _beside([part.segments for part in parts]),
        "boundaries": None if (all_of := _beside([part.boundaries for part in parts])) is None else np.unique(all_of),
    }


def _beside(arrays: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Lays vectors one behind the other; None: one is not there."""
    found = [array for array in arrays if array is not None]
    return np.concatenate(found) if len(found) == len(arrays) else None


def _check(parts: Sequence[Population]) -> None:
    """Refuses what is no pool. ValueError: says what differs, and between which populations."""
    if not parts:
        raise ValueError("populations=[]: must hold at least one population")
    keys: dict[tuple[int, int], int] = {}
    for i, part in enumerate(parts):
        if part.prompt_token_ids != parts[0].prompt_token_ids:
            raise ValueError(f"populations[{i}]: has another prompt than populations[0], so another target")
        for field in dataclasses.fields(SMCParams):
            its, other = (getattr(p.params, field.name) for p in (part, parts[0]))
            if field.name not in _FREE and its != other:
                raise ValueError(f"populations[{i}]: has {field.name}={its!r}, populations[0] {other!r}; must be alike")
        first = keys.setdefault((part.params.seed, part.params.group), i)
        if first != i:
            raise ValueError(f"populations[{i}]: has seed and group of populations[{first}]; runs must be independent")


def _stderr(
    parts: Sequence[Population], log_weights: np.ndarray, run: np.ndarray, log_z: float
) -> tuple[float, str | None]:
    """Gives the standard error of a pool's log Ẑ, or NaN and why not; run (N,) says whose each particle is."""
    if log_z == -math.inf:
        return math.nan, "all weights are zero"
    if any(part.log_z_stderr_reason == RETAINED for part in parts):
        return math.nan, RETAINED
    sizes, n = np.bincount(run), len(run)
    if all(part.log_z_stderr == 0.0 for part in parts):
        return 0.0, None
    if len(sizes) >= SPREAD_FROM:
        means = np.bincount(run, np.exp(log_weights - log_weights.max())) / sizes  # Ẑ_k, but for a factor
        ratios = means / (sizes @ means / n)
        variance = float(sizes @ np.square(ratios - 1.0)) / ((len(sizes) - 1) * n)
        return (math.sqrt(variance), None) if variance > 0.0 else (math.nan, "all islands have the same Ẑ")
    missing = [f"island {i}: {part.log_z_stderr_reason}" for i, part in enumerate(parts) if part.log_z_stderr_reason]
    if missing:
        return math.nan, f"{'; '.join(missing)}; from {SPREAD_FROM} islands on their spread gives it"
    terms = [part.n_particles / n * math.exp(part.log_z - log_z) * part.log_z_stderr for part in parts]
    return math.sqrt(sum(term * term for term in terms)), None


def _log_mean(log_weights: np.ndarray) -> float:
    top = log_weights.max()
    return float(top if top == -math.inf else top + math.log(np.exp(log_weights - top).mean()))


def _ess(log_weights: np.ndarray) -> float:
    top = log_weights.max()
    if top == -math.inf:
        return 0.0
    weights = np.exp(log_weights - top)
    return float(weights.sum() ** 2 / (weights @ weights))


def _added(counts: Sequence[dict[str, int] | None]) -> dict[str, int] | None:
    """Adds up what conditions were asked, of the islands that have any."""
    known = [each for each in counts if each is not None]
    return {name: sum(each[name] for each in known) for name in known[0]} if known else None


def _joined(lists: Sequence[list[str] | None]) -> list[str] | None:
    """Joins lists, of which each may be missing: then there is none."""
    known = [each for each in lists if each is not None]
    return list(itertools.chain(*known)) if len(known) == len(lists) else None
