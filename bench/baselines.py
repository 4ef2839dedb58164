"""What a user would run instead of `weigh` and `draw`: eager PyTorch, the same compiled, and the samplers of vLLM and
FlashInfer where they can be imported. Each is made for given tensors and returns a function without arguments.

The samplers do less: a token from logits and temperature, with its log-probability (vLLM) or without (FlashInfer); no
twist and no weight. They are there to show what the field's own sampling costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Any]


def eager_step(logits: Tensor, log_psi: Tensor | None, temperature: float) -> tuple[Tensor, ...]:
    """What `weigh` and `draw` replace, in float32: incremental log weight, token, its log p0 and its twist."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    joint = log_p if log_psi is None else log_p + log_psi
    log_weight = torch.logsumexp(joint, dim=-1)
    tokens = torch.multinomial(torch.softmax(joint, dim=-1), 1)
    log_prob = log_p.gather(1, tokens)
    return log_weight, tokens, log_prob, log_prob if log_psi is None else log_psi.gather(1, tokens)


def eager(logits: Tensor, log_psi: Tensor | None, temperature: float) -> Step:
    return lambda: eager_step(logits, log_psi, temperature)


def compiled(logits: Tensor, log_psi: Tensor | None, temperature: float) -> Step | None:
    """torch.compile on a GPU; on the CPU its C++ is not what anybody runs."""
    if logits.device.type != "cuda":
        return None
    step = torch.compile(eager_step, dynamic=False)
    return lambda: step(logits, log_psi, temperature)


def vllm_sampler(logits: Tensor, log_psi: Tensor | None, temperature: float) -> Step | None:
    """vLLM's sampler with the sampled token's log-probability, as an ordinary request with logprobs=0 has it."""
    try:
        from vllm.v1.sample.logits_processor import LogitsProcessors
        from vllm.v1.sample.metadata import SamplingMetadata
        from vllm.v1.sample.sampler import Sampler
    except ImportError:
        return None
    if log_psi is not None:
        return None
    n, none = len(logits), torch.empty(0, device=logits.device)
    if logits.dtype == torch.float32:
        temperature = 1.0  # it divides float32 logits in place: at the same cost, this leaves them as they are
    metadata = SamplingMetadata(
        temperature=torch.full((n,), temperature, device=logits.device), all_greedy=False, all_random=True,
        top_p=None, top_k=None, generators={}, max_num_logprobs=0, no_penalties=True, prompt_token_ids=None,
        frequency_penalties=none, presence_penalties=none, repetition_penalties=none,
        output_token_ids=[[] for _ in range(n)], allowed_token_ids_mask=None, bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )  # fmt: skip
    sampler = Sampler()
    return lambda: sampler(logits, metadata)


def flashinfer_sampler(logits: Tensor, log_psi: Tensor | None, temperature: float) -> Step | None:
    if log_psi is not None or logits.device.type != "cuda":
        return None
    try:
        from flashinfer.sampling import sampling_from_logits
    except ImportError:
        return None
    return lambda: sampling_from_logits(logits.float() / temperature)


#: name in the records (`<name>_median_s`) → maker; None where it does not apply or cannot be imported
BASELINES: dict[str, Callable[[Tensor, Tensor | None, float], Step | None]] = {
    "eager": eager,
    "compile": compiled,
    "vllm_sampler": vllm_sampler,
    "flashinfer": flashinfer_sampler,
}
