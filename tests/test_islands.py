"""Islands of `smc`: so many, or as many as pilots ask for, which are not among them; or those that migrate."""

import dataclasses
import math

import numpy as np
import pytest
from test_migration import BasePairs, check_unbiased, migrated, truth_of
from tiny import PROMPT, TableTwist, TinyLlama, make_llama, run_each, value_table

from fastsmc import SMCParams, evaluate
from fastsmc.hf import HFEngine
from fastsmc.islands import PILOTS, Auto, Fixed
from fastsmc.population import Population
from fastsmc.smc import SMCError, gather
from fastsmc.training import Trainer, TwistConfig

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


@pytest.mark.parametrize("m", [1, 2, 4])
def test_pools_are_unbiased(tiny, m):
    """By enumeration: pools of m islands with a potential that kills, and pools of these of unequal sizes."""
    phi, runs = BasePairs(kills=True), 100

    def sample(which, asked):
        return run_each(tiny, asked, phi)

    asked = [
        SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=1.0, proposal="base", group=m * i + 10000 * k)
        for i in range(runs) for k, n in enumerate((3, 8))
    ]  # fmt: skip
    pools = Fixed(m).run(sample, asked, apart=True)
    check_unbiased(pools[::2], truth_of(tiny, phi.log_phi))
    both = [Population.pool(pools[i : i + 2]) for i in range(0, 2 * runs, 2)]
    check_unbiased(both, truth_of(tiny, phi.log_phi))
    assert all(p.n_islands == 2 * m and p.n_particles == 11 * m for p in both)
    assert m == 1 or any(np.isneginf(p.log_weights).reshape(m, 3).all(1).any() for p in pools[::2])  # a dead island


def equal(a, b):
    for name in Population.ARRAYS:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.token_ids, a.params, a.log_z, a.log_z_stderr_reason) == (
        b.token_ids,
        b.params,
        b.log_z,
        b.log_z_stderr_reason,
    )


def test_so_many_islands(engine):
    """They are groups by hand, prompt · M + island from the params' group on, bit for bit; with a list of params from
    the group of each."""
    prompts, params = [PROMPT, PROMPT[:3]], dataclasses.replace(PARAMS, group=7)
    found = engine.smc(prompts, params, PHI, islands=3)
    for i, population in enumerate(found):
        by_hand = [
            engine._run(prompts[i], dataclasses.replace(params, group=7 + 3 * i + k), engine._set_up(PHI), None, ())
            for k in range(3)
        ]
        equal(population, Population.pool(by_hand))
        assert population.n_islands == 3 and population.params.n_particles == 12
    each = [dataclasses.replace(PARAMS, group=g, n_particles=n) for g, n in ((50, 4), (20, 5))]
    listed = engine.smc(prompts, each, PHI, islands=2)
    for i, population in enumerate(listed):
        runs = [engine.smc(prompts[i], dataclasses.replace(each[i], group=each[i].group + k), PHI) for k in range(2)]
        equal(population, Population.pool(runs))
    for one in (engine.smc(PROMPT, params, PHI), engine.smc(PROMPT, params, PHI, islands=1)):
        equal(one, engine._run(PROMPT, params, engine._set_up(PHI), None, ()))
    assert engine.smc([], params, PHI, islands=3) == []


def test_islands_that_migrate(engine):
    """They are one group of all particles; and several such groups are independent islands of islands."""
    phi, prompts = BasePairs(), [PROMPT, PROMPT[:3]]
    found = engine.smc(prompts, dataclasses.replace(PARAMS, group=5), phi, islands=4, migrate_every=1)
    for i, population in enumerate(found):
        params = dataclasses.replace(PARAMS, n_particles=16, group=5 + i, islands=4, migrate_every=1)
        equal(population, engine.smc(prompts[i], params, phi))
        assert population.n_islands == 4 and population.params == params
    runs = [engine.smc(PROMPT, dataclasses.replace(params, group=k), phi) for k in range(9)]
    assert any(migrated(run).any() for run in runs)
    pool = engine.smc(PROMPT, dataclasses.replace(params, group=0), phi, islands=9)
    equal(pool, Population.pool(runs))
    assert pool.n_islands == 36 and pool.log_z_stderr > 0


def test_a_failed_island_is_its_prompts_error(engine):
    class FailsOnce(Fails):
        """One of the islands ends early with token 3, which no other does."""

        def complete(self, state):
            return (
                super().complete(state) if bool((state.tokens[:, 0] == 3).all()) else TableTwist.complete(self, state)
            )

    several = engine.smc([PROMPT] * 12, dataclasses.replace(PARAMS, n_particles=1), PHI)
    assert 0 < sum(p.token_ids[0][0] == 3 for p in several) < 12
    with pytest.raises(SMCError, match="prompt 1: .*no such sequence") as caught:
        prompts = [PROMPT] * 2
        engine.smc(prompts, [dataclasses.replace(PARAMS, n_particles=1)] * 2, [PHI, FailsOnce(VALUE)], islands=12)
    assert [p is None for p in caught.value.populations] == [False, True]
    assert caught.value.populations[0].n_islands == 12


MIGRATING = dataclasses.replace(PARAMS, islands=2, migrate_every=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"islands": 0}, "islands=0: must be"),
        ({"islands": True}, "islands=True: must be"),
        ({"islands": 2.5}, "islands=2.5: must be"),
        ({"islands": "3"}, "islands='3': must be"),
        ({"islands": 2**18 + 1}, "islands=262145: of SMCParams.n_particles=4 particles each; together at most 1048576"),
        ({"islands": 2**18 + 1, "migrate_every": 2}, "islands=262145: .* together at most 1048576"),
        ({"islands": 3, "params": dataclasses.replace(PARAMS, group=2**32 - 2)}, "group=4294967294: islands=3"),
        ({"islands": 2, "prompts": [PROMPT] * 2, "params": [PARAMS, dataclasses.replace(PARAMS, group=2**32 - 1)]},
         "group=4294967295: .* must be at most 4294967294"),
        ({"islands": 3, "n_particles": "auto"}, "n_particles='auto': .* leave islands=3 out"),
        ({"islands": 3, "migrate_every": 1, "n_particles": "auto"}, "n_particles='auto': .* leave islands=3 out"),
        ({"params": MIGRATING, "n_particles": "auto"}, "n_particles='auto': .* leave params.islands=2 out"),
        ({"islands": 2, "exact": [[0, 1, 0, 1]]}, "exact: a run with islands=2"),
        ({"params": MIGRATING, "exact": [[0, 1, 0, 1]]}, "exact: a group with islands=2, which migrate"),
        ({"migrate_every": 2}, "migrate_every=2: needs islands of at least 2"),
        ({"islands": 2, "migrate_every": 0}, "migrate_every=0: must be"),
        ({"islands": 2, "migrate_every": True}, "migrate_every=True: must be"),
        ({"islands": 2, "migrate_every": 1, "params": MIGRATING}, "migrate_every=1: params.islands=2 says it already"),
    ],
)  # fmt: skip
def test_refuses_islands(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        engine.smc(**{"prompts": PROMPT, "params": PARAMS, "potential": Fails(VALUE), **arguments})


def test_others_refuse_islands_that_migrate(engine):
    with pytest.raises(ValueError, match="params.islands=2: must be 1 for counterfactuals"):
        engine.counterfactual(PROMPT, [0, 1], params=MIGRATING)
    with pytest.raises(ValueError, match="params.islands=2: must be 1, since exact samples"):
        evaluate.log_z_bounds(engine, PROMPT, MIGRATING, PHI, exact=[[0, 1, 0, 1]], runs=2)
    with pytest.raises(ValueError, match="twists are trained without .* `islands`"):
        Trainer(engine, PROMPT, MIGRATING, PHI, TwistConfig())


def test_gather_keeps_what_did_not_fail(engine):
    one, other = engine.smc(PROMPT, PARAMS), SMCError("why", kind="refused")
    assert gather([one], True) == [one]
    with pytest.raises(SMCError, match="^prompt 1: why$") as caught:
        gather([one, other], False)
    assert caught.value.populations == [one, None] and caught.value.kind == "refused"
