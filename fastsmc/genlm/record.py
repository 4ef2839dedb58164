"""The record of a run that genlm-control's `InferenceVisualizer` shows, from a population's genealogy.

JSON: a list with an entry per step, {"step": from 1, "mode": "init", "smc_step" or "resample", "ancestors": of a
resampling, rows of the step before, "particles": N of {"contents_incr", "logweight", "weight_incr"}}. A step that
follows a resampling is one entry with it. Contents are what a row has got in that step; weights are strings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from genlm.control.constant import EOS
from genlm.control.util import escape

from fastsmc.population import Population


def make_record(
    population: Population,
    tokens: Sequence[Any],
    stops: set[int],
    ends: Callable[[list], bool] | None,
    twisted: bool,
) -> list[dict[str, Any]]:
    """Makes the record.

    Args:
        population: of the run.
        tokens: genlm's, by token id.
        stops: token ids that are EOS.
        ends: the program's `terminate_when`; a text that it ends has its EOS in the same step.
        twisted: whether a step weighs and resamples before it draws. Weights of an entry are then those that the draw
            began with, all equal behind a resampling, and in the last entry the final ones.
    """
    n, record = population.n_particles, list[dict[str, Any]]()
    contexts: list[list] = [[] for _ in range(n)]  # of the rows of the step before
    last = np.zeros(n)
    for t in range(population.T):
        rows, resampled = population.ancestors[t], bool(population.resampled[t])
        weights = population.step_log_weights[t]
        if twisted and resampled:
            weights = np.full(n, np.logaddexp.reduce(weights) - math.log(n))
        if t == population.T - 1:
            weights = population.log_weights
        contexts, last = [list(contexts[row]) for row in rows], last[rows]
        particles = []
        for context, token, weight, before in zip(
            contexts, population.tokens[t].tolist(), weights.tolist(), last.tolist(), strict=True
        ):
            new = [EOS] if token in stops else [tokens[token]] if 0 <= token < len(tokens) else []
            context += new
            if ends is not None and new and token not in stops and ends(list(context)):
                new = [*new, EOS]
            particles.append(
                {
                    "contents_incr": "|".join(map(escape, new)),
                    "logweight": "-Infinity" if weight == -math.inf else str(weight),
                    "weight_incr": str(weight - before),
                }
            )
        mode = "init" if t == 0 else "resample" if resampled else "smc_step"
        ancestors = {"ancestors": rows.tolist()} if mode == "resample" else {}
        record.append({"mode": mode, "step": t + 1, **ancestors, "particles": particles})
        last = weights
    return record
