"""Interventions on what is asked of a model: another prompt, another temperature, what another model said of a text."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastsmc.interventions.base import Intervention, Sizes
from fastsmc.p0 import P0, restrict
from fastsmc.params import SMCParams
from fastsmc.potentials.tokens import token_list
from fastsmc.values import check_float

#: elements of `Facts.logits`
FACTS_ELEMENTS = 1 << 28


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt(Intervention):
    """Puts another prompt in the place of the prompt."""

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        ids = token_list("token_ids", self.token_ids)
        if not ids:
            raise ValueError("token_ids=[]: a prompt needs at least one token")
        self._put("token_ids", tuple(ids))

    def check(self, sizes: Sizes) -> None:
        token_list("token_ids", self.token_ids, sizes.vocab)


@dataclasses.dataclass(frozen=True, eq=False)
class Temperature(Intervention):
    """Puts another temperature in the place of the temperature, as `SMCParams` takes it."""

    t: float

    def __post_init__(self) -> None:
        self._put("t", check_float("t", self.t, 0.01, 1e6))


@dataclasses.dataclass(frozen=True, eq=False)
class Facts(Intervention):
    """Holds what another model said along a text, so that a pair of models can be compared without both in one process.

    Args:
        logits: (T, V), row t before token t of the text; −inf is allowed, at most 2**28 elements.
        token_ids: the text, T tokens, at least one.
        prompt_token_ids: what it followed.
        p0: settings of the draw that made the text, as `SMCParams.p0` gives them; {}: temperature 1 and nothing else.
        tokenizer: `fastsmc.twists.tokenizer_hash` of the model's tokenizer; None: unknown.
    """

    TENSORS = ("logits",)
    logits: Tensor
    token_ids: tuple[int, ...]
    prompt_token_ids: tuple[int, ...]
    p0: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        logits = self._put_tensor("logits", 2)
        n, vocab = logits.shape
        check_facts_size(n, vocab)
        for name in ("token_ids", "prompt_token_ids"):
            ids = token_list(name, getattr(self, name), vocab)
            if not ids:
                raise ValueError(f"{name}=[]: must hold at least one token")
            self._put(name, tuple(ids))
        if len(self.token_ids) != n:
            raise ValueError(f"token_ids: {len(self.token_ids)} tokens for {n} rows of logits")
        self._check_possible()

    def _check_possible(self) -> None:
        """Refuses a token that the stated draw cannot have made."""
        params = self.params()
        settings, n = P0(params, (), self.logits.device), len(self.token_ids)
        logits = restrict(self.logits.clone(), [settings], [0, n], torch.arange(n))
        for t, token in enumerate(self.token_ids):
            if logits[t, token] == -torch.inf:
                raise ValueError(f"token_ids[{t}]={token}: is impossible there under p0={params.p0()}")

    def params(self) -> SMCParams:
        """Makes parameters of `p0`, of as many tokens as the text has; of more, where `min_tokens` asks for them.

        Raises:
            ValueError: `p0` holds something else.
        """
        n = len(self.token_ids)
        try:
            return SMCParams(**{**self.p0, "max_tokens": max(n, self.p0.get("min_tokens", 0))})
        except TypeError:
            raise ValueError(f"p0={self.p0!r}: must hold settings that SMCParams.p0 gives") from None

    def check(self, sizes: Sizes) -> None:
        if self.logits.shape[1] != sizes.vocab:
            raise ValueError(
                f"facts: are of a vocabulary of {self.logits.shape[1]} tokens, this model's is {sizes.vocab}"
            )

    def check_tokenizer(self, tokenizer: str | None) -> None:
        """Refuses facts of another tokenizer, where both hashes are known."""
        if tokenizer != self.tokenizer and None not in (tokenizer, self.tokenizer):
            raise ValueError(
                f"facts: are of another tokenizer, {str(self.tokenizer)[:12]}…; this model's is {str(tokenizer)[:12]}…"
            )


def check_facts_size(n_tokens: int, vocab: int) -> None:
    """Refuses facts of more than 2**28 elements. ValueError: they are."""
    if n_tokens * vocab > FACTS_ELEMENTS:
        raise ValueError(f"facts: {n_tokens} rows of {vocab} logits are over {FACTS_ELEMENTS} elements")
