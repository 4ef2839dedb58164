"""`make demo`: SMC on a real model, where plain sampling fails. Two tasks, each against stock sampling of equal size.

    python -m fastsmc.demo [--particles N] [--seed S] [--verbose]

1. Constrained text: opening hours in a fixed format. Plain samples hardly ever match; every particle does, and log Ẑ
   estimates how likely the model finds any match.
2. Infilling: words that lead up to a given next sentence, weighed by its likelihood, which the engine computes from
   the particles' own KV cache. log Ẑ estimates that likelihood on average over what the model would have written.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fastsmc.screen import EngineError, EngineLog, engine_log

if TYPE_CHECKING:
    from fastsmc import LLM

HOURS_PROMPT = "Opening hours of the museum:\nMonday"
HOURS = r" \d\d:\d\d-\d\d:\d\d\nTuesday \d\d:\d\d-\d\d:\d\d\n"
STORY_PROMPT = "Mia looked out of the window."
STORY_END = " So she took her umbrella and went out."


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fastsmc.demo", description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="show the engine's log, which else goes to a file")
    args = parser.parse_args()
    try:
        with engine_log("demo", args.verbose) as log:
            run(args.particles, args.seed, log)
    except EngineError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    return 0


def run(n: int, seed: int, log: EngineLog) -> None:
    """Runs both tasks with n particles.

    Raises:
        EngineError: the model is not there, or the engine did not start or died.
    """
    log.say("starting vLLM with SmolLM2-135M-Instruct ..." + (f" (its log: {log.path})" if log.path else ""))
    try:
        from fastsmc import LLM
        from fastsmc.models import resolve

        model = resolve("smollm2", log.say)
        llm = LLM(model, dtype="bfloat16", max_model_len=512, enforce_eager=True, max_num_seqs=max(n, 64))
    except Exception as error:
        raise log.error("the engine did not start", error) from None
    try:
        constrained(llm, n, seed, log.say)
        infilling(llm, n, seed, log.say)
    except Exception as error:
        raise log.error("failed", error) from None
    finally:
        llm.shutdown()


def constrained(llm: LLM, n: int, seed: int, say: Callable[[str], None]) -> None:
    from vllm import SamplingParams

    from fastsmc import SMCParams
    from fastsmc.potentials import Regex

    def timed(call: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        result = call()
        return result, time.perf_counter() - start

    params = SMCParams(n_particles=n, max_tokens=40, ess_threshold=0.5, seed=seed)
    stock = SamplingParams(n=n, max_tokens=40, temperature=1.0, seed=seed)
    plain, plain_s = timed(lambda: llm.generate(HOURS_PROMPT, stock, use_tqdm=False)[0])
    hits = sum(re.match(HOURS, output.text) is not None for output in plain.outputs)
    population, smc_s = timed(lambda: llm.smc(HOURS_PROMPT, params, Regex(HOURS)))
    good = sum(w for w, text in zip(population.weights, population.texts, strict=True) if re.fullmatch(HOURS, text))
    say(f"\n1. {HOURS_PROMPT!r}, then exactly {HOURS!r}")
    say(f"   plain sampling, {n} samples      {hits / n:7.1%} begin with a match   {plain_s:6.1f} s")
    say(f"   SMC, {n} particles               {good:7.1%} of the weight matches {smc_s:6.1f} s")
    say(f"   log Ẑ = {population.log_z:.2f}: one plain sample in {np.exp(-population.log_z):.3g} would match exactly")
    for text, weight, _ in population.best(3):
        say(f"   {weight:6.3f}  {text!r}")


def infilling(llm: LLM, n: int, seed: int, say: Callable[[str], None]) -> None:
    from fastsmc import SMCParams
    from fastsmc.potentials import Infill

    params = SMCParams(n_particles=n, max_tokens=12, ess_threshold=0.5, seed=seed, ignore_eos=True)
    population = llm.smc(STORY_PROMPT, params, Infill(STORY_END))
    plain = float(population.log_weights.mean())  # drawn from p0 and weighed once, at the end
    weighed = float(population.weights @ population.log_weights)
    say(f"\n2. {STORY_PROMPT!r}, 12 tokens, then {STORY_END!r}")
    say(f"   log-likelihood of what must follow: {plain:.1f} after plain samples, {weighed:.1f} after SMC's")
    say(f"   log Ẑ = {population.log_z:.2f}   ESS {population.final_ess:.1f} of {n}: a learned twist would raise it")
    for text, weight, _ in population.best(3):
        say(f"   {weight:6.3f}  {text!r}")


if __name__ == "__main__":
    sys.exit(main())
