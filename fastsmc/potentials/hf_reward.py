"""`HFReward`: a reward model of transformers in the engine's own process (fastsmc/reward_networks.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastsmc.potentials.base import Engine
from fastsmc.potentials.reward import NetworkReward
from fastsmc.potentials.tokens import short

if TYPE_CHECKING:
    from fastsmc.reward_networks import Network


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
        name, is_lm = type(self._network.model).__name__, self._network.is_lm
        if (self.good is not None) != is_lm:
            raise ValueError(f"HFReward: good={self.good!r}: {name} {'needs' if is_lm else 'has no'} good and bad")
        if self.step_token is None and self._network.is_stepwise:
            raise ValueError(f"HFReward: step_token=None: {name} is read at a step token")
        self._answers = None
        if self.good is not None and self.bad is not None:
            self._answers = [self._network.only_token("good", self.good), self._network.only_token("bad", self.bad)]
        self._at = 0 if self._answers else self.choose(self._network.n_labels)
        if self.step_token is not None and self._network.is_stepwise:
            self._step_id = self._network.last_token(self.step_token)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_network"}  # which setup finds

    def score(self, texts: list[str]) -> list[float]:
        rows = self._network.encode(self.reads(texts))
        if self._network.is_stepwise:
            for i, row in enumerate(rows):
                if self._step_id not in row:
                    raise ValueError(f"HFReward: no step_token={self.step_token!r} in tokens {short(row)}")
                rows[i] = row[: len(row) - row[::-1].index(self._step_id)]  # what stands behind it is not read
        return self._network.probabilities(rows, self._answers)[:, self._at].tolist()
