"""Networks of reward models, of transformers, in the process of an engine.

An engine loads those of its option `reward_models` when it starts, so that their memory is known before the KV cache is
sized; `fastsmc.potentials.HFReward` finds them by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.tokens import short

#: tokens, and logits of a language model, that go through a reward model at once
MOST_TOKENS, MOST_LOGITS = 1 << 13, 1 << 26

#: classes of networks: the end of the name of a checkpoint's architecture, and what loads it
_SEQUENCE, _TOKEN, _LM = "ForSequenceClassification", "ForTokenClassification", "ForCausalLM"
_LOADERS = {
    _SEQUENCE: "AutoModelForSequenceClassification",
    _TOKEN: "AutoModelForTokenClassification",
    _LM: "AutoModelForCausalLM",
}


class Network:
    """Holds a reward model's network and tokenizer.

    Args:
        model: a network of transformers whose class's name ends with ForSequenceClassification, ForTokenClassification
            or ForCausalLM.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.kind = next(end for end in _LOADERS if type(model).__name__.endswith(end))
        self.config = model.config.get_text_config()

    @classmethod
    def load(cls, path: str | os.PathLike, dtype: torch.dtype, device: torch.device | str) -> Network:
        """Loads a checkpoint: a directory, or a name on the hub.

        Raises:
            ValueError: its architecture is none of those above.
            OSError: there is no such checkpoint, or it has no tokenizer.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(path)
        names = config.architectures or []
        ends = [end for end in _LOADERS if len(names) == 1 and names[0].endswith(end)]
        if not ends:
            said = ", ".join(names) or "none"
            raise ValueError(f"architecture {said}: must end with {', '.join(_LOADERS)}")
        loader = getattr(transformers, _LOADERS[ends[0]])
        model, loading = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(f"lacks the weights {', '.join(sorted(loading['missing_keys']))}")
        model = model.to(device)
        if model.device.type == "cpu":  # transformers has mapped the file, which takes no memory so far
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
        return cls(model, transformers.AutoTokenizer.from_pretrained(path))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def step_bytes(self) -> int:
        """Bytes that scoring may take beside the weights: activations of a layer, and a language model's logits."""
        hidden = self.config.hidden_size
        inner = getattr(self.config, "intermediate_size", None) or 4 * hidden
        logits = MOST_LOGITS * 4 if self.is_lm else 0
        return MOST_TOKENS * (2 * inner + 8 * hidden) * 4 + logits

    @property
    def is_lm(self) -> bool:
        """Whether it is a language model."""
        return self.kind == _LM

    @property
    def is_stepwise(self) -> bool:
        """Whether it says something behind each token."""
        return self.kind != _SEQUENCE

    @property
    def n_labels(self) -> int:
        """Labels of a classifier; of a language model the two answers."""
        return 2 if self.is_lm else self.config.num_labels

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes texts with the tokens that its tokenizer puts around a text, special tokens in them as such.

        Raises:
            ValueError: a text has more tokens than the network has positions.
        """
        rows = self.tokenizer(list(texts))["input_ids"]
        limit = getattr(self.config, "max_position_embeddings", None)
        for text, row in zip(texts, rows, strict=True):
            if not row or (limit is not None and len(row) > limit):
                raise ValueError(
                    f"{short(text)} has {len(row)} tokens: must be from 1 to {limit} for this reward model"
                )
        return rows

    def last_token(self, text: str) -> int:
        """Returns the id of a text's last token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"][-1]

    def only_token(self, name: str, text: str) -> int:
        """Returns the id that a text of a single token has."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ValueError(f"{name}={text!r}: must be one token of the reward model's tokenizer, has ids {ids}")
        return ids[0]

    @torch.inference_mode()
    def probabilities(self, rows: Sequence[list[int]], answers: Sequence[int] | None = None) -> Tensor:
        """Returns (M, labels) float64 probabilities, of what is read (M rows of token ids) or of its last token.

        Softmax over the labels; sigmoid of a single label, or of several that do not exclude each other
        (`problem_type` multi_label_classification).

        Args:
            answers: with a language model, the token ids whose probabilities as next token are compared.
        """
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found: dict[int, Tensor] = {}
        for part in self._batches(order, rows):
            logits = self._logits([rows[i] for i in part], answers).double()
            found.update(zip(part, logits.cpu(), strict=True))
        logits = torch.stack([found[i] for i in range(len(rows))])
        several = getattr(self.config, "problem_type", None) == "multi_label_classification"
        return logits.sigmoid() if several or logits.shape[1] == 1 else logits.softmax(1)

    def _batches(self, order: Sequence[int], rows: Sequence[list[int]]) -> Iterator[list[int]]:
        """Cuts rows, the shortest first, into parts that go through the network at once."""
        part: list[int] = []
        for i in order:
            lengths = {len(rows[j]) for j in (*part, i)}
            n_logits = (len(part) + 1) * len(lengths) * self.config.vocab_size if self.is_lm else 0
            full = len(part) + 1 == self.config.vocab_size  # one token must be left to pad with
            if part and (full or (len(part) + 1) * len(rows[i]) > MOST_TOKENS or n_logits > MOST_LOGITS):
                yield part
                part = []
            part.append(i)
        yield part

    def _logits(self, rows: list[list[int]], answers: Sequence[int] | None) -> Tensor:
        """Runs the network on rows padded at their right: (R, labels)."""
        device, longest = self.model.device, max(map(len, rows))
        pad = self.config.pad_token_id
        if pad is None:  # classifiers of decoders read the last token that is none, so it must be no row's last
            pad = min(set(range(len(rows) + 1)) - {row[-1] for row in rows})
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        mask = (torch.arange(longest, device=device) < lengths[:, None]).long()
        if not self.is_stepwise:
            usual, self.config.pad_token_id = self.config.pad_token_id, pad
            try:
                return self.model(input_ids=ids, attention_mask=mask).logits
            finally:
                self.config.pad_token_id = usual
        each = torch.arange(len(rows), device=device)
        if not self.is_lm:
            return self.model(input_ids=ids, attention_mask=mask).logits[each, lengths - 1]
        ends, column = torch.unique(lengths - 1, return_inverse=True)
        logits = self.model(input_ids=ids, attention_mask=mask, logits_to_keep=ends, use_cache=False).logits
        return logits[each, column][:, torch.tensor(answers, device=device)]


def load_networks(paths: Mapping[str, str], dtype: torch.dtype, device: torch.device | str) -> dict[str, Network]:
    """Loads an engine's reward models, by name.

    Raises:
        ValueError: one cannot be loaded; names the option and its value.
    """
    networks = {}
    for name, path in paths.items():
        try:
            networks[name] = Network.load(path, dtype, device)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"reward_models[{name!r}]={path!r}: {error}") from error
    return networks
