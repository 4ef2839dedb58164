"""Whether groups run, and are right, on whatever device vLLM has: `python bench/gpu_smoke.py` (a minute or two).

    --only-vllm    a tiny Llama in a plain vllm.LLM, without fastsmc: what fails here is not fastsmc's
    (default)      the same Llama in fastsmc.LLM: which runner and attention are used; groups of four sizes and schemes,
                   their log-probs against a float32 recompute by Hugging Face, the same tokens for the same seed;
                   then ordinary requests

Exit status 0: it is right. It runs on a CPU too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
#: particles, ESS threshold, scheme
GROUPS = ((1, 1.0, "systematic"), (64, 0.0, "ssp"), (200, 1.0, "multinomial"), (256, 0.7, "residual"))
VOCAB, PROMPT_LEN, MAX_TOKENS, CHECKED = 4096, 70, 40, 16
#: of a log-prob; with the wrong tokens in the KV cache it is off by whole nats
TOLERANCE = {"bfloat16": 0.25, "float16": 3e-2, "float32": 5e-4}


def say_what_runs(llm: Any) -> None:
    """Prints which runner, stream and attention groups have; needs the engine in this process."""
    import torch

    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner, model = type(worker.model_runner), worker.smc_runner.model
    print("runner:", f"{runner.__module__}.{runner.__name__}", "on", model.device)
    if model.device.type == "cuda":
        print("stream:", type(torch.cuda.current_stream()), "compute capability", torch.cuda.get_device_capability())
    print("attend:", model.attend.why_not or f"{model.attend.backend}, costs {model.attend.costs}")


def check_groups(llm: Any, path: Path, prompt: list[int], tolerance: float) -> bool:
    import numpy as np
    from tiny import hf_log_probs  # type: ignore[import-not-found]  # tests/tiny.py, which mypy does not look at

    from fastsmc import SMCParams
    from fastsmc.potentials import Lexicon

    right = True
    for n, threshold, scheme in GROUPS:
        params = SMCParams(
            n_particles=n, max_tokens=MAX_TOKENS, ess_threshold=threshold, resampling=scheme, ignore_eos=True, seed=3
        )
        begin = time.perf_counter()
        first, again = (llm.smc(prompt, params, Lexicon(token_ids=list(range(50)), weight=2.0)) for _ in range(2))
        seconds = time.perf_counter() - begin
        want = hf_log_probs(path, prompt, first.token_ids[:CHECKED])
        worst = max(float(np.abs(g - w).max()) for g, w in zip(first.token_log_probs[:CHECKED], want, strict=True))
        same = first.token_ids == again.token_ids and first.log_z == again.log_z
        right = right and worst < tolerance and same
        print(
            f"N={n} {scheme}: worst log-prob off by {worst:.2e} ({tolerance:g} is allowed), same seed same population: "
            f"{same}, log Z {first.log_z:.4f}, two runs {seconds:.2f} s",
            flush=True,
        )
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-vllm", action="store_true", help="without fastsmc")
    parser.add_argument("--eager", action="store_true", help="enforce_eager")
    parser.add_argument("--backend", help="vLLM's attention_backend")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from tiny import make_llama
    from vllm import LLM as PlainLLM
    from vllm import SamplingParams, TokensPrompt

    path = make_llama(Path(tempfile.mkdtemp()), VOCAB, heads=(4, 2))
    prompt = [(7 * i) % VOCAB for i in range(PROMPT_LEN)]
    engine: dict[str, Any] = dict(
        dtype=args.dtype, skip_tokenizer_init=True, enforce_eager=args.eager, max_model_len=512, max_num_seqs=256,
        kv_cache_memory_bytes=1 << 28,
    )  # fmt: skip
    if args.backend:
        engine["attention_backend"] = args.backend
    begin = time.perf_counter()
    if args.only_vllm:
        llm = PlainLLM(str(path), **engine)
    else:
        from fastsmc import LLM

        llm = LLM(str(path), **engine)
    print(f"started in {time.perf_counter() - begin:.1f} s", flush=True)
    right = True
    if not args.only_vllm:
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
            say_what_runs(llm)
        right = check_groups(llm, path, prompt, TOLERANCE[args.dtype])
    greedy = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
    outputs = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * 3, greedy, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    print("ordinary requests:", tokens)
    right = right and all(len(t) == 8 for t in tokens)
    print("OK" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
