"""A real model with a real tokenizer, SmolLM2-135M, in vLLM's default process mode."""

import itertools
import json
import re

import jsonschema
import numpy as np
import pytest
import torch
from documents import blocks
from intervened import swapped
from tiny import hf_log_probs
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

import fastsmc
from fastsmc import Population, Potential, SMCError, SMCParams, its
from fastsmc.hf import HFEngine
from fastsmc.interventions import Interchange, Subspace
from fastsmc.models import smollm2
from fastsmc.potentials import Infill, JsonSchema, Lexicon, Regex, TextPotential

from .conftest import TINY_ARGS, make_engine

PROMPT = "Once upon a time, in a small village by the sea, there lived"


@pytest.fixture(scope="module")
def real():
    args = {**TINY_ARGS, "skip_tokenizer_init": False, "kv_cache_memory_bytes": 2 << 30, "max_num_seqs": 64}
    return make_engine(smollm2(), in_process=False, **args)


def test_log_probs_equal_a_full_recompute(real, tmp_path):
    """N = 16, 40 steps, resampling at every step, beside a second group and an ordinary request."""
    potential = Lexicon(words=["the", "sea", "and", "boat"], weight=1.0)
    params = SMCParams(
        n_particles=16, max_tokens=40, ess_threshold=1.0, resampling="multinomial", ignore_eos=True, seed=1
    )
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    alone = real.generate(PROMPT, greedy, use_tqdm=False)[0]
    name = real.register_potential(potential)
    leads = [real.lead_params(params, name, group=i, return_population=True) for i in range(2)]
    outputs = real.generate([PROMPT] * 3, [leads[0], greedy, leads[1]], use_tqdm=False)
    real.drop_potential(name)
    assert outputs[1].outputs[0].text == alone.outputs[0].text
    prompt = real.get_tokenizer().encode(PROMPT)
    for output in (outputs[0], outputs[2]):
        population = real.population(output)
        assert population.resampled[1:].all() and all(len(t) == 40 for t in population.token_ids)
        assert output.outputs[0].text in population.texts
        for got, want in zip(
            population.token_log_probs, hf_log_probs(smollm2(), prompt, population.token_ids), strict=True
        ):
            assert np.abs(got - want).max() <= 5e-4
        assert population.distinct_ancestors()[0] < 16
    population.save(tmp_path / "population")
    again = Population.load(tmp_path / "population")
    assert again.texts == population.texts and np.array_equal(again.log_weights, population.log_weights)


def test_interchange(real):
    """In Hugging Face and vLLM, in float32: max |Δ log softmax| < 2e-3 from the model with hooks."""
    generator, length = torch.Generator().manual_seed(0), 24
    bases, sources = torch.randint(100, 40000, (2, 2, length), generator=generator).tolist()
    basis = torch.linalg.qr(torch.randn(576, 32, generator=generator)).Q
    configs = [
        config
        for layer in (0, 7, 15, 29)
        for at in (-1, -9)
        for config in (Interchange(layer, at), Subspace(layer, at, basis))
    ]
    want = swapped(smollm2(), bases, sources, configs).log_softmax(-1)
    for engine in (real, HFEngine(smollm2())):
        found = engine.interchange(bases, sources, configs, logits=True).log_softmax(-1)
        assert float((found - want).abs().max()) < 2e-3
    last, there = (
        real.interchange(each, sources, Interchange(29, -1), logits=True).log_softmax(-1) for each in (bases, sources)
    )
    assert float((last - there).abs().max()) < 1e-4


def test_stop_strings(real):
    """Particles end with the token that completes a stop string, as ordinary requests do; their texts leave it out."""
    stop, seen = [".", "med Gr"], set()
    params = SMCParams(n_particles=24, max_tokens=8, stop=stop, min_tokens=2, top_p=0.9, temperature=0.9, seed=4)
    population = real.smc(PROMPT, params, Lexicon(words=["old", "man"], weight=0.5))
    tokenizer = real.get_tokenizer()
    for ids, text, reason in zip(population.token_ids, population.texts, population.finish_reasons, strict=True):
        ends = [t for t in range(3, len(ids) + 1) if any(s in tokenizer.decode(ids[2:t]) for s in stop)]
        if reason == "stop" and ids[-1] != tokenizer.eos_token_id:
            assert ends == [len(ids)] or any(s in tokenizer.decode(ids[1:]) for s in stop)
            whole = tokenizer.decode(ids)
            assert whole.startswith(text) and any(whole[len(text) :].startswith(s) for s in stop)
        else:
            assert not ends
        seen.add(reason)
    assert seen == {"stop", "length"}
    output = real.generate(PROMPT, real.lead_params(params), use_tqdm=False)[0]
    i = output.kv_transfer_params["smc"]["chosen"]
    again = real.smc(PROMPT, params)
    assert output.outputs[0].text == again.texts[i] and list(output.outputs[0].token_ids) == again.token_ids[i]
    assert output.outputs[0].finish_reason == again.finish_reasons[i]
    assert output.outputs[0].stop_reason in (stop if again.finish_reasons[i] == "stop" else [None])


class EndsAt(Potential):
    """Ends particles at five tokens."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def stop(self, state):
        return state.lengths >= 5


@pytest.mark.parametrize("stop", [None, ["."]])
def test_a_potential_that_ends_particles(real, stop):
    """The text keeps the last token, which vLLM's front end leaves out where a stop token ends it; stop strings are
    found beside it, and steps are told once."""
    params = SMCParams(n_particles=6, max_tokens=9, stop=stop, top_p=0.9, seed=2)
    populations = real.smc([PROMPT] * 6, params, EndsAt())
    name = real.register_potential(EndsAt())
    for i, population in enumerate(populations):
        lead = real.lead_params(params, name, group=i)
        lead.extra_args["smc_progress"], lead.output_kind = True, RequestOutputKind.DELTA
        real.llm_engine.add_request(str(next(real.request_counter)), real._prompt(population.prompt_token_ids), lead)
        outputs = []
        while real.llm_engine.has_unfinished_requests():
            outputs += real.llm_engine.step()
        payloads = [output.kv_transfer_params["smc"] for output in outputs]
        chosen = payloads[-1]["chosen"]
        tokens = [token for output in outputs for token in output.outputs[0].token_ids]
        assert tokens == population.token_ids[chosen]
        assert "".join(output.outputs[0].text for output in outputs) == population.texts[chosen]
        assert outputs[-1].outputs[0].finish_reason == population.finish_reasons[chosen] == "stop"
        assert [step["step"] for payload in payloads for step in payload["progress"]] == [1, 2, 3, 4, 5]
    real.drop_potential(name)
    lengths = {len(ids) for population in populations for ids in population.token_ids}
    assert lengths == {5} if stop is None else {5} < lengths


def test_min_tokens_is_vllms(real):
    """It rules out the end of sequence where that ends nothing, too."""
    eos = real.get_tokenizer().eos_token_id
    settings = dict(max_tokens=5, min_tokens=2, logit_bias={eos: 100.0}, ignore_eos=True)
    ordinary = (
        real.generate(PROMPT, SamplingParams(temperature=1.0, **settings), use_tqdm=False)[0].outputs[0].token_ids
    )
    for ids in (ordinary, *real.smc(PROMPT, SMCParams(n_particles=3, **settings)).token_ids):
        assert [token == eos for token in ids] == [False, False, True, True, True]


def test_a_restart_with_stop_strings(real):
    """A preempted group begins anew, with p0's settings and what its stop strings have seen: the same population."""
    params = SMCParams(n_particles=24, max_tokens=24, stop=[". ", "sea"], min_tokens=3, top_p=0.9, top_k=50, seed=3)
    lexicon = Lexicon(words=["old", "man"], weight=0.5)
    want, name = real.smc(PROMPT, params, lexicon), real.register_potential(lexicon)
    lead, steps, output = real.lead_params(params, name, return_population=True), [], None
    lead.output_kind = RequestOutputKind.DELTA
    real.llm_engine.add_request("restarts", real._prompt(want.prompt_token_ids), lead)
    while real.llm_engine.has_unfinished_requests():
        for output in real.llm_engine.step():
            steps.append(output.kv_transfer_params["smc"].get("step", 0))
            if len(steps) == 1:
                assert real.llm_engine.reset_prefix_cache(reset_running_requests=True)
    real.drop_potential(name)
    assert any(later <= step for step, later in itertools.pairwise(steps[:-1])), steps  # it has begun anew
    again = real.population(output)
    assert again.token_ids == want.token_ids and again.finish_reasons == want.finish_reasons
    assert "stop" in want.finish_reasons


@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_a_regular_expression_is_obeyed(real, proposal):
    """By masks every particle matches; drawn from p0 and weighed, every particle with weight does."""
    pattern = r" (Anna|Tom|an old man),? who [a-z ]{3,20}\."
    params = SMCParams(n_particles=48, max_tokens=16, ess_threshold=0.5, seed=2, proposal=proposal)
    if proposal == "twisted":
        population = real.smc(PROMPT, params, Regex(pattern))
        assert all(re.fullmatch(pattern, text) for text in population.texts)
        # φ is 0 or 1, so Z is at least the p0 of the matches that were found
        found = {tuple(t): p for t, p in zip(population.token_ids, population.log_probs, strict=True)}
        assert np.logaddexp.reduce(list(found.values())) - 1 < population.log_z < 0
    else:
        population = real.smc(PROMPT, params, Lexicon(words=["."], weight=-np.inf) * Regex(r"[^!]*"))
        assert all("!" not in t for t, w in zip(population.texts, population.weights, strict=True) if w > 0)


def test_json_of_a_schema(real):
    """The same population by the object and by its name; what is no schema ends its own request."""
    schema = {
        "type": "object",
        "properties": {"place": {"enum": ["a village", "the sea"]}, "people": {"type": "integer", "maximum": 99}},
        "required": ["place", "people"],
        "additionalProperties": False,
    }
    params = SMCParams(n_particles=16, max_tokens=20, ess_threshold=0.5, seed=2)
    population = real.smc(PROMPT, params, JsonSchema(schema))
    done = [text for text, w in zip(population.texts, population.weights, strict=True) if w > 0]
    assert done and population.log_z < 0
    for text in done:
        jsonschema.validate(value := json.loads(text), schema)
        assert text == json.dumps(value, separators=(",", ":"))
    leads = [real.lead_params(params, "json_schema", return_population=True) for _ in range(2)]
    for lead, arguments in zip(leads, ({"schema": schema}, {"schema": {"not": {}}}), strict=True):
        lead.extra_args["smc_potential_args"] = json.dumps(arguments)
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(9000))  # ends whoever compiles it
    leads.append(real.lead_params(params, "grammar", return_population=True))
    leads[2].extra_args["smc_potential_args"] = json.dumps({"grammar": f"start: r0\n{rules}r9000: /a/"})
    outputs = real.generate([PROMPT] * 3, leads, use_tqdm=False)
    again = real.population(outputs[0])
    assert again.token_ids == population.token_ids and again.log_z == population.log_z
    with pytest.raises(SMCError, match=r"JsonSchema: schema=\{'not': \{\}\}: Unimplemented keys: \[\"not\"\]"):
        real.population(outputs[1])
    with pytest.raises(SMCError, match="the process that prepared it ended, with SIGSEGV"):
        real.population(outputs[2])


def test_a_hostile_pattern_by_name_ends_alone(real):
    """Its automaton has a million states. A pattern whose automaton has 12,361 runs beside it, as does a request."""
    greedy = SamplingParams(max_tokens=24, temperature=0.0)
    alone = real.generate(PROMPT, greedy, use_tqdm=False)[0]
    params = SMCParams(n_particles=8, max_tokens=12, seed=1)
    leads = [real.lead_params(params, "regex", group=i, return_population=True) for i in range(3)]
    patterns = ["(a|b)*a(a|b){20}", r"\w{1,40}", r"\w{1,40}"]
    for lead, pattern in zip(leads, patterns, strict=True):
        lead.extra_args["smc_potential_args"] = json.dumps({"pattern": pattern})
    outputs = real.generate([PROMPT] * 4, [*leads, greedy], use_tqdm=False)
    assert outputs[3].outputs[0].text == alone.outputs[0].text
    with pytest.raises(SMCError, match=r"Regex: pattern='\(a\|b\)\*a\(a\|b\)\{20\}': more than 50000 states"):
        real.population(outputs[0])
    for output in outputs[1:3]:
        assert all(re.fullmatch(patterns[1], text) for text in real.population(output).texts)


def test_potentials_of_text_and_of_what_follows(real):
    """A Python callable on texts, times the likelihood of a continuation; `complete` alone gives exact weights."""
    follow = " He was a fisherman."
    params = SMCParams(n_particles=8, max_tokens=6, ess_threshold=0.0, ignore_eos=True, seed=3)
    potential = TextPotential(lambda texts: [0.1 * len(text) for text in texts]) * Infill(follow)
    population = real.smc(PROMPT, params, potential)
    tokenizer = real.get_tokenizer()
    prompt, after = tokenizer.encode(PROMPT), tokenizer.encode(follow, add_special_tokens=False)
    whole = [tokens + after for tokens in population.token_ids]
    for i, scores in enumerate(hf_log_probs(smollm2(), prompt, whole)):
        want = scores[-len(after) :].sum() + 0.1 * len(population.texts[i])
        assert abs(want - population.log_weights[i]) <= 5e-4 * len(after)
    named = []
    for continuation in (follow, after):  # by a name, as clients send it
        lead = real.lead_params(params, "infill", return_population=True)
        lead.extra_args["smc_potential_args"] = json.dumps({"continuation": continuation})
        named.append(real.population(real.generate(PROMPT, lead, use_tqdm=False)[0]))
    assert named[0].token_ids == named[1].token_ids and named[0].log_z == named[1].log_z < 0


def test_a_thousand_particles():
    """N = 1024, T = 64 in bfloat16, on two CPU cores. Where products of bfloat16 would take a quarter of an hour: in
    float32, and no further than over one end of a block, with a resampling at every step."""
    fast = torch.cpu._is_avx512_bf16_supported()
    engine = make_engine(
        smollm2(),
        in_process=False,
        dtype="bfloat16" if fast else "float32",
        skip_tokenizer_init=False,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1024,
        kv_cache_memory_bytes=(3 if fast else 5) << 30,
    )
    steps, threshold = (64, 0.5) if fast else (24, 1.0)
    params = SMCParams(n_particles=1024, max_tokens=steps, ess_threshold=threshold, ignore_eos=True)
    population = engine.smc(PROMPT, params, Lexicon(words=["sea"], weight=2.0))
    assert np.isfinite(population.log_z) and all(len(t) == steps for t in population.token_ids)
    assert population.resampled.any() and len({tuple(t) for t in population.token_ids}) > 100
    assert abs(population.weights.sum() - 1) < 1e-12


def test_ten_lines_of_the_readme(real, monkeypatch, capsys):
    """The README's Python as it stands, but for the engine, which is this module's, and N, which is smaller."""
    (code,) = blocks("README.md", "python")
    assert code.count("n_particles=256") == 1
    models = []
    monkeypatch.setitem(vars(fastsmc), "LLM", lambda model: models.append(model) or real)
    names = {"__name__": "__main__"}
    exec(compile(code.replace("n_particles=256", "n_particles=32"), "README.md", "exec"), names)
    assert models == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    population = names["pop"]
    assert capsys.readouterr().out.startswith(f"{population.log_z} {population.final_ess} [(")
    e = np.array([text.count("e") for text in population.texts])
    assert population.n_particles == 32 and population.log_z < 0 and population.weights @ e <= 6


class EvenLength:
    """A process reward model of its_hub's kind, in whichever process the engine has."""

    def score(self, prompt, texts):
        assert prompt == "Tell a story."
        return [0.8 if len(text) % 2 == 0 else 0.3 for text in texts]


def test_its_hub_over_the_engine(real):
    """A chat's message, steps that end within words, and as many tokens as the context leaves; the weights are those of
    the scores."""
    filtering = its.ParticleFiltering(its.StepGeneration(2, step_token="e", temperature=1.0), EvenLength(), seed=3)
    found = filtering.infer(real, "Tell a story.", 12, return_response_only=False)
    population = found.population
    wanted = real.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": "Tell a story."}], add_generation_prompt=True, return_dict=False
    )
    assert population.prompt_token_ids == list(wanted)
    assert population.params.max_tokens == real.model_config.max_model_len - len(wanted)
    assert set(found.steps_used_lst) <= {1, 2, 3} and max(found.steps_used_lst) == 3
    after = {int(at) + 1 for at in population.boundaries}  # a step says whether it was drawn after a resampling
    assert set(np.flatnonzero(population.resampled).tolist()) & after
    assert set(np.flatnonzero(population.resampled).tolist()) <= after
    whole = [i for i, steps in enumerate(found.steps_used_lst) if steps == 3]
    logits = np.log([0.8 / 0.2 if len(found.responses[i]["content"]) % 2 == 0 else 0.3 / 0.7 for i in whole])
    weights = population.log_weights[whole]
    np.testing.assert_allclose(weights - weights[0], logits - logits[0], atol=1e-9)  # of the last step: all were equal
    assert found.responses[found.selected_index] == found.the_one
