"""Scheduler side: an engine step is either ordinary (any requests, prefill of groups included) or particle-only.

A group request goes through four phases:

    queued    waits, hidden from vLLM, until its rows and blocks fit; smaller groups overtake it within bounds
    prefill   an ordinary request to vLLM; its first private blocks are already reserved
    running   past its prefill, hidden from vLLM; takes part in particle-only steps
    failed    carries an error that the next step reports, as does a request that is refused and becomes no group

Blocks come from vLLM's own BlockPool and never enter the prefix cache. A group grows when its genealogy opens a column
(`GroupResult.need`). When the pool is dry it waits for others to end; when nobody else can make progress, the youngest
group that waits ends with an error, so that the others get its blocks. Every way out (finish, abort, error, preemption
by an engine reset) passes `_free_request` or `_preempt_request`, which return all blocks.

Particle-only steps and ordinary ones take turns where there are both. Where the workers say that rows can ride, they
ride in ordinary steps that only decode, and need no turn. An order names all groups that are ready, as far as a forward
pass holds their rows; who is left out has the next turn. Beside other work an engine step runs a bounded number of rows
(`fastsmc.vllm.pace`), so a pass may be half done for several steps. As long as it is, its groups and no others are in
the orders, and none of their blocks is granted or returned, unless one of them ends: then the half is undone, by the
order that drops it.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from fastsmc.cases import read_text
from fastsmc.maps import first_reached
from fastsmc.potentials import token_list
from fastsmc.vllm import adapters, compat
from fastsmc.vllm.capacity import Limits, first_columns, intervened_blocks
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.messages import GroupResult, GroupStart, GroupStep, StepOrder
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.pace import Pace
from fastsmc.vllm.request import COUNTERFACTUAL, P0_OFF, GroupRequest, OverLimit, is_group_request

logger = get_logger(__name__)

#: particle steps in one engine step when nothing else waits; with other work around it is 1
STEPS_PER_ORDER = 8
#: seconds that a worker waits for potentials to be prepared when there is nothing else to do, and seconds between two
#: engine steps that do nothing but ask for them when there is
POLL, POLL_BESIDE_WORK = 0.005, 0.05


@dataclasses.dataclass
class _Group:
    """Holds what the scheduler knows of a group."""

    request: Request
    asked: GroupRequest
    lookahead: int
    alone: bool  # its rows share no pass with other groups'
    phase: str = "queued"
    error: str | None = None
    epoch: int = 0  # counts restarts, so that a result from before a preemption is not taken for one after
    started: bool = False
    in_flight: bool = False
    waiting: bool = False  # for its potential to be prepared, or to be able to answer
    need: int = 0  # blocks without which it cannot go on
    short: bool = False  # queued for want of blocks
    overtaken: int = 0  # particles of groups that were admitted before it though they came later
    turn: int = 0  # number of the order that it was last part of, or that was the last when it became ready to run
    blocks: dict[int, Any] = dataclasses.field(default_factory=dict)  # block id → KVCacheBlock
    to_grant: list[int] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)  # tokens that the client has, from before restarts too
    common: list[int] = dataclasses.field(default_factory=list)  # final ones of this run, to be sent or to equal `sent`

    @property
    def n(self) -> int:
        """Counts the rows that it has in a forward pass at most."""
        return self.asked.params.n_particles + self.asked.n_companions


if TYPE_CHECKING:
    _Scheduler = Scheduler
else:
    _Scheduler = object  # the mixin is put before vLLM's scheduler, or before its asynchronous one


class _SMCMixin(_Scheduler):
    """Adds groups to a vLLM scheduler; see the module's docstring."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        compat.check_version()
        compat.check_config(self.vllm_config)
        compat.check_names(current_platform.device_type)
        compat.check_kv_cache(self.kv_cache_config)
        self._limits = Limits.of(self.vllm_config)
        options = self._options = EngineOptions.of(self.vllm_config.additional_config)
        self._reached: dict[str, int] = {}  # of the operator's interventions, as `first_reached`
        options.load_interventions(lambda name, layers: self._reached.update({name: first_reached(layers)}))
        self._never_shared = options.shared_forward == "never" or options.captured_steps
        lora = self.vllm_config.lora_config
        self._max_adapters = 0 if lora is None else lora.max_loras
        self._pace = Pace(options.max_particle_rows_per_step, logger)
        self._pool = self.kv_cache_manager.block_pool
        self._groups: dict[str, _Group] = {}  # by request id, in order of arrival
        # by request id: what becomes no group, why, and through whom
        self._refused: dict[str, tuple[Request, str, str]] = {}
        self._dropped: list[str] = []
        self._half: list[_Group] = []  # groups whose pass the workers have half done
        self._turn = 0  # number of orders with groups so far
        self._updated = -math.inf  # when an engine step's output last came back
        self._particle_turn = False
        self._rides = False  # until a worker's first results say so (`fastsmc.vllm.riding`)
        self._hold_admission = False
        self._polled = -math.inf  # when groups that wait for their potentials were last asked, and nothing else

    # ----------------------------------------------------------------------------------------------- coming in
    def add_request(self, request: Request) -> None:
        known = request.request_id in self.requests  # an update of a streaming session
        super().add_request(request)
        params = request.sampling_params
        if known or params is None or not is_group_request(params):
            return
        try:
            asked = GroupRequest.parse(params)
            asked.check_allowed(self._options)
            if not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
                raise ValueError("prompt: a group of particles needs at least one prompt token, and no embeddings")
            if request.resumable:
                raise ValueError("a group of particles cannot be a streaming session")
            model_config = self.vllm_config.model_config
            vocab_size = model_config.get_vocab_size()
            asked.check_ids(vocab_size, not model_config.skip_tokenizer_init)
            token_list("prompt", request.prompt_token_ids, vocab_size)
            lookahead = asked.lookahead(self._options)
            asked.check_fits(request.num_prompt_tokens, lookahead, self._limits, self._reached)
            if asked.factual is not None:
                stop, _ = _stop_token_ids(asked, params)
                read_text(asked.factual.token_ids, None, vocab_size, stop, COUNTERFACTUAL)
            self._check_waiting()
            tokens = self._limits.max_num_batched_tokens
            if request.lora_request is not None and 2 * (lookahead + 1) > tokens:  # a row may stand twice
                raise ValueError(
                    f"lookahead={lookahead}: with lora_request at most {tokens // 2 - 1}, as "
                    f"max_num_batched_tokens={tokens}"
                )
            # The seed is the group's. For the token that stock sampling draws at prefill, and that is dropped, it would
            # make a generator, which vLLM's CPU runner cannot rewind in a chunked prefill; the settings of p0 are the
            # group's, too.
            request.sampling_params = params.clone()
            request.sampling_params.seed = None
            for name, neutral in P0_OFF.items():
                setattr(request.sampling_params, name, neutral)
        except Exception as error:  # whatever a request holds, the engine goes on
            kind = "refused" if isinstance(error, ValueError) else "engine"
            if isinstance(error, OverLimit):
                kind = "busy" if error.limit == "max_groups" else "limit"
            self._refused[request.request_id] = request, str(error) or repr(error), kind
        else:
            alone = self._never_shared or asked.alone
            self._groups[request.request_id] = _Group(request, asked, lookahead, alone)

    def _check_waiting(self) -> None:
        """Refuses a group while as many as the operator allows wait to be admitted."""
        most = self._options.max_groups
        if most is None or self._count_queued() < most:
            return
        if not self._hold_admission and self.pause_state != PauseState.PAUSED_ALL:
            self._admit()  # those that came since the last step may fit
        if (waiting := self._count_queued()) >= most:
            raise OverLimit(f"{waiting} groups wait to be admitted, at most max_groups={most}; ask later", "max_groups")

    def _count_queued(self) -> int:
        return sum(g.phase == "queued" for g in self._groups.values())

    def _admit(self) -> None:
        """Reserves rows and blocks for queued groups, oldest first, while they fit.

        A group that does not fit is overtaken only as long as the groups that have overtaken it have fewer particles
        than it has, so it neither waits for ever nor keeps small groups from rows that it cannot use yet.
        """
        if self._hold_admission:  # what a deadlock's end gave back is for others first
            self._hold_admission = False
            return
        queued = [g for g in self._groups.values() if g.phase == "queued"]
        for group in queued:
            group.short = False
        free = self._pool.get_num_free_blocks() - sum(
            self._prompt_blocks(g) for g in self._groups.values() if g.phase == "prefill" and not self._has_blocks(g)
        )
        admitted = [g for g in self._groups.values() if g.phase in ("prefill", "running")]
        rows = self._limits.max_num_seqs - sum(self._rows(g) for g in admitted)
        passed: list[_Group] = []
        credit = math.inf  # particles that may still overtake those that are passed
        for group in queued:
            if rows == 0 or credit <= 0:
                return
            if self._rows(group) <= rows:
                prompt_len, params = group.request.num_prompt_tokens, group.asked.params
                columns = first_columns(params, prompt_len, group.lookahead, self._limits.block_size)
                # a text's histories begin with one block each, the one that the prompt's end is in
                first = params.n_particles * columns + group.asked.n_companions + self._intervened_blocks(group)
                group.short = first + self._prompt_blocks(group) > free
            if self._rows(group) > rows or group.short:
                passed.append(group)
                credit = min(credit, group.n - group.overtaken)
                continue
            for other in passed:
                other.overtaken += group.n
            credit -= group.n
            rows -= self._rows(group)
            free -= first + self._prompt_blocks(group)
            self._grant(group, first)
            group.phase = "prefill"

    def _rows(self, group: _Group) -> int:
        """Counts the rows that a group has of those of the engine: all of them, if it has one more."""
        return min(group.n, self._limits.max_num_seqs)

    def _prompt_blocks(self, group: _Group) -> int:
        return -(-group.request.num_prompt_tokens // self._limits.block_size)

    def _intervened_blocks(self, group: _Group) -> int:
        """Counts the blocks for the part of a group's prompt that its intervention reaches."""
        first, prompt_len = group.asked.first_reached(self._reached), group.request.num_prompt_tokens
        return intervened_blocks(first, prompt_len, self._limits.block_size)

    def _has_blocks(self, group: _Group) -> bool:
        """Says whether vLLM has given a group its prompt's blocks (at least the first of them)."""
        return group.request.status == RequestStatus.RUNNING

    def _grant(self, group: _Group, count: int) -> None:
        for block in self._pool.get_new_blocks(count):
            group.blocks[block.block_id] = block
            group.to_grant.append(block.block_id)

    def _take_back(self, group: _Group) -> None:
        """Returns all of a group's blocks and makes the workers forget it."""
        self._pool.free_blocks(group.blocks.values())
        group.blocks, group.to_grant, group.need = {}, [], 0
        group.in_flight = group.waiting = False
        if any(g is group for g in self._half):  # the workers undo it, as they are told to drop this group
            self._half = []
        if group.started:
            self._dropped.append(group.request.request_id)
            group.started = False

    # ------------------------------------------------------------------------------------------------- a step
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        paused = self.pause_state == PauseState.PAUSED_ALL
        if not paused:
            self._admit()
        hidden = {g.request.request_id for g in self._groups.values() if self._is_hidden(g)} | self._refused.keys()
        visible = [r for queue in (self.running, self.waiting) for r in queue if r.request_id not in hidden]
        work = bool(visible or self.kv_holding_waiting or self.finished_req_ids)
        ready = [] if paused else self._ready(work)
        if ready and (self._particle_turn or not work):
            self._particle_turn = False
            # the bound is for other requests; groups' own prefill takes turns with whole passes
            max_rows = self._pace.max_rows() if any(r.request_id not in self._groups for r in visible) else None
            groups = self._half or self._take_turns(ready, max_rows)
            return _with_order(SchedulerOutput.make_empty(), self._order(groups, work, max_rows))
        output = self._schedule_ordinary(hidden, *args, **kwargs)
        if output.total_num_scheduled_tokens == 0 and not paused:
            self._break_deadlock()
            if not ready and (waiting := self._ready(work=False)):  # for potentials, and nothing else can run
                return _with_order(output, self._order(waiting, False, None))
        return _with_order(output, self._ride(ready, output) or StepOrder([], self._take_dropped()))

    def _ride(self, ready: list[_Group], output: SchedulerOutput) -> StepOrder | None:
        """Orders rows that ride in an ordinary step; None where there are none, or where a particle-only step is next.

        They ride in steps of nothing but decode tokens, which with them fit a forward pass. Groups that are alone do
        not, since what else is in their pass would change.
        """
        n_tokens = output.total_num_scheduled_tokens
        self._particle_turn = not (self._rides and 0 < n_tokens == len(output.num_scheduled_tokens))
        if self._particle_turn or not ready or self._pace.wants_decode(n_tokens):
            return None
        groups, max_rows = self._half or self._take_turns(ready, None, n_passes=1), self._pace.max_rows(n_tokens)
        room = self._limits.max_num_batched_tokens - n_tokens
        # three rows may have to stand together (`Pass._whole`), or one twice
        fits = room > 2 if max_rows is not None else sum(g.n for g in groups) <= room
        fits = fits and self._holds_adapters(groups, [self.requests[i] for i in output.num_scheduled_tokens])
        if not fits or any(g.alone and not g.waiting for g in groups):
            self._particle_turn = True
            return None
        return self._order(groups, True, None if max_rows is None else min(max_rows, room))

    def _schedule_ordinary(self, hidden: set[str], *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Has vLLM schedule a step of what is not hidden.

        Requests that came later than a group that waits for blocks are not admitted meanwhile, so that a steady stream
        of them cannot starve it. Where it is queued they are not groups, whose overtaking has its own bound.
        """
        growing = [g.request.arrival_time for g in self._groups.values() if g.phase == "running" and g.need]
        short = [g.request.arrival_time for g in self._groups.values() if g.short]
        latest_group = min(growing, default=math.inf)
        latest = min([latest_group, *short])
        held = [
            r
            for r in self.waiting
            if r.request_id in hidden or r.arrival_time > (latest_group if r.request_id in self._groups else latest)
        ]
        groups_running = [r for r in self.running if r.request_id in hidden]
        self.waiting.remove_requests(held)
        self.running = [r for r in self.running if r.request_id not in hidden]
        self.max_num_running_reqs -= len(groups_running)  # they keep their places
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_running_reqs += len(groups_running)
            self.running = self.running + groups_running
            for request in held:
                self.waiting.add_request(request)

    def _ready(self, work: bool) -> list[_Group]:
        """Returns the groups that an order can name now; blocks that they need are granted."""
        if any(g.in_flight for g in self._groups.values()):  # what comes back may be half a pass
            return []
        if self._half:
            return self._half
        ready = [g for g in self._groups.values() if self._is_ready(g)]
        if work and all(g.waiting for g in ready) and time.monotonic() < self._polled + POLL_BESIDE_WORK:
            return []  # they wait for their potentials, and nothing is kept from others meanwhile
        return ready

    def _order(self, groups: list[_Group], work: bool, max_rows: int | None) -> StepOrder:
        self._turn += 1
        for group in groups:
            group.turn = self._turn
        patience = 0.0
        if all(g.waiting for g in groups):
            self._polled, patience = time.monotonic(), 0.0 if work else POLL
        steps = 1 if work or self._half else STEPS_PER_ORDER
        return StepOrder([self._step(g, steps) for g in groups], self._take_dropped(), patience, max_rows)

    def _take_turns(self, ready: Sequence[_Group], max_rows: int | None, n_passes: int | None = None) -> list[_Group]:
        """Chooses whose turn it is: no group has two as long as another that is ready has none.

        Those that share a pass go together as far as it holds their rows. Further passes, of groups that are alone, are
        in the same order as long as `max_rows` cuts none, or as `n_passes` says. Who waits for its potential is asked
        in any case.
        """
        waiting = [g for g in ready if g.waiting]
        by_turn = sorted((g for g in ready if not g.waiting), key=lambda g: g.turn)
        shared, passes = [g for g in by_turn if not g.alone], [[g] for g in by_turn if g.alone]
        if shared:
            passes.append(self._fill_pass(shared))
            passes.sort(key=lambda groups: groups[0].turn)
        if n_passes is None:
            sums = accumulate(sum(g.n for g in groups) for groups in passes)
            n_passes = max(1, sum(max_rows is None or n <= max_rows for n in sums))
        longest = min((groups[0].turn for groups in passes[n_passes:]), default=math.inf)
        return waiting + [g for groups in passes[:n_passes] for g in groups if g.turn <= longest]

    def _fill_pass(self, groups: Sequence[_Group]) -> list[_Group]:
        """Lists the groups that share a pass, by turn, as far as it holds their rows and their adapters."""
        taken: list[_Group] = []
        rows, longest = 0, math.inf
        for group in groups:
            if (taken and rows + group.n > self._limits.max_num_batched_tokens) or group.turn > longest:
                break
            if self._holds_adapters([*taken, group]):
                taken.append(group)
                rows += group.n
            else:
                longest = min(longest, group.turn)
        return taken

    def _holds_adapters(self, groups: Sequence[_Group], ordinary: Sequence[Request] = ()) -> bool:
        """Says whether one pass holds the LoRA adapters of groups and of ordinary requests."""
        requests = [*ordinary, *(group.request for group in groups)]
        return adapters.count([request.lora_request for request in requests]) <= self._max_adapters

    def _is_hidden(self, group: _Group) -> bool:
        request = group.request
        past_prefill = request.num_computed_tokens >= request.num_prompt_tokens
        return group.phase != "prefill" or past_prefill

    def _is_ready(self, group: _Group) -> bool:
        if group.phase != "running" or group.in_flight:
            return False
        if group.need:
            if group.need > self._pool.get_num_free_blocks():
                return False
            self._grant(group, group.need)
            group.need = 0
        return True

    def _step(self, group: _Group, steps: int) -> GroupStep:
        request, start = group.request, None
        if not group.started:
            prompt_len = request.num_prompt_tokens
            blocks = self.kv_cache_manager.get_block_ids(request.request_id)[0]
            assert request.sampling_params is not None and request.prompt_token_ids is not None  # see add_request
            stop, every = _stop_token_ids(group.asked, request.sampling_params)
            start = GroupStart(
                params=group.asked.params,
                prompt=list(request.prompt_token_ids),
                prompt_blocks=list(blocks[: -(-prompt_len // self._limits.block_size)]),
                stop_token_ids=stop,
                all_stop_token_ids=every,
                potential=group.asked.potential,
                potential_args=group.asked.potential_args,
                twist=group.asked.twist,
                exact=group.asked.exact,
                lookahead=group.lookahead,
                return_population=group.asked.return_population,
                progress=group.asked.progress,
                stream_tokens=group.asked.stream_tokens,
                n_samples=group.asked.n_samples,
                adapter=request.lora_request,
                intervention=group.asked.intervention,
                n_intervened_blocks=self._intervened_blocks(group),
                factual=group.asked.factual,
                keep_logits=group.asked.keep_logits,
            )
            group.started = True
        granted, group.to_grant = group.to_grant, []
        group.in_flight = True
        return GroupStep(request.request_id, group.epoch, steps, granted, start, group.alone)

    def _take_dropped(self) -> list[str]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def _break_deadlock(self) -> None:
        """Makes a group give blocks back where nothing ordinary was scheduled and no group can go on either.

        First the youngest group whose prompt still waits for blocks goes back to the queue, which costs nothing; if
        there is none, the youngest of the groups that wait to grow ends with an error.
        """
        running = [g for g in self._groups.values() if g.phase == "running"]
        if any(g.in_flight or self._is_ready(g) for g in running):
            return
        if any(request.num_in_flight_tokens > 0 for request in self.running):
            return
        stuck = [g for g in self._groups.values() if g.phase == "prefill" and not self._has_blocks(g)]
        if stuck:
            self._take_back(stuck[-1])
            stuck[-1].phase = "queued"
            self._hold_admission = True
            return
        starved = [g for g in running if g.need]
        if starved:
            group, free = starved[-1], self._pool.get_num_free_blocks()
            group.error = (
                f"the KV cache is full: the group needs {group.need} more blocks, {free} of {self._limits.num_blocks} "
                f"are free and it holds {len(group.blocks)}; use fewer particles, resample more often or enlarge the "
                "KV cache"
            )
            group.phase = "failed"

    # ---------------------------------------------------------------------------------------------- coming back
    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> dict[int, Any]:
        self._see_time(scheduler_output)
        for request_id in scheduler_output.num_scheduled_tokens:
            if (group := self._groups.get(request_id)) is not None:
                self._after_prefill(group, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if results := getattr(model_runner_output, "smc_results", None):
            self._after_order(results, outputs)
        for request, error, kind in list(self._refused.values()):
            payload = {"error": error, "error_kind": kind}
            self._finish(request, RequestStatus.FINISHED_ERROR, [], payload, outputs)
        for group in [g for g in self._groups.values() if g.phase == "failed"]:
            payload = {"error": group.error or "", "error_kind": "engine"}
            self._finish(group.request, RequestStatus.FINISHED_ERROR, [], payload, outputs)
        return outputs

    def _see_time(self, scheduler_output: SchedulerOutput) -> None:
        now, order = time.monotonic(), scheduler_output.smc  # type: ignore[attr-defined]  # see _with_order
        if (n_tokens := scheduler_output.total_num_scheduled_tokens) > 0 and order.groups:
            self._pace.see_ride()
        elif n_tokens > 0:
            # with steps scheduled ahead, this one began when the step before it came back
            began = max(scheduler_output.smc_scheduled, self._updated)  # type: ignore[attr-defined]
            has_prefill = n_tokens > len(scheduler_output.num_scheduled_tokens)
            self._pace.see_ordinary(now - began, n_tokens, has_prefill)
        self._updated = now

    def _after_order(self, results: Sequence[GroupResult], outputs: dict[int, Any]) -> None:
        self._rides = results[0].rides
        self._pace.see_rows(sum(r.rows for r in results), sum(r.seconds for r in results))
        current = {r.request_id: g for r in results if (g := self._current(r)) is not None}
        half = [r.request_id for r in results if r.partial]
        # where one of them has ended meanwhile, the next order drops it, and the workers undo the half
        self._half = [current[request_id] for request_id in half] if current.keys() >= set(half) else []
        for result in results:
            if result.request_id in current:
                self._after_step(current[result.request_id], result, outputs)

    def _current(self, result: GroupResult) -> _Group | None:
        """Returns the group that a result is of, None if it was aborted or preempted while the step ran."""
        group = self._groups.get(result.request_id)
        return group if group is not None and group.epoch == result.epoch and group.in_flight else None

    def _after_prefill(self, group: _Group, model_runner_output: Any) -> None:
        """Drops the token that stock sampling drew for a group request; past its prefill the group is ready to run."""
        request = group.request
        index = model_runner_output.req_id_to_index.get(request.request_id)
        if index is not None and model_runner_output.sampled_token_ids:
            model_runner_output.sampled_token_ids[index] = []
        if group.phase == "prefill" and request.num_computed_tokens >= request.num_prompt_tokens:
            request.num_output_placeholders = 0  # of the async scheduler, for the token just dropped
            group.phase, group.turn = "running", self._turn

    def _after_step(self, group: _Group, result: GroupResult, outputs: dict[int, Any]) -> None:
        group.in_flight, group.waiting = False, result.waiting
        group.need = result.need
        self._pool.free_blocks([group.blocks.pop(block) for block in result.surplus])
        payload: dict[str, Any] = {"progress": result.progress} if group.asked.progress else {}
        if result.error is None:
            self._check_restart(group, result)
        if result.error is not None:
            payload |= {"error": result.error, "error_kind": result.error_kind}
            self._finish(group.request, RequestStatus.FINISHED_ERROR, [], payload, outputs)
        elif result.done:
            self._end(group, result, payload | result.summary, outputs)
        elif not result.waiting and not result.partial:
            tokens = group.common[len(group.sent) :]
            group.sent += tokens
            self._emit(group.request, tokens, None, {"step": result.step} | payload, outputs)

    @staticmethod
    def _check_restart(group: _Group, result: GroupResult) -> None:
        """Makes it the result's error that a group which has begun anew has other tokens than were sent before."""
        group.common += result.common
        final, sent = group.common if result.token_ids is None else result.token_ids, group.sent
        n = len(sent) if result.done else min(len(sent), len(final))
        if final[:n] != sent[:n] and not (result.done and result.token_ids is None):
            result.error_kind = "engine"
            result.error = (
                f"the group began anew (preemption), and its tokens are not those that had been sent: {final[:n]} "
                f"instead of {sent[:n]}"
            )

    def _end(self, group: _Group, result: GroupResult, payload: dict[str, Any], outputs: dict[int, Any]) -> None:
        """Ends a group that is done, with its sample."""
        if result.population is not None:
            payload["population"] = result.population
        request, token_ids, stop = group.request, result.token_ids, group.asked.params.stop_token_ids or ()
        if token_ids is None:
            payload["error"] = "all particles have weight zero, so there is no sample (log Z = -inf)"
            payload["error_kind"] = "impossible"
            self._finish(request, RequestStatus.FINISHED_ERROR, [], payload, outputs)
            return
        stopped, rest = result.stopped or result.stopped_by_potential, token_ids[len(group.sent) :]
        status = RequestStatus.FINISHED_STOPPED if stopped else RequestStatus.FINISHED_LENGTH_CAPPED
        if result.stopped and token_ids[-1] in stop:
            request.stop_reason = token_ids[-1]
        if result.stopped_by_potential:
            # vLLM's front end takes the last token of an output that is stopped for a stop token, which has no text:
            # the tokens go before. It may find a stop string in them, and then this output is the last that it looks at
            told: dict[str, Any] = {"progress": []} if group.asked.progress else {}
            has_strings = group.asked.params.stop is not None
            self._emit(request, rest, None, payload if has_strings else {"step": result.step} | told, outputs)
            payload, rest = payload | told if has_strings else payload, []
        self._finish(request, status, rest, payload, outputs)

    def _finish(
        self, request: Request, status: RequestStatus, token_ids: list[int], payload: dict[str, Any], outputs: dict
    ) -> None:
        if token_ids:
            request.append_output_token_ids(token_ids)
        if request.status == RequestStatus.RUNNING:
            self.running = [r for r in self.running if r is not request]
        else:
            self.waiting.remove_requests([request])
        request.status = status
        self._emit(request, token_ids, request.get_finished_reason(), payload, outputs)
        self._free_request(request)

    def _emit(
        self, request: Request, token_ids: list[int], reason: Any, payload: dict[str, Any], outputs: dict
    ) -> None:
        stats = request.take_prefill_stats()
        if stats is not None:
            stats.finalize(self.kv_cache_manager.estimate_cached_tokens(request))
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=token_ids,
            finish_reason=reason,
            stop_reason=request.stop_reason,
            events=request.take_events(),
            prefill_stats=stats,
            kv_transfer_params={"smc": payload},
            trace_headers=request.trace_headers,
        )
        outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(output)

    # ------------------------------------------------------------------------------------------------ the ways out
    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._refused.pop(request.request_id, None)
        group = self._groups.pop(request.request_id, None)
        if group is not None:
            self._take_back(group)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        for group in self._groups.values():
            if group.phase == "prefill" and not self._has_blocks(group):
                self._take_back(group)
                group.phase = "queued"
        return super().reset_prefix_cache(*args, **kwargs)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        group = self._groups.get(request.request_id)
        if group is not None:  # starts again from its prompt; the same seed gives the same population
            self._take_back(group)
            group.epoch += 1
            group.phase, group.common = "queued", []
        super()._preempt_request(request, *args, **kwargs)


def _stop_token_ids(asked: GroupRequest, params: Any) -> tuple[frozenset[int], frozenset[int]]:
    """Lists the tokens that end a group's particles, and those that would without ignore_eos."""
    own = frozenset(asked.params.stop_token_ids or ())
    every = own | params.all_stop_token_ids
    return own if asked.params.ignore_eos else every, every


def _with_order(output: SchedulerOutput, order: StepOrder) -> SchedulerOutput:
    output.smc = order  # type: ignore[attr-defined]  # added to vLLM's fields, and pickled with them
    output.smc_scheduled = time.monotonic()  # type: ignore[attr-defined]
    return output


class SMCScheduler(_SMCMixin, Scheduler):
    """Is vLLM's scheduler with groups."""


class AsyncSMCScheduler(_SMCMixin, AsyncScheduler):
    """Is vLLM's asynchronous scheduler with groups."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """Makes the scheduler that the configuration asks for: the `scheduler_cls` to give vLLM."""
    kind = AsyncSMCScheduler if vllm_config.scheduler_config.async_scheduling else SMCScheduler
    return kind(vllm_config=vllm_config, **kwargs)
