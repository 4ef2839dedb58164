"""`fastsmc align`: a TOML file says a model, a causal model and sites; out come alignments, accuracies and a picture.

    read a file → Config → pairs held out → train_alignment → heat_map in the engine → files in `out`

Files that a configuration names are looked for from its own folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
import tomllib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastsmc.alignment.causal import CausalModel, Pairs, Sampler, pairs
from fastsmc.alignment.iia import HeatMap, heat_map
from fastsmc.alignment.train import train_alignment
from fastsmc.values import as_int, check_choice, check_int

ENGINES = ("hf", "vllm")
#: of `train_alignment`: what a configuration says elsewhere, or this command does
ELSEWHERE = (
    "trunk", "causal_model", "layer", "position", "variable", "sampler", "n_pairs", "n_eval", "seed", "directory",
    "use_tqdm",
)  # fmt: skip
#: in `out`: a folder of alignments with their metrics, and what the engine has measured
ALIGNMENTS, HEAT_MAP, PICTURE = "alignments", "heat_map.json", "heat_map.png"


@dataclasses.dataclass(frozen=True)
class Config:
    """Holds what a configuration file says.

    Attributes:
        model: name or path, as for `HFEngine` and `LLM`.
        task: "file.py:attribute" or "module:attribute": a pair of a `CausalModel` and a sampler of its inputs, or a
            function without arguments that returns it.
        variable: names of what is aligned.
        layers, positions: of the sites; positions count from 0, or negative from a prompt's end.
        out: folder of the results.
        controls: names of variables that should not be found at the sites.
        engine: what measures: "hf", or "vllm".
        n_pairs, n_held_out: pairs that are trained on, and others that are measured on, of each variable.
        seed: of pairs and training.
        training: further arguments of `train_alignment`.
        engine_args: further arguments of `vllm.LLM`.
    """

    model: str
    task: str
    variable: tuple[str, ...]
    layers: list[int]
    positions: list[int]
    out: Path
    controls: tuple[str, ...] = ()
    engine: str = "hf"
    n_pairs: int = 1000
    n_held_out: int = 500
    seed: int = 0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine_args: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> Config:
        """Reads a TOML file. OSError if it cannot be opened, ValueError naming file, key and what is allowed."""
        data = Path(path).read_bytes()
        try:
            return cls._checked(tomllib.loads(data.decode()), Path(path).resolve().parent)
        except ValueError as error:  # of TOML and of its bytes, too
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _checked(cls, values: dict[str, Any], folder: Path) -> Config:
        known = {field.name: field for field in dataclasses.fields(cls)}
        _known_keys("", values, known)
        for name, field in known.items():
            if name not in values and field.default is field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{name}: is missing")
        for name in ("model", "task", "out"):
            if not isinstance(values[name], str) or not values[name]:
                raise ValueError(f"{name}={values[name]!r}: must be a text")
        for name in ("training", "engine_args"):
            if not isinstance(values.setdefault(name, {}), dict):
                raise ValueError(f"{name}={values[name]!r}: must be a table, as [{name}]")
        _known_keys("training.", values["training"], training_settings())
        check_choice("engine", values.setdefault("engine", "hf"), ENGINES)
        if values["engine_args"] and values["engine"] != "vllm":
            raise ValueError('engine_args: is for engine = "vllm"')
        values["variable"] = _names("variable", values["variable"])
        values["controls"] = _names("controls", values["controls"]) if "controls" in values else ()
        values["layers"] = [check_int("layers", one, 0) for one in _list("layers", values["layers"])]
        values["positions"] = _list("positions", values["positions"])
        if None in [as_int(one) for one in values["positions"]]:
            raise ValueError(f"positions={values['positions']!r}: must be integers")
        for name, low in (("n_pairs", 2), ("n_held_out", 2), ("seed", 0)):
            if name in values:
                check_int(name, values[name], low)
        return cls(**values | {"out": folder / values["out"], "task": _located(values["task"], folder)})

    def load_task(self) -> tuple[CausalModel, Sampler]:
        """Imports the causal model and its sampler. ValueError: it cannot be, or is something else."""
        place, _, name = self.task.rpartition(":")
        try:
            found = getattr(_import(place), name)
            if inspect.isfunction(found):
                found = found()
        except Exception as error:  # whatever the user's code raises
            raise ValueError(f"task={self.task}: cannot be loaded: {type(error).__name__}: {error}") from error
        try:
            model, sampler = found
        except (TypeError, ValueError):
            model, sampler = None, None
        if not isinstance(model, CausalModel) or not callable(sampler):
            raise ValueError(
                f"task={self.task}: must be a CausalModel and a sampler, as a pair, or a function's result"
            )
        return model, sampler


def training_settings() -> dict[str, inspect.Parameter]:
    """Lists what `training` may hold."""
    parameters = inspect.signature(train_alignment).parameters
    return {name: parameter for name, parameter in parameters.items() if name not in ELSEWHERE}


def _known_keys(where: str, values: dict[str, Any], known: Any) -> None:
    for name in values:
        if name not in known:
            raise ValueError(f"{where}{name}: is no key; known are {', '.join(known)}")


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name}={value!r}: must be a list of at least one")
    return value


def _names(name: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else _list(name, value)
    if not all(isinstance(one, str) and one for one in names):
        raise ValueError(f"{name}={value!r}: must be names of variables")
    return tuple(names)


def _located(task: str, folder: Path) -> str:
    place, colon, name = task.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise ValueError(f"task={task!r}: must be file.py:attribute, or module:attribute")
    return f"{folder / place}:{name}" if place.endswith(".py") else task


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(f"fastsmc_task_{Path(place).stem}", place)
    assert spec is not None and spec.loader is not None  # its name ends in .py
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclasses.dataclass(frozen=True)
class Task:
    """Holds what a configuration asks for, after all that can be refused without a model has been."""

    config: Config
    model: CausalModel
    sampler: Sampler
    held_out: Pairs
    controls: dict[str, Pairs]

    @classmethod
    def load(cls, config: Config) -> Task:
        """Imports the causal model, and draws the pairs that are held out. ValueError: naming what cannot be."""
        model, sampler = config.load_task()
        held_out = pairs(model, sampler, config.variable, config.n_held_out, config.seed + 1)
        controls = {
            name: pairs(model, sampler, name, config.n_held_out, config.seed + 2 + i)
            for i, name in enumerate(config.controls)
        }
        return cls(config, model, sampler, held_out, controls)

    def run(self, engine: Callable[[], AbstractContextManager[Any]], say: Callable[[str], None]) -> HeatMap:
        """Trains an alignment at each site, measures them, and writes all files.

        Args:
            engine: starts the engine of vLLM that measures, where there is to be one.
            say: tells a person who looks how far it is.
        """
        from fastsmc import models
        from fastsmc.hf import HFEngine

        config = self.config
        config.out.mkdir(parents=True, exist_ok=True)
        trainer = HFEngine(models.resolve(config.model, say))
        found = train_alignment(
            trainer, self.model, config.layers, config.positions, variable=config.variable, sampler=self.sampler,
            n_pairs=config.n_pairs, n_eval=config.n_held_out, seed=config.seed, directory=config.out / ALIGNMENTS,
            use_tqdm=sys.stderr.isatty(), **config.training,
        )  # fmt: skip
        if config.engine == "hf":
            measured = self._measure(trainer, found)
        else:
            del trainer  # its weights: the engine needs the memory
            with engine() as llm:
                measured = self._measure(llm, found)
        measured.save(config.out / HEAT_MAP)
        measured.plot_iia(config.out / PICTURE)
        return measured

    def _measure(self, llm: Any, found: dict[tuple[int, Any], Any]) -> HeatMap:
        config = self.config
        return heat_map(llm, self.held_out, config.layers, config.positions, alignments=found, controls=self.controls)


def format_heat_map(found: HeatMap, out: Path) -> str:
    """Sets the accuracies as a table, a site per line, and what frames them below it."""
    names = {", ".join(found.variable): found, **found.controls}
    widths = [max(len(name), 6) for name in names]
    heads = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
    lines = ["  ".join(["layer", "position", "dims", *heads])]
    for i, layer in enumerate(found.layers):
        for j, position in enumerate(found.positions):
            dims = "all" if found.dims is None else str(found.dims[i, j])
            shares = [f"{one.iia[i, j]:{width}.3f}" for one, width in zip(names.values(), widths, strict=True)]
            lines.append("  ".join([f"{layer:5}", f"{position:8}", f"{dims:>4}", *shares]))
    for what in ("accuracy", "agreement"):
        shares = [f"{getattr(one, what):{width}.3f}" for one, width in zip(names.values(), widths, strict=True)]
        lines.append("  ".join([f"{what + ' without':21}", *shares]))
    return "\n".join([*lines, "", f"{found.n_pairs} pairs that were held out; files in {out}"])
