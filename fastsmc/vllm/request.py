"""The group request: an ordinary vLLM request whose `extra_args` hold `smc_*` keys stands for a whole group.

What is read from the request and what is refused, in one place for the user face (which refuses before anything is
sent) and the scheduler (which refuses what HTTP clients send).
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from typing import Any

from fastsmc import potentials
from fastsmc.arguments import read_exact
from fastsmc.params import GROUP_KEY, PREFIX, SMCParams
from fastsmc.values import check_int

#: fields of SamplingParams that would change p0 or the output in ways a group does not know: name → accepted values
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "top_p": (1, 1.0),
    "top_k": (0, -1),
    "min_p": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "repetition_penalty": (1, 1.0),
    "min_tokens": (0,),
    "stop": (None, [], ()),
    "logprobs": (None,),
    "prompt_logprobs": (None,),
    "logit_bias": (None, {}),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "structured_outputs": (None,),
    "prompt_logprob_token_ids": (None,),
    "logprob_token_ids": (None,),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
}

#: prefix of the names under which potential objects of an offline engine are kept in its workers: object:ID:LOOKAHEAD
OBJECT = "object:"
_OBJECT_NAME = re.compile(OBJECT + r"[0-9a-f]{32}:(\d{1,6})")


def is_group_request(sampling_params: Any) -> bool:
    """Says whether a request with these SamplingParams (or None) asks for a group."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return any(str(key).startswith(PREFIX) for key in extra)


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

    @classmethod
    def parse(cls, sampling_params: Any) -> GroupRequest:
        """Reads a request's SamplingParams. Without a seed the group gets a random one.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        extra = sampling_params.extra_args
        if GROUP_KEY not in extra:
            raise ValueError(f"extra_args: {GROUP_KEY} is missing, but {sorted(extra)} ask for a group")
        for name, neutral in _NEUTRAL.items():
            value = getattr(sampling_params, name, neutral[0])
            if value not in neutral:
                raise ValueError(f"{name}={value!r}: a group of particles takes only {neutral[0]!r}")
        if sampling_params.max_tokens is None:
            raise ValueError("max_tokens=None: a group of particles needs a number")
        params = SMCParams.from_request(
            extra,
            max_tokens=sampling_params.max_tokens,
            temperature=sampling_params.temperature,
            ignore_eos=bool(sampling_params.ignore_eos),
            stop_token_ids=tuple(sampling_params.stop_token_ids or ()) or None,
            seed=secrets.randbits(63) if sampling_params.seed is None else sampling_params.seed,
        )
        potential = extra.get(PREFIX + "potential")
        if potential is not None and not isinstance(potential, str):
            raise ValueError(f"smc_potential={potential!r}: must be a name")
        args = extra.get(PREFIX + "potential_args", "{}")
        try:
            if not isinstance(json.loads(args), dict):
                raise ValueError
        except (TypeError, ValueError, RecursionError):
            raise ValueError(f"smc_potential_args={str(args)[:200]!r}: must be a JSON object") from None
        twist = extra.get(PREFIX + "twist")
        if twist is not None and (not isinstance(twist, str) or potential is None):
            raise ValueError(
                f"smc_twist={twist!r}: must be the directory of a twist, and needs smc_potential beside it"
            )
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
        return cls(params, potential, args, twist, exact, **flags, n_samples=n_samples)

    def check_ids(self, vocab_size: int) -> None:
        """Refuses token ids that no row of logits has. ValueError: naming the field, the id and the vocabulary."""
        potentials.token_list("stop_token_ids", self.params.stop_token_ids or (), vocab_size)
        for i, ids in enumerate(self.exact or ()):
            potentials.token_list(f"smc_exact[{i}]", ids, vocab_size)

    def lookahead(self) -> int:
        """Returns how many tokens beyond a particle's end its potential scores, from name and arguments alone.

        Raises:
            ValueError: no potential is registered under that name, or it refuses the arguments.
        """
        if self.potential is None:
            return 0
        if self.potential.startswith(OBJECT):
            name = _OBJECT_NAME.fullmatch(self.potential)
            if name is None:
                raise ValueError(f"smc_potential={self.potential!r}: not a name that LLM.register_potential gave")
            return int(name[1])
        return int(potentials.resolve(self.potential, json.loads(self.potential_args)).lookahead)
