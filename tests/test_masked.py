"""`Masked` answers of `logw_next` are as dense ones with −inf, bit by bit, whatever a group does with them."""

import math

import numpy as np
import pytest
import torch

from fastsmc import Masked, Potential, Rows, SMCParams
from fastsmc.potentials import Product
from fastsmc.smc import Group, SMCError
from fastsmc.smc.driving import run_group, take_step

VOCAB, STEPS, M, PROMPT = 70, 5, 9, [1]  # words of 32 bits do not fit
STOP = frozenset([3, 41])


class MarkovRows:
    """A `RowModel` whose next token depends on the step and the last token."""

    def __init__(self):
        table = torch.randn(STEPS, VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
        table[:, :, 5::7] = -math.inf  # the model allows less than the masks
        self.table, self.t = table, 0

    def first(self):
        return self.table[0, :1], None

    def next(self, tokens, slots):
        self.t += 1
        return self.table[self.t][tokens], None

    def reindex(self, ancestors):
        pass


def random_bits(seed, share):
    """(M, 3) int32 and the same as bool (M, V); bits behind V are set at random; row 0 allows nothing."""
    rng = np.random.default_rng(seed)
    allowed = rng.random((M, 96)) < share
    allowed[0, :VOCAB] = False
    bits = np.packbits(allowed, axis=1, bitorder="little").view("<i4")
    return torch.tensor(bits), torch.tensor(allowed[:, :VOCAB])


class Constraint(Potential):
    """Of the next token: masked by the last one, and weighed by it. How it answers is `form`: 'masked' or 'dense', and
    for the values 'none', 'rows' or 'tensor'."""

    def __init__(self, form, values="none", seed=0, share=0.6, guide=False):
        self.form, self.kind, self.proposal_only = form, values, guide
        self.bits, self.allowed = random_bits(seed, share)
        self.values = torch.randn(M, VOCAB, generator=torch.Generator().manual_seed(seed + 1))
        self.asked = 0

    def _rows(self, tokens):
        """Row 0, which allows nothing, is only that of token 30."""
        return torch.where(tokens == 30, 0, 1 + tokens.clamp(min=0) % (M - 1))

    def complete(self, state):
        self.asked += 1
        rows, out = self._rows(torch.full_like(state.lengths, PROMPT[0])), torch.zeros(len(state.lengths))
        for token in state.tokens.T:
            known = token.clamp(min=0)
            change = torch.where(self.allowed[rows, known], self._of(rows, known), -math.inf)
            out = out + torch.where(token >= 0, change, 0.0)
            rows = self._rows(known)
        return out.double()

    def _of(self, rows, tokens):
        return torch.zeros(len(rows)) if self.kind == "none" else self.values[rows, tokens]

    def logw_next(self, state):
        last = torch.full_like(state.lengths, PROMPT[0]) if state.last_tokens is None else state.last_tokens
        rows = self._rows(last)
        values = {"none": None, "rows": Rows(self.values, rows), "tensor": self.values[rows]}[self.kind]
        if self.form == "masked":
            return Masked(self.bits, rows, values)
        dense = torch.zeros(len(rows), VOCAB) if values is None else self.values[rows]
        return dense.masked_fill(~self.allowed[rows], -math.inf)


class WithPrefix(Constraint):
    def prefix(self, state):
        return self.complete(state)


def run(potential, exact=None, **params):
    params = SMCParams(n_particles=40 if exact is None else 12, max_tokens=STEPS, **params)
    return run_group(Group(params, potential, PROMPT, STOP, exact=exact), MarkovRows())


def assert_equal(a, b):
    for name in ("tokens", "ancestors", "resampled", "log_weights", "log_probs", "ess", "step_log_weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert a.log_z == b.log_z and math.isfinite(a.log_z) and a.token_ids == b.token_ids


@pytest.mark.parametrize("values", ["none", "rows", "tensor"])
@pytest.mark.parametrize("drive", ["twisted", "base, weighed by next", "base, prefix", "guided", "conditional"])
def test_equals_dense(drive, values):
    """In every order of a step; with particles that have no next token left."""
    kind, options, exact = Constraint, {"proposal": drive.split(",")[0]}, None
    guide = drive == "guided"
    if drive == "base, prefix":
        kind = WithPrefix
    elif guide:
        options = {}
    elif drive == "conditional":
        options = {"resampling": "multinomial"}
    for seed in range(3):
        options |= {"seed": seed, "ess_threshold": (1.0, 0.6, 0.0)[seed]}
        if drive == "conditional":
            probe = run(Constraint("dense", values), **options)
            exact = [probe.token_ids[int(np.argmax(probe.weights))]]
        a, b = (run(kind(form, values, guide=guide), exact, **options) for form in ("masked", "dense"))
        assert_equal(a, b)
        if exact is not None:
            assert exact[0] in a.token_ids
    assert len(set(a.log_weights.tolist())) > 1


def test_a_product_keeps_masks_packed_and_equals_dense():
    def factors(form):
        first, second = Constraint(form, share=0.8), Constraint(form, "rows", seed=5, share=0.8)
        plain, more = Constraint("dense", "tensor", seed=9, share=1.0), Constraint(form, "tensor", seed=7, share=0.8)
        return [
            first * second,
            first * plain,
            plain * first,
            Product(first, Product(second, more)),
            Product(Product(plain, first), plain, second),
        ]

    for masked, dense in zip(factors("masked"), factors("dense"), strict=True):
        seen = []

        def spied(state, logw_next=masked.logw_next, seen=seen):
            seen.append(logw_next(state))
            return seen[-1]

        masked.logw_next = spied
        a, b = run(masked), run(dense)
        for name in ("tokens", "ancestors", "resampled"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
        np.testing.assert_allclose(a.log_weights, b.log_weights, atol=1e-5)  # sums of float32 in another order
        assert a.log_z == pytest.approx(b.log_z, abs=1e-5)
        del masked.logw_next
    group = Group(SMCParams(n_particles=4, max_tokens=STEPS), factors("masked")[0], PROMPT, STOP)
    take_step(group, MarkovRows())
    answer = group.asker.potential.logw_next(group.cohort._state(group.cohort._asked[0]))
    assert isinstance(answer, Masked) and answer.bits.shape[1] == 3 and isinstance(answer.values, Rows)
    assert answer.bits.dtype == torch.int32 and len(answer.bits) <= 4


def test_nothing_allowed_is_no_weight():
    class Nothing(Constraint):
        def logw_next(self, state):
            return Masked(torch.zeros(1, 3, dtype=torch.int32), torch.zeros_like(state.lengths))

    population = run(Nothing("masked"))
    assert population.log_z == -math.inf and population.T == 1


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            dict(bits=torch.zeros(M, 2, dtype=torch.int32)),
            r"bits \(9, 2\) torch.int32 on cpu; must be \(M, 3\) torch.int32",
        ),
        (dict(bits=torch.zeros(M, 3)), r"bits \(9, 3\) torch.float32 on cpu; must be \(M, 3\) torch.int32"),
        (dict(bits=None), "bits NoneType"),
        (
            dict(index=torch.zeros(3, dtype=torch.int64)),
            r"Masked with index \(3,\) torch.int64 on cpu; must be \(40,\) torch.int64",
        ),
        (dict(index=torch.zeros(40)), r"Masked with index \(40,\) torch.float32"),
        (dict(index=torch.full((40,), M)), r"index\[0\]=9; must be in \[0, 9\), the rows of bits"),
        (dict(index=torch.full((40,), -1)), r"index\[0\]=-1; must be in \[0, 9\), the rows of bits"),
        (
            dict(values=torch.zeros(40, 3)),
            r"returned \(40, 3\) torch.float32 on cpu; must be floating-point \(40, 70\)",
        ),
        (dict(values=torch.zeros(40, VOCAB, dtype=torch.int64)), "int64 on cpu; must be floating-point"),
        (
            dict(values=Rows(torch.zeros(2, VOCAB), torch.full((40,), 2))),
            r"index\[0\]=2; must be in \[0, 2\), the rows of values",
        ),
        (dict(values=Masked(torch.zeros(1), torch.zeros(1))), "Masked with values Masked; must be"),
    ],
)
def test_what_it_must_be_is_said(change, message, proposal):
    class Wrong(Constraint):
        def logw_next(self, state):
            return super().logw_next(state)._replace(**change)

    with pytest.raises(SMCError, match=f"potential Wrong.logw_next at step 0: .*{message}"):
        run(Wrong("masked"), proposal=proposal)
