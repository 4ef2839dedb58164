"""Segments: particles that wait for each other at boundaries, over the enumerated table of a tiny Llama."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TableRows, TableTwist, TinyLlama, make_llama, run_table, run_tables, value_table

from fastsmc import Population, Potential, SMCParams
from fastsmc.params import GROUP_KEY
from fastsmc.smc import Group, GroupEngine, SMCError
from fastsmc.smc.driving import run_group

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = value_table(STEPS, VOCAB, seed=4)


class Letters:
    """A tokenizer of letters, whose token 4 is the first byte of a character that token 3 completes."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return "".join("ab.\n\0"[i] if i < 5 else "" for i in ids).replace("\0\n", "é").replace("\0", "\ufffd")


ENGINE = GroupEngine(Letters(), vocab_size=VOCAB)


class ByLength(TableTwist):
    """`TableTwist` of particles of unequal length; it counts what it is asked, and sees what `State` holds."""

    def __init__(self, value=VALUE, share=0.6):
        super().__init__(value, share)
        self.asked = []

    def _so_far(self, state):
        drew = state.tokens >= 0
        assert torch.equal(drew.sum(1), state.lengths)
        tokens = state.tokens.gather(1, (~drew).long().argsort(dim=1, stable=True))[:, :STEPS]
        if state.last_tokens is not None:
            last = tokens.gather(1, (state.lengths - 1).clamp(min=0)[:, None])[:, 0]
            assert torch.equal(state.last_tokens, torch.where(state.last_tokens >= 0, last, -1))
            assert (state.last_tokens >= 0)[~state.finished].all()
        values = self.value[: tokens.shape[1]].T[tokens.clamp(min=0), torch.arange(tokens.shape[1])]
        return torch.where(tokens >= 0, values, 0.0).sum(1)

    def _note(self, method, state):
        segments = None if state.segments is None else state.segments.tolist()
        self.asked.append((method, state.step, segments, state.finished.tolist()))

    def prefix(self, state):
        self._note("prefix", state)
        return super().prefix(state)

    def complete(self, state):
        self._note("complete", state)
        return super().complete(state)

    def logw_next(self, state):
        return self.share * self.value[state.lengths.clamp(max=STEPS - 1)]


class BaseByLength(ByLength):
    """The same without a say in the proposal."""

    logw_next = Potential.logw_next


class GuideByLength(ByLength):
    """A twist that only shapes the proposal."""

    proposal_only = True

    def logw_next(self, state):
        return super().logw_next(state) * 1.7 + state.lengths[:, None]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def cut(params, ids):
    """How many tokens a particle of these tokens has when each of its segments has ended: all, by its end."""
    ends, begin = [], 0
    for t in range(1, len(ids) + 1):
        before, text = Letters().decode(ids[: t - 1]), Letters().decode(ids[:t])
        start = Letters().decode(ids[:begin])
        new = "" if text.endswith("\ufffd") else text[len(start.rstrip("\ufffd")) :]
        old = before.rstrip("\ufffd")[len(start.rstrip("\ufffd")) :]
        by_text = any(new.find(s, max(0, len(old) + 1 - len(s))) >= 0 for s in params.segment or ())
        by_token = ids[t - 1] in (params.segment_token_ids or ()) or t - begin == params.max_segment_tokens
        if by_text or by_token or t == len(ids):
            ends.append(t)
            begin = t
    return ends


#: a delimiter of one token, one across two, token ids, a cap, several, one that is a stop token too, none ever met
WAYS = {
    "one token": dict(segment="."),
    "two tokens": dict(segment="ab", max_segment_tokens=3),
    "a character of two": dict(segment=["é", "b"]),
    "ids": dict(segment_token_ids=[1, 3]),
    "not across a boundary": dict(segment="ab", segment_token_ids=[0]),
    "cap": dict(max_segment_tokens=2),
    "stop token": dict(segment_token_ids=[STOP, 0], max_segment_tokens=3),
    "never": dict(segment="aaaaaaaa"),
}
KINDS = {"twisted": ByLength(), "base": BaseByLength(), "guided": GuideByLength()}


def groups_of(tiny, kind, params, runs, **more):
    each = [dataclasses.replace(params, group=i) for i in range(runs)]
    return [Group(p, KINDS[kind], PROMPT, tiny.stop, engine=ENGINE, **more) for p in each]


def check_record(params, population, tiny):
    """Segments, boundaries, log-probs and gaps are what the particles' tokens say."""
    assert population.boundaries[-1] + 1 <= population.T
    between = np.ones(population.T + 1, bool)
    resampled_at = np.flatnonzero(population.resampled)
    between[np.array(population.boundaries) + 1] = False
    assert not between[resampled_at].any()  # a step is resampled before it draws, just behind a boundary
    for i, ids in enumerate(population.token_ids):
        assert population.segments[i] == len(cut(params, ids)) or population.finish_reasons[i] == "dead"
        rows = population.lineage(i)
        drawn = population.tokens[np.arange(population.T), rows]
        assert [v for v in drawn if v >= 0] == ids
        table = [tiny.table[tuple(ids[:t])][v] for t, v in enumerate(ids)]
        np.testing.assert_allclose(population.token_log_probs[i][drawn >= 0], table, atol=1e-5)
        assert (population.token_log_probs[i][drawn < 0] == 0).all()
        for length in cut(params, ids)[:-1]:  # nobody goes on before the boundary that follows
            at = np.flatnonzero(drawn >= 0)
            boundary = min(b for b in population.boundaries if b >= at[length - 1])
            assert at[length] == boundary + 1


CASES = [
    *((way, "base", "systematic", 1.0) for way in WAYS),
    *((way, ("twisted", "guided")[i % 2], "systematic", 1.0) for i, way in enumerate(WAYS)),
    *itertools.product(["two tokens"], ["twisted", "base"], ["multinomial", "ssp"], [0.5, 1.0]),
]


@pytest.mark.parametrize(("way", "kind", "scheme", "threshold"), CASES)
def test_unbiased(tiny, way, kind, scheme, threshold):
    """E[Ẑ] = Z and E[Ẑ ΣWf] by enumeration, within 4 standard errors; the record is as the particles' tokens say."""
    params = SMCParams(
        n_particles=5, max_tokens=STEPS, resampling=scheme, ess_threshold=threshold, seed=3,
        proposal="base" if kind == "base" else "twisted", **WAYS[way],
    )  # fmt: skip
    populations = run_tables(tiny, groups_of(tiny, kind, params, 120))
    phi = KINDS[kind]
    truth = {s: math.exp(lp + phi.log_phi(s)) for s, lp in tiny.log_p.items()}
    for f in (lambda s: 1.0, lambda s: float(len(s)), lambda s: float(s[0] == 1), lambda s: float(2 in s)):
        want = sum(p * f(s) for s, p in truth.items())
        got = np.array([
            np.mean([math.exp(w) * f(tuple(ids)) for w, ids in zip(p.log_weights, p.token_ids, strict=True)])
            for p in populations
        ])  # fmt: skip
        assert abs(got.mean() - want) < 4 * got.std(ddof=1) / math.sqrt(len(got)) + 1e-12, (got.mean(), want)
    for population in populations[:20]:
        check_record(params, population, tiny)


def same(a, b):
    for name in ("log_weights", "log_probs", "ess", "resampled", "ancestors", "tokens", "step_log_weights"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    assert (a.token_ids, a.log_z, a.finish_reasons) == (b.token_ids, b.log_z, b.finish_reasons)


SETTINGS = [
    dict(ess_threshold=0.5), dict(resampling_temperature=2.0, ess_threshold=1.0), dict(resample_every=2),
    dict(power=1.5, power_ramp=3, ess_threshold=1.0, resampling="ssp"), dict(resampling_temperature="entropic"),
    dict(top_k=4, temperature=1.3, min_tokens=2), dict(force_stop=True, ess_threshold=1.0),
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_segments_of_one_token_are_none(tiny, kind, settings):
    """They give the population of a group without segments, bit for bit."""
    params = SMCParams(n_particles=40, max_tokens=STEPS, proposal="base" if kind == "base" else "twisted", **settings)
    plain = run_table(tiny, params, KINDS[kind])
    for way in (dict(max_segment_tokens=1), dict(segment_token_ids=range(VOCAB))):
        population = run_table(tiny, dataclasses.replace(params, **way), KINDS[kind])
        same(population, plain)
        assert population.segments.tolist() == [len(ids) for ids in population.token_ids]
        n_drawn = int((population.tokens >= 0).any(1).sum())  # the last one may be an empty step
        assert population.boundaries.tolist() == list(range(n_drawn))


@pytest.mark.parametrize(("settings", "kind"), [
    (dict(resampling_temperature=2.0), "base"), (dict(resample_every=2), "twisted"), (dict(resample_every=2), "base"),
    (dict(power=1.5, power_ramp=3), "base"), (dict(power=0.7, power_ramp=2), "twisted"),
    (dict(force_stop=True), "twisted"), (dict(stop=["b"], min_tokens=1), "guided"), (dict(n_particles=1), "base"),
])  # fmt: skip
def test_unbiased_beside_other_settings(tiny, settings, kind):
    params = SMCParams(**dict(
        n_particles=5, max_tokens=STEPS, ess_threshold=1.0, seed=5, segment="ab", max_segment_tokens=2,
        proposal="base" if kind == "base" else "twisted",
    ) | settings)  # fmt: skip
    populations = run_tables(tiny, groups_of(tiny, kind, params, 300))

    def ends(prefix):
        old, new = Letters().decode(prefix[:-1]), Letters().decode(prefix)
        return params.stop is not None and len(prefix) > params.min_tokens and any(
            new.find(s, max(0, len(old.rstrip("\ufffd")) + 1 - len(s))) >= 0 for s in params.stop
        ) and not new.endswith("\ufffd") and prefix[-1] != STOP  # fmt: skip

    target, phi = tiny.restricted(params, ends), KINDS[kind]
    for population in populations[:40]:
        check_record(params, population, target)
        every = population.boundaries[params.resample_every - 1 :: params.resample_every]
        assert set(np.flatnonzero(population.resampled) - 1) <= set(every)
    z = np.array([math.exp(p.log_z) for p in populations])
    want = math.exp(target.log_z(phi.log_phi))
    assert abs(z.mean() - want) < 4 * z.std(ddof=1) / math.sqrt(len(z)), (z.mean(), want)


def test_conditional_groups(tiny):
    """E[1/Ẑ] = 1/Z for an exact sample whose segments others wait for, and one that waits for others."""
    value = np.where(np.isinf(VALUE), -1.0, VALUE)
    phi, runs = BaseByLength(value), 300
    posterior = tiny.posterior(phi.log_phi)
    picks = np.random.default_rng(1).choice(len(posterior), size=runs, p=list(posterior.values()))
    exact = [list(list(posterior)[i]) for i in picks]
    params = SMCParams(
        n_particles=6, max_tokens=STEPS, ess_threshold=1.0, proposal="base", segment="ab", max_segment_tokens=2, seed=2
    )
    groups = [
        Group(dataclasses.replace(params, group=i), phi, PROMPT, tiny.stop, engine=ENGINE, exact=[ids])
        for i, ids in enumerate(exact)
    ]
    populations = run_tables(tiny, groups)
    for population, ids in zip(populations, exact, strict=True):
        assert ids in population.token_ids
    inverse = np.array([math.exp(-p.log_z) for p in populations])
    want = math.exp(-tiny.log_z(phi.log_phi))
    assert abs(inverse.mean() - want) < 4 * inverse.std(ddof=1) / math.sqrt(runs)


def test_potentials_are_asked_at_boundaries(tiny):
    """`prefix` about the unfinished and `complete` about those that have ended since, with the segments so far."""
    for way in ("two tokens", "stop token", "never"):
        phi = BaseByLength()
        params = SMCParams(n_particles=50, max_tokens=STEPS, ess_threshold=1.0, proposal="base", **WAYS[way])
        group = Group(params, phi, PROMPT, tiny.stop, engine=ENGINE)
        population = run_group(group, TableRows(tiny, 50))
        asked = group.asker.potential.asked[1:]  # behind that about the empty sequences
        at = {step for _, step, _, _ in asked}
        assert at == {b + 1 for b in population.boundaries}
        for _, _, segments, _ in asked:
            assert max(segments) <= STEPS
        k = {"prefix": 0, "complete": 0}
        for method, _, segments, finished in asked:
            k[method] += 1
            if method == "prefix":
                waiting = [s for s, f in zip(segments, finished, strict=True) if not f]
                assert waiting == [waiting[0]] * len(waiting) == [k["prefix"]] * len(waiting)  # all as many
        if way == "never":
            assert params.max_tokens == population.T


def test_groups_beside_each_other(tiny):
    """Groups with segments share passes with each other and with groups that have none: each as it is alone."""
    asked = [
        dict(), dict(segment="ab"), dict(max_segment_tokens=2, n_particles=9), dict(segment=[".", "b"], stop="aa"),
        dict(proposal="twisted"), dict(proposal="twisted", segment_token_ids=[1, 2], n_particles=3),
        *(dict(proposal="twisted", max_segment_tokens=1, max_tokens=n, ess_threshold=1.0) for n in (2, 3, 4)),
    ]  # fmt: skip
    params = [SMCParams(**dict(n_particles=6, max_tokens=STEPS, ess_threshold=0.8, proposal="base", group=i) | more)
              for i, more in enumerate(asked)]  # fmt: skip
    made = lambda: [Group(p, ByLength(), PROMPT, tiny.stop, engine=ENGINE) for p in params]  # noqa: E731
    for group, population in zip(made(), run_tables(tiny, made()), strict=True):
        same(population, run_group(group, TableRows(tiny, group.n)))


def test_what_is_refused(tiny):
    for settings, said in (
        (dict(segment=""), "segment='': must be a string or a list of strings, none of them empty"),
        (dict(segment=["a", ""]), "segment="), (dict(segment=3), "segment=3"), (dict(segment="\ud800"), "surrogate"),
        (dict(segment_token_ids=[-1]), "segment_token_ids"), (dict(segment_token_ids="a"), "segment_token_ids='a'"),
        (dict(max_segment_tokens=0), "max_segment_tokens=0"), (dict(max_segment_tokens=True), "max_segment_tokens"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="^segment|^max_segment|surrogate") as caught:
            SMCParams(**settings)
        assert said in str(caught.value)
    with pytest.raises(SMCError, match=r"segment=\['a'\]: this engine has no tokenizer; give segment_token_ids"):
        run_table(tiny, SMCParams(segment="a"), None)

    class Encodes(Letters):
        def encode(self, text, add_special_tokens):
            return ["ab.\n".index(c) if c in "ab.\n" else STOP for c in text]

    with pytest.raises(SMCError, match=r"segment=\['b', '<end>'\]: no text of this model's tokens holds '<end>'"):
        engine = GroupEngine(Encodes(), vocab_size=VOCAB)
        Group(SMCParams(segment=["b", "<end>"]), None, PROMPT, tiny.stop, engine=engine)


def test_parameters_and_files(tiny):
    params = SMCParams(
        n_particles=9, max_tokens=STEPS, segment="ab", segment_token_ids=np.array([2]), max_segment_tokens=3
    )
    assert (params.segment, params.segment_token_ids, params.segmented) == (("ab",), (2,), True)
    assert SMCParams.from_request({GROUP_KEY: 9} | params.to_extra_args(), **params.to_shared()) == params
    assert not SMCParams(segment_token_ids=[]).segmented
    a, b = run_tables(tiny, groups_of(tiny, "base", dataclasses.replace(params, proposal="base"), 2))
    read = Population.from_bytes(a.to_bytes())
    np.testing.assert_array_equal(read.segments, a.segments)
    np.testing.assert_array_equal(read.boundaries, a.boundaries)
    pooled = Population.pool([a, b])
    assert pooled.segments.tolist() == [*a.segments, *b.segments]
    assert pooled.boundaries.tolist() == sorted({*a.boundaries, *b.boundaries})
    for broken in (dict(segments=None), dict(segments=[1]), dict(boundaries=[a.T])):
        with pytest.raises(ValueError, match="segments, boundaries"):
            dataclasses.replace(a, **broken)
