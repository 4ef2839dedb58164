"""The published way to a counterfactual token: Gumbel noise in hindsight, then argmax.

Source: Ravfogel et al. 2024, arXiv 2411.07180. An implementation of our own, in NumPy and float64 as theirs, a row at
a time; unlike theirs stable for any logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hindsight(factual: Array, token: int, rng: np.random.Generator, n: int = 1) -> Array:
    """Makes (n, V) noise u such that `token` is the argmax of factual + u, as the noise that gave it was distributed.

    The maximum is a Gumbel variable; the others are Gumbel variables truncated below it. What is known to be impossible
    says nothing about its noise.
    """
    top = factual.max()
    log_p = factual - (top + np.log(np.exp(factual - top).sum()))
    noise = rng.gumbel(size=(n, len(factual)))
    most = rng.gumbel(size=(n, 1))
    possible = np.isfinite(log_p)
    known = log_p[possible]
    noise[:, possible] = -np.logaddexp(-(noise[:, possible] + known), -most) - known
    noise[:, token] = most[:, 0] - log_p[token]
    return noise


def redraw(logits: Array, factual: Array, token: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Draws one token per row of logits (N, V), each with noise of its own."""
    return np.array([(row + hindsight(factual, token, rng)[0]).argmax() for row in logits])
