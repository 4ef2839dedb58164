"""Models with sliding windows, in all attention layers or in some of them: log-probs by recompute in float32."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, hooked_log_probs, swapped
from tiny import WINDOW, TableTwist, TinyLlama, hf_log_probs, make_windowed, value_table
from vllm import SamplingParams
from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec

from fastsmc import SMCParams
from fastsmc.interventions import Interchange
from fastsmc.potentials import Infill
from fastsmc.vllm import compat
from fastsmc.vllm.attention import Attend, AttendMetadata, MixedMetadata
from fastsmc.vllm.model import Model
from fastsmc.vllm.worker import keep_behind_windows

from .conftest import VOCAB, make_engine
from .test_attend import prompt_of, runner_of

POTENTIAL = TableTwist(3 * value_table(100, VOCAB))
#: of a group whose rows share a parent at every step, and are many windows long in the end
PARAMS = SMCParams(n_particles=12, max_tokens=60, ess_threshold=1.0, resampling="multinomial", seed=3)


@pytest.fixture(scope="module", params=["gemma3", "mistral"])
def windowed(request, tmp_path_factory):
    """(kind, path, engine)"""
    path = make_windowed(tmp_path_factory.mktemp(request.param), VOCAB, request.param)
    return request.param, path, make_engine(path)


def check_log_probs(path, prompt, population):
    for i, want in enumerate(hf_log_probs(path, prompt, population.token_ids)):
        assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


def force(monkeypatch, pays):
    monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
    monkeypatch.setattr(Attend, "pays", pays)


def check_windows(engine, path, length):
    """60 tokens: the window is passed in the prompt, at its end, or by the particles; then nearly all rows differ."""
    prompt = prompt_of(length)
    population = engine.smc(prompt, PARAMS, POTENTIAL)
    assert population.resampled[1:].all() and len({tuple(tokens) for tokens in population.token_ids}) > 1
    check_log_probs(path, prompt, population)
    (within,) = hf_log_probs(path, prompt, population.token_ids[:1])
    (whole,) = hf_log_probs(path, prompt, population.token_ids[:1], sliding_window=512)
    same = max(WINDOW - length, 0) + 1  # tokens that follow no more than a window
    if length <= WINDOW:
        assert np.abs(within - whole)[:same].max() <= 1e-4
    assert np.abs(within - whole)[same:].max() > 1e-2


@pytest.mark.parametrize("length", [5, WINDOW - 1, WINDOW, WINDOW + 1, 100])
def test_log_probs_equal_a_full_recompute_within_the_window(windowed, length):
    _, path, engine = windowed
    check_windows(engine, path, length)


def test_counterfactuals_across_the_window(windowed):
    _, path, engine = windowed
    prompts, texts, parts = [prompt_of(30, i) for i in range(2)], [prompt_of(50, i) for i in (2, 3)], [EACH["steer"]]
    params = SMCParams(n_particles=6, max_tokens=30, ignore_eos=True)
    found = engine.counterfactual(prompts, texts, [parts, None], params=params)
    for each, prompt, text in zip(found, prompts, texts, strict=True):
        assert np.abs(each.factual_log_probs - hf_log_probs(path, prompt, [text])[0]).max() <= 5e-4
    for i, ids in enumerate(found[0].token_ids):
        assert np.abs(found[0].token_log_probs[i] - hooked_log_probs(path, prompts[0], [ids], parts)[0]).max() <= 5e-4
    assert found[1].token_ids == [texts[1][:30]] * 6 and (found[1].stay == 1.0).all() and (found[0].stay < 1).any()


def test_unbiased_across_the_window(windowed):
    """E[Ẑ] = Z by enumeration, where the second token leaves the window."""
    _, path, engine = windowed
    prompt, potential, params = prompt_of(WINDOW), TableTwist(value_table(3, VOCAB)), replace(PARAMS, max_tokens=3)
    z = TinyLlama(path, VOCAB, 3, frozenset(), prompt=prompt).log_z(potential.log_phi)
    got = np.exp([p.log_z for p in engine.smc([prompt] * 100, params, potential)])
    assert abs(got.mean() - np.exp(z)) <= 4 * got.std(ddof=1) / np.sqrt(len(got))


def test_windows_sinks_and_experts(tmp_path):
    """gpt-oss, in a process of its own: vLLM makes its groups of experts when the first engine of a process starts."""
    path = make_windowed(tmp_path, VOCAB, "gpt_oss")
    engine = make_engine(path, in_process=False)
    for length in (5, WINDOW, 100):
        check_windows(engine, path, length)
    check_intervened(engine, path, ["affine", "steer positions"])
    with pytest.raises(ValueError, match="RankOne: the layers of this model have no mlp.down_proj"):
        engine.smc(prompt_of(5), PARAMS, intervention=EACH["rank one"])


def check_intervened(engine, path, names):
    """The end of a layer is where it is in Hugging Face, also where the next layer adds up what comes of it."""
    prompts = [prompt_of(WINDOW + 10 + i) for i in range(len(names))]
    params = replace(PARAMS, max_tokens=12)
    populations = engine.smc(prompts, params, POTENTIAL, intervention=[LISTS[name] for name in names])
    for population, prompt, name in zip(populations, prompts, names, strict=True):
        for i, want in enumerate(hooked_log_probs(path, prompt, population.token_ids, LISTS[name])):
            assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


def test_interventions(windowed):
    _, path, engine = windowed
    check_intervened(engine, path, ["steer", "all", "rank one"])


def test_interchange(windowed):
    _, path, engine = windowed
    bases, sources = ([prompt_of(n, i + seed) for i, n in enumerate((50, 2 * WINDOW))] for seed in (0, 9))
    configs = [Interchange(layer, at) for layer in (0, 1) for at in (-1, -WINDOW)]
    found = engine.interchange(bases, sources, configs, logits=True)
    torch.testing.assert_close(found, swapped(path, bases, sources, configs), rtol=0, atol=2e-4)


def test_continuations_are_scored_within_the_window(windowed):
    _, path, engine = windowed
    prompt, continuation = prompt_of(WINDOW - 12), [1, 4, 6] * 5
    params = SMCParams(n_particles=6, max_tokens=5, ess_threshold=0.0, seed=1)
    population = engine.smc(prompt, params, Infill(continuation))
    whole = [tokens + continuation for tokens in population.token_ids]
    for i, scores in enumerate(hf_log_probs(path, prompt, whole)):
        assert abs(scores[-len(continuation) :].sum() - population.log_weights[i]) <= 5e-4 * len(continuation)


def test_each_layer_attends_as_it_can(windowed, monkeypatch):
    """Every step on `attend`: layers with a window have vLLM's metadata all the same, of the same rows."""
    kind, path, engine = windowed
    model = runner_of(engine).model
    if kind == "mistral":
        assert model.attend.why_not == "attend does not know a sliding window"
        return
    assert model.attend.why_not is None and model.attending == [model.layers[1]]
    seen, metadata = [], Model._metadata

    def record(self, batch):
        made = metadata(self, batch)
        assert set(made) == set(self.layers)
        seen.append([type(made[name]) for name in self.layers])
        return made

    monkeypatch.setattr(Model, "_metadata", record)
    force(monkeypatch, lambda *args, **kwargs: True)
    population = engine.smc(prompt_of(70), PARAMS, POTENTIAL)
    check_log_probs(path, prompt_of(70), population)
    stock = CPUAttentionMetadata
    assert seen == [[stock] * 4] + [[stock, AttendMetadata, stock, stock]] * 59  # the first step has one row
    seen.clear()
    force(monkeypatch, lambda self, plan, length, group: group == 0)  # of two groups only the first
    populations = engine.smc([prompt_of(70), prompt_of(20)], PARAMS, POTENTIAL)
    for prompt, population in zip((prompt_of(70), prompt_of(20)), populations, strict=True):
        check_log_probs(path, prompt, population)
    assert seen[1:] == [[stock, MixedMetadata, stock, stock]] * 59


def test_beside_ordinary_requests(windowed, monkeypatch):
    """Groups that ride in the passes of ordinary requests, whose text stays what it is alone, across the window."""
    kind, path, engine = windowed
    rides = []
    monkeypatch.setattr(
        Model, "ride", lambda self, *args, ride=Model.ride, **kw: rides.append(1) or ride(self, *args, **kw)
    )
    if kind == "gemma3":
        force(monkeypatch, lambda *args, **kwargs: True)
    ordinary = [SamplingParams(max_tokens=70, temperature=1.0, seed=5), SamplingParams(max_tokens=60, temperature=0.0)]
    prompts = [prompt_of(20), prompt_of(100, 1)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    alone = engine.generate(inputs, ordinary, use_tqdm=False)
    name = engine.register_potential(POTENTIAL)
    leads = [engine.lead_params(PARAMS, name, group=i, return_population=True) for i in range(2)]
    outputs = engine.generate([inputs[0], *inputs, inputs[1]], [leads[0], *ordinary, leads[1]], use_tqdm=False)
    engine.drop_potential(name)
    assert len(rides) > 20
    for got, want in zip(outputs[1:3], alone, strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
    for output, prompt in zip((outputs[0], outputs[3]), prompts, strict=True):
        check_log_probs(path, prompt, engine.population(output))
    pool = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # vLLM's null block


def test_a_window_needs_a_backend_that_applies_it_layer_by_layer(windowed, monkeypatch):
    _, _, engine = windowed
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    compat.check_windows(worker.model_runner)
    context = engine.llm_engine.vllm_config.compilation_config.static_forward_context
    layers = runner_of(engine).model.layers
    for name in layers:
        monkeypatch.setitem(context, name, SimpleNamespace(impl=name.split("."), sliding_window=None))
    compat.check_windows(worker.model_runner)
    context[layers[1]].sliding_window = WINDOW
    with pytest.raises(compat.UnsupportedError, match="sliding-window attention with list"):
        compat.check_windows(worker.model_runner)


def test_windows_that_differ_are_of_one_kv_cache_group():
    """vLLM's group can name one window; each layer keeps its own. What vLLM pads beside its window stays vLLM's."""
    shape = dict(num_kv_heads=1, head_size=32, dtype=torch.float32)
    full = FullAttentionSpec(block_size=32, **shape)
    near, far = (SlidingWindowSpec(block_size=16, sliding_window=window, **shape) for window in (40, 80))
    assert keep_behind_windows({"a": full, "b": near}, 32) == {"a": full, "b": replace(full, sliding_window=40)}
    assert keep_behind_windows({"b": near, "c": far}, 32) == {"b": full, "c": full}
    padded = replace(near, page_size_padded=1 << 20)
    assert keep_behind_windows({"a": full, "b": padded}, 32) == {"a": full, "b": padded}


def test_layers_with_a_state_are_refused_by_name(windowed, monkeypatch):
    _, _, engine = windowed
    worker = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert {type(spec) for spec in worker.get_kv_cache_spec().values()} == {FullAttentionSpec}
    state = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    specs = worker.model_runner.get_kv_cache_spec() | {"state": state}
    monkeypatch.setattr(worker.model_runner, "get_kv_cache_spec", lambda: specs)
    with pytest.raises(compat.UnsupportedError, match="'FullAttentionSpec', 'MambaSpec'.*state-space"):
        worker.get_kv_cache_spec()


def test_prompts_from_the_prefix_cache(windowed):
    """Blocks behind the window are there for a prompt that comes again."""
    _, path, engine = windowed
    prompt = prompt_of(130, 3)
    first, again = (engine.smc(prompt, PARAMS, POTENTIAL) for _ in range(2))
    assert first.token_ids == again.token_ids
    check_log_probs(path, prompt, again)
    params = SamplingParams(max_tokens=1, temperature=0.0)
    assert engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0].num_cached_tokens == 128
