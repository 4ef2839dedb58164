"""The questions to a potential: what it sees, what it may answer, and the error of a group whose potential fails."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsmc.params import SMCParams
from fastsmc.potentials import Potential, State
from fastsmc.potentials.answers import NextRows, check_next, check_scores
from fastsmc.potentials.base import stops
from fastsmc.potentials.condition import conditions, most_asked
from fastsmc.potentials.copying import for_others
from fastsmc.potentials.joint import is_joinable
from fastsmc.potentials.product import fetches
from fastsmc.smc.engine import GroupEngine, SMCError
from fastsmc.smc.particles import Particles


class GroupState(State):
    """The view of particles that their potential gets. It shares no memory with them, so it may be written to.

    `tokens`, log-probs and hidden states are made when they are looked at: properties, where `State` has attributes.
    """

    def __init__(
        self,
        asker: Asker,
        particles: Particles,
        part: slice,
        first_row: int,
        step: Any,
        tokens: Callable[[], Tensor],
        token_log_probs: Callable[[], Tensor],
        hidden: Callable[[], Tensor | None],
    ) -> None:
        self.lengths, self.finished = particles.lengths[part].clone(), particles.finished[part].clone()
        self.last_tokens, rows = particles.last_tokens[part].clone(), particles.rows[part]
        self.rows = torch.where(rows >= 0, rows - first_row, -1) if first_row else rows.clone()
        self.step, self.prompt, self.max_tokens = step, list(asker.prompt), asker.params.max_tokens
        self.stop_token_ids = asker.stop_token_ids
        self.segments = None
        self._tokens, self._token_log_probs, self._hidden = tokens, token_log_probs, hidden
        self._log_prob = particles.log_prob[part]

    def put_hidden(self, hidden: Tensor | None) -> None:
        """Shows other hidden states (R, H), or none, to which `rows` belong."""
        self._hidden = lambda: hidden

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # see above
        return self._tokens()

    @property
    def log_prob(self) -> Tensor:  # type: ignore[override]
        return self._log_prob.clone()

    @property
    def token_log_probs(self) -> Tensor:  # type: ignore[override]
        return self._token_log_probs()

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
    """Asks the potential of a group. Whatever a user's code does ends the groups that it was asked for, and no other.

    Attributes:
        potential: the group's own copy.
        origin: what it is a copy of.
        joinable: whether groups of one origin may be asked together (`Potential.per_particle`).
        last_step: step of the last `State` that it saw.
        last_sizes: rows of log ψ and of the mask in the last answer of `logw_next`.
        scorer: answers `continuation_log_prob` while it is asked for scores.
        stops: whether the potential ends particles.
        fetches: whether it may need time for its answers (`Potential.fetch`).
        conditions: the potentials in it that are asked for candidate tokens.
        most_asked: how many candidates a particle is asked about per step at most, a number or inf.
        known: a continuation, and its (N,) float64 log-probs in this step.
    """

    def __init__(
        self,
        potential: Potential,
        origin: Potential,
        params: SMCParams,
        prompt: list[int],
        stop_token_ids: frozenset[int],
        engine: GroupEngine | None,
    ) -> None:
        self.origin, self.joinable = origin, is_joinable(potential)
        self.potential, self.params, self.prompt, self.stop_token_ids = potential, params, prompt, stop_token_ids
        self.engine = engine
        self.last_step = 0
        self.last_sizes = (0, 0)
        self.scorer: Callable[[list[int], int], Tensor] | None = None
        self.known: tuple[list[int], Tensor] | None = None
        self.stops, self.fetches = stops(potential), fetches(potential)
        self.conditions, self.most_asked = conditions(potential), most_asked(potential)

    def error(self, method: str, what: str, step: int | None = None, of: Potential | None = None) -> SMCError:
        """Makes an error that names the step of the `State` that the potential, or a part of it, saw."""
        step, name = self.last_step if step is None else step, type(of or self.potential).__name__
        return SMCError(f"potential {name}.{method} at step {step}: {what}")

    def call(self, method: str, *args: object, of: Potential | None = None) -> Any:
        """Calls a method of the potential, or of a part of it.

        Raises:
            SMCError: it raised.
        """
        if self.engine is not None:
            self.engine.scorer = self.scorer
        try:
            return getattr(of or self.potential, method)(*args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self.error(method, f"raised {type(error).__name__}: {error}", of=of) from error
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

    def fetch(self, state: State, about: Tensor) -> concurrent.futures.Future | None:
        """Asks `fetch` about the particles (N,) bool that `prefix` and `complete` will be asked about.

        Raises:
            SMCError: it raised, or answered with something else.
        """
        answer = self.call("fetch", state, about)
        if answer is not None and not isinstance(answer, concurrent.futures.Future):
            what = f"returned {type(answer).__name__}; must be a concurrent.futures.Future or None"
            raise self.error("fetch", what)
        return answer

    def check(self, future: concurrent.futures.Future) -> None:
        """Looks at what a `fetch` that is done has come to.

        Raises:
            SMCError: to an exception, or to nothing.
        """
        if future.cancelled():
            raise self.error("fetch", "was cancelled")
        if (error := future.exception()) is not None:
            raise self.error("fetch", f"raised {type(error).__name__}: {error}") from error

    def stop(self, state: State) -> Tensor:
        """Asks `stop`: (N,) bool.

        Raises:
            SMCError: it raised, or answered with something else.
        """
        answer, like = self.call("stop", state), state.finished
        if answer is None:
            return torch.zeros_like(like)
        if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != like.shape:
            got = f"{tuple(answer.shape)} {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
            raise self.error(
                "stop", f"returned {got}; must be a torch.bool tensor of shape {tuple(like.shape)} or None"
            )
        return answer.to(like.device)

    def allows(self, state: State, particles: Tensor, tokens: Tensor) -> Tensor:
        """Asks whether candidate tokens (K,) int64 of particles (K,) int64 are allowed by all conditions: (K,) bool.

        Of several conditions each is asked about what those before it allow.

        Raises:
            SMCError: it raised, or answered with something else.
        """
        left = torch.arange(len(tokens), device=tokens.device)
        for each in self.conditions:
            if not len(left):
                break
            answer = self.call("allows", state, particles[left], tokens[left], of=each)
            if not isinstance(answer, Tensor) or answer.dtype != torch.bool or answer.shape != left.shape:
                got = f"{tuple(answer.shape)} {answer.dtype}" if isinstance(answer, Tensor) else type(answer).__name__
                what = f"returned {got}; must be a torch.bool tensor of shape {tuple(left.shape)}"
                raise self.error("allows", what, of=each)
            left = left[answer.to(left.device)]
        return torch.zeros_like(tokens, dtype=torch.bool).index_fill_(0, left, True)

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
