"""What decides whether an engine starts on a GPU, and with how much memory, where there is no GPU to try it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from fastsmc.ops._tensors import GPU_OPS, missing_on_gpu
from fastsmc.vllm import capacity

ROOT = Path(__file__).resolve().parents[1]
GIB = 1 << 30
IMPORTS = """
import importlib, sys, torch
MODULES = "worker attention attention.gpu attention.costs scheduler llm model ranks runner request messages capacity"
for name in MODULES.split() + ["warm_up", "riding", "batch_bits"]:
    importlib.import_module(f"fastsmc.vllm.{name}")
from fastsmc.vllm import compat
from fastsmc.vllm.starting import engine_args
compat.check_names = lambda device: None  # it probes what the platform of this machine has
from vllm.platforms import current_platform
kind = type(current_platform)
kind.is_cpu, kind.is_cuda, kind.device_type = (lambda self: False), (lambda self: True), "cuda"
path, name = engine_args({})["worker_cls"].rsplit(".", 1)
assert path == "fastsmc.vllm.worker"
from vllm.v1.worker.gpu_worker import Worker
assert issubclass(getattr(importlib.import_module(path), name), Worker)
"""
CHECKS = """
stubs = sorted({"vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu.shm"} & sys.modules.keys())
for name in ("cuda.current_stream", "cuda.stream", "cuda.Stream", "cuda.Event", "cuda.synchronize",
             "accelerator.synchronize", "accelerator.empty_cache", "accelerator.get_memory_info"):
    owner, member = name.split(".")
    found = getattr(getattr(torch, owner), member)
    if not found.__module__.startswith("torch"):
        stubs.append(name)
stubs += [name for name in ("pin_memory", "record_stream") if hasattr(getattr(torch.Tensor, name), "__code__")]
print("stubs:", stubs)
"""


def run_python(code):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_what_a_cuda_machine_imports_leaves_torch_alone():
    """vLLM's CPU worker replaces torch.cuda's streams and events by stubs when it is imported."""
    assert "stubs: []" in run_python(IMPORTS + CHECKS)
    told = run_python("import sys, torch, fastsmc.vllm.worker_cpu" + CHECKS)  # the checks can fail
    for stub in ("vllm.v1.worker.cpu_worker", "cpu.shm", "cuda.current_stream", "cuda.Event", "pin_memory"):
        assert stub in told


@pytest.mark.parametrize(
    ("rows", "vocab", "hidden", "element", "gib"),
    [
        (1024, 128256, 4096, 2, 1.05),
        (4096, 128256, 4096, 2, 4.01),
        (256, 49152, 576, 4, 0.16),
        (4096, 2048, 8192, 4, 0.22),  # as a model of audio codes: what a half pass keeps is more than its log ψ
        (1, 8, 8, 2, 0.0625),
    ],
)
def test_bytes_of_a_step(rows, vocab, hidden, element, gib):
    needed = capacity.unprofiled_step_bytes(rows, vocab, hidden, element)
    assert needed / GIB == pytest.approx(gib, rel=0.03)
    assert needed >= 2 * 4 * rows * vocab + 528 * 64 * 256 * 4  # log ψ twice, attend's parts
    assert needed >= element * rows * (vocab + hidden) + 528 * 64 * 256 * 4  # logits and hidden states of a half pass


@pytest.mark.parametrize(
    ("available", "rows", "left", "warns"),
    [
        (60.0, 1024, 58.95, False),  # 80 GB, Llama-3.1-8B
        (60.0, 4096, 56.01, False),
        (4.5, 1024, 3.45, False),  # 24 GB, the same model
        (4.5, 4096, 2.25, True),  # half stays a KV cache
        (1.0, 1024, 0.5, True),
        (0.0, 1024, 0.0, True),
        (-1.0, 1024, -1.0, True),  # vLLM's own error names it
    ],
)
def test_room_that_is_left(available, rows, left, warns):
    got, warning = capacity.leave_room(int(available * GIB), capacity.unprofiled_step_bytes(rows, 128256, 4096, 2))
    assert got / GIB == pytest.approx(left, abs=0.02)
    assert (warning is not None) == warns
    if warns:
        assert f"{available:.2f} GiB" in warning and "lower max_num_seqs" in warning and "\n" not in warning


@pytest.mark.parametrize(
    ("asked", "left"), [(None, 10 * GIB - capacity.unprofiled_step_bytes(1024, 2048, 8192, 4)), (3 * GIB, 3 * GIB)]
)
def test_the_worker_leaves_it_unless_the_user_has_sized_the_cache(monkeypatch, asked, left):
    from vllm.v1.worker import gpu_worker

    from fastsmc.vllm.worker import SMCGPUWorker

    monkeypatch.setattr(gpu_worker.Worker, "determine_available_memory", lambda self: asked or 10 * GIB)
    worker = SMCGPUWorker.__new__(SMCGPUWorker)
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=asked)
    worker.scheduler_config = SimpleNamespace(max_num_seqs=1024)
    worker.model_config = SimpleNamespace(
        get_vocab_size=lambda: 2048, get_hidden_size=lambda: 8192, dtype=torch.float32
    )
    assert worker.determine_available_memory() == left


def test_groups_are_prepared_before_vllm_watches_what_is_compiled(monkeypatch):
    from vllm.v1.worker import gpu_worker

    from fastsmc.vllm import worker as ours

    order = []
    monkeypatch.setattr(ours, "make_runner", lambda runner: order.append(runner))
    monkeypatch.setattr(gpu_worker.Worker, "compile_or_warm_up_model", lambda self: order.append("vLLM") or "times")
    worker = ours.SMCGPUWorker.__new__(ours.SMCGPUWorker)
    worker.model_runner = "groups"
    assert worker.compile_or_warm_up_model() == "times" and order == ["groups", "vLLM"]


def test_kernels_that_are_missing_are_named():
    assert missing_on_gpu(["cpu", "torch", "cuda", "triton"]) is None
    without = missing_on_gpu(["cpu", "torch", "triton"])
    assert re.search("without CUDA.*nvcc.*uniforms, resample, reindex run on a GPU as PyTorch operations", without)
    assert "triton" not in without
    assert re.search(
        "triton is not installed: weigh, draw, redraw, intervene run on a GPU", missing_on_gpu(["cpu", "torch", "cuda"])
    )
    picked = {}
    for path in (ROOT / "fastsmc" / "ops").glob("[!_]*.py"):
        for gpu in set(re.findall(r'pick_backend\([^"]*"(\w+)"', path.read_text())):
            picked.setdefault(gpu, set()).add(path.stem)
    assert picked == {gpu: set(names) for gpu, names in GPU_OPS.items()} | {
        "torch": {"settle", "redraw"}  # which have no kernel there: of redraw.py redraw_logits and gumbel
    }


def test_info_shows_them(monkeypatch, capsys):
    from fastsmc import cli

    found = cli.gather_info()
    for missing, shown in (("something: weigh runs slowly", True), (None, False)):
        monkeypatch.setattr(cli, "gather_info", lambda missing=missing: found | {"missing_on_gpu": missing})
        assert cli.main(["info"]) == 0
        assert ("on a gpu    something: weigh" in capsys.readouterr().out) == shown


def test_what_is_logged_is_shown_by_vllms_handlers():
    from vllm.logger import DEFAULT_LOGGING_CONFIG

    from fastsmc.vllm import compat

    above = compat.get_logger("fastsmc.vllm.llm").name.split(".")[0]
    assert DEFAULT_LOGGING_CONFIG["loggers"][above]["handlers"]
    for path in (ROOT / "fastsmc" / "vllm").rglob("*.py"):
        made = re.findall(r"^logger = (.*)$", path.read_text(), re.MULTILINE)
        assert set(made) <= {"get_logger(__name__)"}, path.name
