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
from fastsmc.vllm.passes import Batch, score_queries


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
            model.hidden(_batch(model, [(prompt[begin:end], begin, of_prompt)]))
        for part in interchange.fitting(needs, room, model.max_rows):
            block, rows = itertools.count(1 + n_prompt), []
            for i in part:
                own = [next(block) for _ in range(needs[i])]
                rows.append(([prompt[-1], *continuations[i][:-1]], before, [*of_prompt[:shared], *own]))
            if shared < n_prompt:
                tails = torch.tensor([table[shared] for *_, table in rows], device=model.device)
                for cache in caches:
                    cache[tails] = cache[of_prompt[shared]].clone()
            tokens = [token for i in part for token in continuations[i]]
            places = [place for i in part for place in range(len(continuations[i]))]
            batch, scored = _batch(model, rows), torch.tensor([tokens, places], device=model.device)
            found.append(score_queries(model, batch, scored[0], [p0], [0, len(tokens)], scored[1]))
    return torch.cat(found)


def _batch(model: Model, rows: Sequence[tuple[Sequence[int], int, list[int]]]) -> Batch:
    """Makes a batch of rows: the tokens that they append, how many are before these, and their blocks."""
    device, size = model.device, model.block_size
    columns = max(len(table) for *_, table in rows)
    table = torch.tensor([[*t, *[0] * (columns - len(t))] for *_, t in rows], dtype=torch.int32, device=device)
    queries = tuple(len(tokens) for tokens, *_ in rows)
    at = torch.cat([torch.arange(begin, begin + len(tokens), device=device) for tokens, begin, _ in rows])
    row_of = torch.arange(len(rows), device=device).repeat_interleave(torch.tensor(queries, device=device))
    ends = [begin + len(tokens) for tokens, begin, _ in rows]
    return Batch(
        torch.tensor([v for tokens, *_ in rows for v in tokens], device=device),
        at,
        table[row_of, at // size].long() * size + at % size,
        table,
        torch.tensor(ends, dtype=torch.int32, device=device),
        max(ends),
        queries,
    )
