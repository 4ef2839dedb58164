"""weigh: normalisers and tile masses of logits under twists, in one pass; see csrc/include/fastsmc/weigh.cuh.

The twisted proposal's incremental weight is exp(lse_psi - lse) / ψ_{t-1}; it needs no token. The tile masses are what
`draw` searches first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import Matrices, Temperatures, check_matrices, custom_op, pick_backend, split_power

#: tokens per tile of `Weighed.tile_mass`; the last tile may be shorter
TILE: int = _C.TILE


class Weighed(NamedTuple):
    """What `weigh` gives for R rows, with z = logits / T and x = α z + log_psi, which is −inf where masked.

    Attributes:
        lse: (R,) float64, log Σ_v exp(z_v); neither mask nor power enters it.
        lse_psi: (R,) float64, log Σ_v exp(x_v); the same tensor as `lse` without twist, mask and power.
        tile_mass: (R, ceil(V / TILE)) float64, Σ_{v in tile} exp(x_v − max_psi).
        max_psi: (R,) float32, max_v x_v.
    """

    lse: Tensor
    lse_psi: Tensor
    tile_mass: Tensor
    max_psi: Tensor


def weigh(
    logits: Tensor,
    log_psi: Tensor | None = None,
    *,
    logit_rows: Tensor | None = None,
    psi_rows: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    power: float | Tensor = 1.0,
    backend: str | None = None,
) -> Weighed:
    """Weighs R rows: row r is logits[logit_rows[r]] under log_psi[psi_rows[r]], where mask[mask_rows[r]] allows.

    Elements are float32, sums float64. A row without mass has lse_psi = −inf, masses 0 and max_psi = −inf. NaN or +inf
    in a row (also +inf that a small temperature makes of a finite logit) gives lse_psi and max_psi NaN and masses 0;
    lse is NaN only if it is in the logits.

    Args:
        logits: (L, V) float32, bfloat16 or float16; any row stride, unit column stride. −inf: no mass.
        log_psi: (M, V), the same dtypes and strides (row stride 0 too), or float64, which is rounded to float32.
        logit_rows: (R,) int64 in [−1, L); default the identity, R = L. −1 stands for no row: nothing is read, the other
            indices are ignored, lse = lse_psi = max_psi = −inf and masses are 0. So a batch of fixed shape may have
            holes.
        psi_rows: (R,) int64 in [0, M); default the identity, then M = R.
        mask: (B, ceil(V / 32)) int32: a token v is allowed where bit v % 32 of word v // 32 is set, else its log ψ is
            −inf; bits behind V are ignored. The format of xgrammar and llguidance.
        mask_rows: (R,) int64 in [−1, B); default the identity, then B = R. −1: all tokens are allowed.
        temperature: > 0, for all rows, or (R,) float64, one per output row: each row then has the bits that its own
            number gives to all. That of a row without logits is not looked at.
        power: α > 0, for all rows, or (R,) float64, one per output row: x has α z, so that lse_psi − α·lse is the log
            of Σ_v p0(v)^α ψ(v). Where α is 1, x has the bits that it has without powers.
        backend: 'cpu', 'triton' (CUDA tensors; others under TRITON_INTERPRET=1), 'torch', or None for the device's own.

    Raises:
        ValueError: naming the argument; index ranges and vectors of temperatures are only checked on CPU tensors,
            outside torch.compile.
    """
    m = check_matrices(logits, log_psi, logit_rows, psi_rows, mask, mask_rows)
    t = split_power(temperature, power, m)
    backend = pick_backend(backend, logits.device, "triton")
    lse, lse_psi, tile_mass, max_psi = _weigh(logits.device, *m, *t, backend)
    return Weighed(lse, lse_psi if m.reweighs or t.powers else lse, tile_mass, max_psi)


# This is the op that torch.compile and CUDA graphs see. Its results must not alias each other, so without twist, mask
# and power its lse_psi is empty; `weigh` then returns lse twice.
@custom_op("fastsmc::weigh")
def _weigh(
    logits: Tensor,
    logit_rows: Tensor | None,
    log_psi: Tensor | None,
    psi_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    temperature: float,
    temperatures: Tensor | None,
    powered: float,
    powered_rows: Tensor | None,
    powers: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m = Matrices(logits, logit_rows, log_psi, psi_rows, mask, mask_rows)
    t = Temperatures(temperature, temperatures, powered, powered_rows, powers)
    if backend == "torch":
        return _torch.weigh(m, t, TILE)
    if backend == "triton":
        from fastsmc.kernels import weigh as kernel  # Triton takes its time to import, and CPU users need none

        return kernel.weigh(m, t, TILE)
    out = _empty(m, powers)
    _C.weigh(*m.arguments(), m.n_rows, logits.shape[1], t.arguments(), *(x.data_ptr() for x in out))
    return out


@_weigh.register_fake
def _(
    logits, logit_rows, log_psi, psi_rows, mask, mask_rows, temperature, temperatures, powered, powered_rows, powers,
    backend,
):  # fmt: skip
    return _empty(Matrices(logits, logit_rows, log_psi, psi_rows, mask, mask_rows), powers)


def _empty(m: Matrices, powers: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lse = m.logits.new_empty(m.n_rows, dtype=torch.float64)
    return (
        lse,
        lse.new_empty(m.n_rows if m.reweighs or powers else 0),
        lse.new_empty(m.n_rows, -(-m.logits.shape[1] // TILE)),
        lse.new_empty(m.n_rows, dtype=torch.float32),
    )
