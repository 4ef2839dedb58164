"""Worker side: the groups of a worker, over vLLM's own model and KV cache (`fastsmc.vllm.model`).

`VllmRows` is the `RowModel` of one group. `ParticleRunner` holds the groups and the potentials of a worker and runs a
`Tick` of the scheduler.
"""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastsmc import ops, potentials
from fastsmc.group import Group, GroupEngine, SMCError, set_up
from fastsmc.paging import Paging
from fastsmc.potentials import Potential
from fastsmc.twists import Twist, card_stamp
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.lead import OBJECT, GroupResult, GroupStart, GroupTick, Tick, last_position
from fastsmc.vllm.model import Model, PagedCalls

logger = get_logger(__name__)

#: potentials by name and arguments that a worker keeps set up; the oldest goes first
_MAX_NAMED = 32
#: potentials by name that are prepared at the same time; others wait for their turn
_MAX_PREPARING = 2


def _named(start: GroupStart) -> str:
    """Returns what a potential by name is kept under."""
    return f"{start.potential} {start.potential_args}"


class VllmRows:
    """Is the `RowModel` of one group over paged KV; a slot is a row of the block table."""

    def __init__(self, model: PagedCalls, start: GroupStart, lookahead: int) -> None:
        self._model, self._start = model, start
        prompt_len = len(start.prompt)
        self.paging = Paging(
            start.params.n_particles,
            prompt_len,
            start.prompt_blocks,
            model.block_size,
            last_position(start.params, prompt_len, lookahead),
            ahead=lookahead,
            device=model.device,
        )
        self._plan: ops.AttendPlan | None = None
        self._planned_for: tuple[int, int, int] | None = None
        self._n_moves = 0  # calls of reindex

    def first(self) -> tuple[Tensor, Tensor]:
        """Runs the prompt's last token once more, in a private block, because the prompt's may be shared."""
        model, paging, start = self._model, self.paging, self._start
        position = paging.position - 1
        column, n_used = divmod(position, model.block_size)
        source = torch.tensor([start.prompt_blocks[column]], dtype=torch.int32, device=model.device)
        scratch = paging.table[:1, paging.tail : paging.tail + 1]  # slot 0's own tail
        both = torch.cat([source, scratch[0]])[:, None]
        model.reindex(both, torch.zeros(2, dtype=torch.int64, device=model.device), n_used)
        table = torch.cat([paging.table[:1, :column], scratch], dim=1)
        slots = scratch[0].long() * model.block_size + n_used
        return model.forward(torch.tensor(start.prompt[-1:], device=model.device), position, table, slots)

    def next(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        paging, attend = self.paging, self._model.attend
        table = paging.table[slots, : paging.tail + 1]
        # what the table hangs on: slots are ascending, and between moves rows can only drop out (RowModel.next)
        seen = (self._n_moves, len(slots), paging.tail)
        if attend.why_not is None and seen != self._planned_for:
            self._plan, self._planned_for = attend.plan(table, paging.n_prompt_columns), seen
        pays = self._plan is not None and attend.pays(self._plan, paging.position + 1)
        out = self._model.forward(tokens, paging.position, table, paging.slots(slots), self._plan if pays else None)
        paging.position += 1
        return out

    def reindex(self, ancestors: Tensor) -> None:
        self._n_moves += 1
        self._model.reindex(self.paging.table, ancestors, self.paging.position)

    def continuation_log_prob(
        self, tokens: Tensor, slots: Tensor, continuation: list[int], temperature: float
    ) -> Tensor:
        model, paging, n = self._model, self.paging, len(continuation)
        target = torch.tensor(continuation, device=model.device)
        out = torch.empty(len(slots), dtype=torch.float64, device=model.device)
        chunk = max(1, model.max_tokens // n)
        n_columns = (paging.position + n - 1) // paging.block_size + 1
        for i in range(0, len(slots), chunk):
            part = slots[i : i + chunk]
            query = torch.cat([tokens[i : i + chunk, None], target[None, :-1].expand(len(part), -1)], dim=1)
            hidden = model.hidden(
                query.reshape(-1), paging.position, paging.table[part, :n_columns], paging.slots(part, n), n
            )
            scores, wanted = [], target.repeat(len(part))
            for begin in range(0, len(hidden), model.max_logits_rows):
                rows = slice(begin, begin + model.max_logits_rows)
                logits = model.logits(hidden, rows)
                lse = ops.weigh(logits, temperature=temperature).lse
                scores.append(logits.gather(1, wanted[rows, None])[:, 0].double() / temperature - lse)
            out[i : i + chunk] = torch.cat(scores).reshape(len(part), n).sum(1)
        return out


class _Preparation:
    """Makes and prepares a potential that a request named, in a thread of its own.

    Attributes:
        done: set when there is a potential, or an error, or when it was given up.
        wanted: bool, whether a group waits for it; if not, it is not begun any more.
    """

    def __init__(self, name: str, args: str, get_engine: Callable[[], GroupEngine], turns: threading.Semaphore) -> None:
        self.done = threading.Event()
        self.wanted, self.given_up = True, False
        self.error: str | None = None
        self.potential: Potential | None = None
        # a daemon: an engine that is shut down does not wait for what nobody will use
        threading.Thread(target=self._run, args=(name, args, get_engine, turns), daemon=True).start()

    def _run(self, name: str, args: str, get_engine: Callable[[], GroupEngine], turns: threading.Semaphore) -> None:
        try:
            with turns:
                if not self.wanted:
                    self.given_up = True
                    return
                potential = potentials.resolve(name, json.loads(args))
                potential.prepare(get_engine().tokenizer)
            self.potential = potential
        except BaseException as error:  # of whatever a user's code does, only this potential's groups hear
            named = isinstance(error, ValueError) and str(error).startswith("potential ")
            self.error = str(error) if named else f"potential {name!r}: prepare raised {type(error).__name__}: {error}"
        finally:
            self.done.set()


class ParticleRunner:
    """Holds the groups and potentials of one worker, and runs its ticks."""

    engine_class = GroupEngine

    def __init__(self, model_runner: Any) -> None:
        self.model: PagedCalls = Model(model_runner)
        self._model_config = model_runner.vllm_config.model_config
        self._net = model_runner.model
        self._engine: GroupEngine | None = None
        self._engine_lock = threading.Lock()
        self._potentials: dict[str, Potential] = {}
        self._preparing: dict[str, _Preparation] = {}  # by name and arguments
        self._turns = threading.Semaphore(_MAX_PREPARING)
        # groups whose potential is being prepared: what they are to start with, and the blocks that they have got
        self._waiting: dict[str, tuple[GroupStart, list[int]]] = {}
        self.groups: dict[str, tuple[Group, VllmRows, GroupStart]] = {}

    # ---------------------------------------------------------------------------------------------- potentials
    def _get_engine(self) -> GroupEngine:
        with self._engine_lock:  # threads that prepare potentials ask, too
            if self._engine is None:
                config, tokenizer = self._model_config, None
                if not config.skip_tokenizer_init:
                    from transformers import AutoTokenizer

                    tokenizer = AutoTokenizer.from_pretrained(
                        config.tokenizer,
                        revision=config.tokenizer_revision,
                        trust_remote_code=config.trust_remote_code,
                    )
                self._engine = self.engine_class(
                    tokenizer,
                    self.model.device,
                    config.get_vocab_size(),
                    config.get_hidden_size(),
                    self._net,
                    config.model,
                )
            return self._engine

    def put_potential(self, name: str, potential: Potential) -> None:
        """Sets a potential up and keeps it under `name`."""
        self._potentials[name] = set_up(potential, self._get_engine())

    def drop_potential(self, name: str) -> None:
        self._potentials.pop(name, None)

    def _potential(self, start: GroupStart) -> Potential | None:
        target = self._target(start)
        if start.twist is None:
            return target
        assert target is not None  # Lead.parse wants a potential beside a twist
        return self._twist(start.twist).guide(target)

    def _twist(self, path: str) -> Twist:
        """Returns the twist saved at `path`, which is kept as long as its card does not change."""
        key = f"twist {path} {card_stamp(path)}"
        if key not in self._potentials:
            self._make_room()
            self.put_potential(key, Twist.load(path))
        twist = self._potentials[key]
        assert isinstance(twist, Twist)  # a copy of what was put there
        return twist

    def _make_room(self) -> None:
        named = [known for known in self._potentials if not known.startswith(OBJECT)]
        if len(named) >= _MAX_NAMED:
            self.drop_potential(named[0])

    def _target(self, start: GroupStart) -> Potential | None:
        name = start.potential
        if name is None:
            return None
        if name.startswith(OBJECT):
            if name not in self._potentials:
                raise SMCError(f"potential={name!r}: not known to this engine; LLM.register_potential gives names")
            return self._potentials[name]
        return self._potentials[_named(start)]

    def _is_prepared(self, start: GroupStart) -> bool:
        """Says whether the potential that a group names is there; begins to prepare it if nobody has, and sets it up.

        Raises:
            SMCError: it cannot be made, prepared or set up.
        """
        if start.potential is None or start.potential.startswith(OBJECT) or (key := _named(start)) in self._potentials:
            return True
        if key not in self._preparing or self._preparing[key].given_up:
            self._preparing[key] = _Preparation(start.potential, start.potential_args, self._get_engine, self._turns)
        preparation = self._preparing[key]
        preparation.wanted = True
        if not preparation.done.is_set() or preparation.given_up:  # given up just now: the next call begins anew
            return False
        if preparation.error is not None:
            raise SMCError(preparation.error)  # kept for other groups that wait for it; the last takes it away
        assert preparation.potential is not None  # done, and neither given up nor failed
        del self._preparing[key]
        self._make_room()
        self.put_potential(key, preparation.potential)
        return True

    # ------------------------------------------------------------------------------------------------- a tick
    @torch.inference_mode()
    def run(self, tick: Tick) -> list[GroupResult]:
        """Runs each group of the tick; a group that fails is dropped and says why, the others go on."""
        results = []
        if tick.patience and self._preparing:
            self._wait_a_little(tick.patience)
        for part in tick.groups:
            result = GroupResult(part.request_id, part.epoch)
            try:
                self._run_group(part, result)
            except (SMCError, ValueError) as error:
                result.error = str(error)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                logger.exception("group %s failed", part.request_id)
                result.error = f"internal error: {type(error).__name__}: {error}"
            if result.done or result.error is not None:
                self.drop([part.request_id])
            results.append(result)
        return results

    def drop(self, request_ids: list[str]) -> None:
        """Forgets groups that have ended, or were aborted or preempted. What is being prepared for them is kept."""
        for request_id in request_ids:
            self.groups.pop(request_id, None)
            self._waiting.pop(request_id, None)
        wanted, idle = {_named(start) for start, _ in self._waiting.values()}, []
        for key, preparation in list(self._preparing.items()):
            preparation.wanted = key in wanted
            if not preparation.wanted and preparation.done.is_set():
                if preparation.potential is None:
                    del self._preparing[key]
                else:
                    idle.append(key)
        for key in idle[:-_MAX_NAMED]:
            del self._preparing[key]

    def _wait_a_little(self, seconds: float) -> None:
        """Waits until one of the potentials that groups wait for is prepared, but not for long."""
        until = time.monotonic() + seconds
        while not any(p.done.is_set() for p in self._preparing.values()) and time.monotonic() < until:
            time.sleep(seconds / 5)

    def _start(self, start: GroupStart, blocks: list[int]) -> tuple[Group, VllmRows, GroupStart]:
        potential = self._potential(start)
        if potential is not None and potential.lookahead > start.lookahead:
            raise SMCError(
                f"potential={start.potential!r}: needs a lookahead of {potential.lookahead} tokens that could not be "
                "known when the group was admitted; give its continuation as token ids"
            )
        rows = VllmRows(self.model, start, start.lookahead)
        rows.paging.grant(blocks)
        group = Group(
            start.params,
            rows,
            potential,
            start.prompt,
            start.stop_token_ids,
            self.model.device,
            self._engine,
            start.exact,
        )
        return group, rows, start

    def _run_group(self, part: GroupTick, result: GroupResult) -> None:
        if part.start is not None:
            self._waiting[part.request_id] = (part.start, [])
        if part.request_id in self._waiting:
            start, blocks = self._waiting[part.request_id]
            blocks += part.blocks
            if not self._is_prepared(start):
                result.waiting = True
                return
            del self._waiting[part.request_id]
            self.groups[part.request_id] = self._start(start, blocks)
        else:
            self.groups[part.request_id][1].paging.grant(part.blocks)
        group, rows, start = self.groups[part.request_id]
        paging = rows.paging
        for _ in range(part.steps):
            if group.done:
                break
            result.need = paging.need(group.readers)
            if result.need:
                break
            paging.open_columns()
            result.surplus += paging.surplus()
            group.step()
        result.step, result.done = group.t, group.done
        if group.done:
            result.need = 0
            self._finish(group, start, result)

    def _finish(self, group: Group, start: GroupStart, result: GroupResult) -> None:
        population = group.population()
        chosen = group.choose()
        if chosen is not None:
            result.token_ids = population.token_ids[chosen]
            result.stopped = bool(result.token_ids) and result.token_ids[-1] in start.stop_token_ids
        result.summary = {
            "log_z": population.log_z,
            "n_particles": group.n,
            "steps": group.t,
            "ess": population.final_ess,
            "chosen": chosen,
            "seed": group.params.seed,
        }
        if start.return_population:
            result.population = base64.b64encode(population.to_bytes()).decode()
