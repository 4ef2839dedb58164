"""Strings in the texts of particles, found by the tokens that each distinct history adds.

The rules are those of vLLM's detokenizer: the prompt's text does not count, and a character that is not whole yet waits
for its other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.texts import CONTEXT, decode, is_whole


class _Text(NamedTuple):
    """Is the end of a history's text.

    Attributes:
        ids: the last tokens, those that the next one must be decoded with.
        n_read: how many of them are in the text already.
        tail: its last characters, fewer than the longest string has.
    """

    ids: tuple[int, ...]
    n_read: int
    tail: str


class Strings:
    """Follows the texts of one group's particles.

    Args:
        tokenizer: decodes, without special tokens.
        strings: what is looked for.
        prompt: token ids, with which the first of a particle are decoded.
        n_particles: N.
        device: of the particles.
    """

    def __init__(
        self, tokenizer: Any, strings: Sequence[str], prompt: Sequence[int], n_particles: int, device: torch.device
    ) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._longest = max(map(len, self._strings))
        tail = tuple(prompt[-CONTEXT:])
        self._texts = [_Text(tail, len(tail), "")]
        self._text_of = torch.zeros(n_particles, dtype=torch.int64, device=device)

    def reindex(self, ancestors: Tensor) -> None:
        """Lets particles follow a resampling, (N,) int64."""
        self._text_of = self._text_of[ancestors]

    def find(self, tokens: Tensor, drew: Tensor) -> Tensor:
        """Marks the particles (N,) bool among `drew` (N,) bool whose text has come to hold a string with `tokens`.

        To be called with each token (N,) int64 that a particle draws. Waits for the device.
        """
        keys, index = torch.unique((self._text_of << 32 | tokens.clamp(min=0))[drew], return_inverse=True)
        pairs = [(self._texts[key >> 32], key & 0xFFFFFFFF) for key in keys.tolist()]
        longer = [(*text.ids, token) for text, token in pairs]
        known = decode(self._tokenizer, [list(text.ids[: text.n_read]) for text, _ in pairs])
        whole = decode(self._tokenizer, [list(ids) for ids in longer])
        others, place = torch.unique(self._text_of[~drew], return_inverse=True)
        as_they_are = [self._texts[i] for i in others.tolist()]
        self._texts, found = [], []
        for (text, _), ids, old, new in zip(pairs, longer, known, whole, strict=True):
            added = new[len(old) :] if is_whole(new) else ""
            ids, n_read = (ids[text.n_read :], len(ids) - text.n_read) if added else (ids, text.n_read)
            found.append(bool(added) and self._holds(text.tail, added))
            tail = text.tail + added
            self._texts.append(_Text(ids, n_read, tail[max(0, len(tail) - self._longest + 1) :]))
        at = torch.zeros_like(self._text_of).masked_scatter(drew, index)
        self._text_of = at.masked_scatter(~drew, place + len(pairs))
        self._texts += as_they_are
        marks = torch.tensor(found, dtype=torch.bool, device=drew.device)
        return torch.zeros_like(drew).masked_scatter(drew, marks[index])

    def begin_anew(self, which: Tensor) -> None:
        """Lets no string begin in what particles `which` (N,) bool have drawn so far. Others of the same history must
        be among them. Waits for the device."""
        for i in torch.unique(self._text_of[which]).tolist():
            self._texts[i] = self._texts[i]._replace(tail="")

    def _holds(self, before: str, added: str) -> bool:
        """Says whether a string ends in `added`."""
        text = before + added
        return any(text.find(s, max(0, len(before) + 1 - len(s))) >= 0 for s in self._strings)


def unheld(tokenizer: Any, strings: Sequence[str]) -> list[str]:
    """Lists those of `strings` that no text of this tokenizer holds, as far as it can encode texts: not even that of
    their own tokens, as it is of special tokens."""
    if not hasattr(tokenizer, "encode"):
        return []
    ids = [list(tokenizer.encode(text, add_special_tokens=False)) for text in strings]
    return [text for text, spelled in zip(strings, decode(tokenizer, ids), strict=True) if text not in spelled]
