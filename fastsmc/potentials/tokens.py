"""What the built-in potentials share: lists of token ids, and the bytes that a tokenizer's ids stand for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine
from fastsmc.values import as_int


def tokenizer_of(engine: Engine, who: str) -> Any:
    if engine.tokenizer is None:
        raise ValueError(f"{who}: this engine has no tokenizer")
    return engine.tokenizer


def token_list(name: str, ids: Any, vocab_size: int | None = None) -> list[int]:
    """Reads token ids as a list of int: from a list, a tuple, a range, or a vector of integers (NumPy, torch).

    Args:
        vocab_size: V, which no id may reach, where it is known.

    Raises:
        ValueError: naming `name`, what it is and what is allowed.
    """
    if hasattr(ids, "tolist") and hasattr(ids, "ndim"):  # an array
        if ids.ndim != 1:
            raise ValueError(f"{name}: is an array of {ids.ndim} dimensions; must be a vector of token ids")
        ids = ids.tolist()
    if isinstance(ids, (str, bytes, bytearray)) or not isinstance(ids, Sequence):
        raise ValueError(f"{name}={short(ids)}: must be a list of token ids, not {type(ids).__name__}")
    out = []
    for i, value in enumerate(ids):
        number = as_int(value)
        if number is None or number < 0:
            raise ValueError(f"{name}[{i}]={short(value)}: is not a token id")
        if vocab_size is not None and number >= vocab_size:
            raise ValueError(f"{name}[{i}]={number}: is beyond the vocabulary; must be in [0, {vocab_size})")
        out.append(number)
    return out


def short(value: Any) -> str:
    """Writes a value as errors show it."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."


def log_of(ok: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns 0 where `ok`, elsewhere -inf."""
    return torch.zeros(ok.shape, dtype=dtype, device=ok.device).masked_fill_(~ok, -math.inf)


def text_ids(tokenizer: Any) -> frozenset[int]:
    """Collects the token ids that stand for text: those of the vocabulary that are not special."""
    special = set(tokenizer.all_special_ids)
    special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
    return frozenset(tokenizer.get_vocab().values()) - special


_token_bytes_cache: weakref.WeakKeyDictionary[Any, list[bytes | None]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """Returns the bytes that each token id stands for; None for special tokens and ids that stand for nothing."""
    if tokenizer not in _token_bytes_cache:
        from xgrammar import TokenizerInfo  # comes with vLLM; knows byte-level BPE, byte fallback and raw vocabularies

        plain = text_ids(tokenizer)
        decoded = TokenizerInfo.from_huggingface(tokenizer).decoded_vocab
        _token_bytes_cache[tokenizer] = [token if token and i in plain else None for i, token in enumerate(decoded)]
    return _token_bytes_cache[tokenizer]
