"""Interchange interventions in a worker: passes over a KV cache of their own, between two steps of the engine.

    read_states   prompts → hidden states behind layers
    put_states    bases, sources, configurations → answers

Neither touches the engine's KV cache, its prefix cache or its requests. Every tensor-parallel rank does the same, as
all are asked the same. A row's block table begins with the whole blocks of its base that lie before its position; the
block in which the position stands is copied, and all behind it are the row's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastsmc.interchange import Answers, Asked, Spots, putting, reading
from fastsmc.maps import Site, SiteMaps
from fastsmc.vllm.model import Model
from fastsmc.vllm.passes import Stretch, run_stretches

#: bytes of the KV cache that such a call makes for itself, unless a single row needs more
CACHE_BYTES = 1 << 29


def read_states(model: Model, prompts: Sequence[Sequence[int]], spots: Spots, layers: Sequence[int]) -> Tensor:
    """Reads the hidden states (S, L, H) float32 that layers put out at spots."""
    sizes = model.interventions.places.sizes
    states = torch.zeros(len(spots), len(layers), sizes.hidden, device=model.device)
    sites = reading(states, layers)
    n_blocks = [model.n_blocks(prompt) for prompt in prompts]
    room = max(CACHE_BYTES // model.block_bytes, 1 + max(n_blocks))
    with model.own_cache(min(room, 1 + sum(n_blocks))):
        for part in fitting(n_blocks, room - 1, model.max_rows):
            block = itertools.count(1)  # the first one stands where a table has none
            run_stretches(
                model,
                [
                    Stretch(
                        prompts[i], 0, [next(block) for _ in range(n_blocks[i])],
                        spots.of_prompt(i, len(prompts[i])).to(model.device),
                    )
                    for i in part
                ],
                sites,
            )  # fmt: skip
    return states


def put_states(model: Model, asked: Asked) -> Answers:
    """Runs all rows of a call.

    Raises:
        ValueError: a source's hidden state is not finite.
    """
    sizes, spots = model.interventions.places.sizes, asked.spots()
    states = read_states(model, asked.sources, spots, asked.layers)
    spots.check_finite(states, asked.layers, "sources")
    maps, answers = asked.maps(sizes.hidden, model.device), Answers(asked, sizes.vocab)
    n_blocks = [model.n_blocks(base) for base in asked.bases]
    # half of it for bases, half for rows; a base and a row of it fit in any case
    half = max(CACHE_BYTES // model.block_bytes // 2, 1 + max(n_blocks))
    n_own = min(half, len(asked.configs) * sum(n_blocks))
    with model.own_cache(1 + min(half, sum(n_blocks)) + n_own) as caches:
        for part in fitting(n_blocks, half, model.max_rows):
            block = itertools.count(1)
            tables = {b: [next(block) for _ in range(n_blocks[b])] for b in part}
            nothing = {b: torch.full((len(asked.bases[b]),), -1, device=model.device) for b in part}
            run_stretches(model, [Stretch(asked.bases[b], 0, tables[b], nothing[b]) for b in part], {})
            rows = [(c, b) for c in range(len(asked.configs)) for b in part]
            own = range(next(block), 1 + min(half, sum(n_blocks)) + n_own)
            _put_rows(model, caches, asked, maps, rows, tables, own, spots, states, answers)
    return answers


def _put_rows(
    model: Model, caches: Sequence[Tensor], asked: Asked, maps: dict[Site, SiteMaps],
    rows: Sequence[tuple[int, int]], tables: dict[int, list[int]], own: range, spots: Spots, states: Tensor,
    answers: Answers,
) -> None:  # fmt: skip
    """Runs rows of bases whose keys and values are there, as many at a time as have room in the blocks `own`."""
    size = model.block_size
    wanted = [len(tables[b]) - asked.at[c][b] // size for c, b in rows]
    for chunk in fitting(wanted, len(own), model.max_rows):
        block, chosen = iter(own), [rows[i] for i in chunk]
        stretches, copies = [], []
        for number, (i, (c, b)) in enumerate(zip(chunk, chosen, strict=True)):
            position, ours = asked.at[c][b], [next(block) for _ in range(wanted[i])]
            shared = position // size
            if position % size:
                copies.append((tables[b][shared], ours[0]))
            at = torch.full((len(asked.bases[b]),), -1, device=model.device)
            at[position] = number
            stretches.append(Stretch(asked.bases[b], position, [*tables[b][:shared], *ours], at))
        if copies:
            source, target = torch.tensor(copies, device=model.device).T
            for cache in caches:
                cache[target] = cache[source]
        hidden = run_stretches(model, stretches, putting(asked, maps, chosen, spots, states))
        for begin in range(0, len(chosen), model.max_logits_rows):
            taken = slice(begin, begin + model.max_logits_rows)
            logits = model.plain_logits(hidden[taken])
            if logits is not None:  # which vLLM gathers on tensor-parallel rank 0
                answers.put(chosen[taken], logits)


def fitting(needs: Sequence[int], room: int, most: int) -> Iterator[list[int]]:
    """Cuts 0, 1, … into runs, each of at most `most` whose needs come to `room` at most."""
    run: list[int] = []
    left = room
    for i, need in enumerate(needs):
        if run and (need > left or len(run) == most):
            yield run
            run, left = [], room
        run.append(i)
        left -= need
    if run:
        yield run
