"""A Hugging Face causal language model as hidden states: what groups without vLLM run over, and twists stand on."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsmc.interventions import BLOCK, DOWN_PROJ, Sizes
from fastsmc.maps import AtSite, Site

#: sequences that go through a frozen trunk at once
CHUNK = 1024


def fork(cache: Any) -> Any:
    """Makes a KV cache that goes on without touching this one: selecting rows and appending make new tensors."""
    out = copy.copy(cache)
    out.layers = [copy.copy(layer) for layer in cache.layers]
    return out


class Trunk:
    """Runs a Hugging Face causal language model, hidden states and logits apart.

    Args:
        model: `AutoModelForCausalLM`; its logits must be its output embedding of its last hidden state.

    Attributes:
        hidden_size, vocab_size: H, V.
        max_positions: tokens that fit its context, or None.
    """

    max_positions: int | None = None

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._body = getattr(model, model.base_model_prefix)
        self._unembed = model.get_output_embeddings()
        self.hidden_size, self.vocab_size = model.config.hidden_size, model.config.vocab_size
        self.max_positions = getattr(model.config, "max_position_embeddings", None)
        self.device = next(model.parameters()).device

    @classmethod
    def load(cls, name: str | os.PathLike, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Trunk:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype)
        return cls(model.to(device))

    # -------------------------------------------------------------------------------------------------- interventions
    @cached_property
    def layers(self) -> Any:
        """Finds the decoder layers, a torch.nn.ModuleList.

        Raises:
            ValueError: there is no list of as many modules as the configuration says.
        """
        n = self.model.config.get_text_config().num_hidden_layers
        for module in self._body.modules():
            if isinstance(module, torch.nn.ModuleList) and len(module) == n:
                return module
        raise ValueError(f"{type(self.model).__name__}: its {n} layers are in no list of modules, so none can be found")

    @cached_property
    def sizes(self) -> Sizes:
        """Says what interventions must fit."""
        last = getattr(getattr(self.layers[0], "mlp", None), DOWN_PROJ, None)
        return Sizes(len(self.layers), self.hidden_size, getattr(last, "in_features", None), self.vocab_size)

    @contextmanager
    def under(self, sites: Mapping[Site, AtSite], variants: Tensor) -> Iterator[None]:
        """Has what stands at sites be called in calls within.

        Args:
            variants: (n,) or (R, n) int64 of the n tokens that each row appends.
        """

        def block(maps: AtSite) -> Callable[[Any, Any, Any], Any]:
            def hook(module: Any, inputs: Any, output: Any) -> Any:
                if isinstance(output, tuple):
                    return (_mapped(maps, output[0], variants), *output[1:])
                return _mapped(maps, output, variants)

            return hook

        def product(maps: AtSite) -> Callable[[Any, Any, Any], Any]:
            return lambda module, inputs, output: _mapped(maps, output, variants, inputs[0])

        with ExitStack() as stack:
            for (layer, place), maps in sites.items():
                if place == BLOCK:
                    handle = self.layers[layer].register_forward_hook(block(maps))
                else:
                    handle = self.layers[layer].mlp.down_proj.register_forward_hook(product(maps))
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def watch(self, token_ids: list[int], layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Runs a text and returns what a layer puts out (T, H), what its down_proj reads (T, K), and puts out (T, H).

        The last two are empty where there is no down_proj.
        """
        seen = [torch.zeros(0)] * 3

        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[0] = (output[0] if isinstance(output, tuple) else output)[0].float()

        def inner(module: Any, inputs: Any, output: Any) -> None:
            seen[1:] = inputs[0][0].float(), output[0].float()

        with ExitStack() as stack:
            stack.callback(self.layers[layer].register_forward_hook(hook).remove)
            if self.sizes.inner is not None:
                stack.callback(self.layers[layer].mlp.down_proj.register_forward_hook(inner).remove)
            self._body(input_ids=torch.tensor([token_ids], device=self.device), use_cache=False)
        return seen[0].cpu(), seen[1].cpu(), seen[2].cpu()

    @torch.no_grad()
    def read(self, prompt: list[int], sites: Mapping[Site, AtSite], spots: Tensor) -> None:
        """Runs a prompt and has hidden states read: `spots` (T,) int64, −1 where none is wanted."""
        with self.under(sites, spots.to(self.device)):
            self._body(input_ids=torch.tensor([prompt], device=self.device), use_cache=False)

    def unembedding(self) -> Tensor:
        """Gives the output embedding (V, H)."""
        return self._unembed.weight.detach()

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps hidden states (…, H) to logits (…, V)."""
        return self._unembed(hidden)

    def start(self, prompt: list[int]) -> tuple[Tensor, Any]:
        """Runs the prompt: the hidden state (1, H) after it, and its KV cache."""
        ids = torch.tensor([prompt], device=self.device)
        out = self._body(input_ids=ids, use_cache=True)
        return out.last_hidden_state[:, -1], out.past_key_values

    def next(self, cache: Any, parents: Tensor, tokens: Tensor) -> tuple[Tensor, Any]:
        """Continues, for row r, row parents[r] of the cache with tokens[r] (R,) or (R, n); the cache is consumed.

        Returns:
            hidden states (R, H) or (R, n, H), and the cache of the R rows.
        """
        cache.reorder_cache(parents)
        ids = tokens.reshape(len(tokens), -1)
        out = self._body(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden = out.last_hidden_state
        return (hidden[:, -1] if tokens.ndim == 1 else hidden), out.past_key_values

    def again(self, cache: Any, position: int, tokens: Tensor) -> Tensor:
        """Runs tokens (R, n) behind the first `position` tokens of the one row of a cache, which is left as it is.

        Returns:
            hidden states (R, n, H).
        """
        if position == 0:
            return self._body(input_ids=tokens, use_cache=False).last_hidden_state
        before = fork(cache)
        before.crop(position - cache.get_seq_length())
        return self.next(before, torch.zeros_like(tokens[:, 0]), tokens)[0]

    def hidden(self, prompt: list[int], tokens: Tensor) -> Tensor:
        """Gives (B, T, H), the hidden state before each of tokens (B, T) int64; -1 is padding after a sequence's end.

        Gradients reach the trunk's parameters, so every row goes through it with its prompt.
        """
        start = torch.tensor(prompt, device=self.device).expand(len(tokens), -1)
        ids = torch.cat([start, tokens[:, :-1].clamp(min=0)], dim=1)
        return self._body(input_ids=ids, use_cache=False).last_hidden_state[:, len(prompt) - 1 :]

    def above(self, layer: int, x: Tensor, positions: Tensor, cache: Any, mask: Tensor | None) -> Tensor:
        """Runs the layers above `layer` on what it puts out, with gradients.

        Args:
            x: (B, S, H), hidden states behind the layer.
            positions: (B, S) int64, where they stand.
            cache: gives each layer the keys and values that come before: `update`, as transformers calls it.
            mask: (B, 1, S, keys) of x's dtype, added to attention scores; None: all keys are seen.

        Returns:
            hidden states (B, S, H), ready for `logits`.

        Raises:
            ValueError: the model is put together in a way that is not known.
        """
        rotary, norm = getattr(self._body, "rotary_emb", None), getattr(self._body, "norm", None)
        if rotary is None or norm is None:
            raise ValueError(
                f"{type(self.model).__name__}: has no rotary_emb and norm, so its layers cannot be run alone"
            )
        try:
            rotated = rotary(x, positions)
            for module in self.layers[layer + 1 :]:
                out = module(
                    x, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
                    position_embeddings=rotated,
                )  # fmt: skip
                x = out[0] if isinstance(out, tuple) else out
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{type(self.model).__name__}: its layers are not known: {error}") from error
        return norm(x)

    @torch.no_grad()
    def frozen_hidden(self, prompt: list[int], tokens: Tensor) -> Tensor:
        """Does as `hidden`, without gradients: prompt and distinct histories go through the trunk once each."""
        padded = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1].clamp(min=0)], dim=1)  # never 0 columns
        histories, history_of = torch.unique(padded, dim=0, return_inverse=True)
        first, cache = self.start(prompt)
        parts = []
        for part in histories[:, 1:].split(CHUNK):
            before = first[:, None].expand(len(part), -1, -1)
            if part.shape[1]:
                parents = torch.zeros(len(part), dtype=torch.int64, device=self.device)
                after, _ = self.next(fork(cache), parents, part)
                before = torch.cat([before, after], dim=1)
            parts.append(before)
        return torch.cat(parts)[history_of]


def _mapped(maps: AtSite, output: Tensor, variants: Tensor, source: Tensor | None = None) -> Tensor:
    """Returns (R, n, H) mapped, as a whole; in place where memory allows, of which a model has no other use."""
    x = output.reshape(-1, output.shape[-1])
    y = None if source is None else source.reshape(-1, source.shape[-1])
    maps.apply(x, variants.expand(output.shape[:2]).reshape(-1), y)
    return x.view(output.shape)
