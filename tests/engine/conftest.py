"""Real vLLM engines over the tiny random Llama, float32. One lives in this process, so that tests can look inside."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreted_vllm  # noqa: F401  before vLLM looks for Triton

pytest.importorskip("vllm", reason="vLLM is not installed")

from intervened import EACH
from tiny import make_llama

from fastsmc.interventions import save

VOCAB = 8
TINY_ARGS = dict(
    dtype="float32",
    skip_tokenizer_init=True,
    enforce_eager=True,
    max_model_len=512,
    max_num_seqs=1024,
    max_num_batched_tokens=1024,
    kv_cache_memory_bytes=1 << 27,
    disable_log_stats=True,
    # engines live side by side, and each asks at its start for so much of the card to be free
    **({"gpu_memory_utilization": 0.5} if torch.cuda.is_available() else {}),
)


#: engines live to the end: when one is shut down, vLLM takes the process-wide state of the others with it
_ENGINES = []


def make_engine(path, in_process: bool = True, env: dict[str, str] | None = None, **args):
    from vllm import envs

    from fastsmc import LLM
    from fastsmc.vllm.starting import environment

    envs.disable_envs_cache()  # an engine that started earlier in this process has frozen them
    with environment({"VLLM_ENABLE_V1_MULTIPROCESSING": "0" if in_process else "1", **(env or {})}):
        _ENGINES.append(LLM(str(path), **{"interventions": True, **TINY_ARGS, **args}))
    assert _ENGINES[-1]._in_process() == in_process
    return _ENGINES[-1]


@pytest.fixture(scope="package", autouse=True)
def shut_down():
    """Ends the engines of this folder after its last test: together they hold 10 GiB."""
    yield
    while _ENGINES:
        _ENGINES.pop().llm_engine.engine_core.shutdown()


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.fixture(scope="session")
def named(tmp_path_factory):
    """The option `interventions`: "steer", which reaches prompts."""
    path = tmp_path_factory.mktemp("named") / "steer.safetensors"
    save([EACH["steer"], EACH["steer generated"]], path)
    return {"steer": str(path)}


@pytest.fixture(scope="session")
def engine(tiny_path):
    """`fastsmc.LLM` with the engine core in this process."""
    return make_engine(tiny_path)


@pytest.fixture(scope="session")
def small_engine(tiny_path, named):
    """40 KV blocks and 64 rows."""
    return make_engine(tiny_path, num_gpu_blocks_override=41, max_num_seqs=64, interventions=named)


@pytest.fixture(scope="session")
def process_engine(tiny_path):
    """The engine core in its own process, vLLM's default; prompts longer than 64 tokens are prefilled in chunks, and
    nobody says how large the KV cache is."""
    return make_engine(
        tiny_path,
        in_process=False,
        max_num_batched_tokens=64,
        max_num_seqs=32,
        enable_chunked_prefill=True,
        kv_cache_memory_bytes=None,
    )


@pytest.fixture(scope="session")
def compiled(tiny_path):
    return make_engine(tiny_path, enforce_eager=False, max_num_seqs=64, max_num_batched_tokens=64)


@pytest.fixture(scope="session")
def scheduler(engine):
    return engine.llm_engine.engine_core.engine_core.scheduler


@pytest.fixture(scope="session")
def runner(engine):
    return engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.smc_runner


@pytest.fixture
def all_blocks_back(engine, scheduler, runner):
    """After the test every KV block is free again, and nothing of a group is left.

    A worker hears with the next step which requests have ended, so one is made where it was not told.
    """
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    yield
    if scheduler.has_finished_requests():
        engine.llm_engine.step()
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    assert not scheduler._groups and not scheduler.running and not scheduler.waiting
    assert not runner.groups and not runner.tables._groups
