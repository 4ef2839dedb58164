"""`fastsmc.llamppl`: llamppl's programs over an engine have the law that llamppl's own contexts give them."""

import fastsmc.llamppl  # isort: skip  (before llamppl and genlm, whose imports it contains)
import asyncio
import copy
import itertools
import math
from collections import defaultdict

import llamppl
import numpy as np
import pytest
import torch
from genlm.backend.llm import MockAsyncLM
from llamppl import CachedCausalLM, LMContext, smc_standard, smc_steer
from llamppl import Model as Program
from llamppl.distributions.lmcontext import NullMask
from scipy import stats

from fastsmc.genlm import FastsmcLM, containment
from fastsmc.llamppl import Context, Mask
from fastsmc.vllm.compat import UnsupportedError

from .conftest import VOCAB
from .test_genlm import lm, recomputed, tokenizer  # noqa: F401  fixtures

EOS = 6
START, OTHER = "b", "f"
MASKS = [{0, 1, 2}, {1, 2, 3, 7}, {0, 5}, {EOS, 4}, frozenset({2, 3, 5})]


class Recomputed(MockAsyncLM):
    """Answers from transformers, under contexts that are llamppl's own."""

    def __init__(self, of, row):
        super().__init__(of)
        self._row, self._known = row, {}

    def _get_logprobs(self, token_ids):
        ids = tuple(token_ids)
        if ids not in self._known:
            self._known[ids] = torch.from_numpy(self._row(ids))
        return self._known[ids].clone()


@pytest.fixture(scope="module")
def ours(lm):  # noqa: F811
    fastsmc.llamppl.install()
    return CachedCausalLM(lm)


@pytest.fixture(scope="module")
def theirs(tokenizer, recomputed):  # noqa: F811
    return CachedCausalLM(Recomputed(tokenizer, recomputed))


# ------------------------------------------------------------------------------------------------------------ contexts
def assert_same(context, reference, atol=5e-5):
    assert type(context) is Context and type(reference) is LMContext
    assert context.tokens == reference.tokens and str(context) == str(reference)
    assert context.model_mask == reference.model_mask
    left = np.isfinite(reference.next_token_logprobs)
    np.testing.assert_array_equal(np.isfinite(context.next_token_logprobs), left)
    np.testing.assert_allclose(context.next_token_logprobs[left], reference.next_token_logprobs[left], atol=atol)


@pytest.mark.parametrize("temp", [1.0, 0.6])
def test_contexts_are_llamppls(ours, theirs, temp):
    """Through random masks, observed and sampled, and tokens; masks that rule out everything raise on both sides."""
    draw = np.random.default_rng(3)

    async def main():
        for trial in range(30):
            if trial % 2:
                pair = [await LMContext.create(each, START, temp) for each in (ours, theirs)]
            else:
                pair = [LMContext(each, START, temp) for each in (ours, theirs)]
            for _ in range(8):
                assert_same(*pair)
                if draw.random() < 0.3:
                    left = np.flatnonzero(np.isfinite(pair[1].next_token_logprobs))
                    token = int(draw.choice(left))
                    told = [await each.next_token().log_prob(token) for each in pair]
                else:
                    mask, inside = MASKS[draw.integers(len(MASKS))], bool(draw.integers(2))
                    laws = [each.mask_dist(mask) for each in pair]
                    good = pair[1].model_mask & mask if inside else pair[1].model_mask - mask
                    if not good:
                        for law in laws:
                            with pytest.raises(NullMask):
                                await law.log_prob(inside)
                        continue
                    if draw.random() < 0.5:
                        told = [await law.log_prob(inside) for law in laws]
                    else:
                        told = []
                        for law in laws:
                            np.random.seed(trial)
                            told.append(await law.sample())
                        assert told[0][0] == told[1][0]
                        told = [log_p for _, log_p in told]
                np.testing.assert_allclose(*told, atol=5e-5)

    asyncio.run(main())


def test_copies_share_rows_and_nothing_else(ours):
    class Particle(Program):
        def __init__(self):
            super().__init__()
            self.context = LMContext(ours, START)
            self.context.note = ["x"]
            self.alias, self.masks = self.context.tokens, ours.masks

    async def main():
        first = Particle()
        await first.context.mask_dist({0, 1}).log_prob(True)
        second = copy.deepcopy(first)
        assert second.context._row is first.context._row and second.context._allowed is first.context._allowed
        assert second.alias is second.context.tokens is not first.alias
        assert second.context.note == ["x"] and second.context.note is not first.context.note
        assert second.masks is ours.masks and copy.deepcopy(ours.masks.ALL_TOKENS) is ours.masks.ALL_TOKENS
        before = first.context.next_token_logprobs
        await second.context.mask_dist({1}).log_prob(True)
        np.testing.assert_array_equal(first.context.next_token_logprobs, before)
        await second.context.next_token().sample()
        assert len(second.context.tokens) == len(first.context.tokens) + 1 and second.context.tokens[-1] == 1
        with pytest.raises(ValueError, match="read-only"):
            before[0] = 0
        with pytest.raises(AttributeError, match="observe mask_dist"):
            first.context.model_mask = {0}

    asyncio.run(main())


def test_masks_do_not_change(ours):
    every = ours.masks.ALL_TOKENS
    assert isinstance(every, Mask) and every == set(range(VOCAB)) and set(ours.masks.EOS) == {EOS}
    for name in ("add", "discard", "remove", "update", "difference_update", "pop", "clear"):
        with pytest.raises(TypeError, match="change a copy"):
            getattr(every, name)(*([] if name in ("pop", "clear") else [{1}]))
    smaller = every
    smaller -= {0}
    assert type(smaller) is set and smaller == set(range(1, VOCAB)) and 0 in every
    assert every & {0, 99} == {0} and {0} | ours.masks.EOS == {0, EOS}
    assert ours.masks.token_length_mask(min=1) is ours.masks.token_length_mask(min=1)
    assert ours.masks.token_length_mask(max=0) == {EOS}


def test_tokens_of_all_tasks_are_drawn_at_once(ours, monkeypatch):
    """A step is one batch of draws, and one of rows that those who drew nothing share; the law is the row's."""
    calls, ask = [], ours.model._ask
    monkeypatch.setattr(ours.model, "_ask", lambda method, *args: calls.append(len(args[0])) or ask(method, *args))
    np.random.seed(2)

    async def main():
        first = await LMContext.create(ours, START)
        await first.mask_dist({0, 2, 3, EOS}).log_prob(True)
        copies = [copy.deepcopy(first) for _ in range(4000)]
        drawn = [each.next_token().sample() for each in copies]
        forced = [LMContext.create(ours, "a"), copy.deepcopy(first).next_token().log_prob(4)]
        done = await asyncio.gather(*drawn, *forced)
        tokens = [token.token_id for token, _ in done[:-2]]
        for (token, log_p), each in zip(done, copies, strict=False):
            assert log_p == first.log_prob(token.token_id) and each.tokens == [*first.tokens, token]
        assert done[-1] == -math.inf and str(done[0][0]) == ours.tokenizer.convert_ids_to_tokens(tokens[0])
        law = np.exp(first.next_token_logprobs.astype(float))
        assert all(each._row.log_probs.untyped_storage().nbytes() == 4 * VOCAB for each in copies[:9])
        return np.bincount(tokens, minlength=VOCAB), law

    counts, law = asyncio.run(main())
    assert calls == [1, 4 + 2]
    assert stats.chisquare(counts[law > 0], 4000 * law[law > 0] / law.sum()).pvalue > 1e-3
    assert counts[law == 0].sum() == 0

    async def nothing_left():
        with_mass, without = torch.zeros(VOCAB), torch.full((VOCAB,), -math.inf)
        return await asyncio.gather(*map(ours.model.draw, (with_mass, without)), return_exceptions=True)

    token, error = asyncio.run(nothing_left())
    assert 0 <= token < VOCAB and isinstance(error, ValueError) and "no token has a probability" in str(error)

    async def unequal():
        return await asyncio.gather(*(ours.model.draw(torch.zeros(n)) for n in (3, 4)), return_exceptions=True)

    assert [type(error) for error in asyncio.run(unequal())] == [RuntimeError] * 2


# ------------------------------------------------------------------------------------------------------------ programs
class Scored(Program):
    """Weighs each "a" with a score, and ends with EOS or after three tokens."""

    def __init__(self, lm):  # noqa: F811
        super().__init__()
        self.context, self.left = LMContext(lm, START), 3

    async def step(self):
        token = await self.sample(self.context.next_token())
        self.score(0.7 * (token.token_id == 0))
        self.left -= 1
        if token == EOS or not self.left:
            self.finish()


class Constrained(Scored):
    """Observes a mask before each token, and conditions on how the text ends."""

    async def step(self):
        await self.observe(self.context.mask_dist(MASKS[self.left]), True)
        await super().step()
        if self.finished:
            self.condition(self.context.tokens[-1] != 0)


class Staged(Scored):
    """Draws in which of two masks a token is, then the token, under a twist."""

    async def step(self):
        if await self.sample(self.context.mask_dist(MASKS[0])):
            self.twist(0.9)
            await self.sample(self.context.mask_dist(MASKS[1]))
        await super().step()


class Proposed(Scored):
    """Proposes by another prompt and temperature."""

    def __init__(self, lm):  # noqa: F811
        super().__init__(lm)
        self.other, self.left = LMContext(lm, OTHER, temp=1.4), 2

    async def step(self):
        await self.sample(self.context.next_token(), proposal=self.other.next_token())
        self.left -= 1
        if not self.left:
            self.finish()


class Intersected(Scored):
    """Observes under a second prompt what was drawn under the first."""

    def __init__(self, lm):  # noqa: F811
        super().__init__(lm)
        self.other = LMContext(lm, OTHER)

    async def step(self):
        await super().step()
        await self.observe(self.other.next_token(), self.context.tokens[-1])


@llamppl.submodel
async def pair_of(self, context):
    first = await self.sample(context.next_token())
    if first.token_id < 3:
        await self.intervene(context.next_token(), 1)
    return first


class Uneven(Scored):
    """Takes one or two tokens per step in a submodel, forces some, and asks for a law without a context."""

    async def step(self):
        first = await self.call(pair_of(self.context))
        self.left -= 1
        if self.left == 1:
            await self.observe(self.context.next_token(), 2)
            await self.observe(llamppl.Transformer(self.context.lm, [1, first.token_id]), 3)
            self.finish()


PROGRAMS = [Scored, Constrained, Staged, Proposed, Intersected, Uneven]


def enumerate_program(program, lm):  # noqa: F811
    """Maps the tokens that a program ends with to their weight: the program runs once for each way its draws can go."""

    class Forced(program):
        async def sample(self, dist, proposal=None):
            self.sizes.append(2 if isinstance(dist, llamppl.distributions.lmcontext.LMTokenMask) else VOCAB)
            at = len(self.sizes) - 1
            if at == len(self.path):
                self.path.append(0)
            value = self.path[at] if self.sizes[at] == VOCAB else bool(self.path[at])
            if proposal is not None:
                await proposal.log_prob(value)
            try:
                log_prob = await dist.log_prob(value)
            except NullMask:
                log_prob = -math.inf
            self.log_p += log_prob
            if log_prob == -math.inf:
                raise StopAsyncIteration
            return value if self.sizes[at] == 2 else llamppl.Token(lm, value, "")

    async def main():
        found, path = defaultdict(float), []
        while True:
            run = Forced(lm)
            run.sizes, run.path, run.log_p = [], path, 0.0
            try:
                while not run.finished:
                    run.untwist()
                    await run.step()
                found[tuple(run.context.tokens)] += math.exp(run.log_p + run.weight)
            except (StopAsyncIteration, NullMask):
                pass
            while path and path[-1] + 1 == run.sizes[len(path) - 1]:
                path.pop()
            if not path:
                return found
            path[-1] += 1

    return asyncio.run(main())


def run_many(model, infer, n_runs):
    async def main():
        return [await infer(model) for _ in range(n_runs)]

    out = []
    for particles in asyncio.run(main()):
        shares = defaultdict(float)
        for each in particles:
            shares[tuple(each.context.tokens)] += math.exp(each.weight) / len(particles)
        out.append(shares)
    return out


@pytest.mark.parametrize(
    ("program", "method"),
    [*itertools.product(PROGRAMS, ["standard"]), (Scored, "steer"), (Intersected, "steer")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_programs_are_unbiased(ours, theirs, program, method):
    """Ẑ, and Ẑ times the shares of what begins or ends with each token, where that is 2 % at least; the target is
    enumerated by llamppl's own contexts over rows of transformers."""
    target = enumerate_program(program, theirs)
    np.random.seed(5)
    model = program(ours)
    if method == "standard":
        found = run_many(model, lambda model: smc_standard(model, n_particles=16, ess_threshold=0.9), 80)
    else:
        found = run_many(model, lambda model: smc_steer(model, n_particles=8, n_beam=3), 80)
    total = sum(target.values())
    tests = [lambda ids: True]
    tests += [lambda ids, v=v, at=at: ids[at] == v for v in range(VOCAB) for at in (1, -1)]
    assert all(target[ids] > 0 for shares in found for ids, share in shares.items() if share > 0)
    n_tested = 0
    for test in tests:
        want = sum(p for ids, p in target.items() if test(ids))
        if want < 0.02 * total:
            continue
        values = np.array([sum(p for ids, p in shares.items() if test(ids)) for shares in found])
        assert abs(values.mean() - want) <= 4 * values.std(ddof=1) / math.sqrt(len(values)) + 1e-6 * total
        n_tested += 1
    assert n_tested >= 3


# ------------------------------------------------------------------------------------------------------------- install
def test_install(ours, theirs, monkeypatch):
    """Takes contexts of its own language models only, and leaves subclasses and other backends alone."""

    class Special(LMContext):
        pass

    assert ours.backend == "vllm" and llamppl.llms.AsyncVirtualLM is FastsmcLM
    assert type(Special(ours, START)) is Special and type(LMContext(theirs, START)) is LMContext
    assert type(asyncio.run(Special.create(ours, START))) is Special
    assert type(asyncio.run(LMContext.create(theirs, START))) is LMContext
    monkeypatch.setattr(FastsmcLM, "from_name", lambda name, engine_opts: ours.model)
    assert CachedCausalLM.from_pretrained("x", backend="vllm", engine_opts={}).model is ours.model
    with pytest.raises(ValueError, match="Unknown model type"):
        CachedCausalLM("x")
    monkeypatch.setitem(containment.SUPPORTED["llamppl"], "llamppl", ">=9")
    with pytest.raises(UnsupportedError, match=r"llamppl 0\.2\.3: fastsmc.llamppl knows >=9"):
        containment.check_versions("llamppl")
