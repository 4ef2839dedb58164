"""redraw, redraw_logits and gumbel of every backend: against the reference, in law, and on hostile rows."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import BACKENDS, random_mask, redraw, slow, to
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from fastsmc import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
inf, nan = math.inf, math.nan
LAST = 1.0 - 2.0**-53
#: of redraw_logits and gumbel, which have no kernel in Triton
BOTH = ("cpu", "torch")


def rows(r, v, dtype=torch.float32, seed=0, spread=3.0, change=1.5):
    """(logits, factual, tokens drawn from factual, uniforms); a third of the rows is unchanged."""
    g = torch.Generator().manual_seed(seed)
    factual = (torch.randn(r, v, generator=g) * spread).to(dtype)
    logits = (factual.float() + torch.randn(r, v, generator=g) * change).to(dtype)
    logits[::3] = factual[::3]
    tokens = torch.multinomial(factual.float().softmax(1), 1, generator=g)[:, 0]
    return logits, factual, tokens, torch.rand(r, 2, generator=g, dtype=torch.float64)


def arrays(*tensors):
    return [t.float().numpy() if t.is_floating_point() and t.dtype != torch.float64 else t.numpy() for t in tensors]


def check(logits, factual, tokens, u, backend, **kw):
    """Compares with the reference. Where a uniform lies within float32's rounding of a boundary, tokens may differ."""
    d = redraw(logits, factual, tokens, u, backend=backend, **kw)
    index = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    want = reference.redraw(*arrays(logits, factual, tokens, u), **index)
    same = d.tokens.numpy() == want.tokens
    assert same.mean() >= (0.97 if len(same) > 30 else 1.0)
    np.testing.assert_array_equal(d.tokens == -1, want.tokens == -1)
    np.testing.assert_allclose(d.stay, want.stay, rtol=0, atol=2e-6)
    np.testing.assert_allclose(d.log_prob[same], want.log_prob[same], rtol=0, atol=1e-5)
    np.testing.assert_allclose(d.log_kernel[same], want.log_kernel[same], rtol=0, atol=1e-5)
    return d


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 33, 1024, 2500])
def test_matches_reference(v, dtype, backend):
    n, changes, temperatures = 60, [(3.0, 1.5), (0.5, 0.05), (8.0, 8.0)], [{}, {"temperature": 0.7}]
    temperatures.append({"temperature": 1.3, "factual_temperature": 0.77})
    if slow(backend):
        n, changes, temperatures = 4, changes[::2], temperatures[2:]
    for seed, (spread, change) in enumerate(changes):
        for kw in temperatures:
            check(*rows(n, v, dtype, seed, spread, change), backend, **kw)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 33, 64, 2500, 20_000])
def test_logits_match_reference(v, dtype, backend):
    """2e-6, and half a unit in the last place of float32, in which the answer is."""
    for seed, (spread, change) in enumerate([(3.0, 1.5), (0.5, 0.05), (6.0, 6.0)]):
        logits, factual, tokens, _ = rows(40 if v < 3000 else 6, v, dtype, seed, spread, change)
        logits[1::4, 0] = factual[1::5, v - 1] = -inf
        logits[5, tokens[5]] = -inf
        for kw in ({}, {"temperature": 1.3, "factual_temperature": 0.77}):
            law = ops.redraw_logits(logits, factual, tokens, backend=backend, **kw).numpy()
            want = reference.redraw_logits(*arrays(logits, factual, tokens), **kw)
            assert law.dtype == np.float32
            np.testing.assert_allclose(law, want, rtol=2.0**-24, atol=2e-6)
            good = np.isfinite(want).any(1)
            np.testing.assert_allclose(np.exp(law[good].astype(np.float64)).sum(1), 1.0, atol=1e-6)


@pytest.mark.parametrize("backend", BOTH)
def test_logits_where_odds_exceed_float64(backend):
    """k has no mass, and others have odds beyond e^709 or below e^-709."""
    logits, factual, tokens, _ = rows(6, 1500, spread=1.0, change=300.0)
    logits.scatter_(1, tokens[:, None], -inf)
    law = ops.redraw_logits(logits, factual, tokens, backend=backend)
    assert not law.isnan().any() and (law.gather(1, tokens[:, None]) == -inf).all()
    torch.testing.assert_close(law.double().exp().sum(1), torch.ones(6).double(), rtol=0, atol=1e-6)


def test_reference_averages_to_q():
    """Σ_k p_k P(· | k) = q; p_k P(k | k) is the known 1/Σ_i max(p_i/p_k, q_i/q_k)."""
    rng = np.random.default_rng(0)
    for v in (1, 2, 5, 40):
        z_p, z_q = rng.normal(size=(2, v)) * 2
        z_p[rng.random(v) < 0.2] = -inf
        z_q[rng.random(v) < 0.2] = -inf
        z_p[v - 1] = z_q[0] = 0.0
        p, q = (np.exp(z - reference._log_sum_exp(z)) for z in (z_p, z_q))
        likely = np.flatnonzero(p)
        law = np.exp([reference.Coupling(z_q, z_p, k).log_law() for k in likely])
        np.testing.assert_allclose(p[likely] @ law, q, atol=1e-14)
        np.testing.assert_allclose(law.sum(1), 1.0, atol=1e-14)
        for k, row in zip(likely, law, strict=True):
            known = 1 / np.maximum(p / p[k], q / q[k]).sum() if q[k] else 0.0
            assert p[k] * row[k] == pytest.approx(known, abs=1e-14)


def fits(tokens, law, least=5.0):
    """p-value of chi-squared of tokens (n,) against law (V,), tokens of few expected draws together; 0 outside it."""
    expected, counts = law * len(tokens), np.bincount(tokens, minlength=len(law)).astype(float)
    if counts[law == 0].any():
        return 0.0
    few = expected < least
    expected, counts = (np.append(a[~few], a[few].sum()) for a in (expected, counts))
    keep = expected > 0
    if keep.sum() < 2:
        return 1.0
    return stats.chisquare(counts[keep], expected[keep] * (counts.sum() / expected.sum())).pvalue


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", [2, 7, 64])
def test_law(v, backend, monkeypatch):
    """20,000 draws for every factual token of up to seven and for each seventh of 64, as many of the published sampler
    and of the noise: chi-squared. Of some 70 p-values one is below 1e-4 by chance in one seed of 140, which these are
    not."""
    logits, factual, _, _ = rows(2, v, seed=v)
    logits, factual = logits[1:], factual[1:]
    n, few = (60, range(1)) if slow(backend) else (20_000, range(1, v, 7) if v == 64 else range(v))
    if v > 2:
        logits[0, 1] = factual[0, 2] = -inf
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "bench")
    from hindsight import hindsight

    rng = np.random.default_rng(v)
    at = torch.zeros(n, dtype=torch.int64)
    for k in few:
        if factual[0, k] == -inf:
            continue
        u = ops.uniforms(2 * n, seed=v, group=k, step=0, stream=0, device="cpu").view(n, 2)
        d = redraw(logits, factual, torch.tensor([k]), u, logit_rows=at, factual_rows=at, backend=backend)
        law = np.exp(reference.redraw_logits(*arrays(logits, factual, torch.tensor([k])))[0])
        assert fits(d.tokens.numpy(), law) > 1e-4, k
        np.testing.assert_allclose(d.log_kernel.exp(), law[d.tokens], rtol=1e-5)
        if backend == "cpu":
            z_q, z_p = (x[0].double().numpy() for x in (logits, factual))
            assert fits((z_q + hindsight(z_p, k, rng, n)).argmax(1), law) > 1e-4, k
            drawn = ops.gumbel(
                logits, factual, torch.tensor([k]), seed=v, group=k, step=0, particles=torch.arange(n), logit_rows=at,
                factual_rows=at,
            )  # fmt: skip
            assert fits(drawn.numpy(), law) > 1e-4, k


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_tokens_whose_odds_rose(backend):
    """In 10^6 draws (fewer where they are slow), also where logits are shifted by what is rounded away."""
    n, v = (60, 64) if slow(backend) else (1_000_000 if backend == "cpu" else 20_000, 64)
    wide, factual, tokens, _ = rows(200, v, seed=1)
    wide[:20] = factual[:20] + 1000.3
    wide[20:40] = factual[20:40] * (1.0 + 2.0**-22)
    for temperature in (1.0, 0.7):
        at = torch.arange(n // 2) * 7 % 200
        u = ops.uniforms(2 * len(at), seed=2, group=0, step=0, stream=0, device="cpu").view(-1, 2)
        d = redraw(
            wide, factual, tokens, u, logit_rows=at, factual_rows=at, temperature=temperature, backend=backend
        ).tokens  # fmt: skip
        k = tokens[at]
        rise = (wide.double()[at, d] - wide.double()[at, k]) - (factual.double()[at, d] - factual.double()[at, k])
        assert ((d == k) | (rise > 0)).all()
        assert (d != k).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_rows_keep_the_token(dtype, backend):
    n = 4 if slow(backend) else 20
    _, factual, tokens, _ = rows(n, 1500, dtype, spread=6.0)
    factual[3, ::2] = -inf
    tokens[3] = 1
    u = torch.full((n, 2), LAST, dtype=torch.float64)
    for temperature in (0.7, torch.linspace(0.01, 3.0, n, dtype=torch.float64)):
        for others in (factual, factual.float()):
            d = redraw(others, factual, tokens, u, temperature=temperature, backend=backend)
            assert torch.equal(d.tokens, tokens) and (d.stay == 1.0).all() and (d.log_kernel == 0.0).all()
            if backend in BOTH:
                law = ops.redraw_logits(others, factual, tokens, temperature=temperature, backend=backend)
                assert (law.gather(1, tokens[:, None]) == 0.0).all() and (law.exp().sum(1) == 1.0).all()
                drawn = ops.gumbel(
                    others, factual, tokens, seed=0, group=0, step=0, particles=torch.arange(n),
                    temperature=temperature, backend=backend,
                )  # fmt: skip
                assert torch.equal(drawn, tokens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros(backend):
    """−inf in either row: never drawn where q is 0; k without mass in q always moves; p of 0 is drawn as any."""
    logits, factual, tokens, u = rows(8 if slow(backend) else 24, 1300, seed=4)
    logits[0::4, :650] = -inf
    factual[1::4, 650:] = -inf
    logits[2::4, ::2] = factual[2::4, 1::2] = -inf  # nothing in common
    tokens = factual.argmax(1)
    logits[3::4].scatter_(1, tokens[3::4, None], -inf)
    d = check(logits, factual, tokens, u, backend)
    assert logits.gather(1, d.tokens[:, None]).isfinite().all()
    gone = logits.gather(1, tokens[:, None])[:, 0] == -inf
    assert (d.stay[gone] == 0.0).all() and (d.tokens[gone] != tokens[gone]).all() and 2 * gone.sum() >= len(gone)
    if backend in BOTH:
        law = ops.redraw_logits(logits, factual, tokens, backend=backend)
        want = reference.redraw_logits(*arrays(logits, factual, tokens))
        np.testing.assert_allclose(law, want, rtol=2.0**-24, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_finite_mask_values(value, backend):
    """A large negative number in the place of −inf is as good, also for k."""
    n = 3 if slow(backend) else 12
    logits, factual, tokens, u = rows(n, 1100, seed=5)
    logits[:, :500] = factual[:, 900:] = value
    tokens[:] = torch.arange(n) * 840 // n
    d = redraw(logits, factual, tokens, u, backend=backend)
    logits[:, :500] = factual[:, 900:] = -inf
    want = redraw(logits, factual, tokens, u, backend=backend)
    assert torch.equal(d.tokens, want.tokens)
    for got, expected in zip(d[1:], want[1:], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert (d.stay[tokens < 500] == 0.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_uniforms(backend):
    numbers = [0.0, 0.5, LAST] if slow(backend) else [0.0, 1e-300, 2.0**-53, 0.5, LAST - 2.0**-53, LAST]
    u = torch.tensor([[a, b] for a in numbers for b in numbers], dtype=torch.float64)
    logits, factual, tokens, _ = rows(1, 1100, seed=6)
    logits[0] += torch.randn(1100)
    logits[0, 7] = -inf
    at = torch.zeros(len(u), dtype=torch.int64)
    for k in (int(tokens[0]), 7):
        for shifted in (0.0, -80.0):  # of k's logit: as good as gone
            row = logits.clone()
            row[0, k] += shifted
            d = redraw(row, factual, torch.tensor([k]), u, logit_rows=at, factual_rows=at, backend=backend)
            assert (d.tokens >= 0).all() and row[0, d.tokens].isfinite().all()
            assert (d.tokens[: len(numbers)] == k).all() == (d.stay[0] > 0.0)
            assert d.log_prob.isfinite().all() and d.log_kernel.isfinite().all() and (d.log_kernel <= 0.0).all()


@settings(max_examples=30, deadline=None)
@example(v=238, seed=3934, alive=0.75, scale=1e4, change=1e-7, u=[0.0, 0.0])  # tokens that rose, but without mass
@given(
    v=st.integers(1, 1100), seed=st.integers(0, 2**31), alive=st.floats(0.01, 1.0),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 50.0, 1e4]), change=st.sampled_from([1e-7, 1e-3, 1.0, 100.0]),
    u=st.lists(st.floats(0.0, LAST), min_size=2, max_size=2),
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_rows(backend, v, seed, alive, scale, change, u):
    g = torch.Generator().manual_seed(seed)
    factual = torch.randn(1, v, generator=g) * scale
    logits = factual + torch.randn(1, v, generator=g) * change
    allowed = torch.rand(2, 1, v, generator=g) < alive
    logits, factual = logits.masked_fill(~allowed[0], -inf), factual.masked_fill(~allowed[1], -inf)
    k = int((factual + torch.randn(1, v, generator=g)).argmax())
    d = redraw(logits, factual, torch.tensor([k]), torch.tensor([u], dtype=torch.float64), backend=backend)
    if not allowed[0].any() or not allowed[1].any():
        assert d.tokens.item() == -1 and d.stay.isnan().all()
        return
    j = int(d.tokens)
    assert allowed[0, 0, j]
    rise = (logits[0, j].double() - logits[0, k]) - (factual[0, j].double() - factual[0, k])
    assert j == k or rise > 0
    # Triton's scores are rounded before their maximum is subtracted, as in weigh
    slack = 1e-5 + (2.0**-20 * max(scale, change) if backend == "triton" else 0.0)
    assert 0.0 <= d.stay.item() <= 1.0 and d.log_prob.item() <= slack and -inf < d.log_kernel.item() <= slack


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [-inf, inf, nan])
def test_rows_without_a_token(value, backend):
    """NaN or +inf in a row, no mass, and a k that p rules out: no token, and NaN; the rows beside are as ever."""
    logits, factual, tokens, u = rows(9, 1300, seed=7)
    logits[1], factual[2] = value, value
    factual[4, tokens[4]] = value
    bad = [1, 2, 4]
    if value != -inf:
        logits[6, 1299] = factual[7, 1299] = value
        bad += [6, 7]
    d = check(logits, factual, tokens, u, backend)
    assert (d.tokens == ops.NO_TOKEN).nonzero()[:, 0].tolist() == bad
    assert all(x.isnan().nonzero()[:, 0].tolist() == bad for x in d[1:])
    if backend in BOTH:
        law = ops.redraw_logits(logits, factual, tokens, backend=backend)
        assert law.isnan().all(1).nonzero()[:, 0].tolist() == law.isnan().any(1).nonzero()[:, 0].tolist() == bad
        drawn = ops.gumbel(logits, factual, tokens, seed=0, group=0, step=0, particles=torch.arange(9), backend=backend)
        assert (drawn == ops.NO_TOKEN).nonzero()[:, 0].tolist() == bad


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_indices_strides_masks_and_temperatures(backend):
    """What gathered rows give: indices, −1, rows of stride 0, one mask for many, a temperature per row."""
    logits, factual, tokens, u = rows(5, 1300, seed=8)
    wide = torch.randn(5, 3000)
    wide[:, 100:1400] = logits
    allowed, mask = random_mask(2, 1300, 0.8)
    at, facts, masks = torch.tensor([2, -1, 0, 0, 1, 4]), torch.tensor([1, 10**12, 3, -1, 1, 0]), torch.tensor(
        [1, 10**12, -1, 0, 0, 1]
    )  # fmt: skip
    t = torch.tensor([0.7, nan, 1.0, 1.0, 2.0, 0.5], dtype=torch.float64)
    kw = {"logit_rows": at, "factual_rows": facts, "mask": mask, "mask_rows": masks, "temperature": t,
          "factual_temperature": torch.flip(t, [0])}  # fmt: skip
    kw["factual_temperature"][4] = 0.9
    u = torch.rand(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    d = check(wide[:, 100:1400], factual, tokens, u, backend, **kw)
    present = [0, 2, 4, 5]
    assert (d.tokens >= 0).nonzero()[:, 0].tolist() == present
    rest = torch.where(masks[present, None] >= 0, allowed[masks[present].clamp(min=0)], True)
    gathered = logits[at[present]].masked_fill(~rest, -inf)
    alone = redraw(
        gathered, factual[facts[present]], tokens[facts[present]], u[present], temperature=t[present],
        factual_temperature=kw["factual_temperature"][present], backend=backend,
    )  # fmt: skip
    for got, want in zip(d, alone, strict=True):
        torch.testing.assert_close(got[present], want, rtol=1e-6, atol=1e-6)
    same = redraw(logits[:1].expand(6, -1), factual, tokens, u, factual_rows=facts.clamp(0, 4), backend=backend)
    want = redraw(logits[:1], factual, tokens, u, logit_rows=torch.zeros_like(at), factual_rows=facts.clamp(0, 4),
                  backend=backend)  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(same, want, strict=True))
    if backend in BOTH:
        law = ops.redraw_logits(wide[:, 100:1400], factual, tokens, backend=backend, **kw)
        assert (law[[1, 3]] == -inf).all()
        ref = reference.redraw_logits(*arrays(logits, factual, tokens), **{k: v.numpy() for k, v in kw.items()})
        np.testing.assert_allclose(law[present], ref[present], rtol=2.0**-24, atol=2e-6)
        key = {"seed": 3, "group": 0, "step": 1, "particles": torch.arange(6)}
        drawn = ops.gumbel(wide[:, 100:1400], factual, tokens, backend=backend, **key, **kw)
        want = reference.gumbel(
            *arrays(logits, factual, tokens), **{k: v.numpy() if k != "seed" else v for k, v in kw.items()},
            **key | {"particles": np.arange(6)},
        )  # fmt: skip
        np.testing.assert_array_equal(drawn, want)
    none = redraw(logits, factual, tokens, u[:0], logit_rows=at[:0], factual_rows=at[:0], backend=backend)
    assert all(x.shape == (0,) for x in none)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_batch(backend):
    """To the last bit, whatever rows it is among and however often its factual row is used."""
    logits, factual, tokens, u = rows(6, 1500, seed=9, change=4.0)
    together = redraw(logits, factual, tokens, u, backend=backend)
    at = torch.tensor([3, 3, 0, 5, 3])
    moved = redraw(logits, factual, tokens, u[at], logit_rows=at, factual_rows=at, backend=backend)
    assert (together.tokens != tokens).sum() > 2
    if backend != "torch":
        assert all(torch.equal(a[at], b) for a, b in zip(together, moved, strict=True))


MEMORY = """
import re, sys
import torch
from fastsmc import ops

def mib(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

n, vocab = 256, 49_152
factual, token, at = torch.randn(1, vocab), torch.tensor([3]), torch.zeros(n, dtype=torch.int64)
logits, u = torch.randn(n, vocab).add_(factual), torch.rand(n, 2, dtype=torch.float64)
particles = torch.arange(n)
before = mib("VmRSS")
for _ in range(16):
    ops.redraw(logits, factual, token, u, factual_rows=at)
ops.redraw(logits, factual.expand(n, -1), token.expand(n), u)
ops.gumbel(logits, factual, token, seed=0, group=0, step=0, particles=particles, factual_rows=at)
print(mib("VmHWM") - before)
law = ops.redraw_logits(logits, factual, token, factual_rows=at)
print(mib("VmHWM") - before - law.nbytes / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory():
    """Beside logits and the answer it is a few rows per thread: far below 64 MiB at N = 256, V = 49,152."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    growth = [float(line) for line in done.stdout.split()]
    assert len(growth) == 2 and max(growth) < 64, growth


# ------------------------------------------------------------------------------------------------------------- gumbel
KEY = {"seed": 2**63 + 12345, "group": 7, "step": 3}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("v", [1, 50, 1100])
def test_gumbel_matches_reference(v, backend):
    logits, factual, tokens, _ = rows(30, v, seed=v)
    if v > 1:
        logits[4::5].scatter_(1, tokens[4::5, None], -inf)
    particles = torch.arange(30) * 7
    seeds = torch.randint(-(2**63), 2**63 - 1, (30,), generator=torch.Generator().manual_seed(0))
    vectors = {"seed": seeds, "group": particles % 5, "step": particles + 1}
    for key in (KEY, vectors):
        drawn = ops.gumbel(logits, factual, tokens, particles=particles, temperature=0.8, backend=backend, **key)
        plain = {k: x.numpy() if isinstance(x, torch.Tensor) else x for k, x in key.items()}
        want = reference.gumbel(*arrays(logits, factual, tokens), particles=particles.numpy(), temperature=0.8, **plain)
        np.testing.assert_array_equal(drawn, want)
    if v > 1:
        assert (drawn != tokens).any()


@pytest.mark.parametrize("backend", BOTH)
def test_noise_is_joint(backend):
    """One noise under several interventions: a stronger one of the same kind keeps what a weaker one has changed to
    the raised token, the noise does not hang on batch or place, and other keys give other noise."""
    v, n = 40, 300
    _, factual, tokens, _ = rows(1, v, seed=11)
    at, particles = torch.zeros(n, dtype=torch.int64), torch.arange(n)

    def draw(logits, **change):
        given = {"particles": particles, "logit_rows": at, "factual_rows": at} | KEY | change
        return ops.gumbel(logits, factual, tokens, backend=backend, **given)

    raised = int((factual[0].softmax(0) - 0.05).abs().argmin())
    assert raised != tokens[0]
    before = tokens.expand(n)
    for strength in (0.5, 1.0, 2.0, 4.0):
        logits = factual.clone()
        logits[0, raised] += strength
        drawn = draw(logits)
        assert ((drawn == tokens[0]) | (drawn == raised)).all()
        assert (drawn[before == raised] == raised).all() and (drawn == raised).sum() >= (before == raised).sum()
        before = drawn
    assert (before == raised).any() and (before != raised).any()
    logits = factual + torch.randn(1, v, generator=torch.Generator().manual_seed(1)) * 2
    drawn = draw(logits)
    some = torch.tensor([200, 3, 3, 17])
    assert torch.equal(draw(logits, particles=some, logit_rows=at[:4], factual_rows=at[:4]), drawn[some])
    assert torch.equal(draw(logits, step=torch.tensor(KEY["step"])), drawn)
    for name in KEY:
        assert (draw(logits, **{name: KEY[name] + 1}) != drawn).any(), name


# -------------------------------------------------------------------------------------------------------- the contract
@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op(backend):
    logits, factual, tokens, u = rows(3, 60, torch.float16)
    mask = random_mask(3, 60)[1]
    at, t = torch.tensor([2, 1, 0]), torch.tensor([0.9, 1.0, 2.0], dtype=torch.float64)
    for args in ((logits, None, None, None, factual, None, tokens, 1.0, None, 1.0, None),
                 (logits, at, mask, at, factual.float(), at, tokens, 1.0, t, 1.0, t)):  # fmt: skip
        torch.library.opcheck(torch.ops.fastsmc.redraw.default, to(backend, (*args, u, backend)))
        if backend in BOTH:
            torch.library.opcheck(torch.ops.fastsmc.redraw_logits.default, (*args, backend))
            keys = [torch.arange(3)] * 4
            torch.library.opcheck(
                torch.ops.fastsmc.gumbel.default, (*args, torch.zeros(3, dtype=torch.float64), *keys, backend)
            )


def test_compiles_in_one_graph():
    logits, factual, tokens, u = rows(4, 80)

    def step(logits, factual, tokens, u, step):
        d = ops.redraw(logits, factual, tokens, u, temperature=0.9)
        law = ops.redraw_logits(logits, factual, tokens)
        noise = ops.gumbel(logits, factual, tokens, seed=1, group=2, step=step, particles=tokens)
        return *d, law, noise

    args = (logits, factual, tokens, u, torch.tensor(5))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(*args), step(*args), strict=True):
        assert torch.equal(got, want)


GOOD = {
    "logits": torch.zeros(2, 8), "factual": torch.zeros(2, 8), "tokens": torch.zeros(2, dtype=torch.int64),
    "uniforms": torch.zeros(2, 2, dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"logits": torch.zeros(8)}, "logits: must be a matrix"),
        ({"factual": torch.zeros(2, 9)}, "factual: has 9 columns, logits have 8"),
        ({"factual": torch.zeros(3, 8)}, "factual: has 3 rows, must have 2, or factual_rows"),
        ({"factual": torch.zeros(2, 8).double()}, "factual: dtype torch.float64"),
        ({"factual": torch.zeros(8, 2).t()}, "factual: column stride 2"),
        ({"tokens": torch.tensor([0, 8])}, r"tokens\[1\]=8: must be in \[0, 8\)"),
        ({"tokens": torch.tensor([0])}, "tokens: must have 2 elements, got 1"),
        ({"uniforms": torch.zeros(2, dtype=torch.float64)}, r"uniforms: must be a matrix \(2, 2\), got \(2,\)"),
        ({"uniforms": torch.zeros(2, 2)}, "uniforms: must be a vector of torch.float64|uniforms: must be"),
        ({"uniforms": torch.tensor([[0.0, 0.5], [1.0, 0.5]]).double()}, r"uniforms\[2\]=1.0: must be in \[0, 1\)"),
        ({"factual_rows": torch.tensor([0, 2])}, r"factual_rows\[1\]=2: must be in \[-1, 2\)"),
        ({"logit_rows": torch.tensor([0, -2])}, r"logit_rows\[1\]=-2: must be in \[-1, 2\)"),
        ({"temperature": 0.0}, "temperature=0.0: must be positive"),
        ({"factual_temperature": -1.0}, "factual_temperature=-1.0: must be positive"),
        ({"factual_temperature": torch.tensor([1.0, nan]).double()}, r"factual_temperature\[1\]=nan"),
        ({"mask": torch.zeros(2, 2, dtype=torch.int32)}, "mask: has 2 words per row"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.redraw(**GOOD | change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": -1}, r"seed=-1: must be an integer in \[0, 2\*\*64\)"),
        ({"group": 2**32}, "group=4294967296"),
        ({"step": torch.tensor([0, -1])}, r"step\[1\]=-1"),
        ({"step": torch.tensor(-1)}, r"step\[0\]=-1"),
        ({"particles": torch.tensor([0, 2**32])}, r"particles\[1\]=4294967296"),
        ({"particles": 3}, "particles: must be a vector of torch.int64"),
        ({"seed": torch.tensor([1])}, "seed: must have 2 elements"),
    ],
)
def test_gumbel_refuses(change, message):
    good = {k: v for k, v in GOOD.items() if k != "uniforms"}
    key = {"seed": 0, "group": 0, "step": 0, "particles": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        ops.gumbel(**good | key | change)
