"""Causal models and pairs of their inputs, with the labels that interchange interventions ask a language model for.

sampler → base, source (inputs) → interchange of a variable → counterfactual output → prompts and a label per pair
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fastsmc.potentials.tokens import short
from fastsmc.values import as_int, check_int

Inputs = Mapping[str, Any]
Sampler = Callable[[np.random.Generator], Inputs]

#: draws that show which labels there are; and so many more per pair, before a label is held to be too rare
EXPLORED, DRAWS_PER_PAIR = 1000, 100


class CausalModel:
    """Computes variables from inputs, and under interchange interventions.

    Args:
        variables: names, each after its parents; those without a function are inputs, the last is the output.
        functions: computes a variable, by name; the names of its parameters are the variable's parents.
        prompt: says inputs to a language model: inputs → text or token ids; None: inputs stand for themselves.
        answers: says output values to a language model: value → token id, or text of a single token, as a mapping or a
            callable; None: values stand for themselves.

    Attributes:
        inputs: names of the inputs.
        output: name of the output.

    Raises:
        ValueError: naming the variable or the function, and what is wrong with it.
    """

    def __init__(
        self,
        variables: Sequence[str],
        functions: Mapping[str, Callable[..., Any]],
        *,
        prompt: Callable[[Inputs], Any] | None = None,
        answers: Mapping[Any, Any] | Callable[[Any], Any] | None = None,
    ) -> None:
        self.variables = _names("variables", variables)
        if unknown := [name for name in functions if name not in self.variables]:
            raise ValueError(f"functions[{unknown[0]!r}]: is none of variables={list(self.variables)}")
        self.output = self.variables[-1]
        if self.output not in functions:
            raise ValueError(f"variables: the last, {self.output!r}, is the output and must have a function")
        if prompt is not None and not callable(prompt):
            raise ValueError(f"prompt={short(prompt)}: must be a callable: inputs → text or token ids")
        if answers is not None and not isinstance(answers, Mapping) and not callable(answers):
            raise ValueError(
                f"answers={short(answers)}: must be a mapping or a callable: output value → token id or text"
            )
        self.functions, self.prompt, self.answers = dict(functions), prompt, answers
        self.inputs = tuple(name for name in self.variables if name not in functions)
        self.parents = {name: self._parents(name) for name in self.variables if name in functions}

    def _parents(self, name: str) -> tuple[str, ...]:
        try:
            parameters = inspect.signature(self.functions[name]).parameters.values()
        except (TypeError, ValueError) as error:  # no callable; one in C that does not say its parameters
            raise ValueError(f"functions[{name!r}]: must be a callable with named parameters: {error}") from None
        before = self.variables[: self.variables.index(name)]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
                raise ValueError(f"functions[{name!r}]: parameter {parameter} must be the name of a variable")
            if parameter.name not in before:
                raise ValueError(
                    f"functions[{name!r}]: parameter {parameter.name!r} must be a variable before it, one of "
                    f"{list(before)}"
                )
        return tuple(parameter.name for parameter in parameters)

    def run(self, inputs: Inputs) -> dict[str, Any]:
        """Computes all variables."""
        return self._compute(inputs, {})

    def interchange(self, base: Inputs, source: Inputs, variable: str | Sequence[str]) -> dict[str, Any]:
        """Computes all variables of `base`, with a variable, or several, set to what it is in `source`."""
        names, there = self.read_variable(variable), self.run(source)
        return self._compute(base, {name: there[name] for name in names})

    def _compute(self, inputs: Inputs, fixed: Mapping[str, Any]) -> dict[str, Any]:
        if not isinstance(inputs, Mapping) or len(inputs) != len(self.inputs) or set(inputs) != set(self.inputs):
            raise ValueError(f"inputs={short(inputs)}: must be a dict with the keys {list(self.inputs)}")
        out: dict[str, Any] = {}
        for name in self.variables:
            if name in fixed:
                out[name] = fixed[name]
            elif name in self.parents:
                out[name] = self.functions[name](**{parent: out[parent] for parent in self.parents[name]})
            else:
                out[name] = inputs[name]
        return out

    def read_variable(self, variable: str | Sequence[str]) -> tuple[str, ...]:
        """Reads a name or several names of variables. ValueError: there is no such variable."""
        names = _names("variable", [variable] if isinstance(variable, str) else variable)
        for name in names:
            if name not in self.variables:
                raise ValueError(f"variable={name!r}: must be one of {list(self.variables)}")
        return names

    def say(self, inputs: Inputs) -> Any:
        """Gives the prompt of inputs; the inputs themselves where there is no `prompt`."""
        return dict(inputs) if self.prompt is None else self.prompt(inputs)

    def answer(self, value: Any) -> Any:
        """Gives the answer for an output value; NumPy's and torch's scalars are Python's here.

        ValueError: `answers` has none, it is no token id or text, or the value is none that is equal to another.
        """
        if callable(getattr(value, "item", None)) and not getattr(value, "shape", ()):
            value = value.item()
        if callable(self.answers):
            found = self.answers(value)
        elif getattr(value, "shape", ()) or not isinstance(value, Hashable) or value != value:
            raise ValueError(
                f"{self.output}={short(value)}: without a callable as answers, an output must be hashable and no NaN"
            )
        elif self.answers is None:
            return value
        elif value in self.answers:
            found = self.answers[value]
        else:
            raise ValueError(f"answers: has none for the output {value!r}; has {short(list(self.answers))}")
        if isinstance(found, str) or (number := as_int(found)) is None:
            if not isinstance(found, str) or not found:
                raise ValueError(f"answers: for the output {value!r} it has {found!r}; must be a token id or a text")
            return found
        return number


def _names(what: str, names: Iterable[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ValueError(f"{what}={names!r}: must be a list of names")
    out = tuple(names)
    if not out or not all(isinstance(name, str) and name for name in out) or len(set(out)) < len(out):
        raise ValueError(f"{what}={short(list(out))}: must be a list of at least one name, each once")
    return out


@dataclasses.dataclass
class Pairs:
    """Holds pairs of a base and a source, and what the causal model answers where the base has the source's variable.

    Attributes:
        base_inputs, source_inputs: of the causal model.
        bases, sources: their prompts.
        labels: the answers under the interchange.
        base_labels, source_labels: the answers of base and source by themselves.
        choices: all answers there are.
        variable: names of what is interchanged.
    """

    base_inputs: list[dict[str, Any]]
    source_inputs: list[dict[str, Any]]
    bases: list[Any]
    sources: list[Any]
    labels: list[Any]
    base_labels: list[Any]
    source_labels: list[Any]
    choices: list[Any]
    variable: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def changed(self) -> float:
        """Gives the share of pairs whose label the interchange changes."""
        return sum(a != b for a, b in zip(self.labels, self.base_labels, strict=True)) / len(self)

    def check_changed(self) -> None:
        """Refuses pairs on which nothing can be measured. ValueError: the interchange changes no label."""
        if not self.changed:
            raise ValueError(
                f"pairs: none of {len(self)} labels is changed by the interchange, so IIA would be meaningless"
            )


def answer_ids(answers: Sequence[Any], tokenizer: Any, vocab_size: int) -> list[int]:
    """Reads answers, token ids or texts of a single token, as token ids.

    Args:
        tokenizer: encodes text, without special tokens; None: text is refused.

    Raises:
        ValueError: naming an answer that is no token of the vocabulary.
    """
    known: dict[Any, int] = {}
    for answer in answers:
        if answer not in known:
            known[answer] = _answer_id(answer, tokenizer, vocab_size)
    return [known[answer] for answer in answers]


def _answer_id(answer: Any, tokenizer: Any, vocab_size: int) -> int:
    if not isinstance(answer, str):
        return check_int("label", answer, 0, vocab_size - 1)
    if tokenizer is None:
        raise ValueError(f"label={answer!r}: there is no tokenizer; give token ids as answers")
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1:
        raise ValueError(f"label={answer!r}: is {len(ids)} tokens; must be a single one (mind a leading space)")
    return ids[0]


# -- drawing pairs -----------------------------------------------------------------------------------------------------
class _Draws:
    """Draws pairs and sorts them by their label and whether the interchange changes it."""

    def __init__(self, model: CausalModel, sampler: Sampler, variable: tuple[str, ...], seed: int) -> None:
        self.model, self.sampler, self.variable = model, sampler, variable
        self.random = np.random.default_rng(seed)
        self.cells: dict[
            Any, tuple[list[tuple], list[tuple]]
        ] = {}  # by label: those that keep it, those that change it
        self.seen: dict[Any, None] = {}
        self.n = 0

    def _sample(self) -> dict[str, Any]:
        inputs = self.sampler(self.random)
        if not isinstance(inputs, Mapping):
            raise ValueError(f"sampler: gives {short(inputs)}; must give a dict with keys {list(self.model.inputs)}")
        return copy.deepcopy(dict(inputs))  # a sampler may give the same object again, with something else in it

    def draw(self, most: int) -> None:
        """Draws a pair, and keeps it unless there are as many of its sort as `most`."""
        model = self.model
        base, source = self._sample(), self._sample()
        outputs = model.run(base), model.run(source), model.interchange(base, source, self.variable)
        before, there, label = (model.answer(values[model.output]) for values in outputs)
        self.seen.update(dict.fromkeys((before, there, label)))
        kept = self.cells.setdefault(label, ([], []))[label != before]
        if len(kept) < most:
            kept.append((base, source, label, before, there))
        self.n += 1


def pairs(model: CausalModel, sampler: Sampler, variable: str | Sequence[str], n: int, seed: int = 0) -> Pairs:
    """Draws n pairs with every label as often, ±1, half of each changed by the interchange where draws allow.

    Args:
        model: the causal model; its `prompt` and `answers` say how pairs are put.
        sampler: draws inputs: NumPy Generator → dict.
        variable: name, or names, of what is interchanged.

    Raises:
        ValueError: no label ever changes, there is a single label, or one is too rare to be had so often.
    """
    n, names = check_int("n", n, 2), model.read_variable(variable)
    draws = _Draws(model, sampler, names, check_int("seed", seed, 0))
    for _ in range(max(EXPLORED, n)):
        draws.draw(n)
    labels = list(draws.cells)
    if not any(changing for _, changing in draws.cells.values()):
        raise ValueError(
            f"variable={variable!r}: in none of {draws.n} pairs does its interchange change the label, so IIA would be "
            "meaningless"
        )
    if len(labels) < 2:
        raise ValueError(f"variable={variable!r}: cannot be balanced, since every interchange gives {labels[0]!r}")
    shares = draws.random.permutation([n // len(labels) + (i < n % len(labels)) for i in range(len(labels))])
    wanted = dict(zip(labels, shares.tolist(), strict=True))
    halves = _halve(wanted, draws)
    while any(len(draws.cells[y][c]) < halves[y][c] for y in labels for c in (0, 1)):
        if draws.n >= EXPLORED + DRAWS_PER_PAIR * n:
            break
        draws.draw(n)
    chosen = [row for y in labels for row in _take(y, wanted[y], halves[y], draws)]
    rows = [chosen[i] for i in draws.random.permutation(n)]
    base, source, label, before, there = (list(column) for column in zip(*rows, strict=True))
    choices = draws.seen if not isinstance(model.answers, Mapping) else dict.fromkeys(map(model.answer, model.answers))
    return Pairs(
        base, source, [model.say(x) for x in base], [model.say(x) for x in source], label, before, there,
        list(choices), names,
    )  # fmt: skip


def _halve(wanted: Mapping[Any, int], draws: _Draws) -> dict[Any, tuple[int, int]]:
    """Splits the pairs of each label into those that keep it and those that change it; odd ones go by turns."""
    halves, turn = {}, 0
    for label, n in wanted.items():
        keeping, changing = draws.cells[label]
        if not keeping or not changing:
            halves[label] = (n, 0) if keeping else (0, n)
            continue
        odd = n % 2
        halves[label] = (n // 2 + odd * (1 - turn), n // 2 + odd * turn)
        turn = (turn + odd) % 2
    return halves


def _take(label: Any, n: int, halves: tuple[int, int], draws: _Draws) -> list[tuple]:
    """Takes n pairs of a label, the halves where there are enough of each."""
    keeping, changing = draws.cells[label]
    changes = max(min(halves[1], len(changing)), n - len(keeping))
    if changes > len(changing):
        raise ValueError(
            f"label {label!r}: cannot be balanced, since of {draws.n} pairs {len(keeping) + len(changing)} have it, "
            f"and {n} are wanted"
        )
    return keeping[: n - changes] + changing[:changes]
