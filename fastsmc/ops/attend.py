"""attend: decode attention of rows that share paged KV; csrc/include/fastsmc/attend.cuh and kernels/attend.py.

    plan_attend(table) -> AttendPlan      which rows read which blocks together; once for a table
    attend(query, key_cache, value_cache, plan, length, scale=...) -> out      once for each layer

On a GPU neither asks the device anything, so both may be part of a captured CUDA graph.

Rows of equal length, one query each. Particles with a common history name the same blocks: what N rows read of a shared
block is then one product of N × (query heads of a key head) queries with its keys, not N reads.
"""

from __future__ import annotations

import math
import os
from functools import cached_property

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops._tensors import DTYPE_CODES, check_choice

#: how the elements of one block and head lie in memory: names of the codes in attend.cuh, (B, D) tokens and dimensions.
#: plain: keys and values [B][D]. vector: keys [D][B], values [B][D]. tiled: keys [B / 16][D / 2][16][2], values
#: [D / 16][B / 2][16][2], of 16-bit elements.
LAYOUTS = ("plain", "vector", "tiled")
#: of caches that the Triton backend reads beside those of the query's dtype
FLOAT8 = torch.float8_e4m3fn
#: how the CPU backend multiplies bfloat16: 'tiles' (AMX), 'pairs' (AVX-512 BF16), or widened, as 'floats'
BF16_MATH: str = _C.BF16_MATH
#: the head size must be a multiple of it, as must the block size
LANES = 16


BACKENDS = ("cpu", "triton")


class AttendPlan:
    """Who reads what together, for every layer that the table stands for.

    Attributes:
        backend: whose plan it is.
        table: (R, C) int32, a copy.
        known_shared: as `plan_attend` got it.
        order: (R,) int32, rows sorted by their blocks. For 'triton' it and n_shared are made when first asked for, so
            that a plan that is not used costs the device a copy.
        n_shared: columns on which all rows agree, the common prefix: an int, or for 'triton' (1,) int32 on the device.
        nodes: 'cpu': (K, 4) int32 of (row_begin, row_end, column_begin, column_end), see attend.cuh: rows
            order[row_begin:row_end) name the same blocks in these columns, and in all before. Depth first, so that a
            row meets its columns in order.
        n_nodes, n_reads: number of nodes K and Σ of their columns: block reads, where each row on its own makes R · C.
            For 'triton' what the host knows: as if rows shared no more than the columns that they are known to share.
        max_block: 'cpu': the largest block id.
    """

    def __init__(self, table: Tensor, backend: str, known_shared: int = 0) -> None:
        self.backend, self.table, self.known_shared = backend, table.contiguous().clone(), known_shared
        if backend == "triton":
            n_rows, n_columns = table.shape
            self.n_nodes = n_rows * (n_columns > known_shared) + (known_shared > 0)
            self.n_reads = known_shared + n_rows * (n_columns - known_shared)
            return
        low, high = torch.aminmax(self.table)
        if low < 0:
            raise ValueError(f"table: has a negative block id {int(low)}")
        self.max_block = int(high)
        order = torch.empty(len(table), dtype=torch.int32)
        nodes = torch.from_numpy(_C.plan(self._table_arguments(), order.data_ptr()))
        self.nodes = nodes.view(-1, 4)
        widths = self.nodes[:, 3] - self.nodes[:, 2]
        self.n_nodes, self.n_reads = len(self.nodes), int(widths.sum())
        self._made = order, int(widths[0]) if int(self.nodes[0, 1]) == len(table) else 0

    @cached_property
    def _made(self) -> tuple[Tensor, int | Tensor]:
        from fastsmc.kernels import attend as kernel

        return kernel.plan(self.table, self.known_shared)

    @property
    def order(self) -> Tensor:
        return self._made[0]

    @property
    def n_shared(self) -> int | Tensor:
        return self._made[1]

    def _table_arguments(self) -> tuple[int, int, int, int]:
        return self.table.data_ptr(), self.table.stride(0), *self.table.shape


def plan_attend(table: Tensor, *, backend: str | None = None, known_shared: int = 0) -> AttendPlan:
    """The plan of a table (R, C) int32 of block ids, both at least 1. Any table will do; it pays where rows share.

    Args:
        known_shared: in [0, C], columns on which all rows agree, as far as the caller knows; there may be more. 'cpu'
            finds out by itself.
        backend: 'cpu', 'triton' (CUDA tensors; others under TRITON_INTERPRET=1) or None for the device's own. Values of
            the table are only checked by 'cpu': the other does not look at them.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.int32 or not table.numel():
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
        raise ValueError(f"table: must be an (R, C) int32 tensor, R and C at least 1, got {got}")
    if not 0 <= known_shared <= table.shape[1]:
        raise ValueError(f"known_shared={known_shared!r}: must be in [0, {table.shape[1]}], the columns of table")
    if backend is None:
        backend = "cpu" if table.device.type == "cpu" else "triton"
    check_choice("backend", backend, BACKENDS)
    if backend == "cpu" and table.device.type != "cpu":
        raise ValueError(f"backend='cpu': table is on {table.device}")
    if backend == "triton" and table.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend='triton': table is on cpu, which needs TRITON_INTERPRET=1 in the environment")
    return AttendPlan(table, backend, known_shared)


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttendPlan,
    length: int | Tensor,
    *,
    scale: float,
    layout: str = "plain",
    out: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
) -> Tensor:
    """softmax(scale · q · K) V of each row and head, over the first `length` tokens that the row's blocks hold.

    Head h of the query reads key head h · Hk / Hq. bfloat16 stays so in the products where the CPU has AVX-512 BF16 or
    AMX, as on a GPU do both 16-bit types, and softmax weights are rounded to it; everything else, and all sums, are
    float32. What lies in a block beyond `length` does not matter. NaN in a row's keys or query makes the row NaN.

    Args:
        query: (R, Hq, D) float32, bfloat16 or float16, row by row as in plan.table; [r] contiguous.
        key_cache, value_cache: (n_blocks, Hk, B, D) of the same dtype, with equal strides, Hq a multiple of Hk. On the
            CPU [b, h] is contiguous, laid out as `layout` says whatever the shape says; D and B multiples of 16. For
            'triton' they may be float8_e4m3fn, whatever the query: widened to its dtype in the products.
        plan: of the rows' table, with C = ceil(length / B) columns.
        length: tokens of every row, >= 1. For a plan of 'triton' also (1,) int32 on the device, up to C · B.
        scale: > 0.
        layout: one of LAYOUTS; 'plain' for 'triton'.
        out: (R, Hq, D) to write to, as the query; default a new tensor.
        k_scale, v_scale: of float8 caches: what a key and a value are multiplied by, a number or a float32 tensor of
            one element on the device, which the host does not read; default 1.

    Raises:
        ValueError: naming the argument.
    """
    device = plan.table.device
    if query.dim() != 3 or query.dtype not in DTYPE_CODES or query.device != device:
        raise ValueError(
            f"query: must be (R, Hq, D) of {', '.join(map(str, DTYPE_CODES))} on {device}, got {query.dtype} "
            f"{tuple(query.shape)} on {query.device}"
        )
    n_rows, n_heads, head_dim = query.shape
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for name, rows in (("query", query), ("out", out)):
        if rows.shape != query.shape or rows.dtype != query.dtype or rows.device != device:
            raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)} on {rows.device}, must be as query")
        if rows.stride(2) != 1 or rows.stride(1) != head_dim:
            raise ValueError(f"{name}: each row must be contiguous, strides are {rows.stride()}")
    check_choice("layout", layout, LAYOUTS)
    token_stride = head_dim if plan.backend == "cpu" else key_cache.stride(-2)
    float8 = plan.backend == "triton" and key_cache.dtype == FLOAT8
    cache_dtype = FLOAT8 if float8 else query.dtype
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.dtype != cache_dtype or cache.device != device:
            raise ValueError(
                f"{name}: must be (n_blocks, Hk, B, D) {cache_dtype} on {device}, got {cache.dtype} "
                f"{tuple(cache.shape)} on {cache.device}"
            )
        if cache.shape[3] != head_dim or cache.stride(3) != 1 or cache.stride(2) != token_stride:
            raise ValueError(
                f"{name}: blocks must be contiguous with D={head_dim} as in query, got {tuple(cache.shape)} with "
                f"strides {cache.stride()}"
            )
    if key_cache.shape != value_cache.shape or key_cache.stride() != value_cache.stride():
        raise ValueError("value_cache: must have the shape and strides of key_cache")
    n_blocks, n_key_heads, block_size, _ = key_cache.shape
    if n_heads % n_key_heads:
        raise ValueError(f"query: Hq={n_heads} must be a multiple of Hk={n_key_heads}")
    if isinstance(length, Tensor):
        if plan.backend != "triton" or length.dtype != torch.int32 or length.shape != (1,) or length.device != device:
            raise ValueError(
                f"length: must be an int, or (1,) int32 on the device of a plan of 'triton', got {length!r}"
            )
        if plan.table.shape[0] != n_rows:
            raise ValueError(f"plan: of a table {tuple(plan.table.shape)}, query has R={n_rows} rows")
    elif plan.table.shape[0] != n_rows or length < 1 or -(-length // block_size) != plan.table.shape[1]:
        raise ValueError(
            f"plan: of a table {tuple(plan.table.shape)}; R={n_rows} rows of length={length} need "
            f"({n_rows}, {-(-length // block_size)})"
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r}: must be positive and finite")
    scales = [_cache_scale(name, s, float8, device) for name, s in (("k_scale", k_scale), ("v_scale", v_scale))]
    if plan.backend == "triton":
        from fastsmc.kernels import attend as kernel

        if layout != "plain":
            raise ValueError(f"layout={layout!r}: 'triton' reads 'plain'")
        if not isinstance(length, Tensor):
            length = torch.full((1,), length, dtype=torch.int32, device=device)  # waits for nothing
        kernel.attend(query, key_cache, value_cache, plan.table, plan.order, plan.n_shared, length, scale, out, *scales)
        return out
    if head_dim % LANES or block_size % LANES:
        raise ValueError(f"key_cache: D={head_dim} and B={block_size} must be multiples of {LANES}")
    if layout == "tiled" and query.dtype == torch.float32:
        raise ValueError("layout='tiled': is of 16-bit elements, query is torch.float32")
    if plan.max_block >= n_blocks:
        raise ValueError(f"plan: names block {plan.max_block}, key_cache has {n_blocks}")
    kv = (
        key_cache.data_ptr(), value_cache.data_ptr(), key_cache.stride(0), key_cache.stride(1), block_size, head_dim,
        LAYOUTS.index(layout),
    )  # fmt: skip
    _C.attend(
        query.data_ptr(), query.stride(0), out.data_ptr(), out.stride(0), DTYPE_CODES[query.dtype], n_heads,
        n_key_heads, kv, plan._table_arguments(), length, plan.order.data_ptr(), plan.nodes.data_ptr(),
        len(plan.nodes), scale,
    )  # fmt: skip
    return out


def _cache_scale(name: str, scale: float | Tensor | None, float8: bool, device: torch.device) -> Tensor | None:
    """A scale of a cache as float32 of one element on the device; None: of a cache that has none, or of 1."""
    if scale is None:
        return None
    if not float8:
        raise ValueError(f"{name}: is of caches of {FLOAT8}, with a plan of 'triton'")
    if isinstance(scale, Tensor):
        if scale.dtype != torch.float32 or scale.numel() != 1 or scale.device != device:
            raise ValueError(
                f"{name}: must be a number or one float32 on {device}, got {scale.dtype} {tuple(scale.shape)} on "
                f"{scale.device}"
            )
        return scale
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"{name}={scale!r}: must be positive and finite")
    return torch.full((1,), scale, dtype=torch.float32, device=device)
