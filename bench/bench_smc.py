"""SMC against stock vLLM sampling in one run: tokens/s of N particles and of `SamplingParams(n=N)`, interleaved.

    python bench/bench_smc.py --json bench/results/smc_cpu.json

Both run in the same engine (a `fastsmc.LLM` is a `vllm.LLM`), with the same prompt, T tokens and ignore_eos. SMC
resamples at every step and weighs with a potential that has a twist, so that nothing is left out of its step. Each
pair is measured A B A B ... after a warm-up; the ratio is that of the medians.

Particles with the same history cost one forward row, so the model's entropy matters: `forward_share` is the mean share
of distinct histories among the N particles. A repetitive prompt would flatter SMC; the prompt here is text that the
model itself wrote at temperature 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from machine import machine

from fastsmc import Population

CASES = ((16, 8), (64, 8), (256, 8), (1024, 8), (64, 512), (256, 512), (1024, 512))


def forward_share(population: Population) -> float:
    """Rows that went through the model, as a share of N rows a step: distinct histories, step by step."""
    n = population.n_particles
    histories, rows = np.zeros(n, dtype=np.int64), 0
    for tokens, ancestors in zip(population.tokens[:-1], population.ancestors, strict=False):
        pairs = np.stack([histories[ancestors], tokens])
        _, histories = np.unique(pairs, axis=1, return_inverse=True)
        histories = histories.reshape(-1)
        rows += histories.max() + 1
    return float(rows / (n * (population.T - 1)))


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    cases: tuple[tuple[int, int], ...] = CASES,
    max_tokens: int = 32,
    repeats: int = 3,
    **engine: object,
) -> list[dict]:
    """Measures each (N, prompt length) of `cases`; writes and returns the records."""
    from vllm import SamplingParams

    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon

    args = dict(dtype="bfloat16", max_model_len=1024, max_num_seqs=max(n for n, _ in cases))
    args.update(engine)
    llm = LLM(resolve(model), **args)
    tokenizer = llm.get_tokenizer()
    start = tokenizer.encode("Once upon a time, in a small village")
    longest = max(prompt_len for _, prompt_len in cases)
    story = SamplingParams(max_tokens=max(longest - len(start), 1), temperature=1.0, seed=0, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": start}, story, use_tqdm=False)[0]
    text = start + list(output.outputs[0].token_ids)
    potential = Lexicon(token_ids=tokenizer.encode(" the sea and a boat"), weight=0.5)
    records = []
    for n, prompt_len in cases:
        prompt = text[:prompt_len]
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        stock = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0, detokenize=True)

        def run_smc(prompt=prompt, params=params) -> Population:
            return llm.smc(prompt, params, potential)

        def run_stock(prompt=prompt, stock=stock) -> None:
            llm.generate({"prompt_token_ids": prompt}, stock, use_tqdm=False)

        times: dict[str, list[float]] = {"smc": [], "stock": []}
        for i in range(repeats + 1):
            for name, call in (("smc", run_smc), ("stock", run_stock)):
                begin = time.perf_counter()
                result = call()
                if i:
                    times[name].append(time.perf_counter() - begin)
                if name == "smc":
                    share = forward_share(result)
        seconds = {name: statistics.median(values) for name, values in times.items()}
        record = {
            "n_particles": n,
            "prompt_tokens": prompt_len,
            "max_tokens": max_tokens,
            "smc_s": times["smc"],
            "stock_s": times["stock"],
            "smc_tokens_per_s": n * max_tokens / seconds["smc"],
            "stock_tokens_per_s": n * max_tokens / seconds["stock"],
            "ratio": seconds["stock"] / seconds["smc"],
            "forward_share": share,
        }
        records.append(record)
        print(
            f"N={n:5d} prompt={prompt_len:4d}  smc {record['smc_tokens_per_s']:7.0f} tok/s  "
            f"stock {record['stock_tokens_per_s']:7.0f} tok/s  ratio {record['ratio']:.2f}  "
            f"forward share {share:.2f}",
            flush=True,
        )
    if json_path:
        Path(json_path).parent.mkdir(parents=True, exist_ok=True)
        result = {"bench": "smc", "machine": machine(), "engine": {k: str(v) for k, v in args.items()}}
        Path(json_path).write_text(json.dumps({**result, "records": records}, indent=1) + "\n")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--cases", help="N:prompt pairs, e.g. 64:8,256:512")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="enforce_eager")
    args = parser.parse_args()
    cases = CASES
    if args.cases:
        cases = tuple(tuple(int(x) for x in case.split(":")) for case in args.cases.split(","))
    engine = {"enforce_eager": True} if args.eager else {}
    run(args.json, args.model, cases, args.max_tokens, args.repeats, **engine)


if __name__ == "__main__":
    main()
