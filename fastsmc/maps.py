"""What a list of interventions does in a forward pass: which affine map each layer makes at each position.

    interventions → Maps: the different maps that positions can have, its *variants*, by site
                  → lay_out: variants of many lists side by side, by site, as `ops.intervene` takes them
                  → SiteMaps.apply, with the variant of each row

A site is a layer and a place in it. Maps that meet at a site are composed, in the list's order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.interventions import BLOCK, LayerIntervention, Steer, Step

#: (layer, place), the place BLOCK or DOWN_PROJ
Site = tuple[int, str]
#: stands in the place of a number of `first_reached`: none
NOWHERE = -1


def compose(first: Step, second: Step) -> Step:
    """Makes one map of two that follow one another at a block, x ↦ second(first(x))."""
    if second.replaces:
        return second
    if first.replaces:
        shift = first.shift + (second.down @ first.shift) @ second.up + second.shift
        return first._replace(shift=shift)
    cross = second.down @ first.up.T  # (r2, r1)
    return Step(
        torch.cat([first.down, second.down]),
        torch.cat([first.up + cross.T @ second.up, second.up]),
        first.shift + second.shift + (second.down @ first.shift) @ second.up,
    )


def add(first: Step, second: Step) -> Step:
    """Makes one map of two changes of a weight: both read what the weight reads."""
    return Step(torch.cat([first.down, second.down]), torch.cat([first.up, second.up]), first.shift + second.shift)


def first_reached(layers: Sequence[LayerIntervention]) -> int:
    """Returns the first position that any of them reaches in a prompt that is long enough, `NOWHERE` if none."""
    firsts = []
    for part in layers:
        if not isinstance(part, Steer) or part.at != "generated":
            firsts.append(part.listed[0] if part.listed else 0)
    return min(firsts, default=NOWHERE)


class Maps:
    """Holds the variants of a list of interventions, and says where each stands.

    Attributes:
        layers: the interventions.
        variants: the map at each site, for each set of interventions that some position has together.
    """

    def __init__(self, layers: Sequence[LayerIntervention]) -> None:
        self.layers = tuple(layers)
        listed = {position for part in layers for position in part.listed}
        beyond = max(listed, default=0) + 1
        # every set that can be: at a listed position or at none, before and behind the prompt's end
        sets = {self._at(p, prompt_len) for p in (*listed, beyond) for prompt_len in (p, p + 1)} - {()}
        self._sets = sorted(sets)
        self.variants = [self._compose(chosen) for chosen in self._sets]

    def _at(self, position: int, prompt_len: int) -> tuple[int, ...]:
        return tuple(i for i, part in enumerate(self.layers) if part.reaches(position, prompt_len))

    def _compose(self, chosen: Sequence[int]) -> dict[Site, Step]:
        out: dict[Site, Step] = {}
        for part in (self.layers[i] for i in chosen):
            site, step = (part.layer, part.place), part.step()
            join = compose if part.place == BLOCK else add
            out[site] = join(out[site], step) if site in out else step
        return out

    def of_positions(self, prompt_len: int, n: int) -> list[int]:
        """Lists the variant at positions 0 to n − 1 after a prompt of so many tokens; −1: none."""
        number = {chosen: i for i, chosen in enumerate(self._sets)} | {(): -1}
        return [number[self._at(position, prompt_len)] for position in range(n)]


class AtSite(Protocol):
    """Says what stands at a site in a forward pass.

    Attributes:
        reads: whether it wants hidden states where x is not these.
    """

    @property
    def reads(self) -> bool: ...

    def apply(self, x: Tensor, variants: Tensor, source: Tensor | None = None) -> None:
        """Changes x (Q, H) in place, or reads it; `variants` (Q,) int64 says how of each token, −1 for not at all.

        Args:
            source: (Q, K), what is read; None: x.
        """


class SiteMaps(NamedTuple):
    """Holds the maps of one site for numbered variants, as `ops.intervene` takes them.

    Attributes:
        offsets, down, up, shift: see there; a variant that does nothing here has no factors, and a shift of zero.
        finite: (S,) bool, cleared for a variant whose rows have come out with NaN or infinite.
        reads: whether any variant has factors or replaces x, so that what it reads is wanted.
        replaces: (S,) bool, which variants put a value in the place of x; None: none does.
        values: (S, H), these values; such a variant has a shift of zero.
    """

    offsets: Tensor
    down: Tensor
    up: Tensor
    shift: Tensor
    finite: Tensor
    reads: bool
    replaces: Tensor | None = None
    values: Tensor | None = None

    def apply(self, x: Tensor, variants: Tensor, source: Tensor | None = None) -> None:
        """Maps the rows of x (R, H) in place, each under its variant (R,) int64, −1 for none.

        Args:
            source: (R, K), what factors read, and what is taken from x where that is replaced; None: x.
        """
        if self.replaces is not None and self.values is not None:
            at = variants.clamp(min=0)
            gone, value = self.replaces[at] & (variants >= 0), self.values[at]
            # in float32, rounded once: where the source is the value already, x stays as it is in any data type
            x.copy_(torch.where(gone[:, None], value if source is None else x - (source - value), x))
        if not len(self.down) and source is not None:  # nothing reads it, and there are no factors of its width
            source = None
        down = self.down if len(self.down) else self.up
        ops.intervene(x, variants, self.offsets, down, self.up, self.shift, source=source, finite=self.finite)


def lay_out(variants: Mapping[int, Mapping[Site, Step]], n: int, device: torch.device) -> dict[Site, SiteMaps]:
    """Puts variants, numbered below n, side by side for each site that any of them changes."""
    out = {}
    for site in sorted({site for variant in variants.values() for site in variant}):
        steps = [variants.get(i, {}).get(site) for i in range(n)]
        known = [step for step in steps if step is not None]
        counts = torch.tensor([0 if step is None else len(step.down) for step in steps])
        shift = torch.stack([known[0].shift * 0 if step is None else step.shift for step in steps])
        down, up = torch.cat([step.down for step in known]), torch.cat([step.up for step in known])
        replaces = torch.tensor([step is not None and step.replaces for step in steps])
        some = bool(replaces.any())
        values, shift = shift, torch.where(replaces[:, None], 0, shift)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        out[site] = SiteMaps(
            offsets.to(device),
            down.to(device, torch.float32).contiguous(),
            up.to(device, torch.float32).contiguous(),
            shift.to(device, torch.float32).contiguous(),
            torch.ones(n, dtype=torch.bool, device=device),
            len(down) > 0 or some,
            replaces.to(device) if some else None,
            values.to(device, torch.float32).contiguous() if some else None,
        )
    return out


def blame(sites: Mapping[Site, SiteMaps], maps: Maps, variants: Sequence[int]) -> str:
    """Says where hidden states stopped being finite, for the error of a group whose maps have these variants."""
    touched = sorted({site for variant in maps.variants for site in variant}, key=lambda s: (s[0], s[1] == BLOCK))
    for site in touched:
        if not bool(sites[site].finite[list(variants)].all()):
            return f"under its intervention layer {site[0]} ({site[1]}) put out NaN or an infinity"
    layers = ", ".join(map(str, sorted({layer for layer, _ in touched})))
    return f"it is under an intervention at layer {layers}, which itself gave finite numbers"
