"""`NextRows`: what `logw_next` answered, checked, in the form that `weigh` and `draw` take."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc.potentials.base import Masked, Rows


class NextRows(NamedTuple):
    """Log ψ changes by row and token; as keyword arguments of `ops.weigh` and `ops.draw`.

    Attributes:
        log_psi: (M, V), or None: all are 0.
        psi_rows: (R,) int64 in [0, M), or None: the identity.
        mask: (B, ceil(V / 32)) int32, or None: all tokens are allowed.
        mask_rows: (R,) int64 in [0, B).
    """

    log_psi: Tensor | None
    psi_rows: Tensor | None
    mask: Tensor | None
    mask_rows: Tensor | None

    @classmethod
    def of(cls, answer: object, n: int, vocab: int, device: torch.device) -> NextRows:
        """From an answer about n particles and a vocabulary of V = vocab tokens. The host waits for nothing.

        Raises:
            ValueError: what it is, and what it must be.
        """
        mask = mask_rows = None
        values = answer
        if isinstance(answer, Masked):
            mask, mask_rows, values = answer
            words = -(-vocab // 32)
            if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 2 or mask.shape[1] != words:
                raise ValueError(f"returned bits {_what(mask)}, must be (M, {words}) int32 for {vocab} tokens")
            mask_rows = _index("Masked", mask_rows, n).to(device)
            mask = mask.to(device)
            if values is None:
                return cls(None, None, mask, mask_rows)
        rows = None
        if isinstance(values, Rows):
            values, rows = values
            rows = _index("Rows", rows, n).to(device)
        elif not isinstance(values, Tensor) or values.ndim != 2 or len(values) != n:
            raise ValueError(f"returned {_what(values)}, must be ({n}, {vocab}), Rows or Masked")
        if (
            not isinstance(values, Tensor)
            or values.ndim != 2
            or values.shape[1] != vocab
            or not values.is_floating_point()
        ):
            raise ValueError(f"returned values {_what(values)}, must be floating with {vocab} columns")
        return cls(values.to(device), rows, mask, mask_rows)

    def out_of_range(self) -> str | None:
        """Says so if an index leads outside its rows. Waits for the device."""
        for name, matrix, rows in (("values", self.log_psi, self.psi_rows), ("bits", self.mask, self.mask_rows)):
            if rows is not None and bool(((rows < 0) | (rows >= len(matrix))).any()):
                return f"index out of range for {len(matrix)} rows of {name}"
        return None

    def select(self, particles: Tensor) -> NextRows:
        """The rows of `particles` (R,) int64 alone."""
        psi_rows = None
        if self.log_psi is not None:
            psi_rows = particles if self.psi_rows is None else self.psi_rows[particles]
        mask_rows = None if self.mask_rows is None else self.mask_rows[particles]
        return NextRows(self.log_psi, psi_rows, self.mask, mask_rows)

    def of_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """(K,) float64: log ψ changes of tokens (K,) in rows (K,)."""
        out = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        if self.log_psi is not None:
            out = self.log_psi[rows if self.psi_rows is None else self.psi_rows[rows], tokens].double()
        if self.mask is not None:
            words = self.mask[self.mask_rows[rows], tokens >> 5]
            out = out.masked_fill((words >> (tokens & 31).int()) & 1 == 0, -math.inf)
        return out


def _what(value: object) -> str:
    return f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__


def _index(kind: str, index: object, n: int) -> Tensor:
    if not isinstance(index, Tensor) or index.dtype != torch.int64 or tuple(index.shape) != (n,):
        raise ValueError(f"returned {kind} with index {_what(index)}, must be ({n},) int64")
    return index
