"""attend: decode attention of rows that share paged keys and values; arithmetic in csrc/include/fastsmc/attend.cuh.

    plan_attend(table) -> AttendPlan      which rows read which blocks together; once for a table
    attend(query, key_cache, value_cache, plan, length, scale=...) -> out      once for each layer

Rows of equal length, one query each. Particles with a common history name the same blocks: what N rows read of a shared
block is then one product of N × (query heads of a key head) queries with its keys, not N reads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops._tensors import DTYPE_CODES, check_choice

#: how the elements of one block and head lie in memory: names of the codes in attend.cuh, (B, D) tokens and dimensions.
#: plain: keys and values [B][D]. vector: keys [D][B], values [B][D]. tiled: keys [B / 16][D / 2][16][2], values
#: [D / 16][B / 2][16][2], of 16-bit elements.
LAYOUTS = ("plain", "vector", "tiled")
#: whether this CPU multiplies bfloat16 without widening it
BF16_PAIRS: bool = _C.BF16_PAIRS
#: the head size must be a multiple of it, as must the block size
LANES = 16


class AttendPlan:
    """Who reads what together: the nodes of a table (attend.cuh), for every layer that the table stands for.

    Attributes:
        table: (R, C) int32, a copy.
        order: (R,) int32, rows sorted by their blocks.
        nodes: (K, 4) int32 of (row_begin, row_end, column_begin, column_end): rows order[row_begin:row_end) name the
            same blocks in these columns, and in all before. Depth first, so that a row meets its columns in order.
        n_shared: columns on which all rows agree: the common prefix.
        n_reads: Σ over the nodes of their columns: block reads, where each row on its own makes R · C.
        max_block: the largest block id.
    """

    def __init__(self, table: Tensor) -> None:
        self.table = table.contiguous().clone()
        self.order = torch.empty(len(table), dtype=torch.int32)
        low, high = torch.aminmax(self.table)
        if low < 0:
            raise ValueError(f"table: has a negative block id {int(low)}")
        self.max_block = int(high)
        nodes = torch.from_numpy(_C.plan(self._table_arguments(), self.order.data_ptr()))
        self.nodes = nodes.view(-1, 4)
        widths = self.nodes[:, 3] - self.nodes[:, 2]
        self.n_reads = int(widths.sum())
        self.n_shared = int(widths[0]) if int(self.nodes[0, 1]) == len(table) else 0

    def _table_arguments(self) -> tuple[int, int, int, int]:
        return self.table.data_ptr(), self.table.stride(0), *self.table.shape

    def fits(self, table: Tensor) -> bool:
        """Whether it is the plan of this table."""
        return torch.equal(self.table, table)


def plan_attend(table: Tensor) -> AttendPlan:
    """The plan of a table (R, C) int32 of block ids, both at least 1. Any table will do; it pays where rows share.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.int32 or not table.numel():
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
        raise ValueError(f"table: must be an (R, C) int32 tensor, R and C at least 1, got {got}")
    if table.device.type != "cpu":
        raise ValueError(f"table: is on {table.device}, must be on the CPU")
    return AttendPlan(table)


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: AttendPlan,
    length: int,
    *,
    scale: float,
    layout: str = "plain",
    out: Tensor | None = None,
) -> Tensor:
    """softmax(scale · q · K) V of each row and head, over the first `length` tokens that the row's blocks hold.

    Head h of the query reads key head h · Hk / Hq. bfloat16 stays so in the products where the CPU has AVX-512 BF16,
    and softmax weights are rounded to it; everything else, and all sums, are float32. What lies in a block beyond
    `length` does not matter. NaN in a row's keys or query makes the row NaN.

    Args:
        query: (R, Hq, D) float32, bfloat16 or float16, row by row as in plan.table; [r] contiguous.
        key_cache, value_cache: (n_blocks, Hk, B, D) of the same dtype, [b, h] contiguous, and laid out as `layout` says
            whatever their shape says. Equal strides. D and B multiples of 16, Hq a multiple of Hk.
        plan: of the rows' table, with C = ceil(length / B) columns.
        length: tokens of every row, >= 1.
        scale: > 0.
        layout: one of LAYOUTS.
        out: (R, Hq, D) to write to, as the query; default a new tensor.

    Raises:
        ValueError: naming the argument.
    """
    if query.dim() != 3 or query.dtype not in DTYPE_CODES or query.device.type != "cpu":
        raise ValueError(
            f"query: must be (R, Hq, D) of {', '.join(map(str, DTYPE_CODES))} on the CPU, got {query.dtype} "
            f"{tuple(query.shape)} on {query.device}"
        )
    n_rows, n_heads, head_dim = query.shape
    if out is None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for name, rows in (("query", query), ("out", out)):
        if rows.shape != query.shape or rows.dtype != query.dtype or rows.device != query.device:
            raise ValueError(f"{name}: {rows.dtype} {tuple(rows.shape)} on {rows.device}, must be as query")
        if rows.stride(2) != 1 or rows.stride(1) != head_dim:
            raise ValueError(f"{name}: each row must be contiguous, strides are {rows.stride()}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.dim() != 4 or cache.dtype != query.dtype or cache.device != query.device:
            raise ValueError(
                f"{name}: must be (n_blocks, Hk, B, D) {query.dtype} on the CPU, got {cache.dtype} "
                f"{tuple(cache.shape)} on {cache.device}"
            )
        if cache.shape[3] != head_dim or cache.stride(3) != 1 or cache.stride(2) != head_dim:
            raise ValueError(
                f"{name}: blocks must be contiguous with D={head_dim} as in query, got {tuple(cache.shape)} with "
                f"strides {cache.stride()}"
            )
    if key_cache.shape != value_cache.shape or key_cache.stride() != value_cache.stride():
        raise ValueError("value_cache: must have the shape and strides of key_cache")
    n_blocks, n_key_heads, block_size, _ = key_cache.shape
    if head_dim % LANES or block_size % LANES:
        raise ValueError(f"key_cache: D={head_dim} and B={block_size} must be multiples of {LANES}")
    if n_heads % n_key_heads:
        raise ValueError(f"query: Hq={n_heads} must be a multiple of Hk={n_key_heads}")
    check_choice("layout", layout, LAYOUTS)
    if layout == "tiled" and query.dtype == torch.float32:
        raise ValueError("layout='tiled': is of 16-bit elements, query is torch.float32")
    if plan.table.shape[0] != n_rows or length < 1 or -(-length // block_size) != plan.table.shape[1]:
        raise ValueError(
            f"plan: of a table {tuple(plan.table.shape)}; R={n_rows} rows of length={length} need "
            f"({n_rows}, {-(-length // block_size)})"
        )
    if plan.max_block >= n_blocks:
        raise ValueError(f"plan: names block {plan.max_block}, key_cache has {n_blocks}")
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale={scale!r}: must be positive and finite")
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
