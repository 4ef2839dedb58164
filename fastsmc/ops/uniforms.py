"""uniforms: counter-based random numbers (Philox4x32-10), arithmetic in csrc/include/fastsmc/philox.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import pick_backend


def uniforms(
    n: int, *, seed: int, group: int, step: int, stream: int, device: torch.device | str, backend: str | None = None
) -> Tensor:
    """(n,) float64 in [0, 1): one number per particle, a function of (seed, group, step, stream, particle) only.

    53 bits each, so never 1. key = (low, high 32 bits of seed), counter = (particle, step, group, stream).

    Args:
        n: 0 to 2**32.
        seed: 0 to 2**64 - 1.
        group, step, stream: 0 to 2**32 - 1 each. `stream` separates the uses of numbers within one step.

    Raises:
        ValueError: naming the argument and its value.

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    for name, value, high in (
        ("n", n, 2**32 + 1), ("seed", seed, 2**64), ("group", group, 2**32), ("step", step, 2**32),
        ("stream", stream, 2**32),
    ):  # fmt: skip
        if not 0 <= value < high:
            raise ValueError(f"{name}={value!r}: must be an integer in [0, {high})")
    device = torch.device(device)
    if pick_backend(backend, device) == "torch":
        return _torch.uniforms(n, seed, group, step, stream, device)
    out = torch.empty(n, dtype=torch.float64)
    _C.uniforms(out.data_ptr(), n, seed, group, step, stream)
    return out
