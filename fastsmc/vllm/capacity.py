"""The arithmetic of what fits: a step of groups and the KV cache into memory, a group into the engine's limits.

    unprofiled_step_bytes → leave_room     GPU: vLLM has profiled the model; what groups need beyond that is taken off
    whole_step_bytes → kv_cache_bytes      CPU: vLLM profiles nothing, so all that a step holds is counted here
    Limits → check_fits                    rows, tokens and KV blocks that an engine has, and that a group needs

All numbers but a group's are known when an engine starts. This module imports nothing of vLLM, so that all of it can be
tried with made-up figures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastsmc.maps import NOWHERE
from fastsmc.params import SMCParams
from fastsmc.smc.paging import private_columns, spare_blocks

#: bytes per particle and token that log ψ takes in a step: a dense (N, V) in float32, and as much again while a
#: potential makes it
LOG_PSI_BYTES = 8
#: a tile's entries in what `weigh` writes per row: maxima and sums in float32, twice, and the masses in float64
TILE_BYTES, TILE = 24, 1024
#: what hardly grows with N: partial results of `attend` (at most 35 MB at a head size of 256), block tables, records
SMALL_BYTES = 64 << 20
#: logits elements that scoring a continuation holds at once
SCORE_ELEMENTS = 1 << 27
#: share of what vLLM would give the KV cache that a step's memory takes at most
MAX_SHARE = 0.5
#: shares that the KV cache takes where no size was given: of the machine's free memory, which other programs want too,
#: and of what is free where less than the machine is there to begin with, a memory node or a control group
MACHINE_SHARE, PART_SHARE = 0.3, 0.5


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


# --------------------------------------------------------------------------------------- a step, beside a GPU's profile
def half_pass_bytes(rows: int, vocab: int, hidden: int, element: int) -> int:
    """Returns the bytes that a pass keeps of its rows, logits and hidden states, while other requests have their step.

    They are written into one place, part by part, and nothing else is there of a step before the last part has run.
    """
    return rows * (vocab + hidden) * element


def unprofiled_step_bytes(rows: int, vocab: int, hidden: int, element: int) -> int:
    """Returns the bytes of a device that a step of groups needs beyond vLLM's profile, which has as many rows' logits.

    All rows of an engine together are at most `rows` = max_num_seqs, and one group's step is over before the next
    begins. Either a pass is half done, beside a step of other requests as large as the profile's, or all its rows have
    run and are weighed, the logits where the profile has its own.
    """
    weighed = rows * (vocab * LOG_PSI_BYTES + -(-vocab // TILE) * TILE_BYTES)
    return max(weighed, half_pass_bytes(rows, vocab, hidden, element)) + SMALL_BYTES


def leave_room(available: int, needed: int) -> tuple[int, str | None]:
    """Returns the bytes of `available` that a KV cache gets, so that `needed` are left to a step, and a warning.

    At most MAX_SHARE is taken: a small card keeps a KV cache that serves ordinary requests and sparse twists, and the
    warning says which groups may fail on it.
    """
    taken = min(needed, int(max(available, 0) * MAX_SHARE))
    if taken == needed:
        return available - taken, None
    return available - taken, (
        f"a step of groups with dense twists takes up to {gib(needed)} beside the KV cache, and of the "
        f"{gib(available)} that are there only {taken / 2**30:.2f} are left to it: a group of that many "
        "particles may run out of memory; lower max_num_seqs, or raise gpu_memory_utilization"
    )


# ---------------------------------------------------------------------------------------------------- a step, all of it
def whole_step_bytes(rows: int, tokens: int, vocab: int, hidden: int, intermediate: int, element: int) -> int:
    """Returns the bytes per rank that a step may hold beside weights and KV cache, for a dtype of `element` bytes.

    For each of `rows` = max_num_seqs particles and each of V tokens: its logit in the model's dtype and in float32, and
    `LOG_PSI_BYTES`, so rows·V·(element + 12), or `half_pass_bytes` if that is more. To that comes the larger of what
    never exists at once: activations of `tokens` = max_num_batched_tokens tokens through a layer,
    tokens·(2·intermediate + 8·hidden)·4, and logits of a continuation that is scored, min(tokens·V, 2²⁷)·(element + 4).
    """
    activations = tokens * (2 * intermediate + 8 * hidden) * 4
    scored = min(tokens * vocab, SCORE_ELEMENTS) * (element + 4)
    weighed = rows * vocab * (element + 4 + LOG_PSI_BYTES)
    return max(weighed, half_pass_bytes(rows, vocab, hidden, element)) + max(activations, scored)


class Rank(NamedTuple):
    """What one worker sees once every worker of its machine has loaded its weights, in bytes."""

    host: str
    node: int  #: the NUMA node that its memory comes from
    node_free: int
    host_free: int
    group_free: int | None = None  #: what its control group may still take; None: no limit


class Need(NamedTuple):
    """What a KV cache is for, in bytes per rank."""

    step: int  #: what a step needs beside the cache, `whole_step_bytes`
    least: int  #: the smallest cache that vLLM accepts
    useful: int  #: the largest that can be in use at once
    words: str  #: the settings that `least` comes from, for the error


def kv_cache_bytes(ranks: Sequence[Rank], need: Need) -> int:
    """Returns the size of each rank's KV cache where no size was given: the same for all, what the poorest can have.

    Memory comes out of a rank's NUMA node, its machine and its control group, each shared by the ranks that live there.
    Of each the cache takes at most a share (`MACHINE_SHARE`, `PART_SHARE`) of what is free, and always leaves what a
    step needs. It is no larger than is ever useful, and at least what vLLM accepts.

    Raises:
        ValueError: the least cache and a step do not fit; the message is one line with the figures.
    """
    sizes = [need.useful]
    for rank in ranks:
        on_host = [other for other in ranks if other.host == rank.host]
        on_node = sum(other.node == rank.node for other in on_host)
        for where, total, n_sharing, share in (
            (f"memory node {rank.node}", rank.node_free, on_node, PART_SHARE),
            ("the machine", rank.host_free, len(on_host), MACHINE_SHARE),
            ("the control group", rank.group_free, len(on_host), PART_SHARE),
        ):
            if total is None:
                continue
            free = total // n_sharing
            if free < need.step + need.least:
                each = "" if n_sharing == 1 else f" for {n_sharing} ranks"
                raise ValueError(
                    f"no room for a KV cache: {where} has {gib(total)} free{each}; each rank needs {gib(need.least)} "
                    f"for the smallest cache ({need.words}) and {gib(need.step)} for a step: lower max_model_len, "
                    "max_num_seqs or max_num_batched_tokens, or free memory"
                )
            sizes.append(min(free - need.step, max(need.least, int(share * free))))
    return min(sizes)


# ------------------------------------------------------------------------------------- a group, in the engine's limits
@dataclasses.dataclass(frozen=True)
class Limits:
    """Says what an engine has: rows (max_num_seqs), tokens per forward pass, KV blocks, tokens per block, positions."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    max_model_len: int

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Reads a VllmConfig after the KV cache was sized. One block is vLLM's null block."""
        return cls(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            num_blocks=config.cache_config.num_gpu_blocks - 1,
            block_size=config.cache_config.block_size,
            max_model_len=config.model_config.max_model_len,
        )


def check_fits(
    params: SMCParams,
    prompt_len: int,
    lookahead: int,
    limits: Limits,
    first_reached: int = NOWHERE,
    text_len: int = 0,
    n_companions: int = 0,
) -> None:
    """Refuses a group that this engine can never run.

    A group that never resamples shares nothing, so its whole need is known and must fit; any other must fit with its
    tails and one copy of the rest (it grows as its genealogy asks for it).

    Args:
        first_reached: position of the prompt from which on an intervention gives it KV of its own; `NOWHERE`: none.
        text_len: tokens of the text that a counterfactual group is asked about.
        n_companions: histories of this text beside the particles.

    Raises:
        ValueError: naming the argument, its value and the limit.
    """
    n, size = params.n_particles, limits.block_size
    if n_companions and n >= limits.max_num_seqs:
        raise ValueError(
            f"n_particles={n}: counterfactuals need a row for their text, so at most {limits.max_num_seqs - 1} with "
            f"max_num_seqs={limits.max_num_seqs} of this engine"
        )
    if prompt_len + text_len > limits.max_model_len:
        raise ValueError(
            f"text: {text_len} tokens after a prompt of {prompt_len} are over max_model_len={limits.max_model_len} "
            "positions"
        )
    if n > limits.max_num_seqs:
        whole = f"; its islands={params.islands} migrate on one engine, all at once" if params.islands > 1 else ""
        raise ValueError(f"n_particles={n}: at most max_num_seqs={limits.max_num_seqs} of this engine{whole}")
    if n > limits.max_num_batched_tokens:
        raise ValueError(f"n_particles={n}: at most max_num_batched_tokens={limits.max_num_batched_tokens}")
    length = prompt_len + params.max_tokens + max(lookahead, 1) - 1
    if length > limits.max_model_len:
        raise ValueError(
            f"max_tokens={params.max_tokens}: with a prompt of {prompt_len} tokens and a lookahead of {lookahead}, at "
            f"most max_model_len={limits.max_model_len} positions"
        )
    prompt_blocks = -(-prompt_len // size)
    columns = last_position(params.max_tokens, prompt_len, lookahead) // size + 1 - prompt_len // size
    private = first_columns(params, prompt_len, lookahead, size)
    if params.segmented:
        columns += private
    never = params.never_resamples
    blocks = prompt_blocks + n * (columns if never else private) + (0 if never else columns - private)
    blocks += spare_blocks(n) * params.segmented
    blocks += (again := intervened_blocks(first_reached, prompt_len, size))
    if n_companions:
        blocks += n_companions * text_blocks(text_len, prompt_len, size)
    if blocks > limits.num_blocks:
        what = "never resampling, so sharing nothing" if never else "at the least"
        what += f", {again} of them for the prompt under its intervention" * (again > 0)
        raise ValueError(
            f"n_particles={n}: with max_tokens={params.max_tokens} and a prompt of {prompt_len} tokens the group needs "
            f"{blocks} KV blocks ({what}); the KV cache has {limits.num_blocks} of {size} tokens"
        )


def intervened_blocks(first_reached: int, prompt_len: int, block_size: int) -> int:
    """Counts the blocks of a prompt that a group has a second time, for KV under an intervention: from that which holds
    position `first_reached` on, none for `NOWHERE`."""
    if not 0 <= first_reached < prompt_len:
        return 0
    return -(-prompt_len // block_size) - first_reached // block_size


def text_blocks(text_len: int, prompt_len: int, block_size: int) -> int:
    """Counts the blocks that one history of a text of `text_len` tokens has for itself."""
    return last_position(text_len, prompt_len, 0) // block_size + 1 - prompt_len // block_size


def last_position(max_tokens: int, prompt_len: int, lookahead: int) -> int:
    """Returns the last position whose KV a group writes: the last token is written only to score what follows it."""
    return max(prompt_len, prompt_len + max_tokens - 2 + lookahead)


def first_columns(params: SMCParams, prompt_len: int, lookahead: int, block_size: int) -> int:
    """Counts the columns of private blocks that a group opens before its first token."""
    if params.segmented:
        return private_columns(block_size, lookahead)
    last = min(prompt_len + lookahead, last_position(params.max_tokens, prompt_len, lookahead))
    return last // block_size + 1 - prompt_len // block_size
