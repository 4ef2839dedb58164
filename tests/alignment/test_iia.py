"""IIA and heat maps over a tiny model: shares of pairs that a plain forward hook gives, too."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny import make_llama

from fastsmc.alignment import HeatMap, Pairs, heat_map, iia
from fastsmc.hf import HFEngine

VOCAB, N = 24, 12
#: from the front, from the end, and one per pair
POSITIONS = [-1, -3, 0, [i % 4 for i in range(N)]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return HFEngine(make_llama(tmp_path_factory.mktemp("iia") / "model", VOCAB, scale=0.3), stop_token_ids=[])


def hooked(engine, base, source, layer=0, position=0, basis=None):
    """The most likely token after a base with a source's hidden state in it, by a hook in a full forward pass."""
    model, seen = engine.trunk.model, []
    block = model.model.layers[layer]
    with torch.no_grad():
        handle = block.register_forward_hook(lambda module, inputs, out: seen.append(out.clone()))
        model(torch.tensor([source]))
        handle.remove()

        def put(module, inputs, out):
            off = seen[0][:, position] - out[:, position]
            out[:, position] += off if basis is None else off @ basis @ basis.T
            return out

        handle = block.register_forward_hook(put)
        token = int(model(torch.tensor([base])).logits[0, -1].argmax())
        handle.remove()
    return token


def make_pairs(engine, seed, variable="v"):
    """Pairs whose labels the hook gives at some site each, so that no site has all of them and none has nothing."""
    rng = np.random.default_rng(seed)
    bases, sources = rng.integers(VOCAB, size=(2, N, 6)).tolist()
    sites = [(0, -1), (1, -1), (0, 0), (1, -3)]
    labels = [hooked(engine, bases[i], sources[i], *sites[i % 4]) for i in range(N)]
    base_labels = [hooked(engine, ids, ids) for ids in bases[:-3]] + rng.integers(VOCAB, size=3).tolist()
    return Pairs([{}] * N, [{}] * N, bases, sources, labels, base_labels, labels, list(range(VOCAB)), (variable,))


def share(engine, pairs, layer, position, basis=None):
    each = position if isinstance(position, (list, tuple)) else [position] * N
    got = [hooked(engine, b, s, layer, p, basis) for b, s, p in zip(pairs.bases, pairs.sources, each, strict=True)]
    return sum(a == b for a, b in zip(got, pairs.labels, strict=True)) / N


def basis_of(seed, k):
    return torch.linalg.qr(torch.randn(64, k, generator=torch.Generator().manual_seed(seed)))[0]


class Aligned:
    """What `iia` needs of a `BoundlessDAS`."""

    def __init__(self, basis):
        self.basis = lambda: basis


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rank", [None, 12, 40])
def test_a_heat_map_is_what_hooks_give(engine, seed, rank):
    pairs = make_pairs(engine, seed)
    sites = [(layer, tuple(p) if isinstance(p, list) else p) for layer in (0, 1) for p in POSITIONS]
    bases = None if rank is None else {site: basis_of(seed + i, rank) for i, site in enumerate(sites)}
    alignments = None if bases is None else {s: Aligned(b) if s[0] else b for s, b in bases.items()}
    found = heat_map(engine, pairs, range(2), POSITIONS, alignments=alignments)
    want = [share(engine, pairs, *site, None if bases is None else bases[site]) for site in sites]
    assert found.iia.ravel().tolist() == want and len(set(want)) > 1
    assert iia(engine, None if alignments is None else alignments[sites[-1]], pairs, *sites[-1]) == want[-1]
    plain = [hooked(engine, ids, ids) for ids in pairs.bases]
    assert found.accuracy == np.mean(np.equal(plain, pairs.base_labels)) >= 0.75
    assert found.agreement == np.mean(np.equal(plain, pairs.labels))
    assert found.normalised == pytest.approx((found.iia - found.agreement) / (found.accuracy - found.agreement))
    assert (found.layers, found.n_pairs, found.variable) == ([0, 1], N, ("v",))
    assert found.dims is None if rank is None else (found.dims == rank).all() and found.dims.shape == (2, 4)


def test_controls_files_and_pictures(engine, tmp_path):
    pairs, other = make_pairs(engine, 0), make_pairs(engine, 7, "w")
    found = heat_map(engine, pairs, [1], [-1, 0], controls={"the other": other})
    alone = heat_map(engine, other, [1], [-1, 0])
    assert found.controls["the other"].to_dict() == alone.to_dict() != found.to_dict()
    found.save(tmp_path / "map.json")
    again = HeatMap.load(tmp_path / "map.json")
    assert again.to_dict() == found.to_dict() and again.versions["torch"] == torch.__version__
    assert again.controls["the other"].variable == ("w",) and again.iia.dtype == np.float64
    again.plot_iia(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = found.plot_iia().axes
    assert [a.get_title().partition("\n")[0] for a in axes[:2]] == ["v", "control: the other"]
    assert [text.get_text() for text in axes[0].texts] == [f"{share:.2f}" for share in found.iia[0]]

    per_pair = heat_map(engine, pairs, [1], [POSITIONS[-1]], alignments={(1, tuple(POSITIONS[-1])): basis_of(0, 2)})
    per_pair.save(tmp_path / "map.json")
    assert HeatMap.load(tmp_path / "map.json").positions == [tuple(POSITIONS[-1])]
    assert HeatMap.load(tmp_path / "map.json").dims.tolist() == [[2]]
    per_pair.plot_iia(tmp_path / "map.svg")

    fields = json.loads((tmp_path / "map.json").read_text())
    for bad, why in (
        ([], "not a fastsmc heat map"),
        (fields | {"version": 9}, "its version is 9"),
        (fields | {"layers": [0, 1]}, "of shape"),
        ({k: v for k, v in fields.items() if k != "iia"}, "iia"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=rf"cannot read .*bad\.json: .*{why}"):
            HeatMap.load(tmp_path / "bad.json")


def test_normalised_where_there_is_no_room(engine):
    pairs = make_pairs(engine, 0)
    said = {hooked(engine, ids, ids) for ids in pairs.bases}
    never = next(token for token in range(VOCAB) if token not in said)
    found = heat_map(engine, dataclasses.replace(pairs, base_labels=[never] * N), [0], [-1])
    assert found.accuracy == 0 and np.isnan(found.normalised).all()
    assert found.to_dict()["normalised"] == [[None]]
    with pytest.raises(ValueError, match="none of 12 labels is changed by the interchange, so IIA"):
        iia(engine, None, dataclasses.replace(pairs, base_labels=pairs.labels), 0, -1)


@pytest.mark.parametrize(
    ("arguments", "more", "why"),
    [
        (([], [0]), {}, r"layers=\[\]: must be a list"),
        ((1, [0]), {}, "layers=1: must be a list"),
        (([-1], [0]), {}, r"layers\[0\]=-1"),
        (([2], [0]), {}, "layer=2"),
        (([0], []), {}, r"positions=\[\]: must be a list"),
        (([0], [0.5]), {}, r"positions\[0\]=0\.5"),
        (([0], [[0.5]]), {}, r"positions\[0\]=\[0\.5\]"),
        (([0], [6]), {}, "position=6"),
        (([0], [[0, 1]]), {}, "2 positions for 12"),
        (([0, 1], [0]), {"alignments": {(0, 0): basis_of(0, 2)}}, r"has none for \(layer, position\) = \(1, 0\)"),
        (([0], [0]), {"alignments": {(0, 0): torch.ones(64, 2)}}, "orthonormal"),
        (([0], [0]), {"alignments": {(0, 0): torch.eye(8)[:, :2]}}, "8 elements, this model has 64"),
        (([0], [POSITIONS[-1]]), {"controls": {"c": None}}, "controls: have other prompts"),
    ],
)
def test_refuses(engine, arguments, more, why):
    with pytest.raises(ValueError, match=why):
        heat_map(engine, make_pairs(engine, 0), *arguments, **more)


def test_labels_are_tokens(engine):
    pairs = make_pairs(engine, 0)
    for labels, why in (([VOCAB] * N, f"label={VOCAB}"), (["yes"] * N, "label='yes': there is no tokenizer")):
        with pytest.raises(ValueError, match=why):
            iia(engine, None, dataclasses.replace(pairs, labels=labels), 0, -1)

    class Letters:
        eos_token_id = None

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [ord(letter) - ord("a") for letter in text]

    spelt = HFEngine(engine.trunk, Letters(), stop_token_ids=[])
    letters = dataclasses.replace(pairs, labels=[chr(ord("a") + label) for label in pairs.labels])
    assert iia(spelt, None, letters, 1, -1) == iia(engine, None, pairs, 1, -1)
    with pytest.raises(ValueError, match="label='ab': is 2 tokens"):
        iia(spelt, None, dataclasses.replace(pairs, labels=["ab"] * N), 1, -1)
