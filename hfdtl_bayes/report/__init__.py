"""Figures, comparisons and self-contained pages of fits."""

from hfdtl_bayes.report.comparison import ALL, CALIBRATED, METHODS, Comparison, block_means, compare, mape_by_regime
from hfdtl_bayes.report.figures import (
    accuracy_figure,
    block_mean_figure,
    coefficient_figure,
    coefficient_intervals,
    figure_svg,
    save_figure,
)
from hfdtl_bayes.report.learning_curve import learning_curve_figure
from hfdtl_bayes.report.summary import TargetSummary, answer, summary_page
from hfdtl_bayes.report.uncertainty_map import uncertainty_cells, uncertainty_map

__all__ = [
    "ALL",
    "CALIBRATED",
    "METHODS",
    "Comparison",
    "TargetSummary",
    "accuracy_figure",
    "answer",
    "block_mean_figure",
    "block_means",
    "coefficient_figure",
    "coefficient_intervals",
    "compare",
    "figure_svg",
    "learning_curve_figure",
    "mape_by_regime",
    "save_figure",
    "summary_page",
    "uncertainty_cells",
    "uncertainty_map",
]
