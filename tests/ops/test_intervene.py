"""intervene: every backend gives what the reference gives, row by row, and touches no other row."""

import numpy as np
import pytest
import torch
from backends import BACKENDS, slow, to

from fastsmc import ops, reference

#: of the change, in units of what x is rounded to; sums are float32
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def make_maps(ranks, width, source_width, seed=0):
    """offsets, down, up, shift of slots with these ranks."""
    g = torch.Generator().manual_seed(seed)
    n = sum(ranks)
    down, up = (torch.randn(n, w, generator=g) / w**0.5 for w in (source_width, width))
    return torch.tensor([0, *np.cumsum(ranks)]), down, up, torch.randn(len(ranks), width, generator=g)


def run(backend, x, slots, maps, source=None, finite=None):
    """(x after the op, finite after it)."""
    x, finite = to(backend, x.clone()), None if finite is None else to(backend, finite.clone())
    moved = [to(backend, t) for t in (slots, *maps)]
    source = None if source is None else to(backend, source)
    ops.intervene(x, *moved, source=source, finite=finite, backend=backend)
    return x.cpu(), None if finite is None else finite.cpu()


def expected(x, slots, maps, source=None):
    out = x.double().numpy()
    reference.intervene(
        out, slots.numpy(), *(m.numpy() for m in maps), source=None if source is None else source.double().numpy()
    )
    return torch.from_numpy(out)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, dtype):
    """Ranks of 0, 1 and more in one batch; runs of one slot shorter and longer than a block of rows; width 1."""
    for n, width, source_width, ranks in (
        (37, 96, None, [1, 0, 3, 40]),
        (5, 33, 70, [2, 1]),
        (3, 1, None, [1]),
        (0, 8, None, [1]),
        (*((6, 576, 1536) if slow(backend) else (300, 576, 1536)), [4, 0, 64]),
    ):
        g = torch.Generator().manual_seed(n)
        x = torch.randn(n, width, generator=g).to(dtype)
        source = None if source_width is None else torch.randn(n, source_width, generator=g).to(dtype)
        slots = torch.randint(-1, len(ranks), (n,), generator=g)
        slots[n // 2 :] = len(ranks) - 1  # a long run
        maps = make_maps(ranks, width, source_width or width)
        got, _ = run(backend, x, slots, maps, source)
        want = expected(x, slots, maps, source)
        error = (got.double() - want).abs() / (1 + want.abs()) if n else torch.zeros(1)
        assert error.max() <= 4 * ROUNDING[dtype]
        assert torch.equal(got[slots == -1], x[slots == -1])  # bit for bit


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_hang_on_its_neighbours(backend):
    maps, x = make_maps([3, 1], 64, 64), torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    slots = torch.tensor([0, 0, 1, -1] * 5)
    whole, _ = run(backend, x, slots, maps)
    for r in (0, 2, 3, 17):
        alone, _ = run(backend, x[r : r + 1], slots[r : r + 1], maps)
        if backend == "torch":  # a product of other sizes
            torch.testing.assert_close(alone[0], whole[r], rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(alone[0], whole[r])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_a_shift_of_zero(backend):
    wide = torch.randn(6, 40)
    x, maps = wide[:, 3:19], make_maps([0], 16, 16)
    maps[-1].zero_()
    storage = to(backend, wide.clone())
    view = storage[:, 3:19]
    ops.intervene(view, *(to(backend, t) for t in (torch.zeros(6, dtype=torch.int64), *maps)), backend=backend)
    assert torch.equal(storage.cpu(), wide)  # Steer(scale=0) changes no bit
    maps[-1].fill_(2.0)
    ops.intervene(view, *(to(backend, t) for t in (torch.zeros(6, dtype=torch.int64), *maps)), backend=backend)
    assert torch.equal(storage.cpu()[:, 3:19], x + 2.0) and torch.equal(storage.cpu()[:, 19:], wide[:, 19:])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_says_which_slot_is_not_finite(backend, value):
    x, maps = torch.zeros(4, 32), make_maps([0, 0, 0], 32, 32)
    x[2, 7] = x[3, 7] = value
    slots = torch.tensor([0, 1, 2, -1])
    _, finite = run(backend, x, slots, maps, finite=torch.tensor([True, False, True]))
    assert finite.tolist() == [True, False, False]


def test_overflow_of_a_narrow_type_is_not_finite():
    maps = make_maps([0], 8, 8)
    maps[-1].fill_(1e5)
    for backend in BACKENDS:
        _, finite = run(
            backend, torch.zeros(1, 8, dtype=torch.float16), torch.zeros(1).long(), maps, None, torch.ones(1).bool()
        )
        assert finite.tolist() == [False]


def test_refuses():
    offsets, down, up, shift = make_maps([1, 2], 8, 8)
    x, slots = torch.zeros(3, 8), torch.tensor([0, 1, -1])
    fine = dict(x=x, slots=slots, offsets=offsets, down=down, up=up, shift=shift)
    ops.intervene(**fine)
    for changes, message in (
        ({"x": x.double()}, "x: must be a matrix of"),
        ({"x": torch.zeros(8, 3).T}, "x: column stride 3 must be 1"),
        ({"slots": torch.tensor([0, 2, -1])}, r"slots\[1\]=2: must be in \[-1, 2\)"),
        ({"slots": slots[:2]}, "slots: must have 3 elements"),
        ({"offsets": torch.tensor([0, 2])}, r"offsets\[1\]=2: must ascend from 0 to 3"),
        ({"offsets": torch.tensor([0, 3])}, "offsets: has 2 elements for 2 rows of shift"),
        ({"down": down[:, :5]}, r"down: must be a contiguous float32 matrix \(3, 8\)"),
        ({"up": up[:2]}, r"up: must be a contiguous float32 matrix \(3, 8\)"),
        ({"shift": shift.half()}, r"shift: must be a contiguous float32 matrix \(2, 8\)"),
        ({"source": torch.zeros(3, 8).half()}, "source: must have the 3 rows, the dtype torch.float32"),
        ({"source": torch.zeros(3, 5)}, r"down: must be a contiguous float32 matrix \(3, 5\)"),
        ({"finite": torch.ones(3).bool()}, "finite: must have 2 elements"),
        ({"backend": "cuda"}, "backend='cuda': must be one of 'cpu', 'torch', 'triton'"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.intervene(**(fine | changes))


def test_compiles():
    maps, slots = make_maps([2, 0], 16, 16), torch.tensor([0, 1, -1, 0])

    def twice(x):
        y = x * 1.0
        ops.intervene(y, slots, *maps)
        return y * 2.0

    x = torch.randn(4, 16)
    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(x), twice(x))
