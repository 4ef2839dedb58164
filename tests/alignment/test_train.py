"""Training over a frozen model: its evaluation against hooks, sweeps, what a run leaves and goes on from, refusals."""

import dataclasses
import json

import pytest
import torch
from hooked import LAYERS, VOCAB, H, hooked_logits, make_trunk, states

from fastsmc.alignment import BoundlessDAS, CausalModel, frozen_iia, pairs, train_alignment
from fastsmc.alignment import train as training
from fastsmc.alignment.frozen import Frozen
from fastsmc.hf import HFEngine

#: a game of which a random model knows nothing: is x at least lo, behind as many dots as `dots`
DOT, YES, NO = 8, 9, 10


def model(**more):
    functions = {"left": lambda x, lo: x >= lo, "out": lambda left, flip: left != flip}
    say = dict(prompt=lambda v: [DOT] * v["dots"] + [v["lo"], v["x"], int(v["flip"])], answers={True: YES, False: NO})
    return CausalModel(["lo", "x", "flip", "dots", "left", "out"], functions, **say | more)


def sampler(most_dots):
    def sample(rng):
        lo, x, flip, dots = (int(rng.integers(0, n)) for n in (8, 8, 2, most_dots + 1))
        return {"lo": lo, "x": x, "flip": flip, "dots": dots}

    return sample


def at_x(inputs):
    return inputs["dots"] + 1


ASKED = dict(
    variable="left", sampler=sampler(3), n_pairs=40, n_eval=20, steps=9, batch=16, lr=1e-2, checkpoint_every=4,
    eval_every=3, use_tqdm=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def trunk():
    return make_trunk()


def train(trunk, layer=1, position=at_x, **more):
    return train_alignment(trunk, model(), layer, position, **ASKED | more)


def same(a, b):
    return torch.equal(a.basis(), b.basis()) and a.history == b.history and a.card.iia == b.card.iia


@pytest.mark.parametrize("position, find", [(at_x, at_x), (-1, lambda inputs: inputs["dots"] + 2)])
def test_iia_is_that_of_full_passes(trunk, position, find):
    drawn = pairs(model(), sampler(3), "left", 30, 5)
    basis = torch.linalg.qr(torch.randn(H, 6, generator=torch.Generator().manual_seed(0))).Q
    for one in (basis, None):
        right = 0
        for i, (base, source) in enumerate(zip(drawn.bases, drawn.sources, strict=True)):
            there = states(trunk, source, 1)[find(drawn.source_inputs[i])]
            at = find(drawn.base_inputs[i])

            def change(x, there=there, one=one):
                return there[None] if one is None else x + (there - x) @ one @ one.T

            with torch.no_grad():
                right += int(hooked_logits(trunk, base, 1, at, change).argmax()) == drawn.labels[i]
        assert frozen_iia(trunk, one, drawn, 1, position, batch=7) == right / 30


def test_card_and_iia_are_of_what_was_trained(trunk, tmp_path):
    das = train(HFEngine(trunk), directory=tmp_path)
    assert das.card.iia == frozen_iia(trunk, das, pairs(model(), sampler(3), "left", 20, 1), 1, at_x)
    assert (das.card.layer, das.card.position, das.card.variable, das.card.steps) == (1, "at_x", ("left",), 9)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == das.history and [line["step"] for line in lines] == list(range(1, 10))
    assert [line["step"] for line in lines if "iia" in line] == [3, 6, 9]
    assert lines[0]["temperature"] == 50.0 and lines[-1]["temperature"] == pytest.approx(0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alignment.safetensors", "card.json", "metrics.jsonl"]
    loaded = BoundlessDAS.load(tmp_path)
    assert dataclasses.asdict(loaded.card) == dataclasses.asdict(das.card) and torch.equal(loaded.basis(), das.basis())


def test_a_step_learns(trunk):
    """Steps lower the loss on a model that can be led: the whole vector decides at the last layer and position."""
    das = train(trunk, layer=LAYERS - 1, position=-1, steps=60, lr=3e-2, batch=40, temperature=(1.0, 1.0))
    assert das.history[-1]["loss"] < 0.95 * das.history[0]["loss"]


def test_a_run_goes_on_to_the_same_numbers(trunk, tmp_path, monkeypatch):
    whole = train(trunk)
    logits, calls = Frozen.logits, []

    def stops(self, *args, **more):
        calls.append(1)
        if len(calls) == 9:  # of a check, six steps and two evaluations
            raise KeyboardInterrupt
        return logits(self, *args, **more)

    monkeypatch.setattr(Frozen, "logits", stops)
    with pytest.raises(KeyboardInterrupt):
        train(trunk, directory=tmp_path)
    monkeypatch.setattr(Frozen, "logits", logits)
    assert (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "card.json").exists()
    with pytest.raises(ValueError, match="checkpoint.pt: is of another configuration"):
        train(trunk, directory=tmp_path, lr=2e-2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a full disk leaves it
    steps = []
    step = training.Fit.step
    monkeypatch.setattr(training.Fit, "step", lambda self, *args: steps.append(self.taken) or step(self, *args))
    assert same(train(trunk, directory=tmp_path), whole)
    assert steps == [4, 5, 6, 7, 8]
    monkeypatch.setattr(training, "Frozen", None)  # a run that has finished computes nothing
    assert same(train(trunk, directory=tmp_path), whole)
    with pytest.raises(ValueError, match="card.json: is of another configuration"):
        train(trunk, directory=tmp_path, sampler=sampler(2))
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="checkpoint.pt: cannot be read .*; remove it, and training begins anew"):
        train(trunk, directory=tmp_path / "other")


def test_a_sweep_shares_a_store_and_gives_what_each_site_gives(trunk, tmp_path, monkeypatch):
    made, init = [], Frozen.__init__
    monkeypatch.setattr(Frozen, "__init__", lambda self, *args, **more: made.append(1) or init(self, *args, **more))
    done = train(trunk, layer=[1, 2], position=[at_x, -1], directory=tmp_path, rank=8)
    assert list(done) == [(1, at_x), (1, -1), (2, at_x), (2, -1)] and len(made) == 1
    names = ["layer1_position-1", "layer1_position_0", "layer2_position-1", "layer2_position_0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    alone = train(trunk, layer=2, position=-1, rank=8)
    torch.testing.assert_close(done[2, -1].basis(), alone.basis(), atol=1e-4, rtol=0)
    assert done[2, -1].card.iia == alone.card.iia
    assert len(made) == 2
    again = train(trunk, layer=[1, 2], position=[at_x, -1], directory=tmp_path, rank=8)
    assert len(made) == 2 and all(same(again[key], done[key]) for key in done)


def test_cache_is_said_and_capped(trunk, tmp_path, capsys):
    whole = train(trunk, use_tqdm=True)
    assert "distinct bases and" in (said := capsys.readouterr().err) and "of memory on cpu" in said
    assert said.index("distinct bases") < said.index("what is frozen")
    assert same(train(trunk, max_cache_bytes=0, directory=tmp_path, use_tqdm=True), whole)
    assert "on disk, above max_cache_bytes=0" in capsys.readouterr().err
    assert not list(tmp_path.glob("fastsmc-frozen*"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"layer": LAYERS}, "layer=4: must be an integer from 0 to 3"),
        ({"layer": []}, "layer=\\[\\]: must be one, or a list"),
        ({"position": [1, 1]}, "position=\\[1, 1\\]: .* each once"),
        ({"position": [[1]]}, "position=\\[\\[1\\]\\]: must be one, or a list"),
        ({"position": 1}, "position=1: bases have 3 to 6 tokens; give a position for each"),
        ({"position": -4}, "position=-4: must be in "),
        ({"position": lambda inputs: 6}, "position=6: must be in "),
        ({"position": 0.5}, "position=0.5: must be an integer, from 0"),
        ({"steps": 0}, "steps=0"),
        ({"temperature": (1.0, 2.0)}, "temperature=\\(1.0, 2.0\\): rises"),
        ({"temperature": (1.0, -2.0)}, "temperature\\[1\\]=-2.0"),
        ({"variable": "right"}, "variable='right': must be one of"),
        ({"variable": "dots"}, "IIA would be meaningless"),
        ({"rank": H + 1}, "rank=33"),
        ({"n_pairs": 1}, "n=1"),
        ({"max_cache_bytes": -1}, "max_cache_bytes=-1"),
    ],
)
def test_refusals(trunk, change, words):
    with pytest.raises(ValueError, match=words):
        train(trunk, **change)


def test_refusals_of_models_and_bases(trunk):
    def asked(causal_model):
        return train_alignment(trunk, causal_model, 1, -1, **ASKED)

    with pytest.raises(ValueError, match="causal_model: must have prompt= and answers="):
        asked(model(answers=None))
    with pytest.raises(ValueError, match=f"label={VOCAB}: must be an integer from 0 to {VOCAB - 1}"):
        asked(model(answers={True: VOCAB, False: NO}))
    with pytest.raises(ValueError, match="label=' yes': there is no tokenizer"):
        asked(model(answers={True: " yes", False: NO}))
    with pytest.raises(ValueError, match="is beyond the vocabulary"):
        asked(model(prompt=lambda inputs: [VOCAB]))
    with pytest.raises(ValueError, match="prompt: has 65 tokens, this model at most 64"):
        asked(model(prompt=lambda inputs: [1] * 65))
    drawn = pairs(model(), sampler(3), "left", 10, 5)
    with pytest.raises(ValueError, match="basis: its columns are not orthonormal"):
        frozen_iia(trunk, torch.ones(H, 2), drawn, 1, -1)
    drawn.base_labels = drawn.labels
    with pytest.raises(ValueError, match="none of 10 labels is changed by the interchange"):
        frozen_iia(trunk, None, drawn, 1, -1)
