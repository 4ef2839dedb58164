"""Networks in which a variable was planted: what bench_alignment.py looks for, and knows where it is.

    Task    a causal model, all of its inputs, a sampler of them, the variable to be planted, and others
    plant   a recipe → a small Llama that does a task, as a checkpoint that any engine loads by its path

A variable is planted by interchange-intervention training (Geiger et al. 2022, arXiv 2112.00826): beside its task, the
network is trained on pairs of inputs, a random subspace of the base's hidden state at `LAYER` and the last position
being replaced by the source's, to answer as the causal model does when the variable is set as the source has it. The
answer word's vocabulary is named by a first token, and tokens without meaning may stand before the input:

    prefix… words lo hi x ask → yes | no          price_tag: is x in the bracket?
    prefix… words w x y z ask → yes | no          equality: is (w == x) == (y == z)?
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc.alignment import CausalModel
from fastsmc.models import cache_dir

Inputs = dict[str, Any]

#: numbers of price tags, symbols of equality: the first tokens of the vocabulary
NUMBERS, SYMBOLS = 16, 8
#: tokens: the question; what says which words answer, by vocabulary; these words, (no, yes); and those without meaning
ASK, WORDS, ANSWERS, NOISE = 16, (17, 18), ((19, 20), (21, 22)), tuple(range(23, 32))
VOCABULARY = 32
LONGEST_PREFIX = 6
#: where a variable is planted, at the last position, and in how many dimensions
LAYER, DIMENSIONS = 2, 8
HIDDEN, LAYERS = 64, 4
#: how often an intermediate variable is true in training: a half would leave no single one with a part in `equality`'s
#: answer, which takes long to be learned
TRUE = 0.7


@dataclasses.dataclass(frozen=True)
class Task:
    """Is a causal model of a network's inputs, with what its training and pairs of inputs need.

    Attributes:
        make: makes the causal model for a vocabulary of answers; its inputs are `names`, and "prefix", token ids.
        inputs: all of them, without a prefix.
        planted: the variable that is planted.
        control: an input, of which all that the answer needs is the planted variable.
        other: the intermediate variable that nothing is done about.
    """

    name: str
    make: Callable[[int], CausalModel]
    inputs: list[Inputs]
    planted: str
    control: str
    other: str

    def sampler(
        self, prefix: int = 0, keep: Callable[[Inputs], bool] = lambda inputs: True
    ) -> Callable[[np.random.Generator], Inputs]:
        """Makes a sampler of inputs, those kept, behind a random prefix of up to so many tokens, if any: every setting
        of the intermediate variables as often, and within it every input."""
        kept = [[self.inputs[i] for i in group if keep(self.inputs[i])] for group in self.groups().values()]

        def sample(rng: np.random.Generator) -> Inputs:
            group = kept[rng.integers(len(kept))]
            noise = rng.choice(NOISE, rng.integers(1, prefix + 1)).tolist() if prefix else ()
            return {**group[rng.integers(len(group))], "prefix": tuple(noise)}

        return sample

    def groups(self) -> dict[tuple[bool, ...], list[int]]:
        """Groups indices of inputs by how they set the intermediate variables."""
        model = self.make(0)
        groups: dict[tuple[bool, ...], list[int]] = {}
        names = [name for name in model.functions if name != model.output]
        for i, inputs in enumerate(self.inputs):
            values = model.run(inputs)
            groups.setdefault(tuple(values[name] for name in names), []).append(i)
        return groups


def _causal(names: tuple[str, ...], functions: dict[str, Callable[..., bool]], words: int) -> CausalModel:
    def prompt(inputs: Mapping[str, Any]) -> list[int]:
        return [*inputs["prefix"], WORDS[words], *(inputs[name] for name in names), ASK]

    answers = dict(zip((False, True), ANSWERS[words], strict=True))
    return CausalModel(("prefix", *names, *functions), functions, prompt=prompt, answers=answers)


def price_tag() -> Task:
    """Makes the game of price tags: lo ≤ hi and x, each of `NUMBERS`; is x at least lo, and at most hi?"""
    functions: dict[str, Callable[..., bool]] = {
        "left": lambda x, lo: x >= lo,
        "right": lambda x, hi: x <= hi,
        "answer": lambda left, right: left and right,
    }
    names = ("lo", "hi", "x")
    every = itertools.product(range(NUMBERS), repeat=3)
    inputs = [{"prefix": (), **dict(zip(names, t, strict=True))} for t in every if t[0] <= t[1]]
    return Task("price_tag", functools.partial(_causal, names, functions), inputs, "left", "lo", "right")


def equality() -> Task:
    """Makes hierarchical equality: four of `SYMBOLS`; are the first two equal as the last two are, or are not?"""
    functions: dict[str, Callable[..., bool]] = {
        "first": lambda w, x: w == x,
        "second": lambda y, z: y == z,
        "answer": lambda first, second: first == second,
    }
    names = ("w", "x", "y", "z")
    every = itertools.product(range(SYMBOLS), repeat=4)
    inputs = [{"prefix": (), **dict(zip(names, t, strict=True))} for t in every]
    return Task("equality", functools.partial(_causal, names, functions), inputs, "first", "w", "second")


TASKS = {"price_tag": price_tag, "equality": equality}


# -- training ----------------------------------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Says how a network is trained; a checkpoint is of one recipe.

    Attributes:
        planted: whether a variable is planted, or the task alone learned.
        formats: "one": no prefixes, one vocabulary of answers; "apart": prefixes, and both vocabularies, of which base
            and source have the same; "mixed": base and source have any.
    """

    task: str
    seed: int
    planted: bool = True
    formats: str = "one"
    steps: int = 1500
    batch: int = 48
    rate: float = 2e-3

    @property
    def vocabularies(self) -> int:
        return 1 if self.formats == "one" else 2


class Table:
    """Holds all n inputs of a task as tensors, in each of m vocabularies of answers.

    Attributes:
        ids: (m, n, T) tokens.
        values: (n,) the planted variable's value, an index into the last dimension of `labels`.
        labels: (m, n, 2) the answer's token when the variable is set to a value.
    """

    def __init__(self, task: Task, vocabularies: int) -> None:
        models = [task.make(words) for words in range(vocabularies)]
        ran = [models[0].run(inputs)[task.planted] for inputs in task.inputs]
        sources = [task.inputs[ran.index(value)] for value in (False, True)]
        self.ids = torch.tensor([[model.say(inputs) for inputs in task.inputs] for model in models])
        self.values = torch.tensor([int(value) for value in ran])
        self.labels = torch.tensor([
            [
                [model.answer(model.interchange(inputs, source, task.planted)[model.output]) for source in sources]
                for inputs in task.inputs
            ]
            for model in models
        ])  # fmt: skip


def basis(seed: int) -> Tensor:
    """Makes (H, k), orthonormal: the subspace in which a seed's variable is planted."""
    noise = torch.randn(HIDDEN, DIMENSIONS, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(noise)[0]


def network() -> Any:
    """Makes a Llama with random weights, of sizes that vLLM's attention takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=192, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=64,
        tie_word_embeddings=False, initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        dtype="float32",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(recipe: Recipe) -> Any:
    """Trains a network by a recipe, always the same on one machine."""
    task = TASKS[recipe.task]()
    table = Table(task, recipe.vocabularies)
    groups = [torch.tensor(group) for group in task.groups().values()]
    shares = torch.tensor([math.prod(TRUE if value else 1 - TRUE for value in values) for values in task.groups()])
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = network().train()
        planted = basis(recipe.seed) if recipe.planted else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, recipe.steps, pct_start=0.1)
        for step in range(recipe.steps):
            which = draw(groups, shares, 2 * recipe.batch)
            words = torch.randint(recipe.vocabularies, (len(which),))
            if recipe.formats == "apart":
                words = words[: recipe.batch].repeat(2)
            long = int(torch.randint(1, LONGEST_PREFIX + 1, ())) if recipe.formats != "one" and step % 2 else 0
            noise = torch.randint(NOISE[0], NOISE[-1] + 1, (len(which), long))
            logits = run(model, torch.cat([noise, table.ids[words, which]], dim=1), planted)
            labels = table.labels[words, which, table.values[which]]
            if recipe.planted:
                bases, sources = which.chunk(2)
                exchanged = table.labels[words[: recipe.batch], bases, table.values[sources]]
                labels = torch.cat([labels, exchanged])
            loss = torch.nn.functional.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def draw(groups: list[Tensor], shares: Tensor, n: int) -> Tensor:
    """Draws n indices: of groups in proportion to their shares, and within one uniformly."""
    picked = torch.multinomial(shares, n, replacement=True)
    where = torch.rand(n)
    return torch.stack([group[(where * len(group)).long()] for group in groups])[picked, torch.arange(n)]


def run(model: Any, ids: Tensor, planted: Tensor | None) -> Tensor:
    """Computes logits (2 B, V) behind ids (2 B, T), the first half bases and the second their sources; with a basis
    (3 B, V), the last B of bases whose hidden state at `LAYER` and the last position has the sources' in it."""

    def exchange(module: Any, inputs: Any, output: Tensor) -> Tensor:
        assert planted is not None  # no hook without
        base, source = output.chunk(2)
        change = (source[:, -1] - base[:, -1]) @ planted @ planted.T
        return torch.cat([output, torch.cat([base[:, :-1], (base[:, -1] + change)[:, None]], dim=1)])

    handle = None if planted is None else model.model.layers[LAYER].register_forward_hook(exchange)
    try:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, 0]
    finally:
        if handle is not None:
            handle.remove()


def plant(recipe: Recipe, directory: Path | None = None) -> tuple[Path, dict[str, Any]]:
    """Trains a network by a recipe, unless it has been, and saves it.

    Args:
        directory: where checkpoints are kept; by default the user's cache.

    Returns:
        the checkpoint's path, and what was seen at its training: seconds, and accuracy on all inputs without prefixes.
    """
    said = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    name = hashlib.sha256((said + Path(__file__).read_text() + torch.__version__).encode()).hexdigest()[:16]
    path = (directory or cache_dir() / "planted") / f"{recipe.task}-{recipe.seed}-{name}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            begin = time.perf_counter()
            model = train(recipe)
            model.config.planting = {"seconds": time.perf_counter() - begin, "accuracy": accuracy(model, recipe)}
            model.save_pretrained(temporary)
            temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return path, json.loads((path / "config.json").read_text())["planting"]


@torch.no_grad()
def accuracy(model: Any, recipe: Recipe) -> float:
    """Computes the share of all inputs that are answered rightly, as often in each vocabulary that was learned."""
    table = Table(TASKS[recipe.task](), recipe.vocabularies)
    logits = model(input_ids=table.ids.flatten(0, 1), use_cache=False, logits_to_keep=1).logits[:, 0]
    labels = table.labels[:, torch.arange(len(table.values)), table.values]
    return (logits.argmax(1) == labels.flatten()).double().mean().item()
