"""What `LLM.score` takes for continuations of one prompt, against stock `prompt_logprobs` with prefix caching, in turn.

    python bench/bench_score.py --json OUT.json

One engine does both. Stock is asked for the log-probs of prompt tokens of each prompt with its continuation; vLLM reads
nothing from its prefix cache for such requests, since it has no logits there. Both warm up once; the ratio is the
median over rounds. Their log-probs are compared, too.
"""

from __future__ import annotations

import argparse
import functools
import random
import time
from typing import Any

from bench_groups import in_turn, ratio
from machine import write_result

PROMPT_TOKENS, CONTINUATIONS, LENGTHS = 512, 64, "8,24"


def run(
    json_path: str | None, model: str, repeats: int, dtype: str, lengths: list[int], n: int
) -> list[dict[str, Any]]:
    """Measures continuations of each length; writes and returns a record for each."""
    from vllm import SamplingParams

    from fastsmc import LLM
    from fastsmc.models import resolve

    engine: dict[str, Any] = {
        "dtype": dtype,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "max_model_len": 1024,
        "kv_cache_memory_bytes": 1 << 30,
        "enable_prefix_caching": True,
    }
    llm = LLM(str(resolve(model)), **engine)
    vocab, rng = llm.model_config.get_vocab_size(), random.Random(0)

    def tokens(length: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(length)]

    prompt, records = tokens(PROMPT_TOKENS), []
    stock_params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0.0)
    for length in lengths:
        texts = [tokens(length) for _ in range(n)]
        found: dict[str, list[float]] = {}

        def score(texts: list[list[int]], found: dict[str, list[float]]) -> float:
            start = time.perf_counter()
            found["score"] = llm.score(prompt, texts).log_probs.tolist()
            return time.perf_counter() - start

        def stock(texts: list[list[int]], found: dict[str, list[float]], length: int = length) -> float:
            start = time.perf_counter()
            prompts: list[Any] = [{"prompt_token_ids": prompt + text} for text in texts]
            outputs = llm.generate(prompts, stock_params, use_tqdm=False)
            seconds, found["stock"] = time.perf_counter() - start, []
            for output, text in zip(outputs, texts, strict=True):
                said: list[Any] = list(output.prompt_logprobs or ())[-length:]
                found["stock"].append(sum(each[token].logprob for each, token in zip(said, text, strict=True)))
            return seconds

        calls: dict[str, Any] = {
            "score": functools.partial(score, texts, found), "stock": functools.partial(stock, texts, found)
        }  # fmt: skip
        runs = in_turn(calls, repeats)
        apart = max(abs(a - b) for a, b in zip(found["score"], found["stock"], strict=True)) / length
        faster = ratio(runs["stock"], runs["score"])
        seconds = {"seconds": runs["score"], "stock_seconds": runs["stock"]}
        records.append({"tokens": length, **seconds, "times_as_fast": faster, "apart_per_token": apart})
        print(f"{length:3} tokens: {faster['median']:.1f} times as fast, {apart:.3f} apart per token", flush=True)
    if json_path:
        more = {"prompt_tokens": PROMPT_TOKENS, "continuations": n, "engine": engine, "model": model}
        write_result(json_path, {"bench": "score", **more, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    parser.add_argument("--lengths", default=LENGTHS, help="of continuations, in tokens; default: %(default)s")
    parser.add_argument("--continuations", type=int, default=CONTINUATIONS)
    args = parser.parse_args()
    run(args.json, args.model, args.repeats, args.dtype, [int(n) for n in args.lengths.split(",")], args.continuations)


if __name__ == "__main__":
    main()
