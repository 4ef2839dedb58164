"""What vLLM loads where VLLM_PLUGINS names fastsmc, and nothing where it does not.

`activate` runs in every process of a server, before the engine's configuration is built; vLLM calls it wherever fastsmc
is installed, so it looks for the name itself. `Endpoints` adds the HTTP routes, in the front end; vLLM loads it only if
it is named.
"""

from __future__ import annotations

import functools
import os
from argparse import Namespace
from typing import Any

import vllm.envs as envs
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs

NAME = "fastsmc"


def is_wanted() -> bool:
    """Says whether VLLM_PLUGINS names fastsmc."""
    return NAME in (envs.VLLM_PLUGINS or ())


def activate() -> None:
    """Makes every engine that this process configures one that runs groups, and checks requests before they are sent.

    Raises:
        UnsupportedError: this vLLM is not supported.
    """
    if not is_wanted() or hasattr(EngineArgs.create_engine_config, "smc_stock"):
        return
    from fastsmc.vllm import compat

    compat.check_version()
    _wrap(EngineArgs, "create_engine_config", _with_settings)
    # the front end's modules are loaded after the plug-ins, or import them
    from vllm.outputs import RequestOutput
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    from fastsmc.vllm.serve import outputs

    _wrap(InputProcessor, "process_inputs", outputs.with_checks)
    _wrap(AsyncLLM, "generate", outputs.with_groups)
    _wrap(RequestOutput, "add", outputs.with_progress)


def _wrap(kind: type, name: str, make: Any) -> None:
    stock = getattr(kind, name)
    wrapper: Any = functools.wraps(stock)(make(stock))
    wrapper.smc_stock = stock
    setattr(kind, name, wrapper)


def _with_settings(stock: Any) -> Any:
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        put_settings(self)
        return stock(self, *args, **kwargs)

    return create_engine_config


def put_settings(arguments: EngineArgs) -> None:
    """Sets what groups need in an engine's arguments and in the environment, as `fastsmc.LLM` does.

    Raises:
        ValueError: a scheduler or a worker was chosen, or an option cannot be.
        UnsupportedError: a feature that groups do not know is switched on.
    """
    from vllm.platforms import current_platform

    from fastsmc.vllm import compat
    from fastsmc.vllm.options import KEY, EngineOptions
    from fastsmc.vllm.starting import group_settings, surroundings

    settings = group_settings(arguments.max_num_batched_tokens)
    for name, stock in (("scheduler_cls", None), ("worker_cls", "auto")):
        if (value := getattr(arguments, name)) not in (stock, settings[name]):
            raise ValueError(
                f"--{name.replace('_', '-')} {value}: fastsmc sets it itself, as VLLM_PLUGINS asks for; leave out one "
                "of the two"
            )
        setattr(arguments, name, settings.pop(name))
    for name, value in settings.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    # replicas of a dense model are engines of their own, each with the one rank that it sees
    compat.check_arguments(vars(arguments) | {"data_parallel_size": 1})
    compat.check_names(current_platform.device_type, server=isinstance(arguments, AsyncEngineArgs))
    options = EngineOptions.of(arguments.additional_config)
    for name, more in (("offline", ""), ("interventions", f", who name what {KEY}.interventions.NAME=FILE gives")):
        if getattr(options, name) is True and isinstance(arguments, AsyncEngineArgs):
            what = f"is fastsmc.LLM's alone; a server's requests come from its clients{more}"
            raise ValueError(f"{KEY}.{name}=True: {what}")
    options.load_interventions()  # what is no such file is refused before the model is loaded
    replicas = arguments.data_parallel_size_local or arguments.data_parallel_size or 1
    os.environ.update(surroundings((arguments.tensor_parallel_size or 1) * replicas))


class Endpoints:
    """Adds the HTTP routes to vLLM's server, as its `EndpointPlugin` asks for."""

    name = NAME
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        from fastsmc.vllm.serve import page, routes

        routes.attach(app)
        page.attach(app)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Shows the metrics from the start; the routes find all they need in vLLM's own state."""
        from fastsmc.vllm.serve.metrics import front_end_metrics

        if engine_client is not None:
            front_end_metrics(engine_client.vllm_config)
