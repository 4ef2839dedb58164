"""Interchange interventions, Boundless DAS and steered generation: seconds, beside pyvene's and Hugging Face's.

    python bench/bench_interchange.py --peer bench/peers/.venv/bin/python --json bench/results/interchange_cpu.json
    python bench/bench_interchange.py --parts sweep steer      a part of it; without --peer only fastsmc runs

    same     the largest difference of log-probs between fastsmc's and pyvene's interchange, over the whole vocabulary
    sweep    the most likely token of every pair at 30 layers and the last position; at 30 layers and 16 positions
    train    Boundless DAS at layer 15: a step; `EPOCHS` epochs with all that comes before the first step
    steer    64 texts per prompt under a vector at layer 15: `smc`, by Hugging Face with a hook, and `smc` without the
             vector; by prompts, their tokens, and those of the texts, since `smc` has a prompt's keys and values once;
             prompts are from the pages in docs/, as random tokens have no likely continuation that texts could share.
             Of several prompts Hugging Face has one batch. The vector is added at all positions, or at those
             generated, for which a prompt needs no keys and values of its own

SmolLM2 in float32, 8 pairs of 64 random tokens, and new ones for each call, so that nothing is left of the call before.
The vector hardly changes what is generated, so that as many texts share their tokens with it as without.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bench_groups import Clock, in_turn, ratio
from machine import ROOT, write_result
from trees import OtherEngine, serve

PARTS = ("same", "sweep", "train", "steer")
PEER = ROOT / "bench" / "peers" / "pyvene_bench.py"
PAIRS, TOKENS, LAYER, RANK = 8, 64, 15, 32
#: of `same`: layers and positions where the whole state is interchanged; a subspace is at `LAYER`
SAME_LAYERS, SAME_POSITIONS = (0, 7, 15, 29), (-1, -9)
#: of `sweep`: positions of the two sweeps over all layers; and configurations of the peer's, per sweep
SWEEPS: dict[str, tuple[int, ...]] = {"last position": (-1,), "16 positions": tuple(range(-16, 0))}
PEER_CONFIGS = 6
#: of `train`: batches of `PAIRS` in an epoch, epochs, and steps of the peer's that are measured
BATCHES, EPOCHS, PEER_STEPS = 4, 3, 3
#: what makes a training step
STEP = ("fastsmc.alignment.das:Fit.step", "fastsmc.alignment.frozen:Frozen.states")
#: of `steer`: texts per prompt; prompts, their tokens, those of each text, where the vector is added; its scale
TEXTS, SCALE = 64, 1e-3
STEERED = (
    (PAIRS, TOKENS, 16, "all"), (1, TOKENS, 16, "all"), (1, TOKENS, 16, "generated"), (1, TOKENS, 32, "all"),
    (1, 8, 32, "all"),
)  # fmt: skip
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_num_seqs": PAIRS * TEXTS, "max_model_len": 512, "kv_cache_memory_bytes": 1 << 32,
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

    def encode(self, text: str) -> list[int]:
        return self.llm.get_tokenizer().encode(text)

    def interchange(self, bases: Tokens, sources: Tokens, sites: Tokens) -> float:
        """Returns the seconds of one call that gives the most likely token at all sites (layer, position)."""
        from fastsmc.interventions import Interchange

        configs = [Interchange(layer, position) for layer, position in sites]
        return timed(lambda: self.llm.interchange(bases, sources, configs))

    def differences(self, bases: Tokens, sources: Tokens, sites: Tokens, basis: list | None, path: str) -> list[float]:
        """Returns, per site, the largest difference of log-probs from those that the peer has written to a file."""
        import torch

        from fastsmc.interventions import Interchange, Subspace

        if basis is None:
            configs: list[Any] = [Interchange(layer, position) for layer, position in sites]
        else:
            configs = [Subspace(layer, position, torch.tensor(basis)) for layer, position in sites]
        ours = self.llm.interchange(bases, sources, configs, logits=True)
        theirs = torch.from_numpy(np.load(path))
        return (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().flatten(1).amax(1).tolist()

    def smc(self, prompts: Tokens, vector: list[float] | None, at: str, n: int, max_tokens: int, seed: int) -> float:
        """Returns the seconds of n texts per prompt, under a vector or without."""
        import torch

        from fastsmc import SMCParams
        from fastsmc.interventions import Steer

        steer = None if vector is None else Steer(LAYER, torch.tensor(vector), at=at)
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ignore_eos=True, seed=seed)
        return timed(lambda: self.llm.smc(prompts, params, intervention=steer))


class Trainer:
    """Trains Boundless DAS in this process, over the model that Hugging Face has of the weights."""

    def __init__(self, model: str) -> None:
        from fastsmc.hf import HFEngine
        from fastsmc.models import resolve

        self.engine = HFEngine(resolve(model))
        self.clock = Clock(*STEP)

    def train(self, seed: int) -> dict[str, float]:
        """Trains on new random texts and returns the seconds of all of it, and per step."""
        from fastsmc.alignment import CausalModel, train_alignment

        vocab = self.engine.trunk.vocab_size
        texts = CausalModel(
            ["text", "v", "said"], {"said": lambda v: v}, answers={0: 1, 1: 2},
            prompt=lambda inputs: np.random.default_rng(inputs["text"]).integers(vocab, size=TOKENS).tolist(),
        )  # fmt: skip

        def sampler(rng: np.random.Generator) -> dict[str, int]:
            return {"text": int(rng.integers(1 << 62)), "v": int(rng.integers(2))}

        steps = EPOCHS * BATCHES
        self.clock.spent.clear()
        total = timed(
            lambda: train_alignment(
                self.engine, texts, LAYER, -1, variable="v", sampler=sampler, n_pairs=BATCHES * PAIRS, n_eval=2,
                steps=steps, batch=PAIRS, seed=seed, use_tqdm=False,
            )
        )  # fmt: skip
        return {"total": total, "step": sum(self.clock.spent.values()) / steps}


# ------------------------------------------------------------------------------------------------------------ the parts
class Draws:
    """Draws pairs, labels, a basis and a vector; never the same pairs again."""

    def __init__(self, sizes: dict[str, int], text: list[int]) -> None:
        self.rng, self.sizes, self.text = np.random.default_rng(0), sizes, text

    def pairs(self) -> tuple[Tokens, Tokens]:
        bases, sources = self.rng.integers(self.sizes["vocab"], size=(2, PAIRS, TOKENS)).tolist()
        return bases, sources

    def tokens(self, n: int) -> list[int]:
        return self.rng.integers(self.sizes["vocab"], size=n).tolist()

    def prompts(self, n: int, length: int) -> Tokens:
        """Draws stretches of the text of docs/."""
        begins = self.rng.integers(len(self.text) - length, size=n).tolist()
        return [self.text[begin : begin + length] for begin in begins]

    def basis(self) -> list[list[float]]:
        return np.linalg.qr(self.rng.standard_normal((self.sizes["hidden"], RANK)))[0].astype(np.float32).tolist()

    def vector(self) -> list[float]:
        return (SCALE * self.rng.standard_normal(self.sizes["hidden"])).tolist()


def against(name: str, ours: list[float], theirs: list[float] | None, **more: Any) -> Record:
    """Makes a record of seconds measured in turn; the ratio is how many times as long the peer takes."""
    record: Record = {"case": name, "seconds": statistics.median(ours), "runs": ours, **more}
    if theirs:
        record |= {"peer_seconds": statistics.median(theirs), "peer_runs": theirs, "ratio": ratio(theirs, ours)}
    return record


def same(engine: Any, peer: Any, draws: Draws) -> Iterator[Record]:
    """Yields the largest difference from the peer's log-probs, per configuration."""
    if peer is None:
        return
    bases, sources = draws.pairs()
    whole = [[layer, position] for layer in SAME_LAYERS for position in SAME_POSITIONS]
    part = [[LAYER, position] for position in SAME_POSITIONS]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "logits.npy")
        for sites, basis in ((whole, None), (part, draws.basis())):
            peer.interchange(bases, sources, sites, basis, path)
            found = engine.differences(bases, sources, sites, basis, path)
            for site, off in zip(sites, found, strict=True):
                more = {} if basis is None else {"rank": RANK}
                yield {"case": "same", "layer": site[0], "position": site[1], **more, "difference": off}


def spread(sites: Tokens, n: int) -> Tokens:
    """Takes n sites, or all, evenly from first to last."""
    return sites if len(sites) <= n else [sites[round(i * (len(sites) - 1) / (n - 1))] for i in range(n)]


def sweep(engine: Any, peer: Any, draws: Draws, repeats: int) -> Iterator[Record]:
    """Yields a record per sweep over all layers."""
    for name, positions in SWEEPS.items():
        sites = [[layer, position] for layer in range(draws.sizes["layers"]) for position in positions]
        measured = spread(sites, PEER_CONFIGS)

        def ours(sites: Tokens = sites) -> float:
            return engine.interchange(*draws.pairs(), sites)

        def peers(measured: Tokens = measured) -> list[float]:
            return peer.interchange(*draws.pairs(), measured)

        calls: dict[str, Callable[[], Any]] = {"ours": ours} if peer is None else {"ours": ours, "peer": peers}
        found = in_turn(calls, repeats)
        theirs = [sum(seconds) / len(measured) * len(sites) for seconds in found.get("peer", [])]
        yield against(f"sweep, {name}", found["ours"], theirs, configs=len(sites), measured=len(measured))


def train(trainer: Any, peer: Any, draws: Draws, repeats: int) -> Iterator[Record]:
    """Yields a record of a step, and one of all epochs with what is computed before the first step."""
    steps, seeds = EPOCHS * BATCHES, iter(range(0, 1_000_000, 10))  # a run takes a seed and the next
    calls: dict[str, Callable[[], Any]] = {"ours": lambda: trainer.train(next(seeds))}
    if peer is not None:
        calls["peer"] = lambda: peer.train(*draws.pairs(), draws.tokens(PAIRS), LAYER, -1, PEER_STEPS, steps)["seconds"]
    found = in_turn(calls, repeats)
    theirs = [sum(seconds) / len(seconds) for seconds in found.get("peer", [])]
    more = {"measured": PEER_STEPS}
    yield against("DAS step", [run["step"] for run in found["ours"]], theirs, **more)
    totals = [run["total"] for run in found["ours"]]
    yield against(f"DAS, {EPOCHS} epochs", totals, [steps * one for one in theirs], steps=steps, **more)


def steer(engine: Any, peer: Any, draws: Draws, repeats: int, cases: Sequence[int] | None) -> Iterator[Record]:
    """Yields a record of steered texts: `ratio` to Hugging Face, `of_unsteered` to `smc` without the vector."""
    vector, seeds = draws.vector(), iter(range(1_000_000))

    for case in STEERED if cases is None else [STEERED[i] for i in cases]:
        n, n_prompt, n_new, at = case

        def ours(under: list[float] | None, case: tuple = case) -> float:
            n, n_prompt, n_new, at = case
            return engine.smc(draws.prompts(n, n_prompt), under, at, TEXTS, n_new, next(seeds))

        def theirs(case: tuple = case) -> float:
            n, n_prompt, n_new, at = case
            return peer.generate(draws.prompts(n, n_prompt), vector, at, LAYER, TEXTS, n_new, next(seeds))

        calls: dict[str, Callable[[], Any]] = {
            "ours": functools.partial(ours, vector), "unsteered": functools.partial(ours, None),
        }  # fmt: skip
        if peer is not None:
            calls["peer"] = theirs
        found = in_turn(calls, repeats)
        more = {
            "n": TEXTS,
            "prompts": n,
            "prompt_tokens": n_prompt,
            "max_tokens": n_new,
            "unsteered_runs": found["unsteered"],
        }
        of_unsteered = ratio(found["unsteered"], found["ours"])  # of speeds
        name = f"steer, {n} prompt{'s' * (n > 1)}, {n_prompt} + {n_new} tokens{', generated ones' * (at != 'all')}"
        yield against(name, found["ours"], found.get("peer"), **more, of_unsteered=of_unsteered)


def run(
    json_path: str | None = None, model: str = "smollm2", peer: str | None = None, parts: Sequence[str] = PARTS,
    repeats: int = 3, steered: Sequence[int] | None = None,
) -> list[Record]:  # fmt: skip
    """Measures the parts; writes and returns a record for each case."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    options = ("--model", model)
    served = {name: OtherEngine(ROOT, __file__, "--serve", name, *options) for name in ("engine", "trainer")}
    other = None if peer is None else OtherEngine(ROOT, str(PEER), "--serve", "--model", resolved(model), peer=peer)
    draws = Draws(served["engine"].sizes(), served["engine"].encode(pages()))
    each: dict[str, Callable[[], Iterator[Record]]] = {
        "same": lambda: same(served["engine"], other, draws),
        "sweep": lambda: sweep(served["engine"], other, draws, repeats),
        "train": lambda: train(served["trainer"], other, draws, repeats),
        "steer": lambda: steer(served["engine"], other, draws, repeats, steered),
    }
    records = []
    for part in parts:
        for record in each[part]():
            records.append(record)
            print(describe(record), flush=True)
    if json_path:
        more = {"pairs": PAIRS, "tokens": TOKENS, "layer": LAYER, "repeats": repeats, "engine": SETTINGS}
        versions = None if other is None else other.versions()
        write_result(json_path, {"bench": "interchange", **more, "peer": versions, "records": records})
    for process in (*served.values(), *([] if other is None else [other])):
        process.close()
    return records


def pages() -> str:
    return "\n".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def resolved(model: str) -> str:
    from fastsmc.models import resolve

    return str(resolve(model))


def describe(record: Record) -> str:
    if "difference" in record:
        where = f"layer {record['layer']}, position {record['position']}"
        what = f"a subspace of {record['rank']} dimensions" if "rank" in record else "the whole state"
        return f"{record['case']:24}: log-probs differ by {record['difference']:.2g} with {what}, {where}"
    text = f"{record['case']:24}: {record['seconds']:.3f} s"
    if "ratio" in record:
        text += f", {record['ratio']['median']:.1f} times as fast as the peer ({record['peer_seconds']:.2f} s)"
    if "of_unsteered" in record:
        text += f", {record['of_unsteered']['median']:.2f} of the speed without the vector"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it only fastsmc runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steered", type=int, nargs="+", help="cases of the part steer, by number; default: all")
    parser.add_argument("--serve", choices=("engine", "trainer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: {"engine": Engine, "trainer": Trainer}[args.serve](args.model))
        return
    run(args.json, args.model, args.peer, args.parts, args.repeats, args.steered)


if __name__ == "__main__":
    main()
