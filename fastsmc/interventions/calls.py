"""Interventions as an argument of a call: what each prompt is under, and what of it is the model's to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsmc.interventions.base import Intervention, LayerIntervention, Sizes
from fastsmc.interventions.layers import Affine, Project, RankOne, Steer
from fastsmc.interventions.requests import Facts, Prompt, Temperature
from fastsmc.interventions.swaps import Interchange, Subspace, Swap
from fastsmc.params import SMCParams
from fastsmc.potentials.tokens import short

KINDS: dict[str, type[Intervention]] = {
    kind.__name__: kind for kind in (Steer, Affine, Project, Interchange, Subspace, RankOne, Prompt, Temperature, Facts)
}


class Reading(NamedTuple):
    """Is an intervention of one prompt, taken apart: the layers' part, and what becomes of prompt and parameters."""

    layers: tuple[LayerIntervention, ...]
    prompt: list[int]
    params: SMCParams


def read_interventions(given: Any, n_prompts: int, sizes: Sizes) -> list[tuple[Intervention, ...]]:
    """Reads the intervention of each prompt of a call of `smc`.

    Args:
        given: None; an intervention or a list of them, which is one, for all prompts; or a list of one of these for
            each prompt, at least one of which is None or a list.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    several = isinstance(given, (list, tuple)) and any(not isinstance(one, Intervention) for one in given)
    if several and len(given) != n_prompts:
        raise ValueError(f"intervention: {len(given)} interventions for {n_prompts} prompts")
    each = [read_one(one, f"intervention[{i}]") for i, one in enumerate(given)] if several else None
    each = [read_one(given, "intervention")] * n_prompts if each is None else each
    for one in {id(one): one for one in each}.values():
        for part in one:
            part.check(sizes)
            if isinstance(part, Facts):
                raise ValueError("intervention: Facts are a text to ask about, and change no draw")
        for kind in (Prompt, Temperature):
            if sum(isinstance(part, kind) for part in one) > 1:
                raise ValueError(f"intervention: has more than one {kind.__name__}")
    return each


def read_one(given: Any, name: str) -> tuple[Intervention, ...]:
    parts = () if given is None else given if isinstance(given, (list, tuple)) else (given,)
    for part in parts:
        if not isinstance(part, Intervention) or type(part).__name__ not in KINDS:
            raise ValueError(f"{name}={short(part)}: must be one of {', '.join(KINDS)}, or a list of them")
    return tuple(parts)


def take_apart(parts: Sequence[Intervention], prompt: list[int], params: SMCParams) -> Reading:
    """Applies `Prompt` and `Temperature` to what they change, and leaves what the model must do.

    What changes nothing is left out: a prompt has no KV of its own then, which would have other last digits than that
    which vLLM has written.
    """
    for part in parts:
        if isinstance(part, Prompt):
            prompt = list(part.token_ids)
        elif isinstance(part, Temperature):
            params = dataclasses.replace(params, temperature=part.t)
    end = len(prompt) + params.max_tokens - 1
    made = (part.of_prompt(len(prompt), end) if isinstance(part, Swap) else part for part in parts)
    layers = tuple(part for part in made if isinstance(part, LayerIntervention) and not part.is_nothing)
    return Reading(layers, prompt, params)
