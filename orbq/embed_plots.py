"""Pictures of latent spaces: a column for every network, a row for every colouring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from orbq.embed import Elements, Map
from orbq.plots import COLOURS, new_figure, save

SIZE = (4.6, 4.2)  # of a panel, inches


class Colouring(NamedTuple):
    """title: of the colour bar. values: [K] of the elements. few: whether each value has a colour
    of its own, else they run along a map."""

    title: str
    values: Callable[[Elements], np.ndarray]
    few: bool


COLOURINGS = (
    Colouring("group", lambda elements: elements.labels("group"), False),
    Colouring("row", lambda elements: elements.labels("row"), True),
    Colouring("d electrons (GFN1-xTB)", lambda elements: elements.d_electrons, False),
)


def map_figure(
    maps: Mapping[str, Map],
    elements: Elements,
    title: str,
    path: str | Path | None = None,
    atoms: Mapping[str, np.ndarray] | None = None,
) -> Figure:
    """Elements in two dimensions, by network (columns), coloured three times (rows).

    maps: by the networks' names. title: of the method. atoms: [A, 2] in the same axes, drawn small
    and grey behind their elements. path: where to save it.
    """
    figure, axes = new_figure(len(COLOURINGS) * len(maps), SIZE, len(maps))
    place = iter(axes)
    for colouring in COLOURINGS:
        for column, (name, found) in enumerate(maps.items()):
            axis = next(place)
            behind = None if atoms is None else atoms.get(name)
            _panel(axis, found, elements, colouring, behind)
            if colouring is COLOURINGS[0]:
                axis.set_title(name, fontsize=11)
            _axes(axis, found, title, bar=column == len(maps) - 1, colouring=colouring)
    figure.suptitle(f"{title} of the elements' mean latent features", fontsize=12)
    if path is not None:
        save(figure, path)
    return figure


def _panel(
    axis: Axes, found: Map, elements: Elements, colouring: Colouring, behind: np.ndarray | None
) -> None:
    x, y = found.points.T
    values = np.asarray(colouring.values(elements), float)
    norm, cmap = _scale(values, colouring)
    if behind is not None:
        axis.scatter(behind[:, 0], behind[:, 1], s=3, color="0.8", linewidths=0, zorder=0)
    # the elements fill the panel: single atoms far away must not squeeze them into a corner
    axis.set(xlim=_wider(x.min(), x.max()), ylim=_wider(y.min(), y.max()))
    axis.scatter(x, y, c=values, cmap=cmap, norm=norm, s=46, edgecolors="black", linewidths=0.4)
    for symbol, point in zip(elements.symbols, found.points, strict=True):
        axis.annotate(symbol, point, (4, 3), textcoords="offset points", fontsize=8)


def _wider(low: float, high: float) -> tuple[float, float]:
    margin = 0.1 * max(high - low, 1e-9)
    return low - margin, high + margin


def _scale(values: np.ndarray, colouring: Colouring) -> tuple[Normalize, Colormap]:
    if not colouring.few:
        return Normalize(values.min(), values.max()), colormaps["cividis"]
    kinds = np.unique(values)
    edges = [kinds[0] - 0.5, *(kinds[:-1] + kinds[1:]) / 2, kinds[-1] + 0.5]
    colours = [COLOURS[i % len(COLOURS)] for i in range(len(kinds))]
    return BoundaryNorm(edges, len(kinds)), ListedColormap(colours)


def _axes(axis: Axes, found: Map, title: str, bar: bool, colouring: Colouring) -> None:
    for which, i in ((axis.xaxis, 0), (axis.yaxis, 1)):
        share = f" ({found.shares[i]:.0%} of the variance)" if found.shares else ""
        which.set_label_text(f"{title} {i + 1}{share}", fontsize=9)
        which.set_major_locator(MaxNLocator(4))
    if found.shares is None:  # distances of a t-SNE have no meaning
        axis.set_xticks([])
        axis.set_yticks([])
    if bar:
        dots = axis.collections[-1]
        beside = axis.inset_axes((1.04, 0.0, 0.04, 1.0))
        drawn = axis.figure.colorbar(dots, cax=beside, label=colouring.title)
        if colouring.few:
            kinds = np.unique(np.asarray(dots.get_array()))
            drawn.set_ticks(list(kinds), labels=[f"{k:g}" for k in kinds])
            drawn.minorticks_off()
