"""vLLM's CPU worker with groups, in a module of its own.

`vllm.v1.worker.cpu_worker` puts stubs in the place of torch.cuda's streams and events when it is imported, so nothing
that a CUDA machine imports may import this module.
"""

from __future__ import annotations

import socket
from typing import Any

import psutil
import torch
from vllm.config import CacheConfig
from vllm.distributed.parallel_state import get_world_group
from vllm.utils.cpu_resource_utils import get_allowed_cpu_list, get_memory_node_info, get_visible_memory_node
from vllm.v1.worker.cpu_worker import CPUWorker

from fastsmc.vllm import capacity, machine
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.worker import SMCWorkerMixin

logger = get_logger(__name__)


class SMCCPUWorker(SMCWorkerMixin, CPUWorker):
    """Is vLLM's CPU worker with groups, and a KV cache that fits the memory there is unless the user gave its size.

    vLLM takes 0.92 of the worker's memory node and does not start where less is free. Here that default means "what
    fits" (`capacity.kv_cache_bytes`), whoever starts the engine. kv_cache_memory_bytes, VLLM_CPU_KVCACHE_SPACE and any
    other gpu_memory_utilization keep vLLM's meaning and vLLM's checks; num_gpu_blocks_override is checked against the
    memory there is.
    """

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        cache = vllm_config.cache_config
        asked = cache.gpu_memory_utilization
        self._sizes_cache = cache.kv_cache_memory_bytes is None and asked == CacheConfig.gpu_memory_utilization
        if self._sizes_cache:
            cache.gpu_memory_utilization = 1e-9  # nobody asked for 0.92 of the node, so its lack is no error
        try:
            super().__init__(vllm_config, *args, **kwargs)
        finally:
            cache.gpu_memory_utilization = asked
        # vLLM's worker has just bound its memory to this node; threads may be bound to cores of another one later
        self._bound_node = _memory_node()

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Loads the model, with LoRA in one place more than the adapters that vLLM may have in use.

        In vLLM 0.32 operations for CPUs read the last place for a row without an adapter (index -1; vLLM PR 48421). It
        stays empty, since vLLM takes the first that is free, and no more than max_loras at once.
        """
        lora = self.vllm_config.lora_config
        if lora is None:
            return super().load_model(*args, **kwargs)
        assert lora.max_cpu_loras is not None  # vLLM has set it
        lora.max_loras, lora.max_cpu_loras = lora.max_loras + 1, lora.max_cpu_loras + 1
        try:
            return super().load_model(*args, **kwargs)
        finally:
            lora.max_loras, lora.max_cpu_loras = lora.max_loras - 1, lora.max_cpu_loras - 1

    def determine_available_memory(self) -> int:
        if not self._sizes_cache:
            return super().determine_available_memory()
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        world = get_world_group()
        world.barrier()  # all weights are loaded, so that what is free now stays free
        ranks: list[Any] = [None] * world.world_size
        torch.distributed.all_gather_object(ranks, self._measure_rank(), group=world.cpu_group)
        size = capacity.kv_cache_bytes(ranks, self._need())
        logger.info("KV cache: %d MiB, sized by what is free: %s", size >> 20, ranks[world.rank_in_group])
        return size

    def _measure_rank(self) -> capacity.Rank:
        """Measures the memory that is free; of two nodes that it may come from, the poorer one."""
        free = {node: get_memory_node_info(node).available_memory for node in (self._bound_node, _memory_node())}
        node = min(free, key=free.__getitem__)
        return capacity.Rank(
            socket.gethostname(),
            node,
            free[node],
            psutil.virtual_memory().available,
            machine.group_memory_free(),
        )

    def _need(self) -> capacity.Need:
        config, model = self.vllm_config, self.model_config
        specs = list(self.get_kv_cache_spec().values())
        block = sum(spec.page_size_bytes for spec in specs)
        rows = config.scheduler_config.max_num_seqs
        assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved its name
        step = capacity.whole_step_bytes(
            rows,
            config.scheduler_config.max_num_batched_tokens,
            model.get_vocab_size(),
            model.get_hidden_size(),
            getattr(model.hf_text_config, "intermediate_size", None) or 4 * model.get_hidden_size(),
            model.dtype.itemsize,
        ) + self.reward_bytes(weights=False)
        if (blocks := self.cache_config.num_gpu_blocks_override) is not None:
            return capacity.Need(step, blocks * block, blocks * block, f"num_gpu_blocks_override={blocks}")
        sequence = sum(spec.max_memory_usage_bytes(config) for spec in specs)
        # each row may hold one more block while it is reindexed, and vLLM keeps one back; as much again holds prompts
        # that may come a second time
        useful = 2 * rows * (sequence + block) + block
        if model.original_max_model_len == -1:  # vLLM then takes the longest that fits
            return capacity.Need(step, 2 * block, useful, "one block")
        return capacity.Need(step, sequence + block, useful, f"one sequence of max_model_len={model.max_model_len}")


def _memory_node() -> int:
    """Returns the memory node of the first core that this thread may run on, as vLLM's worker finds it."""
    node, visible = get_allowed_cpu_list()[0].numa_node, get_visible_memory_node()
    return node if node in visible else visible[0]
