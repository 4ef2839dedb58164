"""Groups on `attend` behind vLLM's GPU backends: log-probs by recompute, beside ordinary requests on vLLM's kernels.

On a GPU with FlashAttention and Triton. Without one, in a process of its own, with Triton's backend in the place of the
CPU's: vLLM's cache writer, its attention for ordinary requests and prompts, and `attend` all run on the interpreter,
over vLLM's own paging and the memory layout that it gives a GPU.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from backends import CUDA, INTERPRETED
from tiny import TableTwist, hf_log_probs, make_llama, value_table
from vllm import SamplingParams
from vllm.config import set_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
from vllm.model_executor.layers.quantization.utils.quant_utils import GroupShape
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from fastsmc import SMCParams
from fastsmc.kernels import attend as kernel
from fastsmc.vllm import attention, compat
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.model import Model

from .conftest import VOCAB, make_engine

HERE = Path(__file__).parent
POTENTIAL = TableTwist(3 * value_table(100, VOCAB))
BLOCK = 16
#: backend → (dtype, difference of a log-prob from float32): FlashAttention has no float32
BACKENDS = {"TRITON_ATTN": ("float32", 5e-4), **({"FLASH_ATTN": ("float16", 2e-2)} if CUDA else {})}


@pytest.mark.skipif(INTERPRETED or CUDA, reason="this is the process with the interpreter, or there is a GPU")
def test_on_the_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        *["-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"],
        *[HERE / Path(__file__).name, HERE / "test_graphs.py"],
    ]
    ran = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert ran.returncode == 0, f"on the interpreter:\n{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout


runs = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs a GPU or the interpreter")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("heads"), VOCAB, heads=(4, 2))


def start(path, **args):
    """An engine that knows some costs of `attend`, where it could not measure any: without them nobody asks `pays`."""
    engine = make_engine(path, block_size=BLOCK, **args)
    attend = runner_of(engine).model.attend
    attend.costs = attend.costs or {"attend": [1.0] * 4, "stock": [1.0] * 5, "margin": 1e9}
    return engine


@pytest.fixture(scope="module", params=BACKENDS)
def gpu_engine(request, path):
    """(engine, dtype, tolerance); of two engines only one is alive at a time on a GPU."""
    dtype, tolerance = BACKENDS[request.param]
    if INTERPRETED:
        attention.BACKENDS["cpu"] = {"CPU_ATTN": attention.BACKENDS["cuda"][request.param]}
        return start(path, dtype=dtype), dtype, tolerance
    return start(path, dtype=dtype, attention_backend=request.param), dtype, tolerance


@pytest.fixture
def always(monkeypatch):
    """Every step goes through `attend`; the plans. A plan that comes with a batch must be that of its table."""
    seen = []
    model_metadata, metadata = Model._metadata, Attend.metadata

    def checked(self, batch):
        assert batch.plan is None or torch.equal(batch.plan.table, batch.table)
        return model_metadata(self, batch)

    monkeypatch.setattr(Model, "_metadata", checked)
    monkeypatch.setattr(
        Attend, "metadata", lambda self, plan, length: seen.append(plan) or metadata(self, plan, length)
    )
    monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
    monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)
    return seen


def runner_of(engine):
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.smc_runner


def prompt_of(length, shift=0):
    return [(3 * i + i // 7 + shift) % VOCAB for i in range(length)]


def check_log_probs(path, prompt, population, tolerance):
    for i, want in enumerate(hf_log_probs(path, prompt, population.token_ids)):
        assert np.abs(population.token_log_probs[i] - want).max() <= tolerance


@runs
@pytest.mark.parametrize("length, threshold", [(1, 1.0), (15, 0.0), (33, 0.95)])
def test_log_probs_equal_a_full_recompute(gpu_engine, path, always, length, threshold):
    """18 steps over a block boundary or two; never resampled, at every step, now and then."""
    engine, _, tolerance = gpu_engine
    params = SMCParams(n_particles=8, max_tokens=18, ess_threshold=threshold, resampling="multinomial", seed=3)
    population = engine.smc(prompt_of(length), params, POTENTIAL)
    assert population.resampled.any() == (threshold > 0)
    check_log_probs(path, prompt_of(length), population, tolerance)
    assert len(always) == 17 and max(len(plan.order) for plan in always) > 4
    assert all(plan.backend == "triton" and int(plan.n_shared) >= length // BLOCK for plan in always)


@runs
def test_beside_ordinary_requests(gpu_engine, path, always):
    """A group and ordinary requests in one batch: each what it is alone."""
    engine, _, tolerance = gpu_engine
    ordinary = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=0)
    inputs = [{"prompt_token_ids": prompt_of(30)}, {"prompt_token_ids": prompt_of(17, 1)}]
    alone = engine.generate(inputs, ordinary, use_tqdm=False)
    assert not always  # vLLM's own attention
    for output in alone:
        ids = output.outputs[0].token_ids
        got = [entry[token].logprob for entry, token in zip(output.outputs[0].logprobs, ids, strict=True)]
        assert np.abs(got - hf_log_probs(path, output.prompt_token_ids, [list(ids)])[0]).max() <= tolerance
    name = engine.register_potential(POTENTIAL)
    lead = engine.lead_params(
        SMCParams(n_particles=6, max_tokens=8, ess_threshold=1.0, seed=7), name, return_population=True
    )
    outputs = engine.generate([inputs[0], *inputs], [lead, ordinary, ordinary], use_tqdm=False)
    engine.drop_potential(name)
    for got, want in zip(outputs[1:], alone, strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
    check_log_probs(path, prompt_of(30), engine.population(outputs[0]), tolerance)
    assert len(always) == 7


@runs
def test_the_same_particles_as_with_vllms_attention(gpu_engine, monkeypatch):
    engine, dtype, tolerance = gpu_engine
    params = SMCParams(n_particles=4, max_tokens=6, ess_threshold=1.0, seed=2)
    runs = []
    for pays in (True, False):
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, pays=pays, **kwargs: pays)
        runs.append(engine.smc(prompt_of(14), params, POTENTIAL))
    ours, theirs = runs
    if dtype == "float32":  # half precision may turn a draw
        assert ours.token_ids == theirs.token_ids and np.array_equal(ours.ancestors, theirs.ancestors)
        assert np.allclose(ours.log_probs, theirs.log_probs, atol=tolerance)


@runs
def test_the_kv_cache_is_a_gpus(gpu_engine):
    """Slots before heads in memory; only the used slots of a tail are copied."""
    engine, _, _ = gpu_engine
    model = runner_of(engine).model
    assert model.attend.why_not is None and model.attend.layout == "plain" and model.attend.backend == "triton"
    assert {tuple(cache.shape[1:]) for cache in model.caches} == {(BLOCK, 2, 64)}
    assert all(cache[0].is_contiguous() for cache in model.caches)
    assert model.slot_dim == 1


@runs
def test_the_switch_asks_the_device_nothing(gpu_engine, monkeypatch):
    """It goes by what the host knows, rows and columns and those of the prompt; the plan is not even made."""
    attend = runner_of(gpu_engine[0]).model.attend
    costs = {"attend": [1e-5, 1e-11, 1e-10, 1e-7], "stock": [5e-6, 4e-11, 0.0, 0.0, 1e-7], "margin": 1.1}
    monkeypatch.setattr(attend, "costs", costs)
    table = torch.arange(65, dtype=torch.int32, device=runner_of(gpu_engine[0]).model.device).repeat(256, 1)
    known, unknown = (attend.plan(table, columns) for columns in (64, 0))
    pays = [attend.pays(plan, 65 * BLOCK) for plan in (known, unknown)]
    assert pays == [True, False]
    assert not any("_made" in vars(plan) for plan in (known, unknown))


@runs
def test_the_warm_up_calls_attend_with_one_part_and_with_two(gpu_engine, monkeypatch):
    """On a model with `attend`, at start-up on a GPU; tests/kernels/test_variants.py says that no more is needed."""
    model, seen, attend = runner_of(gpu_engine[0]).model, [], kernel.attend

    def spied(query, keys, values, table, *args, **kwargs):
        seen.append(tuple(table.shape))
        attend(query, keys, values, table, *args, **kwargs)

    monkeypatch.setattr(kernel, "attend", spied)
    monkeypatch.setattr(model.attend, "costs", {"attend": [1.0] * 4, "stock": [1.0] * 5, "margin": 1.1})
    before = [cache.clone() for cache in model.caches]
    model._warm_up(model._config.compilation_config.static_forward_context[model.layers[0]])
    assert seen == [(1, 1), (1, 2)]
    assert all(torch.equal(cache, old) for cache, old in zip(model.caches, before, strict=True))


@runs
def test_float8_cache(path, always, monkeypatch):
    """Keys and values in e4m3 with scales: as vLLM's own attention reads them, and near to float32."""
    args = {"kv_cache_dtype": "fp8"}
    if INTERPRETED:
        from vllm.v1.attention.ops import triton_reshape_and_cache_flash as writer

        monkeypatch.setattr(writer, "_is_supported_kv_cache_dtype", lambda dtype: True)  # of a Hopper
        attention.BACKENDS["cpu"] = {"CPU_ATTN": attention.BACKENDS["cuda"]["TRITON_ATTN"]}
        engine = start(path, dtype="float32", **args)
    else:
        engine = start(path, dtype="bfloat16", attention_backend="TRITON_ATTN", **args)
    model = runner_of(engine).model
    assert model.attend.why_not is None and {cache.dtype for cache in model.caches} == {torch.uint8}
    context = model._config.compilation_config.static_forward_context
    for i, name in enumerate(model.layers):
        context[name]._k_scale.fill_(0.01 * (i + 1))
        context[name]._v_scale.fill_(0.02 / (i + 1))
    params = SMCParams(n_particles=4, max_tokens=6, ess_threshold=1.0, seed=2)
    ours = engine.smc(prompt_of(14), params, POTENTIAL)
    assert len(always) == 5
    check_log_probs(path, prompt_of(14), ours, 0.3)
    if INTERPRETED:  # on a GPU vLLM's attention quantises more than the cache
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: False)
        theirs = engine.smc(prompt_of(14), params, POTENTIAL)
        assert ours.token_ids == theirs.token_ids
        assert np.allclose(ours.log_probs, theirs.log_probs, atol=5e-4)
        # and queries, which vLLM hands over in float8 on a GPU: as its own attention takes the same ones in float32
        # (given float8 it would round its weights, too)
        with set_current_vllm_config(model._config):
            quantise = QuantFP8(static=True, group_shape=GroupShape.PER_TENSOR)

        def quantised(query, scale):
            narrow = quantise(query, scale)[0]
            metadata = next(iter(get_forward_context().attn_metadata.values()))
            return narrow if isinstance(metadata, attention.AttendMetadata) else narrow.float() * scale, scale

        for name in model.layers:
            context[name]._q_scale.fill_(0.05)
            context[name].impl.supports_quant_query_input, context[name].query_quant = True, quantised
        runs = []
        for pays in (True, False):
            monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
            monkeypatch.setattr(Attend, "pays", lambda *args, pays=pays, **kwargs: pays)
            runs.append(engine.smc(prompt_of(14), params, POTENTIAL))
        assert runs[0].token_ids == runs[1].token_ids and not np.allclose(runs[0].log_probs, ours.log_probs, atol=5e-4)
        assert np.allclose(runs[0].log_probs, runs[1].log_probs, atol=5e-4)


@runs
@pytest.mark.parametrize(
    "change, name",
    [
        ({"sliding_window": (127, 0)}, "a sliding window"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap of logits"),
        ({"sinks": torch.ones(2)}, "attention sinks"),
        ({"chunk_lookback": 3}, "chunked attention"),
        ({"dcp_world_size": 2}, "decode context parallelism"),
        ({"attn_type": "encoder_only"}, "attention that is not a decoder's"),
        ({"head_size": 512}, "a head size of 512"),
    ],
)
def test_what_attend_does_not_know_is_left_to_vllm_by_name(gpu_engine, change, name):
    layers = copies(gpu_engine[0])
    for layer in layers:
        layer.impl.__dict__.update(change)
    assert Attend(layers).why_not == f"attend does not know {name}"


@runs
def test_unknown_caches_are_left_to_vllm_by_name(gpu_engine):
    layers = copies(gpu_engine[0])
    assert Attend(layers, fused_output=True).why_not == "attend does not know a quantised output (fuse_attn_quant)"
    layers[1].__dict__["head_size_v"] = 16
    assert Attend(layers).why_not == "attend does not know values of another size than keys"
    layers = copies(gpu_engine[0])
    for layer in layers:
        layer.impl.kv_cache_dtype, layer.__dict__["kv_cache"] = "int8_per_token_head", layer.kv_cache.to(torch.int8)
    assert Attend(layers).why_not == "attend does not know a KV cache in 'int8_per_token_head'"
    layers = copies(gpu_engine[0])
    layers[1].__dict__["_buffers"] = layers[1]._buffers | {"_k_scale": torch.ones(2)}
    layers[1].__dict__["_k_scale"] = torch.ones(2)
    assert Attend(layers).why_not == "attend does not know scales of the KV cache for each head"


def copies(engine):
    """The engine's attention layers, to be changed."""
    model = runner_of(engine).model
    context = model._config.compilation_config.static_forward_context
    layers = [copy.copy(context[name]) for name in model.layers]
    for layer in layers:
        layer.__dict__ = dict(layer.__dict__)
        layer.__dict__["impl"] = copy.copy(layer.impl)
    return layers


def test_the_names_are_of_vllms_backends():
    """What is registered on a CUDA device: each a subclass of what vLLM has under that name, with its forward."""
    for name, path in attention.BACKENDS["cuda"].items():
        ours, theirs = resolve_obj_by_qualname(path), resolve_obj_by_qualname(AttentionBackendEnum[name].value)
        assert issubclass(ours, theirs) and ours.get_name() == name
        impl, base = ours.get_impl_cls(), theirs.get_impl_cls()
        assert issubclass(impl, base) and issubclass(impl, attention.AttendImpl)
        assert impl.do_kv_cache_update is base.do_kv_cache_update and not ours.forward_includes_kv_cache_update
        assert ours.get_builder_cls() is theirs.get_builder_cls()
    compat.check_names("cuda")
