"""Figures and summaries of fits."""

from hfdtl_bayes.report.figures import accuracy_figure, block_mean_figure, coefficient_figure, save_figure

__all__ = ["accuracy_figure", "block_mean_figure", "coefficient_figure", "save_figure"]
