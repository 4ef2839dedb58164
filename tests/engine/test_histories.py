"""`Tree`: the blocks of a history hold that history, whatever was placed before, and no block is lost."""

import random

import pytest

from fastsmc.vllm.histories import Tree


class Cache:
    """Blocks as the model fills them: copies first, all at once, then the rows of a part in their order."""

    def __init__(self, total: int, size: int) -> None:
        self.size, self.tree = size, Tree(total, size)
        self.slots = [[None] * size for _ in range(total + 1)]
        self.n_run = self.n_parts = 0

    def ask(self, histories):
        """Places histories in as few parts as have room, and reads each back from its table behind its pass."""
        left = list(histories)
        while left:
            self.tree.begin_part()
            self.n_parts += 1
            placed = []
            while left and (row := self.tree.place(left[0])) is not None:
                placed.append((left.pop(0), row))
            assert placed
            read = [(block, list(self.slots[source])) for source, block in self.tree.copies()]
            for block, content in read:
                self.slots[block] = content
            for ids, row in placed:
                assert row.begin < len(ids) and len(row.blocks) == -(-len(ids) // self.size)
                for at in range(row.begin, len(ids)):
                    self.slots[row.blocks[at // self.size]][at % self.size] = ids[at]
                self.n_run += len(ids) - row.begin
                assert ids == self.read(row, len(ids))  # it hangs on no later row, which may be in a later pass
            assert all(ids == self.read(row, len(ids)) for ids, row in placed)
            self.tree.commit()
            assert self.tree.used + self.tree.free == self.tree.total

    def read(self, row, n):
        return [self.slots[row.blocks[at // self.size]][at % self.size] for at in range(n)]


@pytest.mark.parametrize("seed", range(20))
def test_tables_read_back(seed):
    """Histories that grow, branch, shrink and begin anew, from caches that hold a few of them to all of them."""
    draw = random.Random(seed)
    size = draw.choice([1, 2, 4, 8])
    longest = 5 * size
    cache, known = Cache(draw.choice([5, 9, 40, 1000]), size), [[]]
    for _ in range(60):
        asked = []
        for _ in range(draw.randint(1, 12)):
            old = draw.choice(known)
            begin = old[: draw.randint(0, len(old))] if draw.random() < 0.4 else old
            ids = [*begin, *(draw.randint(0, 2) for _ in range(draw.randint(1, 3)))][:longest]
            asked.append(ids)
        cache.ask(asked)
        known = (known + asked)[-30:]
    used = cache.tree.used
    assert used > 0
    cache.tree.clear()
    assert (cache.tree.used, cache.tree.free) == (0, cache.tree.total)


def test_what_is_shared_runs_once():
    """A new beginning of whole blocks once per call; one more token is one query; a branch is one query and a copy."""
    cache = Cache(100, 4)
    prompt = [0, 1, 2, 3, 4, 5, 6, 7]
    cache.ask([[*prompt, n] for n in range(10)])
    assert cache.n_run == 8 + 10 and cache.tree.used == 2 + 10
    cache.ask([[*prompt, n, n] for n in range(10)])
    assert cache.n_run == 28 and cache.tree.used == 12
    cache.ask([[*prompt, 0, 0, n] for n in range(5)])  # one goes on in place, the others branch off
    assert cache.n_run == 33 and cache.tree.used == 16
    cache.ask([[*prompt, 0, 0], prompt, prompt[:3]])  # known: the last token again, whose row is asked for
    assert cache.n_run == 36 and cache.tree.used == 16 and cache.n_parts == 4


def test_the_longest_unasked_goes_first():
    cache = Cache(4, 2)
    cache.ask([[1, 1, 1], [2, 2, 2]])
    cache.ask([[1, 1, 1]])
    cache.ask([[3]])  # in the place of [2]'s last block, then of its first
    begun = cache.n_run
    cache.ask([[1, 1, 1]])
    assert cache.n_run == begun + 1 and cache.tree.used == 4
    cache.ask([[4]])
    begun = cache.n_run
    cache.ask([[2, 2, 2]])
    assert cache.n_run == begun + 3


def test_a_call_that_does_not_fit_is_cut():
    cache = Cache(5, 2)
    cache.ask([[n] * 6 for n in range(7)])
    assert cache.n_parts == 7 and cache.n_run == 42
