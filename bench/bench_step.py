"""Where the time of a particle step goes: model forward, lm head, and everything else by part; by N and potential.

    python bench/bench_step.py --json bench/results/step_cpu.json
    python bench/bench_step.py --against ../old --json …      two source trees, their runs in turn on the same machine

The engine's parts are timed from outside, so that nothing is left out: "outside" is the wall time of the whole call
less forward and lm head, per step, scheduling and the result's way back included; "potential" is the outermost call of
the potential's methods, "answer_mb" the largest answer of `logw_next`, with memory that its rows share counted once.
The first call with a pattern, which builds its automaton, is a row by itself.

With `--against` each tree has an engine in its own process, started with that tree on PYTHONPATH; both run the same
case one after the other, `repeats` times. The other tree needs its C++ extension built.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from machine import ROOT, source, write_result
from trees import OtherEngine, serve

PARTICLES = (64, 256)
#: a few states and, for every letter so far, a state of its own: masks for all states at once, or for those in use
WORDS, LETTERS = r"(?: [a-z]+[,.]?)+", r"[a-z ,.]{1,300}"
#: name → factors; each is a pattern, or None for the Lexicon
POTENTIALS = {
    "lexicon": (None,),
    "regex": (WORDS,),
    "regex × lexicon": (WORDS, None),
    "counting regex": (LETTERS,),
    "counting regex × lexicon": (LETTERS, None),
}
#: what is built for one call of two particles and two tokens
BUILT = (r"\w{1,40}",)
PROMPT, SEA = "Once upon a time, in a small village", " the sea and a boat"
#: two engines fit beside each other, and N = 256 into each, in float32 too
KV_BYTES = 1 << 30
METHODS = ("prefix", "complete", "logw_next", "reindex")


def tensors(answer: Any) -> Iterator[Any]:
    """Yields the tensors of what `logw_next` returned."""
    if hasattr(answer, "untyped_storage"):
        yield answer
    elif answer is not None:
        for part in answer if isinstance(answer, tuple) else vars(answer).values():
            if isinstance(part, tuple) or hasattr(part, "__dict__") or hasattr(part, "untyped_storage"):
                yield from tensors(part)


class Engine:
    """Starts an engine in this process, of the fastsmc that Python finds, with its parts timed."""

    def __init__(self, model: str, max_tokens: int, dtype: str = "bfloat16") -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        from fastsmc import LLM, ops
        from fastsmc.models import resolve
        from fastsmc.vllm import runner

        self.max_tokens = max_tokens
        self.spent: dict[str, float] = defaultdict(float)
        self._depth = self._answer = 0
        for owner, names in ((runner.Model, ("hidden", "logits")), (ops, ("weigh", "resample", "reindex", "draw"))):
            for name in names:
                self._time(owner, name, name)
        self.llm = LLM(
            resolve(model), dtype=dtype, max_model_len=1024, enforce_eager=True, kv_cache_memory_bytes=KV_BYTES
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.text = self.tokenizer.encode(PROMPT)
        self.potentials: dict[str, Any] = {}

    def _time(self, owner: object, name: str, part: str) -> None:
        """Replaces owner.name by itself, timed as `part`; of the potential's methods only the outermost."""
        function: Callable[..., Any] = getattr(owner, name)
        outermost = part == "potential"

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._depth += outermost
            start = time.perf_counter()
            try:
                answer = function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                self._depth -= outermost
                if not outermost or self._depth == 0:
                    self.spent[part] += seconds
            if name == "logw_next" and self._depth == 0:
                storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(answer)}
                self._answer = max(self._answer, sum(storages.values()))
            return answer

        setattr(owner, name, wrapper)

    def _potential(self, name: str) -> Any:
        if name not in self.potentials:
            from fastsmc.potentials import Lexicon, Product, Regex

            if not self.potentials:
                for kind in (Lexicon, Product, Regex):
                    for method in METHODS:
                        if method in vars(kind):
                            self._time(kind, method, "potential")
            lexicon = Lexicon(token_ids=self.tokenizer.encode(SEA), weight=0.5)
            factors = [lexicon if pattern is None else Regex(pattern) for pattern in POTENTIALS[name]]
            self.potentials[name] = factors[0] if len(factors) == 1 else Product(*factors)
        return self.potentials[name]

    def step(self, n: int, potential: str) -> dict[str, float]:
        """Returns the seconds of a run by part, the whole as "total", and the largest answer's bytes as "answer"."""
        from fastsmc import SMCParams

        params = SMCParams(n_particles=n, max_tokens=self.max_tokens, ess_threshold=1.0, ignore_eos=True)
        made = self._potential(potential)
        self.spent.clear()
        self._answer = 0
        start = time.perf_counter()
        self.llm.smc(self.text, params, made)
        return {"total": time.perf_counter() - start, **self.spent, "answer": self._answer}

    def build(self, pattern: str) -> dict[str, float]:
        """Returns the seconds of a first call with `pattern`."""
        from fastsmc import SMCParams
        from fastsmc.potentials import Regex

        start = time.perf_counter()
        self.llm.smc(self.text, SMCParams(n_particles=2, max_tokens=2, ignore_eos=True), Regex(pattern))
        return {"total": time.perf_counter() - start}


def summary(runs: list[dict[str, float]], max_tokens: int) -> dict[str, Any]:
    """Returns medians of runs: ms per step by part, and the share outside forward and lm head."""
    outside = [r["total"] - r["hidden"] - r["logits"] for r in runs]
    names = sorted({name for r in runs for name in r} - {"answer", "total"})
    ms = {name: 1e3 * statistics.median(r.get(name, 0.0) for r in runs) / max_tokens for name in ("total", *names)}
    return {
        "step_ms": ms | {"outside": 1e3 * statistics.median(outside) / max_tokens},
        "share_outside_model": statistics.median(o / r["total"] for o, r in zip(outside, runs, strict=True)),
        "answer_mb": max(r["answer"] for r in runs) / 1e6,
    }


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    max_tokens: int = 32,
    repeats: int = 3,
    against: str | None = None,
    particles: tuple[int, ...] = PARTICLES,
    potentials: tuple[str, ...] = tuple(POTENTIALS),
) -> list[dict]:
    """Measures each N of `particles` with each of `potentials`; writes and returns the records."""
    engines: dict[str, Engine | OtherEngine]
    if against is None:
        engines = {"this": Engine(model, max_tokens)}
    else:
        options = (__file__, "--serve", "--model", model, "--max-tokens", str(max_tokens))
        engines = {"this": OtherEngine(ROOT, *options), "against": OtherEngine(Path(against).resolve(), *options)}
    records = []
    for n in particles:
        for potential in potentials:
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for i in range(repeats + 1):
                for name, engine in engines.items():
                    timed = engine.step(n, potential)
                    if i:
                        runs[name].append(timed)
            record: dict[str, Any] = {"n_particles": n, "potential": potential, "max_tokens": max_tokens}
            medians = {name: summary(of, max_tokens) for name, of in runs.items()}
            if against is None:
                record |= medians["this"]
            else:
                ours, theirs = (medians[name]["step_ms"] for name in ("this", "against"))
                record |= {"ratio": {part: ours[part] / theirs[part] for part in ("total", "outside")}, **medians}
                record["ratio"]["pairs"] = [
                    a["total"] / b["total"] for a, b in zip(runs["this"], runs["against"], strict=True)
                ]
            records.append(record)
            print(describe(record), flush=True)
    for pattern in BUILT:
        built = {name: engine.build(pattern)["total"] for name, engine in engines.items()}
        records.append({"pattern": pattern, "first_call_s": built})
        print(f"first call with {pattern}: {'  '.join(f'{name} {s:.2f} s' for name, s in built.items())}", flush=True)
    if json_path:
        other = {} if against is None else {"against": dict(zip(("commit", "changed"), source(against), strict=True))}
        write_result(json_path, {"bench": "step", **other, "records": records})
    for engine in engines.values():
        if isinstance(engine, OtherEngine):
            engine.close()
    return records


def describe(record: dict[str, Any]) -> str:
    lines = [f"N={record['n_particles']:4d} {record['potential']}"]
    for name in ("this", "against") if "ratio" in record else (None,):
        of = record if name is None else record[name]
        parts = "  ".join(f"{part} {value:.2f}" for part, value in of["step_ms"].items())
        lines.append(
            f"{name or ''}  ms per step: {parts}  ({of['share_outside_model']:.1%} outside)  "
            f"answer {of['answer_mb']:.2f} MB"
        )
    if "ratio" in record:
        total, outside = record["ratio"]["total"], record["ratio"]["outside"]
        lines.append(f"this : against  whole step {total:.3f}  outside forward and lm head {outside:.3f}")
    return "\n      ".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", metavar="TREE", help="another source tree, to run in turn with this one")
    parser.add_argument("--particles", default=",".join(map(str, PARTICLES)))
    parser.add_argument("--potentials", default=",".join(POTENTIALS), help="some of those, by commas")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: Engine(args.model, args.max_tokens))
        return
    particles = tuple(int(n) for n in args.particles.split(","))
    potentials = tuple(args.potentials.split(","))
    if unknown := set(potentials) - set(POTENTIALS):
        parser.error(f"--potentials {', '.join(unknown)}: must be of {', '.join(POTENTIALS)}")
    run(args.json, args.model, args.max_tokens, args.repeats, args.against, particles, potentials)


if __name__ == "__main__":
    main()
