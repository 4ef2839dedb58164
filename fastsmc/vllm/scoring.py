"""`score` in a worker: continuations of one prompt, in a KV cache of their own, between two steps of the engine.

The prompt runs once, up to its last token. Rows of continuations then share its whole blocks; each has its own copy of
the block that is not whole, and begins with the prompt's last token, whose logits its first token is scored by. Every
tensor-parallel rank does the same; rank 0 has the logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsmc.p0 import P0
from fastsmc.vllm import interchange
from fastsmc.vllm.model import Model
from fastsmc.vllm.passes import lay_rows, score_queries


def score(model: Model, prompt: Sequence[int], continuations: Sequence[Sequence[int]], p0: P0) -> Tensor:
    """Computes log p0 of the tokens of continuations, one behind the other: (Q,) float64; empty on other ranks than 0.

    Args:
        continuations: at least one, none of them empty or longer than `model.max_tokens`.
    """
    size, before = model.block_size, len(prompt) - 1
    shared, n_prompt = before // size, -(-before // size)
    needs = [-(-(before + len(ids)) // size) - shared for ids in continuations]
    room = min(sum(needs), max(max(needs), interchange.CACHE_BYTES // model.block_bytes - n_prompt))
    found = []
    with model.own_cache(1 + n_prompt + room) as caches:  # the first block stands where a table has none
        of_prompt = list(range(1, 1 + n_prompt))
        for begin in range(0, before, model.max_tokens):
            end = min(before, begin + model.max_tokens)
            model.hidden(lay_rows(model, [prompt[begin:end]], [begin], [of_prompt]))
        for part in interchange.fitting(needs, room, model.max_rows):
            block, asked = itertools.count(1 + n_prompt), [continuations[i] for i in part]
            blocks = [[*of_prompt[:shared], *itertools.islice(block, needs[i])] for i in part]
            if shared < n_prompt:
                tails = torch.tensor([row[shared] for row in blocks], device=model.device)
                for cache in caches:
                    cache[tails] = cache[of_prompt[shared]].clone()
            batch = lay_rows(model, [[prompt[-1], *ids[:-1]] for ids in asked], [before] * len(part), blocks)
            targets = torch.tensor([token for ids in asked for token in ids], device=model.device)
            places = torch.tensor([place for ids in asked for place in range(len(ids))], device=model.device)
            found.append(score_queries(model, batch, targets, [p0], [0, len(targets)], places))
    return torch.cat(found)
