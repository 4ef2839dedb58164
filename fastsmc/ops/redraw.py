"""redraw: what the noise that gave one token would have given under other logits; see csrc/include/fastsmc/redraw.cuh.

Gumbel-max counterfactuals (Ravfogel et al. 2024, arXiv 2411.07180). `redraw` draws tokens by two uniforms each and
makes no noise; `redraw_logits` gives their law as logits; `gumbel` regenerates the noise itself, which several
interventions then share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import (
    Contrast,
    check_contrast,
    check_index,
    check_uniforms,
    check_vector,
    custom_op,
    pick_backend,
    split_scalar,
)
from fastsmc.ops.weigh import weigh


class Redrawn(NamedTuple):
    """What `redraw` gives for R rows, p being a row of factual with its token k, and q one of logits.

    Attributes:
        tokens: (R,) int64; `NO_TOKEN` where there is no row, no mass in q, none of k in p, or NaN or +inf.
        stay: (R,) float64, P(k | k), the probability that k is what comes; NaN without a token, as all below.
        log_prob: (R,) float64, log q(token).
        log_kernel: (R,) float64, log P(token | k).
    """

    tokens: Tensor
    stay: Tensor
    log_prob: Tensor
    log_kernel: Tensor


def redraw(
    logits: Tensor,
    factual: Tensor,
    tokens: Tensor,
    uniforms: Tensor,
    *,
    logit_rows: Tensor | None = None,
    factual_rows: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    factual_temperature: float | Tensor | None = None,
    backend: str | None = None,
) -> Redrawn:
    """Draws R counterfactual tokens: row r of logits is drawn from with the noise that gave factual row r its token.

    q = softmax(logits / temperature) over what the mask allows, p = softmax(factual / factual_temperature). Averaged
    over tokens k ~ p the law of what is drawn is q. A token whose odds q/p did not rise against those of k is never
    drawn, so that equal rows at equal temperatures give k, and stay is 1.0.

    Args:
        logits: (L, V) float32, bfloat16 or float16; any row stride, unit column stride. −inf: no mass.
        factual: (F, V), the same dtypes and strides: what was drawn from. What the text's mechanism ruled out is −inf.
        tokens: (F,) int64 in [0, V), what was drawn.
        uniforms: (R, 2) float64 in [0, 1). The first says whether k stays.
        logit_rows: (R,) int64 in [−1, L); default the identity, R = L. −1 stands for no row: nothing is read, the
            other indices are ignored, and there is no token.
        factual_rows: (R,) int64 in [−1, F); default the identity, F = R. −1: no row, no token.
        mask, mask_rows: as in `weigh`, but what is ruled out has no share in q.
        temperature, factual_temperature: > 0, for all rows, or (R,) float64; the second is the first unless given.
        backend: 'cpu', 'triton' (CUDA tensors; others under TRITON_INTERPRET=1), 'torch', or None for the device's own.

    Raises:
        ValueError: naming the argument; values of tensors are only checked on the CPU, outside torch.compile.
    """
    c = check_contrast(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    backend = pick_backend(backend, logits.device, "triton")
    if not isinstance(uniforms, Tensor) or uniforms.shape != (c.n_rows, 2):
        what = tuple(uniforms.shape) if isinstance(uniforms, Tensor) else repr(uniforms)
        raise ValueError(f"uniforms: must be a matrix ({c.n_rows}, 2), got {what}")
    uniforms = check_uniforms(uniforms.flatten(), logits.device, 2 * c.n_rows).view(-1, 2)
    return Redrawn(*_redraw(logits.device, *c, uniforms, backend))


@custom_op("fastsmc::redraw")
def _redraw(
    logits: Tensor,
    logit_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    factual: Tensor,
    factual_rows: Tensor | None,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    factual_temperature: float,
    factual_temperatures: Tensor | None,
    uniforms: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c = Contrast(
        logits, logit_rows, mask, mask_rows, factual, factual_rows, tokens, temperature, temperatures,
        factual_temperature, factual_temperatures,
    )  # fmt: skip
    if backend == "torch":
        return _torch.redraw(c, uniforms)
    if backend == "triton":
        from fastsmc.kernels import redraw as kernel

        return kernel.redraw(c, uniforms)
    out = _empty(uniforms)
    _C.redraw(c.arguments(), uniforms.data_ptr(), *(t.data_ptr() for t in out))
    return out


@_redraw.register_fake
def _(
    logits, logit_rows, mask, mask_rows, factual, factual_rows, tokens, temperature, temperatures, factual_temperature,
    factual_temperatures, uniforms, backend,
):  # fmt: skip
    return _empty(uniforms)


def _empty(uniforms: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    stay, log_prob, log_kernel = (uniforms.new_empty(uniforms.shape[0]) for _ in range(3))
    return torch.empty_like(stay, dtype=torch.int64), stay, log_prob, log_kernel


def redraw_logits(
    logits: Tensor,
    factual: Tensor,
    tokens: Tensor,
    *,
    logit_rows: Tensor | None = None,
    factual_rows: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    factual_temperature: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Computes log P(· | k), (R, V) float32: logits of what `redraw` draws, whose exponentials sum to 1 per row.

    A row that is none is −inf; any other from which `redraw` gives no token is NaN. Each row is sorted, so to draw
    without a twist `redraw` is the faster way.

    Args:
        backend: 'cpu', 'torch', or None for the device's own. All others are as in `redraw`.

    Raises:
        ValueError: as `redraw`.
    """
    c = check_contrast(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    return _redraw_logits(logits.device, *c, pick_backend(backend, logits.device, "torch"))


@custom_op("fastsmc::redraw_logits")
def _redraw_logits(
    logits: Tensor,
    logit_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    factual: Tensor,
    factual_rows: Tensor | None,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    factual_temperature: float,
    factual_temperatures: Tensor | None,
    backend: str,
) -> Tensor:
    c = Contrast(
        logits, logit_rows, mask, mask_rows, factual, factual_rows, tokens, temperature, temperatures,
        factual_temperature, factual_temperatures,
    )  # fmt: skip
    if backend == "torch":
        return _torch.redraw_logits(c)
    out = logits.new_empty(c.n_rows, logits.shape[1], dtype=torch.float32)
    _C.redraw_logits(c.arguments(), out.data_ptr())
    return out


@_redraw_logits.register_fake
def _(logits, logit_rows, *others):
    n_rows = (logits if logit_rows is None else logit_rows).shape[0]
    return logits.new_empty(n_rows, logits.shape[1], dtype=torch.float32)


def gumbel(
    logits: Tensor,
    factual: Tensor,
    tokens: Tensor,
    *,
    seed: int | Tensor,
    group: int | Tensor,
    step: int | Tensor,
    particles: Tensor,
    logit_rows: Tensor | None = None,
    factual_rows: Tensor | None = None,
    mask: Tensor | None = None,
    mask_rows: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    factual_temperature: float | Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws what `redraw` draws, (R,) int64, by the noise itself: one number per token of the vocabulary.

    The noise is a function of (seed, group, step, particle), the factual row and its token, and of nothing else. So
    with these the same, the tokens that several interventions give are what one noise gives under each of them. It is
    made from Philox where a token can win, and never stored.

    Args:
        seed: 0 to 2**64 − 1, or (R,) int64, a seed from 2**63 on as a signed integer.
        group, step: 0 to 2**32 − 1 each, or (R,) int64. A 0-dim int64 tensor is one for all rows, read on the device.
        particles: (R,) int64 in [0, 2**32): whose noise each row has. Streams 2**31 + token of `uniforms` are used.
        backend: 'cpu', 'torch', or None for the device's own. All others are as in `redraw`.

    Raises:
        ValueError: as `redraw`.
    """
    c = check_contrast(
        logits, factual, tokens, logit_rows, factual_rows, mask, mask_rows, temperature, factual_temperature
    )
    device = logits.device
    seeds = _per_row("seed", seed, 64, c)
    groups, steps = _per_row("group", group, 32, c), _per_row("step", step, 32, c)
    particles = check_index("particles", particles, 2**32, device, c.n_rows)
    ft = c.factual_temperature if c.factual_temperatures is None else c.factual_temperatures
    if logit_rows is not None:  # where there is no row, nothing is looked at
        at = torch.arange(c.n_rows, device=device) if factual_rows is None else factual_rows
        factual_rows = at.where(logit_rows >= 0, -1)
    lse = weigh(factual, logit_rows=factual_rows, temperature=ft).lse
    backend = pick_backend(backend, device, "torch")
    return _gumbel(device, *c, lse, seeds, groups, steps, particles, backend)


def _per_row(name: str, value: int | Tensor, bits: int, c: Contrast) -> Tensor:
    """Makes an integer in [0, 2**bits) a vector (R,) int64 of its bits, and checks one that is given."""
    device, high = c.logits.device, 2**bits
    if isinstance(value, Tensor):
        if value.dim() == 0:
            split_scalar(name, value, device)
            value = value.expand(c.n_rows)
        if bits == 64:
            return check_vector(name, value, torch.int64, device, c.n_rows)
        return check_index(name, value, high, device, c.n_rows)
    if not 0 <= value < high:
        raise ValueError(f"{name}={value!r}: must be an integer in [0, 2**{bits})")
    return torch.full((c.n_rows,), value - 2**64 if value >= 2**63 else value, dtype=torch.int64, device=device)


@custom_op("fastsmc::gumbel")
def _gumbel(
    logits: Tensor,
    logit_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    factual: Tensor,
    factual_rows: Tensor | None,
    tokens: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    factual_temperature: float,
    factual_temperatures: Tensor | None,
    lse: Tensor,
    seeds: Tensor,
    groups: Tensor,
    steps: Tensor,
    particles: Tensor,
    backend: str,
) -> Tensor:
    c = Contrast(
        logits, logit_rows, mask, mask_rows, factual, factual_rows, tokens, temperature, temperatures,
        factual_temperature, factual_temperatures,
    )  # fmt: skip
    if backend == "torch":
        return _torch.gumbel(c, lse, seeds, groups, steps, particles)
    out = torch.empty_like(particles)
    keys = [t.data_ptr() for t in (seeds, groups, steps, particles)]
    _C.gumbel(c.arguments(), lse.data_ptr(), keys, out.data_ptr())
    return out


@_gumbel.register_fake
def _(*arguments):
    return torch.empty_like(arguments[-2])
