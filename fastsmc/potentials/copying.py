"""A group's own copy of a potential: state is copied, what `setup` built is not duplicated.

`own_copy` walks everything that a potential holds and decides by type:

    copied when written to   torch tensors (copy-on-write storages); views of one storage stay views of one storage
    copied                   containers, objects, writable NumPy arrays, random generators, potentials within potentials
    asked                    objects that define `__deepcopy__`
    shared                   what `Potential.shared_by_groups` names, the engine and what it holds, modules, functions,
                             classes, tokenizers, read-only arrays, and what cannot be copied: locks, queues, files,
                             objects of extensions; a connection or thread together with the object that holds it
    refused                  generators, iterators and coroutines, which can neither be copied nor shared

Shared references and cycles are kept.
"""

from __future__ import annotations

import _thread
import asyncio
import collections.abc
import concurrent.futures
import contextvars
import copy
import ctypes
import functools
import io
import logging
import mmap
import multiprocessing.process
import queue
import socket
import ssl
import subprocess
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsmc.potentials.base import Engine, Potential

_ATOMS: set[type] = {
    type(None), bool, int, float, complex, str, bytes, range, slice, type, type(Ellipsis), type(NotImplemented),
    types.FunctionType, types.ModuleType, types.CodeType, weakref.ref, property, torch.dtype, torch.device, torch.Size,
    torch.layout, torch.memory_format,
}  # fmt: skip

#: connections and threads: the object that holds one, directly or in a container, is shared with it
_LINKS = (
    socket.socket, ssl.SSLContext, subprocess.Popen, multiprocessing.process.BaseProcess, threading.Thread,
    concurrent.futures.Executor, asyncio.AbstractEventLoop,
)  # fmt: skip

_SHARED = (
    *_LINKS, type, nn.Module, Engine, io.IOBase, _thread.LockType, _thread.RLock, threading.Condition,
    threading.Event, threading.Semaphore, threading.Barrier, threading.local, queue.Queue, queue.SimpleQueue,
    concurrent.futures.Future, asyncio.Future, logging.Logger, logging.Handler, contextvars.ContextVar, mmap.mmap,
    memoryview, weakref.ref, weakref.ProxyTypes[0], weakref.ProxyTypes[1], np.generic, np.dtype,
)  # fmt: skip

_FLOWS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)

_ABSENT = object()


def own_copy(potential: Potential, engine: Engine | None = None, *, on_write: bool = True) -> Potential:
    """Makes a potential that shares no state with `potential`, by the rules of this module.

    Args:
        potential: as its `setup` left it.
        engine: what it was set up with; it and what it holds are shared.
        on_write: False copies tensors at once, so that their addresses stay, as a CUDA graph needs it.

    Raises:
        ValueError: naming the class, the attribute and the type of what can neither be copied nor shared.
    """
    with torch.inference_mode(False), torch.no_grad():  # copies are ordinary tensors, whoever runs the group
        try:
            return _Copier(engine, on_write)(potential)
        except _Refused as error:
            raise ValueError(f"potential {type(potential).__name__}{error.path}: {error}") from error.__cause__
        except RecursionError:
            raise ValueError(f"potential {type(potential).__name__}: is nested too deeply to be copied") from None


def for_others(tensor: Tensor) -> Tensor:
    """Returns `tensor` for somebody who may write to it: on the CPU it is copied only then."""
    if tensor.device.type == "cpu":
        try:
            return torch._lazy_clone(tensor)
        except RuntimeError:
            pass  # memory that is not torch's own
    return tensor.clone()


class _Refused(Exception):
    """Something cannot be copied; `path` grows on the way out."""

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(what)
        self.path = path


class _Copier:
    """Walks once over what a potential holds, and copies it.

    Attributes:
        memo: id → copy, as of `copy.deepcopy`; `keep` holds the originals, so that no id is used twice.
        storages: copies of storages, by the address of the original's StorageImpl.
        blocks: (first address, last address + 1, copy as uint8) of memory that NumPy arrays may lie in.
        linked: a connection was met since the object that is being copied was begun.
    """

    def __init__(self, engine: Engine | None, on_write: bool) -> None:
        self.on_write = on_write
        held = [] if engine is None else [engine, *vars(engine).values()]
        self.memo: dict[int, Any] = {id(value): value for value in held}
        self.keep: list[Any] = held
        self.storages: dict[int, Any] = {}
        self.blocks: list[tuple[int, int, np.ndarray]] = []
        self.linked = False
        model = None if engine is None else vars(engine).get("model")  # under tensor parallelism it raises
        self.model_storages = _storages(model) if isinstance(model, nn.Module) else frozenset()

    def __call__(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ATOMS:
            return value
        known = self.memo.get(id(value), _ABSENT)
        if known is not _ABSENT:
            return known
        handler = _handlers.get(kind)
        if handler is None:
            handler = _handlers[kind] = _handler(kind)
        self.keep.append(value)
        out = handler(self, value)
        self.memo[id(value)] = out
        return out

    # ------------------------------------------------------------------------------------------------- containers
    def each(self, pairs: Any, name: Callable[[Any], str], copied: Callable[[Any], Any] | None = None) -> list[Any]:
        """Copies the values of (key, value) pairs; `name` says in errors what a key stands for."""
        out, copied = [], copied or self
        for key, value in pairs:
            try:
                out.append(copied(value))
            except _Refused as error:
                error.path = name(key) + error.path
                raise
        return out

    def list_(self, value: list) -> list:
        out = self.memo[id(value)] = []
        out += value if _atomic(value) else self.each(enumerate(value), "[{}]".format)
        return out

    def tuple_(self, value: tuple) -> tuple:
        if _atomic(value):
            return value
        out = tuple(self.each(enumerate(value), "[{}]".format))
        return self.memo.get(id(value), out)  # met again within itself

    def dict_(self, value: dict) -> dict:
        out = self.memo[id(value)] = {}
        if _atomic(value) and _atomic(value.values()):
            out.update(value)
        else:
            keys = value if _atomic(value) else self.each(((key, key) for key in value), " key {!r}".format)
            out.update(zip(keys, self.each(value.items(), "[{!r}]".format), strict=True))
        return out

    def set_(self, value: Any) -> Any:
        return type(value)(value if _atomic(value) else self.each(((v, v) for v in value), " element {!r}".format))

    # ---------------------------------------------------------------------------------------------------- objects
    def share(self, value: Any) -> Any:
        return value

    def link(self, value: Any) -> Any:
        self.linked = True
        return value

    def refuse(self, value: Any) -> Any:
        raise _Refused(
            f"is a {type(value).__name__}, which can neither be copied for a group nor shared by groups; keep a "
            "list, or make it in `reset`"
        )

    def ask(self, value: Any) -> Any:
        try:
            return value.__deepcopy__(self.memo)
        except (_Refused, KeyboardInterrupt):
            raise
        except BaseException as error:
            name = type(value).__name__
            raise _Refused(f"is a {name} whose __deepcopy__ raised {type(error).__name__}: {error}") from error

    def method(self, value: types.MethodType) -> Any:
        return types.MethodType(value.__func__, self(value.__self__))

    def builtin(self, value: types.BuiltinMethodType) -> Any:
        owner = value.__self__
        if owner is None or isinstance(owner, (types.ModuleType, type)):
            return value
        return getattr(self(owner), value.__name__)

    def cached(self, value: Any) -> Any:
        return functools.lru_cache(**value.cache_parameters())(self(value.__wrapped__))

    def instance(self, value: Any) -> Any:
        """Copies an object of a class written in Python: its attributes, whatever it says to pickle."""
        kind: Any = type(value)  # mypy takes type[Any] for no Hashable, which `functools.cache` wants
        is_potential = isinstance(value, Potential)
        out, known, outer = object.__new__(kind), len(self.memo), self.linked
        self.memo[id(value)] = out
        self.linked = False
        shared, apart = _attributes(kind) if is_potential else ((), ())
        slots = [(name, getattr(value, name)) for name in _slots(kind) if hasattr(value, name)]
        attributes = getattr(value, "__dict__", {})
        for store, pairs in ((functools.partial(object.__setattr__, out), slots), (None, attributes.items())):
            for name, held in list(pairs):
                if type(held) in _ATOMS or name in shared:
                    new = held
                else:
                    try:
                        new = self.apart(held) if name in apart else self(held)
                    except _Refused as error:
                        error.path = f".{name}{error.path}"
                        raise
                if store is None:
                    out.__dict__[name] = new
                else:
                    store(name, new)
        linked, self.linked = self.linked and not is_potential, outer
        if linked:
            while len(self.memo) > known:
                self.memo.popitem()
            return value
        return out

    def apart(self, value: Any) -> Any:
        """Copies a potential, or a tuple of them, each by itself: of one that stands twice come two."""
        forks = []

        def alone(part: Potential) -> Potential:
            fork = copy.copy(self)
            fork.memo, fork.storages = dict(self.memo), dict(self.storages)
            forks.append(fork)
            return fork(part)

        out = tuple(self.each(enumerate(value), "[{}]".format, alone)) if isinstance(value, tuple) else alone(value)
        for fork in reversed(forks):  # whoever else names a part means the first of its kind
            self.memo.update(fork.memo)
            self.storages.update(fork.storages)
        return out

    def reduce(self, value: Any) -> Any:
        """Copies as pickle takes apart: subclasses of containers and most of what is written in C."""
        try:
            reduced = value.__reduce_ex__(4)
        except Exception:
            return value  # cannot be copied
        if isinstance(reduced, str):
            return value
        build, args, state, items, pairs = (*reduced, None, None, None)[:5]
        try:
            out = build(*self(args))
            self.memo[id(value)] = out
            if state is not None:
                self._set_state(out, self(state))
            for item in self.each(enumerate(items or ()), "[{}]".format):
                out.append(item)
            for key, item in pairs or ():
                out[self(key)] = self.each([(key, item)], "[{!r}]".format)[0]
        except (_Refused, RecursionError, KeyboardInterrupt):
            raise
        except BaseException as error:
            raise _Refused(f"cannot copy a {type(value).__name__}: {type(error).__name__}: {error}") from error
        return out

    def _set_state(self, out: Any, state: Any) -> None:
        if hasattr(out, "__setstate__"):
            out.__setstate__(state)
            return
        state, slots = state if isinstance(state, tuple) and len(state) == 2 else (state, None)
        for name, value in {**(state or {}), **(slots or {})}.items():
            object.__setattr__(out, name, value)

    # ---------------------------------------------------------------------------------------------------- tensors
    def tensor(self, value: Tensor) -> Tensor:
        if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            return copy.deepcopy(value.detach(), self.memo).requires_grad_(value.requires_grad)
        storage = value.untyped_storage()
        if storage._cdata in self.model_storages:
            return value
        plain = value.detach()
        if plain.is_conj() or plain.is_neg():
            out = plain.clone()
        else:
            if storage._cdata not in self.storages:
                self.storages[storage._cdata] = self._storage(plain)
            out = torch.empty(0, dtype=value.dtype, device=value.device)
            out.set_(self.storages[storage._cdata], value.storage_offset(), value.size(), value.stride())
        if type(value) is nn.Parameter:
            return nn.Parameter(out, value.requires_grad)
        return out.requires_grad_() if value.requires_grad else out

    def _storage(self, value: Tensor) -> torch.UntypedStorage:
        """Copies the whole storage of a tensor."""
        if self.on_write:
            try:
                return torch._lazy_clone(value).untyped_storage()
            except (RuntimeError, NotImplementedError, AttributeError):
                pass  # memory that is not torch's own, such as NumPy's
        storage = value.untyped_storage()
        if value.device.type != "cpu":
            return storage.clone()
        start = torch._C._data_address(value)  # type: ignore[attr-defined]  # of the storage; not in torch's stubs
        memory, first = self._block(start, start + storage.nbytes())
        return torch.from_numpy(memory[start - first : start - first + storage.nbytes()]).untyped_storage()

    def _block(self, first: int, end: int) -> tuple[np.ndarray, int]:
        """Returns a copy of the memory [first, end), or of more; and where that begins."""
        for start, stop, memory in self.blocks:
            if start <= first and end <= stop:
                return memory, start
        memory = np.empty(0, np.uint8)
        if end > first:
            memory = np.ctypeslib.as_array((ctypes.c_ubyte * (end - first)).from_address(first)).copy()
        self.blocks.append((first, end, memory))
        return memory, first

    def array(self, value: np.ndarray) -> np.ndarray:
        root = value
        while isinstance(root.base, np.ndarray):
            root = root.base
        if not (value.flags.writeable or root.flags.writeable):
            return value
        if value.dtype.hasobject:
            out = value.copy()
            if value.dtype == object:
                out.ravel("K")[:] = self.each(enumerate(value.ravel("K")), "[{}]".format)
            return out
        if type(value) is not np.ndarray or not value.size:
            return value.copy()
        if isinstance(root.base, Tensor):
            whole = torch.empty(0, dtype=torch.uint8).set_(self(root.base).untyped_storage())
            memory, first = whole.numpy(), torch._C._data_address(root.base)
        else:
            memory, first = self._block(*np.lib.array_utils.byte_bounds(root))
        return np.ndarray(value.shape, value.dtype, memory, value.__array_interface__["data"][0] - first, value.strides)

    def generator(self, value: torch.Generator) -> torch.Generator:
        return torch.Generator(value.device).set_state(value.get_state())


def _atomic(values: Any) -> bool:
    return _ATOMS.issuperset(map(type, values))


def _storages(model: nn.Module) -> frozenset[int]:
    """Returns the storages of a model's weights: nobody copies those, nor lets them be copied on write."""
    if model not in _model_storages:
        tensors = [*model.parameters(), *model.buffers()]
        plain = [t for t in tensors if type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided]
        _model_storages[model] = frozenset(t.untyped_storage()._cdata for t in plain)
    return _model_storages[model]


_model_storages: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()


@functools.cache
def _attributes(kind: type) -> tuple[frozenset[str], frozenset[str]]:
    """Returns what a class of potentials and its bases name: attributes to share, and attributes to copy apart."""

    def named(attribute: str) -> frozenset[str]:
        return frozenset(name for base in kind.__mro__ for name in vars(base).get(attribute, ()))

    return named("shared_by_groups"), named("made_of")


@functools.cache
def _slots(kind: type) -> list[str]:
    found = (vars(base).items() for base in kind.__mro__)
    return [name for pairs in found for name, what in pairs if isinstance(what, types.MemberDescriptorType)]


def _in_python(kind: type) -> bool:
    """Says whether instances hold nothing but attributes: no fields of a base class that is written in C."""
    if kind.__basicsize__ > object.__basicsize__ + 8 * (len(_slots(kind)) + 2) or kind.__itemsize__:
        return False
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _is_tokenizer(kind: type) -> bool:
    names = [(base.__module__.split(".")[0], base.__name__) for base in kind.__mro__]
    return any(module == "tokenizers" or name == "PreTrainedTokenizerBase" for module, name in names)


def _handler(kind: type) -> Callable[[_Copier, Any], Any]:
    """Chooses how values of a class are copied."""
    if issubclass(kind, Potential):
        return _Copier.ask if hasattr(kind, "__deepcopy__") else _Copier.instance
    for bases, handler in _BY_BASE:
        if issubclass(kind, bases):
            return handler
    if kind in _BY_TYPE:
        return _BY_TYPE[kind]
    if _is_tokenizer(kind):
        return _Copier.share
    if hasattr(kind, "__deepcopy__"):
        return _Copier.ask
    if _in_python(kind):
        return _Copier.instance
    if issubclass(kind, collections.abc.Iterator):
        return _Copier.refuse
    return _Copier.reduce


_BY_BASE: tuple[tuple[Any, Callable], ...] = (
    (_FLOWS, _Copier.refuse),
    (_LINKS, _Copier.link),
    (_SHARED, _Copier.share),
    (Tensor, _Copier.tensor),
    (np.ndarray, _Copier.array),
    (torch.Generator, _Copier.generator),
)
_BY_TYPE: dict[type, Callable] = {
    list: _Copier.list_,
    tuple: _Copier.tuple_,
    dict: _Copier.dict_,
    set: _Copier.set_,
    frozenset: _Copier.set_,
    types.MethodType: _Copier.method,
    types.BuiltinMethodType: _Copier.builtin,
    functools._lru_cache_wrapper: _Copier.cached,
}
_handlers: weakref.WeakKeyDictionary[type, Callable[[_Copier, Any], Any]] = weakref.WeakKeyDictionary()
