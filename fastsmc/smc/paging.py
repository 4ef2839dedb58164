"""Which KV blocks the particles of one group read and write. Engine-independent: integers and tables of block ids.

The next position to write is one number for a group. With B tokens per block:

    column   0 ... prompt columns   | full columns of generated tokens | tail | ahead ...
    owner    the request, shared    | shared through the genealogy     | private to each row

A full column never changes, so a child simply names its parent's blocks. The column that the next token goes to (and,
for potentials that score continuations, the columns after it) is private to each row: a child gets a copy of the used
part of its parent's tail. Blocks are handed out only when a column opens, N at a time; just before, a mark and sweep
over the table finds the blocks that no row reads any more. No reference counts anywhere.

The number of live blocks is thus that of docs/mathematics.md §6: distinct (ancestor, block) pairs, plus N tails.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class Paging:
    """Keeps the block table of one group, and the blocks it may use.

    Args:
        n_rows: number of particles N.
        prompt_len: number of prompt tokens P >= 1.
        prompt_blocks: ceil(P / B) block ids that hold the prompt; never written, never freed here.
        block_size: tokens per block, B.
        last_position: last position whose KV will ever be written, >= P.
        ahead: positions beyond the next one that must stay writable (for scoring continuations).
        device: of the table.
    """

    def __init__(
        self,
        n_rows: int,
        prompt_len: int,
        prompt_blocks: list[int],
        block_size: int,
        last_position: int,
        ahead: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.n_rows = n_rows
        self.block_size = block_size
        self.ahead = ahead
        self.position = prompt_len  # next position to write
        self.last_position = last_position
        self.n_prompt_columns = prompt_len // block_size  # full and shared by all
        self.n_open = self.n_prompt_columns  # columns [0, n_open) of the table are valid
        self.table = torch.zeros((n_rows, last_position // block_size + 1), dtype=torch.int32, device=device)
        self.table[:, : self.n_open] = torch.tensor(prompt_blocks[: self.n_open], dtype=torch.int32, device=device)
        self.owned: set[int] = set()  # granted by the engine
        self.free: list[int] = []  # owned and read by no row

    @property
    def tail(self) -> int:
        """Gives the column of the next position to write; those before it are full."""
        return self.position // self.block_size

    @property
    def n_used(self) -> int:
        """Counts the slots of the tail column that hold tokens."""
        return self.position % self.block_size

    def _columns_wanted(self) -> int:
        return min(self.position + self.ahead, self.last_position) // self.block_size + 1

    def live(self, active: Tensor) -> Tensor:
        """Lists the blocks in use, int64: full ones of active rows, and every row's private ones; some stand more than
        once, and −1 stands for none.

        Args:
            active: (N,) bool, rows whose history will be attended to again (`Cohort.readers`).
        """
        full = self.table[:, self.n_prompt_columns : min(self.tail, self.n_open)]
        private = self.table[:, self.tail : self.n_open]
        return torch.cat([torch.where(active[:, None], full, -1).reshape(-1), private.reshape(-1)]).long()

    @property
    def must_open(self) -> bool:
        """Says whether the next position needs columns that are not open."""
        return self._columns_wanted() > self.n_open

    def sweep(self, live: Iterable[int]) -> None:
        """Makes `free` exact: all blocks but those that `live` lists."""
        self.free = sorted(self.owned.difference(live))

    def need(self) -> int:
        """Counts the blocks that must be granted before `open_columns` can open what the next position needs."""
        columns = self._columns_wanted() - self.n_open
        return max(0, columns * self.n_rows - len(self.free))

    def grant(self, blocks: list[int]) -> None:
        """Adds blocks of the engine to those of the group."""
        self.owned.update(blocks)
        self.free.extend(blocks)

    def open_columns(self) -> None:
        """Gives every row a private block in each column that the next position needs. `need` must have been met."""
        while self.n_open < self._columns_wanted():
            ids, self.free = self.free[: self.n_rows], self.free[self.n_rows :]
            self.table[:, self.n_open] = torch.tensor(ids, dtype=torch.int32, device=self.table.device)
            self.n_open += 1

    def surplus(self) -> list[int]:
        """Takes the free blocks from those of the group, to be given back to the engine."""
        blocks, self.free = self.free, []
        self.owned.difference_update(blocks)
        return blocks


class BlockTables:
    """Holds the block tables of all groups of a worker as one: a group has as many rows, side by side, as particles.

    Attributes:
        table: (R, C) int32.
        position: (R,) int32, the tokens that a row holds.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.table = torch.zeros((0, 0), dtype=torch.int32, device=device)
        self.position = torch.zeros(0, dtype=torch.int32, device=device)
        self._groups: dict[int, Paging] = {}  # by first row

    def add(self, paging: Paging) -> int:
        """Takes a group in and returns its first row; its `table` is a part of this one from now on."""
        begin, n = 0, paging.n_rows
        for first in sorted(self._groups):  # the first gap that is wide enough
            if first - begin >= n:
                break
            begin = first + self._groups[first].n_rows
        rows, columns = self.table.shape
        if begin + n > rows or paging.table.shape[1] > columns:
            rows, columns = max(rows, 2 * (begin + n)), max(columns, paging.table.shape[1])
            table, position = self.table.new_zeros((rows, columns)), self.position.new_zeros(rows)
            table[: self.table.shape[0], : self.table.shape[1]] = self.table
            position[: len(self.position)] = self.position
            self.table, self.position = table, position
        self.table[begin : begin + n, : paging.table.shape[1]] = paging.table
        self.position[begin : begin + n] = paging.position
        self._groups[begin] = paging
        for first, member in self._groups.items():
            member.table = self.table[first : first + member.n_rows, : member.table.shape[1]]
        return begin

    def remove(self, begin: int) -> None:
        """Lets the group whose first row is `begin` go."""
        del self._groups[begin]
