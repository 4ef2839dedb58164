"""Potentials by name: what installed packages register, built from JSON arguments."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Mapping
from typing import Any

from fastsmc.potentials.base import Potential
from fastsmc.potentials.tokens import short

GROUP = "fastsmc.potentials"


@functools.cache
def registered() -> Mapping[str, importlib.metadata.EntryPoint]:
    """Finds the potentials that installed packages register under the entry points `fastsmc.potentials`, by name.

    It looks once per process, since it takes milliseconds and every request asks.
    """
    return {entry.name: entry for entry in sorted(importlib.metadata.entry_points(group=GROUP))}


def load(name: str, known: Mapping[str, importlib.metadata.EntryPoint] | None = None) -> Callable[..., Any]:
    """Returns what makes the potential `name`, usually its class.

    Args:
        known: the potentials that there are, by name; None: those registered.

    Raises:
        ValueError: an unknown name (the known ones are listed), or one that cannot be imported.
    """
    if known is None:
        known = registered()
    if name not in known:
        names = ", ".join(map(repr, known)) or f"none (no installed package has entry points {GROUP!r})"
        raise ValueError(f"potential {name!r}: unknown; known are {names}")
    try:
        return known[name].load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # somebody's module: whatever it does must not end the engine
        raise ValueError(f"potential {name!r}: cannot load {known[name].value!r}: {error}") from error


def resolve(
    name: str,
    args: Mapping[str, Any] | None = None,
    known: Mapping[str, importlib.metadata.EntryPoint] | None = None,
) -> Potential:
    """Builds the potential `name` with keyword arguments `args`.

    Args:
        known: as of `load`.

    Raises:
        ValueError: as of `load`, or arguments that it refuses.
    """
    build = load(name, known)
    if not isinstance(args or {}, Mapping):
        raise ValueError(f"potential {name!r}: arguments {args!r} must be a JSON object")
    if isinstance(build, type) and issubclass(build, Potential) and not build.by_request:
        raise ValueError(
            f"potential {name!r}: the arguments of {build.__name__} are the operator's; name a function that makes it"
        )
    try:
        potential = build(**(args or {}))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise ValueError(f"potential {name!r} with arguments {short(dict(args or {}))}: {error}") from error
    if not isinstance(potential, Potential):
        raise ValueError(f"potential {name!r}: {build!r} does not make a fastsmc.Potential")
    return potential
