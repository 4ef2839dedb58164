"""`activations` and `interchange` of an `LLM`: its workers call the model (fastsmc/vllm/interchange.py); and what asks
its workers of histories beside it, `fastsmc.genlm.FastsmcLM`, finds here what it shares with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safetensors.torch import load
from torch import Tensor

from fastsmc.arguments import read_prompts
from fastsmc.interchange import Asked, Interchanges, Spots
from fastsmc.interventions import to_bytes

#: elements of an answer from the workers, a message of less than 4 GiB: one that is larger ends vLLM's sending thread
ANSWER_ELEMENTS = 1 << 29


class WorkerInterchanges(Interchanges):
    """Is the part of an `LLM` that asks its workers."""

    def _asked_prompts(self: Any, name: str, prompts: Any) -> list[list[int]]:
        ids, _ = read_prompts(prompts, self._tokenizer(), self.model_config.get_vocab_size(), name)
        limit = self.model_config.max_model_len
        for i, one in enumerate(ids):
            if len(one) > limit:
                raise ValueError(f"{name}[{i}]: has {len(one)} tokens, more than max_model_len={limit}")
        return ids

    def _read_states(self: Any, prompts: list[list[int]], spots: Spots, layers: Sequence[int]) -> Tensor:
        n = len(spots) * len(layers) * self.model_config.get_hidden_size()
        return self._ask_model(n, "smc_read_states", prompts, spots.at, list(layers))

    def _put_states(self: Any, asked: Asked) -> Tensor:
        labels = None if asked.labels is None else asked.labels.tolist()
        configs, n_rows = to_bytes(asked.configs), len(asked.configs) * len(asked.bases)
        width = self.model_config.get_vocab_size() if asked.logits else 1
        n = n_rows * (width if asked.labels is None else asked.labels[0].numel())
        return self._ask_model(n, "smc_put_states", asked.bases, asked.sources, configs, asked.logits, labels)

    def _ask_model(self: Any, n_elements: int, method: str, *args: Any) -> Tensor:
        """Has the workers call the model. ValueError: their answer's elements are more than a message holds."""
        if n_elements > ANSWER_ELEMENTS:
            raise ValueError(
                f"prompts: the answer would have {n_elements} elements, may have {ANSWER_ELEMENTS}; ask of fewer "
                "prompts or configurations at a time, or for labels in the place of logits"
            )
        data, why_not = self.collective_rpc(method, args=args)[0]
        if why_not is not None:
            raise ValueError(why_not)
        return load(data)["found"]


def check_async_engine(engine: Any) -> None:
    """Refuses what is no AsyncLLM of vLLM whose workers are ours.

    Raises:
        ValueError: saying which.
    """
    from vllm.v1.engine.async_llm import AsyncLLM  # a server's front end, which nothing else need load

    if not isinstance(engine, AsyncLLM):
        raise ValueError(f"engine={engine!r}: must be vLLM's AsyncLLM")
    worker = engine.vllm_config.parallel_config.worker_cls
    if not str(worker).startswith("fastsmc."):
        raise ValueError(f"engine: has workers of {worker}, not of fastsmc; start it where VLLM_PLUGINS names fastsmc")
