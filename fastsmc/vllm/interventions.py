"""Interventions in vLLM's model: places for them in its layers, and what stands in these in a forward pass.

    install      at load_model, before anything is traced: each decoder layer ends with an op, as does each down_proj
    Interventions.under(variants)    round a call of the model: what the ops do in it, for each of its tokens

The ops are opaque to torch.compile, so a compiled model calls them too (it would ignore a forward hook). Outside
`under` they return at once, and leave nothing in a CUDA graph; a call under interventions replays no graph. An op does
not know its layer, which would make every layer a graph of its own to compile: the calls of a pass are counted, in the
order of layers, and a pass that does not come to as many as there are places is an error.

In most of vLLM's models a layer returns (hidden, residual), which the next one adds as it normalises them: their sum is
the hidden state x, and what an intervention adds to x is added to `residual`.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.distributed import get_tp_group

from fastsmc.interventions import BLOCK, DOWN_PROJ, LayerIntervention, Sizes, Step
from fastsmc.maps import AtSite, Maps, Site, SiteMaps, blame, lay_out
from fastsmc.smc import SMCError
from fastsmc.vllm.options import EngineOptions

#: in `additional_config`, which is part of what names a compiled model on disk: one without places is another
CACHE_KEY, CACHE_VALUE = "fastsmc_places", 1


# --------------------------------------------------------------------------------------------------- places in a model
@dataclasses.dataclass
class _Call:
    """Is a call of a model under interventions: what its ops do, and how many of each kind have been called."""

    sites: Mapping[Site, AtSite]
    variants: Tensor
    places: Places
    n_blocks: int = 0
    n_products: int = 0


_current: _Call | None = None


def _after_layer(x: Tensor, hidden: Tensor | None) -> None:
    """Maps what a layer puts out: x (Q, H), to which `hidden` is yet to be added where it is given."""
    if _current is None:
        return
    layer = _current.places.blocks[_current.n_blocks]
    _current.n_blocks += 1
    if (maps := _current.sites.get((layer, BLOCK))) is not None:
        source = x + hidden if hidden is not None and maps.reads else None
        maps.apply(x, _current.variants, source)


def _after_down_proj(x: Tensor, inner: Tensor) -> None:
    """Maps what a down_proj has made, x (Q, H), of `inner` (Q, K)."""
    if _current is None:
        return
    layer = _current.places.products[_current.n_products]
    _current.n_products += 1
    if (maps := _current.sites.get((layer, DOWN_PROJ))) is not None:
        maps.apply(x, _current.variants, inner)


# torch.library.custom_op would spend more on each call than the ops do
_library = torch.library.Library("fastsmc", "FRAGMENT")
_library.define("after_layer(Tensor(a!) x, Tensor? hidden) -> ()")
_library.define("after_down_proj(Tensor(a!) x, Tensor inner) -> ()")
for _name, _function in (("after_layer", _after_layer), ("after_down_proj", _after_down_proj)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsmc::{_name}", lambda x, other: None, lib=_library)


class Places(NamedTuple):
    """Says where a model has places.

    Attributes:
        blocks, products: the layers that have one at their end, and at their down_proj, in order.
        sizes: of the model, for `Intervention.check`.
        why_not: why there are none; None if there are.
    """

    blocks: tuple[int, ...]
    products: tuple[int, ...]
    sizes: Sizes
    why_not: str | None = None


def install(model: Any, config: Any) -> None:
    """Puts places into a model that was loaded and never called, if the engine's options ask for them.

    What cannot have any stays as it is, and says why.
    """
    layers = _find_layers(model, config.compilation_config.static_forward_context)
    forms = {_form(type(layer)) for layer in layers.values()}
    model_config = config.model_config
    sizes = Sizes(len(layers), model_config.get_hidden_size(), None, model_config.get_vocab_size())
    if not EngineOptions.of(config.additional_config).interventions:
        why = "this engine has no places for interventions; start it with interventions=True"
        model.fastsmc_places = Places((), (), sizes, why)
        return
    if not layers or None in forms or [*layers] != list(range(len(layers))):
        why = "its decoder layers are not of a kind that is known"
        model.fastsmc_places = Places((), (), sizes, f"{type(model).__name__}: {why}")
        return
    for layer in layers.values():
        _end_with(layer, _end_layer if _form(type(layer)) == "deferred" else _end_whole_layer)
    inner: dict[int, Any] = {n: getattr(getattr(layer, "mlp", None), DOWN_PROJ, None) for n, layer in layers.items()}
    if None not in inner.values():
        sizes = sizes._replace(inner=getattr(inner[0], "base_layer", inner[0]).input_size)  # within LoRA's, or itself
    products = {n: module for n, module in inner.items() if module is not None}
    if config.parallel_config.tensor_parallel_size > 1:  # each rank reads a share; see `Interventions.put`
        products = {}
    for module in products.values():
        _end_with(module, _end_product)
    if isinstance(config.additional_config, dict):
        config.additional_config[CACHE_KEY] = CACHE_VALUE
    model.fastsmc_places = Places(tuple(layers), tuple(products), sizes)


def _find_layers(model: Any, attention: Sequence[str]) -> dict[int, Any]:
    """Finds the decoder layers by number, from the names of the attention layers within them."""
    found = {}
    for name in attention:
        match = re.match(r"(.*?\.(\d+))\.", name)
        if match is None:
            return {}
        try:
            found[int(match[2])] = model.get_submodule(match[1])
        except AttributeError:
            return {}
    return dict(sorted(found.items()))


def _form(kind: type) -> str | None:
    """Says how a layer gives its hidden state: "deferred", as (hidden, residual), or "whole"; None: not known.

    Some layers take and return a residual that they have added themselves (Cohere's).
    """
    forward: Any = kind.forward  # type: ignore[attr-defined]  # of a torch module
    signature = inspect.signature(forward)
    if "residual" in signature.parameters:
        source = inspect.getsource(forward)
        norm_adds = re.search(r"norm\w*\(\s*(hidden_states|x),\s*residual\s*\)", source)
        return "deferred" if norm_adds and not re.search(r"\bresidual\s*\+|\+\s*residual\b", source) else None
    returned = str(signature.return_annotation)
    return "whole" if re.fullmatch(r"(<class '.*)?(torch\.)?Tensor('>)?", returned) else None


def _end_layer(inputs: tuple, output: Any) -> Any:
    hidden, residual = output
    torch.ops.fastsmc.after_layer(residual, hidden)
    return output


def _end_whole_layer(inputs: tuple, output: Any) -> Any:
    torch.ops.fastsmc.after_layer(output, None)
    return output


def _end_product(inputs: tuple, output: Any) -> Any:
    torch.ops.fastsmc.after_down_proj(output[0] if isinstance(output, tuple) else output, inputs[0])
    return output


def _end_with(module: Any, end: Any) -> None:
    """Gives a module a class whose forward does something more at its end; such a class is traced as any other."""
    kind = type(module)

    class Ending(kind):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return end(args, kind.forward(self, *args, **kwargs))

    Ending.__name__, Ending.__qualname__, Ending.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    module.__class__ = Ending


# --------------------------------------------------------------------------------------------------------- in a worker
class _Kept(NamedTuple):
    """Is a list of interventions in a worker; the variant i of its maps has the number `numbers[i]` in the tables."""

    maps: Maps
    numbers: list[int]


class Interventions:
    """Keeps interventions of a worker by name, and calls its model under them.

    All tensor-parallel ranks are told of them in the same order, so a variant has one number on all.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.places: Places = model.fastsmc_places
        self._device = device
        self._kept: dict[str, _Kept] = {}
        self._sites: dict[Site, SiteMaps] = {}

    def put(self, name: str, layers: Sequence[LayerIntervention]) -> None:
        """Keeps a list of interventions.

        Raises:
            ValueError: it does not fit the model, or the model has no places.
        """
        if self.places.why_not is not None:
            raise ValueError(f"intervention: {self.places.why_not}")
        n_ranks = get_tp_group().world_size
        for part in layers:
            if part.place == DOWN_PROJ and n_ranks > 1:
                raise ValueError(
                    f"{type(part).__name__}: its site {DOWN_PROJ} is sharded with tensor_parallel_size={n_ranks}; it "
                    "needs tensor_parallel_size=1"
                )
            part.check(self.places.sizes)
        maps, taken = Maps(layers), {number for kept in self._kept.values() for number in kept.numbers}
        free = (number for number in range(len(taken) + len(maps.variants)) if number not in taken)
        self._kept[name] = _Kept(maps, [next(free) for _ in maps.variants])
        self._lay_out()

    def drop(self, name: str) -> None:
        if self._kept.pop(name, None) is not None:
            self._lay_out()

    def knows(self, name: str | None) -> bool:
        return name is None or name in self._kept

    def _lay_out(self) -> None:
        variants: dict[int, dict[Site, Step]] = {}
        for kept in self._kept.values():
            variants |= zip(kept.numbers, kept.maps.variants, strict=True)
        self._sites = lay_out(variants, max(variants, default=-1) + 1, self._device)

    def of_positions(self, name: str, prompt_len: int, n: int, fresh: bool) -> Tensor:
        """Gives the numbers of the variants at positions 0 to n − 1 of a group that begins now, (n,) int64; −1: none.

        Args:
            fresh: no other group is under these interventions, of whose hidden states `broke` is yet to say something.

        Raises:
            SMCError: there is no intervention of that name.
        """
        if not self.knows(name):
            raise SMCError(f"smc_intervention={name!r}: unknown; it was not registered, or dropped", kind="refused")
        kept = self._kept[name]
        for maps in self._sites.values() if fresh else ():
            maps.finite[kept.numbers] = True
        numbers = [*kept.numbers, -1]
        return torch.tensor([numbers[i] for i in kept.maps.of_positions(prompt_len, n)], device=self._device)

    def broke(self, name: str | None) -> bool:
        """Says whether a hidden state under an intervention came out with NaN or infinite; waits for the device."""
        if name is None or (kept := self._kept.get(name)) is None:
            return False
        return not all(bool(maps.finite[kept.numbers].all()) for maps in self._sites.values())

    def blame(self, name: str) -> str:
        """Says where the hidden states of a group stopped being finite, for its error."""
        if (kept := self._kept.get(name)) is None:
            return "its intervention was dropped"
        return blame(self._sites, kept.maps, kept.numbers)

    @contextmanager
    def under(self, variants: Tensor | None, sites: Mapping[Site, AtSite] | None = None) -> Iterator[None]:
        """Has the model's call within run under interventions.

        Args:
            variants: (Q,) int64, the number of each token's variant, −1 for none; None: no token has any.
            sites: what stands at the places; None: the interventions that are kept here.

        Raises:
            RuntimeError: the model did not pass its places.
        """
        global _current
        if variants is None:
            yield
            return
        _current = call = _Call(self._sites if sites is None else sites, variants, self.places)
        try:
            yield
        finally:
            _current = None
        found, wanted = (call.n_blocks, call.n_products), (len(self.places.blocks), len(self.places.products))
        if found != wanted:
            raise RuntimeError(
                f"the model passed {found} places for interventions at layers and their {DOWN_PROJ}, of {wanted}: was "
                "it compiled without them? Remove vLLM's compile cache"
            )
