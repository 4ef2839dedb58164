"""vLLM's model, KV cache and attention backend as the particle runner drives them.

`Model` builds the attention metadata of the rows that it is given itself, as vLLM's speculative proposers do, and goes
through neither the model runner's input batch nor its sampler.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from fastsmc import ops
from fastsmc.vllm import capacity, compat, warm_up
from fastsmc.vllm.attention import Attend
from fastsmc.vllm.compat import get_logger

logger = get_logger(__name__)


class PagedCalls(Protocol):
    """Says what a particle runner calls: a `Model`, or what makes a model's calls on all tensor-parallel ranks."""

    device: torch.device
    block_size: int
    attend: Attend
    max_tokens: int
    max_logits_rows: int

    def forward(
        self, tokens: Tensor, position: int, table: Tensor, slots: Tensor, plan: ops.AttendPlan | None = None
    ) -> tuple[Tensor, Tensor]: ...

    def hidden(
        self,
        tokens: Tensor,
        position: int,
        table: Tensor,
        slots: Tensor,
        n_query: int = 1,
        plan: ops.AttendPlan | None = None,
    ) -> Tensor: ...

    def logits(self, hidden: Tensor, rows: slice) -> Tensor: ...

    def reindex(self, table: Tensor, ancestors: Tensor, position: int) -> None: ...


class Model:
    """Makes vLLM's model, KV cache and attention backend one call: tokens of some rows in, hidden states out."""

    def __init__(self, model_runner: Any) -> None:
        compat.check_runner(model_runner)
        self._config = model_runner.vllm_config
        self._model = model_runner.model
        self.attention = [group for part in model_runner.attn_groups for group in part]
        self.layers = [name for group in self.attention for name in group.layer_names]
        spec = model_runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.block_size = spec.block_size
        self.max_tokens = self._config.scheduler_config.max_num_batched_tokens
        self.max_logits_rows = max(1, capacity.SCORE_ELEMENTS // self._config.model_config.get_vocab_size())
        context = self._config.compilation_config.static_forward_context
        unique = {context[name].kv_cache.data_ptr(): context[name].kv_cache for name in self.layers}
        self.caches, slot_dim = in_memory_order(
            list(unique.values()), model_runner.kv_cache_config.num_blocks, self.block_size
        )
        self.device = self.caches[0].device
        # row r begins at token r, for as many rows as there can be: a copy to the device each step would wait for it
        starts = torch.arange(self._config.scheduler_config.max_num_seqs + 1, dtype=torch.int32)
        self._starts = starts, starts.to(self.device)
        self.attend = Attend(
            [context[name] for name in self.layers],
            bool(self._config.compilation_config.pass_config.fuse_attn_quant),
        )
        # where a slot lies in a block is the kernels' affair, known of GPU backends; else blocks are copied whole
        self._slot_dim = slot_dim if self.attend.why_not is None and self.attend.backend == "triton" else None
        if self.attend.why_not is not None:
            logger.info("groups use vLLM's attention, which reads a shared block once per row: %s", self.attend.why_not)
        elif self.attend.costs is None:
            self._measure_attend({name: context[name] for name in self.layers})
        if self.device.type == "cuda":
            self._warm_up(context[self.layers[0]])

    @torch.inference_mode()
    def _warm_up(self, layer: Any) -> None:
        """Compiles what the first steps of groups would compile; every rank does, as logits are gathered."""
        config = self._config.model_config
        hidden = torch.zeros(2, config.get_hidden_size(), dtype=config.dtype, device=self.device)
        warm_up.call_ops(self.logits(hidden, slice(None)))
        if self.attend.why_not is None and self.attend.costs is not None:
            self.attend.warm_up(layer)

    @torch.inference_mode()
    def _measure_attend(self, layers: dict[str, Any]) -> None:
        """Measures costs of `attend` that nobody has committed; of several ranks the first does, for all of them."""

        def stock_metadata(table: Tensor, length: int) -> dict[str, Any]:
            slots = table[:, -1].long() * self.block_size + (length - 1) % self.block_size
            return self._stock_metadata(table, length, slots, 1)

        ranks, config = get_tp_group(), self._config
        if ranks.rank_in_group == 0:
            max_rows, max_length = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
            self.attend.measure(layers, stock_metadata, max_rows, max_length)
        self.attend.costs = ranks.broadcast_object(self.attend.costs, src=0)

    def forward(
        self, tokens: Tensor, position: int, table: Tensor, slots: Tensor, plan: ops.AttendPlan | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns (R, V) logits and (R, H) last hidden states of R rows, one token each; arguments as of `hidden`."""
        hidden = self.hidden(tokens, position, table, slots, plan=plan)
        return self.logits(hidden, slice(None)), hidden

    def hidden(
        self,
        tokens: Tensor,
        position: int,
        table: Tensor,
        slots: Tensor,
        n_query: int = 1,
        plan: ops.AttendPlan | None = None,
    ) -> Tensor:
        """Returns (R * n_query, H) last hidden states of R rows.

        Args:
            tokens: (R * n_query,) integers, row by row.
            position: of each row's first token.
            table: (R, C) int32 block table, covering position + n_query tokens.
            slots: (R * n_query,) int64 where the keys and values go.
            plan: of the table, for n_query = 1: the rows read the blocks that they share together (`attend`). None:
                vLLM's attention.
        """
        n_rows, length = table.shape[0], position + n_query
        if plan is not None:
            metadata = dict.fromkeys(self.layers, self.attend.metadata(plan, length))
        else:
            metadata = self._stock_metadata(table, length, slots, n_query)
        positions = torch.arange(position, length, device=self.device).repeat(n_rows)
        with set_forward_context(
            metadata, self._config, num_tokens=n_rows * n_query, slot_mapping=dict.fromkeys(self.layers, slots)
        ):
            return self._model(
                input_ids=tokens.to(torch.int32), positions=positions, intermediate_tensors=None, inputs_embeds=None
            )

    def _stock_metadata(self, table: Tensor, length: int, slots: Tensor, n_query: int) -> dict[str, Any]:
        n_rows = table.shape[0]
        starts = [s[: n_rows + 1] if n_query == 1 else s[: n_rows + 1] * n_query for s in self._starts]
        common = CommonAttentionMetadata(
            query_start_loc=starts[1],
            query_start_loc_cpu=starts[0],
            seq_lens=torch.full((n_rows,), length, dtype=torch.int32, device=self.device),
            num_reqs=n_rows,
            num_actual_tokens=n_rows * n_query,
            max_query_len=n_query,
            max_seq_len=length,
            seq_lens_cpu_upper_bound=torch.full((n_rows,), length, dtype=torch.int32),
            block_table_tensor=table.contiguous(),
            slot_mapping=slots,
            causal=True,
        )
        metadata = {}
        for group in self.attention:
            built = group.get_metadata_builder().build(common_prefix_len=0, common_attn_metadata=common)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """Returns (R, V) logits of R rows of what `hidden` gave last; every tensor-parallel rank takes part."""
        return self._model.compute_logits(hidden[rows])

    def reindex(self, table: Tensor, ancestors: Tensor, position: int) -> None:
        """Reindexes a table (N, C) int32 whose rows hold `position` tokens, and the caches of all layers."""
        ops.reindex(
            table, ancestors, position=position, block_size=self.block_size, caches=self.caches, slot_dim=self._slot_dim
        )


def in_memory_order(caches: list[Tensor], n_blocks: int, block_size: int) -> tuple[list[Tensor], int]:
    """Views vLLM's KV caches (blocks, heads, slots, channels) as `ops.reindex` takes them.

    vLLM lays the slots of a block out before or behind its heads, and shows the same four dimensions either way. Here
    they come in the order in which they lie in memory, so that a block is contiguous.

    Returns:
        the caches, as views; which dimension of them is the slot.

    Raises:
        UnsupportedError: another shape, or blocks with gaps.
    """
    order = sorted((1, 2, 3), key=caches[0].stride, reverse=True) if caches[0].dim() == 4 else []
    for cache in caches:
        known = cache.dim() == 4 and cache.shape[0] == n_blocks and cache.shape[2] == block_size
        if not known or not cache.permute(0, *order)[0].is_contiguous():
            raise compat.UnsupportedError(
                f"a KV cache of shape {tuple(cache.shape)} and strides {cache.stride()}: groups need ({n_blocks} blocks"
                f", heads, {block_size} slots, channels), of one order and without gaps within a block, as with "
                "VLLM_KV_CACHE_LAYOUT=LBNHC"
            )
    return [cache.permute(0, *order) for cache in caches], 1 + order.index(2)
