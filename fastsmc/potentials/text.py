"""`TextPotential`: any function of the generated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State
from fastsmc.potentials.tokens import short, tokenizer_of
from fastsmc.texts import texts_after


def read_floats(who: str, values: Any, allowed: str) -> list[float]:
    """Reads answers of a user's function, a sequence or an array of numbers; what is none, such as a bool, is refused.

    Raises:
        ValueError: naming `who`, the value and what is `allowed`.
    """
    if hasattr(values, "tolist"):
        values = values.reshape(-1).tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{who} gave {short(values)}, a {type(values).__name__}: must be a sequence of {allowed}")
    values = [v.item() if hasattr(v, "item") else v for v in values]
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, float)):
            raise ValueError(f"{who} gave {short(v)}, a {type(v).__name__}: must be {allowed}")
    return [float(v) for v in values]


class TextPotential(Potential):
    """log φ = fn(texts): a Python function of the generated text, what follows the prompt's, without special tokens.

    Args:
        fn: list of str -> as many floats (natural logs, -inf allowed). It must be a function of the text alone: a
            text is asked once per group.
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
        """Returns (N,) fn of the rows `about` (N,) bool, 0 elsewhere."""
        out = torch.zeros(len(about), dtype=torch.float64, device=about.device)
        rows = torch.nonzero(about).squeeze(1)
        sequences = [[v for v in row if v >= 0] for row in state.tokens[rows].tolist()]
        texts = texts_after(self._tokenizer, state.prompt, sequences)
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            values = read_floats("fn", self.fn(new), "numbers, natural logarithms")
            if len(values) != len(new):
                raise ValueError(f"fn gave {len(values)} values for {len(new)} texts")
            self._known.update(zip(new, values, strict=True))
        out[rows] = torch.tensor([self._known[text] for text in texts], dtype=torch.float64, device=out.device)
        return out

    def prefix(self, state: State) -> Tensor:
        return self._ask(state, ~state.finished) if self.every_step else super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._ask(state, state.finished)
