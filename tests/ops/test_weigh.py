"""weigh of both backends against the reference, on ordinary and hostile rows."""

import math

import numpy as np
import pytest
import torch

from fastsmc import ops, reference

BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (3, 7), (5, 1023), (4, 1024), (3, 1025), (7, 5000), (2, 49152)]
inf, nan = math.inf, math.nan


def array(t):
    return None if t is None else t.float().numpy()


def check(logits, log_psi=None, backend="cpu", **kw):
    """Compares with the reference up to the rounding of float32 scores: x has a relative error of about 2^-23."""
    w = ops.weigh(logits, log_psi, backend=backend, **kw)
    index = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    r = reference.weigh(array(logits), array(log_psi), **index)
    assert w.lse.dtype == w.lse_psi.dtype == w.tile_mass.dtype == torch.float64 and w.max_psi.dtype == torch.float32
    for got, want in zip(w, r, strict=True):
        assert got.shape == want.shape
    size = (
        np.nan_to_num(np.abs(r.max_psi), nan=0.0, posinf=0.0).max(initial=0.0) + np.abs(np.nan_to_num(r.lse)).max() + 30
    )
    if log_psi is not None:  # terms that cancel in x leave their rounding behind
        finite = array(log_psi)[np.isfinite(array(log_psi))]
        size += np.abs(finite).max(initial=0.0)
    tol = 2.0**-22 * size
    np.testing.assert_allclose(w.lse, r.lse, rtol=0, atol=tol)
    np.testing.assert_allclose(w.lse_psi, r.lse_psi, rtol=0, atol=tol)
    np.testing.assert_allclose(w.max_psi, r.max_psi, rtol=0, atol=tol)
    np.testing.assert_allclose(w.tile_mass, r.tile_mass, rtol=2 * tol, atol=1e-36)
    return w


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_matches_reference(shape, dtype, backend):
    torch.manual_seed(0)
    logits, log_psi = (torch.randn(shape) * 4).to(dtype), (torch.randn(shape) * 3).to(dtype)
    check(logits, None, backend)
    check(logits, log_psi, backend, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("psi_dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes(dtype, psi_dtype, backend):
    torch.manual_seed(1)
    check((torch.randn(3, 1500) * 4).to(dtype), torch.randn(3, 1500).to(psi_dtype), backend, temperature=1.3)


def test_without_twist_lse_psi_is_lse():
    w = ops.weigh(torch.randn(3, 50))
    assert w.lse_psi is w.lse


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_half_value(backend):
    """All float16 and bfloat16 bit patterns, subnormals and NaNs among them, one row each: lse of one token is it."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        logits = bits.view(dtype)[:, None]
        lse = ops.weigh(logits, backend=backend).lse
        want = torch.where(logits.isposinf(), nan, logits.double()).squeeze(1)
        lse, want = (x[~(logits.squeeze(1).abs() > 2.3e38) | logits.squeeze(1).isinf()] for x in (lse, want))
        torch.testing.assert_close(lse, want, rtol=2e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_one_tile_keep_float32_accuracy(backend):
    """Two tokens, t apart: the mass is 1 + e^t, over the range of float32."""
    t = torch.linspace(-100, 0, 4001)
    mass = ops.weigh(torch.stack([torch.zeros_like(t), t], 1), backend=backend).tile_mass.squeeze(1)
    torch.testing.assert_close(mass, 1 + t.double().exp(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_row_indices(backend):
    torch.manual_seed(2)
    wide = torch.randn(6, 3000)
    logits = wide[::2, 100:2100]  # row stride 6000, not aligned
    psi = torch.randn(1, 2000)
    check(logits, psi.expand(3, 2000), backend)
    index = {"logit_rows": torch.tensor([2, 0, 0, 1, 2]), "psi_rows": torch.tensor([1, 1, 0, 3, 3])}
    psis = torch.randn(4, 2000)
    check(logits, psis, backend, **index)
    check(logits, None, backend, logit_rows=index["logit_rows"])
    check(logits[:1].expand(5, -1), psis, backend, psi_rows=index["psi_rows"])
    empty = ops.weigh(logits, logit_rows=torch.empty(0, dtype=torch.int64), backend=backend)
    assert empty.lse.shape == (0,) and empty.tile_mass.shape == (0, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_far_offsets_and_wide_rows(offset, backend):
    """Tiles far below the row's maximum keep their mass: they are summed relative to their own."""
    torch.manual_seed(3)
    logits = torch.randn(2, 4096) + offset
    logits[:, 1024:2048] -= 90.0
    w = check(logits, None, backend)
    assert (w.tile_mass[:, 1] > 0).all() and (w.tile_mass[:, 1] < 1e-30).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [-1e6, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_finite_mask_values(mask, backend):
    """Masking with a large finite number instead of −inf: whole tiles of it weigh nothing and do no harm."""
    torch.manual_seed(6)
    logits = torch.randn(3, 4000)
    logits[0, :2100] = mask
    logits[1] += mask / 2 if mask < -2e38 else mask
    w = check(logits, None, backend)
    assert (w.tile_mass[0, :2] == 0).all() and w.lse.isfinite().all()


def rows_with(value, v=2500):
    """A good row between rows that hold `value` once, in every tile, and everywhere."""
    torch.manual_seed(4)
    x = torch.randn(4, v)
    x[1, v - 1] = value
    x[2, ::500] = value
    x[3] = value
    return x


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [-inf, inf, nan])
def test_hostile_values(value, dtype, twisted, backend):
    bad, good = rows_with(value).to(dtype), torch.randn(4, 2500).to(dtype)
    w = check(bad, good if twisted else None, backend)
    if value == -inf:
        assert w.lse.isfinite().tolist() == [True] * 3 + [False] and w.lse[3] == -inf and w.max_psi[3] == -inf
    else:
        assert w.lse.isnan().tolist() == w.max_psi.isnan().tolist() == [False] + [True] * 3
        assert (w.tile_mass[1:] == 0).all()
    if twisted:  # the base does not see the twist's values
        w = check(good, bad, backend)
        assert w.lse.isfinite().all()
        assert w.lse_psi.isfinite().tolist() == ([True] * 3 + [False] if value == -inf else [True] + [False] * 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opposite_infinities_are_nan(backend):
    logits, psi = torch.zeros(2, 1100), torch.zeros(2, 1100)
    logits[0, 5], psi[0, 5] = -inf, inf
    logits[1, 5], psi[1, 5] = inf, -inf
    w = ops.weigh(logits, psi, backend=backend)
    assert w.lse_psi.isnan().all() and w.lse[0].isfinite() and w.lse[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_beyond_float32_counts_as_infinite(backend):
    w = ops.weigh(torch.tensor([[3e38, 0.0]]), temperature=0.5, backend=backend)
    assert w.lse.isnan().all() and (w.tile_mass == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_supports_have_no_mass(backend):
    logits, psi = torch.zeros(1, 2000), torch.zeros(1, 2000)
    logits[0, :1000], psi[0, 1000:] = -inf, -inf
    w = check(logits, psi, backend)
    assert w.lse_psi.item() == -inf and w.lse.item() == pytest.approx(math.log(1000))


def test_results_do_not_depend_on_threads():
    torch.manual_seed(5)
    logits, psi = torch.randn(37, 3000), torch.randn(37, 3000)
    before, threads = ops.weigh(logits, psi), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        after = ops.weigh(logits, psi)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)


Z, P = torch.zeros(2, 8), torch.zeros(3, 8)


@pytest.mark.parametrize(
    "args, kw, message",
    [
        ((Z.double(),), {}, r"logits: dtype torch.float64"),
        ((Z[0],), {}, r"logits: must be a matrix .*\(8,\)"),
        ((Z[:, :0],), {}, "logits: has no columns"),
        ((Z.t(),), {}, "logits: column stride 8"),
        ((Z, P), {}, "log_psi: has 3 rows, must have 2"),
        ((Z, P[:, :5]), {}, "log_psi: has 5 columns, logits have 8"),
        ((Z, P.int()), {}, "log_psi: dtype torch.int32"),
        ((Z,), {"temperature": 0.0}, "temperature=0.0"),
        ((Z,), {"temperature": -1.0}, "temperature=-1.0"),
        ((Z,), {"temperature": nan}, "temperature=nan"),
        ((Z,), {"temperature": 1e-40}, "temperature=1e-40"),
        ((Z,), {"psi_rows": torch.tensor([0])}, "psi_rows: given without log_psi"),
        ((Z,), {"logit_rows": torch.tensor([0, 2])}, r"logit_rows\[1\]=2: must be in \[0, 2\)"),
        ((Z, P), {"psi_rows": torch.tensor([0, -1])}, r"psi_rows\[1\]=-1"),
        ((Z, P), {"psi_rows": torch.tensor([0, 1, 2])}, "psi_rows: must have 2 elements, got 3"),
        ((Z,), {"logit_rows": torch.tensor([0], dtype=torch.int32)}, "logit_rows: must be a vector of torch.int64"),
        ((Z,), {"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_refuses(args, kw, message):
    with pytest.raises(ValueError, match=message):
        ops.weigh(*args, **kw)
