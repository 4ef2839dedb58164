"""Groups whose tensors are not on the host: nothing is mixed up, and how often the host waits for the device."""

from collections import Counter
from itertools import islice, pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from elsewhere import DEVICE, Elsewhere, Watch
from test_potentials import EOS, V, tokenizer  # noqa: F401
from tiny import TableTwist, value_table

from fastsmc import Potential, SMCParams
from fastsmc.ops import plan_attend
from fastsmc.potentials import Grammar, Infill, Lexicon, Regex, Rows, TextPotential
from fastsmc.smc import Group, GroupEngine, arrange, finish
from fastsmc.smc.driving import take_step
from fastsmc.smc.paging import BlockTables, Paging
from fastsmc.vllm.passes import Member, Pass

HIDDEN, STEPS = 3, 6


class LastToken:
    """A `RowModel` whose logits and hidden states depend on the last token."""

    def __init__(self, n, device):
        random = torch.Generator().manual_seed(0)
        self.logits = torch.randn(V, V, generator=random).to(device)
        self.hidden = torch.randn(V, HIDDEN, generator=random).to(device)

    def first(self):
        return self.logits[:1], self.hidden[:1]

    def next(self, tokens, slots):
        return self.logits[tokens], self.hidden[tokens]

    def reindex(self, ancestors):
        assert ancestors.device == self.logits.device

    def continuation_log_prob(self, tokens, slots, continuation, p0, before, given=0):
        scores = (self.logits.double() / p0.temperature).log_softmax(1)
        later = sum(float(scores[a, b]) for a, b in [*pairwise(continuation)][max(given - 1, 0) :])
        return later + scores[tokens, continuation[0]] * (given == 0)


class ByHidden(Potential):
    """A twist from the hidden states, as a learned one: one row of values a distinct history."""

    def setup(self, engine):
        self.weight = torch.linspace(-1, 1, HIDDEN * V, device=engine.device).view(HIDDEN, V)

    def logw_next(self, state):
        return Rows(state.hidden_rows @ self.weight, state.rows.clamp(min=0))

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64, device=state.finished.device)

    def complete(self, state):
        return state.lengths.double() / 3


POTENTIALS = {
    "none": lambda: None,
    "lexicon": lambda: Lexicon(token_ids=[1, 2], weight=0.5),
    "regex": lambda: Regex("(ab|b|a )*c"),
    "grammar": lambda: Grammar('root ::= ("ab" | "b" | "a ")* "c"'),
    "text": lambda: TextPotential(lambda texts: [0.3 * len(text) for text in texts], every_step=True),
    "infill": lambda: Infill([1, 2]),
    "infill every step": lambda: Infill([1, 2], every_step=True),
    "hidden": ByHidden,
    "table": lambda: TableTwist(value_table(STEPS, V)),
    "product": lambda: Regex("(ab|b|a )*c") * Lexicon(token_ids=[1, 2], weight=0.5),
    "product of masks": lambda: Regex("(ab|b|a )*c") * Grammar('root ::= [ab ]* "bc"'),
}


@torch.inference_mode()
def run(tokenizer, name, params, device, watch=None):  # noqa: F811
    engine = GroupEngine(tokenizer, device, V, HIDDEN)
    potential = POTENTIALS[name]()
    if potential is not None:
        potential.setup(engine)
    waits, stop = [], set() if params.ignore_eos else {EOS}
    group, model = Group(params, potential, [1], stop, device, engine), LastToken(params.n_particles, device)
    assert isinstance(group.log_w, Elsewhere) == (device == DEVICE)
    while not group.done:
        before = len(watch.waits) if watch else 0
        take_step(group, model)
        waits.append(Counter(watch.waits[before:]) if watch else None)
    return group.population(), waits


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("name", POTENTIALS)
def test_same_population_as_on_the_host(tokenizer, name, proposal):  # noqa: F811
    for threshold, scheme in ((0.0, "systematic"), (0.5, "residual"), (1.0, "ssp")):
        params = SMCParams(
            n_particles=7, max_tokens=STEPS, ess_threshold=threshold, resampling=scheme, proposal=proposal, seed=3
        )
        want, _ = run(tokenizer, name, params, "cpu")
        with Watch() as watch:
            got, _ = run(tokenizer, name, params, DEVICE, watch)
        assert got.token_ids == want.token_ids
        np.testing.assert_array_equal(got.ancestors, want.ancestors)
        np.testing.assert_allclose(got.log_weights, want.log_weights, rtol=1e-6, atol=1e-6)  # products in float32
        np.testing.assert_allclose(got.log_z, want.log_z, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
@pytest.mark.parametrize("n_groups", [1, 5])
@pytest.mark.parametrize(
    ("name", "proposal"),
    [("none", "base"), ("lexicon", "base"), ("lexicon", "twisted"), ("hidden", "base"), ("hidden", "twisted")],
)
def test_a_step_waits_for_the_device_twice(tokenizer, name, proposal, n_groups):  # noqa: F811
    """Whatever the number of groups: to hear who has ended, and who goes on with how many histories."""
    waits = []
    with Watch() as watch:
        engine, potential, model = GroupEngine(tokenizer, DEVICE, V, HIDDEN), POTENTIALS[name](), LastToken(7, DEVICE)
        if potential is not None:
            potential.setup(engine)
        groups = []
        for seed in range(n_groups):
            params = SMCParams(
                n_particles=7, max_tokens=STEPS + seed % 2, ess_threshold=0.5 + seed / 10, proposal=proposal, seed=seed,
                temperature=1.0 + seed,
            )  # fmt: skip
            groups.append(Group(params, potential, [1], {EOS}, DEVICE, engine))
            groups[-1].progress = [] if seed % 2 == 0 else None  # which is read with the rest
        while going := [group for group in groups if not group.done]:
            cohorts, before = arrange(going), len(watch.waits)
            for cohort in cohorts:
                wants = cohort.wants()
                finish(cohort.take(*model.next(wants.tokens, wants.slots)))
            waits.append(Counter(watch.waits[before:]))
    assert len(waits) >= STEPS
    assert max(sum(step.values()) for step in waits) == 2, waits
    assert all(len(group.progress) == group.t for group in groups[::2])


class PagedTokens(LastToken):
    """A `PagedCalls` whose logits are those of `LastToken`, and whose rows share reads where they can."""

    block_size, max_logits_rows, why_not = 2, 100, None

    def __init__(self, n, device, max_tokens):
        super().__init__(n, device)
        self.device, self.max_tokens, self.attend, self.parts = device, max_tokens, self, []

    def may_pay(self, n_rows, length):
        return True

    def plan(self, table, known, lengths, offsets):
        return plan_attend(table, lengths, block_size=2, offsets=offsets, known_shared=known, backend="triton")

    def pays(self, plan, length, group):
        return group > 0

    def forward(self, batch):
        self.parts.append(len(batch.tokens))
        return super().next(batch.tokens, None)

    def reindex(self, table, ancestors, position):
        if table.shape[1]:
            table.copy_(table[ancestors])


@torch.inference_mode()
def test_a_pass_waits_for_nothing_however_it_is_cut(tokenizer):  # noqa: F811
    """Its groups' steps wait twice, and each is what it is in a pass that is whole; the parts are as large as told."""
    pytest.importorskip("triton")
    populations, n_parts = {}, {}
    for max_tokens in (100, 5, 1):
        with Watch() as watch:
            engine, model = GroupEngine(tokenizer, DEVICE, V, HIDDEN), PagedTokens(7, DEVICE, max_tokens)
            tables, members, blocks = BlockTables(DEVICE), [], iter(range(1, 10_000))
            for seed in range(3):
                params = SMCParams(n_particles=7, max_tokens=STEPS, ess_threshold=1.0, seed=seed, ignore_eos=True)
                potential = POTENTIALS["hidden"]()
                potential.setup(engine)
                group = Group(params, potential, [1], set(), DEVICE, engine)
                paging = Paging(7, 1, [0], 2, STEPS, 0, DEVICE)
                members.append(
                    Member(
                        group, paging, tables.add(paging), SimpleNamespace(prompt=[1], prompt_blocks=[0], adapter=None)
                    )
                )
            while going := [member for member in members if not member.group.done]:
                for member in going:
                    if member.paging.must_open:
                        member.paging.grant(list(islice(blocks, 7)))
                        member.paging.open_columns()
                before, n_before = len(watch.waits), len(model.parts)
                part = Pass(model, tables, going)
                part.run()
                sizes = model.parts[n_before:]
                assert len(sizes) == -(-part.n_rows // max_tokens) and max(sizes) <= max(max_tokens, 2)
                part.take()
                assert len(watch.waits) - before <= 2, watch.waits[before:]
            populations[max_tokens] = [member.group.population() for member in members]
            n_parts[max_tokens] = len(model.parts)
    assert n_parts[100] == STEPS and n_parts[1] > n_parts[5] > 2 * STEPS
    for max_tokens in (5, 1):
        for got, want in zip(populations[max_tokens], populations[100], strict=True):
            assert got.token_ids == want.token_ids and got.log_z == want.log_z


def test_the_device_is_one():
    """The tests above can fail."""
    with Watch() as watch:
        with pytest.raises(RuntimeError, match="both sides"):
            torch.zeros(3, device=DEVICE) + torch.ones(3)
        x = torch.arange(3, device=DEVICE)
        assert not watch.waits
        assert int(x.sum()) == 3 and x.tolist() == [0, 1, 2] and len(x[x > 1]) == 1 and x.cpu().device.type == "cpu"
        assert len(torch.nonzero(x)) == 2 and len(torch.unique(x)) == 3
        assert len(watch.waits) == 6
