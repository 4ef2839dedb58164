"""Islands of `smc`: so many independent groups per prompt, which are pooled, or one group of islands that migrate.

    islands=M                    →  M groups per prompt  →  pool
    islands=M, migrate_every=K   →  one group per prompt, of M·N particles
    n_particles="auto"           →  PILOTS islands per prompt  →  the variance of one island's Ẑ  →  so many others, of
                                    groups of their own  →  pool

The number of islands is known before, or hangs on the pilots alone, so that the pooled Ẑ is unbiased
(docs/mathematics.md §9).
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
#: particles of a population, which a pool is
MOST = 2**20

Outcomes = Sequence[Population | SMCError]
Sample = Callable[[Sequence[int], Sequence[SMCParams]], Outcomes]


def read_islands(
    params: Sequence[SMCParams],
    apart: bool,
    *,
    islands: Any = 1,
    migrate_every: Any = None,
    n_particles: Any = None,
    target_stderr: Any = None,
    max_particles: Any = None,
    exact: Any = None,
) -> tuple[list[SMCParams], Fixed | Auto]:
    """Reads the arguments of `smc` by these names.

    Args:
        params: of an island of each prompt.
        apart: each prompt counts its groups on from its own `params.group`; else those of all prompts are counted on
            from the first one's.

    Returns:
        parameters of each prompt, of all its islands where these migrate; and who runs them.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    n = check_int("islands", islands, 1, MOST)
    if migrate_every is not None:
        if n == 1:
            raise ValueError(f"migrate_every={migrate_every!r}: needs islands of at least 2")
        check_int("migrate_every", migrate_every, 1, 2**24)
    auto = Auto.read(n_particles, target_stderr, max_particles, exact, params)
    if n > 1 and exact is not None:
        raise ValueError(f"exact: a run with islands={n} takes no exact samples, whose log Ẑ are bounds")
    for each in params:
        if auto is not None and (n > 1 or each.islands > 1):
            given = f"islands={n}" if n > 1 else f"params.islands={each.islands}"
            raise ValueError(f"n_particles='auto': says itself how many islands there are; leave {given} out")
        if n * each.n_particles > MOST:
            raise ValueError(
                f"islands={n}: of SMCParams.n_particles={each.n_particles} particles each; together at most {MOST}"
            )
        if n > 1 and migrate_every is not None and each.islands > 1:
            raise ValueError(f"migrate_every={migrate_every}: params.islands={each.islands} says it already; give one")
    if migrate_every is not None:
        many = [
            dataclasses.replace(each, n_particles=n * each.n_particles, islands=n, migrate_every=migrate_every)
            for each in params
        ]
        return many, Fixed(1)
    first = [each.group for each in params] if apart else [each.group for each in params[:1]]
    runs = n if apart else n * len(params)
    for group in first:
        if group + runs > 2**32:
            raise ValueError(
                f"group={group}: islands={n} number {runs} groups from it on; must be at most {2**32 - runs}"
            )
    return list(params), Fixed(n) if auto is None else auto


@dataclasses.dataclass(frozen=True)
class Fixed:
    """Runs so many islands of each prompt, which are pooled; the population of one island is as it is.

    Attributes:
        count: of islands per prompt, M.
    """

    count: int

    def run(self, sample: Sample, params: Sequence[SMCParams], apart: bool) -> list[Population | SMCError]:
        """Runs the islands of all prompts side by side, island m of prompt i as group i·M + m; takes, and returns, what
        `Auto.run` does."""
        starts = [each.group if apart else params[0].group + self.count * i for i, each in enumerate(params)]
        found = _run(sample, params, starts, [self.count] * len(params))
        return [each if isinstance(each, SMCError) else _pooled(each) for each in found]


def _pooled(islands: list[Population]) -> Population:
    return islands[0] if len(islands) == 1 else Population.pool(islands)


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
        sample: Sample,
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
    sample: Sample,
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
