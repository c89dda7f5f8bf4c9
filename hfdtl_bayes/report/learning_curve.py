"""The learning curve of a cross-validation: transfer error against calibration rows, beside what noise alone leaves."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from hfdtl_bayes.report.figures import PALETTE, figure_style

_COLOURS = ("blue", "purple", "green", "orange", "muted")
_MARKERS = ("o", "^", "D", "s", "v")


def learning_curve_figure(curve: pd.DataFrame, *, narrow: bool = False) -> Figure:
    """Draw the typical MAPE of a left-out configuration against its calibration rows, with the interval for a new one.

    Parameters
    ----------
    curve : DataFrame
        `CrossValidation.learning_curve`: one line for each way of leaving out, the attainable MAPE beside it (dashed). The
        interval is drawn for the first way only, as two thin lines; with one configuration there is none.
    narrow : bool
        Shape for a phone.
    """
    counts = sorted(set(curve["rows"]))
    # Zero rows has its place on the axis too: positions are by rank, labels say how many.
    place = {n: i for i, n in enumerate(counts)}
    kinds = list(dict.fromkeys(curve["leave_out"]))
    with figure_style():
        figure = Figure(figsize=(4.4, 3.8) if narrow else (7.0, 3.8), layout="constrained")
        axes = figure.subplots()
        for i, kind in enumerate(kinds):
            own = curve[curve["leave_out"] == kind].sort_values("rows")
            x = own["rows"].map(place)
            colour = PALETTE[_COLOURS[i % len(_COLOURS)]]
            most = int(own["configurations"].max())
            axes.plot(
                x,
                100 * own["typical"],
                marker=_MARKERS[i % len(_MARKERS)],
                color=colour,
                linewidth=1.6,
                label=f"{kind} left out ({most})",
            )
            axes.plot(x, 100 * own["attainable"], color=colour, linewidth=1.0, linestyle=(0, (4, 2)))
            if i == 0 and own["new_high"].notna().any():
                axes.plot(x, 100 * own["new_high"], color=colour, linewidth=0.7, alpha=0.7)
                axes.plot(x, 100 * own["new_low"], color=colour, linewidth=0.7, alpha=0.7, label="95 % for a new configuration")
        axes.plot([], [], color=PALETTE["ink"], linewidth=1.0, linestyle=(0, (4, 2)), label="attainable: noise alone")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        steps = [m * 10.0**e for e in range(-3, 7) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
        axes.yaxis.set_major_locator(FixedLocator(steps))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axes.set_xticks(range(len(counts)), ["zero-shot" if n == 0 else str(n) for n in counts])
        axes.set(xlabel="calibration rows of the left-out configuration", ylabel="held-out MAPE (%), logarithmic")
        figure.legend(loc="outside lower left" if narrow else "outside lower center", ncols=1 if narrow else 3)
    return figure
