"""Feature sets by name, the package's own and those a user registers."""

from __future__ import annotations

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import blis, discrepancy, hfdtl, roofline
from hfdtl_bayes.features.feature import QUANTITIES, FeatureSet

_SETS: dict[tuple[str, str], FeatureSet] = {}
_OWN: set[tuple[str, str]] = set()


def register_feature_set(feature_set: FeatureSet, *, replace: bool = False) -> FeatureSet:
    """Make a feature set available by name to `fit` and to the command line.

    Parameters
    ----------
    feature_set : FeatureSet
    replace : bool
        True to put it in the place of a user's set of the same name and quantity, as when a notebook cell is run again.

    Returns
    -------
    FeatureSet
        The one given, so that a definition can be registered where it stands.

    Raises
    ------
    InputError
        If its quantity is unknown, or another set of that name and quantity is registered: one of the package's own, which
        cannot be replaced, or a user's and `replace` is False.
    """
    if feature_set.quantity not in QUANTITIES:
        raise InputError(
            f"feature set {feature_set.name!r} explains {feature_set.quantity!r}; accepted quantities are {', '.join(QUANTITIES)}"
        )
    key = (feature_set.name, feature_set.quantity)
    if _SETS.get(key, feature_set) is not feature_set:
        if key in _OWN:
            raise InputError(
                f"{feature_set.name!r} for {feature_set.quantity} is a feature set of this package and stays as it is; choose "
                "another name"
            )
        if not replace:
            raise InputError(
                f"a feature set {feature_set.name!r} for {feature_set.quantity} exists; choose another name, or register it with "
                "replace=True"
            )
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
    discrepancy.STEP_TIME,
):
    register_feature_set(_set)
    _OWN.add((_set.name, _set.quantity))
