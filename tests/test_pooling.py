"""Populations of independent runs as one: weights, genealogy, error, and what is refused."""

import dataclasses
import io
import json
import math
import zipfile

import numpy as np
import pytest
from tiny import TableTwist, TinyLlama, make_llama, run_each, run_table, value_table

from fastsmc import SMCParams
from fastsmc.genealogy import RETAINED
from fastsmc.population import Population

VOCAB, STEPS, STOP = 6, 4, 5
VALUE = value_table(STEPS, VOCAB, seed=4)
PHI = TableTwist(VALUE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return TinyLlama(make_llama(tmp_path_factory.mktemp("tiny"), VOCAB), VOCAB, STEPS, frozenset([STOP]))


def params_of(n, group, **params):
    return SMCParams(**{"n_particles": n, "group": group, "max_tokens": STEPS, "ess_threshold": 1.0, **params})


def island(tiny, n, group, potential=PHI, **params):
    return run_table(tiny, params_of(n, group, **params), potential)


@pytest.mark.parametrize("proposal", ["twisted", "base"])
def test_rows_lie_side_by_side(tiny, proposal):
    sizes = [1, 2, 17, 3, 40]  # small ones are over sooner
    parts = [island(tiny, n, group, proposal=proposal, logit_bias={STOP: 2.5}) for group, n in enumerate(sizes)]
    assert len({part.T for part in parts}) > 1
    for part in parts:
        part.texts = [str(ids) for ids in part.token_ids]
    pool = Population.pool(parts)
    assert pool.n_particles == pool.params.n_particles == 63
    assert max(part.T for part in parts) == pool.T
    assert pool.island.tolist() == np.repeat(np.arange(5), sizes).tolist() and pool.island.dtype == np.int32
    z = np.exp([part.log_z for part in parts])
    assert pool.log_z == pytest.approx(math.log(np.average(z, weights=sizes)), abs=1e-12)
    shares = np.array(sizes) * z / np.dot(sizes, z)
    weights = np.concatenate([share * part.weights for share, part in zip(shares, parts, strict=True)])
    np.testing.assert_allclose(pool.weights, weights, atol=1e-14)
    first = 0
    for k, part in enumerate(parts):
        for i in range(part.n_particles):
            rows, ids = pool.lineage(first + i), part.token_ids[i]
            spelt = pool.tokens[np.arange(pool.T), rows]
            assert spelt[spelt >= 0].tolist() == pool.token_ids[first + i] == ids
            assert (rows[: part.T] - first == part.lineage(i)).all()
            assert pool.texts[first + i] == str(ids)
        assert pool.island_resampled[: part.T, k].tolist() == part.resampled.tolist()
        assert not pool.island_resampled[part.T :, k].any()
        first += part.n_particles
    assert pool.resampled.tolist() == pool.island_resampled.any(1).tolist()
    assert pool.n_roots == sum(part.n_roots for part in parts)
    np.testing.assert_allclose(pool.token_log_probs.sum(1), pool.log_probs)
    np.testing.assert_allclose(pool.ess[-1], _ess(pool.step_log_weights[-1]))
    json.dumps(pool.to_dict(), allow_nan=False)
    again = Population.from_bytes(pool.to_bytes())
    for name in ("island", "island_resampled", "ancestors", "log_weights", "tokens"):
        np.testing.assert_array_equal(getattr(again, name), getattr(pool, name))
    nested = Population.pool([Population.pool(parts[:2]), Population.pool(parts[2:])])
    for name in ("island", "island_resampled", "ancestors", "tokens", "log_weights"):
        np.testing.assert_array_equal(getattr(nested, name), getattr(pool, name))
    pool.plot_weights(), pool.plot_genealogy()


def _ess(log_weights):
    weights = np.exp(log_weights - log_weights.max())
    return weights.sum() ** 2 / np.square(weights).sum()


def test_error_of_a_pool(tiny):
    sizes = [20, 30, 50, 40, 10, 25, 35, 15, 45]
    parts = [island(tiny, n, group) for group, n in enumerate(sizes)]
    few = Population.pool(parts[:3])
    z, n = np.exp([part.log_z for part in parts]), np.array(sizes)
    terms = [n[k] / 100 * z[k] * parts[k].log_z_stderr for k in range(3)]
    assert few.log_z_stderr == pytest.approx(math.sqrt(sum(t * t for t in terms)) / np.average(z[:3], weights=n[:3]))
    many, mean = Population.pool(parts), np.average(z, weights=n)
    spread = sum(n * (z - mean) ** 2) / (8 * n.sum())  # unbiased where Ẑ_k has variance σ²/N_k
    assert many.log_z_stderr == pytest.approx(math.sqrt(spread) / mean)
    without = dataclasses.replace(parts[1], log_z_stderr=math.nan, log_z_stderr_reason="whatever")
    reason = Population.pool([parts[0], without]).log_z_stderr_reason
    assert "island 1: whatever" in reason and "8 islands" in reason
    moved = dataclasses.replace(without, params=dataclasses.replace(without.params, group=99))
    assert Population.pool([moved, *parts]).log_z_stderr_reason is None
    with pytest.raises(
        ValueError, match=r"populations\[2\]: has seed and group of populations\[0\]; runs must be indep"
    ):
        Population.pool([*parts[:2], parts[0]])
    dead = [island(tiny, 5, group, TableTwist(np.full_like(VALUE, -np.inf))) for group in range(9, 18)]
    pool = Population.pool(dead)
    assert pool.log_z == -math.inf and pool.degenerate and "zero" in pool.log_z_stderr_reason and not pool.ess.any()
    some = Population.pool([*dead, parts[2]])
    assert some.log_z == pytest.approx(parts[2].log_z + math.log(50 / 95))
    assert some.log_z_stderr == pytest.approx(math.sqrt((45 * 1 + 50 * 0.9**2) / (9 * 95)))
    assert Population.pool([island(tiny, 5, group, None) for group in range(9)]).log_z_stderr == 0.0
    bounds = [dataclasses.replace(part, log_z_stderr=math.nan, log_z_stderr_reason=RETAINED) for part in parts]
    assert Population.pool(bounds).log_z_stderr_reason == RETAINED


def test_unbiased(tiny):
    """E[Ẑ] = Z over pools of unequal islands."""
    truth = tiny.log_z(PHI.log_phi)
    asked = [params_of((2, 7, 16)[i % 3], i, ess_threshold=0.7) for i in range(3 * 150)]
    islands = run_each(tiny, asked, PHI)
    ratios = np.exp([Population.pool(islands[i : i + 3]).log_z - truth for i in range(0, len(asked), 3)])
    assert abs(ratios.mean() - 1) < 4 * ratios.std(ddof=1) / math.sqrt(len(ratios))


def test_refuses(tiny):
    part = island(tiny, 4, 0)
    with pytest.raises(ValueError, match="at least one"):
        Population.pool([])
    with pytest.raises(ValueError, match=r"populations\[1\]: must be a Population, got str"):
        Population.pool([part, "x"])
    with pytest.raises(ValueError, match=r"populations\[1\]: has another prompt"):
        Population.pool([part, dataclasses.replace(part, prompt_token_ids=[1])])
    for name, value in {"temperature": 0.5, "resampling": "ssp", "max_tokens": 7}.items():
        other = dataclasses.replace(part, params=dataclasses.replace(part.params, **{name: value}))
        with pytest.raises(ValueError, match=rf"populations\[1\]: has {name}={value!r}, populations\[0\] "):
            Population.pool([part, other])
    with pytest.raises(ValueError, match="island: must lie"):
        dataclasses.replace(part, island=np.full(4, 1))
    with pytest.raises(ValueError, match="island_resampled: shape"):
        dataclasses.replace(part, island_resampled=np.zeros((1, 1), bool))


def test_old_files_load(tiny):
    """Files of before there were errors and islands."""
    part = island(tiny, 4, 0)
    new = ("island", "island_resampled")
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(part.to_bytes())) as now, zipfile.ZipFile(out, "w") as then:
        for member in now.namelist():
            data = now.read(member)
            if member == "meta.npy":
                meta = json.loads(np.load(io.BytesIO(data)).tobytes())
                for name in ("log_z_stderr", "log_z_stderr_reason", "digest"):
                    del meta[name]
                file = io.BytesIO()
                np.save(file, np.frombuffer(json.dumps(meta).encode(), dtype=np.uint8))
                data = file.getvalue()
            if member.removesuffix(".npy") not in new:
                then.writestr(member, data)
    old = Population.from_bytes(out.getvalue())
    assert old.log_z == part.log_z and math.isnan(old.log_z_stderr) and "not known" in old.log_z_stderr_reason
    assert old.n_islands == 1 and old.island.tolist() == [0] * 4
    assert old.island_resampled.tolist() == part.island_resampled.tolist()
