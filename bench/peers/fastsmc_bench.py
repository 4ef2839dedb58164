"""Programs of genlm-control and llamppl over fastsmc, in turn with both on their own Hugging Face backend:

    export LD_PRELOAD=$PWD/.venv/lib/libiomp5.so
    .venv/bin/python bench/peers/fastsmc_bench.py --peer bench/peers/.venv/bin/python --json FILE

    LLM.smc                the task of genlm_control_bench.py as a group with fastsmc's own potential
    fastsmc.genlm.smc      the same program of genlm-control as one group
    genlm-control          the same program, unchanged over FastsmcLM, and over its own backend (N = 64)
    llamppl                the program of llamppl_bench.py over FastsmcLM, and over its own backend (N = 32)

One run of each, and so on: `--repeats` times. A peer's run is a process of its own, after a warm-up there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import write_result
from trees import peer_environment

Run = dict[str, float]


def contenders(dtype: str, particles: int, llamppl_particles: int, max_tokens: int) -> dict[str, Callable[[int], Run]]:
    """Makes what runs here over one engine: name → run of a seed."""
    import fastsmc.llamppl  # contains genlm's import

    # isort: split
    import genlm_control_bench as control
    import llamppl_bench
    from genlm.control import PromptedLLM
    from llamppl import CachedCausalLM

    from fastsmc import LLM, SMCParams
    from fastsmc.genlm import FastsmcLM, smc
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon

    fastsmc.llamppl.install()
    llm = LLM(resolve("smollm2"), dtype=dtype, max_model_len=1024)
    lm = FastsmcLM(llm)
    prompted = PromptedLLM(lm, eos_byte_strings=[control.NEVER])
    prompted.set_prompt_from_str(control.PROMPT)
    critic, cached = control.Lexicon(prompted, control.WORDS), CachedCausalLM(lm)

    def as_group(seed: int) -> Run:
        params = SMCParams(
            n_particles=particles, max_tokens=max_tokens, ess_threshold=1.0, proposal="base", ignore_eos=True, seed=seed
        )
        begin = time.perf_counter()
        population = llm.smc(control.PROMPT, params, Lexicon(words=list(control.WORDS), weight=1.0))
        seconds, tokens = time.perf_counter() - begin, sum(map(len, population.token_ids))
        return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "log_z": population.log_z}

    return {
        "LLM.smc": as_group,
        "fastsmc.genlm.smc": lambda seed: control.run_once(
            prompted, critic, particles, max_tokens, lambda *program, **settings: smc(*program, **settings, seed=seed)
        ),
        "genlm-control over FastsmcLM": lambda seed: control.run_once(prompted, critic, particles, max_tokens),
        "llamppl over FastsmcLM": lambda seed: llamppl_bench.run_once(cached, llamppl_particles, max_tokens),
    }


def run_peer(python: str, script: str, dtype: str, particles: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """Makes the record of one run of a peer, in its own environment with its own OpenMP library."""
    options = ["--dtype", dtype, "--particles", str(particles), "--max-tokens", str(max_tokens), "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.json"
        command = [python, str(Path(__file__).with_name(script)), "--repeats", "1", *options, "--json", str(path)]
        subprocess.run(command, env=peer_environment(python), stdout=subprocess.DEVNULL, check=True)
        return json.loads(path.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it only fastsmc runs")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--llamppl-particles", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()

    ours = contenders(args.dtype, args.particles, args.llamppl_particles, args.max_tokens)
    theirs = {
        "genlm-control": ("genlm_control_bench.py", args.particles),
        "llamppl": ("llamppl_bench.py", args.llamppl_particles),
    }
    runs: dict[str, list[Run]] = {name: [] for name in ours}
    peers: dict[str, list[dict[str, Any]]] = {name: [] for name in theirs}
    for i in range(args.repeats + 1):
        np.random.seed(i)
        torch.manual_seed(i)
        for name, run in ours.items():
            done = run(i)
            if i:
                runs[name].append(done)
                print(f"{name}: {done['tokens_per_s']:.1f} tok/s, log Ẑ {done['log_z']:.2f}", flush=True)
        for name, (script, particles) in theirs.items() if i and args.peer else ():
            peers[name].append(run_peer(args.peer, script, args.dtype, particles, args.max_tokens, i))
            done = peers[name][-1]["runs"][0]
            print(f"{name}: {done['tokens_per_s']:.1f} tok/s, log Ẑ {done['log_z']:.2f}", flush=True)
    records = [
        {
            "peer": name,
            "dtype": args.dtype,
            "n_particles": args.llamppl_particles if name.startswith("llamppl") else args.particles,
            "max_tokens": args.max_tokens,
            "runs": of,
        }
        for name, of in runs.items()
    ]
    for of in peers.values():
        if of:  # machine, versions and command are those of its last process
            records.append({**of[-1], "runs": [run for record in of for run in record["runs"]]})
    for record in records:
        record["tokens_per_s"] = statistics.median(run["tokens_per_s"] for run in record["runs"])
    speeds = {record["peer"]: record["tokens_per_s"] for record in records}
    ratios = {
        f"{name} / {other}": speeds[name] / speeds[other]
        for name, other in [
            ("LLM.smc", "genlm-control"),
            ("fastsmc.genlm.smc", "genlm-control"),
            ("genlm-control over FastsmcLM", "genlm-control"),
            ("fastsmc.genlm.smc", "LLM.smc"),
            ("llamppl over FastsmcLM", "llamppl"),
        ]
        if other in speeds
    }
    print(json.dumps(ratios, indent=2))
    if args.json:
        write_result(args.json, {"bench": "peers", "ratios": ratios, "records": records})


if __name__ == "__main__":
    main()
