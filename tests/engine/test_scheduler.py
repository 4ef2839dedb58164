"""The scheduler without a model: vLLM's scheduler and block pool with groups, and a worker that only keeps books."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from vllm import EngineArgs, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from fastsmc import SMCParams
from fastsmc.vllm import scheduler
from fastsmc.vllm.llm import LLM
from fastsmc.vllm.messages import GroupResult
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.pace import DECODE_STEPS, FIRST_ROWS, LEAST_ROWS, PREFILL_SHARE, RIDES, Pace
from fastsmc.vllm.scheduler import make_scheduler
from fastsmc.vllm.starting import engine_args

ROWS, BLOCKS, BLOCK_SIZE = 64, 60, 16
init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK_SIZE, sha256)


@pytest.fixture(scope="module")
def make(tiny_path):
    """Makes a scheduler of 64 rows and 60 blocks, with fastsmc's options."""
    config = EngineArgs(
        model=str(tiny_path),
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=ROWS,
        max_num_batched_tokens=ROWS,
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=1 << 20,
    ).create_engine_config()
    config.cache_config.num_gpu_blocks = BLOCKS + 1
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
    cache = KVCacheConfig(BLOCKS + 1, [], [KVCacheGroupSpec(["layer"], spec)])

    def make(async_scheduling: bool = False, **options):
        config.scheduler_config.async_scheduling = async_scheduling
        config.additional_config = {"fastsmc": options}
        return make_scheduler(
            config,
            kv_cache_config=cache,
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )

    return make


@dataclass
class Held:
    """Holds what the worker knows of a group: its blocks, and how it will go."""

    n: int
    blocks: set[int]
    ends: int
    fails: int | None
    waits: int
    step: int = 0
    wanted: int | None = None  # blocks that its next step wants and has not got


@dataclass
class Worker:
    """Answers orders as `fastsmc.vllm.messages` says, by chance, and holds the scheduler to its side of it."""

    chance: random.Random
    groups: dict[str, Held] = field(default_factory=dict)
    half: dict[str, int] = field(default_factory=dict)  # members of a pass that is half done → their rows
    left: int = 0  # rows of it that have not run
    counts: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("halves", "undone", "passes", "shared", "rides"), 0)
    )
    grows: float = 0.1  # how often a step wants blocks
    gives: float = 0.05  # share of its blocks that a step gives back
    fails: float = 0.15
    ends: int | None = None  # step at which groups end, by chance if None
    can_ride: bool = False
    rides: bool = False  # whether the order comes with an ordinary step
    waits: tuple[int, ...] = (0, 0, 0, 0, 1, 3)  # for how many orders a potential is being prepared

    def execute(self, output, scheduler) -> ModelRunnerOutput:
        order = output.smc
        self.drop(order.drop)
        if order.groups:
            self.rides = output.total_num_scheduled_tokens > 0
            results = self.run(order)
            if not self.rides:
                result = ModelRunnerOutput([], {})
                result.smc_results = results
                return result
            assert self.can_ride and set(output.num_scheduled_tokens.values()) == {1}
            assert self.ran + (self.ran == 1) + output.total_num_scheduled_tokens <= ROWS
            self.counts["rides"] += 1
        ids = list(output.num_scheduled_tokens)
        requests = [scheduler.requests[i] for i in ids]
        tokens = [[3] if r.num_computed_tokens >= r.num_tokens else [] for r in requests]
        result = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled_token_ids=tokens)
        if order.groups:
            result.smc_results = results
        return result

    def drop(self, request_ids):
        for name in request_ids:
            if name in self.half:
                self.undo()
            self.groups.pop(name, None)

    def undo(self):
        self.half, self.left = {}, 0
        self.counts["undone"] += 1

    def run(self, order) -> list[GroupResult]:
        names = [part.request_id for part in order.groups]
        assert len(set(names)) == len(names)
        if self.half:  # the same groups and no others, with nothing new
            assert set(names) == set(self.half)
            assert all(not part.blocks and part.start is None for part in order.groups)
        assert order.max_rows is None or all(part.steps == 1 for part in order.groups)
        for part in order.groups:
            if part.start is not None:
                n = part.start.params.n_particles
                ends = self.ends or self.chance.randint(1, part.start.params.max_tokens)
                fails = self.chance.randint(0, ends) if self.chance.random() < self.fails else None
                self.groups[part.request_id] = Held(n, set(), ends, fails, self.chance.choice(self.waits))
            group = self.groups[part.request_id]
            others = set().union(*(g.blocks for g in self.groups.values()))
            assert len(set(part.blocks)) == len(part.blocks) and not others & set(part.blocks)
            group.blocks |= set(part.blocks)
            if group.wanted is not None:
                group.wanted = max(0, group.wanted - len(part.blocks))
        results = {p.request_id: GroupResult(p.request_id, p.epoch, self.can_ride) for p in order.groups}
        self.ran = 0
        for _ in range(min((part.steps for part in order.groups), default=0)):
            members = {p.request_id: p for p in order.groups if self.begins(p, results[p.request_id])}
            shared = [name for name, part in members.items() if not part.alone]
            passes = [names for names in [shared, *([name] for name, p in members.items() if p.alone)] if names]
            if self.rides:
                passes = [shared] if shared else []
            for names in passes:
                if self.ran != order.max_rows:
                    self.run_pass(names, order.max_rows, results)
        out = list(results.values())
        out[0].rows, out[0].seconds = self.ran, 1e-3 * (5 + self.ran)
        for result in out:
            if result.done or result.error:
                self.groups.pop(result.request_id, None)
        return out

    def begins(self, part, result) -> bool:
        """Says whether a group is part of the next pass."""
        group = self.groups[part.request_id]
        if result.done or result.error or self.half:
            return bool(self.half)
        result.waiting = group.waits > 0
        if result.waiting:
            group.waits -= 1
            return False
        if group.wanted is None:
            group.wanted = self.chance.randint(1, group.n) if self.chance.random() < self.grows else 0
        result.need = group.wanted
        return not result.need

    def run_pass(self, names, max_rows, results):
        if not self.half:
            rows = {name: self.chance.randint(1, self.groups[name].n) for name in names}
            assert sum(self.groups[name].n for name in names) <= ROWS
            self.left = sum(rows.values())
            self.counts["passes"] += 1
            self.counts["shared"] += len(names) > 1
        else:
            rows = self.half
        now = self.left if max_rows is None else min(self.left, max_rows - self.ran)
        self.ran += now
        self.left -= now
        if self.left:
            self.half = rows
            self.counts["halves"] += 1
            for name in names:
                results[name].partial = True
                results[name].step = self.groups[name].step
            return
        self.half = {}
        for name in names:
            group, result = self.groups[name], results[name]
            if group.step == group.fails:
                result.error = "by chance"
                continue
            surplus = {block for block in group.blocks if self.chance.random() < self.gives}
            group.blocks -= surplus
            result.surplus += surplus
            group.step += 1
            group.wanted = None
            result.step, result.done = group.step, group.step == group.ends
            if result.done:
                result.token_ids = [3]


class Engine:
    """Steps a scheduler and the worker as vLLM's engine core does; with asynchronous scheduling one step ahead."""

    def __init__(self, scheduler, worker, ahead: int = 0):
        self.scheduler, self.worker, self.ahead = scheduler, worker, ahead
        self.in_flight, self.ended, self.orders = [], {}, []
        self.count = 0

    def add(self, n: int | None = None, *, max_tokens=5, prompt=4, threshold=0.5, **extra) -> str:
        name, self.count = str(self.count), self.count + 1
        if n is None:
            params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        else:
            smc = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=threshold, ignore_eos=True)
            params = LLM.lead_params(smc)
            params.extra_args |= {f"smc_{key}": value for key, value in extra.items()}
        self.scheduler.add_request(
            Request(name, [1] * prompt, params, None, arrival_time=float(self.count), block_hasher=HASHER)
        )
        return name

    def abort(self, name: str) -> None:
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.ended[name] = "abort"

    def step(self, between=lambda: None):
        """Makes an engine step and returns its order; `between` happens before its output comes back."""
        output = self.scheduler.schedule()
        self.in_flight.append((output, self.worker.execute(output, self.scheduler)))
        between()
        while len(self.in_flight) > self.ahead:
            for outputs in self.scheduler.update_from_output(*self.in_flight.pop(0)).values():
                for out in outputs.outputs:
                    if out.finish_reason is not None:
                        assert out.request_id not in self.ended
                        self.ended[out.request_id] = str(out.finish_reason)
        return output.smc

    def order(self) -> tuple[set[str], int | None]:
        """Steps until there is an order with groups, and returns their ids and max_rows."""
        for _ in range(20):
            if (order := self.step()).groups:
                return {part.request_id for part in order.groups}, order.max_rows
        raise AssertionError("no order in 20 steps")

    def drain(self, limit: int = 3000) -> None:
        for _ in range(limit):
            if not self.scheduler.has_requests():
                break
            self.step()
        self.ahead = 0
        self.step()
        assert not self.scheduler.has_requests() and len(self.ended) == self.count
        assert self.scheduler._pool.get_num_free_blocks() == BLOCKS
        assert not self.scheduler._groups and not self.scheduler._half and not self.worker.half
        assert not self.scheduler.running and not self.scheduler.waiting


@pytest.fixture
def engine_of(make):
    def engine_of(ends=None, ahead=0, seed=None, rides=False, **options):
        """Without a seed for what is left to chance: no group fails, waits or grows, and each step has N rows."""
        worker = Worker(random.Random(seed), ends=ends, can_ride=rides)
        if seed is None:
            worker.grows = worker.gives = worker.fails = 0.0
            worker.waits, worker.chance.randint = (0,), lambda low, high: high
        return Engine(make(async_scheduling=ahead > 0, **options), worker, ahead)

    return engine_of


def check_books(engine: Engine) -> None:
    """The scheduler's ledger is what the worker was granted, and each block has one owner."""
    scheduler, in_flight = engine.scheduler, {p.request_id for o, _ in engine.in_flight for p in o.smc.groups}
    held = [block for g in scheduler._groups.values() for block in g.blocks]
    assert len(set(held)) == len(held) <= BLOCKS - scheduler._pool.get_num_free_blocks()
    for name, group in scheduler._groups.items():
        if group.started and name not in in_flight:
            assert set(group.blocks) == engine.worker.groups[name].blocks | set(group.to_grant)
    if scheduler._half and not in_flight:
        assert {g.request.request_id for g in scheduler._half} == set(engine.worker.half)


@pytest.mark.parametrize(
    "options",
    [
        {"max_particle_rows_per_step": 8},
        {"max_particle_rows_per_step": 8, "shared_forward": "never"},
        {"max_particle_rows_per_step": 20, "ahead": 1},
        {},
        {"max_particle_rows_per_step": 8, "rides": True},
        {"max_particle_rows_per_step": 20, "rides": True, "ahead": 1},
        {"rides": True},
    ],
    ids=["bound", "never", "ahead", "default", "rides", "rides ahead", "rides by default"],
)
def test_random_ends(engine_of, options):
    """2,500 ends of groups and requests each, in every way there is, lose no block and starve nobody."""
    engine = engine_of(seed=len(str(options)), **options)
    scheduler, worker, chance = engine.scheduler, engine.worker, engine.worker.chance
    overtaken: dict[str, int] = {}
    alone = set()

    def disturb():
        if chance.random() < 0.04 and (live := [name for name in scheduler.requests if name not in engine.ended]):
            engine.abort(chance.choice(live))
        if chance.random() < 0.004:
            scheduler.reset_prefix_cache(reset_running_requests=True)

    while len(engine.ended) < 2500:
        busy = len(scheduler.requests)
        while engine.count - len(engine.ended) < 12 and chance.random() < 0.5:
            if chance.random() < 0.3:
                engine.add(max_tokens=chance.randint(1, 12), prompt=chance.randint(1, 90))
            else:
                is_alone = chance.random() < 0.2
                n = chance.choice((1, 2, 3, 5, 8, 13, 21, 34))
                name = engine.add(n, max_tokens=chance.randint(1, 9), prompt=chance.randint(1, 40), alone=is_alone)
                alone |= {name} if is_alone else set()
        disturb()
        groups = dict(scheduler._groups)
        queued = {name: g for name, g in groups.items() if g.phase == "queued"}
        ready = {
            name: g.turn
            for name, g in groups.items()
            if g.phase == "running" and not (g.in_flight or g.need or g.waiting)
        }
        half = set(worker.half)
        turns = {name: g.turn for name, g in groups.items()}
        free = not any(g.in_flight for g in groups.values())
        order = engine.step(between=disturb)
        check_books(engine)
        # nobody has a turn twice before another that is ready, but to end what is half done
        names = {part.request_id for part in order.groups}
        if names and not half and free:
            latest = max((turns[name] for name in names if name in ready), default=0)
            assert all(latest <= turn for name, turn in ready.items() if name not in names)
        for part in order.groups:
            assert part.alone == (part.request_id in alone or options.get("shared_forward") == "never")
        # particles that overtook a queued group, counted apart
        came = [g for name, g in queued.items() if g.phase != "queued" and g.blocks]
        for name, group in queued.items():
            if group.phase == "queued" and name in scheduler._groups:
                late = sum(g.n for g in came if g.request.arrival_time > group.request.arrival_time)
                assert not late or overtaken.get(name, 0) < group.n
                overtaken[name] = overtaken.get(name, 0) + late
        assert busy < 40
    engine.drain()
    counts = worker.counts
    assert counts["halves"] > 100 or not options.get("max_particle_rows_per_step")
    assert counts["undone"] > 3 or not options.get("max_particle_rows_per_step")
    assert (counts["rides"] > 100) == options.get("rides", False)
    assert (counts["shared"] > 100) == (options.get("shared_forward") != "never")
    assert {"abort", "FinishReason.ERROR", "error"} & set(engine.ended.values())


def test_potentials_are_waited_for_where_nothing_else_can_run(engine_of, monkeypatch):
    """A request that is held back is no reason to ask for them at long intervals only."""
    engine = engine_of(ends=3)
    engine.worker.waits = (1000,)
    waiting = engine.add(21)
    for _ in range(5):
        engine.step()
    assert engine.worker.groups
    engine.worker.waits, engine.worker.grows = (0,), 1.0
    growing = engine.add(34)  # wants as many blocks again, which are not there
    for _ in range(50):
        engine.step()
        if engine.scheduler._groups[growing].need:
            break
    engine.worker.grows = 0.0
    engine.worker.groups[waiting].waits = 5
    engine.add()  # is held until the group has its blocks
    now = time.monotonic()
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: now))
    assert engine.scheduler._groups[growing].need and waiting not in engine.ended
    for _ in range(40):
        engine.step()
    assert waiting in engine.ended and len(engine.ended) == 3


def running(engine: Engine, *sizes: int, **extra) -> list[str]:
    """Adds groups and steps until all of them have been in an order."""
    names = [engine.add(n, max_tokens=100, **extra) for n in sizes]
    for _ in range(50):
        if all(engine.scheduler._groups[name].started for name in names) and not engine.worker.half:
            return names
        engine.step()
    raise AssertionError("not started")


def test_half_a_pass_is_ended_before_anything_else(engine_of):
    engine = engine_of(ends=50, max_particle_rows_per_step=4)
    engine.add(max_tokens=400)
    first, second = running(engine, 5, 6)
    assert engine.order() == ({first, second}, 4) and engine.worker.left == 7
    third = engine.add(3, max_tokens=100)
    ordinary = 0
    while engine.worker.half:
        order = engine.step()
        ordinary += not order.groups
        assert not order.groups or {p.request_id for p in order.groups} == {first, second}
    assert ordinary >= 2  # and between its parts others have their steps
    for _ in range(12):
        engine.step()
    assert engine.scheduler._groups[third].started
    while not engine.worker.half:
        engine.step()
    assert set(engine.worker.half) == {first, second, third}
    # the end of one undoes the half, and the others begin their step anew
    undone = engine.worker.counts["undone"]
    engine.abort(second)
    assert engine.order()[0] == {first, third} and engine.worker.counts["undone"] == undone + 1
    engine.drain()


def test_no_bound_without_other_work(engine_of):
    engine = engine_of(ends=60, max_particle_rows_per_step=4)
    first, second = running(engine, 10, 12)
    assert engine.order() == ({first, second}, None)
    assert engine.worker.counts["halves"] == 0
    engine.add(2, max_tokens=3, prompt=400)  # a group is none: 7 steps of prefill
    assert [engine.order()[1] for _ in range(6)] == [None] * 6
    other = engine.add(max_tokens=400)
    assert engine.order()[1] == 4 and engine.worker.half
    engine.abort(other)
    order = engine.step()
    while not order.groups:
        order = engine.step()
    assert order.max_rows is None and {part.steps for part in order.groups} == {1}  # then others may join
    engine.drain()
    everything = engine_of(ends=20, max_particle_rows_per_step="all")
    everything.add(max_tokens=400)
    running(everything, 20, 30)
    assert everything.order()[1] is None


def test_groups_that_do_not_fit_a_pass_go_in_turn(engine_of, monkeypatch):
    engine = engine_of(ends=90, max_particle_rows_per_step="all")
    few = dataclasses.replace(engine.scheduler._limits, max_num_batched_tokens=20)
    monkeypatch.setattr(engine.scheduler, "_limits", few)
    engine.add(max_tokens=400)
    names = running(engine, 12, 6, 9, 9)
    seen = [engine.order()[0] for _ in range(12)]
    assert all(seen[i] != seen[i + 1] for i in range(11))
    for name in names:
        assert sum(name in order for order in seen) in (6, 7)
    sizes = dict(zip(names, (12, 6, 9, 9), strict=True))
    assert all(sum(sizes[name] for name in order) <= 20 for order in seen)


def test_groups_that_are_alone(engine_of):
    """They take turns with the others where a bound would cut a pass, and go beside them where it would not."""
    engine = engine_of(ends=90, max_particle_rows_per_step=16)
    engine.add(max_tokens=400)
    (alone,) = running(engine, 9, alone=True)
    together = running(engine, 6, 6)
    orders = []
    for _ in range(8):
        orders.append(engine.order()[0])
        while engine.worker.half:
            engine.step()
    assert orders[:2] in ([{alone}, set(together)], [set(together), {alone}]) and orders[:2] * 4 == orders
    # who becomes ready between two orders waits behind those that were there
    late = engine.add(16, max_tokens=100, alone=True)
    while engine.scheduler._groups[late].phase != "running":
        engine.step()
    due = {name for name in (alone, *together) if engine.scheduler._groups[name].turn < engine.scheduler._turn}
    assert due and engine.order()[0] == due and engine.order()[0] != due
    small = engine_of(ends=90, max_particle_rows_per_step=16, shared_forward="never")
    small.add(max_tokens=400)
    names = running(small, 5, 5, 5)
    assert all(small.order()[0] == set(names) for _ in range(4)) and small.worker.counts["shared"] == 0


def test_overtaking_is_bounded(engine_of):
    engine = engine_of(ends=10**6)
    (first,) = running(engine, 40)
    engine.worker.ends = 3
    large = engine.add(50, max_tokens=9)
    small = [engine.add(8, max_tokens=9) for _ in range(20)]
    for _ in range(200):
        engine.step()
    assert sum(name in engine.ended for name in small) == 7  # 48 < 50 particles: one more; 56: none
    assert all(name in engine.ended for name in small[:7])
    engine.worker.groups[first].ends = engine.worker.groups[first].step + 20
    for _ in range(30):
        engine.step()
    assert first in engine.ended and large in engine.ended
    engine.drain()
    # where blocks are short, later requests are held back, but not the groups that may overtake
    engine = engine_of(ends=10**6)
    (first,) = running(engine, 20)
    busy = engine.add(max_tokens=400, prompt=100)
    for _ in range(4):
        engine.step()
    engine.worker.ends = 3
    large, small, later = engine.add(32, max_tokens=9), engine.add(8, max_tokens=9), engine.add(max_tokens=3)
    for _ in range(30):
        engine.step()
    assert small in engine.ended and later not in engine.ended and engine.scheduler._groups[large].short
    for name in (first, busy):
        engine.abort(name)
    engine.drain()


def test_pace(caplog):
    logger = logging.getLogger("pace")
    pace = Pace(None, logger)
    assert pace.max_rows() == FIRST_ROWS
    pace.see_rows(LEAST_ROWS - 1, 5.0)  # says nothing of the cost of a row
    pace.see_rows(256, 0.256)
    assert pace.max_rows() == FIRST_ROWS
    with caplog.at_level(logging.INFO):
        pace.see_ordinary(0.02, 1, False)
        assert pace.max_rows() == int(DECODE_STEPS * 20) and "at most 76 rows" in caplog.text
        pace.see_ordinary(0.021, 1, False)
        assert 76 <= pace.max_rows() <= 77 and len(caplog.records) == 1  # a small change is not logged
        for _ in range(50):
            pace.see_ordinary(0.05, 1, False)
        assert abs(pace.max_rows() - 190) <= 1 and len(caplog.records) == 2
    pace.see_ordinary(2.0, 1, True)  # beside prefill; once
    assert abs(pace.max_rows() - PREFILL_SHARE * 2000) <= 1
    pace.see_ordinary(0.05, 1, False)
    assert abs(pace.max_rows() - 190) <= 1
    # a pass has a part that does not depend on its rows: the bound goes where a pass of that many takes that many steps
    for _ in range(100):
        rows = pace.max_rows()
        pace.see_rows(rows, 0.05 + 1e-3 * rows)
    assert abs(pace.max_rows() - 140) <= 2
    # riding rows wait for one decode step without them, and every so often for another
    assert not pace.wants_decode(1) and Pace(None, logger).wants_decode(1) and not Pace(7, logger).wants_decode(1)
    decode = pace.max_rows()
    for i in range(RIDES):
        assert not pace.wants_decode(1), i
        pace.see_ride()
    assert pace.wants_decode(1) and pace.max_rows() == decode
    pace.see_ordinary(2.0, 1, True)  # with prefill in it, it says nothing of a decode step
    assert pace.wants_decode(1)
    pace.see_ordinary(0.05, 1, False)
    assert not pace.wants_decode(1)
    # more requests are another step, whose time is not known; as many as before are the old one
    assert pace.wants_decode(16)
    pace.see_ordinary(0.1, 16, False)
    assert not pace.wants_decode(17) and pace.max_rows() == pace.max_rows(17) > 1.5 * decode
    assert not pace.wants_decode(1) and pace.max_rows(1) == decode
    assert Pace(7, logger).max_rows() == 7 and Pace("all", logger).max_rows() is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_particle_rows_per_step": 0}, "max_particle_rows_per_step=0: must be a positive integer, 'all' for no"),
        ({"max_particle_rows_per_step": -3}, "max_particle_rows_per_step=-3: must"),
        ({"max_particle_rows_per_step": True}, "max_particle_rows_per_step=True: must"),
        ({"max_particle_rows_per_step": 2.5}, "max_particle_rows_per_step=2.5: must"),
        ({"max_particle_rows_per_step": "none"}, "max_particle_rows_per_step='none': must"),
        ({"shared_forward": "always"}, "shared_forward='always': must be 'auto' or 'never'"),
        ({"shared_forward": None}, "shared_forward=None: must be"),
        ({"captured_steps": 1}, "captured_steps=1: must be True or False"),
        ({"shared_forwards": "never"}, "shared_forwards='never': vllm.LLM has no such argument; shared_forward?"),
        (
            {"additional_config": {"fastsmc": {"shared_foward": "never"}}},
            "additional_config['fastsmc']['shared_foward']='never': unknown option; shared_forward?",
        ),
        ({"additional_config": {"fastsmc": "never"}}, "additional_config['fastsmc']='never': must be a mapping"),
        (
            {"additional_config": {"fastsmc": {"shared_forward": "auto"}}, "shared_forward": "never"},
            "shared_forward='never': additional_config['fastsmc'] holds it, too",
        ),
    ],
)
def test_options_that_cannot_be(arguments, message):
    with pytest.raises(ValueError) as caught:
        engine_args(arguments)
    assert str(caught.value).startswith(message)


def test_options_reach_the_engine(make):
    """As arguments of `fastsmc.LLM`, and as a server's command line puts them."""
    out = engine_args({"max_particle_rows_per_step": 9, "additional_config": {"other": 1}})
    assert out["additional_config"] == {"other": 1, "fastsmc": {"max_particle_rows_per_step": 9}}
    assert "max_particle_rows_per_step" not in out
    assert EngineOptions.of(out["additional_config"]) == EngineOptions("auto", 9)
    assert "additional_config" not in engine_args({}) and EngineOptions.of({}) == EngineOptions()
    assert make(max_particle_rows_per_step=9)._pace.max_rows() == 9
    assert [make(captured_steps=on)._never_shared for on in (False, True)] == [False, True]
    with pytest.raises(ValueError, match="shared_forward='no'"):
        make(shared_forward="no")


@pytest.mark.parametrize("ignore_eos", [False, True])
def test_what_ends_particles_and_what_min_tokens_rules_out(engine_of, ignore_eos):
    """The latter has the model's end-of-sequence tokens whatever ignore_eos says, as in vLLM."""
    engine, smc = engine_of(ends=2), SMCParams(n_particles=2, stop_token_ids=[4], ignore_eos=ignore_eos)
    params, starts, take = LLM.lead_params(smc), [], engine.worker.run
    params.update_from_generation_config({"eos_token_id": [2, 3]}, 2)
    engine.worker.run = lambda order: starts.extend(part.start for part in order.groups if part.start) or take(order)
    engine.scheduler.add_request(Request("a", [1] * 4, params, None, arrival_time=0.0, block_hasher=HASHER))
    engine.count = 1
    engine.drain()
    (start,) = starts
    assert start.stop_token_ids == ({4} if ignore_eos else {2, 3, 4}) and start.all_stop_token_ids == {2, 3, 4}


def test_alone_is_true_or_false(engine_of):
    engine = engine_of(ends=2)
    wrong, right = engine.add(2, alone="yes"), engine.add(2, alone=True)
    assert engine.scheduler._refused[wrong][1] == "smc_alone='yes': must be true or false"
    assert engine.scheduler._groups[right].alone
    engine.drain()
