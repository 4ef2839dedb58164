"""A screen with fastsmc's words only: what engines and other packages say goes to a file that errors name.

`engine_log` gives the file descriptors 1 and 2 to a log while an engine runs, so that also its processes, and libraries
that know nothing of Python, write there. `EngineLog.say` writes to the screen, and `EngineLog.cause` says in one line
why an engine did not start: the engine's own process prints the reason, and its parent raises only that there was one.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

#: logs that are kept; older ones go when a new one is made
KEPT_LOGS = 20
#: what an error says that only reports another process's
_REPORTS = re.compile(r"see (root cause above|stack trace)|initialization failed|engine core proc|cancelled", re.I)
#: what vLLM puts before the lines of its processes, and its logger before each line
_PREFIX = re.compile(r"^(\(\S+ pid=\d+\) )?((DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ (\[[^\]]*\] )?)?")
_ERROR = re.compile(r"^([A-Za-z_][\w.]*(Error|Exception|Exit|Interrupt|Warning|Timeout)): (.+)$")
_CHAINED = re.compile(r"^(During handling of the above exception|The above exception was the direct cause)")


class EngineError(RuntimeError):
    """An engine did not start, or died; the message says why and names the log."""


class EngineLog:
    """Knows where the engine's words go, and where ours do. `path` is None where everything goes to the screen."""

    def __init__(self, path: Path | None, out: TextIO, err: TextIO) -> None:
        self.path, self.out, self.err = path, out, err

    def say(self, text: str = "") -> None:
        print(text, file=self.out, flush=True)

    def progress(self, text: str) -> None:
        """Says that it goes on, to a person who looks."""
        if self.err.isatty():
            print(text, file=self.err, flush=True)

    def error(self, what: str, error: BaseException) -> EngineError:
        """Makes the error of one line to raise in the place of `error`, whose traceback goes to the log."""
        if self.path is not None:
            with contextlib.suppress(OSError), open(self.path, "a") as file:
                traceback.print_exception(error, file=file)
        where = "" if self.path is None else f" (log: {self.path})"
        return EngineError(f"{what}: {self.cause(error)}{where}")

    def cause(self, error: BaseException) -> str:
        if _REPORTS.search(str(error)) and self.path is not None:
            with contextlib.suppress(OSError):
                if (found := find_cause(self.path.read_text(errors="replace"))) is not None:
                    return found
        return one_line(error)


def one_line(error: BaseException) -> str:
    """Returns what an error says, in one line; of pydantic's, each argument with its value."""
    if callable(details := getattr(error, "errors", None)):
        with contextlib.suppress(Exception):  # errors of other packages that have a member of this name
            # of a value that could be of several kinds, the first kind says enough
            first = {detail["loc"][:1]: detail for detail in reversed(details())}
            return "; ".join(_field(detail) for detail in first.values())
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:3])
    if not text or isinstance(error, (KeyError, AttributeError, AssertionError, IndexError, TypeError)):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def _field(detail: dict[str, Any]) -> str:
    message = " ".join(detail["msg"].split()).removeprefix("Value error, ")
    return f"{detail['loc'][0]}={detail['input']!r}: {message}" if detail["loc"] else message


def find_cause(log: str) -> str | None:
    """Returns the line of a log that says why an engine's process ended: of its tracebacks' last lines the first that
    does not report another process's error or led to a later one."""
    lines = [_PREFIX.sub("", line) for line in log.splitlines()]
    in_traceback, found = False, None
    for i, line in enumerate(lines):
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and (match := _ERROR.match(line)):
            in_traceback = False
            if match[1].endswith("Warning") or _REPORTS.search(line):
                continue
            found = found or (line if match[1] not in ("ValueError", "RuntimeError") else match[3])
            after = next((later for later in lines[i + 1 : i + 4] if later.strip()), "")
            if _CHAINED.match(after):
                found = None
            else:
                break
    return found


@contextlib.contextmanager
def engine_log(name: str, verbose: bool = False) -> Iterator[EngineLog]:
    """Sends what this process and those that it starts write on stdout and stderr to a new log file.

    Args:
        name: of the command, for the file's name.
        verbose: everything goes to the screen instead, as it does where VLLM_LOGGING_LEVEL is set.
    """
    if verbose or os.environ.get("VLLM_LOGGING_LEVEL") or sys.stdout is None or sys.stderr is None:
        yield EngineLog(None, sys.stdout, sys.stderr)
        return
    path = new_log(name)
    sys.stdout.flush(), sys.stderr.flush()
    with contextlib.ExitStack() as stack:
        saved = [os.dup(1), os.dup(2)]
        for fd in saved:
            stack.callback(os.close, fd)
        out, err = _screen(sys.stdout, 1, stack), _screen(sys.stderr, 2, stack)
        with open(path, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        try:
            yield EngineLog(path, out, err)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)


def _screen(stream: TextIO, fd: int, stack: contextlib.ExitStack) -> TextIO:
    """Returns a stream to where `stream` leads now, even when its file descriptor is given to a log."""
    try:
        if stream.fileno() != fd:
            return stream
    except (AttributeError, OSError, ValueError):  # not a file: a test's
        return stream
    copy = os.fdopen(os.dup(fd), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
    stack.callback(_close, copy)
    return copy


def _close(stream: TextIO) -> None:
    with contextlib.suppress(OSError):  # its reader has left
        stream.close()


def new_log(name: str) -> Path:
    """Makes an empty log in the cache, or in the temporary directory where there can be none, and removes old ones."""
    from fastsmc.models import cache_dir

    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    try:
        folder = cache_dir() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / stamp
        path.touch(mode=0o600)
        for old in sorted(folder.glob("*.log"), key=lambda file: file.stat().st_mtime)[:-KEPT_LOGS]:
            old.unlink(missing_ok=True)
        return path
    except OSError:
        number, temporary = tempfile.mkstemp(prefix="fastsmc-", suffix=f"-{stamp}")
        os.close(number)
        return Path(temporary)
