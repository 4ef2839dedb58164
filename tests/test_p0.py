"""p0 is what vLLM's sampler would draw from; particles end as they are told to; E[Ẑ] = Z under all of it."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableRows, TableTwist, TinyLlama, make_llama, run_each, value_table

from fastsmc import Population, Potential, SMCParams, reference
from fastsmc import p0 as p0_module
from fastsmc.hf import HFEngine
from fastsmc.p0 import P0, restrict, token_log_probs
from fastsmc.params import GROUP_KEY
from fastsmc.potentials import Infill
from fastsmc.smc import Group, GroupEngine, SMCError, arrange, finish
from fastsmc.smc.captured import why_not_captured
from fastsmc.smc.driving import run_group

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
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor.interface import BatchUpdate

    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=16))
    ending = SMCParams(min_tokens=2, max_tokens=4, stop_token_ids=[2], ignore_eos=True, logit_bias={1: 4.0, 2: 4.0})
    for kind in ("random", "ties", "equal", "ruled out", "one token"):
        for params in (*(SMCParams(**settings, stop_token_ids=[2]) for settings in SETTINGS), ending):
            rows = rows_of(kind, 67)
            if params.allowed_token_ids == (1,):
                continue  # vLLM's sampler has nothing to say of a row without mass
            asked = SamplingParams(**params.to_shared())
            asked.update_from_generation_config({}, 1)  # the model's end of sequence is 1
            before = torch.arange(len(rows)) % 4
            added = [(r, asked, [3], [3] * n) for r, n in enumerate(before.tolist())]
            min_tokens, bias, min_p = (
                getattr(processors, f"{name}LogitsProcessor")(config, CPU, False)
                for name in ("MinTokens", "LogitBias", "MinP")
            )
            for processor in (min_tokens, bias, min_p):
                processor.update_state(BatchUpdate(len(rows), [], added, []))
            theirs = rows.clone()
            if params.allowed_token_ids:
                theirs[:, [v for v in range(67) if v not in params.allowed_token_ids]] = -math.inf
            theirs = bias.apply(min_tokens.apply(theirs)) / params.temperature
            theirs = min_p.apply(theirs)
            k = torch.full((len(rows),), params.top_k or 67).clamp(max=67)
            theirs = ops.apply_top_k_top_p_pytorch(theirs, k, torch.full((len(rows),), params.top_p))
            stops = {2} if params.ignore_eos else {1, 2}
            p0 = Group(params, None, PROMPT, stops, all_stop_token_ids={1, 2}).p0
            ours = restrict(rows.clone(), [p0], [0, len(rows)], before) / params.temperature
            if kind in ("ties", "equal"):  # which of the equal ones stay is the sort's business there
                ours, theirs = ours.sort(1).values, theirs.sort(1).values
            assert torch.equal(ours, theirs), (kind, params)


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


@pytest.fixture(scope="module")
def tiny(tiny_path):
    return TinyLlama(tiny_path, VOCAB, STEPS, frozenset([STOP]))


class Alternates(TableTwist):
    """Ends a particle once it holds token 3 after token 1, and is never asked for longer ones."""

    per_particle = ()

    def stop(self, state):
        before, last = state.tokens[:, -2:-1].flatten(), state.tokens[:, -1]
        return (before == 1) & (last == 3) if len(before) else torch.zeros_like(state.finished)


class PrefixOnly(TableTwist):
    per_particle = ()
    logw_next = Potential.logw_next


CASES = {
    "top_k": dict(top_k=3),
    "top_p": dict(top_p=0.75, temperature=1.3),
    "min_p": dict(min_p=0.3),
    "min_tokens": dict(min_tokens=2),
    "bias": dict(logit_bias={0: 1.0, 5: -0.5}, allowed_token_ids=(0, 1, 2, 3, 5)),
    "force_stop": dict(force_stop=True, top_p=0.95),
    "stop": dict(top_k=5),
    "stop, forced": dict(force_stop=True),
    "power": dict(power=2.0, top_k=5),
    "flattened": dict(power=0.5, power_ramp=(2.0, 1.0, 0.5)),
    "force_stop, power": dict(force_stop=True, power=1.6, power_ramp=2),
    "stop, power": dict(power=1.4, power_ramp=STEPS + 2),
}


def holds_13(s):
    return s[-2:] == (1, 3)  # as `Alternates`


@pytest.mark.parametrize("proposal", ["twisted", "base", "prefix"])
@pytest.mark.parametrize("case", CASES)
def test_unbiased(tiny, case, proposal):
    """E[Ẑ] = Z and E[Ẑ·ΣWf] by enumeration, within 4 standard errors; log-probs are those of the restricted table."""
    ends = holds_13 if case.startswith("stop") else None
    kind = PrefixOnly if proposal == "prefix" else Alternates if ends else TableTwist
    if ends and proposal == "prefix":
        kind = type("Both", (PrefixOnly,), {"stop": Alternates.stop, "per_particle": ()})
    potential = kind(value_table(STEPS, VOCAB, seed=4))
    params = SMCParams(
        n_particles=6, max_tokens=STEPS, ess_threshold=0.8, stop_token_ids=[STOP],
        proposal="base" if proposal == "base" else "twisted", **CASES[case],
    )  # fmt: skip
    target = tiny.restricted(params, ends)
    truth = {s: lp + potential.log_phi(s) for s, lp in target.log_p.items()}
    got = {name: [] for name in ("one", "first=0", "length=3", "stopped")}
    for population in run_each(tiny, [dataclasses.replace(params, seed=seed) for seed in range(250)], potential):
        z = np.exp(population.log_weights)
        sequences = list(map(tuple, population.token_ids))
        assert all(s in target.log_p or w == 0.0 for s, w in zip(sequences, z, strict=True))
        for s, log_prob, reason in zip(sequences, population.log_probs, population.finish_reasons, strict=True):
            if s in target.log_p:
                assert abs(log_prob - target.log_p[s] / params.power) < 1e-5
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


def test_forced_stop_without_a_potential(tiny):
    """log Ẑ is that of p0(a stop token comes in time), and each particle ends with one."""
    params = SMCParams(n_particles=4000, max_tokens=2, stop_token_ids=[STOP], force_stop=True)
    population = run_group(Group(params, None, PROMPT, {STOP}), TableRows(tiny, 4000))
    z = sum(np.exp(tiny.table[()][v] + tiny.table[v,][STOP]) for v in range(VOCAB) if v != STOP)
    z += np.exp(tiny.table[()][STOP])
    assert abs(np.exp(population.log_z) - z) < 4 * np.exp(population.log_weights).std() / np.sqrt(4000)
    assert set(population.finish_reasons) == {"stop"} and all(ids[-1] == STOP for ids in population.token_ids)


def check_together(asked, phi, make):
    """Groups with parameters `asked` have the bits that each has alone, over the models that `make` makes."""
    alone = [run_group(Group(p, phi, PROMPT, {STOP}), make()) for p in asked]
    groups = [Group(p, phi, PROMPT, {STOP}) for p in asked]
    models, cohorts = {id(group): make() for group in groups}, []
    while left := [group for group in groups if not group.done]:
        cohorts.append(len(arrange(left)))
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
    return cohorts


@pytest.mark.parametrize("phi", [None, Alternates(value_table(STEPS, VOCAB))], ids=["plain", "potential"])
def test_groups_of_any_settings_share_a_cohort(tiny, phi):
    """All but those with a bias, whose logits are float32, and those with a power."""
    asked = [SMCParams(n_particles=5, max_tokens=STEPS, seed=i, **CASES[c]) for i, c in enumerate(CASES)]
    asked.insert(3, SMCParams(n_particles=5, max_tokens=STEPS, seed=9))
    assert max(check_together(asked, phi, lambda: TableRows(tiny, 5))) == 3


class Wide:
    """A model in bfloat16 whose rows are so wide that float32 rows with the same numbers have other bits in the end."""

    vocab = 1 << 15

    def _row(self, token):
        return (3 * torch.randn(self.vocab, generator=torch.Generator().manual_seed(token))).bfloat16()

    def first(self):
        return self._row(PROMPT[-1])[None], None

    def next(self, tokens, slots):
        return torch.stack([self._row(token) for token in tokens.tolist()]), None

    def reindex(self, ancestors):
        pass


def test_a_bias_leaves_the_bits_of_its_neighbours():
    settings = [{}, dict(logit_bias={3: 2.0}), dict(top_p=0.9), dict(logit_bias={5: 1.0}, top_k=40), dict(top_k=40)]
    asked = [SMCParams(n_particles=3, max_tokens=3, seed=i, **s) for i, s in enumerate(settings)]
    check_together(asked, None, Wide)
    p0s, n = [P0(p, {STOP}, CPU) for p in asked], len(asked)
    rows, tokens, before = Wide().next(torch.arange(2 * n), None)[0], torch.arange(2 * n), torch.zeros(2 * n)
    score = token_log_probs(rows.clone(), tokens, p0s, list(range(0, 2 * n + 1, 2)), before)
    if torch.cpu._is_avx512_supported():  # else rows of both types are read alike
        assert not torch.equal(token_log_probs(rows.float(), tokens, p0s, list(range(0, 2 * n + 1, 2)), before), score)
    for g, p0 in enumerate(p0s):
        part = slice(2 * g, 2 * g + 2)
        alone = token_log_probs(rows[part].clone(), tokens[part], [p0], [0, 2], before[part])
        assert torch.equal(alone, score[part])


def test_what_is_ruled_out_scores_minus_infinity():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]] * 3)
    p0 = P0(SMCParams(top_k=2, temperature=0.5), set(), CPU)
    got = token_log_probs(logits, torch.tensor([0, 2, 3]), [p0], [0, 3], torch.zeros(3))
    want = np.array([-math.inf, 4.0, 6.0]) - np.logaddexp(4.0, 6.0)
    np.testing.assert_allclose(got.numpy(), want, atol=1e-6)


def test_no_token_left(tiny):
    """A particle whose every token is ruled out is dead, with weight zero, whatever the proposal."""
    params = SMCParams(n_particles=4, max_tokens=STEPS, allowed_token_ids=[STOP], min_tokens=1)
    for potential in (None, TableTwist(value_table(STEPS, VOCAB))):
        population = run_group(Group(params, potential, PROMPT, {STOP}), TableRows(tiny, 4))
        assert population.log_z == -math.inf and population.finish_reasons == ["dead"] * 4


# -- ends on the text --------------------------------------------------------------------------------------------------
class Letters:
    """A tokenizer of letters, whose token 4 is the first byte of a character that token 3 completes."""

    eos_token_id = None

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


# -- over Hugging Face -------------------------------------------------------------------------------------------------
def test_the_hugging_face_driver_scores_under_p0(tiny_path, tiny):
    """Continuations of unfinished particles, within which min_tokens comes to its end, and of finished ones."""
    hf, ids = HFEngine(tiny_path, stop_token_ids=[STOP]), [4, STOP]
    params = SMCParams(
        n_particles=64, max_tokens=2, min_tokens=2, ignore_eos=True, top_k=5, top_p=0.97, temperature=0.9,
        logit_bias={4: 1.0, STOP: 2.0}, ess_threshold=0.0, proposal="base", seed=1,
    )  # fmt: skip
    table = tiny.restricted(params).table
    for continuation in (ids, ids[::-1]):
        population = hf.smc(PROMPT, params, Infill(continuation, every_step=True))
        found = set()
        for i, (first, *rest) in enumerate(population.token_ids):  # of one token where all weights are zero then
            log_p = table[()][first] + sum(table[first,][v] for v in rest)
            assert abs(population.log_probs[i] - log_p) < 1e-4
            want = table[first,][continuation[0]] + table[first, continuation[0]][continuation[1]]
            got = population.step_log_weights[0, i]
            assert got == want or abs(got - want) < 1e-4
            found.add(bool(np.isneginf(want)))
        assert found == {True} if continuation[0] == STOP else False in found  # the stop token is its token 1
    after = hf.smc(PROMPT, dataclasses.replace(params, max_tokens=1, min_tokens=1), Infill(ids))
    for (first,), log_w in zip(after.token_ids, after.log_weights, strict=True):
        want = tiny.restricted(dataclasses.replace(params, max_tokens=1, min_tokens=1)).table
        want = want[first,][4] + want[first, 4][STOP]
        assert log_w == want or abs(log_w - want) < 1e-4


def test_the_hugging_face_engine_equals_the_table(tiny_path, tiny):
    """With p0's settings, stop strings, a forced stop and min_tokens beside ignore_eos."""
    hf, phi = HFEngine(tiny_path, tokenizer=Letters(), stop_token_ids=[STOP]), TableTwist(value_table(STEPS, VOCAB))
    for settings in (
        dict(top_k=4, top_p=0.9, stop=["b", "a."], min_tokens=1), dict(force_stop=True, min_p=0.05, stop="ab"),
        dict(ignore_eos=True, min_tokens=2, stop_token_ids=[2], logit_bias={STOP: 3.0}),
    ):  # fmt: skip
        params = SMCParams(n_particles=40, max_tokens=STEPS, seed=6, **settings)
        population, stops = hf.smc(PROMPT, params, phi), hf.stops(params)
        every, engine = stops | {STOP}, GroupEngine(Letters(), vocab_size=VOCAB)
        group = Group(params, phi, PROMPT, stops, engine=engine, all_stop_token_ids=every)
        want = run_group(group, TableRows(tiny, 40))
        assert population.token_ids == want.token_ids and population.finish_reasons == want.finish_reasons
        np.testing.assert_allclose(population.log_weights, want.log_weights, atol=1e-4)
        assert "stop" in population.finish_reasons
        if params.ignore_eos:
            assert all(not every & set(ids[:2]) for ids in population.token_ids)
            assert any(STOP in ids for ids in population.token_ids)


# -- parameters and files ----------------------------------------------------------------------------------------------
def test_parameters_and_files(tiny):
    params = SMCParams(
        n_particles=3, max_tokens=STEPS, top_k=-1, top_p=0.9, min_p=0.1, logit_bias={"2": 1}, stop_token_ids=[STOP],
        allowed_token_ids=range(VOCAB), min_tokens=1, force_stop=True, power=2, power_ramp=[0.5, 2.0],
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
        ("allowed_token_ids", "12"), ("stop", ""), ("stop", [1]), ("force_stop", 1), ("power", 0.0), ("power", -1),
        ("power", math.inf), ("power", math.nan), ("power", "2"), ("power_ramp", 0), ("power_ramp", 1.5),
        ("power_ramp", []), ("power_ramp", [2.0, 0.0, 1.0]), ("power_ramp", [1.0, 2.0]), ("power_ramp", "12"),
    ],
)  # fmt: skip
def test_refused_values(name, value):
    with pytest.raises(ValueError, match=name):
        SMCParams(max_tokens=4, **{name: value})


def test_powers_of_the_steps():
    assert SMCParams().powers == (1.0,) and not SMCParams(power_ramp=3).powered
    assert SMCParams(power=4.0).powers == (4.0,)
    assert SMCParams(power=4.0, power_ramp=3).powers == (2.0, 3.0, 4.0)
    assert SMCParams(power=0.5, power_ramp=10**6, max_tokens=2).powers[:2] == (1.0 - 0.5e-6, 1.0 - 1e-6)
    assert SMCParams(power=1.0, power_ramp=np.array([2.0, 1.0])).powers == (2.0, 1.0, 1.0)
    assert SMCParams(power=1.0, power_ramp=[2.0, 1.5, 1.0], max_tokens=1).powers == (2.0, 1.0)
    assert SMCParams(power_ramp=[2.0, 1.0]).powered


def test_refused_ends():
    with pytest.raises(ValueError, match="force_stop=True: needs a stop token"):
        SMCParams(force_stop=True, ignore_eos=True)
    with pytest.raises(ValueError, match="min_tokens=4"):
        SMCParams(force_stop=True, min_tokens=4, max_tokens=4)
    params, forced = SMCParams(n_particles=2, max_tokens=2), SMCParams(n_particles=2, max_tokens=2, force_stop=True)
    text, table, letters = dataclasses.replace(params, stop="b"), value_table(2, VOCAB), GroupEngine(Letters())
    for asked, potential, stops, exact, message in (
        (forced, None, set(), None, "force_stop=True: needs a stop token"),
        (forced, TableTwist(table), {STOP}, [[0, 1]], "does not end with a stop token"),
        (text, TableTwist(table), {STOP}, [[0, 1]], r"exact: a group with stop=\['b'\] takes no exact samples"),
        (params, Alternates(table), {STOP}, [[0, 1]], "exact: a group whose potential has `stop` takes no exact"),
    ):
        with pytest.raises(SMCError, match=message) as raised:
            Group(asked, potential, PROMPT, stops, engine=letters, exact=exact)
        assert raised.value.kind == "refused"
    with pytest.raises(SMCError, match="no tokenizer") as raised:
        Group(text, None, PROMPT, {STOP})
    assert raised.value.kind == "refused"

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
    assert (why_not_captured(params, None) is None) == (not settings)
    captured = TableTwist(value_table(2, VOCAB))
    captured.capturable = True
    stopping = Alternates(value_table(2, VOCAB))
    stopping.capturable = True
    assert why_not_captured(SMCParams(), captured) is None
    assert "potential=Alternates: has `stop`" in why_not_captured(SMCParams(), stopping)
