"""What groups would compile at their first steps is compiled at start-up: Triton's kernels on a GPU.

Triton compiles a kernel anew for other data types, for what is given and what is None, for rows that are read once or
more often, and for addresses and strides that are or are not divisible by 16. `call_ops` and `Attend.warm_up` make the
calls that differ in these; the numbers of rows, columns and parts are none of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsmc import ops


@torch.inference_mode()
def call_ops(logits: Tensor) -> None:
    """Calls `weigh` and `draw` in all the ways in which a group calls them.

    Args:
        logits: (2, V) as the model gives them, with its data type and row stride.
    """
    device, vocab = logits.device, logits.shape[1]
    floats = torch.zeros(3, vocab, device=device)
    mask = torch.full((3, -(-vocab // 32)), -1, dtype=torch.int32, device=device)
    uniforms = torch.zeros(3, dtype=torch.float64, device=device)

    def call(rows: Tensor, **given: Any) -> None:
        weighed = ops.weigh(logits, **given)
        ops.draw(logits, weighed, rows, uniforms[: len(rows)], **given)

    ops.weigh(logits)  # as where continuations are scored
    for n in (2, 3):  # as many rows as logits, or more
        rows = torch.arange(n, device=device)
        masked = {"mask": mask, "mask_rows": rows}
        twists: list[dict[str, Tensor]] = [{}, masked]
        for values in (floats, floats[:1], floats[:1].expand(3, -1)):  # a row of log ψ each, one for all
            twist = {"log_psi": values, "psi_rows": rows.clamp(max=len(values) - 1)}
            # a regular expression's log ψ is float16
            twists += [twist, twist | masked, twist | {"log_psi": values.half()}]
        for twist in twists:
            call(rows, logit_rows=rows.clamp(max=1), **twist)
