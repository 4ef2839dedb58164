"""The particles of a cohort: tensors of one row per particle, the groups one behind the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

#: what each particle has, by what `follow` takes from its ancestor and what it does not: numbers of 64 bits, then flags
_FOLLOWING = (
    ("log_psi", "log_prob", "lengths", "last_tokens", "slots", "rows", "segments", "within"),
    ("finished", "paused", "stopped"),
)
_OWN = ("log_w", "rank", "count"), ("retained",)
_FLOATS = ("log_psi", "log_prob", "log_w")


class Particles:
    """Holds M particles; every attribute is a tensor (M,), which is only ever written to in place.

    Attributes:
        log_w: log weight since the last resampling.
        log_psi: the log ψ that is already in the weight.
        log_prob: log p0 of the generated tokens.
        lengths: generated tokens.
        finished: ended particles.
        stopped: those of them that ended by a stop token, a stop string or their potential, not by their length.
        paused: particles that wait for a boundary: their segment has ended, or they have ended since the last one.
        last_tokens: token of the last step, −1 where there was none; those that wait keep theirs.
        slots: which slot of its group holds a particle's history, without its last token.
        rows: which row of the cohort's logits is a particle's; −1 where it went through the model earlier.
        segments: that have ended, with the particle if nowhere else.
        within: tokens of the segment that has not.
        retained: particles that hold an exact sample of the target.
        rank, count: a particle's place among its siblings, for the strata of the next draw.
    """

    log_psi: Tensor
    log_prob: Tensor
    lengths: Tensor
    finished: Tensor
    paused: Tensor
    stopped: Tensor
    last_tokens: Tensor
    slots: Tensor
    rows: Tensor
    segments: Tensor
    within: Tensor
    log_w: Tensor
    retained: Tensor
    rank: Tensor
    count: Tensor

    def __init__(self, size: int, device: torch.device) -> None:
        of_kinds = zip(_FOLLOWING + _OWN, (torch.int64, torch.bool) * 2, strict=True)
        self._blocks = [torch.zeros((len(names), size), dtype=dtype, device=device) for names, dtype in of_kinds]
        self._view()
        self.count.fill_(1)

    def _view(self) -> None:
        """Makes the attributes, rows of the blocks."""
        for names, block in zip(_FOLLOWING + _OWN, self._blocks, strict=True):
            for name, row in zip(names, block, strict=True):
                setattr(self, name, row.view(torch.float64) if name in _FLOATS else row)

    @classmethod
    def joined(cls, parts: Iterable[tuple[Particles, slice]]) -> Particles:
        """Copies parts of others into one."""
        out, parts = cls.__new__(cls), list(parts)
        all_blocks = ([block[:, part] for block in particles._blocks] for particles, part in parts)
        out._blocks = [torch.cat(blocks, dim=1) for blocks in zip(*all_blocks, strict=True)]
        out._view()
        return out

    def follow(self, ancestors: Tensor) -> None:
        """Makes each particle a copy of its ancestor (M,) int64, but for its weight: the one gather of a resampling."""
        for block in self._blocks[: len(_FOLLOWING)]:
            block.copy_(block.index_select(1, ancestors))

    @property
    def idle(self) -> Tensor:
        """Marks particles that have ended or wait, (M,) bool."""
        return self._blocks[1].any(0)


class Layout:
    """Says which particles are whose: group g has particles [offsets[g], offsets[g + 1]).

    Attributes:
        sizes, bounds: as lists of int; bounds has a last entry, M.
        offsets: the same as (G + 1,) int64.
        group_of, start, local: (M,) int64: a particle's group, that group's first particle, the place within it.
    """

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        self.sizes, self.bounds = list(sizes), [0]
        for size in sizes:
            self.bounds.append(self.bounds[-1] + size)
        self.offsets = torch.tensor(self.bounds, device=device)
        count = torch.tensor(self.sizes, device=device)
        self.group_of = torch.arange(len(sizes), device=device).repeat_interleave(count, output_size=self.bounds[-1])
        self.start = self.offsets[self.group_of]
        self.all = torch.arange(self.bounds[-1], device=device)
        self.local = self.all - self.start

    def part(self, g: int) -> slice:
        return slice(self.bounds[g], self.bounds[g + 1])

    def of(self, values: Tensor) -> Tensor:
        """Spreads one value per group (G,) over its particles: (M,), or (1,), which is as good, where G is 1."""
        return values if len(self.sizes) == 1 else values[self.group_of]

    def counts(self, flags: Tensor) -> Tensor:
        """Counts set flags (M,) or (M, K) bool by group: (G,) or (G, K) int64."""
        if len(self.sizes) == 1:
            return flags.sum(0, keepdim=True)
        out = torch.zeros((len(self.sizes), *flags.shape[1:]), dtype=torch.int64, device=flags.device)
        return out.index_add_(0, self.group_of, flags.long())

    def every(self, flags: Tensor) -> Tensor:
        """Says of each group whether all its flags are set: (G,) bool."""
        return flags.all(0, keepdim=True) if len(self.sizes) == 1 else self.counts(~flags) == 0
