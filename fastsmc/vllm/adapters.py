"""LoRA adapters of groups: which of them the rows of a pass go through, told to vLLM's LoRA layers.

vLLM's layers hold a mapping, set before each forward pass: the adapter of each token, and of each row of logits. Its
runner sets it for ordinary steps, here it is set for passes of groups, and for both where rows ride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastsmc.vllm.passes import Batch


class Adapters:
    """Sets the adapters of groups' passes in the runner's LoRA layers.

    Args:
        runner: vLLM's, with enable_lora.
    """

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._queries: Sequence[Any] | None = None  # LoRARequest or None of each query of the last batch

    def set_batch(self, batch: Batch) -> None:
        """Sets the adapters of a batch that goes through the model next."""
        n_rows = len(batch.lengths)
        rows = batch.adapters or (None,) * n_rows
        queries = batch.queries or (1,) * n_rows
        self._queries = [adapter for adapter, n in zip(rows, queries, strict=True) for _ in range(n)]
        self._set(self._queries, self._queries)

    def set_logits(self, n_queries: int, rows: slice) -> None:
        """Sets those of the rows of the last batch, of `n_queries`, whose logits are computed next."""
        queries = [None] * n_queries if self._queries is None else self._queries  # at start-up there was no batch
        assert len(queries) == n_queries
        self._set(queries, queries[rows])

    def set_none(self, n: int) -> None:
        """Sets none for n rows, whose logits are computed next."""
        self._queries = [None] * n
        self._set(self._queries, self._queries)

    def _set(self, tokens: Sequence[Any], logits: Sequence[Any]) -> None:
        self._runner._set_active_loras(ids(logits), ids(tokens), {adapter for adapter in tokens if adapter is not None})


def ids(adapters: Sequence[Any]) -> tuple[int, ...]:
    """Lists what vLLM's mappings hold of adapters (LoRARequest): their numbers, 0 for none."""
    return tuple(0 if adapter is None else adapter.lora_int_id for adapter in adapters)


def count(adapters: Sequence[Any]) -> int:
    """Counts the different adapters (LoRARequest) among rows, some of which may have none."""
    return len(set(ids(adapters)) - {0})
