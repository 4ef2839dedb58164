"""What a learned twist costs a particle step: with and without a head, on the same engine.

    python bench/bench_twist.py --json bench/results/twist_cpu.json

Both runs weigh with the same potential and resample at every step, so that their histories are as many; the twist's
weights are small, so that they stay so. The head's own matrix product is timed from outside and taken off, as the
model's would be: what is left is what the twist's way through the group costs (ψ's rows, weigh and draw under ψ).
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

from machine import write_result

CASES = (64, 256)
HEADS = (("linear", None), ("mlp", 64))


def run(json_path: str | None = None, model: str = "smollm2", max_tokens: int = 24, repeats: int = 5) -> list[dict]:
    """Measures each N of `CASES` and head of `HEADS`; writes and returns the records."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch

    from fastsmc import LLM, SMCParams, twists
    from fastsmc.models import resolve
    from fastsmc.potentials import Final, Lexicon

    path = resolve(model)
    llm = LLM(path, dtype="bfloat16", max_model_len=512, enforce_eager=True)
    tokenizer, config = llm.get_tokenizer(), llm.model_config
    text = tokenizer.encode("Once upon a time, in a small village")
    potential = Final(Lexicon(token_ids=tokenizer.encode(" the sea and a boat"), weight=0.5))
    vocab, hidden = config.get_vocab_size(), config.get_hidden_size()

    product = [0.0]  # seconds in the head's matrix product
    linear = twists.F.linear

    def timed_linear(x, weight, *rest):
        if weight.shape[0] != vocab:
            return linear(x, weight, *rest)
        start = time.perf_counter()
        out = linear(x, weight, *rest)
        product[0] += time.perf_counter() - start
        return out

    # the module's own name for torch.nn.functional, so that only twists are timed
    timed: Any = type("Timed", (), {"linear": staticmethod(timed_linear), "pad": twists.F.pad})
    twists.F = timed

    directories = {}
    for kind, rank in HEADS:
        torch.manual_seed(0)
        head = twists.Head(hidden, vocab, rank)
        with torch.no_grad():
            head.out.add_(1e-4 * torch.randn(head.out.shape))
        card = twists.Card(
            kind=kind, loss="ctl", base_model=str(path), vocab_size=vocab, hidden_size=hidden,
            tokenizer=twists.tokenizer_hash(tokenizer), input_size=hidden, rank=rank or hidden,
        )  # fmt: skip
        directories[kind] = tempfile.mkdtemp(prefix="twist-")
        twists.Twist(card, head).save(directories[kind])

    records = []
    for n in CASES:
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        times: dict[str, list[tuple[float, float]]] = {"none": [], **{kind: [] for kind in directories}}
        for i in range(repeats + 1):
            for kind, seconds in times.items():  # in turns, so that a slow spell of the machine meets all
                product[0], start = 0.0, time.perf_counter()
                llm.smc(text, params, potential, twist=directories.get(kind))
                total = time.perf_counter() - start
                if i:
                    seconds.append((total, product[0]))
        for (kind, rank), with_head in zip(HEADS, list(times.values())[1:], strict=True):
            plain = [a for a, _ in times["none"]]
            extra = statistics.median((t - p) / base - 1 for (t, p), base in zip(with_head, plain, strict=True))
            record = {
                "n_particles": n,
                "head": kind,
                "rank": rank,
                "step_ms_without": 1e3 * statistics.median(plain) / max_tokens,
                "step_ms_with": 1e3 * statistics.median(t for t, _ in with_head) / max_tokens,
                "product_ms": 1e3 * statistics.median(p for _, p in with_head) / max_tokens,
                "extra_share_without_product": extra,
            }
            records.append(record)
            print(
                f"N={n:4d} {kind:<7} ms per step: without {record['step_ms_without']:.1f}  with "
                f"{record['step_ms_with']:.1f}  of which product {record['product_ms']:.1f}  extra {extra:.1%}",
                flush=True,
            )
    if json_path:
        write_result(json_path, {"bench": "twist", "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    args = parser.parse_args()
    run(args.json, args.model)


if __name__ == "__main__":
    main()
