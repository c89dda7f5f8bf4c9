"""Column-scaled QR sufficient statistics with drift blocks."""

from hfdtl_bayes.statistics.files import input_hash, statistics_from_dataset, statistics_to_dataset
from hfdtl_bayes.statistics.pilot import (
    DEFAULT_OUTLIER_CUTOFF,
    config_to_constant,
    constant_s,
    fit_row_scaling,
    own_prior,
)
from hfdtl_bayes.statistics.scaled_rows import (
    DEFAULT_ROWS_PER_CONFIG,
    ScaledRows,
    rows_from_dataset,
    rows_to_dataset,
    scaled_rows,
)
from hfdtl_bayes.statistics.scaling import Downweighted, RowScaling, row_scale
from hfdtl_bayes.statistics.sufficient import (
    DEFAULT_BLOCK_LENGTH,
    ConfigStatistics,
    PseudoRows,
    Stratum,
    pseudo_rows,
    statistics_from_rows,
)

__all__ = [
    "DEFAULT_BLOCK_LENGTH",
    "DEFAULT_OUTLIER_CUTOFF",
    "DEFAULT_ROWS_PER_CONFIG",
    "ConfigStatistics",
    "Downweighted",
    "PseudoRows",
    "RowScaling",
    "ScaledRows",
    "Stratum",
    "config_to_constant",
    "constant_s",
    "fit_row_scaling",
    "input_hash",
    "own_prior",
    "pseudo_rows",
    "row_scale",
    "rows_from_dataset",
    "rows_to_dataset",
    "scaled_rows",
    "statistics_from_dataset",
    "statistics_from_rows",
    "statistics_to_dataset",
]
