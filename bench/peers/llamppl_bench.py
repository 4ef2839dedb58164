"""Tokens per second of a llamppl program on llamppl's own Hugging Face backend; run by `fastsmc_bench.py`.

    bench/peers/.venv/bin/python bench/peers/llamppl_bench.py [--json FILE]

The program: each of N particles draws a token among those that a mask leaves, its score is 1 per word of WORDS, and
particles are resampled at every step, T times. The prompt's keys and values are cached, batches are as large as the
population and nobody waits for more queries, so that the peer shows its best; its caches are emptied between runs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import runpy
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import ROOT, write_result

PROMPT = "Once upon a time"
WORDS = ("the", "and", "she")


def make_program(lm: Any, max_tokens: int) -> Any:
    """Makes the program over a CachedCausalLM of either side."""
    from llamppl import LMContext, Model

    forms = {space + form for word in WORDS for space in ("", " ") for form in (word, word.capitalize())}

    class Words(Model):
        def __init__(self) -> None:
            super().__init__()
            self.context, self.left = LMContext(lm, PROMPT), max_tokens
            self.members = frozenset(i for i, text in enumerate(lm.str_vocab) if text in forms)

        async def step(self) -> None:
            await self.observe(self.context.mask_dist(lm.masks.EOS), False)
            token = await self.sample(self.context.next_token())
            self.score(float(token.token_id in self.members))
            self.left -= 1
            if not self.left:
                self.finish()

        def immutable_properties(self) -> set[str]:
            return {"members"}

    return Words()


def run_once(lm: Any, n_particles: int, max_tokens: int) -> dict[str, float]:
    """Runs the program from empty caches: {seconds, tokens, tokens_per_s, log_z}. At ess_threshold 2 every step ends in
    a resampling."""
    from llamppl import smc_standard

    lm.clear_cache()
    begin = time.perf_counter()
    if lm.backend == "hf":
        lm.cache_kv(lm.tokenizer.encode(PROMPT))
    particles = asyncio.run(smc_standard(make_program(lm, max_tokens), n_particles, ess_threshold=2.0))
    seconds = time.perf_counter() - begin
    tokens = sum(particle.context.token_count for particle in particles)
    log_z = float(np.logaddexp.reduce([particle.weight for particle in particles]) - np.log(n_particles))
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "log_z": log_z}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory of the model; by default smollm2, as fastsmc unpacks it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here too")
    args = parser.parse_args()
    # models.py by itself: fastsmc is not installed in this environment.
    model = args.model or str(runpy.run_path(str(ROOT / "fastsmc" / "models.py"))["smollm2"]())
    warnings.simplefilter("ignore")
    from llamppl import CachedCausalLM

    lm = CachedCausalLM.from_pretrained(
        model, backend="hf", batch_size=args.particles, timeout=0.001, hf_opts={"torch_dtype": args.dtype}
    )
    np.random.seed(args.seed)
    run_once(lm, args.particles, min(4, args.max_tokens))
    runs = []
    for i in range(args.repeats):
        runs.append(run_once(lm, args.particles, args.max_tokens))
        print(f"run {i + 1}/{args.repeats}: {runs[-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
    record = {
        "bench": "peer",
        "peer": "llamppl",
        "version": importlib.metadata.version("llamppl"),
        "genlm_backend": importlib.metadata.version("genlm-backend"),
        "backend": "hf",
        "model": Path(model).name,
        "dtype": str(lm.model.model.dtype).removeprefix("torch."),
        "prompt": PROMPT,
        "n_particles": args.particles,
        "max_tokens": args.max_tokens,
        "tokens_per_s": statistics.median(run["tokens_per_s"] for run in runs),
        "runs": runs,
    }
    print(json.dumps(record, indent=2))
    if args.json:
        write_result(args.json, record)


if __name__ == "__main__":
    main()
