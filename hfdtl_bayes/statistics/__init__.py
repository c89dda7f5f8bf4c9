"""Column-scaled QR sufficient statistics with drift blocks."""

from hfdtl_bayes.statistics.dependence import (
    DEFAULT_BLOCK_LENGTH,
    Autocorrelation,
    BlockFaults,
    BlockLength,
    choose_block_length,
    residual_autocorrelation,
)
from hfdtl_bayes.statistics.distributed import statistics_on_dask
from hfdtl_bayes.statistics.effective import EffectiveRows, effective_rows, outlier_sentence
from hfdtl_bayes.statistics.files import input_hash, statistics_from_dataset, statistics_to_dataset
from hfdtl_bayes.statistics.pilot import (
    OUTLIER_CUTOFFS,
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
from hfdtl_bayes.statistics.stored import StoredStatistics, merge_statistics, package_version, read_statistics, write_statistics
from hfdtl_bayes.statistics.streaming import StreamedStatistics, statistics_from_parquet
from hfdtl_bayes.statistics.sufficient import (
    ConfigStatistics,
    PseudoRows,
    Stratum,
    pseudo_rows,
    statistics_from_rows,
)

__all__ = [
    "DEFAULT_BLOCK_LENGTH",
    "DEFAULT_ROWS_PER_CONFIG",
    "OUTLIER_CUTOFFS",
    "Autocorrelation",
    "BlockFaults",
    "BlockLength",
    "ConfigStatistics",
    "Downweighted",
    "EffectiveRows",
    "PseudoRows",
    "RowScaling",
    "ScaledRows",
    "StoredStatistics",
    "Stratum",
    "StreamedStatistics",
    "choose_block_length",
    "config_to_constant",
    "constant_s",
    "effective_rows",
    "fit_row_scaling",
    "input_hash",
    "merge_statistics",
    "outlier_sentence",
    "own_prior",
    "package_version",
    "pseudo_rows",
    "read_statistics",
    "residual_autocorrelation",
    "row_scale",
    "rows_from_dataset",
    "rows_to_dataset",
    "scaled_rows",
    "statistics_from_dataset",
    "statistics_from_parquet",
    "statistics_from_rows",
    "statistics_on_dask",
    "statistics_to_dataset",
    "write_statistics",
]
