"""vLLM's decode graphs for rows of groups: what is asked for, what is written before a replay, what comes out.

Nothing is recorded without a GPU. On the interpreter (test_attend_gpu.py starts that process) everything else is real:
vLLM's V2 runner, its buffers, its manager with its descriptors and its preparation of a capture. A replay then calls
what would have been recorded, with the metadata of the time of capture, over whatever the buffers hold.
"""

from types import SimpleNamespace

import pytest
import torch
from backends import CUDA, INTERPRETED
from tiny import PROMPT, TableTwist, value_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vllm import SamplingParams
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu import cudagraph_utils
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager, ModelCudaGraphManager
from vllm.v1.worker.gpu.input_batch import InputBuffers

from fastsmc import SMCParams
from fastsmc.potentials import Infill
from fastsmc.smc.captured import CapturedGroup
from fastsmc.vllm import graphs
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.captured import CapturedModel
from fastsmc.vllm.passes import Batch

from .conftest import VOCAB, make_engine
from .test_engine import prompt_of
from .test_groups import Request, Run, run

VALUE = value_table(100, VOCAB)


# -------------------------------------------------------------------------------- what is written, and what is asked
class Manager:
    """Answers `dispatch` with the next size of 4, 8 of a mode, and keeps what it was asked."""

    def __init__(self, *modes):
        self.modes, self.asked, self.hidden = modes, [], torch.randn(8, 3)

    def dispatch(self, **asked):
        self.asked.append(asked)
        n = asked["num_tokens"]
        size = next((m for m in (4, 8) if m >= n), None)
        for mode in self.modes if size else ():
            if mode == CUDAGraphMode.PIECEWISE:
                return BatchExecutionDescriptor(mode, size, None)
            if asked["uniform_token_count"] == 1:
                return BatchExecutionDescriptor(mode, size, size, 1)
        return BatchExecutionDescriptor(CUDAGraphMode.NONE, n, asked["num_reqs"])

    def run_fullgraph(self, desc):
        self.ran = desc
        return self.hidden[: desc.num_tokens]


def make(*modes, dirty=None, device="cpu"):
    """(graphs, runner, what was built) over buffers full of what an earlier step has left."""
    tables = SimpleNamespace(
        input_block_tables=[torch.full((8, 6), 99, dtype=torch.int32, device=device)],
        slot_mappings=torch.full((1, 12), 77, device=device),
    )
    if dirty is not None:
        tables._num_dirty_rows = dirty
    buffers = InputBuffers(8, 12, torch.device(device))
    for name in ("input_ids", "positions", "query_start_loc", "seq_lens"):
        getattr(buffers, name).fill_(55)
    runner = SimpleNamespace(input_buffers=buffers, block_tables=tables, cudagraph_manager=Manager(*modes))
    starts = torch.arange(10, dtype=torch.int32)
    built = []
    made = graphs.DecodeGraphs(runner, ["layer"], built.append, lambda batch: None, (starts, starts.to(device)))
    return made, runner, built


def batch_of(n, **rest):
    table = torch.arange(2 * n, dtype=torch.int32).view(n, 2) + 10
    slots = table[:, 1].long() * 16 + 3
    lengths = torch.full((n,), 20, dtype=torch.int32)
    return Batch(torch.arange(n) + 1, torch.full((n,), 19), slots, table, lengths, 20, **rest)


@pytest.mark.parametrize("n, size", [(3, 4), (4, 4), (5, 8)])
def test_rows_are_padded_in_the_buffers_of_a_full_graph(n, size):
    made, runner, built = make(CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, dirty=7)
    batch, manager, b, t = batch_of(n), runner.cudagraph_manager, runner.input_buffers, runner.block_tables
    hidden = made.hidden(batch)
    asked = {"num_reqs": n, "num_tokens": n, "uniform_token_count": 1, "num_active_loras": 0, "max_query_len": 1}
    assert manager.asked == [asked] and (manager.ran.num_tokens, manager.ran.num_reqs) == (size, size)
    assert torch.equal(b.input_ids[:n], batch.tokens.int()) and torch.equal(b.positions[:n], batch.positions)
    assert b.is_padding[:size].tolist() == [False] * n + [True] * (size - n)
    assert b.query_start_loc[: size + 1].tolist() == [*range(n + 1), *[n] * (size - n)]
    assert b.seq_lens.tolist() == [20] * n + [0] * (8 - n)
    assert torch.equal(t.input_block_tables[0][:n, :2], batch.table)
    assert not t.input_block_tables[0][n:size].any()
    assert torch.equal(t.slot_mappings[0, :n], batch.slots) and (t.slot_mappings[0, n:] == PAD_SLOT_ID).all()
    assert t._num_dirty_rows == 7
    (common,) = built  # before the replay, over the buffers
    assert (common.num_reqs, common.num_actual_tokens, common.max_query_len, common.max_seq_len) == (size, size, 1, 20)
    assert common.query_start_loc_cpu.tolist() == b.query_start_loc[: size + 1].tolist()
    assert common.seq_lens_cpu_upper_bound.tolist() == [20] * n + [0] * (size - n)
    for name, buffer in (
        ("query_start_loc", b.query_start_loc),
        ("seq_lens", b.seq_lens),
        ("block_table_tensor", t.input_block_tables[0]),
        ("slot_mapping", t.slot_mappings),
    ):
        assert getattr(common, name).data_ptr() == buffer.data_ptr()
    assert len(common.seq_lens) == len(common.block_table_tensor) == len(common.slot_mapping) == size
    want = manager.hidden[:n].clone()
    manager.hidden.zero_()  # the next replay
    assert torch.equal(hidden, want)


class BothSides(TorchDispatchMode):
    """Operations of tensors on the host and on the device: copies that a GPU would make or wait for."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if len({x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}) > 1:
            self.seen.append(str(func))
        return out


def test_nothing_passes_between_host_and_device():
    """Neither as rows are written for a replay, nor in the steps of a captured group: on PyTorch's device without data,
    where reading a number raises."""
    made, runner, built = make(CUDAGraphMode.FULL, device="meta")
    runner.cudagraph_manager.hidden = torch.zeros(8, 3, device="meta")
    batch = Batch(*(x.to("meta") if isinstance(x, torch.Tensor) else x for x in batch_of(3)))

    def forward(batch):
        hidden = made.hidden(batch)
        return torch.zeros(len(batch.tokens), VOCAB, device="meta"), hidden

    caches = [torch.zeros(30, 16, 4, device="meta")]
    model = SimpleNamespace(block_size=16, caches=caches, slot_dim=1, forward=forward)
    pool = torch.arange(2, 30, dtype=torch.int32, device="meta")
    params = SMCParams(n_particles=5, max_tokens=20, proposal="base")
    group = CapturedGroup(params, CapturedModel(model, 17), None, prompt_of(17), [0, 1], pool)
    with BothSides() as both, torch.inference_mode():
        assert made.hidden(batch).shape == (3, 3)
        for _ in range(20):
            group.advance()
    assert not both.seen and len(built) == 21
    assert [common.max_seq_len for common in built[1:]] == [*range(17, 37)]  # known without a look
    assert [common.num_reqs for common in built[1:]] == [4] + [8] * 19  # at first the prompt's last token, twice
    with pytest.raises(RuntimeError, match="meta"):
        group.look()


def test_without_a_graph_the_buffers_stay_as_they_are():
    for made, runner, built in (make(), make(CUDAGraphMode.FULL)):
        whole = runner.cudagraph_manager.modes == (CUDAGraphMode.FULL,)
        batches = [batch_of(3, shared=((0, 3, 1),)), batch_of(3, queries=(1, 1, 1)), batch_of(9)]
        for batch in batches + [batch_of(3)] * (not whole):
            assert made.hidden(batch) is None
        assert not built and (runner.input_buffers.input_ids == 55).all()
        assert (runner.block_tables.slot_mappings == 77).all()
        uniform = [asked["uniform_token_count"] for asked in runner.cudagraph_manager.asked]
        assert uniform[:3] == [None, None, 1]


def test_why_there_are_none():
    def runner(v2=True, device="cuda", captures=True, state="DefaultModelState", aux=False, tables=1):
        return SimpleNamespace(
            vllm_config=SimpleNamespace(use_v2_model_runner=v2),
            device=torch.device(device),
            cudagraph_manager=SimpleNamespace(needs_capture=lambda: captures),
            model_state=type(state, (), {})(),
            use_aux_hidden_state_outputs=aux,
            block_tables=SimpleNamespace(input_block_tables=[None] * tables),
        )

    assert graphs.why_not(runner()) is None
    v1 = SimpleNamespace(vllm_config=SimpleNamespace(use_v2_model_runner=False))  # has none of the others
    assert "V2" in graphs.why_not(v1)
    for other, said in (
        (runner(device="cpu"), "the device is cpu"),
        (runner(captures=False), "enforce_eager"),
        (runner(state="MambaState"), "MambaState prepares inputs"),
        (runner(aux=True), "other layers"),
        (runner(tables=2), "several block tables"),
    ):
        assert said in graphs.why_not(other)


# ----------------------------------------------------------------------------------------- vLLM's own code around it
on_the_interpreter = pytest.mark.skipif(not INTERPRETED or CUDA, reason="needs the interpreter")


REQUESTS = [
    Request(prompt_of(14), TableTwist(3 * VALUE), n_particles=5, max_tokens=4, ess_threshold=0.6, seed=2),
    Request(prompt_of(3), Infill([1, 2]), n_particles=3, max_tokens=1, ess_threshold=0.0, seed=1),
]
GREEDY = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def v2(tiny_path, patch):
    """An engine on vLLM's V2 runner, with a GPU's memory layout."""
    from fastsmc.vllm import attention

    patch.setitem(attention.BACKENDS, "cpu", {"CPU_ATTN": attention.BACKENDS["cuda"]["TRITON_ATTN"]})
    return make_engine(tiny_path, env={"VLLM_USE_V2_MODEL_RUNNER": "1"}, block_size=16, max_model_len=64)


@pytest.fixture(scope="module")
def core(v2):
    return v2.llm_engine.engine_core.engine_core


@pytest.fixture(scope="module")
def plain(v2):
    """What calls of the model give: populations, and the tokens of an ordinary request."""
    output = v2.generate([{"prompt_token_ids": PROMPT}], GREEDY, use_tqdm=False)[0]
    return run(v2, REQUESTS), output.outputs[0].token_ids


@pytest.fixture(scope="module")
def replayed(v2, core, plain, patch):
    """Puts a manager with graphs of 2 and 8 rows behind the runner; (mode, size) of what ran."""
    worker, ran = core.model_executor.driver_worker.worker, []
    runner, model, compilation = worker.model_runner, worker.smc_runner._model, core.vllm_config.compilation_config
    patch.setattr(compilation, "cudagraph_capture_sizes", [2, 8])
    patch.setattr(compilation, "max_cudagraph_capture_size", 8)
    patch.setattr(type(current_platform), "get_global_graph_pool", lambda self: None)
    patch.setattr(cudagraph_utils, "has_compiled_submodule", lambda model: True)

    def capture(self, create_forward_fn, progress_bar_desc):
        """Keeps the call that `CudaGraphManager.capture` would have recorded."""
        for desc in self._capture_descs[CUDAGraphMode.FULL]:
            forward = create_forward_fn(desc, warmup=False)

            def replay(forward=forward, desc=desc):
                ran.append(("FULL", desc.num_tokens))
                forward(CUDAGraphMode.NONE)

            self.graphs[desc] = SimpleNamespace(replay=replay)
            forward(CUDAGraphMode.NONE)  # of the largest first: makes the buffer of the output
        self._graphs_captured = True

    run_pw_graph = CudaGraphManager.run_pw_graph

    def run_pieces(self, model, inputs):
        ran.append(("PIECEWISE", len(inputs["input_ids"])))
        return run_pw_graph(self, model, inputs)

    patch.setattr(CudaGraphManager, "capture", capture)
    patch.setattr(CudaGraphManager, "run_pw_graph", run_pieces)
    manager = ModelCudaGraphManager(
        runner.vllm_config, runner.device, CUDAGraphMode.FULL_AND_PIECEWISE, decode_query_len=1
    )
    with torch.inference_mode():
        manager.capture(
            runner.model, runner.model_state, runner.input_buffers, None, runner.block_tables, runner.attn_groups,
            runner.kv_cache_config,
        )  # fmt: skip
    patch.setattr(runner, "cudagraph_manager", manager)
    patch.setattr(model, "_graphs", model._make_graphs())
    return ran


def close(got, want):
    assert got.token_ids == want.token_ids and (got.ancestors == want.ancestors).all()
    assert abs(got.token_log_probs - want.token_log_probs).max() < 1e-5 and abs(got.log_z - want.log_z) < 1e-5


@on_the_interpreter
@pytest.mark.parametrize("rides", [False, True])
def test_replays_give_what_calls_give(v2, core, plain, replayed, monkeypatch, rides):
    """Over a block boundary, up to six rows in graphs of eight; rows of two queries go piece by piece. Beside an
    ordinary request whose decodes are replays over the same buffers, unless rows ride in them."""
    if not rides:
        monkeypatch.setattr(core.model_executor.driver_worker.worker.smc_runner._model.riding, "why_not", "this test")
        monkeypatch.setattr(core.scheduler, "_rides", False)
    replayed.clear()
    together = Run(v2, REQUESTS, [(PROMPT, GREEDY)])
    for got, want in zip(together.to_the_end(), plain[0], strict=True):
        close(got, want)
    assert together.outputs[together.others[0]].outputs[0].token_ids == plain[1]
    # the ordinary request's, at the least
    assert ("FULL", 8) in replayed and replayed.count(("FULL", 2)) >= (1 if rides else 2)
    assert "PIECEWISE" in {mode for mode, _ in replayed}


@on_the_interpreter
@pytest.mark.parametrize("way", ["PIECEWISE", "captured"])
def test_with_attend_and_by_the_captured_driver(v2, core, plain, replayed, monkeypatch, way):
    replayed.clear()
    runner = core.model_executor.driver_worker.worker.smc_runner
    if way == "PIECEWISE":
        monkeypatch.setattr(runner.model.attend, "costs", {"attend": [1.0] * 4, "stock": [1.0] * 5, "margin": 1e9})
        monkeypatch.setattr(Attend, "may_pay", lambda *args: True)
        monkeypatch.setattr(Attend, "pays", lambda *args, **kwargs: True)
    else:
        monkeypatch.setattr(runner, "_captures", True)
        monkeypatch.setattr(core.scheduler, "_never_shared", True)
        monkeypatch.setattr(TableTwist, "capturable", True)
    (got,) = run(v2, REQUESTS[:1])
    close(got, plain[0][0])
    modes = [mode for mode, _ in replayed]
    assert modes == (["FULL"] + ["PIECEWISE"] * 3 if way == "PIECEWISE" else ["FULL"] * 4)
