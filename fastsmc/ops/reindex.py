"""reindex: block tables and tail blocks follow the ancestors; arithmetic in csrc/include/fastsmc/reindex.cuh."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import check_vector, pick_backend


def reindex(
    table: Tensor,
    ancestors: Tensor,
    *,
    n_shared: int,
    tail: int | None,
    caches: Sequence[Tensor],
    spans: np.ndarray | None = None,
    active: Tensor | None = None,
    backend: str | None = None,
) -> int:
    """Makes each moved row i (ancestors[i] != i) a copy of its parent a = ancestors[i], in place.

    table[i, :n_shared] = table[a, :n_shared]; and where active[a], block table[a, tail] of every cache is copied to
    block table[i, tail]: its used bytes only, when `spans` says which. Survivors are never written, moved rows never
    read.

    Args:
        table: (N, C) int32, rows of block ids, unit column stride.
        ancestors: (N,) int64 in the in-place form of `resample`: ancestors[ancestors[i]] == ancestors[i].
        n_shared: columns that are shared with the parent, 0 to C.
        tail: column of the partly filled block, in [n_shared, C); None: nothing to copy.
        caches: tensors whose dimension 0 is the block (of any stride) and whose blocks are contiguous.
        spans: (S, 2) int64 of (offset, size) in bytes within a block, the same in every cache; None: whole blocks.
        active: (N,) bool, rows that have a tail worth copying; default all.

    Returns:
        Number of rows whose tail block was copied (in every cache).

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
    _check_in_place(ancestors)
    if not 0 <= n_shared <= columns:
        raise ValueError(f"n_shared={n_shared!r}: must be in [0, {columns}], the columns of table")
    if tail is not None and not n_shared <= tail < columns:
        raise ValueError(f"tail={tail!r}: must be in [n_shared, columns of table) = [{n_shared}, {columns})")
    if active is not None:
        active = check_vector("active", active, torch.bool, device, n)
    if tail is None:
        caches = ()
    pieces = _check_caches(caches, device, spans)
    if pick_backend(backend, device) == "torch":
        return _torch.reindex(table, ancestors, n_shared, tail, caches, pieces, active)
    copied = _C.reindex(
        table.data_ptr(), table.stride(0), ancestors.data_ptr(), n, n_shared, -1 if tail is None else tail,
        0 if active is None else active.data_ptr(),
        [(c.data_ptr(), c.stride(0) * c.element_size(), c.shape[0]) for c in caches], pieces,
    )  # fmt: skip
    if copied < 0:
        row = -1 - copied
        parent = int(ancestors[row])
        raise ValueError(
            f"table: row {row} would copy block {table[parent, tail].item()} of row {parent} to block "
            f"{table[row, tail].item()}: must be two blocks within every cache"
        )
    return copied


def _check_in_place(ancestors: Tensor) -> None:
    n = ancestors.shape[0]
    if ancestors.device.type == "cpu":
        bad = _C.not_in_place(ancestors.data_ptr(), n)
    else:
        outside = (ancestors < 0) | (ancestors >= n)
        wrong = outside | (ancestors[ancestors.clamp(0, n - 1)] != ancestors)
        bad = int(wrong.int().argmax()) if wrong.any() else -1
    if bad >= 0:
        value = int(ancestors[bad])
        what = f"whose own ancestor is {int(ancestors[value])}" if 0 <= value < n else f"not in [0, {n})"
        raise ValueError(f"ancestors[{bad}]={value}, {what}: must be in the in-place form")


def _check_caches(
    caches: Sequence[Tensor], device: torch.device, spans: np.ndarray | None
) -> list[list[tuple[int, int]]]:
    """The spans of each cache."""
    used = None
    if spans is not None:
        spans = np.asarray(spans)
        if spans.ndim != 2 or spans.shape[1] != 2 or spans.dtype != np.int64:
            raise ValueError(f"spans: must be (S, 2) int64, got {spans.dtype} {spans.shape}")
        if spans.size and spans.min() < 0:
            raise ValueError(f"spans: has a negative value {spans.min()}")
        used = [tuple(span) for span in spans.tolist()]
    pieces = []
    for i, cache in enumerate(caches):
        if cache.device != device:
            raise ValueError(f"caches[{i}]: is on {cache.device}, table is on {device}")
        if cache.dim() < 1 or cache.shape[0] < 1 or not cache[0].is_contiguous():
            raise ValueError(f"caches[{i}]: each block cache[b] must be contiguous, strides are {cache.stride()}")
        size = cache[0].numel() * cache.element_size()
        if used is not None and any(offset + nbytes > size for offset, nbytes in used):
            raise ValueError(f"spans: reach beyond the {size} bytes of a block of caches[{i}]")
        pieces.append([(0, size)] if used is None else used)
    return pieces
