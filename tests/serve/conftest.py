"""A real server process over a tiny random model with letters for tokens."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from tiny import make_llama  # noqa: E402

from fastsmc.screen import find_cause  # noqa: E402

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
#: registered potentials beside the package's own
SERVED = {"fails": "served:Fails", "slow": "served:Slow", "never": "served:Never"}
#: limits of the server's operator
MAX_PARTICLES, MAX_PARTICLE_TOKENS, MAX_GROUPS = 128, 8192, 4


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory):
    """A random Llama over letters; its generation config has a default temperature, top_p and penalty."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    path = make_llama(tmp_path_factory.mktemp("letters"), len(LETTERS))
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def twist_path(letters_model, tmp_path_factory):
    """A random twist of that model, which the server knows as "small"."""
    import torch

    from fastsmc.twists import Card, Head, Twist

    torch.manual_seed(0)
    head, path = Head(64, len(LETTERS), None), tmp_path_factory.mktemp("twist")
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    card = Card(
        kind="linear", loss="ctl", base_model=str(letters_model), vocab_size=len(LETTERS), hidden_size=64,
        tokenizer=None, input_size=64, rank=64,
    )  # fmt: skip
    Twist(card, head, None).save(path)
    return path


@pytest.fixture(scope="session")
def metadata(tmp_path_factory):
    """A directory with the package's metadata, as pip would install it: entry points are found through it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    folder = tmp_path_factory.mktemp("metadata") / "fastsmc-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastsmc\nVersion: 0\n")
    project["entry-points"]["fastsmc.potentials"] |= SERVED
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (folder / "entry_points.txt").write_text("\n\n".join(groups))
    return folder.parent


@pytest.fixture(scope="session")
def environment(metadata):
    """The environment of a process that sees this source tree as installed."""
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

    def metric(self, name):
        """The sum of a metric's values."""
        lines = self.client.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))

    def wait_idle(self, seconds):
        """Waits until no request is there and no KV block is in use; says whether that was in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
            if all(self.metric(f"vllm:{name}") == 0 for name in names):
                return True
            time.sleep(0.05)
        return False


@pytest.fixture(scope="session")
def server(letters_model, twist_path, environment, tmp_path_factory):
    """`fastsmc serve` with an operator's limits, potentials and twist."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {
        "max_particles": MAX_PARTICLES,
        "max_particle_tokens": MAX_PARTICLE_TOKENS,
        "max_groups": MAX_GROUPS,
        "potentials": ",".join(["lexicon", "regex", *SERVED]),
        "twists.small": str(twist_path),
    }
    flags = [f"--additional-config.fastsmc.{name}={value}" for name, value in options.items()]
    flags += [
        f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in MODEL_ARGS.items()
    ]
    flags += ["--no-enable-prefix-caching", "--override-generation-config", '{"top_p": 0.9, "repetition_penalty": 1.3}']
    command = [sys.executable, "-m", "fastsmc.cli", "serve", str(letters_model), "--served-model-name", "tiny"]
    log = tmp_path_factory.mktemp("server") / "log"
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), "--host", "127.0.0.1", "--api-key", KEY, *flags],
            env=environment,
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
