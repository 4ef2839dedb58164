"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's CPU backend, under its own name, becomes the subclass below
    Attend(layers)     after that: says whether and how `attend` can run on this model
    .measure(...)      at start-up, where fastsmc/vllm/attend_costs.json does not say when it pays on such a machine
    .pays(...)         per step: whether it is faster than vLLM's attention; .metadata(...) then is what the layers get
    AttendCPUImpl      per layer: runs `attend` if the metadata is ours, vLLM's own forward if not

Ordinary requests never see any of it: their metadata is vLLM's, and so is the code that they run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.logger import init_logger
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from fastsmc import ops
from fastsmc.ops.attend import LANES, LAYOUTS, AttendPlan
from fastsmc.vllm import attend_costs, compat

logger = init_logger(__name__)


@dataclass(frozen=True)
class AttendMetadata:
    """Attention metadata of a group's rows, one query each, all of one length; the same for every layer."""

    plan: AttendPlan
    length: int
    layout: str


class AttendCPUImpl(CPUAttentionBackendImpl):
    """vLLM's CPU attention, and `attend` for rows that come with `AttendMetadata`."""

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        if not isinstance(attn_metadata, AttendMetadata):
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        keys, values = split_cache(kv_cache)
        n_rows = len(attn_metadata.plan.order)
        ops.attend(
            query[:n_rows],
            keys,
            values,
            attn_metadata.plan,
            attn_metadata.length,
            scale=self.scale,
            layout=attn_metadata.layout,
            out=output[:n_rows],
        )
        return output


class AttendCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendCPUImpl]:
        return AttendCPUImpl


def register() -> None:
    """Puts the subclass in the place of vLLM's CPU backend, for models loaded in this process from now on."""
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.{AttendCPUBackend.__name__}")
    _cached_get_attn_backend.cache_clear()  # an engine that started earlier in this process


class Attend:
    """Whether `attend` can run on a model, and when it pays.

    Args:
        layers: vLLM's attention layers, after the KV cache is there.

    Attributes:
        why_not: None, or why groups use vLLM's own attention here.
        shape: of the layers.
        layout: of their KV cache.
        costs: by which `pays` decides: those committed, None if there are none and `measure` has not found any.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.why_not: str | None = None
        layer = layers[0]
        if not isinstance(layer.impl, AttendCPUImpl):
            self.why_not = f"no kernel for {type(layer.impl).__name__}"
            return
        impl, cache = layer.impl, layer.kv_cache
        self.shape = attend_costs.Shape(impl.num_heads, impl.num_kv_heads, impl.head_size, cache.shape[2])
        for name, other in {
            "a sliding window": any(one.impl.sliding_window != -1 for one in layers),
            "ALiBi": any(one.impl.alibi_slopes is not None for one in layers),
            "a soft cap of logits": any(one.impl.logits_soft_cap for one in layers),
            "attention sinks": any(one.impl.sinks is not None for one in layers),
            "a quantised KV cache": any(one.impl.is_fp8_kv_cache for one in layers),
            f"a head size of {self.shape.head_size}": self.shape.head_size % LANES != 0,
            f"a block size of {self.shape.block_size}": self.shape.block_size % LANES != 0,
            "attention layers that differ": len({(one.isa, one.kv_cache.shape, one.kv_cache.dtype) for one in layers})
            > 1,
        }.items():
            if other:
                self.why_not = f"attend does not know {name}"
                return
        self.layout = find_layout(layer.isa, cache.dtype, self.shape.block_size, self.shape.head_size)
        if self.layout is None:
            self.why_not = f"attend does not know the KV layout of vLLM's {layer.isa!r} kernels"
            return
        self._key = attend_costs.cost_key(layer.isa, cache.dtype)
        self.costs = attend_costs.committed(self._key)

    def measure(
        self,
        layers: Mapping[str, Any],
        stock_metadata: Callable[[Tensor, int], Mapping[str, Any]],
        max_rows: int,
        max_length: int,
    ) -> None:
        """Sets costs that are not committed: from the user's cache, or by timing the forward of the layers.

        Only reads their KV caches, in which no request has written yet: one after the other, as a step does, so that
        one layer's keys and values have left the processor's cache when its turn comes again.

        Args:
            layers: by name, all of one shape.
            stock_metadata: (block table, length) → vLLM's metadata by layer.
            max_rows, max_length: what a group can have in this engine.
        """
        cache, shape = next(iter(layers.values())).kv_cache, self.shape
        device = cache.device
        cases = attend_costs.candidates(max_rows, max_length, len(cache), shape.block_size)

        def prepare(table: Tensor, length: int) -> attend_costs.Timed:
            table = table.to(device)
            plan, theirs = ops.plan_attend(table), stock_metadata(table, length)
            query = torch.ones(len(table), shape.heads, shape.head_size, dtype=cache.dtype, device=device)
            key = torch.ones(len(table), shape.key_heads, shape.head_size, dtype=cache.dtype, device=device)
            out = torch.empty_like(query)

            def forward(metadata: Mapping[str, Any], first: int) -> Callable[[], None]:
                turn = itertools.cycle([*layers.items()][first:] + [*layers.items()][:first])

                def call() -> None:
                    name, layer = next(turn)
                    layer.impl.forward(layer, query, key, key, layer.kv_cache, metadata[name], out)

                return call

            ours = forward(dict.fromkeys(layers, self.metadata(plan, length)), 0)
            stock = forward(theirs, len(layers) // 2)  # far from what ours has just read
            return attend_costs.Timed(ours, stock, *self._counts(plan))

        def measure() -> attend_costs.Costs | None:
            start = time.perf_counter()
            synchronize = torch.cuda.synchronize if device.type == "cuda" else None
            costs = attend_costs.measure(cases, prepare, shape, synchronize)
            spent = time.perf_counter() - start
            logger.info("attend: costs of %s measured in %.1f s: %s", self._key, spent, costs)
            return costs

        threads = torch.get_num_threads() if device.type == "cpu" else 0
        key = {
            "device": attend_costs.device_name(device), "threads": threads, "kernels": self._key, **shape._asdict(),
            "cases": f"{len(cases)} to {cases[-1]}", "vllm": compat.vllm_version(), "recipe": attend_costs.RECIPE,
        }  # fmt: skip
        self.costs = attend_costs.kept(", ".join(f"{name} {value}" for name, value in key.items()), measure)
        if self.costs is None:
            logger.warning("attend is not used: this engine has too few KV blocks to measure what it costs")

    def metadata(self, plan: AttendPlan, length: int) -> AttendMetadata:
        return AttendMetadata(plan, length, self.layout)

    def pays(self, plan: AttendPlan, length: int) -> bool:
        """Whether `attend` is the faster for rows of `length` tokens with this plan."""
        if self.costs is None:
            return False
        units = attend_costs.features(len(plan.order), length, *self._counts(plan), self.shape)
        return attend_costs.pays(self.costs, units)

    def _counts(self, plan: AttendPlan) -> tuple[int, int]:
        """Block reads and nodes, as far as the host knows them."""
        return plan.n_reads, len(plan.nodes)


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (n_blocks, Hk, B, D) of vLLM's CPU cache (n_blocks, Hk, B, 2 D): keys of a block, then values."""
    n_blocks, n_key_heads, block_size, width = kv_cache.shape
    return kv_cache.view(n_blocks, n_key_heads, 2 * block_size, width // 2).chunk(2, dim=2)


def find_layout(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str | None:
    """Layout of what vLLM's cache writer for `isa` writes, found by letting it write; None: one that `attend` lacks."""
    cache = torch.zeros(1, 1, block_size, 2 * head_size, dtype=dtype)
    keys, values = split_cache(cache)
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(block_size, 1, head_size, generator=generator).to(dtype) for _ in range(2))
    _custom_ops.cpu_attn_reshape_and_cache(key, value, keys, values, torch.arange(block_size), isa)
    for layout in LAYOUTS:
        written = [t.reshape(-1) for t in (keys, values)]
        if all(
            torch.equal(got, want) for got, want in zip(written, lay_out(key[:, 0], value[:, 0], layout), strict=True)
        ):
            return layout
    return None


def lay_out(key: Tensor, value: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """Keys and values (B, D) of one block as they lie in memory, flat."""
    tokens, dims = key.shape
    if layout == "tiled":
        key = key.view(tokens // LANES, LANES, dims // 2, 2).transpose(1, 2)
        value = value.view(tokens // 2, 2, dims // LANES, LANES).permute(2, 0, 3, 1)
    elif layout == "vector":
        key = key.t()
    return key.reshape(-1), value.reshape(-1)
