"""uniforms against the published Philox vectors and the reference; counters, range and distribution."""

import numpy as np
import pytest
import torch
from scipy import stats

from fastsmc import ops, reference

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
BACKENDS = ("cpu", "torch", pytest.param("cuda", marks=needs_cuda))
KEYS = [
    {"seed": 0, "group": 0, "step": 0, "stream": 0},
    {"seed": 1, "group": 0, "step": 0, "stream": 0},
    {"seed": 2**64 - 1, "group": 2**32 - 1, "step": 2**32 - 1, "stream": 2**32 - 1},
    {"seed": 2**63 + 12345, "group": 7, "step": 123456, "stream": 3},
]


def test_philox_known_answers():
    """Vectors of the Random123 distribution (kat_vectors)."""
    ones = 2**32 - 1
    assert reference.philox4x32_10((0,) * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert reference.philox4x32_10((ones,) * 4, (ones,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert reference.philox4x32_10((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def uniforms(n, *, backend, **key):
    return ops.uniforms(n, **key, device="cuda" if backend == "cuda" else "cpu", backend=backend).cpu()


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_number_of_the_zero_key(backend):
    u = uniforms(1, **KEYS[0], backend=backend)
    assert u.item() == ((0x6627E8D5 << 21) | (0xE169C58D >> 11)) / 2**53


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", KEYS)
def test_equals_reference(key, backend):
    u = uniforms(100, **key, backend=backend).numpy()
    assert u.dtype == np.float64
    np.testing.assert_array_equal(u, reference.uniforms(100, **key))


@pytest.mark.parametrize("backend", BACKENDS)
def test_number_depends_on_its_particle_only(backend):
    long = uniforms(1000, **KEYS[3], backend=backend)
    assert (long[:10] == uniforms(10, **KEYS[3], backend=backend)).all()
    assert uniforms(0, **KEYS[3], backend=backend).shape == (0,)


def test_every_part_of_the_key_matters():
    base = ops.uniforms(64, **KEYS[3], device="cpu")
    for name in KEYS[3]:
        other = ops.uniforms(64, **{**KEYS[3], name: KEYS[3][name] + 1}, device="cpu")
        assert not (base == other).any(), name
    high = ops.uniforms(64, **{**KEYS[3], "seed": KEYS[3]["seed"] ^ 1 << 40}, device="cpu")
    assert not (base == high).any()


def test_uniform_in_the_unit_interval():
    u = ops.uniforms(1_000_000, seed=5, group=1, step=2, stream=0, device="cpu").numpy()
    assert u.min() >= 0 and u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4e-3
    assert (u * 2**53 % 2).mean() == pytest.approx(0.5, abs=2e-3)  # the last of the 53 bits is alive


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_as_a_tensor(backend):
    """Read when the numbers are made: another value, other numbers."""
    device = "cuda" if backend == "cuda" else "cpu"
    step = torch.tensor(0, device=device)
    for value in (0, 7, 2**32 - 1):
        step.fill_(value)
        got = ops.uniforms(50, **{**KEYS[3], "step": step}, device=device, backend=backend).cpu()
        np.testing.assert_array_equal(got, reference.uniforms(50, **{**KEYS[3], "step": value}))


#: two groups without particles at the start, some between, one at the end; seeds as 64 bits, signed
SIZES = [0, 0, 1, 300, 0, 7, 64, 0]
OFFSETS = torch.tensor([0, *np.cumsum(SIZES)])


def keys_of_groups():
    """(seed, group, step) of SIZES, the seeds in [0, 2^64); the last two differ in the step only."""
    rng = np.random.default_rng(4)
    seeds = [0, 2**64 - 1, *rng.integers(0, 2**64 - 1, 4, dtype=np.uint64).tolist(), 2**63, 2**63]
    return seeds, [0, 2**32 - 1, 5, 6, 7, 8, 9, 9], [0, 2**32 - 1, 3, 3, 4, 0, 1, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_are_as_if_alone(backend):
    seeds, groups, steps = keys_of_groups()
    device = "cuda" if backend == "cuda" else "cpu"
    signed = [s - 2**64 if s >= 2**63 else s for s in seeds]
    vectors = dict(zip(("seed", "group", "step", "offsets"), (signed, groups, steps, OFFSETS), strict=True))
    u = uniforms(
        sum(SIZES), **{k: torch.as_tensor(v, device=device) for k, v in vectors.items()}, stream=2, backend=backend
    )
    np.testing.assert_array_equal(u, reference.uniforms(sum(SIZES), **vectors, stream=2))
    for n, seed, group, step, at in zip(SIZES, seeds, groups, steps, u.split(SIZES), strict=True):
        assert torch.equal(at, uniforms(n, seed=seed, group=group, step=step, stream=2, backend=backend))
    none = torch.zeros(0, dtype=torch.int64, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    assert uniforms(0, seed=none, group=none, step=none, offsets=offsets, stream=0, backend=backend).shape == (0,)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offsets": torch.tensor([0, 2, 1, 4])}, r"offsets\[2\]=1: must ascend from 0 to 4"),
        ({"offsets": torch.tensor([0, 2, 5, 4])}, r"offsets\[2\]=5: must ascend"),
        ({"offsets": torch.tensor([1, 2, 3, 4])}, r"offsets\[0\]=1: must ascend"),
        ({"offsets": torch.tensor([0, 2, 3, 3])}, r"offsets\[3\]=3: must ascend"),
        ({"offsets": torch.tensor([], dtype=torch.int64)}, "offsets: is empty"),
        ({"offsets": torch.tensor([0.0, 4.0])}, "offsets: must be a vector of torch.int64"),
        ({"seed": 3}, "seed: must be a vector of torch.int64, got 3"),
        ({"seed": torch.zeros(4).long()}, "seed: must have 3 elements, got 4"),
        ({"group": torch.tensor([0, 0, -1])}, r"group\[2\]=-1: must be in \[0, 4294967296\)"),
        ({"step": torch.tensor([0, 2**32, 0])}, r"step\[1\]=4294967296"),
        ({"stream": 2**32}, "stream=4294967296"),
        ({"offsets": None}, "step: must be an integer or a 0-dim int64 tensor"),
        ({"offsets": None, "step": 0}, "seed: is a tensor, must be an integer in .* where there are no offsets"),
    ],
)
def test_refuses_groups(change, message):
    good = {name: torch.zeros(3, dtype=torch.int64) for name in ("seed", "group", "step")}
    with pytest.raises(ValueError, match=message):
        ops.uniforms(4, **good | {"offsets": torch.tensor([0, 2, 2, 4]), "stream": 0} | change, device="cpu")


@pytest.mark.parametrize(
    "step, message",
    [
        (torch.tensor(-1), "step=-1"),
        (torch.tensor([3]), "step: must be an integer or a 0-dim int64 tensor"),
        (torch.tensor(3.0), "step: must be an integer or a 0-dim int64 tensor, got torch.float32"),
    ],
)
def test_refuses_a_step_tensor(step, message):
    with pytest.raises(ValueError, match=message):
        ops.uniforms(4, **{**KEYS[0], "step": step}, device="cpu")


def test_is_a_torch_op():
    of_groups = [torch.tensor(x) for x in ([-1, 2], [3, 4], [5, 6], [0, 20, 20])]
    for step, of_tensors in ((3, [None] * 4), (0, [None, None, torch.tensor(3), None]), (0, of_groups)):
        arguments = (20, -5, 1, step, 2, *of_tensors, torch.device("cpu"), "cpu")
        torch.library.opcheck(torch.ops.fastsmc.uniforms.default, arguments)


def test_compiles_in_one_graph():
    def draw(step):
        return ops.uniforms(30, seed=2**64 - 3, group=1, step=step + 1, stream=0, device=step.device) * 2

    def draw_groups(step):
        key = {"seed": step - 2, "group": step, "step": step, "offsets": OFFSETS}
        return ops.uniforms(sum(SIZES), **key, stream=0, device=step.device) * 2

    for function, shape in ((draw, ()), (draw_groups, len(SIZES))):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for t in (0, 5):
            step = torch.full((shape,) if shape else (), t)
            assert torch.equal(compiled(step), function(step))


@needs_cuda
def test_replays_do_not_repeat_numbers():
    """A captured graph that counts its own steps, without a wait for the device."""
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    ops.uniforms(1000, **{**KEYS[3], "step": step}, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step += 1
            u = ops.uniforms(1000, **{**KEYS[3], "step": step}, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.zero_()
    for t in (1, 2, 3):
        graph.replay()
        np.testing.assert_array_equal(u.cpu(), reference.uniforms(1000, **{**KEYS[3], "step": t}))


@pytest.mark.parametrize(
    "name, value", [("seed", -1), ("seed", 2**64), ("group", 2**32), ("step", -1), ("stream", 2**32)]
)
def test_refuses_out_of_range(name, value):
    with pytest.raises(ValueError, match=rf"{name}={value}"):
        ops.uniforms(4, **{**KEYS[0], name: value}, device="cpu")


def test_refuses_unknown_backend():
    with pytest.raises(ValueError, match="backend='gpu'"):
        ops.uniforms(4, **KEYS[0], device="cpu", backend="gpu")
