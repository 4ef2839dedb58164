"""Counterfactuals by Hugging Face of an enumerated tiny Llama; fastsmc.reference.Coupling is the oracle."""

import dataclasses
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
from intervened import EACH, hooked_log_probs, table_under
from scipy.stats import chisquare
from tiny import PROMPT, Guide, TableTwist, TinyLlama, hf_log_probs, make_llama, value_table

from fastsmc import Population, SMCParams
from fastsmc.counterfactuals import Counterfactuals, _levenshtein
from fastsmc.hf import HFEngine
from fastsmc.interventions import Facts, Prompt, Steer, Temperature, load, save
from fastsmc.potentials import Lexicon
from fastsmc.reference import Coupling
from fastsmc.smc.evidence import Evidence

VOCAB, STEPS = 8, 3
TEXT = [3, 1, 6]
STEER = EACH["steer"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.fixture(scope="module")
def engine(path):
    return HFEngine(path, stop_token_ids=[])


@pytest.fixture(scope="module")
def tiny(path):
    return TinyLlama(path, VOCAB, STEPS, frozenset())


@pytest.fixture(scope="module")
def steered(path):
    return table_under(path, PROMPT, [STEER], STEPS)


def law(p, q, text, t_q=1.0):
    """sequence → probability that it is the counterfactual of a text, and the stay of each token; from two tables."""
    paths, stay = {(): 1.0}, []
    for t, k in enumerate(text):
        grown = {}
        for prefix, probability in paths.items():
            coupling = Coupling(q[prefix], p[tuple(text[:t])], k, t_q)
            grown |= {(*prefix, v): probability * x for v, x in enumerate(np.exp(coupling.log_law()))}
            if list(prefix) == list(text[:t]):
                stay.append(coupling.stay)
        paths = grown
    return paths, stay


def test_the_law(engine, path, tiny, steered):
    """Every sequence's probability, log-probs of both models, where the text is left, and draws by chi²."""
    exact, stay = law(tiny.table, steered, TEXT)
    assert math.isclose(sum(exact.values()), 1.0, abs_tol=1e-9)
    for noise in ("exact", "gumbel"):
        found = engine.counterfactual(PROMPT, TEXT, STEER, n=20_000, noise=noise, seed=5)
        assert np.abs(np.exp(found.log_kernel) - [exact[tuple(s)] for s in found.token_ids]).max() < 1e-5
        assert np.abs(found.stay - stay).max() < 1e-5
        assert found.expected_common_prefix == pytest.approx(np.cumprod(stay).sum(), abs=1e-5)
        counts = Counter(map(tuple, found.token_ids))
        common = [s for s in exact if exact[s] * 20_000 >= 5]
        seen = np.array([counts[s] for s in common] + [20_000 - sum(counts[s] for s in common)])
        want = np.array([exact[s] for s in common] + [1 - sum(exact[s] for s in common)]) * 20_000
        assert chisquare(seen, want).pvalue > 1e-4
        kept = (found.common_prefix[:, None] > np.arange(STEPS)).mean(0)
        assert (np.abs(kept - found.survival) < 5 * np.sqrt(0.25 / 20_000)).all()
    few = [list(s) for s in sorted(set(map(tuple, found.token_ids)))[:20]]
    log_q = dict(zip(map(tuple, few), hooked_log_probs(path, PROMPT, few, [STEER]), strict=True))
    for ids, log_probs in zip(found.token_ids, found.token_log_probs, strict=True):
        if tuple(ids) in log_q:
            assert np.abs(log_probs - log_q[tuple(ids)]).max() < 2e-4
    assert np.abs(found.factual_log_probs - hf_log_probs(path, PROMPT, [TEXT])[0]).max() < 2e-4


def test_over_all_texts_it_is_the_intervened_model(tiny, steered):
    total = Counter()
    for text, log_p in tiny.log_p.items():
        for sequence, probability in law(tiny.table, steered, text)[0].items():
            total[sequence] += math.exp(log_p) * probability
    for sequence, probability in total.items():
        log_q = sum(steered[sequence[:t]][v] for t, v in enumerate(sequence))
        assert math.isclose(probability, math.exp(log_q), rel_tol=1e-5)  # the tables are float32 models'


@pytest.mark.parametrize("scale", [0.0, None])
def test_without_a_change_it_is_the_text(engine, scale):
    change = None if scale is None else Steer(0, STEER.vector, scale)
    for noise in ("exact", "gumbel"):
        found = engine.counterfactual(PROMPT, TEXT, change, n=64, noise=noise)
        assert found.token_ids == [TEXT] * 64 and (found.stay == 1.0).all() and (found.log_kernel == 0.0).all()
        assert (found.first_change == -1).all() and not found.edit_distance.any()
        assert found.diff()[0] == [("equal", TEXT, TEXT)] and found.expected_common_prefix == STEPS


def test_noise_is_shared_by_interventions(engine):
    """A token that wins under both steps of a dose lies between them: with one noise half a change changes fewer."""
    half, whole = (
        engine.counterfactual(PROMPT, TEXT, Steer(0, STEER.vector, s), n=2000, noise="gumbel", seed=3)
        for s in (0.5, 1.0)
    )
    again = engine.counterfactual(PROMPT, TEXT, Steer(0, STEER.vector, 0.5), n=2000, noise="gumbel", seed=3)
    assert again.token_ids == half.token_ids
    other = engine.counterfactual(PROMPT, TEXT, Steer(0, STEER.vector, 1.0), n=2000, noise="gumbel", seed=4)
    first = np.array([[ids[0] for ids in p.token_ids] for p in (half, whole, other)])
    assert (first[0] == first[1]).mean() > (first[0] == first[2]).mean() + 0.1


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [*itertools.product(["twisted", "base", "guided"], ["multinomial", "systematic", "ssp"]), ("exact", "multinomial")],
)
def test_estimates_are_unbiased(engine, tiny, steered, kind, scheme):
    """E[Ẑ] is the potential's mean over counterfactuals, and E[1/Ẑ*] its inverse."""
    value = value_table(STEPS, VOCAB, seed=4)
    potential = (Guide if kind == "guided" else TableTwist)(np.where(np.isinf(value), -1.0, value))
    exact, _ = law(tiny.table, steered, TEXT)
    log_z = math.log(sum(p * math.exp(potential.log_phi(s)) for s, p in exact.items()))
    proposal = "base" if kind == "base" else "twisted"
    params = SMCParams(n_particles=6, max_tokens=STEPS, ess_threshold=0.9, proposal=proposal, resampling=scheme)
    if kind == "exact":
        weights = np.array([p * math.exp(potential.log_phi(s)) for s, p in exact.items()])
        picks = np.random.default_rng(0).choice(len(weights), size=200, p=weights / weights.sum())
        ratios = [1 / ratio(engine, params, potential, g, [list(exact)[i]], log_z) for g, i in enumerate(picks)]
    else:
        ratios = [ratio(engine, params, potential, g, None, log_z) for g in range(200)]
    assert abs(np.mean(ratios) - 1.0) < 4.5 * np.std(ratios, ddof=1) / math.sqrt(len(ratios))


def ratio(engine, params, potential, group, exact, log_z):
    """Ẑ/Z of one group; the engine's own pieces, since its call takes no exact samples."""
    params = dataclasses.replace(params, group=group)
    with torch.no_grad():
        kept = None if exact is None else [list(map(int, ids)) for ids in exact]
        found = engine._run(
            PROMPT, params, engine._set_up(potential), kept, (STEER,), evidence=Evidence(TEXT, 1.0),
            drawn=(SMCParams(max_tokens=STEPS), PROMPT),
        )  # fmt: skip
    return math.exp(found.log_z - log_z)


def test_beyond_the_text_draws_are_plain(engine, tiny, steered):
    """There is no evidence there; a text that is longer than what is asked for counts as far as it goes."""
    found = engine.counterfactual(PROMPT, TEXT[:1], STEER, n=500, max_tokens=STEPS)
    exact, _ = law(tiny.table, steered, TEXT[:1])
    for ids, kernel in zip(found.token_ids, found.log_kernel, strict=True):
        after = sum(steered[tuple(ids[:t])][ids[t]] for t in (1, 2))
        assert kernel == pytest.approx(math.log(exact[tuple(ids[:1])]) + after, abs=2e-4)
    short = engine.counterfactual(PROMPT, TEXT, STEER, n=8, max_tokens=1)
    assert {len(ids) for ids in short.token_ids} == {1} and len(short.stay) == STEPS


def test_a_text_drawn_with_the_same_seed(engine, tiny, steered):
    """The numbers that drew a text do not draw its counterfactuals: over seeds these are the intervened model's draws,
    and stay as often as they should."""
    n, stays, expected, counts = 600, 0, [], Counter()
    for seed in range(n):
        found = engine.counterfactual(PROMPT, None, STEER, n=1, max_tokens=1, seed=seed)
        counts[found.token_ids[0][0]] += 1
        stays += found.token_ids[0] == found.factual_ids
        expected.append(found.stay[0])
    spread = math.sqrt(sum(p * (1 - p) for p in expected))
    assert abs(stays - sum(expected)) < 4 * spread
    assert (
        chisquare([counts[v] for v in range(VOCAB)], n * np.exp(steered[()]) / np.exp(steered[()]).sum()).pvalue > 1e-4
    )


def test_a_text_is_drawn_from_p0(engine):
    """Of which force_stop is no part: it is the counterfactuals' target."""
    params, texts = SMCParams(n_particles=3, max_tokens=2, stop_token_ids=[5], force_stop=True), []
    for seed in range(12):
        found = engine.counterfactual(PROMPT, None, STEER, params=dataclasses.replace(params, seed=seed))
        texts.append(found.factual_ids)
        ends = [ids[-1:] == [5] for ids in found.token_ids]
        assert not (found.log_weights > -math.inf)[~np.array(ends)].any()
    assert not all(ids[-1] == 5 for ids in texts)


def test_settings_of_both_draws(engine, tiny, steered):
    """top_k is the text's mechanism and the other's; Temperature is the other's alone; ends come with stop tokens."""
    params = SMCParams(n_particles=3000, max_tokens=STEPS, top_k=4, temperature=0.8)
    cut = tiny.restricted(params)
    text = list(max(cut.log_p, key=cut.log_p.get))
    other = {}
    for prefix, row in steered.items():
        other[prefix] = np.where(row >= np.sort(row)[-4], row, -np.inf)
    exact, stay = law(cut.table, other, text, t_q=1.5)
    for noise in ("exact", "gumbel"):
        found = engine.counterfactual(PROMPT, text, [STEER, Temperature(1.5)], params=params, noise=noise)
        assert np.abs(np.exp(found.log_kernel) - [exact[tuple(s)] for s in found.token_ids]).max() < 1e-5
        assert np.abs(found.stay - stay).max() < 1e-5 and found.params.temperature == 1.5
    ends = SMCParams(n_particles=200, max_tokens=STEPS, stop_token_ids=[TEXT[1]])
    stopped = engine.counterfactual(PROMPT, TEXT[:2], STEER, params=ends)
    assert "stop" in stopped.finish_reasons and len(stopped.stay) == 2


def test_min_tokens_of_both_draws(path, tiny, steered):
    """It rules out the model's end of sequence, also with ignore_eos."""
    params = SMCParams(n_particles=300, max_tokens=STEPS, min_tokens=2, ignore_eos=True)
    p, q = ({prefix: row.copy() for prefix, row in table.items()} for table in (tiny.table, steered))
    for table in (p, q):
        for prefix, row in table.items():
            if len(prefix) < 2:
                row[7] = -np.inf
                row -= np.logaddexp.reduce(row)
    found = HFEngine(path, stop_token_ids=[7]).counterfactual(PROMPT, TEXT, STEER, params=params)
    exact, stay = law(p, q, TEXT)
    assert np.abs(np.exp(found.log_kernel) - [exact[tuple(s)] for s in found.token_ids]).max() < 1e-5
    assert np.abs(found.stay - stay).max() < 1e-5
    want = [p[tuple(TEXT[:t])][v] for t, v in enumerate(TEXT)]
    assert np.abs(found.factual_log_probs - want).max() < 2e-4


def test_a_model_that_rules_everything_out(engine):
    """Its particles are dead, by either way to draw; that is no fault of the model."""
    facts = engine.facts(PROMPT, TEXT)
    params = SMCParams(n_particles=4, max_tokens=STEPS, allowed_token_ids=[5], stop_token_ids=[5], min_tokens=1)
    for potential in (None, TableTwist(value_table(STEPS, VOCAB))):
        found = engine.counterfactual(facts, params=params, potential=potential)
        assert found.log_z == -math.inf and found.finish_reasons == ["dead"] * 4 and found.stay[0] == 0.0
        assert not found.token_log_kernels.any()


def test_facts_of_another_model(engine, path, tmp_path):
    """A pair of models: by facts the same as by an intervention that makes one of the other; also from a file."""
    facts = engine.facts(PROMPT, TEXT, SMCParams(temperature=0.9))
    save([facts], tmp_path / "facts")
    [read] = load(tmp_path / "facts")
    other = HFEngine(make_llama(tmp_path / "other", VOCAB, seed=9), stop_token_ids=[])
    found = other.counterfactual(read, n=50, seed=2)
    assert found.factual_ids == TEXT and 0 < found.stay[0] < 1
    want = hf_log_probs(path, PROMPT, [TEXT], 0.9)[0]
    assert np.abs(found.factual_log_probs - want).max() < 2e-4
    same = engine.counterfactual(engine.facts(PROMPT, TEXT), n=5)
    assert same.token_ids == [TEXT] * 5
    prompted = engine.counterfactual(PROMPT, TEXT, Prompt([2, 2, 7]), n=50)
    assert prompted.prompt_token_ids == [2, 2, 7] and (prompted.stay < 1).any()


def test_a_text_of_its_own_and_files(engine, tmp_path):
    found = engine.counterfactual(PROMPT, None, STEER, n=20, max_tokens=5, seed=7)
    drawn = engine.smc(PROMPT, SMCParams(n_particles=1, max_tokens=5, seed=7))
    assert found.factual_ids == drawn.token_ids[0]
    found.save(tmp_path / "found.npz")
    read = Counterfactuals.load(tmp_path / "found.npz")
    assert read.factual_ids == found.factual_ids and read.token_ids == found.token_ids
    for name in ("stay", "factual_log_probs", "token_log_kernels", "log_kernel", "first_change"):
        assert np.array_equal(getattr(read, name), getattr(found, name))
    with pytest.raises(ValueError, match="not a fastsmc population"):
        Population.load(tmp_path / "found.npz")
    found.plot_survival(tmp_path / "survival.png")
    assert (tmp_path / "survival.png").stat().st_size > 5000 and "expected_common_prefix" in found.summary()


def test_edit_distance():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ([rng.randrange(3) for _ in range(rng.randrange(6))] for _ in range(2))
        table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (x != y))
        assert _levenshtein(a, b) == table[len(a), len(b)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(text=[]), "text: is empty"),
        (dict(text=[VOCAB]), "text"),
        (dict(text="abc"), "no tokenizer"),
        (dict(text=TEXT, n=0), "n_particles"),
        (dict(text=TEXT, n=4, params=SMCParams()), "n=4"),
        (dict(text=TEXT, noise="no"), "noise"),
        (dict(text=TEXT, noise="gumbel", potential=Lexicon(token_ids=[1], weight=1.0)), "noise='gumbel'"),
        (dict(text=TEXT, intervention=Steer(7, STEER.vector)), "layer=7"),
        (dict(text=None), "max_tokens=None"),
        (dict(text=[3, 1, 6], params=SMCParams(max_tokens=3, stop_token_ids=[1])), "stop token"),
        (dict(text=TEXT, max_tokens=600), "max_tokens"),
    ],
)
def test_refusals(engine, given, message):
    with pytest.raises(ValueError, match=message):
        engine.counterfactual(PROMPT, **{"intervention": STEER, **given})


def test_a_text_that_could_not_be_drawn(engine, tiny):
    unlikely = int(np.argmin(tiny.table[()]))
    with pytest.raises(ValueError, match="impossible"):
        engine.counterfactual(PROMPT, [unlikely, 1], STEER, top_k=2)
    facts = engine.facts(PROMPT, TEXT)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.counterfactual(Facts(torch.zeros(1, VOCAB + 1), (0,), (1,)), intervention=STEER)
    with pytest.raises(ValueError, match="have their own"):
        engine.counterfactual(facts, TEXT)


class Holds(TableTwist):
    """φ is 1 where the second token is among some, else 0."""

    def __init__(self, tokens):
        value = np.where(np.isin(np.arange(VOCAB), tokens), 0.0, -np.inf)
        super().__init__(np.stack([np.zeros(VOCAB), value, np.zeros(VOCAB)]), share=1.0)


@pytest.mark.parametrize("proposal", ["base", "twisted"])
def test_necessity_and_sufficiency(engine, tiny, steered, proposal):
    """Against enumeration; φ is that the second token is among some."""
    params = SMCParams(n_particles=200, max_tokens=STEPS, proposal=proposal)
    exact, _ = law(tiny.table, steered, TEXT)
    for tokens, ask, flip in (([1, 2, 5], engine.necessity, True), ([0, 2, 4], engine.sufficiency, False)):
        potential = Holds(tokens)
        share = sum(p * (s[1] in tokens) for s, p in exact.items())
        found = ask(PROMPT, TEXT, potential, STEER, params, runs=12)
        assert abs(found.estimate - (1 - share if flip else share)) < 4.5 * found.se + 1e-6 and 0 < found.se < 0.03
        other = engine.sufficiency if flip else engine.necessity
        with pytest.raises(ValueError, match="its potential is"):
            other(PROMPT, TEXT, potential, STEER, params)


def test_effects(engine, path, tiny, steered):
    """log Z under do(·) less log Z, of several interventions, within standard errors and between bounds."""
    value = value_table(STEPS, VOCAB, seed=4)
    potential = TableTwist(np.where(np.isinf(value), -1.0, value))
    swaps = [EACH["interchange"], EACH["subspace"]]
    tables = [steered, *(table_under(path, PROMPT, [swap], STEPS) for swap in swaps), tiny.table]
    targets = [
        {s: sum(table[s[:t]][v] for t, v in enumerate(s)) + potential.log_phi(s) for s in tiny.log_p}
        for table in tables
    ]
    log_z = [np.logaddexp.reduce(list(target.values())) for target in targets]
    rng, exact = np.random.default_rng(1), []
    for target, z in zip(targets, log_z, strict=True):
        weights = np.exp(np.array(list(target.values())) - z)
        exact.append([list(list(target)[i]) for i in rng.choice(len(weights), 40, p=weights / weights.sum())])
    params = SMCParams(n_particles=32, max_tokens=STEPS)
    arms = [STEER, *swaps]
    found = engine.effects(PROMPT, params, potential, arms, 24, exact)
    logs = [population.log_z for population in engine.smc([PROMPT] * 24, params, potential)]
    margin = 4 * 2 * np.std(logs, ddof=1) / math.sqrt(24)  # a bound is a mean of logs less one of another arm
    for one, z in zip(found, log_z, strict=False):
        want = z - log_z[-1]
        assert abs(one.estimate - want) < 4.5 * one.se and 0 < one.se < 0.1 and one.shared_seeds
        assert one.lower - margin < want < one.upper + margin
    few = dataclasses.replace(params, n_particles=3)  # whose bounds lie far apart
    wide = engine.effect(PROMPT, few, potential, STEER, 40, (exact[0], exact[-1]))
    assert wide.lower < log_z[0] - log_z[-1] < wide.upper
    # particle i of run r has the same random numbers in all arms
    still, half = (Steer(0, STEER.vector, scale) for scale in (0.0, STEER.scale / 20))
    same, near, far = engine.effects(PROMPT, params, potential, [still, [half], STEER], 10)
    assert same.estimate == 0.0 == same.se and near.se < far.se / 3
    with pytest.raises(ValueError, match="of another model than the engine's"):
        sure = 20 * torch.nn.functional.one_hot(torch.tensor(TEXT), VOCAB).float()
        engine.necessity(Facts(sure, TEXT, PROMPT), None, potential, STEER, params)
    never = TableTwist(np.full((STEPS, VOCAB), -np.inf))
    with pytest.raises(ValueError, match=r"n_particles=32: no run under interventions\[0\] has any weight"):
        engine.effect(PROMPT, params, never, STEER, runs=2)
    with pytest.raises(ValueError, match=r"interventions=\[\]: must be a list of at least one intervention"):
        engine.effects(PROMPT, params, potential, [])
    with pytest.raises(ValueError, match="exact: 1 lists of samples for 2 arms"):
        engine.effects(PROMPT, params, potential, [STEER], 2, exact[:1])
    with pytest.raises(ValueError, match="exact=3: must be a list of exact samples for each arm"):
        engine.effects(PROMPT, params, potential, [STEER], 2, 3)
    with pytest.raises(ValueError, match="params=None: must be SMCParams"):
        engine.effects(PROMPT, None, potential, [STEER])
    alone = engine.effect(PROMPT, params, potential, STEER, runs=1)
    assert math.isnan(alone.se) and alone.lower is None
