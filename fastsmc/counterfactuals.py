"""Counterfactuals: what the noise that gave a text would have made of it under an intervention. NumPy only.

The law of these texts, and of where they leave the text, is in docs/mathematics.md §7.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from typing import Any, ClassVar

import numpy as np

from fastsmc import plots
from fastsmc.population import Population, trace
from fastsmc.values import json_safe


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Counterfactuals(Population):
    """Holds N counterfactuals of a text of S tokens. `log_probs` are those of the intervened model.

    Args:
        factual_ids: the text, S tokens.
        factual_log_probs: (S,) float64, log p of its tokens under the model and the settings that drew it.
        stay: (S,) float64, the probability that token s stays where all before it did. Exact, from no sample.
        token_log_kernels: (N, T) float64, log P(token | the text's, and what the counterfactual has so far); beyond
            the text's end log q, as there is no evidence; 0 after a particle's end.
    """

    FORMAT: ClassVar[str] = "fastsmc.counterfactuals"
    ARRAYS: ClassVar[dict[str, tuple[type, str]]] = Population.ARRAYS | {
        "factual_log_probs": (np.float64, "S"),
        "stay": (np.float64, "S"),
        "token_log_kernels": (np.float64, "NT"),
    }

    factual_ids: list[int]
    factual_log_probs: np.ndarray
    stay: np.ndarray
    token_log_kernels: np.ndarray

    def _sizes(self) -> dict[str, int]:
        return super()._sizes() | {"S": len(self.factual_ids)}

    def _more(self) -> dict[str, Any]:
        return {"factual_ids": list(map(int, self.factual_ids))}

    @classmethod
    def _read_more(cls, meta: dict[str, Any]) -> dict[str, Any]:
        return {"factual_ids": meta["factual_ids"]}

    @classmethod
    def of(cls, population: Population, *, token_log_kernels: np.ndarray, **more: Any) -> Counterfactuals:
        """Adds to a population what is known of the text; token_log_kernels (T, N) as the steps recorded them."""
        kernels = np.zeros(population.ancestors.shape)  # of which the last step may have no draw
        kernels[: len(token_log_kernels)] = token_log_kernels
        [kernels] = trace([kernels], population.ancestors)
        fields = {field.name: getattr(population, field.name) for field in dataclasses.fields(population)}
        return cls(**fields, token_log_kernels=kernels, **more)

    # -- where the text is left: exact -----------------------------------------------------------------------------
    @property
    def survival(self) -> np.ndarray:
        """Computes (S,) float64, the probability that a counterfactual keeps the first s + 1 tokens of the text."""
        return np.cumprod(self.stay)

    @property
    def expected_common_prefix(self) -> float:
        """Computes how many tokens of the text a counterfactual keeps before it leaves it, on average."""
        return float(self.survival.sum())

    # -- of the particles ------------------------------------------------------------------------------------------
    @property
    def common_prefix(self) -> np.ndarray:
        """Counts the tokens that each particle has in common with the text from its beginning on, (N,) int64."""
        text = np.array(self.factual_ids)
        out = np.empty(self.n_particles, dtype=np.int64)
        for i, ids in enumerate(self.token_ids):
            n = min(len(ids), len(text))
            differ = np.flatnonzero(np.array(ids[:n], dtype=np.int64) != text[:n])
            out[i] = differ[0] if differ.size else n
        return out

    @property
    def first_change(self) -> np.ndarray:
        """Finds the first place at which each particle is not the text, (N,) int64; −1: it is the text.

        A text that goes on where the other has ended is another one from that place on.
        """
        prefix = self.common_prefix
        same = [len(ids) == len(self.factual_ids) == n for ids, n in zip(self.token_ids, prefix.tolist(), strict=True)]
        return np.where(same, -1, prefix)

    @property
    def edit_distance(self) -> np.ndarray:
        """Counts the tokens to insert, delete or replace to make each particle of the text: Levenshtein, (N,) int64."""
        return np.array([_levenshtein(self.factual_ids, ids) for ids in self.token_ids], dtype=np.int64)

    @property
    def log_kernel(self) -> np.ndarray:
        """Computes the log-probability of each particle given the text, (N,) float64."""
        return self.token_log_kernels.sum(axis=1)

    def diff(self) -> list[list[tuple[str, list[int], list[int]]]]:
        """Lists for each particle what becomes of the text: ("equal" | "replace" | "delete" | "insert", its tokens,
        the particle's tokens)."""
        out: list[list[tuple[str, list[int], list[int]]]] = []
        for ids in self.token_ids:
            matcher = difflib.SequenceMatcher(None, self.factual_ids, ids, autojunk=False)
            out.append([(op, self.factual_ids[a:b], ids[c:d]) for op, a, b, c, d in matcher.get_opcodes()])
        return out

    def plot_survival(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the exact `survival`, and the share of particles that keep as much: a matplotlib Figure.

        Args:
            path: where to write the picture (the suffix gives the format), or None.
        """
        return plots.survival(self, path)

    def summary(self, k: int = 5) -> dict[str, Any]:
        """Adds the expected common prefix to that of a population."""
        return super().summary(k) | {"expected_common_prefix": self.expected_common_prefix}

    def to_dict(self) -> dict[str, Any]:
        """Adds the text, where it is left, and what is known of each particle beside it."""
        names = ("factual_log_probs", "stay", "survival", "common_prefix", "edit_distance", "log_kernel")
        values = {name: json_safe(getattr(self, name)) for name in names}
        return super().to_dict() | {"factual_ids": list(map(int, self.factual_ids)), **values}


def _levenshtein(a: list[int], b: list[int]) -> int:
    """Counts edits by rows of the usual table; the running minimum along a row is taken at once."""
    places = np.arange(len(b) + 1)
    row, other = places.copy(), np.array(b, dtype=np.int64)
    for i, token in enumerate(a, 1):
        best = np.concatenate([[i], np.minimum(row[1:] + 1, row[:-1] + (other != token))])
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])
