"""vLLM's FlashAttention and Triton backends with `attend` in Triton for groups; what cpu.py is for the CPU.

Both write the new keys and values apart from `forward` (do_kv_cache_update, left alone here) into one cache of logical
shape (n_blocks, Hk, B, 2 D), keys beside values in each slot, whatever the order in memory. `attend` reads both halves
in place, as strided views.

A float8 cache is uint8 to PyTorch, with one scale per layer for keys and one for values. vLLM then also hands in float8
queries with a scale of their own: they are widened again, and their scale joins that of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend, FlashAttentionImpl
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionImpl

from fastsmc import ops
from fastsmc.ops.attend import FLOAT8
from fastsmc.vllm.attention.backends import AttendImpl
from fastsmc.vllm.attention.metadata import AttendMetadata

#: head sizes that the kernel has been compiled for
HEAD_SIZES = range(16, 257)
#: what vLLM calls a cache of e4m3 with a scale per layer
FLOAT8_NAMES = ("fp8", "fp8_e4m3")


class AttendGPUImpl(AttendImpl):
    backend = "triton"

    def attend(self, layer: Any, query: Tensor, kv_cache: Tensor, metadata: AttendMetadata, out: Tensor) -> None:
        k_scale = v_scale = None
        if self.kv_cache_dtype in FLOAT8_NAMES:
            kv_cache, k_scale, v_scale = kv_cache.view(FLOAT8), layer._k_scale, layer._v_scale
            if query.dtype == FLOAT8:
                query, k_scale = query.to(out.dtype), k_scale * layer._q_scale
        keys, values = kv_cache.split(self.head_size, dim=-1)
        ops.attend(
            query,
            keys,
            values,
            metadata.plan,
            metadata.length,
            scale=self.scale,
            out=out,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    @staticmethod
    def unknown(layers: Sequence[Any]) -> dict[str, bool]:
        impls, impl = [layer.impl for layer in layers], layers[0].impl
        scales = [getattr(layer, name) for layer in layers for name in ("_q_scale", "_k_scale", "_v_scale")]
        return {
            "a sliding window": any(impl.sliding_window != (-1, -1) for impl in impls),
            "chunked attention": any(getattr(impl, "chunk_lookback", -1) > -1 for impl in impls),
            "decode context parallelism": any(impl.dcp_world_size > 1 for impl in impls),
            f"a head size of {impl.head_size}": impl.head_size not in HEAD_SIZES,
            "values of another size than keys": any(layer.head_size_v != layer.head_size for layer in layers),
            f"a KV cache in {impl.kv_cache_dtype!r}": not (
                impl.kv_cache_dtype in FLOAT8_NAMES or layers[0].kv_cache.dtype == layers[0].dtype
            ),
            "scales of the KV cache for each head": any(scale.numel() != 1 for scale in scales),
        }

    @staticmethod
    def find_layout(layer: Any) -> str:
        return "plain"

    @staticmethod
    def cost_key(layer: Any) -> str:
        device = torch.cuda.get_device_name(layer.kv_cache.device) if layer.kv_cache.is_cuda else "interpreter"
        return f"{layer.attn_backend.get_name()} {device} {layer.dtype} {layer.impl.kv_cache_dtype}"


class AttendFlashImpl(AttendGPUImpl, FlashAttentionImpl):
    """Attends by FlashAttention, or by `attend`."""


class AttendFlashBackend(FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendFlashImpl]:
        return AttendFlashImpl


class AttendTritonImpl(AttendGPUImpl, TritonAttentionImpl):
    """Attends by vLLM's kernels in Triton, or by `attend`."""


class AttendTritonBackend(TritonAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[AttendTritonImpl]:
        return AttendTritonImpl
