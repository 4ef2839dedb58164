"""`Condition` and the rejection proposal, over the enumerated table of a tiny Llama."""

import ast
import dataclasses
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import (
    PROMPT,
    Guide,
    TableLLM,
    TableRows,
    TableTwist,
    TinyLlama,
    make_llama,
    run_each,
    run_table,
    step_tables,
    value_table,
)

from fastsmc import SMCParams, evaluate
from fastsmc.population import Population
from fastsmc.potentials import Condition, Final, Lexicon, Potential
from fastsmc.smc import Group, GroupEngine, SMCError, rejection
from fastsmc.smc.captured import why_not_captured
from fastsmc.smc.cohort import arrange
from fastsmc.smc.driving import run_group

VOCAB, STEPS, STOP = 6, 3, 5
VALUES = value_table(STEPS, VOCAB, seed=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def begins(ids):
    """After 0 comes nothing, after 1 only 2, after 2 only 1 or 3; after 3, 4 and at the start anything."""
    return all(b in {0: (), 1: (2,), 2: (1, 3)}.get(a, range(VOCAB)) for a, b in itertools.pairwise(ids))


def whole(ids):
    return begins(ids) and sum(ids) % 3 != 1 and (not ids or ids[-1] != 0)


def rules(n=0, **more):
    """The condition; with n > 0 its answers as other things that hold booleans."""
    wrap = [list, tuple, np.array, torch.tensor][n]
    return Condition(
        lambda rows: wrap([begins(ids) for ids in rows]), complete=lambda rows: wrap([whole(ids) for ids in rows]),
        on="tokens", **more,
    )  # fmt: skip


def log_phi(sequence):
    body = sequence[:-1] if sequence[-1] == STOP else sequence
    return 0.0 if all(begins(body[:n]) for n in range(len(body))) and whole(body) else -math.inf


def run_together(tiny, params, potential, runs):
    """The populations of `runs` groups, stepped over the table together."""
    return run_each(tiny, [dataclasses.replace(params, group=i) for i in range(runs)], potential)


def check_unbiased(tiny, params, potential, log_phi, runs, target=None):
    """E[Ẑ] = Z, and E[Ẑ · weighted first tokens and lengths] is that of the target, within 4 standard errors.

    What has less than a share of 0.05 is left out: so few runs hold it that their spread says nothing of its error.
    """
    target = target or tiny
    z = math.exp(target.log_z(log_phi))
    want = np.zeros(VOCAB + STEPS + 1)
    for sequence, p in target.posterior(log_phi).items():
        want[sequence[0]] += z * p
        want[VOCAB + len(sequence)] += z * p
    got = []
    for population in run_together(tiny, params, potential, runs):
        row, z_hat = np.zeros_like(want), math.exp(population.log_z)
        for ids, weight in zip(population.token_ids, population.weights, strict=True):
            if weight:
                row[ids[0]] += z_hat * weight
                row[VOCAB + len(ids)] += z_hat * weight
                assert log_phi(tuple(ids)) > -math.inf
        got.append(np.append(row, z_hat))
    got, want = np.array(got), np.append(want, z)
    error = got.std(axis=0, ddof=1) / math.sqrt(runs)
    known = (want == 0) | (want > 0.05 * z)
    assert np.all((np.abs(got.mean(axis=0) - want) <= 4 * error + 1e-9)[known]), (got.mean(axis=0), want, error)


def params_of(n=16, threshold=0.5, **more):
    return SMCParams(n_particles=n, max_tokens=STEPS, ess_threshold=threshold, proposal="rejection", **more)


@pytest.mark.parametrize(
    ("n", "threshold", "scheme"),
    [
        (1, 0.5, "systematic"), (3, 1.0, "systematic"), (16, 0.5, "stratified"), (16, 1.0, "multinomial"),
        (64, 0.5, "systematic"), (16, 1.0, "residual"), (16, 1.0, "ssp"), (16, 0.0, "systematic"),
    ],
)  # fmt: skip
def test_unbiased(tiny, n, threshold, scheme):
    """Rows with 0, 1, 2 and all tokens allowed; ends at all lengths."""
    check_unbiased(tiny, params_of(n, threshold, resampling=scheme), rules(n % 4), log_phi, 300 if n < 10 else 100)


def test_unbiased_with_segments(tiny):
    """Candidates of particles of unequal length are asked about with the right histories."""
    params = params_of(5, 1.0, segment_token_ids=[3], max_segment_tokens=2)
    check_unbiased(tiny, params, rules(), log_phi, 200)


@pytest.mark.parametrize(
    ("n", "threshold", "scheme"),
    [(1, 1.0, "systematic"), (3, 1.0, "systematic"), (16, 0.5, "stratified"), (64, 0.0, "systematic")],
)
def test_unbiased_where_walks_are_given_up(tiny, monkeypatch, n, threshold, scheme):
    """From the first refusal on; beside a twist, so that weights differ when a step begins."""
    monkeypatch.setattr(rejection, "LONG", 1)
    twist, given_up = TableTwist(VALUES), []
    control = rejection._control

    def noted(step, *args):
        kept, times = control(step, *args)
        given_up.append((~kept).sum().item())
        assert (times >= 0).all()
        return kept, times

    monkeypatch.setattr(rejection, "_control", noted)
    runs = 300 if n < 10 else 150
    check_unbiased(
        tiny, params_of(n, threshold, resampling=scheme), rules() * twist, lambda s: log_phi(s) + twist.log_phi(s), runs
    )
    assert (sum(given_up) > 0) == (n > 1)


def test_law_of_walks_that_are_given_up(monkeypatch):
    """E[w · 1(x)] = p(x) c(x) on a hard row, while half of the particles have weight 1."""
    monkeypatch.setattr(rejection, "LONG", 1)
    hard, allowed, n = torch.tensor([0.3, 0.25, 0.2, 0.12, 0.08, 0.05]), (2, 3, 5), 60_000

    class Rows:
        def first(self):
            return torch.tensor([[0.5, 0.5, *[1e-30] * 4]]).log(), None

        def next(self, tokens, slots):
            return hard.log().repeat(len(tokens), 1), None

        def reindex(self, moves):
            pass

    class AfterOne(Potential):
        """After token 1 only some are allowed."""

        def complete(self, state):
            return torch.zeros(len(state.finished), dtype=torch.float64)

        def allows(self, state, particles, tokens):
            before = state.tokens[particles]
            free = torch.ones(len(tokens), dtype=torch.bool) if before.shape[1] == 0 else before[:, 0] == 0
            return free | torch.isin(tokens, torch.tensor(allowed))

    params = SMCParams(n_particles=n, max_tokens=2, proposal="rejection", ess_threshold=0.0, resampling="multinomial")
    population = run_group(Group(params, AfterOne(), PROMPT), Rows())
    tokens, w = population.tokens, np.exp(population.log_weights)
    assert w.max() < 1 + 1e-9 and (w == 0).sum() > 1000
    walked, last = tokens[0] == 1, tokens[1]
    for v in range(6):
        each = (w * (last == v))[walked]
        mean = hard[v].item() * (v in allowed)
        assert abs(each.mean() - mean) <= 4 * each.std() / math.sqrt(len(each)) + 1e-7, v


class LongTail:
    """Rows of 1,024 tokens, the same after every history: p_v ∝ 1 / (v + 1)²."""

    logits = -2 * torch.arange(1, 1025).log()

    def first(self):
        return self.logits[None], None

    def next(self, tokens, slots):
        return self.logits.repeat(len(tokens), 1), None

    def reindex(self, moves):
        pass


def test_dead_ends_are_given_up(monkeypatch):
    """After tokens 1 and 2 comes nothing, which takes 1,024 questions to know; Ẑ is as exact as when they are asked."""
    share = LongTail.logits.softmax(0)[1:3].sum().item()

    def run(runs):
        z, asked = [], []
        for seed in range(runs):
            condition = Condition(lambda rows: [len(ids) < 2 or ids[0] not in (1, 2) for ids in rows], on="tokens")
            params = dataclasses.replace(params_of(16, 0.5, seed=seed), max_tokens=2)
            population = run_group(Group(params, condition, PROMPT), LongTail())
            z.append(math.exp(population.log_z))
            asked.append(population.questions["asked"])
        return np.array(z), np.array(asked)

    z, asked = run(60)
    assert abs(z.mean() - (1 - share)) < 4 * z.std() / math.sqrt(len(z))
    monkeypatch.setattr(rejection, "LONG", 10**9)
    z_of_all, asked_of_all = run(2)
    assert asked_of_all.min() > 1024 > 4 * asked.max()
    np.testing.assert_allclose(z[:2], z_of_all, atol=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        dict(force_stop=True), dict(top_k=4, temperature=1.3), dict(min_tokens=2, logit_bias={STOP: 1.0}),
        dict(allowed_token_ids=(1, 2, 3, STOP)),
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_of_p0(tiny, settings):
    params = params_of(16, 0.7, **settings)
    check_unbiased(tiny, params, rules(), log_phi, 100, tiny.restricted(params))


@pytest.mark.parametrize("power", [dict(power=2.0), dict(power=0.5, power_ramp=2)], ids=["2", "ramp"])
@pytest.mark.parametrize("twisted", [False, True])
def test_powers(tiny, power, twisted):
    """Σ p0^α φ."""
    potential, alpha = rules() * TableTwist(VALUES) if twisted else rules(), power["power"]
    more = TableTwist(VALUES).log_phi if twisted else lambda s: 0.0

    def value(sequence):
        return log_phi(sequence) + more(sequence) + (alpha - 1) * tiny.log_p[sequence]

    check_unbiased(tiny, params_of(16, 0.7, **power), potential, value, 100)


class Off(Potential):
    """Rules out a token."""

    per_particle = ()

    def prefix(self, state):
        at = ((state.tokens == 4) & (torch.arange(state.tokens.shape[1]) == 0)).any(1)
        return torch.zeros(len(at), dtype=torch.float64).masked_fill(at, -torch.inf)

    def logw_next(self, state):
        from fastsmc import Masked

        bits = torch.tensor([[0b101111 if state.step == 0 else -1]], dtype=torch.int32)
        return Masked(bits, torch.zeros_like(state.lengths))


@pytest.mark.parametrize("beside", ["twist", "guide", "mask", "final", "lexicon", "prefix"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_twist_beside_it(tiny, beside, order):
    """A twist, one that only guides, a packed mask, a φ alone, a lexicon, and a ψ without `logw_next`."""
    twist = TableTwist(VALUES)

    class Prefix(TableTwist):
        logw_next = Potential.logw_next

    other, value = {
        "twist": (twist, twist.log_phi),
        "guide": (Guide(VALUES), twist.log_phi),
        "mask": (Off(), lambda s: -math.inf if s[0] == 4 else 0.0),
        "final": (Final(twist), twist.log_phi),
        "lexicon": (Lexicon(token_ids=[1, 3], weight=0.8), lambda s: 0.8 * sum(v in (1, 3) for v in s)),
        "prefix": (Prefix(VALUES), twist.log_phi),
    }[beside]
    engine = GroupEngine(vocab_size=VOCAB)
    other.setup(engine)
    potential = rules() * other if order == 1 else other * rules()
    check_unbiased(tiny, params_of(16, 0.8), potential, lambda s: log_phi(s) + value(s), 100)


def test_several_conditions_are_a_conjunction(tiny):
    even = Condition(lambda rows: [ids.count(3) < 2 for ids in rows], on="tokens")
    both = rules() * even
    check_unbiased(tiny, params_of(), both, lambda s: log_phi(s) if s.count(3) < 2 else -math.inf, 100)


def test_weights_are_one_where_all_is_allowed(tiny):
    population = run_table(tiny, params_of(64), Condition(lambda rows: [True] * len(rows), on="tokens"))
    assert population.log_z == 0.0 and not population.log_weights.any() and not population.resampled.any()
    assert population.questions["cut"] == 0 and not population.biased


@pytest.mark.parametrize(
    ("allowed", "twisted"),
    [((0, 4), True), ((1, 2, 5), False), ((3,), False), (range(9), False), (range(9), True), ((), False)],
)
def test_law_of_one_row(allowed, twisted):
    """x ~ p restricted to what is allowed, E[w | x] its mass: a row by 10⁵ particles, in float64. One token has most
    of the mass."""
    logits = np.array([4.0, 1.0, 0.5, -1.0, 2.0, -3.0, 0.0, 1.5, -40.0])
    psi = np.array([-3.0, 0.0, 1.0, 2.0, 0.0, -0.5, -np.inf, 0.0, 0.0]) if twisted else np.zeros(9)
    n, p0 = 100_000 if allowed else 100, np.exp(logits) / np.exp(logits).sum()
    want = p0 * np.exp(psi) * np.isin(np.arange(9), [*allowed])

    class Row:
        def first(self):
            return torch.tensor(logits[None], dtype=torch.float32), None

    class Twist(Potential):
        """ψ of the one step."""

        def complete(self, state):
            return torch.tensor(psi)[state.last_tokens]

        def logw_next(self, state):
            return torch.tensor(psi).expand(len(state.finished), -1)

    class InSet(Potential):
        """What `Condition` is, for whole columns of tokens."""

        def _of(self, tokens):
            return torch.isin(tokens, torch.tensor([*allowed], dtype=torch.int64))

        def complete(self, state):
            return torch.where(self._of(state.last_tokens), 0.0, -torch.inf).double()

        def allows(self, state, particles, tokens):
            assert len(state.lengths) == n and len(particles) == len(tokens)
            return self._of(tokens)

    params = SMCParams(n_particles=n, max_tokens=1, proposal="rejection", ess_threshold=0.0, resampling="multinomial")
    potential = InSet() * Twist() if twisted else InSet()
    population = run_group(Group(params, potential, PROMPT), Row())
    tokens, w = population.tokens[0], np.exp(population.log_weights)
    if not allowed:
        assert population.log_z == -math.inf and population.finish_reasons == ["dead"] * n
        return
    if len(allowed) == 9 and not twisted:
        np.testing.assert_allclose(w, 1.0, rtol=1e-12)
    assert (w > 0).all() and (w <= np.exp(psi).max() + 1e-6).all()
    share = want / want.sum()
    for v in range(9):
        at = tokens == v
        assert abs(at.mean() - share[v]) <= 4 * math.sqrt(share[v] * (1 - share[v]) / n) + 1e-12
        mean = share[v] * want.sum()
        assert abs((w * at).mean() - mean) <= 4 * (w * at).std() / math.sqrt(n) + 1e-7, v


# --------------------------------------------------------------------------------------------------------- questions
class Counted:
    """A condition's function that notes what it is asked."""

    def __init__(self, allowed=lambda text: True):
        self.allowed, self.calls = allowed, []

    def __call__(self, texts):
        self.calls.append(list(texts))
        return [self.allowed(text) for text in texts]

    def __deepcopy__(self, memo):
        return self


def test_answers_are_shared_and_calls_are_few(tiny):
    """A step asks about everybody's first candidates in one call, then about second ones; no text twice."""
    function = Counted(lambda ids: ids[-1:] != [1])
    params = params_of(64, 0.5, seed=3)
    population = run_table(tiny, params, Condition(function, on="tokens"))
    asked = [tuple(text) for call in function.calls for text in call]
    assert population.questions == {"asked": len(asked), "calls": len(function.calls), "cut": 0}
    assert len(set(asked)) == len(asked)
    assert len(asked) < 0.5 * 64 * STEPS  # 64 particles on a tree of 6 + 36 + 216 texts
    assert len(function.calls) <= 1 + STEPS * (VOCAB + 2)
    first = function.calls[1]
    assert len(first) > 1 and all(len(text) <= 1 for text in first)
    single = run_table(tiny, params, Condition(lambda ids: ids[-1:] != [1], on="tokens", batch=False))
    np.testing.assert_array_equal(single.tokens, population.tokens)
    assert single.questions == {"asked": len(asked), "calls": len(asked), "cut": 0}
    base = run_table(tiny, dataclasses.replace(params, proposal="base"), Condition(function, on="tokens"))
    assert base.questions["asked"] < len(asked) and not base.biased


def test_peaked_rows_need_few_questions():
    """The second question is asked with twice the chance that a second draw is another token."""
    logits = torch.tensor([[math.log(0.98), *[math.log(0.02 / 7)] * 7]])

    class Row:
        def first(self):
            return logits, None

    asked = []
    for seed in range(400):
        params = SMCParams(n_particles=1, max_tokens=1, proposal="rejection", seed=seed)
        condition = Condition(lambda rows: [True] * len(rows), on="tokens")
        asked.append(run_group(Group(params, condition, PROMPT), Row()).questions["asked"] - 1)  # the empty one
    assert abs(np.mean(asked) - 1.04 - 0.02) < 4 * np.std(asked) / 20


def test_max_asked_cuts_and_says_so(tiny, tmp_path):
    """What a cut particle had is lost: Ẑ is too low, and the population, saved and loaded too, says so."""
    condition = rules(max_asked=2)
    params = params_of(64, 0.5)
    populations = run_together(tiny, params, condition, 100)
    z_hat = np.array([math.exp(p.log_z) for p in populations])
    z = math.exp(tiny.log_z(log_phi))
    assert z_hat.mean() < z - 4 * z_hat.std() / 10
    cut = populations[0]
    assert cut.biased and cut.questions["cut"] > 0 and "dead" in cut.finish_reasons
    assert cut.summary()["biased"] is True and cut.summary()["questions"] == cut.questions
    cut.save(tmp_path / "cut.npz")
    again = Population.load(tmp_path / "cut.npz")
    assert again.biased and again.questions == cut.questions
    pool = Population.pool(populations[:3])
    assert pool.biased and pool.questions == {
        name: sum(each.questions[name] for each in populations[:3]) for name in cut.questions
    }
    plenty = run_table(tiny, params, rules(max_asked=VOCAB + 2))
    assert not plenty.biased
    np.testing.assert_array_equal(plenty.tokens, run_table(tiny, params, rules()).tokens)
    assert "questions" not in run_table(tiny, SMCParams(max_tokens=STEPS), None).summary()


def test_an_impossible_target(tiny):
    """Nothing is allowed: at the start, after a token, at the end."""
    for at in (0, 1, STEPS):
        condition = Condition(lambda rows, at=at: [len(ids) < at for ids in rows], on="tokens")
        params = params_of(8, ignore_eos=True)
        population = run_group(Group(params, condition, PROMPT), TableRows(tiny, 8))
        assert population.degenerate and population.log_z == -math.inf and population.final_ess == 0
        assert set(population.finish_reasons) == {"dead"}


BAD = {
    "raises": (lambda rows: 1 // 0, r"RuntimeError: condition '<lambda>' raised ZeroDivisionError"),
    "too many": (lambda rows: [True] * (len(rows) + 1), r"condition '<lambda>' gave \d+ answers for \d+ texts"),
    "numbers": (lambda rows: [1] * len(rows), r"condition '<lambda>' gave 1, a int: must be bool"),
    "floats": (lambda rows: np.ones(len(rows)), r"gave 1.0, a float: must be bool"),
    "none": (lambda rows: None, r"gave None: must be a list of bool"),
    "a bool": (lambda rows: True, r"gave True: must be a list of bool"),
    "a matrix": (lambda rows: np.ones((len(rows), 1), bool), r"must be a list of bool"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_answer_ends_its_group_alone(tiny, bad):
    """At a later step, when others of the cohort go on."""
    answer, message = BAD[bad]

    def function(rows):
        return answer(rows) if max(map(len, rows)) == 2 else [True] * len(rows)

    function.__name__ = "<lambda>"
    potentials = [rules(), Condition(function, on="tokens"), rules()]
    groups = [Group(params_of(8, seed=i), p, PROMPT, tiny.stop) for i, p in enumerate(potentials)]
    assert len(arrange(groups)) == 1
    step_tables(tiny, groups)
    assert groups[0].error is None and groups[2].error is None
    with pytest.raises(SMCError, match=r"(?s)potential Condition.allows at step 1: raised .*" + message):
        raise groups[1].error
    for i in (0, 2):
        alone = run_table(tiny, params_of(8, seed=i), rules())
        np.testing.assert_array_equal(groups[i].population().tokens, alone.tokens)
        np.testing.assert_array_equal(groups[i].population().log_weights, alone.log_weights)


class SaysNothing(Potential):
    """Answers with what is no vector of bool."""

    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def allows(self, state, particles, tokens):
        return tokens


def test_refusals(tiny):
    for potential in (None, TableTwist(VALUES), Final(rules()), TableTwist(VALUES) * Final(rules())):
        with pytest.raises(SMCError, match="proposal='rejection': .* needs a potential with `allows`") as error:
            Group(params_of(), potential, PROMPT, tiny.stop)
        assert error.value.kind == "refused"
    with pytest.raises(SMCError, match="exact: proposal='rejection' takes no exact samples"):
        Group(params_of(), rules(), PROMPT, tiny.stop, exact=[[1, STOP]])
    with pytest.raises(
        SMCError, match=r"SaysNothing.allows at step 0: returned \(16,\) torch.int64; must be a torch.bool"
    ):
        run_table(tiny, params_of(), SaysNothing())
    for measure in (evaluate.log_z_bounds, evaluate.kl):
        with pytest.raises(ValueError, match="params.proposal='rejection': its q has no density"):
            measure(TableLLM(tiny), PROMPT, params_of(), rules(), exact=[[1, STOP]])
    assert why_not_captured(params_of(), SaysNothing()) is not None
    for arguments, message in [
        (dict(function=None), "function=None: must be callable"),
        (dict(function=begins, complete=3), "complete=3: must be callable"),
        (dict(function=begins, batch=1), "batch=1: must be True or False"),
        (dict(function=begins, on="words"), "on='words': must be one of 'text', 'tokens'"),
        (dict(function=begins, max_asked=1), "max_asked=1: must be an integer of at least 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Condition(**arguments)


def test_the_text_that_a_function_sees():
    """What the tokens add to the prompt, without the stop token; of a beginning whole characters; no special tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens = ["<eos>", "<s>", "a", "Ġb", "Ã", "©"]  # é is the bytes of the last two
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<s>")
    begins, wholes = Counted(), Counted()
    condition = Condition(begins, complete=wholes)
    condition.setup(GroupEngine(tokenizer=tokenizer, vocab_size=8))  # two more columns than tokens
    n = 2000

    class Uniform:
        def first(self):
            return torch.zeros(1, 8), None

        def next(self, tokens, slots):
            return torch.zeros(len(tokens), 8), None

        def reindex(self, ancestors):
            pass

    params = SMCParams(n_particles=n, max_tokens=3, proposal="rejection")
    population = run_group(Group(params, condition, [1, 2], {0}), Uniform())
    seen = {text for call in begins.calls for text in call}
    ended = {text for call in wholes.calls for text in call}
    assert {"", "a", " b", "a b", "é"} <= seen and not any("\ufffd" in text[-1:] for text in seen)
    assert {"", "a", "aaa", "a\ufffd", "éa"} <= ended
    assert all(set(ids[:-1]) <= {2, 3, 4, 5} and ids[-1] in {0, 2, 3, 4, 5} for ids in population.token_ids)
    # p0 · (no special token, no unknown id): 5 of 8 tokens at each step, one of them ends
    want = math.log(1 / 8 + 4 / 64 + 16 / 64 * 5 / 8)
    assert abs(population.log_z - want) < 0.05


def parses(text):
    try:
        ast.parse(text, mode="eval")
        return True
    except SyntaxError:
        return False


def test_a_parser_of_python(tiny):
    """Expressions of five characters: a beginning may still become a whole if some ending makes it parse."""
    endings = [operand + ")" * n for operand in ("", "1") for n in range(STEPS + 1)]

    def spell(ids):
        return "".join("a()+1"[v] for v in ids)

    def value(sequence):
        return 0.0 if parses(spell(sequence[:-1] if sequence[-1] == STOP else sequence)) else -math.inf

    condition = Condition(
        lambda ids: any(parses(spell(ids) + ending) for ending in endings), complete=lambda ids: parses(spell(ids)),
        batch=False, on="tokens",
    )  # fmt: skip
    check_unbiased(tiny, params_of(32, 0.5), condition, value, 60)


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example():
    """examples/conditions.py: what its functions say of beginnings and wholes; a whole is also a beginning."""
    tasks = load(Path(__file__).parents[1] / "examples" / "conditions.py").TASKS
    person = '{"name": "Al", "age": 37}'
    cases = {
        "python": (["pi * r**2", "f(x, [1, 2])", "3"], ["", " ", "3 *", "f(x, [", "'a", "r**"],
                   ["3 * r)", "a\nb", "for x", "1 2"]),
        "json": ([person, person + "\n", '{"age":0,"name":""}'], [person[:n] for n in range(len(person))],
                 ['{"x', '{"name": 3', '{"age": 200', '{"age": 3, "age"', person + "}", '{"name": "' + 13 * "a"]),
    }  # fmt: skip
    for task, (wholes, beginnings, neither) in cases.items():
        may_be, is_whole = tasks[task]
        assert all(is_whole(text) and may_be(text) for text in wholes)
        assert all(may_be(text) and not is_whole(text) for text in beginnings), [t for t in beginnings if not may_be(t)]
        assert not any(may_be(text) or is_whole(text) for text in neither), [t for t in neither if may_be(t)]


def test_the_walk_of_the_benchmark(monkeypatch):
    """Without sharing: on (0.9, 0.1), both allowed, one question and with twice 0.1 another, or two."""
    bench = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(str(bench))
    module = load(bench / "bench_condition.py")
    walk = module.walk
    asked = walk(torch.tensor([0.9, 0.1]).log(), lambda token: True, {0, 1}, 4000).mean()
    assert abs(asked - (1 + 0.9 * 0.2 + 0.1)) < 4 * 0.45 / math.sqrt(4000)
    assert walk(torch.tensor([0.9, 0.1]).log(), lambda token: token == 1, {1}, 10).tolist() == [1] * 10
    assert module.ratio_stderr([np.array([1, 3])], [np.array([4, 4])]) == 0.25  # a mean of 2 ± 1, over 4
