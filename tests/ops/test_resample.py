"""resample: counts equal to the reference's on every backend and every team, unbiased, in-place form, groups."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmc import _C, ops, reference
from fastsmc.ops.resample import _outputs
from fastsmc.params import RESAMPLING_SCHEMES

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("cpu", "torch", pytest.param("cuda", marks=needs_cuda))
inf, nan = math.inf, math.nan


def on(backend, tensor):
    return tensor.cuda() if backend == "cuda" else tensor


def resample(log_weights, u, *, backend, **options):
    """ops.resample of CPU tensors on the backend's device; results on the CPU."""
    out = ops.resample(on(backend, log_weights), on(backend, u), backend=backend, **options)
    return ops.Resampled(*(x.cpu() for x in out))


def emulate(log_weights, u, threads, seed, *, scheme="systematic", threshold=1.0, offsets=None, largest=None):
    """What the GPU runs, thread by thread on the host, every phase in an order of its own."""
    out = _outputs(log_weights, offsets)
    largest = log_weights.shape[-1] if largest is None else largest
    always, thresholds = (1.0, threshold) if isinstance(threshold, torch.Tensor) else (threshold, None)
    addresses = [0 if x is None else x.data_ptr() for x in (log_weights, u, *out, thresholds, offsets)]
    sizes = (out[3].numel(), log_weights.numel(), largest)
    _C.emulate_resample(addresses, sizes, scheme, always, threads, seed)
    return ops.Resampled(*out)


def assert_equal(got, want, what=""):
    """Integers equal; the normalisers within what the order of N sums in double can do."""
    for name in ("ancestors", "counts", "rank", "resampled"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), f"{what} {name}")
    n = np.asarray(want.counts).shape[-1]
    for name in ("ess", "log_mean"):
        np.testing.assert_allclose(
            getattr(got, name), getattr(want, name), rtol=4 * n * 2.0**-53, atol=4 * n * 2.0**-53, err_msg=what
        )


def random_case(n, sigma, dead, seed):
    rng = np.random.default_rng(seed)
    log_weights = rng.normal(-1000.0, sigma, n)
    log_weights[rng.random(n) < dead] = -inf
    log_weights[rng.integers(n)] = -1000.0  # at least one alive
    return torch.from_numpy(log_weights), torch.from_numpy(rng.random(n))


def check_form(r, log_weights):
    """What every result must satisfy, whatever the scheme."""
    n = len(log_weights)
    a, counts, rank = (x.numpy() for x in r[:3])
    assert a.dtype == counts.dtype == rank.dtype == np.int64
    assert counts.min() >= 0 and counts.sum() == n
    assert (counts[np.isneginf(log_weights)] == 0).all()
    np.testing.assert_array_equal(np.bincount(a, minlength=n), counts)
    assert (a[counts > 0] == np.flatnonzero(counts > 0)).all()
    assert (a[a] == a).all()
    assert (np.diff(a[counts == 0]) >= 0).all()
    for parent in np.unique(a):
        assert rank[a == parent].tolist() == list(range(counts[parent]))


def test_registries_name_the_same_schemes():
    from fastsmc.ops import _torch

    assert tuple(reference.SCHEMES) == tuple(_torch.SCHEMES) == RESAMPLING_SCHEMES
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="unknown scheme fancy"):
        emulate(x, x, 1, 0, scheme="fancy")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
def test_equals_reference(n, scheme, backend):
    for seed, (sigma, dead) in enumerate([(0.0, 0.0), (1.0, 0.0), (1.0, 0.5), (8.0, 0.2), (0.3, 0.95)]):
        log_weights, u = random_case(n, sigma, dead, seed)
        got = resample(log_weights, u, scheme=scheme, backend=backend)
        want = reference.resample(log_weights.numpy(), u.numpy(), scheme=scheme)
        assert_equal(got, want)
        check_form(got, log_weights.numpy())


def hostile_weights(n):
    """(name, log weights) of what a scan or a search could trip over."""
    rng = np.random.default_rng(n)
    one = np.full(n, -inf)
    one[n // 3] = 3.0
    runs = np.where((np.arange(n) // 37) % 2 == 0, -inf, rng.normal(0, 1, n))
    runs[-1] = 0.0
    last = np.full(n, -60.0)
    last[-1] = 0.0
    return {
        "equal": np.full(n, -7.5), "one has all": one, "runs of -inf": runs, "last has nearly all": last,
        "normal": rng.normal(-1000, 1.5, n), "huge range": rng.uniform(-745, 700, n),
    }  # fmt: skip


@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 1000, 4096, 16384, 20000])
def test_every_team_equals_reference(n, scheme):
    """Teams of less, as many and more threads than there are lanes; results of all are the same to the last bit."""
    u = torch.from_numpy(np.random.default_rng(7).random(n))
    for name, weights in hostile_weights(n).items():
        log_weights = torch.from_numpy(weights)
        want = reference.resample(weights, u.numpy(), scheme=scheme)
        first = None
        for seed, threads in enumerate((1, 32, 1000, 1024, 132 * 256)):
            got = emulate(log_weights, u, threads, seed, scheme=scheme)
            assert_equal(got, want, f"{name} {threads} threads")
            first = first or got
            assert torch.equal(got.ess, first.ess) and torch.equal(got.log_mean, first.log_mean)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), scheme=st.sampled_from(RESAMPLING_SCHEMES))
def test_any_team_on_any_weights(data, scheme):
    n = data.draw(st.integers(1, 2500))
    alphabet = data.draw(st.lists(st.one_of(st.just(-inf), st.floats(-60, 60)), min_size=1, max_size=12))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    weights = rng.choice(alphabet, n)
    u = rng.choice([0.0, 0.5, 1.0 - 2.0**-53], n) if data.draw(st.booleans()) else rng.random(n)
    threshold = data.draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    threads, seed = data.draw(st.integers(1, 3000)), data.draw(st.integers(0, 2**63))
    got = emulate(torch.from_numpy(weights), torch.from_numpy(u), threads, seed, scheme=scheme, threshold=threshold)
    want = reference.resample(weights, u, scheme=scheme, threshold=threshold)
    # a threshold that the ESS meets but for rounding may be decided either way: no such case is drawn
    if want.ess > 0 and threshold in (0.3, 0.9) and abs(want.ess / (threshold * n) - 1) < 1e-9:
        return
    assert_equal(got, want)


@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_weights_and_uniforms_that_nobody_checked(scheme):
    """On a device they are not looked at: nothing may leave its array, and a group that is not well stays as it is."""
    rng = np.random.default_rng(3)
    for n in (1, 33, 5000, 17000):
        junk = torch.from_numpy(rng.choice([nan, inf, -inf, -1.0, 1.0, 1e300, 0.3], n))
        good = torch.from_numpy(rng.normal(0, 1, n))
        r = emulate(good, junk, 64, n, scheme=scheme)
        assert r.counts.min() >= 0 and r.counts.sum() == n
        np.testing.assert_array_equal(np.bincount(r.ancestors, minlength=n), r.counts)
        for bad in (nan, inf):
            weights = good.clone()
            weights[n // 2] = bad
            r = emulate(weights, good, 64, n, scheme=scheme)
            assert r.ess.isnan() and r.log_mean.isnan() and not r.resampled
            assert torch.equal(r.ancestors, torch.arange(n)) and (r.counts == 1).all() and (r.rank == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n", [1, 50, 1025, 20000])
def test_groups_are_as_if_alone(n, scheme, backend):
    """Batch of groups, each decided on its own: equal to calls of their own, bit for bit."""
    rng = np.random.default_rng(n)
    log_weights = torch.from_numpy(rng.normal(0, 1, (5, n)) * np.array([[0.0], [0.2], [1.0], [3.0], [9.0]]))
    log_weights[3] -= 400
    u = torch.from_numpy(rng.random((5, n)))
    for threshold in (None, 0.5, 1.0):
        got = resample(log_weights, u, scheme=scheme, threshold=threshold, backend=backend)
        assert got.ancestors.shape == (5, n) and got.ess.shape == (5,)
        for g in range(5):
            alone = resample(log_weights[g], u[g], scheme=scheme, threshold=threshold, backend=backend)
            for name in got._fields:
                assert torch.equal(getattr(got, name)[g], getattr(alone, name)), name
            want = reference.resample(log_weights[g].numpy(), u[g].numpy(), scheme=scheme, threshold=threshold)
            assert_equal(alone, want)
        if n > 1:
            assert got.resampled.tolist() == ([False, False, True, True, True] if threshold == 0.5 else [True] * 5)


def ragged_case(seed, largest):
    """(log weights, uniforms, offsets, thresholds) of groups of 0 to `largest` particles, one of them without mass."""
    rng = np.random.default_rng(seed)
    sizes = [0, 1, largest, 0, 0, 2, *rng.integers(1, largest + 1, 6), 0]
    spread, dead = rng.choice([0.0, 0.5, 2.0, 8.0], len(sizes)), rng.random(len(sizes))
    none = torch.zeros(0, dtype=torch.float64)
    cases = [random_case(n, s, d, seed) if n else (none, none) for n, s, d in zip(sizes, spread, dead, strict=True)]
    cases[7][0].fill_(-inf)
    thresholds = torch.from_numpy(rng.choice([0.0, 0.5, 1.0], len(sizes)))
    thresholds[2], thresholds[-2] = 1.0, 0.0
    log_weights, u = (torch.cat(column) for column in zip(*cases, strict=True))
    return log_weights, u, torch.tensor([0, *np.cumsum(sizes)]), thresholds


def groups_of(r, offsets):
    """Each group's part of a ragged result, with ancestors that count from the group's first particle."""
    for g, (a, b) in enumerate(itertools.pairwise(offsets.tolist())):
        yield ops.Resampled(r.ancestors[a:b] - a, r.counts[a:b], r.rank[a:b], r.ess[g], r.log_mean[g], r.resampled[g])


@pytest.mark.parametrize("backend", [*BACKENDS, "emulated"])
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("seed, largest, given", [(0, 300, None), (1, 300, 10**6), (2, 3000, 3000)])
def test_groups_of_several_sizes_are_as_if_alone(seed, largest, given, scheme, backend):
    """Bit for bit, whatever the other groups; empty groups, groups without mass, thresholds for each or for all."""
    log_weights, u, offsets, thresholds = ragged_case(seed, largest)
    n_groups = len(offsets) - 1
    for threshold in (thresholds, 0.5):
        each = threshold if threshold is thresholds else torch.full((n_groups,), threshold, dtype=torch.float64)
        if backend == "emulated":
            options = {"threshold": threshold, "offsets": offsets, "largest": largest}
            got, alone = emulate(log_weights, u, 48, seed, scheme=scheme, **options), "cpu"
        else:
            vector = on(backend, threshold) if threshold is thresholds else threshold
            options = {"threshold": vector, "offsets": on(backend, offsets), "largest": given}
            got, alone = resample(log_weights, u, scheme=scheme, **options, backend=backend), backend
        arrays = {"threshold": each.numpy(), "offsets": offsets.numpy()}
        assert_equal(got, reference.resample(log_weights.numpy(), u.numpy(), scheme=scheme, **arrays))
        for g, group in enumerate(groups_of(got, offsets)):
            at = slice(offsets[g], offsets[g + 1])
            if len(group.counts) == 0:
                assert (group.ess, group.log_mean, group.resampled) == (0.0, -inf, False)
                continue
            single = resample(log_weights[at], u[at], scheme=scheme, threshold=each[g].item(), backend=alone)
            for name in got._fields:
                assert torch.equal(getattr(group, name), getattr(single, name)), (g, name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_empty_groups(backend):
    none, offsets = torch.zeros(0, dtype=torch.float64), torch.zeros(4, dtype=torch.int64)
    for threshold in (None, 0.5):
        r = resample(none, none, offsets=on(backend, offsets), threshold=threshold, backend=backend)
        assert r.ancestors.shape == (0,) and r.ess.tolist() == [0.0] * 3 and r.log_mean.tolist() == [-inf] * 3
        r = resample(none, none, offsets=on(backend, offsets[:1]), threshold=threshold, backend=backend)
        assert r.ancestors.shape == r.ess.shape == r.resampled.shape == (0,)


def test_offsets_that_nobody_checked():
    """On a device: groups that reach outside, or that are larger than was said, count as empty. Others do not mind."""
    log_weights, u = random_case(100, 1.0, 0.1, 1)
    for bad in ([0, 30, 20, 100], [-5, 30, 60, 100], [0, 30, 60, 101], [0, 2**62, -(2**62), 100], [0, 70, 80, 100]):
        out = emulate(log_weights, u, 7, 0, offsets=torch.tensor(bad), largest=60)
        good = [0 <= a <= b <= 100 and b - a <= 60 for a, b in itertools.pairwise(bad)]
        assert not all(good) and out.resampled.tolist() == good and (out.ess > 0).tolist() == good
        for (a, b), ok in zip(itertools.pairwise(bad), good, strict=True):
            if ok and b <= min([x for x in bad if x > a]):  # no other group lies over it
                assert torch.equal(out.counts[a:b], resample(log_weights[a:b], u[a:b], backend="cpu").counts)


@pytest.mark.parametrize("n", [1, 31, 1023, 1024, 1025, 1200, 16384, 16400, 20000, 2**20])
def test_memory_for_a_group_is_enough_for_a_smaller_one(n):
    """Teams share the memory of the largest group: nothing is written behind it. Lanes do not grow with the group."""
    for m in {max(1, n // 2), max(1, n - 1), min(n, 1024), min(n, 1025), n}:
        log_weights, u = random_case(m, 1.0, 0.1, 1)
        offsets = torch.tensor([0, m])
        got = emulate(log_weights, u, 64, 0, offsets=offsets, largest=n)
        assert torch.equal(got.counts, resample(log_weights, u, backend="cpu").counts)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_mass(backend):
    log_weights = torch.full((2, 7), -inf, dtype=torch.float64)
    log_weights[1] = torch.arange(7)
    for threshold in (1.0, on(backend, torch.ones(2, dtype=torch.float64))):
        r = resample(log_weights, torch.zeros_like(log_weights), threshold=threshold, backend=backend)
    assert r.ess[0] == 0 and r.log_mean[0] == -inf and r.resampled.tolist() == [False, True]
    assert r.ancestors[0].tolist() == list(range(7)) and (r.counts[0] == 1).all() and (r.rank[0] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_groups(backend):
    none = torch.zeros((0, 5), dtype=torch.float64)
    r = resample(none, none, threshold=0.5, backend=backend)
    assert r.ancestors.shape == (0, 5) and r.ess.shape == (0,) and r.resampled.dtype == torch.bool


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold_is_strict(backend):
    """ESS < threshold·N: equal weights have ESS N and stay at any threshold below 1."""
    log_weights, u = torch.zeros(8, dtype=torch.float64), torch.full((8,), 0.5, dtype=torch.float64)
    assert not resample(log_weights, u, threshold=0.999, backend=backend).resampled
    assert resample(log_weights, u, threshold=1.0, backend=backend).resampled
    log_weights[4:] = -inf  # ESS 4, exactly
    assert not resample(log_weights, u, threshold=0.5, backend=backend).resampled
    assert resample(log_weights, u, threshold=0.501, backend=backend).resampled
    assert not resample(log_weights, u, threshold=0.0, backend=backend).resampled


@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_is_a_torch_op(scheme):
    log_weights, u = (x.view(2, 20) for x in random_case(40, 1.0, 0.2, 0))
    vectors = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0, 3, 20])
    both, single = (log_weights, u), (log_weights[0], u[0])
    for arguments, options in (
        (both, (None, None)),
        (both, (vectors[0], None)),
        (single, (None, None)),
        (single, vectors),
    ):
        torch.library.opcheck(torch.ops.fastsmc.resample.default, (*arguments, scheme, 0.5, *options, 20, "cpu"))


def test_compiles_in_one_graph():
    log_weights, u = random_case(50, 2.0, 0.2, 0)

    def step(log_weights, u):
        r = ops.resample(log_weights * 1.0, u, threshold=0.5)
        return torch.where(r.resampled, r.ancestors[r.ancestors], -1), r.log_mean + 1

    def ragged_step(log_weights, u, threshold, offsets):
        r = ops.resample(log_weights * 1.0, u, threshold=threshold, offsets=offsets, largest=30)
        return torch.where(r.counts > 0, r.ancestors[r.ancestors], -1), r.log_mean + 1

    vectors = torch.tensor([0.5, 1.0, 1.0], dtype=torch.float64), torch.tensor([0, 20, 20, 50])
    for function, arguments in ((step, (log_weights, u)), (ragged_step, (log_weights, u, *vectors))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for got, want in zip(compiled(*arguments), function(*arguments), strict=True):
            assert torch.equal(got, want)


@needs_cuda
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
@pytest.mark.parametrize("n", [33, 4096, 16384, 20000, 2**20])
def test_cuda_waits_for_nothing_and_can_be_captured(n, scheme):
    if scheme == "ssp" and n > 20000:
        pytest.skip("sequential")
    log_weights, u = (x.cuda() for x in random_case(n, 1.0, 0.1, 5))
    want = resample(log_weights.cpu(), u.cpu(), scheme=scheme, backend="cpu")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = ops.resample(log_weights, u, scheme=scheme, threshold=0.99)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.resample(log_weights, u, scheme=scheme, threshold=0.99)
        graph.replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for r in (got, captured):
        assert_equal(ops.Resampled(*(x.cpu() for x in r)), want)


@needs_cuda
@pytest.mark.parametrize("largest", [300, 3000, 20000])
def test_cuda_waits_for_nothing_with_groups_of_several_sizes(largest):
    """A captured launch follows what the offsets and thresholds say at each replay."""
    cases = [ragged_case(seed, largest) for seed in (0, 1)]
    size = max(len(case[0]) for case in cases)
    inputs = [torch.zeros(size, dtype=torch.float64, device="cuda") for _ in range(2)]
    inputs += [x.cuda() for x in cases[0][2:]]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            r = ops.resample(*inputs[:2], offsets=inputs[2], threshold=inputs[3], largest=largest, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for log_weights, u, offsets, thresholds in cases:
        n = len(log_weights)
        for held, new in zip(inputs, (log_weights, u, offsets, thresholds), strict=True):
            held[: len(new)].copy_(new)
        graph.replay()
        want = resample(log_weights, u, offsets=offsets, threshold=thresholds, backend="cpu")
        assert_equal(ops.Resampled(*(x.cpu()[:n] for x in r[:3]), *(x.cpu() for x in r[3:])), want)


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.one_of(st.just(-inf), st.floats(-60, 60)), min_size=1, max_size=70),
    scheme=st.sampled_from(RESAMPLING_SCHEMES), backend=st.sampled_from(("cpu", "torch")), data=st.data(),
)  # fmt: skip
def test_form_on_any_weights(weights, scheme, backend, data):
    log_weights = torch.tensor(weights, dtype=torch.float64)
    if log_weights.isneginf().all():
        log_weights[-1] = 0.0
    unit = st.one_of(st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]), st.floats(0, 1, exclude_max=True))
    u = torch.tensor(data.draw(st.lists(unit, min_size=len(weights), max_size=len(weights))), dtype=torch.float64)
    got = resample(log_weights, u, scheme=scheme, backend=backend)
    check_form(got, log_weights.numpy())
    want = reference.resample(log_weights.numpy(), u.numpy(), scheme=scheme)
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
    counts = ops.resample(log_weights.repeat(replicates, 1), u, scheme=scheme).counts.numpy()
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
    counts = resample(log_weights, u, backend=backend).counts
    assert torch.equal(counts.cumsum(0)[:-1], until.long()[:-1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", RESAMPLING_SCHEMES)
def test_large_n(scheme, backend):
    """The largest sums that the fixed point must hold: 2^20 weights, equal and not."""
    n = 2**20
    u = torch.from_numpy(np.random.default_rng(2).random(n))
    equal = resample(torch.zeros(n, dtype=torch.float64), u, scheme=scheme, backend=backend)
    if scheme != "multinomial":
        assert (equal.counts == 1).all() and torch.equal(equal.ancestors, torch.arange(n))
    log_weights = torch.from_numpy(np.random.default_rng(3).normal(0, 1, n))
    a, counts, rank = resample(log_weights, u, scheme=scheme, backend=backend)[:3]
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
    r = resample(log_weights, torch.rand(100, dtype=torch.float64), scheme=scheme, backend=backend)
    assert (r.ancestors == 37).all() and r.rank.tolist() == list(range(100))


@pytest.mark.parametrize(
    "weights, message",
    [
        ([0.0, nan, 0.0], r"log_weights\[1\]=nan: particle 1"),
        ([0.0, 0.0, inf], r"log_weights\[2\]=inf: particle 2"),
        ([-inf, -inf], "log_weights: all 2 are -inf"),
        ([], "log_weights: is empty"),
        ([[0.0, 1.0], [nan, 0.0]], r"log_weights\[1, 0\]=nan: particle 0 of group 1 must"),
        ([[0.0, 1.0], [-inf, -inf]], "log_weights: all 2 of group 1 are -inf"),
    ],
)
def test_refuses_weights(weights, message):
    log_weights = torch.tensor(weights, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        ops.resample(log_weights, torch.zeros_like(log_weights))


GROUPS = {"offsets": torch.tensor([0, 0, 2])}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scheme": "fancy"}, "scheme='fancy'"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"uniforms": torch.tensor([0.1, 1.0], dtype=torch.float64)}, r"uniforms\[1\]=1.0"),
        (
            {"uniforms": torch.tensor([0.1], dtype=torch.float64)},
            r"uniforms: must be \(2,\) as log_weights are",
        ),
        ({"log_weights": torch.zeros(2)}, "log_weights: must be a vector .* of torch.float64, got torch.float32"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"threshold": nan}, "threshold=nan"),
        (
            {"threshold": torch.tensor([1.0]).double()},
            "threshold: is a tensor, must be a number where there are no groups",
        ),
        ({"threshold": torch.tensor([0.5, 1.5]).double(), **GROUPS}, r"threshold\[1\]=1.5: must be in \[0, 1\]"),
        ({"threshold": torch.tensor([nan, 1.0]).double(), **GROUPS}, r"threshold\[0\]=nan: must be in"),
        ({"threshold": torch.tensor([1.0]).double(), **GROUPS}, "threshold: must have 2 elements, got 1"),
        ({"offsets": torch.tensor([0, 3])}, r"offsets\[1\]=3: must ascend from 0 to 2"),
        ({"offsets": torch.tensor([0.0, 2.0])}, "offsets: must be a vector of torch.int64"),
        (
            {"log_weights": torch.zeros(1, 2).double(), **GROUPS},
            r"log_weights: must be a vector .* offsets, got \(1, 2\)",
        ),
        ({"largest": 1, **GROUPS}, "offsets: group 1 has 2 particles, must have 1 at most"),
        ({"largest": 2**20 + 1, **GROUPS}, r"largest=1048577: must be in \[0, 1048576\]"),
        ({"largest": 2}, "largest=2: given without offsets"),
        ({"log_weights": torch.tensor([0.0, nan]).double(), **GROUPS}, r"log_weights\[1\]=nan: particle 1 of group 1"),
        ({"log_weights": torch.full((2,), -inf).double(), **GROUPS}, "log_weights: all 2 of group 1 are -inf"),
        ({"log_weights": torch.zeros(2**20 + 1, dtype=torch.float64)}, "log_weights: has 1048577 particles per group"),
        ({"backend": "cuda"}, f"backend='cuda': {'tensors are on cpu' if _C.cuda_archs else '.*built without CUDA'}"),
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
        got = ops.ess_log_mean(on(backend, log_weights), backend=backend)
        assert all(type(x) is float for x in got)
        assert got == pytest.approx(reference.ess_log_mean(log_weights.numpy()), rel=1e-12)
    zeros = on(backend, torch.zeros(10, dtype=torch.float64))
    assert ops.ess_log_mean(zeros, backend=backend) == pytest.approx((10.0, 0.0), abs=1e-12)
    assert ops.ess_log_mean(zeros - inf, backend=backend) == (0.0, -inf)
    zeros[1] = nan
    with pytest.raises(ValueError, match=r"log_weights\[1\]=nan"):
        ops.ess_log_mean(zeros, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ess_log_mean_is_what_resample_says(backend):
    for n in (1, 33, 2000, 20000):
        log_weights, u = (on(backend, x) for x in random_case(n, 2.0, 0.2, n))
        r = ops.resample(log_weights, u, backend=backend)
        assert ops.ess_log_mean(log_weights, backend=backend) == (r.ess.item(), r.log_mean.item())
