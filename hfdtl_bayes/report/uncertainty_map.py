"""Where a configuration's step time is uncertain, and what each row chosen changes of it: maps over the batches of its traffic.

A cell holds steps with about so many prefill tokens and so much context; its shade is the relative sd of their expected time, given the
rows chosen so far. Rows tell before they are measured how much they will tell (`hfdtl_bayes.design.belief`), so the maps need no label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.design import Selection, SelectionSettings
from hfdtl_bayes.design.greedy import Knowledge
from hfdtl_bayes.design.selection import believed
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.report.figures import PALETTE, figure_style

FloatArray = NDArray[np.float64]

STEPS = (0, 5, 20)
"""Numbers of picks that a panel is drawn after, beside the last one."""

ACROSS = "prefill_tokens"
DOWN = {"context_tokens": "context tokens of the decoding requests", "decode_tokens": "decode tokens"}
"""Columns that a map may have as its vertical axis, and how a person calls them."""

_COLUMNS = 8
"""Most cells across, beside the one of steps without prefill."""
_ROWS = 4000
"""Most rows of the pool and of the mix that the map is made of, evenly spread."""
_NUMBERED = 20
"""Most new picks in a panel that are numbered one by one."""
_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo one, are spread evenly however many there are."""

_SHADES = LinearSegmentedColormap.from_list("uncertainty", ["#eef4fb", "#9dc3e8", PALETTE["blue"], "#0c2c55"])
"""One hue from light to dark: read alike in print and without colour vision."""


@dataclass(frozen=True)
class _Scale:
    """One axis of a map: a cell for none, then cells of equal width in tokens, or an octave each.

    Attributes
    ----------
    width : float
        Tokens of a cell; 0 for octaves.
    """

    width: float = 0.0

    @classmethod
    def across(cls, most: float) -> _Scale:
        """Return the axis of prefill tokens, which a step's time is about linear in: cells as wide as a power of two."""
        return cls(2.0 ** np.ceil(np.log2(max(most, 1.0) / _COLUMNS)))

    def place(self, tokens: FloatArray) -> FloatArray:
        """Return where numbers of tokens are, in cells from the axis' origin; none is the middle of the first cell."""
        along = tokens / self.width if self.width else np.log2(np.maximum(tokens, 1.0))
        return np.where(tokens < 1, 0.5, 1.0 + along)

    def tokens(self, place: float) -> float:
        """Return the number of tokens at the lower edge of a cell."""
        if place < 1:
            return 0.0
        return (place - 1.0) * self.width if self.width else 2.0 ** (place - 1.0)

    def ticks(self, first: int, last: int) -> tuple[list[float], list[str]]:
        """Return places and names of the ticks of an axis from one cell's lower edge to another's."""
        # Every other edge: between them there is no room for names.
        edges = [k for k in range(max(first, 1), last + 1) if (k - 1) % 2 == 0 and not (first == 0 and self.tokens(k) == 0)]
        names = [f"{self.tokens(k):,.0f}".replace(",", " ") for k in edges]
        none = first == 0
        return [*([0.5] if none else []), *edges], [*(["0"] if none else []), *names]


def uncertainty_cells(
    posterior: LatencyPosterior,
    selection: Selection,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    deployment: pd.DataFrame | None = None,
    *,
    steps: Sequence[int] = STEPS,
    down: str | None = None,
    settings: SelectionSettings | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the relative sd of the expected step time by cell, before any pick and after some.

    Parameters
    ----------
    posterior, pool, configuration, deployment, settings, seed
        What `selection` was made of by `select_rows`.
    selection : Selection
    steps : sequence of int
        Numbers of picks; those beyond the selection's length count as its length, which is always among them.
    down : {"context_tokens", "decode_tokens"}, optional
        Vertical axis; context where the pool and the mix have it.

    Returns
    -------
    DataFrame
        `picks`; `across` and `down`, which cell (0: no such tokens), `across_tokens` and `down_tokens`, its lower edges; `sd`, root mean
        square relative sd of the expected time over the cell's rows; `rows` and `deployment_rows`, how many rows of the pool and of
        the mix lie in it.

    Raises
    ------
    InputError
        If the posterior is not of step times, a step is negative, there is no such axis, or the pool does not hold the rows chosen.
    """
    if posterior.feature_set.quantity != "step_time":
        raise InputError(
            f"a map is drawn over the batches of steps, and this posterior is of {posterior.feature_set.quantity}; give one of step times"
        )
    wanted = pool if deployment is None else deployment
    down = _axis(down, pool, wanted)
    at = _places(steps, len(selection))
    settings = settings or SelectionSettings()
    belief, candidates, mix_design = believed(posterior, pool, configuration, wanted, settings=settings, seed=seed)
    picked = _positions(selection, pool)
    shown = [_thinned(len(f)) for f in (pool, wanted)]
    design = np.concatenate([candidates.design[shown[0]], mix_design[shown[1]]])
    frame = pd.concat([f[[ACROSS, down]].iloc[k] for f, k in zip((pool, wanted), shown, strict=True)], ignore_index=True)
    of_mix = np.arange(len(frame)) >= len(pool.iloc[shown[0]])
    scales = _scales(pool, wanted)
    places = {
        name: s.place(frame[column].to_numpy(float)) for (name, s), column in zip(scales.items(), (ACROSS, down), strict=True)
    }
    cells = pd.DataFrame({name: np.floor(p).astype(np.int64) for name, p in places.items()}).assign(deployment_rows=of_mix)
    knowledge, parts = Knowledge(belief, candidates), []
    for k in range(at[-1] + 1):
        if k:
            knowledge.take(int(picked[k - 1]))
        if k in at:
            mean = knowledge.covariance.mean(axis=0)
            variance = np.maximum(((design @ mean) * design).sum(axis=1), 0.0)
            grouped = cells.assign(variance=variance, rows=~of_mix).groupby(["across", "down"], as_index=False)
            found = grouped.agg({"variance": "mean", "rows": "sum", "deployment_rows": "sum"})
            parts.append(found.assign(picks=k, sd=np.sqrt(found["variance"])))
    table = pd.concat(parts, ignore_index=True)
    for name, scale in scales.items():
        table[f"{name}_tokens"] = [scale.tokens(k) for k in table[name]]
    return table[["picks", "across", "across_tokens", "down", "down_tokens", "sd", "rows", "deployment_rows"]]


def uncertainty_map(
    posterior: LatencyPosterior,
    selection: Selection,
    pool: pd.DataFrame,
    configuration: ServingConfiguration,
    deployment: pd.DataFrame | None = None,
    *,
    steps: Sequence[int] = STEPS,
    down: str | None = None,
    settings: SelectionSettings | None = None,
    seed: int = 0,
    narrow: bool = False,
) -> Figure:
    """Draw where predictions are uncertain before any row is measured and after 5, 20 and all, and which rows these are.

    Parameters
    ----------
    posterior, selection, pool, configuration, deployment, steps, down, settings, seed
        As in `uncertainty_cells`.
    narrow : bool
        Shape for a phone: panels below each other.

    Raises
    ------
    InputError
        As `uncertainty_cells`.
    """
    wanted = pool if deployment is None else deployment
    down = _axis(down, pool, wanted)
    cells = uncertainty_cells(
        posterior, selection, pool, configuration, deployment, steps=steps, down=down, settings=settings, seed=seed
    )
    picked = pool.iloc[_positions(selection, pool)]
    scales = tuple(_scales(pool, wanted).values())
    window = (*_window(cells["across"]), *_window(cells["down"]))
    places = tuple(scale.place(picked[name].to_numpy(float)) for scale, name in zip(scales, (ACROSS, down), strict=True))
    numbers = cells["picks"].unique()
    values = 100 * cells["sd"].to_numpy()
    norm = LogNorm(float(values[values > 0].min()), float(values.max()) * 1.0001)
    with figure_style():
        columns = 1 if narrow else min(len(numbers), 2)
        lines = -(-len(numbers) // columns)
        figure = Figure(figsize=(4.4 if narrow else 4.6 * columns, 3.0 * lines + 0.7), layout="constrained")
        panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in panels.flat[len(numbers) :]:
            axes.set_visible(False)
        for i, (axes, k) in enumerate(zip(panels.flat, numbers, strict=False)):
            own = cells[cells["picks"] == k]
            _shade(axes, own, window, scales, norm)
            _outline(axes, own[own["deployment_rows"] > 0])
            _mark(axes, places, int(numbers[i - 1]) if i else 0, int(k))
            error = f"error expected {100 * selection.expected_mape[k]:.2g} %"
            after = f"after {k} step{'s' if k > 1 else ''}" if k else "before any measurement"
            axes.set_title(f"{after}: {error}")
            axes.set(xlabel="prefill tokens in the step", ylabel=DOWN[down])
            axes.label_outer()
        bar = figure.colorbar(ScalarMappable(norm, _SHADES), ax=panels, aspect=90 if narrow else 45, shrink=0.9)
        bar.set_label("uncertainty of the mean step time (± %, one sd)")
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        handles = [
            Patch(facecolor="none", edgecolor=PALETTE["ink"], linewidth=1.3, label="traffic to be predicted"),
            Line2D([], [], linestyle="none", label="chosen, in this order", marker="o", markersize=9, markeredgewidth=1.2,
                   markerfacecolor="white", markeredgecolor=PALETTE["orange"]),
            Line2D([], [], linestyle="none", label="chosen before, or many", marker="o", markersize=4, markeredgewidth=0.5,
                   markerfacecolor=PALETTE["orange"], markeredgecolor="white"),
        ]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower left" if narrow else "outside lower center", ncols=1 if narrow else 3)
    return figure


def _axis(down: str | None, pool: pd.DataFrame, mix: pd.DataFrame) -> str:
    """Return the vertical axis, checked."""
    if down is None:
        down = "context_tokens" if all("context_tokens" in f.columns for f in (pool, mix)) else "decode_tokens"
    if down not in DOWN:
        raise InputError(f"a map has no axis {down!r}; choose one of {', '.join(DOWN)}")
    lacking = [what for what, f in (("the pool", pool), ("the deployment mix", mix)) if down not in f.columns]
    if lacking:
        raise InputError(f"{' and '.join(lacking)} lack(s) the column {down!r}; add it, or choose another axis")
    return down


def _scales(pool: pd.DataFrame, mix: pd.DataFrame) -> dict[str, _Scale]:
    return {"across": _Scale.across(max(float(f[ACROSS].max()) for f in (pool, mix))), "down": _Scale()}


def _places(steps: Sequence[int], length: int) -> list[int]:
    """Return the numbers of picks that panels are drawn after, increasing, the last being all."""
    if any(k < 0 for k in steps):
        raise InputError(f"steps are numbers of picks and cannot be negative, found {min(steps)}")
    return sorted({min(int(k), length) for k in steps} | {length})


def _positions(selection: Selection, pool: pd.DataFrame) -> NDArray[np.int64]:
    """Return where the rows chosen are in the pool."""
    found = pool.index.get_indexer(pd.Index(selection.index))
    if (found < 0).any():
        raise InputError(
            f"{int((found < 0).sum())} of {len(found)} rows chosen are not in the pool, the first is row "
            f"{selection.index[int(np.argmax(found < 0))]}; give the pool that they were chosen from"
        )
    return np.asarray(found, dtype=np.int64)


def _thinned(rows: int) -> slice:
    return slice(None, None, -(-rows // _ROWS))


def _window(cells: pd.Series) -> tuple[int, int]:
    return int(cells.min()), int(cells.max()) + 1


def _shade(axes: Axes, own: pd.DataFrame, window: tuple[int, int, int, int], scales: tuple[_Scale, ...], norm: LogNorm) -> None:
    left, right, bottom, top = window
    shades = np.full((top - bottom, right - left), np.nan)
    shades[own["down"] - bottom, own["across"] - left] = np.maximum(100 * own["sd"], norm.vmin or 0.0)
    axes.imshow(shades, origin="lower", extent=window, aspect="auto", cmap=_SHADES, norm=norm, interpolation="nearest")
    axes.grid(visible=False)
    axes.set_xticks(*scales[0].ticks(left, right), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(*scales[1].ticks(bottom, top))
    axes.tick_params(labelsize=7)


def _outline(axes: Axes, own: pd.DataFrame) -> None:
    """Draw the border of the cells that hold traffic to be predicted."""
    held = {(int(c), int(r)) for c, r in zip(own["across"], own["down"], strict=True)}
    lines = []
    for c, r in held:
        for neighbour, line in (
            ((c - 1, r), ((c, r), (c, r + 1))),
            ((c + 1, r), ((c + 1, r), (c + 1, r + 1))),
            ((c, r - 1), ((c, r), (c + 1, r))),
            ((c, r + 1), ((c, r + 1), (c + 1, r + 1))),
        ):
            if neighbour not in held:
                lines.append(line)
    border = LineCollection(sorted(lines), colors=PALETTE["ink"], linewidths=1.3, capstyle="round", clip_on=False)
    axes.add_collection(border, autolim=False)


def _mark(axes: Axes, places: tuple[FloatArray, ...], before: int, now: int) -> None:
    """Draw the rows chosen: earlier ones small, new ones numbered if they are few."""
    # Steps without prefill share one column, in which sideways means nothing: spread, they can be told apart.
    spread = 0.1 + 0.8 * np.modf(_GOLDEN * np.arange(1, len(places[0]) + 1))[0]
    x, y = (np.where(p < 1, spread, p) for p in places)
    numbered = range(before, now) if now - before <= _NUMBERED else range(0)
    small = [i for i in range(now) if i not in numbered]
    if small:
        axes.plot(
            x[small], y[small], "o", color=PALETTE["orange"], markersize=4, markeredgecolor="white", markeredgewidth=0.5,
            zorder=3, clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip
    for i in numbered:
        axes.plot(
            x[i], y[i], "o", markersize=8.5, markerfacecolor="white", markeredgecolor=PALETTE["orange"], markeredgewidth=1.2,
            zorder=4, clip_on=False, scalex=False, scaley=False,
        )  # fmt: skip
        axes.text(x[i], y[i], str(i + 1), ha="center", va="center_baseline", fontsize=5.5, color=PALETTE["ink"], zorder=5)
