"""draw in Triton: one program per draw does the two-level inverse CDF of csrc/include/fastsmc/draw.cuh.

    tile masses → the tile that the target falls in, and the fraction of its mass left of the target (float64)
    → the scores of that tile once more, as weigh had them → the token → its logit and log ψ

Cumulative sums are tree-shaped here and sequential in C++, so the two may take neighbouring tokens where a target lies
within a rounding of a boundary. A tree-shaped sum need not be monotone, so only cells with mass are candidates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastsmc.kernels.launch import config, on_device, temperature_arguments
from fastsmc.kernels.weigh import LOG2, TILE, exp2_below, max_of, power_of, row_arguments, row_of, scale_of, tile_scores
from torch import Tensor

if TYPE_CHECKING:
    from fastsmc.ops._tensors import Matrices, Temperatures


@triton.jit
def invert_cdf(mass, index, u, SIZE: tl.constexpr):
    """Finds the first k with mass[0] + … + mass[k] > u · total, and which fraction of mass[k] is left of the target.

    Rounding past the end gives the last k with mass; no mass at all gives −1. mass is (SIZE,) float64, index counts it.
    """
    upto = tl.cumsum(mass, 0)
    target = u * tl.sum(tl.where(index == SIZE - 1, upto, 0.0))
    first = tl.min(tl.where((mass > 0.0) & (upto > target), index, SIZE))
    k = tl.minimum(first, tl.max(tl.where(mass > 0.0, index, -1)))
    here = tl.sum(tl.where(index == k, mass, 0.0))
    before = tl.sum(tl.where(index == k, upto, 0.0)) - here
    fraction = (target - before) / tl.where(k < 0, 1.0, here)
    return k, tl.minimum(tl.maximum(fraction, 0.0), 1.0)


@triton.jit(do_not_specialize=["temperatures", "n_temperatures", "powereds", "n_powered"])
def draw_one(
    logits, logit_stride, logit_rows, psi, psi_stride, psi_rows, mask, mask_stride, mask_rows,
    vocab, n_tiles, scale, temperatures, n_temperatures, powered, powereds, n_powered, lse, tile_mass, rows, uniforms,
    tokens, log_prob, log_psi,
    BLOCK: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0).to(tl.int64)
    r = tl.load(rows + j)
    k = tl.arange(0, BLOCK)
    masses = tl.load(tile_mass + r * n_tiles + k, mask=k < n_tiles, other=0.0)
    tile, u = invert_cdf(masses, k, tl.load(uniforms + j), BLOCK)
    if tile < 0:
        tl.store(tokens + j, -1)
        tl.store(log_prob + j, float("nan"))
        tl.store(log_psi + j, float("nan"))
        return
    logits = row_of(logits, logit_stride, logit_rows, r)
    if psi is not None:
        psi = row_of(psi, psi_stride, psi_rows, r)
    masked = vocab
    if mask is not None:
        if mask_rows is not None:
            masked = tl.where(tl.load(mask_rows + r) < 0, 0, vocab)
        mask = row_of(mask, mask_stride, mask_rows, r)
    scale = scale_of(scale, temperatures, n_temperatures, r)
    power = power_of(scale_of(powered, powereds, n_powered, r), scale)
    _, x = tile_scores(logits, psi, mask, masked, tile, vocab, scale, power, True, False, False)
    mass = tl.reshape(exp2_below(x, max_of(x)).to(tl.float64), (TILE,))
    offset, u = invert_cdf(mass, tl.arange(0, TILE), u, TILE)
    token = tile * TILE + offset
    tl.store(tokens + j, token.to(tl.int64))
    logit = tl.load(logits + token).to(tl.float32).to(tl.float64)
    tl.store(log_prob + j, logit * scale * LOG2 - tl.load(lse + r))
    if psi is not None:
        tl.store(log_psi + j, tl.load(psi + token).to(tl.float32).to(tl.float64))
    else:
        tl.store(log_psi + j, 0.0)


def draw(
    m: Matrices,
    lse: Tensor,
    tile_mass: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    t: Temperatures,
    tile: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws (tokens, log_prob, log_psi), as in fastsmc.ops.Drawn."""
    assert tile == TILE.value
    n, device = rows.shape[0], m.logits.device
    tokens = torch.empty(n, dtype=torch.int64, device=device)
    log_prob, log_psi = (torch.empty(n, dtype=torch.float64, device=device) for _ in range(2))
    if n == 0:
        return tokens, log_prob, log_psi
    with on_device(device):
        draw_one[(n,)](
            *row_arguments(m), m.logits.shape[1], tile_mass.shape[1],
            *temperature_arguments(t.all, t.rows, lse), *temperature_arguments(t.powered, t.powered_rows, lse),
            lse, tile_mass, rows, uniforms, tokens, log_prob, log_psi,
            BLOCK=triton.next_power_of_2(tile_mass.shape[1]), enable_fp_fusion=False, **config("draw", m),
        )  # fmt: skip
    return tokens, log_prob, log_psi
