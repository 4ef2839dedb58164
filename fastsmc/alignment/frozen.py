"""What of a frozen model stays as it is while one hidden state per base changes, computed once.

    bases    a pass over each distinct one → what the layers put out from the first position on → h at (layer, position)
                                           → keys and values of the layers above, before the last position
    sources  a pass up to the last layer   → what the layers put out at their positions
    h' (B, H) at (layer, position) → the layers above, from that position on → logits of the last position

A causal model computes what stands before a position without knowing what stands there: hence nothing above changes.
Layers and positions of a sweep share one store: a flat tensor with a record per distinct base and source, in memory,
or memory-mapped from a file that has no name any more, so that it goes with the process.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsmc.trunk import Trunk

#: tokens that go through the model at once while the store is filled
TOKENS = 2048
#: bases whose logits are kept, to check the layers above by themselves
PROBES = 4
#: what these logits may be off, as a share of the largest: float32, and shorter types
CLOSE = {torch.float32: 1e-3}
CLOSE_ENOUGH = 0.1


class Place(NamedTuple):
    """Says where states are put in each base and where they are from in each source: positions from 0, one per pair."""

    base: list[int]
    source: list[int]


@dataclasses.dataclass
class _Record:
    """Is a distinct prompt, and where the store keeps it.

    Attributes:
        ids: token ids; of a source, those that matter.
        positions: those whose hidden states are kept, ascending.
        n_before: how many positions' keys and values are kept.
        start: offset of the record.
    """

    ids: list[int]
    positions: list[int]
    n_before: int = 0
    start: int = 0


class _Enough(Exception):
    """Ends a pass behind the last layer that is asked for."""


class Prefix:
    """Stands in for a cache of keys and values: gives layers what is stored with what is new behind, and keeps nothing.

    Args:
        stored: (layers, 2, B, heads, P, head size), of the layers from `first` on.
    """

    def __init__(self, stored: Tensor, first: int) -> None:
        self._stored, self._first = stored, first

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **more: Any) -> tuple[Tensor, Tensor]:
        before = self._stored[layer_idx - self._first]
        return torch.cat([before[0], keys], -2), torch.cat([before[1], values], -2)


@contextmanager
def without_gradients(model: torch.nn.Module) -> Iterator[None]:
    """Has the parameters of a model take no gradients within."""
    taking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in taking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in taking:
            parameter.requires_grad_(True)


class Frozen:
    """Keeps what of pairs does not change, and runs what does.

    Args:
        trunk: the model; its parameters are only read.
        bases, sources: token ids of n pairs.
        layers: whose outputs are put into bases.
        places: where.
        max_bytes: more than this is mapped from disk.
        directory: where the file is made; None: where the system has temporary files.
        say: is told how large the store is, before it is filled.

    Attributes:
        n_bytes: of the store.
        on_disk: whether it is mapped from disk.
        n_tokens: that `fill` takes through the model.

    Raises:
        ValueError: sliding windows, layers that are not known, hidden states that are not finite, or no room on disk.
    """

    def __init__(
        self,
        trunk: Trunk,
        bases: Sequence[list[int]],
        sources: Sequence[list[int]],
        layers: Sequence[int],
        places: Sequence[Place],
        *,
        max_bytes: int,
        directory: str | os.PathLike | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.trunk, self.layers, self.places = trunk, sorted(set(layers)), list(places)
        self._family = type(trunk.model).__name__
        self._bases, self._base_of = _distinct(bases, [place.base for place in places], whole=True)
        self._sources, self._source_of = _distinct(sources, [place.source for place in places], whole=False)
        self._check_windows()
        self._heads, self._size, self._dtype = self._probe()
        self._first = self.layers[0] + 1  # of the layers whose keys and values are kept
        self._n_above = len(trunk.layers) - self._first
        n = 0
        for record in self._bases + self._sources:
            record.start = n
            n += self._state_elements(record) + self._n_above * 2 * self._heads * record.n_before * self._size
        self.n_bytes, self.on_disk = n * self._dtype.itemsize, n * self._dtype.itemsize > max_bytes
        self.n_tokens = sum(len(record.ids) for record in self._bases + self._sources)
        say(
            f"fastsmc: {len(self._bases)} distinct bases and {len(self._sources)} sources take {_said(self.n_bytes)} "
            + (f"on disk, above max_cache_bytes={max_bytes}" if self.on_disk else f"of memory on {trunk.device}")
        )
        self._flat = (
            self._mapped(n, directory) if self.on_disk else torch.empty(n, dtype=self._dtype, device=trunk.device)
        )
        self._logits: dict[int, Tensor] = {}  # of bases that are checked

    # ------------------------------------------------------------------------------------------------- the store
    def _check_windows(self) -> None:
        config = self.trunk.model.config.get_text_config()
        kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        if kinds:
            raise ValueError(f"{self._family}: its layers are not known: some are of the kind {min(kinds)!r}")
        window, longest = getattr(config, "sliding_window", None), max(len(record.ids) for record in self._bases)
        if window is not None and longest > window and getattr(config, "use_sliding_window", True):
            raise ValueError(
                f"{self._family}: has a sliding window of {window} tokens, and bases have up to {longest}; what stands "
                "above a position is run by itself only where it sees the whole text"
            )

    @torch.no_grad()
    def _probe(self) -> tuple[int, int, torch.dtype]:
        """Runs a token to learn heads, head size and dtype of keys and values."""
        stored = self._keys_values(self._run([self._bases[0].ids[:1]])[1])
        return stored.shape[3], stored.shape[5], stored.dtype

    def _keys_values(self, cache: Any) -> Tensor:
        """Gives what a pass left in a cache, (layers, 2, B, heads, T, head size)."""
        try:
            kept = [torch.stack([layer.keys, layer.values]) for layer in cache.layers]
            if len(kept) == len(self.trunk.layers):
                return torch.stack(kept)
        except (AttributeError, RuntimeError, TypeError):
            pass
        raise ValueError(f"{self._family}: its layers are not known: their keys and values are not of one shape")

    def _run(self, ids: Sequence[list[int]]) -> tuple[Tensor, Any]:
        """Runs texts of one length: hidden states (B, T, H) and a cache of keys and values."""
        from transformers import DynamicCache

        tokens = torch.tensor(ids, device=self.trunk.device)
        parents = torch.arange(len(tokens), device=self.trunk.device)
        try:
            return self.trunk.next(DynamicCache(), parents, tokens)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"{self._family}: its layers are not known: {error}") from error

    def _mapped(self, n: int, directory: str | os.PathLike | None) -> Tensor:
        where = os.fspath(directory) if directory is not None else tempfile.gettempdir()
        if (free := shutil.disk_usage(where).free) < self.n_bytes:
            raise ValueError(f"{where}: has {_said(free)} free, the cache takes {_said(self.n_bytes)}")
        handle, name = tempfile.mkstemp(prefix="fastsmc-frozen-", dir=where)
        try:
            if hasattr(os, "posix_fallocate"):  # else a disk that others fill in the meantime ends this process
                os.posix_fallocate(handle, 0, self.n_bytes)
            return torch.from_file(name, shared=True, size=n, dtype=self._dtype)
        except OSError as error:
            raise ValueError(f"{where}: cannot hold the cache, {_said(self.n_bytes)}: {error}") from None
        finally:
            os.close(handle)
            os.unlink(name)

    def _state_elements(self, record: _Record) -> int:
        return len(self.layers) * len(record.positions) * self.trunk.hidden_size

    def _states(self, record: _Record) -> Tensor:
        """Gives hidden states of a record, (layers, positions, H): a view."""
        shape = len(self.layers), len(record.positions), self.trunk.hidden_size
        return self._flat[record.start : record.start + self._state_elements(record)].view(shape)

    def _before(self, record: _Record) -> Tensor:
        """Gives keys and values of a record, (layers above, 2, heads, positions, head size): a view."""
        shape = self._n_above, 2, self._heads, record.n_before, self._size
        start = record.start + self._state_elements(record)
        return self._flat[start : start + torch.Size(shape).numel()].view(shape)

    @torch.no_grad()
    def fill(self, progress: Callable[[int], Any] = lambda n: None) -> None:
        """Computes the store.

        Args:
            progress: is told of tokens that have gone through the model.

        Raises:
            ValueError: a hidden state is not finite, or the layers above by themselves give other logits than the
                model does.
        """
        longest = max(range(len(self._bases)), key=lambda i: len(self._bases[i].ids))
        probes = list(dict.fromkeys([longest, *self._base_of]))[:PROBES]
        for numbers in _batches(self._bases):
            with self._watched(self._bases, numbers):
                hidden, cache = self._run([self._bases[i].ids for i in numbers])
            stored = self._keys_values(cache)[self._first :]
            for row, i in enumerate(numbers):
                self._before(self._bases[i]).copy_(stored[:, :, row, :, : self._bases[i].n_before])
                if i in probes:
                    self._logits[i] = self.trunk.logits(hidden[row, -1]).float()
            progress(hidden.shape[0] * hidden.shape[1])
        for numbers in _batches(self._sources):
            with self._watched(self._sources, numbers, until=self.layers[-1]):
                ids = [self._sources[i].ids for i in numbers]
                self._run(ids)
            progress(len(ids) * len(ids[0]))
        for place in range(len(self.places)):
            self._check(self.layers[0], place)  # which runs all the layers that others run

    @contextmanager
    def _watched(self, records: list[_Record], numbers: list[int], until: int | None = None) -> Iterator[None]:
        """Has hidden states of a pass be stored; it ends behind layer `until`."""

        def hook(layer: int) -> Callable[[Any, Any, Any], None]:
            def keep(module: Any, inputs: Any, output: Any) -> None:
                x = output[0] if isinstance(output, tuple) else output
                for row, i in enumerate(numbers):
                    wanted = x[row, records[i].positions]
                    if len(bad := (~wanted.isfinite().all(1)).nonzero()):
                        what = "base" if records is self._bases else "source"
                        raise ValueError(
                            f"{what} {records[i].ids[:8]}…: layer {layer} puts out NaN or an infinity at position "
                            f"{records[i].positions[int(bad[0])]}"
                        )
                    self._states(records[i])[self.layers.index(layer)].copy_(wanted)
                if layer == until:
                    raise _Enough

            return keep

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(self.trunk.layers[layer].register_forward_hook(hook(layer)).remove)
            with suppress(_Enough):
                yield

    def _check(self, layer: int, place: int) -> None:
        """Compares the layers above, by themselves, with the model where nothing changes. ValueError: they differ."""
        pair_of = {base: pair for pair, base in enumerate(self._base_of) if base in self._logits}
        rows = list(pair_of.values())
        found = self.logits(layer, place, self.states(layer, place, rows)[0], rows)
        wanted = torch.stack([self._logits[self._base_of[row]] for row in rows])
        error = float(((found - wanted).abs().amax(1) / wanted.abs().amax(1)).max())
        if not error <= CLOSE.get(self._dtype, CLOSE_ENOUGH):
            raise ValueError(
                f"{self._family}: its layers are not known: those above {layer} by themselves give logits that are "
                f"{error:.2g} of the largest off the model's"
            )

    # ------------------------------------------------------------------------------------------------- a step
    def states(self, layer: int, place: int, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Gives the hidden states of bases and of sources of some pairs, (B, H) float32 each."""
        of, at = self.layers.index(layer), self.places[place]
        sides = []
        for records, number, positions in (
            (self._bases, self._base_of, at.base), (self._sources, self._source_of, at.source),
        ):  # fmt: skip
            found = []
            for row in rows:
                record = records[number[row]]
                found.append(self._states(record)[of, record.positions.index(positions[row])])
            sides.append(torch.stack(found).to(self.trunk.device).float())
        return sides[0], sides[1]

    def logits(self, layer: int, place: int, h: Tensor, rows: Sequence[int]) -> Tensor:
        """Computes logits (B, V) float32 of the last position with h (B, H) in bases of pairs; gradients reach h.

        Bases of several lengths and positions are padded: keys and values before the position at their end, hidden
        states from it on at theirs; attention sees no padding.
        """
        of, device = self.layers.index(layer), self.trunk.device
        records = [self._bases[self._base_of[row]] for row in rows]
        starts = [self.places[place].base[row] for row in rows]
        lengths = [len(record.ids) - start for record, start in zip(records, starts, strict=True)]
        n, width, before = len(records), max(lengths), max(starts)
        shape = len(self.trunk.layers) - layer - 1, 2, n, self._heads, before, self._size
        stored = torch.zeros(shape, dtype=self._dtype, device=self._flat.device)
        x = torch.zeros(n, width, self.trunk.hidden_size, dtype=self._dtype, device=self._flat.device)
        for row, record in enumerate(records):
            start, length = starts[row], lengths[row]
            stored[:, :, row, :, :start] = self._before(record)[layer + 1 - self._first :, :, :, :start]
            x[row, :length] = self._states(record)[of, len(record.positions) - length :]
        stored, x = stored.to(device), x.to(device)
        x = torch.cat([h.to(x.dtype)[:, None], x[:, 1:]], 1)
        first, size = torch.tensor(starts, device=device), torch.tensor(lengths, device=device)
        columns = torch.arange(width, device=device)
        positions = first[:, None] + torch.minimum(columns, size[:, None] - 1)
        mask = None
        if width > 1 or min(starts) < before:
            seen = torch.arange(before, device=device) < first[:, None]  # (B, P)
            causal = columns <= columns[:, None]  # what is behind a base's end sees and is seen by nothing of it
            seen = torch.cat([seen[:, None].expand(-1, width, -1), causal.expand(n, -1, -1)], 2)
            mask = torch.zeros(seen.shape, dtype=x.dtype, device=device)
            mask = mask.masked_fill_(~seen, torch.finfo(x.dtype).min)[:, None]
        hidden = self.trunk.above(layer, x, positions, Prefix(stored, layer + 1), mask)
        return self.trunk.logits(hidden[torch.arange(n, device=device), size - 1]).float()


def _distinct(
    prompts: Sequence[list[int]], positions: Sequence[Sequence[int]], whole: bool
) -> tuple[list[_Record], list[int]]:
    """Lists distinct prompts with what is kept of each, and the number of each pair's.

    Args:
        positions: of each place, one per prompt.
        whole: whether all from the first position on is kept, and keys and values up to the last; else the positions.
    """
    numbers: dict[tuple[int, ...], int] = {}
    number = [numbers.setdefault(tuple(ids), len(numbers)) for ids in prompts]
    wanted: list[set[int]] = [set() for _ in numbers]
    for at in positions:
        for i, position in zip(number, at, strict=True):
            wanted[i].add(position)
    out = []
    for ids, kept in zip(numbers, wanted, strict=True):
        if whole:
            out.append(_Record(list(ids), list(range(min(kept), len(ids))), max(kept)))
        else:
            out.append(_Record(list(ids[: max(kept) + 1]), sorted(kept)))
    return out, number


def _batches(records: Sequence[_Record]) -> Iterator[list[int]]:
    """Yields numbers of records of one length, up to `TOKENS` tokens at a time."""
    order = sorted(range(len(records)), key=lambda i: len(records[i].ids))
    for length, same in itertools.groupby(order, key=lambda i: len(records[i].ids)):
        members, size = list(same), max(1, TOKENS // length)
        yield from (members[i : i + size] for i in range(0, len(members), size))


def _said(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**28 else f"{n_bytes / 2**20:.1f} MiB"
