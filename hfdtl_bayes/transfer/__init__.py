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
    rows_with_ids,
    usable_rows,
)
from hfdtl_bayes.transfer.checks import Check, Status
from hfdtl_bayes.transfer.conditioning import CALIBRATION_ENGINES, calibrate_statistics
from hfdtl_bayes.transfer.conflict import Conflict, population_conflict
from hfdtl_bayes.transfer.cross_validation import CrossValidation, CrossValidationSettings, cross_validate
from hfdtl_bayes.transfer.crps import crps, crps_of_draws, crps_of_normals
from hfdtl_bayes.transfer.delays import DelayScores, WaitRule, calibrate_delays, score_delays
from hfdtl_bayes.transfer.discovery import Discovery, Term, discover
from hfdtl_bayes.transfer.donor_choice import DonorRanking, rank_donors
from hfdtl_bayes.transfer.donor_search import DonorChoiceSettings
from hfdtl_bayes.transfer.donors import combine_donors, discounts_from, forget, promote
from hfdtl_bayes.transfer.evaluation import HeldOut, attainable_mape, evaluate
from hfdtl_bayes.transfer.folds import LEAVE_OUT, Fold, Skipped
from hfdtl_bayes.transfer.held_out_score import held_out_score
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
from hfdtl_bayes.transfer.sequential import EProcess, SequentialSettings, TrafficMonitor
from hfdtl_bayes.transfer.streaming import TargetStream
from hfdtl_bayes.transfer.term_search import DiscoverySettings
from hfdtl_bayes.transfer.transfer_error import TransferError
from hfdtl_bayes.transfer.variance import VarianceSources, variance_sources
from hfdtl_bayes.transfer.verdict import Outcome, Verdict, VerdictSettings, verdict

__all__ = [
    "CALIBRATION_ENGINES",
    "LEAVE_OUT",
    "Check",
    "Conflict",
    "CrossValidation",
    "CrossValidationSettings",
    "DelayScores",
    "Discovery",
    "DiscoverySettings",
    "DonorChoiceSettings",
    "DonorRanking",
    "EProcess",
    "Fold",
    "HeldOut",
    "Outcome",
    "RidgeRecipe",
    "SequentialSettings",
    "Skipped",
    "Status",
    "TargetStream",
    "Term",
    "TrafficMonitor",
    "TransferError",
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
    "combine_donors",
    "compare_fits",
    "compare_likelihoods",
    "cross_validate",
    "crps",
    "crps_of_draws",
    "crps_of_normals",
    "discounts_from",
    "discover",
    "evaluate",
    "fit_donors",
    "fit_ridge_donors",
    "forget",
    "held_out_rows",
    "held_out_score",
    "leave_one_configuration_out",
    "left_out_score",
    "loo_blocks",
    "loo_rows",
    "marginal_log_density",
    "population_conflict",
    "promote",
    "rank_donors",
    "read_trace",
    "ridge_cv",
    "row_log_density",
    "rows_with_ids",
    "score_delays",
    "scratch_coefficients",
    "usable_rows",
    "variance_sources",
    "verdict",
]
