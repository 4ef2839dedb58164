"""The lead: an ordinary vLLM request whose `extra_args` hold `smc_*` keys stands for a whole group.

What is read from the request, what is refused, and what a group needs of the engine, in one place for the user face
(which refuses before anything is sent) and the scheduler (which refuses what HTTP clients send). `Tick` and its parts
are what goes from the scheduler to the workers with a step, `GroupResult` what comes back.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from typing import Any

from fastsmc import potentials
from fastsmc.arguments import read_exact
from fastsmc.params import LEAD_KEY, PREFIX, SMCParams

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


def is_lead(sampling_params: Any) -> bool:
    """Says whether a request with these SamplingParams (or None) asks for a group."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    return any(str(key).startswith(PREFIX) for key in extra)


@dataclasses.dataclass(frozen=True)
class Limits:
    """Says what an engine has: rows (max_num_seqs), tokens per forward pass, KV blocks, tokens per block, positions."""

    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int
    block_size: int
    max_model_len: int

    @classmethod
    def of(cls, config: Any) -> Limits:
        """Reads a VllmConfig after the KV cache was sized. One block is vLLM's null block."""
        return cls(
            max_num_seqs=config.scheduler_config.max_num_seqs,
            max_num_batched_tokens=config.scheduler_config.max_num_batched_tokens,
            num_blocks=config.cache_config.num_gpu_blocks - 1,
            block_size=config.cache_config.block_size,
            max_model_len=config.model_config.max_model_len,
        )


@dataclasses.dataclass(frozen=True)
class Lead:
    """Holds a validated group request."""

    params: SMCParams
    potential: str | None
    potential_args: str
    twist: str | None
    exact: list[list[int]] | None
    return_population: bool

    @classmethod
    def parse(cls, sampling_params: Any) -> Lead:
        """Reads a request's SamplingParams. Without a seed the group gets a random one.

        Raises:
            ValueError: naming the field, its value and what is allowed.
        """
        extra = sampling_params.extra_args
        if LEAD_KEY not in extra:
            raise ValueError(f"extra_args: {LEAD_KEY} is missing, but {sorted(extra)} ask for a group")
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
        whole = extra.get(PREFIX + "return_population", False)
        if whole not in (True, False):
            raise ValueError(f"smc_return_population={whole!r}: must be true or false")
        return cls(params, potential, args, twist, exact, bool(whole))

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


def check_fits(params: SMCParams, prompt_len: int, lookahead: int, limits: Limits) -> None:
    """Refuses a group that this engine can never run.

    A group that never resamples shares nothing, so its whole need is known and must fit; any other must fit with its
    tails and one copy of the rest (it grows as its genealogy asks for it).

    Raises:
        ValueError: naming the argument, its value and the limit.
    """
    n, size = params.n_particles, limits.block_size
    if n > limits.max_num_seqs:
        raise ValueError(f"n_particles={n}: at most max_num_seqs={limits.max_num_seqs} of this engine")
    if n > limits.max_num_batched_tokens:
        raise ValueError(f"n_particles={n}: at most max_num_batched_tokens={limits.max_num_batched_tokens}")
    length = prompt_len + params.max_tokens + max(lookahead, 1) - 1
    if length > limits.max_model_len:
        raise ValueError(
            f"max_tokens={params.max_tokens}: with a prompt of {prompt_len} tokens and a lookahead of {lookahead}, at "
            f"most max_model_len={limits.max_model_len} positions"
        )
    prompt_blocks = -(-prompt_len // size)
    columns = last_position(params, prompt_len, lookahead) // size + 1 - prompt_len // size
    private = first_columns(params, prompt_len, lookahead, size)
    never = params.ess_threshold == 0.0
    blocks = prompt_blocks + n * (columns if never else private) + (0 if never else columns - private)
    if blocks > limits.num_blocks:
        what = "never resampling, so sharing nothing" if never else "at the least"
        raise ValueError(
            f"n_particles={n}: with max_tokens={params.max_tokens} and a prompt of {prompt_len} tokens the group needs "
            f"{blocks} KV blocks ({what}); the KV cache has {limits.num_blocks} of {size} tokens"
        )


def last_position(params: SMCParams, prompt_len: int, lookahead: int) -> int:
    """Returns the last position whose KV a group writes: the last token is written only to score what follows it."""
    return max(prompt_len, prompt_len + params.max_tokens - 2 + lookahead)


def first_columns(params: SMCParams, prompt_len: int, lookahead: int, block_size: int) -> int:
    """Counts the columns of private blocks that a group opens before its first token."""
    last = min(prompt_len + lookahead, last_position(params, prompt_len, lookahead))
    return last // block_size + 1 - prompt_len // block_size


# ------------------------------------------------------------------------------- between scheduler and workers
@dataclasses.dataclass
class GroupStart:
    """Holds all that a worker needs to begin a group."""

    params: SMCParams
    prompt: list[int]
    prompt_blocks: list[int]
    stop_token_ids: frozenset[int]
    potential: str | None
    potential_args: str
    twist: str | None
    exact: list[list[int]] | None
    lookahead: int
    return_population: bool


@dataclasses.dataclass
class GroupTick:
    """Asks for a group's share of a particle-only engine step: up to `steps` particle steps, with new `blocks`."""

    request_id: str
    epoch: int
    steps: int
    blocks: list[int]
    start: GroupStart | None


@dataclasses.dataclass
class Tick:
    """Travels on SchedulerOutput as attribute `smc`.

    Attributes:
        patience: seconds that the worker may wait for a potential to be prepared; 0 where there is other work.
    """

    groups: list[GroupTick]
    drop: list[str]
    patience: float = 0.0


@dataclasses.dataclass
class GroupResult:
    """Says what one group's share of a step came to.

    Attributes:
        step: particle steps done so far.
        need: KV blocks without which it cannot go on; 0: none.
        surplus: KV blocks given back.
        waiting: its potential is still being prepared; ask again.
        error: the group has failed: why.
        token_ids, stopped: of one particle drawn by weight, when the group is done; token_ids is None if no particle
            has any weight.
        summary: plain values for every client, empty until the group is done; `population` is the whole (base64 of
            `Population.to_bytes`, so that it passes through JSON), when asked for.
    """

    request_id: str
    epoch: int
    step: int = 0
    done: bool = False
    need: int = 0
    surplus: list[int] = dataclasses.field(default_factory=list)
    waiting: bool = False
    error: str | None = None
    token_ids: list[int] | None = None
    stopped: bool = False
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    population: str | None = None
