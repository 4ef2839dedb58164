"""`RewardModel`: scores of reasoning steps as a potential.

    state → histories that have grown since they were scored → texts → score, once per distinct text → log ψ

In a group with segments the texts are scored when all unfinished particles have ended theirs, else when particles end.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State
from fastsmc.potentials.text import read_floats
from fastsmc.potentials.tokens import short, tokenizer_of
from fastsmc.potentials.waiting import in_background
from fastsmc.texts import decode, strip_partial, texts_after
from fastsmc.values import check_choice, check_int

#: how the scores of a particle's segments become one number, with what that is before the first
AGGREGATES = {"last": 0.0, "product": 0.0, "min": torch.inf}
SCALES = ("log", "logit")
#: what a reward model scores: texts, or token ids
KINDS = ("text", "tokens")
#: how far from 0 and 1 the scale "logit" keeps a score, as its_hub does
MARGIN = 1e-7
_FIELD = re.compile(r"(\{prompt\}|\{text\})")


class RewardModel(Potential):
    """Weighs particles with scores of what they have written so far. Override `score`.

    With r_j the score of the text up to the end of a particle's segment j, and f(r) = log r (scale "log") or
    f(r) = log r' − log(1 − r') of r' = r clipped to [1e-7, 1 − 1e-7] ("logit"), log ψ after k segments is

        "last"      f(r_k)
        "product"   Σ_j≤k f(r_j)
        "min"       min_j≤k f(r_j)

    and 0 before the first; log φ is that of all segments. What a particle has drawn when it ends in the middle of a
    segment is its last one. The logit of a score with "product", resampled at every boundary with multinomial
    resampling, is the particle filter of its_hub.

    In a product with factors that have `logw_next` these shape the draws, and the product is weighed at boundaries; it
    is then `proposal_only`. Where only wholes are asked about, as in `Final` and beside most learned twists, a whole is
    one segment.

    In a group without segments nothing is scored before particles end, and a whole text is one segment: with
    `SMCParams(segment=…)` it guides.

    A text is what the tokens add to the prompt's, without the stop token that they end with, and without bytes at its
    end that are no whole character where more may come. Each distinct one is scored once per boundary: `score` must be
    a function of it. While `score` runs, `self.prompt` is the list of the prompt's token ids.

    Args:
        aggregate: "last", "product" or "min".
        scale: "log": scores are at least 0; "logit": they are in [0, 1].
        on: "text", or "tokens": `score` is then asked with lists of token ids, without the stop token.

    Raises:
        ValueError: naming the argument; or a score that is NaN, infinite or not allowed on this scale, or a wrong
            number of them, naming the class, the value and what is allowed.
    """

    needs_prefix = True
    #: `score` takes a while, and may run in a thread: its group is parked meanwhile, and other groups go on. One call
    #: per group at a time, of several groups at the same time
    in_background: bool = False
    aggregate: str = "last"
    scale: str = "log"
    on: str = "text"

    def __init__(self, *, aggregate: str = "last", scale: str = "log", on: str = "text") -> None:
        check_choice("aggregate", aggregate, AGGREGATES)
        check_choice("scale", scale, SCALES)
        check_choice("on", on, KINDS)
        self.aggregate, self.scale, self.on = aggregate, scale, on

    def score(self, texts: list[Any]) -> Any:
        """Returns M numbers, a sequence or an array, the scores of M distinct texts (or lists of token ids)."""
        raise NotImplementedError

    def score_until(self, texts: list[Any], cancelled: Callable[[], bool]) -> Any:
        """Scores as `score` does; override it where what takes long can be left when `cancelled` says so."""
        return self.score(texts)

    def source(self) -> str:
        """Says where scores come from, for errors."""
        return f"{type(self).__name__}.score"

    def setup(self, engine: Engine) -> None:
        name = type(self).__name__
        if type(self).score is RewardModel.score and type(self).score_until is RewardModel.score_until:
            raise ValueError(f"{name}: must define score")
        if self.on == "text":
            self._tokenizer = tokenizer_of(engine, name)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self.prompt = list(prompt)
        self._value = torch.full((n_particles,), AGGREGATES[self.aggregate], dtype=torch.float64)
        self._scored = torch.zeros(n_particles, dtype=torch.int64)  # tokens that a particle had when it was scored last
        self._known: dict[Any, float] = {}  # scores of this step
        self._step = 0

    def reindex(self, ancestors: Tensor) -> None:
        ancestors = ancestors.cpu()
        self._value, self._scored = self._value[ancestors], self._scored[ancestors]

    def fetch(self, state: State, about: Tensor) -> Future[None] | None:
        if not self.in_background:
            return None
        new, known = self._unknown(self._asked(state, about)[1]), self._known
        if not new:
            return None

        def find(future: Future[None]) -> None:
            scores = self._scores(new, future.cancelled)
            if not future.cancelled():
                known.update(zip(new, scores, strict=True))

        return in_background(find)

    def prefix(self, state: State) -> Tensor:
        return super().prefix(state) if state.segments is None else self._log_psi(state, ~state.finished)

    def complete(self, state: State) -> Tensor:
        return self._log_psi(state, state.finished)

    def _log_psi(self, state: State, about: Tensor) -> Tensor:
        """Scores what has grown of the particles `about` (N,) bool; returns (N,) log ψ of all."""
        rows, texts = self._asked(state, about)
        if len(rows):
            new = self._unknown(texts)
            self._known.update(zip(new, self._scores(new, lambda: False), strict=True))
            values = log_scores(torch.tensor([self._known[text] for text in texts], dtype=torch.float64), self.scale)
            if self.aggregate == "product":
                values = self._value[rows] + values
            elif self.aggregate == "min":
                values = torch.minimum(self._value[rows], values)
            self._value[rows], self._scored[rows] = values, state.lengths.cpu()[rows]
        return self._value.where(self._scored > 0, 0.0).to(state.finished.device)

    def _asked(self, state: State, about: Tensor) -> tuple[Tensor, list[Any]]:
        """Returns which of the particles `about` have grown since they were scored, and what each has written."""
        if int(state.step) != self._step:
            self._step, self._known = int(state.step), {}
        if state.segments is None:
            about = about & state.finished
        rows = torch.nonzero(about.cpu() & (state.lengths.cpu() > self._scored)).flatten()
        sequences = [[v for v in row if v >= 0] for row in state.tokens[rows.to(state.tokens.device)].tolist()]
        bodies = [ids[:-1] if ids[-1] in state.stop_token_ids else ids for ids in sequences]
        if self.on == "tokens":
            return rows, [tuple(ids) for ids in bodies]
        ended = state.finished.cpu()[rows].tolist()
        texts = texts_after(self._tokenizer, state.prompt, bodies)
        return rows, [text if end else strip_partial(text) for text, end in zip(texts, ended, strict=True)]

    def _unknown(self, texts: list[Any]) -> list[Any]:
        return [text for text in dict.fromkeys(texts) if text not in self._known]

    def _scores(self, texts: list[Any], cancelled: Callable[[], bool]) -> list[float]:
        """Has texts scored, and checks the answer."""
        if not texts:
            return []
        who, logit = self.source(), self.scale == "logit"
        asked = texts if self.on == "text" else [list(ids) for ids in texts]
        allowed = "numbers in [0, 1]" if logit else "finite numbers of at least 0"
        with torch.no_grad():  # a thread knows nothing of the engine's inference mode
            answer = self.score_until(asked, cancelled)
        scores = read_floats(who, answer, allowed)
        if len(scores) != len(texts):
            raise ValueError(f"{who} gave {len(scores)} values for {len(texts)} {self.on}: must be one for each")
        for text, value in zip(asked, scores, strict=True):
            if not (0 <= value <= 1 if logit else 0 <= value < torch.inf):
                raise ValueError(f"{who} gave {value} for {short(text)}: must be {allowed}, scale={self.scale!r}")
        return scores


def log_scores(scores: Tensor, scale: str) -> Tensor:
    """Returns f(r) of scores r (M,) float64, as `RewardModel` defines it."""
    if scale == "log":
        return scores.log()
    clipped = scores.clamp(MARGIN, 1 - MARGIN)
    return clipped.log() - (-clipped).log1p()


class NetworkReward(RewardModel):
    """Is the base of rewards by a network: what that reads, and which of its labels' probabilities is the score.

    Args:
        template: what the network reads, with {prompt} (the prompt's text without special tokens) and {text}. Special
            tokens of the network's tokenizer may stand in it.
        step: text that ends a step in what is read, such as a blank line; None: the text is a single step.
        step_token: text that a process reward model reads behind each step, and behind whose last one the score stands.
        step_join: text between two steps; None: `step_token`, which then takes the place of `step`.
        label: index of the label, 0 where there is a single one; None: 1 of two labels.
        aggregate, scale: as of `RewardModel`.

    Raises:
        ValueError: naming the argument.
    """

    def __init__(
        self,
        *,
        template: str = "{prompt}{text}",
        step: str | None = None,
        step_token: str | None = None,
        step_join: str | None = None,
        label: int | None = None,
        aggregate: str = "last",
        scale: str = "log",
    ) -> None:
        super().__init__(aggregate=aggregate, scale=scale)
        if not isinstance(template, str) or "{text}" not in template:
            raise ValueError(f"template={template!r}: must be text with {{text}} in it")
        for name, value in (("step", step), ("step_token", step_token), ("step_join", step_join)):
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name}={value!r}: must be text, or None")
        if step_token is None and (step, step_join) != (None, None):
            raise ValueError(f"step={step!r}, step_join={step_join!r}: only with a step_token")
        self.template, self.step, self.step_token = template, step, step_token
        self.step_join = step_token if step_join is None else step_join
        self.label = None if label is None else check_int("label", label, 0)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        super().reset(n_particles, prompt)
        [self._prompt_text] = decode(self._tokenizer, [self.prompt])

    def reads(self, texts: list[str]) -> list[str]:
        """Writes what the network reads of each text."""
        if self.step_token is not None:
            parts = [[text] if self.step is None else text.split(self.step) for text in texts]
            steps = [[part for part in each if part.strip()] for each in parts]
            assert self.step_join is not None  # it is the token where nobody gave it
            texts = [self.step_join.join(each) + self.step_token for each in steps]
        pieces = _FIELD.split(self.template)  # what stands between the fields, and the fields
        fields = [{"{prompt}": self._prompt_text, "{text}": text} for text in texts]
        return ["".join(each.get(piece, piece) for piece in pieces) for each in fields]

    def choose(self, n_labels: int) -> int:
        """Says which of the labels is the score's."""
        name = type(self).__name__
        if self.label is None and n_labels > 2:
            raise ValueError(f"{name}: label=None: must name one of the {n_labels} labels that the model has")
        chosen = min(n_labels - 1, 1) if self.label is None else self.label
        if chosen >= n_labels:
            raise ValueError(f"{name}: label={chosen}: must be below {n_labels}, the labels that the model has")
        return chosen
