"""Batches, pools and files of many prompts, without an engine: `fastsmc.batches`, `fastsmc.results`."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from tiny import PROMPT, TinyLlama, make_llama, run_each

from fastsmc import Population, SMCError, SMCParams
from fastsmc.batches import Job, pooled
from fastsmc.prompts import read_lines
from fastsmc.results import Results

PARAMS = SMCParams(n_particles=100, max_tokens=3, seed=5, group=7)


@pytest.fixture(scope="module")
def populations(tmp_path_factory) -> list[Population]:
    """Makes six runs of a real (tiny) model, groups 0 to 5."""
    tiny = TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), 4), 4, 3, frozenset({3}), prompt=PROMPT[:2])
    asked = [SMCParams(n_particles=4, max_tokens=3, seed=1, group=g, ess_threshold=1.0) for g in range(6)]
    return run_each(tiny, asked, None)


def test_batches_are_consecutive_groups_with_keys_of_their_own():
    job = Job([[1], [2], [3]], PARAMS, islands=2)
    batches = list(job.batches())
    assert job.batch_size == 3 and [b.number for b in batches] == [0, 1]  # 256 rows are three groups of 100
    assert [b.prompts for b in batches] == [[0, 0, 1], [1, 2, 2]] and [b.islands for b in batches] == [
        [0, 1, 0],
        [1, 0, 1],
    ]
    assert [p.group for b in batches for p in b.params] == [7, 8, 9, 10, 11, 12]
    assert [b.texts for b in batches] == [[[1], [1], [2]], [[2], [3], [3]]]
    assert {dataclasses.replace(p, group=7) for b in batches for p in b.params} == {PARAMS}
    # a batch with anything unfinished is run whole, as it was
    assert list(job.batches({0, 1})) == batches[1:] and list(job.batches({0})) == batches
    assert list(job.batches({0, 1, 2})) == [] == list(Job([], PARAMS).batches())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"islands": 0}, "islands=0: must be an integer from 1"),
        ({"islands": True}, "islands=True"),
        ({"islands": 10486}, "islands=10486: of 100 particles must be at most 10485"),
        ({"batch_size": 0}, "batch_size=0: must be an integer from 1"),
        ({"params": None}, "params=None: must be SMCParams"),
        ({"params": SMCParams(group=2**32 - 1), "islands": 2}, "params.group=4294967295: 1 prompts of 2 islands"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Job(**{"prompts": [[1]], "params": PARAMS, **arguments})


def test_gather_pools_in_order_whatever_the_order_of_batches(populations):
    job = Job([[1], [2], [3]], SMCParams(n_particles=4, max_tokens=3), islands=2, batch_size=3)
    first, last = job.batches()
    done = [(last, populations[3:]), (first, populations[:3])]
    found = list(job.gather(iter(done)))
    assert [i for i, _ in found] == [0, 1, 2]
    for k, pool in found:
        assert pool.to_bytes() == Population.pool(populations[2 * k : 2 * k + 2]).to_bytes() and pool.lost_islands == 0
    assert [i for i, _ in job.gather(iter(done), finished={0, 1})] == [2]
    # the first prompt comes as soon as it is whole, and not when all are
    assert next(job.gather(iter([(first, populations[:3])])))[0] == 0


def test_what_is_lost_is_said_and_what_failed_is_never_left_out(populations):
    a, b, c = populations[:3]
    pool = pooled([a, None, c])
    assert (
        pool.lost_islands == 1 == Population.from_bytes(pool.to_bytes()).lost_islands == pool.summary()["lost_islands"]
    )
    assert pool.log_z == Population.pool([a, c]).log_z and pool.n_islands == 2
    assert Population.pool([pool, b]).lost_islands == 1
    failure = SMCError("its potential raised")
    assert pooled([a, None, failure]) is failure
    assert isinstance(pooled([None, None]), SMCError)
    with pytest.raises(ValueError, match="lost_islands=-1"):
        dataclasses.replace(a, lost_islands=-1)


def test_results_are_parts_that_a_later_run_goes_on_from(tmp_path, populations):
    parquet = pytest.importorskip("pyarrow.parquet")
    prompts, settings = [[1], [2], [3]], {"model": "m", "params": {"seed": 1}}
    failure = SMCError("no")
    results = Results(tmp_path / "out", prompts, settings)
    dead = dataclasses.replace(populations[1], log_weights=np.full(4, -math.inf), log_z=-math.inf)

    def outcomes():
        yield 0, populations[0]
        yield 1, failure
        yield 2, dead
        raise KeyboardInterrupt

    found = results.take(outcomes())
    assert next(found) == (1, failure)
    with pytest.raises(KeyboardInterrupt):
        next(found)
    (tmp_path / "out" / "part-00000001.unfinished").write_bytes(b"half")
    again = Results(tmp_path / "out", prompts, settings)
    assert again.finished == {0, 2} and not list((tmp_path / "out").glob("*.unfinished"))
    list(again.take(iter([(1, populations[2])])))
    table = parquet.read_table(tmp_path / "out").to_pylist()
    rows = {row["index"]: row for row in table}
    assert sorted(rows) == [0, 1, 2] and len(table) == 3
    for i, population in ((0, populations[0]), (1, populations[2]), (2, dead)):
        assert rows[i]["population"] == population.to_bytes() and rows[i]["prompt"] == prompts[i]
        assert rows[i]["log_z"] == population.log_z and rows[i]["token_ids"] == population.token_ids
    with pytest.raises(ValueError, match=r"was made with params=.*, this run has .*'seed': 2"):
        Results(tmp_path / "out", prompts, settings | {"params": {"seed": 2}})
    with pytest.raises(ValueError, match=r"has prompt 2 as \[3\]"):
        Results(tmp_path / "out", [[1], [2], [4]], settings)
    with pytest.raises(ValueError, match="must be all texts"):
        Results(tmp_path / "other", [[1], "two"], settings)
    (tmp_path / "out" / "readme").write_text("hm")
    with pytest.raises(ValueError, match="readme is no part of results"):
        Results(tmp_path / "out", prompts, settings)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        Results(tmp_path / "file", prompts, settings)


def test_input_names_the_line_of_a_prompt(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"prompt": [1, 2]}\n')
    assert {number: line.prompt for number, line in read_lines(path).items()} == {1: "a", 3: [1, 2]}
    path.write_text('{"prompt": "a"}\n' + json.dumps({"prompt": "a", "continuation": "b"}))
    with pytest.raises(ValueError, match=r"line 2: holds 'continuation'; may hold 'prompt'"):
        read_lines(path)
