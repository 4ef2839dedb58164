"""What a group leaves behind: one entry per step, traced back once at the end, or when a potential looks at tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc import genealogy, ops
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.smc.step import find_tau

#: what is one entry per group
_OF_GROUPS = ("ess", "resampled", "boundary", "island_resampled")
#: what moves from row to row, and what moves it, in the order in which a step does it
_EVENTS = ("ancestors", "tokens", "token_log_probs")


class Log:
    """Keeps the steps of a cohort as they come: nothing of length t is ever moved.

    Attributes:
        steps: per step name → tensor (M,) or (G,), as `put` got them.
        events: ("ancestors", "tokens" or "token_log_probs", (M,)) in the order of their coming.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []
        self.events: list[tuple[str, Tensor]] = []
        self._now: dict[str, Tensor] = {}

    def put(self, name: str, values: Tensor) -> None:
        """Keeps values of this step, in the place of those that were put before."""
        self._now[name] = values
        if name in _EVENTS:
            self.events.append((name, values))

    def close(self) -> None:
        self.steps.append(self._now)
        self._now = {}


@dataclasses.dataclass
class Span:
    """Says where in a cohort's log a group is: from step `begin` to `end`, as group `g` with particles `part`.

    Attributes:
        event: of the log, its first.
        end, last_event: where the group left the cohort, which may go on without it; None: it is there.
    """

    log: Log
    g: int
    part: slice
    begin: int
    event: int
    end: int | None = None
    last_event: int | None = None


@dataclasses.dataclass
class Seen:
    """Says how many events of a group somebody has seen: spans that are seen whole, and events of the one after."""

    spans: int = 0
    events: int = 0


class Lineages:
    """Holds where a group has been, and the tokens of its particles as far as somebody has looked."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.spans: list[Span] = []
        nothing = torch.zeros((n, 0), dtype=torch.int64, device=device)
        self._traced = {"tokens": (Seen(), nothing), "token_log_probs": (Seen(), nothing.double())}
        self._all = torch.arange(n, device=device)

    def enter(self, log: Log, g: int, part: slice) -> None:
        if self.spans:
            left = self.spans[-1]
            left.end, left.last_event = len(left.log.steps), len(left.log.events)
        self.spans.append(Span(log, g, part, len(log.steps), len(log.events)))

    def news(self, seen: Seen) -> list[tuple[str, Tensor]]:
        """Lists the events that are not `seen` yet, which they are then."""
        news = []
        for i, span in enumerate(self.spans[seen.spans :], seen.spans):
            if i > seen.spans:
                seen.spans, seen.events = i, 0
            events = span.log.events[span.event + seen.events : span.last_event]
            news += [(k, v[span.part] - span.part.start if k == "ancestors" else v[span.part]) for k, v in events]
            seen.events += len(events)
        return news

    def tokens(self) -> Tensor:
        """Traces each particle's history back: (N, t) int64 tokens, −1 after its end."""
        return self._trace("tokens")

    def token_log_probs(self) -> Tensor:
        """Traces each particle's history back: (N, t) float64 log p0 of its tokens, 0 after its end."""
        return self._trace("token_log_probs")

    def _trace(self, name: str) -> Tensor:
        seen, traced = self._traced[name]
        rows, columns, news = self._all, [], self.news(seen)
        for kind, values in reversed(news):
            if kind == name:
                columns.append(values[rows])
            elif kind == "ancestors":
                rows = values[rows]
        if news:
            traced = torch.cat([traced[rows], *(c[:, None] for c in reversed(columns))], dim=1)
            self._traced[name] = seen, traced
        return traced

    def _steps(self, name: str) -> Iterator[Tensor]:
        for span in self.spans:
            for step in span.log.steps[span.begin : span.end]:
                yield step[name][span.g if name in _OF_GROUPS else span.part]

    def stacked(self, name: str) -> np.ndarray:
        """Gives the record of a name, (T, N), (T,) or of islands (T, M): one copy from the device."""
        rows = list(self._steps(name))
        values = torch.stack(rows) if rows else torch.empty((0, len(self._all)))
        if name == "ancestors":
            starts = [s.part.start for s in self.spans for _ in s.log.steps[s.begin : s.end]]
            values = values - torch.tensor(starts, device=values.device)[:, None]
        return values.cpu().numpy()


class CommonTokens:
    """Finds tokens that all lineages with weight share, as soon as they do: whoever is drawn in the end has them.

    What is looked at again is the first column of tokens that is not known to be shared: which of its rows each
    particle comes from is brought up to date by the events since the last look. Only where that column has become
    common are those after it traced back.
    """

    def __init__(self, lineages: Lineages) -> None:
        self._lineages, self._seen = lineages, Seen()
        self._events: list[tuple[str, Tensor]] = []  # from the first column that is not shared on
        self._rows: Tensor | None = None  # of that column, (N,): where each particle comes from
        self._length = 0  # tokens that are shared

    def more(self, log_w: Tensor, finished: Tensor, lengths: Tensor) -> list[int]:
        """Returns the tokens that have become common since the last call. Waits for the device, at most twice.

        Dead particles do not count, since nobody draws or follows them. The last token of a particle that has ended is
        kept back: it comes with the sample, which says how it ended.

        Args:
            log_w, finished, lengths: (N,) of the particles, after whole steps.
        """
        self._put([event for event in self._lineages.news(self._seen) if event[0] != "token_log_probs"])
        if self._rows is None:
            return []
        alive = log_w > -math.inf
        open_end = torch.where(alive & finished, lengths - 1 - self._length, len(self._events)).min()
        if not bool(_agree(self._events[0][1][self._rows], alive) & (open_end > 0)):
            return []
        rows, columns = torch.arange(len(alive), device=alive.device), []
        for kind, values in reversed(self._events):
            if kind == "tokens":
                columns.append(values[rows])
            else:
                rows = values[rows]
        tokens = torch.stack(columns[::-1])
        of_one = tokens[:, alive.byte().argmax()]
        shared = _agree(tokens, alive) & ((of_one >= 0).cumsum(0) <= open_end)
        n, *spelled = torch.cat([shared.long().cumprod(0).sum()[None], of_one]).tolist()
        common = [token for token in spelled[:n] if token >= 0]  # where all have waited there is none
        self._forget(n)
        self._length += len(common)
        return common

    def _put(self, events: list[tuple[str, Tensor]]) -> None:
        for kind, values in events:
            if self._rows is None and kind == "tokens":
                self._rows = torch.arange(len(values), device=values.device)
            elif self._rows is None:
                continue  # it moves what is shared
            elif kind == "ancestors":
                self._rows = self._rows[values]
            self._events.append((kind, values))

    def _forget(self, n: int) -> None:
        """Drops the first `n` columns, at least one."""
        columns = [i for i, (kind, _) in enumerate(self._events) if kind == "tokens"]
        events = self._events[columns[n] :] if n < len(columns) else []
        self._events, self._rows = [], None
        self._put(events)


def _agree(tokens: Tensor, alive: Tensor) -> Tensor:
    """Says whether particles in `alive` (N,) bool all have the same token, or none: of (..., N), (...) bool."""
    low = torch.where(alive, tokens, torch.iinfo(tokens.dtype).max).amin(-1)
    return low == torch.where(alive, tokens, -1).amax(-1)


def make_population(
    record: dict[str, np.ndarray],
    log_w: Tensor,
    log_z: float,
    *,
    twisted: bool,
    retains: bool,
    equal_by_law: bool,
    ended_by_resampling: bool,
    stopped: Tensor,
    prompt: Sequence[int],
    params: SMCParams,
    segments: Tensor | None = None,
) -> Population:
    """Makes the population of a record: name → (T, N), (T,) or (T, M), as `Lineages.stacked` gives it.

    Args:
        log_w, log_z: (N,) since the last resampling, and the log of what lies before it.
        twisted: whether a step's ancestors are those before its draw; else those after it, of the step that follows.
        retains, equal_by_law: whether the group had exact samples; as of `genealogy.log_z_stderr`.
        ended_by_resampling: the last resampling left finished particles only. Then a step without draws holds where
            they came from.
        stopped: (N,) bool, particles that ended otherwise than by their length.
        params: of a group with islands the record has `island_resampled`, (T, M) bool.
        segments: (N,) int64 of each particle; None: there are none, else the record has `boundary`, (T,) bool.
    """
    n, steps = len(log_w), len(record["tokens"])
    ess, log_mean = ops.ess_log_mean(log_w)
    boundaries = None if segments is None else np.flatnonzero(record["boundary"])
    rows: dict[str, Any] = {name: [*values] for name, values in record.items() if name != "boundary"}
    if not twisted:
        for name in ("ancestors", "resampled", "island_resampled"):
            if name in rows:
                before = np.arange(n) if name == "ancestors" else np.zeros_like(rows[name][0])
                rows[name] = [before, *rows[name]][: steps + ended_by_resampling]
    if ended_by_resampling:
        rows["tokens"].append(np.full(n, -1))
        rows["token_log_probs"].append(np.zeros(n))
        rows["ess"].append(ess)
        rows["step_log_w"].append(log_w.cpu().numpy() + log_z)

    def whole(name: str, dtype: type) -> np.ndarray:
        return np.array(rows[name], dtype=dtype).reshape(len(rows[name]), n)

    ancestors, resampled = whole("ancestors", np.int32), np.array(rows["resampled"], dtype=bool)
    step_log_weights, log_weights = whole("step_log_w", np.float64), log_w.cpu().numpy() + log_z
    back = 0 if twisted else 1  # with the base proposal a step is resampled by the weights of the step before
    ess_share = torch.tensor(np.roll(np.array(rows["ess"], dtype=np.float64), back)) / n
    tau = params.resampling_temperature
    taus = find_tau(
        torch.full_like(ess_share, 0.0 if isinstance(tau, str) else tau),
        ess_share.clamp(min=1 / n),
        torch.arange(len(ess_share)) / params.max_tokens,
    )
    stderr, reason = genealogy.log_z_stderr(
        ancestors,
        resampled,
        np.roll(step_log_weights, back, axis=0),
        1.0 - 1.0 / taus.numpy(),
        log_weights,
        equal_by_law=equal_by_law,
        retains=retains,
        migrates=params.islands > 1,
    )
    if params.islands > 1:
        island, island_resampled = np.arange(n) // (n // params.islands), np.array(rows["island_resampled"], dtype=bool)
    else:
        island, island_resampled = None, None
    return Population.from_record(
        tokens=whole("tokens", np.int32),
        token_log_probs=whole("token_log_probs", np.float64),
        ancestors=ancestors,
        resampled=resampled,
        ess=np.array(rows["ess"], dtype=np.float64),
        step_log_weights=step_log_weights,
        log_weights=log_weights,
        log_z=log_z + log_mean,
        log_z_stderr=stderr,
        log_z_stderr_reason=reason,
        stopped=stopped.cpu().numpy(),
        prompt=list(prompt),
        params=params,
        segments=None if segments is None else segments.cpu().numpy(),
        boundaries=boundaries,
        island=island,
        island_resampled=island_resampled,
    )
