"""`Condition` through `LLM.smc`: it travels, E[Ẑ] = Z by enumeration, and what fails or is refused ends alone."""

import math

import numpy as np
import pytest
from tiny import PROMPT, TinyLlama

from fastsmc import SMCParams
from fastsmc.potentials import Condition, Lexicon
from fastsmc.smc import SMCError

from .conftest import VOCAB

STEPS, STOP = 3, 5
PARAMS = SMCParams(n_particles=9, max_tokens=STEPS, proposal="rejection", stop_token_ids=[STOP], seed=5)


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))


def begins(rows):
    """Even tokens, at most one of them 0."""
    return [all(v % 2 == 0 for v in ids) and ids.count(0) < 2 for ids in rows]


def log_phi(sequence):
    return 0.0 if begins([[v for v in sequence if v != STOP]])[0] else -math.inf


@pytest.mark.parametrize("beside", [False, True])
def test_unbiased_in_the_engine(engine, tiny, all_blocks_back, beside):
    condition = Condition(begins, on="tokens")
    potential = condition * Lexicon(token_ids=[2], weight=0.7) if beside else condition
    populations = engine.smc([PROMPT] * 100, PARAMS, potential)
    value = (lambda s: log_phi(s) + 0.7 * s.count(2)) if beside else log_phi
    z_hat, z = np.exp([p.log_z for p in populations]), math.exp(tiny.log_z(value))
    assert abs(z_hat.mean() - z) <= 4 * z_hat.std(ddof=1) / 10
    for population in populations:
        assert population.questions["asked"] <= 1 + 9 * STEPS * (VOCAB + 1) and not population.biased
        for ids, weight in zip(population.token_ids, population.weights, strict=True):
            assert weight == 0 or log_phi(tuple(ids)) == 0


def test_a_condition_that_fails_ends_its_group_alone(engine, all_blocks_back):
    def broken(rows):
        return [len(ids) < 2 or 1 // 0 for ids in rows]

    with pytest.raises(SMCError, match="Condition.allows at step 1: .*condition 'broken' raised Zero") as error:
        engine.smc([PROMPT] * 2, PARAMS, [Condition(broken, on="tokens"), Condition(begins, on="tokens")])
    failed, other = error.value.populations
    assert failed is None and other.questions["calls"] > 0


def test_refused_before_anything_runs(engine):
    for potential, more, message in [
        (None, {}, "proposal='rejection': there is no potential"),
        (Lexicon(token_ids=[2]), {}, "Lexicon is asked for no tokens"),
        (Condition(begins, on="tokens"), {"exact": [[2, STOP]]}, "exact: proposal='rejection' takes no exact samples"),
        (Condition(begins), {}, "Condition: this engine has no tokenizer"),
    ]:
        with pytest.raises((ValueError, SMCError), match=message):
            engine.smc(PROMPT, PARAMS, potential, **more)
    with pytest.raises(ValueError, match="counterfactuals are not drawn by it"):
        engine.counterfactual(PROMPT, [2, 4], params=PARAMS, potential=Condition(begins, on="tokens"))
