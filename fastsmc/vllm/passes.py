"""A pass of the model: one ragged batch for the rows of all groups that take a step together.

`Pass` collects what cohorts want, runs it in one forward pass or in several chunks, and hands each cohort its rows of
the logits. A row's bits do not hang on what else is in the batch, as far as the kernels keep that: a batch has at least
two rows, and how a group attends is chosen by its own rows.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastsmc import ops
from fastsmc.maps import AtSite, Site
from fastsmc.p0 import P0, token_log_probs
from fastsmc.smc import Cohort, Group, Scores, Wants, arrange
from fastsmc.smc.cohort import Answers, Flow
from fastsmc.smc.paging import BlockTables, Paging, RaggedPaging
from fastsmc.smc.record import CommonTokens
from fastsmc.vllm.messages import GroupStart

if TYPE_CHECKING:
    from fastsmc.vllm.attention import Attend


class Batch(NamedTuple):
    """Holds R rows of a forward pass, of one or more queries each; Q queries in all.

    Attributes:
        tokens: (Q,) int64, row by row.
        positions: (Q,) int64.
        slots: (Q,) int64, where the keys and values go.
        table: (R, C) int32 block table; what lies beyond a row's length is ignored.
        lengths: (R,) int32 tokens of a row, its queries included.
        max_length: at least the longest of them.
        queries: of each row; None: one each.
        shared: rows that attend by `ops.attend`, as (begin, end, columns on which they are known to agree) of each
            group; the others attend as vLLM does.
        plan: of `ops.attend` for all rows, if it is made already.
        adapters: of each row, vLLM's LoRARequest or None; None: no row has any.
        variants: (Q,) int64, what interventions do to a query (`Interventions.under`), −1 for nothing; None: no query
            has any.
        sites: what stands at the model's places, which variants say how to use; None: the worker's interventions.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    table: Tensor
    lengths: Tensor
    max_length: int
    queries: tuple[int, ...] | None = None
    shared: tuple[tuple[int, int, int], ...] = ()
    plan: ops.AttendPlan | None = None
    adapters: tuple[Any, ...] | None = None
    variants: Tensor | None = None
    sites: Mapping[Site, AtSite] | None = None

    def part(self, begin: int, end: int) -> Batch:
        """Takes rows [begin, end). A single row stands twice: kernels compute one row otherwise than several.

        Both attend alike, since both write the row's keys and values.
        """
        n_rows = len(self.lengths)
        if begin == 0 and end == n_rows > 1:
            return self
        bounds, device = [0, *itertools.accumulate(self.queries or [1] * n_rows)], self.table.device
        row = torch.arange(begin, end, device=device)
        query = torch.arange(bounds[begin], bounds[end], device=device)
        queries = None if self.queries is None else self.queries[begin:end]
        shared = tuple(
            (max(a, begin) - begin, min(b, end) - begin, known) for a, b, known in self.shared if a < end and b > begin
        )
        if end - begin == 1:
            row, query, queries = row.repeat(2), query.repeat(2), None if queries is None else queries * 2
            shared = tuple((0, 2, known) for _, _, known in shared)
        return self._take(row, query, queries, shared)

    def reordered(self, order: Tensor) -> Batch:
        """Puts rows of one query each into another order, `order` (R,) int64, in which groups keep their places."""
        return self._take(order, order, None, self.shared)

    def _take(
        self, row: Tensor, query: Tensor, queries: tuple[int, ...] | None, shared: tuple[tuple[int, int, int], ...]
    ) -> Batch:
        return Batch(
            self.tokens[query],
            self.positions[query],
            self.slots[query],
            self.table[row],
            self.lengths[row],
            self.max_length,
            queries,
            shared,
            adapters=None if self.adapters is None else tuple(self.adapters[r] for r in row.tolist()),
            variants=None if self.variants is None else self.variants[query],
            sites=self.sites,
        )


@dataclasses.dataclass
class Ride:
    """Is a batch whose rows ride in the forward pass of an ordinary step, and what comes of it.

    Attributes:
        metadata: for attention, by layer.
        timed: whether `seconds` is wanted, for which a GPU has to be waited for.
        hidden: (R, H) last hidden states, once the pass has run.
        logits: (R, V), where they came with those of the ordinary step.
        seconds: the rows' share of what it took.
    """

    batch: Batch
    metadata: dict[str, Any]
    timed: bool
    hidden: Tensor | None = None
    logits: Tensor | None = None
    seconds: float = 0.0


class PagedCalls(Protocol):
    """Says what a pass calls: a `Model`, or what makes a model's calls on all tensor-parallel ranks.

    Attributes:
        max_tokens: queries of a forward pass.
        max_logits_rows: rows whose logits are there at once while continuations are scored.
    """

    device: torch.device
    block_size: int
    attend: Attend
    max_tokens: int
    max_logits_rows: int

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]: ...

    def hidden(self, batch: Batch) -> Tensor: ...

    def logits(self, hidden: Tensor, rows: slice) -> Tensor: ...

    def reindex(self, table: Tensor, ancestors: Tensor, position: Tensor) -> None: ...

    def clear(self, blocks: Sequence[int]) -> None: ...


class Member(NamedTuple):
    """Is a group in a worker.

    Attributes:
        first_row: of its rows in the worker's block tables.
        common: finds its tokens that are final, where these are asked for.
        variants: (P,) int64, what its interventions do at each position (`Interventions.of_positions`); None: it has
            none.
        companions: the groups that follow its text, if it has one (`Group.companions`).
    """

    group: Group
    paging: Paging
    first_row: int
    start: GroupStart
    common: CommonTokens | None = None
    variants: Tensor | None = None
    companions: tuple[Member, ...] = ()

    @property
    def parts(self) -> tuple[Member, ...]:
        """Lists the groups that a request stands for, in the order in which they take a step."""
        return (*self.companions, self)

    @property
    def done(self) -> bool:
        return all(part.group.done for part in self.parts)

    def grant(self, blocks: list[int]) -> None:
        """Adds blocks of the engine: to each part what it needs, the rest to the particles."""
        at = 0
        for part in self.companions:
            need = 0 if part.group.done else part.paging.need()
            part.paging.grant(blocks[at : at + need])
            at += need
        self.paging.grant(blocks[at:])


class Waiting(NamedTuple):
    """Is a group in the middle of its step, which goes on when what its potential needs for its answers is there."""

    group: Group
    flow: Flow
    future: Future

    def drop(self) -> None:
        """Gives the step up."""
        self.future.cancel()
        self.flow.close()


class Stretch(NamedTuple):
    """Is a row whose tokens are known, of which those from `begin` on are to go through the model.

    Attributes:
        tokens: all P of the row, those before `begin` included, whose keys and values are there.
        blocks: its block table.
        variants: (P,) int64, as of a `Batch`; None: of no row.
        adapter: vLLM's LoRARequest or None.
    """

    tokens: Sequence[int]
    begin: int
    blocks: Sequence[int]
    variants: Tensor | None = None
    adapter: Any = None


def lay_rows(
    model: PagedCalls, tokens: Sequence[Sequence[int]], begins: Sequence[int], blocks: Sequence[Sequence[int]],
    **more: Any,
) -> Batch:  # fmt: skip
    """Lays rows of several queries into a batch, by the lists of a host.

    Args:
        tokens: that each row appends.
        begins: tokens that each row has before them.
        blocks: of each row.
        more: other fields of `Batch`.
    """
    size, device = model.block_size, model.device
    queries = tuple(map(len, tokens))
    ends = [begin + n for begin, n in zip(begins, queries, strict=True)]
    columns = max(map(len, blocks))
    table = torch.tensor([[*row, *[0] * (columns - len(row))] for row in blocks], dtype=torch.int32, device=device)
    at = torch.cat([torch.arange(end - n, end, device=device) for end, n in zip(ends, queries, strict=True)])
    row_of = torch.arange(len(blocks), device=device).repeat_interleave(torch.tensor(queries, device=device))
    return Batch(
        torch.tensor([token for row in tokens for token in row], device=device),
        at,
        table[row_of, at // size].long() * size + at % size,
        table,
        torch.tensor(ends, dtype=torch.int32, device=device),
        max(ends),
        queries,
        **more,
    )


def run_stretches(
    model: PagedCalls, stretches: Sequence[Stretch], sites: Mapping[Site, AtSite] | None = None
) -> Tensor:
    """Runs rows in as few passes as the model's limit allows.

    Args:
        sites: as of a `Batch`.

    Returns:
        (R, H) hidden states of their last tokens.
    """
    left, ended = list(stretches), []
    while left:
        taken: list[tuple[Stretch, int]] = []
        room = model.max_tokens
        for row in left:
            if room > 0:
                taken.append((row, min(room, len(row.tokens) - row.begin)))
                room -= taken[-1][1]
        queries = tuple(n for _, n in taken)
        ends = [row.begin + n for row, n in taken]
        adapters = tuple(row.adapter for row, _ in taken)
        variants = [
            row.variants[row.begin : end] for (row, _), end in zip(taken, ends, strict=True) if row.variants is not None
        ]
        hidden = model.hidden(
            lay_rows(
                model,
                [row.tokens[row.begin : end] for (row, _), end in zip(taken, ends, strict=True)],
                [row.begin for row, _ in taken],
                [row.blocks for row, _ in taken],
                adapters=adapters if any(adapter is not None for adapter in adapters) else None,
                variants=torch.cat(variants) if variants else None,
                sites=sites,
            )
        )
        last = [
            i - 1
            for i, end, (row, _) in zip(itertools.accumulate(queries), ends, taken, strict=True)
            if end == len(row.tokens)
        ]
        ended.append(hidden[last])
        begun = [row._replace(begin=end) for (row, _), end in zip(taken, ends, strict=True)]
        left = [row for row in begun if row.begin < len(row.tokens)] + left[len(taken) :]
    return torch.cat(ended)


class Pass:
    """Is one particle step of some groups, from what they want to what becomes of it.

    Args:
        members: groups that are not done; all columns are open that their next position needs.

    Attributes:
        groups: of the pass.
        n_rows, n_run: rows of the model that it needs, and how many of them have run.
        seconds: what the model took for them.
        waiting: groups whose step has not come to its end yet.
    """

    def __init__(self, model: PagedCalls, tables: BlockTables, members: Sequence[Member]) -> None:
        self._model, self._tables = model, tables
        self._members = {member.group: member for member in members}
        self.groups = list(self._members)
        self._cohorts = arrange(self.groups)
        self._wants = [cohort.wants() for cohort in self._cohorts]
        self._move(zip(self._cohorts, self._wants, strict=True))
        self._rows = torch.cat([self._rows_of(c)[w.slots] for c, w in zip(self._cohorts, self._wants, strict=True)])
        self.n_rows, self.n_run, self.seconds = len(self._rows), 0, 0.0
        self._next = 0  # where the chunk ends that is with the model
        self._plan: ops.AttendPlan | None = None  # of all rows, if some attend by it
        self._spans: dict[Group, tuple[int, int]] = {}  # rows [begin, end) of each group
        self._batch = self._make_batch()
        self._order: Tensor | None = None  # (R,) int64, rows in the order of the batch, once the pass is cut
        self._ends: Sequence[int] = ()  # where a part may end, ascending, once the pass is cut
        self._found: tuple[Tensor, ...] = ()  # logits (R, V) and hidden states (R, H), as far as they are there

    def _rows_of(self, cohort: Cohort) -> Tensor:
        """Lists the rows of the block tables that a cohort's slots are, (M,) int64."""
        device, firsts = self._tables.table.device, [self._members[group].first_row for group in cohort.groups]
        return torch.cat([torch.arange(f, f + g.n, device=device) for f, g in zip(firsts, cohort.groups, strict=True)])

    def _move(self, wants: Iterable[tuple[Cohort, Wants]]) -> None:
        """Makes the copies of slots that cohorts want, all at once."""
        ancestors: Tensor | None = None
        for cohort, want in wants:
            if want.moves is not None:
                if ancestors is None:
                    ancestors = torch.arange(len(self._tables.position), device=self._tables.table.device)
                rows = self._rows_of(cohort)
                ancestors[rows] = rows[want.moves]
                for g, group in enumerate(cohort.groups):
                    paging, part = self._members[group].paging, cohort.layout.part(g)
                    if isinstance(paging, RaggedPaging):
                        paging.follow(want.moves[part] - part.start)
        if ancestors is not None:
            self._model.reindex(self._tables.table, ancestors, self._tables.position)
            self._tables.position.copy_(self._tables.position[ancestors])

    # ------------------------------------------------------------------------------------------------------- the model
    def _make_batch(self) -> Batch:
        size, tables = self._model.block_size, self._tables
        members = [self._members[group] for want in self._wants for group in want.groups]
        counts = [n - m for want in self._wants for m, n in itertools.pairwise(want.bounds)]
        bounds = [0, *itertools.accumulate(counts)]
        self._spans = dict(zip((m.group for m in members), itertools.pairwise(bounds), strict=True))
        first = {begin: m for m, begin in zip(members, bounds, strict=False) if m.group.t == 0}
        scratch = {row: self._open_first(member) for row, member in first.items()}
        positions = tables.position[self._rows].long()
        columns = max(member.paging.position for member in members) // size + 1
        table = tables.table[:, :columns][self._rows]
        for row, block in scratch.items():
            table[row, (len(first[row].start.prompt) - 1) // size] = block
        tokens = torch.cat([want.tokens for want in self._wants])
        slots = table.gather(1, positions[:, None] // size)[:, 0].long() * size + positions % size
        longest = max(member.paging.position for member in members) + 1
        counted = [(member.group, n) for member, n in zip(members, counts, strict=True)]
        adapters, variants = self._adapters_of(counted), self._variants_of(counted, positions)
        batch = Batch(
            tokens, positions, slots, table, (positions + 1).int(), longest, adapters=adapters, variants=variants
        )
        return self._choose_attention(batch, members, bounds)

    def _adapters_of(self, counts: Sequence[tuple[Group, int]]) -> tuple[Any, ...] | None:
        """Lists the adapters of rows, so many of each group; None: they have none."""
        rows = [(self._members[group].start.adapter, n) for group, n in counts]
        if all(adapter is None for adapter, _ in rows):
            return None
        return tuple(adapter for adapter, n in rows for _ in range(n))

    def _variants_of(self, counts: Sequence[tuple[Group, int]], positions: Tensor) -> Tensor | None:
        """Finds what interventions do to queries at `positions` (Q,), so many of each group; None: there are none."""
        tables = [(self._members[group].variants, n) for group, n in counts]
        if all(table is None for table, _ in tables):
            return None
        parts = positions.split([n for _, n in tables])
        return torch.cat(
            [
                torch.full_like(part, -1) if table is None else table[part]
                for (table, _), part in zip(tables, parts, strict=True)
            ]
        )

    def _open_first(self, member: Member) -> Tensor:
        """Makes the block, a 0-dim tensor, in which a group's prompt has its last token once more.

        The first step runs that token, for its logits, in the first slot's own tail, because the prompt's blocks may be
        shared with others.
        """
        position, size, tables = len(member.start.prompt) - 1, self._model.block_size, self._tables
        column, n_used = divmod(position, size)
        tail = tables.table[member.first_row, member.paging.tail]
        if n_used:
            source = torch.tensor([member.start.prompt_blocks[column]], dtype=torch.int32, device=tail.device)
            both, parents = (
                torch.cat([source, tail[None]])[:, None],
                torch.zeros(2, dtype=torch.int64, device=tail.device),
            )
            self._model.reindex(both, parents, torch.full((2,), n_used, dtype=torch.int32, device=tail.device))
        tables.position[member.first_row] = position
        return tail

    def _choose_attention(self, batch: Batch, members: Sequence[Member], bounds: list[int]) -> Batch:
        """Lets groups use `ops.attend` where it is the faster for their own rows."""
        attend = self._model.attend
        may_pay = [
            attend.why_not is None and m.group.t > 0 and attend.may_pay(end - begin, m.paging.position + 1)
            for m, (begin, end) in zip(members, itertools.pairwise(bounds), strict=True)
        ]
        if not any(may_pay):
            return batch
        known = [m.paging.n_prompt_columns * (m.group.t > 0) for m in members]
        plan = attend.plan(batch.table, known, batch.lengths, bounds)
        shared = tuple(
            (bounds[g], bounds[g + 1], known[g])
            for g, m in enumerate(members)
            if may_pay[g] and attend.pays(plan, m.paging.position + 1, group=g)
        )
        self._plan = plan if shared else None
        return batch._replace(shared=shared, plan=plan if len(shared) == len(members) else None)

    def run(self, max_rows: int | None = None) -> int:
        """Runs rows that have not run yet, at most so many, and returns how many they were."""
        begin, end = self.n_run, self._whole(self._cut(max_rows))
        start = time.perf_counter()
        while self.n_run < end:
            self.put(*self._model.forward(self._batch_to(self._whole(min(end, self.n_run + self._model.max_tokens)))))
        if max_rows is not None and self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)  # else only launches would be timed
        self.seconds += time.perf_counter() - start
        return end - begin

    def next_batch(self, max_rows: int | None) -> Batch:
        """Returns rows that have not run yet, at most so many; who runs them hands `put` what comes of them."""
        return self._batch_to(self._whole(self._cut(max_rows)))

    def _cut(self, max_rows: int | None) -> int:
        """Says where a part of at most so many rows ends, in as few parts as there must be, of equal size.

        A part takes a time of its own besides that of its rows: a small last one would cost more than it spares.
        """
        left = self.n_rows - self.n_run
        if max_rows is None or left <= max_rows:
            return self.n_rows
        return self.n_run + math.ceil(left / math.ceil(left / max_rows))

    def _whole(self, end: int) -> int:
        """Says where a part that is to end at `end` ends, so that it parts no rows that are `_tied`.

        That is before them, or behind them if they are its first rows, three at most.
        """
        if end == self.n_rows:
            return end
        if self._order is None:
            self._order, self._ends = self._order_to_cut(), range(self.n_rows + 1)
            shared = self._batch.shared
            if tied := self._tied():
                shared = self._tie(tied, self._order.argsort().tolist())
            self._batch = self._batch.reordered(self._order)._replace(shared=shared)
        before, behind = bisect.bisect_right(self._ends, end) - 1, bisect.bisect_left(self._ends, end)
        return self._ends[before] if self._ends[before] > self.n_run else self._ends[behind]

    def _batch_to(self, end: int) -> Batch:
        self._next = end
        return self._batch.part(self.n_run, end)

    def _order_to_cut(self) -> Tensor:
        """Lists the rows, (R,) int64, so that those of a group that read the same blocks are neighbours.

        Rows of one parent then are in one part of the pass, or in two, and not in all of them.
        """
        if self._plan is None:
            return torch.arange(self.n_rows, device=self._rows.device)
        order, offsets = self._plan.order, self._plan.offsets
        assert offsets is not None  # `_choose_attention` plans by group
        groups = torch.bucketize(order, offsets[1:], right=True)  # some of which may read the same prompt
        return order[groups.argsort(stable=True)].long()

    def _tied(self) -> list[list[int]]:
        """Lists rows that must be in one part of the pass: those that follow a text, and that of its counterfactuals as
        long as there is one. Where nothing is changed they are equal, which kernels of other sizes do not promise.
        """
        tied = []
        for member in self._members.values():
            spans = [self._spans[part.group] for part in member.parts if part.group in self._spans]
            tied.append([begin for begin, end in spans if end - begin == 1])
        return [rows for rows in tied if len(rows) > 1]

    def _tie(self, tied: list[list[int]], places: list[int]) -> tuple[tuple[int, int, int], ...]:
        """Makes rows neighbours that are tied, and lets no part end between them.

        Args:
            places: where each row stands in the order so far.

        Returns:
            `shared` of the batch in the new order.
        """
        for rows in tied:
            for row in rows:
                places[row] = places[rows[0]]
        order = sorted(range(self.n_rows), key=places.__getitem__)
        after = {b: a for rows in tied for a, b in itertools.pairwise(rows)}
        whole = [after.get(b) != a for a, b in itertools.pairwise(order)]
        self._order = torch.tensor(order, device=self._rows.device)
        self._ends = [0, *(end for end, is_whole in enumerate(whole, 1) if is_whole), self.n_rows]
        place = {row: i for i, row in enumerate(order)}
        spans = [(min(place[row] for row in range(a, b)), b - a, known) for a, b, known in self._batch.shared]
        return tuple((begin, begin + n, known) for begin, n, known in sorted(spans))

    def put(self, logits: Tensor, hidden: Tensor) -> int:
        """Takes the logits and hidden states of the last `next_batch`, and returns how many rows it had."""
        ran, found = self._next - self.n_run, (logits, hidden)  # a row that stands twice is taken once
        if self._order is None:
            self._found = tuple(x[:ran] for x in found)
        else:
            if self.n_run == 0:
                self._found = tuple(x.new_empty_strided((self.n_rows, x.shape[1]), x.stride()) for x in found)
            rows = self._order[self.n_run : self._next]
            for whole, part in zip(self._found, found, strict=True):
                whole[rows] = part[:ran]
        self.n_run = self._next
        return ran

    # -------------------------------------------------------------------------------------------------------- the step
    def take(self) -> None:
        """Lets the groups take their step, once all rows have run."""
        (logits, hidden), self._found = self._found, ()  # a step that waits for answers keeps this pass
        self._tables.position[self._rows] += 1
        for member in self._members.values():
            member.paging.position += member.group.t > 0
        flows: list[tuple[Cohort, Flow]] = []
        self.waiting: list[Waiting] = []
        at = 0
        for cohort, want in zip(self._cohorts, self._wants, strict=True):
            rows = slice(at, at + want.bounds[-1])
            at = rows.stop
            cohort.scorer = self._score_one
            flows.append((cohort, cohort.take(logits[rows], hidden[rows])))
        self._finish(flows)

    def go_on(self, waiting: Waiting) -> None:
        """Takes the step of a group on whose potential can answer now; it may come to wait again."""
        self.waiting = []
        self._finish([(waiting.group.cohort, waiting.flow)])

    def _finish(self, flows: list[tuple[Cohort, Flow]]) -> None:
        """Takes steps to their end, or to where they wait for answers; continuations that several of them want scored
        go through the model together."""
        answers: list[Tensor | None] = [None] * len(flows)
        while flows:
            going: list[tuple[Cohort, Flow, Scores]] = []
            for (cohort, flow), answer in zip(flows, answers, strict=True):
                with contextlib.suppress(StopIteration):
                    wanted = next(flow) if answer is None else flow.send(answer)
                    if isinstance(wanted, Answers):
                        self.waiting.append(Waiting(cohort.groups[0], flow, wanted.future))
                    else:
                        going.append((cohort, flow, wanted))
            flows = [(cohort, flow) for cohort, flow, _ in going]
            answers = list(self._score([scores for _, _, scores in going])) if going else []

    def _score_one(self, scores: Scores) -> Tensor:
        return self._score([scores])[0]

    def _score(self, wanted: Sequence[Scores]) -> list[Tensor]:
        """Computes log p0 of continuations, (R,) float64 each, in as few passes as the model's limits allow."""
        device, size = self._model.device, self._model.block_size
        cohorts = [scores.wants.groups[0].cohort for scores in wanted]
        self._move(zip(cohorts, (scores.wants for scores in wanted), strict=True))
        groups = [group for scores in wanted for group in scores.wants.groups]
        ids = [ids for scores in wanted for ids in scores.continuations]
        counts = [n - m for scores in wanted for m, n in itertools.pairwise(scores.wants.bounds)]
        queries = [len(ids[g]) for g, count in enumerate(counts) for _ in range(count)]
        targets = pad_sequence([torch.tensor(x, dtype=torch.int64) for x in ids], batch_first=True).to(device)
        # for each row, its group and its place in the tables; for each query, its row and how many are before it there
        group_of = torch.arange(len(groups), device=device).repeat_interleave(torch.tensor(counts, device=device))
        rows = torch.cat([self._rows_of(c)[w.wants.slots] for c, w in zip(cohorts, wanted, strict=True)])
        n_queries = torch.tensor(queries, device=device)
        row_of = torch.arange(len(queries), device=device).repeat_interleave(n_queries, output_size=sum(queries))
        before = torch.arange(len(row_of), device=device) - (n_queries.cumsum(0) - n_queries)[row_of]
        last = torch.cat([scores.wants.tokens for scores in wanted])
        tokens = torch.where(before == 0, last[row_of], targets[group_of[row_of], before - 1])
        positions = self._tables.position[rows].long()
        lengths, at, table = (positions + n_queries).int(), positions[row_of] + before, self._tables.table[rows]
        slots = table[row_of, at // size].long() * size + at % size
        longest = max(member.paging.position for member in self._members.values()) + max(queries)
        adapters = self._adapters_of(list(zip(groups, counts, strict=True)))
        counted = [count * len(tokens) for count, tokens in zip(counts, ids, strict=True)]
        variants = self._variants_of(list(zip(groups, counted, strict=True)), at)
        batch = Batch(tokens, at, slots, table, lengths, longest, tuple(queries), adapters=adapters, variants=variants)
        query_group = group_of[row_of]
        prompts = torch.tensor([len(group.prompt) for group in groups], device=device)
        scored = score_queries(
            self._model, batch, targets[query_group, before], [group.p0 for group in groups],
            [0, *itertools.accumulate(counted)], at + 1 - prompts[query_group],
        )  # fmt: skip
        if any(scores.given for scores in wanted):
            given = torch.tensor([scores.given for scores in wanted for _ in scores.wants.groups], device=device)
            scored = torch.where(before >= given[query_group], scored, 0.0)
        by_row = torch.zeros(len(queries), dtype=torch.float64, device=device).index_add_(0, row_of, scored)
        return list(by_row.split([scores.wants.bounds[-1] for scores in wanted]))


def score_queries(
    model: PagedCalls, batch: Batch, targets: Tensor, p0s: list[P0], of_group: list[int], before: Tensor
) -> Tensor:
    """Computes log p0 of the token that follows each query of a batch, (Q,) float64; empty where there are no logits,
    as on tensor-parallel ranks but the first.

    Args:
        of_group: queries [of_group[g], of_group[g + 1]) have p0s[g].
        before: (Q,) int64, tokens that were generated before the one that follows.
    """
    queries, scores = batch.queries or (), [torch.zeros(0, dtype=torch.float64, device=model.device)]
    bounds, begin = [0, *itertools.accumulate(queries)], 0
    while begin < len(queries):
        end = begin + 1
        while end < len(queries) and bounds[end + 1] - bounds[begin] <= model.max_tokens:
            end += 1
        hidden = model.hidden(batch.part(begin, end))
        for low in range(bounds[begin], bounds[end], model.max_logits_rows):
            high = min(low + model.max_logits_rows, bounds[end])
            logits: Tensor | None = model.logits(hidden, slice(low - bounds[begin], high - bounds[begin]))
            if logits is not None:
                within = [min(max(bound, low), high) - low for bound in of_group]
                scores.append(token_log_probs(logits, targets[low:high], p0s, within, before[low:high]))
        begin = end
    return torch.cat(scores)
