"""Blocks in use equal those that the genealogy implies, at every step, for random genealogies."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmc import ops
from fastsmc.smc.paging import BlockTables, Paging


def implied_blocks(histories, active, position, block_size, n_prompt_columns, n_open):
    """Distinct (ancestor, column) pairs of full generated columns, plus one block a row in each private column.

    `histories[i][p]` is the row that wrote position p of row i: two rows share a column when they agree on all of it.
    """
    tail = position // block_size
    full = {
        (column, tuple(histories[i][: (column + 1) * block_size]))
        for i in range(len(histories))
        if active[i]
        for column in range(n_prompt_columns, min(tail, n_open))
    }
    return len(full) + len(histories) * max(0, n_open - tail)


def used(paging, active):
    """The blocks in use."""
    return set(paging.live(active).tolist()) - {-1}


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 9),
    prompt_len=st.integers(1, 11),
    steps=st.integers(1, 30),
    block_size=st.sampled_from([2, 4]),
    ahead=st.integers(0, 5),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    end_rate=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 2**16),
)
def test_live_blocks_equal_those_of_the_ancestry(n, prompt_len, steps, block_size, ahead, rate, end_rate, seed):
    random = torch.Generator().manual_seed(seed)
    last = prompt_len + steps - 1 + ahead
    paging = Paging(n, prompt_len, list(range(-(-prompt_len // block_size))), block_size, last, ahead)
    pool = list(range(1000, 5000))
    content: dict[tuple[int, int], object] = {}  # (block, slot) → what was written there last
    histories = [["prompt"] * prompt_len for _ in range(n)]
    active = torch.ones(n, dtype=torch.bool)
    for t in range(steps):
        n_open = paging.n_open
        if paging.must_open:
            paging.sweep(used(paging, active))
        need = paging.need()
        taken, pool = pool[:need], pool[need:]
        paging.grant(taken)
        assert paging.need() == 0
        paging.open_columns()
        pool = paging.surplus() + pool
        if paging.n_open > n_open:
            assert paging.owned == used(paging, active)  # nothing kept that nobody reads
        # write one token in every active row, each into a block of its own
        rows = torch.nonzero(active).squeeze(1)
        slots = (paging.table[rows, paging.tail] * block_size + paging.n_used).tolist()
        assert len(set(slots)) == len(slots)
        for row, slot in zip(rows.tolist(), slots, strict=True):
            token = (t, row)
            content[divmod(slot, block_size)] = token
            histories[row].append(token)
        for row in range(n):
            if not active[row]:
                histories[row].append(None)
        paging.position += 1
        active &= torch.rand(n, generator=random) >= end_rate
        if torch.rand(1, generator=random) < rate:
            log_w = 2 * torch.randn(n, generator=random, dtype=torch.float64)
            u = torch.rand(n, generator=random, dtype=torch.float64)
            a = ops.resample(log_w, u, scheme="multinomial").ancestors
            active = active[a]
            before = paging.table.clone()
            ops.reindex(paging.table, a, position=paging.position, block_size=block_size, caches=[])
            if paging.n_used:  # the copy of the tail, on the dictionary that stands for the cache
                for i in range(n):
                    if a[i] != i and active[i]:
                        for slot in range(paging.n_used):
                            key = (int(before[a[i], paging.tail]), slot)
                            content[int(paging.table[i, paging.tail]), slot] = content.get(key)
            histories = [list(histories[j]) for j in a.tolist()]
        implied = implied_blocks(histories, active, paging.position, block_size, paging.n_prompt_columns, paging.n_open)
        assert len(used(paging, active)) == implied
        for row in torch.nonzero(active).squeeze(1).tolist():  # what a row reads is its own history
            for p in range(prompt_len, paging.position):
                block = int(paging.table[row, p // block_size])
                assert content[block, p % block_size] == histories[row][p]


def test_growth_is_asked_for_exactly():
    paging = Paging(4, 3, [0, 1], 2, last_position=20)
    assert paging.must_open and paging.need() == 4
    paging.grant([10, 11, 12])
    paging.sweep(used(paging, torch.ones(4, dtype=torch.bool)))
    assert paging.need() == 1
    with pytest.raises((ValueError, RuntimeError)):
        paging.open_columns()


def test_groups_in_one_table():
    """Groups come and go, the table grows, rows of a group stay side by side, and what they hold stays theirs."""
    tables, random = BlockTables(), torch.Generator().manual_seed(0)
    held: dict[int, tuple[Paging, torch.Tensor]] = {}
    for i in range(200):
        if held and torch.rand(1, generator=random) < 0.45:
            begin = list(held)[int(torch.randint(len(held), (1,), generator=random))]
            tables.remove(begin)
            del held[begin]
        else:
            n, columns = (int(torch.randint(1, 9, (1,), generator=random)) for _ in range(2))
            paging = Paging(n, 3, [0], 4, 4 * columns - 1)
            begin = tables.add(paging)
            paging.table.fill_(i)
            held[begin] = paging, paging.table.clone()
            assert (tables.position[begin : begin + n] == 3).all()
        spans = sorted((begin, begin + paging.n_rows) for begin, (paging, _) in held.items())
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
        for begin, (paging, want) in held.items():
            assert torch.equal(paging.table, want)
            assert torch.equal(tables.table[begin : begin + paging.n_rows, : want.shape[1]], want)
    assert len(tables.position) < 150  # gaps are used again
