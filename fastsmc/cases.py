"""The arguments of `counterfactual`, read alike for every engine, and refused before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from fastsmc.arguments import read_each, read_prompts
from fastsmc.interventions import Facts, Sizes
from fastsmc.params import SMCParams
from fastsmc.potentials import Potential
from fastsmc.potentials.tokens import short, token_list
from fastsmc.smc.evidence import NOISES
from fastsmc.values import check_choice


class Case(NamedTuple):
    """Is one text of a call of `counterfactual`, with all that is asked of it.

    Attributes:
        prompt: what the text followed.
        text: its token ids; None: it is yet to be drawn.
        facts: what another model said along it; None: this model is asked.
        params: of the group; its settings of p0 are those that drew the text, unless `facts` say it.
        potential: of the group.
    """

    prompt: list[int]
    text: list[int] | None
    facts: Facts | None
    params: SMCParams
    potential: Potential | None

    def with_text(self, text: list[int]) -> Case:
        """Puts in the text that was drawn. ValueError: it has no token."""
        if not text:
            raise ValueError("text=None: none can be drawn, since these settings rule every token out")
        return self._replace(text=text)


def read_cases(
    prompts: Any,
    texts: Any,
    params: Any,
    potential: Any,
    noise: str,
    tokenizer: Any,
    sizes: Sizes,
    tokenizer_hash: str | None,
    stops: Callable[[SMCParams], frozenset[int]],
    **given: Any,
) -> tuple[list[Case], bool]:
    """Reads the texts of a call of `counterfactual`, and whether it was a single prompt.

    Args:
        prompts, texts, params, potential, noise: as there.
        sizes: of the model.
        tokenizer_hash: of its tokenizer, `fastsmc.twists.tokenizer_hash`.
        stops: lists the tokens that end a particle under parameters.
        given: n, max_tokens, top_k, top_p, ignore_eos and seed, as there.

    Raises:
        ValueError: naming the argument.
    """
    check_choice("noise", noise, NOISES)
    if params is not None and not isinstance(params, SMCParams):
        raise ValueError(f"params={short(params)}: must be SMCParams")
    if params is not None and params.powered:
        raise ValueError(f"power={params.power:g}: must be 1, without a ramp, for counterfactuals")
    if params is not None and params.proposal == "rejection":
        raise ValueError("params.proposal='rejection': counterfactuals are not drawn by it; use 'twisted'")
    if params is not None and params.islands > 1:
        raise ValueError(
            f"params.islands={params.islands}: must be 1 for counterfactuals, whose islands do not migrate"
        )
    if noise == "gumbel" and potential is not None:
        raise ValueError("noise='gumbel': takes no potential, whose resampling would give particles other numbers")
    facts, ids, single = _read_facts(prompts, sizes, tokenizer_hash)
    if not facts:
        ids, single = read_prompts(prompts, tokenizer, sizes.vocab)
    names = ["text" if single else f"text[{i}]" for i in range(len(ids))]
    each = [texts] if single else [None] * len(ids) if texts is None else texts
    if not isinstance(each, (list, tuple)) or len(each) != len(ids):
        raise ValueError(f"text={short(texts)}: must be a list of a text, or None, for each of {len(ids)} prompts")
    chosen = list(potential) if isinstance(potential, (list, tuple)) else [potential] * len(ids)
    if len(chosen) != len(ids):
        raise ValueError(f"potential: {len(chosen)} potentials for {len(ids)} prompts")
    stop_token_ids = stops(SMCParams(ignore_eos=bool(given["ignore_eos"])) if params is None else params)
    cases = []
    for i, (prompt, text, name, target) in enumerate(zip(ids, each, names, chosen, strict=True)):
        if facts and text is not None:
            raise ValueError(f"{name}={short(text)}: Facts have their own; leave it out")
        text = facts[i].token_ids if facts else text
        if text is not None:
            text = read_text(text, tokenizer, sizes.vocab, stop_token_ids, name)
        asked = read_counterfactual(params, None if text is None else len(text), **given)
        (asked,), (target,), _ = read_each(1, True, asked, target, None, sizes.vocab)
        asked = dataclasses.replace(asked, group=asked.group + i)
        cases.append(Case(prompt, text, facts[i] if facts else None, asked, target))
    return cases, single


def _read_facts(prompts: Any, sizes: Sizes, tokenizer_hash: str | None) -> tuple[list[Facts], list[list[int]], bool]:
    """Reads Facts in the place of prompts, and the prompts that they have; none where there are none."""
    single = isinstance(prompts, Facts)
    facts = [prompts] if single else list(prompts) if isinstance(prompts, (list, tuple)) else []
    kinds = {isinstance(each, Facts) for each in facts}
    if True not in kinds:
        return [], [], False
    if False in kinds:
        raise ValueError("prompts: must be Facts all of them, or none")
    for each in facts:
        each.check(sizes)
        each.check_tokenizer(tokenizer_hash)
    return facts, [list(each.prompt_token_ids) for each in facts], single


def read_counterfactual(
    params: SMCParams | None,
    length: int | None,
    *,
    n: int | None,
    max_tokens: int | None,
    top_k: int | None,
    top_p: float | None,
    ignore_eos: bool | None,
    seed: int | None,
) -> SMCParams:
    """Makes the parameters of a counterfactual group from those that were given, none of them twice.

    Args:
        length: tokens of the text, as many as are made unless max_tokens says it; None: not known.

    Raises:
        ValueError: naming the argument.
    """
    given: dict[str, Any] = {
        "n_particles": n, "max_tokens": max_tokens, "top_k": top_k, "top_p": top_p, "ignore_eos": ignore_eos,
        "seed": seed,
    }  # fmt: skip
    said = {name: value for name, value in given.items() if value is not None}
    if params is not None:
        if said:
            name = "n" if "n_particles" in said else next(iter(said))
            raise ValueError(f"{name}={next(iter(said.values()))!r}: params says it already; give one of the two")
        return params
    if length is None and max_tokens is None:
        raise ValueError("max_tokens=None: without a text it must be said, here or in params")
    defaults: dict[str, Any] = {"n_particles": 64, "max_tokens": length}
    return SMCParams(**defaults | said)


def read_text(
    text: Any, tokenizer: Any, vocab_size: int, stop_token_ids: Collection[int], name: str = "text"
) -> list[int]:
    """Reads the text that counterfactuals are asked of: token ids, or what a tokenizer makes of a str.

    Args:
        name: of the argument, for errors.

    Raises:
        ValueError: it is empty, holds no tokens of the vocabulary, or goes on after a stop token.
    """
    if isinstance(text, str):
        if tokenizer is None:
            raise ValueError(f"{name}={short(text)}: this engine has no tokenizer; give token ids")
        text = tokenizer.encode(text, add_special_tokens=False)
    ids = token_list(name, text, vocab_size)
    if not ids:
        raise ValueError(f"{name}: is empty; there is nothing to ask about")
    for at, token in enumerate(ids[:-1]):
        if token in stop_token_ids:
            raise ValueError(f"{name}: goes on after its token {at}, {token}, which is a stop token")
    return ids
