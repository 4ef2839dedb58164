"""Imported before vLLM in a process with TRITON_INTERPRET=1: lets vLLM's CPU build run its Triton kernels interpreted.

vLLM gives Triton up where it finds no driver: it is shown a CPU backend, which has none and is never asked for one, as
the interpreter compiles nothing. Its cache writer chooses a tile by the GPU's generation: it is told Hopper.
"""

from types import SimpleNamespace

import torch
import triton.backends

triton.backends.backends["cpu"] = SimpleNamespace(driver=None, compiler=None)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
