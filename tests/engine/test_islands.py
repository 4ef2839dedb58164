"""Islands in the real engine: pools of groups, and islands of one group between which particles migrate."""

import dataclasses
import math

import numpy as np
import pytest
from test_migration import migrated
from tiny import PROMPT, TinyLlama

from fastsmc import Population, SMCParams

from .conftest import VOCAB
from .test_engine import prompt_of, same
from .test_segments import STOP, Counts, check_rows

PARAMS = SMCParams(n_particles=3, max_tokens=70, ess_threshold=0.5, resampling="multinomial", proposal="base", seed=3)


class Heavy(Counts):
    """ψ grows with the 2s, so that most weight is now and then on one island."""

    def prefix(self, state):
        return 1.5 * (state.tokens == 2).sum(1).double()


def test_islands_are_groups_that_are_pooled(engine, tiny_path, all_blocks_back):
    prompts = [prompt_of(31), PROMPT]
    found = engine.smc(prompts, dataclasses.replace(PARAMS, group=2), Counts(), islands=4, alone=True)
    for i, population in enumerate(found):
        each = [dataclasses.replace(PARAMS, group=2 + 4 * i + k) for k in range(4)]
        by_hand = Population.pool(engine.smc([prompts[i]] * 4, each, Counts(), alone=True))
        same(population, by_hand)
        assert population.n_islands == 4 and population.n_particles == 12
        check_rows(tiny_path, prompts[i], population)


@pytest.mark.parametrize(
    ("length", "way"), [(1, {}), (31, {}), (60, dict(segment_token_ids=[1], max_segment_tokens=5))]
)
def test_log_probs_equal_a_full_recompute(engine, tiny_path, all_blocks_back, length, way):
    """Islands are copied onto others over block boundaries, beside a group without islands; and as a plain request."""
    prompt, params = prompt_of(length), dataclasses.replace(PARAMS, **way)
    population = engine.smc(prompt, params, Heavy(), islands=4, migrate_every=2)
    assert population.n_particles == 12 and migrated(population).sum() > 2 and not migrated(population)[0]
    assert (migrated(population) <= population.resampled).all() and math.isnan(population.log_z_stderr)
    check_rows(tiny_path, prompt, population)
    each = [population.params, dataclasses.replace(PARAMS, n_particles=5)]
    beside, _ = engine.smc([prompt, PROMPT], each, Heavy())
    same(beside, population)
    name = engine.register_potential(Heavy())
    try:
        lead = engine.lead_params(population.params, name, return_population=True)
        [output] = engine.generate([{"prompt_token_ids": prompt}], lead)
    finally:
        engine.drop_potential(name)
    same(engine.population(output), population)


def test_unbiased_in_the_engine(engine, tiny_path, all_blocks_back):
    tiny = TinyLlama(tiny_path, VOCAB, 4, frozenset([STOP]))
    params = SMCParams(n_particles=2, max_tokens=4, ess_threshold=1.0, proposal="base", seed=2, stop_token_ids=[STOP])
    found = engine.smc([PROMPT] * 150, params, Heavy(), islands=4, migrate_every=1)
    assert sum(migrated(p).any() for p in found) > 20
    z = np.array([math.exp(p.log_z) for p in found])
    want = math.exp(tiny.log_z(lambda s: 1.5 * s.count(2)))
    assert abs(z.mean() - want) < 4 * z.std(ddof=1) / math.sqrt(len(z))


def test_islands_that_migrate_must_have_room(small_engine):
    """Those that do not are groups of their own, of which any number runs."""
    params = dataclasses.replace(PARAMS, n_particles=4, max_tokens=8)
    assert small_engine.smc(PROMPT, params, Counts(), islands=17).n_particles == 68
    with pytest.raises(
        ValueError, match="n_particles=68: at most max_num_seqs=64 of this engine; its islands=17 migrate"
    ):
        small_engine.smc(PROMPT, params, Counts(), islands=17, migrate_every=2)
