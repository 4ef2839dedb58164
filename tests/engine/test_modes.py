"""The same seed gives the same population in every process mode, and beside whatever traffic.

Tensor parallelism is in test_tensor_parallel.py.
"""

import pytest
from tiny import PROMPT, TableTwist, value_table
from vllm import SamplingParams

from fastsmc import SMCError, SMCParams

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
    assert cached.num_cached_tokens >= 128  # blocks of the leads' prompt, untouched by the particles
    fresh = engine.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)[0]
    assert cached.outputs[0].token_ids == fresh.outputs[0].token_ids


def test_a_progress_bar_counts_particle_steps(engine, capfd, all_blocks_back):
    engine.smc(PROMPT, SMCParams(n_particles=4, max_tokens=20), use_tqdm=True)
    assert "20/20" in capfd.readouterr().err


def test_unsupported_features_are_refused_by_name(engine, monkeypatch):
    from fastsmc.vllm import compat
    from fastsmc.vllm.llm import engine_args

    with pytest.raises(ValueError, match="worker_cls"):
        engine_args({"worker_cls": "mine"})
    with pytest.raises(compat.UnsupportedError, match="pipeline_parallel_size > 1, enable_lora"):
        engine_args({"pipeline_parallel_size": 2, "enable_lora": True, "max_model_len": 5})
    parallel = engine.llm_engine.vllm_config.parallel_config
    for change, name in (
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size > 1"),
        # every rank would have a scheduler of its own, and the results are rank 0's
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher"}, "'external_launcher' with"),
    ):
        with monkeypatch.context() as patch, pytest.raises(compat.UnsupportedError, match=name):
            for field, value in change.items():
                patch.setattr(parallel, field, value)
            compat.check_config(engine.llm_engine.vllm_config)


def test_an_unknown_version_is_refused(monkeypatch):
    from fastsmc.vllm import compat

    for version in ("0.31.9", "0.33.0", "1.0"):
        monkeypatch.setattr(compat, "vllm_version", lambda version=version: version)
        with pytest.raises(compat.UnsupportedError, match=version):
            compat.check_version()
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0+cpu")
    compat.check_version()
    monkeypatch.setattr(compat, "vllm_version", lambda: None)
    with pytest.raises(compat.UnsupportedError, match="not installed"):
        compat.check_version()


def test_missing_private_members_are_named(scheduler, runner, engine):
    from types import SimpleNamespace

    from fastsmc.vllm import compat

    with pytest.raises(compat.UnsupportedError, match="lacks.*attn_groups"):
        compat.check_runner(SimpleNamespace(model=None, kv_cache_config=None, vllm_config=None))
