"""Worker side: the groups of a worker, over vLLM's own model and KV cache (`fastsmc.vllm.model`).

`ParticleRunner` holds them and runs a `StepOrder` of the scheduler: in each particle step one pass of the model for the
groups that share it, and one for each group that is alone; with `captured_steps` some are run by the captured driver
(`fastsmc.vllm.captured`). An order that comes with an ordinary step is `riding` in it.
"""

from __future__ import annotations

import base64
import concurrent.futures
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastsmc.counterfactuals import Counterfactuals
from fastsmc.interventions import Facts
from fastsmc.smc import Group, GroupEngine, SMCError
from fastsmc.smc.evidence import Evidence
from fastsmc.smc.group import choose
from fastsmc.smc.paging import BlockTables, Paging, RaggedPaging
from fastsmc.smc.record import CommonTokens
from fastsmc.values import json_safe
from fastsmc.vllm import adapters, captured
from fastsmc.vllm.capacity import last_position
from fastsmc.vllm.captured import CapturedMember
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.messages import GroupResult, GroupStart, GroupStep, StepOrder
from fastsmc.vllm.model import Model
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.passes import Member, PagedCalls, Pass, Ride, Stretch, Waiting, run_stretches
from fastsmc.vllm.shelf import Shelf

logger = get_logger(__name__)


class ParticleRunner:
    """Holds the groups and potentials of one worker, and runs orders of the scheduler."""

    engine_class = GroupEngine

    def __init__(self, model_runner: Any) -> None:
        self._model = Model(model_runner)
        self.model: PagedCalls = self._model
        config = model_runner.vllm_config.model_config
        options = EngineOptions.of(model_runner.vllm_config.additional_config)
        self.shelf = Shelf(
            config,
            options,
            lambda tokenizer: self.engine_class(
                tokenizer,
                self.model.device,
                config.get_vocab_size(),
                config.get_hidden_size(),
                model_runner.model,
                config.model,
            ),
        )
        self.tables = BlockTables(self.model.device)
        self.groups: dict[str, Member] = {}
        self.captured: dict[str, CapturedMember] = {}
        lora = model_runner.vllm_config.lora_config
        self._max_adapters = 0 if lora is None else lora.max_loras
        self._captures = options.captured_steps
        self.interventions = self._model.interventions
        # groups whose potential is being prepared: what they are to start with, and the blocks that they have got
        self._waiting: dict[str, tuple[GroupStart, list[int]]] = {}
        self._unwritten: dict[str, Stretch] = {}  # within `_take_up`
        self._half: tuple[Pass, set[str]] | None = None
        # groups whose potential's answers are awaited in the middle of a step, and the pass that it is of
        self._parked: dict[str, tuple[Pass, Waiting]] = {}
        self.facts: dict[str, Facts] = {}  # what other models said of texts, by name
        self.kept_logits: dict[str, list[Tensor]] = {}  # along texts, (V,) float32 of the CPU each

    @property
    def own_model(self) -> Model:
        """Gives this rank's model, whose calls the other ranks must make too."""
        return self._model

    @torch.inference_mode()
    def run(self, order: StepOrder) -> list[GroupResult]:
        """Runs the groups of an order; a group that fails is dropped and says why, the others go on."""
        results, half = self._take_up(order)
        if half is not None:
            self._run_pass(*half, results, order.max_rows)
        else:
            self._run_steps(order, results)
            self._run_captured(order, results)
        return self._answer(results)

    @contextmanager
    def riding(self, order: StepOrder) -> Iterator[list[GroupResult]]:
        """Runs the groups of an order whose rows ride in the ordinary step within, and lists their results at its end.

        They have one pass, or a part of it. What goes wrong before or after the model's call ends groups only; in the
        call it is an error of the ordinary step.
        """
        answers: list[GroupResult] = []
        with torch.inference_mode():
            results, half = self._take_up(order)
            if half is None:
                half = self._begin_pass(self._sharing(order.groups)[0], results)
            ride = None if half is None else self._board(*half, results, order.max_rows)
        with nullcontext() if ride is None else self._model.riding.along(ride):
            yield answers
        with torch.inference_mode():
            if ride is not None and half is not None:
                self._alight(ride, *half, results)
            answers += self._answer(results)

    def _board(self, part: Pass, ids: set[str], results: dict[str, GroupResult], max_rows: int | None) -> Ride | None:
        try:
            return self._model.ride(part.next_batch(max_rows), timed=max_rows is not None)
        except Exception as error:
            self._fail(ids, results, error)
            return None

    def _alight(self, ride: Ride, part: Pass, ids: set[str], results: dict[str, GroupResult]) -> None:
        first, start = next(iter(results.values())), time.perf_counter()
        try:
            assert ride.hidden is not None  # the ordinary step has called the model
            logits = self._model.logits(ride.hidden, slice(None)) if ride.logits is None else ride.logits
            first.rows = part.put(logits, ride.hidden)
            first.seconds = ride.seconds + time.perf_counter() - start
            self._end_or_keep(part, ids, results)
        except Exception as error:
            self._fail(ids, results, error)

    def _take_up(self, order: StepOrder) -> tuple[dict[str, GroupResult], tuple[Pass, set[str]] | None]:
        """Makes an order's results, admits its groups, and finds the pass of theirs that is half done."""
        if order.patience and self._parked:
            futures = [waiting.future for _, waiting in self._parked.values()]
            concurrent.futures.wait(futures, order.patience, concurrent.futures.FIRST_COMPLETED)
        elif order.patience:
            self.shelf.wait_a_little(order.patience)
        rides = self._model.riding.why_not is None
        results = {part.request_id: GroupResult(part.request_id, part.epoch, rides) for part in order.groups}
        half, self._half = self._half, None
        lost = self._end_without_interventions(results)
        if half is not None and half[1] == results.keys() and not lost:
            return results, half
        for part in order.groups:
            self._admit(part, results[part.request_id])
        self._write_prompts(results)
        self._go_on(results)
        return results, None

    def _go_on(self, results: dict[str, GroupResult]) -> None:
        """Takes the steps of parked groups on whose potentials can answer now; the others say that they wait."""
        for request_id in [request_id for request_id in self._parked if request_id in results]:
            part, waiting = self._parked[request_id]
            results[request_id].waiting = not waiting.future.done()
            if not results[request_id].waiting:
                del self._parked[request_id]
                try:
                    part.go_on(waiting)
                    self._park(part, results)
                except Exception as error:
                    self._fail([request_id], results, error)

    def _park(self, part: Pass, results: dict[str, GroupResult]) -> None:
        """Keeps the groups of a pass that wait for their potentials' answers."""
        request_ids = {member.group: request_id for request_id, member in self.groups.items()}
        for waiting in part.waiting:
            request_id = request_ids[waiting.group]
            self._parked[request_id] = part, waiting
            results[request_id].waiting = True

    def _write_prompts(self, results: dict[str, GroupResult]) -> None:
        """Writes the prompts of groups that have just begun under interventions."""
        prompts, self._unwritten = self._unwritten, {}
        sets: dict[int, list[str]] = {}  # with LoRA one adapter per pass, since an engine may hold no more
        for request_id, prompt in prompts.items():
            sets.setdefault(adapters.ids([prompt.adapter])[0], []).append(request_id)
        for ids in sets.values():
            try:
                run_stretches(self.model, [prompts[request_id] for request_id in ids])
            except Exception as error:
                self._fail(ids, results, error)

    def _end_without_interventions(self, results: dict[str, GroupResult]) -> bool:
        """Ends groups whose interventions were dropped, which else would go on as others; says if there are any."""
        lost = [
            request_id
            for request_id, member in self.groups.items()
            if request_id in results and not self.interventions.knows(member.start.intervention)
        ]
        for request_id in lost:
            results[request_id].error, results[request_id].error_kind = "its intervention was dropped", "refused"
        return bool(lost)

    def _answer(self, results: dict[str, GroupResult]) -> list[GroupResult]:
        if self._half is None:  # so that what is missing is there before the next order
            self._open_columns(list(results), results)
        for request_id, result in results.items():
            self._conclude(request_id, result)
        return list(results.values())

    def _run_steps(self, order: StepOrder, results: dict[str, GroupResult]) -> None:
        """Runs particle steps until all have as many as they may, or the order's rows are used up."""
        sets = [*self._sharing(order.groups), *([part] for part in order.groups if part.alone)]
        left = order.max_rows
        for step in range(max((part.steps for part in order.groups), default=0)):
            if any(result.need for result in results.values()):
                return
            self._go_on(results)
            for parts in sets:
                if left is not None and left <= 0:
                    return
                begun = self._begin_pass([part for part in parts if step < part.steps], results)
                if begun is not None:
                    left = self._run_pass(*begun, results, left)
                if self._half is not None:
                    return

    def _sharing(self, parts: Sequence[GroupStep]) -> list[list[GroupStep]]:
        """Says which groups share a pass: those that are not alone, as far as the engine holds their adapters at once.

        The scheduler names no more than one pass of them, but for groups whose potentials were yet to be prepared.
        """
        sharing: list[list[GroupStep]] = [[]]
        held: set[int] = set()
        for part in (part for part in parts if not part.alone):
            member = self.groups.get(part.request_id)
            adapter = adapters.ids([None if member is None else member.start.adapter])[0]
            if adapter not in {0, *held} and len(held) == self._max_adapters:
                sharing.append([])
                held = set()
            held |= {adapter} - {0}
            sharing[-1].append(part)
        return sharing

    def _run_captured(self, order: StepOrder, results: dict[str, GroupResult]) -> None:
        for part in order.groups:
            if (member := self.captured.get(part.request_id)) is not None:
                with self._ending(results[part.request_id], "failed", SMCError):
                    member.run(part.steps, results[part.request_id])

    def _begin_pass(self, parts: Sequence[GroupStep], results: dict[str, GroupResult]) -> tuple[Pass, set[str]] | None:
        """Begins a pass of the groups of `parts` that can take a step; None if there is nothing to run."""
        ready = self._open_columns([part.request_id for part in parts], results)
        # groups stay in step with each other: one that needs blocks gets them before any goes on
        if not ready or any(results[part.request_id].need for part in parts):
            return None
        try:
            groups = [self.groups[request_id] for request_id in ready]
            # those that follow a text show its logits before anybody is compared with them, whatever the cohorts
            members = [*(part for group in groups for part in group.companions), *groups]
            return Pass(self.model, self.tables, [m for m in members if not m.group.done]), set(ready)
        except Exception as error:
            self._fail(ready, results, error)
            return None

    def _run_pass(self, part: Pass, ids: set[str], results: dict[str, GroupResult], max_rows: int | None) -> int | None:
        """Runs a pass on, to its end or until `max_rows` are used up; returns what is left of those."""
        first, seconds = next(iter(results.values())), part.seconds
        try:
            ran = part.run(max_rows)
            first.rows, first.seconds = first.rows + ran, first.seconds + part.seconds - seconds
            self._end_or_keep(part, ids, results)
        except Exception as error:
            self._fail(ids, results, error)
            return max_rows
        return None if max_rows is None else max_rows - ran

    def _end_or_keep(self, part: Pass, ids: set[str], results: dict[str, GroupResult]) -> None:
        """Has groups take their step when all rows of their pass have run, else keeps what is done of it."""
        if part.n_run == part.n_rows:
            part.take()
            self._park(part, results)
            return
        self._half = part, ids
        for request_id in ids:
            results[request_id].partial = True

    def _fail(self, ids: Sequence[str] | set[str], results: dict[str, GroupResult], error: Exception) -> None:
        """Ends all groups of a pass that has failed."""
        logger.exception("a pass failed, of these groups: %s", ", ".join(sorted(ids)))
        shared = f" in a forward pass that {len(ids)} groups shared" * (len(ids) > 1)
        for request_id in ids:
            results[request_id].error = f"internal error{shared}: {type(error).__name__}: {error}"
            results[request_id].error_kind = "engine"

    # ------------------------------------------------------------------------------------------------------ one group
    def _admit(self, part: GroupStep, result: GroupResult) -> None:
        """Starts a group, when its potential is there, or gives it more blocks."""
        with self._ending(result, "could not start", SMCError, ValueError):
            if part.start is not None:
                self._waiting[part.request_id] = (part.start, [])
            if part.request_id in self.captured:
                self.captured[part.request_id].group.grant(part.blocks)
                return
            if part.request_id not in self._waiting:
                self.groups[part.request_id].grant(part.blocks)
                return
            start, blocks = self._waiting[part.request_id]
            blocks += part.blocks
            result.waiting = not self.shelf.is_ready(start)
            if not result.waiting:
                del self._waiting[part.request_id]
                self._start(part.request_id, start, blocks)

    @contextmanager
    def _ending(self, result: GroupResult, what: str, *said: type[Exception]) -> Iterator[None]:
        """Ends one group where something goes wrong within: errors that are `said` as they are, and internal ones."""
        try:
            yield
        except said as error:
            result.error, result.error_kind = str(error), getattr(error, "kind", "refused")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            logger.exception("group %s %s", result.request_id, what)
            result.error, result.error_kind = f"internal error: {type(error).__name__}: {error}", "engine"

    def _start(self, request_id: str, start: GroupStart, blocks: list[int]) -> None:
        potential = self.shelf.of(start)
        if potential is not None and potential.lookahead > start.lookahead:
            raise SMCError(
                f"potential={start.potential!r}: needs a lookahead of {potential.lookahead} tokens that could not be "
                "known when the group was admitted; give its continuation as token ids",
                kind="refused",
            )
        device = self.model.device
        engine = None if potential is None and start.params.stop is None else self.shelf.engine()
        if self._captures and captured.holds(potential, start):
            self.captured[request_id] = CapturedMember.begin(self._model, potential, engine, start, blocks)
            return
        group = Group(
            start.params, potential, start.prompt, start.stop_token_ids, device, engine, start.exact,
            all_stop_token_ids=start.all_stop_token_ids, evidence=self._evidence(start),
        )  # fmt: skip
        group.progress = [] if start.progress else None
        if start.keep_logits is not None:
            kept = self.kept_logits[start.keep_logits] = []
            group.watch = lambda row: kept.append(row.to("cpu", torch.float32, copy=True))
        common = CommonTokens(group.lineages) if start.stream_tokens else None
        as_it_was, variants = start, None
        if start.intervention is not None:
            longest = max(start.params.max_tokens, len(start.factual.token_ids) if start.factual is not None else 0)
            end = last_position(longest, len(start.prompt), start.lookahead) + 1
            fresh = all(member.start.intervention != start.intervention for member in self.groups.values())
            variants = self.interventions.of_positions(start.intervention, len(start.prompt), end, fresh)
            group.blame = partial(self.interventions.blame, start.intervention)
            if n := start.n_intervened_blocks:
                ours, blocks = blocks[:n], blocks[n:]
                start = replace(start, prompt_blocks=[*start.prompt_blocks[:-n], *ours])
                begin = (len(start.prompt_blocks) - n) * self.model.block_size
                self._unwritten[request_id] = Stretch(start.prompt, begin, start.prompt_blocks, variants, start.adapter)
        companions: list[Member] = []
        if start.factual is not None:
            drawn = replace(start.params, temperature=start.factual.temperature)
            followed = group.companions(drawn if start.factual.facts is None else None)
            followed[-1].blame = group.blame
            for one in followed[:-1]:
                companions.append(self._member(one, as_it_was, [blocks.pop()]))
            companions.append(self._member(followed[-1], start, [blocks.pop()], variants))
        member = self._member(group, start, blocks, variants)
        self.groups[request_id] = member._replace(common=common, companions=tuple(companions))

    def _member(self, group: Group, start: GroupStart, blocks: list[int], variants: Tensor | None = None) -> Member:
        """Gives a group its place in the block tables, and its first blocks."""
        ahead = start.lookahead if group.asker is not None else 0
        last = last_position(group.params.max_tokens, len(start.prompt), ahead)
        kind = RaggedPaging if group.params.segmented else Paging
        paging = kind(
            group.n, len(start.prompt), start.prompt_blocks, self.model.block_size, last, ahead, self.model.device
        )
        paging.grant(blocks)
        return Member(group, paging, self.tables.add(paging), start, variants=variants)

    def _evidence(self, start: GroupStart) -> Evidence | None:
        """Makes what is known of the text of a counterfactual group; None: it is no such group."""
        factual, device = start.factual, self.model.device
        if factual is None:
            return None
        if factual.facts is None:
            return Evidence(factual.token_ids, factual.temperature, factual.noise, device)
        if factual.facts not in self.facts:
            raise SMCError(
                f"smc_facts={factual.facts!r}: unknown; they were not registered, or dropped", kind="refused"
            )
        return Evidence.of_facts(self.facts[factual.facts], start.all_stop_token_ids, device, factual.noise)

    def _open_columns(self, ids: Sequence[str], results: dict[str, GroupResult]) -> list[str]:
        """Opens what the next position needs, and lists the groups that can take a step; the others need blocks."""
        going = [i for i in ids if i in self.groups and not self.groups[i].done and results[i].error is None]
        going = [i for i in going if not results[i].need and i not in self._parked]
        parts = [(results[i], part) for i in going for part in self.groups[i].parts if not part.group.done]
        opening = [(result, part) for result, part in parts if part.paging.must_open]
        must = [part for _, part in opening if part.paging.need()]  # its dead blocks may be enough
        if must:
            used = [m.paging.live(m.group.cohort.readers(m.group.index)) | g << 32 for g, m in enumerate(must)]
            live: list[list[int]] = [[] for _ in must]
            for value in torch.unique(torch.cat(used)).tolist():  # one wait for the device
                if value >= 0:
                    live[value >> 32].append(value & 0xFFFFFFFF)
            for member, blocks in zip(must, live, strict=True):
                member.paging.sweep(blocks)
        for result, part in opening:
            result.need += part.paging.need()
        for result, part in opening:
            if not result.need:
                part.paging.open_columns()
                result.surplus += part.paging.surplus()
        return [i for i in going if not results[i].need]

    def _conclude(self, request_id: str, result: GroupResult) -> None:
        """Says what has become of a group; one that is over is dropped."""
        member = self.groups.get(request_id) or self.captured.get(request_id)
        if member is not None and result.error is None and not result.partial and request_id not in self._parked:
            group = member.group
            result.step, result.done = group.t, group.done
            errors = [group.error]
            if isinstance(member, Member):
                result.done, errors = member.done, [part.group.error for part in member.parts]
                with self._ending(result, "failed"):
                    self._tell(member, result)
            if (error := next((each for each in errors if each is not None), None)) is not None:
                result.error, result.error_kind, result.done = str(error), error.kind, False
            elif result.done:
                result.need = 0
                with self._ending(result, "failed"):
                    self._finish(member, result)
        if result.done or result.error is not None:
            self.drop([request_id])

    @staticmethod
    def _tell(member: Member, result: GroupResult) -> None:
        """Says what a group was asked to say of the steps since the last result."""
        group = member.group
        if group.progress is not None:
            result.progress, group.progress = group.progress, []
        if member.common is not None and not group.done:  # when it is, the rest comes with the sample
            part, particles = group.cohort.layout.part(group.index), group.cohort.particles
            result.common = member.common.more(group.log_w, particles.finished[part], particles.lengths[part])

    @staticmethod
    def _finish(member: Member | CapturedMember, result: GroupResult) -> None:
        group, start = member.group, member.start
        population, samples = group.population(), choose(group.log_w, group.params, start.n_samples)
        drawn = [population.token_ids[i] for i in samples]
        reasons = [(population.finish_reasons or [])[i] for i in samples]
        if samples:
            # vLLM's front end finds stop strings itself
            result.token_ids = drawn[0]
            result.stopped = bool(drawn[0]) and drawn[0][-1] in start.stop_token_ids
            by_potential = group.asker is not None and group.asker.stops and not result.stopped
            result.stopped_by_potential = by_potential and reasons[0] == "stop"
        result.summary = {
            "log_z": json_safe(population.log_z),
            "log_z_stderr": json_safe(population.log_z_stderr),
            "log_z_stderr_reason": population.log_z_stderr_reason,
            "distinct_roots": population.n_roots,
            "n_particles": group.n,
            "steps": group.t,
            "ess": population.final_ess,
            "chosen": samples[0] if samples else None,
            "samples": samples,
            "sample_token_ids": drawn,
            "sample_finish_reasons": reasons,
            "particle_tokens": int((population.tokens >= 0).sum()),
            "seed": group.params.seed,
            "p0": group.params.p0(),
        }
        if population.questions is not None:
            result.summary |= {"questions": population.questions, "biased": population.biased}
        if not samples:
            result.summary["log_z_is_minus_inf"] = True
        if isinstance(population, Counterfactuals):
            result.summary["counterfactual"] = {
                "token_ids": population.factual_ids,
                "log_probs": population.factual_log_probs.tolist(),
                "stay": population.stay.tolist(),
                "expected_common_prefix": population.expected_common_prefix,
                "sample_common_prefixes": [int(population.common_prefix[i]) for i in samples],
            }
        if start.return_population:
            result.population = base64.b64encode(population.to_bytes()).decode()

    def _clear(self, member: Member) -> None:
        """Makes the blocks of a group zero that may have written NaN to them, before others have them."""
        errors, start = [part.group.error for part in member.parts], member.start
        failed = any(error is not None and error.kind == "engine" for error in errors)
        if failed or self.interventions.broke(start.intervention):
            owned, n = [block for part in member.parts for block in part.paging.owned], start.n_intervened_blocks
            self.model.clear([*owned, *start.prompt_blocks[len(start.prompt_blocks) - n :]])

    def drop(self, request_ids: list[str]) -> None:
        """Forgets groups that have ended, or were aborted or preempted; a pass that is half done with one is undone."""
        if self._half is not None and not self._half[1].isdisjoint(request_ids):
            self._half = None
        for request_id in request_ids:
            self._waiting.pop(request_id, None)
            if request_id in self._parked:
                self._parked.pop(request_id)[1].drop()
            self.captured.pop(request_id, None)
            if (member := self.groups.pop(request_id, None)) is not None:
                for part in member.parts:
                    self.tables.remove(part.first_row)
                self._clear(member)
        self.shelf.forget(start for start, _ in self._waiting.values())
