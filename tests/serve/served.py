"""Potentials of a server's operator, as the tests of the server name them."""

from __future__ import annotations

import time

import torch

from fastsmc import Potential


class Fails(Potential):
    """Raises at step 2."""

    def prefix(self, state):
        if state.step >= 2:
            raise RuntimeError("broken at step 2")
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def complete(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


class Slow(Potential):
    """Takes a while at every step."""

    def prefix(self, state):
        time.sleep(0.05)
        return torch.zeros(len(state.finished), dtype=torch.float64)

    complete = prefix


class Never(Potential):
    """Allows nothing, which shows at the end."""

    def complete(self, state):
        return torch.full((len(state.finished),), -torch.inf, dtype=torch.float64)
