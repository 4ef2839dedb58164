"""weigh of every backend against the reference, on ordinary and hostile rows."""

import math

import numpy as np
import pytest
import torch
from backends import BACKENDS, CUDA, INTERPRETED, pack, random_mask, slow, to, weigh

from fastsmc import ops, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = [(1, 1), (3, 7), (5, 1023), (4, 1024), (3, 1025), (7, 5000), (2, 49152)]
inf, nan = math.inf, math.nan


def array(t):
    return None if t is None else t.float().numpy()


def check(logits, log_psi=None, backend="cpu", **kw):
    """Compares with the reference up to the rounding of float32 scores: x has a relative error of about 2^-23."""
    w = weigh(logits, log_psi, backend=backend, **kw)
    logits, log_psi = logits.cpu(), None if log_psi is None else log_psi.cpu()
    index = {k: v.cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in kw.items()}
    r = reference.weigh(array(logits), array(log_psi), **index)
    assert w.lse.dtype == w.lse_psi.dtype == w.tile_mass.dtype == torch.float64 and w.max_psi.dtype == torch.float32
    for got, want in zip(w, r, strict=True):
        assert got.shape == want.shape
    known = [np.abs(a[np.isfinite(a)]).max(initial=0.0) for a in (r.max_psi, r.lse)]
    size = sum(known) + 30
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
    bits = torch.arange(-(2**15), 2**15, 499 if slow(backend) else 1).short()
    for dtype in (torch.float16, torch.bfloat16):
        logits = bits.view(dtype)[:, None]
        lse = weigh(logits, backend=backend).lse
        want = torch.where(logits.isposinf(), nan, logits.double()).squeeze(1)
        lse, want = (x[~(logits.squeeze(1).abs() > 2.3e38) | logits.squeeze(1).isinf()] for x in (lse, want))
        torch.testing.assert_close(lse, want, rtol=2e-7, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_one_tile_keep_float32_accuracy(backend):
    """Two tokens, t apart: the mass is 1 + e^t, over the range of float32."""
    t = torch.linspace(-100, 0, 51 if slow(backend) else 4001)
    mass = weigh(torch.stack([torch.zeros_like(t), t], 1), backend=backend).tile_mass.squeeze(1)
    torch.testing.assert_close(mass, 1 + t.double().exp(), rtol=4e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_row_indices(backend):
    torch.manual_seed(2)
    wide = to(backend, torch.randn(6, 3000))
    logits = wide[::2, 100:2100]  # row stride 6000, not aligned
    psi = torch.randn(1, 2000)
    check(logits, psi.expand(3, 2000), backend)
    index = {"logit_rows": torch.tensor([2, 0, 0, 1, 2]), "psi_rows": torch.tensor([1, 1, 0, 3, 3])}
    psis = torch.randn(4, 2000)
    check(logits, psis, backend, **index)
    check(logits, None, backend, logit_rows=index["logit_rows"])
    check(logits[:1].expand(5, -1), psis, backend, psi_rows=index["psi_rows"])
    empty = weigh(logits, logit_rows=torch.empty(0, dtype=torch.int64), backend=backend)
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
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_of_a_row_are_of_different_sizes(dtype, twisted, backend):
    """Each tile keeps its own accuracy, whatever the tile before it was like: higher, lower, without mass, masked."""
    torch.manual_seed(12)
    levels = [
        0.0,
        55.0,
        70.0,
        -50.0,
        -60.0,
        -inf,
        -400.0,
        0.3,
        3e4,
        -3e4,
        12.0,
        -1e30 if dtype != torch.float16 else -6e4,
    ]
    if slow(backend):
        levels = levels[:6]
    rows = [torch.randperm(len(levels)) for _ in range(3 if slow(backend) else 20)]
    z = torch.randn(len(rows), len(levels), ops.TILE) * 2
    z = (z + torch.tensor(levels)[torch.stack(rows)][:, :, None]).flatten(1).to(dtype)
    z[:, ::7] = -inf
    few = torch.where(torch.rand(z.shape) < 0.01, torch.randn(z.shape), -inf)
    check(z, few if twisted else None, backend, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("value", [-inf, inf, nan, -1e30, 2e38])
def test_hostile_values_in_a_later_tile(value, twisted, backend):
    """One bad element behind good tiles, at any place of a vector, has the effect that it has in the first tile."""
    torch.manual_seed(13)
    places = range(0, ops.TILE, 400 if slow(backend) else 67)
    z = torch.randn(len(places), 3 * ops.TILE)
    for row, place in enumerate(places):
        z[row, 2 * ops.TILE + place] = value
    good = torch.randn(z.shape)
    for logits, psi in ((z, good), (good, z)) if twisted else ((z, None),):
        w = check(logits, psi, backend)
        assert w.lse_psi.isnan().all() == (not value < 1e39)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masses_of_later_tiles_keep_float32_accuracy(dtype, backend):
    """Against float64: whole tiles, 100 nats wide. 3·√128·2^-24 = 2e-6: up to 128 roundings in each lane of a sum."""
    torch.manual_seed(14)
    tiles = 4 if slow(backend) else 64
    x = -torch.rand(2, tiles * ops.TILE).mul(100).to(dtype)
    mass = weigh(x, backend=backend).tile_mass
    x = x.double().unflatten(1, (tiles, -1))
    torch.testing.assert_close(mass, (x - x.amax((1, 2), keepdim=True)).exp().sum(2), rtol=2e-6, atol=0)


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
    w = weigh(logits, psi, backend=backend)
    assert w.lse_psi.isnan().all() and w.lse[0].isfinite() and w.lse[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_score_beyond_float32_counts_as_infinite(backend):
    w = weigh(torch.tensor([[3e38, 0.0]]), temperature=0.5, backend=backend)
    assert w.lse.isnan().all() and (w.tile_mass == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_supports_have_no_mass(backend):
    logits, psi = torch.zeros(1, 2000), torch.zeros(1, 2000)
    logits[0, :1000], psi[0, 1000:] = -inf, -inf
    w = check(logits, psi, backend)
    assert w.lse_psi.item() == -inf and w.lse.item() == pytest.approx(math.log(1000))


MASKS = {
    "random": lambda r, v: random_mask(r, v)[1],
    "nothing": lambda r, v: torch.zeros(r, -(-v // 32), dtype=torch.int32),
    "all": lambda r, v: torch.full((r, -(-v // 32)), -1, dtype=torch.int32),
    "one bit": lambda r, v: pack(torch.arange(-(-v // 32) * 32)[None, :] == (v - 1) // torch.arange(1, r + 1)[:, None]),
    "behind the end": lambda r, v: pack(torch.arange(-(-v // 32) * 32).expand(r, -1) >= v),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 33, 1024, 2047, 2500])
def test_masks(v, dtype, twisted, backend):
    torch.manual_seed(7)
    logits, psi = (torch.randn(3, v) * 4).to(dtype), torch.randn(3, v) if twisted else None
    for name, make in MASKS.items():
        w = check(logits, psi, backend, mask=make(3, v), temperature=0.7)
        no_mass = name == "nothing" or name == "behind the end"
        assert (w.lse_psi == -inf).all() == (w.max_psi == -inf).all() == (w.tile_mass == 0).all() == no_mass
        assert w.lse.isfinite().all()
        if name == "one bit":
            token = (v - 1) // torch.arange(1, 4)[:, None]
            x = logits.double().gather(1, token) / 0.7 + (psi.double().gather(1, token) if twisted else 0.0)
            torch.testing.assert_close(w.lse_psi, x.squeeze(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_rows(backend):
    """Many rows, few masks; −1 weighs as no mask does, to the last bit; strides of the mask count."""
    torch.manual_seed(8)
    logits, psi = torch.randn(5, 2100), torch.randn(5, 2100)
    mask = to(backend, random_mask(4, 2100)[1])[::2]
    mask_rows = torch.tensor([1, -1, 0, -1, 1])
    for twist in (psi, None):
        w = check(logits, twist, backend, mask=mask, mask_rows=mask_rows)
        plain = weigh(logits, twist, backend=backend)
        for got, want in zip(w, plain, strict=True):
            torch.testing.assert_close(got[[1, 3]], want[[1, 3]], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [inf, nan])
def test_mask_takes_the_place_of_the_twist(value, backend):
    """log ψ of a forbidden token is −inf, whatever the twist says; what the logits say it cannot mend."""
    allowed, mask = random_mask(2, 1300)
    bad = torch.where(allowed, 0.0, value)
    w = check(torch.zeros(2, 1300), bad, backend, mask=mask)
    torch.testing.assert_close(w.lse_psi, allowed.double().sum(1).log())
    w = check(bad, None, backend, mask=mask)
    assert w.lse.isnan().all() and w.lse_psi.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("twisted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_no_row(masked, twisted, backend):
    """An index of −1 into the logits: no mass, and the other indices there do not matter."""
    torch.manual_seed(9)
    kw = {"logit_rows": torch.tensor([-1, 2, -1, 0])}
    if twisted:
        kw["psi_rows"] = torch.tensor([10**12, 1, -5, 0])
    if masked:
        kw |= {"mask": random_mask(2, 1500)[1], "mask_rows": torch.tensor([10**12, -1, 7, 1])}
    psi = torch.randn(2, 1500) if twisted else None
    w = check(torch.randn(3, 1500), psi, backend, **kw)
    for part in (w.lse, w.lse_psi, w.max_psi):
        assert (part == -inf).tolist() == [True, False, True, False]
    assert (w.tile_mass[::2] == 0).all()
    kw["logit_rows"] = torch.full((4,), -1)
    none = check(torch.empty(0, 1500), None if psi is None else psi[:0], backend, **kw)
    assert (none.lse_psi == -inf).all() and (none.tile_mass == 0).all()


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_batch(dtype, backend, monkeypatch):
    """To the last bit, alone or among others, in any place, and however many tiles a Triton program takes."""
    torch.manual_seed(10)
    logits, psi = (torch.randn(6, 5000) * 4).to(dtype), torch.randn(6, 5000)
    kw = {"mask": random_mask(6, 5000)[1]}
    for twist in (psi, None):
        together = weigh(logits, twist, backend=backend, **kw)
        place = torch.tensor([3, 0, 5, -1, 1])
        moved = weigh(logits, twist, logit_rows=place, psi_rows=None if twist is None else place, mask_rows=place,
                      backend=backend, **kw)  # fmt: skip
        alone = [
            weigh(logits[i : i + 1], None if twist is None else twist[i : i + 1], mask=kw["mask"][i : i + 1],
                  backend=backend)
            for i in range(6)
        ]  # fmt: skip
        runs = [together]
        if backend == "triton":
            from fastsmc.kernels import weigh as kernel

            with monkeypatch.context() as patch:
                patch.setattr(kernel, "PROGRAMS", 12)  # from five parts of one tile to two of three
                runs.append(weigh(logits, twist, backend=backend, **kw))
        for k, part in enumerate(together):
            assert all(torch.equal(run[k], part) for run in runs)
            assert torch.equal(moved[k][[0, 1, 2, 4]], part[[3, 0, 5, 1]])
            assert all(torch.equal(one[k][0], part[i]) for i, one in enumerate(alone))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["base", "twist", "mask"])
def test_a_temperature_per_row(kind, dtype, backend):
    """Each row has the bits that its temperature gives to all; nobody looks at the temperature of no row."""
    torch.manual_seed(15)
    r, v = (5, 1100) if slow(backend) else (12, 2500)
    logits, rows = (torch.randn(6, v) * 4).to(dtype), torch.randint(-1, 6, (r,))
    rows[:2] = torch.tensor([-1, 3])
    t = 10 ** (torch.rand(r, dtype=torch.float64) * 4.7 - 3)  # 1e-3 to 50
    t[1:4] = torch.tensor([1.0, 1e-3, 50.0])
    t[rows < 0] = torch.tensor([nan, 0.0, -inf], dtype=torch.float64).repeat(r)[: int((rows < 0).sum())]
    psi, kw = torch.randn(r, v) if kind != "base" else None, {"logit_rows": rows}
    if kind == "mask":
        kw |= {"mask": random_mask(r, v)[1]}
    got = check(logits, psi, backend, temperature=t, **kw)
    for i in range(r):
        want = weigh(logits, psi, backend=backend, temperature=1.0 if rows[i] < 0 else t[i].item(), **kw)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a[i].nan_to_num(), b[i].nan_to_num()) and torch.equal(a[i].isnan(), b[i].isnan())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["base", "twist", "mask", "both"])
def test_powers(kind, dtype, backend):
    """Powers of z by the reference, for all rows or one each; with 1 scores have the bits that they have without."""
    torch.manual_seed(17)
    r, v = (4, 1100) if slow(backend) else (12, 2500)
    logits, rows = (torch.randn(6, v) * 4).to(dtype), torch.randint(-1, 6, (r,))
    rows[:3] = torch.tensor([-1, 3, 5])
    logits[3, 1:40], logits[5, 2], logits[2, 7] = -inf, nan, -1e9
    t, power = torch.rand(r, dtype=torch.float64) + 0.5, 4 ** torch.randn(r, dtype=torch.float64)
    power[:3] = torch.tensor([nan, 1e-3, 1.0])
    power[-1] = 1.0
    psi, kw = torch.randn(r, v) if kind in ("twist", "both") else None, {"logit_rows": rows}
    if kind in ("mask", "both"):
        kw |= {"mask": random_mask(r, v)[1]}
    got = check(logits, psi, backend, temperature=t, power=power, **kw)
    assert kind != "base" or got.lse_psi is not got.lse
    without = weigh(logits, psi, backend=backend, temperature=t, **kw)
    for a, b in zip(got[1:], without[1:], strict=True):
        assert torch.equal(a[power == 1].nan_to_num(), b[power == 1].nan_to_num())
    torch.testing.assert_close(got.lse, without.lse, rtol=1e-15, atol=0, equal_nan=True)
    for i, alpha in enumerate(power[1:3].tolist(), 1):
        for temperature in (t, t[i].item()):
            for_all = weigh(logits, psi, backend=backend, temperature=temperature, power=alpha, **kw)
            for a, b in zip(got, for_all, strict=True):
                assert torch.equal(a[i].nan_to_num(), b[i].nan_to_num())


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("v", [49152, 50257, 128256])
@pytest.mark.parametrize("n", [1, 63, 256, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton_at_full_size(dtype, n, v):
    torch.manual_seed(11)
    logits, psi = (torch.randn(n, v) * 4).to(dtype), torch.randn(n, v)
    mask = random_mask(n, v)[1]
    for kw in ({}, {"log_psi": psi}, {"log_psi": psi, "mask": mask}):
        a, b = (weigh(logits, temperature=0.8, backend=backend, **kw) for backend in ("cpu", "triton"))
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op(backend):
    logits, psi, mask = torch.randn(3, 1100), torch.randn(2, 1100).bfloat16(), random_mask(3, 1100)[1]
    rows = torch.tensor([0, 1, 1])
    for args in ((None,) * 5, (rows, psi, rows, None, None), (None, None, None, mask, None)):
        for temperatures in (None, torch.tensor([0.9, 1.0, 2.0], dtype=torch.float64)):
            given = *to(backend, (logits, *args)), 0.9, to(backend, temperatures)
            for powered in (given[-2:], (0.3, None)):
                powers = powered[0] == 0.3
                torch.library.opcheck(torch.ops.fastsmc.weigh.default, (*given, *powered, powers, backend))


def test_results_do_not_depend_on_threads():
    torch.manual_seed(5)
    logits, psi = torch.randn(37, 3000), torch.randn(37, 3000)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(ops.weigh(logits, psi))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


Z, P, T = torch.zeros(2, 8), torch.zeros(3, 8), torch.ones(2, dtype=torch.float64)


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
        ((Z,), {"temperature": T[:1]}, "temperature: must have 2 elements, got 1"),
        ((Z,), {"temperature": T.float()}, "temperature: must be a vector of torch.float64, got torch.float32"),
        ((Z,), {"temperature": T * torch.tensor([1.0, -2.0])}, r"temperature\[1\]=-2.0: must be positive and finite"),
        ((Z,), {"temperature": T * torch.tensor([1.0, inf])}, r"temperature\[1\]=inf: must be positive"),
        ((Z,), {"temperature": T * torch.tensor([nan, 1.0])}, r"temperature\[0\]=nan: must be positive"),
        ((Z,), {"temperature": T * 1e-40, "logit_rows": torch.tensor([-1, 0])}, r"temperature\[1\]=1e-40: must be"),
        ((Z,), {"power": 0.0}, "power=0.0: must be positive and finite"),
        ((Z,), {"power": inf}, "power=inf: must be positive and finite"),
        ((Z,), {"power": T[:1]}, "power: must have 2 elements, got 1"),
        ((Z,), {"power": T * torch.tensor([1.0, -2.0])}, r"temperature / power\[1\]=-0.5: must be positive and finite"),
        ((Z,), {"power": 1e20, "temperature": 1e-20}, "temperature / power=1e-40: must be positive and finite"),
        ((Z,), {"psi_rows": torch.tensor([0])}, "psi_rows: given without log_psi"),
        ((Z,), {"logit_rows": torch.tensor([0, 2])}, r"logit_rows\[1\]=2: must be in \[-1, 2\)"),
        ((Z,), {"logit_rows": torch.tensor([0, -2])}, r"logit_rows\[1\]=-2: must be in \[-1, 2\)"),
        ((Z, P), {"logit_rows": torch.tensor([-1, 0]), "psi_rows": torch.tensor([3, 3])}, r"psi_rows\[1\]=3"),
        ((Z,), {"mask": torch.zeros(2, 2).int()}, "mask: has 2 words per row, logits of 8 columns need 1 of 32 bits"),
        ((Z,), {"mask": torch.zeros(2, 1)}, "mask: dtype torch.float32 must be one of torch.int32"),
        ((Z,), {"mask": torch.zeros(3, 1).int()}, "mask: has 3 rows, must have 2, or mask_rows must be given"),
        ((Z,), {"mask": torch.zeros(3, 1).int(), "mask_rows": torch.tensor([0, 3])}, r"mask_rows\[1\]=3: .* \[-1, 3\)"),
        ((Z,), {"mask_rows": torch.tensor([0, 0])}, "mask_rows: given without mask"),
        ((Z, P), {"psi_rows": torch.tensor([0, -1])}, r"psi_rows\[1\]=-1"),
        ((Z, P), {"psi_rows": torch.tensor([0, 1, 2])}, "psi_rows: must have 2 elements, got 3"),
        ((Z,), {"logit_rows": torch.tensor([0], dtype=torch.int32)}, "logit_rows: must be a vector of torch.int64"),
        ((Z,), {"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_refuses(args, kw, message):
    with pytest.raises(ValueError, match=message):
        ops.weigh(*args, **kw)


@pytest.mark.skipif(INTERPRETED, reason="what is refused is allowed here")
def test_refuses_to_interpret_unasked():
    with pytest.raises(ValueError, match="backend='triton': tensors are on cpu, which needs TRITON_INTERPRET=1"):
        ops.weigh(Z, backend="triton")


def test_a_tensor_that_is_copied_on_write_is_read_where_it_lies():
    """Tables that groups share (`potentials.copying`) are not copied by reading them."""
    logits, psi = torch.randn(3, 40), torch.randn(9, 40)
    want = ops.weigh(logits, psi[2:5], psi_rows=torch.tensor([0, 2, 1]))
    lazy = torch._lazy_clone(psi)[2:5]
    got = ops.weigh(torch._lazy_clone(logits), lazy, psi_rows=torch._lazy_clone(torch.tensor([0, 2, 1])))
    assert torch._C._is_cow_tensor(lazy) and torch.equal(got.lse_psi, want.lse_psi)
