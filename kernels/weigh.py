"""weigh in Triton: two launches that do what csrc/include/fastsmc/weigh.cuh says.

    scan   program (row, part): streams a few tiles of a row, once, and writes each tile's maximum and its sum of
           exponentials relative to it, (R, K) float32 each: those of base + twist, and with a twist or a mask also
           those of the base alone
    join   program row: makes lse, lse_psi, tile_mass and max_psi from the K partials of a row

Scores are float32 in units of log 2. A tile is summed by itself and in a fixed order, so a row's result depends neither
on the number of rows, nor on the row's place, nor on how many tiles a program takes. num_warps sets that order, so it
is a constant per data type; the number of tiles per program may follow the size of the batch. Nothing may be contracted
into a fused multiply-add except where `tl.fma` says so: the score that is exponentiated must be the very number whose
maximum was taken, here and again in draw. (The head of weigh.cuh says what goes wrong otherwise.)

A tile is held as 32 mask words by 32 tokens, so that a mask bit meets its token without any exchange between threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from fastsmc.kernels.launch import config, on_device, temperature_arguments
from torch import Tensor

if TYPE_CHECKING:
    from fastsmc.ops._tensors import Matrices, Temperatures

#: Rows are cut into parts until there are about so many programs: eight warps or more for each of 132 × 4 schedulers.
PROGRAMS = 4096

TILE = tl.constexpr(1024)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))


@triton.jit
def row_of(matrix, stride, rows, r):
    """Gives the address of the row of `matrix` that output row r uses."""
    if rows is None:
        index = r
    else:
        index = tl.load(rows + r)
    return matrix + index * stride


@triton.jit
def scale_of(scale, temperatures, n_temperatures, r):
    """Computes what logit_scale in weigh.cuh does for output row r; without temperatures it is `scale`, for all.

    One kernel serves both, since each variant must be compiled: where there are none, nothing is loaded. A division in
    float64 would be a call, whose registers cost resident warps; so the quotient is made as such a call makes it, from
    a reciprocal in float32, by two of Newton's steps, and then by what is left of LOG2E.
    """
    t = tl.load(temperatures + r, mask=r < n_temperatures, other=1.0)
    one, log2e = tl.full((), 1.0, tl.float64), tl.full((), 1.4426950408889634, tl.float64)
    inverse = (1.0 / t.to(tl.float32)).to(tl.float64)
    inverse = tl.fma(inverse, tl.fma(-t, inverse, one), inverse)
    inverse = tl.fma(inverse, tl.fma(-t, inverse, one), inverse)
    quotient = log2e * inverse
    quotient = tl.fma(tl.fma(-t, quotient, log2e), inverse, quotient)
    return tl.where(n_temperatures > 0, quotient.to(tl.float32), scale)


@triton.jit
def power_of(powered, scale):
    """Computes what z is multiplied by in x: exactly 1 where there is no power."""
    return tl.where(powered == scale, 1.0, powered / scale)


@triton.jit
def tile_scores(
    logits, psi, mask, masked, tile, vocab, scale, power,
    TAIL: tl.constexpr, LOGITS_ONCE: tl.constexpr, PSI_ONCE: tl.constexpr,
):  # fmt: skip
    """Computes the scores (z, x), (32, 32) float32 each, of one tile of a row; −inf behind the end of the row.

    logits, psi and mask are the addresses of the row. masked is how many tokens the mask covers: all of them, or none.
    scale is what logits are multiplied by in z, and power what z is multiplied by in x.
    """
    word, bit = tl.arange(0, 32)[:, None], tl.arange(0, 32)[None, :]
    column = tile * TILE + word * 32 + bit
    inside = column < vocab
    logits_policy: tl.constexpr = "evict_first" if LOGITS_ONCE else ""
    psi_policy: tl.constexpr = "evict_first" if PSI_ONCE else ""
    if TAIL:
        logit = tl.load(logits + column, mask=inside, other=-INF, eviction_policy=logits_policy)
    else:
        logit = tl.load(logits + column, eviction_policy=logits_policy)
    z = logit.to(tl.float32) * scale
    x = z * power
    if psi is not None or mask is not None:
        twist = tl.zeros((32, 32), tl.float32)
        if psi is not None:
            if TAIL:
                twist = tl.load(psi + column, mask=inside, other=0.0, eviction_policy=psi_policy).to(tl.float32)
            else:
                twist = tl.load(psi + column, eviction_policy=psi_policy).to(tl.float32)
        if mask is not None:
            words = tile * 32 + tl.arange(0, 32)
            allowed = tl.load(mask + words, mask=words * 32 < masked, other=-1)
            twist = tl.where((allowed[:, None] >> bit) & 1 != 0, twist, -INF)
        x = tl.fma(twist, LOG2E, x)
    return z, x


@triton.jit
def max_of(x):
    return tl.max(x)


@triton.jit
def exp2_below(x, top):
    """Computes 2^(x − top), top the maximum of x; a maximum of −inf gives zeros, NaN and +inf give NaN."""
    return tl.exp2(x - tl.where(top == -INF, 0.0, top))


@triton.jit
def scan_tile(
    logits, psi, mask, masked, tile, vocab, scale, power, at, maxima, sums, base_maxima, base_sums,
    TAIL: tl.constexpr, LOGITS_ONCE: tl.constexpr, PSI_ONCE: tl.constexpr,
):  # fmt: skip
    z, x = tile_scores(logits, psi, mask, masked, tile, vocab, scale, power, TAIL, LOGITS_ONCE, PSI_ONCE)
    top = max_of(x)
    tl.store(maxima + at, top)
    tl.store(sums + at, tl.sum(exp2_below(x, top)))
    if base_sums is not None:
        top = max_of(z)
        tl.store(base_maxima + at, top)
        tl.store(base_sums + at, tl.sum(exp2_below(z, top)))


@triton.jit(do_not_specialize=["tiles", "temperatures", "n_temperatures", "powereds", "n_powered"])
def scan(
    logits, logit_stride, logit_rows, psi, psi_stride, psi_rows, mask, mask_stride, mask_rows,
    vocab, n_tiles, tiles, scale, temperatures, n_temperatures, powered, powereds, n_powered,
    maxima, sums, base_maxima, base_sums,
    LOGITS_ONCE: tl.constexpr, PSI_ONCE: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(n_tiles, tiles)
    r = (tl.program_id(0) // parts).to(tl.int64)
    first = tl.program_id(0) % parts * tiles
    if logit_rows is not None:
        if tl.load(logit_rows + r) < 0:
            return
    scale = scale_of(scale, temperatures, n_temperatures, r)
    power = power_of(scale_of(powered, powereds, n_powered, r), scale)
    logits = row_of(logits, logit_stride, logit_rows, r)
    if psi is not None:
        psi = row_of(psi, psi_stride, psi_rows, r)
    masked = vocab
    if mask is not None:
        if mask_rows is not None:
            masked = tl.where(tl.load(mask_rows + r) < 0, 0, vocab)
        mask = row_of(mask, mask_stride, mask_rows, r)
    full = vocab // TILE
    for tile in range(first, min(first + tiles, full)):
        scan_tile(
            logits, psi, mask, masked, tile, vocab, scale, power, r * n_tiles + tile, maxima, sums, base_maxima,
            base_sums, False, LOGITS_ONCE, PSI_ONCE,
        )  # fmt: skip
    if (first <= full) & (full < min(first + tiles, n_tiles)):
        scan_tile(
            logits, psi, mask, masked, full, vocab, scale, power, r * n_tiles + full, maxima, sums, base_maxima,
            base_sums, True, LOGITS_ONCE, PSI_ONCE,
        )  # fmt: skip


@triton.jit
def join_tiles(maxima, sums, inside):
    """Does what join_tiles in weigh.cuh does; gives (log Σ, masses relative to the row's maximum, that maximum in units
    of log 2)."""
    tops = tl.load(maxima, mask=inside, other=-INF)
    mass = tl.load(sums, mask=inside, other=0.0)
    bad = tl.max((mass != mass).to(tl.int32)) != 0
    top = tl.max(tl.where(bad, -INF, tops)).to(tl.float64)
    shift = tl.where(top == -INF, 0.0, top)
    mass = tl.where((mass > 0.0) & (not bad), mass.to(tl.float64) * tl.exp2(tops.to(tl.float64) - shift), 0.0)
    total = tl.sum(mass)
    lse = tl.where(total > 0.0, top * LOG2 + tl.log(tl.where(total > 0.0, total, 1.0)), -INF)
    return tl.where(bad, float("nan"), lse), mass, tl.where(bad, float("nan"), top)


@triton.jit
def join(
    logit_rows, n_tiles, maxima, sums, base_maxima, base_sums, lse, lse_psi, tile_mass, max_psi, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    at = r * n_tiles + k
    written = n_tiles
    if logit_rows is not None:
        written = tl.where(tl.load(logit_rows + r) < 0, 0, n_tiles)  # no row: no partials
    inside = k < written
    total, mass, top = join_tiles(maxima + at, sums + at, inside)
    tl.store(tile_mass + at, mass, mask=k < n_tiles)
    tl.store(max_psi + r, (top * LOG2).to(tl.float32))
    if base_sums is not None:
        tl.store(lse_psi + r, total)
        total, mass, top = join_tiles(base_maxima + at, base_sums + at, inside)
    tl.store(lse + r, total)


def read_once(matrix: Tensor | None, n_rows: int) -> bool:
    """Says whether rows of `matrix` are read about once, so that the cache should give them up first."""
    return matrix is not None and matrix.stride(0) != 0 and matrix.shape[0] >= n_rows


def row_arguments(m: Matrices) -> tuple[Tensor | int | None, ...]:
    """Gives the matrices as kernels take them: (matrix, row stride, row index or None) of logits, log_psi and mask."""
    return (
        m.logits, m.logits.stride(0), m.logit_rows,
        m.log_psi, 0 if m.log_psi is None else m.log_psi.stride(0), m.psi_rows,
        m.mask, 0 if m.mask is None else m.mask.stride(0), m.mask_rows,
    )  # fmt: skip


def weigh(m: Matrices, t: Temperatures, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes (lse, lse_psi, tile_mass, max_psi) of fastsmc.ops.Weighed; lse_psi is empty where it would equal lse.

    The first call for a new set of data types compiles, and for each of LOGITS_ONCE and PSI_ONCE, so it must come
    before a CUDA graph is captured.
    """
    assert tile == TILE.value
    n, vocab, device = m.n_rows, m.logits.shape[1], m.logits.device
    n_tiles = -(-vocab // tile)
    chosen = config("weigh", m)
    tiles = max(1, min(chosen["tiles"], n * n_tiles // PROGRAMS))
    reweighs = m.reweighs or t.powers
    lse, lse_psi = (torch.empty(size, dtype=torch.float64, device=device) for size in (n, n if reweighs else 0))
    tile_mass = torch.empty(n, n_tiles, dtype=torch.float64, device=device)
    max_psi = torch.empty(n, dtype=torch.float32, device=device)
    if n == 0:
        return lse, lse_psi, tile_mass, max_psi
    # each at an address divisible by 16 bytes, whatever n is: what Triton compiles hangs on that
    partials = torch.empty(4 if reweighs else 2, -(-n * n_tiles // 4) * 4, dtype=torch.float32, device=device)
    partials = [*partials, None, None][:4]
    with on_device(device):
        scan[(n * -(-n_tiles // tiles),)](
            *row_arguments(m), vocab, n_tiles, tiles, *temperature_arguments(t.all, t.rows, lse),
            *temperature_arguments(t.powered, t.powered_rows, lse), *partials,
            LOGITS_ONCE=read_once(m.logits, n), PSI_ONCE=read_once(m.log_psi, n),
            num_warps=chosen["num_warps"], enable_fp_fusion=False,
        )  # fmt: skip
        block = triton.next_power_of_2(n_tiles)
        join[(n,)](
            m.logit_rows, n_tiles, *partials, lse, lse_psi, tile_mass, max_psi,
            BLOCK=block, num_warps=1 if block <= 256 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return lse, lse_psi, tile_mass, max_psi
