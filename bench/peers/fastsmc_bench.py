"""fastsmc on the peers' task, in its own environment, in turn with `genlm_control_bench.py` in the peers':

    export LD_PRELOAD=$PWD/.venv/lib/libiomp5.so
    .venv/bin/python bench/peers/fastsmc_bench.py --peer bench/peers/.venv/bin/python --json FILE

A run of ours, then a process of the peer's with a run of its own after its warm-up, and so on: `--repeats` times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import write_result
from trees import peer_environment

PROMPT = "Once upon a time"
WORDS = ["the", "and", "she"]


def run_peer(python: str, particles: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """The record of one run of genlm-control, in its own environment with its own OpenMP library."""
    script = Path(__file__).with_name("genlm_control_bench.py")
    options = ["--particles", str(particles), "--max-tokens", str(max_tokens), "--repeats", "1", "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.json"
        command = [python, str(script), *options, "--json", str(path)]
        subprocess.run(command, env=peer_environment(python), stdout=subprocess.DEVNULL, check=True)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it only fastsmc runs")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon

    llm = LLM(resolve("smollm2"), dtype="bfloat16", max_model_len=1024)
    runs: list[dict[str, float]] = []
    theirs: list[dict[str, Any]] = []
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
        if not i:
            continue
        tokens = sum(map(len, population.token_ids))
        runs.append({"seconds": seconds, "tokens_per_s": tokens / seconds, "log_z": population.log_z})
        print(f"fastsmc: {runs[-1]['tokens_per_s']:.1f} tok/s, log Ẑ {population.log_z:.2f}", flush=True)
        if args.peer:
            theirs.append(run_peer(args.peer, args.particles, args.max_tokens, i))
            peer = theirs[-1]
            print(f"{peer['peer']}: {peer['tokens_per_s']:.1f} tok/s, log Ẑ {peer['runs'][0]['log_z']:.2f}", flush=True)
    record = {
        "peer": "fastsmc",
        "n_particles": args.particles,
        "max_tokens": args.max_tokens,
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "runs": runs,
    }
    result: dict[str, Any] = {"bench": "peers", "records": [record]}
    if theirs:
        peer = theirs[-1]  # its machine, versions and command are those of its last process
        peer["runs"] = [run for record in theirs for run in record["runs"]]
        peer["tokens_per_s"] = statistics.median(run["tokens_per_s"] for run in peer["runs"])
        result = {**result, "ratio": record["tokens_per_s"] / peer["tokens_per_s"], "records": [record, peer]}
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
