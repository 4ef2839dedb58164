"""fastsmc without vLLM: groups over a Hugging Face model in this process. What twists are trained with.

    Trunk      a causal language model as hidden states: of one prompt, of next tokens by a KV cache, of whole batches
    TrunkRows  the `RowModel` of one group over a trunk
    HFEngine   `smc` as `fastsmc.LLM` has it, one group after the other

Slower than vLLM by far for long sequences and many particles, but it needs no server process, and weights that are
being trained can be sampled with at every step.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.group import Group, GroupEngine
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential

#: logits elements that scoring may hold at once
SCORE_ELEMENTS = 1 << 25
#: sequences that go through a frozen trunk at once
CHUNK = 1024


def fork(cache: Any) -> Any:
    """A KV cache that can go on without this one: selecting rows and appending make new tensors."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


class Trunk:
    """A Hugging Face causal language model, hidden states and logits apart.

    Args:
        model: `AutoModelForCausalLM`; its logits must be its output embedding of its last hidden state.

    Attributes:
        hidden_size, vocab_size: H, V.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._body = getattr(model, model.base_model_prefix)
        self._unembed = model.get_output_embeddings()
        self.hidden_size, self.vocab_size = model.config.hidden_size, model.config.vocab_size
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, name: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Trunk:
        from transformers import AutoModelForCausalLM

        return cls(AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype).to(device))

    def unembedding(self) -> Tensor:
        """(V, H) the output embedding."""
        return self._unembed.weight.detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """(…, H) -> (…, V)."""
        return self._unembed(hidden)

    def start(self, prompt: list[int]) -> tuple[Tensor, Any]:
        """Hidden state (1, H) after the prompt, and its KV cache."""
        ids = torch.tensor([prompt], device=self.device)
        out = self._body(input_ids=ids, use_cache=True)
        return out.last_hidden_state[:, -1], out.past_key_values

    def next(self, cache: Any, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Row r continues row parents[r] of the cache with tokens[r] (R,) or (R, n); the cache is consumed.

        Returns:
            hidden states (R, H) or (R, n, H), and the cache of the R rows.
        """
        cache.reorder_cache(parents)
        ids = tokens.reshape(len(tokens), -1)
        out = self._body(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden = out.last_hidden_state
        return (hidden[:, -1] if tokens.ndim == 1 else hidden), out.past_key_values

    def hidden(self, prompt: list[int], tokens: Tensor) -> Tensor:
        """(B, T, H): the hidden state before each of tokens (B, T) int64; -1 is padding after a sequence's end.

        Gradients reach the trunk's parameters, so every row goes through it with its prompt.
        """
        start = torch.tensor(prompt, device=self.device).expand(len(tokens), -1)
        ids = torch.cat([start, tokens[:, :-1].clamp(min=0)], dim=1)
        return self._body(input_ids=ids, use_cache=False).last_hidden_state[:, len(prompt) - 1 :]

    @torch.no_grad()
    def frozen_hidden(self, prompt: list[int], tokens: Tensor) -> Tensor:
        """As `hidden`, without gradients: the prompt goes through the trunk once, and so does each distinct history."""
        padded = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1].clamp(min=0)], dim=1)  # never 0 columns
        histories, which = torch.unique(padded, dim=0, return_inverse=True)
        first, cache = self.start(prompt)
        parts = []
        for part in histories[:, 1:].split(CHUNK):
            before = first[:, None].expand(len(part), -1, -1)
            if part.shape[1]:
                parents = torch.zeros(len(part), dtype=torch.int64, device=self.device)
                after, _ = self.next(fork(cache), parents, part)
                before = torch.cat([before, after], dim=1)
            parts.append(before)
        return torch.cat(parts)[which]


class TrunkRows:
    """The slots of one group over a trunk: `RowModel`."""

    def __init__(self, trunk: Trunk, prompt: list[int], n: int) -> None:
        self._trunk, self._prompt = trunk, prompt
        self._row_of = torch.zeros(n, dtype=torch.int64, device=trunk.device)  # a slot's row in the cache

    def first(self) -> tuple[Tensor, Tensor]:
        hidden, self._cache = self._trunk.start(self._prompt)
        return self._trunk.logits(hidden), hidden

    def next(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        hidden, self._cache = self._trunk.next(self._cache, self._row_of[slots], tokens)
        self._row_of[slots] = torch.arange(len(slots), device=slots.device)
        return self._trunk.logits(hidden), hidden

    def reindex(self, ancestors: Tensor) -> None:
        self._row_of = self._row_of[ancestors]

    def continuation_log_prob(
        self, tokens: Tensor, slots: Tensor, continuation: list[int], temperature: float
    ) -> Tensor:
        target = torch.tensor(continuation, device=slots.device)
        chunk = max(1, SCORE_ELEMENTS // (self._trunk.vocab_size * len(continuation)))
        out = []
        for part, rows in zip(tokens.split(chunk), self._row_of[slots].split(chunk), strict=True):
            ids = torch.cat([part[:, None], target[None, :-1].expand(len(part), -1)], dim=1)
            hidden, _ = self._trunk.next(fork(self._cache), rows, ids)
            logits = self._trunk.logits(hidden).flatten(0, 1)
            lse = ops.weigh(logits.detach(), temperature=temperature).lse
            score = logits.gather(1, target.repeat(len(part))[:, None])[:, 0].double() / temperature - lse
            out.append(score.reshape(len(part), -1).sum(1))
        return torch.cat(out)


class HFEngine:
    """Groups over a Hugging Face model in this process.

    Args:
        model: name or path, or a `Trunk`.
        tokenizer: a tokenizer; by default that of the path, None for a `Trunk`.
        name: what the model is called on the cards of twists; by default its name or path.
        stop_token_ids: what ends a particle unless `ignore_eos`; by default the model's end-of-sequence tokens.
        dtype, device: of the weights, when a path is given.
    """

    def __init__(
        self,
        model: str | os.PathLike | Trunk,
        tokenizer: Any = None,
        name: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        if isinstance(model, Trunk):
            self.trunk = model
        else:
            from transformers import AutoTokenizer

            self.trunk, name = Trunk.load(model, dtype, device), name or str(model)
            if tokenizer is None and os.path.exists(os.path.join(model, "tokenizer_config.json")):
                tokenizer = AutoTokenizer.from_pretrained(str(model))
        if stop_token_ids is None:
            config = getattr(self.trunk.model, "generation_config", None)
            ids = getattr(config, "eos_token_id", None)
            stop_token_ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
            stop_token_ids = {*stop_token_ids} | ({tokenizer.eos_token_id} if tokenizer is not None else set())
        self.stop_token_ids = frozenset(stop_token_ids) - {None}
        trunk = self.trunk
        self.engine = GroupEngine(tokenizer, trunk.device, trunk.vocab_size, trunk.hidden_size, trunk.model, name)

    def get_tokenizer(self) -> Any:
        return self.engine.tokenizer

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt. ValueError: it is empty, or text without a tokenizer."""
        if isinstance(prompt, str):
            if self.engine.tokenizer is None:
                raise ValueError(f"prompt={prompt!r}: this engine has no tokenizer; give token ids")
            prompt = self.engine.tokenizer.encode(prompt)
        if not len(prompt):
            raise ValueError(f"prompt={prompt!r}: is empty")
        return [int(v) for v in prompt]

    def stops(self, params: SMCParams) -> frozenset[int]:
        """All tokens that end a particle."""
        return frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.stop_token_ids)

    @torch.no_grad()  # not inference mode: what is sampled may be trained on
    def smc(
        self,
        prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
        params: SMCParams | None = None,
        potential: Potential | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
    ) -> Population | list[Population]:
        """As `fastsmc.LLM.smc`; `potential` is set up at every call.

        Raises:
            ValueError: an argument that cannot be.
            SMCError: a group failed.
        """
        from fastsmc import twists

        params = SMCParams() if params is None else params
        single = isinstance(prompts, str) or all(hasattr(v, "__index__") for v in prompts)
        items = [prompts] if single else list(prompts)
        each = [None] * len(items) if exact is None else [exact] if single else list(exact)
        if len(each) != len(items):
            raise ValueError(f"exact: samples for {len(each)} prompts, but there are {len(items)}")
        if twist is not None:
            potential = twists.Twist.load(twist).guide(potential or twists.card_potential(twist))
        if potential is not None:
            potential.prepare(self.engine.tokenizer)
            potential.setup(self.engine)
        populations = []
        for i, (prompt, kept) in enumerate(zip(items, each, strict=True)):
            ids = self.encode(prompt)
            own = SMCParams(**{**vars(params), "group": params.group + i})
            rows = TrunkRows(self.trunk, ids, own.n_particles)
            group = Group(own, rows, potential, ids, self.stops(params), self.trunk.device, self.engine, exact=kept)
            while not group.done:
                group.step()
            population = group.population()
            if self.engine.tokenizer is not None:
                population.texts = self.engine.tokenizer.batch_decode(population.token_ids, skip_special_tokens=True)
            populations.append(population)
        return populations[0] if single else populations
