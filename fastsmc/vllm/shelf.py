"""The potentials of a worker: objects of an offline engine, potentials that requests name, and twists, all set up."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakValueDictionary

from fastsmc import potentials
from fastsmc.potentials import Potential
from fastsmc.smc import GroupEngine, SMCError, set_up
from fastsmc.twists import Twist, card_stamp
from fastsmc.vllm.messages import GroupStart
from fastsmc.vllm.request import OBJECT

#: potentials by name and arguments that a worker keeps set up; the oldest goes first
_MAX_NAMED = 32
#: potentials by name that are prepared at the same time; others wait for their turn
_MAX_PREPARING = 2


def _named(start: GroupStart) -> str:
    """Returns what a potential by name is kept under."""
    return f"{start.potential} {start.potential_args}"


class _Preparation:
    """Makes and prepares a potential that a request named, in a thread of its own.

    Attributes:
        done: set when there is a potential, or an error, or when it was given up.
        wanted: bool, whether a group waits for it; if not, it is not begun any more.
    """

    def __init__(self, name: str, args: str, get_engine: Callable[[], GroupEngine], turns: threading.Semaphore) -> None:
        self.done = threading.Event()
        self.wanted, self.given_up = True, False
        self.error: str | None = None
        self.potential: Potential | None = None
        # a daemon: an engine that is shut down does not wait for what nobody will use
        threading.Thread(target=self._run, args=(name, args, get_engine, turns), daemon=True).start()

    def _run(self, name: str, args: str, get_engine: Callable[[], GroupEngine], turns: threading.Semaphore) -> None:
        try:
            with turns:
                if not self.wanted:
                    self.given_up = True
                    return
                potential = potentials.resolve(name, json.loads(args))
                potential.prepare(get_engine().tokenizer)
            self.potential = potential
        except BaseException as error:  # of whatever a user's code does, only this potential's groups hear
            named = isinstance(error, ValueError) and str(error).startswith("potential ")
            self.error = str(error) if named else f"potential {name!r}: prepare raised {type(error).__name__}: {error}"
        finally:
            self.done.set()


class Shelf:
    """Keeps the potentials of one worker.

    Args:
        model_config: vLLM's.
        make_engine: makes the engine that they are set up with, of a tokenizer.
    """

    def __init__(self, model_config: Any, make_engine: Callable[[Any], GroupEngine]) -> None:
        self._model_config, self._make_engine = model_config, make_engine
        self._engine: GroupEngine | None = None
        self._engine_lock = threading.Lock()
        self._potentials: dict[str, Potential] = {}
        # twists with what they guide, as long as a group has one: groups of one object may be asked together
        self._guided: WeakValueDictionary[tuple[int, int], Potential] = WeakValueDictionary()
        self._preparing: dict[str, _Preparation] = {}  # by name and arguments
        self._turns = threading.Semaphore(_MAX_PREPARING)

    def engine(self) -> GroupEngine:
        with self._engine_lock:  # threads that prepare potentials ask, too
            if self._engine is None:
                config, tokenizer = self._model_config, None
                if not config.skip_tokenizer_init:
                    from transformers import AutoTokenizer

                    tokenizer = AutoTokenizer.from_pretrained(
                        config.tokenizer,
                        revision=config.tokenizer_revision,
                        trust_remote_code=config.trust_remote_code,
                    )
                self._engine = self._make_engine(tokenizer)
            return self._engine

    def put(self, name: str, potential: Potential) -> None:
        """Sets a potential up and keeps it under `name`."""
        self._potentials[name] = set_up(potential, self.engine())

    def drop(self, name: str) -> None:
        self._potentials.pop(name, None)

    def of(self, start: GroupStart) -> Potential | None:
        target = self._target(start)
        if start.twist is None:
            return target
        assert target is not None  # GroupRequest.parse wants a potential beside a twist
        twist = self._twist(start.twist)
        guided = self._guided.get((id(twist), id(target)))  # which holds both
        if guided is None:
            guided = self._guided[id(twist), id(target)] = twist.guide(target)
        return guided

    def _twist(self, path: str) -> Twist:
        """Returns the twist saved at `path`, which is kept as long as its card does not change."""
        key = f"twist {path} {card_stamp(path)}"
        if key not in self._potentials:
            self._make_room()
            self.put(key, Twist.load(path))
        twist = self._potentials[key]
        assert isinstance(twist, Twist)  # a copy of what was put there
        return twist

    def _make_room(self) -> None:
        named = [known for known in self._potentials if not known.startswith(OBJECT)]
        if len(named) >= _MAX_NAMED:
            self.drop(named[0])

    def _target(self, start: GroupStart) -> Potential | None:
        name = start.potential
        if name is None:
            return None
        if name.startswith(OBJECT):
            if name not in self._potentials:
                raise SMCError(f"potential={name!r}: not known to this engine; LLM.register_potential gives names")
            return self._potentials[name]
        return self._potentials[_named(start)]

    def is_ready(self, start: GroupStart) -> bool:
        """Says whether the potential that a group names is there; begins to prepare it if nobody has, and sets it up.

        Raises:
            SMCError: it cannot be made, prepared or set up.
        """
        if start.potential is None or start.potential.startswith(OBJECT) or (key := _named(start)) in self._potentials:
            return True
        if key not in self._preparing or self._preparing[key].given_up:
            self._preparing[key] = _Preparation(start.potential, start.potential_args, self.engine, self._turns)
        preparation = self._preparing[key]
        preparation.wanted = True
        if not preparation.done.is_set() or preparation.given_up:  # given up just now: the next call begins anew
            return False
        if preparation.error is not None:
            raise SMCError(preparation.error)  # kept for other groups that wait for it; the last takes it away
        assert preparation.potential is not None  # done, and neither given up nor failed
        del self._preparing[key]
        self._make_room()
        self.put(key, preparation.potential)
        return True

    def forget(self, waiting: Iterable[GroupStart]) -> None:
        """Begins no preparation that none of the groups in `waiting` waits for. What is being prepared is kept."""
        wanted, idle = {_named(start) for start in waiting}, []
        for key, preparation in list(self._preparing.items()):
            preparation.wanted = key in wanted
            if not preparation.wanted and preparation.done.is_set():
                if preparation.potential is None:
                    del self._preparing[key]
                else:
                    idle.append(key)
        for key in idle[:-_MAX_NAMED]:
            del self._preparing[key]

    def wait_a_little(self, seconds: float) -> None:
        """Waits until one of the potentials that groups wait for is prepared, but not for long."""
        if not self._preparing:
            return
        until = time.monotonic() + seconds
        while not any(p.done.is_set() for p in self._preparing.values()) and time.monotonic() < until:
            time.sleep(seconds / 5)
