"""Regular expressions as deterministic automata over tokens: compiled on the host, kept as tables.

pattern → automaton over bytes → automaton over classes of tokens
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Automaton(NamedTuple):
    """A regular expression as a deterministic automaton over tokens. States 0..S-1, and S, which never accepts.

    Tokens that lead every state to the same state form a class; C is the number of classes, 0 that of the tokens that
    lead nowhere.

    Attributes:
        table: (S + 1, C) int64, next state by state and class.
        classes: (V,) int64, class of each token of the tokenizer.
        accept: (S + 1,) bool.
        start: int.
    """

    table: np.ndarray
    classes: np.ndarray
    accept: np.ndarray
    start: int


#: Follows the text in the pattern that is compiled. outlines_core drops what leads from an accepting state to one that
#: is not, and its engine prefers early alternatives (of `a|ab` it keeps `a`); where nothing accepts before this
#: character, neither matters, and the pattern's own accepting states are those that this character completes.
_END = "\U0010ffff"


def _byte_automaton(pattern: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(table (S + 1, 256) int64 next state by state and byte, accept (S + 1,) bool, start) of a regular expression."""
    from outlines_core import Index, Vocabulary  # comes with vLLM

    bare = pattern.removeprefix("^")  # the whole text is matched anyway
    backslashes = len(bare) - 1 - len(bare[:-1].rstrip("\\"))
    if bare.endswith("$") and backslashes % 2 == 0:
        bare = bare[:-1]
    every_byte = {bytes([b]): [b] for b in range(256)}
    try:
        Index(bare, Vocabulary(257, every_byte))  # by itself: brackets must match without ours
        index = Index(f"(?:{bare})" + r"\x{10FFFF}", Vocabulary(257, every_byte | {_END.encode(): [256]}))
    except ValueError as error:
        raise ValueError(f"Regex: pattern={pattern!r}: {error}") from None
    edges = index.get_transitions()
    final = index.get_final_states()
    names = {name: s for s, name in enumerate({index.get_initial_state(), *edges, *final})}
    table = np.full((len(names) + 1, 256), len(names), dtype=np.int64)
    accept = np.zeros(len(names) + 1, dtype=bool)
    for name, targets in edges.items():
        for token, target in targets.items():
            if token < 256:
                table[names[name], token] = names[target]
            elif token == 256:
                accept[names[name]] |= target in final
    return table, accept, names[index.get_initial_state()]


def token_automaton(pattern: str, tokens: list[bytes | None]) -> Automaton:
    """The automaton of `pattern` over the tokens' bytes; None is a token that leads nowhere."""
    step, accept, start = _byte_automaton(pattern)
    sink = len(step) - 1
    flat_step = step.astype(np.int32).reshape(-1)
    flat = np.frombuffer(b"".join(t or b"" for t in tokens), dtype=np.uint8)
    lengths = np.array([len(t or b"") for t in tokens], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths

    def walk(states: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """(A,) states, (B,) token ids -> (B, A) int32 state after each token."""
        at = np.repeat(states[None].astype(np.int32), len(ids), axis=0)
        at[lengths[ids] == 0] = sink
        for position in range(int(lengths[ids].max(initial=0))):
            longer = np.flatnonzero(lengths[ids] > position)
            at[longer] = flat_step.take(at[longer] * 256 + flat[offsets[ids[longer]] + position, None])
        return at

    # States that tokens reach, and one 64-bit sum a token of random numbers keyed by (state, next state): tokens with
    # the same sum have the same column (wrongly so with a probability below V²/2^65).
    everything = np.arange(len(tokens))
    numbers = np.arange(len(step), dtype=np.uint64)
    found = np.isin(np.arange(len(step)), [start, sink])
    frontier = [start]
    sums = np.zeros(len(tokens), dtype=np.uint64)
    salt = np.random.default_rng(0).integers(0, 2**64, size=2, dtype=np.uint64)
    while frontier:
        chunk = frontier[: max(1, 2**22 // max(len(tokens), 1))]
        frontier = frontier[len(chunk) :]
        for state, after in zip(chunk, walk(np.array(chunk), everything).T, strict=True):
            keys = _splitmix(_splitmix(np.uint64(state * len(step)) + numbers + salt[0]) ^ salt[1])
            keys[sink] = 0
            sums += keys[after]
            new = np.zeros(len(step), dtype=bool)
            new[after] = True
            frontier += np.flatnonzero(new & ~found).tolist()
            found |= new
    found[sink] = False
    order = np.flatnonzero(found)
    _, first, classes = np.unique(np.append(np.uint64(0), sums), return_index=True, return_inverse=True)
    after = walk(order, first[1:] - 1)  # class 0 is the sum 0
    rename = np.full(len(step), len(order), dtype=np.int64)
    rename[order] = np.arange(len(order))
    table = np.full((len(order) + 1, len(first)), len(order), dtype=np.int64)
    table[:-1, 1:] = rename[after].T
    return Automaton(table, classes.reshape(-1)[1:], np.append(accept[order], False), int(rename[start]))


def _splitmix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
