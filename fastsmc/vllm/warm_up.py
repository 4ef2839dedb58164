"""What groups would compile at their first steps is compiled at start-up: Triton's kernels on a GPU.

Triton compiles a kernel anew for other data types, for what is given and what is None, for rows that are read once or
more often, and for addresses and strides that are or are not divisible by 16. `call_ops`, `call_intervened` and
`Attend.warm_up` make the calls that differ in these; the numbers of rows, columns and parts are none of them.
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
        twists.append({"power": torch.ones(n, dtype=torch.float64, device=device)})  # beside a twist it changes nothing
        for twist in twists:
            call(rows, logit_rows=rows.clamp(max=1), **twist)


@torch.inference_mode()
def call_intervened(logits: Tensor, hidden: Tensor, inner: int | None) -> None:
    """Calls `intervene` and `redraw` in all the ways in which groups under interventions and their counterfactuals do.

    Args:
        logits: as in `call_ops`.
        hidden: (2, H), hidden states, with their data type.
        inner: width of what a down_proj reads; None: there are no places at these.
    """
    device, width, rows = logits.device, hidden.shape[1], torch.arange(2, device=logits.device)
    offsets, shift = torch.tensor([0, 1], device=device), torch.zeros(1, width, device=device)
    finite = torch.ones(1, dtype=torch.bool, device=device)
    for source in (hidden, None if inner is None else hidden.new_zeros(2, inner)):
        if source is not None:
            down = torch.zeros(1, source.shape[1], device=device)
            ops.intervene(hidden, rows - 1, offsets, down, shift, shift, source=source, finite=finite)
    floats: dict[str, Any] = {"dtype": torch.float64, "device": device}
    for dtype in (logits.dtype, torch.float32):
        factual = torch.zeros(2, logits.shape[1], dtype=dtype, device=device)
        one = logits[0].clone()[None], factual[0].clone()[None], rows[:1]
        ops.redraw(*one, torch.zeros(1, 2, **floats))  # along the text itself
        for n in (2, 3):  # as many rows as logits, or more
            at = torch.arange(n, device=device).clamp_(max=1)
            ops.redraw(
                logits, factual, rows, torch.zeros(n, 2, **floats), logit_rows=at, factual_rows=at,
                temperature=torch.ones(n, **floats),
            )  # fmt: skip
