"""fastsmc on the peers' task, in fastsmc's own environment: the other side of `genlm_control_bench.py`.

    VLLM_CPU_OMP_THREADS_BIND=0-1 LD_PRELOAD=$PWD/.venv/lib/libiomp5.so \
        .venv/bin/python bench/peers/fastsmc_bench.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import machine

PROMPT = "Once upon a time"
WORDS = ["the", "and", "she"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the record here too")
    args = parser.parse_args()

    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon

    llm = LLM(resolve("smollm2"), dtype="bfloat16", max_model_len=1024)
    runs = []
    for i in range(args.repeats + 1):
        params = SMCParams(
            n_particles=args.particles,
            max_tokens=args.max_tokens,
            ess_threshold=1.0,
            proposal="base",
            ignore_eos=True,
            seed=i,
        )
        begin = time.perf_counter()
        population = llm.smc(PROMPT, params, Lexicon(words=WORDS, weight=1.0))
        seconds = time.perf_counter() - begin
        tokens = sum(map(len, population.token_ids))
        if i:
            runs.append({"seconds": seconds, "tokens_per_s": tokens / seconds, "log_z": population.log_z})
    record = {
        "peer": "fastsmc",
        "n_particles": args.particles,
        "max_tokens": args.max_tokens,
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "runs": runs,
        "machine": machine(),
    }
    text = json.dumps(record, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
