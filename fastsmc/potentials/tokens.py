"""What the built-in potentials share: lists of token ids, and the bytes that a tokenizer's ids stand for."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc.potentials.base import Engine


def tokenizer_of(engine: Engine, who: str) -> Any:
    if engine.tokenizer is None:
        raise ValueError(f"{who}: this engine has no tokenizer")
    return engine.tokenizer


def token_list(name: str, ids: Any) -> list[int]:
    """`ids` as a list of int. ValueError, naming `name`, if it is none."""
    if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, np.ndarray)):
        raise ValueError(f"{name}={ids!r}: must be a list of token ids")
    for v in ids:
        if isinstance(v, bool) or not hasattr(v, "__index__") or int(v) < 0:
            raise ValueError(f"{name}: {v!r} is not a token id")
    return [int(v) for v in ids]


def log_of(ok: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Where `ok` 0, elsewhere -inf."""
    return torch.zeros(ok.shape, dtype=dtype, device=ok.device).masked_fill_(~ok, -math.inf)


_token_bytes_cache: weakref.WeakKeyDictionary[Any, list[bytes | None]] = weakref.WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each token id stands for; None for special tokens and ids that stand for nothing."""
    if tokenizer not in _token_bytes_cache:
        from xgrammar import TokenizerInfo  # comes with vLLM; knows byte-level BPE, byte fallback and raw vocabularies

        special = set(tokenizer.all_special_ids)
        special |= {i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special}
        known = set(tokenizer.get_vocab().values())
        decoded = TokenizerInfo.from_huggingface(tokenizer).decoded_vocab
        _token_bytes_cache[tokenizer] = [
            token if token and i in known and i not in special else None for i, token in enumerate(decoded)
        ]
    return _token_bytes_cache[tokenizer]
