"""`RewardModel`: what target scores of segments make, when they are asked for, in groups too."""

import math
import re
import threading
from dataclasses import replace

import cloudpickle
import numpy as np
import pytest
import torch
from rewarding import ALL, EOS, letters_engine, letters_tokenizer, logit, score_of, segment_state, start
from tiny import PROMPT, TinyLlama, make_llama, run_tables, step_tables

from fastsmc import SMCParams
from fastsmc.potentials import (
    Lexicon,
    Product,
    RewardModel,
)
from fastsmc.potentials.copying import own_copy
from fastsmc.smc import Group, GroupEngine, set_up
from fastsmc.testing import check_potential


@pytest.fixture(scope="module")
def engine():
    return letters_engine()


class Vowels(RewardModel):
    """Scores a text with a number of its own, and writes down what it was asked."""

    def __init__(self, **args):
        super().__init__(**args)
        self.asked = []

    def score(self, texts):
        self.asked.append(list(texts))
        return [score_of(text) for text in texts]


@pytest.mark.parametrize("scale", ["log", "logit"])
@pytest.mark.parametrize("aggregate", ["last", "product", "min"])
def test_log_psi_after_segments_is_what_the_aggregate_says(engine, aggregate, scale):
    f = math.log if scale == "log" else logit
    join_scores = {"last": lambda each: each[-1], "product": sum, "min": min}[aggregate]
    reward = start(Vowels(aggregate=aggregate, scale=scale), engine, 3)

    def expected(*texts):
        return join_scores([f(score_of(text)) for text in texts])

    nothing = segment_state(["", "", ""], [False] * 3)
    assert reward.prefix(nothing).tolist() == [0, 0, 0]
    first = reward.prefix(segment_state(["ab.", "c.-", "ddd"], [False] * 3))
    assert first.tolist() == pytest.approx([expected("ab."), expected("c."), expected("ddd")], abs=1e-12)
    reward.reindex(torch.tensor([2, 0, 0]))
    state = segment_state(["dddef.", "ab.c$-", "ab.ef."], [False, True, False])
    psi, phi = reward.prefix(state), reward.complete(state)
    assert psi[[0, 2]].tolist() == pytest.approx([expected("ddd", "dddef."), expected("ab.", "ab.ef.")], abs=1e-12)
    assert phi[1].item() == pytest.approx(expected("ab.", "ab.c"), abs=1e-12)  # the rest is a segment, without "$"
    reward.reindex(torch.tensor([1, 1, 0]))
    state = segment_state(["ab.c$-", "ab.c$-", "dddef.a"], [True, True, True])
    ended = reward.complete(state)
    assert ended[:2].tolist() == phi[[1, 1]].tolist()  # what has ended keeps its number
    assert ended[2].item() == pytest.approx(expected("ddd", "dddef.", "dddef.a"), abs=1e-12)


def test_each_text_is_scored_once_per_boundary(engine):
    reward = start(Vowels(), engine, 4)
    reward.prefix(segment_state(["a.-", "a.-", "bc.", "a.-"], [False] * 4))
    state = segment_state(["a.--b$", "a.--c.", "bc.---", "a.--c."], [False, False, False, False])
    state.finished[0] = True
    reward.prefix(state)
    reward.complete(state)
    reward.complete(state)
    assert reward.asked == [["a.", "bc."], ["a.c."], ["a.b"]]  # the third has drawn nothing since, so is not asked


def test_without_segments_only_whole_texts_are_scored(engine):
    reward = start(Vowels(aggregate="product", scale="logit"), engine)
    state = segment_state(["ab.", "c$"], [False, True], segmented=False)
    assert reward.prefix(state).tolist() == [0, 0]
    assert reward.complete(state)[1].item() == pytest.approx(logit(score_of("c")), abs=1e-12)
    state = segment_state(["ab.d", "c$"], [True, True], segmented=False)
    assert reward.complete(state).tolist() == pytest.approx([logit(score_of(text)) for text in ("ab.d", "c")])
    assert reward.asked == [["c"], ["ab.d"]]


def test_it_keeps_the_contract(engine):
    check_potential(Vowels(), engine, max_tokens=4, stop_token_ids=[EOS], n_sequences=12)


def test_token_ids(engine):
    reward = start(Vowels(on="tokens"), GroupEngine(vocab_size=8))
    state = segment_state(["ab.", "ab$"], [False, True])
    assert reward.prefix(state)[0].item() == pytest.approx(math.log(score_of("ab.")))
    assert reward.complete(state)[1].item() == pytest.approx(math.log(score_of("ab")))
    assert reward.asked == [[[1, 2, 7]], [[1, 2]]] and reward.prompt == [1, 2]


def test_groups_do_not_share_what_they_know(engine):
    origin = set_up(Vowels(aggregate="product"), engine)
    one, other = own_copy(origin, engine), own_copy(origin, engine)
    for copy in (one, other):
        copy.reset(2, [1, 2])
    before = one.prefix(segment_state(["a.", "b."], [False, False]))
    other.prefix(segment_state(["c.", "d."], [False, False]))
    assert one.prefix(segment_state(["a.", "b."], [False, False])).tolist() == before.tolist()
    assert one.asked == [["a.", "b."]]


def test_scores_of_zero_and_one(engine):
    class Sure(RewardModel):
        def score(self, texts):
            return torch.tensor([0.0, 1.0])

    state = segment_state(["a.", "b."], [False, False])
    assert start(Sure(), engine).prefix(state).tolist() == [-math.inf, 0]
    bound = math.log(1e-7) - math.log1p(-1e-7)
    assert start(Sure(scale="logit"), engine).prefix(state).tolist() == pytest.approx([bound, -bound], rel=1e-6)


@pytest.mark.parametrize(
    ("answer", "scale", "said"),
    [
        ([math.nan, 1], "log", "Says.score gave nan for 'a.': must be finite numbers of at least 0, scale='log'"),
        ([1, math.inf], "log", "Says.score gave inf for 'b.': must be"),
        ([1, -0.1], "log", "Says.score gave -0.1 for 'b.': must be"),
        ([1, 1.5], "logit", "Says.score gave 1.5 for 'b.': must be numbers in [0, 1], scale='logit'"),
        ([1], "log", "Says.score gave 1 values for 2 text: must be one for each"),
        (0.5, "log", "Says.score gave 0.5, a float: must be a sequence of"),
        (["x", 1], "log", "Says.score gave 'x', a str: must be"),
        ([True, 1], "log", "Says.score gave True, a bool: must be"),
        (None, "log", "Says.score gave None, a NoneType: must be"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_wrong_scores_say_class_value_and_what_is_allowed(engine, answer, scale, said, later):
    class Says(RewardModel):
        in_background = later

        def score(self, texts):
            return answer

    reward, state = start(Says(scale=scale), engine), segment_state(["a.", "b."], [False, False])
    with pytest.raises(ValueError, match=re.escape(said)):
        if later:
            reward.fetch(state, ALL).result(timeout=10)
        else:
            reward.prefix(state)


def test_arguments_are_checked(engine):
    for args in ({"aggregate": "mean"}, {"scale": "linear"}, {"on": "bytes"}):
        [(name, value)] = args.items()
        with pytest.raises(ValueError, match=f"^{name}='{value}': must be one of"):
            Vowels(**args)
    with pytest.raises(ValueError, match="Empty: must define score"):
        type("Empty", (RewardModel,), {})().setup(engine)
    with pytest.raises(ValueError, match="Vowels: this engine has no tokenizer"):
        Vowels().setup(GroupEngine(vocab_size=8))


def test_scores_that_take_a_while_are_found_in_the_background(engine):
    threads = []

    class Slow(Vowels):
        in_background = True

        def score(self, texts):
            threads.append(threading.current_thread())
            assert not torch.is_grad_enabled()
            return super().score(texts)

    reward = start(Slow(aggregate="product"), engine, 3)
    state = segment_state(["a.", "b.", "c$"], [False, False, True])
    future = reward.fetch(state, torch.tensor([True, True, True]))
    future.result(timeout=10)
    assert reward.fetch(state, torch.tensor([True, True, True])) is None  # all is known
    psi, phi = reward.prefix(state), reward.complete(state)
    assert [psi[0].item(), psi[1].item(), phi[2].item()] == pytest.approx(
        [math.log(score_of(t)) for t in ("a.", "b.", "c")]
    )
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
    assert reward.asked == [["a.", "b.", "c"]]
    later = segment_state(["a.--a.", "b.--c.", "c$----"], [False, False, True])
    reward.prefix(later)  # nobody fetched: in the foreground
    assert threads[1] is threading.current_thread()
    assert reward.fetch(segment_state(["", "", ""], [False] * 3), torch.ones(3, dtype=torch.bool)) is None


def test_without_segments_nothing_is_fetched_of_the_unfinished(engine):
    class Slow(Vowels):
        in_background = True

    reward = start(Slow(), engine)
    assert reward.fetch(segment_state(["a.", "b."], [False, False], segmented=False), ALL) is None
    reward.fetch(segment_state(["a.c", "b$"], [False, True], segmented=False), ALL).result(timeout=10)
    assert reward.asked == [["b"]]


def test_what_a_subclass_shares_travels(engine):
    class Listed(Vowels):
        shared_by_groups = ("words",)

        def __init__(self):
            super().__init__()
            self.words = ["a", "b"]

    reward = Listed()
    reward.setup(engine)
    assert cloudpickle.loads(cloudpickle.dumps(reward)).words == ["a", "b"]


# -- groups ------------------------------------------------------------------------------------------------------------
WORDS, STEPS, STOP = ["a", "b", ".", "c", "d", "<eos>"], 4, 5


class Hashed(RewardModel):
    """Scores in (0.3, 0.75), which hang on the whole text."""

    def score(self, texts):
        return [0.25 + score_of(text) / 2 for text in texts]


class HashedLater(Hashed):
    in_background = True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), len(WORDS)), len(WORDS), STEPS, frozenset([STOP]))


def log_phi(reward, ids, params):
    """log φ of a whole sequence, from its definition."""
    f, ends, begin = (math.log if reward.scale == "log" else logit), [], 0
    for t in range(1, len(ids) + 1):
        new = "".join(WORDS[v] for v in ids[begin:t])
        if (params.segment or ("\0",))[0] in new or t - begin == params.max_segment_tokens or t == len(ids):
            ends.append(t)
            begin = t
    if not params.segmented:
        ends = [len(ids)]
    texts = ["".join(WORDS[v] for v in ids[:end] if v != STOP) for end in ends]
    values = [f(score) for score in reward.score(texts)]
    return {"last": values[-1], "product": sum(values), "min": min(values)}[reward.aggregate]


SEGMENTED, CAPPED = dict(segment="."), dict(segment="ab", max_segment_tokens=2)


@pytest.mark.parametrize(
    ("kind", "aggregate", "scale", "scheme", "threshold", "way"),
    [
        (Hashed, "last", "log", "systematic", 0.5, SEGMENTED),
        (Hashed, "last", "logit", "ssp", 1.0, CAPPED),
        (Hashed, "product", "logit", "multinomial", 1.0, SEGMENTED),  # its_hub's own settings
        (HashedLater, "product", "logit", "multinomial", 1.0, CAPPED),
        (Hashed, "min", "log", "systematic", 1.0, SEGMENTED),
        (HashedLater, "min", "logit", "ssp", 0.5, CAPPED),
        (Hashed, "product", "log", "systematic", 1.0, {}),
    ],
)
def test_unbiased(tiny, kind, aggregate, scale, scheme, threshold, way):
    """E[Ẑ] = Z and E[Ẑ ΣWf] by enumeration, within 4 standard errors, and every weight as defined."""
    reward, engine = (
        kind(aggregate=aggregate, scale=scale),
        GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS)),
    )
    params = SMCParams(
        n_particles=5, max_tokens=STEPS, resampling=scheme, ess_threshold=threshold, seed=3, proposal="base", **way
    )
    origin = set_up(reward, engine)
    groups = [Group(replace(params, group=i), origin, PROMPT, tiny.stop, engine=engine) for i in range(150)]
    populations = run_tables(tiny, groups)
    truth = {s: math.exp(lp + log_phi(reward, s, params)) for s, lp in tiny.log_p.items()}
    for f in (lambda s: 1.0, lambda s: float(len(s)), lambda s: float(2 in s), lambda s: float(s[0] == 1)):
        want = sum(p * f(s) for s, p in truth.items())
        got = np.array([
            np.mean([math.exp(w) * f(tuple(ids)) for w, ids in zip(p.log_weights, p.token_ids, strict=True)])
            for p in populations
        ])  # fmt: skip
        assert abs(got.mean() - want) < 4 * got.std(ddof=1) / math.sqrt(len(got)), (got.mean(), want)
    plain = replace(params, n_particles=40, ess_threshold=0.0)  # weights are φ then
    [alone] = run_tables(tiny, [Group(plain, origin, PROMPT, tiny.stop, engine=engine)])
    expected = [log_phi(reward, ids, params) for ids in alone.token_ids]
    np.testing.assert_allclose(alone.log_weights, expected, atol=1e-9)


@pytest.mark.parametrize("aggregate", ["last", "product"])
def test_unbiased_in_a_product_that_guides(tiny, aggregate):
    """Beside a factor with `logw_next` the reward is asked at boundaries all the same."""
    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    reward, liked = Hashed(aggregate=aggregate), Lexicon(token_ids=[0, 2], weight=0.7)
    params = SMCParams(n_particles=5, max_tokens=STEPS, ess_threshold=1.0, seed=3, segment=".")
    origin = set_up(Product(liked, reward), engine)
    groups = [Group(replace(params, group=i), origin, PROMPT, tiny.stop, engine=engine) for i in range(150)]
    populations = run_tables(tiny, groups)
    truth = {
        s: math.exp(lp + log_phi(reward, s, params) + 0.7 * sum(v in (0, 2) for v in s)) for s, lp in tiny.log_p.items()
    }
    for f in (lambda s: 1.0, lambda s: float(len(s)), lambda s: float(2 in s)):
        want = sum(p * f(s) for s, p in truth.items())
        got = np.array([
            np.mean([math.exp(w) * f(tuple(ids)) for w, ids in zip(p.log_weights, p.token_ids, strict=True)])
            for p in populations
        ])  # fmt: skip
        assert abs(got.mean() - want) < 4 * got.std(ddof=1) / math.sqrt(len(got)), (got.mean(), want)


def test_a_group_asks_once_per_boundary_and_text(tiny):
    asked = []

    class Counted(Hashed):
        def score(self, texts):
            asked.append(texts)
            return super().score(texts)

    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    params = SMCParams(n_particles=64, max_tokens=STEPS, proposal="base", segment=".", ess_threshold=1.0)
    [population] = run_tables(tiny, [Group(params, set_up(Counted(), engine), PROMPT, tiny.stop, engine=engine)])
    per_boundary = len(population.boundaries)
    assert per_boundary <= len(asked) <= 2 * per_boundary  # prefix, and complete
    assert all(len(texts) == len(set(texts)) for texts in asked)
    assert sum(map(len, asked)) < 64


@pytest.mark.parametrize("later", [False, True])
def test_a_failing_reward_ends_its_own_group(tiny, later):
    class Failing(Hashed):
        in_background = later

        def score(self, texts):
            raise RuntimeError("the server has gone")

    engine = GroupEngine(letters_tokenizer(WORDS), vocab_size=len(WORDS))
    params = SMCParams(n_particles=8, max_tokens=STEPS, proposal="base", segment=".")
    failing, fine = (set_up(reward, engine) for reward in (Failing(), Hashed()))
    groups = [Group(params, potential, PROMPT, tiny.stop, engine=engine) for potential in (failing, fine)]
    step_tables(tiny, groups)
    assert "Failing" in str(groups[0].error) and "the server has gone" in str(groups[0].error)
    assert groups[1].error is None and groups[1].population().log_z < 0
