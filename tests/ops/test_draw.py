"""draw of every backend: exact against the inverse CDF of the reference, in distribution, and on hostile rows."""

import math

import numpy as np
import pytest
import torch
from backends import BACKENDS, CUDA, draw, random_mask, slow, to, weigh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastsmc import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan
LAST = 1.0 - 2.0**-53


def weigh_and_draw(logits, rows, u, log_psi=None, backend="cpu", **kw):
    weighed = weigh(logits, log_psi, backend=backend, **kw)
    return draw(logits, weighed, rows, u, log_psi, backend=backend, **kw)


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
    n = 40 if slow(backend) else 200
    rows = torch.randint(0, 5, (n,))
    u = random_uniforms(n)
    d = weigh_and_draw(logits, rows, u, log_psi, backend, temperature=0.8)
    psi = None if log_psi is None else log_psi.float().numpy()
    tokens, log_prob, psi_drawn = reference.draw(logits.float().numpy(), rows.numpy(), u.numpy(), psi, temperature=0.8)
    z = logits.double().numpy() / 0.8
    x = z if psi is None else z + psi
    p = np.exp(x - x.max(1, keepdims=True))
    cdf = (p / p.sum(1, keepdims=True)).cumsum(1)[rows.numpy()]
    got = d.tokens.numpy()
    j = np.arange(n)
    assert (u.numpy() <= cdf[j, got] + 1e-5).all()
    assert (u.numpy() >= np.where(got > 0, cdf[j, got - 1], 0) - 1e-5).all()
    same = got == tokens
    assert same.mean() >= 0.97
    np.testing.assert_allclose(d.log_prob.numpy()[same], log_prob[same], atol=1e-5)
    np.testing.assert_allclose(d.log_psi.numpy()[same], psi_drawn[same], atol=1e-5)
    np.testing.assert_array_equal(d.log_psi.numpy(), 0.0 if psi is None else psi[rows.numpy(), got])


def merged(expected, least=20.0):
    """(V,) bin of each token: neighbours share one until it expects `least` draws."""
    bins, total, label = np.empty(len(expected), int), 0.0, 0
    for v, share in enumerate(expected):
        bins[v] = label
        total += share
        if total >= least:
            total, label = 0.0, label + 1
    return np.minimum(bins, label - 1)  # what is left at the end joins the last full one


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["base", "twist", "mask"])
def test_distribution(kind, dtype, backend):
    """Chi-squared of 10^6 draws from one row that spans three tiles (fewer where they are slow)."""
    torch.manual_seed(10)
    v, n = 2600, 300 if slow(backend) else 20_000 if backend == "torch" else 1_000_000
    logits = (torch.randn(1, v) * 2).to(dtype)
    log_psi = torch.randn(1, v) if kind == "twist" else None
    allowed, mask = random_mask(1, v)
    kw = {"mask": mask} if kind == "mask" else {}
    weighed = weigh(logits, log_psi, backend=backend, temperature=1.2, **kw)
    counts = np.zeros(v)
    for u in random_uniforms(n, seed=3).split(2000 if backend == "torch" else n):
        rows = torch.zeros(len(u), dtype=torch.int64)
        d = draw(logits, weighed, rows, u, log_psi, temperature=1.2, backend=backend, **kw)
        counts += np.bincount(d.tokens.numpy(), minlength=v)
    x = logits[0].double() / 1.2 + (log_psi[0].double() if kind == "twist" else 0.0)
    expected = n * torch.where(allowed[0] | (kind != "mask"), x, -inf).softmax(0).numpy()
    bins = merged(expected)
    counts, expected = (np.bincount(bins, weights=a) for a in (counts, expected))
    assert len(counts) > (8 if slow(backend) else 30)
    assert stats.chisquare(counts, expected).pvalue > 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_level_agrees_with_weigh(backend):
    """log_prob + log_psi - (lse_psi - lse) is the log of the probability with which the token is drawn."""
    logits, psi = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[1.0, -inf, 0.5]])
    n = 100 if slow(backend) else 1000
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    weighed = weigh(logits, psi, backend=backend)
    d = draw(logits, weighed, torch.zeros(n, dtype=torch.int64), u, psi, backend=backend)
    for token in (0, 2):
        p = (d.log_prob + d.log_psi - (weighed.lse_psi - weighed.lse))[d.tokens == token].exp()
        assert p.max() - p.min() == 0
        assert (d.tokens == token).double().mean().item() == pytest.approx(p[0].item(), abs=2 / n)
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
    u=st.lists(st.floats(0.0, LAST), min_size=1, max_size=8), masked=st.booleans(),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_mass_is_never_drawn(backend, v, seed, alive, scale, u, masked):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(1, v, generator=g) * scale
    allowed, mask = random_mask(1, v, alive, seed)
    psi = torch.randn(1, v, generator=g) * scale
    psi, kw = (psi, {"mask": mask}) if masked else (torch.where(allowed, psi, -inf), {})
    rows = torch.zeros(len(u), dtype=torch.int64)
    d = weigh_and_draw(logits, rows, torch.tensor(u, dtype=torch.float64), psi, backend, **kw)
    if not allowed.any():
        assert (d.tokens == ops.NO_TOKEN).all()
    else:
        assert (d.tokens >= 0).all() and (d.tokens < v).all()
        assert allowed[0, d.tokens].all()
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


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "cpu"])
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_equal_those_of_cpu(dtype, twisted, backend):
    """All but 1 in 500 where cumulative masses round differently; there u lies within 1e-5 of a boundary between."""
    torch.manual_seed(7)
    n, r, v = 60 if slow(backend) else 3000, 30, 5000
    logits, psi = (torch.randn(r, v) * 3).to(dtype), torch.randn(r, v) if twisted else None
    mask, rows, u = random_mask(r, v)[1], torch.arange(n) % r, random_uniforms(n)
    a, b = (weigh_and_draw(logits, rows, u, psi, backend, mask=mask) for backend in ("cpu", backend))
    differ = (a.tokens != b.tokens).nonzero().squeeze(1)
    assert len(differ) <= max(1, n // 500)
    same = a.tokens == b.tokens
    torch.testing.assert_close(a.log_prob[same], b.log_prob[same], rtol=0, atol=1e-5)
    assert torch.equal(a.log_psi[same], b.log_psi[same])
    _, x, _ = reference._scores(
        logits.float().numpy(), None if psi is None else psi.numpy(), None, None, mask.numpy(), None, 1.0
    )
    for j in differ.tolist():
        p = np.exp(x[rows[j]] - x[rows[j]].max()).cumsum()
        low, high = sorted((int(a.tokens[j]), int(b.tokens[j])))
        assert abs(p[low] / p[-1] - u[j]) < 1e-5 and abs(p[high - 1] / p[-1] - u[j]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_row(backend):
    """Draws from a row that is none give no token; the other indices there do not matter."""
    kw = {"logit_rows": torch.tensor([-1, 1, 0]), "psi_rows": torch.tensor([10**12, 0, 1]),
          "mask": random_mask(2, 1100)[1], "mask_rows": torch.tensor([10**12, 1, -1])}  # fmt: skip
    rows, u = torch.tensor([0, 1, 2, 0]), torch.tensor([0.3, 0.3, LAST, LAST], dtype=torch.float64)
    d = weigh_and_draw(torch.randn(2, 1100), rows, u, torch.zeros(2, 1100), backend, **kw)
    assert (d.tokens == ops.NO_TOKEN).tolist() == d.log_prob.isnan().tolist() == [True, False, False, True]
    assert d.log_psi[1:3].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["base", "twist", "mask"])
def test_powers(kind, backend):
    """Draws are those of x = α z + log ψ, log_prob is p0's; with α = 1 they have the bits of draws without powers."""
    torch.manual_seed(18)
    r, v, n = (4, 1100, 20) if slow(backend) else (12, 2500, 300)
    logits, rows, u = torch.randn(r, v) * 3, torch.randint(0, r, (n,)), random_uniforms(n)
    psi, kw = torch.randn(r, v) if kind == "twist" else None, {"temperature": 0.8}
    if kind == "mask":
        kw |= {"mask": random_mask(r, v)[1]}
    power = 2 ** torch.randn(r, dtype=torch.float64)
    power[0] = 1.0
    got = weigh_and_draw(logits, rows, u, psi, backend, power=power, **kw)
    plain = weigh_and_draw(logits, rows, u, psi, backend, **kw)
    for a, b in zip(got, plain, strict=True):
        assert torch.equal(a[rows == 0], b[rows == 0])
    arrays = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in kw.items()}
    psi = None if psi is None else psi.numpy()
    want = reference.draw(logits.numpy(), rows.numpy(), u.numpy(), psi, power=power.numpy(), **arrays)
    same = got.tokens.numpy() == want[0]
    assert same.mean() >= 0.97 and (got.tokens != plain.tokens).any()
    np.testing.assert_allclose(got.log_prob.numpy()[same], want[1][same], atol=1e-5)
    np.testing.assert_allclose(got.log_psi.numpy()[same], want[2][same], atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["base", "twist", "mask"])
def test_a_temperature_per_row(kind, backend):
    """Each draw has the bits that the temperature of its weighed row gives to all draws."""
    torch.manual_seed(16)
    r, v, n = (4, 1100, 10) if slow(backend) else (12, 2500, 200)
    logits, rows, u = torch.randn(6, v) * 4, torch.randint(0, r, (n,)), random_uniforms(n)
    psi, kw = torch.randn(r, v) if kind != "base" else None, {"logit_rows": torch.arange(r) % 6}
    kw["logit_rows"][0] = -1
    if kind == "mask":
        kw |= {"mask": random_mask(r, v)[1]}
    t = 10 ** (torch.rand(r, dtype=torch.float64) * 4.7 - 3)
    t[:3] = torch.tensor([nan, 1e-3, 50.0])
    got = weigh_and_draw(logits, rows, u, psi, backend, temperature=t, **kw)
    assert (got.tokens >= 0).tolist() == (rows > 0).tolist()
    for i in range(1, r):
        want = weigh_and_draw(logits, rows, u, psi, backend, temperature=t[i].item(), **kw)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a[rows == i], b[rows == i])


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op(backend):
    logits, psi, mask = torch.randn(3, 1100), torch.randn(3, 1100).half(), random_mask(3, 1100)[1]
    rows, u = torch.tensor([2, 0, 0, 1]), random_uniforms(4)
    for args in ((None,) * 5, (None, psi, None, mask, None)):
        w = weigh(logits, args[1], mask=args[3], backend=backend)
        given = to(backend, (logits, *args, w.lse, w.tile_mass, rows, u))
        for temperatures in (None, torch.tensor([0.9, 1.0, 2.0], dtype=torch.float64)):
            rest = 1.0, to(backend, temperatures), 1.0, to(backend, temperatures), False, backend
            torch.library.opcheck(torch.ops.fastsmc.draw.default, (*given, *rest))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if not slow(b)])
@pytest.mark.parametrize("twisted", [False, True])
def test_torch_compile(twisted, backend):
    """One graph without a break, same results; the row indices are data."""
    logits, mask = torch.randn(4, 1500), random_mask(2, 1500)[1]
    psi = torch.randn(4, 1500) if twisted else None
    args = (logits, psi, mask, torch.tensor([0, -1, 3]), torch.tensor([1, 0, -1]), random_uniforms(3))

    def step(logits, psi, mask, logit_rows, mask_rows, u, temperature=None):
        kw = {"logit_rows": logit_rows, "mask": mask, "mask_rows": mask_rows, "backend": backend}
        kw["temperature"] = 0.9 if temperature is None else temperature
        kw |= {} if psi is None else {"psi_rows": logit_rows}
        weighed = ops.weigh(logits, psi, **kw)
        drawn = ops.draw(logits, weighed, torch.arange(3, device=u.device), u, psi, **kw)
        return drawn.tokens, drawn.log_prob, weighed.lse_psi - weighed.lse

    args = to(backend, args)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for more in ((), (to(backend, torch.tensor([0.9, nan, 2.0], dtype=torch.float64)),)):
        for got, want in zip(compiled(*args, *more), step(*args, *more), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_cuda_graph_replays_without_a_sync():
    torch.manual_seed(12)
    logits, psi = torch.randn(64, 5000, device="cuda"), torch.randn(64, 5000, device="cuda")
    rows, u = torch.arange(64, device="cuda"), random_uniforms(64).cuda()

    def step():
        return ops.draw(logits, ops.weigh(logits, psi), rows, u, psi)

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    many, wrong = random_uniforms(64 * 20).view(20, 64).cuda(), torch.zeros((), dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for numbers in many:
            u.copy_(numbers)
            logits.neg_()
            graph.replay()
            for got, want in zip(captured, step(), strict=True):
                wrong += (got != want).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert wrong.item() == 0


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
