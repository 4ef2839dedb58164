"""The potentials of a worker: objects of an offline engine, potentials that requests name, and twists, all set up."""

from __future__ import annotations

import functools
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import EntryPoint
from typing import Any
from weakref import WeakValueDictionary

from fastsmc import potentials
from fastsmc.potentials import Potential
from fastsmc.reward_networks import Network
from fastsmc.smc import GroupEngine, SMCError, set_up
from fastsmc.twists import Twist, card_stamp
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.messages import GroupStart
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.prepare import PrepareError, Preparer
from fastsmc.vllm.request import OBJECT

logger = get_logger(__name__)

#: potentials by name and arguments that a worker keeps set up; the oldest goes first
_MAX_NAMED = 32
#: potentials by name that are prepared at the same time; others wait for their turn
_MAX_PREPARING = 2


def _key(name: str, args: str) -> str:
    """Returns what a potential by name is kept under: the same for arguments that are equal as JSON."""
    return f"{name} {json.dumps(json.loads(args), sort_keys=True)}"


def _named(start: GroupStart) -> str:
    assert start.potential is not None  # it is one by name
    return _key(start.potential, start.potential_args)


def _twist_key(name: str) -> str:
    return f"twist {name}"


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Has whatever is raised within say what of the operator's options it is about."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        said = str(error) if isinstance(error, SMCError | ValueError) else f"{type(error).__name__}: {error}"
        raise SMCError(f"{what}: {said}") from error


def _without_arguments(name: str, entry: EntryPoint) -> Potential | None:
    """Makes the potential that requests without arguments get; None if it takes some, and refuses to be without.

    Raises:
        ValueError: its code cannot be imported, or makes none.
    """
    try:
        return potentials.resolve(name, {}, {name: entry})
    except ValueError as error:
        if isinstance(error.__cause__, TypeError | ValueError) and inspect.signature(entry.load()).parameters:
            logger.info("%s; it is prepared when a request gives its arguments", error)
            return None
        raise


class _Preparation:
    """Has a potential that a request named prepared, and waits for it in a thread.

    Attributes:
        done: set when there is a potential, or an error, or when it was given up.
        wanted: bool, whether a group waits for it; if not, it is not begun any more.
    """

    def __init__(self, prepare: Callable[[], Potential], turns: threading.Semaphore) -> None:
        self.done = threading.Event()
        self.wanted, self.given_up = True, False
        self.error: PrepareError | None = None
        self.potential: Potential | None = None
        # a daemon: an engine that is shut down does not wait for what nobody will use
        threading.Thread(target=self._run, args=(prepare, turns), daemon=True).start()

    def _run(self, prepare: Callable[[], Potential], turns: threading.Semaphore) -> None:
        try:
            with turns:
                if not self.wanted:
                    self.given_up = True
                    return
                self.potential = prepare()
        except PrepareError as error:
            self.error = error
        except BaseException as error:
            logger.exception("a potential could not be prepared")
            self.error = PrepareError(f"internal error: {type(error).__name__}: {error}", "engine")
        finally:
            self.done.set()


class Shelf:
    """Keeps the potentials of one worker.

    Args:
        model_config: vLLM's.
        options: the engine's.
        make_engine: makes the engine that they are set up with, of a tokenizer.
    """

    def __init__(self, model_config: Any, options: EngineOptions, make_engine: Callable[[Any], GroupEngine]) -> None:
        self._options, self._make_engine = options, make_engine
        self._tokenizer: tuple[str, dict[str, Any]] | None = None  # as AutoTokenizer.from_pretrained takes it
        if not model_config.skip_tokenizer_init:
            self._tokenizer = (
                model_config.tokenizer,
                {
                    "revision": model_config.tokenizer_revision,
                    "trust_remote_code": model_config.trust_remote_code,
                },
            )
        self._preparer = Preparer(self._tokenizer, options.setup_timeout_s)
        self._networks: Mapping[str, Network] = {}
        self._engine: GroupEngine | None = None
        self._engine_lock = threading.Lock()
        self._potentials: dict[str, Potential] = {}
        self._kept: set[str] = set()  # of those the operator's, which never go
        # twists with what they guide, as long as a group has one: groups of one object may be asked together
        self._guided: WeakValueDictionary[tuple[int, int], Potential] = WeakValueDictionary()
        self._preparing: dict[str, _Preparation] = {}  # by name and arguments
        self._turns = threading.Semaphore(_MAX_PREPARING)

    def engine(self) -> GroupEngine:
        with self._engine_lock:  # threads that prepare potentials ask, too
            if self._engine is None:
                tokenizer = None
                if self._tokenizer is not None:
                    from transformers import AutoTokenizer

                    tokenizer = AutoTokenizer.from_pretrained(self._tokenizer[0], **self._tokenizer[1])
                self._engine = self._make_engine(tokenizer)
                self._engine.reward_models = self._networks
            return self._engine

    def open(self, networks: Mapping[str, Network]) -> None:
        """Sets up the operator's own twists and potentials, before there are requests, and gets ready for theirs.

        Of a potential that wants arguments, which only requests give, the code is imported.

        Args:
            networks: the engine's reward models, by name.

        Raises:
            SMCError: one of them cannot be set up; names it.
        """
        options, self._networks = self._options, networks
        if not options.offline and options.known_potentials():
            self._preparer.warm_up()
            self.engine()  # loads its tokenizer now, and not when a request waits
        for name, path in (options.twists or {}).items():
            with _naming(f"twists[{name!r}]={path!r}"):
                self._keep(_twist_key(name), Twist.load(path))
        if isinstance(options.potentials, Mapping):
            for name, entry in options.known_potentials().items():
                with _naming(f"potentials[{name!r}]={entry.value!r}"):
                    potential = _without_arguments(name, entry)
                    if potential is not None:
                        potential.prepare(self.engine().tokenizer)
                        self._keep(_key(name, "{}"), potential)

    def _keep(self, key: str, potential: Potential) -> None:
        self.put(key, potential)
        self._kept.add(key)

    def close(self) -> None:
        """Ends the processes that prepare potentials."""
        self._preparer.close()

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

    def _twist(self, name: str) -> Twist:
        """Returns the operator's twist of that name, or that saved at a path, kept while its card does not change."""
        path = name
        key = _twist_key(name)
        if key not in self._kept:
            key = f"{_twist_key(path)} {card_stamp(path)}"
        if key not in self._potentials:
            self._make_room()
            self.put(key, Twist.load(path))
        twist = self._potentials[key]
        assert isinstance(twist, Twist)  # a copy of what was put there
        return twist

    def _make_room(self) -> None:
        named = [known for known in self._potentials if not known.startswith(OBJECT) and known not in self._kept]
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
            PrepareError: it cannot be made, prepared or set up.
        """
        if start.potential is None or start.potential.startswith(OBJECT) or (key := _named(start)) in self._potentials:
            return True
        if key not in self._preparing or self._preparing[key].given_up:
            prepare = functools.partial(self._prepare, start.potential, start.potential_args)
            self._preparing[key] = _Preparation(prepare, self._turns)
        preparation = self._preparing[key]
        preparation.wanted = True
        if not preparation.done.is_set() or preparation.given_up:  # given up just now: the next call begins anew
            return False
        if (failed := preparation.error) is not None:  # kept for other groups that wait; the last takes it away
            raise PrepareError(str(failed), failed.kind)
        assert preparation.potential is not None  # done, and neither given up nor failed
        del self._preparing[key]
        self._make_room()
        try:
            self.put(key, preparation.potential)
        except SMCError as error:
            refused = isinstance(error.__cause__, ValueError)  # such as a token beyond the vocabulary
            raise PrepareError(str(error), "refused" if refused else "potential") from error
        return True

    def _prepare(self, name: str, args: str) -> Potential:
        self._preparer.warm_up()
        self.engine()  # loads a tokenizer, for which no step should wait; the helper loads its own meanwhile
        return self._preparer.prepare(name, self._options.known_potentials()[name].value, args)

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
