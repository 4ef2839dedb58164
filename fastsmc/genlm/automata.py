"""Coerced automata of genlm-control as fastsmc's own.

BoolFSA over bytes → states without ε → sets of states (deterministic) → minimal → moves by the model's tokens
"""

from __future__ import annotations

import hashlib
import math
import types
import weakref

import numpy as np
from genlm.backend.tokenization import Token
from genlm.control import BoolFSA
from genlm.control import Potential as GenlmBase
from genlm.control.potential.autobatch import AutoBatchedPotential
from genlm.control.potential.coerce import Coerced
from genlm.grammar import Log
from genlm.grammar.semiring import Boolean
from torch import Tensor

from fastsmc.automata.language import DEAD, ByteAutomaton, LimitError, Limits, minimal
from fastsmc.automata.tokens import TokenMoves, token_moves
from fastsmc.potentials import Masked, State
from fastsmc.potentials.automaton import MAX_SECONDS, MAX_STATES, Automaton, fingerprint, made_once
from fastsmc.potentials.regex import FiniteState
from fastsmc.potentials.tokens import log_of
from fastsmc.vllm.compat import get_logger

logger = get_logger(__name__)


def just_ended(state: State) -> Tensor:
    """Marks the particles that have ended with their last token, (N,) bool."""
    return state.finished & (state.lengths == state.step)


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
    if type(potential) is not Coerced or not _joins(potential.f):
        return None
    of = potential.potential.potential if isinstance(potential.potential, AutoBatchedPotential) else potential.potential
    if type(of) is not BoolFSA:
        return None
    if potential not in _known:
        _known[potential] = _automaton_of(of, potential.vocab)
    automaton = _known[potential]
    return None if automaton is None else GenlmAutomaton(automaton)


_known: weakref.WeakKeyDictionary[Coerced, Automaton | None] = weakref.WeakKeyDictionary()


def _joins(f: object) -> bool:
    """Says whether f is `b"".join`."""
    bound = getattr(f, "__self__", None)
    return isinstance(f, types.BuiltinMethodType) and type(bound) is bytes and not bound and f.__name__ == "join"


def _automaton_of(potential: BoolFSA, vocab: list[Token]) -> Automaton | None:
    if not all(map(len, vocab)):
        return None
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

    States that lead to no end are left out, by genlm-control's own sums of weights; symbols that are no bytes are moves
    that no text makes.
    """
    fsa = potential.wfsa.epsremove
    sums = {state: fsa.backward[state].score for state in fsa.states}
    weights = [w.score for *_, w in fsa.arcs()] + [w.score for _, w in fsa.F] + [w.score for _, w in fsa.I]
    if fsa.R is Log and all(map(math.isfinite, weights)) and not any(s == math.inf or s != s for s in sums.values()):
        alive = {state for state, total in sums.items() if total > -math.inf}
    elif fsa.R is Boolean and all(weights):
        alive = {state for state, total in sums.items() if total}
    else:
        return None
    final = {state for state, _ in fsa.F}
    order = [frozenset(state for state, _ in fsa.I if state in alive)]
    found = {order[0]: 0}
    rows = []
    for states in order:
        limits.check(len(order))
        behind: dict[int, set] = {}
        for state in states:
            for symbol, after, _ in fsa.arcs(state):
                if after in alive and symbol in range(256):
                    behind.setdefault(int(symbol), set()).add(after)
        row = np.full(256, DEAD, dtype=np.int32)
        for byte, targets in behind.items():
            key = frozenset(targets)
            row[byte] = found.setdefault(key, len(order))
            if len(found) > len(order):
                order.append(key)
        rows.append(row)
    return ByteAutomaton(*minimal(np.stack(rows), np.array([bool(states & final) for states in order]), limits))
