"""Potentials that a helper process imports, as code of an operator's: what `prepare` does is an argument."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from tiny import TableTwist, value_table

VALUE = 3 * value_table(100, 8)


class Slow(TableTwist):
    """The potential of `VALUE`, not prepared before there is a file "gate".

    Args:
        folder: where that file is to be, and files that say what has begun.
        how: what happens then.
    """

    def __init__(self, folder: str, how: str = "well") -> None:
        super().__init__(VALUE)
        self.folder, self.how = Path(folder), how

    def prepare(self, tokenizer):
        with open(self.folder / "begun", "a") as file:
            file.write(f"{self.how} {os.getpid()}\n")
        while not (self.folder / "gate").exists():
            time.sleep(0.01)
        if self.how == "raise":
            raise ValueError("no automaton")
        if self.how == "exit":
            sys.exit(3)
        if self.how == "die":
            os._exit(5)
        if self.how == "hold":  # the interpreter's lock, for ever; and a process that it has started
            child = subprocess.Popen(["sleep", "600"])
            (self.folder / "child").write_text(str(child.pid))
            re.match("(a|aa)*b", 80 * "a")
        if self.how == "flow":
            self.flow = (i for i in range(3))


class Plain(TableTwist):
    """The same without arguments. It says in which process it was prepared."""

    def __init__(self) -> None:
        super().__init__(VALUE)
        self.prepared_in = None

    def prepare(self, tokenizer):
        self.prepared_in = os.getpid()


class Broken(Plain):
    """An operator's that cannot be set up."""

    def setup(self, engine):
        raise RuntimeError("no such table")


def begun(folder: Path) -> list[list[str]]:
    """[how, process] of each that has begun to be prepared."""
    file = folder / "begun"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def alive(pid: int | str) -> bool:
    """Whether there is such a process, and it is no zombie of somebody's."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds: float = 200) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)
