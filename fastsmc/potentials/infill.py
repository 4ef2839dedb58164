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

    per_particle = ()

    def __init__(self, continuation: str | Sequence[int], every_step: bool = False) -> None:
        self._text = continuation if isinstance(continuation, str) else None
        self.continuation_in_prefix = bool(every_step)
        if self._text is None:
            self.continuation = token_list("Infill: continuation", continuation)
        if not (self._text or self.continuation):
            raise ValueError("Infill: the continuation is empty")
        self.lookahead = len(self.continuation or ())

    @classmethod
    def tokenize_args(cls, args: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        text = args.get("continuation")
        return (
            {**args, "continuation": encode("Infill: continuation", text, tokenizer)}
            if text and isinstance(text, str)
            else args
        )

    def prepare(self, tokenizer: Any) -> None:
        if self._text is not None:
            self.continuation = encode("Infill: continuation", self._text, tokenizer)
            self.lookahead = len(self.continuation)

    def setup(self, engine: Engine) -> None:
        self._engine = engine
        self.prepare(engine.tokenizer)
        token_list("Infill: continuation", self._ids, engine.vocab_size)

    @property
    def _ids(self) -> list[int]:
        assert self.continuation is not None  # since `prepare`
        return self.continuation

    def prefix(self, state: State) -> Tensor:
        if self.continuation_in_prefix and state.step > 0:
            return self._engine.continuation_log_prob(self._ids)
        return super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._engine.continuation_log_prob(self._ids)


def encode(name: str, text: str, tokenizer: Any) -> list[int]:
    """Encodes a text without special tokens. ValueError, naming `name`: there is no tokenizer, or are no tokens."""
    if tokenizer is None:
        raise ValueError(f"{name}, given as text, needs a tokenizer; give token ids")
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if not ids:
        raise ValueError(f"{name}={text!r} has no tokens")
    return ids
