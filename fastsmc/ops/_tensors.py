"""What the ops share: checks of tensor arguments, and the choice of a backend.

Checks that read values (index ranges, uniforms) are made on CPU tensors only: elsewhere they would cost a
synchronisation with the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc import _C

#: dtype codes of csrc/cpu.hpp
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
NO_MATRIX = (0, 0, 0, 0)

BACKENDS = ("cpu", "torch")


def pick_backend(backend: str | None, device: torch.device) -> str:
    """'cpu' (fastsmc._C) for CPU tensors, 'torch' (eager, any device) for others; or the one asked for."""
    if backend is None:
        return "cpu" if device.type == "cpu" else "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: must be one of {', '.join(map(repr, BACKENDS))}")
    if backend == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu': tensors are on {device}")
    return backend


def pick_compiled(backend: str | None, device: torch.device) -> str:
    """The backend of an op that fastsmc._C has for both devices: 'cpu', 'cuda' if built with it, else 'torch'."""
    mine = "cuda" if device.type == "cuda" else "cpu"
    if backend is None:
        return mine if device.type == "cpu" or (device.type == "cuda" and _C.cuda_archs) else "torch"
    check_choice("backend", backend, ("cpu", "cuda", "torch"))
    if backend not in (mine, "torch"):
        raise ValueError(f"backend={backend!r}: tensors are on {device}")
    if backend == "cuda" and not _C.cuda_archs:
        raise ValueError("backend='cuda': fastsmc._C was built without CUDA, see FASTSMC_BUILD_CUDA in setup.py")
    return backend


def launch_cuda(launcher: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Calls a launcher of fastsmc._C for a device and its current stream."""
    with torch.cuda.device(device):
        launcher(device.index, torch.cuda.current_stream().cuda_stream, *arguments)


def sees_values(device: torch.device) -> bool:
    """Whether values are checked: on the CPU, and not where there are none yet because something compiles."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def split_scalar(name: str, value: int | Tensor, device: torch.device) -> tuple[int, Tensor | None]:
    """An integer that may be a 0-dim int64 tensor on `device`: (its value where it can be seen, else 0; the tensor)."""
    if not isinstance(value, Tensor):
        return value, None
    if value.dim() != 0 or value.dtype != torch.int64:
        raise ValueError(f"{name}: must be an integer or a 0-dim int64 tensor, got {value.dtype} {tuple(value.shape)}")
    if value.device.type != device.type or device.index not in (None, value.device.index):
        raise ValueError(f"{name}: is on {value.device}, must be on {device}")
    return int(value) if sees_values(device) else 0, value


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, choices))}")


def check_vector(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device, n: int | None = None) -> Tensor:
    """A contiguous vector of `dtype` on `device`, of length `n` if given."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype != dtype:
        what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"{name}: must be a vector of {dtype}, got {what}")
    if n is not None and tensor.shape[0] != n:
        raise ValueError(f"{name}: must have {n} elements, got {tensor.shape[0]}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the other tensors are on {device}")
    return tensor.contiguous()


def check_index(name: str, tensor: Tensor, high: int, device: torch.device, n: int | None = None) -> Tensor:
    """An int64 vector with values in [0, high)."""
    tensor = check_vector(name, tensor, torch.int64, device, n)
    if device.type == "cpu" and tensor.numel():
        low, top = torch.aminmax(tensor)
        if low < 0 or top >= high:
            value = int(low) if low < 0 else int(top)
            raise ValueError(f"{name}[{tensor.tolist().index(value)}]={value}: must be in [0, {high})")
    return tensor


def check_uniforms(uniforms: Tensor, device: torch.device, n: int) -> Tensor:
    """A float64 vector with values in [0, 1)."""
    uniforms = check_vector("uniforms", uniforms, torch.float64, device, n)
    if device.type == "cpu" and (bad := _C.bad_uniform(uniforms.data_ptr(), n)) >= 0:
        raise ValueError(f"uniforms[{bad}]={uniforms[bad].item()}: must be in [0, 1)")
    return uniforms


def check_temperature(temperature: float) -> float:
    if not (temperature > 0 and math.isfinite(temperature) and 1 / temperature < 1e38):
        raise ValueError(f"temperature={temperature!r}: must be positive and finite, as must 1/temperature in float32")
    return float(temperature)


class Matrices(NamedTuple):
    """Checked matrices of `weigh` and `draw`: output row r is logits[logit_rows[r]] with log_psi[psi_rows[r]]."""

    logits: Tensor
    log_psi: Tensor | None
    logit_rows: Tensor | None
    psi_rows: Tensor | None
    n_rows: int

    def arguments(self) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """The two matrices as fastsmc._C takes them."""
        return _argument(self.logits, self.logit_rows), _argument(self.log_psi, self.psi_rows)


def _argument(matrix: Tensor | None, rows: Tensor | None) -> tuple[int, int, int, int]:
    if matrix is None:
        return NO_MATRIX
    return matrix.data_ptr(), matrix.stride(0), DTYPE_CODES[matrix.dtype], 0 if rows is None else rows.data_ptr()


def _check_matrix(name: str, matrix: Tensor) -> Tensor:
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        what = tuple(matrix.shape) if isinstance(matrix, Tensor) else repr(matrix)
        raise ValueError(f"{name}: must be a matrix (rows, V), got {what}")
    if matrix.shape[1] < 1:
        raise ValueError(f"{name}: has no columns")
    if matrix.dtype not in DTYPE_CODES:
        raise ValueError(f"{name}: dtype {matrix.dtype} must be one of {', '.join(map(str, DTYPE_CODES))}")
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"{name}: column stride {matrix.stride(1)} must be 1")
    return matrix


def check_matrices(
    logits: Tensor, log_psi: Tensor | None, logit_rows: Tensor | None, psi_rows: Tensor | None
) -> Matrices:
    """Raises ValueError naming the argument."""
    logits = _check_matrix("logits", logits)
    device = logits.device
    if logit_rows is not None:
        logit_rows = check_index("logit_rows", logit_rows, logits.shape[0], device)
    n_rows = logits.shape[0] if logit_rows is None else logit_rows.shape[0]
    if log_psi is None:
        if psi_rows is not None:
            raise ValueError("psi_rows: given without log_psi")
        return Matrices(logits, None, logit_rows, None, n_rows)
    if log_psi.dtype == torch.float64:
        log_psi = log_psi.float()
    log_psi = _check_matrix("log_psi", log_psi)
    if log_psi.device != device:
        raise ValueError(f"log_psi: is on {log_psi.device}, logits are on {device}")
    if log_psi.shape[1] != logits.shape[1]:
        raise ValueError(f"log_psi: has {log_psi.shape[1]} columns, logits have {logits.shape[1]}")
    if psi_rows is not None:
        psi_rows = check_index("psi_rows", psi_rows, log_psi.shape[0], device, n_rows)
    elif log_psi.shape[0] != n_rows:
        raise ValueError(f"log_psi: has {log_psi.shape[0]} rows, must have {n_rows}, or psi_rows must be given")
    return Matrices(logits, log_psi, logit_rows, psi_rows, n_rows)
