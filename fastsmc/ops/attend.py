"""attend: decode attention of rows that share paged KV; csrc/include/fastsmc/attend.cuh and kernels/attend.py.

    plan_attend(table, lengths) -> AttendPlan      which rows read which blocks together; once for a table
    attend(query, key_cache, value_cache, plan, lengths, scale=...) -> out      once for each layer

On a GPU neither asks the device anything, so both may be part of a captured CUDA graph.

Rows have one query each, and one length or each its own; several groups may share a call. Particles with a common
history name the same blocks: what N rows read of a shared block is then one product of N × (query heads of a key head)
queries with its keys, not N reads.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from fastsmc import _C
from fastsmc.ops._tensors import DTYPE_CODES, check_choice, check_vector

#: How the elements of one block and head lie in memory, for B tokens and D dimensions; the names of the codes in
#: attend.cuh. plain: keys and values [B][D]. vector: keys [D][B], values [B][D]. tiled, for 16-bit elements: keys
#: [B / 16][D / 2][16][2], values [D / 16][B / 2][16][2].
LAYOUTS = ("plain", "vector", "tiled")
#: The Triton backend reads caches of the query's dtype, and of this one.
FLOAT8 = torch.float8_e4m3fn
#: How the CPU backend multiplies bfloat16: in 'tiles' (AMX), in 'pairs' (AVX-512 BF16), or widened to 'floats'.
BF16_MATH: str = _C.BF16_MATH
#: On the CPU head size and block size must be multiples of it.
LANES = 16


BACKENDS = ("cpu", "triton")


class AttendPlan:
    """Says which rows read which blocks together, for every layer of the model: all have the same block table.

    Attributes:
        backend: the backend that the plan is for.
        table: (R, C) int32, a copy.
        lengths: (R,) int32, a copy, or None: all rows have as many tokens.
        block_size: tokens per block, where there are lengths.
        offsets: (G + 1,) int32 on the table's device, the rows at which groups begin; None: there is one group.
        known_shared: as `plan_attend` got it.
        order: (R,) int32, rows sorted by their blocks; for 'triton' group by group. For 'triton' it and n_shared are
            made when first asked for, so that a plan that is not used costs the device a copy and no more.
        n_shared: 'cpu': columns on which all rows agree, the common prefix, an int. 'triton': the same of each group,
            (G,) int32 on the device.
        nodes: 'cpu': (K, 4) int32 of (row_begin, row_end, column_begin, column_end), see attend.cuh: rows
            order[row_begin:row_end) name the same blocks in these columns, and in all before. Depth first, so that a
            row meets its columns in order.
        n_nodes, n_reads: the number of nodes K, and the sum of their columns: so many blocks are read, where rows that
            read alone would read R · C. For 'triton' these are what the host knows: as if rows filled the table and
            shared no more than the columns that they are known to share.
        group_rows, group_nodes, group_reads: (G,) the rows of each group, and what it would read if it were planned
            alone: for a choice that does not depend on a group's neighbours. None for 'triton' where the host does not
            know the offsets.
        max_block: 'cpu': the largest block id.
    """

    def __init__(
        self,
        table: Tensor,
        backend: str,
        known_shared: int | Sequence[int] = 0,
        lengths: Tensor | None = None,
        block_size: int = 0,
        offsets: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.backend, self.table, self.known_shared = backend, table.contiguous().clone(), known_shared
        n_groups = 1 if offsets is None else len(offsets) - 1
        self._known = [known_shared] * n_groups if isinstance(known_shared, int) else list(known_shared)
        self.lengths, self.block_size = None if lengths is None else lengths.contiguous().clone(), block_size
        n_rows, n_columns = table.shape
        self.offsets, starts = _on_device(offsets, table.device)
        if offsets is None:
            starts = [0, n_rows]
        self.group_rows = self.group_nodes = self.group_reads = None
        if starts is not None:
            self.group_rows = [stop - start for start, stop in itertools.pairwise(starts)]
        if backend == "triton":
            self._tiles: dict[int, Tensor] = {}
            least = min(self._known)
            self.n_nodes = n_rows * (n_columns > least) + sum(known > 0 for known in self._known)
            self.n_reads = sum(self._known) + n_rows * (n_columns - least)
            if self.group_rows is not None:
                groups = list(zip(self.group_rows, self._known, strict=True))
                self.group_nodes = [n * (n_columns > known) + (n > 0 < known) for n, known in groups]
                self.group_reads = [(n > 0) * known + n * (n_columns - known) for n, known in groups]
                self.n_nodes, self.n_reads = sum(self.group_nodes), sum(self.group_reads)
            return
        used = self.table
        if self.lengths is not None:
            used = self.table[torch.arange(n_columns) * block_size < self.lengths[:, None]]
        low, high = torch.aminmax(used)
        if low < 0:
            raise ValueError(f"table: has a negative block id {int(low)}")
        self.max_block = int(high)
        order = torch.empty(n_rows, dtype=torch.int32)
        nodes = torch.from_numpy(_C.plan(self._table_arguments(), order.data_ptr()))
        self.nodes = nodes.view(-1, 4)
        widths = self.nodes[:, 3] - self.nodes[:, 2]
        self.n_nodes, self.n_reads = len(self.nodes), int(widths.sum())
        self._made = order, int(widths[0]) if int(self.nodes[0, 1]) == n_rows else 0
        self.group_nodes, self.group_reads = [self.n_nodes], [self.n_reads]
        if self.offsets is not None:
            counts = _C.count_reads(
                self._table_arguments(), order.data_ptr(), self.offsets.data_ptr(), len(self.offsets) - 1
            )
            self.group_nodes, self.group_reads = counts[::2].tolist(), counts[1::2].tolist()

    @cached_property
    def _made(self) -> tuple[Tensor, int | Tensor]:
        from fastsmc.kernels import attend as kernel

        return kernel.plan(self.table, self._known, self.offsets)

    def tiles(self, n_rows: int) -> Tensor:
        """Cuts groups into tiles of at most `n_rows` rows, for 'triton'; once for all layers."""
        from fastsmc.kernels import attend as kernel

        if n_rows not in self._tiles:
            self._tiles[n_rows] = kernel.cut_tiles(len(self.table), self.n_shared, self.offsets, n_rows)
        return self._tiles[n_rows]

    @property
    def order(self) -> Tensor:
        return self._made[0]

    @property
    def n_shared(self) -> int | Tensor:
        return self._made[1]

    def _table_arguments(self) -> tuple[int, int, int, int, int, int]:
        lengths = 0 if self.lengths is None else self.lengths.data_ptr()
        return self.table.data_ptr(), self.table.stride(0), *self.table.shape, lengths, self.block_size


def _on_device(values: Sequence[int] | Tensor | None, device: torch.device) -> tuple[Tensor | None, list[int] | None]:
    """Gives integers as an int32 tensor on the device, without waiting for it, and as the host knows them."""
    if values is None:
        return None, None
    if isinstance(values, Tensor) and values.device.type != "cpu":
        return values, None
    if isinstance(values, Tensor):
        values = values.tolist()
    pinned = torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True), list(values)


def plan_attend(
    table: Tensor,
    lengths: Tensor | None = None,
    *,
    block_size: int | None = None,
    offsets: Sequence[int] | Tensor | None = None,
    backend: str | None = None,
    known_shared: int | Sequence[int] = 0,
) -> AttendPlan:
    """Plans a table (R, C) int32 of block ids, R and C at least 1. Any table will do; it pays where rows share.

    Args:
        lengths: (R,) int32 on the table's device, the tokens of each row, in [1, C · block_size]: what the table holds
            after a row's ceil(length / block_size) columns is not looked at. None: all rows fill all columns alike.
        block_size: tokens per block, with lengths.
        offsets: the rows of several groups lie one group after the other, those of group g are [offsets[g], offsets[g +
            1]); a group may be empty. Integers, G + 1 of them, or (G + 1,) int32 on the table's device. Groups may name
            the same blocks. 'cpu' reads such blocks once for all groups, 'triton' once for each.
        known_shared: in [0, C], columns on which all rows of a group agree, as far as the caller knows; there may be
            more. One number for all groups, or (G,). 'cpu' finds out by itself.
        backend: 'cpu', 'triton' (CUDA tensors; others under TRITON_INTERPRET=1) or None for the device's own. Values of
            tensors are only checked by 'cpu': the other does not look at them.

    Raises:
        ValueError: naming the argument.
    """
    if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.int32 or not table.numel():
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
        raise ValueError(f"table: must be an (R, C) int32 tensor, R and C at least 1, got {got}")
    n_rows, n_columns = table.shape
    n_groups = 1 if offsets is None else len(offsets) - 1
    known = [known_shared] * n_groups if isinstance(known_shared, int) else list(known_shared)
    if len(known) != n_groups or not all(0 <= k <= n_columns for k in known):
        raise ValueError(
            f"known_shared={known_shared!r}: must be in [0, {n_columns}], the columns of table, for {n_groups} groups"
        )
    if backend is None:
        backend = "cpu" if table.device.type == "cpu" else "triton"
    check_choice("backend", backend, BACKENDS)
    if backend == "cpu" and table.device.type != "cpu":
        raise ValueError(f"backend='cpu': table is on {table.device}")
    if backend == "triton" and table.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend='triton': table is on cpu, which needs TRITON_INTERPRET=1 in the environment")
    _check_offsets(offsets, n_rows, table.device)
    if (lengths is None) != (block_size is None):
        raise ValueError("lengths and block_size: must be given together")
    if lengths is not None and block_size is not None:
        if block_size < 1:
            raise ValueError(f"block_size={block_size!r}: must be at least 1")
        check_vector("lengths", lengths, torch.int32, table.device, n_rows)
        if backend == "cpu" and (bad := (lengths < 1) | (lengths > n_columns * block_size)).any():
            row = int(bad.int().argmax())
            raise ValueError(
                f"lengths[{row}]={int(lengths[row])}: must be in [1, {n_columns * block_size}], {n_columns} columns of "
                f"{block_size} tokens"
            )
    return AttendPlan(table, backend, known_shared, lengths, block_size or 0, offsets)


def _check_offsets(offsets: Sequence[int] | Tensor | None, n_rows: int, device: torch.device) -> None:
    if offsets is None:
        return
    if isinstance(offsets, Tensor):
        check_vector("offsets", offsets, torch.int32, device)
        if device.type != "cpu":
            return
        offsets = offsets.tolist()
    if (
        len(offsets) < 2
        or offsets[0] != 0
        or offsets[-1] != n_rows
        or any(b < a for a, b in itertools.pairwise(offsets))
    ):
        raise ValueError(f"offsets={offsets!r}: must ascend from 0 to {n_rows}, the rows of table")


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
    """Computes softmax(scale · q · K) V of each row and head, over the row's first `length` tokens.

    Head h of the query reads key head h · Hk / Hq. Products are of bfloat16 where the CPU has AVX-512 BF16 or AMX, and
    of both 16-bit types on a GPU; softmax weights are rounded to that type first. All else, and all sums, are float32.
    What lies in a block beyond `length` does not matter. NaN in a row's keys or query makes the row NaN.

    On the CPU the bits of a row hang on its own query, tokens and length alone: not on the other rows of the plan, nor
    on the number of threads (attend.cuh says how; on AMX for blocks of multiples of 32). 'triton' does not promise it:
    it splits a row's tokens into parts, the fewer the more rows there are.

    Args:
        query: (R, Hq, D) float32, bfloat16 or float16, row by row as in plan.table; [r] contiguous.
        key_cache, value_cache: (n_blocks, Hk, B, D) of the same dtype, with equal strides, Hq a multiple of Hk. On the
            CPU [b, h] is contiguous, laid out as `layout` says whatever the shape says; D and B multiples of 16. For
            'triton' they may be float8_e4m3fn, whatever the query: widened to its dtype in the products.
        plan: of the rows' table; with one length for all rows of C = ceil(length / B) columns.
        length: tokens of each row, >= 1: one number; or (R,) int32, for the CPU those that the plan was made for. For a
            plan of 'triton' also (1,) int32; tensors lie on the device and hold numbers up to C · B.
        scale: > 0.
        layout: one of LAYOUTS; 'plain' for 'triton'.
        out: (R, Hq, D) to write to, as the query; default a new tensor.
        k_scale, v_scale: what a key and a value of a float8 cache are multiplied by, a number or a float32 tensor of
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
        shapes = ((n_rows,), (1,)) if plan.backend == "triton" else ((n_rows,),)
        if length.dtype != torch.int32 or length.shape not in shapes or length.device != device:
            raise ValueError(
                f"length: must be an int, or ({n_rows},) int32 on {device}, or (1,) for 'triton', got {length.dtype} "
                f"{tuple(length.shape)} on {length.device}"
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
        tiles = plan.tiles(kernel.tile_shape(n_heads // n_key_heads, block_size, head_dim)["ROWS"])
        kernel.attend(query, key_cache, value_cache, plan.table, plan.order, tiles, length, scale, out, *scales)
        return out
    if isinstance(length, Tensor):
        if plan.lengths is None or not torch.equal(length, plan.lengths) or plan.block_size != block_size:
            raise ValueError("length: (R,) must be the lengths that plan was made for, as must B")
        length = 0  # the table has them
    elif plan.lengths is not None:
        raise ValueError(f"length={length}: plan was made for (R,) lengths")
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
    """Gives a cache's scale as float32 of one element on the device; None where there is none, which means 1."""
    if scale is None:
        return None
    if not float8:
        raise ValueError(f"{name}: belongs to caches of {FLOAT8}, read by a plan of 'triton'")
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
