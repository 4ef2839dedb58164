"""What SMC gains on a power target over re-weighting plain samples, and what a power costs a step.

    python bench/bench_power.py --json bench/results/power_cpu.json

`spread`: the standard deviation of log Ẑ over independent groups, of SMC on p0^α and of importance weighting, which
gives N samples of p0 the weights p0^(α−1): the same prompt, N, T and number of groups. `cost`: a group of N particles
whose power is next to 1, so that the draws are about the same, in turn with one without a power, and a ramp; each ratio
is the median over rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from bench_groups import in_turn, ratio
from machine import write_result

PROMPT = "Once upon a time, in a small village"
POWER, RUNS, PARTICLES, MAX_TOKENS = 4.0, 20, 64, 24
COST_PARTICLES, COST_TOKENS = 64, 24
COSTS: dict[str, dict[str, Any]] = {
    "none": {}, "power": {"power": 1.0001}, "ramp": {"power": 1.0001, "power_ramp": COST_TOKENS},
}  # fmt: skip


def spread(llm: Any) -> Iterator[dict[str, Any]]:
    """Compares estimates of log Σ p0^α by independent groups, at once and by a ramp."""
    from fastsmc import SMCParams

    plain = SMCParams(n_particles=PARTICLES, max_tokens=MAX_TOKENS, ess_threshold=0.5, seed=1)
    weighed = []
    for population in llm.smc([PROMPT] * RUNS, plain):
        log_w = (POWER - 1.0) * population.log_probs
        weighed.append(float(np.logaddexp.reduce(log_w) - math.log(PARTICLES)))
    for ramp in (None, MAX_TOKENS // 2):
        sharp = dataclasses.replace(plain, seed=2, power=POWER, power_ramp=ramp)
        smc = [population.log_z for population in llm.smc([PROMPT] * RUNS, sharp)]
        sd, sd_weighed = float(np.std(smc, ddof=1)), float(np.std(weighed, ddof=1))
        yield {
            "part": "spread", "power": POWER, "ramp": ramp, "log_z": smc, "log_z_weighed": weighed, "sd": sd,
            "sd_weighed": sd_weighed, "ratio": sd / sd_weighed,
        }  # fmt: skip


def cost(llm: Any, repeats: int) -> list[dict[str, Any]]:
    """Times groups with powers and without, in turn."""
    from fastsmc import SMCParams

    def seconds(settings: dict[str, Any]) -> float:
        params = SMCParams(
            n_particles=COST_PARTICLES, max_tokens=COST_TOKENS, ignore_eos=True, ess_threshold=0.0, **settings
        )
        start = time.perf_counter()
        llm.smc(PROMPT, params)
        return time.perf_counter() - start

    runs = in_turn({name: functools.partial(seconds, of) for name, of in COSTS.items()}, repeats)
    return [
        {"part": "cost", "name": name, "settings": COSTS[name], "seconds": of, "ratio": ratio(of, runs["none"])}
        for name, of in runs.items()
    ]


def run(json_path: str | None, model: str, repeats: int, dtype: str) -> list[dict[str, Any]]:
    """Measures both parts; writes and returns a record for each case."""
    from fastsmc import LLM
    from fastsmc.models import resolve

    engine: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": COST_PARTICLES,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 30,
    }
    llm = LLM(str(resolve(model)), **engine)
    records = cost(llm, repeats)
    for record in records:
        print(f"{record['name']:8} {record['ratio']['median']:.3f} of a step without", flush=True)
    for record in spread(llm):
        records.append(record)
        of = f"sd of log Z {record['sd']:.3f}, re-weighted {record['sd_weighed']:.3f}, ratio {record['ratio']:.3f}"
        print(f"alpha {POWER:g}, ramp {record['ramp']}: {of}", flush=True)
    if json_path:
        more = {"n_particles": PARTICLES, "max_tokens": MAX_TOKENS, "runs": RUNS, "engine": engine, "model": model}
        more |= {"cost_particles": COST_PARTICLES, "cost_tokens": COST_TOKENS}
        write_result(json_path, {"bench": "power", **more, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    args = parser.parse_args()
    run(args.json, args.model, args.repeats, args.dtype)


if __name__ == "__main__":
    main()
