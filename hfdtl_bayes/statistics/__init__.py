"""Column-scaled QR sufficient statistics with drift blocks."""

from hfdtl_bayes.statistics.files import input_hash, statistics_from_dataset, statistics_to_dataset
from hfdtl_bayes.statistics.pilot import config_to_constant, constant_s, own_prior, pilot_coefficients, row_scale
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
    "ConfigStatistics",
    "PseudoRows",
    "Stratum",
    "config_to_constant",
    "constant_s",
    "input_hash",
    "own_prior",
    "pilot_coefficients",
    "pseudo_rows",
    "row_scale",
    "statistics_from_dataset",
    "statistics_from_rows",
    "statistics_to_dataset",
]
