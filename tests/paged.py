"""A small real Llama over paged keys and values, in plain PyTorch: `captured.PagedModel` with the weights of a Hugging
Face checkpoint. Every shape is fixed and nothing is asked of the device, so that a CUDA graph can hold its forward.

Blocks are (2, heads, slots, head size): keys, then values, of one layer. Attention is `attend` in Triton, which reads
each block that rows share once, or plain: it gathers all columns of the table and masks what lies beyond the position.
Plain attention computes in float64, so that logits, float32, do not hang on how many rows there are: equal histories
then have equal weights, and a group that gives each particle a row resamples as one that gives each history a row.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsmc import ops


class PagedLlama:
    """Args: path of a Llama checkpoint; blocks in the cache; tokens a block; whether `attend` reads them."""

    slot_dim = 3

    def __init__(
        self, path: Path | str, n_blocks: int, block_size: int, device: str = "cpu", attends: bool = False
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.attends = attends
        dtype = torch.float32 if attends else torch.float64
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval().to(device)
        self.config, self.net, self.block_size = model.config, model, block_size
        c = model.config
        self.head_size = c.hidden_size // c.num_attention_heads
        shape = (n_blocks, 2, c.num_key_value_heads, block_size, self.head_size)
        self.caches = [torch.full(shape, math.nan, dtype=dtype, device=device) for _ in range(c.num_hidden_layers)]
        base = c.rope_parameters["rope_theta"]
        self.frequency = base ** (-torch.arange(0, self.head_size, 2, device=device).to(dtype) / self.head_size)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """x: (N, heads, head size)"""
        angle = (position * self.frequency).repeat(2)
        a, b = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-b, a], dim=-1) * angle.sin()

    @torch.inference_mode()
    def forward(self, tokens: Tensor, position: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        n, columns = table.shape
        block = table.long().index_select(1, (position // self.block_size)[None])[:, 0]
        slot = (position % self.block_size)[None].expand(n)
        if self.attends:
            plan, length = ops.plan_attend(table, backend="triton"), (position + 1).int()[None]
        else:
            seen = torch.arange(columns * self.block_size, device=tokens.device) <= position
        x = self.net.model.embed_tokens(tokens)
        for layer, cache in zip(self.net.model.layers, self.caches, strict=True):
            h, attention = self._norm(x, layer.input_layernorm.weight), layer.self_attn
            q, k, v = (p(h).view(n, -1, self.head_size) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = self._rotate(q, position), self._rotate(k, position)
            cache[block, 0, :, slot], cache[block, 1, :, slot] = k, v
            if self.attends:
                out = ops.attend(q, cache[:, 0], cache[:, 1], plan, length, scale=self.head_size**-0.5)
            else:
                # (N, C, 2, heads, slots, size) → (2, N, heads, C·slots, size)
                keys, values = cache[table.long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
                keys, values = (torch.where(seen[:, None], kv, 0.0) for kv in (keys, values))
                out = F.scaled_dot_product_attention(q[:, :, None], keys, values, seen[None, :], enable_gqa=True)
            x = x + attention.o_proj(out.reshape(n, -1))
            x = x + layer.mlp(self._norm(x, layer.post_attention_layernorm.weight))
        hidden = self._norm(x, self.net.model.norm.weight)
        return self.net.lm_head(hidden).float(), hidden.float()

    def prefill(self, prompt: list[int]) -> list[int]:
        """Puts the prompt into the first blocks; their ids."""
        device = self.caches[0].device
        blocks = list(range(-(-len(prompt) // self.block_size)))
        table = torch.tensor([blocks], dtype=torch.int32, device=device)
        for i, token in enumerate(prompt):
            self.forward(torch.tensor([token], device=device), torch.tensor(i, device=device), table)
        return blocks


class SlotRows:
    """`group.RowModel` over the same model and kind of cache, without paging: slot i has its own blocks."""

    def __init__(self, model: PagedLlama, prompt: list[int], n_rows: int, steps: int) -> None:
        self.model, self.prompt = model, prompt
        columns = -(-(len(prompt) + steps) // model.block_size)
        device = model.caches[0].device
        self.table = torch.arange(n_rows * columns, dtype=torch.int32, device=device).view(n_rows, columns)
        self.position = 0

    def _run(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model.forward(tokens, torch.tensor(self.position, device=tokens.device), self.table[slots])
        self.position += 1
        return out

    def first(self):
        device = self.table.device
        for token in self.prompt:
            out = self._run(torch.tensor([token], device=device), torch.zeros(1, dtype=torch.int64, device=device))
        return out

    def next(self, tokens, slots):
        return self._run(tokens, slots)

    def reindex(self, ancestors):
        for cache in self.model.caches:
            cache[self.table.long()] = cache[self.table[ancestors].long()]

    def continuation_log_prob(self, tokens, slots, continuation, p0, before, given=0):
        raise NotImplementedError
