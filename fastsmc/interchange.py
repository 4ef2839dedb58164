"""Interchange interventions: what a model says of a base with hidden states of a source in it.

    Interchanges     `activations` and `interchange`, methods of any engine
    Asked            a call of `interchange`, read: prompts, configurations, and positions counted from 0
    Reading, Putting what stands at a layer's place in a forward pass: one reads hidden states, the other puts them in
    Answers          what is kept of the logits

A pair is a base and a source; each pair under each configuration is a row. (Geiger et al., arXiv 2106.02997)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.interventions import BLOCK, Interchange, Sizes, Step, Subspace, read_position
from fastsmc.maps import Site, SiteMaps, lay_out
from fastsmc.potentials.tokens import short, token_list
from fastsmc.values import as_int, check_int


# ------------------------------------------------------------------------------------------------------ the arguments
class Spots:
    """Numbers positions of prompts whose hidden states are wanted, without repeating any.

    Args:
        at: of each prompt, positions from 0.
    """

    def __init__(self, at: Sequence[Sequence[int]]) -> None:
        pairs = sorted({(i, position) for i, positions in enumerate(at) for position in positions})
        self._numbers = {pair: number for number, pair in enumerate(pairs)}
        self.at = [list(positions) for positions in at]

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, prompt: int, position: int) -> int:
        return self._numbers[prompt, position]

    def of_prompt(self, prompt: int, n: int) -> Tensor:
        """Gives the number of each of n positions of a prompt, (n,) int64; −1: it is not wanted."""
        return torch.tensor([self._numbers.get((prompt, position), -1) for position in range(n)])

    def check_finite(self, states: Tensor, layers: Sequence[int], name: str) -> None:
        """Refuses hidden states (S, L, H) that hold NaN or an infinity. ValueError: naming prompt, layer, position."""
        bad = ~states.isfinite().all(-1)
        if bad.any():
            number, layer = bad.nonzero()[0].tolist()
            prompt, position = next(pair for pair, n in self._numbers.items() if n == number)
            raise ValueError(
                f"{name}[{prompt}]: layer {layers[layer]} puts out NaN or an infinity at position {position}"
            )


class Asked(NamedTuple):
    """Holds a call of `interchange`.

    Attributes:
        bases, sources: B prompts each, as token ids.
        configs: C configurations.
        at, source_at: position of each configuration in each base and source, (C, B), from 0.
        labels: (B, L) int64, the tokens whose log-probs are wanted; None: none.
        logits: whether logits are wanted; if neither, the most likely token is.
    """

    bases: list[list[int]]
    sources: list[list[int]]
    configs: tuple[Interchange | Subspace, ...]
    at: list[list[int]]
    source_at: list[list[int]]
    labels: Tensor | None
    logits: bool

    @property
    def layers(self) -> list[int]:
        return sorted({config.layer for config in self.configs})

    def spots(self) -> Spots:
        """Numbers the positions of sources that are read."""
        return Spots([[row[b] for row in self.source_at] for b in range(len(self.bases))])

    @property
    def numbers(self) -> list[int]:
        """Numbers each configuration's map among those of its layer; every `Interchange` of a layer is the same map."""
        known: dict[int, dict[int, int]] = {}
        out = []
        for c, config in enumerate(self.configs):
            of_layer = known.setdefault(config.layer, {})
            out.append(of_layer.setdefault(c if isinstance(config, Subspace) else -1, len(of_layer)))
        return out

    def maps(self, width: int, device: torch.device) -> dict[Site, SiteMaps]:
        """Lays out, by layer, what configurations do to the difference from a source's hidden state of H = `width`."""
        steps: dict[int, dict[int, dict[Site, Step]]] = {}
        for config, number in zip(self.configs, self.numbers, strict=True):
            of_layer = steps.setdefault(config.layer, {})
            if number not in of_layer:
                of_layer[number] = {(config.layer, BLOCK): config.step(width)}
        return {site: maps for one in steps.values() for site, maps in lay_out(one, len(one), device).items()}


def read_asked(
    bases: list[list[int]], sources: list[list[int]], configs: Any, logits: Any, labels: Any, sizes: Sizes
) -> Asked:
    """Reads what `interchange` was called with, beside its prompts.

    Raises:
        ValueError: naming the argument, its value and what is allowed.
    """
    n = len(bases)
    if len(sources) != n or not n:
        raise ValueError(f"sources: {n} bases and {len(sources)} sources; must be as many, at least one")
    given = list(configs) if isinstance(configs, (list, tuple)) else [configs]
    if not given:
        raise ValueError("configs=[]: must hold at least one Interchange or Subspace")
    lengths, source_lengths = [len(ids) for ids in bases], [len(ids) for ids in sources]
    at, source_at = [], []
    for c, config in enumerate(given):
        name = f"configs[{c}]"
        if not isinstance(config, (Interchange, Subspace)):
            raise ValueError(f"{name}={short(config)}: must be an Interchange or a Subspace")
        if config.value is not None:
            raise ValueError(f"{name}: has a value; here it is read from the sources")
        try:
            config.check(sizes)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        own = config.source_position
        at.append(read_positions(f"{name}.position", config.position, lengths))
        source_name = f"{name}.position" if own is None else f"{name}.source_position"
        source_at.append(read_positions(source_name, config.position if own is None else own, source_lengths, "source"))
    if not isinstance(logits, bool):
        raise ValueError(f"logits={logits!r}: must be True or False")
    if logits and labels is not None:
        raise ValueError("labels: with logits=True all are returned; leave one of them out")
    kept = None if labels is None else read_labels(labels, n, sizes.vocab)
    return Asked(bases, sources, tuple(given), at, source_at, kept, logits)


def read_positions(name: str, given: Any, lengths: Sequence[int], what: str = "base") -> list[int]:
    """Reads one position, or one for each prompt, as positions from 0 in prompts of these lengths.

    Raises:
        ValueError: it is none, or outside, or one from 0 where prompts are of different lengths, where it says nothing
            alike.
    """
    given = read_position(name, given)
    if isinstance(given, tuple):
        if len(given) != len(lengths):
            raise ValueError(f"{name}: {len(given)} positions for {len(lengths)} prompts")
        each = given
    else:
        if given >= 0 and len(set(lengths)) > 1:
            raise ValueError(
                f"{name}={given}: {what}s have {min(lengths)} to {max(lengths)} tokens; give a position for each, or "
                "one from the end, as -1"
            )
        each = (given,) * len(lengths)
    for i, (position, n) in enumerate(zip(each, lengths, strict=True)):
        if not -n <= position < n:
            raise ValueError(f"{name}={position}: must be in [{-n}, {n}), as {what} {i} has {n} tokens")
    return [position % n for position, n in zip(each, lengths, strict=True)]


def read_labels(labels: Any, n: int, vocab: int) -> Tensor:
    """Reads a token id for each of n pairs, or L of them, as (n, L) or (n,) int64. ValueError: it is none."""
    rows = labels.tolist() if hasattr(labels, "tolist") else labels
    if not isinstance(rows, (list, tuple)) or len(rows) != n:
        what = f"{len(rows)} labels" if isinstance(rows, (list, tuple)) else short(rows)
        raise ValueError(f"labels: {what} for {n} pairs; give a token id for each, or a list of them for each")
    if any(as_int(one) is not None for one in rows):
        return torch.tensor(token_list("labels", rows, vocab))
    each = [token_list(f"labels[{i}]", row, vocab) for i, row in enumerate(rows)]
    if len({len(row) for row in each}) != 1 or not each[0]:
        raise ValueError("labels: the lists must have the same length, at least 1")
    return torch.tensor(each)


# ------------------------------------------------------------------------------------------------- in a forward pass
class Reading(NamedTuple):
    """Reads what a layer puts out.

    Attributes:
        states: (S, H), where row s becomes the hidden state of spot s.
    """

    states: Tensor
    reads: bool = True

    def apply(self, x: Tensor, spots: Tensor, source: Tensor | None = None) -> None:
        """Reads rows of `source` (R, H), or of x: those with a spot, (R,) int64, −1 for none."""
        rows = (spots >= 0).nonzero()[:, 0]
        self.states[spots[rows]] = (x if source is None else source)[rows].to(self.states)


def reading(states: Tensor, layers: Sequence[int]) -> dict[Site, Reading]:
    """Lays out the reading of hidden states (S, L, H) of layers."""
    return {(layer, BLOCK): Reading(states[:, i]) for i, layer in enumerate(layers)}


class Putting(NamedTuple):
    """Puts hidden states of sources, or their part in a subspace, into what a layer puts out.

    Attributes:
        maps: of the configurations of a layer.
        numbers: (R,) int64, of rows' maps; −1: it is at another layer.
        values: (R, H), the sources' hidden states.
    """

    maps: SiteMaps
    numbers: Tensor
    values: Tensor
    reads: bool = True

    def apply(self, x: Tensor, rows: Tensor, source: Tensor | None = None) -> None:
        """Changes tokens of x (Q, H) in place: each says which row's position it is, `rows` (Q,) int64, −1 for none.

        Args:
            source: (Q, H), the hidden states, of which x is what they are to be changed by; None: x.
        """
        row = rows.clamp(min=0)
        numbers = torch.where(rows >= 0, self.numbers[row], -1)
        difference = (x if source is None else source) - self.values[row].to(x.dtype)
        self.maps.apply(x, numbers, difference)


def putting(
    asked: Asked, maps: dict[Site, SiteMaps], rows: Sequence[tuple[int, int]], spots: Spots, states: Tensor
) -> dict[Site, Putting]:
    """Lays out rows, each a configuration and a pair, with the sources' hidden states (S, L, H)."""
    device, layers, of_config = states.device, asked.layers, asked.numbers
    of_layer = {layer: i for i, layer in enumerate(layers)}
    spot = torch.tensor([spots.number(b, asked.source_at[c][b]) for c, b in rows], device=device)
    layer = torch.tensor([of_layer[asked.configs[c].layer] for c, _ in rows], device=device)
    numbers, values = torch.tensor([of_config[c] for c, _ in rows], device=device), states[spot, layer]
    return {
        site: Putting(one, torch.where(layer == of_layer[site[0]], numbers, -1), values) for site, one in maps.items()
    }


class Answers:
    """Keeps of each row's logits what was asked for, on the CPU."""

    def __init__(self, asked: Asked, vocab: int) -> None:
        self._asked, shape = asked, (len(asked.configs), len(asked.bases))
        self._broken: tuple[int, int] | None = None
        if asked.logits:
            self._kept = torch.empty(*shape, vocab)
        elif asked.labels is not None:
            self._kept = torch.empty(*shape, *asked.labels.shape[1:])
        else:
            self._kept = torch.empty(*shape, dtype=torch.int64)

    def put(self, rows: Sequence[tuple[int, int]], logits: Tensor) -> None:
        """Takes the logits (R, V) of rows, each a configuration and a pair."""
        bad = logits.isnan().any(-1)
        if self._broken is None and bad.any():
            self._broken = rows[int(bad.nonzero()[0])]
        at = tuple(torch.tensor(one) for one in zip(*rows, strict=True))
        if self._asked.logits:
            found = logits.float()
        elif (labels := self._asked.labels) is not None:
            wanted = labels[at[1]].to(logits.device)
            found = logits.float().log_softmax(-1).gather(1, wanted.reshape(len(rows), -1)).reshape(wanted.shape)
        else:
            found = logits.argmax(-1)
        self._kept[at] = found.cpu()

    def result(self) -> Tensor:
        """Returns them, (C, B) or more. ValueError: some were NaN, which is said when all rows have run."""
        if self._broken is not None:
            raise ValueError(f"configs[{self._broken[0]}]: the logits of pair {self._broken[1]} are NaN under it")
        return self._kept


# --------------------------------------------------------------------------------------------------------- the engines
class Interchanges:
    """Adds interchange interventions to an engine, which says how its model is called."""

    def _asked_prompts(self, name: str, prompts: Any) -> list[list[int]]:
        """Reads prompts, none longer than the model's context. ValueError: naming the argument."""
        raise NotImplementedError

    def _model_sizes(self) -> Sizes:
        raise NotImplementedError

    def _read_states(self, prompts: list[list[int]], spots: Spots, layers: Sequence[int]) -> Tensor:
        """Reads the hidden states (S, L, H) float32 that layers put out at spots."""
        raise NotImplementedError

    def _put_states(self, asked: Asked) -> Tensor:
        """Runs all rows, and returns what `Answers` hold of them."""
        raise NotImplementedError

    def activations(self, prompts: Any, layers: Sequence[int], positions: Sequence[Any]) -> Tensor:
        """Reads what layers put out (hidden states, the residual stream behind a layer) in one pass over prompts.

        Args:
            prompts: B prompts, texts or token ids.
            layers: L of them, from 0.
            positions: P positions, each an integer from 0, or negative from the end, or a list of one per prompt.

        Returns:
            (B, L, P, H) float32, on the CPU.

        Raises:
            ValueError: naming the argument; a layer or a position that is not there, a hidden state that is not finite.
        """
        ids, sizes = self._asked_prompts("prompts", prompts), self._model_sizes()
        if not ids:
            raise ValueError("prompts=[]: must be at least one prompt")
        if not isinstance(layers, (list, tuple, range)) or not layers:
            raise ValueError(f"layers={short(layers)}: must be a list of at least one layer")
        if not isinstance(positions, (list, tuple, range)) or not positions:
            raise ValueError(f"positions={short(positions)}: must be a list of at least one position")
        chosen = [check_int(f"layers[{i}]", layer, 0, sizes.n_layers - 1) for i, layer in enumerate(layers)]
        lengths = [len(one) for one in ids]
        at = []
        for i, position in enumerate(positions):
            at.append(read_positions(f"positions[{i}]", position, lengths, "prompt"))
        spots = Spots([[row[b] for row in at] for b in range(len(ids))])
        states = self._read_states(ids, spots, chosen)
        spots.check_finite(states, chosen, "prompts")
        numbers = torch.tensor([[spots.number(b, row[b]) for row in at] for b in range(len(ids))])
        return states[numbers].transpose(1, 2).contiguous()

    def interchange(
        self,
        bases: Any,
        sources: Any,
        configs: Interchange | Subspace | Sequence[Interchange | Subspace],
        *,
        logits: bool = False,
        labels: Any = None,
    ) -> Tensor:
        """Says what the model answers to each base with a source's hidden state in it, under each configuration.

        Sources run once for all configurations, and bases once; a row shares its base's keys and values before the
        position, and runs from there on. Rows of all configurations share forward passes.

        Args:
            bases, sources: B prompts each, texts or token ids; pair b is bases[b] and sources[b].
            configs: C configurations, `Interchange` or `Subspace`, without a value.
            logits: whether all logits are returned.
            labels: B token ids, or B lists of L, whose log-probs are returned.

        Returns:
            of the last position: the most likely tokens (C, B) int64; with `logits`, those (C, B, V) float32; with
            `labels`, log-probs (C, B) or (C, B, L) float32. On the CPU.

        Raises:
            ValueError: naming the argument; positions outside, one from 0 for bases of different lengths, unequal
                numbers of bases and sources, a basis of another width, labels outside, hidden states that are not
                finite, a model whose layers are not known.
        """
        sizes = self._model_sizes()
        ids = self._asked_prompts("bases", bases), self._asked_prompts("sources", sources)
        return self._put_states(read_asked(*ids, configs, logits, labels, sizes))
