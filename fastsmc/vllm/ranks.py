"""Tensor parallelism: rank 0 decides, and the other ranks do what its model does.

    rank 0       LeadingRunner, over a Leader     groups, potentials, paging; tells each call of the model, and makes it
    the others   Follower                         none of these: makes each call that it is told, until the tick ends

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from fastsmc.group import GroupEngine
from fastsmc.ops import AttendPlan
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.lead import GroupResult, Tick
from fastsmc.vllm.model import Model, PagedCalls
from fastsmc.vllm.runner import ParticleRunner

logger = get_logger(__name__)

T = TypeVar("T")

#: what a message may ask for
FORWARD, HIDDEN, LOGITS, END = "forward", "hidden", "logits", "end"


class Call(NamedTuple):
    """Holds the numbers of a message; the block table of a FORWARD or HIDDEN is (n_rows, n_columns).

    Attributes:
        moves: (N, slots to copy) of each `reindex` since the last message.
        known_shared: of the plan by which the rows attend; None: with vLLM's attention.
        begin, end: of a LOGITS, rows of the last HIDDEN.
    """

    verb: str
    moves: tuple[tuple[int, int], ...] = ()
    n_rows: int = 0
    n_columns: int = 0
    position: int = 0
    n_query: int = 1
    known_shared: int | None = None
    begin: int = 0
    end: int = 0


class Leader:
    """Makes the calls of rank 0's `Model` on all tensor-parallel ranks, within a tick."""

    def __init__(self, model: PagedCalls, ranks: Any) -> None:
        self._model, self._ranks = model, ranks
        self.device, self.block_size, self.attend = model.device, model.block_size, model.attend
        self.max_tokens, self.max_logits_rows = model.max_tokens, model.max_logits_rows
        self._moves: list[tuple[Tensor, Tensor, int]] = []  # (tail column (N,), ancestors (N,), slots to copy)
        self._in_tick = False
        self._failure: BaseException | None = None

    @contextmanager
    def tick(self) -> Iterator[None]:
        """Has the other ranks follow from here to the end, which they are told however the tick ends.

        Raises:
            RuntimeError: a call of the model has failed, even if whoever asked for it went on.
        """
        self._in_tick = True
        try:
            yield
        finally:
            self._in_tick = False
            if self._failure is None:  # else they are stuck in a collective, and hear nothing
                self._tell(Call(END))
        if self._failure is not None:
            raise RuntimeError(f"the model failed on tensor-parallel rank 0: {self._failure!r}") from self._failure

    def forward(
        self, tokens: Tensor, position: int, table: Tensor, slots: Tensor, plan: AttendPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        call = self._call_of(FORWARD, position, table, 1, plan)
        return self._on_all(
            lambda: self._model.forward(tokens, position, table, slots, plan), call, tokens, slots, table
        )

    def hidden(
        self,
        tokens: Tensor,
        position: int,
        table: Tensor,
        slots: Tensor,
        n_query: int = 1,
        plan: AttendPlan | None = None,
    ) -> Tensor:
        call = self._call_of(HIDDEN, position, table, n_query, plan)
        return self._on_all(
            lambda: self._model.hidden(tokens, position, table, slots, n_query, plan), call, tokens, slots, table
        )

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        begin, end, _ = rows.indices(len(hidden))
        return self._on_all(lambda: self._model.logits(hidden, rows), Call(LOGITS, begin=begin, end=end))

    def reindex(self, table: Tensor, ancestors: Tensor, position: int) -> None:
        self._model.reindex(table, ancestors, position)
        column, n_used = divmod(position, self.block_size)
        if n_used:  # all that the other ranks have of a table are the blocks of their caches
            self._moves.append((table[:, column], ancestors, n_used))  # a tail column does not change while it is one

    @staticmethod
    def _call_of(verb: str, position: int, table: Tensor, n_query: int, plan: AttendPlan | None) -> Call:
        known_shared = None if plan is None else plan.known_shared
        n_rows, n_columns = table.shape
        return Call(verb, (), n_rows, n_columns, position, n_query, known_shared)

    def _on_all(self, make: Callable[[], T], call: Call, *rows: Tensor) -> T:
        if not self._in_tick:
            raise RuntimeError("the model was called outside a tick: no other tensor-parallel rank follows")
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
        parts = [part for tails, ancestors, _ in self._moves for part in (tails, ancestors)] + list(rows)
        numbers = torch.cat([part.reshape(-1).int() for part in parts]).cpu() if parts else None
        call = call._replace(moves=tuple((len(tails), n_used) for tails, _, n_used in self._moves))
        try:
            self._ranks.broadcast_object((call, numbers))
        except BaseException as error:
            self._failure = error
            raise
        self._moves = []


class Follower:
    """Stands in the place of a `ParticleRunner` on the other ranks: holds no group and no potential."""

    def __init__(self, model: Model, ranks: Any) -> None:
        self._model, self._ranks = model, ranks

    def run(self, tick: Tick) -> list[GroupResult]:
        """Does what rank 0's model does until its tick ends. The results are rank 0's."""
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
            sizes = [size for n, _ in call.moves for size in (n, n)]
            if call.n_rows:
                n_tokens = call.n_rows * call.n_query
                sizes += [n_tokens, n_tokens, call.n_rows * call.n_columns]
            parts: list[Tensor] = list(numbers.to(self._model.device).split(sizes)) if sizes else []
            for _, n_used in call.moves:
                tails, ancestors, *parts = parts
                self._model.reindex(tails[:, None], ancestors.long(), n_used)
            if call.verb == END:
                return
            if call.verb == LOGITS:
                assert hidden is not None  # rank 0 has it of a HIDDEN
                self._model.logits(hidden, slice(call.begin, call.end))
                continue
            tokens, slots, table = parts[0], parts[1].long(), parts[2].view(call.n_rows, call.n_columns)
            plan = None if call.known_shared is None else self._model.attend.plan(table, call.known_shared)
            if call.verb == FORWARD:
                self._model.forward(tokens, call.position, table, slots, plan)
            else:
                hidden = self._model.hidden(tokens, call.position, table, slots, call.n_query, plan)


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

    def run(self, tick: Tick) -> list[GroupResult]:
        with self.model.tick():
            return super().run(tick)


def make_runner(model_runner: Any) -> ParticleRunner | Follower:
    """Makes what this process, one of the tensor-parallel ranks, needs to run ticks."""
    ranks = get_tp_group()
    if ranks.world_size == 1:
        return ParticleRunner(model_runner)
    return LeadingRunner(model_runner, ranks) if ranks.rank_in_group == 0 else Follower(Model(model_runner), ranks)
