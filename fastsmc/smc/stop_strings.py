"""Stop strings: particles that end when their text comes to hold one, by the tokens that each distinct history adds.

The rules are those of vLLM's detokenizer: the prompt's text does not count, a match must end in the text of a token
that comes after the first `min_tokens`, and a character that is not whole yet waits for its other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.params import SMCParams
from fastsmc.texts import CONTEXT, decode, is_whole


class _Text(NamedTuple):
    """Is the end of a history's text.

    Attributes:
        ids: the last tokens, those that the next one must be decoded with.
        n_read: how many of them are in the text already.
        tail: its last characters, fewer than the longest stop string has.
    """

    ids: tuple[int, ...]
    n_read: int
    tail: str


class StopStrings:
    """Follows the texts of one group's particles.

    Args:
        tokenizer: decodes, without special tokens.
        params: of the group; `stop` holds strings.
    """

    def __init__(self, tokenizer: Any, params: SMCParams, prompt: Sequence[int], device: torch.device) -> None:
        self._tokenizer, self._strings, self._min_tokens = tokenizer, params.stop or (), params.min_tokens
        self._longest = max(map(len, self._strings))
        tail = tuple(prompt[-CONTEXT:])
        self._texts = [_Text(tail, len(tail), "")]
        self._text_of = torch.zeros(params.n_particles, dtype=torch.int64, device=device)
        self._n_tokens = 0

    def reindex(self, ancestors: Tensor) -> None:
        """Lets particles follow a resampling, (N,) int64."""
        self._text_of = self._text_of[ancestors]

    def stop(self, tokens: Tensor, drew: Tensor) -> Tensor:
        """Marks the particles (N,) bool among `drew` (N,) bool whose text has come to hold a stop string with `tokens`.

        To be called once per step, with the token (N,) int64 that each has drawn. Waits for the device.
        """
        self._n_tokens += 1
        keys, index = torch.unique((self._text_of << 32 | tokens.clamp(min=0))[drew], return_inverse=True)
        pairs = [(self._texts[key >> 32], key & 0xFFFFFFFF) for key in keys.tolist()]
        longer = [(*text.ids, token) for text, token in pairs]
        known = decode(self._tokenizer, [list(text.ids[: text.n_read]) for text, _ in pairs])
        whole = decode(self._tokenizer, [list(ids) for ids in longer])
        self._texts, found = [], []
        for (text, _), ids, old, new in zip(pairs, longer, known, whole, strict=True):
            added = new[len(old) :] if is_whole(new) else ""
            ids, n_read = (ids[text.n_read :], len(ids) - text.n_read) if added else (ids, text.n_read)
            found.append(bool(added) and self._n_tokens > self._min_tokens and self._holds(text.tail, added))
            tail = text.tail + added
            self._texts.append(_Text(ids, n_read, tail[max(0, len(tail) - self._longest + 1) :]))
        self._text_of = torch.zeros_like(self._text_of).masked_scatter(drew, index)
        marks = torch.tensor(found, dtype=torch.bool, device=drew.device)
        return torch.zeros_like(drew).masked_scatter(drew, marks[index])

    def _holds(self, before: str, added: str) -> bool:
        """Says whether a stop string ends in `added`."""
        text = before + added
        return any(text.find(s, max(0, len(before) + 1 - len(s))) >= 0 for s in self._strings)
