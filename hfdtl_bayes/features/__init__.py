"""Features: names, units, levels, formulas and priors of the columns a latency model is linear in."""

from hfdtl_bayes.features.feature import QUANTITIES, Feature, FeatureSet, Level, PriorRange, Quantity
from hfdtl_bayes.features.registry import feature_set, feature_set_names, register_feature_set

__all__ = [
    "QUANTITIES",
    "Feature",
    "FeatureSet",
    "Level",
    "PriorRange",
    "Quantity",
    "feature_set",
    "feature_set_names",
    "register_feature_set",
]
