"""Milliseconds that genlm-control's JSON path takes on the host, on the task of bench/bench_grammar.py, which runs it.

    P=$PWD/bench/peers/.venv
    LD_PRELOAD=$P/lib/libiomp5.so $P/bin/python bench/peers/genlm_control_json.py --schema '{"type": "integer"}'

Its documented way to sample under a JSON Schema: `AWRS(llm, JsonSchema(schema).coerce(llm, f=b"".join))`, which asks
the schema about single candidate tokens. "potential_ms" is the time in the condition's batched `prefix` and `complete`
alone, per step; "outside_ms" all but the model's forward passes. As in genlm_control_bench.py the peer shows its best:
batches as large as the population, the prompt's KV cache kept.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import json
import runpy
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.control import AWRS, JsonSchema, PromptedLLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import ROOT, write_result


class Clock:
    """Adds up the time of calls; of calls within calls, or at once, that of the outermost."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._begin = 0.0, 0, 0.0

    def __enter__(self) -> None:
        if self._depth == 0:
            self._begin = time.perf_counter()
        self._depth += 1

    def __exit__(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.seconds += time.perf_counter() - self._begin


def run_once(llm: PromptedLLM, schema: dict[str, Any], n_particles: int, max_tokens: int, seed: int) -> dict[str, Any]:
    """Does one run from empty caches, and returns its milliseconds per step."""
    condition, asked, forward = JsonSchema(schema).coerce(llm, f=b"".join), Clock(), Clock()
    for name in ("batch_prefix", "batch_complete"):
        method = getattr(condition, name)

        async def timed(contexts: list, method: Any = method) -> Any:
            with asked:
                return await method(contexts)

        setattr(condition, name, timed)
    llm.model.clear_cache()
    model = llm.model.model
    plain = model.forward

    def timed_forward(*args: Any, **kwargs: Any) -> Any:
        with forward:
            return plain(*args, **kwargs)

    model.forward = timed_forward
    begin = time.perf_counter()
    llm.model.cache_kv(llm.prompt_ids)
    result = asyncio.run(
        AWRS(llm, condition, seed=seed).smc(
            n_particles=n_particles, ess_threshold=0.5, max_tokens=max_tokens, resampling_method="systematic"
        )
    )
    seconds = time.perf_counter() - begin
    model.forward = plain
    steps = max(len(context) for context, _ in result)
    return {
        "seconds": seconds,
        "steps": steps,
        "potential_ms": 1e3 * asked.seconds / steps,
        "outside_ms": 1e3 * (seconds - forward.seconds) / steps,
        "log_z": float(np.logaddexp.reduce(result.log_weights) - np.log(n_particles)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory of the model; by default smollm2, as fastsmc unpacks it")
    parser.add_argument("--schema", required=True, help="as JSON")
    parser.add_argument("--prompt", default="A person, as JSON: ")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, help="write the record here too")
    arguments = parser.parse_args()
    # models.py by itself: fastsmc is not installed in this environment.
    model = arguments.model or str(runpy.run_path(str(ROOT / "fastsmc" / "models.py"))["smollm2"]())
    warnings.simplefilter("ignore")
    llm = PromptedLLM.from_name(
        model, backend="hf", batch_size=arguments.particles, timeout=0.001, hf_opts={"torch_dtype": arguments.dtype}
    )
    llm.set_prompt_from_str(arguments.prompt)
    np.random.seed(arguments.seed)
    torch.manual_seed(arguments.seed)
    schema = json.loads(arguments.schema)
    run_once(llm, schema, 2, 4, arguments.seed)
    record = {
        "bench": "peer",
        "peer": "genlm-control",
        "version": importlib.metadata.version("genlm-control"),
        "backend": "hf",
        "model": Path(model).name,
        "dtype": arguments.dtype,
        "n_particles": arguments.particles,
        "max_tokens": arguments.max_tokens,
        "schema": schema,
        "runs": [run_once(llm, schema, arguments.particles, arguments.max_tokens, arguments.seed)],
    }
    print(json.dumps(record, indent=2))
    if arguments.json:
        write_result(arguments.json, record)


if __name__ == "__main__":
    main()
