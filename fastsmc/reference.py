"""Every op in NumPy and float64, as plain as can be: the oracle that tests compare the backends with.

Names and arguments are those of fastsmc.ops, on arrays instead of tensors. `resample` does the same integer arithmetic
as the backends (Python integers, so without overflow), and its counts are equal to theirs; the others agree up to the
rounding of float32.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray

TILE = 1024


# -- uniforms ----------------------------------------------------------------------------------------------------------
def philox4x32_10(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Makes four 32-bit words from four of counter and two of key. Source: Salmon et al. 2011."""
    c, (k0, k1) = list(counter), key
    low = 2**32 - 1
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & low, (p0 >> 32) ^ c[3] ^ k1, p0 & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c


def uniforms(n: int, *, seed, group, step, stream: int, offsets=None) -> Array:
    """Makes (n,) float64 in [0, 1) from 53 bits of the first two words at counter (particle, step, group, stream)."""
    if offsets is not None:
        keys = zip(np.diff(offsets).tolist(), *(np.asarray(x).tolist() for x in (seed, group, step)), strict=True)
        return np.concatenate(
            [np.zeros(0), *(uniforms(m, seed=s % 2**64, group=g, step=t, stream=stream) for m, s, g, t in keys)]
        )
    return np.array([_uniform(j, seed, group, step, stream) for j in range(n)])


def _uniform(particle: int, seed: int, group: int, step: int, stream: int) -> float:
    words = philox4x32_10((particle, step, group, stream), (seed & 0xFFFFFFFF, seed >> 32))
    return ((words[0] << 21) | (words[1] >> 11)) * 2.0**-53


# -- p0 ----------------------------------------------------------------------------------------------------------------
def restrict(
    logits, before=0, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, logit_bias=None, allowed_token_ids=None,
    min_tokens=0, stop_token_ids=(),
) -> Array:  # fmt: skip
    """Rules tokens out of one row (V,) by sorting all of it: what fastsmc.p0 does to rows; settings of SMCParams.

    `before` tokens were generated before the one that the row is about.
    """
    z = np.array(logits, np.float64)
    if allowed_token_ids is not None:
        z[np.setdiff1d(np.arange(len(z)), list(allowed_token_ids))] = -np.inf
    if before < min_tokens:
        z[list(stop_token_ids)] = -np.inf
    for token, value in (logit_bias or {}).items():
        z[token] += value
    z[z < z.max() + (temperature * math.log(min_p) if min_p > 0.0 else -np.inf)] = -np.inf
    if 0 < top_k < len(z):
        z[z < np.sort(z)[-top_k]] = -np.inf
    if top_p < 1.0 and z.max() > -np.inf:
        order = np.argsort(-z, kind="stable")
        mass = np.exp((z[order] - z.max()) / temperature)
        z[order[1:][np.cumsum(mass / mass.sum())[:-1] >= top_p]] = -np.inf
    return z


# -- weigh, draw -------------------------------------------------------------------------------------------------------
class Weighed(NamedTuple):
    lse: Array
    lse_psi: Array
    tile_mass: Array
    max_psi: Array


def _scores(
    logits, log_psi, logit_rows, psi_rows, mask, mask_rows, temperature, power=1.0
) -> tuple[Array, Array, Array]:
    """Computes z = logits / T, x = α z + twist and the twist, which is log_psi and −inf where masked; (R, V) each.

    An output row that has no row of logits has z = x = −inf.
    """
    logits = np.asarray(logits, np.float64)
    rows = np.arange(len(logits)) if logit_rows is None else logit_rows
    temperature, power = (np.broadcast_to(value, len(rows)) for value in (temperature, power))
    z, x = np.full((2, len(rows), logits.shape[1]), -np.inf)
    twist = np.zeros_like(z)
    for r in np.flatnonzero(np.asarray(rows) >= 0):
        z[r] = logits[rows[r]] / temperature[r]
        if log_psi is not None:
            twist[r] = log_psi[r if psi_rows is None else psi_rows[r]]
        at = r if mask_rows is None else mask_rows[r]
        if mask is not None and at >= 0:
            bits = [int(word) >> b & 1 for word in mask[at] for b in range(32)]
            twist[r, ~np.array(bits[: logits.shape[1]], bool)] = -np.inf
        with np.errstate(invalid="ignore"):  # −inf + inf
            x[r] = power[r] * z[r] + twist[r]
    return z, x, twist


def _log_sum_exp(x: Array) -> float:
    """Computes log Σ exp: NaN for a row with NaN or +inf, −inf for a row without mass."""
    if np.isnan(x).any() or np.isposinf(x).any():
        return math.nan
    top = x.max()
    return top + math.log(np.exp(x - top).sum()) if top > -math.inf else -math.inf


def weigh(
    logits, log_psi=None, *, logit_rows=None, psi_rows=None, mask=None, mask_rows=None, temperature=1.0, power=1.0
) -> Weighed:
    z, x, _ = _scores(logits, log_psi, logit_rows, psi_rows, mask, mask_rows, temperature, power)
    lse = np.array([_log_sum_exp(row) for row in z])
    lse_psi = np.array([_log_sum_exp(row) for row in x])
    top = np.where(np.isnan(lse_psi), np.nan, x.max(axis=1, initial=-np.inf))
    mass = np.zeros((len(x), -(-x.shape[1] // TILE)))
    for r in np.flatnonzero(np.isfinite(lse_psi)):
        for k in range(mass.shape[1]):
            mass[r, k] = np.exp(x[r, k * TILE : (k + 1) * TILE] - top[r]).sum()
    return Weighed(lse, lse_psi, mass, top.astype(np.float32))


def draw(
    logits, rows, uniforms, log_psi=None, *, logit_rows=None, psi_rows=None, mask=None, mask_rows=None,
    temperature=1.0, power=1.0,
):  # fmt: skip
    """Draws (tokens, log_prob, log_psi) by a plain inverse CDF over the whole row: the first token with CDF > u."""
    z, x, twist = _scores(logits, log_psi, logit_rows, psi_rows, mask, mask_rows, temperature, power)
    tokens, log_prob, log_psi_drawn = np.full(len(rows), -1), np.full(len(rows), np.nan), np.full(len(rows), np.nan)
    for j, (r, u) in enumerate(zip(rows, uniforms, strict=True)):
        if not np.isfinite(_log_sum_exp(x[r])):
            continue
        mass = np.exp(x[r] - x[r].max())
        cdf = mass.cumsum()
        token = np.searchsorted(cdf, u * cdf[-1], side="right")
        tokens[j] = token if token < len(mass) else np.flatnonzero(mass)[-1]
        log_prob[j] = z[r, tokens[j]] - _log_sum_exp(z[r])
        log_psi_drawn[j] = twist[r, tokens[j]]
    return tokens, log_prob, log_psi_drawn


def stratify(uniforms: Array, rank: Array, count: Array) -> Array:
    return np.minimum((rank + uniforms) / count, 1.0 - 2.0**-53)


# -- redraw ------------------------------------------------------------------------------------------------------------
class Redrawn(NamedTuple):
    tokens: Array
    stay: Array
    log_prob: Array
    log_kernel: Array


class Coupling:
    """Holds P(· | k) of one row, p being what gave k: kinks τ_i = p_i/q_i of H, ascending, and H and its slopes."""

    def __init__(self, q: Array, p: Array, k: int, t_q: float = 1.0, t_p: float = 1.0) -> None:
        """q, p: logits (V,), for temperatures t_q and t_p; p[k] is not −inf, and there is no NaN."""
        self.log_q, log_p = q / t_q - _log_sum_exp(q / t_q), p / t_p - _log_sum_exp(p / t_p)
        self.q, self.k = np.exp(self.log_q), k
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            tau = np.exp(log_p - self.log_q)
            # the log odds against k; differences of float32 are exact, so that equal rows have none that rises
            self.rising = np.flatnonzero((q - q[k]) / t_q > (p - p[k]) / t_p)
        self.rising = self.rising[np.argsort(tau[self.rising], kind="stable")]
        self.tau, self.tau_k = np.minimum(tau[self.rising], tau[k]), tau[k]
        self.slope = np.concatenate([[0.0], self.q[self.rising].cumsum()])  # before each kink, and after the last
        widths = np.diff(np.append(self.tau, self.tau_k))
        self.h = np.concatenate([[0.0], np.cumsum(self.slope[1:] * widths)])  # at each kink, and at τ_k
        self.stay = 1.0 / (1.0 + self.h[-1])

    def log_law(self) -> Array:
        """Computes log P(· | k), (V,)."""
        at = 1.0 / (1.0 + self.h)
        ends = np.append(self.tau, self.tau_k)
        with np.errstate(invalid="ignore"):
            pieces = np.diff(ends) * at[:-1] * at[1:]  # ∫ dτ/(1 + H)²
        if np.isinf(self.tau_k):
            pieces[-1] = at[-2] / self.slope[-1]
        law = np.full(len(self.q), -np.inf)
        with np.errstate(divide="ignore"):
            law[self.rising] = self.log_q[self.rising] + np.log(pieces[::-1].cumsum()[::-1])
            law[self.k] = math.log(self.stay) if self.stay > 0.0 else -math.inf
        return law

    def draw(self, u: Sequence[float]) -> int:
        """Draws one token: k if u[0] < stay, else by the root of H and the inverse CDF over what is active there."""
        if u[0] < self.stay:
            return self.k
        target = 1.0 / u[0] - 1.0 if u[0] > 0.0 else math.inf
        m = max(1, int(np.searchsorted(self.h[:-1], target)))  # that many kinks are below the root
        active = np.sort(self.rising[:m])
        cdf = self.q[active].cumsum()
        return int(active[min(np.searchsorted(cdf, u[1] * cdf[-1], side="right"), m - 1)])


def _couplings(
    logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
) -> list[Coupling | None]:
    """Makes the coupling of each output row: None if it is no row, or nothing can be drawn."""
    q = _scores(logits, None, logit_rows, None, mask, mask_rows, 1.0)[1]
    rows = np.arange(len(factual)) if factual_rows is None else np.asarray(factual_rows)
    if logit_rows is not None:
        rows = np.where(np.asarray(logit_rows) < 0, -1, rows)
    p = _scores(factual, None, rows, None, None, None, 1.0)[0]
    t_q, t_p = (
        np.broadcast_to(t, len(rows))
        for t in (temperature, temperature if factual_temperature is None else factual_temperature)
    )
    out: list[Coupling | None] = []
    for r, f in enumerate(rows):
        good = f >= 0 and p[r, tokens[f]] > -math.inf and np.isfinite([_log_sum_exp(q[r]), _log_sum_exp(p[r])]).all()
        out.append(Coupling(q[r], p[r], int(tokens[f]), t_q[r], t_p[r]) if good else None)
    return out


def redraw(
    logits, factual, tokens, uniforms, *, logit_rows=None, factual_rows=None, mask=None, mask_rows=None,
    temperature=1.0, factual_temperature=None,
) -> Redrawn:  # fmt: skip
    rows = _couplings(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    drawn, numbers = np.full(len(rows), -1), np.full((3, len(rows)), np.nan)
    for r, row in enumerate(rows):
        if row is not None:
            drawn[r] = row.draw(uniforms[r])
            numbers[:, r] = row.stay, row.log_q[drawn[r]], row.log_law()[drawn[r]]
    return Redrawn(drawn, *numbers)


def redraw_logits(
    logits, factual, tokens, *, logit_rows=None, factual_rows=None, mask=None, mask_rows=None, temperature=1.0,
    factual_temperature=None,
) -> Array:  # fmt: skip
    """Computes log P(· | k), (R, V) float64; NaN where there is no coupling, also where a row is none."""
    rows = _couplings(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    nan = np.full(np.shape(logits)[1], np.nan)
    return np.array([nan if row is None else row.log_law() for row in rows]).reshape(len(rows), len(nan))


NOISE_STREAM = 2**31


def gumbel(
    logits, factual, tokens, *, seed, group, step, particles, logit_rows=None, factual_rows=None, mask=None,
    mask_rows=None, temperature=1.0, factual_temperature=None,
) -> Array:  # fmt: skip
    """Draws by exponential clocks: (E p_i + E_i)/q_i, E p_k/q_k; the first wins, of those whose odds rose."""
    rows = _couplings(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    out, keys = np.full(len(rows), -1), [np.broadcast_to(x, len(rows)).tolist() for x in (seed, group, step)]
    for r, (s, g, t) in enumerate(zip(*keys, strict=True)):
        if (row := rows[r]) is None:
            continue

        key = (int(particles[r]), s % 2**64, g, t)
        names = [row.k, *row.rising.tolist()]
        e, *others = (-math.log1p(-_uniform(*key, NOISE_STREAM + v)) for v in names)
        with np.errstate(divide="ignore"):  # a q of 0 that was too small for float64
            clocks = e * row.tau + np.array(others) / row.q[row.rising]
        out[r] = names[int(np.argmin([e * row.tau_k, *clocks]))]
    return out


# -- resample ----------------------------------------------------------------------------------------------------------
class Resampled(NamedTuple):
    ancestors: Array
    counts: Array
    rank: Array
    ess: float | Array
    log_mean: float | Array
    resampled: bool | Array


def _scale_uniform(u: float, total: int) -> int:
    """Computes floor(u · total) for u in [0, 1), a multiple of 2^-53."""
    return (int(u * 2.0**53) * total) >> 53


def _stratified(q: list[int], u: Sequence[float]) -> list[int]:
    """Counts points: stratum j has one at (j + 1 − u_j)·Q/N, and i gets those in (C_{i−1}, C_i]."""
    n, total = len(q), sum(q)
    points = [(j + 1) * total - _scale_uniform(u[j], total) for j in range(n)]  # times N; increasing in j
    until = [bisect.bisect_right(points, n * c) for c in accumulate(q)]
    return [b - a for a, b in zip([0, *until], until, strict=False)]


def _systematic(q: list[int], u: Sequence[float]) -> list[int]:
    return _stratified(q, [u[0]] * len(q))


def _draws(mass: list[int], u: Sequence[float]) -> list[int]:
    """Counts how many independent draws fall to each cell of `mass`."""
    prefix = list(accumulate(mass))
    counts = [0] * len(mass)
    for v in u:
        counts[bisect.bisect_right(prefix, _scale_uniform(v, prefix[-1]))] += 1
    return counts


def _multinomial(q: list[int], u: Sequence[float]) -> list[int]:
    return _draws(q, u)


def _residual(q: list[int], u: Sequence[float]) -> list[int]:
    """Makes floor(N W_i) copies, and draws the rest from the remainders."""
    n, total = len(q), sum(q)
    whole = [n * v // total for v in q]
    rest = n - sum(whole)
    shift = max(0, (rest * total).bit_length() - 62)  # the backends hold this sum in 64 bits
    more = _draws([n * v % total >> shift for v in q], u[:rest])
    return [a + b for a, b in zip(whole, more, strict=True)]


def _ssp(q: list[int], u: Sequence[float]) -> list[int]:
    """Runs the Srinivasan sampling process of Gerber, Chopin & Whiteley 2019, after nchopin/particles."""
    n, total = len(q), sum(q)
    counts = [n * v // total for v in q]
    part = [n * v % total for v in q]
    i, j = 0, 1
    for k in range(n - 1):
        i_grows, j_grows = min(part[j], total - part[i]), min(part[i], total - part[j])
        if _scale_uniform(u[k], i_grows + j_grows) < i_grows:
            i, j = j, i
        if part[j] < total - part[i]:
            part[i] += part[j]
            j = k + 2
        else:
            part[j] -= total - part[i]
            counts[i] += 1
            i = k + 2
    return counts


SCHEMES: dict[str, Callable[[list[int], Sequence[float]], list[int]]] = {
    "systematic": _systematic,
    "stratified": _stratified,
    "multinomial": _multinomial,
    "residual": _residual,
    "ssp": _ssp,
}


def resample(log_weights, uniforms, *, scheme="systematic", threshold=None, offsets=None) -> Resampled:
    """One group, with offsets several. Weights with NaN, +inf or no mass give no offspring, whatever the threshold."""
    if offsets is not None:
        return _resample_groups(log_weights, uniforms, scheme, threshold, offsets)
    log_weights = np.asarray(log_weights, np.float64)
    n = len(log_weights)
    ess, log_mean = ess_log_mean(log_weights)
    if not ess > 0 or (threshold is not None and threshold < 1 and not ess < threshold * n):
        return Resampled(np.arange(n), np.ones(n, np.int64), np.zeros(n, np.int64), ess, log_mean, False)
    top = log_weights.max()
    # math.exp is the C library's, as in csrc; np.exp may differ in the last place
    q = [round(math.exp(lw - top) * 2.0**40) for lw in log_weights]
    counts = SCHEMES[scheme](q, [float(u) for u in uniforms])
    surplus = [i for i, c in enumerate(counts) for _ in range(c - 1)]
    ancestors = np.arange(n)
    ancestors[np.array(counts) == 0] = surplus
    seen, rank = [0] * n, []
    for a in ancestors.tolist():
        rank.append(seen[a])
        seen[a] += 1
    return Resampled(ancestors, np.array(counts), np.array(rank), ess, log_mean, True)


def _resample_groups(log_weights, uniforms, scheme, threshold, offsets) -> Resampled:
    """One group after the other; their ancestors are flat positions."""
    ancestors, counts, rank = np.zeros((3, len(log_weights)), np.int64)
    ess, log_mean = np.zeros((2, len(offsets) - 1))
    resampled = np.zeros(len(ess), bool)
    for g, threshold_g in enumerate(np.broadcast_to(1.0 if threshold is None else threshold, len(ess))):
        at = slice(offsets[g], offsets[g + 1])
        group = resample(log_weights[at], uniforms[at], scheme=scheme, threshold=threshold_g)
        ancestors[at], counts[at], rank[at] = offsets[g] + group.ancestors, group.counts, group.rank
        ess[g], log_mean[g], resampled[g] = group[3:]
    return Resampled(ancestors, counts, rank, ess, log_mean, resampled)


def ess_log_mean(log_weights) -> tuple[float, float]:
    log_weights = np.asarray(log_weights, np.float64)
    top = log_weights.max(initial=-math.inf)
    if top == -math.inf:
        return 0.0, -math.inf
    if not top < math.inf:
        return math.nan, math.nan
    w = np.exp(log_weights - top)
    return float(w.sum() ** 2 / (w**2).sum()), float(top + math.log(w.mean()))


# -- reindex -----------------------------------------------------------------------------------------------------------
def reindex(table, ancestors, *, position, block_size, caches, slot_dim=None, genealogy=None, step=None) -> None:
    """Rewrites table, caches and genealogy in place; position is one number, or (N,)."""
    if genealogy is not None:
        genealogy[step] = ancestors
    positions = np.broadcast_to(position, len(table))
    for i, a in enumerate(ancestors):
        if a == i:
            continue
        tail, used = divmod(int(positions[a]), block_size)
        table[i, :tail] = table[a, :tail]
        if used == 0:
            continue
        for cache in caches:
            slots = [slice(None)] * (cache.ndim - 1)
            if slot_dim is not None:
                slots[slot_dim - 1] = slice(0, used)
            cache[(table[i, tail], *slots)] = cache[(table[a, tail], *slots)]


# -- settle ------------------------------------------------------------------------------------------------------------
class Histories(NamedTuple):
    ancestors: Array
    slots: Array
    tokens: Array
    rows: Array
    present: Array
    copied: Array


def settle(slots, tokens, wanted, offsets) -> Histories:
    """Gives every distinct (slot, token) of the particles in `wanted` a slot of its group; see fastsmc.ops.settle."""
    n = len(slots)
    ancestors, of, appended, rows = np.arange(n), np.array(slots, np.int64), np.zeros(n, np.int64), np.full(n, -1)
    present, copied = np.zeros(n, bool), np.zeros(n, bool)
    for begin, end in itertools.pairwise(offsets):
        mine = [i for i in range(begin, end) if wanted[i]]
        histories = sorted({(int(slots[i]), int(tokens[i])) for i in mine})
        vacant = (s for s in range(end - begin) if s not in {slot for slot, _ in histories})
        where: dict[tuple[int, int], int] = {}
        for slot, token in histories:
            stays = not any(other == slot for other, _ in where)
            where[slot, token] = target = slot if stays else next(vacant)
            ancestors[begin + target], appended[begin + target] = begin + slot, token
            present[begin + target], copied[begin + target] = True, not stays
        for i in mine:
            of[i] = where[int(slots[i]), int(tokens[i])]
    for begin, end in itertools.pairwise(offsets):
        for i in range(begin, end):
            rows[i] = present[: begin + of[i]].sum() if wanted[i] else -1
    return Histories(ancestors, of, appended, rows, present, copied)


# -- intervene ---------------------------------------------------------------------------------------------------------
def intervene(x, slots, offsets, down, up, shift, *, source=None, finite=None) -> None:
    """Adds up_sᵀ (down_s · y) + shift_s to each row of x (R, H) whose slot s is not −1, in place; y is its source."""
    source = np.array(x if source is None else source, np.float64)
    for r, s in enumerate(slots):
        if s < 0:
            continue
        factors = slice(offsets[s], offsets[s + 1])
        x[r] += np.asarray(up[factors], np.float64).T @ (down[factors] @ source[r]) + shift[s]
        if finite is not None and not np.isfinite(x[r]).all():
            finite[s] = False


# -- attend ------------------------------------------------------------------------------------------------------------
def attend(query, key_cache, value_cache, table, length, *, scale) -> Array:
    """Attends (R, Hq, D) from query (R, Hq, D) over caches (n_blocks, Hk, B, D) and table (R, C), row by row.

    length is one number, or (R,).
    """
    query, table = np.asarray(query, np.float64), np.asarray(table)
    n_rows, n_heads, dim = query.shape
    n_key_heads, block_size = key_cache.shape[1:3]
    lengths = np.broadcast_to(length, n_rows)
    out = np.empty_like(query)
    for r in range(n_rows):
        blocks = table[r, : -(-lengths[r] // block_size)]
        keys, values = (  # (Hk, length, D)
            np.asarray(cache[blocks], np.float64).transpose(1, 0, 2, 3).reshape(n_key_heads, -1, dim)[:, : lengths[r]]
            for cache in (key_cache, value_cache)
        )
        for h in range(n_heads):
            g = h // (n_heads // n_key_heads)
            scores = scale * keys[g] @ query[r, h]
            p = np.exp(scores - scores.max())
            out[r, h] = p @ values[g] / p.sum()
    return out
