"""reindex against NumPy: table rows, used slots of tail blocks, genealogy, what it refuses, what it leaves alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmc import _C, ops, reference
from fastsmc.ops.reindex import _arguments, _cache_arguments

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("cpu", "torch", "emulated", pytest.param("cuda", marks=needs_cuda))
CHECKED = ("cpu", "torch")
SLOTS = 16  # a block


def device_of(backend):
    return "cuda" if backend == "cuda" else "cpu"


def random_case(n, seed, columns=5, tail=3, device="cpu"):
    """A table whose rows share their first blocks with others and own their tail, and in-place ancestors."""
    rng = np.random.default_rng(seed)
    log_weights = torch.from_numpy(rng.normal(0, 2, n))
    ancestors = ops.resample(log_weights, torch.from_numpy(rng.random(n)), scheme="multinomial").ancestors
    blocks = rng.permutation(2 * n)
    table = rng.integers(0, 2 * n, (n, columns)).astype(np.int32)
    table[:, tail] = blocks[:n]
    return torch.from_numpy(table).to(device), ancestors.to(device)


def make_caches(n_blocks, seed, device="cpu"):
    """Blocks (heads, slots, dim): of 16-byte words; in a slice, of 4-byte words; at an odd address; of 2-byte slots."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(n_blocks, 2, 4, SLOTS, 3, generator=g).to(device)
    flat = torch.randint(0, 255, (1 + n_blocks * 2 * SLOTS * 9,), generator=g, dtype=torch.uint8).to(device)
    return [
        torch.randn(n_blocks, 3, SLOTS, 8, generator=g).bfloat16().to(device),
        wide[:, 1],
        flat[1:].view(n_blocks, 2, SLOTS, 9),
        torch.randn(n_blocks, 1, SLOTS, 1, generator=g).bfloat16().to(device),
    ]


def as_array(cache):
    return (cache.view(torch.int16) if cache.dtype == torch.bfloat16 else cache).cpu().numpy().copy()


def reindex(backend, table, ancestors, *, seed=0, **options):
    if backend == "emulated":  # what the GPU runs, thread by thread on the host in a random order
        caches, slot_dim, step = options.pop("caches"), options.pop("slot_dim", None), options.pop("step", None) or 0
        position = options.pop("position")
        position, position_at = (0, position) if isinstance(position, torch.Tensor) else (position, None)
        arguments = _arguments(table, ancestors, position, position_at, step=step, **options)
        threads, parts = (1, 3, 32)[seed % 3], 1 + seed % 2
        _C.emulate_reindex(arguments, _cache_arguments(caches, slot_dim), parts, threads, seed)
    elif backend == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ops.reindex(table, ancestors, backend="cuda", **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        ops.reindex(table, ancestors, backend=backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 17, 100])
@pytest.mark.parametrize("slot_dim", [None, 2])
@pytest.mark.parametrize("used", [0, 1, 7, 15])
def test_equals_numpy(n, slot_dim, used, backend):
    device = device_of(backend)
    table, ancestors = random_case(n, n, device=device)
    caches = make_caches(2 * n, n, device)
    arrays, rows = [as_array(c) for c in caches], table.cpu().numpy().copy()
    assert not (n == 100 and used) or (ancestors.cpu() != torch.arange(n)).sum() > 20
    options = {"position": 3 * SLOTS + used, "block_size": SLOTS, "slot_dim": slot_dim}
    genealogy = torch.full((4, n), -5, dtype=torch.int32, device=device)
    noted = genealogy.cpu().numpy()
    reference.reindex(rows, ancestors.cpu().numpy(), caches=arrays, genealogy=noted, step=2, **options)
    reindex(backend, table, ancestors, caches=caches, genealogy=genealogy, step=2, seed=n + used, **options)
    np.testing.assert_array_equal(table.cpu(), rows)
    np.testing.assert_array_equal(genealogy.cpu(), noted)
    for cache, array in zip(caches, arrays, strict=True):
        np.testing.assert_array_equal(as_array(cache), array)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot_dim", [None, 2])
@pytest.mark.parametrize("n", [1, 8, 60])
def test_a_position_per_row(n, slot_dim, backend):
    """Rows of 0, 1, B, B + 1, … tokens, up to a full table; a moved row takes its parent's, short or long."""
    device, columns = device_of(backend), 5
    for seed in range(4):
        rng = np.random.default_rng((n, seed))
        _, ancestors = random_case(n, seed, device=device)
        table = torch.from_numpy(rng.permutation(n * columns).astype(np.int32).reshape(n, columns)).to(device)
        edges = (0, 1, SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS, columns * SLOTS - 1, columns * SLOTS)
        drawn = np.where(rng.random(n) < 0.5, rng.choice(edges, n), rng.integers(0, columns * SLOTS + 1, n))
        position = torch.from_numpy(drawn.astype(np.int32)).to(device)
        caches = make_caches(n * columns, seed, device)
        arrays, rows = [as_array(c) for c in caches], table.cpu().numpy().copy()
        options = {"block_size": SLOTS, "slot_dim": slot_dim}
        reference.reindex(rows, ancestors.cpu().numpy(), position=drawn, caches=arrays, **options)
        reindex(backend, table, ancestors, position=position, caches=caches, seed=seed, **options)
        np.testing.assert_array_equal(table.cpu(), rows)
        np.testing.assert_array_equal(position.cpu(), drawn)
        for cache, array in zip(caches, arrays, strict=True):
            np.testing.assert_array_equal(as_array(cache), array)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5 * SLOTS), st.sampled_from([None, 2]), st.integers(0, 2**32 - 1))
def test_emulated_equals_cpu_anywhere(n, position, slot_dim, seed):
    results = []
    for backend in ("cpu", "emulated"):
        table, ancestors = random_case(n, seed, tail=min(position // SLOTS, 4))
        caches = make_caches(2 * n, seed)
        options = {"position": position, "block_size": SLOTS, "slot_dim": slot_dim}
        reindex(backend, table, ancestors, caches=caches, seed=seed, **options)
        results.append((table, *(as_array(c) for c in caches)))
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slot_dim", [None, 2])
def test_survivors_and_the_neighbourhood_stay(slot_dim, backend):
    device = device_of(backend)
    table, ancestors = random_case(50, 3, device=device)
    cache = make_caches(100, 3, device)[1]
    base = cache._base.clone()
    before = table.clone()
    survivors = ancestors == torch.arange(50, device=device)
    options = {"position": 3 * SLOTS + 5, "block_size": SLOTS, "slot_dim": slot_dim}
    reindex(backend, table, ancestors, caches=[cache], **options)
    assert torch.equal(table[survivors], before[survivors])
    assert torch.equal(table[:, 3:], before[:, 3:])
    assert torch.equal(cache._base[:, 0], base[:, 0])  # bytes between the blocks
    written = torch.zeros(100, dtype=torch.bool, device=device)
    written[before[~survivors, 3].long()] = True
    assert torch.equal(cache[~written], base[:, 1][~written])
    assert torch.equal(cache[:, :, 5:], base[:, 1, :, 5:]) == (slot_dim == 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_table_has_no_tail(backend):
    device = device_of(backend)
    table, ancestors = random_case(40, 4, device=device)
    want = table[ancestors]
    cache = torch.randn(80, SLOTS, 4, device=device)
    before = cache.clone()
    reindex(backend, table, ancestors, position=5 * SLOTS, block_size=SLOTS, caches=[cache])
    assert torch.equal(table, want) and torch.equal(cache, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_stride_and_identity(backend):
    device = device_of(backend)
    wide = torch.arange(40, dtype=torch.int32, device=device).view(4, 10)
    table = wide[:, 2:6]
    ancestors = torch.tensor([0, 0, 2, 2], device=device)
    want = wide.clone()
    want[1, 2:4], want[3, 2:4] = wide[0, 2:4], wide[2, 2:4]
    reindex(backend, table, ancestors, position=4, block_size=2, caches=[])
    assert torch.equal(wide, want)
    cache = torch.randn(40, 3, device=device)
    before = cache.clone()
    reindex(backend, table, torch.arange(4, device=device), position=5, block_size=2, caches=[cache])
    assert torch.equal(wide, want) and torch.equal(cache, before)


@pytest.mark.parametrize("backend", ["cpu", "torch", pytest.param("cuda", marks=needs_cuda)])
def test_position_and_step_as_tensors(backend):
    """Read when the op runs: the same tensors, other values."""
    device = device_of(backend)
    position, step = torch.tensor(0, device=device), torch.tensor(0, device=device)
    genealogy = torch.zeros((3, 20), dtype=torch.int32, device=device)
    for t, value in enumerate((3 * SLOTS + 2, 2 * SLOTS, 4 * SLOTS + 15)):
        table, ancestors = random_case(20, t, tail=value // SLOTS, device=device)
        caches = make_caches(40, t, device)
        arrays, rows, noted = [as_array(c) for c in caches], table.cpu().numpy().copy(), genealogy.cpu().numpy().copy()
        reference.reindex(
            rows, ancestors.cpu().numpy(), position=value, block_size=SLOTS, caches=arrays, slot_dim=2,
            genealogy=noted, step=t,
        )  # fmt: skip
        position.fill_(value), step.fill_(t)
        options = {"position": position, "genealogy": genealogy, "step": step}
        reindex(backend, table, ancestors, block_size=SLOTS, caches=caches, slot_dim=2, **options)
        np.testing.assert_array_equal(table.cpu(), rows)
        np.testing.assert_array_equal(genealogy.cpu(), noted)
        for cache, array in zip(caches, arrays, strict=True):
            np.testing.assert_array_equal(as_array(cache), array)


TABLE = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
MOVE = torch.tensor([0, 0, 2])
CACHE = torch.zeros(6, 4)
GOOD = {"table": TABLE, "ancestors": MOVE, "position": 5, "block_size": 4, "caches": [CACHE]}
GENEALOGY = torch.zeros((2, 3), dtype=torch.int32)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"ancestors": torch.tensor([1, 2, 2])}, r"ancestors\[0\]=1, whose own ancestor is 2"),
        ({"ancestors": torch.tensor([0, 3, 2])}, r"ancestors\[1\]=3, not in \[0, 3\)"),
        ({"ancestors": torch.tensor([0, -1, 2])}, r"ancestors\[1\]=-1, not in"),
        ({"ancestors": torch.tensor([0, 0])}, "ancestors: must have 3 elements, got 2"),
        ({"position": 9}, r"position=9: must be in \[0, 8\]"),
        ({"position": -1}, "position=-1"),
        ({"position": torch.tensor(9)}, "position=9"),
        ({"position": torch.tensor([[1]])}, "position: must be an integer or a 0-dim int64 tensor"),
        ({"position": torch.tensor([1, 5, 5])}, "position: must be a vector of torch.int32"),
        ({"position": torch.tensor([5]).int()}, "position: must have 3 elements, got 1"),
        ({"position": torch.tensor([5, 5, 9]).int()}, r"position\[2\]=9: must be in \[0, 8\], 2 columns of 4"),
        ({"position": torch.tensor([5, -1, 9]).int()}, r"position\[1\]=-1: must be"),
        (
            {"caches": [torch.zeros(2, 4)], "position": torch.tensor([1, 5, 5]).int()},
            "row 1 would copy block 0 of row 0 to block 2",
        ),
        ({"block_size": 0}, "block_size=0"),
        ({"slot_dim": 2}, r"slot_dim=2: must be in \[1, 2\), a dimension of caches\[0\]"),
        ({"slot_dim": 0}, "slot_dim=0"),
        ({"slot_dim": 1, "block_size": 5}, r"caches\[0\]: has 4 slots in dimension slot_dim=1, block_size is 5"),
        ({"table": TABLE.long()}, "table: must be .* int32"),
        ({"caches": [CACHE, torch.zeros(4, 6).t()]}, r"caches\[1\]: each block"),
        ({"caches": [torch.zeros(3, 4)]}, "table: .*"),  # block 3 of row 1 is outside
        ({"genealogy": GENEALOGY}, "genealogy and step: must be given together"),
        ({"step": 0}, "genealogy and step: must be given together"),
        ({"genealogy": GENEALOGY, "step": 2}, r"step=2: must be in \[0, 2\)"),
        ({"genealogy": GENEALOGY, "step": torch.tensor(-1)}, "step=-1"),
        ({"genealogy": GENEALOGY.long(), "step": 0}, r"genealogy: must be \(T, 3\) int32"),
        ({"genealogy": GENEALOGY[:, :2], "step": 0}, r"genealogy: must be \(T, 3\) int32"),
    ],
)
def test_refuses_and_writes_nothing(change, message, backend):
    args = {**GOOD, "table": TABLE.clone(), **change}
    before = args["table"].clone()
    with pytest.raises(ValueError, match=message):
        ops.reindex(**args, backend=backend)
    assert torch.equal(args["table"], before) and not GENEALOGY.any()


@pytest.mark.parametrize("backend", CHECKED)
def test_refuses_a_block_onto_itself(backend):
    table = torch.tensor([[0, 5], [2, 5], [4, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="row 1 would copy block 5 of row 0 to block 5"):
        ops.reindex(table, MOVE, position=5, block_size=4, caches=[CACHE], backend=backend)
    ops.reindex(table, MOVE, position=4, block_size=4, caches=[CACHE], backend=backend)  # no tail, nothing to copy
    assert table[1].tolist() == [0, 5]


@pytest.mark.parametrize("backend", ["emulated", pytest.param("cuda", marks=needs_cuda)])
def test_leaves_alone_what_nobody_checked(backend):
    """On a device: rows out of form, blocks outside a cache, positions and steps out of range."""
    device = device_of(backend)
    n = 8
    table = torch.arange(2 * n, dtype=torch.int32, device=device).view(n, 2)
    table[0, 1], table[5, 1] = 99, -3
    ancestors = torch.tensor([0, 0, -1, 70, 4, 4, 7, 3], device=device)  # rows 2, 3, 6, 7 are out of form
    cache = torch.randn(2 * n, 4, 3, device=device)
    genealogy = torch.zeros((2, n), dtype=torch.int32, device=device)
    keep, want = cache.clone(), table.clone()
    want[1, 0], want[5, 0] = table[0, 0], table[4, 0]
    options = {"block_size": 4, "caches": [cache], "slot_dim": 1}

    def number(value):  # a number that the op's face would refuse
        return value if backend == "emulated" else torch.tensor(value, device=device)

    reindex(backend, table, ancestors, position=5, genealogy=genealogy, step=number(2), **options)
    assert torch.equal(table, want) and torch.equal(cache, keep) and not genealogy.any()
    for position in (-1, 9, 2**40):
        reindex(backend, table, ancestors, position=number(position), **options)
    bad = torch.tensor([-1, 9, 5, 5, 2**31 - 1, 5, 5, 5], dtype=torch.int32, device=device)  # of parents 0 and 4
    reindex(backend, table, ancestors, position=bad, **options)
    assert torch.equal(table, want) and torch.equal(cache, keep)


@pytest.mark.parametrize("backend", ["cpu", "emulated", pytest.param("cuda", marks=needs_cuda)])
def test_cache_of_more_than_2_to_31_bytes(backend):
    """Blocks whose offset 32 bits do not hold. The memory is reserved, but only touched at its ends."""
    blocks, words = 70_000, 8192  # 32 KiB each
    cache = torch.empty(blocks, words // 16, 16, dtype=torch.int32, device=device_of(backend))
    assert cache.nbytes > 2**31
    cache[1], cache[blocks - 1] = 1, 2
    table = torch.tensor([[blocks - 1], [1]], dtype=torch.int32, device=cache.device)
    ancestors = torch.tensor([0, 0], device=cache.device)
    reindex(backend, table, ancestors, position=3, block_size=16, caches=[cache], slot_dim=2)
    assert (cache[1, :, :3] == 2).all() and (cache[1, :, 3:] == 1).all()


def test_is_a_torch_op():
    table, ancestors = random_case(20, 0)
    caches = make_caches(40, 0)
    genealogy, step = torch.zeros((3, 20), dtype=torch.int32), torch.tensor(1)
    position = torch.tensor(3 * SLOTS + 2)
    for arguments in (
        (table, ancestors, 0, position, SLOTS, caches, 2, genealogy, 0, step, "cpu"),
        (table, ancestors, 3 * SLOTS + 2, None, SLOTS, caches, None, None, 0, None, "cpu"),
    ):
        torch.library.opcheck(torch.ops.fastsmc.reindex.default, arguments)


def test_compiles_in_one_graph():
    def step(table, ancestors, position, caches, genealogy):
        t = position // SLOTS - 2
        ops.reindex(
            table,
            ancestors,
            position=position,
            block_size=SLOTS,
            caches=caches,
            slot_dim=2,
            genealogy=genealogy,
            step=t,
        )
        return table + 1, caches[0] * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for f in (compiled, step):
        table, ancestors = random_case(20, 0)
        caches, genealogy = make_caches(40, 0), torch.zeros((3, 20), dtype=torch.int32)
        out = f(table, ancestors, torch.tensor(3 * SLOTS + 2), [caches[0], caches[3]], genealogy)
        results.append((*out, table, genealogy, *caches))
    assert (results[0][3][1] != 0).any()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@needs_cuda
def test_replays_of_a_graph_go_on():
    """One captured reindex, three positions and steps."""
    table, ancestors = random_case(100, 1, device="cuda")
    caches = make_caches(200, 1, "cuda")
    position, step = torch.tensor(3 * SLOTS + 1, device="cuda"), torch.tensor(0, device="cuda")
    genealogy = torch.full((3, 100), -1, dtype=torch.int32, device="cuda")
    arrays, rows, noted = [as_array(c) for c in caches], table.cpu().numpy().copy(), genealogy.cpu().numpy()
    options = {"block_size": SLOTS, "slot_dim": 2}
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.reindex(table, ancestors, position=position, caches=caches, genealogy=genealogy, step=step, **options)
    for t in range(3):
        position.fill_(3 * SLOTS + 1 + t), step.fill_(t)
        graph.replay()
        reference.reindex(
            rows, ancestors.cpu().numpy(), position=3 * SLOTS + 1 + t, caches=arrays, genealogy=noted, step=t, **options
        )
    np.testing.assert_array_equal(table.cpu(), rows)
    np.testing.assert_array_equal(genealogy.cpu(), noted)
    for cache, array in zip(caches, arrays, strict=True):
        np.testing.assert_array_equal(as_array(cache), array)
