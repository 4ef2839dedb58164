"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's backends, under their own names, become the subclasses of
                       `BACKENDS`: its CPU backend (cpu.py), on a CUDA device FlashAttention and Triton (gpu.py)
    Attend(layers)     after that: says whether and how `attend` can run on this model (choice.py)
    .measure(...)      at start-up, where costs.json does not say when it pays on such a machine (costs.py)
    .plan(...)         once for a table: who reads what together
    .pays(...)         per step: whether it is faster than vLLM's attention; .metadata(...) then is what the layers get
    AttendImpl         per layer: runs `attend` if the metadata is ours, vLLM's own forward if not (backends.py)

Ordinary requests never see any of it: their metadata is vLLM's, and so is the code that they run.
"""

from fastsmc.vllm.attention.backends import BACKENDS, AttendImpl, register
from fastsmc.vllm.attention.choice import Attend
from fastsmc.vllm.attention.metadata import AttendMetadata, MixedMetadata, rows_read_whole

__all__ = ["BACKENDS", "Attend", "AttendImpl", "AttendMetadata", "MixedMetadata", "register", "rows_read_whole"]
