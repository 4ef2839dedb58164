"""What a potential answered, checked, and in the form that `weigh` and `draw` take.

check_scores   of `prefix` and `complete`
check_next     of `logw_next`: types, shapes, devices; the host waits for nothing
check_rows     of the same: indices, for which the host waits
NextRows       the same as arguments of the ops
together       those of several potentials as one
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.potentials.base import Masked, Potential, Rows


def _what(answer: Any) -> str:
    if not isinstance(answer, Tensor):
        return type(answer).__name__
    layout = "" if answer.layout == torch.strided else f" {answer.layout}"
    return f"{tuple(answer.shape)} {answer.dtype}{layout} on {answer.device}"


def _refuse(potential: Potential, method: str, what: str, allowed: str) -> TypeError:
    return TypeError(f"{type(potential).__name__}.{method} returned {what}; must be {allowed}")


def check_scores(potential: Potential, method: str, answer: Any, like: Tensor) -> Tensor:
    """Returns what `prefix` or `complete` answered, (N,) float64 on the device of `like` (N,).

    Raises:
        TypeError: it is no vector of N log weights; names class and method.
    """
    good = isinstance(answer, Tensor) and answer.is_floating_point() and answer.layout == torch.strided
    if not good or answer.shape != like.shape or answer.device != like.device:
        allowed = f"a floating-point torch.Tensor of shape {tuple(like.shape)} on {like.device}"
        raise _refuse(potential, method, _what(answer), allowed)
    return answer.detach().double()


def check_next(
    potential: Potential, answer: Any, like: Tensor, vocab_size: int | None = None
) -> Tensor | Rows | Masked | None:
    """Returns what `logw_next` answered about N particles, on the device of `like` (N,), with columns in a row.

    Args:
        vocab_size: V, where it is known.

    Raises:
        TypeError: it is none of what `logw_next` may return; names class and method.
    """
    if isinstance(answer, Masked):
        bits, words = answer.bits, "V / 32" if vocab_size is None else -(-vocab_size // 32)
        good = isinstance(bits, Tensor) and bits.dtype == torch.int32 and bits.dim() == 2
        if not good or bits.device != like.device or (vocab_size is not None and bits.shape[1] != words):
            allowed = f"(M, {words}) torch.int32 on {like.device}"
            raise _refuse(potential, "logw_next", f"Masked with bits {_what(bits)}", allowed)
        index = _check_index(potential, "Masked", answer.index, like)
        if isinstance(answer.values, Masked):
            raise _refuse(potential, "logw_next", "Masked with values Masked", "floating-point, Rows or None")
        values = check_next(potential, answer.values, like, vocab_size)
        return Masked(bits if bits.stride(1) == 1 else bits.contiguous(), index, values)  # type: ignore[arg-type]
    if isinstance(answer, Rows):
        values = _check_matrix(potential, "Rows of values ", answer.values, like, None, vocab_size)
        return Rows(values, _check_index(potential, "Rows", answer.index, like))
    return None if answer is None else _check_matrix(potential, "", answer, like, len(like), vocab_size)


def _check_matrix(
    potential: Potential, kind: str, values: Any, like: Tensor, n_rows: int | None, vocab_size: int | None
) -> Tensor:
    """Returns (n_rows, V) floating point, detached, with columns in a row; n_rows None: any number of rows."""
    good = isinstance(values, Tensor) and values.is_floating_point() and values.layout == torch.strided
    good = good and values.dim() == 2 and values.device == like.device and vocab_size in (None, values.shape[1])
    if not good or n_rows not in (None, len(values)):
        allowed = f"floating-point ({n_rows or 'M'}, {vocab_size or 'V'}) on {like.device}, or Rows or Masked of such"
        raise _refuse(potential, "logw_next", kind + _what(values), allowed)
    values = values.detach()
    return values if values.stride(1) == 1 else values.contiguous()


def _check_index(potential: Potential, kind: str, index: Any, like: Tensor) -> Tensor:
    """Returns (N,) int64."""
    good = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
    if not good or index.device != like.device or index.shape != like.shape:
        allowed = f"{tuple(like.shape)} torch.int64 on {like.device}"
        raise _refuse(potential, "logw_next", f"{kind} with index {_what(index)}", allowed)
    return index.long()


def check_rows(potential: Potential, answer: Tensor | Rows | Masked, asked: Tensor) -> Tensor | Rows | Masked:
    """Returns what `check_next` gave, with indices that are in range for all particles.

    Raises:
        TypeError: an index was out of range for one of `asked` (N,) bool; names class, method and particle.
    """

    def in_range(index: Tensor, n_rows: int, what: str) -> Tensor:
        out = (index < 0) | (index >= n_rows)
        if bool((out & asked).any()):
            i = int(torch.nonzero(out & asked)[0])
            allowed = f"in [0, {n_rows}), the rows of {what}"
            raise _refuse(potential, "logw_next", f"index[{i}]={int(index[i])}", allowed)
        return index.clamp(0, max(n_rows - 1, 0))

    values = answer.values if isinstance(answer, Masked) else answer
    if isinstance(values, Rows):
        values = Rows(values.values, in_range(values.index, len(values.values), "values"))
    if isinstance(answer, Masked):
        return Masked(answer.bits, in_range(answer.index, len(answer.bits), "bits"), values)
    assert values is not None  # only those of a mask may be
    return values


class NextRows(NamedTuple):
    """Holds log ψ changes by row and token; as keyword arguments of `ops.weigh` and `ops.draw`.

    Attributes:
        log_psi: (M, V), or None: all are 0.
        psi_rows: (R,) int64 in [0, M), or None: the identity.
        mask: (B, ceil(V / 32)) int32, or None: all tokens are allowed.
        mask_rows: (R,) int64 in [-1, B); −1: all tokens are allowed.
    """

    log_psi: Tensor | None
    psi_rows: Tensor | None
    mask: Tensor | None
    mask_rows: Tensor | None

    @classmethod
    def of(cls, answer: Tensor | Rows | Masked) -> NextRows:
        """Takes what `check_next` gave, a row per particle."""
        mask, mask_rows, values = answer if isinstance(answer, Masked) else (None, None, answer)
        log_psi, psi_rows = values if isinstance(values, Rows) else (values, None)
        return cls(log_psi, psi_rows, mask, mask_rows)

    def select(self, particles: Tensor) -> NextRows:
        """Returns the rows of `particles` (R,) int64 alone."""
        psi_rows = None
        if self.log_psi is not None:
            psi_rows = particles if self.psi_rows is None else self.psi_rows[particles]
        mask_rows = None if self.mask_rows is None else self.mask_rows[particles]
        return NextRows(self.log_psi, psi_rows, self.mask, mask_rows)

    def rounded(self) -> NextRows:
        """Returns the same as `weigh` and `draw` read it: float64 is rounded once, not by each of them."""
        if self.log_psi is None or self.log_psi.dtype != torch.float64:
            return self
        return self._replace(log_psi=self.log_psi.float())

    def of_tokens(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """Returns (K,) float64: log ψ changes of tokens (K,) in rows (K,)."""
        out = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
        if self.log_psi is not None:
            out = self.log_psi[rows if self.psi_rows is None else self.psi_rows[rows], tokens].double()
        if self.mask is not None:
            assert self.mask_rows is not None  # comes with the mask
            mask_rows = self.mask_rows[rows]
            words = self.mask[mask_rows, tokens >> 5]
            out = out.masked_fill(((words >> (tokens & 31).int()) & 1 == 0) & (mask_rows >= 0), -math.inf)
        return out


class _Stack:
    """Puts matrices one below the other; one that comes again stands once."""

    def __init__(self) -> None:
        self._matrices: list[Tensor] = []
        self._begins: dict[tuple[int, torch.Size, tuple[int, ...]], int] = {}
        self._size = 0
        self.rows: list[Tensor] = []

    def add(self, matrix: Tensor, rows: Tensor) -> None:
        """Takes rows (N,) int64 of a matrix (M, …)."""
        key = matrix.data_ptr(), matrix.shape, matrix.stride()
        if key not in self._begins:
            self._begins[key], self._size = self._size, self._size + len(matrix)
            self._matrices.append(matrix)
        self.rows.append(rows + self._begins[key])

    def whole(self) -> tuple[Tensor, Tensor]:
        """Gives all matrices as one, of the dtype that holds the values of each; and all rows."""
        matrices = self._matrices
        if len(matrices) == 1:
            return matrices[0], torch.cat(self.rows)
        dtype = functools.reduce(torch.promote_types, (matrix.dtype for matrix in matrices))
        return torch.cat([matrix.to(dtype) for matrix in matrices]), torch.cat(self.rows)


def together(parts: list[NextRows | None], sizes: list[int], device: torch.device) -> NextRows:
    """Makes one `NextRows` of several, of `sizes` particles each, a row per particle; None: all zeros.

    Where one has log ψ, the others have a row of zeros; where one has a mask, to the others all tokens are allowed.
    """
    if len(parts) == 1 and parts[0] is not None:
        return parts[0]
    psi, masks = _Stack(), _Stack()
    values = next((part.log_psi for part in parts if part is not None and part.log_psi is not None), None)
    zeros = None if values is None else torch.zeros(1, values.shape[1], device=device)
    mask = next((part.mask for part in parts if part is not None and part.mask is not None), None)
    for part, size in zip(parts, sizes, strict=True):
        everyone = torch.arange(size, device=device)
        if zeros is not None:
            if part is None or part.log_psi is None:
                psi.add(zeros, torch.zeros_like(everyone))
            else:
                psi.add(part.log_psi, everyone if part.psi_rows is None else part.psi_rows)
        if mask is not None:
            if part is None or part.mask is None:
                masks.rows.append(torch.full_like(everyone, -1))
            else:
                masks.add(part.mask, everyone if part.mask_rows is None else part.mask_rows)
    log_psi, psi_rows = (None, None) if zeros is None else psi.whole()
    bits, mask_rows = (None, None) if mask is None else masks.whole()
    return NextRows(log_psi, psi_rows, bits, mask_rows)
