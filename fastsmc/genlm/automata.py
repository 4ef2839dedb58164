"""Coerced automata of genlm-control as fastsmc's own.

BoolFSA over bytes → states without ε → sets of states (deterministic) → minimal → moves by the model's tokens
WFSA over bytes → states without ε → weights of states, up to a factor (deterministic)
"""

from __future__ import annotations

import hashlib
import math
import types
import weakref
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from genlm.backend.tokenization import Token
from genlm.control import WFSA, BoolFSA
from genlm.control import Potential as GenlmBase
from genlm.control.potential.coerce import Coerced
from genlm.grammar import Log
from genlm.grammar.semiring import Boolean
from torch import Tensor

from fastsmc.automata.language import DEAD, ByteAutomaton, LimitError, Limits, minimal
from fastsmc.automata.tokens import TokenMoves, token_moves
from fastsmc.genlm.vocabulary import unwrapped
from fastsmc.potentials import Masked, State
from fastsmc.potentials.automaton import MAX_SECONDS, MAX_STATES, Automaton, fingerprint, made_once
from fastsmc.potentials.regex import FiniteState
from fastsmc.potentials.tokens import log_of
from fastsmc.vllm.compat import get_logger

logger = get_logger(__name__)

#: of an automaton with weights, which has tables of 3 KiB per state
MAX_WEIGHTED_STATES = 2_000
Fsa = TypeVar("Fsa", bound=WFSA)


def just_ended(state: State) -> Tensor:
    """Marks the particles that have ended with their last token, (N,) bool."""
    return state.finished if state.last_tokens is None else state.finished & (state.last_tokens >= 0)


class GenlmAutomaton(FiniteState):
    """Is a coerced `BoolFSA` of genlm-control, made by `compiled`.

    `prefix` is 0 as long as the bytes so far begin a text of the automaton, whether the model's tokens and their number
    allow its end or not, as genlm-control has it: of what `terminate_when` ends, it is the weight.
    """

    per_particle = ("_at",)

    def __init__(self, automaton: Automaton) -> None:
        self._automaton = automaton

    def prefix(self, state: State) -> Tensor:
        return self.scores(state, ~state.finished, "prefix")

    def complete(self, state: State) -> Tensor:
        return self.scores(state, just_ended(state), "complete")

    def scores(self, state: State, about: Tensor, method: str) -> Tensor:
        """Looks up "prefix" or "complete" of the texts of particles `about` (N,) bool: (N,) float64, 0 for others."""
        budget = self._budget(state.stop_token_ids)
        if method == "prefix":
            return log_of((self._go_on(state, budget) != budget.sink) | ~about)
        return log_of(budget.accept[self._states(state, budget)] | ~about)

    def logw_next(self, state: State) -> Masked:
        budget = self._budget(state.stop_token_ids)
        return budget.mask(self._go_on(state, budget), None)


def compiled(potential: GenlmBase) -> GenlmAutomaton | None:
    """Makes a potential of ours of `BoolFSA.coerce(llm, f=b"".join)`; None: this is none, or cannot be made into one.

    What has weights, another f, tokens without bytes, or sums of weights that do not exist stays genlm-control's, and
    so does, as the log says, what has too many states.
    """
    of = _within(potential, BoolFSA)
    if of is None:
        return None
    if potential not in _known:
        _known[potential] = _automaton_of(of, potential.vocab)
    automaton = _known[potential]
    return None if automaton is None else GenlmAutomaton(automaton)


_known: weakref.WeakKeyDictionary[Coerced, Automaton | None] = weakref.WeakKeyDictionary()


def _within(potential: GenlmBase, kind: type[Fsa]) -> Fsa | None:
    """Returns the automaton of this kind that is coerced over bytes; None: there is none."""
    if type(potential) is not Coerced or not _joins(potential.f) or not all(map(len, potential.vocab)):
        return None
    of = unwrapped(potential.potential)
    return of if type(of) is kind else None


def _joins(f: object) -> bool:
    """Says whether f is `b"".join`."""
    bound = getattr(f, "__self__", None)
    return isinstance(f, types.BuiltinMethodType) and type(bound) is bytes and not bound and f.__name__ == "join"


def _automaton_of(potential: BoolFSA, vocab: list[Token]) -> Automaton | None:
    tokens: list[bytes | None] = [None] * (1 + max(token.token_id for token in vocab))
    for token in vocab:
        tokens[token.token_id] = bytes(token)
    limits = Limits(MAX_STATES, MAX_SECONDS)
    try:
        over_bytes = _over_bytes(potential, limits)
        if over_bytes is None:
            return None
        name = hashlib.sha256(over_bytes.table.tobytes() + over_bytes.accept.tobytes()).hexdigest()
        return made_once(fingerprint(tokens), f"automaton {name}", lambda: _over_tokens(over_bytes, tokens, limits))
    except LimitError as error:
        logger.warning("%.100r: is asked on the host: %s", potential, error)
        return None


def _over_tokens(automaton: ByteAutomaton, tokens: list[bytes | None], limits: Limits) -> TokenMoves:
    moves = token_moves(automaton, tokens, limits)
    if automaton.accept.any():
        return moves
    return moves._replace(start=len(moves.accept) - 1)  # nothing is a text, so the start leads nowhere, too


def _over_bytes(potential: BoolFSA, limits: Limits) -> ByteAutomaton | None:
    """Makes the minimal automaton of the same texts; None: a weight that genlm-control computes is none.

    Symbols that are no bytes are moves that no text makes.
    """
    fsa = potential.wfsa.epsremove
    sums = [fsa.backward[state].score for state in fsa.states]
    weights = [w.score for *_, w in fsa.arcs()] + [w.score for _, w in fsa.F] + [w.score for _, w in fsa.I]
    if fsa.R is Log:
        known = all(map(math.isfinite, weights)) and not any(s == math.inf or s != s for s in sums)
    else:
        known = fsa.R is Boolean and all(weights)
    if not known:
        return None
    final = {state for state, _ in fsa.F}

    def follow(states: frozenset) -> dict[int, frozenset]:
        behind: dict[int, set] = {}
        for state in states:
            for symbol, after, _ in fsa.arcs(state):
                if symbol in range(256):
                    behind.setdefault(int(symbol), set()).add(after)
        return {byte: frozenset(targets) for byte, targets in behind.items()}

    table, order = _explore(frozenset(state for state, _ in fsa.I), follow, limits)
    return ByteAutomaton(*minimal(table, np.array([bool(states & final) for states in order]), limits))


def _explore(
    start: frozenset, follow: Callable[[frozenset], dict[int, frozenset]], limits: Limits
) -> tuple[np.ndarray, list[frozenset]]:
    """Makes a deterministic automaton of what `follow` says of each state, asked once and in order.

    Returns:
        (Q, 256) int32, next states by bytes, or DEAD; and the states.
    """
    order, found, table = [start], {start: 0}, []
    for state in order:
        limits.check(len(order))
        row = np.full(256, DEAD, dtype=np.int32)
        for byte, after in follow(state).items():
            row[byte] = found.setdefault(after, len(order))
            if len(found) > len(order):
                order.append(after)
        table.append(row)
    return np.stack(table), order


class ByteWeights(NamedTuple):
    """Is a deterministic automaton over bytes with log weights.

    Attributes:
        table: (Q, 256) int32, next state or DEAD; the start is 0.
        steps: (Q, 256) float64, what a byte adds to the log weight of a beginning.
        final: (Q,) float64, log weight of the text that ends here less that of the beginning.
        start: log weight of all texts.
    """

    table: np.ndarray
    steps: np.ndarray
    final: np.ndarray
    start: float


def weighted(potential: GenlmBase) -> ByteWeights | None:
    """Determinises `WFSA.coerce(llm, f=b"".join)` over bytes; None: this is none, or cannot be.

    A state is what its texts have given the automaton's states, up to a factor (weighted determinization, Mohri
    1997), equal to 12 digits. There may be infinitely many; beyond MAX_WEIGHTED_STATES the log says so.
    """
    of = _within(potential, WFSA)
    if of is None:
        return None
    if potential not in _known_weights:
        try:
            _known_weights[potential] = _determinise(of, Limits(MAX_WEIGHTED_STATES, MAX_SECONDS))
        except LimitError as error:
            logger.warning("%.100r: is asked on the host: %s", of, error)
            _known_weights[potential] = None
    return _known_weights[potential]


_known_weights: weakref.WeakKeyDictionary[Coerced, ByteWeights | None] = weakref.WeakKeyDictionary()


def _determinise(potential: WFSA, limits: Limits) -> ByteWeights | None:
    fsa = potential.wfsa.epsremove
    ahead = {state: fsa.backward[state].score for state in fsa.states}
    ends = {state: w.score for state, w in fsa.F}
    weights = [*ahead.values(), *ends.values(), *(w.score for *_, w in fsa.arcs()), *(w.score for _, w in fsa.I)]
    if any(w == math.inf or w != w for w in weights):
        return None

    def settle(weights: dict) -> tuple[float, frozenset]:
        """Returns the log weight of all that may follow, and the weights without that factor and what leads nowhere."""
        left = {state: w for state, w in weights.items() if w + ahead[state] > -math.inf}
        total = float(np.logaddexp.reduce([w + ahead[state] for state, w in left.items()])) if left else -math.inf
        return total, frozenset((state, round(float(w - total), 12)) for state, w in left.items())

    steps, final = [], []

    def follow(chart: frozenset) -> dict[int, frozenset]:
        behind: dict[int, dict] = {}
        for state, w in chart:
            for symbol, after, arc in fsa.arcs(state):
                if symbol in range(256):
                    sums = behind.setdefault(int(symbol), {})
                    sums[after] = np.logaddexp(sums.get(after, -math.inf), w + arc.score)
        settled = {byte: settle(sums) for byte, sums in behind.items()}
        steps.append([settled[byte][0] if byte in settled else -math.inf for byte in range(256)])
        final.append(np.logaddexp.reduce([w + ends.get(state, -math.inf) for state, w in chart]))
        return {byte: after for byte, (_, after) in settled.items() if after}

    start, chart = settle({state: w.score for state, w in fsa.I})
    table, _ = _explore(chart, follow, limits)
    return ByteWeights(table, np.array(steps), np.array(final), start)
