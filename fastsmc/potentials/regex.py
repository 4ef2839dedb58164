"""`FiniteState`, a potential that follows an automaton; `Regex`: the generated text matches a regular expression."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc.automata import syntax
from fastsmc.potentials.automaton import Automaton, automaton_of
from fastsmc.potentials.base import Engine, Masked, Potential, State
from fastsmc.potentials.tokens import log_of, tokenizer_of

#: characters of a pattern; engines parse it in their steps, at some microseconds each
MAX_CHARACTERS = 1 << 16
#: bytes of masks that one automaton keeps for one set of stop tokens
MAX_MASK_BYTES = 32 << 20
#: sets of stop tokens of one automaton, and numbers of tokens left, whose tables stay on the device
MAX_BUDGETS, MAX_REACHES = 16, 64
_NO_KEY = 1 << 62  # behind every key of a move
_ANYWHERE = -1  # an entry of `_Budget` for any number of tokens left


class _Masks:
    """Keeps masks of the states that particles have been in, for a number of tokens left, until they are too many.

    Attributes:
        states: (m + 1,) int64, ascending, whose masks there are; the last is no state.
        slots: (m + 1,) int64, where they are in `bits`.
        bits: (capacity, ceil(V / 32)) int32, of which the first m are masks. What a step was given never changes.
    """

    def __init__(self, n_states: int, n_words: int, device: torch.device) -> None:
        self.states = torch.tensor([n_states], dtype=torch.int64, device=device)
        self.slots = torch.zeros_like(self.states)
        self.bits = torch.empty((0, n_words), dtype=torch.int32, device=device)

    @property
    def n_bytes(self) -> int:
        return 4 * self.bits.numel() + 16 * len(self.states)

    def find(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (N,) slots of states (N,) int64, and (N,) bool which of them have no mask."""
        at = torch.searchsorted(self.states, states)
        return self.slots[at], self.states[at] != states

    def add(self, states: Tensor, masks: Tensor) -> None:
        """Adds masks (m, W) int32 of states (m,) int64 that have none."""
        used = len(self.states) - 1
        end = used + len(states)
        if end > len(self.bits):
            old = self.bits
            self.bits = old.new_empty((max(end, len(old) + len(old) // 20), old.shape[1]))
            self.bits[:used] = old[:used]
        self.bits[used:end] = masks
        self.states, order = torch.sort(torch.cat([self.states, states]))
        self.slots = torch.cat([self.slots, torch.arange(used, end, device=states.device)])[order]


class _Budget:
    """Holds an automaton on a device, with what can still be accepted within a number of tokens, for some stop tokens.

    Args:
        automaton: the automaton.
        stops: tokens that end a particle; they are no part of the text.
        vocab_size: V; tokens beyond the tokenizer's lead nowhere.
        device: where the tensors live.
    """

    def __init__(self, automaton: Automaton, stops: frozenset[int], vocab_size: int, device: torch.device) -> None:
        moves = self._moves = automaton.moves
        self.n_states = len(moves.accept)
        self.sink = self.n_states - 1
        self.stop_class = int(moves.classes.max(initial=0)) + 1
        classes = np.zeros(vocab_size, dtype=np.int32)
        known = min(vocab_size, len(moves.classes))
        classes[:known] = moves.classes[:known]
        stop_ids = [v for v in stops if v < vocab_size]
        classes[stop_ids] = self.stop_class
        self._classes = classes
        source = np.repeat(np.arange(self.n_states, dtype=np.int64), np.diff(moves.first))
        self._edges = moves.edges
        lost = np.setdiff1d(moves.classes, classes)
        if len(lost):  # classes all of whose tokens are stop tokens or beyond V
            left = ~np.isin(moves.by, lost)
            self._edges = np.stack([source[left], moves.to[left]])
        # With stop tokens an accepting state may end at once; without, a particle ends by its length alone.
        self._may_end = moves.accept if stop_ids else np.zeros_like(moves.accept)
        self._reach = [moves.accept]  # [k]: states that can end well within (without stop tokens: after) k tokens
        self._seen = {moves.accept.tobytes(): 0}
        self._cycle: int | None = None  # from this entry on, `_reach` repeats itself
        if device not in automaton.tables:
            keys = np.append(source * (self.stop_class + 1) + moves.by, _NO_KEY)
            to = np.append(moves.to, self.sink).astype(np.int64)
            automaton.tables[device] = torch.as_tensor(keys, device=device), torch.as_tensor(to, device=device)
        self._keys, self._to = automaton.tables[device]
        self.classes = torch.as_tensor(classes.astype(np.int64), device=device)
        self.accept = torch.as_tensor(moves.accept, device=device)
        self._on_device: OrderedDict[int, Tensor] = OrderedDict()
        self._masks: OrderedDict[int, _Masks] = OrderedDict()

    def __deepcopy__(self, memo: dict) -> _Budget:
        return self

    def move(self, states: Tensor, kinds: Tensor) -> Tensor:
        """Returns (N,) next states by states (N,) and classes of tokens (N,)."""
        keys = states * (self.stop_class + 1) + kinds
        at = torch.searchsorted(self._keys, keys)
        return torch.where(self._keys[at] == keys, self._to[at], self.sink)

    def _entry(self, left: int) -> int:
        """Returns the index into `_reach` for `left` tokens; `_reach` grows as needed."""
        source, target = self._edges
        while self._cycle is None and len(self._reach) <= left:
            now = self._may_end.copy()
            now[source[self._reach[-1][target]]] = True
            self._cycle = self._seen.setdefault(now.tobytes(), len(self._reach))
            if self._cycle == len(self._reach):
                self._cycle = None
                self._reach.append(now)
        if self._cycle is None or left < len(self._reach):
            return left
        return self._cycle + (left - self._cycle) % (len(self._reach) - self._cycle)

    def by_left(self, state: State, later: int) -> list[tuple[int, Tensor]]:
        """Lists how many tokens particles have left after `later` more, and which have so many, (N,) bool; numbers that
        allow the same are one. All have as many where none waits for others."""
        if state.segments is None:
            return [(max(state.max_tokens - state.step - later, 0), torch.ones_like(state.finished))]
        left = (state.max_tokens - state.lengths - later).clamp(min=0)
        numbers: dict[int, list[int]] = {}
        for n in left.unique().tolist():
            numbers.setdefault(self._entry(n), []).append(n)
        return [(same[0], torch.isin(left, left.new_tensor(same))) for same in numbers.values()]

    def reach(self, left: int) -> Tensor:
        """Returns (S + 1,) bool: states from which an accepting end is possible when `left` tokens are."""
        entry = self._entry(left)
        if entry not in self._on_device:
            self._on_device[entry] = torch.as_tensor(self._reach[entry], device=self.accept.device)
            if len(self._on_device) > MAX_REACHES:
                self._on_device.popitem(last=False)
        return self._on_device[entry]

    def mask(self, at: Tensor, left: int | None) -> Masked:
        """Returns the next tokens by states (N,) after which, with `left` more, an accepting end is possible.

        With None: all that lead to a state, however far from an end.
        """
        entry = _ANYWHERE if left is None else self._entry(left)
        masks = self._masks.get(entry)
        if masks is None:
            masks = self._masks[entry] = self._no_masks()
        self._masks.move_to_end(entry)
        slots, missing = masks.find(at)
        if bool(missing.any()):
            new = torch.unique(at[missing])
            if masks.n_bytes + 4 * masks.bits.shape[1] * len(new) > MAX_MASK_BYTES:
                masks, new = self._no_masks(), torch.unique(at)
                self._masks[entry] = masks
            masks.add(new, torch.as_tensor(self._pack(new.tolist(), entry), device=at.device))
            while len(self._masks) > 1 and sum(m.n_bytes for m in self._masks.values()) > MAX_MASK_BYTES:
                self._masks.popitem(last=False)
            slots, _ = masks.find(at)
        return Masked(masks.bits, slots)

    def _no_masks(self) -> _Masks:
        return _Masks(self.n_states, -(-len(self._classes) // 32), self.accept.device)

    def _pack(self, states: list[int], entry: int) -> np.ndarray:
        """Makes (m, ceil(V / 32)) int32 masks of m states on the host."""
        moves, n_words = self._moves, -(-len(self._classes) // 32)
        reach = np.ones(self.n_states, dtype=bool) if entry == _ANYWHERE else self._reach[entry]
        out = np.zeros((len(states), 4 * n_words), dtype=np.uint8)
        allowed = np.zeros(self.stop_class + 1, dtype=bool)
        for row, s in zip(out, states, strict=True):
            part = slice(moves.first[s], moves.first[s + 1])
            allowed[:] = False
            allowed[moves.by[part]] = reach[moves.to[part]]
            allowed[self.stop_class] = moves.accept[s]
            packed = np.packbits(allowed[self._classes], bitorder="little")
            row[: len(packed)] = packed
        return out.view("<i4").astype(np.int32, copy=False)


class FiniteState(Potential):
    """Follows an automaton over tokens: what its subclasses say of a text hangs on the state that its tokens lead to.

    Subclasses set `_automaton` before `setup`, and say `per_particle = ("_at",)`.
    """

    shared_by_groups = ("_automaton",)
    _automaton: Automaton | None = None

    def setup(self, engine: Engine) -> None:
        self._device, self._vocab_size = engine.device, engine.vocab_size
        self.reset(0, [])

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._at = torch.full((n_particles,), self._made().moves.start, dtype=torch.int64, device=self._device)
        self._consumed = 0

    def reindex(self, ancestors: Tensor) -> None:
        self._at = self._at[ancestors]

    def _made(self) -> Automaton:
        assert self._automaton is not None  # setup prepares it
        return self._automaton

    def _budget(self, stops: frozenset[int]) -> _Budget:
        """Returns what all groups of this automaton share."""
        automaton = self._made()
        kept, key = automaton.budgets, (stops, self._vocab_size, self._device)
        if key not in kept:
            kept[key] = _Budget(automaton, *key)
            if len(kept) > MAX_BUDGETS:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]

    def _states(self, state: State, budget: _Budget) -> Tensor:
        """Returns (N,) int64 automaton states after `state.step` tokens; stop tokens do not move them."""
        if state.step < self._consumed or len(self._at) != len(state.lengths):
            self.reset(len(state.lengths), state.prompt)
        at, n_new = self._at, state.step - self._consumed
        # else they would have to be traced back, as they are where some have waited
        if n_new == 1 and state.last_tokens is not None and state.segments is None:
            columns = [state.last_tokens]
        else:
            columns = list(state.tokens[:, self._consumed :].T) if n_new else []
        for token in columns:
            kind = budget.classes[token.clamp(min=0)]
            moves = (token >= 0) & (kind != budget.stop_class)
            at = torch.where(moves, budget.move(at, kind), at)
        return at

    def _go_on(self, state: State, budget: _Budget) -> Tensor:
        """Returns the same, and goes on from there. `complete` does not, so groups at one step are equally far."""
        self._at, self._consumed = self._states(state, budget), state.step
        return self._at


class Regex(FiniteState):
    """φ = 1 if the generated text, without the stop token, matches the whole pattern, else 0.

    ψ is 1 as long as the text can still become a match within `max_tokens`, so that no particle that follows the
    twisted proposal runs out of tokens in the middle of a match. Stop tokens are allowed where the text matches. The
    text is the bytes of the tokens in a row; special tokens other than stop tokens are never part of a match.

    The syntax is what Python's `re` and Rust's `regex` agree on, with the sets of characters of `re`: `.`, sets in
    brackets, `\\d \\w \\s` and their negations (Unicode), `\\p{...}`, groups with and without names, alternatives,
    repetitions (lazy ones, too: the language is the same), `^ $ \\A \\z \\Z` anywhere (the start and the very end of
    the text), escapes `\\n \\t \\r \\f \\v \\a \\xHH \\x{H..} \\uHHHH \\UHHHHHHHH \\N{NAME}`, comments, and the flags
    i, s, a and u. A brace that starts no repetition stands for itself. Refused by name: look-around, back-references,
    word boundaries, possessive repetitions, atomic, conditional and recursive groups, other flags, octal escapes, sets
    within sets.

    The automaton is made once per tokenizer and pattern, in a process of its own with limits on states, time and
    memory (`fastsmc.potentials.automaton`).

    Args:
        pattern: the regular expression.

    Raises:
        ValueError: the pattern is not one, is too long, or has what is not supported; in `prepare` and `setup`: its
            automaton is beyond the limits, or no sequence of tokens matches it.
    """

    per_particle = ("_at",)

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise ValueError(f"pattern={pattern!r}: must be a string")
        if len(pattern) > MAX_CHARACTERS:
            raise ValueError(f"Regex: pattern has {len(pattern)} characters; must have at most {MAX_CHARACTERS}")
        try:
            syntax.parse(pattern)
        except ValueError as error:
            raise ValueError(f"Regex: pattern={pattern!r}: {error}") from None
        self.pattern = pattern
        self._automaton: Automaton | None = None

    def prepare(self, tokenizer: Any) -> None:
        if tokenizer is None:
            raise ValueError("Regex: this engine has no tokenizer")
        self._automaton = automaton_of(self.pattern, tokenizer)
        if not self._automaton.moves.accept.any():  # its states are those that tokens lead to
            raise ValueError(f"Regex: no sequence of this model's tokens matches pattern={self.pattern!r}")

    def setup(self, engine: Engine) -> None:
        tokenizer = tokenizer_of(engine, "Regex")
        if self._automaton is None:  # nobody has prepared this object
            self.prepare(tokenizer)
        super().setup(engine)

    def prefix(self, state: State) -> Tensor:
        budget = self._budget(state.stop_token_ids)
        at = self._go_on(state, budget)
        out = torch.zeros_like(state.finished)
        for left, rows in budget.by_left(state, 0):
            out |= rows & budget.reach(left)[at]
        return log_of(out)

    def complete(self, state: State) -> Tensor:
        budget = self._budget(state.stop_token_ids)
        return log_of(budget.accept[self._states(state, budget)])

    def logw_next(self, state: State) -> Masked:
        budget = self._budget(state.stop_token_ids)
        at = self._go_on(state, budget)
        masks = [(rows, budget.mask(at, left)) for left, rows in budget.by_left(state, 1)]
        if len(masks) == 1:
            return masks[0][1]
        bits, index, n = [], torch.zeros_like(at), 0
        for rows, mask in masks:
            needed, place = torch.unique(mask.index[rows], return_inverse=True)
            index[rows] = place + n
            bits.append(mask.bits[needed])
            n += len(needed)
        return Masked(torch.cat(bits), index)
