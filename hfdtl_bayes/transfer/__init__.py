"""Transfer: calibration of a target, held-out evaluation, the verdict, and the baselines it is measured against."""

from hfdtl_bayes.transfer.baselines import (
    RidgeRecipe,
    calibrate_ridge,
    fit_ridge_donors,
    ridge_cv,
    scratch_coefficients,
)
from hfdtl_bayes.transfer.calibration import (
    calibrate,
    calibration_rows_of,
    fit_donors,
    held_out_rows,
    read_trace,
    select_rows,
    usable_rows,
)
from hfdtl_bayes.transfer.checks import Check, Status
from hfdtl_bayes.transfer.conditioning import CALIBRATION_ENGINES, calibrate_statistics
from hfdtl_bayes.transfer.conflict import Conflict, population_conflict
from hfdtl_bayes.transfer.crps import crps, crps_of_draws, crps_of_normals
from hfdtl_bayes.transfer.delays import DelayScores, WaitRule, calibrate_delays, score_delays
from hfdtl_bayes.transfer.evaluation import HeldOut, attainable_mape, evaluate
from hfdtl_bayes.transfer.scores import (
    block_log_density,
    compare_fits,
    compare_likelihoods,
    leave_one_configuration_out,
    left_out_score,
    loo_blocks,
    loo_rows,
    marginal_log_density,
    row_log_density,
)
from hfdtl_bayes.transfer.streaming import TargetStream
from hfdtl_bayes.transfer.variance import VarianceSources, variance_sources
from hfdtl_bayes.transfer.verdict import Outcome, Verdict, VerdictSettings, verdict

__all__ = [
    "CALIBRATION_ENGINES",
    "Check",
    "Conflict",
    "DelayScores",
    "HeldOut",
    "Outcome",
    "RidgeRecipe",
    "Status",
    "TargetStream",
    "VarianceSources",
    "Verdict",
    "VerdictSettings",
    "WaitRule",
    "attainable_mape",
    "block_log_density",
    "calibrate",
    "calibrate_delays",
    "calibrate_ridge",
    "calibrate_statistics",
    "calibration_rows_of",
    "compare_fits",
    "compare_likelihoods",
    "crps",
    "crps_of_draws",
    "crps_of_normals",
    "evaluate",
    "fit_donors",
    "fit_ridge_donors",
    "held_out_rows",
    "leave_one_configuration_out",
    "left_out_score",
    "loo_blocks",
    "loo_rows",
    "marginal_log_density",
    "population_conflict",
    "read_trace",
    "ridge_cv",
    "row_log_density",
    "score_delays",
    "scratch_coefficients",
    "select_rows",
    "usable_rows",
    "variance_sources",
    "verdict",
]
