"""Feature sets by name, the package's own and those a user registers."""

from __future__ import annotations

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import blis, hfdtl, roofline
from hfdtl_bayes.features.feature import QUANTITIES, FeatureSet

_SETS: dict[tuple[str, str], FeatureSet] = {}


def register_feature_set(feature_set: FeatureSet) -> FeatureSet:
    """Make a feature set available by name to `fit` and to the command line.

    Raises
    ------
    InputError
        If another set of that name and quantity is registered.
    """
    key = (feature_set.name, feature_set.quantity)
    if _SETS.get(key, feature_set) is not feature_set:
        raise InputError(f"a feature set {feature_set.name!r} for {feature_set.quantity} exists; choose another name")
    _SETS[key] = feature_set
    return feature_set


def feature_set(name: str, quantity: str = "step_time") -> FeatureSet:
    """Look a feature set up.

    Raises
    ------
    UnknownNameError
        If the quantity or the name is unknown; the message lists those known.
    """
    if quantity not in QUANTITIES:
        raise UnknownNameError(f"unknown quantity {quantity!r}; known are {', '.join(QUANTITIES)}")
    if (name, quantity) not in _SETS:
        known = ", ".join(n for n, q in _SETS if q == quantity)
        raise UnknownNameError(f"unknown feature set {name!r} for {quantity}; known are {known}")
    return _SETS[name, quantity]


def feature_set_names(quantity: str = "step_time") -> tuple[str, ...]:
    """Return the names registered for a quantity."""
    return tuple(n for n, q in _SETS if q == quantity)


for _set in (
    roofline.STEP_TIME,
    roofline.QUEUE_DELAY,
    roofline.API_DELAY,
    *hfdtl.SETS,
    blis.PHYSICS,
    blis.BLACKBOX,
):
    register_feature_set(_set)
