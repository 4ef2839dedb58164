"""What an engine is started with: vLLM's arguments, completed and checked, and environment variables."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import numbers
import os
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import NoneType
from typing import Any

import torch
import vllm
from vllm import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_visible_memory_node

from fastsmc import models
from fastsmc.vllm import compat, machine, options

#: rows that an engine takes unless `max_num_seqs` says otherwise
DEFAULT_MAX_NUM_SEQS = 1024
#: vLLM's default on CPU, 128, makes every particle's private tail four times as large
DEFAULT_CPU_BLOCK_SIZE = 32


def engine_args(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Completes `fastsmc.LLM` arguments with the scheduler, the worker and the defaults that groups need.

    Raises:
        ValueError: for an argument that fastsmc sets itself, that neither it nor vLLM knows, or that is no number where
            vLLM takes one; for a value that an option of fastsmc cannot have.
    """
    for name in ("scheduler_cls", "worker_cls"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}={kwargs[name]!r}: fastsmc sets it itself")
    out = options.put_options(kwargs)
    _check_names_and_numbers(out)
    compat.check_arguments(out)
    compat.check_names(current_platform.device_type)
    settings = group_settings(out.get("max_num_batched_tokens"))
    return settings | {name: value for name, value in out.items() if name not in ("scheduler_cls", "worker_cls")}


def group_settings(max_num_batched_tokens: int | None) -> dict[str, Any]:
    """Returns the scheduler, the worker and fastsmc's defaults of other engine arguments, on this platform."""
    out: dict[str, Any] = {
        "scheduler_cls": "fastsmc.vllm.scheduler.make_scheduler",
        "max_num_seqs": min(DEFAULT_MAX_NUM_SEQS, max_num_batched_tokens or DEFAULT_MAX_NUM_SEQS),
    }
    if current_platform.is_cpu():
        return out | {"worker_cls": "fastsmc.vllm.worker_cpu.SMCCPUWorker", "block_size": DEFAULT_CPU_BLOCK_SIZE}
    if current_platform.is_cuda():
        return out | {"worker_cls": "fastsmc.vllm.worker.SMCGPUWorker"}
    raise compat.UnsupportedError(f"platform {current_platform.device_name}: fastsmc knows CPU and CUDA")


def _check_names_and_numbers(kwargs: Mapping[str, Any]) -> None:
    """Refuses what vLLM would stumble over deep inside, or in another process."""
    types = {field.name: field.type for field in dataclasses.fields(EngineArgs)}
    known = set(types) | set(inspect.signature(vllm.LLM).parameters) - {"model", "kwargs"}
    for name, value in kwargs.items():
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known.union(options.NAMES)), n=1)
            raise ValueError(f"{name}={value!r}: vllm.LLM has no such argument" + (f"; {near[0]}?" if near else ""))
        kinds = set(typing.get_args(types.get(name))) or {types.get(name)}
        number = numbers.Real if float in kinds else numbers.Integral
        if value is not None and kinds <= {bool, int, float, NoneType} and not isinstance(value, number):
            kind = "a number" if float in kinds else "an integer" if int in kinds else "a bool"
            raise ValueError(f"{name}={value!r}: must be {kind}")


def surroundings(n_ranks: int) -> dict[str, str]:
    """Returns the environment variables under which an engine starts here; what the user has set stands."""
    settings = models.cache_settings()
    if not current_platform.is_cpu():
        return settings
    settings |= machine.process_settings(machine.shm_free(), n_ranks, os.environ)
    quota = machine.group_cores()
    in_process = (os.environ | settings).get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    if not in_process or n_ranks > 1:
        settings |= threads(n_ranks)
    elif quota is not None and quota < torch.get_num_threads() and not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(max(1, round(quota)))
    return settings


def threads(n_ranks: int) -> dict[str, str]:
    """Returns the environment variables that give an engine's threads their cores here; {} on a GPU."""
    if not current_platform.is_cpu():
        return {}
    cores = [machine.Core(cpu.id, cpu.physical_core, cpu.numa_node) for cpu in get_allowed_cpu_list()]
    return machine.thread_settings(cores, get_visible_memory_node(), n_ranks, machine.group_cores(), os.environ)


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Sets environment variables within."""
    old = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
