"""resample: offspring counts and ancestors from log weights; the arithmetic is in csrc/include/fastsmc/resample.cuh.

Every scheme has E[counts_i] = N W_i, computed on weights in 64-bit fixed point, so that counts are the same whatever
the order of the sums: W_i is exact up to 2^-41 of the largest weight.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import (
    check_choice,
    check_offsets,
    check_vector,
    custom_op,
    launch_cuda,
    pick_backend,
    read_address,
    values_are_checked,
)
from fastsmc.params import RESAMPLING_SCHEMES

MAX_PARTICLES = 2**20


class Resampled(NamedTuple):
    """What `resample` gives for one group; with G groups every shape begins with G.

    With offsets the first three are flat, (M,), and the others (G,).

    Attributes:
        ancestors: (N,) int64, the parent of each new row; with offsets its flat position.
        counts: (N,) int64, children of each particle; they sum to N.
        rank: (N,) int64, which child of its parent a new row is, in the order of the rows.
        ess: () float64, (Σw)²/Σw² of the weights.
        log_mean: () float64, logsumexp(log_weights) − log N.
        resampled: () bool; where false, ancestors are the identity, counts 1 and ranks 0.
    """

    ancestors: Tensor
    counts: Tensor
    rank: Tensor
    ess: Tensor
    log_mean: Tensor
    resampled: Tensor


def resample(
    log_weights: Tensor,
    uniforms: Tensor,
    *,
    scheme: str = "systematic",
    threshold: float | Tensor | None = None,
    offsets: Tensor | None = None,
    largest: int | None = None,
    backend: str | None = None,
) -> Resampled:
    """Resamples N particles, or G groups of them, each as if it were alone.

    Groups of several sizes lie flat, one behind the other, and `offsets` says where. A group without a particle has
    ESS 0 and log mean −inf and is not resampled.

    Schemes: 'systematic' counts floor(N·C_i + u_0) with one uniform; 'stratified' has one uniform per stratum;
    'multinomial' N independent draws; 'residual' floor(N W_i) copies and the rest multinomial on the remainders; 'ssp'
    the Srinivasan sampling process (sequential: one thread; the 'torch' backend runs it on the host).

    Ancestors are in place: ancestors[i] = i wherever counts[i] > 0, the r-th dead slot takes the r-th surplus child.
    `reindex` needs that, and half as many rows move as with sorted ancestors (bench/bench_order.py).

    A group without any mass has ESS 0 and log mean −inf and is not resampled. Off the CPU values are not checked, which
    would mean waiting for the device: a group with NaN or +inf has ESS and log mean NaN and is not resampled.

    Args:
        log_weights: (N,) or (G, N) float64, 1 <= N <= 2**20, unnormalised; −inf has no offspring. With offsets (M,).
        uniforms: float64 in [0, 1), of the shape of log_weights. In each group 'systematic' uses the first, 'ssp' the
            first N − 1, 'residual' as many as there are draws left.
        threshold: groups with ESS < threshold·N are resampled, all of them with 1; the device decides. None is 1, and
            on the CPU a group of particles without any mass is an error then. Of groups it may be (G,) float64.
        offsets: (G + 1,) int64, from 0 up to M: group g has the places [offsets[g], offsets[g + 1]), at most 2**20.
        largest: with offsets, a bound on the particles of a group; default M. It sizes memory on a GPU, where a group
            of more is left out: what it gets is not defined.

    Raises:
        ValueError: naming the argument and its value; on the CPU NaN or +inf by particle and group. Values of tensors
            are only checked on the CPU, outside torch.compile.

    Sources: Douc & Cappé 2005; Gerber, Chopin & Whiteley 2019 (SSP); Murray, Lee & Jacob 2016 (in-place ancestors).
    """
    check_choice("scheme", scheme, RESAMPLING_SCHEMES)
    log_weights, offsets, largest = _check_groups(log_weights, offsets, largest)
    if largest > MAX_PARTICLES:
        raise ValueError(f"log_weights: has {largest} particles per group, at most {MAX_PARTICLES} are supported")
    device = log_weights.device
    always, thresholds = _split_threshold(threshold, log_weights, offsets)
    uniforms = _check_float64("uniforms", uniforms, log_weights)
    if values_are_checked(device) and (bad := _C.bad_uniform(uniforms.data_ptr(), uniforms.numel())) >= 0:
        index = _index(uniforms, bad)
        raise ValueError(f"uniforms[{', '.join(map(str, index))}]={uniforms[index].item()}: must be in [0, 1)")
    backend = pick_backend(backend, device, "cuda")
    done = Resampled(*_resample(device, log_weights, uniforms, scheme, always, thresholds, offsets, largest, backend))
    if threshold is None and values_are_checked(device):
        stays = ~done.resampled if offsets is None else ~done.resampled & (offsets.diff() > 0)
        if stays.any():
            g = int(stays.int().argmax())
            group = "" if stays.dim() == 0 else f" of group {g}"
            n = log_weights.shape[-1] if offsets is None else int(offsets[g + 1] - offsets[g])
            raise ValueError(f"log_weights: all {n}{group} are -inf, no particle has any weight")
    return done


@custom_op("fastsmc::resample")
def _resample(
    log_weights: Tensor, uniforms: Tensor, scheme: str, threshold: float, thresholds: Tensor | None,
    offsets: Tensor | None, largest: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    out = _outputs(log_weights, offsets)
    groups = out[3].numel()
    if groups == 0:
        return out
    if backend == "torch":
        return _torch.resample(log_weights, uniforms, scheme, threshold, thresholds, offsets)
    inputs = [read_address(x) for x in (log_weights, uniforms, thresholds, offsets)]
    addresses = [*inputs[:2], *(x.data_ptr() for x in out), *inputs[2:]]
    arguments = (addresses, (groups, log_weights.numel(), largest), scheme, threshold)
    if backend == "cuda":
        device = log_weights.device
        memory = log_weights.new_empty(_C.cuda_resample_memory(device.index, largest), dtype=torch.uint8)
        launch_cuda(_C.cuda_resample, device, *arguments, memory.data_ptr())
    else:
        _C.resample(*arguments)
    return out


@_resample.register_fake
def _(log_weights, uniforms, scheme, threshold, thresholds, offsets, largest, backend):
    return _outputs(log_weights, offsets)


def _outputs(
    log_weights: Tensor, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    particles = log_weights.shape
    groups = log_weights.shape[:-1] if offsets is None else (offsets.shape[0] - 1,)
    ancestors, counts, rank = (log_weights.new_empty(particles, dtype=torch.int64) for _ in range(3))
    ess, log_mean = (log_weights.new_empty(groups) for _ in range(2))
    return ancestors, counts, rank, ess, log_mean, log_weights.new_empty(groups, dtype=torch.bool)


def ess_log_mean(log_weights: Tensor, *, backend: str | None = None) -> tuple[float, float]:
    """Computes ((Σw)²/Σw², logsumexp(log_weights) − log N); (0.0, −inf) when all are −inf. Waits for the device.

    Args:
        log_weights: (N,) float64.

    Raises:
        ValueError: NaN or +inf, naming the particle.
    """
    log_weights, _, n = _check_groups(log_weights, None, None)
    if log_weights.dim() != 1:
        raise ValueError(f"log_weights: must be a vector, got shape {tuple(log_weights.shape)}")
    backend = pick_backend(backend, log_weights.device, "cuda")
    if backend == "cpu":
        return _C.ess_log_mean(log_weights.data_ptr(), log_weights.shape[0])
    # at threshold 0 nothing is resampled and no uniform is looked at
    done = _resample(log_weights.device, log_weights, log_weights, "systematic", 0.0, None, None, n, backend)
    ess, log_mean = done[3:5]
    ess, log_mean = torch.stack([ess, log_mean]).tolist()
    if math.isnan(ess):
        _refuse(log_weights, int((~(log_weights < math.inf)).int().argmax()), None)
    return ess, log_mean


def _check_float64(name: str, tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Returns a contiguous (N,) or (G, N) float64 tensor, if it has the shape and device of `like`."""
    if not isinstance(tensor, Tensor) or tensor.dim() not in (1, 2) or tensor.dtype != torch.float64:
        what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"{name}: must be a vector (N,) or groups (G, N) of torch.float64, got {what}")
    if like is not None and tensor.shape != like.shape:
        raise ValueError(f"{name}: must be {tuple(like.shape)} as log_weights are, got {tuple(tensor.shape)}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: is on {tensor.device}, log_weights are on {like.device}")
    return tensor.contiguous()


def _check_groups(
    log_weights: Tensor, offsets: Tensor | None, largest: int | None
) -> tuple[Tensor, Tensor | None, int]:
    """Returns log weights, offsets and what no group has more particles than, if they fit together."""
    log_weights = _check_float64("log_weights", log_weights)
    device, n = log_weights.device, log_weights.shape[-1]
    if offsets is None:
        if largest is not None:
            raise ValueError(f"largest={largest!r}: given without offsets")
        if n == 0:
            raise ValueError("log_weights: is empty")
        largest = n
    else:
        if log_weights.dim() != 1:
            raise ValueError(f"log_weights: must be a vector where there are offsets, got {tuple(log_weights.shape)}")
        offsets = check_offsets(offsets, n, device)
        if largest is not None and not 0 <= largest <= MAX_PARTICLES:
            raise ValueError(f"largest={largest!r}: must be in [0, {MAX_PARTICLES}]")
        largest = min(n, MAX_PARTICLES) if largest is None else min(n, largest)
        if values_are_checked(device) and (g := _C.bad_size(offsets.data_ptr(), offsets.shape[0] - 1, largest)) >= 0:
            raise ValueError(
                f"offsets: group {g} has {int(offsets[g + 1] - offsets[g])} particles, must have {largest} at most"
            )
    if values_are_checked(device) and (bad := _C.bad_log_weight(log_weights.data_ptr(), log_weights.numel())) >= 0:
        _refuse(log_weights, bad, offsets)
    return log_weights, offsets, largest


def _split_threshold(
    threshold: float | Tensor | None, log_weights: Tensor, offsets: Tensor | None
) -> tuple[float, Tensor | None]:
    """Splits a threshold into (the same for all groups, a vector of one per group or None)."""
    if not isinstance(threshold, Tensor):
        if threshold is not None and not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold={threshold!r}: must be in [0, 1] or None")
        return 1.0 if threshold is None else float(threshold), None
    if offsets is None and log_weights.dim() == 1:
        raise ValueError("threshold: is a tensor, must be a number where there are no groups")
    groups = log_weights.shape[0] if offsets is None else offsets.shape[0] - 1
    threshold = check_vector("threshold", threshold, torch.float64, log_weights.device, groups)
    if values_are_checked(log_weights.device) and (g := _C.bad_threshold(threshold.data_ptr(), groups)) >= 0:
        raise ValueError(f"threshold[{g}]={threshold[g].item()}: must be in [0, 1]")
    return 1.0, threshold


def _index(tensor: Tensor, flat: int) -> tuple[int, ...]:
    return (flat,) if tensor.dim() == 1 else divmod(flat, tensor.shape[-1])


def _refuse(log_weights: Tensor, bad: int, offsets: Tensor | None) -> None:
    index = _index(log_weights, bad)
    particle, group = index[-1], "" if len(index) == 1 else f" of group {index[0]}"
    if offsets is not None:
        g = int(torch.searchsorted(offsets[1:], bad, right=True))
        particle, group = bad - int(offsets[g]), f" of group {g}"
    raise ValueError(
        f"log_weights[{', '.join(map(str, index))}]={log_weights[index].item()}: "
        f"particle {particle}{group} must be finite or -inf"
    )
