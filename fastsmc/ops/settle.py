"""`settle`: which slots of a model the distinct histories of particles go to.

A slot holds one history of its group: keys and values in a row of a block table, or a row of a cache. Particles with
the same tokens share one until they draw different tokens; then all but one of the new histories go to slots of their
own, as copies. So a resampling moves nothing, the first step runs one row, and a pass costs distinct histories, not
particles. A group's N slots always suffice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import check_offsets, check_vector, custom_op, pick_backend, read_address, values_are_checked


class Histories(NamedTuple):
    """Says where the distinct histories of M particles go; slots are counted through all groups, unless said.

    Attributes:
        ancestors: (M,) int64 for the slots, in the in-place form: copies that must be made first.
        slots: (M,) int64, the slot of a particle's history within its group; its old one where it has none.
        tokens: (M,) int64 for the slots, the token that a history appends.
        rows: (M,) int64, a particle's history among all, in the order of slots; −1 where it has none.
        present: (M,) bool, slots that hold a history.
        copied: (M,) bool, slots that become copies.
    """

    ancestors: Tensor
    slots: Tensor
    tokens: Tensor
    rows: Tensor
    present: Tensor
    copied: Tensor


def settle(slots: Tensor, tokens: Tensor, wanted: Tensor, offsets: Tensor, *, backend: str | None = None) -> Histories:
    """Gives every distinct history (slot, token) of the particles in `wanted` a slot of its own.

    Of the histories that come from one slot the one of the smallest token stays in place; the others take the vacant
    slots of their group, both in ascending order. Particles outside `wanted` lose their histories. Shapes are fixed:
    on a device nobody waits.

    Args:
        slots: (M,) int64, the slot of each particle within its group of N, in [0, N).
        tokens: (M,) int64 in [0, 2**32 − 1), the last token of each particle; those outside `wanted` are not looked at.
        wanted: (M,) bool.
        offsets: (G + 1,) int64, from 0 up to M: group g has particles and slots [offsets[g], offsets[g + 1]).
        backend: 'cpu', 'torch', or None for the device's own.

    Raises:
        ValueError: naming the argument; values are only checked on the CPU, outside torch.compile.
    """
    device = slots.device
    slots = check_vector("slots", slots, torch.int64, device)
    n = slots.shape[0]
    tokens = check_vector("tokens", tokens, torch.int64, device, n)
    wanted = check_vector("wanted", wanted, torch.bool, device, n)
    offsets = check_offsets(offsets, n, device)
    backend = pick_backend(backend, device, "torch")
    if values_are_checked(device):
        groups = offsets.shape[0] - 1
        if (bad := _C.bad_slot(read_address(slots), read_address(offsets), groups)) >= 0:
            raise ValueError(f"slots[{bad}]={int(slots[bad])}: must be a slot of its group")
    return Histories(*_settle(device, slots, tokens, wanted, offsets, backend))


@custom_op("fastsmc::settle")
def _settle(
    slots: Tensor, tokens: Tensor, wanted: Tensor, offsets: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if backend == "torch":
        return _torch.settle(slots, tokens, wanted, offsets)
    out = _empty(slots)
    inputs = read_address(slots), read_address(tokens), read_address(wanted), read_address(offsets)
    _C.settle(*inputs, offsets.shape[0] - 1, [x.data_ptr() for x in out])
    return out


@_settle.register_fake
def _(slots, tokens, wanted, offsets, backend):
    return _empty(slots)


def _empty(slots: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    ancestors, of, tokens, rows = torch.empty((4, *slots.shape), dtype=torch.int64, device=slots.device)
    present, copied = torch.empty((2, *slots.shape), dtype=torch.bool, device=slots.device)
    return ancestors, of, tokens, rows, present, copied
