"""Potentials of a server's operator, as the tests of the server name them; most of them misbehave."""

from __future__ import annotations

import time

import torch

from fastsmc import Potential


class _Flat(Potential):
    """Prefers nothing."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def complete(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


class Fails(_Flat):
    """Raises at step 2."""

    def prefix(self, state):
        if state.step >= 2:
            raise RuntimeError("broken at step 2")
        return super().prefix(state)


class FailsAtOnce(_Flat):
    """Raises before the first token."""

    def logw_next(self, state):
        raise RuntimeError("broken at once")


class FailsAtEnd(_Flat):
    """Raises where a particle ends."""

    def complete(self, state):
        raise RuntimeError("broken at the end")


class Slow(_Flat):
    """Takes a while at every step."""

    def prefix(self, state):
        time.sleep(0.05)
        return super().prefix(state)

    complete = prefix


class Sleeps(_Flat):
    """Takes a second at its second step."""

    def prefix(self, state):
        if state.step == 2:
            time.sleep(1)
        return super().prefix(state)


class NotANumber(_Flat):
    """Answers NaN for a particle, from step 1 on."""

    def prefix(self, state):
        answer = super().prefix(state)
        answer[-1] = torch.nan
        return answer

    complete = prefix


class WrongShape(_Flat):
    """Answers for one particle too many."""

    def prefix(self, state):
        return torch.zeros(len(state.finished) + 1, dtype=torch.float64)

    complete = prefix


class Hangs(_Flat):
    """Is never prepared.

    Args:
        key: makes it another potential, of which nothing is known yet.
    """

    def __init__(self, key: int) -> None:
        self.key = key

    def prepare(self, tokenizer):
        time.sleep(3600)


class Never(_Flat):
    """Allows nothing, which shows at the end."""

    def complete(self, state):
        return torch.full((len(state.finished),), -torch.inf, dtype=torch.float64)
