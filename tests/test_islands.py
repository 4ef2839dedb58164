"""`n_particles="auto"`: pilots choose how many islands are run, and are not among them."""

import dataclasses
import math

import numpy as np
import pytest
from tiny import PROMPT, TableTwist, TinyLlama, make_llama, run_each, value_table

from fastsmc import SMCParams
from fastsmc.hf import HFEngine
from fastsmc.islands import PILOTS, Auto
from fastsmc.population import Population
from fastsmc.smc import SMCError, gather

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = value_table(STEPS, VOCAB, seed=4)
PHI = TableTwist(VALUE)
PARAMS = SMCParams(n_particles=4, max_tokens=STEPS, ess_threshold=0.7)


class Fails(TableTwist):
    def complete(self, state):
        raise KeyError("no such sequence")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.fixture(scope="module")
def tiny(path):
    return TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))


@pytest.fixture(scope="module")
def engine(path):
    return HFEngine(path, stop_token_ids=[STOP])


def auto(tiny, group, target, most=2**16):
    """One call over the table; the population, and the groups that were run."""
    groups = []

    def sample(which, asked):
        groups.extend(params.group for params in asked)
        return run_each(tiny, asked, PHI)

    [population] = Auto(target, most).run(sample, [dataclasses.replace(PARAMS, group=group)], apart=False)
    return population, groups


def test_unbiased_by_others_than_the_pilots(tiny):
    """E[Ẑ] = Z although the number of islands is random, and each run has a group of its own."""
    truth, ratios, counts, used = tiny.log_z(PHI.log_phi), [], set(), 0
    for _ in range(50):
        population, groups = auto(tiny, used, 0.08)
        assert groups == list(range(used, used + PILOTS + population.n_islands))
        used += len(groups)
        counts.add(population.n_islands)
        ratios.append(math.exp(population.log_z - truth))
    assert len(counts) > 3
    assert abs(np.mean(ratios) - 1) < 4 * np.std(ratios, ddof=1) / math.sqrt(len(ratios))
    assert np.std(ratios, ddof=1) < 1.5 * 0.08  # the target was reached; of 50 runs the sd is known to 10 %


def test_an_engine(engine):
    """The islands are those of plain calls with their groups, and the pilots too."""
    population = engine.smc(PROMPT, PARAMS, PHI, n_particles="auto", target_stderr=0.08)
    n = population.n_islands
    runs = engine.smc([PROMPT] * (PILOTS + n), PARAMS, PHI)
    pilots, islands = Population.pool(runs[:PILOTS]), Population.pool(runs[PILOTS:])
    for a, b in ((population.pilot, pilots), (population, islands)):
        assert a.log_z == b.log_z and a.token_ids == b.token_ids and a.n_islands == b.n_islands
        assert a.log_z_stderr == b.log_z_stderr
    variance = max(8 * pilots.log_z_stderr**2, np.mean([run.log_z_stderr**2 for run in runs[:PILOTS]]))
    assert n == math.ceil(variance / 0.08**2) > 1 and not population.capped
    again = Population.from_bytes(population.to_bytes())
    assert again.pilot.token_ids == pilots.token_ids and again.pilot.log_z == pilots.log_z and not again.capped
    assert population.to_dict()["pilot"]["islands"] == PILOTS


def test_several_prompts(engine):
    prompts = [PROMPT, PROMPT[:3]]
    both = engine.smc(prompts, PARAMS, PHI, n_particles="auto")
    n = [population.n_islands for population in both]
    runs = engine.smc([prompts[0]] * PILOTS + [prompts[1]] * PILOTS, PARAMS, PHI)
    later = dataclasses.replace(PARAMS, group=2 * PILOTS)
    islands = engine.smc([prompts[0]] * n[0] + [prompts[1]] * n[1], later, PHI)
    assert [p.log_z for p in both] == [Population.pool(islands[: n[0]]).log_z, Population.pool(islands[n[0] :]).log_z]
    assert [p.pilot.log_z for p in both] == [Population.pool(runs[k : k + PILOTS]).log_z for k in (0, PILOTS)]
    listed = engine.smc(prompts, [dataclasses.replace(PARAMS, group=100)] * 2, PHI, n_particles="auto")
    alone = engine.smc(PROMPT, dataclasses.replace(PARAMS, group=100), PHI, n_particles="auto")
    assert listed[0].log_z == alone.log_z
    with pytest.raises(SMCError, match="prompt 1: .*no such sequence") as caught:
        engine.smc(prompts, PARAMS, [PHI, Fails(VALUE)], n_particles="auto")
    assert [p is None for p in caught.value.populations] == [False, True]
    assert engine.smc([], PARAMS, PHI, n_particles="auto") == []


def test_caps(engine):
    with pytest.warns(UserWarning, match=r"prompt 0: .* max_particles=10: 2 islands of 4"):
        population = engine.smc(PROMPT, PARAMS, PHI, n_particles="auto", target_stderr=1e-3, max_particles=10)
    assert population.n_islands == 2 and population.capped and population.summary()["capped"]
    assert Population.from_bytes(population.to_bytes()).capped
    with pytest.warns(UserWarning, match="max_particles=8"):
        dead = engine.smc(PROMPT, PARAMS, TableTwist(np.full_like(VALUE, -np.inf)), n_particles="auto", max_particles=8)
    assert dead.capped and dead.degenerate and dead.n_islands == 2
    sure = engine.smc(PROMPT, PARAMS, None, n_particles="auto")
    assert (sure.n_islands, sure.log_z, sure.log_z_stderr, sure.capped) == (1, 0.0, 0.0, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_particles": 64}, "n_particles=64: must be 'auto' or None"),
        ({"n_particles": "many"}, "n_particles='many': must be 'auto' or None"),
        ({"target_stderr": 0.2}, "target_stderr=0.2: needs n_particles='auto'"),
        ({"max_particles": 99}, "max_particles=99: needs n_particles='auto'"),
        ({"n_particles": "auto", "target_stderr": 0.0}, "target_stderr=0.0: must be"),
        ({"n_particles": "auto", "target_stderr": math.nan}, "target_stderr=nan: must be"),
        ({"n_particles": "auto", "max_particles": 3}, "max_particles=3: must be at least the size of an island"),
        ({"n_particles": "auto", "max_particles": 2.5}, "max_particles=2.5: must be an integer"),
        ({"n_particles": "auto", "exact": [[0, 1, 0, 1]]}, "exact: a run with n_particles='auto'"),
        ({"n_particles": "auto", "params": SMCParams(group=2**32 - 1)}, "group=4294967295: .* must be at most"),
        ({"n_particles": "auto", "max_particles": 2**20, "params": SMCParams(n_particles=2**18)},
         "SMCParams.n_particles=262144: .* must be at most 131072"),
    ],
)  # fmt: skip
def test_refuses(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.smc(PROMPT, **{"params": PARAMS, "potential": PHI, **arguments})


def test_gather_keeps_what_did_not_fail(engine):
    one, other = engine.smc(PROMPT, PARAMS), SMCError("why", kind="refused")
    assert gather([one], True) == [one]
    with pytest.raises(SMCError, match="^prompt 1: why$") as caught:
        gather([one, other], False)
    assert caught.value.populations == [one, None] and caught.value.kind == "refused"
