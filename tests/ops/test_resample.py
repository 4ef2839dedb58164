"""resample: counts equal to the reference's, unbiased, in-place form; ess_log_mean."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmc import ops, reference
from fastsmc.params import RESAMPLING_SCHEMES

BACKENDS = ("cpu", "torch")
ORDERS = ("inplace", "sorted")
inf, nan = math.inf, math.nan


def random_case(n, sigma, dead, seed):
    rng = np.random.default_rng(seed)
    log_weights = rng.normal(-1000.0, sigma, n)
    log_weights[rng.random(n) < dead] = -inf
    log_weights[rng.integers(n)] = -1000.0  # at least one alive
    return torch.from_numpy(log_weights), torch.from_numpy(rng.random(n))


def check_form(r, log_weights, order):
    """What every result must satisfy, whatever the scheme."""
    n = len(log_weights)
    a, counts, rank = (x.numpy() for x in r)
    assert a.dtype == counts.dtype == rank.dtype == np.int64
    assert counts.min() >= 0 and counts.sum() == n
    assert (counts[np.isneginf(log_weights)] == 0).all()
    np.testing.assert_array_equal(np.bincount(a, minlength=n), counts)
    if order == "inplace":
        assert (a[counts > 0] == np.flatnonzero(counts > 0)).all()
        assert (a[a] == a).all()
        assert (np.diff(a[counts == 0]) >= 0).all()
    else:
        assert (np.diff(a) >= 0).all()
    for parent in np.unique(a):
        assert rank[a == parent].tolist() == list(range(counts[parent]))


def test_registries_name_the_same_schemes():
    from fastsmc.ops import _torch

    assert tuple(reference.SCHEMES) == tuple(_torch.SCHEMES) == RESAMPLING_SCHEMES


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_equals_reference(n, scheme, order, backend):
    for seed, (sigma, dead) in enumerate([(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (8.0, 0.2), (0.3, 0.95)]):
        log_weights, u = random_case(n, sigma, dead, seed)
        got = ops.resample(log_weights, u, scheme=scheme, order=order, backend=backend)
        want = reference.resample(log_weights.numpy(), u.numpy(), scheme=scheme, order=order)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
        check_form(got, log_weights.numpy(), order)


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(-inf), st.floats(-60, 60)), min_size=1, max_size=70),
    scheme=st.sampled_from(RESAMPLING_SCHEMES), order=st.sampled_from(ORDERS), backend=st.sampled_from(BACKENDS),
    data=st.data(),
)  # fmt: skip
def test_form_on_any_weights(weights, scheme, order, backend, data):
    log_weights = torch.tensor(weights, dtype=torch.float64)
    if log_weights.isneginf().all():
        log_weights[-1] = 0.0
    unit = st.one_of(st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]), st.floats(0, 1, exclude_max=True))
    u = torch.tensor(data.draw(st.lists(unit, min_size=len(weights), max_size=len(weights))), dtype=torch.float64)
    got = ops.resample(log_weights, u, scheme=scheme, order=order, backend=backend)
    check_form(got, log_weights.numpy(), order)
    want = reference.resample(log_weights.numpy(), u.numpy(), scheme=scheme, order=order)
    np.testing.assert_array_equal(got.counts, want.counts)


@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n, sigma", [(5, 1.0), (48, 0.5), (33, 2.0)])
def test_unbiased(scheme, n, sigma):
    """E[counts] = N·W within 4.5 standard errors (Bonferroni over the particles of a case), many replicates."""
    log_weights, _ = random_case(n, sigma, 0.1, n)
    w = np.exp(log_weights.numpy() + 1000.0)
    w /= w.sum()
    replicates = 6000
    u = torch.from_numpy(np.random.default_rng(1).random((replicates, n)))
    counts = np.array([ops.resample(log_weights, row, scheme=scheme).counts.numpy() for row in u])
    error = counts.mean(0) - n * w
    # the spread cannot be judged from counts that were hardly seen: at least that of one event
    spread = np.maximum(counts.std(0), np.sqrt(1 / replicates) * (n * w > 0))
    assert (np.abs(error) <= 4.5 * spread / math.sqrt(replicates) + 1e-12).all()
    if scheme in ("systematic", "residual", "ssp"):
        assert (counts >= np.floor(n * w - 1e-9)).all()
    if scheme in ("systematic", "ssp"):
        assert (counts <= np.ceil(n * w + 1e-9)).all()
    if scheme == "stratified":
        assert (np.abs(counts - n * w) < 2).all()
    if scheme == "multinomial":
        np.testing.assert_allclose(counts.var(0), n * w * (1 - w), rtol=0.15, atol=0.02)


@pytest.mark.parametrize("backend", BACKENDS)
def test_systematic_is_the_floor_formula(backend):
    log_weights, u = random_case(300, 1.0, 0.1, 9)
    w = (log_weights - log_weights.max()).exp()
    until = (300 * w.cumsum(0) / w.sum() + u[0]).floor()
    counts = ops.resample(log_weights, u, backend=backend).counts
    assert torch.equal(counts.cumsum(0)[:-1], until.long()[:-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_large_n(scheme, backend):
    """The largest sums that the fixed point must hold: 2^20 weights, equal and not."""
    n = 2**20
    u = torch.from_numpy(np.random.default_rng(2).random(n))
    equal = ops.resample(torch.zeros(n, dtype=torch.float64), u, scheme=scheme, backend=backend)
    if scheme != "multinomial":
        assert (equal.counts == 1).all() and torch.equal(equal.ancestors, torch.arange(n))
    log_weights = torch.from_numpy(np.random.default_rng(3).normal(0, 1, n))
    a, counts, rank = ops.resample(log_weights, u, scheme=scheme, backend=backend)
    assert counts.sum() == n and counts.min() >= 0
    assert torch.equal(a[a], a) and torch.equal(a.bincount(minlength=n), counts)
    assert torch.equal(rank < counts[a], torch.ones(n, dtype=torch.bool))
    share = counts.double() @ (log_weights > 1).double() / n
    assert share.item() == pytest.approx(torch.softmax(log_weights, 0)[log_weights > 1].sum().item(), abs=3e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_one_heavy_particle_takes_all(scheme, backend):
    log_weights = torch.full((100,), -inf, dtype=torch.float64)
    log_weights[37] = -1e5
    r = ops.resample(log_weights, torch.rand(100, dtype=torch.float64), scheme=scheme, backend=backend)
    assert (r.ancestors == 37).all() and r.rank.tolist() == list(range(100))


@pytest.mark.parametrize(
    "weights, message",
    [
        ([0.0, nan, 0.0], r"log_weights\[1\]=nan: particle 1"),
        ([0.0, 0.0, inf], r"log_weights\[2\]=inf: particle 2"),
        ([-inf, -inf], "log_weights: all 2 are -inf"),
        ([], "log_weights: is empty"),
    ],
)
def test_refuses_weights(weights, message):
    log_weights = torch.tensor(weights, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        ops.resample(log_weights, torch.zeros(len(weights), dtype=torch.float64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheme": "fancy"}, "scheme='fancy'"),
        ({"order": "random"}, "order='random'"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"uniforms": torch.tensor([0.1, 1.0], dtype=torch.float64)}, r"uniforms\[1\]=1.0"),
        ({"uniforms": torch.tensor([0.1], dtype=torch.float64)}, "uniforms: must have 2 elements, got 1"),
        ({"log_weights": torch.zeros(2)}, "log_weights: must be a vector of torch.float64, got torch.float32"),
    ],
)
def test_refuses(change, message):
    good = {"log_weights": torch.zeros(2, dtype=torch.float64), "uniforms": torch.zeros(2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=message):
        ops.resample(**{**good, **change})


@pytest.mark.parametrize("backend", BACKENDS)
def test_ess_log_mean(backend):
    for n, sigma, dead in [(1, 0.0, 0.0), (7, 1.0, 0.3), (1000, 3.0, 0.5), (4097, 0.1, 0.0)]:
        log_weights, _ = random_case(n, sigma, dead, n)
        got = ops.ess_log_mean(log_weights, backend=backend)
        assert all(type(x) is float for x in got)
        assert got == pytest.approx(reference.ess_log_mean(log_weights.numpy()), rel=1e-12)
    assert ops.ess_log_mean(torch.zeros(10, dtype=torch.float64), backend=backend) == pytest.approx(
        (10.0, 0.0), abs=1e-12
    )
    assert ops.ess_log_mean(torch.full((3,), -inf, dtype=torch.float64), backend=backend) == (0.0, -inf)
    with pytest.raises(ValueError, match=r"log_weights\[1\]=nan"):
        ops.ess_log_mean(torch.tensor([0.0, nan], dtype=torch.float64), backend=backend)
