"""`Judge`: what the model itself answers to a question about what it has written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State
from fastsmc.potentials.infill import encode
from fastsmc.potentials.tokens import short, token_list

_NAMES = ("question", "yes", "no")


class Judge(Potential):
    """φ = p0(yes) / (p0(yes) + p0(no)) after the prompt, the particle and a question, by the engine's own KV cache.

    The question itself is not scored, so settings of p0 may rule its tokens out, but those of the answers are p0's.
    Both answers cost a scoring pass each.

    Args:
        question: text (encoded without special tokens) or token ids that follow the particle; it may begin with what
            ends a turn in the model's template.
        yes, no: the answers, as the question; only their ratio counts, so they best have one token each.
        every_step: True makes the same the twist ψ of unfinished particles; each step then costs the two passes.

    Raises:
        ValueError: a part is empty or not of these types, or both answers are the same; in `setup`: an id is beyond the
            vocabulary. Where settings of p0 (top_k, allowed_token_ids, …) rule both answers out φ is NaN, which ends
            the group.
    """

    per_particle = ()

    def __init__(
        self,
        question: str | Sequence[int],
        yes: str | Sequence[int] = " Yes",
        no: str | Sequence[int] = " No",
        every_step: bool = False,
    ) -> None:
        if not isinstance(every_step, bool):
            raise ValueError(f"Judge: every_step={every_step!r}: must be True or False")
        self._every_step = every_step
        self._parts: dict[str, Any] = dict(zip(_NAMES, (question, yes, no), strict=True))
        for name, part in self._parts.items():
            if not isinstance(part, str):
                self._parts[name] = part = token_list(f"Judge: {name}", part)
            if not part:
                raise ValueError(f"Judge: {name}={short(part)}: is empty")
        if self._parts["yes"] == self._parts["no"]:
            raise ValueError(f"Judge: yes and no are both {short(self._parts['yes'])}")
        self._measure()

    @classmethod
    def tokenize_args(cls, args: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        wanted = {"yes": " Yes", "no": " No"} | args
        texts = {name: wanted[name] for name in _NAMES if wanted.get(name) and isinstance(wanted[name], str)}
        return {**args, **{name: encode(f"Judge: {name}", text, tokenizer) for name, text in texts.items()}}

    def prepare(self, tokenizer: Any) -> None:
        for name, part in self._parts.items():
            if isinstance(part, str):
                self._parts[name] = encode(f"Judge: {name}", part, tokenizer)
        self._measure()

    def _measure(self) -> None:
        """Says how many tokens are scored at most, once there are no texts."""
        if not any(isinstance(part, str) for part in self._parts.values()):
            question, yes, no = self._parts.values()
            self.lookahead = len(question) + max(len(yes), len(no))

    def setup(self, engine: Engine) -> None:
        self._engine = engine
        self.prepare(engine.tokenizer)
        for name, part in self._parts.items():
            token_list(f"Judge: {name}", part, engine.vocab_size)

    def _log_phi(self) -> Tensor:
        question, yes, no = self._parts.values()
        scores = torch.stack(
            [self._engine.continuation_log_prob([*question, *answer], given=len(question)) for answer in (yes, no)]
        )
        return scores[0] - scores.logsumexp(0)  # NaN where both are ruled out: a fault of that particle's group alone

    def prefix(self, state: State) -> Tensor:
        return self._log_phi() if self._every_step and state.step > 0 else super().prefix(state)

    def complete(self, state: State) -> Tensor:
        return self._log_phi()
