"""Causal abstraction: what alignments find where a variable was planted, and where not; where facts stand in SmolLM2.

    python bench/bench_alignment.py planted --json bench/results/alignment_cpu.json --figure docs/figures/alignment.png
    python bench/bench_alignment.py facts --json bench/results/facts_cpu.json --figure docs/figures/facts.png

    planted  Boundless DAS on small networks that a variable was planted in (`planting.py`), and on such that learned
             the task alone: interchange intervention accuracy (IIA) on pairs that were not trained on, of the planted
             variable, of an input as control, and of the other intermediate variable. Then the three settings of Wu et
             al. 2023 (arXiv 2305.08809, section 4), with the basis frozen: brackets of numbers that no bracket in the
             alignment's training had, a prefix, other answer words; the last also where the variable was planted for
             each of two vocabularies apart, not across them. And one network's layers and positions.
    facts    which layer and position of SmolLM2 has to be interchanged for it to name another country's capital, on
             countries whose capital it names; and the same with the country out of a sentence of something else

Networks are trained where they are not in the user's cache, half a minute each, always the same on one machine; another
processor's last digits may train another network. What is found does not change with how busy a machine is.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import planting
import torch
from capitals import CAPITALS, ELSEWHERE, TEMPLATE
from machine import write_result
from numpy.typing import NDArray
from planting import LAYER, TASKS, Inputs, Recipe, Task

from fastsmc.alignment import BoundlessDAS, CausalModel, HeatMap, Pairs, frozen_iia, heat_map, pairs, train_alignment
from fastsmc.hf import HFEngine
from fastsmc.interventions import Interchange
from fastsmc.models import resolve
from fastsmc.trunk import Trunk

SEEDS = 5
#: networks of each task, and what their recipes say: price tags have prefixes and two vocabularies of answers
PLANTED, APART, ALONE = "planted", "planted, words apart", "task alone"
NETWORKS: dict[str, dict[str, dict[str, Any]]] = {
    "price_tag": {
        PLANTED: {"formats": "mixed", "steps": 1000},
        APART: {"formats": "apart", "steps": 1000},
        ALONE: {"formats": "mixed", "steps": 1000, "planted": False},
    },
    "equality": {PLANTED: {}, ALONE: {"planted": False}},
}
POSITION = -1
#: the alignments' training; chosen on a network of another seed
DAS: dict[str, Any] = {
    "n_pairs": 4000, "steps": 400, "batch": 128, "lr": 5e-3, "boundary_weight": 0.05, "temperature": (10.0, 0.05),
}  # fmt: skip
HELD_OUT, HELD_OUT_SEED = 2000, 1_000_000
#: tokens of the longest prefix
PREFIX = planting.LONGEST_PREFIX
#: sites of the map of one network; the steps of an alignment of each, and pairs that it is measured on
MAP_POSITIONS, MAP_STEPS, MAP_PAIRS = (-5, -4, -3, -2, -1), 200, 500
#: SmolLM2's layers; sources of each country
FACT_LAYERS, SOURCES = 30, 2
Record = dict[str, Any]


# -- planted variables -------------------------------------------------------------------------------------------------
def without(of: Pairs, trained: Pairs) -> Pairs:
    """Leaves out the pairs that were trained on."""
    known = {(tuple(base), tuple(source)) for base, source in zip(trained.bases, trained.sources, strict=True)}
    prompts = zip(of.bases, of.sources, strict=True)
    kept = [i for i, (base, source) in enumerate(prompts) if (tuple(base), tuple(source)) not in known]
    rows: dict[str, Any] = {
        field.name: [values[i] for i in kept]
        for field in dataclasses.fields(of)
        if field.name not in ("choices", "variable") and (values := getattr(of, field.name))
    }
    return dataclasses.replace(of, **rows)


def align(trunk: Trunk, task: Task, variable: str, seed: int, **sampled: Any) -> tuple[BoundlessDAS, Pairs]:
    """Trains an alignment without prefix and with the first vocabulary: it, and the pairs that it was trained on."""
    model, sampler = task.make(0), task.sampler(**sampled)
    das = train_alignment(
        trunk, model, LAYER, POSITION, variable=variable, sampler=sampler, seed=seed, use_tqdm=False, **DAS
    )
    return das, pairs(model, sampler, variable, DAS["n_pairs"], seed)


@torch.no_grad()
def said(trunk: Trunk, prompts: list[list[int]]) -> NDArray[np.int64]:
    """Gives the most likely token behind each prompt, nothing interchanged: by whole passes of those of one length."""
    out = np.zeros(len(prompts), dtype=np.int64)
    for length in {len(ids) for ids in prompts}:
        which = [i for i, ids in enumerate(prompts) if len(ids) == length]
        logits = trunk.model(torch.tensor([prompts[i] for i in which]), use_cache=False, logits_to_keep=1).logits
        out[which] = logits[:, 0].argmax(1).numpy()
    return out


def measure(
    trunk: Trunk, das: BoundlessDAS, trained: Pairs, model: CausalModel, sampler: Any, seed: int, planted: bool
) -> Record:
    """Measures an alignment on pairs held out, with what stands beside every figure: nothing interchanged, the whole
    hidden state, and the subspace of the planting."""
    held = without(pairs(model, sampler, trained.variable, HELD_OUT, HELD_OUT_SEED + seed), trained)
    known, basis, answers = planting.basis(seed), das.basis(), said(trunk, held.bases)
    bases = {"iia": basis, "whole": None} | ({"known": known} if planted else {})
    found = {name: frozen_iia(trunk, one, held, LAYER, POSITION, batch=500) for name, one in bases.items()}
    return {
        "variable": trained.variable[0], "dims": basis.shape[1], "agreement": float((answers == held.labels).mean()),
        "accuracy": float((answers == held.base_labels).mean()), "known": None,
        "inside": float((known.T @ basis).square().sum()) / basis.shape[1] if planted else None, "pairs": len(held),
        **found,
    }  # fmt: skip


def bracket_of(numbers: set[int]) -> Callable[[Inputs], bool]:
    """Says whether both ends of a bracket are among some numbers."""
    return lambda inputs: {inputs["lo"], inputs["hi"]} <= numbers


def bench_network(task: Task, network: str, seed: int) -> Iterator[Record]:
    """Trains a network, alignments of its variables, and for price tags measures them in other settings."""
    recipe = Recipe(task.name, seed, **NETWORKS[task.name][network])
    path, seen = planting.plant(recipe)
    trunk = Trunk.load(path)
    about: Record = {"task": task.name, "network": network, "seed": seed}
    yield {**about, "setting": "network", **seen}
    new: dict[str, tuple[int, dict[str, Any]]] = {"same": (0, {}), "prefix": (0, {"prefix": PREFIX}), "words": (1, {})}
    low = set(np.random.default_rng(seed).permutation(planting.NUMBERS)[: planting.NUMBERS // 2].tolist())
    high = set(range(planting.NUMBERS)) - low
    ranges = {name: (0, {"keep": bracket_of(of)}) for name, of in (("same ranges", low), ("new ranges", high))}

    def records(variable: str, settings: dict[str, tuple[int, dict[str, Any]]]) -> Iterator[Record]:
        """Trains in the first setting, measures in all."""
        begin = time.perf_counter()
        das, trained = align(trunk, task, variable, seed, **next(iter(settings.values()))[1])
        seconds = time.perf_counter() - begin
        for name, (words, sampled) in settings.items():
            found = measure(trunk, das, trained, task.make(words), task.sampler(**sampled), seed, recipe.planted)
            yield {**about, "setting": name, **found, "das_seconds": seconds}

    for variable in (task.planted, task.control):
        yield from records(variable, new if recipe.planted and recipe.vocabularies > 1 else {"same": new["same"]})
        if task.name == "price_tag" and network == PLANTED:
            yield from records(variable, ranges)
    if network != APART:
        yield from records(task.other, {"same": new["same"]})


def summarise(records: Iterable[Record]) -> list[Record]:
    """Takes mean, least and most over seeds of what was measured, by task, network, setting and variable."""
    groups: dict[tuple, list[Record]] = {}
    for record in records:
        if record["setting"] != "network":
            key = tuple(record[name] for name in ("task", "network", "setting", "variable"))
            groups.setdefault(key, []).append(record)
    out = []
    for (task, network, setting, variable), those in groups.items():
        columns = {
            name: [record[name] for record in those]
            for name in ("iia", "agreement", "accuracy", "whole", "known", "inside", "dims")
            if those[0][name] is not None
        }
        spans = {name: [statistics.mean(of), min(of), max(of)] for name, of in columns.items()}
        out.append({
            "task": task, "network": network, "setting": setting, "variable": variable, "seeds": len(those), **spans
        })  # fmt: skip
    return out


def map_network(task: Task, seed: int, figure: str | None) -> HeatMap:
    """Trains alignments of the planted variable at all layers and positions of one network, and draws them."""
    engine = HFEngine(planting.plant(Recipe(task.name, seed, **NETWORKS[task.name][PLANTED]))[0])
    layers, model = range(planting.LAYERS), task.make(0)
    maps = []
    for variable in (task.planted, task.control):
        asked = {**DAS, "steps": MAP_STEPS, "variable": variable, "sampler": task.sampler(), "seed": seed}
        found = train_alignment(engine, model, list(layers), list(MAP_POSITIONS), use_tqdm=False, **asked)
        trained = pairs(model, task.sampler(), variable, DAS["n_pairs"], seed)
        held = without(pairs(model, task.sampler(), variable, MAP_PAIRS, HELD_OUT_SEED + seed), trained)
        maps.append(heat_map(engine, held, layers, MAP_POSITIONS, alignments=found))
    both = dataclasses.replace(maps[0], controls={task.control: maps[1]})
    if figure:
        both.plot_iia(figure)
    return both


def bench_planted(seeds: int, figure: str | None) -> Record:
    records, tasks = [], {name: make() for name, make in TASKS.items()}
    for task in tasks.values():
        for network, seed in itertools.product(NETWORKS[task.name], range(seeds)):
            for record in bench_network(task, network, seed):
                print(record, flush=True)
                records.append(record)
    return {
        "bench": "alignment", "layer": LAYER, "position": POSITION, "dimensions": planting.DIMENSIONS,
        "hidden": planting.HIDDEN, "networks": NETWORKS, "das": DAS, "held_out": HELD_OUT, "map_steps": MAP_STEPS,
        "variables": {name: (task.planted, task.control, task.other) for name, task in tasks.items()}, "seeds": seeds,
        "summary": summarise(records), "map": map_network(tasks["price_tag"], 0, figure).to_dict(),
        "records": records,
    }  # fmt: skip


# -- facts -------------------------------------------------------------------------------------------------------------
def known(engine: Any) -> tuple[list[str], dict[str, int], list[str]]:
    """Finds the countries whose capital a model names: these, the first tokens of all capitals, and what it says of the
    others."""
    tokenizer = engine.get_tokenizer()
    prompts = [TEMPLATE.format(country) for country in CAPITALS]
    first = {c: tokenizer.encode(f" {capital}", add_special_tokens=False)[0] for c, capital in CAPITALS.items()}
    (said,) = engine.interchange(prompts, prompts, [Interchange(0, -1)])  # a base's own state: changes nothing
    right = [country for country, token in zip(CAPITALS, said.tolist(), strict=True) if token == first[country]]
    wrong = [
        f"{country}:{tokenizer.decode([token])}"
        for country, token in zip(CAPITALS, said.tolist(), strict=True)
        if country not in right
    ]
    return right, first, wrong


def fact_pairs(countries: list[str], first: dict[str, int], template: str) -> Pairs:
    """Makes pairs of each country as base with `SOURCES` others as source of a template, where their capitals differ.

    Every country is as often a source as a base, but for those left out.
    """
    order = np.random.default_rng(0).permutation(countries).tolist()
    both = [(b, s) for i in range(1, SOURCES + 1) for b, s in zip(order, order[i:] + order[:i], strict=True)]
    both = [(base, source) for base, source in both if first[base] != first[source]]
    bases, sources = ([pair[i] for pair in both] for i in (0, 1))
    plain, changed = ([first[country] for country in side] for side in (bases, sources))
    return Pairs(
        [{"country": country} for country in bases], [{"country": country} for country in sources],
        [TEMPLATE.format(country) for country in bases], [template.format(country) for country in sources],
        changed, plain, changed, sorted(set(first.values())), ("country",),
    )  # fmt: skip


def bench_facts(engine: Any, figure: str | None) -> Record:
    tokenizer = engine.get_tokenizer()
    tokens = [tokenizer.encode(template.format(country)) for template in (TEMPLATE, ELSEWHERE) for country in CAPITALS]
    at = next(i for i, (a, b) in enumerate(zip(*tokens[:2], strict=True)) if a != b)
    if len({(len(ids), *ids[:at], *ids[at + 1 :]) for ids in tokens}) > 2:
        raise ValueError("CAPITALS, ELSEWHERE: a country has to be one token, and stand where it does in TEMPLATE")
    right, first, wrong = known(engine)
    held = fact_pairs(right, first, TEMPLATE)
    begin = time.perf_counter()
    found = heat_map(
        engine, held, range(FACT_LAYERS), range(at - len(tokens[0]), 0),
        controls={"country of another sentence": fact_pairs(right, first, ELSEWHERE)},
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    if figure:
        found.plot_iia(figure)
    return {
        "bench": "facts", "engine": type(engine).__name__, "dtype": "float32", "template": TEMPLATE,
        "elsewhere": ELSEWHERE, "asked": len(CAPITALS), "known": len(right), "wrong": wrong, "pairs": len(held),
        "map_seconds": seconds, "tokens": [tokenizer.decode([token]) for token in tokens[0][at:]],
        "map": found.to_dict(),
    }  # fmt: skip


def start_llm(model: str) -> Any:
    """Starts vLLM in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from fastsmc import LLM

    return LLM(
        model, dtype="float32", interventions=True, max_num_seqs=64, max_model_len=256, kv_cache_memory_bytes=1 << 28
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("planted", "facts"))
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--figure", help="draw a map of layers and positions here")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="planted: networks of each kind")
    parser.add_argument("--engine", choices=("llm", "hf"), default="llm", help="facts: vLLM, or Hugging Face's model")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.what == "planted":
        torch.set_num_threads(1)
        result = bench_planted(args.seeds, args.figure)
    else:
        path = resolve("smollm2")
        result = bench_facts(start_llm(path) if args.engine == "llm" else HFEngine(path), args.figure)
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
