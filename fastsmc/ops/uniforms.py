"""uniforms: counter-based random numbers (Philox4x32-10); the arithmetic is in csrc/include/fastsmc/philox.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import custom_op, launch_cuda, pick_backend, split_scalar


def uniforms(
    n: int,
    *,
    seed: int,
    group: int,
    step: int | Tensor,
    stream: int,
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

    Raises:
        ValueError: naming the argument and its value.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    device = torch.device(device)
    step, step_at = split_scalar("step", step, device)
    for name, value, high in (
        ("n", n, 2**32 + 1), ("seed", seed, 2**64), ("group", group, 2**32), ("step", step, 2**32),
        ("stream", stream, 2**32),
    ):  # fmt: skip
        if not 0 <= value < high:
            raise ValueError(f"{name}={value!r}: must be an integer in [0, {high})")
    signed = seed - 2**64 if seed >= 2**63 else seed  # torch's integers are signed
    backend = pick_backend(backend, device, "cuda")
    return _uniforms(device, n, signed, group, step, step_at, stream, device, backend)


@custom_op("fastsmc::uniforms")
def _uniforms(
    n: int, seed: int, group: int, step: int, step_at: Tensor | None, stream: int, device: torch.device, backend: str
) -> Tensor:
    seed %= 2**64
    if backend == "torch":
        return _torch.uniforms(n, seed, group, step if step_at is None else step_at, stream, device)
    out = torch.empty(n, dtype=torch.float64, device=device)
    if backend == "cuda":
        address = 0 if step_at is None else step_at.data_ptr()
        launch_cuda(_C.cuda_uniforms, out.device, out.data_ptr(), n, seed, group, step, address, stream)
    else:
        _C.uniforms(out.data_ptr(), n, seed, group, step if step_at is None else int(step_at), stream)
    return out


@_uniforms.register_fake
def _(n, seed, group, step, step_at, stream, device, backend):
    return torch.empty(n, dtype=torch.float64, device=device)
