"""`HFReward`: a reward model of transformers in the engine's own process.

An engine loads its reward models when it starts (`reward_models`), so that their memory is known before the KV cache
is sized; the potential finds them by name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine
from fastsmc.potentials.reward import NetworkReward
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
        [*names] = config.architectures or ()
        ends = [end for end in _LOADERS if len(names) == 1 and names[0].endswith(end)]
        if not ends:
            said = ", ".join(names) or "none"
            raise ValueError(f"architecture {said}: must end with {', '.join(_LOADERS)}")
        loader = getattr(transformers, _LOADERS[ends[0]])
        model, loading = loader.from_pretrained(path, dtype=dtype, output_loading_info=True)
        if loading["missing_keys"]:
            raise ValueError(f"lacks the weights {', '.join(sorted(loading['missing_keys']))}")
        return cls(model.to(device), transformers.AutoTokenizer.from_pretrained(path))

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(t.numel() * t.element_size() for t in (*self.model.parameters(), *self.model.buffers()))

    @property
    def step_bytes(self) -> int:
        """Bytes that scoring may take beside the weights: activations of a layer, and a language model's logits."""
        hidden = self.config.hidden_size
        inner = getattr(self.config, "intermediate_size", None) or 4 * hidden
        logits = MOST_LOGITS * 4 if self.kind == _LM else 0
        return MOST_TOKENS * (2 * inner + 8 * hidden) * 4 + logits

    @property
    def n_labels(self) -> int:
        """Labels of a classifier; of a language model the two answers."""
        return 2 if self.kind == _LM else self.config.num_labels

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
            n_logits = (len(part) + 1) * len(lengths) * self.config.vocab_size if self.kind == _LM else 0
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
        if self.kind == _SEQUENCE:
            usual, self.config.pad_token_id = self.config.pad_token_id, pad
            try:
                return self.model(input_ids=ids, attention_mask=mask).logits
            finally:
                self.config.pad_token_id = usual
        each = torch.arange(len(rows), device=device)
        if self.kind == _TOKEN:
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


class HFReward(NetworkReward):
    """Scores with a reward model that the engine has loaded: `LLM(…, reward_models={name: path})`.

    What it is its checkpoint says:

    - a sequence classifier: the score is the probability of a label, the softmax of the labels' logits, or the sigmoid
      of a single one. Of a reward model without bounds, with a single label, scale="logit" so gives back the reward
      itself, within ±16.1 (a score of 1e-7);
    - a token classifier, or a language model that answers `good` or `bad`: a process reward model, read at its step
      token, the last token of what it reads. The score is the probability of a label there, or
      p(good) / (p(good) + p(bad)) of the next token.

    It runs on the engine's device, in its dtype, and the engine waits for it.

    Args:
        model: its name among the engine's `reward_models`.
        good, bad: texts of one token each, the answers of a language model.
        template, step, step_token, step_join, label, aggregate, scale: as of `NetworkReward`.

    Raises:
        ValueError: naming the argument; in `setup`: the engine has no such model, or what it is does not go with the
            arguments; later: a text is longer than it can read.
    """

    shared_by_groups = ("_network",)

    def __init__(self, model: str, *, good: str | None = None, bad: str | None = None, **reading: Any) -> None:
        super().__init__(**reading)
        for name, value in (("model", model), ("good", good), ("bad", bad)):
            if not (isinstance(value, str) and value) and (value is not None or name == "model"):
                raise ValueError(f"{name}={value!r}: must be text")
        if (good is None) != (bad is None) or (good is not None and good == bad):
            raise ValueError(f"good={good!r}, bad={bad!r}: must be two texts, or None both")
        self.model, self.good, self.bad = model, good, bad

    def setup(self, engine: Engine) -> None:
        super().setup(engine)
        if self.model not in engine.reward_models:
            known = ", ".join(map(repr, engine.reward_models)) or "none"
            raise ValueError(
                f"HFReward: model={self.model!r}: is not loaded (there are: {known}); an engine loads its reward "
                f"models when it starts: reward_models={{{self.model!r}: directory}}"
            )
        self._network: Network = engine.reward_models[self.model]
        kind, name = self._network.kind, type(self._network.model).__name__
        if (self.good is not None) != (kind == _LM):
            raise ValueError(
                f"HFReward: good={self.good!r}: {name} {'needs' if kind == _LM else 'has no'} good and bad"
            )
        if self.step_token is None and kind != _SEQUENCE:
            raise ValueError(f"HFReward: step_token=None: {name} is read at a step token")
        self._answers = None
        if self.good is not None and self.bad is not None:
            self._answers = [self._network.only_token("good", self.good), self._network.only_token("bad", self.bad)]
        self._at = 0 if self._answers else self.choose(self._network.n_labels)
        if self.step_token is not None and kind != _SEQUENCE:
            self._step_id = self._network.last_token(self.step_token)

    def score(self, texts: list[str]) -> list[float]:
        rows = self._network.encode(self.reads(texts))
        if self._network.kind != _SEQUENCE:
            for i, row in enumerate(rows):
                if self._step_id not in row:
                    raise ValueError(f"HFReward: no step_token={self.step_token!r} in tokens {short(row)}")
                rows[i] = row[: len(row) - row[::-1].index(self._step_id)]  # what stands behind it is not read
        return self._network.probabilities(rows, self._answers)[:, self._at].tolist()
