"""`fastsmc serve`: vLLM's server with the plug-in, also where the `vllm` script cannot start.

The script of vLLM asks for the version of a distribution called `vllm`, and its CPU build has another name. So its
`serve` command is called here, with vLLM's own parser.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import entry_points

from fastsmc.vllm import compat
from fastsmc.vllm.serve.plugin import NAME, Endpoints

#: vLLM's plug-ins that it loads without being told to
_GROUPS = ("vllm.general_plugins", "vllm.platform_plugins", "vllm.io_processor_plugins", "vllm.stat_logger_plugins")


def serve(model: str, flags: Sequence[str]) -> None:
    """Runs vLLM's `serve` until it is stopped.

    Raises:
        UnsupportedError: vLLM cannot see the plug-in.
    """
    compat.check_version()
    found = {entry.value for entry in entry_points(group="vllm.endpoint_plugins", name=NAME)}
    if f"{Endpoints.__module__}:{Endpoints.__name__}" not in found:
        raise compat.UnsupportedError(
            "fastsmc is not installed, so vLLM cannot find its plug-in: pip install -e . in its source tree"
        )
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as the `vllm` script does
    parser = FlexibleArgumentParser(prog="fastsmc")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", model, *flags])
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)


def name_plugin() -> None:
    """Adds fastsmc to VLLM_PLUGINS, to those that are loaded anyway: what the user names, or all but HTTP routes."""
    named = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    if "VLLM_PLUGINS" not in os.environ:
        routes = {entry.name for entry in entry_points(group="vllm.endpoint_plugins")}
        named = [entry.name for group in _GROUPS for entry in entry_points(group=group) if entry.name not in routes]
    os.environ["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*named, NAME]))
