"""Chooses the Triton kernels' configurations on this GPU: `python bench/tune.py` (some minutes; needs a GPU).

For each set of data types, the usual ones first, weigh and draw, and without log ψ redraw and its kernel integrate, are
timed with every candidate at two sizes; the lowest product of the two medians goes to kernels/configs.json, or to
another file, under the GPU's architecture. The file is written after each set, so that a run that is cut short keeps
what it has found. num_warps sets the order of sums, hence the last bits of results: it may differ between architectures
and data types, never between sizes. A candidate that is not 2 % better than the default does not replace it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine

from fastsmc import ops
from fastsmc.kernels import launch
from fastsmc.ops._tensors import check_matrices

SIZES = [(256, 49152), (1024, 128256)]
CANDIDATES = {
    "weigh": [{"num_warps": w, "tiles": t} for w, t in itertools.product((1, 2, 4), (1, 2, 4, 8, 16, 32))],
    "draw": [{"num_warps": w} for w in (1, 2, 4, 8)],
    "redraw": [{"num_warps": w} for w in (2, 4, 8, 16)],
    "integrate": [{"num_warps": w} for w in (2, 4, 8, 16)],
}
#: of logits, and of log ψ
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PSI_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


def seconds(f: Callable[[], object], repeats: int = 20) -> float:
    """Returns the median device time of a call."""
    for _ in range(3):
        f()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        f()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def tune(dtype: torch.dtype, psi_dtype: torch.dtype | None, masked: bool, file: dict, architecture: str) -> None:
    """Adds the best configuration of each op for these data types to `file`."""
    cases: list[dict[str, Callable[[], object]]] = []
    for n, vocab in SIZES:
        logits = (torch.randn(n, vocab, device="cuda") * 3).to(dtype)
        psi = None if psi_dtype is None else torch.randn(n, vocab, device="cuda").to(psi_dtype)
        mask = torch.randint(-(2**31), 2**31, (n, -(-vocab // 32)), device="cuda").int() if masked else None
        kw: dict[str, Any] = {"log_psi": psi, "mask": mask, "backend": "triton"}
        rows, u = torch.arange(n, device="cuda"), torch.rand(n, dtype=torch.float64, device="cuda")
        weighed = ops.weigh(logits, **kw)
        case: dict[str, Callable[[], object]] = {
            "weigh": functools.partial(ops.weigh, logits, **kw),
            "draw": functools.partial(ops.draw, logits, weighed, rows, u, **kw),
        }
        if psi is None:  # of rows that are far from the factual one, so that most move
            factual, token = torch.randn(1, vocab, device="cuda").to(dtype), torch.zeros(1, dtype=torch.int64).cuda()
            case["redraw"] = case["integrate"] = functools.partial(
                ops.redraw, logits, factual, token, torch.rand(n, 2, dtype=torch.float64, device="cuda"),
                factual_rows=torch.zeros_like(rows), mask=mask, backend="triton",
            )  # fmt: skip
        cases.append(case)
    types = launch.data_types(check_matrices(logits, psi, None, None, mask, None))
    configs = launch._configs()  # what the kernels read
    for op in cases[0]:
        candidates = CANDIDATES[op]
        chosen = configs.setdefault(architecture, {}).setdefault(op, {})
        default = configs["default"][op]["*"]

        def score(candidate: dict[str, int], op: str = op, chosen: dict = chosen) -> float:
            chosen[types] = candidate
            return statistics.geometric_mean(seconds(case[op]) for case in cases)

        scores = [score(candidate) for candidate in candidates]
        best = min(range(len(scores)), key=scores.__getitem__)
        usual = score(default)
        chosen[types] = candidates[best] if scores[best] < 0.98 * usual else default
        print(f"{op:9} {types:28} {chosen[types]}  {min(scores[best], usual) * 1e6:8.1f} µs", flush=True)
    file["configs"] = configs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=launch.CONFIGS, help="file to write (default: %(default)s)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune: needs a GPU")
    file = json.loads(launch.CONFIGS.read_text())
    architecture = launch._architecture(torch.device("cuda", torch.cuda.current_device()))
    file.setdefault("measured", {})[architecture] = machine()
    for psi_dtypes, dtype, masked in itertools.product((PSI_DTYPES[:2], PSI_DTYPES[2:]), DTYPES, (False, True)):
        for psi_dtype in psi_dtypes:
            tune(dtype, psi_dtype, masked, file, architecture)
            args.out.write_text(json.dumps(file, indent=1) + "\n")


if __name__ == "__main__":
    main()
