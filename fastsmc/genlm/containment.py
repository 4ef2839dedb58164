"""Imports genlm-backend without what that does to vLLM and to the process.

Where genlm-backend finds vLLM, its import sets `VARIABLES` and wraps two functions of vLLM's V2 model runner, for an
engine of its own. An engine of fastsmc would then have another model runner, and its core in this process. So genlm is
imported as where there is no vLLM; if it has been imported already, both are undone. It also brings numba along, beside
which vLLM does not start on a CPU; see `_contain_llvmlite`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from fastsmc.vllm.compat import UnsupportedError, get_logger

logger = get_logger(__name__)

#: by extra: distributions, and the versions of them that are taken. These are patches of those whose source was read:
#: 0.3.1, 0.4.1 and 0.2.3.
SUPPORTED = {
    "genlm": {"genlm-backend": ">=0.3.1,<0.4", "genlm-control": ">=0.4.1,<0.5"},
    "llamppl": {"llamppl": ">=0.2.3,<0.2.4"},
}
#: environment variables that the import sets, with the values that it gives them
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "1",
}
BACKEND = "genlm.backend.llm.vllm"


def contain() -> None:
    """Imports genlm-backend, or undoes what its import has done.

    A variable that was set to genlm's own value before genlm was imported cannot be told from one that genlm has set:
    it is removed, too, and the log says so.

    An engine that was started before keeps what it was started with.

    Raises:
        ImportError: a distribution of `SUPPORTED` is not installed.
        UnsupportedError: one is, in another version.
    """
    check_versions("genlm")
    try:
        _contain_backend()
    finally:
        _contain_llvmlite()


def _contain_backend() -> None:
    if BACKEND in sys.modules:
        _undo(sys.modules[BACKEND])
    else:
        with _environment_kept(), _vllm_hidden(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="vllm was imported before", category=RuntimeWarning)
            importlib.import_module(BACKEND)


def check_versions(extra: str) -> None:
    """Refuses versions that are not in `SUPPORTED`."""
    from packaging.specifiers import SpecifierSet

    for name, versions in SUPPORTED[extra].items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise ImportError(f'fastsmc.{extra} needs {name} {versions}: pip install "fastsmc[{extra}]"') from None
        if found not in SpecifierSet(versions):
            raise UnsupportedError(f"{name} {found}: fastsmc.{extra} knows {versions}")


def _undo(backend: Any) -> None:
    """Undoes what the import of genlm-backend's module for vLLM has done."""
    names = [name for name, value in VARIABLES.items() if os.environ.get(name) == value]
    for name in names:
        del os.environ[name]
    if names:
        logger.warning("genlm was imported before fastsmc.genlm; removed from the environment: %s", ", ".join(names))
    if not backend.HAS_VLLM:
        return
    runner = backend._gpu_model_runner
    if runner.init_model_state is backend._init_model_state_with_capture:
        runner.init_model_state = backend._orig_init_model_state
    if runner.GPUModelRunner.update_requests is backend._update_requests_with_appends:
        runner.GPUModelRunner.update_requests = backend._orig_update_requests


def _contain_llvmlite() -> None:
    """Has llvmlite's library, which genlm imports by numba, answer for its `__dict__` with a dict.

    As vLLM starts on a CPU without Triton, it reads the `__dict__` of everything in every module. This library takes
    each name for a function of LLVM, and vLLM would end at that.
    """
    from llvmlite.binding.ffi import lib

    if not isinstance(getattr(lib, "__dict__", {}), dict):
        lib._fntab["__dict__"] = {}


@contextmanager
def _environment_kept() -> Iterator[None]:
    old = {name: os.environ.get(name) for name in VARIABLES}
    try:
        yield
    finally:
        for name, value in old.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@contextmanager
def _vllm_hidden() -> Iterator[None]:
    """Has `import vllm` fail within."""
    vllm = sys.modules.get("vllm")
    sys.modules["vllm"] = None  # type: ignore[assignment]  # which is how Python says so
    try:
        yield
    finally:
        if vllm is None:
            del sys.modules["vllm"]
        else:
            sys.modules["vllm"] = vllm
