"""Counterfactuals in vLLM: their law against Coupling over Hugging Face with hooks, and where nothing is changed
nothing changes, whatever runs beside."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, VOCAB, H, hooked_log_probs, table_under
from scipy.stats import chisquare
from tiny import PROMPT, TableTwist, TinyLlama, hf_log_probs, make_llama, value_table
from vllm import SamplingParams

from fastsmc import Potential, SMCError, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.interventions import Affine, Prompt, Steer, Temperature
from fastsmc.maps import NOWHERE
from fastsmc.potentials import Infill
from fastsmc.reference import Coupling
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.capacity import Limits, check_fits
from fastsmc.vllm.pace import Pace

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
    return [table_under(tiny_path, PROMPT, parts, STEPS) for parts in ([], [STEER])]


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


def test_another_temperature(engine, hf, all_blocks_back):
    """It is the counterfactuals' alone, beside texts that keep theirs, by which top_p cuts their rows."""
    params = SMCParams(n_particles=6, max_tokens=20, ignore_eos=True, temperature=0.8, top_p=0.8)
    changes, prompt = [[Temperature(1.6)], [STEER], [Temperature(0.5), STEER]], prompt_of(40, 5)
    found = engine.counterfactual([prompt] * 3, None, changes, params=params)
    for each, change, temperature in zip(found, changes, (1.6, 0.8, 0.5), strict=True):
        want = hf.counterfactual(prompt, each.factual_ids, change, params=params)
        assert np.abs(each.stay - want.stay).max() < TOLERANCE and each.params.temperature == temperature
        assert np.abs(each.factual_log_probs - want.factual_log_probs).max() < TOLERANCE
    assert np.abs(found[0].stay - found[1].stay).max() > 0.1


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


# ------------------------------------------------------------------------------------------------ whatever runs beside
class Digits:
    """Gives the logits of each pass last digits of its own, as many kernels do for each size of a pass."""

    def __init__(self, engine, monkeypatch):
        kind = type(runner_of(engine)._model._model)
        compute, self.calls, self.sizes = kind.compute_logits, itertools.count(), set()

        def sized(model, hidden, *args, **kwargs):
            self.sizes.add(len(hidden))
            return compute(model, hidden, *args, **kwargs) * (1 + 1e-6 * (next(self.calls) % 7))

        monkeypatch.setattr(kind, "compute_logits", sized)


@pytest.mark.parametrize("attention", ["as it pays", "attend"])
def test_a_cut_parts_no_text_from_its_counterfactuals(
    engine, scheduler, tiny_path, all_blocks_back, monkeypatch, attention
):
    """Passes in chunks, in halves, and riding with ordinary requests, where each part has digits of its own."""
    prompts, params = [prompt_of(n, n) for n in (20, 32, 40, 33, 64)], SMCParams(n_particles=8, max_tokens=12)
    params = dataclasses.replace(params, ignore_eos=True)
    texts = [p.token_ids[0] for p in engine.smc(prompts, dataclasses.replace(params, n_particles=1))]
    changes = [None, [STEER], [], [Steer(0, STEER.vector, 0.0)], [STEER]]
    digits = Digits(engine, monkeypatch)
    if attention == "attend":
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)

    def check():
        found = engine.counterfactual(prompts, texts, changes, params=params)
        for i in (0, 2, 3):
            assert found[i].token_ids == [texts[i]] * 8 and (found[i].stay == 1.0).all()
        for i in (1, 4):
            assert (found[i].stay < 1).any()
            for ids, got in zip(found[i].token_ids, found[i].token_log_probs, strict=True):
                (want,) = hooked_log_probs(tiny_path, prompts[i], [ids], [STEER])
                assert np.abs(got - want).max() < TOLERANCE

    for size in (3, 4, 7):
        with monkeypatch.context() as patch:
            patch.setattr(runner_of(engine).model, "max_tokens", size)
            check()
    ordinary = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
    for i in range(2):
        engine.llm_engine.add_request(f"beside {i}", engine._prompt(prompt_of(30, i)), ordinary)
    for rows in (1, 4):
        monkeypatch.setattr(scheduler, "_pace", Pace(rows, scheduler._pace._logger))
        check()
    assert engine.llm_engine.has_unfinished_requests() and len(digits.sizes) > 4
    engine.llm_engine.abort_request(["beside 0", "beside 1"])


@pytest.mark.parametrize("max_tokens", [1024, 2048])
def test_as_many_particles_as_there_are_rows(engine, small_engine, all_blocks_back, monkeypatch, max_tokens):
    """The text has one row of the engine, though a pass may have two rows more than there are particles."""
    model, passes = runner_of(engine).model, []
    hidden = type(model).hidden
    monkeypatch.setattr(
        type(model), "hidden", lambda self, batch: passes.append(len(batch.lengths)) or hidden(self, batch)
    )
    monkeypatch.setattr(model, "max_tokens", max_tokens)
    uniform = Affine(1, torch.zeros(H, H), torch.zeros(H))
    params = SMCParams(n_particles=1023, max_tokens=70, ignore_eos=True)
    ordinary = SamplingParams(max_tokens=90, temperature=0.0, ignore_eos=True)
    alone = engine.counterfactual(PROMPT, 2 * LONG, uniform, params=params)
    assert len({tuple(ids[:68]) for ids in alone.token_ids}) == 1023
    assert max(map(sum, itertools.pairwise(passes))) >= 1025 and (max(passes) == 1025) == (max_tokens > 1024)
    (before,) = engine.generate([{"prompt_token_ids": PROMPT}], ordinary, use_tqdm=False)
    for i in range(3):
        engine.llm_engine.add_request(f"beside {i}", engine._prompt(PROMPT), ordinary)
    found = engine.counterfactual([PROMPT] * 2, [2 * LONG] * 2, [[uniform], [STEER]], params=params)
    assert found[0].token_ids == alone.token_ids and (found[1].stay < 1.0).any()
    outputs, engine._strays = list(engine._strays), []
    while engine.llm_engine.has_unfinished_requests():
        outputs += engine.llm_engine.step()
    tokens = [output.outputs[0].token_ids for output in outputs if output.finished]
    assert tokens == [before.outputs[0].token_ids] * 3
    message = "n_particles=64: counterfactuals need a row for their text, so at most 63 with max_num_seqs=64"
    for text in (LONG, None):
        with pytest.raises(ValueError, match=message):
            small_engine.counterfactual(PROMPT, text, STEER, max_tokens=2)
    # four particles that never resample have a column of 32 tokens each, a text of 40 tokens two per history
    params = SMCParams(n_particles=4, max_tokens=20, ess_threshold=0.0)
    for n_companions, blocks in ((0, 5), (1, 7), (2, 9)):
        check_fits(params, 5, 0, Limits(8, 64, blocks, 32, 512), NOWHERE, 40, n_companions)
        with pytest.raises(ValueError, match=f"needs {blocks} KV blocks"):
            check_fits(params, 5, 0, Limits(8, 64, blocks - 1, 32, 512), NOWHERE, 40, n_companions)


@pytest.mark.parametrize("pace", [None, 1, 5])
def test_aborted_and_begun_anew(engine, scheduler, all_blocks_back, monkeypatch, pace):
    """In the middle, of two groups of a prompt and an ordinary request; the others give what they give alone."""
    prompt, name = prompt_of(70), engine.register_intervention([STEER])
    params = SMCParams(n_particles=6, max_tokens=30, ignore_eos=True, seed=4)
    lead = engine.lead_params(params, intervention=name, counterfactual=LONG, return_population=True)
    ordinary = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    first, plain = engine.generate([{"prompt_token_ids": prompt}] * 2, [lead, ordinary], use_tqdm=False)
    want = engine.population(first)
    if pace:
        monkeypatch.setattr(scheduler, "_pace", Pace(pace, scheduler._pace._logger))
    for end, at in itertools.product(("abort", "anew"), (2, 9)):
        for i, each in enumerate((lead, lead, ordinary)):
            engine.llm_engine.add_request(f"{end} {at} {i}", engine._prompt(prompt), each)
        outputs = {}
        for step in itertools.count():
            if step == at and end == "abort":
                engine.llm_engine.abort_request([f"abort {at} 0"])
            elif step in (at, at + 2) and end == "anew":
                assert scheduler.reset_prefix_cache(reset_running_requests=True)
            outputs |= {o.request_id: o for o in engine.llm_engine.step() if o.finished}
            if not engine.llm_engine.has_unfinished_requests():
                break
        for i in (0, 1) if end == "anew" else (1,):
            found = engine.population(outputs[f"{end} {at} {i}"])
            assert found.token_ids == want.token_ids and np.abs(found.stay - want.stay).max() < 1e-5
        assert outputs[f"{end} {at} 2"].outputs[0].token_ids == plain.outputs[0].token_ids
    engine.drop_intervention(name)


class StopsAt3(Potential):
    def complete(self, state):
        return torch.zeros(len(state.last_tokens), dtype=torch.float64)

    def stop(self, state):
        return state.last_tokens == 3


def test_lengths_and_potentials(engine, all_blocks_back):
    """Texts that go on when the particles are done, and the other way round, at blocks' ends; potentials that look
    ahead, or end particles; groups that are alone."""
    texts = [LONG[:3], LONG, LONG[:20]]
    for length in (1, 31, 32, 33, 64):
        prompts = [prompt_of(length, i) for i in range(3)]
        for potential, alone in ((None, False), (Infill([1, 4, 6]), False), (StopsAt3(), True)):
            params = SMCParams(n_particles=5, max_tokens=24, ignore_eos=True)
            found = engine.counterfactual(
                prompts, texts, [[STEER], [EACH["steer prompt"]], None], params=params, potential=potential, alone=alone
            )
            assert [len(each.stay) for each in found] == [3, 40, 20] and (found[2].stay == 1.0).all()
            assert all(np.isfinite(each.log_weights).all() for each in found)
            if isinstance(potential, StopsAt3):
                assert all(3 not in ids[:-1] for each in found for ids in each.token_ids)


def test_a_group_that_grows_out_of_a_small_cache(small_engine, all_blocks_back):
    """40 blocks: texts and particles grow several times, and all blocks come back, also of who finds none."""
    pool = small_engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    potential, text = TableTwist(value_table(400, VOCAB)), prompt_of(280, 5)
    params = SMCParams(n_particles=4, max_tokens=150, ess_threshold=1.0, ignore_eos=True)
    found = small_engine.counterfactual(prompt_of(32), text, STEER, params=params, potential=potential)
    assert len(found.stay) == 280 and found.tokens.shape[0] == 150 and pool.get_num_free_blocks() == 40
    with pytest.raises(SMCError, match="the KV cache is full") as caught:
        small_engine.counterfactual([prompt_of(32)] * 3, [text] * 3, STEER, params=params, potential=potential)
    assert any(each is not None and each.factual_ids == text for each in caught.value.populations)
    assert pool.get_num_free_blocks() == 40


# ------------------------------------------------------------------------------------------------------ what goes wrong
def test_errors_end_one_group(engine, all_blocks_back):
    """NaN on the text's path alone, or in the prompt, names the layer; a token that was ruled out names the text."""
    far, prompts = torch.full((H,), 3e38), [prompt_of(40, i) for i in range(4)]
    params = SMCParams(n_particles=5, max_tokens=3, ignore_eos=True)
    twice = [[Steer(0, far, at=[at]), Steer(0, far, at=[at])] for at in (60, 20)]
    changes = [[STEER], twice[0], twice[1], [STEER]]
    with pytest.raises(SMCError) as caught:
        engine.counterfactual(prompts, [LONG] * 4, changes, params=params)
    said = [f"model at step {t}: logits of row 0 hold NaN or +inf; under its intervention layer 0" for t in (21, 0)]
    assert all(text in str(caught.value) for text in said)
    plain = engine.counterfactual([prompts[0], prompts[3]], [LONG] * 2, STEER, params=params)
    populations = caught.value.populations
    assert [each is None for each in populations] == [False, True, True, False]
    assert np.abs(populations[0].stay - plain[0].stay).max() < TOLERANCE
    greedy = engine.smc(PROMPT, SMCParams(n_particles=1, max_tokens=6, top_k=1)).token_ids[0]
    wrong = [*greedy[:3], (greedy[3] + 1) % VOCAB, *greedy[4:]]
    params = dataclasses.replace(params, top_k=1)
    said = f"text: its token 3, {wrong[3]}, is impossible under the settings"
    with pytest.raises(ValueError, match=said):
        engine.counterfactual(PROMPT, wrong, STEER, params=params)
    with pytest.raises(SMCError, match=f"prompt 1: {said}") as caught:
        engine.counterfactual([PROMPT] * 2, [greedy, wrong], STEER, params=params)
    assert caught.value.populations[0].factual_ids == greedy and caught.value.populations[1] is None
    with pytest.raises(ValueError, match=r"text\[1\]: token_ids\[3\]=.*: is impossible there"):
        engine.counterfactual([PROMPT] * 2, [greedy, wrong], [[STEER], [Prompt([1, 2])]], params=params)


def test_texts_with_a_bias_beside_others(engine, hf, all_blocks_back):
    """Groups with a bias have cohorts of their own: whoever follows a text still comes before all that are compared."""
    params = SMCParams(n_particles=4, max_tokens=8, ignore_eos=True, logit_bias={2: 1.5})
    changes = [[Prompt(prompt_of(7))], [STEER]]
    for order in (changes, changes[::-1]):
        found = engine.counterfactual([PROMPT] * 2, [LONG[:8]] * 2, order, params=params)
        for each, change in zip(found, order, strict=True):
            want = hf.counterfactual(PROMPT, LONG[:8], change, params=params)
            assert np.abs(each.stay - want.stay).max() < TOLERANCE
    name, both = engine.register_intervention(STEER), [dataclasses.replace(params, logit_bias=None), params]
    leads = [
        engine.lead_params(each, intervention=name, counterfactual=LONG[:8], return_population=True) for each in both
    ]
    outputs = engine.generate([{"prompt_token_ids": PROMPT}] * 2, leads, use_tqdm=False)
    engine.drop_intervention(name)
    for output, each in zip(outputs, both, strict=True):
        want = hf.counterfactual(PROMPT, LONG[:8], STEER, params=each)
        assert np.abs(engine.population(output).stay - want.stay).max() < TOLERANCE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(text=[]), "text: is empty"),
        (dict(text=[VOCAB]), r"text\[0\]=8: is beyond the vocabulary"),
        (dict(text=[1], params="x"), "params='x': must be SMCParams"),
        (dict(text=prompt_of(508)), "text: 508 tokens after a prompt of 5 are over max_model_len=512"),
        (dict(text=[1], intervention=[Prompt(prompt_of(512))]), "over max_model_len=512"),
        (dict(prompt=prompt_of(512), text=[1], intervention=[Prompt([1])]), "over max_model_len=512"),
        (dict(prompt=[PROMPT] * 2, text=[[1]]), "must be a list of a text, or None, for each of 2 prompts"),
        (dict(prompt=[PROMPT] * 2, text=[[1], []]), r"text\[1\]: is empty"),
        (dict(text=[1], n=4, params=SMCParams()), "n=4: params says it already"),
        (dict(text=[1], intervention=Steer(2, STEER.vector)), r"layer=2: must be in \[0, 2\)"),
        (
            dict(params=SMCParams(max_tokens=2, allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1)),
            "text=None: none can be drawn",
        ),
    ],
)
def test_refusals(engine, hf, all_blocks_back, given, message):
    with pytest.raises(ValueError, match=message):
        engine.counterfactual(
            **{"prompt": PROMPT, "intervention": STEER, "n": None if "params" in given else 4, **given}
        )


def test_refusals_of_facts_and_effects(engine, hf, all_blocks_back):
    with pytest.raises(ValueError, match="facts are of one prompt and its text"):
        engine.facts([PROMPT] * 2, [[1], [2]])
    with pytest.raises(ValueError, match=r"text: token_ids\[0\]=1: is impossible there under p0"):
        engine.facts(PROMPT, [1], SMCParams(allowed_token_ids=[2]))
    for each in (engine, hf):
        with pytest.raises(ValueError, match="text=None: φ is asked of a text"):
            each.necessity(PROMPT, None, StopsAt3(), STEER, SMCParams())
        with pytest.raises(ValueError, match="prompt: must be one prompt, got 2"):
            each.necessity([PROMPT] * 2, [TEXT] * 2, StopsAt3(), STEER, SMCParams())
        early = each.facts(PROMPT, TEXT, SMCParams(min_tokens=9, stop_token_ids=[5]))
        assert len(each.counterfactual(early, n=2, ignore_eos=True).stay) == STEPS


# ---------------------------------------------------------------------------------------------------------- on average
@pytest.fixture(scope="module")
def tiny(tiny_path):
    return TinyLlama(tiny_path, VOCAB, STEPS, frozenset())


def test_over_all_texts_it_is_the_intervened_model(engine, tables, all_blocks_back):
    """Texts are drawn with the same seed, of which no number serves twice."""
    params, n = SMCParams(n_particles=1, max_tokens=2, ignore_eos=True, seed=11), 1000
    found = engine.counterfactual([PROMPT] * n, None, STEER, params=params)
    want = [math.exp(tables[1][()][a] + tables[1][(a,)][b]) for a in range(VOCAB) for b in range(VOCAB)]
    counts = Counter(tuple(each.token_ids[0]) for each in found)
    seen = [counts[a, b] for a in range(VOCAB) for b in range(VOCAB)]
    few = [i for i, p in enumerate(want) if p * n < 5]
    seen = [x for i, x in enumerate(seen) if i not in few] + [sum(seen[i] for i in few)] * bool(few)
    want = [x for i, x in enumerate(want) if i not in few] + [sum(want[i] for i in few)] * bool(few)
    assert chisquare(seen, n * np.array(want) / sum(want)).pvalue > 1e-4
    kept = np.array([each.token_ids[0][0] == each.factual_ids[0] for each in found])
    stay = np.array([each.stay[0] for each in found])
    assert abs((kept - stay).mean()) < 4.5 * math.sqrt((stay * (1 - stay)).mean() / n)


class Holds(TableTwist):
    """φ is 1 where the second token is among some, else 0."""

    def __init__(self, tokens):
        value = np.where(np.isin(np.arange(VOCAB), tokens), 0.0, -np.inf)
        super().__init__(np.stack([np.zeros(VOCAB), value, np.zeros(VOCAB)]), share=1.0)


def test_effects(engine, tables, law, tiny, tiny_path, all_blocks_back):
    """Necessity, sufficiency, and log Z under do(·) less log Z with its bounds, against enumeration."""
    params = SMCParams(n_particles=100, max_tokens=STEPS, ignore_eos=True)
    for tokens, ask in (([1, 2, 5], engine.necessity), ([0, 2, 4], engine.sufficiency)):
        share = sum(p * (s[1] in tokens) for s, p in law[0].items())
        want = share if ask == engine.sufficiency else 1 - share
        found = ask(PROMPT, TEXT, Holds(tokens), STEER, params, runs=12)
        assert abs(found.estimate - want) < 4.5 * found.se + TOLERANCE and 0 < found.se < 0.03
        other = engine.sufficiency if ask == engine.necessity else engine.necessity
        with pytest.raises(ValueError, match="its potential is"):
            other(PROMPT, TEXT, Holds(tokens), STEER, params)
    value = value_table(STEPS, VOCAB, seed=4)
    potential = TableTwist(np.where(np.isinf(value), -1.0, value))
    swaps = [EACH["interchange"], EACH["subspace"]]
    under = [tables[1], *(table_under(tiny_path, PROMPT, [swap], STEPS) for swap in swaps), tables[0]]
    log_z = [
        np.logaddexp.reduce([sum(table[s[:t]][v] for t, v in enumerate(s)) + potential.log_phi(s) for s in tiny.log_p])
        for table in under
    ]
    params = dataclasses.replace(params, n_particles=32)
    still = dataclasses.replace(STEER, scale=0.0)
    *found, same = engine.effects(PROMPT, params, potential, [STEER, *swaps, still], runs=40)
    for one, z in zip(found, log_z, strict=False):
        assert abs(one.estimate - (z - log_z[-1])) < 4.5 * one.se and 0 < one.se < 0.1
    assert same.estimate == 0.0 == same.se
