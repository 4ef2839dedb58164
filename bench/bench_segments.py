"""What segments cost, what a slow reward does to others, and its_hub's particle filtering over HTTP.

    python bench/bench_segments.py --dtype float32 --peer bench/peers/.venv/bin/python --json FILE

    cost    tokens/s of a group with segments, resampled at every boundary, and of a group without them, whose reward is
            asked at the end only, so that it has no cause to resample before: segments of a fixed number of tokens, and
            sentences. The reward costs nothing. (A group that is resampled at every token has fewer rows for its
            tokens: copies are one row.)
    slow    a group whose reward takes 0 or 200 ms, again and again, beside another group and an ordinary stream: the
            other group's tokens/s and the stream's time between tokens
    its_hub tokens/s of `fastsmc.its` and of its_hub over a stock vLLM server, at the same settings; needs --peer

What is compared runs in turn, `repeats` times after a warm-up, and each ratio is the median of the ratios of pairs.
Tokens are all that were drawn, with those of particles that were not resampled.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
from bench_groups import Engine, in_turn, ratio
from bench_serve import Server
from machine import write_result
from trees import OtherEngine

from fastsmc import Population, SMCParams
from fastsmc.its import ParticleFiltering, StepGeneration
from fastsmc.models import resolve
from fastsmc.potentials import Final, RewardModel

sys.path.insert(0, str(Path(__file__).with_name("peers")))

import its_hub_bench

cloudpickle.register_pickle_by_value(its_hub_bench)  # the engine's process does not find it

PARTS = ("cost", "slow", "its_hub")
PROMPT = "Once upon a time, in a small village"
#: of `cost`: particles, tokens of each, and what a segment is: where no delimiter comes the bound ends it
PARTICLES, MAX_TOKENS = 64, 64
SEGMENTS: dict[str, dict[str, Any]] = {
    "16 tokens": {"max_segment_tokens": 16},
    "sentences": {"segment": (".", "\n"), "max_segment_tokens": 24},
}
#: of `slow`: particles of either group, tokens of the stream, seconds that the reward takes
SLOW_PARTICLES, STREAM_TOKENS, SECONDS = 32, 48, 0.2
#: of `its_hub`: particles, steps, tokens of a step
HUB_PARTICLES, HUB_STEPS, HUB_TOKENS = 32, 4, 16


class Reward(RewardModel):
    """Likes some letters. It answers at once, or in the background after `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(aggregate="last", scale="log")
        self.seconds, self.in_background = seconds, seconds > 0

    def score(self, texts: list[str]) -> list[float]:
        if self.seconds:
            time.sleep(self.seconds)
        return [1.0 + 0.1 * (sum(map(ord, text[-8:])) % 16) for text in texts]


def drawn(population: Population) -> int:
    """Counts all tokens that a group has drawn."""
    return int((population.tokens >= 0).sum())


class Segments(Engine):
    """Adds to an engine what groups with segments are measured by."""

    def timed(self, potential: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Runs a group once: {seconds, tokens, tokens_per_s, boundaries, segment_tokens}."""
        params = SMCParams(
            n_particles=PARTICLES, max_tokens=MAX_TOKENS, ess_threshold=1.0 if settings else 0.0, ignore_eos=True,
            **settings,
        )  # fmt: skip
        begin = time.perf_counter()
        population = self.llm.smc(PROMPT, params, potential)
        seconds, tokens = time.perf_counter() - begin, drawn(population)
        found: dict[str, Any] = {"seconds": seconds, "tokens": tokens, "tokens_per_s": tokens / seconds}
        if population.boundaries is not None and population.segments is not None:
            found["boundaries"] = len(population.boundaries)
            found["segment_tokens"] = sum(map(len, population.token_ids)) / int(population.segments.sum())
        return found

    def beside(self, name: str) -> dict[str, float]:
        """Runs the stream beside both groups: {itl, tokens_per_s}, of the stream and of the group without a reward."""
        other = SMCParams(n_particles=SLOW_PARTICLES, max_tokens=512, ignore_eos=True)
        slow = SMCParams(n_particles=SLOW_PARTICLES, max_tokens=64, max_segment_tokens=16, ignore_eos=True)
        prompt = self.tokenizer.encode(PROMPT)
        waiting, running = (self._add(prompt, self.llm.lead_params(*of)) for of in ((slow, name), (other,)))
        stream = self._add_stream(len(prompt), STREAM_TOKENS)
        times: list[float] = []
        steps, first, begin, ended = 0, 0, 0.0, 0
        engine = self.llm.llm_engine
        while len(times) < STREAM_TOKENS:
            outputs: list[Any] = engine.step()
            now = time.perf_counter()
            for output in outputs:
                payload = (output.kv_transfer_params or {}).get("smc", {})
                if "error" in payload:
                    raise RuntimeError(f"a group failed: {payload['error']}")
                if output.request_id == running:
                    steps = payload.get("step", steps)
                elif output.request_id == waiting and output.finished:
                    ended += 1
                    waiting = self._add(prompt, self.llm.lead_params(slow, name, group=ended))
                elif output.request_id == stream:
                    times += [now] * (len(output.outputs[0].token_ids) - len(times))
                    if not begin:
                        begin, first = now, steps
        engine.abort_request([waiting, running, stream])
        while engine.has_unfinished_requests():
            engine.step()
        gaps = [b - a for a, b in itertools.pairwise(times)]
        return {
            "itl": statistics.median(gaps), "itl_longest": max(gaps),
            "tokens_per_s": SLOW_PARTICLES * (steps - first) / (times[-1] - begin), "rewarded_groups": ended,
        }  # fmt: skip


def cost(engine: Segments, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a record per kind of segments; its ratio is the speed with them over that without."""
    calls: dict[str, Callable[[], Any]] = {"none": functools.partial(engine.timed, Final(Reward()), {})}
    calls |= {name: functools.partial(engine.timed, Reward(), settings) for name, settings in SEGMENTS.items()}
    runs = in_turn(calls, repeats)
    rates = {name: [run["tokens_per_s"] for run in of] for name, of in runs.items()}
    for name, settings in SEGMENTS.items():
        yield {
            "part": "cost", "name": name, "settings": settings, "runs": runs[name], "without": runs["none"],
            "ratio": ratio(rates[name], rates["none"]),
        }  # fmt: skip


def slow(engine: Segments, repeats: int) -> dict[str, Any]:
    """Makes the record of a slow reward beside others; ratios are those of the same load with a free reward."""
    names = {
        label: engine.llm.register_potential(Reward(seconds)) for label, seconds in (("free", 0.0), ("slow", SECONDS))
    }
    runs = in_turn({label: functools.partial(engine.beside, name) for label, name in names.items()}, repeats)
    for name in names.values():
        engine.llm.drop_potential(name)
    by = {key: {label: [run[key] for run in of] for label, of in runs.items()} for key in ("itl", "tokens_per_s")}
    return {
        "part": "slow", "seconds": SECONDS, "runs": runs,
        "itl_ratio": ratio(by["itl"]["slow"], by["itl"]["free"]),
        "throughput_ratio": ratio(by["tokens_per_s"]["slow"], by["tokens_per_s"]["free"]),
    }  # fmt: skip


def its_hub(engine: Segments, server: Server, peer: str, repeats: int) -> dict[str, Any]:
    """Makes the record of both particle filterings; its ratio is our speed over its_hub's."""
    # its_hub's max_steps counts the steps before
    filtering = ParticleFiltering(
        StepGeneration(HUB_STEPS - 1, tokens_per_step=HUB_TOKENS, temperature=1.0), its_hub_bench.Reward(), seed=0
    )

    def ours() -> dict[str, Any]:
        begin = time.perf_counter()
        result = filtering.infer(engine.llm, its_hub_bench.PROMPT, HUB_PARTICLES, return_response_only=False)
        return {
            "seconds": time.perf_counter() - begin, "tokens": drawn(result.population),
            "steps": max(result.steps_used_lst),
        }  # fmt: skip

    url = f"{str(server.client.base_url).rstrip('/')}/v1"
    other = OtherEngine(Path(__file__).parent, its_hub_bench.__file__, url, peer=peer)
    runs = in_turn(
        {"fastsmc.its": ours, "its_hub": lambda: other.run(HUB_PARTICLES, HUB_STEPS - 1, HUB_TOKENS)}, repeats
    )
    other.close()
    for run in itertools.chain(*runs.values()):
        run["tokens_per_s"] = run["tokens"] / run["seconds"]
    rates = {name: [run["tokens_per_s"] for run in of] for name, of in runs.items()}
    return {
        "part": "its_hub", "n_particles": HUB_PARTICLES, "steps": HUB_STEPS, "tokens_per_step": HUB_TOKENS,
        "runs": runs, "ratio": ratio(rates["fastsmc.its"], rates["its_hub"]),
    }  # fmt: skip


def run(
    json_path: str | None, model: str, parts: tuple[str, ...], repeats: int, dtype: str, peer: str | None
) -> list[dict[str, Any]]:
    """Measures `parts`; writes and returns the records."""
    settings: dict[str, Any] = {
        "dtype": dtype, "max_num_seqs": 128, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30,
        "enforce_eager": True,
    }  # fmt: skip
    engine = Segments(model, {"in_process": False, **settings})
    records: list[dict[str, Any]] = []

    def keep(record: dict[str, Any]) -> None:
        records.append(record)
        print(describe(record), flush=True)

    if "cost" in parts:
        for record in cost(engine, repeats):
            keep(record)
    if "slow" in parts:
        keep(slow(engine, repeats))
    if "its_hub" in parts and peer is not None:
        server, loop = Server(str(resolve(model)), False, settings), asyncio.new_event_loop()
        try:
            loop.run_until_complete(server.wait())
            keep(its_hub(engine, server, peer, repeats))
        finally:
            server.close()
    if json_path:
        payload = {"bench": "segments", "model": model, "engine": settings, "n_particles": PARTICLES}
        write_result(json_path, payload | {"max_tokens": MAX_TOKENS, "records": records})
    return records


def describe(record: dict[str, Any]) -> str:
    """Sets a record as a line."""
    ratios = ", ".join(f"{name} {of['median']:.2f}" for name, of in record.items() if name.endswith("ratio"))
    runs = record["runs"] if isinstance(record["runs"], dict) else {key: record[key] for key in ("runs", "without")}
    rates = ", ".join(f"{key} {statistics.median(run['tokens_per_s'] for run in of):.0f}" for key, of in runs.items())
    return f"{record['part']} {record.get('name', '')}: {ratios}; tokens/s {rates}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of those, by commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it no its_hub")
    args = parser.parse_args()
    parts = tuple(args.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(unknown)}: must be of {', '.join(PARTS)}")
    run(args.json, args.model, parts, args.repeats, args.dtype, args.peer)


if __name__ == "__main__":
    main()
