"""`Regex`: the generated text matches a regular expression."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc.potentials.automaton import Automaton, token_automaton
from fastsmc.potentials.base import Engine, Potential, Rows, State
from fastsmc.potentials.tokens import log_of, token_bytes, tokenizer_of

_automata: weakref.WeakKeyDictionary[Any, dict[str, Automaton]] = weakref.WeakKeyDictionary()


class _Budget:
    """An automaton on a device, with what can still be accepted within a number of tokens, for one set of stop tokens.

    Args:
        automaton: the automaton.
        stops: tokens that end a particle; they are no part of the text.
        vocab_size: V; tokens beyond the tokenizer's lead nowhere.
        device: where the tensors live.
    """

    def __init__(self, automaton: Automaton, stops: frozenset[int], vocab_size: int, device: torch.device) -> None:
        self.n_states, n_classes = automaton.table.shape
        self.stop_class = n_classes
        classes = np.zeros(vocab_size, dtype=np.int64)
        known = min(vocab_size, len(automaton.classes))
        classes[:known] = automaton.classes[:known]
        stop_ids = [v for v in stops if v < vocab_size]
        classes[stop_ids] = self.stop_class
        used = np.setdiff1d(classes, [self.stop_class])
        targets = automaton.table[:, used]
        edges = np.unique(np.repeat(np.arange(self.n_states), len(used)) * self.n_states + targets.reshape(-1))
        self._source, self._target = edges // self.n_states, edges % self.n_states
        self._accept = automaton.accept
        # With stop tokens an accepting state may end at once; without, a particle ends by its length alone.
        self._may_end = automaton.accept if stop_ids else np.zeros_like(automaton.accept)
        self._reach = [automaton.accept]  # [k]: states that can end well within (without stop tokens: after) k tokens
        self._seen = {automaton.accept.tobytes(): 0}
        self._cycle: int | None = None  # from this entry on, `_reach` repeats itself
        self.table = torch.as_tensor(automaton.table, device=device)
        self.classes = torch.as_tensor(classes, device=device)
        self.accept = torch.as_tensor(automaton.accept, device=device)
        self._on_device: dict[int, Tensor] = {}
        self._all_states: tuple[int, Tensor] | None = None

    def _entry(self, left: int) -> int:
        """Index into `_reach` for `left` tokens, which it grows as needed."""
        while self._cycle is None and len(self._reach) <= left:
            now = self._may_end.copy()
            now[self._source[self._reach[-1][self._target]]] = True
            self._cycle = self._seen.setdefault(now.tobytes(), len(self._reach))
            if self._cycle == len(self._reach):
                self._cycle = None
                self._reach.append(now)
        if left < len(self._reach):
            return left
        return self._cycle + (left - self._cycle) % (len(self._reach) - self._cycle)

    def reach(self, left: int) -> Tensor:
        """(S + 1,) bool: states from which an accepting end is possible when `left` tokens are."""
        entry = self._entry(left)
        if entry not in self._on_device:
            self._on_device[entry] = torch.as_tensor(self._reach[entry], device=self.table.device)
        return self._on_device[entry]

    def _mask(self, states: Tensor, left: int) -> Tensor:
        """(M,) states -> (M, V) float16, 0 where the next token leaves an accepting end possible, else -inf."""
        by_class = torch.cat([self.reach(left)[self.table[states]], self.accept[states, None]], dim=1)
        return log_of(by_class, torch.float16)[:, self.classes]

    def rows(self, at: Tensor, left: int) -> Rows:
        """(N,) states -> masks of the next token, after which `left` tokens are possible."""
        entry = self._entry(left)
        settled = self._cycle is not None and entry >= self._cycle  # else the masks change from step to step
        if not settled or self.n_states * len(self.classes) > 2**25:
            states, index = torch.unique(at, return_inverse=True)
            return Rows(self._mask(states, left), index)
        if self._all_states is None or self._all_states[0] != entry:
            everything = torch.arange(self.n_states, device=at.device)
            self._all_states = (entry, self._mask(everything, left))
        return Rows(self._all_states[1], at)


class Regex(Potential):
    """φ = 1 if the generated text, without the stop token, matches the whole pattern, else 0.

    ψ is 1 as long as the text can still become a match within `max_tokens`, so that no particle that follows the
    twisted proposal runs out of tokens in the middle of a match. Stop tokens are allowed where the text matches. The
    text is the bytes of the tokens in a row; special tokens other than stop tokens are never part of a match.

    Args:
        pattern: a regular expression as outlines_core takes it (Rust's syntax: no look-around, no back references;
            classes are Unicode, `.` is anything but a line feed).

    Raises:
        ValueError: in `setup`: the pattern is not one, or no sequence of tokens matches it.
    """

    shared_by_groups = ("_automaton", "_budgets")

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise ValueError(f"pattern={pattern!r}: must be a string")
        self.pattern = pattern

    def setup(self, engine: Engine) -> None:
        known = _automata.setdefault(tokenizer_of(engine, "Regex"), {})
        if self.pattern not in known:
            known[self.pattern] = token_automaton(self.pattern, token_bytes(engine.tokenizer))
        self._automaton = known[self.pattern]
        self._device, self._vocab_size = engine.device, engine.vocab_size
        self._budgets: dict[frozenset[int], _Budget] = {}
        if not self._automaton.accept.any():  # its states are those that tokens lead to
            raise ValueError(f"Regex: no sequence of this model's tokens matches pattern={self.pattern!r}")
        self.reset(0, [])

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._at = torch.full((n_particles,), self._automaton.start, dtype=torch.int64, device=self._device)
        self._consumed = 0

    def reindex(self, ancestors: Tensor) -> None:
        self._at = self._at[ancestors]

    def _budget(self, stops: frozenset[int]) -> _Budget:
        if stops not in self._budgets:
            self._budgets[stops] = _Budget(self._automaton, stops, self._vocab_size, self._device)
        return self._budgets[stops]

    def _states(self, state: State, budget: _Budget) -> Tensor:
        """(N,) int64 automaton states, brought up to `state.step` tokens; stop tokens do not move them."""
        if state.step < self._consumed or len(self._at) != len(state.lengths):
            self.reset(len(state.lengths), state.prompt)
        for column in range(self._consumed, state.step):
            token = state.tokens[:, column]
            kind = budget.classes[token.clamp(min=0)]
            moves = (token >= 0) & (kind != budget.stop_class)
            after = budget.table[self._at, torch.where(moves, kind, torch.zeros_like(kind))]
            self._at = torch.where(moves, after, self._at)
        self._consumed = state.step
        return self._at

    def prefix(self, state: State) -> Tensor:
        budget = self._budget(state.stop_token_ids)
        return log_of(budget.reach(max(state.max_tokens - state.step, 0))[self._states(state, budget)])

    def complete(self, state: State) -> Tensor:
        budget = self._budget(state.stop_token_ids)
        return log_of(budget.accept[self._states(state, budget)])

    def logw_next(self, state: State) -> Rows:
        budget = self._budget(state.stop_token_ids)
        return budget.rows(self._states(state, budget), max(state.max_tokens - state.step - 1, 0))
