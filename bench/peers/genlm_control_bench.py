"""Tokens per second of genlm-control's SMC (Hugging Face backend) on the task that fastsmc is measured on.

    P=$PWD/bench/peers/.venv
    LD_PRELOAD=$P/lib/libiomp5.so $P/bin/python bench/peers/genlm_control_bench.py [--json FILE]

The task: N particles continue a prompt by T tokens under the potential ψ(s) = exp(number of tokens of s that spell a
word of WORDS), resampled systematically whenever the weights differ (ess_threshold 1). In fastsmc:

    SMCParams(n_particles=N, max_tokens=T, ess_threshold=1.0, resampling="systematic", proposal="base", ignore_eos=True)
    Lexicon(words=WORDS, weight=1.0)

What is done so that the peer shows its best: batches as large as the population, no waiting for more queries once all
particles have asked, the prompt's KV cache kept, the potential answering all particles in one call. Its caches are
emptied between runs, since a cached continuation is no generation. `terminate_when` ends every particle after T tokens
without the forward and the weight that `max_tokens` would spend on forcing the end of sequence: both sides count N·T
tokens, and their log_z estimate the same number.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.control import Potential, PromptedLLM, direct_token_sampler
from genlm.control.constant import EOS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import ROOT, write_result

PROMPT = "Once upon a time"
WORDS = ("the", "and", "she")
#: A token that the model practically never draws stands for the end of sequence: fastsmc's ignore_eos.
NEVER = b"<reponame>"


class Lexicon(Potential):
    """fastsmc's Lexicon as a genlm-control critic: log ψ(s) = number of tokens of s in a set."""

    def __init__(self, llm: PromptedLLM, words: tuple[str, ...]) -> None:
        super().__init__(llm.vocab, tables=llm.tables)
        forms = {space + form for word in words for space in ("", " ") for form in (word, word.capitalize())}
        self.members = {token.token_id for token in llm.vocab if token.byte_string in {f.encode() for f in forms}}

    async def prefix(self, context: list) -> float:
        return float(sum(token.token_id in self.members for token in context))

    complete = prefix

    async def batch_prefix(self, contexts: list[list]) -> np.ndarray:
        return np.array([sum(token.token_id in self.members for token in context) for context in contexts], float)

    batch_complete = batch_prefix


def run_once(
    llm: PromptedLLM, critic: Lexicon, n_particles: int, max_tokens: int, smc: Callable[..., Any] | None = None
) -> dict[str, float]:
    """One run from empty caches: {seconds, tokens_per_s, log_z}. `smc` stands for `SMC(sampler, critic)`."""
    sampler = direct_token_sampler(llm)
    arguments: dict[str, Any] = {
        "n_particles": n_particles,
        "ess_threshold": 1.0,
        "max_tokens": max_tokens + 1,
        "critic": critic,
        "resampling_method": "systematic",
        "terminate_when": lambda context: len(context) == max_tokens,
    }
    llm.model.clear_cache()
    begin = time.perf_counter()
    if hasattr(llm.model, "cache_kv"):
        llm.model.cache_kv(llm.prompt_ids)
    result = asyncio.run(sampler.smc(**arguments)) if smc is None else smc(sampler, **arguments)
    seconds = time.perf_counter() - begin
    tokens = sum(len(context) - (context[-1] is EOS) for context, _ in result)
    log_z = float(np.logaddexp.reduce(result.log_weights) - np.log(n_particles))
    return {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds, "log_z": log_z}


def run(model: str, dtype: str, n_particles: int, max_tokens: int, repeats: int, seed: int) -> dict[str, object]:
    """The record of `repeats` runs after one that warms up."""
    llm = PromptedLLM.from_name(
        model,
        backend="hf",
        eos_byte_strings=[NEVER],
        batch_size=n_particles,
        timeout=0.001,
        hf_opts={"torch_dtype": dtype},
    )
    llm.set_prompt_from_str(PROMPT)
    critic = Lexicon(llm, WORDS)
    np.random.seed(seed)
    torch.manual_seed(seed)
    run_once(llm, critic, n_particles, min(4, max_tokens))
    runs = []
    for i in range(repeats):
        runs.append(run_once(llm, critic, n_particles, max_tokens))
        print(f"run {i + 1}/{repeats}: {runs[-1]['tokens_per_s']:.1f} tokens/s", file=sys.stderr, flush=True)
    return {
        "bench": "peer",
        "peer": "genlm-control",
        "version": importlib.metadata.version("genlm-control"),
        "backend": "hf",
        "model": Path(model).name,
        "dtype": str(llm.model.model.dtype).removeprefix("torch."),
        "device": str(llm.model.device),
        "prompt": PROMPT,
        "n_particles": n_particles,
        "max_tokens": max_tokens,
        "ess_threshold": 1.0,
        "resampling": "systematic",
        "potential": f"lexicon {' '.join(WORDS)}",
        "tokens_per_s": statistics.median(r["tokens_per_s"] for r in runs),
        "genlm_backend": importlib.metadata.version("genlm-backend"),
        "runs": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory of the model; by default smollm2, as fastsmc unpacks it")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the record here too")
    arguments = parser.parse_args()
    # models.py by itself: fastsmc is not installed in this environment.
    model = arguments.model or str(runpy.run_path(str(ROOT / "fastsmc" / "models.py"))["smollm2"]())
    warnings.simplefilter("ignore")
    record = run(model, arguments.dtype, arguments.particles, arguments.max_tokens, arguments.repeats, arguments.seed)
    print(json.dumps(record, indent=2))
    if arguments.json:
        write_result(arguments.json, record)


if __name__ == "__main__":
    main()
