"""How many rows of a particle pass one engine step runs beside other requests, from what steps have taken so far.

A group's rows are independent of each other until they are weighed, so a pass may be spread over several engine steps,
and other requests wait for a part of it only. Nothing of vLLM is imported here, and no clock is read.
"""

from __future__ import annotations

import logging

from fastsmc.vllm.options import ALL

#: what a part of a pass may take, in ordinary steps that only decode: other requests' tokens then come less than four
#: times as far apart as without groups, and the groups have most of the time
DECODE_STEPS = 3.8
#: what it may take beside prefill, in the time of the prefill step just before, where that is more: 1 would double the
#: time to a long prompt's first token; about a third leaves it below 1.3 times that without groups
PREFILL_SHARE = 0.35
#: rows as long as nothing has been measured, and the least
FIRST_ROWS, LEAST_ROWS = 64, 8
#: share of a new measurement in an estimate
NEWEST = 0.2
#: decode steps with riding rows until one goes without, which is what a decode step's time is estimated from
RIDES = 32
#: a change by this factor is logged
LOGGED_CHANGE = 1.5


class Pace:
    """Estimates seconds per row of a particle pass and seconds per decode step, and bounds a pass's rows by them.

    Decode steps are told apart by how many tokens they have, within a factor of two: requests come and go faster than
    one estimate would follow.
    """

    def __init__(self, rows_per_step: int | str | None, logger: logging.Logger) -> None:
        """Takes the option `max_particle_rows_per_step`, and the logger that is told of changes."""
        self._fixed, self._logger = rows_per_step, logger
        self._per_row: float | None = None
        self._decode: dict[int, float] = {}  # by size
        self._size = 0  # of the last decode step
        self._prefill = 0.0  # seconds of the last ordinary step, where it had prefill in it
        self._logged = 0.0
        self._rides = RIDES  # decode steps with riding rows since one without

    def see_ordinary(self, seconds: float, n_tokens: int, has_prefill: bool) -> None:
        """Takes what an ordinary step of so many tokens took."""
        self._prefill = seconds if has_prefill else 0.0
        if not has_prefill:
            self._size = _size(n_tokens)
            self._decode[self._size] = _moved(self._decode.get(self._size), seconds)
            self._rides = 0

    def see_ride(self) -> None:
        """Takes that a decode step had riding rows: it says nothing of what one without takes."""
        self._prefill = 0.0
        self._rides += 1

    def wants_decode(self, n_tokens: int) -> bool:
        """Says whether a decode step of so many tokens shall have no riding rows, so that its time is known."""
        return self._fixed is None and (self._rides >= RIDES or _size(n_tokens) not in self._decode)

    def see_rows(self, rows: int, seconds: float) -> None:
        """Takes what the model took for rows of particle passes. Few rows say nothing of what one more costs."""
        if rows >= LEAST_ROWS and seconds > 0:
            self._per_row = _moved(self._per_row, seconds / rows)

    def max_rows(self, n_tokens: int | None = None) -> int | None:
        """Returns how many rows of a pass the next engine step may run while there is other work; None: all.

        Args:
            n_tokens: of the decode step that the rows ride in; None: they are beside steps like the last one.
        """
        if self._fixed is not None:
            return None if self._fixed == ALL else int(self._fixed)
        if self._per_row is None:
            return FIRST_ROWS
        decode = self._decode.get(self._size if n_tokens is None else _size(n_tokens))
        rows = FIRST_ROWS if decode is None else max(LEAST_ROWS, int(DECODE_STEPS * decode / self._per_row))
        if decode is not None and not self._logged / LOGGED_CHANGE < rows < self._logged * LOGGED_CHANGE:
            self._logged = rows
            self._logger.info(
                "a particle pass runs at most %d rows per engine step beside other requests: a decode step takes "
                "%.1f ms, a row %.2f ms (max_particle_rows_per_step)",
                rows,
                1e3 * decode,
                1e3 * self._per_row,
            )
        return max(rows, int(PREFILL_SHARE * self._prefill / self._per_row))


def _size(n_tokens: int) -> int:
    return n_tokens.bit_length()


def _moved(estimate: float | None, seen: float) -> float:
    return seen if estimate is None else estimate + NEWEST * (seen - estimate)
