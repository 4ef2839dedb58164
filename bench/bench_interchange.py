"""Interchange interventions, Boundless DAS and steered generation: seconds, beside pyvene's and Hugging Face's.

    python bench/bench_interchange.py --peer bench/peers/.venv/bin/python --json bench/results/interchange_cpu.json
    python bench/bench_interchange.py --parts sweep steer      a part of it; without --peer only fastsmc runs

    same     the largest difference of log-probs between fastsmc's and pyvene's interchange, over the whole vocabulary
    sweep    the most likely token of every pair at 30 layers and the last position; at 30 layers and 16 positions
    train    Boundless DAS at layer 15: a step; `EPOCHS` epochs with all that comes before the first step
    steer    64 texts under a vector at layer 15: `smc`, by Hugging Face with a hook, and `smc` without the vector

SmolLM2 in float32, 8 pairs of 64 random tokens, and new ones for each call, so that nothing is left of the call before.
Three processes: a compiled engine that has places for interventions, a trainer, the peer; they run in turn, `repeats`
times after a warm-up, and each ratio is the median of the ratios of those pairs. What the peer takes for a
configuration or a training step depends on neither layer, nor position, nor step, so it is measured on some and
multiplied: `measured` says on how many.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bench_groups import in_turn, ratio
from machine import ROOT, write_result
from trees import OtherEngine, serve

PARTS = ("same", "sweep", "train", "steer")
PAIRS, TOKENS, LAYER, RANK = 8, 64, 15, 32
#: of `same`: layers and positions where the whole state is interchanged; at the last of them a subspace, too
SAME_LAYERS, SAME_POSITIONS = (0, 7, 15, 29), (-1, -9)
#: of `sweep`: positions of the two sweeps over all layers; and configurations of the peer's, per sweep
SWEEPS: dict[str, tuple[int, ...]] = {"last position": (-1,), "16 positions": tuple(range(-16, 0))}
PEER_CONFIGS = 6
#: of `train`: batches of `PAIRS` in an epoch, epochs, and steps of the peer's that are measured
BATCHES, EPOCHS, PEER_STEPS = 4, 3, 3
#: of `steer`
TEXTS, PROMPT_TOKENS, NEW_TOKENS = 64, 8, 32
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": 256, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 29,
}  # fmt: skip
Tokens: TypeAlias = list[list[int]]
Record: TypeAlias = dict[str, Any]


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Engine:
    """Starts an engine with places for interventions in this process."""

    def __init__(self, model: str) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from fastsmc import LLM
        from fastsmc.models import resolve

        self.llm = LLM(resolve(model), interventions=True, **SETTINGS)

    def sizes(self) -> dict[str, int]:
        config = self.llm.llm_engine.model_config.hf_config
        return {"layers": config.num_hidden_layers, "hidden": config.hidden_size, "vocab": config.vocab_size}

    def interchange(self, bases: Tokens, sources: Tokens, sites: Tokens) -> float:
        """Returns the seconds of one call that gives the most likely token at all sites (layer, position)."""
        from fastsmc.interventions import Interchange

        configs = [Interchange(*site) for site in sites]
        return timed(lambda: self.llm.interchange(bases, sources, configs))

    def differences(self, bases: Tokens, sources: Tokens, sites: Tokens, basis: list, paths: list[str]) -> list[float]:
        """Compares log-probs with those that the peer has written: at sites, and in a subspace at the last of them."""
        import torch

        from fastsmc.interventions import Interchange, Subspace

        each = [[Interchange(*site) for site in sites], [Subspace(*sites[-1], torch.tensor(basis))]]
        out = []
        for configs, path in zip(each, paths, strict=True):
            ours = self.llm.interchange(bases, sources, configs, logits=True)
            theirs = torch.from_numpy(np.load(path))
            off = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs()
            out += off.flatten(1).amax(1).tolist()
        return out

    def smc(self, prompt: list[int], vector: list[float] | None, n: int, max_tokens: int, seed: int) -> float:
        """Returns the seconds of n texts, under a vector or without."""
        import torch

        from fastsmc import SMCParams
        from fastsmc.interventions import Steer

        steer = None if vector is None else Steer(LAYER, torch.tensor(vector))
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ignore_eos=True, seed=seed)
        return timed(lambda: self.llm.smc(prompt, params, intervention=steer))


class Trainer:
    """Trains Boundless DAS in this process, over the model that Hugging Face has of the weights."""

    def __init__(self, model: str) -> None:
        from fastsmc.hf import HFEngine
        from fastsmc.models import resolve

        self.engine = HFEngine(resolve(model))
