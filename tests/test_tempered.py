"""Resampling by other probabilities than the weights, and only every few tokens, over the table of a tiny Llama."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, Guide, TableTwist, TinyLlama, make_llama, run_tables, value_table

from fastsmc import Population, SMCParams, ops
from fastsmc.params import GROUP_KEY, RESAMPLING_SCHEMES
from fastsmc.smc import Group
from fastsmc.smc.step import RESAMPLE

VOCAB, STEPS, STOP, N = 6, 4, 5, 5
#: heavy enough that children without their corrected weights are seen, and that sequences end early
VALUE = 2 * value_table(STEPS, VOCAB, seed=4)
VALUE[0, STOP] += 1.5


KINDS = {"twisted": TableTwist(VALUE), "base": TableTwist(VALUE), "guided": Guide(VALUE)}
#: τ and B, that are not the defaults
WAYS = [(1, 3), *itertools.product((2, "entropic"), (1, 3))]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def params_of(kind, threshold=1.0, **more):
    proposal = "base" if kind == "base" else "twisted"
    return SMCParams(**dict(n_particles=N, max_tokens=STEPS, ess_threshold=threshold, proposal=proposal) | more)


def run(tiny, kind, params, runs, **more):
    each = [dataclasses.replace(params, group=i) for i in range(runs)]
    return run_tables(tiny, [Group(p, KINDS[kind], PROMPT, tiny.stop, **more) for p in each])


#: each way with each scheme and each kind, each scheme with both proposals
PAIRS = [
    *((way, scheme, ("twisted", "base")[(i + k) % 2]) for i, way in enumerate(WAYS) for k, scheme in
      enumerate(RESAMPLING_SCHEMES)),
    *((way, "systematic", "guided") for way in WAYS),
]  # fmt: skip


@pytest.mark.parametrize(("way", "scheme", "kind"), PAIRS)
def test_unbiased(tiny, way, scheme, kind):
    """E[Ẑ] = Z and E[Ẑ ΣWf] by enumeration, within 4 standard errors, with sequences that end early among them."""
    tau, every = way
    threshold = 0.9 if tau == "entropic" else 1.0
    params = params_of(kind, threshold, resampling=scheme, resampling_temperature=tau, resample_every=every, seed=8)
    potential, runs = KINDS[kind], 200
    populations = run(tiny, kind, params, runs)
    truth = {s: math.exp(lp + potential.log_phi(s)) for s, lp in tiny.log_p.items()}
    features = {
        "1": lambda s: 1.0, "first is 0": lambda s: s[0] == 0, "early": lambda s: len(s) < STEPS,
        "last is 1": lambda s: s[-1] == 1, "third of it": lambda s: sum(s) % 3 == 0,
    }  # fmt: skip
    for name, f in features.items():
        got = [np.mean(np.exp(p.log_weights) * [f(tuple(ids)) for ids in p.token_ids]) for p in populations]
        want = sum(w * f(s) for s, w in truth.items())
        error = np.std(got, ddof=1) / math.sqrt(runs)
        assert abs(np.mean(got) - want) <= 4 * error, (name, np.mean(got), want, error)
    when = np.array([np.pad(p.resampled, (0, STEPS - p.T)) for p in populations])
    assert when[:, [t for t in range(1, STEPS) if t % every == 0]].any() and not when[:, 0].any()
    assert not when[:, [t for t in range(STEPS) if t % every]].any()


@pytest.mark.parametrize("retains", [False, True])
@pytest.mark.parametrize("tau", [1.0, 2.0, 5.0, "entropic"])
def test_weights_after_a_resampling(tiny, tau, retains):
    """Each child has the weight W / r of its parent, and log Ẑ the mean; ESS is that of the weights, not of r."""
    group = Group(
        params_of("twisted", 0.6, n_particles=64, resampling_temperature=tau), KINDS["twisted"], PROMPT, tiny.stop,
        exact=[[0, 0, 0, STOP]] if retains else None,
    )  # fmt: skip
    step = group.cohort.step
    step.step += 1
    log_w = torch.from_numpy(np.random.default_rng(3).normal(scale=2.0, size=64))
    log_w[5] = -math.inf
    ess, log_mean = ops.ess_log_mean(log_w)
    assert ess < 0.5 * 64
    step.particles.log_w.copy_(log_w)
    u = step.uniforms(RESAMPLE)
    ancestors = step.resample(step.going)
    assert bool(step.resampled) and float(step.ess) == ess and float(step.log_z) == float(step.log_mean) == log_mean
    exponent = 1 / (64 / ess * (1 - 1 / STEPS) if tau == "entropic" else tau)
    weight, r = log_w.softmax(0), (log_w * exponent).softmax(0)
    np.testing.assert_allclose(step.particles.log_w.exp(), (weight / r)[ancestors], rtol=1e-12)
    if tau == 1.0:
        assert (step.particles.log_w == 0.0).all()
    if not retains:
        same = ops.resample(log_w * exponent, u, threshold=1.0)
        assert torch.equal(ancestors, same.ancestors) and torch.equal(step.particles.rank, same.rank)


def test_the_threshold_is_about_the_weights(tiny):
    """Where W is below it and r is not, a group resamples; where W is not, it does not."""
    for threshold, resamples in ((0.5, True), (0.1, False)):
        group = Group(
            params_of("twisted", threshold, n_particles=64, resampling_temperature=8.0), KINDS["twisted"], PROMPT,
            tiny.stop,
        )  # fmt: skip
        step = group.cohort.step
        step.step += 1
        log_w = torch.from_numpy(np.random.default_rng(3).normal(scale=1.2, size=64))
        shares = [ops.ess_log_mean(log_w / tau)[0] / 64 for tau in (1.0, 8.0)]
        assert 0.1 < shares[0] < 0.5 < shares[1]
        step.particles.log_w.copy_(log_w)
        step.resample(step.going)
        assert bool(step.resampled) is resamples
        assert resamples or torch.equal(step.particles.log_w, log_w)


def test_entropic_is_by_weight_where_weights_are_even_or_time_is_late(tiny):
    """After half of the tokens, and with an ESS of half or more, it draws by weight."""
    for drawn, scale, by_weight in ((1, 2.0, False), (STEPS // 2, 2.0, True), (1, 0.5, True)):
        group = Group(
            params_of("twisted", n_particles=64, resampling_temperature="entropic"), KINDS["twisted"], PROMPT, tiny.stop
        )
        step = group.cohort.step
        step.step += drawn
        step.particles.log_w.copy_(torch.from_numpy(np.random.default_rng(3).normal(scale=scale, size=64)))
        step.resample(step.going)
        assert bool(step.resampled) and bool((step.particles.log_w == 0.0).all()) is by_weight


@pytest.mark.parametrize("kind", ["twisted", "base"])
def test_neighbours_by_weight_keep_their_bits(tiny, kind):
    """Groups at τ = 1 and B = 1 have the same bits beside tempered ones as beside none, and so have those."""
    ways = [dict(), dict(resampling_temperature=2.0), dict(resample_every=2), dict(resampling_temperature="entropic")]
    asked = [params_of(kind, 0.8, group=i, n_particles=9, **ways[i % 4]) for i in range(16)]
    together = run_tables(tiny, [Group(p, KINDS[kind], PROMPT, tiny.stop) for p in asked])
    for params, got in zip(asked, together, strict=True):
        (want,) = run_tables(tiny, [Group(params, KINDS[kind], PROMPT, tiny.stop)])
        for name in Population.ARRAYS:
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
        assert got.log_z == want.log_z


def test_the_record_of_a_resampling_to_finished_particles_only(tiny):
    """The weights that children keep are in the last row of the record, and their ESS beside it."""
    value = np.zeros((STEPS, VOCAB))
    value[0, STOP], value[0, 1] = 3.0, 1.0
    each = [params_of("base", n_particles=3, resampling_temperature=2.0, group=i) for i in range(300)]
    populations = run_tables(tiny, [Group(p, TableTwist(value), PROMPT, tiny.stop) for p in each])
    over = [p for p in populations if p.T > 1 and (p.tokens[-1] < 0).all()]
    assert over
    for p in over:
        np.testing.assert_array_equal(p.step_log_weights[-1], p.log_weights)
        assert p.resampled[-1] and p.ess[-1] == pytest.approx(p.final_ess, rel=1e-12)


def test_parameters_travel():
    for tau, every in itertools.product((1, 2.5, "entropic"), (1, 7)):
        params = SMCParams(n_particles=3, resampling_temperature=tau, resample_every=every)
        sent = json.loads(json.dumps({GROUP_KEY: 3} | params.to_extra_args()))
        assert SMCParams.from_request(sent, **params.to_shared()) == params
    assert SMCParams(max_tokens=4, resample_every=4).never_resamples
    assert not SMCParams(max_tokens=4, resample_every=3).never_resamples


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("resampling_temperature", 0.5), ("resampling_temperature", math.nan), ("resampling_temperature", math.inf),
        ("resampling_temperature", "linear"), ("resampling_temperature", True), ("resampling_temperature", None),
        ("resample_every", 0), ("resample_every", 1.5), ("resample_every", True), ("resample_every", "3"),
    ],
)  # fmt: skip
def test_refused_values(name, value):
    allowed = r"in \[1, .*, or 'entropic'" if name == "resampling_temperature" else "an integer from 1"
    with pytest.raises(ValueError, match=f"{name}={value!r}: must be .*{allowed}"):
        SMCParams(**{name: value})
