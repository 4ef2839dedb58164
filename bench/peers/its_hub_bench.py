"""its_hub's particle filtering over a vLLM server; run by `bench_segments.py`.

    bench/peers/.venv/bin/python bench/peers/its_hub_bench.py URL

its_hub runs as it comes: its StepGeneration, ParticleFiltering and OpenAICompatibleLanguageModel, which sends a request
per particle and step with the whole text so far. What the server says of its tokens is added up.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trees import serve

PROMPT = "Write a long story about a fishing village by the sea, and the people in it."


class Reward:
    """Scores texts at no cost, each by its last letters, so that particles differ and none takes over."""

    def score(self, prompt: str, texts: list[str]) -> list[float]:
        return [0.35 + 0.3 * (sum(map(ord, text[-8:])) % 16) / 15 for text in texts]

    async def ascore(self, prompt: str, texts: list[str]) -> list[float]:
        return self.score(prompt, texts)


class Filtering:
    """Runs its_hub's ParticleFiltering; serves `trees.OtherEngine`."""

    def __init__(self, url: str) -> None:
        from its_hub.api import GenerationUsage
        from its_hub.core.lms.openai_lm import OpenAICompatibleLanguageModel

        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        usage = GenerationUsage()

        class Counted(OpenAICompatibleLanguageModel):
            async def agenerate(self, *args: Any, **settings: Any) -> Any:
                return await super().agenerate(*args, usage_accumulator=usage, **settings)

        self.lm, self.usage = Counted(url, "none", "model"), usage

    def run(self, n: int, max_steps: int, tokens_per_step: int) -> dict[str, Any]:
        """Runs once: {seconds, tokens, prompt_tokens, requests, steps}, as the server counts tokens."""
        from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
        from its_hub.core.lms.step_generation import StepGeneration

        before = self.usage.completion_tokens, self.usage.prompt_tokens, self.usage.num_calls
        filtering = ParticleFiltering(
            StepGeneration(max_steps, tokens_per_step=tokens_per_step, temperature=1.0), Reward()
        )
        begin = time.perf_counter()
        result = filtering.infer(self.lm, PROMPT, n, return_response_only=False)
        seconds = time.perf_counter() - begin
        after = self.usage.completion_tokens, self.usage.prompt_tokens, self.usage.num_calls
        tokens, prompt_tokens, requests = (b - a for a, b in zip(before, after, strict=True))
        return {
            "seconds": seconds, "tokens": tokens, "prompt_tokens": prompt_tokens, "requests": requests,
            "steps": max(result.steps_used_lst),
        }  # fmt: skip


if __name__ == "__main__":
    serve(lambda: Filtering(sys.argv[1]))
