"""CUDA graphs that vLLM has captured for its own decode steps, replayed for rows of groups.

    FULL       a whole forward pass with vLLM's attention: for rows of one query each
    PIECEWISE  what lies between attention layers: where rows attend by `attend`, have more queries, or are too many

What vLLM's V2 runner does in `execute_model` is done here with our rows: its manager is asked for a graph, the rows are
written to the runner's persistent buffers, whose addresses the graph holds, and padded to the graph's size, attention
metadata is built, which renews what a backend keeps for its graphs, and the graph is replayed. Nobody reads the buffers
between two of vLLM's own steps, and the next of them writes them anew. A graph's output is a buffer too, which the next
replay overwrites, so a copy of it is returned. No graph is captured here: the manager names none that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import BatchDescriptor, set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from fastsmc.vllm.passes import Batch


def why_not(runner: Any) -> str | None:
    """Says why rows of groups cannot use the graphs of a runner of vLLM; None if they can."""
    if not runner.vllm_config.use_v2_model_runner:
        return "they are known of vLLM's V2 model runner only"
    if runner.device.type != "cuda":
        return f"the device is {runner.device.type}"
    if not runner.cudagraph_manager.needs_capture():
        return "the engine captures none (enforce_eager, cudagraph_mode)"
    state = type(runner.model_state).__name__
    if state != "DefaultModelState":
        return f"{state} prepares inputs of its own"
    if runner.use_aux_hidden_state_outputs:
        return "they return hidden states of other layers, too"
    if len(runner.block_tables.input_block_tables) != 1:
        return "the runner has several block tables"
    return None


class DecodeGraphs:
    """Runs batches by the graphs of a V2 runner; `why_not` must have nothing against it.

    Args:
        runner: vLLM's.
        layers: names of its attention layers.
        build: makes attention metadata by layer of vLLM's common metadata.
        metadata: makes them of a batch.
        starts: arange, int32 on the host and on the device, longer than there can be rows.
    """

    def __init__(
        self,
        runner: Any,
        layers: Sequence[str],
        build: Callable[[CommonAttentionMetadata], dict[str, Any]],
        metadata: Callable[[Batch], dict[str, Any]],
        starts: tuple[Tensor, Tensor],
    ) -> None:
        self._runner, self._layers, self._starts = runner, layers, starts
        self._build, self._metadata = build, metadata

    def hidden(self, batch: Batch) -> Tensor | None:
        """Returns (Q, H) last hidden states of a batch's queries; None: there is no graph for it."""
        if batch.variants is not None:  # graphs were captured while nobody intervened, and hold nothing of it
            return None
        graphs, decodes = self._runner.cudagraph_manager, batch.queries is None and not batch.shared
        n_queries = 1 if decodes else None  # of each row, if all have as many
        found = graphs.dispatch(
            num_reqs=len(batch.lengths),
            num_tokens=len(batch.tokens),
            uniform_token_count=n_queries,
            num_active_loras=0,
            max_query_len=n_queries,
        )
        if found.cg_mode == CUDAGraphMode.FULL and decodes:
            self._fill_tokens(batch, found.num_tokens)
            self._build(self._fill_rows(batch, found.num_reqs, found.num_tokens))
            hidden = graphs.run_fullgraph(found)
        elif found.cg_mode == CUDAGraphMode.PIECEWISE:
            self._fill_tokens(batch, found.num_tokens)
            hidden = self._run_pieces(batch, found.num_tokens)
        else:
            return None
        return hidden[: len(batch.tokens)].clone()

    def _fill_tokens(self, batch: Batch, size: int) -> None:
        """Writes the queries of a batch to the runner's buffers, and marks those up to `size` as padding."""
        n, buffers, slots = len(batch.tokens), self._runner.input_buffers, self._runner.block_tables.slot_mappings[0]
        buffers.input_ids[:n] = batch.tokens
        buffers.positions[:n] = batch.positions
        buffers.is_padding[:n] = False
        buffers.is_padding[n:size] = True
        slots[:n] = batch.slots
        slots[n:] = PAD_SLOT_ID

    def _fill_rows(self, batch: Batch, n_rows: int, size: int) -> CommonAttentionMetadata:
        """Writes what attention reads of rows with one query each, and of `n_rows` in all, the rest of which are empty.

        Returns metadata of the buffers' parts.
        """
        n, buffers, tables = len(batch.lengths), self._runner.input_buffers, self._runner.block_tables
        torch.clamp(self._starts[1][: n_rows + 1], max=n, out=buffers.query_start_loc[: n_rows + 1])
        buffers.seq_lens[:n] = batch.lengths
        buffers.seq_lens[n:] = 0
        table = tables.input_block_tables[0]
        table[:n, : batch.table.shape[1]] = batch.table
        table[n:n_rows] = 0
        if hasattr(tables, "_num_dirty_rows"):  # vLLM 0.33 clears so many rows before it writes fewer
            tables._num_dirty_rows = max(tables._num_dirty_rows, n)
        longest = torch.zeros(n_rows, dtype=torch.int32)
        longest[:n] = batch.max_length
        return CommonAttentionMetadata(
            query_start_loc=buffers.query_start_loc[: n_rows + 1],
            query_start_loc_cpu=self._starts[0][: n_rows + 1].clamp(max=n),
            seq_lens=buffers.seq_lens[:n_rows],
            num_reqs=n_rows,
            num_actual_tokens=size,
            max_query_len=1,
            max_seq_len=batch.max_length,
            seq_lens_cpu_upper_bound=longest,
            block_table_tensor=table[:n_rows],
            slot_mapping=tables.slot_mappings[0, :size],
            causal=True,
        )

    def _run_pieces(self, batch: Batch, size: int) -> Tensor:
        """Runs the model with the graphs of its pieces, whose inputs are in the buffers; attention has the batch's."""
        runner, buffers = self._runner, self._runner.input_buffers
        with set_forward_context(
            self._metadata(batch),
            runner.vllm_config,
            num_tokens=size,
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
            batch_descriptor=BatchDescriptor(num_tokens=size, has_lora=False, num_active_loras=0),
            slot_mapping=dict.fromkeys(self._layers, runner.block_tables.slot_mappings[0, :size]),
            is_padding=buffers.is_padding[:size],
        ):
            inputs = {
                "input_ids": buffers.input_ids[:size],
                "positions": buffers.positions[:size],
                "inputs_embeds": None,
                "intermediate_tensors": None,
            }
            hidden: Tensor = runner.cudagraph_manager.run_pw_graph(runner.model, inputs)
            return hidden
