"""What a group says while it runs: how each step went, and which tokens are final."""

import math

import numpy as np
import pytest
import torch
from test_device import LastToken
from test_potentials import V
from tiny import TableTwist, value_table

from fastsmc import Potential, SMCError, SMCParams
from fastsmc.smc import Group, arrange, finish
from fastsmc.smc.driving import take_step
from fastsmc.smc.group import choose
from fastsmc.smc.record import CommonTokens

STOP = 3


class Deadly(TableTwist):
    """Kills at the ends too: sequences whose last token is 1 have weight zero from their fourth token on."""

    def prefix(self, state):
        dead = (state.last_tokens == 1) & (state.step > 3) if state.step else torch.zeros_like(state.finished)
        return torch.where(dead, -math.inf, super().prefix(state))

    def complete(self, state):
        return torch.where(state.last_tokens == 2, -math.inf, super().complete(state))


def log_mean(log_w):
    return float(torch.logsumexp(torch.from_numpy(log_w), -1) - math.log(len(log_w)))


def check_progress(group):
    """Each entry is what the record has of that step; the histories that go on are counted from the record's tokens."""
    population, progress = group.population(), group.progress
    assert [p["step"] for p in progress] == list(range(1, group.t + 1))
    later = not group.kind.twisted  # a resampling then stands in the record at the step after it
    resampled = [*population.resampled[later:], *[False] * later][: group.t]
    for t, entry in enumerate(progress):
        assert entry["ess"] == population.ess[t] and entry["resampled"] == resampled[t]
        want = log_mean(population.step_log_weights[t])
        assert entry["log_z"] is None if want == -math.inf else abs(entry["log_z"] - want) < 1e-9
    assert progress[-1]["distinct"] == 0 and 0 <= progress[-1]["finished"] <= group.n
    assert all(1 <= p["distinct"] <= group.n - p["finished"] for p in progress[:-1])


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (9, 1, 30)])
def test_progress_is_what_the_record_has(proposal, sizes):
    """Side by side, groups that ask and one that does not; the bits of a population do not hang on it."""
    for potential in (None, TableTwist(2 * value_table(20, V)), Deadly(value_table(20, V))):
        groups, want = [], []
        for i, n in enumerate(sizes):
            params = SMCParams(n_particles=n, max_tokens=12 + i, ess_threshold=[0.5, 1.0, 0.8][i], proposal=proposal,
                               resampling="ssp", seed=i)  # fmt: skip
            groups.append(Group(params, potential, [0], {STOP}))
            if i != 1:
                groups[-1].progress = []
            want.append(Group(params, potential, [0], {STOP}))
            while not want[-1].done:
                take_step(want[-1], LastToken(n, "cpu"))
        model = LastToken(max(sizes), "cpu")
        while going := [group for group in groups if not group.done]:
            for cohort in arrange(going):
                wants = cohort.wants()
                finish(cohort.take(*model.next(wants.tokens, wants.slots)))
        for group, alone in zip(groups, want, strict=True):
            np.testing.assert_array_equal(group.population().log_weights, alone.population().log_weights)
            if group is not groups[1]:
                check_progress(group)
        assert groups[1].progress is None


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("every", [1, 3])
def test_common_tokens_are_those_of_all_that_may_be_drawn(proposal, every):
    """Looked at every step or every third, while a potential looks at the tokens too; by comparing all histories. What
    has come begins each particle with weight in the end, and an end's last token is kept back."""
    came, kept_back = 0, 0
    for seed in range(12):
        params = SMCParams(n_particles=[2, 8, 24][seed % 3], max_tokens=40, resampling="multinomial", seed=seed,
                           ess_threshold=[1.0, 0.5][seed % 2], proposal=proposal)  # fmt: skip
        potential = [Deadly(value_table(50, V)), TableTwist(2 * value_table(50, V))][seed // 2 % 2]
        group = Group(params, potential, [0], {STOP} if seed % 4 < 2 else set())
        common, model, sent = CommonTokens(group.lineages), LastToken(params.n_particles, "cpu"), []
        while not group.done:
            take_step(group, model)
            if group.t % every:
                continue
            particles = group.cohort.particles
            sent += common.more(group.log_w, particles.finished, particles.lengths)
            alive, tokens = group.log_w > -math.inf, group.lineages.tokens()
            if not alive.any():
                break
            rows = [[v for v in row if v >= 0] for row in tokens[alive].tolist()]
            ends = particles.finished[alive].tolist()
            may = min(len(row) - end for row, end in zip(rows, ends, strict=True))
            want = next((i for i in range(may) if len({row[i] for row in rows}) > 1), may)
            assert sent == rows[0][:want]
            kept_back += any(ends) and all(row[:may] == rows[0][:may] for row in rows)
        population = group.population()
        for i in np.flatnonzero(np.isfinite(population.log_weights)):
            assert population.token_ids[i][: len(sent)] == sent
        came += len(sent)
        assert len(common._events) < 2 * group.t or not sent  # what is shared is forgotten
    assert came > 50 and kept_back > 0


def test_common_tokens_where_particles_wait():
    """Steps at which all of a lineage waited have no token; what has come begins each particle with weight."""

    class Counts(Potential):
        def prefix(self, state):
            return -0.7 * (state.tokens == 2).sum(1).double()

    came = 0
    for seed in range(12):
        params = SMCParams(n_particles=3, max_tokens=40, resampling="multinomial", seed=seed, ess_threshold=1.0,
                           proposal="base", segment_token_ids=[1], max_segment_tokens=6)  # fmt: skip
        group = Group(params, Counts(), [0], {STOP} if seed % 2 else set())
        common, model, sent = CommonTokens(group.lineages), LastToken(3, "cpu"), []
        while not group.done:
            take_step(group, model)
            particles = group.cohort.particles
            sent += common.more(group.log_w, particles.finished, particles.lengths)
            for row, ended in zip(group.lineages.tokens().tolist(), particles.finished.tolist(), strict=True):
                tokens = [v for v in row if v >= 0]
                assert tokens[: len(sent)] == sent and len(sent) <= len(tokens) - ended
        came += len(sent)
        assert group.population().T > 40 or seed % 2
    assert came > 60


def test_samples_are_drawn_by_weight():
    """Independently, the first as when there is one only; by frequencies, to five standard deviations."""
    log_w = torch.tensor([0.0, -math.inf, 1.0, 2.0, -3.0], dtype=torch.float64)
    p, n = torch.softmax(log_w, 0).numpy(), 40_000
    for group in (0, 1):
        params = SMCParams(n_particles=5, seed=7, group=group)
        drawn = choose(log_w, params, n)
        assert choose(log_w, params) == drawn[:1] and choose(log_w, params, 3) == drawn[:3]
        counts = np.bincount(drawn, minlength=5)
        assert (np.abs(counts - n * p) <= 5 * np.sqrt(n * p * (1 - p))).all() and counts[1] == 0
        pairs = np.bincount(5 * np.array(drawn[::2]) + np.array(drawn[1::2]), minlength=25) / (n / 2)
        assert np.abs(pairs - np.outer(p, p).ravel()).max() < 5 * np.sqrt(0.25 / (n / 2))
    assert choose(torch.full((5,), -math.inf, dtype=torch.float64), params, 3) == []


def test_errors_say_through_whom():
    params = SMCParams(n_particles=4, max_tokens=4)
    with pytest.raises(SMCError) as refused:
        Group(params, None, [1], exact=[[1, 2]])
    assert refused.value.kind == "refused"

    class Raises(TableTwist):
        def prefix(self, state):
            raise ZeroDivisionError

    with pytest.raises(SMCError) as broken:
        Group(params, Raises(value_table(4, V)), [1])
    assert broken.value.kind == "potential"
    model = LastToken(4, "cpu")
    model.logits[:] = math.nan
    with pytest.raises(SMCError) as engine:
        take_step(Group(params, None, [1]), model)
    assert engine.value.kind == "engine"
