"""The step of sequential Monte Carlo, once: tensors of fixed shape, masks and device scalars, no value on the host.

    twisted     weigh → resample → draw → ended particles are weighed by φ
    base        draw → weigh → resample
    islands     each resamples by itself, and then they among themselves, wherever the others resample
    rejection   the same, with draws and weights of `rejection`
    segments    draw until all wait at a boundary → weigh → resample

The order is that of docs/mathematics.md §1: with the twisted proposal the weight of a step does not depend on the
token, so a group resamples before it draws; with the base proposal, and with a proposal-only potential, it draws,
weighs and then resamples. Either way children of one parent draw from the parent's row of logits, with stratified
uniforms. A driver (`cohort`, `captured`) asks the potentials between `draw` and `close`, and says what the host knows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.params import SMCParams
from fastsmc.potentials.answers import NextRows
from fastsmc.smc.evidence import Factual
from fastsmc.smc.faults import MASK_INDEX, MODEL, NEXT, NEXT_ROW, NO_WEIGHT, PSI_INDEX, RULED_OUT, Fault
from fastsmc.smc.particles import Layout, Particles

# Philox streams: one per purpose, so that no random number serves twice.
DRAW, RESAMPLE, CHOOSE, RETAIN, REDRAW, MOVE, MIGRATE = 0, 1, 2, 3, 4, 5, 6
ASK_MORE, WALK = 14, 16  # of the rejection proposal; WALK and what comes after it, two per candidate


@dataclasses.dataclass(frozen=True)
class Kind:
    """Says what groups must have in common to be one cohort.

    Attributes:
        twisted: draws from p0·ψ and resamples before.
        guided: draws from p0·ψ of a proposal-only potential, and weighs afterwards; if it `rejects`, of any potential.
        retains: holds exact samples.
        scheme: of resampling.
        noise: of counterfactual groups, `Evidence.noise`; None: of others.
        powered: raises p0 to a power, `SMCParams.powers`.
        rejects: asks for candidate tokens, and weighs afterwards; then it is not twisted.
        segmented: particles wait for each other at the ends of segments.
        islands: parts of a group that are resampled by themselves, and migrate; 1: there are none.
    """

    twisted: bool
    guided: bool
    retains: bool
    scheme: str
    noise: str | None = None
    powered: bool = False
    rejects: bool = False
    segmented: bool = False
    islands: int = 1


def find_tau(tau: Tensor, share: Tensor, time: Tensor) -> Tensor:
    """Finds the temperatures of resamplings by τ, 0 for 'entropic', ESS / N and t / max_tokens, all of one shape."""
    entropic = torch.where((share < 0.5) & (time < 0.5), ((1 - time) / share).clamp(min=1.0), 1.0)
    return torch.where(tau == 0.0, entropic, tau)


_NOTHING = torch.empty(0)


def _listed(ids: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Makes a row per list of token ids, (G, K) int64, padded by what is no token."""
    width = max([1, *map(len, ids)])
    return torch.tensor([[*row, *[-2] * (width - len(row))] for row in ids], dtype=torch.int64, device=device)


class Record(Protocol):
    def put(self, name: str, values: Tensor) -> None:
        """Keeps values (M,) or (G,) of this step, in the place of those that were put before."""


class Step:
    """Holds the particles of a cohort, what is one number per group, and takes their steps.

    Args:
        kind: of the groups.
        params: of each.
        stops: the tokens that end a particle, of each.
        weighed: of each, whether it has a potential or a power; else weights stay equal, and it never resamples.
        particles: of all of them.
        record: takes the steps.

    Attributes:
        layout, islands: which particles are of one group, and which are resampled together: `layout` again where groups
            have no islands, else I = G·M islands.
        step: (G,) int64, steps done.
        log_z: (G,) float64, log of the closed resampling intervals.
        going: (G,) bool, groups that are not over.
        faults: of this step, in the order of their coming.
        boundaries, at_boundary: (G,) int64 and bool, of groups with segments: how many they have had, and whether the
            last step came to one.
        temperature: (M,) float64, of each particle's group.
        ess, log_mean, resampled, ancestors: of the last resampling, or of what would have been one: (G,), the log of
            the mean weight before it (G,), (G,), (M,).
    """

    def __init__(
        self,
        kind: Kind,
        params: Sequence[SMCParams],
        stops: Sequence[Sequence[int]],
        weighed: Sequence[bool],
        particles: Particles,
        record: Record,
    ) -> None:
        self.kind, self.particles, self.record = kind, particles, record
        self.device = device = particles.log_w.device
        self.layout = Layout([p.n_particles for p in params], device)
        self.islands = self.layout
        if kind.islands > 1:
            self.islands = Layout([p.n_particles // p.islands for p in params for _ in range(p.islands)], device)
        of = self.layout.group_of
        numbers = torch.tensor([[p.seed, p.group, p.max_tokens] for p in params], device=device).T.contiguous()
        self._seed, self._key, self._max_tokens = numbers[0], numbers[1], numbers[2][of]
        shares = [[p.temperature, p.ess_threshold if w else 0.0] for p, w in zip(params, weighed, strict=True)]
        temperature, self._threshold = torch.tensor(shares, dtype=torch.float64, device=device).T.contiguous()
        taus = [0.0 if isinstance(tau := p.resampling_temperature, str) else tau for p in params]  # 0: 'entropic'
        self._tau = torch.tensor(taus, dtype=torch.float64, device=device) if any(tau != 1 for tau in taus) else None
        every = [p.resample_every for p in params]
        self._every = torch.tensor(every, device=device) if max(every) > 1 else None
        self._migrate_every, self._migrate_below = _NOTHING, _NOTHING
        if kind.islands > 1:
            self._migrate_every = torch.tensor([p.migrate_every or 0 for p in params], device=device)
            halfway = (kind.islands + 1) / (2 * kind.islands)  # the ESS of two is never below a half of two
            self._migrate_below = torch.tensor([halfway * w for w in weighed], dtype=torch.float64, device=device)
        self.temperature = temperature[of]
        self._powers: Tensor | None = None  # (G, K), those of the first K steps; the last holds from then on
        if kind.powered:
            longest = max(len(p.powers) for p in params)
            powers = [[*p.powers, *[p.power] * (longest - len(p.powers))] for p in params]
            self._powers = torch.tensor(powers, dtype=torch.float64, device=device)
        self._stop = _listed(stops, device)[of]
        self._ends_segment, self._longest_segment = _NOTHING, _NOTHING
        if kind.segmented:
            self._ends_segment = _listed([p.segment_token_ids or () for p in params], device)[of]
            most = [p.max_segment_tokens or p.max_tokens + 1 for p in params]
            self._longest_segment = torch.tensor(most, device=device)[of]
        self._stops = [stop if p.force_stop else () for p, stop in zip(params, stops, strict=True)]
        self._forces = torch.tensor([p.force_stop for p in params], device=device)[of]
        self._stop_bits: Tensor | None = None  # as a mask of `ops.weigh`, a row per group, once V is known
        groups = len(params)
        self.step = torch.zeros(groups, dtype=torch.int64, device=device)
        self.log_z = torch.zeros(groups, dtype=torch.float64, device=device)
        self.going = torch.ones(groups, dtype=torch.bool, device=device)
        self.boundaries = torch.zeros_like(self.step)
        self.at_boundary = torch.zeros_like(self.going)
        self.faults: list[Fault] = []
        self.ess = torch.zeros_like(self.log_z)
        self.log_mean = torch.zeros_like(self.log_z)
        self.resampled = torch.zeros_like(self.going)
        self.ancestors = self.layout.all
        self.of = self.layout.of
        self._active: Tensor | None = None  # as long as nothing of it has changed

    @property
    def active(self) -> Tensor:
        """Marks the particles that draw, (M,) bool."""
        if self._active is None:
            self._active = ~self.particles.idle & self.of(self.going)
        return self._active

    @property
    def kept(self) -> Tensor:
        """Marks the particles whose histories somebody may still ask for, (M,) bool."""
        if not self.kind.segmented:
            return self.active
        return (self.particles.paused | ~self.particles.finished) & self.of(self.going)

    def stop(self, groups: slice) -> None:
        """Lets groups go no further."""
        self.going[groups] = False
        self._active = None

    # ------------------------------------------------------------------------------------------------------ the draw
    def draw(
        self,
        logits: Tensor,
        twist: NextRows | None,
        by_next: NextRows | None,
        first: Tensor | None,
        forced: Tensor | None,
        factual: Factual | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighs and draws; with the twisted proposal it resamples in between.

        Args:
            logits: (L, V), in which `particles.rows` are the rows.
            twist: a row per particle, of the proposal; None with the base proposal.
            by_next: a row per particle, what the drawn token changes log ψ by; None: `prefix` says it.
            first: (G,) bool, groups at their first step; None: none is.
            forced: (M,) int64, what a particle that retains an exact sample draws, −1 after its end; None: nobody does.
            factual: what counterfactual groups are compared with.

        Returns:
            (M,) bool, the particles that end with their token; (M,) float64, what log ψ changes by beside that.
        """
        particles, active = self.particles, self.active
        shaped = self.shape(twist, logits.shape[1])
        inputs: dict[str, Any] = {} if shaped is None else shaped.rounded()._asdict()
        rows = torch.where(active, particles.rows, -1)
        model, by_law = logits, shaped is not None or forced is not None or self.kind.noise == "gumbel"
        temperature = self.temperature
        if factual is not None and by_law:  # which holds it
            logits, temperature = self._law(model, factual), torch.ones_like(temperature)
        inputs |= {"logit_rows": rows, "temperature": temperature}
        power: Tensor | float = 1.0
        if self.kind.powered:
            power = inputs["power"] = self.rise()
        weighed = ops.weigh(logits, **inputs)
        self.check(weighed.lse.isnan(), MODEL, rows)
        if twist is not None:
            self.check(weighed.lse_psi.isnan(), NEXT_ROW)
        parents, gain = self.layout.all, torch.zeros_like(particles.log_w)
        if shaped is not None or self.kind.powered:
            gain = torch.where(active, weighed.lse_psi - power * weighed.lse, 0.0)
            gain = gain.nan_to_num(nan=-math.inf, neginf=-math.inf)
        if self.kind.twisted:
            particles.log_w += gain
            self._check_retained()
            parents = self._resample_before(weighed, first)
            active = self.active & (self.of(self.ess) > 0)  # without any weight nothing is drawn
        elif first is not None and not self.kind.retains:
            self.take_for_siblings(first, particles.log_w == particles.log_w[self.layout.start])
        # what is given is a text, which numbers of DRAW may have drawn: its counterfactuals have their own
        u = ops.stratify(self.uniforms(DRAW if factual is None else REDRAW), particles.rank, particles.count)
        if self.kind.noise == "gumbel" and factual is not None:
            drawn = self._by_noise(model, logits, factual, rows)
        elif factual is not None and not by_law:
            drawn = self._redraw(model, factual, rows, u)
        else:
            drawn = ops.draw(logits, weighed, parents, u, **inputs)
        if forced is not None:
            drawn = self._force(drawn, forced, active, logits, temperature, weighed, parents, shaped)
        kernel = None if factual is None else drawn.log_prob
        if factual is not None:
            drawn = self._under_model(drawn, model, None if by_law else weighed)
        psi = torch.zeros_like(gain)
        if twist is not None:
            psi = drawn.log_psi.nan_to_num(nan=-math.inf, neginf=-math.inf)
        if self.kind.guided:  # p0 / q of what was drawn
            gain = gain - psi
        if not self.kind.twisted:
            particles.log_w += torch.where(active, torch.where(drawn.tokens < 0, -math.inf, gain), 0.0)
        change = torch.zeros_like(particles.log_w)
        if self.kind.twisted:
            particles.log_psi += torch.where(active, psi, 0.0)
        elif by_next is not None:
            values = by_next.of_tokens(self.layout.all, drawn.tokens.clamp(min=0))
            change = self.checked(values, active & (drawn.tokens >= 0), NEXT)
        return self.append(drawn, active, kernel), change

    # ------------------------------------------------------------------------------------------------- counterfactuals
    def _redraw(self, logits: Tensor, factual: Factual, rows: Tensor, u: Tensor) -> ops.Drawn:
        """Draws with the noise that gave the text (`ops.redraw`): log-probs are the law's."""
        group_of = self.layout.group_of
        again = ops.redraw(
            logits, factual.logits, factual.tokens, torch.stack([u, self.uniforms(MOVE)], 1), logit_rows=rows,
            factual_rows=group_of, temperature=self.temperature, factual_temperature=factual.temperature[group_of],
        )  # fmt: skip
        return ops.Drawn(again.tokens, again.log_kernel, torch.zeros_like(again.log_kernel))

    def _by_noise(self, logits: Tensor, law: Tensor, factual: Factual, rows: Tensor) -> ops.Drawn:
        """Draws by the noise itself (`ops.gumbel`), that of each particle's number: log-probs are the law's."""
        of = self.layout.group_of
        tokens = ops.gumbel(
            logits, factual.logits, factual.tokens, seed=self._seed[of], group=self._key[of], step=self.step[of],
            particles=self.layout.local, logit_rows=rows, factual_rows=of, temperature=self.temperature,
            factual_temperature=factual.temperature[of],
        )  # fmt: skip
        log_prob = law[rows.clamp(min=0), tokens.clamp(min=0)].double()
        return ops.Drawn(tokens, log_prob, torch.zeros_like(log_prob))

    def _law(self, logits: Tensor, factual: Factual) -> Tensor:
        """Makes of the model's rows (R, V) the law of counterfactual tokens, to be drawn from at temperature 1."""
        of, places = factual.group_of, torch.arange(len(factual.logits), device=self.device)
        temperature = self.temperature[self.layout.offsets[:-1]][of]
        law = ops.redraw_logits(
            logits, factual.logits, factual.tokens, factual_rows=places[of], temperature=temperature,
            factual_temperature=factual.temperature[of],
        )  # fmt: skip
        none = ops.weigh(logits, temperature=temperature).lse == -math.inf  # which have no law
        return law.masked_fill_(none[:, None], -math.inf)

    def _under_model(self, drawn: ops.Drawn, model: Tensor, weighed: ops.Weighed | None) -> ops.Drawn:
        """Puts the model's log-probs in the place of those of the law; `weighed` are its rows, if they are known."""
        rows = self.particles.rows.clamp(min=0)
        if weighed is None:
            weighed = ops.weigh(model, logit_rows=rows, temperature=self.temperature)
        z = model[rows, drawn.tokens.clamp(min=0)].double() / self.temperature
        return ops.Drawn(drawn.tokens, z - weighed.lse, drawn.log_psi)

    def shape(self, twist: NextRows | None, vocab: int) -> NextRows | None:
        """Restricts the last draw of groups that are forced to stop to their stop tokens, whatever `twist` says."""
        if not any(self._stops):
            return twist
        if self._stop_bits is None:
            allowed = torch.zeros((len(self._stops), -(-vocab // 32) * 32), dtype=torch.bool)
            for row, stop in zip(allowed, self._stops, strict=True):
                row[list(stop)] = True
            words = allowed.reshape(len(allowed), -1, 32).long() << torch.arange(32)
            self._stop_bits = words.sum(2).to(torch.int32).to(self.device)  # the 32nd bit wraps to the sign
        bits, everyone = self._stop_bits, self.layout.all
        last = self._forces & (self.particles.lengths + 1 >= self._max_tokens)
        rows = torch.where(last, self.layout.group_of, -1)
        if twist is None or twist.mask is None:
            twist = NextRows(None, None, None, None) if twist is None else twist
            return twist._replace(mask=bits, mask_rows=rows)
        theirs = everyone if twist.mask_rows is None else twist.mask_rows
        both = torch.where((theirs >= 0)[:, None], twist.mask[theirs.clamp(min=0)], -1)
        both &= torch.where(last[:, None], bits[self.layout.group_of], -1)
        return twist._replace(mask=both, mask_rows=everyone)

    def _resample_before(self, weighed: ops.Weighed, first: Tensor | None) -> Tensor:
        """Resamples by the weights of this step, but at the first, and returns the parents (M,)."""
        particles = self.particles
        self._before = particles.log_w + self.of(self.log_z)
        may = self.going if first is None else self.going & ~first
        if self.kind.segmented:
            may = may & self.at_boundary
        parents = self.resample(may)
        if first is not None and not self.kind.retains:
            same = particles.log_w == particles.log_w[self.layout.start]
            same &= (weighed.tile_mass == weighed.tile_mass[self.layout.start]).all(1)
            self.take_for_siblings(first, same)
        return parents

    def take_for_siblings(self, first: Tensor, same: Tensor) -> None:
        """Takes the particles of groups at their first step, one empty sequence, for siblings if all are `same`."""
        layout, particles = self.layout, self.particles
        siblings = self.of(first & layout.every(same))
        size, rank = layout.offsets[1:] - layout.offsets[:-1], layout.local
        if (m := self.kind.islands) > 1:  # in turn, so that each island has strata from all over the row
            rank = self.islands.local * m + self.islands.group_of % m
        particles.rank.copy_(torch.where(siblings, rank, particles.rank))
        particles.count.copy_(torch.where(siblings, self.of(size), particles.count))

    def _force(
        self, drawn: ops.Drawn, forced: Tensor, active: Tensor, logits: Tensor, temperature: Tensor,
        weighed: ops.Weighed, parents: Tensor, twist: NextRows | None,
    ) -> ops.Drawn:  # fmt: skip
        """Puts the tokens of exact samples (M,) in the place of what the particles that retain them drew."""
        at, token = active & self.particles.retained & (forced >= 0), forced.clamp(0, logits.shape[1] - 1)
        z = logits[self.particles.rows.clamp(min=0), token].double() / temperature
        log_prob = torch.where(at, z - weighed.lse[parents], drawn.log_prob)
        psi = drawn.log_psi
        if twist is not None:
            psi = torch.where(at, twist.rounded().of_tokens(parents, token), psi)
        else:
            psi = torch.where(at, 0.0, psi)
        self.check(at & ((log_prob + psi == -math.inf) | (forced >= logits.shape[1])), RULED_OUT, forced)
        return ops.Drawn(torch.where(at, forced, drawn.tokens), log_prob, psi)

    def append(self, drawn: ops.Drawn, active: Tensor, kernel: Tensor | None = None) -> Tensor:
        """Records a draw of the particles in `active` (M,) bool. Returns (M,) bool, those that end with it.

        `kernel` (M,) are log-probs given a text, of counterfactual groups.

        A particle whose every next token has weight zero draws none. It has weight zero too, so it ends unasked.
        """
        particles = self.particles
        drew = active & (drawn.tokens >= 0)
        tokens = torch.where(drew, drawn.tokens, -1)
        self.record.put("tokens", tokens)
        self.record.put("token_log_probs", torch.where(drew, drawn.log_prob, 0.0))
        if kernel is not None:
            self.record.put("token_log_kernels", torch.where(drew, kernel, 0.0))
        particles.last_tokens.copy_(torch.where(particles.paused, particles.last_tokens, tokens))
        particles.log_prob += torch.where(drew, drawn.log_prob, 0.0)
        particles.lengths += drew
        by_token = drew & (tokens[:, None] == self._stop).any(1)
        particles.stopped |= by_token
        ended = by_token | (drew & (particles.lengths >= self._max_tokens))
        particles.finished |= ended | (active ^ drew)
        self._raise_to_last(ended)
        self._active = None
        return ended

    def end(self, stopped: Tensor) -> None:
        """Ends particles (M,) bool after the token that they have just drawn."""
        self._raise_to_last(stopped & ~self.particles.finished)
        self.particles.stopped |= stopped
        self.particles.finished |= stopped
        self._active = None

    # -------------------------------------------------------------------------------------------------- the segments
    def end_segments(self, by_text: Tensor) -> Tensor:
        """Ends the segments of particles by the token that they have just drawn; returns which, (M,) bool.

        Args:
            by_text: (M,) bool, those whose text has come to hold a delimiter.
        """
        particles = self.particles
        particles.within += self.active
        by_token = (particles.last_tokens[:, None] == self._ends_segment).any(1)
        done = self.active & (by_text | by_token | (particles.within >= self._longest_segment))
        particles.segments += done
        particles.within.masked_fill_(done, 0)
        return done

    def pause(self, segment_ended: Tensor, ended: Tensor) -> tuple[Tensor, Tensor]:
        """Lets particles wait whose segment has ended, or who have ended themselves, both (M,) bool.

        Returns:
            of groups that are thereby at a boundary the particles that wait: (M,) bool, those that have ended, and the
            others.
        """
        particles = self.particles
        particles.segments += ended & ~segment_ended
        particles.paused |= segment_ended | ended
        self._active = None
        self.at_boundary = self.going & (self.layout.counts(self.active) == 0)
        waiting = particles.paused & self.of(self.at_boundary)
        return waiting & particles.finished, waiting & ~particles.finished

    # ---------------------------------------------------------------------------------------------------- the power
    def _power(self, later: int = 0) -> Tensor:
        """Gives the power of p0 that each group's target has at the step that is `later` than this, (G,) float64."""
        assert self._powers is not None  # nobody else asks
        at = (self.step + later).clamp(0, self._powers.shape[1] - 1)
        return self._powers.gather(1, at[:, None]).squeeze(1)

    def rise(self) -> Tensor:
        """Raises p0 of the particles that go on to this step's power, and returns it, (M,) float64."""
        power, before = self._power()[self.layout.group_of], self._power(-1)[self.layout.group_of]
        goes_on = ~self.particles.finished & self.of(self.going)
        self.particles.log_w += torch.where(goes_on, (power - before) * self.particles.log_prob, 0.0)
        return power

    def _raise_to_last(self, ended: Tensor) -> None:
        """Raises p0 of particles (M,) bool that have ended at this step to the last power, before φ is asked."""
        if self._powers is not None and self._powers.shape[1] > 1:
            rise = self.of(self._powers[:, -1] - self._power())
            self.particles.log_w += torch.where(ended, rise * self.particles.log_prob, 0.0)

    # --------------------------------------------------------------------------------------------------- the weights
    def close(self, new_psi: Tensor | None) -> None:
        """Ends the step: weights by what the potentials have said, and with the base proposal the resampling.

        Args:
            new_psi: (M,) log ψ of every particle from now on; None: nothing has changed.
        """
        particles, layout = self.particles, self.layout
        if new_psi is not None:  # from the ψ that a weight holds; a weight of zero stays zero
            alive = particles.log_psi > -math.inf
            particles.log_w += torch.where(alive, new_psi - particles.log_psi, 0.0)
            particles.log_psi.copy_(torch.where(alive, new_psi, particles.log_psi))
        self._check_retained()
        all_ended = layout.every(particles.finished)
        if self.kind.twisted:
            none_left = layout.counts(particles.log_w > -math.inf) == 0
            self.ess = torch.where(none_left, 0.0, self.ess)
            self.record.put("step_log_w", torch.where(self.of(none_left), particles.log_w, self._before))
        else:
            self.record.put("step_log_w", particles.log_w + self.of(self.log_z))
            may = self.going & ~all_ended
            self.resample(may & self.at_boundary if self.kind.segmented else may)
        if self.kind.segmented:
            self.record.put("boundary", self.at_boundary)
            self.boundaries += self.at_boundary
            particles.paused &= ~self.of(self.at_boundary)
        self.record.put("ess", self.ess)
        self.step += 1
        self.going &= (self.ess > 0) & ~all_ended
        self._active = None

    def resample(self, may: Tensor) -> Tensor:
        """Resamples the groups in `may` (G,) bool whose ESS is low, all that particles have; returns ancestors (M,)."""
        particles = self.particles
        # Resampling may come after a step's weights (base) or before its draw (twisted): the same counter either way
        # is used once, because a group has one order.
        u, drawn = self.uniforms(RESAMPLE), self.step if self.kind.twisted else self.step + 1
        passed = self.boundaries + (drawn - self.step) if self.kind.segmented else drawn
        threshold = torch.where(may, self._threshold, 0.0)
        if self._every is not None:
            threshold = torch.where(passed % self._every == 0, threshold, 0.0)
        threshold = self._per_island(threshold)
        if self._tau is None:
            done, log_r, kept = self._by_weight(particles.log_w, u, threshold), particles.log_w, None
        else:
            done, log_r, kept = self._tempered(self._tau, u, threshold, drawn)
        ancestors, rank, count = done.ancestors, done.rank, done.counts[done.ancestors]
        if self.kind.retains:
            ancestors, rank, count = self._conditional(log_r, u, done.resampled), rank.zero_(), count.fill_(1)
        after = 0.0 if kept is None else kept[ancestors]
        after = torch.where(self.islands.of(done.resampled), after, particles.log_w)
        if self.kind.islands > 1:
            due = may & (passed % self._migrate_every == 0)
            done, rank, count, after = self._migrate(done, count, after, due)
            ancestors = done.ancestors
        self.ess, self.log_mean, self.resampled, self.ancestors = done.ess, done.log_mean, done.resampled, ancestors
        self.record.put("ancestors", ancestors)
        self.record.put("resampled", done.resampled)
        self.log_z += torch.where(done.resampled, done.log_mean, 0.0)
        particles.log_w.copy_(after)
        particles.rank.copy_(rank)
        particles.count.copy_(count)
        particles.follow(ancestors)
        self._active = None
        return ancestors

    def _by_weight(self, log_w: Tensor, u: Tensor, threshold: Tensor) -> ops.Resampled:
        return ops.resample(
            log_w, u, scheme=self.kind.scheme, threshold=threshold, offsets=self.islands.offsets,
            largest=max(self.islands.sizes),
        )  # fmt: skip

    def _per_island(self, values: Tensor) -> Tensor:
        """Spreads one value per group (G,) over its islands: (I,)."""
        return values if self.kind.islands == 1 else values.repeat_interleave(self.kind.islands)

    def _migrate(
        self, within: ops.Resampled, count: Tensor, after: Tensor, due: Tensor
    ) -> tuple[ops.Resampled, Tensor, Tensor, Tensor]:
        """Resamples the islands of groups by their mean weights W, whose particles then have the mean of these.

        An island is copied whole, as it is after its own resampling. One without any weight is never an ancestor.

        Args:
            within: what the resampling of each island gave, (M,) or (I,).
            count: (M,) siblings of each particle after it.
            after: (M,) float64, log weights after it, of an island that was resampled over its W.
            due: (G,) bool, whose islands may be resampled.

        Returns:
            the same of whole groups, (M,) or (G,); rank and count (M,) among the children of one particle on all
            islands; (M,) log weights, over the mean weight of a group where anything in it was resampled.
        """
        islands, m, groups = self.islands, self.kind.islands, len(self.layout.sizes)
        bounds = torch.arange(0, groups * m + 1, m, device=self.device)
        u = ops.uniforms(
            groups * m, seed=self._seed, group=self._key, step=self.step, stream=MIGRATE, offsets=bounds,
            device=self.device,
        )  # fmt: skip
        mass = within.log_mean
        moved = ops.resample(
            mass, u, scheme=self.kind.scheme, threshold=torch.where(due, self._migrate_below, 0.0), offsets=bounds,
            largest=m,
        )  # fmt: skip
        resampled = moved.resampled | within.resampled.view(groups, m).any(1)
        share = mass.view(groups, m).softmax(1)  # Σ w² of an island is W² N / ESS
        of_all = torch.where(within.ess > 0, share.flatten().square() / within.ess, 0.0).view(groups, m).sum(1)
        ess = torch.where(of_all > 0, 1 / of_all, 0.0)

        log_w = after + islands.of(torch.where(within.resampled, mass, 0.0))  # on one scale again
        over = torch.where(resampled, moved.log_mean, 0.0)
        over = torch.where(self._per_island(moved.resampled), mass[moved.ancestors], self._per_island(over))
        source = islands.of(islands.offsets[moved.ancestors]) + islands.local
        copies = islands.of(moved.counts[moved.ancestors])
        self.record.put("island_resampled", (self._per_island(moved.resampled) | within.resampled).view(groups, m))
        done = ops.Resampled(within.ancestors[source], count, within.rank, ess, moved.log_mean, resampled)
        rank = within.rank[source] * copies + islands.of(moved.rank)  # in turn, as at the first step
        return done, rank, count[source] * copies, log_w[source] - islands.of(over)

    def _tempered(
        self, tau: Tensor, u: Tensor, threshold: Tensor, drawn: Tensor
    ) -> tuple[ops.Resampled, Tensor, Tensor]:
        """Resamples by r ∝ W^{1/τ} the groups whose true ESS is low (docs/mathematics.md §3). τ is 0 for 'entropic'.

        Returns:
            what `ops.resample` gives, with ESS and mean of the true weights; log r up to a constant per group, (M,);
            log of W / r, which a particle's children keep, (M,), −∞ without a weight.
        """
        islands, log_w = self.islands, self.particles.log_w
        true = self._by_weight(log_w, u, threshold)
        size = islands.offsets[1:] - islands.offsets[:-1]
        time = self._per_island(drawn) / self._max_tokens[islands.offsets[:-1]]
        log_r = log_w / islands.of(find_tau(self._per_island(tau), true.ess.clamp(min=1.0) / size, time))
        done = self._by_weight(log_r, u, true.resampled.double())
        kept = log_w - log_r - islands.of(true.log_mean - done.log_mean)
        kept = torch.where(log_w > -math.inf, kept, -math.inf)
        return done._replace(ess=true.ess, log_mean=true.log_mean), log_r, kept

    def log_z_so_far(self) -> Tensor:
        """Computes the log of the mean weight, that of closed intervals included, as the last weights were: (G,)."""
        so_far = self.log_z + torch.where(self.resampled, 0.0, self.log_mean)  # else log_z has it already
        return torch.where(self.ess > 0, so_far, -math.inf)

    # ------------------------------------------------------------------------------------------------- exact samples
    def _conditional(self, log_r: Tensor, u: Tensor, resampled: Tensor) -> Tensor:
        """Draws ancestors (M,) by r, independently, but that a retained particle goes to a uniform place."""
        layout, particles = self.layout, self.particles
        place = self._uniform_places(1)
        ancestors = layout.all.clone()
        for g in range(len(layout.sizes)):
            part, start = layout.part(g), layout.bounds[g]
            # in integers, because a GPU adds float64 numbers in no fixed order. What is cut off is less than 2**-50 of
            # the weights; a total of about 2**50 times u < 1 rounds to less than the total
            cumulative = (torch.softmax(log_r[part], 0) * 2.0**50).long().cumsum(0)
            drawn = torch.searchsorted(cumulative, (u[part] * cumulative[-1]).long(), right=True) + start
            kept = particles.retained[part].byte().argmax() + start
            drawn = torch.where(layout.local[part] == place[g], kept, drawn)
            ancestors[part] = torch.where(resampled[g], drawn, ancestors[part])
        retained = layout.local == self.of(place)
        particles.retained.copy_(torch.where(self.of(resampled), retained, particles.retained))
        return ancestors

    def _uniform_places(self, later: int) -> Tensor:
        """Draws a uniform place (G,) int64 in each group, by the key of the step that is `later` than this."""
        layout = self.layout
        sizes, ones = layout.offsets[1:] - layout.offsets[:-1], torch.arange(len(layout.sizes) + 1, device=self.device)
        u = ops.uniforms(
            len(layout.sizes), seed=self._seed, group=self._key, step=self.step + later, stream=RETAIN, offsets=ones,
            device=self.device,
        )  # fmt: skip
        return (u * sizes).long()

    def retain_one(self) -> None:
        """Gives the exact sample of a group its place, before the first step."""
        self.particles.retained.copy_(self.layout.local == self.of(self._uniform_places(0)))

    def _check_retained(self) -> None:
        if self.kind.retains:
            self.check(self.particles.retained & (self.particles.log_w == -math.inf), NO_WEIGHT)

    # ----------------------------------------------------------------------------------------------- what is shared
    def clamp(self, answers: list[NextRows | None], parts: Sequence[slice]) -> None:
        """Clamps indices of rows to their matrices; what was out of range for one that draws is a fault.

        Args:
            answers: of the potentials, each about the particles of one of `parts`, which are all together.
        """
        for rows, matrix, kind in (("psi_rows", "log_psi", PSI_INDEX), ("mask_rows", "mask", MASK_INDEX)):
            if all(getattr(answer, rows, None) is None for answer in answers):
                continue
            bad, values = [], []
            for i, (answer, part) in enumerate(zip(answers, parts, strict=True)):
                index = getattr(answer, rows, None)
                if answer is None or index is None:
                    index = fine = self.layout.all[part]
                else:
                    fine = index.clamp(0, max(len(getattr(answer, matrix)) - 1, 0))
                    answers[i] = answer._replace(**{rows: fine})
                bad.append(fine != index)
                values.append(index)
            self.check(torch.cat(bad) & self.active, kind, torch.cat(values))

    def uniforms(self, stream: int) -> Tensor:
        """Makes (M,) uniforms, keyed by (seed, group, particle, step)."""
        return ops.uniforms(
            len(self.layout.all), seed=self._seed, group=self._key, step=self.step, stream=stream,
            offsets=self.layout.offsets, device=self.device,
        )  # fmt: skip

    def check(self, bad: Tensor, kind: int, values: Tensor | None = None, later: int = 0) -> None:
        """Keeps a fault, of the step that is `later` than this."""
        self.faults.append(Fault(kind, bad, values, later))

    def checked(self, values: Tensor, asked: Tensor, kind: int, later: int = 0) -> Tensor:
        """Returns values (M,) float64, 0 where nobody `asked`, −inf where they are none, which is kept as a fault."""
        values = torch.where(asked, values.double(), 0.0)
        self.check(values.isnan() | (values == math.inf), kind, values, later)
        return values.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)
