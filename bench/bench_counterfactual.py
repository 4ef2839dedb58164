"""Counterfactuals: where texts are left under interventions, against the published procedure; what they cost.

    python bench/bench_counterfactual.py found --json bench/results/counterfactual_cpu.json
    python bench/bench_counterfactual.py time [--engine hf] [--json FILE]

    found   the findings of Ravfogel et al. 2024 (arXiv 2411.07180) in kind: an edit, steering and a temperature that
            make a target as likely on prompts that nothing was fitted to, and how much of a text each leaves, exactly;
            texts sampled by the published procedure beside the exact curve; what its mismatch of mechanisms does
    time    counterfactuals of a text against the published procedure, and a group of them against `smc`, in turn

What `found` gives does not change with how busy a machine is, but for last digits between processors.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import openings
import torch
from bench_groups import in_turn, ratio
from machine import write_result
from numpy.typing import NDArray
from published import Published

from fastsmc import SMCParams, ops
from fastsmc.hf import HFEngine
from fastsmc.interventions import Facts, Intervention, RankOne, Steer, Temperature
from fastsmc.models import resolve

if TYPE_CHECKING:
    from fastsmc import LLM

MAX_TOKENS = 32
#: of the temperature, whose success the others are to have on the true fact; and their success on the false one
TEMPERATURE, FALSE_SUCCESS = 0.5, 0.3
#: temperatures whose success on the false fact is asked
TEMPERATURES = (0.1, 0.25, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)
EDIT_LAYER, STEER_LAYER = 6, 24
#: scales up to which success rises, of what is fitted
HIGHEST = {"edit": 1.5, "steering": 2.0}
#: of the steering that has the success: what weaker and stronger steering have of its scale
STRENGTHS = {"steering, half": 0.5, "steering": 1.0, "steering, twice": 2.0}
#: particles and tokens per start of the texts whose keys are the common ones
COMMON = (16, 40)
#: what is sampled by the published procedure: an opening under an intervention each, texts that are not left at once
SAMPLED, SAMPLES = ((0, "steering"), (33, "temperature"), (15, "edit")), 200
TOP_K, MISMATCHED = 50, 10
RESAMPLES, FEW = 10_000, 5.0
#: texts that the published procedure is timed by
ONE_BY_ONE = 8
#: tokens after which survival is kept
KEPT = (1, 2, 4, 8, 16, 32)


class Change(NamedTuple):
    """Is an intervention, and what it was made for."""

    target: str
    kind: str
    scale: float
    intervention: Intervention


# -- interventions of equal success ------------------------------------------------------------------------------------
class Success:
    """Asks how likely targets are, on prompts that nothing is fitted to."""

    def __init__(self, engine: HFEngine, peer: Published) -> None:
        self.peer, self.encode = peer, engine.get_tokenizer().encode
        self.prompts = [engine.encode(prompt) for prompt in openings.HELD_OUT]

    def each(self, target: str, change: Intervention | None) -> list[float]:
        (token,) = self.encode(target, add_special_tokens=False)
        rows = np.concatenate([self.peer.logits(prompt, 1, change) for prompt in self.prompts])
        return torch.from_numpy(rows).softmax(1)[:, token].tolist()

    def mean(self, target: str, change: Intervention | None) -> float:
        return float(np.mean(self.each(target, change)))


def solve(
    success: Success, target: str, make: Callable[[float], Intervention], level: float, high: float, steps: int = 10
) -> float:
    """Finds by bisection the scale in [0, high] of an intervention with a success of `level`.

    Raises:
        ValueError: even `high` has less.
    """
    if (most := success.mean(target, make(high))) < level:
        raise ValueError(f"level={level:.3f}: is out of reach for{target}, {most:.3f} at the scale {high:g}")
    low = 0.0
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if success.mean(target, make(middle)) < level else (low, middle)
    return (low + high) / 2


def contrast(engine: HFEngine, target: str) -> Steer:
    """Fits steering towards a target: from what is said where sentences end in other cities."""
    positive = [context + target for context in openings.CONTEXTS]
    negative = [context + city for context in openings.CONTEXTS for city in openings.CITIES]
    return Steer.from_contrast(engine, positive, negative, STEER_LAYER)


def scaled(change: RankOne | Steer, scale: float) -> Intervention:
    if isinstance(change, Steer):
        return Steer(change.layer, change.vector, scale)
    return RankOne(change.layer, scale * change.u, change.v)


def changes(engine: HFEngine, success: Success) -> Iterator[Change]:
    """Fits an edit and steering to each target, and scales both to the same success, that of the temperature."""
    n, length = COMMON
    common = []
    for seed, start in enumerate(openings.STARTS):
        params = SMCParams(n_particles=n, max_tokens=length, ignore_eos=True, seed=seed)
        population = engine.smc(start, params)
        common += [engine.encode(start) + list(ids) for ids in population.token_ids]
    yield Change(openings.TRUE, "temperature", TEMPERATURE, Temperature(TEMPERATURE))
    levels = {openings.TRUE: success.mean(openings.TRUE, Temperature(TEMPERATURE)), openings.FALSE: FALSE_SUCCESS}
    for target, level in levels.items():
        full = RankOne.edit(engine, openings.EDIT_PROMPT, openings.SUBJECT, target, EDIT_LAYER, common)
        makers = {
            "edit": functools.partial(scaled, full),
            "steering": functools.partial(scaled, contrast(engine, target)),
        }
        for kind, make in makers.items():
            scale = solve(success, target, make, level, HIGHEST[kind])
            strengths = STRENGTHS if kind == "steering" and target == openings.TRUE else {kind: 1.0}
            for name, strength in strengths.items():
                yield Change(target, name, strength * scale, make(strength * scale))


# -- what is found -----------------------------------------------------------------------------------------------------
def interval(values: NDArray[np.float64]) -> list[float]:
    """Bootstraps a 95 % interval of the mean, always with the same resamples."""
    rows = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return np.quantile(values[rows].mean(1), (0.025, 0.975)).tolist()


def draw(engine: HFEngine, opening: str, seed: int, **settings: Any) -> Facts:
    """Draws a text after an opening, and makes facts of it."""
    params = SMCParams(n_particles=1, max_tokens=MAX_TOKENS, ignore_eos=True, seed=seed, **settings)
    text = engine.smc(opening, params).token_ids[0]
    return engine.facts(opening, text, params)


def survival(engine: HFEngine, facts: Facts, change: Change) -> NDArray[np.float64]:
    """Computes (T,), the probability that a text keeps its first tokens: no sample has a part in it."""
    params = SMCParams(n_particles=1, max_tokens=1, ignore_eos=True)
    return engine.counterfactual(facts, intervention=change.intervention, params=params).survival


def describe(curves: NDArray[np.float64]) -> dict[str, Any]:
    """Summarises survival (openings, T): the expected common prefix of each text, and what it is on average."""
    prefix = curves.sum(1)
    return {
        "mean": float(prefix.mean()), "interval": interval(prefix), "median": float(np.median(prefix)),
        "share": float(prefix.mean()) / curves.shape[1], "unchanged": float(curves[:, -1].mean()),
        "prefix": np.round(prefix, 3).tolist(), "survival": {
            str(t): np.round(curves[:, t - 1], 4).tolist() for t in KEPT
        },
    }  # fmt: skip


def differences(prefixes: dict[tuple[str, str], NDArray[np.float64]]) -> list[dict[str, Any]]:
    """Compares interventions of one target, text by text, by the common prefix that they leave."""
    true, false = openings.TRUE, openings.FALSE
    pairs = (
        (true, "edit", "steering"), (true, "temperature", "steering"), (true, "edit", "temperature"),
        (true, "steering, half", "steering"), (true, "steering", "steering, twice"), (false, "edit", "steering"),
    )  # fmt: skip
    out = []
    for target, more, less in pairs:
        of = prefixes[target, more] - prefixes[target, less]
        where = {"target": target, "more": more, "less": less}
        out.append({**where, "mean": float(of.mean()), "interval": interval(of), "longer": float((of > 0).mean())})
    return out


def sampled(peer: Published, facts: Facts, change: Change, exact: NDArray[np.float64]) -> dict[str, Any]:
    """Samples by the published procedure and tests where these texts leave theirs against the exact curve."""
    prompt, text = list(facts.prompt_token_ids), list(facts.token_ids)
    noise = peer.noise(prompt, text, np.random.default_rng(0), SAMPLES)
    same = peer.generate(prompt, noise, change.intervention) == np.array(text)
    kept = np.logical_and.accumulate(same, axis=1)
    chi2, df, p = agreement(kept.sum(1), exact)
    return {
        "kind": change.kind, "samples": SAMPLES, "exact_prefix": float(exact.sum()),
        "sampled_prefix": float(kept.sum(1).mean()), "sampled_prefix_se": float(kept.sum(1).std(ddof=1) / SAMPLES**0.5),
        "chi2": chi2, "df": df, "p": p, "exact": np.round(exact, 4).tolist(), "sampled": kept.mean(0).tolist(),
    }  # fmt: skip


def agreement(prefix: NDArray[np.int64], exact: NDArray[np.float64]) -> tuple[float, int, float]:
    """Tests lengths of common prefixes (n,) against survival (T,): chi², degrees of freedom, p.

    A cell is a length, or several in a row where fewer than `FEW` are expected.
    """
    n, ends = len(prefix), np.append(exact, 0.0)
    expected = n * -np.diff(ends, prepend=1.0)
    observed = np.bincount(prefix, minlength=len(ends))
    cells: list[list[float]] = [[0.0, 0.0]]
    for want, got in zip(expected, observed, strict=True):
        if cells[-1][0] >= FEW:
            cells.append([0.0, 0.0])
        cells[-1][0] += want
        cells[-1][1] += got
    if len(cells) > 1 and cells[-1][0] < FEW:
        want, got = cells.pop()
        cells[-1][0] += want
        cells[-1][1] += got
    chi2 = float(sum((got - want) ** 2 / want for want, got in cells))
    df = len(cells) - 1
    p = float(torch.special.gammaincc(torch.tensor(df / 2.0), torch.tensor(chi2 / 2.0))) if df else 1.0
    return chi2, df, p


def mismatch(peer: Published, prompt: list[int], change: Change) -> dict[str, float]:
    """Computes the law of a counterfactual first token, averaged over texts drawn with top_k, as total variation.

    It should be that of a draw from the intervened model. "published": hindsight by the whole softmax. "stated": by
    what has drawn, as `counterfactual(…, top_k=…)` has it.
    """
    p, q = (torch.from_numpy(peer.logits(prompt, 1, one)[0]) for one in (None, change.intervention))
    top_p, top_q = (only(row, TOP_K) for row in (p, q))
    tokens = p.topk(TOP_K).indices
    weights = top_p.softmax(0)[tokens]

    def law(factual: torch.Tensor, counterfactual: torch.Tensor) -> torch.Tensor:
        rows, known = (row.float().expand(TOP_K, -1) for row in (counterfactual, factual))
        return weights @ ops.redraw_logits(rows, known, tokens).double().exp()

    def distance(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).abs().sum() / 2)

    return {
        "published_from_full": distance(law(p, q), q.softmax(0)),
        "published_from_top_k": distance(law(p, q), top_q.softmax(0)),
        "stated_from_top_k": distance(law(top_p, top_q), top_q.softmax(0)),
        "stated_from_full": distance(law(top_p, q), q.softmax(0)),
    }


def only(row: torch.Tensor, k: int) -> torch.Tensor:
    """Rules out of a row what is not among its k highest."""
    return row.where(row >= row.topk(k).values[-1], -torch.inf)


def bench_found(engine: HFEngine) -> dict[str, Any]:
    """Finds all that `found` is to find."""
    peer = Published(engine.trunk.model)
    success = Success(engine, peer)
    made = list(changes(engine, success))
    texts = [draw(engine, opening, seed) for seed, opening in enumerate(openings.OPENINGS)]
    records, curves = [], {}
    for change in made:
        of = np.stack([survival(engine, facts, change) for facts in texts])
        curves[change.target, change.kind] = of
        held_out = success.each(change.target, change.intervention)
        records.append({
            "target": change.target, "kind": change.kind, "scale": change.scale, "success": float(np.mean(held_out)),
            **describe(of), "held_out": np.round(held_out, 4).tolist(),
        })  # fmt: skip
        print(*(records[-1][key] for key in ("target", "kind", "scale", "success", "mean", "interval")), flush=True)
    by_kind = {change.kind: change for change in made if change.target == openings.TRUE}
    checks = []
    for i, kind in SAMPLED:
        exact = curves[openings.TRUE, kind][i]
        checks.append({"opening": openings.OPENINGS[i], **sampled(peer, texts[i], by_kind[kind], exact)})
        print(*(checks[-1][key] for key in ("opening", "kind", "exact_prefix", "sampled_prefix", "p")), flush=True)
    wrong = [
        {"opening": opening, **mismatch(peer, engine.encode(opening), by_kind["steering"])}
        for opening in openings.OPENINGS[:MISMATCHED]
    ]
    print(*wrong, sep="\n", flush=True)
    return {
        "bench": "counterfactual", "max_tokens": MAX_TOKENS, "temperature": TEMPERATURE, "edit_layer": EDIT_LAYER,
        "steer_layer": STEER_LAYER, "seeds": "text i: i; common texts of start i: i; published noise, bootstrap: 0",
        "untouched": {target: success.mean(target, None) for target in (openings.TRUE, openings.FALSE)},
        "reach": {str(t): success.mean(openings.FALSE, Temperature(t)) for t in TEMPERATURES},
        "ended": sum(not engine.stop_token_ids.isdisjoint(facts.token_ids) for facts in texts),
        "records": records, "differences": differences({key: of.sum(1) for key, of in curves.items()}),
        "sampled": checks, "top_k": TOP_K, "mismatch": wrong, "texts": [list(facts.token_ids) for facts in texts],
    }  # fmt: skip


# -- what it costs -----------------------------------------------------------------------------------------------------
def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bench_time(hf: HFEngine, engine: Any, n: int, repeats: int) -> dict[str, Any]:
    """Times n counterfactuals of a text, by an engine at once and by the published procedure one by one, and `smc`.

    Of the latter only `ONE_BY_ONE` are made, whose time is taken n times over: each takes as long as any other.
    """
    peer, rng = Published(hf.trunk.model), np.random.default_rng(0)
    steer = contrast(hf, openings.TRUE)
    prompt = hf.encode(openings.OPENINGS[0])
    text = list(draw(hf, openings.OPENINGS[0], 0).token_ids)
    params = SMCParams(n_particles=n, max_tokens=MAX_TOKENS, ignore_eos=True)

    def published() -> None:
        for _ in range(min(n, ONE_BY_ONE)):
            noise = list(peer.noise(prompt, text, rng))  # all of it, before the first token is generated
            peer.generate(prompt, noise, steer)

    calls: dict[str, Callable[[], Any]] = {
        "published": published,
        "counterfactual": lambda: engine.counterfactual(prompt, text, steer, params=params),
        "smc": lambda: engine.smc(prompt, params),
        "smc, steered": lambda: engine.smc(prompt, params, intervention=steer),
    }
    found = in_turn({name: functools.partial(seconds, call) for name, call in calls.items()}, repeats)
    found["published"] = [value * n / min(n, ONE_BY_ONE) for value in found["published"]]
    ours = found["counterfactual"]
    record = {
        "n": n, "max_tokens": MAX_TOKENS, "seconds": found, "ratio": {
            "published": ratio(found["published"], ours), **{k: ratio(ours, found[k]) for k in ("smc", "smc, steered")}
        },
    }  # fmt: skip
    print(record, flush=True)
    return {"bench": "counterfactual time", "engine": type(engine).__name__, "dtype": "float32", "records": [record]}


def start_llm(model: str, n: int) -> LLM:
    """Starts vLLM in this process, with room for n particles and the text."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from fastsmc import LLM

    return LLM(
        model, dtype="float32", interventions=True, max_num_seqs=n + 1, max_model_len=512,
        kv_cache_memory_bytes=1 << 29,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("found", "time"))
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engine", choices=("llm", "hf"), default="llm", help="time: vLLM, or Hugging Face's model")
    parser.add_argument("--particles", type=int, default=64, help="time")
    parser.add_argument("--repeats", type=int, default=3, help="time")
    args = parser.parse_args()
    path = str(resolve(args.model))
    if args.what == "found":
        result = bench_found(HFEngine(path))
    else:
        llm = start_llm(path, args.particles) if args.engine == "llm" else None
        hf = HFEngine(path)
        result = bench_time(hf, llm or hf, args.particles, args.repeats)
    if args.json:
        write_result(args.json, {**result, "model": args.model})


if __name__ == "__main__":
    main()
