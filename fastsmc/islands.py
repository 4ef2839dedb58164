"""`smc(…, n_particles="auto")`: as many islands as a standard error needs, by pilots that are not among them.

    PILOTS islands per prompt  →  the variance of one island's Ẑ  →  so many others, of their own groups  →  pool

The number of islands hangs on the pilots alone, so that the pooled Ẑ is unbiased (docs/mathematics.md §9).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.smc.engine import SMCError
from fastsmc.values import check_float, check_int

PILOTS = 8
TARGET_STDERR, MAX_PARTICLES = 0.1, 2**16

Outcomes = Sequence[Population | SMCError]


@dataclasses.dataclass(frozen=True)
class Auto:
    """Says what a call of `smc` is to reach: a standard error of log Ẑ, by at most so many particles per prompt.

    Attributes:
        target_stderr: the wanted standard error of log Ẑ.
        max_particles: of the islands that are returned; PILOTS · n_particles more are pilots.
    """

    target_stderr: float
    max_particles: int

    @classmethod
    def read(
        cls, n_particles: Any, target_stderr: Any, max_particles: Any, exact: Any, params: Sequence[SMCParams]
    ) -> Auto | None:
        """Reads the arguments of `smc` by these names; None: a group per prompt, as ever.

        Raises:
            ValueError: naming the argument, its value and what is allowed.
        """
        if n_particles is None:
            for name, value in (("target_stderr", target_stderr), ("max_particles", max_particles)):
                if value is not None:
                    raise ValueError(f"{name}={value!r}: needs n_particles='auto'")
            return None
        if not isinstance(n_particles, str) or n_particles != "auto":
            raise ValueError(f"n_particles={n_particles!r}: must be 'auto' or None; a number goes into SMCParams")
        if exact is not None:
            raise ValueError("exact: a run with n_particles='auto' takes no exact samples, whose log Ẑ are bounds")
        target = TARGET_STDERR if target_stderr is None else check_float("target_stderr", target_stderr, 1e-6, 10.0)
        most = MAX_PARTICLES if max_particles is None else check_int("max_particles", max_particles, 1, 2**20)
        for each in params:
            if each.n_particles > most:
                raise ValueError(
                    f"max_particles={most}: must be at least the size of an island, SMCParams.n_particles="
                    f"{each.n_particles}"
                )
            if PILOTS * each.n_particles > 2**20:
                raise ValueError(
                    f"SMCParams.n_particles={each.n_particles}: with n_particles='auto', which pools {PILOTS} pilots, "
                    f"must be at most {2**20 // PILOTS}"
                )
        runs = sum(PILOTS + most // each.n_particles for each in params)
        for each in params:
            if each.group + runs > 2**32:
                raise ValueError(
                    f"group={each.group}: with n_particles='auto' up to {runs} runs are numbered from it on; must be "
                    f"at most {2**32 - runs}"
                )
        return cls(target, most)

    def run(
        self,
        sample: Callable[[Sequence[int], Sequence[SMCParams]], Outcomes],
        params: Sequence[SMCParams],
        apart: bool,
    ) -> list[Population | SMCError]:
        """Runs pilots of all prompts side by side, then the islands that they ask for.

        Args:
            sample: runs groups: (which prompt each is of, their parameters) → what became of each.
            params: of an island of each prompt.
            apart: each prompt counts its runs on from its own `params.group`; else those of all prompts are counted on
                from the first one's, pilots of all prompts before all islands.

        Returns:
            of each prompt the pool of its islands, or the error of the first of its runs that failed.
        """
        n = len(params)
        starts = [each.group if apart else params[0].group + PILOTS * i for i, each in enumerate(params)]
        pilots = _run(sample, params, starts, [PILOTS] * n)
        counts = [0 if isinstance(found, SMCError) else self._count(found) for found in pilots]
        allowed = [self.max_particles // each.n_particles for each in params]
        used = [min(count, most) for count, most in zip(counts, allowed, strict=True)]
        if apart:
            starts = [each.group + PILOTS for each in params]
        else:
            starts = [params[0].group + PILOTS * n + sum(used[:i]) for i in range(n)]
        islands = _run(sample, params, starts, used)
        out: list[Population | SMCError] = []
        for i, (pilot, found) in enumerate(zip(pilots, islands, strict=True)):
            if isinstance(pilot, SMCError):
                out.append(pilot)
                continue
            if isinstance(found, SMCError):
                out.append(found)
                continue
            capped = counts[i] > allowed[i]
            if capped:
                warnings.warn(
                    f"prompt {i}: by its pilots a standard error of {self.target_stderr:g} needs more particles than "
                    f"max_particles={self.max_particles}: {used[i]} islands of {params[i].n_particles} are returned",
                    stacklevel=4,
                )
            pool = Population.pool(found)
            out.append(dataclasses.replace(pool, pilot=Population.pool(pilot), capped=capped))
        return out

    def _count(self, pilots: Sequence[Population]) -> int:
        """Says how many islands reach the target, by the variance of one pilot's Ẑ: the larger of its two estimates."""
        pool = Population.pool(pilots)
        if pool.degenerate:
            return self.max_particles + 1  # more than are allowed: nothing is known
        spread = 0.0 if math.isnan(pool.log_z_stderr) else PILOTS * pool.log_z_stderr**2
        known = [each.log_z_stderr**2 for each in pilots if not math.isnan(each.log_z_stderr)]
        variance = max(spread, float(np.mean(known)) if known else 0.0)
        return max(1, math.ceil(variance / self.target_stderr**2))


def _run(
    sample: Callable[[Sequence[int], Sequence[SMCParams]], Outcomes],
    params: Sequence[SMCParams],
    starts: Sequence[int],
    counts: Sequence[int],
) -> list[list[Population] | SMCError]:
    """Runs counts[i] islands of prompt i, with groups from starts[i] on; the islands of each, or its first error."""
    which = [i for i, count in enumerate(counts) for _ in range(count)]
    asked = [
        dataclasses.replace(params[i], group=starts[i] + k) for i, count in enumerate(counts) for k in range(count)
    ]
    found = iter(sample(which, asked) if which else ())
    out: list[list[Population] | SMCError] = []
    for count in counts:
        each = [next(found) for _ in range(count)]
        errors = [outcome for outcome in each if isinstance(outcome, SMCError)]
        out.append(errors[0] if errors else [outcome for outcome in each if isinstance(outcome, Population)])
    return out
