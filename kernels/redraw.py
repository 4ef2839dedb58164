"""redraw in Triton: csrc/include/fastsmc/redraw.cuh in four launches, after `weigh` of both rows.

    scan, join   of logits under the mask, and of factual logits: frames (maxima) and normalisers
    redraw_one   program row: one pass over both rows for H(τ_k); if k does not stay, one per step of Newton's, one tile
                 again for the token, and a pass that puts the kinks of H into bins
    integrate    program row: log P(j | k) from the bins

Exponentials are made anew in each pass: two reads of memory cost less than a buffer of the vocabulary's size per row.
Bins have what Kinks in redraw.cuh has, but distances of kinks from the bin's end, relative to it; and as sums of
integers, in units of 2^-44 of the row's largest mass, so that the order of atomic additions does not show.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from fastsmc.kernels.draw import invert_cdf
from fastsmc.kernels.launch import config, on_device, temperature_arguments
from fastsmc.kernels.weigh import INF, LOG2, LOG2E, TILE, row_arguments, row_of, scale_of, tile_scores, weigh
from torch import Tensor

from fastsmc.ops._tensors import Contrast, Matrices, Temperatures

#: as in redraw.cuh
BINS = tl.constexpr(2048)
SHIFT = tl.constexpr(17)
BIN_0 = tl.constexpr((0x3F800000 >> 17) - 1)  # the high bits of what lies in bin 0, next to 1.0
MOST_ALPHA = tl.constexpr(2.0**100)
#: of what a bin sums
UNIT = tl.constexpr(2.0**44)
#: numbers per row that redraw_one leaves to integrate; see there
LEFT = tl.constexpr(8)


@triton.jit
def tile_pair(
    logits, mask, masked, factual, tile, vocab, scale, top, q_k, factual_scale, factual_top, p_k,
):  # fmt: skip
    """Computes (e, f), (32, 32) float32 each, of one tile: masses of p, and of q where the odds rose, else 0."""
    _, q = tile_scores(logits, None, mask, masked, tile, vocab, 1.0, 1.0, True, False, False)
    p, _ = tile_scores(factual, None, None, vocab, tile, vocab, 1.0, 1.0, True, False, False)
    rises = (q - q_k) * scale > (p - p_k) * factual_scale
    return tl.exp2(p * factual_scale - factual_top), tl.where(rises, tl.exp2(q * scale - top), 0.0)


@triton.jit
def bin_of(r):
    """Finds the bin of r in [0, 1), bin 0 next to 1."""
    return tl.minimum(-(r.to(tl.int32, bitcast=True) >> SHIFT) + BIN_0, BINS - 1)


@triton.jit
def begin_of(b):
    """Finds where bin b begins; bin −1 begins at 1."""
    return tl.where(b >= BINS - 1, 0.0, ((-b + BIN_0) << SHIFT).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=["temperatures", "n_temperatures", "factual_temperatures", "n_factual_temperatures"])
def redraw_one(
    logits, logit_stride, logit_rows, psi, psi_stride, psi_rows, mask, mask_stride, mask_rows, factual, factual_stride,
    factual_rows, token_of, vocab, n_tiles, scale, temperatures, n_temperatures, factual_scale, factual_temperatures,
    n_factual_temperatures, lse, max_psi, factual_lse, factual_max, uniforms, tokens, stay, log_prob, log_kernel, bins,
    left, BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    nan = float("nan")
    tl.store(tokens + r, -1)
    tl.store(stay + r, nan)
    tl.store(log_prob + r, nan)
    tl.store(log_kernel + r, nan)
    q_lse, p_lse = tl.load(lse + r), tl.load(factual_lse + r)  # −inf where there is no row or no mass
    if ((q_lse > -INF) & (p_lse > -INF)) == 0:  # nor NaN
        return
    scale = scale_of(scale, temperatures, n_temperatures, r)
    factual_scale = scale_of(factual_scale, factual_temperatures, n_factual_temperatures, r)
    logits, factual = row_of(logits, logit_stride, logit_rows, r), row_of(factual, factual_stride, factual_rows, r)
    f = r
    if factual_rows is not None:
        f = tl.load(factual_rows + r)
    k = tl.load(token_of + f)
    q_k, p_k = tl.load(logits + k).to(tl.float32), tl.load(factual + k).to(tl.float32)
    masked = vocab
    if mask is not None:
        if mask_rows is not None:
            masked = tl.where(tl.load(mask_rows + r) < 0, 0, vocab)
        mask = row_of(mask, mask_stride, mask_rows, r)
        word = tl.load(mask + k // 32, mask=k < masked, other=-1)
        q_k = tl.where((word >> (k % 32).to(tl.int32)) & 1 != 0, q_k, -INF)
    if p_k == -INF:
        return
    top, factual_top = tl.load(max_psi + r) * LOG2E, tl.load(factual_max + r) * LOG2E
    z_k, y_k = q_k.to(tl.float64) * scale - top, p_k.to(tl.float64) * factual_scale - factual_top
    e_sum = tl.exp2(p_lse * LOG2E - factual_top)
    alpha_k = tl.exp2(y_k - z_k)
    alpha = tl.minimum(alpha_k, MOST_ALPHA).to(tl.float32)
    zero = tl.zeros((), tl.float64)
    f_sum, e_rising, h = zero, zero, zero
    for tile in range(0, n_tiles):
        es, fs = tile_pair(
            logits, mask, masked, factual, tile, vocab, scale, top, q_k, factual_scale, factual_top, p_k
        )  # fmt: skip
        f_sum += tl.sum(fs).to(tl.float64)
        e_rising += tl.sum(tl.where(fs > 0.0, es, 0.0)).to(tl.float64)
        h += tl.sum(tl.maximum(alpha * fs - es, 0.0)).to(tl.float64)
    stays = 1.0 / (1.0 + tl.where(h > 0.0, h / e_sum * (alpha_k / alpha), 0.0))
    tl.store(stay + r, stays)
    u = tl.load(uniforms + 2 * r)
    if u < stays:
        tl.store(tokens + r, k)
        tl.store(log_prob + r, q_k.to(tl.float64) * scale * LOG2 - q_lse)
        tl.store(log_kernel + r, tl.log(stays))
        return

    over = (1.0 / u - 1.0) * e_sum  # inf for 0
    following = (e_rising + over) / f_sum
    alpha = tl.minimum(following, MOST_ALPHA).to(tl.float32)
    index = tl.arange(0, BLOCK)
    masses = tl.zeros((BLOCK,), tl.float64)
    state = 0  # 1: this is the last pass but one that found nothing; 2: done
    while state < 2:
        beside, total = zero, zero
        for tile in range(0, n_tiles):
            es, fs = tile_pair(
                logits, mask, masked, factual, tile, vocab, scale, top, q_k, factual_scale, factual_top, p_k
            )  # fmt: skip
            within = alpha * fs - es > 0.0
            mass = tl.sum(tl.where(within, fs, 0.0)).to(tl.float64)
            masses = tl.where(index == tile, mass, masses)
            total += mass
            beside += tl.sum(tl.where(within, es, 0.0)).to(tl.float64)
        following = (beside + over) / tl.where(total > 0.0, total, 1.0)
        lower = (total > 0.0) & (state == 0) & (following.to(tl.float32) < alpha)
        state = tl.where(total > 0.0, tl.where(lower, 0, 2), 1)
        alpha = tl.where(lower, following.to(tl.float32), tl.where(total > 0.0, alpha, alpha * (1.0 + 2.0**-20)))
    tile, u = invert_cdf(masses, index, tl.load(uniforms + 2 * r + 1), BLOCK)
    es, fs = tile_pair(logits, mask, masked, factual, tile, vocab, scale, top, q_k, factual_scale, factual_top, p_k)
    mass = tl.reshape(tl.where(alpha * fs - es > 0.0, fs, 0.0).to(tl.float64), (TILE,))
    offset, u = invert_cdf(mass, tl.arange(0, TILE), u, TILE)
    token = tile * TILE + offset
    tl.store(tokens + r, token.to(tl.int64))
    z_j = tl.load(logits + token).to(tl.float32).to(tl.float64) * scale
    y_j = tl.load(factual + token).to(tl.float32).to(tl.float64) * factual_scale - factual_top
    tl.store(log_prob + r, z_j * LOG2 - q_lse)

    z_j -= top
    start = tl.exp2(y_j - z_j)
    reference = tl.minimum(alpha_k, tl.maximum(2.0**20 * e_sum / f_sum, 2.0 * start))
    inverse = (1.0 / reference).to(tl.float32)
    start = tl.where(start < reference, start / reference, 1.0 - 2.0**-24)
    begin = tl.minimum(start.to(tl.float32), 1.0 - 2.0**-24)
    c = reference / e_sum
    least = (1e-12 / c).to(tl.float32)
    before, before_r = zero, zero
    bins += r * BINS * 3
    for tile in range(0, n_tiles):
        es, fs = tile_pair(
            logits, mask, masked, factual, tile, vocab, scale, top, q_k, factual_scale, factual_top, p_k
        )  # fmt: skip
        at = tl.where(fs > 0.0, es * inverse / tl.where(fs > 0.0, fs, 1.0), 1.0)
        earlier = tl.where(at < begin, fs, 0.0)
        before += tl.sum(earlier).to(tl.float64)
        before_r += tl.sum(earlier * at).to(tl.float64)
        found = (fs > least) & (at >= begin) & (at < 1.0)
        b = bin_of(at)
        end = begin_of(b - 1)
        units, ahead = fs.to(tl.float64) * UNIT, (end - at).to(tl.float64) / end
        tl.atomic_add(bins + b * 3, (units + 0.5).to(tl.int64), mask=found)
        tl.atomic_add(bins + b * 3 + 1, (units * ahead + 0.5).to(tl.int64), mask=found)
        tl.atomic_add(bins + b * 3 + 2, (units * ahead * ahead + 0.5).to(tl.int64), mask=found)
    left += r * LEFT
    tl.store(left, c)
    tl.store(left + 1, start)
    tl.store(left + 2, before)
    tl.store(left + 3, before_r)
    tl.store(left + 4, z_j * LOG2)
    # where H goes on behind the reference
    tl.store(left + 5, tl.where(alpha_k > reference, f_sum, 0.0))


@triton.jit
def integrate(stay, log_kernel, bins, left):
    r = tl.program_id(0).to(tl.int64)
    left += r * LEFT
    c, start = tl.load(left), tl.load(left + 1)
    if c == 0.0:  # no token, or k
        return
    b = -tl.arange(0, BINS) + (BINS - 1)  # from left to right
    upper = begin_of(b - 1).to(tl.float64)
    at = bins + (r * BINS + b) * 3
    mass, ahead, ahead2 = (
        tl.load(at).to(tl.float64) / UNIT, tl.load(at + 1).to(tl.float64) / UNIT * upper,
        tl.load(at + 2).to(tl.float64) / UNIT * upper * upper,
    )  # fmt: skip
    lower, upper = tl.maximum(begin_of(b).to(tl.float64), start), tl.maximum(upper, start)
    slope = tl.load(left + 2) + tl.cumsum(mass, 0) - mass
    width = upper - lower
    rises = slope * width + ahead
    h = tl.load(left + 2) * start - tl.load(left + 3) + tl.cumsum(rises, 0) - rises
    end = h + rises
    mean = h * width + 0.5 * (slope * width * width + ahead2)
    middle = 1.0 + 0.5 * c * (h + end)
    pieces = width / ((1.0 + c * h) * (1.0 + c * end))
    pieces += 2.0 * c * (0.5 * width * (h + end) - mean) / (middle * middle * middle)
    value = tl.sum(tl.where(width > 0.0, pieces, 0.0))
    f_sum = tl.load(left + 5)
    last = tl.sum(tl.where(b == 0, end, 0.0))
    tail = (1.0 / (1.0 + c * last) - tl.load(stay + r)) / (c * tl.where(f_sum > 0.0, f_sum, 1.0))
    value += tl.where(f_sum > 0.0, tail, 0.0)
    tl.store(log_kernel + r, tl.log(c * value) + tl.load(left + 4))


def redraw(c: Contrast, uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draws (tokens, stay, log_prob, log_kernel), as in fastsmc.ops.Redrawn."""
    m, device, n = c.matrices, c.logits.device, c.n_rows
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    stay, log_prob, log_kernel = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(3))
    if n == 0:
        return tokens, stay, log_prob, log_kernel
    rows = c.factual_rows
    if c.logit_rows is not None:  # where there is no row, the other indices are not looked at
        at = torch.arange(n, device=device) if rows is None else rows
        rows = torch.where(c.logit_rows < 0, -1, at)
    factual = Matrices(c.factual, rows, None, None, None, None)
    lse, lse_psi, tile_mass, max_psi = weigh(m, Temperatures.plain(c.temperature, c.temperatures), TILE.value)
    plain = Temperatures.plain(c.factual_temperature, c.factual_temperatures)
    factual_lse, _, _, factual_max = weigh(factual, plain, TILE.value)
    n_tiles = tile_mass.shape[1]
    bins = torch.zeros(n * BINS.value * 3, dtype=torch.int64, device=device)
    left = torch.zeros(n * LEFT.value, dtype=torch.float64, device=device)
    with on_device(device):
        redraw_one[(n,)](
            *row_arguments(m), c.factual, c.factual.stride(0), rows, c.tokens, c.logits.shape[1], n_tiles,
            *temperature_arguments(c.temperature, c.temperatures, lse),
            *temperature_arguments(c.factual_temperature, c.factual_temperatures, lse),
            lse_psi if m.reweighs else lse, max_psi, factual_lse, factual_max, uniforms, tokens, stay, log_prob,
            log_kernel, bins, left,
            BLOCK=triton.next_power_of_2(n_tiles), enable_fp_fusion=False, **config("redraw", m),
        )  # fmt: skip
        integrate[(n,)](stay, log_kernel, bins, left, enable_fp_fusion=False, **config("integrate", m))
    return tokens, stay, log_prob, log_kernel
