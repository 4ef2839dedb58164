"""`make demo`: SMC on a real model, where plain sampling fails. Two tasks, each against stock sampling of equal size.

    python -m fastsmc.demo [--particles N] [--seed S]

1. Constrained text: opening hours in a fixed format. Plain samples hardly ever match; every particle does, and log Ẑ
   estimates how likely the model finds any match.
2. Infilling: words that lead up to a given next sentence, weighed by its likelihood, which the engine computes from
   the particles' own KV cache. log Ẑ estimates that likelihood on average over what the model would have written.
"""

from __future__ import annotations

import argparse
import os
import re
import time

import numpy as np

HOURS_PROMPT = "Opening hours of the museum:\nMonday"
HOURS = r" \d\d:\d\d-\d\d:\d\d\nTuesday \d\d:\d\d-\d\d:\d\d\n"
STORY_PROMPT = "Mia looked out of the window."
STORY_END = " So she took her umbrella and went out."


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastsmc.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import SamplingParams

    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Infill, Regex

    n = args.particles
    print("starting vLLM with SmolLM2-135M-Instruct ...", flush=True)
    llm = LLM(resolve("smollm2"), dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=max(n, 64))

    def timed(call):
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start

    # -- 1. constrained text
    params = SMCParams(n_particles=n, max_tokens=40, ess_threshold=0.5, seed=args.seed)
    stock = SamplingParams(n=n, max_tokens=40, temperature=1.0, seed=args.seed)
    plain, plain_s = timed(lambda: llm.generate(HOURS_PROMPT, stock, use_tqdm=False)[0])
    hits = sum(re.match(HOURS, output.text) is not None for output in plain.outputs)
    population, smc_s = timed(lambda: llm.smc(HOURS_PROMPT, params, Regex(HOURS)))
    good = sum(w for w, text in zip(population.weights, population.texts, strict=True) if re.fullmatch(HOURS, text))
    print(f"\n1. {HOURS_PROMPT!r}, then exactly {HOURS!r}")
    print(f"   plain sampling, {n} samples      {hits / n:7.1%} begin with a match   {plain_s:6.1f} s")
    print(f"   SMC, {n} particles               {good:7.1%} of the weight matches {smc_s:6.1f} s")
    print(f"   log Ẑ = {population.log_z:.2f}: one plain sample in {np.exp(-population.log_z):.3g} would match exactly")
    for text, weight, _ in population.best(3):
        print(f"   {weight:6.3f}  {text!r}")

    # -- 2. infilling
    params = SMCParams(n_particles=n, max_tokens=12, ess_threshold=0.5, seed=args.seed, ignore_eos=True)
    population = llm.smc(STORY_PROMPT, params, Infill(STORY_END))
    plain = float(population.log_weights.mean())  # drawn from p0 and weighed once, at the end
    weighed = float(population.weights @ population.log_weights)
    print(f"\n2. {STORY_PROMPT!r}, 12 tokens, then {STORY_END!r}")
    print(f"   log-likelihood of what must follow: {plain:.1f} after plain samples, {weighed:.1f} after SMC's")
    print(f"   log Ẑ = {population.log_z:.2f}   ESS {population.final_ess:.1f} of {n}: a learned twist would raise it")
    for text, weight, _ in population.best(3):
        print(f"   {weight:6.3f}  {text!r}")


if __name__ == "__main__":
    main()
