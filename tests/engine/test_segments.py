"""Segments in the real engine: rows of unequal length, groups that are parked while their potentials find answers."""

import dataclasses
import math
import time
from concurrent.futures import Future

import numpy as np
import pytest
from tiny import PROMPT, TinyLlama, hf_log_probs
from vllm import SamplingParams

from fastsmc import Potential, SMCError, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.potentials import Infill
from fastsmc.potentials.waiting import in_background

from .conftest import VOCAB
from .test_attend import always  # noqa: F401  a fixture
from .test_engine import prompt_of, same
from .test_twist import save_twist

STOP = 5


class Counts(Potential):
    """ψ falls with the 2s of a particle, and remembers what it was asked about."""

    def prefix(self, state):
        return -0.7 * (state.tokens == 2).sum(1).double()


class Slow(Counts):
    """Answers what it has looked at in the background, `seconds` later."""

    def __init__(self, seconds=0.05, error=None):
        self.seconds, self.error, self.known = seconds, error, None

    def fetch(self, state, about):
        assert bool(about.any()) and not bool((about & ~(state.last_tokens >= 0)).any())
        scores, at_boundary = super().prefix(state), state.step > 20
        self.known = None

        def look(future):
            time.sleep(self.seconds)
            if self.error is not None and at_boundary:
                raise self.error
            self.known = scores

        return in_background(look)

    def prefix(self, state):
        return super().prefix(state) if state.step == 0 else self.known


WAYS = [
    dict(segment_token_ids=[1], max_segment_tokens=17), dict(max_segment_tokens=16), dict(segment_token_ids=[3, STOP]),
]  # fmt: skip


def check_rows(path, prompt, population):
    """Each particle's log-probs are those of a full recompute."""
    for i, want in enumerate(hf_log_probs(path, prompt, population.token_ids)):
        drawn = population.tokens[np.arange(population.T), population.lineage(i)] >= 0
        assert np.abs(population.token_log_probs[i][drawn] - want).max() <= 5e-4
        assert (population.token_log_probs[i][~drawn] == 0).all()


@pytest.mark.parametrize(
    ("way", "length"), [(WAYS[0], 1), (WAYS[0], 31), (WAYS[0], 32), (WAYS[0], 60), (WAYS[1], 31), (WAYS[2], 31)]
)
def test_log_probs_equal_a_full_recompute(engine, tiny_path, all_blocks_back, way, length):
    """Over three block boundaries, with rows of unequal length that are copied onto each other, and early ends."""
    prompt = prompt_of(length)
    params = SMCParams(
        n_particles=12, max_tokens=100, ess_threshold=1.0, resampling="multinomial", proposal="base", seed=3,
        stop_token_ids=[STOP] if STOP in way.get("segment_token_ids", ()) else None, **way,
    )  # fmt: skip
    population = engine.smc(prompt, params, Counts())
    check_rows(tiny_path, prompt, population)
    assert 1 < len(population.boundaries) < population.T / 3
    lengths = {len(ids) for ids in population.token_ids}
    if "max_segment_tokens" in way:
        assert lengths == {100}
        assert (population.T > 100) == (len(way) > 1)  # some waited
        assert len(np.unique(population.ancestors[population.boundaries[2] + 1])) < 12
    else:
        assert len(lengths) > 1


def test_rows_of_unequal_length_attend(engine, tiny_path, always, all_blocks_back):  # noqa: F811
    """`attend` reads blocks that such rows share once, and of each row as much as it has."""
    prompt = prompt_of(70)
    params = SMCParams(
        n_particles=12, max_tokens=90, ess_threshold=1.0, resampling="multinomial", proposal="base", seed=4, **WAYS[0]
    )
    population = engine.smc(prompt, params, Counts())
    check_rows(tiny_path, prompt, population)
    assert population.T > 90 and len(always) > 90
    assert any(reads < rows * 4 for rows, shared, reads in always if rows > 6 and shared == 2)


class Looks(Infill):
    """Scores its continuation after unfinished particles too, with a call of its own."""

    continuation_in_prefix = False

    def prefix(self, state):
        return self._engine.continuation_log_prob(self._ids[:-1]) if state.step else super().prefix(state)


@pytest.mark.parametrize("kind", [Infill, Looks])
def test_continuations_after_particles_that_wait(engine, tiny_path, all_blocks_back, kind):
    """Scored at boundaries only, after rows of unequal length, over blocks that are opened ahead."""
    prompt, ids = prompt_of(40), [4, 2, 6, 1] * 10
    params = SMCParams(
        n_particles=10, max_tokens=60, ess_threshold=0.0, proposal="base", seed=1, segment_token_ids=[1, 3, 6],
        max_segment_tokens=30, stop_token_ids=[STOP],
    )  # fmt: skip
    population = engine.smc(prompt, params, kind(ids, every_step=True) if kind is Infill else kind(ids))
    check_rows(tiny_path, prompt, population)
    scores = [row[-40:].sum() for row in hf_log_probs(tiny_path, prompt, [[*t, *ids] for t in population.token_ids])]
    np.testing.assert_allclose(population.log_weights, scores, atol=2e-3)
    at = population.boundaries[0]
    first = [[v for v in population.tokens[: at + 1, i].tolist() if v >= 0] for i in range(10)]
    rows = hf_log_probs(tiny_path, prompt, [[*t, *ids] for t in first])
    want = [
        row[-40:].sum() if kind is Infill or t[-1] == STOP else row[-40:-1].sum()
        for row, t in zip(rows, first, strict=True)
    ]
    np.testing.assert_allclose(population.step_log_weights[at], want, atol=2e-3)
    assert len({len(t) for t in first}) > 1


def test_unbiased_in_the_engine(engine, tiny_path, all_blocks_back):
    tiny = TinyLlama(tiny_path, VOCAB, 4, frozenset([STOP]))
    params = SMCParams(
        n_particles=6, max_tokens=4, ess_threshold=1.0, proposal="base", segment_token_ids=[1, 4], seed=2,
        max_segment_tokens=3, stop_token_ids=[STOP],
    )  # fmt: skip
    z = np.array([math.exp(p.log_z) for p in engine.smc([PROMPT] * 150, params, Counts())])
    want = math.exp(tiny.log_z(lambda s: -0.7 * s.count(2)))
    assert abs(z.mean() - want) < 4 * z.std(ddof=1) / math.sqrt(len(z))


def test_groups_beside_each_other(engine, all_blocks_back):
    """Groups with segments and without share passes; one whose blocks are preempted begins anew."""
    prompts = [prompt_of(30 + i) for i in range(4)]
    each = [
        SMCParams(n_particles=8, max_tokens=70, ess_threshold=1.0, proposal="base", group=i, **way)
        for i, way in enumerate([*WAYS[:2], dict(), dict(segment_token_ids=[2], max_segment_tokens=9)])
    ]  # fmt: skip
    alone = [engine.smc(p, params, Counts()) for p, params in zip(prompts, each, strict=True)]
    for population, want in zip(engine.smc(prompts, each, Counts()), alone, strict=True):
        same(population, want)
    one_token = dataclasses.replace(each[2], max_segment_tokens=1)
    same(engine.smc(prompts[2], one_token, Counts()), alone[2])


def test_small_cache(small_engine, tiny_path):
    """40 blocks: groups that wait for blocks, and give back what dead lineages held."""
    params = SMCParams(
        n_particles=8, max_tokens=120, ess_threshold=1.0, resampling="multinomial", proposal="base",
        segment_token_ids=[1], max_segment_tokens=20,
    )  # fmt: skip
    scheduler = small_engine.llm_engine.engine_core.engine_core.scheduler
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    for population in small_engine.smc([prompt_of(33), prompt_of(40)], params, Counts()):
        assert population.T > 120
        check_rows(tiny_path, population.prompt_token_ids, population)
    small_engine.llm_engine.step()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    with pytest.raises(ValueError, match="n_particles=40: with max_tokens=120"):
        small_engine.smc(PROMPT, dataclasses.replace(params, n_particles=40, ess_threshold=0.0), Counts())


def test_parked_groups(engine, tiny_path, all_blocks_back):
    """A group whose potential finds its answers in the background gives the population of one that has them at once,
    and others go on meanwhile; with and without segments."""
    for way in (WAYS[0], dict()):
        params = SMCParams(n_particles=8, max_tokens=24, ess_threshold=1.0, proposal="base", **way)
        same(engine.smc(PROMPT, params, Slow(0.01)), engine.smc(PROMPT, params, Counts()))
    slow = dataclasses.replace(params, max_tokens=60, **WAYS[1])
    potential = engine.register_potential(Slow(0.5))
    plain = SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.0)
    core, ended = engine.llm_engine, []
    core.add_request("slow", {"prompt_token_ids": PROMPT}, engine.lead_params(slow, potential=potential))
    core.add_request("group", {"prompt_token_ids": PROMPT}, engine.lead_params(dataclasses.replace(params, group=1)))
    core.add_request("plain", {"prompt_token_ids": PROMPT}, plain)
    while core.has_unfinished_requests():
        ended += [output.request_id for output in core.step() if output.finished]
    assert ended[-1] == "slow" and set(ended[:2]) == {"group", "plain"}
    engine.drop_potential(potential)


def test_a_fault_in_the_background_ends_its_group(engine, runner, all_blocks_back):
    params = SMCParams(n_particles=8, max_tokens=60, ess_threshold=1.0, proposal="base", **WAYS[1])
    targets = [Slow(0.01), Slow(0.01, OSError("no server at http://prm:8000 after 3 s")), Counts()]
    with pytest.raises(SMCError, match=r"Slow.fetch at step 32: raised OSError: no server at http://prm:8000") as found:
        engine.smc([PROMPT] * 3, params, targets)
    populations = found.value.populations
    assert (
        populations[1] is None and populations[2].token_ids == engine.smc([PROMPT] * 3, params, Counts())[2].token_ids
    )

    class Answers(Counts):
        def fetch(self, state, about):
            return "soon"

    with pytest.raises(SMCError, match=r"Answers.fetch at step 16: returned str; must be a concurrent.futures.Future"):
        engine.smc(PROMPT, params, Answers())


def test_aborted_while_parked(engine, runner, all_blocks_back):
    """The future is cancelled, and the group's blocks come back."""
    future = Future()

    class Never(Counts):
        shared_by_groups = ("future",)

        def __init__(self):
            self.future = future

        def fetch(self, state, about):
            return self.future

    potential = engine.register_potential(Never())
    params = SMCParams(n_particles=8, max_tokens=60, proposal="base", **WAYS[1])
    engine.llm_engine.add_request(
        "parked", {"prompt_token_ids": PROMPT}, engine.lead_params(params, potential=potential)
    )
    for _ in range(40):
        engine.llm_engine.step()
    assert runner._parked and not future.done()
    engine.llm_engine.abort_request(["parked"])
    engine.llm_engine.step()
    assert future.cancelled() and not runner._parked
    engine.drop_potential(potential)


@pytest.mark.parametrize("proposal", ["base", "twisted"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_learned_twists(engine, tiny_path, tmp_path, all_blocks_back, proposal, kind):
    """ψ at a boundary is read from hidden states that particles had when they came there, and is that which they have
    in a group of Hugging Face's without segments that retains their tokens."""
    twist = save_twist(kind, tiny_path, tmp_path)
    params = SMCParams(
        n_particles=9, max_tokens=30, ess_threshold=0.0, proposal=proposal, seed=3, segment_token_ids=[1, 6],
        max_segment_tokens=12,
    )  # fmt: skip
    population = engine.smc(PROMPT, params, Counts(), twist=twist)
    plain = dataclasses.replace(params, segment_token_ids=None, max_segment_tokens=None)
    want = HFEngine(tiny_path).smc(PROMPT, plain, Counts(), twist=twist, exact=population.token_ids)
    assert want.token_ids == population.token_ids and population.T > 30
    np.testing.assert_allclose(population.log_weights, want.log_weights, atol=1e-3)
    drawn = (population.tokens >= 0).cumsum(0)
    for i in range(9):
        if proposal == "base":  # weighed at boundaries, where it has drawn so many
            steps = population.boundaries
            at = drawn[steps, i] - 1
        else:  # before each draw
            steps = np.flatnonzero(population.tokens[:, i] >= 0)
            at = np.arange(30)
        np.testing.assert_allclose(population.step_log_weights[steps, i], want.step_log_weights[at, i], atol=1e-3)


def test_a_twist_with_a_trunk_is_refused(engine, tiny_path, tmp_path, all_blocks_back):
    twist = save_twist("lora", tiny_path, tmp_path)
    with pytest.raises(SMCError, match="a twist of kind 'lora' cannot be used with segments: its trunk never waits"):
        engine.smc(PROMPT, SMCParams(n_particles=2, max_segment_tokens=4), Counts(), twist=twist)
