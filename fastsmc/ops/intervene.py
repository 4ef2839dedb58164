"""intervene: a low-rank affine map of each row's own, in place; see csrc/include/fastsmc/intervene.cuh."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops import _torch
from fastsmc.ops._tensors import (
    DTYPE_CODES,
    FLOATS,
    check_index,
    check_offsets,
    check_vector,
    custom_op,
    pick_backend,
    read_address,
)


def intervene(
    x: Tensor,
    slots: Tensor,
    offsets: Tensor,
    down: Tensor,
    up: Tensor,
    shift: Tensor,
    *,
    source: Tensor | None = None,
    finite: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Maps row r, of slot s = slots[r], to x[r] + Uₛ(Vₛᵀ y) + cₛ in place, where y is x[r] itself or source[r].

    Vₛ and Uₛ are the factors [offsets[s], offsets[s + 1]) of `down` and `up`, as rows; slots may have different ranks,
    0 among them. Sums are float32, and x is rounded once.

    Args:
        x: (R, H) float32, bfloat16 or float16; any row stride, unit column stride.
        slots: (R,) int64 in [−1, S); −1 leaves the row as it is.
        offsets: (S + 1,) int64, ascending from 0 to F.
        down: (F, K) float32, contiguous, as `up` and `shift`.
        up: (F, H) float32.
        shift: (S, H) float32, cₛ.
        source: (R, K) of the data type of x; None: x, with K = H.
        finite: (S,) bool; where a row of slot s comes out with NaN or an infinity, finite[s] becomes False.
        backend: 'cpu', 'triton', 'torch', or None for the device's own.

    Raises:
        ValueError: naming the argument; values are only checked on the CPU, outside torch.compile.
    """
    x = _check_rows("x", x, None)
    device, n_slots = x.device, shift.shape[0] if isinstance(shift, Tensor) and shift.dim() == 2 else 0
    if source is not None:
        source = _check_rows("source", source, x)
    width = (x if source is None else source).shape[1]
    n_factors = down.shape[0] if isinstance(down, Tensor) and down.dim() == 2 else 0
    _check_floats("down", down, n_factors, width, device)
    _check_floats("up", up, n_factors, x.shape[1], device)
    _check_floats("shift", shift, n_slots, x.shape[1], device)
    slots = check_index("slots", slots, n_slots, device, x.shape[0], low=-1)
    offsets = check_offsets(offsets, n_factors, device)
    if offsets.shape[0] != n_slots + 1:
        raise ValueError(f"offsets: has {offsets.shape[0]} elements for {n_slots} rows of shift, must have one more")
    if finite is not None and not check_vector("finite", finite, torch.bool, device, n_slots).is_set_to(finite):
        raise ValueError("finite: must be contiguous")
    _intervene(device, x, source, slots, offsets, down, up, shift, finite, pick_backend(backend, device, "triton"))


@custom_op("fastsmc::intervene", ("x", "finite"))
def _intervene(
    x: Tensor, source: Tensor | None, slots: Tensor, offsets: Tensor, down: Tensor, up: Tensor, shift: Tensor,
    finite: Tensor | None, backend: str,
) -> None:  # fmt: skip
    y = x if source is None else source
    if backend == "torch":
        _torch.intervene(x, y, slots, offsets, down, up, shift, finite)
        return
    if backend == "triton":
        from fastsmc.kernels import intervene as kernel  # Triton takes its time to import, and CPU users need none

        kernel.intervene(x, y, slots, offsets, down, up, shift, finite)
        return
    rows = x.data_ptr(), x.stride(0), read_address(y), y.stride(0), DTYPE_CODES[x.dtype]
    offsets_at, down_at, up_at, shift_at = map(read_address, (offsets, down, up, shift))
    finite_at = 0 if finite is None else finite.data_ptr()
    sizes = x.shape[1], y.shape[1]
    _C.intervene(rows, read_address(slots), x.shape[0], (*sizes, offsets_at, down_at, up_at, shift_at, finite_at))


@_intervene.register_fake
def _(*arguments):
    return None


def _check_rows(name: str, rows: object, like: Tensor | None) -> Tensor:
    if not isinstance(rows, Tensor) or rows.dim() != 2 or rows.shape[1] < 1 or rows.dtype not in FLOATS:
        what = f"{rows.dtype} {tuple(rows.shape)}" if isinstance(rows, Tensor) else repr(rows)
        raise ValueError(f"{name}: must be a matrix of {', '.join(map(str, FLOATS))}, got {what}")
    if rows.stride(1) != 1 and rows.shape[1] > 1:
        raise ValueError(f"{name}: column stride {rows.stride(1)} must be 1")
    if like is not None and (rows.shape[0], rows.dtype, rows.device) != (like.shape[0], like.dtype, like.device):
        raise ValueError(
            f"{name}: must have the {like.shape[0]} rows, the dtype {like.dtype} and the device {like.device} of x, "
            f"got {rows.shape[0]}, {rows.dtype}, {rows.device}"
        )
    return rows


def _check_floats(name: str, matrix: object, rows: int, columns: int, device: torch.device) -> None:
    if (
        isinstance(matrix, Tensor)
        and (*matrix.shape, matrix.dtype, matrix.device) == (rows, columns, torch.float32, device)
        and matrix.is_contiguous()
    ):
        return
    what = f"{matrix.dtype} {tuple(matrix.shape)} on {matrix.device}" if isinstance(matrix, Tensor) else repr(matrix)
    raise ValueError(f"{name}: must be a contiguous float32 matrix ({rows}, {columns}) on {device}, got {what}")
