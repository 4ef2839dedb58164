"""What a counterfactual group knows of a text: the logits that it was drawn from, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import ops


class Factual(NamedTuple):
    """Is what the groups of a cohort are compared with at their next step, row g for group g.

    Attributes:
        logits: (G, V).
        tokens: (G,) int64, what was drawn from them.
        temperature: (G,) float64, at which.
        group_of: (R,) int64, the group of each row of the model's logits.
    """

    logits: Tensor
    tokens: Tensor
    temperature: Tensor
    group_of: Tensor


class Evidence:
    """Holds a text and the rows that it was drawn from.

    Beyond its end there is no evidence. That is said by one row more, all of whose mass is on one token: given that a
    draw without choice gave its only token, the noise is as it was, so `redraw` draws from the other row alone.

    Args:
        logits: (T, V), before each token of the text; −inf where its mechanism rules a token out.
        token_ids: the text, T > 0 tokens.
        temperature: at which they were drawn.
        noise: "exact": counterfactual tokens are drawn by their law; "gumbel": by the noise itself, which particle i of
            a seed has under every intervention.

    Attributes:
        token_ids: the text.
        log_probs: (T,) float64, of its tokens when they were drawn.
        stay: (T,) float64: of each token, the probability that it stays where all before it did. NaN until whoever has
            run the intervened model along the text puts it in (`compare`).

    Raises:
        ValueError: a token has no probability, or a row holds NaN or +inf.
    """

    def __init__(self, logits: Tensor, token_ids: Sequence[int], temperature: float, noise: str = "exact") -> None:
        self.token_ids, self.temperature, self.noise = list(token_ids), temperature, noise
        ids = torch.tensor([*self.token_ids, 0], device=logits.device)
        lse = ops.weigh(logits, temperature=temperature).lse
        if bool(lse.isnan().any()):
            at = int(lse.isnan().byte().argmax())
            raise ValueError(f"factual logits: those of token {at} of the text hold NaN or +inf")
        self.log_probs: Tensor = logits.gather(1, ids[:-1, None])[:, 0].double() / temperature - lse
        if bool((self.log_probs == -math.inf).any()) or bool((lse == -math.inf).any()):
            at = int((~(self.log_probs > -math.inf)).byte().argmax())
            raise ValueError(f"text: its token {at}, {self.token_ids[at]}, cannot have been drawn there")
        no_choice = torch.full_like(logits[:1], -math.inf)
        no_choice[0, 0] = 0.0
        self._logits, self._ids = torch.cat([logits, no_choice]), ids
        self.stay = torch.full_like(self.log_probs, math.nan)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Gives the row (V,) and the token (0-dim) of a step."""
        t = min(step, len(self.token_ids))
        return self._logits[t], self._ids[t]

    def compare(self, logits: Tensor, temperature: float) -> None:
        """Puts `stay` in, from the intervened model's logits (T, V) before each token of the text."""
        n = len(self.token_ids)
        u = torch.zeros((n, 2), dtype=torch.float64, device=logits.device)
        again = ops.redraw(
            logits, self._logits[:n], self._ids[:n], u, temperature=temperature, factual_temperature=self.temperature
        )
        self.stay = again.stay.nan_to_num(nan=0.0)
