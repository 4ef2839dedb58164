"""Many prompts and islands as batches of groups: whoever runs them, where and how often, the populations are the same.

    prompts × islands, in their order  →  batches of consecutive groups  →  each by one call of `LLM.smc`  →  pools

Island m of prompt i is group `params.group + i · islands + m`. Which groups share a batch, and so forward passes, hangs
on the prompts' order and on `batch_size` alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple, cast

from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential
from fastsmc.smc.engine import SMCError
from fastsmc.values import check_int

#: rows that the groups of a batch have together, unless `batch_size` says how many groups it is of
ROWS = 256

Outcome = Population | SMCError


class Batch(NamedTuple):
    """Is a run of groups that one engine runs side by side.

    Attributes:
        number: among the batches of the job, from 0 on.
        prompts, islands: which prompt each group is of, and which of its islands.
        texts: the prompt of each, in any form that `LLM.smc` takes.
        params: of each.
    """

    number: int
    prompts: list[int]
    islands: list[int]
    texts: list[Any]
    params: list[SMCParams]


@dataclasses.dataclass(frozen=True)
class Job:
    """Says which groups are to be run, and in which batches.

    Args:
        prompts: in any form that `LLM.smc` takes.
        params: of each island.
        islands: independent groups per prompt, which are pooled.
        batch_size: groups per batch; None: so many that they have `ROWS` rows together.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    prompts: Sequence[Any]
    params: SMCParams
    islands: int = 1
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.params, SMCParams):
            raise ValueError(f"params={self.params!r}: must be SMCParams")
        n = self.params.n_particles
        most = check_int("islands", self.islands, 1, 2**20)
        if most * n > 2**20:
            raise ValueError(f"islands={most}: of {n} particles must be at most {2**20 // n}, 2**20 particles together")
        if self.params.group + len(self.prompts) * most > 2**32:
            raise ValueError(
                f"params.group={self.params.group}: {len(self.prompts)} prompts of {most} islands are numbered from it "
                "on, beyond 2**32 − 1"
            )
        size = -(-ROWS // n) if self.batch_size is None else check_int("batch_size", self.batch_size, 1, 2**20)
        object.__setattr__(self, "islands", most)
        object.__setattr__(self, "batch_size", size)

    def batches(self, finished: Collection[int] = ()) -> Iterator[Batch]:
        """Yields the batches in order, whole, but those that have groups of `finished` prompts only."""
        assert self.batch_size is not None  # __post_init__ has put a number
        total = len(self.prompts) * self.islands
        for number, begin in enumerate(range(0, total, self.batch_size)):
            which = [divmod(k, self.islands) for k in range(begin, min(begin + self.batch_size, total))]
            if all(i in finished for i, _ in which):
                continue
            yield Batch(
                number,
                [i for i, _ in which],
                [m for _, m in which],
                [self.prompts[i] for i, _ in which],
                [dataclasses.replace(self.params, group=self.params.group + i * self.islands + m) for i, m in which],
            )

    def gather(
        self, done: Iterator[tuple[Batch, Sequence[Outcome | None]]], finished: Collection[int] = ()
    ) -> Iterator[tuple[int, Outcome]]:
        """Pools islands, and yields (index of the prompt, what became of it) in the order of the prompts.

        Args:
            done: batches in any order, with what became of each group; None: it was lost with its workers, and the
                pool goes without it and says so (`Population.lost_islands`).
            finished: prompts that are left out.
        """
        found: dict[int, list[Outcome | None]] = {}
        missing: dict[int, int] = {}
        todo = (i for i in range(len(self.prompts)) if i not in finished)
        at = next(todo, None)
        for batch, outcomes in done:
            for i, m, outcome in zip(batch.prompts, batch.islands, outcomes, strict=True):
                if i in finished:
                    continue
                found.setdefault(i, [None] * self.islands)[m] = outcome
                missing[i] = missing.get(i, self.islands) - 1
            while at is not None and missing.get(at) == 0:
                yield at, pooled(found.pop(at))
                at = next(todo, None)


def pooled(islands: Sequence[Outcome | None]) -> Outcome:
    """Pools the islands of a prompt, but those that were lost (None), or returns the first error among them."""
    for outcome in islands:
        if isinstance(outcome, SMCError):
            return outcome
    left = [outcome for outcome in islands if isinstance(outcome, Population)]
    if not left:
        return SMCError("all islands were lost with their workers", kind="engine")
    population = left[0] if len(islands) == 1 else Population.pool(left)
    return dataclasses.replace(population, lost_islands=population.lost_islands + len(islands) - len(left))


def run_batch(llm: Any, batch: Batch, potential: Potential | None, twist: str | None = None) -> list[Outcome]:
    """Runs a batch by one call of `smc`: the population of each group, or the error that it ended with.

    Where a prompt is refused, which leaves the others without a run, the prompts are run one by one.
    """
    try:
        return llm.smc(batch.texts, batch.params, potential, twist=twist)
    except SMCError as error:
        if not error.errors:  # of none in particular
            return [error] * len(batch.prompts)
        populations = cast("Sequence[Population]", error.populations)  # where there is no error
        return [other if one is None else one for one, other in zip(error.errors, populations, strict=True)]
    except ValueError as error:
        if len(set(batch.prompts)) == 1:
            return [SMCError(str(error), kind="refused")] * len(batch.prompts)
        parts = [[k for k, i in enumerate(batch.prompts) if i == one] for one in dict.fromkeys(batch.prompts)]
        return [outcome for part in parts for outcome in run_batch(llm, _part(batch, part), potential, twist)]


def _part(batch: Batch, which: Sequence[int]) -> Batch:
    return Batch(batch.number, *([values[k] for k in which] for values in batch[1:]))  # type: ignore[arg-type]


def run_job(
    llm: Any, job: Job, potential: Potential | None, twist: str | None = None, finished: Collection[int] = ()
) -> Iterator[tuple[int, Outcome]]:
    """Runs a job on one engine, and yields (index of the prompt, what became of it), but for `finished` prompts."""
    with contextlib.nullcontext() if potential is None else llm.standing(potential):
        done = ((batch, run_batch(llm, batch, potential, twist)) for batch in job.batches(finished))
        yield from job.gather(done, finished)


def watched(found: Iterator[tuple[int, Outcome]], total: int, use_tqdm: bool) -> Iterator[tuple[int, Outcome]]:
    """Shows a progress bar over prompts."""
    if not use_tqdm:
        return found
    from tqdm.auto import tqdm

    return iter(tqdm(found, total=total, desc="prompts", file=sys.stderr))
