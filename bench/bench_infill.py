"""What a learned twist is worth: infilling with one token, two tokens before it, on a real model.

    python bench/bench_infill.py --json bench/results/infill_cpu.json

The paper's small setting (T = 2, c = 1; Zhao et al. 2024): φ(s) = p0(c | prompt, s). For each task a twist is trained
by CTL over Hugging Face (frozen trunk, `mlp` head), saved, and evaluated in vLLM by its path, in float32 like training:
KL(q‖σ) and KL(σ‖q) of its proposal and of p0, and the bounds on log Z of twisted SMC with N particles beside those of
plain importance sampling (SIS: p0, never resampled) with 30 N. Exact samples are by rejection.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

from machine import write_result

#: prompt, then two tokens, then this
TASKS = (
    ("The old man opened the door and", " warm"),
    ("The old man opened the door and", " man"),
    ("Once upon a time, there was a", " by"),
)
PARTICLES = (4, 16)
FACTOR = 30


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    steps: int = 80,
    seeds: int = 1,
    runs: int = 12,
    samples: int = 48,
    quick: bool = False,
) -> list[dict]:
    """Trains and evaluates each task; writes and returns the records. `quick`: one task, few steps, for a try."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    from fastsmc import LLM, SMCParams, evaluate
    from fastsmc.hf import HFEngine
    from fastsmc.models import resolve
    from fastsmc.potentials import Infill
    from fastsmc.training import Trainer, TwistConfig

    path = resolve(model)
    tasks = TASKS[:1] if quick else TASKS
    if quick:
        steps, runs, samples = 40, 4, 8
    config = TwistConfig(
        loss="ctl", kind="mlp", rank=256, steps=steps, refresh=4, batch_size=1024, samples="twisted", lr=3e-3
    )
    jobs = []
    hf = HFEngine(path, dtype=torch.float32)
    tokenizer = hf.get_tokenizer()
    where = Path(tempfile.mkdtemp(prefix="twists-"))
    for i, (prompt, follow) in enumerate(tasks):
        args = {"continuation": tokenizer.encode(follow)}
        for seed in range(seeds):
            params = SMCParams(n_particles=1024, max_tokens=2, ignore_eos=True, seed=seed)
            start = time.perf_counter()
            directory = where / f"{i}-{seed}"
            trainer = Trainer(hf, prompt, params, Infill(**args), config, directory, name="infill", args=args)
            trainer.run(progress=True)
            seconds = time.perf_counter() - start
            jobs.append((prompt, follow, seed, args, directory, seconds))
            print(f"trained {prompt!r} … {follow!r} in {seconds:.0f} s", flush=True)
    del hf, trainer

    llm = LLM(path, dtype="float32", max_model_len=256, enforce_eager=True, max_num_seqs=1024)
    records, known = [], {}
    for prompt, follow, seed, args, directory, seconds in jobs:
        potential = Infill(**args)
        params = SMCParams(n_particles=256, max_tokens=2, ignore_eos=True, seed=1000 + seed)
        if (prompt, follow) not in known:  # the target does not depend on the twist's seed
            many = dataclasses.replace(params, n_particles=512, seed=999)
            exact = evaluate.rejection(llm, prompt, many, potential, samples)
            sis = {
                FACTOR * n: evaluate.log_z_bounds(
                    llm,
                    prompt,
                    dataclasses.replace(params, n_particles=FACTOR * n, ess_threshold=0.0, proposal="base"),
                    potential,
                    exact=exact,
                    runs=runs,
                )
                for n in PARTICLES
            }
            known[prompt, follow] = exact, sis
        exact, sis = known[prompt, follow]
        log_z = sis[FACTOR * max(PARTICLES)].log_z()
        twisted = {
            n: evaluate.log_z_bounds(
                llm,
                prompt,
                dataclasses.replace(params, n_particles=n),
                potential,
                exact=exact,
                runs=4 * runs,  # they are cheap
                twist=directory,
            )
            for n in PARTICLES
        }
        best = twisted[max(PARTICLES)]
        kls = {
            name: evaluate.kl(llm, prompt, own, potential, exact=exact, runs=4, twist=twist, bounds=best)
            for name, own, twist in (
                ("base", dataclasses.replace(params, proposal="base"), None),
                ("twisted", params, directory),
            )
        }
        record = {
            "prompt": prompt,
            "continuation": follow,
            "seed": seed,
            "training_s": seconds,
            "log_z_sis": log_z,
            "exact_samples": len(exact),
            "kl": {name: dataclasses.asdict(value) for name, value in kls.items()},
            "kl_q_sigma_ratio": kls["base"].q_sigma / kls["twisted"].q_sigma,
            "bounds": {
                "twisted": [b.to_dict() for b in twisted.values()],
                "sis": [b.to_dict() for b in sis.values()],
            },
        }
        records.append(record)
        print(table(records[-1:]), flush=True)
    if json_path:
        result = {"bench": "infill", "config": dataclasses.asdict(config), "runs": runs, "records": records}
        write_result(json_path, result)
    return records


def table(records: list[dict]) -> str:
    """The records as a Markdown table; ± is a standard error."""
    lines = [
        "| prompt … continuation | KL(q‖σ) p0 → twist | KL(σ‖q) p0 → twist | N | gap, twisted SMC | gap, SIS, 30 N |"
    ]
    lines.append("|---|---|---|---|---|---|")
    for r in records:
        base, own = r["kl"]["base"], r["kl"]["twisted"]
        for b, s in zip(r["bounds"]["twisted"], r["bounds"]["sis"], strict=True):
            lines.append(
                f"| {r['prompt']} … {r['continuation']} (seed {r['seed']}) "
                f"| {base['q_sigma']:.2f} → {own['q_sigma']:.2f} ± {own['q_sigma_se']:.2f} "
                f"| {base['sigma_q']:.2f} → {own['sigma_q']:.2f} ± {own['sigma_q_se']:.2f} "
                f"| {b['n_particles']} | {b['gap']:.3f} ± {b['gap_se']:.3f} | {s['gap']:.3f} ± {s['gap_se']:.3f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--quick", action="store_true", help="one task, few steps")
    args = parser.parse_args()
    run(args.json, args.model, steps=args.steps, seeds=args.seeds, quick=args.quick)


if __name__ == "__main__":
    main()
