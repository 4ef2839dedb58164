"""Times the ops beside eager PyTorch: `python bench/bench_ops.py --json FILE` (some minutes on two cores).

    weigh+draw  a step's normalisers and one token a row, N in 64, 256, 1024 rows of V = 49152, T = 0.8
    resample    five schemes, N = 64 to 16384
    reindex     SmolLM2-like caches (30 layers of bfloat16 blocks), 40 % of the rows moved

Ours and eager run in turn (A B A B …), so that a change of the machine's load meets both; medians. bandwidth_gb_s is
bytes of logits and twists, each counted once, over our time; copy_bandwidth_gb_s is bytes read and written by a copy of
the logits. For reindex both count bytes read and written. read_median_s is a PyTorch sum over the same bytes of logits
and twists as 32-bit integers, the fastest simple way found to read them once; read_ratio is weigh's time over it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from machine import machine
from torch import Tensor

from fastsmc import ops
from fastsmc.ops._tensors import BACKENDS, pick_backend
from fastsmc.ops.weigh import BACKENDS as WEIGH_BACKENDS
from fastsmc.params import RESAMPLING_SCHEMES

VOCAB = 49152
TEMPERATURE = 0.8
LAYERS, BLOCKS, BLOCK_SHAPE = 30, 300, (3, 64, 64)


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

    def read() -> None:
        for matrix in (logits, log_psi):
            if matrix is not None:
                matrix.view(torch.int32).sum(dtype=torch.int32)

    median, eager, weigh, reading, copying = interleaved(
        step,
        lambda: eager_step(logits, log_psi),
        lambda: ops.weigh(logits, log_psi, temperature=TEMPERATURE),
        read,
        lambda: copy.copy_(logits),
        device=device, seconds=seconds,
    )  # fmt: skip
    nbytes = logits.nbytes + (log_psi.nbytes if twist else 0)
    return record(
        "weigh+draw", device, n, median, v=VOCAB, dtype=str(dtype).removeprefix("torch."), twist=twist,
        weigh_median_s=weigh, eager_median_s=eager, ratio=eager / median, read_median_s=reading,
        read_ratio=weigh / reading, bandwidth_gb_s=nbytes / median / 1e9,
        copy_bandwidth_gb_s=2 * logits.nbytes / copying / 1e9,
    )  # fmt: skip


def bench_resample(scheme: str, n: int, device: torch.device, seconds: float) -> dict[str, Any]:
    log_weights = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(device)
    u = ops.uniforms(n, seed=1, group=0, step=0, stream=0, device=device)
    (median,) = interleaved(lambda: ops.resample(log_weights, u, scheme=scheme), device=device, seconds=seconds)
    return record("resample", device, n, median, scheme=scheme)


def bench_reindex(device: torch.device, seconds: float, spans: np.ndarray | None) -> dict[str, Any]:
    """The used half of each tail block when spans are given; the whole block otherwise."""
    n, moved = BLOCKS // 2, int(0.4 * BLOCKS / 2)
    caches = [torch.randn(BLOCKS, *BLOCK_SHAPE).to(device, torch.bfloat16) for _ in range(LAYERS)]
    ancestors = torch.arange(n)
    ancestors[n - moved :] = torch.arange(moved)
    ancestors = ancestors.to(device)
    table = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).int().view(n, 2).to(device)
    copy = torch.empty_like(caches[0])
    median, copying = interleaved(
        lambda: ops.reindex(table, ancestors, n_shared=1, tail=1, caches=caches, spans=spans),
        lambda: [copy.copy_(cache) for cache in caches],
        device=device, seconds=seconds,
    )  # fmt: skip
    block = caches[0][0].nbytes if spans is None else int(spans[:, 1].sum())
    return record(
        "reindex", device, n, median, moved=moved, layers=LAYERS, block_shape=list(BLOCK_SHAPE), dtype="bfloat16",
        bytes_per_block=block, bandwidth_gb_s=2 * moved * LAYERS * block / median / 1e9,
        copy_bandwidth_gb_s=2 * LAYERS * caches[0].nbytes / copying / 1e9,
    )  # fmt: skip


def record(op: str, device: torch.device, n: int, median: float, **more: Any) -> dict[str, Any]:
    backend = pick_backend(None, device, WEIGH_BACKENDS if op == "weigh+draw" else BACKENDS)
    return {"op": op, "backend": backend, "device": device.type, "n": n, "median_s": median, **more}


def run(json_path: str | None = None, device: str = "cpu", seconds: float = 4.0) -> dict[str, Any]:
    """Runs all cases, `seconds` each at most but for slow ones; prints a line each; writes JSON if asked."""
    where = torch.device(device)
    used = np.array([(head * 8192, 4096) for head in range(BLOCK_SHAPE[0])], dtype=np.int64)  # half the slots
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
        *(lambda spans=spans: bench_reindex(where, seconds, spans) for spans in (None, used)),
    ]
    records = []
    for case in cases:
        records.append(case())
        r = records[-1]
        name = " ".join(str(r[key]) for key in ("op", "scheme", "dtype", "bytes_per_block") if key in r)
        print(
            f"{name:28} n {r['n']:5} {'twist' if r.get('twist') else '':5} {r['median_s'] * 1e3:9.3f} ms"
            + (f"  eager {r['eager_median_s'] * 1e3:8.1f} ms  {r['ratio']:5.1f} x" if "ratio" in r else "")
            + (f"  weigh {r['read_ratio']:4.2f} x read" if "read_ratio" in r else "")
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
