"""draw of both backends: exact against the inverse CDF of the reference, in distribution, and on hostile rows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastsmc import ops, reference

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan
LAST = 1.0 - 2.0**-53


def weigh_and_draw(logits, rows, u, log_psi=None, backend="cpu", **kw):
    weighed = ops.weigh(logits, log_psi, backend=backend, **kw)
    return ops.draw(logits, weighed, rows, u, log_psi, backend=backend, **kw)


def random_uniforms(n, seed=0):
    return ops.uniforms(n, seed=seed, group=0, step=0, stream=0, device="cpu")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 5, 1000, 1024, 1025, 7000])
@pytest.mark.parametrize("twisted", [False, True])
def test_is_the_inverse_cdf(twisted, v, dtype, backend):
    """u lies in the token's interval of the float64 CDF, up to float32 rounding of the masses; most are equal."""
    torch.manual_seed(v)
    logits = (torch.randn(5, v) * 3).to(dtype)
    log_psi = (torch.randn(5, v) * 2).to(dtype) if twisted else None
    rows = torch.randint(0, 5, (200,))
    u = random_uniforms(200)
    d = weigh_and_draw(logits, rows, u, log_psi, backend, temperature=0.8)
    psi = None if log_psi is None else log_psi.float().numpy()
    tokens, log_prob, psi_drawn = reference.draw(logits.float().numpy(), rows.numpy(), u.numpy(), psi, temperature=0.8)
    z = logits.double().numpy() / 0.8
    x = z if psi is None else z + psi
    p = np.exp(x - x.max(1, keepdims=True))
    cdf = (p / p.sum(1, keepdims=True)).cumsum(1)[rows.numpy()]
    got = d.tokens.numpy()
    j = np.arange(200)
    assert (u.numpy() <= cdf[j, got] + 1e-5).all()
    assert (u.numpy() >= np.where(got > 0, cdf[j, got - 1], 0) - 1e-5).all()
    same = got == tokens
    assert same.mean() >= 0.97
    np.testing.assert_allclose(d.log_prob.numpy()[same], log_prob[same], atol=1e-5)
    np.testing.assert_allclose(d.log_psi.numpy()[same], psi_drawn[same], atol=1e-5)
    np.testing.assert_array_equal(d.log_psi.numpy(), 0.0 if psi is None else psi[rows.numpy(), got])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twisted", [False, True])
def test_distribution(twisted, backend):
    """Chi-squared of 10^6 draws from one row that spans three tiles; the tail in one bin so that each expects >= 20."""
    torch.manual_seed(10)
    n, v = (1_000_000, 2600) if backend == "cpu" else (20_000, 2600)
    logits = torch.randn(1, v) * 2
    log_psi = torch.randn(1, v) if twisted else None
    weighed = ops.weigh(logits, log_psi, backend=backend, temperature=1.2)
    counts = np.zeros(v)
    for u in random_uniforms(n, seed=3).split(2000 if backend == "torch" else n):
        rows = torch.zeros(len(u), dtype=torch.int64)
        d = ops.draw(logits, weighed, rows, u, log_psi, temperature=1.2, backend=backend)
        counts += np.bincount(d.tokens.numpy(), minlength=v)
    x = logits[0].double() / 1.2 + (log_psi[0].double() if twisted else 0.0)
    expected = n * x.softmax(0).numpy()
    rare = expected < 20
    counts, expected = (np.append(a[~rare], a[rare].sum()) for a in (counts, expected))
    assert len(counts) > 50
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_level_agrees_with_weigh(backend):
    """log_prob + log_psi - (lse_psi - lse) is the log of the probability with which the token is drawn."""
    logits, psi = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, -inf, 0.5]])
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    weighed = ops.weigh(logits, psi, backend=backend)
    d = ops.draw(logits, weighed, torch.zeros(1000, dtype=torch.int64), u, psi, backend=backend)
    for token in (0, 2):
        p = (d.log_prob + d.log_psi - (weighed.lse_psi - weighed.lse))[d.tokens == token].exp()
        assert p.max() - p.min() == 0
        assert (d.tokens == token).double().mean().item() == pytest.approx(p[0].item(), abs=2e-3)
    assert set(d.tokens.tolist()) == {0, 2}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v, alive", [(1, [0]), (9, [3]), (2048, [1024]), (3000, [0, 2999]), (3000, [1023, 1024])])
def test_extreme_uniforms_never_leave_the_support(v, alive, backend):
    logits = torch.full((1, v), -inf)
    logits[0, alive] = torch.linspace(-60, 60, len(alive))
    u = torch.tensor([0.0, 2.0**-53, 1e-300, 0.5, LAST, LAST - 2.0**-53], dtype=torch.float64)
    d = weigh_and_draw(logits, torch.zeros(6, dtype=torch.int64), u, backend=backend)
    assert set(d.tokens.tolist()) <= set(alive)
    assert d.tokens[0] == alive[0] and d.tokens[4] == alive[-1]
    assert d.log_prob.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    v=st.integers(1, 2100), seed=st.integers(0, 2**31), alive=st.floats(0.001, 1.0),
    scale=st.sampled_from([0.0, 1.0, 50.0]),
    u=st.lists(st.floats(0.0, LAST), min_size=1, max_size=8), backend=st.sampled_from(BACKENDS),
)  # fmt: skip
def test_zero_mass_is_never_drawn(v, seed, alive, scale, u, backend):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, v, generator=g) * scale
    psi = torch.where(torch.rand(1, v, generator=g) < alive, torch.randn(1, v, generator=g) * scale, -inf)
    d = weigh_and_draw(
        logits, torch.zeros(len(u), dtype=torch.int64), torch.tensor(u, dtype=torch.float64), psi, backend
    )
    if psi.isneginf().all():
        assert (d.tokens == ops.NO_TOKEN).all()
    else:
        assert (d.tokens >= 0).all() and (d.tokens < v).all()
        assert psi[0, d.tokens].isfinite().all()
        if len(u) > 1:  # an inverse CDF is monotone
            assert (d.tokens[torch.tensor(u).argsort()].diff() >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-inf, inf, nan])
def test_rows_without_a_token(value, backend):
    logits = torch.randn(3, 1500)
    logits[1] = value
    psi = torch.zeros(3, 1500)
    rows, u = torch.tensor([0, 1, 2, 1]), torch.tensor([0.1, 0.5, LAST, 0.0], dtype=torch.float64)
    for twist in (None, psi):
        d = weigh_and_draw(logits, rows, u, twist, backend)
        assert (d.tokens == -1).tolist() == [False, True, False, True]
        assert d.log_prob.isnan().tolist() == d.log_psi.isnan().tolist() == [False, True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_indices(backend):
    """Row indices draw what gathered rows draw."""
    torch.manual_seed(6)
    logits, psi = torch.randn(3, 1300), torch.randn(4, 1300)
    index = {"logit_rows": torch.tensor([2, 0, 0, 1, 2]), "psi_rows": torch.tensor([1, 1, 0, 3, 3])}
    rows, u = torch.randint(0, 5, (64,)), random_uniforms(64)
    got = weigh_and_draw(logits, rows, u, psi, backend, **index)
    want = weigh_and_draw(logits[index["logit_rows"]], rows, u, psi[index["psi_rows"]], backend)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_backends_agree():
    torch.manual_seed(7)
    logits, psi, u = torch.randn(64, 5000) * 3, torch.randn(64, 5000), random_uniforms(64)
    a, b = (weigh_and_draw(logits, torch.arange(64), u, psi, backend) for backend in BACKENDS)
    assert (a.tokens == b.tokens).sum() >= 63
    torch.testing.assert_close(a.log_prob, b.log_prob, rtol=0, atol=1e-5)


def test_no_draws():
    d = weigh_and_draw(torch.randn(2, 10), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float64))
    assert all(part.shape == (0,) for part in d)


def test_stratify():
    count = torch.tensor([3, 3, 3, 1, 2, 2])
    rank = torch.tensor([0, 1, 2, 0, 0, 1])
    u = torch.tensor([0.0, 0.5, LAST, LAST, 0.25, LAST], dtype=torch.float64)
    v = ops.stratify(u, rank, count)
    np.testing.assert_array_equal(v, reference.stratify(u.numpy(), rank.numpy(), count.numpy()))
    assert (v >= rank / count).all() and (v < 1).all()
    assert ((v - 1e-15) * count < rank + 1).all()


def test_stratified_children_use_each_token_about_its_share():
    """Ten children of one parent over ten equal tokens: one each, whatever the uniforms."""
    logits = torch.zeros(1, 10)
    u = ops.stratify(random_uniforms(10).clamp(0.01, 0.99), torch.arange(10), torch.full((10,), 10))
    assert weigh_and_draw(logits, torch.zeros(10, dtype=torch.int64), u).tokens.tolist() == list(range(10))


@pytest.mark.parametrize(
    "rows, u, message",
    [
        ([0, 2], [0.1, 0.2], r"rows\[1\]=2: must be in \[0, 2\)"),
        ([0], [1.0], r"uniforms\[0\]=1.0"),
        ([0, 1], [0.5, nan], r"uniforms\[1\]=nan"),
        ([0], [0.5, 0.5], "uniforms: must have 1 elements, got 2"),
    ],
)
def test_refuses(rows, u, message):
    with pytest.raises(ValueError, match=message):
        weigh_and_draw(torch.zeros(2, 8), torch.tensor(rows), torch.tensor(u, dtype=torch.float64))


def test_refuses_what_was_weighed_from_other_rows():
    weighed = ops.weigh(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="weighed: tile_mass has shape"):
        ops.draw(torch.zeros(3, 8), weighed, torch.tensor([0]), random_uniforms(1))
