"""vLLM's CPU backend with `attend` in C++ for groups.

Its `forward` writes the new keys and values, then reads them; how they lie in a block is the affair of its kernels, of
which it has several. `find_layout` finds it out by having them write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from fastsmc import ops
from fastsmc.ops.attend import LANES, LAYOUTS
from fastsmc.vllm.attention import costs
from fastsmc.vllm.attention.backends import AttendImpl
from fastsmc.vllm.attention.metadata import AttendMetadata


class AttendCPUImpl(AttendImpl, CPUAttentionBackendImpl):
    """Attends by vLLM's CPU kernels, or by `attend` in C++."""

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
            "a sliding window": any(layer.impl.sliding_window != -1 for layer in layers),
            "a quantised KV cache": any(layer.impl.is_fp8_kv_cache for layer in layers),
            f"a head size of {impl.head_size}": impl.head_size % LANES != 0,
            f"a block size of {block_size}": block_size % LANES != 0,
            "attention layers that differ": len({layer.isa for layer in layers}) > 1,
        }

    @staticmethod
    def find_layout(layer: Any) -> str | None:
        return find_layout(layer.isa, layer.kv_cache.dtype, layer.kv_cache.shape[2], layer.impl.head_size)

    @staticmethod
    def cost_key(layer: Any) -> str:
        return costs.cost_key(layer.isa, layer.kv_cache.dtype)


class AttendCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendCPUImpl]:
        return AttendCPUImpl


def split_cache(kv_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Splits vLLM's CPU cache (n_blocks, Hk, B, 2 D), in which a block's keys come before its values, into keys and
    values (n_blocks, Hk, B, D)."""
    n_blocks, n_key_heads, block_size, width = kv_cache.shape
    keys, values = kv_cache.view(n_blocks, n_key_heads, 2 * block_size, width // 2).chunk(2, dim=2)
    return keys, values


def find_layout(isa: str, dtype: torch.dtype, block_size: int, head_size: int) -> str | None:
    """Finds the layout of what vLLM's cache writer for `isa` writes, by letting it write; None: `attend` lacks it."""
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
    """Lays keys and values (B, D) of one block out as they lie in memory, flat."""
    tokens, dims = key.shape
    if layout == "tiled":
        key = key.view(tokens // LANES, LANES, dims // 2, 2).transpose(1, 2)
        value = value.view(tokens // 2, 2, dims // LANES, LANES).permute(2, 0, 3, 1)
    elif layout == "vector":
        key = key.t()
    return key.reshape(-1), value.reshape(-1)
