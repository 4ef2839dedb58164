"""300 requests of bench/bench_soak.py against the server of these tests."""

import asyncio
from pathlib import Path

import pytest

from .conftest import SETUP_TIMEOUT_S

pytestmark = pytest.mark.engine
REQUESTS = 300


def test_nothing_is_left(server, monkeypatch):
    """Every request ends as it should, ordinary answers are those of a run alone, and then nothing is left."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "bench"))
    import bench_soak

    found = asyncio.run(bench_soak.soak(server, REQUESTS, 0, SETUP_TIMEOUT_S))
    assert found["faults"] == [] and set(bench_soak.ENDS) <= set(found["ends"])
    ordinary = found["ordinary"]
    assert ordinary["asked"] > 2 * bench_soak.N_CASES and not {"lost", "wrong"} & set(ordinary), found["differences"]
    assert found["idle"] and found["blocks"] > 0 and found["leaked_blocks"] == 0
    assert set(found["left"].values()) == {0.0}
    assert found["same_group_before_and_after"] and found["engine_deaths"] == 0
    before, after = found["threads"]
    assert after <= before + 8, found["samples"]
