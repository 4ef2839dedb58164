"""What launches of the Triton kernels share: configurations, the device, and the scale of scores.

Configurations lie in configs.json: {architecture: {op: {data types: {"num_warps": …, …}}}}, written by bench/tune.py on
a GPU. Data types read "bfloat16+float32+mask": logits, twist if any, mask if any. What an architecture lacks comes from
"default", where the data types "*" stand for all.
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
    """The chosen configuration of a kernel for these matrices on their device."""
    tuned = _configs().get(_architecture(m.logits.device), {}).get(op, {})
    return tuned.get(data_types(m)) or _configs()["default"][op]["*"]


def logit_scale(temperature: float) -> float:
    """As logit_scale in weigh.cuh, rounded to float32: kernels take it so, and draw also uses it in float64."""
    return struct.unpack("f", struct.pack("f", 1.4426950408889634 / temperature))[0]


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
