"""A real server process that the tests of this folder share."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")
httpx = pytest.importorskip("httpx", reason="httpx is not installed")

from fastsmc.interventions import Steer  # noqa: E402

from .process import (  # noqa: E402
    KEY,
    LETTERS,
    MODEL_ARGS,
    SERVED,
    make_environment,
    make_letters_model,
    make_metadata,
    running,
)

__all__ = ["KEY", "LETTERS", "MODEL_ARGS", "httpx"]
CALM = [Steer(0, torch.randn(64, generator=torch.Generator().manual_seed(0)), 2.0), Steer(1, torch.ones(64), -1.0, [9])]
#: limits of the server's operator. A helper is nice to what else runs: 5 s were once too few for a pattern, beside two
#: other jobs; all of it passes only where something hangs, as one request of the soak does
MAX_PARTICLES, MAX_PARTICLE_TOKENS, MAX_GROUPS, SETUP_TIMEOUT_S = 128, 8192, 4, 30


@pytest.fixture(scope="session")
def letters_model(tmp_path_factory):
    return make_letters_model(tmp_path_factory.mktemp("letters"))


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
def calm(tmp_path_factory):
    """The file of an intervention, which the server knows as "calm"."""
    from fastsmc.interventions import save

    path = tmp_path_factory.mktemp("interventions") / "calm.safetensors"
    save(CALM, path)
    return path


@pytest.fixture(scope="session")
def metadata(tmp_path_factory):
    return make_metadata(tmp_path_factory.mktemp("metadata"))


@pytest.fixture(scope="session")
def environment(metadata):
    return make_environment(metadata)


@pytest.fixture(scope="session")
def server(letters_model, twist_path, calm, environment, tmp_path_factory):
    """`fastsmc serve` with an operator's limits, potentials, twist and intervention, and a generation config of
    temperature, top_p, penalty. vLLM's own switches for operators are there, too (/pause, /resume,
    /reset_prefix_cache), and its routes of tokens."""
    options = {
        "max_particles": MAX_PARTICLES,
        "max_particle_tokens": MAX_PARTICLE_TOKENS,
        "max_groups": MAX_GROUPS,
        "setup_timeout_s": SETUP_TIMEOUT_S,
        "potentials": ",".join(["lexicon", "regex", *SERVED]),
        "twists.small": str(twist_path),
        "interventions.calm": str(calm),
    }
    flags = [f"--additional-config.fastsmc.{name}={value}" for name, value in options.items()]
    more = ["--enable-scale-out", "--override-generation-config", '{"top_p": 0.9, "repetition_penalty": 1.3}']
    environment = {**environment, "VLLM_SERVER_DEV_MODE": "1"}
    log = tmp_path_factory.mktemp("server") / "log"
    with running(letters_model, environment, log, flags, ["--no-enable-prefix-caching", *more]) as server:
        yield server
