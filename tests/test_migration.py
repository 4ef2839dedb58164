"""Islands of one group that migrate, over the enumerated table of a tiny Llama."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from test_progress import check_progress
from test_segments import ENGINE, ByLength
from tiny import (
    PROMPT,
    TableTwist,
    TinyLlama,
    make_llama,
    run_each,
    run_table,
    run_tables,
    value_table,
)

from fastsmc import Population, Potential, SMCParams, ops
from fastsmc.genealogy import MIGRATES
from fastsmc.params import GROUP_KEY, RESAMPLING_SCHEMES
from fastsmc.potentials import Condition
from fastsmc.smc import Group, SMCError
from fastsmc.smc.captured import why_not_captured
from fastsmc.smc.particles import Particles
from fastsmc.smc.record import Log
from fastsmc.smc.step import MIGRATE, RESAMPLE, Kind, Step

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = 2 * value_table(STEPS, VOCAB, seed=4)
VALUE[:2, STOP] += 1.5
PAIRS = np.random.default_rng(5).normal(scale=0.5, size=(VOCAB, VOCAB))
PAIRS += np.array([1.8, -1.6, 1.6, -1.6, -1.6, 0.0])[:, None]


class Pairs(ByLength):
    """φ also has a factor of every two tokens behind each other, so that with a twist, too, particles and islands have
    other weights long before their ends; with `kills` it is zero for sequences of up to two tokens, which no twist
    knows."""

    def __init__(self, kills=False):
        super().__init__(VALUE)
        self.pairs, self.kills = torch.tensor(PAIRS), kills

    def log_phi(self, sequence):
        pairs = sum(PAIRS[a, b] for a, b in itertools.pairwise(sequence))
        return -math.inf if self.kills and len(sequence) <= 2 else super().log_phi(sequence) + pairs

    def _so_far(self, state):
        order = (state.tokens < 0).long().argsort(dim=1, stable=True)
        tokens = state.tokens.gather(1, order)
        both = self.pairs[tokens[:, :-1].clamp(min=0), tokens[:, 1:].clamp(min=0)]
        return super()._so_far(state) + torch.where(tokens[:, 1:] >= 0, both, 0.0).sum(1)

    def complete(self, state):
        return super().complete(state).masked_fill(self.kills & (state.lengths <= 2), -math.inf)

    def logw_next(self, state):
        pairs = 0.0 if state.last_tokens is None else self.pairs[state.last_tokens.clamp(min=0)]
        return super().logw_next(state) + self.share * pairs


class BasePairs(Pairs):
    """The same without a say in the proposal."""

    logw_next = Potential.logw_next


class GuidePairs(Pairs):
    """The same, of which the twist only shapes the proposal."""

    proposal_only = True

    def logw_next(self, state):
        return super().logw_next(state) + 2 * state.lengths[:, None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def params_of(**more):
    return SMCParams(**dict(
        n_particles=8, max_tokens=STEPS, ess_threshold=1.0, islands=4, migrate_every=1, seed=8
    ) | more)  # fmt: skip


def migrated(population):
    """(T,) bool, steps at which rows of one island continue those of another."""
    return (population.island[population.ancestors] != population.island).any(1)


def dead_islands(population):
    """(T, M) bool, islands without any weight when a step was weighed."""
    dead = np.isneginf(population.step_log_weights)
    return np.stack([dead[:, population.island == m].all(1) for m in range(population.n_islands)], axis=1)


def check_unbiased(populations, truth):
    """E[Ẑ] = Z and E[Ẑ ΣWf], within 4 standard errors; truth: p0·φ of each sequence. What has less than a tenth of Z is
    left out: so few runs hold it that their spread says nothing of its error."""
    features = {
        "1": lambda s: 1.0, "first is 0": lambda s: s[0] == 0, "early": lambda s: len(s) < STEPS,
        "last is 1": lambda s: s[-1] == 1, "third of it": lambda s: sum(s) % 3 == 0,
    }  # fmt: skip
    for name, f in features.items():
        got = [np.mean(np.exp(p.log_weights) * [f(tuple(ids)) for ids in p.token_ids]) for p in populations]
        want = sum(w * f(s) for s, w in truth.items())
        if 0 < want < 0.1 * sum(truth.values()):
            continue
        error = np.std(got, ddof=1) / math.sqrt(len(got))
        assert abs(np.mean(got) - want) <= 4 * error + 1e-12, (name, np.mean(got), want, error)


def truth_of(tiny, log_phi):
    return {s: math.exp(lp + log_phi(s)) for s, lp in tiny.log_p.items()}


KINDS = {"twisted": Pairs(kills=True), "base": BasePairs(kills=True), "guided": GuidePairs(kills=True)}
#: every scheme of the first three with each proposal, threshold and K; then the others
CASES = [
    *((scheme, kind, threshold, every, 4) for i, (scheme, kind, threshold, every) in enumerate(itertools.product(
        ("systematic", "multinomial", "ssp"), ("twisted", "base"), (0.5, 1.0), (1, 2))) if i % 2 == (i // 8) % 2),
    *(("stratified", kind, 0.5, 1, 4 if kind == "guided" else 2) for kind in KINDS),
    *(("residual", kind, 1.0, 2, 4 if kind == "guided" else 3) for kind in KINDS),
    ("systematic", "guided", 0.0, 1, 4),
]  # fmt: skip


@pytest.mark.parametrize(("scheme", "kind", "threshold", "every", "m"), CASES)
def test_unbiased(tiny, scheme, kind, threshold, every, m):
    """By enumeration; islands die, migrate, and only when they may; the record is consistent."""
    params = params_of(
        resampling=scheme, ess_threshold=threshold, migrate_every=every, islands=m, n_particles=2 * m,
        proposal="base" if kind == "base" else "twisted",
    )  # fmt: skip
    populations = run_each(tiny, [dataclasses.replace(params, group=i) for i in range(250)], KINDS[kind])
    check_unbiased(populations, truth_of(tiny, KINDS[kind].log_phi))
    when = np.array([np.pad(migrated(p), (0, STEPS - p.T)) for p in populations])
    may = [t for t in range(1, STEPS) if t % every == 0]
    assert when[:, may].sum() > 10 and not np.delete(when, may, axis=1).any()
    for p in populations[:60]:
        assert p.n_islands == m and p.island.tolist() == np.repeat(np.arange(m), 2).tolist()
        np.testing.assert_array_equal(p.island_resampled.any(1), p.resampled)
        assert (p.island_resampled.all(1) | ~migrated(p)).all()
        still = p.ancestors == np.arange(2 * m)
        assert (still | p.island_resampled[:, p.island]).all()
        for t in range(p.T):
            np.testing.assert_array_equal(p.ancestors[t][p.ancestors[t]], p.ancestors[t])  # in place
            if not p.degenerate:
                weights = np.exp(p.step_log_weights[t] - p.step_log_weights[t].max())
                assert p.ess[t] == pytest.approx(weights.sum() ** 2 / np.square(weights).sum(), rel=1e-9)
        assert math.isnan(p.log_z_stderr) and (p.degenerate or p.log_z_stderr_reason == MIGRATES)
    back = kind != "twisted"  # of whose record a step's weights are those before its resampling
    weighed = [dead_islands(p)[: p.T - back][migrated(p)[back:]] for p in populations]
    if threshold < 1.0:
        dead = np.concatenate(weighed)
        assert 0 < dead.mean() < 0.5


@pytest.mark.parametrize("tau", [1.0, 2.0])
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_one_resampling(scheme, tau):
    """Over 4000 groups with the same weights, each particle's descendants have its weight on average, and the whole
    the same in each; what is done to one group is what NumPy makes of its uniforms."""
    runs, m, n = 4000, 4, 3
    params = [params_of(n_particles=m * n, group=i, resampling=scheme, resampling_temperature=tau, ess_threshold=0.75)
              for i in range(runs)]  # fmt: skip
    kind = Kind(True, False, False, scheme, islands=m)
    step = Step(kind, params, [[]] * runs, [True] * runs, Particles(runs * m * n, torch.device("cpu")), Log())
    log_w = np.array([0.1, 0.2, 0.0, -math.inf, -math.inf, -math.inf, -4.0, -2.0, -math.inf, 2.0, -3.0, 1.0])
    step.particles.log_w.copy_(torch.tensor(log_w).repeat(runs))
    step.step += 1
    step.log_z += 0.7
    step.resample(step.going)
    w, of_island = np.exp(log_w), np.exp(log_w).reshape(m, n)
    mass = of_island.mean(1)
    ancestors = step.ancestors.view(runs, -1).numpy() - np.arange(runs)[:, None] * m * n
    np.testing.assert_array_equal(np.take_along_axis(ancestors, ancestors, 1), ancestors)  # in place
    np.testing.assert_allclose(step.ess, w.sum() ** 2 / (w**2).sum(), rtol=1e-10)
    np.testing.assert_allclose(step.log_z_so_far(), 0.7 + math.log(w.mean()), rtol=1e-12)
    assert step.resampled.all()  # Σ W² of islands is far below (M + 1)/2
    after = np.exp((step.particles.log_w + step.log_z.repeat_interleave(m * n)).view(runs, -1).numpy() - 0.7)
    got = np.zeros((runs, m * n))
    np.add.at(got, (np.arange(runs)[:, None], ancestors), after)
    error = got.std(0, ddof=1) / math.sqrt(runs)
    assert (np.abs(got.mean(0) - w) <= 4 * error + 1e-9).all(), (got.mean(0), w, error)
    assert error.max() > 0 and (got[:, w == 0] == 0).all()
    if tau == 1.0:  # each island has the whole's mean, whatever it was
        np.testing.assert_allclose(after.reshape(runs, m, n).mean(2), w.mean(), rtol=1e-9)
    # by hand
    one = np.flatnonzero((ancestors // n != np.arange(m * n) // n).any(1))[0]
    u = step.uniforms(RESAMPLE).view(runs, m, n)[one]
    within = [ops.resample(torch.tensor(log_w.reshape(m, n)[i] / tau), u[i], scheme=scheme, threshold=float(
        of_island[i].sum() ** 2 < 0.75 * n * (of_island[i] ** 2).sum())) for i in range(m)]  # fmt: skip
    assert [bool(r.resampled) for r in within] == [False, False, True, True]
    key = dict(seed=8, group=int(one), step=1, stream=MIGRATE, device="cpu")
    moved = ops.resample(torch.tensor(mass).log(), ops.uniforms(m, **key), scheme=scheme)
    for i, (parent, q) in enumerate(zip(moved.ancestors.tolist(), moved.rank.tolist(), strict=True)):
        there, rows, k = within[parent], slice(i * n, i * n + n), int(moved.counts[parent])
        parents = there.ancestors.numpy()
        np.testing.assert_array_equal(ancestors[one, rows], parent * n + parents)
        weight = of_island[parent][parents] / mass[parent]
        if there.resampled:
            r = of_island[parent] ** (1 / tau)
            weight = weight / (r / r.mean())[parents]
        np.testing.assert_allclose(after[one, rows], weight * w.mean(), rtol=1e-9)
        rank, count = (getattr(step.particles, name).view(runs, -1)[one, rows] for name in ("rank", "count"))
        assert torch.equal(count, there.counts[there.ancestors] * k) and torch.equal(rank, there.rank * k + q)


@pytest.mark.parametrize("kind", ["twisted", "base"])
def test_islands_that_are_not_due_are_resampled_separately(tiny, kind):
    """Where K is large each island is what its own weights and uniforms make of it."""
    params = params_of(n_particles=40, islands=4, migrate_every=STEPS + 1, ess_threshold=0.95, proposal=kind)
    populations = run_each(tiny, [dataclasses.replace(params, group=i) for i in range(10)], TableTwist(VALUE))
    some = []
    for group, p in enumerate(populations):
        assert not migrated(p).any()
        for t, m in itertools.product(range(1, p.T), range(4)):
            at, rows = t - (kind == "base"), slice(10 * m, 10 * m + 10)
            log_w = torch.tensor(p.step_log_weights[t if kind == "twisted" else t - 1, rows])
            u = ops.uniforms(40, seed=8, group=group, step=at, stream=RESAMPLE, device="cpu")[rows].contiguous()
            want = ops.resample(log_w, u, threshold=0.95)
            np.testing.assert_array_equal(p.ancestors[t, rows], want.ancestors + 10 * m)
            assert bool(want.resampled) == p.island_resampled[t, m]
            some.append(bool(want.resampled))
    assert 0.1 < np.mean(some) < 0.97


BESIDE = [
    ("twisted", dict(resampling_temperature=2.0)), ("base", dict(resampling_temperature="entropic")),
    ("base", dict(power=1.5, power_ramp=3)), ("twisted", dict(power=0.7, power_ramp=2)),
    ("twisted", dict(force_stop=True)), ("base", dict(resample_every=3)), ("base", dict(n_particles=4)),
    ("twisted", dict(segment="ab", max_segment_tokens=2)), ("base", dict(segment="ab", max_segment_tokens=2)),
    ("base", dict(segment_token_ids=[1, 3], migrate_every=2, islands=2)), ("twisted", dict(stop=["b"], min_tokens=1)),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings"), BESIDE, ids=str)
def test_unbiased_beside_other_settings(tiny, kind, settings):
    params = params_of(proposal=kind, **settings)
    phi = {"twisted": Pairs(), "base": BasePairs()}[kind]
    groups = [Group(dataclasses.replace(params, group=i), phi, PROMPT, tiny.stop, engine=ENGINE) for i in range(300)]
    populations = run_tables(tiny, groups)
    ends = (lambda prefix: prefix[-1] == 1 and len(prefix) > 1) if params.stop else None
    check_unbiased(populations, truth_of(tiny.restricted(params, ends), phi.log_phi))
    assert sum(migrated(p).any() for p in populations) > 20
    if params.segmented:
        for p in populations:
            assert set(np.flatnonzero(migrated(p)) - 1) <= set(
                p.boundaries[params.migrate_every - 1 :: params.migrate_every]
            )


#: pairs of tokens: nothing may follow 0 and 1, but one token each
RULED_OUT = {(a, b) for a in (0, 1) for b in range(VOCAB - 1) if b != a + 2}


def test_unbiased_by_rejection(tiny):
    """Conditions are asked for the tokens, and the walks of a group are controlled together."""
    allowed = lambda ids: not set(itertools.pairwise(ids)) & RULED_OUT  # noqa: E731
    phi = Condition(lambda rows: list(map(allowed, rows)), on="tokens") * TableTwist(VALUE / 2)
    params = params_of(proposal="rejection")
    populations = run_each(tiny, [dataclasses.replace(params, group=i) for i in range(200)], phi)
    check_unbiased(populations, truth_of(tiny, lambda s: TableTwist(VALUE / 2).log_phi(s) if allowed(s) else -math.inf))
    assert sum(migrated(p).any() for p in populations) > 20


@pytest.mark.parametrize("kind", ["twisted", "base"])
def test_a_group_is_as_it_is_alone(tiny, kind):
    """Beside groups without islands, and with islands of other sizes, K and settings; and it tells how it went."""
    ways = [
        dict(), dict(islands=1, migrate_every=None), dict(n_particles=12, migrate_every=2), dict(islands=2),
        dict(resampling_temperature=2.0), dict(resample_every=2), dict(islands=8, n_particles=8),
    ]  # fmt: skip
    made = lambda: [  # noqa: E731
        Group(params_of(proposal=kind, group=i, **way), KINDS[kind], PROMPT, tiny.stop)
        for i, way in enumerate(ways * 3)
    ]
    groups = made()
    for group in groups:
        group.progress = []
    for group, got in zip(groups, run_tables(tiny, groups), strict=True):
        if not got.degenerate:
            check_progress(group)
    for group, alone in zip(groups, made(), strict=True):
        got, (want,) = group.population(), run_tables(tiny, [alone])
        for name in Population.ARRAYS:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        assert got.log_z == want.log_z


def test_dead_altogether(tiny):
    """A group ends when all its islands are dead, and not before."""
    dead = run_table(tiny, params_of(), TableTwist(np.full_like(VALUE, -np.inf)))
    assert dead.log_z == -math.inf and dead.n_islands == 4 and not dead.island_resampled.any()
    assert dead.log_z_stderr_reason == "all weights are zero" and Population.from_bytes(dead.to_bytes()).n_islands == 4

    class Never(TableTwist):
        def prefix(self, state):
            return super().prefix(state) - math.inf

    begun = run_table(tiny, params_of(), Never(VALUE))
    assert begun.degenerate and begun.island_resampled.shape == (1, 4)
    sure = run_table(tiny, params_of(), None)
    assert (sure.log_z, sure.log_z_stderr) == (0.0, 0.0) and not sure.resampled.any()


def test_files_pictures_and_pools(tiny):
    """A migrated population has lineages, pictures and files like any other; a pool of such runs has an error by the
    spread of the runs, not of islands that are not independent."""
    parts = run_each(tiny, [params_of(n_particles=16 + 4 * (i % 2), group=i) for i in range(9)], KINDS["base"])
    one = next(p for p in parts if migrated(p).any())
    again = Population.from_bytes(one.to_bytes())
    for name in Population.ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(one, name), err_msg=name)
    assert again.params == one.params and again.log_z_stderr_reason == MIGRATES
    for i in range(one.n_particles):
        spelt = one.tokens[np.arange(one.T), one.lineage(i)]
        assert spelt[spelt >= 0].tolist() == one.token_ids[i]
    one.plot_weights(), one.plot_genealogy(), json.dumps(one.to_dict(), allow_nan=False)
    assert one.summary()["islands"] == 4
    few, many = Population.pool(parts[:7]), Population.pool(parts)
    assert math.isnan(few.log_z_stderr) and MIGRATES in few.log_z_stderr_reason and few.n_islands == 28
    sizes, z = np.array([p.n_particles for p in parts]), np.exp([p.log_z for p in parts])
    mean = np.average(z, weights=sizes)
    spread = sizes @ (z - mean) ** 2 / (8 * sizes.sum())
    assert many.log_z_stderr == pytest.approx(math.sqrt(spread) / mean) and many.n_islands == 36
    with pytest.raises(ValueError, match="island_resampled: 1 islands; with params.islands=4 a multiple"):
        dataclasses.replace(one, island=np.zeros(one.n_particles, int), island_resampled=one.resampled[:, None])
    with pytest.raises(ValueError, match=r"populations\[1\]: has migrate_every=2, populations\[0\] 1"):
        Population.pool([parts[0], run_table(tiny, params_of(migrate_every=2), KINDS["base"])])


def test_parameters():
    params = params_of()
    sent = json.loads(json.dumps({GROUP_KEY: 8} | params.to_extra_args()))
    assert (sent["smc_islands"], sent["smc_migrate_every"]) == (4, 1)
    assert SMCParams.from_request(sent, **params.to_shared()) == params
    assert not params_of(ess_threshold=0.0).never_resamples
    assert params_of(ess_threshold=0.0, migrate_every=STEPS).never_resamples
    for settings, said in (
        (dict(islands=0), "islands=0: must be"), (dict(islands=True), "islands=True"),
        (dict(islands=2.5), "islands=2.5"),
        (dict(islands=3), "islands=3: must divide n_particles=8"), (dict(migrate_every=0), "migrate_every=0: must be"),
        (dict(migrate_every=None), "islands=4: needs migrate_every"), (dict(migrate_every=False), "migrate_every=F"),
        (dict(islands=1), "migrate_every=1: needs islands of at least 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError) as caught:
            params_of(**settings)
        assert said in str(caught.value)


def test_what_is_refused(tiny):
    assert "islands=4" in why_not_captured(params_of(), None)
    with pytest.raises(SMCError, match="exact: a group with islands=4, which migrate, takes no exact samples"):
        Group(params_of(), None, PROMPT, tiny.stop, exact=[[0] * STEPS])
