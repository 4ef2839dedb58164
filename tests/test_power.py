"""Powers of p0 as targets: E[Ẑ] and the posterior by enumeration, ramps, and a target that needs no potential."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from tiny import PROMPT, Guide, TableLLM, TableRows, TableTwist, TinyLlama, make_llama, run_each, run_table, value_table

from fastsmc import SMCParams, evaluate
from fastsmc.hf import HFEngine
from fastsmc.interventions import Temperature
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.smc import Group, SMCError
from fastsmc.smc.driving import run_group

VOCAB, STEPS, STOP = 6, 4, 5
VALUES = value_table(STEPS, VOCAB)
RAMPS = {0.5: (None, 3), 1.0: (None, (0.7, 1.2, 1.0)), 2.0: (None, STEPS), 4.0: (3, (3.0, 1.0, 4.0))}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model of which importance weights p0^α / q are tame for all powers here: their mean square is below 1.7."""
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB, seed=24)


@pytest.fixture(scope="module")
def tiny(path):
    return TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))


def check(tiny, params, potential, runs):
    """Ẑ, and Ẑ times the weighted share of first tokens and lengths, within 4 standard errors of the enumeration.

    Those rarer than 15 % are left out: so few runs hit them that their standard error could not be trusted.
    """
    target = tiny.restricted(params)
    truth = {s: math.exp(p + (0.0 if potential is None else potential.log_phi(s))) for s, p in target.log_p.items()}
    features = {"one": lambda s: 1.0}
    features |= {f"first={v}": lambda s, v=v: s[0] == v for v in range(VOCAB)}
    features |= {f"length={k}": lambda s, k=k: len(s) == k for k in range(1, STEPS + 1)}
    least = 0.15 * sum(truth.values())
    features = {name: f for name, f in features.items() if sum(p for s, p in truth.items() if f(s)) > least}
    got = {name: [] for name in features}
    for population in run_each(tiny, [dataclasses.replace(params, seed=seed) for seed in range(runs)], potential):
        z, sequences = np.exp(population.log_weights), list(map(tuple, population.token_ids))
        for name, feature in features.items():
            got[name].append(np.mean(z * [feature(s) for s in sequences]))
        known = [s in target.log_p for s in sequences]
        assert not z[~np.array(known)].any()  # all others are dead
        want = [target.log_p[s] / params.power for s in sequences if s in target.log_p]
        np.testing.assert_allclose(population.log_probs[known], want, atol=1e-5)
    for name, feature in features.items():
        want = sum(value for s, value in truth.items() if feature(s))
        error = np.std(got[name], ddof=1) / math.sqrt(runs)
        assert abs(np.mean(got[name]) - want) <= 4 * error + 1e-9, (name, np.mean(got[name]), want, error)


KINDS = {"none": None, "twist": TableTwist(VALUES), "guide": Guide(VALUES)}


@pytest.mark.parametrize(
    ("kind", "proposal"), [*itertools.product(["none", "twist"], ["twisted", "base"]), ("guide", "twisted")]
)
@pytest.mark.parametrize("power", RAMPS)
def test_unbiased(tiny, power, kind, proposal):
    """Each with a scheme of its own, and threshold; with and without a ramp."""
    at = 3 * list(RAMPS).index(power) + list(KINDS).index(kind)
    for i, ramp in enumerate(RAMPS[power]):
        params = SMCParams(
            n_particles=6, max_tokens=STEPS, stop_token_ids=[STOP], power=power, power_ramp=ramp, proposal=proposal,
            ess_threshold=(0.8, 1.0)[i], resampling=RESAMPLING_SCHEMES[(at + i) % len(RESAMPLING_SCHEMES)],
        )  # fmt: skip
        check(tiny, params, KINDS[kind], 100)


def test_a_power_of_1_changes_nothing(tiny):
    params = SMCParams(n_particles=20, max_tokens=STEPS, ess_threshold=0.8, seed=4)
    for potential, proposal in itertools.product((None, KINDS["twist"]), ("twisted", "base")):
        without, ramped = (
            run_table(tiny, dataclasses.replace(params, proposal=proposal, power_ramp=ramp), potential)
            for ramp in (None, 7)
        )
        assert without.token_ids == ramped.token_ids and without.log_z == ramped.log_z
        np.testing.assert_array_equal(without.log_weights, ramped.log_weights)


def test_the_twisted_proposal_needs_no_potential(tiny):
    """It weighs before it draws, so that siblings share a row; log Ẑ exceeds 0 where p0 is flattened."""
    params = SMCParams(n_particles=2000, max_tokens=STEPS, power=0.5, stop_token_ids=[STOP], seed=1)
    target = tiny.restricted(params)
    for proposal in ("twisted", "base"):
        population = run_table(tiny, dataclasses.replace(params, proposal=proposal), None)
        assert abs(population.log_z - target.log_z(lambda s: 0.0)) < 0.05 and population.log_z > 0
    # one step is one row: its weight is exact
    once = run_table(tiny, dataclasses.replace(params, max_tokens=1), None)
    assert once.log_z == pytest.approx(np.logaddexp.reduce(0.5 * tiny.table[()]), abs=1e-5)
    assert np.ptp(once.log_weights) == 0


@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_log_p0_follows_its_particle(tiny, proposal):
    """What ramps raise is log p0 of the particle's own tokens, whatever it was resampled from."""
    params = SMCParams(
        n_particles=30, max_tokens=STEPS, power=0.5, power_ramp=(3.0, 0.2, 0.5), ess_threshold=1.0, proposal=proposal,
        resampling="multinomial", seed=6,
    )  # fmt: skip
    group = Group(params, KINDS["twist"], PROMPT)
    population = run_group(group, TableRows(tiny, 30))
    moved = population.ancestors != np.arange(30)
    assert moved[population.resampled].any() and len(set(population.log_probs.tolist())) > 5
    np.testing.assert_allclose(group.cohort.particles.log_prob.numpy(), population.log_probs, atol=1e-12)


def test_ramps_and_ends_leave_nothing_behind(tiny):
    """Without resampling weights are p0^α φ / q, whatever the ramp: the same draws have the same weights."""
    base = SMCParams(n_particles=50, max_tokens=STEPS, ess_threshold=0.0, power=2.0, proposal="base", seed=3)
    for ramp in (None, 2, 9, (0.5, 3.0, 2.0)):
        params = dataclasses.replace(base, power_ramp=ramp)
        population = run_table(tiny, params, KINDS["twist"])
        for ids, log_w in zip(population.token_ids, population.log_weights, strict=True):
            log_q = 0.0
            for t, v in enumerate(ids):
                x = params.powers[min(t, len(params.powers) - 1)] * tiny.table[tuple(ids[:t])]
                log_q += x[v] - np.logaddexp.reduce(x)
            want = 2.0 * tiny.log_p[tuple(ids)] + KINDS["twist"].log_phi(ids) - log_q
            assert log_w == want or abs(log_w - want) < 1e-5


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_exact_samples_by_rejection(tiny, power):
    """Draws from p0 that are kept with chance p0^(α−1) φ are samples of the target."""
    phi = TableTwist(np.minimum(VALUES, 0.0))
    params = SMCParams(n_particles=256, max_tokens=STEPS, power=power, power_ramp=2, seed=8)
    target = tiny.restricted(params)
    samples = evaluate.rejection(TableLLM(tiny), PROMPT, params, phi, 300)
    posterior = target.posterior(phi.log_phi)
    for feature in (lambda s: s[0] == 0, lambda s: len(s) < STEPS):
        want, got = sum(p for s, p in posterior.items() if feature(s)), np.mean([feature(s) for s in samples])
        assert abs(got - want) <= 4 * math.sqrt(want * (1 - want) / 300)
    figures = evaluate.baselines(TableLLM(tiny), PROMPT, params, phi, runs=20)
    log_z, rate = target.log_z(phi.log_phi), figures["acceptance"]
    assert abs(rate - math.exp(log_z)) <= 4 * math.sqrt(rate * (1 - rate) / 5120)
    with pytest.raises(ValueError, match=r"power=0\.5: must be at least 1 for rejection"):
        evaluate.rejection(TableLLM(tiny), PROMPT, dataclasses.replace(params, power=0.5, power_ramp=None), phi, 5)


def test_the_hugging_face_engine_equals_the_table(path, tiny):
    engine = HFEngine(path, stop_token_ids=[STOP])
    for potential, proposal in itertools.product((None, KINDS["twist"]), ("twisted", "base")):
        params = SMCParams(n_particles=12, max_tokens=STEPS, power=2.0, power_ramp=2, proposal=proposal, seed=5)
        got, want = engine.smc(PROMPT, params, potential), run_table(tiny, params, potential)
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.log_weights, want.log_weights, atol=1e-4)
    with pytest.raises(ValueError, match=r"power=2: must be 1, without a ramp, for counterfactuals"):
        engine.counterfactual(PROMPT, [1, 2], Temperature(2.0), params=SMCParams(power=2.0))


@pytest.mark.parametrize("power", [1e-6, 300.0])
def test_extreme_powers(tiny, power):
    """Next to 0 every sequence has weight 1; far above 1 the likeliest one has nearly all."""
    params = SMCParams(n_particles=64, max_tokens=STEPS, power=power, ess_threshold=0.5, stop_token_ids=[STOP])
    population = run_table(tiny, params, None)
    target = tiny.restricted(params)
    assert np.isfinite(population.log_z)
    if power < 1:
        assert population.log_z == pytest.approx(target.log_z(lambda s: 0.0), abs=1.0)
    else:  # the greedy path has the largest first factors
        rates = population.log_probs[population.weights.argmax()]
        assert rates >= max(p / power for p in target.log_p.values()) - 0.5


def test_impossible(tiny):
    """A target without any sequence has no weight, as without a power."""
    phi = TableTwist(np.full((STEPS, VOCAB), -np.inf))
    for proposal in ("twisted", "base"):
        params = SMCParams(n_particles=5, max_tokens=STEPS, power=2.0, power_ramp=2, proposal=proposal)
        population = run_group(Group(params, phi, PROMPT, {STOP}), TableRows(tiny, 5))
        assert population.log_z == -math.inf
    with pytest.raises(SMCError, match="has weight zero|rules out"):
        run_group(Group(params, phi, PROMPT, {STOP}, exact=[[1, 2, 3, 4]]), TableRows(tiny, 5))
