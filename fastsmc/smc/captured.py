"""The driver whose step has fixed shapes and no host in it: what one CUDA graph captures and replays.

    (open a column, every B steps) → forward → step → reindex

`Cohort` gives the model distinct histories only, and asks the device how many there are. Here particle i is row i of
the model, and everything that decides anything is a tensor: the step counter and the position (so that replays neither
repeat random numbers nor write to the same place), whether a group resamples, which particles have ended, the first
fault. The host knows only how many steps it has asked for; it reads nothing until it looks. For equal logits both give
the same particles, tokens and weights.

It costs more: N rows go through the model at every step, and a resampling moves block-table rows and tails at once.
Groups with exact samples are not for it: their ancestors are not in the in-place form that moves rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.p0 import P0
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential
from fastsmc.potentials.answers import NextRows
from fastsmc.potentials.base import stops
from fastsmc.smc import faults
from fastsmc.smc.asking import GroupState
from fastsmc.smc.engine import GroupEngine, SMCError
from fastsmc.smc.group import Setup
from fastsmc.smc.particles import Particles
from fastsmc.smc.record import make_population
from fastsmc.smc.step import Step


class PagedModel(Protocol):
    """Says what a captured step needs of a model with paged keys and values.

    Attributes:
        block_size: tokens per block, B.
        caches: tensors (blocks, ...) of keys and values.
        slot_dim: the dimension of the caches that indexes the B slots of a block; None if they have none.
    """

    block_size: int
    caches: Sequence[Tensor]
    slot_dim: int | None

    def forward(self, tokens: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor | None]:
        """Appends tokens (N,) int64 at `position`, a 0-dim int64 tensor, of block-table rows (N, C) int32.

        Returns logits (N, V) and last hidden states (N, H), or None for the latter. Fixed shapes, no synchronisation.
        """


def why_not_captured(params: SMCParams, potential: Potential | None) -> str | None:
    """Says why a group's steps need the host, as top_p, stop strings or a rejection proposal do; None: they do not."""
    if potential is not None and not potential.capturable:
        return f"potential={type(potential).__name__}: is not capturable (Potential.capturable)"
    if potential is not None and stops(potential):
        return f"potential={type(potential).__name__}: has `stop`, which ends particles on the host"
    if params.segmented:
        return "params: segments let particles wait, which is decided on the host"
    if params.islands > 1:
        return f"params.islands={params.islands}: groups whose islands migrate are not captured"
    if params.proposal == "rejection":
        return "params.proposal='rejection': asks for tokens on the host"
    if params.stop is not None:
        return f"params.stop={list(params.stop)}: stop strings end particles on the host"
    if P0(params, params.stop_token_ids or (0,), torch.device("cpu")).restricted:
        return f"params={params}: of p0's settings only the temperature is captured"
    return None


class CapturedGroup(Setup):
    """Holds one group of N particles on one device, and steps it.

    `State.tokens` is (N, max_tokens) here, −1 where nothing is drawn yet, and `State.step` a 0-dim tensor.

    Args:
        params: what to do.
        model: holds the prompt's keys and values in `prompt_blocks`.
        potential: with `capturable` set; None for plain ancestral sampling. It must have been set up. The group works
            on a copy (`potentials.copying`).
        prompt: token ids.
        prompt_blocks: ceil(P / B) block ids, which are only read, as others may share them.
        pool: (M,) int32 ids of blocks that are this group's own. N·(ceil((P + T)/B) − floor(P/B)) always suffice; with
            resampling far fewer do.
        stop_token_ids: tokens that end a particle.
        engine: what the potential was set up with.

    Attributes:
        t: steps asked for, as the host counts; once `look` has found the group over, those that counted.
        done, error: whether the group is over, and why it has failed, as far as the host has looked.

    Raises:
        ValueError: naming the argument.
        SMCError: the potential raised or gave no log weights; from `population`, when the model or the potential gave
            NaN or +inf, or the pool ran dry.
    """

    def __init__(
        self,
        params: SMCParams,
        model: PagedModel,
        potential: Potential | None,
        prompt: Sequence[int],
        prompt_blocks: Sequence[int],
        pool: Tensor,
        stop_token_ids: frozenset[int] | set[int] = frozenset(),
        engine: GroupEngine | None = None,
    ) -> None:
        device, n, block = model.caches[0].device, params.n_particles, model.block_size
        if len(prompt_blocks) != -(-len(prompt) // block) or not prompt:
            raise ValueError(f"prompt_blocks: {len(prompt_blocks)} for {len(prompt)} tokens in blocks of {block}")
        if pool.dtype != torch.int32 or pool.dim() != 1 or pool.device != device:
            raise ValueError(f"pool: must be a vector of int32 on {device}, got {pool.dtype} {tuple(pool.shape)}")
        if (why_not := why_not_captured(params, potential)) is not None:
            raise ValueError(why_not)
        super().__init__(params, potential, prompt, stop_token_ids, device, engine, copy_on_write=False)
        self.model, self.t, self.done = model, 0, False
        self.error: SMCError | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        steps = params.max_tokens
        particles = self.particles = Particles(n, device)
        self.step = Step(
            self.kind, [params], [sorted(self.stop_token_ids)], [self.weighed], particles, self
        )  # fmt: skip
        self._rows = self.step.layout.all
        self._position = torch.full((), len(prompt) - 1, dtype=torch.int64, device=device)
        self._fault = torch.zeros(4, dtype=torch.float64, device=device)  # kind, step, particle, value of the first
        self._ran = torch.zeros(steps, dtype=torch.bool, device=device)
        float64, shapes = torch.float64, {"tokens": torch.int64, "ancestors": torch.int32}
        self._record = {
            name: torch.zeros((steps, n), dtype=shapes.get(name, float64), device=device)
            for name in ("tokens", "token_log_probs", "step_log_w", "ancestors")
        }
        self._record["tokens"].fill_(-1)
        self._record["ancestors"] += self._rows.int()
        self._record["ess"] = torch.zeros(steps, dtype=float64, device=device)
        self._record["resampled"] = torch.zeros(steps, dtype=torch.bool, device=device)
        self._hidden: Tensor | None = None
        self._vocab = 0

        self._pool = pool
        self._n_block_ids = min(cache.shape[0] for cache in model.caches)
        self._prompt_row = torch.tensor([list(prompt_blocks)], dtype=torch.int32, device=device)
        self._n_shared_columns = len(prompt) // block
        self._table = torch.zeros((n, (len(prompt) + steps - 1) // block + 1), dtype=torch.int32, device=device)
        self._table[:, : self._n_shared_columns] = self._prompt_row[:, : self._n_shared_columns]
        self._start()

    def _start(self) -> None:
        """Weighs the empty sequences."""
        step, particles = self.step, self.particles
        particles.last_tokens.fill_(self.prompt[-1])
        if self.asker is not None:
            self.asker.call("reset", self.n, list(self.prompt))
            everyone = torch.ones_like(particles.finished)
            psi = step.checked(self.asker.scores("prefix", self._state(0)), everyone, faults.PREFIX)
            particles.log_psi.copy_(psi)
            particles.log_w.copy_(psi)
            self._keep_faults()
        step.going &= (particles.log_w > -math.inf).any()
        self._ran[0], self._record["step_log_w"][0] = True, particles.log_w  # stays so without any weight

    # -------------------------------------------------------------------------------------------------- driving it
    @torch.inference_mode()
    def run(self) -> Population:
        """Runs all steps. On a GPU the first two run one by one, which compiles what is to be compiled; then a step is
        captured as a graph, which is replayed for the rest of them."""
        while self.t < self.params.max_tokens:
            if self.t == 2 and self.device.type == "cuda":
                self.capture()
            self.advance()
        return self.population()

    @torch.inference_mode()
    def advance(self) -> None:
        """Takes one step, by the graph if there is one. Asks the device nothing."""
        if self.done or self.t == self.params.max_tokens:
            raise ValueError(f"advance: all {self.t} steps of max_tokens={self.params.max_tokens} are done")
        if self.t == 0:
            self._first()
        else:
            if self.must_open:
                self._open_column()
            if self._graph is None:
                self._next()
            else:
                self._graph.replay()
        self.t += 1

    @torch.inference_mode()
    def capture(self) -> None:
        """Records a step as a CUDA graph, without running it; at least two steps must have been run."""
        if self.device.type != "cuda" or self.t < 2:
            raise ValueError(f"capture: needs a CUDA device and two steps done, is on {self.device} after {self.t}")
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._next()
        self._graph = graph

    def _first(self) -> None:
        """Runs the prompt's last token once more, for the logits of every particle, in the first one's private block.

        The others get copies of what that block holds of the prompt then.
        """
        block, at = self.model.block_size, len(self.prompt) - 1
        last = self._position.clone()
        self._position += 1
        self._open_column()
        row, tails = self._prompt_row.clone(), self._table[:, self._n_shared_columns : self._n_shared_columns + 1]
        row[0, at // block] = tails[0, 0]
        self._copy_tail(torch.cat([self._prompt_row[:, at // block, None], tails[:1]]), at % block)
        logits, hidden = self.model.forward(self.particles.last_tokens[:1], last, row)
        self._copy_tail(tails.contiguous(), len(self.prompt) % block)
        self._take(logits, hidden, torch.ones_like(self.step.going))

    def _copy_tail(self, table: Tensor, n_used: int) -> None:
        """Copies the first `n_used` slots of the first block of `table` (K, 1) to the others."""
        if n_used:
            parents = torch.zeros(len(table), dtype=torch.int64, device=self.device)
            ops.reindex(
                table, parents, position=n_used, block_size=self.model.block_size, caches=self.model.caches,
                slot_dim=self.model.slot_dim,
            )  # fmt: skip

    def _next(self) -> None:
        logits, hidden = self.model.forward(self.particles.last_tokens.clamp(min=0), self._position, self._table)
        self._position += 1
        self.particles.rows.copy_(self._rows)
        self._take(logits, hidden, None)

    def _take(self, logits: Tensor, hidden: Tensor | None, first: Tensor | None) -> None:
        step, asker, kind = self.step, self.asker, self.kind
        step.faults.clear()
        self._hidden, self._vocab = hidden, logits.shape[1]
        self._ran.index_copy_(0, step.step, self._ran.index_select(0, step.step) | step.going)
        told: list[NextRows | None] = [None]
        if asker is not None and (kind.twisted or kind.guided or self.weighs_by_next):
            told = [asker.next_rows(self._state(0), self._vocab)]
            if told[0] is None and kind.twisted and first is not None:
                kind = self.kind = step.kind = dataclasses.replace(kind, twisted=False)
            elif told[0] is None:
                later = " after it had returned a tensor" * (first is None)
                raise asker.error("logw_next", "returned None" + later)
            step.clamp(told, [slice(None)])
        shaped = kind.twisted or kind.guided
        ended, change = step.draw(logits, told[0] if shaped else None, None if shaped else told[0], first, None)
        if kind.twisted:
            self._reindex()
        new_psi = self.particles.log_psi + change
        if asker is not None:
            scores = step.checked(asker.scores("complete", self._state(1)), ended, faults.COMPLETE, 1)
            new_psi = torch.where(ended, scores, new_psi)
            if not kind.twisted and not self.weighs_by_next:
                scores = step.checked(asker.scores("prefix", self._state(1)), step.active, faults.PREFIX, 1)
                new_psi = torch.where(step.active, scores, new_psi)
        self._keep_faults()
        step.faults.clear()
        step.close(new_psi)
        if not kind.twisted:
            self._reindex(later=1)

    def _reindex(self, later: int = 0) -> None:
        """Lets tables, tails and potential follow the resampling of `later` steps ago, and records its ancestors."""
        ancestors = self.step.ancestors
        ops.reindex(
            self._table, ancestors, position=self._position, block_size=self.model.block_size,
            caches=self.model.caches, slot_dim=self.model.slot_dim, genealogy=self._record["ancestors"],
            step=self.step.step[0] - later,
        )  # fmt: skip
        if self.asker is not None:
            self.asker.call("reindex", ancestors.clone())

    # ------------------------------------------------------------------------------------------- parts of a step
    def put(self, name: str, values: Tensor) -> None:
        """Sets a row of the record, where the group is still going; `reindex` writes that of the ancestors."""
        if name == "ancestors":
            return
        record, at = self._record[name], self.step.step
        row = (values if name in ("ess", "resampled") else values[None]).to(record.dtype)
        record.index_copy_(0, at, torch.where(self.step.going, row, record.index_select(0, at)))

    def _state(self, drawn: int) -> GroupState:
        """Makes what the potential sees; `drawn`: 1 after the draw of this step, else 0."""
        assert self.asker is not None  # else nobody looks
        self.asker.last_step = self.t + drawn
        hidden, step = self._hidden, self.step.step[0] + drawn
        return GroupState(
            self.asker, self.particles, slice(None), 0, step, lambda: self._trace("tokens"),
            lambda: self._trace("token_log_probs"), lambda: hidden,
        )  # fmt: skip

    def _trace(self, name: str) -> Tensor:
        """Traces tokens or their log-probs back: (N, T), −1 or 0 beyond the last. T gathers of N, if looked at."""
        rows, columns = self._rows, []
        for t in reversed(range(self.params.max_tokens)):
            if not self.kind.twisted:
                rows = self._record["ancestors"][t].long()[rows]
            columns.append(self._record[name][t][rows])
            if self.kind.twisted:
                rows = self._record["ancestors"][t].long()[rows]
        return torch.stack(columns[::-1], dim=1)

    def _keep_faults(self) -> None:
        """Keeps the first fault of all: its kind, step, particle and value."""
        for kind, bad, values, later in self.step.faults:
            i = bad.int().argmax()[None]
            value = torch.full_like(i, -1).double() if values is None else values.index_select(0, i).double()
            found = torch.cat([torch.full_like(value, kind), self.step.step.double() + later, i.double(), value])
            new = (self._fault[0] == 0) & bad.any() & self.step.going
            self._fault.copy_(torch.where(new, found, self._fault))

    # -------------------------------------------------------------------------------------------------- paging
    @property
    def must_open(self) -> bool:
        """Says whether the next step opens a column, which takes N free blocks of the pool."""
        opens = self.t == 0 or (self.t > 1 and (len(self.prompt) + self.t - 1) % self.model.block_size == 0)
        return opens and self.t < self.params.max_tokens

    def missing(self) -> int:
        """Counts the blocks that the pool lacks for the column that the next step opens. Waits for the device."""
        return max(0, self.n - int((~self._taken()).sum()))

    def grant(self, blocks: Sequence[int]) -> None:
        """Adds blocks to the pool. None leaves it, since the host does not know those that are free."""
        self._pool = torch.cat([self._pool, torch.tensor(blocks, dtype=torch.int32, device=self.device)])

    def _taken(self) -> Tensor:
        """Marks the blocks of the pool that an unfinished particle reads: (M,) bool.

        Marks have fixed shapes, so the host waits for nothing.
        """
        column = self._position // self.model.block_size
        past = torch.arange(self._table.shape[1], device=self.device) < column
        read = past[None, :] & ~self.particles.finished[:, None]
        read[:, : self._n_shared_columns] = False
        marked = torch.where(read, self._table.long(), self._n_block_ids).reshape(-1)
        live = torch.zeros(self._n_block_ids + 1, dtype=torch.bool, device=self.device)
        live.index_fill_(0, marked, True)
        return live[self._pool.long()]

    def _open_column(self) -> None:
        """Gives each particle a private block in the column of the next position: N free blocks of the pool."""
        taken = self._taken()
        free_first = torch.argsort(taken.to(torch.int8), stable=True)[: self.n]
        if len(free_first) < self.n:
            raise ValueError(f"pool: has {len(self._pool)} blocks, N = {self.n} particles need one each")
        self.step.faults.clear()
        self.step.check(taken[free_first], faults.POOL, torch.full_like(self._rows, len(self._pool)))
        self._keep_faults()
        column = (self._position // self.model.block_size)[None]
        self._table.index_copy_(1, column, self._pool[free_first][:, None])

    # ---------------------------------------------------------------------------------------------- the result
    @property
    def log_w(self) -> Tensor:
        """Gives (N,) float64 log weights since the last resampling."""
        return self.particles.log_w

    def look(self) -> None:
        """Learns whether the group is over and why it has failed, at one wait for the device."""
        told = torch.cat([self._fault, self.step.going.double(), self._ran.sum()[None].double()])
        kind, at, particle, value, going, ran = told.tolist()
        if kind:
            self.error = self.fault_error(int(kind), int(particle), int(at), value, self._vocab)
        if kind or not going or self.t == self.params.max_tokens:
            self.t, self.done = int(ran), True

    def population(self) -> Population:
        """Gives the weighted particles. Waits for the device.

        Raises:
            SMCError: for the first number that must not be.
        """
        self.look()
        if self.error is not None:
            raise self.error
        return make_population(
            {name: values[: self.t].cpu().numpy() for name, values in self._record.items()},
            self.particles.log_w,
            float(self.step.log_z),
            twisted=self.kind.twisted,
            retains=self.kind.retains,
            equal_by_law=not self.weighed and not self.params.force_stop,
            ended_by_resampling=False,
            stopped=self.particles.stopped,
            prompt=self.prompt,
            params=self.params,
        )
