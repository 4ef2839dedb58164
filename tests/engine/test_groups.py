"""Groups that share forward passes: how many there are, and that nobody notices whose rows are beside its own."""

import itertools
import math
import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, TinyLlama, hf_log_probs, value_table
from vllm import SamplingParams

from fastsmc import Potential, SMCParams, ops
from fastsmc.potentials import Infill
from fastsmc.vllm import capacity
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.pace import Pace
from fastsmc.vllm.passes import Pass

from .conftest import VOCAB
from .test_engine import Broken, check_log_probs, prompt_of
from .test_exact import STEPS, STOP, check_unbiased

VALUE = value_table(100, VOCAB)


class Guide(TableTwist):
    """Shapes the proposal and nothing else."""

    proposal_only = True

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


class NextOnly(TableTwist):
    """Unfinished sequences are weighed by `logw_next` alone."""

    prefix = Potential.prefix


class Request:
    """What one group is asked to do."""

    def __init__(self, prompt, potential=None, exact=None, alone=False, **params):
        self.prompt, self.potential, self.exact, self.alone = prompt, potential, exact, alone
        self.params = SMCParams(**{"max_tokens": 40, "resampling": "multinomial", **params})

    def lead(self, engine, names):
        name = None
        if self.potential is not None:
            if id(self.potential) not in names:
                names[id(self.potential)] = engine.register_potential(self.potential)
            name = names[id(self.potential)]
        return engine.lead_params(self.params, name, exact=self.exact, alone=self.alone, return_population=True)


class Run:
    """Requests that come together, stepped by hand; ordinary ones are given as SamplingParams of `ordinary`."""

    def __init__(self, engine, requests, ordinary=()):
        self.engine, self.outputs, self.names = engine, {}, {}
        self.ids = [self.add(engine._prompt(r.prompt), r.lead(engine, self.names)) for r in requests]
        self.others = [self.add(engine._prompt(prompt), params) for prompt, params in ordinary]

    def add(self, prompt, params):
        request_id = str(next(self.engine.request_counter))
        self.engine.llm_engine.add_request(request_id, prompt, params)
        return request_id

    def step(self):
        for output in self.engine.llm_engine.step():
            if output.finished:
                self.outputs[output.request_id] = output

    def to_the_end(self):
        """The populations, or the error of a group that failed, or None of one that was aborted."""
        while self.engine.llm_engine.has_unfinished_requests():
            self.step()
        for name in self.names.values():
            self.engine.drop_potential(name)
        found = [self.outputs.get(i) for i in self.ids]
        payloads = [output and output.kv_transfer_params["smc"] for output in found]
        self.steps = [payload and payload.get("steps") for payload in payloads]
        return [p and (p.get("error") or self.engine.population(o)) for o, p in zip(found, payloads, strict=True)]


def run(engine, requests, ordinary=()):
    return Run(engine, requests, ordinary).to_the_end()


def each_alone(engine, requests):
    return [run(engine, [request])[0] for request in requests]


def identical(got, want):
    """Populations have the same bits."""
    names = ("tokens", "token_log_probs", "ancestors", "resampled", "ess", "step_log_weights", "log_weights")
    for a, b in zip(got, want, strict=True):
        if isinstance(b, str):
            assert a == b
            continue
        assert a.token_ids == b.token_ids and a.log_z == b.log_z
        for name in names:
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def mixed(n=16, max_tokens=40):
    """Groups of many kinds, sizes and lengths of prompt; some end early."""
    potentials = [None, TableTwist(3 * VALUE), TableTwist(VALUE), Guide(2 * VALUE), NextOnly(VALUE)]
    requests = []
    for i in range(n):
        potential = potentials[i % 5]
        exact = [[(3 * j + i + 1) % 5 for j in range(max_tokens)]] if i % 8 == 6 else None
        requests.append(
            Request(
                prompt_of([5, 32, 50, 1, 33, 64, 31][i % 7], shift=i),
                potential,
                exact,
                n_particles=[16, 3, 9, 1, 24, 2][i % 6],
                max_tokens=max_tokens - 7 * (i % 3) * (exact is None),
                temperature=[1.0, 0.7, 1.3][i % 3],
                ess_threshold=[1.0, 0.5, 0.8, 0.0][i % 4],
                resampling=["multinomial", "systematic", "ssp"][i % 3],
                proposal="base" if i % 2 and not isinstance(potential, Guide) else "twisted",
                stop_token_ids=[5] if i % 4 == 1 or exact else None,
                seed=i,
            )
        )
    return requests


@pytest.fixture
def passes(runner, monkeypatch):
    """The rows of each call of the model for groups."""
    rows, running = [], []
    original = runner.run

    def run_order(order):
        running.append(True)
        try:
            return original(order)
        finally:
            running.pop()

    def seen(module, args, kwargs):
        if running:
            rows.append(len(kwargs["input_ids"]))

    monkeypatch.setattr(runner, "run", run_order)
    hook = runner.model._model.register_forward_pre_hook(seen, with_kwargs=True)
    yield rows
    hook.remove()


# --------------------------------------------------------------------------------------- passes, and what is in them
@pytest.mark.parametrize("attention", ["as it pays", "attend", "both"])
def test_one_pass_per_step_and_the_bits_of_each_alone(
    engine, runner, tiny_path, passes, all_blocks_back, monkeypatch, attention
):
    """Sixteen groups of all kinds: as many passes as the longest has steps, and each group is what it is alone and what
    a recompute says, whichever way it attends; over the budget of a pass too, with as few passes as hold the rows."""
    if attention != "as it pays":
        always = attention == "attend"
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda self, plan, length, group: always or length % 3 > 0)
    requests = mixed()
    together = Run(engine, requests)
    populations = together.to_the_end()
    assert min(together.steps) < max(together.steps) == len(passes)
    assert passes[0] == len(requests) and 50 < max(passes) <= sum(r.params.n_particles for r in requests)
    rows = passes.copy()
    passes.clear()
    with monkeypatch.context() as patch:
        patch.setattr(runner.model, "max_tokens", 48)
        identical(run(engine, requests), populations)
    assert len(passes) == sum(-(-n // 48) for n in rows) > len(rows)
    identical(populations, each_alone(engine, requests))
    if attention == "as it pays":
        for request, population in zip(requests, populations, strict=True):
            check_log_probs(tiny_path, request.prompt, population, request.params.temperature)


@pytest.mark.parametrize(("groups", "n"), [(64, 8), (4, 64)])
def test_passes_of_many_groups_and_of_large_ones(engine, passes, all_blocks_back, groups, n):
    requests = [
        Request(prompt_of(3 + 5 * i % 16), TableTwist(VALUE), n_particles=n, max_tokens=9, ess_threshold=1.0, seed=i)
        for i in range(groups)
    ]
    together = run(engine, requests)
    assert len(passes) == 9 and passes[0] == groups
    identical(together[-3:], each_alone(engine, requests[-3:]))


ORDINARY = [
    (prompt_of(150), SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True)),
    (PROMPT, SamplingParams(max_tokens=30, temperature=1.0, seed=6, ignore_eos=True)),
    (prompt_of(100, 1), SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)),
]


def test_beside_ordinary_requests_and_chunked_prefills(engine, scheduler, tiny_path, all_blocks_back, monkeypatch):
    """Prompts are prefilled in pieces of 40 tokens at most, so groups come one after the other: the same bits."""
    requests = mixed(9)
    want = each_alone(engine, requests)
    tokens = [
        list(run_.outputs[run_.others[0]].outputs[0].token_ids)
        for run_ in (Run(engine, [], [o]) for o in ORDINARY)
        if run_.to_the_end() == []
    ]
    scheduler.reset_prefix_cache()
    monkeypatch.setattr(scheduler, "max_num_scheduled_tokens", 40)
    both = Run(engine, requests, ORDINARY)
    identical(both.to_the_end(), want)
    assert [list(both.outputs[i].outputs[0].token_ids) for i in both.others] == tokens


def test_unbiased_with_three_targets_side_by_side(engine, tiny_path, all_blocks_back):
    """E[Ẑ] = Z for groups of different potentials, proposals, temperatures and ends in the same passes."""
    potentials = [TableTwist(value_table(STEPS, VOCAB, seed)) for seed in (1, 5, 6)]
    changes = [
        {"ess_threshold": 1.0, "stop_token_ids": [STOP]},
        {"proposal": "base", "temperature": 0.8, "ess_threshold": 0.7, "stop_token_ids": [STOP, 1]},
        {"proposal": "base", "resampling": "ssp"},
    ]
    n_runs = 80
    requests = [
        Request(PROMPT, potential, n_particles=6, max_tokens=STEPS, seed=12, group=i, **change)
        for i in range(n_runs)
        for potential, change in zip(potentials, changes, strict=True)
    ]
    populations = run(engine, requests)
    for i, (potential, change) in enumerate(zip(potentials, changes, strict=True)):
        stop, temperature = frozenset(change.get("stop_token_ids", ())), change.get("temperature", 1.0)
        tiny = TinyLlama(tiny_path, VOCAB, STEPS, stop, temperature)
        check_unbiased(tiny, populations[i::3], potential.log_phi)


# ---------------------------------------------------------------------------------------------- ends of every kind
@pytest.fixture(scope="module")
def trio(engine):
    """Three groups, two of them of one kind, and what each is alone."""
    requests = [
        Request(prompt_of(50), TableTwist(3 * VALUE), n_particles=12, ess_threshold=1.0, seed=1),
        Request(PROMPT, TableTwist(VALUE), n_particles=9, ess_threshold=0.8, seed=2, temperature=0.8),
        Request(prompt_of(31), TableTwist(3 * VALUE), n_particles=7, ess_threshold=1.0, seed=3, proposal="base"),
    ]
    return requests, each_alone(engine, requests)


def step_until(run_, condition):
    for _ in range(500):
        if condition():
            return
        run_.step()
    raise AssertionError("it never came to that")


def test_abort_and_preemption_in_the_middle(engine, runner, scheduler, all_blocks_back, trio):
    requests, want = trio
    for gone in range(3):
        together = Run(engine, requests)
        step_until(together, lambda: any(member.group.t > 5 for member in runner.groups.values()))
        engine.llm_engine.abort_request([together.ids[gone]])
        got = together.to_the_end()
        assert got[gone] is None
        identical(got[:gone] + got[gone + 1 :], want[:gone] + want[gone + 1 :])
    together = Run(engine, requests)
    step_until(together, lambda: len(runner.groups) == 3 and all(m.group.t > 5 for m in runner.groups.values()))
    assert scheduler.reset_prefix_cache(reset_running_requests=True)
    identical(together.to_the_end(), want)


def test_a_dry_pool(small_engine, engine):
    """Groups that outgrow 40 blocks together wait for each other, and are what they are in a cache that holds all."""
    pool = small_engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    requests = [
        Request(prompt_of(3 + i), TableTwist(VALUE), n_particles=n, max_tokens=50, ess_threshold=0.05, seed=i)
        for i, n in enumerate([10, 10, 4])
    ]
    n_waited = 0
    together = Run(small_engine, requests)
    scheduler = small_engine.llm_engine.engine_core.engine_core.scheduler
    while small_engine.llm_engine.has_unfinished_requests():
        together.step()
        n_waited += any(group.need for group in scheduler._groups.values())
    assert n_waited > 0
    identical(together.to_the_end(), each_alone(engine, requests))
    assert pool.get_num_free_blocks() == free


def test_a_potential_and_a_pass_that_fail(engine, runner, all_blocks_back, trio, monkeypatch):
    """A potential ends its own group; a pass those that shared it, by name, and no group that is alone."""
    requests, want = trio
    bad = Request(PROMPT, Broken("raises"), n_particles=5, seed=1)
    for order in ([bad, *requests], [*requests[:2], bad, requests[2]]):
        got = run(engine, order)
        place = order.index(bad)
        assert "Broken.prefix at step 3: raised KeyError" in got.pop(place)
        identical(got, want)
    alone = Request(requests[0].prompt, requests[0].potential, alone=True, n_particles=12, ess_threshold=1.0, seed=1)
    forward, calls = runner.model.forward, 0

    def fails(batch):
        nonlocal calls
        if len(batch.tokens) > 12 and (calls := calls + 1) == 4:
            raise MemoryError("no room")
        return forward(batch)

    together = Run(engine, [*requests, alone])
    monkeypatch.setattr(runner.model, "forward", fails)
    got = together.to_the_end()
    error = "internal error in a forward pass that 3 groups shared: MemoryError: no room"
    assert got[:3] == [error] * 3
    identical(got[3:], want[:1])


def test_two_hundred_random_ends(small_engine, monkeypatch):
    """Groups that finish, fail, are aborted or preempted or find no blocks, beside ordinary requests and with passes
    cut anyhow: nothing is left of any."""
    core = small_engine.llm_engine.engine_core.engine_core
    scheduler, runner = core.scheduler, core.model_executor.driver_worker.worker.smc_runner
    free, rng = scheduler.kv_cache_manager.block_pool.get_num_free_blocks(), random.Random(4)
    potentials = [None, TableTwist(3 * VALUE), NextOnly(VALUE), Broken("raises"), Infill([1, 2], True)]
    ended, cut = Counter(), 0
    for _ in range(10):
        monkeypatch.setattr(scheduler, "_pace", Pace(rng.choice([2, 9, "all"]), scheduler._pace._logger))
        requests = [
            Request(
                prompt_of(rng.randint(1, 40), rng.randint(0, 5)),
                rng.choice(potentials),
                alone=rng.random() < 0.2,
                n_particles=rng.randint(1, 9),
                max_tokens=rng.randint(1, 50),
                ess_threshold=rng.choice([0.0, 0.5, 1.0]) if rng.random() < 0.5 else 1.0,
                proposal=rng.choice(["twisted", "base"]),
                stop_token_ids=rng.choice([None, [5]]),
                seed=rng.randint(0, 99),
            )
            for _ in range(20)
        ]
        together = Run(small_engine, requests, [(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True))] * 2)
        while small_engine.llm_engine.has_unfinished_requests():
            together.step()
            cut += runner._half is not None
            if rng.random() < 0.1:
                small_engine.llm_engine.abort_request([rng.choice(together.ids)])
            if rng.random() < 0.02:
                scheduler.reset_prefix_cache(reset_running_requests=True)
        for got in together.to_the_end():
            ended["aborted" if got is None else got.split(":")[0] if isinstance(got, str) else "finished"] += 1
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
        assert not scheduler._groups and not scheduler._half and runner._half is None
        assert not runner.groups and not runner.tables._groups and not runner._waiting
    assert ended.total() == 200 and min(ended["finished"], ended["aborted"]) > 40 and cut > 50
    assert {"potential Broken.prefix at step 3"} <= set(ended) and not any("internal" in end for end in ended), ended


# ------------------------------------------------------------------------------------------- passes that are cut
def test_parts_are_few_and_of_equal_size():
    for n_rows, max_rows in itertools.product(range(1, 40), range(1, 45)):
        part, ends = SimpleNamespace(n_rows=n_rows, n_run=0), [0]
        while part.n_run < n_rows:
            part.n_run = Pass._cut(part, max_rows)
            ends.append(part.n_run)
        sizes = [b - a for a, b in itertools.pairwise(ends)]
        assert sum(sizes) == n_rows and max(sizes) <= max_rows and max(sizes) - min(sizes) <= 1, (n_rows, max_rows)
        assert len(sizes) == math.ceil(n_rows / max_rows)


@pytest.mark.parametrize("bound", [1, 3, 7, 64, "all"])
def test_the_bits_do_not_hang_on_the_bound(engine, runner, scheduler, all_blocks_back, monkeypatch, passes, bound):
    """Beside a request that decodes all the while; with a bound, passes are cut in as many parts as it says, and keep
    what is counted in the memory that is taken off the KV cache."""
    requests = [
        Request(prompt_of(50), TableTwist(3 * VALUE), n_particles=6, max_tokens=14, ess_threshold=1.0, seed=1),
        Request(PROMPT, TableTwist(VALUE), n_particles=3, max_tokens=9, seed=2, temperature=0.8, stop_token_ids=[5]),
        Request(prompt_of(31), Infill([2, 4], True), n_particles=4, max_tokens=12, ess_threshold=1.0, seed=3),
    ]
    want = each_alone(engine, requests)
    monkeypatch.setattr(scheduler, "_pace", Pace(bound, scheduler._pace._logger))
    passes.clear()
    beside = [(PROMPT, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))]
    together, n_half = Run(engine, requests, beside), 0
    while not set(together.ids) <= set(together.outputs):
        together.step()
        if runner._half is not None:
            n_half += 1
            rows, (logits, hidden) = runner._half[0].n_rows, runner._half[0]._found
            kept = sum(x.untyped_storage().nbytes() for x in (logits, hidden))
            # the rows of logits are padded
            assert kept <= capacity.half_pass_bytes(rows, logits.stride(0), hidden.shape[1], logits.itemsize)
    assert together.others[0] not in together.outputs  # it was there all the while
    engine.llm_engine.abort_request(together.others)
    identical(together.to_the_end(), want)
    if bound in (1, 3, 7):
        assert n_half > 14 / bound
    else:
        assert n_half == 0


def test_rows_of_one_parent_stay_together(engine, runner, all_blocks_back, monkeypatch):
    """What a pass reads more when it is cut is far less than by a cut in the order of slots, by the parts' plans."""
    requests = [
        Request(prompt_of(20, i), TableTwist(VALUE), n_particles=40, max_tokens=100, ess_threshold=1.0, seed=i)
        for i in range(2)
    ]
    monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
    monkeypatch.setattr(Attend, "pays", lambda self, plan, length, group: length % 3 > 0)
    want, bound, blocks = run(engine, requests), 13, Counter()
    order_to_cut = Pass._order_to_cut

    def compare(self):
        order = order_to_cut(self)
        assert sorted(order.tolist()) == list(range(self.n_rows))
        for name, rows in (("slots", order.sort().values), ("plan", order)):
            batch = self._batch.reordered(rows)
            for begin in range(0, self.n_rows, bound):
                part = batch.part(begin, min(begin + bound, self.n_rows))
                blocks[name] += count_blocks(part)
        blocks["whole"] += count_blocks(self._batch)
        return order

    def count_blocks(batch):
        if not batch.shared:
            return 0
        size = runner.model.block_size
        return ops.plan_attend(batch.table.cpu(), batch.lengths.cpu(), block_size=size, backend="cpu").n_reads

    monkeypatch.setattr(Pass, "_order_to_cut", compare)
    monkeypatch.setattr(runner.model, "max_tokens", bound)
    identical(run(engine, requests), want)
    more = {name: blocks[name] - blocks["whole"] for name in ("plan", "slots")}
    assert 0 < more["plan"] < 2 / 3 * more["slots"], blocks


@pytest.mark.parametrize("end", ["abort", "preemption", "failure", "the other request ends"])
def test_ends_in_the_middle_of_a_pass(engine, runner, scheduler, all_blocks_back, monkeypatch, trio, end):
    requests, want = trio
    monkeypatch.setattr(scheduler, "_pace", Pace(8, scheduler._pace._logger))
    beside = [(PROMPT, SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True))]
    together = Run(engine, requests, beside)
    groups = runner.groups.values()
    step_until(together, lambda: len(groups) == 3 and runner._half and all(m.group.t > 2 for m in groups))
    assert 0 < runner._half[0].n_run < runner._half[0].n_rows
    gone = []
    if end == "abort":
        gone = [together.ids[1]]
    elif end == "preemption":
        assert scheduler.reset_prefix_cache(reset_running_requests=True)
    elif end == "failure":
        with monkeypatch.context() as patch:
            patch.setattr(scheduler, "_rides", False)  # a pass of their own: in one of both, the engine ends
            patch.setattr(runner.model.riding, "why_not", "this test")
            patch.setattr(runner.model, "forward", None)
            step_until(together, lambda: not runner.groups)
    else:
        gone = together.others
    if end != "the other request ends":
        gone = [*gone, *together.others]
    engine.llm_engine.abort_request(gone)
    got = together.to_the_end()
    if end == "abort":
        assert got.pop(1) is None
        identical(got, [want[0], want[2]])
    elif end == "failure":
        assert all("in a forward pass that 3 groups shared: TypeError" in error for error in got)
    else:
        identical(got, want)
    assert runner._half is None


# --------------------------------------------------------------------------------------------------- continuations
def test_continuations_of_all_groups_in_one_pass(engine, tiny_path, passes, all_blocks_back):
    """Two passes per step: one for the next tokens, one for the continuations of all groups, whatever their kind and
    their continuation; and they are what a recompute says."""
    wanted = [[2], [1, 4, 6], list(range(8)) * 5, [7, 7]]
    params = {"n_particles": 8, "max_tokens": 24, "ess_threshold": 0.0, "temperature": 0.8}
    requests = [
        Request(prompt_of(20 + 6 * i), Infill(ids, every_step=True), seed=i, resampling=scheme, **params)
        for i, (ids, scheme) in enumerate(zip(wanted, ("ssp", "ssp", "systematic", "ssp"), strict=True))
    ]
    requests.append(Request(PROMPT, TableTwist(VALUE), n_particles=5, max_tokens=24, ess_threshold=1.0))
    together = run(engine, requests)
    assert len(passes) == 2 * 24
    for ids, request, population in zip(wanted, requests, together, strict=False):
        check_log_probs(tiny_path, request.prompt, population, 0.8)
        whole = [tokens + ids for tokens in population.token_ids]
        for i, scores in enumerate(hf_log_probs(tiny_path, request.prompt, whole, 0.8)):
            assert abs(scores[-len(ids) :].sum() - population.log_weights[i]) <= 5e-4 * len(ids)
    identical(together, each_alone(engine, requests))
    # only at their ends, which come at different steps
    requests = [
        Request(
            prompt_of(20 + i), Infill(ids), seed=i, n_particles=8, max_tokens=30, stop_token_ids=[5], ess_threshold=0.0
        )
        for i, ids in enumerate(wanted)
    ]
    passes.clear()
    together = run(engine, requests)
    ends = {len(tokens) for population in together for tokens in population.token_ids}
    assert len(passes) == max(ends) + len(ends) and len(ends) > 9
    identical(together, each_alone(engine, requests))


# ---------------------------------------------------------------------------------------------- groups that are alone
def test_groups_that_share_no_pass(engine, scheduler, passes, all_blocks_back, trio, monkeypatch):
    """`smc_alone` keeps one group's rows out of the others' passes; shared_forward="never" those of each."""
    requests, want = trio
    alone = [Request(r.prompt, r.potential, alone=True, **vars_of(r.params)) for r in requests]
    identical(run(engine, [requests[0], alone[1], requests[2]]), want)
    assert len(passes) == 2 * 40 and sorted(passes[:2]) == [2, 2]
    passes.clear()
    monkeypatch.setattr(scheduler, "_never_shared", True)
    identical(run(engine, requests, ORDINARY), want)
    assert len(passes) == 3 * 40 and max(passes) <= 12


def vars_of(params):
    return {name: getattr(params, name) for name in params.__dataclass_fields__}
