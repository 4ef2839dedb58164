"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's backends, under their own names, become the subclasses of
                       `BACKENDS`: its CPU backend, on a CUDA device FlashAttention and Triton (attention_gpu.py)
    Attend(layers)     after that: says whether and how `attend` can run on this model
    .plan(...)         once for a table: who reads what together
    .metadata(...)     per step: `AttendMetadata` for a group's rows, in place of vLLM's
    AttendImpl         per layer: runs `attend` if the metadata is ours, vLLM's own forward if not

Ordinary requests never see any of it: their metadata is vLLM's, and so is the code that they run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
    def kernels(layer: Any) -> str:
        """Name of vLLM's kernels, by which costs are told apart."""
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
    def kernels(layer: Any) -> str:
        return layer.isa


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
        layout: of the KV cache, one of ops.attend's.
    """

    def __init__(self, layers: Sequence[Any], fused_output: bool = False) -> None:
        self.why_not: str | None = None
        layer = layers[0]
        if not isinstance(layer.impl, AttendImpl):
            self.why_not = f"no kernel for {type(layer.impl).__name__}"
            return
        impl, cache = layer.impl, layer.kv_cache
        self._heads, self._key_heads, self._head_size = impl.num_heads, impl.num_kv_heads, impl.head_size
        self._block_size, self.backend = cache.shape[2], impl.backend
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
        self.layout = impl.find_layout(layer)
        if self.layout is None:
            self.why_not = f"attend does not know the KV layout of vLLM's {impl.kernels(layer)!r} kernels"
            return
        key = cost_key(impl.kernels(layer), cache.dtype)
        self._costs = json.loads(COSTS.read_text()).get(key)
        if self._costs is None:
            logger.warning("attend is not used: no measured costs of %r; bench/bench_attend.py measures them", key)

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
        return self._costs is not None and self.ratio(plan, length) > MARGIN

    def ratio(self, plan: AttendPlan, length: int) -> float:
        """How many times as long vLLM's attention takes, by the measured costs."""
        units = features(plan, length, self._heads, self._key_heads, self._head_size, self._block_size)
        attend, stock = (dot(self._costs[who], of) for who, of in zip(("attend", "stock"), units, strict=True))
        return stock / attend


#: `attend` must be faster by this much: about what the costs are wrong by at worst
MARGIN = 1.1
#: what bench/bench_attend.py measured: key → {"attend", "stock"} → seconds a unit of each of `features`
COSTS = Path(__file__).with_name("attend_costs.json")


def cost_key(isa: str, dtype: torch.dtype) -> str:
    """What costs depend on beside the shapes: vLLM's kernels, the dtype, and whether the CPU multiplies bfloat16."""
    return f"{isa} {str(dtype).removeprefix('torch.')}{' pairs' if ops.BF16_PAIRS else ''}"


def features(
    plan: AttendPlan, length: int, heads: int, key_heads: int, head_size: int, block_size: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the seconds of `attend` and of vLLM's attention are linear in, for one layer.

    attend: 1; multiplications; elements of keys and values that are packed; nodes × key heads.
    stock: 1; multiplications; rows × key heads.
    """
    n_rows = len(plan.table)
    products = 2.0 * n_rows * heads * length * head_size
    packed = 2.0 * plan.n_reads * block_size * key_heads * head_size
    return (1.0, products, packed, float(plan.n_nodes * key_heads)), (1.0, products, float(n_rows * key_heads))


def dot(costs: Sequence[float], units: Sequence[float]) -> float:
    return sum(c * u for c, u in zip(costs, units, strict=True))


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
