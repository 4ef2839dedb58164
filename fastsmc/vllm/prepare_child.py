"""The program of a helper process, which makes and prepares potentials (`fastsmc.vllm.prepare`).

Run by its path, so that it can ask for the signal with which it ends before it imports much. Its argument is the file
descriptor of a connection, on which it is told what it needs, says "" (or why not) when it is ready, and then answers
each (name, code, args) with a pickled potential, or with the kind of an error and its text, and with the most memory
that it has had, in bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
from importlib.metadata import EntryPoint
from multiprocessing.connection import Connection
from typing import Any

#: how nice a helper is to the engine, and how much sooner than it the kernel ends it where memory is short
NICE, OOM_SCORE = 10, 500


def end_with_the_engine() -> None:
    """Has the kernel send SIGIO, which ends a process, to this one's group when the other end of standard input closes.

    No thread could watch over it: what holds the interpreter's lock holds every thread.
    """
    fcntl.fcntl(0, fcntl.F_SETOWN, -os.getpgrp())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)


def most_bytes() -> int:
    """Returns the most memory that this process has had. `getrusage` would count that of the engine it came from."""
    with open("/proc/self/status") as file:
        found = re.search(r"^VmHWM:\s*(\d+) kB$", file.read(), re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def main(connection: Connection) -> None:
    """Answers the engine until it closes the connection."""
    try:
        path, cores, tokenizer_of = connection.recv()
        sys.path[:] = path
        os.sched_setaffinity(0, cores)
        os.nice(NICE)
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write(str(OOM_SCORE))
        tokenizer = None
        if tokenizer_of is not None:
            from transformers import AutoTokenizer

            path_or_name, options = tokenizer_of
            tokenizer = AutoTokenizer.from_pretrained(path_or_name, **options)
        import fastsmc.potentials  # noqa: F401  what `_prepare` imports, before anybody waits for it
    except EOFError:
        return
    except BaseException as error:
        connection.send(f"{type(error).__name__}: {error}")
        return
    connection.send("")
    while True:
        try:
            name, code, args = connection.recv()
        except EOFError:
            return
        answer = _prepare(name, code, args, tokenizer)
        connection.send((answer, most_bytes()))


def _prepare(name: str, code: str, args: str, tokenizer: Any) -> bytes | tuple[str, str]:
    """Returns a pickled potential, or kind ("refused": what was asked cannot be; "potential") and text of an error."""
    import cloudpickle

    from fastsmc.potentials import GROUP, resolve

    try:
        potential = resolve(name, json.loads(args), {name: EntryPoint(name, code, GROUP)})
    except BaseException as error:
        return "refused", str(error)
    try:
        potential.prepare(tokenizer)
    except BaseException as error:
        kind = "refused" if isinstance(error, ValueError) else "potential"
        return kind, f"potential {name!r}: prepare raised {type(error).__name__}: {error}"
    try:
        return cloudpickle.dumps(potential)
    except BaseException as error:
        what = f"what prepare left of {type(potential).__name__} cannot be pickled, to be sent to the engine"
        return "potential", f"potential {name!r}: {what}: {type(error).__name__}: {error}"


if __name__ == "__main__":
    end_with_the_engine()
    main(Connection(int(sys.argv[1])))
