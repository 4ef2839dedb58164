"""The rejection proposal: candidate tokens are drawn without replacement until the potentials' conditions allow one.

Each particle walks its row, p ∝ p0^α·ψ: a candidate is drawn, asked about, and masked out if it is not allowed; what is
left is weighed anew, so the mass that remains is a sum and no difference. With B the mass before the first token x that
is allowed, as a share of the row's, and b = 1 − p_x / B the chance that a second draw would be another token,

    w = B                                     with probability 1 − π, π = min(1, 2b): nothing more is asked
    w = B · (1 − (b / π) · (1 − c(y)))        else, with y the candidate after x

which is min(p_x, B/2) where y is not allowed. x comes by p restricted to what is allowed, and E[w | x] is that set's
mass (docs/mathematics.md §8). It is positive, at most 1, and 1 where all is allowed.

A long walk costs many questions for a small weight. So from its `LONG`-th refusal on a particle whose weight can only
be less than the mean m of its group's is kept by chance, with probability v / m, v being the most that its weight can
still be, and then counts m / v times: rejection control (Liu, Chen and Wong 1998), which resampling would do anyway.

The rounds are the host's, since it asks; a round weighs and draws only the rows of particles that still ask.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.potentials.answers import NextRows
from fastsmc.smc.faults import MODEL, NEXT_ROW
from fastsmc.smc.step import ASK_MORE, DRAW, WALK, Step

#: refusals after which a particle's walk goes on by chance only, where its weight can be no more than the mean
LONG = 8


class Walk(NamedTuple):
    """Holds what K particles are asked about in a round.

    Attributes:
        particles: (K,) int64.
        drawn: their candidates.
        mass: (K,) float64, log of the candidates' masses.
        before: (K,) float64, log of the mass that each was drawn from.
        second: (K,) bool, those that have a token already.
        mask: (K, ceil(V / 32)) int32, what of a row is left, the candidate included; None: all that p allows.
    """

    particles: Tensor
    drawn: ops.Drawn
    mass: Tensor
    before: Tensor
    second: Tensor
    mask: Tensor | None

    def select(self, kept: Tensor) -> Walk:
        """Takes the particles in `kept`, (K,) bool or indices."""
        drawn = ops.Drawn(*(values[kept] for values in self.drawn))
        mask = None if self.mask is None else self.mask[kept]
        return Walk(self.particles[kept], drawn, self.mass[kept], self.before[kept], self.second[kept], mask)


def draw(
    step: Step,
    logits: Tensor,
    twist: NextRows | None,
    first: Tensor | None,
    allows: Callable[[Tensor, Tensor], Tensor],
    most: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draws a token for each particle that goes on, weighs it, and appends it. Waits for the device in each round.

    Args:
        logits, twist, first: as of `Step.draw`.
        allows: (K,) particles, (K,) candidate tokens → (K,) bool, whether they are allowed; it may stop groups.
        most: (M,) int64, candidates that a particle is asked about at most.

    Returns:
        (M,) bool, the particles that end with their token; (M,) bool, those that were cut off by `most`.
    """
    rows = Remaining(step, logits, twist)
    if first is not None:
        step.take_for_siblings(first, step.particles.log_w == step.particles.log_w[step.layout.start])
    walk, total = rows.begin()
    weight = torch.full_like(total, -math.inf)
    refused = weight.clone()  # the weight if the second candidate is not allowed
    times = torch.zeros_like(total)  # log of how many times a particle counts that was kept by chance
    most_left = times.masked_fill(step.active, -math.inf)  # log of what the weight can still be
    found = ops.Drawn(torch.full_like(rows.rows, -1), torch.zeros_like(total), torch.zeros_like(total))
    more = step.uniforms(ASK_MORE)
    cut = torch.zeros_like(step.active)
    for n_asked in itertools.count(1):
        if not len(walk.particles):
            break
        ok = allows(walk.particles, walk.drawn.tokens)
        lost = walk.particles[walk.second & ~ok]
        weight[lost] = refused[lost]
        finds, seeks = ~walk.second & ok, ~walk.second & ~ok
        new = walk.select(finds)
        for values, of_new in zip(found, new.drawn, strict=True):
            values[new.particles] = of_new
        in_all = total[walk.particles] - times[walk.particles]
        others = (-torch.expm1(walk.mass - walk.before)).clamp(min=0.0)  # what is left beside the candidate, as a share
        other, asks = others[finds], more[new.particles] < 2 * others[finds]
        weight[new.particles] = new.before - in_all[finds]
        refused[new.particles] = torch.where(other < 0.5, new.before - math.log(2), new.mass) - in_all[finds]
        most_left[walk.particles] = torch.where(seeks, walk.before + others.log() - in_all, weight[walk.particles])
        may = n_asked + 1 < most[walk.particles]  # one is kept for the weight
        cut[walk.particles[seeks & ~may]] = True
        goes_on = seeks & may
        if n_asked >= LONG:
            kept, counts = _control(step, most_left, step.uniforms(WALK + 2 * n_asked + 1))
            goes_on &= kept[walk.particles]
            seeking = walk.particles[goes_on]
            times[seeking] += counts[seeking]
        most_left[walk.particles[seeks & ~goes_on]] = -math.inf
        goes_on[finds.nonzero().squeeze(1)[asks]] = True
        walk = rows.next(walk._replace(second=walk.second | ok).select(goes_on & step.active[walk.particles]), n_asked)
    active = step.active
    gain = torch.where(found.tokens < 0, -math.inf, weight - found.log_psi)  # `prefix` has ψ of what was drawn
    step.particles.log_w += torch.where(active, gain, 0.0)
    return step.append(found, active), cut & active


def _control(step: Step, most_left: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps particles whose weight is below their group's mean with the probability that it is of that, by u (M,).

    Args:
        most_left: (M,) float64, log of what this step's weights are, or can still be.

    Returns:
        (M,) bool, those that are kept; (M,) float64, log of how many times each of them counts.
    """
    values, layout = step.particles.log_w + most_left, step.layout
    of_groups = values.split(layout.sizes)  # cloned: where they lie in memory shall not tell in the last bit
    means = [each.clone().logsumexp(0) - math.log(len(each)) for each in of_groups]
    share = (values - layout.of(torch.stack(means))).nan_to_num(nan=0.0).clamp(max=0.0)
    return u < share.exp(), -share


class Remaining:
    """Weighs and draws the rows of a step, without what has been drawn before.

    Args:
        step, logits, twist: as of `draw`.

    Attributes:
        rows: (M,) int64, each particle's row of the logits, −1 for those that do not draw.
    """

    def __init__(self, step: Step, logits: Tensor, twist: NextRows | None) -> None:
        self._step, self._logits, self._twisted = step, logits, twist is not None
        shaped = step.shape(twist, logits.shape[1])
        self._shaped = None if shaped is None else shaped.rounded()
        self._power = step.rise() if step.kind.powered else None
        self.rows = torch.where(step.active, step.particles.rows, -1)

    def begin(self) -> tuple[Walk, Tensor]:
        """Draws everybody's first candidate, siblings' by strata: the walk, and (M,) log of the mass of p0's rows."""
        step, everyone = self._step, self._step.layout.all
        u = ops.stratify(step.uniforms(DRAW), step.particles.rank, step.particles.count)
        weighed, drawn, mass, total = self._draw(everyone, self._shaped, u)
        step.check(weighed.lse.isnan(), MODEL, self.rows)
        if self._twisted:
            step.check(weighed.lse_psi.isnan(), NEXT_ROW)
        walk = Walk(everyone, drawn, mass, weighed.lse_psi, torch.zeros_like(step.active), None)
        return walk.select(drawn.tokens >= 0), total

    def next(self, walk: Walk, n_drawn: int) -> Walk:
        """Masks a walk's candidates out and draws the next; particles that have nothing left to draw are left out."""
        if not len(walk.particles):
            return walk
        mask = self._all_left(walk.particles) if walk.mask is None else walk.mask
        word = (walk.drawn.tokens >> 5)[:, None]
        bit = (torch.ones_like(word) << (walk.drawn.tokens & 31)[:, None]).to(torch.int32)  # the 32nd wraps to the sign
        mask = mask.scatter(1, word, mask.gather(1, word) & ~bit)
        shaped = NextRows(None, None, None, None) if self._shaped is None else self._shaped.select(walk.particles)
        u = self._step.uniforms(WALK + 2 * n_drawn)[walk.particles]
        weighed, drawn, mass, _ = self._draw(walk.particles, shaped._replace(mask=mask, mask_rows=None), u)
        return walk._replace(drawn=drawn, mass=mass, before=weighed.lse_psi, mask=mask).select(drawn.tokens >= 0)

    def _all_left(self, particles: Tensor) -> Tensor:
        """Makes masks of all that p allows to particles (K,)."""
        words, shaped = -(-self._logits.shape[1] // 32), self._shaped
        if shaped is None or shaped.mask is None:
            return torch.full((len(particles), words), -1, dtype=torch.int32, device=particles.device)
        index = particles if shaped.mask_rows is None else shaped.mask_rows[particles]
        return torch.where((index >= 0)[:, None], shaped.mask[index.clamp(min=0)], -1)

    def _draw(
        self, particles: Tensor, shaped: NextRows | None, u: Tensor
    ) -> tuple[ops.Weighed, ops.Drawn, Tensor, Tensor]:
        """Weighs the rows of particles (K,) and draws from each by u (K,).

        Returns:
            what the ops gave; (K,) float64, log of the masses of the tokens, and of all that p0 has under its power.
        """
        inputs: dict[str, Any] = {} if shaped is None else shaped._asdict()
        inputs |= {"logit_rows": self.rows[particles], "temperature": self._step.temperature[particles]}
        power: Tensor | float = 1.0
        if self._power is not None:
            power = inputs["power"] = self._power[particles]
        weighed = ops.weigh(self._logits, **inputs)
        drawn = ops.draw(self._logits, weighed, torch.arange(len(particles), device=particles.device), u, **inputs)
        return weighed, drawn, power * (drawn.log_prob + weighed.lse) + drawn.log_psi, power * weighed.lse
