"""Groups under interventions beside others and none: log-probs are those of Hugging Face with hooks and edited weights,
and nobody else sees anything of them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, VOCAB, H, K, hooked_log_probs, noise
from tiny import PROMPT, TableTwist, value_table
from vllm import SamplingParams

from fastsmc import SMCError, SMCParams
from fastsmc.hf import HFEngine
from fastsmc.interventions import Prompt, RankOne, Steer, Temperature, load, save
from fastsmc.potentials import Infill
from fastsmc.vllm import compat, interventions
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.capacity import Limits, check_fits, intervened_blocks
from fastsmc.vllm.model import Model
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.pace import Pace

from .test_attend import prompt_of, runner_of

POTENTIAL = TableTwist(value_table(100, VOCAB))
PARAMS = SMCParams(n_particles=6, max_tokens=40, ess_threshold=1.0, resampling="multinomial", seed=3)
#: within a block of 32, to its end, over it, and over two
LENGTHS = (1, 5, 32, 40, 64, 70)
TOLERANCE = 5e-4


def blocks_of(engine):
    return engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool


def check(path, populations, prompts, lists):
    for population, prompt, parts in zip(populations, prompts, lists, strict=True):
        for i, want in enumerate(hooked_log_probs(path, prompt, population.token_ids, parts)):
            assert np.abs(population.token_log_probs[i] - want).max() <= TOLERANCE


def bits(population):
    names = ("tokens", "token_log_probs", "ancestors", "log_weights", "step_log_weights")
    return population.token_ids, [getattr(population, name).tobytes() for name in names]


@pytest.fixture
def passes(monkeypatch):
    """The variants of each batch that goes through the model for groups, None where there are none."""
    seen, hidden, ride = [], Model.hidden, Model.ride

    def record(self, batch):
        seen.append(None if batch.variants is None else batch.variants.tolist())
        return hidden(self, batch)

    def take_along(self, batch, timed):
        seen.append(None if batch.variants is None else batch.variants.tolist())
        return ride(self, batch, timed)

    monkeypatch.setattr(Model, "hidden", record)
    monkeypatch.setattr(Model, "ride", take_along)
    return seen


# ----------------------------------------------------------------------------------------------------- what they give
@pytest.mark.parametrize("attention", ["as it pays", "attend"])
def test_rows_of_one_batch_under_different_interventions(
    engine, tiny_path, all_blocks_back, passes, monkeypatch, attention
):
    if attention == "attend":
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)
    lists = [*LISTS.values(), [], *list(LISTS.values())[:4], []]
    prompts = [prompt_of(LENGTHS[i % len(LENGTHS)], i) for i in range(len(lists))]
    populations = engine.smc(prompts, PARAMS, POTENTIAL, intervention=[one or None for one in lists])
    check(tiny_path, populations, prompts, lists)
    assert max(len(set(variants)) for variants in passes if variants) >= 9  # in one pass
    assert any(-1 in variants for variants in passes if variants)


def test_eager_and_compiled_greedy_tokens(engine, compiled, tiny_path):
    """A compiled model passes its places too, and says the same."""
    params = SMCParams(n_particles=2, max_tokens=32, top_k=1)
    lists = [
        [EACH["steer"]],
        [EACH["affine"], EACH["rank one"]],
        [EACH["steer prompt"]],
        [EACH["project"]],
        LISTS["all"],
    ]
    prompts = [prompt_of(n, n) for n in (5, 32, 40, 70, 45)]
    found = [each.smc(prompts, params, intervention=lists) for each in (engine, compiled)]
    for one, other, prompt, parts in zip(*found, prompts, lists, strict=True):
        (tokens, again) = one.token_ids
        assert tokens == again == other.token_ids[0] and len(tokens) == 32
        # greedy: no other token is likelier, in the model with hooks
        (want,) = hooked_log_probs(tiny_path, prompt, [tokens], parts)
        for t in range(32):
            others = [[*tokens[:t], v] for v in range(VOCAB)]
            scores = [s[-1] for s in hooked_log_probs(tiny_path, prompt, others, parts)] if t % 8 == 0 else [want[t]]
            assert want[t] >= max(scores) - 1e-4
    populations = compiled.smc(prompts, PARAMS, POTENTIAL, intervention=lists)
    check(tiny_path, populations, prompts, lists)
    plain = compiled.smc(prompts, PARAMS, POTENTIAL)
    check(tiny_path, plain, prompts, [[]] * 5)


def test_counterfactuals_by_a_compiled_model(engine, compiled):
    """In passes of 64 tokens at most, which many texts fill; where nothing is changed nothing changes."""
    params, n = SMCParams(n_particles=5, max_tokens=20, ignore_eos=True), 30
    prompts, texts = [prompt_of(20 + i, i) for i in range(n)], [prompt_of(20, 50 + i) for i in range(n)]
    changes = [[EACH["steer"]] if i % 3 == 0 else [Steer(0, noise(H), 0.0)] if i % 3 == 1 else None for i in range(n)]
    want, found = (each.counterfactual(prompts, texts, changes, params=params) for each in (engine, compiled))
    for i, (one, other) in enumerate(zip(want, found, strict=True)):
        assert np.abs(one.stay - other.stay).max() < TOLERANCE
        if i % 3:
            assert other.token_ids == [texts[i]] * 5 and (other.stay == 1.0).all()


def test_a_process_of_its_own_and_a_prompt_in_chunks(process_engine, tiny_path):
    prompts, lists = [prompt_of(200), prompt_of(33)], [LISTS["at one site"], LISTS["steer positions"]]
    populations = process_engine.smc(prompts, PARAMS, POTENTIAL, intervention=lists)
    check(tiny_path, populations, prompts, lists)


def test_prompts_are_written_together(engine, tiny_path, all_blocks_back, passes, monkeypatch):
    """Of groups that begin together, in chunks of what a pass holds, none of them twice."""
    monkeypatch.setattr(runner_of(engine).model, "max_tokens", 100)
    prompts = [prompt_of(n, n) for n in (5, 250, 40, 33, 100)]
    lists = [LISTS[name] for name in ("steer", "all", "project", "steer generated", "rank one")]
    populations = engine.smc(prompts, PARAMS, POTENTIAL, intervention=lists)
    check(tiny_path, populations, prompts, lists)
    # all of the first reach their prompt from position 0, the fourth does not
    assert [len(variants) for variants in passes[:4]] == [100, 100, 100, 95] and sum(map(len, passes[:4])) == 395


def test_contrast_over_the_engines_own_weights(engine, tiny_path):
    positive, negative = [[1, 2, 3], [4, 5]], [[6, 6, 1]]
    assert Steer.from_contrast(engine, positive, negative, 1) == Steer.from_contrast(
        HFEngine(tiny_path), positive, negative, 1
    )


def test_prompt_and_temperature(engine, tiny_path):
    other = prompt_of(20, 2)
    population = engine.smc(PROMPT, PARAMS, intervention=[Prompt(other), Temperature(0.5), EACH["steer"]])
    assert population.prompt_token_ids == other and population.params.temperature == 0.5
    for i, want in enumerate(hooked_log_probs(tiny_path, other, population.token_ids, [EACH["steer"]], 0.5)):
        assert np.abs(population.token_log_probs[i] - want).max() <= TOLERANCE
    assert not runner_of(engine).interventions._kept and not runner_of(engine).interventions._sites


def test_scale_0_is_the_model_as_it_is(engine, passes):
    """Bit for bit: its prompt has no KV of its own, which products of other sizes would make."""
    still, plain = (engine.smc(prompt_of(40), PARAMS, intervention=i) for i in (Steer(0, noise(H), 0.0), None))
    assert bits(still) == bits(plain) and set(passes) == {None}


def test_continuations_are_scored_under_the_intervention(engine, tiny_path, all_blocks_back):
    continuation, lists = [1, 4, 6], [[EACH["steer generated"]], [EACH["affine"]], []]
    params = dataclasses.replace(PARAMS, n_particles=4, max_tokens=6, ess_threshold=0.0)
    prompts = [prompt_of(30, i) for i in range(3)]
    populations = engine.smc(prompts, params, Infill(continuation), intervention=[one or None for one in lists])
    for population, prompt, parts in zip(populations, prompts, lists, strict=True):
        whole = [tokens + continuation for tokens in population.token_ids]
        for k, scores in enumerate(hooked_log_probs(tiny_path, prompt, whole, parts)):
            assert abs(scores[-3:].sum() - population.log_weights[k]) <= 3 * TOLERANCE


# --------------------------------------------------------------------------------------------------- what others see
def test_nobody_else_is_touched(engine, tiny_path, all_blocks_back, passes, monkeypatch):
    """Ordinary requests and plain groups of the same prompt, with the prefix cache on: in one pass with groups under
    interventions, before and after them; the prompt's cached blocks keep their bits."""
    core = engine.llm_engine.engine_core.engine_core
    assert core.vllm_config.cache_config.enable_prefix_caching
    monkeypatch.setattr(core.scheduler, "_pace", Pace(5, core.scheduler._pace._logger))  # passes are cut
    prompt = prompt_of(100)
    ordinary = SamplingParams(max_tokens=60, logprobs=0, temperature=0.0, ignore_eos=True)

    def output_of(output):
        return output.outputs[0].token_ids, output.outputs[0].logprobs

    def said(output):
        return [step[token].logprob for token, step in zip(*output_of(output), strict=True)]

    (before,) = engine.generate([{"prompt_token_ids": prompt}], ordinary, use_tqdm=False)
    plain = engine.smc(prompt, PARAMS, POTENTIAL)
    cached = [cache.clone() for cache in runner_of(engine)._model.caches]
    hashed = {b.block_id for b in blocks_of(engine).blocks if b.block_hash is not None}
    lists = [LISTS["all"], [], LISTS["steer prompt"], LISTS["steer positions"]]
    names = [engine.register_intervention(parts) if parts else None for parts in lists]
    potential = engine.register_potential(POTENTIAL)
    leads = [
        engine.lead_params(PARAMS, potential, group=i, intervention=name, return_population=True)
        for i, name in enumerate(names)
    ]
    outputs = engine.generate([{"prompt_token_ids": prompt}] * 6, [ordinary, *leads, ordinary], use_tqdm=False)
    populations = [engine.population(output) for output in outputs[1:5]]
    check(tiny_path, populations, [prompt] * 4, lists)
    for output in (outputs[0], outputs[5]):
        assert output.outputs[0].token_ids == before.outputs[0].token_ids
        assert np.abs(np.subtract(said(output), said(before))).max() <= 1e-5
    assert sum(variants is not None for variants in passes) > 60  # cut into parts, and riding
    for cache, kept in zip(runner_of(engine)._model.caches, cached, strict=True):
        for block in hashed:
            assert torch.equal(cache[block], kept[block])
    for name in filter(None, names):
        engine.drop_intervention(name)
    engine.drop_potential(potential)
    assert bits(engine.smc(prompt, PARAMS, POTENTIAL)) == bits(plain)
    core.scheduler.reset_prefix_cache()
    assert bits(engine.smc(prompt, PARAMS, POTENTIAL)) == bits(plain)
    (after,) = engine.generate([{"prompt_token_ids": prompt}], ordinary, use_tqdm=False)
    assert after.outputs[0].token_ids == before.outputs[0].token_ids


def test_nan_ends_the_group_and_names_the_layer(engine, tiny_path, all_blocks_back):
    far = torch.full((H,), 3e38)
    wrong = [Steer(0, far, at="generated"), Steer(1, far, at="generated")]
    in_prompt = [Steer(0, far, at=[50]), Steer(0, far, at=[50])]
    prompts = [prompt_of(60, i) for i in range(4)]
    with pytest.raises(SMCError) as caught:
        engine.smc(prompts, PARAMS, POTENTIAL, intervention=[wrong, None, in_prompt, LISTS["steer"]])
    first, second = str(caught.value).split("; prompt 2: ")
    assert "prompt 0: model at step 1: logits of row" in first
    assert first.endswith("under its intervention layer 1 (block) put out NaN or an infinity")
    assert second.startswith("model at step 0: ") and "layer 0 (block) put out NaN" in second
    populations = caught.value.populations
    assert populations[0] is None and populations[2] is None
    check(tiny_path, [populations[1], populations[3]], [prompts[1], prompts[3]], [[], LISTS["steer"]])
    # the blocks that held NaN are others' now
    again = [prompt_of(300, i) for i in range(12)]
    plain = engine.smc(again, dataclasses.replace(PARAMS, n_particles=12, max_tokens=8), POTENTIAL)
    check(tiny_path, plain, again, [[]] * 12)


def test_a_restarted_group_writes_its_prompt_again(engine, tiny_path, scheduler, all_blocks_back):
    name, prompt = engine.register_intervention(LISTS["at one site"]), prompt_of(70)
    lead = engine.lead_params(PARAMS, intervention=name, return_population=True)
    engine.llm_engine.add_request("again", engine._prompt(prompt), lead)
    outputs = []
    for step in range(200):
        if step in (3, 5):
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
        outputs += [output for output in engine.llm_engine.step() if output.finished]
        if outputs:
            break
    engine.drop_intervention(name)
    check(tiny_path, [engine.population(outputs[0])], [prompt], [LISTS["at one site"]])


def test_named_ones_are_there_from_the_start(small_engine, tiny_path, named):
    """A request that names one of the engine's option is as a group under it, its prompt's own blocks included."""
    engine, prompts = small_engine, [prompt_of(n, i) for i, n in enumerate(LENGTHS)]
    lead = engine.lead_params(PARAMS, intervention="steer", return_population=True)
    populations = [engine.population(output) for output in engine.generate(prompts_of(prompts), lead, use_tqdm=False)]
    check(tiny_path, populations, prompts, [load(named["steer"])] * len(prompts))
    leads = [engine.lead_params(PARAMS, intervention=name) for name in ("steer", None)]
    with pytest.raises(ValueError, match="known are 'steer'"):
        engine.generate(prompts_of(prompts[:1]), engine.lead_params(PARAMS, intervention="no"), use_tqdm=False)
    steered, plain = engine.generate(prompts_of(prompts[-1:] * 2), leads, use_tqdm=False)
    assert steered.outputs[0].token_ids == populations[-1].token_ids[steered.kv_transfer_params["smc"]["chosen"]]
    assert plain.outputs[0].token_ids != steered.outputs[0].token_ids
    large = dataclasses.replace(PARAMS, n_particles=9, max_tokens=4)
    [output] = engine.generate(
        prompts_of([prompt_of(500)]), engine.lead_params(large, intervention="steer"), use_tqdm=False
    )
    error = output.kv_transfer_params["smc"]["error"]
    assert "16 of them for the prompt under its intervention); the KV cache has 40 of 32 tokens" in error
    assert blocks_of(engine).get_num_free_blocks() == 40


def prompts_of(prompts):
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def test_named_ones_that_do_not_fit_are_refused_by_name(engine, tmp_path):
    path = tmp_path / "odd"
    for part, message in (
        (Steer(0, noise(K)), "Steer: is for hidden states of 128 elements, this model has 64"),
        (Steer(2, noise(H)), r"layer=2: must be in \[0, 2\)"),
    ):
        save([EACH["steer"], part], path)
        with pytest.raises(ValueError, match=rf"interventions\['odd'\]='{path}': {message}"):
            EngineOptions(interventions={"odd": str(path)}).load_interventions(runner_of(engine).interventions.put)


def test_what_broke_is_known_until_all_who_share_it_have_ended(engine, tiny_path, monkeypatch):
    under, seen = runner_of(engine).interventions, []

    def record(name, prompt_len, n, fresh):
        seen.append(fresh)
        return type(under).of_positions(under, name, prompt_len, n, fresh)

    monkeypatch.setattr(under, "of_positions", record)
    for _ in range(2):
        engine.smc([PROMPT] * 2, PARAMS, POTENTIAL, intervention=EACH["steer"])
    assert seen == [True, False] * 2
    monkeypatch.undo()
    name = engine.register_intervention(EACH["steer"])
    for fresh in (True, False, True):
        under.of_positions(name, 5, 9, fresh)
        assert under.broke(name) != fresh
        for maps in under._sites.values():
            maps.finite[under._kept[name].numbers] = False
    engine.drop_intervention(name)


def test_an_intervention_dropped_ends_its_groups(engine, tiny_path, all_blocks_back, monkeypatch, scheduler):
    """In the middle of a pass that they share with others, which go on."""
    monkeypatch.setattr(scheduler, "_pace", Pace(5, scheduler._pace._logger))
    name, prompt = engine.register_intervention(EACH["steer"]), prompt_of(40)
    ordinary = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    leads = [
        engine.lead_params(PARAMS, group=i, intervention=intervention, return_population=True)
        for i, intervention in enumerate((name, None, name))
    ]
    outputs = {}
    for i, params in enumerate((ordinary, *leads)):
        engine.llm_engine.add_request(f"dropped {i}", engine._prompt(prompt), params)
    for step in range(2000):
        if step == 20:
            engine.drop_intervention(name)
        outputs |= {output.request_id: output for output in engine.llm_engine.step() if output.finished}
        if len(outputs) == 4:
            break
    said = [outputs[f"dropped {i}"].kv_transfer_params for i in (1, 3)]
    assert [payload["smc"]["error"] for payload in said] == ["its intervention was dropped"] * 2
    check(tiny_path, [engine.population(outputs["dropped 2"])], [prompt], [[]])
    with pytest.raises(SMCError, match="smc_intervention='intervention:.*: unknown; it was not registered, or dropped"):
        engine.population(engine.generate([{"prompt_token_ids": prompt}], leads[0], use_tqdm=False)[0])


# -------------------------------------------------------------------------------------------------------- refusals
def test_blocks_of_an_intervened_prompt_are_counted(small_engine, tiny_path):
    """40 blocks: a prompt of 20 blocks fits once with its tails, and twice with as many fewer."""
    for first, length, blocks in (
        (-1, 100, 0),
        (0, 100, 4),
        (31, 100, 4),
        (32, 96, 2),
        (95, 96, 1),
        (96, 96, 0),
        (0, 1, 1),
    ):
        assert intervened_blocks(first, length, 32) == blocks
    limits = Limits(64, 1024, 40, 32, 512)
    params = SMCParams(n_particles=8, max_tokens=4)
    check_fits(params, 500, 0, limits)
    with pytest.raises(ValueError, match="needs 41 KV blocks .at the least, 16 of them for the prompt under its"):
        check_fits(dataclasses.replace(params, n_particles=9, max_tokens=2), 500, 0, limits, 0)
    prompt = prompt_of(500)
    with pytest.raises(ValueError, match="for the prompt under its intervention.; the KV cache has 40 of 32 tokens"):
        small_engine.smc(prompt, dataclasses.replace(params, n_particles=9), intervention=EACH["steer"])
    lists = [[EACH["steer"]], [EACH["affine"]], None, [EACH["steer generated"]]]
    prompts = [
        prompt_of(300, i) for i in range(4)
    ]  # 10 blocks each, and as many again for two of them: not all at once
    populations = small_engine.smc(prompts, params, intervention=lists)
    check(tiny_path, populations, prompts, [one or [] for one in lists])
    pool = blocks_of(small_engine)
    assert pool.get_num_free_blocks() == 40


def test_refusals_name_what_is_wrong(engine, monkeypatch):
    for given, message in (
        (Steer(2, noise(H)), r"layer=2: must be in \[0, 2\)"),
        (Steer(0, noise(K)), "Steer: is for hidden states of 128 elements, this model has 64"),
        (RankOne(0, noise(H), noise(H)), "v: has 64 elements, the down_proj of this model reads 128"),
        ([[EACH["steer"]]] * 2, "intervention: 2 interventions for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.smc(PROMPT, PARAMS, intervention=given)
    for given in (Temperature(0.5), [EACH["steer"], Prompt([1])], []):
        with pytest.raises(ValueError, match="(?s)intervention=.*: must be interventions on layers, at least one"):
            engine.register_intervention(given)
    for name, message in (
        ("north", "smc_intervention='north': unknown; known are none"),
        (7, "smc_intervention=7: must be a name"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.generate([PROMPT], engine.lead_params(PARAMS, intervention=name), use_tqdm=False)
    asked = interventions_request(engine.lead_params(PARAMS, intervention="intervention:" + 32 * "0" + ":0"))
    asked.check_allowed(EngineOptions(offline=True))
    with pytest.raises(ValueError, match="smc_intervention=.*: unknown; known are none"):
        asked.check_allowed(EngineOptions())
    monkeypatch.setattr(interventions, "get_tp_group", lambda: SimpleNamespace(world_size=2))
    engine.smc(PROMPT, PARAMS, intervention=EACH["steer"])
    with pytest.raises(ValueError, match="RankOne: its site down_proj is sharded with tensor_parallel_size=2"):
        engine.smc(PROMPT, PARAMS, intervention=EACH["rank one"])
    places = runner_of(engine).interventions.places
    monkeypatch.setattr(runner_of(engine).interventions, "places", places._replace(why_not="Gnu: of a kind"))
    with pytest.raises(ValueError, match="intervention: Gnu: of a kind"):
        engine.smc(PROMPT, PARAMS, intervention=EACH["steer"])


def interventions_request(sampling_params):
    from fastsmc.vllm.request import GroupRequest

    return GroupRequest.parse(sampling_params)


def test_a_model_compiled_without_places_is_no_silent_model(engine, monkeypatch):
    """What a stale compile cache would do: the ops are not called."""
    monkeypatch.setattr(interventions, "_current", None)
    under = runner_of(engine).interventions
    name = engine.register_intervention(EACH["steer"])
    with (
        pytest.raises(RuntimeError, match=r"the model passed \(0, 0\) places .*, of \(2, 2\): was it compiled without"),
        under.under(torch.zeros(3, dtype=torch.int64)),
    ):
        pass
    engine.drop_intervention(name)
    config = engine.llm_engine.vllm_config
    assert config.additional_config[interventions.CACHE_KEY] == interventions.CACHE_VALUE
    compat.check_config(config)


def test_which_layers_are_known():
    from vllm.model_executor.models import commandr, gemma3, gpt2, gpt_oss, granite, llama, qwen3

    for kind, form in (
        (llama.LlamaDecoderLayer, "deferred"),
        (qwen3.Qwen3DecoderLayer, "deferred"),
        (gemma3.Gemma3DecoderLayer, "deferred"),
        (gpt_oss.TransformerBlock, "deferred"),
        (gpt2.GPT2Block, "whole"),
        (commandr.CohereDecoderLayer, None),  # returns a residual that is added already
        (granite.GraniteDecoderLayer, None),
    ):
        assert interventions._form(kind) == form


def test_a_model_without_places_serves_as_ever(tiny_path):
    class Odd(torch.nn.Module):
        def forward(self, x):
            return x, x

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Odd(), Odd()])
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=["layers.0.attn", "layers.1.attn"]),
        model_config=SimpleNamespace(get_hidden_size=lambda: 4, get_vocab_size=lambda: 8),
        additional_config={"fastsmc": {"interventions": True}},
    )
    interventions.install(model, config)
    assert model.fastsmc_places.why_not == "Module: its decoder layers are not of a kind that is known"
    config.additional_config = {}
    interventions.install(model, config)
    assert "start it with interventions=True" in model.fastsmc_places.why_not
    assert type(model.layers[0]) is Odd
