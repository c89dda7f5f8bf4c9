"""The checks behind a verdict, each a small unit: settings, and a function from the evidence to a `Check`."""

from hfdtl_bayes.transfer.checks.accuracy import AccuracySettings, check_accuracy, check_rmse, probability_below
from hfdtl_bayes.transfer.checks.check import Check, Status
from hfdtl_bayes.transfer.checks.convergence import ConvergenceCheckSettings, check_convergence
from hfdtl_bayes.transfer.checks.coverage import CoverageSettings, check_coverage, common_shift_detectable
from hfdtl_bayes.transfer.checks.errors import ErrorSettings, check_errors
from hfdtl_bayes.transfer.checks.evidence import Evidence, Traffic, make_evidence
from hfdtl_bayes.transfer.checks.identity import IdentitySettings, check_identity
from hfdtl_bayes.transfer.checks.kinship import KinshipSettings, check_kinship
from hfdtl_bayes.transfer.checks.lack_of_fit import LackOfFitSettings, check_lack_of_fit, check_slopes
from hfdtl_bayes.transfer.checks.more_rows import MoreRows, rows_needed
from hfdtl_bayes.transfer.checks.reach import JUDGED, JudgedSettings, ReachSettings, check_judged, check_reach, known_amounts

__all__ = [
    "JUDGED",
    "AccuracySettings",
    "Check",
    "ConvergenceCheckSettings",
    "CoverageSettings",
    "ErrorSettings",
    "Evidence",
    "IdentitySettings",
    "JudgedSettings",
    "KinshipSettings",
    "LackOfFitSettings",
    "MoreRows",
    "ReachSettings",
    "Status",
    "Traffic",
    "check_accuracy",
    "check_convergence",
    "check_coverage",
    "check_errors",
    "check_identity",
    "check_judged",
    "check_kinship",
    "check_lack_of_fit",
    "check_reach",
    "check_rmse",
    "check_slopes",
    "common_shift_detectable",
    "known_amounts",
    "make_evidence",
    "probability_below",
    "rows_needed",
]
