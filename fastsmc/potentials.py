"""Potentials: what the particles are weighed with.

The vocabulary is genlm-control's: `prefix` scores an unfinished sequence, `complete` a finished one, `logw_next` every
next token at once. A potential sees all N particles of a group in one call, as tensors on the worker's device.

First the base classes, then the potentials that come with fastsmc: `Lexicon`, `Regex`, `Infill`, `TextPotential`,
`Product`, `Final`, and `resolve`, which builds one from a registered name and JSON arguments.
"""

from __future__ import annotations

import copy
import importlib.metadata
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Rows(NamedTuple):
    """An (N, V) matrix whose rows repeat: row i is `values[index[i]]`.

    `Potential.logw_next` may return it instead of an (N, V) tensor, so that N particles in M distinct states cost
    M rows.

    Attributes:
        values: (M, V) floating point.
        index: (N,) int64 in [0, M).
    """

    values: Tensor
    index: Tensor


class State:
    """What a potential sees of a group of N particles after t generated tokens.

    Attributes:
        tokens: (N, t) int64, generated tokens so far, -1 after a particle's end.
        last_tokens: (N,) int64, each particle's token of the last step, -1 where it had ended; None before the first.
        lengths: (N,) int64, generated tokens of each particle.
        finished: (N,) bool, particles that have ended.
        hidden: (N, H) last hidden state of the base model at the position whose logits came last (in `logw_next`: of
            the last token; in `prefix` and `complete`: of the token before the one just drawn), zero for particles
            that ended earlier; None when the engine has none.
        rows: (N,) int64, which of the R distinct histories that the model has just seen is a particle's own (without
            the token just drawn, as in `hidden`); -1 for particles that ended earlier.
        hidden_rows: (R, H) hidden states of those, so that `hidden` is hidden_rows[rows]; or None.
        step: int, t.
        prompt: list of int, the prompt's tokens.
        max_tokens: int, the longest continuation.
        stop_token_ids: frozenset of int, the tokens that end a particle.
    """

    tokens: Tensor
    last_tokens: Tensor | None
    lengths: Tensor
    finished: Tensor
    hidden: Tensor | None
    rows: Tensor
    hidden_rows: Tensor | None
    step: int
    prompt: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]


class Engine:
    """What `Potential.setup` gets.

    Attributes:
        tokenizer: the model's tokenizer (a Hugging Face tokenizer), or None.
        device: torch.device of the group's tensors.
        vocab_size: int V, columns of `logw_next`.
        hidden_size: int H, or None.
        model: the base model as the engine runs it, or None.
        model_name: its name or path, or None.
    """

    tokenizer: Any
    device: torch.device
    vocab_size: int
    hidden_size: int | None
    model: Any
    model_name: str | None

    def continuation_log_prob(self, token_ids: list[int]) -> Tensor:
        """(N,) float64 log p0(token_ids | prompt, particle) at the group's temperature, by the engine's own KV cache.

        To be called from within `prefix` or `complete` of a potential whose `lookahead >= len(token_ids)`; rows that
        the call was not about (in `prefix` the finished ones, in `complete` those that did not end now) are 0.
        """
        raise NotImplementedError("this engine cannot score continuations")


class Potential:
    """Base class of potentials. Override what you need; all results are natural logarithms, -inf allowed.

    The target is p0(s)·φ(s)/Z with log φ = `complete`. `prefix` is log ψ_t, the twist of an unfinished sequence.
    `complete` defaults to `prefix`: then φ is the last ψ. One of the two must be overridden.
    """

    #: whether a step with this potential may be captured as a CUDA graph (fastsmc.captured): every method is a fixed
    #: sequence of tensor operations on the state and on own tensors, which are updated in place; no value is looked at
    #: on the host. State.tokens then is (N, max_tokens), -1 where nothing is drawn yet, State.step a 0-dim tensor.
    capturable: bool = False
    #: tokens beyond a particle's end that `Engine.continuation_log_prob` may be asked for
    lookahead: int = 0
    #: `logw_next` only shapes the proposal: weights are exact for whatever it gives, and `prefix` is the target's ψ.
    #: Such a group draws, weighs and then resamples.
    proposal_only: bool = False

    def prepare(self, tokenizer: Any) -> None:
        """Called in the front end, before `lookahead` is read; tokenizer: as `Engine.tokenizer`. Default: nothing."""

    def setup(self, engine: Engine) -> None:
        """Called once, in the worker process, before the first group that uses this object."""

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        """Called when a group starts: per-particle state for `n_particles` empty sequences begins here."""

    def reindex(self, ancestors: Tensor) -> None:
        """(N,) int64: per-particle state of row i becomes a copy of row ancestors[i]."""

    def prefix(self, state: State) -> Tensor:
        """(N,) log ψ_t(s_{1:t}) of unfinished particles."""
        return torch.zeros(state.finished.shape[0], dtype=torch.float64, device=state.finished.device)

    def complete(self, state: State) -> Tensor:
        """(N,) log φ(s); asked at each step at which particles end, about those."""
        return self.prefix(state)

    def logw_next(self, state: State) -> Tensor | Rows | None:
        """(N, V) log ψ_{t+1}(s, v) − log ψ_t(s) for every next token v; None: not used in the proposal."""
        return None

    def __mul__(self, other: Potential) -> Product:
        """ψ = ψ_self · ψ_other."""
        return Product(self, other) if isinstance(other, Potential) else NotImplemented


def answered(potential: Potential) -> set[str]:
    """Which of `prefix`, `complete` and `logw_next` a potential defines.

    Raises:
        ValueError: neither of the first two, so that there is no log φ.
    """
    methods = ("prefix", "complete", "logw_next")
    own = {name for name in methods if getattr(type(potential), name) is not getattr(Potential, name)}
    if not own & {"prefix", "complete"}:
        raise ValueError(f"potential {type(potential).__name__}: defines neither prefix nor complete, so no log φ")
    return own


# -- what the built-in potentials share -------------------------------------------------------------------------------
def _tokenizer_of(engine: Engine, who: str) -> Any:
    if engine.tokenizer is None:
        raise ValueError(f"{who}: this engine has no tokenizer")
    return engine.tokenizer


def token_list(name: str, ids: Any) -> list[int]:
    """`ids` as a list of int. ValueError, naming `name`, if it is none."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise ValueError(f"{name}={ids!r}: must be a list of token ids")
    for v in ids:
        if isinstance(v, bool) or not hasattr(v, "__index__") or int(v) < 0:
            raise ValueError(f"{name}: {v!r} is not a token id")
    return [int(v) for v in ids]


def _log(ok: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Where `ok` 0, elsewhere -inf."""
    return torch.zeros(ok.shape, dtype=dtype, device=ok.device).masked_fill_(~ok, -math.inf)


_token_bytes_cache: weakref.WeakKeyDictionary[Any, list[bytes | None]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each token id stands for; None for special tokens and ids that stand for nothing."""
    if tokenizer not in _token_bytes_cache:
        from xgrammar import TokenizerInfo  # comes with vLLM; knows byte-level BPE, byte fallback and raw vocabularies

        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        known = set(tokenizer.get_vocab().values())
        decoded = TokenizerInfo.from_huggingface(tokenizer).decoded_vocab
        _token_bytes_cache[tokenizer] = [
            token if token and i in known and i not in special else None for i, token in enumerate(decoded)
        ]
    return _token_bytes_cache[tokenizer]


# -- Lexicon -----------------------------------------------------------------------------------------------------------
class Lexicon(Potential):
    """log ψ_t = weight × (number of generated tokens that are in a set); `complete` is the same.

    Args:
        words: each stands for all its single-token spellings: with and without a leading space, as given and with its
            first letter capitalised.
        token_ids: further tokens of the set. Stop tokens count like any other.
        weight: log weight of one token; -inf (also as the string "-inf") forbids the set.

    Raises:
        ValueError: nothing is given, or weight is NaN or +inf; in `setup`: a word has no single-token spelling, or a
            token id is outside the vocabulary.
    """

    capturable = True

    def __init__(
        self, words: Sequence[str] | None = None, token_ids: Sequence[int] | None = None, weight: float = 1.0
    ) -> None:
        if isinstance(words, str) or not all(isinstance(w, str) and w.strip() for w in words or ()):
            raise ValueError(f"words={words!r}: must be a list of words")
        self.words = [w.strip() for w in words or ()]
        self.token_ids = token_list("token_ids", token_ids or [])
        if not self.words and not self.token_ids:
            raise ValueError("Lexicon: give words, token_ids or both")
        self.weight = float(weight)
        if math.isnan(self.weight) or self.weight == math.inf:
            raise ValueError(f"weight={weight!r}: must be finite or -inf")

    def setup(self, engine: Engine) -> None:
        ids = set(self.token_ids)
        if self.words:
            spellings: dict[bytes, list[int]] = {}
            for i, token in enumerate(token_bytes(_tokenizer_of(engine, "Lexicon(words)"))):
                if token is not None:
                    spellings.setdefault(token, []).append(i)
            for word in self.words:
                forms = {space + form for space in ("", " ") for form in (word, word[0].upper() + word[1:])}
                found = [i for form in forms for i in spellings.get(form.encode(), ())]
                if not found:
                    raise ValueError(f"Lexicon: {word!r} is not a single token of this model, spelt in any way")
                ids.update(found)
        if max(ids) >= engine.vocab_size:
            raise ValueError(f"Lexicon: token id {max(ids)} is outside the vocabulary of {engine.vocab_size}")
        self._member = torch.zeros(engine.vocab_size, dtype=torch.bool, device=engine.device)
        self._member[sorted(ids)] = True
        change = torch.zeros(1, engine.vocab_size, dtype=torch.float32, device=engine.device)
        self._change = change.masked_fill_(self._member, self.weight)

    def prefix(self, state: State) -> Tensor:
        tokens = state.tokens
        count = (self._member[tokens.clamp(min=0)] & (tokens >= 0)).sum(dim=1)
        # 0 · −inf would be NaN
        return torch.where(count > 0, count.double() * self.weight, torch.zeros_like(count, dtype=torch.float64))

    def logw_next(self, state: State) -> Rows:
        return Rows(self._change, torch.zeros_like(state.lengths))


# -- Regex -------------------------------------------------------------------------------------------------------------
class _Automaton(NamedTuple):
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


_automata: weakref.WeakKeyDictionary[Any, dict[str, _Automaton]] = weakref.WeakKeyDictionary()

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


def _token_automaton(pattern: str, tokens: list[bytes | None]) -> _Automaton:
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
    return _Automaton(table, classes.reshape(-1)[1:], np.append(accept[order], False), int(rename[start]))


def _splitmix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class _Budget:
    """An automaton on a device, with what can still be accepted within a number of tokens, for one set of stop tokens.

    Args:
        automaton: the automaton.
        stops: tokens that end a particle; they are no part of the text.
        vocab_size: V; tokens beyond the tokenizer's lead nowhere.
        device: where the tensors live.
    """

    def __init__(self, automaton: _Automaton, stops: frozenset[int], vocab_size: int, device: torch.device) -> None:
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
        return _log(by_class, torch.float16)[:, self.classes]

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

    def __init__(self, pattern: str) -> None:
        if not isinstance(pattern, str):
            raise ValueError(f"pattern={pattern!r}: must be a string")
        self.pattern = pattern

    def setup(self, engine: Engine) -> None:
        known = _automata.setdefault(_tokenizer_of(engine, "Regex"), {})
        if self.pattern not in known:
            known[self.pattern] = _token_automaton(self.pattern, token_bytes(engine.tokenizer))
        self._automaton = known[self.pattern]
        self._device, self._vocab_size = engine.device, engine.vocab_size
        self._budgets: dict[frozenset[int], _Budget] = {}  # shared by the groups' copies of this object
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
        return _log(budget.reach(max(state.max_tokens - state.step, 0))[self._states(state, budget)])

    def complete(self, state: State) -> Tensor:
        budget = self._budget(state.stop_token_ids)
        return _log(budget.accept[self._states(state, budget)])

    def logw_next(self, state: State) -> Rows:
        budget = self._budget(state.stop_token_ids)
        return budget.rows(self._states(state, budget), max(state.max_tokens - state.step - 1, 0))


# -- Infill, TextPotential, Product ------------------------------------------------------------------------------------
class Infill(Potential):
    """log φ = log p0(continuation | prompt, particle): particles are weighed by what should come after them.

    Args:
        continuation: text (encoded without special tokens) or token ids.
        every_step: True makes the same the twist of unfinished particles; each step then costs `lookahead` more.

    Raises:
        ValueError: the continuation is empty or not of these types.
    """

    def __init__(self, continuation: str | Sequence[int], every_step: bool = False) -> None:
        self.continuation, self.every_step = continuation, bool(every_step)
        self._ids = [] if isinstance(continuation, str) else token_list("continuation", continuation)
        if not len(continuation):
            raise ValueError("Infill: the continuation is empty")
        self.lookahead = len(self._ids)

    def prepare(self, tokenizer: Any) -> None:
        if isinstance(self.continuation, str):
            if tokenizer is None:
                raise ValueError("Infill: a continuation given as text needs a tokenizer; give token ids")
            self._ids = list(tokenizer.encode(self.continuation, add_special_tokens=False))
            self.lookahead = len(self._ids)

    def setup(self, engine: Engine) -> None:
        self._engine = engine
        self.prepare(engine.tokenizer)

    def prefix(self, state: State) -> Tensor:
        if self.every_step and state.step > 0:
            return self._engine.continuation_log_prob(self._ids)
        return super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._engine.continuation_log_prob(self._ids)


class TextPotential(Potential):
    """log φ = fn(texts): a Python function of the generated text, special tokens left out.

    Args:
        fn: list of str -> as many floats (natural logs, -inf allowed). It must be a function of the text alone: a
            text is asked once a group.
        every_step: True makes the same the twist of unfinished particles.

    Raises:
        ValueError: fn is not callable, or answers with a wrong number of values.
    """

    def __init__(self, fn: Callable[[list[str]], Sequence[float]], every_step: bool = False) -> None:
        if not callable(fn):
            raise ValueError(f"fn={fn!r}: must be callable")
        self.fn, self.every_step = fn, bool(every_step)

    def setup(self, engine: Engine) -> None:
        self._tokenizer = _tokenizer_of(engine, "TextPotential")
        self._known: dict[str, float] = {}

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._known = {}

    def _ask(self, state: State, about: Tensor) -> Tensor:
        """(N,) fn of the rows `about` (N,) bool, 0 elsewhere."""
        out = torch.zeros(len(about), dtype=torch.float64, device=about.device)
        rows = torch.nonzero(about).squeeze(1)
        sequences = [[v for v in row if v >= 0] for row in state.tokens[rows].tolist()]
        texts = self._tokenizer.batch_decode(sequences, skip_special_tokens=True) if sequences else []
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            values = self.fn(new)
            values = [float(v) for v in (values.reshape(-1) if hasattr(values, "reshape") else values)]
            if len(values) != len(new):
                raise ValueError(f"fn gave {len(values)} values for {len(new)} texts")
            self._known.update(zip(new, values, strict=True))
        out[rows] = torch.tensor([self._known[text] for text in texts], dtype=torch.float64, device=out.device)
        return out

    def prefix(self, state: State) -> Tensor:
        return self._ask(state, ~state.finished) if self.every_step else super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._ask(state, state.finished)


class Product(Potential):
    """ψ = product of the factors' ψ, φ of their φ; also written `p * q`.

    With the twisted proposal the factors that give `logw_next` guide every step, and the others come in with their
    `complete` when a particle ends. Groups work on copies, so the factors are copied with it.
    """

    def __init__(self, *factors: Potential) -> None:
        if not factors or not all(isinstance(f, Potential) for f in factors):
            raise ValueError("Product: give one or more potentials")
        self.factors = factors

    def __copy__(self) -> Product:
        return Product(*map(copy.copy, self.factors))

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return max(f.lookahead for f in self.factors)

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return all(f.capturable for f in self.factors)

    @property
    def proposal_only(self) -> bool:  # type: ignore[override]
        return any(f.proposal_only for f in self.factors)

    def prepare(self, tokenizer: Any) -> None:
        for f in self.factors:
            f.prepare(tokenizer)

    def setup(self, engine: Engine) -> None:
        for f in self.factors:
            f.setup(engine)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        for f in self.factors:
            f.reset(n_particles, prompt)

    def reindex(self, ancestors: Tensor) -> None:
        for f in self.factors:
            f.reindex(ancestors)

    def prefix(self, state: State) -> Tensor:
        return sum(f.prefix(state).double() for f in self.factors)

    def complete(self, state: State) -> Tensor:
        return sum(f.complete(state).double() for f in self.factors)

    def logw_next(self, state: State) -> Tensor | Rows | None:
        total = None
        for change in (f.logw_next(state) for f in self.factors):
            if total is None or change is None:
                total = change if total is None else total
                continue
            a, b = (
                r if isinstance(r, Rows) else Rows(r, torch.arange(len(r), device=r.device)) for r in (total, change)
            )
            pairs, index = torch.unique(a.index * len(b.values) + b.index, return_inverse=True)
            one, other = a.values[pairs // len(b.values)], b.values[pairs % len(b.values)]
            total = Rows(one.float() + other.float(), index)
        return total


class Final(Potential):
    """Another potential's φ without its ψ: what particles are weighed with when they end, and nothing before.

    Groups work on copies, so the other potential is copied with it.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    def __copy__(self) -> Final:
        return Final(copy.copy(self.potential))

    @property
    def capturable(self) -> bool:  # type: ignore[override]
        return self.potential.capturable

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return self.potential.lookahead

    def prepare(self, tokenizer: Any) -> None:
        self.potential.prepare(tokenizer)

    def setup(self, engine: Engine) -> None:
        self.potential.setup(engine)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self.potential.reset(n_particles, prompt)

    def reindex(self, ancestors: Tensor) -> None:
        self.potential.reindex(ancestors)

    def complete(self, state: State) -> Tensor:
        return self.potential.complete(state)


# -- by name -----------------------------------------------------------------------------------------------------------
GROUP = "fastsmc.potentials"


def registered() -> dict[str, importlib.metadata.EntryPoint]:
    """The potentials that installed packages register under the entry points `fastsmc.potentials`, by name."""
    return {entry.name: entry for entry in sorted(importlib.metadata.entry_points(group=GROUP))}


def resolve(name: str, args: Mapping[str, Any] | None = None) -> Potential:
    """The registered potential `name`, built with keyword arguments `args`.

    Raises:
        ValueError: an unknown name (the known ones are listed), one that cannot be imported, or arguments that it
            refuses.
    """
    known = registered()
    if name not in known:
        names = ", ".join(map(repr, known)) or f"none (no installed package has entry points {GROUP!r})"
        raise ValueError(f"potential {name!r}: unknown; known are {names}")
    if not isinstance(args or {}, Mapping):
        raise ValueError(f"potential {name!r}: arguments {args!r} must be a JSON object")
    try:
        build = known[name].load()
    except Exception as error:  # somebody's module: whatever it does must not end the engine
        raise ValueError(f"potential {name!r}: cannot load {known[name].value!r}: {error}") from error
    try:
        potential = build(**(args or {}))
    except Exception as error:
        raise ValueError(f"potential {name!r} with arguments {dict(args or {})!r}: {error}") from error
    if not isinstance(potential, Potential):
        raise ValueError(f"potential {name!r}: {known[name].value!r} does not make a fastsmc.Potential")
    return potential
