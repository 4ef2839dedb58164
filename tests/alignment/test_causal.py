"""Causal models against values by hand; balance of pairs; and what is refused, by name."""

from collections import Counter

import numpy as np
import pytest
import torch

from fastsmc.alignment import CausalModel, answer_ids, pairs

WORDS = {True: 7, False: 8}


def price_tag(**more):
    functions = {
        "left": lambda x, lo: x >= lo,
        "right": lambda x, hi: x <= hi,
        "out": lambda left, right: left and right,
    }
    return CausalModel(["lo", "hi", "x", "left", "right", "out"], functions, **more)


def sample(rng):
    lo, hi = sorted(rng.integers(0, 10, 2).tolist())
    return {"lo": lo, "hi": hi, "x": int(rng.integers(0, 10))}


BASE, SOURCE = {"lo": 3, "hi": 6, "x": 2}, {"lo": 1, "hi": 2, "x": 5}  # too low, too high


def test_run_and_interchange():
    model = price_tag()
    assert model.inputs == ("lo", "hi", "x") and model.parents["out"] == ("left", "right")
    assert model.run(BASE) == {**BASE, "left": False, "right": True, "out": False}
    assert model.interchange(BASE, SOURCE, "left") == {**BASE, "left": True, "right": True, "out": True}
    assert not model.interchange(BASE, SOURCE, ["left", "right"])["out"]
    assert model.interchange(BASE, SOURCE, "x") == {**BASE, "x": 5, "left": True, "right": True, "out": True}
    assert model.interchange(BASE, BASE, "left") == model.run(BASE)


@pytest.mark.parametrize("n", [2, 101, 400])
def test_pairs_are_balanced(n):
    model = price_tag(prompt=lambda inputs: [inputs["lo"], inputs["hi"], inputs["x"]], answers=WORDS)
    drawn = pairs(model, sample, "left", n, seed=3)
    assert len(drawn) == n and sorted(drawn.choices) == [7, 8] and drawn.variable == ("left",)
    counts = Counter(drawn.labels)
    assert max(counts.values()) - min(counts.values()) <= 1 and len(counts) == 2
    cells = Counter((y, y != y0) for y, y0 in zip(drawn.labels, drawn.base_labels, strict=True))
    assert n == 2 or max(cells.values()) - min(cells.values()) <= 2
    assert abs(drawn.changed - 0.5) <= 1 / n
    for i in range(n):
        base, source = drawn.base_inputs[i], drawn.source_inputs[i]
        assert drawn.labels[i] == WORDS[model.interchange(base, source, "left")["out"]]
        assert drawn.base_labels[i] == WORDS[model.run(base)["out"]]
        assert drawn.source_labels[i] == WORDS[model.run(source)["out"]]
        assert drawn.bases[i] == list(base.values()) and drawn.sources[i] == list(source.values())


def test_pairs_hang_on_the_seed_alone():
    model = price_tag()
    assert pairs(model, sample, "left", 50, seed=1) == pairs(model, sample, "left", 50, seed=1)
    assert pairs(model, sample, "left", 50, seed=1) != pairs(model, sample, "left", 50, seed=2)


@pytest.mark.parametrize("scalar", [np.bool_, np.int64, torch.tensor])
def test_outputs_of_numpy_and_torch_are_pythons(scalar):
    def model(z, kind):
        return CausalModel(["a", "b", "z", "out"], {"z": z, "out": lambda z, b: kind((z + b) % 2 == 1)})

    plain, other = model(lambda a: a % 2, int), model(lambda a: a[0] % 2, scalar)
    want = pairs(plain, lambda rng: {"a": int(rng.integers(5)), "b": int(rng.integers(5))}, "z", 21)

    def again(rng, inputs={"a": [0], "b": 0}):  # noqa: B006  the same object each time
        inputs["a"][0], inputs["b"] = int(rng.integers(5)), int(rng.integers(5))
        return inputs

    found = pairs(other, again, "z", 21)
    assert found.labels == want.labels and type(found.labels[0]) in (int, bool)
    assert [{**x, "a": [x["a"]]} for x in want.bases] == found.bases
    for answers in ({0: 5, 1: 6}, [5, 6].__getitem__):
        other.answers = answers
        assert pairs(other, again, "z", 21).labels == [5 + label for label in want.labels]


def test_halves_where_only_one_is_possible():
    """The label that only changed pairs have is all changed, those that only kept pairs have are all kept."""
    model = CausalModel(["a", "b", "out"], {"out": lambda a, b: "twin" if a == b else a})
    drawn = pairs(model, lambda rng: {"a": (a := int(rng.integers(0, 2))), "b": 1 - a}, "b", 90)
    cells = Counter((y, y != y0) for y, y0 in zip(drawn.labels, drawn.base_labels, strict=True))
    assert cells["twin", True] == 30 and cells["twin", False] == 0
    assert Counter(drawn.labels) == {"twin": 30, 0: 30, 1: 30}


def test_refusals_of_models():
    with pytest.raises(ValueError, match="functions\\['out'\\]: parameter 'z' must be a variable before it"):
        CausalModel(["a", "out"], {"out": lambda z: z})
    with pytest.raises(ValueError, match="parameter 'out' must be a variable before it"):
        CausalModel(["a", "out"], {"out": lambda out: out})
    with pytest.raises(ValueError, match="parameter \\*a must be"):
        CausalModel(["a", "out"], {"out": lambda *a: a})
    with pytest.raises(ValueError, match="'out', is the output"):
        CausalModel(["a", "out"], {})
    with pytest.raises(ValueError, match="functions\\['b'\\]: is none of"):
        CausalModel(["a", "out"], {"b": abs, "out": lambda a: a})
    with pytest.raises(ValueError, match="variables=.*each once"):
        CausalModel(["a", "a"], {"a": abs})
    for function in (3, max):
        with pytest.raises(ValueError, match="functions\\['out'\\]: must be a callable with named parameters"):
            CausalModel(["a", "out"], {"out": function})
    for output in ([1], np.arange(2), torch.arange(2), float("nan")):
        with pytest.raises(ValueError, match="out=.*an output must be hashable and no NaN"):
            price_tag().answer(output)
    with pytest.raises(ValueError, match="inputs=.*keys \\['lo', 'hi', 'x'\\]"):
        price_tag().run({"lo": 1, "hi": 2})
    with pytest.raises(ValueError, match="variable='centre': must be one of"):
        price_tag().interchange(BASE, SOURCE, "centre")
    with pytest.raises(ValueError, match="answers: has none for the output False"):
        price_tag(answers={True: 7}).answer(False)
    with pytest.raises(ValueError, match="answers: .*must be a token id or a text"):
        price_tag(answers=float).answer(True)


def test_refusals_of_pairs():
    constant = CausalModel(["a", "b", "out"], {"out": lambda a, b: a})
    with pytest.raises(ValueError, match="IIA would be meaningless"):
        pairs(constant, lambda rng: {"a": int(rng.integers(0, 2)), "b": 0}, "b", 10)
    equal = CausalModel(["a", "b", "out"], {"out": lambda a, b: a == b})
    with pytest.raises(ValueError, match="cannot be balanced, since every interchange gives False"):
        pairs(equal, lambda rng: {"a": (a := int(rng.integers(0, 1 << 40))), "b": a + int(rng.integers(0, 2))}, "b", 10)
    rare = CausalModel(["a", "out"], {"out": lambda a: a > 0})
    with pytest.raises(
        ValueError, match="label True: cannot be balanced, since of .* pairs .* have it, and 100 are wanted"
    ):
        pairs(rare, lambda rng: {"a": int(rng.integers(0, 500)) - 498}, "a", 200)
    with pytest.raises(ValueError, match=r"sampler: gives \[1, 2\]; must give a dict with keys \['a', 'b'\]"):
        pairs(equal, lambda rng: [1, 2], "b", 10)
    with pytest.raises(ValueError, match="n=1: must be an integer of at least 2"):
        pairs(equal, sample, "b", 1)


def test_answers_as_token_ids():
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(c) for c in text]

    assert answer_ids(["a", "b", 5, "a"], Tokenizer(), 128) == [97, 98, 5, 97]
    with pytest.raises(ValueError, match="label='ab': is 2 tokens"):
        answer_ids(["ab"], Tokenizer(), 128)
    with pytest.raises(ValueError, match="label=128: must be an integer from 0 to 127"):
        answer_ids([128], None, 128)
    with pytest.raises(ValueError, match="label='a': there is no tokenizer"):
        answer_ids(["a"], None, 128)
