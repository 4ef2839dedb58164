"""`score` of any engine: log p0 of continuations of one prompt. What is asked is read here, the engines answer it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fastsmc.arguments import check_ids, read_prompts
from fastsmc.params import SMCParams
from fastsmc.potentials.tokens import short, token_list
from fastsmc.smc import SMCError


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Scored:
    """Holds log p0 of C continuations.

    Attributes:
        token_ids: C lists of token ids, as they were scored.
        token_log_probs: C arrays (n_c,) float64, log p0 of each token after those before it; −inf where p0 rules it
            out.
    """

    token_ids: list[list[int]]
    token_log_probs: list[np.ndarray]

    @property
    def log_probs(self) -> np.ndarray:
        """Sums up log p0 of each continuation: (C,) float64, 0 for one without tokens."""
        return np.array([each.sum() for each in self.token_log_probs], dtype=np.float64)

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return f"Scored(C={len(self)})"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Is a call of `score`, read.

    Attributes:
        prompt: token ids, at least one.
        token_ids: of each continuation.
        distinct: those of them that have tokens, each once.
    """

    prompt: list[int]
    token_ids: list[list[int]]
    distinct: list[list[int]]

    def scored(self, found: Tensor) -> Scored:
        """Gives each continuation its part of what was found for `distinct`, (Q,) float64 on the CPU.

        Raises:
            SMCError: the model gave NaN.
        """
        parts = found.split([len(ids) for ids in self.distinct]) if self.distinct else ()
        if any(part.isnan().any() for part in parts):
            raise SMCError("model: logits behind a continuation hold NaN or +inf", kind="engine")
        known = {tuple(ids): part.numpy() for ids, part in zip(self.distinct, parts, strict=True)}
        nothing = np.zeros(0)
        return Scored(self.token_ids, [known[tuple(ids)].copy() if ids else nothing for ids in self.token_ids])


def read_wanted(
    prompt: Any, continuations: Any, params: SMCParams | None, tokenizer: Any, vocab_size: int, most: int | None
) -> tuple[Wanted, SMCParams]:
    """Reads the arguments of `score`.

    Args:
        most: positions of the model's context; None: it has no limit.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    prompts, single = read_prompts(prompt, tokenizer, vocab_size)
    if not single:
        raise ValueError(f"prompt={short(prompt)}: must be one prompt, got {len(prompts)}")
    params = SMCParams() if params is None else params
    if not isinstance(params, SMCParams):
        raise ValueError(f"params={short(params)}: must be SMCParams")
    check_ids(params, vocab_size)
    if isinstance(continuations, (str, bytes)) or not isinstance(continuations, Sequence):
        raise ValueError(f"continuations={short(continuations)}: must be a list of texts, or of lists of token ids")
    token_ids = []
    for i, each in enumerate(continuations):
        if isinstance(each, str) and tokenizer is None:
            raise ValueError(f"continuations[{i}]={short(each)}: this engine has no tokenizer; give token ids")
        ids = tokenizer.encode(each, add_special_tokens=False) if isinstance(each, str) else each
        token_ids.append(token_list(f"continuations[{i}]", ids, vocab_size))
        if most is not None and len(prompts[0]) + len(token_ids[-1]) - 1 > most:
            raise ValueError(
                f"continuations[{i}]: {len(token_ids[-1])} tokens after a prompt of {len(prompts[0])} are more than "
                f"the context of {most} positions"
            )
    distinct = [list(ids) for ids in dict.fromkeys(map(tuple, token_ids)) if ids]
    return Wanted(prompts[0], token_ids, distinct), params


def p0_params(settings: dict[str, Any]) -> SMCParams:
    """Makes parameters that have the settings of p0 that `SMCParams.p0` gave."""
    return SMCParams(**settings, max_tokens=max(1, settings["min_tokens"]))
