"""Where the time of a particle step goes: model forward, lm head, and everything else by part.

    python bench/bench_step.py --json bench/results/step_cpu.json

The engine runs in this process with its parts timed from outside, so that nothing is left out: "else" is the wall time
of the whole call less forward and lm head, per step, scheduling and the result's way back included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

from machine import machine

CASES = (64, 256)


def run(json_path: str | None = None, model: str = "smollm2", max_tokens: int = 32, repeats: int = 3) -> list[dict]:
    """Measures each N of `CASES`; writes and returns the records."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from fastsmc import LLM, SMCParams, ops
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon
    from fastsmc.vllm.model import Model

    spent: dict[str, float] = defaultdict(float)

    def timed(owner: object, name: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] += time.perf_counter() - start

        setattr(owner, name, wrapper)

    for owner, names in ((Model, ("hidden", "logits")), (ops, ("weigh", "resample", "reindex", "draw"))):
        for name in names:
            timed(owner, name)

    llm = LLM(resolve(model), dtype="bfloat16", max_model_len=1024, enforce_eager=True)
    tokenizer = llm.get_tokenizer()
    text = tokenizer.encode("Once upon a time, in a small village")
    potential = Lexicon(token_ids=tokenizer.encode(" the sea and a boat"), weight=0.5)
    records = []
    for n in CASES:
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        runs = []
        for i in range(repeats + 1):
            spent.clear()
            start = time.perf_counter()
            llm.smc(text, params, potential)
            total = time.perf_counter() - start
            if i:
                runs.append({"total": total, **spent})
        ms = {name: 1e3 * statistics.median(r[name] for r in runs) / max_tokens for name in runs[0]}
        rest = statistics.median((r["total"] - r["hidden"] - r["logits"]) / r["total"] for r in runs)
        records.append({"n_particles": n, "prompt_tokens": len(text), "step_ms": ms, "share_outside_model": rest})
        parts = "  ".join(f"{name} {value:.2f}" for name, value in ms.items())
        print(f"N={n:5d}  ms a step: {parts}  outside forward and lm head {rest:.1%}", flush=True)
    if json_path:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        Path(json_path).write_text(
            json.dumps({"bench": "step", "machine": machine(), "records": records}, indent=1) + "\n"
        )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    run(args.json, args.model)


if __name__ == "__main__":
    main()
