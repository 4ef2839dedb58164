"""Bounds and divergences against enumeration, over the table of a tiny Llama."""

import itertools
import json
import math

import numpy as np
import pytest
from tiny import PROMPT, TableLLM, TableTwist, TinyLlama, make_llama, value_table

from fastsmc import SMCParams, evaluate

VOCAB, STEPS, STOP = 6, 3, 5
POTENTIAL = TableTwist(np.where(np.isinf(v := value_table(STEPS, VOCAB, seed=4)), -1.0, 1.5 * v))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def posterior_samples(tiny, k, seed=0):
    posterior = tiny.posterior(POTENTIAL.log_phi)
    picks = np.random.default_rng(seed).choice(len(posterior), size=k, p=list(posterior.values()))
    return [list(list(posterior)[i]) for i in picks]


def log_q(tiny, tokens, proposal, power=1.0):
    """log q of a whole sequence under the proposal, as enumerated."""
    total = 0.0
    for t, v in enumerate(tokens):
        twist = POTENTIAL.share * POTENTIAL.value[t].numpy() if proposal == "twisted" else 0.0
        x = power * tiny.table[tuple(tokens[:t])] + twist
        total += x[v] - np.logaddexp.reduce(x)
    return total


def exact_kl(tiny, proposal, power=1.0):
    log_z, q_sigma, sigma_q = tiny.log_z(POTENTIAL.log_phi), 0.0, 0.0
    for s, log_p in tiny.log_p.items():
        log_sigma, q = log_p + POTENTIAL.log_phi(s) - log_z, log_q(tiny, s, proposal, power)
        q_sigma += math.exp(q) * (q - log_sigma)
        sigma_q += math.exp(log_sigma) * (log_sigma - q)
    return q_sigma, sigma_q


@pytest.mark.parametrize(
    ("n", "threshold", "proposal", "power"),
    [
        *itertools.product([1, 4, 64], [0.0, 0.5, 1.0], ["twisted", "base"], [1.0]),
        *((1, 0.5, "twisted", 2.0), (4, 0.5, "base", 2.0), (4, 1.0, "twisted", 0.5)),
    ],
)
def test_against_enumeration(tiny, n, threshold, proposal, power):
    llm, runs = TableLLM(tiny), 240 if n < 64 else 60
    params = SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=threshold, proposal=proposal, seed=2, power=power)
    tiny = tiny.restricted(params)
    truth = tiny.log_z(POTENTIAL.log_phi)
    exact = posterior_samples(tiny, 240, seed=5)
    bounds = evaluate.log_z_bounds(llm, PROMPT, params, POTENTIAL, exact=exact, runs=runs)
    assert bounds.lower.shape == bounds.upper.shape == (runs,)
    assert bounds.lower.dtype == bounds.upper.dtype == np.float64
    assert bounds.lower_mean <= truth + 3 * bounds.lower_se and truth <= bounds.upper_mean + 3 * bounds.upper_se
    # what the bounds are bounds of
    for ratio in (np.exp(bounds.lower - truth), np.exp(truth - bounds.upper)):
        assert abs(ratio.mean() - 1) <= 4 * ratio.std(ddof=1) / math.sqrt(runs) + 1e-6
    log_z, se = bounds.log_z()
    assert abs(log_z - truth) <= 3.5 * se + 1e-6
    if n == 1:  # one draw: the gap is the symmetrised divergence of the proposal itself
        assert abs(bounds.gap - sum(exact_kl(tiny, proposal, power))) <= 3 * bounds.gap_se
    got = evaluate.kl(llm, PROMPT, params, POTENTIAL, exact=exact, runs=runs, bounds=bounds)
    q_sigma, sigma_q = exact_kl(tiny, proposal, power)
    assert abs(got.q_sigma - q_sigma) <= 3 * got.q_sigma_se and abs(got.sigma_q - sigma_q) <= 3 * got.sigma_q_se
    assert (got.draws, got.samples) == (runs * n, len(exact))


def test_more_particles_close_the_gap(tiny):
    gaps = []
    for n in (1, 4, 64):
        params = SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=0.5)
        exact = posterior_samples(tiny, 100)
        gaps.append(evaluate.log_z_bounds(TableLLM(tiny), PROMPT, params, POTENTIAL, exact=exact, runs=100).gap)
    assert gaps[0] > gaps[1] > gaps[2] > -0.01


def test_bridge_on_gaussians():
    """q = N(0, 1), σ̃ = e^{3} N(1, 1): w(x) = 3 + x − 1/2; the error is what it says, for unequal numbers too."""
    rng = np.random.default_rng(0)
    scores = []
    for _ in range(300):
        log_z, se = evaluate.bridge(2.5 + rng.normal(size=40), 3.5 + rng.normal(size=120))
        scores.append((log_z - 3.0) / se)
    assert abs(np.mean(scores)) < 0.25 and 0.85 < np.std(scores) < 1.15
    assert evaluate.bridge(np.array([-np.inf, 1.0, 1.0]), np.array([1.4, 1.4]))[0] == pytest.approx(0.8, abs=0.3)


def test_known_log_z_and_infinite_divergence(tiny):
    """A proposal that draws what φ forbids: KL(q‖σ) is infinite, KL(σ‖q) is not."""
    value = value_table(STEPS, VOCAB, seed=4)
    potential = TableTwist(value)
    posterior = tiny.posterior(potential.log_phi)
    exact = [list(s) for s, p in posterior.items() if p > 0.01]
    params = SMCParams(n_particles=64, max_tokens=STEPS, proposal="base")
    got = evaluate.kl(TableLLM(tiny), PROMPT, params, potential, exact=exact, runs=4, log_z=0.0)
    assert got.q_sigma == math.inf and math.isfinite(got.sigma_q) and got.log_z_se == 0.0


def test_report_table_and_plot(tiny, tmp_path):
    params = SMCParams(n_particles=8, max_tokens=STEPS)
    exact = posterior_samples(tiny, 20)
    result = evaluate.report(TableLLM(tiny), PROMPT, params, POTENTIAL, exact=exact, runs=8)
    text = evaluate.table(result)
    assert "twisted" in text and "base" in text and "rejection" in text
    evaluate.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
    plain = result["baselines"]
    want = sum(math.exp(lp) * math.exp(POTENTIAL.log_phi(s)) for s, lp in tiny.log_p.items())
    assert 0 < plain["acceptance"] <= 1.2 * want


def test_runs_without_any_weight(tiny):
    """A base proposal that hardly ever meets what φ allows: bounds of −inf, no NaN where a number is known, JSON."""
    value = np.full((STEPS, VOCAB), -np.inf)
    rare = min(tiny.log_p, key=tiny.log_p.get)
    for t, v in enumerate(rare):
        value[t, v] = 0.0
    potential = TableTwist(value, share=1.0)
    params = SMCParams(n_particles=1, max_tokens=STEPS, proposal="base", ess_threshold=0.0)
    bounds = evaluate.log_z_bounds(TableLLM(tiny), PROMPT, params, potential, exact=[list(rare)], runs=3)
    assert np.all(bounds.lower == -np.inf) and np.isfinite(bounds.upper).all() and bounds.lower_mean == -np.inf
    plain = bounds.to_dict()
    assert plain["lower"] is None and plain["log_z"] is None and plain["lower_runs"] == [None] * 3
    result = evaluate.report(TableLLM(tiny), PROMPT, params, potential, exact=[list(rare)], runs=1)
    assert "–" in evaluate.table(result)
    json.dumps(result, allow_nan=False)
    evaluate.plot(result)


def test_refusals(tiny):
    params, llm = SMCParams(n_particles=4, max_tokens=STEPS), TableLLM(tiny)
    for exact, runs, why in (([], 4, "exact="), (None, 4, "exact="), ([5, 6], 4, "exact="), ([[0, 0, 0]], 0, "runs=0")):
        with pytest.raises(ValueError, match=why):
            evaluate.log_z_bounds(llm, PROMPT, params, POTENTIAL, exact=exact, runs=runs)
