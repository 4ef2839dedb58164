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
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from bench_groups import in_turn, ratio
from machine import ROOT, write_result
from trees import OtherEngine, serve

PARTS = ("same", "sweep", "train", "steer")
PEER = ROOT / "bench" / "peers" / "pyvene_bench.py"
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


# ------------------------------------------------------------------------------------------------------------ the parts
class Draws:
    """Draws pairs, labels, a basis and a vector; never the same pairs again."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.rng, self.sizes = np.random.default_rng(0), sizes

    def pairs(self, n: int = PAIRS) -> tuple[Tokens, Tokens]:
        return tuple(self.rng.integers(self.sizes["vocab"], size=(2, n, TOKENS)).tolist())

    def tokens(self, n: int) -> list[int]:
        return self.rng.integers(self.sizes["vocab"], size=n).tolist()

    def basis(self) -> list[list[float]]:
        return np.linalg.qr(self.rng.standard_normal((self.sizes["hidden"], RANK)))[0].astype(np.float32).tolist()

    def vector(self) -> list[float]:
        return (0.1 * self.rng.standard_normal(self.sizes["hidden"])).tolist()


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
    sites, basis = [[layer, position] for layer in SAME_LAYERS for position in SAME_POSITIONS], draws.basis()
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("whole.npy", "subspace.npy")]
        peer.interchange(bases, sources, sites, None, paths[0])
        peer.interchange(bases, sources, sites[-1:], basis, paths[1])
        found = engine.differences(bases, sources, sites, basis, paths)
    for site, off in zip([*sites, sites[-1]], found, strict=True):
        yield {"case": "same", "layer": site[0], "position": site[1], "difference": off}
    yield {"case": "same", "difference": max(found), "rank": RANK}


def spread(sites: Tokens, n: int) -> Tokens:
    """Takes n sites, or all, evenly from first to last."""
    return sites if len(sites) <= n else [sites[round(i * (len(sites) - 1) / (n - 1))] for i in range(n)]


def sweep(engine: Any, peer: Any, draws: Draws, repeats: int) -> Iterator[Record]:
    """Yields a record per sweep over all layers."""
    for name, positions in SWEEPS.items():
        sites = [[layer, position] for layer in range(draws.sizes["layers"]) for position in positions]
        measured = spread(sites, PEER_CONFIGS)
        calls: dict[str, Callable[[], Any]] = {"ours": lambda sites=sites: engine.interchange(*draws.pairs(), sites)}
        if peer is not None:
            calls["peer"] = lambda measured=measured: peer.interchange(*draws.pairs(), measured)
        found = in_turn(calls, repeats)
        theirs = [sum(seconds) / len(measured) * len(sites) for seconds in found.get("peer", [])]
        yield against(f"sweep, {name}", found["ours"], theirs, configs=len(sites), measured=len(measured))


def steer(engine: Any, peer: Any, draws: Draws, repeats: int) -> Iterator[Record]:
    """Yields a record of steered texts: `ratio` to Hugging Face, `of_unsteered` to `smc` without the vector."""
    vector = draws.vector()
    count = iter(range(1_000_000))

    def call(steered: bool) -> float:
        return engine.smc(draws.tokens(PROMPT_TOKENS), vector if steered else None, TEXTS, NEW_TOKENS, next(count))

    calls: dict[str, Callable[[], Any]] = {"ours": lambda: call(True), "unsteered": lambda: call(False)}
    if peer is not None:
        calls["peer"] = lambda: peer.generate(
            draws.tokens(PROMPT_TOKENS), vector, LAYER, TEXTS, NEW_TOKENS, next(count)
        )
    found = in_turn(calls, repeats)
    more = {"n": TEXTS, "prompt_tokens": PROMPT_TOKENS, "max_tokens": NEW_TOKENS, "unsteered_runs": found["unsteered"]}
    of_unsteered = ratio(found["unsteered"], found["ours"])  # of speeds
    yield against("steer", found["ours"], found.get("peer"), **more, of_unsteered=of_unsteered)


def run(
    json_path: str | None = None, model: str = "smollm2", peer: str | None = None, parts: Sequence[str] = PARTS,
    repeats: int = 3,
) -> list[Record]:  # fmt: skip
    """Measures the parts; writes and returns a record for each case."""
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    options = ("--model", model)
    served = {name: OtherEngine(ROOT, __file__, "--serve", name, *options) for name in ("engine", "trainer")}
    other = None if peer is None else OtherEngine(ROOT, str(PEER), "--serve", "--model", resolved(model), peer=peer)
    draws = Draws(served["engine"].sizes())
    each: dict[str, Callable[[], Iterator[Record]]] = {
        "same": lambda: same(served["engine"], other, draws),
        "sweep": lambda: sweep(served["engine"], other, draws, repeats),
        "train": lambda: train(served["trainer"], other, draws, repeats),
        "steer": lambda: steer(served["engine"], other, draws, repeats),
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


def resolved(model: str) -> str:
    from fastsmc.models import resolve

    return str(resolve(model))


def describe(record: Record) -> str:
    if "difference" in record:
        where = f"layer {record['layer']}, position {record['position']}" if "layer" in record else "at most"
        return f"{record['case']:24}: log-probs differ by {record['difference']:.2g}, {where}"
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
    parser.add_argument("--serve", choices=("engine", "trainer"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: {"engine": Engine, "trainer": Trainer}[args.serve](args.model))
        return
    run(args.json, args.model, args.peer, args.parts, args.repeats)


if __name__ == "__main__":
    main()
