"""A group whose step has fixed shapes and no host in it: what one CUDA graph captures and replays.

    (open a column, every B steps) → forward → weigh → resample → reindex → draw

`Group` gives the model distinct histories only, and asks the device how many there are. Here particle i is row i of the
model, and everything that decides anything is a tensor: the step counter and the position (so that replays neither
repeat random numbers nor write to the same place), whether a group resamples, which particles have ended, the first
fault. The host knows only how many steps it has asked for; it reads nothing until the end. For equal logits both give
the same particles, tokens and weights.

It costs more: N rows go through the model at every step, and a resampling moves block-table rows and tails at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.group import DRAW, RESAMPLE, SMCError
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential, State, answered
from fastsmc.potentials.answers import NextRows, check_next, check_scores
from fastsmc.potentials.copying import own_copy

# what `fault` may hold first: who gave a number that it must not
_FAULTS = {1: "the model's logits", 2: "logw_next", 3: "prefix", 4: "complete", 5: "the block pool"}
_MODEL, _NEXT, _PREFIX, _COMPLETE, _POOL = _FAULTS


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


class _State(State):
    """A `State` of fixed shape: `tokens` is (N, max_tokens), −1 where nothing is drawn yet, and `step` a tensor.

    It shares no memory with the group, so it may be written to. `tokens` are made when they are looked at: a property,
    where `State` has an attribute.
    """

    step: Any  # a 0-dim int64 tensor, where other groups have an int

    def __init__(self, group: CapturedGroup, n_drawn: Tensor) -> None:
        self._group = group
        self.lengths, self.finished = group.lengths.clone(), group.finished.clone()
        self.hidden = None if group.hidden is None else group.hidden.clone()
        self.step = n_drawn.clone()
        self.last_tokens = group.last_tokens.clone()
        self.prompt, self.max_tokens = list(group.prompt), group.params.max_tokens
        self.stop_token_ids = group.stop_token_ids

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # see above
        return self._group._lineages()


class CapturedGroup:
    """Holds one group of N particles on one device, and steps it.

    Args:
        params: what to do.
        model: holds the prompt's keys and values in `prompt_blocks`, but for those of the prompt's last token.
        potential: with `capturable` set; None for plain ancestral sampling. It must have been set up. The group works
            on a copy (`potentials.copying`).
        prompt: token ids.
        prompt_blocks: ceil(P / B) block ids. Read, and only the last token's slot of the last block is written.
        pool: (M,) int32 ids of blocks that are this group's own. N·(ceil((P + T)/B) − floor(P/B)) always suffice; with
            resampling far fewer do.
        stop_token_ids: tokens that end a particle.

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
    ) -> None:
        device, n, block = model.caches[0].device, params.n_particles, model.block_size
        if len(prompt_blocks) != -(-len(prompt) // block) or not prompt:
            raise ValueError(f"prompt_blocks: {len(prompt_blocks)} for {len(prompt)} tokens in blocks of {block}")
        if pool.dtype != torch.int32 or pool.dim() != 1 or pool.device != device:
            raise ValueError(f"pool: must be a vector of int32 on {device}, got {pool.dtype} {tuple(pool.shape)}")
        if potential is not None and (not potential.capturable or potential.proposal_only):
            what = "proposal-only" if potential.capturable else "not capturable (Potential.capturable)"
            raise ValueError(f"potential={type(potential).__name__}: is {what}")
        methods = answered(potential) if potential is not None else set()
        self.potential = None if potential is None else own_copy(potential, on_write=False)
        self._twisted = params.proposal == "twisted" and "logw_next" in methods
        self._weighs_by_next = not self._twisted and "logw_next" in methods and "prefix" not in methods
        self.params, self.model, self.prompt = params, model, list(prompt)
        self.stop_token_ids = frozenset(stop_token_ids)
        self.device, self.n, steps = device, n, params.max_tokens
        self.t = 0  # steps asked for, as the host counts
        self._graph: torch.cuda.CUDAGraph | None = None

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self._stop = torch.tensor(sorted(self.stop_token_ids), dtype=torch.int64, device=device)
        self._rows = torch.arange(n, device=device)
        self._step, self._position = zeros(dtype=torch.int64), zeros(dtype=torch.int64).fill_(len(prompt) - 1)
        self.log_w, self.log_psi, self.log_z = zeros(n), zeros(n), zeros()
        self.lengths, self.finished = zeros(n, dtype=torch.int64), zeros(n, dtype=torch.bool)
        self.last_tokens = zeros(n, dtype=torch.int64).fill_(prompt[-1])
        self._rank, self._count = zeros(n, dtype=torch.int64), zeros(n, dtype=torch.int64)  # among the siblings
        self.hidden: Tensor | None = None
        self._going = zeros(dtype=torch.bool).fill_(True)
        self._fault = zeros(3, dtype=torch.int64)  # kind, step, particle of the first
        # the record; ancestors of one step more, since with the base proposal they are known a step early
        self._tokens = zeros(steps, n, dtype=torch.int64).fill_(-1)
        self._token_log_probs, self._step_log_w, self._ess = zeros(steps, n), zeros(steps, n), zeros(steps)
        self._ancestors = torch.arange(n, dtype=torch.int32, device=device).repeat(steps + 1, 1)
        self._resampled, self._ran = zeros(steps + 1, dtype=torch.bool), zeros(steps, dtype=torch.bool)

        self._pool = pool
        self._n_block_ids = min(cache.shape[0] for cache in model.caches)
        self._prompt_row = torch.tensor([list(prompt_blocks)], dtype=torch.int32, device=device)
        self._n_shared_columns = len(prompt) // block
        self._table = zeros(n, (len(prompt) + steps - 1) // block + 1, dtype=torch.int32)
        self._table[:, : self._n_shared_columns] = self._prompt_row[:, : self._n_shared_columns]
        if self.potential is not None:
            self._call("reset", 0, n, list(prompt))
            psi = self._ask("prefix", 0, ~self.finished, _PREFIX)
            self.log_psi.copy_(psi)
            self.log_w.copy_(psi)
        self._going &= (self.log_w > -math.inf).any()
        self._ran[0], self._step_log_w[0] = True, self.log_w  # stays so where the empty sequence has no weight

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
        if self.t == self.params.max_tokens:
            raise ValueError(f"advance: all max_tokens={self.t} steps are done")
        if self.t == 0:
            self._first()
        else:
            if (len(self.prompt) + self.t - 1) % self.model.block_size == 0:
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
        """Runs the prompt's last token once, for the logits of every particle, which then gets the prompt's tail."""
        logits, hidden = self.model.forward(self.last_tokens[:1], self._position, self._prompt_row)
        self._position += 1
        block = self.model.block_size
        if len(self.prompt) % block:
            self._open_column()
            tails = self._table[:, self._n_shared_columns]
            table = torch.cat([self._prompt_row[0, -1:], tails])[:, None].contiguous()
            parents = torch.zeros(self.n + 1, dtype=torch.int64, device=self.device)
            ops.reindex(
                table, parents, position=len(self.prompt) % block, block_size=block, caches=self.model.caches,
                slot_dim=self.model.slot_dim,
            )  # fmt: skip
        # Copies, so that the graph may later write to the same tensors
        self.hidden = None if hidden is None else hidden.expand(self.n, -1).clone()
        self._smc_step(logits.expand(self.n, -1), first=True)

    def _next(self) -> None:
        logits, hidden = self.model.forward(self.last_tokens.clamp(min=0), self._position, self._table)
        self._position += 1
        if hidden is not None:
            assert self.hidden is not None  # made by `_first`
            self.hidden.copy_(hidden)
        self._smc_step(logits, first=False)

    # ---------------------------------------------------------------------------------------------------- the step
    def _smc_step(self, logits: Tensor, first: bool) -> None:
        self._put(self._ran, self._going)
        (self._step_twisted if self._twisted else self._step_base)(logits, first)
        self._step += 1

    def _step_twisted(self, logits: Tensor, first: bool) -> None:
        active = ~self.finished & self._going
        twist = self._twist(logits.shape[1]).rounded()
        rows = torch.where(active, self._rows, -1)
        inputs = {"logit_rows": rows, **twist._asdict(), "temperature": self.params.temperature}
        weighed = ops.weigh(logits, **inputs)
        self._check(active & weighed.lse.isnan(), _MODEL)
        self._check(active & weighed.lse_psi.isnan(), _NEXT)
        change = torch.where(active, weighed.lse_psi - weighed.lse, 0.0).nan_to_num(nan=-math.inf, neginf=-math.inf)
        self.log_w += change
        self._put(self._step_log_w, self.log_w + self.log_z)
        if first:
            ess = self._resample(0.0).ess
            same = (self.log_w == self.log_w[0]).all() & (weighed.tile_mass == weighed.tile_mass[:1]).all()
            parents, rank, count = self._rows, torch.where(same, self._rows, 0), torch.where(same, self.n, 1)
        else:
            resampled = self._resample(self.params.ess_threshold)
            ess, parents, rank = resampled.ess, resampled.ancestors, resampled.rank
            count = resampled.counts[parents]
            self._follow(resampled, self._step)
            active = active[parents]
        active = active & (ess > 0)  # without any weight nothing is drawn
        u = ops.stratify(self._uniforms(DRAW), rank, count)
        drawn = ops.draw(logits, weighed, parents, u, **inputs)
        if not first:  # not before the draw: what it read may be a buffer that the potential moves, too
            self._call("reindex", 0, parents.clone())
        ended = self._append(drawn, active)
        self.log_psi += torch.where(active, drawn.log_psi.nan_to_num(nan=-math.inf, neginf=-math.inf), 0.0)
        self._reweigh(torch.where(ended, self._ask("complete", 1, ended, _COMPLETE), self.log_psi))
        none_left = (self.log_w == -math.inf).all()
        self._put(self._ess, torch.where(none_left, 0.0, ess))
        now = self._step_log_w.index_select(0, self._step[None])[0]
        self._put(self._step_log_w, torch.where(none_left, self.log_w, now))
        self._going &= ~none_left & ~self.finished.all()

    def _step_base(self, logits: Tensor, first: bool) -> None:
        active = ~self.finished & self._going
        rows = torch.where(active, self._rows, -1)
        inputs: dict[str, Any] = {"logit_rows": rows, "temperature": self.params.temperature}
        weighed = ops.weigh(logits, **inputs)
        self._check(active & weighed.lse.isnan(), _MODEL)
        u = self._uniforms(DRAW)
        if first:  # all are the same empty sequence: with equal weights they are siblings
            same = (self.log_w == self.log_w[0]).all()
            self._rank.copy_(torch.where(same, self._rows, 0))
            self._count.copy_(torch.where(same, self.n, 1))
        twist = self._twist(logits.shape[1]) if self._weighs_by_next else None
        drawn = ops.draw(logits, weighed, self._rows, ops.stratify(u, self._rank, self._count), **inputs)
        new_psi = self.log_psi
        if twist is not None:
            change = twist.of_tokens(self._rows, drawn.tokens.clamp(min=0))
            new_psi = new_psi + self._checked(change, active & (drawn.tokens >= 0), _NEXT, 0)
        ended = self._append(drawn, active)
        if self.potential is not None:
            new_psi = torch.where(ended, self._ask("complete", 1, ended, _COMPLETE), new_psi)
            if twist is None:
                going = ~self.finished & self._going
                new_psi = torch.where(going, self._ask("prefix", 1, going, _PREFIX), new_psi)
            self._reweigh(new_psi)
        self._put(self._step_log_w, self.log_w + self.log_z)
        # without a potential the weights stay equal: a threshold of 1 would resample for nothing
        resampled = self._resample(self.params.ess_threshold if self.potential is not None else 0.0)
        self._put(self._ess, resampled.ess)
        self._going &= (resampled.ess > 0) & ~self.finished.all()
        if self.potential is not None:
            self._follow(resampled, self._step + 1)
            self._call("reindex", 1, resampled.ancestors.clone())
            self._rank.copy_(resampled.rank)
            self._count.copy_(resampled.counts[resampled.ancestors])
            self.last_tokens.copy_(self.last_tokens[resampled.ancestors])
        else:
            self._rank.zero_()
            self._count.fill_(1)

    # ------------------------------------------------------------------------------------------- parts of a step
    def _put(self, record: Tensor, row: Tensor) -> None:
        """Sets record[step] = row, where the group is still going."""
        old = record.index_select(0, self._step[None])
        record.index_copy_(0, self._step[None], torch.where(self._going, row[None], old))

    def _uniforms(self, stream: int) -> Tensor:
        p = self.params
        return ops.uniforms(self.n, seed=p.seed, group=p.group, step=self._step, stream=stream, device=self.device)

    def _resample(self, threshold: float) -> ops.Resampled:
        """Resamples, but a group that is over, or whose particles have all ended at the base proposal, stays."""
        r = ops.resample(self.log_w, self._uniforms(RESAMPLE), scheme=self.params.resampling, threshold=threshold)
        go = self._going if self._twisted else self._going & ~self.finished.all()
        return r._replace(
            ancestors=torch.where(go, r.ancestors, self._rows),
            counts=torch.where(go, r.counts, 1),
            rank=torch.where(go, r.rank, 0),
            resampled=r.resampled & go,
        )

    def _follow(self, resampled: ops.Resampled, step: Tensor) -> None:
        """Lets all but what the potential knows of a particle follow its ancestor; the genealogy's row is `step`."""
        ancestors = resampled.ancestors
        self.log_z += torch.where(resampled.resampled, resampled.log_mean, 0.0)
        self.log_w.copy_(torch.where(resampled.resampled, 0.0, self.log_w))
        for values in (self.log_psi, self.lengths, self.finished):
            values.copy_(values[ancestors])
        if self.hidden is not None:
            self.hidden.copy_(self.hidden[ancestors])
        self._resampled.index_copy_(0, step[None], resampled.resampled[None])
        ops.reindex(
            self._table, ancestors, position=self._position, block_size=self.model.block_size,
            caches=self.model.caches, slot_dim=self.model.slot_dim, genealogy=self._ancestors, step=step,
        )  # fmt: skip

    def _append(self, drawn: ops.Drawn, active: Tensor) -> Tensor:
        """Records a draw of the particles in `active` (N,) bool. Returns (N,) bool, those that end with it.

        A particle whose every next token has weight zero draws none. It has weight zero too, so it ends unasked.
        """
        drew = active & (drawn.tokens >= 0)
        tokens = torch.where(drew, drawn.tokens, -1)
        self._put(self._tokens, tokens)
        self._put(self._token_log_probs, torch.where(drew, drawn.log_prob, 0.0))
        self.last_tokens.copy_(tokens)
        self.lengths += drew
        ended = drew & ((tokens[:, None] == self._stop).any(1) | (self.lengths >= self.params.max_tokens))
        self.finished |= ended | (active & ~drew)
        return ended

    def _reweigh(self, new_psi: Tensor) -> None:
        """Takes weights from the twist that they hold to `new_psi` (N,). A weight of zero stays zero."""
        alive = self.log_psi > -math.inf
        self.log_w += torch.where(alive, new_psi - self.log_psi, 0.0)
        self.log_psi.copy_(torch.where(alive, new_psi, self.log_psi))

    # ---------------------------------------------------------------------------------------- asking the potential
    def _check(self, bad: Tensor, kind: int, later: int = 0) -> None:
        """Keeps the first fault: its kind, step (`later` than that of the group, as the potential saw it), particle."""
        found = torch.stack([torch.full_like(self._step, kind), self._step + later, bad.int().argmax()])
        self._fault.copy_(torch.where((self._fault[0] == 0) & bad.any() & self._going, found, self._fault))

    def _checked(self, values: Tensor, asked: Tensor, kind: int, later: int) -> Tensor:
        values = torch.where(asked, values.double(), 0.0)
        self._check(values.isnan() | (values == math.inf), kind, later)
        return values.nan_to_num(nan=-math.inf, posinf=-math.inf, neginf=-math.inf)

    def _error(self, method: str, later: int, what: str) -> SMCError:
        return SMCError(f"potential {type(self.potential).__name__}.{method} at step {self.t + later}: {what}")

    def _call(self, method: str, later: int, *args: object, vocab_size: int | None = None) -> Any:
        """Asks the potential, and checks what it answers. Whatever it does in a method ends this group alone."""
        assert self.potential is not None  # else nobody asks
        try:
            answer = getattr(self.potential, method)(*args)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            raise self._error(method, later, f"raised {type(error).__name__}: {error}") from error
        try:
            if method == "logw_next":
                return check_next(self.potential, answer, self.finished, vocab_size)
            if method in ("prefix", "complete"):
                return check_scores(self.potential, method, answer, self.finished)
        except TypeError as error:
            raise self._error(method, later, str(error).partition(" ")[2]) from None
        return answer

    def _ask(self, method: str, later: int, asked: Tensor, kind: int) -> Tensor:
        """Asks `prefix` or `complete` of the State at the group's step + `later`: (N,) float64, 0 outside `asked`."""
        return self._checked(self._call(method, later, _State(self, self._step + later)), asked, kind, later)

    def _twist(self, vocab: int) -> NextRows:
        """Asks `logw_next` for all particles. Indices are not looked at: the host would wait for them."""
        answer = self._call("logw_next", 0, _State(self, self._step), vocab_size=vocab)
        if answer is None:
            raise self._error("logw_next", 0, "returned None")
        return NextRows.of(answer)

    def _lineages(self) -> Tensor:
        """Traces each particle back: (N, T) int64 tokens, −1 beyond the last. T gathers of N, when looked at only."""
        rows, columns = self._rows, []
        for t in reversed(range(self.params.max_tokens)):
            # with the base proposal ancestors[t + 1] are known before anything is drawn at t + 1
            rows = self._ancestors[t + 1].long()[rows]
            columns.append(self._tokens[t][rows])
        return torch.stack(columns[::-1], dim=1)

    # -------------------------------------------------------------------------------------------------- paging
    def _open_column(self) -> None:
        """Gives each particle a private block in the column of the next position: N free blocks of the pool.

        Free is what no unfinished particle reads. Marks and counts have fixed shapes, so the host waits for nothing.
        """
        column = (self._position // self.model.block_size)[None]
        past = torch.arange(self._table.shape[1], device=self.device) < column
        read = past[None, :] & ~self.finished[:, None]
        read[:, : self._n_shared_columns] = False
        marked = torch.where(read, self._table.long(), self._n_block_ids).reshape(-1)
        live = torch.zeros(self._n_block_ids + 1, dtype=torch.bool, device=self.device)
        live.index_fill_(0, marked, True)
        taken = live[self._pool.long()]
        free_first = torch.argsort(taken.to(torch.int8), stable=True)[: self.n]
        if len(free_first) < self.n:
            raise ValueError(f"pool: has {len(self._pool)} blocks, N = {self.n} particles need one each")
        self._check(taken[free_first], _POOL)
        self._table.index_copy_(1, column, self._pool[free_first][:, None])

    # ---------------------------------------------------------------------------------------------- the result
    def population(self) -> Population:
        """Gives the weighted particles. This is the only place where the host waits for the device."""
        kind, step, particle = self._fault.tolist()
        if kind == _POOL:
            raise SMCError(f"pool: its {len(self._pool)} blocks were not enough at step {step}")
        if kind:
            who = _FAULTS[kind] if kind == _MODEL else f"potential {type(self.potential).__name__}.{_FAULTS[kind]}"
            raise SMCError(f"{who} at step {step}: particle {particle} got NaN or +inf")
        steps = int(self._ran.sum())
        log_mean = ops.ess_log_mean(self.log_w)[1]
        return Population.from_record(
            tokens=self._tokens[:steps].cpu().numpy(),
            token_log_probs=self._token_log_probs[:steps].cpu().numpy(),
            ancestors=self._ancestors[:steps].cpu().numpy(),
            resampled=self._resampled[:steps].cpu().numpy(),
            ess=self._ess[:steps].cpu().numpy(),
            step_log_weights=self._step_log_w[:steps].cpu().numpy(),
            log_weights=(self.log_w + self.log_z).cpu().numpy(),
            log_z=float(self.log_z) + log_mean,
            prompt=self.prompt,
            params=self.params,
        )
