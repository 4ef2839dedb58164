"""A potential asked about sequences that are there already, step by step, as an engine asks about particles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastsmc.params import SMCParams
from fastsmc.potentials import Potential, State
from fastsmc.potentials.answers import NextRows
from fastsmc.potentials.copying import own_copy
from fastsmc.smc.asking import Asker
from fastsmc.smc.engine import GroupEngine


class Replay:
    """Steps a copy of a potential through N sequences.

    Args:
        origin: as its `setup` left it.
        engine: what it was set up with.
        rows: sequences, whole.
        prompt, max_tokens, stops: of the group.
        numbers: a history's tokens → (1 + H,) the log-prob of its last token and a hidden state; None: `State` has no
            log-probs, and None for hidden states.

    Attributes:
        asker: asks the copy.
        lengths: of sequences that have ended; of the others more than any.
        t: tokens so far.
    """

    def __init__(
        self,
        origin: Potential,
        engine: GroupEngine,
        rows: list[list[int]],
        *,
        prompt: Sequence[int],
        max_tokens: int,
        stops: frozenset[int],
        numbers: Callable[[Sequence[int]], Tensor] | None = None,
    ) -> None:
        self.engine, self.rows, self.t = engine, rows, 0
        self.max_tokens, self.stops, self._numbers = max_tokens, stops, numbers
        params = SMCParams(n_particles=len(rows), max_tokens=max_tokens)
        self.asker = Asker(own_copy(origin, engine), origin, params, list(prompt), stops, engine)
        self.asker.call("reset", len(rows), list(prompt))
        self.lengths = [max_tokens + 1] * len(rows)

    @property
    def over(self) -> bool:
        return max(self.lengths) <= self.t

    def state(self, seen: int) -> State:
        """Makes the state after t tokens; the model has seen `seen` of them."""
        t, n, device, state = self.t, len(self.rows), self.engine.device, State()
        self.asker.last_step = t
        cut = [row[: min(t, end)] for row, end in zip(self.rows, self.lengths, strict=True)]
        state.step, state.prompt = t, list(self.asker.prompt)
        state.max_tokens, state.stop_token_ids = self.max_tokens, self.stops
        padded = [row + [-1] * (t - len(row)) for row in cut]
        state.tokens = torch.tensor(padded, dtype=torch.int64, device=device).reshape(n, t)
        state.last_tokens = state.tokens[:, -1].clone() if t else None
        state.lengths = torch.tensor([len(row) for row in cut], device=device)
        state.finished = torch.tensor([end <= t for end in self.lengths], device=device)
        histories = [tuple(row[:seen]) if end > seen else None for row, end in zip(cut, self.lengths, strict=True)]
        distinct = list(dict.fromkeys(history for history in histories if history is not None))
        rows = [-1 if history is None else distinct.index(history) for history in histories]
        state.rows = torch.tensor(rows, device=device)
        state.hidden = state.hidden_rows = None
        if self._numbers is not None:
            known = [[self._numbers(row[: i + 1])[0] for i in range(len(row))] + [0.0] * (t - len(row)) for row in cut]
            state.token_log_probs = torch.tensor(known, dtype=torch.float64, device=device).reshape(n, t)
            state.log_prob = state.token_log_probs.sum(1)
        if self._numbers is not None and self.engine.hidden_size:
            state.hidden_rows = torch.stack([self._numbers(history)[1:] for history in distinct]).to(device)
            state.hidden = state.hidden_rows[state.rows.clamp(min=0)] * (state.rows >= 0)[:, None]
        return state

    def ask(self) -> tuple[Tensor, Tensor]:
        """Asks `prefix` of unfinished sequences, `complete` of those that have just ended: (N,) float64, else NaN."""
        state, answers = self.state(max(self.t - 1, 0)), []
        just = torch.tensor([end == self.t for end in self.lengths])
        for method, about in (("prefix", ~state.finished.cpu()), ("complete", just)):
            values = torch.full((len(self.rows),), math.nan, dtype=torch.float64)
            if bool(about.any()):
                answer = self.asker.scores(method, state).cpu()
                for i in (about & (answer.isnan() | (answer == math.inf))).nonzero().flatten().tolist():
                    what = f"says {answer[i].item()} after tokens {self.rows[i][: self.t]}"
                    raise self.asker.error(method, what)
                values = torch.where(about, answer, math.nan)
            answers.append(values)
        return answers[0], answers[1]

    def ask_next(self) -> NextRows | None:
        """Asks `logw_next`; None: it does not say."""
        state = self.state(self.t)
        says = self.asker.next_rows(state, self.engine.vocab_size)
        if says is None:
            return None
        for matrix, index in ((says.log_psi, says.psi_rows), (says.mask, says.mask_rows)):
            if matrix is not None and index is not None:
                bad = ~state.finished & ((index < 0) | (index >= len(matrix)))
                for i in bad.nonzero().flatten().tolist():
                    what = f"index[{i}]={index[i].item()} must be in [0, {len(matrix)})"
                    raise self.asker.error("logw_next", what)
        return says

    def refused(self) -> Tensor:
        """Asks `allows` about the next token of each unfinished sequence: (N,) bool, those that are refused."""
        refused = torch.zeros(len(self.rows), dtype=torch.bool)
        if self.asker.conditions:
            going = [i for i, end in enumerate(self.lengths) if end > self.t]
            particles, device = torch.tensor(going), self.engine.device
            tokens = torch.tensor([self.rows[i][self.t] for i in going])
            refused[particles] = ~self.asker.allows(self.state(self.t), particles.to(device), tokens.to(device)).cpu()
        return refused

    def end_step(self) -> None:
        """Goes on by one token, and finds who ends with it."""
        self.t += 1
        for i, row in enumerate(self.rows):
            if self.lengths[i] > self.t and (self.t == self.max_tokens or row[self.t - 1] in self.stops):
                self.lengths[i] = self.t
        if self.asker.stops:
            told = self.asker.stop(self.state(self.t - 1)).tolist()
            self.lengths = [min(end, self.t) if stop else end for end, stop in zip(self.lengths, told, strict=True)]

    def move(self, ancestors: Tensor) -> None:
        """Takes sequences from others, as a resampling does."""
        self.asker.call("reindex", ancestors.to(self.engine.device))
        self.rows = [self.rows[a] for a in ancestors.tolist()]
        self.lengths = [self.lengths[a] for a in ancestors.tolist()]
