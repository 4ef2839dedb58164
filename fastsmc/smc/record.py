"""What a group leaves behind: one entry per step, traced back once at the end, or when a potential looks at tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.params import SMCParams
from fastsmc.population import Population

#: what moves tokens from row to row, in the order in which a step does it
_EVENTS = ("ancestors", "tokens")


class Log:
    """Keeps the steps of a cohort as they come: nothing of length t is ever moved.

    Attributes:
        steps: per step name → tensor (M,) or (G,), as `put` got them.
        events: ("tokens" or "ancestors", (M,)) in the order of their coming.
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
        event: of the log, the first that `Lineages` has not seen.
        end, last_event: where the group left the cohort, which may go on without it; None: it is there.
    """

    log: Log
    g: int
    part: slice
    begin: int
    event: int
    end: int | None = None
    last_event: int | None = None


class Lineages:
    """Holds where a group has been, and the tokens of its particles as far as somebody has looked."""

    def __init__(self, n: int, device: torch.device) -> None:
        self.spans: list[Span] = []
        self._tokens = torch.zeros((n, 0), dtype=torch.int64, device=device)
        self._seen = 0  # spans that are in `_tokens` whole
        self._all = torch.arange(n, device=device)

    def enter(self, log: Log, g: int, part: slice) -> None:
        if self.spans:
            left = self.spans[-1]
            left.end, left.last_event = len(left.log.steps), len(left.log.events)
        self.spans.append(Span(log, g, part, len(log.steps), len(log.events)))

    def _news(self) -> list[tuple[str, Tensor]]:
        """Takes the events that nobody has looked at yet."""
        news = []
        for span in self.spans[self._seen :]:
            events = span.log.events[span.event : span.last_event]
            news += [(k, v[span.part] if k == "tokens" else v[span.part] - span.part.start) for k, v in events]
            span.event += len(events)
        self._seen = max(len(self.spans) - 1, 0)
        return news

    def tokens(self) -> Tensor:
        """Traces each particle's history back: (N, t) int64 tokens, −1 after its end."""
        rows, columns, news = self._all, [], self._news()
        for kind, values in reversed(news):
            if kind == "tokens":
                columns.append(values[rows])
            else:
                rows = values[rows]
        if news:
            self._tokens = torch.cat([self._tokens[rows], *(c[:, None] for c in reversed(columns))], dim=1)
        return self._tokens

    def _steps(self, name: str) -> Iterator[Tensor]:
        for span in self.spans:
            for step in span.log.steps[span.begin : span.end]:
                yield step[name][span.g] if name in ("ess", "resampled") else step[name][span.part]

    def stacked(self, name: str) -> np.ndarray:
        """Gives the record of a name, (T, N) or (T,): one copy from the device."""
        rows = list(self._steps(name))
        values = torch.stack(rows) if rows else torch.empty((0, len(self._all)))
        if name == "ancestors":
            starts = [s.part.start for s in self.spans for _ in s.log.steps[s.begin : s.end]]
            values = values - torch.tensor(starts, device=values.device)[:, None]
        return values.cpu().numpy()


def make_population(
    record: dict[str, np.ndarray],
    log_w: Tensor,
    log_z: float,
    *,
    twisted: bool,
    ended_by_resampling: bool,
    stopped: Tensor,
    prompt: Sequence[int],
    params: SMCParams,
) -> Population:
    """Makes the population of a record: name → (T, N) or (T,), as `Lineages.stacked` gives it.

    Args:
        log_w, log_z: (N,) since the last resampling, and the log of what lies before it.
        twisted: whether a step's ancestors are those before its draw; else those after it, of the step that follows.
        ended_by_resampling: the last resampling left finished particles only. Then a step without draws holds where
            they came from.
        stopped: (N,) bool, particles that ended otherwise than by their length.
    """
    n, steps = len(log_w), len(record["tokens"])
    log_mean = ops.ess_log_mean(log_w)[1]
    rows: dict[str, Any] = {name: [*values] for name, values in record.items()}
    if not twisted:
        rows["ancestors"] = [np.arange(n), *rows["ancestors"]][: steps + ended_by_resampling]
        rows["resampled"] = [False, *rows["resampled"]][: steps + ended_by_resampling]
    if ended_by_resampling:
        rows["tokens"].append(np.full(n, -1))
        rows["token_log_probs"].append(np.zeros(n))
        rows["ess"].append(float(n))
        rows["step_log_w"].append(np.full(n, log_z))

    def whole(name: str, dtype: type) -> np.ndarray:
        return np.array(rows[name], dtype=dtype).reshape(len(rows[name]), n)

    return Population.from_record(
        tokens=whole("tokens", np.int32),
        token_log_probs=whole("token_log_probs", np.float64),
        ancestors=whole("ancestors", np.int32),
        resampled=np.array(rows["resampled"], dtype=bool),
        ess=np.array(rows["ess"], dtype=np.float64),
        step_log_weights=whole("step_log_w", np.float64),
        log_weights=log_w.cpu().numpy() + log_z,
        log_z=log_z + log_mean,
        stopped=stopped.cpu().numpy(),
        prompt=list(prompt),
        params=params,
    )
