"""fastsmc's own options of an engine.

`fastsmc.LLM` takes them as arguments, a server as `--additional-config.fastsmc.NAME VALUE`. Both come to stand in the
configuration of vLLM, as `additional_config["fastsmc"]`, which reaches every process.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

KEY = "fastsmc"
#: of max_particle_rows_per_step: a pass is never cut
ALL = "all"


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Says how an engine shares its model between groups and other requests.

    Args:
        shared_forward: "auto": the rows of all groups that are ready go into one forward pass. "never": each group has
            passes of its own, so that the same seed gives the same population whatever else runs.
        max_particle_rows_per_step: rows of a particle pass that one engine step runs while there are ordinary requests.
            None: as many as take three to four ordinary decode steps (`fastsmc.vllm.pace`); "all": no bound.
        captured_steps: groups take steps of fixed shapes, in which the host does not wait for the device
            (`fastsmc.vllm.captured`), where their potential is `capturable` or there is none, and there are no exact
            samples; the others as ever. Such a group's N rows go through the model at every step, together, whatever
            `max_particle_rows_per_step` says, and it keeps its blocks to its end. No group then shares a pass. Not
            with tensor parallelism.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """

    shared_forward: str = "auto"
    max_particle_rows_per_step: int | str | None = None
    captured_steps: bool = False

    def __post_init__(self) -> None:
        if self.shared_forward not in ("auto", "never"):
            raise ValueError(f"shared_forward={self.shared_forward!r}: must be 'auto' or 'never'")
        if not isinstance(self.captured_steps, bool):
            raise ValueError(f"captured_steps={self.captured_steps!r}: must be True or False")
        rows = self.max_particle_rows_per_step
        if rows is not None and rows != ALL and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(
                f"max_particle_rows_per_step={rows!r}: must be a positive integer, {ALL!r} for no bound, or None for "
                "three to four ordinary decode steps"
            )

    @classmethod
    def of(cls, additional_config: Any) -> EngineOptions:
        """Reads them from `VllmConfig.additional_config`."""
        options = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ValueError(f"additional_config[{KEY!r}]={options!r}: must be a mapping of {', '.join(NAMES)}")
        for name, value in options.items():
            if name not in NAMES:
                near = difflib.get_close_matches(str(name), NAMES, n=1)
                raise ValueError(
                    f"additional_config[{KEY!r}][{name!r}]={value!r}: unknown option"
                    + (f"; {near[0]}?" if near else f"; known are {', '.join(NAMES)}")
                )
        return cls(**options)


#: names of the options, as `fastsmc.LLM` takes them beside vLLM's arguments
NAMES = tuple(field.name for field in dataclasses.fields(EngineOptions))


def put_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Moves the options among the arguments of `fastsmc.LLM` to where vLLM takes them, checked.

    Raises:
        ValueError: a value that an option cannot have, or an option that is given twice.
    """
    out = {name: value for name, value in arguments.items() if name not in NAMES}
    options = {name: arguments[name] for name in NAMES if name in arguments}
    additional = out.get("additional_config")
    EngineOptions.of(additional)
    if options:
        if not isinstance(additional, Mapping | None):
            raise ValueError(f"additional_config={additional!r}: must be a mapping beside {', '.join(options)}")
        standing = (additional or {}).get(KEY) or {}
        for name in options:
            if name in standing:
                raise ValueError(f"{name}={options[name]!r}: additional_config[{KEY!r}] holds it, too")
        additional = out["additional_config"] = {**(additional or {}), KEY: {**standing, **options}}
    EngineOptions.of(additional)
    return out
