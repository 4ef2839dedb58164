"""The same seed gives the same population in every process mode, and beside whatever traffic.

Tensor parallelism is in test_tensor_parallel.py.
"""

import re

import pytest
from tiny import PROMPT, TableTwist, value_table
from vllm import SamplingParams

from fastsmc import LLM, SMCError, SMCParams

from .conftest import VOCAB, make_engine
from .test_engine import Broken, prompt_of, same

POTENTIAL = TableTwist(3 * value_table(100, VOCAB))
PARAMS = {
    proposal: SMCParams(n_particles=16, max_tokens=40, ess_threshold=0.7, proposal=proposal, seed=8)
    for proposal in ("twisted", "base")
}


@pytest.fixture(scope="module")
def alone(engine):
    return {proposal: engine.smc(prompt_of(50), params, POTENTIAL) for proposal, params in PARAMS.items()}


def check(engine, alone):
    for proposal, params in PARAMS.items():
        same(engine.smc(prompt_of(50), params, POTENTIAL), alone[proposal])
    # beside other groups (of other sizes) and ordinary requests
    name = engine.register_potential(POTENTIAL)
    lead = engine.lead_params(PARAMS["twisted"], name, return_population=True)
    other = engine.lead_params(SMCParams(n_particles=5, max_tokens=33, seed=1), name)
    ordinary = SamplingParams(max_tokens=30, temperature=1.0, ignore_eos=True)
    prompts = [PROMPT, prompt_of(50), PROMPT, prompt_of(20)]
    outputs = engine.generate(
        [{"prompt_token_ids": p} for p in prompts], [ordinary, lead, other, ordinary], use_tqdm=False
    )
    engine.drop_potential(name)
    same(engine.population(outputs[1]), alone["twisted"])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [30, 40, 33, 30]
    # several prompts are independent groups; the first is the single one
    several = engine.smc([prompt_of(50), prompt_of(50)], PARAMS["base"], POTENTIAL)
    same(several[0], alone["base"])
    assert several[1].token_ids != several[0].token_ids
    # a failure stays where it is, across processes too
    with pytest.raises(SMCError, match="Broken.prefix.*no such key"):
        engine.smc(PROMPT, PARAMS["base"], Broken("raises"))
    same(engine.smc(prompt_of(50), PARAMS["base"], POTENTIAL), alone["base"])


def test_in_process_beside_traffic(engine, alone, all_blocks_back):
    check(engine, alone)


def test_engine_core_in_its_own_process(process_engine, alone):
    check(process_engine, alone)


def test_a_cache_without_a_size_is_what_the_rows_can_use(process_engine):
    """The tiny model's fits everywhere: 32 rows of 512 tokens and a block of 32 more for each, twice, and the null
    block. vLLM's own default is 0.92 of a memory node, and no engine where less is free."""
    cache = process_engine.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks == 2 * 32 * (512 // 32 + 1) + 1
    assert cache.gpu_memory_utilization == type(cache).gpu_memory_utilization and cache.kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_modellen": 256}, "max_modellen=256: vllm.LLM has no such argument; max_model_len?"),
        ({"max_num_seqs": "many"}, "max_num_seqs='many': must be an integer"),
        ({"tensor_parallel_size": 1.5}, "tensor_parallel_size=1.5: must be an integer"),
        ({"gpu_memory_utilization": "half"}, "must be a number"),
        ({"enforce_eager": "yes"}, "enforce_eager='yes': must be a bool"),
        ({"worker_cls": "mine"}, "worker_cls='mine': fastsmc sets it itself"),
    ],
)
def test_wrong_engine_arguments_are_named_before_anything_starts(tiny_path, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        LLM(str(tiny_path), **arguments)
    with pytest.raises(ValueError, match="model='/no/such/model': there is no such directory"):
        LLM("/no/such/model")


def test_asynchronous_scheduling(tiny_path, alone, monkeypatch):
    """As on a GPU: the next step is scheduled before the last one's result is there. vLLM's CPU platform switches that
    off in its configuration, and so it is asked for here where the configuration is read."""
    from vllm.config import VllmConfig

    from fastsmc.vllm import scheduler

    monkeypatch.setattr(VllmConfig, "max_concurrent_batches", property(lambda config: 2))
    monkeypatch.setattr(scheduler, "SMCScheduler", scheduler.AsyncSMCScheduler)
    engine = make_engine(tiny_path)
    core = engine.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, scheduler.AsyncSMCScheduler)
    assert core.step_fn == core.step_with_batch_queue
    check(engine, alone)
    assert not core.scheduler._groups and not core.scheduler.running
    pool = core.scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # vLLM's null block


def test_chunked_prefill_and_prefix_cache(engine, process_engine):
    """A prompt prefilled in pieces, twice (the second time from the prefix cache): the same population."""
    prompt = prompt_of(150)
    want = engine.smc(prompt, PARAMS["twisted"], POTENTIAL)
    for _ in range(2):
        same(process_engine.smc(prompt, PARAMS["twisted"], POTENTIAL), want)
    params = SamplingParams(max_tokens=30, temperature=0.0)
    cached = process_engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    assert cached.num_cached_tokens >= 128  # blocks of the groups' prompt, untouched by the particles
    fresh = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    assert cached.outputs[0].token_ids == fresh.outputs[0].token_ids


def test_a_progress_bar_counts_particle_steps(engine, capfd, all_blocks_back):
    engine.smc(PROMPT, SMCParams(n_particles=4, max_tokens=20), use_tqdm=True)
    assert "20/20" in capfd.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        (
            {"pipeline_parallel_size": 2, "spec_method": "ngram", "max_model_len": 5},
            "pipeline_parallel_size > 1, spec_method",
        ),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds"),
        ({"watermark_config": {"key": 1}, "return_sampling_mask": True}, "watermark_config, return_sampling_mask"),
        ({"kv_offloading_size": 1.0, "enable_elastic_ep": True}, "kv_offloading_size, enable_elastic_ep"),
        ({"logits_processors": ["mine:Bias"]}, "logits_processors"),
        ({"compilation_config": {"mode": 3, "pass_config": {"enable_sp": True}}}, "enable_sp"),
        ({"aux_output_config": {"enable_return_routed_experts": True}}, "aux_output_config"),
        ({"runner": "pooling"}, "runner='pooling'"),
    ],
)
def test_unsupported_arguments_are_refused_by_name(arguments, said):
    from fastsmc.vllm import compat
    from fastsmc.vllm.starting import engine_args

    with pytest.raises(compat.UnsupportedError, match=said):
        engine_args(arguments)


def test_arguments_that_ask_for_nothing_are_taken():
    from vllm.config import AuxOutputConfig, CompilationConfig

    from fastsmc.vllm.starting import engine_args

    given = {"logits_processors": [], "watermark_config": None, "enable_prompt_embeds": False, "runner": "generate"}
    given |= {
        "compilation_config": CompilationConfig(),
        "aux_output_config": AuxOutputConfig(),
        "data_parallel_size": 1,
    }
    assert given.items() <= engine_args(given).items()
    with pytest.raises(ValueError, match="worker_cls"):
        engine_args({"worker_cls": "mine"})


def test_unsupported_configurations_are_refused_by_name(engine, monkeypatch):
    """What a server's arguments, or a model, switch on without passing `engine_args`."""
    from vllm.config import ModelConfig

    from fastsmc.vllm import compat

    config = engine.llm_engine.vllm_config
    compat.check_config(config)
    for part, name, value, said in (
        (config.parallel_config, "pipeline_parallel_size", 2, "pipeline_parallel_size > 1"),
        (config.parallel_config, "enable_elastic_ep", True, "enable_elastic_ep"),
        (config.parallel_config, "enable_hc_sp", True, "sequence parallelism"),
        (config.cache_config, "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
        (config.model_config, "enable_prompt_embeds", True, "enable_prompt_embeds"),
        (config.model_config, "return_sampling_mask", True, "return_sampling_mask"),
        (config.model_config, "logits_processors", ["mine:Bias"], "logits_processors"),
        (config.aux_output_config, "enable_return_routed_experts", True, "routed experts"),
        (config, "watermark_config", object(), "watermarks"),
        (config, "diffusion_config", object(), "diffusion"),
        (config, "ec_transfer_config", object(), "ec_transfer_config"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(part, name, value)
            with pytest.raises(compat.UnsupportedError, match=said):
                compat.check_config(config)
    with monkeypatch.context() as patch:  # every rank would have a scheduler of its own, and the results are rank 0's
        patch.setattr(config.parallel_config, "tensor_parallel_size", 2)
        patch.setattr(config.parallel_config, "distributed_executor_backend", "external_launcher")
        with pytest.raises(compat.UnsupportedError, match="'external_launcher' with"):
            compat.check_config(config)
    with monkeypatch.context() as patch:
        patch.setattr(config.parallel_config, "tensor_parallel_size", 2)
        compat.check_config(config)
        patch.setattr(config, "additional_config", {"fastsmc": {"captured_steps": True}})
        with pytest.raises(compat.UnsupportedError, match="captured_steps with tensor_parallel_size > 1"):
            compat.check_config(config)
    # a model with a vision tower that may be asked to look; the same model as a text model is taken
    for multimodal in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(ModelConfig, "is_multimodal_model", property(lambda self: True))
            patch.setattr(ModelConfig, "_supports_multimodal_inputs", lambda self, answer=multimodal: answer)
            patch.setattr(config.model_config, "_supports_multimodal_inputs_cache", {}, raising=False)
            if multimodal:
                with pytest.raises(compat.UnsupportedError, match="multimodal inputs"):
                    compat.check_config(config)
            else:
                compat.check_config(config)


def test_an_unknown_version_is_refused_unless_asked_for(monkeypatch):
    from fastsmc.vllm import compat

    monkeypatch.delenv("FASTSMC_ANY_VLLM", raising=False)
    for version in ("0.31.9", "0.34.0", "0.34.0rc1", "1.0"):
        monkeypatch.setattr(compat, "vllm_version", lambda version=version: version)
        with pytest.raises(compat.UnsupportedError, match=f"{version} is not supported.*FASTSMC_ANY_VLLM=1"):
            compat.check_version()
    monkeypatch.setenv("FASTSMC_ANY_VLLM", "1")
    with pytest.warns(UserWarning, match="vLLM 1.0: fastsmc knows"):
        compat.check_version()
    monkeypatch.delenv("FASTSMC_ANY_VLLM")
    for version in ("0.32.0+cpu", "0.32.1", "0.33.0", "0.33.0+cu130"):
        monkeypatch.setattr(compat, "vllm_version", lambda version=version: version)
        compat.check_version()
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    with pytest.raises(compat.UnsupportedError, match="not installed"):
        compat.check_version()


def test_names_that_vllm_lacks_are_named(monkeypatch, engine):
    from fastsmc.vllm import compat, names

    check = compat.check_names.__wrapped__  # without the cache
    check("cpu")
    scheduler, request = "vllm.v1.core.sched.scheduler:Scheduler", "vllm.v1.request:Request"
    calls = {
        f"{scheduler}.no_such_method": (),
        f"{scheduler}._free_request": ("self", "delay"),
        "vllm.no_such_module:thing": (),
        "vllm.forward_context:set_forward_context": ("num_tokens", "no_such_parameter"),
    }
    members = {
        request: ("num_computed_tokens", "no_such_counter"),
        "vllm.v1.engine:EngineCoreOutput": ("no_such_field",),
    }
    monkeypatch.setattr(names, "CALLS", names.CALLS | calls)
    monkeypatch.setattr(names, "MEMBERS", names.MEMBERS | members)
    with pytest.raises(compat.UnsupportedError) as raised:
        check("cpu")
    assert str(raised.value).partition(": ")[2].split("; ") == [
        f"{scheduler}._free_request(self, delay), which takes (self, request, delay_free_blocks)",
        "vllm.forward_context:set_forward_context(no_such_parameter)",
        f"{scheduler}.no_such_method",
        "vllm.no_such_module:thing",
        f"{request}.no_such_counter",
        "vllm.v1.engine:EngineCoreOutput.no_such_field",
    ]


def test_models_and_caches_that_groups_cannot_use_are_refused(runner, scheduler):
    from dataclasses import replace
    from types import SimpleNamespace

    import torch
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    from fastsmc.vllm import compat

    with pytest.raises(compat.UnsupportedError, match="lacks.*attn_groups"):
        compat.check_runner(SimpleNamespace(model=None, kv_cache_config=None, vllm_config=None))
    own = type("Ngrams", (), {"get_model_state_cls": None})()
    with pytest.raises(compat.UnsupportedError, match="Ngrams prepares inputs"):
        compat.check_runner(SimpleNamespace(model=own, attn_groups=[], kv_cache_config=None, vllm_config=None))
    spec = scheduler.kv_cache_config.kv_cache_groups[0].kv_cache_spec

    def config(*specs):
        return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=one) for one in specs])

    compat.check_kv_cache(config(spec))
    compat.check_kv_cache(config(replace(spec, sliding_window=64)))
    state = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
    latent = MLAAttentionSpec(block_size=32, num_kv_heads=1, head_size=64, dtype=torch.float32)
    for bad, said in (
        ([spec, spec], "one KV cache group; this model has 2"),
        ([latent], "MLAAttentionSpec"),
        ([spec, state], "FullAttentionSpec', 'MambaSpec.*state-space"),
        ([replace(spec, attention_chunk_size=64)], "chunked local attention"),
        ([replace(spec, non_causal=True)], "not causal"),
    ):
        with pytest.raises(compat.UnsupportedError, match=said):
            compat.check_kv_cache(config(*bad))
