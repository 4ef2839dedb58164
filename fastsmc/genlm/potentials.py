"""Potentials of genlm-control as fastsmc's, and fastsmc's as genlm-control's."""

from __future__ import annotations

import asyncio
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from genlm.backend.tokenization import Token
from genlm.control import Potential as GenlmBase
from genlm.control import PromptedLLM
from genlm.control.potential.coerce import Coerced
from genlm.control.potential.product import Product as GenlmProduct
from torch import Tensor

from fastsmc.automata.language import DEAD
from fastsmc.genlm.automata import ByteWeights, GenlmAutomaton, compiled, just_ended, weighted
from fastsmc.genlm.vocabulary import held, packed, unpacked, unwrapped, without_batches
from fastsmc.potentials import Engine, Potential, Product, Rows, State
from fastsmc.potentials.base import stops
from fastsmc.smc.engine import GroupEngine, set_up
from fastsmc.smc.replay import Replay
from fastsmc.values import check_int

#: what to do with what cannot be translated
ADVICE = "run the program as it is, over FastsmcLM"
#: of an automaton with weights that stay on the device, each of V float64
MAX_ROWS = 64


def distinct_histories(state: State, about: Tensor) -> tuple[list[tuple[int, ...]], Tensor]:
    """Lists the distinct histories of particles `about` (N,) bool, without stop tokens; and (N,) int64, each
    particle's, −1 for others."""
    distinct: dict[tuple[int, ...], int] = {}
    index = []
    for row, here in zip(state.tokens.tolist(), about.tolist(), strict=True):
        ids = tuple(v for v in row if v >= 0)
        if ids and ids[-1] in state.stop_token_ids:
            ids = ids[:-1]
        index.append(distinct.setdefault(ids, len(distinct)) if here else -1)
    return list(distinct), torch.tensor(index, device=state.finished.device)


class GenlmPotential(Potential):
    """Is a potential of genlm-control, of the tokens of the engine's model, asked on the host.

    Each distinct history is asked about once per step and method, in one batch. The program's coroutines run in a
    thread of this process that has an event loop of its own. Stop tokens are one symbol, genlm's EOS.
    """

    per_particle = ()
    shared_by_groups: tuple[str, ...] = ("of", "_tokens", "_ids")

    def __init__(self, of: GenlmBase) -> None:
        self.of = without_batches(of)
        self._tokens = {token.token_id: token for token in of.vocab}

    def __reduce__(self) -> tuple:
        return _received, (type(self), packed(self.of))

    def setup(self, engine: Engine) -> None:
        ids = [token.token_id for token in self.of.vocab]
        if max(ids) >= engine.vocab_size:
            raise ValueError(f"{self.of!r}: has token {max(ids)}; the model's vocabulary has {engine.vocab_size}")
        self._ids, self._vocab_size = torch.tensor(ids, device=engine.device), engine.vocab_size

    def prefix(self, state: State) -> Tensor:
        return self.scores(state, ~state.finished, "prefix")

    def complete(self, state: State) -> Tensor:
        return self.scores(state, just_ended(state), "complete")

    def logw_next(self, state: State) -> Rows:
        contexts, index = self._contexts(state, ~state.finished)
        values = torch.full((max(1, len(contexts)), self._vocab_size), -math.inf, dtype=torch.float64)
        # of a context without weight genlm-control's `logw_next` says nothing
        alive = [i for i, w in enumerate(self.ask("prefix", contexts)) if w > -math.inf]
        if alive:
            told = _run(self.of.batch_logw_next([contexts[i] for i in alive])).weights
            weights = torch.as_tensor(told, dtype=torch.float64, device="cpu")
            values[torch.tensor(alive)[:, None], self._ids.cpu()] = weights[:, :-1]
            for token in state.stop_token_ids:
                values[alive, token] = weights[:, -1]
        return Rows(values.to(self._ids.device), index.clamp(min=0))

    def _contexts(self, state: State, about: Tensor) -> tuple[list[list[Token] | None], Tensor]:
        """Lists the distinct histories of particles `about` (N,) bool, None for one that holds a token that the
        potential does not know; and (N,) int64, each particle's, −1 for others."""
        histories, index = distinct_histories(state, about)
        return list(map(self.context, histories)), index

    def context(self, ids: Sequence[int]) -> list[Token] | None:
        """Makes a context of token ids; None: the potential does not know one of them."""
        try:
            return [self._tokens[v] for v in ids]
        except KeyError:
            return None

    def ask(self, method: str, contexts: Sequence[list[Token] | None]) -> np.ndarray:
        """Asks "prefix" or "complete" in a batch: (R,) log weights, −inf of what the potential does not know."""
        out, known = np.full(len(contexts), -math.inf), [i for i, each in enumerate(contexts) if each is not None]
        if known:
            out[known] = _run(getattr(self.of, f"batch_{method}")([contexts[i] for i in known]))
        return out

    def scores(self, state: State, about: Tensor, method: str) -> Tensor:
        """Asks "prefix" or "complete" of the histories of particles `about` (N,) bool: (N,) float64, 0 for others."""
        contexts, index = self._contexts(state, about)
        values = torch.tensor(np.append(self.ask(method, contexts), 0.0), dtype=torch.float64)
        return values.to(index.device)[index]  # −1: the last, of no history


class WeightedAutomaton(GenlmPotential):
    """Is a coerced `WFSA` of genlm-control, walked over bytes on the host: one row per state instead of per history."""

    shared_by_groups = ("_weights",)

    def __init__(self, of: GenlmBase, weights: ByteWeights) -> None:
        super().__init__(of)
        self._weights = weights

    def __reduce__(self) -> tuple:
        return _received, (type(self), packed(self.of), self._weights)

    def setup(self, engine: Engine) -> None:
        super().setup(engine)
        self._rows: OrderedDict[tuple[int, frozenset[int]], Tensor] = OrderedDict()
        longest = max(map(len, self.of.vocab))
        padded = b"".join(bytes(token).ljust(longest, b"\0") for token in self.of.vocab)
        self._bytes = np.frombuffer(padded, np.uint8).reshape(-1, longest)
        self._n_bytes = np.array([len(token) for token in self.of.vocab])

    def ask(self, method: str, contexts: Sequence[list[Token] | None]) -> np.ndarray:
        ends = [self._walk(context) for context in contexts]
        return np.array([
            w if method == "prefix" or state == DEAD else w + self._weights.final[state] for state, w in ends
        ])  # fmt: skip

    def logw_next(self, state: State) -> Rows:
        contexts, index = self._contexts(state, ~state.finished)
        at = [self._walk(context)[0] for context in contexts] or [DEAD]
        distinct = {each: i for i, each in enumerate(dict.fromkeys(at))}
        rows = torch.tensor([distinct[each] for each in at], device=index.device)
        return Rows(torch.stack([self._row(each, state.stop_token_ids) for each in distinct]), rows[index.clamp(min=0)])

    def _walk(self, context: list[Token] | None) -> tuple[int, float]:
        """Follows the bytes of a context: the state, DEAD if none, and the log weight of the beginning."""
        if context is None:
            return DEAD, -math.inf
        at, (table, steps, _, total) = 0, self._weights
        for byte in b"".join(context):
            at, total = table[at, byte], total + steps[at, byte]
            if at == DEAD:
                break
        return int(at), float(total)

    def _row(self, at: int, stop_token_ids: frozenset[int]) -> Tensor:
        """Makes the changes of the log weight by all next tokens at a state, (V,) float64, or finds them."""
        key = at, stop_token_ids
        if key not in self._rows:
            table, steps, final, _ = self._weights
            values, states = np.zeros(len(self._n_bytes)), np.full(len(self._n_bytes), at)
            for i, column in enumerate(self._bytes.T):
                (here,) = np.nonzero((self._n_bytes > i) & (states != DEAD))
                values[here] += steps[states[here], column[here]]
                states[here] = table[states[here], column[here]]
            values[states == DEAD] = -math.inf
            row = np.full(self._vocab_size, -math.inf)
            row[self._ids.cpu().numpy()] = values
            row[sorted(stop_token_ids)] = -math.inf if at == DEAD else final[at]
            self._rows[key] = torch.from_numpy(row).to(self._ids.device)
            if len(self._rows) > MAX_ROWS:
                self._rows.popitem(last=False)
        self._rows.move_to_end(key)
        return self._rows[key]


def _received(kind: type[GenlmPotential], light: GenlmBase, *arguments: Any) -> GenlmPotential:
    return kind(unpacked(light), *arguments)


#: a potential of genlm-control as fastsmc has it
Translated: TypeAlias = GenlmPotential | GenlmAutomaton


def as_potential(potential: GenlmBase) -> Potential:
    """Makes a potential for `LLM.smc` of one of genlm-control, over the tokens of the engine's model.

    A coerced automaton, `BoolFSA(…).coerce(llm, f=b"".join)`, alone or in a product, becomes one of ours, a table that
    is looked up (`compiled`). Of a `WFSA` there is one row per state that its weights are in (`weighted`). Everything
    else is asked on the host, once per distinct history, and travels to the engine's process.

    Args:
        potential: with a vocabulary of genlm-backend's `Token`, as `potential.coerce(llm, f=b"".join)` has.

    Raises:
        ValueError: it is none, has another vocabulary, or is or holds a language model.
    """
    first, *others = translated(potential)
    return Product(first, *others) if others else first


def translated(potential: GenlmBase) -> list[Translated]:
    """Makes a potential of ours of each factor of one of genlm-control's; raises as `as_potential`."""
    if not isinstance(potential, GenlmBase):
        raise ValueError(f"potential={potential!r}: must be a potential of genlm-control")
    if any(isinstance(part, PromptedLLM) for part in _parts(potential)):
        raise ValueError(f"potential={potential!r}: holds a language model, which p0 is already; {ADVICE}")
    strange = next((token for token in potential.vocab if not isinstance(token, Token)), None)
    if strange is not None:
        raise ValueError(
            f"potential={potential!r}: has {strange!r} in its vocabulary; must be tokens of the model: "
            'coerce it, potential.coerce(llm, f=b"".join)'
        )
    return [_translate(factor) for factor in factors(potential)]


def _translate(factor: GenlmBase) -> Translated:
    if (automaton := compiled(factor)) is not None:
        return automaton
    if (weights := weighted(factor)) is not None:
        return WeightedAutomaton(factor, weights)
    return GenlmPotential(factor)


def factors(potential: GenlmBase) -> list[GenlmBase]:
    """Lists the factors of a product of products; a product that is coerced is the product of the coerced."""
    potential = unwrapped(potential)
    if type(potential) is GenlmProduct:
        return [*factors(potential.p1), *factors(potential.p2)]
    if type(potential) is Coerced and type(product := unwrapped(potential.potential)) is GenlmProduct:
        settings = dict(prune=False, homomorphic=potential._f_homomorphic, tables=potential.tables)
        each = [Coerced(part, potential.vocab, potential.f, **settings) for part in (product.p1, product.p2)]
        return [factor for part in each for factor in factors(part)]
    return [potential]


def _parts(potential: GenlmBase) -> list[GenlmBase]:
    """Lists a potential and those that it is made of."""
    return [potential, *(part for each in held(potential).values() for part in _parts(each))]


class _OfFastsmc(GenlmBase):
    """Is a potential of fastsmc for genlm-control; made by `to_genlm`."""

    def __init__(self, origin: Potential, engine: GroupEngine, llm: PromptedLLM, max_tokens: int) -> None:
        super().__init__(list(llm.vocab))
        self._origin, self._engine, self._max_tokens = origin, engine, max_tokens
        self._stop = llm.token_maps.eos_idxs[0]

    def _replays(self, contexts: Sequence[Sequence[Token]]) -> list[tuple[list[int], Replay]]:
        """Replays contexts, those of a length together: which they are, after their last tokens."""
        lengths, out = [len(context) for context in contexts], []
        if max(lengths) >= self._max_tokens:
            raise ValueError(
                f"context of {max(lengths)} tokens: with EOS it must have max_tokens={self._max_tokens} at most"
            )
        for length in sorted(set(lengths)):
            of = [i for i, each in enumerate(lengths) if each == length]
            rows = [[*(token.token_id for token in contexts[i]), self._stop] for i in of]
            replay = Replay(
                self._origin, self._engine, rows, prompt=[], max_tokens=self._max_tokens, stops=frozenset([self._stop])
            )
            for _ in range(length):
                replay.ask()
                replay.end_step()
            out.append((of, replay))
        return out

    async def prefix(self, context: Sequence[Token]) -> float:
        return float((await self.batch_prefix([context]))[0])

    async def complete(self, context: Sequence[Token]) -> float:
        return float((await self.batch_complete([context]))[0])

    async def batch_prefix(self, contexts: Sequence[Sequence[Token]]) -> np.ndarray:
        return self._each(contexts, lambda replay: replay.ask()[0])

    async def batch_complete(self, contexts: Sequence[Sequence[Token]]) -> np.ndarray:
        def complete(replay: Replay) -> Tensor:
            replay.ask()
            replay.end_step()
            return replay.ask()[1]

        return self._each(contexts, complete)

    def _each(self, contexts: Sequence[Sequence[Token]], ask: Callable[[Replay], Tensor]) -> np.ndarray:
        if not contexts:
            raise ValueError("contexts=[]: must hold at least one")
        out = np.zeros(len(contexts))
        for of, replay in self._replays(contexts):
            out[of] = ask(replay).numpy()
        return out

    async def logw_next(self, context: Sequence[Token]) -> Any:
        ((_, replay),) = self._replays([context])
        before = float(replay.ask()[0])
        if before == -math.inf:
            raise ValueError(f"context {list(context)!r} has weight zero")
        says = None if self._origin.proposal_only else replay.ask_next()
        if says is None:
            return await self._logw_next_dense(context)
        ids = torch.tensor([token.token_id for token in self.vocab])
        device = self._engine.device
        changes = says.of_tokens(torch.zeros_like(ids).to(device), ids.to(device)).cpu()
        return self.make_lazy_weights(np.append(changes.numpy(), await self.complete(context) - before))


def to_genlm(potential: Potential, llm: PromptedLLM, *, max_tokens: int = 2**20) -> GenlmBase:
    """Makes a potential for genlm-control of one of fastsmc, over the tokens of a language model of genlm-control.

    A context is replayed from its beginning at each question, since genlm-control's potentials have no state.

    Args:
        potential: as it would be given to `LLM.smc`; it sees an empty prompt, and no log-probs or hidden states.
        llm: whose tokenizer, vocabulary and first EOS token are its.
        max_tokens: what `State.max_tokens` says. A potential with a budget, such as `Regex`, needs the program's.

    Raises:
        ValueError: an argument is wrong, or the potential asks the model (`lookahead`) or ends texts (`stop`); from a
            question: its context has no room for EOS within max_tokens.
    """
    if not isinstance(potential, Potential) or potential.lookahead:
        raise ValueError(f"potential={potential!r}: must be a fastsmc.Potential that asks the model for nothing")
    if stops(potential):
        raise ValueError(
            f"potential={potential!r}: ends texts itself (`stop`), which genlm-control's potentials do not"
        )
    if not isinstance(llm, PromptedLLM):
        raise ValueError(f"llm={llm!r}: must be a PromptedLLM of genlm-control")
    tokenizer = llm.model.tokenizer
    engine = GroupEngine(tokenizer, vocab_size=1 + max(token.token_id for token in llm.model.byte_vocab))
    potential.prepare(tokenizer)
    return _OfFastsmc(set_up(potential, engine), engine, llm, check_int("max_tokens", max_tokens, 1))


# ------------------------------------------------------------------------------------------------------- coroutines
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # of this process, by its number: a fork has no threads


def _run(coroutine: Coroutine) -> Any:
    """Waits for a coroutine, whether this thread has an event loop or not."""
    loop = _loops.get(os.getpid())
    if loop is None:
        loop = _loops[os.getpid()] = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, name="fastsmc-genlm", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result()
