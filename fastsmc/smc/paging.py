"""Which KV blocks the particles of one group read and write. Engine-independent: integers and tables of block ids.

The next position to write is one number for a group. With B tokens per block:

    column   0 ... prompt columns   | full columns of generated tokens | tail | ahead ...
    owner    the request, shared    | shared through the genealogy     | private to each row

A full column never changes, so a child simply names its parent's blocks. The column that the next token goes to (and,
for potentials that score continuations, the columns after it) is private to each row: a child gets a copy of the used
part of its parent's tail. Blocks are handed out only when a column opens, N at a time; just before, a mark and sweep
over the table finds the blocks that no row reads any more. No reference counts anywhere.

Where particles wait for each other at the ends of segments, rows have lengths of their own (`RaggedPaging`): each has
as many private columns, from its own tail on, and gets a block when it fills one.

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


class RaggedPaging(Paging):
    """Does the same for rows that each have a next position of their own. The arguments are those of `Paging`.

    Every row has `n_private` blocks of its own, in the columns from its tail on; a child brings its own along to where
    its parent's tail is. `position` is the largest of all, or more.
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
        self.n_private = private_columns(block_size, ahead)
        columns = (last_position + 1) // block_size + self.n_private
        super().__init__(
            n_rows, prompt_len, prompt_blocks, block_size, (columns - 1) * block_size, ahead, device
        )  # fmt: skip
        self.positions = torch.full((n_rows,), prompt_len, dtype=torch.int32, device=device)
        self._ends = torch.full((n_rows,), self.n_open, dtype=torch.int64, device=device)  # of the open columns
        self._n_missing = n_rows * self.n_private

    def _tails(self) -> Tensor:
        return self.positions.long() // self.block_size

    @property
    def must_open(self) -> bool:
        """Says whether a row lacks blocks. Waits for the device."""
        missing = (self._tails() + self.n_private - self._ends).sum()
        self._n_missing, self.position = torch.stack([missing, self.positions.max()]).tolist()
        return self._n_missing > 0

    def live(self, active: Tensor) -> Tensor:
        column, tails = torch.arange(self.table.shape[1], device=self.table.device), self._tails()[:, None]
        full = active[:, None] & (column >= self.n_prompt_columns) & (column < tails)
        private = (column >= tails) & (column < self._ends[:, None])
        return torch.where(full | private, self.table, -1).reshape(-1).long()

    def need(self) -> int:
        """Counts the blocks that must be granted before `open_columns`: a few more than are missing now, since some row
        or other fills a block at most steps."""
        if self._n_missing <= len(self.free):
            return 0
        return self._n_missing + spare_blocks(self.n_rows) - len(self.free)

    def open_columns(self) -> None:
        """Gives each row the blocks that it lacks. `need` must have been met."""
        ids, self.free = self.free[: self._n_missing], self.free[self._n_missing :]
        lacks, device = self._tails() + self.n_private - self._ends, self.table.device
        rows = torch.arange(self.n_rows, device=device).repeat_interleave(lacks, output_size=len(ids))
        place = torch.arange(len(ids), device=device) - (lacks.cumsum(0) - lacks)[rows]
        self.table[rows, self._ends[rows] + place] = torch.tensor(ids, dtype=torch.int32, device=device)
        self._ends += lacks
        self._n_missing = 0

    def surplus(self) -> list[int]:
        """Takes most free blocks from those of the group, to be given back; some are for the next steps."""
        kept, self.free = self.free[: 2 * spare_blocks(self.n_rows)], self.free[2 * spare_blocks(self.n_rows) :]
        blocks = super().surplus()
        self.free = kept
        return blocks

    def follow(self, ancestors: Tensor) -> None:
        """Moves the private blocks of each row to the columns that are private to its ancestor (N,) int64.

        To be called before `ops.reindex`, and before `positions` become those of the ancestors.
        """
        columns, tails = torch.arange(self.n_private, device=self.table.device), self._tails()
        private = self.table.gather(1, tails[:, None] + columns)
        self.table.scatter_(1, tails[ancestors, None] + columns, private)
        self._ends = tails[ancestors] + self.n_private


def private_columns(block_size: int, ahead: int) -> int:
    """Counts the columns that a next position and `ahead` more are in at most."""
    return (block_size - 1 + ahead) // block_size + 1


def spare_blocks(n_rows: int) -> int:
    """Says how many blocks more than it needs now a group of ragged rows asks for."""
    return n_rows // 8 + 1


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
            if isinstance(member, RaggedPaging):
                member.positions = self.position[first : first + member.n_rows]
        return begin

    def remove(self, begin: int) -> None:
        """Lets the group whose first row is `begin` go."""
        del self._groups[begin]
