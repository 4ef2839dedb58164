"""its_hub's particle filtering over a fastsmc engine: its users change one import.

    from fastsmc.its import ParticleFiltering, StepGeneration

    sg = StepGeneration(max_steps=8, step_token="\\n\\n", stop_token="\\\\boxed")      # or its_hub's
    result = ParticleFiltering(sg, prm).infer(llm, "What is 12 + 7 · 3?", budget=64, return_response_only=False)

`llm` is a `fastsmc.LLM`. Steps are segments of one group, so nothing is sent again; `result` also has the population,
with log Ẑ. Servers are not asked: they take `smc_segment` and a reward by its name. Without its_hub
installed all of this works; with it, results and algorithms are instances of its abstract classes.

What runs, as a target: p0 · Π_k s_k / (1 − s_k), s_k in (0, 1) the reward of a text's first k steps. Both draw a step
for each particle, weigh by s / (1 − s) and resample all after each step. its_hub differs from sequential Monte Carlo
where particles have unlike numbers of steps, and at the end; here instead

- a particle that has stopped keeps its weight. its_hub weighs it by its last score again after each step of others, so
  that short texts of a high score take over;
- final particles have weights, and `log_weights_lst` holds them. its_hub resamples once more and then calls the last
  scores the log weights. "argmax" is the heaviest particle: of those that took a step since the last resampling the one
  of the highest score, as there, but also where its_hub's last resampling would lose it. "sample" draws by weight;
  its_hub draws by the last score among particles that were already drawn by it, and so counts it twice;
- `resampling_method` is what resamples. its_hub's ParticleFiltering is given one, and always is multinomial;
- Ẑ is unbiased, so is the entropic resampling: children keep what is left of their weights.

`docs/segments.md` has the correspondence of all settings.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc.params import RESAMPLING_SCHEMES, SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential, RewardModel
from fastsmc.potentials.base import Engine, State
from fastsmc.potentials.tokens import short, tokenizer_of
from fastsmc.texts import texts_after
from fastsmc.values import as_int, check_choice, check_int

__all__ = ["EntropicParticleFiltering", "ParticleFiltering", "ParticleFilteringResult", "StepGeneration"]

SELECTIONS = ("argmax", "sample")
#: an engine takes one call at a time, and callers of `ainfer` come from several threads
_turn = threading.Lock()


@dataclasses.dataclass
class StepGeneration:
    """Says what a step is, with the arguments of its_hub's class of this name, which may be used in its place.

    Args:
        max_steps: a particle ends with step max_steps + 1, as its_hub's does, which counts the steps before.
        step_token: a string that ends a step, or several; those need `include_stop_str_in_output`.
        stop_token: a particle ends with the step after which its text holds this.
        temperature: of p0, at least 0.01; 1.0 is the model itself.
        include_stop_str_in_output: whether texts keep a `step_token` at their end; a `stop_token` there then goes.
        temperature_switch: not supported; None.
        tokens_per_step: a step's tokens, in the place of `step_token`.

    Raises:
        ValueError: both or none of `step_token` and `tokens_per_step`, or what is not supported.
    """

    max_steps: int
    step_token: str | list[str] | None = None
    stop_token: str | None = None
    temperature: float = 0.8
    include_stop_str_in_output: bool = False
    temperature_switch: None = None
    tokens_per_step: int | None = None

    def __post_init__(self) -> None:
        _check_steps(self)


def _check_steps(sg: Any) -> None:
    """Refuses settings of steps that cannot be, of our class or of its_hub's."""
    check_int("max_steps", sg.max_steps, 0, 2**24)
    if (sg.step_token is None) == (sg.tokens_per_step is None):
        raise ValueError(
            f"step_token={sg.step_token!r}, tokens_per_step={sg.tokens_per_step!r}: exactly one of them must be given"
        )
    if not isinstance(sg.step_token, (str, type(None))) and not sg.include_stop_str_in_output:
        raise ValueError(f"step_token={sg.step_token!r}: several need include_stop_str_in_output=True")
    if sg.stop_token is not None and not isinstance(sg.stop_token, str):
        raise ValueError(f"stop_token={sg.stop_token!r}: must be a string or None")
    if sg.temperature_switch is not None:
        raise ValueError(
            f"temperature_switch={sg.temperature_switch!r}: not supported, a group has one temperature; must be None"
        )


@dataclasses.dataclass
class ParticleFilteringResult:
    """Holds what its_hub's class of this name holds, and the population that it is of.

    Attributes:
        responses: N messages, {"role": "assistant", "content": text}.
        log_weights_lst: N final log weights, unnormalised.
        selected_index: which response was chosen.
        steps_used_lst: N numbers of steps; one that its end cut short counts.
        population: the particles as `LLM.smc` gives them; `population.log_z` is log Ẑ.
    """

    responses: list[dict[str, str]]
    log_weights_lst: list[float]
    selected_index: int
    steps_used_lst: list[int]
    population: Population

    @property
    def the_one(self) -> dict[str, str]:
        """The message that was chosen."""
        return self.responses[self.selected_index]


class ParticleFiltering:
    """Is its_hub's algorithm of this name as one SMC group with segments; the module says where they differ.

    Args:
        sg: what a step is: a `StepGeneration`, its_hub's or the one here.
        prm: an its_hub process reward model, an object with `ascore` or `score` of (prompt, texts) → as many numbers in
            [0, 1], each for the whole text of a particle so far; they are cut to [1e-7, 1 − 1e-7]. Or a fastsmc
            potential. It is asked where the engine is: with an engine in a process of its own it is pickled there, at
            each call.
        final_response_selection: "argmax" or "sample".
        resampling_method: a scheme of `SMCParams`; its_hub has "multinomial" and "systematic".
        max_tokens: of a text. None: (max_steps + 1) · tokens_per_step; with a `step_token` what the model's context
            leaves. KV blocks are taken as texts grow, but a group that could outgrow the cache may be refused.
        seed: of the first call; call i has seed + i. None: another at each call, as with its_hub.

    Raises:
        ValueError: an argument that cannot be, or that is not supported.
    """

    _resampling_temperature: float | str = 1.0

    def __init__(
        self,
        sg: Any,
        prm: Any,
        final_response_selection: Any = "argmax",
        resampling_method: Any = "multinomial",
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> None:
        _check_steps(sg)
        if not isinstance(prm, Potential) and not any(
            callable(getattr(prm, name, None)) for name in ("ascore", "score")
        ):
            raise ValueError(f"prm={prm!r}: must be a potential, or have a method ascore or score")
        self.sg, self.prm = sg, prm
        # its_hub's enumerations have the names as values
        self.final_response_selection = getattr(final_response_selection, "value", final_response_selection)
        self.resampling_method = getattr(resampling_method, "value", resampling_method)
        check_choice("final_response_selection", self.final_response_selection, SELECTIONS)
        check_choice("resampling_method", self.resampling_method, RESAMPLING_SCHEMES)
        self.max_tokens = None if max_tokens is None else check_int("max_tokens", max_tokens, 1, 2**24)
        self.seed = None if seed is None else check_int("seed", seed, 0, 2**62)

    def infer(
        self,
        lm: Any,
        prompt_or_messages: Any,
        budget: int,
        return_response_only: bool = True,
        tools: Any = None,
        tool_choice: Any = None,
    ) -> Any:
        """Draws `budget` particles and chooses one.

        Args:
            lm: a `fastsmc.LLM`.
            prompt_or_messages: a text, which is a user's message; messages, dicts or its_hub's objects; or token ids,
                which are the prompt as they are. Messages go through the model's chat template, each in its role (what
                its_hub sends is one user's message, with "role: content" in lines); one of the assistant at the end is
                continued. For a model without a chat template a text is the prompt as it is, and messages are such
                lines.
            budget: N.
            return_response_only: True: the message that was chosen; False: a `ParticleFilteringResult`.
            tools, tool_choice: not supported; None.

        Raises:
            ValueError: an argument that cannot be, or that is not supported.
            SMCError: the group failed: the reward model raised, say, or all weights are zero.
        """
        for name, value in (("tools", tools), ("tool_choice", tool_choice)):
            if value is not None:
                raise ValueError(f"{name}={short(value)}: not supported, texts have no calls; must be None")
        check_int("budget", budget, 1, 2**20)
        ids, text = _read_prompt(lm.get_tokenizer(), prompt_or_messages)
        reward = self.prm if isinstance(self.prm, Potential) else ProcessReward(_asker(self.prm, text, self.sg))
        with _turn:
            population = lm.smc(ids, self._params(lm, len(ids), budget), _Ends(self.sg) * reward)
        if population.degenerate:
            from fastsmc.smc import SMCError

            raise SMCError("all particles have weight zero: there is none to choose")
        texts, steps = population.texts, population.segments
        assert texts is not None and steps is not None  # there is a tokenizer, and there are segments
        if self.final_response_selection == "argmax":
            selected = int(np.argmax(population.log_weights))
        else:
            selected = int(population.sample(1, population.params.seed)[0])
        result = ParticleFilteringResult(
            responses=[{"role": "assistant", "content": _strip(self.sg, each)} for each in texts],
            log_weights_lst=population.log_weights.tolist(),
            selected_index=selected,
            steps_used_lst=steps.tolist(),
            population=population,
        )
        return result.the_one if return_response_only else result

    async def ainfer(
        self,
        lm: Any,
        prompt_or_messages: Any,
        budget: int,
        return_response_only: bool = True,
        tools: Any = None,
        tool_choice: Any = None,
    ) -> Any:
        """Does what `infer` does in a thread, so that an event loop goes on; calls take turns at the engine."""
        return await asyncio.to_thread(
            self.infer, lm, prompt_or_messages, budget, return_response_only, tools, tool_choice
        )

    def _params(self, lm: Any, n_prompt: int, budget: int) -> SMCParams:
        sg, seed = self.sg, self.seed
        if seed is None:
            seed = secrets.randbits(62)
        else:
            self.seed = seed + 1
        most = self.max_tokens
        if most is None and sg.tokens_per_step is not None:
            most = (sg.max_steps + 1) * sg.tokens_per_step
        if most is None:
            most = max(1, lm.model_config.max_model_len - n_prompt)
        tokens = [sg.step_token] if isinstance(sg.step_token, str) else sg.step_token
        return SMCParams(
            n_particles=budget,
            max_tokens=most,
            temperature=sg.temperature,
            ess_threshold=1.0,
            resampling=self.resampling_method,
            resampling_temperature=self._resampling_temperature,
            segment=None if tokens is None else tuple(tokens),
            max_segment_tokens=sg.tokens_per_step,
            seed=seed,
        )


class EntropicParticleFiltering(ParticleFiltering):
    """Is its_hub's algorithm of this name: as `ParticleFiltering`, but resamples by weight^(1/τ), τ its entropic rule.

    Children keep what that leaves of their weights, so that Ẑ is unbiased; its_hub drops it. The rule's progress is
    counted in tokens of `max_tokens` here, and in steps of `max_steps` there: give a `max_tokens` that texts come to.

    Args:
        sg, prm, final_response_selection, max_tokens, seed: as in `ParticleFiltering`.
        resampling_method: as there; "systematic" unless it is said.
        temperature_method, ess_threshold, early_phase: "ess", 0.5 and 0.5, which its_hub has unless it is said; others
            are not supported.
    """

    _resampling_temperature = "entropic"

    def __init__(
        self,
        sg: Any,
        prm: Any,
        final_response_selection: Any = "argmax",
        resampling_method: Any = "systematic",
        temperature_method: Any = "ess",
        ess_threshold: float = 0.5,
        early_phase: float = 0.5,
        *,
        max_tokens: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__(sg, prm, final_response_selection, resampling_method, max_tokens=max_tokens, seed=seed)
        temperature_method = getattr(temperature_method, "value", temperature_method)
        for name, value, only in (
            ("temperature_method", temperature_method, "ess"),
            ("ess_threshold", ess_threshold, 0.5),
            ("early_phase", early_phase, 0.5),
        ):
            if value != only:
                raise ValueError(f"{name}={value!r}: not supported; must be {only!r}")


def __getattr__(name: str) -> Any:
    if name in ("ParticleGibbs", "ParticleGibbsResult"):
        raise ImportError(
            f"{name}: not supported. its_hub's iterations over a kept particle are `fastsmc.evaluate.particle_gibbs`, "
            "without segments"
        )
    raise AttributeError(f"module 'fastsmc.its' has no attribute {name!r}")


# ------------------------------------------------------------------------------------------------------------- prompts
def _read_prompt(tokenizer: Any, given: Any) -> tuple[list[int], str]:
    """Reads a prompt: its token ids, and the text that its_hub shows a reward model of it."""
    if tokenizer is None:
        raise ValueError("lm: has no tokenizer, and steps are texts")
    if hasattr(given, "to_chat_messages"):
        given = given.to_prompt() if given.is_string else given.to_chat_messages()
    if (
        not isinstance(given, str)
        and isinstance(given, Sequence)
        and given
        and all(as_int(v) is not None for v in given)
    ):
        ids = [int(v) for v in given]
        return ids, tokenizer.decode(ids, skip_special_tokens=True)
    messages = _read_messages(given)
    text = given if isinstance(given, str) else "\n".join(f"{each['role']}: {each['content']}" for each in messages)
    if not getattr(tokenizer, "chat_template", None):
        return list(tokenizer.encode(text)), text
    go_on = messages[-1]["role"] == "assistant"
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=False, add_generation_prompt=not go_on, continue_final_message=go_on
    )
    return list(ids), text


def _read_messages(given: Any) -> list[dict[str, str]]:
    """Reads messages: a text, or dicts or its_hub's objects, as {"role", "content"} of texts."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(
            f"prompt_or_messages={short(given)}: must be a text, token ids, or a list of at least one message"
        )
    return [_read_message(f"prompt_or_messages[{i}]", each) for i, each in enumerate(given)]


def _read_message(name: str, message: Any) -> dict[str, str]:
    fields = message.to_dict() if hasattr(message, "to_dict") else message
    if not isinstance(fields, dict) or not isinstance(fields.get("role"), str):
        raise ValueError(f"{name}={short(message)}: must be a message, {{'role': …, 'content': …}}")
    others = sorted(key for key, value in fields.items() if key not in ("role", "content") and value is not None)
    if others:
        raise ValueError(f"{name}: holds {', '.join(map(repr, others))}, which is not supported")
    content = fields.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{name}: its content holds {short(part)}; only texts are supported")
    return {"role": fields["role"], "content": " ".join(part["text"] for part in parts)}


# --------------------------------------------------------------------------------------------------------------- steps
def _strip(sg: Any, text: str) -> str:
    """Takes off a text's end what its_hub does not show: of a whole text, to its users and to a reward model."""
    if sg.include_stop_str_in_output:
        return text.removesuffix(sg.stop_token or "")
    return text.removesuffix(sg.step_token or "")


class _Ends(Potential):
    """Ends particles with the step that is their last, and is 1: by `max_steps` or by the text of `stop_token`."""

    def __init__(self, sg: Any) -> None:
        self.most, self.mark = sg.max_steps, sg.stop_token

    def setup(self, engine: Engine) -> None:
        self._tokenizer = tokenizer_of(engine, "ParticleFiltering")

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        self._seen = torch.zeros(n_particles, dtype=torch.int64)

    def reindex(self, ancestors: Tensor) -> None:
        self._seen = self._seen[ancestors.to(self._seen.device)]

    def complete(self, state: State) -> Tensor:
        return super().prefix(state)

    def stop(self, state: State) -> Tensor:
        """Returns (N,) bool. A step has just ended where `state.segments` has grown."""
        assert state.segments is not None  # the parameters have segments
        seen, self._seen = self._seen.to(state.segments.device), state.segments.clone()
        ended = (state.segments > seen) & ~state.finished
        ends = ended & (state.segments > self.most)
        rows = (ended & ~ends).nonzero().squeeze(1)
        if self.mark is None or not len(rows):
            return ends
        drawn = [[v for v in row if v >= 0] for row in state.tokens[rows].tolist()]
        texts = texts_after(self._tokenizer, state.prompt, drawn)
        ends[rows] = torch.tensor([self.mark in text for text in texts], device=ends.device)
        return ends


class ProcessReward(RewardModel):
    """Is a process reward model of its_hub's kind as a potential; log ψ is the sum of the logits of its scores so far.

    Args:
        ask: scores of texts. It is a function, so that groups share what it holds.
    """

    in_background = True

    def __init__(self, ask: Callable[[list[str]], Any]) -> None:
        super().__init__(aggregate="product", scale="logit")
        self.ask = ask

    def score(self, texts: list[str]) -> Any:
        return self.ask(texts)


def _asker(prm: Any, prompt: str, sg: Any) -> Callable[[list[str]], Any]:
    """Makes a function of texts that asks a reward model, by `ascore`, as its_hub does, where it has that."""

    def ask(texts: list[str]) -> Any:
        shown = [_strip(sg, text) for text in texts]
        if not callable(getattr(prm, "ascore", None)):
            return prm.score(prompt, shown)

        async def wait() -> Any:
            return await prm.ascore(prompt, shown)

        return asyncio.run(wait())

    return ask


def _register() -> None:
    """Makes the classes here instances of its_hub's abstract ones, where it is installed."""
    try:
        from its_hub.api import AbstractScalingAlgorithm, AbstractScalingResult
    except ModuleNotFoundError:
        return
    AbstractScalingAlgorithm.register(ParticleFiltering)
    AbstractScalingResult.register(ParticleFilteringResult)


_register()
