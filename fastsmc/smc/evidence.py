"""What a counterfactual group knows of a text: the logits that it was drawn from, row by row."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.interventions import Facts
from fastsmc.p0 import P0, restrict, token_log_probs
from fastsmc.params import SMCParams

#: how counterfactual tokens are drawn, see `Evidence`
NOISES = ("exact", "gumbel")


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
    """Holds a text, and at each step the logits that its next token was drawn from.

    These are shown by a group that follows the text (`Group.companions`) as the model makes them; or all are there from
    the beginning, as another model made them.

    Beyond the text's end there is no evidence. That is said by a row all of whose mass is on one token: given that a
    draw without choice gave its only token, the noise is as it was, so `redraw` draws from the other row alone.

    Args:
        token_ids: the text, T > 0 tokens.
        temperature: at which they were drawn.
        noise: "exact": counterfactual tokens are drawn by their law; "gumbel": by the noise itself, which particle i of
            a seed has under every intervention.
        device: where the groups live.
        rows: (T, V), before each token of the text; −inf where its mechanism rules a token out. None: they are shown.

    Attributes:
        token_ids: the text.

    Raises:
        ValueError: `rows` give a token no probability, or hold NaN or +inf.
    """

    def __init__(
        self,
        token_ids: Sequence[int],
        temperature: float,
        noise: str = "exact",
        device: torch.device | str = "cpu",
        rows: Tensor | None = None,
    ) -> None:
        self.token_ids, self.temperature, self.noise = list(token_ids), temperature, noise
        self._ids = torch.tensor([*self.token_ids, 0], device=device)
        # what rules tokens out is in the rows already
        self._p0 = P0(SMCParams(temperature=temperature), (), torch.device(device))
        self.is_shown = rows is None
        self._rows: list[Tensor] = []  # (V,) each; of those that are shown only the last
        self._log_probs: list[Tensor] = []
        self._stay: list[Tensor] = []
        self._waiting: tuple[Tensor, float] | None = None  # what `compare` took before `show`
        if rows is not None:
            rows = rows.to(device)
            self._rows, self._log_probs = [*rows], [*self._score(rows)]
            for t, value in enumerate(self.log_probs.tolist()):
                if math.isnan(value):
                    raise ValueError(f"factual logits: those of token {t} of the text hold NaN or +inf")
                if value == -math.inf:
                    raise ValueError(f"text: its token {t}, {self.token_ids[t]}, cannot have been drawn there")

    @classmethod
    def of_facts(cls, facts: Facts, stop_token_ids: Collection[int], device: torch.device, noise: str) -> Evidence:
        """Makes what `Facts` say of a text into evidence; `stop_token_ids` are what min_tokens rules out."""
        n, params = len(facts.token_ids), facts.params()
        p0, steps = P0(params, stop_token_ids, device), torch.arange(n, device=device)
        rows = restrict(facts.logits.to(device, copy=True), [p0], [0, n], steps)
        return cls(facts.token_ids, params.temperature, noise, device, rows)

    def _score(self, rows: Tensor) -> Tensor:
        """Computes the log-probs (n,) float64 of the text's next n tokens, from the rows (n, V) before them."""
        n, at = len(rows), len(self._log_probs)
        steps = torch.arange(at, at + n, device=rows.device)
        return token_log_probs(rows, self._ids[at : at + n], [self._p0], [0, n], steps)

    def show(self, row: Tensor) -> None:
        """Takes the logits (V,), as the text's mechanism restricts them, before the next token of the text."""
        self._log_probs += self._score(row[None])
        self._rows = [row.clone()]
        if self._waiting is not None:
            self._compare(*self._waiting)

    def compare(self, row: Tensor, temperature: float) -> None:
        """Takes the intervened model's logits (V,) before the next token of the text, if all before it have stayed.

        They wait for the row that they are compared with, if that is yet to be shown.
        """
        if len(self._stay) < len(self._log_probs):
            self._compare(row, temperature)
        else:
            self._waiting = row, temperature

    def _compare(self, row: Tensor, temperature: float) -> None:
        factual, token = (value[None].clone() for value in self.at(len(self._stay)))  # at addresses as tensors have
        u = torch.zeros((1, 2), dtype=torch.float64, device=row.device)
        again = ops.redraw(row[None], factual, token, u, temperature=temperature, factual_temperature=self.temperature)
        self._stay.append(again.stay[0].nan_to_num(nan=0.0))
        self._waiting = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Gives the row (V,) and the token (0-dim) of a step; of rows that are shown, it is the last one's."""
        t = min(step, len(self.token_ids))
        if t == len(self.token_ids):
            no_choice = torch.full_like(self._rows[-1], -math.inf)
            no_choice[0] = 0.0
            return no_choice, self._ids[t]
        return self._rows[-1 if self.is_shown else t], self._ids[t]

    @property
    def log_probs(self) -> Tensor:
        """Gives (T,) float64, log p of the text's tokens when they were drawn."""
        return torch.stack(self._log_probs)

    @property
    def stay(self) -> Tensor:
        """Gives (T,) float64: of each token, the probability that it stays where all before it did."""
        return torch.stack(self._stay)
