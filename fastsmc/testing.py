"""`check_potential`: whether a potential keeps the contract of docs/potentials.md, for those who write one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cloudpickle
import torch
from torch import Tensor

from fastsmc.potentials import Potential
from fastsmc.smc.engine import GroupEngine, SMCError, set_up
from fastsmc.smc.replay import Replay
from fastsmc.values import check_int

#: how far two answers to the same question may be apart, relative and absolute: batches of other sizes round otherwise
RTOL, ATOL = 1e-5, 1e-6


class Scores(NamedTuple):
    """Holds what a potential said of N sequences, NaN where it was not asked.

    Attributes:
        log_psi: (T + 1, N) float64, `prefix` after 0, 1, … tokens, of unfinished sequences.
        by_next: (T + 1, N) float64, the first of these with the changes of `logw_next` added up; also at the end.
        log_phi: (N,) float64, `complete`.
    """

    log_psi: Tensor
    by_next: Tensor
    log_phi: Tensor


def check_potential(
    potential: Potential,
    engine: GroupEngine,
    sequences: Sequence[Sequence[int]] | None = None,
    *,
    prompt: Sequence[int] = (0,),
    max_tokens: int = 8,
    stop_token_ids: Sequence[int] = (),
    n_sequences: int = 64,
    seed: int = 0,
) -> Scores:
    """Checks a potential on sequences, asked about one by one and all at once, by itself and after resamplings.

    - It travels to a worker: `cloudpickle` takes it, `prepare` and `setup` run, and groups get copies that are apart.
    - Answers have type, shape and device of the contract, and no NaN or +inf.
    - They depend on the sequence alone: not on its place, its neighbours, or which ancestors `reindex` took it from.
    - `logw_next` is the change of `prefix`, unless it is `proposal_only`.
    - What is ruled out stays so: where log ψ_t = −inf, log φ = −inf. Else the samples never reach a part of the target.
    - A token that `allows` refuses has log ψ = −inf.

    Args:
        potential: as it would be given to `LLM.smc`; it is not changed.
        engine: `GroupEngine(tokenizer, vocab_size=V)`, with `hidden_size` for a potential that looks at hidden states;
            these, and log-probs, are random numbers here, the same for equal sequences.
        sequences: lists of token ids, each ended by a stop token or by its length, max_tokens; None: `n_sequences`
            random ones, drawn among what `logw_next` leaves where it leaves anything.
        prompt: token ids.
        max_tokens, stop_token_ids: of the group.
        n_sequences, seed: of random sequences and of the resamplings.

    Returns:
        What was said of the sequences, for further checks.

    Raises:
        AssertionError: the contract is broken: which method, after which tokens, and how.
        ValueError: an argument is wrong, or the potential asks the model (`lookahead`), which is not here.
        SMCError: `setup` failed.
    """
    if potential.lookahead:
        raise ValueError(
            f"potential={potential!r}: asks the model for {potential.lookahead} tokens; there is none here"
        )
    check_int("max_tokens", max_tokens, 1)
    sent = cloudpickle.loads(cloudpickle.dumps(potential))
    sent.prepare(engine.tokenizer)
    generator = torch.Generator().manual_seed(seed)
    asking = _Asking(set_up(sent, engine), engine, list(prompt), max_tokens, frozenset(stop_token_ids), generator)
    if sequences is None:
        rows = []
        check_int("n_sequences", n_sequences, 1)
    else:
        rows = [list(row) for row in sequences]
        for i, row in enumerate(rows):
            ends = [t for t, v in enumerate(row, 1) if v in asking.stops or t == max_tokens]
            if not row or ends[:1] != [len(row)] or not all(0 <= v < engine.vocab_size for v in row):
                raise ValueError(
                    f"sequences[{i}]={row}: must be token ids in [0, {engine.vocab_size}) that end with the first stop "
                    f"token or with token {max_tokens}"
                )
        if not rows:
            raise ValueError("sequences=[]: must hold at least one")
    try:
        return asking.check(rows or asking.draw(n_sequences))
    except SMCError as error:  # as a group's: it names class, method and step
        raise AssertionError(str(error)) from error


class _Asking:
    """Asks copies of a potential about sequences, and compares what they say."""

    def __init__(
        self, origin: Potential, engine: GroupEngine, prompt: list[int], max_tokens: int, stops: frozenset[int],
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        self.origin, self.engine, self.prompt, self.generator = origin, engine, prompt, generator
        self.max_tokens, self.stops, self.name = max_tokens, stops, type(origin).__name__
        self._of_history: dict[tuple[int, ...], Tensor] = {}  # a log-prob and a hidden state of each

    def replay(self, rows: list[list[int]]) -> Replay:
        """Makes a group of sequences, with a copy of its own."""
        return Replay(
            self.origin, self.engine, rows, prompt=self.prompt, max_tokens=self.max_tokens, stops=self.stops,
            numbers=self.numbers_of,
        )  # fmt: skip

    def numbers_of(self, row: Sequence[int]) -> Tensor:
        key = tuple(row)
        if key not in self._of_history:
            numbers = torch.randn(1 + (self.engine.hidden_size or 0), generator=self.generator)
            numbers[0] = -numbers[0].abs()
            self._of_history[key] = numbers
        return self._of_history[key]

    def broken(self, method: str, row: Sequence[int], what: str) -> AssertionError:
        return AssertionError(f"{self.name}.{method} after tokens {list(row)}: {what}")

    def draw(self, n: int) -> list[list[int]]:
        """Draws n sequences among what `logw_next` leaves."""
        group, vocab = self.replay([[] for _ in range(n)]), self.engine.vocab_size
        while not group.over:
            says, tokens = group.ask_next(), torch.randint(vocab, (n,), generator=self.generator).tolist()
            for i, row in enumerate(group.rows):
                if group.lengths[i] > group.t:
                    at, good = torch.full((vocab,), i, device=self.engine.device), []
                    if says is not None:
                        left = says.of_tokens(at, torch.arange(vocab, device=self.engine.device)) > -math.inf
                        good = left.nonzero().flatten().tolist()
                    row.append(good[tokens[i] % len(good)] if good else tokens[i])
            group.end_step()
        return group.rows

    def check(self, rows: list[list[int]]) -> Scores:
        """Does all that `check_potential` says."""
        group = self.replay(rows)
        first, _ = group.ask()
        log_psi, by_next, log_phi = [first], [first], torch.full_like(first, math.nan)
        has_next, dead = True, first == -math.inf
        while not group.over:
            asked = self._of_next(group)
            has_next &= asked is not None
            total = by_next[-1] + (math.nan if asked is None else asked)
            refused = group.refused()
            group.end_step()
            psi, phi = group.ask()
            log_phi = torch.where(phi.isnan(), log_phi, phi)
            self._check_step(group, psi, phi, dead, total if has_next else None, refused)
            dead |= psi == -math.inf
            log_psi.append(psi)
            by_next.append(total)
        said = Scores(torch.stack(log_psi), torch.stack(by_next), log_phi)
        rows = [row[:n] for row, n in zip(rows, group.lengths, strict=True)]
        chosen = list(range(len(rows)))[:: -(-len(rows) // 16)]
        self._compare([(self.replay([rows[i]]), [i]) for i in chosen], said, "asked alone")
        self._compare([(self.replay(list(rows)), list(range(len(rows))))], said, "after reindex", moves=True)
        return said

    def _of_next(self, group: Replay) -> Tensor | None:
        """Asks `logw_next` what the next token of each sequence changes, NaN for those that have ended."""
        says = group.ask_next()
        if says is None:
            return None
        at = torch.tensor([n > group.t for n in group.lengths])
        tokens = torch.tensor(
            [row[group.t] if n > group.t else 0 for row, n in zip(group.rows, group.lengths, strict=True)]
        )
        device = self.engine.device
        values = says.of_tokens(torch.arange(len(tokens), device=device), tokens.to(device)).cpu()
        for i in (at & (values.isnan() | (values == math.inf))).nonzero().flatten().tolist():
            raise self.broken(
                "logw_next", group.rows[i][: group.t], f"says {values[i].item()} of token {tokens[i].item()}"
            )
        return torch.where(at, values, math.nan)

    def _check_step(
        self, group: Replay, psi: Tensor, phi: Tensor, dead: Tensor, total: Tensor | None, refused: Tensor
    ) -> None:
        """Checks one step's answers against each other."""
        value = torch.where(phi.isnan(), psi, phi)  # NaN: it had ended earlier
        method = ["prefix" if gone else "complete" for gone in phi.isnan().tolist()]
        for i, row in enumerate(group.rows):
            row, what = row[: group.t], value[i].item()
            if math.isnan(what) or what == -math.inf:
                continue
            if dead[i] and method[i] == "complete":
                raise self.broken("complete", row, f"says {what}, where log ψ had been −inf before")
            if refused[i]:
                raise self.broken("allows", row[:-1], f"refuses token {row[-1]}, of which {method[i]} says {what}")
            if total is not None and total[i] == -math.inf and not self.origin.proposal_only:
                raise self.broken("logw_next", row[:-1], f"rules out token {row[-1]}, of which {method[i]} says {what}")
        if total is None or self.origin.proposal_only:
            return
        for i in (~psi.isnan() & ~dead).nonzero().flatten().tolist():
            if not torch.isclose(total[i], psi[i], rtol=RTOL, atol=ATOL):
                row = group.rows[i][: group.t]
                change = f"token {row[-1]} takes log ψ to {total[i].item():.6g}, and prefix says {psi[i].item():.6g}"
                raise self.broken("logw_next", row[:-1], change)

    def _compare(self, groups: list[tuple[Replay, list[int]]], said: Scores, how: str, moves: bool = False) -> None:
        """Asks again, groups in turn: they must hear what was `said` of their sequences, by the numbers beside them."""
        for t in range(self.max_tokens + 1):
            for g, (group, numbers) in enumerate(groups):
                if group.t < t:
                    continue  # it is over
                for method, got in zip(("prefix", "complete"), group.ask(), strict=True):
                    want = said.log_psi[t, numbers] if method == "prefix" else said.log_phi[numbers]
                    want = torch.where(got.isnan(), math.nan, want)
                    self._check_same(method, group, got, want, how)
                if moves:
                    numbers = self._move(group, numbers)
                if group.over:
                    continue
                change, want = self._of_next(group), said.by_next[t + 1, numbers] - said.by_next[t, numbers]
                if change is not None:
                    change = torch.where(want.isnan(), want, change)  # of −inf nothing is known
                    self._check_same("logw_next", group, change, want, how)
                if moves:
                    numbers = self._move(group, numbers)
                groups[g] = group, numbers
                group.end_step()

    def _move(self, group: Replay, numbers: list[int]) -> list[int]:
        ancestors = torch.randint(len(numbers), (len(numbers),), generator=self.generator)
        group.move(ancestors)
        return [numbers[a] for a in ancestors.tolist()]

    def _check_same(self, method: str, group: Replay, got: Tensor, want: Tensor, how: str) -> None:
        far = ~torch.isclose(got, want, rtol=RTOL, atol=ATOL, equal_nan=True)
        for i in far.nonzero().flatten().tolist():
            what = f"says {got[i].item():.6g} {how}, and {want[i].item():.6g} among all sequences"
            raise self.broken(method, group.rows[i][: group.t], what)
