"""fastsmc's own options of an engine.

`fastsmc.LLM` takes them as arguments, a server as `--additional-config.fastsmc.NAME VALUE`. Both come to stand in the
configuration of vLLM, as `additional_config["fastsmc"]`, which reaches every process.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

from fastsmc.interventions import LayerIntervention, load
from fastsmc.potentials import GROUP, registry

KEY = "fastsmc"
#: of max_particle_rows_per_step: a pass is never cut
ALL = "all"
#: where the operator's code of a potential is, as entry points have it
_CODE = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """Says how an engine shares its model between groups and other requests, and what a server's clients may ask of it.

    What a request is refused for is `fastsmc.vllm.request`'s; a server's own potentials and twists are set up before
    it takes requests (`fastsmc.vllm.shelf`).

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
        interventions: the model's layers have places for interventions (`fastsmc.vllm.interventions`): True, for those
            that `LLM.smc` and others take, which is not for a server; or {name: file}, of files that
            `fastsmc.interventions.save` wrote, for those that requests name, too. A place is an op in the layer,
            whether there are interventions or not, which made steps of 64 rows 3 to 6 % longer on two cores.
        potentials: the potentials that requests may name: registered names (a list, or a string with commas), or
            {name: "module:attr"}, code of the operator's; None: all registered names.
        twists: {name: directory} of the learned twists that requests may name; None: none.
        reward_models: {name: directory or name on the hub} of reward models that workers load for `HFReward`, in the
            engine's dtype (under tensor parallelism rank 0 alone); the KV cache gets what they leave. None: none.
        max_particles: the largest N of a group; None: as many as the engine has rows.
        max_particle_tokens: the largest N · max_tokens of a group, with the tokens of the histories that follow a
            counterfactual group's text; None: no limit.
        max_groups: groups that may wait to be admitted; None: no limit.
        setup_timeout_s: seconds after which the process that prepares a potential which a request names is killed.
        offline: `fastsmc.LLM` sets it: requests come from the program itself, and not from clients. They may name the
            directory of any twist, and objects that the program has registered.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """

    shared_forward: str = "auto"
    max_particle_rows_per_step: int | str | None = None
    captured_steps: bool = False
    interventions: bool | Mapping[str, str] = False
    potentials: Sequence[str] | Mapping[str, str] | str | None = None
    twists: Mapping[str, str] | None = None
    reward_models: Mapping[str, str] | None = None
    max_particles: int | None = None
    max_particle_tokens: int | None = None
    max_groups: int | None = None
    setup_timeout_s: float = 60.0
    offline: bool = False

    def __post_init__(self) -> None:
        if self.shared_forward not in ("auto", "never"):
            raise ValueError(f"shared_forward={self.shared_forward!r}: must be 'auto' or 'never'")
        for name in ("captured_steps", "offline"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        rows = self.max_particle_rows_per_step
        if rows is not None and rows != ALL and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ValueError(
                f"max_particle_rows_per_step={rows!r}: must be a positive integer, {ALL!r} for no bound, or None for "
                "three to four ordinary decode steps"
            )
        for name in ("max_particles", "max_particle_tokens", "max_groups"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r}: must be a positive integer, or None for no limit")
        seconds = self.setup_timeout_s
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not (number and 0 < seconds < math.inf):
            raise ValueError(f"setup_timeout_s={seconds!r}: must be a positive number of seconds")
        self._check_names()

    def _check_names(self) -> None:
        names = self.potentials
        if isinstance(names, str):
            names = [name.strip() for name in names.split(",")]
            object.__setattr__(self, "potentials", names)
        if isinstance(names, Mapping):
            for name, code in names.items():
                if not _is_name(name) or not isinstance(code, str) or not _CODE.fullmatch(code):
                    raise ValueError(f"potentials[{name!r}]={code!r}: must be a name and the 'module:attr' of its code")
        elif names is not None:
            if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"potentials={names!r}: must be a list of registered names, or a mapping of names to 'module:attr'"
                )
            known = registry.registered()
            for name in names:
                if name not in known:
                    raise ValueError(f"potentials: {name!r} is not registered; known are {', '.join(known)}")
        for option, what in (("twists", "twist"), ("reward_models", "reward model")):
            paths = getattr(self, option)
            if not isinstance(paths, Mapping | None):
                raise ValueError(f"{option}={paths!r}: must be a mapping of names to directories")
            for name, path in (paths or {}).items():
                if not _is_name(name) or not isinstance(path, str) or not path:
                    raise ValueError(f"{option}[{name!r}]={path!r}: must be a name and the directory of a {what}")
        if not isinstance(self.interventions, bool | Mapping):
            what = "True or False, or a mapping of names to files"
            raise ValueError(f"interventions={self.interventions!r}: must be {what}")
        for name, path in self.known_interventions().items():
            if not _is_name(name) or not isinstance(path, str) or not path:
                raise ValueError(f"interventions[{name!r}]={path!r}: must be a name and the file of interventions")

    def known_potentials(self) -> Mapping[str, EntryPoint]:
        """Returns the potentials that requests may name, by name."""
        if isinstance(self.potentials, Mapping):
            return {name: EntryPoint(name, code, GROUP) for name, code in self.potentials.items()}
        known = registry.registered()
        return known if self.potentials is None else {name: known[name] for name in self.potentials}

    def known_interventions(self) -> Mapping[str, str]:
        """Returns the files of the interventions that requests may name, by name."""
        return self.interventions if isinstance(self.interventions, Mapping) else {}

    def load_interventions(self, use: Callable[[str, list[LayerIntervention]], Any] | None = None) -> None:
        """Loads these files, one after the other, and hands each to `use`, where it is given.

        Raises:
            ValueError: naming the option: a file cannot be read, or holds anything but interventions on layers, which
                alone are the model's and not a request's; or `use` refuses it.
        """
        for name, path in self.known_interventions().items():
            try:
                parts = load(path)
                layers = [part for part in parts if isinstance(part, LayerIntervention)]
                if not layers or len(layers) < len(parts):
                    held = ", ".join(type(part).__name__ for part in parts) or "nothing"
                    raise ValueError(f"holds {held}; must hold interventions on layers alone, at least one")
                for layer in layers:
                    layer.check_registered()
                if use is not None:
                    use(name, layers)
            except (OSError, ValueError) as error:
                said = getattr(error, "strerror", None) or str(error).removeprefix(f"{path}: ")
                raise ValueError(f"interventions[{name!r}]={path!r}: {said}") from None

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


def _is_name(name: Any) -> bool:
    """Says whether an operator's name of something can be told from a path, and from the name of an object."""
    return isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) is not None


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
    EngineOptions.of(additional).load_interventions()  # here they are refused at once, in a worker after minutes
    return out
