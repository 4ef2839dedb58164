"""What `attend` and vLLM's attention cost: seconds per layer, linear in a few numbers that the host knows.

    features(rows, length, reads, nodes, shape)      gives those numbers
    COSTS        holds the committed costs by `cost_key`: what `bench/bench_attend.py ops --costs` measured
    measure()    measures where COSTS has none: at start-up, through the model's own layers, in about SECONDS of calls
    kept()       does the same, but takes costs from the user's cache if an earlier start has measured them

Measured costs are kept because a step chooses its attention by them, and the two attentions round differently: costs
that came out anew at each start could, at an equal seed, change tokens from one start to the next. To have costs
measured again, delete ~/.cache/fastsmc/attend_costs.json; to have equal tokens on several machines, copy it.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.models import cache_dir, locked
from fastsmc.vllm.compat import get_logger

logger = get_logger(__name__)

#: committed: `cost_key` → `Costs`
COSTS = Path(__file__).with_name("costs.json")
#: `attend` must be so many times as fast to be chosen. The margin grows until the costs overrate `attend` by more than
#: it in at most one of CASES_BEYOND cases.
MARGIN, CASES_BEYOND = 1.1, 40
#: Part of the key of kept costs; raise it when `attend` has changed, or how it is measured.
RECIPE = 2
#: Seconds of timed calls, for all cases together.
SECONDS = 1.5
#: Rows and lengths that are measured, as far as the engine has them.
ROWS, LENGTHS = (1, 4, 16, 64, 256, 1024), (32, 200, 1000, 4000)
#: Fewer cases say too little about four unknowns.
LEAST_CASES = 8


class Costs(TypedDict):
    """Seconds per unit of each of `features`, and how many times as fast `attend` must be by them to be chosen."""

    attend: list[float]
    stock: list[float]
    margin: float


class Shape(NamedTuple):
    """The shape of a layer's attention."""

    heads: int
    key_heads: int
    head_size: int
    block_size: int


def cost_key(isa: str, dtype: torch.dtype) -> str:
    """Names what costs depend on beside the shapes: vLLM's kernels, the dtype, and how our products are computed.

    Tiles multiply bfloat16 only: with other dtypes a CPU that has them is like one that has pairs.
    """
    math = "pairs" if ops.BF16_MATH == "tiles" and dtype != torch.bfloat16 else ops.BF16_MATH
    return f"{isa} {str(dtype).removeprefix('torch.')} {math}"


def committed(key: str) -> Costs | None:
    return json.loads(COSTS.read_text()).get(key)


def features(
    n_rows: int, length: float, n_reads: int, n_nodes: int, shape: Shape
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Counts what the seconds of `attend` and of vLLM's attention are linear in, for one layer.

    For `attend`: 1; multiplications; elements of keys and values, each of which is read and packed once; nodes × key
    heads. For vLLM's: 1; multiplications; elements of keys and values that are read; of these, the elements read for
    the first time, from memory; rows × key heads.

    All but the 1 are sums over rows, or over reads, so that those of several groups are those of the groups together.

    Args:
        length: tokens per row, the mean where they differ.
        n_reads, n_nodes: `AttendPlan.n_reads` and `AttendPlan.n_nodes`, or a group's.
    """
    products = 2.0 * n_rows * shape.heads * length * shape.head_size
    token = 2.0 * shape.key_heads * shape.head_size
    distinct = n_reads * shape.block_size * token
    ours = (1.0, products, distinct, float(n_nodes * shape.key_heads))
    return ours, (1.0, products, n_rows * length * token, distinct, float(n_rows * shape.key_heads))


def dot(costs: Sequence[float], units: Sequence[float]) -> float:
    return sum(c * u for c, u in zip(costs, units, strict=True))


def ratio(costs: Costs, units: tuple[Sequence[float], Sequence[float]]) -> float:
    """Predicts how many times as long as `attend` vLLM's attention takes, by these costs."""
    return dot(costs["stock"], units[1]) / dot(costs["attend"], units[0])


def pays(costs: Costs, units: tuple[Sequence[float], Sequence[float]]) -> bool:
    """Says whether `attend` is the faster, by these costs and by more than their margin."""
    return ratio(costs, units) > costs["margin"]


def fit(units: Sequence[tuple[Sequence[float], Sequence[float]]], seconds: Sequence[Sequence[float]]) -> Costs:
    """Fits costs to cases: their `features`, and their seconds with `attend` and with vLLM's attention.

    The margin is what the ratio is overrated by, but for one case in CASES_BEYOND.
    """
    attend, stock = (fit_seconds([u[i] for u in units], [s[i] for s in seconds]) for i in range(2))
    costs = Costs(attend=attend, stock=stock, margin=MARGIN)
    overrated = [ratio(costs, u) * s[0] / s[1] for u, s in zip(units, seconds, strict=True)]
    costs["margin"] = max(MARGIN, float(np.quantile(overrated, 1 - 1 / CASES_BEYOND)))
    return costs


def fit_seconds(units: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Fits seconds per unit, none of them negative, by least squares of relative errors.

    The best non-negative costs are plain least squares on those units whose costs are positive. There are few units, so
    every subset is tried.
    """
    matrix = np.array(units)
    size = matrix.max(axis=0)
    matrix = matrix / size / np.array(seconds)[:, None]
    best, least = None, np.inf
    width = matrix.shape[1]
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(width), k) for k in range(1, width + 1)):
        costs = np.zeros(width)
        costs[list(chosen)] = np.linalg.lstsq(matrix[:, chosen], np.ones(len(matrix)), rcond=None)[0]
        error = float(((matrix @ costs - 1) ** 2).sum())
        if costs.min() >= 0 and error < least:
            best, least = costs, error
    assert best is not None  # a single unit alone always has a positive cost
    return (best / size).tolist()


# ----------------------------------------------------------------------------------------------------------- measuring
def make_table(sharing: str, n_rows: int, n_columns: int, generator: torch.Generator | None = None) -> Tensor:
    """Makes an (R, C) int32 block table with ids from 0, in a random order.

    prompt: all columns but the last are shared. tree: so is the first half of them, then groups of 8 rows share.
    none: every row has its own. genealogy: a quarter is shared; then, before each column, half of the rows are drawn
    and each of them goes on twice.
    """
    if sharing == "none":
        return torch.randperm(n_rows * n_columns, generator=generator).int().view(n_rows, n_columns)
    table = torch.empty(n_rows, n_columns, dtype=torch.int64)
    rows, columns = torch.arange(n_rows)[:, None], torch.arange(n_columns)
    if sharing == "genealogy":
        stem = n_columns // 4
        for c in range(stem, n_columns):
            half = torch.randperm(n_rows, generator=generator)[: -(-n_rows // 2)]
            table[:, stem:c] = table[half.repeat(2)[:n_rows], stem:c]
            table[:, c : c + 1] = n_columns + c * n_rows + rows
    else:
        stem = n_columns - 1 if sharing == "prompt" else n_columns // 2
        table[:, stem:] = n_columns + rows // 8 * n_columns + columns[stem:]
        table[:, -1:] = n_columns + n_columns * (n_rows // 8 + 1) + rows
    table[:, :stem] = columns[:stem]
    _, ids = torch.unique(table, return_inverse=True)
    return torch.randperm(int(ids.max()) + 1, generator=generator).int()[ids]


def interleaved(
    *functions: Callable[[], Any], seconds: float, least: int = 9, synchronize: Callable[[], Any] | None = None
) -> list[float]:
    """Times functions in turn; gives the lower quartile of each, which is its time while no neighbour disturbs it.

    Args:
        seconds: how long to go on, after `least` rounds at least. The first round is not counted.
        synchronize: waits for the device, so that what a function started is timed with it.
    """
    rounds: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(rounds) < least or time.perf_counter() < stop:
        times = []
        for f in functions:
            start = time.perf_counter()
            f()
            if synchronize is not None:
                synchronize()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return [statistics.quantiles(column, n=4)[0] for column in zip(*rounds[1:], strict=True)]


class Timed(NamedTuple):
    """A case to time: calls with `attend` and with vLLM's attention, and the plan's numbers."""

    ours: Callable[[], Any]
    stock: Callable[[], Any]
    n_reads: int
    n_nodes: int


def candidates(max_rows: int, max_length: int, n_blocks: int, block_size: int) -> list[tuple[int, int, str]]:
    """Lists the cases (rows, length, sharing) that an engine with so many KV blocks can have, small ones first."""
    cases = []
    for length in sorted({min(length, max_length) for length in LENGTHS}):
        columns = -(-length // block_size)
        for n in ROWS:
            if n <= max_rows and n * columns <= n_blocks:
                cases.append((n, length, "none"))
            if 1 < n <= max_rows and n + columns - 1 <= n_blocks:
                cases.append((n, length, "prompt"))
    return sorted(cases, key=lambda case: case[0] * case[1])


def measure(
    cases: Sequence[tuple[int, int, str]],
    prepare: Callable[[Tensor, int], Timed],
    shape: Shape,
    synchronize: Callable[[], Any] | None = None,
) -> Costs | None:
    """Measures costs by timing cases, until SECONDS are spent or the next would take too long; None if that is too few.

    Args:
        cases: (rows, length, sharing), small ones first, from `candidates`.
        prepare: makes a case from a block table (R, C) on the CPU and a length.
    """
    units: list[tuple[Sequence[float], Sequence[float]]] = []
    times: list[list[float]] = []
    spent, generator = 0.0, torch.Generator().manual_seed(0)
    for n_rows, length, sharing in cases:
        timed = prepare(make_table(sharing, n_rows, -(-length // shape.block_size), generator), length)
        case = features(n_rows, length, timed.n_reads, timed.n_nodes, shape)
        if times and spent + 6 * sum(times[-1]) * case[0][1] / units[-1][0][1] > SECONDS:  # by the multiplications
            break
        timed.ours(), timed.stock()  # what is compiled, or allocated, at the first call
        start = time.perf_counter()
        pair = interleaved(timed.ours, timed.stock, seconds=SECONDS / len(cases) / 2, least=5, synchronize=synchronize)
        spent += time.perf_counter() - start
        times.append(pair)
        units.append(case)
    if len(times) < LEAST_CASES:
        return None
    return fit(units, times)


# ------------------------------------------------------------------------------------------------------------- keeping
def device_name(device: torch.device) -> str:
    """Gives the CPU's or the GPU's name, as its maker has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def kept(key: str, measure: Callable[[], Costs | None]) -> Costs | None:
    """Takes the costs of `key` from the user's cache, else measures them and puts them there.

    If several processes measure at once, the first one's costs hold for all. Where the cache cannot be read or written,
    say for want of a home directory, costs are measured at every start.

    Raises:
        RuntimeError: the file is there, and does not hold costs.
    """
    try:
        path = cache_dir() / "attend_costs.json"
        known = _read(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, _NotCostsError):
            raise
        return _unkept(measure(), error)
    if key in known:
        return known[key]
    if (costs := measure()) is None:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path.with_name(f".{path.name}.lock")):
            known = {key: costs} | _read(path)
            with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
                file.write(json.dumps(known, indent=1) + "\n")
            os.chmod(file.name, 0o644)  # others may share the cache
            os.replace(file.name, path)
    except OSError as error:
        return _unkept(costs, error)
    return known[key]


class _NotCostsError(RuntimeError):
    """A cache file is there, and does not hold costs."""


def _unkept(costs: Costs | None, error: Exception) -> Costs | None:
    logger.warning("costs of attend cannot be kept, so the next start may decide otherwise: %s", error)
    return costs


def _read(path: Path) -> dict[str, Costs]:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return {}
    try:
        known = json.loads(text)
        ours, stock = features(1, 1, 1, 1, Shape(1, 1, 1, 1))
        for key, costs in known.items():
            numbers = [*costs["attend"], *costs["stock"], costs["margin"]]
            if (len(costs["attend"]), len(costs["stock"])) != (len(ours), len(stock)) or min(numbers) < 0.0:
                raise ValueError(f"{key!r}: not the costs of {len(ours)} and {len(stock)} units")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _NotCostsError(f"{path}: cannot be read ({error!r}); delete it, and costs are measured again") from error
    return known
