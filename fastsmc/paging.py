"""Which KV blocks the particles of one group read and write. Engine-independent: integers and one (N, C) table.

Rows have equal length, so one number, the next position to write, describes them all. With B tokens per block:

    column   0 ... prompt columns   | full columns of generated tokens | tail | ahead ...
    owner    the request, shared    | shared through the genealogy     | private to each row

A full column never changes, so a child simply names its parent's blocks. The column that the next token goes to (and,
for potentials that score continuations, the columns after it) is private to each row: a child gets a copy of the used
part of its parent's tail. Blocks are handed out only when a column opens, N at a time; just before, a mark and sweep
over the table finds the blocks that no row reads any more. No reference counts anywhere.

The number of live blocks is thus that of docs/mathematics.md §6: distinct (ancestor, block) pairs, plus N tails.
"""

from __future__ import annotations

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
        """Lists the blocks in use, sorted: full blocks that active rows read, and every row's private ones.

        Args:
            active: (N,) bool, rows whose history will be attended to again (`Group.readers`).
        """
        full = self.table[active, self.n_prompt_columns : min(self.tail, self.n_open)]
        private = self.table[:, self.tail : self.n_open]
        return torch.unique(torch.cat([full.reshape(-1), private.reshape(-1)]))

    def need(self, active: Tensor) -> int:
        """Counts the blocks that must be granted before `open_columns` can open what the next position needs.

        Sweeps when a column must be opened, so that `free` is exact afterwards.
        """
        columns = self._columns_wanted() - self.n_open
        if columns <= 0:
            return 0
        self.free = sorted(self.owned.difference(self.live(active).tolist()))
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

    def slots(self, rows: Tensor, n_tokens: int = 1) -> Tensor:
        """Finds the cache slots of the next `n_tokens` positions of each row in `rows` (R,); (R * n_tokens,) int64."""
        positions = torch.arange(self.position, self.position + n_tokens, device=self.table.device)
        blocks = self.table[rows][:, positions // self.block_size].long()
        return (blocks * self.block_size + positions % self.block_size).reshape(-1)
