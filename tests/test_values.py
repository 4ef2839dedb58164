"""Checks of single values, numbers that JSON lacks, and draws by weight on the host."""

import json
import math

import numpy as np
import pytest
import torch

from fastsmc.population import draw_indices
from fastsmc.values import check_choice, check_float, check_int, json_safe


def test_integers():
    for value in (3, np.int64(3), np.uint8(3), torch.tensor(3)):
        got = check_int("k", value, 0)
        assert got == 3 and type(got) is int
    assert check_int("k", 0, 0) == 0 and check_int("k", 5, 0, 5) == 5
    for value in (True, np.bool_(True), torch.tensor(True), 3.0, "3", None, [3], -1, torch.tensor([3, 4])):
        with pytest.raises(ValueError, match=r"k=.*must be an integer of at least 0"):
            check_int("k", value, 0)
    for value in (0, 6, 2**70):
        with pytest.raises(ValueError, match=rf"^k={value}: must be an integer from 1 to 5$"):
            check_int("k", value, 1, 5)


def test_numbers_and_choices():
    assert check_float("x", np.float32(0.5), 0, 1) == 0.5 and check_float("x", 1, 0, 1) == 1.0
    for value in (True, "1", None, math.nan, 1.5, 10**400, [1]):
        with pytest.raises(ValueError, match=r"x=.*must be a number in \[0, 1\]"):
            check_float("x", value, 0, 1)
    check_choice("c", "a", ("a", "b"))
    for value in ("c", None, 1, ["a"]):
        with pytest.raises(ValueError, match=r"c=.*must be one of 'a', 'b'"):
            check_choice("c", value, ("a", "b"))


def test_json():
    value = {
        "x": math.nan, "rows": [1, -math.inf, (math.inf, True)], "array": np.array([[0.5, -np.inf]]),
        "number": np.float32(0.5), "n": np.int64(2), "bool": np.bool_(True), "text": "inf", "none": None,
    }  # fmt: skip
    plain = {
        "x": None, "rows": [1, None, [None, True]], "array": [[0.5, None]],
        "number": 0.5, "n": 2, "bool": True, "text": "inf", "none": None,
    }  # fmt: skip
    assert json_safe(value) == plain and json.loads(json.dumps(json_safe(value), allow_nan=False)) == plain


def test_draws_by_weight():
    weights = np.array([0.0, 0.5, 0.0, 1.5, 0.0])
    below = np.nextafter(1.0, 0.0)
    assert draw_indices(weights, np.array([0.0, 0.2499, 0.25, below])).tolist() == [1, 1, 3, 3]
    # a total whose product with the largest uniform rounds up to it must not reach what has no weight
    tiny = np.array([5e-324, 0.0])
    assert draw_indices(tiny, np.array([0.0, below])).tolist() == [0, 0]
    rng = np.random.default_rng(0)
    counts = np.bincount(draw_indices(weights, rng.random(40_000)), minlength=5)
    assert counts[[0, 2, 4]].sum() == 0 and abs(counts[1] / 40_000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 40_000)
