"""Figures of a calibrated target, drawn with matplotlib's objects (no global state) and written as SVG or PNG.

Each figure comes in two shapes, wide for a page and narrow for a phone. Its few colours are those of `PALETTE`, so that a page
can swap them for its own light and dark ones.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from scipy.stats import norm

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import operating_points
from hfdtl_bayes.files import atomic
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.report.comparison import ALL, CALIBRATED, RIDGE, SCRATCH, ZERO_SHOT, block_means
from hfdtl_bayes.statistics import DEFAULT_BLOCK_LENGTH, own_prior

PALETTE: dict[str, str] = {
    "ink": "#1f2430",
    "muted": "#666d7a",
    "line": "#d5d8de",
    "blue": "#2a6ebb",
    "orange": "#d1610a",
    "purple": "#8a4fa8",
    "green": "#3b8a5f",
}
"""Colours by role: text, secondary text, grid, then series. Distinct in lightness, so also without colour vision."""

_METHOD_STYLE = {
    CALIBRATED: ("blue", "o"),
    ZERO_SHOT: ("muted", "s"),
    RIDGE: ("purple", "^"),
    SCRATCH: ("green", "D"),
}

_STYLE = {
    "axes.edgecolor": PALETTE["muted"],
    "axes.labelcolor": PALETTE["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titlecolor": PALETTE["ink"],
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": PALETTE["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": PALETTE["ink"],
    "svg.fonttype": "none",
    "svg.hashsalt": "hfdtl_bayes",
    "text.color": PALETTE["ink"],
    # Names come from users: a dollar sign is a dollar sign.
    "text.parse_math": False,
    "xtick.color": PALETTE["muted"],
    "ytick.color": PALETTE["muted"],
    "xtick.labelcolor": PALETTE["ink"],
    "ytick.labelcolor": PALETTE["ink"],
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw within the style of all figures; matplotlib's own settings come back afterwards."""
    with mpl.rc_context(_STYLE):  # type: ignore[arg-type]  # matplotlib's stubs want a literal of its thousand keys
        yield


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format its suffix names, atomically and without a date: the same figure is the same file."""
    kind = path.suffix.removeprefix(".")
    with atomic(path) as part, figure_style():
        figure.savefig(part, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return path


def figure_svg(figure: Figure) -> str:
    """Return a figure as an SVG document with a transparent background, for a page to embed."""
    stream = io.StringIO()
    with figure_style():
        figure.savefig(stream, format="svg", metadata={"Date": None}, transparent=True)
    return stream.getvalue()


def block_mean_figure(
    posterior: LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    zero_shot: LatencyPosterior,
    *,
    calibration_rows: pd.DataFrame | None = None,
    block_length: int = DEFAULT_BLOCK_LENGTH,
    seed: int = 0,
    narrow: bool = False,
) -> Figure:
    """Draw measured block means in time order with 95 % predictive intervals, calibrated and zero-shot.

    Parameters
    ----------
    posterior : LatencyPosterior
        Calibrated on other rows of the configuration.
    frame : DataFrame
        Held-out rows.
    configuration : ServingConfiguration
    zero_shot : LatencyPosterior
        The donors' posterior.
    calibration_rows : DataFrame, optional
        Drawn to the left of the held-out rows, shaded: what was seen.
    block_length : int
    seed : int
    narrow : bool
        Shape for a phone.
    """
    measured, own, donors = block_means(frame, configuration, posterior, zero_shot, block_length=block_length, seed=seed)
    seen = None
    if calibration_rows is not None and len(calibration_rows):
        seen = block_means(calibration_rows, configuration, posterior, block_length=block_length, seed=seed)
    offset = 0 if seen is None else len(seen[0]) + 1
    with figure_style():
        figure = Figure(figsize=(4.4, 4.4) if narrow else (9.0, 4.0), layout="constrained")
        axes = figure.subplots()
        x = np.arange(len(measured)) + offset
        _intervals(axes, x, donors, "muted", 0.86, 0.28)
        _intervals(axes, x, own, "blue", 0.5, 0.35)
        _measured(axes, x, measured)
        groups = _stretches(measured["regime"].to_numpy(), offset)
        if seen is not None:
            at = np.arange(len(seen[0]))
            axes.axvspan(-0.75, len(at) - 0.25, color=PALETTE["line"], alpha=0.45, linewidth=0)
            _intervals(axes, at, seen[1], "blue", 0.5, 0.35)
            _measured(axes, at, seen[0])
            groups = [("calibrated on these", 0, len(at)), *groups]
        # Logarithmic: errors are relative, and one block with a long prefill would flatten all others.
        shown = measured if seen is None else pd.concat([measured, seen[0]])
        bottom = 0.7 * float(shown["observed_s"].min())
        top = 1.3 * max(float(shown["observed_s"].max()), float(own["q97.5_s"].max()))
        axes.set_yscale("log")
        axes.set_ylim(1e3 * bottom, 1e3 * top)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(-0.75, offset + len(measured) - 0.25)
        for name, start, stop in groups:
            if start > 0:
                axes.axvline(start - 0.5, color=PALETTE["muted"], linewidth=0.6, linestyle=(0, (2, 3)))
            axes.text(
                (start + stop - 1) / 2, 1.015, name, transform=axes.get_xaxis_transform(), ha="center", va="bottom",
                fontsize=8, rotation=90 if narrow else 0,
            )  # fmt: skip
        axes.set(xlabel=f"time blocks of up to {block_length} steps, in time order", ylabel="mean step time (ms)", xticks=[])
        axes.grid(axis="x", visible=False)
        handles = [
            Line2D([], [], color=PALETTE["orange"], marker="D", linestyle="none", markersize=5, label="measured"),
            Patch(
                color=PALETTE["blue"], alpha=0.45, label=f"95 % interval, calibrated on {len(posterior.calibration_rows)} rows"
            ),
            Patch(color=PALETTE["muted"], alpha=0.35, label="95 % interval, zero-shot (donors alone)"),
        ]
        figure.legend(handles=handles, loc="outside lower left" if narrow else "outside lower center", ncols=1 if narrow else 3)
    return figure


def _intervals(axes: Axes, x: np.ndarray, means: pd.DataFrame, colour: str, width: float, alpha: float) -> None:
    low, high = means["q2.5_s"].clip(lower=1e-6) * 1e3, means["q97.5_s"] * 1e3
    axes.bar(x, high - low, width, bottom=low, color=PALETTE[colour], alpha=alpha, linewidth=0)
    axes.hlines(means["mean_s"] * 1e3, x - width / 2, x + width / 2, color=PALETTE[colour], linewidth=1.4)


def _measured(axes: Axes, x: np.ndarray, measured: pd.DataFrame) -> None:
    axes.scatter(x, measured["observed_s"] * 1e3, s=20, color=PALETTE["orange"], marker="D", zorder=3, linewidths=0)


def _stretches(labels: np.ndarray, offset: int) -> list[tuple[str, int, int]]:
    """Return (label, start, stop) of each run of equal labels."""
    edges = [0, *(np.flatnonzero(labels[1:] != labels[:-1]) + 1), len(labels)]
    return [(str(labels[a]), int(a) + offset, int(b) + offset) for a, b in itertools.pairwise(edges)]


def accuracy_figure(mape: pd.DataFrame, attainable_mape: float, *, limit: float | None = None, narrow: bool = False) -> Figure:
    """Draw held-out MAPE by regime and method on a logarithmic scale: further left is better.

    Parameters
    ----------
    mape : DataFrame
        One row per method, one column per regime, MAPE as fractions; see `Comparison.mape`.
    attainable_mape : float
        Drawn as a line: what noise alone leaves.
    limit : float, optional
        Drawn as a line: the verdict's limit.
    narrow : bool
        Shape for a phone.
    """
    columns = [str(c) for c in mape.columns]
    with figure_style():
        figure = Figure(
            figsize=(4.4, 1.9 + 0.36 * len(columns)) if narrow else (9.0, 1.5 + 0.34 * len(columns)), layout="constrained"
        )
        axes = figure.subplots()
        y = np.arange(len(columns))
        handles = []
        for name, values in mape.iterrows():
            colour, marker = _METHOD_STYLE.get(str(name), ("green", "v"))
            own = name == CALIBRATED
            size, alpha = (8, 1.0) if own else (6, 0.85)
            (drawn,) = axes.plot(
                100 * values.to_numpy(dtype=float), y, marker, color=PALETTE[colour], markersize=size, alpha=alpha,
                zorder=4 if own else 3, label=str(name),
            )  # fmt: skip
            handles.append(drawn)
            if own:
                for at, value in zip(y, values, strict=True):
                    axes.annotate(
                        f"{100 * value:.3g}", (100 * value, at), xytext=(0, 6.5), textcoords="offset points", ha="center",
                        fontsize=7.5, color=PALETTE["blue"],
                    )  # fmt: skip
        for value, label, dashes in (
            (attainable_mape, "attainable: noise alone", (0, (4, 2))),
            (limit, "limit of the verdict", (0, (1, 1.5))),
        ):
            if value is not None:
                axes.axvline(100 * value, color=PALETTE["ink"], linestyle=dashes, linewidth=1.1)
                handles.append(Line2D([], [], color=PALETTE["ink"], linestyle=dashes, linewidth=1.1, label=label))
        _log_percent_axis(axes, np.append(mape.to_numpy(dtype=float).ravel(), [attainable_mape, limit or attainable_mape]))
        axes.set_yticks(y, columns)
        axes.set_ylim(len(columns) - 0.4, -0.6)
        if ALL in columns:
            axes.axhline(columns.index(ALL) - 0.5, color=PALETTE["muted"], linewidth=0.6)
        axes.set_xlabel("held-out MAPE (%), logarithmic: further left is better")
        figure.legend(handles=handles, loc="outside lower left" if narrow else "outside lower center", ncols=2 if narrow else 6)
    return figure


def _log_percent_axis(axes: Axes, values: np.ndarray) -> None:
    usable = 100 * values[np.isfinite(values) & (values > 0)]
    axes.set_xscale("log")
    low, high = usable.min() / 1.3, usable.max() * 1.3
    axes.set_xlim(low, high)
    steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    axes.xaxis.set_major_locator(FixedLocator(steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))


def coefficient_figure(posterior: LatencyPosterior, config_id: str | None = None, *, narrow: bool = False) -> Figure:
    """Draw each coefficient of one configuration: prior range, what the population says, what its own rows say.

    Coefficients are in multiples of their references (for the roofline: of what the data sheet promises). Features that are zero
    in every batch of the configuration are left out. What lies far outside is marked by an arrow, with its value at the right.

    Parameters
    ----------
    posterior : LatencyPosterior
    config_id : str, optional
        A fitted configuration; the target by default, else the last.
    narrow : bool
        Shape for a phone.
    """
    chosen = config_id or posterior.target or posterior.config_ids[-1]
    table = coefficient_intervals(posterior, chosen)
    others = [c for c in posterior.config_ids if c != chosen]
    with figure_style():
        height = 0.46 * len(table) + 1.35
        figure = Figure(figsize=(4.4, height + 0.5) if narrow else (9.0, height), layout="constrained")
        axes = figure.subplots()
        y = np.arange(len(table))
        low, high = _window(table)
        for at, (_, row) in zip(y, table.iterrows(), strict=True):
            axes.plot(
                [row["prior_low"], row["prior_high"]],
                [at, at],
                color=PALETTE["line"],
                linewidth=13,
                solid_capstyle="butt",
                zorder=1,
            )
            for c in others:
                axes.plot(
                    np.clip(row[f"mean {c}"], low, high),
                    at + 0.02,
                    "|",
                    color=PALETTE["purple"],
                    markersize=9,
                    markeredgewidth=1.6,
                    zorder=4,
                )
            for kind, shift, colour, width in (("population", -0.17, "muted", 2.2), ("own", 0.17, "blue", 3.0)):
                ends = np.clip([row[f"{kind}_low"], row[f"{kind}_high"]], low, high)
                axes.plot(ends, [at + shift] * 2, color=PALETTE[colour], linewidth=width, solid_capstyle="butt", zorder=3)
                mean = row[f"{kind}_mean"]
                marker = "o" if low <= mean <= high else ("<" if mean < low else ">")
                axes.plot(np.clip(mean, low, high), at + shift, marker, color=PALETTE[colour], markersize=5.5, zorder=5)
            said = f"{row['own_mean']:.2f}  [{row['own_low']:.2f}, {row['own_high']:.2f}]"
            axes.annotate(
                said,
                (1.0, at),
                xycoords=("axes fraction", "data"),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        axes.annotate(
            "mean  [95 %]",
            (1.0, -0.55),
            xycoords=("axes fraction", "data"),
            xytext=(4, 2),
            textcoords="offset points",
            fontsize=7.5,
        )
        axes.axvline(0, color=PALETTE["muted"], linewidth=0.8)
        axes.set_xlim(low, high)
        axes.set_ylim(len(table) - 0.45, -0.55)
        axes.set_yticks(y, list(table.index), fontsize=8 if narrow else 9)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("coefficient, in multiples of its physical reference" if not narrow else "multiples of the reference")
        handles = [
            Line2D([], [], color=PALETTE["line"], linewidth=9, label="prior, 90 % of the population"),
            Line2D([], [], color=PALETTE["muted"], linewidth=2.2, marker="o", label="population, 95 %"),
            Line2D([], [], color=PALETTE["blue"], linewidth=3, marker="o", label=f"{chosen}, 95 %"),
            Line2D(
                [],
                [],
                color=PALETTE["purple"],
                linestyle="none",
                marker="|",
                markersize=9,
                markeredgewidth=1.6,
                label="other configurations' means",
            ),
        ]
        figure.legend(handles=handles, loc="outside lower left" if narrow else "outside lower center", ncols=1 if narrow else 4)
    return figure


def coefficient_intervals(posterior: LatencyPosterior, config_id: str) -> pd.DataFrame:
    """Return prior, population and own intervals of the coefficients one configuration uses, in reference units.

    The population's constant contains the config features, as they act on this configuration.

    Returns
    -------
    DataFrame, one row per coefficient
        `prior_low`, `prior_high` (90 %); `population_*` and `own_*`: `mean`, `low`, `high` (95 %); `mean <config_id>` of
        every other configuration.
    """
    features = posterior.feature_set
    configuration = posterior.configuration(config_id)
    c = posterior.config_ids.index(config_id)
    theta = posterior.draws_of("theta")
    centre = posterior.population_draws(configuration)
    prior_mean, prior_sd = own_prior(features, configuration)
    half = norm.ppf(0.95) * prior_sd
    # The discrepancy is a belief about misfit; as coefficients its parts mean nothing.
    k = len(features.pooled)
    theta, centre, prior_mean, half = theta[..., :k], centre[:, :k], prior_mean[:k], half[:k]
    out = pd.DataFrame(index=list(features.pooled_names), dtype=float)
    out["prior_low"], out["prior_high"] = prior_mean - half, prior_mean + half
    for kind, draws in (("population", centre), ("own", theta[:, c])):
        out[f"{kind}_mean"] = draws.mean(axis=0)
        out[f"{kind}_low"], out[f"{kind}_high"] = np.quantile(draws, (0.025, 0.975), axis=0)
    for i, other in enumerate(posterior.config_ids):
        if i != c:
            out[f"mean {other}"] = theta[:, i].mean(axis=0)
    used = np.abs(features.design(operating_points(configuration), configuration)[:, :k]).max(axis=0) > 0
    return out[used]


def _window(table: pd.DataFrame) -> tuple[float, float]:
    """Return the range to draw: all priors and populations, and own intervals unless they lie far beyond them."""
    inner = table[["prior_low", "prior_high", "population_low", "population_high"]].to_numpy()
    low, high = min(0.0, inner.min()), inner.max()
    reach = 0.35 * (high - low)
    own = table[["own_low", "own_high"]].to_numpy()
    low, high = min(low, max(own.min(), low - reach)), max(high, min(own.max(), high + reach))
    margin = 0.03 * (high - low)
    return low - margin, high + margin
