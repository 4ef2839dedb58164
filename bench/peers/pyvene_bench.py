"""Seconds of pyvene's interchange interventions and Boundless DAS, and of generation by Hugging Face under a hook.

    P=$PWD/bench/peers/.venv
    LD_PRELOAD=$P/lib/libiomp5.so $P/bin/python bench/peers/pyvene_bench.py [--json FILE]

SmolLM2-135M, float32, 8 pairs of 64 random tokens. `bench/bench_interchange.py` calls the same methods in turn with
ours, with pairs of its own. What is done so that pyvene shows its best: `use_fast`, one `IntervenableModel` per
configuration, which is made outside the clock, and no original output where none is asked for. What it does at each
call cannot be helped: a pass over the sources and a pass over the bases, with logits at all positions.

Training goes as in pyvene's Boundless DAS tutorial: Adam with 1e-3 for the rotation and 1e-2 for the boundary, linear
warm-up over a tenth of the steps, cross entropy + 1.0 · boundary, temperatures from 50 to 0.1 in bfloat16; but batches
of 8 and no accumulation of gradients. Known defects of 0.1.8: the mask of dimension 0 is never above ½, and a call of
`train_alignment` removes all forward hooks of the model; hence the loop here, and a model of its own for generation.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import runpy
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

with contextlib.redirect_stdout(io.StringIO()):  # it says on stdout what else could be installed
    import pyvene
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import ROOT, write_result
from trees import serve

PAIRS, TOKENS, LAYER, RANK = 8, 64, 15, 32
#: where `--json` measures vanilla interventions, positions from the end
LAYERS, POSITIONS = (0, 7, 15, 29), (-1, -9)
#: of steered generation: texts, tokens of the prompt, and of each text
TEXTS, PROMPT_TOKENS, NEW_TOKENS = 64, 8, 32
Tokens = list[list[int]]


class Pyvene:
    """Measures pyvene on one model, and generation with a hook on another copy of it."""

    def __init__(self, model: str | Path) -> None:
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # of `use_fast`, at each model that is made
        self.path = model
        self.model = self._load()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.hidden = self.model.config.hidden_size
        self.vocab = self.model.config.vocab_size

    def _load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(str(self.path), dtype=torch.float32).eval()

    def _intervenable(self, layer: int, kind: type, rank: int | None = None) -> Any:
        representation = pyvene.RepresentationConfig(layer, "block_output", low_rank_dimension=rank)
        config = pyvene.IntervenableConfig(representations=[representation], intervention_types=kind)
        with contextlib.redirect_stdout(io.StringIO()):
            made = pyvene.IntervenableModel(config, self.model, use_fast=True)
        made.disable_model_gradients()
        return made

    def versions(self) -> dict[str, Any]:
        """Says what is measured, and by how many threads."""
        names = ("pyvene", "torch", "transformers")
        return {name: importlib.metadata.version(name) for name in names} | {"threads": torch.get_num_threads()}

    def sizes(self) -> dict[str, int]:
        return {"layers": self.model.config.num_hidden_layers, "hidden": self.hidden, "vocab": self.vocab}

    # ---------------------------------------------------------------------------------------------------- interchange
    @torch.no_grad()
    def _logits(self, made: Any, bases: Tokens, sources: Tokens, position: int) -> tuple[float, torch.Tensor]:
        """Runs one configuration: seconds, and the last position's logits (B, V)."""
        base, source = ({"input_ids": torch.tensor(ids)} for ids in (bases, sources))
        start = time.perf_counter()
        _, out = made(base, [source], {"sources->base": position % len(bases[0])}, use_cache=False)
        logits = out.logits[:, -1]
        logits.argmax(-1)
        return time.perf_counter() - start, logits

    def interchange(
        self, bases: Tokens, sources: Tokens, configs: list[list[int]], basis: list | None = None, path: str = ""
    ) -> list[float]:
        """Runs configurations (layer, position), one after the other: the seconds of each.

        Args:
            basis: (H, k), orthonormal columns, of the subspace that is interchanged; None: all of the hidden state.
            path: where the logits (C, B, V) go, a .npy file; "": nowhere.
        """
        seconds: list[float] = []
        rows: list[torch.Tensor] = []
        for layer, position in configs:
            if basis is None:
                made = self._intervenable(layer, pyvene.VanillaIntervention)
            else:
                made = self._intervenable(layer, pyvene.LowRankRotatedSpaceIntervention, len(basis[0]))
                (intervention,) = made.interventions.values()
                intervention.rotate_layer.weight = torch.tensor(basis)
            spent, logits = self._logits(made, bases, sources, position)
            seconds.append(spent)
            if path:
                rows.append(logits)
        if path:
            np.save(path, torch.stack(rows).numpy())
        return seconds

    # ------------------------------------------------------------------------------------------------- Boundless DAS
    def train(
        self, bases: Tokens, sources: Tokens, labels: list[int], layer: int, position: int, steps: int, total: int
    ) -> dict[str, Any]:
        """Trains on the same batch for `steps` of a schedule of `total` steps: {seconds per step, loss per step}."""
        made = self._intervenable(layer, pyvene.BoundlessRotatedSpaceIntervention)
        (intervention,) = made.interventions.values()
        optimiser = torch.optim.Adam([
            {"params": intervention.rotate_layer.parameters(), "lr": 1e-3},
            {"params": [intervention.intervention_boundaries], "lr": 1e-2},
        ])  # fmt: skip
        schedule = get_linear_schedule_with_warmup(optimiser, int(0.1 * total), total)
        temperatures = torch.linspace(50.0, 0.1, total).to(torch.bfloat16)
        made.set_temperature(temperatures[0])
        base, source = ({"input_ids": torch.tensor(ids)} for ids in (bases, sources))
        target, at = torch.tensor(labels), position % len(bases[0])
        seconds, losses = [], []
        for step in range(steps):
            start = time.perf_counter()
            _, out = made(base, [source], {"sources->base": at}, use_cache=False)
            cross_entropy = torch.nn.functional.cross_entropy(out.logits[:, -1], target)
            loss = cross_entropy + 1.0 * intervention.intervention_boundaries.sum()
            loss.backward()
            optimiser.step()
            schedule.step()
            made.set_zero_grad()
            made.set_temperature(temperatures[step])
            losses.append(float(loss.detach()))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "loss": losses}

    # ----------------------------------------------------------------------------------------------------- generation
    @torch.no_grad()
    def generate(
        self, prompts: list[list[int]], vector: list[float], at: str, layer: int, n: int, max_tokens: int, seed: int
    ) -> float:
        """Generates n texts per prompt, prompts of one length, under a hook that adds a vector at "all" positions or
        those "generated", in one batch, as Hugging Face samples: seconds."""
        if not hasattr(self, "steered"):
            self.steered = self._load()
        added, ids = torch.tensor(vector), torch.tensor(prompts)

        def steer(module: Any, inputs: Any, output: Any) -> Any:
            if at == "generated" and inputs[0].shape[1] > 1:  # the prompt
                return output
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        torch.manual_seed(seed)
        handle = self.steered.model.layers[layer].register_forward_hook(steer)
        try:
            start = time.perf_counter()
            out = self.steered.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                num_return_sequences=n, max_new_tokens=max_tokens, min_new_tokens=max_tokens, pad_token_id=0,
            )  # fmt: skip
            seconds = time.perf_counter() - start
        finally:
            handle.remove()
        assert out.shape == (len(ids) * n, ids.shape[1] + max_tokens)
        return seconds


def run(peer: Pyvene, repeats: int) -> dict[str, Any]:
    """Measures all of it `repeats` times after a warm-up, on pairs from one seed."""
    rng = np.random.default_rng(0)
    bases, sources = rng.integers(peer.vocab, size=(2, PAIRS, TOKENS)).tolist()
    labels = rng.integers(peer.vocab, size=PAIRS).tolist()
    basis = np.linalg.qr(rng.standard_normal((peer.hidden, RANK)))[0].astype(np.float32).tolist()
    vector = (0.1 * rng.standard_normal(peer.hidden)).tolist()
    configs = [[layer, position] for layer in LAYERS for position in POSITIONS]

    def median(call: Callable[[], list[float]]) -> dict[str, Any]:
        call()
        found = [seconds for _ in range(repeats) for seconds in call()]
        return {"median": statistics.median(found), "seconds": found}

    return {
        "bench": "peer", "peer": "pyvene", **peer.versions(), "pairs": PAIRS, "tokens": TOKENS, "dtype": "float32",
        "vanilla": {"configs": configs, **median(lambda: peer.interchange(bases, sources, configs))},
        "subspace": {"rank": RANK, **median(lambda: peer.interchange(bases, sources, configs[:1], basis))},
        "boundless": {
            "layer": LAYER, **median(lambda: peer.train(bases, sources, labels, LAYER, -1, 3, 30)["seconds"])
        },
        "generate": {
            "n": TEXTS, "prompt_tokens": PROMPT_TOKENS, "max_tokens": NEW_TOKENS,
            **median(lambda: [peer.generate([bases[0][:PROMPT_TOKENS]], vector, "all", LAYER, TEXTS, NEW_TOKENS, 0)]),
        },
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="directory of the model; by default smollm2, as fastsmc unpacks it")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the record here too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # models.py by itself: fastsmc is not installed in this environment.
    model = arguments.model or str(runpy.run_path(str(ROOT / "fastsmc" / "models.py"))["smollm2"]())
    if arguments.serve:
        serve(lambda: Pyvene(model))
        return
    record = run(Pyvene(model), arguments.repeats)
    print(json.dumps(record, indent=2))
    if arguments.json:
        write_result(arguments.json, record)


if __name__ == "__main__":
    main()
