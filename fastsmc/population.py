"""Population: the weighted particles that one SMC group leaves behind, with their genealogy. NumPy only.

How rows and steps are counted, for N particles and T steps:

- Row i of step t drew `tokens[t, i]`, before any later resampling (-1 where it had ended).
- It continues row `ancestors[t, i]` of step t - 1 (the identity at t = 0 and where nothing was resampled).
- Final particle i is row i of step T - 1; `token_ids[i]`, `log_weights[i]` and `log_probs[i]` belong to it.

So `lineage(i)` walks back from row i of the last step, and `tokens[t, lineage[t]]` spells `token_ids[i]`.

`Population.pool` makes one of populations of independent runs, islands (fastsmc/pooling.py): island after island.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import math
import operator
import os
import zipfile
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from fastsmc import plots, pooling
from fastsmc.genealogy import find_roots
from fastsmc.params import SMCParams
from fastsmc.values import check_choice, check_int, json_safe

VERSION = 1
FINISH_REASONS = ("stop", "length", "dead")
#: why a population that says nothing of its error has no standard error
NO_STDERR = "not known: whoever made this population did not say"


class _Texts:
    """Checks what the field `texts`, which may be put in later, is set to: N str, or None."""

    def __get__(self, obj: Any, owner: type) -> list[str] | None:
        return None if obj is None else obj._texts  # of the class: the dataclass field's default

    def __set__(self, obj: Any, value: list[str] | None) -> None:
        if value is not None:
            if isinstance(value, str) or len(value) != len(obj.token_ids):
                raise ValueError(f"texts: {len(value)} of them for {len(obj.token_ids)} particles")
            value = list(value)
            if not all(issubclass(kind, str) for kind in set(map(type, value))):
                raise ValueError("texts: must be str")
        obj._texts = value


@dataclasses.dataclass(eq=False, repr=False, kw_only=True)
class Population:
    """Holds N weighted particles after T steps. Arrays are converted to the dtypes below and checked for shape.

    Args:
        token_ids: N lists of int, generated tokens only, stop token included.
        log_weights: (N,) float64, final unnormalised log weights; -inf allowed.
        log_z: float, log of the unbiased estimate of Z; -inf if all weights are zero.
        log_probs: (N,) float64, log p0 of the generated tokens, under all settings that p0 has in `params`.
        token_log_probs: (N, T) float64, log p0 of each token, 0 after a particle's end; rows sum to `log_probs`.
        ess: (T,) float64, effective sample size right after step t was weighed, before any resampling.
        resampled: (T,) bool, whether ancestors[t] came from a resampling.
        ancestors: (T, N) int32, row of step t - 1 that row i continues at step t.
        tokens: (T, N) int32, token drawn by row i at step t, before later resamplings; -1 where it had ended, or
            waited for a boundary.
        step_log_weights: (T, N) float64, weights right after step t was weighed, before any resampling. With the
            twisted proposal that is before the draw, so its rows are then those of step t - 1.
        prompt_token_ids: the prompt's tokens.
        params: what was asked for.
        finish_reasons: N of "stop" (a stop token, a stop string or `Potential.stop`), "length" (max_tokens) and "dead"
            (neither: no next token had any weight, or no particle of the group had); None: not known, of an old file.
        texts: N str, what the tokens add to the prompt's text; None without a tokenizer.
        questions: of a group with a `Condition`: "asked", texts that it was asked about, "calls" of its functions, and
            "cut", how often `max_asked` ended a particle's search; None without.
        log_z_stderr: float, standard error of `log_z` by this very run (fastsmc/genealogy.py); NaN where there is none.
        log_z_stderr_reason: why there is none; None where there is one.
        island: (N,) int32, which of K islands each particle is on; None: all are on one. They are independent runs, as
            `pool` counts them, or, with `params.islands`, so many in each run, between which particles migrate.
        island_resampled: (T, K) bool, whether island k was resampled before step t, or with it the islands of its run
            (then rows of one continue those of another); None: as `resampled`, of one.
        pilot: with `n_particles="auto"` the pool of islands that said how many others to run; None: there were none.
        capped: whether they asked for more than `max_particles` allows.
        lost_islands: islands that are missing from the pool, because the workers that ran them were lost.
        segments: (N,) int32, segments of each particle, the last of which its end may have cut short; None: the group
            had none.
        boundaries: (K,) int32, steps after which the group was weighed, and perhaps resampled; None likewise. Between
            them weights are as they were, but for those of a proposal other than p0.

    Raises:
        ValueError: naming the field that has a wrong shape or dtype, a NaN or a +inf, or an ancestor out of range.
    """

    FORMAT: ClassVar[str] = "fastsmc.population"
    #: field: (dtype, shape in words of N and T)
    ARRAYS: ClassVar[dict[str, tuple[type, str]]] = {
        "log_weights": (np.float64, "N"),
        "log_probs": (np.float64, "N"),
        "token_log_probs": (np.float64, "NT"),
        "ess": (np.float64, "T"),
        "resampled": (np.bool_, "T"),
        "ancestors": (np.int32, "TN"),
        "tokens": (np.int32, "TN"),
        "step_log_weights": (np.float64, "TN"),
        "island": (np.int32, "N"),
        "island_resampled": (np.bool_, "TK"),
    }
    #: those that older files lack
    NEW_ARRAYS: ClassVar[tuple[str, ...]] = ("island", "island_resampled")

    token_ids: list[list[int]]
    log_weights: np.ndarray
    log_z: float
    log_probs: np.ndarray
    token_log_probs: np.ndarray
    ess: np.ndarray
    resampled: np.ndarray
    ancestors: np.ndarray
    tokens: np.ndarray
    step_log_weights: np.ndarray
    prompt_token_ids: list[int]
    params: SMCParams
    finish_reasons: list[str] | None = None
    texts: list[str] | None = _Texts()  # type: ignore[assignment]  # a descriptor, typed as what it gives
    questions: dict[str, int] | None = None
    log_z_stderr: float = math.nan
    log_z_stderr_reason: str | None = NO_STDERR
    island: np.ndarray = None  # type: ignore[assignment]  # None only until __post_init__
    island_resampled: np.ndarray = None  # type: ignore[assignment]
    pilot: Population | None = None
    capped: bool = False
    lost_islands: int = 0
    segments: np.ndarray | None = None
    boundaries: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.island is None:
            self.island = np.zeros(len(self.token_ids), dtype=np.int32)
        if self.island_resampled is None:
            self.island_resampled = np.asarray(self.resampled)[:, None]
        sizes = self._sizes()
        if sizes["N"] == 0:
            raise ValueError("token_ids: a population has at least one particle")
        for name, (dtype, letters) in self.ARRAYS.items():
            array = _as_array(name, getattr(self, name), dtype)
            shape = tuple(sizes[c] for c in letters)
            if array.shape != shape:
                raise ValueError(f"{name}: shape {array.shape}, expected ({', '.join(letters)}) = {shape}")
            setattr(self, name, array)
        for name in ("log_weights", "step_log_weights"):
            array = getattr(self, name)
            if not (array < math.inf).all():
                raise ValueError(f"{name}: NaN or +inf among the log weights")
        if self.ancestors.size and not 0 <= self.ancestors.min() <= self.ancestors.max() < sizes["N"]:
            raise ValueError(f"ancestors: rows must lie in [0, {sizes['N']})")
        try:
            self.log_z = float(self.log_z)
            self.prompt_token_ids = [operator.index(v) for v in self.prompt_token_ids]
        except (TypeError, ValueError) as error:
            raise ValueError(f"log_z, prompt_token_ids: {error}") from None
        if math.isnan(self.log_z) or self.log_z == math.inf:
            raise ValueError(f"log_z={self.log_z}: must be finite or -inf")
        if not isinstance(self.params, SMCParams):
            raise ValueError(f"params={self.params!r}: must be SMCParams")
        if not 0 <= self.island.min() <= self.island.max() < sizes["K"]:
            raise ValueError(f"island: must lie in [0, {sizes['K']})")
        if sizes["K"] % self.params.islands:
            raise ValueError(
                f"island_resampled: {sizes['K']} islands; with params.islands={self.params.islands} a multiple"
            )
        self._check_stderr()
        if self.pilot is not None and not isinstance(self.pilot, Population):
            raise ValueError(f"pilot={self.pilot!r}: must be a Population or None")
        if not isinstance(self.capped, bool):
            raise ValueError(f"capped={self.capped!r}: must be True or False")
        self.lost_islands = check_int("lost_islands", self.lost_islands, 0)
        if self.finish_reasons is not None:
            self.finish_reasons = list(self.finish_reasons)
            for reason, _ in itertools.groupby(self.finish_reasons):
                check_choice("finish_reasons", reason, FINISH_REASONS)
            if len(self.finish_reasons) != sizes["N"]:
                raise ValueError(f"finish_reasons: {len(self.finish_reasons)} of them for {sizes['N']} particles")

        self._check_segments()
        asked = self.questions
        if asked is not None and (not isinstance(asked, dict) or asked.keys() != {"asked", "calls", "cut"}):
            raise ValueError(f"questions={self.questions!r}: must have 'asked', 'calls' and 'cut'")

    def _check_segments(self) -> None:
        if (self.segments is None) != (self.boundaries is None):
            raise ValueError("segments, boundaries: one of them is None; both must be, or none")
        if self.segments is None or self.boundaries is None:
            return
        for name in ("segments", "boundaries"):
            array = _as_array(name, getattr(self, name), np.int32)
            if array.ndim != 1 or (array < 0).any():
                raise ValueError(f"{name}: must be a vector of numbers that are not negative")
            setattr(self, name, array)
        if len(self.segments) != self.n_particles or (self.boundaries >= self.T).any():
            raise ValueError(f"segments, boundaries: not those of N={self.n_particles} particles and T={self.T} steps")

    def _check_stderr(self) -> None:
        value, reason = self.log_z_stderr, self.log_z_stderr_reason
        try:
            self.log_z_stderr = float(value)
        except (TypeError, ValueError):
            raise ValueError(f"log_z_stderr={value!r}: must be a number") from None
        if reason is not None and not isinstance(reason, str):
            raise ValueError(f"log_z_stderr_reason={reason!r}: must be a str or None")
        if not (math.isnan(self.log_z_stderr) if reason is not None else 0.0 <= self.log_z_stderr < math.inf):
            raise ValueError(
                f"log_z_stderr={value!r}: must be at least 0 and finite, or NaN with a reason; the reason is {reason!r}"
            )

    def _sizes(self) -> dict[str, int]:
        """Says what the letters of ARRAYS stand for."""
        return {"N": len(self.token_ids), "T": len(self.ess), "K": np.shape(self.island_resampled)[-1]}

    @classmethod
    def from_record(
        cls,
        *,
        tokens: np.ndarray,
        token_log_probs: np.ndarray,
        ancestors: np.ndarray,
        resampled: np.ndarray,
        ess: np.ndarray,
        step_log_weights: np.ndarray,
        log_weights: np.ndarray,
        log_z: float,
        log_z_stderr: float,
        log_z_stderr_reason: str | None,
        stopped: np.ndarray,
        prompt: list[int],
        params: SMCParams,
        segments: np.ndarray | None = None,
        boundaries: np.ndarray | None = None,
        island: np.ndarray | None = None,
        island_resampled: np.ndarray | None = None,
    ) -> Population:
        """Traces each final particle back through a record kept step by step.

        Args:
            token_log_probs: (T, N), as `tokens`.
            stopped: (N,) bool, final particles that ended otherwise than by their length.
        """
        traced, log_probs = trace([tokens, token_log_probs], ancestors)
        token_ids = [row[row >= 0].tolist() for row in traced]
        full = [len(ids) == params.max_tokens for ids in token_ids]
        return cls(
            token_ids=token_ids,
            log_weights=log_weights,
            log_z=log_z,
            log_z_stderr=log_z_stderr,
            log_z_stderr_reason=log_z_stderr_reason,
            log_probs=log_probs.sum(axis=1),
            token_log_probs=log_probs,
            ess=ess,
            resampled=resampled,
            ancestors=ancestors,
            tokens=tokens,
            step_log_weights=step_log_weights,
            prompt_token_ids=list(prompt),
            params=params,
            finish_reasons=["stop" if s else "length" if f else "dead" for s, f in zip(stopped, full, strict=True)],
            segments=segments,
            boundaries=boundaries,
            island=island,  # type: ignore[arg-type]  # as of the class
            island_resampled=island_resampled,  # type: ignore[arg-type]
        )

    @staticmethod
    def pool(populations: Sequence[Population]) -> Population:
        """Makes one population of independent ones, islands, of the same prompt, target and kind of run.

        Its weights are on one scale, so that Ẑ = Σ N_k Ẑ_k / Σ N_k, which is unbiased for any N_k, also unequal ones.
        The number of islands must not hang on what they gave: choose it before, or by other runs. Rows of island k
        follow those of island k − 1, in the genealogy too; an island of fewer steps is padded by steps without a draw.
        `resampled` says whether any island was, `island_resampled` which; `params` are those of the first, but for
        n_particles; `texts` and `finish_reasons` are None if an island has none. Pools can be pooled.

        `log_z_stderr` comes from the spread of 8 islands or more, which rests on their independence alone; from fewer,
        of the figures of each: √(Σ_k (N_k/N)² Ẑ_k² V_k) / Ẑ (docs/mathematics.md §9).

        Args:
            populations: at least one. That they had the same potential is the caller's word: none is recorded.

        Raises:
            ValueError: naming what differs between which: the prompt, or a parameter but n_particles, seed and group.
        """
        parts = list(populations)
        for i, part in enumerate(parts):
            if type(part) is not Population:
                raise ValueError(f"populations[{i}]: must be a Population, got {type(part).__name__}")
        return Population(**pooling.pool(parts))

    # -- sizes and weights -----------------------------------------------------------------------------------------
    @property
    def n_particles(self) -> int:
        """Counts the particles, N."""
        return len(self.token_ids)

    @property
    def T(self) -> int:
        """Counts the steps; at most `params.max_tokens`, unless particles waited for each other at boundaries."""
        return len(self.ess)

    @property
    def degenerate(self) -> bool:
        """Says whether every particle has weight zero."""
        return bool(np.isneginf(self.log_weights).all())

    @property
    def biased(self) -> bool:
        """Says whether Ẑ is biased, too low on average: `max_asked` ended a particle's search for a token."""
        return self.questions is not None and self.questions["cut"] > 0

    @property
    def weights(self) -> np.ndarray:
        """Normalises the weights: (N,) float64, sum 1; all zeros if `degenerate`."""
        if self.degenerate:
            return np.zeros(self.n_particles)
        weights = np.exp(self.log_weights - self.log_weights.max())
        return weights / weights.sum()

    @property
    def final_ess(self) -> float:
        """Computes the effective sample size of the final weights, 1 to N; 0 if `degenerate`."""
        weights = self.weights
        return 0.0 if self.degenerate else float(1.0 / np.square(weights).sum())

    @property
    def n_islands(self) -> int:
        """Counts the islands that these particles are on; 1 unless runs were pooled, or had islands."""
        return self.island_resampled.shape[1]

    def sample(self, k: int, seed: int = 0) -> np.ndarray:
        """Draws (k,) int64 particle indices independently by `weights`, with replacement.

        Raises:
            ValueError: if k is not a whole number >= 0, or if all weights are zero.
        """
        k = check_int("k", k, 0)
        if self.degenerate:
            raise ValueError("cannot sample: all weights of this population are zero (log_z = -inf)")
        return draw_indices(self.weights, np.random.default_rng(seed).random(k))

    # -- genealogy -------------------------------------------------------------------------------------------------
    def lineage(self, i: int) -> np.ndarray:
        """Finds the rows that final particle i visited, (T,) int32; `tokens[t, lineage(i)[t]]` spells `token_ids[i]`.

        Raises:
            IndexError: if i is not in [-N, N).
        """
        if not -self.n_particles <= i < self.n_particles:
            raise IndexError(f"particle {i} of {self.n_particles}")
        rows = np.empty(self.T, dtype=np.int32)
        row = int(i) % self.n_particles
        for t in range(self.T - 1, -1, -1):
            rows[t] = row
            row = self.ancestors[t, row]
        return rows

    @property
    def roots(self) -> np.ndarray:
        """Finds the row of the first step that each final particle descends from, (N,) int64."""
        return find_roots(self.ancestors)

    @property
    def n_roots(self) -> int:
        """Counts the distinct roots of particles with weight, which `log_z_stderr` rests on; 0 if `degenerate`."""
        return len(set(self.roots[~np.isneginf(self.log_weights)].tolist()))

    def distinct_ancestors(self) -> np.ndarray:
        """Counts the rows of each step that have descendants among the final particles, (T,) int64; the last is N."""
        return self.surviving().sum(axis=1)

    def surviving(self) -> np.ndarray:
        """Marks rows that have final descendants, (T, N) bool."""
        alive = np.zeros((self.T, self.n_particles), dtype=bool)
        alive[-1:] = True
        for t in range(self.T - 1, 0, -1):
            alive[t - 1, self.ancestors[t, alive[t]]] = True
        return alive

    # -- summaries -------------------------------------------------------------------------------------------------
    def best(self, k: int = 10) -> list[tuple[str, float, float]]:
        """Ranks the k heaviest distinct texts as (text, total weight, log p0 of its likeliest particle).

        Raises:
            ValueError: there are no texts, because the engine had no tokenizer.
        """
        if self.texts is None:
            raise ValueError("this population has no texts: its engine had no tokenizer; use token_ids")
        totals: dict[str, list[float]] = {}
        for text, weight, log_prob in zip(self.texts, self.weights.tolist(), self.log_probs.tolist(), strict=True):
            entry = totals.setdefault(text, [0.0, -math.inf])
            entry[0] += weight
            entry[1] = max(entry[1], log_prob)
        ranked = sorted(totals.items(), key=lambda item: (-item[1][0], -item[1][1]))
        return [(text, weight, log_prob) for text, (weight, log_prob) in ranked[:k]]

    def summary(self, k: int = 5) -> dict[str, Any]:
        """Sums up in plain JSON values; a number that JSON lacks (-inf) is None, as is `best` without a tokenizer."""
        best = None if self.texts is None else self.best(k)
        return {
            "n_particles": self.n_particles,
            "steps": self.T,
            "log_z": json_safe(self.log_z),
            "log_z_stderr": json_safe(self.log_z_stderr),
            "log_z_stderr_reason": self.log_z_stderr_reason,
            "final_ess": self.final_ess,
            "distinct_roots": self.n_roots,
            "islands": self.n_islands,
            "capped": self.capped,
            "lost_islands": self.lost_islands,
            "pilot": None if self.pilot is None else self.pilot.summary(0),
            "degenerate": self.degenerate,
            **({} if self.questions is None else {"questions": self.questions, "biased": self.biased}),
            "resamplings": int(self.resampled.sum()),
            "total_tokens": sum(map(len, self.token_ids)),
            "distinct_first_ancestors": int(self.distinct_ancestors()[0]) if self.T else self.n_particles,
            "best": best and [{"text": text, "weight": w, "log_prob": json_safe(lp)} for text, w, lp in best],
        }

    def to_dict(self) -> dict[str, Any]:
        """Adds to `summary()` what each particle is, in plain JSON values under the names of the attributes."""
        names = ("log_weights", "weights", "log_probs", "ess", "resampled", "island")
        return {
            **self.summary(),
            "params": dataclasses.asdict(self.params),
            "prompt_token_ids": self.prompt_token_ids,
            "token_ids": [list(map(int, ids)) for ids in self.token_ids],
            "finish_reasons": self.finish_reasons,
            "texts": self.texts,
            **{name: json_safe(getattr(self, name)) for name in names},
        }

    def __len__(self) -> int:
        return self.n_particles

    def __repr__(self) -> str:
        return f"Population(N={self.n_particles}, T={self.T}, log_z={self.log_z:.6g}, ess={self.final_ess:.4g})"

    # -- files -----------------------------------------------------------------------------------------------------
    def to_bytes(self) -> bytes:
        """Makes an .npz archive in memory (no pickles inside); `from_bytes` reads it back exactly."""
        lengths = np.array([len(ids) for ids in self.token_ids], dtype=np.int64)
        flat = np.fromiter((v for ids in self.token_ids for v in ids), dtype=np.int64, count=int(lengths.sum()))
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        arrays |= {"log_z": np.float64(self.log_z), "flat_token_ids": flat, "lengths": lengths}
        if self.segments is not None:
            arrays |= {"segments": self.segments, "boundaries": self.boundaries}
        if self.pilot is not None:
            arrays["pilot"] = np.frombuffer(self.pilot.to_bytes(), dtype=np.uint8)
        meta = {
            "format": self.FORMAT,
            "version": VERSION,
            "params": dataclasses.asdict(self.params),
            "prompt_token_ids": self.prompt_token_ids,
            "texts": self.texts,
            "finish_reasons": self.finish_reasons,
            "questions": self.questions,
            "log_z_stderr": json_safe(self.log_z_stderr),
            "log_z_stderr_reason": self.log_z_stderr_reason,
            "capped": self.capped,
            "lost_islands": self.lost_islands,
            "digest": _digest(arrays),
            **self._more(),
        }
        out = io.BytesIO()
        np.savez(out, meta=np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8), **arrays)
        return out.getvalue()

    def _more(self) -> dict[str, Any]:
        """Gives what a subclass keeps beside arrays, as JSON values."""
        return {}

    @classmethod
    def _read_more(cls, meta: dict[str, Any]) -> dict[str, Any]:
        """Reads what `_more` gave: arguments of the class."""
        return {}

    @classmethod
    def from_bytes(cls, data: bytes, source: str = "population bytes") -> Population:
        """Reads what `to_bytes` made.

        Raises:
            ValueError: naming `source` and what is wrong with it.
        """
        try:
            members = _members(data)
            meta = json.loads(_array(members, "meta", np.uint8).tobytes()) if "meta" in members else None
            if not isinstance(meta, dict) or meta.get("format") != cls.FORMAT:
                raise ValueError("it is not a fastsmc population")
            if meta.get("version") != VERSION:
                raise ValueError(f"its format version is {meta.get('version')!r}; this fastsmc reads {VERSION}")
            old = "log_z_stderr" not in meta
            kinds: dict[str, Any] = {
                name: dtype for name, (dtype, _) in cls.ARRAYS.items() if not (old and name in cls.NEW_ARRAYS)
            }
            kinds |= {"log_z": np.float64, "flat_token_ids": np.int64, "lengths": np.int64}
            kinds |= {"pilot": np.uint8} if "pilot" in members else {}
            kinds |= {name: np.int32 for name in ("segments", "boundaries") if name in members}
            arrays: dict[str, Any] = {name: _array(members, name, dtype) for name, dtype in kinds.items()}
            good = meta.get("digest") in (None, _digest(arrays))  # older files have none
            log_z, lengths, flat = (arrays.pop(name) for name in ("log_z", "lengths", "flat_token_ids"))
            pilot = arrays.pop("pilot", None)
            ends = np.cumsum(lengths).tolist()
            if lengths.ndim != 1 or (lengths < 0).any() or (ends[-1] if ends else 0) != flat.size:
                raise ValueError("its token lengths do not add up")
            ids = flat.reshape(-1).tolist()
            population = cls(
                token_ids=[ids[end - n : end] for n, end in zip(lengths.tolist(), ends, strict=True)],
                log_z=log_z.item(),
                prompt_token_ids=meta["prompt_token_ids"],
                params=SMCParams(**meta["params"]),
                texts=meta["texts"],
                finish_reasons=meta.get("finish_reasons"),
                questions=meta.get("questions"),
                **arrays,
                **({} if old else _read_stderr(meta)),
                pilot=None if pilot is None else Population.from_bytes(pilot.tobytes(), "its pilot"),
                capped=meta.get("capped", False),
                lost_islands=meta.get("lost_islands", 0),
                **cls._read_more(meta),
            )
            if not good:
                raise ValueError("its arrays are not those that were written")
            return population
        except KeyError as error:
            raise ValueError(f"cannot read {source}: {error} is missing") from error
        except Exception as error:  # whatever is wrong with the bytes, and whoever found out
            raise ValueError(f"cannot read {source}: {error or type(error).__name__}") from error

    def save(self, path: str | os.PathLike) -> None:
        """Writes one .npz archive at exactly `path`, whatever its suffix. OSError if that cannot be done."""
        with open(path, "wb") as file:
            file.write(self.to_bytes())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Population:
        """Reads what `save` wrote. OSError if the file cannot be opened, ValueError naming it if it is not one."""
        with open(path, "rb") as file:
            return cls.from_bytes(file.read(), source=os.fspath(path))

    # -- pictures --------------------------------------------------------------------------------------------------
    def plot_weights(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the ESS over steps, resamplings marked, above the spread of the log weights: a matplotlib Figure.

        Args:
            path: where to write the picture (the suffix gives the format), or None.
        """
        return plots.weights(self, path)

    def plot_genealogy(self, path: str | os.PathLike | None = None, max_lines: int = 200_000) -> Any:
        """Draws the genealogy, as `fastsmc.plots.genealogy` says: a matplotlib Figure.

        Args:
            path: where to write the picture (the suffix gives the format), or None.
            max_lines: at most so many grey and so many coloured lines are drawn, evenly spaced; at least 1.
        """
        return plots.genealogy(self, path, max_lines)


def trace(values: Sequence[np.ndarray], ancestors: np.ndarray) -> list[np.ndarray]:
    """Follows arrays (T, N) back through ancestors (T, N) from the last step: (N, T) each, a row per final particle."""
    steps, n = ancestors.shape
    rows = np.arange(n)
    traced = [np.empty((n, steps), array.dtype) for array in values]
    for t in reversed(range(steps)):
        for to, array in zip(traced, values, strict=True):
            to[:, t] = array[t, rows]
        rows = ancestors[t, rows]
    return traced


def draw_indices(weights: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Draws an index for each of uniforms (k,) in [0, 1) by inverting the weights' cumulative sum: (k,) int64.

    Args:
        weights: (N,) float64, not negative, of any positive sum.
    """
    cumulative = np.cumsum(weights)
    last = int(np.flatnonzero(weights)[-1])  # rounding must not reach a weightless particle
    return np.minimum(np.searchsorted(cumulative, uniforms * cumulative[-1], side="right"), last).astype(np.int64)


def _read_stderr(meta: dict[str, Any]) -> dict[str, Any]:
    """Reads the standard error and its reason, NaN being null in a file."""
    value = meta["log_z_stderr"]
    return {
        "log_z_stderr": math.nan if value is None else value,
        "log_z_stderr_reason": meta["log_z_stderr_reason"],
    }


def _as_array(name: str, value: Any, dtype: type) -> np.ndarray:
    """Makes `value` a contiguous array of `dtype`; ValueError, naming `name`: its numbers are of another kind."""
    try:
        array = np.asarray(value)
        kinds = {"f": "fiu", "i": "iu", "b": "b"}[np.dtype(dtype).kind]
        if array.size and array.dtype.kind not in kinds:
            raise ValueError(f"dtype {array.dtype}, expected {np.dtype(dtype)}")
        out: np.ndarray = np.ascontiguousarray(array, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from None
    if array.size and kinds == "iu" and array.dtype != dtype and not np.array_equal(out, array):
        raise ValueError(f"{name}: numbers that {np.dtype(dtype)} does not hold")
    return out.reshape(array.shape)


# -- files: an .npz archive, read with nothing taken on trust ----------------------------------------------------------
def _digest(arrays: dict[str, Any]) -> str:
    """Computes the SHA-256 of named arrays, so that none stands in for another."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _members(data: bytes) -> dict[str, bytes]:
    """Reads the bytes of each member of an archive that holds uncompressed .npy files from its first byte to its last.

    Raises:
        ValueError: it is another file, or says that a member is longer than it is.
    """
    if not data.startswith(b"PK\3\4") or data[-22:-18] != b"PK\5\6":
        raise ValueError("it is not a fastsmc population, or not a whole one")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        for info in infos:
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(data) or info.flag_bits & 1:
                raise ValueError(f"{info.filename!r} is compressed, encrypted or longer than the file")
        if sum(info.file_size for info in infos) > len(data) or len({info.filename for info in infos}) < len(infos):
            raise ValueError("its members overlap")
        if infos and min(info.header_offset for info in infos) > 0:
            raise ValueError("there is something before its first member")
        return {info.filename.removesuffix(".npy"): archive.read(info) for info in infos}


def _array(members: dict[str, bytes], name: str, dtype: type) -> np.ndarray:
    """Reads a member's array. Its size is checked before memory is taken for it. KeyError: there is no such member."""
    file = io.BytesIO(members[name])
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, stored = read(file)
    raw = members[name][file.tell() :]
    if stored != np.dtype(dtype) or fortran or math.prod(shape) * stored.itemsize != len(raw):
        raise ValueError(f"{name}: holds {len(raw)} bytes as {shape} {stored}, expected {np.dtype(dtype)}")
    return np.frombuffer(raw, dtype=dtype).reshape(shape).copy()
