"""What interventions cost a step: the time in the ops at the ends of the layers, from a profile, over that of the step.

    python bench/bench_intervene.py --json bench/results/intervene_cpu.json

`PARTICLES` rows of SmolLM2 in a compiled engine that has places for interventions: a group under none; the same group
under one of rank one, at one layer and all positions; as many groups of one particle under none, and each under one of
its own. Two kinds: at a layer's end (`Project`) and in its down_proj (`RankOne`). Beside it an engine without places
runs the cases under none. Each engine has its own process (trees.py); all cases run in turn, `repeats` times after a
warm-up.

Each case runs twice in a round. Under PyTorch's profiler: the time in the ops `fastsmc::after_layer` and
`fastsmc::after_down_proj`, from the dispatcher on, all layers together, which the profiler lengthens. And without it:
that gives the time of a step (the whole call, with the prompt, by tokens) and of the model in it. `ops_ms` is what the
profile says, and for each call what Python takes to reach the dispatcher: `call_us` of a call that does nothing, less
`profiled_us`, what the profiler says of that. `ratio` is of whole steps with places to steps without, so that it also
holds fusions which the ops prevent.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, TypeAlias

from bench_groups import Clock, in_turn, ratio
from machine import ROOT, write_result
from trees import OtherEngine, serve

PROMPT = "Once upon a time, in a small village"
PARTICLES, LAYER = 64, 15
#: case → (groups, interventions; None: without any); the name begins with their kind
CASES: dict[str, tuple[int, int | None]] = {
    "none": (1, None), "none, groups": (PARTICLES, None), "project": (1, 1), "rank one": (1, 1),
    "project, groups": (PARTICLES, PARTICLES), "rank one, groups": (PARTICLES, PARTICLES),
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16", "max_num_seqs": PARTICLES, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 28,
}  # fmt: skip
OPS = ("fastsmc::after_layer", "fastsmc::after_down_proj")
Times: TypeAlias = dict[str, float]


class Engine:
    """Starts an engine in this process, with places for interventions or without."""

    def __init__(self, model: str, max_tokens: int, places: bool) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        self.clock = Clock("fastsmc.vllm.model:Model.hidden")
        from fastsmc import LLM
        from fastsmc.models import resolve

        self.max_tokens = max_tokens
        self.llm = LLM(resolve(model), interventions=places, **SETTINGS)

    def _interventions(self, kind: str, n: int) -> list[Any]:
        """Makes n of rank one that hardly change what is generated."""
        import torch

        from fastsmc.interventions import Project, RankOne

        config = self.llm.llm_engine.model_config.hf_config
        made: list[Any] = []
        for i in range(n):
            generator = torch.Generator().manual_seed(i)
            u, v = (torch.randn(n, generator=generator) for n in (config.hidden_size, config.intermediate_size))
            if kind == "project":
                made.append(Project(LAYER, torch.nn.functional.normalize(u, dim=0)[None]))
            else:
                made.append(RankOne(LAYER, 1e-3 * u, 1e-3 * v))
        return made

    def seconds(self, case: str) -> Times:
        """Returns the seconds of a call, and in it of the model."""
        from fastsmc import SMCParams

        groups, n = CASES[case]
        lists = None if n is None else [[one] for one in self._interventions(case.partition(",")[0], n)]
        params = SMCParams(n_particles=PARTICLES // groups, max_tokens=self.max_tokens, ignore_eos=True)
        self.clock.spent.clear()
        start = time.perf_counter()
        self.llm.smc([PROMPT] * groups, params, intervention=lists)
        return {"total": time.perf_counter() - start, "model": self.clock.spent["hidden"]}

    def profile(self, case: str) -> Times:
        """Returns the seconds in the ops, and their calls, by the profiler."""
        return self._profile(lambda: self.seconds(case))

    def _profile(self, call: Callable[[], object]) -> Times:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU]) as found:
            call()
        ours = [event for event in found.key_averages() if event.key in OPS]
        return {"ops": sum(e.cpu_time_total for e in ours) / 1e6, "calls": sum(e.count for e in ours)}

    def empty_call(self, n: int = 4000) -> Times:
        """Returns the µs of a call of an op that does nothing, as it is and as the profiler says."""
        import torch

        x, call = torch.zeros(PARTICLES, 576, dtype=torch.bfloat16), torch.ops.fastsmc.after_layer.default

        def calls() -> float:
            start = time.perf_counter()
            for _ in range(n):
                call(x, x)
            return time.perf_counter() - start

        calls()
        return {"call_us": calls() / n * 1e6, "profiled_us": self._profile(calls)["ops"] / n * 1e6}


def run(json_path: str | None = None, model: str = "smollm2", max_tokens: int = 64, repeats: int = 5) -> list[dict]:
    """Measures all cases; writes and returns a record for each."""
    options = (__file__, "--serve", "--model", model, "--max-tokens", str(max_tokens))
    engine, plain = OtherEngine(ROOT, *options, "--places"), OtherEngine(ROOT, *options)
    calls: dict[tuple[str, str], Callable[[], Times]] = {}
    for case, (_, n) in CASES.items():
        if n is None:
            calls[case, "without places"] = functools.partial(plain.seconds, case)
        calls[case, "with"] = functools.partial(engine.seconds, case)
        calls[case, "profiled"] = functools.partial(engine.profile, case)
    runs = in_turn(calls, repeats)
    empty, records = engine.empty_call(), []
    for case, (groups, n) in CASES.items():
        timed = {**medians(runs[case, "with"]), **medians(runs[case, "profiled"])}
        record = {"case": case, "groups": groups, "interventions": n or 0, **summary(timed, empty, max_tokens)}
        if n is None:
            record["ratio"] = ratio(*([run["total"] for run in runs[case, key]] for key in ("with", "without places")))
        records.append(record)
        print(describe(record), flush=True)
    print("a call that does nothing: {call_us:.2f} µs, {profiled_us:.2f} µs by the profiler".format_map(empty))
    if json_path:
        more = {"n_particles": PARTICLES, "max_tokens": max_tokens, "repeats": repeats, "layer": LAYER, **empty}
        write_result(json_path, {"bench": "intervene", **more, "engine": SETTINGS, "records": records})
    for each in (engine, plain):
        each.close()
    return records


def medians(runs: list[Times]) -> Times:
    """Returns the median of each number."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def summary(seconds: Times, empty: Times, steps: int) -> dict[str, float]:
    """Returns ms per step, calls per step, and the ops' share of the step and of the model's call."""
    step, model, profiled = (1e3 * seconds[name] / steps for name in ("total", "model", "ops"))
    calls = seconds["calls"] / steps
    ops = profiled + calls * max(0.0, empty["call_us"] - empty["profiled_us"]) / 1e3
    shares = {"share": ops / step, "share_of_model": ops / model}
    return {"step_ms": step, "model_ms": model, "ops_ms": ops, "calls": calls, **shares}


def describe(record: dict[str, Any]) -> str:
    text = (
        f"{record['case']:16}: {record['ops_ms']:.3f} ms in {record['calls']:.0f} calls, {record['share']:.2%} of a "
        f"step ({record['step_ms']:.2f} ms), {record['share_of_model']:.2%} of the model ({record['model_ms']:.2f} ms)"
    )
    return text + (f"; step with places : without {record['ratio']['median']:.3f}" if "ratio" in record else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--places", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: Engine(args.model, args.max_tokens, args.places))
        return
    run(args.json, args.model, args.max_tokens, args.repeats)


if __name__ == "__main__":
    main()
