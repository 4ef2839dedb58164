"""Pictures of populations, reports and trainings, as matplotlib Figures. Matplotlib is loaded when one is drawn.

Nothing else of the package draws: `Population.plot_weights`, `evaluate.plot` and the like only call what is here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from fastsmc.values import check_int

if TYPE_CHECKING:
    from fastsmc.alignment import HeatMap
    from fastsmc.counterfactuals import Counterfactuals
    from fastsmc.population import Population

Path: TypeAlias = str | os.PathLike | None

#: standard errors either way that make an error bar: two-sided 95 % of a normal distribution
Z95 = 1.959963984540054


def suffixes() -> list[str]:
    """Lists the suffixes of files that a picture can be written to, without their dots."""
    from matplotlib.backend_bases import FigureCanvasBase

    return sorted(FigureCanvasBase.filetypes)


def _written(figure: Any, path: Path, dpi: int) -> Any:
    if path is not None:
        figure.savefig(path, dpi=dpi)
    return figure


def weights(population: Population, path: Path = None) -> Any:
    """Draws the ESS over steps, resamplings marked, above the spread of the log weights: a matplotlib Figure.

    Args:
        path: where to write the picture (the suffix gives the format), or None.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n, steps = population.n_particles, np.arange(population.T)
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    top.axhline(population.params.ess_threshold * n, color="0.6", lw=0.8, ls="--", label="threshold")
    top.plot(steps, population.ess, color="C0", marker="." if population.T <= 64 else None, label="ESS")
    for number, t in enumerate(np.flatnonzero(population.resampled)):
        top.axvline(t, color="C3", lw=0.8, alpha=0.5, zorder=0, label="resampled" if number == 0 else None)
    alive = np.isfinite(population.step_log_weights)
    if not alive.all():
        top.plot(steps, alive.sum(axis=1), color="0.3", lw=1, ls=":", label="weight > 0")
    top.set(ylim=(0, 1.04 * n), ylabel="effective sample size", title=f"{n} particles, log Z = {population.log_z:.4f}")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=4, frameon=False, fontsize="small")

    levels = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1)
    spread = np.full((population.T, len(levels)), np.nan)
    for t, row in enumerate(population.step_log_weights):
        if alive[t].any():
            normaliser = row.max() + np.log(np.exp(row - row.max()).mean())
            spread[t] = np.quantile(row[alive[t]] - normaliser, levels)
    bottom.axhline(0, color="0.6", lw=0.8, ls="--")
    bottom.fill_between(steps, spread[:, 1], spread[:, 5], color="C0", alpha=0.2, lw=0, label="5 to 95 %")
    bottom.fill_between(steps, spread[:, 2], spread[:, 4], color="C0", alpha=0.4, lw=0, label="25 to 75 %")
    bottom.plot(steps, spread[:, 3], color="C0", label="median")
    bottom.plot(steps, spread[:, [0, 6]], color="C0", lw=0.7, ls=":", label=["lowest, highest", None])
    bottom.set(xlabel="step", ylabel="log (N · weight)")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=4, frameon=False, fontsize="small")
    return _written(figure, path, 150)


def genealogy(population: Population, path: Path = None, max_lines: int = 200_000) -> Any:
    """Draws the genealogy: a line from each row of step t - 1 to the rows that continue it at step t.

    Lines that lead to a final particle are coloured by their row at step 0, the others are grey; lines of
    particles that had ended are paler. Dots at the right are the final particles, their area the weight.

    Args:
        path: where to write the picture (the suffix gives the format), or None.
        max_lines: at most so many grey and so many coloured lines are drawn, evenly spaced; at least 1.

    Returns:
        a matplotlib Figure.
    """
    max_lines = check_int("max_lines", max_lines, 1)
    from matplotlib import colormaps
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    n, steps = population.n_particles, population.T
    figure = Figure(figsize=(float(np.clip(2 + 0.3 * steps, 7, 14)), 5.2), layout="constrained")
    axes = figure.subplots()
    root = np.empty((steps, n), dtype=np.int64)  # row at step 0 from which each row descends
    if steps:
        root[0] = np.arange(n)
    for t in range(1, steps):
        root[t] = root[t - 1, population.ancestors[t]]
    alive = population.surviving()
    roots = np.flatnonzero(alive[0]) if steps else np.arange(0)
    scheme = colormaps["tab10"] if len(roots) <= 10 else colormaps["turbo"]
    shade = np.arange(len(roots)) if len(roots) <= 10 else np.linspace(0.03, 0.97, len(roots))
    colours = np.zeros((n, 4))
    colours[roots] = scheme(shade)

    def thin(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        t, i = np.nonzero(mask)
        stride = -(-len(t) // max_lines) or 1
        return t[::stride] + 1, i[::stride]

    width = float(np.clip(60 / n, 0.25, 1.8))
    ended = population.tokens[1:] < 0
    for mask, order in ((~alive[1:], 1), (alive[1:], 2)):
        at, i = thin(mask)
        starts = np.stack([at - 1, population.ancestors[at, i]], axis=1)
        colour = colours[root[at, i]] if order == 2 else np.tile(np.array([0.78, 0.78, 0.78, 1.0]), (len(at), 1))
        colour[:, 3] = np.where(ended[at - 1, i], 0.3, 1.0)
        segments = list(np.stack([starts, np.stack([at, i], axis=1)], axis=1))
        lines = LineCollection(segments, colors=colour, linewidths=width * (0.7, 1.0)[order - 1], zorder=order)
        axes.add_collection(lines)
    if steps:
        final = population.weights
        area = np.clip(final * 60 * min(n, 16), 0, 240)
        kept = final > 0
        axes.scatter(
            np.full(n, steps - 1)[kept], np.flatnonzero(kept), s=area[kept], c=colours[root[-1]][kept],
            edgecolors="0.2", linewidths=0.4 if n <= 64 else 0, zorder=3, clip_on=False,
        )  # fmt: skip
    for t in np.flatnonzero(population.resampled):
        axes.axvline(t - 0.5, color="0.85", lw=0.8, ls=":", zorder=0)
    margin = 0.5 + 0.005 * n
    axes.set(xlim=(-0.3, max(steps - 1, 0) + 0.3), ylim=(n - 1 + margin, -margin), xlabel="step", ylabel="row")
    axes.set_title(f"{n} particles, {len(roots)} of the rows of step 0 have final descendants")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    return _written(figure, path, 150)


def report(result: dict[str, Any], path: Path = None) -> Any:
    """Draws the samplers' bounds beside their ESS curves: a matplotlib Figure, written to `path` if given."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = result["params"]["n_particles"]
    for i, (name, sampler) in enumerate(result["samplers"].items()):
        b = {k: math.nan if v is None else v for k, v in sampler["bounds"].items()}
        left.plot([i, i], [b["lower"], b["upper"]], color=f"C{i}", lw=6, alpha=0.3, solid_capstyle="butt")
        for side, marker in (("lower", "^"), ("upper", "v")):
            left.errorbar(
                i, b[side], yerr=Z95 * np.nan_to_num(b[f"{side}_se"]), color=f"C{i}", marker=marker, capsize=4
            )
        right.plot(np.arange(1, len(sampler["ess"]) + 1), sampler["ess"], color=f"C{i}", marker=".", label=name)
    left.set(xticks=range(len(result["samplers"])), xticklabels=list(result["samplers"]), ylabel="log Z")
    left.set(title=f"bounds, N = {n}", xlim=(-0.5, len(result["samplers"]) - 0.5))
    right.set(xlabel="step", ylabel="mean ESS", ylim=(0, 1.04 * n), title="effective sample size")
    right.legend(frameon=False)
    return _written(figure, path, 110)


def training(history: Sequence[dict[str, Any]], path: Path = None) -> Any:
    """Draws loss and bounds on log Z over steps: a matplotlib Figure, written to `path` where there is one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [r for r in history if "loss" in r]
    left.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.8)
    left.set(xlabel="step", ylabel="loss")
    for i, side in enumerate(("lower", "upper")):
        known = [r for r in history if r.get(side) is not None]
        if known:
            se = [Z95 * (r[f"{side}_se"] or 0.0) for r in known]
            right.errorbar(
                [r["step"] for r in known], [r[side] for r in known], yerr=se, color=f"C{i}", capsize=3, label=side
            )
    right.set(xlabel="step", ylabel="log Z")
    right.legend(frameon=False)
    return _written(figure, path, 110)


def survival(counterfactuals: Counterfactuals, path: Path = None) -> Any:
    """Draws the probability that the first tokens of a text stay, exactly and among the particles: a Figure."""
    from matplotlib.figure import Figure

    tokens = np.arange(1, len(counterfactuals.stay) + 1)
    kept = (counterfactuals.common_prefix[None, :] >= tokens[:, None]) @ counterfactuals.weights
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.step(tokens, counterfactuals.survival, where="mid", color="C0", label="exact")
    axes.plot(tokens, kept, "o", ms=3, color="C1", label=f"{counterfactuals.n_particles} counterfactuals")
    title = f"{counterfactuals.expected_common_prefix:.2f} of {len(tokens)} tokens stay"
    axes.set(ylim=(0, 1.02), xlabel="first tokens of the text", ylabel="probability that they stay", title=title)
    axes.legend(frameon=False, fontsize="small")
    return _written(figure, path, 120)


def heat_map(found: HeatMap, path: Path = None) -> Any:
    """Draws accuracies over layers and positions, of a variable and its controls side by side: a Figure."""
    from matplotlib.figure import Figure

    panels = {", ".join(found.variable): found, **{f"control: {name}": one for name, one in found.controls.items()}}
    rows, columns = found.iia.shape
    size = (1.6 + len(panels) * max(2.4, 0.5 * columns), float(np.clip(1.4 + 0.3 * rows, 3, 12)))
    figure = Figure(figsize=size, layout="constrained")
    drawn: Any = None
    every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, one) in zip(every, panels.items(), strict=True):
        drawn = axes.imshow(one.iia, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        if rows * columns <= 400:
            for (i, j), value in np.ndenumerate(one.iia):
                colour = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontsize="x-small")
        names = [str(p) if isinstance(p, int) else f"per pair ({j})" for j, p in enumerate(found.positions)]
        axes.set(xticks=range(columns), xticklabels=names, xlabel="position")
        axes.set_title(f"{title}\naccuracy {one.accuracy:.2f}, agreement {one.agreement:.2f}", fontsize="small")
    every[0].set(yticks=range(rows), yticklabels=list(map(str, found.layers)), ylabel="layer")
    figure.colorbar(drawn, ax=list(every), label="IIA")
    return _written(figure, path, 130)
