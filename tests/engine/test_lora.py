"""Groups with LoRA adapters, beside each other and beside groups and ordinary requests with others or none: log-probs
are those of Hugging Face with the adapter merged into the weights."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from intervened import EACH, LISTS, hooked_log_probs, swapped
from tiny import TableTwist, hf_log_probs, make_adapter, value_table
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from fastsmc import SMCError, SMCParams
from fastsmc.interventions import Interchange
from fastsmc.potentials import Infill
from fastsmc.vllm import adapters, compat
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.messages import GroupStep
from fastsmc.vllm.model import Model

from .conftest import VOCAB, make_engine
from .test_attend import prompt_of, runner_of

POTENTIAL = TableTwist(value_table(100, VOCAB))
PARAMS = SMCParams(n_particles=6, max_tokens=16, ess_threshold=1.0, resampling="multinomial", seed=3)
PROMPT = prompt_of(40)
MAX_LORAS = 2


@pytest.fixture(scope="module")
def lora(tiny_path, tmp_path_factory):
    """The engine, requests of no adapter and of three, one more than it holds at once, and the merged models."""
    requests, merged = [None], [tiny_path]
    for i in (1, 2, 3):
        adapter, whole = make_adapter(tmp_path_factory.mktemp(f"adapter{i}"), tiny_path, seed=i)
        requests.append(LoRARequest(f"adapter{i}", i, str(adapter)))
        merged.append(whole)
    engine = make_engine(tiny_path, max_num_seqs=64, enable_lora=True, max_loras=MAX_LORAS, max_lora_rank=8)
    return engine, requests, merged


def test_interchange_is_the_models_without_adapters(lora):
    """Whatever the layers held of the step before; in one pass and in several."""
    engine, requests, merged = lora
    engine.generate(
        [{"prompt_token_ids": PROMPT}], SamplingParams(max_tokens=2), use_tqdm=False, lora_request=requests[1]
    )
    bases, sources = ([prompt_of(n, i + seed) for i, n in enumerate((40, 33, 70))] for seed in (0, 20))
    configs = [Interchange(layer, position) for layer in (0, 1) for position in (-1, -33)]
    want = swapped(merged[0], bases, sources, configs)
    for n in (1, 30):  # 120 pairs under 4 configurations are rows of several passes
        found = engine.interchange(bases * n, sources * n, configs, logits=True)
        assert (found - want.repeat(1, n, 1)).abs().max() <= 5e-5


@pytest.fixture
def passes(monkeypatch):
    """Numbers of the adapters in each pass of groups' rows; of those that ride with the ordinary ones'."""
    seen, set_batch, set_active = [], adapters.Adapters.set_batch, Model.ride

    def record(self, batch):
        seen.append(set(adapters.ids(batch.adapters or ())) - {0})
        set_batch(self, batch)

    def ride(self, batch, timed):
        made = set_active(self, batch, timed)
        seen.append(set(adapters.ids(batch.adapters or ())) - {0})
        return made

    monkeypatch.setattr(adapters.Adapters, "set_batch", record)
    monkeypatch.setattr(Model, "ride", ride)
    return seen


def check_log_probs(path, population):
    for i, want in enumerate(hf_log_probs(path, PROMPT, population.token_ids)):
        assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


def test_groups_with_adapters_and_without(lora, passes):
    """More adapters than the engine holds at once: no pass has more, and every group has its own."""
    engine, requests, merged = lora
    which = [1, 2, 0, 3, 0, 1]
    populations = engine.smc([PROMPT] * len(which), PARAMS, POTENTIAL, lora_request=[requests[i] for i in which])
    for i, population in zip(which, populations, strict=True):
        check_log_probs(merged[i], population)
    assert max(len(held) for held in passes) == MAX_LORAS and {1, 2, 3} == set().union(*passes)
    (ours,), (base,) = (hf_log_probs(merged[i], PROMPT, populations[0].token_ids[:1]) for i in (1, 0))
    assert np.abs(ours - base).max() > 0.1
    alone = engine.smc(PROMPT, dataclasses.replace(PARAMS, group=3), POTENTIAL, lora_request=requests[3])
    assert alone.token_ids == populations[3].token_ids


def test_under_interventions(lora):
    """What they change is the adapter's model."""
    engine, requests, merged = lora
    lists = [LISTS["all"], LISTS["rank one"]]
    populations = engine.smc([PROMPT] * 2, PARAMS, POTENTIAL, lora_request=requests[1], intervention=lists)
    for population, parts in zip(populations, lists, strict=True):
        for i, want in enumerate(hooked_log_probs(merged[1], PROMPT, population.token_ids, parts)):
            assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


def test_counterfactuals(lora):
    """The adapter is part of the model: the text was drawn with it, and its counterfactuals are."""
    engine, requests, merged = lora
    text, steer = prompt_of(20, 2), EACH["steer"]
    name = engine.register_intervention(steer)
    leads = [
        engine.lead_params(PARAMS, intervention=under, counterfactual=text, return_population=True)
        for under in (name, name, None)
    ]
    outputs = engine.generate(
        [{"prompt_token_ids": PROMPT}] * 3, leads, lora_request=[requests[i] for i in (1, 0, 2)], use_tqdm=False
    )
    engine.drop_intervention(name)
    for output, i, parts in zip(outputs, (1, 0, 2), ([steer], [steer], []), strict=True):
        found = engine.population(output)
        assert np.abs(found.factual_log_probs - hf_log_probs(merged[i], PROMPT, [text])[0]).max() <= 5e-4
        for ids, log_probs in zip(found.token_ids, found.token_log_probs, strict=True):
            assert np.abs(log_probs - hooked_log_probs(merged[i], PROMPT, [ids], parts)[0]).max() <= 5e-4
        assert (found.stay == 1.0).all() == (not parts)


def test_beside_ordinary_requests(lora, passes, monkeypatch):
    """Groups ride with ordinary requests as far as the engine holds the adapters of both, and take turns otherwise."""
    engine, requests, merged = lora
    manager = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.lora_manager
    sets, held = [], type(manager).set_active_adapters

    def record(self, active, mapping):
        assert len(active) <= MAX_LORAS and {a.lora_int_id for a in active} == {*mapping.index_mapping} - {0}
        sets.append(len(mapping.index_mapping))
        held(self, active, mapping)

    monkeypatch.setattr(type(manager), "set_active_adapters", record)
    ordinary = SamplingParams(max_tokens=40, logprobs=0, temperature=1.0, seed=1, ignore_eos=True)
    name = engine.register_potential(POTENTIAL)
    leads = [engine.lead_params(PARAMS, name, group=i, return_population=True) for i in range(4)]
    which = [1, 0, 0, 1, 2, 3]
    outputs = engine.generate(
        [{"prompt_token_ids": PROMPT}] * 6,
        [ordinary, ordinary, *leads],
        lora_request=[requests[i] for i in which],
        use_tqdm=False,
    )
    engine.drop_potential(name)
    for i, output in zip(which[:2], outputs[:2], strict=True):
        ids, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        (want,) = hf_log_probs(merged[i], PROMPT, [ids])
        assert np.abs([step[t].logprob for t, step in zip(ids, steps, strict=True)] - want).max() <= 5e-4
    for i, output in zip(which[2:], outputs[2:], strict=True):
        check_log_probs(merged[i], engine.population(output))
    assert max(sets) > 2 + PARAMS.n_particles and max(len(ids) for ids in passes) == MAX_LORAS


def test_continuations_and_attend(lora, monkeypatch):
    engine, requests, merged = lora
    monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
    monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)
    continuation, which = [1, 4, 6], [2, 0, 1]
    params = dataclasses.replace(PARAMS, n_particles=4, max_tokens=6, ess_threshold=0.0)
    prompts, chosen = [PROMPT] * 3, [requests[i] for i in which]
    for i, population in zip(
        which, engine.smc(prompts, params, Infill(continuation), lora_request=chosen), strict=True
    ):
        check_log_probs(merged[i], population)
        whole = [tokens + continuation for tokens in population.token_ids]
        for k, scores in enumerate(hf_log_probs(merged[i], PROMPT, whole)):
            assert abs(scores[-len(continuation) :].sum() - population.log_weights[k]) <= 5e-4 * len(continuation)


def test_one_particle_whose_row_stands_twice(lora):
    engine, requests, merged = lora
    params = SMCParams(n_particles=1, max_tokens=5, seed=1)
    check_log_probs(merged[2], engine.smc(PROMPT, params, None, lora_request=requests[2]))


def test_passes_of_groups_that_wait_for_their_potentials(lora, monkeypatch):
    """Potentials that become ready in one order are of groups that the scheduler has not counted."""
    engine, requests, _ = lora
    runner = runner_of(engine)
    members = {
        str(i): SimpleNamespace(start=SimpleNamespace(adapter=requests[k])) for i, k in enumerate([1, 0, 2, 3, 1])
    }
    monkeypatch.setattr(runner, "groups", members)
    parts = [GroupStep(str(i), 0, 1, [], None) for i in range(6)] + [GroupStep("a", 0, 1, [], None, alone=True)]
    assert [[part.request_id for part in parts] for parts in runner._sharing(parts)] == [
        ["0", "1", "2"],
        ["3", "4", "5"],
    ]
    assert runner._sharing(parts[-1:]) == [[]]


def test_nobody_overtakes_whose_adapter_does_not_fit(lora, monkeypatch):
    """Groups with the same turn are passed by, and those that had theirs later wait for them."""
    engine, requests, _ = lora
    scheduler = engine.llm_engine.engine_core.engine_core.scheduler

    def fill(*groups):
        named = [
            SimpleNamespace(i=i, n=400, turn=turn, request=SimpleNamespace(lora_request=requests[adapter]))
            for i, (turn, adapter) in enumerate(groups)
        ]
        return [group.i for group in scheduler._fill_pass(named)]

    assert fill((1, 1), (1, 2), (1, 3)) == [0, 1]
    assert fill((1, 1), (2, 1), (3, 2)) == [0, 1]  # 1024 rows
    limits = dataclasses.replace(scheduler._limits, max_num_batched_tokens=4000)
    monkeypatch.setattr(scheduler, "_limits", limits)
    assert fill((1, 1), (1, 2), (2, 3), (2, 1), (3, 1)) == [0, 1, 3]
    assert fill((1, 1), (1, 0), (1, 2), (1, 3), (1, 0), (2, 0)) == [0, 1, 2, 4]


def test_what_cannot_be_is_refused_by_name(lora, engine, monkeypatch):
    with_lora, requests, _ = lora
    with pytest.raises(ValueError, match="lora_request=.*without enable_lora=True"):
        engine.smc(PROMPT, PARAMS, lora_request=requests[1])
    for wrong in ("adapter1", [requests[1]], [requests[1], "adapter2"]):
        with pytest.raises(ValueError, match="lora_request=.*must be a LoRARequest"):
            with_lora.smc([PROMPT] * 2, PARAMS, lora_request=wrong)
    scheduler = with_lora.llm_engine.engine_core.engine_core.scheduler
    with monkeypatch.context() as patch:  # a row that stands twice would not fit vLLM's mapping
        patch.setattr(scheduler, "_limits", dataclasses.replace(scheduler._limits, max_num_batched_tokens=64))
        with pytest.raises(SMCError, match="lookahead=32: with lora_request at most 31, as max_num_batched_tokens=64"):
            with_lora.smc(PROMPT, PARAMS, Infill([1] * 32), lora_request=requests[1])
        with_lora.smc(PROMPT, dataclasses.replace(PARAMS, max_tokens=2), Infill([1] * 31), lora_request=requests[1])
    config = with_lora.llm_engine.vllm_config
    compat.check_config(config)
    for part, name, value, said in (
        (config.device_config, "device_type", "cuda", r"LoRA \(enable_lora\) on a GPU"),
        (config.parallel_config, "tensor_parallel_size", 2, r"LoRA \(enable_lora\) with tensor_parallel_size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, value)
            with pytest.raises(compat.UnsupportedError, match=said):
                compat.check_config(config)


def test_the_last_place_stays_empty(lora):
    """vLLM's operations for CPUs read it for rows without an adapter."""
    engine, _, _ = lora
    core = engine.llm_engine.engine_core.engine_core
    manager = core.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    assert core.vllm_config.lora_config.max_loras == manager.lora_slots == MAX_LORAS
    assert None not in manager.lora_index_to_id[:MAX_LORAS] and manager.lora_index_to_id[MAX_LORAS:] == [None]
