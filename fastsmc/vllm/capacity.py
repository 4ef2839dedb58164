"""How much memory groups need beside model and KV cache, in numbers that are known when an engine starts."""

from __future__ import annotations

#: bytes per element of an (N, V) matrix that a step holds at once, beside the logits, which vLLM counts itself: log ψ
#: in float32, and as much again while a potential makes it
STEP_ELEMENT_BYTES = 8
#: a tile's entries in what `weigh` writes per row: maxima and sums in float32, twice, and the masses in float64
TILE_BYTES, TILE = 24, 1024
#: what hardly grows with N: partial results of `attend` (at most 35 MB at a head size of 256), block tables, records
SMALL_BYTES = 64 << 20
#: share of what vLLM would give the KV cache that a step's memory takes at most
MAX_SHARE = 0.5


def step_bytes(max_num_seqs: int, vocab_size: int) -> int:
    """Bytes of a device that one step of groups needs beyond vLLM's profile, which has the logits of as many rows.

    All rows of an engine together are at most `max_num_seqs`, and one group's step is over before the next begins.
    """
    per_row = vocab_size * STEP_ELEMENT_BYTES + -(-vocab_size // TILE) * TILE_BYTES
    return max_num_seqs * per_row + SMALL_BYTES


def leave_room(available: int, needed: int) -> tuple[int, str | None]:
    """Bytes for a KV cache out of those `available` to it, so that `needed` bytes are left, and a warning.

    At most MAX_SHARE is taken: a small card keeps a KV cache that serves ordinary requests and sparse twists, and the
    warning says which groups may fail on it.
    """
    taken = min(needed, int(max(available, 0) * MAX_SHARE))
    if taken == needed:
        return available - taken, None
    return available - taken, (
        f"a step of groups with dense twists takes up to {needed / 2**30:.2f} GiB beside the KV cache, and of the "
        f"{available / 2**30:.2f} GiB that are there only {taken / 2**30:.2f} are left to it: a group of that many "
        "particles may run out of memory; lower max_num_seqs, or raise gpu_memory_utilization"
    )
