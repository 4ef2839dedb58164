"""Groups in cohorts: whatever stands beside a group, whenever it comes and goes, it has the bits that it has alone."""

import importlib.util
import itertools
import math
import random
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from tiny import PROMPT, Guide, TableRows, TableTwist, TinyLlama, make_llama, value_table

from fastsmc import Potential, SMCParams
from fastsmc.potentials import Condition, Final, Lexicon
from fastsmc.smc import Group, GroupEngine, SMCError, arrange, finish
from fastsmc.smc.driving import run_group

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = value_table(STEPS, VOCAB, seed=4)


class NextOnly(TableTwist):
    """Unfinished sequences are weighed by logw_next alone."""

    prefix = Potential.prefix


class NotShaping(TableTwist):
    """Does not shape the first draw, which it only says when it is asked."""

    def logw_next(self, state):
        return None


class LooksLate(NotShaping):
    """As that, and looks at no token before a particle ends."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


class Fails(TableTwist):
    def complete(self, state):
        raise KeyError("no such sequence")


class Remembers(TableTwist):
    """Remembers what φ has of each particle so far; groups of one object are asked together."""

    per_particle = ("_sum",)
    sizes: ClassVar[list[int]] = []

    def reset(self, n_particles, prompt):
        self._sum = None  # until it is first asked

    def reindex(self, ancestors):
        self._sum = None if self._sum is None else self._sum[ancestors]

    def logw_next(self, state):
        self.sizes.append(len(state.finished))
        if self._sum is None:
            self._sum = torch.zeros(len(state.finished), dtype=torch.float64)
        elif state.step > 0:
            drawn = self.value[state.step - 1][state.last_tokens.clamp(min=0)]
            self._sum = self._sum + torch.where(state.last_tokens >= 0, drawn, 0.0)
        return super().logw_next(state) + 0.3 * self._sum[:, None]


class FailsTogether(Remembers):
    per_particle = Remembers.per_particle

    def logw_next(self, state):
        if state.step == 2:
            raise KeyError("no such sequence")
        return super().logw_next(state)


class SaysNothingNew(Remembers):
    """Has more per particle than what its base class names, and does not say so: it is asked group by group."""

    def reset(self, n_particles, prompt):
        super().reset(n_particles, prompt)
        self._n = torch.zeros(n_particles)

    def logw_next(self, state):
        self._n += 1  # of another size than the particles of several groups
        return super().logw_next(state) + 0.0 * self._n[:, None]


LEXICON = Lexicon(token_ids=[1, 4], weight=0.5)
LEXICON.setup(GroupEngine(vocab_size=VOCAB))
KINDS = {
    "none": None,
    "twist": TableTwist(VALUE),
    "guide": Guide(VALUE),
    "next only": NextOnly(VALUE),
    "not shaping": NotShaping(VALUE),
    "looks late": LooksLate(VALUE),
    "fails": Fails(VALUE),
    "remembers": Remembers(VALUE),
    "fails together": FailsTogether(VALUE),
    "says nothing new": SaysNothingNew(VALUE),
    "lexicon": LEXICON,
    "product": Remembers(VALUE) * LEXICON,
    "final": Final(Remembers(VALUE)),
    "condition": Condition(lambda rows: [ids[-1:] != [1] for ids in rows], on="tokens", max_asked=4),
    "condition twisted": Condition(lambda rows: [ids[-1:] != [3] for ids in rows], on="tokens") * TableTwist(VALUE),
    "condition fails": Condition(lambda rows: [len(ids) < 2 or 1 // ids[-1] >= 0 for ids in rows], on="tokens"),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def random_request(rng):
    kind = rng.choice(list(KINDS))
    exact = [[0, 1, 0, 1]] if kind in ("twist", "guide") and rng.random() < 0.3 else None
    params = SMCParams(
        n_particles=rng.choice([1, 2, 5, 17]), max_tokens=STEPS if exact else rng.choice([3, STEPS]),
        ess_threshold=rng.choice([0.0, 0.6, 1.0]), resampling=rng.choice(["systematic", "ssp"]),
        seed=rng.randint(0, 99), resample_every=rng.choice([1, 1, 2]),
        resampling_temperature=rng.choice([1, 1, 1.5, "entropic"]),
        proposal="base" if kind != "guide" and rng.random() < 0.4 else
        "rejection" if kind.startswith("condition") else "twisted", temperature=rng.choice([1.0, 0.7]),
    )  # fmt: skip
    return params, KINDS[kind], exact


def same(a, b):
    for name in (
        "token_ids", "tokens", "ancestors", "resampled", "ess", "step_log_weights", "log_weights", "token_log_probs"
    ):  # fmt: skip
        np.testing.assert_array_equal(*(np.array(getattr(p, name), dtype=object if name == "token_ids" else None)
                                        for p in (a, b)), err_msg=name)  # fmt: skip
    assert a.log_z == b.log_z


def take_pass(groups, rows):
    """One pass for groups that are ready; `rows` has each group's model. Returns how many cohorts there were."""
    cohorts = arrange(groups)
    for cohort in cohorts:
        wants, parts = cohort.wants(), []
        again = cohort.wants()  # says the same, and leaves nothing to copy but what is copied already
        torch.testing.assert_close(again.slots, wants.slots, rtol=0, atol=0)
        torch.testing.assert_close(again.tokens, wants.tokens, rtol=0, atol=0)
        for g, group in enumerate(cohort.groups):
            first, part = cohort.layout.bounds[g], slice(wants.bounds[g], wants.bounds[g + 1])
            if wants.moves is not None:
                rows[group].reindex(wants.moves[cohort.layout.part(g)] - first)
            if group.t == 0:
                parts.append(rows[group].first()[0])
            else:
                parts.append(rows[group].next(wants.tokens[part], wants.slots[part] - first)[0])
            assert len(parts[-1]) == part.stop - part.start
        finish(cohort.take(torch.cat(parts), None), None)
    return len(cohorts)


@pytest.mark.parametrize("seed", range(6))
def test_a_group_has_the_bits_that_it_has_alone(tiny, seed):
    rng = random.Random(seed)
    for _ in range(12):
        requests = [random_request(rng) for _ in range(rng.randint(1, 7))]

        def make(request):
            params, potential, exact = request
            return Group(params, potential, PROMPT, tiny.stop, exact=exact)

        alone = []
        for request in requests:
            try:
                alone.append(run_group(make(request), TableRows(tiny, request[0].n_particles)))
            except SMCError as error:
                alone.append(str(error))
        groups = [make(request) for request in requests]
        rows = {group: TableRows(tiny, group.n) for group in groups}
        while going := [group for group in groups if not group.done]:
            ready = [group for group in going if rng.random() < 0.8]
            take_pass(ready, rows)
        for group, want in zip(groups, alone, strict=True):
            if isinstance(want, str):
                assert str(group.error) == want
            else:
                assert group.error is None
                same(group.population(), want)


def test_as_few_cohorts_as_kinds(tiny):
    groups = [
        Group(
            SMCParams(n_particles=3, max_tokens=STEPS, seed=i, temperature=0.5 + i, ess_threshold=0.2 * i),
            KINDS[kind],
            PROMPT,
            tiny.stop,
        )
        for i, kind in itertools.product(range(4), ("twist", "guide", "none"))
    ]
    rows = {group: TableRows(tiny, group.n) for group in groups}
    assert take_pass(groups, rows) == 3


@pytest.mark.parametrize("kind", ["remembers", "product", "says nothing new"])
def test_groups_of_one_object_are_asked_together(tiny, kind, monkeypatch):
    """Those at the same step, with as many tokens to come; the others apart."""
    sizes = []
    monkeypatch.setattr(Remembers, "sizes", sizes)
    groups = [
        Group(SMCParams(n_particles=n, max_tokens=steps, seed=n), KINDS[kind], PROMPT, frozenset())
        for n, steps in ((2, STEPS), (3, 3), (4, STEPS), (5, STEPS))
    ]
    rows = {group: TableRows(tiny, group.n) for group in groups}
    take_pass(groups[:2], rows)
    apart = kind == "says nothing new"
    assert sizes == [2, 3]
    sizes.clear()
    take_pass(groups, rows)  # one a step further than two others
    assert sorted(sizes) == ([2, 3, 4, 5] if apart else [2, 3, 9])
    sizes.clear()
    take_pass(groups[2:], rows)
    take_pass([groups[0], *groups[2:]], rows)
    assert sorted(sizes) == ([2, 4, 4, 5, 5] if apart else [9, 11])


def test_what_is_named_per_particle_has_an_entry_for_each(tiny):
    class Names(TableTwist):
        per_particle = ("_sum",)

        def reset(self, n_particles, prompt):
            if n_particles > 2:
                self._sum = torch.zeros(n_particles - 1)

    for n, what in ((2, "'missing'"), (3, r"\(2,\)")):
        params = SMCParams(n_particles=n, max_tokens=STEPS)
        with pytest.raises(
            SMCError, match=f"potential Names: per_particle names '_sum', which must .* {n} rows.*{what}"
        ):
            Group(params, Final(Names(VALUE)), PROMPT, frozenset())


def test_an_error_ends_all_that_were_asked_together(tiny):
    groups = [
        Group(SMCParams(n_particles=2, max_tokens=STEPS, seed=i), KINDS[kind], PROMPT, frozenset())
        for i, kind in enumerate(("fails together", "remembers", "fails together", "twist"))
    ]
    rows = {group: TableRows(tiny, group.n) for group in groups}
    while going := [group for group in groups if not group.done]:
        take_pass(going, rows)
    assert [group.error is None for group in groups] == [False, True, False, True]
    assert [group.t for group in groups] == [2, STEPS, 2, STEPS]
    assert "FailsTogether.logw_next at step 2: raised KeyError" in str(groups[2].error)


def test_the_first_of_a_run_may_have_ended_when_the_others_are_asked_to_stop(tiny):
    """The model gives NaN for one of two groups that are asked together; the other ends as it does alone."""

    class Stops(Remembers):
        per_particle = Remembers.per_particle

        def stop(self, state):
            return state.last_tokens == 3

    class NotANumber(TableRows):
        def next(self, tokens, slots):
            logits, hidden = super().next(tokens, slots)
            return logits * (math.nan if tokens.numel() and len(self.rows[int(slots[0])]) == 2 else 1.0), hidden

    potential = Stops(VALUE)
    params = [SMCParams(n_particles=17, max_tokens=STEPS, seed=i, ess_threshold=0.0) for i in range(2)]
    want = run_group(Group(params[1], potential, PROMPT, tiny.stop), TableRows(tiny, 17))
    broken, group = (Group(p, potential, PROMPT, tiny.stop) for p in params)
    rows = {broken: NotANumber(tiny, 17), group: TableRows(tiny, 17)}
    while going := [each for each in (broken, group) if not each.done]:
        take_pass(going, rows)
    assert "model at step 2" in str(broken.error)
    assert any(ids[-1] == 3 and len(ids) == 3 for ids in want.token_ids)  # of the step in which the other failed
    same(group.population(), want)


def test_the_example_over_a_model_of_ones_own():
    """examples/embedding.py: 60 lines, and the log Ẑ of its groups are those of plain sampling from the same model."""
    path = Path(__file__).parents[1] / "examples" / "embedding.py"
    assert len(path.read_text().splitlines()) <= 60
    spec = importlib.util.spec_from_file_location("embedding", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    populations = example.main()
    torch.manual_seed(0)
    model, n = example.Model(), 4000

    def start(rows):
        state = torch.zeros(rows, example.HIDDEN)
        for token in (1, 2, 3):
            state = model.cell(model.embed(torch.full((rows,), token)), state)
        return state

    with torch.inference_mode():
        for population in populations:  # what each particle's tokens have after the tokens before them
            tokens = torch.tensor([[*ids, *[-1] * (20 - len(ids))] for ids in population.token_ids])
            state, want = start(len(tokens)), torch.zeros(len(tokens), dtype=torch.float64)
            for token in tokens.T:
                scores = model.head(state).double().log_softmax(1).gather(1, token.clamp(min=0)[:, None])[:, 0]
                want += torch.where(token >= 0, scores, 0.0)
                state = model.cell(model.embed(token.clamp(min=0)), state)
            np.testing.assert_allclose(population.log_probs, want.numpy(), atol=1e-4)
        state = start(n)
        alive, repeats, last = torch.ones(n, dtype=torch.bool), torch.zeros(n), torch.full((n,), -1)
        for _ in range(20):
            token = torch.multinomial(model.head(state).softmax(1), 1)[:, 0]
            repeats += alive & (token == last)
            last = torch.where(alive, token, last)
            alive &= token != 0
            state = model.cell(model.embed(token), state)
    z = np.exp([population.log_z for population in populations])
    phi = torch.exp(-2 * repeats).numpy()
    error = np.hypot(phi.std() / np.sqrt(n), z.std(ddof=1) / np.sqrt(len(z)))
    assert abs(z.mean() - phi.mean()) < 4 * error
