"""The losses of learned twists: CTL, RL (soft Q), SIXO, FUDGE, DPG, to be read beside docs/mathematics.md §5.

They are functions of log ψ at the tokens, weights and masks. B sequences, T columns; column t holds token t + 1 and
log ψ_{t+1} of the history up to and with it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def ctl_loss(
    positive: Tensor, positive_mask: Tensor, positive_weights: Tensor, log_psi: Tensor, mask: Tensor, weights: Tensor
) -> Tensor:
    """Computes the contrastive loss −[Σ_k W_k mean_t log ψ_t(s^k) − mean_t Σ_k W_{t,k} log ψ_t(s^k)].

    Args:
        positive, log_psi: (K, T), (B, T) log ψ of positives and samples; their masks (bool) say where there is a token.
        positive_weights: (K,) sum 1; weights: (B, T), columns sum to 1: of the samples as a sample of π_t.
    """
    up = (positive_weights[:, None] * positive * positive_mask).sum()
    down = (weights * log_psi * mask).sum()
    return (down - up) / log_psi.shape[1]


def rl_loss(log_psi: Tensor, mask: Tensor, target: Tensor) -> Tensor:
    """Computes the soft Q loss: mean over tokens of (log ψ_t − target)²; all are (B, T).

    Args:
        target: log Σ_v p0 ψ_{t+1}, at the end log φ.
    """
    return (F.mse_loss(log_psi, target.where(mask, log_psi.detach()), reduction="none") * mask).sum() / mask.sum()


def sixo_loss(
    positive: Tensor, positive_mask: Tensor, positive_weights: Tensor, log_psi: Tensor, mask: Tensor
) -> Tensor:
    """Computes the density ratio loss −Σ_k W_k mean_t log sigmoid(log ψ_t(s^k)) − mean_{p0} log(1 − sigmoid(log ψ_t)).

    The arguments are as in `ctl_loss`.
    """
    up = (positive_weights[:, None] * F.logsigmoid(positive) * positive_mask).sum()
    down = (F.logsigmoid(-log_psi) * mask).sum() / len(log_psi)
    return -(up + down) / log_psi.shape[1]


def fudge_loss(raw: Tensor, mask: Tensor, log_phi: Tensor) -> Tensor:
    """Computes the cross-entropy of ψ_t = sigmoid(raw), (B, T), against a roll-out's chance φ (B,) of the class."""
    phi = log_phi.exp()[:, None].expand_as(raw).to(raw.dtype)
    return (F.binary_cross_entropy_with_logits(raw, phi, reduction="none") * mask).sum() / mask.sum()


def dpg_loss(log_psi: Tensor, log_norm: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Computes the loss −Σ_k W_k mean_t [log ψ_t(s_t) − log Σ_v p0 ψ_t(v)].

    Its gradient is that of −log ψ_t(s_t) + E_{v~q} log ψ_t(v).

    Args:
        log_psi, log_norm, mask: (K, T) at positives; weights: (K,) sum 1.
    """
    return -(weights[:, None] * (log_psi - log_norm) * mask).sum() / log_psi.shape[1]
