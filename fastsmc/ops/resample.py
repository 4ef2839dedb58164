"""resample: offspring counts and ancestors from log weights; arithmetic in csrc/include/fastsmc/resample.cuh.

Every scheme has E[counts_i] = N W_i, computed on weights in 64-bit fixed point, so that counts are the same whatever
the order of the sums: W_i is exact up to 2^-41 of the largest weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import check_choice, check_uniforms, check_vector, pick_backend
from fastsmc.params import RESAMPLING_SCHEMES

ORDERS = ("inplace", "sorted")


class Resampled(NamedTuple):
    """Attributes:
    ancestors: (N,) int64, the parent of each slot.
    counts: (N,) int64, children of each particle; they sum to N.
    rank: (N,) int64, index of a slot among the children of its parent, in slot order.
    """

    ancestors: Tensor
    counts: Tensor
    rank: Tensor


def resample(
    log_weights: Tensor,
    uniforms: Tensor,
    *,
    scheme: str = "systematic",
    order: str = "inplace",
    backend: str | None = None,
) -> Resampled:
    """Resamples N particles.

    Schemes: 'systematic' counts floor(N·C_i + u_0) with one uniform; 'stratified' has one uniform per stratum;
    'multinomial' N independent draws; 'residual' floor(N W_i) copies and the rest multinomial on the remainders; 'ssp'
    the Srinivasan sampling process (sequential: the 'torch' backend runs it on the host).

    Orders: 'inplace' has ancestors[i] = i wherever counts[i] > 0, and the r-th dead slot takes the r-th surplus child;
    'sorted' repeats i counts[i] times.

    Args:
        log_weights: (N,) float64, 1 <= N <= 2**20, unnormalised; −inf has no offspring.
        uniforms: (N,) float64 in [0, 1); 'systematic' uses the first, 'ssp' the first N − 1, 'residual' as many as
            there are draws left.

    Raises:
        ValueError: naming the argument and its value; NaN or +inf by particle index; all −inf.

    Sources: Douc & Cappé 2005; Gerber, Chopin & Whiteley 2019 (SSP); Murray, Lee & Jacob 2016 (in-place ancestors).
    """
    check_choice("scheme", scheme, RESAMPLING_SCHEMES)
    check_choice("order", order, ORDERS)
    log_weights = _check_log_weights(log_weights)
    n, device = log_weights.shape[0], log_weights.device
    if n > 2**20:
        raise ValueError(f"log_weights: has {n} elements, at most {2**20} are supported")
    if torch.isneginf(log_weights).all():
        raise ValueError(f"log_weights: all {n} are -inf, no particle has any weight")
    uniforms = check_uniforms(uniforms, device, n)
    if pick_backend(backend, device) == "torch":
        return Resampled(*_torch.resample(log_weights, uniforms, scheme, order))
    ancestors, counts, rank = (torch.empty(n, dtype=torch.int64) for _ in range(3))
    _C.resample(
        log_weights.data_ptr(), uniforms.data_ptr(), n, scheme, order == "sorted", ancestors.data_ptr(), 
        counts.data_ptr(), rank.data_ptr(),
    )  # fmt: skip
    return Resampled(ancestors, counts, rank)


def ess_log_mean(log_weights: Tensor, *, backend: str | None = None) -> tuple[float, float]:
    """((Σw)²/Σw², logsumexp(log_weights) − log N); (0.0, −inf) when all are −inf.

    Args:
        log_weights: (N,) float64.

    Raises:
        ValueError: NaN or +inf, naming the particle.
    """
    log_weights = _check_log_weights(log_weights)
    if pick_backend(backend, log_weights.device) == "torch":
        return _torch.ess_log_mean(log_weights)
    return _C.ess_log_mean(log_weights.data_ptr(), log_weights.shape[0])


def _check_log_weights(log_weights: Tensor) -> Tensor:
    log_weights = check_vector("log_weights", log_weights, torch.float64, log_weights.device)
    n = log_weights.shape[0]
    if n == 0:
        raise ValueError("log_weights: is empty")
    if log_weights.device.type == "cpu":
        bad = _C.bad_log_weight(log_weights.data_ptr(), n)
    else:
        is_bad = log_weights.isnan() | log_weights.isposinf()
        bad = int(is_bad.int().argmax()) if is_bad.any() else -1
    if bad >= 0:
        raise ValueError(f"log_weights[{bad}]={log_weights[bad].item()}: particle {bad} must be finite or -inf")
    return log_weights
