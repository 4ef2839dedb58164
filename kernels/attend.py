"""attend in Triton: decode attention in which rows that share a KV block read it together. Two launches per layer.

    plan     (PyTorch operations, once per table) sorts the rows of each group by their histories, so that those that
             share a block are neighbours, counts the columns on which all rows of a group agree, and cuts groups into
             tiles of rows
    tiles    program (tile of rows, key head, part of the tokens): keeps its queries, rows × query heads of the key
             head, in registers. It reads the common prefix 64 tokens at a time, one dense product each. Later columns
             come in windows of 64 tokens, such as four columns of 16. Rows of the tile that name the same blocks
             throughout a window, and have as many tokens in it, are a *party*; each party reads the window as one
             product, one party after the other
    merge    program (row, head): joins the parts of a row by log-sum-exp; not launched where there is one part

Parties are found anew in each window, by comparing blocks, so any table is right. In a genealogy rows part for good; in
the window where they part, both sides read the blocks before the parting, the second one from the cache. A window of
one column would read no block twice, but a product of 16 tokens for a few rows waits on the latency of memory: with 64
tokens four times as many bytes are under way at once.

Nothing is read on the host: lengths, order, groups and the width of their prefixes lie on the device, so a captured
graph stays right when they change. Shapes (rows, groups, columns of the table) are those of the capture.

A row's bits hang on its neighbours here: windows begin where the prefix of its group ends, and tokens are split into
the more parts the fewer rows there are. Parts at fixed positions would do away with it, and cost one more round of all
outputs through memory for many rows, or most of a GPU's programs for few.

Scores are float32 in units of log 2. Weights are rounded to the dtype of the query for the second product, as in
attend.cuh. float32 is multiplied in float32, not in tf32. Caches in float8 (e4m3) are widened to the dtype of the
query, which is exact; their scales go into the scale of the scores and into the output.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from fastsmc.kernels.launch import on_device
from torch import Tensor

#: Queries per tile, rows × query heads of a key head: one product of 64 × 64 per warp group.
QUERIES = 64
#: Tokens of the common prefix per product.
TOKENS = 64
#: Tokens of the later columns per product.
WINDOW = 64
#: So many programs keep an H100's 132 multiprocessors busy: tokens are split into parts until there are as many.
PROGRAMS = 528
#: `merge` joins at most so many parts.
MAX_PARTS = 16
LOG2E = 1.4426950408889634

INF = tl.constexpr(float("inf"))


def plan(table: Tensor, known_shared: Sequence[int] = (0,), offsets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Makes (order (R,) int32, n_shared (G,) int32) of a table (R, C) int32; the host reads nothing of it.

    order has the rows of each group sorted by their blocks, column by column. The ranks within several neighbouring
    columns, as many as fit 62 bits, make one key; the ranks of such keys stand for all their columns, and so on up to
    the whole row. 32 columns of 1024 rows take two rounds, each a single sort of all its columns. All rows of group g
    agree on its first known_shared[g] columns; those that are known of all groups need no sorting.

    Args:
        offsets: (G + 1,) int32, the rows at which groups begin; None: all rows are one group.
    """
    n_rows, device = table.shape[0], table.device
    skip = min(known_shared)
    table = table[:, skip:]
    if table.shape[1] == 0:
        order = torch.arange(n_rows, dtype=torch.int32, device=device)
        return order, torch.full((len(known_shared),), skip, dtype=torch.int32, device=device)
    together = 62 // max(1, (n_rows - 1).bit_length())
    columns = table.t().long()
    first = torch.zeros(n_rows, dtype=torch.int64, device=device)  # the first row of each row's group
    group = first
    if offsets is not None:
        rows = torch.arange(n_rows, dtype=torch.int32, device=device)
        group = torch.searchsorted(offsets[1:].contiguous(), rows, right=True)
        first = offsets.long()[group]
        columns = torch.cat([group[None], columns])
    ranks = _dense(columns)
    while len(ranks) > 1:
        width = min(together, len(ranks))
        if short := -len(ranks) % width:
            ranks = torch.cat([ranks, torch.zeros(short, n_rows, dtype=ranks.dtype, device=device)])
        keys = ranks[::width]
        for i in range(1, width):
            keys = torch.add(ranks[i::width], keys, alpha=n_rows)
        ranks = _dense(keys)
    order = torch.sort(ranks[0], stable=True).indices.int()
    same = (table == table[first]).int().cumprod(1).sum(1)
    agreed = torch.full((len(known_shared),), table.shape[1], dtype=same.dtype, device=device)
    return order, (agreed.scatter_reduce(0, group, same, "amin") + skip).int()


def cut_tiles(n_rows: int, n_shared: Tensor, offsets: Tensor | None, size: int) -> Tensor:
    """Cuts each group's rows into tiles of at most `size`: (T, 3) int32 of (first, end, columns its group shares).

    T is the most that there can be. Tiles that are not needed are empty, and come last.
    """
    device, n_groups = n_shared.device, len(n_shared)
    if offsets is None:
        offsets = torch.arange(0, n_rows + 1, n_rows, device=device)
    starts = offsets.long()
    counts = (starts.diff() + size - 1) // size
    ends = counts.cumsum(0)
    tile = torch.arange(min(n_rows, (n_rows + n_groups * (size - 1)) // size), device=device)
    group = torch.searchsorted(ends, tile, right=True).clamp(max=n_groups - 1)
    first = starts[group] + (tile - (ends - counts)[group]) * size
    end = torch.minimum(first + size, starts[1:][group])
    return torch.stack([torch.minimum(first, end), end, n_shared[group].long()], dim=1).int()


def _dense(keys: Tensor) -> Tensor:
    """Replaces each row's values, (K, R) int64, by their ranks; equal values have equal ranks."""
    values, index = torch.sort(keys, dim=1, stable=True)
    steps = torch.zeros_like(values)
    steps[:, 1:] = values[:, 1:] != values[:, :-1]
    return torch.empty_like(values).scatter_(1, index, steps.cumsum(1))


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """Multiplies a and b and sums in float32. WIDE takes float32 operands, without tf32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def read(
    keys, values, at, written, here, query, top, total, acc, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Adds tokens to the running (top, total, acc) of queries; without MASKED of all, else of those that are `here`.

    at (T,) are the tokens' offsets in keys and values, written (T,) says which of them exist, here is (QUERIES,) bool.
    """
    dim = tl.arange(0, DIMS)
    inside = written[:, None] & (dim < DIM)[None, :]
    at = at[:, None] + dim[None, :]
    key = tl.load(keys + at, mask=inside, other=0.0).to(query.dtype)
    value = tl.load(values + at, mask=inside, other=0.0)  # on its way while the scores are made
    scores = tl.where(written[None, :], product(query, tl.trans(key), WIDE) * scale, -INF)
    if MASKED:
        scores = tl.where(here[:, None], scores, -INF)
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == -INF, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    acc = acc * keep[:, None] + product(weights.to(query.dtype), value.to(query.dtype), WIDE)
    return higher, total * keep + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["n_rows", "table_stride", "length_stride"])
def tiles(
    query, query_stride, keys, values, block_stride, head_stride, token_stride, key_scale, value_scale, table,
    table_stride, order, spans, length, length_stride, scale, n_rows, out, out_stride, lse, HEADS: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
    SPAN: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    head, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    spans += tl.program_id(0) * 3
    start, end = tl.load(spans), tl.load(spans + 1)
    # query i of the tile: row i // GROUP of the tile, head i % GROUP of the key head's
    i = tl.arange(0, QUERIES)
    place = start + i // GROUP
    real = (i < ROWS * GROUP) & (place < end)
    row = tl.load(order + place, mask=real, other=0).to(tl.int64)
    dim = tl.arange(0, DIMS)
    inside = real[:, None] & (dim < DIM)[None, :]
    query_head = head * GROUP + i % GROUP
    q = tl.load(query + row[:, None] * query_stride + query_head[:, None] * DIM + dim[None, :], mask=inside, other=0.0)
    if key_scale is not None:
        scale *= tl.load(key_scale)

    tokens = tl.load(length + row * length_stride, mask=real, other=0)
    longest = tl.max(tokens)
    shortest = tl.min(tl.where(real, tokens, longest))
    common = tl.minimum(tl.load(spans + 2), shortest // SIZE) * SIZE  # windows begin with a block
    prefix = table + tl.load(order + start, mask=start < end, other=0).to(tl.int64) * table_stride
    top = tl.full((QUERIES,), -INF, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIMS), tl.float32)
    chunks = tl.cdiv(common, TOKENS)
    for chunk in range(chunks * part // parts, chunks * (part + 1) // parts):
        token = chunk * TOKENS + tl.arange(0, TOKENS)
        written = token < common
        block = tl.load(prefix + token // SIZE, mask=written, other=0).to(tl.int64)
        at = block * block_stride + token % SIZE * token_stride
        top, total, acc = read(keys, values, at, written, real, q, top, total, acc, scale, False, DIM, DIMS, WIDE)
    windows = tl.cdiv(longest - common, SPAN)
    for window in range(windows * part // parts, windows * (part + 1) // parts):
        first = common + window * SPAN
        # read again: held meanwhile, they would take registers
        row = tl.load(order + place, mask=real, other=0).to(tl.int64)
        stop = tl.minimum(first + SPAN, tl.load(length + row * length_stride, mask=real, other=0))
        token = first + tl.arange(0, LANES)
        column = first // SIZE + tl.arange(0, COLUMNS)
        named = column < tl.cdiv(tl.max(stop), SIZE)
        blocks = tl.load(
            table + row[:, None] * table_stride + column[None, :], mask=real[:, None] & named[None, :], other=0
        )
        left = tl.where(real & (stop > first), i, QUERIES)  # the queries that have not had their turn
        leader = tl.min(left)
        while leader < QUERIES:
            ahead = tl.load(order + start + leader // GROUP).to(tl.int64)
            leaders = table + ahead * table_stride
            until = tl.minimum(first + SPAN, tl.load(length + ahead * length_stride))
            written = token < until
            same = blocks == tl.load(leaders + column, mask=named, other=0)[None, :]
            same |= (column >= tl.cdiv(until, SIZE))[None, :]  # neither has these
            here = (left < QUERIES) & (stop == until) & (tl.min(same.to(tl.int32), 1) == 1)
            block = tl.load(leaders + token // SIZE, mask=written, other=0).to(tl.int64)
            at = block * block_stride + token % SIZE * token_stride
            top, total, acc = read(keys, values, at, written, here, q, top, total, acc, scale, True, DIM, DIMS, WIDE)
            left = tl.where(here, QUERIES, left)
            leader = tl.min(left)
    rest = acc / total[:, None]
    if value_scale is not None:
        rest *= tl.load(value_scale)
    at = part.to(tl.int64) * n_rows * HEADS * DIM + row * out_stride + query_head * DIM
    tl.store(out + at[:, None] + dim[None, :], rest.to(out.dtype.element_ty), mask=inside)
    if lse is not None:  # of several parts. No token here, or all scores −inf: −inf
        tl.store(lse + (part.to(tl.int64) * n_rows + row) * HEADS + query_head, top + tl.log2(total), mask=real)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def merge(parts, lse, out, out_stride, n_rows, n_parts, HEADS: tl.constexpr, DIM: tl.constexpr,
          DIMS: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIMS)
    top = tl.full((), -INF, tl.float32)
    for part in range(n_parts):
        top = tl.maximum(top, tl.load(lse + (part * n_rows + row) * HEADS + head))
    base = tl.where(top == -INF, 0.0, top)
    acc, total = tl.zeros((DIMS,), tl.float32), tl.zeros((), tl.float32)
    for part in range(n_parts):
        at = (part * n_rows + row) * HEADS + head
        weight = tl.exp2(tl.load(lse + at) - base)
        some = tl.load(parts + at * DIM + dim, mask=dim < DIM, other=0.0)
        acc += tl.where(weight == 0.0, 0.0, weight * some)  # a part without tokens is 0 / 0
        total += weight
    tl.store(out + row * out_stride + head * DIM + dim, (acc / total).to(out.dtype.element_ty), mask=dim < DIM)


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    table: Tensor,
    order: Tensor,
    spans: Tensor,
    length: Tensor,
    scale: float,
    out: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Does what fastsmc.ops.attend does. Caches (n_blocks, Hk, B, D) may have any strides with unit stride in D. length
    (1,) or (R,) int32 and the scales, float32 of one element, lie on the device. `spans` are of `cut_tiles`, for the
    rows of `tile_shape`.

    The first calls compile, so they must come before a CUDA graph is captured: `tiles` once for one part and once for
    several, `merge` once, whatever the numbers of rows, columns and parts. A table of one column has one part, one of
    one row and two columns has two.
    """
    n_rows, n_heads, dim = query.shape
    _, n_key_heads, size, _ = key_cache.shape
    constants = tile_shape(n_heads // n_key_heads, size, dim)
    grid = (len(spans), n_key_heads)
    parts = max(1, min(MAX_PARTS, PROGRAMS // (grid[0] * grid[1]), table.shape[1]))
    lse, rest = None, out
    if parts > 1:
        rest = torch.empty(parts, n_rows, n_heads, dim, dtype=torch.float32, device=query.device)
        lse = torch.empty(parts, n_rows, n_heads, dtype=torch.float32, device=query.device)
    # the interpreter multiplies the bits of bfloat16
    wide = query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    with on_device(query.device):
        tiles[(*grid, parts)](
            query, query.stride(0), key_cache, value_cache, key_cache.stride(0), key_cache.stride(1),
            key_cache.stride(2), key_scale, value_scale, table, table.stride(0), order, spans, length,
            int(len(length) > 1), scale * LOG2E, n_rows, rest, rest.stride(-3), lse, HEADS=n_heads, **constants,
            WIDE=wide, **LAUNCH,
        )  # fmt: skip
        if parts > 1:
            merge[(n_rows, n_heads)](
                rest, lse, out, out.stride(0), n_rows, parts, HEADS=n_heads, DIM=dim, DIMS=constants["DIMS"],
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip


def tile_shape(group: int, size: int, dim: int) -> dict[str, int]:
    """Chooses the constants of `tiles`, from query heads per key head, tokens per block and head size."""
    small = dim > 128
    queries = max(QUERIES // 2 if small else QUERIES, triton.next_power_of_2(group))
    window = WINDOW // 2 if small else WINDOW
    whole = window // size  # blocks in a window
    # a larger block is read in several windows, of which one may begin in a block and end in the next
    columns = triton.next_power_of_2(whole) if whole else 1 if size % window == 0 else 2
    return {
        "GROUP": group, "ROWS": queries // group, "QUERIES": queries, "TOKENS": TOKENS // 2 if small else TOKENS,
        "LANES": window, "SPAN": whole * size if whole else window, "COLUMNS": columns, "SIZE": size, "DIM": dim,
        "DIMS": triton.next_power_of_2(dim),
    }  # fmt: skip


#: Not tuned: no GPU has run it. Nothing may be contracted: a scaling fused with the subtraction of the maximum would
#: leave huge scores above it.
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
