"""What a machine lets an engine have, with made-up figures: memory nodes, control groups, cores, /dev/shm, caches."""

import os
import subprocess
import sys
import textwrap

import pytest

from fastsmc import models
from fastsmc.vllm import capacity, machine
from fastsmc.vllm.capacity import Need, Rank
from fastsmc.vllm.machine import Core

GIB = 1 << 30
NEED = Need(step=GIB // 2, least=GIB // 4, useful=100 * GIB, words="one sequence of max_model_len=512")


def rank(node=0, node_free=20, host_free=20, group_free=None, host="a"):
    group = None if group_free is None else int(group_free * GIB)
    return Rank(host, node, int(node_free * GIB), int(host_free * GIB), group)


@pytest.mark.parametrize(
    ("ranks", "size"),
    [
        ([rank()], 0.3 * 20),  # of the machine
        ([rank(node_free=5.45, host_free=23)], 0.5 * 5.45),  # a small first node
        ([rank(node=1, node_free=30, host_free=8)], 0.3 * 8),  # a node cannot have more than the machine
        ([rank(group_free=4)], 0.5 * 4),
        ([rank(node=0), rank(node=0)], 0.3 * 10),
        ([rank(node=0, node_free=8), rank(node=0, node_free=8)], 0.5 * 4),  # two ranks share their node
        ([rank(node=0, host_free=64), rank(node=1, node_free=6, host_free=64)], 0.5 * 6),  # the poorer of two decides
        ([rank(node=0, node_free=30, host_free=40), rank(node=1, node_free=30, host_free=40)], 0.3 * 20),  # the machine
        ([rank(node=0, group_free=6), rank(node=1, group_free=6)], 0.5 * 3),  # and the control group are shared
        ([rank(host="a"), rank(host="b", node_free=8)], 0.5 * 8),  # node 0 of another machine is another node
    ],
)
def test_cache_takes_its_share_of_what_is_free(ranks, size):
    assert capacity.kv_cache_bytes(ranks, NEED) == pytest.approx(size * GIB, abs=2)


def test_cache_is_no_more_than_useful_and_no_less_than_the_least():
    assert capacity.kv_cache_bytes([rank()], NEED._replace(useful=GIB)) == GIB
    over_its_share = NEED._replace(least=700 << 20)
    assert capacity.kv_cache_bytes([rank(node_free=1.25)], over_its_share) == 700 << 20
    assert capacity.kv_cache_bytes([rank(node_free=0.75)], NEED) == GIB // 4  # to the last byte: least and step
    size = capacity.kv_cache_bytes([rank(node_free=10)], NEED._replace(step=9 * GIB))
    assert size == GIB  # a step's room is left


@pytest.mark.parametrize(
    ("ranks", "where"),
    [
        ([rank(node_free=0.74)], "memory node 0 has 0.74 GiB free; "),
        ([rank(node=3, node_free=0)], "memory node 3 has 0.00 GiB free; "),
        ([rank(node_free=1.4), rank(node_free=1.4)], "memory node 0 has 1.40 GiB free for 2 ranks; "),
        ([rank(), rank(node=1, node_free=0.5)], "memory node 1 has 0.50 GiB free; "),
        ([rank(host_free=0.3)], "the machine has 0.30 GiB free; "),
        ([rank(group_free=0.2)], "the control group has 0.20 GiB free; "),
    ],
)
def test_what_does_not_fit_is_said_in_one_line_with_the_figures(ranks, where):
    with pytest.raises(ValueError, match="no room for a KV cache") as error:
        capacity.kv_cache_bytes(ranks, NEED)
    text = str(error.value)
    assert where in text and "\n" not in text
    assert "0.25 GiB for the smallest cache (one sequence of max_model_len=512) and 0.50 GiB for a step" in text


def test_bytes_of_a_step():
    # 1024 rows, V = 49152 in bf16: 2 + 4 + 8 bytes each; of 4096 tokens' logits at most 2^27, 6 bytes each
    assert capacity.whole_step_bytes(1024, 4096, 49152, 576, 1536, 2) == 1024 * 49152 * 14 + (1 << 27) * 6
    # here the activations, and the logits and hidden states that a half pass keeps
    assert capacity.whole_step_bytes(1, 8192, 10, 1000, 4000, 4) == (10 + 1000) * 4 + 8192 * 16000 * 4


# ------------------------------------------------------------------------------------------------------ control groups
def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def groups(tmp_path, lines, files):
    write(tmp_path, {"cgroup": "\n".join(lines), **{f"fs/{name}": text for name, text in files.items()}})
    where = str(tmp_path / "cgroup"), str(tmp_path / "fs")
    return machine.group_memory_free(*where), machine.group_cores(*where)


V2 = {
    "job/memory.max": "4000\n",
    "job/memory.current": "1500\n",
    "job/memory.stat": "anon 900\ninactive_file 500\n",
    "job/step/memory.max": "max\n",
    "job/step/memory.current": "1400\n",
    "job/step/cpu.max": "max 100000\n",
    "job/cpu.max": "150000 100000\n",
}
V1 = {
    "memory/job/memory.limit_in_bytes": "4000\n",
    "memory/job/memory.usage_in_bytes": "1000\n",
    "memory/job/memory.stat": "inactive_file 1\ntotal_inactive_file 100\n",
    "memory/memory.limit_in_bytes": "9223372036854771712\n",
    "memory/memory.usage_in_bytes": "10\n",
    "cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n",
    "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
    "cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
    "cpu,cpuacct/cpu.cfs_period_us": "100000\n",
}


@pytest.mark.parametrize(
    ("lines", "files", "memory", "cores"),
    [
        (["0::/job/step"], V2, 3000, 1.5),  # the limit of a group above
        (["0::/"], {"memory.max": "700", "memory.current": "900"}, 0, None),  # a container's own view
        (["0::/job/of/the/host"], {"memory.max": "700", "memory.current": "100"}, 600, None),  # the host's path in it
        (["5:memory:/job", "3:cpu,cpuacct:/job", "0::/"], V1, 3100, 4.0),
        (["4:memory:/elsewhere"], V1, None, None),
        ([], {}, None, None),
    ],
)
def test_control_groups(tmp_path, lines, files, memory, cores):
    assert groups(tmp_path, lines, files) == (memory, cores)


def test_this_machines_control_groups_can_be_read():
    assert (machine.group_memory_free() or 1) > 0 and (machine.group_cores() or 1) > 0
    assert machine.group_memory_free("/no/such/file") is None


# ------------------------------------------------------------------------------------------------------------- threads
def cores(*nodes, smt=1):
    """Cores of nodes with so many physical cores; sibling ids lie apart, as on x86."""
    total = sum(nodes)
    flat = [(node, i) for i, node in enumerate(node for node, n in enumerate(nodes) for _ in range(n))]
    return [Core(i + total * k, i, node) for k in range(smt) for node, i in flat]


BIND, THREADS = "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"


@pytest.mark.parametrize(
    ("cpus", "nodes", "ranks", "quota", "env", "expected"),
    [
        (cores(2), [0], 1, None, {}, {BIND: "0,1"}),  # all of a small machine
        (cores(2), [0], 1, 8.0, {}, {BIND: "0,1"}),  # a quota above it is none
        (cores(4, smt=2), [0], 1, None, {}, {BIND: "4,5,6,7"}),  # one per physical core, as vLLM has it
        (cores(5), [0], 1, None, {}, {}),  # vLLM's choice on larger ones
        (cores(2), [0], 2, None, {}, {BIND: "0|1"}),  # vLLM refuses: one node for two ranks
        (cores(8), [0], 3, None, {}, {BIND: "0,1|2,3,4|5,6,7"}),
        (cores(4, 4), [0, 1], 2, None, {}, {BIND: "0,1,2,3|4,5,6,7"}),
        (cores(4, 4), [1], 1, None, {}, {BIND: "4,5,6,7"}),  # the visible node
        (cores(2, 2, 2), [0, 2], 2, None, {}, {BIND: "0,1|4,5"}),
        (cores(0, 4), [0, 1], 2, None, {}, {BIND: "0,1|2,3"}),  # a node without cores is none
        (cores(1), [0], 2, None, {}, {BIND: "nobind", THREADS: "1"}),
        (cores(64), [0], 1, 2.5, {}, {BIND: "nobind", THREADS: "2"}),  # a container
        (cores(64), [0], 4, 2.0, {}, {BIND: "nobind", THREADS: "1"}),
        (cores(8), [0], 1, 0.4, {}, {BIND: "nobind", THREADS: "1"}),
        (cores(8), [0], 1, None, {THREADS: "3"}, {BIND: "nobind"}),  # the user's number, which vLLM would overrule
        (cores(8), [0], 1, 2.0, {THREADS: "3"}, {BIND: "nobind"}),
        (cores(4), [0], 1, None, {THREADS: "4"}, {BIND: "0,1,2,3"}),  # all there are
        (cores(2), [0], 1, 1.0, {BIND: "0"}, {}),
        (cores(2), [0], 2, None, {"VLLM_CPU_NUM_OF_RESERVED_CPU": "1"}, {}),
    ],
)
def test_threads(cpus, nodes, ranks, quota, env, expected):
    settings = machine.thread_settings(cpus, nodes, ranks, quota, env)
    blocktime = settings.pop("KMP_BLOCKTIME", None)
    assert settings == expected and (blocktime == "5") == (expected.get(BIND) == "nobind")


def test_shared_memory(tmp_path):
    assert machine.shm_free(str(tmp_path)) > 0 and machine.shm_free(str(tmp_path / "absent")) == 0
    multi = "VLLM_ENABLE_V1_MULTIPROCESSING"
    assert machine.process_settings(256 << 20, 1, {}) == machine.process_settings(256 << 20, 2, {}) == {}
    assert machine.process_settings(64 << 20, 1, {}) == {multi: "0"}  # what Docker gives by default
    assert machine.process_settings(0, 1, {multi: "1"}) == {}
    with pytest.raises(ValueError, match=r"tensor_parallel_size=2: .* 248 MiB of /dev/shm, which has 8 MiB free"):
        machine.process_settings(8 << 20, 2, {})


# -------------------------------------------------------------------------------------------------------------- caches
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can write")
def test_caches_without_a_home_that_can_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert models.cache_dir() == tmp_path / "own" / "fastsmc" and models.cache_settings() == {}
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc/self/nobody")
    fallback = tmp_path / f"fastsmc-{os.getuid()}"
    assert models.cache_dir() == fallback / "fastsmc" and fallback.stat().st_mode & 0o777 == 0o700
    settings = models.cache_settings()
    assert settings["XDG_CACHE_HOME"] == str(fallback) and settings["TRITON_CACHE_DIR"] == str(fallback / "triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/elsewhere")
    assert "TRITON_CACHE_DIR" not in models.cache_settings()
    fallback.chmod(0o777)  # somebody else's files could be in it
    with pytest.raises(PermissionError, match="must belong to this user alone"):
        models.cache_dir()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can write")
def test_a_model_is_found_where_nobody_can_write(tmp_path, monkeypatch):
    """One that an administrator has put there; nothing is unpacked beside it."""
    target = tmp_path / "fastsmc" / models.NAME
    target.mkdir(parents=True)
    (target / models.MANIFEST).write_text(f'{{"recipe": {models.RECIPE}, "files": {{}}}}')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models, "_writable", lambda path: False)
    monkeypatch.setattr("tempfile.tempdir", "/proc/self")
    assert models.smollm2() == target


# -------------------------------------------------------------------------------------------------------------- worker
WORKER = """
    import sys, types
    from vllm.config import CacheConfig
    from vllm.utils.cpu_resource_utils import LogicalCPUInfo, MemoryNodeInfo
    import vllm.v1.worker.cpu_worker as theirs
    from fastsmc.vllm import worker_cpu as ours

    GIB, cpus, visible = 1 << 30, [LogicalCPUInfo(0, 0, 0)], [0, 1]
    nodes = {0: 4, 1: 30}
    info = lambda node: MemoryNodeInfo(16 * GIB, nodes[node] * GIB)
    for module in (theirs, ours):
        module.get_allowed_cpu_list = lambda: cpus
        module.get_visible_memory_node = lambda: visible
        module.get_memory_node_info = info
    class Init(Exception): ...
    def base(self, *args, **kwargs): raise Init
    theirs.Worker.__init__ = base  # all that comes after vLLM's check
    theirs.torch = types.SimpleNamespace(ops=types.SimpleNamespace(_C=types.SimpleNamespace(
        init_cpu_memory_env=lambda nodes: None)))

    def start(**cache):
        worker, config = ours.SMCCPUWorker.__new__(ours.SMCCPUWorker), CacheConfig(**cache)
        asked = config.gpu_memory_utilization
        try: worker.__init__(types.SimpleNamespace(cache_config=config), 0, 0, "")
        except Init: outcome = worker._sizes_cache
        except ValueError as error: outcome = str(error)
        assert config.gpu_memory_utilization == asked
        return outcome

    assert start() is True                                     # 4 of 16 GiB free, and 0.92 is only vLLM's default
    assert start(num_gpu_blocks_override=9) is True
    assert start(kv_cache_memory_bytes=GIB) is False           # the user's sizes and vLLM's checks
    assert start(gpu_memory_utilization=0.2) is False
    assert "less than desired CPU memory utilization" in start(gpu_memory_utilization=0.9)
    assert ours._memory_node() == 0
    cpus[0] = LogicalCPUInfo(0, 0, 2)                          # a node without memory: not among the visible ones
    assert ours._memory_node() == 0
    worker = ours.SMCCPUWorker.__new__(ours.SMCCPUWorker)
    worker._bound_node, cpus[0] = 0, LogicalCPUInfo(8, 8, 1)   # memory bound to node 0, threads to cores of node 1
    rank = worker._measure_rank()
    assert (rank.node, rank.node_free) == (0, 4 * GIB) and rank.host_free > 0
"""


def test_worker_sizes_the_cache_only_where_nobody_else_did():
    """In a process of its own: vLLM's functions are replaced by faked figures."""
    pytest.importorskip("vllm")
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("the CPU worker must not be imported on a GPU")
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
