"""The published way to counterfactual texts over a Hugging Face model: noise in hindsight, then greedy generation.

Source: Ravfogel et al. 2024, arXiv 2411.07180. An implementation of our own: one pass of the model over prompt and text
and noise for the whole vocabulary at each of the text's tokens (`hindsight.py`), then the model under an intervention,
whose next token is the argmax of logits and noise. Interventions are made by hooks of its own, so that it shares
nothing with what it is compared with but the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from hindsight import Array, hindsight
from numpy.typing import NDArray

from fastsmc.interventions import Intervention, RankOne, Steer, Temperature


class Published:
    """Runs a Hugging Face causal language model of the Llama family, without and under an intervention."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @contextmanager
    def under(self, change: Intervention | None) -> Iterator[float]:
        """Has the model run under `Steer` at all positions, `RankOne`, `Temperature` or None; gives the temperature."""
        handle = None
        if isinstance(change, Steer):
            vector = change.scale * change.vector

            def steer(module: Any, inputs: Any, output: Any) -> Any:
                return (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector

            handle = self.model.model.layers[change.layer].register_forward_hook(steer)
        elif isinstance(change, RankOne):
            u, v = change.u, change.v

            def edit(module: Any, inputs: Any, output: Any) -> Any:
                return output + (inputs[0] @ v)[..., None] * u

            handle = self.model.model.layers[change.layer].mlp.down_proj.register_forward_hook(edit)
        try:
            yield change.t if isinstance(change, Temperature) else 1.0
        finally:
            if handle is not None:
                handle.remove()

    @torch.no_grad()
    def logits(self, ids: list[int], n: int, change: Intervention | None = None) -> Array:
        """Runs tokens in one pass and gives (n, V) float64: logits over temperature behind each of the last n."""
        with self.under(change) as temperature:
            rows = self.model(torch.tensor([ids]), use_cache=False, logits_to_keep=n).logits[0]
        return rows.double().numpy() / temperature

    def noise(self, prompt: list[int], text: list[int], rng: np.random.Generator, n: int = 1) -> Iterator[Array]:
        """Makes (n, V) noise for each token of a text after a prompt, such as n draws of it may have had."""
        rows = self.logits(prompt + text[:-1], len(text))
        return (hindsight(row, token, rng, n) for row, token in zip(rows, text, strict=True))

    @torch.no_grad()
    def generate(self, prompt: list[int], noise: Iterable[Array], change: Intervention | None) -> NDArray[np.int64]:
        """Generates n texts of as many tokens as there are (n, V) of noise, side by side: (n, T)."""
        columns: list[NDArray[np.int64]] = []
        cache = None
        with self.under(change) as temperature:
            for rows in noise:
                ids = torch.from_numpy(columns[-1])[:, None] if columns else torch.tensor([prompt] * len(rows))
                out = self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                columns.append((out.logits[:, -1].double().numpy() / temperature + rows).argmax(1))
        return np.stack(columns, axis=1)
