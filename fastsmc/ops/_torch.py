"""The 'torch' backend: every op in eager PyTorch, on any device. Arguments were checked by the op.

It is what a device without kernels of its own runs. It waits for the device only where a Python number is returned,
where groups of several sizes are resampled, whose offsets the host needs, or where `ssp` runs on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops._tensors import Contrast, Matrices, Temperatures

_LOW32 = 0xFFFFFFFF
#: of the noise of token 0: kNoiseStream in csrc/include/fastsmc/redraw.cuh
NOISE_STREAM = 2**31


# -- uniforms ----------------------------------------------------------------------------------------------------------
def uniforms(
    n: int,
    seed: int | Tensor,
    group: int | Tensor,
    step: int | Tensor,
    stream: int,
    offsets: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Runs Philox on int64 tensors that hold 32-bit words; products wrap modulo 2^64, as they should."""
    c0 = torch.arange(n, dtype=torch.int64, device=device)
    if offsets is not None:
        at = torch.searchsorted(offsets[1:], c0, right=True)
        c0 = c0 - offsets[at]
        seed, group, step = (x[at] if isinstance(x, Tensor) else x for x in (seed, group, step))
    c1, c2, c3 = (x.expand_as(c0) if isinstance(x, Tensor) else torch.full_like(c0, x) for x in (step, group, stream))
    return _philox(c0, c1, c2, c3, seed)


def _philox(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, seed: int | Tensor) -> Tensor:
    """Makes float64 in [0, 1) at counters (c0, c1, c2, c3), which broadcast, as does a seed that is a tensor."""
    key0, key1 = seed & _LOW32, (seed >> 32) & _LOW32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW32) ^ c1 ^ key0, p1 & _LOW32, ((p0 >> 32) & _LOW32) ^ c3 ^ key1, p0 & _LOW32
        key0, key1 = (key0 + 0x9E3779B9) & _LOW32, (key1 + 0xBB67AE85) & _LOW32
    return ((c0 << 21) | (c1 >> 11)).double() * 2.0**-53


# -- weigh, draw -------------------------------------------------------------------------------------------------------
def _without_minus_one(m: Matrices) -> tuple[Matrices, Tensor | None]:
    """Replaces indices of −1 by others that can be looked up, and marks them: (matrices, (R,) bool that have no row).

    The second is None where no output row can lack a row.
    """
    if m.logit_rows is None:
        return m, None
    absent = m.logit_rows < 0
    psi_rows = None if m.psi_rows is None else m.psi_rows.masked_fill(absent, 0)
    mask_rows = None if m.mask_rows is None else m.mask_rows.masked_fill(absent, -1)

    def with_a_row(matrix: Tensor) -> Tensor:
        return matrix if matrix.shape[0] else matrix.new_zeros(1, matrix.shape[1])

    psi, mask = (None if matrix is None else with_a_row(matrix) for matrix in (m.log_psi, m.mask))
    return Matrices(with_a_row(m.logits), m.logit_rows.clamp(min=0), psi, psi_rows, mask, mask_rows), absent


def _at(matrix: Tensor, rows: Tensor | None, r: Tensor | None, columns: Tensor | None) -> Tensor:
    """Looks up the elements of output rows r (M,) at columns (M, K); None stands for all rows, all columns."""
    if r is not None:
        rows = r if rows is None else rows[r]
    if rows is None:
        return matrix
    return matrix[rows] if columns is None else matrix[rows[:, None], columns]


def _column(m: Matrices, for_all: float, rows: Tensor | None, r: Tensor | None) -> Tensor:
    """Gives a temperature of output rows r, None for all, (M, 1) float64 or, where it is the same for all, (1, 1)."""
    if rows is None:
        return m.logits.new_full((1, 1), for_all, dtype=torch.float64)
    return (rows if r is None else rows[r])[:, None]


def _scores(m: Matrices, r: Tensor | None, columns: Tensor | None, t: Temperatures) -> tuple[Tensor, Tensor]:
    """Computes the scores (z, x) of output rows r at columns, in float32; x is z if nothing reweighs."""
    logits = _at(m.logits, m.logit_rows, r, columns).float()
    z = x = logits / _column(m, t.all, t.rows, r).float()
    if t.powers:
        x = logits / _column(m, t.powered, t.powered_rows, r).float()
    if not m.reweighs:
        return z, x
    twist = z.new_zeros(()) if m.log_psi is None else _at(m.log_psi, m.psi_rows, r, columns).float()
    if m.mask is not None:
        twist = torch.where(_allowed(m, m.mask, r, columns, z.shape), twist, -math.inf)
    return z, x + twist


def _allowed(m: Matrices, mask: Tensor, r: Tensor | None, columns: Tensor | None, shape: torch.Size) -> Tensor:
    """Says what the mask allows output rows r at columns, (M, K) bool of that shape."""
    where = torch.arange(m.logits.shape[1], device=mask.device) if columns is None else columns
    rows = m.mask_rows if m.mask_rows is None else m.mask_rows.clamp(min=0)
    allowed = (_at(mask, rows, r, None).gather(1, (where >> 5).expand(shape)) >> (where & 31).int()) & 1 != 0
    if m.mask_rows is not None:
        allowed |= (m.mask_rows if r is None else m.mask_rows[r])[:, None] < 0
    return allowed


def _tile_sums(x: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Sums exp(x − max) per tile, (R, K) float64, max (R,) float32; a row with NaN or +inf has sums and max NaN.

    Tiles are summed relative to their own maximum, so that those far below the row's keep their mass.
    """
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % tile), value=-math.inf).unflatten(1, (-1, tile))
    tops = x.amax(2)  # NaN wins; +inf makes NaN below
    top = tops.amax(1)
    sums = (x - torch.where(tops == -math.inf, 0.0, tops)[:, :, None]).exp_().sum(2, dtype=torch.float64)
    mass = sums * (tops.double() - torch.where(top == -math.inf, 0.0, top)[:, None]).exp()
    bad = mass.isnan().any(1)
    return torch.where(bad[:, None], math.nan, mass), torch.where(bad, math.nan, top)


def weigh(m: Matrices, t: Temperatures, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, absent = _without_minus_one(m)
    z, x = _scores(m, None, None, t)
    if absent is not None:
        z, x = (scores.masked_fill(absent[:, None], -math.inf) for scores in (z, x))
    mass, top = _tile_sums(x, tile)
    lse = lse_psi = top.double() + mass.sum(1).log()
    if m.reweighs or t.powers:
        base_mass, base_top = _tile_sums(z, tile)
        lse = base_top.double() + base_mass.sum(1).log()
    else:
        lse_psi = lse.new_empty(0)
    return lse, lse_psi, mass.nan_to_num_(nan=0.0), top


def draw(
    m: Matrices,
    lse: Tensor,
    tile_mass: Tensor,
    rows: Tensor,
    u: Tensor,
    t: Temperatures,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    m, _ = _without_minus_one(m)
    vocab = m.logits.shape[1]
    k, u = _invert_cdf(tile_mass[rows], u)
    column = k[:, None] * tile + torch.arange(tile, device=rows.device)
    inside = column < vocab
    column = column.clamp_(max=vocab - 1)
    x = torch.where(inside, _scores(m, rows, column, t)[1], -math.inf)
    top = x.amax(1, keepdim=True)
    offset, _ = _invert_cdf((x - torch.where(top == -math.inf, 0.0, top)).exp_().double(), u)
    has_mass = tile_mass.sum(1)[rows] > 0
    token = torch.where(has_mass, k * tile + offset, 0)
    column = token[:, None]
    z = _at(m.logits, m.logit_rows, rows, column).double() / _column(m, t.all, t.rows, rows)
    log_prob = z.squeeze(1) - lse[rows]
    log_psi = torch.zeros_like(log_prob)
    if m.log_psi is not None:
        log_psi = _at(m.log_psi, m.psi_rows, rows, column).squeeze(1).double()
    nan = log_prob.new_tensor(math.nan)
    return torch.where(has_mass, token, -1), torch.where(has_mass, log_prob, nan), torch.where(has_mass, log_psi, nan)


def _invert_cdf(mass: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inverts the CDF of each row of (M, K) float64, as csrc/include/fastsmc/draw.cuh does; without mass gives 0."""
    cdf = mass.cumsum(1)
    target = (u * cdf[:, -1])[:, None]
    # a parallel cumsum may not be monotone: only tokens with mass qualify, and rounding past the end takes the last
    positive = mass > 0
    hit = (cdf > target) & positive
    first = hit.int().argmax(1)
    last = (mass.shape[1] - 1 - positive.flip(1).int().argmax(1)) * positive.any(1)
    k = torch.where(hit.any(1), first, last)[:, None]
    here = mass.gather(1, k)
    fraction = (target - (cdf.gather(1, k) - here)) / here
    return k.squeeze(1), fraction.squeeze(1).clamp_(0.0, 1.0)


# -- redraw ------------------------------------------------------------------------------------------------------------
#: elements of rows that are looked at together, which take some 150 bytes each
_AT_ONCE = 2**20


class _Coupling(NamedTuple):
    """Holds P(· | k) of M output rows, as fastsmc.reference.Coupling does: float64; in the order of kinks, (M, V).

    α is in units of that at τ_k, or where q_k is nothing (`endless`) of the last kink of a token with mass. Tokens
    whose odds did not rise come last, with `alpha` 1 and `q` 0. h has one column more, for the end.
    """

    k: Tensor
    log_q: Tensor  # (M, V), in the order of tokens
    rising: Tensor  # (M, V), in the order of tokens
    order: Tensor
    alpha: Tensor
    q: Tensor
    slope: Tensor
    h: Tensor
    per_alpha: Tensor  # (M, 1), τ of α = 1
    endless: Tensor  # (M, 1)
    absent: Tensor  # (M,)
    bad: Tensor  # (M,), there is no token; absent ones too

    @property
    def log_stay(self) -> Tensor:
        return torch.where(self.endless[:, 0], -math.inf, -self.h[:, -1].log1p())


def _rows_of(c: Contrast, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Looks up for output rows r (M,): logits under the mask, factual logits, (M, V) float64; k (M,); absent (M,)."""
    m, _ = _without_minus_one(c.matrices)
    f = r if c.factual_rows is None else c.factual_rows[r]
    absent = f < 0 if c.logit_rows is None else (c.logit_rows[r] < 0) | (f < 0)
    f = f.masked_fill(absent, 0)
    factual, tokens = c.factual, c.tokens
    if factual.shape[0] == 0:
        factual, tokens = factual.new_zeros(1, factual.shape[1]), tokens.new_zeros(1)
    q = _at(m.logits, m.logit_rows, r, None).double()
    if m.mask is not None:
        q = q + torch.where(_allowed(m, m.mask, r, None, q.shape), 0.0, -math.inf)
    return q, factual[f].double(), tokens[f], absent


def _couple(c: Contrast, r: Tensor) -> _Coupling:
    q_rows, p_rows, k, absent = _rows_of(c, r)
    t_q = _column(c.matrices, c.temperature, c.temperatures, r)
    t_p = _column(c.matrices, c.factual_temperature, c.factual_temperatures, r)
    at_k = k[:, None]
    rising = (q_rows - q_rows.gather(1, at_k)) / t_q > (p_rows - p_rows.gather(1, at_k)) / t_p
    log_q, log_p = (
        (q_rows / t_q).log_softmax(1),
        (p_rows / t_p).log_softmax(1),
    )  # NaN without mass, and with NaN or +inf
    bad = absent | log_q[:, 0].isnan() | log_p[:, 0].isnan() | (log_p.gather(1, at_k)[:, 0] == -math.inf)
    log_tau = torch.where(rising, log_p - log_q, math.inf)
    log_tau, order = log_tau.sort(1)
    there = log_tau < math.inf
    unit = (log_p - log_q).gather(1, at_k)
    endless = ~(unit < 600.0)
    q = torch.where(there, log_q.gather(1, order).exp(), 0.0)
    last = torch.where(q > 0, log_tau, -math.inf).amax(1, keepdim=True).clamp_(-600.0, 600.0)
    unit = torch.where(endless, last, unit)
    alpha = torch.where(there, (log_tau - unit).exp().clamp(max=1.0), 1.0)
    slope, per_alpha = q.cumsum(1), unit.exp()
    ends = torch.nn.functional.pad(alpha, (0, 1), value=1.0)
    h = torch.nn.functional.pad((per_alpha * slope * ends.diff()).cumsum(1), (1, 0))
    return _Coupling(k, log_q, rising, order, alpha, q, slope, h, per_alpha, endless, absent, bad)


def _log_law(w: _Coupling) -> Tensor:
    """Computes log P(· | k), (M, V) float64: −inf where there is no row, NaN where there is no token."""
    at = 1.0 / (1.0 + w.h)
    ends = torch.nn.functional.pad(w.alpha, (0, 1), value=1.0)
    pieces = w.per_alpha * ends.diff() * at[:, :-1] * at[:, 1:]
    pieces[:, -1:] += torch.where(w.endless, at[:, -1:] / w.slope[:, -1:], 0.0)
    from_kink = pieces.flip(1).cumsum(1).flip(1).log()
    law = torch.where(w.rising, w.log_q + torch.empty_like(w.log_q).scatter_(1, w.order, from_kink), -math.inf)
    law.scatter_(1, w.k[:, None], w.log_stay[:, None])
    return law.masked_fill_(w.bad[:, None], math.nan).masked_fill_(w.absent[:, None], -math.inf)


def _redraw_rows(c: Contrast, r: Tensor, u: Tensor) -> tuple[Tensor, ...]:
    w = _couple(c, r)
    target = (1.0 / u[:, 0] - 1.0)[:, None]
    number = torch.arange(w.order.shape[1], device=r.device).expand_as(w.order)
    before = (w.h[:, :-1] < target) & (w.q > 0)  # kinks before the root; without mass there may be more among them
    below = torch.where(before, number + 1, 1).amax(1, keepdim=True)
    rank = torch.empty_like(w.order).scatter_(1, w.order, number)
    token, _ = _invert_cdf(torch.where(w.rising & (rank < below), w.log_q.exp(), 0.0), u[:, 1])
    stay = w.log_stay.exp()
    token = torch.where(u[:, 0] < stay, w.k, token)
    log_prob, log_kernel = (x.gather(1, token[:, None])[:, 0] for x in (w.log_q, _log_law(w)))
    stay, log_prob, log_kernel = (x.masked_fill(w.bad, math.nan) for x in (stay, log_prob, log_kernel))
    return token.masked_fill(w.bad, -1), stay, log_prob, log_kernel


def _in_chunks(c: Contrast, rows: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Calls `rows` with some output rows after the other, and puts the results together."""
    parts = torch.arange(c.n_rows, device=c.logits.device).split(max(1, _AT_ONCE // c.logits.shape[1]))
    return tuple(torch.cat(out) for out in zip(*map(rows, parts), strict=True))


def redraw(c: Contrast, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, stay, log_prob, log_kernel = _in_chunks(c, lambda r: _redraw_rows(c, r, u[r]))
    return tokens, stay, log_prob, log_kernel


def redraw_logits(c: Contrast) -> Tensor:
    return _in_chunks(c, lambda r: (_log_law(_couple(c, r)).float(),))[0]


def gumbel(c: Contrast, lse: Tensor, seeds: Tensor, groups: Tensor, steps: Tensor, particles: Tensor) -> Tensor:
    tokens = torch.arange(c.logits.shape[1], device=lse.device)

    def rows(r: Tensor) -> tuple[Tensor]:
        w = _couple(c, r)
        particle, step, group, seed = (x[r, None] for x in (particles, steps, groups, seeds))
        clocks = -(-_philox(particle, step, group, NOISE_STREAM + tokens, seed)).log1p()
        at_k = w.k[:, None]
        log_tau = torch.empty_like(w.log_q).scatter_(1, w.order, w.alpha.log()) + w.per_alpha.log()
        own = clocks.gather(1, at_k)
        late = torch.where(w.rising, (own * log_tau.exp() + clocks / w.log_q.exp()), math.inf)
        late.scatter_(1, at_k, torch.where(w.endless, math.inf, own * w.per_alpha))
        return (late.argmin(1).masked_fill(w.bad, -1),)

    return _in_chunks(c, rows)[0]


# -- resample ----------------------------------------------------------------------------------------------------------
def _scale_uniform(u: Tensor, total: Tensor) -> Tensor:
    """Computes floor(u · total) exactly for total <= 2^62: a product of 53 by 62 bits, in limbs that fit int64."""
    u = (u * 2.0**53).long()
    u_high, u_low = u >> 27, u & (2**27 - 1)
    t_high, t_low = total >> 30, total & (2**30 - 1)
    return u_high * t_high * 16 + ((u_high * t_low + 8 * u_low * t_high + ((u_low * t_low) >> 27)) >> 26)


def _by_strata(q: Tensor, u: Tensor) -> Tensor:
    """Counts the strata of each particle. N·C_i / C_N is divided bit by bit of N: int64 does not hold the product."""
    n = q.shape[0]
    prefix = q.cumsum(0)
    total = prefix[-1]
    full, rest = torch.zeros_like(prefix), torch.zeros_like(prefix)
    for bit in range(n.bit_length() - 1, -1, -1):
        rest = 2 * rest + (prefix if n >> bit & 1 else 0)
        digit = rest // total
        full = 2 * full + digit
        rest = rest - digit * total
    threshold = _scale_uniform(u, total).expand(n)[full.clamp(max=n - 1)]
    until = full + ((rest > 0) & (rest + threshold >= total))
    return until.diff(prepend=until.new_zeros(1))


def _systematic(q: Tensor, u: Tensor) -> Tensor:
    return _by_strata(q, u[:1])


def _add_draws(counts: Tensor, mass: Tensor, u: Tensor, draws: Tensor | int) -> Tensor:
    """Adds to counts independent draws from integer masses, one per uniform; only the first `draws` uniforms count."""
    prefix = mass.cumsum(0)
    cell = torch.searchsorted(prefix, _scale_uniform(u, prefix[-1]), right=True)
    counted = torch.arange(u.shape[0], device=u.device) < draws
    return counts.scatter_add(0, cell.clamp_(max=counts.shape[0] - 1), counted.long())


def _multinomial(q: Tensor, u: Tensor) -> Tensor:
    return _add_draws(torch.zeros_like(q), q, u, q.shape[0])


def _residual(q: Tensor, u: Tensor) -> Tensor:
    n, total = q.shape[0], q.sum()
    counts = q * n // total
    rest = n - counts.sum()
    # the smallest shift with (rest · total) >> shift < 2^62; the 80-bit product is held as product >> 20
    product = rest * (total >> 20) + ((rest * (total & (2**20 - 1))) >> 20)
    shifts = torch.arange(21, device=q.device)
    shift = (product >> (42 + shifts) > 0).sum()
    return _add_draws(counts, (q * n % total) >> shift, u, rest)


def _ssp(q: Tensor, u: Tensor) -> Tensor:
    part, counts = q.to("cpu", copy=True), torch.empty(q.shape, dtype=torch.int64)
    _C.ssp(part.data_ptr(), u.cpu().data_ptr(), part.shape[0], counts.data_ptr())
    return counts.to(u.device)


SCHEMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "systematic": _systematic,
    "stratified": _by_strata,
    "multinomial": _multinomial,
    "residual": _residual,
    "ssp": _ssp,
}


def resample(
    log_weights: Tensor, u: Tensor, scheme: str, threshold: float, thresholds: Tensor | None, offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if offsets is None:
        rows = [x.view(-1, log_weights.shape[-1]).unbind() for x in (log_weights, u)]
    else:
        sizes = offsets.diff().tolist()
        rows = [x.split(sizes) for x in (log_weights, u)]
    limits = [threshold] * len(rows[0]) if thresholds is None else thresholds.unbind()
    groups = [_resample_group(lw, row, scheme, limit) for lw, row, limit in zip(*rows, limits, strict=True)]
    if offsets is None and log_weights.dim() == 1:
        return groups[0]
    columns = list(zip(*groups, strict=True))
    ess, log_mean, moves = (torch.stack(column) for column in columns[3:])
    if offsets is None:
        ancestors, counts, rank = (torch.stack(column) for column in columns[:3])
    else:
        ancestors, counts, rank = (torch.cat(column) for column in columns[:3])
        ancestors += offsets[:-1].repeat_interleave(offsets.diff(), output_size=len(ancestors))
    return ancestors, counts, rank, ess, log_mean, moves


def _resample_group(
    log_weights: Tensor, u: Tensor, scheme: str, threshold: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = log_weights.shape[0]
    if n == 0:
        none, zero = torch.empty_like(log_weights, dtype=torch.int64), log_weights.new_zeros(())
        return none, none, none, zero, zero - math.inf, zero > 0
    top = log_weights.max()  # NaN wins
    w = (log_weights - torch.where(top.isfinite(), top, 0.0)).exp()
    total = w.sum()
    ess, log_mean = total * total / w.square().sum(), top + total.log() - math.log(n)
    ess = torch.where(top == -math.inf, 0.0, torch.where(top.isfinite(), ess, math.nan))
    log_mean = torch.where(top == math.inf, math.nan, log_mean)
    moves = (ess > 0) & ((ess < threshold * n) | (threshold >= 1.0))
    q = torch.where(moves, w * 2.0**40, 1.0).round().long()
    counts = SCHEMES[scheme](q, u)
    found = _place_children(counts)
    stay = (torch.arange(n, device=counts.device), torch.ones_like(counts), torch.zeros_like(counts))
    ancestors, counts, rank = (torch.where(moves, new, old) for new, old in zip(found, stay, strict=True))
    return ancestors, counts, rank, ess, log_mean, moves


def _place_children(counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places children of counts (N,): ancestors, counts, rank."""
    n = counts.shape[0]
    slots = torch.arange(n, device=counts.device)
    dead = counts == 0
    surplus_ends = (counts - 1).clamp(min=0).cumsum(0)
    dead_before = dead.cumsum(0) - dead.long()
    parent = torch.searchsorted(surplus_ends, dead_before, right=True).clamp_(max=n - 1)
    ancestors = torch.where(dead, parent, slots)
    # children before the parent's slot: dead slots before it, within its share of the surplus
    surplus = (counts - 1).clamp(min=0)
    surplus_before = surplus_ends - surplus
    stayed = (dead_before - surplus_before).clamp(min=0).minimum(surplus)
    moved = dead_before - surplus_before[ancestors] + (slots > ancestors).long()
    return ancestors, counts, torch.where(dead, moved, stayed)


# -- reindex -----------------------------------------------------------------------------------------------------------
def reindex(
    table: Tensor,
    ancestors: Tensor,
    position: int | Tensor,
    block_size: int,
    caches: Sequence[Tensor],
    slot_dim: int | None,
    genealogy: Tensor | None,
    step: int | Tensor,
) -> None:
    """Rewrites table and caches in place; invalid rows stay. It looks for rows that move: it waits for the device.

    Args:
        position: an integer, a 0-dim int64 tensor, or (N,) int32.
    """
    n, columns = table.shape
    device = table.device
    if genealogy is not None and 0 <= (t := int(step)) < genealogy.shape[0]:
        genealogy[t] = ancestors
    positions = torch.as_tensor(position, device=device).long().expand(n)
    inside = (ancestors >= 0) & (ancestors < n)
    parents = ancestors.clamp(0, n - 1)
    moves = inside & (ancestors[parents] == ancestors) & (ancestors != torch.arange(n, device=device))
    tokens = positions[parents]
    rows = (moves & (tokens >= 0) & (tokens <= columns * block_size)).nonzero().squeeze(1)
    parents, tokens = parents[rows], tokens[rows]
    tail, used = tokens // block_size, tokens % block_size
    partly = (used > 0).nonzero().squeeze(1)
    source = table[parents[partly], tail[partly]].long()
    target = table[rows[partly], tail[partly]].long()
    slots = torch.arange(block_size, device=device) < used[partly, None]
    for cache in caches:
        valid = (source >= 0) & (source < cache.shape[0]) & (target >= 0) & (target < cache.shape[0])
        if slot_dim is None:
            cache[target[valid]] = cache[source[valid]]
        else:
            move, slot = (slots & valid[:, None]).nonzero(as_tuple=True)
            by_slot = cache.movedim(slot_dim, 1)
            by_slot[target[move], slot] = by_slot[source[move], slot]
    full = torch.arange(columns, device=device) < tail[:, None]
    table[rows] = torch.where(full, table[parents], table[rows])


# -- settle ------------------------------------------------------------------------------------------------------------
def settle(
    slots: Tensor, tokens: Tensor, wanted: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, device = slots.shape[0], slots.device
    everyone = torch.arange(n, device=device)
    group_of = torch.searchsorted(offsets[1:], everyone, right=True)
    begin = offsets[group_of]
    slots = slots + begin
    # the others come behind those of their slot
    keys, order = torch.sort(slots << 32 | torch.where(wanted, tokens, _LOW32), stable=True)
    parents, sorted_tokens, there, begins = slots[order], tokens[order], wanted[order], begin[order]
    first = there.clone()  # of the particles with one history
    first[1:] &= keys[1:] != keys[:-1]
    moves = first.clone()
    moves[:1] = False
    moves[1:] &= parents[1:] == parents[:-1]  # else it stays in place
    used = torch.zeros(n + 1, dtype=torch.bool, device=device)
    used[torch.where(there, parents, n)] = True
    vacant = torch.argsort(group_of * 2 + used[:n], stable=True)  # in each group the vacant ones first
    before = torch.zeros(n + 1, dtype=torch.int64, device=device)  # moves of those before
    before[1:] = moves.cumsum(0)
    target = torch.where(moves, vacant[(begins + before[:-1] - before[begins]).clamp(max=max(n - 1, 0))], parents)
    # the histories behind a first one are its own: each takes the slot of the last first one
    target = target[torch.where(first, everyone, 0).cummax(0).values]
    fate = torch.where(first, target, n)
    ancestors, appended = torch.arange(n + 1, device=device), torch.zeros(n + 1, dtype=torch.int64, device=device)
    ancestors[fate], appended[fate] = parents, sorted_tokens
    copied, present = torch.zeros_like(used), torch.zeros_like(used)
    copied[torch.where(moves, target, n)] = True
    present[fate] = True
    settled = torch.empty_like(slots)
    settled[order] = torch.where(there, target, parents)
    rows = torch.where(wanted, (present[:n].cumsum(0) - 1)[settled], -1)
    return ancestors[:n], settled - begin, appended[:n], rows, present[:n], copied[:n]


# -- intervene ---------------------------------------------------------------------------------------------------------
def intervene(
    x: Tensor, source: Tensor, slots: Tensor, offsets: Tensor, down: Tensor, up: Tensor, shift: Tensor,
    finite: Tensor | None,
) -> None:  # fmt: skip
    """Maps the rows of one slot after the other; which there are the host must know: it waits for the device."""
    ends = offsets.tolist()
    for s in slots.unique().tolist():
        if s < 0:
            continue
        rows = (slots == s).nonzero()[:, 0]
        factors = slice(ends[s], ends[s + 1])
        change = (source[rows].float() @ down[factors].T) @ up[factors] + shift[s]
        x[rows] = (x[rows].float() + change).to(x.dtype)
        if finite is not None:
            finite[s] &= x[rows].isfinite().all()
