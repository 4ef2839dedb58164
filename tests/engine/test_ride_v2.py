"""Rows that ride in ordinary steps of vLLM's V2 runner, the GPU's: as on a GPU, with graphs and asynchronous, too.

Without a GPU, in a process of its own: vLLM's CPU build then runs that runner with its Triton kernels interpreted.
Graphs are acted: sizes count as captured, one of the whole model runs from the buffers that vLLM has filled, and one of
the pieces must find its inputs there and gives its output in a buffer that the next one overwrites.
"""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backends import CUDA, INTERPRETED
from tiny import TableTwist, hf_log_probs
from vllm import SamplingParams
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context, set_forward_context

from fastsmc.vllm import attention
from fastsmc.vllm.pace import Pace

from .conftest import make_engine
from .test_engine import prompt_of
from .test_groups import VALUE, Request, Run, each_alone, identical, step_until

HERE = Path(__file__).parent
SIZES = [8, 16, 24, 32]
ORDINARY = [
    (prompt_of(20 - 9 * i, i), SamplingParams(max_tokens=45 - 35 * i, temperature=0.0, ignore_eos=True)) for i in (0, 1)
]


@pytest.mark.skipif(INTERPRETED or CUDA, reason="this is the process with the interpreter, or there is a GPU")
def test_on_the_interpreter():
    pytest.importorskip("triton")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", HERE / Path(__file__).name],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"on the interpreter:\n{ran.stdout}\n{ran.stderr}"
    assert " passed" in ran.stdout


runs = pytest.mark.skipif(not (INTERPRETED or CUDA), reason="needs a GPU or the interpreter")
acted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")


class Engine:
    """An engine on the V2 runner, what its parts are, and what its model has been called with."""

    def __init__(self, path, **args):
        args = {"max_num_seqs": 32, "max_num_batched_tokens": 64, "enforce_eager": not CUDA} | args
        self.llm, self.path = make_engine(path, env={"VLLM_USE_V2_MODEL_RUNNER": "1"}, **args), path
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler, worker = core.scheduler, core.model_executor.driver_worker.worker
        self.runner, self.riding = worker.model_runner, worker.smc_runner.model.riding
        self.model, self.manager, self.buffers = self.runner.model, self.runner.cudagraph_manager, None
        self.calls, self.replays, self.rides = [], [], 0
        schedule = self.scheduler.schedule

        def look(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self.rides += bool(output.num_scheduled_tokens and output.smc.groups)
            return output

        self.scheduler.schedule = look
        self.model.register_forward_pre_hook(self._called, with_kwargs=True)
        self.model.register_forward_hook(self._gave)

    def _called(self, module, args, kwargs):
        context, n = get_forward_context(), len(kwargs["input_ids"])
        mode, slots = context.cudagraph_runtime_mode, next(iter(context.slot_mapping.values()))
        self.calls.append((mode, n))
        if mode == CUDAGraphMode.PIECEWISE:
            assert context.batch_descriptor.num_tokens == n in SIZES and len(slots) == n
            assert torch.equal(context.is_padding, slots == -1)
            for name in ("input_ids", "positions"):
                assert kwargs[name].data_ptr() == getattr(self.runner.input_buffers, name).data_ptr()

    def _gave(self, module, args, hidden):
        if self.calls[-1][0] != CUDAGraphMode.PIECEWISE:
            return hidden
        if self.buffers is None:
            self.buffers = torch.empty(max(SIZES), hidden.shape[1])
        self.buffers[: len(hidden)] = hidden
        return self.buffers[: len(hidden)]

    def act_graphs(self, monkeypatch):
        """Has sizes count as captured until the test ends."""
        runner, manager, kept = self.runner, self.manager, []
        prepare = runner.model_state.prepare_attn
        config = SimpleNamespace(cudagraph_capture_sizes=SIZES, max_cudagraph_capture_size=SIZES[-1])
        for name, value in {
            "compilation_config": config, "cudagraph_mode": CUDAGraphMode.FULL_AND_PIECEWISE,
            "_candidates": {}, "_capture_descs": {}, "_graphs_captured": True,
        }.items():  # fmt: skip
            monkeypatch.setattr(manager, name, value)
        manager._init_candidates()

        def keep(batch, mode, tables, slots, *args, **kwargs):
            metadata = prepare(batch, mode, tables, slots, *args, **kwargs)
            kept[:] = [metadata, slots[0]]
            return metadata

        def replay(desc):
            self.replays.append(desc.num_tokens)
            metadata, slots = kept
            inputs = {
                name: getattr(runner.input_buffers, name)[: desc.num_tokens] for name in ("input_ids", "positions")
            }
            with set_forward_context(metadata, runner.vllm_config, slot_mapping=dict.fromkeys(metadata, slots)):
                return self.model(**inputs, intermediate_tensors=None, inputs_embeds=None)

        monkeypatch.setattr(runner.model_state, "prepare_attn", keep)
        monkeypatch.setattr(manager, "run_fullgraph", replay)

    def beside(self, requests, bound, monkeypatch, ordinary=ORDINARY):
        """The populations of requests that come to others which decode already; both are right."""
        scheduler, free = self.scheduler, self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        monkeypatch.setattr(scheduler, "_pace", Pace(bound, scheduler._pace._logger))
        alone = Run(self.llm, [], ordinary)
        alone.to_the_end()
        scheduler.reset_prefix_cache()
        both = Run(self.llm, [], ordinary)
        for _ in range(3):
            both.step()
        self.calls, self.replays, self.rides = [], [], 0
        both.ids = [both.add(self.llm._prompt(r.prompt), r.lead(self.llm, both.names)) for r in requests]
        step_until(both, lambda: set(both.ids) <= set(both.outputs))
        seen = list(self.calls), list(self.replays), self.rides
        got = both.to_the_end()
        for ours, theirs in zip(both.others, alone.others, strict=True):
            assert both.outputs[ours].outputs[0].token_ids == alone.outputs[theirs].outputs[0].token_ids
        for request, population in zip(requests, got, strict=True):
            for i, want in enumerate(hf_log_probs(self.path, request.prompt, population.token_ids)):
                assert np.abs(population.token_log_probs[i][: len(want)] - want).max() <= 5e-4
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free and not scheduler._groups
        # vLLM's objects are as they were
        assert self.runner.model is self.model and "dispatch" not in vars(self.manager)
        return got, seen


def requests(n_steps=9):
    return [
        Request(prompt_of(14), TableTwist(3 * VALUE), n_particles=8, max_tokens=n_steps, ess_threshold=1.0, seed=1),
        Request(prompt_of(31), n_particles=5, max_tokens=n_steps + 3, seed=2),
    ]


@pytest.fixture(scope="module")
def engine(tiny_path):
    return Engine(tiny_path)


@runs
@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=acted)])
@pytest.mark.parametrize("bound", [5, "all"])
def test_beside_requests_that_decode(engine, monkeypatch, bound, graphs):
    """Cut or whole: each is what it is alone, in no more passes than the longer of both needs."""
    want = each_alone(engine.llm, requests())
    if graphs:
        engine.act_graphs(monkeypatch)
    got, (calls, replays, rides) = engine.beside(requests(), bound, monkeypatch)
    if not CUDA:
        identical(got, want)
    by_mode = [sum(mode == of for mode, _ in calls) for of in (CUDAGraphMode.NONE, CUDAGraphMode.PIECEWISE)]
    if bound == "all":
        # both groups' prefill, their first step, which has a turn of its own, and eleven that ride
        assert len(calls) == 1 + 1 + 11 and rides == 11 and not replays
        if graphs:
            assert by_mode == [2, 11] and {n for mode, n in calls if mode == CUDAGraphMode.PIECEWISE} <= {8, 16}
    else:
        assert rides > 15
        if graphs:  # as many replays as steps without riders
            assert by_mode[1] >= rides - 2 and len(replays) <= 2


@runs
def test_asynchronous_scheduling(tiny_path, monkeypatch):
    """The next step is scheduled before this one's result is there: riders wait for it, ordinary requests do not."""
    if not CUDA:
        from vllm.config import VllmConfig

        from fastsmc.vllm import scheduler

        monkeypatch.setattr(VllmConfig, "max_concurrent_batches", property(lambda config: 2))
        monkeypatch.setattr(scheduler, "SMCScheduler", scheduler.AsyncSMCScheduler)
    engine = Engine(tiny_path)
    core = engine.llm.llm_engine.engine_core.engine_core
    assert core.step_fn == core.step_with_batch_queue
    want = each_alone(engine.llm, requests())
    if not CUDA:
        engine.act_graphs(monkeypatch)
    got, (_, replays, rides) = engine.beside(requests(), 5, monkeypatch)
    assert rides > 15
    if not CUDA:
        identical(got, want)
        assert len(replays) >= rides - 2  # one step rides, the next replays a graph


@acted
def test_padding_writes_nothing_where_vllm_writes_the_cache(tiny_path, monkeypatch):
    """On its Triton backend the slots of a padded batch say where keys and values go."""
    monkeypatch.setitem(attention.BACKENDS, "cpu", {"CPU_ATTN": attention.BACKENDS["cuda"]["TRITON_ATTN"]})
    engine = Engine(tiny_path, block_size=16)
    engine.act_graphs(monkeypatch)
    caches = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.smc_runner.model.caches
    one = [Request(prompt_of(4), TableTwist(VALUE), n_particles=2, max_tokens=3, ess_threshold=1.0, seed=1)]
    ordinary = [(prompt_of(2), SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True))]
    _, (calls, _, rides) = engine.beside(one, "all", monkeypatch, ordinary)
    # the group's prefill, which vLLM runs by pieces, and two steps that ride
    assert rides == 2 and sum(mode == CUDAGraphMode.PIECEWISE for mode, _ in calls) == 3
    assert len(caches) == 2 and not any(cache[0].any() for cache in caches)  # nor into vLLM's null block


@runs
def test_a_size_that_is_not_captured_runs_without_graphs(engine, monkeypatch):
    riding, manager = engine.riding, engine.manager
    for breakable, mode, n, want in (
        (False, CUDAGraphMode.FULL_AND_PIECEWISE, 11, 16),
        (False, CUDAGraphMode.FULL_AND_PIECEWISE, 33, None),
        (False, CUDAGraphMode.FULL, 11, None),  # which would fit, but hold no attention in parts
        (False, CUDAGraphMode.NONE, 11, None),
        (True, CUDAGraphMode.FULL_AND_PIECEWISE, 11, None),
    ):
        with monkeypatch.context() as patch:
            engine.act_graphs(patch)
            patch.setattr(manager, "use_breakable_cg", breakable)
            for name, value in {"cudagraph_mode": mode, "_candidates": {}}.items():
                patch.setattr(manager, name, value)
            manager._init_candidates()
            assert riding._find_captured(n) == want
            patch.setattr(engine.runner, "input_buffers", SimpleNamespace(input_ids=range(15)))
            assert riding._find_captured(n) is None
