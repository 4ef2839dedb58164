"""Interchange interventions over Hugging Face: what a model with hooks says, from one run of each base and source."""

import math

import numpy as np
import pytest
import torch
from intervened import VOCAB, H, hooked_log_probs, noise, orthonormal, swapped
from tiny import PROMPT, WINDOW, make_llama, make_windowed
from transformers import AutoModelForCausalLM

from fastsmc import SMCParams
from fastsmc.hf import HFEngine
from fastsmc.interchange import Asked
from fastsmc.interventions import BLOCK, Interchange, Steer, Subspace, load, save
from fastsmc.maps import lay_out
from fastsmc.trunk import Trunk

BASIS = orthonormal(7).T
ROWS = [[1, 3, 2, 5, 4, 6], [2, 2, 7, 0, 1, 3], [5, 4, 3, 2, 1, 0]]
SOURCES = [[3, 1, 4, 1, 5, 2], [6, 5, 3, 5, 0, 7], [0, 1, 2, 3, 4, 5]]
CONFIGS = [
    kind(layer, position, *basis, source_position=source)
    for layer in (0, 1)
    for position, source in ((-1, None), (2, None), (0, 4), (3, -1))
    for kind, basis in ((Interchange, ()), (Subspace, (BASIS,)))
]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.fixture(scope="module")
def model(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def hf(path):
    return HFEngine(path)


def test_logits_are_those_with_hooks(hf, model, path):
    want = swapped(path, ROWS, SOURCES, CONFIGS)
    torch.testing.assert_close(hf.interchange(ROWS, SOURCES, CONFIGS, logits=True), want, rtol=0, atol=2e-5)
    plain = model(torch.tensor(ROWS)).logits[:, -1]
    does = (want - plain).abs().amax((1, 2)) > 0.01  # at the last layer only at the last position
    assert does.tolist() == [True] * 10 + [False] * 6
    assert torch.equal(hf.interchange(ROWS, SOURCES, CONFIGS), want.argmax(-1))
    scores = want.log_softmax(-1)
    found = hf.interchange(ROWS, SOURCES, CONFIGS, labels=[1, 0, 7])
    torch.testing.assert_close(found, scores[:, torch.arange(3), torch.tensor([1, 0, 7])], rtol=0, atol=2e-5)
    labels = torch.tensor([[1, 2], [0, 0], [7, 3]])
    found = hf.interchange(ROWS, SOURCES, CONFIGS, labels=labels)
    torch.testing.assert_close(found, scores.gather(2, labels.expand(len(CONFIGS), -1, -1)), rtol=0, atol=2e-5)


def test_maps_are_laid_out_once_per_layer():
    """So that a sweep over L layers does not take L times as much."""
    configs = (*(Interchange(layer, 0) for layer in (1, 0, 1)), *(Subspace(1, at, BASIS) for at in (0, 1)))
    asked = Asked([[1, 2]], [[1, 2]], configs, [[0]] * 5, [[0]] * 5, None, False)
    assert asked.numbers == [0, 0, 0, 1, 2]
    maps = asked.maps(H, torch.device("cpu"))
    assert {site: len(one.shift) for site, one in maps.items()} == {(1, BLOCK): 3, (0, BLOCK): 1}


def test_nothing_changes_and_everything_does(hf, model):
    same = hf.interchange(ROWS, ROWS, [c for c in CONFIGS if c.source_position is None], logits=True)
    torch.testing.assert_close(same, model(torch.tensor(ROWS)).logits[:, -1].expand_as(same), rtol=0, atol=1e-5)
    last = hf.interchange(ROWS, SOURCES, Interchange(1, -1), logits=True)[0]
    torch.testing.assert_close(last, model(torch.tensor(SOURCES)).logits[:, -1], rtol=0, atol=1e-4)


def test_positions_of_each_pair_and_bases_of_different_lengths(hf, path):
    bases, sources = [PROMPT, ROWS[0], [4, 4]], [ROWS[1], PROMPT, [1]]
    configs = [Interchange(0, [3, 1, 0], [5, -1, 0]), Subspace(1, torch.tensor([4, -2, 1]), BASIS, (0, 1, -1))]
    want = swapped(path, bases, sources, configs)
    torch.testing.assert_close(hf.interchange(bases, sources, configs, logits=True), want, rtol=0, atol=2e-5)


def test_behind_a_window(tmp_path):
    path = make_windowed(tmp_path, VOCAB, "mistral")
    rows = torch.randint(VOCAB, (2, 2 * WINDOW), generator=torch.Generator().manual_seed(0)).tolist()
    configs = [Interchange(0, position) for position in (0, WINDOW, 2 * WINDOW - 3)]
    found = HFEngine(path).interchange(rows, rows[::-1], configs, logits=True)
    torch.testing.assert_close(found, swapped(path, rows, rows[::-1], configs), rtol=0, atol=5e-5)


def test_activations_are_what_layers_put_out(hf, model):
    states = model(torch.tensor(ROWS), output_hidden_states=True).hidden_states[1]
    seen = []
    handle = model.model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(torch.tensor(ROWS))
    handle.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    found = hf.activations(ROWS, [1, 0], [-1, 2, [0, 5, -6]])
    assert found.shape == (3, 2, 3, H) and found.dtype == torch.float32
    for b, third in enumerate((0, 5, 0)):
        torch.testing.assert_close(found[b, 0], last[b, [5, 2, third]], rtol=0, atol=1e-5)
        torch.testing.assert_close(found[b, 1], states[b, [5, 2, third]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(bases=[]), "sources: 0 bases and 3 sources"),
        (dict(sources=SOURCES[:2]), "sources: 3 bases and 2 sources; must be as many"),
        (dict(bases=[*ROWS[:2], [1, VOCAB]]), r"bases\[2\]\[1\]=8: is beyond the vocabulary"),
        (dict(configs=[]), r"configs=\[\]: must hold at least one"),
        (dict(configs=[Steer(0, noise(H))]), r"configs\[0\]=.*: must be an Interchange or a Subspace"),
        (dict(configs=[Interchange(0, 0, value=noise(H))]), r"configs\[0\]: has a value"),
        (
            dict(configs=[Interchange(0, 0), Interchange(2, 0)]),
            r"configs\[1\]: layer=2: must be in \[0, 2\), the layers",
        ),
        (dict(configs=[Interchange(0, 6)]), r"configs\[0\].position=6: must be in \[-6, 6\), as base 0 has 6 tokens"),
        (dict(configs=[Interchange(0, -7)]), r"configs\[0\].position=-7: must be in \[-6, 6\)"),
        (dict(configs=[Interchange(0, 0, 6)]), r"configs\[0\].source_position=6: must be in \[-6, 6\), as source 0"),
        (dict(configs=[Interchange(0, [0, 1])]), r"configs\[0\].position: 2 positions for 3 prompts"),
        (
            dict(bases=[*ROWS[:2], [1, 2]]),
            r"configs\[0\].position=2: bases have 2 to 6 tokens; give a position for each",
        ),
        (
            dict(sources=[*ROWS[:2], [1, 2]]),
            r"configs\[0\].position=2: sources have 2 to 6 tokens; give a position for each",
        ),
        (dict(configs=[Subspace(0, 0, torch.eye(H + 1, 2))]), "Subspace: is for hidden states of 65 elements"),
        (dict(labels=[1, 2]), "labels: 2 labels for 3 pairs"),
        (dict(labels=[1, 2, VOCAB]), r"labels\[2\]=8: is beyond the vocabulary"),
        (dict(labels=[1, 2, 1.5]), r"labels\[2\]=1.5: is not a token id"),
        (dict(labels=[[1], [2], [-1]]), r"labels\[2\]\[0\]=-1: "),
        (dict(labels=[[1], [2], [1, 2]]), "labels: the lists must have the same length"),
        (dict(labels=[1, 2, 3], logits=True), "labels: with logits=True all are returned"),
        (dict(logits="all"), "logits='all': must be True or False"),
    ],
)
def test_refusals(hf, change, message):
    asked = {"bases": ROWS, "sources": SOURCES, "configs": [Interchange(0, 2)], **change}
    with pytest.raises(ValueError, match=message):
        hf.interchange(asked.pop("bases"), asked.pop("sources"), asked.pop("configs"), **asked)


def test_refusals_of_activations(hf):
    for arguments, message in (
        (([], [0], [0]), r"prompts=\[\]: must be at least one"),
        ((ROWS, [0, 2], [0]), r"layers\[1\]=2: must be an integer from 0 to 1"),
        ((ROWS, 0, [0]), "layers=0: must be a list of at least one layer"),
        ((ROWS, [0], []), r"positions=\[\]: must be a list of at least one position"),
        ((ROWS, [0], [0, "x"]), r"positions\[1\]='x': must be an integer"),
        ((ROWS, [0], [0, 6]), r"positions\[1\]=6: must be in \[-6, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.activations(*arguments)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Interchange(0, "last"), "position='last': must be an integer, from 0, or negative"),
        (lambda: Interchange(0, 1.5), "position=1.5: must be an integer"),
        (lambda: Interchange(0, []), r"position=\[\]: must be an integer"),
        (lambda: Interchange(0, 0, True), "source_position=True: must be an integer"),
        (lambda: Interchange(0, 0, value=[1.0, math.nan]), r"value\[1\]=nan: must be finite"),
        (lambda: Subspace(0, 0, 2 * BASIS), "basis: its columns are not orthonormal, .* off the identity by up to 3"),
        (lambda: Subspace(0, 0, BASIS.T), "basis: its columns are not orthonormal"),
        (lambda: Subspace(0, 0, noise(H)), r"basis: has the shape \(64,\), must be a matrix"),
        (lambda: Subspace(0, 0, BASIS, value=noise(3)), "value: has 3 elements, must have 64, as the basis"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_hidden_states_that_are_not_finite_are_named(path):
    trunk = Trunk.load(path)
    engine = HFEngine(trunk, stop_token_ids=[])
    with torch.no_grad():
        trunk.model.model.embed_tokens.weight[6] = math.inf
    with pytest.raises(ValueError, match=r"sources\[1\]: layer 0 puts out NaN or an infinity at position 0"):
        engine.interchange([[1, 2], [1, 3]], [[2, 1], [6, 1]], Interchange(0, 0))
    with pytest.raises(ValueError, match=r"prompts\[0\]: layer 1 puts out NaN or an infinity at position 1"):
        engine.activations([[1, 6]], [1], [1])
    with pytest.raises(ValueError, match=r"configs\[1\]: the logits of pair 1 are NaN under it"):
        engine.interchange([[1, 2], [1, 6]], [[2, 1], [2, 1]], [Interchange(1, 1), Interchange(1, 0)])


# ------------------------------------------------------------------------------------------------ where texts are drawn
PARAMS = SMCParams(n_particles=8, max_tokens=6, seed=3)


def test_draws_under_what_a_source_has(hf, path):
    """The value is what `activations` reads; a position from the end is one of the prompt."""
    source = ROWS[1][:5]
    value = hf.activations([source], [0, 1], [-1])[0, :, 0]
    for given, same in (
        (Interchange(0, -1, value=value[0]), Interchange(0, 4, value=value[0])),
        (Subspace(1, -2, BASIS, value=value[1]), Subspace(1, 3, BASIS, value=value[1])),
    ):
        one, two = (hf.smc(PROMPT, PARAMS, intervention=each) for each in (given, same))
        assert one.token_ids == two.token_ids
        for i, want in enumerate(hooked_log_probs(path, PROMPT, one.token_ids, [same])):
            assert np.abs(one.token_log_probs[i] - want).max() <= 2e-4
    # its first token is drawn as `interchange` says
    found = hf.interchange([PROMPT], [source], Interchange(0, -1), logits=True)[0, 0].log_softmax(-1)
    drawn = hf.smc(PROMPT, PARAMS, intervention=Interchange(0, -1, value=value[0]))
    for tokens, scores in zip(drawn.token_ids, drawn.token_log_probs, strict=True):
        assert abs(float(found[tokens[0]]) - scores[0]) < 2e-5


@pytest.mark.parametrize("scales", [(0.1, 40.0), (40.0, 0.1), (3.0, 3.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_base_of_its_own_stays_to_the_last_bit(dtype, scales):
    """vLLM's layers give (hidden, residual), whose sum was read as the value; what is changed is the residual alone."""
    hidden, residual = (noise(5, H, seed=i, scale=scale).to(dtype) for i, scale in enumerate(scales))
    x = hidden + residual
    for make in (lambda v: Interchange(0, 0, value=v), lambda v: Subspace(0, 0, BASIS, value=v)):
        steps = {i: {(0, BLOCK): make(row).step()} for i, row in enumerate(x.float())}
        maps, variants = lay_out(steps, 5, torch.device("cpu"))[0, BLOCK], torch.arange(5)
        for changed, source in ((residual.clone(), x), (x.clone(), None)):
            before = changed.clone()
            maps.apply(changed, variants, source)
            if source is not None:
                assert torch.equal(hidden + changed, x)
            if maps.replaces is not None or scales[0] <= scales[1]:  # a subspace's float32 sums are as exact as x is
                assert torch.equal(changed, before)


def test_draws_are_refused_what_they_cannot_have(hf, tmp_path):
    value = noise(H)
    for given, message in (
        (Interchange(0, 0), "Interchange: value=None: a draw needs the source's hidden state"),
        (Interchange(0, [0], value=value), r"Interchange: position=\(0,\): a draw needs a single one"),
        (Interchange(0, -6, value=value), r"position=-6: must be in \[-5, 10\), as the prompt has 5 tokens"),
        (Subspace(0, 10, BASIS, value=value), r"position=10: must be in \[-5, 10\)"),
        (Interchange(0, 0, value=noise(3)), "Interchange: is for hidden states of 3 elements, this model has 64"),
    ):
        with pytest.raises(ValueError, match=message):
            hf.smc(PROMPT, PARAMS, intervention=given)
    parts = [Interchange(0, [1, 2], -1), Subspace(1, -1, BASIS, value=value)]
    save(parts, tmp_path / "swaps")
    assert load(tmp_path / "swaps") == parts
    with pytest.raises(ValueError, match="position=-1: is one from a prompt's end, which is not known here"):
        parts[1].check_registered()
