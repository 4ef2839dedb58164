"""Accuracy on sums in steps (examples/segments.py): segments with a verifier, best-of-n and majority at equal tokens.

    python bench/segments_accuracy.py --dtype float32 --json FILE

For each question a group of N particles is weighed by the verifier at the end of each line. Plain samples of the same
prompt are then taken one by one while their tokens are at most those that the group has drawn, with those of particles
that were not resampled. Of either side a text is chosen:

    smc, heaviest        the particle of largest weight               best of n   the sample of largest verifier score,
    smc, weight vote     the sum that has the most weight                         which sees each line here, too
    score vote           the sum whose samples have most score        majority    the sum that most samples have

Accuracy is whether the chosen sum is right; intervals are of 95 %, by bootstrap over questions. It depends on the
machine by rounding alone.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from machine import ROOT, write_result

sys.path.insert(0, str(ROOT / "examples"))

import cloudpickle
import segments
from segments import RIGHT, WRONG, Verifier, answer, is_right, make_numbers, make_prompt, settings

cloudpickle.register_pickle_by_value(segments)  # the engine's process does not find it

#: questions of difficulty and prompt chosen were others
SEED, DRAWS = 100, 10_000
METHODS = ("smc, heaviest", "smc, weight vote", "best of n", "score vote", "majority")


def vote(texts: Sequence[str], weights: Sequence[float]) -> int | None:
    """Finds the sum of most weight; of equal ones the first, and none only where no text has one."""
    total: dict[int, float] = defaultdict(float)
    for text, weight in zip(texts, weights, strict=True):
        if (found := answer(text)) is not None:
            total[found] += weight
    return max(total, key=lambda found: total[found]) if total else None


def choose(numbers: list[int], population: Any, plain: Any) -> dict[str, Any]:
    """Chooses a sum by each method, and says whether it is right."""
    budget, taken, used = int((population.tokens >= 0).sum()), 0, 0
    for ids in plain.token_ids:
        if used + len(ids) > budget:
            break
        taken, used = taken + 1, used + len(ids)
    taken = max(taken, 1)
    samples = plain.texts[:taken]
    scores = [RIGHT if is_right(numbers, text + "\n\n") else WRONG for text in samples]
    ones = [1.0] * taken
    chosen = {
        "smc, heaviest": answer(population.texts[int(np.argmax(population.log_weights))]),
        "smc, weight vote": vote(population.texts, population.weights.tolist()),
        "best of n": answer(samples[int(np.argmax(scores))]),
        "score vote": vote(samples, scores),
        "majority": vote(samples, ones),
    }
    return {
        "numbers": numbers,
        "tokens": budget,
        "plain_tokens": used,
        "samples": taken,
        "right_samples": sum(score == RIGHT for score in scores),
        "all_taken": taken == len(plain.token_ids),
        "right": {name: found == sum(numbers) for name, found in chosen.items()},
    }


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Computes the 95 % interval of a mean over questions (Q,) by bootstrap."""
    draws = rng.choice(values, (DRAWS, len(values))).mean(1)
    return [float(each) for each in np.quantile(draws, (0.025, 0.975))]


def run(json_path: str | None, model: str, n: int, questions: int, dtype: str, seed: int) -> list[dict[str, Any]]:
    """Asks all questions side by side; writes and returns a record per method."""
    from fastsmc import LLM
    from fastsmc.models import resolve

    engine: dict[str, Any] = {
        "dtype": dtype, "max_num_seqs": 256, "max_model_len": 512, "kv_cache_memory_bytes": 2 << 30,
        "enforce_eager": True,
    }  # fmt: skip
    llm = LLM(str(resolve(model)), **engine)
    rng = random.Random(seed)
    asked = [make_numbers(rng) for _ in range(questions)]
    prompts = [make_prompt(numbers) for numbers in asked]
    groups = llm.smc(prompts, settings(n, ess_threshold=1.0, seed=seed), [Verifier(numbers) for numbers in asked])
    plain = llm.smc(prompts, settings(2 * n, ess_threshold=0.0, seed=seed + 1))
    answers = [choose(*of) for of in zip(asked, groups, plain, strict=True)]
    right = {name: np.array([float(each["right"][name]) for each in answers]) for name in METHODS}
    draws, records = np.random.default_rng(seed), []
    for name, values in right.items():
        record = {"method": name, "accuracy": float(values.mean()), "interval": interval(values, draws)}
        if not name.startswith("smc"):
            difference = right["smc, weight vote"] - values
            record |= {"behind_smc": float(difference.mean()), "behind_smc_interval": interval(difference, draws)}
        records.append(record)
        print(record, flush=True)
    about = {
        "tokens_per_question": float(np.mean([each["tokens"] for each in answers])),
        "samples_per_question": float(np.mean([each["samples"] for each in answers])),
        "right_samples": sum(each["right_samples"] for each in answers) / sum(each["samples"] for each in answers),
        "out_of_samples": sum(each["all_taken"] for each in answers),
    }
    print(about, flush=True)
    if json_path:
        head = {"bench": "segments_accuracy", "model": model, "engine": engine, "n_particles": n}
        head |= {"questions": questions, "terms": segments.TERMS, "largest": segments.LARGEST, "seed": seed}
        write_result(json_path, head | about | {"records": records, "answers": answers})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--dtype", default="bfloat16", help="of the model; float32 where the CPU has no bfloat16")
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    run(args.json, args.model, args.particles, args.questions, args.dtype, args.seed)


if __name__ == "__main__":
    main()
