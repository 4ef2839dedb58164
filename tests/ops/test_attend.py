"""attend against float64: sharing of every shape, layouts, dtypes, sizes, what lies beyond the length, bad input."""

import ctypes
import itertools
import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BACKENDS as ALL
from backends import CUDA, slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastsmc import ops, reference

BACKENDS = tuple(backend for backend in ALL if backend != "torch")
on_each = pytest.mark.parametrize("backend", BACKENDS)

#: per row and head: ‖got − want‖ / ‖want‖
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def family_table(n_rows, n_columns, n_prompt, seed):
    """(R, C) int32: a prompt that all share, then a genealogy (each column resamples the rows), and a private tail."""
    rng = np.random.default_rng(seed)
    table = np.zeros((n_rows, n_columns), np.int32)
    used = n_prompt
    table[:, :n_prompt] = np.arange(n_prompt)
    for c in range(n_prompt, n_columns):
        if c > n_prompt:
            table[:, :c] = table[rng.integers(0, n_rows, n_rows), :c]
        table[:, c] = used + np.arange(n_rows)
        used += n_rows
    return torch.from_numpy(rng.permutation(used).astype(np.int32)[table])


def lay_out(cache, layout, which):
    """A cache (n_blocks, Hk, B, D) in plain order, as memory of `layout` under the same shape."""
    n, heads, tokens, dims = cache.shape
    if layout == "vector" and which == "key":
        cache = cache.transpose(2, 3)
    elif layout == "tiled" and which == "key":
        cache = cache.view(n, heads, tokens // 16, 16, dims // 2, 2).transpose(3, 4)
    elif layout == "tiled":
        cache = cache.view(n, heads, tokens // 2, 2, dims // 16, 16).permute(0, 1, 4, 2, 5, 3)
    return cache.contiguous().view(n, heads, tokens, dims)


def make_case(table, length, *, heads=(6, 2), dim=64, block=32, dtype=torch.float32, layout="plain", seed=0):
    """Arguments of ops.attend and what the reference says. Slots that no row may read hold NaN."""
    g = torch.Generator().manual_seed(seed)
    n_blocks = int(table.max()) + 3
    query = torch.randn(len(table), heads[0], dim, generator=g).to(dtype)
    caches = [torch.randn(n_blocks, heads[1], block, dim, generator=g).to(dtype) for _ in range(2)]
    written = torch.zeros(n_blocks, block, dtype=torch.bool)
    for row, tokens in zip(table, torch.as_tensor(length).expand(len(table)).tolist(), strict=True):
        for c, id_ in enumerate(row[: -(-tokens // block)].tolist()):
            written[id_, : min(block, tokens - c * block)] = True
    for cache in caches:
        cache.transpose(1, 2)[~written] = float("nan")
    want = reference.attend(query.double(), *(c.double() for c in caches), table, length, scale=dim**-0.5)
    laid = [lay_out(c, layout, which) for c, which in zip(caches, ("key", "value"), strict=True)]
    return (query, *laid), {"scale": dim**-0.5, "layout": layout}, want


def check(got, want, tolerance):
    got = got.double().numpy()
    error = np.linalg.norm(got - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() <= tolerance, error.max()


def attend(args, table, length, *, scale, layout, backend="cpu", **options):
    """ops.attend on a backend's device, with a plan of these options; the result on the CPU."""
    device = "cuda" if backend == "triton" and CUDA else "cpu"
    plan = plan_for(table, length, args[1].shape[2], backend=backend, **options)
    length = length.to(device) if isinstance(length, torch.Tensor) else length
    return ops.attend(*(t.to(device) for t in args), plan, length, scale=scale, layout=layout).cpu()


def plan_for(table, length, block, *, backend="cpu", **options):
    device = "cuda" if backend == "triton" and CUDA else "cpu"
    if isinstance(length, torch.Tensor):
        options |= {"lengths": length.to(device), "block_size": block}
    return ops.plan_attend(table.to(device), backend=backend, **options)


LAYOUTS = [
    (d, layout) for d in TOLERANCE for layout in ("plain", "vector", "tiled") if (d, layout) != (torch.float32, "tiled")
]


def forest(seed, block=32, n_rows=(7, 0, 1, 13, 5), columns=(6, 2, 1, 4, 9)):
    """(table (R, C), lengths (R,), offsets): groups of rows of several lengths, one of them empty.

    Groups 0 and 3 begin with the same block of a prompt. Some rows end within a block that others go on in; what the
    table holds after a row's end is nonsense.
    """
    rng = np.random.default_rng(seed)
    table, lengths, used = np.full((sum(n_rows), max(columns)), -1, np.int32), [], 0
    offsets = np.cumsum([0, *n_rows]).tolist()
    for n, c, start in zip(n_rows, columns, offsets, strict=False):
        if n == 0:
            continue
        rows = family_table(n, c, c // 2, seed).numpy()
        table[start : start + n, :c] = rows + used
        used += rows.max() + 1
        tokens = np.where(rng.random(n) < 0.3, rng.choice([1, block, min(c, 2) * block, block + 1], n),
                          rng.integers((c - 1) * block + 1, c * block + 1, n))  # fmt: skip
        lengths += np.minimum(tokens, c * block).tolist()
    table[offsets[3] : offsets[4], 0] = table[0, 0]
    table[table == -1] = rng.integers(-9, used, (table == -1).sum())
    return torch.from_numpy(table), torch.tensor(lengths, dtype=torch.int32), offsets


@on_each
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seed, block", [(0, 32), (1, 16), (2, 48)])
def test_lengths_of_rows_and_groups(dtype, seed, block, backend):
    if slow(backend) and (dtype == torch.float16 or block == 48):
        pytest.skip("slow on the interpreter")
    few = {"n_rows": (7, 0, 1, 3, 2), "columns": (4, 2, 1, 3, 5)} if slow(backend) else {}
    table, lengths, offsets = forest(seed, block, **few)
    args, kwargs, want = make_case(table, lengths, block=block, dtype=dtype, seed=seed)
    known = [int((table[a:b, :1] == table[a : a + 1, :1]).all()) for a, b in itertools.pairwise(offsets)]
    for options in ({}, {"offsets": offsets}, {"offsets": offsets, "known_shared": known}):
        check(attend(args, table, lengths, backend=backend, **options, **kwargs), want, TOLERANCE[dtype])
    one = torch.full_like(lengths, 2 * block - 3)  # as one length for all
    table = torch.where(table < 0, 0, table)
    args, kwargs, want = make_case(table, 2 * block - 3, block=block, dtype=dtype, seed=seed)
    got = attend(args, table, one, backend=backend, **kwargs)
    check(got, want, TOLERANCE[dtype])
    if backend == "cpu":
        assert torch.equal(got, attend(args, table[:, :2].contiguous(), 2 * block - 3, backend=backend, **kwargs))


@pytest.mark.parametrize("dtype, layout", LAYOUTS)
@pytest.mark.parametrize("block", [16, 32, 48])
@pytest.mark.parametrize("loud", [1.0, 40.0])
def test_bits_of_a_row_are_its_own(dtype, layout, block, loud):
    """Alone, beside any other rows in any order, and with any number of threads; also where the largest score rises
    from span to span by hundreds."""
    table, lengths, offsets = forest(5, block, columns=(40, 2, 1, 20, 30))
    (query, *caches), kwargs, _ = make_case(table, lengths, block=block, dtype=dtype, layout=layout, heads=(9, 3))
    query = (query * loud).to(dtype)
    want = attend((query, *caches), table, lengths, **kwargs)
    assert want.isfinite().all()
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    try:
        for n in (1, 1, 1, 1, 2, 3, 8, 20):
            rows = torch.from_numpy(rng.permutation(len(table))[:n])
            columns = -(-int(lengths[rows].max()) // block)
            torch.set_num_threads(int(rng.integers(1, 4)))
            got = attend((query[rows], *caches), table[rows, :columns].contiguous(), lengths[rows], **kwargs)
            assert torch.equal(got, want[rows])
    finally:
        torch.set_num_threads(threads)
    for a, b in itertools.pairwise(offsets):
        if a < b:
            got = attend((query[a:b], *caches), table[a:b], lengths[a:b], **kwargs)
            assert torch.equal(got, want[a:b])


@pytest.mark.parametrize("dtype, layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 300])
def test_equals_float64(dtype, layout, length):
    table = family_table(23, -(-length // 32), (length // 32) // 2, seed=length)
    args, kwargs, want = make_case(table, length, dtype=dtype, layout=layout, seed=length)
    check(attend(args, table, length, **kwargs), want, TOLERANCE[dtype])


@on_each
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (8, 8), (7, 1)])
@pytest.mark.parametrize("dim, block", [(16, 16), (80, 32), (128, 48), (256, 32)])
def test_shapes(dtype, heads, dim, block, backend):
    if slow(backend) and heads in ((1, 1), (8, 8)):
        pytest.skip("slow on the interpreter")
    length = 5 * block + 7
    table = family_table(11, 6, 3, seed=dim)
    layout = "vector" if backend == "cpu" else "plain"
    args, kwargs, want = make_case(table, length, heads=heads, dim=dim, block=block, dtype=dtype, layout=layout, seed=1)
    check(attend(args, table, length, backend=backend, **kwargs), want, TOLERANCE[dtype])


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_rows", [1, 2, 100, 257])
@pytest.mark.parametrize("kind", ["prompt", "private", "one ancestor", "unordered"])
def test_every_genealogy(dtype, n_rows, kind, backend):
    """A long shared prompt (several packed spans), no sharing, total sharing, and a table that is no genealogy."""
    if slow(backend) and n_rows > 100:
        pytest.skip("slow on the interpreter")
    columns, length = 40, 39 * 32 + 5
    if kind == "prompt":
        table = family_table(n_rows, columns, 37, seed=3)
    elif kind == "private":
        columns, length = 4, 3 * 32 + 16
        table = torch.randperm(n_rows * columns).int().view(n_rows, columns)
    elif kind == "one ancestor":
        table = torch.randperm(columns).int().expand(n_rows, columns)
    else:
        columns, length = 6, 6 * 32
        g = torch.Generator().manual_seed(n_rows)
        table = torch.randint(0, 5, (n_rows, columns), dtype=torch.int32, generator=g)
    layout = "vector" if backend == "cpu" else "plain"
    args, kwargs, want = make_case(table, length, heads=(3, 1), dtype=dtype, layout=layout, seed=n_rows)
    check(attend(args, table, length, backend=backend, **kwargs), want, TOLERANCE[dtype])


def check_neighbours(table, order):
    """Each row once, and rows that share a block side by side."""
    assert sorted(order.tolist()) == list(range(len(table)))
    for column in table.cpu()[order.cpu().long()].T:
        blocks = column.unique_consecutive()
        assert len(blocks) == len(blocks.unique())


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
def test_plan_on_the_device_triton():
    """The same neighbours and the same prefix as on the CPU; lengths that the host does not know; strided caches."""
    for n_columns, n_prompt in ((1, 0), (1, 1), (2, 1), (7, 3), (16, 16)):
        table = family_table(37, n_columns, n_prompt, seed=n_columns)
        here, there = ops.plan_attend(table), ops.plan_attend(table.to("cuda" if CUDA else "cpu"), backend="triton")
        assert int(there.n_shared) == here.n_shared
        check_neighbours(table, there.order)


def test_plan_asks_the_device_nothing():
    """What a captured graph holds: with tensors that have shapes and no values, anything else would fail."""
    kernel = pytest.importorskip("fastsmc.kernels.attend")
    with FakeTensorMode():
        for shape in ((1, 1), (1024, 160), (7, 5)):
            for known in (0, shape[1] // 2, shape[1]):
                for n_groups in (1, 9):
                    offsets = torch.empty(n_groups + 1, dtype=torch.int32) if n_groups > 1 else None
                    shared = [known] * n_groups
                    order, n_shared = kernel.plan(torch.empty(shape, dtype=torch.int32), shared, offsets)
                    assert order.shape == shape[:1] and n_shared.shape == (n_groups,)
                    assert order.dtype == n_shared.dtype == torch.int32
                    assert kernel.cut_tiles(shape[0], n_shared, offsets, 16).shape[1] == 3


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
def test_length_on_the_device_triton():
    """A length that the host does not know, up to the table's; caches as vLLM's: keys beside values, tokens apart."""
    device = "cuda" if CUDA else "cpu"
    table = family_table(20, 6, 2, seed=6)
    plan = ops.plan_attend(table.to(device), backend="triton")
    for length in (1, 90, 160, 192):
        columns = -(-length // 32)
        (query, keys, values), kwargs, want = make_case(table[:, :columns], length, heads=(4, 2), dim=32)
        keys, values = (torch.cat([t, t[:1].expand(int(table.max()) + 3 - len(t), -1, -1, -1)]) for t in (keys, values))
        both = torch.cat([keys, values], dim=3).to(device)
        tokens = torch.tensor([length], dtype=torch.int32, device=device)
        got = ops.attend(query.to(device), *both.chunk(2, dim=3), plan, tokens, **kwargs)
        check(got.cpu(), want, TOLERANCE[torch.float32])


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("block, columns", [(1, 150), (4, 40), (24, 7), (80, 4), (128, 3)])
def test_windows_triton(block, columns):
    """Windows of many small blocks, blocks larger than a window; lengths that end in a block's first and last token."""
    family = family_table(21, columns, columns // 2, seed=block)
    unordered = torch.randint(0, 9, (21, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(block))
    for table in (family, unordered):
        for length in ((columns - 1) * block + 1, columns * block):
            args, kwargs, want = make_case(table, length, heads=(3, 1), dim=16, block=block, seed=length)
            check(attend(args, table, length, backend="triton", **kwargs), want, TOLERANCE[torch.float32])


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("numbers", ["float", "tensor", None])
def test_float8_caches_triton(dtype, numbers):
    """e4m3 keys and values of any magnitude that it has, subnormals too, times their scales."""
    device, table, length = "cuda" if CUDA else "cpu", family_table(23, 9, 4, seed=8), 8 * 16 + 9
    (query, *caches), kwargs, _ = make_case(table, length, heads=(8, 2), dim=64, block=16, dtype=dtype)
    caches = [c.nan_to_num(nan=400.0).to(torch.float8_e4m3fn) for c in caches]  # the interpreter knows no NaN of it
    caches[1].view(torch.uint8)[table[0, 1], 0, 3] = torch.arange(64, dtype=torch.uint8)  # to 0.03, with subnormals
    scales = (0.37, 2.5) if numbers else (1.0, 1.0)
    wide = [c.double() * s for c, s in zip(caches, scales, strict=True)]
    want = reference.attend(query.double(), *wide, table, length, scale=kwargs["scale"])
    given = {}
    if numbers == "float":
        given = dict(zip(("k_scale", "v_scale"), scales, strict=True))
    elif numbers == "tensor":
        given = {"k_scale": torch.tensor(scales[0], device=device), "v_scale": torch.tensor([scales[1]], device=device)}
    plan = ops.plan_attend(table.to(device), backend="triton")
    got = ops.attend(*(t.to(device) for t in (query, *caches)), plan, length, **kwargs, **given)
    check(got.cpu(), want, TOLERANCE[dtype])


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
@pytest.mark.parametrize("n_columns, n_prompt", [(1, 1), (5, 5), (9, 4), (9, 0)])
def test_what_is_known_to_be_shared_triton(n_columns, n_prompt):
    """The same plan for less work; what the host knows bounds the reads from above."""
    table = family_table(19, n_columns, n_prompt, seed=n_prompt).to("cuda" if CUDA else "cpu")
    here = ops.plan_attend(table.cpu(), backend="cpu", known_shared=n_prompt)
    plain = ops.plan_attend(table, backend="triton")
    for known in {0, n_prompt // 2, n_prompt}:
        plan = ops.plan_attend(table, backend="triton", known_shared=known)
        assert int(plan.n_shared) == int(plain.n_shared) == here.n_shared
        sharing = table[plan.order.long()] == table[plain.order.long()]
        assert n_prompt == n_columns or sharing.all()
        assert here.n_reads <= plan.n_reads == known + 19 * (n_columns - known)
        assert plan.n_nodes == 19 * (n_columns > known) + (known > 0)
    with pytest.raises(ValueError, match=f"known_shared={n_columns + 1}: must be in"):
        ops.plan_attend(table, known_shared=n_columns + 1)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_plan_covers_every_row_and_column_once(data):
    n, c, ids = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7)), data.draw(st.integers(1, 4))
    table = np.array(data.draw(st.lists(st.integers(0, ids), min_size=n * c, max_size=n * c)), np.int32).reshape(n, c)
    block, offsets, options = 3, [0, n], {}
    tokens = np.full(n, c * block)
    if data.draw(st.booleans()):
        tokens = np.array(data.draw(st.lists(st.integers(1, c * block), min_size=n, max_size=n)))
        offsets = [0, *sorted(data.draw(st.lists(st.integers(0, n), max_size=3))), n]
        options = {"lengths": torch.from_numpy(tokens).int(), "block_size": block}
    plan = ops.plan_attend(torch.from_numpy(table), offsets=offsets, **options)
    order, seen = plan.order.numpy(), np.zeros((n, c), int)
    assert sorted(order) == list(range(n))
    # a row as the tokens that it names: (block, slots in use) per column
    rows_of = [
        [(b, min(block, t - k * block)) for k, b in enumerate(row) if k * block < t]
        for row, t in zip(table.tolist(), tokens.tolist(), strict=True)
    ]
    last = np.zeros(n, int)
    for r0, r1, c0, c1 in plan.nodes.tolist():
        rows = order[r0:r1]
        assert all(rows_of[r][:c1] == rows_of[rows[0]][:c1] for r in rows)  # the same history
        assert (last[rows] == c0).all()  # columns in order
        last[rows] = c1
        seen[rows, c0:c1] += 1
    assert (seen == (np.arange(c) < -(-tokens // block)[:, None])).all()

    def histories(rows):
        return {tuple(row[: k + 1]) for row in rows for k in range(len(row))}

    assert plan.n_reads == len(histories(rows_of))  # each block of a genealogy is read once
    shared = [k for k in range(c) if len({tuple(row[: k + 1]) for row in rows_of}) == 1 and k < min(map(len, rows_of))]
    assert plan.n_shared == len(shared)
    for g, (a, b) in enumerate(itertools.pairwise(offsets)):
        assert plan.group_rows[g] == b - a and plan.group_reads[g] == len(histories(rows_of[a:b]))
        if a < b:
            lengths = {k: v[a:b] if k == "lengths" else v for k, v in options.items()}
            assert plan.group_nodes[g] == ops.plan_attend(torch.from_numpy(table[a:b]), **lengths).n_nodes


def test_plan_is_of_one_table():
    table = family_table(8, 5, 2, seed=0)
    plan = ops.plan_attend(table)
    before = table.clone()
    table[3, 4] += 1
    assert torch.equal(plan.table, before)  # it holds a copy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_with_one_thread(dtype):
    table, length = family_table(70, 9, 5, seed=1), 270
    args, kwargs, _ = make_case(table, length, dtype=dtype, layout="vector")
    plan, threads = ops.plan_attend(table), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = ops.attend(*args, plan, length, **kwargs)
        torch.set_num_threads(1)
        one = ops.attend(*args, plan, length, **kwargs)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, many)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_out(dtype):
    """Rows and blocks with gaps between them, as in fused projections and in a cache of keys and values."""
    table, length = family_table(9, 3, 1, seed=5), 80
    (query, keys, values), kwargs, want = make_case(table, length, dtype=dtype)
    wide = torch.zeros(9, 2 * query.shape[1] * 64, dtype=dtype)
    wide[:, : query[0].numel()] = query.flatten(1)
    rows = wide[:, : query[0].numel()].view(9, -1, 64)
    both = torch.cat([keys, values], dim=2)
    out = torch.full((12, query.shape[1], 64), 7.0, dtype=dtype)
    got = ops.attend(rows, *both.chunk(2, dim=2), ops.plan_attend(table), length, out=out[:9], **kwargs)
    assert got.data_ptr() == out.data_ptr() and bool((out[9:] == 7).all())
    check(out[:9], want, TOLERANCE[dtype])


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_stays_in_its_row(dtype, backend):
    table, length = family_table(12, 3, 2, seed=2), 70
    (query, keys, values), kwargs, want = make_case(table, length, dtype=dtype)
    keys[table[4, 2], 0, 1] = float("nan")  # a private block of row 4: the first key head
    query[7, 5] = float("nan")
    got = attend((query, keys, values), table, length, backend=backend, **kwargs)
    bad = torch.zeros(12, 6, dtype=torch.bool)
    bad[4, :3], bad[7, 5] = True, True
    assert torch.equal(got.isnan().all(-1), bad) and torch.equal(got.isnan().any(-1), bad)
    check(got[~bad], want[~bad.numpy()], TOLERANCE[dtype])


@on_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_and_huge_scores(dtype, backend):
    """A score of −inf has no weight, in whichever span it is; scores of 1e9 pick the largest."""
    table = torch.arange(40, dtype=torch.int32)[None].repeat(5, 1)
    length = 40 * 32
    (query, keys, values), kwargs, _ = make_case(table, length, heads=(2, 1), dtype=dtype)
    query[:, :, 0] = 1.0
    keys[table[0, :20].long(), 0, :, 0] = -torch.inf  # the whole first span
    want = reference.attend(query.double(), keys.double(), values.double(), table, length, scale=kwargs["scale"])
    check(attend((query, keys, values), table, length, backend=backend, **kwargs), want, TOLERANCE[dtype])
    keys[:, :, :, 0] = 0.0
    huge = (query * 1e9).to(dtype)
    want = reference.attend(huge.double(), keys.double(), values.double(), table, length, scale=kwargs["scale"])
    check(attend((huge, keys, values), table, length, backend=backend, **kwargs), want, TOLERANCE[dtype])


QUERY, CACHE = torch.zeros(2, 4, 32), torch.zeros(5, 2, 16, 32)
PLAN = ops.plan_attend(torch.tensor([[0, 1], [0, 4]], dtype=torch.int32))
LENGTHS = torch.tensor([3, 20], dtype=torch.int32)
PLAN_OF_LENGTHS = ops.plan_attend(PLAN.table, LENGTHS, block_size=16)
GOOD = {"query": QUERY, "key_cache": CACHE, "value_cache": CACHE, "plan": PLAN, "length": 20, "scale": 0.1}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"query": QUERY.double()}, "query: must be .*float64"),
        ({"query": QUERY[0]}, r"query: must be \(R, Hq, D\)"),
        ({"query": torch.zeros(2, 32, 4).transpose(1, 2)}, "query: each row must be contiguous"),
        ({"query": torch.zeros(2, 3, 32)}, "query: Hq=3 must be a multiple of Hk=2"),
        ({"query": torch.zeros(3, 4, 32)}, r"plan: of a table \(2, 2\); R=3 rows of length=20"),
        ({"out": torch.zeros(2, 4, 16)}, "out: .* must be as query"),
        ({"key_cache": CACHE.bfloat16()}, "key_cache: must be .* torch.float32"),
        ({"key_cache": torch.zeros(5, 2, 16, 16)}, "key_cache: blocks must be contiguous with D=32"),
        ({"key_cache": torch.zeros(5, 2, 32, 16).transpose(2, 3)}, "key_cache: blocks must be contiguous"),
        ({"value_cache": torch.zeros(6, 2, 16, 32)}, "value_cache: must have the shape"),
        ({"key_cache": CACHE[:4], "value_cache": CACHE[:4]}, "plan: names block 4, key_cache has 4"),
        ({"length": 16}, r"length=16 need \(2, 1\)"),
        ({"length": 33}, r"length=33 need \(2, 3\)"),
        ({"length": 0}, "length=0"),
        ({"length": LENGTHS}, "length: .* must be the lengths that plan was made for"),
        ({"length": LENGTHS + 1, "plan": PLAN_OF_LENGTHS}, "length: .* must be the lengths that plan was made for"),
        ({"length": LENGTHS.long(), "plan": PLAN_OF_LENGTHS}, r"length: must be an int, or \(2,\) int32"),
        ({"length": LENGTHS[:1], "plan": PLAN_OF_LENGTHS}, r"length: must be an int, or \(2,\) int32"),
        ({"length": 20, "plan": PLAN_OF_LENGTHS}, "length=20: plan was made for"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"scale": float("nan")}, "scale=nan"),
        ({"layout": "amx"}, "layout='amx': must be one of"),
        ({"layout": "tiled"}, "layout='tiled': is of 16-bit elements"),
        ({"k_scale": 0.5}, "k_scale: belongs to caches of torch.float8_e4m3fn, read by a plan of 'triton'"),
        ({"key_cache": CACHE.to(torch.float8_e4m3fn)}, "key_cache: must be .* torch.float32"),
    ],
)
def test_refuses(change, message):
    args = {**GOOD, **change}
    with pytest.raises(ValueError, match=message):
        ops.attend(**args)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs a GPU or the interpreter")
def test_refuses_triton():
    device = "cuda" if CUDA else "cpu"
    plan = ops.plan_attend(PLAN.table.to(device), backend="triton")
    cache = CACHE.to(torch.float8_e4m3fn).to(device)
    good = {**GOOD, "query": QUERY.to(device), "key_cache": cache, "value_cache": cache, "plan": plan}
    for change, message in (
        ({"k_scale": -1.0}, "k_scale=-1.0: must be positive"),
        ({"v_scale": torch.ones(2, device=device)}, "v_scale: must be a number or one float32"),
        ({"value_cache": CACHE.to(device)}, "value_cache: must be .* torch.float8_e4m3fn"),
        ({"layout": "vector"}, "'triton' reads 'plain'"),
        ({"length": torch.ones(3, dtype=torch.int32, device=device)}, "length: must be an int, or"),
        ({"length": torch.ones(1, dtype=torch.int32, device=device), "query": QUERY[:1].to(device)}, "R=1 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.attend(**{**good, **change})


@pytest.mark.parametrize(
    "table, message",
    [
        (torch.zeros(2, 2), r"table: must be an \(R, C\) int32 tensor"),
        (torch.zeros(0, 2, dtype=torch.int32), r"R and C at least 1"),
        (torch.tensor([[0, -3]], dtype=torch.int32), "table: has a negative block id -3"),
        (None, "table: must be .* got None"),
    ],
)
def test_plan_refuses(table, message):
    with pytest.raises(ValueError, match=message):
        ops.plan_attend(table)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lengths": LENGTHS, "block_size": None}, "lengths and block_size: must be given together"),
        ({"lengths": None, "block_size": 16}, "lengths and block_size: must be given together"),
        ({"block_size": 0}, "block_size=0"),
        ({"lengths": LENGTHS.long()}, "lengths: must be a vector of torch.int32"),
        ({"lengths": LENGTHS[:1]}, "lengths: must have 2 elements"),
        ({"lengths": LENGTHS - 3}, r"lengths\[0\]=0: must be in \[1, 32\], 2 columns of 16"),
        ({"lengths": LENGTHS + 13}, r"lengths\[1\]=33: must be in"),
        ({"offsets": [0, 1]}, r"offsets=\[0, 1\]: must ascend from 0 to 2"),
        ({"offsets": [0, 2, 1, 2]}, r"offsets=.* must ascend"),
        ({"offsets": torch.tensor([0, 2])}, "offsets: must be a vector of torch.int32"),
        ({"offsets": [0, 2], "known_shared": [1, 1]}, r"known_shared=\[1, 1\]: .* for 1 groups"),
        ({"known_shared": [3]}, r"known_shared=\[3\]: must be in \[0, 2\]"),
    ],
)
def test_plan_of_lengths_refuses(change, message):
    args = {"lengths": LENGTHS, "block_size": 16, **change}
    with pytest.raises(ValueError, match=message):
        ops.plan_attend(PLAN.table, **args)


def test_head_and_block_sizes_are_multiples_of_16():
    odd = torch.zeros(5, 2, 16, 24)
    with pytest.raises(ValueError, match="D=24 and B=16 must be multiples of 16"):
        ops.attend(torch.zeros(2, 4, 24), odd, odd, PLAN, 20, scale=0.1)


# ------------------------------------------------------------------------------------------------------- tiles (AMX)
ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("attend_tiles.cpp")
on_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs an x86-64 and its g++"
)


def compile_tiles(*options):
    include = [f"-I{ROOT / folder}" for folder in ("csrc/include", "csrc", "tests/ops")]
    command = ["g++", "-std=c++17", "-O3", "-mprefer-vector-width=512", "-Wno-unknown-pragmas", *include, *options]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """attend_tiles.cpp on tiles in software, for the CPU that the extension is made for."""
    path = tmp_path_factory.mktemp("tiles") / "attend_tiles.so"
    march = f"-march={os.environ.get('FASTSMC_MARCH', 'native')}"
    compile_tiles("-DEMULATE", march, "-shared", "-fPIC", SOURCE, "-o", path)
    library = ctypes.CDLL(str(path))
    library.tile_products.restype = ctypes.c_int64
    return library


def address(t):
    return ctypes.c_void_p(t.data_ptr())


def integers(*values):
    return [ctypes.c_int64(v) for v in values]


def tiles_attend(library, args, table, length, *, scale, layout, runs=2):
    """ops.attend in tiles."""
    query, keys, values = args
    n_key_heads, block, dim = keys.shape[1:]
    plan, out = plan_for(table, length, block), torch.empty_like(query)
    lengths = (address(plan.lengths), *integers(0)) if plan.lengths is not None else (None, *integers(length))
    failed = library.attend_in_tiles(
        address(query), address(out), address(keys), address(values),
        *integers(keys.stride(0), keys.stride(1), block, dim), ("plain", "vector", "tiled").index(layout),
        address(plan.table), *integers(*table.shape), *lengths, address(plan.order), address(plan.nodes),
        *integers(len(plan.nodes), n_key_heads, query.shape[1] // n_key_heads), ctypes.c_float(scale / math.log(2)),
        *integers(runs),
    )  # fmt: skip
    assert not failed
    return out


@on_x86
def test_a_step_of_tiles_is_that_of_the_manual(tiles):
    """Even and odd elements summed apart, from zero, rounded once each; subnormal numbers are 0; shapes that misfit."""
    one, tiny = 1.0, 2.0**-130  # bfloat16 has subnormals down to 2^-133
    left, right = torch.zeros(16, 32).bfloat16(), torch.zeros(16, 16, 2).bfloat16()
    total = torch.zeros(16, 16)
    left[0, :4] = torch.tensor([2.0**24, one, one, one])
    right[:2, 0] = torch.tensor([[one, one], [one, -one]])  # even: 2^24 + 1 = 2^24, odd: 1 - 1
    left[1, :2], right[0, 1] = torch.tensor([2.0**24, -(2.0**24)]), torch.tensor([one, one])
    total[1, 1] = 0.5  # the pair cancels before it meets the old sum
    left[2, 0], right[0, 2, 0], total[2, 3] = tiny, 2.0**100, tiny
    left[3, 4], right[2, 4, 0] = float("nan"), one
    left[4, 4], right[2, 5, 0] = float("inf"), 0.0
    step = [address(t) for t in (total, left, right)]
    assert tiles.tile_step(*step, 64, 16) == 0
    assert total[0, 0] == 2.0**24 and total[1, 1] == 0.5 and total[2, 2] == 0 and total[2, 3] == 0
    assert total[3].isnan().all() or (total[3, 4].isnan() and total[3].isnan().sum() == 16)
    assert total[4, 5].isnan() and total[4, 4] == float("inf")
    for left_bytes, right_rows in ((64, 8), (32, 16), (68, 16), (64, 17), (0, 16)):
        assert tiles.tile_step(*step, left_bytes, right_rows) == 1


@on_x86
@pytest.mark.parametrize("n_rows", [1, 3, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("depth, n_groups", [(16, 1), (32, 2), (48, 3), (64, 4), (80, 5), (128, 8), (256, 3)])
@pytest.mark.parametrize("keep", [False, True])
def test_a_product_in_tiles(tiles, n_rows, depth, n_groups, keep):
    """By float64 from the same bfloat16: rounding of float32 sums is all that differs; nothing is written outside."""
    g = torch.Generator().manual_seed(n_rows * depth + n_groups)
    readable = -(-n_rows // 16) * 16
    a = torch.full((readable, depth + 8), float("nan")).bfloat16()  # rows beyond n_rows may be anything
    a[:n_rows, :depth] = torch.randn(n_rows, depth, generator=g).bfloat16()
    dense = torch.randn(depth, 16 * n_groups, generator=g).bfloat16()
    b = dense.view(depth // 2, 2, n_groups, 16).permute(2, 0, 3, 1).contiguous()
    out = torch.randn(n_rows + 2, 16 * n_groups + 5, generator=g)
    factors = torch.rand(n_rows, generator=g)
    before = out.clone()
    failed = tiles.product_in_tiles(
        address(a), *integers(depth + 8, n_rows), address(b), *integers(depth * 16, depth),
        address(factors) if keep else None, ctypes.c_float(0.7), address(out), *integers(16 * n_groups + 5, n_groups),
    )  # fmt: skip
    assert not failed
    left, right, width = a[:n_rows, :depth].double(), dense.double(), 16 * n_groups
    old = before[:n_rows, :width].double() * factors[:, None].double()
    want = left @ right + old if keep else left @ right * float(np.float32(0.7))
    size = left.abs() @ right.abs() + old.abs()
    assert ((out[:n_rows, :width].double() - want).abs() <= (depth + 4) * 2.0**-24 * size).all()
    out[:n_rows, :width] = before[:n_rows, :width]
    assert torch.equal(out, before)


@on_x86
@pytest.mark.parametrize("layout", ["plain", "vector", "tiled"])
@pytest.mark.parametrize("dim, block, heads", [(16, 16, (1, 1)), (48, 32, (6, 2)), (64, 32, (9, 3)), (80, 32, (4, 4)),
                                               (128, 48, (7, 1))])  # fmt: skip
@pytest.mark.parametrize("length", [1, 17, 96, 300, 701])
def test_tiles_equal_float64_and_pairs(tiles, layout, dim, block, heads, length):
    columns = -(-length // block)
    table = family_table(23, columns, columns // 2, seed=length)
    args, kwargs, want = make_case(table, length, heads=heads, dim=dim, block=block, dtype=torch.bfloat16,
                                   layout=layout, seed=length)  # fmt: skip
    before = tiles.tile_products()
    got = tiles_attend(tiles, args, table, length, **kwargs)
    assert tiles.tile_products() > before
    check(got, want, TOLERANCE[torch.bfloat16])
    check(got, attend(args, table, length, **kwargs).double().numpy(), TOLERANCE[torch.bfloat16])


@on_x86
@pytest.mark.parametrize("kind", ["prompt", "private", "one ancestor", "unordered"])
@pytest.mark.parametrize("runs", [1, 5])
def test_tiles_of_every_genealogy(tiles, kind, runs):
    n_rows, columns = 100, 12
    if kind == "prompt":
        table = family_table(n_rows, columns, 9, seed=3)
    elif kind == "private":
        table = torch.randperm(n_rows * columns).int().view(n_rows, columns)
    elif kind == "one ancestor":
        table = torch.randperm(columns).int().expand(n_rows, columns).contiguous()
    else:
        table = torch.randint(0, 5, (n_rows, columns), dtype=torch.int32, generator=torch.Generator().manual_seed(1))
    args, kwargs, want = make_case(table, 32 * columns - 5, heads=(3, 1), dtype=torch.bfloat16, layout="tiled", seed=4)
    got = tiles_attend(tiles, args, table, 32 * columns - 5, runs=runs, **kwargs)
    check(got, want, TOLERANCE[torch.bfloat16])
    assert torch.equal(got, tiles_attend(tiles, args, table, 32 * columns - 5, runs=1, **kwargs))


@on_x86
@pytest.mark.parametrize("layout", ["plain", "vector", "tiled"])
def test_bits_of_a_row_are_its_own_in_tiles(tiles, layout):
    table, lengths, _ = forest(5, columns=(20, 2, 1, 12, 9))
    (query, *caches), kwargs, want = make_case(table, lengths, dtype=torch.bfloat16, layout=layout, heads=(9, 3))
    got = tiles_attend(tiles, (query, *caches), table, lengths, **kwargs)
    check(got, want, TOLERANCE[torch.bfloat16])
    loud = (query * 40).bfloat16()
    got = tiles_attend(tiles, (loud, *caches), table, lengths, runs=3, **kwargs)
    for rows in ([0], [4], [9], [20], [3, 8, 25], [22, 1, 2, 17, 12]):
        args = loud[rows], *caches
        assert torch.equal(tiles_attend(tiles, args, table[rows], lengths[rows], runs=1, **kwargs), got[rows])


@on_x86
def test_tiles_keep_nan_in_its_row(tiles):
    table, length = family_table(12, 3, 2, seed=2), 70
    (query, keys, values), kwargs, want = make_case(table, length, dim=80, dtype=torch.bfloat16)
    keys[table[4, 2], 0, 1] = float("nan")  # a private block of row 4: the first key head
    query[7, 5] = float("nan")
    got = tiles_attend(tiles, (query, keys, values), table, length, runs=1, **kwargs)
    bad = torch.zeros(12, 6, dtype=torch.bool)
    bad[4, :3], bad[7, 5] = True, True
    assert torch.equal(got.isnan().all(-1), bad) and torch.equal(got.isnan().any(-1), bad)
    check(got[~bad], want[~bad.numpy()], TOLERANCE[torch.bfloat16])


@on_x86
def test_tiles_with_infinite_and_huge_scores(tiles):
    table = torch.arange(40, dtype=torch.int32)[None].repeat(5, 1)
    length = 40 * 32
    (query, keys, values), kwargs, _ = make_case(table, length, heads=(2, 1), dim=48, dtype=torch.bfloat16)
    query[:, :, 0] = 1.0
    keys[table[0, :20].long(), 0, :, 0] = -torch.inf  # the first spans
    want = reference.attend(query.double(), keys.double(), values.double(), table, length, scale=kwargs["scale"])
    check(tiles_attend(tiles, (query, keys, values), table, length, **kwargs), want, TOLERANCE[torch.bfloat16])
    keys[:, :, :, 0] = 0.0
    huge = (query * 1e9).bfloat16()
    want = reference.attend(huge.double(), keys.double(), values.double(), table, length, scale=kwargs["scale"])
    check(tiles_attend(tiles, (huge, keys, values), table, length, **kwargs), want, TOLERANCE[torch.bfloat16])


@on_x86
def test_machine_code_for_amx(tmp_path):
    """What g++ makes for a CPU with AMX: the backend compiles; products are tile instructions, sums stay in tiles."""
    if shutil.which("objdump") is None:
        pytest.skip("needs objdump")
    compile_tiles("-march=sapphirerapids", "-fopenmp", "-fsyntax-only", ROOT / "csrc" / "cpu.cpp")
    path = tmp_path / "amx.so"
    compile_tiles("-march=sapphirerapids", "-shared", "-fPIC", SOURCE, "-o", path)
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", path], check=True, capture_output=True, text=True)
    functions = dict(re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)+)", text.stdout, re.MULTILINE))
    blocks = {name: code for name, code in functions.items() if "tdpbf16ps" in code}
    assert len(blocks) == 4 and all("tile_block" in name for name in blocks)
    for name, code in blocks.items():
        rows, columns = map(int, re.search(r"<(\d), (\d)>", name).groups())
        count = {what: len(re.findall(rf"\b{what}\b", code)) for what in ("tdpbf16ps", "tileloadd", "tilestored")}
        loads = rows + columns + (rows == columns == 2)
        tiles = rows * columns  # of sums, loaded once; the body of the loop and the tail
        assert count == {"tdpbf16ps": 2 * tiles, "tileloadd": 2 * loads + tiles, "tilestored": tiles}
