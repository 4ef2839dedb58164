"""`Infill`: the likelihood of what must come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State
from fastsmc.potentials.tokens import token_list


class Infill(Potential):
    """log φ = log p0(continuation | prompt, particle): particles are weighed by what should come after them.

    Args:
        continuation: text (encoded without special tokens) or token ids (a list or a vector).
        every_step: True makes the same the twist of unfinished particles; each step then costs `lookahead` more.

    Raises:
        ValueError: the continuation is empty or not of these types; in `setup`: an id is beyond the vocabulary.
    """

    def __init__(self, continuation: str | Sequence[int], every_step: bool = False) -> None:
        self.continuation, self.every_step = continuation, bool(every_step)
        self._ids = [] if isinstance(continuation, str) else token_list("Infill: continuation", continuation)
        if not (continuation if isinstance(continuation, str) else self._ids):
            raise ValueError("Infill: the continuation is empty")
        self.lookahead = len(self._ids)

    def prepare(self, tokenizer: Any) -> None:
        if isinstance(self.continuation, str):
            if tokenizer is None:
                raise ValueError("Infill: a continuation given as text needs a tokenizer; give token ids")
            self._ids = list(tokenizer.encode(self.continuation, add_special_tokens=False))
            self.lookahead = len(self._ids)
            if not self._ids:
                raise ValueError(f"Infill: continuation={self.continuation!r} has no tokens")

    def setup(self, engine: Engine) -> None:
        self._engine = engine
        self.prepare(engine.tokenizer)
        token_list("Infill: continuation", self._ids, engine.vocab_size)

    def prefix(self, state: State) -> Tensor:
        if self.every_step and state.step > 0:
            return self._engine.continuation_log_prob(self._ids)
        return super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._engine.continuation_log_prob(self._ids)
