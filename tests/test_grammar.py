"""`Grammar`, `JsonSchema` and `Choice`, against enumeration, against llguidance itself, and against JSON Schema's own
validator."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import pickle
import random
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from llguidance import LLMatcher
from test_potentials import (  # noqa: F401
    EOS,
    PATTERNS,
    TEXTS,
    TableModel,
    V,
    dense,
    engine,
    make_state,
    sequences_up_to,
    text_of,
    tokenizer,
)
from tiny import PROMPT, make_llama, run_tables

from fastsmc import SMCParams
from fastsmc.params import RESAMPLING_SCHEMES
from fastsmc.potentials import Choice, Grammar, JsonSchema, Lexicon, Masked, Regex, token_bytes
from fastsmc.potentials.copying import own_copy
from fastsmc.potentials.ebnf import to_lark
from fastsmc.potentials.joint import is_joinable, join, part
from fastsmc.potentials.matchers import START
from fastsmc.smc import Group, GroupEngine
from fastsmc.smc.driving import run_group
from fastsmc.testing import check_potential

THREE_RULES = 'root ::= pair ("," pair)*\npair ::= key ":" ("x" | root)\nkey ::= [ab]+'


def grammar_of(pattern: str) -> str:
    """A grammar of the texts that a pattern matches."""
    return f"start: /{pattern.strip('^$')}/" if pattern else 'start: ""'


def complete(potential, paths, max_tokens, stops=(EOS,)):
    potential.reset(len(paths), [1])
    return potential.complete(make_state(paths, max_tokens, stops=stops))


def check_telescope(potential, engine, paths, max_tokens, stops=(EOS,)):  # noqa: F811
    """`check_potential`, and Σ logw_next = complete where a stop token ends a path; at the last token, no less."""
    said = check_potential(potential, engine, paths, prompt=[1], max_tokens=max_tokens, stop_token_ids=stops)
    for i, path in enumerate(paths):
        total = said.by_next[len(path), i]
        assert total == said.log_phi[i] if path[-1] in stops else total >= said.log_phi[i]


# -- what a sentence is ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("stops", [(EOS,), (), (EOS, 5)])
def test_grammar_and_regex_agree(engine, pattern, stops):  # noqa: F811
    regex, grammar = Regex(pattern), Grammar(grammar_of(pattern))
    regex.setup(engine)
    grammar.setup(engine)
    paths, answers = list(sequences_up_to(3, range(13), stops)), set()
    for n in range(1, 4):
        if ended := [path for path in paths if len(path) == n]:
            want, got = complete(regex, ended, 3, stops), complete(grammar, ended, 3, stops)
            assert got.tolist() == want.tolist()
            answers.update(want.tolist())
    assert len(answers) == 2 or not stops  # of texts that end by their length, some patterns match none
    check_telescope(grammar, engine, paths[::7], 3, stops)
    # where a match is still possible, so is a sentence
    for t in range(3):
        state = make_state(paths, 3, t, stops)
        going = ~state.finished
        possible, begun = regex.prefix(state)[going] == 0, grammar.prefix(state)[going] == 0
        assert bool((begun | ~possible).all())


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ('root ::= ("a" | "ab") "b"', "ab|abb"),  # which longest terminals would lose
        ('root ::= x "a"\nx ::= [a]*', "a+"),
        ('root ::= "é" | "\\u00e9" a-b | "\\x62"\na-b ::= "" | [^b]{1,2} # comment', "é([^b]{0,2})|b"),
        ('root ::= "a" |\n  "b"\n# comment\n | .', "a|b|(?s:.)"),
        ("root ::= [\\x61-b]+ [a-]?", "[ab]+[a-]?"),
    ],
)
def test_ebnf_is_context_free(engine, grammar, pattern):  # noqa: F811
    potential = Grammar(grammar)
    potential.setup(engine)
    for n in range(1, 4):
        paths = [path for path in sequences_up_to(3, range(9)) if len(path) == n]
        texts = [text_of(path) for path in paths]
        want = [0.0 if text is not None and re.fullmatch(pattern, text) else -math.inf for text in texts]
        assert complete(potential, paths, 3).tolist() == want


def balanced(text: str) -> bool:
    """a is an opening, b a closing bracket."""
    depth = 0
    for c in text:
        depth += {"a": 1, "b": -1}.get(c, -99)
        if depth < 0:
            return False
    return depth == 0


def test_a_language_that_is_not_regular(engine):  # noqa: F811
    for text in ('root ::= ("a" root "b")*', 'start: ("a" start "b")*'):
        potential = Grammar(text)
        potential.setup(engine)
        paths = [path for path in sequences_up_to(6, [0, 1, 2, 4]) if len(path) == 6]
        texts = [text_of(path) for path in paths]
        want = [0.0 if text is not None and balanced(text) else -math.inf for text in texts]
        assert complete(potential, paths, 6).tolist() == want and len(set(want)) == 2
        check_telescope(potential, engine, paths[::5], 6)


def test_choice(engine):  # noqa: F811
    choices = ["ab", "é", "a(b)*", "", "a b", "abc"]
    choice = Choice(choices)
    choice.setup(engine)
    for n in range(1, 4):
        paths = [path for path in sequences_up_to(3, range(13)) if len(path) == n]
        want = [0.0 if text_of(path) in choices else -math.inf for path in paths]
        assert complete(choice, paths, 3).tolist() == want
    assert is_joinable(choice)


def test_an_ordinary_token_may_be_a_stop_token(engine):  # noqa: F811
    grammar = Grammar('root ::= "a"+ "c"?')
    grammar.setup(engine)
    state = make_state([[1], [1], [1]], 4, stops=(3,))
    assert dense(grammar.logw_next(state))[0, [1, 3, 4]].tolist() == [0.0, 0.0, -math.inf]
    assert complete(grammar, [[1, 3], [3, 3], [2, 3]], 4, stops=(3,)).tolist() == [0.0, -math.inf, -math.inf]


def test_rows_are_per_state_and_padding_is_forbidden(engine):  # noqa: F811
    grammar = Grammar('root ::= "a"* "b"')
    grammar.setup(engine)
    rows = grammar.logw_next(make_state([[]] * 1000, 30, 0))
    assert isinstance(rows, Masked) and rows.bits.shape == (1, 1) and rows.values is None
    assert bool(torch.isneginf(dense(rows)[:, len(TEXTS) :]).all())


# -- odd tokens, against the library -----------------------------------------------------------------------------------
def odd_tokenizer():
    """A tokenizer with byte fallback: "▁" is a space, <0x..> are bytes; with added tokens, ordinary and special."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        "</s>",
        *[f"<0x{i:02X}>" for i in range(256)],
        "▁",
        "a",
        "b",
        "ab",
        "é",
        "▁a",
        "日",
        "日本",
        '"',
        "{",
    ]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=[], byte_fallback=True))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    out = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    out.add_tokens([AddedToken("abba", normalized=False), AddedToken("<special>", special=True)])
    return out


LARKS = [
    'start: /[ab]*é?/ "日本" | /.{0,2}/',
    'start: word (" " word)*\nword: /[ab]+|é/',
    'start: "a" start "b" | "é" | ""',
    'start: WORD ("," WORD)*\nWORD: /[ab]+/ | "日"\n%ignore /[ é]/',
]


@pytest.mark.parametrize("lark", LARKS)
def test_a_thousand_random_texts_against_the_library(lark):
    """Token by token, with characters in pieces, against the library's own reading of the text byte by byte."""
    from llguidance import LLTokenizer

    tokenizer = odd_tokenizer()  # noqa: F811
    tokens = token_bytes(tokenizer)
    assert tokens[tokenizer.convert_tokens_to_ids("<special>")] is None and tokens[1] is None
    bytewise = LLTokenizer("byte")
    engine = GroupEngine(tokenizer=tokenizer, vocab_size=len(tokens) + 30)  # noqa: F811
    grammar = Grammar(lark)
    grammar.setup(engine)
    rng, agreed, n_steps = random.Random(0), [0, 0], 6
    useful = [i for i, token in enumerate(tokens) if token and set(token) <= set("ab é日本".encode())]
    paths: list[list[int]] = [[] for _ in range(1000)]
    for t in range(n_steps - 1):
        rows = dense_of(grammar.logw_next(make_state(paths, n_steps, t, stops=(1,))), engine.vocab_size)
        for path, row in zip(paths, rows, strict=True):
            if len(path) == t and path[-1:] != [1]:
                allowed = [v for v in (row == 0).nonzero().flatten().tolist() if v != 1]
                others = [1] if rng.random() < 0.5 else useful
                path.append(rng.choice(allowed if allowed and rng.random() < 0.8 else others))
    for path in paths:
        if path[-1] != 1:
            path.append(1)
    for n in range(1, n_steps + 1):
        ended = [path for path in paths if len(path) == n]
        got = complete(grammar, ended, n_steps, stops=(1,)) if ended else torch.zeros(0)
        for path, answer in zip(ended, got.tolist(), strict=True):
            matcher = LLMatcher(bytewise, lark)
            text = b"".join(tokens[v] for v in path[:-1])
            read = matcher.try_consume_tokens(list(text)) == len(text)
            want = read and matcher.is_accepting()
            assert (answer == 0) == want, (lark, text)
            agreed[want] += 1
    assert min(agreed) > 100


def dense_of(answer: Masked, vocab: int) -> torch.Tensor:
    tokens = torch.arange(vocab)
    allowed = (answer.bits[answer.index][:, tokens // 32] >> (tokens % 32)) & 1 != 0
    return torch.zeros(allowed.shape).masked_fill(~allowed, -math.inf)


# -- enumeration on a tiny Llama ---------------------------------------------------------------------------------------
TOY = [
    "<eos>",
    *'"{}[]:,abxyz01 ',
    '"a',
    'a"',
    "ab",
    '"ab"',
    "ba",
    '":',
    '{"',
    '"}',
    "ab:",
    ":x",
    "x,",
    ",a",
    "b:x",
    "Ã",
    "©",
]


@pytest.fixture(scope="module")
def toy():
    """A byte-level tokenizer of 64 tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = [t.replace(" ", "Ġ") for t in TOY]
    pieces += [c for c in "cdefghijklmnopqrstuvwABCDEFGHIJKLM" if c not in pieces][: 64 - len(pieces)]
    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(pieces)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


class Rows(dict):
    """log p0 of the next token by prefix, computed when asked for."""

    def __init__(self, model, vocab: int) -> None:
        super().__init__()
        self.model, self.vocab, self.stop = model, vocab, frozenset([EOS])
        self.table = self

    @torch.inference_mode()
    def __missing__(self, prefix):
        logits = self.model(torch.tensor([[*PROMPT, *prefix]])).logits[0, -1].double()
        self[prefix] = logits.log_softmax(-1).numpy()
        return self[prefix]


@pytest.fixture(scope="module")
def llama(toy, tmp_path_factory):
    from transformers import AutoModelForCausalLM

    path = make_llama(tmp_path_factory.mktemp("toy"), 64, scale=0.1)
    return Rows(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), 64)


def three_rules(text: str) -> bool:
    return re.fullmatch(r"([ab]+:)+x(,([ab]+:)+x)*", text) is not None


TARGETS = {
    "enum": (lambda: JsonSchema({"enum": ["ab", "ba", "a", ["x", 0]]}), 4, {'"ab"', '"ba"', '"a"', '["x",0]'}),
    "three rules": (lambda: Grammar(THREE_RULES), 4, None),
    "choice": (lambda: Choice(["ab", "aba", "xy"]), 3, {"ab", "aba", "xy"}),
}


def sentences(tokens, steps, is_sentence, begins):
    """Every sequence of tokens that is complete and a sentence."""
    out = []

    def walk(prefix, text):
        if is_sentence(text):
            out.append((*prefix, EOS))
            if len(prefix) == steps:
                out[-1] = prefix
        if len(prefix) == steps:
            return
        for v, token in enumerate(tokens):
            if token is not None and begins(text + token.decode(errors="surrogateescape")):
                walk((*prefix, v), text + token.decode(errors="surrogateescape"))

    walk((), "")
    return [path for path in out if len(path) <= steps]


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_log_z_is_enumerated(toy, llama, name, proposal):
    """E[Ẑ] is the probability of a sentence within T tokens, over all tokenizations, and the posterior is p0's."""
    make, steps, texts = TARGETS[name]
    tokens = token_bytes(toy)
    if texts is None:
        paths = sentences(tokens, steps, three_rules, lambda text: set(text) <= set("ab:x,"))
    else:
        paths = sentences(tokens, steps, texts.__contains__, lambda text: any(t.startswith(text) for t in texts))
    log_p = [sum(llama.table[path[:i]][v] for i, v in enumerate(path)) for path in paths]
    exact = float(np.exp(np.logaddexp.reduce(log_p)))
    heaviest = sorted(zip(log_p, paths, strict=True))[-3:]
    assert len({b"".join(tokens[v] for v in p if v != EOS) for p in paths}) < len(paths)  # several ways to write a text
    engine = GroupEngine(tokenizer=toy, vocab_size=64)  # noqa: F811
    potential = make()
    potential.setup(engine)
    estimates, shares = [], []  # Ẑ, and Ẑ times the weight of each of the heaviest sentences
    n = 64 if proposal == "twisted" else 1024
    asked = [
        SMCParams(
            n_particles=n, max_tokens=steps, proposal=proposal, seed=seed, ess_threshold=(0.5, 1.0)[seed % 2],
            resampling=RESAMPLING_SCHEMES[seed // 2 % len(RESAMPLING_SCHEMES)],
        )
        for seed in range(40)
    ]  # fmt: skip
    for population in run_tables(llama, [Group(p, potential, PROMPT, {EOS}, engine=engine) for p in asked]):
        estimates.append(math.exp(population.log_z))
        weight = dict.fromkeys(paths, 0.0)
        for ids, w in zip(population.token_ids, population.weights, strict=True):
            if w > 0:
                weight[tuple(ids)] += w
        shares.append([estimates[-1] * weight[path] for _, path in heaviest])
    for found, want in zip(
        np.column_stack([estimates, shares]).T, [exact, *(math.exp(lp) for lp, _ in heaviest)], strict=True
    ):
        error = np.std(found, ddof=1) / math.sqrt(len(found))
        assert abs(np.mean(found) - want) < 4 * error, (np.mean(found), want, error)


# -- JSON Schema -------------------------------------------------------------------------------------------------------
SCHEMAS = [
    {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]},
    {"type": "object", "properties": {"id": {"type": "string", "format": "uuid"}}, "required": ["id"],
     "additionalProperties": False},
    {"enum": ["red", "green", 3, None, {"a": [True]}]},
    {"const": {"kind": "point", "at": [0, 0]}},
    {"type": "array", "items": {"type": "integer", "minimum": -5, "maximum": 12}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,5}$"},
    {"type": "string", "minLength": 2, "maxLength": 6},
    {"type": "string", "format": "date"},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7},
    {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "null"}, "maxItems": 2}]},
    {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
               {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}]},
    {"$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"anyOf": [
        {"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["v", "next"], "additionalProperties": False}},
     "$ref": "#/$defs/node"},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x_[a-z]$": {"type": "boolean"}}, "additionalProperties": False},
    {"type": ["string", "null"], "maxLength": 3},
    {"type": "object", "properties": {"lat": {"type": "number", "minimum": -90, "maximum": 90}, "tags": {
        "type": "array", "items": {"type": "string", "enum": ["a", "b"]}}}, "required": ["lat", "tags"],
     "additionalProperties": False},
    {"type": "object", "properties": {"order": {"type": "object", "properties": {"lines": {"type": "array", "minItems":
        1, "maxItems": 2, "items": {"type": "object", "properties": {"sku": {"type": "string", "pattern": "^[0-9]+$"},
        "n": {"type": "integer", "minimum": 1}}, "required": ["sku", "n"], "additionalProperties": False}}},
        "required": ["lines"], "additionalProperties": False}}, "required": ["order"], "additionalProperties": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def real_tokenizer():
    from transformers import AutoTokenizer

    from fastsmc.models import smollm2

    return AutoTokenizer.from_pretrained(smollm2())


class Scribbler:
    """A RowModel that likes what ends strings, arrays and objects, short digits, and is random otherwise."""

    def __init__(self, tokens, stop, seed):
        generator = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(1, len(tokens), generator=generator)
        for v, token in enumerate(tokens):
            if token in (b"}", b"]", b'"') or v == stop:
                self.logits[0, v] += 20 if token == b'"' else 12
            elif token and not token.strip():
                self.logits[0, v] -= 5
            elif token and len(token) == 1:
                self.logits[0, v] += 7

    def first(self):
        return self.logits, None

    def next(self, tokens, rows):
        return self.logits.expand(len(rows), -1).contiguous(), None

    def reindex(self, ancestors):
        pass


@pytest.mark.parametrize("whitespace", ["compact", "flexible"])
def test_every_completed_particle_validates(real_tokenizer, whitespace):
    tokens, stop = token_bytes(real_tokenizer), real_tokenizer.eos_token_id
    engine = GroupEngine(tokenizer=real_tokenizer, vocab_size=len(tokens))  # noqa: F811
    for seed, schema in enumerate(SCHEMAS):
        potential = JsonSchema(schema, whitespace)
        potential.setup(engine)
        params = SMCParams(n_particles=8, max_tokens=80, seed=seed, ess_threshold=0.5)
        group = Group(params, potential, [1], {stop}, engine=engine)
        population = run_group(group, Scribbler(tokens, stop, seed))
        done = [ids for ids, w in zip(population.token_ids, population.weights, strict=True) if w > 0]
        assert done, schema
        for ids in done:
            assert ids[-1] == stop or len(ids) == 80
            text = b"".join(tokens[v] for v in ids if v != stop).decode()
            jsonschema.validate(json.loads(text), schema)


def test_whitespace(real_tokenizer):
    """By default JSON is as `json.dumps` writes it with the shortest separators; else whitespace is allowed."""
    engine = GroupEngine(tokenizer=real_tokenizer, vocab_size=len(real_tokenizer))  # noqa: F811
    value = {"a": [1, 2], "b": "x y"}
    schema = {"properties": {"a": {"items": {"type": "integer"}}, "b": {"type": "string"}}, "required": ["a", "b"]}
    for whitespace, allowed in (("compact", [True, False, False]), ("flexible", [True, True, True])):
        potential = JsonSchema(schema, whitespace)
        potential.setup(engine)
        texts = json.dumps(value, separators=(",", ":")), json.dumps(value), json.dumps(value, indent=1)
        for text, want in zip(texts, allowed, strict=True):
            potential.reset(1, [])
            ids = real_tokenizer.encode(text, add_special_tokens=False)
            assert (potential.complete(make_state([ids], 200)).exp() == 1).item() is want, (whitespace, text)


# -- several groups, copies, what is freed -----------------------------------------------------------------------------
def test_states_are_shared_and_freed(engine):  # noqa: F811
    """Each distinct history is one state, in whatever group; none outlives the particles in it."""
    origin = Grammar("root ::= [ab]*")
    origin.setup(engine)
    matchers = origin._matchers
    groups = [own_copy(origin, engine) for _ in range(2)]
    assert all(group._matchers is matchers for group in groups)
    for group in groups:
        group.reset(8, [1])
    paths = [[1 + (i >> t) % 2 for t in range(3)] for i in range(8)]
    for t in range(4):
        for group in groups:
            group.logw_next(make_state(paths, 200, t))
    assert groups[0]._at.tolist() == groups[1]._at.tolist() and len(set(groups[0]._at.tolist())) == 8
    for t in range(4, 100):
        paths = [[*path, 1] for path in paths]
        for group in groups:
            group.prefix(make_state(paths, 200, t))
        assert len(matchers._states) <= 2 * 17 + 64 + 16
    del groups, group
    gc.collect()
    origin.reset(1, [1])
    matchers._limit = 0
    origin.prefix(make_state([[]], 5, 0))
    assert set(matchers._states) == {START}


def test_states_outlive_being_asked_together(engine):  # noqa: F811
    """Of two groups that were asked through the first's potential, each keeps its own states when they part."""
    origin = Grammar("root ::= [ab]*")
    origin.setup(engine)
    groups = [own_copy(origin, engine) for _ in range(2)]
    paths = [[1, 1], [1, 2], [2, 1], [2, 2]]
    for group in groups:
        group.reset(2, [1])
    join(groups)
    groups[0].logw_next(make_state(paths, 9, 1))
    groups[0].logw_next(make_state(paths, 9, 2))
    part(groups, [2, 2])
    origin._matchers._limit = 0
    for group, own in zip(groups, (paths[:2], paths[2:]), strict=True):
        masked = group.logw_next(make_state([[*path, 1] for path in own], 9, 3))
        assert masked.bits.shape == (2, 1) and bool((dense(masked)[:, 1] == 0).all())
        origin._matchers._limit = 0


def test_it_travels(engine):  # noqa: F811
    """By pickle as it was before `setup`; a copy, as a group's, goes on from where it is."""
    for potential in (Grammar(THREE_RULES), JsonSchema({"type": "integer"}, "flexible"), Choice(["a"])):
        potential.prepare(engine.tokenizer)
        before = pickle.loads(pickle.dumps(potential))
        potential.setup(engine)
        after = pickle.loads(pickle.dumps(potential))
        for other in (before, after, copy.deepcopy(potential)):
            other.setup(engine)
            paths = [[1, 0], [2, 0]]
            assert complete(other, paths, 3).tolist() == complete(potential, paths, 3).tolist()


# -- composition, impossible targets, refusals -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(segment="b", max_segment_tokens=2),
        dict(segment_token_ids=[1], proposal="base"),
    ],
    ids=str,
)
def test_a_product_joins_masks(engine, settings):  # noqa: F811
    """Also where particles wait for others at the ends of segments."""
    potential = Grammar("root ::= [ab]+") * Regex("a.*") * Lexicon(token_ids=[1], weight=0.5)
    potential.setup(engine)
    exact = 0.0
    for path in sequences_up_to(3, range(5)):
        text = text_of(path)
        if text is not None and re.fullmatch("a[ab]*", text):
            exact += 5 ** -len(path) * math.exp(0.5 * path.count(1))
    estimates = []
    for seed in range(40):
        params = SMCParams(n_particles=64, max_tokens=3, seed=seed, **settings)
        estimates.append(math.exp(run_group(Group(params, potential, [1], {EOS}, engine=engine), TableModel(5)).log_z))
    assert abs(np.mean(estimates) - exact) < 4 * np.std(estimates) / math.sqrt(40)


@pytest.mark.parametrize("proposal", ["twisted", "base"])
@pytest.mark.parametrize(
    "grammar", ['root ::= "x"', "root ::= []", 'root ::= "a" root', 'start: start "a"', 'root ::= "aaaaaaaa"']
)
def test_an_impossible_target_is_a_population_without_weight(engine, grammar, proposal):  # noqa: F811
    potential = Grammar(grammar)
    potential.prepare(engine.tokenizer)
    potential.setup(engine)
    params = SMCParams(n_particles=8, max_tokens=4, proposal=proposal)
    population = run_group(Group(params, potential, [1], {EOS}, engine=engine), TableModel(5))
    assert population.log_z == -math.inf and not population.weights.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar(3), "grammar=3: must be a string"),
        (lambda: Grammar(" \n"), "grammar=' \\n': is empty"),
        (lambda: Grammar("a" * (1 << 17 | 1)), "grammar: has 131073 characters; must have at most 131072"),
        (lambda: Grammar('root ::= "a" b'), "line 1: there is no rule 'b'"),
        (lambda: Grammar('root ::= "a"\nroot ::= "b"'), "line 2: there are two rules 'root'"),
        (lambda: Grammar('a ::= "a"'), "has no rule 'root'"),
        (lambda: Grammar('"a" root ::= "a"'), "stands before the first rule"),
        (lambda: Grammar('root ::= "a'), "line 1: '\"a' is no part of a rule"),
        (lambda: Grammar('root ::= "\\q"'), "there is no escape \\q"),
        (lambda: Grammar('root ::= "\\uD800"'), "\\D800 is no character"),
        (lambda: Grammar("root ::= [b-a]"), "the range b-a ends before it begins"),
        (lambda: Grammar('root ::= ("a"'), "Grammar: grammar='root ::= (\"a\"'"),
        (lambda: Grammar("start: foo"), "unknown name: \"foo\""),
        (lambda: Grammar("start: /(?=a)/"), "look-around"),
        (lambda: Grammar("foo: /a/"), "no start rule"),
        (lambda: JsonSchema([]), "schema=[]: must be a JSON Schema, an object"),
        (lambda: JsonSchema("{"), "schema='{': is no JSON"),
        (lambda: JsonSchema({}, whitespace="none"), "whitespace='none': must be one of 'compact', 'flexible'"),
        (lambda: JsonSchema({"const": math.nan}), "schema: cannot be written as JSON"),
        (lambda: JsonSchema({"type": "foo"}), "Invalid type: foo"),
        (lambda: JsonSchema({"$ref": "#/x"}), "Pointer '/x' does not exist"),
        (lambda: JsonSchema({"x-guidance": {"lenient": True}}), "x-guidance: options of the library are not taken"),
        (lambda: JsonSchema({"type": "integer", "minimum": 3, "maximum": 2}), "Unsatisfiable schema"),
        (lambda: JsonSchema({"properties": {"a": {"items": {"not": {}}}}}),
         "at $.properties.a.items: Unimplemented keys: [\"not\"]"),
        (lambda: JsonSchema({"anyOf": [{"type": "null"}, {"uniqueItems": True}]}), "at $.anyOf[1]: Unimplemented keys"),
        (lambda: Grammar('root ::= "a"{1,' + " " * 10**5 + "x"), "is no part of a rule"),  # in linear time
        (lambda: Choice(["a"] * (1 << 16 | 1)), "choices: have 131074 characters"),
        (lambda: Choice([]), "choices=[]: must be a list of at least one text"),
        (lambda: Choice("ab"), "choices='ab': must be a list"),
        (lambda: Choice(["a", 1]), "choices=['a', 1]: must be a list of texts"),
    ],
)  # fmt: skip
def test_refusals(tokenizer, make, message):  # noqa: F811
    with pytest.raises(ValueError, match=re.escape(message)):
        make().prepare(tokenizer)


def test_what_would_hold_up_the_worker_is_refused(tokenizer, monkeypatch):  # noqa: F811
    monkeypatch.setattr("fastsmc.potentials.matchers.MAX_SECONDS", 0.0)
    with pytest.raises(ValueError, match=r"grammar='start: /a/': takes 0\.0 s of processor time to compile"):
        Grammar("start: /a/").prepare(tokenizer)


def test_what_is_nested_too_deeply_ends_its_own_process():
    """llguidance descends by recursion, to the end of the stack: only `prepare` may meet it first."""
    rules = "".join(f"r{i}: r{i + 1}\n" for i in range(5000))
    code = f"from test_grammar import *\nGrammar({'start: r0' + chr(10) + rules + 'r5000: /a/'!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=os.environ, timeout=300)
    assert done.returncode == 0  # the front end of a server does no more


def test_it_needs_a_tokenizer():
    for potential in (Grammar('root ::= "a"'), JsonSchema({}), Choice(["a"])):
        with pytest.raises(ValueError, match="no tokenizer"):
            potential.prepare(None)
        with pytest.raises(ValueError, match="no tokenizer"):
            potential.setup(GroupEngine(vocab_size=V))


def test_a_limit_of_the_library_ends_the_group_with_its_reason(engine):  # noqa: F811
    """An ambiguous grammar, whose parses become too many."""
    grammar = Grammar("start: " + " | ".join(f'x{i} "b"' for i in range(3000)) + "\n" + "\n".join(
        f'x{i}: "a" x{i} | "a"' for i in range(3000)
    ))  # fmt: skip
    grammar.setup(engine)
    with pytest.raises(RuntimeError, match="llguidance: "):
        grammar.logw_next(make_state([[1]], 5, 1))


def test_ebnf_in_lark():
    text = 'root ::= "yes" | n ("," n){1,2} # c\nn ::=\n [0-9^]+ | [^a\\]é-] .? | ""'
    assert to_lark(text).splitlines() == [
        r"start: (/\x{79}/ /\x{65}/ /\x{73}/) | rule_1 ( (/\x{2C}/) rule_1 ) {1,2}",
        r'rule_1: /[\x{30}-\x{39}\x{5E}]/ + | /[^\x{61}\x{5D}\x{E9}\x{2D}]/ /(?s:.)/ ? | ("")',
    ]
