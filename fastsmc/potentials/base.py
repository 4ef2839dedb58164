"""The contract of a potential: `Potential`, and what it sees (`State`, `Engine`) and may answer (`Rows`, `Masked`)."""

from __future__ import annotations

import types
from collections.abc import Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastsmc.potentials.waiting import join

if TYPE_CHECKING:
    from fastsmc.potentials.product import Product


class Rows(NamedTuple):
    """Stands for an (N, V) matrix whose rows repeat: row i is `values[index[i]]`.

    `Potential.logw_next` may return it instead of an (N, V) tensor, so that N particles in M distinct states cost
    M rows.

    Attributes:
        values: (M, V) floating point.
        index: (N,) int64 in [0, M).
    """

    values: Tensor
    index: Tensor  # type: ignore[assignment]  # the field's name hides tuple.index, which nobody calls


class Masked(NamedTuple):
    """Stands for an (N, V) matrix of which only some tokens are allowed: −inf for those that are not, else `values`.

    `Potential.logw_next` may return it. It is what constraints are made of: a row costs V / 8 bytes, and is read where
    the logits are. The layout is that of `ops.weigh`, xgrammar and llguidance: particle i may take token v where bit
    v % 32 of `bits[index[i], v // 32]` is set. Bits behind V are ignored; a particle without any bit has no next token,
    and so weight zero. Values of tokens that are not allowed are not looked at.

    Attributes:
        bits: (M, ceil(V / 32)) int32.
        index: (N,) int64 in [0, M).
        values: (N, V) floating point or Rows, of the allowed tokens; None: 0.
    """

    bits: Tensor
    index: Tensor  # type: ignore[assignment]  # as in Rows
    values: Tensor | Rows | None = None


class State:
    """Shows what a potential sees of a group of N particles after t generated tokens.

    Attributes:
        tokens: (N, t) int64, generated tokens so far, -1 after a particle's end.
        last_tokens: (N,) int64, each particle's token of the last step, -1 where it had ended; None before the first.
        log_prob: (N,) float64, log p0 of each particle's tokens so far.
        token_log_probs: (N, t) float64, log p0 of each of `tokens`, 0 after a particle's end.
        lengths: (N,) int64, generated tokens of each particle.
        finished: (N,) bool, particles that have ended.
        hidden: (N, H) last hidden state of the base model at the position whose logits came last (in `logw_next`: of
            the last token; in `prefix` and `complete`: of the token before the one just drawn), zero for particles
            that ended earlier; None when the engine has none.
        rows: (N,) int64, which of the R distinct histories that the model has just seen is a particle's own (without
            the token just drawn, as in `hidden`); -1 for particles that ended earlier.
        hidden_rows: (R, H) hidden states of those, so that `hidden` is hidden_rows[rows]; or None.
        step: int, t.
        prompt: list of int, the prompt's tokens.
        max_tokens: int, the longest continuation.
        segments: (N,) int64, segments of each particle that have ended, that which has just ended included; None in a
            group without segments. In one with them a particle may draw nothing at a step, as it waits: `tokens` then
            holds −1 there, in between, `step` is the length of none, and `last_tokens` is still its last one.
        stop_token_ids: frozenset of int, the tokens that end a particle.
    """

    tokens: Tensor
    last_tokens: Tensor | None
    log_prob: Tensor
    token_log_probs: Tensor
    lengths: Tensor
    finished: Tensor
    hidden: Tensor | None
    rows: Tensor
    hidden_rows: Tensor | None
    step: int
    prompt: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]
    segments: Tensor | None = None


class Engine:
    """Is what `Potential.setup` gets.

    Attributes:
        tokenizer: the model's tokenizer (a Hugging Face tokenizer), or None.
        device: torch.device of the group's tensors.
        vocab_size: int V, columns of `logw_next`.
        hidden_size: int H, or None.
        model: the base model as the engine runs it, or None. Raises under tensor parallelism: no process has it whole.
        model_name: its name or path, or None.
        reward_models: reward models that the engine has loaded, by name (fastsmc.reward_networks.Network).
    """

    tokenizer: Any
    device: torch.device
    vocab_size: int
    hidden_size: int | None
    model: Any
    model_name: str | None
    reward_models: Mapping[str, Any] = types.MappingProxyType({})

    def continuation_log_prob(self, token_ids: list[int], given: int = 0) -> Tensor:
        """Returns (N,) float64 log p0(token_ids | prompt, particle) at the group's temperature, by the engine's KV.

        Of the first `given` tokens nothing is scored: it is log p0 of the others after them.

        To be called from within `prefix` or `complete` of a potential whose `lookahead >= len(token_ids)`; rows that
        the call was not about (in `prefix` the finished ones, in `complete` those that did not end now) are 0.
        """
        raise NotImplementedError("this engine cannot score continuations")


class Potential:
    """Is the base class of potentials. Override what you need; all results are natural logarithms, -inf allowed.

    The target is p0(s)·φ(s)/Z with log φ = `complete`. `prefix` is log ψ_t, the twist of an unfinished sequence.
    `complete` defaults to `prefix`: then φ is the last ψ. One of the two must be overridden.

    Each group works on a deep copy of the object as `setup` left it: tensors are copied when they are written to, and
    `shared_by_groups`, modules, functions, read-only arrays, locks and connections are shared (see `copying`).
    """

    #: whether a step with this potential may be captured as a CUDA graph (fastsmc.smc.captured): every method is a
    #: fixed sequence of tensor operations on the state and on own tensors, updated in place; no value is looked
    #: at on the host. State.tokens then is (N, max_tokens), -1 where nothing is drawn yet, State.step a 0-dim tensor.
    capturable: bool = False
    #: what `*` makes; fastsmc.potentials.product sets it, which builds on this module
    _product: ClassVar[type[Product]]
    #: tokens beyond a particle's end that `Engine.continuation_log_prob` may be asked for
    lookahead: int = 0
    #: tokens that `complete` will ask `Engine.continuation_log_prob` for, within `lookahead`: known beforehand, they
    #: are scored for all groups of a step in one pass of the model
    continuation: list[int] | None = None
    #: whether `prefix` asks for them, too
    continuation_in_prefix: bool = False
    #: `logw_next` only shapes the proposal: weights are exact for whatever it gives, and `prefix` is the target's ψ.
    #: Such a group draws, weighs and then resamples.
    proposal_only: bool = False
    #: log φ hangs on when `prefix` was asked, so a product in which others have `logw_next` is `proposal_only`
    needs_prefix: bool = False
    #: names of attributes that groups share and nobody writes to after `setup`; those of base classes count too
    shared_by_groups: tuple[str, ...] = ()
    #: names of attributes that are tensors (N, …) with an entry per particle, or None for all groups at the same step.
    #: A class that says it, if only (), may be asked for several groups at once: groups of one object that are at the
    #: same step, with the same `max_tokens` and stop tokens. `State` then shows the particles of all of them, one
    #: group's behind the other's; `State.prompt` is the first's, and not to be looked at; an exception ends all of
    #: them. `reset` is called for each. What else changes from step to step are numbers that are the same for all
    #: groups at a step. A subclass has to say it anew.
    per_particle: tuple[str, ...] | None = None
    #: with the rejection proposal: how many candidate tokens a particle is asked about at most per step; None: as many
    #: as it takes. A particle that needs more has weight zero, which is biased: `Population.questions` counts them
    max_asked: int | None = None
    #: whether requests may name the class itself, and give its arguments: not one whose arguments are the operator's
    by_request: ClassVar[bool] = True
    #: names of attributes that hold the potentials, one or a tuple, that this one is made of
    made_of: tuple[str, ...] = ()

    @classmethod
    def tokenize_args(cls, args: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
        """Returns the JSON arguments that a request gives, with text that `lookahead` hangs on as token ids.

        Called in the front end, which has a tokenizer: room for a request is found before anything is prepared.
        """
        return args

    def prepare(self, tokenizer: Any) -> None:
        """Does host work that may be slow, such as compiling tables; tokenizer: as `Engine.tokenizer`. Default: none.

        Called before `setup` and before `lookahead` is read: in the front end for an object, for a potential that a
        request names in a helper process without a device, which is killed where it takes too long. The object then
        travels to the worker, pickled, as it is.
        """

    def setup(self, engine: Engine) -> None:
        """Is called once, in the worker process, before the first group that uses this object. Other groups wait
        meanwhile: what is slow belongs into `prepare`."""

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        """Is called when a group starts: per-particle state for `n_particles` empty sequences begins here."""

    def reindex(self, ancestors: Tensor) -> None:
        """Makes the per-particle state of row i a copy of row ancestors[i]; ancestors (N,) int64."""

    def fetch(self, state: State, about: Tensor) -> Future[None] | None:
        """Begins to find in the background what `prefix` and `complete` will be asked of this state; None: they answer
        at once.

        It is called before them, with about (N,) bool, the particles that they will be asked about. While a future is
        not done the group is parked, and others go on; `prefix` and `complete` are asked once it is. An exception that
        it holds ends the group, with its text. Where the group is aborted meanwhile the future is cancelled: make it
        with `fastsmc.potentials.waiting.in_background`, whose function can see that. Where nobody calls this,
        `prefix` and `complete` wait themselves. Default: all of what the potentials that this one is made of begin.
        """
        return join([part.fetch(state, about) for part in parts(self)])

    def prefix(self, state: State) -> Tensor:
        """Returns (N,) log ψ_t(s_{1:t}) of unfinished particles."""
        return torch.zeros(state.finished.shape[0], dtype=torch.float64, device=state.finished.device)

    def complete(self, state: State) -> Tensor:
        """Returns (N,) log φ(s); asked at each step at which particles end, about those."""
        return self.prefix(state)

    def stop(self, state: State) -> Tensor | None:
        """Returns (N,) bool, unfinished particles that end with the token that they have just drawn; None: nobody does.

        They need no stop token, and no weight is corrected: such a sequence is complete, so `complete` is asked about
        it. It must hang on the tokens alone. Default: what any of the potentials that this one is made of says.
        """
        answers = [part.stop(state) for part in parts(self)]
        told = [answer for answer in answers if answer is not None]
        return torch.stack(told).any(0) if told else None

    def allows(self, state: State, particles: Tensor, tokens: Tensor) -> Tensor | None:
        """Returns (K,) bool, whether candidate tokens (K,) int64 of particles (K,) int64 are allowed; None: undefined.

        Only the rejection proposal asks, and draws among what is allowed. What is not allowed must have log ψ = −inf:
        `prefix` with that token, or `complete` if the particle ends with it.
        """
        return None

    def logw_next(self, state: State) -> Tensor | Rows | Masked | None:
        """Returns (N, V) log ψ_{t+1}(s, v) − log ψ_t(s) for every next token v; None: not used in the proposal.

        The answer must stay as it is until the step has drawn, and other groups are asked before that: no buffer that
        groups share.
        """
        return None

    def __mul__(self, other: Potential) -> Product:
        """Makes the product, of ψ = ψ_self · ψ_other."""
        return self._product(self, other) if isinstance(other, Potential) else NotImplemented


def parts(potential: Potential) -> list[Potential]:
    """Lists the potentials that this one is made of."""
    held = [getattr(potential, name) for name in potential.made_of]
    return [part for each in held for part in (each if isinstance(each, tuple) else (each,))]


def stops(potential: Potential) -> bool:
    """Says whether a potential, or one that it is made of, defines `stop`."""
    return type(potential).stop is not Potential.stop or any(map(stops, parts(potential)))


def answered(potential: Potential) -> set[str]:
    """Says which of `prefix`, `complete` and `logw_next` a potential defines.

    Raises:
        ValueError: neither of the first two, so that there is no log φ.
    """
    methods = ("prefix", "complete", "logw_next")
    own = {name for name in methods if getattr(type(potential), name) is not getattr(Potential, name)}
    if not own & {"prefix", "complete"}:
        raise ValueError(f"potential {type(potential).__name__}: defines neither prefix nor complete, so no log φ")
    return own
