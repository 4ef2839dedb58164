"""What `JsonSchema` costs: a step with it against one without, in one engine; its host time against genlm-control's.

    python bench/bench_grammar.py --peer bench/peers/.venv/bin/python --json FILE

"step": SMC with a Lexicon, and with the same Lexicon times a schema that keeps every particle busy for all T tokens (an
array of many objects), in turn. What is outside the model's forward and lm head is compared, since particles under a
schema are alike more often and cost the model less: cost = (outside with − outside without) / step without.

"peer": milliseconds per step in the JSON potential's own methods, everything else left out on both sides. The peer is
genlm-control's JsonSchema as its AWRS sampler asks it, at the same N, T, prompt and schema, in its own environment
(bench/peers/genlm_control_json.py); runs of both in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import bench_step
from bench_smc import forward_share
from machine import write_result
from trees import peer_environment

PARTICLES = (64, 256)
PROMPT = "Once upon a time, in a small village"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
#: more than T tokens can write
VILLAGE = {"type": "array", "minItems": 64, "items": PERSON}
#: of the comparison with the peer
PEER_PARTICLES, PEER_TOKENS = 64, 24
PEER_PROMPT = """People, one JSON object per line:
{"name": "Anna", "age": 41}
{"name": "Tom", "age": 7}
{"name": "Mary", "age": 23}
"""


class Engine(bench_step.Engine):
    """Starts an engine in this process, with its parts and the potentials' methods timed."""

    def __init__(self, model: str, max_tokens: int, dtype: str) -> None:
        super().__init__(model, max_tokens, dtype)
        from fastsmc.potentials import Grammar, JsonSchema, Lexicon, Product

        for kind in (Grammar, Lexicon, Product):
            for method in bench_step.METHODS:
                if method in vars(kind):
                    self._time(kind, method, "potential")
        lexicon = Lexicon(token_ids=self.tokenizer.encode(bench_step.SEA), weight=0.5)
        self.potentials = {
            "without": lexicon,
            "with": lexicon * JsonSchema(VILLAGE),
            "person": JsonSchema(PERSON, whitespace="flexible"),
        }

    def measure(self, name: str, prompt: str, **settings: Any) -> dict[str, float]:
        """Returns the seconds of a run by part, the whole as "total", and what is known of its population."""
        from fastsmc import SMCParams

        params = SMCParams(ess_threshold=0.5, **settings)
        self.spent.clear()
        start = time.perf_counter()
        population = self.llm.smc(prompt, params, self.potentials[name])
        seconds = {"total": time.perf_counter() - start, **self.spent}
        return seconds | {"share": forward_share(population), "steps": population.T, "log_z": population.log_z}


def run_peer(python: str, seed: int, dtype: str) -> dict[str, Any]:
    """Returns the record of a run of genlm-control, in its own environment with its own OpenMP library."""
    script = Path(__file__).with_name("peers") / "genlm_control_json.py"
    options = {"--particles": PEER_PARTICLES, "--max-tokens": PEER_TOKENS, "--seed": seed, "--prompt": PEER_PROMPT}
    options["--dtype"] = dtype
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.json"
        words = [str(word) for pair in options.items() for word in pair]
        command = [python, str(script), *words, "--schema", json.dumps(PERSON), "--json", str(path)]
        subprocess.run(command, env=peer_environment(python), stdout=subprocess.DEVNULL, check=True)
        return json.loads(path.read_text())


def compare_steps(engine: Engine, n: int, repeats: int) -> dict[str, Any]:
    """Measures steps with and without a schema, in turn."""
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for i in range(repeats + 1):
        for name, of in runs.items():
            timed = engine.measure(name, PROMPT, n_particles=n, max_tokens=engine.max_tokens, seed=i, ignore_eos=True)
            if i:
                of.append(timed)
    ms = {name: bench_step.summary([r | {"answer": 0} for r in of], engine.max_tokens) for name, of in runs.items()}
    steps = {name: of["step_ms"] for name, of in ms.items()}
    cost = (steps["with"]["outside"] - steps["without"]["outside"]) / steps["without"]["total"]
    share = {name: statistics.median(r["share"] for r in of) for name, of in runs.items()}
    return {"part": "step", "n_particles": n, "max_tokens": engine.max_tokens, "cost": cost, "step_ms": steps,
            "forward_share": share}  # fmt: skip


def compare_peer(engine: Engine, python: str, repeats: int, dtype: str) -> dict[str, Any]:
    """Measures the JSON potentials of both sides, in turn."""
    ours: list[dict[str, float]] = []
    theirs: list[dict[str, Any]] = []
    for i in range(repeats + 1):
        timed = engine.measure("person", PEER_PROMPT, n_particles=PEER_PARTICLES, max_tokens=PEER_TOKENS, seed=i)
        if i:
            ours.append({"potential_ms": 1e3 * timed["potential"] / timed["steps"], "log_z": timed["log_z"]})
            theirs.append(run_peer(python, i, dtype))
            print(f"ours {ours[-1]}\ntheirs {theirs[-1]['runs'][0]}", flush=True)
    peer = theirs[-1]  # its machine, versions and command are those of its last process
    peer["runs"] = [run for record in theirs for run in record["runs"]]
    medians = [statistics.median(r["potential_ms"] for r in of) for of in (ours, peer["runs"])]
    return {"part": "peer", "n_particles": PEER_PARTICLES, "max_tokens": PEER_TOKENS, "schema": PERSON,
            "ratio": medians[1] / medians[0], "potential_ms": medians[0], "runs": ours, "peer": peer}  # fmt: skip


def run(
    json_path: str | None = None,
    model: str = "smollm2",
    max_tokens: int = 32,
    repeats: int = 3,
    particles: tuple[int, ...] = PARTICLES,
    peer: str | None = None,
    dtype: str = "bfloat16",
) -> list[dict]:
    """Measures steps at each N of `particles`, and the peer if its interpreter is given; writes and returns the
    records."""
    engine, records = Engine(model, max_tokens, dtype), []
    for n in particles:
        record = compare_steps(engine, n, repeats)
        records.append(record)
        of = {name: f"{ms['total']:.1f} ({ms['outside']:.1f} outside)" for name, ms in record["step_ms"].items()}
        print(f"N={n}: ms per step {of}, cost {record['cost']:.1%} of a step", flush=True)
    if peer is not None:
        records.append(compare_peer(engine, peer, repeats, dtype))
        print(f"ms in the JSON potential: {records[-1]['ratio']:.1f} × fewer than genlm-control", flush=True)
    if json_path:
        write_result(json_path, {"bench": "grammar", "model": model, "dtype": dtype, "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--particles", default=",".join(map(str, PARTICLES)))
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it only fastsmc runs")
    args = parser.parse_args()
    particles = tuple(int(n) for n in args.particles.split(","))
    run(args.json, args.model, args.max_tokens, args.repeats, particles, args.peer, args.dtype)


if __name__ == "__main__":
    main()
