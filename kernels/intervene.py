"""intervene in Triton: one program per row adds its slot's map; see csrc/include/fastsmc/intervene.cuh.

A program holds its source row and the row's change in registers, so it reads x before it writes it, whichever of the
two the source is. It reads each of its factors once; rows of one slot find them in the second-level cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastsmc.kernels.launch import on_device
from torch import Tensor


@triton.jit
def intervene_row(
    x, x_stride, source, source_stride, slots, offsets, down, up, shift, finite, width, source_width,
    BLOCK: tl.constexpr, SOURCE_BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    s = tl.load(slots + r)
    if s >= 0:
        h, k = tl.arange(0, BLOCK), tl.arange(0, SOURCE_BLOCK)
        in_x, in_source = h < width, k < source_width
        y = tl.load(source + r * source_stride + k, mask=in_source, other=0.0).to(tl.float32)
        change = tl.load(shift + s * width + h, mask=in_x, other=0.0)
        for f in range(tl.load(offsets + s), tl.load(offsets + s + 1)):
            dot = tl.sum(y * tl.load(down + f * source_width + k, mask=in_source, other=0.0))
            change += dot * tl.load(up + f * width + h, mask=in_x, other=0.0)
        here = x + r * x_stride + h
        after = (tl.load(here, mask=in_x, other=0.0).to(tl.float32) + change).to(x.dtype.element_ty)
        tl.store(here, after, mask=in_x)
        if finite is not None:
            bad = tl.where(in_x & ~(tl.abs(after.to(tl.float32)) < float("inf")), 1, 0)
            if tl.sum(bad) > 0:
                tl.store(finite + s, False)


def warps(block: int, source_block: int) -> int:
    """Says how many warps a row takes: 16 elements per thread, of the wider of x and its source, up to 16 warps."""
    return min(16, max(1, max(block, source_block) // 512))


def intervene(
    x: Tensor, source: Tensor, slots: Tensor, offsets: Tensor, down: Tensor, up: Tensor, shift: Tensor,
    finite: Tensor | None,
) -> None:  # fmt: skip
    """Maps the rows of x in place, as fastsmc.ops.intervene says."""
    if x.shape[0] == 0:
        return
    block, source_block = (triton.next_power_of_2(t.shape[1]) for t in (x, source))
    with on_device(x.device):
        intervene_row[(x.shape[0],)](
            x, x.stride(0), source, source.stride(0), slots, offsets, down, up, shift,
            None if finite is None else finite.view(torch.int8), x.shape[1], source.shape[1],
            BLOCK=block, SOURCE_BLOCK=source_block, num_warps=warps(block, source_block),
        )  # fmt: skip
