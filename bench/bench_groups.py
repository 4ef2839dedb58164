"""Several groups, and groups beside ordinary requests: against stock sampling, by the step, and by other clients' wait.

    python bench/bench_groups.py --json bench/results/groups_cpu.json
    python bench/bench_groups.py --parts shared --against ../old --json …      two source trees, in turn

    shared    tokens/s of `llm.smc` over G prompts of unequal length and of stock `n=N` sampling on the same prompts, in
              one engine, in turn; where LLM takes `shared_forward`, also of an engine with "never"
    outside   ms of a step outside forward, lm head and the five ops, by G: a cohort of one Lexicon, and mixed kinds
    beside    a group that always runs and ordinary requests, in one process: inter-token latency of one stream, time to
              first token of a long prompt, 16 streams; each without and with the group, and the group's own tokens/s
              alone and beside them; where LLM takes `max_particle_rows_per_step`, by its values

Every engine has its own process (trees.py); what is compared runs in turn, `repeats` times after a warm-up, and each
ratio is the median of the ratios of those pairs. A step's time in `outside` is that of a run of T tokens less that of a
run of T/4, over the steps between: what comes once per call (prefill, set-up, populations) is `once_ms`. Clocks there
are the host's, so the part is for CPUs.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from bench_smc import forward_share
from machine import ROOT, source, write_result
from trees import OtherEngine, serve

PARTS = ("shared", "outside", "beside")
#: G × N; one group is what `--against` is about
SHAPES = ((16, 16), (64, 8), (4, 64), (1, 256))
#: of `shared`: groups that are run apart, too; more would take minutes
MOST_APART = 16
#: of `outside`: groups, of so many particles each
GROUPS, PARTICLES = (1, 16, 64), 4
#: of `beside`: particles of the group, tokens of a stream's and of the long prompt, streams, tokens a forward takes
PARTICLES_BESIDE, STREAM_PROMPT, LONG_PROMPT, STREAMS, BATCHED_TOKENS = 256, 64, 2500, 16, 512
#: of `beside`: what the group generates before another takes its place, and steps that it runs before the clock starts
GROUP_TOKENS, LEAD_STEPS = 256, 2
#: values of `max_particle_rows_per_step` beside the engine's own choice; the last is no bound
BOUNDS = (64, 128, 256)
KV_BYTES = 1 << 30
PROMPT, SEA, WORDS = "Once upon a time, in a small village", " the sea and a boat", r"(?: [a-z]+[,.]?)+"
#: potentials by kind; "mixed" takes them in turn, group by group
KINDS = ("lexicon", "regex", "text", "none")
#: what `outside` leaves out: the calls of the model, and the five ops
INSIDE = (
    "fastsmc.vllm.runner:Model.hidden", "fastsmc.vllm.runner:Model.logits",
    "fastsmc.ops:weigh", "fastsmc.ops:draw", "fastsmc.ops:uniforms", "fastsmc.ops:resample", "fastsmc.ops:reindex",
)  # fmt: skip
Times: TypeAlias = dict[str, float]
Engines: TypeAlias = dict[str, OtherEngine]
Bounds: TypeAlias = tuple[int, ...]
Key = TypeVar("Key")


class Clock:
    """Times functions from outside: `spent` seconds by name, of the outermost where they call each other."""

    def __init__(self, *names: str) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._depth = 0
        for name in names:
            module, _, path = name.partition(":")
            *owners, last = path.split(".")
            try:
                owner = functools.reduce(getattr, owners, import_module(module))
                function = getattr(owner, last)
            except (ImportError, AttributeError) as error:
                raise SystemExit(f"bench_groups.py times {name}, which is not there ({error}): change INSIDE") from None
            setattr(owner, last, self._timed(function, last))

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._depth -= 1
                if self._depth == 0:
                    self.spent[part] += time.perf_counter() - start

        return wrapper


class Engine:
    """Starts an engine in this process, of the fastsmc that Python finds; each part uses some of the methods.

    Args:
        settings: arguments of `fastsmc.LLM`; "in_process" and "timed" are of this class.
    """

    def __init__(self, model: str, settings: dict[str, Any]) -> None:
        if settings.pop("in_process"):
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        self.clock = Clock(*(INSIDE if settings.pop("timed", False) else ()))
        from fastsmc import LLM
        from fastsmc.models import resolve

        self.llm = LLM(resolve(model), **{"dtype": "bfloat16", **settings})
        self.tokenizer = self.llm.get_tokenizer()
        self._random = np.random.default_rng(0)
        self._text: list[int] = []

    def takes(self, keyword: str) -> bool:
        """Says whether this tree's `fastsmc.LLM` has the keyword."""
        return keyword in inspect.signature(type(self.llm)).parameters

    # -------------------------------------------------------------------------------------------- prompts, potentials
    def _prompts(self, count: int) -> list[list[int]]:
        """Cuts prompts of 8 to 48 tokens out of what the model itself wrote at temperature 1."""
        if not self._text:
            from vllm import SamplingParams

            start, length = self.tokenizer.encode(PROMPT), 320
            story = SamplingParams(max_tokens=length - len(start), temperature=1.0, seed=0, ignore_eos=True)
            output = self.llm.generate({"prompt_token_ids": start}, story, use_tqdm=False)[0]
            self._text = start + list(output.outputs[0].token_ids)
        begins = [4 * i % 256 for i in range(count)]
        return [self._text[begin : begin + 8 + 7 * i % 41] for i, begin in enumerate(begins)]

    @functools.cached_property
    def _potentials(self) -> dict[str, Any]:
        from fastsmc.potentials import Lexicon, Regex, TextPotential

        return {
            "lexicon": Lexicon(token_ids=self.tokenizer.encode(SEA), weight=0.5),
            "regex": Regex(WORDS),
            "text": TextPotential(lambda texts: [-0.01 * len(text) for text in texts], every_step=True),
            "none": None,
        }

    # ------------------------------------------------------------------------------------------------ whole groups
    def smc(self, groups: int, n: int, max_tokens: int, kind: str) -> Times:
        """Runs groups of n particles: the seconds by part, the whole as "total", and the share of rows that went
        through the model."""
        from fastsmc import SMCParams

        kinds = [KINDS[i % len(KINDS)] if kind == "mixed" else kind for i in range(groups)]
        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        prompts, potentials = self._prompts(groups), [self._potentials[each] for each in kinds]
        self.clock.spent.clear()
        start = time.perf_counter()
        populations = self.llm.smc(prompts, params, potentials)
        total = time.perf_counter() - start
        share = statistics.mean(map(forward_share, populations)) if max_tokens > 1 else 1.0
        return {"total": total, **self.clock.spent, "forward_share": share}

    def stock(self, groups: int, n: int, max_tokens: int) -> Times:
        """Does as `smc` by vLLM's own sampling."""
        from vllm import SamplingParams

        params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0)
        prompts = [{"prompt_token_ids": prompt} for prompt in self._prompts(groups)]
        start = time.perf_counter()
        self.llm.generate(prompts, params, use_tqdm=False)
        return {"total": time.perf_counter() - start}

    # ----------------------------------------------------------------------------------- one engine step at a time
    @functools.cached_property
    def _registered(self) -> str:
        return self.llm.register_potential(self._potentials["lexicon"])

    def _add(self, prompt: list[int], params: Any) -> str:
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.CUMULATIVE
        request_id = str(next(self.llm.request_counter))
        rendered = self.llm.renderer.render_cmpl([{"prompt_token_ids": prompt}])[0]
        self.llm.llm_engine.add_request(request_id, rendered, params)
        return request_id

    def _add_group(self, n: int) -> str:
        from fastsmc import SMCParams

        params = SMCParams(n_particles=n, max_tokens=GROUP_TOKENS, ess_threshold=1.0, ignore_eos=True)
        return self._add(self._prompts(1)[0], self.llm.lead_params(params, self._registered))

    def _add_stream(self, prompt_tokens: int, max_tokens: int) -> str:
        """Adds an ordinary request; no other had its tokens, so that none of them are in the prefix cache."""
        from vllm import SamplingParams

        prompt = self._random.integers(1000, 20000, prompt_tokens).tolist()
        return self._add(prompt, SamplingParams(max_tokens=max_tokens, temperature=1.0, ignore_eos=True))

    def load(self, n: int, streams: int, prompt_tokens: int, max_tokens: int) -> dict[str, Any]:
        """Runs `streams` ordinary requests beside a group of n particles, which another follows when it ends.

        Args:
            n: 0: no group.
            streams: 0: none; the group then runs for `max_tokens` steps.

        Returns:
            "itl": seconds between two tokens of a stream, of all streams; "ttft": seconds to the first token of each;
            "seconds": from when all streams have a token to when one of them has its last; "tokens" and "group_tokens":
            of all streams and of the group in that time; "whole_seconds", "whole_group_tokens": from the start.
        """
        engine = self.llm.llm_engine
        group, steps = self._add_group(n) if n else "", 0  # the request that runs now; particle steps of all so far
        times: dict[str, list[float]] = {}  # of each stream's tokens

        def step() -> float:
            nonlocal group, steps
            outputs: list[Any] = engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id == group:
                    payload = (output.kv_transfer_params or {}).get("smc", {})
                    if "error" in payload:
                        raise RuntimeError(f"the group failed: {payload['error']}")
                    at = GROUP_TOKENS if output.finished else payload.get("step", steps % GROUP_TOKENS)
                    steps = steps // GROUP_TOKENS * GROUP_TOKENS + at
                    if output.finished:
                        group = self._add_group(n)
                elif output.request_id in times:
                    seen = times[output.request_id]
                    seen += [now] * (len(output.outputs[0].token_ids) - len(seen))
            return now

        while n and steps < LEAD_STEPS:
            step()
        begin, first = time.perf_counter(), steps
        window = begin, first
        times |= {self._add_stream(prompt_tokens, max_tokens): [] for _ in range(streams)}
        end, waiting = begin, streams > 0
        while all(len(seen) < max_tokens for seen in times.values()) if streams else steps < first + max_tokens:
            end = step()
            if waiting and all(times.values()):
                window, waiting = (end, steps), False
        result = {
            "itl": [b - a for seen in times.values() for a, b in itertools.pairwise(seen)],
            "ttft": [seen[0] - begin for seen in times.values() if seen],
            "seconds": end - window[0],
            "tokens": sum(at > window[0] for seen in times.values() for at in seen),
            "group_tokens": n * (steps - window[1]),
            "whole_seconds": end - begin,
            "whole_group_tokens": n * (steps - first),
        }
        engine.abort_request([*times, group] if n else list(times))
        while engine.has_unfinished_requests():
            engine.step()
        return result


# ------------------------------------------------------------------------------------------------------------- parts
def in_turn(calls: dict[Key, Callable[[], Any]], repeats: int) -> dict[Key, list[Any]]:
    """Calls each in turn, `repeats` times after a warm-up: the answers by name."""
    answers: dict[Key, list[Any]] = {name: [] for name in calls}
    for i in range(repeats + 1):
        for name, call in calls.items():
            answer = call()
            if i:
                answers[name].append(answer)
    return answers


def ratio(above: list[float], below: list[float]) -> dict[str, Any]:
    """Divides what was measured in turn, pair by pair."""
    pairs = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(pairs), "pairs": pairs}


def shared(
    engines: Engines, shapes: tuple[tuple[int, int], ...], max_tokens: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Yields a record per shape: SMC in each engine, stock sampling in this tree's; ratios: SMC's speed to theirs."""
    this, *others = engines
    for groups, n in shapes:
        arguments = (groups, n, max_tokens)
        calls: dict[str, Callable[[], Any]] = {
            "smc": functools.partial(engines[this].smc, *arguments, "lexicon"),
            "stock": functools.partial(engines[this].stock, *arguments),
            **{
                name: functools.partial(engines[name].smc, *arguments, "lexicon")
                for name in others
                if name != "never" or groups <= MOST_APART
            },
        }
        answers = in_turn(calls, repeats)
        seconds = {name: [answer["total"] for answer in of] for name, of in answers.items()}
        tokens = groups * n * max_tokens
        yield {
            "groups": groups, "n_particles": n, "max_tokens": max_tokens, "seconds": seconds,
            "tokens_per_s": {name: tokens / statistics.median(of) for name, of in seconds.items()},
            "ratio": {name: ratio(of, seconds["smc"]) for name, of in seconds.items() if name != "smc"},
            "forward_share": answers["smc"][0]["forward_share"],
        }  # fmt: skip


def step_times(long: list[Times], short: list[Times], lengths: tuple[int, int]) -> dict[str, Any]:
    """Returns ms per step by part and "outside" of all, and the ms outside that a call takes once."""
    steps, parts = lengths[0] - lengths[1], sorted({name for run in long for name in run} - {"total", "forward_share"})
    for run in (*long, *short):
        run["outside"] = run["total"] - sum(run.get(part, 0.0) for part in parts)
    ms = {
        name: [1e3 * (a.get(name, 0.0) - b.get(name, 0.0)) / steps for a, b in zip(long, short, strict=True)]
        for name in ("total", *parts, "outside")
    }
    once = [1e3 * run["outside"] - lengths[1] * per_step for run, per_step in zip(short, ms["outside"], strict=True)]
    return {
        "step_ms": {name: statistics.median(of) for name, of in ms.items()},
        "once_ms": statistics.median(once),
        "outside_ms": ms["outside"],
    }


def outside(engines: Engines, groups: tuple[int, ...], max_tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a record per kind, G and engine, and per kind and engine the line through them."""
    lengths = max_tokens, max(1, max_tokens // 4)
    for kind in ("lexicon", "mixed"):
        points: dict[str, list[float]] = {name: [] for name in engines}
        for count in groups:
            answers = in_turn(
                {
                    (name, length): functools.partial(engine.smc, count, PARTICLES, length, kind)
                    for name, engine in engines.items()
                    for length in lengths
                },
                repeats,
            )
            for name in engines:
                times = step_times(answers[name, lengths[0]], answers[name, lengths[1]], lengths)
                points[name].append(times["step_ms"]["outside"])
                yield {"engine": name, "kind": kind, "groups": count, "n_particles": PARTICLES, **times}
        if len(groups) > 1:
            for name, of in points.items():
                slope, intercept = map(float, np.polyfit(groups, of, 1))
                yield {"engine": name, "kind": kind, "intercept_ms": intercept, "us_per_group": 1e3 * slope}


def beside(engines: Engines, n: int, max_tokens: int, repeats: int) -> Iterator[dict[str, Any]]:
    """Yields a record per engine: what ordinary requests and a group of n particles cost each other."""
    loads = {  # streams, tokens of their prompts, tokens that they generate
        "alone": (0, 0, max_tokens),
        "stream": (1, STREAM_PROMPT, 2 * max_tokens),
        "long prompt": (1, LONG_PROMPT, 1),
        "streams": (STREAMS, STREAM_PROMPT, max_tokens),
    }
    answers = in_turn(
        {
            (name, load, size): functools.partial(engine.load, size, *arguments)
            for load, arguments in loads.items()
            for name, engine in engines.items()
            for size in ((n,) if load == "alone" else (0, n))
        },
        repeats,
    )
    records = {name: _beside(name, n, answers) for name in engines}
    for name, record in records.items():
        if name != "against" and "against" in records:  # the same load, so rates compare
            theirs = records["against"]["runs"]
            record["over_against"] = {
                load: ratio(of, theirs[load]) for load, of in record["runs"].items() if load in theirs
            }
        yield {"engine": name, "n_particles": n, "max_tokens": max_tokens, **record}


def _beside(name: str, n: int, answers: dict[tuple[str, str, int], list[dict[str, Any]]]) -> dict[str, Any]:
    """Sums up one engine's answers: medians, ratios of pairs, and "runs", tokens/s of each run."""

    def medians(load: str, size: int, key: str) -> list[float]:
        return [statistics.median(answer[key]) for answer in answers[name, load, size]]

    def rates(load: str, size: int, tokens: str = "group_tokens", seconds: str = "seconds") -> list[float]:
        return [answer[tokens] / answer[seconds] for answer in answers[name, load, size]]

    itl, ttft = (
        (medians(load, 0, key), medians(load, n, key)) for load, key in (("stream", "itl"), ("long prompt", "ttft"))
    )
    group = {load: rates(load, n) for load in ("alone", "stream", "streams")}
    group["long prompt"] = rates("long prompt", n, "whole_group_tokens", "whole_seconds")
    ordinary = {size: rates("streams", size, "tokens") for size in (0, n)}
    together = [a + b for a, b in zip(ordinary[n], group["streams"], strict=True)]
    return {
        "itl_ms": {"without": 1e3 * statistics.median(itl[0]), "with": 1e3 * statistics.median(itl[1])},
        "itl_ratio": ratio(itl[1], itl[0]),
        "ttft_s": {"without": statistics.median(ttft[0]), "with": statistics.median(ttft[1])},
        "ttft_ratio": ratio(ttft[1], ttft[0]),
        "streams_tokens_per_s": {
            "without": statistics.median(ordinary[0]), "with": statistics.median(ordinary[n]),
            "with the group's": statistics.median(together),
        },
        "group_tokens_per_s": {load: statistics.median(of) for load, of in group.items()},
        "group_share": {load: ratio(of, group["alone"]) for load, of in group.items() if load != "alone"},
        "runs": {f"group, {load}": of for load, of in group.items()} | {"streams and group": together},
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------- the whole
def settings_of(
    part: str, shapes: tuple[tuple[int, int], ...], groups: tuple[int, ...], n: int, kv_bytes: int
) -> dict[str, Any]:
    """Returns what a part's engines are started with: rows enough for both sides, and a KV cache that holds them."""
    if part == "shared":  # as it sets itself up, in bench_smc.py too
        rows = max(g * size for g, size in shapes)
        return {"in_process": False, "max_num_seqs": rows, "max_model_len": 1024, "kv_cache_memory_bytes": kv_bytes}
    common = {"in_process": True, "enforce_eager": True, "kv_cache_memory_bytes": kv_bytes}
    if part == "outside":
        return common | {"timed": True, "max_num_seqs": PARTICLES * max(groups), "max_model_len": 1024}
    return common | {"max_num_seqs": n + STREAMS, "max_num_batched_tokens": BATCHED_TOKENS, "max_model_len": 4096}


def start(part: str, model: str, settings: dict[str, Any], against: Path | None, bounds: Bounds) -> Engines:
    """Starts the engines that a part compares: "this", settings of this tree that LLM has, and "against"."""

    def engine(tree: Path, **more: Any) -> OtherEngine:
        return OtherEngine(tree, __file__, "--model", model, "--serve", json.dumps(settings | more))

    engines = {"this": engine(ROOT)}
    if part == "shared" and engines["this"].takes("shared_forward"):
        engines["never"] = engine(ROOT, shared_forward="never")
    if part == "beside" and engines["this"].takes("max_particle_rows_per_step"):
        for bound in bounds:
            engines[f"{bound} rows"] = engine(ROOT, max_particle_rows_per_step=bound)
    if against is not None:
        engines["against"] = engine(against)
    return engines


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    parts: tuple[str, ...] = PARTS,
    max_tokens: int = 32,
    repeats: int = 5,
    against: str | None = None,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    groups: tuple[int, ...] = GROUPS,
    n: int = PARTICLES_BESIDE,
    bounds: Bounds = BOUNDS,
    kv_bytes: int = KV_BYTES,
) -> list[dict]:
    """Measures `parts`; writes and returns the records."""
    records: list[dict[str, Any]] = []
    started: dict[str, Any] = {}
    other = None if against is None else Path(against).resolve()
    for part in parts:
        started[part] = settings_of(part, shapes, groups, n, kv_bytes)
        engines = start(part, model, started[part], other, bounds)
        measured = {
            "shared": lambda engines=engines: shared(engines, shapes, max_tokens, repeats),
            "outside": lambda engines=engines: outside(engines, groups, max_tokens, repeats),
            "beside": lambda engines=engines: beside(engines, n, max_tokens, repeats),
        }[part]()
        for record in measured:
            records.append({"part": part, **record})
            print(describe(records[-1]), flush=True)
        if json_path and part == parts[-1]:  # while engines run: their processes are looked at
            trees = {} if other is None else {"against": dict(zip(("commit", "changed"), source(other), strict=True))}
            payload = {"bench": "groups", "model": model, "engine": started, **trees, "records": records}
            write_result(json_path, payload)
        for engine in engines.values():
            engine.close()
    return records


def describe(record: dict[str, Any]) -> str:
    """Sets a record as a line."""
    if record["part"] == "shared":
        rates = "  ".join(f"{name} {rate:.0f} tok/s" for name, rate in record["tokens_per_s"].items())
        ratios = "  ".join(f"{name} {of['median']:.2f}" for name, of in record["ratio"].items())
        return f"{record['groups']} × {record['n_particles']}: {rates}; smc over {ratios}"
    if record["part"] == "outside":
        head = f"{record['kind']}, {record['engine']}"
        if "us_per_group" in record:
            return f"{head}: {record['intercept_ms']:.2f} ms + {record['us_per_group']:.0f} µs per group"
        times = "  ".join(f"{name} {ms:.2f}" for name, ms in record["step_ms"].items())
        return f"{head}, G={record['groups']}: ms per step {times}; once {record['once_ms']:.1f} ms"
    itl, ttft, ordinary = record["itl_ms"], record["ttft_s"], record["streams_tokens_per_s"]
    group = "  ".join(f"{load} {rate:.0f}" for load, rate in record["group_tokens_per_s"].items())
    return (
        f"beside N={record['n_particles']}, {record['engine']}: each token {itl['without']:.0f} → {itl['with']:.0f} "
        f"ms ({record['itl_ratio']['median']:.1f} ×)  first token {ttft['without']:.2f} → {ttft['with']:.2f} s "
        f"({record['ttft_ratio']['median']:.2f} ×)  streams {ordinary['without']:.0f} → {ordinary['with']:.0f} tok/s  "
        f"group tok/s {group}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of those, by commas")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", help="another source tree with its extension built, measured in turn")
    parser.add_argument("--shapes", default=",".join(f"{g}x{n}" for g, n in SHAPES), help="shared: G x N, by commas")
    parser.add_argument("--groups", default=",".join(map(str, GROUPS)), help="outside: G, by commas")
    parser.add_argument("--particles", type=int, default=PARTICLES_BESIDE, help="beside: N of the group")
    parser.add_argument("--bounds", default=",".join(map(str, BOUNDS)), help="beside: max_particle_rows_per_step")
    parser.add_argument("--kv-bytes", type=int, default=KV_BYTES, help="KV cache of each engine")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: Engine(args.model, json.loads(args.serve)))
        return
    parts = tuple(args.parts.split(","))
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts {', '.join(unknown)}: must be of {', '.join(PARTS)}")
    shapes = tuple((int(g), int(n)) for g, n in (shape.split("x") for shape in args.shapes.split(",")))
    groups, bounds = (tuple(map(int, text.split(","))) if text else () for text in (args.groups, args.bounds))
    run(
        args.json, args.model, parts, args.max_tokens, args.repeats, args.against, shapes, groups, args.particles,
        bounds, args.kv_bytes,
    )  # fmt: skip


if __name__ == "__main__":
    main()
