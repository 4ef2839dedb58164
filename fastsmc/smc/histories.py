"""Histories: particles with the same tokens share one slot of the model, until they draw different ones.

A slot holds one history of its group: keys and values in a row of a block table, or a row of a cache. Where particles
of one slot have drawn different tokens, all but one of the new histories go to slots of their own, as copies. So a
resampling moves nothing, the first step runs one row, and a pass costs distinct histories, not particles. A group's N
slots always suffice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc.smc.particles import Layout, Particles


class Histories(NamedTuple):
    """Says where the distinct histories of M particles go; slots are counted through all groups of a cohort.

    Attributes:
        ancestors: (M,) int64 for the slots, in the in-place form: copies that must be made first.
        present: (M,) bool, slots that hold a history.
        tokens: (M,) int64, the token that each of those appends.
        rows: (M,) int64, a particle's history among those, in the order of slots; −1 where it has none.
        copied: (M,) bool, slots that become copies.
        slots: (M,) int64, the slot of a particle's history within its group.
        first_rows: (M,) int64, the row of the first history of its group.
    """

    ancestors: Tensor
    present: Tensor
    tokens: Tensor
    rows: Tensor
    copied: Tensor
    slots: Tensor
    first_rows: Tensor


def settle(particles: Particles, wanted: Tensor, layout: Layout) -> Histories:
    """Gives every distinct history (slot, last token) of particles in `wanted` (M,) bool a slot of its own.

    Of the histories that come from one slot the one of the smallest token stays in place; particles outside `wanted`
    lose their histories. Shapes are fixed: nothing is asked of the device.
    """
    everyone, size = layout.all, len(layout.all)
    slots = particles.slots + layout.start
    last = torch.where(wanted, particles.last_tokens, (1 << 32) - 1)  # the others come behind those of their slot
    keys = slots << 32 | last
    keys, order = torch.sort(keys, stable=True)
    parents, tokens, there = slots[order], particles.last_tokens[order], wanted[order]
    first = there.clone()  # of the particles with one history
    first[1:] &= keys[1:] != keys[:-1]
    moves = first.clone()
    moves[:1] = False
    moves[1:] &= parents[1:] == parents[:-1]  # else it stays in place
    used = torch.zeros(size + 1, dtype=torch.bool, device=slots.device)
    used[torch.where(there, parents, size)] = True
    vacant = torch.argsort(layout.group_of * 2 + used[:size], stable=True)  # in each group the vacant ones first
    start = layout.start[order]
    earlier = moves.cumsum(0) - moves.long()
    before = torch.zeros(size + 1, dtype=torch.int64, device=slots.device)  # copies of the groups before
    before[1:] = moves.cumsum(0)
    target = torch.where(moves, vacant[start + earlier - before[start]], parents)
    # the histories behind a first one are its own: each takes the slot of the last first one
    leader = torch.where(first, everyone, 0).cummax(0).values
    target = target[leader]
    fate = torch.where(first, target, size)
    ancestors = torch.cat([everyone, everyone[:1]])
    ancestors[fate] = parents
    copied, present = torch.zeros_like(used), torch.zeros_like(used)
    copied[torch.where(moves, target, size)] = True
    present[fate] = True
    appended = torch.zeros(size + 1, dtype=torch.int64, device=slots.device)
    appended[fate] = tokens
    settled = torch.empty_like(slots)
    settled[order] = torch.where(there, target, parents)
    index = present[:size].cumsum(0) - 1
    first_rows = (index + 1 - present[:size].long())[layout.start]
    rows = torch.where(wanted, index[settled], -1)
    return Histories(
        ancestors[:size], present[:size], appended[:size], rows, copied[:size], settled - layout.start, first_rows
    )
