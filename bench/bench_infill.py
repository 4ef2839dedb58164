"""What a learned twist is worth: infilling with one token, two tokens before it, on a real model.

    python bench/bench_infill.py --json bench/results/infill_cpu.json
    python bench/bench_infill.py amortised --json bench/results/infill_amortised_cpu.json

The paper's small setting (T = 2, c = 1; Zhao et al. 2024): φ(s) = p0(c | prompt, s). For each task a twist is trained
by CTL over Hugging Face (frozen trunk, `mlp` head), saved, and evaluated in vLLM by its path, in float32 like training:
KL(q‖σ) and KL(σ‖q) of its proposal and of p0, and the bounds on log Z of twisted SMC with N particles beside those of
plain importance sampling (SIS: p0, never resampled) with 30 N. Exact samples are by rejection.

`amortised`: a single twist ψ(s, c) per T, trained on joint draws behind many prompts, judged behind prompts that it
was not trained on, with continuations that p0 draws there. A draw (s, c) makes s an exact sample for c, so with N = 1
the gap between the bounds on log Z is KL(q‖σ) + KL(σ‖q) without bias. p0 is judged on the same draws.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import write_result
from openings import OPENINGS

#: prompt, then two tokens, then this
TASKS = (
    ("The old man opened the door and", " warm"),
    ("The old man opened the door and", " man"),
    ("Once upon a time, there was a", " by"),
)
PARTICLES = (4, 16)
FACTOR = 30

#: openings whose beginnings a conditional twist is trained behind; it is judged behind those of the others
TRAINED = 40


def run(
    model: str = "smollm2",
    steps: int = 80,
    seeds: int = 1,
    runs: int = 12,
    samples: int = 48,
    quick: bool = False,
) -> dict[str, Any]:
    """Trains and evaluates each task. `quick`: one task, few steps, for a try."""
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
    return {"bench": "infill", "config": dataclasses.asdict(config), "runs": runs, "records": records}


def beginnings(openings: Sequence[str]) -> list[str]:
    """Two words and more of each opening, every text once."""
    words = [opening.split() for opening in openings]
    return list(dict.fromkeys(" ".join(each[:n]) for each in words for n in range(2, len(each) + 1)))


def amortised(hf: Any, lengths: Sequence[int] = (1, 2), steps: int = 100, quick: bool = False) -> dict[str, Any]:
    """Trains a conditional twist per T in `lengths`, and judges it on held-out prompts, with 1 and 64 particles.

    Args:
        hf: a `HFEngine`. quick: few steps, two held-out prompts.
    """
    from fastsmc import SMCParams, evaluate
    from fastsmc.potentials import Infill
    from fastsmc.prompts import TwistPrompt
    from fastsmc.training import Trainer, TwistConfig

    trained = beginnings(OPENINGS[:TRAINED])
    held_out = [text for text in beginnings(OPENINGS[TRAINED:]) if text not in trained]
    if quick:
        steps, held_out = 2, held_out[:2]
    config = TwistConfig(
        continuation_tokens=1, positives="joint", rank=256, steps=steps, prompts_per_step=4, pairs_per_prompt=32,
        refresh=2, batch_size=256, lr=3e-3,
    )  # fmt: skip
    records = []
    for length in lengths:
        params = SMCParams(n_particles=256, max_tokens=length, ignore_eos=True)
        directory = Path(tempfile.mkdtemp(prefix="twists-"))
        trainer = Trainer(hf, [TwistPrompt(text) for text in trained], params, None, config, directory)
        trainer.run(progress=True)
        longer = dataclasses.replace(params, n_particles=1, max_tokens=length + 1, seed=1000)
        pairs = []
        for place, population in enumerate(hf.smc(held_out, longer)):
            tokens = population.token_ids[0]
            pair: dict[str, Any] = {"prompt": held_out[place], "tokens": tokens}
            for name, twist in (("base", None), ("twisted", directory)):
                own = dataclasses.replace(
                    params, n_particles=64, seed=2000, group=3 * place, proposal="base" if twist is None else "twisted"
                )
                task = hf, held_out[place], own, Infill(tokens[length:])
                exact = [tokens[:length]]
                divergence = evaluate.kl(*task, exact=exact, runs=1, twist=twist, log_z=0.0)
                bounds = evaluate.log_z_bounds(*task, exact=exact, runs=1, twist=twist)
                pair[name] = {
                    "1": [-divergence.q_sigma, divergence.sigma_q],
                    "64": [bounds.lower_mean, bounds.upper_mean],
                }
            pairs.append(pair)
        records.append({"max_tokens": length, "trained": len(trained), "pairs": pairs, **summary(pairs)})
        print({name: value for name, value in records[-1].items() if name != "pairs"}, flush=True)
    return {"bench": "infill_amortised", "config": dataclasses.asdict(config), "records": records}


def summary(pairs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over pairs with standard errors: bounds and gaps by sampler and N; `gain`: p0's gaps less the twist's."""

    def mean(values: Sequence[float]) -> list[float]:
        return [statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5]

    out: dict[str, Any] = {"base": {}, "twisted": {}, "gain": {}}
    for n in pairs[0]["base"]:
        gaps = {}
        for name in ("base", "twisted"):
            lower, upper = zip(*(pair[name][n] for pair in pairs), strict=True)
            gaps[name] = [u - low for low, u in zip(lower, upper, strict=True)]
            out[name][n] = {"lower": mean(lower), "upper": mean(upper), "gap": mean(gaps[name])}
        out["gain"][n] = mean([b - t for b, t in zip(gaps["base"], gaps["twisted"], strict=True)])
    return out


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
    parser.add_argument("part", nargs="?", choices=("single", "amortised"), default="single")
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: 80, amortised 100")
    parser.add_argument("--lengths", type=int, nargs="+", default=(1, 2), help="T, of amortised")
    parser.add_argument("--quick", action="store_true", help="one task, few steps")
    args = parser.parse_args()
    steps = {} if args.steps is None else {"steps": args.steps}
    if args.part == "amortised":
        import torch

        from fastsmc.hf import HFEngine
        from fastsmc.models import resolve

        engine = HFEngine(resolve(args.model), dtype=torch.float32)
        result = amortised(engine, args.lengths, quick=args.quick, **steps)
    else:
        result = run(args.model, seeds=args.seeds, quick=args.quick, **steps)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
