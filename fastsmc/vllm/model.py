"""vLLM's model, KV cache and attention backend as the particle runner drives them.

`Model` builds the attention metadata of the rows that it is given itself, as vLLM's speculative proposers do, and goes
through neither the model runner's input batch nor its sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from fastsmc import ops
from fastsmc.vllm import capacity, compat, graphs, warm_up
from fastsmc.vllm.adapters import Adapters
from fastsmc.vllm.attention import Attend, MixedMetadata, rows_read_whole
from fastsmc.vllm.batch_bits import differing_sizes
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.interventions import Interventions
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.passes import Batch, Ride
from fastsmc.vllm.riding import Riding

logger = get_logger(__name__)


class Model:
    """Makes vLLM's model, KV cache and attention backend one call: tokens of some rows in, hidden states out."""

    def __init__(self, model_runner: Any) -> None:
        compat.check_runner(model_runner)
        self._config = model_runner.vllm_config
        self._runner, self._model = model_runner, model_runner.model
        self._adapters = None if self._config.lora_config is None else Adapters(model_runner)
        self.attention = [group for part in model_runner.attn_groups for group in part]
        self.layers = [name for group in self.attention for name in group.layer_names]
        spec = model_runner.kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.block_size = spec.block_size
        self.max_tokens = self._config.scheduler_config.max_num_batched_tokens
        self.max_rows = self._config.scheduler_config.max_num_seqs
        self.max_logits_rows = max(1, capacity.SCORE_ELEMENTS // self._config.model_config.get_vocab_size())
        context = self._config.compilation_config.static_forward_context
        unique = {context[name].kv_cache.data_ptr(): context[name].kv_cache for name in self.layers}
        self.caches, slot_dim = in_memory_order(
            list(unique.values()), model_runner.kv_cache_config.num_blocks, self.block_size
        )
        self.device = self.caches[0].device
        # row r begins at token r, for as many rows as there can be and one that stands twice: a copy to the device at
        # each step would wait for it
        starts = torch.arange(self._config.scheduler_config.max_num_seqs + 2, dtype=torch.int32)
        self._starts = starts, starts.to(self.device)
        # the layers that may use `attend`; it knows no window, and says so where all of them have one
        self.attending = [name for name in self.layers if not compat.has_window(context[name])] or self.layers
        self.attend = Attend(
            [context[name] for name in self.attending],
            bool(self._config.compilation_config.pass_config.fuse_attn_quant),
        )
        # where a slot lies in a block is the kernels' affair, known of GPU backends; else blocks are copied whole
        self.slot_dim = slot_dim if self.attend.why_not is None and self.attend.backend == "triton" else None
        if self.attend.why_not is not None:
            logger.info("groups use vLLM's attention, which reads a shared block once per row: %s", self.attend.why_not)
        elif self.attend.costs is None:
            self._measure_attend({name: context[name] for name in self.attending})
        self.interventions = Interventions(self._model, self.device)
        EngineOptions.of(self._config.additional_config).load_interventions(self.interventions.put)
        self.riding = Riding(model_runner, self.layers, self.device, self.interventions)
        if self.riding.why_not is None:
            logger.info("rows of groups ride in ordinary steps that only decode")
        else:
            logger.info("groups take turns with ordinary steps: %s", self.riding.why_not)
        if EngineOptions.of(self._config.additional_config).shared_forward == "auto":
            self._compare_batches()
        why_not = graphs.why_not(model_runner)
        self._graphs = None if why_not is not None else self._make_graphs()
        if self.device.type == "cuda":
            uses = "vLLM's CUDA graphs" if why_not is None else f"no CUDA graphs: {why_not}"
            logger.info("forward passes of groups use %s", uses)
            self._warm_up(context[self.attending[0]])

    def _compare_batches(self) -> None:
        """Says in the log if a population hangs on more than its seed."""
        where, config = "on GPUs", self._config.model_config
        if self.device.type == "cpu":
            sizes = differing_sizes(
                self._model, lambda hidden: self.logits(hidden, slice(None)), config.get_hidden_size(), config.dtype
            )
            if not sizes:
                return
            where = f"on this CPU, say {', '.join(map(str, sizes))} instead of 2"
        if get_tp_group().rank_in_group == 0:
            logger.info(
                "groups share forward passes, and a row's bits hang on how many rows there are (%s): a population is "
                'the same for the same seed and companions; shared_forward="never" makes it depend on the seed alone',
                where,
            )

    def _make_graphs(self) -> graphs.DecodeGraphs:
        return graphs.DecodeGraphs(self._runner, self.layers, self._build, self._metadata, self._starts)

    @torch.inference_mode()
    def _warm_up(self, layer: Any) -> None:
        """Compiles what the first steps of groups would compile; every rank does, as logits are gathered."""
        config = self._config.model_config
        hidden = torch.zeros(2, config.get_hidden_size(), dtype=config.dtype, device=self.device)
        logits, places = self.logits(hidden, slice(None)), self.interventions.places
        warm_up.call_ops(logits)
        if places.why_not is None:
            warm_up.call_intervened(logits, hidden, places.sizes.inner if places.products else None)
        if self.attend.why_not is None and self.attend.costs is not None:
            self.attend.warm_up(layer)

    @torch.inference_mode()
    def _measure_attend(self, layers: dict[str, Any]) -> None:
        """Measures costs of `attend` that nobody has committed; of several ranks the first does, for all of them."""

        def stock_metadata(table: Tensor, length: int) -> dict[str, Any]:
            slots = table[:, -1].long() * self.block_size + (length - 1) % self.block_size
            lengths = torch.full((len(table),), length, dtype=torch.int32, device=table.device)
            return self._stock_metadata(table, lengths, length, slots)

        ranks, config = get_tp_group(), self._config
        if ranks.rank_in_group == 0:
            max_rows, max_length = config.scheduler_config.max_num_seqs, config.model_config.max_model_len
            self.attend.measure(layers, stock_metadata, max_rows, max_length)
        self.attend.costs = ranks.broadcast_object(self.attend.costs, src=0)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (R, V) logits and (R, H) last hidden states of rows with one query each."""
        hidden = self.hidden(batch)
        return self.logits(hidden, slice(None)), hidden

    def hidden(self, batch: Batch) -> Tensor:
        """Returns (Q, H) last hidden states of the queries of a batch."""
        if self._adapters is not None:
            self._adapters.set_batch(batch)
        if self._graphs is not None and (hidden := self._graphs.hidden(batch)) is not None:
            return hidden
        with (
            self.interventions.under(batch.variants, batch.sites),
            set_forward_context(
                self._metadata(batch),
                self._config,
                num_tokens=len(batch.tokens),
                slot_mapping=dict.fromkeys(self.layers, batch.slots),
            ),
        ):
            return self._model(
                input_ids=batch.tokens.to(torch.int32),
                positions=batch.positions,
                intermediate_tensors=None,
                inputs_embeds=None,
            )

    def ride(self, batch: Batch, timed: bool) -> Ride:
        """Prepares all that can fail of rows which `riding` takes along."""
        return Ride(batch, self._metadata(batch), timed)

    def _metadata(self, batch: Batch) -> dict[str, Any]:
        """Makes the attention metadata by layer: in parts, where some rows share reads and others do not."""
        shares = batch.plan is not None or bool(batch.shared)
        metadata = {}
        if not shares or len(self.attending) < len(self.layers):
            metadata = self._stock_metadata(batch.table, batch.lengths, batch.max_length, batch.slots, batch.queries)
        if shares:
            metadata |= self._attend_metadata(batch)
        return metadata

    def _attend_metadata(self, batch: Batch) -> dict[str, Any]:
        """Makes the metadata of the layers that use `attend` for some rows of a batch."""
        n_rows = len(batch.lengths)
        if batch.plan is not None:
            return dict.fromkeys(self.attending, self.attend.metadata(batch.plan, batch.lengths))
        parts: list[tuple[int, int, dict[str, Any]]] = []
        at = 0
        for stretch in _adjoining(batch.shared):
            begin, end = stretch[0][0], stretch[-1][1]
            if at < begin:
                parts.append((at, begin, self._stock_part(batch, at, begin)))
            offsets = [low - begin for low, _, _ in stretch] + [end - begin]
            plan = self.attend.plan(
                batch.table[begin:end], [known for _, _, known in stretch], batch.lengths[begin:end], offsets
            )
            ours = self.attend.metadata(plan, batch.lengths[begin:end])
            parts.append((begin, end, dict.fromkeys(self.attending, ours)))
            at = end
        if at < n_rows:
            parts.append((at, n_rows, self._stock_part(batch, at, n_rows)))
        if len(parts) == 1:
            return parts[0][2]
        return {
            name: MixedMetadata(tuple((begin, end, by_layer[name]) for begin, end, by_layer in parts))
            for name in self.attending
        }

    def _stock_part(self, batch: Batch, begin: int, end: int) -> dict[str, Any]:
        rows = slice(begin, end)
        return self._stock_metadata(batch.table[rows], batch.lengths[rows], batch.max_length, batch.slots[rows])

    def _stock_metadata(
        self, table: Tensor, lengths: Tensor, max_length: int, slots: Tensor, queries: Sequence[int] | None = None
    ) -> dict[str, Any]:
        n_rows, n_tokens = len(lengths), len(slots)
        starts = [s[: n_rows + 1] for s in self._starts]
        if queries is not None:
            starts[0] = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
            starts[1] = starts[0].to(self.device)
        common = CommonAttentionMetadata(
            query_start_loc=starts[1],
            query_start_loc_cpu=starts[0],
            seq_lens=lengths,
            num_reqs=n_rows,
            num_actual_tokens=n_tokens,
            max_query_len=max(queries or (1,)),
            max_seq_len=max_length,
            seq_lens_cpu_upper_bound=torch.full((n_rows,), max_length, dtype=torch.int32),
            block_table_tensor=table.contiguous(),
            slot_mapping=slots,
            causal=True,
        )
        return self._build(common)

    def _build(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Has vLLM's backends build their metadata, by layer."""
        metadata = {}
        for group in self.attention:
            with rows_read_whole():
                built = group.get_metadata_builder().build(common_prefix_len=0, common_attn_metadata=common)
            if self.device.type == "cuda":
                take_plan(built)
            metadata.update(dict.fromkeys(group.layer_names, built))
        return metadata

    def logits(self, hidden: Tensor, rows: slice) -> Tensor:
        """Returns (R, V) logits of R rows of what `hidden` gave last; every tensor-parallel rank takes part."""
        if self._adapters is not None:
            self._adapters.set_logits(len(hidden), rows)
        return self._model.compute_logits(hidden[rows])

    def plain_logits(self, hidden: Tensor) -> Tensor:
        """Returns (R, V) logits of (R, H) hidden states of rows without adapters, whichever call gave them."""
        if self._adapters is not None:
            self._adapters.set_none(len(hidden))
        return self._model.compute_logits(hidden)

    def reindex(self, table: Tensor, ancestors: Tensor, position: Tensor) -> None:
        """Reindexes a table (R, C) int32 whose rows hold `position` (R,) int32 tokens, and the caches of all layers."""
        ops.reindex(
            table, ancestors, position=position, block_size=self.block_size, caches=self.caches, slot_dim=self.slot_dim
        )

    def n_blocks(self, tokens: Sequence[int]) -> int:
        """Counts the blocks of a row of these tokens."""
        return -(-len(tokens) // self.block_size)

    @property
    def block_bytes(self) -> int:
        """Counts the bytes of a block in the caches of all layers."""
        return sum(cache[0].nbytes for cache in self.caches)

    def own_cache(self, n_blocks: int) -> AbstractContextManager[list[Tensor]]:
        """Gives the attention layers a KV cache of zeros of their own within, as `with_cache` does."""
        return self.with_cache(self.new_cache(n_blocks))

    def new_cache(self, n_blocks: int) -> dict[int, Tensor]:
        """Makes a KV cache of zeros, by addresses of the engine's, which layers may share; blocks come first."""
        context = self._config.compilation_config.static_forward_context
        engines = {context[name].kv_cache.data_ptr(): context[name].kv_cache for name in self.layers}
        return {address: _zeros_like(cache, n_blocks) for address, cache in engines.items()}

    @contextmanager
    def with_cache(self, own: Mapping[int, Tensor]) -> Iterator[list[Tensor]]:
        """Gives the attention layers a KV cache of `new_cache` within; afterwards the engine's is theirs again.

        Yields:
            the caches, blocks first.
        """
        context = self._config.compilation_config.static_forward_context
        engines = {name: context[name].kv_cache for name in self.layers}
        try:
            for name, cache in engines.items():
                context[name].kv_cache = own[cache.data_ptr()]
            yield list(own.values())
        finally:
            for name, cache in engines.items():
                context[name].kv_cache = cache

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        """Makes blocks zero. Attention also reads what lies beyond a row's end, with weight 0, and 0 · NaN is NaN."""
        for cache in self.caches:
            for block in blocks:
                cache[block].zero_()


def _zeros_like(cache: Tensor, n_blocks: int) -> Tensor:
    """Makes a KV cache of so many blocks (the first dimension) that lies in memory as `cache` does."""
    order = sorted(range(cache.dim()), key=cache.stride, reverse=True)
    sizes = [n_blocks, *cache.shape[1:]]
    zeros = torch.zeros([sizes[d] for d in order], dtype=cache.dtype, device=cache.device)
    return zeros.permute([order.index(d) for d in range(cache.dim())])


def _adjoining(shared: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Puts stretches of rows together that adjoin."""
    out: list[list[tuple[int, int, int]]] = []
    for stretch in shared:
        if out and out[-1][-1][1] == stretch[0]:
            out[-1].append(stretch)
        else:
            out.append([stretch])
    return out


def take_plan(metadata: Any) -> None:
    """Takes FlashAttention 3's plan of a batch out of the buffer into which the next one comes.

    With CUDA graphs of the whole model its metadata builder keeps one buffer; other metadata has no such plan. Two
    batches in one forward pass (an ordinary step's and riders, or parts of ours) would both have the last one's.
    """
    if getattr(metadata, "scheduler_metadata", None) is not None:
        metadata.scheduler_metadata = metadata.scheduler_metadata.clone()


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
