"""The contract of a potential: `Potential`, and what it sees (`State`, `Engine`) and may answer (`Rows`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastsmc.potentials.product import Product


class Rows(NamedTuple):
    """An (N, V) matrix whose rows repeat: row i is `values[index[i]]`.

    `Potential.logw_next` may return it instead of an (N, V) tensor, so that N particles in M distinct states cost
    M rows.

    Attributes:
        values: (M, V) floating point.
        index: (N,) int64 in [0, M).
    """

    values: Tensor
    index: Tensor


class State:
    """What a potential sees of a group of N particles after t generated tokens.

    Attributes:
        tokens: (N, t) int64, generated tokens so far, -1 after a particle's end.
        last_tokens: (N,) int64, each particle's token of the last step, -1 where it had ended; None before the first.
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
        stop_token_ids: frozenset of int, the tokens that end a particle.
    """

    tokens: Tensor
    last_tokens: Tensor | None
    lengths: Tensor
    finished: Tensor
    hidden: Tensor | None
    rows: Tensor
    hidden_rows: Tensor | None
    step: int
    prompt: list[int]
    max_tokens: int
    stop_token_ids: frozenset[int]


class Engine:
    """What `Potential.setup` gets.

    Attributes:
        tokenizer: the model's tokenizer (a Hugging Face tokenizer), or None.
        device: torch.device of the group's tensors.
        vocab_size: int V, columns of `logw_next`.
        hidden_size: int H, or None.
        model: the base model as the engine runs it, or None. Raises under tensor parallelism: no process has it whole.
        model_name: its name or path, or None.
    """

    tokenizer: Any
    device: torch.device
    vocab_size: int
    hidden_size: int | None
    model: Any
    model_name: str | None

    def continuation_log_prob(self, token_ids: list[int]) -> Tensor:
        """(N,) float64 log p0(token_ids | prompt, particle) at the group's temperature, by the engine's own KV cache.

        To be called from within `prefix` or `complete` of a potential whose `lookahead >= len(token_ids)`; rows that
        the call was not about (in `prefix` the finished ones, in `complete` those that did not end now) are 0.
        """
        raise NotImplementedError("this engine cannot score continuations")


class Potential:
    """Base class of potentials. Override what you need; all results are natural logarithms, -inf allowed.

    The target is p0(s)·φ(s)/Z with log φ = `complete`. `prefix` is log ψ_t, the twist of an unfinished sequence.
    `complete` defaults to `prefix`: then φ is the last ψ. One of the two must be overridden.

    Each group works on a deep copy of the object as `setup` left it: tensors are copied when they are written to, and
    `shared_by_groups`, modules, functions, read-only arrays, locks and connections are shared (see `copying`).
    """

    #: whether a step with this potential may be captured as a CUDA graph (fastsmc.captured): every method is a fixed
    #: sequence of tensor operations on the state and on own tensors, which are updated in place; no value is looked at
    #: on the host. State.tokens then is (N, max_tokens), -1 where nothing is drawn yet, State.step a 0-dim tensor.
    capturable: bool = False
    #: tokens beyond a particle's end that `Engine.continuation_log_prob` may be asked for
    lookahead: int = 0
    #: `logw_next` only shapes the proposal: weights are exact for whatever it gives, and `prefix` is the target's ψ.
    #: Such a group draws, weighs and then resamples.
    proposal_only: bool = False
    #: names of attributes that groups share and nobody writes to after `setup`; those of base classes count too
    shared_by_groups: tuple[str, ...] = ()

    def prepare(self, tokenizer: Any) -> None:
        """Called in the front end, before `lookahead` is read; tokenizer: as `Engine.tokenizer`. Default: nothing."""

    def setup(self, engine: Engine) -> None:
        """Called once, in the worker process, before the first group that uses this object."""

    def reset(self, n_particles: int, prompt: list[int]) -> None:
        """Called when a group starts: per-particle state for `n_particles` empty sequences begins here."""

    def reindex(self, ancestors: Tensor) -> None:
        """(N,) int64: per-particle state of row i becomes a copy of row ancestors[i]."""

    def prefix(self, state: State) -> Tensor:
        """(N,) log ψ_t(s_{1:t}) of unfinished particles."""
        return torch.zeros(state.finished.shape[0], dtype=torch.float64, device=state.finished.device)

    def complete(self, state: State) -> Tensor:
        """(N,) log φ(s); asked at each step at which particles end, about those."""
        return self.prefix(state)

    def logw_next(self, state: State) -> Tensor | Rows | None:
        """(N, V) log ψ_{t+1}(s, v) − log ψ_t(s) for every next token v; None: not used in the proposal."""
        return None

    def __mul__(self, other: Potential) -> Product:
        """ψ = ψ_self · ψ_other."""
        from fastsmc.potentials.product import Product

        return Product(self, other) if isinstance(other, Potential) else NotImplemented


def _what(answer: Any) -> str:
    if not isinstance(answer, Tensor):
        return type(answer).__name__
    layout = "" if answer.layout == torch.strided else f" {answer.layout}"
    return f"{tuple(answer.shape)} {answer.dtype}{layout} on {answer.device}"


def check_scores(potential: Potential, method: str, answer: Any, like: Tensor) -> Tensor:
    """What `prefix` or `complete` answered, (N,) float64 on the device of `like` (N,).

    Raises:
        TypeError: it is no vector of N log weights; names class and method.
    """
    good = isinstance(answer, Tensor) and answer.is_floating_point() and answer.layout == torch.strided
    if not good or answer.shape != like.shape or answer.device != like.device:
        raise TypeError(
            f"{type(potential).__name__}.{method} returned {_what(answer)}; must be a floating-point torch.Tensor of "
            f"shape {tuple(like.shape)} on {like.device}"
        )
    return answer.detach().double()


def check_next(potential: Potential, answer: Any, like: Tensor, vocab_size: int | None = None) -> Tensor | Rows | None:
    """What `logw_next` answered: None, (N, V) or `Rows` on the device of `like` (N,), with columns in a row.

    Args:
        vocab_size: V, where it is known.

    Raises:
        TypeError: it is none of these; names class and method.
    """
    if answer is None:
        return None
    name, n = f"{type(potential).__name__}.logw_next", len(like)
    values = answer.values if isinstance(answer, Rows) else answer
    good = isinstance(values, Tensor) and values.is_floating_point() and values.layout == torch.strided
    good = good and values.dim() == 2 and values.device == like.device and vocab_size in (None, values.shape[-1])
    if not good or (values is answer and len(values) != n):
        of, rows = ("Rows of values ", "M") if isinstance(answer, Rows) else ("", n)
        raise TypeError(
            f"{name} returned {of}{_what(values)}; must be floating-point ({rows}, {vocab_size or 'V'}) on "
            f"{like.device}, or Rows of such"
        )
    values = values.detach()
    if values.stride(1) != 1:
        values = values.contiguous()
    if values is answer or not isinstance(answer, Rows):
        return values
    index = answer.index
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32) or index.device != like.device:
        raise TypeError(f"{name} returned Rows with index {_what(index)}; must be ({n},) torch.int64 on {like.device}")
    if tuple(index.shape) != (n,):
        raise TypeError(f"{name} returned Rows with index {_what(index)}; must be ({n},)")
    return Rows(values, index.long())


def check_rows(potential: Potential, rows: Rows, asked: Tensor) -> Rows:
    """Rows whose index is in range for all particles. TypeError: it was not for one of `asked` (N,) bool."""
    out = (rows.index < 0) | (rows.index >= len(rows.values))
    if bool((out & asked).any()):
        i = int(torch.nonzero(out & asked)[0])
        raise TypeError(
            f"{type(potential).__name__}.logw_next returned index[{i}]={int(rows.index[i])}; must be in [0, "
            f"{len(rows.values)}), the rows of values"
        )
    return Rows(rows.values, rows.index.clamp(0, max(len(rows.values) - 1, 0)))


def answered(potential: Potential) -> set[str]:
    """Which of `prefix`, `complete` and `logw_next` a potential defines.

    Raises:
        ValueError: neither of the first two, so that there is no log φ.
    """
    methods = ("prefix", "complete", "logw_next")
    own = {name for name in methods if getattr(type(potential), name) is not getattr(Potential, name)}
    if not own & {"prefix", "complete"}:
        raise ValueError(f"potential {type(potential).__name__}: defines neither prefix nor complete, so no log φ")
    return own
