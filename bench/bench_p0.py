"""What a step costs whose tokens are drawn from less than the model's whole distribution: top_k, top_p, min_p.

    python bench/bench_p0.py --json bench/results/p0_cpu.json

One group of N particles with each of `SETTINGS` in turn, `repeats` times after a warm-up; each ratio is the median over
those rounds of its time to that of the group without settings.
"""

from __future__ import annotations

import argparse
import functools
import time
from typing import Any

from bench_groups import in_turn, ratio
from machine import write_result

PROMPT = "Once upon a time, in a small village"
SETTINGS: dict[str, dict[str, Any]] = {
    "none": {}, "top_k": {"top_k": 50}, "top_p": {"top_p": 0.9}, "both": {"top_k": 50, "top_p": 0.9},
    "min_p": {"min_p": 0.05}, "hot top_p": {"top_p": 0.9, "temperature": 1.5},
}  # fmt: skip
PARTICLES, MAX_TOKENS = 256, 32


def run(json_path: str | None, model: str, repeats: int) -> list[dict[str, Any]]:
    """Measures all settings; writes and returns a record for each."""
    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve

    engine: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_num_seqs": PARTICLES,
        "max_model_len": 512,
        "kv_cache_memory_bytes": 1 << 30,
    }
    llm = LLM(str(resolve(model)), **engine)

    def seconds(settings: dict[str, Any]) -> float:
        params = SMCParams(n_particles=PARTICLES, max_tokens=MAX_TOKENS, ignore_eos=True, **settings)
        start = time.perf_counter()
        llm.smc(PROMPT, params)
        return time.perf_counter() - start

    runs = in_turn({name: functools.partial(seconds, of) for name, of in SETTINGS.items()}, repeats)
    records: list[dict[str, Any]] = [
        {"settings": SETTINGS[name], "name": name, "seconds": of, "ratio": ratio(of, runs["none"])}
        for name, of in runs.items()
    ]
    for record in records:
        print(f"{record['name']:10} {record['ratio']['median']:.2f} of a step without", flush=True)
    if json_path:
        more = {"n_particles": PARTICLES, "max_tokens": MAX_TOKENS, "engine": engine, "model": model}
        write_result(json_path, {"bench": "p0", **more, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    run(args.json, args.model, args.repeats)


if __name__ == "__main__":
    main()
