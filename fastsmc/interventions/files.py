"""Interventions kept and sent: one safetensors file, with JSON in its metadata."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastsmc.interventions.base import Intervention
from fastsmc.interventions.calls import KINDS, read_one

FORMAT, VERSION = "fastsmc interventions", 1


def to_bytes(parts: Sequence[Intervention]) -> bytes:
    """Makes one safetensors file in memory: tensors, and the rest as JSON in its metadata."""
    from safetensors.torch import save

    tensors, entries = {}, []
    for i, part in enumerate(read_one(list(parts), "parts")):
        entry: dict[str, Any] = {"kind": type(part).__name__}
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, Tensor):
                tensors[f"{i}.{field.name}"] = value.clone()  # one object may stand twice in a list
            else:
                entry[field.name] = value
        entries.append(entry)
    return save(tensors, {"interventions": json.dumps({"format": FORMAT, "version": VERSION, "list": entries})})


def from_bytes(data: bytes, source: str = "interventions") -> list[Intervention]:
    """Reads what `to_bytes` made.

    Raises:
        ValueError: naming `source` and what is wrong with it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["interventions"])
        if (meta["format"], meta["version"]) != (FORMAT, VERSION):
            raise ValueError(f"its format is {meta['format']!r} {meta['version']!r}, not {FORMAT!r} {VERSION}")
        out = []
        for i, entry in enumerate(meta["list"]):
            kind = KINDS[entry.pop("kind")]
            entry |= {name: tensors[f"{i}.{name}"] for name in kind.TENSORS if f"{i}.{name}" in tensors}
            out.append(kind(**entry))
        return out
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{source}: holds no interventions ({type(error).__name__}: {error})") from None
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None


def save(parts: Sequence[Intervention], path: str | os.PathLike) -> None:
    """Writes one file at exactly `path`. OSError if that cannot be done."""
    data = to_bytes(parts)
    with open(path, "wb") as file:
        file.write(data)


def load(path: str | os.PathLike) -> list[Intervention]:
    """Reads what `save` wrote. OSError if the file cannot be opened, ValueError naming it if it is not one."""
    with open(path, "rb") as file:
        return from_bytes(file.read(), os.fspath(path))
