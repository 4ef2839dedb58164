"""llamppl's programs over a fastsmc engine; needs `pip install "fastsmc[llamppl]"`.

    import fastsmc.llamppl

    fastsmc.llamppl.install()

llamppl copies particles in Python, each with a set of the whole vocabulary, and draws from (V,) numbers per particle on
the host. Contexts here share what copies have in common, and tokens of all waiting particles are drawn in one batch
where the rows are. Nothing else in fastsmc imports llamppl.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Collection
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from fastsmc.genlm import FastsmcLM  # before llamppl: genlm's import is contained
from fastsmc.genlm.containment import check_versions

check_versions("llamppl")

import llamppl  # noqa: E402
import llamppl.llms  # noqa: E402
from llamppl.distributions.lmcontext import LMContext, LMNextToken, LMTokenMask, NullMask  # noqa: E402
from llamppl.llms import CachedCausalLM, Masks, Token  # noqa: E402

__all__ = ["install"]


def install() -> None:
    """Has llamppl run over fastsmc engines, in this process from now on.

    `CachedCausalLM.from_pretrained(name, backend="vllm", engine_opts=…)` starts an engine, with arguments of
    `fastsmc.LLM`; `CachedCausalLM(FastsmcLM(llm))` takes one that runs. What `LMContext(lm, …)` and
    `LMContext.create(lm, …)` make is a `Context` if `lm` is of either kind. Language models of other backends, and
    subclasses of LMContext, stay as llamppl has them.
    """
    llamppl.llms.AsyncVirtualLM = llamppl.AsyncVirtualLM = FastsmcLM
    llamppl.llms.VLLM_AVAILABLE = llamppl.VLLM_AVAILABLE = True
    llamppl.llms.Masks = llamppl.Masks = SharedMasks
    LMContext.__new__ = _new_context
    LMContext.create = classmethod(_create_context)


def _new_context(cls: type, lm: CachedCausalLM | None = None, *_: Any, **__: Any) -> Any:
    return object.__new__(Context if cls is LMContext and _is_ours(lm) else cls)


_create = LMContext.create.__func__


async def _create_context(cls: type, lm: CachedCausalLM, *args: Any, **settings: Any) -> Any:
    ours = cls is LMContext and _is_ours(lm)
    return await (Context.create(lm, *args, **settings) if ours else _create(cls, lm, *args, **settings))


def _is_ours(lm: CachedCausalLM | None) -> bool:
    return lm is not None and isinstance(lm.model, FastsmcLM)


# --------------------------------------------------------------------------------------------------------------- masks
class Mask(set):
    """Is a set of token ids that nobody changes, so that copies of a particle share it.

    `mask |= ids` and the like make another set; methods that would change this one raise TypeError.
    """

    def __hash__(self) -> int:  # type: ignore[override]  # a set's may change
        return id(self)

    def __deepcopy__(self, memo: dict) -> Mask:
        return self

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("a mask of lm.masks is shared by all particles: change a copy, set(mask)")

    add = clear = discard = pop = remove = update = _refuse
    difference_update = intersection_update = symmetric_difference_update = _refuse

    def _leave(self, other: Any) -> Any:
        return NotImplemented  # Python then makes another set

    __iand__ = __ior__ = __isub__ = __ixor__ = _leave


class SharedMasks(Masks):
    """Is llamppl's `lm.masks`, each of them a `Mask`."""

    def __init__(self, lm: CachedCausalLM) -> None:
        super().__init__(lm)
        for name, value in vars(self).items():
            if isinstance(value, set):
                setattr(self, name, Mask(value))
        self.token_length_mask = functools.cache(self._make_length_mask)

    def _make_length_mask(self, min: int | None = None, max: int | None = None) -> Mask:
        return Mask(super().token_length_mask(min, max))

    def __deepcopy__(self, memo: dict) -> SharedMasks:
        return self


def _marks(mask: Collection[int], size: int, device: torch.device) -> Tensor:
    """Marks the token ids of a mask, (size,) bool. Of a `Mask` or frozenset, which do not change, it does so once."""
    if isinstance(mask, (Mask, frozenset)):
        return _marks_once(mask, size, device)
    return _marks_now(mask, size, device)


def _marks_now(mask: Collection[int], size: int, device: torch.device) -> Tensor:
    ids = np.fromiter(mask, np.int64, len(mask))
    marks = np.zeros(size, bool)
    marks[ids[(ids >= 0) & (ids < size)]] = True
    return torch.from_numpy(marks).to(device)


_marks_once = functools.lru_cache(maxsize=256)(_marks_now)


# ------------------------------------------------------------------------------------------------------------ contexts
class Row:
    """Is a row of log p of next tokens, which contexts share and nobody changes.

    Attributes:
        log_probs: (V,) float32.
    """

    def __init__(self, log_probs: Tensor) -> None:
        self.log_probs = log_probs

    @functools.cached_property
    def probs(self) -> Tensor:
        """p, (V,) float64."""
        return self.log_probs.double().exp()

    def __deepcopy__(self, memo: dict) -> Row:
        return self


class Context(LMContext):
    """Is an LMContext whose row and mask lie where the engine has them, and are shared by copies.

    A mask is (V,) bool. As in llamppl, token ids behind `lm.str_vocab`, which a model may have, are in no mask and
    are never ruled out.
    """

    lm: CachedCausalLM
    tokens: list[int]

    def __init__(
        self, lm: CachedCausalLM, prompt: str, temp: float = 1.0, show_prompt: bool = False, show_eos: bool = True
    ) -> None:
        self._init_common(lm, prompt, temp, show_prompt, show_eos)
        self._begin_token(lm.model.next_token_logprobs_sync(self.tokens))

    @classmethod
    async def create(
        cls, lm: CachedCausalLM, prompt: str, temp: float = 1.0, show_prompt: bool = False, show_eos: bool = True
    ) -> Context:
        made = object.__new__(cls)
        made._init_common(lm, prompt, temp, show_prompt, show_eos)
        made._begin_token(await lm.model.next_token_logprobs(made.tokens))
        return made

    def _begin_token(self, log_probs: Tensor) -> None:
        # as it comes, a row is part of those of all who waited, and would keep them all
        self._row = Row(log_probs.clone() if self.temp == 1.0 else (log_probs / self.temp).log_softmax(-1))
        self._allowed: Tensor | None = None  # (V,) bool; None: all
        self._log_mass = 0.0  # that is subtracted from the row

    async def append(self, token_id: int) -> None:
        """Appends a token and gets the row behind it."""
        self.tokens.append(token_id)
        self._begin_token(await self.lm.model.next_token_logprobs(self.tokens))

    def log_prob(self, token_id: int) -> float:
        """Tells log p of a token, of those that the mask leaves."""
        if self._allowed is not None and not self._allowed[token_id]:
            return -math.inf
        return float(self._row.log_probs[token_id]) - self._log_mass

    def masked_row(self) -> Tensor:
        """Makes (V,) float32 log p of the next token, without its normalisation by the mask."""
        row = self._row.log_probs
        return row if self._allowed is None else row.masked_fill(~self._allowed, -math.inf)

    @property
    def next_token_logprobs(self) -> np.ndarray:
        """(V,) float32 on the host, to be read."""
        out = (self.masked_row() - self._log_mass).cpu().numpy()
        out.flags.writeable = False
        return out

    @property
    def model_mask(self) -> set[int]:
        """The token ids that have not been ruled out."""
        every = self.lm.masks.ALL_TOKENS
        return every if self._allowed is None else set(self._allowed[: len(every)].nonzero()[:, 0].tolist())

    @model_mask.setter
    def model_mask(self, mask: set[int]) -> None:
        if mask is not self.lm.masks.ALL_TOKENS:
            raise AttributeError("model_mask: is the context's own; observe mask_dist(mask) instead")
        self._allowed = None

    def split(self, mask: Collection[int]) -> tuple[Tensor, Tensor]:
        """Splits what is left of lm.str_vocab into tokens in a mask and others, (V,) bool each."""
        row = self._row.log_probs
        inside = _marks(mask, len(row), row.device)
        left = _marks(self.lm.masks.ALL_TOKENS, len(row), row.device)
        if self._allowed is not None:
            left = left & self._allowed
        return left & inside, left & ~inside

    def without(self, tokens: Tensor) -> Tensor:
        """Marks what is left without some tokens, (V,) bool."""
        return ~tokens if self._allowed is None else self._allowed & ~tokens

    def mass_of(self, tokens: Tensor) -> float:
        """Adds up the probabilities that tokens (V,) bool have in the whole row."""
        return float(self._row.probs @ tokens.double())

    def rule_out(self, tokens: Tensor, mass: float) -> float:
        """Rules out tokens (V,) bool, so that `mass` of the whole row stands for all that is left.

        Returns:
            the log of its probability until now.
        """
        self._allowed, before = self.without(tokens), self._log_mass
        self._log_mass = math.log(mass) if mass else -math.inf
        return self._log_mass - before

    def next_token(self) -> NextToken:
        return NextToken(self)

    def mask_dist(self, mask: Collection[int]) -> TokenMask:
        return TokenMask(self, mask)

    def __deepcopy__(self, memo: dict) -> Context:
        memo[id(self.tokens)] = list(self.tokens)
        if self._allowed is not None:
            memo[id(self._allowed)] = self._allowed  # nobody changes it
        made = object.__new__(type(self))
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


class NextToken(LMNextToken):
    """Is the law of a context's next token."""

    ctx: Context

    async def log_prob(self, x: Token | int) -> float:
        log_prob = self.ctx.log_prob(int(x))
        await self.ctx.append(int(x))
        return log_prob

    async def sample(self) -> tuple[Token, float]:
        ctx = self.ctx
        token_id = await ctx.lm.model.draw(ctx.masked_row())
        log_prob = ctx.log_prob(token_id)
        await ctx.append(token_id)
        return Token(ctx.lm, token_id, ctx.lm.tokenizer.convert_ids_to_tokens(token_id)), log_prob


class TokenMask(LMTokenMask):
    """Is the law of whether a context's next token is in a mask."""

    ctx: Context

    async def sample(self) -> tuple[bool, float]:
        ctx = self.ctx
        inside, outside = ctx.split(self.mask)
        no, yes = ctx.mass_of(outside), ctx.mass_of(ctx.without(outside))
        if np.random.rand() * (no + yes) < no:
            return False, ctx.rule_out(inside, no)
        return True, ctx.rule_out(outside, yes)

    async def log_prob(self, v: bool) -> float:
        inside, outside = self.ctx.split(self.mask)
        good, bad = (inside, outside) if v else (outside, inside)
        if not good.any():
            raise NullMask("Unable to compute log probability of mask that rules out all tokens.")
        return self.ctx.rule_out(bad, self.ctx.mass_of(good))
