"""`Automaton`: a regular expression over a tokenizer's tokens, made by a child process and kept.

pattern → fastsmc.automata, in a child with limits on states, memory and time → Automaton → its tables on a device
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fastsmc.automata import child
from fastsmc.automata.tokens import TokenMoves
from fastsmc.potentials.tokens import token_bytes

#: what one pattern may cost: states of its automaton over bytes, seconds of CPU time, bytes of memory while it is made
MAX_STATES, MAX_SECONDS, MAX_MEMORY = 50_000, 8.0, 1 << 30
#: seconds by the clock after which the process that makes an automaton is killed, whatever it does
MAX_WAIT = 60.0
#: how nice the child of a thread beside an engine's steps is
NICE = 10
#: automata that a process keeps for patterns that come again; the one not used for longest goes first
MAX_KEPT, MAX_KEPT_BYTES = 64, 256 << 20
#: seconds after which one line on standard error says what is being waited for
PATIENCE = 1.0


class Automaton:
    """Is a regular expression as a deterministic automaton over classes of tokens. It never changes, and so is never
    copied: groups, and copies that came by several pickles, share it.

    Attributes:
        moves: TokenMoves, its tables on the host.
        vocabulary: bytes, fingerprint of the tokens.
        pattern: str, the regular expression, or another name of the language.
        tables: its moves on devices, as `Regex` looks them up.
        budgets: what `Regex` has made of it for sets of stop tokens, the latest last.
    """

    def __init__(self, moves: TokenMoves, vocabulary: bytes, pattern: str) -> None:
        self.moves, self.vocabulary, self.pattern = moves, vocabulary, pattern
        self.tables: dict[Any, Any] = {}
        self.budgets: OrderedDict[Any, Any] = OrderedDict()

    @property
    def n_bytes(self) -> int:
        return sum(part.nbytes for part in self.moves if isinstance(part, np.ndarray))

    def __deepcopy__(self, memo: dict) -> Automaton:
        return self

    def __copy__(self) -> Automaton:
        return self

    def __reduce__(self) -> tuple:
        return _shared, (tuple(map(_narrow, self.moves)), self.vocabulary, self.pattern)


def _narrow(part: Any) -> Any:
    """Returns the same integers in 16 bits where they fit, for the way between processes."""
    small = isinstance(part, np.ndarray) and part.dtype == np.int32 and part.size and part.max() < 2**16
    return part.astype(np.uint16) if small else part


_alive: weakref.WeakValueDictionary[tuple[bytes, str], Automaton] = weakref.WeakValueDictionary()
_kept: OrderedDict[tuple[bytes, str], Automaton] = OrderedDict()
_making: dict[tuple[bytes, str], Future] = {}
_lock = threading.Lock()


def _shared(parts: tuple, vocabulary: bytes, pattern: str) -> Automaton:
    """Returns the automaton of a pickle, or that of this process which it is equal to."""
    with _lock:
        key = vocabulary, pattern
        automaton = _alive.get(key)
        if automaton is None:
            wide = (part.astype(np.int32) if getattr(part, "dtype", None) == np.uint16 else part for part in parts)
            automaton = _keep(key, Automaton(TokenMoves(*wide), vocabulary, pattern))
    return automaton


def _keep(key: tuple[bytes, str], automaton: Automaton) -> Automaton:
    _alive[key] = _kept[key] = automaton
    while len(_kept) > MAX_KEPT or (len(_kept) > 1 and sum(a.n_bytes for a in _kept.values()) > MAX_KEPT_BYTES):
        _kept.popitem(last=False)
    return automaton


def automaton_of(pattern: str, tokenizer: Any) -> Automaton:
    """Returns the automaton of `pattern` over a tokenizer's tokens; made once per process, whoever asks how often.

    Waits for the child that makes it, and says so on standard error if that takes long.

    Raises:
        ValueError: no automaton, or none within the limits; names the pattern and why.
    """
    return made_once(_fingerprint(tokenizer), pattern, lambda: compile_tokens(pattern, token_bytes(tokenizer)))


def made_once(vocabulary: bytes, pattern: str, make: Callable[[], TokenMoves]) -> Automaton:
    """Returns the automaton of this name that the process has, else what `make` makes; others who ask meanwhile wait.

    Args:
        vocabulary, pattern: as of `Automaton`; equal ones have equal moves.
    """
    key = vocabulary, pattern
    with _lock:
        automaton = _alive.get(key)
        if automaton is not None:
            _kept[key] = automaton
            _kept.move_to_end(key)
            return automaton
        waiting = _making.get(key)
        if waiting is None:
            future = _making[key] = Future()
    if waiting is not None:
        return waiting.result()
    try:
        moves = make()
        with _lock:
            automaton = _keep(key, Automaton(moves, vocabulary, pattern))
        future.set_result(automaton)
        return automaton
    except BaseException as error:
        # another waiter gets what ended this one, but no KeyboardInterrupt that is not its own
        future.set_exception(
            error if isinstance(error, Exception) else ValueError(f"Regex: pattern={pattern!r}: given up")
        )
        future.exception()
        raise
    finally:
        with _lock:
            _making.pop(key, None)


_fingerprints: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()


def _fingerprint(tokenizer: Any) -> bytes:
    if tokenizer not in _fingerprints:
        _fingerprints[tokenizer] = fingerprint(token_bytes(tokenizer))
    return _fingerprints[tokenizer]


def fingerprint(tokens: list[bytes | None]) -> bytes:
    """Makes a name of a vocabulary, the same for equal ones only."""
    return hashlib.sha256(pickle.dumps(tokens)).digest()


def compile_tokens(
    pattern: str,
    tokens: list[bytes | None],
    states: int = MAX_STATES,
    seconds: float = MAX_SECONDS,
    memory: int = MAX_MEMORY,
    wait: float = MAX_WAIT,
) -> TokenMoves:
    """Makes the automaton of `pattern` over tokens given as bytes (None leads nowhere), by a child process with limits.

    Raises:
        ValueError: naming the pattern, and what is wrong with it or which limit it met.
    """
    specs = [importlib.util.find_spec(name) for name in ("numpy", "regex")]
    folders = {str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin is not None}
    command = [sys.executable, "-I", "-S", child.__file__, *folders]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        beside_steps = threading.current_thread() is not threading.main_thread()  # which come first
        pickle.dump((pattern, tokens, states, seconds, memory, wait, NICE if beside_steps else 0), task)
        task.seek(0)
        process = subprocess.Popen(command, stdin=task, stdout=out, stderr=err, env=environment)
        try:
            _wait(process, pattern, wait)
        except subprocess.TimeoutExpired:
            raise ValueError(f"Regex: pattern={pattern!r}: its states were not ready within {wait:g} s") from None
        finally:
            process.kill()  # KeyboardInterrupt is among the reasons; does nothing if it has ended
            process.wait()
        if process.returncode != 0:
            err.seek(0)
            last = err.read().decode(errors="replace").split("\n")[-2:-1] or [f"exit status {process.returncode}"]
            raise ValueError(f"Regex: pattern={pattern!r}: the process that makes its states failed: {last[0]}")
        out.seek(0)
        kind, answer = pickle.load(out)
    if kind == "error":
        raise ValueError(f"Regex: pattern={pattern!r}: {answer}")
    return TokenMoves(*answer)


def _wait(process: subprocess.Popen, pattern: str, seconds: float) -> None:
    start = time.monotonic()
    try:
        process.wait(min(PATIENCE, seconds))
        return
    except subprocess.TimeoutExpired:
        if seconds <= PATIENCE:
            raise
    short = pattern if len(pattern) <= 60 else pattern[:57] + "..."
    print(f"fastsmc: compiling Regex({short!r}) ...", file=sys.stderr, flush=True)
    process.wait(seconds - (time.monotonic() - start))
