"""`fastsmc.genlm`: rows are a full recompute, and genlm-control's programs over them have the exact posterior."""

from fastsmc.genlm import FastsmcLM, containment  # isort: skip  (before genlm, whose import it contains)
import asyncio
import math
import os
import random
import shutil
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
import torch
from genlm.bytes import BeamParams
from genlm.control import (
    AWRS,
    SMC,
    WFSA,
    BoolFSA,
    ByteLLM,
    Ensemble,
    Potential,
    PromptedLLM,
    direct_token_sampler,
    eager_token_sampler,
    topk_token_sampler,
)
from genlm.control.sampler.unit import MultiTokenUnitSampler, TokenSetBoundary
from genlm.control.util import flatten_units
from genlm.grammar import WFSA as Automaton
from genlm.grammar import Float
from tiny import PROMPT, TinyLlama
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fastsmc import SMCParams
from fastsmc.smc import SMCError
from fastsmc.vllm.compat import UnsupportedError
from fastsmc.vllm.model import Model

from .conftest import VOCAB
from .test_attend import prompt_of, runner_of

#: tokens 6 and 7 have the same bytes, so genlm takes both for one EOS
LETTERS, EOS = "abcdef", b" "
STEPS = 4
#: the same tokens spelled otherwise: a text of three letters is up to three sequences of tokens
SPELLINGS = ["a", "b", "ab", "ba", "aba", "c"]
#: another prompt
OTHER = [2, 2, 3]


def make_tokenizer(letters=LETTERS):
    names = [*letters, "▁", " "]
    made = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="a"))
    made.decoder = decoders.ByteFallback()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="▁", eos_token="▁")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def lm(engine, tokenizer):
    with FastsmcLM(engine, tokenizer=tokenizer) as made:
        yield made


@pytest.fixture(scope="module")
def recomputed(tiny_path):
    """Maps a history to its row by transformers, without a KV cache."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def row(ids):
        return model(torch.tensor([list(ids)]), use_cache=False).logits[0, -1].double().log_softmax(-1).numpy()

    return row


def check(lm, recomputed, histories):
    rows = lm.batch_next_token_logprobs_sync(histories)
    assert rows.shape == (len(histories), VOCAB) and rows.dtype == torch.float32
    for ids, row in zip(histories, rows.numpy(), strict=True):
        np.testing.assert_allclose(row, recomputed(ids), atol=5e-5)
    used, free = lm.count_blocks()
    assert used + free == lm.n_blocks


# ---------------------------------------------------------------------------------------------------------------- rows
@pytest.mark.parametrize("which", ["engine", "process_engine"])
@pytest.mark.parametrize("blocks", [9, 400])
def test_rows_are_a_full_recompute(request, which, blocks, tokenizer, recomputed, engine):
    """Histories that grow over block ends, branch within a block and at its end, are freed, and run again; in a pass of
    64 tokens at most (`process_engine`), and with room for two of them at a time."""
    block_bytes = runner_of(engine)._model.block_bytes
    llm = request.getfixturevalue(which)
    with FastsmcLM(llm, cache_bytes=(blocks + 1) * block_bytes, tokenizer=tokenizer) as lm:
        assert lm.n_blocks == blocks and lm.block_size == 32
        first = [prompt_of(n, seed) for n, seed in ((1, 0), (31, 1), (32, 2), (33, 3), (70, 4), (130, 5))]
        check(lm, recomputed, first)
        check(lm, recomputed, [[*ids, 3] for ids in first])  # one more
        check(lm, recomputed, [[*first[5], n, 1] for n in range(5)])  # a new branch each, behind four block ends
        check(lm, recomputed, [[*first[5][:n], 2] for n in (32, 64, 96, 100, 5)])  # at block ends and within
        shared = prompt_of(100, 9)
        check(lm, recomputed, [[*shared, *prompt_of(n, n)] for n in (1, 40, 29, 28, 1)])  # share what is new, one twice
        check(lm, recomputed, first)  # known in full, or freed
        lm.clear_cache()
        assert lm.count_blocks() == (0, blocks)
        check(lm, recomputed, first[:3])


def test_only_new_tokens_run(engine, tokenizer, monkeypatch):
    queries, hidden = [], Model.hidden

    def record(self, batch):
        queries.append(len(batch.tokens))
        return hidden(self, batch)

    monkeypatch.setattr(Model, "hidden", record)
    with FastsmcLM(engine, tokenizer=tokenizer) as lm:
        prompt = prompt_of(64, 3)
        lm.batch_next_token_logprobs_sync([[*prompt, n] for n in range(6)] * 3)
        lm.batch_next_token_logprobs_sync([[*prompt, n, m] for n in range(6) for m in range(2)])
    assert queries == [64 + 6, 12]


def test_ten_thousand_contexts(engine, tokenizer, recomputed):
    """In a cache of 60 blocks: the account is right after each call, and rows are after the last."""
    block_bytes, draw = runner_of(engine)._model.block_bytes, random.Random(1)
    with FastsmcLM(engine, cache_bytes=61 * block_bytes, tokenizer=tokenizer) as lm:
        contexts, seen = [prompt_of(20)], set()
        while len(seen) < 10_000:
            grown = [[*draw.choice(contexts), *(draw.randrange(VOCAB) for _ in range(3))] for _ in range(400)]
            lm.batch_next_token_logprobs_sync(grown)
            assert sum(lm.count_blocks()) == 60
            seen.update(map(tuple, grown))
            contexts = [ids for ids in grown if len(ids) < 100][-100:] or [prompt_of(20)]
        check(lm, recomputed, grown[:3] + [list(ids) for ids in list(seen)[:3]])
        lm.clear_cache()
        assert lm.count_blocks() == (0, 60)


def test_groups_keep_their_bits(engine, lm, all_blocks_back):
    params = SMCParams(n_particles=16, max_tokens=40, seed=3, temperature=0.9)
    prompt = prompt_of(33, 2)
    before = engine.smc(prompt, params)
    row = lm.next_token_logprobs_sync(prompt)
    between = engine.smc(prompt, params)
    assert torch.equal(lm.next_token_logprobs_sync(prompt), row)
    after = engine.smc(prompt, params)
    for each in (between, after):
        assert each.token_ids == before.token_ids
        np.testing.assert_array_equal(each.log_probs, before.log_probs)


# -------------------------------------------------------------------------------------------------------------- callers
def test_callers_of_all_tasks_are_one_call(lm, recomputed, monkeypatch):
    calls, ask = [], lm._ask
    monkeypatch.setattr(lm, "_ask", lambda method, *args: calls.append(args[0]) or ask(method, *args))

    async def walk(token):
        for n in range(1, 4):
            row = await lm.next_token_logprobs([*PROMPT, *[token] * n])
            np.testing.assert_allclose(row.numpy(), recomputed([*PROMPT, *[token] * n]), atol=5e-5)

    async def main():
        await asyncio.gather(*map(walk, [0, 1, 2, 0]))

    asyncio.run(main())
    assert list(map(len, calls)) == [3, 3, 3]


def test_errors_reach_only_those_who_err(lm, recomputed):
    async def main():
        right = asyncio.create_task(lm.next_token_logprobs(PROMPT))
        wrong = [asyncio.create_task(lm.next_token_logprobs(ids)) for ids in ([], [VOCAB], [-1], [1] * 513)]
        cancelled = [asyncio.create_task(lm.next_token_logprobs([1, n])) for n in range(3)]
        adapter = asyncio.create_task(lm.next_token_logprobs(PROMPT, lora_name="x"))
        late = asyncio.create_task(lm.next_token_logprobs([4]))
        await asyncio.sleep(0)
        for task in cancelled:
            task.cancel()
        done = await asyncio.gather(right, late, adapter, *wrong, *cancelled, return_exceptions=True)
        batch = await lm.batch_next_token_logprobs([[4], PROMPT])
        return done, batch

    (right, late, adapter, *rest), batch = asyncio.run(main())
    np.testing.assert_allclose(right.numpy(), recomputed(PROMPT), atol=5e-5)
    np.testing.assert_allclose(late.numpy(), recomputed([4]), atol=5e-5)
    np.testing.assert_allclose(batch.numpy(), [recomputed([4]), recomputed(PROMPT)], atol=5e-5)
    assert "lora_name='x'" in str(adapter) and isinstance(adapter, ValueError)
    assert [str(error) for error in rest[:4]] == [
        "token_ids=[]: must not be empty",
        "token_ids[0]=8: must be 0 to 7",
        "token_ids[0]=-1: must be 0 to 7",
        "token_ids: has 513 tokens, more than max_model_len=512",
    ]
    assert all(isinstance(error, asyncio.CancelledError) for error in rest[4:])


def test_first_caller_cancelled_and_loop_closed(lm):
    """The first one leads nobody; a loop that ends while somebody waits leaves nothing behind."""

    async def main():
        tasks = [asyncio.create_task(lm.next_token_logprobs([1, n])) for n in range(3)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert isinstance(first, asyncio.CancelledError) and all(row.shape == (VOCAB,) for row in others)

    async def leave():
        asyncio.get_running_loop().create_task(lm.next_token_logprobs([2]))
        await asyncio.sleep(0)

    asyncio.run(leave())
    asyncio.run(main())
    assert not lm._waiting


def test_a_failing_engine(lm, monkeypatch, recomputed):
    """All who wait hear of it, what was in the cache is forgotten, and the next call is right."""
    lm.next_token_logprobs_sync(PROMPT)

    async def main():
        return await asyncio.gather(*(lm.next_token_logprobs([*PROMPT, n]) for n in range(2)), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", lambda self, batch: 1 / 0)
        found = asyncio.run(main())
    assert [type(error) for error in found] == [SMCError] * 2 and "ZeroDivisionError" in str(found[0])
    assert lm.count_blocks()[0] == 0
    check(lm, recomputed, [[*PROMPT, 0]])


def test_nan_is_refused_and_forgotten(lm, engine, monkeypatch, recomputed):
    hidden = Model.hidden
    with monkeypatch.context() as patch:
        patch.setattr(Model, "hidden", lambda self, batch: hidden(self, batch) * math.nan)
        with pytest.raises(SMCError, match="NaN"):
            lm.next_token_logprobs_sync([*PROMPT, 1])
    assert lm.count_blocks()[0] == 0
    check(lm, recomputed, [[*PROMPT, 1]])


def test_refusals(engine, tokenizer, lm):
    block_bytes = runner_of(engine)._model.block_bytes
    with pytest.raises(ValueError, match=rf"cache_bytes=1000: must be at least {2 * block_bytes}"):
        FastsmcLM(engine, cache_bytes=1000, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="llm='x': must be a fastsmc.LLM"):
        FastsmcLM("x")
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        FastsmcLM(engine)
    with FastsmcLM(engine, cache_bytes=3 * block_bytes, tokenizer=tokenizer) as small:
        assert small.next_token_logprobs_sync([1] * 64).shape == (VOCAB,)
        with pytest.raises(ValueError, match="has 65 tokens; the cache has room for 64"):
            small.next_token_logprobs_sync([1] * 65)
    with pytest.raises(NotImplementedError, match="no adapters"):
        lm.add_new_lora("somewhere")
    assert lm.batch_next_token_logprobs_sync([]).shape == (0, VOCAB)


# ------------------------------------------------------------------------------------------------------------- programs
class Counts(Potential):
    """log φ = 0.7 per "a", on tokens."""

    async def prefix(self, context):
        return 0.7 * sum(bytes(token) == b"a" for token in context)

    complete = prefix


class Raises(Counts):
    async def complete(self, context):
        raise KeyError("no such thing")


class Few(Potential):
    """Allows less than STEPS tokens, in units or not."""

    async def prefix(self, context):
        return 0.0 if len(flatten_units(context)) < STEPS else -math.inf

    complete = prefix


def enumerate_texts(path, prompt, letters=LETTERS):
    """Maps each text that ends within STEPS tokens, the last of which is EOS, to p0."""
    tiny = TinyLlama(path, VOCAB, STEPS, frozenset({6, 7}), prompt=prompt)
    found = defaultdict(float)
    for ids, log_p in tiny.log_p.items():
        if ids[-1] in (6, 7):
            found["".join(letters[i] for i in ids[:-1])] += math.exp(log_p)
    return found


@pytest.fixture(scope="module")
def exact(tiny_path):
    return enumerate_texts(tiny_path, PROMPT)


@pytest.fixture(scope="module")
def exact_of_other(tiny_path):
    return enumerate_texts(tiny_path, OTHER)


WEIGHTS = {"a": 0.5, "b": 1.5, "c": 2.0, "d": 1.0, "e": 0.7, "f": 1.0}


def make_weighted():
    """Makes an automaton of texts that leave room for EOS; behind their first "c" all letters have one weight."""
    made = Automaton(Float)
    made.add_I((0, False), 1.0)
    for n in range(STEPS):
        for letter, weight in WEIGHTS.items() if n < STEPS - 1 else ():
            made.add_arc((n, False), ord(letter), (n + 1, letter == "c"), weight)
            made.add_arc((n, True), ord(letter), (n + 1, True), 0.8)
        made.add_F((n, False), 0.6)
        made.add_F((n, True), 1.0)
    return WFSA(made)


def samplers(lm):
    """The programs: name → (sampler, critic, φ of a text)."""
    llm = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[EOS])
    regular = BoolFSA.from_regex(r"(a|b|c)*d?(e|f)?")
    coerced = regular.coerce(llm, f=b"".join)
    asked = regular.coerce(llm, f=lambda tokens: b"".join(tokens))  # which `fastsmc.genlm.smc` does not compile
    both = (regular * BoolFSA.from_regex("(a|b|c|d|e|f)*(a|d|e)")).coerce(llm, f=b"".join)

    def accepted(text):
        body = text[:-1] if text[-1:] in ("e", "f") and text else text
        body = body[:-1] if body[-1:] == "d" else body
        return float(set(body) <= set("abc"))

    def liked(text):
        return math.exp(0.7 * text.count("a"))

    def weighed(text):
        before, c, behind = text.partition("c")
        return math.prod(WEIGHTS[letter] for letter in before + c) * 0.8 ** len(behind) * (1.0 if c else 0.6)

    def in_units(text):  # of at most two, the last of which may end with the text
        return float(sum(letter in "abc" for letter in text) + (text[-1:] in ("d", "e", "f")) <= 2)

    counted = Counts(llm.vocab)
    units = MultiTokenUnitSampler(direct_token_sampler(llm), TokenSetBoundary({b"a", b"b", b"c"}))
    return {
        "direct": (direct_token_sampler(llm), None, lambda text: 1.0),
        "product": (direct_token_sampler(llm * coerced), None, accepted),
        "product, asked": (direct_token_sampler(llm * asked), None, accepted),
        "two automata": (
            direct_token_sampler(llm * both),
            None,
            lambda text: accepted(text) * text.endswith(("a", "d", "e")),
        ),
        "AWRS": (AWRS(llm, coerced), None, accepted),
        "AWRS, asked": (AWRS(llm, asked), None, accepted),
        "automaton as critic": (direct_token_sampler(llm), coerced, accepted),
        "critic": (direct_token_sampler(llm), counted, liked),
        "eager": (eager_token_sampler(llm, regular), None, accepted),
        "topk": (topk_token_sampler(llm, regular, K=3), counted, lambda text: accepted(text) * liked(text)),
        "weighted": (direct_token_sampler(llm * make_weighted().coerce(llm, f=b"".join)), None, weighed),
        "units": (units, Few(llm.vocab), in_units),
    }


def samplers_of_two(lm):
    """Programs of two prompts: name → (sampler, critic, the target from p0 behind PROMPT and p0 behind OTHER)."""
    llm, other = (PromptedLLM(lm, prompt_ids=prompt, eos_byte_strings=[EOS]) for prompt in (PROMPT, OTHER))
    return {
        "intersection": (direct_token_sampler(llm * other), None, lambda p, q: p * q),
        "prompt as critic": (direct_token_sampler(llm), other, lambda p, q: p * q),
        "prompt as proposal": (direct_token_sampler(llm, proposal=other), None, lambda p, q: p),
        "mixture": (direct_token_sampler(Ensemble(llm, other, "sum", a=0.3)), None, lambda p, q: 0.3 * p + 0.7 * q),
        "mean": (direct_token_sampler(Ensemble(llm, other, "prod")), None, lambda p, q: math.sqrt(p * q)),
        "power": (direct_token_sampler(llm**0.5), None, lambda p, q: math.sqrt(p)),
    }


def unnormalised(sequences):
    """Maps texts to Ẑ times their share of a run's weights."""
    weights = np.exp(np.asarray(sequences.log_weights) - np.log(len(sequences.log_weights)))
    found = defaultdict(float)
    for context, weight in zip(sequences.contexts, weights, strict=True):
        if weight > 0:
            found[b"".join(map(bytes, flatten_units(context[:-1]))).decode()] += weight
    return found


def check_unbiased(run, target, letters=LETTERS):
    """Ẑ, and Ẑ times the share of texts by their length and of those that begin with each letter, where that is 2 % at
    least: of what hardly any run has the standard error cannot be estimated.

    Args:
        run: coroutine function without arguments that returns genlm-control's `Sequences`.
        target: unnormalised, of texts.
    """
    np.random.seed(1)
    torch.manual_seed(1)

    async def main():
        return [await run() for _ in range(80)]

    runs = asyncio.run(main())
    found = [unnormalised(each) for each in runs]
    for each, shares in zip(runs, found, strict=True):
        assert each.log_ml == pytest.approx(math.log(sum(shares.values())))
        assert all(target[text] > 0 for text in shares)
    tests = [lambda text: True]
    tests += [lambda text, n=n: len(text) == n for n in range(STEPS)]
    tests += [lambda text, letter=letter: text.startswith(letter) for letter in letters]
    wanted = [sum(p for text, p in target.items() if test(text)) for test in tests]
    assert sum(want >= 0.02 * wanted[0] for want in wanted) >= 6
    for test, want in zip(tests, wanted, strict=True):
        if want < 0.02 * wanted[0]:
            continue
        values = np.array([sum(p for text, p in shares.items() if test(text)) for shares in found])
        assert abs(values.mean() - want) <= 4 * values.std(ddof=1) / math.sqrt(len(values)) + 1e-9


@pytest.mark.parametrize("program", ["direct", "product", "AWRS", "critic", "eager", "topk", "weighted", "units"])
def test_programs_are_unbiased(lm, exact, program):
    sampler, critic, phi = samplers(lm)[program]
    most = 3 if program == "units" else STEPS
    check_unbiased(
        lambda: SMC(sampler, critic)(n_particles=24, ess_threshold=0.7, max_tokens=most),
        {text: p * phi(text) for text, p in exact.items()},
    )


@pytest.mark.parametrize(
    "program", ["intersection", "prompt as critic", "prompt as proposal", "mixture", "mean", "power"]
)
def test_programs_of_two_prompts_are_unbiased(lm, exact, exact_of_other, program):
    sampler, critic, target = samplers_of_two(lm)[program]
    check_unbiased(
        lambda: SMC(sampler, critic)(n_particles=24, ess_threshold=0.7, max_tokens=STEPS),
        {text: target(p, exact_of_other[text]) for text, p in exact.items()},
    )


def test_bytes_are_unbiased(engine, tiny_path):
    """`ByteLLM` sums over the spellings of a text, here of all of them, behind the tokenizer's BOS and a prompt."""
    exact = enumerate_texts(tiny_path, [6, 5], SPELLINGS)
    beam = BeamParams(K=64, eos_byte_strings=[EOS], heal=False)
    with FastsmcLM(engine, tokenizer=make_tokenizer(SPELLINGS)) as lm:
        llm = ByteLLM(lm, beam)
        llm.set_prompt_from_str("c")
        check_unbiased(
            lambda: SMC(direct_token_sampler(llm))(n_particles=24, ess_threshold=0.7, max_tokens=STEPS),
            {text: p for text, p in exact.items() if len(text) < STEPS},
            "abc",
        )


def test_two_programs_at_once(lm):
    """Each under its own prompt; one is cancelled beside them, one ends with its potential's error."""
    llm = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[EOS])
    other = PromptedLLM(lm, prompt_ids=OTHER, eos_byte_strings=[EOS])

    async def main():
        def run(potential, critic=None):
            return asyncio.create_task(
                SMC(direct_token_sampler(potential), critic)(n_particles=64, ess_threshold=0.5, max_tokens=STEPS)
            )

        tasks = [run(llm), run(other), run(llm, Raises(llm.vocab)), run(other)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        tasks[3].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, second, failed, cancelled = asyncio.run(main())
    assert isinstance(failed, KeyError) and isinstance(cancelled, asyncio.CancelledError)
    for run in (first, second):
        assert len(run.contexts) == 64 and np.isfinite(run.log_ml)
    rows = [lm.next_token_logprobs_sync(prompt) for prompt in (PROMPT, OTHER)]
    for llm_of, row in ((llm, rows[0]), (other, rows[1])):
        ended = float(np.logaddexp(*row[6:].numpy()))
        got = asyncio.run(llm_of.logw_next([]))
        assert got[got.decode[-1]] == pytest.approx(ended, abs=1e-5)


# ---------------------------------------------------------------------------------------------------------- the import
def run_python(code, *arguments, **variables):
    """Runs code in a process in which nothing has been imported and none of genlm's variables is set."""
    kept = {name: value for name, value in os.environ.items() if name not in containment.VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], env=kept | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


FASTSMC_FIRST = """
import os, sys
import fastsmc
fastsmc.LLM
assert not any(name.split(".")[0] == "genlm" for name in sys.modules)
before = dict(os.environ), sys.modules["vllm"]
import fastsmc.genlm
import genlm.control, genlm.backend.llm.vllm as backend
import vllm
from vllm.v1.worker.gpu import model_runner
assert (dict(os.environ), vllm) == before
assert not backend.HAS_VLLM
assert "genlm" not in model_runner.init_model_state.__module__
assert "genlm" not in model_runner.GPUModelRunner.update_requests.__module__
"""

GENLM_FIRST = """
import asyncio, os, sys
import genlm.control
import llamppl
from vllm.v1.worker.gpu import model_runner
assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1" and "genlm" in model_runner.init_model_state.__module__
import fastsmc.genlm
assert not set(fastsmc.genlm.containment.VARIABLES) & set(os.environ)
assert "genlm" not in model_runner.init_model_state.__module__
assert "genlm" not in model_runner.GPUModelRunner.update_requests.__module__

fastsmc.genlm.install()
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
options = dict(dtype="float32", enforce_eager=True, max_model_len=128, kv_cache_memory_bytes=1 << 24)
llm = genlm.control.PromptedLLM.from_name(sys.argv[1], backend="vllm", engine_opts=options, prompt_ids=[1, 2])
assert isinstance(llm.model, fastsmc.genlm.FastsmcLM) and llm.model.llm._in_process()
assert llm.eos_byte_strings == [b" "]
runner = llm.model.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
assert "V2" not in type(runner).__name__, type(runner)
run = asyncio.run(genlm.control.SMC(genlm.control.direct_token_sampler(llm))(8, 0.5, 4))
assert len(run.contexts) == 8

import fastsmc.llamppl
Context = llamppl.LMContext
fastsmc.llamppl.install()
assert type(Context(llamppl.CachedCausalLM(llm.model), "b")) is fastsmc.llamppl.Context
llm.model.cleanup()
"""


def test_import_of_fastsmc_first():
    """genlm comes with `fastsmc.genlm` alone; the environment and vLLM are what they were, a user's setting too."""
    run_python(FASTSMC_FIRST, VLLM_USE_V2_MODEL_RUNNER="0")


def test_import_of_genlm_first(tiny_path, tokenizer, tmp_path):
    """What its import has done is undone; `from_name` with backend="vllm" then starts vLLM's usual model runner. What
    was imported of llamppl before `install` is under it, too."""
    path = shutil.copytree(tiny_path, tmp_path / "model")
    tokenizer.save_pretrained(path)
    run_python(GENLM_FIRST, path)


def test_versions(monkeypatch):
    monkeypatch.setitem(containment.SUPPORTED["genlm"], "genlm-control", ">=9")
    with pytest.raises(UnsupportedError, match=r"genlm-control 0\.4\.\d+: fastsmc.genlm knows >=9"):
        containment.check_versions("genlm")
    monkeypatch.setitem(containment.SUPPORTED["genlm"], "genlm-nothing", ">=1")
    monkeypatch.delitem(containment.SUPPORTED["genlm"], "genlm-control")
    with pytest.raises(ImportError, match=r'genlm-nothing >=1: pip install "fastsmc\[genlm\]"'):
        containment.check_versions("genlm")
