"""Groups that the captured driver runs inside vLLM, without a graph of its own (engine option `captured_steps`).

    runner → CapturedMember.run → CapturedGroup.advance → CapturedModel.forward → Model.forward

A step has fixed shapes and asks the device nothing, so the host runs ahead of it, over whatever `Model` replays. The
host waits once per order, to hear whether the group is over, and once per column of blocks, to hear how many of the
group's blocks nobody reads any more. A group's blocks stay its own to its end, since the host does not know which of
them those are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc.potentials import Potential
from fastsmc.smc import GroupEngine
from fastsmc.smc.captured import CapturedGroup, why_not_captured
from fastsmc.vllm.messages import GroupResult, GroupStart
from fastsmc.vllm.model import Model
from fastsmc.vllm.passes import Batch


class CapturedModel:
    """Is vLLM's model as one captured group calls it: a `smc.captured.PagedModel`."""

    def __init__(self, model: Model, prompt_len: int) -> None:
        self.block_size, self.slot_dim = model.block_size, model.slot_dim
        self.caches: Sequence[Tensor] = model.caches
        self._model, self._length = model, prompt_len  # tokens of a row at the next call, as the host counts

    def forward(self, tokens: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        n = len(tokens)
        if n == 1:  # kernels compute one row otherwise than several (`Batch.part`)
            tokens, table = tokens.repeat(2), table.repeat(2, 1)
        rows = len(tokens)
        block = table.long().index_select(1, (position // self.block_size)[None])[:, 0]
        slots = block * self.block_size + position % self.block_size
        lengths = (position + 1).int().repeat(rows)
        logits, hidden = self._model.forward(
            Batch(tokens, position.repeat(rows), slots, table, lengths, max_length=self._length)
        )
        self._length += 1
        return logits[:n], hidden[:n]


class CapturedMember(NamedTuple):
    """Is a captured group in a worker."""

    group: CapturedGroup
    start: GroupStart

    @classmethod
    def begin(
        cls, model: Model, potential: Potential | None, engine: GroupEngine | None, start: GroupStart, blocks: list[int]
    ) -> CapturedMember:
        """Starts a group, for which `holds` has been asked, with its first blocks."""
        pool = torch.tensor(blocks, dtype=torch.int32, device=model.device)
        paged = CapturedModel(model, len(start.prompt))
        group = CapturedGroup(
            start.params, paged, potential, start.prompt, start.prompt_blocks, pool, start.stop_token_ids, engine
        )
        return cls(group, start)

    def run(self, n_steps: int, result: GroupResult) -> None:
        """Takes up to `n_steps` steps, fewer where the group is over or needs blocks, as the result then says.

        Raises:
            SMCError: the potential raised, or answered with something that is no answer.
        """
        group = self.group
        for _ in range(min(n_steps, group.params.max_tokens - group.t)):
            group.advance()
            if group.must_open and (need := group.missing()):
                result.need = need
                break
        group.look()


def holds(potential: Potential | None, start: GroupStart) -> bool:
    """Says whether the captured driver can run a group, and knows all that it is asked for."""
    if start.exact is not None or start.adapter is not None or start.progress or start.stream_tokens:
        return False
    if start.intervention is not None or start.factual is not None or start.keep_logits is not None:
        return False
    scores = potential is not None and potential.lookahead > 0
    return not scores and why_not_captured(start.params, potential) is None
