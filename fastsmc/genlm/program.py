"""`smc`: a program of genlm-control, its own samplers and potentials, as one group request of a fastsmc engine."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from genlm.control import AWRS, PromptedLLM
from genlm.control import Potential as GenlmBase
from genlm.control.constant import EOS
from genlm.control.sampler.sequence import Sequences
from genlm.control.sampler.set import EagerSetSampler, TopKSetSampler
from genlm.control.sampler.token import DirectTokenSampler, SetTokenSampler
from torch import Tensor

from fastsmc.genlm.automata import GenlmAutomaton, just_ended
from fastsmc.genlm.lm import FastsmcLM
from fastsmc.genlm.potentials import (
    ADVICE,
    GenlmPotential,
    Translated,
    WeightedAutomaton,
    distinct_histories,
    factors,
    translated,
)
from fastsmc.genlm.record import make_record
from fastsmc.genlm.vocabulary import Vocabulary
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Engine, Masked, Potential, Product, Rows, State
from fastsmc.potentials.base import parts
from fastsmc.vllm.llm import LLM


class Program(Potential):
    """Is the target of a program: factors beside the language model, a condition, and a critic.

    Args:
        factors: of the sampler's target; tokens are drawn from p0 times these.
        conditions: none, or that of rejection.
        critics: factors of what weighs what was drawn.
        critic_twists: whether it says something of beginnings, too.
        n_tokens: that genlm knows; a model may have more columns than its tokenizer.
    """

    made_of = ("factors", "conditions", "critics")

    def __init__(
        self,
        factors: tuple[Translated, ...],
        conditions: tuple[BooleanCondition, ...],
        critics: tuple[Translated, ...],
        critic_twists: bool,
        n_tokens: int,
    ) -> None:
        self.factors, self.conditions, self.critics = factors, conditions, critics
        self.critic_twists, self.n_tokens = critic_twists, n_tokens
        self.proposal_only = critic_twists and bool(factors)  # the proposal knows nothing of the critic

    def setup(self, engine: Engine) -> None:
        for each in parts(self):
            each.setup(engine)

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        for each in parts(self):
            each.reset(n_particles, prompt)

    def reindex(self, ancestors: Tensor) -> None:
        for each in parts(self):
            each.reindex(ancestors)

    def prefix(self, state: State) -> Tensor:
        twists = (*self.factors, *self.conditions, *(self.critics if self.critic_twists else ()))
        return self._known(state) + sum(each.scores(state, ~state.finished, "prefix") for each in twists)

    def complete(self, state: State) -> Tensor:
        targets, ended = (*self.factors, *self.conditions), just_ended(state)
        return self._judged(state) + sum(each.scores(state, ended, "complete") for each in targets)

    def _judged(self, state: State) -> Tensor:
        return self._known(state) + sum(each.scores(state, just_ended(state), "complete") for each in self.critics)

    def _known(self, state: State) -> Tensor:
        """Rules out tokens that genlm does not have."""
        unknown = (state.tokens >= self.n_tokens).any(1)
        return torch.zeros(len(unknown), dtype=torch.float64, device=unknown.device).masked_fill(unknown, -math.inf)

    def logw_next(self, state: State) -> Tensor | Rows | Masked | None:
        return Product(*self.factors).logw_next(state) if self.factors else None


class Ending(Program):
    """Is the target of a program that also ends texts.

    Args:
        terminate_when: context → bool; such a text ends there, under the critic's `complete` and the factors' `prefix`.
        vocabulary: genlm's tokens, by token id.
    """

    shared_by_groups = ("terminate_when", "vocabulary")

    def __init__(self, terminate_when: Callable[[list], bool], vocabulary: Vocabulary, *args: Any) -> None:
        super().__init__(*args)
        self.terminate_when, self.vocabulary = terminate_when, vocabulary

    def complete(self, state: State) -> Tensor:
        total, last = self._judged(state), state.lengths if state.last_tokens is None else state.last_tokens
        by_eos = torch.isin(last, torch.tensor(sorted(state.stop_token_ids), device=last.device))
        for each in (*self.factors, *self.conditions):
            total = total + each.scores(state, just_ended(state) & by_eos, "complete")
            total = total + each.scores(state, just_ended(state) & ~by_eos, "prefix")
        return total

    def stop(self, state: State) -> Tensor:
        histories, index = distinct_histories(state, ~state.finished)
        tokens = self.vocabulary.tokens
        known = [bool(ids) and max(ids) < len(tokens) for ids in histories]
        told = [
            ok and bool(self.terminate_when([tokens[v] for v in ids])) for ids, ok in zip(histories, known, strict=True)
        ]
        return torch.tensor([*told, False], device=index.device)[index]


class BooleanCondition(GenlmPotential):
    """Is the condition of a program that draws by rejection: says 0 or −inf, and is asked for single candidates."""

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._length, self._told = 0, dict[tuple[tuple[int, ...], str], float]()

    def allows(self, state: State, particles: Tensor, tokens: Tensor) -> Tensor:
        asked = []
        for row, token in zip(state.tokens[particles].tolist(), tokens.tolist(), strict=True):
            ended = token in state.stop_token_ids
            ids = tuple(v for v in row if v >= 0)
            asked.append((ids if ended else (*ids, token), "complete" if ended else "prefix"))
        return torch.tensor([told == 0.0 for told in self._recall(asked, state.step + 1)], device=tokens.device)

    def scores(self, state: State, about: Tensor, method: str) -> Tensor:
        histories, index = distinct_histories(state, about)
        told = self._recall([(ids, method) for ids in histories], state.step)
        return torch.tensor([*told, 0.0], dtype=torch.float64, device=index.device)[index]

    def _recall(self, asked: list[tuple[tuple[int, ...], str]], length: int) -> list[float]:
        """Asks about what it has not been asked about at this length."""
        if length != self._length:
            self._length, self._told = length, {}
        for method in ("prefix", "complete"):
            new = [key for key in dict.fromkeys(asked) if key[1] == method and key not in self._told]
            answers = self.ask(method, [self.context(ids) for ids, _ in new]).tolist()
            for (ids, _), answer in zip(new, answers, strict=True):
                if answer not in (0.0, -math.inf):
                    raise ValueError(f"AWRS's condition says {answer} of token ids {list(ids)}; must be 0 or −inf")
            self._told.update(zip(new, answers, strict=True))
        return [self._told[key] for key in asked]


def smc(
    sampler: Any,
    critic: GenlmBase | None = None,
    *,
    n_particles: int,
    ess_threshold: float,
    max_tokens: int,
    resampling_method: str = "multinomial",
    terminate_when: Callable[[list], bool] | None = None,
    json_path: str | os.PathLike | None = None,
    seed: int = 0,
) -> Sequences:
    """Runs what `SMC(sampler, critic)(n_particles, ess_threshold, max_tokens, …)` runs, in the engine of its FastsmcLM.

    The target is the same, and log_ml an estimate of the same number. Draws are others: tokens of a product are drawn
    after the resampling where there is no critic (lower variance, mathematics.md §1), and rejection is fastsmc's own
    (conditions.md). Potentials travel to the engine's process, and are asked once per distinct history.

    Args:
        sampler: `direct_token_sampler(potential)` of a `PromptedLLM` or a product with one, `AWRS(potential,
            condition)`, or `eager_token_sampler` or `topk_token_sampler` of a potential and an automaton, instead of
            whose sets the product is drawn from. Other samplers, proposals, and AWRS with `max_rejects` or without
            proper weights are refused.
        critic: potential over the model's tokens.
        n_particles, ess_threshold: as of `SMCParams`.
        max_tokens: the EOS included, which is forced there.
        resampling_method: 'multinomial', 'stratified', 'systematic', 'residual' or 'ssp'.
        terminate_when: context of genlm's tokens → bool.
        json_path: file for a record of the run, as genlm-control's `InferenceVisualizer` shows it; None: none.
        seed: of `SMCParams`.

    Returns:
        genlm-control's `Sequences`: contexts that end in EOS, but those without weight; log_ml is log Ẑ.

    Raises:
        ValueError: what cannot be translated, by name; an argument that `SMCParams` refuses; no folder for
            the record.
        SMCError: a potential failed.
    """
    if json_path is not None and not Path(json_path).parent.is_dir():
        raise ValueError(f"json_path={json_path!r}: its folder must exist")
    llm, guides, conditions = _read_sampler(sampler)
    critics = [] if critic is None else translated(critic)
    twists = critic is not None and ess_threshold > 0 and not critic.is_terminal_only()
    tokens = llm.token_maps.decode
    arguments = (tuple(guides), tuple(conditions), tuple(critics), twists, len(tokens))
    program = Program(*arguments) if terminate_when is None else Ending(terminate_when, Vocabulary(tokens), *arguments)
    params = SMCParams(
        n_particles=n_particles,
        max_tokens=max_tokens,
        ess_threshold=ess_threshold,
        resampling=resampling_method,
        seed=seed,
        temperature=llm.temperature,
        ignore_eos=True,
        stop_token_ids=tuple(llm.token_maps.eos_idxs),
        force_stop=True,
        proposal="rejection" if conditions else "twisted" if guides else "base",
    )
    population = llm.model.llm.smc({"prompt_token_ids": list(llm.prompt_ids)}, params, program)
    assert isinstance(population, Population)  # of one prompt
    stops = set(llm.token_maps.eos_idxs)
    if json_path is not None:
        twisted = params.proposal == "twisted" and not program.proposal_only
        Path(json_path).write_text(json.dumps(make_record(population, tokens, stops, terminate_when, twisted)))
    return _sequences(population, tokens, stops)


def _sequences(population: Population, tokens: list[Any], stops: set[int]) -> Sequences:
    """Makes genlm-control's `Sequences` of a population."""
    contexts = []
    for ids, reason in zip(population.token_ids, population.finish_reasons or (), strict=True):
        context: list[Any] = [tokens[v] for v in ids if v not in stops and v < len(tokens)]
        contexts.append(context if reason == "dead" else [*context, EOS])
    with np.errstate(divide="ignore"):
        weights = population.log_z + np.log(population.weights * len(contexts))
    return Sequences(contexts, np.where(population.weights > 0, weights, -math.inf))


async def asmc(*args: Any, **settings: Any) -> Sequences:
    """Is `smc` for `await`. The event loop waits for the run, as for all calls of the engine."""
    return smc(*args, **settings)


def _read_sampler(sampler: Any) -> tuple[PromptedLLM, list[Translated], list[BooleanCondition]]:
    """Takes a sampler apart: the language model, what its rows are multiplied with, and a condition.

    A condition that is compiled is a factor: its rows cost nothing, and drawing from the product is what rejection
    approaches, of the same target.

    Raises:
        ValueError: it is none that `smc` translates.
    """
    more: list[Translated] = []  # factors
    asked: list[BooleanCondition] = []
    if type(sampler) is DirectTokenSampler:
        of = sampler.potential
        if sampler.proposal is not None:
            raise ValueError(f"sampler={sampler!r}: draws from another proposal; {ADVICE}")
    elif type(sampler) is AWRS:
        if sampler.proposal is not None or not sampler.proper_weights or sampler.max_rejects != math.inf:
            raise ValueError(
                f"sampler={sampler!r}: has a proposal, max_rejects or proper_weights=False, which fastsmc's rejection "
                f"does not; {ADVICE}"
            )
        of = sampler.potential
        for each in translated(sampler.condition):
            if isinstance(each, GenlmAutomaton):
                more.append(each)
            else:
                asked.append(BooleanCondition(each.of))
    elif type(sampler) is SetTokenSampler and type(sampler.set_sampler) in (EagerSetSampler, TopKSetSampler):
        of, items = sampler.set_sampler.iter_potential, sampler.set_sampler.item_potential
        more = translated(items.coerce(of, f=b"".join))  # draws from the product, whose target is that of its sets
        if not all(isinstance(each, (GenlmAutomaton, WeightedAutomaton)) for each in more):
            raise ValueError(f"sampler={sampler!r}: its sets are of {items!r}, which is not compiled; {ADVICE}")
    else:
        raise ValueError(
            f"sampler={sampler!r}: must be direct_token_sampler(…), AWRS(…) or a set sampler of an automaton; {ADVICE}"
        )
    held = factors(of)
    models = [part for part in held if type(part) is PromptedLLM]  # a subclass may have other rows
    if len(models) != 1:
        raise ValueError(f"sampler={sampler!r}: has {len(models)} PromptedLLM in its product; must be one; {ADVICE}")
    (llm,) = models
    if not isinstance(llm.model, FastsmcLM):
        raise ValueError(f"sampler={sampler!r}: runs over {type(llm.model).__name__}; must be FastsmcLM")
    if not isinstance(llm.model.llm, LLM):
        raise ValueError(f"sampler={sampler!r}: runs over an AsyncLLM; a group needs a fastsmc.LLM; {ADVICE}")
    if llm.lora_name is not None:
        raise ValueError(
            f"sampler={sampler!r}: its PromptedLLM has lora_name={llm.lora_name!r}; rows are the base model's"
        )
    return llm, [each for part in held if part is not llm for each in translated(part)] + more, asked
