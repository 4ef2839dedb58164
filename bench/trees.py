"""Engines in processes of their own, so that two source trees, or two settings, can be measured in turn.

    OtherEngine(tree, script, "--serve", …)     here: calls of its methods go to that process and come back
    serve(make)                                 there: makes the engine and answers, until its stdin closes
    peer_environment(python)                    variables of a peer's interpreter, with its own OpenMP library

`script` runs with `tree` on PYTHONPATH, so that its fastsmc is that tree's. Arguments and answers are JSON values. It
needs nothing but Python, so that the peers' environments import it too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def peer_environment(python: str) -> dict[str, str]:
    """Makes the environment of an interpreter that has no fastsmc: Intel's OpenMP is that of its own folder."""
    environment = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}
    if (library := Path(python).parents[1] / "lib" / "libiomp5.so").exists():
        environment["LD_PRELOAD"] = str(library)
    return environment


class OtherEngine:
    """Does as the engine that `script arguments…` serves in another process, with the fastsmc of `tree`.

    Args:
        peer: a peer's interpreter, which then runs the script; the fastsmc of `tree` is not there.

    Raises:
        RuntimeError: from a call, if that process has ended.
    """

    def __init__(self, tree: Path, script: str, *arguments: str, peer: str | None = None) -> None:
        environment = os.environ | {"PYTHONPATH": str(tree)} if peer is None else peer_environment(peer)
        environment.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.tree = tree
        self.process = subprocess.Popen(
            [peer or sys.executable, script, *arguments],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None  # pipes
        self._requests, self._answers = self.process.stdin, self.process.stdout
        self._read()

    def _read(self) -> Any:
        line = self._answers.readline()
        if not line:
            raise RuntimeError(f"the engine of {self.tree} ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._requests.write(json.dumps([method, *arguments]) + "\n")
            self._requests.flush()
            return self._read()

        return call

    def close(self) -> None:
        self._requests.close()
        self.process.wait(60)


def serve(make: Callable[[], Any]) -> None:
    """Serves an `OtherEngine`: requests by line on stdin, answers on stdout, where vLLM no longer writes."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engine = make()
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        print(json.dumps(getattr(engine, method)(*arguments)), file=out, flush=True)
