"""Many prompts on Ray workers with real engines, and on the command line: the same populations, whoever makes them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tiny import make_llama

pytest.importorskip("ray")
pytest.importorskip("vllm")

import ray
from ray.exceptions import RayTaskError

import fastsmc.ray
from fastsmc import Population, SMCError, SMCParams
from fastsmc.batches import Job, pooled
from fastsmc.potentials import Potential
from fastsmc.ray import Fleet, SMCPredictor, check_room, check_versions, map_prompts, own_versions, share_of
from fastsmc.smc.engine import gather

VOCAB = 8
PROMPTS = [[1, 3, 2 + i % 5, i % VOCAB] for i in range(10)]
PARAMS = SMCParams(n_particles=32, max_tokens=24, seed=3, group=5, ess_threshold=1.0)
ARGS = {
    "dtype": "float32", "skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 64,
    "kv_cache_memory_bytes": 1 << 24,
}  # fmt: skip


class Likes(Potential):
    """Likes one token; takes a while for a whole text, fails for some prompts, and in a worker once a file is there."""

    def __init__(self, token: int, seconds: float = 0.0, fails: int | None = None, file: str = "") -> None:
        self.token, self.seconds, self.fails, self.file = token, seconds, fails, file

    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.path.exists(self.file):
            os.remove(self.file)
            raise RuntimeError("cannot start")

    def reset(self, n, prompt):
        self.prompt = prompt

    def prefix(self, state):
        if self.fails is not None and self.prompt[-1] == self.fails:
            raise RuntimeError("does not like this prompt")
        return (state.tokens == self.token).sum(1).double() * 0.3

    def complete(self, state):
        time.sleep(self.seconds)
        return self.prefix(state)


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB))


@pytest.fixture(scope="module")
def by_two(model) -> dict[int, Population]:
    """What two workers make of PROMPTS, three islands each."""
    with Fleet(model, Likes(2), engine_args=ARGS, n_workers=2) as fleet:
        found = dict(fleet.run(Job(PROMPTS, PARAMS, islands=3, batch_size=4)))
        assert len(fleet.pids) == 2 and os.getpid() not in fleet.pids
        cores = [os.sched_getaffinity(pid) for pid in fleet.pids]
        threads = [[os.sched_getaffinity(int(task)) for task in os.listdir(f"/proc/{pid}/task")] for pid in fleet.pids]
    if len(os.sched_getaffinity(0)) > 1:
        assert not cores[0] & cores[1] and cores[0] | cores[1] <= os.sched_getaffinity(0), (cores, threads)
    assert _gone(fleet.pids)
    return found


def _gone(pids: set[int]) -> bool:
    """Waits for processes to end."""
    until = time.monotonic() + 20
    while any(_alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    return not any(_alive(pid) for pid in pids)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _same(a: Population, b: Population) -> bool:
    return a.to_bytes() == b.to_bytes()


def test_one_worker_gives_what_two_do_and_a_killed_one_changes_nothing(model, by_two, tmp_path):
    """The only worker is killed in its second batch; its successor fails to start, and the next one runs that again."""
    killed, file = [], tmp_path / "file"
    with Fleet(model, Likes(2, file=str(file)), engine_args=ARGS, n_workers=1) as fleet:
        found = {}
        for i, population in fleet.run(Job(PROMPTS, PARAMS, islands=3, batch_size=4)):
            found[i] = population
            if not killed:
                killed = list(fleet.pids)
                os.kill(killed[0], signal.SIGKILL)
                file.touch()
        assert len(fleet.pids) == 2 and _gone(set(killed)) and not file.exists()
    assert list(found) == list(range(len(PROMPTS))) and all(_same(found[i], by_two[i]) for i in found)
    assert all(pool.n_islands == 3 and pool.lost_islands == 0 for pool in found.values())


@pytest.fixture(scope="module")
def engine(model):
    """An engine of this process, once the workers' are tested."""
    llm = fastsmc.ray.start_engine(model, ARGS)
    yield llm
    llm.shutdown()


def test_a_group_of_the_same_key_is_the_same_without_ray(engine, by_two):
    """Island m of prompt i is group `params.group + 3 i + m` of `LLM.smc`."""
    i = 4
    keys = [SMCParams(n_particles=32, max_tokens=24, seed=3, group=5 + 3 * i + m, ess_threshold=1.0) for m in range(3)]
    islands = engine.smc([PROMPTS[i]] * 3, keys, Likes(2))
    assert _same(pooled(islands), by_two[i])
    assert len({island.log_z for island in islands}) == 3 and np.ptp([by_two[k].log_z for k in by_two]) > 0


def test_a_dataset(model, by_two):
    dataset = ray.data.from_items([{"prompt": prompt, "name": f"n{i}"} for i, prompt in enumerate(PROMPTS[:2])])
    out = map_prompts(dataset, PARAMS, Likes(2), model=model, engine_args=ARGS, islands=3, batch_size=4, use_tqdm=False)
    rows = out.take_all()
    assert [row["name"] for row in rows] == ["n0", "n1"] and [row["index"] for row in rows] == [0, 1]
    for i, row in enumerate(rows):
        assert row["population"] == by_two[i].to_bytes() and row["log_z"] == by_two[i].log_z
        assert list(map(list, row["token_ids"])) == by_two[i].token_ids


def test_what_is_lost_too_often_and_what_fails(model, by_two):
    """The only worker is killed in its first batch, which is not run again; what the potential ends is an error."""
    lost = Job(PROMPTS[:1], PARAMS, islands=4, batch_size=2)
    with Fleet(model, Likes(2, seconds=0.5, fails=3), engine_args=ARGS, max_retries=0, on_lost="pool") as fleet:
        for fleet._on_lost in ("pool", "raise"):
            (worker,) = fleet._cores
            pid = ray.get(worker.about.remote()).pid
            threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
            [(_, outcome)] = fleet.run(lost)
            if fleet._on_lost == "pool":
                assert outcome.lost_islands == 2 == outcome.n_islands
            else:
                assert isinstance(outcome, SMCError)
                assert "lost with its worker 1 times (max_retries=0): ActorDiedError: " in str(outcome)
        found = [each for _, each in fleet.run(Job(PROMPTS[:5], PARAMS, islands=3, batch_size=4))]
    with pytest.raises(SMCError, match="prompt 3: .*does not like this prompt") as caught:
        gather(found, False)
    left = caught.value.populations
    assert [p is None for p in left] == [False, False, False, True, False] and _same(left[4], by_two[4])


def test_predictor(model, by_two):
    """In a pipeline of Ray Data a population is that of its index, wherever the row stands."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Ray Data's actors cannot import it
    table = [{"prompt": PROMPTS[i], "index": i} for i in (6, 1)]
    found = ray.data.from_items(table).map_batches(
        SMCPredictor,
        fn_constructor_kwargs={
            "model": model, "params": PARAMS, "potential": Likes(2), "engine_args": ARGS, "islands": 3,
        },
        concurrency=1,
        batch_size=2,
    )  # fmt: skip
    rows = {row["index"]: row for row in found.take_all()}
    assert all(rows[i]["population"] == by_two[i].to_bytes() for i in (6, 1)) and len(rows) == 2


def test_refusals_come_before_an_engine(model, monkeypatch):
    before = time.monotonic()
    few = {"model": model, "engine_args": ARGS, "use_tqdm": False}
    for wrong, message in (
        ({"n_workers": 0}, "n_workers=0: must be an integer of at least 1"),
        ({"islands": 0}, "islands=0: must be an integer from 1"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"on_lost": "drop"}, "on_lost='drop': must be one of 'raise', 'pool'"),
        ({"n_workers": 5}, r"n_workers=5: .* the cluster has room for 4 \(4 CPUs and 0 GPUs\)"),
        ({"num_gpus": 1}, "n_workers=1: each needs a CPU and 1 GPUs of one machine; the cluster has room for 0"),
        ({"num_gpus": -1}, r"num_gpus=-1: must be a number in \[0, 1024\]"),
        ({"potential": "nobody"}, "nobody"),
        ({"potential": 3}, "potential=3: must be a fastsmc.Potential"),
        ({"potential_args": {"a": 1}}, "needs potential to be a name"),
    ):
        with pytest.raises(ValueError, match=message):
            map_prompts(PROMPTS, PARAMS, **(few | wrong))
    with pytest.raises(ValueError, match="must be a list of prompts"):
        map_prompts("one", PARAMS, **few)
    unpicklable = Likes(2)
    unpicklable.lock = threading.Lock()
    with pytest.raises(SMCError, match="potential Likes cannot be sent to the worker"):
        map_prompts(PROMPTS, PARAMS, unpicklable, **few)
    monkeypatch.setattr(fastsmc.ray, "own_versions", lambda: own_versions() | {"vllm": "0.1"})  # here, not on workers
    with pytest.raises(ValueError, match=r"vllm='[^']*' on process \d+ of Ray's node \w+: must be '0.1'"):
        map_prompts(PROMPTS, PARAMS, **few)
    assert time.monotonic() - before < 60


def test_versions_room_and_shares():
    check_room([{"CPU": 1.0}, {"CPU": 3.0}], 4, 0)
    check_room([{"CPU": 8.0, "GPU": 1.0}], 8, 0.1)
    apart = [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 3.0}]  # four GPUs, and two on one machine once
    check_room(apart, 1, 2)
    with pytest.raises(ValueError, match=r"n_workers=2: each needs a CPU and 2 GPUs .* room for 1 \(8 CPUs and 1 GPU"):
        check_room(apart, 2, 2)
    broken = RayTaskError("run", "a traceback", RuntimeError("the engine is broken\nand says more"))
    [error] = Fleet("anything")._lost(next(Job([[1]], PARAMS).batches()), "lost", broken)
    assert str(error) == "lost: RuntimeError: the engine is broken"
    check_versions({"a": "1"}, {"a": "1", "b": "2"}, "there")
    with pytest.raises(ValueError, match="a='2' on there: must be '1', as in the driver"):
        check_versions({"a": "1"}, {"a": "2"}, "there")
    assert [share_of([0, 1, 2, 5, 6], k, 2) for k in (0, 1)] == [[0, 1], [2, 5, 6]]
    assert share_of([3], 0, 2) == share_of([3], 1, 2) == [3]


def test_without_ray_its_import_says_what_to_install():
    code = "import sys; sys.modules['ray'] = None\nimport fastsmc\nimport fastsmc.ray"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode and 'pip install "fastsmc[ray]"' in done.stderr.splitlines()[-1]


def test_a_forked_process_keeps_the_cores_whatever_openmp_does():
    """Ray forks what `ray.init` starts: with libiomp5, as `make test` has it, all of it would be on one core."""
    code = (
        "import os, fastsmc.ray\ncores = sorted(os.sched_getaffinity(0))\n"
        "if os.fork() == 0:\n    print(cores, sorted(os.sched_getaffinity(0)), flush=True)\n    os._exit(0)\nos.wait()"
    )
    library = os.path.join(sys.prefix, "lib", "libiomp5.so")
    env = os.environ | ({"LD_PRELOAD": library} if os.path.exists(library) else {})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    before, after = done.stdout.strip().split("] [")
    assert before.strip("[]") == after.strip("[]")


def test_command_line(model, tmp_path):
    """A run that is cut short goes on where it was, with Ray too; a prompt that fails is a line, and is tried again."""
    pytest.importorskip("pyarrow")
    good = [{"prompt": prompt} for prompt in PROMPTS[:6]]
    lines = [*map(json.dumps, good), "", json.dumps({"prompt": [1] * 60})]  # for which there is no room
    (tmp_path / "in.jsonl").write_text("\n".join(lines))

    def run(out: str, *more: str) -> subprocess.CompletedProcess:
        command = [
            *(sys.executable, "-m", "fastsmc.cli", "run", "--model", model, "--input", str(tmp_path / "in.jsonl")),
            *("--output", str(tmp_path / out), "--particles", "32", "--max-tokens", "24", "--seed", "3"),
            *("--islands", "2", "--engine-args", json.dumps(ARGS), *more),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    def rows(out: str) -> dict[int, dict]:
        import pyarrow.parquet

        return {row["index"]: row for row in pyarrow.parquet.read_table(tmp_path / out).to_pylist()}

    whole = run("whole")
    assert whole.returncode == 1, whole.stderr
    [failure] = [line for line in whole.stderr.splitlines() if "in.jsonl" in line]
    assert "in.jsonl, line 8: " in failure and "6 prompts in" in whole.stdout and "1 failed" in whole.stdout
    assert sorted(rows("whole")) == list(range(6))
    # the first part is there, with two of the prompts
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(next((tmp_path / "whole").iterdir()))
    (tmp_path / "cut").mkdir()
    pyarrow.parquet.write_table(table.slice(1, 2), tmp_path / "cut" / "part-00000001.parquet")
    cut = run("cut", "--workers", "2")
    assert cut.returncode == 1 and "4 prompts in" in cut.stdout and "2 were there" in cut.stdout, cut.stderr
    assert rows("cut") == rows("whole")
    other = run("cut", "--temperature", "0.5")
    assert other.returncode == 2 and "was made with params=" in other.stderr
    for more, message in (
        (["--json", "x.json"], "--json: is for one --prompt"),
        (["--workers", "0"], "--workers=0: must be an integer of at least 1"),
    ):
        refused = run("other", *more)
        assert refused.returncode == 2 and message in refused.stderr and not (tmp_path / "other").exists()
