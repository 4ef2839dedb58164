"""Whether a row's bits hang on how many rows are beside it, as its companions in shared forward passes decide.

Where they do, a population is the same for the same seed and the same companions only. It is found by trying the
model's own linear layers at start-up: what differs there is certain, what does not is no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase

#: rows of the batches that are compared with one of two rows, the fewest that a pass has
SIZES = (3, 17, 64)


@torch.inference_mode()
def differing_sizes(model: Any, logits: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype) -> list[int]:
    """Lists the sizes of `SIZES` in which a linear layer of a model computes a row otherwise than in a batch of two.

    One layer of each shape is tried, and the lm head. Every tensor-parallel rank takes part.

    Args:
        logits: makes (R, V) logits of (R, width) hidden states.
    """
    layers: dict[tuple[int, int], LinearBase] = {}
    for module in model.modules():
        if isinstance(module, LinearBase):  # a row-parallel one takes a share of the input
            n_in = getattr(module, "input_size_per_partition", module.input_size)
            layers.setdefault((n_in, module.output_size), module)
    calls = [(n_in, lambda rows, layer=layer: layer(rows)) for (n_in, _), layer in layers.items()]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    found: set[int] = set()
    for n_in, call in [*calls, (width, logits)]:
        rows = torch.randn(max(SIZES), n_in, generator=generator).to(device, dtype)
        want = _first_row(call(rows[:2]))
        found |= {n for n in SIZES if not torch.equal(_first_row(call(rows[:n])), want)}
    return sorted(found)


def _first_row(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output)[0]  # beside a bias that is added later
