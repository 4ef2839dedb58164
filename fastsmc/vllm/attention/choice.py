"""Says whether `attend` can run on a model, and for which rows it is the faster."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionType

from fastsmc import ops
from fastsmc.ops.attend import AttendPlan
from fastsmc.vllm import compat
from fastsmc.vllm.attention import costs as attend_costs
from fastsmc.vllm.attention.backends import AttendImpl
from fastsmc.vllm.attention.metadata import AttendMetadata
from fastsmc.vllm.compat import get_logger

logger = get_logger(__name__)


class Attend:
    """Says whether `attend` can run on a model, and when it pays.

    Args:
        layers: vLLM's attention layers, once their KV cache is there.
        fused_output: whether vLLM may ask attention for an output that is quantised already.

    Attributes:
        why_not: why groups use vLLM's own attention here; None where `attend` can run.
        backend: the backend of ops.plan_attend.
        shape: the shape of the layers.
        layout: the layout of their KV cache, one of ops.attend's.
        costs: what `pays` decides by. The committed ones; None if there are none, until `measure` finds some.
    """

    def __init__(self, layers: Sequence[Any], fused_output: bool = False) -> None:
        self.why_not: str | None = None
        layer = layers[0]
        if not isinstance(layer.impl, AttendImpl):
            self.why_not = f"no kernel for {type(layer.impl).__name__}"
            return
        impl, cache = layer.impl, layer.kv_cache
        self.shape = attend_costs.Shape(impl.num_heads, impl.num_kv_heads, impl.head_size, cache.shape[2])
        self.backend = impl.backend
        impls = [layer.impl for layer in layers]
        kinds = {
            (type(layer.impl), layer.kv_cache.shape, layer.kv_cache.dtype, layer.impl.kv_cache_dtype)
            for layer in layers
        }
        for name, found in {
            "attention that is not a decoder's": any(impl.attn_type != AttentionType.DECODER for impl in impls),
            "ALiBi": any(impl.alibi_slopes is not None for impl in impls),
            "a soft cap of logits": any(impl.logits_soft_cap for impl in impls),
            "attention sinks": any(impl.sinks is not None for impl in impls),
            "attention layers that differ": len(kinds) > 1,
            "a quantised output (fuse_attn_quant)": fused_output,
            **impl.unknown(layers),
        }.items():
            if found:
                self.why_not = f"attend does not know {name}"
                return
        self._key = impl.cost_key(layer)
        if (layout := impl.find_layout(layer)) is None:
            self.why_not = f"attend does not know the KV layout of vLLM's kernels for {self._key!r}"
            return
        self.layout = layout
        self.costs = attend_costs.committed(self._key)

    def measure(
        self,
        layers: Mapping[str, Any],
        stock_metadata: Callable[[Tensor, int], Mapping[str, Any]],
        max_rows: int,
        max_length: int,
    ) -> None:
        """Sets costs that are not committed: from the user's cache, or by timing the forward of the layers.

        Timing only reads the KV caches, in which no request has written yet. It takes the layers one after the other,
        as a step does, so that a layer's keys and values have left the processor's cache when its turn comes again.

        Args:
            layers: vLLM's attention layers by name, all of one shape.
            stock_metadata: makes vLLM's metadata by layer from (block table, length).
            max_rows, max_length: the most that a group can have in this engine.
        """
        first, shape = next(iter(layers.values())), self.shape
        cache, dtype, device = first.kv_cache, first.dtype, first.kv_cache.device
        if cache.dtype != dtype:  # its queries come quantised, which only vLLM's layer does
            logger.warning("attend is not used: there are no costs of %s", self._key)
            return
        cases = attend_costs.candidates(max_rows, max_length, len(cache), shape.block_size)

        def measure() -> attend_costs.Costs | None:
            start = time.perf_counter()
            synchronize = torch.cuda.synchronize if device.type == "cuda" else None
            try:
                costs = attend_costs.measure(
                    cases, functools.partial(self._time_case, layers, stock_metadata), shape, synchronize
                )
            except Exception:  # say a kernel that needs more shared memory than this GPU has
                logger.exception("attend: a case of %s could not be timed", self._key)
                return None
            spent = time.perf_counter() - start
            logger.info("attend: costs of %s measured in %.1f s: %s", self._key, spent, costs)
            return costs

        threads = torch.get_num_threads() if device.type == "cpu" else 0
        key = {
            "device": attend_costs.device_name(device), "threads": threads, "kernels": self._key, **shape._asdict(),
            "cases": f"{len(cases)} to {cases[-1:]}", "vllm": compat.vllm_version(), "recipe": attend_costs.RECIPE,
        }  # fmt: skip
        self.costs = attend_costs.kept(", ".join(f"{name} {value}" for name, value in key.items()), measure)
        if self.costs is None:
            logger.warning("attend is not used: too few cases could be timed in this engine to know what it costs")

    def _time_case(
        self,
        layers: Mapping[str, Any],
        stock_metadata: Callable[[Tensor, int], Mapping[str, Any]],
        table: Tensor,
        length: int,
    ) -> attend_costs.Timed:
        """Makes the calls that `measure` times for a table (R, C) whose rows have `length` tokens."""
        layer, shape = next(iter(layers.values())), self.shape
        known_shared = int((table == table[:1]).all(0).long().cumprod(0).sum())
        table = table.to(layer.kv_cache.device)
        plan, theirs = self.plan(table, known_shared), stock_metadata(table, length)
        like: dict[str, Any] = {"dtype": layer.dtype, "device": table.device}
        query = torch.ones(len(table), shape.heads, shape.head_size, **like)
        key = torch.ones(len(table), shape.key_heads, shape.head_size, **like)
        out = torch.empty_like(query)

        def forward(metadata: Mapping[str, Any], first: int) -> Callable[[], None]:
            turn = itertools.cycle([*layers.items()][first:] + [*layers.items()][:first])

            def call() -> None:
                name, layer = next(turn)
                layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata[name], out)

            return call

        ours = forward(dict.fromkeys(layers, self.metadata(plan, length)), 0)
        stock = forward(theirs, len(layers) // 2)  # far from what ours has just read
        return attend_costs.Timed(ours, stock, plan.n_reads, plan.n_nodes)

    def warm_up(self, layer: Any) -> None:
        """Calls `attend` on a layer's cache with tokens in one part and in two, which is all that Triton compiles."""
        dtype, device = layer.dtype, layer.kv_cache.device
        query = torch.zeros(1, self.shape.heads, self.shape.head_size, dtype=dtype, device=device)
        for columns in (1, 2):
            plan = self.plan(torch.zeros(1, columns, dtype=torch.int32, device=device), columns)
            metadata = self.metadata(plan, columns * self.shape.block_size)
            layer.impl.attend(layer, query, layer.kv_cache, metadata, torch.empty_like(query))

    def plan(
        self,
        table: Tensor,
        known_shared: int | Sequence[int],
        lengths: Tensor | None = None,
        offsets: Sequence[int] | Tensor | None = None,
    ) -> AttendPlan:
        """Plans a table, as ops.plan_attend does."""
        size = None if lengths is None else self.shape.block_size
        return ops.plan_attend(
            table,
            lengths=lengths,
            block_size=size,
            offsets=offsets,
            backend=self.backend,
            known_shared=known_shared,
        )

    def metadata(self, plan: AttendPlan, length: int | Tensor) -> AttendMetadata:
        """Makes the metadata for the rows of a plan: `length` tokens each, or (R,) int32 on the plan's device."""
        if plan.backend != "triton":
            return AttendMetadata(plan, length, self.layout)
        if not isinstance(length, Tensor):  # a number would be written to the device once per layer
            length = torch.full((1,), length, dtype=torch.int32, device=plan.table.device)
        return AttendMetadata(plan, length, "plain")

    def may_pay(self, n_rows: int, length: int) -> bool:
        """Says whether `attend` could be the faster for so many rows, if they shared all blocks but the last."""
        if self.costs is None:
            return False
        n_reads = n_rows + (length - 1) // self.shape.block_size
        return attend_costs.pays(self.costs, attend_costs.features(n_rows, length, n_reads, n_rows + 1, self.shape))

    def pays(self, plan: AttendPlan, length: int | Tensor, group: int | None = None) -> bool:
        """Says whether `attend` is the faster for all rows of a plan, or for those of a group as if they were alone.

        Args:
            length: tokens of each of these rows: one number, or a vector that the host knows.
            group: a choice by it does not depend on the group's neighbours. The host must know the plan's offsets.
        """
        if self.costs is None:
            return False
        if group is None:
            counts = len(plan.table), plan.n_reads, plan.n_nodes
        elif plan.group_rows is None or plan.group_reads is None or plan.group_nodes is None:
            raise ValueError(f"group={group}: the offsets of the plan are known to its device only")
        else:
            counts = plan.group_rows[group], plan.group_reads[group], plan.group_nodes[group]
        n_rows, n_reads, n_nodes = counts
        mean = float(length.double().mean()) if isinstance(length, Tensor) else length
        return attend_costs.pays(self.costs, attend_costs.features(n_rows, mean, n_reads, n_nodes, self.shape))
