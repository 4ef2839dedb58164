"""Times the ops beside eager PyTorch: `python bench/bench_ops.py --json FILE` (some minutes on two cores).

    weigh+draw  a step's normalisers and one token a row, N in 64, 256, 1024 rows of V = 49152, T = 0.8
    resample    five schemes, N = 64 to 16384
    reindex     SmolLM2-like caches (30 layers of bfloat16 blocks), 40 % of the rows moved

Ours and eager run in turn (A B A B …), so that a change of the machine's load meets both; medians. bandwidth_gb_s is
bytes of logits and twists, each counted once, over our time; copy_bandwidth_gb_s is bytes read and written by a copy of
the logits. For reindex both count bytes read and written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import machine
from torch import Tensor

from fastsmc import ops
from fastsmc.ops._tensors import pick_backend
from fastsmc.params import RESAMPLING_SCHEMES

VOCAB = 49152
TEMPERATURE = 0.8
LAYERS, BLOCKS, BLOCK_SHAPE = 30, 300, (3, 64, 64)  # block: heads, slots, dimensions


def interleaved(*functions: Callable[[], Any], device: torch.device, seconds: float, least: int = 5) -> list[float]:
    """Median seconds of each function; rounds of one call each, for about `seconds` in all."""

    def timed(f: Callable[[], Any]) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        f()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    for f in functions:
        timed(f)
    rounds: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(rounds) < least or time.perf_counter() < stop:
        rounds.append([timed(f) for f in functions])
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def eager_step(logits: Tensor, log_psi: Tensor | None) -> tuple[Tensor, ...]:
    """What `weigh` and `draw` replace, in float32: incremental log weight, token, its log p0 and its twist."""
    log_p = torch.log_softmax(logits.float() / TEMPERATURE, dim=-1)
    joint = log_p if log_psi is None else log_p + log_psi
    log_weight = torch.logsumexp(joint, dim=-1)
    tokens = torch.multinomial(torch.softmax(joint, dim=-1), 1)
    log_prob = log_p.gather(1, tokens)
    return log_weight, tokens, log_prob, log_prob if log_psi is None else log_psi.gather(1, tokens)


def bench_weigh_draw(n: int, dtype: torch.dtype, twist: bool, device: torch.device, seconds: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, VOCAB, generator=generator) * 3).to(device, dtype)
    log_psi = torch.randn(n, VOCAB, generator=generator).to(device) if twist else None
    rows = torch.arange(n, device=device)
    copy = torch.empty_like(logits)

    def step() -> ops.Drawn:
        u = ops.uniforms(n, seed=0, group=0, step=0, stream=0, device=device)
        weighed = ops.weigh(logits, log_psi, temperature=TEMPERATURE)
        return ops.draw(logits, weighed, rows, u, log_psi, temperature=TEMPERATURE)

    median, eager, weigh, copying = interleaved(
        step,
        lambda: eager_step(logits, log_psi),
        lambda: ops.weigh(logits, log_psi, temperature=TEMPERATURE),
        lambda: copy.copy_(logits),
        device=device, seconds=seconds,
    )  # fmt: skip
    read = logits.nbytes + (log_psi.nbytes if twist else 0)
    return record(
        "weigh+draw", device, n, median, v=VOCAB, dtype=str(dtype).removeprefix("torch."), twist=twist,
        weigh_median_s=weigh, eager_median_s=eager, ratio=eager / median, bandwidth_gb_s=read / median / 1e9,
        copy_bandwidth_gb_s=2 * logits.nbytes / copying / 1e9,
    )  # fmt: skip


def bench_resample(scheme: str, n: int, device: torch.device, seconds: float) -> dict[str, Any]:
    log_weights = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(device)
    u = ops.uniforms(n, seed=1, group=0, step=0, stream=0, device=device)
    (median,) = interleaved(lambda: ops.resample(log_weights, u, scheme=scheme), device=device, seconds=seconds)
    return record("resample", device, n, median, backend=pick_backend(None, device, "cuda"), scheme=scheme)


def bench_reindex(device: torch.device, seconds: float, slot_dim: int | None) -> dict[str, Any]:
    """The used half of each tail block when the slot dimension is given; the whole block otherwise."""
    n, moved = BLOCKS // 2, int(0.4 * BLOCKS / 2)
    caches = [torch.randn(BLOCKS, *BLOCK_SHAPE).to(device, torch.bfloat16) for _ in range(LAYERS)]
    ancestors = torch.arange(n)
    ancestors[n - moved :] = torch.arange(moved)
    ancestors = ancestors.to(device)
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).int().view(n, 2).to(device)
    copy = torch.empty_like(caches[0])
    slots = BLOCK_SHAPE[1]
    position = slots + slots // 2
    median, copying = interleaved(
        lambda: ops.reindex(table, ancestors, position=position, block_size=slots, caches=caches, slot_dim=slot_dim),
        lambda: [copy.copy_(cache) for cache in caches],
        device=device, seconds=seconds,
    )  # fmt: skip
    block = caches[0][0].nbytes if slot_dim is None else caches[0][0].nbytes // 2
    return record(
        "reindex", device, n, median, backend=pick_backend(None, device, "cuda"), moved=moved, layers=LAYERS,
        block_shape=list(BLOCK_SHAPE), dtype="bfloat16", bytes_per_block=block,
        bandwidth_gb_s=2 * moved * LAYERS * block / median / 1e9,
        copy_bandwidth_gb_s=2 * LAYERS * caches[0].nbytes / copying / 1e9,
    )  # fmt: skip


def record(op: str, device: torch.device, n: int, median: float, **more: Any) -> dict[str, Any]:
    backend = "cpu" if device.type == "cpu" else "torch"
    return {"op": op, "backend": backend, "device": device.type, "n": n, "median_s": median, **more}


def run(json_path: str | None = None, device: str = "cpu", seconds: float = 4.0) -> dict[str, Any]:
    """Runs all cases, `seconds` each at most but for slow ones; prints a line each; writes JSON if asked."""
    where = torch.device(device)
    cases: list[Callable[[], dict[str, Any]]] = [
        *(
            lambda n=n, dtype=dtype, twist=twist: bench_weigh_draw(n, dtype, twist, where, seconds)
            for n in (64, 256, 1024)
            for dtype in (torch.float32, torch.bfloat16)
            for twist in (True, False)
        ),
        *(
            lambda scheme=scheme, n=n: bench_resample(scheme, n, where, seconds / 16)
            for scheme in RESAMPLING_SCHEMES
            for n in (64, 256, 1024, 4096, 16384)
        ),
        *(lambda slot_dim=slot_dim: bench_reindex(where, seconds, slot_dim) for slot_dim in (None, 2)),
    ]
    records = []
    for case in cases:
        records.append(case())
        r = records[-1]
        name = " ".join(str(r[key]) for key in ("op", "scheme", "dtype", "bytes_per_block") if key in r)
        print(
            f"{name:28} n {r['n']:5} {'twist' if r.get('twist') else '':5} {r['median_s'] * 1e3:9.3f} ms"
            + (f"  eager {r['eager_median_s'] * 1e3:8.1f} ms  {r['ratio']:5.1f} x" if "ratio" in r else "")
            + (
                f"  {r['bandwidth_gb_s']:5.1f} GB/s (copy {r['copy_bandwidth_gb_s']:.1f})"
                if "bandwidth_gb_s" in r
                else ""
            ),
            flush=True,
        )
    result = {
        "bench": "ops",
        "machine": machine() | {"torch_threads": torch.get_num_threads()},
        "temperature": TEMPERATURE,
        "records": records,
    }
    if json_path:
        with open(json_path, "w") as f:
            json.dump(result, f, indent=1)
            f.write("\n")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case (default 4)")
    args = parser.parse_args()
    run(args.json, args.device, args.seconds)


if __name__ == "__main__":
    main()
