"""Vocabularies of genlm-control on their way between processes: as three byte strings, made into tokens there once.

A potential holds its vocabulary three times, as a list of tokens, with EOS, and as a dict; tens of thousands of objects
that would take longer to pickle than a short run takes.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from genlm.backend.tokenization import Token
from genlm.control import Potential as GenlmBase
from genlm.control.potential.autobatch import AutoBatchedPotential


class Vocabulary:
    """Holds tokens. Where it is unpickled, equal ones hold the same list, which nobody writes to.

    Args:
        tokens: genlm-backend's.
    """

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens

    @functools.cached_property
    def lookup(self) -> dict[Token, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    def __reduce__(self) -> tuple:
        ids = np.array([token.token_id for token in self.tokens], dtype=np.int64)
        ends = np.cumsum([len(token) for token in self.tokens], dtype=np.int64)
        return _received, (ids.tobytes(), ends.tobytes(), b"".join(self.tokens))


@functools.lru_cache(maxsize=8)
def _received(ids: bytes, ends: bytes, text: bytes) -> Vocabulary:
    tokens, begin = [], 0
    for token_id, end in zip(
        np.frombuffer(ids, np.int64).tolist(), np.frombuffer(ends, np.int64).tolist(), strict=True
    ):
        tokens.append(Token(token_id, text[begin:end]))
        begin = end
    return Vocabulary(tokens)


def held(potential: GenlmBase) -> dict[str, GenlmBase]:
    """Lists the potentials that one of genlm-control is made of, by their attributes."""
    found = {name: getattr(potential, name, None) for name in ("potential", "base", "p1", "p2")}
    return {name: each for name, each in found.items() if isinstance(each, GenlmBase)}


def unwrapped(potential: GenlmBase) -> GenlmBase:
    """Returns what `autobatched` has wrapped."""
    return potential.potential if isinstance(potential, AutoBatchedPotential) else potential


def without_batches(potential: GenlmBase) -> GenlmBase:
    """Copies a potential without what `autobatched` has left in it and around it, which no pickle takes."""
    plain = copy.copy(unwrapped(potential))
    vars(plain).pop("_autobatched", None)
    for name, each in held(plain).items():
        setattr(plain, name, without_batches(each))
    return plain


def packed(potential: GenlmBase) -> GenlmBase:
    """Copies a potential, without batches, with a `Vocabulary` in the place of its tables; `unpacked` undoes it."""
    light = copy.copy(potential)
    for name, each in held(potential).items():
        setattr(light, name, packed(each))
    if _is_plain(potential):
        for name in ("vocab_eos", "lookup"):
            delattr(light, name)
        light.vocab = Vocabulary(potential.vocab)
    return light


def unpacked(light: GenlmBase) -> GenlmBase:
    """Gives a potential, and those that it is made of, their tables back, in place."""
    for each in held(light).values():
        unpacked(each)
    if isinstance(light.vocab, Vocabulary):
        vocabulary = light.vocab
        light.vocab = vocabulary.tokens
        light.vocab_eos = [*vocabulary.tokens, light.eos]
        light.lookup = vocabulary.lookup | {light.eos: len(vocabulary.tokens)}
    return light


def _is_plain(potential: Any) -> bool:
    """Says whether the tables of a potential are those that its list of tokens makes."""
    n, every = len(potential.vocab), [*potential.vocab, potential.eos]
    return (
        all(type(token) is Token for token in potential.vocab)
        and len(potential.vocab_eos) == len(potential.lookup) == n + 1
        and all(map(operator.is_, potential.vocab_eos, every))
        and all(map(operator.is_, potential.lookup, every))
        and list(potential.lookup.values()) == list(range(n + 1))
    )
