"""Costs of attend: fitted, measured within a budget, kept for the next start. Through a real engine: tests/engine."""

import json
import logging
import multiprocessing
import sys
import time

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from fastsmc import ops
from fastsmc.vllm.attention import costs as attend_costs
from fastsmc.vllm.attention.costs import Shape, Timed

SHAPE, OTHER = Shape(heads=6, key_heads=2, head_size=32, block_size=16), Shape(8, 8, 64, 16)
COSTS = {"attend": [1e-5, 1e-11, 1e-10, 1e-7], "stock": [4e-6, 4e-11, 2e-11, 0.0, 3e-7], "margin": 1.1}


def planted(cases):
    """Features of cases and the seconds that COSTS make of them."""
    units = [
        attend_costs.features(n, length, reads, reads // 2 + 1, shape)
        for n, length, reads in ((n, length, int(n * length * f) // 16 + 1) for n, length, f in cases)
        for shape in (SHAPE, OTHER)  # in one alone, stock's reads are a multiple of its products
    ]
    seconds = [[attend_costs.dot(COSTS["attend"], ours), attend_costs.dot(COSTS["stock"], u)] for ours, u in units]
    return units, seconds


CASES = [(n, length, f) for n in (1, 7, 60, 900) for length in (20, 300, 5000) for f in (0.02, 0.4, 1.0)]


def test_fit_finds_the_costs():
    units, seconds = planted(CASES)
    got = attend_costs.fit(units, seconds)
    for who, want in (("attend", COSTS["attend"]), ("stock", COSTS["stock"])):
        assert np.allclose(got[who], want, rtol=1e-6, atol=1e-16)
    assert got["margin"] == attend_costs.MARGIN  # no errors beyond it


def test_fit_is_non_negative_least_squares():
    rng = np.random.default_rng(0)
    units, seconds = planted(CASES)
    seconds = np.array(seconds) * rng.uniform(0.5, 2.0, (len(units), 2))
    got = attend_costs.fit(units, seconds)
    for i, who in enumerate(("attend", "stock")):
        matrix = np.array([u[i] for u in units])
        size = matrix.max(axis=0)
        want, _ = nnls(matrix / size / seconds[:, i : i + 1], np.ones(len(units)))
        assert min(got[who]) >= 0 and np.allclose(np.array(got[who]) * size, want, rtol=1e-6, atol=1e-12)


def test_the_margin_covers_what_costs_overrate():
    """All cases but one in CASES_BEYOND that are slower with attend are left to vLLM's attention."""
    rng = np.random.default_rng(1)
    units, seconds = planted(CASES * 4)
    seconds = np.array(seconds) * np.exp(0.3 * rng.standard_normal((len(units), 2)))
    costs = attend_costs.fit(units, seconds)
    wrong = sum(attend_costs.pays(costs, u) and s[0] > s[1] for u, s in zip(units, seconds, strict=True))
    assert costs["margin"] > 1.3 and wrong <= len(units) / attend_costs.CASES_BEYOND


@pytest.mark.parametrize("n_rows, n_columns", [(2, 1), (9, 7), (40, 12)])
def test_tables_share_what_they_say(n_rows, n_columns):
    tables = {s: attend_costs.make_table(s, n_rows, n_columns) for s in ("prompt", "tree", "none", "genealogy")}
    plans = {sharing: ops.plan_attend(table) for sharing, table in tables.items()}
    for sharing, table in tables.items():
        assert table.dtype == torch.int32 and table.shape == (n_rows, n_columns)
        assert len(table[:, -1].unique()) == n_rows  # a tail of its own
        assert len(table.unique()) == int(table.max()) + 1 == plans[sharing].n_reads  # a history: no block twice
    assert plans["none"].n_reads == n_rows * n_columns
    assert plans["prompt"].n_reads == n_rows + n_columns - 1 and plans["prompt"].n_shared == n_columns - 1
    if n_columns > 8:
        stem = n_columns // 4
        assert plans["genealogy"].n_shared >= stem and plans["tree"].n_shared == n_columns // 2
        assert plans["prompt"].n_reads < plans["tree"].n_reads < plans["none"].n_reads
        assert plans["prompt"].n_reads < plans["genealogy"].n_reads < plans["none"].n_reads


@pytest.mark.parametrize("max_rows, max_length, n_blocks", [(1, 20, 3), (64, 512, 40), (1000, 100_000, 10_000)])
def test_candidates_are_what_the_engine_can_have(max_rows, max_length, n_blocks):
    cases = attend_costs.candidates(max_rows, max_length, n_blocks, 16)
    assert cases and len(set(cases)) == len(cases)
    for n, length, sharing in cases:
        assert n <= max_rows and length <= max_length
        assert int(attend_costs.make_table(sharing, n, -(-length // 16)).max()) < n_blocks
    sizes = [n * length for n, length, _ in cases]
    assert sizes == sorted(sizes)


def test_measure_times_what_it_is_given(monkeypatch):
    """Functions that take as long as COSTS say (and 2 ms for each call) give such costs, within the budget."""
    monkeypatch.setattr(attend_costs, "SECONDS", 1.0)
    scale, calls = 200.0, []

    def prepare(table, length):
        plan = ops.plan_attend(table)
        units = attend_costs.features(len(table), length, plan.n_reads, len(plan.nodes), SHAPE)

        def wait(who, unit):
            calls.append((len(table), length))
            time.sleep(2e-3 + scale * attend_costs.dot(COSTS[who], unit))

        return Timed(lambda: wait("attend", units[0]), lambda: wait("stock", units[1]), plan.n_reads, len(plan.nodes))

    cases = attend_costs.candidates(256, 4000, 4000, SHAPE.block_size)
    start = time.perf_counter()
    got = attend_costs.measure(cases, prepare, SHAPE)
    assert time.perf_counter() - start < 10  # not the minute that all cases would take
    assert (256, 4000) not in calls and (1, 32) in calls
    big = attend_costs.features(64, 1000, 100, 65, SHAPE)
    want = COSTS["stock"][1] * big[1][1] * scale
    assert got is not None and attend_costs.dot(got["stock"], big[1]) > want / 2
    assert attend_costs.ratio(got, big) > 1.5  # as COSTS have it


def test_too_few_cases_are_no_costs():
    assert attend_costs.measure([], lambda table, length: None, SHAPE) is None


# ------------------------------------------------------------------------------------------------------------- keeping
@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "fastsmc" / "attend_costs.json"


def never():
    raise AssertionError("measured again")


def test_costs_are_kept_by_key(path):
    other = {**COSTS, "margin": 2.0}
    assert attend_costs.kept("one", lambda: COSTS) == COSTS and attend_costs.kept("two", lambda: other) == other
    assert attend_costs.kept("one", never) == COSTS and attend_costs.kept("two", never) == other
    assert json.loads(path.read_text()) == {"one": COSTS, "two": other}
    assert sorted(p.name for p in path.parent.iterdir()) == [".attend_costs.json.lock", path.name]
    assert attend_costs.kept("none", lambda: None) is None and "none" not in json.loads(path.read_text())


def race(i, barrier, queue):
    barrier.wait()
    queue.put(attend_costs.kept("key", lambda: {**COSTS, "margin": float(i)})["margin"])
    queue.put(attend_costs.kept(f"own {i}", lambda: COSTS)["margin"])


def test_who_measures_at_once_decides_alike(path):
    """Eight processes: all have the same costs of one key, and no other key is lost."""
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(8), context.Queue()
    workers = [context.Process(target=race, args=(i, barrier, queue)) for i in range(8)]
    for worker in workers:
        worker.start()
    answers = [queue.get(timeout=60) for _ in range(16)]
    for worker in workers:
        worker.join()
    margins = [m for m in answers if m != COSTS["margin"]]
    known = json.loads(path.read_text())
    assert set(margins) == {known["key"]["margin"]} and len(known) == 9


@pytest.mark.parametrize("text", ['{"one": {"attend"', "[]", "null", '{"two": {}}', '{"two": {"attend": [1]}}'])
def test_a_file_that_does_not_hold_costs_is_named(path, text):
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(RuntimeError, match=r"attend_costs.json: cannot be read .* delete it"):
        attend_costs.kept("one", never)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, where nobody can write")
def test_costs_that_cannot_be_kept_are_used_and_said(monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self/no_such_directory")
    monkeypatch.setattr("tempfile.tempdir", "/proc/self")  # where caches go otherwise
    with caplog.at_level(logging.WARNING):
        assert attend_costs.kept("one", lambda: COSTS) == COSTS
    assert "costs of attend cannot be kept, so the next start may decide otherwise" in caplog.text


def test_a_cache_that_cannot_be_read_is_no_error(path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # to caplog
    path.mkdir(parents=True)  # a directory in its place
    with caplog.at_level(logging.WARNING):
        assert attend_costs.kept("one", lambda: COSTS) == COSTS
    assert "cannot be kept" in caplog.text

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(attend_costs, "cache_dir", homeless)
    assert attend_costs.kept("one", lambda: COSTS) == COSTS


@pytest.mark.parametrize(
    "math, dtype, key",
    [
        ("tiles", torch.bfloat16, "amx bfloat16 tiles"),
        ("tiles", torch.float32, "amx float32 pairs"),
        ("pairs", torch.bfloat16, "amx bfloat16 pairs"),
        ("floats", torch.float16, "amx float16 floats"),
    ],
)
def test_keys(monkeypatch, math, dtype, key):
    monkeypatch.setattr(ops, "BF16_MATH", math)
    assert attend_costs.cost_key("amx", dtype) == key


def test_committed_costs_can_decide():
    """What is committed has the form of `Costs`."""
    for costs in json.loads(attend_costs.COSTS.read_text()).values():
        units = attend_costs.features(256, 2000, 400, 257, SHAPE)
        assert [len(costs[who]) for who in ("attend", "stock")] == [len(u) for u in units]
        assert costs["margin"] >= attend_costs.MARGIN and attend_costs.ratio(costs, units) > 0
