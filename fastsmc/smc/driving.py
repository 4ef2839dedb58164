"""The simplest driver: one group after the other, over a model that holds the slots of one group."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastsmc.p0 import P0
from fastsmc.population import Population
from fastsmc.smc.cohort import Scores, arrange, finish
from fastsmc.smc.group import Group


class RowModel(Protocol):
    """Says what a group of N particles needs: N slots, each for the prompt and a history of as many tokens."""

    def first(self) -> tuple[Tensor, Tensor | None]:
        """Gives logits (1, V) and hidden state (1, H) after the prompt, which slot 0 holds from now on."""

    def next(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """Appends tokens (R,) int64 to distinct slots (R,) int64; gives their logits (R, V), hidden states (R, H).

        Slots are ascending. Unless `reindex` was called since the last call, they are among those of that call.
        """

    def reindex(self, ancestors: Tensor) -> None:
        """Makes slot i a copy of slot ancestors[i], (N,) int64 with ancestors[ancestors[i]] == ancestors[i]."""

    def continuation_log_prob(
        self, tokens: Tensor, slots: Tensor, continuation: list[int], p0: P0, before: int, given: int = 0
    ) -> Tensor:
        """Computes (R,) float64 log p0(continuation | slot, token); tokens (R,) are drawn but not yet appended.

        `before` tokens were generated, those included. The first `given` tokens of the continuation are not scored.
        """


@torch.inference_mode()
def take_step(group: Group, model: RowModel) -> None:
    """Takes one step of a group over its model.

    Raises:
        SMCError: the potential raised, or gave a wrong shape, NaN or +inf; the model gave NaN.
    """

    def score(scores: Scores) -> Tensor:
        wants, (continuation,), given = scores
        if wants.moves is not None:
            model.reindex(wants.moves)
        return model.continuation_log_prob(wants.tokens, wants.slots, continuation, group.p0, group.t + 1, given)

    (cohort,) = arrange([group])
    cohort.scorer = score
    wants = cohort.wants()
    if wants.moves is not None:
        model.reindex(wants.moves)
    logits, hidden = model.first() if group.t == 0 else model.next(wants.tokens, wants.slots)
    finish(cohort.take(logits, hidden), score)
    if group.error is not None:
        raise group.error


def run_group(group: Group, model: RowModel) -> Population:
    """Takes all steps of a group over its model. SMCError: as `take_step`."""
    while not group.done:
        take_step(group, model)
    return group.population()
