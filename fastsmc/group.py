"""One group of N particles: its device state and its SMC step, engine-independent.

    attend → weigh → resample → reindex → draw

`Group.step` is driven by anything that gives logits for rows (`RowModel`): the vLLM runner, a Hugging Face model, a
table of probabilities. The order within a step is that of docs/mathematics.md §1: with the twisted proposal the weight
of a step does not depend on the token, so the group resamples before it draws; with the base proposal it draws, weighs
and then resamples. Either way children of one parent draw from the parent's row of logits, with stratified uniforms.

Particles are not rows of the model. A model row, here a *slot*, holds one history; particles with the same history
share it, and its logits, until they draw different tokens: then all but one of the new histories get a slot of their
own, as a copy. So a resampling moves nothing, the first step runs one row, and a forward pass costs distinct histories,
not particles. N slots always suffice.

A group may be *conditional*: one particle, in a uniform slot, keeps an exact sample of the target at every step (forced
tokens, forced ancestor), and the others are resampled from all N weights. Then E[1/Ẑ] = 1/Z, so that log Ẑ bounds log Z
from above on average (docs/mathematics.md §4). That holds because the others have the law that they have in an ordinary
run given the kept one, which is simple for independent draws: a conditional group resamples multinomially and draws
without strata, whatever its parameters say. With N exact samples nothing is random: each of them is weighed.

Nothing of length t is ever moved: tokens and ancestors are kept step by step and traced back once, at the end (or when
a potential looks at `state.tokens`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.arguments import read_exact
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Engine, Potential, State, answered
from fastsmc.potentials.answers import NextRows, check_next, check_rows, check_scores
from fastsmc.potentials.copying import for_others, own_copy
from fastsmc.potentials.tokens import token_list

# Philox streams: one per purpose, so that no random number serves twice.
DRAW, RESAMPLE, CHOOSE, KEEP = 0, 1, 2, 3


class SMCError(RuntimeError):
    """A group could not go on, or was refused. Other groups and requests are not touched by it.

    Attributes:
        populations: of a call of `smc`: what each prompt gave, None for the groups that failed; else empty.
    """

    populations: Sequence[Population | None] = ()


def set_up(potential: Potential, engine: GroupEngine) -> Potential:
    """Sets a potential up and returns what its groups start from: a copy, out of reach of whoever holds the object.

    Raises:
        SMCError: its `setup` raised, or left what no group can have a copy of.
    """
    try:
        potential.setup(engine)
        return own_copy(potential, engine)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise SMCError(f"potential {type(potential).__name__}.setup: raised {type(error).__name__}: {error}") from error


class RowModel(Protocol):
    """Says what a group needs of the model: N slots, each for the prompt and a history of the same number of tokens."""

    def first(self) -> tuple[Tensor, Tensor | None]:
        """Gives logits (1, V) and hidden state (1, H) after the prompt, which slot 0 holds from now on."""

    def next(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor | None]:
        """Appends tokens (R,) int64 to distinct slots (R,) int64; gives their logits (R, V), hidden states (R, H).

        Slots are ascending. Unless `reindex` was called since the last call, they are among those of that call.
        """

    def reindex(self, ancestors: Tensor) -> None:
        """Makes slot i a copy of slot ancestors[i], (N,) int64 with ancestors[ancestors[i]] == ancestors[i]."""

    def continuation_log_prob(
        self, tokens: Tensor, slots: Tensor, continuation: list[int], temperature: float
    ) -> Tensor:
        """Computes (R,) float64 log p0(continuation | slot, token); tokens (R,) are drawn but not yet appended."""


class GroupEngine(Engine):
    """The worker's engine as potentials see it; `continuation_log_prob` answers for the group whose potential asks.

    The arguments are the attributes of `Engine`.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        device: torch.device | str = "cpu",
        vocab_size: int = 0,
        hidden_size: int | None = None,
        model: Any = None,
        model_name: str | None = None,
    ) -> None:
        self.tokenizer, self.device, self.model, self.model_name = tokenizer, torch.device(device), model, model_name
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self._asking: Group | None = None

    def continuation_log_prob(self, token_ids: list[int]) -> Tensor:
        if self._asking is None:
            raise RuntimeError("continuation_log_prob: only from within prefix or complete")
        return self._asking._continuation_log_prob(token_ids)


class _GroupState(State):
    """The view of a group that its potential gets. It shares no memory with the group, so it may be written to.

    `tokens`, `hidden` and `hidden_rows` are made when they are looked at: properties, where `State` has attributes.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.lengths = group.lengths.clone()
        self.finished = group.finished.clone()
        self.step = group.t_drawn
        self.last_tokens = group._last_tokens.clone() if group.t_drawn else None
        self.prompt = list(group.prompt)
        self.max_tokens = group.params.max_tokens
        self.stop_token_ids = group.stop_token_ids
        self.rows = group._row_of.clone()

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # see above
        return self._group._lineages().clone()

    @property
    def hidden(self) -> Tensor | None:  # type: ignore[override]
        return self._group._hidden_by_row()

    @functools.cached_property
    def hidden_rows(self) -> Tensor | None:  # type: ignore[override]
        hidden = self._group._hidden
        return None if hidden is None else for_others(hidden)


class Group:
    """Holds the state of one group on its device, and steps it.

    Args:
        params: what to do.
        model: its slots.
        potential: None for plain ancestral sampling. It must have been set up (`Potential.setup`); the group works on
            a copy of it (`potentials.copying`), so that groups do not share per-particle state.
        prompt: the prompt's token ids.
        stop_token_ids: all tokens that end a particle (end of sequence included).
        device: where the group's tensors live.
        engine: what the potential was set up with, for its calls of `continuation_log_prob`.
        exact: a list of one complete sequence of token ids, which makes the group conditional, or of N, to be weighed.

    Raises:
        SMCError: the potential or `exact` is refused.
    """

    def __init__(
        self,
        params: SMCParams,
        model: RowModel,
        potential: Potential | None,
        prompt: list[int],
        stop_token_ids: frozenset[int] | set[int] = frozenset(),
        device: torch.device | str = "cpu",
        engine: GroupEngine | None = None,
        exact: Sequence[Sequence[int]] | None = None,
    ) -> None:
        n = params.n_particles
        self._engine = engine
        self.params, self.model, self.prompt = params, model, list(prompt)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.device = torch.device(device)
        self._stop = torch.tensor(sorted(self.stop_token_ids), dtype=torch.int64, device=self.device)
        self.n = n
        self.t = 0  # steps done
        self.t_drawn = 0  # tokens drawn: State.step
        self.done = False
        self.log_w = torch.zeros(n, dtype=torch.float64, device=self.device)  # since the last resampling
        self.log_z = 0.0  # of the closed resampling intervals
        self._log_mean = 0.0  # log mean weight, when it was last recorded
        self.log_psi = torch.zeros_like(self.log_w)  # twist already in the weight
        self.lengths = torch.zeros(n, dtype=torch.int64, device=self.device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=self.device)
        self._all_rows = torch.arange(n, device=self.device)
        self._active = self._all_rows  # rows that are not finished
        self._row_of = torch.zeros_like(self._all_rows)  # index of a particle's logits in the last batch
        self._weighed_of = self._row_of  # twisted: a particle's row in what `weigh` gave
        self._slot_of = torch.zeros_like(self._all_rows)  # where a particle's history is, without its last token
        self._last_tokens = torch.zeros_like(self._all_rows)
        self._strata: tuple[Tensor, Tensor] | None = None  # (rank, count) among the siblings, after a resampling
        self._hidden: Tensor | None = None
        self._events: list[tuple[str, Tensor]] = []  # draws and moves since _history was last brought up to date
        self._history = torch.zeros((n, 0), dtype=torch.int64, device=self.device)
        # the record, one entry per step
        self._tokens: list[Tensor] = []
        self._token_log_probs: list[Tensor] = []
        self._ancestors: list[Tensor] = []
        self._resampled: list[bool] = []
        self._ess: list[float] = []
        self._step_log_w: list[Tensor] = []

        self._kept: Tensor | None = None  # (K,) rows of the exact samples
        if exact is not None:
            self._keep(exact)
        self.potential: Potential | None = None
        self.twisted = False
        self._weighs_by_next = False
        self._guided = False  # draws from p0·ψ, but ψ is no target: weighed after the draw
        if potential is not None:
            self._start_with(potential)

    def _start_with(self, potential: Potential) -> None:
        """Takes a copy of the potential, says how its answers are used, and weighs the empty sequences."""
        try:
            methods = answered(potential)
            self.potential = own_copy(potential, self._engine)
        except ValueError as error:
            raise SMCError(str(error)) from error
        proposal = self.params.proposal
        self._guided = self.potential.proposal_only
        if self._guided and proposal != "twisted":
            raise SMCError(
                f"potential {type(self.potential).__name__}: is proposal-only and no intermediate target, so "
                f"proposal={proposal!r} cannot use it; use proposal='twisted'"
            )
        by_next = "logw_next" in methods and not self._guided
        self.twisted = by_next and proposal == "twisted"
        self._weighs_by_next = by_next and not self.twisted and "prefix" not in methods
        self._ask("reset", self.n, list(self.prompt))
        psi = self._scores("prefix", ~self.finished)  # log ψ_0
        self.log_psi += psi
        self.log_w += psi
        if bool((self.log_w == -math.inf).all()):
            self._record_weights()
            self._ancestors.append(self._all_rows)
            self._resampled.append(False)
            self._end_without_weight()

    # ------------------------------------------------------------------------------------------------- the step
    @property
    def readers(self) -> Tensor:
        """Marks the slots whose history goes on, (N,) bool."""
        used = torch.zeros_like(self.finished)
        used[self._slot_of[self._active]] = True
        return used

    @torch.inference_mode()
    def step(self) -> None:
        """Takes one step with all unfinished particles. Sets `done` when none is left or no weight is left.

        Raises:
            SMCError: the potential raised, or gave a wrong shape, NaN or +inf; the model gave NaN.
        """
        t = self.t
        if t == 0:
            logits, self._hidden = self.model.first()
            self._row_of = torch.zeros_like(self._all_rows)
        else:
            tokens, slots, row_of = self._settle(self._active)
            logits, self._hidden = self.model.next(tokens, slots)
            self._row_of = torch.full_like(self._all_rows, -1)
            self._row_of[self._active] = row_of
        if len(self._ancestors) == t:  # not resampled after the last step
            self._ancestors.append(self._all_rows)
            self._resampled.append(False)
        (self._step_twisted if self.twisted else self._step_base)(logits)
        if self._kept is not None and bool((self.log_w[self._kept] == -math.inf).any()):
            i = int((self.log_w[self._kept] == -math.inf).nonzero()[0])
            raise SMCError(
                f"exact[{i}]: has weight zero at step {t}: it is no sample of this target, or the twist is zero on "
                "what the target allows"
            )
        self.t += 1

    def _step_twisted(self, logits: Tensor) -> None:
        answer = self._ask("logw_next", _GroupState(self))
        if answer is None and self.t == 0:
            self.twisted = False
            return self._step_base(logits)
        twist = self._twist_rows(answer, logits.shape[1]).rounded()
        logit_rows = self._row_of[self._active]
        inputs = {"logit_rows": logit_rows, **twist._asdict(), "temperature": self.params.temperature}
        weighed = ops.weigh(logits, **inputs)
        self._check_weighed(weighed, "logw_next")
        self._weighed_of = torch.full_like(self._all_rows, -1)
        self._weighed_of[self._active] = torch.arange(len(self._active), device=self.device)
        self.log_w[self._active] += weighed.lse_psi - weighed.lse
        self._record_weights()
        if self._ess[-1] == 0.0:
            return self._end_without_weight()
        moved = None
        if self.t > 0:
            moved = self._maybe_resample()
        elif bool((weighed.tile_mass == weighed.tile_mass[:1]).all()):
            self._stratify_first()
        if self.done:  # only finished particles survived
            self._append(self._active, self.log_w[:0])
            self._follow(moved)
            return
        rows = self._weighed_of[self._active]
        drawn = ops.draw(logits, weighed, rows, self._uniforms(), **inputs)
        if self._kept is not None:
            drawn = self._force(drawn, logits, logit_rows[rows], weighed.lse[rows], twist, rows)
        self._follow(moved)  # not before the draw: what it read may be a buffer that the potential moves, too
        drew = self._active
        ended = self._append(drawn.tokens, drawn.log_prob)
        self.log_psi[drew] += drawn.log_psi
        if ended is not None and bool(ended.any()):
            self._reweigh(torch.where(ended, self._scores("complete", ended), self.log_psi))
            if bool((self.log_w == -math.inf).all()):  # known now, so the record shows it now
                self._ess[-1], self._step_log_w[-1] = 0.0, self.log_w
                self.done = True

    def _step_base(self, logits: Tensor) -> None:
        drew, guide = self._active, None
        inputs: dict[str, Any] = {"temperature": self.params.temperature}
        if self._guided:
            guide = self._twist_rows(self._ask("logw_next", _GroupState(self)), logits.shape[1]).rounded()
            rows = torch.arange(len(drew), device=self.device)
            inputs |= {"logit_rows": self._row_of[drew], **guide._asdict()}
        else:
            rows = self._row_of[drew]
        weighed = ops.weigh(logits, **inputs)
        self._check_weighed(weighed, "logw_next" if self._guided else "model")
        if self.t == 0:
            self._stratify_first()
        answer = self._ask("logw_next", _GroupState(self)) if self._weighs_by_next else None
        drawn = ops.draw(logits, weighed, rows, self._uniforms(), **inputs)
        if self._kept is not None:
            drawn = self._force(drawn, logits, self._row_of[drew], weighed.lse[rows], guide, rows)
        if self._guided:  # p0 / q of what was drawn
            change = weighed.lse_psi - weighed.lse - drawn.log_psi
            self.log_w[drew] += torch.where(drawn.tokens < 0, -math.inf, change)
        new_psi = self.log_psi.clone()
        if answer is not None:
            at = torch.arange(len(drew), device=self.device)
            change = self._twist_rows(answer, logits.shape[1]).of_tokens(at, drawn.tokens.clamp(min=0))
            self._check_values("logw_next", change, drew)
            new_psi[drew] += change
        ended = self._append(drawn.tokens, drawn.log_prob)
        if self.potential is not None:
            # first `complete`: scoring continuations lets go of the slots of all but those asked and going
            if ended is not None and bool(ended.any()):
                new_psi = torch.where(ended, self._scores("complete", ended), new_psi)
            if answer is None and not self.done:
                going = ~self.finished
                new_psi = torch.where(going, self._scores("prefix", going), new_psi)
            self._reweigh(new_psi)
        self._record_weights()
        if self._ess[-1] == 0.0:
            self._end_without_weight()
        elif not self.done and self.potential is not None:
            self._follow(self._maybe_resample())
            if self.done:  # only finished particles survived: a step without draws holds where they came from
                self.t += 1
                self._record_weights()
                self._append(self._active, self.log_w[:0])

    # ------------------------------------------------------------------------------------------- parts of a step
    def _settle(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gives every distinct history (slot, last token) of particles `rows` (R,) a slot of its own.

        Of the histories that come from one slot the first stays in place; the others become copies in slots that no
        particle of `rows` is in. Particles outside `rows` lose their histories.

        Returns:
            tokens (K,), slots (K,) ascending: the distinct histories, not yet appended; and (R,) int64, the index of
            each particle's among them.
        """
        keys, key_of = torch.unique(self._slot_of[rows] << 32 | self._last_tokens[rows], return_inverse=True)
        parents, tokens = keys >> 32, keys & 0xFFFFFFFF
        copied = torch.zeros_like(parents, dtype=torch.bool)
        copied[1:] = parents[1:] == parents[:-1]
        used = torch.zeros_like(self.finished)
        used[parents] = True
        vacant = torch.argsort(used.byte(), stable=True)  # vacant slots first, in order
        slots = torch.where(copied, vacant[copied.cumsum(0) - 1], parents)  # the first is not copied: −1 is not used
        if bool(copied.any()):
            ancestors = self._all_rows.clone()
            ancestors[slots] = parents
            self.model.reindex(ancestors)
            slots, by = torch.sort(slots)
            tokens, key_of = tokens[by], torch.argsort(by)[key_of]
        self._slot_of[rows] = slots[key_of]
        return tokens, slots, key_of

    def _uniforms(self) -> Tensor:
        """Makes (R,) uniforms of the active rows, keyed by (seed, group, particle, step), stratified among siblings."""
        p = self.params
        u = ops.uniforms(self.n, seed=p.seed, group=p.group, step=self.t, stream=DRAW, device=self.device)
        if self._strata is not None:
            u = ops.stratify(u, *self._strata)
            self._strata = None
        return u[self._active]

    def _stratify_first(self) -> None:
        """Takes all particles, the same empty sequence, for siblings, if their weights are equal."""
        if self._kept is None and bool((self.log_w == self.log_w[0]).all()):
            self._strata = (self._all_rows, torch.full_like(self._all_rows, self.n))

    def _append(self, drawn: Tensor, drawn_log_probs: Tensor) -> Tensor | None:
        """Records a draw (R,) of the active rows. Returns (N,) bool, the rows that end with it, or None: no row does.

        A row whose every next token has weight zero draws none (−1). It has weight zero too, so it ends unasked.
        """
        dead = drawn < 0
        tokens = torch.full_like(self._all_rows, -1)
        tokens[self._active] = drawn
        log_probs = torch.zeros_like(self.log_w)
        log_probs[self._active] = torch.where(dead, torch.zeros_like(drawn_log_probs), drawn_log_probs)
        self._tokens.append(tokens)
        self._token_log_probs.append(log_probs)
        self._last_tokens = tokens
        self._events.append(("draw", tokens))
        self.lengths[self._active] += (~dead).long()
        self.t_drawn = self.t + 1
        ended = (torch.isin(tokens, self._stop) | (self.lengths >= self.params.max_tokens)) & ~self.finished
        self.finished = self.finished | ended
        self.finished[self._active] |= dead
        drew = len(self._active)
        self._find_active()
        return ended if len(self._active) < drew else None

    def _find_active(self) -> None:
        self._active = torch.nonzero(~self.finished).squeeze(1)
        self.done = len(self._active) == 0

    def _reweigh(self, new_psi: Tensor) -> None:
        """Takes weights from the twist that they hold to `new_psi` (N,). A weight of zero stays zero."""
        alive = self.log_psi > -math.inf
        change = torch.where(alive, new_psi - self.log_psi, torch.zeros_like(new_psi))
        self.log_w = self.log_w + change
        self.log_psi = torch.where(alive, new_psi, self.log_psi)

    def _record_weights(self) -> None:
        self._step_log_w.append(self.log_w + self.log_z)
        ess, self._log_mean = ops.ess_log_mean(self.log_w)
        self._ess.append(ess)

    # ------------------------------------------------------------------------------------------- exact samples
    def _keep(self, exact: Sequence[Sequence[int]]) -> None:
        """Gives the exact samples their slots: N of them all slots, a single one a random slot."""
        p, n = self.params, self.n
        try:
            exact = read_exact("exact", exact, p, (self._engine and self._engine.vocab_size) or None)
        except ValueError as error:
            raise SMCError(str(error)) from None
        self._kept_tokens = torch.full((len(exact), p.max_tokens), -1, dtype=torch.int64, device=self.device)
        for i, ids in enumerate(exact):
            ends = [j for j, v in enumerate(ids) if v in self.stop_token_ids] or [p.max_tokens - 1]
            if len(ids) != ends[0] + 1:
                raise SMCError(
                    f"exact[{i}]={ids[:20]}: {len(ids)} tokens are no complete sequence; it ends with its first stop "
                    f"token, or has max_tokens={p.max_tokens} tokens"
                )
            self._kept_tokens[i, : len(ids)] = torch.tensor(ids, device=self.device)
        self._kept = self._all_rows if len(exact) == n else self._uniform_slot(0)

    def _uniform_slot(self, step: int) -> Tensor:
        p = self.params
        u = ops.uniforms(1, seed=p.seed, group=p.group, step=step, stream=KEEP, device=self.device)
        return (u * self.n).long()

    def _force(
        self,
        drawn: ops.Drawn,
        logits: Tensor,
        logit_rows: Tensor,
        lse: Tensor,
        twist: NextRows | None,
        rows: Tensor,
    ) -> ops.Drawn:
        """Puts the tokens of the exact samples in the place of what the active rows drew, (R,).

        Args:
            logit_rows, rows: (R,) int64, the rows of logits and twist that each draw was from; lse: (R,).
        """
        assert self._kept is not None  # else nothing is forced
        position = torch.full_like(self._all_rows, -1)
        position[self._active] = torch.arange(len(self._active), device=self.device)
        going = torch.nonzero(position[self._kept] >= 0).squeeze(1)
        at, want = position[self._kept[going]], self._kept_tokens[going, self.t]
        if len(want) and int(want.max()) >= logits.shape[1]:
            raise SMCError(f"exact: token {int(want.max())} is outside the vocabulary of {logits.shape[1]}")
        tokens, log_prob, psi = (x.clone() for x in drawn)
        tokens[at] = want
        log_prob[at] = logits[logit_rows[at], want].double() / self.params.temperature - lse[at]
        psi[at] = 0.0 if twist is None else twist.of_tokens(rows[at], want)
        if bool((log_prob[at] + psi[at] == -math.inf).any()):
            raise SMCError(f"exact: the model or the twist rules out one of its tokens at step {self.t}")
        return ops.Drawn(tokens, log_prob, psi)

    def _conditional_ancestors(self, u: Tensor) -> Tensor:
        """Draws ancestors (N,) int64 by weight, independently, but that the kept particle goes to a random slot."""
        assert self._kept is not None  # else the group is not conditional
        # in integers, because a GPU adds float64 numbers in no fixed order. What is cut off is less than 2**-50 of the
        # weights; a total of about 2**50 times u < 1 rounds to less than the total
        cumulative = (torch.softmax(self.log_w, 0) * 2.0**50).long().cumsum(0)
        ancestors = torch.searchsorted(cumulative, (u * cumulative[-1]).long(), right=True)
        slot = self._uniform_slot(self.t + 1)
        ancestors[slot] = self._kept
        self._kept = slot
        return ancestors

    def _follow(self, ancestors: Tensor | None) -> None:
        """Lets the potential's particles follow a resampling (N,), if there was one."""
        if ancestors is not None and self.potential is not None:
            self._ask("reindex", ancestors.clone())

    def _maybe_resample(self) -> Tensor | None:
        """Resamples if the ESS is low, and then returns the ancestors (N,); the potential does not know of them yet."""
        threshold = self.params.ess_threshold
        if threshold < 1.0 and not self._ess[-1] < threshold * self.n:
            return None
        p = self.params
        # Resampling may come after step t's weights (base) or before its draw (twisted): the same counter either way
        # is used once, because a group has one order.
        u = ops.uniforms(self.n, seed=p.seed, group=p.group, step=self.t, stream=RESAMPLE, device=self.device)
        if self._kept is None:
            resampled = ops.resample(self.log_w, u, scheme=p.resampling)
            ancestors = resampled.ancestors
            self._strata = (resampled.rank, resampled.counts[ancestors])
        else:
            ancestors = self._conditional_ancestors(u)
        self.log_z += self._log_mean
        self.log_w = torch.zeros_like(self.log_w)
        self.log_psi = self.log_psi[ancestors]
        self.lengths = self.lengths[ancestors]
        self.finished = self.finished[ancestors]
        self._last_tokens = self._last_tokens[ancestors]
        self._row_of = self._row_of[ancestors]
        self._weighed_of = self._weighed_of[ancestors]
        self._slot_of = self._slot_of[ancestors]
        self._find_active()
        self._events.append(("move", ancestors))
        # base: these are the ancestors of the next step; twisted: of this one, which already has the identity
        if len(self._ancestors) > len(self._tokens):
            self._ancestors.pop(), self._resampled.pop()
        self._ancestors.append(ancestors)
        self._resampled.append(True)
        return ancestors

    def _end_without_weight(self) -> None:
        """Ends a group whose weights are all zero: log Ẑ = −inf, and no particle is worth continuing."""
        self.done = True
        if len(self._ess) > len(self._tokens):  # the twisted proposal found out before it drew
            self._tokens.append(torch.full_like(self._all_rows, -1))
            self._token_log_probs.append(torch.zeros_like(self.log_w))

    # ---------------------------------------------------------------------------------------- asking the potential
    def _error(self, method: str, what: str) -> SMCError:
        """Makes an error that names the step of the `State` that the potential saw."""
        return SMCError(f"potential {type(self.potential).__name__}.{method} at step {self.t_drawn}: {what}")

    def _ask(self, method: str, *args: object) -> object:
        if self._engine is not None:
            self._engine._asking = self
        try:
            return getattr(self.potential, method)(*args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a user's code does ends this group alone
            raise self._error(method, f"raised {type(error).__name__}: {error}") from error
        finally:
            if self._engine is not None:
                self._engine._asking = None

    def _refused(self, method: str, error: TypeError) -> SMCError:
        """Makes the group's error of one of `potentials.answers`, which begins with class and method."""
        return self._error(method, str(error).partition(" ")[2])

    def _check_values(self, method: str, values: Tensor, rows: Tensor) -> None:
        """Refuses NaN and +inf among values (R,) of particles rows (R,)."""
        bad = torch.isnan(values) | (values == math.inf)
        if bool(bad.any()):
            i = int(torch.nonzero(bad)[0])
            raise self._error(method, f"particle {int(rows[i])} got {float(values[i])}; must be finite or -inf")

    def _scores(self, method: str, asked: Tensor) -> Tensor:
        """Asks `prefix` or `complete`: (N,) float64, 0 in rows outside `asked` (N,) bool."""
        assert self.potential is not None  # else nobody asks
        self._asked = asked
        answer = self._ask(method, _GroupState(self))
        try:
            scores = check_scores(self.potential, method, answer, asked)
        except TypeError as error:
            raise self._refused(method, error) from None
        scores = torch.where(asked, scores, torch.zeros_like(self.log_w))
        self._check_values(method, scores, self._all_rows)
        return scores

    def _twist_rows(self, answer: object, vocab: int) -> NextRows:
        """Checks what `logw_next` answered, and gives it for the active rows."""
        assert self.potential is not None  # it has answered
        try:
            checked = check_next(self.potential, answer, self.finished, vocab)
            if checked is None:
                raise self._error("logw_next", "returned None" + " after it had returned a tensor" * (self.t > 0))
            checked = check_rows(self.potential, checked, ~self.finished)
        except TypeError as error:
            raise self._refused("logw_next", error) from None
        return NextRows.of(checked).select(self._active)

    def _check_weighed(self, weighed: ops.Weighed, who: str) -> None:
        bad = torch.isnan(weighed.lse_psi) | torch.isnan(weighed.lse)  # not the same where a mask hides the model's
        if not bool(bad.any()):
            return
        model = torch.nonzero(torch.isnan(weighed.lse))
        if len(model):
            raise SMCError(f"model at step {self.t}: logits of row {int(model[0])} hold NaN or +inf")
        row = int(self._active[int(torch.nonzero(bad)[0])])
        raise self._error(who, f"particle {row} got NaN or +inf; must be finite or -inf")

    def _continuation_log_prob(self, token_ids: list[int]) -> Tensor:
        assert self._engine is not None and self.potential is not None  # the potential has asked through the engine
        token_ids = token_list("token_ids", token_ids, self._engine.vocab_size or None)
        if not 0 < len(token_ids) <= self.potential.lookahead:
            raise ValueError(
                f"token_ids of length {len(token_ids)}: must have 1 to lookahead={self.potential.lookahead} tokens"
            )
        if self.t_drawn == 0:
            raise ValueError("continuation_log_prob: there is no token yet; return 0 for the empty sequence")
        out = torch.zeros_like(self.log_w)
        if not bool(self._asked.any()):
            return out
        rows = torch.nonzero(self._asked | ~self.finished).squeeze(1)
        tokens, slots, slot_of = self._settle(rows)
        asked = torch.unique(slot_of[self._asked[rows]])
        scores = torch.zeros(len(slots), dtype=torch.float64, device=self.device)
        scores[asked] = self.model.continuation_log_prob(
            tokens[asked], slots[asked], token_ids, self.params.temperature
        )
        out[rows] = scores[slot_of]
        return torch.where(self._asked, out, torch.zeros_like(out))

    def _lineages(self) -> Tensor:
        """Traces each row's history back: (N, t) int64 tokens, −1 after its end."""
        rows, columns = self._all_rows, []
        for kind, values in reversed(self._events):
            if kind == "draw":
                columns.append(values[rows])
            else:
                rows = values[rows]
        if self._events:
            old = self._history if rows is self._all_rows else self._history[rows]
            self._history = torch.cat([old, *(c[:, None] for c in reversed(columns))], dim=1)
            self._events = []
        return self._history

    def _hidden_by_row(self) -> Tensor | None:
        if self._hidden is None:
            return None
        known = self._row_of >= 0
        rows = torch.zeros_like(self._row_of) if len(self._hidden) == 1 else self._row_of.clamp(min=0)
        return self._hidden[rows] * known[:, None]

    # ---------------------------------------------------------------------------------------------- the result
    def choose(self) -> int | None:
        """Draws a particle by the final weights, one sample of the target; None if there is no weight."""
        weights = torch.softmax(self.log_w, 0).cpu().numpy()
        if not np.isfinite(weights).all():
            return None
        p = self.params
        u = float(ops.uniforms(1, seed=p.seed, group=p.group, step=0, stream=CHOOSE, device="cpu")[0])
        cumulative = np.cumsum(weights)
        i = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
        return min(i, int(np.flatnonzero(weights)[-1]))

    def population(self) -> Population:
        """Gives the weighted particles, traced back through the genealogy."""
        steps = len(self._tokens)

        def record(rows: list[Tensor], dtype: type) -> np.ndarray:  # one copy from the device
            return torch.stack(rows).cpu().numpy().astype(dtype) if rows else np.empty((0, self.n), dtype=dtype)

        return Population.from_record(
            tokens=record(self._tokens, np.int32),
            token_log_probs=record(self._token_log_probs, np.float64),
            ancestors=record(self._ancestors[:steps], np.int32),
            resampled=np.array(self._resampled[:steps], dtype=bool),
            ess=np.array(self._ess),
            step_log_weights=record(self._step_log_w, np.float64),
            log_weights=self.log_w.cpu().numpy() + self.log_z,
            log_z=self.log_z + ops.ess_log_mean(self.log_w)[1],
            prompt=self.prompt,
            params=self.params,
        )
