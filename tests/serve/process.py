"""A real server process over a tiny random model with letters for tokens, for the tests and bench/bench_soak.py."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
from tiny import make_llama

from fastsmc.screen import find_cause

ROOT = Path(__file__).resolve().parents[2]
KEY = "secret"
LETTERS = ["<s>", "</s>", *map(chr, range(ord("a"), ord("z") + 1)), *map(chr, range(ord("A"), ord("Z") + 1))]
MODEL_ARGS = dict(
    dtype="float32",
    enforce_eager=True,
    max_model_len=256,
    max_num_batched_tokens=256,
    max_num_seqs=256,
    kv_cache_memory_bytes=1 << 24,
)
#: the operator's code, by name, beside the package's own potentials
SERVED = {
    name.lower(): f"served:{name}"
    for name in ("Fails", "Slow", "Never", "FailsAtOnce", "FailsAtEnd", "NotANumber", "WrongShape", "Sleeps", "Hangs")
}


def make_letters_model(folder: Path) -> Path:
    """Saves a random Llama over letters, with a tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    path = make_llama(folder, len(LETTERS))
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


def make_metadata(parent: Path) -> Path:
    """Writes the package's metadata, as pip would install it: entry points are found through it. `SERVED` are
    registered potentials there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = parent / "fastsmc-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastsmc\nVersion: 0\n")
    project["entry-points"]["fastsmc.potentials"] |= SERVED
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n\n".join(groups))
    return parent


def make_environment(metadata: Path) -> dict[str, str]:
    """Returns the environment of a process that sees this source tree as installed."""
    folders = [str(metadata), str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class Server:
    """A running server: its address, and clients of it."""

    def __init__(self, process, port, log):
        self.process, self.url, self.log = process, f"http://127.0.0.1:{port}", log
        self.client = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)

    def is_up(self):
        try:
            return self.client.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def smc(self, **body):
        response = self.post("/v1/smc", **body)
        assert response.status_code == 200, response.text
        return response.json()

    def metric(self, name, label=""):
        """The sum of a metric's values, of those with this label (as text)."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(
            float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith((name + "{", name + " ")) and label in line
        )

    def wait_idle(self, seconds=60):
        """Waits until no request is there and no KV block is in use; says whether that was in time, of which a busy
        machine takes more."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
            if all(self.metric(f"vllm:{name}") == 0 for name in names):
                return True
            time.sleep(0.05)
        return False


@contextlib.contextmanager
def running(
    model: Path,
    environment: Mapping[str, str],
    log: Path,
    options: Sequence[str],
    flags: Sequence[str] = (),
    stock: bool = False,
) -> Iterator[Server]:
    """Runs `fastsmc serve` while the context lasts, or with `stock` vLLM's own server, which VLLM_PLUGINS tells of us.

    Args:
        options: flags that set the operator's options.
        flags: further flags, beside those of `MODEL_ARGS`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    engine = [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in MODEL_ARGS.items()
    ]
    command = [sys.executable, "-m", "fastsmc.cli", "serve", str(model)]
    if stock:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        environment = {**environment, "VLLM_PLUGINS": "fastsmc"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [
                *command,
                "--served-model-name",
                "tiny",
                "--port",
                str(port),
                "--host",
                "127.0.0.1",
                "--api-key",
                KEY,
                *options,
                *engine,
                *flags,
            ],
            env=dict(environment),
            cwd=log.parent,  # where no other metadata of the package lies
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    server = Server(process, port, log)
    try:
        while not server.is_up():  # it takes as long as the machine is busy
            assert process.poll() is None, find_cause(text := log.read_text()) or text[-1000:]
            time.sleep(0.1)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
