"""Potentials of genlm-control in fastsmc, and the other way: by check_potential and by genlm-control's own checks."""

import asyncio
import math
import re

import numpy as np
import pytest
import torch
from genlm.backend.llm import MockAsyncLM
from genlm.control import BoolFSA, PromptedLLM
from test_potentials import sequences_up_to
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastsmc import Potential
from fastsmc.genlm import as_potential, to_genlm
from fastsmc.potentials import Infill, Lexicon, Regex, TextPotential
from fastsmc.smc import GroupEngine
from fastsmc.testing import check_potential

TEXTS = ["", "a", "b", "c", "ab", "abc"]
EOS, V = 0, 8  # two more columns than the tokenizer has, as models pad them


@pytest.fixture(scope="module")
def tokenizer():
    names = ["▁", *TEXTS[1:]]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    made.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="▁")


@pytest.fixture(scope="module")
def llm(tokenizer):
    return PromptedLLM(MockAsyncLM(tokenizer))


@pytest.fixture
def engine(tokenizer):
    return GroupEngine(tokenizer, vocab_size=V)


def text_of(path):
    return "".join(TEXTS[v] for v in path)


def coerced(pattern, llm):
    return BoolFSA.from_regex(pattern).coerce(llm, f=b"".join)


def test_an_automaton_of_genlm(engine, llm):
    """All sequences of up to three tokens, by `re` on their texts."""
    paths = list(sequences_up_to(3, range(6)))
    said = check_potential(as_potential(coerced("(a|b)*c", llm)), engine, paths, max_tokens=3, stop_token_ids=[EOS])
    want = [0.0 if re.fullmatch("(a|b)*c", text_of(path)) else -math.inf for path in paths]
    np.testing.assert_allclose(said.log_phi, want, atol=1e-9)
    assert 0 < np.isfinite(want).sum() < len(want)
    ended = [i for i, path in enumerate(paths) if path[-1] == EOS]
    by_next = [said.by_next[len(paths[i]), i].item() for i in ended]
    np.testing.assert_allclose(by_next, said.log_phi[ended], atol=1e-9)  # EOS has its weight in the proposal, too


def test_products_and_weights(engine, llm):
    """A product of a mask and a potential that weighs tokens agrees with fastsmc's own product."""
    lexicon = to_genlm(Lexicon(token_ids=[1, 4], weight=0.7), llm)
    both = as_potential(lexicon * coerced("(a|b)*c?", llm))
    own = Lexicon(token_ids=[1, 4], weight=0.7) * Regex("(a|b)*c?")
    paths = list(sequences_up_to(3, range(6)))
    said, want = (check_potential(p, engine, paths, max_tokens=3, stop_token_ids=[EOS]) for p in (both, own))
    for path, got, expected in zip(paths, said.log_phi, want.log_phi, strict=True):
        if path[-1] == EOS:  # an own Regex knows the budget, so only whole ones are the same
            assert math.isclose(got, expected, abs_tol=1e-6), path


class Doubling(Potential):
    """ψ doubles with token 1; φ is four times that. The change is said by `prefix` only."""

    def prefix(self, state):
        return (state.tokens == 1).sum(1) * math.log(2)

    def complete(self, state):
        return self.prefix(state) + math.log(4)


class Stopping(Doubling):
    def stop(self, state):
        return state.lengths == 2


@pytest.mark.parametrize("make", [lambda: Lexicon(token_ids=[1, 4], weight=0.7), Doubling, lambda: Regex("a*b?c*")])
def test_genlm_checks_ours(llm, make):
    """genlm-control's own tests of potentials: the chain rule, `logw_next`, batches."""
    potential = to_genlm(make(), llm)
    tokens = {token.token_id: token for token in llm.vocab}

    async def check():
        for ids in ([], [1], [1, 2], [1, 1, 3]):
            context = [tokens[v] for v in ids]
            await potential.assert_logw_next_consistency(context, verbosity=0)
            await potential.assert_autoreg_fact(context, verbosity=0)
        contexts = [[tokens[v] for v in ids] for ids in ([], [2], [1, 3], [1])]
        await potential.assert_batch_consistency(contexts, verbosity=0)

    asyncio.run(check())


def test_there_and_back(engine, llm):
    """A potential that went through genlm-control says what it said."""
    paths = list(sequences_up_to(3, range(6)))
    settings = dict(max_tokens=3, stop_token_ids=[EOS])
    own = check_potential(Doubling(), engine, paths, **settings)
    back = check_potential(as_potential(to_genlm(Doubling(), llm)), engine, paths, **settings)
    torch.testing.assert_close(back.log_phi, own.log_phi)
    torch.testing.assert_close(back.log_psi, own.log_psi, equal_nan=True)


def test_refusals(llm):
    automaton = BoolFSA.from_regex("ab")
    for potential, message in [
        (Regex("a"), "must be a potential of genlm-control"),
        (automaton, r'has 97 in its vocabulary; must be tokens of the model: coerce it, potential.coerce\(llm'),
        (llm, "holds a language model, which p0 is already"),
        (llm * coerced("a*", llm), "holds a language model"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            as_potential(potential)
    for args, message in [
        ((Infill([1]), llm), "must be a fastsmc.Potential that asks the model for nothing"),
        ((automaton, llm), "must be a fastsmc.Potential"),
        ((TextPotential(len), automaton), "must be a PromptedLLM of genlm-control"),
    ]:
        with pytest.raises(ValueError, match=message):
            to_genlm(*args)
    with pytest.raises(ValueError, match="ends texts itself"):
        to_genlm(Stopping(), llm)
    short, token = to_genlm(Doubling(), llm, max_tokens=2), llm.vocab[0]
    assert asyncio.run(short.complete([token])) >= math.log(4)
    with pytest.raises(ValueError, match="context of 2 tokens: with EOS it must have max_tokens=2 at most"):
        asyncio.run(short.prefix([token, token]))
    with pytest.raises(ValueError, match="max_tokens=0: must be"):
        to_genlm(Doubling(), llm, max_tokens=0)
