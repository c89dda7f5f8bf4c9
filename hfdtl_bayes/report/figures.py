"""Figures of a calibrated target, drawn with matplotlib and written as SVG or PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features.response import response
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.traces import time_blocks

_BLUE, _ORANGE, _GREY = "#3465a4", "#ce5c00", "#888a85"
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
    "svg.hashsalt": "hfdtl_bayes",
}


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure in the format its suffix names, without a date, so that the same figure is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    kind = path.suffix.removeprefix(".")
    with mpl.rc_context(_STYLE):
        figure.savefig(part, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else {"Software": None})
    part.replace(path)
    return path


def block_mean_figure(
    posterior: LatencyPosterior,
    frame: pd.DataFrame,
    configuration: ServingConfiguration,
    zero_shot: LatencyPosterior,
    *,
    block_length: int = 50,
    seed: int = 0,
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
    block_length : int
    seed : int
    """
    blocks = time_blocks(frame, block_length)
    observed = pd.Series(response(frame, posterior.feature_set.quantity)).groupby(blocks).mean().to_numpy()
    regimes = pd.Series(frame["regime"].to_numpy()).groupby(blocks).first().to_numpy()
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        axes = figure.subplots()
        x = np.arange(len(observed))
        for fit, colour, label, width in (
            (zero_shot, _GREY, "zero-shot: donors alone", 0.8),
            (posterior, _BLUE, f"calibrated on {len(posterior.calibration_rows)} rows", 0.4),
        ):
            means = fit.predict_block_means(frame, configuration, blocks, seed=seed)
            low, high = means["q2.5_s"].clip(lower=0) * 1e3, means["q97.5_s"] * 1e3
            axes.bar(x, high - low, width, bottom=low, color=colour, alpha=0.3, label=f"95 % interval, {label}")
            axes.scatter(x, means["mean_s"] * 1e3, s=9, color=colour)
        axes.scatter(x, observed * 1e3, s=16, color=_ORANGE, marker="D", zorder=3, label="measured")
        for edge in np.flatnonzero(regimes[1:] != regimes[:-1]):
            axes.axvline(edge + 0.5, color="black", linewidth=0.6, alpha=0.5)
        for regime in pd.unique(regimes):
            axes.text(np.flatnonzero(regimes == regime).mean(), 1.01, regime, ha="center", transform=axes.get_xaxis_transform())
        axes.set(xlabel=f"held-out time block ({block_length} steps each)", ylabel="mean step time (ms)", xticks=[])
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def accuracy_figure(table: pd.DataFrame, attainable_mape: float) -> Figure:
    """Draw held-out MAPE by regime and method.

    Parameters
    ----------
    table : DataFrame
        One row per method, one column per regime, MAPE as fractions.
    attainable_mape : float
        Drawn as a line: what noise alone leaves.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        width = 0.8 / len(table)
        colours = [_BLUE, _GREY, _ORANGE, "#75507b", "#4e9a06"]
        top = min(float(table.to_numpy().max()), 1.0)
        for i, (method, values) in enumerate(table.iterrows()):
            x = np.arange(table.shape[1]) + (i - (len(table) - 1) / 2) * width
            bars = axes.bar(x, 100 * values.clip(upper=top), width, color=colours[i % len(colours)], label=str(method))
            axes.bar_label(bars, [f"{100 * v:.0f}" for v in values], fontsize=7)
        axes.axhline(100 * attainable_mape, color="black", linestyle="--", linewidth=0.8, label="attainable: noise alone")
        axes.set_xticks(np.arange(table.shape[1]), [str(c) for c in table.columns])
        axes.set_ylabel("held-out MAPE (%)")
        axes.legend(frameon=False, fontsize=8, ncols=2)
    return figure


def coefficient_figure(posterior: LatencyPosterior) -> Figure:
    """Draw each coefficient's 95 % interval: prior, population, donors and target, in reference units."""
    features = posterior.feature_set
    theta = posterior.draws_of("theta")
    population = np.concatenate([posterior.draws_of("beta"), posterior.draws_of("delta")], axis=1)
    names = features.coef_names
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(8, 0.5 * len(names) + 1), layout="constrained")
        axes = figure.subplots()
        series = [("population", population, "black")]
        for c, config_id in enumerate(posterior.config_ids):
            series.append((config_id, theta[:, c], _ORANGE if config_id == posterior.target else _GREY))
        step = 0.8 / (len(series) + 1)
        for k, feature in enumerate(features.varying):
            axes.plot([feature.prior.low, feature.prior.high], [k - 0.4, k - 0.4], color=_BLUE, linewidth=3, alpha=0.35)
            for i, (_, draws, colour) in enumerate(series):
                low, middle, high = np.quantile(draws[:, k], (0.025, 0.5, 0.975))
                y = k - 0.4 + (i + 1) * step
                axes.plot([low, high], [y, y], color=colour, linewidth=1.2)
                axes.plot(middle, y, "o", color=colour, markersize=3)
        axes.axvline(0, color="black", linewidth=0.5)
        axes.set_yticks(range(len(names)), list(names))
        axes.invert_yaxis()
        axes.set_xlabel("coefficient in reference units (95 % intervals; blue: 90 % prior range of the population)")
        handles = [axes.plot([], [], color=c, label=n)[0] for n, _, c in series]
        axes.legend(handles=handles, frameon=False, fontsize=8)
    return figure
