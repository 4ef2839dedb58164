"""`Judge` and the log-probs of `State` over Hugging Face: by full recompute, and E[Ẑ] by enumeration."""

import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TinyLlama, hf_log_probs, make_llama

from fastsmc import Potential, SMCError, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.potentials import Judge

VOCAB, STEPS, STOP = 6, 3, 5
QUESTION, YES, NO = [4, 0, 2], [4], [0, 1]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB, scale=0.3)


def judged(path, sequences, temperature=1.0):
    """log φ of sequences, by a full recompute of each with each answer."""
    found = []
    for answer in (YES, NO):
        scores = hf_log_probs(path, PROMPT, [[*ids, *QUESTION, *answer] for ids in sequences], temperature)
        found.append([each[-len(answer) :].sum() for each in scores])
    return np.array(found[0]) - np.logaddexp(*found)


@pytest.mark.parametrize("every_step", [False, True])
def test_judge_is_a_full_recompute(path, every_step):
    engine = HFEngine(path, stop_token_ids=[STOP])
    params = SMCParams(n_particles=40, max_tokens=4, ess_threshold=0.0, temperature=0.8, seed=2)
    population = engine.smc(PROMPT, params, Judge(QUESTION, YES, NO, every_step))
    assert len({len(ids) for ids in population.token_ids}) > 1
    want = judged(path, population.token_ids, 0.8)
    np.testing.assert_allclose(population.log_weights, want, atol=5e-5)
    assert np.ptp(want) > 0.1 and (want < 0).all()
    if every_step:
        going = [i for i in range(40) if len(population.token_ids[i]) > 1]
        want = judged(path, [population.token_ids[i][:1] for i in going], 0.8)
        np.testing.assert_allclose(population.step_log_weights[0, going], want, atol=5e-5)


def test_the_question_may_be_ruled_out(path):
    """p0's settings hold for what is scored, and that is the answers."""
    engine = HFEngine(path, stop_token_ids=[STOP])
    params = SMCParams(n_particles=6, max_tokens=2, ess_threshold=0.0, allowed_token_ids=[1, 3], seed=2)
    population = engine.smc(PROMPT, params, Judge(QUESTION, [1], [3]))
    scores = np.array(
        [[each[-1] for each in hf_log_probs(path, PROMPT, [[*ids, *QUESTION, v] for ids in population.token_ids])]
         for v in (1, 3)]
    )  # fmt: skip
    np.testing.assert_allclose(population.log_weights, scores[0] - np.logaddexp(*scores), atol=5e-5)
    with pytest.raises(SMCError, match="Judge.complete at step 2: particle 0 got nan"):
        engine.smc(PROMPT, params, Judge(QUESTION, [2], [4]))


@pytest.mark.parametrize("every_step", [False, True])
def test_unbiased(path, every_step):
    """E[Ẑ] = Z by enumeration."""
    tiny = TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))
    log_phi = dict(zip(tiny.sequences, judged(path, [list(s) for s in tiny.sequences]), strict=True))
    truth, engine = tiny.log_z(log_phi.get), HFEngine(path, stop_token_ids=[STOP])
    params = SMCParams(n_particles=4, max_tokens=STEPS, ess_threshold=1.0)
    populations = engine.smc([PROMPT] * 100, params, Judge(QUESTION, YES, NO, every_step))
    z = np.exp([population.log_z - truth for population in populations])
    assert abs(z.mean() - 1) <= 4 * z.std(ddof=1) / math.sqrt(len(z))


class Sure(Potential):
    """Weighs by the model's own log-probs, and checks them against its tokens."""

    seen = 0

    def __init__(self, path, per_particle=None):
        self.path = path

    def prefix(self, state):
        return 0.3 * state.log_prob

    def complete(self, state):
        assert state.log_prob.dtype == state.token_log_probs.dtype == torch.float64
        assert state.token_log_probs.shape == state.tokens.shape
        torch.testing.assert_close(state.token_log_probs.sum(1), state.log_prob)
        assert bool((state.token_log_probs[state.tokens < 0] == 0).all())
        for ids, got in zip(state.tokens.tolist(), state.token_log_probs.tolist(), strict=True):
            ids = [v for v in ids if v >= 0]
            np.testing.assert_allclose(got[: len(ids)], hf_log_probs(self.path, PROMPT, [ids])[0], atol=5e-5)
        Sure.seen += 1
        state.token_log_probs.zero_()  # it is the potential's own to write to
        state.log_prob.zero_()
        return state.log_prob * 0.6


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_what_the_model_thought(path, threshold):
    """`State.log_prob` and `token_log_probs` follow ancestors; E[p0^0.6] from both."""
    Sure.seen, engine = 0, HFEngine(path, stop_token_ids=[STOP])
    params = SMCParams(n_particles=12, max_tokens=STEPS + 2, ess_threshold=threshold, resampling="multinomial")
    population = engine.smc(PROMPT, params, Sure(path))
    assert Sure.seen > 0 and population.resampled.any() == (threshold == 1.0)
    if threshold == 0.0:
        np.testing.assert_allclose(population.log_weights, 0.6 * population.log_probs, atol=1e-9)
    total = population.token_log_probs.sum(1)
    np.testing.assert_allclose(total, population.log_probs)
