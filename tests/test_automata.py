"""Regular expressions as automata: against Python's `re`, and what they may cost."""

import copy
import pickle
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest

from fastsmc.automata import language
from fastsmc.automata.language import DEAD, LimitError, Limits, byte_automaton
from fastsmc.automata.syntax import parse
from fastsmc.automata.tokens import token_moves
from fastsmc.potentials import Regex, automaton


def bytes_of(pattern, states=50_000, seconds=60):
    return byte_automaton(parse(pattern), Limits(states, seconds))


def accepts(found, text):
    state = 0
    for byte in text if isinstance(text, bytes) else text.encode():
        state = found.table[state, byte]
        if state == DEAD:
            return False
    return bool(found.accept[state])


ATOMS = [
    *"abéZ .ß漢{",
    r"\w",
    r"\W",
    r"\d",
    r"\S",
    "[a-c]",
    "[^ab]",
    "[]a-]",
    r"[\d_é]",
    r"[^\W\d]",
    r"\.",
    r"\x61",
    "(?:)",
]
TEXTS = ["", *"abcABZéÉß ẞ漢1_.-]{\n", "ab", "ba", "aab", "éa", "a漢b", "  ", "aaa", "1a", "a1é", "bab", "abab", "ZZ"]


def random_pattern(rng, depth=0):
    kind = rng.random()
    if depth > 3 or kind < 0.35:
        return rng.choice(ATOMS)
    if kind < 0.6:
        return "".join(random_pattern(rng, depth + 1) for _ in range(rng.randint(1, 3)))
    if kind < 0.75:
        return f"(?:{'|'.join(random_pattern(rng, depth + 1) for _ in range(rng.randint(1, 3)))})"
    if kind < 0.8:
        return rng.choice(["^", r"\A", r"\Z", "(?i:a|É)", "(?s:.)", "(?a:\\w)", "(?#no)"])
    repeat = rng.choice(["*", "+", "?", "*?", "{2}", "{1,}", "{,2}", "{0,3}?"])
    return f"({random_pattern(rng, depth + 1)}){repeat}"


@pytest.mark.parametrize("seed", range(4))
def test_random_patterns_mean_what_re_means(seed):
    rng, n_true = random.Random(seed), 0
    for _ in range(50):
        pattern = random_pattern(rng)
        flag = rng.choice(["", "", "(?i)"])
        found = bytes_of(flag + pattern)
        for text in TEXTS + ["".join(rng.choice("abéZ 1") for _ in range(rng.randint(2, 5))) for _ in range(10)]:
            want = re.fullmatch(flag + pattern, text) is not None
            assert accepts(found, text) == want, (flag + pattern, text)
            n_true += want
    assert n_true > 150


@pytest.mark.parametrize(
    ("pattern", "yes", "no"),
    [
        ("^a$|^b$", ["a", "b"], ["", "ab", "a\n"]),
        ("a$|b", ["a", "b"], ["ab"]),
        ("(a|b$)c?", ["a", "ac", "b"], ["bc"]),
        ("a*^b", ["b"], ["ab", "a"]),
        ("^$", [""], ["a"]),
        ("(a$)*", ["", "a"], ["aa"]),
        (r"\A(?P<x>a)(?<y>b)\z", ["ab"], ["a"]),
        (r"\x{e9}\u00e9\U0001F600\N{LATIN SMALL LETTER E WITH ACUTE}", ["éé😀é"], ["éé"]),
        (r"\p{Lu}\P{Lu}\pL", ["Aab", "Éaé"], ["aaa", "AAa"]),
        ("(?i)straße(?-i:X)", ["STRAßEX", "straẞeX"], ["strassex", "straßex"]),
        ("a(?i)b|c", ["aB", "C"], ["Ab"]),
        ("(?is)k.", ["\u212a\n"], [""]),
        (r"a{,}b{2}{", ["bb{", "abb{"], ["b{"]),
        (r"[\b\]\\-]+", ["\b]\\-"], ["b"]),
        ("x{0}", [""], ["x"]),
        (r"[^\s\S]|b", ["b"], [""]),
    ],
)
def test_what_re_does_not_have_or_has_otherwise(pattern, yes, no):
    found = bytes_of(pattern)
    assert [accepts(found, text) for text in yes + no] == [True] * len(yes) + [False] * len(no)


@pytest.mark.parametrize("pattern", [r"\w", r"(?a)\w", r"\S", ".", "[^a-é]", r"(?i)[k-sµ]", r"[^\d\ud7ff-\ue001]"])
def test_a_class_is_that_of_re_for_every_character(pattern):
    """All 1,112,064 of them, in UTF-8; and nothing that is not UTF-8."""
    found = bytes_of(pattern)
    table = np.concatenate([found.table, np.full((1, 256), DEAD)])  # row -1
    codes = np.array([*range(0xD800), *range(0xE000, 0x110000)])
    text = codes.astype("<u4").tobytes().decode("utf-32-le")
    data = np.frombuffer(text.encode(), dtype=np.uint8)
    first = np.flatnonzero(data & 0xC0 != 0x80)
    length = np.diff(np.append(first, len(data)))
    state = np.zeros(len(codes), dtype=np.int64)
    for i in range(4):
        state = np.where(i < length, table[state, data[np.minimum(first + i, len(data) - 1)]], state)
    got = np.append(found.accept, False)[state]
    want = np.zeros(len(codes), dtype=bool)
    want[[m.start() for m in re.finditer(pattern, text)]] = True
    assert np.array_equal(got, want)
    for bad in (b"\xc0\x80", b"\xe0\x80\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff", b"\x80", b"\xc3"):
        assert not accepts(found, bad)


def test_case_is_folded_as_re_folds_it():
    cased = "".join(c for c in language._everything() if not c.lower() == c == c.upper())
    folds = language._folds()
    for c in cased:
        assert {ord(m) for m in re.findall(re.escape(c), cased, re.I)} | {ord(c)} == set(folds.get(ord(c), [ord(c)]))


def test_the_automaton_is_minimal():
    for pattern, states in {"(a|b)*abb": 4, "a{3,5}|aaa": 6, "(ab|ac)*|(a[bc])+": 2, "[a-z]{1,100}": 101,
                            "(a|aa|aaa)*": 1, r".{1,50}": 401}.items():  # fmt: skip
        assert len(bytes_of(pattern).table) == states, pattern


# -- what is refused ---------------------------------------------------------------------------------------------------
REFUSED = {
    "(?=a)a": "look-ahead", "(?!a)b": "look-ahead", "(?<=a)b": "look-behind", "(?<!a)b": "look-behind",
    r"(a)\1": "back-reference", r"(?P<n>a)(?P=n)": "back-reference", r"(?P<n>a)\k<n>": "back-reference",
    "(": "group", "(a": "group", "a)": "group", "a)|(b": "group", "(?P<1>a)": "group's name",
    "(?P<a>x)(?P<a>y)": "group's name",
    "(?": "group", "(?'n'a)": "group", "(?#a": "group", "*a": "repetition", "a|+": "repetition", "{2}": "repetition",
    "a{3,1}": "repetition", "a**": "repetition of a repetition", "a{2}{3}": "repetition of a repetition",
    "^*": "anchor",
    "a{9999999999}": "repetition", "a++": "possessive", "a*+": "possessive", "a{2}+b": "possessive", "(?>a)": "atomic",
    "(?|a|b)": "branch-reset", "(a)?(?(1)b|c)": "conditional", "(?R)": "recursion", "(a)(?1)": "recursion",
    "(?m)^a": "flag m", "(?x) a": "flag x", "(?-u)a": "flag u, switched off", "(*UTF8)a": "control verb",
    r"\ba": "word boundary", r"a\B": "word boundary", r"\Ga": "anchor", r"\X": "grapheme", r"\R": "line break",
    r"\07": "octal", r"\q": "escape", "a\\": "escape", r"\xg1": "hexadecimal", r"\x{110000}": "hexadecimal",
    r"\ud800": "hexadecimal", r"\N{NOTHING}": "named character", r"\p{Foo}": "Unicode property",
    r"\p": "Unicode property", "[a": "class", "[]": "class", "[z-a]": "range", r"[a-\d]": "range",
    "[[:alpha:]]": "POSIX class", "[a[b]]": "set within a set", "[--z]": "difference",
    "[a&&b]": "intersection", "[a-z--b]": "difference", "a\ud800": "surrogate", "(" * 200 + "a" + ")" * 200: "nested",
}  # fmt: skip


@pytest.mark.parametrize("pattern", REFUSED)
def test_what_is_refused_is_named_after_the_pattern(pattern):
    with pytest.raises(ValueError) as error:
        Regex(pattern)
    before, after = str(error.value).split(f"{pattern!r}: at character ")
    assert before == "Regex: pattern=" and REFUSED[pattern] in after


# -- over tokens -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(3))
def test_the_token_automaton_is_a_walk_of_the_bytes(seed):
    """From every state that tokens reach, by every token; and two tokens of one class are never told apart."""
    rng = random.Random(seed)
    for _ in range(25):
        found = bytes_of(random_pattern(rng))
        words = ["".join(rng.choice("abé漢Z1 .") for _ in range(rng.randint(1, 4))).encode() for _ in range(30)]
        tokens = rng.sample([None, b"", *words, *words[:5], *(bytes([rng.randrange(256)]) for _ in range(30))], k=60)
        moves = token_moves(found, tokens, Limits(10**5, 60))
        byte_state, todo, edges = {0: 0}, [0], set()
        while todo:
            s = todo.pop()
            by = dict(
                zip(*(part[moves.first[s] : moves.first[s + 1]].tolist() for part in (moves.by, moves.to)), strict=True)
            )
            assert moves.accept[s] == found.accept[byte_state[s]]
            for token, kind in zip(tokens, moves.classes.tolist(), strict=True):
                at = DEAD if not token else byte_state[s]
                for byte in token or b"":
                    at = found.table[at, byte] if at != DEAD else DEAD
                assert (kind in by) == (at != DEAD)
                if at != DEAD:
                    edges.add((s, by[kind]))
                    if by[kind] not in byte_state:
                        byte_state[by[kind]] = at
                        todo.append(by[kind])
                    assert byte_state[by[kind]] == at
        assert len(byte_state) == len(moves.accept) - 1 and set(map(tuple, moves.edges.T.tolist())) == edges
        assert len(set(byte_state.values())) == len(byte_state) and len(moves.first) == len(moves.accept) + 1


# -- limits ------------------------------------------------------------------------------------------------------------
ASCII = [bytes([b]) for b in range(128)]


def test_states_and_time_are_limited():
    for pattern, n in (
        ("(a|b)*a(a|b){14}", 1000),
        ("a{5000}", 1000),
        ("((a{100}){100}){1000}", 1000),
        (r"\w{1,40}", 5000),
    ):
        with pytest.raises(LimitError, match="more than .* states"):
            bytes_of(pattern, states=n)
    with pytest.raises(LimitError, match=r"states were not ready within 0.1 s of CPU time; it had come to \d+ states"):
        bytes_of("(a|b)*a(a|b){20}", states=10**7, seconds=0.1)
    assert len(bytes_of("(a|b)*a(a|b){8}", states=512).table) == 512


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (dict(states=100), "more than 100 states"),
        (dict(seconds=0.2, states=10**7), "states were not ready within 0.2 s of CPU time"),
        (dict(memory=300 << 20, states=10**9), "states needs more than 300 MiB"),
        (dict(wait=0.3, states=10**9, seconds=99), "its states were not ready within 0.3 s"),
    ],
)
def test_the_child_is_limited_and_says_by_what(limits, message, monkeypatch):
    made = []
    popen = subprocess.Popen
    monkeypatch.setattr(automaton.subprocess, "Popen", lambda *a, **k: made.append(popen(*a, **k)) or made[-1])
    pattern = "(a|b)*a(a|b){20}"
    with pytest.raises(ValueError) as error:
        automaton.compile_tokens(pattern, ASCII, **limits)
    assert str(error.value).startswith(f"Regex: pattern={pattern!r}: ") and message in str(error.value)
    assert len(made) == 1 and made[0].returncode is not None


def test_the_child_imports_neither_torch_nor_fastsmc_and_gives_what_this_process_would():
    found = automaton.compile_tokens(r"\p{Lu}[a-c]*", ASCII)
    want = token_moves(bytes_of(r"\p{Lu}[a-c]*"), ASCII, Limits(10**4, 60))
    for a, b in zip(found, want, strict=True):
        assert np.array_equal(a, b)
    code = (
        "import sys, runpy, atexit, io\n"
        "atexit.register(lambda: print(sorted(m for m in ('torch', 'fastsmc') if m in sys.modules), file=sys.stderr))\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    task = pickle.dumps(("a", [b"a"], 10, 10.0, 1 << 30, 60.0, 0))
    numpy_folder = np.__file__.rsplit("/", 2)[0]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, automaton.child.__file__, numpy_folder],
        input=task,
        capture_output=True,
    )
    assert done.stderr.decode().strip() == "[]" and pickle.loads(done.stdout)[0] == "ok"


def test_an_interrupt_kills_the_child_and_a_line_says_what_is_waited_for(monkeypatch, capsys):
    made = []
    popen = subprocess.Popen

    class Interrupted(popen):
        def wait(self, timeout=None):
            if timeout is not None and timeout > 5:  # past the patience
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(automaton, "PATIENCE", 0.01)
    monkeypatch.setattr(automaton.subprocess, "Popen", lambda *a, **k: made.append(Interrupted(*a, **k)) or made[-1])
    with pytest.raises(KeyboardInterrupt):
        automaton.compile_tokens("(a|b)*a(a|b){20}", ASCII, states=10**9, seconds=99)
    assert made[0].returncode == -9
    assert capsys.readouterr().err == "fastsmc: compiling Regex('(a|b)*a(a|b){20}') ...\n"


# -- one automaton per process -----------------------------------------------------------------------------------------
class Vocabulary:
    """A tokenizer, as far as these functions look."""


@pytest.fixture
def counted(monkeypatch):
    """compile_tokens in this process, counted; and caches that begin empty."""
    calls, gate = [], threading.Event()
    gate.set()

    def compile_here(pattern, tokens):
        calls.append(pattern)
        gate.wait(10)
        if pattern == "bad":
            raise ValueError("Regex: pattern='bad': refused")
        return token_moves(bytes_of(pattern), tokens, Limits(10**4, 60))

    monkeypatch.setattr(automaton, "compile_tokens", compile_here)
    monkeypatch.setattr(automaton, "token_bytes", lambda tokenizer: ASCII)
    monkeypatch.setattr(automaton, "_kept", automaton.OrderedDict())
    monkeypatch.setattr(automaton, "_alive", automaton.weakref.WeakValueDictionary())
    return calls, gate


def test_an_automaton_is_made_once_and_shared(counted):
    calls, gate = counted
    tokenizers = Vocabulary(), Vocabulary()
    regex = Regex("a+")
    regex.prepare(tokenizers[0])
    made = regex._automaton
    for again in (copy.copy(regex), copy.deepcopy(regex), pickle.loads(pickle.dumps(regex))):
        assert again._automaton is made
    other = Regex("a+")
    other.prepare(tokenizers[1])  # another object with the same tokens, as in a worker
    assert other._automaton is made and calls == ["a+"]
    assert len(pickle.dumps(regex)) < 3000  # moves, not masks

    gate.clear()
    results = []

    def ask(pattern):
        try:
            results.append(automaton.automaton_of(pattern, tokenizers[0]))
        except ValueError as error:
            results.append(str(error))

    threads = [threading.Thread(target=ask, args=(p,)) for p in ["b+"] * 3 + ["bad"] * 3]
    for thread in threads:
        thread.start()
    while len(calls) < 3:
        pass
    gate.set()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["a+", "b+", "bad"]
    assert (
        results.count("Regex: pattern='bad': refused") == 3
        and len({id(r) for r in results if r.__class__ is not str}) == 1
    )


def test_automata_that_nobody_uses_are_bounded(counted, monkeypatch):
    calls, _ = counted
    monkeypatch.setattr(automaton, "MAX_KEPT", 3)
    tokenizer = Vocabulary()
    for pattern in "abcda":
        automaton.automaton_of(pattern, tokenizer)
    assert calls == list("abcda") and len(automaton._kept) == 3
    monkeypatch.setattr(automaton, "MAX_KEPT_BYTES", 1)
    held = automaton.automaton_of("e", tokenizer)
    assert list(automaton._kept) == [(held.vocabulary, "e")]
    automaton.automaton_of("f", tokenizer)
    assert automaton.automaton_of("e", tokenizer) is held  # somebody uses it
