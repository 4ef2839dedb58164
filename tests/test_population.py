"""Population: genealogy, samplers, files and pictures, on populations made by a small SMC in NumPy."""

import copy
import dataclasses
import io
import json
import math
import pickle
import zipfile

import numpy as np
import pytest

from fastsmc.params import SMCParams
from fastsmc.population import Population


def make_population(n=8, steps=10, seed=0, threshold=0.5, texts=True, dead=0.0, **changes):
    """What a group with random weights leaves behind, each particle's own history carried along in a list."""
    rng = np.random.default_rng(seed)
    log_w, ended = np.zeros(n), np.zeros(n, bool)
    tokens, ancestors = np.full((steps, n), -1), np.tile(np.arange(n), (steps, 1))
    ess, resampled, step_log_w = np.zeros(steps), np.zeros(steps, bool), np.zeros((steps, n))
    sequences, log_probs = [[] for _ in range(n)], [[] for _ in range(n)]
    for t in range(steps):
        weights = np.exp(log_w - log_w.max())
        weights /= weights.sum()
        if t > 0 and 1 / np.square(weights).sum() < threshold * n:
            resampled[t] = True
            ancestors[t] = rng.choice(n, n, p=weights)
            sequences = [list(sequences[a]) for a in ancestors[t]]
            log_probs = [list(log_probs[a]) for a in ancestors[t]]
            log_w, ended = np.zeros(n), ended[ancestors[t]]
        drawn = rng.integers(0, 4, n)
        tokens[t] = np.where(ended, -1, drawn)
        for i in np.flatnonzero(~ended):
            sequences[i].append(int(drawn[i]))
            log_probs[i].append(-float(rng.random()))
        log_w = log_w + np.where(ended, 0.0, 0.8 * rng.normal(size=n))
        log_w[rng.random(n) < dead] = -np.inf
        ended = ended | (rng.random(n) < 0.1)
        step_log_w[t] = log_w
        weights = np.exp(log_w - log_w.max())
        ess[t] = weights.sum() ** 2 / np.square(weights).sum()
    token_log_probs = np.zeros((n, steps))
    for i, values in enumerate(log_probs):
        token_log_probs[i, : len(values)] = values
    fields = {
        "token_ids": sequences,
        "log_weights": log_w,
        "log_z": -1.25,
        "log_probs": token_log_probs.sum(axis=1),
        "token_log_probs": token_log_probs,
        "ess": ess,
        "resampled": resampled,
        "ancestors": ancestors,
        "tokens": tokens,
        "step_log_weights": step_log_w,
        "prompt_token_ids": [3, 1],
        "params": SMCParams(n_particles=n, max_tokens=max(steps, 1), ess_threshold=threshold, stop_token_ids=[2]),
        "texts": [" ".join(map(str, s)) for s in sequences] if texts else None,
    }
    return Population(**{**fields, **changes})


def assert_same(a, b):
    for name in ("log_weights", "log_probs", "token_log_probs", "ess", "resampled", "ancestors", "tokens"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and np.array_equal(x, y), name
    assert np.array_equal(a.step_log_weights, b.step_log_weights)
    assert (a.token_ids, a.log_z, a._texts) == (b.token_ids, b.log_z, b._texts)
    assert (a.params, a.prompt_token_ids) == (b.params, b.prompt_token_ids)


# -- genealogy ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "steps", "threshold"), [(8, 10, 0.5), (64, 12, 1.0), (5, 6, 0.0), (1, 4, 1.0)])
def test_lineages_spell_the_particles(n, steps, threshold):
    population = make_population(n, steps, threshold=threshold)
    lineages = np.stack([population.lineage(i) for i in range(n)])
    for i, rows in enumerate(lineages):
        assert rows.shape == (steps,) and rows[-1] == i
        spelt = population.tokens[np.arange(steps), rows]
        assert spelt[spelt >= 0].tolist() == population.token_ids[i]
    distinct = [len(np.unique(lineages[:, t])) for t in range(steps)]
    assert population.distinct_ancestors().tolist() == distinct
    assert distinct[-1] == n
    if threshold == 0.0:
        assert distinct == [n] * steps
    with pytest.raises(IndexError):
        population.lineage(n)


# -- weights and samples -----------------------------------------------------------------------------------------------
def test_weights_and_samples_follow_each_other():
    population = make_population(6, log_weights=[0.0, -np.inf, -1.0, 700.0, 701.0, 699.0])
    weights = population.weights
    assert weights.sum() == pytest.approx(1.0) and weights[1] == 0
    assert population.final_ess == pytest.approx(1 / np.square(weights).sum())
    k = 20000
    drawn = population.sample(k, seed=3)
    assert drawn.shape == (k,) and drawn.dtype == np.int64
    counts = np.bincount(drawn, minlength=6)
    assert np.all(np.abs(counts - k * weights) <= 5 * np.sqrt(k * weights * (1 - weights)) + 1e-9)
    assert np.array_equal(drawn, population.sample(k, seed=3))
    assert not np.array_equal(drawn, population.sample(k, seed=4))
    assert population.sample(0).shape == (0,)


@pytest.mark.parametrize("k", [-1, 1.5, "3", None, True])
def test_sample_refuses(k):
    with pytest.raises(ValueError, match="k="):
        make_population().sample(k)


def test_all_weights_zero():
    population = make_population(4, log_weights=[-np.inf] * 4, log_z=-np.inf)
    assert population.degenerate and population.final_ess == 0 and population.weights.tolist() == [0.0] * 4
    with pytest.raises(ValueError, match="zero"):
        population.sample(1)
    assert population.summary()["log_z"] is None
    assert_same(population, Population.from_bytes(population.to_bytes()))
    population.plot_weights(), population.plot_genealogy()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_weights", np.zeros(3)),
        ("log_weights", [0.0] * 7 + [np.nan]),
        ("log_weights", [0.0] * 7 + [np.inf]),
        ("ancestors", np.full((10, 8), 8)),
        ("tokens", np.zeros((8, 10))),
        ("token_ids", []),
    ],
)
def test_wrong_fields_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        make_population(texts=False, **{field: value})


def test_texts():
    population = make_population(texts=False)
    assert population.texts is None
    with pytest.raises(ValueError, match="no tokenizer"):
        population.best()
    population.texts = ["x"] * 8  # as the front end does once it has decoded them
    assert population.texts == ["x"] * 8
    with pytest.raises(ValueError, match="texts: 1"):
        population.texts = ["one"]


def test_best_adds_up_equal_texts():
    population = make_population(4, log_weights=np.log([0.2, 0.3, 0.1, 0.4]), log_probs=[-1.0, -2.0, -3.0, -4.0])
    population.texts = ["a", "b", "b", "a"]
    (first, w1, lp1), (second, w2, lp2) = population.best(5)
    assert (first, second, lp1, lp2) == ("a", "b", -1.0, -2.0)
    assert (w1, w2) == (pytest.approx(0.6), pytest.approx(0.4))
    assert len(population.best(1)) == 1


@pytest.mark.parametrize("texts", [True, False])
def test_summary_and_dict_are_json(texts):
    population = make_population(texts=texts, dead=0.2)
    loaded = json.loads(json.dumps(population.to_dict(), allow_nan=False))
    assert loaded["token_ids"] == population.token_ids
    assert loaded["weights"] == population.weights.tolist()
    finite = [v if math.isfinite(v) else None for v in population.log_weights.tolist()]
    assert loaded["log_weights"] == finite and (None in finite) == bool(np.isneginf(population.log_weights).any())
    assert (loaded["log_z"], loaded["n_particles"], loaded["steps"]) == (-1.25, 8, 10)
    assert len(loaded["ess"]) == 10 and len(loaded["best"] or []) == (len(population.best(5)) if texts else 0)
    assert repr(population).startswith("Population(N=8, T=10, log_z=-1.25")
    assert len(population) == 8


# -- files -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("texts", [["", "nul\0", "é\n", "🙂", "lone \ud800", "a", " a ", "\\"], None])
def test_bytes_round_trip(texts):
    population = make_population(texts=texts is not None, dead=0.1)
    if texts:
        population.texts = texts
    assert_same(population, Population.from_bytes(population.to_bytes()))


@pytest.mark.parametrize("name", ["population", "population.npz", "population.json", "p.tar.gz", "ü ber"])
def test_files_have_the_name_that_was_given(tmp_path, name):
    population = make_population(16, 3)
    population.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert_same(population, Population.load(str(tmp_path / name)))


def test_no_steps(tmp_path):
    population = make_population(3, 0, log_weights=[-np.inf] * 3, log_z=-np.inf)
    population.save(tmp_path / "p")
    assert_same(population, Population.load(tmp_path / "p"))
    assert population.lineage(0).shape == (0,) and population.summary()["steps"] == 0
    population.plot_weights(), population.plot_genealogy()


def rewritten(data, name, content):
    """The archive with one member replaced, or left out if `content` is None."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.namelist():
            if member != name:
                new.writestr(member, old.read(member))
            elif content is not None:
                new.writestr(member, content)
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array, allow_pickle=array.dtype == object)
    return out.getvalue()


def meta(**values):
    return npy(np.frombuffer(json.dumps(values).encode(), dtype=np.uint8))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a fastsmc population"),
        (lambda data: b"hello", "not a fastsmc population"),
        (lambda data: data[:-30], "not a fastsmc population"),
        (lambda data: npy(np.zeros(3)), "not a fastsmc population"),
        (lambda data: rewritten(data, "meta.npy", None), "not a fastsmc population"),
        (lambda data: rewritten(data, "meta.npy", meta(format="other")), "not a fastsmc population"),
        (lambda data: rewritten(data, "meta.npy", meta(format="fastsmc.population", version=99)), "version is 99"),
        (lambda data: rewritten(data, "ess.npy", None), "ess"),
        (lambda data: rewritten(data, "log_weights.npy", npy(np.zeros(3))), "log_weights: shape"),
        (lambda data: rewritten(data, "lengths.npy", npy(np.array([-1] * 8))), "lengths"),
        (lambda data: rewritten(data, "tokens.npy", npy(np.array([{}], dtype=object))), "tokens: holds .* object"),
        (lambda data: data.replace(b"NUMPY", b"NAMPY"), ""),
    ],
)
def test_load_says_what_is_wrong(tmp_path, damage, message):
    path = tmp_path / "some.file"
    path.write_bytes(damage(make_population().to_bytes()))
    with pytest.raises(ValueError, match=f"some.file.*{message}"):
        Population.load(path)


def reads(data):
    """Whether the bytes are read, as they were written; ValueError naming the source is the other way."""
    try:
        assert_same(Population.from_bytes(data, source="some.file"), make_population(2, 3))
    except ValueError as error:
        assert str(error).startswith("cannot read some.file: ")
        return False
    return True


def test_any_damaged_bit_is_a_value_error_or_harmless():
    data = make_population(2, 3).to_bytes()
    assert reads(data)
    rng = np.random.default_rng(0)
    for i in range(len(data)):
        reads(data[:i] + bytes([data[i] ^ 1 << int(rng.integers(8))]) + data[i + 1 :])
    for _ in range(300):  # several bytes at once
        damaged = bytearray(data)
        for i in rng.integers(0, len(data), 4):
            damaged[i] = rng.integers(256)
        reads(bytes(damaged))
    for cut in [*range(0, len(data), 7), len(data) - 1]:
        assert not reads(data[:cut])
        assert cut == 0 or (not reads(data + data[:cut]) and not reads(data[:cut] + data))


def header(shape, dtype):
    """An array file that says it is large and holds nothing."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": dtype, "fortran_order": False, "shape": shape})
    return out.getvalue()


def packed(data, method):
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", method) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    return out.getvalue()


def swapped(data, a, b):
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        x, y = old.read(a), old.read(b)
    return rewritten(rewritten(data, a, y), b, x)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: swapped(data, "tokens.npy", "ancestors.npy"),
        lambda data: swapped(data, "log_weights.npy", "log_probs.npy"),
        lambda data: rewritten(data, "log_weights.npy", header((1 << 60,), "<f8")),
        lambda data: rewritten(data, "tokens.npy", header((1 << 40, 1 << 40), "<i4")),
        lambda data: rewritten(data, "ess.npy", header((-1,), "<f8")),
        lambda data: rewritten(data, "ess.npy", header((3,), "|O")),
        lambda data: rewritten(data, "meta.npy", npy(np.frombuffer(b"[" * 100_000, np.uint8))),
        lambda data: rewritten(data, "meta.npy", meta(format="fastsmc.population", version=1, params=3)),
        lambda data: rewritten(data, "lengths.npy", npy(np.array(3))),
        lambda data: packed(data, zipfile.ZIP_DEFLATED),
        lambda data: packed(data, zipfile.ZIP_BZIP2),
        lambda data: packed(rewritten(data, "ess.npy", bytes(1 << 28)), zipfile.ZIP_DEFLATED),  # a zip bomb
    ],
)
def test_files_that_lie_about_themselves(damage):
    assert not reads(damage(make_population(2, 3).to_bytes()))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("log_weights", ["a"] * 8),
        ("log_weights", [1j] * 8),
        ("log_weights", [None] * 8),
        ("tokens", np.full((10, 8), 0.5)),
        ("tokens", np.full((10, 8), 2**40)),
        ("resampled", np.full(10, 0.5)),
        ("log_z", float("nan")),
        ("log_z", "x"),
        ("prompt_token_ids", [1.5]),
        ("params", None),
    ],
)
def test_arrays_of_another_kind_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        make_population(texts=False, **{field: value})


@pytest.mark.parametrize("texts", [True, False])
def test_a_population_is_a_plain_container(texts):
    population = make_population(4, 3, texts=texts)
    assert dataclasses.replace(population, log_z=1.0).log_z == 1.0
    assert dataclasses.asdict(population)["texts"] == population.texts
    for other in (copy.copy(population), copy.deepcopy(population), pickle.loads(pickle.dumps(population))):
        assert_same(population, other)
    assert (population.texts is None) == (not texts)


def test_load_names_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        Population.load(tmp_path / "absent")


# -- pictures ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("n", "steps", "dead"), [(1, 1, 0.0), (8, 16, 0.0), (1024, 20, 0.05)])
def test_plots(tmp_path, n, steps, dead):
    population = make_population(n, steps, dead=dead)
    for plot in (population.plot_weights, population.plot_genealogy):
        figure = plot(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
        assert figure.axes
    with pytest.raises(ValueError, match="max_lines=0"):
        population.plot_genealogy(max_lines=0)
    few = population.plot_genealogy(max_lines=10)
    assert all(len(lines.get_segments()) <= 10 for lines in few.axes[0].collections[:2])
