"""reindex: block tables and tail blocks follow the ancestors; the arithmetic is in csrc/include/fastsmc/reindex.cuh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import check_vector, custom_op, launch_cuda, pick_backend, split_scalar, values_are_checked

if TYPE_CHECKING:
    from fastsmc._C import CacheArgs, ReindexArgs

MAX_BLOCK_BYTES = 2**31 - 1


def reindex(
    table: Tensor,
    ancestors: Tensor,
    *,
    position: int | Tensor,
    block_size: int,
    caches: Sequence[Tensor],
    slot_dim: int | None = None,
    genealogy: Tensor | None = None,
    step: int | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Makes each moved row i (ancestors[i] != i) a copy of its parent a = ancestors[i], in place.

    Row r holds p tokens, p = `position` or position[r]. Full blocks of the parent are shared: table[i, :tail] =
    table[a, :tail] with tail = p // block_size, p the parent's. The partly filled block of column `tail`, if p %
    block_size > 0, is copied: slots [0, p % block_size) of block table[a, tail] of every cache go to block table[i,
    tail]. Survivors are never written, moved rows never read. Positions are not written: position[ancestors] is the
    caller's to take. Where a genealogy is given, genealogy[step] = ancestors.

    `position` and `step` may be tensors on the device and are read there when the op runs, so that a captured CUDA
    graph goes on from replay to replay. On a device nobody looks at values: moved rows whose ancestor breaks the
    in-place form or has a position out of range, blocks outside a cache, and steps out of range are left alone.

    Args:
        table: (N, C) int32, rows of block ids, unit column stride.
        ancestors: (N,) int64 in the in-place form of `resample`: ancestors[ancestors[i]] == ancestors[i].
        position: 0 to C * block_size, the next position to write: an integer or a 0-dim int64 tensor for all rows, or
            (N,) int32, one per row.
        block_size: slots per block.
        caches: tensors whose dimension 0 is the block (of any stride) and whose blocks are contiguous.
        slot_dim: the dimension of the caches that is the slot within a block; None: tail blocks are copied whole.
        genealogy: (T, N) int32, contiguous.
        step: 0 to T − 1, with a genealogy; an integer or a 0-dim int64 tensor.

    Raises:
        ValueError: naming the argument; nothing has been written then.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.int32:
        raise ValueError(f"table: must be an (N, C) int32 tensor, got {getattr(table, 'dtype', table)!r}")
    n, columns = table.shape
    device = table.device
    if table.stride(1) != 1 and columns > 1:
        raise ValueError(f"table: column stride {table.stride(1)} must be 1")
    ancestors = check_vector("ancestors", ancestors, torch.int64, device, n)
    if block_size < 1:
        raise ValueError(f"block_size={block_size!r}: must be at least 1")
    position, position_at = _check_position(position, n, columns, block_size, device)
    _check_caches(caches, device, block_size, slot_dim)
    step, step_at = _check_genealogy(genealogy, step, n, device)
    if values_are_checked(device):
        _check_values(table, ancestors, position, position_at, block_size, caches, slot_dim)
    _reindex(
        device, table, ancestors, position, position_at, block_size, list(caches), slot_dim, genealogy, step, step_at,
        pick_backend(backend, device, "cuda"),
    )  # fmt: skip


@custom_op("fastsmc::reindex", ("table", "caches", "genealogy"))
def _reindex(
    table: Tensor, ancestors: Tensor, position: int, position_at: Tensor | None, block_size: int,
    caches: Sequence[Tensor], slot_dim: int | None, genealogy: Tensor | None, step: int, step_at: Tensor | None,
    backend: str,
) -> None:  # fmt: skip
    if backend == "torch":
        _torch.reindex(
            table, ancestors, position if position_at is None else position_at, block_size, caches, slot_dim,
            genealogy, step if step_at is None else step_at,
        )  # fmt: skip
        return
    arguments = (
        _arguments(table, ancestors, position, position_at, block_size, genealogy, step, step_at),
        _cache_arguments(caches, slot_dim),
    )
    if backend == "cuda":
        launch_cuda(_C.cuda_reindex, table.device, *arguments)
    else:
        _C.reindex(*arguments)


@_reindex.register_fake
def _(*arguments):
    return None


def _arguments(
    table: Tensor, ancestors: Tensor, position: int, position_at: Tensor | None, block_size: int,
    genealogy: Tensor | None = None, step: int = 0, step_at: Tensor | None = None,
) -> ReindexArgs:  # fmt: skip
    """Gives what fastsmc._C takes in the place of a table, its ancestors, a position and a genealogy."""
    address = 0 if position_at is None else position_at.data_ptr()
    by_row = position_at is not None and position_at.dim() == 1
    return (
        table.data_ptr(), table.stride(0), table.shape[1], ancestors.data_ptr(), table.shape[0],
        position, 0 if by_row else address, address if by_row else 0, block_size,
        0 if genealogy is None else genealogy.data_ptr(), 0 if genealogy is None else genealogy.shape[0],
        step, 0 if step_at is None else step_at.data_ptr(),
    )  # fmt: skip


def _cache_arguments(caches: Sequence[Tensor], slot_dim: int | None) -> list[CacheArgs]:
    """Gives what fastsmc._C takes in the place of caches."""
    arguments = []
    for cache in caches:
        size, shape = cache.element_size(), cache.shape
        pieces = 1 if slot_dim is None else math.prod(shape[1:slot_dim])
        slot = 0 if slot_dim is None else math.prod(shape[slot_dim + 1 :]) * size
        piece = math.prod(shape[1 if slot_dim is None else slot_dim :]) * size
        arguments.append((cache.data_ptr(), cache.stride(0) * size, shape[0], pieces, piece, slot))
    return arguments


def _check_position(
    position: int | Tensor, n: int, columns: int, block_size: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """Checks one position or (N,), and gives it as (value, tensor), as `split_scalar` does."""
    allowed = f"must be in [0, {columns * block_size}], {columns} columns of {block_size} slots"
    if isinstance(position, Tensor) and position.dim() == 1:
        position = check_vector("position", position, torch.int32, device, n)
        if values_are_checked(device) and (row := _C.bad_position(position.data_ptr(), n, columns * block_size)) >= 0:
            raise ValueError(f"position[{row}]={int(position[row])}: {allowed}")
        return 0, position
    position, position_at = split_scalar("position", position, device)
    if not 0 <= position <= columns * block_size:
        raise ValueError(f"position={position!r}: {allowed}")
    return position, position_at


def _check_values(
    table: Tensor, ancestors: Tensor, position: int, position_at: Tensor | None, block_size: int,
    caches: Sequence[Tensor], slot_dim: int | None,
) -> None:  # fmt: skip
    n = table.shape[0]
    if (bad := _C.not_in_place(ancestors.data_ptr(), n)) >= 0:
        value = int(ancestors[bad])
        what = f"whose own ancestor is {int(ancestors[value])}" if 0 <= value < n else f"not in [0, {n})"
        raise ValueError(f"ancestors[{bad}]={value}, {what}: must be in the in-place form")
    arguments = _arguments(table, ancestors, position, position_at, block_size)
    if (row := _C.bad_tail(arguments, _cache_arguments(caches, slot_dim))) >= 0:
        parent = int(ancestors[row])
        if position_at is not None and position_at.dim() == 1:
            position = int(position_at[parent])
        tail = position // block_size
        raise ValueError(
            f"table: row {row} would copy block {table[parent, tail].item()} of row {parent} to block "
            f"{table[row, tail].item()}: must be two blocks within every cache"
        )


def _check_caches(caches: Sequence[Tensor], device: torch.device, block_size: int, slot_dim: int | None) -> None:
    for i, cache in enumerate(caches):
        if cache.device != device:
            raise ValueError(f"caches[{i}]: is on {cache.device}, table is on {device}")
        if cache.dim() < 1 or cache.shape[0] < 1 or not cache[0].is_contiguous():
            raise ValueError(f"caches[{i}]: each block cache[b] must be contiguous, strides are {cache.stride()}")
        if (size := cache[0].numel() * cache.element_size()) > MAX_BLOCK_BYTES:
            raise ValueError(f"caches[{i}]: a block has {size} bytes, at most {MAX_BLOCK_BYTES} are supported")
        if slot_dim is None:
            continue
        if not 1 <= slot_dim < cache.dim():
            raise ValueError(f"slot_dim={slot_dim!r}: must be in [1, {cache.dim()}), a dimension of caches[{i}]")
        if cache.shape[slot_dim] != block_size:
            raise ValueError(
                f"caches[{i}]: has {cache.shape[slot_dim]} slots in dimension slot_dim={slot_dim}, block_size is "
                f"{block_size}"
            )


def _check_genealogy(
    genealogy: Tensor | None, step: int | Tensor | None, n: int, device: torch.device
) -> tuple[int, Tensor | None]:
    """Checks genealogy and step, and gives the step as (value, tensor), as `split_scalar` does."""
    if (genealogy is None) != (step is None):
        raise ValueError("genealogy and step: must be given together")
    if genealogy is None or step is None:
        return 0, None
    if genealogy.dim() != 2 or genealogy.shape[1] != n or genealogy.dtype != torch.int32 or genealogy.device != device:
        raise ValueError(
            f"genealogy: must be (T, {n}) int32 on {device}, got {genealogy.dtype} {tuple(genealogy.shape)} on "
            f"{genealogy.device}"
        )
    if not genealogy.is_contiguous():
        raise ValueError("genealogy: must be contiguous")
    step, step_at = split_scalar("step", step, device)
    if not 0 <= step < genealogy.shape[0]:
        raise ValueError(f"step={step!r}: must be in [0, {genealogy.shape[0]}), the rows of genealogy")
    return step, step_at
