"""What fits interventions to examples, over a Hugging Face model, for `Steer`, `Affine` and `RankOne`.

    contrast    hidden states of two sets of texts  → the difference of their means
    transport   samples of two sets                 → A, b of the optimal transport between their normal distributions
    rank_one    a prompt, its subject, a target     → u, v of an edit of one down_proj

The models' weights are only read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastsmc.arguments import read_prompts
from fastsmc.potentials.tokens import short
from fastsmc.values import check_float, check_int

if TYPE_CHECKING:
    from fastsmc.trunk import Trunk  # which is made of interventions itself

#: share of the mean variance that is added to the diagonal of the keys' covariance
KEY_SHRINK = 1e-3
#: what is searched for is at most so many times as long as what stood there, and moves by such a share per step
FARTHEST, STRIDE = 4.0, 0.1


def trunk_of(llm: Any) -> tuple[Trunk, Any]:
    """Finds the Hugging Face model and the tokenizer of an engine (`HFEngine`, `LLM`). ValueError: it is none."""
    if not hasattr(llm, "trunk") and not hasattr(llm, "load_hf"):
        raise ValueError(f"{short(llm)}: must be an HFEngine or an LLM")
    engine = llm if hasattr(llm, "trunk") else llm.load_hf()
    return engine.trunk, engine.get_tokenizer()


def _encode(name: str, texts: Sequence[Any], trunk: Trunk, tokenizer: Any) -> list[list[int]]:
    ids, single = read_prompts(texts, tokenizer, trunk.vocab_size)
    if single or not ids:
        raise ValueError(f"{name}={short(texts)}: must be a list of at least one text")
    return ids


def contrast(llm: Any, positive: Sequence[Any], negative: Sequence[Any], layer: int) -> Tensor:
    """Computes (H,): the mean hidden state behind a layer at the last token of `positive`, less that of `negative`."""
    trunk, tokenizer = trunk_of(llm)
    check_int("layer", layer, 0, trunk.sizes.n_layers - 1)
    means = []
    for name, texts in (("positive", positive), ("negative", negative)):
        states = [trunk.watch(ids, layer)[0][-1] for ids in _encode(name, texts, trunk, tokenizer)]
        means.append(torch.stack(states).double().mean(0))
    return means[0] - means[1]


def transport(x0: Tensor, x1: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """Computes A (H, H), b (H,) with A x + b of mean and covariance of x1 (m, H) where x has those of x0 (n, H)."""
    check_float("shrink", shrink, 0.0, 1.0)
    if x0.shape[1] != x1.shape[1] or min(len(x0), len(x1)) < 2:
        raise ValueError(
            f"x0, x1: are {tuple(x0.shape)} and {tuple(x1.shape)}; must be (n, H) and (m, H), n and m at least 2"
        )
    x0, x1 = x0.double(), x1.double()
    c0, c1 = (_covariance(x, shrink) for x in (x0, x1))
    root = _power(c0, 0.5)
    inverse = _power(c0, -0.5)
    a = inverse @ _power(root @ c1 @ root, 0.5) @ inverse
    return a, x1.mean(0) - a @ x0.mean(0)


def _covariance(x: Tensor, shrink: float) -> Tensor:
    c = torch.cov(x.T).reshape(x.shape[1], x.shape[1])
    return c + shrink * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)


def _power(matrix: Tensor, exponent: float) -> Tensor:
    """Raises a symmetric matrix to a power, on the span of the eigenvalues that are not lost in rounding."""
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > 1e-12 * values.max()
    powers = torch.where(kept, values.clamp(min=1e-300) ** exponent, 0.0)
    return (vectors * powers) @ vectors.T


def rank_one(
    llm: Any, prompt: Any, subject: str, target: Any, layer: int, texts: Sequence[Any], steps: int
) -> tuple[Tensor, Tensor]:
    """Computes u (H,), v (K,) of `RankOne.edit`."""
    trunk, tokenizer = trunk_of(llm)
    check_int("layer", layer, 0, trunk.sizes.n_layers - 1)
    check_int("steps", steps, 1)
    if trunk.sizes.inner is None:
        raise ValueError("RankOne: the layers of this model have no mlp.down_proj")
    if tokenizer is None or not isinstance(prompt, str) or not subject or subject not in prompt:
        raise ValueError(f"subject={subject!r}: must be a part of the text prompt={short(prompt)}, with a tokenizer")
    ids = tokenizer.encode(prompt)
    wanted = tokenizer.encode(target, add_special_tokens=False) if isinstance(target, str) else target
    (wanted,) = _encode("target", [wanted], trunk, tokenizer)
    spoken = len(tokenizer.encode(prompt[: prompt.rindex(subject) + len(subject)]))
    at = min(spoken, len(ids)) - 1  # the subject's last token
    read, put = trunk.watch(ids, layer)[1:]
    key, value = read[at].double(), put[at].double()
    common = torch.cat([trunk.watch(text, layer)[1] for text in _encode("texts", texts, trunk, tokenizer)]).double()
    c = common.T @ common / len(common)
    c += KEY_SHRINK * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype)
    v = torch.linalg.solve(c, key)
    change = _search(trunk, ids, wanted, layer, at, value.norm().item(), steps)
    return change.double() / (v @ key), v


@torch.enable_grad()
def _search(trunk: Trunk, ids: list[int], target: list[int], layer: int, at: int, length: float, steps: int) -> Tensor:
    """Finds (H,) that, added to what down_proj puts out at position `at`, makes `target` likely after `ids`."""
    change = torch.zeros(trunk.hidden_size, requires_grad=True, device=trunk.device)
    optimizer = torch.optim.Adam([change], lr=STRIDE * length / trunk.hidden_size**0.5)

    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        here = torch.zeros(output.shape[1], 1, device=output.device)
        here[at] = 1.0
        return output + here * change

    handle = trunk.layers[layer].mlp.down_proj.register_forward_hook(hook)
    tokens = torch.tensor(target, device=trunk.device)
    try:
        for _ in range(steps):
            hidden = trunk.hidden(ids, tokens[None])[0]
            loss = -trunk.logits(hidden).log_softmax(-1).gather(1, tokens[:, None]).mean()
            optimizer.zero_grad()
            (gradient,) = torch.autograd.grad(loss, change)  # the weights get none
            change.grad = gradient
            optimizer.step()
            with torch.no_grad():
                change *= (FARTHEST * length / change.norm().clamp(min=1e-12)).clamp(max=1.0)
    finally:
        handle.remove()
    return change.detach().cpu()
