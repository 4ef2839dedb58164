"""The ops of a step, `attend → weigh → resample → reindex → draw`, `uniforms`, `redraw` and `intervene`, on tensors.

Each op validates, picks a backend by device and calls it. Backends: 'cpu' (fastsmc._C, C++ and OpenMP) for CPU tensors,
on GPUs 'triton' (fastsmc.kernels) for weigh, draw, redraw and intervene, 'cuda' (fastsmc._C, if built with it) for
uniforms, resample and reindex; 'torch' (eager PyTorch) on any device. The oracle of all of them is fastsmc.reference.
"""

# torch comes before fastsmc._C: its OpenMP runtime then is the one that both use
import torch  # noqa: F401  # isort: skip

from fastsmc.ops.attend import BF16_MATH, AttendPlan, attend, plan_attend
from fastsmc.ops.draw import NO_TOKEN, Drawn, draw, stratify
from fastsmc.ops.intervene import intervene
from fastsmc.ops.redraw import Redrawn, gumbel, redraw, redraw_logits
from fastsmc.ops.reindex import reindex
from fastsmc.ops.resample import Resampled, ess_log_mean, resample
from fastsmc.ops.settle import Histories, settle
from fastsmc.ops.uniforms import uniforms
from fastsmc.ops.weigh import TILE, Weighed, weigh

__all__ = [
    "BF16_MATH",
    "NO_TOKEN",
    "TILE",
    "AttendPlan",
    "Drawn",
    "Histories",
    "Redrawn",
    "Resampled",
    "Weighed",
    "attend",
    "draw",
    "ess_log_mean",
    "gumbel",
    "intervene",
    "plan_attend",
    "redraw",
    "redraw_logits",
    "reindex",
    "resample",
    "settle",
    "stratify",
    "uniforms",
    "weigh",
]
