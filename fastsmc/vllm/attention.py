"""Groups' own attention inside vLLM: `attend` where it is worth it, vLLM's kernels for everything else.

    register()         before the model is loaded: vLLM's CPU backend, under its own name, becomes the subclass below
    Attend(layers)     after that: says whether and how `attend` can run on this model
    .metadata(...)     per step: `AttendMetadata` for a group's rows, or None where vLLM's attention is the faster one
    AttendCPUImpl      per layer: runs `attend` if the metadata is ours, vLLM's own forward if not

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
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

from fastsmc import ops
from fastsmc.ops.attend import LANES, LAYOUTS, AttendPlan

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
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.why_not: str | None = None
        layer = layers[0]
        if not isinstance(layer.impl, AttendCPUImpl):
            self.why_not = f"no kernel for {type(layer.impl).__name__}"
            return
        impl, cache = layer.impl, layer.kv_cache
        self._heads, self._key_heads, self._head_size = impl.num_heads, impl.num_kv_heads, impl.head_size
        self._block_size = cache.shape[2]
        for name, other in {
            "a sliding window": any(one.impl.sliding_window != -1 for one in layers),
            "ALiBi": any(one.impl.alibi_slopes is not None for one in layers),
            "a soft cap of logits": any(one.impl.logits_soft_cap for one in layers),
            "attention sinks": any(one.impl.sinks is not None for one in layers),
            "a quantised KV cache": any(one.impl.is_fp8_kv_cache for one in layers),
            f"a head size of {self._head_size}": self._head_size % LANES != 0,
            f"a block size of {self._block_size}": self._block_size % LANES != 0,
            "attention layers that differ": len({(one.isa, one.kv_cache.shape, one.kv_cache.dtype) for one in layers})
            > 1,
        }.items():
            if other:
                self.why_not = f"attend does not know {name}"
                return
        self.layout = find_layout(layer.isa, cache.dtype, self._block_size, self._head_size)
        if self.layout is None:
            self.why_not = f"attend does not know the KV layout of vLLM's {layer.isa!r} kernels"
            return
        key = cost_key(layer.isa, cache.dtype)
        self._costs = json.loads(COSTS.read_text()).get(key)
        if self._costs is None:
            logger.warning("attend is not used: no measured costs of %r; bench/bench_attend.py measures them", key)

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
    """What costs depend on beside the shapes: vLLM's kernels, the dtype, and how our products are computed."""
    return f"{isa} {str(dtype).removeprefix('torch.')} {ops.BF16_MATH}"


def features(
    plan: AttendPlan, length: int, heads: int, key_heads: int, head_size: int, block_size: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the seconds of `attend` and of vLLM's attention are linear in, for one layer.

    attend: 1; multiplications; elements of keys and values that are packed; nodes × key heads.
    stock: 1; multiplications; rows × key heads.
    """
    n_rows = len(plan.order)
    products = 2.0 * n_rows * heads * length * head_size
    packed = 2.0 * plan.n_reads * block_size * key_heads * head_size
    return (1.0, products, packed, float(len(plan.nodes) * key_heads)), (1.0, products, float(n_rows * key_heads))


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
