"""p0, what vLLM's own sampler would draw from: logits with −inf wherever a request's settings rule a token out.

    allowed ids → min_tokens → bias → (temperature) → min_p → top_k → top_p

That is vLLM's order (v1/sample/sampler.py). It is done on distinct histories, in place, before `ops.weigh` reads the
logits; so everything behind it, log-probs and continuation scores included, is under this p0, renormalised. No full
sort but for rows whose first tokens do not hold the mass that top_p asks for.

A row whose every token is ruled out has no mass: its particles draw nothing, and have weight zero.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.params import SMCParams

#: tokens of a row that top_p looks at first
HEAD = 128
#: how many times as many are looked at next in the rows where these were too few, and so on until the whole row is
GROWTH = 16


class P0:
    """Holds what one group's p0 is, besides the model.

    Args:
        params: of the group.
        early: the tokens that min_tokens rules out at first, as vLLM's `all_stop_token_ids`.

    Attributes:
        restricted: whether there is anything but the temperature.
        truncated: whether there is min_p, top_k or top_p.
    """

    def __init__(self, params: SMCParams, early: Collection[int], device: torch.device) -> None:
        self.temperature, self.top_k, self.top_p = params.temperature, params.top_k, params.top_p
        self.log_min_p = math.log(params.min_p) if params.min_p > 0.0 else -math.inf
        self.min_tokens = params.min_tokens if early else 0
        self._allowed: Tensor | None = None
        self._early: Tensor | None = None
        self.bias: Tensor | None = None
        if params.allowed_token_ids is not None:
            self._allowed = torch.tensor(params.allowed_token_ids, dtype=torch.int64, device=device)
        if self.min_tokens:
            self._early = torch.tensor(sorted(early), dtype=torch.int64, device=device)
        if params.logit_bias:
            self._biased = torch.tensor(list(params.logit_bias), dtype=torch.int64, device=device)
            self.bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
        self.truncated = self.top_k > 0 or self.top_p < 1.0 or params.min_p > 0.0
        self.restricted = self.truncated or any(x is not None for x in (self._allowed, self._early, self.bias))

    def edit(self, logits: Tensor, before: Tensor) -> None:
        """Applies in place what looks at no other token: allowed ids, min_tokens and bias, to (R, V)."""
        if self._allowed is not None:
            kept = torch.full_like(logits, -math.inf)
            kept[:, self._allowed] = logits[:, self._allowed]
            logits.copy_(kept)
        if self._early is not None:
            is_early = (before < self.min_tokens)[:, None]
            logits[:, self._early] = logits[:, self._early].masked_fill(is_early, -math.inf)
        if self.bias is not None:
            logits[:, self._biased] += self.bias


def restrict(logits: Tensor, p0s: Sequence[P0], bounds: Sequence[int], before: Tensor) -> Tensor:
    """Rules tokens out of logits (R, V), in place where dtypes allow, and returns them.

    Rows of groups whose p0 is not restricted are not touched, but that a bias makes float32 of all rows: other bits in
    `ops.weigh`, so groups with a bias are not among others. NaN and +inf stay, for `ops.weigh` to find.

    Args:
        p0s: of each group.
        bounds: rows [bounds[g], bounds[g + 1]) are those of group g.
        before: (R,) int64, how many tokens were generated before the one that a row is about.
    """
    spans = [(p0, *ends) for p0, ends in zip(p0s, itertools.pairwise(bounds), strict=True) if p0.restricted]
    spans = [(p0, begin, end) for p0, begin, end in spans if end > begin]
    if logits.dtype != torch.float32 and any(p0.bias is not None for p0, _, _ in spans):
        logits = logits.float()
    for p0, begin, end in spans:
        p0.edit(logits[begin:end], before[begin:end])
    for run in _runs([span for span in spans if span[0].truncated]):
        counts = [end - begin for _, begin, end in run]
        _truncate(logits[run[0][1] : run[-1][2]], [p0 for p0, _, _ in run], counts)
    return logits


def _runs(spans: list[tuple[P0, int, int]]) -> Iterator[list[tuple[P0, int, int]]]:
    """Puts spans together that follow one another without a row between them."""
    while spans:
        n = next((i for i in range(1, len(spans)) if spans[i][1] != spans[i - 1][2]), len(spans))
        yield spans[:n]
        spans = spans[n:]


def _per_row(values: Any, counts: Sequence[int], device: torch.device) -> Tensor:
    """Makes float64 values of groups those of their rows, `counts` of each."""
    rows = torch.tensor(counts, device=device)
    each = torch.tensor(values, dtype=torch.float64, device=device)
    return each.repeat_interleave(rows, dim=0, output_size=sum(counts))


def _truncate(logits: Tensor, p0s: list[P0], counts: list[int]) -> None:
    """Applies min_p, top_k and top_p to (R, V) in place, the first `counts[0]` rows with p0s[0]. top_p waits for the
    device.

    Tokens as likely as the last of top_k stay. Of those as likely as the last that top_p needs, the first ones stay.
    """
    vocab = logits.shape[1]
    numbers = [[p.temperature, p.log_min_p, p.top_k if 0 < p.top_k < vocab else 0, p.top_p] for p in p0s]
    temperature, log_min_p, top_k, top_p = _per_row(numbers, counts, logits.device).T
    most, by_mass = int(max(row[2] for row in numbers)), any(p.top_p < 1.0 for p in p0s)
    head = logits.topk(min(vocab, max(most, HEAD if by_mass else 1)), dim=1).values.float()
    floor = _round_up(head[:, 0].double() + temperature * log_min_p)
    if most:
        last = head.gather(1, (top_k.long() - 1).clamp(min=0)[:, None])[:, 0]
        floor = torch.where(top_k > 0, torch.maximum(floor, last), floor)
    if most or any(p.log_min_p > -math.inf for p in p0s):
        logits.masked_fill_(logits < floor[:, None], -math.inf)
        head = head.masked_fill(head < floor[:, None], -math.inf)
    if by_mass:
        _keep_mass(logits, head, temperature, top_p)


def _keep_mass(logits: Tensor, head: Tensor, temperature: Tensor, top_p: Tensor) -> None:
    """Keeps in each row the likeliest tokens, up to the one that brings their mass to `top_p` (R,), in place.

    Args:
        head: (R, K) float32, the largest of each row, descending.
    """
    log_mass = ops.weigh(logits, temperature=temperature.contiguous()).lse
    some = (log_mass > -math.inf) & (top_p < 1.0)  # nothing is done to rows of NaN, either
    vocab, rows, n = logits.shape[1], torch.arange(len(logits), device=logits.device), head.shape[1]
    lowest, ties, tied = torch.full_like(top_p, -math.inf).float(), torch.zeros_like(rows), torch.zeros_like(some)
    while True:
        mass = ((head.double() / temperature[rows, None]) - log_mass[rows, None]).exp()
        if n == vocab:  # it is all of the row, whatever the last place of the logarithm
            mass /= mass.sum(1, keepdim=True)
        lowest[rows], ties[rows], tied[rows], known = _find_last(head, mass, top_p[rows], vocab)
        rows = rows[some[rows] & ~known]  # waits for the device
        if not len(rows):
            break
        n = min(vocab, n * GROWTH)
        head = logits[rows].topk(n, dim=1).values.float()
    tied &= some
    rows = tied.nonzero()[:, 0]
    if len(rows):
        part = logits[rows]
        equal = part == lowest[rows, None]
        surplus = equal & (equal.cumsum(1, dtype=torch.int32) > ties[rows, None])
        logits[rows] = part.masked_fill(surplus, -math.inf)
    logits.masked_fill_(logits < torch.where(some, lowest, -math.inf)[:, None], -math.inf)


def _find_last(ordered: Tensor, mass: Tensor, top_p: Tensor, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Finds in descending rows (R, K) with their `mass` the token at which it reaches `top_p` (R,).

    Returns:
        (R,) its value; (R,) how many of that value are needed; (R,) whether there are more; (R,) whether the K tokens
        were enough to know.
    """
    n, total = ordered.shape[1], mass.cumsum(1)
    reached = total >= top_p[:, None]
    at = torch.where(reached.any(1), reached.byte().argmax(1), n - 1)[:, None]
    lowest = ordered.gather(1, at)
    ties = at[:, 0] + 1 - (ordered > lowest).sum(1)
    after = ordered.gather(1, (at + 1).clamp(max=n - 1))
    tied = ((after == lowest) & (at + 1 < n))[:, 0]
    return lowest[:, 0], ties, tied, (reached[:, :-1].any(1) if n < vocab else torch.ones_like(tied))


def _round_up(values: Tensor) -> Tensor:
    """Rounds float64 to the next float32 that is not smaller."""
    near = values.float()
    up = torch.nextafter(near, torch.full_like(near, math.inf))
    return torch.where(near.double() < values, up, near)


def token_log_probs(logits: Tensor, tokens: Tensor, p0s: Sequence[P0], bounds: Sequence[int], before: Tensor) -> Tensor:
    """Computes (R,) float64 log p0 of tokens (R,) int64, −inf where they are ruled out; logits as in `restrict`."""
    counts = [end - begin for begin, end in itertools.pairwise(bounds)]
    if logits.dtype != torch.float32 and len({p0.bias is None for p0 in p0s}) == 2:  # each group as it is alone
        parts = zip(logits.split(counts), tokens.split(counts), p0s, counts, before.split(counts), strict=True)
        return torch.cat([token_log_probs(z, drawn, [p0], [0, n], at) for z, drawn, p0, n, at in parts if n])
    logits = restrict(logits, p0s, bounds, before)
    each = _per_row([p0.temperature for p0 in p0s], counts, logits.device)
    lse = ops.weigh(logits, temperature=each).lse
    z = logits.gather(1, tokens[:, None])[:, 0].double() / each
    return torch.where(lse == -math.inf, -math.inf, z - lse)
