"""Sums in steps, each of which a verifier checks: a group with segments and a reward; docs/segments.md.

    python examples/segments.py [--particles N]

SmolLM2 adds numbers from left to right, a line per step. It gets many lines wrong, and a wrong line leaves nothing
right behind it. At the end of each line particles are weighed by whether all lines so far are right, and resampled.
"""

import argparse
import random
import re

from fastsmc import SMCParams
from fastsmc.potentials import RewardModel

#: numbers of a question, and the largest
TERMS, LARGEST = 4, 9
#: what a verifier gives a text whose lines are all right, and any other
RIGHT, WRONG = 0.9, 0.1


def make_numbers(rng: random.Random) -> list[int]:
    return [rng.randint(1, LARGEST) for _ in range(TERMS)]


def question(numbers: list[int]) -> str:
    return " + ".join(map(str, numbers)) + ":\n"


def solution(numbers: list[int]) -> list[str]:
    """Lists the right lines, such as "12 + 3 = 15"."""
    sums = [sum(numbers[: i + 1]) for i in range(len(numbers))]
    return [f"{a} + {b} = {c}" for a, b, c in zip(sums, numbers[1:], sums[1:], strict=False)]


def make_prompt(numbers: list[int], shots: int = 6) -> str:
    """Makes a prompt of solved questions, the same for all, and an unsolved one."""
    rng = random.Random(0)
    solved = [make_numbers(rng) for _ in range(shots)]
    return "".join(question(each) + "\n".join(solution(each)) + "\n\n" for each in solved) + question(numbers)


def is_right(numbers: list[int], text: str) -> bool:
    """Says whether all lines so far are right; of a text that has ended, by an empty line, whether they are all."""
    lines, right = text.rstrip("\n").split("\n"), solution(numbers)
    return lines == (right if text.endswith("\n\n") else right[: len(lines)])


def answer(text: str) -> int | None:
    """Reads the number that the last line comes to; None: it has none."""
    found = re.search(r"= (\d{1,9})\n*$", text)
    return int(found[1]) if found else None


class Verifier(RewardModel):
    """Scores the lines of one question. The target is p0 · Π (score / (1 − score)), over the lines."""

    def __init__(self, numbers: list[int]) -> None:
        super().__init__(aggregate="product", scale="logit")
        self.numbers = numbers

    def score(self, texts: list[str]) -> list[float]:
        return [RIGHT if is_right(self.numbers, text) else WRONG for text in texts]


def settings(n_particles: int, **more) -> SMCParams:
    """Makes the parameters: a segment is a line, and an empty line ends a text."""
    return SMCParams(
        n_particles=n_particles, max_tokens=16 * TERMS, temperature=0.8, segment=("\n",), stop=("\n\n",), **more
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--particles", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from fastsmc import LLM
    from fastsmc.models import resolve

    llm = LLM(resolve("smollm2"), max_model_len=512)
    numbers = make_numbers(random.Random(args.seed + 1))
    prompt, params = make_prompt(numbers), settings(args.particles, seed=args.seed)
    plain = llm.smc(prompt, settings(args.particles, seed=args.seed, ess_threshold=0.0))
    population = llm.smc(prompt, params, Verifier(numbers))
    print(f"{question(numbers)}{sum(numbers)} is right.")
    for name, found in (("plain samples", plain), ("particles", population)):
        texts = found.texts or []
        share = sum(w for w, text in zip(found.weights, texts, strict=True) if answer(text) == sum(numbers))
        print(f"{name}: {share:.1%} of the weight has the right sum")
    print(f"log Z {population.log_z:.2f}, ESS {population.final_ess:.1f}, boundaries at {population.boundaries}")
    print(population.best(1)[0][0])


if __name__ == "__main__":
    main()
