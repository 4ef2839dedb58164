"""Potentials of genlm-control in fastsmc, and the other way: by check_potential and by genlm-control's own checks."""

import asyncio
import itertools
import math
import random
import re

import cloudpickle
import numpy as np
import pytest
import torch
from genlm.backend.llm import MockAsyncLM
from genlm.backend.tokenization import Token
from genlm.control import WFSA, BoolFSA, PromptedLLM
from genlm.control.potential.autobatch import autobatched
from genlm.control.potential.coerce import Coerced
from genlm.grammar import WFSA as Fsa
from genlm.grammar import Float, Log
from genlm.grammar.semiring import Boolean
from test_potentials import sequences_up_to
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from fastsmc import Potential
from fastsmc.genlm import as_potential, automata, potentials, to_genlm
from fastsmc.genlm.automata import GenlmAutomaton
from fastsmc.genlm.potentials import GenlmPotential, WeightedAutomaton
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


#: ids 4 and 5 spell the same, no token is 0 (EOS) or 7, nothing but token 6 has its byte
VOCAB = [Token(i, text) for i, text in enumerate([b"a", b"b", b"ab", b"ba", b"ba", b"\xff"], 1)]


def random_automaton(seed, semiring, weight, kind=BoolFSA):
    """States that nothing leads to or from, several starts, moves without a byte, bytes that no token has."""
    rng, made = random.Random(seed), Fsa(semiring)
    for _ in range(rng.randint(0, 14)):
        symbol = rng.choice([97, 97, 98, 98, 255, 200, ""])
        made.add_arc(rng.randrange(5), symbol, rng.randrange(5), weight(rng))
    made.add_arc(0, 97, rng.randrange(5), weight(rng))
    for _ in range(rng.randint(1, 2)):
        made.add_I(rng.randrange(3), weight(rng))
    for _ in range(rng.randint(0, 2)):
        made.add_F(rng.randrange(5), weight(rng))
    made.alphabet.discard("")  # which genlm-control takes for no symbol
    return kind(made)


def says_what_genlm_does(potential, coerced, engine):
    """Compares all that is said of all histories of up to two tokens, EOS among them."""
    paths = list(sequences_up_to(3, [*range(7)], stops=(EOS,)))
    said = check_potential(potential, engine, paths, max_tokens=3, stop_token_ids=[EOS])
    tokens = {token.token_id: token for token in coerced.vocab}

    async def ask():
        known = [ids for n in range(3) for ids in itertools.product(tokens, repeat=n)]
        contexts = [[tokens[v] for v in ids] for ids in known]
        answers = zip(await coerced.batch_prefix(contexts), await coerced.batch_complete(contexts), strict=True)
        return dict(zip(known, answers, strict=True))

    def compare(got, want):
        np.testing.assert_allclose(got.numpy(), want)

    known, dead = asyncio.run(ask()), (-math.inf, -math.inf)
    whole = [i for i, path in enumerate(paths) if path[-1] == EOS]
    compare(said.log_phi[whole], [known.get(tuple(paths[i][:-1]), dead)[1] for i in whole])
    for t in range(3):
        going = [i for i, path in enumerate(paths) if len(path) > t]
        compare(said.log_psi[t, going], [known.get(tuple(paths[i][:t]), dead)[0] for i in going])
    return sum(complete > -math.inf for _, complete in known.values())


def test_compiled_automata_say_what_genlm_says(engine, monkeypatch):
    """Random ones, of booleans and of weights whose sums exist; alone, in products within and around `coerce`."""
    texts = []
    kinds = [(Boolean, lambda rng: Boolean.one), (Log, lambda rng: Log(-rng.uniform(2.0, 4.0)))]
    for seed in range(24):
        semiring, weight = kinds[seed % 2]
        first, second = (random_automaton(seed + n, semiring, weight) for n in (0, 100))
        coerced = Coerced(first, VOCAB, f=b"".join, prune=seed % 3 > 0)
        assert isinstance(as_potential(autobatched(coerced)), GenlmAutomaton)
        texts.append(says_what_genlm_does(as_potential(coerced), coerced, engine))
        if seed % 4 == 0:
            for product in (coerced * Coerced(second, VOCAB, f=b"".join), (first * second).coerce(coerced, b"".join)):
                potential = as_potential(product)
                assert [type(factor) for factor in potential.factors] == [GenlmAutomaton] * 2
                says_what_genlm_does(potential, product, engine)
    assert texts.count(0) > 2 and sum(n > 6 for n in texts) > 4
    big = BoolFSA.from_regex("a{9}").coerce(coerced, b"".join)
    monkeypatch.setattr(automata, "MAX_STATES", 5)
    assert type(as_potential(big)) is GenlmPotential  # too large, so asked on the host


def test_weighted_automata_say_what_genlm_says(engine, monkeypatch):
    """Random ones, some of which have too many states and are asked on the host, and those of regular expressions;
    copied as they travel, alone and in a product."""
    monkeypatch.setattr(automata, "MAX_WEIGHTED_STATES", 50)
    compiled, texts = 0, []
    weighers = [lambda rng: Log(-rng.uniform(2.0, 4.0)), lambda rng: Log(-rng.choice([2.5, 3.0]))]
    made = [random_automaton(seed, Log, weighers[seed % 2], WFSA) for seed in range(40)]
    for of in [*made, WFSA.from_regex("(a|b)*a"), WFSA.from_regex("(ab?|ba){1,3}")]:
        coerced = Coerced(autobatched(of), VOCAB, f=b"".join)
        potential = cloudpickle.loads(cloudpickle.dumps(as_potential(coerced)))
        compiled += isinstance(potential, WeightedAutomaton)
        texts.append(says_what_genlm_does(potential, coerced, engine))
    assert 15 < compiled < len(made) and texts.count(0) > 2 and sum(n > 6 for n in texts) > 4
    assert isinstance(potential, WeightedAutomaton)
    product = coerced * Coerced(BoolFSA.from_regex("a.*"), VOCAB, f=b"".join)
    both = as_potential(product)
    assert [type(factor) for factor in both.factors] == [WeightedAutomaton, GenlmAutomaton]
    assert says_what_genlm_does(both, product, engine)


def test_a_row_per_state(engine, monkeypatch):
    """Histories in the same state share a row, of which few are kept."""
    monkeypatch.setattr(potentials, "MAX_ROWS", 1)
    potential = as_potential(Coerced(WFSA.from_regex("(a|b)*a"), VOCAB, f=b"".join))
    potential.setup(engine)
    tokens = {token.token_id: token for token in potential.of.vocab}
    ends = {potential._walk([tokens[v] for v in ids])[0] for ids in ([1], [1, 1], [2, 1], [3, 4], [4, 2, 3, 1])}
    assert len(ends) == 1
    row = potential._row(*ends, frozenset([EOS]))
    assert potential._row(*ends, frozenset([EOS])) is row and len(potential._rows) == 1
    other = potential._row(0, frozenset([EOS]))
    assert len(potential._rows) == 1 and other[EOS] == -math.inf < row[EOS] and row.dtype == torch.float64


def test_what_is_not_compiled(engine):
    """What is joined otherwise, tokens without bytes, sums that are infinite, weights of zero."""
    regular = BoolFSA.from_regex("(a|b)*a")
    endless = Fsa(Float)
    endless.add_I(0, 1.0)
    endless.add_arc(0, 97, 0, 1.0)
    endless.add_F(0, 1.0)
    nothing = Fsa(Boolean)
    nothing.add_I(0, Boolean.one)
    nothing.add_F(1, Boolean.one)
    nothing.add_arc(0, 97, 1, Boolean.zero)
    for potential, vocab, f in [
        (WFSA(endless), VOCAB, b"".join),
        (WFSA.from_regex("(a|b)*a"), VOCAB, lambda tokens: b"".join(tokens)),
        (regular, VOCAB, lambda tokens: b"".join(tokens)),
        (regular, VOCAB, b"a".join),
        (regular, [*VOCAB, Token(7, b"")], b"".join),
        (BoolFSA(endless), VOCAB, b"".join),
        (BoolFSA(nothing), VOCAB, b"".join),
    ]:
        assert type(as_potential(Coerced(potential, vocab, f=f))) is GenlmPotential
    same = Coerced(regular, [*VOCAB, Token(7, b"")], f=b"".join)
    assert says_what_genlm_does(as_potential(same), same, engine)


def test_vocabularies_travel(llm):
    """The tables of all that a potential is made of come back as they were, of tokens that are made once."""
    inner = to_genlm(Doubling(), llm) * to_genlm(Lexicon(token_ids=[1], weight=0.7), llm)
    odd = to_genlm(Doubling(), llm)
    odd.lookup = dict(odd.lookup)
    odd.lookup[odd.vocab[0]] = 5  # not what the list of tokens makes
    for potential in (inner, odd):
        first, again = (cloudpickle.loads(cloudpickle.dumps(GenlmPotential(autobatched(potential)))).of for _ in "ab")
        assert potential.vocab is not first.vocab and type(potential.vocab[0]) is Token  # the original is as it was
        assert [(t.token_id, bytes(t)) for t in first.vocab] == [(t.token_id, bytes(t)) for t in potential.vocab]
        assert first.vocab_eos == [*first.vocab, first.eos] and first.lookup == potential.lookup
        assert (first.vocab is again.vocab) == (potential is inner)
    assert type(inner.p1.vocab) is list
    first = cloudpickle.loads(cloudpickle.dumps(GenlmPotential(inner))).of
    assert first.p2.vocab is first.vocab and first.p1.lookup == inner.p1.lookup


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
