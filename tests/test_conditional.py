"""Conditional groups and proposal-only potentials, over the enumerated table of a tiny Llama."""

import itertools

import numpy as np
import pytest
import torch
from tiny import PROMPT, Guide, TableRows, TableTwist, TinyLlama, make_llama, run_tables, value_table

from fastsmc import SMCParams, ops
from fastsmc.smc import Group, SMCError
from fastsmc.smc.driving import run_group, take_step

VOCAB, STEPS, STOP = 6, 3, 5
POTENTIAL = TableTwist(value_table(STEPS, VOCAB, seed=4))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def run(tiny, params, potential, exact=None):
    group = Group(params, potential, PROMPT, tiny.stop, exact=exact)
    run_group(group, TableRows(tiny, params.n_particles))
    return group


def run_many(tiny, params, potential, runs, exact=None, first=0):
    """Groups `first`, `first` + 1, … of the same parameters, stepped side by side, and their populations. Each keeps
    its sample of `exact`, if there are some."""
    groups = [
        Group(
            SMCParams(**{**vars(params), "group": first + i}), potential, PROMPT, tiny.stop,
            exact=None if exact is None else [exact[i]],
        )
        for i in range(runs)
    ]  # fmt: skip
    return groups, run_tables(tiny, groups)


def retained(group):
    (place,) = group.cohort.particles.retained[group.cohort.layout.part(group.index)].nonzero().flatten().tolist()
    return place


def posterior_samples(tiny, potential, k, seed=0):
    posterior = tiny.posterior(potential.log_phi)
    sequences = list(posterior)
    picks = np.random.default_rng(seed).choice(len(sequences), size=k, p=list(posterior.values()))
    return [list(sequences[i]) for i in picks]


def params_of(n, threshold, proposal="twisted", **more):
    return SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=threshold, proposal=proposal, **more)


#: positive everywhere: what an ordinary run loses when all its weights are zero, 1/Ẑ* loses too
POSITIVE = np.where(np.isinf(value_table(STEPS, VOCAB, seed=4)), -1.0, value_table(STEPS, VOCAB, seed=4))


@pytest.mark.parametrize("n", [4, 7, 1000])
def test_ancestors_by_weight(tiny, n):
    """The particle whose share of [0, 1) a uniform lies in; never one without weight, for uniforms at both ends too."""
    group = Group(params_of(n, 1.0), POTENTIAL, PROMPT, tiny.stop, exact=[[STOP]])
    step = group.cohort.step
    weights = np.random.default_rng(n).exponential(size=n) * (np.arange(n) % 3 != 0)
    weights[-1] = 0.0
    step.particles.log_w.copy_(torch.tensor(weights).log())
    u = np.random.default_rng(1).random(n)
    u[:2] = 0.0, 1 - 2.0**-53
    want = np.searchsorted(np.cumsum(weights) / weights.sum(), u, side="right").clip(max=np.flatnonzero(weights)[-1])
    want[int(step._uniform_places(1)[0])] = retained(group)
    assert step._conditional(step.particles.log_w, torch.from_numpy(u), torch.tensor([True])).tolist() == want.tolist()


#: of p0 and of ends, none of which leaves a prefix without a token
SETTINGS = [
    dict(top_k=4, top_p=0.95, temperature=1.2),
    dict(min_tokens=2, logit_bias={STOP: 1.0}),
    dict(force_stop=True),
    dict(power=2.0, power_ramp=2),
    dict(power=0.5),
]
#: of resampling
TEMPERED = [
    dict(resampling_temperature=2.0), dict(resampling_temperature="entropic"),
    dict(resampling_temperature=3.0, resample_every=2),
]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "threshold", "kind", "settings"),
    [
        *itertools.product([1], [1.0], ["twisted", "base", "guided"], [{}]),  # which no resampling changes
        *itertools.product([4], [0.0, 0.7, 1.0], ["twisted", "base", "guided"], [{}]),
        *itertools.product([64], [0.7], ["twisted", "base", "guided"], [{}]),
        *itertools.product([4], [0.7], ["twisted", "base", "guided"], SETTINGS),
        *itertools.product([4], [1.0], ["twisted", "base", "guided"], TEMPERED),
    ],
)
def test_mean_of_the_reciprocal(tiny, n, threshold, kind, settings):
    """With s* ~ σ kept, E[1/Ẑ*] = 1/Z, and E[log Ẑ*] >= log Z."""
    potential = (Guide if kind == "guided" else TableTwist)(POSITIVE)
    params = params_of(n, threshold, "base" if kind == "base" else "twisted", resampling="multinomial", **settings)
    target = tiny.restricted(params) if settings else tiny
    log_z, runs = target.log_z(potential.log_phi), 300 if n < 64 else 100
    kept = posterior_samples(target, potential, runs)
    groups, populations = run_many(tiny, params, potential, runs, kept)
    for group, population, exact in zip(groups, populations, kept, strict=True):
        assert population.token_ids[retained(group)] == exact
    upper = np.array([population.log_z for population in populations])
    ratio = np.exp(log_z - upper)
    error = ratio.std(ddof=1) / np.sqrt(runs)
    assert abs(ratio.mean() - 1) <= 3.5 * error + 1e-6, (ratio.mean(), error)  # 39 cases
    assert np.mean(upper) >= log_z - 3 * np.std(upper, ddof=1) / np.sqrt(runs) - 1e-6


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_conditional_law_of_all(tiny, threshold, monkeypatch):
    """E*[f / Ẑ*] · Z = E[f] of an ordinary multinomial run that draws without strata, too: f has the counts of the
    first tokens of all rows, and how many pairs of rows have the same, which tells who descends from whom."""
    monkeypatch.setattr(ops, "stratify", lambda uniforms, rank, count: uniforms)
    n, runs, potential = 3, 1000, TableTwist(POSITIVE)
    log_z = tiny.log_z(potential.log_phi)
    params = params_of(n, threshold, resampling="multinomial", seed=3)
    ordinary = np.array([count_first(p, 1.0) for p in run_many(tiny, params, potential, runs)[1]])
    exact = posterior_samples(tiny, potential, runs, seed=7)
    _, populations = run_many(tiny, params, potential, runs, exact, first=runs)
    kept = np.array([count_first(p, np.exp(log_z - p.log_z)) for p in populations])
    error = np.sqrt((ordinary.var(axis=0, ddof=1) + kept.var(axis=0, ddof=1)) / runs)
    assert np.all(np.abs(ordinary.mean(axis=0) - kept.mean(axis=0)) <= 3.5 * error)


def count_first(population, factor):
    counts = np.bincount([t[0] for t in population.token_ids], minlength=VOCAB)
    return factor * np.append(counts, (counts**2).sum())


def test_the_slot_is_uniform_and_follows_resampling(tiny):
    params = params_of(4, 1.0)
    exact = posterior_samples(tiny, POTENTIAL, 1)[0]
    slots = []
    for i in range(400):
        group = Group(SMCParams(**{**vars(params), "group": i}), POTENTIAL, PROMPT, tiny.stop, exact=[exact])
        rows, path = TableRows(tiny, 4), [retained(group)]
        while not group.done:
            take_step(group, rows)
            path.append(retained(group))
        lineage = group.population().lineage(path[-1])
        tokens = group.lineages.stacked("tokens")
        assert [int(tokens[t][row]) for t, row in enumerate(lineage)][: len(exact)] == exact
        slots.append(path[: len(exact)])
    for column in np.array(slots).T:
        assert np.all(np.abs(np.bincount(column, minlength=4) - 100) <= 4 * np.sqrt(400 * 0.25 * 0.75))


@pytest.mark.parametrize("kind", ["twisted", "base", "guided"])
def test_weighing_exact_samples(tiny, kind):
    """N exact samples for N particles at threshold 0: log weights are log p0 φ / q of each, as enumerated."""
    potential = Guide(value_table(STEPS, VOCAB, seed=4)) if kind == "guided" else POTENTIAL
    exact = posterior_samples(tiny, potential, 16)
    group = run(tiny, params_of(16, 0.0, "base" if kind == "base" else "twisted"), potential, exact)
    population = group.population()
    assert population.token_ids == exact
    value = potential.value.numpy()
    for tokens, got, log_p in zip(exact, population.log_weights, population.log_probs, strict=True):
        log_q = 0.0
        for t, v in enumerate(tokens):
            x = tiny.table[tuple(tokens[:t])] + (0.0 if kind == "base" else potential.share * value[t])
            log_q += x[v] - np.logaddexp.reduce(x)
        want = tiny.log_p[tuple(tokens)] + potential.log_phi(tuple(tokens)) - log_q
        assert abs(got - want) < 2e-5 and abs(log_p - tiny.log_p[tuple(tokens)]) < 2e-5


@pytest.mark.parametrize("threshold", [0.0, 0.7, 1.0])
def test_a_proposal_only_potential_is_unbiased(tiny, threshold):
    """Its free constants enter neither Ẑ nor the resampling."""
    guide = Guide(value_table(STEPS, VOCAB, seed=4))
    _, populations = run_many(tiny, params_of(6, threshold, seed=1), guide, 600)
    ratio = np.exp([p.log_z - tiny.log_z(guide.log_phi) for p in populations])
    assert abs(ratio.mean() - 1) <= 3 * ratio.std(ddof=1) / np.sqrt(len(ratio))
    if threshold == 1.0:
        assert all(p.resampled[1:].all() for p in populations if p.T > 1)


@pytest.mark.parametrize("kind", ["base", "guided"])
def test_resampling_to_finished_particles_only(tiny, kind):
    """Where a resampling leaves no unfinished particle, the population holds what it chose: E[Ẑ W f] = Z E_σ[f]."""
    value = np.zeros((STEPS, VOCAB))
    value[0, STOP], value[1, STOP] = 2.0, 1.0
    potential = (Guide if kind == "guided" else TableTwist)(value)
    params = params_of(3, 1.0, "base" if kind == "base" else "twisted")
    _, populations = run_many(tiny, params, potential, 1000)
    early = [p for p in populations if p.T < STEPS or (p.tokens[-1] < 0).all()]
    assert any((p.tokens[-1] < 0).all() for p in early)
    z, posterior = np.exp(tiny.log_z(potential.log_phi)), tiny.posterior(potential.log_phi)
    for length in range(1, STEPS + 1):
        got = np.array([np.mean(np.exp(p.log_weights) * [len(t) == length for t in p.token_ids]) for p in populations])
        want = z * sum(p for s, p in posterior.items() if len(s) == length)
        assert abs(got.mean() - want) <= 3.5 * got.std(ddof=1) / np.sqrt(len(got)), length


def test_refusals(tiny):
    exact = posterior_samples(tiny, POTENTIAL, 4)
    params = params_of(4, 0.5)
    for bad, why in (
        (exact[:2], "give one"),
        (exact, "ess_threshold"),
        ([[0, 1]], "no complete sequence"),
        ([[STOP, 0, 0]], "no complete sequence"),
        ([[]], "no complete sequence"),
        ([[0, 0, 77]], "outside the vocabulary"),
        ([[0, 2, 0]], "rules out|weight zero"),  # the potential forbids token 2 at step 1
    ):
        with pytest.raises(SMCError, match=why):
            run(tiny, params, POTENTIAL, bad)
    with pytest.raises(SMCError, match="proposal-only"):
        run(tiny, params_of(4, 0.5, "base"), Guide(value_table(STEPS, VOCAB)))
