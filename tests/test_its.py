"""`fastsmc.its` beside its_hub itself: the same distributions at the same settings, on a model that is enumerated."""

import asyncio
import itertools
import random
import subprocess
import sys

import numpy as np
import pytest
from its_hub.api import AbstractScalingAlgorithm, AbstractScalingResult, ChatMessage, ChatMessages
from its_hub.core.algorithms import particle_gibbs as hub
from its_hub.core.lms.step_generation import StepGeneration as HubSteps
from scipy.stats import chi2
from tiny import TableRows

from fastsmc import Potential, SMCError
from fastsmc.its import EntropicParticleFiltering, ParticleFiltering, StepGeneration
from fastsmc.smc import Group, GroupEngine, set_up
from fastsmc.smc.driving import run_group
from fastsmc.texts import population_texts

LETTERS, PROMPT = "abcd", "badc"
#: texts of two and of four letters
PAIRS = ["".join(pair) for pair in itertools.product(LETTERS, repeat=2)]
TEXTS = [a + b for a in PAIRS for b in PAIRS]
N, RUNS = 8, 250


class Letters:
    """A tokenizer of single letters."""

    eos_token_id, chat_template = None, None

    def encode(self, text, add_special_tokens=True):
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(LETTERS[i] for i in ids)


class Chat(Letters):
    """The same with a template: a turn is its role's letter and its text; an open turn of the assistant is "d"."""

    chat_template = "as below"

    def apply_chat_template(self, messages, tokenize, return_dict, add_generation_prompt, continue_final_message):
        assert tokenize and not return_dict and add_generation_prompt != continue_final_message
        turns = "".join({"system": "a", "user": "b", "assistant": "d"}[m["role"]] + m["content"] for m in messages)
        return self.encode(turns + "d" * add_generation_prompt)


class Reward:
    """Scores texts by a fixed table, and keeps what it was shown."""

    def __init__(self, low=0.15, high=0.9):
        self.low, self.high, self.shown = low, high, []

    def value(self, text):
        return self.low + (self.high - self.low) * np.random.default_rng(list(text.encode())).random()

    async def ascore(self, prompt, texts):
        self.shown.append((prompt, list(texts)))
        return [self.value(text) for text in texts]


class Chain:
    """A model whose next letter depends on the last two: `table[prefix]` is (4,) log p0."""

    def __init__(self):
        self.rows = np.log(np.random.default_rng(0).dirichlet(np.full(4, 1.5), (5, 5)))
        self.table = self

    def __getitem__(self, prefix):
        before, last = (-1, -1, *prefix)[-2:]
        return self.rows[before, last]

    def log_p(self, text, temperature):
        """log p0 of a text at a temperature."""
        ids, total = Letters().encode(text), 0.0
        for t, v in enumerate(ids):
            row = self[tuple(ids[:t])] / temperature
            total += row[v] - np.logaddexp.reduce(row)
        return float(total)


class HubLM:
    """Draws steps of `tokens_per_step` letters, as its_hub asks a server for them."""

    def __init__(self, chain, rng):
        self.chain, self.rng = chain, rng

    async def agenerate(self, messages_lst, max_completion_tokens, temperature, **_):
        return [self._step(each, max_completion_tokens, temperature) for each in messages_lst]

    def _step(self, messages, length, temperature):
        prefix = tuple(Letters().encode(messages[1].content)) if len(messages) > 1 else ()
        for _ in range(length):
            p = np.exp(self.chain[prefix] / temperature)
            prefix += (int(self.rng.choice(4, p=p / p.sum())),)
        return {"role": "assistant", "content": Letters().decode(prefix[-length:])}


class TableLM:
    """`fastsmc.LLM` over the chain, as far as `fastsmc.its` uses one."""

    def __init__(self, tokenizer=None):
        self.chain, self.tokenizer = Chain(), tokenizer or Letters()

    def get_tokenizer(self):
        return self.tokenizer

    def smc(self, prompt, params, potential):
        engine = GroupEngine(self.tokenizer, vocab_size=4)
        group = Group(params, set_up(potential, engine), prompt, frozenset(), engine=engine)
        population = run_group(group, TableRows(self.chain, params.n_particles))
        population.texts = population_texts(self.tokenizer, population)
        return population


@pytest.fixture(scope="module")
def engine():
    return TableLM()


def test_its_hub_is_reproduced(engine):
    """What each run's N final texts look like, how many first steps they have left, and which one is chosen: means over
    runs by chi-square.

    Both draw the two steps of two letters at temperature 0.7, weigh by the logit of the score and resample. its_hub
    resamples once more at the end; here that is made of the weighted particles, as its_hub does it.
    """
    sg, reward = HubSteps(max_steps=1, tokens_per_step=2, temperature=0.7), Reward()
    index = {text: i for i, text in enumerate(TEXTS)}
    final, chosen, lines = np.zeros((2, RUNS, 256)), np.zeros((2, RUNS, 256)), np.zeros((2, RUNS))
    lm, theirs = HubLM(engine.chain, np.random.default_rng(1)), hub.ParticleFiltering(sg, reward)
    ours, rng = ParticleFiltering(sg, reward, seed=1), np.random.default_rng(2)
    random.seed(1)
    for r in range(RUNS):
        found = theirs.infer(lm, PROMPT, N, return_response_only=False)
        for response in found.responses:
            final[0, r, index[response["content"]]] += 1 / N
        chosen[0, r, index[found.the_one["content"]]] = 1
        lines[0, r] = len({response["content"][:2] for response in found.responses})
        assert found.steps_used_lst == [2] * N

        found = ours.infer(engine, PROMPT, N, return_response_only=False)
        assert found.steps_used_lst == [2] * N and found.population.boundaries.tolist() == [1, 3]
        for response, weight in zip(found.responses, found.population.weights, strict=True):
            final[1, r, index[response["content"]]] += weight
        again = rng.choice(N, N, p=found.population.weights)
        best = again[np.argmax(np.array(found.log_weights_lst)[again])]
        chosen[1, r, index[found.responses[best]["content"]]] = 1
        lines[1, r] = len({found.responses[i]["content"][:2] for i in again})
    by_first = np.array([[text[:2] == pair for text in TEXTS] for pair in PAIRS])
    by_last = np.array([[text[2:] == pair for text in TEXTS] for pair in PAIRS])
    scores = np.array([[reward.value(text[:2]), reward.value(text)] for text in TEXTS]).T
    kinds = {"first": by_first, "last": by_last, "scores": scores}
    seen = {
        (which, name): what @ of.T
        for which, what in (("final", final), ("chosen", chosen))
        for name, of in kinds.items()
    }
    for name, values in {**seen, "first steps that survive": lines[:, :, None]}.items():  # (2, runs, statistics)
        stderr = np.sqrt((values.var(1, ddof=1) / RUNS).sum(0))
        z = np.diff(values.mean(1), axis=0)[0][stderr > 0] / stderr[stderr > 0]
        assert np.square(z).sum() < chi2.ppf(1 - 1e-4, len(z)), (name, z)
    # and what is reproduced is not what the model would have drawn
    plain = np.exp([engine.chain.log_p(text, 0.7) for text in TEXTS]) @ scores[1]
    assert (final @ scores[1]).mean() > plain + 0.1


def test_z_is_that_of_the_rewards(engine):
    """E[Ẑ] is Σ p0(s) Π_k logit odds of the scores, also where resampling is entropic."""
    reward = Reward()

    def odds(text):
        return reward.value(text) / (1 - reward.value(text))

    z = sum(np.exp(engine.chain.log_p(text, 0.7)) * odds(text[:2]) * odds(text) for text in TEXTS)
    for kind in (ParticleFiltering, EntropicParticleFiltering):
        filtering = kind(StepGeneration(1, tokens_per_step=2, temperature=0.7), reward, seed=5)
        runs = [filtering.infer(engine, PROMPT, N, return_response_only=False) for _ in range(120)]
        values = np.exp([run.population.log_z for run in runs])
        assert abs(values.mean() - z) < 4 * values.std(ddof=1) / np.sqrt(len(values))
        assert len({run.population.log_z for run in runs}) > 100  # each call has another seed


def test_scores_beyond_its_hubs_bounds_are_cut(engine):
    sure = Reward(0.0, 0.0)
    found = ParticleFiltering(StepGeneration(0, tokens_per_step=2), sure).infer(engine, PROMPT, 4, False)
    np.testing.assert_allclose(found.log_weights_lst, hub._inv_sigmoid(0.0), rtol=1e-9)


class Always(Potential):
    def prefix(self, state):
        return super().prefix(state)


@pytest.mark.parametrize("steps", [HubSteps, StepGeneration])
def test_steps_end_where_its_hubs_do(engine, steps):
    """A step ends at its token, which neither texts nor the reward show at their end; after max_steps + 1 of them, or
    after the first whose text holds the stop token, a particle ends."""
    reward = Reward()
    sg = steps(max_steps=2, step_token="d", stop_token="ab")
    found = ParticleFiltering(sg, reward, max_tokens=60, seed=3).infer(engine, PROMPT, 40, False)
    population, ends = found.population, set()
    assert population.params.temperature == 0.8 and population.params.resampling == "multinomial"
    for text, response, used in zip(population.texts, found.responses, found.steps_used_lst, strict=True):
        parts = text.split("d")
        assert text.endswith("d") and len(parts) == used + 1 and response["content"] == text[:-1]
        assert not any("ab" in part for part in parts[: used - 1])
        ends.add((used, "ab" in parts[used - 1]))
        assert used == 3 or "ab" in parts[used - 1]
    assert len(ends) > 2
    asked = [text for prompt, texts in reward.shown for text in texts if prompt == PROMPT]
    assert len(asked) == len(set(asked))
    ends_of = (itertools.accumulate(text.split("d")[:-1], "{}d{}".format) for text in population.texts)
    assert {shown for each in ends_of for shown in each} <= set(asked)  # each text up to each of its steps
    # its_hub's own count of steps
    lm = type("Fixed", (), {"agenerate": _fixed})()
    theirs = hub.ParticleFiltering(HubSteps(max_steps=2, step_token="d"), reward).infer(lm, PROMPT, 2, False)
    assert theirs.steps_used_lst == [3, 3]
    kept = steps(max_steps=0, step_token=["d", "c"], stop_token="d", include_stop_str_in_output=True)
    found = ParticleFiltering(kept, Always(), max_tokens=60, seed=3).infer(engine, PROMPT, 20, False)
    for text, response in zip(found.population.texts, found.responses, strict=True):
        assert text[-1] in "cd" and not set(text[:-1]) & {"c", "d"} and response["content"] == text.removesuffix("d")


async def _fixed(self, messages_lst, **_):
    return [{"role": "assistant", "content": "c"} for _ in messages_lst]


def test_a_sample_is_drawn_by_weight(engine):
    filtering = ParticleFiltering(StepGeneration(0, tokens_per_step=1), Reward(), "sample", "systematic", seed=0)
    runs = [filtering.infer(engine, PROMPT, 3, False) for _ in range(200)]
    weights = np.array([run.population.weights for run in runs])
    chosen = np.array([run.selected_index for run in runs])
    for i in range(3):  # of a martingale: chosen or not, minus its probability
        difference = (chosen == i) - weights[:, i]
        assert abs(difference.mean()) < 4 * np.sqrt((weights[:, i] * (1 - weights[:, i])).mean() / len(runs))
    best = ParticleFiltering(StepGeneration(0, tokens_per_step=1), Reward(), hub.SelectionMethod.ARGMAX, seed=0)
    found = best.infer(engine, PROMPT, 3, False)
    assert found.selected_index == int(np.argmax(found.log_weights_lst)) and found.the_one["role"] == "assistant"


def test_prompts(engine):
    """A text is a user's message where there is a template; messages keep their roles; token ids stay as they are."""
    chat = TableLM(Chat())
    turns = [{"role": "system", "content": "c"}, ChatMessage(role="user", content=[{"type": "text", "text": "b"}])]
    for over, given, prompt, shown in (
        (engine, "ab", "ab", "ab"),
        (engine, Letters().encode("ab"), "ab", "ab"),
        (chat, Letters().encode("ab"), "ab", "ab"),
        (chat, "ab", "babd", "ab"),
        (chat, turns, "acbbd", "system: c\nuser: b"),
        (chat, ChatMessages(turns), "acbbd", "system: c\nuser: b"),
        (chat, ChatMessages("ab"), "babd", "ab"),
        (chat, [*turns, ChatMessage("assistant", "a")], "acbbda", "system: c\nuser: b\nassistant: a"),
    ):
        reward = Reward()
        found = ParticleFiltering(StepGeneration(0, tokens_per_step=1), reward).infer(over, given, 2, False)
        assert Letters().decode(found.population.prompt_token_ids) == prompt and reward.shown[0][0] == shown


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], r"prompt_or_messages=\[\]: must be a text"),
        ([{"content": "a"}], r"prompt_or_messages\[0\]=.*must be a message"),
        ([{"role": "assistant", "content": "a", "tool_calls": [{}]}], "holds 'tool_calls', which is not supported"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "only texts are supported"),
    ],
)
def test_prompts_that_are_refused(engine, given, message):
    with pytest.raises(ValueError, match=message):
        ParticleFiltering(StepGeneration(0, tokens_per_step=1), Reward()).infer(engine, given, 2)


def test_what_is_refused(engine):
    sg = StepGeneration(1, tokens_per_step=2)
    for make, message in (
        (lambda: StepGeneration(1), "exactly one of them"),
        (lambda: StepGeneration(1, "a", tokens_per_step=2), "exactly one of them"),
        (lambda: StepGeneration(1, ["a", "b"]), "need include_stop_str_in_output=True"),
        (lambda: StepGeneration(-1, "a"), "max_steps=-1"),
        (
            lambda: ParticleFiltering(HubSteps(1, "a", temperature_switch=(1.0, "b", "c")), Reward()),
            "temperature_switch",
        ),
        (lambda: ParticleFiltering(sg, len), "prm=.*must be a potential, or have a method ascore or score"),
        (lambda: ParticleFiltering(sg, Reward(), "best"), "final_response_selection='best'"),
        (lambda: ParticleFiltering(sg, Reward(), "sample", "some"), "resampling_method='some'"),
        (lambda: ParticleFiltering(sg, Reward(), seed=-1), "seed=-1"),
        (lambda: ParticleFiltering(sg, Reward(), max_tokens=0), "max_tokens=0"),
        (lambda: EntropicParticleFiltering(sg, Reward(), temperature_method="base"), "temperature_method='base'"),
        (lambda: EntropicParticleFiltering(sg, Reward(), early_phase=0.9), "early_phase=0.9"),
        (lambda: ParticleFiltering(sg, Reward()).infer(engine, "ab", 0), "budget=0"),
        (lambda: ParticleFiltering(sg, Reward()).infer(engine, "ab", 2, tools=[{}]), "tools="),
        (
            lambda: ParticleFiltering(HubSteps(1, tokens_per_step=1, temperature=0), Reward()).infer(engine, "b", 2),
            "temperature=0",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ImportError, match="ParticleGibbs: not supported"):
        from fastsmc.its import ParticleGibbs  # noqa: F401  # it is not there


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_score_that_is_none_ends_the_group(engine, value):
    with pytest.raises(SMCError, match=r"ProcessReward.score gave (1.5|nan) .*in \[0, 1\]"):
        ParticleFiltering(StepGeneration(1, tokens_per_step=1), Reward(value, value)).infer(engine, "ab", 2)


def test_calls_within_an_event_loop_take_turns(engine):
    filtering = ParticleFiltering(StepGeneration(1, tokens_per_step=2), Reward(), seed=4)

    async def both():
        return await asyncio.gather(*(filtering.ainfer(engine, PROMPT, 4, False) for _ in range(2)))

    async def within():  # and a call that blocks the loop
        return filtering.infer(engine, PROMPT, 4, False)

    found = [*asyncio.run(both()), asyncio.run(within())]
    assert sorted(each.population.params.seed for each in found) == [4, 5, 6]


def test_results_are_its_hubs_where_it_is(engine):
    filtering = ParticleFiltering(StepGeneration(0, tokens_per_step=1), Reward())
    assert isinstance(filtering, AbstractScalingAlgorithm)
    result = filtering.infer(engine, "ab", 2, return_response_only=False)
    assert isinstance(result, AbstractScalingResult)
    assert set(vars(result)) == set(hub.ParticleFilteringResult.__dataclass_fields__) | {"population"}
    assert filtering.infer(engine, "ab", 2).keys() == {"role", "content"}
    code = "import sys; sys.modules['its_hub'] = None; import fastsmc.its as its; print(its.StepGeneration(1, 'a'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "step_token='a'" in done.stdout
