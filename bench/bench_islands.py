"""Ray workers against processes that are started by hand, `map_prompts` against one call of `smc`, and pooling.

    python bench/bench_islands.py --dtype float32 --json FILE

    workers   tokens/s of a job on two Ray workers, a core each, and of two processes with an engine each that are bound
              to the same cores and take half of the same batches each; and on one Ray worker with both cores
    one call  the last against one call of `smc` with all prompts, in a process with both cores
    pool      seconds that it takes to pool 64 islands of 1,024 particles and 32 tokens

Engines are up before anything is timed. What is compared runs in turn, `repeats` times after a warm-up, and each ratio
is the median of the ratios of pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
from bench_groups import in_turn, ratio
from machine import write_result
from openings import OPENINGS

from fastsmc import Population, SMCParams
from fastsmc.batches import Job, run_batch

PARTS = ("workers", "pool")
PROMPTS, PARTICLES, TOKENS, GROUPS_PER_BATCH = 16, 32, 16, 4
PARAMS = SMCParams(n_particles=PARTICLES, max_tokens=TOKENS, ignore_eos=True)
JOB = Job(list(OPENINGS)[:PROMPTS], PARAMS, batch_size=GROUPS_PER_BATCH)


def drawn(populations: Any) -> int:
    return sum(int((population.tokens >= 0).sum()) for population in populations)


class ByHand:
    """Is a process with an engine, bound to cores, that runs every n-th batch, or one call with all prompts (n = 0)."""

    def __init__(self, model: str, dtype: str, cores: list[int], k: int, n: int) -> None:
        bound = ["taskset", "-c", ",".join(map(str, cores))]
        command = [*bound, sys.executable, __file__, "--model", model, "--dtype", dtype, "--by-hand"]
        self.process = subprocess.Popen(
            [*command, str(k), str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def wait(self) -> int:
        """Waits for its line, and returns how many tokens it has drawn."""
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("tokens "):
            if not line:
                raise RuntimeError("a process that was started by hand has ended")
        return int(line.split()[1])


def by_hand(model: str, dtype: str, k: int, n: int) -> None:
    """Is what such a process does."""
    from fastsmc.ray import start_engine

    llm = start_engine(model, arguments(dtype))
    print("tokens 0", flush=True)
    for _ in sys.stdin:
        if n == 0:
            tokens = drawn(llm.smc(JOB.prompts, PARAMS))
        else:
            mine = [batch for batch in JOB.batches() if batch.number % n == k]
            tokens = sum(drawn(run_batch(llm, batch, None)) for batch in mine)
        print(f"tokens {tokens}", flush=True)


def arguments(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 28, "enforce_eager": True}


def timed_by_hand(processes: list[ByHand]) -> dict[str, float]:
    begin = time.perf_counter()
    for process in processes:
        process.go()
    tokens = sum(process.wait() for process in processes)
    return rate(tokens, time.perf_counter() - begin)


def timed_fleet(fleet: Any, processes: int) -> dict[str, float]:
    begin = time.perf_counter()
    tokens = drawn(outcome for _, outcome in fleet.run(JOB))
    found = rate(tokens, time.perf_counter() - begin)
    if len(fleet.pids) != processes:
        raise RuntimeError(f"{len(fleet.pids)} processes have worked, not {processes}")
    return found | {"processes": processes}


def rate(tokens: int, seconds: float) -> dict[str, float]:
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}


def pool(repeats: int) -> dict[str, Any]:
    """Times `Population.pool`, of made-up islands."""
    rng, n, steps = np.random.default_rng(0), 1024, 32
    islands = []
    for k in range(64):
        log_w = rng.normal(size=(steps, n))
        ancestors = np.tile(np.arange(n), (steps, 1))
        ancestors[3::3] = np.sort(rng.integers(0, n, ancestors[3::3].shape))
        islands.append(
            Population.from_record(
                tokens=rng.integers(0, 49152, (steps, n)), token_log_probs=-rng.exponential(size=(steps, n)),
                ancestors=ancestors, resampled=(ancestors != np.arange(n)).any(1), ess=np.full(steps, n / 2),
                step_log_weights=log_w, log_weights=log_w[-1], log_z=float(np.log(np.exp(log_w[-1]).mean())),
                log_z_stderr=0.1, log_z_stderr_reason=None, stopped=np.zeros(n, bool), prompt=[1],
                params=SMCParams(n_particles=n, max_tokens=steps, group=k),
            )
        )  # fmt: skip
    seconds = []
    for _ in range(3 * repeats):
        begin = time.perf_counter()
        Population.pool(islands)
        seconds.append(time.perf_counter() - begin)
    return {"part": "pool", "islands": 64, "n_particles": n, "steps": steps, "seconds": seconds}


def workers(model: str, repeats: int, dtype: str) -> dict[str, Any]:
    """Makes the record of who runs the job."""
    from fastsmc.ray import Fleet, ray, share_of

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.ExitStack() as stack:
        two = [ByHand(model, dtype, share_of(cores, k, 2), k, 2) for k in range(2)]
        one_call = ByHand(model, dtype, cores, 0, 0)
        for each in (*two, one_call):
            stack.callback(each.process.kill)
            each.wait()
        fleets = {n: stack.enter_context(Fleet(model, engine_args=arguments(dtype), n_workers=n)) for n in (1, 2)}
        runs = in_turn(
            {
                "two Ray workers": functools.partial(timed_fleet, fleets[2], 2),
                "two by hand": functools.partial(timed_by_hand, two),
                "one Ray worker": functools.partial(timed_fleet, fleets[1], 1),
                "one call": functools.partial(timed_by_hand, [one_call]),
            },
            repeats,
        )
    ray.shutdown()
    rates = {name: [each["tokens_per_s"] for each in of] for name, of in runs.items()}
    ratios = {
        "by_hand": ratio(rates["two Ray workers"], rates["two by hand"]),
        "one_worker": ratio(rates["two Ray workers"], rates["one Ray worker"]),
        "one_call": ratio(rates["one Ray worker"], rates["one call"]),
    }
    for name, of in rates.items():
        print(f"{name}: {statistics.median(of):.0f} tokens/s")
    print({name: round(of["median"], 3) for name, of in ratios.items()})
    return {"part": "workers", "runs": runs} | {f"{name}_ratio": of for name, of in ratios.items()}


def run(json_path: str | None, model: str, parts: tuple[str, ...], repeats: int, dtype: str) -> list[dict[str, Any]]:
    """Measures `parts`; writes and returns the records."""
    records = [workers(model, repeats, dtype)] if "workers" in parts else []
    if "pool" in parts:
        records.append(pool(repeats))
        print(f"pool: {statistics.median(records[-1]['seconds']) * 1e3:.0f} ms")
    if json_path:
        payload = {
            "bench": "islands", "model": model, "engine": arguments(dtype), "prompts": PROMPTS, "records": records,
            "n_particles": PARTICLES, "max_tokens": TOKENS, "batch_size": GROUPS_PER_BATCH,
        }  # fmt: skip
        write_result(json_path, payload)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of those, by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    parser.add_argument("--by-hand", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.by_hand:
        by_hand(args.model, args.dtype, *map(int, args.by_hand))
    else:
        parts = tuple(args.parts.split(","))
        if unknown := set(parts) - set(PARTS):
            parser.error(f"--parts {', '.join(unknown)}: must be of {', '.join(PARTS)}")
        run(args.json, args.model, parts, args.repeats, args.dtype)


if __name__ == "__main__":
    main()
