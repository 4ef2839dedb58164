"""Scheduler side: an engine step is either ordinary (any requests, prefill of leads included) or particle-only.

A lead goes through four phases:

    queued    waits, hidden from vLLM, until its rows and blocks fit; FIFO among leads
    prefill   an ordinary request to vLLM; its first private blocks are already reserved
    running   past its prefill, hidden from vLLM; takes part in particle-only steps
    failed    carries an error that the next step reports, as does a request that is refused and becomes no group

Blocks come from vLLM's own BlockPool and never enter the prefix cache. A group grows when its genealogy opens a column
(`GroupResult.need`). When the pool is dry it waits for others to end; when nobody else can make progress, the youngest
group that waits ends with an error, so that the others get its blocks. Every way out (finish, abort, error, preemption
by an engine reset) passes `_free_request` or `_preempt_request`, which return all blocks.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from fastsmc.potentials import token_list
from fastsmc.vllm import compat
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.lead import (
    GroupResult,
    GroupStart,
    GroupTick,
    Lead,
    Limits,
    Tick,
    check_fits,
    first_columns,
    is_lead,
)

logger = get_logger(__name__)

#: particle steps in one engine step when nothing else waits; with other work around it is 1
STEPS_PER_TICK = 8
#: seconds that a worker waits for potentials to be prepared when there is nothing else to do, and seconds between two
#: engine steps that do nothing but ask for them when there is
POLL, POLL_BESIDE_WORK = 0.005, 0.05


@dataclasses.dataclass
class _Group:
    """Holds what the scheduler knows of a lead."""

    request: Request
    lead: Lead
    lookahead: int
    phase: str = "queued"
    error: str | None = None
    epoch: int = 0  # counts restarts, so that a result from before a preemption is not taken for one after
    started: bool = False
    in_flight: bool = False
    waiting: bool = False  # for its potential to be prepared
    need: int = 0  # blocks without which it cannot go on
    short: bool = False  # queued for want of blocks
    blocks: dict[int, Any] = dataclasses.field(default_factory=dict)  # block id → KVCacheBlock
    to_grant: list[int] = dataclasses.field(default_factory=list)


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
        self._pool = self.kv_cache_manager.block_pool
        self._groups: dict[str, _Group] = {}  # by request id, in order of arrival
        self._refused: dict[str, tuple[Request, str]] = {}  # by request id: leads that become no group, and why
        self._dropped: list[str] = []
        self._particle_turn = False
        self._hold_admission = False
        self._polled = -math.inf  # when groups that wait for their potentials were last asked, and nothing else

    # ----------------------------------------------------------------------------------------------- coming in
    def add_request(self, request: Request) -> None:
        known = request.request_id in self.requests  # an update of a streaming session
        super().add_request(request)
        params = request.sampling_params
        if known or params is None or not is_lead(params):
            return
        try:
            lead = Lead.parse(params)
            if not request.prompt_token_ids or getattr(request, "prompt_embeds", None) is not None:
                raise ValueError("prompt: a group of particles needs at least one prompt token, and no embeddings")
            if request.resumable:
                raise ValueError("a group of particles cannot be a streaming session")
            if request.lora_request is not None:
                raise ValueError("lora_request: groups of particles do not support LoRA")
            vocab_size = self.vllm_config.model_config.get_vocab_size()
            lead.check_ids(vocab_size)
            token_list("prompt", request.prompt_token_ids, vocab_size)
            lookahead = lead.lookahead()
            check_fits(lead.params, request.num_prompt_tokens, lookahead, self._limits)
            # The seed is the group's. For the token that stock sampling draws at prefill, and that is dropped, it would
            # make a generator, which vLLM's CPU runner cannot rewind in a chunked prefill.
            request.sampling_params = params.clone()
            request.sampling_params.seed = None
        except Exception as error:  # whatever a request holds, the engine goes on
            self._refused[request.request_id] = request, str(error) or repr(error)
        else:
            self._groups[request.request_id] = _Group(request, lead, lookahead)

    def _admit(self) -> None:
        """Reserves rows and blocks for queued leads, oldest first, while they fit."""
        if self._hold_admission:  # what a deadlock's end gave back is for others first
            self._hold_admission = False
            return
        free = self._pool.get_num_free_blocks() - sum(
            self._prompt_blocks(g) for g in self._groups.values() if g.phase == "prefill" and not self._has_blocks(g)
        )
        rows = sum(g.lead.params.n_particles for g in self._groups.values() if g.phase in ("prefill", "running"))
        for group in self._groups.values():
            if group.phase != "queued":
                continue
            params, prompt_len = group.lead.params, group.request.num_prompt_tokens
            columns = first_columns(params, prompt_len, group.lookahead, self._limits.block_size)
            first = params.n_particles * columns
            rows += params.n_particles
            free -= first + self._prompt_blocks(group)
            group.short = rows <= self._limits.max_num_seqs and free < 0
            if rows > self._limits.max_num_seqs or free < 0:
                return
            self._grant(group, first)
            group.phase = "prefill"

    def _prompt_blocks(self, group: _Group) -> int:
        return -(-group.request.num_prompt_tokens // self._limits.block_size)

    def _has_blocks(self, group: _Group) -> bool:
        """Says whether vLLM has given a lead its prompt's blocks (at least the first of them)."""
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
        if group.started:
            self._dropped.append(group.request.request_id)
            group.started = False

    # ------------------------------------------------------------------------------------------------- a step
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        paused = self.pause_state == PauseState.PAUSED_ALL
        if not paused:
            self._admit()
        hidden = {g.request.request_id for g in self._groups.values() if self._is_hidden(g)} | self._refused.keys()
        others = [r for r in self.running if r.request_id not in hidden]
        work = bool(others or self.kv_holding_waiting or self.finished_req_ids) or any(
            r.request_id not in hidden for r in self.waiting
        )
        ready = [] if paused else [g for g in self._groups.values() if self._is_ready(g)]
        patience = 0.0
        if ready and all(g.waiting for g in ready):  # for their potentials: nothing is kept from others meanwhile
            now, busy = time.monotonic(), work or any(g.in_flight for g in self._groups.values())
            if busy and now < self._polled + POLL_BESIDE_WORK:
                ready = []
            else:
                self._polled, patience = now, 0.0 if busy else POLL
        if ready and (self._particle_turn or not work):
            self._particle_turn = False
            output = SchedulerOutput.make_empty()
            steps = 1 if work else STEPS_PER_TICK
            return _with_tick(output, Tick([self._tick(g, steps) for g in ready], self._take_dropped(), patience))

        since = self._waiting_for_blocks_since()
        held = [r for r in self.waiting if r.request_id in hidden or r.arrival_time > since]
        leads_running = [r for r in self.running if r.request_id in hidden]
        self.waiting.remove_requests(held)
        self.running = others
        self.max_num_running_reqs -= len(leads_running)  # they keep their places
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_running_reqs += len(leads_running)
            self.running = self.running + leads_running
            for request in held:
                self.waiting.add_request(request)
        _with_tick(output, Tick([], self._take_dropped()))
        self._particle_turn = True
        if output.total_num_scheduled_tokens == 0 and not paused:
            self._break_deadlock()
        return output

    def _waiting_for_blocks_since(self) -> float:
        """Returns the arrival of the oldest lead that waits for blocks, infinity if none does.

        Requests that came later are not admitted meanwhile, so that a steady stream of them cannot starve it.
        """
        waiting = [g for g in self._groups.values() if g.short or (g.phase == "running" and g.need)]
        return min((g.request.arrival_time for g in waiting), default=math.inf)

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

    def _tick(self, group: _Group, steps: int) -> GroupTick:
        request, start = group.request, None
        if not group.started:
            prompt_len = request.num_prompt_tokens
            blocks = self.kv_cache_manager.get_block_ids(request.request_id)[0]
            assert request.sampling_params is not None and request.prompt_token_ids is not None  # see add_request
            stop = set(group.lead.params.stop_token_ids or ())
            if not group.lead.params.ignore_eos:
                stop |= request.sampling_params.all_stop_token_ids
            start = GroupStart(
                params=group.lead.params,
                prompt=list(request.prompt_token_ids),
                prompt_blocks=list(blocks[: -(-prompt_len // self._limits.block_size)]),
                stop_token_ids=frozenset(stop),
                potential=group.lead.potential,
                potential_args=group.lead.potential_args,
                twist=group.lead.twist,
                exact=group.lead.exact,
                lookahead=group.lookahead,
                return_population=group.lead.return_population,
            )
            group.started = True
        granted, group.to_grant = group.to_grant, []
        group.in_flight = True
        return GroupTick(request.request_id, group.epoch, steps, granted, start)

    def _take_dropped(self) -> list[str]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def _break_deadlock(self) -> None:
        """Makes a group give blocks back where nothing ordinary was scheduled and no group can go on either.

        First the youngest lead whose prompt still waits for blocks goes back to the queue, which costs nothing; if
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
        for request_id in scheduler_output.num_scheduled_tokens:
            if (group := self._groups.get(request_id)) is not None:
                self._after_prefill(group, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for result in getattr(model_runner_output, "smc_results", ()):
            self._after_tick(result, outputs)
        for request, error in list(self._refused.values()):
            self._finish(request, RequestStatus.FINISHED_ERROR, [], {"error": error}, outputs)
        for group in [g for g in self._groups.values() if g.phase == "failed"]:
            self._finish(group.request, RequestStatus.FINISHED_ERROR, [], {"error": group.error}, outputs)
        return outputs

    def _after_prefill(self, group: _Group, model_runner_output: Any) -> None:
        """Drops the token that stock sampling drew for a lead; past its prefill the group is ready to run."""
        request = group.request
        index = model_runner_output.req_id_to_index.get(request.request_id)
        if index is not None and model_runner_output.sampled_token_ids:
            model_runner_output.sampled_token_ids[index] = []
        if group.phase == "prefill" and request.num_computed_tokens >= request.num_prompt_tokens:
            request.num_output_placeholders = 0  # of the async scheduler, for the token just dropped
            group.phase = "running"

    def _after_tick(self, result: GroupResult, outputs: dict[int, Any]) -> None:
        group = self._groups.get(result.request_id)
        if group is None or group.epoch != result.epoch or not group.in_flight:
            return  # aborted or preempted while the step ran
        group.in_flight, group.waiting = False, result.waiting
        group.need = result.need
        self._pool.free_blocks([group.blocks.pop(block) for block in result.surplus])
        if result.error is not None:
            group.phase, group.error = "failed", result.error
        elif result.done:
            payload = dict(result.summary)
            if result.population is not None:
                payload["population"] = result.population
            if result.token_ids is None and result.population is None:
                payload["error"] = "all particles have weight zero, so there is no sample (log Z = -inf)"
                status = RequestStatus.FINISHED_ERROR
            else:
                status = RequestStatus.FINISHED_STOPPED if result.stopped else RequestStatus.FINISHED_LENGTH_CAPPED
            token_ids, stop = result.token_ids or [], group.lead.params.stop_token_ids or ()
            if status == RequestStatus.FINISHED_STOPPED and token_ids and token_ids[-1] in stop:
                group.request.stop_reason = token_ids[-1]
            self._finish(group.request, status, token_ids, payload, outputs)
        elif not result.waiting:
            self._emit(group.request, [], None, {"step": result.step}, outputs)

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
            group.phase = "queued"
        super()._preempt_request(request, *args, **kwargs)


def _with_tick(output: SchedulerOutput, tick: Tick) -> SchedulerOutput:
    output.smc = tick  # type: ignore[attr-defined]  # added to vLLM's fields, and pickled with them
    return output


class SMCScheduler(_SMCMixin, Scheduler):
    """Is vLLM's scheduler with groups."""


class AsyncSMCScheduler(_SMCMixin, AsyncScheduler):
    """Is vLLM's asynchronous scheduler with groups."""


def make_scheduler(vllm_config: Any, **kwargs: Any) -> Scheduler:
    """Makes the scheduler that the configuration asks for: the `scheduler_cls` to give vLLM."""
    kind = AsyncSMCScheduler if vllm_config.scheduler_config.async_scheduling else SMCScheduler
    return kind(vllm_config=vllm_config, **kwargs)
