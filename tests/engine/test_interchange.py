"""Interchange interventions in vLLM: rows of any layers, positions and bases in one batch say what Hugging Face says
with hooks, and the engine goes on as if nothing had been."""

import math

import pytest
import torch
from intervened import H, hooked_log_probs, noise, orthonormal, swapped
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from fastsmc import SMCError, SMCParams
from fastsmc.alignment import Pairs, frozen_iia, heat_map, iia
from fastsmc.hf import HFEngine
from fastsmc.interventions import Interchange, Subspace
from fastsmc.vllm import interchange, llm
from fastsmc.vllm.model import Model

from .conftest import VOCAB, make_engine
from .test_attend import prompt_of, runner_of

BASIS = orthonormal(7).T
#: within a block of 32, to its end, over it, and over two
LENGTHS = (5, 32, 33, 40, 64, 70)
BASES, SOURCES = ([prompt_of(n, i + seed) for i, n in enumerate(LENGTHS)] for seed in (0, 20))
#: at each end of a block and of a base; of these lengths
CONFIGS = [
    kind(layer, position, *basis, source_position=source)
    for layer in (0, 1)
    for position, source in (
        (-1, None),
        (-5, -2),
        ([0, 31, 32, 32, 63, 64], None),
        ([4, 1, 31, 33, 31, 1], [0, 30, 2, 9, 40, 69]),
    )
    for kind, basis in ((Interchange, ()), (Subspace, (BASIS,)))
]


@pytest.fixture(scope="module")
def want(tiny_path):
    return swapped(tiny_path, BASES, SOURCES, CONFIGS)


def bits(population):
    return population.token_ids, population.token_log_probs.tobytes(), population.log_weights.tobytes()


def test_rows_are_those_of_a_model_with_hooks(engine, want, all_blocks_back, monkeypatch):
    queries, hidden = [], Model.hidden

    def record(self, batch):
        queries.append((len(batch.tokens), len(batch.lengths)))
        return hidden(self, batch)

    monkeypatch.setattr(Model, "hidden", record)
    found = engine.interchange(BASES, SOURCES, CONFIGS, logits=True)
    torch.testing.assert_close(found, want, rtol=0, atol=5e-5)
    assert torch.equal(engine.interchange(BASES, SOURCES, CONFIGS), want.argmax(-1))
    labels = [[i, 1] for i in range(6)]
    scores = want.log_softmax(-1).gather(2, torch.tensor(labels).expand(len(CONFIGS), -1, -1))
    torch.testing.assert_close(engine.interchange(BASES, SOURCES, CONFIGS, labels=labels), scores, rtol=0, atol=5e-5)
    # sources and bases once, then rows of all configurations from their positions on, as many as the engine's rows
    n, at = (
        sum(LENGTHS),
        sum(
            c.position[b] % n if isinstance(c.position, tuple) else n + c.position
            for c in CONFIGS
            for b, n in enumerate(LENGTHS)
        ),
    )
    assert queries[:2] == [(n, 6)] * 2 and sum(q for q, _ in queries[: len(queries) // 3]) == 2 * n + 16 * n - at
    assert (16 * n - at, 96) in queries  # all of them in one pass


def test_in_small_parts(engine, want, all_blocks_back, monkeypatch):
    """With a cache of few blocks, few queries in a pass, and few rows of logits."""
    model = runner_of(engine)._model
    monkeypatch.setattr(interchange, "CACHE_BYTES", 9 * model.block_bytes)
    for name, value in (("max_tokens", 50), ("max_logits_rows", 3)):
        monkeypatch.setattr(model, name, value)
    torch.testing.assert_close(engine.interchange(BASES, SOURCES, CONFIGS, logits=True), want, rtol=0, atol=5e-5)


def test_compiled_and_in_a_process_of_its_own(compiled, process_engine, want):
    """Both read and write 70 tokens in chunks of 64."""
    for each in (process_engine, compiled):
        torch.testing.assert_close(each.interchange(BASES, SOURCES, CONFIGS, logits=True), want, rtol=0, atol=5e-5)
        same = each.interchange(BASES, BASES, [c for c in CONFIGS if c.source_position is None], logits=True)
        plain = each.interchange(BASES, BASES, Interchange(1, -1), logits=True)
        torch.testing.assert_close(same, plain.expand_as(same), rtol=0, atol=1e-5)
        last, there = (each.interchange(one, SOURCES, Interchange(1, -1), logits=True) for one in (BASES, SOURCES))
        torch.testing.assert_close(last, there, rtol=0, atol=1e-4)


def test_activations_are_hugging_faces(engine, process_engine, tiny_path):
    positions = [-1, [4] * 6, [0, 31, 32, 39, 31, 69]]
    found = HFEngine(tiny_path).activations(BASES, [1, 0], positions)
    for each in (engine, process_engine):
        torch.testing.assert_close(each.activations(BASES, [1, 0], positions), found, rtol=0, atol=2e-5)


def test_the_engine_goes_on_as_before(engine, compiled, tiny_path, all_blocks_back):
    """Requests and groups in the middle of their way, the prefix cache, and what is asked alone, bit for bit."""
    prompt, params = prompt_of(70), SMCParams(n_particles=6, max_tokens=40, seed=3)
    ordinary = SamplingParams(max_tokens=60, logprobs=0, temperature=0.0, ignore_eos=True)
    value = engine.activations([SOURCES[0]], [0], [-1])[0, 0, 0]
    under = [None, Interchange(0, 40, value=value)]

    def run(each, interrupted):
        names = [each.register_intervention(one) if one else None for one in under]
        leads = [each.lead_params(params, intervention=name, return_population=True) for name in names]
        for i, request in enumerate((ordinary, *leads)):
            each.llm_engine.add_request(f"{interrupted} {i}", each._prompt(prompt), request)
        outputs, step = {}, 0
        while len(outputs) < 3:
            if interrupted and step in (1, 20):
                each.interchange(BASES, SOURCES, CONFIGS)
            outputs |= {output.request_id: output for output in each.llm_engine.step() if output.finished}
            step += 1
        for name in filter(None, names):
            each.drop_intervention(name)
        first, *others = (outputs[f"{interrupted} {i}"] for i in range(3))
        return first.outputs[0].token_ids, first.outputs[0].logprobs, *(bits(each.population(o)) for o in others)

    for each in (engine, compiled):
        want = run(each, False)
        assert run(each, True) == want
        population = each.smc(prompt, params, intervention=under[1])
        for i, scores in enumerate(hooked_log_probs(tiny_path, prompt, population.token_ids, under[1:])):
            assert abs(population.token_log_probs[i] - scores).max() <= 5e-4


def test_an_interrupt_gives_the_engine_its_cache_back(engine, monkeypatch):
    model = runner_of(engine)._model
    context, prompt = model._config.compilation_config.static_forward_context, prompt_of(40)
    want = engine.smc(prompt, SMCParams(n_particles=4, max_tokens=4))

    def interrupted(self, batch):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Model, "hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.interchange(BASES, SOURCES, CONFIGS)
    assert {context[name].kv_cache.data_ptr() for name in model.layers} == {c.data_ptr() for c in model.caches}
    assert bits(engine.smc(prompt, SMCParams(n_particles=4, max_tokens=4))) == bits(want)


def test_refusals(engine, tiny_path, monkeypatch):
    for arguments, message in (
        ((BASES, SOURCES[:2], CONFIGS), "sources: 6 bases and 2 sources"),
        ((BASES, SOURCES, Interchange(2, -1)), r"layer=2: must be in \[0, 2\)"),
        ((BASES, SOURCES, Interchange(0, 3)), r"configs\[0\].position=3: bases have 5 to 70 tokens"),
        ((BASES, SOURCES, Subspace(0, -1, torch.eye(9, 2))), "Subspace: is for hidden states of 9 elements"),
        (([prompt_of(513)], [[1]], Interchange(0, -1)), r"bases\[0\]: has 513 tokens, more than max_model_len=512"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.interchange(*arguments)
    with pytest.raises(ValueError, match="position=-1: is one from a prompt's end"):
        engine.register_intervention(Interchange(0, -1, value=noise(H)))
    with monkeypatch.context() as patched:
        patched.setattr(llm, "ANSWER_ELEMENTS", 6 * VOCAB)
        assert engine.interchange(BASES, SOURCES, CONFIGS[:1], logits=True).shape == (1, 6, VOCAB)
        for ask in (
            lambda: engine.interchange(BASES, SOURCES, CONFIGS[:2], logits=True),
            lambda: engine.interchange(BASES, SOURCES, CONFIGS[:1], labels=[[1] * 9] * 6),
            lambda: engine.activations(BASES[:1], [0], [-1]),
        ):
            with pytest.raises(ValueError, match="answer would have .* elements, may have 48; ask of fewer prompts"):
                ask()
    places = runner_of(engine).interventions.places
    monkeypatch.setattr(runner_of(engine).interventions, "places", places._replace(why_not="Gnu: of a kind"))
    for ask in (lambda: engine.interchange(BASES, SOURCES, CONFIGS), lambda: engine.activations(BASES, [0], [-1])):
        with pytest.raises(ValueError, match="interchange: Gnu: of a kind"):
            ask()


def test_hidden_states_that_are_not_finite_are_named(tmp_path, tiny_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_path)
    model.model.embed_tokens.weight.data[6] = math.inf
    model.save_pretrained(tmp_path / "far")
    engine = make_engine(tmp_path / "far", max_num_seqs=16)
    with pytest.raises(ValueError, match=r"sources\[1\]: layer 0 puts out NaN or an infinity at position 0"):
        engine.interchange([[1, 2], [1, 3]], [[2, 1], [6, 1]], Interchange(0, 0))
    with pytest.raises(ValueError, match=r"prompts\[0\]: layer 0 puts out NaN"):
        engine.activations([[6, 1]], [0], [0])
    with pytest.raises(SMCError):
        engine.smc([6, 1], SMCParams(n_particles=2, max_tokens=2))  # the engine goes on


def test_accuracies_are_those_of_the_trainer(engine, tiny_path):
    """IIA in vLLM, and by the layers above alone, as alignments are trained with it."""
    bases, sources = ([prompt_of(40, i + seed) for i in range(24)] for seed in (0, 50))
    hf = HFEngine(tiny_path)
    sites = [(layer, position) for layer in (0, 1) for position in (-1, -9)]
    (plain,) = hf.interchange(bases, bases, [Interchange(1, -1)]).tolist()
    mixed = hf.interchange(bases, sources, [Interchange(*site) for site in sites[:3]]).tolist()
    labels = [mixed[i % 3][i] for i in range(24)]
    asked = Pairs([{}] * 24, [{}] * 24, bases, sources, labels, plain, labels, labels, ("v",))
    alignments = {site: orthonormal(7 + 20 * site[0]).T for site in sites}
    for chosen in (None, alignments):
        found = heat_map(engine, asked, [0, 1], [-1, -9], alignments=chosen)
        want = [frozen_iia(hf, None if chosen is None else chosen[site], asked, *site) for site in sites]
        assert found.iia.ravel().tolist() == want and len(set(want)) > 1 and found.accuracy == 1.0
        assert iia(engine, None if chosen is None else chosen[0, -1], asked, 0, -1) == want[0]
