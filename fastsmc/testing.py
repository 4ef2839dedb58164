"""`check_potential`: whether a potential keeps the contract of docs/potentials.md, for those who write one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cloudpickle
import torch
from torch import Tensor

from fastsmc.params import SMCParams
from fastsmc.potentials import Potential, State
from fastsmc.potentials.answers import NextRows
from fastsmc.potentials.copying import own_copy
from fastsmc.smc.asking import Asker
from fastsmc.smc.engine import GroupEngine, SMCError, set_up
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
        group, vocab = _Group(self, [[] for _ in range(n)]), self.engine.vocab_size
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
        group = _Group(self, rows)
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
        self._compare([(_Group(self, [rows[i]]), [i]) for i in chosen], said, "asked alone")
        self._compare([(_Group(self, list(rows)), list(range(len(rows))))], said, "after reindex", moves=True)
        return said

    def _of_next(self, group: _Group) -> Tensor | None:
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
        self, group: _Group, psi: Tensor, phi: Tensor, dead: Tensor, total: Tensor | None, refused: Tensor
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

    def _compare(self, groups: list[tuple[_Group, list[int]]], said: Scores, how: str, moves: bool = False) -> None:
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

    def _move(self, group: _Group, numbers: list[int]) -> list[int]:
        ancestors = torch.randint(len(numbers), (len(numbers),), generator=self.generator)
        group.move(ancestors)
        return [numbers[a] for a in ancestors.tolist()]

    def _check_same(self, method: str, group: _Group, got: Tensor, want: Tensor, how: str) -> None:
        far = ~torch.isclose(got, want, rtol=RTOL, atol=ATOL, equal_nan=True)
        for i in far.nonzero().flatten().tolist():
            what = f"says {got[i].item():.6g} {how}, and {want[i].item():.6g} among all sequences"
            raise self.broken(method, group.rows[i][: group.t], what)


class _Group:
    """Steps a copy of a potential through sequences, as an engine does with particles.

    Attributes:
        asker: asks the copy.
        rows: sequences, whole.
        lengths: of those that have ended; of the others more than any.
        t: tokens so far.
    """

    def __init__(self, asking: _Asking, rows: list[list[int]]) -> None:
        self.asking, self.rows, self.t = asking, rows, 0
        params = SMCParams(n_particles=len(rows), max_tokens=asking.max_tokens)
        copy = own_copy(asking.origin, asking.engine)
        self.asker = Asker(copy, asking.origin, params, asking.prompt, asking.stops, asking.engine)
        self.asker.call("reset", len(rows), list(asking.prompt))
        self.lengths = [asking.max_tokens + 1] * len(rows)

    @property
    def over(self) -> bool:
        return max(self.lengths) <= self.t

    def state(self, seen: int) -> State:
        """Makes the state after t tokens; the model has seen `seen` of them."""
        asking, t, n, state = self.asking, self.t, len(self.rows), State()
        device = asking.engine.device
        cut = [row[: min(t, end)] for row, end in zip(self.rows, self.lengths, strict=True)]
        state.step, state.prompt = t, list(asking.prompt)
        state.max_tokens, state.stop_token_ids = asking.max_tokens, asking.stops
        padded = [row + [-1] * (t - len(row)) for row in cut]
        state.tokens = torch.tensor(padded, dtype=torch.int64, device=device).reshape(n, t)
        state.last_tokens = state.tokens[:, -1].clone() if t else None
        state.lengths = torch.tensor([len(row) for row in cut], device=device)
        state.finished = torch.tensor([end <= t for end in self.lengths], device=device)
        log_probs = [
            [asking.numbers_of(row[: i + 1])[0] for i in range(len(row))] + [0.0] * (t - len(row)) for row in cut
        ]
        state.token_log_probs = torch.tensor(log_probs, dtype=torch.float64, device=device).reshape(n, t)
        state.log_prob = state.token_log_probs.sum(1)
        histories = [tuple(row[:seen]) if end > seen else None for row, end in zip(cut, self.lengths, strict=True)]
        distinct = list(dict.fromkeys(history for history in histories if history is not None))
        rows = [-1 if history is None else distinct.index(history) for history in histories]
        state.rows = torch.tensor(rows, device=device)
        state.hidden = state.hidden_rows = None
        if asking.engine.hidden_size:
            state.hidden_rows = torch.stack([asking.numbers_of(history)[1:] for history in distinct]).to(device)
            state.hidden = state.hidden_rows[state.rows.clamp(min=0)] * (state.rows >= 0)[:, None]
        return state

    def ask(self) -> tuple[Tensor, Tensor]:
        """Asks `prefix` of unfinished sequences, `complete` of those that have just ended: (N,) float64, else NaN."""
        state, answers = self.state(max(self.t - 1, 0)), []
        just = torch.tensor([end == self.t for end in self.lengths])
        for method, about in (("prefix", ~state.finished.cpu()), ("complete", just)):
            values = torch.full((len(self.rows),), math.nan, dtype=torch.float64)
            if bool(about.any()):
                answer = self.asker.scores(method, state).cpu()
                for i in (about & (answer.isnan() | (answer == math.inf))).nonzero().flatten().tolist():
                    raise self.asking.broken(method, self.rows[i][: self.t], f"says {answer[i].item()}")
                values = torch.where(about, answer, math.nan)
            answers.append(values)
        return answers[0], answers[1]

    def ask_next(self) -> NextRows | None:
        """Asks `logw_next`; None: it does not say."""
        state = self.state(self.t)
        says = self.asker.next_rows(state, self.asking.engine.vocab_size)
        if says is None:
            return None
        for matrix, index in ((says.log_psi, says.psi_rows), (says.mask, says.mask_rows)):
            if matrix is not None and index is not None:
                bad = ~state.finished & ((index < 0) | (index >= len(matrix)))
                for i in bad.nonzero().flatten().tolist():
                    what = f"index {index[i].item()} must be in [0, {len(matrix)})"
                    raise self.asking.broken("logw_next", self.rows[i][: self.t], what)
        return says

    def refused(self) -> Tensor:
        """Asks `allows` about the next token of each unfinished sequence: (N,) bool, those that are refused."""
        refused = torch.zeros(len(self.rows), dtype=torch.bool)
        if self.asker.conditions:
            going = [i for i, end in enumerate(self.lengths) if end > self.t]
            particles, device = torch.tensor(going), self.asking.engine.device
            tokens = torch.tensor([self.rows[i][self.t] for i in going])
            refused[particles] = ~self.asker.allows(self.state(self.t), particles.to(device), tokens.to(device)).cpu()
        return refused

    def end_step(self) -> None:
        """Goes on by one token, and finds who ends with it."""
        self.t += 1
        asking = self.asking
        for i, row in enumerate(self.rows):
            if self.lengths[i] > self.t and (self.t == asking.max_tokens or row[self.t - 1] in asking.stops):
                self.lengths[i] = self.t
        if self.asker.stops:
            told = self.asker.stop(self.state(self.t - 1)).tolist()
            self.lengths = [min(end, self.t) if stop else end for end, stop in zip(self.lengths, told, strict=True)]

    def move(self, ancestors: Tensor) -> None:
        """Takes sequences from others, as a resampling does."""
        self.asker.call("reindex", ancestors.to(self.asking.engine.device))
        self.rows = [self.rows[a] for a in ancestors.tolist()]
        self.lengths = [self.lengths[a] for a in ancestors.tolist()]
