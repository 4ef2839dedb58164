"""A device that is not the host, on a machine without one: tensors that claim to be on PyTorch's "meta" device and keep
their data here. What a GPU would refuse, they refuse: an operation of tensors on both sides. What a GPU would wait for,
they count: a number or a tensor that comes to the host, and shapes that depend on data."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
#: operations that bring a number to the host, or whose result has as many elements as the data says
_WAITS = {
    "aten._local_scalar_dense.default",
    "aten.item.default",
    "aten.is_nonzero.default",
    "aten.equal.default",
    "aten.nonzero.default",
    "aten._unique2.default",
    "aten.masked_select.default",
}


class Elsewhere(torch.Tensor):
    """A tensor on `DEVICE`; `held` is its data."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=DEVICE
        )

    def __init__(self, held: torch.Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def __repr__(self, **_):
        return f"Elsewhere({self.held!r})"


def run(func, args, kwargs, waits=None):
    """The operation, on the data; `waits` gets its name if the host would wait for it."""
    name = str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    inside = [x for x in tensors if isinstance(x, Elsewhere)]
    asked = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    copies = name.startswith("aten.to.") or name in ("aten._to_copy.default", "aten.copy_.default")
    indexed = name.startswith("aten.index")  # which may be by indices on the host
    operands = [x for x in (*args[:1], *args[2:]) if isinstance(x, torch.Tensor)] if indexed else tensors
    if inside and not copies and any(not isinstance(x, Elsewhere) and x.dim() > 0 for x in operands):
        raise RuntimeError(f"{name}: tensors on both sides")
    stays = asked[0] == DEVICE if asked else isinstance(tensors[0], Elsewhere) if copies else bool(inside)
    if waits is not None and inside:
        by_mask = name == "aten.index.Tensor" and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in _WAITS or by_mask or (copies and not stays):
            waits.append(name)

    def bare(x):
        if isinstance(x, torch.device):
            return torch.device("cpu") if x == DEVICE else x
        return x.held if isinstance(x, Elsewhere) else x

    def wrap(x):
        if not isinstance(x, torch.Tensor):
            return x
        return known[id(x)] if id(x) in known else Elsewhere(x)

    known = {id(x.held): x for x in inside}
    out = func(*tree_map(bare, args), **tree_map(bare, kwargs))
    if stays and not inside and any(out is x for x in tensors):  # copied to itself
        out = out.clone()
    return tree_map(wrap, out) if stays else out


class _Constants(TorchFunctionMode):
    """What PyTorch does without dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            made = args[0] if isinstance(args[0], torch.Tensor) else func(*args, **{**kwargs, "device": "cpu"})
            return made.to(DEVICE)
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]), *args[2:])
        if func is torch.Tensor.tolist and isinstance(args[0], Elsewhere):  # refused for subclasses
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Makes tensors that are asked for on `DEVICE` there, and keeps what a device would have been waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self._constants = _Constants()

    def __enter__(self):
        self._constants.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._constants.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {}, self.waits)
