"""What the plug-in does to a process, without a server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fastsmc import cli


def test_inert_unless_named(environment):
    """Where VLLM_PLUGINS does not name it, vLLM stays as it was; it looks so itself, as vLLM loads it all the same."""
    script = (
        "from vllm.plugins import load_general_plugins; load_general_plugins()\n"
        "import os, sys; from vllm.engine.arg_utils import EngineArgs\n"
        "plugin = sys.modules['fastsmc.vllm.serve.plugin']\n"
        "print(hasattr(EngineArgs.create_engine_config, 'smc_stock'), 'fastsmc.vllm.llm' in sys.modules)\n"
        "os.environ['VLLM_PLUGINS'] = 'other,fastsmc'; plugin.activate(); first = EngineArgs.create_engine_config\n"
        "plugin.activate(); print(hasattr(first, 'smc_stock'), EngineArgs.create_engine_config is first)"
    )
    plain = {name: value for name, value in environment.items() if name != "VLLM_PLUGINS"}
    done = subprocess.run([sys.executable, "-c", script], env=plain, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-2:] == ["False False", "True True"], done.stderr


def test_settings(monkeypatch, letters_model):
    from vllm.engine.arg_utils import EngineArgs

    from fastsmc.vllm.llm import engine_args
    from fastsmc.vllm.serve import plugin

    monkeypatch.setenv("VLLM_PLUGINS", "fastsmc")
    monkeypatch.setattr(plugin.os, "environ", {**plugin.os.environ})
    ours, model = engine_args({}), {"model": str(letters_model)}
    arguments = EngineArgs(**model)
    plugin.put_settings(arguments)
    assert {name: getattr(arguments, name) for name in ours} == ours
    plugin.put_settings(arguments)  # of an engine that has been set up already
    own = EngineArgs(**model, max_num_seqs=7, block_size=64)
    plugin.put_settings(own)
    assert (own.max_num_seqs, own.block_size, own.scheduler_cls) == (7, 64, ours["scheduler_cls"])
    for name in ("scheduler_cls", "worker_cls"):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} mine: fastsmc sets it itself"):
            plugin.put_settings(EngineArgs(**model, **{name: "mine"}))
    with pytest.raises(ValueError, match="unknown option; max_groups"):
        plugin.put_settings(EngineArgs(**model, additional_config={"fastsmc": {"max_group": 1}}))
    plugin.put_settings(EngineArgs(**model, data_parallel_size=2))


def test_names_of_the_front_end_are_probed_where_there_is_one(monkeypatch, letters_model):
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

    from fastsmc.vllm import compat, names
    from fastsmc.vllm.serve import plugin

    monkeypatch.setattr(plugin.os, "environ", {**plugin.os.environ})
    monkeypatch.setattr(compat, "check_names", compat.check_names.__wrapped__)  # without the cache
    server, offline = AsyncEngineArgs(str(letters_model)), EngineArgs(str(letters_model))
    plugin.put_settings(server)
    monkeypatch.setattr(names, "CALLS", names.CALLS | {"vllm.no_such_front_end:route": ()})
    monkeypatch.setattr(names, "ONLY", names.ONLY | {"vllm.no_such_front_end": "server"})
    plugin.put_settings(offline)
    with pytest.raises(compat.UnsupportedError, match="lacks what fastsmc uses: vllm.no_such_front_end:route$"):
        plugin.put_settings(server)


def test_streams_hold_no_payloads():
    """From vLLM 0.33 on, a stream's chunks hold the kv_transfer_params that its handler gets."""
    import asyncio
    from types import SimpleNamespace

    from fastsmc.vllm.serve.routes import _Client

    class Client:
        async def generate(self, smc_record):
            yield SimpleNamespace(kv_transfer_params={"smc": {}})

    async def get(stream):
        return [output.kv_transfer_params async for output in _Client(Client(), stream).generate()]

    assert asyncio.run(get(True)) == [None] and asyncio.run(get(False)) == [{"smc": {}}]


def test_serve_command(monkeypatch):
    """The command names the plug-in, finds the model, serves it by its name, and hands on vLLM's flags."""
    from fastsmc import models
    from fastsmc.vllm.serve import launch

    calls = []
    monkeypatch.setattr(launch, "serve", lambda model, flags: calls.append((model, flags)))
    monkeypatch.setattr(launch.os, "environ", {"VLLM_PLUGINS": "other"})
    monkeypatch.setitem(models.MODELS, "smollm2", lambda say: "/models/small")
    flags = ["--port", "1", "-tp", "2", "--additional-config.fastsmc.max_groups=3"]
    assert cli.main(["serve", "smollm2", *flags]) == 0
    assert cli.main(["serve", "smollm2", "--served_model_name=mine"]) == cli.main(["serve", "org/other"]) == 0
    assert calls == [
        ("/models/small", [*flags, "--served-model-name", "smollm2"]),
        ("/models/small", ["--served_model_name=mine"]),
        ("org/other", []),
    ]
    assert launch.os.environ["VLLM_PLUGINS"] == "other,fastsmc"
    launch.os.environ.clear()
    launch.name_plugin()
    assert launch.os.environ["VLLM_PLUGINS"].split(",")[-1] == "fastsmc"
    assert "lora_filesystem_resolver" in launch.os.environ["VLLM_PLUGINS"]  # loaded where nothing is named
