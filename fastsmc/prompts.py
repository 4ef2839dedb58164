"""The prompts that a twist is trained and judged on, and what must follow them, from Python or a JSON Lines file.

{"prompt": "The old man opened the door and"}                              one prompt of several
{"prompt": "The old man opened the door and", "continuation": " warm"}     for a conditional twist
{"prompt": [504, 1165, 805], "continuation": [3163]}                       as token ids
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastsmc.potentials.infill import encode
from fastsmc.potentials.tokens import short, token_list


@dataclasses.dataclass(frozen=True)
class TwistPrompt:
    """Is a prompt, and what must follow, as text or token ids.

    Args:
        prompt: what p0 goes on from.
        continuation: what must come after the particle, where a twist is conditional on it; else None.

    Raises:
        ValueError: one of them is empty, or neither text nor token ids.
    """

    prompt: str | Sequence[int]
    continuation: str | Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "continuation"):
            value = getattr(self, name)
            if value is None and name == "continuation":
                continue
            ids = value if isinstance(value, str) else token_list(name, value)
            if not ids:
                raise ValueError(f"{name}={short(value)}: is empty; must be a text or a list of token ids")
            object.__setattr__(self, name, ids)


@dataclasses.dataclass(frozen=True)
class Target:
    """Is a `TwistPrompt` as token ids.

    Attributes:
        prompt: of at least one token.
        continuation: what must follow; None: nothing, or what is not drawn yet.
    """

    prompt: list[int]
    continuation: list[int] | None = None


def read_twist_prompts(path: str | os.PathLike) -> list[TwistPrompt]:
    """Reads a JSON Lines file: an object with "prompt", and perhaps "continuation", per line that is not blank.

    Raises:
        ValueError: naming file and line, and what is wrong with it; the file has no prompts, or is no text.
        OSError: it cannot be read.
    """
    return list(read_lines(path, [field.name for field in dataclasses.fields(TwistPrompt)]).values())


def read_lines(path: str | os.PathLike, names: Sequence[str] = ("prompt",)) -> dict[int, TwistPrompt]:
    """Reads a JSON Lines file as `read_twist_prompts` does: number of the line, from 1 on → its prompt.

    Args:
        names: what a line may hold.
    """
    path = os.fspath(path)
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found[number] = _read(line, names)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{path}: has no prompts; must hold a JSON object with 'prompt' per line")
    return found


def _read(line: str, names: Sequence[str]) -> TwistPrompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"{short(row)}: must be an object with 'prompt'")
    if unknown := sorted(set(row) - set(names)):
        raise ValueError(f"holds {', '.join(map(repr, unknown))}; may hold {', '.join(map(repr, names))}")
    if "prompt" not in row:
        raise ValueError("has no 'prompt'")
    return TwistPrompt(**row)


def tokenize(name: str, prompts: Sequence[TwistPrompt], engine: Any) -> list[Target]:
    """Encodes prompts with the special tokens of the engine's tokenizer, continuations without.

    Args:
        name: of the argument, for errors.
        engine: an `HFEngine`.

    Raises:
        ValueError: naming the prompt by its index: text without a tokenizer, no tokens, an id beyond the vocabulary.
    """
    out = []
    for i, each in enumerate(prompts):
        if not isinstance(each, TwistPrompt):
            raise ValueError(f"{name}[{i}]={short(each)}: must be a TwistPrompt, as all others")
        follow = each.continuation
        try:
            ids = engine.encode(each.prompt)
            if follow is not None:
                follow = encode("continuation", follow, engine.get_tokenizer()) if isinstance(follow, str) else follow
                follow = token_list("continuation", follow, engine.trunk.vocab_size)
        except ValueError as error:
            raise ValueError(f"{name}[{i}]: {error}") from None
        out.append(Target(ids, follow))
    return out


def describe(targets: Sequence[Target]) -> dict[str, Any]:
    """Says for a card how many prompts there are, and their SHA-256 as token ids with their continuations."""
    rows = json.dumps([[target.prompt, target.continuation] for target in targets])
    return {"count": len(targets), "sha256": hashlib.sha256(rows.encode()).hexdigest()}
