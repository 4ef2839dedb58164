"""Rows of groups in the call of the model that vLLM's runner makes for an ordinary step: one forward pass for both.

    V1 on a CPU   the runner makes its calls by a method of its own (`_model_forward`), and pads no batch. It computes
                  logits in the same method, so the head's weights, too, are read once for both.
    V2            the runner asks its graph manager for a CUDA graph that holds the step (`dispatch`). For a step that
                  only decodes it is one of the whole model, in which nothing can ride. A step with riders is therefore
                  told what vLLM tells a step of a size that nobody has captured: there is none. It then calls
                  `runner.model` with what it has prepared. What stands there meanwhile calls the model for both: by the
                  graphs of its pieces (PIECEWISE) where a captured size holds them, padded to it, else without graphs.

Anywhere else nothing rides, particle-only steps take turns with ordinary ones, and `Riding.why_not` says why. After the
step vLLM's objects are as they were.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config.compilation import CUDAGraphMode
from vllm.distributed import get_tp_group
from vllm.forward_context import BatchDescriptor, get_forward_context, set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from fastsmc.vllm.adapters import ids
from fastsmc.vllm.attention import AttendImpl, MixedMetadata
from fastsmc.vllm.interventions import Interventions
from fastsmc.vllm.passes import Ride


class Riding:
    """Takes rows along in the ordinary steps of a model runner.

    Args:
        layers: names of the attention layers.
        interventions: under which rows of groups may be.

    Attributes:
        why_not: why rows cannot ride here; None where they can.
    """

    def __init__(self, runner: Any, layers: Sequence[str], device: torch.device, interventions: Interventions) -> None:
        self._interventions = interventions
        self._runner, self._model, self._layers, self._device = runner, runner.model, layers, device
        config = self._config = runner.vllm_config
        self._is_v2 = config.use_v2_model_runner
        impls = [config.compilation_config.static_forward_context[name].impl for name in layers]
        foreign = {type(impl).__name__ for impl in impls if not isinstance(impl, AttendImpl)}
        reasons = {
            "the other tensor-parallel ranks would have to be told": get_tp_group().world_size > 1,
            "vLLM's V1 runner pads its batches to CUDA graphs": not self._is_v2 and device.type != "cpu",
            f"{', '.join(sorted(foreign))} cannot attend for a batch in parts": bool(foreign),
            "vLLM cuts its batches into microbatches (enable_dbo)": config.parallel_config.use_ubatching,
            "attention may give a quantised output (fuse_attn_quant)": (
                config.compilation_config.pass_config.fuse_attn_quant
            ),
        }
        self.why_not = next((reason for reason, holds in reasons.items() if holds), None)

    @contextmanager
    def along(self, ride: Ride) -> Iterator[None]:
        """Has rows ride in the call of the model that vLLM's runner makes within."""
        call, runner = functools.partial(self._call, ride), self._runner
        if not self._is_v2:
            runner._model_forward = call
            runner._set_active_loras = functools.partial(self._set_adapters, ride, runner._set_active_loras)
            self._model.compute_logits = functools.partial(self._compute_logits, ride, self._model.compute_logits)
            try:
                yield
            finally:
                # the classes have their own
                del runner._model_forward, runner._set_active_loras, self._model.compute_logits
            return
        manager = runner.cudagraph_manager
        manager.dispatch, runner.model = functools.partial(_dispatch_none, manager), call
        try:
            yield
        finally:
            runner.model = self._model
            del manager.dispatch  # the class has its own

    def _call(self, ride: Ride, input_ids: Tensor, positions: Tensor, **rest: Any) -> Tensor:
        """Calls the model for ordinary tokens and riding rows; returns the hidden states of the former."""
        batch, ordinary, n = ride.batch, get_forward_context(), len(input_ids)
        end = n + len(batch.tokens)
        size, context = end, {}
        captured = self._find_captured(end) if batch.variants is None else None
        if captured is not None:
            size, buffers = captured, self._runner.input_buffers
            input_ids, positions = (
                _in_place(buffer[:size], first, rows)
                for buffer, first, rows in (
                    (buffers.input_ids, input_ids, batch.tokens),
                    (buffers.positions, positions, batch.positions),
                )
            )
            is_padding = buffers.is_padding[:size]
            is_padding[n:end], is_padding[end:] = False, True
            context = {
                "cudagraph_runtime_mode": CUDAGraphMode.PIECEWISE,
                "batch_descriptor": BatchDescriptor(num_tokens=size),
                "is_padding": is_padding,
            }
        else:
            input_ids = torch.cat([input_ids, batch.tokens.to(input_ids.dtype)])
            positions = torch.cat([positions, batch.positions])
        assert isinstance(ordinary.attn_metadata, dict) and isinstance(ordinary.slot_mapping, dict)  # no microbatches
        metadata = {
            name: MixedMetadata(((0, n, ordinary.attn_metadata[name]), (n, end, ride.metadata[name])))
            for name in self._layers
        }
        # one group of layers has one KV cache, and the same slots (compat.check_kv_cache)
        first = ordinary.slot_mapping[self._layers[0]][:n]
        slots = torch.cat([first, batch.slots, batch.slots.new_full((size - end,), PAD_SLOT_ID)])
        # ordinary tokens are under no intervention
        variants = None if batch.variants is None else torch.cat([batch.variants.new_full((n,), -1), batch.variants])
        start = time.perf_counter()
        with (
            self._interventions.under(variants),
            set_forward_context(
                metadata, self._config, num_tokens=size, slot_mapping=dict.fromkeys(self._layers, slots), **context
            ),
        ):
            hidden = self._model(input_ids=input_ids, positions=positions, **rest)
        if ride.timed and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # else only launches would be timed
        ride.seconds = (time.perf_counter() - start) * (end - n) / end
        # the next replay of a graph overwrites what the last one gave
        ride.hidden = hidden[n:end] if captured is None else hidden[n:end].clone()
        return hidden[:n]

    @staticmethod
    def _set_adapters(
        ride: Ride, set_active: Callable[..., None], logits: tuple, tokens: tuple, adapters: set, *rest: Any
    ) -> None:
        """Sets the LoRA adapters of ordinary tokens and riding rows, as vLLM's runner sets those of the former."""
        rows = ride.batch.adapters or (None,) * len(ride.batch.tokens)
        theirs = {adapter for adapter in rows if adapter is not None}
        set_active(logits + ids(rows), tokens + ids(rows), adapters | theirs, *rest)

    @staticmethod
    def _compute_logits(ride: Ride, compute: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Computes the logits of both in one product; returns those of the ordinary rows, and leaves the others."""
        assert ride.hidden is not None  # the model has been called
        start, n = time.perf_counter(), len(hidden)
        logits = compute(torch.cat([hidden, ride.hidden]))
        ride.logits = logits[n:]
        ride.seconds += (time.perf_counter() - start) * len(ride.hidden) / len(logits)
        return logits[:n]

    def _find_captured(self, n_tokens: int) -> int | None:
        """Finds the captured size of piecewise graphs that holds so many tokens; None if there is none."""
        if not self._is_v2:
            return None
        manager = self._runner.cudagraph_manager
        if manager.use_breakable_cg:  # its graphs read buffers of vLLM's that are not filled here
            return None
        found = _dispatch(manager, n_tokens, n_tokens, None, num_active_loras=0)
        fits = found.cg_mode == CUDAGraphMode.PIECEWISE and found.num_tokens <= len(
            self._runner.input_buffers.input_ids
        )
        return found.num_tokens if fits else None


def _dispatch(manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Asks a graph manager for the graph of a batch, whatever it answers its runner meanwhile."""
    return type(manager).dispatch(manager, *args, **kwargs)


def _dispatch_none(manager: Any, num_reqs: int, num_tokens: int, *args: Any, **kwargs: Any) -> Any:
    """Answers a runner what its graph manager answers where no graph is captured."""
    return dataclasses.replace(
        _dispatch(manager, num_reqs, num_tokens, *args, **kwargs),
        cg_mode=CUDAGraphMode.NONE,
        num_tokens=num_tokens,
        num_reqs=num_reqs,
        uniform_token_count=None,
        max_query_len=None,
    )


def _in_place(buffer: Tensor, first: Tensor, rows: Tensor) -> Tensor:
    """Fills a graph's input: `first` (n,), which is there already, then `rows` (R,), then zeros."""
    n, end = len(first), len(first) + len(rows)
    assert first.data_ptr() == buffer.data_ptr()  # as GPUModelRunner.prepare_inputs makes it
    buffer[n:end], buffer[end:] = rows, 0
    return buffer
