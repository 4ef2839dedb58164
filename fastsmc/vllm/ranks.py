"""Tensor parallelism: rank 0 decides, and the other ranks do what its model does.

    rank 0       LeadingRunner, over a Leader     groups, potentials, paging; tells each call of the model, and makes it
    the others   Follower                         none of these: makes each call that it is told, to the order's end

A potential may answer differently in another process (it asks a server, draws noise, walks a set), so only one process
may ask it. The ranks meet in the model's collectives: a call of the model that rank 0 makes is one message, which the
other ranks wait for. Moves of KV blocks need no collective. They travel with the next message, and run before its call.

A message is a tuple of numbers and one int32 tensor on the host: the moves, and the rows of a forward pass (tokens,
slots, block table). It goes through the message queue of vLLM's tensor-parallel group: shared memory within a machine,
without a time-out, because a potential may take its time. On a CUDA device this costs rank 0 one copy to the host per
call of the model, and the others one back: a broadcast by NCCL would cost neither, but a communicator of its own.

What goes wrong on rank 0 outside the model (a potential that raises, memory that is short) ends a group there, and the
other ranks never hear of it. A call of the model that fails on any rank leaves the ranks at different collectives, out
of which there is no way back: the engine ends, as it does when an ordinary step fails.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from fastsmc.smc import GroupEngine
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.interventions import Interventions
from fastsmc.vllm.messages import GroupResult, StepOrder
from fastsmc.vllm.model import Model
from fastsmc.vllm.passes import Batch, PagedCalls
from fastsmc.vllm.runner import ParticleRunner

logger = get_logger(__name__)

T = TypeVar("T")

#: what a message may ask for
FORWARD, HIDDEN, LOGITS, END = "forward", "hidden", "logits", "end"


class Call(NamedTuple):
    """Holds the numbers of a message; the block table of a FORWARD or HIDDEN is (n_rows, n_columns).

    Attributes:
        moves: how many blocks each `reindex` since the last message has copied.
        n_tokens, max_length, queries, shared: as of a `Batch`.
        has_variants: whether its variants come with its rows.
        begin, end: of a LOGITS, rows of the last HIDDEN.
        cleared: blocks that were made zero since the last message.
    """

    verb: str
    moves: tuple[int, ...] = ()
    n_rows: int = 0
    n_columns: int = 0
    n_tokens: int = 0
    max_length: int = 0
    queries: tuple[int, ...] | None = None
    shared: tuple[tuple[int, int, int], ...] = ()
    begin: int = 0
    end: int = 0
    has_variants: bool = False
    cleared: tuple[int, ...] = ()


class Leader:
    """Makes the calls of rank 0's `Model` on all tensor-parallel ranks, within an order."""

    def __init__(self, model: PagedCalls, ranks: Any) -> None:
        self._model, self._ranks = model, ranks
        self.device, self.block_size, self.attend = model.device, model.block_size, model.attend
        self.max_tokens, self.max_logits_rows = model.max_tokens, model.max_logits_rows
        self._moves: list[Tensor] = []  # (3, K) int32: from block, to block, slots
        self._cleared: list[int] = []
        self._in_order = False
        self._failure: BaseException | None = None

    @contextmanager
    def order(self) -> Iterator[None]:
        """Has the other ranks follow from here to the end, which they are told however the order ends.

        Raises:
            RuntimeError: a call of the model has failed, even if whoever asked for it went on.
        """
        self._in_order = True
        try:
            yield
        finally:
            self._in_order = False
            if self._failure is None:  # else they are stuck in a collective, and hear nothing
                self._tell(Call(END))
        if self._failure is not None:
            raise RuntimeError(f"the model failed on tensor-parallel rank 0: {self._failure!r}") from self._failure

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._on_all(lambda: self._model.forward(batch), self._call_of(FORWARD, batch), *self._rows_of(batch))

    def hidden(self, batch: Batch) -> Tensor:
        return self._on_all(lambda: self._model.hidden(batch), self._call_of(HIDDEN, batch), *self._rows_of(batch))

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(len(hidden))
        return self._on_all(lambda: self._model.logits(hidden, rows), Call(LOGITS, begin=begin, end=end))

    def reindex(self, table: Tensor, ancestors: Tensor, position: Tensor) -> None:
        self._model.reindex(table, ancestors, position)
        # all that the other ranks have of a table are the blocks of their caches; tail blocks stay where they are
        moved = torch.nonzero(ancestors != torch.arange(len(ancestors), device=ancestors.device))[:, 0]
        parents = ancestors[moved]
        column = (position[parents] // self.block_size).long().clamp(max=table.shape[1] - 1)
        used = position[parents] % self.block_size
        copies = torch.stack([table[parents, column], table[moved, column], used])
        self._moves.append(copies[:, used > 0])

    def clear(self, blocks: Sequence[int]) -> None:
        self._model.clear(blocks)
        self._cleared += blocks

    @staticmethod
    def _call_of(verb: str, batch: Batch) -> Call:
        n_rows, n_columns = batch.table.shape
        return Call(
            verb, (), n_rows, n_columns, len(batch.tokens), batch.max_length, batch.queries, batch.shared,
            has_variants=batch.variants is not None,
        )  # fmt: skip

    @staticmethod
    def _rows_of(batch: Batch) -> tuple[Tensor, ...]:
        rows = batch.tokens, batch.positions, batch.slots, batch.lengths, batch.table
        return rows if batch.variants is None else (*rows, batch.variants)

    def _on_all(self, make: Callable[[], T], call: Call, *rows: Tensor) -> T:
        if not self._in_order:
            raise RuntimeError("the model was called outside an order: no other tensor-parallel rank follows")
        if self._failure is not None:
            raise RuntimeError(f"the model has failed: {self._failure!r}")
        self._tell(call, *rows)
        try:
            return make()
        except BaseException as error:
            self._failure = error
            raise

    def _tell(self, call: Call, *rows: Tensor) -> None:
        """Sends a call, its rows, and the moves before it."""
        parts = self._moves + list(rows)
        numbers = torch.cat([part.reshape(-1).int() for part in parts]).cpu() if parts else None
        call = call._replace(moves=tuple(part.shape[1] for part in self._moves), cleared=tuple(self._cleared))
        try:
            self._ranks.broadcast_object((call, numbers))
        except BaseException as error:
            self._failure = error
            raise
        self._moves, self._cleared = [], []


class Follower:
    """Stands in the place of a `ParticleRunner` on the other ranks: holds no group and no potential."""

    def __init__(self, model: Model, ranks: Any) -> None:
        self._model, self._ranks = model, ranks

    @property
    def own_model(self) -> Model:
        """Gives this rank's model, whose calls the other ranks must make too."""
        return self._model

    @property
    def interventions(self) -> Interventions:
        """Gives those of this rank's model."""
        return self._model.interventions

    def run(self, order: StepOrder) -> list[GroupResult]:
        """Does what rank 0's model does until its order is done. The results are rank 0's."""
        try:
            self._follow()
        except Exception:
            # Rank 0 is in a collective, or will be, and cannot be told. vLLM watches over its workers: when this one
            # ends, it ends the engine. Nothing less is sure to: an exit that shuts torch's collectives down may wait.
            logger.exception("tensor-parallel rank %d cannot follow rank 0: it ends", self._ranks.rank_in_group)
            os._exit(1)
        return []

    def drop(self, request_ids: list[str]) -> None:
        """Does nothing: there is no group here."""

    @torch.inference_mode()
    def _follow(self) -> None:
        hidden: Tensor | None = None
        while True:
            call, numbers = self._ranks.broadcast_object()
            sizes = [3 * n for n in call.moves]
            if call.n_rows:
                sizes += [call.n_tokens] * 3 + [call.n_rows, call.n_rows * call.n_columns]
                sizes += [call.n_tokens] * call.has_variants
            parts: list[Tensor] = list(numbers.to(self._model.device).split(sizes)) if sizes else []
            for copies in parts[: len(call.moves)]:
                self._copy(*copies.view(3, -1))
            self._model.clear(call.cleared)
            if call.verb == END:
                return
            if call.verb == LOGITS:
                assert hidden is not None  # rank 0 has it of a HIDDEN
                self._model.logits(hidden, slice(call.begin, call.end))
                continue
            tokens, positions, slots, lengths, table, *variants = parts[len(call.moves) :]
            batch = Batch(
                tokens.long(), positions.long(), slots.long(), table.view(call.n_rows, call.n_columns), lengths,
                call.max_length, call.queries, call.shared, variants=variants[0].long() if variants else None,
            )  # fmt: skip
            if call.verb == FORWARD:
                self._model.forward(batch)
            else:
                hidden = self._model.hidden(batch)

    def _copy(self, source: Tensor, target: Tensor, used: Tensor) -> None:
        """Copies the first `used` (K,) slots of blocks `source` to blocks `target`."""
        parents = torch.arange(len(source), device=source.device).repeat(2)
        self._model.reindex(torch.cat([source, target])[:, None].contiguous(), parents, used.repeat(2))


class ShareEngine(GroupEngine):
    """Is a potential's engine under tensor parallelism, where this process holds a share of the network."""

    @property
    def model(self) -> Any:
        raise RuntimeError(
            f"engine.model: at tensor_parallel_size={get_tp_group().world_size} this process holds a share of the "
            "network, and a call of it alone would wait for the other ranks for ever; use continuation_log_prob or "
            "State.hidden_rows, or load a model of your own (engine.model_name)"
        )

    @model.setter
    def model(self, share: Any) -> None:
        """Keeps nothing: a share is of no use to a potential."""


class LeadingRunner(ParticleRunner):
    """Runs the particles of rank 0, whose model's calls all ranks make."""

    engine_class = ShareEngine

    def __init__(self, model_runner: Any, ranks: Any) -> None:
        super().__init__(model_runner)
        self.model: Leader = Leader(self.model, ranks)

    def run(self, order: StepOrder) -> list[GroupResult]:
        with self.model.order():
            return super().run(order)


def make_runner(model_runner: Any) -> ParticleRunner | Follower:
    """Makes what this process, one of the tensor-parallel ranks, needs to run orders."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return ParticleRunner(model_runner)
    return LeadingRunner(model_runner, ranks) if ranks.rank_in_group == 0 else Follower(Model(model_runner), ranks)
