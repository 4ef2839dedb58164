"""The arguments of `smc`, read alike for every engine, and refused before anything runs.

Prompts come in the forms that vLLM and tokenizers give them, and leave as lists of token ids:

    "text", [1, 2], (1, 2), range, vector of ids (NumPy, torch)      one prompt
    {"prompt": text}, {"prompt_token_ids": ids}                      one prompt, vLLM's way
    {"input_ids": ids}, as a tokenizer returns it                    one prompt; of a batch, several
    a list or tuple of these, a matrix of ids                        several
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from fastsmc.params import SMCParams
from fastsmc.potentials import Potential
from fastsmc.potentials.condition import conditions, no_condition
from fastsmc.potentials.tokens import short, token_list

#: what a type checker can know to be one prompt, and to be several; the other forms tell by their shape
Prompt: TypeAlias = str | Sequence[int]
Prompts: TypeAlias = list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Sequence[Mapping[str, Any]]

#: keys of a prompt that is a dict: what says nothing but its tokens
_KEYS = ("prompt", "prompt_token_ids", "input_ids", "attention_mask", "token_type_ids", "special_tokens_mask")


def read_prompts(prompts: Any, tokenizer: Any, vocab_size: int, name: str = "prompts") -> tuple[list[list[int]], bool]:
    """Reads token ids of each prompt, and whether it was a single prompt. An empty list is a list of no prompts.

    Args:
        tokenizer: encodes text, with its special tokens; None: text is refused.
        vocab_size: V, which no token id may reach.
        name: of the argument, for errors.

    Raises:
        ValueError: naming the prompt, by its index in a list, its form and what is allowed.
    """
    items, single = _split(prompts)
    names = [name.removesuffix("s") if single else f"{name}[{i}]" for i in range(len(items))]
    return [_read(item, one, tokenizer, vocab_size) for item, one in zip(items, names, strict=True)], single


def _split(prompts: Any) -> tuple[list[Any], bool]:
    if isinstance(prompts, Mapping):
        ids = prompts.get("input_ids")
        shape = getattr(ids, "shape", None)
        several = len(shape) == 2 and shape[0] != 1 if shape is not None else _is_nested(ids)
        if ids is None or not several:
            return [prompts], True
        masks = prompts.get("attention_mask")
        rest = {key: value for key, value in prompts.items() if key not in ("input_ids", "attention_mask")}
        masks = [None] * len(ids) if masks is None else masks
        return [{**rest, "input_ids": row, "attention_mask": mask} for row, mask in zip(ids, masks, strict=True)], False
    dimensions = getattr(prompts, "ndim", None)  # of an array
    if dimensions is not None:
        return (list(prompts), False) if dimensions == 2 else ([prompts], True)
    if isinstance(prompts, (list, tuple)) and not (prompts and all(map(_is_number, prompts))):
        return list(prompts), False
    return [prompts], True


def _is_nested(ids: Any) -> bool:
    return isinstance(ids, (list, tuple)) and any(isinstance(row, (list, tuple)) for row in ids)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, float)) or (hasattr(value, "__index__") and not getattr(value, "ndim", 0))


def _read(prompt: Any, name: str, tokenizer: Any, vocab_size: int) -> list[int]:
    ids = _of_mapping(prompt, name) if isinstance(prompt, Mapping) else prompt
    if isinstance(ids, str):
        if tokenizer is None:
            raise ValueError(f"{name}={short(ids)}: this engine has no tokenizer; give token ids")
        ids = tokenizer.encode(ids)
    ids = token_list(name, ids, vocab_size)
    if not ids:
        raise ValueError(f"{name}={short(prompt)}: has no tokens; must be a text or a list of at least one token id")
    return ids


def _of_mapping(prompt: Mapping, name: str) -> Any:
    """Finds the text or the token ids in a prompt that is a dict."""
    others = sorted(str(key) for key, value in prompt.items() if key not in _KEYS and value is not None)
    if others:
        raise ValueError(
            f"{name}: holds {', '.join(map(repr, others))}, which groups of particles do not take; give 'prompt', "
            "'prompt_token_ids' or 'input_ids'"
        )
    for key in ("prompt_token_ids", "input_ids"):
        ids = prompt.get(key)
        if ids is None:
            continue
        if getattr(ids, "ndim", 1) == 2 and len(ids) == 1:
            ids = ids[0]
        mask = prompt.get("attention_mask") if key == "input_ids" else None
        if mask is not None:
            mask = mask[0] if getattr(mask, "ndim", 1) == 2 else mask
            ids = [v for v, kept in zip(list(ids), list(mask), strict=True) if int(kept)]  # padding is no prompt
        return ids
    if not isinstance(prompt.get("prompt"), str):
        raise ValueError(f"{name}={short(prompt)}: must hold 'prompt', a text, or 'prompt_token_ids' or 'input_ids'")
    return prompt["prompt"]


def read_samples(name: str, exact: Any, vocab_size: int | None = None) -> list[list[int]]:
    """Reads exact samples of a target as lists of token ids. ValueError, naming `name`: it is no list of such."""
    rows = exact.tolist() if getattr(exact, "ndim", None) == 2 and hasattr(exact, "tolist") else exact
    if not isinstance(rows, (list, tuple)) or not len(rows) or any(map(_is_number, rows)):
        raise ValueError(f"{name}={short(exact)}: must be a list of exact samples, each a list of token ids")
    return [token_list(f"{name}[{i}]", ids, vocab_size) for i, ids in enumerate(rows)]


def read_exact(name: str, exact: Any, params: SMCParams, vocab_size: int | None = None) -> list[list[int]]:
    """Reads the samples of one group, which takes a single sample or as many as it has particles.

    Raises:
        ValueError: naming `name`: it is no list of samples, or not of so many, or the group takes none.
    """
    if params.stop is not None:
        raise ValueError(f"{name}: a group with stop={list(params.stop)} takes no exact samples")
    if params.proposal == "rejection":
        raise ValueError(f"{name}: proposal='rejection' takes no exact samples; use 'twisted' or 'base'")
    if params.islands > 1:
        raise ValueError(f"{name}: a group with islands={params.islands}, which migrate, takes no exact samples")
    rows, n = read_samples(name, exact, vocab_size), params.n_particles
    if len(rows) not in (1, n) or (len(rows) > 1 and params.ess_threshold > 0.0):
        raise ValueError(
            f"{name}: {len(rows)} sequences for {n} particles at ess_threshold={params.ess_threshold:g}; give one, or "
            "at ess_threshold=0 as many as particles"
        )
    return rows


def check_ids(params: SMCParams, vocab_size: int) -> None:
    """Refuses parameters that name token ids beyond the vocabulary. ValueError: naming the parameter."""
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        token_list(name, tuple(getattr(params, name) or ()), vocab_size)


def read_each(
    n_prompts: int, single: bool, params: Any, potential: Any, exact: Any, vocab_size: int
) -> tuple[list[SMCParams], list[Potential | None], list[list[list[int]] | None]]:
    """Reads parameters, potential and exact samples of each prompt of a call of `smc`.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    each_params = _read_params(params, n_prompts, single, vocab_size)
    chosen = list(potential) if isinstance(potential, (list, tuple)) else [potential] * n_prompts
    if len(chosen) != n_prompts:
        raise ValueError(f"potential: {len(chosen)} potentials for {n_prompts} prompts")
    for each in chosen:
        if each is not None and not isinstance(each, Potential):
            raise ValueError(f"potential={each!r}: must be a fastsmc.Potential (an instance, not a class)")
    for each, own in zip(chosen, each_params, strict=True):
        if own.proposal == "rejection" and (each is None or not conditions(each)):
            raise ValueError(no_condition(each))
    kept: list[Any] = [None] * n_prompts
    if exact is not None and single:
        kept = [read_exact("exact", exact, each_params[0], vocab_size)]
    elif exact is not None:
        if not isinstance(exact, (list, tuple)) or len(exact) != n_prompts:
            what = f"samples for {len(exact)} prompts" if isinstance(exact, (list, tuple)) else short(exact)
            raise ValueError(f"exact: {what}, but there are {n_prompts}; give a list of exact samples for each")
        kept = [
            None if rows is None else read_exact(f"exact[{i}]", rows, own, vocab_size)
            for i, (rows, own) in enumerate(zip(exact, each_params, strict=True))
        ]
    return each_params, chosen, kept


def _read_params(params: Any, n_prompts: int, single: bool, vocab_size: int) -> list[SMCParams]:
    """Reads one for all prompts, whose group is counted on from prompt to prompt, or one for each as it is."""
    if isinstance(params, (list, tuple)) and not single:
        if len(params) != n_prompts:
            raise ValueError(f"params: {len(params)} of them for {n_prompts} prompts")
        each = list(params)
    else:
        each = [SMCParams() if params is None else params]
    for one in each:
        if not isinstance(one, SMCParams):
            raise ValueError(f"params={short(one)}: must be SMCParams")
        check_ids(one, vocab_size)
    if isinstance(params, (list, tuple)):
        return each
    return [dataclasses.replace(each[0], group=each[0].group + i) for i in range(n_prompts)]
