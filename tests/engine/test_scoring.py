"""`LLM.score`: continuations have the log p0 of Hugging Face, and the engine goes on as if nothing had been."""

import numpy as np
import pytest
from tiny import PROMPT, hf_log_probs
from vllm import SamplingParams

from fastsmc import Potential, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.potentials import Judge
from fastsmc.vllm import interchange
from fastsmc.vllm.model import Model

from .conftest import VOCAB
from .test_attend import prompt_of, runner_of

#: ragged, twice, without tokens, over block ends of 32
CONTINUATIONS = [prompt_of(n, 3 * n) for n in (1, 5, 40, 33, 0, 2, 64)] + [prompt_of(5, 15), [], prompt_of(40, 7)]


@pytest.mark.parametrize("length", [1, 5, 32, 33, 70])
def test_score_is_a_full_recompute(engine, process_engine, tiny_path, all_blocks_back, monkeypatch, length):
    """The prompt and each distinct continuation go through the model once; also in parts, and where prompts are cut."""
    prompt, queries, hidden = prompt_of(length), [], Model.hidden

    def record(self, batch):
        queries.append(len(batch.tokens))
        return hidden(self, batch)

    want = [hf_log_probs(tiny_path, prompt, [ids])[0] if ids else np.zeros(0) for ids in CONTINUATIONS]
    model = runner_of(engine)._model
    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", record)
        scored = [engine.score(prompt, CONTINUATIONS), process_engine.score(prompt, CONTINUATIONS)]
    distinct = {tuple(ids) for ids in CONTINUATIONS}
    assert queries == [length - 1] * (length > 1) + [sum(map(len, distinct))]
    with monkeypatch.context() as patch:  # few blocks, few queries in a pass, few rows of logits
        patch.setattr(interchange, "CACHE_BYTES", 6 * model.block_bytes)
        for name, value in (("max_tokens", 64), ("max_logits_rows", 7)):
            patch.setattr(model, name, value)
        scored.append(engine.score(prompt, CONTINUATIONS))
    for each in scored:
        assert each.token_ids == CONTINUATIONS
        for got, wanted in zip(each.token_log_probs, want, strict=True):
            np.testing.assert_allclose(got, wanted, atol=5e-5)


def test_settings_and_neighbours(engine, tiny_path, all_blocks_back):
    """p0's settings are those of Hugging Face's `score`; the prefix cache and a request in between keep their bits."""
    ordinary = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    before = engine.generate({"prompt_token_ids": prompt_of(70)}, ordinary, use_tqdm=False)[0].outputs[0].token_ids
    params = SMCParams(top_k=4, temperature=0.8, min_tokens=2, max_tokens=9, stop_token_ids=[3], logit_bias={1: 1.0})
    got, want = (each.score(PROMPT, CONTINUATIONS, params) for each in (engine, HFEngine(tiny_path)))
    for a, b in zip(got.token_log_probs, want.token_log_probs, strict=True):
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b))
        np.testing.assert_allclose(a[np.isfinite(a)], b[np.isfinite(b)], atol=5e-5)
    assert np.isneginf(got.log_probs).any()
    assert engine.score(PROMPT, []).log_probs.shape == (0,) and engine.score(PROMPT, [[]]).log_probs.tolist() == [0.0]
    after = engine.generate({"prompt_token_ids": prompt_of(70)}, ordinary, use_tqdm=False)[0].outputs[0].token_ids
    assert before == after
    population = engine.smc(PROMPT, SMCParams(n_particles=4, max_tokens=6))
    np.testing.assert_allclose(engine.score(PROMPT, population.token_ids).log_probs, population.log_probs, atol=5e-5)


@pytest.mark.parametrize("every_step", [False, True])
def test_judge(engine, tiny_path, all_blocks_back, every_step):
    """φ by a full recompute, over block ends; what the model thought is what it thinks of the tokens that are kept."""
    question, answers = prompt_of(33, 4), ([4], [0, 1])
    potential = Judge(question, *answers, every_step=every_step)
    params = SMCParams(n_particles=8, max_tokens=30, ess_threshold=0.0, stop_token_ids=[5], seed=4, temperature=0.8)
    prompt = prompt_of(20)
    population = engine.smc(prompt, params, potential)
    assert len({len(ids) for ids in population.token_ids}) > 1
    scores = np.array(
        [
            [
                each[-len(answer) :].sum()
                for each in hf_log_probs(tiny_path, prompt, [i + question + answer for i in population.token_ids], 0.8)
            ]
            for answer in answers
        ]
    )
    np.testing.assert_allclose(population.log_weights, scores[0] - np.logaddexp(*scores), atol=5e-4)


class Confident(Potential):
    """φ = p0^0.5, from the log-probs of the state."""

    per_particle = ()

    def complete(self, state):
        assert (state.token_log_probs.sum(1) - state.log_prob).abs().max() < 1e-9
        return 0.5 * state.log_prob


def test_what_the_model_thought(engine, all_blocks_back):
    """In two groups that are asked together, at each step at which particles end."""
    params = SMCParams(n_particles=8, max_tokens=20, ess_threshold=0.0, stop_token_ids=[5], temperature=0.8)
    potential = Confident()
    each = engine.smc([PROMPT, prompt_of(33)], params, potential)
    for population in each:
        np.testing.assert_allclose(population.log_weights, 0.5 * population.log_probs, atol=1e-6)


def test_refusals(engine, process_engine):
    with pytest.raises(ValueError, match=rf"continuations\[0\]\[0\]={VOCAB}: is beyond"):
        engine.score(PROMPT, [[VOCAB]])
    with pytest.raises(ValueError, match="509 tokens after a prompt of 5"):
        engine.score(PROMPT, [[1] * 509])
    with pytest.raises(ValueError, match="has 65 tokens; at most max_num_batched_tokens=64"):
        process_engine.score(PROMPT, [[1] * 65])
