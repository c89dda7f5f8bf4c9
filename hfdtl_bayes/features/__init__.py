"""Features: names, units, levels, formulas and priors of the columns a latency model is linear in."""

from hfdtl_bayes.features.candidates import Candidate, candidate, candidate_names, register_candidate
from hfdtl_bayes.features.feature import QUANTITIES, Feature, FeatureSet, Level, PriorRange, Quantity
from hfdtl_bayes.features.fingerprint import fingerprint, fingerprint_differences
from hfdtl_bayes.features.operating_points import operating_points, typical_batches
from hfdtl_bayes.features.registry import feature_set, feature_set_names, register_feature_set
from hfdtl_bayes.features.response import response

__all__ = [
    "QUANTITIES",
    "Candidate",
    "Feature",
    "FeatureSet",
    "Level",
    "PriorRange",
    "Quantity",
    "candidate",
    "candidate_names",
    "feature_set",
    "feature_set_names",
    "fingerprint",
    "fingerprint_differences",
    "operating_points",
    "register_candidate",
    "register_feature_set",
    "response",
    "typical_batches",
]
