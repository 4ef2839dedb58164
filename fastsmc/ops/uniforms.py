"""uniforms: counter-based random numbers (Philox4x32-10); the arithmetic is in csrc/include/fastsmc/philox.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import (
    check_index,
    check_offsets,
    check_vector,
    custom_op,
    launch_cuda,
    pick_backend,
    read_address,
    split_scalar,
)


def uniforms(
    n: int,
    *,
    seed: int | Tensor,
    group: int | Tensor,
    step: int | Tensor,
    stream: int,
    offsets: Tensor | None = None,
    device: torch.device | str,
    backend: str | None = None,
) -> Tensor:
    """Makes (n,) float64 in [0, 1), one per particle: a function of (seed, group, step, stream, particle) only.

    Each has 53 bits, so none is 1. key = (low, high 32 bits of seed), counter = (particle, step, group, stream).

    Args:
        n: 0 to 2**32.
        seed: 0 to 2**64 - 1.
        group, step, stream: 0 to 2**32 - 1 each. `stream` separates the uses of numbers within one step. A step that is
            a 0-dim int64 tensor on `device` is read there, when the numbers are made: replays of a CUDA graph then do
            not repeat them.
        offsets: (G + 1,) int64 on `device`, from 0 up to n: G groups laid flat, group g at [offsets[g], offsets[g+1]).
            Its particles count from 0, as if it were alone. seed, group and step are (G,) int64 on `device` then; of a
            seed from 2**63 on, its 64 bits as a signed integer.

    Raises:
        ValueError: naming the argument and its value; values of tensors are only checked on the CPU, outside
            torch.compile.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    device = torch.device(device)
    backend = pick_backend(backend, device, "cuda")
    of_all, seeds, groups, steps = (0, 0, 0), None, None, None
    if offsets is None:
        step, steps = split_scalar("step", step, device)
        of_all = _check_integer("seed", seed, 64), _check_integer("group", group, 32), _check_integer("step", step, 32)
    else:
        if device.index is None and isinstance(offsets, Tensor) and offsets.device.type == device.type:
            device = offsets.device
        offsets = check_offsets(offsets, n, device)
        n_groups = offsets.shape[0] - 1
        seeds = check_vector("seed", seed, torch.int64, device, n_groups)
        groups = check_index("group", group, 2**32, device, n_groups)
        steps = check_index("step", step, 2**32, device, n_groups)
    if not 0 <= n <= 2**32:
        raise ValueError(f"n={n!r}: must be an integer in [0, {2**32}]")
    stream = _check_integer("stream", stream, 32)
    seed_of_all = of_all[0] - 2**64 if of_all[0] >= 2**63 else of_all[0]  # torch's integers are signed
    return _uniforms(device, n, seed_of_all, *of_all[1:], stream, seeds, groups, steps, offsets, device, backend)


def _check_integer(name: str, value: int | Tensor, bits: int) -> int:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: is a tensor, must be an integer in [0, {2**bits}) where there are no offsets")
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name}={value!r}: must be an integer in [0, {2**bits})")
    return value


@custom_op("fastsmc::uniforms")
def _uniforms(
    n: int, seed: int, group: int, step: int, stream: int, seeds: Tensor | None, groups: Tensor | None,
    steps: Tensor | None, offsets: Tensor | None, device: torch.device, backend: str,
) -> Tensor:  # fmt: skip
    seed %= 2**64
    if backend == "torch":
        return _torch.uniforms(
            n, seed if seeds is None else seeds, group if groups is None else groups, step if steps is None else steps,
            stream, offsets, device,
        )  # fmt: skip
    out = torch.empty(n, dtype=torch.float64, device=device)
    arguments = (
        seed, group, step, stream, read_address(seeds), read_address(groups), read_address(steps),
        read_address(offsets), 1 if offsets is None else offsets.shape[0] - 1,
    )  # fmt: skip
    if backend == "cuda":
        launch_cuda(_C.cuda_uniforms, out.device, out.data_ptr(), n, arguments)
    else:
        _C.uniforms(out.data_ptr(), n, arguments)
    return out


@_uniforms.register_fake
def _(n, seed, group, step, stream, seeds, groups, steps, offsets, device, backend):
    return torch.empty(n, dtype=torch.float64, device=device)
