"""Groups on `attend` inside the engine: log-probs by recompute, beside ordinary requests, and the switch to it."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from tiny import TableTwist, hf_log_probs, make_llama, value_table
from vllm import SamplingParams

from fastsmc import Potential, SMCParams, ops
from fastsmc.vllm.attention import Attend, MixedMetadata
from fastsmc.vllm.attention import costs as attend_costs
from fastsmc.vllm.attention.cpu import find_layout
from fastsmc.vllm.model import Model

from .conftest import VOCAB, make_engine

POSITIONS = 4200
POTENTIAL = TableTwist(3 * value_table(100, VOCAB))


class First(Potential):
    """φ = 1 for sequences that start with a token, 0 for others."""

    def __init__(self, token):
        self.token = token

    def prefix(self, state):
        if state.tokens.shape[1] == 0:
            return torch.zeros(len(state.finished), dtype=torch.float64)
        keep = state.tokens[:, 0] == self.token
        return torch.where(keep, 0.0, -torch.inf).double()

    def complete(self, state):
        return self.prefix(state)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("long"), VOCAB, positions=POSITIONS)


@pytest.fixture(scope="module")
def long_engine(path):
    return make_engine(path, max_model_len=POSITIONS)


@pytest.fixture
def always(monkeypatch):
    """Every step goes through `attend`; (rows, common prefix, block reads) of each."""
    seen = []
    metadata = Attend.metadata

    def record(self, plan, length):
        seen.append((len(plan.order), plan.n_shared, plan.n_reads))
        return metadata(self, plan, length)

    monkeypatch.setattr(Attend, "metadata", record)
    monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
    monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)
    return seen


@pytest.fixture(autouse=True)
def plans_fit(monkeypatch):
    """A plan that comes with a batch is that of its table."""
    metadata = Model._metadata

    def checked(self, batch):
        assert batch.plan is None or torch.equal(batch.plan.table, batch.table)
        return metadata(self, batch)

    monkeypatch.setattr(Model, "_metadata", checked)


def runner_of(engine):
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.smc_runner


def prompt_of(length, shift=0):
    return [(3 * i + i // 7 + shift) % VOCAB for i in range(length)]


def check_log_probs(path, prompt, population):
    for i, want in enumerate(hf_log_probs(path, prompt, population.token_ids)):
        assert np.abs(population.token_log_probs[i] - want).max() <= 5e-4


@pytest.mark.parametrize("genealogy", ["never resampled", "every step", "one ancestor"])
@pytest.mark.parametrize("length", [1, 31, 32, 33, 512, 4096])
def test_log_probs_equal_a_full_recompute(long_engine, path, always, length, genealogy):
    """40 steps over a block boundary or two, twelve rows; by recompute in float32."""
    prompt, potential = prompt_of(length), POTENTIAL
    params = SMCParams(n_particles=12, max_tokens=40, ess_threshold=1.0, resampling="multinomial", seed=3)
    if genealogy == "never resampled":
        params = SMCParams(n_particles=12, max_tokens=40, ess_threshold=0.0, seed=3)
    elif genealogy == "one ancestor":
        plain = long_engine.smc(prompt, SMCParams(n_particles=12, max_tokens=1, ess_threshold=0.0, seed=3))
        tokens, counts = np.unique([t[0] for t in plain.token_ids], return_counts=True)
        potential = First(int(tokens[counts.argmin()]))
    population = long_engine.smc(prompt, params, potential)
    assert population.resampled.any() == (genealogy != "never resampled")
    check_log_probs(path, prompt, population)
    assert len(always) >= 39 and max(rows for rows, _, _ in always) > 6
    assert all(shared >= length // 32 for _, shared, _ in always)
    columns = -(-(length + 39) // 32)
    assert always[-1][2] < always[-1][0] * columns or length == 1  # fewer reads than each row on its own


def test_beside_ordinary_requests(long_engine, path, always):
    """Two groups and ordinary requests in one batch: each what it is alone."""
    ordinary = [SamplingParams(max_tokens=50, temperature=1.0, seed=5, ignore_eos=True), SamplingParams(max_tokens=40)]
    ordinary[1].temperature = 0.0
    prompts = [prompt_of(40), prompt_of(100, 1)]
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    alone = long_engine.generate(inputs, ordinary, use_tqdm=False)
    assert not always  # vLLM's own attention
    name = long_engine.register_potential(POTENTIAL)
    params = SMCParams(n_particles=9, max_tokens=40, ess_threshold=1.0, seed=7)
    leads = [long_engine.lead_params(params, name, group=i, return_population=True) for i in range(2)]
    outputs = long_engine.generate([inputs[0], *inputs, inputs[1]], [leads[0], *ordinary, leads[1]], use_tqdm=False)
    long_engine.drop_potential(name)
    for got, want in zip(outputs[1:3], alone, strict=True):
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
    for output, prompt in zip((outputs[0], outputs[3]), prompts, strict=True):
        check_log_probs(path, prompt, long_engine.population(output))
    assert always


def test_the_same_particles_as_with_vllms_attention(long_engine, monkeypatch):
    params = SMCParams(n_particles=16, max_tokens=40, ess_threshold=0.7, seed=2)
    runs = []
    for pays in (True, False):
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, pays=pays, **kwargs: pays)
        runs.append(long_engine.smc(prompt_of(70), params, POTENTIAL))
    ours, theirs = runs
    assert ours.token_ids == theirs.token_ids and np.array_equal(ours.ancestors, theirs.ancestors)
    assert np.allclose(ours.log_probs, theirs.log_probs, atol=1e-4)


def test_a_batch_in_parts(long_engine):
    """Rows on `attend`, rows on vLLM's attention, padding between: each what it is in a batch of its own."""
    model = runner_of(long_engine).model
    layer = model._config.compilation_config.static_forward_context[model.layers[0]]
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(20, n, 32, generator=generator) for n in (layer.impl.num_heads, layer.impl.num_kv_heads))
    table, lengths = shared_table(8, 3), torch.tensor([65, 70, 96, 66, 65, 90, 71, 80], dtype=torch.int32)
    cache = layer.kv_cache.clone().normal_(generator=generator)
    plan = model.attend.plan(table, 2, lengths, [0, 5, 8])
    ours = model.attend.metadata(plan, lengths)
    seventy = torch.full((8,), 70, dtype=torch.int32)
    stock = model._stock_metadata(table, seventy, 70, table[:, -1].long() * 32 + 5)[model.layers[0]]

    def forward(metadata, begin, end):
        out = torch.full((20, *query.shape[1:]), 7.0)
        layer.impl.forward(layer, *(t[begin:end] for t in (query, key, key)), cache, metadata, out[begin:end])
        return out

    got = forward(MixedMetadata(((0, 8, ours), (11, 19, stock))), 0, 20)
    assert torch.equal(got[:8], forward(ours, 0, 8)[:8]) and torch.equal(got[11:19], forward(stock, 11, 19)[11:19])
    assert bool((got[8:11] == 7).all() and (got[19:] == 7).all())
    mixed = forward(MixedMetadata(((0, 8, stock), (11, 19, ours))), 0, 20)
    assert torch.allclose(mixed[1], got[1], atol=1e-5) and torch.allclose(mixed[12], got[12], atol=1e-5)  # 70 tokens


# ------------------------------------------------------------------------------------------------------- the switch
def test_one_plan_serves_all_layers(long_engine, always, monkeypatch):
    made = []
    plan = ops.plan_attend
    monkeypatch.setattr(
        ops, "plan_attend", lambda table, *args, **kw: made.append(len(table)) or plan(table, *args, **kw)
    )
    params = SMCParams(n_particles=9, max_tokens=20, ess_threshold=0.0, seed=1)
    long_engine.smc([prompt_of(65), prompt_of(9)], params, None)
    assert len(always) == len(made) == 19 and max(made) > 9  # at the first step nobody shares


def shared_table(n_rows, n_columns):
    table = torch.arange(n_columns, dtype=torch.int32).repeat(n_rows, 1)
    table[:, -1] += torch.arange(n_rows, dtype=torch.int32)
    return table


def test_the_costs_decide(long_engine, monkeypatch):
    """Many rows on a long prompt share it; one row has nobody to share with; without costs there is no choice."""
    attend = runner_of(long_engine).model.attend
    assert attend.why_not is None and attend.layout == "vector"

    pays = attend.pays
    many, one = ops.plan_attend(shared_table(256, 65)), ops.plan_attend(shared_table(1, 1))
    costs = {"attend": [1e-5, 1e-11, 1e-10, 1e-7], "stock": [5e-6, 4e-11, 0.0, 1e-11, 1e-7], "margin": 1.2}
    monkeypatch.setattr(attend, "costs", costs)
    assert pays(many, 65 * 32) and not pays(one, 20)
    units, stock_units = attend_costs.features(256, 65 * 32, many.n_reads, len(many.nodes), attend.shape)
    products = 2 * 256 * 2 * 65 * 32 * 32
    distinct = 2 * (64 + 256) * 32 * 32
    assert units == (1.0, products, distinct, 257.0)
    assert stock_units == (1.0, products, 2 * 256 * 65 * 32 * 32, distinct, 256.0)
    theirs = 5e-6 + 4e-11 * products + 1e-11 * distinct + 1e-7 * 256
    want = theirs / (1e-5 + 1e-11 * products + 1e-10 * distinct + 1e-7 * 257)
    assert abs(attend_costs.ratio(costs, (units, stock_units)) - want) < 1e-9
    monkeypatch.setattr(attend, "costs", {**costs, "margin": want * 0.999})
    assert pays(many, 65 * 32)
    monkeypatch.setattr(attend, "costs", {**costs, "margin": want * 1.001})
    assert not pays(many, 65 * 32)
    monkeypatch.setattr(attend, "costs", None)
    assert not pays(many, 65 * 32)


def test_the_costs_decide_for_each_group_as_if_it_were_alone(long_engine, monkeypatch):
    attend = runner_of(long_engine).model.attend
    costs = {"attend": [1e-5, 1e-11, 1e-10, 1e-7], "stock": [5e-6, 4e-11, 0.0, 1e-11, 1e-7], "margin": 1.2}
    monkeypatch.setattr(attend, "costs", costs)
    table = torch.cat([shared_table(256, 65), shared_table(1, 65) + 1000])
    lengths = torch.full((257,), 65 * 32, dtype=torch.int32)
    lengths[256] = 20
    both = attend.plan(table, [64, 0], lengths, [0, 256, 257])
    alone = attend.plan(table[:256].contiguous(), 64), attend.plan(table[256:, :1].contiguous(), 0)
    assert both.group_reads == [plan.n_reads for plan in alone] and both.group_nodes == [p.n_nodes for p in alone]
    assert attend.pays(both, lengths[:256], group=0) and not attend.pays(both, lengths[256:], group=1)
    assert attend.pays(both, lengths)
    seen = []
    monkeypatch.setattr(attend_costs, "pays", lambda of, units: seen.append(units))
    attend.pays(both, lengths), attend.pays(both, 65 * 32, group=0), attend.pays(both, 20, group=1)
    for whole, *parts in zip(*([*ours[1:], *stock[1:]] for ours, stock in seen), strict=True):
        assert abs(whole - sum(parts)) <= 1e-9 * whole


def test_costs_that_nobody_committed_are_measured_at_the_start(path, tmp_path, monkeypatch):
    """float16: an engine measures, through its own layers, and keeps the costs; one that starts later reads them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    engine = make_engine(path, max_model_len=POSITIONS, dtype="float16")
    runner = runner_of(engine)
    costs, kept = runner.model.attend.costs, tmp_path / "fastsmc" / "attend_costs.json"
    ((key, value),) = json.loads(kept.read_text()).items()
    assert value == costs and "kernels vec float16" in key and "head_size 32" in key
    assert sum(costs["attend"]) > 0 and sum(costs["stock"]) > 0 and costs["margin"] >= attend_costs.MARGIN
    assert all(not cache.any() for cache in runner.model.caches)  # nothing was written
    monkeypatch.setattr(attend_costs, "measure", None)  # not called again
    again = Model(engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
    assert again.attend.costs == costs
    seen = []
    monkeypatch.setattr(attend_costs, "pays", lambda of, units: seen.append(of) or True)
    population = engine.smc(prompt_of(64), SMCParams(n_particles=8, max_tokens=10, seed=1), POTENTIAL)
    assert seen and all(of == costs for of in seen) and population.log_z > -np.inf


def stock_metadata_of(model):
    def make(table, length):
        return model._stock_metadata(table, torch.full((len(table),), length, dtype=torch.int32), length, table[:, 0])

    return make


@pytest.mark.parametrize("n_blocks", [0, 2])
def test_a_pool_too_small_to_measure_leaves_vllms_attention(long_engine, tmp_path, monkeypatch, caplog, n_blocks):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = runner_of(long_engine).model
    attend = copy.copy(model.attend)
    context = model._config.compilation_config.static_forward_context
    layers = {name: copy.copy(context[name]) for name in model.layers}
    for layer in layers.values():
        layer.__dict__ = {**layer.__dict__, "kv_cache": layer.kv_cache[:n_blocks]}
    attend.measure(layers, stock_metadata_of(model), 64, 512)
    assert attend.costs is None and "too few cases" in caplog.text
    assert not attend.pays(ops.plan_attend(shared_table(256, 65)), 65 * 32)
    assert not (tmp_path / "fastsmc").exists()


def test_a_kernel_that_cannot_run_leaves_vllms_attention(long_engine, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = runner_of(long_engine).model
    attend = copy.copy(model.attend)
    context = model._config.compilation_config.static_forward_context

    def out_of_resources(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(ops, "attend", out_of_resources)
    layers = {name: context[name] for name in model.layers}
    attend.measure(layers, stock_metadata_of(model), 64, 512)
    assert attend.costs is None and "out of resource: shared memory" in caplog.text


@pytest.mark.parametrize(
    "change, name",
    [
        ({"sliding_window": 128}, "a sliding window"),
        ({"alibi_slopes": torch.ones(2)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "a soft cap of logits"),
        ({"sinks": torch.ones(2)}, "attention sinks"),
        ({"is_fp8_kv_cache": True}, "a quantised KV cache"),
        ({"head_size": 40}, "a head size of 40"),
    ],
)
def test_what_attend_does_not_know_is_left_to_vllm_by_name(long_engine, change, name):
    model = runner_of(long_engine).model
    context = model._config.compilation_config.static_forward_context
    layers = [copy.copy(context[layer]) for layer in model.layers]
    for layer in layers:
        layer.__dict__ = dict(layer.__dict__)
        impl = copy.copy(layer.impl)
        impl.__dict__.update(change)
        layer.__dict__["impl"] = impl
    assert Attend(layers).why_not == f"attend does not know {name}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa, layout", [("vec", "vector"), ("vec16", "vector"), ("amx", "tiled")])
@pytest.mark.parametrize("dim", [64, 128])
def test_layouts_are_those_of_vllms_writer(long_engine, dtype, isa, layout, dim):
    if isa == "amx" and not torch.cpu._is_avx512_supported():
        pytest.skip("vLLM's kernels for CPUs without AVX-512 have no AMX")
    want = None if (isa, dtype) == ("amx", torch.float32) else layout
    assert find_layout(isa, dtype, 32, dim) == want
