"""What launches of the Triton kernels share: configurations, the device, and the scale of scores.

configs.json has the configurations, which bench/tune.py writes on a GPU: {architecture: {op: {data types: {…}}}}, with
num_warps and the like innermost. Data types read "bfloat16+float32+mask": those of logits and, where they are given, of
twist and mask. What an architecture lacks comes from "default", where the data types "*" stand for all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from fastsmc.ops._tensors import Matrices

CONFIGS = Path(__file__).parent / "configs.json"


@functools.cache
def _configs() -> dict[str, dict[str, dict[str, dict[str, int]]]]:
    return json.loads(CONFIGS.read_text())["configs"]


@functools.cache
def _architecture(device: torch.device) -> str:
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "default"


def data_types(m: Matrices) -> str:
    types = [str(t.dtype).removeprefix("torch.") for t in (m.logits, m.log_psi) if t is not None]
    return "+".join(types + ["mask"] * (m.mask is not None))


def config(op: str, m: Matrices) -> dict[str, int]:
    """Looks up the configuration of a kernel for these matrices on their device."""
    tuned = _configs().get(_architecture(m.logits.device), {}).get(op, {})
    return tuned.get(data_types(m)) or _configs()["default"][op]["*"]


def temperature_arguments(
    temperature: float, temperatures: Tensor | None, float64: Tensor
) -> tuple[float, Tensor, int]:
    """Gives the temperatures as kernels take them: (scale of all rows, vector, its length or 0).

    The scale is what logit_scale in weigh.cuh makes of `temperature`, 1/T in units of log 2, rounded to float32.
    Kernels take it as float32, and draw uses that very number in float64 too. Where no vector is, any tensor of its
    data type stands for it.
    """
    scale = struct.unpack("f", struct.pack("f", 1.4426950408889634 / temperature))[0]
    return (scale, float64, 0) if temperatures is None else (scale, temperatures, temperatures.shape[0])


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Makes a device the current one: Triton launches on that, whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
