"""The questions to a potential: what it sees, what it may answer, and the error of a group whose potential fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsmc.params import SMCParams
from fastsmc.potentials import Potential, State
from fastsmc.potentials.answers import NextRows, check_next, check_scores
from fastsmc.potentials.copying import for_others
from fastsmc.smc.engine import GroupEngine, SMCError


class Seen:
    """Holds what the potentials of a cohort see at one moment, (M,) each: copies, as potentials may write to them."""

    def __init__(self, **values: Tensor | None) -> None:
        self._values = {name: None if value is None else value.clone() for name, value in values.items()}

    def part(self, name: str, part: slice) -> Any:
        values = self._values[name]
        return None if values is None else values[part]


class GroupState(State):
    """The view of a group that its potential gets. It shares no memory with the group, so it may be written to.

    `tokens`, `hidden` and `hidden_rows` are made when they are looked at: properties, where `State` has attributes.
    """

    def __init__(
        self,
        asker: Asker,
        seen: Seen,
        part: slice,
        step: Any,
        tokens: Callable[[], Tensor],
        hidden: Callable[[], Tensor | None],
    ) -> None:
        self.lengths, self.finished = seen.part("lengths", part), seen.part("finished", part)
        self.last_tokens, self.rows = seen.part("last_tokens", part), seen.part("rows", part)
        self.step, self.prompt, self.max_tokens = step, list(asker.prompt), asker.params.max_tokens
        self.stop_token_ids = asker.stop_token_ids
        self._tokens, self._hidden = tokens, hidden

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # see above
        return self._tokens()

    @cached_property
    def hidden_rows(self) -> Tensor | None:  # type: ignore[override]
        hidden = self._hidden()
        return None if hidden is None else for_others(hidden)

    @property
    def hidden(self) -> Tensor | None:  # type: ignore[override]
        hidden = self._hidden()
        if hidden is None:
            return None
        return hidden[self.rows.clamp(0, len(hidden) - 1)] * (self.rows >= 0)[:, None]


class Asker:
    """Asks the potential of one group. Whatever a user's code does ends this group alone.

    Attributes:
        potential: the group's own copy.
        last_step: step of the last `State` that it saw.
        last_sizes: rows of log ψ and of the mask in the last answer of `logw_next`.
        scorer: answers `continuation_log_prob` while it is asked for scores.
        known: a continuation, and its (N,) float64 log-probs in this step.
    """

    def __init__(
        self,
        potential: Potential,
        params: SMCParams,
        prompt: list[int],
        stop_token_ids: frozenset[int],
        engine: GroupEngine | None,
    ) -> None:
        self.potential, self.params, self.prompt, self.stop_token_ids = potential, params, prompt, stop_token_ids
        self.engine = engine
        self.last_step = 0
        self.last_sizes = (0, 0)
        self.scorer: Callable[[list[int]], Tensor] | None = None
        self.known: tuple[list[int], Tensor] | None = None

    def error(self, method: str, what: str, step: int | None = None) -> SMCError:
        """Makes an error that names the step of the `State` that the potential saw."""
        step = self.last_step if step is None else step
        return SMCError(f"potential {type(self.potential).__name__}.{method} at step {step}: {what}")

    def call(self, method: str, *args: object) -> Any:
        """Calls a method.

        Raises:
            SMCError: it raised.
        """
        if self.engine is not None:
            self.engine.scorer = self.scorer
        try:
            return getattr(self.potential, method)(*args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.error(method, f"raised {type(error).__name__}: {error}") from error
        finally:
            if self.engine is not None:
                self.engine.scorer = None

    def scores(self, method: str, state: State) -> Tensor:
        """Asks `prefix` or `complete`: (N,) float64, not yet looked at.

        Raises:
            SMCError: it raised, or answered with something else.
        """
        answer = self.call(method, state)
        try:
            return check_scores(self.potential, method, answer, state.finished)
        except TypeError as error:
            raise self._refused(method, error) from None

    def next_rows(self, state: State, vocab: int) -> NextRows | None:
        """Asks `logw_next`; None: it does not shape the proposal. Indices are not looked at: the host would wait.

        Raises:
            SMCError: it raised, or answered with something else.
        """
        answer = self.call("logw_next", state)
        try:
            checked = check_next(self.potential, answer, state.finished, vocab)
        except TypeError as error:
            raise self._refused("logw_next", error) from None
        if checked is None:
            return None
        rows = NextRows.of(checked)
        if rows.log_psi is not None and rows.psi_rows is None:  # as kernels are compiled for
            rows = rows._replace(psi_rows=torch.arange(len(rows.log_psi), device=rows.log_psi.device))
        self.last_sizes = tuple(0 if m is None else len(m) for m in (rows.log_psi, rows.mask))  # type: ignore[assignment]
        return rows

    def _refused(self, method: str, error: TypeError) -> SMCError:
        """Makes the group's error of one of `potentials.answers`, which begins with class and method."""
        return self.error(method, str(error).partition(" ")[2])


class _Stack:
    """Puts matrices one below the other; one that comes again stands once."""

    def __init__(self) -> None:
        self._matrices: list[Tensor] = []
        self._begins: dict[tuple[int, torch.Size, tuple[int, ...]], int] = {}
        self._size = 0
        self.rows: list[Tensor] = []

    def add(self, matrix: Tensor, rows: Tensor) -> None:
        """Takes rows (N,) int64 of a matrix (M, …)."""
        key = matrix.data_ptr(), matrix.shape, matrix.stride()
        if key not in self._begins:
            self._begins[key], self._size = self._size, self._size + len(matrix)
            self._matrices.append(matrix)
        self.rows.append(rows + self._begins[key])

    def whole(self) -> tuple[Tensor, Tensor]:
        """Gives all matrices as one, of the dtype that holds the values of each; and all rows."""
        matrices = self._matrices
        if len(matrices) == 1:
            return matrices[0], torch.cat(self.rows)
        dtype = functools.reduce(torch.promote_types, (matrix.dtype for matrix in matrices))
        return torch.cat([matrix.to(dtype) for matrix in matrices]), torch.cat(self.rows)


def together(parts: list[NextRows | None], sizes: list[int], device: torch.device) -> NextRows:
    """Makes one `NextRows` of those of several groups, a row per particle; None: the group is over.

    Where one has log ψ, the others have a row of zeros; where one has a mask, to the others all tokens are allowed.
    """
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    psi, masks = _Stack(), _Stack()
    values = next((part.log_psi for part in parts if part is not None and part.log_psi is not None), None)
    zeros = None if values is None else torch.zeros(1, values.shape[1], device=device)
    mask = next((part.mask for part in parts if part is not None and part.mask is not None), None)
    for part, size in zip(parts, sizes, strict=True):
        everyone = torch.arange(size, device=device)
        if zeros is not None:
            if part is None or part.log_psi is None:
                psi.add(zeros, torch.zeros_like(everyone))
            else:
                psi.add(part.log_psi, everyone if part.psi_rows is None else part.psi_rows)
        if mask is not None:
            if part is None or part.mask is None:
                masks.rows.append(torch.full_like(everyone, -1))
            else:
                masks.add(part.mask, everyone if part.mask_rows is None else part.mask_rows)
    log_psi, psi_rows = (None, None) if zeros is None else psi.whole()
    bits, mask_rows = (None, None) if mask is None else masks.whole()
    return NextRows(log_psi, psi_rows, bits, mask_rows)
