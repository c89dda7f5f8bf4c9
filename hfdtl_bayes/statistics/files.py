"""Sufficient statistics as xarray datasets, with names and units, and the hash that identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from hfdtl_bayes.configuration import configuration_from_mapping
from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet
from hfdtl_bayes.statistics.scaling import Downweighted, RowScaling
from hfdtl_bayes.statistics.sufficient import ConfigStatistics, Stratum

# Fields of RowScaling beside the pilot.
_SCALING = ("floor_s", "cutoff", "row_sd", "block_sd")


def statistics_to_dataset(statistics: ConfigStatistics, feature_set: FeatureSet) -> xr.Dataset:
    """Return the statistics of one configuration as a dataset that netCDF can hold.

    Triangles are padded with zero rows to (stratum, K + 1, K + 1); `triangle_rows` says how many rows count.
    """
    k = len(statistics.coef_names)
    triangles = np.zeros((len(statistics.strata), k + 1, k + 1))
    for i, stratum in enumerate(statistics.strata):
        triangles[i, : len(stratum.triangle)] = stratum.triangle
    units = feature_set.units()
    names = [*statistics.coef_names, "response"]
    return xr.Dataset(
        {
            "triangle": (("stratum", "triangle_row", "triangle_column"), triangles),
            "triangle_rows": ("stratum", np.array([len(s.triangle) for s in statistics.strata])),
            "multiplier": ("stratum", np.array([s.multiplier for s in statistics.strata])),
            "count": ("stratum", np.array([s.count for s in statistics.strata])),
            "pilot": ("coef", np.asarray(statistics.scaling.pilot, dtype=float)),
            "reference": ("coef", feature_set.references),
            "unit": ("coef", [units[n] for n in statistics.coef_names]),
            "config_row": ("config_feature", np.asarray(statistics.config_row, dtype=float)),
            **{name: ((), getattr(statistics.scaling, name)) for name in _SCALING},
            "block_length": ((), statistics.block_length),
            "constant_s": ((), statistics.constant_s),
            "log_scale_sum": ((), statistics.log_scale_sum),
            "total_s": ((), statistics.total_s),
            "rows": ((), statistics.rows),
            "blocks": ((), statistics.blocks),
        },
        coords={
            "coef": list(statistics.coef_names),
            "triangle_column": names,
            "config_feature": [f.name for f in feature_set.config],
        },
        attrs={
            "feature_set": statistics.feature_set,
            "quantity": statistics.quantity,
            "configuration": json.dumps(statistics.configuration.dump()),
            "downweighted": json.dumps(asdict(statistics.downweighted)),
        },
    )


def statistics_from_dataset(dataset: xr.Dataset) -> ConfigStatistics:
    """Rebuild the statistics of one configuration.

    Raises
    ------
    StatisticsError
        If a field is missing or does not fit the others.
    """
    try:
        strata = tuple(
            Stratum(int(m), int(n), np.array(t[: int(rows)]))
            for m, n, t, rows in zip(
                dataset["multiplier"].to_numpy(),
                dataset["count"].to_numpy(),
                dataset["triangle"].to_numpy(),
                dataset["triangle_rows"].to_numpy(),
                strict=True,
            )
        )
        return ConfigStatistics(
            configuration=configuration_from_mapping(json.loads(dataset.attrs["configuration"]), "stored configuration"),
            feature_set=str(dataset.attrs["feature_set"]),
            quantity=str(dataset.attrs["quantity"]),
            coef_names=tuple(str(n) for n in dataset["coef"].to_numpy()),
            scaling=RowScaling(dataset["pilot"].to_numpy(), **{name: float(dataset[name]) for name in _SCALING}),
            block_length=int(dataset["block_length"]),
            constant_s=float(dataset["constant_s"]),
            config_row=dataset["config_row"].to_numpy() if dataset.sizes.get("config_feature") else np.zeros(0),
            rows=int(dataset["rows"]),
            blocks=int(dataset["blocks"]),
            log_scale_sum=float(dataset["log_scale_sum"]),
            total_s=float(dataset["total_s"]),
            downweighted=_downweighted(json.loads(dataset.attrs["downweighted"])),
            strata=strata,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise StatisticsError(f"stored statistics cannot be read: {error}") from error


def _downweighted(stored: dict[str, Any]) -> Downweighted:
    return Downweighted(**{**stored, "by_regime": tuple((str(name), int(count)) for name, count in stored["by_regime"])})


def input_hash(statistics: Sequence[ConfigStatistics]) -> str:
    """Return the SHA-256 of all that the statistics hold, from configurations to the last digit of the triangles."""
    digest = hashlib.sha256()
    for s in statistics:
        head = {
            "configuration": s.configuration.dump(),
            "set": [s.feature_set, s.quantity],
            "columns": s.coef_names,
            "downweighted": asdict(s.downweighted),
            "counts": [s.rows, s.blocks, s.block_length, [(stratum.multiplier, stratum.count) for stratum in s.strata]],
        }
        digest.update(json.dumps(head, sort_keys=True, default=str).encode())
        scalars = [*(getattr(s.scaling, name) for name in _SCALING), s.constant_s, s.log_scale_sum, s.total_s]
        numbers = [s.pilot, scalars, s.config_row, *(stratum.triangle for stratum in s.strata)]
        for values in numbers:
            digest.update(np.ascontiguousarray(values, dtype="<f8").tobytes())
    return digest.hexdigest()
