"""Statistics as files of their own, so that machines that hold traces send kilobytes, and their merge."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xarray as xr

from hfdtl_bayes.errors import HfdtlError, MissingInputError, StatisticsError
from hfdtl_bayes.features import FeatureSet, feature_set, fingerprint, fingerprint_differences
from hfdtl_bayes.files import atomic
from hfdtl_bayes.statistics.files import input_hash, statistics_from_dataset, statistics_to_dataset
from hfdtl_bayes.statistics.sufficient import ConfigStatistics

FILE_FORMAT = 1
_HEADER = "hfdtl_bayes_statistics"


@dataclass(frozen=True)
class StoredStatistics:
    """Statistics with what says whether others may be added.

    Attributes
    ----------
    statistics : ConfigStatistics
    package_version : str
        Of the package that made them.
    units : dict of str to str
        Of each coefficient.
    references : dict of str to float
        The size of each coefficient that one unit of the columns stands for.
    fingerprint : dict
        What the formulas come to on fixed examples.
    source : Path
    """

    statistics: ConfigStatistics
    package_version: str
    units: dict[str, str]
    references: dict[str, float]
    fingerprint: dict[str, list[float]]
    source: Path


def package_version() -> str:
    """Return the installed version of this package, "unknown" when it is run from a bare checkout."""
    try:
        return version("hfdtl-bayes")
    except PackageNotFoundError:
        return "unknown"


def stored(statistics: ConfigStatistics, features: FeatureSet, source: Path) -> StoredStatistics:
    """Return statistics made by this version of the package, as a file holds them."""
    references = {f.name: float(f.reference) for f in features.features}
    return StoredStatistics(statistics, package_version(), features.units(), references, fingerprint(features), source)


def write_statistics(path: str | os.PathLike[str], statistics: ConfigStatistics, features: FeatureSet) -> None:
    """Write statistics as netCDF, whole or not at all."""
    own = stored(statistics, features, Path(path))
    header = {
        "format": FILE_FORMAT,
        "package_version": own.package_version,
        "units": own.units,
        "references": own.references,
        "fingerprint": own.fingerprint,
        "hash": input_hash([statistics]),
    }
    dataset = statistics_to_dataset(statistics, features)
    dataset.attrs[_HEADER] = json.dumps(header)
    with atomic(path) as part:
        dataset.to_netcdf(part, engine="h5netcdf")


def read_statistics(path: str | os.PathLike[str]) -> StoredStatistics:
    """Read statistics, and check that the features they are of still mean what they did.

    Raises
    ------
    MissingInputError
        If there is no such file.
    StatisticsError
        If it is cut short, altered or no such file; if its feature set is not registered or has other features, units, reference
        scales or formulas now, which are named.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingInputError(f"no statistics at {path}")
    try:
        with xr.open_dataset(path, engine="h5netcdf") as opened:
            dataset = opened.load()
        header: dict[str, Any] = json.loads(dataset.attrs[_HEADER])
        if header["format"] != FILE_FORMAT:
            raise StatisticsError(
                f"{path} has file format {header['format']!r}, written by version {header['package_version']}; this version reads format "
                f"{FILE_FORMAT}. Make the statistics again from the traces"
            )
        statistics = statistics_from_dataset(dataset)
        same = input_hash([statistics]) == header["hash"]
        own = StoredStatistics(
            statistics, header["package_version"], header["units"], header["references"], header["fingerprint"], path
        )
    except HfdtlError:
        raise
    except Exception as error:  # h5netcdf and HDF5 raise of many kinds for a damaged file
        raise StatisticsError(
            f"{path} holds no statistics that can be read ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "it was cut short or is another kind of file. Make it again with `hfdtl-bayes statistics`"
        ) from None
    if not same:
        raise StatisticsError(f"{path}: the statistics do not match their hash; the file was altered. Make it again")
    now = stored(statistics, feature_set(statistics.feature_set, statistics.quantity), path)
    if set(now.references) != set(own.references):
        differing = ", ".join(sorted(set(now.references) ^ set(own.references)))
        raise StatisticsError(
            f"{path}: feature set {statistics.feature_set!r} has other features now: {differing}. Make the statistics again from the traces"
        )
    found = _difference(own, now)
    if found:
        raise StatisticsError(
            f"{path}, written by version {own.package_version}, has {found} than feature set {statistics.feature_set!r} now; its "
            "coefficients would be misread. Make the statistics again from the traces"
        )
    return own


def _difference(one: StoredStatistics, other: StoredStatistics) -> str | None:
    """Return in which respect the features of two are not the same, as "other ... of ..."; None if in none."""
    for kind, mine, theirs in (
        ("other units", one.units, other.units),
        ("other reference scales", one.references, other.references),
    ):
        names = [n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n)]
        if names:
            return f"{kind} of {', '.join(f'{n} ({mine.get(n)} against {theirs.get(n)})' for n in names)}"
    changed = fingerprint_differences(one.fingerprint, other.fingerprint)
    return f"another formula of {', '.join(changed)}" if changed else None


def merge_statistics(parts: Sequence[StoredStatistics]) -> ConfigStatistics:
    """Return the statistics of all rows together.

    Raises
    ------
    StatisticsError
        If there is nothing to merge, the same statistics are given twice, or they differ in configuration, features, units,
        reference scales, row scale, block length or package version; the files are named, and how to make them fit.
    """
    if not parts:
        raise StatisticsError("no statistics to merge; give one file at least")
    first = parts[0]
    hashes = {input_hash([first.statistics]): first.source}
    merged = first.statistics
    for other in parts[1:]:
        if other.package_version != first.package_version:
            raise StatisticsError(
                f"{other.source} was made by version {other.package_version} and {first.source} by version {first.package_version}; "
                "statistics of different package versions are not merged. Make all with one version"
            )
        found = _difference(first, other)
        if found:
            raise StatisticsError(
                f"{first.source} has {found} than {other.source}; register the same feature set where each is made, and make them again"
            )
        own = input_hash([other.statistics])
        if own in hashes:
            raise StatisticsError(
                f"{other.source} holds the same statistics as {hashes[own]}; its rows would count twice. Give each once"
            )
        hashes[own] = other.source
        try:
            merged = merged.merge(other.statistics)
        except StatisticsError as error:
            raise StatisticsError(
                f"{other.source} and {first.source}: {error}. `hfdtl-bayes statistics ... --pilot-from {first.source}` makes the other so"
            ) from None
    return merged
