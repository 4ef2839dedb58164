"""Cohorts: groups of one kind that take their steps together, driven by whoever has a model.

    arrange(groups) → cohorts
    cohort.wants()  → Wants      which histories the model must append a token to, after which copies
    cohort.take(logits, hidden)  the step; yields `Scores` where potentials want continuations scored, and `Answers`
                                 where they are not ready to answer

A group asks for nothing itself, so one pass of a model serves the rows of all groups. The host waits for the device
twice per step, whatever the number of groups: once to hear who has ended, once to hear who goes on with how many
distinct histories. Where there are segments, stop strings or a potential's `stop` it waits once more before it asks
them, and for each group's strings; top_p waits too.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
import struct
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.p0 import restrict
from fastsmc.potentials import joint
from fastsmc.potentials.answers import NextRows, together
from fastsmc.potentials.tokens import token_list
from fastsmc.smc import faults, rejection
from fastsmc.smc.asking import Asker, GroupState
from fastsmc.smc.engine import SMCError
from fastsmc.smc.evidence import Factual
from fastsmc.smc.particles import Layout, Particles
from fastsmc.smc.record import Log
from fastsmc.smc.step import Step
from fastsmc.values import check_int, json_safe

if TYPE_CHECKING:
    from fastsmc.smc.group import Group


class Wants(NamedTuple):
    """Says what a cohort wants of the model: R rows, each a history that a token is appended to.

    Attributes:
        groups: those of the cohort.
        bounds: G + 1 ints: rows [bounds[g], bounds[g + 1]) are those of groups[g].
        tokens: (R,) int64. At a group's first step there is one row, whose token is the prompt's last.
        slots: (R,) int64, ascending, counted through the groups of the cohort: those of a group begin where the
            particles of the groups before it end.
        moves: (M,) int64 or None: before anything is appended, slot i becomes a copy of slot moves[i], in the in-place
            form of `ops.resample`.
    """

    groups: Sequence[Group]
    bounds: list[int]
    tokens: Tensor
    slots: Tensor
    moves: Tensor | None


class Scores(NamedTuple):
    """Asks for log p0 of continuations after R histories whose last token is not appended yet.

    Attributes:
        wants: the histories, with copies to be made first; groups that ask for nothing have no rows.
        continuations: the token ids to score, of each group.
        given: so many of the first ones are conditioned on, and not scored.
    """

    wants: Wants
    continuations: list[list[int]]
    given: int = 0


class Answers(NamedTuple):
    """Asks to go on when what a potential needs for its answers is there: the `future` of `Potential.fetch`.

    It comes from cohorts of one group only.
    """

    future: concurrent.futures.Future


#: what `Cohort.take` yields, is sent (None for `Answers`), and returns
Flow = Generator[Scores | Answers, Tensor | None, None]


def arrange(groups: Sequence[Group]) -> list[Cohort]:
    """Puts groups that are not done into cohorts, as few as there are kinds.

    Those of a kind keep their order, but that those which are asked together stand side by side. Groups with a bias
    have float32 logits (`p0.restrict`), so they are apart: the others keep their bits. So are those that may have to
    wait for their potentials' answers.
    """
    kinds: dict[object, dict[object, list[Group]]] = {}
    for group in groups:
        waits = group if group.asker is not None and group.asker.fetches else None
        kind = group.kind, group.device, group.p0.bias is not None, waits
        kinds.setdefault(kind, {}).setdefault(group.asked_with, []).append(group)
    return [_cohort_of(list(itertools.chain(*members.values()))) for members in kinds.values()]


def _cohort_of(groups: list[Group]) -> Cohort:
    """Returns the cohort that these groups are, all of it, or makes it."""
    cohort = groups[0].cohort
    if cohort.groups == groups and all(group.cohort is cohort for group in groups):
        return cohort
    return Cohort(groups)


@dataclasses.dataclass
class Together:
    """Is a run of groups of a cohort that are asked together; most often one group.

    Attributes:
        asker: of the first of them, whose potential stands for all; None: they have no potentials.
        first, last: which groups, last not included.
        part: their particles.
        joined: whether the first one's potential has the particles of all.
    """

    asker: Asker | None
    first: int
    last: int
    part: slice
    joined: bool = False


class Cohort:
    """Holds the particles of groups of one kind, and takes their steps.

    Args:
        groups: new ones, or groups of other cohorts, which lose them.

    Attributes:
        scorer: scores continuations that a potential asks for from within its own code; set by whoever drives it.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.log = list(groups), Log()
        old = [(group.cohort, group.index) for group in groups if group.started]
        for cohort, g in old:
            cohort._part(g)
        self.particles: Particles
        if old:
            self.particles = Particles.joined((cohort.particles, cohort.layout.part(g)) for cohort, g in old)
        else:
            self.particles = Particles(sum(group.n for group in groups), groups[0].device)
        self.step = Step(
            groups[0].kind,
            [group.params for group in groups],
            [sorted(group.stop_token_ids) for group in groups],
            [group.weighed for group in groups],
            self.particles,
            self.log,
        )
        if old:
            for name in ("step", "log_z", "boundaries", "at_boundary"):
                setattr(self.step, name, torch.stack([getattr(cohort.step, name)[g] for cohort, g in old]))
        self.layout: Layout = self.step.layout
        self.scorer: Callable[[Scores], Tensor] | None = None
        self._hidden: Tensor | None = None
        self._bounds = [0] * (len(groups) + 1)
        self._vocab = 0
        self._next: ops.Histories | None = None
        for g, group in enumerate(groups):
            group.cohort, group.index = self, g
            group.lineages.enter(self.log, g, self.layout.part(g))
        self._asked = self._join()

    def _join(self) -> list[Together]:
        """Joins the potentials of groups that are asked together."""
        asked, first = [], 0
        for _, run in itertools.groupby(self.groups, lambda group: group.asked_with):
            askers = [group.asker for group in run]
            last = first + len(askers)
            part = slice(self.layout.bounds[first], self.layout.bounds[last])
            asked.append(Together(askers[0], first, last, part, askers[0] is not None and len(askers) > 1))
            if asked[-1].joined:
                joint.join([asker.potential for asker in askers if asker is not None])
            first = last
        return asked

    def _part(self, g: int) -> None:
        """Gives group g, which goes to another cohort, and those that it was asked with their own potentials again."""
        run = next(run for run in self._asked if run.first <= g < run.last)
        if run.joined:
            groups = [(group.asker.potential, group.n) for group in self.groups[run.first : run.last] if group.asker]
            joint.part(*zip(*groups, strict=True))
            run.joined = False

    # ------------------------------------------------------------------------------------------------- before a pass
    def begin(self) -> None:
        """Starts the only group: weighs the empty sequences.

        Raises:
            SMCError: the potential raised, or gave no log weights.
        """
        (group,), step, particles = self.groups, self.step, self.particles
        group.started = True
        particles.last_tokens.fill_(group.prompt[-1] if group.prompt else 0)
        if group.exact is not None:
            if len(group.exact) == group.n:
                particles.retained.fill_(True)
            else:
                step.retain_one()
        if group.asker is None:
            return
        group.asker.call("reset", group.n, list(group.prompt))
        if group.asker.joinable:
            try:
                joint.check(group.asker.potential, group.n)
            except ValueError as error:
                raise SMCError(str(error)) from None
        group.asker.scorer = functools.partial(self._continuation, self._asked[0], ~particles.finished)
        answer = group.asker.scores("prefix", self._state(self._asked[0]))
        psi = step.checked(answer, torch.ones_like(particles.finished), faults.PREFIX)
        particles.log_psi += psi
        particles.log_w += psi
        bad, alive = torch.stack([self._bad().any(), (psi > -math.inf).any()]).tolist()
        if bad:
            raise self._fault_error(self._asked[0], 0)
        if not alive:
            self.log.put("ancestors", self.layout.all)
            self.log.put("resampled", torch.zeros_like(step.going))
            self.log.put("step_log_w", particles.log_w.clone())
            self.log.put("ess", torch.zeros_like(step.log_z))
            self.log.put("tokens", torch.full_like(self.layout.all, -1))
            self.log.put("token_log_probs", torch.zeros_like(particles.log_w))
            self.log.put("token_log_kernels", torch.zeros_like(particles.log_w))
            self.log.put("boundary", torch.zeros_like(step.going))
            self.log.put("island_resampled", torch.zeros(1, step.kind.islands, dtype=torch.bool, device=step.device))
            self.log.close()
            group.done = True

    def readers(self, g: int) -> Tensor:
        """Marks the slots of group g whose history is kept, (N,) bool."""
        part, size, particles = self.layout.part(g), self.groups[g].n, self.particles
        over = particles.finished[part] & ~particles.paused[part]
        slots = torch.where(over, size, particles.slots[part])
        used = torch.zeros(size + 1, dtype=torch.bool, device=slots.device)
        used[slots] = True
        return used[:size]

    def wants(self) -> Wants:
        """Says what the model must do for the next step. Asked again, it wants the same."""
        particles = self.particles
        plan = self._next or self._plan_rows()
        self._next = None
        particles.slots.copy_(plan.slots)
        particles.rows.copy_(plan.rows)
        self._bounds = [0]
        for group in self.groups:
            self._bounds.append(self._bounds[-1] + group.n_rows)
        moves = plan.ancestors if any(group.copies for group in self.groups) else None
        return self._wants(plan.present, plan.tokens, self._bounds, moves)

    def _plan_rows(self) -> ops.Histories:
        """Gives histories their slots; of those that are kept, the ones that particles draw from have rows."""
        plan, step, size = self._settle(self.step.kept), self.step, len(self.layout.all)
        if not step.kind.segmented:
            return plan
        slots = plan.slots + self.layout.start
        draws = torch.zeros(size + 1, dtype=torch.bool, device=slots.device)
        draws[torch.where(step.active, slots, size)] = True
        rows = torch.where(step.active, (draws[:size].cumsum(0) - 1)[slots], -1)
        return plan._replace(present=draws[:size], rows=rows)

    def _settle(self, wanted: Tensor) -> ops.Histories:
        particles = self.particles
        return ops.settle(particles.slots, particles.last_tokens, wanted, self.layout.offsets)

    def _wants(self, present: Tensor, tokens: Tensor, bounds: list[int], moves: Tensor | None) -> Wants:
        """Lists the slots in `present` (M,) bool, bounds[-1] of them, with the tokens (M,) that they append."""
        slots = torch.argsort(~present, stable=True)[: bounds[-1]]
        return Wants(self.groups, bounds, tokens[slots], slots, moves)

    # --------------------------------------------------------------------------------------------------------- a step
    def take(self, logits: Tensor, hidden: Tensor | None) -> Flow:
        """Takes one step by what the model gave for the rows of `wants`. What goes wrong in a group ends it alone.

        Args:
            logits: (R, V), which may be written to.
            hidden: (R, H) or None.

        Yields:
            continuations to be scored; to be sent their (R,) float64 log-probs.
        """
        step, self._hidden, self._vocab = self.step, hidden, logits.shape[1]
        step.faults.clear()
        answers = self._ask_next()
        yield from self._let_go(logits, hidden)
        if not any(self._own(group) for group in self.groups):
            return
        if any(group.p0.restricted for group in self.groups):
            n_rows = self._bounds[-1]
            before = torch.zeros(n_rows + 1, dtype=torch.int64, device=logits.device)
            before[torch.where(step.active, self.particles.rows, n_rows)] = self.particles.lengths
            logits = restrict(logits, [group.p0 for group in self.groups], self._bounds, before[:n_rows])
        for group, row in zip(self.groups, self._bounds, strict=False):
            if group.watch is not None and self._own(group):
                group.watch(logits[row])
        shaped = step.kind.twisted or step.kind.guided
        sizes = [run.part.stop - run.part.start for run in self._asked]
        told = together(answers, sizes, self.particles.log_w.device) if any(answers) else None
        first = step.step == 0 if any(group.t == 0 for group in self.groups) else None
        factual = self._factual(logits.device) if step.kind.noise is not None else None
        if step.kind.rejects:
            ended, change = self._reject(logits, told, first)
        else:
            ended, change = step.draw(
                logits, told if shaped else None, None if shaped else told, first, self._forced(), factual
            )
        moving = step.resampled if step.kind.twisted else None
        unfinished = step.active
        if any(group.ends_itself for group in self.groups) or step.kind.segmented:
            bad, moved = self._read(self._bad(), moving)
            self._fail_bad(bad)
            self._reindex(moved)
            segment_ended = self._end_segments() if step.kind.segmented else None
            ended, moving = self._ask_stops(ended), None
            unfinished = step.active
            if segment_ended is not None:
                ended, unfinished = self._pause(segment_ended, ended)
        del logits, told, answers  # large, and the potential may take its time
        bad, n_ended, left, moved = self._read(self._bad(), ended, unfinished, moving)
        self._fail_bad(bad)
        self._reindex(moved)
        new_psi = yield from self._ask_scores(ended, unfinished, n_ended, left, change)
        step.close(new_psi)
        self._end_step()

    def _reject(self, logits: Tensor, twist: NextRows | None, first: Tensor | None) -> tuple[Tensor, Tensor]:
        """Draws by the rejection proposal; gives what `Step.draw` does."""
        states = [self._state(run) if run.asker is not None else None for run in self._asked]

        def allows(particles: Tensor, tokens: Tensor) -> Tensor:
            out = torch.zeros_like(tokens, dtype=torch.bool)
            for run, state in zip(self._asked, states, strict=True):
                at = ((particles >= run.part.start) & (particles < run.part.stop)).nonzero().squeeze(1)
                if not len(at) or not any(self._own(group) for group in self.groups[run.first : run.last]):
                    continue
                assert run.asker is not None and state is not None  # all of this kind have conditions
                try:
                    out[at] = run.asker.allows(state, particles[at] - run.part.start, tokens[at])
                except SMCError as error:
                    self._fail(run, error)
            return out

        limits = [min(group.asker.most_asked, 2**62) if group.asker else 0 for group in self.groups]
        most = self.step.of(torch.tensor([int(limit) for limit in limits], device=logits.device))
        ended, cut = rejection.draw(self.step, logits, twist, first, allows, most.expand(len(self.layout.all)))
        for group, n_cut in zip(self.groups, self.layout.counts(cut).tolist(), strict=True):
            group.n_cut += n_cut
        return ended, torch.zeros_like(self.particles.log_w)

    def _let_go(self, logits: Tensor, hidden: Tensor | None) -> Flow:
        """Lets groups go that turn out not to be twisted: they take their first step as a cohort of their own."""
        for run in self._asked:
            gone = [group for group in self.groups[run.first : run.last] if self._own(group) and not group.kind.twisted]
            if not gone or not self.step.kind.twisted:
                continue
            rows = slice(self._bounds[run.first], self._bounds[run.last])
            self.step.stop(slice(run.first, run.last))
            apart = Cohort(gone)
            apart.scorer = self.scorer
            apart.wants()
            yield from apart.take(logits[rows], None if hidden is None else hidden[rows])

    def _forced(self) -> Tensor | None:
        """Lists the next token of the exact sample that a particle would retain, (M,) int64; −1 after its end."""
        if not self.step.kind.retains:
            return None
        parts = []
        for group in self.groups:
            assert group.exact is not None  # of this kind all have some
            part = self.layout.part(group.index)
            at = torch.where(self.particles.retained[part], self.particles.lengths[part], 0)
            if len(group.exact) == 1:  # whoever may be its particle when this step has resampled
                at = at.max().expand(group.n)
            at = at.clamp(max=group.params.max_tokens - 1)
            parts.append(group.exact.expand(group.n, -1).gather(1, at[:, None]).squeeze(1))
        return torch.cat(parts)

    def _factual(self, device: torch.device) -> Factual:
        """Collects what counterfactual groups are compared with at this step."""
        rows, tokens, temperatures = [], [], []
        for group in self.groups:
            assert group.evidence is not None  # of this kind all have some
            row, token = group.evidence.at(group.t)
            rows.append(row)
            tokens.append(token)
            temperatures.append(group.evidence.temperature)
        if len({row.dtype for row in rows}) > 1:  # of another model, beside others
            rows = [row.float() for row in rows]
        counts = torch.tensor([b - a for a, b in itertools.pairwise(self._bounds)], device=device)
        group_of = torch.arange(len(rows), device=device).repeat_interleave(counts, output_size=self._bounds[-1])
        temperature = torch.tensor(temperatures, dtype=torch.float64, device=device)
        return Factual(torch.stack(rows), torch.stack(tokens), temperature, group_of)

    def _end_step(self) -> None:
        """Brings the groups up to date, and finds out what they want next."""
        step, particles = self.step, self.particles
        self.log.close()
        plan = self._next = self._plan_rows()
        unfinished = ~particles.finished
        numbers: tuple[Tensor, ...] = ()  # read as the bits that they are
        if any(group.progress is not None for group in self.groups):
            numbers = step.ess.view(torch.int64), step.log_z_so_far().view(torch.int64)
        bad, rows, copies, left, going, moved, *bits = self._read(
            self._bad(), plan.present, plan.copied, unfinished, step.going, step.resampled, *numbers
        )
        self._fail_bad(bad)
        for g, group in enumerate(self.groups):
            if not self._own(group):
                continue
            group.t += 1
            group.n_rows, group.copies = rows[g], copies[g] > 0
            group.done = not going[g] or not left[g]
            group.ended_by_resampling = bool(going[g]) and not left[g]
            if group.progress is not None:
                ess, log_z = struct.unpack("=2d", struct.pack("=2q", bits[0][g], bits[1][g]))
                of_step = {"step": group.t, "ess": ess, "log_z": json_safe(log_z), "resampled": moved[g] > 0}
                group.progress.append(of_step | {"finished": group.n - left[g], "distinct": rows[g]})
        if not step.kind.twisted:
            self._reindex(moved)

    def _read(self, *columns: Tensor | None) -> list[list[int]]:
        """Counts flags (M,) by group, and reads those of groups (G,), at one wait for the device: a list per column."""
        of_particles = [c for c in columns if c is not None and len(c) == len(self.layout.all)]
        counts = iter(self.layout.counts(torch.stack(of_particles, 1)).T)
        empty = torch.zeros_like(self.step.step)
        values = [empty if c is None else next(counts) if len(c) == len(self.layout.all) else c.long() for c in columns]
        return torch.stack(values).tolist()

    # ------------------------------------------------------------------------------------------ asking the potentials
    def _state(self, run: Together, drawn: int = 0, scored: bool = False) -> GroupState:
        """Makes the view of groups that have drawn a token in this step, or not; `scored`: of particles that may have
        drawn it earlier, where there are segments."""
        asker, groups, hidden = run.asker, self.groups[run.first : run.last], self._hidden
        assert asker is not None  # else nobody looks
        asker.last_step = groups[0].t + drawn
        rows = slice(self._bounds[run.first], self._bounds[run.last])
        state = GroupState(
            asker,
            self.particles,
            run.part,
            rows.start,
            asker.last_step,
            lambda: torch.cat([group.lineages.tokens() for group in groups]),
            lambda: torch.cat([group.lineages.token_log_probs() for group in groups]),
            lambda: None if hidden is None else hidden[rows],
        )
        if asker.last_step == 0:
            state.last_tokens = None
        if self.step.kind.segmented:
            state.segments = self.particles.segments[run.part].clone()
            if scored:
                waiting = self.particles.paused[run.part]
                state.rows = torch.where(waiting, self.layout.local[run.part], -1)
                state.put_hidden(groups[0].held_hidden)
        return state

    def _ask_next(self) -> list[NextRows | None]:
        """Asks `logw_next` of the groups that need it; indices that are out of range are kept as faults."""
        kind = self.step.kind
        answers: list[NextRows | None] = []
        for run in self._asked:
            answer, group = None, self.groups[run.first]
            if run.asker is not None and (kind.twisted or kind.guided or group.weighs_by_next):
                try:
                    answer = run.asker.next_rows(self._state(run), self._vocab)
                    if answer is None and kind.twisted and group.t == 0:
                        for group in self.groups[run.first : run.last]:
                            group.become_base()
                    elif answer is None and not kind.rejects:
                        later = " after it had returned a tensor" * (group.t > 0)
                        raise run.asker.error("logw_next", "returned None" + later)
                except SMCError as error:
                    self._fail(run, error)
            answers.append(answer)
        self.step.clamp(answers, [run.part for run in self._asked])
        return answers

    def _ask_stops(self, ended: Tensor) -> Tensor:
        """Ends particles that have just drawn, by their potentials and stop strings; returns `ended` (M,) with them."""
        stopped = torch.zeros_like(ended)
        for run in self._asked:
            for g in range(run.first, run.last):
                if self._own(self.groups[g]) and (strings := self.groups[g].stop_strings) is not None:
                    part = self.layout.part(g)
                    drew = self.step.active[part] | (ended & ~self.particles.stopped)[part]
                    found = strings.find(self.particles.last_tokens[part], drew)
                    stopped[part] |= found & (self.particles.lengths[part] > self.groups[g].params.min_tokens)
            own = any(self._own(group) for group in self.groups[run.first : run.last])
            if run.asker is not None and run.asker.stops and own:
                try:
                    stopped[run.part] |= run.asker.stop(self._state(run, 1))
                except SMCError as error:
                    self._fail(run, error)
        stopped &= self.step.active | ended
        self.step.end(stopped)
        return ended | stopped

    def _end_segments(self) -> Tensor:
        """Ends the segments of particles that have just drawn, and does so on their texts; returns which, (M,) bool."""
        by_text, active = torch.zeros_like(self.particles.finished), self.step.active
        followed = [(g, group.segment_strings) for g, group in enumerate(self.groups) if self._own(group)]
        for g, strings in followed:
            if strings is not None:
                part = self.layout.part(g)
                by_text[part] = strings.find(self.particles.last_tokens[part], active[part])
        segment_ended = self.step.end_segments(by_text)
        for g, strings in followed:
            if strings is not None:
                strings.begin_anew(segment_ended[self.layout.part(g)])
        return segment_ended

    def _pause(self, segment_ended: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Does `Step.pause`, and keeps the hidden states of those that wait."""
        waited, out = self.particles.paused.clone(), self.step.pause(segment_ended, ended)
        hidden, came = self._hidden, self.particles.paused & ~waited
        for g, group in enumerate(self.groups):
            if hidden is not None and group.asker is not None and self._own(group):
                part = self.layout.part(g)
                held = hidden[self.particles.rows[part].clamp(min=0)]
                if group.held_hidden is not None:
                    held = torch.where(came[part, None], held, group.held_hidden)
                group.held_hidden = held
        return out

    def _ask_scores(
        self, ended: Tensor, unfinished: Tensor, n_ended: list[int], left: list[int], change: Tensor
    ) -> Generator[Scores | Answers, Tensor | None, Tensor | None]:
        """Asks `complete` about particles in `ended`, and where weights need it `prefix` about those in `unfinished`,
        both (M,) bool: (M,) new log ψ."""
        step = self.step
        complete = [self._has(run, n_ended) for run in self._asked]
        by_prefix = [not (step.kind.twisted or self.groups[run.first].weighs_by_next) for run in self._asked]
        prefix = [wants and self._has(run, left) for wants, run in zip(by_prefix, self._asked, strict=True)]
        if not any(complete + prefix):
            return None if step.kind.twisted else self.particles.log_psi + change
        yield from self._score_declared(ended, unfinished, complete, prefix)
        yield from self._fetch(ended, unfinished, complete, prefix)
        new_psi = self._scores("complete", faults.COMPLETE, ended, complete, self.particles.log_psi + change)
        new_psi = self._scores("prefix", faults.PREFIX, unfinished, prefix, new_psi)
        for run in self._asked:
            if run.asker is not None:
                run.asker.known = None
        return new_psi

    def _has(self, run: Together, counts: list[int]) -> bool:
        """Says whether a run has a potential, and one of its groups that are going has something to be asked about."""
        going = (g for g in range(run.first, run.last) if self._own(self.groups[g]))
        return run.asker is not None and any(counts[g] for g in going)

    def _scores(self, method: str, fault: int, asked: Tensor, which: list[bool], new_psi: Tensor) -> Tensor:
        """Puts what `method` of the runs in `which` says about particles `asked` (M,) bool into new_psi (M,)."""
        if not any(which):
            return new_psi
        answers, about = [], []
        for run, wanted in zip(self._asked, which, strict=True):
            values = None
            if wanted and any(self._own(group) for group in self.groups[run.first : run.last]):
                assert run.asker is not None  # else it is not in `which`
                run.asker.scorer = functools.partial(self._continuation, run, asked)
                try:
                    values = run.asker.scores(method, self._state(run, 1, scored=True))
                except SMCError as error:
                    self._fail(run, error)
            answers.append(torch.zeros_like(new_psi[run.part]) if values is None else values)
            about.append(torch.zeros_like(asked[run.part]) if values is None else asked[run.part])
        told = torch.cat(about)
        return torch.where(told, self.step.checked(torch.cat(answers), told, fault, later=1), new_psi)

    def _reindex(self, moved: list[int]) -> None:
        """Lets the potentials' particles follow the last resampling."""
        for g, group in enumerate(self.groups):
            for strings in (group.stop_strings, group.segment_strings):
                if strings is not None and moved[g]:
                    part = self.layout.part(g)
                    strings.reindex(self.step.ancestors[part] - part.start)
        for run in self._asked:
            if run.asker is not None and self._has(run, moved):
                try:
                    run.asker.call("reindex", self.step.ancestors[run.part] - run.part.start)
                except SMCError as error:
                    self._fail(run, error)

    # ------------------------------------------------------------------------------------------------- continuations
    def _want_scores(self, asked: Tensor, continuations: list[list[int]]) -> tuple[Scores, Tensor]:
        """Makes the rows that score continuations after particles `asked` (M,) bool; and each particle's row, (M,).

        Args:
            continuations: of each run.
        """
        particles, layout = self.particles, self.layout
        plan = self._settle(asked | self.step.kept)
        particles.slots.copy_(plan.slots)
        slots, size = plan.slots + layout.start, len(asked)
        present = torch.zeros(size + 1, dtype=torch.bool, device=asked.device)
        present[torch.where(asked, slots, size)] = True
        present = present[:size]
        rows, copies = self._read(present, plan.copied)
        bounds = [0, *itertools.accumulate(rows)]
        wants = self._wants(present, plan.tokens, bounds, plan.ancestors if any(copies) else None)
        by_run = zip(continuations, self._asked, strict=True)
        by_group = [ids for ids, run in by_run for _ in range(run.first, run.last)]
        return Scores(wants, by_group), (present.cumsum(0) - 1)[slots].clamp(min=0)

    def _fetch(
        self, ended: Tensor, unfinished: Tensor, complete: list[bool], prefix: list[bool]
    ) -> Generator[Answers, None, None]:
        """Waits until potentials can answer about the particles that they are about to be asked about."""
        for run, ends, goes_on in zip(self._asked, complete, prefix, strict=True):
            if run.asker is None or not run.asker.fetches or not (ends or goes_on):
                continue
            about = torch.zeros_like(ended[run.part])
            for wanted, which in ((ends, ended), (goes_on, unfinished)):
                about |= which[run.part] & wanted
            try:
                future = run.asker.fetch(self._state(run, 1, scored=True), about)
                if future is not None:
                    yield Answers(future)
                    run.asker.check(future)
            except SMCError as error:
                self._fail(run, error)

    def _score_declared(
        self, ended: Tensor, unfinished: Tensor, complete: list[bool], prefix: list[bool]
    ) -> Generator[Scores, Tensor, None]:
        """Has the continuations scored that potentials declare, those of all groups in one pass."""
        continuations: list[list[int]] = []
        asked = torch.zeros_like(ended)
        for run, ends, goes_on in zip(self._asked, complete, prefix, strict=True):
            ids = None if run.asker is None else run.asker.potential.continuation
            if ids is not None and ends:
                asked[run.part] |= ended[run.part]
            if ids is not None and goes_on and run.asker is not None and run.asker.potential.continuation_in_prefix:
                asked[run.part] |= unfinished[run.part]
            elif not ends:
                ids = None
            continuations.append(ids or [])
        if not any(continuations):
            return
        scores, row_of = self._want_scores(asked, continuations)
        values = (yield scores)[row_of]
        for run, ids in zip(self._asked, continuations, strict=True):
            if ids and run.asker is not None:
                run.asker.known = ids, values[run.part]

    def _continuation(self, run: Together, asked: Tensor, token_ids: list[int], given: int) -> Tensor:
        """Scores a continuation of a run's particles in `asked` (M,) bool: (N,) float64, 0 for the others."""
        asker, part = run.asker, run.part
        assert asker is not None and asker.engine is not None  # the potential asks through it
        token_ids = token_list("token_ids", token_ids, asker.engine.vocab_size or None)
        if not 0 < len(token_ids) <= asker.potential.lookahead:
            raise ValueError(
                f"token_ids of length {len(token_ids)}: must have 1 to lookahead={asker.potential.lookahead} tokens"
            )
        given = check_int("given", given, 0, len(token_ids) - 1)
        if asker.last_step == 0:
            raise ValueError("continuation_log_prob: there is no token yet; return 0 for the empty sequence")
        if given == 0 and asker.known is not None and asker.known[0] == token_ids:
            return torch.where(asked[part], asker.known[1], 0.0)
        if self.scorer is None:
            raise NotImplementedError("this engine cannot score continuations")
        about = torch.zeros_like(asked)
        about[part] = asked[part]
        scores, row_of = self._want_scores(about, [token_ids if other is run else [] for other in self._asked])
        if not scores.wants.bounds[-1]:
            return torch.zeros_like(self.particles.log_w[part])
        return torch.where(about, self.scorer(scores._replace(given=given))[row_of], 0.0)[part]

    # ---------------------------------------------------------------------------------------------------- what failed
    def _own(self, group: Group) -> bool:
        return group.cohort is self and group.error is None

    def _fail(self, run: Together, error: SMCError) -> None:
        """Ends all groups of a run."""
        for g in range(run.first, run.last):
            self._end(g, error)

    def _fail_bad(self, bad: list[int]) -> None:
        """Ends the groups that have particles with a fault, of which `bad` (G,) are the counts."""
        if any(bad):
            for run in self._asked:
                for g in range(run.first, run.last):
                    if bad[g]:
                        self._end(g, self._fault_error(run, g))

    def _end(self, g: int, error: SMCError) -> None:
        if self._own(self.groups[g]):
            self.groups[g].error, self.groups[g].done = error, True
            self.step.stop(slice(g, g + 1))

    def _bad(self) -> Tensor:
        """Marks the particles that have a fault in this step, (M,) bool."""
        marks = [fault.bad for fault in self.step.faults]
        return torch.stack(marks).any(0) if marks else torch.zeros_like(self.particles.finished)

    def _fault_error(self, run: Together, g: int) -> SMCError:
        """Makes the error of the first fault of group g of a run; waits for the device."""
        group, part = self.groups[g], self.layout.part(g)
        if run.asker is not None and group.asker is not None:
            group.asker.last_sizes = run.asker.last_sizes
        kind, bad, values, later = next(fault for fault in self.step.faults if bool(fault.bad[part].any()))
        i, at = int(bad[part].int().argmax()), group.t + later
        value = math.nan if values is None else values[part][i].item()
        if kind == faults.MODEL:
            value -= self._bounds[g]
        return group.fault_error(kind, i, at, value, self._vocab)


def finish(flow: Flow, score: Callable[[Scores], Tensor] | None = None) -> None:
    """Runs a `Cohort.take` to its end, with `score` for the continuations that it wants scored; waits for potentials.

    Raises:
        NotImplementedError: it wants some, and there is no `score`.
    """
    try:
        wanted = next(flow)
        while True:
            if isinstance(wanted, Answers):
                concurrent.futures.wait([wanted.future])
                wanted = next(flow)
                continue
            if score is None:
                raise NotImplementedError("this driver cannot score continuations")
            wanted = flow.send(score(wanted))
    except StopIteration:
        pass
