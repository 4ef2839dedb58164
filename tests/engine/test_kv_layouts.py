"""The KV layouts that vLLM may choose on a GPU, made by vLLM's own code: which of them groups can page, and how."""

import pytest
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from fastsmc import ops
from fastsmc.vllm import compat
from fastsmc.vllm.model import in_memory_order

N_BLOCKS, BLOCK_SIZE, HEADS, HEAD_SIZE, LAYERS = 6, 16, 3, 8, 2


def make_caches(layout, heads=HEADS):
    """(blocks, heads, slots, 2 · head size) of two layers that share one buffer, every element different."""
    spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=heads, head_size=HEAD_SIZE, dtype=torch.float32)
    page, size = spec.page_size_bytes, LAYERS * N_BLOCKS * spec.page_size_bytes
    strides = {  # bytes from layer to layer, and from block to block
        "LB": (N_BLOCKS * page, page),
        "LH": (N_BLOCKS * page, page // heads),
        "BL": (page, LAYERS * page),
        "BH": (page // heads, LAYERS * page),
    }[layout.name[:2]]
    tensor = KVCacheTensor(size, [f"layer{i}" for i in range(LAYERS)], *strides)
    buffer = torch.arange(size // 4, dtype=torch.float32).view(torch.int8)
    return create_kv_cache_views(buffer, spec, N_BLOCKS, layout, tensor)


@pytest.mark.parametrize("heads", [1, HEADS])
@pytest.mark.parametrize("name", ["LBNHC", "LBHNC", "BLNHC", "BLHNC"])
def test_reindex_copies_the_used_slots_whatever_the_order(name, heads):
    caches = make_caches(KVCacheLayout[name], heads)
    before = [cache.clone() for cache in caches]
    views, slot_dim = in_memory_order(caches, N_BLOCKS, BLOCK_SIZE)
    table = torch.tensor([[4, 2], [4, 5]], dtype=torch.int32)
    ops.reindex(
        table, torch.tensor([0, 0]), position=BLOCK_SIZE + 3, block_size=BLOCK_SIZE, caches=views, slot_dim=slot_dim
    )
    for cache, old in zip(caches, before, strict=True):
        old[5, :, :3] = old[2, :, :3]
        assert torch.equal(cache, old)


@pytest.mark.parametrize("name", ["LHBNC", "BHLNC"])
def test_blocks_with_gaps_are_refused(name):
    with pytest.raises(compat.UnsupportedError, match="strides.*without gaps"):
        in_memory_order(make_caches(KVCacheLayout[name]), N_BLOCKS, BLOCK_SIZE)


def test_split_blocks_and_mixed_orders_are_refused():
    caches = make_caches(KVCacheLayout.LBNHC)
    with pytest.raises(compat.UnsupportedError, match=r"\(3 blocks, heads, 32 slots"):
        in_memory_order(caches, N_BLOCKS // 2, 2 * BLOCK_SIZE)
    with pytest.raises(compat.UnsupportedError, match="of one order"):
        in_memory_order([caches[0], make_caches(KVCacheLayout.LBHNC)[1]], N_BLOCKS, BLOCK_SIZE)
