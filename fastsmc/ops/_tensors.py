"""What the ops share: checks of tensor arguments, and the choice of a backend.

Checks that read values (index ranges, uniforms) are made on CPU tensors only, and not while torch.compile traces:
elsewhere they would cost a synchronisation with the device.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.values import check_choice

if TYPE_CHECKING:
    from fastsmc._C import ContrastArgs, MatrixArgs

#: dtype codes of csrc/cpu.hpp
DTYPE_CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3, torch.int32: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_MATRIX = (0, 0, 0, 0)

HAS_TRITON = importlib.util.find_spec("triton") is not None


def built_backends() -> list[str]:
    """Names the backends that are built here, whether or not a device is there to run them."""
    return ["cpu", "torch", *(["cuda"] if _C.cuda_archs else []), *(["triton"] if HAS_TRITON else [])]


#: ops by the backend that has their kernels for a GPU, the argument `gpu` of `pick_backend`
GPU_OPS = {"cuda": ("uniforms", "resample", "reindex"), "triton": ("weigh", "draw", "redraw", "intervene")}


def missing_on_gpu(built: Sequence[str]) -> str | None:
    """Says in one line which kernels a GPU lacks here, from the backends that are built; None: it lacks none."""
    why = {
        "cuda": "fastsmc was built without CUDA, which takes nvcc (FASTSMC_BUILD_CUDA=1 makes its lack an error)",
        "triton": "triton is not installed",
    }
    lacks = (
        f"{why[backend]}: {', '.join(names)} run on a GPU as PyTorch operations, which are slower"
        for backend, names in GPU_OPS.items()
        if backend not in built
    )
    return "; ".join(lacks) or None


def pick_backend(backend: str | None, device: torch.device, gpu: str) -> str:
    """Picks the backend that was asked for, or the device's: 'cpu' (fastsmc._C) for CPU tensors; for CUDA tensors
    the op's `gpu`, 'triton' or 'cuda' (fastsmc._C), where it is built; else 'torch' (eager, any device).

    Raises:
        ValueError: naming what is allowed, or why it cannot be had here.
    """
    if backend is None:
        if device.type == "cpu":
            return "cpu"
        return gpu if device.type == "cuda" and gpu in built_backends() else "torch"
    check_choice("backend", backend, ("cpu", "torch", gpu))
    if backend == "cuda" and not _C.cuda_archs:
        raise ValueError("backend='cuda': fastsmc._C was built without CUDA, see FASTSMC_BUILD_CUDA in setup.py")
    if backend == "triton" and not HAS_TRITON:
        raise ValueError("backend='triton': triton is not installed")
    if backend == "triton" and device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend='triton': tensors are on cpu, which needs TRITON_INTERPRET=1 in the environment")
    if (backend, device.type) in {("cpu", "cuda"), ("cuda", "cpu")}:
        raise ValueError(f"backend={backend!r}: tensors are on {device}")
    return backend


def launch_cuda(launcher: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Calls a launcher of fastsmc._C for a device and its current stream."""
    with torch.cuda.device(device):
        launcher(device.index, torch.cuda.current_stream().cuda_stream, *arguments)


def values_are_checked(device: torch.device) -> bool:
    """Says whether an op looks at the values of its arguments: on the CPU, unless torch.compile is tracing it."""
    return device.type == "cpu" and not torch.compiler.is_compiling()


def custom_op(name: str, mutates_args: Sequence[str] = ()) -> Callable:
    """Makes a function an op, as torch.library.custom_op does, so that torch.compile and CUDA graphs take it.

    The op is called with its device before its arguments. On the CPU, where nothing traces, the call goes to the
    function itself: the dispatcher takes longer than the arithmetic of a small group. No gradient flows either way.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(name, function, mutates_args=mutates_args)

        def call(device: torch.device, *args: Any) -> Any:
            return (function if values_are_checked(device) else op)(*args)

        call.register_fake = op.register_fake  # type: ignore[attr-defined]  # a function carries it along
        return call

    return decorate


def split_scalar(name: str, value: int | Tensor, device: torch.device) -> tuple[int, Tensor | None]:
    """Splits an integer that may be a 0-dim int64 tensor on `device` into (value, tensor).

    The value is 0 where only the device knows it; the tensor is None for a Python integer.
    """
    if not isinstance(value, Tensor):
        return value, None
    if value.dim() != 0 or value.dtype != torch.int64:
        raise ValueError(f"{name}: must be an integer or a 0-dim int64 tensor, got {value.dtype} {tuple(value.shape)}")
    if value.device.type != device.type or device.index not in (None, value.device.index):
        raise ValueError(f"{name}: is on {value.device}, must be on {device}")
    return int(value) if values_are_checked(device) else 0, value


def check_vector(name: str, tensor: object, dtype: torch.dtype, device: torch.device, n: int | None = None) -> Tensor:
    """Returns `tensor`, made contiguous, if it is a vector of `dtype` on `device`, of length `n` where that is given.

    Raises:
        ValueError: naming the argument; as all checks here.
    """
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or tensor.dtype != dtype:
        what = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else repr(tensor)
        raise ValueError(f"{name}: must be a vector of {dtype}, got {what}")
    if n is not None and tensor.shape[0] != n:
        raise ValueError(f"{name}: must have {n} elements, got {tensor.shape[0]}")
    if tensor.device != device:
        raise ValueError(f"{name}: is on {tensor.device}, the other tensors are on {device}")
    return tensor.contiguous()


def check_index(
    name: str,
    tensor: object,
    high: int,
    device: torch.device,
    n: int | None = None,
    *,
    low: int = 0,
    where: Tensor | None = None,
) -> Tensor:
    """Returns an int64 vector if its values lie in [low, high): all, or those where the index `where` is not −1."""
    index = check_vector(name, tensor, torch.int64, device, n)
    if values_are_checked(device):
        bad = _C.bad_index(read_address(index), index.shape[0], low, high, read_address(where))
        if bad >= 0:
            raise ValueError(f"{name}[{bad}]={int(index[bad])}: must be in [{low}, {high})")
    return index


def check_uniforms(uniforms: Tensor, device: torch.device, n: int) -> Tensor:
    """Returns a float64 vector if its values lie in [0, 1)."""
    uniforms = check_vector("uniforms", uniforms, torch.float64, device, n)
    if values_are_checked(device) and (bad := _C.bad_uniform(uniforms.data_ptr(), n)) >= 0:
        raise ValueError(f"uniforms[{bad}]={uniforms[bad].item()}: must be in [0, 1)")
    return uniforms


def check_offsets(offsets: Tensor, n: int, device: torch.device) -> Tensor:
    """Returns where the groups of n particles laid flat begin, (G + 1,) int64, if that ascends from 0 to n."""
    offsets = check_vector("offsets", offsets, torch.int64, device)
    if offsets.shape[0] == 0:
        raise ValueError("offsets: is empty, must have one element more than there are groups")
    if values_are_checked(device) and (bad := _C.bad_offset(offsets.data_ptr(), offsets.shape[0] - 1, n)) >= 0:
        raise ValueError(f"offsets[{bad}]={offsets[bad].item()}: must ascend from 0 to {n}")
    return offsets


def split_temperature(
    temperature: float | Tensor, m: Matrices, name: str = "temperature"
) -> tuple[float, Tensor | None]:
    """Splits a temperature into (the same for all rows, a vector of one per output row or None).

    Where there is a vector the first is 1. Temperatures of rows without logits are not looked at.
    """
    why = "must be positive and finite, as must 1/temperature in float32"
    if not isinstance(temperature, Tensor):
        if not (temperature > 0 and math.isfinite(temperature) and 1 / temperature < 1e38):
            raise ValueError(f"{name}={temperature!r}: {why}")
        return float(temperature), None
    device = m.logits.device
    temperature = check_vector(name, temperature, torch.float64, device, m.n_rows)
    if values_are_checked(device):
        addresses = read_address(temperature), read_address(m.logit_rows)
        if (bad := _C.bad_temperature(*addresses, m.n_rows)) >= 0:
            raise ValueError(f"{name}[{bad}]={temperature[bad].item()}: {why}")
    return 1.0, temperature


class Temperatures(NamedTuple):
    """Checked temperatures of `weigh` and `draw`: those of z and those of x, each for all rows or, if there is a
    vector, one per output row.

    Attributes:
        all, rows: T.
        powered, powered_rows: T/α, by which a power α multiplies scores.
        powers: whether there is a power, so that x is not z even without twist and mask.
    """

    all: float
    rows: Tensor | None
    powered: float
    powered_rows: Tensor | None
    powers: bool

    @classmethod
    def plain(cls, all_: float, rows: Tensor | None) -> Temperatures:
        """Makes those of rows without a power."""
        return cls(all_, rows, all_, rows, False)

    def arguments(self) -> tuple[float, int, float, int, bool]:
        """Gives them as fastsmc._C takes them."""
        return self.all, read_address(self.rows), self.powered, read_address(self.powered_rows), self.powers


def split_power(temperature: float | Tensor, power: float | Tensor, m: Matrices) -> Temperatures:
    """Splits temperatures and powers, each for all rows or one per output row."""
    all_, rows = split_temperature(temperature, m)
    if not isinstance(power, Tensor):
        if not (power > 0 and math.isfinite(power)):
            raise ValueError(f"power={power!r}: must be positive and finite")
        if power == 1.0:
            return Temperatures.plain(all_, rows)
        if rows is None:
            return Temperatures(all_, None, split_temperature(all_ / power, m, "temperature / power")[0], None, True)
    else:
        power = check_vector("power", power, torch.float64, m.logits.device, m.n_rows)
    powered = (all_ if rows is None else rows) / power
    return Temperatures(all_, rows, *split_temperature(powered, m, "temperature / power"), True)


class Matrices(NamedTuple):
    """Checked matrices of `weigh` and `draw`: output row r is logits[logit_rows[r]] with log_psi[psi_rows[r]] where
    mask[mask_rows[r]] allows; an index of None is the identity."""

    logits: Tensor
    logit_rows: Tensor | None
    log_psi: Tensor | None
    psi_rows: Tensor | None
    mask: Tensor | None
    mask_rows: Tensor | None

    @property
    def n_rows(self) -> int:
        return (self.logits if self.logit_rows is None else self.logit_rows).shape[0]

    @property
    def reweighs(self) -> bool:
        """Says whether a twist or a mask makes lse_psi another number than lse."""
        return self.log_psi is not None or self.mask is not None

    def arguments(self) -> tuple[MatrixArgs, MatrixArgs, MatrixArgs]:
        """Gives the three matrices as fastsmc._C takes them."""
        psi, mask = _argument(self.log_psi, self.psi_rows), _argument(self.mask, self.mask_rows)
        return _argument(self.logits, self.logit_rows), psi, mask


def read_address(tensor: Tensor | None) -> int:
    """Finds where a tensor's elements begin, for reading only, 0 for None: a tensor that is copied when it is written
    to (`torch._lazy_clone`) is not copied here, as it would be by `data_ptr`."""
    if tensor is None:
        return 0
    if torch._C._is_cow_tensor(tensor):  # type: ignore[attr-defined]  # not in torch's stubs
        start = torch._C._data_address(tensor)  # type: ignore[attr-defined]
        return start + tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr()


def _argument(matrix: Tensor | None, rows: Tensor | None) -> tuple[int, int, int, int]:
    if matrix is None:
        return NO_MATRIX
    return read_address(matrix), matrix.stride(0), DTYPE_CODES[matrix.dtype], read_address(rows)


def _check_matrix(name: str, matrix: Tensor, dtypes: Sequence[torch.dtype], device: torch.device) -> Tensor:
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        what = tuple(matrix.shape) if isinstance(matrix, Tensor) else repr(matrix)
        raise ValueError(f"{name}: must be a matrix (rows, columns), got {what}")
    if matrix.shape[1] < 1:
        raise ValueError(f"{name}: has no columns")
    if matrix.dtype not in dtypes:
        raise ValueError(f"{name}: dtype {matrix.dtype} must be one of {', '.join(map(str, dtypes))}")
    if matrix.stride(1) != 1 and matrix.shape[1] > 1:
        raise ValueError(f"{name}: column stride {matrix.stride(1)} must be 1")
    if matrix.device != device:
        raise ValueError(f"{name}: is on {matrix.device}, logits are on {device}")
    return matrix


def check_matrices(
    logits: Tensor,
    log_psi: Tensor | None,
    logit_rows: Tensor | None,
    psi_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
) -> Matrices:
    """Checks the arguments that `weigh` and `draw` share.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(logits, Tensor):
        raise ValueError(f"logits: must be a matrix (rows, columns), got {logits!r}")
    device = logits.device
    logits = _check_matrix("logits", logits, FLOATS, device)
    vocab = logits.shape[1]
    if logit_rows is not None:
        logit_rows = check_index("logit_rows", logit_rows, logits.shape[0], device, low=-1)
    n_rows = (logits if logit_rows is None else logit_rows).shape[0]

    def rows(name: str, index: Tensor | None, matrix: Tensor, low: int) -> Tensor | None:
        if index is not None:
            return check_index(f"{name}_rows", index, matrix.shape[0], device, n_rows, low=low, where=logit_rows)
        if matrix.shape[0] != n_rows:
            full = "log_psi" if name == "psi" else name
            raise ValueError(f"{full}: has {matrix.shape[0]} rows, must have {n_rows}, or {name}_rows must be given")
        return None

    if log_psi is not None:
        if isinstance(log_psi, Tensor) and log_psi.dtype == torch.float64:
            log_psi = log_psi.float()
        log_psi = _check_matrix("log_psi", log_psi, FLOATS, device)
        if log_psi.shape[1] != vocab:
            raise ValueError(f"log_psi: has {log_psi.shape[1]} columns, logits have {vocab}")
        psi_rows = rows("psi", psi_rows, log_psi, 0)
    elif psi_rows is not None:
        raise ValueError("psi_rows: given without log_psi")
    if mask is not None:
        mask = _check_matrix("mask", mask, (torch.int32,), device)
        if mask.shape[1] != -(-vocab // 32):
            raise ValueError(
                f"mask: has {mask.shape[1]} words per row, logits of {vocab} columns need {-(-vocab // 32)} of 32 bits"
            )
        mask_rows = rows("mask", mask_rows, mask, -1)
    elif mask_rows is not None:
        raise ValueError("mask_rows: given without mask")
    return Matrices(logits, logit_rows, log_psi, psi_rows, mask, mask_rows)


class Contrast(NamedTuple):
    """Checked arguments of `redraw`, `redraw_logits` and `gumbel`: output row r is logits[logit_rows[r]] where
    mask[mask_rows[r]] allows, beside factual[factual_rows[r]] and its token; an index of None is the identity."""

    logits: Tensor
    logit_rows: Tensor | None
    mask: Tensor | None
    mask_rows: Tensor | None
    factual: Tensor
    factual_rows: Tensor | None
    tokens: Tensor
    temperature: float
    temperatures: Tensor | None
    factual_temperature: float
    factual_temperatures: Tensor | None

    @property
    def matrices(self) -> Matrices:
        """The rows that are drawn from, as `weigh` has them."""
        return Matrices(self.logits, self.logit_rows, None, None, self.mask, self.mask_rows)

    @property
    def n_rows(self) -> int:
        return self.matrices.n_rows

    def arguments(self) -> ContrastArgs:
        """Gives all of it as fastsmc._C takes it."""
        logits, _, mask = self.matrices.arguments()
        return (
            logits, _argument(self.factual, self.factual_rows), mask, read_address(self.tokens), self.n_rows,
            self.logits.shape[1], self.temperature, read_address(self.temperatures), self.factual_temperature,
            read_address(self.factual_temperatures),
        )  # fmt: skip


def check_contrast(
    logits: Tensor,
    factual: Tensor,
    tokens: Tensor,
    logit_rows: Tensor | None,
    factual_rows: Tensor | None,
    mask: Tensor | None,
    mask_rows: Tensor | None,
    temperature: float | Tensor,
    factual_temperature: float | Tensor | None,
) -> Contrast:
    """Checks the arguments that `redraw`, `redraw_logits` and `gumbel` share.

    Raises:
        ValueError: naming the argument.
    """
    m = check_matrices(logits, None, logit_rows, None, mask, mask_rows)
    device, vocab = logits.device, logits.shape[1]
    factual = _check_matrix("factual", factual, FLOATS, device)
    if factual.shape[1] != vocab:
        raise ValueError(f"factual: has {factual.shape[1]} columns, logits have {vocab}")
    if factual_rows is not None:
        factual_rows = check_index(
            "factual_rows", factual_rows, factual.shape[0], device, m.n_rows, low=-1, where=m.logit_rows
        )
    elif factual.shape[0] != m.n_rows:
        raise ValueError(f"factual: has {factual.shape[0]} rows, must have {m.n_rows}, or factual_rows must be given")
    tokens = check_index("tokens", tokens, vocab, device, factual.shape[0])
    temperatures = split_temperature(temperature, m)
    factuals = temperatures
    if factual_temperature is not None:
        factuals = split_temperature(factual_temperature, m, "factual_temperature")
    return Contrast(
        m.logits, m.logit_rows, m.mask, m.mask_rows, factual, factual_rows, tokens, *temperatures, *factuals
    )
