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
    check_index,
    check_matrices,
    check_temperature,
    check_uniforms,
    check_vector,
    pick_backend,
)
from fastsmc.ops.weigh import TILE, Weighed

#: token of a row that has no mass
NO_TOKEN = -1


class Drawn(NamedTuple):
    """Attributes:
    tokens: (M,) int64; NO_TOKEN where the row has no mass or holds NaN or +inf.
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
    temperature: float = 1.0,
    backend: str | None = None,
) -> Drawn:
    """Draws M tokens; draw j is from weighed row rows[j] by uniforms[j]. Never a token of zero mass.

    Args:
        weighed: what `weigh` returned for the same logits, log_psi, logit_rows, psi_rows and temperature.
        rows: (M,) int64 in [0, R).
        uniforms: (M,) float64 in [0, 1).
        The others: as in `weigh`.

    Raises:
        ValueError: naming the argument; values of rows and uniforms are only checked on CPU tensors.
    """
    m = check_matrices(logits, log_psi, logit_rows, psi_rows)
    temperature = check_temperature(temperature)
    device, vocab = logits.device, logits.shape[1]
    if weighed.tile_mass.shape != (m.n_rows, -(-vocab // TILE)):
        raise ValueError(
            f"weighed: tile_mass has shape {tuple(weighed.tile_mass.shape)}, these rows need "
            f"{(m.n_rows, -(-vocab // TILE))}"
        )
    rows = check_index("rows", rows, m.n_rows, device)
    n = rows.shape[0]
    uniforms = check_uniforms(uniforms, device, n)
    if pick_backend(backend, device) == "torch":
        return Drawn(*_torch.draw(m, weighed, rows, uniforms, temperature, TILE))
    lse = check_vector("weighed.lse", weighed.lse, torch.float64, device, m.n_rows)
    tile_mass = weighed.tile_mass.contiguous()
    tokens = torch.empty(n, dtype=torch.int64)
    log_prob, log_psi_drawn = torch.empty(n, dtype=torch.float64), torch.empty(n, dtype=torch.float64)
    _C.draw(
        *m.arguments(), vocab, temperature, lse.data_ptr(), tile_mass.data_ptr(), rows.data_ptr(), uniforms.data_ptr(),
        n, tokens.data_ptr(), log_prob.data_ptr(), log_psi_drawn.data_ptr(),
    )  # fmt: skip
    return Drawn(tokens, log_prob, log_psi_drawn)


def stratify(uniforms: Tensor, rank: Tensor, count: Tensor) -> Tensor:
    """(M,) float64 in [0, 1): (rank + u) / count, stratum `rank` of `count`.

    Args:
        uniforms: (M,) float64 in [0, 1).
        rank, count: (M,) int64, 0 <= rank < count: `Resampled.rank` and the parent's `Resampled.counts`.
    """
    # rank + u may round up to count
    return ((rank + uniforms) / count).clamp_(max=1.0 - 2.0**-53)
