"""reindex against NumPy: table rows, tail blocks, spans, inactive rows, and what it refuses."""

import numpy as np
import pytest
import torch

from fastsmc import ops, reference

BACKENDS = ("cpu", "torch")


def random_case(n, seed, columns=5, n_shared=3):
    """A table whose rows share their first blocks with others and own their tail, and in-place ancestors."""
    rng = np.random.default_rng(seed)
    log_weights = torch.from_numpy(rng.normal(0, 2, n))
    ancestors = ops.resample(log_weights, torch.from_numpy(rng.random(n)), scheme="multinomial").ancestors
    blocks = rng.permutation(2 * n)
    table = rng.integers(0, 2 * n, (n, columns)).astype(np.int32)
    table[:, n_shared] = blocks[:n]
    return torch.from_numpy(table), ancestors


def make_caches(n_blocks, seed):
    """Plain bfloat16, a slice with a larger block stride, and blocks of an odd number of bytes."""
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(n_blocks, 2, 4, 8, generator=g)
    return [
        torch.randn(n_blocks, 3, 16, 4, generator=g).bfloat16(),
        wide[:, 1],
        torch.randint(0, 255, (n_blocks, 333), generator=g, dtype=torch.uint8),
    ]


def as_array(cache):
    return (cache.view(torch.int16) if cache.dtype == torch.bfloat16 else cache).numpy().copy()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 17, 100])
@pytest.mark.parametrize("spans", [None, [(0, 32)], [(4, 60), (100, 7)], []])
@pytest.mark.parametrize("with_active", [False, True])
def test_equals_numpy(n, spans, with_active, backend):
    table, ancestors = random_case(n, n)
    caches = make_caches(2 * n, n)
    spans = None if spans is None else np.array(spans, np.int64).reshape(-1, 2)
    active = torch.rand(n, generator=torch.Generator().manual_seed(n)) < 0.6 if with_active else None
    arrays, rows = [as_array(c) for c in caches], table.numpy().copy()
    want = reference.reindex(
        rows, ancestors.numpy(), n_shared=3, tail=3, caches=arrays, spans=spans,
        active=None if active is None else active.numpy(),
    )  # fmt: skip
    got = ops.reindex(table, ancestors, n_shared=3, tail=3, caches=caches, spans=spans, active=active, backend=backend)
    assert got == want and type(got) is int
    if n == 100:
        assert got > 20
    np.testing.assert_array_equal(table, rows)
    for cache, array in zip(caches, arrays, strict=True):
        np.testing.assert_array_equal(as_array(cache), array)


@pytest.mark.parametrize("backend", BACKENDS)
def test_survivors_and_the_neighbourhood_stay(backend):
    table, ancestors = random_case(50, 3)
    cache = make_caches(100, 3)[1]
    base = cache._base.clone()
    before = table.clone()
    survivors = ancestors == torch.arange(50)
    ops.reindex(table, ancestors, n_shared=3, tail=3, caches=[cache], backend=backend)
    assert torch.equal(table[survivors], before[survivors])
    assert torch.equal(table[:, 3:], before[:, 3:])
    assert torch.equal(cache._base[:, 0], base[:, 0])  # bytes between the blocks
    written = torch.zeros(100, dtype=torch.bool)
    written[before[~survivors, 3].long()] = True
    assert torch.equal(cache[~written], base[:, 1][~written])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_tail_only_the_table_moves(backend):
    table, ancestors = random_case(40, 4)
    want = table.clone()
    want[:, :5] = want[ancestors]
    cache = torch.randn(80, 4)
    before = cache.clone()
    assert ops.reindex(table, ancestors, n_shared=5, tail=None, caches=[cache], backend=backend) == 0
    assert torch.equal(table, want) and torch.equal(cache, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_stride_and_identity(backend):
    wide = torch.arange(40, dtype=torch.int32).view(4, 10)
    table = wide[:, 2:6]
    ancestors = torch.tensor([0, 0, 2, 2])
    want = wide.clone()
    want[1, 2:4], want[3, 2:4] = wide[0, 2:4], wide[2, 2:4]
    ops.reindex(table, ancestors, n_shared=2, tail=None, caches=[], backend=backend)
    assert torch.equal(wide, want)
    cache = torch.randn(40, 3)
    before = cache.clone()
    assert ops.reindex(table, torch.arange(4), n_shared=2, tail=3, caches=[cache], backend=backend) == 0
    assert torch.equal(wide, want) and torch.equal(cache, before)


TABLE = torch.tensor([[0, 1], [2, 3], [4, 5]], dtype=torch.int32)
MOVE = torch.tensor([0, 0, 2])
CACHE = torch.zeros(6, 4)
GOOD = {"table": TABLE, "ancestors": MOVE, "n_shared": 1, "tail": 1, "caches": [CACHE]}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"ancestors": torch.tensor([1, 2, 2])}, r"ancestors\[0\]=1, whose own ancestor is 2"),
        ({"ancestors": torch.tensor([0, 3, 2])}, r"ancestors\[1\]=3, not in \[0, 3\)"),
        ({"ancestors": torch.tensor([0, -1, 2])}, r"ancestors\[1\]=-1, not in"),
        ({"ancestors": torch.tensor([0, 0])}, "ancestors: must have 3 elements, got 2"),
        ({"n_shared": 3}, "n_shared=3"),
        ({"n_shared": -1}, "n_shared=-1"),
        ({"tail": 2}, "tail=2"),
        ({"tail": 0}, "tail=0"),
        ({"active": torch.ones(3)}, "active: must be a vector of torch.bool"),
        ({"table": TABLE.long()}, "table: must be .* int32"),
        ({"caches": [CACHE, torch.zeros(4, 6).t()]}, r"caches\[1\]: each block"),
        ({"spans": np.array([[8, 9]])}, r"spans: reach beyond the 16 bytes of a block of caches\[0\]"),
        ({"spans": np.array([[-1, 3]])}, "spans: has a negative value -1"),
        ({"spans": np.array([1, 2])}, r"spans: must be \(S, 2\) int64"),
        ({"caches": [torch.zeros(3, 4)]}, "table: .*"),  # block 3 of row 1 is outside
    ],
)
def test_refuses_and_writes_nothing(change, message, backend):
    args = {**GOOD, "table": TABLE.clone(), **change}
    before = args["table"].clone()
    with pytest.raises(ValueError, match=message):
        ops.reindex(**args, backend=backend)
    assert torch.equal(args["table"], before)


def test_refuses_a_block_onto_itself():
    table = torch.tensor([[0, 5], [2, 5], [4, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="row 1 would copy block 5 of row 0 to block 5"):
        ops.reindex(table, MOVE, n_shared=1, tail=1, caches=[CACHE])
