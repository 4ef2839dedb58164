"""SMC against stock vLLM sampling in one run: tokens/s of N particles and of `SamplingParams(n=N)`, interleaved.

    python bench/bench_smc.py --json bench/results/smc_cpu.json
    python bench/bench_smc.py --shapes llama-3.1-8b --cases 256:512 --json …     real shapes, random weights, no hub

Both run in the same engine (a `fastsmc.LLM` is a `vllm.LLM`), with the same prompt, T tokens and ignore_eos. SMC
resamples at every step and weighs with a potential that has a twist, so that nothing is left out of its step. Each
pair is measured A B A B ... after a warm-up; the ratio is that of the medians.

Particles with the same history cost one forward row, so the model's entropy matters: `forward_share` is the mean share
of distinct histories among the N particles. A repetitive prompt would flatter SMC; the prompt here is text that the
model itself wrote at temperature 1. A model of random weights writes every token alike, so that nothing is shared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import numpy as np
from machine import write_result

from fastsmc import Population

#: Llama configurations by name, for speed where there is no model hub
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    ),
    "smollm2-135m": dict(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, max_position_embeddings=8192, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    ),
}  # fmt: skip
CASES = ((16, 8), (64, 8), (256, 8), (1024, 8), (64, 512), (256, 512), (1024, 512))


def forward_share(population: Population) -> float:
    """Counts rows that went through the model, as a share of N rows per step: distinct histories, step by step."""
    n = population.n_particles
    histories, rows = np.zeros(n, dtype=np.int64), 0
    for tokens, ancestors in zip(population.tokens[:-1], population.ancestors, strict=False):
        pairs = np.stack([histories[ancestors], tokens])
        _, histories = np.unique(pairs, axis=1, return_inverse=True)
        histories = histories.reshape(-1)
        rows += histories.max() + 1
    return float(rows / (n * (population.T - 1)))


def write_config(shapes: str, directory: str) -> str:
    """Makes `directory` a model without weights and tokenizer, for vLLM's load_format="dummy"."""
    from transformers import LlamaConfig

    config = LlamaConfig(**SHAPES[shapes], architectures=["LlamaForCausalLM"], bos_token_id=0, eos_token_id=0)
    config.save_pretrained(directory)
    return directory


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    cases: tuple[tuple[int, int], ...] = CASES,
    max_tokens: int = 32,
    repeats: int = 3,
    shapes: str | None = None,
    **engine: Any,
) -> list[dict]:
    """Measures each (N, prompt length) of `cases`, with `model` or with random weights of `shapes`; writes and returns
    the records."""
    from vllm import SamplingParams

    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon

    longest = max(prompt_len for _, prompt_len in cases)
    args: dict[str, Any] = dict(
        dtype="bfloat16", max_model_len=max(1024, longest + max_tokens), max_num_seqs=max(n for n, _ in cases)
    )
    args.update(engine)
    if shapes is None:
        llm = LLM(resolve(model), **args)
        tokenizer = llm.get_tokenizer()
        start = tokenizer.encode("Once upon a time, in a small village")
        some = tokenizer.encode(" the sea and a boat")
    else:
        args |= {"load_format": "dummy", "skip_tokenizer_init": True}
        with tempfile.TemporaryDirectory() as directory:
            llm = LLM(write_config(shapes, directory), **args)
        start, some = list(range(100, 108)), list(range(200, 206))
    story = SamplingParams(max_tokens=max(longest - len(start), 1), temperature=1.0, seed=0, ignore_eos=True)
    output = llm.generate({"prompt_token_ids": start}, story, use_tqdm=False)[0]
    text = start + list(output.outputs[0].token_ids)
    potential = Lexicon(token_ids=some, weight=0.5)
    records = []
    for n, prompt_len in cases:
        prompt = text[:prompt_len]
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        stock = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0, detokenize=shapes is None)

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
                if isinstance(result, Population):
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
        cache = llm.llm_engine.vllm_config.cache_config
        assert cache.num_gpu_blocks is not None  # the engine has started
        engine_args: dict[str, Any] = {k: str(v) for k, v in args.items()}
        engine_args["kv_cache_tokens"] = cache.num_gpu_blocks * cache.block_size  # too few, and stock sampling preempts
        write_result(json_path, {"bench": "smc", "model": shapes or model, "engine": engine_args, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--shapes", choices=SHAPES, help="random weights of these shapes in place of a model")
    parser.add_argument("--cases", help="N:prompt pairs, e.g. 64:8,256:512")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="enforce_eager")
    args = parser.parse_args()
    cases: tuple[tuple[int, int], ...] = CASES
    if args.cases:
        pairs = (case.split(":") for case in args.cases.split(","))
        cases = tuple((int(n), int(prompt_len)) for n, prompt_len in pairs)
    engine = {"enforce_eager": True} if args.eager else {}
    run(args.json, args.model, cases, args.max_tokens, args.repeats, args.shapes, **engine)


if __name__ == "__main__":
    main()
