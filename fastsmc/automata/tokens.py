"""Automata over bytes as automata over the tokens of a vocabulary.

Tokens are walked as a trie, all states of a chunk at once, and a walk ends where the automaton does: the cost is the
number of pairs (state, beginning of a token) that lead somewhere, not states × tokens × lengths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .language import DEAD, ByteAutomaton, LimitError, Limits, ranges, splitmix

#: pairs (state, node of the trie) that are held at once
_PAIRS = 1 << 20
#: moves of an automaton over classes of tokens; 8 bytes each on the way, 12 on the device
MAX_MOVES = 1 << 24


class TokenMoves(NamedTuple):
    """Is an automaton over classes of tokens. States 0..S-1 are those that tokens lead to; C classes.

    Attributes:
        first: (S + 2,) int64; the moves of state s are first[s] .. first[s + 1] - 1, in the order of their classes.
            State S, which never accepts, has none.
        by: (moves,) int32, class that moves; 0, the class of tokens that lead nowhere, never does.
        to: (moves,) int32, next state.
        classes: (V,) int32, class of each token.
        accept: (S + 1,) bool.
        start: int.
        edges: (2, E) int32, distinct pairs (state, next state).
    """

    first: np.ndarray
    by: np.ndarray
    to: np.ndarray
    classes: np.ndarray
    accept: np.ndarray
    start: int
    edges: np.ndarray


class _Trie:
    """Holds byte strings as a trie; node 0 is the root. Children of a node are consecutive.

    Attributes:
        first_child: (nodes + 1,) int64; the children of node i are first_child[i] .. first_child[i + 1] - 1.
        byte: (nodes,) uint8, the byte that leads to a node.
        word: (nodes,) int32, which string ends there, -1 if none does.
    """

    def __init__(self, words: Sequence[bytes]) -> None:
        """Builds it from words that are distinct, not empty and ascending."""
        text = np.frombuffer(b"".join(words), dtype=np.uint8)
        lengths = np.array([len(word) for word in words], dtype=np.int64)
        offsets = np.cumsum(lengths) - lengths
        at = np.zeros(len(words), dtype=np.int64)  # node that each word has come to
        going = np.arange(len(words))
        nodes, depth = 1, 0
        parents, parts_byte, parts_word = [np.zeros(1, np.int64)], [np.zeros(1, np.uint8)], [np.full(1, -1, np.int32)]
        while len(going):
            byte = text[offsets[going] + depth]
            key = at[going] * 256 + byte
            new = np.append(True, key[1:] != key[:-1])  # words are ascending, so equal ones are neighbours
            at[going] = nodes + np.cumsum(new) - 1
            parents.append(at_before := key[new] // 256)
            parts_byte.append(byte[new])
            word = np.full(len(at_before), -1, dtype=np.int32)
            ends = going[lengths[going] == depth + 1]
            word[at[ends] - nodes] = ends
            parts_word.append(word)
            nodes, depth = nodes + len(word), depth + 1
            going = going[lengths[going] > depth]
        self.byte, self.word = np.concatenate(parts_byte), np.concatenate(parts_word)
        # nodes are numbered level by level in the order of their parents, so children are consecutive
        n_children = np.bincount(np.concatenate(parents)[1:], minlength=nodes)
        self.first_child = np.append(1, 1 + np.cumsum(n_children))


def _walk(
    automaton: ByteAutomaton, trie: _Trie, sources: np.ndarray, limits: Limits
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields (states, words, next states), each of as many entries as there are moves, in pieces."""
    table = automaton.table.reshape(-1)
    stack = [(sources, np.zeros(len(sources), dtype=np.int64), sources)]
    while stack:
        source, node, state = stack.pop()
        if len(source) > 1 and (trie.first_child[node + 1] - trie.first_child[node]).sum() > _PAIRS:
            half = len(source) // 2
            stack += [(source[half:], node[half:], state[half:]), (source[:half], node[:half], state[:half])]
            continue
        limits.check(len(automaton.table))
        first, end = trie.first_child[node], trie.first_child[node + 1]
        child, n = ranges(first, end), end - first
        after = table[np.repeat(state * 256, n) + trie.byte[child]]
        alive = np.flatnonzero(after != DEAD)
        if not len(alive):
            continue
        child, after, source = child[alive], after[alive].astype(np.int64), np.repeat(source, n)[alive]
        word = trie.word[child]
        ends = np.flatnonzero(word >= 0)
        if len(ends):
            yield source[ends], word[ends], after[ends]
        inner = np.flatnonzero(trie.first_child[child + 1] > trie.first_child[child])
        if len(inner):
            stack.append((source[inner], child[inner], after[inner]))


def _spelled(automaton: ByteAutomaton, tokens: Sequence[bytes | None]) -> tuple[list[bytes], list[int]]:
    """Replaces every byte of tokens by one that does the same in all states: what is left of a vocabulary is small.

    Returns:
        the distinct words, ascending; for each token the index of its word, -1 for those that lead nowhere.
    """
    columns = np.ascontiguousarray(automaton.table.T)
    views = columns.view(np.dtype((np.void, columns.shape[1] * columns.itemsize))).reshape(-1)
    _, first, same = np.unique(views, return_index=True, return_inverse=True)
    spelling = bytes(first[same.reshape(-1)].tolist())
    nowhere = bytes(np.flatnonzero((automaton.table == DEAD).all(axis=0)).tolist())
    spelled = [None if not token or token.translate(None, nowhere) != token else token.translate(spelling)
               for token in tokens]  # fmt: skip
    words = sorted({word for word in spelled if word is not None})
    index = {word: i for i, word in enumerate(words)}
    return words, [-1 if word is None else index[word] for word in spelled]


def token_moves(automaton: ByteAutomaton, tokens: Sequence[bytes | None], limits: Limits) -> TokenMoves:
    """Makes the automaton over tokens; None and empty tokens lead nowhere. Raises LimitError."""
    words, word_of = _spelled(automaton, tokens)
    n_states = len(automaton.table)
    everything = np.arange(n_states)
    # Words with one sum of random numbers, keyed by (state, next state), lead every state to the same (wrongly so with
    # a probability below words²/2^65).
    sums = np.zeros(len(words), dtype=np.uint64)
    salt = np.random.default_rng(0).integers(2**63, size=2, dtype=np.uint64)
    for source, word, after in _walk(automaton, _Trie(words), everything, limits):
        np.add.at(sums, word, splitmix(splitmix((source * n_states + after).astype(np.uint64) + salt[0]) ^ salt[1]))
    kinds, chosen, kind = np.unique(np.append(np.uint64(0), sums), return_index=True, return_inverse=True)
    kind = kind.reshape(-1)[1:].astype(np.int32)  # class 0 is the sum 0: such words lead nowhere
    chosen = np.sort(chosen[1:] - 1)  # one word per class
    moves, n_moves = [np.zeros((3, 0), dtype=np.int32)], 0
    for source, word, after in _walk(automaton, _Trie([words[i] for i in chosen]), everything, limits):
        moves.append(np.stack([source, kind[chosen[word]], after]).astype(np.int32))
        n_moves += len(source)
        if n_moves > MAX_MOVES:
            raise LimitError(f"more than {MAX_MOVES} moves between its {n_states} states")
    source, by, to = np.concatenate(moves, axis=1)
    by_source = np.argsort(source.astype(np.int64) * len(kinds) + by, kind="stable")
    source, by, to = source[by_source], by[by_source], to[by_source]

    order = np.flatnonzero(_reachable(source, to, n_states))
    rename = np.full(n_states, -1, dtype=np.int32)
    rename[order] = np.arange(len(order))
    inside = rename[source] >= 0
    source, by, to = rename[source[inside]], by[inside], rename[to[inside]]
    pairs = np.unique(source.astype(np.int64) * len(order) + to)
    return TokenMoves(
        first=np.append(0, np.cumsum(np.bincount(source, minlength=len(order) + 1))),
        by=by,
        to=to,
        classes=np.append(kind, np.int32(0))[word_of],
        accept=np.append(automaton.accept[order], False),
        start=0,
        edges=np.stack([pairs // len(order), pairs % len(order)]).astype(np.int32),
    )


def _reachable(source: np.ndarray, to: np.ndarray, n_states: int) -> np.ndarray:
    """Returns (states,) bool: those that moves lead to from state 0; source ascends."""
    first = np.searchsorted(source, np.arange(n_states + 1))
    found = np.zeros(n_states, dtype=bool)
    found[0] = True
    frontier = np.zeros(1, dtype=np.int64)
    while len(frontier):
        after = to[ranges(first[frontier], first[frontier + 1])]
        frontier = np.unique(after[~found[after]])
        found[frontier] = True
    return found
