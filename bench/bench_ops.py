"""Times the ops beside what they replace: `python bench/bench_ops.py --json FILE` (some minutes on two cores).

    weigh+draw  a step's normalisers and one token a row, T = 0.8; without and with a twist
    resample    five schemes, N = 64 to 16384, and 16 groups of 256 in one launch
    reindex     caches as SmolLM2 has them (30 layers of bfloat16 blocks), 40 % of the rows moved
    redraw      counterfactual tokens where few of N rows move, and where most do; hindsight is the published procedure,
                NumPy's noise and argmax (peers/hindsight.py)
    settle      particles that come from half as many histories and have drawn again; eager is its PyTorch operations
    step        all of a captured step but the model: as CapturedGroup runs it, on a GPU as one CUDA graph

Everything in a record ran in turn (A B A B …), so that a change of the machine's load meets all; medians. On the CPU
wall time; on a GPU device time by events, with the second-level cache overwritten before each call, and ours in CUDA
graphs (launch-bound ops as 20 calls in one graph), where eager PyTorch is what it is.

bandwidth_gb_s is bytes of logits and twists, each counted once, over our time; copy_bandwidth_gb_s is bytes read and
written by a copy of the logits; floor_ratio is our time over that of moving those bytes at that bandwidth. For reindex
both count bytes read and written. On the CPU, read_median_s is a PyTorch sum over the same bytes as 32-bit integers,
the fastest simple way found to read them once, and read_ratio is weigh's time over it. baselines.py has the others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import BASELINES
from machine import write_result
from torch import Tensor

from fastsmc import Potential, SMCParams, ops
from fastsmc.ops._tensors import pick_backend
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.smc.captured import CapturedGroup

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))
import hindsight

TEMPERATURE = 0.8
LAYERS, BLOCKS, BLOCK_SHAPE = 30, 300, (3, 64, 64)  # block: heads, slots, dimensions
#: (N, V) by device type
SIZES = {
    "cpu": [(64, 49152), (256, 49152), (1024, 49152)],
    "cuda": [(256, 49152), (1024, 49152), (64, 128256), (1024, 128256), (4096, 128256)],
}


class Clock:
    """Medians of functions that run in turn on one device, for about `seconds` in all."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        self.device, self.seconds = device, seconds
        self.gpu = device.type == "cuda"
        self._flush = torch.empty(2**28 if self.gpu else 0, dtype=torch.uint8, device=device)

    def graph(self, f: Callable[[], Any], calls: int = 1) -> Callable[[], Any]:
        """On a GPU `calls` calls of f as one CUDA graph; elsewhere f."""
        if not self.gpu:
            return f
        for _ in range(2):  # compiles
            f()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                f()
        return graph.replay

    def _once(self, f: Callable[[], Any]) -> float:
        if not self.gpu:
            start = time.perf_counter()
            f()
            return time.perf_counter() - start
        self._flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, functions: dict[str, Callable[[], Any]], least: int = 5) -> dict[str, float]:
        for f in functions.values():
            self._once(f)
        rounds: list[list[float]] = []
        stop = time.perf_counter() + self.seconds
        while len(rounds) < least or time.perf_counter() < stop:
            rounds.append([self._once(f) for f in functions.values()])
        return dict(zip(functions, map(statistics.median, zip(*rounds, strict=True)), strict=True))


def record(op: str, gpu_backend: str, clock: Clock, n: int, times: dict[str, float], **more: Any) -> dict[str, Any]:
    """times: ours first, under 'ours'; the others become `<name>_median_s`, and ours is related to them."""
    ours = times["ours"]
    out = {
        "op": op, "backend": pick_backend(None, clock.device, gpu_backend), "device": clock.device.type, "n": n, **more,
        "median_s": ours,
    }  # fmt: skip
    for name, seconds in times.items():
        if name != "ours":
            out[f"{name}_median_s"] = seconds
            if name in BASELINES:
                out["ratio" if name == "eager" else f"{name}_ratio"] = seconds / ours
    return out


def bench_weigh_draw(n: int, vocab: int, dtype: torch.dtype, twist: bool, clock: Clock) -> dict[str, Any]:
    device = clock.device
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, vocab, generator=generator) * 3).to(device, dtype)
    # a head's twists are of the model's type on a GPU
    psi_dtype = dtype if clock.gpu else torch.float32
    log_psi = torch.randn(n, vocab, generator=generator).to(device, psi_dtype) if twist else None
    rows = torch.arange(n, device=device)
    copy = torch.empty_like(logits)
    step_at = torch.zeros((), dtype=torch.int64, device=device)

    def step() -> ops.Drawn:
        u = ops.uniforms(n, seed=0, group=0, step=step_at, stream=0, device=device)
        weighed = ops.weigh(logits, log_psi, temperature=TEMPERATURE)
        return ops.draw(logits, weighed, rows, u, log_psi, temperature=TEMPERATURE)

    def read() -> None:
        for matrix in (logits, log_psi):
            if matrix is not None:
                matrix.view(torch.int32).sum(dtype=torch.int32)

    functions = {
        "ours": clock.graph(step),
        "weigh": clock.graph(lambda: ops.weigh(logits, log_psi, temperature=TEMPERATURE)),
        "copy": lambda: copy.copy_(logits),
    }
    if not clock.gpu:
        functions["read"] = read
    for name, make in BASELINES.items():
        if (baseline := make(logits, log_psi, TEMPERATURE)) is not None:
            functions[name] = baseline
    times = clock.medians(functions)
    nbytes = logits.nbytes + (0 if log_psi is None else log_psi.nbytes)
    bandwidth = 2 * logits.nbytes / times["copy"]
    out = record(
        "weigh+draw", "triton", clock, n, times, v=vocab, dtype=str(dtype).removeprefix("torch."), twist=twist,
        bandwidth_gb_s=nbytes / times["ours"] / 1e9, copy_bandwidth_gb_s=bandwidth / 1e9,
        floor_ratio=times["ours"] * bandwidth / nbytes,
    )  # fmt: skip
    if not clock.gpu:
        out["read_ratio"] = times["weigh"] / times["read"]
    return out


def eager_systematic(log_weights: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling as it is usually written over PyTorch, whatever the scheme asked of ours."""
    n = len(log_weights)
    points = (torch.arange(n, device=u.device) + u[0]) / n
    return torch.searchsorted(torch.softmax(log_weights, 0).cumsum(0), points).clamp_(max=n - 1)


def bench_resample(scheme: str, n: int, groups: int, clock: Clock) -> dict[str, Any]:
    device, shape = clock.device, (groups, n) if groups > 1 else (n,)
    log_weights = torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64).to(device)
    u = ops.uniforms(groups * n, seed=1, group=0, step=0, stream=0, device=device).view(shape)
    calls = 20 if clock.gpu else 1
    functions = {
        "ours": clock.graph(lambda: ops.resample(log_weights, u, scheme=scheme, threshold=1.0), calls),
        "eager": clock.graph(
            lambda: [eager_systematic(w, v) for w, v in zip(log_weights.view(-1, n), u.view(-1, n), strict=True)], calls
        ),
    }
    times = {name: seconds / calls for name, seconds in clock.medians(functions).items()}
    return record("resample", "cuda", clock, n, times, scheme=scheme, groups=groups)


def bench_reindex(slot_dim: int | None, clock: Clock) -> dict[str, Any]:
    """The used half of each tail block when the slot dimension is given; the whole block otherwise."""
    device = clock.device
    blocks = BLOCKS * (8 if clock.gpu else 1)
    n = blocks // 2
    moved = int(0.4 * n)
    caches = [torch.randn(blocks, *BLOCK_SHAPE).to(device, torch.bfloat16) for _ in range(LAYERS)]
    ancestors = torch.arange(n)
    ancestors[n - moved :] = torch.arange(moved)
    ancestors = ancestors.to(device)
    table = torch.randperm(blocks, generator=torch.Generator().manual_seed(0)).int().view(n, 2).to(device)
    copy = torch.empty_like(caches[0])
    slots = BLOCK_SHAPE[1]
    position = torch.tensor(slots + slots // 2, device=device)
    rows = torch.arange(n - moved, n, device=device)

    def eager() -> None:
        source, target = table[ancestors[rows], 1].long(), table[rows, 1].long()
        for cache in caches:
            cache[target] = cache[source]
        table[:, :1] = table[ancestors, :1]

    def ours() -> None:
        ops.reindex(table, ancestors, position=position, block_size=slots, caches=caches, slot_dim=slot_dim)

    times = clock.medians(
        {"ours": clock.graph(ours), "eager": eager, "copy": lambda: [copy.copy_(cache) for cache in caches]}
    )
    block = caches[0][0].nbytes if slot_dim is None else caches[0][0].nbytes // 2
    nbytes, bandwidth = 2 * moved * LAYERS * block, 2 * LAYERS * caches[0].nbytes / times["copy"]
    return record(
        "reindex", "cuda", clock, n, times, moved=moved, layers=LAYERS, block_shape=list(BLOCK_SHAPE),
        dtype="bfloat16", bytes_per_block=block, bandwidth_gb_s=nbytes / times["ours"] / 1e9,
        copy_bandwidth_gb_s=bandwidth / 1e9, floor_ratio=times["ours"] * bandwidth / nbytes,
    )  # fmt: skip


def bench_settle(n: int, groups: int, clock: Clock) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(n)
    slots, tokens = (torch.randint(high, (groups * n,), generator=generator).to(clock.device) for high in (n // 2, 4))
    wanted = torch.ones_like(slots, dtype=torch.bool)
    offsets = torch.arange(0, groups * n + 1, n, device=clock.device)
    calls = 20 if clock.gpu else 1
    functions = {
        "ours": clock.graph(lambda: ops.settle(slots, tokens, wanted, offsets), calls),
        "eager": clock.graph(lambda: ops.settle(slots, tokens, wanted, offsets, backend="torch"), calls),
    }
    times = {name: seconds / calls for name, seconds in clock.medians(functions).items()}
    return record("settle", "torch", clock, n, times, groups=groups)


def bench_redraw(n: int, vocab: int, change: float, clock: Clock) -> dict[str, Any]:
    """Rows that differ from one factual row by normal changes of that size."""
    generator = torch.Generator().manual_seed(n)
    factual = torch.randn(1, vocab, generator=generator) * 3
    logits = factual + torch.randn(n, vocab, generator=generator) * change
    token = torch.multinomial(factual.softmax(1), 1, generator=generator)[0]
    rng, rows = np.random.default_rng(n), (logits.double().numpy(), factual[0].double().numpy(), int(token))
    logits, factual, token = (x.to(clock.device) for x in (logits, factual, token))
    u = ops.uniforms(2 * n, seed=0, group=0, step=0, stream=0, device=clock.device).view(n, 2)
    facts = torch.zeros(n, dtype=torch.int64, device=clock.device)

    def ours() -> ops.Redrawn:
        return ops.redraw(logits, factual, token, u, factual_rows=facts)

    moved = (ours().tokens != token).double().mean().item()
    functions: dict[str, Callable[[], Any]] = {"ours": clock.graph(ours)}
    if not clock.gpu:
        functions["hindsight"] = lambda: hindsight.redraw(*rows, rng)
    times = clock.medians(functions)
    out = record("redraw", "triton", clock, n, times, v=vocab, dtype="float32", change=change, moved_share=moved)
    return out | ({} if clock.gpu else {"hindsight_ratio": times["hindsight"] / times["ours"]})


class _Still:
    """Has the same logits always: a `captured.PagedModel` without a model's cost."""

    block_size = 16
    slot_dim: int | None = 2

    def __init__(self, logits: Tensor, blocks: int) -> None:
        self.logits = logits
        shape = (blocks, 3, self.block_size, 64)
        self.caches: Sequence[Tensor] = [
            torch.zeros(shape, dtype=torch.bfloat16, device=logits.device) for _ in range(LAYERS)
        ]

    def forward(self, tokens: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, None]:
        return self.logits[: len(tokens)], None


class _Constant(Potential):
    """φ = exp(Σ value[s_t])."""

    capturable = True

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def complete(self, state: Any) -> Tensor:
        tokens = state.tokens
        return torch.where(tokens >= 0, self.value[tokens.clamp(min=0)].double(), 0.0).sum(1)

    def logw_next(self, state: Any) -> Tensor:
        return self.value.expand(len(state.finished), -1)


def bench_step(n: int, vocab: int, dtype: torch.dtype, clock: Clock) -> dict[str, Any]:
    """Steps of one group after each other, all of them captured; every step resamples."""
    generator = torch.Generator().manual_seed(n)
    logits = (torch.randn(n, vocab, generator=generator) * 3).to(clock.device, dtype)
    potential = _Constant((torch.randn(vocab, generator=generator) * 0.3).to(clock.device, dtype))
    steps = 40
    model = _Still(logits, 1 + n * (steps // _Still.block_size + 2))
    pool = torch.arange(1, len(model.caches[0]), dtype=torch.int32, device=clock.device)
    params = SMCParams(n_particles=n, max_tokens=steps, ess_threshold=1.0, ignore_eos=True, temperature=TEMPERATURE)
    group = CapturedGroup(params, model, potential, [0], [0], pool)
    group.advance(), group.advance()
    if clock.gpu:
        group.capture()
    times = [clock._once(group.advance) for _ in range(steps - 2)]
    group.population()
    return record(
        "step", "cuda", clock, n, {"ours": statistics.median(times)}, v=vocab, dtype=str(dtype).removeprefix("torch."),
        twist=True, layers=LAYERS,
    )  # fmt: skip


def describe(r: dict[str, Any]) -> str:
    name = " ".join(str(r[key]) for key in ("op", "scheme", "dtype", "bytes_per_block") if key in r)
    groups = f" × {r['groups']}" if r.get("groups", 1) > 1 else ""
    parts = [f"{name:28} n {r['n']:5}{groups} {'twist' if r.get('twist') else '':5} {r['median_s'] * 1e3:9.4f} ms"]
    for name in BASELINES:
        key = "ratio" if name == "eager" else f"{name}_ratio"
        if key in r:
            parts.append(f"{name} {r[key]:.1f} ×")
    if "moved_share" in r:
        parts.append(f"{r['moved_share']:.0%} moved")
    if "hindsight_ratio" in r:
        parts.append(f"hindsight {r['hindsight_ratio']:.1f} ×")
    if "read_ratio" in r:
        parts.append(f"weigh {r['read_ratio']:.2f} × read")
    if "bandwidth_gb_s" in r:
        parts.append(f"{r['bandwidth_gb_s']:.1f} GB/s (copy {r['copy_bandwidth_gb_s']:.1f})")
    return "  ".join(parts)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """weigh+draw: achieved share of the copy bandwidth, and how many times faster than each baseline."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in records if r["op"] == "weigh+draw"]
    labels = [f"N {r['n']}, V {r['v']}\n{r['dtype']}{' + twist' if r['twist'] else ''}" for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 0.5 * len(rows) + 1.5), sharey=True)
    left.barh(labels, [r["bandwidth_gb_s"] / r["copy_bandwidth_gb_s"] for r in rows])
    left.axvline(1, color="black", linewidth=0.8)
    left.set_xlabel("bytes read once / time, over copy bandwidth")
    for name, marker in zip(BASELINES, "os^v", strict=True):
        key = "ratio" if name == "eager" else f"{name}_ratio"
        have = [(r[key], label) for r, label in zip(rows, labels, strict=True) if key in r]
        if have:
            right.plot(*zip(*have, strict=True), marker, label=name)
    right.set_xscale("log")
    right.set_xlabel("times faster than")
    right.legend()
    right.invert_yaxis()
    figure.suptitle(f"weigh + draw, {rows[0]['backend']} backend")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(json_path: str | None = None, device: str | None = None, seconds: float = 4.0) -> list[dict[str, Any]]:
    """Runs all cases, about `seconds` each; prints a line each; writes JSON, and a plot beside it, if asked.

    device: 'cpu' or 'cuda'; the GPU where there is one by default.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    clock, brief = Clock(where, seconds), Clock(where, seconds / 16)
    dtypes = (torch.float32, torch.bfloat16)
    cases: list[Callable[[], dict[str, Any]]] = [
        *(
            lambda n=n, v=v, dtype=dtype, twist=twist: bench_weigh_draw(n, v, dtype, twist, clock)
            for n, v in SIZES[where.type]
            for dtype in dtypes
            for twist in (True, False)
        ),
        *(
            lambda scheme=scheme, n=n: bench_resample(scheme, n, 1, brief)
            for scheme in RESAMPLING_SCHEMES
            for n in (64, 256, 1024, 4096, 16384)
        ),
        lambda: bench_resample("systematic", 256, 16, brief),
        *(lambda slot_dim=slot_dim: bench_reindex(slot_dim, clock) for slot_dim in (None, 2)),
        *(lambda change=change: bench_redraw(64, SIZES[where.type][0][1], change, clock) for change in (0.05, 3.0)),
        *(lambda n=n, groups=groups: bench_settle(n, groups, brief) for n, groups in ((256, 1), (1024, 1), (16, 16))),
        *(lambda n=n, v=v: bench_step(n, v, torch.bfloat16, clock) for n, v in SIZES[where.type]),
    ]
    records = []
    for case in cases:
        records.append(case())
        print(describe(records[-1]), flush=True)
    if json_path:
        write_result(json_path, {"bench": "ops", "temperature": TEMPERATURE, "records": records})
        plot(records, Path(json_path).with_suffix(".png"))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="write the records there, and a plot beside it")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, default=4.0, help="per case (default 4)")
    args = parser.parse_args()
    run(args.json, args.device, args.seconds)


if __name__ == "__main__":
    main()
