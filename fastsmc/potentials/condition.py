"""`Condition`: a Python function that says yes or no of a text, asked for single tokens by the rejection proposal."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc.potentials.base import Engine, Potential, State, parts
from fastsmc.potentials.product import Final
from fastsmc.potentials.tokens import log_of, short, text_ids, tokenizer_of
from fastsmc.texts import strip_partial, texts_after
from fastsmc.values import check_choice, check_int

#: what a `Condition` is of: texts, or token ids
KINDS = ("text", "tokens")


class Condition(Potential):
    """φ = 1 where a function says yes, else 0: any check of a text that can also be made of its beginnings.

    The function is asked about beginnings: whether each may still become a whole that `complete` accepts. Yes where it
    cannot tell is right, and costs particles; no where a whole could still come changes the target. With
    `SMCParams(proposal="rejection")` it is asked about one candidate token after the other, those of all particles of a
    group in one call, until each particle has found a token that is allowed, or is given up by chance; with the base
    proposal about the token that was drawn; in a product with the twisted proposal about wholes only.

    A text is what the tokens add to the prompt's, without the stop token that they end with. Of a beginning, bytes at
    its end that are no whole character yet are left out; of a whole, they are U+FFFD. Special tokens other than stop
    tokens, and ids that the tokenizer does not know, are never allowed. Token ids are lists of int, without the stop
    token. Answers are kept for the length of two steps: no text is asked twice in that time, whoever has it.

    Args:
        function: list of str (or of lists of int) → as many bool, of beginnings: a list, a NumPy array or a tensor.
            With `batch=False` a single one → bool.
        complete: the same of whole sequences; None: `function`.
        batch: whether the functions take lists.
        on: 'text' or 'tokens'.
        max_asked: at least 2; a particle that has found no allowed token after max_asked − 1 candidates of a step gets
            weight zero (the last question is for its weight). log Ẑ is then too low on average, and
            `Population.biased` says so. None: it goes on, to the last token if it must, unless it is given up, which is
            unbiased (`fastsmc.smc.rejection`).

    Attributes:
        n_asked, n_calls: texts that the functions were asked about, and calls, by this copy's group.

    Raises:
        ValueError: naming the argument, or a function that answers with something else.
    """

    shared_by_groups = ("_text_ids",)

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        complete: Callable[..., Any] | None = None,
        batch: bool = True,
        on: str = "text",
        max_asked: int | None = None,
    ) -> None:
        for name, value in (("function", function), ("complete", function if complete is None else complete)):
            if not callable(value):
                raise ValueError(f"{name}={value!r}: must be callable")
        if not isinstance(batch, bool):
            raise ValueError(f"batch={batch!r}: must be True or False")
        check_choice("on", on, KINDS)
        self.functions = [function] if complete is None else [function, complete]
        self.batch, self.on = batch, on
        self.max_asked = None if max_asked is None else check_int("max_asked", max_asked, 2)
        self.reset(0, [])

    def setup(self, engine: Engine) -> None:
        if self.on == "text":
            self._tokenizer = tokenizer_of(engine, "Condition")
            self._text_ids = text_ids(self._tokenizer)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self.n_asked = self.n_calls = 0
        self._length = 0  # of the sequences that were asked about last
        self._known: dict[Any, bool] = {}  # answers about those of this length, by function and text
        self._earlier: dict[Any, bool] = {}  # of the length before

    def prefix(self, state: State) -> Tensor:
        return self._scores(state, ~state.finished, False)

    def complete(self, state: State) -> Tensor:
        drew = state.finished if state.last_tokens is None else state.last_tokens >= 0
        return self._scores(state, state.finished & drew, True)  # the others were asked about when they ended

    def _scores(self, state: State, about: Tensor, whole: bool) -> Tensor:
        rows = torch.nonzero(about).squeeze(1)
        sequences = [[v for v in row if v >= 0] for row in state.tokens[rows].tolist()]
        ok = torch.ones_like(about)
        ok[rows] = self._answers(state, sequences, [whole] * len(sequences), state.step).to(ok.device)
        return log_of(ok)

    def allows(self, state: State, particles: Tensor, tokens: Tensor) -> Tensor:
        histories, candidates = state.tokens[particles].tolist(), tokens.tolist()
        sequences = [[v for v in (*row, token) if v >= 0] for row, token in zip(histories, candidates, strict=True)]
        last = (state.lengths[particles] + 1 >= state.max_tokens).tolist()
        ends = [end or token in state.stop_token_ids for end, token in zip(last, candidates, strict=True)]
        return self._answers(state, sequences, ends, state.step + 1).to(tokens.device)

    def _answers(self, state: State, sequences: list[list[int]], wholes: list[bool], length: int) -> Tensor:
        """Asks about sequences of `length` tokens, beginnings or wholes: (K,) bool, on the CPU."""
        if length != self._length:
            self._length, self._earlier, self._known = length, self._known, {}
        bodies = [ids[:-1] if ids and ids[-1] in state.stop_token_ids else ids for ids in sequences]
        if self.on == "text":
            texts: Sequence[Any] = texts_after(self._tokenizer, state.prompt, bodies)
            texts = [text if whole else strip_partial(text) for text, whole in zip(texts, wholes, strict=True)]
        else:
            texts = [tuple(ids) for ids in bodies]
        which = [len(self.functions) - 1 if whole else 0 for whole in wholes]
        keys: list[Any] = list(zip(which, texts, strict=True))
        if self.on == "text":
            keys = [key if self._text_ids.issuperset(ids) else None for key, ids in zip(keys, bodies, strict=True)]
        self._known |= {key: self._earlier[key] for key in keys if key in self._earlier and key not in self._known}
        for i, function in enumerate(self.functions):
            new = [key for key in dict.fromkeys(keys) if key and key[0] == i and key not in self._known]
            if new:
                told = self._ask(function, [text if self.on == "text" else list(text) for _, text in new])
                self._known.update(zip(new, told, strict=True))
        return torch.tensor([key is not None and self._known[key] for key in keys], dtype=torch.bool)

    def _ask(self, function: Callable[..., Any], texts: list[Any]) -> list[bool]:
        """Calls a function, and reads its answers."""
        name = getattr(function, "__name__", type(function).__name__)
        self.n_asked += len(texts)
        self.n_calls += 1 if self.batch else len(texts)
        try:
            answers = function(texts) if self.batch else [function(text) for text in texts]
        except Exception as error:
            raise RuntimeError(f"condition {name!r} raised {type(error).__name__}: {error}") from error
        listed: Any = answers
        if getattr(answers, "ndim", 0) == 1:
            listed = answers.tolist()  # type: ignore[union-attr]  # an array
        if not isinstance(listed, (list, tuple)):
            raise ValueError(f"condition {name!r} gave {short(answers)}: must be a list of bool, one per text")
        told = [value.item() if getattr(value, "ndim", 1) == 0 else value for value in listed]  # scalars of arrays
        for value in told:
            if not isinstance(value, bool):
                raise ValueError(f"condition {name!r} gave {short(value)}, a {type(value).__name__}: must be bool")
        if len(told) != len(texts):
            raise ValueError(f"condition {name!r} gave {len(told)} answers for {len(texts)} texts")
        return told


def conditions(potential: Potential) -> list[Potential]:
    """Lists the potentials, of those that this one is made of, that the rejection proposal asks for tokens."""
    if isinstance(potential, Final):  # has no ψ
        return []
    if type(potential).allows is not Potential.allows:
        return [potential]
    return [found for part in parts(potential) for found in conditions(part)]


def no_condition(potential: Potential | None) -> str:
    """Says why the rejection proposal refuses a potential that has no conditions."""
    what = "there is no potential" if potential is None else f"{type(potential).__name__} is asked for no tokens"
    return f"proposal='rejection': {what}; it needs a potential with `allows`, such as Condition"


def most_asked(potential: Potential) -> float:
    """Says how many candidates a particle is asked about per step at most, by all its conditions; inf: no limit."""
    limits = [found.max_asked for found in conditions(potential)]
    return min((limit for limit in limits if limit is not None), default=math.inf)


def questions(potential: Potential) -> dict[str, int] | None:
    """Counts what the conditions in a potential were asked, and the calls of their functions, 0 for those of other
    classes; None: there are none."""
    held = [potential]
    for each in held:
        held += parts(each)
    counted = [each for each in held if isinstance(each, Condition)]
    if not counted and not conditions(potential):
        return None
    return {"asked": sum(each.n_asked for each in counted), "calls": sum(each.n_calls for each in counted)}
