"""Statistics kept as netCDF come back exactly, and their hash changes with anything in them."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulation import BLOCK, THREE, TINY, configuration, simulate

from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import Level
from hfdtl_bayes.statistics import (
    ConfigStatistics,
    Downweighted,
    RowScaling,
    Stratum,
    input_hash,
    statistics_from_dataset,
    statistics_to_dataset,
)


def assert_identical(a: ConfigStatistics, b: ConfigStatistics) -> None:
    for field in fields(ConfigStatistics):
        mine, theirs = getattr(a, field.name), getattr(b, field.name)
        if field.name == "strata":
            assert [(s.multiplier, s.count) for s in mine] == [(s.multiplier, s.count) for s in theirs]
            for one, two in zip(mine, theirs, strict=True):
                np.testing.assert_array_equal(one.triangle, two.triangle, strict=True)
        elif isinstance(mine, RowScaling):
            assert mine.difference(theirs) is None
        elif isinstance(mine, np.ndarray):
            np.testing.assert_array_equal(mine, theirs, strict=True)
        else:
            assert mine == theirs, field.name


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 60), block=st.integers(1, 12))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_statistics_come_back_exactly(tmp_path: Path, seed: int, rows: int, block: int) -> None:
    (own,) = simulate(seed, THREE[1:2], rows=rows, block=block).statistics
    path = tmp_path / "statistics.nc"
    statistics_to_dataset(own, TINY).to_netcdf(path, engine="h5netcdf")
    with xr.open_dataset(path, engine="h5netcdf") as stored:
        back = statistics_from_dataset(stored.load())
    assert_identical(own, back)
    assert input_hash([own]) == input_hash([back])


def test_names_and_units_travel_along() -> None:
    dataset = statistics_to_dataset(simulate(1).statistics[0], TINY)
    assert dict(zip(dataset["coef"].to_numpy(), dataset["unit"].to_numpy(), strict=True)) == {
        "prefill": "s/token", "decode": "s/token", "constant": "s",
    }  # fmt: skip
    assert list(dataset["triangle_column"].to_numpy()) == ["prefill", "decode", "constant", "response"]


def test_a_set_without_config_features_comes_back(tmp_path: Path) -> None:
    features = replace(TINY, name="plain", features=tuple(f for f in TINY.features if f.level is not Level.CONFIG))
    own = simulate(2, features=features).statistics[0]
    statistics_to_dataset(own, features).to_netcdf(tmp_path / "s.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "s.nc", engine="h5netcdf") as stored:
        assert_identical(own, statistics_from_dataset(stored.load()))


@pytest.mark.parametrize(
    "name",
    [
        *("triangle", "multiplier", "pilot", "floor_s", "cutoff", "row_sd", "block_sd", "block_length", "rows", "total_s"),
        *("log_scale_sum", "config_row"),
    ],
)
def test_a_missing_field_is_named(name: str) -> None:
    dataset = statistics_to_dataset(simulate(1).statistics[0], TINY)
    with pytest.raises(StatisticsError, match=f"cannot be read: .*{name}"):
        statistics_from_dataset(dataset.drop_vars(name))
    for attribute in ("downweighted", "configuration"):
        del dataset.attrs[attribute]
        with pytest.raises(StatisticsError, match=attribute):
            statistics_from_dataset(dataset)


def test_a_damaged_configuration_is_refused() -> None:
    dataset = statistics_to_dataset(simulate(1).statistics[0], TINY)
    for text in ("{", "[]", '{"config_id": "x"}'):
        with pytest.raises(StatisticsError, match="cannot be read"):
            statistics_from_dataset(dataset.assign_attrs(configuration=text))


CHANGES = {
    "configuration": configuration("one", "H200"),
    "feature_set": "other",
    "quantity": "api_delay",
    "coef_names": ("prefill", "constant", "decode"),
    "block_length": BLOCK + 1,
    "downweighted": Downweighted(rows=1),
    "total_s": 1.0,
    "constant_s": 5.1e-3,
    "config_row": np.array([0.41]),
    "rows": 61,
    "blocks": 7,
    "log_scale_sum": -1.0,
}


SCALING_CHANGES = {"pilot": np.array([1.0, 1.0, 1.0]), "floor_s": 1.1e-3, "cutoff": 4.0, "row_sd": 0.1, "block_sd": 0.1}


@pytest.mark.parametrize("name", SCALING_CHANGES)
def test_the_hash_changes_with_the_scaling(name: str) -> None:
    own = simulate(1).statistics[0]
    changed = replace(own, scaling=replace(own.scaling, **{name: SCALING_CHANGES[name]}))
    assert input_hash([changed]) != input_hash([own])


def test_the_hash_covers_every_field() -> None:
    assert {f.name for f in fields(ConfigStatistics)} == {*CHANGES, "scaling", "strata"}
    assert {f.name for f in fields(RowScaling)} == set(SCALING_CHANGES)


@pytest.mark.parametrize("name", [*CHANGES, "count", "multiplier", "triangle"])
def test_the_hash_changes_with_every_field(name: str) -> None:
    own = simulate(1).statistics[0]
    first, *others = own.strata
    strata = {
        "count": Stratum(first.multiplier, first.count + 1, first.triangle),
        "multiplier": Stratum(1, first.count, first.triangle),
        "triangle": Stratum(first.multiplier, first.count, np.nextafter(first.triangle, 1.0)),
    }
    changed = replace(own, **({name: CHANGES[name]} if name in CHANGES else {"strata": (strata[name], *others)}))
    assert input_hash([changed]) != input_hash([own])


def test_the_hash_knows_order_and_number() -> None:
    one, two, three = simulate(1).statistics
    hashes = {input_hash(s) for s in ([one], [one, two], [two, one], [one, two, three], [])}
    assert len(hashes) == 5
    assert input_hash([one, two]) == input_hash([replace(one), replace(two)])
