"""bench/planting.py and bench_alignment.py: what is planted is found, a control is not; a random model's facts."""

import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_llama

from fastsmc.alignment import pairs
from fastsmc.hf import HFEngine
from fastsmc.trunk import Trunk

BENCH = Path(__file__).resolve().parents[1] / "bench"
#: of the small network's training
STEPS = 280


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


def test_a_planted_variable_is_found_and_a_control_is_not(tmp_path, monkeypatch):
    """The whole of `planted` at half the numbers, one seed; its file, its tables and its figure."""
    import bench_alignment as bench
    import planting
    import tables
    from machine import write_result

    monkeypatch.setattr(planting, "NUMBERS", 8)
    monkeypatch.setattr(planting, "cache_dir", lambda: tmp_path / "cache")
    for name, value in {
        "NETWORKS": {"price_tag": {bench.PLANTED: {"steps": STEPS}}}, "TASKS": {"price_tag": planting.price_tag},
        "HELD_OUT": 400, "MAP_POSITIONS": (-1,), "MAP_STEPS": 2, "MAP_PAIRS": 20,
        "DAS": bench.DAS | {"n_pairs": 1000, "steps": 80},
    }.items():  # fmt: skip
        monkeypatch.setattr(bench, name, value)
    result = bench.bench_planted(1, str(tmp_path / "map.png"))
    found = {(r["network"], r["setting"], r["variable"]): r for r in result["summary"]}
    planted, control = (found[bench.PLANTED, "same", name] for name in ("left", "lo"))
    assert planted["accuracy"][0] >= 0.97 and planted["known"][0] >= 0.95
    assert planted["iia"][0] >= 0.95 and planted["iia"][0] - control["iia"][0] >= 0.15
    assert all(abs(r["agreement"][0] - 0.5) < 0.03 for key, r in found.items() if key[1] == "same")
    assert {setting for _, setting, _ in found} == {"same", "same ranges", "new ranges"}

    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_result(tmp_path / "alignment.json", result)
    assert tables.make("alignment").count("\n| --- |") == 2
    assert (tmp_path / "map.png").stat().st_size > 1000

    monkeypatch.delattr(planting, "train")  # a checkpoint is trained once
    _, seen = planting.plant(planting.Recipe("price_tag", 0, steps=STEPS))
    assert seen["accuracy"] >= 0.97 and not list((tmp_path / "cache" / "planted").glob(".*"))


def test_samplers_and_what_is_left_out(monkeypatch):
    import bench_alignment as bench
    import planting

    task = planting.price_tag()
    random = np.random.default_rng(0)
    keep = bench.bracket_of({1, 2, 5, 9})
    drawn = [task.sampler(3, keep)(random) for _ in range(300)]
    assert {len(inputs["prefix"]) for inputs in drawn} == {1, 2, 3}
    assert {inputs[name] for inputs in drawn for name in ("lo", "hi")} == {1, 2, 5, 9}
    lefts = [task.make(0).run(inputs)["left"] for inputs in drawn]
    assert 0.55 < np.mean(lefts) < 0.78  # two of three settings of left and right have it

    sampler = task.sampler(0, bench.bracket_of({1, 2}))
    some, other = (pairs(task.make(0), sampler, "left", 200, seed) for seed in (0, 1))
    kept = bench.without(other, some)
    known = {(tuple(base), tuple(source)) for base, source in zip(some.bases, some.sources, strict=True)}
    assert 0 < len(kept) < len(other) and kept.choices == other.choices
    assert known.isdisjoint((tuple(base), tuple(source)) for base, source in zip(kept.bases, kept.sources, strict=True))
    for inputs, base, label in zip(kept.base_inputs, kept.bases, kept.base_labels, strict=True):
        assert base == task.make(0).say(inputs) and label == task.make(0).answer(task.make(0).run(inputs)["answer"])


def test_interchange_in_training_is_the_engine_s():
    """`run` gives, of bases with the planted subspace of their sources, what `said` and hooks elsewhere give."""
    import bench_alignment as bench
    import planting

    from fastsmc.interventions import Subspace

    torch.manual_seed(0)
    model, basis = planting.network().eval(), planting.basis(3)
    ids = torch.randint(0, planting.VOCABULARY, (8, 6))
    with torch.no_grad():
        logits = planting.run(model, ids, basis)
    bases, sources = ids.chunk(2)
    engine = HFEngine(Trunk(model))
    swapped = engine.interchange(bases.tolist(), sources.tolist(), [Subspace(planting.LAYER, -1, basis)], logits=True)
    torch.testing.assert_close(logits[8:], swapped[0], atol=1e-5, rtol=1e-5)
    assert bench.said(engine.trunk, ids.tolist()).tolist() == logits[:8].argmax(1).tolist()


def test_labels_of_both_vocabularies():
    """A label is the base's words for what the causal model answers with the variable set, whatever the source's."""
    import planting

    task = planting.price_tag()
    table = planting.Table(task, 2)
    no, yes = zip(*planting.ANSWERS, strict=True)
    i = task.inputs.index({"prefix": (), "lo": 3, "hi": 9, "x": 1})
    assert table.ids[:, i].tolist() == [[words, 3, 9, 1, planting.ASK] for words in planting.WORDS]
    assert table.values[i] == 0 and table.labels[:, i].tolist() == [list(pair) for pair in zip(no, yes, strict=True)]
    for formats in ("mixed", "apart"):
        recipe = planting.Recipe("price_tag", 0, formats=formats, steps=3, batch=4)
        assert 0 <= planting.accuracy(planting.train(recipe), recipe) <= 1


class Words:
    """A tokenizer of words: their checksums in a vocabulary of 64."""

    def encode(self, text, add_special_tokens=True):
        return [zlib.crc32(word.encode()) % 64 for word in re.findall(r"\S+", text)]

    def decode(self, ids):
        return " ".join(map(str, ids))


def test_facts_of_a_tiny_model(tmp_path, monkeypatch):
    """Whatever a random model says is its fact; the last layer's last position has the answer, whole."""
    import bench_alignment as bench
    import tables
    from machine import write_result

    countries = [f"c{i}" for i in range(12)]
    engine = HFEngine(make_llama(tmp_path / "tiny", 64), Words(), stop_token_ids=[])
    said = bench.said(engine.trunk, [Words().encode(bench.TEMPLATE.format(country)) for country in countries])
    word_of = {Words().encode(word)[0]: word for word in map(str, range(2000))}
    capitals = {country: word_of[token] for country, token in zip(countries, said.tolist(), strict=True)}
    wrong = next(word for token, word in word_of.items() if token != said[0])
    monkeypatch.setattr(bench, "CAPITALS", capitals | {countries[0]: wrong})
    monkeypatch.setattr(bench, "FACT_LAYERS", 2)
    result = bench.bench_facts(engine, str(tmp_path / "facts.png"))
    assert result["asked"] == 12 and result["known"] == 11 and len(result["wrong"]) == 1
    found = result["map"]
    assert found["accuracy"] == 1.0 and found["agreement"] == 0.0
    assert found["positions"] == [-5, -4, -3, -2, -1] and found["iia"][1][-1] == 1.0
    assert found["controls"]["country of another sentence"]["iia"][1][-1] < 1.0

    monkeypatch.setattr(bench, "ELSEWHERE", "The language of the {} is the language")
    with pytest.raises(ValueError, match="CAPITALS, ELSEWHERE: a country has to be one token"):
        bench.bench_facts(engine, None)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    write_result(tmp_path / "facts.json", result)
    assert tables.make("facts").count("\n| --- |") == 1
