"""weigh: normalisers and tile masses of logits under twists, in one pass; arithmetic in csrc/include/fastsmc/weigh.cuh.

The twist-induced proposal's incremental weight is exp(lse_psi - lse) / ψ_{t-1}; it needs no token. The tile masses are
what `draw` searches first.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import check_matrices, check_temperature, pick_backend

#: tokens per tile of `Weighed.tile_mass`; the last tile may be shorter
TILE: int = _C.TILE


class Weighed(NamedTuple):
    """Rows weighed by `weigh`, z = logits / T and x = z + log_psi.

    Attributes:
        lse: (R,) float64, log Σ_v exp(z_v).
        lse_psi: (R,) float64, log Σ_v exp(x_v); the same tensor as `lse` without a twist.
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
    temperature: float = 1.0,
    backend: str | None = None,
) -> Weighed:
    """Weighs R rows: row r is logits[logit_rows[r]] under log_psi[psi_rows[r]]. Elements in float32, sums in float64.

    A row without mass has lse_psi = −inf, masses 0 and max_psi = −inf. NaN or +inf in a row (also +inf reached by
    dividing by a small temperature) makes lse_psi and max_psi NaN and masses 0, and lse NaN if it is in the logits.

    Args:
        logits: (L, V) float32, bfloat16 or float16; any row stride, unit column stride. −inf: no mass.
        log_psi: (M, V), the same dtypes and strides (row stride 0 too), or float64, which is rounded to float32.
        logit_rows: (R,) int64 in [0, L); default the identity, R = L.
        psi_rows: (R,) int64 in [0, M); default the identity, then M = R.
        temperature: > 0.
        backend: 'cpu', 'torch' or None for the device's own.

    Raises:
        ValueError: naming the argument; index ranges are only checked on CPU tensors.
    """
    m = check_matrices(logits, log_psi, logit_rows, psi_rows)
    temperature = check_temperature(temperature)
    if pick_backend(backend, logits.device) == "torch":
        return Weighed(*_torch.weigh(m, temperature, TILE))
    vocab = logits.shape[1]
    lse = torch.empty(m.n_rows, dtype=torch.float64)
    lse_psi = lse if log_psi is None else torch.empty_like(lse)
    tile_mass = torch.empty(m.n_rows, -(-vocab // TILE), dtype=torch.float64)
    max_psi = torch.empty(m.n_rows, dtype=torch.float32)
    _C.weigh(
        *m.arguments(), m.n_rows, vocab, temperature, lse.data_ptr(), lse_psi.data_ptr(), tile_mass.data_ptr(),
        max_psi.data_ptr(),
    )  # fmt: skip
    return Weighed(lse, lse_psi, tile_mass, max_psi)
