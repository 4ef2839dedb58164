"""Interventions: what they refuse, that they come back from a file, and that a model under them is one with hooks."""

import dataclasses
import itertools
import json
import math

import numpy as np
import pytest
import torch
from intervened import EACH, LISTS, SIZES, VOCAB, H, change, hooked_log_probs, noise, orthonormal
from tiny import PROMPT, make_llama
from transformers import AutoModelForCausalLM

from fastsmc import SMCError, SMCParams, interventions
from fastsmc.hf import HFEngine
from fastsmc.interventions import (
    Affine,
    Facts,
    Project,
    Prompt,
    RankOne,
    Steer,
    Temperature,
    read_interventions,
)
from fastsmc.maps import Maps, compose, first_reached, lay_out
from fastsmc.trunk import Trunk

PARAMS = SMCParams(n_particles=8, max_tokens=12, seed=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.fixture(scope="module")
def hf(path):
    return HFEngine(path)


# ------------------------------------------------------------------------------------------------------------ in words
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steer(-1, noise(H)), "layer=-1: must be an integer of at least 0"),
        (lambda: Steer(0, [1.0, math.nan]), r"vector\[1\]=nan: must be finite"),
        (lambda: Steer(0, [1.0, -math.inf]), r"vector\[1\]=-inf: must be finite"),
        (lambda: Steer(0, noise(2, 2)), r"vector: has the shape \(2, 2\), must be a vector"),
        (lambda: Steer(0, []), r"vector: has the shape \(0,\), must be a vector"),
        (lambda: Steer(0, "north"), "vector='north': must be numbers"),
        (lambda: Steer(0, noise(H), math.inf), "scale=inf: must be a number in"),
        (lambda: Steer(0, [1e30, 1.0], 1e30), "scale=1e\\+30: times the vector is not finite in float32"),
        (lambda: Steer(0, noise(H), at="decode"), "at='decode': must be one of 'all', 'prompt', 'generated'"),
        (lambda: Steer(0, noise(H), at=[]), r"at=\[\]: must be one of"),
        (lambda: Steer(0, noise(H), at=[1, -2]), r"at\[1\]=-2: is not a token id"),
        (lambda: Affine(0, noise(3, 4), noise(4)), r"A: is \(3, 4\), must be \(4, 4\)"),
        (lambda: Affine(0, noise(3, 3).fill_(math.inf), noise(3)), r"A\[0, 0\]=inf: must be finite"),
        (
            lambda: Project(0, 2 * orthonormal(2)),
            "basis: its rows are not orthonormal, their products are off the identity by up to 3",
        ),
        (lambda: Project(0, torch.ones(2, 1) / 2**0.5), "basis: its rows are not orthonormal"),
        (lambda: Project(0, orthonormal(2), [1.0]), "value: has 1 elements, must have 2"),
        (lambda: RankOne(0, noise(3), noise(2), site="up_proj"), "site='up_proj': must be one of 'down_proj'"),
        (lambda: Prompt([]), r"token_ids=\[\]: a prompt needs at least one token"),
        (lambda: Temperature(0.0), "t=0.0: must be a number in"),
        (lambda: Affine.mimic(noise(1, 3), noise(5, 3), 0), r"x0, x1: are \(1, 3\) and \(5, 3\)"),
        (lambda: Facts(noise(2, 5), [1], [1]), "token_ids: 1 tokens for 2 rows of logits"),
        (lambda: Facts(noise(1, 5), [5], [1]), r"token_ids\[0\]=5: is beyond the vocabulary"),
        (lambda: Facts(noise(1, 5), [], [1]), r"token_ids=\[\]: must hold at least one token"),
        (lambda: Facts([[0.0, -math.inf]], [1], [1]), r"token_ids\[0\]=1: is impossible there under p0="),
        (lambda: Facts([[0.0, -1.0]], [1], [1], {"top_k": 1}), r"token_ids\[0\]=1: is impossible there under p0="),
        (lambda: Facts([[0.0, math.nan]], [0], [1]), r"logits\[0, 1\]=nan: must be finite"),
        (
            lambda: Facts([[0.0, 1.0]], [0], [1], {"heat": 1}),
            "p0={'heat': 1}: must hold settings that SMCParams.p0 gives",
        ),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_refuses_what_does_not_fit_the_model(hf):
    for given, message in (
        (Steer(2, noise(H)), r"layer=2: must be in \[0, 2\), the layers of this model"),
        (Steer(0, noise(H + 1)), "Steer: is for hidden states of 65 elements, this model has 64"),
        (RankOne(0, noise(H), noise(H)), "v: has 64 elements, the down_proj of this model reads 128"),
        (Prompt([1, VOCAB]), r"token_ids\[1\]=8: is beyond the vocabulary"),
        (Facts(noise(1, 5), [1], [1]), "facts: are of a vocabulary of 5 tokens, this model's is 8"),
        (Facts(noise(1, VOCAB), [1], [1]), "intervention: Facts are a text to ask about, and change no draw"),
        ([Temperature(1.0), Temperature(2.0)], "intervention: has more than one Temperature"),
        ("north", "intervention='north': must be one of Steer, Affine"),
        ([[EACH["steer"], "north"]], r"intervention\[0\]='north': must be one of Steer, Affine"),
        ([None, EACH["steer"]], "intervention: 2 interventions for 1 prompts"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.smc(PROMPT, PARAMS, intervention=given)
    with pytest.raises(ValueError, match="RankOne: the layers of this model have no mlp.down_proj"):
        read_interventions(EACH["rank one"], 1, SIZES._replace(inner=None))
    facts = Facts(noise(1, VOCAB), [1], [1], tokenizer="a" * 64)
    facts.check_tokenizer(None)
    with pytest.raises(ValueError, match="facts: are of another tokenizer, aaaaaaaaaaaa…; this model's is bbbb…"):
        facts.check_tokenizer("bbbb")


def test_forms_of_the_argument():
    one, two = EACH["steer"], EACH["affine"]
    for given, n, expected in (
        (None, 2, [(), ()]),
        (one, 2, [(one,), (one,)]),
        ([one, two], 2, [(one, two), (one, two)]),
        ([[one], [two]], 2, [(one,), (two,)]),
        ([one, None, [two, one]], 3, [(one,), (), (two, one)]),
        ([], 1, [()]),
    ):
        assert read_interventions(given, n, SIZES) == expected


def test_kept_and_sent(tmp_path):
    facts = Facts(noise(2, VOCAB), [1, 2], PROMPT, {"top_k": 7, "logit_bias": {"3": 1.5}}, "abc")
    parts = [*EACH.values(), EACH["steer"], Prompt([1, 2]), Temperature(0.7), facts]
    interventions.save(parts, tmp_path / "parts")
    back = interventions.load(tmp_path / "parts")
    assert back == parts and back[3].at == (2, 7, 9) and back[0].vector is not parts[0].vector
    assert [hash(one) for one in back] == [hash(one) for one in parts]
    assert parts[0] != parts[1] and parts[0] != Steer(0, noise(H), 2.5)
    assert interventions.from_bytes(interventions.to_bytes([])) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        parts[0].scale = 1.0
    data = interventions.to_bytes(parts[:1])
    for broken, message in (
        (data[:50], "broken: holds no interventions"),
        (data.replace(b"Steer", b"Stear"), "broken: holds no interventions .KeyError: 'Stear'"),
        (data.replace(b'\\"scale\\": 2.0', b'\\"scale\\": 1e9'), "nothing"),
        (data.replace(b'\\"layer\\": 0', b'\\"layer\\":-1'), "broken: layer=-1: must be an integer of at least 0"),
        (data.replace(b"fastsmc interventions", b"fastsmc interventionz"), "broken: its format is"),
    ):
        assert broken != data
        if message != "nothing":
            with pytest.raises(ValueError, match=message):
                interventions.from_bytes(broken, "broken")
    (tmp_path / "text").write_text(json.dumps({"list": []}))
    with pytest.raises(ValueError, match="text: holds no interventions"):
        interventions.load(tmp_path / "text")


def test_values_are_copies():
    vector = noise(H)
    steer = Steer(0, vector)
    vector.zero_()
    assert steer.vector.abs().sum() > 0
    assert Steer(0, np.ones(3)).vector.dtype == torch.float32
    assert Project(0, orthonormal(1)[0]).basis.shape == (1, H)


# ---------------------------------------------------------------------------------------------------------------- maps
def test_composed_maps_do_one_after_the_other():
    x = noise(5, H, seed=9).double()

    def run(step, x):
        return x + (x @ step.down.T) @ step.up + step.shift

    steps = [EACH[name].step() for name in ("affine", "project", "steer", "project to")]
    for first, second in itertools.permutations(steps, 2):
        torch.testing.assert_close(run(compose(first, second), x), run(second, run(first, x)))
    assert len(EACH["project"].step().down) == 5
    low = torch.eye(H) + torch.outer(noise(H), noise(H, seed=1))
    assert len(Affine(0, low, noise(H)).step().down) == 1  # no more factors than A − I has rank
    assert len(Affine(0, torch.eye(H), noise(H)).step().down) == 0


@pytest.mark.parametrize(("rank", "n_factors"), [(0, 0), (3, 3), (64, 64), (65, 100), (100, 100)])
def test_an_affine_map_of_any_rank(rank, n_factors):
    """Up to 64 factors, or as many as there are elements; the map is the same."""
    left, right = noise(100, rank, scale=0.1), noise(rank, 100, seed=1)
    affine = Affine(0, torch.eye(100) + left @ right, noise(100, seed=2))
    step, x = affine.step(), noise(7, 100, seed=3).double()
    assert len(step.down) == len(step.up) == n_factors
    mapped = x + (x @ step.down.T) @ step.up + step.shift
    torch.testing.assert_close(mapped, x @ affine.A.double().T + affine.b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prompt_len", [1, 2, 5, 8, 20])
def test_variants_of_positions(prompt_len):
    parts = LISTS["all"]
    maps = Maps(parts)
    of = maps.of_positions(prompt_len, 16)
    for p, variant in enumerate(of):
        expected = {i for i, one in enumerate(parts) if one.reaches(p, prompt_len)}
        assert set(maps._sets[variant]) == expected
    assert first_reached(parts) == 0
    assert first_reached([EACH["steer generated"]]) == -1
    assert first_reached([EACH["steer generated"], EACH["steer positions"]]) == 2
    lone = Maps([EACH["steer positions"]])
    assert lone.of_positions(prompt_len, 11) == [0 if p in (2, 7, 9) else -1 for p in range(11)]


def test_several_lists_side_by_side():
    """Variants of one list have nothing at the sites of another; numbers that nobody has, too."""
    variants = {0: Maps([EACH["affine"]]).variants[0], 3: Maps([EACH["rank one"], EACH["project"]]).variants[0]}
    sites = lay_out(variants, 5, torch.device("cpu"))
    assert set(sites) == {(0, "block"), (0, "down_proj")}
    x = noise(5, H, seed=11)
    y = x.clone()
    sites[0, "block"].apply(y, torch.tensor([0, 1, 2, 3, -1]))
    torch.testing.assert_close(y[0], change(EACH["affine"], x[:1], [0], 1)[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[3], change(EACH["project"], x[3:4], [0], 1)[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(y[[1, 2, 4]], x[[1, 2, 4]])


# ------------------------------------------------------------------------------------------------- over Hugging Face
@pytest.mark.parametrize("name", LISTS)
def test_a_group_is_one_of_the_model_with_hooks(hf, path, name):
    population = hf.smc(PROMPT, PARAMS, intervention=LISTS[name])
    plain = hf.smc(PROMPT, PARAMS)
    wanted = hooked_log_probs(path, PROMPT, population.token_ids, LISTS[name])
    without = hooked_log_probs(path, PROMPT, population.token_ids, [])
    for i, want in enumerate(wanted):
        assert np.abs(population.token_log_probs[i] - want).max() <= 2e-4
    assert max(np.abs(a - b).max() for a, b in zip(wanted, without, strict=True)) > 0.05  # it does something
    again = hf.smc(PROMPT, PARAMS)
    assert plain.token_ids == again.token_ids and np.array_equal(plain.log_probs, again.log_probs)  # no hook is left


def test_prompt_temperature_and_several_prompts(hf, path):
    steer, other = EACH["steer"], [4, 4, 1]
    each = [[Prompt(other), Temperature(0.5)], None, steer]
    populations = hf.smc([PROMPT] * 3, PARAMS, intervention=each)
    assert populations[0].prompt_token_ids == other and populations[0].params.temperature == 0.5
    for population, prompt, parts, t in zip(
        populations, [other, PROMPT, PROMPT], [[], [], [steer]], [0.5, 1, 1], strict=True
    ):
        wanted = hooked_log_probs(path, prompt, population.token_ids, parts, t)
        assert max(np.abs(a - b).max() for a, b in zip(population.token_log_probs, wanted, strict=True)) <= 2e-4
    still = hf.smc(PROMPT, PARAMS, intervention=Steer(0, noise(H), 0.0))
    plain = hf.smc(PROMPT, PARAMS)
    assert still.token_ids == plain.token_ids and np.array_equal(still.log_probs, plain.log_probs)


def test_nan_names_the_layer(hf):
    far = torch.full((H,), 3e38)
    with pytest.raises(SMCError, match=r"hold NaN or \+inf; under its intervention layer 1 \(block\) put out NaN"):
        hf.smc(PROMPT, PARAMS, intervention=[Steer(0, far), Steer(1, far)])


# ------------------------------------------------------------------------------------------------------------ helpers
def test_mimic_carries_mean_and_covariance():
    x0 = noise(4000, 6) @ noise(6, 6, seed=1) + noise(6, seed=2)
    x1 = noise(3000, 6, seed=3) @ noise(6, 6, seed=4) - 3.0
    map_ = Affine.mimic(x0, x1, 0, shrink=0.0)
    y = x0 @ map_.A.T + map_.b
    torch.testing.assert_close(y.mean(0), x1.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cov(y.T), torch.cov(x1.T), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(map_.A, map_.A.T, rtol=1e-4, atol=1e-4)  # of transports the one that moves least
    assert (torch.linalg.eigvalsh(map_.A) > 0).all()
    few = Affine.mimic(noise(5, H), noise(7, H, seed=1) + 2.0, 1)  # singular covariances
    assert few.A.isfinite().all() and few.width == H


def test_contrast_is_a_difference_of_means(hf, path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    texts = [[1, 2, 3], [4, 5], [6, 6, 6, 1]]
    with torch.inference_mode():
        ends = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0, -1] for ids in texts]
    steer = Steer.from_contrast(hf, texts[:2], texts[2:], 0)
    torch.testing.assert_close(steer.vector, (ends[0] + ends[1]) / 2 - ends[2], rtol=1e-4, atol=1e-4)
    for positive, layer, message in (
        ([], 0, r"positive=\[\]: must be a list"),
        ([[1]], 2, "layer=2: must be an integer from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            Steer.from_contrast(hf, positive, [[1]], layer)


class Letters:
    """A tokenizer of single letters, as far as `RankOne.edit` uses one."""

    eos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return ["abcdefgh".index(letter) for letter in text]


def test_edit_writes_a_fact(path):
    engine = HFEngine(Trunk.load(path), Letters(), stop_token_ids=[])
    texts = [torch.randint(VOCAB, (200,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(5)]
    prompt, target = "bdcfe", "h"
    edit = RankOne.edit(engine, prompt, "dc", target, 0, texts)

    def probability(parts):
        return math.exp(hooked_log_probs(path, engine.encode(prompt), [[7]], parts)[0][0])

    assert probability([]) < 0.3 and probability([edit]) > 0.6
    # closed form: at the subject's last token the edit adds what was searched for, elsewhere what keys have in common
    read = engine.trunk.watch(engine.encode(prompt), 0)[1]
    assert abs(float(edit.v @ read[2])) > 5 * abs(float(edit.v @ read[3]))
    for subject, message in (("ga", "subject='ga': must be a part of the text prompt='bdcfe'"), ("", "subject=''")):
        with pytest.raises(ValueError, match=message):
            RankOne.edit(engine, prompt, subject, target, 0, texts)
