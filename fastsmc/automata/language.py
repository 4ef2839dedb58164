"""Syntax trees as deterministic automata over the bytes of UTF-8.

tree → automaton over characters without determinism (Thompson) → deterministic (subsets) → minimal (Moore) → bytes

Characters are dealt with as *atoms*: characters that no set of the pattern tells apart are one symbol. Each state of
the automaton over characters gets the states that hold the first bytes of a character and wait for the rest; equal ones
are one, so that the automaton over bytes is minimal too.
"""

from __future__ import annotations

import functools
import re
import time
from typing import NamedTuple, NoReturn

import numpy as np

from .syntax import LAST, Chars

DEAD = -1
#: states without determinism that may come to one deterministic state; they cost less by far
PER_STATE = 8


class LimitError(ValueError):
    """An automaton is larger, or takes longer, than allowed."""


class Limits:
    """Limits what an automaton may cost. `check` is called wherever work grows.

    Args:
        states: of the automaton over bytes.
        seconds: of CPU time from now on, so that a busy machine refuses nothing that an idle one takes.
    """

    def __init__(self, states: int, seconds: float) -> None:
        self.states, self.seconds = states, seconds
        self._until = time.process_time() + seconds
        self.seen = 0

    def check(self, states: int) -> None:
        """Raises LimitError when there are too many states, or the time is over."""
        self.seen = max(self.seen, states)
        if states > self.states:
            raise LimitError(f"more than {self.states} states")
        if time.process_time() > self._until:
            self.fail(f"its states were not ready within {self.seconds:g} s of CPU time")

    def fail(self, what: str) -> NoReturn:
        raise LimitError(f"{what}; it had come to {self.seen} states")


class ByteAutomaton(NamedTuple):
    """Is an automaton over bytes, of states 0..S-1; 0 is the start.

    Attributes:
        table: (S, 256) int32, next state by state and byte, or DEAD.
        accept: (S,) bool.
    """

    table: np.ndarray
    accept: np.ndarray


def byte_automaton(tree: tuple, limits: Limits) -> ByteAutomaton:
    """Makes the minimal automaton of a syntax tree over bytes; raises LimitError."""
    nfa = _Nfa(tree, limits)
    atom_of, atoms_of = _atoms(nfa.sets) if nfa.sets else (np.zeros(LAST + 1, dtype=np.int32), [])
    table, accept = minimal(*_determinise(nfa, atoms_of, int(atom_of.max()) + 1, limits), limits)
    return _over_bytes(table, accept, atom_of, limits)


# ------------------------------------------------------------------------------------------------------ characters
@functools.cache
def _everything() -> str:
    codes = np.arange(LAST + 1, dtype="<u4")
    return codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")


def _class_ranges(name: str, ascii: bool) -> list[tuple[int, int]]:
    """Finds the ranges of a class such as \\w or \\p{Lu}."""
    if name[1] in "pP":
        import regex

        found = regex.finditer(f"{name}+", _everything())
    else:
        found = re.finditer(f"{name}+", _everything(), re.ASCII if ascii else 0)
    return [(ord(m[0][0]), ord(m[0][-1])) for m in found]  # may span the surrogates, which are taken out at the end


@functools.cache
def _folds() -> dict[int, list[int]]:
    """Maps a code point to all that it equals without regard to case, where there are such."""
    parent: dict[str, str] = {}

    def root(c: str) -> str:
        while parent.setdefault(c, c) != c:
            c = parent[c]
        return c

    for c in _everything():
        if not (c.lower() == c == c.upper()):
            for other in (c.lower(), c.upper(), c.upper().lower(), c.lower().upper()):
                if len(other) == 1 and re.fullmatch(re.escape(c), other, re.IGNORECASE):
                    parent[root(c)] = root(other)
    # equal by more than simple foldings, as `re` has it
    for first, second in (
        "\u017fs",
        "\u0131i",
        "\u0130i",
        "\u1e9e\u00df",
        "\u0390\u1fd3",
        "\u03b0\u1fe3",
        "\ufb05\ufb06",
    ):
        if re.fullmatch(first, second, re.IGNORECASE):
            parent[root(first)] = root(second)
    classes: dict[str, list[int]] = {}
    for c in list(parent):
        classes.setdefault(root(c), []).append(ord(c))
    return {code: same for same in classes.values() if len(same) > 1 for code in same}


def _changes(chars: Chars) -> np.ndarray:
    """Finds the ascending code points at which membership of a set changes, first into it. No set has surrogates."""
    member = np.zeros(LAST + 3, dtype=bool)  # by code point + 1, with one before and one behind
    for part in chars.parts:
        for low, high in _class_ranges(part, chars.ascii) if isinstance(part, str) else [part]:
            member[low + 1 : high + 2] = True
    if chars.fold:
        for code, same in _folds().items():
            if member[code + 1]:
                member[[c + 1 for c in same if not chars.ascii or (c < 128 and code < 128)]] = True
    if chars.negated:
        member[1:-1] = ~member[1:-1]
    member[0xD800 + 1 : 0xE000 + 1] = False
    return np.flatnonzero(member[1:] != member[:-1])


def _atoms(sets: list[Chars]) -> tuple[np.ndarray, list[list[int]]]:
    """Returns (LAST + 1,) int32 atom of each code point, atom 0 that of those in no set; atoms of each set."""
    changes = [_changes(chars) for chars in sets]
    cuts = np.unique(np.concatenate([[0, 0xD800, LAST + 1], *changes]))
    member = np.array([np.searchsorted(c, cuts[:-1], side="right") % 2 for c in changes], dtype=np.uint8)
    kinds, kind = np.unique(np.packbits(member.reshape(len(sets), -1), axis=0).T, axis=0, return_inverse=True)
    inside = np.unpackbits(np.ascontiguousarray(kinds.T), axis=0)[: len(sets)]  # kind 0 is that of surrogates: nothing
    return np.repeat(kind.reshape(-1).astype(np.int32), np.diff(cuts)), [np.flatnonzero(row).tolist() for row in inside]


# ------------------------------------------------------------------------------------------- without determinism
class _Nfa:
    """Is Thompson's automaton, built from the end: a node is compiled towards the state that follows it.

    Attributes:
        sets: distinct sets of characters.
        set_of, next: per state that reads a character, the set's index and the state behind; other states have -1.
        start: the first state.
    """

    def __init__(self, tree: tuple, limits: Limits) -> None:
        self.sets: list[Chars] = []
        self._index: dict[Chars, int] = {}
        self._limits = limits
        self._empty: list[list[tuple[int, str]]] = []  # moves that read nothing: (state, "", "start" or "end")
        self.set_of: list[int] = []
        self.next: list[int] = []
        self.accept = self._new()
        self.start = self._compile(tree, self.accept)

    def _new(self, set_index: int = -1, behind: int = -1, empty: list[tuple[int, str]] | None = None) -> int:
        self.set_of.append(set_index)
        self.next.append(behind)
        self._empty.append(empty or [])
        if len(self.set_of) > PER_STATE * self._limits.states:
            self._limits.fail(f"more than {PER_STATE * self._limits.states} states without determinism")
        return len(self.set_of) - 1

    def _compile(self, node: tuple, behind: int) -> int:
        kind = node[0]
        if kind == "set":
            index = self._index.setdefault(node[1], len(self.sets))
            if index == len(self.sets):
                self.sets.append(node[1])
            return self._new(index, behind)
        if kind == "cat":
            for part in reversed(node[1]):
                behind = self._compile(part, behind)
            return behind
        if kind == "alt":
            return self._new(empty=[(self._compile(part, behind), "") for part in node[1]])
        if kind == "rep":
            _, part, least, most = node
            return self._repeat(part, least, most, behind)
        return self._new(empty=[(behind, kind)])

    def _repeat(self, node: tuple, least: int, most: int | None, behind: int) -> int:
        if most is None:
            at = self._new()
            self._empty[at] = [(self._compile(node, at), ""), (behind, "")]
        else:
            at = behind
            for _ in range(most - least):
                at = self._new(empty=[(self._compile(node, at), ""), (behind, "")])
        for _ in range(least):
            before = len(self.set_of)
            at = self._compile(node, at)
            if len(self.set_of) == before:  # it reads nothing, however often
                break
        return at

    def closure(self, state: int, at_start: bool) -> set[int]:
        """Finds the states that read a character and are reached from `state` without reading; `accept` among them if
        the text may end here."""
        out, seen, stack = set(), set(), [(state, False)]
        while stack:
            s, at_end = pair = stack.pop()
            if pair in seen:
                continue
            seen.add(pair)
            if s == self.accept or (self.set_of[s] >= 0 and not at_end):
                out.add(s)
            for target, guard in self._empty[s]:
                if guard != "start" or at_start:
                    stack.append((target, at_end or guard == "end"))
        return out


# ------------------------------------------------------------------------------------------------- deterministic
def _determinise(nfa: _Nfa, atoms_of: list[list[int]], n_atoms: int, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Returns (table (Q, K) int32 by state and atom, DEAD where nothing is left; accept (Q,) bool)."""
    closures: dict[int, set[int]] = {}
    order = [frozenset(nfa.closure(nfa.start, True))]
    found = {order[0]: 0}
    rows = []
    for states in order:
        limits.check(len(order))
        behind: dict[int, set[int]] = {}  # by set of characters
        for s in states:
            if s == nfa.accept:
                continue
            if nfa.next[s] not in closures:
                closures[nfa.next[s]] = nfa.closure(nfa.next[s], False)
            behind.setdefault(nfa.set_of[s], set()).update(closures[nfa.next[s]])
        by_atom: dict[int, set[int]] = {}
        for index, targets in behind.items():
            for atom in atoms_of[index]:
                by_atom[atom] = by_atom[atom] | targets if atom in by_atom else targets
        row = np.full(n_atoms, DEAD, dtype=np.int32)
        for atom, targets in by_atom.items():
            key = frozenset(targets)
            if key not in found:
                found[key] = len(order)
                order.append(key)
            row[atom] = found[key]
        rows.append(row)
    return np.stack(rows), np.array([nfa.accept in states for states in order])


def _distance(table: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Counts (Q,) characters from each state to the nearest of `goal` (Q,) bool; Q + 1 where there is no way."""
    n_states, n_atoms = table.shape
    order = np.argsort(table, axis=None, kind="stable")
    first = np.searchsorted(table.reshape(-1)[order], np.arange(n_states + 1))
    distance = np.where(goal, 0, n_states + 1)
    frontier, steps = np.flatnonzero(goal), 0
    while len(frontier):
        steps += 1
        sources = np.unique(order[ranges(first[frontier], first[frontier + 1])] // n_atoms)
        frontier = sources[distance[sources] > n_states]
        distance[frontier] = steps
    return distance


def ranges(first: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Lists all integers of the ranges [first, end), one after the other."""
    n = end - first
    return np.repeat(first - (np.cumsum(n) - n), n) + np.arange(n.sum())


def minimal(table: np.ndarray, accept: np.ndarray, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
    """Merges equal states and takes out those that lead nowhere, but for state 0, the start.

    Args:
        table: (Q, K) int, next state by state and symbol, or DEAD.
        accept: (Q,) bool.

    Returns:
        the same of the minimal automaton, int32; the start is 0 again.
    """
    alive = np.append(_distance(table, accept) <= len(table), False)
    table = np.where(alive[table], table, DEAD)
    # The first guess holds what equal states have in common, and is right for most automata: how soon a text may be
    # complete, may be incomplete, may be hopeless.
    guess = [accept, *(_distance(table, goal) for goal in (accept, ~accept, (table == DEAD).any(axis=1)))]
    _, group = np.unique(np.stack(guess, axis=1), axis=0, return_inverse=True)
    group, count = group.reshape(-1), 0
    salt = np.random.default_rng(0).integers(2**63, size=table.shape[1] + 1, dtype=np.uint64)
    while (new := int(group.max()) + 1) != count:
        count = new
        limits.check(count)
        key = splitmix(group.astype(np.uint64) + salt[0])
        after = np.append(group, -1)[table].astype(np.uint64)
        for k in range(table.shape[1]):
            key = splitmix(key ^ (after[:, k] + salt[k + 1]))  # equal by chance with a probability below Q²/2^65
        _, group = np.unique(key, return_inverse=True)
    _, first = np.unique(group, return_index=True)
    order = np.argsort(np.arange(count) != group[0], kind="stable")  # the start's group first
    rename = np.append(np.argsort(order), DEAD)
    return rename[np.append(group, -1)[table[first[order]]]].astype(np.int32), accept[first[order]]


def splitmix(x: np.ndarray) -> np.ndarray:
    """Applies splitmix64's finaliser to uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --------------------------------------------------------------------------------------------------------- bytes
def _unique_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (distinct rows, index of each row among them) of an (n, 64) array."""
    rows = np.ascontiguousarray(rows)
    view = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).reshape(-1)
    _, first, inverse = np.unique(view, return_index=True, return_inverse=True)
    return rows[first], inverse.reshape(-1)


def _utf8(atoms: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Says how the bytes of a character lead to its atom.

    Returns:
        nodes: for one, two and three bytes that are still to come, (n, 64) int32: by the next byte's lower six bits,
            the node of the level below (of level 0: the atom); -1: no such character.
        lead: (256,) int32, node of a first byte, in the level of its `more`; for `more` 0 the atom. -1: none.
        more: (256,) int, bytes that follow.
    """
    valid = atoms.astype(np.int32)
    valid[:128] = valid[0xD800:0xE000] = -1
    last, row = _unique_rows(valid.reshape(-1, 64))  # by code point >> 6
    row = row.astype(np.int32)
    short = row.copy()
    row[: 0x800 >> 6] = -1  # two bytes are enough for these, and must be used
    middle, block = _unique_rows(row.reshape(-1, 64))  # by code point >> 12
    block = block.astype(np.int32)
    three = block[:16].copy()
    block[:16] = -1
    block = np.append(block, np.full(-len(block) % 64, -1, dtype=np.int32))
    first, long = _unique_rows(block.reshape(-1, 64))  # by code point >> 18
    lead, more = np.full(256, -1, dtype=np.int32), np.zeros(256, dtype=np.int64)
    lead[:128] = atoms[:128]
    for start, nodes, n in ((0xC2, short[2:32], 1), (0xE0, three, 2), (0xF0, long.astype(np.int32), 3)):
        lead[start : start + len(nodes)], more[start : start + len(nodes)] = nodes, n
    return [last, middle, first], lead, more


def _over_bytes(table: np.ndarray, accept: np.ndarray, atoms: np.ndarray, limits: Limits) -> ByteAutomaton:
    nodes, lead, more = _utf8(atoms)
    n_full = len(table)
    known: dict[bytes, int] = {}
    partial: list[np.ndarray] = []  # rows of states within a character, by the lower six bits of the next byte

    def states_of(rows: np.ndarray) -> np.ndarray:
        """Returns (n,) the states that have these next states (n, 64)."""
        out = np.full(len(rows), DEAD, dtype=np.int32)
        some = np.flatnonzero((rows != DEAD).any(axis=1))
        for i in some.tolist():
            key = rows[i].tobytes()
            if key not in known:
                known[key] = n_full + len(partial)
                partial.append(rows[i].copy())
            out[i] = known[key]
        limits.check(n_full + len(partial))
        return out

    full = np.full((n_full, 256), DEAD, dtype=np.int32)
    widest = max(len(level) for level in nodes)
    chunk = max(1, (1 << 22) // (64 * widest))
    for begin in range(0, n_full, chunk):
        # column -1 of each level is what no character leads to
        part = full[begin : begin + chunk]
        nowhere = np.full((len(part), 1), DEAD, dtype=np.int32)
        below = np.concatenate([table[begin : begin + chunk], nowhere], axis=1)
        for n in range(4):
            part[:, more == n] = below[:, lead[more == n]]
            if n < 3:
                ids = states_of(below[:, nodes[n]].reshape(-1, 64)).reshape(len(part), -1)
                below = np.concatenate([ids, nowhere], axis=1)
    rest = np.full((len(partial), 256), DEAD, dtype=np.int32)
    if partial:
        rest[:, 0x80:0xC0] = np.stack(partial)
    return ByteAutomaton(np.concatenate([full, rest]), np.append(accept, np.zeros(len(partial), dtype=bool)))
