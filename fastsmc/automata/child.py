"""A regular expression's automaton, made by a process of its own: it takes a core, memory and time, and can be killed.

Run as a script, with the folders of numpy (and of the package regex) as arguments, so that neither site-packages nor
fastsmc are imported as a whole. Standard input: a pickled tuple of pattern, tokens (bytes or None), and limits on
states, seconds of CPU time, bytes of memory and seconds by the clock, and how nice to be to other processes. Standard
output: a pickled pair ("ok", fields of a `TokenMoves`) or ("error", why not).
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
from typing import TYPE_CHECKING


def main() -> None:
    """Reads a task from standard input and answers it on standard output."""
    answer: tuple[str, tuple | str]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's affair
    pattern, tokens, states, seconds, memory, wait, nice = pickle.load(sys.stdin.buffer)
    signal.alarm(int(wait) + 1)  # should the parent be gone
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    os.nice(nice)
    try:
        answer = "ok", _make(pattern, tokens, states, seconds)
    except MemoryError:
        answer = "error", f"its automaton of up to {states} states needs more than {memory >> 20} MiB to be made"
    except ValueError as error:
        answer = "error", str(error)
    pickle.dump(answer, sys.stdout.buffer, protocol=5)


def _make(pattern: str, tokens: list[bytes | None], states: int, seconds: float) -> tuple:
    # "automata" is this folder, under the name that it has when it is a script's; see below
    if TYPE_CHECKING:
        from fastsmc.automata.language import Limits, byte_automaton
        from fastsmc.automata.syntax import parse
        from fastsmc.automata.tokens import token_moves
    else:
        from automata.language import Limits, byte_automaton
        from automata.syntax import parse
        from automata.tokens import token_moves

    limits = Limits(states, seconds)
    return tuple(token_moves(byte_automaton(parse(pattern), limits), tokens, limits))


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    import importlib.util

    import numpy  # noqa: F401  before there is a limit on memory

    here = os.path.dirname(os.path.abspath(__file__))
    # the folder as a package of another name, because to import fastsmc.automata would import fastsmc, and so torch
    spec = importlib.util.spec_from_file_location(
        "automata", os.path.join(here, "__init__.py"), submodule_search_locations=[here]
    )
    assert spec is not None and spec.loader is not None  # it names a file
    sys.modules["automata"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main()
