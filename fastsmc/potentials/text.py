"""`TextPotential`: any function of the generated texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State
from fastsmc.potentials.tokens import tokenizer_of


class TextPotential(Potential):
    """log φ = fn(texts): a Python function of the generated text, special tokens left out.

    Args:
        fn: list of str -> as many floats (natural logs, -inf allowed). It must be a function of the text alone: a
            text is asked once a group.
        every_step: True makes the same the twist of unfinished particles.

    Raises:
        ValueError: fn is not callable, or answers with a wrong number of values.
    """

    def __init__(self, fn: Callable[[list[str]], Sequence[float]], every_step: bool = False) -> None:
        if not callable(fn):
            raise ValueError(f"fn={fn!r}: must be callable")
        self.fn, self.every_step = fn, bool(every_step)

    def setup(self, engine: Engine) -> None:
        self._tokenizer = tokenizer_of(engine, "TextPotential")
        self._known: dict[str, float] = {}

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._known = {}

    def _ask(self, state: State, about: Tensor) -> Tensor:
        """(N,) fn of the rows `about` (N,) bool, 0 elsewhere."""
        out = torch.zeros(len(about), dtype=torch.float64, device=about.device)
        rows = torch.nonzero(about).squeeze(1)
        sequences = [[v for v in row if v >= 0] for row in state.tokens[rows].tolist()]
        texts = self._tokenizer.batch_decode(sequences, skip_special_tokens=True) if sequences else []
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            values = self.fn(new)
            values = [float(v) for v in (values.reshape(-1) if hasattr(values, "reshape") else values)]
            if len(values) != len(new):
                raise ValueError(f"fn gave {len(values)} values for {len(new)} texts")
            self._known.update(zip(new, values, strict=True))
        out[rows] = torch.tensor([self._known[text] for text in texts], dtype=torch.float64, device=out.device)
        return out

    def prefix(self, state: State) -> Tensor:
        return self._ask(state, ~state.finished) if self.every_step else super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._ask(state, state.finished)
