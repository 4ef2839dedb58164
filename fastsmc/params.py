"""SMCParams: what one SMC group is asked to do, frozen, validated and flat enough for HTTP.

A group travels as one ordinary vLLM request. What vLLM has a word for (max_tokens, temperature, seed, ...) stays in
that word of `SamplingParams`; the rest goes into `SamplingParams.extra_args` as flat `smc_*` keys, so that an HTTP
client can send the same thing. `to_extra_args` and `from_request` are the two directions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

from fastsmc.values import check_choice, check_float, check_int

RESAMPLING_SCHEMES = ("systematic", "stratified", "multinomial", "residual", "ssp")
PROPOSALS = ("twisted", "base")

#: Prefix of the keys in `SamplingParams.extra_args` that make a request stand for a group.
PREFIX = "smc_"
#: The one key that every group request has.
GROUP_KEY = PREFIX + "n_particles"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SMCParams:
    """Says what one group of particles is asked to do.

    Args:
        n_particles: number of particles N, 1 to 2**20.
        max_tokens: longest continuation in tokens; a particle that reaches it ends there.
        temperature: at least 0.01 (below that vLLM would clamp it); divides the logits, so that it is part of p0.
        ess_threshold: in [0, 1]; resample when the effective sample size falls below `ess_threshold * N`.
            1.0 resamples at every step, 0.0 never.
        resampling: 'systematic', 'stratified', 'multinomial', 'residual' or 'ssp'.
        proposal: 'twisted' draws from p0·ψ where the potential gives `logw_next`; 'base' draws from p0 and weighs
            afterwards.
        ignore_eos: True keeps particles going past the model's end-of-sequence token.
        stop_token_ids: further tokens that end a particle; the stop token is part of its tokens.
        seed: 0 to 2**63 - 1; the same seed gives the same population.
        group: 0 to 2**32 - 1; a second key beside the seed, for independent groups under one seed. `LLM.smc` adds the
            prompt's index to it when it is given a list.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """

    n_particles: int = 64
    max_tokens: int = 16
    temperature: float = 1.0
    ess_threshold: float = 0.5
    resampling: str = "systematic"
    proposal: str = "twisted"
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] | None = None
    seed: int = 0
    group: int = 0

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("n_particles", check_int("n_particles", self.n_particles, 1, 2**20))
        put("max_tokens", check_int("max_tokens", self.max_tokens, 1, 2**24))
        put("temperature", check_float("temperature", self.temperature, 0.01, 1e6))
        put("ess_threshold", check_float("ess_threshold", self.ess_threshold, 0.0, 1.0))
        check_choice("resampling", self.resampling, RESAMPLING_SCHEMES)
        check_choice("proposal", self.proposal, PROPOSALS)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r}: must be True or False")
        if self.stop_token_ids is not None:
            ids = self.stop_token_ids
            if hasattr(ids, "tolist"):  # an array
                ids = ids.tolist()
            if isinstance(ids, (str, bytes)) or not isinstance(ids, (Sequence, Set)):
                raise ValueError(f"stop_token_ids={self.stop_token_ids!r}: must be a list of token ids or None")
            put("stop_token_ids", tuple(check_int("stop_token_ids", v, 0, 2**31 - 1) for v in ids))
        put("seed", check_int("seed", self.seed, 0, 2**63 - 1))
        put("group", check_int("group", self.group, 0, 2**32 - 1))

    # -- as a vLLM request -----------------------------------------------------------------------------------------
    #: fields that SamplingParams has a word for, and those that travel as smc_* keys
    _SHARED = ("max_tokens", "temperature", "ignore_eos", "stop_token_ids", "seed")
    _OWN = ("n_particles", "ess_threshold", "resampling", "proposal", "group")

    def to_extra_args(self) -> dict[str, Any]:
        """Makes the flat `smc_*` keys for `SamplingParams.extra_args`."""
        return {PREFIX + name: getattr(self, name) for name in self._OWN}

    @classmethod
    def from_request(cls, extra_args: Mapping[str, Any], **shared: Any) -> SMCParams:
        """Reads a group request's parameters from its `extra_args` and the fields that SamplingParams has words for.

        Raises:
            ValueError: for an unknown `smc_*` key, or a value that `SMCParams` refuses.
        """
        fields = {}
        for key, value in extra_args.items():
            if str(key).startswith(PREFIX) and key not in REQUEST_KEYS:
                name = key[len(PREFIX) :]
                if name not in cls._OWN:
                    known = sorted(REQUEST_KEYS | {PREFIX + n for n in cls._OWN})
                    raise ValueError(f"extra_args[{key!r}]={value!r}: unknown key; known are {', '.join(known)}")
                fields[name] = value
        return cls(**fields, **shared)


#: `smc_*` keys of a group request that are not SMCParams: the potential's name, its JSON arguments, the directory of a
#: learned twist, exact samples of the target (lists of token ids), whether the whole population comes back (in
#: `RequestOutput.kv_transfer_params`) or only a summary, whether the group's rows are in no other group's pass, whether
#: outputs say how each step went, whether tokens come as soon as they are final, and how many samples are drawn.
REQUEST_KEYS = frozenset(
    PREFIX + name
    for name in (
        "potential", "potential_args", "twist", "exact", "return_population", "alone", "progress", "stream_tokens",
        "n_samples",
    )
)  # fmt: skip
