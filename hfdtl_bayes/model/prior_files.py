"""Priors as a YAML file: ranges a planner can edit, read with one error per file, written from what is in force.

    features: roofline            # optional; refused if the fit uses another set
    deviation: [0.1, 0.6]         # 90 % of it lies between these
    hardware_share: 2.0           # or a range around one half
    discounts: {old-donor: 0.5}   # counts for half a donor; donors left out count in full
    drift: null                   # no drift at all
    population:
      kv_read: [0.8, 1.5]                                   # a coefficient without unit
      prefill: {range: [8.0e-06, 4.0e-05], unit: s/token}   # one with a unit, which must be stated

What a file leaves out keeps its default: of `PriorSettings`, and of the feature set's own ranges.
"""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from scipy.optimize import brentq
from scipy.stats import beta

from hfdtl_bayes.errors import InputError, MissingInputError
from hfdtl_bayes.features import Feature, FeatureSet, PriorRange
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings

_SAME = 1e-9
"""Relative difference below which a range is the one in force: files carry twelve digits."""
_MAY_BE_NULL = ("drift",)
_SETTINGS = tuple(f.name for f in fields(PriorSettings))
_KEYS = ("features", "quantity", *_SETTINGS, "population")


class _Strict(yaml.SafeLoader):
    """A loader that refuses a key written twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, every key once."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(k) for k in keys if keys.count(k) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"key {', '.join(repeated)} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Problem(Exception):
    """What is wrong with one field."""


def _number(value: Any, what: str) -> float:
    # PyYAML takes 8e-06 for text, because YAML 1.1 wants 8.0e-06; who writes it means the number.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError):
        raise _Problem(f"{what} must be a number, found {reprlib.repr(value)}") from None
    if not math.isfinite(number):
        raise _Problem(f"{what} must be finite, found {value}")
    return number


def _bounds(value: Any, *, positive: bool) -> tuple[float, float]:
    kind = "two positive numbers" if positive else "two numbers"
    if not isinstance(value, list) or len(value) != 2:
        raise _Problem(f"give {kind}, [low, high], found {reprlib.repr(value)}")
    low, high = _number(value[0], "the lower bound"), _number(value[1], "the upper bound")
    if positive and low <= 0:
        raise _Problem(f"give {kind}, [low, high], found {value}")
    if low >= high:
        raise _Problem(f"the lower bound comes first and is smaller, found {value}; exchange or spread them")
    return low, high


def _share(value: Any) -> float:
    """Return the Beta parameter: given as such, or as the symmetric range that holds 90 %."""
    if not isinstance(value, list):
        number = _number(value, "the parameter of the Beta prior")
        if number <= 0:
            raise _Problem(f"the parameter of the Beta prior must be positive, found {value}")
        return number
    low, high = _bounds(value, positive=True)
    if high >= 1 or abs(low + high - 1) > 0.02:
        raise _Problem(f"a range of a share lies symmetrically around one half, like [0.14, 0.86], found {value}")
    wanted = 0.5 * (low + 1 - high)
    smallest, largest = (beta(a, a).ppf(0.05) for a in (0.05, 1e4))
    if not smallest < wanted < largest:
        raise _Problem(f"no Beta prior of a share has 90 % between {low:g} and {high:g}; widen or narrow it")
    return float(brentq(lambda a: beta(a, a).ppf(0.05) - wanted, 0.05, 1e4))


def _population(feature: Feature, value: Any) -> PriorRange:
    """Return a coefficient's range in multiples of its reference."""
    unit = feature.coefficient_unit
    if isinstance(value, Mapping):
        unknown = [str(k) for k in value if k not in ("range", "unit")]
        if unknown or "range" not in value:
            raise _Problem(f"give {{range: [low, high], unit: {unit}}}, found the keys {', '.join(map(str, value)) or 'none'}")
        found = str(value.get("unit", "not stated"))
        if found != unit and not (unit == "1" and "unit" not in value):
            raise _Problem(f"unit {found}, but this coefficient is in {unit}; convert the range and write unit: {unit}")
        value = value["range"]
    elif unit != "1":
        raise _Problem(f"this coefficient has a unit; give {{range: [low, high], unit: {unit}}}, found {reprlib.repr(value)}")
    low, high = _bounds(value, positive=False)
    low, high = low / feature.reference, high / feature.reference
    if math.isclose(low, feature.prior.low, rel_tol=_SAME) and math.isclose(high, feature.prior.high, rel_tol=_SAME):
        return feature.prior
    return PriorRange(low, high)


def _unknown(key: object, known: Iterable[str], kind: str) -> str:
    known = list(known)
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"unknown {kind}" + (f"; did you mean {near[0]}?" if near else f"; accepted are {', '.join(known)}")


def _discounts(value: Any) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, Mapping):
        raise _Problem(f"give a mapping of donor to a number in (0, 1], found {reprlib.repr(value)}")
    found = tuple((str(c), _number(share, f"the discount of {c}")) for c, share in value.items())
    for c, share in found:
        if not 0 < share <= 1:
            raise _Problem(f"the discount of {c} must lie in (0, 1], found {share:g}; 1 counts it in full")
    return found


def _setting(key: str, value: Any) -> PositiveRange | float | tuple[tuple[str, float], ...] | None:
    if key == "hardware_share":
        return _share(value)
    if key == "discounts":
        return _discounts(value)
    if value is None and key in _MAY_BE_NULL:
        return None
    return PositiveRange(*_bounds(value, positive=True))


def _feature(name: str, feature_set: FeatureSet) -> Feature:
    for f in feature_set.features:
        if f.name == name:
            return f
    raise _Problem(_unknown(name, (f.name for f in feature_set.features), f"feature of {feature_set.name}"))


def _ranges(value: Any, feature_set: FeatureSet, problems: list[str]) -> dict[str, PriorRange]:
    """Return the ranges under `population`, by feature; what is wrong with one is added to `problems`."""
    if not isinstance(value, Mapping):
        raise _Problem(f"give a mapping of feature to range, found {reprlib.repr(value)}")
    ranges = {}
    for name, given in value.items():
        try:
            ranges[name] = _population(_feature(name, feature_set), given)
        except _Problem as problem:
            problems.append(f"population.{name}: {problem}")
    return ranges


def priors_from_mapping(
    data: Mapping[str, Any], feature_set: FeatureSet, source: str = "priors"
) -> tuple[PriorSettings, FeatureSet]:
    """Build priors from plain data in the layout of the file.

    Parameters
    ----------
    data : mapping
    feature_set : FeatureSet
        The set the ranges under `population` are for.
    source : str
        What to call the data in messages.

    Returns
    -------
    PriorSettings
        Keys left out keep their default.
    FeatureSet
        With the ranges given in the place of its own; the set itself if none differs.

    Raises
    ------
    InputError
        With every problem found, one line each: field, what was found, what is accepted.
    """
    if not isinstance(data, Mapping):
        raise InputError(f"{source}: expected a mapping with some of {', '.join(_KEYS)}, found {reprlib.repr(data)}")
    problems: list[str] = []
    settings: dict[str, Any] = {}
    ranges: dict[str, PriorRange] = {}
    made_for = {"features": feature_set.name, "quantity": feature_set.quantity}
    for key, value in data.items():
        try:
            if key in made_for:
                if value != made_for[key]:
                    raise _Problem(f"{reprlib.repr(value)}, but the model uses {made_for[key]}; take the priors made for that")
            elif key in _SETTINGS:
                settings[key] = _setting(key, value)
            elif key == "population":
                ranges = _ranges(value, feature_set, problems)
            else:
                raise _Problem(_unknown(key, _KEYS, "key"))
        except _Problem as problem:
            problems.append(f"{key}: {problem}")
    if problems:
        raise InputError(f"{source} does not hold valid priors:\n  - " + "\n  - ".join(problems))
    return PriorSettings(**settings), feature_set.with_priors(ranges)


def read_priors(path: str | os.PathLike[str], feature_set: FeatureSet) -> tuple[PriorSettings, FeatureSet]:
    """Read a file of priors.

    Parameters
    ----------
    path : path
    feature_set : FeatureSet

    Returns
    -------
    PriorSettings
    FeatureSet
        With the file's ranges in the place of its own.

    Raises
    ------
    MissingInputError
        If the file does not exist.
    InputError
        If it is not YAML or does not hold valid priors; every problem is listed with its field.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingInputError(f"no priors at {path}; `hfdtl-bayes priors --template` prints a file to edit") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as priors: {error}") from None
    try:
        data = yaml.load(text, Loader=_Strict)
    # PyYAML lets the errors of its constructors through: a tag or a date that does not fit its text, nesting too deep.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    return priors_from_mapping({} if data is None else data, feature_set, str(path))


def _text(number: float) -> str:
    """Return a number as YAML 1.1 reads it back: 8e-06 would be text."""
    return yaml.safe_dump(float(f"{number:.12g}")).splitlines()[0]


def priors_yaml(feature_set: FeatureSet, settings: PriorSettings | None = None) -> str:
    """Return the priors in force as a file to edit, every line with what it means.

    Parameters
    ----------
    feature_set : FeatureSet
    settings : PriorSettings, optional
        The defaults by default.
    """
    settings = settings or PriorSettings()
    # Without drift there is one sentence for it and none for its spread, which comes last.
    said = dict(zip(_SETTINGS, settings.sentences(feature_set)[len(feature_set.features) :], strict=False))
    lines = [
        "# Priors. A range [low, high] holds 90 % of what is believed; what is left out keeps its default.",
        f"features: {feature_set.name}",
        f"quantity: {feature_set.quantity}",
        "",
    ]
    for name in _SETTINGS:
        value = getattr(settings, name)
        shown = _text(value) if isinstance(value, float) else "null"
        if isinstance(value, PositiveRange):
            shown = f"[{_text(value.low)}, {_text(value.high)}]"
        if isinstance(value, tuple):
            shown = yaml.safe_dump(dict(value), default_flow_style=True, width=math.inf, allow_unicode=True).strip()
        lines += [f"# {said[name]}"] if name in said else []
        lines.append(f"{name}: {shown}")
    lines += ["", "population:"]
    for f in feature_set.features:
        bounds = f"[{_text(f.prior.low * f.reference)}, {_text(f.prior.high * f.reference)}]"
        unit = f.coefficient_unit
        lines.append(f"  # {f.formula}")
        lines.append(f"  {f.name}: {bounds if unit == '1' else f'{{range: {bounds}, unit: {unit}}}'}")
    return "\n".join(lines) + "\n"
