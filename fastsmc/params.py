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
PROPOSALS = ("twisted", "base", "rejection")

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
        top_k, top_p, min_p: what vLLM's sampler knows by these names, part of p0: each step's distribution is cut and
            renormalised. 0 (or -1), 1.0 and 0.0 are off.
        logit_bias: token id → what is added to its logit, at most 1e6 either way; part of p0. (vLLM's completion and
            chat routes clamp it to ±100, its SamplingParams do not.)
        allowed_token_ids: the tokens that p0 may draw; None: all.
        min_tokens: before so many tokens p0 gives none of `stop_token_ids` nor of the model's end-of-sequence tokens,
            even with `ignore_eos`; and stop strings end nothing.
        ess_threshold: in [0, 1]; resample when the effective sample size falls below `ess_threshold * N`.
            1.0 resamples at every step, 0.0 never.
        resampling: 'systematic', 'stratified', 'multinomial', 'residual' or 'ssp'.
        resample_every: at least 1; resample only after this many tokens, or with segments boundaries, twice as many,
            and so on.
        resampling_temperature: τ, at least 1, or 'entropic'; ancestors are drawn in proportion to weight^(1/τ), and
            children keep what that leaves of the weight, so that log Ẑ stays unbiased in Z. 1.0 draws by weight.
            'entropic' is max(1, (N/ESS)(1 − t/max_tokens)) while ESS < N/2 and t < max_tokens/2, else 1, after t steps.
            (Below 1 the weights that are left would have no bound.)
        segment: a string or several, the delimiters of segments. A particle draws until the text that it has drawn in
            this segment holds one, and waits. At a boundary, when all that are unfinished wait, they are weighed and
            resampled together, and never else.
        segment_token_ids: tokens that end a segment, too.
        max_segment_tokens: what a segment has at most; None: no bound. Any of these three makes segments.
        islands: M: the particles are M equal parts, each of which is resampled by itself, by its own ESS, and which
            migrate. It must divide n_particles, and needs migrate_every. 1: there are none. (`LLM.smc(islands=M)` has
            independent ones.)
        migrate_every: at least 1; after this many tokens, or with segments boundaries, twice as many, and so on, the
            islands themselves are resampled, by their mean weights, where the ESS of these is below (M + 1)/2, halfway
            between 1 and M. None: there are no islands.
        proposal: 'twisted' draws from p0·ψ where the potential gives `logw_next`; 'base' draws from p0 and weighs
            afterwards; 'rejection' draws as 'twisted' does, but asks potentials such as `Condition` for single tokens
            until they allow one (docs/conditions.md).
        ignore_eos: True keeps particles going past the model's end-of-sequence token.
        stop_token_ids: further tokens that end a particle; the stop token is part of its tokens.
        stop: strings, or a string; a particle whose text comes to hold one ends with that token, which it keeps.
        force_stop: True draws token `max_tokens` among the stop tokens; it needs one. The target then is p0·φ on the
            sequences that end with a stop token, or, with fewer than `max_tokens` tokens, by `stop` or the potential's
            `stop`. One of `max_tokens` tokens whose last is no stop token is not among them.
        power: α > 0; the target is p0^α·φ, whole sequences sharpened (α > 1) or flattened, which no temperature does.
            log Z is that of Σ p0^α φ, and may be above 0 without a potential.
        power_ramp: how α comes about over the steps t = 1, 2, …: None: at once; an integer K: α_t is
            1 + (α − 1)·min(1, t/K); a sequence: α_1, α_2, …, the last of which is α and holds from then on. The target
            is the same; steps before have another intermediate target.
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
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    logit_bias: Mapping[int, float] | None = dataclasses.field(default=None, hash=False)
    allowed_token_ids: tuple[int, ...] | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] | None = None
    force_stop: bool = False
    power: float = 1.0
    power_ramp: int | tuple[float, ...] | None = None
    resample_every: int = 1
    resampling_temperature: float | str = 1.0
    segment: tuple[str, ...] | None = None
    segment_token_ids: tuple[int, ...] | None = None
    max_segment_tokens: int | None = None
    islands: int = 1
    migrate_every: int | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("n_particles", check_int("n_particles", self.n_particles, 1, 2**20))
        put("max_tokens", check_int("max_tokens", self.max_tokens, 1, 2**24))
        put("temperature", check_float("temperature", self.temperature, 0.01, 1e6))
        put("ess_threshold", check_float("ess_threshold", self.ess_threshold, 0.0, 1.0))
        check_choice("resampling", self.resampling, RESAMPLING_SCHEMES)
        check_choice("proposal", self.proposal, PROPOSALS)
        put("resample_every", check_int("resample_every", self.resample_every, 1, 2**24))
        put("resampling_temperature", _check_tau(self.resampling_temperature))
        for name in ("ignore_eos", "force_stop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r}: must be True or False")
        put("stop_token_ids", _check_ids("stop_token_ids", self.stop_token_ids))
        put("seed", check_int("seed", self.seed, 0, 2**63 - 1))
        put("group", check_int("group", self.group, 0, 2**32 - 1))
        put("top_k", max(check_int("top_k", self.top_k, -1, 2**31 - 1), 0))
        put("top_p", check_float("top_p", self.top_p, 0.0, 1.0))
        if self.top_p == 0.0:
            raise ValueError("top_p=0.0: must be a number in (0, 1]")
        put("min_p", check_float("min_p", self.min_p, 0.0, 1.0))
        put("logit_bias", _check_bias(self.logit_bias))
        put("allowed_token_ids", _check_ids("allowed_token_ids", self.allowed_token_ids))
        if self.allowed_token_ids == ():
            raise ValueError("allowed_token_ids=[]: must hold at least one token id, or be None")
        put("min_tokens", check_int("min_tokens", self.min_tokens, 0, self.max_tokens))
        put("stop", _check_strings("stop", self.stop))
        put("segment", _check_strings("segment", self.segment))
        put("segment_token_ids", _check_ids("segment_token_ids", self.segment_token_ids) or None)
        if self.max_segment_tokens is not None:
            put("max_segment_tokens", check_int("max_segment_tokens", self.max_segment_tokens, 1, 2**24))
        put("islands", check_int("islands", self.islands, 1, 2**20))
        if self.migrate_every is not None:
            put("migrate_every", check_int("migrate_every", self.migrate_every, 1, 2**24))
        if self.migrate_every is not None and self.islands == 1:
            raise ValueError(f"migrate_every={self.migrate_every}: needs islands of at least 2")
        if self.migrate_every is None and self.islands > 1:
            raise ValueError(
                f"islands={self.islands}: needs migrate_every; independent islands are those of smc(islands=…)"
            )
        if self.n_particles % self.islands:
            raise ValueError(
                f"islands={self.islands}: must divide n_particles={self.n_particles}, those of all islands"
            )
        put("power", check_power("power", self.power))
        put("power_ramp", _check_ramp(self.power_ramp, self.power))
        if self.force_stop and self.ignore_eos and not self.stop_token_ids:
            raise ValueError("force_stop=True: needs a stop token; with ignore_eos=True give stop_token_ids")
        if self.force_stop and self.min_tokens == self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens}: with force_stop=True must be below max_tokens={self.max_tokens}"
            )

    @property
    def powers(self) -> tuple[float, ...]:
        """Lists the powers of p0 in the targets of the first steps, α_1, α_2, …; the last one holds from then on."""
        if self.power_ramp is None:
            return (self.power,)
        if isinstance(self.power_ramp, int):
            n = self.power_ramp
            rising = (1.0 + (self.power - 1.0) * t / n for t in range(1, min(n, self.max_tokens + 1)))
            return (*rising, self.power)
        return *self.power_ramp[: self.max_tokens], self.power

    @property
    def segmented(self) -> bool:
        """Says whether particles wait for each other at the ends of segments."""
        return not (self.segment is None and self.segment_token_ids is None and self.max_segment_tokens is None)

    @property
    def powered(self) -> bool:
        """Says whether the target, or one on the way to it, has a power of p0 other than 1."""
        return any(power != 1.0 for power in self.powers)

    @property
    def never_resamples(self) -> bool:
        """Says whether no weights whatever make the group resample."""
        migrates = self.migrate_every is not None and self.migrate_every < self.max_tokens
        return not migrates and (self.ess_threshold == 0.0 or self.resample_every >= self.max_tokens)

    # -- as a vLLM request -----------------------------------------------------------------------------------------
    #: fields that SamplingParams has a word for, and those that travel as smc_* keys
    _SHARED = (
        *("max_tokens", "temperature", "ignore_eos", "stop_token_ids", "seed", "top_k", "top_p", "min_p"),
        *("logit_bias", "allowed_token_ids", "min_tokens", "stop"),
    )
    _OWN = (
        *("n_particles", "ess_threshold", "resampling", "proposal", "group", "force_stop"),
        *("resample_every", "resampling_temperature", "power", "power_ramp"),
        *("segment", "segment_token_ids", "max_segment_tokens", "islands", "migrate_every"),
    )

    def to_extra_args(self) -> dict[str, Any]:
        """Makes the flat `smc_*` keys for `SamplingParams.extra_args`."""
        return {PREFIX + name: getattr(self, name) for name in self._OWN}

    def to_shared(self) -> dict[str, Any]:
        """Makes the arguments of `SamplingParams` that say the rest; sequences are lists."""
        shared = {name: getattr(self, name) for name in self._SHARED}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()}

    def p0(self) -> dict[str, Any]:
        """Says what p0 is besides the model, in JSON values: the settings of vLLM's sampler in force."""
        names = ("temperature", "top_k", "top_p", "min_p", "allowed_token_ids", "min_tokens")
        values = {name: getattr(self, name) for name in names}
        if self.allowed_token_ids is not None:
            values["allowed_token_ids"] = list(self.allowed_token_ids)
        bias = self.logit_bias
        return {**values, "logit_bias": None if bias is None else {str(token): value for token, value in bias.items()}}

    @classmethod
    def from_request(cls, extra_args: Mapping[str, Any], **shared: Any) -> SMCParams:
        """Reads a group request's parameters from its `extra_args` and the fields that SamplingParams has words for.

        Raises:
            ValueError: for an unknown `smc_*` key, or a value that `SMCParams` refuses.
        """
        fields: dict[str, Any] = {}
        for key, value in extra_args.items():
            if str(key).startswith(PREFIX) and key not in REQUEST_KEYS:
                name = key[len(PREFIX) :]
                if name not in cls._OWN:
                    known = sorted(REQUEST_KEYS | {PREFIX + n for n in cls._OWN})
                    raise ValueError(f"extra_args[{key!r}]={value!r}: unknown key; known are {', '.join(known)}")
                fields[name] = (
                    bool(value) if name == "force_stop" and value in (0, 1) else value
                )  # as vllm_xargs has it
        return cls(**fields, **shared)


#: `smc_*` keys of a group request that are not SMCParams: the potential's name, its JSON arguments, the directory of a
#: learned twist, exact samples of the target (lists of token ids), whether the whole population comes back (in
#: `RequestOutput.kv_transfer_params`) or only a summary, whether the group's rows are in no other group's pass, whether
#: outputs say how each step went, whether tokens come as soon as they are final, how many samples are drawn, an
#: intervention's name, the text whose counterfactuals are asked for, the temperature that drew it, how they are drawn,
#: the name of what another model said of it, and the name under which logits are kept.
REQUEST_KEYS = frozenset(
    PREFIX + name
    for name in (
        "potential", "potential_args", "twist", "exact", "return_population", "alone", "progress", "stream_tokens",
        "n_samples", "intervention", "counterfactual", "factual_temperature", "noise", "facts", "keep_logits",
    )
)  # fmt: skip


def check_power(name: str, value: Any) -> float:
    """Reads a power of p0."""
    return check_float(name, value, 1e-6, 1e6)


def _check_ramp(ramp: Any, power: float) -> int | tuple[float, ...] | None:
    """Reads a number of steps, powers that end with `power`, or None."""
    if ramp is None:
        return None
    listed = ramp.tolist() if hasattr(ramp, "tolist") else ramp  # an array
    if isinstance(listed, (str, bytes)) or not isinstance(listed, Sequence):
        try:
            return check_int("power_ramp", listed, 1, 2**24)
        except ValueError as error:
            raise ValueError(f"{error}, or a sequence of powers") from None
    powers = tuple(check_power(f"power_ramp[{t}]", each) for t, each in enumerate(listed))
    if not powers or powers[-1] != power:
        said = repr(ramp) if len(powers) < 20 else f"{powers[:20]}…"
        raise ValueError(f"power_ramp={said}: must be a number of steps, or powers that end with power={power:g}")
    return powers


def _check_tau(tau: Any) -> float | str:
    """Reads a resampling temperature: 'entropic', or a number of at least 1."""
    if isinstance(tau, str) and tau == "entropic":
        return tau
    try:
        return check_float("resampling_temperature", tau, 1.0, 1e6)
    except ValueError as error:
        raise ValueError(f"{error}, or 'entropic'") from None


def _check_ids(name: str, ids: Any) -> tuple[int, ...] | None:
    """Reads token ids, or None."""
    if ids is None:
        return None
    listed = ids.tolist() if hasattr(ids, "tolist") else ids  # an array
    if isinstance(listed, (str, bytes)) or not isinstance(listed, (Sequence, Set)):
        raise ValueError(f"{name}={ids!r}: must be a list of token ids or None")
    return tuple(check_int(name, token, 0, 2**31 - 1) for token in listed)


def _check_bias(bias: Any) -> dict[int, float] | None:
    """Reads token id → number, or None for none. Ids may be text, as JSON has them."""
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias={bias!r}: must be a mapping of token ids to numbers, or None")
    out = {}
    for token, value in bias.items():
        id_ = int(token) if isinstance(token, str) and token.isdecimal() else token
        out[check_int("logit_bias", id_, 0, 2**31 - 1)] = check_float(f"logit_bias[{token!r}]", value, -1e6, 1e6)
    return out or None


def _check_strings(name: str, value: Any) -> tuple[str, ...] | None:
    """Reads a string or several, none of them empty; None for none."""
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return None
    if not isinstance(strings, (list, tuple)) or not all(isinstance(text, str) and text for text in strings):
        raise ValueError(f"{name}={value!r}: must be a string or a list of strings, none of them empty")
    if any("\ud800" <= character <= "\udfff" for character in "".join(strings)):
        raise ValueError(f"{name}={value!r}: holds a surrogate, which is no character")
    return tuple(strings) or None
