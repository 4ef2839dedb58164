"""The group request: an ordinary vLLM request whose `extra_args` hold `smc_*` keys stands for a whole group.

What is read from the request and what is refused, in one place for the user face (which refuses before anything is
sent) and the scheduler (which refuses what HTTP clients send).
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from fastsmc import potentials
from fastsmc.arguments import check_ids, read_exact
from fastsmc.interventions import LayerIntervention
from fastsmc.maps import NOWHERE, first_reached
from fastsmc.params import GROUP_KEY, PREFIX, SMCParams
from fastsmc.potentials import registry
from fastsmc.potentials.tokens import short
from fastsmc.smc.evidence import NOISES
from fastsmc.values import check_choice, check_float, check_int
from fastsmc.vllm import capacity
from fastsmc.vllm.capacity import Limits
from fastsmc.vllm.messages import FactualText
from fastsmc.vllm.options import EngineOptions

#: fields of SamplingParams that would change p0 or the output in ways a group does not know: name → accepted values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
}

_ARGS = PREFIX + "potential_args"
#: the key of the text, as token ids, whose counterfactuals a group's particles are
COUNTERFACTUAL = PREFIX + "counterfactual"
#: the settings of p0 in SamplingParams: name → off. The group applies them itself, so vLLM's sampler need not.
P0_OFF: dict[str, Any] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "logit_bias": None,
    "allowed_token_ids": None,
    "min_tokens": 0,
}

#: prefix of the names under which potential objects of an offline engine are kept in its workers: object:ID:LOOKAHEAD
OBJECT = "object:"
_OBJECT_NAME = re.compile(OBJECT + r"[0-9a-f]{32}:(\d{1,6})")
#: prefix of the names under which interventions are kept in workers: intervention:ID:FIRST, FIRST as `first_reached`
INTERVENTION = "intervention:"
_INTERVENTION_NAME = re.compile(INTERVENTION + r"[0-9a-f]{32}:(-1|\d{1,9})")


class OverLimit(ValueError):
    """A group is over a limit that the operator has set.

    Attributes:
        limit: name of the option (`EngineOptions`).
        kind: "busy" where it may be asked for later, else "limit".
    """

    def __init__(self, message: str, limit: str) -> None:
        super().__init__(message)
        self.limit, self.kind = limit, "busy" if limit == "max_groups" else "limit"


def is_group_request(sampling_params: Any) -> bool:
    """Says whether a request with these SamplingParams (or None) asks for a group."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return any(str(key).startswith(PREFIX) for key in extra)


def with_token_ids(extra_args: Mapping[str, Any], options: EngineOptions, tokenizer: Any) -> dict[str, Any]:
    """Returns a group request's `extra_args` with the text in its potential's arguments as token ids, where room for
    the group hangs on them. To be called where there is a tokenizer (or None), before the request is parsed.

    Raises:
        ValueError: the potential refuses the text. Any other fault is left to `GroupRequest`.
    """
    out, name = dict(extra_args), extra_args.get(PREFIX + "potential")
    if not isinstance(name, str) or name not in (known := options.known_potentials()):
        return out
    try:
        args = json.loads(out.get(_ARGS, "{}"))
    except (TypeError, ValueError, RecursionError):
        return out
    tokenize = getattr(registry.load(name, known), "tokenize_args", None)  # a function that makes one has none
    if tokenize is not None and isinstance(args, dict) and (changed := tokenize(args, tokenizer)) is not args:
        out[_ARGS] = json.dumps(changed)
    return out


@dataclasses.dataclass(frozen=True)
class GroupRequest:
    """Holds a validated group request."""

    params: SMCParams
    potential: str | None
    potential_args: str
    twist: str | None
    exact: list[list[int]] | None
    return_population: bool
    alone: bool
    progress: bool
    stream_tokens: bool
    n_samples: int
    intervention: str | None = None
    factual: FactualText | None = None
    keep_logits: str | None = None

    @classmethod
    def parse(cls, sampling_params: Any) -> GroupRequest:
        """Reads a request's SamplingParams. Without a seed the group gets a random one.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        extra = sampling_params.extra_args
        if GROUP_KEY not in extra:
            raise ValueError(f"{GROUP_KEY}: is missing, but {sorted(extra)} ask for a group")
        for name, neutral in _NEUTRAL.items():
            value = getattr(sampling_params, name, neutral[0])
            if value not in neutral:
                raise ValueError(f"{name}={value!r}: a group of particles takes only {neutral[0]!r}")
        if sampling_params.max_tokens is None:
            raise ValueError("max_tokens=None: a group of particles needs a number")
        if sampling_params.stop and not sampling_params.skip_special_tokens:
            raise ValueError(
                "skip_special_tokens=False: a group looks for stop strings in its text without special tokens; leave "
                "one of them out"
            )
        shared = {name: getattr(sampling_params, name) for name in SMCParams._SHARED}
        shared["stop_token_ids"] = tuple(sampling_params.stop_token_ids or ()) or None
        shared["seed"] = secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed
        shared["ignore_eos"] = bool(sampling_params.ignore_eos)
        params = SMCParams.from_request(extra, **shared)
        potential = extra.get(PREFIX + "potential")
        if potential is not None and not isinstance(potential, str):
            raise ValueError(f"smc_potential={potential!r}: must be a name")
        args = extra.get(_ARGS, "{}")
        try:
            given = json.loads(args)
            if not isinstance(given, dict):
                raise ValueError
            args.encode()  # as it will travel
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"smc_potential_args={str(args)[:200]!r}: must be a JSON object") from None
        if given and potential is None:
            raise ValueError(f"smc_potential_args={short(args)}: needs smc_potential beside it")
        twist = extra.get(PREFIX + "twist")
        if twist is not None and (not isinstance(twist, str) or potential is None):
            raise ValueError(f"smc_twist={twist!r}: must be the name of a twist, and needs smc_potential beside it")
        exact = extra.get(PREFIX + "exact")
        if exact is not None:
            exact = read_exact("smc_exact", exact, params)
        flags = {}
        for name in ("return_population", "alone", "progress", "stream_tokens"):
            flags[name] = extra.get(PREFIX + name, False)
            if flags[name] not in (True, False):
                raise ValueError(f"{PREFIX}{name}={flags[name]!r}: must be true or false")
        flags = {name: bool(value) for name, value in flags.items()}
        n_samples = check_int("smc_n_samples", extra.get(PREFIX + "n_samples", 1), 1, params.n_particles)
        intervention = extra.get(PREFIX + "intervention")
        if intervention is not None and not isinstance(intervention, str):
            raise ValueError(f"smc_intervention={intervention!r}: must be a name")
        keep = extra.get(PREFIX + "keep_logits")
        if keep is not None and (not isinstance(keep, str) or params.n_particles > 1 or exact is None):
            raise ValueError(f"smc_keep_logits={short(keep)}: must be a name, of one particle that is an exact sample")
        return cls(
            params, potential, args, twist, exact, **flags, n_samples=n_samples, intervention=intervention,
            factual=_read_factual(extra, params, potential), keep_logits=keep,
        )  # fmt: skip

    def check_ids(self, vocab_size: int, has_tokenizer: bool = True) -> None:
        """Refuses token ids that no row of logits has, and stop strings without a tokenizer.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        if self.params.stop is not None and not has_tokenizer:
            raise ValueError(f"stop={list(self.params.stop)}: this engine has no tokenizer; give stop_token_ids")
        check_ids(self.params, vocab_size)
        for i, ids in enumerate(self.exact or ()):
            potentials.token_list(f"smc_exact[{i}]", ids, vocab_size)
        if self.factual is not None:
            potentials.token_list(COUNTERFACTUAL, self.factual.token_ids, vocab_size)

    def check_allowed(self, options: EngineOptions) -> None:
        """Refuses what the engine's operator does not allow.

        Raises:
            ValueError: a potential or twist that requests may not name; says which they may. Directories and objects
                are for requests of the program that the engine is part of (`EngineOptions.offline`).
            OverLimit: the group is over a limit.
        """
        if self.potential is not None and not (self.potential.startswith(OBJECT) and options.offline):
            known = options.known_potentials()
            if self.potential not in known:
                raise ValueError(f"smc_potential={short(self.potential)}: unknown; known are {_listed(known)}")
        twists = options.twists or {}
        if self.twist is not None and self.twist not in twists and not options.offline:
            raise ValueError(f"smc_twist={short(self.twist)}: unknown; known are {_listed(twists)}")
        named = options.known_interventions()
        registered = options.offline and _INTERVENTION_NAME.fullmatch(self.intervention or "")
        if self.intervention is not None and self.intervention not in named and not registered:
            raise ValueError(f"smc_intervention={short(self.intervention)}: unknown; known are {_listed(named)}")
        for name, value in (("facts", self.factual and self.factual.facts), ("keep_logits", self.keep_logits)):
            if value is not None and not options.offline:
                raise ValueError(f"{PREFIX}{name}={short(value)}: is for fastsmc.LLM alone")
        n, length = self.params.n_particles, self.params.max_tokens
        if options.max_particles is not None and n > options.max_particles:
            raise OverLimit(f"n_particles={n}: at most max_particles={options.max_particles}", "max_particles")
        followed = 0 if self.factual is None else self.n_companions * len(self.factual.token_ids)
        if options.max_particle_tokens is not None and n * length + followed > options.max_particle_tokens:
            text = f" and {followed} tokens along the text" * (followed > 0)
            raise OverLimit(
                f"n_particles={n}, max_tokens={length}: their product {n * length}{text} is over "
                f"max_particle_tokens={options.max_particle_tokens}",
                "max_particle_tokens",
            )

    @property
    def n_companions(self) -> int:
        return 0 if self.factual is None else self.factual.n_companions

    def check_fits(
        self, prompt_len: int, lookahead: int, limits: Limits, named: Mapping[str, int] | None = None
    ) -> None:
        """Refuses a group that an engine of these limits can never run.

        Args:
            named: as of `first_reached`. Without it an operator's intervention counts as reaching no prompt.

        Raises:
            ValueError: as `capacity.check_fits`.
        """
        text_len = 0 if self.factual is None else len(self.factual.token_ids)
        capacity.check_fits(
            self.params, prompt_len, lookahead, limits, self.first_reached(named), text_len, self.n_companions
        )

    def first_reached(self, named: Mapping[str, int] | None = None) -> int:
        """Returns the first position that the intervention reaches in the prompt; `NOWHERE`: none.

        Args:
            named: of the operator's interventions, by name. Those that the program has registered say it themselves.
        """
        if self.intervention is None:
            return NOWHERE
        registered = _INTERVENTION_NAME.fullmatch(self.intervention)
        return int(registered[1]) if registered is not None else (named or {}).get(self.intervention, NOWHERE)

    def lookahead(self, options: EngineOptions) -> int:
        """Returns how many tokens beyond a particle's end its potential scores, from name and arguments alone.

        Raises:
            ValueError: no potential of that name, or it refuses the arguments.
        """
        if self.potential is None:
            return 0
        if self.potential.startswith(OBJECT):
            name = _OBJECT_NAME.fullmatch(self.potential)
            if name is None:
                raise ValueError(f"smc_potential={self.potential!r}: not a name that LLM.register_potential gave")
            return int(name[1])
        args = json.loads(self.potential_args)
        return int(potentials.resolve(self.potential, args, options.known_potentials()).lookahead)


def _read_factual(extra: Mapping[str, Any], params: SMCParams, potential: str | None) -> FactualText | None:
    """Reads what text a group is asked about. ValueError: naming the key, its value and what is allowed."""
    ids, facts = extra.get(COUNTERFACTUAL), extra.get(PREFIX + "facts")
    others = [name for name in ("factual_temperature", "noise", "facts") if extra.get(PREFIX + name) is not None]
    if ids is None:
        if others:
            name = PREFIX + others[0]
            raise ValueError(f"{name}={short(extra[name])}: needs {COUNTERFACTUAL} beside it")
        return None
    ids = potentials.token_list(COUNTERFACTUAL, ids)
    if not ids:
        raise ValueError(f"{COUNTERFACTUAL}=[]: is empty; there is nothing to ask about")
    if params.powered:
        raise ValueError(f"smc_power={params.power:g}: with {COUNTERFACTUAL} must be 1, without a ramp")
    temperature = extra.get(PREFIX + "factual_temperature", params.temperature)
    temperature = check_float("smc_factual_temperature", temperature, 0.01, 1e6)
    noise = extra.get(PREFIX + "noise", "exact")
    check_choice("smc_noise", noise, NOISES)
    if noise == "gumbel" and potential is not None:
        raise ValueError("smc_noise='gumbel': takes no potential, whose resampling would give particles other numbers")
    if facts is not None and not isinstance(facts, str):
        raise ValueError(f"smc_facts={short(facts)}: must be a name")
    return FactualText(ids, temperature, noise, facts)


def name_intervention(number: str, layers: Iterable[LayerIntervention]) -> str:
    """Makes the name under which workers keep an intervention, of 32 hexadecimal digits."""
    return f"{INTERVENTION}{number}:{first_reached(tuple(layers))}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
