"""`score` over Hugging Face: log p0 of continuations by a full recompute of each, under any settings of p0."""

import math

import numpy as np
import pytest
import torch
from tiny import PROMPT, TinyLlama, hf_log_probs, make_llama

from fastsmc import SMCError, SMCParams, hf
from fastsmc.hf import HFEngine

VOCAB, STEPS, STOP = 6, 3, 5
#: ragged, some of them twice, without tokens, and with a stop token in the middle
CONTINUATIONS = [[0, 1, 2], [3], [], [0, 1, 2], [1, STOP, 4, 2, 2, 0, 3], [STOP], [4, 4], [], [3, 1]]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_llama(tmp_path_factory.mktemp("tiny"), VOCAB)


@pytest.mark.parametrize("prompt", [PROMPT, [2]])
@pytest.mark.parametrize("elements", [1 << 25, 20])
def test_score_is_a_full_recompute(path, prompt, elements, monkeypatch):
    """In one pass, and in parts of a row or a few."""
    monkeypatch.setattr(hf, "SCORE_ELEMENTS", elements)
    engine = HFEngine(path, stop_token_ids=[STOP])
    for temperature in (1.0, 0.7):
        scored = engine.score(prompt, CONTINUATIONS, SMCParams(temperature=temperature))
        assert scored.token_ids == CONTINUATIONS and len(scored) == len(CONTINUATIONS)
        assert scored.log_probs.dtype == np.float64 and scored.log_probs.shape == (len(CONTINUATIONS),)
        for ids, got, total in zip(CONTINUATIONS, scored.token_log_probs, scored.log_probs, strict=True):
            want = hf_log_probs(path, prompt, [ids], temperature)[0] if ids else np.zeros(0)
            np.testing.assert_allclose(got, want, atol=2e-5)
            assert got.dtype == np.float64 and total == got.sum()
    assert engine.score(prompt, []).log_probs.shape == engine.score(prompt, [[]] * 0).log_probs.shape == (0,)
    assert engine.score(prompt, [[], []]).log_probs.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "settings",
    [
        dict(top_k=2), dict(top_p=0.6, temperature=1.4), dict(min_p=0.4), dict(min_tokens=2, max_tokens=3),
        dict(min_tokens=2, max_tokens=3, ignore_eos=True),
        dict(logit_bias={1: 2.0, STOP: -1.0}, allowed_token_ids=[0, 1, STOP]),
    ],
)  # fmt: skip
def test_settings_of_p0(path, settings):
    """−inf where they rule a token out; what a group gives for the same tokens, where it can draw them."""
    tiny = TinyLlama(path, VOCAB, STEPS, frozenset([STOP]))
    params = SMCParams(**settings)
    target, sequences = tiny.restricted(params), [list(s) for s in tiny.log_p]
    scored = HFEngine(path, stop_token_ids=[STOP]).score(PROMPT, sequences, params)
    want = np.array([target.log_p.get(tuple(ids), -math.inf) for ids in sequences])
    np.testing.assert_array_equal(np.isneginf(scored.log_probs), np.isneginf(want))
    finite = np.isfinite(want)
    assert finite.sum() > 0 and np.abs(scored.log_probs[finite] - want[finite]).max() < 3e-5
    assert np.isneginf(want).any() or "logit_bias" not in settings


def test_refusals(path):
    engine = HFEngine(path, stop_token_ids=[STOP])
    for prompt, continuations, params, why in (
        ([PROMPT, PROMPT], [[1]], None, "must be one prompt, got 2"),
        ([], [[1]], None, "prompt"),
        (PROMPT, "abc", None, "continuations='abc': must be a list"),
        (PROMPT, 3, None, "continuations=3"),
        (PROMPT, [1, 2], None, r"continuations\[0\]=1: must be a list of token ids"),
        (PROMPT, [[1], ["a"]], None, r"continuations\[1\]\[0\]='a'"),
        (PROMPT, [[1], "a"], None, r"continuations\[1\]='a': this engine has no tokenizer"),
        (PROMPT, [[1], [VOCAB]], None, r"continuations\[1\]\[0\]=6: is beyond the vocabulary"),
        (PROMPT, [[1] * 509], None, r"continuations\[0\]: 509 tokens after a prompt of 5 .* 512 positions"),
        (PROMPT, [[1]], 3, "params=3"),
        (PROMPT, [[1]], SMCParams(stop_token_ids=[9]), "stop_token_ids"),
    ):
        with pytest.raises(ValueError, match=why):
            engine.score(prompt, continuations, params)
    engine.score(PROMPT, [[1] * 508])
    with torch.no_grad():
        engine.trunk.model.lm_head.weight[3] = math.nan
    with pytest.raises(SMCError, match="NaN"):
        engine.score(PROMPT, [[1]])
