"""attend in Triton: decode attention in which rows that share a KV block read it together. Two launches a layer.

    plan     (once a table, PyTorch operations) rows in the order of their histories, so that those that share a block
             are neighbours; the number of columns on which all rows agree
    tiles    program (tile of rows, key head, part of the columns): its queries (rows × query heads of the key head)
             stay in registers. Columns of the common prefix are one dense product each. In a later column the distinct
             blocks of the tile are read one after the other, each once, and only the rows that name it take part
    merge    program (row, head): the parts of a row by log-sum-exp

Nothing is read on the host: the length, the order and the width of the prefix lie on the device, so a captured graph
stays right when they change. Shapes (rows, columns of the table) are those of the capture.

Scores are float32 in units of log 2; weights are rounded to the dtype of the cache for the second product, as in
attend.cuh; float32 caches are multiplied in float32, not in tf32.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

#: queries of a tile: rows × query heads of a key head, as many as a product of 64 × 64 a warp group wants
QUERIES = 64
#: tokens of the common prefix in one product
TOKENS = 64
#: programs that keep an H100's 132 multiprocessors busy: columns are split until there are as many
PROGRAMS = 528
#: parts of the columns that `merge` joins, at most
MAX_PARTS = 16
LOG2E = 1.4426950408889634

INF = tl.constexpr(float("inf"))
#: larger than any block
NO_BLOCK = tl.constexpr(2147483647)


def plan(table: Tensor) -> tuple[Tensor, Tensor]:
    """(order (R,) int32, n_shared (1,) int32) of a table (R, C) int32, on its device and without looking at it.

    order: rows sorted by their blocks, column by column. Ranks of pairs of neighbouring columns are made from those of
    the two columns, and so on up to the whole row: log2 C rounds, each one sort of all its columns.
    """
    n_rows, device = table.shape[0], table.device
    ranks = _dense(table.t().long())
    while len(ranks) > 1:
        if len(ranks) % 2:
            ranks = torch.cat([ranks, torch.zeros(1, n_rows, dtype=ranks.dtype, device=device)])
        ranks = _dense(ranks[::2] * n_rows + ranks[1::2])
    order = torch.sort(ranks[0], stable=True).indices.int()
    same = (table == table[:1]).all(0).int()
    return order, same.cumprod(0).sum(0, keepdim=True).int()


def _dense(keys: Tensor) -> Tensor:
    """(K, R) int64 → ranks of each row's values, equal values equal."""
    values, index = torch.sort(keys, dim=1, stable=True)
    steps = torch.zeros_like(values)
    steps[:, 1:] = values[:, 1:] != values[:, :-1]
    return torch.empty_like(values).scatter_(1, index, steps.cumsum(1))


@triton.jit
def product(a, b, WIDE: tl.constexpr):
    """a b in float32. WIDE: of float32 operands, without tf32."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def read(
    keys, values, at, written, here, query, top, total, acc, scale,
    MASKED: tl.constexpr, DIM: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some tokens (T,), at these offsets, where `written`: (top, total, acc) of the queries `here` (QUERIES,) go on."""
    dim = tl.arange(0, DIMS)
    inside = written[:, None] & (dim < DIM)[None, :]
    at = at[:, None] + dim[None, :]
    key = tl.load(keys + at, mask=inside, other=0.0)
    scores = tl.where(written[None, :], product(query, tl.trans(key), WIDE) * scale, -INF)
    if MASKED:
        scores = tl.where(here[:, None], scores, -INF)
    higher = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(higher == -INF, 0.0, higher)
    weights = tl.exp2(scores - base[:, None])
    keep = tl.exp2(top - base)
    value = tl.load(values + at, mask=inside, other=0.0)
    acc = acc * keep[:, None] + product(weights.to(value.dtype), value, WIDE)
    return higher, total * keep + tl.sum(weights, 1), acc


@triton.jit(do_not_specialize=["n_rows"])
def tiles(
    query, query_stride, keys, values, block_stride, head_stride, token_stride, table, table_stride, order, shared,
    length, scale, n_rows, out, lse, PARTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr,
    DIM: tl.constexpr, DIMS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    head, part = tl.program_id(1), tl.program_id(2)
    keys += head.to(tl.int64) * head_stride
    values += head.to(tl.int64) * head_stride
    # query i of the tile: row i // GROUP of the tile, head i % GROUP of the key head's
    i = tl.arange(0, QUERIES)
    place = tl.program_id(0) * ROWS + i // GROUP
    real = (i < ROWS * GROUP) & (place < n_rows)
    row = tl.load(order + place, mask=real, other=0).to(tl.int64)
    dim = tl.arange(0, DIMS)
    inside = real[:, None] & (dim < DIM)[None, :]
    query_head = head * GROUP + i % GROUP
    q = tl.load(query + row[:, None] * query_stride + query_head[:, None] * DIM + dim[None, :], mask=inside, other=0.0)

    tokens = tl.load(length)
    n_columns = tl.cdiv(tokens, SIZE)
    begin, end = n_columns * part // PARTS, n_columns * (part + 1) // PARTS
    prefix = tl.minimum(tl.maximum(tl.load(shared), begin), end)
    top = tl.full((QUERIES,), -INF, tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, DIMS), tl.float32)
    for first in range(begin * SIZE, tl.minimum(prefix * SIZE, tokens), TOKENS):
        token = first + tl.arange(0, TOKENS)
        written = token < tl.minimum(prefix * SIZE, tokens)
        block = tl.load(table + token // SIZE, mask=written, other=0).to(tl.int64)  # any row's
        at = block * block_stride + token % SIZE * token_stride
        top, total, acc = read(keys, values, at, written, real, q, top, total, acc, scale, False, DIM, DIMS, WIDE)
    token = tl.arange(0, BLOCK)
    for column in range(prefix, end):
        blocks = tl.load(table + row * table_stride + column, mask=real, other=NO_BLOCK)
        written = (token < SIZE) & (column * SIZE + token < tokens)
        block = tl.min(blocks)
        while block < NO_BLOCK:
            here = blocks == block
            at = block.to(tl.int64) * block_stride + token * token_stride
            top, total, acc = read(keys, values, at, written, here, q, top, total, acc, scale, True, DIM, DIMS, WIDE)
            blocks = tl.where(here, NO_BLOCK, blocks)
            block = tl.min(blocks)
    at = (part.to(tl.int64) * n_rows + row) * HEADS + query_head
    tl.store(lse + at, top + tl.log2(total), mask=real)  # no column here, or all scores −inf: −inf
    tl.store(out + at[:, None] * DIM + dim[None, :], acc / total[:, None], mask=inside)


@triton.jit(do_not_specialize=["n_rows"])
def merge(parts, lse, out, out_stride, n_rows, PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
          DIMS: tl.constexpr):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dim = tl.arange(0, DIMS)
    top = tl.full((), -INF, tl.float32)
    for part in range(PARTS):
        top = tl.maximum(top, tl.load(lse + (part * n_rows + row) * HEADS + head))
    base = tl.where(top == -INF, 0.0, top)
    acc, total = tl.zeros((DIMS,), tl.float32), tl.zeros((), tl.float32)
    for part in range(PARTS):
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
    n_shared: Tensor,
    length: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """As fastsmc.ops.attend; caches (n_blocks, Hk, B, D) of any strides but D's. length: (1,) int32 on the device.

    The first call for a new set of shapes compiles, so it must come before a CUDA graph is captured.
    """
    n_rows, n_heads, dim = query.shape
    _, n_key_heads, size, _ = key_cache.shape
    group = n_heads // n_key_heads
    dims, queries = triton.next_power_of_2(dim), max(QUERIES if dim <= 128 else QUERIES // 2, group_tile(group))
    rows = queries // group
    grid = (-(-n_rows // rows), n_key_heads)
    parts = max(1, min(MAX_PARTS, PROGRAMS // (grid[0] * grid[1]), table.shape[1]))
    some = torch.empty(parts, n_rows, n_heads, dim, dtype=torch.float32, device=query.device)
    lse = torch.empty(parts, n_rows, n_heads, dtype=torch.float32, device=query.device)
    # the interpreter multiplies the bits of bfloat16
    wide = query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1"
    tiles[(*grid, parts)](
        query, query.stride(0), key_cache, value_cache, key_cache.stride(0), key_cache.stride(1), key_cache.stride(2),
        table, table.stride(0), order, n_shared, length, scale * LOG2E, n_rows, some, lse,
        PARTS=parts, HEADS=n_heads, GROUP=group, ROWS=rows, QUERIES=queries,
        TOKENS=TOKENS if dim <= 128 else TOKENS // 2, BLOCK=max(16, triton.next_power_of_2(size)), SIZE=size, DIM=dim,
        DIMS=dims, WIDE=wide, **LAUNCH,
    )  # fmt: skip
    merge[(n_rows, n_heads)](
        some, lse, out, out.stride(0), n_rows, PARTS=parts, HEADS=n_heads, DIM=dim, DIMS=dims, num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip


#: not tuned: no GPU has run it. Nothing may be contracted: a scaling fused with the subtraction of the maximum would
#: leave huge scores above it
LAUNCH = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


def group_tile(group: int) -> int:
    """The least number of queries of a tile that holds all query heads of a key head."""
    return triton.next_power_of_2(group)
