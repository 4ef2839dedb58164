"""Learned twists and exact samples through the real engine."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableTwist, TinyLlama, value_table

from fastsmc import SMCError, SMCParams, evaluate
from fastsmc.hf import HFEngine, Trunk
from fastsmc.potentials import Final, Infill, Lexicon
from fastsmc.twists import Card, Head, Twist, add_lora

from .conftest import VOCAB

STEPS, STOP = 4, 5
PHI = TableTwist(np.where(np.isinf(v := value_table(STEPS, VOCAB)), -1.0, v))


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))


@pytest.fixture(scope="module", params=["linear", "mlp", "lora"])
def twist_path(request, tiny_path, tmp_path_factory):
    return save_twist(request.param, tiny_path, tmp_path_factory.mktemp("twist"))


def save_twist(kind, tiny_path, path, **card):
    torch.manual_seed(0)
    trunk = None
    if kind == "lora":
        trunk = Trunk.load(tiny_path)
        for adapter in add_lora(trunk.model, rank=2, alpha=4.0).values():
            torch.nn.init.normal_(adapter.b, std=0.1)
    head = Head(64, VOCAB, None if kind == "linear" else 16)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        spread = head(torch.randn(200, 64)).std()
        head.out *= 0.5 / spread
        head.bias *= 0.5 / spread
    lora = {"lora_rank": 2, "lora_alpha": 4.0} if kind == "lora" else {}
    fields = dict(
        kind=kind, loss="ctl", base_model=str(tiny_path), vocab_size=VOCAB, hidden_size=64, tokenizer=None,
        input_size=64, rank=64 if kind == "linear" else 16, **lora,
    )  # fmt: skip
    Twist(Card(**{**fields, **card}), head, trunk).save(path)
    return path


def params_of(n, threshold=0.5, **more):
    return SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=threshold, stop_token_ids=[STOP], seed=4, **more)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_the_engine_equals_hugging_face(engine, tiny_path, twist_path, proposal, threshold, all_blocks_back):
    """The same seed gives the same particles and weights, by the engine's KV cache and by Hugging Face's."""
    hf = HFEngine(tiny_path, stop_token_ids=[])
    params = params_of(12, threshold, proposal=proposal)
    a, b = (llm.smc(PROMPT, params, PHI, twist=twist_path) for llm in (engine, hf))
    assert a.token_ids == b.token_ids and np.allclose(a.log_weights, b.log_weights, atol=1e-4)
    assert np.array_equal(a.ancestors, b.ancestors)


def test_bounds_and_divergences(engine, tiny, tiny_path, twist_path, all_blocks_back):
    """With a twist, through vLLM: the bounds hold, and log Z from both is the enumerated one."""
    posterior = tiny.posterior(PHI.log_phi)
    picks = np.random.default_rng(1).choice(len(posterior), size=240, p=list(posterior.values()))
    exact = [list(list(posterior)[i]) for i in picks]
    truth = tiny.log_z(PHI.log_phi)
    bounds = evaluate.log_z_bounds(engine, PROMPT, params_of(4), PHI, exact=exact, runs=240, twist=twist_path)
    assert bounds.lower_mean <= truth + 3 * bounds.lower_se and truth <= bounds.upper_mean + 3 * bounds.upper_se
    log_z, se = bounds.log_z()
    assert abs(log_z - truth) <= 3.5 * se
    got = evaluate.kl(engine, PROMPT, params_of(16), PHI, exact=exact, runs=16, twist=twist_path, log_z=truth)
    assert got.q_sigma > -3 * got.q_sigma_se and got.sigma_q > -3 * got.sigma_q_se
    # the engine weighs the exact samples as Hugging Face does
    want = evaluate.weigh(HFEngine(tiny_path, stop_token_ids=[]), PROMPT, params_of(16), PHI, exact[:20], twist_path)
    np.testing.assert_allclose(
        evaluate.weigh(engine, PROMPT, params_of(16), PHI, exact[:20], twist_path), want, atol=1e-4
    )


def test_a_twist_in_a_plain_request(engine, tiny, twist_path):
    """`smc_twist` and `smc_exact` in extra_args, as an HTTP client sends them: JSON values."""
    name = engine.register_potential(Final(PHI))
    lead = engine.lead_params(params_of(8), name, twist=twist_path, exact=[[0, 1, 2, 3]], return_population=True)
    lead.extra_args = json.loads(json.dumps(lead.extra_args))
    output = engine.generate([{"prompt_token_ids": PROMPT}], [lead], use_tqdm=False)[0]
    engine.drop_potential(name)
    population = engine.population(output)
    assert [0, 1, 2, 3] in population.token_ids and math.isfinite(population.log_z)


@pytest.mark.parametrize("together", [False, True])
def test_groups_with_one_twist(engine, twist_path, monkeypatch, together):
    """On this device each is asked alone, and has the bits that it has alone; where they may be asked together, as on a
    GPU, the head makes one product for all."""
    sizes, ask = [], Twist.logw_next
    monkeypatch.setattr(Twist, "logw_next", lambda self, state: sizes.append(len(state.finished)) or ask(self, state))
    may = together and Card.read(twist_path).kind != "lora"  # a trunk has one group's cache
    if may:
        monkeypatch.setattr(Twist, "per_particle", ("_features", "_log_psi", "_last"))
    lexicon, params, prompts = Lexicon(token_ids=[1, 2], weight=0.5), params_of(6), [PROMPT, [2, 1], [4, 4, 1, 0]]
    alone = [
        engine.smc(prompt, dataclasses.replace(params, group=i), lexicon, twist=twist_path)
        for i, prompt in enumerate(prompts)
    ]
    assert set(sizes) == {6}
    sizes.clear()
    populations = engine.smc(prompts, params, lexicon, twist=twist_path)
    assert max(sizes) == (18 if may else 6)
    for got, want in zip(populations, alone, strict=True):
        assert got.token_ids == want.token_ids
        np.testing.assert_allclose(got.log_weights, want.log_weights, rtol=0, atol=1e-5 if may else 0)


def test_one_twist_for_any_continuation(engine, tiny_path, tmp_path, all_blocks_back):
    """Groups of different continuations share passes, and one directory guides each towards its own: as by Hugging
    Face, where groups run one after the other, and as in a request, which names it beside `infill`."""
    torch.manual_seed(0)
    head = Head(64, VOCAB, 16, 2)
    with torch.no_grad():
        head.features[-1].weight.normal_(std=0.5)
    card = Card(
        kind="mlp", loss="ctl", base_model=str(tiny_path), vocab_size=VOCAB, hidden_size=64, tokenizer=None,
        input_size=64, rank=16, continuation_tokens=2,
    )  # fmt: skip
    Twist(card, head).save(tmp_path)
    params, follow = params_of(8, 1.0, ignore_eos=True), ([1, 6], [0], [3, 2, 4])
    got, want = (
        llm.smc([PROMPT, PROMPT, [2, 1]], params, [Infill(each) for each in follow], twist=tmp_path)
        for llm in (engine, HFEngine(tiny_path, stop_token_ids=[]))
    )
    for a, b in zip(got, want, strict=True):
        assert a.token_ids == b.token_ids and np.allclose(a.step_log_weights, b.step_log_weights, atol=1e-4)
    lead = engine.lead_params(params, "infill", twist=tmp_path, return_population=True)
    lead.extra_args["smc_potential_args"] = json.dumps({"continuation": follow[0]})
    output = engine.generate([{"prompt_token_ids": PROMPT}], [lead], use_tqdm=False)[0]
    assert engine.population(output).token_ids == got[0].token_ids
    with pytest.raises(SMCError, match="one Infill, not 0"):
        engine.smc(PROMPT, params, PHI, twist=tmp_path)


def test_refusals(engine, tiny_path, twist_path, tmp_path):
    save_twist("mlp", tiny_path, tmp_path / "other", base_model="somebody/else")
    with pytest.raises(SMCError, match=r"trained for base_model='else', this engine has"):
        engine.smc(PROMPT, params_of(4), PHI, twist=tmp_path / "other")
    with pytest.raises(SMCError, match=r"nowhere.*card.json"):
        engine.smc(PROMPT, params_of(4), PHI, twist=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="without a name"):
        engine.smc(PROMPT, params_of(4), twist=twist_path)
    save_twist("mlp", tiny_path, tmp_path / "dpg", loss="dpg")
    with pytest.raises(SMCError, match="proposal-only"):
        engine.smc(PROMPT, params_of(4, proposal="base"), PHI, twist=tmp_path / "dpg")
    with pytest.raises(SMCError, match="no complete sequence"):
        engine.smc(PROMPT, params_of(4), PHI, exact=[[0]])
    for key, value in (("smc_exact", "no"), ("smc_exact", [["a"]]), ("smc_twist", 3)):
        lead = engine.lead_params(params_of(4))
        lead.extra_args[key] = value
        with pytest.raises(ValueError, match=key):
            engine.generate([{"prompt_token_ids": PROMPT}], [lead], use_tqdm=False)
    dpg = engine.smc(PROMPT, dataclasses.replace(params_of(64), ess_threshold=1.0), PHI, twist=tmp_path / "dpg")
    assert math.isfinite(dpg.log_z) and dpg.resampled.any()
