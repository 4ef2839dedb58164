"""Counterfactuals in vLLM: their law against Coupling over Hugging Face with hooks, and where nothing is changed
nothing changes, whatever runs beside."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, VOCAB, hooked_log_probs
from scipy.stats import chisquare
from tiny import PROMPT, TableTwist, hf_log_probs, make_llama, value_table

from fastsmc import SMCParams
from fastsmc.hf import HFEngine
from fastsmc.interventions import Prompt, Steer, Temperature
from fastsmc.reference import Coupling

from .test_attend import prompt_of, runner_of

STEPS, TEXT, STEER = 3, [3, 1, 6], EACH["steer"]
LONG = [int(v) for v in torch.randint(1, VOCAB, (40,), generator=torch.Generator().manual_seed(1))]
TOLERANCE = 5e-4


@pytest.fixture(scope="module")
def hf(tiny_path):
    return HFEngine(tiny_path, stop_token_ids=[])


@pytest.fixture(scope="module")
def tables(tiny_path):
    """prefix → (V,) log-probs of the next token, of the model as it is and under STEER."""
    sequences = [list(s) for s in itertools.product(range(VOCAB), repeat=STEPS)]
    out = []
    for parts in ([], [STEER]):
        found = dict(zip(map(tuple, sequences), hooked_log_probs(tiny_path, PROMPT, sequences, parts), strict=True))
        out.append(
            {
                prefix: np.array([found[(*prefix, v, *[0] * (STEPS - t - 1))][t] for v in range(VOCAB)])
                for t in range(STEPS)
                for prefix in itertools.product(range(VOCAB), repeat=t)
            }
        )
    return out


@pytest.fixture(scope="module")
def law(tables):
    """sequence → probability that it is the counterfactual of TEXT, and the stay of each token."""
    p, q = tables
    paths, stay = {(): 1.0}, []
    for t, k in enumerate(TEXT):
        grown = {}
        for prefix, probability in paths.items():
            coupling = Coupling(q[prefix], p[tuple(TEXT[:t])], k)
            grown |= {(*prefix, v): probability * x for v, x in enumerate(np.exp(coupling.log_law()))}
            if list(prefix) == TEXT[:t]:
                stay.append(coupling.stay)
        paths = grown
    return paths, stay


@pytest.mark.parametrize("noise", ["exact", "gumbel"])
def test_the_law(engine, tiny_path, tables, law, all_blocks_back, noise):
    exact, stay = law
    params = SMCParams(n_particles=1000, max_tokens=STEPS, ignore_eos=True, seed=7)
    parts = engine.counterfactual([PROMPT] * 8, [TEXT] * 8, STEER, params=params, noise=noise)
    assert len({str(part.token_ids) for part in parts}) == 8  # each by numbers of its own
    counts, n = Counter(), 8 * params.n_particles
    for found in parts:
        assert found.factual_ids == TEXT and found.prompt_token_ids == PROMPT
        assert np.abs(np.exp(found.log_kernel) - [exact[tuple(s)] for s in found.token_ids]).max() < TOLERANCE
        assert np.abs(found.stay - stay).max() < TOLERANCE
        assert np.abs(found.factual_log_probs - hf_log_probs(tiny_path, PROMPT, [TEXT])[0]).max() < TOLERANCE
        want = [[tables[1][tuple(s[:t])][v] for t, v in enumerate(s)] for s in found.token_ids]
        assert np.abs(found.token_log_probs - want).max() < TOLERANCE
        counts.update(map(tuple, found.token_ids))
    common = [s for s in exact if exact[s] * n >= 5]
    seen = np.array([counts[s] for s in common] + [n - sum(counts[s] for s in common)])
    expected = np.array([exact[s] for s in common] + [1 - sum(exact[s] for s in common)]) * n
    assert chisquare(seen, expected).pvalue > 1e-4
    kept = np.mean([(found.common_prefix[:, None] > np.arange(STEPS)).mean(0) for found in parts], 0)
    assert (np.abs(kept - parts[0].survival) < 5 * np.sqrt(0.25 / n)).all()


def test_nothing_changes_where_nothing_is_changed(engine, all_blocks_back):
    """With certainty: texts over blocks' ends, beside others that do change, with every setting of p0."""
    prompts = [prompt_of(n, n) for n in (1, 5, 32, 40, 64, 70)]
    settings = [{}, {"temperature": 0.7}, {"top_k": 5, "top_p": 0.9}, {"min_p": 0.01}, {"logit_bias": {2: 1.5}}]
    for more in settings:
        params = SMCParams(n_particles=20, max_tokens=len(LONG), ignore_eos=True, **more)
        texts = engine.smc(prompts, SMCParams(n_particles=1, max_tokens=len(LONG), ignore_eos=True, **more))
        texts = [population.token_ids[0] for population in texts]
        changes = [None, [Steer(0, STEER.vector, 0.0)], [STEER], [Steer(1, STEER.vector, 0.0, "prompt")], [], [STEER]]
        for noise in ("exact", "gumbel"):
            found = engine.counterfactual(prompts, texts, changes, params=params, noise=noise)
            for i in (0, 1, 3, 4):
                assert found[i].token_ids == [texts[i]] * 20 and (found[i].stay == 1.0).all()
                assert not found[i].log_kernel.any() and found[i].expected_common_prefix == len(LONG)
            assert (found[2].stay < 1).any() and (found[5].common_prefix < len(LONG)).any()


def test_as_by_hugging_face(engine, hf, tiny_path, all_blocks_back):
    """The stay of each token and both models' log-probs, under every kind of intervention side by side; beyond a text's
    end and where it is longer than what is asked for."""
    lists = list(LISTS.values())
    prompts = [prompt_of(n, i) for i, n in zip(range(len(lists)), itertools.cycle((5, 32, 40, 70)))]
    texts = [LONG[: 10 + 3 * i] for i in range(len(lists))]
    params = SMCParams(n_particles=4, max_tokens=20, ignore_eos=True, seed=2)
    found = engine.counterfactual(prompts, texts, lists, params=params)
    for each, prompt, text, parts in zip(found, prompts, texts, lists, strict=True):
        want = hf.counterfactual(prompt, text, parts, params=params)
        assert np.abs(each.stay - want.stay).max() < TOLERANCE
        assert np.abs(each.factual_log_probs - want.factual_log_probs).max() < TOLERANCE
        assert each.tokens.shape == (20, 4) and len(each.stay) == len(text)
        for i, log_probs in enumerate(hooked_log_probs(tiny_path, prompt, each.token_ids, parts)):
            assert np.abs(each.token_log_probs[i] - log_probs).max() < TOLERANCE
            beyond = max(len(text), int(each.common_prefix[i]))
            assert np.abs(each.token_log_kernels[i][beyond:] - log_probs[beyond:]).max(initial=0.0) < TOLERANCE


@pytest.mark.parametrize(("proposal", "scheme"), [("twisted", "systematic"), ("base", "ssp")])
def test_estimates_are_unbiased(engine, law, all_blocks_back, proposal, scheme):
    value = value_table(STEPS, VOCAB, seed=4)
    potential = TableTwist(np.where(np.isinf(value), -1.0, value))
    log_z = math.log(sum(p * math.exp(potential.log_phi(s)) for s, p in law[0].items()))
    params = SMCParams(
        n_particles=6, max_tokens=STEPS, ess_threshold=0.9, proposal=proposal, resampling=scheme, ignore_eos=True
    )
    found = engine.counterfactual([PROMPT] * 200, [TEXT] * 200, STEER, params=params, potential=potential)
    ratios = np.exp([each.log_z - log_z for each in found])
    assert abs(ratios.mean() - 1.0) < 4.5 * ratios.std(ddof=1) / math.sqrt(len(ratios))


def test_facts(engine, process_engine, hf, tiny_path, tmp_path, all_blocks_back):
    """What one engine says of a text another takes; so does this one, for another prompt."""
    params = SMCParams(temperature=0.9, allowed_token_ids=[1, 3, 6, 7])
    made = [each.facts(PROMPT, TEXT, params) for each in (engine, process_engine, hf)]
    for facts in made:
        assert facts.token_ids == tuple(TEXT) and facts.p0 == params.p0()
        assert (facts.logits - made[2].logits).abs().max() < TOLERANCE
    other = HFEngine(make_llama(tmp_path / "other", VOCAB, seed=9), stop_token_ids=[])
    theirs = other.facts(PROMPT, LONG)
    want = hf.counterfactual(theirs, None, STEER, n=5)
    for each in (engine, process_engine):
        found = each.counterfactual([theirs, theirs], None, STEER, n=5, ignore_eos=True)
        for one in found:
            assert one.factual_ids == LONG and np.abs(one.stay - want.stay).max() < TOLERANCE
            assert np.abs(one.factual_log_probs - want.factual_log_probs).max() < TOLERANCE
    prompt = prompt_of(50, 3)
    want = hf.counterfactual(PROMPT, LONG, [Prompt(prompt), Temperature(0.8), STEER], n=3)
    found = engine.counterfactual(PROMPT, LONG, [Prompt(prompt), Temperature(0.8), STEER], n=3, ignore_eos=True)
    assert found.prompt_token_ids == prompt and found.params.temperature == 0.8
    assert np.abs(found.stay - want.stay).max() < TOLERANCE
    assert not runner_of(engine).facts and not runner_of(engine).kept_logits
