"""`Lexicon`: a weight for each token of a set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, Rows, State
from fastsmc.potentials.tokens import token_bytes, token_list


class Lexicon(Potential):
    """log ψ_t = weight × (number of generated tokens that are in a set); `complete` is the same.

    Args:
        words: each stands for all its single-token spellings: with and without a leading space, as given and with its
            first letter capitalised.
        token_ids: further tokens of the set. Stop tokens count like any other.
        weight: log weight of one token; -inf (also as the string "-inf") forbids the set.

    Raises:
        ValueError: nothing is given, or weight is NaN or +inf; in `prepare`: a word has no single-token spelling; in
            `setup`: a token id is outside the vocabulary.
    """

    capturable = True
    per_particle = ()
    shared_by_groups = ("_member", "_change")

    def __init__(
        self, words: Sequence[str] | None = None, token_ids: Sequence[int] | None = None, weight: float = 1.0
    ) -> None:
        words = [] if words is None else words
        if isinstance(words, (str, bytes)) or not hasattr(words, "__iter__"):
            raise ValueError(f"words={words!r}: must be a list of words")
        self.words = [w.strip() if isinstance(w, str) else w for w in words]
        if not all(isinstance(w, str) and w for w in self.words):
            raise ValueError(f"words={self.words!r}: must be a list of words")
        self.token_ids = token_list("token_ids", [] if token_ids is None else token_ids)
        if not self.words and not self.token_ids:
            raise ValueError("Lexicon: give words, token_ids or both")
        try:
            self.weight = math.nan if isinstance(weight, bool) else float(weight)
        except (TypeError, ValueError, OverflowError):
            self.weight = math.nan
        if math.isnan(self.weight) or self.weight == math.inf:
            raise ValueError(f"weight={weight!r}: must be finite or -inf")

        self._word_ids: set[int] | None = None

    def prepare(self, tokenizer: Any) -> None:
        self._word_ids = set()
        if self.words:
            if tokenizer is None:
                raise ValueError("Lexicon(words): this engine has no tokenizer")
            spellings: dict[bytes, list[int]] = {}
            for i, token in enumerate(token_bytes(tokenizer)):
                if token is not None:
                    spellings.setdefault(token, []).append(i)
            for word in self.words:
                forms = {space + form for space in ("", " ") for form in (word, word[0].upper() + word[1:])}
                found = [i for form in forms for i in spellings.get(form.encode(), ())]
                if not found:
                    raise ValueError(f"Lexicon: {word!r} is not a single token of this model, spelt in any way")
                self._word_ids.update(found)

    def setup(self, engine: Engine) -> None:
        if self._word_ids is None:  # nobody has prepared this object
            self.prepare(engine.tokenizer)
        assert self._word_ids is not None
        ids = self._word_ids.union(self.token_ids)
        if max(ids) >= engine.vocab_size:
            raise ValueError(
                f"Lexicon: token_ids hold {max(ids)}, which is outside the vocabulary; must be in [0, "
                f"{engine.vocab_size})"
            )
        self._member = torch.zeros(engine.vocab_size, dtype=torch.bool, device=engine.device)
        self._member[sorted(ids)] = True
        change = torch.zeros(1, engine.vocab_size, dtype=torch.float32, device=engine.device)
        self._change = change.masked_fill_(self._member, self.weight)

    def prefix(self, state: State) -> Tensor:
        tokens = state.tokens
        count = (self._member[tokens.clamp(min=0)] & (tokens >= 0)).sum(dim=1)
        # 0 · −inf would be NaN
        return torch.where(count > 0, count.double() * self.weight, torch.zeros_like(count, dtype=torch.float64))

    def logw_next(self, state: State) -> Rows:
        return Rows(self._change, torch.zeros_like(state.lengths))
