"""Keys and values of histories in a worker, kept by content between calls, for the rows of log p of their next tokens.

`Tree` says in which blocks the keys and values of histories (lists of tokens) lie, and knows nothing of the model.
`Histories` has the KV cache, of a stated size and apart from the engine's, and runs what is missing, between two steps
of the engine. Every tensor-parallel rank does the same, as all are asked the same; rank 0 has the rows.

A whole block is shared by all histories that begin with its tokens and those before it, and only whole blocks have
children. A history goes on in the block where an earlier one ended; one that branches off within a block copies it. Of
the blocks without children the one that has been asked for the longest ago is freed first.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastsmc.vllm.model import Model
from fastsmc.vllm.passes import Stretch, run_stretches


@dataclasses.dataclass(eq=False)
class Node:
    """Is a block of the tree, or its root.

    Attributes:
        tokens: whose keys and values are in it, or will be behind the next pass; of siblings none begins another.
        ready: how many of them are there before the next pass, some by a copy.
        source: block in which these lie until the next pass: `block`, unless they are copied.
        asked: number of the part that has used it last (`Tree.begin_part`).
        children: by their tokens.
        order: the children's tokens, ascending.
    """

    parent: Node | None
    tokens: tuple[int, ...]
    block: int
    ready: int
    source: int
    asked: int = 0
    children: dict[tuple[int, ...], Node] = dataclasses.field(default_factory=dict)
    order: list[tuple[int, ...]] = dataclasses.field(default_factory=list)

    def add(self, child: Node) -> None:
        self.children[child.tokens] = child
        bisect.insort(self.order, child.tokens)

    def remove(self, child: Node) -> None:
        del self.children[child.tokens]
        del self.order[bisect.bisect_left(self.order, child.tokens)]

    def near(self, tokens: tuple[int, ...]) -> list[tuple[int, Node]]:
        """Lists children with the lengths of what they and `tokens` begin with. None has more than the longest here:
        in ascending order that is a neighbour."""
        at = bisect.bisect_left(self.order, tokens)
        found = self.order[max(0, at - 1) : at + 1]
        return [(_in_common(key, tokens), self.children[key]) for key in found]


def _in_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Counts the tokens with which both begin."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class Placed(NamedTuple):
    """Says where a history lies: its block table, and from which token on it goes through the model."""

    blocks: list[int]
    begin: int


class Tree:
    """Keeps account of blocks 1 to `total`, each of which is free or a node's.

    Histories are placed in parts: between `begin_part` and `commit` no block that one of them uses is freed, so that
    one pass can run them all, in this order. Block contents are taken to be copied by `copies` before that pass.
    """

    def __init__(self, total: int, block_size: int) -> None:
        self.total, self._size = total, block_size
        self._part = 0
        self.clear()

    def clear(self) -> None:
        """Frees all blocks."""
        self._root = Node(None, (), 0, 0, 0)
        self._free = list(range(self.total, 0, -1))
        self._nodes: OrderedDict[Node, None] = OrderedDict()  # those asked for the longest ago first; parents behind
        self._n_held = 0  # nodes of this part
        self._fresh: dict[Node, None] = {}  # that this part has changed

    @property
    def used(self) -> int:
        return len(self._nodes)

    @property
    def free(self) -> int:
        return len(self._free)

    def begin_part(self) -> None:
        self._part += 1
        self._n_held = 0

    def copies(self) -> list[tuple[int, int]]:
        """Lists (from block, to block) of this part; all are read before any is written."""
        return [(node.source, node.block) for node in self._fresh if node.ready and node.source != node.block]

    def commit(self) -> None:
        """Takes note that the pass has run."""
        for node in self._fresh:
            node.ready, node.source = len(node.tokens), node.block
        self._fresh = {}

    def place(self, ids: Sequence[int]) -> Placed | None:
        """Finds blocks for a history of at most `total` blocks; None: they are not free in this part."""
        node, path, at, size = self._root, [], 0, self._size
        growing: Node | None = None  # that the history goes on in
        source, known = 0, 0  # block that it copies, and how many tokens of it
        while at < len(ids):
            chunk = tuple(ids[at : at + size])
            near = node.near(chunk)
            n, best = max(near, key=lambda pair: pair[0], default=(0, self._root))
            if n == len(chunk) or (n and n == len(best.tokens) == size):
                path.append(best)
                node, at = best, at + n
                continue
            if n and n == len(best.tokens):
                growing = best
            else:
                known, source = max(((min(n, each.ready), each.source) for n, each in near), default=(0, 0))
            break
        self._hold(path if growing is None else [*path, growing])
        n_new = -(-len(ids) // size) - len(path) - (growing is not None)
        if n_new > self.free + self.used - self._n_held:
            return None
        done = at
        if growing is not None:
            done += len(growing.tokens)
            node.remove(growing)
            growing.tokens = tuple(ids[at : at + size])
            node.add(growing)
            self._fresh[growing] = None
            path.append(growing)
            node, at = growing, at + size
        while at < len(ids):
            block = self._take_block()
            fresh = Node(node, tuple(ids[at : at + size]), block, known, source if known else block)
            node.add(fresh)
            self._fresh[fresh] = None
            path.append(fresh)
            done, known = done + known, 0
            node, at = fresh, at + size
        self._hold(path)
        return Placed([each.block for each in path], min(done, len(ids) - 1))

    def _hold(self, path: Sequence[Node]) -> None:
        for node in reversed(path):
            self._n_held += node.asked != self._part
            node.asked = self._part
            self._nodes[node] = None
            self._nodes.move_to_end(node)

    def _take_block(self) -> int:
        if not self._free:
            node, _ = self._nodes.popitem(last=False)
            assert node.parent is not None and node.asked < self._part and not node.children
            node.parent.remove(node)
            self._free.append(node.block)
        return self._free.pop()


class Histories:
    """Answers for histories from a KV cache of its own.

    Raises:
        ValueError: a budget that is less than two blocks.
    """

    def __init__(self, model: Model, cache_bytes: int) -> None:
        n_blocks = cache_bytes // model.block_bytes
        if n_blocks < 2:
            raise ValueError(
                f"cache_bytes={cache_bytes}: must be at least {2 * model.block_bytes}, two blocks of "
                f"{model.block_size} tokens"
            )
        self._model, self._cache = model, model.new_cache(n_blocks)
        self.tree = Tree(n_blocks - 1, model.block_size)  # the first block stands where a table has none

    def next_rows(self, histories: Sequence[Sequence[int]]) -> Tensor | None:
        """Computes log p of the token behind each history, (R, V) float32; None on ranks that get no logits.

        Args:
            histories: not empty, and none of them longer than the cache.
        """
        rows: list[Tensor] = []
        try:
            with self._model.with_cache(self._cache) as caches:
                left = list(histories)
                while left:
                    n_taken, found = self._run_part(left, caches)
                    left = left[n_taken:]
                    rows += found
        except BaseException:
            self.clear()  # what has been computed nobody knows
            raise
        return torch.cat(rows) if rows else None

    def clear(self) -> None:
        """Frees all blocks, and makes them zero: 0 · NaN is NaN behind a row's end."""
        self.tree.clear()
        for cache in self._cache.values():
            cache.zero_()

    def _run_part(self, histories: Sequence[Sequence[int]], caches: Sequence[Tensor]) -> tuple[int, list[Tensor]]:
        """Runs as many as have blocks and rows at a time; returns how many, and their rows."""
        model, stretches = self._model, list[Stretch]()
        self.tree.begin_part()
        for ids in histories[: model.max_rows]:
            placed = self.tree.place(ids)
            if placed is None:
                break
            stretches.append(Stretch(ids, placed.begin, placed.blocks))
        assert stretches
        if copies := self.tree.copies():
            source, target = torch.tensor(copies, device=model.device).T
            for cache in caches:
                cache[target] = cache[source]
        hidden = run_stretches(model, stretches)
        self.tree.commit()
        if hidden.isnan().any():  # which no later history shall read
            self.clear()
        found = []
        for part in hidden.split(model.max_logits_rows):
            logits = model.plain_logits(part)
            if logits is not None:
                found.append(logits.float().log_softmax(-1))
        return len(stretches), found
