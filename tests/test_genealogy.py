"""The error of log Ẑ by the run that gave it, against what runs do and against arithmetic by hand."""

import dataclasses
import importlib
import math
from pathlib import Path

import numpy as np
import pytest
from tiny import PROMPT, TableLLM, TableTwist, TinyLlama, make_llama, run_table, value_table

from fastsmc import SMCParams, genealogy
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.population import Population

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = value_table(STEPS, VOCAB, seed=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def by_hand(population, twisted, tau):
    """V in plain loops: for each root what its descendants gain by weighing."""
    n, gains = population.n_particles, {}
    ends = [*np.flatnonzero(population.resampled), population.T]
    shares = [1 / n] * n
    root = list(range(n))
    for end in ends:
        last = end == population.T
        log_w = population.log_weights if last else population.step_log_weights[end if twisted else end - 1]
        w = np.exp(log_w - log_w.max())
        for i in range(n):
            gains[root[i]] = gains.get(root[i], 0.0) + w[i] / w.sum() - shares[i]
        if not last:  # children keep W^(1 − 1/τ), and share the whole
            parents = population.ancestors[end].tolist()
            root = [root[a] for a in parents]
            left = [w[a] ** (1 - 1 / tau) for a in parents]
            shares = [v / sum(left) for v in left]
    return n / (n - 1) * sum(g * g for g in gains.values())


@pytest.mark.parametrize(("threshold", "tau"), [(0.0, 1.0), (0.6, 1.0), (1.0, 1.0), (1.0, 2.0)])
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_by_hand(tiny, proposal, threshold, tau):
    params = SMCParams(
        n_particles=40, max_tokens=STEPS, ess_threshold=threshold, proposal=proposal, seed=3, resampling_temperature=tau
    )
    population = run_table(tiny, params, TableTwist(VALUE))
    assert population.log_z_stderr_reason is None
    assert population.log_z_stderr**2 == pytest.approx(by_hand(population, proposal == "twisted", tau), rel=1e-9)
    lineages = [population.lineage(i) for i in range(40)]
    assert population.roots.tolist() == [rows[0] for rows in lineages]
    alive = population.log_weights > -math.inf
    assert population.n_roots == len({rows[0] for rows, a in zip(lineages, alive, strict=True) if a})
    if threshold == 0.0:  # the usual variance of a mean of N weights
        w = np.exp(population.log_weights)
        assert population.log_z_stderr == pytest.approx(w.std(ddof=1) / math.sqrt(40) / w.mean())
    again = Population.from_bytes(population.to_bytes())
    assert again.log_z_stderr == population.log_z_stderr and again.log_z_stderr_reason is None


def test_where_there_is_none(tiny):
    twist = TableTwist(VALUE)

    def run(potential=twist, exact=None, **params):
        params = SMCParams(**{"n_particles": 8, "max_tokens": STEPS, **params})
        return TableLLM(tiny).smc([PROMPT], params, potential, exact=None if exact is None else [exact])[0]

    exact = [[0, 1, 0, 1]]
    reasons = {
        "a single particle": run(n_particles=1),
        "exact samples": run(exact=exact, ess_threshold=1.0),
        "all weights are zero": run(TableTwist(np.full_like(VALUE, -np.inf)), ess_threshold=1.0),
        "all weights are equal": run(TableTwist(np.zeros_like(VALUE)), proposal="base"),
    }
    for reason, population in reasons.items():
        assert math.isnan(population.log_z_stderr) and reason in population.log_z_stderr_reason
        summary = Population.from_bytes(population.to_bytes()).summary()
        assert summary["log_z_stderr"] is None and reason in summary["log_z_stderr_reason"]
    assert (run(None).log_z_stderr, run(None).log_z_stderr_reason) == (0.0, None)
    forced = [run(None, n_particles=3, force_stop=True, logit_bias={STOP: 4.0}, seed=seed) for seed in range(20)]
    assert any(each.log_z == 0.0 for each in forced) and not any(each.log_z_stderr == 0.0 for each in forced)
    one_root = np.array([[0, 1, 2, 3], [2, 2, 2, 2]])
    values = genealogy.log_z_stderr(
        one_root,
        np.array([False, True]),
        np.zeros((2, 4)),
        np.zeros(2),
        np.arange(4.0),
        equal_by_law=False,
        retains=False,
    )
    assert math.isnan(values[0]) and "one root" in values[1]


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [(0.1, "why", "log_z_stderr=0.1"), (math.nan, None, "log_z_stderr=nan"), (-1.0, None, "=-1"), ("x", None, "'x'")],
)
def test_a_figure_or_a_reason(tiny, value, reason, message):
    population = run_table(tiny, SMCParams(n_particles=4, max_tokens=STEPS), TableTwist(VALUE))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(population, log_z_stderr=value, log_z_stderr_reason=reason)


@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize(("proposal", "threshold"), [("base", 0.5), ("twisted", 1.0)])
def test_coverage(monkeypatch, proposal, threshold, scheme):
    """The bench, smaller: log Ẑ ± 2 standard errors holds log Z in 90 % of runs, and is not far too long."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "bench"))
    bench = importlib.import_module("bench_stderr")
    model = bench.Model("small", 5, 0.5, proposal, 0.5 if proposal == "twisted" else 1.0)
    found = bench.simulate(model, scheme, threshold, runs=100, n=150)
    assert found["relative_sd"] < 0.15 and abs(found["z_over_z"] - 1) < 4 * found["z_over_z_se"]
    gains = found["gains"]
    assert gains["coverage"] >= 0.9 - 2 * math.sqrt(0.9 * 0.1 / 100)  # 0.9, of 100 runs
    assert gains["finite"] == 1.0 and 0.75 <= gains["ratio"] <= 2.0
    if threshold == 1.0 and scheme == "residual":  # what the gains are for
        assert found["lee_whiteley"]["ratio"] > 1.2 * gains["ratio"]
