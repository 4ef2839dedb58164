"""Interventions that tests put models of `tiny` under, and log-probs under them by hooks and edited weights."""

import dataclasses
import itertools

import numpy as np
import torch
from tiny import recompute
from transformers import AutoModelForCausalLM

from fastsmc.interventions import Affine, Interchange, Project, RankOne, Sizes, Steer, Subspace

VOCAB, H, K = 8, 64, 128
SIZES = Sizes(2, H, K, VOCAB)


def noise(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(k, seed=0):
    return torch.linalg.qr(noise(H, k, seed=seed)).Q.T


#: one of each that a layer makes, each strong enough to change what is said
EACH = {
    "steer": Steer(0, noise(H), 2.0),
    "steer prompt": Steer(1, noise(H, seed=1), 3.0, "prompt"),
    "steer generated": Steer(0, noise(H, seed=2), 3.0, "generated"),
    "steer positions": Steer(0, noise(H, seed=3), 4.0, [2, 7, 9]),
    "affine": Affine(0, noise(H, H, seed=4, scale=0.2) + torch.eye(H), noise(H, seed=5)),
    "project": Project(0, orthonormal(5)),
    "project to": Project(1, orthonormal(3, seed=1), [3.0, -2.0, 5.0]),
    "rank one": RankOne(0, noise(H, seed=6), noise(K, seed=7)),
    "interchange": Interchange(0, 3, value=noise(H, seed=8)),
    "interchange drawn": Interchange(1, 6, value=noise(H, seed=9, scale=3.0)),
    "subspace": Subspace(1, 4, orthonormal(6, seed=2).T, value=noise(H, seed=10, scale=3.0)),
}
LISTS = {
    **{name: [one] for name, one in EACH.items()},
    "all": list(EACH.values()),
    "at one site": [
        EACH["steer"],
        EACH["project"],
        EACH["interchange"],
        EACH["affine"],
        EACH["steer generated"],
        EACH["steer positions"],
        EACH["rank one"],
        EACH["rank one"],
    ],
}


def change(one, x, positions, prompt_len):
    """What an intervention makes of x (n, H) at positions, in plain words: the oracle."""
    reached = torch.tensor([one.reaches(int(p), prompt_len) for p in positions])[:, None]
    if isinstance(one, Steer):
        y = x + one.scale * one.vector
    elif isinstance(one, Affine):
        y = x @ one.A.T + one.b
    elif isinstance(one, Interchange):
        y = one.value.expand_as(x)
    elif isinstance(one, Subspace):
        y = x + (one.value - x) @ one.basis @ one.basis.T
    else:
        inside = x @ one.basis.T
        value = torch.zeros(len(one.basis)) if one.value is None else one.value
        y = x + (value - inside) @ one.basis
    return torch.where(reached, y, x)


def swapped_logits(model, base, source, config):
    """(V,) logits at the end of `base` with what `source` has at a configuration's place in it, by hooks."""
    layer, at = model.get_submodule("model.layers")[config.layer], config.position
    taken = at if config.source_position is None else config.source_position
    states = []

    def read(module, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0, taken])

    def put(module, inputs, output):
        x = (output[0] if isinstance(output, tuple) else output).clone()
        difference = states[0] - x[0, at]
        basis = getattr(config, "basis", None)
        x[0, at] += difference if basis is None else basis @ (basis.T @ difference)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    with torch.inference_mode():
        for hook, ids in ((read, source), (put, base)):
            handle = layer.register_forward_hook(hook)
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            handle.remove()
    return logits


def swapped(path, bases, sources, configs):
    """(C, B, V) logits of `interchange`, by hooks."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def of(config, b):
        each = (config.position, config.position if config.source_position is None else config.source_position)
        at, source = (one[b] if isinstance(one, tuple) else one for one in each)
        return dataclasses.replace(config, position=at, source_position=source)

    pairs = list(zip(bases, sources, strict=True))
    rows = ([swapped_logits(model, *pair, of(config, b)) for b, pair in enumerate(pairs)] for config in configs)
    return torch.stack([torch.stack(row) for row in rows])


def hooked_log_probs(path, prompt, sequences, parts, temperature=1.0):
    """log p of each token of each sequence after the prompt under interventions, by hooks and edited weights."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for one in parts:
        layer = model.get_submodule("model.layers")[one.layer]
        if isinstance(one, RankOne):
            layer.mlp.down_proj.weight.data += torch.outer(one.u, one.v)
            continue

        def hook(module, inputs, output, one=one):
            x = output[0] if isinstance(output, tuple) else output
            y = torch.stack([change(one, row, range(len(row)), len(prompt)) for row in x])
            return (y, *output[1:]) if isinstance(output, tuple) else y

        layer.register_forward_hook(hook)
    return recompute(model, prompt, sequences, temperature)


def table_under(path, prompt, parts, steps):
    """prefix → (V,) log-probs of the next token under interventions, of all prefixes of less than `steps` tokens."""
    sequences = [list(s) for s in itertools.product(range(VOCAB), repeat=steps)]
    found = dict(zip(map(tuple, sequences), hooked_log_probs(path, prompt, sequences, parts), strict=True))
    return {
        prefix: np.array([found[(*prefix, v, *[0] * (steps - t - 1))][t] for v in range(VOCAB)])
        for t in range(steps)
        for prefix in itertools.product(range(VOCAB), repeat=t)
    }
