"""`Matchers`: a grammar over a tokenizer's tokens, as states of llguidance's matchers, one per distinct history.

    particle → number of a state → LLMatcher → packed mask of the next tokens

Particles with equal tokens share a state, in all groups of a potential. A resampling moves numbers alone; after a draw
each distinct (state, token) is followed once. A state that no particle is in any more is freed.
"""

from __future__ import annotations

import functools
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from llguidance import LLExecutor, LLMatcher, LLTokenizer, TokenizerWrapper
from torch import Tensor

from fastsmc.potentials.base import Masked

#: numbers of the state of texts that no sentence begins with, and of the empty text
NOWHERE, START = 0, 1
#: seconds of processor time that making the first state may take, and bytes of stack
MAX_SECONDS, STACK = 2.0, 4 << 20
#: states that may be kept beside those that particles are in
_SPARE = 64
#: how the error of a matcher begins that has only found that nothing can follow
_NOTHING_FOLLOWS = "NoExtension"


class _Tokens:
    """Is a vocabulary as `TokenizerWrapper` takes it: V tokens, and behind them one for the end of a sentence.

    It tokenizes nothing: nobody asks where nothing is forced.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes | None], vocab_size: int) -> None:
        known = [token or b"" for token in tokens[:vocab_size]]
        self.tokens = [*known, *[b""] * (vocab_size - len(known)), b"end"]
        self.eos_token_id = vocab_size
        self.special_token_ids = [vocab_size]

    def __call__(self, text: bytes) -> list[int]:
        raise NotImplementedError


_vocabularies: weakref.WeakKeyDictionary[Any, dict[int, LLTokenizer]] = weakref.WeakKeyDictionary()


def vocabulary_of(tokenizer: Any, tokens: Sequence[bytes | None], vocab_size: int) -> LLTokenizer:
    """Returns llguidance's trie of a tokenizer's tokens, made once per tokenizer and V in some tenths of a second."""
    kept = _vocabularies.setdefault(tokenizer, {})
    if vocab_size not in kept:
        kept[vocab_size] = LLTokenizer(TokenizerWrapper(_Tokens(tokens, vocab_size)))
    return kept[vocab_size]


@functools.cache
def _executor() -> LLExecutor:
    """Returns the threads that fill masks: as many as this process may use cores, at most 16."""
    return LLExecutor(min(len(os.sched_getaffinity(0)), 16))


def start_of(vocabulary: LLTokenizer, grammar: str) -> LLMatcher:
    """Returns the state of the empty text.

    Raises:
        ValueError: llguidance's reason why it cannot be.
    """
    matcher = LLMatcher(vocabulary, grammar, log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # whatever takes long, or fails, at first
    if reason := _failure(matcher):
        raise ValueError(reason)
    return matcher


def check(vocabulary: LLTokenizer, grammar: str) -> None:
    """Makes what `Matchers` will make in the worker, where a grammar must neither crash it nor hold up its steps.

    Raises:
        ValueError: llguidance's reason why it cannot be, or it took longer than `MAX_SECONDS`.
    """
    begin = time.thread_time()
    start_of(vocabulary, grammar)
    if (seconds := time.thread_time() - begin) > MAX_SECONDS:
        raise ValueError(f"takes {seconds:.1f} s of processor time to compile; must take at most {MAX_SECONDS:g} s")


def on_a_small_stack(function: Callable[[], None]) -> None:
    """Calls a function in a thread with half of the usual stack. llguidance descends into what is nested by recursion:
    what does not end the process here will not end the worker."""
    usual = threading.stack_size(STACK)
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(function)
            threading.stack_size(usual)
            future.result()
    finally:
        threading.stack_size(usual)


def _failure(matcher: LLMatcher) -> str:
    """Says why a matcher has failed: a limit of llguidance's, a grammar that it cannot read. "": it has not."""
    reason = matcher.get_error().partition("<state>")[0].strip() if matcher.is_error() else ""
    return "" if reason.startswith(_NOTHING_FOLLOWS) else reason


class Matchers:
    """Holds the states that the particles of all groups of a potential are in.

    Args:
        vocabulary: of `vocabulary_of`.
        grammar: as `LLMatcher` takes it.
        tokens: bytes of each token id, None for those that are no text.
        vocab_size: V.
        device: of the tensors that come and go.
    """

    def __init__(
        self,
        vocabulary: LLTokenizer,
        grammar: str,
        tokens: Sequence[bytes | None],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        start = start_of(vocabulary, grammar)
        self.vocab_size, self._device = vocab_size, device
        self._width = vocabulary.vocab_size // 32 + (vocabulary.vocab_size % 32 > 0)
        self._is_text = [token is not None for token in tokens[:vocab_size]]
        self._text = self._pack([v for v, text in enumerate(self._is_text) if text])
        self._states: dict[int, LLMatcher] = {START: start}
        self._accepts: dict[int, bool] = {NOWHERE: False, START: start.is_accepting()}
        self._after: dict[tuple[int, int], int] = {}
        self._new = START + 1
        self._limit = _SPARE
        self._members: weakref.WeakSet[Any] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict) -> Matchers:
        return self

    def _pack(self, tokens: Sequence[int]) -> Tensor:
        """Returns (ceil(V / 32),) int32 with the bits of `tokens`."""
        bits = torch.zeros(-(-self.vocab_size // 32) * 32, dtype=torch.int64)
        bits[list(tokens)] = 1
        words = (bits.reshape(-1, 32) << torch.arange(32)).sum(1)
        return words.to(torch.int32)  # the 32nd bit wraps to the sign

    def follow(self, at: Tensor, tokens: Tensor) -> Tensor:
        """Returns (N,) int64 states after tokens (N,) int64 in states (N,); −1 is no token, and moves nothing.

        Raises:
            RuntimeError: a matcher has met a limit of llguidance's.
        """
        base = self.vocab_size + 1
        pairs, index = torch.unique(at * base + (tokens + 1), return_inverse=True)
        after = [self._follow(*divmod(pair, base)) for pair in pairs.tolist()]
        return torch.tensor(after, dtype=torch.int64, device=at.device)[index]

    def _follow(self, state: int, token: int) -> int:
        """Returns the state after a token, which is numbered from 1; 0 is none."""
        token -= 1
        if token < 0 or state == NOWHERE:
            return state
        known = self._after.get((state, token))
        if known is not None:
            return known
        after, matcher = NOWHERE, self._states[state]
        if token < len(self._is_text) and self._is_text[token] and not matcher.is_stopped():
            matcher = matcher.deep_copy()
            if matcher.try_consume_tokens([token]):
                after, self._new = self._new, self._new + 1
                self._states[after], self._accepts[after] = matcher, matcher.is_accepting()
            self._check(matcher)
        self._after[state, token] = after
        return after

    def accepts(self, at: Tensor) -> Tensor:
        """Returns (N,) bool, states (N,) whose text is a sentence."""
        states, index = torch.unique(at, return_inverse=True)
        accepted = [self._accepts[state] for state in states.tolist()]
        return torch.tensor(accepted, dtype=torch.bool, device=at.device)[index]

    def mask(self, at: Tensor, stop_tokens: Sequence[int]) -> Masked:
        """Returns the tokens that may follow in states (N,): text by the grammar, `stop_tokens` after a
        sentence.

        Raises:
            RuntimeError: a matcher has met a limit of llguidance's.
        """
        states, index = torch.unique(at, return_inverse=True)
        numbers = states.tolist()
        bits = torch.zeros((len(numbers), self._width), dtype=torch.int32)
        going = [(self._states[state], row) for row, state in enumerate(numbers) if state != NOWHERE]
        if going:
            _executor().unsafe_compute_mask_ptr(going, bits.data_ptr(), 4 * self._width, len(bits))
        for matcher, _ in going:
            self._check(matcher)
        stops = self._pack(stop_tokens)
        allowed = bits[:, : len(self._text)] & (self._text & ~stops)
        accepted = torch.tensor([self._accepts[state] for state in numbers])
        allowed |= torch.where(accepted[:, None], stops, 0)
        return Masked(allowed.to(self._device), index)

    @staticmethod
    def _check(matcher: LLMatcher) -> None:
        if reason := _failure(matcher):
            raise RuntimeError(f"llguidance: {reason}")

    def add(self, member: Any) -> None:
        """Has the states in `member._at` kept, as long as that potential lives."""
        self._members.add(member)

    def free(self) -> None:
        """Frees the states that no member is in, where there are many."""
        if len(self._states) <= self._limit:
            return
        members = [member._at for member in self._members]
        live = {START, *torch.unique(torch.cat(members)).tolist()}
        self._states = {state: matcher for state, matcher in self._states.items() if state in live}
        self._accepts = {state: a for state, a in self._accepts.items() if state in live or state == NOWHERE}
        self._after = {pair: s for pair, s in self._after.items() if pair[0] in live and (s in live or s == NOWHERE)}
        self._limit = 2 * len(self._states) + _SPARE
