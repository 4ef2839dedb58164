"""`check_potential`: what keeps the contract passes, and every way to break it is named."""

import math
from typing import ClassVar

import pytest
import torch
from documents import blocks
from test_potentials import EOS, V, engine, tokenizer  # noqa: F401  # fixtures

from fastsmc import Masked, Potential, Rows
from fastsmc.potentials import Choice, Condition, Final, Grammar, Infill, Lexicon, Regex, TextPotential
from fastsmc.smc import GroupEngine
from fastsmc.testing import check_potential


class Counting(Potential):
    """ψ = 2^(occurrences of token 1), with a count per particle that follows the ancestors."""

    def reset(self, n_particles, prompt):
        self.counts = torch.zeros(n_particles, dtype=torch.float64)
        self.length = 0

    def reindex(self, ancestors):
        self.counts = self.counts[ancestors]

    def _update(self, state):
        if state.step > self.length:
            self.length = state.step
            self.counts += state.last_tokens == 1
        return self.counts * math.log(2)

    def prefix(self, state):
        return self._update(state)

    def logw_next(self, state):
        self._update(state)
        change = torch.zeros(V, dtype=torch.float64)
        change[1] = math.log(2)
        return change.expand(len(state.finished), -1)


class Confident(Potential):
    """ψ by the hidden state and the log-probs."""

    def prefix(self, state):
        return state.log_prob / 2 + state.hidden[:, 0].double()


class Even(Potential):
    """Tokens of even number only."""

    def prefix(self, state):
        odd = ((state.tokens % 2 == 1) & (state.tokens >= 0)).any(1)
        return torch.zeros(len(odd), dtype=torch.float64).masked_fill(odd, -math.inf)

    def logw_next(self, state):
        return Masked(torch.tensor([[0x55555555]], dtype=torch.int32), torch.zeros_like(state.lengths))


GOOD = {
    "lexicon": lambda: Lexicon(token_ids=[2, 4], weight=0.5),
    "regex": lambda: Regex("(a|b)*c?"),
    "choice": lambda: Choice(["ab", "abc", "a"]),
    "grammar": lambda: Grammar('start: "a" ("b" | "c")*'),
    "product": lambda: Regex("(a|b)*c?") * Lexicon(token_ids=[1], weight=-1.0),
    "final": lambda: Final(Regex("(a|b)*c?")),
    "text": lambda: TextPotential(lambda texts: [float(text.count("a")) for text in texts]),
    "condition": lambda: Condition(lambda texts: ["bb" not in text for text in texts]),
    "counting": Counting,
    "even": Even,
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("stops", [(EOS,), (EOS, 5), ()])
def test_good_ones_pass(engine, name, stops):  # noqa: F811
    said = check_potential(GOOD[name](), engine, max_tokens=5, stop_token_ids=stops, n_sequences=24)
    assert said.log_psi.shape == said.by_next.shape and len(said.log_phi) == 24
    assert not said.log_phi.isnan().any() and (not stops or bool((said.log_phi > -math.inf).any()))


def test_hidden_states_are_those_of_the_history():
    engine = GroupEngine(vocab_size=V, hidden_size=3)  # noqa: F811
    first = check_potential(
        Confident(), engine, [[1, 2, EOS], [1, 2, 3], [1, 2, EOS]], max_tokens=3, stop_token_ids=[EOS]
    )
    assert first.log_phi[0] == first.log_phi[2] != first.log_phi[1]
    assert first.log_psi[2, 0] == first.log_psi[2, 1]


class Forgets(Counting):
    def reindex(self, ancestors):
        pass


class Shares(Counting):
    seen: ClassVar[dict] = {}  # so of all copies

    def _update(self, state):
        self.seen[state.step] = self.seen.get(state.step, 0) + 1
        return super()._update(state) + 0.01 * self.seen[state.step]


class Crowded(Counting):
    def prefix(self, state):
        return super().prefix(state) / len(state.finished)

    def logw_next(self, state):
        return None


class WrongChange(Counting):
    def logw_next(self, state):
        return super().logw_next(state) * 1.1


class Greedy(Even):
    def prefix(self, state):
        return torch.zeros(len(state.finished), dtype=torch.float64)


class Revives(Potential):
    def prefix(self, state):
        return torch.where(state.lengths == 2, -math.inf, 0.0).double()


class NotANumber(Counting):
    def complete(self, state):
        return torch.where(state.lengths > 1, math.nan, 0.0).double()


class Infinite(Counting):
    def logw_next(self, state):
        return super().logw_next(state) + math.inf


class Short(Counting):
    def prefix(self, state):
        return super().prefix(state)[1:]


class OutOfRange(Counting):
    def logw_next(self, state):
        return Rows(super().logw_next(state), state.lengths + 5)


class Refuses(Condition):
    def allows(self, state, particles, tokens):
        return super().allows(state, particles, tokens) & (tokens != 1)


class Allows(Condition):
    def allows(self, state, particles, tokens):
        return tokens


class Stops(Counting):
    def stop(self, state):
        return state.lengths


class Raises(Counting):
    def complete(self, state):
        return 1 // 0


class Streams(Counting):
    def __init__(self):
        self.stream = (i for i in range(3))


BAD = {
    Forgets: r"Forgets.(prefix|complete|logw_next) after tokens .*: says \S+ after reindex, and \S+ among all",
    Shares: r"Shares.prefix after tokens \[\]: says \S+ asked alone",
    Crowded: r"Crowded.prefix after tokens .*1.*: says \S+ asked alone",
    WrongChange: r"WrongChange.logw_next after tokens .*: token 1 takes log ψ to 0.762\d*, and prefix says 0.693\d*",
    Greedy: r"Greedy.logw_next after tokens .*: rules out token \d+, of which (prefix|complete) says 0.0",
    Revives: r"Revives.complete after tokens .*: says 0.0, where log ψ had been −inf before",
    NotANumber: r"potential NotANumber.complete at step \d: says nan after tokens \[",
    Infinite: r"Infinite.logw_next after tokens .*: says inf of token",
    Short: r"potential Short.prefix at step 0: returned \(\d+,\) torch.float64",
    OutOfRange: r"potential OutOfRange.logw_next at step 0: index\[0\]=5 must be in \[0, 1\)",
    Stops: r"potential Stops.stop at step 1: returned \(24,\) torch.int64; must be a torch.bool tensor",
    Raises: r"potential Raises.complete at step 1: raised ZeroDivisionError",
    Streams: r"generator",
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD, ids=lambda kind: kind.__name__)
def test_broken_ones_are_named(engine, kind):  # noqa: F811
    sequences = None if kind is not Greedy else [[2, 3, EOS], [1, 1, 1]]
    with pytest.raises(Exception, match=r"(?s)" + BAD[kind]) as error:
        check_potential(kind(), engine, sequences, max_tokens=3, stop_token_ids=[EOS], n_sequences=24)
    assert kind is Streams or error.type is AssertionError


def test_conditions_that_contradict_themselves(engine):  # noqa: F811
    def yes(texts):
        return [True] * len(texts)

    with pytest.raises(AssertionError, match=r"Refuses.allows after tokens .*: refuses token 1, of which \w+ says 0.0"):
        check_potential(Refuses(yes), engine, max_tokens=3, stop_token_ids=[EOS])
    with pytest.raises(AssertionError, match=r"Allows.allows at step 0: returned \(64,\) torch.int64; must be"):
        check_potential(Allows(yes), engine, max_tokens=3, stop_token_ids=[EOS])


def test_the_page(monkeypatch):
    """The potential of docs/own_potential.md keeps the contract, counts right, and fails without `reindex`."""
    names = {}
    for block in blocks("docs/own_potential.md", "python")[:3]:
        exec(block, names)
    sequences = [[1, 2, 1, 0], [3, 4, 0], [5] * 5]
    settings = dict(max_tokens=5, stop_token_ids=[0])
    engine = GroupEngine(vocab_size=50)  # noqa: F811
    for kind in ("Fresh", "Quick"):
        assert check_potential(names[kind](), engine, sequences, **settings).log_phi.tolist() == [-0.5, 0.0, -2.0]
    monkeypatch.delattr(names["Quick"], "reindex")
    with pytest.raises(
        AssertionError, match=r"Quick.logw_next after tokens .*: says \S+ after reindex, and \S+ among all"
    ):
        check_potential(names["Quick"](), engine, max_tokens=8, stop_token_ids=[0])


def test_arguments(engine):  # noqa: F811
    for sequences, message in [
        ([[1, EOS, 2]], r"sequences\[0\]=\[1, 0, 2\]: must be token ids in \[0, 14\) that end with"),
        ([[1, 2, 3], [1]], r"sequences\[1\]=\[1\]: must be"), ([[1, 2, 14]], r"sequences\[0\]"), ([], "at least one"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_potential(Counting(), engine, sequences, max_tokens=3, stop_token_ids=[EOS])
    with pytest.raises(ValueError, match="asks the model for 1 tokens"):
        check_potential(Infill([1]), engine)
