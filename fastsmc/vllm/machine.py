"""What the machine lets an engine on the CPU have: a control group's memory and cores, threads, shared memory.

A process seldom has the whole machine: a control group may limit memory and processor time below what the machine has,
memory nodes may be fewer than ranks, and /dev/shm may be missing. This module reads those limits and chooses settings
by them; it imports nothing of vLLM, so that all of it can be tried with made-up figures. What memory a step and a KV
cache take is reckoned in `fastsmc.vllm.capacity`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

#: the most cores per rank at which none is left to the scheduler; see `thread_settings`
FEW_CORES = 4
#: bytes of /dev/shm that vLLM wants free before it makes a queue between its processes (10 chunks of 24 MiB in a sparse
#: file, of which a run touches under 1 MiB), and what each tensor-parallel rank takes for sums
LEAST_SHM, SHM_PER_RANK = 240 << 20, 4 << 20


# ------------------------------------------------------------------------------------------------------ control groups
def group_memory_free(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> int | None:
    """Returns the bytes that this process's control group and those above it may still take; None: no limit.

    Pages of files that nobody uses count as free: the kernel gives them back first.
    """
    free = []
    for folder, names in _groups("memory", proc, root):
        limit, usage, idle = (
            ("memory.max", "memory.current", "inactive_file")
            if names == 2
            else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        )
        most, used = _number(folder / limit), _number(folder / usage)
        if most is None or used is None or most >= 1 << 60:  # version 1 says "no limit" by a huge number
            continue
        free.append(max(0, most - used + _entry(folder / "memory.stat", idle)))
    return min(free, default=None)


def group_cores(proc: str = "/proc/self/cgroup", root: str = "/sys/fs/cgroup") -> float | None:
    """Returns the cores' worth of processor time that this process's control group may use; None: no limit."""
    cores = []
    for folder, names in _groups("cpu", proc, root):
        if names == 2:
            quota, _, period = (_text(folder / "cpu.max") or "max").partition(" ")
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us") or "-1", _text(folder / "cpu.cfs_period_us") or ""
        if quota.isdecimal() and period.isdecimal() and int(period):
            cores.append(int(quota) / int(period))
    return min(cores, default=None)


def _groups(controller: str, proc: str, root: str) -> Iterator[tuple[Path, int]]:
    """Yields the directory of this process's control group and of each above it, and the interface's version (1, 2)."""
    for line in (_text(Path(proc)) or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops, version = [Path(root), Path(root, "unified")], 2
        elif controller in controllers.split(","):
            tops, version = [Path(root, controllers), Path(root, controller)], 1
        else:
            continue
        top = next((top for top in tops if top.is_dir()), None)
        # within a container the path may be the host's, and only the mount's root be there
        while top is not None:
            if (folder := top / path.lstrip("/")).is_dir():
                yield folder, version
            if path in ("", "/"):
                break
            path = os.path.dirname(path)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text and text.isdecimal() else None


def _entry(path: Path, name: str) -> int:
    lines = (line.split() for line in (_text(path) or "").splitlines())
    return next((int(line[1]) for line in lines if len(line) == 2 and line[0] == name), 0)


# -------------------------------------------------------------------------------------------------------------- threads
class Core(NamedTuple):
    """A logical CPU that this process may run on."""

    id: int
    physical: int
    node: int


def thread_settings(
    cores: Sequence[Core], memory_nodes: Sequence[int], n_ranks: int, quota: float | None, env: Mapping[str, str]
) -> dict[str, str]:
    """Returns the environment variables by which vLLM's workers get their threads; {} leaves it to vLLM and the user.

    vLLM binds rank r to the physical cores of memory node r and takes one core per rank off for its scheduler, which
    has little to do when requests are groups. On two cores the model then has one: 601 against 933 tokens/s at N = 64
    (bench/results/smc_cpu_one_core.json, smc_cpu.json). With both, scheduler and model get in each other's way, and
    22 % of the double is lost: about what one core of five or six would bring. So up to `FEW_CORES` cores per rank all
    go to the model, and on larger machines vLLM's choice stands. Moreover:

    - With fewer memory nodes than ranks vLLM refuses to start; the cores are then split evenly.
    - Under a quota of processor time (containers) as many threads as the quota allows are not bound: the cores belong
      to others as well. More threads would wait for each other, stopped in turn.
    - OMP_NUM_THREADS below the number of cores holds: vLLM would overrule it when it binds.

    Args:
        cores: what the process may run on.
        memory_nodes: NUMA nodes that its memory may come from.
        n_ranks: tensor-parallel ranks.
        quota: cores' worth of processor time; None: no limit.
        env: the environment. VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_NUM_OF_RESERVED_CPU are the user's choice.
    """
    bind, threads = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"
    if any(env.get(name) for name in (bind, "VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_SIM_MULTI_NUMA")):
        return {}
    siblings: dict[tuple[int, int], Core] = {}
    for core in sorted(cores):
        siblings[core.node, core.physical] = core  # the last of a physical core's, as vLLM does
    usable = sorted(siblings.values(), key=lambda core: (core.node, core.id))
    free_threads = {bind: "nobind", "KMP_BLOCKTIME": env.get("KMP_BLOCKTIME") or "5"}  # as vLLM has it when it binds
    wish = env.get(threads, "")
    if wish.isdecimal() and 0 < int(wish) * n_ranks < len(usable):
        return free_threads
    most = len(usable) if quota is None else min(len(usable), max(1, round(quota)))
    if most < max(len(usable), n_ranks):
        return free_threads | {threads: str(max(1, most // n_ranks))}
    nodes = [node for node in memory_nodes if any(core.node == node for core in usable)]
    if len(nodes) >= n_ranks:
        split = [[core.id for core in usable if core.node == node] for node in nodes[:n_ranks]]
        if any(len(ids) > FEW_CORES for ids in split):
            return {}
    else:
        edges = [len(usable) * rank // n_ranks for rank in range(n_ranks + 1)]
        split = [[core.id for core in usable[a:b]] for a, b in pairwise(edges)]
    return {bind: "|".join(",".join(map(str, ids)) for ids in split)}


# ------------------------------------------------------------------------------------------------------- shared memory
def shm_free(path: str = "/dev/shm") -> int:
    """Returns the free bytes of the file system for shared memory, 0 where there is none or it cannot be written."""
    try:
        space = os.statvfs(path)
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize if os.access(path, os.W_OK) else 0


def process_settings(free: int, n_ranks: int, env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables that keep an engine in this process where /dev/shm has too few `free` bytes.

    Raises:
        ValueError: several ranks, which need it.
    """
    needed = LEAST_SHM + SHM_PER_RANK * n_ranks
    if free >= needed or (n_ranks == 1 and env.get("VLLM_ENABLE_V1_MULTIPROCESSING")):
        return {}
    if n_ranks > 1:
        raise ValueError(
            f"tensor_parallel_size={n_ranks}: its processes need {needed >> 20} MiB of /dev/shm, which has "
            f"{free >> 20} MiB free (a container's --shm-size)"
        )
    return {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
