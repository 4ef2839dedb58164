"""`fastsmc.genlm.smc`: programs as one group request, against enumeration and against genlm-control."""

import asyncio
import itertools
import json
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from genlm.control import AWRS, SMC, BoolFSA, PromptedLLM, direct_token_sampler, eager_token_sampler
from genlm.control.constant import EOS as END
from genlm.control.sampler.sequence import Sequences
from genlm.control.util import escape

from fastsmc.genlm import FastsmcLM, asmc, smc
from fastsmc.smc import SMCError

from .test_genlm import EOS, PROMPT, STEPS, Counts, Raises, exact, lm, samplers, tokenizer, unnormalised  # noqa: F401

RUNS = 40


def check(found, target):
    """Ẑ, and Ẑ times the share of texts by length and by first letter, where it is 5 % at least: 4 standard errors."""
    tests = [lambda text: True]
    tests += [lambda text, n=n: len(text) == n for n in range(STEPS)]
    tests += [lambda text, letter=letter: text.startswith(letter) for letter in "abcdef"]
    compared = 0
    for test in tests:
        want = sum(p for text, p in target.items() if test(text))
        values = np.array([sum(p for text, p in shares.items() if test(text)) for shares in found])
        if want >= 0.05 * sum(target.values()):
            assert abs(values.mean() - want) <= 4 * values.std(ddof=1) / math.sqrt(len(values)) + 1e-9
            compared += 1
    assert compared > 3


PROGRAMS = [
    "direct",
    "product",
    "product, asked",
    "two automata",
    "AWRS",
    "AWRS, asked",
    "critic",
    "automaton as critic",
    "eager",
    "topk",
    "weighted",
]


@pytest.mark.parametrize(
    "program", [*PROGRAMS, "product and critic", "product, asked and critic", "AWRS, asked and critic"]
)
def test_programs_are_unbiased(lm, exact, program):  # noqa: F811
    made = samplers(lm)
    sampler, critic, phi = made[program.partition(" and ")[0]]
    if "and" in program:
        critic, other = made["critic"][1:]
        target = {text: p * phi(text) * other(text) for text, p in exact.items()}
    else:
        target = {text: p * phi(text) for text, p in exact.items()}
    found = []
    for seed in range(RUNS):
        n = 20 + seed % 7  # of 24, strata give a class of 0.334 eight particles in nearly every run
        run = smc(sampler, critic, n_particles=n, ess_threshold=0.7, max_tokens=STEPS, seed=seed)
        assert isinstance(run, Sequences) and len(run.contexts) == n
        found.append(unnormalised(run))
        assert run.log_ml == pytest.approx(math.log(sum(found[-1].values())))
        assert all(target[text] > 0 for text in found[-1])
        alive = [context for context, w in zip(run.contexts, run.log_weights, strict=True) if w > -math.inf]
        assert all(context[-1] is END and END not in context[:-1] for context in alive)
        assert not program.startswith("AWRS") or len(alive) == n  # something is allowed after each text, and drawn
    check(found, target)


@pytest.mark.parametrize("kind", ["direct", "AWRS", "AWRS, asked"])
def test_terminate_when(lm, kind):  # noqa: F811
    """A text ends with its first "b", under the critic's `complete` and no EOS. Of the condition `prefix` is asked: for
    that "b" may come, but no whole text may end with it."""
    llm = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[EOS], temperature=1.5)
    settings = dict(n_particles=24, ess_threshold=0.7, max_tokens=STEPS)
    critic = Counts(llm.vocab)
    f = (lambda tokens: b"".join(tokens)) if "asked" in kind else b"".join
    condition = BoolFSA.from_regex("((a|b|c|d)*(a|c|d))?").coerce(llm, f=f)
    sampler = direct_token_sampler(llm) if kind == "direct" else AWRS(llm, condition)

    def ends(context):
        return bytes(context[-1]) == b"b"

    def means(runs):
        by_text = defaultdict(lambda: np.zeros(len(runs)))
        for i, run in enumerate(runs):
            by_text[None][i] = math.exp(run.log_ml)
            for text, weight in unnormalised(run).items():
                by_text[text][i] = weight
        return by_text

    async def genlm():
        return [await SMC(sampler, critic)(terminate_when=ends, **settings) for _ in range(RUNS)]

    np.random.seed(2)
    torch.manual_seed(2)
    theirs = means(asyncio.run(genlm()))
    ours = means([smc(sampler, critic, terminate_when=ends, seed=i, **settings) for i in range(RUNS)])
    common = [text for text in ours if ours[text].mean() > 0.02 * ours[None].mean()]
    assert len(common) > 4 and any(text and text.endswith("b") for text in common)
    assert not any(text and "b" in text[:-1] for text in ours)
    for text in common:
        error = math.sqrt((ours[text].var(ddof=1) + theirs[text].var(ddof=1)) / RUNS)
        assert abs(ours[text].mean() - theirs[text].mean()) < 4 * error, text


def rebuilt(record, n):
    """Follows a record as genlm-control's viewer does: texts and weights of the last entry; counts resamplings."""
    contents, weights, resamplings = [""] * n, [0.0] * n, 0
    for i, entry in enumerate(record):
        rows = entry.pop("ancestors") if entry["mode"] == "resample" else range(n)
        resamplings += entry["mode"] == "resample"
        assert set(entry) == {"mode", "step", "particles"} and entry["step"] == i + 1
        assert (entry["mode"] == "init") == (i == 0) and len(entry["particles"]) == len(rows) == n
        new = [(p["contents_incr"], p["logweight"], p["weight_incr"]) for p in entry["particles"]]
        assert all(len(p) == 3 for p in entry["particles"]) and all(type(v) is str for each in new for v in each)
        now = [float(weight) for _, weight, _ in new]
        for (_, _, change), weight, row in zip(new, now, rows, strict=True):
            if weights[row] > -math.inf:
                assert float(change) == pytest.approx(weight - weights[row], abs=1e-6)
        contents = ["|".join(filter(None, [contents[r], more])) for r, (more, _, _) in zip(rows, new, strict=True)]
        weights = now
    return contents, weights, resamplings


@pytest.mark.parametrize("program", ["product", "critic", "AWRS, asked", "terminate_when"])
def test_json_record(lm, tmp_path, program):  # noqa: F811
    """Has the structure of genlm-control's own, and the texts and weights that the run gave."""
    n, path = 16, tmp_path / "record.json"
    sampler, critic, _ = samplers(lm)["critic" if program == "terminate_when" else program]
    ends = (lambda context: bytes(context[-1]) == b"b") if program == "terminate_when" else None
    settings = dict(n_particles=n, ess_threshold=0.95, max_tokens=STEPS, json_path=str(path), terminate_when=ends)
    np.random.seed(3)
    torch.manual_seed(3)
    theirs = asyncio.run(SMC(sampler, critic)(**settings))
    texts, _, _ = rebuilt(json.loads(path.read_text()), n)
    assert {"|".join(map(escape, context)) for context in theirs.contexts} <= set(texts)
    resamplings = 0
    for seed in range(4):
        ours = smc(sampler, critic, seed=seed, **settings)
        record = json.loads(path.read_text())
        texts, weights, more = rebuilt(record, n)
        assert texts == ["|".join(map(escape, context)) for context in ours.contexts]
        np.testing.assert_allclose(weights, ours.log_weights, atol=1e-6)
        resamplings += more
        if program == "product":  # of p0 and what is 0 or 1: the largest weight never grows, and falls to the mean
            most = [max(float(p["logweight"]) for p in entry["particles"]) for entry in record]
            for (before, after), entry in zip(itertools.pairwise([0.0, *most]), record, strict=True):
                assert after < before - 1e-3 if entry["mode"] == "resample" else after <= before + 1e-6
    assert resamplings > 0


def test_the_core_in_its_own_process(process_engine, tokenizer):  # noqa: F811
    """Potentials travel; the prompt and the temperature are those of the caller's context."""
    with FastsmcLM(process_engine, tokenizer=tokenizer) as there:
        llm = PromptedLLM(there, prompt_ids=PROMPT, eos_byte_strings=[EOS])
        coerced = BoolFSA.from_regex("(a|b|c)*d?").coerce(llm, f=b"".join)
        settings = dict(n_particles=16, ess_threshold=0.5, max_tokens=STEPS)
        first = smc(direct_token_sampler(llm * coerced), **settings)
        again = asyncio.run(asmc(direct_token_sampler(llm * coerced), **settings))
        assert first.contexts == again.contexts and first.log_ml == again.log_ml

        async def elsewhere():
            llm.prompt_ids = [2, 2]
            return await asmc(direct_token_sampler(llm * coerced), **settings)

        assert asyncio.run(elsewhere()).log_ml != first.log_ml
        asked = BoolFSA.from_regex("(a|b|c)*d?").coerce(llm, f=lambda tokens: b"".join(tokens))
        rejected = smc(AWRS(llm, asked), resampling_method="ssp", seed=4, **settings)
        assert rejected.log_ml == pytest.approx(first.log_ml, abs=1.0)


def test_refusals(lm):  # noqa: F811
    llm = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[EOS])
    regular = BoolFSA.from_regex("(a|b)*")
    coerced, counted = regular.coerce(llm, f=b"".join), Counts(llm.vocab)
    adapted = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[EOS], lora_name="x")
    settings = dict(n_particles=4, ess_threshold=0.5, max_tokens=STEPS)
    for sampler, critic, more, message in [
        (
            eager_token_sampler(llm, Counts([97, 98])),
            None,
            {},
            "its sets are of .*Counts.*, which is not compiled; run the program as it is",
        ),
        (llm, None, {}, r"must be direct_token_sampler\(…\), AWRS\(…\) or a set sampler of an automaton; run the"),
        (direct_token_sampler(llm, proposal=llm), None, {}, "draws from another proposal"),
        (AWRS(llm, coerced, max_rejects=5), None, {}, "has a proposal, max_rejects or"),
        (AWRS(llm, coerced, proper_weights=False), None, {}, "proper_weights=False"),
        (direct_token_sampler(counted), None, {}, "has 0 PromptedLLM in its product"),
        (direct_token_sampler(llm * llm), None, {}, "has 2 PromptedLLM"),
        (direct_token_sampler(llm), llm, {}, "holds a language model"),
        (direct_token_sampler(adapted), None, {}, "its PromptedLLM has lora_name='x'"),
        (direct_token_sampler(llm), regular, {}, "in its vocabulary; must be tokens of the model"),
        (direct_token_sampler(llm), None, dict(json_path="/no/x"), "json_path='/no/x': its folder must exist"),
        (direct_token_sampler(llm), None, dict(resampling_method="best"), "resampling='best'"),
        (direct_token_sampler(llm), None, dict(max_tokens=0), "max_tokens=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            smc(sampler, critic, **settings | more)
    with pytest.raises(SMCError, match="raised KeyError: 'no such thing'"):
        smc(direct_token_sampler(llm), Raises(llm.vocab), **settings)
    with pytest.raises(SMCError, match=r"AWRS's condition says 0.7\d* of token ids"):
        smc(AWRS(llm, counted), **settings)
    assert math.isfinite(smc(direct_token_sampler(llm), **settings).log_ml)
