"""What attention layers get to know of rows: for those on `attend`, and for batches in which only some are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm import envs

from fastsmc.ops.attend import AttendPlan


@dataclass(frozen=True)
class AttendMetadata:
    """Attention metadata of groups' rows, one query each; the same for every layer.

    Attributes:
        length: tokens of each row, as ops.attend takes it; for a plan of 'triton' (1,) or (R,) int32 on the device.
    """

    plan: AttendPlan
    length: int | Tensor
    layout: str


@dataclass(frozen=True)
class MixedMetadata:
    """Attention metadata of a batch of which some rows use `attend` and others vLLM's attention.

    Attributes:
        parts: (begin, end, metadata) of the tokens [begin, end) of the batch; metadata is vLLM's or `AttendMetadata`.
            Tokens outside all parts are padding.
    """

    parts: tuple[tuple[int, int, Any], ...]


@contextmanager
def rows_read_whole() -> Iterator[None]:
    """Has vLLM's CPU kernels read the keys of a row one after the other, by metadata that is built meanwhile.

    Otherwise they split long rows among threads that have nothing else to do, and a row's bits hang on those beside it.
    """
    envs.VLLM_CPU_ATTN_SPLIT_KV = False  # hides what the module would make of the environment
    try:
        yield
    finally:
        del envs.VLLM_CPU_ATTN_SPLIT_KV
