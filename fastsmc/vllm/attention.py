"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's backends, under their own names, become the subclasses of
                       `BACKENDS`: its CPU backend, on a CUDA device FlashAttention and Triton (attention_gpu.py)
    Attend(layers)     after that: says whether and how `attend` can run on this model
    .measure(...)      at start-up, where fastsmc/vllm/attend_costs.json does not say when it pays on such a machine
    .plan(...)         once for a table: who reads what together
    .pays(...)         per step: whether it is faster than vLLM's attention; .metadata(...) then is what the layers get
    AttendImpl         per layer: runs `attend` if the metadata is ours, vLLM's own forward if not

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
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from fastsmc import ops
from fastsmc.ops.attend import LANES, LAYOUTS, AttendPlan
from fastsmc.vllm import attend_costs, compat

logger = init_logger(__name__)

#: device type → vLLM's name of a backend → ours. Strings: what a backend imports need not be there on another device
BACKENDS = {
    "cpu": {"CPU_ATTN": f"{__name__}.AttendCPUBackend"},
    "cuda": {
        "FLASH_ATTN": f"{__name__}_gpu.AttendFlashBackend",
        "TRITON_ATTN": f"{__name__}_gpu.AttendTritonBackend",
    },
}


@dataclass(frozen=True)
class AttendMetadata:
    """Attention metadata of a group's rows, one query each, all of one length; the same for every layer.

    Attributes:
        length: tokens of each row; for a plan of 'triton' (1,) int32 on the device.
    """

    plan: AttendPlan
    length: int | Tensor
    layout: str


class AttendImpl:
    """What comes before one of vLLM's implementations among the bases of ours: `attend` for rows that come with
    `AttendMetadata`, vLLM's own forward for all others.

    Attributes:
        backend: of ops.plan_attend.
    """

    backend: str

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
        if any(scale is not None for scale in (*args, *kwargs.values())):  # `Attend` has refused the model
            raise NotImplementedError("attend does not quantise its output")
        n_rows = len(attn_metadata.plan.table)  # the batch may be padded
        self.attend(layer, query[:n_rows], kv_cache, attn_metadata, output[:n_rows].view(n_rows, *query.shape[1:]))
        return output

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: AttendMetadata, out: Tensor) -> None:
        """ops.attend of queries (R, Hq, D) over a layer's cache, to `out` of their shape."""
        raise NotImplementedError

    @staticmethod
    def unknown(layers: Sequence[Any]) -> dict[str, bool]:
        """Names of what `attend` would do wrong → whether these layers have it."""
        raise NotImplementedError

    @staticmethod
    def find_layout(layer: Any) -> str | None:
        """How vLLM lays the cache out, one of ops.attend's layouts; None: as none of them."""
        raise NotImplementedError

    @staticmethod
    def cost_key(layer: Any) -> str:
        """What costs depend on beside the shapes: the kernels, vLLM's and ours, and the dtypes."""
        raise NotImplementedError


class AttendCPUImpl(AttendImpl, CPUAttentionBackendImpl):
    """vLLM's CPU attention, and `attend` in C++."""

    backend = "cpu"

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: AttendMetadata, out: Tensor) -> None:
        ops.attend(
            query,
            *split_cache(kv_cache),
            metadata.plan,
            metadata.length,
            scale=self.scale,
            layout=metadata.layout,
            out=out,
        )

    @staticmethod
    def unknown(layers: Sequence[Any]) -> dict[str, bool]:
        impl, block_size = layers[0].impl, layers[0].kv_cache.shape[2]
        return {
            "a sliding window": any(one.impl.sliding_window != -1 for one in layers),
            "a quantised KV cache": any(one.impl.is_fp8_kv_cache for one in layers),
            f"a head size of {impl.head_size}": impl.head_size % LANES != 0,
            f"a block size of {block_size}": block_size % LANES != 0,
            "attention layers that differ": len({one.isa for one in layers}) > 1,
        }

    @staticmethod
    def find_layout(layer: Any) -> str | None:
        return find_layout(layer.isa, layer.kv_cache.dtype, layer.kv_cache.shape[2], layer.impl.head_size)

    @staticmethod
    def cost_key(layer: Any) -> str:
        return attend_costs.cost_key(layer.isa, layer.kv_cache.dtype)


class AttendCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendCPUImpl]:
        return AttendCPUImpl


def register() -> None:
    """Puts our subclasses in the place of vLLM's backends, for models loaded in this process from now on."""
    for name, path in BACKENDS.get(current_platform.device_type, {}).items():
        register_backend(AttentionBackendEnum[name], path)
    _cached_get_attn_backend.cache_clear()  # an engine that started earlier in this process


class Attend:
    """Whether `attend` can run on a model, and when it pays.

    Args:
        layers: vLLM's attention layers, after the KV cache is there.
        fused_output: whether vLLM may ask attention for an output that is quantised already.

    Attributes:
        why_not: None, or why groups use vLLM's own attention here.
        backend: of ops.plan_attend.
        shape: of the layers.
        layout: of their KV cache, one of ops.attend's.
        costs: by which `pays` decides: those committed, None if there are none and `measure` has not found any.
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
        kinds = {(type(one.impl), one.kv_cache.shape, one.kv_cache.dtype, one.impl.kv_cache_dtype) for one in layers}
        for name, other in {
            "attention that is not a decoder's": any(one.impl.attn_type != AttentionType.DECODER for one in layers),
            "ALiBi": any(one.impl.alibi_slopes is not None for one in layers),
            "a soft cap of logits": any(one.impl.logits_soft_cap for one in layers),
            "attention sinks": any(one.impl.sinks is not None for one in layers),
            "attention layers that differ": len(kinds) > 1,
            "a quantised output (fuse_attn_quant)": fused_output,
            **impl.unknown(layers),
        }.items():
            if other:
                self.why_not = f"attend does not know {name}"
                return
        self._key = impl.cost_key(layer)
        self.layout = impl.find_layout(layer)
        if self.layout is None:
            self.why_not = f"attend does not know the KV layout of vLLM's kernels for {self._key!r}"
            return
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
        first, shape = next(iter(layers.values())), self.shape
        cache, dtype, device = first.kv_cache, first.dtype, first.kv_cache.device
        if cache.dtype != dtype:  # its queries come quantised, which only vLLM's layer does
            logger.warning("attend is not used: there are no costs of %s", self._key)
            return
        cases = attend_costs.candidates(max_rows, max_length, len(cache), shape.block_size)

        def prepare(table: Tensor, length: int) -> attend_costs.Timed:
            known_shared = int((table == table[:1]).all(0).long().cumprod(0).sum())
            table = table.to(device)
            plan, theirs = self.plan(table, known_shared), stock_metadata(table, length)
            query = torch.ones(len(table), shape.heads, shape.head_size, dtype=dtype, device=device)
            key = torch.ones(len(table), shape.key_heads, shape.head_size, dtype=dtype, device=device)
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

        def measure() -> attend_costs.Costs | None:
            start = time.perf_counter()
            synchronize = torch.cuda.synchronize if device.type == "cuda" else None
            try:
                costs = attend_costs.measure(cases, prepare, shape, synchronize)
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

    def warm_up(self, layer: Any) -> None:
        """Calls `attend` on a layer's cache with tokens in one part and in two, which is all that Triton compiles."""
        dtype, device = layer.dtype, layer.kv_cache.device
        query = torch.zeros(1, self.shape.heads, self.shape.head_size, dtype=dtype, device=device)
        for columns in (1, 2):
            plan = self.plan(torch.zeros(1, columns, dtype=torch.int32, device=device), columns)
            metadata = self.metadata(plan, columns * self.shape.block_size)
            layer.impl.attend(layer, query, layer.kv_cache, metadata, torch.empty_like(query))

    def plan(self, table: Tensor, known_shared: int) -> AttendPlan:
        """As ops.plan_attend."""
        return ops.plan_attend(table, backend=self.backend, known_shared=known_shared)

    def metadata(self, plan: AttendPlan, length: int) -> AttendMetadata:
        """For the rows of a plan, `length` tokens each."""
        if plan.backend == "triton":  # a number would be written to the device once a layer
            return AttendMetadata(plan, torch.full((1,), length, dtype=torch.int32, device=plan.table.device), "plain")
        return AttendMetadata(plan, length, self.layout)

    def pays(self, plan: AttendPlan, length: int) -> bool:
        """Whether `attend` is the faster for rows of `length` tokens with this plan."""
        if self.costs is None:
            return False
        units = attend_costs.features(len(plan.table), length, plan.n_reads, plan.n_nodes, self.shape)
        return attend_costs.pays(self.costs, units)


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
