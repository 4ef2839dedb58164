"""draw: tokens from weighed rows by a two-level inverse CDF; arithmetic in csrc/include/fastsmc/draw.cuh.

One uniform per draw; only one tile of the row is read again. Several draws may use one row: children of one parent
take the uniforms of `stratify`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import (
    Matrices,
    Temperatures,
    check_index,
    check_matrices,
    check_uniforms,
    check_vector,
    custom_op,
    pick_backend,
    split_power,
)
from fastsmc.ops.weigh import TILE, Weighed

#: what is drawn from a row that has no mass
NO_TOKEN = -1


class Drawn(NamedTuple):
    """What `draw` gives for M draws.

    Attributes:
        tokens: (M,) int64; NO_TOKEN where there is no row, no mass, or NaN or +inf.
        log_prob: (M,) float64, log p0(token) = logit / T − lse; NaN without a token.
        log_psi: (M,) float64, the token's twist, 0 when there is none; NaN without a token.
    """

    tokens: Tensor
    log_prob: Tensor
    log_psi: Tensor


def draw(
    logits: Tensor,
    weighed: Weighed,
    rows: Tensor,
    uniforms: Tensor,
    log_psi: Tensor | None = None,
    *,
    logit_rows: Tensor | None = None,
    psi_rows: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    power: float | Tensor = 1.0,
    backend: str | None = None,
) -> Drawn:
    """Draws M tokens; draw j is from weighed row rows[j] by uniforms[j]. Never a token of zero mass.

    Args:
        weighed: what `weigh` returned for the same logits, log_psi, mask, row indices, temperature and power.
        rows: (M,) int64 in [0, R).
        uniforms: (M,) float64 in [0, 1).
        All others are as in `weigh`; vectors of temperatures and powers are one per weighed row, too.

    Raises:
        ValueError: naming the argument; values of rows, uniforms and vectors of temperatures are only checked on CPU
            tensors, outside torch.compile.
    """
    m = check_matrices(logits, log_psi, logit_rows, psi_rows, mask, mask_rows)
    t = split_power(temperature, power, m)
    device, n_tiles = logits.device, -(-logits.shape[1] // TILE)
    if weighed.tile_mass.shape != (m.n_rows, n_tiles):
        raise ValueError(
            f"weighed: tile_mass has shape {tuple(weighed.tile_mass.shape)}, these rows need {(m.n_rows, n_tiles)}"
        )
    lse = check_vector("weighed.lse", weighed.lse, torch.float64, device, m.n_rows)
    rows = check_index("rows", rows, m.n_rows, device)
    uniforms = check_uniforms(uniforms, device, rows.shape[0])
    backend = pick_backend(backend, device, "triton")
    tile_mass = weighed.tile_mass.contiguous()
    return Drawn(*_draw(device, *m, lse, tile_mass, rows, uniforms, *t, backend))


@custom_op("fastsmc::draw")
def _draw(
    logits: Tensor,
    logit_rows: Tensor | None,
    log_psi: Tensor | None,
    psi_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    lse: Tensor,
    tile_mass: Tensor,
    rows: Tensor,
    uniforms: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    powered: float,
    powered_rows: Tensor | None,
    powers: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    m = Matrices(logits, logit_rows, log_psi, psi_rows, mask, mask_rows)
    t = Temperatures(temperature, temperatures, powered, powered_rows, powers)
    if backend == "torch":
        return _torch.draw(m, lse, tile_mass, rows, uniforms, t, TILE)
    if backend == "triton":
        from fastsmc.kernels import draw as kernel

        return kernel.draw(m, lse, tile_mass, rows, uniforms, t, TILE)
    out = _empty(rows)
    _C.draw(
        *m.arguments(), logits.shape[1], t.arguments(), lse.data_ptr(), tile_mass.data_ptr(), rows.data_ptr(),
        uniforms.data_ptr(), rows.shape[0], *(x.data_ptr() for x in out),
    )  # fmt: skip
    return out


@_draw.register_fake
def _(
    logits, logit_rows, log_psi, psi_rows, mask, mask_rows, lse, tile_mass, rows, uniforms, temperature, temperatures,
    powered, powered_rows, powers, backend,
):  # fmt: skip
    return _empty(rows)


def _empty(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    log_prob, log_psi = (torch.empty_like(rows, dtype=torch.float64) for _ in range(2))
    return torch.empty_like(rows), log_prob, log_psi


def stratify(uniforms: Tensor, rank: Tensor, count: Tensor) -> Tensor:
    """Moves each uniform into its stratum, `rank` of `count`: (rank + u) / count, (M,) float64 in [0, 1).

    Args:
        uniforms: (M,) float64 in [0, 1).
        rank, count: (M,) int64, 0 <= rank < count: `Resampled.rank` and the parent's `Resampled.counts`.
    """
    # rank + u may round up to count
    return ((rank + uniforms) / count).clamp_(max=1.0 - 2.0**-53)
