"""Potentials that requests name are made and prepared in helper processes, which can be killed.

    Preparer.prepare → a helper (`fastsmc.vllm.prepare_child`): resolve, Potential.prepare, pickle → the potential

What a request asks for may hold the interpreter's lock, take memory and minutes, or end its process. A helper begins as
a new interpreter, with nothing of the engine's memory, files or devices, in a process group of its own. It imports what
potentials need, loads the model's tokenizer, and then prepares one potential after another, until it has to be killed.

A helper ends with the engine, however that ends: its standard input is a pipe that nobody writes to, and when the
engine's end of it closes, the kernel ends the helper and what it has started, whatever they do at the time.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Pipe
from typing import Any

from fastsmc.potentials import Potential
from fastsmc.smc import SMCError
from fastsmc.vllm import prepare_child

#: seconds that a helper may take to be ready, with imports and tokenizer
MAX_START = 300.0
#: a helper that has had more bytes of memory is not used again
MAX_BYTES = 2 << 30
#: the process's cores before vLLM pins its threads to some of them, the one that starts helpers among them
_CORES = os.sched_getaffinity(0)


class PrepareError(SMCError):
    """There is no potential.

    Attributes:
        kind: "refused" where what was asked cannot be, "limit" where it took too long, "engine", or "potential".
    """

    def __init__(self, message: str, kind: str = "potential") -> None:
        super().__init__(message)
        self.kind = kind


class _Lost(Exception):
    """A helper has ended, or was killed: why, and the kind of the error that this is."""

    def __init__(self, why: str, kind: str = "potential") -> None:
        super().__init__(why)
        self.kind = kind


class _Helper:
    """Is a helper process, as the engine sees it.

    Args:
        tokenizer: name and options of the tokenizer to load, as `AutoTokenizer.from_pretrained` takes them, or None.
    """

    def __init__(self, tokenizer: tuple[str, Mapping[str, Any]] | None) -> None:
        self._connection, theirs = Pipe()
        self._ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", prepare_child.__file__, str(theirs.fileno())],
            stdin=subprocess.PIPE,  # see the module's docstring
            stdout=2,  # what a potential prints
            pass_fds=[theirs.fileno()],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        theirs.close()
        self._send((sys.path, _CORES, tokenizer))

    def ask(self, name: str, code: str, args: str, seconds: float) -> tuple[bytes | tuple[str, str], int]:
        """Returns what a helper answers, and the bytes of memory that it has had.

        Raises:
            _Lost: it did not answer in time, and was killed, or it has ended.
        """
        if not self._ready:
            why_not = self._receive(MAX_START, f"was not ready within {MAX_START:g} s", "engine")
            if why_not:
                raise _Lost(f"cannot start: {why_not}", "engine")
            self._ready = True
        self._send((name, code, args))
        return self._receive(seconds, f"was not done within setup_timeout_s={seconds:g}", "limit")

    def _send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # to be met by `_receive`
            self._connection.send(message)

    def _receive(self, seconds: float, limit: str, kind: str) -> Any:
        try:
            if not self._connection.poll(seconds):
                raise _Lost(f"{limit}, and was killed", kind)
            return self._connection.recv()
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(1)  # for its own exit status: it has closed the connection
            self.kill()
            code = self._process.returncode
            how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
            # a signal such as SIGSEGV comes of what was asked for, say of a grammar that is nested too deeply
            raise _Lost(f"ended, with {how}", "refused" if code < 0 else "potential") from None

    def has_ended(self) -> bool:
        """Says so of one that nobody asks: once it is ready it has nothing to say."""
        return self._ready and self._connection.poll(0)

    def kill(self) -> None:
        """Ends the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Preparer:
    """Prepares potentials in helpers, each of which has one at a time. Any thread may call its methods.

    Args:
        tokenizer: as of a helper.
        seconds: after which a helper is killed with what it prepares.
    """

    def __init__(self, tokenizer: tuple[str, Mapping[str, Any]] | None, seconds: float) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._lock = threading.Lock()
        self._helpers: set[_Helper] = set()
        self._idle: _Helper | None = None  # one that is kept, ready for what comes next
        self._closed = False

    def warm_up(self) -> None:
        """Starts a helper, if none is idle, without a wait for it."""
        with self._lock:
            if self._idle is None:
                self._idle = self._begin()

    def prepare(self, name: str, code: str, args: str) -> Potential:
        """Makes the potential `name`, whose code is at 'module:attr', with JSON arguments, and prepares it.

        Raises:
            PrepareError: naming it and what went wrong.
        """
        with self._lock:
            helper, self._idle = self._idle, None
            if helper is not None and helper.has_ended():
                self._helpers.discard(helper)
                helper.kill()
                helper = None
            helper = helper or self._begin()
        try:
            answer, n_bytes = helper.ask(name, code, args, self._seconds)
        except BaseException as error:
            self._end(helper)
            if isinstance(error, _Lost):
                raise PrepareError(f"potential {name!r}: the process that prepared it {error}", error.kind) from None
            raise
        with self._lock:
            keep = self._idle is None and n_bytes <= MAX_BYTES and not self._closed
            if keep:
                self._idle = helper
        if not keep:
            self._end(helper)
        if isinstance(answer, tuple):
            kind, message = answer
            raise PrepareError(message, kind)
        try:
            return pickle.loads(answer)  # from our own helper
        except BaseException as error:
            raise PrepareError(f"potential {name!r}: what prepare left of it cannot be unpickled: {error}") from error

    def close(self) -> None:
        """Ends all helpers, whatever they do; none is begun any more."""
        with self._lock:
            self._closed, self._idle = True, None
            helpers, self._helpers = self._helpers, set()
        for helper in helpers:
            helper.kill()

    def _begin(self) -> _Helper:
        if self._closed:
            raise PrepareError("the engine is shut down", "engine")
        helper = _Helper(self._tokenizer)
        self._helpers.add(helper)
        return helper

    def _end(self, helper: _Helper) -> None:
        with self._lock:
            self._helpers.discard(helper)
        helper.kill()
