"""p0 is what vLLM's sampler would draw from; particles end as they are told to; E[Ẑ] = Z under all of it."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableRows, TableTwist, TinyLlama, make_llama, value_table

from fastsmc import Population, Potential, SMCParams, reference
from fastsmc.params import GROUP_KEY
from fastsmc.smc import Group, GroupEngine, SMCError, arrange, finish
from fastsmc.smc import p0 as p0_module
from fastsmc.smc.captured import is_capturable
from fastsmc.smc.driving import run_group
from fastsmc.smc.p0 import P0, restrict, token_log_probs

VOCAB, STEPS, STOP = 6, 3, 5
CPU = torch.device("cpu")
SETTINGS = [
    dict(top_k=3),
    dict(top_k=1, temperature=0.6),
    dict(top_p=0.7),
    dict(top_p=0.9, temperature=1.7),
    dict(min_p=0.2, temperature=0.8),
    dict(min_p=1.0),
    dict(top_k=20, top_p=0.8, min_p=0.02),
    dict(top_k=1000, top_p=1e-9),
    dict(logit_bias={3: 2.5, 7: -40.0}, allowed_token_ids=(3, 7, 9, 20, 2), top_p=0.95),
    dict(min_tokens=2, max_tokens=4, logit_bias={1: 4.0}),
    dict(allowed_token_ids=(1,), min_tokens=4, max_tokens=4),  # nothing is left
    dict(),
]


def rows_of(kind, vocab, dtype=torch.float32):
    rng = torch.Generator().manual_seed(7)
    z = torch.randn(9, vocab, generator=rng) * 3
    if kind == "ties":
        z = z.round()
    if kind == "equal":
        z = torch.full_like(z, 1.25)
    if kind == "ruled out":
        z[torch.rand(z.shape, generator=rng) < 0.8] = -math.inf
        z[:, 3] = 1.0
    if kind == "one token":
        z[:] = -math.inf
        z[torch.arange(9), torch.arange(9)] = 0.5
    return z.to(dtype)


@pytest.mark.parametrize("head", [4, 512])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "ruled out", "one token", "bfloat16"])
def test_restrict_is_the_reference(kind, head, monkeypatch):
    """Rows of many groups with different settings at once; those of a group without any keep their bits."""
    monkeypatch.setattr(p0_module, "HEAD", head)
    monkeypatch.setattr(p0_module, "GROWTH", 2)
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    rows = rows_of(kind, 67, dtype)
    params = [SMCParams(**settings) for settings in SETTINGS]
    p0s, bounds = [P0(p, {1, 2}, CPU) for p in params], [len(rows) * g for g in range(len(SETTINGS) + 1)]
    before = torch.arange(9).remainder(4).repeat(len(SETTINGS))
    got = restrict(rows.repeat(len(SETTINGS), 1), p0s, bounds, before)
    for settings, part in zip(SETTINGS, got.split(len(rows)), strict=True):
        named = {name: value for name, value in settings.items() if name != "max_tokens"}
        for r, (row, found) in enumerate(zip(rows, part, strict=True)):
            want = reference.restrict(row.float().numpy(), r % 4, stop_token_ids=[1, 2], **named)
            np.testing.assert_array_equal(found.isneginf().numpy(), np.isneginf(want), err_msg=f"{settings} row {r}")
            kept = ~np.isneginf(want)
            np.testing.assert_allclose(found.float().numpy()[kept], want[kept], rtol=1e-6)
    untouched = restrict(rows, [P0(SMCParams(), {1}, CPU)], [0, len(rows)], before[: len(rows)])
    assert untouched is rows


def test_restrict_is_vllms_sampler():
    """The same tokens as vLLM's own functions leave; where equal ones are cut, as many of them."""
    ops = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler", reason="vLLM is not installed")
    processors = pytest.importorskip("vllm.v1.sample.logits_processor.builtin", reason="vLLM is not installed")
    for kind in ("random", "ties", "equal", "ruled out", "one token"):
        for settings in SETTINGS:
            params, rows = SMCParams(**settings), rows_of(kind, 67)
            if params.allowed_token_ids == (1,):
                continue  # vLLM's sampler has nothing to say of a row without mass
            theirs = rows.clone()
            if params.allowed_token_ids:
                theirs[:, [v for v in range(67) if v not in params.allowed_token_ids]] = -math.inf
            if params.min_tokens:
                theirs[:, [1, 2]] = -math.inf
            for token, value in (params.logit_bias or {}).items():
                theirs[:, token] += value
            theirs /= params.temperature
            min_p = object.__new__(processors.MinPLogitsProcessor)
            min_p.min_p_count, min_p.min_p = 1, torch.full((len(rows), 1), params.min_p)
            theirs = min_p.apply(theirs)
            k = torch.full((len(rows),), params.top_k or 67).clamp(max=67)
            theirs = ops.apply_top_k_top_p_pytorch(theirs, k, torch.full((len(rows),), params.top_p))
            ours = restrict(rows.clone(), [P0(params, {1, 2}, CPU)], [0, len(rows)], torch.zeros(len(rows)))
            ours = ours / params.temperature
            if kind in ("ties", "equal"):  # which of the equal ones stay is the sort's business there
                ours, theirs = ours.sort(1).values, theirs.sort(1).values
            assert torch.equal(ours, theirs), (kind, settings)


def test_nan_stays():
    rows = rows_of("random", 67)
    rows[2, 60], rows[3, 5] = math.nan, math.inf
    p0 = P0(SMCParams(top_k=5, top_p=0.9, min_p=0.01), {1}, CPU)
    out = restrict(rows, [p0], [0, len(rows)], torch.zeros(len(rows)))
    assert out[2].isnan().any() and out[3].isposinf().any() and (out[4] > -math.inf).sum() <= 5


# -- exactness ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


def restricted(path, params, ends=None):
    """A `TinyLlama` whose table is p0 under `params`, and which groups run over; `rows` are logits before that."""
    tiny = TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))
    names = ("temperature", "top_k", "top_p", "min_p", "logit_bias", "allowed_token_ids", "min_tokens")
    settings = {name: getattr(params, name) for name in names}
    target = TinyLlama.__new__(TinyLlama)
    target.vocab, target.steps, target.stop, target.log_p, target.table = VOCAB, STEPS, tiny.stop, {}, {}
    for prefix, row in tiny.table.items():
        z = reference.restrict(row.astype(np.float32), len(prefix), stop_token_ids=[STOP], **settings)
        z = z / params.temperature
        target.table[prefix] = z - np.logaddexp.reduce(z)

    def walk(prefix, log_p):
        if len(prefix) == STEPS or (prefix and (prefix[-1] in tiny.stop or (ends and ends(prefix)))):
            target.log_p[prefix] = log_p
            return
        for v in range(VOCAB):
            if target.table[prefix][v] > -math.inf:
                walk((*prefix, v), log_p + target.table[prefix][v])

    walk((), 0.0)
    return tiny, target


class Alternates(TableTwist):
    """Ends a particle once it holds token 3 after token 1, and is never asked for longer ones."""

    def stop(self, state):
        before, last = state.tokens[:, -2:-1].flatten(), state.tokens[:, -1]
        return (before == 1) & (last == 3) if len(before) else torch.zeros_like(state.finished)


class PrefixOnly(TableTwist):
    logw_next = Potential.logw_next


CASES = {
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.75, temperature=1.3),
    "min_p": dict(min_p=0.3),
    "min_tokens": dict(min_tokens=2),
    "bias": dict(logit_bias={0: 1.0, 5: -0.5}, allowed_token_ids=(0, 1, 2, 3, 5)),
    "force_stop": dict(force_stop=True, top_p=0.95),
    "stop": dict(top_k=5),
}


@pytest.mark.parametrize("proposal", ["twisted", "base", "prefix"])
@pytest.mark.parametrize("case", CASES)
def test_unbiased(tiny_path, case, proposal):
    """E[Ẑ] = Z and E[Ẑ·ΣWf] by enumeration, within 4 standard errors; log-probs are those of the restricted table."""
    kind = PrefixOnly if proposal == "prefix" else Alternates if case == "stop" else TableTwist
    if case == "stop" and proposal == "prefix":
        kind = type("Both", (PrefixOnly,), {"stop": Alternates.stop})
    potential = kind(value_table(STEPS, VOCAB, seed=4))
    params = SMCParams(
        n_particles=6, max_tokens=STEPS, ess_threshold=0.8, stop_token_ids=[STOP],
        proposal="base" if proposal == "base" else "twisted", **CASES[case],
    )  # fmt: skip
    ends = (lambda s: s[-2:] == (1, 3)) if case == "stop" else None
    tiny, target = restricted(tiny_path, params, ends)
    truth = {s: lp + potential.log_phi(s) for s, lp in target.log_p.items()}
    if params.force_stop:
        truth = {s: value for s, value in truth.items() if s[-1] == STOP}
    got = {name: [] for name in ("one", "first=0", "length=3", "stopped")}
    for seed in range(250):
        group = Group(SMCParams(**{**vars(params), "seed": seed}), potential, PROMPT, {STOP})
        population = run_group(group, TableRows(tiny, 6))
        z = np.exp(population.log_weights)
        sequences = list(map(tuple, population.token_ids))
        assert all(s in target.log_p or w == 0.0 for s, w in zip(sequences, z, strict=True))
        for s, log_prob, reason in zip(sequences, population.log_probs, population.finish_reasons, strict=True):
            if s in target.log_p:
                assert abs(log_prob - target.log_p[s]) < 1e-5
                assert reason == ("stop" if s[-1] == STOP or (ends and ends(s)) else "length")
        got["one"].append(z.mean())
        got["first=0"].append(np.mean(z * [s[:1] == (0,) for s in sequences]))
        got["length=3"].append(np.mean(z * [len(s) == 3 for s in sequences]))
        got["stopped"].append(np.mean(z * [r == "stop" for r in population.finish_reasons]))
    wanted = {
        "one": sum(np.exp(v) for v in truth.values()),
        "first=0": sum(np.exp(v) for s, v in truth.items() if s[0] == 0),
        "length=3": sum(np.exp(v) for s, v in truth.items() if len(s) == 3),
        "stopped": sum(np.exp(v) for s, v in truth.items() if s[-1] == STOP or (ends and ends(s))),
    }
    for name, want in wanted.items():
        error = np.std(got[name], ddof=1) / np.sqrt(len(got[name]))
        assert abs(np.mean(got[name]) - want) <= 4 * error + 1e-6, (name, np.mean(got[name]), want, error)


def test_forced_stop_without_a_potential(tiny_path):
    """log Ẑ is that of p0(a stop token comes in time), and each particle ends with one."""
    params = SMCParams(n_particles=4000, max_tokens=2, stop_token_ids=[STOP], force_stop=True)
    tiny, target = restricted(tiny_path, params)
    population = run_group(Group(params, None, PROMPT, {STOP}), TableRows(tiny, 4000))
    z = sum(np.exp(target.table[()][v] + target.table[v,][STOP]) for v in range(VOCAB) if v != STOP)
    z += np.exp(target.table[()][STOP])
    assert abs(np.exp(population.log_z) - z) < 4 * np.exp(population.log_weights).std() / np.sqrt(4000)
    assert set(population.finish_reasons) == {"stop"} and all(ids[-1] == STOP for ids in population.token_ids)


def test_groups_of_any_settings_share_a_cohort(tiny_path):
    """Each has the bits that it has alone."""
    tiny = TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))
    phi = Alternates(value_table(STEPS, VOCAB))
    asked = [SMCParams(n_particles=5, max_tokens=STEPS, seed=i, **CASES[c]) for i, c in enumerate(CASES)]
    asked.insert(3, SMCParams(n_particles=5, max_tokens=STEPS, seed=9))
    alone = [run_group(Group(p, phi, PROMPT, {STOP}), TableRows(tiny, 5)) for p in asked]
    groups = [Group(p, phi, PROMPT, {STOP}) for p in asked]
    models = {id(group): TableRows(tiny, 5) for group in groups}
    while left := [group for group in groups if not group.done]:
        for cohort in arrange(left):
            wants, parts, start = cohort.wants(), [], 0
            for g, group in enumerate(wants.groups):
                rows = slice(wants.bounds[g], wants.bounds[g + 1])
                model, first = models[id(group)], group.t == 0
                if wants.moves is not None:
                    model.reindex(wants.moves[start : start + group.n] - start)
                parts.append((model.first() if first else model.next(wants.tokens[rows], wants.slots[rows] - start))[0])
                start += group.n
            finish(cohort.take(torch.cat(parts), None))
    for group, want in zip(groups, alone, strict=True):
        got = group.population()
        assert got.token_ids == want.token_ids and got.log_z == want.log_z
        np.testing.assert_array_equal(got.log_weights, want.log_weights)
        np.testing.assert_array_equal(got.token_log_probs, want.token_log_probs)


def test_what_is_ruled_out_scores_minus_infinity():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3)
    p0 = P0(SMCParams(top_k=2, temperature=0.5), set(), CPU)
    got = token_log_probs(logits, torch.tensor([0, 2, 3]), [p0], [0, 3], torch.zeros(3))
    want = np.array([-math.inf, 4.0, 6.0]) - np.logaddexp(4.0, 6.0)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


def test_no_token_left(tiny_path):
    """A particle whose every token is ruled out is dead, with weight zero, whatever the proposal."""
    tiny = TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))
    params = SMCParams(n_particles=4, max_tokens=STEPS, allowed_token_ids=[STOP], min_tokens=1)
    for potential in (None, TableTwist(value_table(STEPS, VOCAB))):
        population = run_group(Group(params, potential, PROMPT, {STOP}), TableRows(tiny, 4))
        assert population.log_z == -math.inf and population.finish_reasons == ["dead"] * 4


# -- ends on the text --------------------------------------------------------------------------------------------------
class Letters:
    """A tokenizer of letters, whose token 4 is the first byte of a character that token 3 completes."""

    def decode(self, ids, skip_special_tokens=True):
        return "".join("ab.\n\0"[i] if i < 5 else "" for i in ids).replace("\0\n", "é").replace("\0", "\ufffd")


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize(("stop", "min_tokens"), [("b", 0), (["ab", "b."], 0), ("a", 2), (["é", "aa"], 1)])
def test_stop_strings(tiny_path, proposal, stop, min_tokens):
    """A particle ends with the first token whose text completes a stop string, found here by decoding each prefix."""
    steps = 5
    tiny = TinyLlama(tiny_path, VOCAB, steps, frozenset([STOP]))
    params = SMCParams(
        n_particles=60, max_tokens=steps, stop=stop, min_tokens=min_tokens, proposal=proposal, ess_threshold=1.0
    )
    engine = GroupEngine(Letters(), vocab_size=VOCAB)
    phi = TableTwist(value_table(steps, VOCAB))
    population = run_group(Group(params, phi, PROMPT, {STOP}, engine=engine), TableRows(tiny, 60))

    def stops_at(ids):
        text = Letters().decode(ids[:-1]).rstrip("\ufffd")
        new = Letters().decode(ids)
        if new.endswith("\ufffd") or ids[-1] == STOP or len(ids) <= min_tokens:
            return False
        return any(new.find(s, max(0, len(text) + 1 - len(s))) >= 0 for s in params.stop)

    seen = set()
    for ids, reason in zip(population.token_ids, population.finish_reasons, strict=True):
        assert not any(stops_at(ids[:t]) for t in range(1, len(ids)))
        by_text = stops_at(ids)
        assert reason == ("stop" if by_text or ids[-1] == STOP else "length" if len(ids) == steps else "dead")
        assert by_text or ids[-1] == STOP or len(ids) == steps
        seen.add((by_text, len(ids)))
    assert len([s for s in seen if s[0]]) >= 2  # strings do end particles, at several lengths


# -- parameters and files ----------------------------------------------------------------------------------------------
def test_parameters_and_files(tiny_path):
    tiny = TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))
    params = SMCParams(
        n_particles=3, max_tokens=STEPS, top_k=-1, top_p=0.9, min_p=0.1, logit_bias={"2": 1}, stop_token_ids=[STOP],
        allowed_token_ids=range(VOCAB), min_tokens=1, force_stop=True,
    )  # fmt: skip
    assert (params.top_k, params.logit_bias) == (0, {2: 1.0})
    assert json.loads(json.dumps(params.p0())) == params.p0()
    hash(params)
    again = SMCParams.from_request({GROUP_KEY: 3} | params.to_extra_args(), **params.to_shared())
    assert again == params
    population = run_group(Group(params, None, PROMPT, {STOP}), TableRows(tiny, 3))
    read = Population.from_bytes(population.to_bytes())
    assert read.finish_reasons == population.finish_reasons and read.params == params
    assert json.loads(json.dumps(population.to_dict()))["finish_reasons"] == population.finish_reasons


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_k", -2), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_tokens", 5),
        ("logit_bias", [1]), ("logit_bias", {"a": 1.0}), ("logit_bias", {3: math.nan}), ("allowed_token_ids", []),
        ("allowed_token_ids", "12"), ("stop", ""), ("stop", [1]), ("force_stop", 1),
    ],
)  # fmt: skip
def test_refused_values(name, value):
    with pytest.raises(ValueError, match=name):
        SMCParams(max_tokens=4, **{name: value})


def test_refused_ends():
    with pytest.raises(ValueError, match="force_stop=True: needs a stop token"):
        SMCParams(force_stop=True, ignore_eos=True)
    with pytest.raises(ValueError, match="min_tokens=4"):
        SMCParams(force_stop=True, min_tokens=4, max_tokens=4)
    with pytest.raises(SMCError, match="force_stop=True: needs a stop token"):
        Group(SMCParams(force_stop=True), None, PROMPT, set())
    with pytest.raises(SMCError, match="no tokenizer"):
        Group(SMCParams(stop="x"), None, PROMPT, {STOP})
    with pytest.raises(SMCError, match="does not end with a stop token"):
        Group(
            SMCParams(n_particles=2, max_tokens=2, force_stop=True), TableTwist(value_table(2, VOCAB)), PROMPT, {STOP},
            exact=[[0, 1]],
        )  # fmt: skip

    class Answers(TableTwist):
        def stop(self, state):
            return torch.zeros(3)

    group = Group(SMCParams(n_particles=2, max_tokens=2), Answers(value_table(2, VOCAB)), PROMPT, {STOP})

    class Uniform:
        def first(self):
            return torch.zeros(1, VOCAB), None

    with pytest.raises(
        SMCError, match=r"Answers\.stop at step 1: returned \(3,\) torch\.float32; must be a torch\.bool"
    ):
        run_group(group, Uniform())


@pytest.mark.parametrize("settings", [dict(top_p=0.5), dict(min_tokens=1), dict(stop="x"), dict()])
def test_what_is_captured(settings):
    """Steps that are captured have no host in them; a forced stop needs none."""
    params = SMCParams(force_stop=True, **settings)
    assert is_capturable(params, None) == (not settings)
    captured = TableTwist(value_table(2, VOCAB))
    captured.capturable = True
    stopping = Alternates(value_table(2, VOCAB))
    stopping.capturable = True
    assert is_capturable(SMCParams(), captured) and not is_capturable(SMCParams(), stopping)
