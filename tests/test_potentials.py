"""The built-in potentials, on a vocabulary small enough to enumerate."""

import copy
import importlib.metadata
import itertools
import math
import re

import numpy as np
import pytest
import torch

from fastsmc import SMCParams
from fastsmc.potentials import (
    Engine,
    Grammar,
    Infill,
    Judge,
    Lexicon,
    Masked,
    Potential,
    Product,
    Regex,
    Rows,
    State,
    TextPotential,
    registered,
    resolve,
)
from fastsmc.smc import Group, GroupEngine
from fastsmc.smc.driving import run_group
from fastsmc.testing import check_potential

# "é" is C3 A9 in UTF-8: Ã is the first byte's character in byte-level BPE, © the second's; Ġ is a space.
TOKENS = ["<eos>", "a", "b", "c", "ab", "Ġ", "Ã", "©", "Ġa", "A", "ĠA", "abc"]
TEXTS = [None, b"a", b"b", b"c", b"ab", b" ", b"\xc3", b"\xa9", b" a", b"A", b" A", b"abc"]
EOS, V = 0, 14  # two more columns than the tokenizer has, as models pad them


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    merges = [("a", "b"), ("Ġ", "a"), ("Ġ", "A"), ("ab", "c")]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(TOKENS)}, merges=merges))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


@pytest.fixture
def engine(tokenizer):
    return GroupEngine(tokenizer=tokenizer, vocab_size=V)


def make_state(sequences, max_tokens, step=None, stops=(EOS,)) -> State:
    """The state after `step` tokens (default: of the longest sequence), each row cut off or ended there."""
    step = max(map(len, sequences)) if step is None else step
    rows = [list(s[:step]) for s in sequences]
    state = State()
    state.tokens = torch.tensor([r + [-1] * (step - len(r)) for r in rows], dtype=torch.int64).reshape(len(rows), step)
    state.last_tokens = state.tokens[:, -1] if step else None
    state.lengths = torch.tensor([len(r) for r in rows])
    ended = [len(r) == max_tokens or len(r) < step or bool(r and r[-1] in stops) for r in rows]
    state.finished = torch.tensor(ended)
    state.hidden, state.prompt, state.step = None, [1], step
    state.max_tokens, state.stop_token_ids = max_tokens, frozenset(stops)
    return state


def sequences_up_to(max_tokens, vocab, stops=(EOS,)):
    """Every sequence that ends: by a stop token, or by its length."""
    for n in range(1, max_tokens + 1):
        for body in itertools.product([v for v in vocab if v not in stops], repeat=n - 1):
            lasts = vocab if n == max_tokens else [v for v in vocab if v in stops]
            yield from ([*body, last] for last in lasts)


def text_of(sequence, stops=(EOS,)):
    """The text without the stop token; None if it is not UTF-8 or holds what stands for no text."""
    body = sequence[:-1] if sequence[-1] in stops else sequence
    parts = [TEXTS[v] if v < len(TEXTS) else None for v in body]
    try:
        return None if None in parts else b"".join(parts).decode()
    except UnicodeDecodeError:
        return None


def dense(answer):
    """(N, V) float64 of whatever `logw_next` may answer."""
    if isinstance(answer, Masked):
        tokens = torch.arange(V)
        allowed = (answer.bits[answer.index][:, tokens // 32] >> (tokens % 32)) & 1 != 0
        values = torch.zeros(allowed.shape, dtype=torch.float64) if answer.values is None else dense(answer.values)
        return values.masked_fill(~allowed, -math.inf)
    return answer.values[answer.index].double() if isinstance(answer, Rows) else answer.double()


def check_telescope(potential, engine, sequences, max_tokens, stops=(EOS,)):
    """`check_potential`, and at the end Σ logw_next = complete, too."""
    said = check_potential(potential, engine, sequences, prompt=[1], max_tokens=max_tokens, stop_token_ids=stops)
    for i, sequence in enumerate(sequences):
        torch.testing.assert_close(said.by_next[len(sequence), i], said.log_phi[i])


# -- Lexicon -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weight", [1.5, -2.0, 0.0, -math.inf])
def test_lexicon_counts_and_telescopes(engine, weight):
    lexicon = Lexicon(token_ids=[2, EOS, 4], weight=weight)
    lexicon.setup(engine)
    paths = list(sequences_up_to(3, [0, 1, 2, 4]))
    check_telescope(lexicon, engine, paths, 3)
    counts = [sum(v in (2, EOS, 4) for v in path) for path in paths]
    expected = [n * weight if n else 0.0 for n in counts]
    assert lexicon.complete(make_state(paths, 3)).tolist() == expected


def test_lexicon_spellings(engine):
    lexicon = Lexicon(words=["a"], weight="-inf")
    lexicon.setup(engine)
    assert torch.isneginf(lexicon._change[0]).nonzero().flatten().tolist() == [1, 8, 9, 10]
    with pytest.raises(ValueError, match="'cab'"):
        Lexicon(words=["a", "cab"]).setup(engine)
    with pytest.raises(ValueError, match=r"Lexicon\(words\): this engine has no tokenizer"):
        Lexicon(words=["a"]).prepare(None)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Lexicon(token_ids=[V]).setup(engine)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"words": "a"},
        {"words": [" "]},
        {"token_ids": [-1]},
        {"token_ids": [1.5]},
        {"token_ids": [1], "weight": math.nan},
    ],
)
def test_lexicon_refuses(kwargs):
    with pytest.raises(ValueError):
        Lexicon(**kwargs)


# -- Regex -------------------------------------------------------------------------------------------------------------
PATTERNS = [
    "a|ab",
    "(a|ab)(c|bc)?",
    "a*?",
    "(a|b)*?c?",
    "(ab)+|c",
    "[^b]*",
    ".*",
    "é+",
    "",
    "(?i)A( a)*",
    "^a+$",
    "a|",
    r"\w( \w)?",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regex_is_the_language(engine, pattern):
    regex = Regex(pattern)
    regex.setup(engine)
    paths = list(sequences_up_to(3, range(13)))
    state = make_state(paths, 3)
    texts = [text_of(path) for path in paths]
    expected = [0.0 if text is not None and re.fullmatch(pattern, text) else -math.inf for text in texts]
    assert regex.complete(state).tolist() == expected
    assert len(set(expected)) == 2


@pytest.mark.parametrize("pattern", ["(ab)+c?", "a{3}b", "é|abcabc", "(a|b| )*c"])
@pytest.mark.parametrize("stops", [(EOS,), (), (EOS, 5)])
def test_regex_budget_and_telescope(engine, pattern, stops):
    """prefix is 0 just where a continuation within the budget matches."""
    max_tokens, vocab = 4, [0, 1, 2, 3, 4, 6, 7, 11]
    regex = Regex(pattern)
    regex.setup(engine)
    paths = list(sequences_up_to(max_tokens, vocab, stops))
    good = set()
    for path in paths:
        text = text_of(path, stops)
        if text is not None and re.fullmatch(pattern, text):
            good.update(tuple(path[:t]) for t in range(len(path) + 1))
    for t in range(max_tokens):
        state = make_state(paths, max_tokens, t, stops)
        expected = [0.0 if tuple(path[:t]) in good else -math.inf for path in paths]
        prefix = regex.prefix(state)
        going = ~state.finished
        alive = torch.tensor(expected) == 0
        if set(stops) == {EOS}:  # tokens outside `vocab` (Ġ as a stop) would make more possible
            assert torch.equal(prefix[going] == 0, alive[going])
        assert bool((prefix[going & alive] == 0).all())
    check_telescope(regex, engine, paths[:: max(1, len(paths) // 500)], max_tokens, stops)


def test_regex_without_stop_tokens_fills_the_budget(engine):
    regex = Regex("(aa)*")
    regex.setup(engine)
    for max_tokens in range(1, 8):
        prefix = regex.prefix(make_state([[]], max_tokens, 0, stops=()))
        assert prefix.tolist() == [0.0 if max_tokens % 2 == 0 else -math.inf]


def test_regex_an_ordinary_token_may_be_a_stop_token(engine):
    """'c' ends a particle and is then no part of the text, though the pattern has a c."""
    regex = Regex("a+c?")
    regex.setup(engine)
    state = make_state([[1], [1], [1]], 4, stops=(3,))
    assert dense(regex.logw_next(state))[0, [1, 3, 4]].tolist() == [0.0, 0.0, -math.inf]
    regex.reset(3, [1])
    assert regex.complete(make_state([[1, 3], [3], [1, 1]], 4, stops=(3,))).tolist() == [0.0, -math.inf, 0.0]


def test_regex_rows_are_deduplicated_and_padding_is_forbidden(engine):
    regex = Regex("a*b")
    regex.setup(engine)
    rows = regex.logw_next(make_state([[]] * 1000, 30, 0))
    assert isinstance(rows, Masked) and rows.bits.shape == (1, 1) and rows.values is None
    assert bool(torch.isneginf(dense(rows)[:, len(TOKENS) :]).all())


def test_regex_masks_are_packed_kept_bounded_and_shared(tokenizer, monkeypatch):
    """A mask is made once per state and number of tokens left, and costs 1/15 of float16 values or less; copies of the
    potential, as groups work on, have one set of tables."""
    vocab, depth = 49152, 40
    big = GroupEngine(tokenizer=tokenizer, vocab_size=vocab)
    regex = Regex(f"a{{1,{depth}}}|b")
    regex.setup(big)
    budget = regex._budget(frozenset([EOS]))
    for twin in (copy.copy(regex), copy.deepcopy(regex)):
        assert twin._budget(frozenset([EOS])) is budget
    made = []
    pack = type(budget)._pack
    monkeypatch.setattr(
        type(budget), "_pack", lambda self, states, entry: made.extend(states) or pack(self, states, entry)
    )

    def ask(length, left=100):
        paths = [[1] * length] * 5
        regex.reset(5, [1])
        state = make_state(paths, length + left, length)
        return regex.logw_next(state)

    for _ in range(2):
        for length in range(depth):
            masked = ask(length)
            bits = masked.bits[masked.index[0]]
            allowed = [v for v in range(96) if bits[v // 32] >> (v % 32) & 1]
            assert allowed == ([EOS, 1] if length else [1, 2])
    assert len(made) == len(set(made)) == depth
    (masks,) = budget._masks.values()
    assert masks.n_bytes <= depth * vocab * 2 / 15

    monkeypatch.setattr("fastsmc.potentials.regex.MAX_MASK_BYTES", 10 * vocab // 8)
    budget._masks.clear()
    for left in (100, 1, 2, 100, 3):
        for length in range(depth - 1):
            masked = ask(length, left)
            assert int(masked.bits[masked.index[0]].sum()) == (0b011 if length else 0b110)
            assert sum(m.n_bytes for m in budget._masks.values()) <= 11 * vocab // 8 + 1000


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("kind", [Regex, Grammar])
def test_texts_follow_reindex(engine, kind, seed):
    """Against a fresh object that reads the whole history, with methods skipped, repeated and reindexed at random."""
    rng = np.random.default_rng(seed)
    n, max_tokens = 16, 6
    said = {Regex: "(ab|é|c )*a?", Grammar: 'root ::= ("ab" | "é" | "c ")* "a"?'}[kind]
    potential = kind(said)
    potential.setup(engine)
    potential.reset(n, [1])
    paths = [[] for _ in range(n)]
    for t in range(1, max_tokens + 1):
        for path in paths:
            if len(path) == t - 1 and path[-1:] != [EOS]:
                path.append(int(rng.choice([0, 1, 2, 3, 4, 5, 6, 7], p=[0.05, 0.2, 0.2, 0.1, 0.2, 0.05, 0.1, 0.1])))
        state = make_state(paths, max_tokens, t)
        fresh = kind(said)
        fresh.setup(engine)
        for method in rng.choice(["prefix", "complete", "logw_next"], size=rng.integers(0, 4)):
            torch.testing.assert_close(dense(getattr(potential, method)(state)), dense(getattr(fresh, method)(state)))
        if rng.random() < 0.7:
            ancestors = rng.integers(0, n, n)
            paths = [list(paths[a]) for a in ancestors]
            potential.reindex(torch.tensor(ancestors))


@pytest.mark.parametrize("pattern", ["(", "a)|(b", "(?!a)b", "x"])
def test_regex_refuses(engine, pattern):
    with pytest.raises(ValueError, match=re.escape(repr(pattern))):
        Regex(pattern).setup(engine)
    with pytest.raises(ValueError, match="pattern has 65537 characters; must have at most 65536"):
        Regex((1 << 16) * "a" + "a")


def test_regex_needs_a_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer"):
        Regex("a").setup(GroupEngine(vocab_size=V))


class TableModel:
    """A RowModel whose next token is uniform, except for the last ones, which have probability 0."""

    def __init__(self, vocab):
        self.logits = torch.full((1, V), -math.inf)
        self.logits[0, :vocab] = 0.0

    def first(self):
        return self.logits, None

    def next(self, tokens, rows):
        return self.logits.expand(len(rows), V).contiguous(), None

    def reindex(self, ancestors):
        pass


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize("others", ["none", "lexicon", "lexicon and text"])
def test_regex_in_a_group(engine, proposal, others):
    """E[Ẑ] is the Z of exact enumeration, and every particle with weight matches; alone and as a factor."""
    potential, vocab, max_tokens = Regex("(ab|b)*c"), 5, 4
    pattern, weight, bonus = potential.pattern, 0.0, 0.0
    if others != "none":
        weight = 0.7
        potential = potential * Lexicon(token_ids=[2, EOS], weight=weight)
    if others == "lexicon and text":
        bonus = -0.4
        potential = potential * TextPotential(lambda texts: [bonus * len(text) for text in texts])
    potential.setup(engine)
    exact = 0.0
    for path in sequences_up_to(max_tokens, range(vocab)):
        text = text_of(path) or ""
        if re.fullmatch(pattern, text):
            n = sum(v in (2, EOS) for v in path)
            exact += vocab ** -len(path) * math.exp(weight * n + bonus * len(text))
    estimates = []
    for seed in range(40 if proposal == "twisted" else 300):  # base: skewed estimates, so more of them
        params = SMCParams(n_particles=128, max_tokens=max_tokens, proposal=proposal, seed=seed)
        population = run_group(Group(params, potential, [1], {EOS}, engine=engine), TableModel(vocab))
        estimates.append(math.exp(population.log_z))
        for ids, w in zip(population.token_ids, population.weights, strict=True):
            assert w == 0 or re.fullmatch(pattern, text_of(ids))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 5 * error + 1e-9


# -- Infill, TextPotential, Product ------------------------------------------------------------------------------------
class ScoringEngine(Engine):
    tokenizer, device, vocab_size, hidden_size, model = None, torch.device("cpu"), V, None, None

    def continuation_log_prob(self, token_ids, given=0):
        return torch.full((2,), -float(len(token_ids)), dtype=torch.float64)


def test_infill(engine, tokenizer):
    by_ids, by_text = Infill([1, 2, 3]), Infill("abc a", every_step=True)
    assert by_ids.lookahead == 3
    by_text.prepare(tokenizer)
    assert by_text.lookahead == len(tokenizer.encode("abc a")) > 0
    by_ids.setup(ScoringEngine())
    state = make_state([[1], [2]], 4)
    assert by_ids.complete(state).tolist() == [-3, -3]
    assert by_ids.prefix(state).tolist() == [0, 0]
    scorer = ScoringEngine()
    scorer.tokenizer = tokenizer
    by_text.setup(scorer)
    assert by_text.prefix(state).tolist() == [-float(by_text.lookahead)] * 2
    assert by_text.prefix(make_state([[], []], 4)).tolist() == [0, 0]
    for bad in ("", [], [-1], 5, None):
        with pytest.raises((ValueError, TypeError)):
            Infill(bad)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Infill("a").prepare(None)


def test_text_potential_asks_only_about_what_is_needed(engine):
    asked = []

    def fn(texts):
        asked.append(list(texts))
        return [float(len(text)) for text in texts]

    potential = TextPotential(fn, every_step=True)
    potential.setup(engine)
    state = make_state([[1, 2], [4, EOS], [1, 2], [EOS]], 4, 2)
    assert potential.complete(state).tolist() == [0, 2, 0, 0]
    assert asked == [["ab", ""]]
    assert potential.prefix(state).tolist() == [2, 0, 2, 0]
    assert len(asked) == 1  # "ab" was known
    lazy = TextPotential(fn)
    lazy.setup(engine)
    assert lazy.prefix(state).tolist() == [0, 0, 0, 0]
    wrong = TextPotential(lambda texts: [0.0])
    wrong.setup(engine)
    with pytest.raises(ValueError, match="1 values for 2 texts"):
        wrong.complete(state)
    with pytest.raises(ValueError, match="callable"):
        TextPotential(3)
    for bad in (True, None, "1", 1j, np.bool_(True), torch.tensor(True)):
        wrong = TextPotential(lambda texts, bad=bad: [bad] * len(texts))
        wrong.setup(engine)
        with pytest.raises(ValueError, match="fn gave .*must be numbers"):
            wrong.complete(state)
    for kind in (np.array, torch.tensor, tuple, lambda values: [np.float32(v) for v in values]):
        right = TextPotential(lambda texts, kind=kind: kind([1.0] * len(texts)))
        right.setup(engine)
        assert right.complete(state).tolist() == [0, 1, 0, 1]


def test_product_adds(engine):
    lexicon, regex = Lexicon(token_ids=[1], weight=0.5), Regex("(a|b)*c?")
    product = lexicon * regex * Infill([1, 2])
    assert product.lookahead == 2
    pair = lexicon * regex
    pair.setup(engine)
    paths = list(sequences_up_to(3, [0, 1, 2, 3]))
    check_telescope(pair, engine, paths, 3)
    state = make_state(paths, 3)
    pair.reset(len(paths), [1])
    expected = lexicon.complete(state) + regex.complete(state)
    assert torch.equal(pair.complete(state), expected)
    assert Product(TextPotential(len)).logw_next(state) is None
    with pytest.raises(ValueError):
        Product()
    with pytest.raises(TypeError):
        lexicon * 3


# -- by name -----------------------------------------------------------------------------------------------------------
class FakeEntry:
    def __init__(self, name, built):
        self.name, self.value, self._built = name, f"module:{name}", built

    def load(self):
        if isinstance(self._built, BaseException):
            raise self._built
        return self._built

    def __lt__(self, other):
        return self.name < other.name


@pytest.fixture
def register(monkeypatch):
    """Puts entry points in the place of those that are there."""

    def put(entries):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
        registered.cache_clear()

    yield put
    registered.cache_clear()


@pytest.fixture
def entries(register):
    fakes = [FakeEntry("regex", Regex), FakeEntry("lexicon", Lexicon), FakeEntry("odd", dict)]
    fakes.append(FakeEntry("broken", ImportError("no module")))
    fakes.append(FakeEntry("leaves", SystemExit(3)))
    register(fakes)


def test_resolve(entries):
    assert list(registered()) == ["broken", "leaves", "lexicon", "odd", "regex"]
    assert registered() is registered()  # each request asks, and to look takes milliseconds
    potential = resolve("lexicon", {"token_ids": [1], "weight": -2})
    assert isinstance(potential, Potential) and potential.weight == -2


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("rgex", {}, "'rgex'.*'lexicon'.*'regex'"),
        ("regex", {"patern": "a"}, "patern"),
        ("regex", None, "pattern"),
        ("regex", [1], "JSON object"),
        ("lexicon", {"words": "a"}, "words='a'"),
        ("odd", {}, "does not make"),
        ("broken", {}, "cannot load"),
        ("leaves", {}, "cannot load"),
    ],
)
def test_resolve_refuses(entries, name, args, message):
    with pytest.raises(ValueError, match=message):
        resolve(name, args)


def test_resolve_without_any_entry_point(register):
    register([])
    with pytest.raises(ValueError, match="none"):
        resolve("regex")


# -- Judge -------------------------------------------------------------------------------------------------------------
def test_judge(tokenizer):
    asked = []

    class Answers(ScoringEngine):
        def continuation_log_prob(self, token_ids, given=0):
            asked.append((token_ids, given))
            return torch.tensor([-1.0, -float(token_ids[-1])], dtype=torch.float64)

    by_ids = Judge([1, 2], [3], [4, 5])
    assert by_ids.lookahead == 4
    by_ids.setup(Answers())
    state = make_state([[1], [2]], 4)
    torch.testing.assert_close(by_ids.complete(state).exp(), torch.tensor([0.5, 1 / (1 + np.exp(-2))]).double())
    assert asked == [([1, 2, 3], 2), ([1, 2, 4, 5], 2)]
    assert by_ids.prefix(state).tolist() == [0, 0] and len(asked) == 2
    every = Judge([1, 2], [3], [4], every_step=True)
    every.setup(Answers())
    assert every.prefix(state)[0] == np.log(0.5) and every.prefix(make_state([[], []], 4)).tolist() == [0, 0]
    by_text = Judge("abc", "a", "b")
    assert by_text.lookahead == 0
    by_text.prepare(tokenizer)
    assert by_text.lookahead == len(tokenizer.encode("abc")) + max(len(tokenizer.encode(x)) for x in "ab")
    given = Judge.tokenize_args({"question": "abc", "yes": [1], "no": "b"}, tokenizer)
    assert given == {"question": tokenizer.encode("abc"), "yes": [1], "no": tokenizer.encode("b")}
    with pytest.raises(ValueError, match="Judge: no=' No' has no tokens"):  # the default is encoded, too
        Judge.tokenize_args({"question": "abc", "yes": [1]}, tokenizer)


def test_judge_refusals():
    class RulesOut(ScoringEngine):
        def continuation_log_prob(self, token_ids, given=0):
            return torch.tensor([-torch.inf, 0.0], dtype=torch.float64)

    for args, message in (
        (("", "a", "b"), "question='': is empty"), (([1], [], [2]), r"yes=\[\]: is empty"), ((3,), "question=3"),
        (([1], [2], [-1]), r"no\[0\]=-1"), (([1], "a", "a"), "yes and no are both 'a'"),
        (([1], [2], [3], 1), "every_step=1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"Judge: .*{message}"):
            Judge(*args)
    with pytest.raises(ValueError, match="Judge: yes, given as text, needs a tokenizer"):
        Judge([1]).prepare(None)
    with pytest.raises(ValueError, match=rf"Judge: question\[0\]={V}: is beyond"):
        Judge([V], [1], [2]).setup(ScoringEngine())
    judge = Judge([1], [2], [3])
    judge.setup(RulesOut())
    answer = judge.complete(make_state([[1], [2]], 4))
    assert answer.isnan().tolist() == [True, False]  # a fault of the first particle's group alone
