"""Groups whose steps the captured driver takes inside vLLM: the populations are the eager one's, bit for bit."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, value_table
from vllm import SamplingParams

from fastsmc import Potential, SMCParams
from fastsmc.interventions import Temperature
from fastsmc.potentials import Infill, Lexicon
from fastsmc.smc.captured import CapturedGroup
from fastsmc.vllm.captured import CapturedMember
from fastsmc.vllm.model import Model

from .conftest import VOCAB, make_engine
from .test_engine import prompt_of
from .test_groups import Request, Run, each_alone, identical, run

VALUE = value_table(100, VOCAB)


class Twist(TableTwist):
    capturable = True

    def _so_far(self, state):
        tokens = state.tokens  # all columns there will ever be, or those so far: added one by one, so that bits agree
        if tokens.shape[1] == 0:
            return super()._so_far(state)
        values = self.value[: tokens.shape[1]].T[tokens.clamp(min=0), torch.arange(tokens.shape[1])]
        return torch.where(tokens >= 0, values, 0.0).cumsum(1)[:, -1]


class NextOnly(Twist):
    """Unfinished sequences are weighed by `logw_next` alone."""

    prefix = Potential.prefix


class Shy(Twist):
    """Turns out not to shape the proposal at the first step."""

    def logw_next(self, state):
        return None


class Broken(Twist):
    """Says NaN of its third particle at step 3."""

    def prefix(self, state):
        bad = (torch.arange(len(state.finished)) == 2) & (torch.as_tensor(state.step) == 3)
        return torch.where(bad, torch.nan, super().prefix(state))


@pytest.fixture(scope="module")
def captured(tiny_path):
    """An engine with the option, and 40 KV blocks of 32 tokens."""
    return make_engine(tiny_path, num_gpu_blocks_override=41, max_num_seqs=64, captured_steps=True)


@pytest.fixture(scope="module")
def core(captured):
    return captured.llm_engine.engine_core.engine_core


@pytest.fixture(scope="module")
def captured_runner(core):
    return core.model_executor.driver_worker.worker.smc_runner


@pytest.fixture(autouse=True)
def nothing_left(captured, core, captured_runner):
    pool = core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    yield
    captured.generate(
        [{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=1), use_tqdm=False
    )  # takes the last drop
    assert pool.get_num_free_blocks() == free and not core.scheduler._groups
    assert not captured_runner.captured and not captured_runner.groups and not captured_runner.tables._groups


@pytest.fixture
def calls(monkeypatch):
    """(length of the prompt, what was called) of captured groups: their orders, steps, and waits for the device."""
    seen = []

    def count(kind, name, prompt):
        called = getattr(kind, name)

        def counted(self, *args):
            seen.append((len(prompt(self)), name))
            return called(self, *args)

        monkeypatch.setattr(kind, name, counted)

    count(CapturedMember, "run", lambda member: member.start.prompt)
    for name in ("advance", "missing", "look"):
        count(CapturedGroup, name, lambda group: group.prompt)
    return seen


def test_counterfactuals_are_not_captured(engine, captured, calls):
    """Nor are the facts of a text: others look at their steps."""
    params, text = SMCParams(n_particles=6, max_tokens=20, ignore_eos=True), prompt_of(40, 3)
    want, found = (each.counterfactual(PROMPT, text, Temperature(1.7), params=params) for each in (engine, captured))
    assert found.token_ids == want.token_ids and np.abs(found.stay - want.stay).max() < 5e-4
    facts = [each.facts(PROMPT, text).logits for each in (engine, captured)]
    assert (facts[0] - facts[1]).abs().max() < 5e-4 and not calls


POTENTIALS = [None, Lexicon(token_ids=[1, 4], weight=0.7), Twist(3 * VALUE), NextOnly(VALUE), Shy(VALUE)]


@pytest.mark.parametrize("potential", POTENTIALS, ids=lambda p: type(p).__name__)
def test_the_population_of_the_eager_driver(engine, captured, calls, potential):
    """Over block boundaries from every place in a block, never resampled and always, with early ends and a group of
    one particle; bit for bit. The host waits once per order and once per column of blocks."""
    requests = [
        Request(
            prompt_of(length, i),
            potential,
            n_particles=[7, 1, 12, 9][i % 4],
            max_tokens=[40, 36, 9, 1, 40][i % 5],
            ess_threshold=[1.0, 0.5, 0.0][i % 3],
            resampling=["multinomial", "systematic", "ssp"][i % 3],
            proposal=["twisted", "base"][i % 2],
            temperature=[1.0, 0.8][i % 2],
            stop_token_ids=[None, [5]][i // 2 % 2],
            seed=i,
        )
        for i, length in enumerate([1, 5, 31, 32, 33, 64, 30])
    ]
    got = each_alone(captured, requests)
    assert any(len(t) < p.T for p in got for t in p.token_ids)  # some ended early
    for request, population in zip(requests, got, strict=True):
        count = Counter(name for length, name in calls if length == len(request.prompt))
        steps, columns = count["advance"], (len(request.prompt) % 32 + count["advance"]) // 32
        assert population.T <= steps <= min(population.T + 7, request.params.max_tokens)
        assert count["look"] == count["run"] + 1 <= steps // 8 + 4 and count["missing"] <= columns
    identical(got, each_alone(engine, requests))


def test_side_by_side_beside_ordinary_requests_and_others(engine, captured, captured_runner):
    """Captured groups, two that cannot be, and ordinary requests: each what it is alone."""
    requests = [
        Request(prompt_of(33), Twist(3 * VALUE), n_particles=6, seed=1),
        Request(prompt_of(3), Infill([1, 2]), n_particles=4, max_tokens=12, seed=2),
        Request(prompt_of(8), None, n_particles=5, seed=3, stop_token_ids=[5]),
        Request(PROMPT, Twist(VALUE), [[(3 * j) % 5 for j in range(20)]], n_particles=4, max_tokens=20, seed=4),
    ]
    ordinary = SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True)
    alone = captured.generate([{"prompt_token_ids": PROMPT}], ordinary, use_tqdm=False)[0].outputs[0].token_ids
    together = Run(captured, requests, [(PROMPT, ordinary)] * 2)
    kinds = set()
    while captured.llm_engine.has_unfinished_requests():
        together.step()
        kinds.add((len(captured_runner.captured), len(captured_runner.groups)))
    assert (2, 2) in kinds
    identical(together.to_the_end(), each_alone(engine, requests))
    assert [together.outputs[i].outputs[0].token_ids for i in together.others] == [alone] * 2


def test_a_dry_pool_and_blocks_that_come_later(engine, captured, core):
    """Groups grow by grants, wait for each other where the pool is dry, and are what they are in a larger one."""
    requests = [
        Request(prompt_of(3 + i), Twist(VALUE), n_particles=n, max_tokens=50, ess_threshold=0.05, seed=i)
        for i, n in enumerate([10, 10, 4])
    ]
    together, n_waited = Run(captured, requests), 0
    while captured.llm_engine.has_unfinished_requests():
        together.step()
        n_waited += any(group.need for group in core.scheduler._groups.values())
    assert n_waited > 1
    identical(together.to_the_end(), each_alone(engine, requests))
    too_large = Request(PROMPT, Twist(VALUE), n_particles=16, max_tokens=90, ess_threshold=0.01, seed=1)
    (got,) = run(captured, [too_large])
    assert got.startswith("the KV cache is full: the group needs 16 more blocks")


def test_failures_are_said_as_ever(engine, captured):
    requests = [Request(PROMPT, Broken(VALUE), n_particles=5, proposal="base", seed=1)]
    got = run(captured, requests)
    assert got == ["potential Broken.prefix at step 3: particle 2 got nan; must be finite or -inf"]
    assert got == run(engine, requests)

    class Raises(Twist):
        def complete(self, state):
            raise KeyError("no such key")

    (got,) = run(captured, [Request(PROMPT, Raises(VALUE), n_particles=5, seed=1)])
    assert got.startswith("potential Raises.complete at step 1: raised KeyError")


def test_a_call_of_the_model_that_fails(captured, monkeypatch):
    def fails(self, batch):
        raise MemoryError("no room")

    monkeypatch.setattr(Model, "forward", fails)
    assert run(captured, [Request(PROMPT, None, n_particles=5)]) == ["internal error: MemoryError: no room"]


def test_abort_and_preemption_in_the_middle(engine, captured, captured_runner, core):
    requests = [Request(prompt_of(30 + i), Twist(2 * VALUE), n_particles=6, max_tokens=60, seed=i) for i in range(2)]
    want = each_alone(engine, requests)
    for end in ("abort", "preemption"):
        together = Run(captured, requests)
        while not captured_runner.captured or min(m.group.t for m in captured_runner.captured.values()) < 9:
            together.step()
        if end == "abort":
            captured.llm_engine.abort_request([together.ids[0]])
        else:
            assert core.scheduler.reset_prefix_cache(reset_running_requests=True)
        got = together.to_the_end()
        identical(got[end == "abort" :], want[end == "abort" :])
        assert end == "preemption" or got[0] is None


def test_random_ends(captured, core, captured_runner):
    """60 groups that finish, fail, are aborted or preempted or find no blocks: nothing is left of any."""
    rng, pool = random.Random(5), core.scheduler.kv_cache_manager.block_pool
    free, ended = pool.get_num_free_blocks(), set()
    for _ in range(3):
        requests = [
            Request(
                prompt_of(rng.randint(1, 40), rng.randint(0, 5)),
                rng.choice([*POTENTIALS, Broken(VALUE), Broken(VALUE), Infill([1, 2], True)]),
                n_particles=rng.randint(1, 9),
                max_tokens=rng.randint(1, 50),
                ess_threshold=rng.choice([0.0, 1.0, 1.0]),
                proposal=rng.choice(["twisted", "base"]),
                stop_token_ids=rng.choice([None, [5]]),
                seed=rng.randint(0, 99),
            )
            for _ in range(20)
        ]
        together = Run(captured, requests, [(PROMPT, SamplingParams(max_tokens=20, ignore_eos=True))])
        while captured.llm_engine.has_unfinished_requests():
            together.step()
            if rng.random() < 0.1:
                captured.llm_engine.abort_request([rng.choice(together.ids)])
            if rng.random() < 0.02:
                core.scheduler.reset_prefix_cache(reset_running_requests=True)
        for got in together.to_the_end():
            ended.add("aborted" if got is None else got.split(":")[0] if isinstance(got, str) else "finished")
        assert pool.get_num_free_blocks() == free
    assert {"finished", "aborted", "potential Broken.prefix at step 3"} <= ended
    assert not any("internal" in end for end in ended), ended


def test_what_is_said_of_each_step_is_the_eager_drivers(engine, captured, captured_runner):
    """A group that is asked for more than the captured driver knows is run by the eager one, to the same bits."""
    params = Request(PROMPT, n_particles=6, max_tokens=20, seed=1).params
    populations = []
    for progress in (False, True):
        lead = captured.lead_params(params, return_population=True)
        lead.extra_args["smc_progress"] = progress
        captured.llm_engine.add_request(str(progress), captured._prompt(PROMPT), lead)
        seen, outputs = set(), []
        while captured.llm_engine.has_unfinished_requests():
            outputs += captured.llm_engine.step()
            seen |= {len(captured_runner.captured) * "captured" + len(captured_runner.groups) * "eager"}
        assert ("eager" if progress else "captured") in seen and len(seen - {""}) == 1
        populations.append(captured.population(outputs[-1]))
    assert len(outputs[-1].kv_transfer_params["smc"]["progress"]) > 0
    identical(populations[:1], populations[1:])
