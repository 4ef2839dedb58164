"""How often a step of `Group` waits for its device, counted on CPU tensors.

On a GPU a step waits wherever a number, or a shape that depends on values, goes back to Python. On the CPU a dispatch
mode sees the same calls. Those within the ops, the model and the potential are not the group's and not counted; but
`ops.ess_log_mean` returns numbers, which is a wait.
"""

import contextlib

import pytest
import torch
from tiny import PROMPT, TableRows, TableTwist, TinyLlama, make_llama, value_table
from torch.utils._python_dispatch import TorchDispatchMode

import fastsmc.group
from fastsmc import Potential, SMCParams
from fastsmc.group import Group
from fastsmc.potentials import Rows

VOCAB, STEPS, N = 6, 6, 32
WAITS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select",
    "_unique2", "unique_dim", "unique_consecutive",
}  # fmt: skip


class Count(TorchDispatchMode):
    """Counts calls that wait for the device, among them indexing by a mask."""

    def __init__(self):
        super().__init__()
        self.waits, self.paused = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        else:
            waits = name in WAITS
        self.waits += waits and not self.paused
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def pause(self):
        before, self.paused = self.paused, True
        yield
        self.paused = before


class Uncounted:
    """An object whose methods' waits are not counted."""

    def __init__(self, of, count):
        self._of, self._count = of, count

    def __getattr__(self, name):
        value = getattr(self._of, name)
        if not callable(value) or isinstance(value, type):
            return value

        def call(*args, **kw):
            self._count.waits += name == "ess_log_mean"
            with self._count.pause():
                return value(*args, **kw)

        return call


class SharedTwist(TableTwist):
    """Its rows repeat, so the group has indices to check."""

    def logw_next(self, state):
        return Rows((self.share * self.value[state.step])[None], torch.zeros_like(state.lengths))


class Prefix(TableTwist):
    logw_next = Potential.logw_next


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([VOCAB - 1]))


@pytest.mark.parametrize(
    "kind, proposal, threshold, most",
    [
        (TableTwist, "twisted", 0.0, 5),
        (TableTwist, "twisted", 1.0, 6),
        (SharedTwist, "twisted", 1.0, 7),
        (TableTwist, "base", 1.0, 7),
        (Prefix, "base", 0.0, 6),
        (Prefix, "base", 1.0, 7),
        (None, "base", 1.0, 5),
    ],
)
def test_a_step_waits_at_most(kind, proposal, threshold, most, tiny, monkeypatch):
    count = Count()
    monkeypatch.setattr(fastsmc.group, "ops", Uncounted(fastsmc.group.ops, count))
    ask = Group._ask

    def uncounted_ask(self, *args):
        with count.pause():
            return ask(self, *args)

    monkeypatch.setattr(Group, "_ask", uncounted_ask)
    params = SMCParams(n_particles=N, max_tokens=STEPS, ess_threshold=threshold, proposal=proposal, ignore_eos=True)
    potential = None if kind is None else kind(value_table(STEPS, VOCAB, seed=4).clip(min=-2.0))
    group = Group(params, Uncounted(TableRows(tiny, N), count), potential, PROMPT)
    waits = []
    with count:
        while not group.done:
            before = count.waits
            group.step()
            waits.append(count.waits - before)
    assert sum(group._resampled) == (STEPS - 1 if threshold and kind else 0)
    assert all(waits[1:-1]) and max(waits[:-1]) <= most, waits
    assert waits[-1] <= most + 3, waits  # particles end, and φ is asked
