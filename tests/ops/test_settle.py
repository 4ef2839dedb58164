"""settle: every distinct history has one slot, those that stay are not copied; equal to the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsmc import ops, reference

BACKENDS = ("cpu", "torch", *(("gpu",) if torch.cuda.is_available() else ()))


def settle(backend, slots, tokens, wanted, offsets):
    arrays = [np.array(x, np.int64) for x in (slots, tokens, offsets)]
    arrays.insert(2, np.array(wanted, bool))
    tensors = [torch.from_numpy(x).to("cuda" if backend == "gpu" else "cpu") for x in arrays]
    done = ops.settle(*tensors, backend=None if backend == "gpu" else backend)
    return ops.Histories(*(x.cpu().numpy() for x in done)), reference.settle(*arrays)


@st.composite
def cases(draw):
    """Groups of 0 to 9 particles, also of one token, one slot, none wanted; tokens up to the largest, or junk."""
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=5))
    slots, tokens, wanted = [], [], []
    for n in sizes:
        slots += draw(st.lists(st.integers(0, max(n - 1, 0)), min_size=n, max_size=n))
        chosen = st.sampled_from(draw(st.sampled_from([(0,), (0, 1, 2), (3, 2**32 - 2, 49_151)])))
        wish = st.sampled_from(draw(st.sampled_from([(True,), (False,), (True, False)])))
        wants = draw(st.lists(wish, min_size=n, max_size=n))
        tokens += [draw(chosen) if w else draw(st.sampled_from([-1, 0, 2**40])) for w in wants]
        wanted += wants
    return slots, tokens, wanted, [0, *np.cumsum(sizes).tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_equals_the_reference(backend, case):
    got, want = settle(backend, *case)
    for name in want._fields:
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_what_it_promises(case):
    """Of the result alone: slots within groups, one per history, in-place copies of the right parent, rows in order."""
    slots, tokens, wanted, offsets = case
    got, _ = settle("cpu", *case)
    begin_of = np.repeat(offsets[:-1], np.diff(offsets))
    new = got.slots + begin_of
    histories = {}
    for i, want in enumerate(wanted):
        if not want:
            assert got.slots[i] == slots[i] and got.rows[i] == -1
            continue
        key = (begin_of[i], slots[i], tokens[i])
        assert histories.setdefault(key, new[i]) == new[i]  # one slot per history
        assert got.present[new[i]] and got.tokens[new[i]] == tokens[i]
        assert got.ancestors[new[i]] == slots[i] + begin_of[i]
        assert got.copied[new[i]] == (new[i] != slots[i] + begin_of[i])
        assert got.rows[i] == got.present[: new[i]].sum()
    assert len(set(histories.values())) == len(histories) == got.present.sum()
    assert (got.ancestors[got.ancestors] == got.ancestors).all()
    kept = {key[:2] for key in histories}
    assert got.copied.sum() == len(histories) - len(kept)  # no more copies than must be


def test_refuses():
    fine = [torch.tensor([0, 1, 0]), torch.tensor([5, 5, 6]), torch.ones(3, dtype=torch.bool), torch.tensor([0, 2, 3])]
    ops.settle(*fine)
    for at, value, message in (
        (0, torch.tensor([0, 2, 0]), r"slots\[1\]=2: must be a slot of its group"),
        (0, torch.tensor([0, 1, -1]), r"slots\[2\]=-1"),
        (1, torch.tensor([5, 5]), "tokens: must have 3 elements"),
        (2, torch.ones(3), "wanted: must be a vector of torch.bool"),
        (3, torch.tensor([0, 2]), r"offsets\[1\]=2: must ascend from 0 to 3"),
    ):
        arguments = [*fine]
        arguments[at] = value
        with pytest.raises(ValueError, match=message):
            ops.settle(*arguments)
