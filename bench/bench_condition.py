"""How many questions the rejection proposal asks, beside genlm-control's AWRS on the same rows.

    python bench/bench_condition.py --peer bench/peers/.venv/bin/python [--json FILE]

SmolLM2 writes lines under the black boxes of examples/conditions.py with N particles. Its rows of logits, one per
distinct history and step, are kept, and walked by as many particles as had them (and at least `RUNS`), by themselves:

    alone       questions per particle, ours and AWRS's, the mean over rows
    in all      what the run of N particles asked of its condition, and what N runs of AWRS ask, particle by particle
    to the end  the same run without giving up long walks: what it asks, and how far its log Ẑ is from the other's

What is counted does not depend on the machine. Lines end within `--max-tokens` tokens: both sides ask one question per
particle at the last, whether its text is a whole; those rows are not walked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import ROOT, write_result
from torch import Tensor
from trees import peer_environment

from fastsmc import Potential, SMCParams
from fastsmc.hf import HFEngine, TrunkRows
from fastsmc.models import resolve
from fastsmc.potentials import Condition, token_bytes
from fastsmc.smc import Group, arrange, finish, rejection, set_up

sys.path.insert(0, str(ROOT / "examples"))

from conditions import PROMPTS, TASKS, all_of

#: walks of each row by particles that share nothing, at least
RUNS = 16


class Walked(Potential):
    """Allows the tokens that `ask` allows, with the answers `told` that there are, and counts its one particle's."""

    def __init__(self, ask: Any, asks: set[int], told: dict[int, bool]) -> None:
        self.ask, self.asks, self.told, self.count = ask, asks, told, 0

    def complete(self, state: Any) -> Tensor:
        return torch.zeros(len(state.finished), dtype=torch.float64)

    def allows(self, state: Any, particles: Tensor, tokens: Tensor) -> Tensor:
        for token in tokens.tolist():
            self.count += token in self.asks
            if token not in self.told:
                self.told[token] = self.ask(token)
        return torch.tensor([self.told[token] for token in tokens.tolist()], dtype=torch.bool)

    def __deepcopy__(self, memo: dict) -> Walked:
        return self


def walk(row: Tensor, ask: Any, asks: set[int], n: int) -> np.ndarray:
    """Says how many questions each of n particles (n,) asks on a row by itself: groups of one particle."""
    told: dict[int, bool] = {}
    potentials = [Walked(ask, asks, told) for _ in range(n)]
    params = SMCParams(n_particles=1, max_tokens=1, proposal="rejection")
    groups = [Group(dataclasses.replace(params, group=i), each, [0]) for i, each in enumerate(potentials)]
    (cohort,) = arrange(groups)
    cohort.wants()
    finish(cohort.take(row.repeat(n, 1), None))
    return np.array([each.count for each in potentials], dtype=float)


def ratio_stderr(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Computes the standard error of Σ_r mean(ours[r]) / Σ_r mean(theirs[r]), r a row, by the delta method."""
    means, variances = [], []
    for side in (ours, theirs):
        means.append(sum(counts.mean() for counts in side))
        variances.append(sum(counts.var(ddof=1) / len(counts) for counts in side))
    return means[0] / means[1] * math.sqrt(sum(v / m**2 for v, m in zip(variances, means, strict=True)))


@torch.inference_mode()
def run_task(engine: HFEngine, task: str, n: int, max_tokens: int, seed: int, peer: str | None) -> dict[str, Any]:
    """Runs one task once, then walks its rows."""
    begins, whole = TASKS[task]
    condition = set_up(Condition(all_of(begins), complete=all_of(whole)), engine.engine)
    params = SMCParams(
        n_particles=n,
        max_tokens=max_tokens,
        proposal="rejection",
        force_stop=True,
        seed=seed,
        stop_token_ids=tuple(engine.encode("\n")),
    )
    prompt, stops = engine.encode(PROMPTS[task]), engine.stops(params)
    group = Group(params, condition, prompt, stops, engine=engine.engine)
    model, tokens = TrunkRows(engine.trunk, prompt, n), token_bytes(engine.engine.tokenizer)
    tokens += [None] * (engine.trunk.vocab_size - len(tokens))
    rows: list[Tensor] = []
    histories: list[dict[str, Any]] = []
    n_last = 0
    while not group.done:
        (cohort,) = arrange([group])
        wants = cohort.wants()
        if wants.moves is not None:
            model.reindex(wants.moves)
        logits, hidden = model.next(wants.tokens, wants.slots) if group.t else model.first()
        if group.t + 1 == max_tokens:
            n_last = int((cohort.particles.rows >= 0).sum())
            finish(cohort.take(logits, hidden))
            continue
        drawn, rows_of = group.lineages.tokens().tolist(), cohort.particles.rows
        for r in range(len(logits)):
            among = (rows_of == r).nonzero().squeeze(1).tolist()
            text = b"".join(tokens[v] or b"" for v in drawn[among[0]])
            histories.append({"text": text.hex(), "runs": max(RUNS, len(among)), "particles": len(among)})
            rows.append(logits[r].float().log_softmax(0))
        finish(cohort.take(logits, hidden))
    population = group.population()
    assert population.questions is not None  # it has a condition
    given_up, rejection.LONG = rejection.LONG, sys.maxsize
    to_the_end = engine.smc(prompt, params, Condition(all_of(begins), complete=all_of(whole)))
    rejection.LONG = given_up
    assert to_the_end.questions is not None
    asks = {v for v, token in enumerate(tokens) if token is not None} | set(stops)
    walks = []
    for row, history in zip(rows, histories, strict=True):
        text = bytes.fromhex(history["text"])

        def ask(token: int, text: bytes = text) -> bool:
            spelled = b"" if token in stops else tokens[token]
            if spelled is None:
                return False
            whole_text = (text + spelled).decode(errors="replace")
            return whole(whole_text) if token in stops else begins(whole_text.rstrip("\ufffd"))

        walks.append(walk(row, ask, asks, history["runs"]))
    ours = [counts.mean() for counts in walks]
    particles = np.array([history["particles"] for history in histories])
    record: dict[str, Any] = {
        "task": task,
        "prompt": PROMPTS[task],
        "n_particles": n,
        "steps": population.T,
        "seed": seed,
        "log_z": population.log_z,
        "final_ess": population.final_ess,
        "distinct_histories": len(rows),
        "particle_steps": int(particles.sum()) + n_last,
        "calls": population.questions["calls"],
        "alone": float(np.mean(ours)),
        "in_all": population.questions["asked"],
        "in_all_to_the_end": to_the_end.questions["asked"],
        "log_z_to_the_end": to_the_end.log_z,
        "in_all_by_themselves": float(np.dot(particles, ours)) + n_last,
    }
    if peer is not None:
        peer_walks = ask_peer(peer, task, rows, histories, tokens, stops)
        theirs = [counts.mean() for counts in peer_walks]
        record |= {"peer_alone": float(np.mean(theirs)), "peer_in_all": float(np.dot(particles, theirs)) + n_last}
        record |= {
            "alone_ratio": record["alone"] / record["peer_alone"],
            "alone_ratio_stderr": ratio_stderr(walks, peer_walks),
            "in_all_ratio": record["in_all"] / record["peer_in_all"],
        }
    return record


def ask_peer(
    peer: str, task: str, rows: list[Tensor], histories: list[dict[str, Any]], tokens: list[bytes | None], stops: Any
) -> list[np.ndarray]:
    """Has genlm-control walk rows, and gives the number of questions of each walk, by row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        np.save(path / "rows.npy", torch.stack(rows).numpy())
        about = {"task": task, "stops": sorted(stops), "histories": histories}
        for name, value in {
            "histories": about, "tokens": [None if token is None else token.hex() for token in tokens]
        }.items():  # fmt: skip
            with open(path / f"{name}.json", "w") as file:
                file.write(json.dumps(value))
        script = Path(__file__).parent / "peers" / "genlm_condition_bench.py"
        subprocess.run([peer, str(script), folder], env=peer_environment(peer), stdout=subprocess.DEVNULL, check=True)
        return [np.array(asked) for asked in json.loads((path / "asked.json").read_text())]


def run(json_path: str | None, peer: str | None, n: int, max_tokens: int, seeds: int) -> list[dict[str, Any]]:
    engine = HFEngine(resolve("smollm2"))
    records = []
    for task in TASKS:
        for seed in range(seeds):
            records.append(run_task(engine, task, n, max_tokens, seed, peer))
            print(json.dumps(records[-1]), flush=True)
    if json_path:
        about = {"bench": "condition", "model": "smollm2", "runs_per_row": RUNS, "max_tokens": max_tokens}
        write_result(json_path, about | {"peer": "genlm-control 0.4.1, AWRS", "records": records})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peer", metavar="PYTHON", help="of the peers' environment; without it only fastsmc runs")
    parser.add_argument("--particles", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write the result here")
    args = parser.parse_args()
    run(args.json, args.peer, args.particles, args.max_tokens, args.seeds)


if __name__ == "__main__":
    main()
