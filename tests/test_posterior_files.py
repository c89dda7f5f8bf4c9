"""A posterior file gives the same predictions back, or is refused with the reason."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from posterior_fits import three_fitted
from simulation import THREE, TINY, batches, configuration

from hfdtl_bayes.errors import MissingInputError, PosteriorFileError
from hfdtl_bayes.features import FeatureSet, PriorRange, register_feature_set, registry
from hfdtl_bayes.model import LatencyPosterior
from hfdtl_bayes.statistics import input_hash

NEW = configuration("never seen", "B200", 2)
STEPS = batches(np.random.default_rng(1), 25)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    """Loading looks the feature set up by name; forgotten after each test."""
    register_feature_set(TINY)
    yield
    registry._SETS.pop((TINY.name, TINY.quantity), None)


def exchange(features: FeatureSet) -> None:
    register_feature_set(features, replace=True)


@pytest.fixture(scope="module")
def posterior() -> LatencyPosterior:
    return replace(three_fitted(), calibration_rows=np.array([3, 1, 4, 15]))


@pytest.fixture(scope="module")
def content(posterior: LatencyPosterior, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return posterior.save(tmp_path_factory.mktemp("saved") / "posterior.nc").read_bytes()


@pytest.fixture
def path(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "posterior.nc"
    path.write_bytes(content)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(PosteriorFileError, match=message) as caught:
        LatencyPosterior.load(path)
    assert str(path) in str(caught.value)


def test_what_is_loaded_is_what_was_saved(posterior: LatencyPosterior, path: Path) -> None:
    loaded = LatencyPosterior.load(path)
    for own in (*THREE, NEW):
        pd.testing.assert_frame_equal(loaded.predict(STEPS, own, seed=2), posterior.predict(STEPS, own, seed=2))
    for group in ("posterior", "sample_stats", "observed_data"):
        a, b = (p.tree[group].to_dataset() for p in (loaded, posterior))
        assert a.equals(b), group
        assert list(a.data_vars) == list(b.data_vars)
        assert {n: v.dims for n, v in a.data_vars.items()} == {n: v.dims for n, v in b.data_vars.items()}
    for name in ("config_ids", "donors", "target", "seed", "priors", "feature_set", "input_hash"):
        assert getattr(loaded, name) == getattr(posterior, name), name
    np.testing.assert_array_equal(loaded.calibration_rows, [3, 1, 4, 15])
    pd.testing.assert_frame_equal(loaded.coefficient_table(), posterior.coefficient_table())
    assert loaded.convergence() == posterior.convergence()


def test_saving_again_gives_the_same_posterior(path: Path, tmp_path: Path) -> None:
    again = LatencyPosterior.load(path).save(tmp_path / "deep" / "er" / "again.nc")
    one, two = (LatencyPosterior.load(p) for p in (path, again))
    assert one.tree["posterior"].to_dataset().identical(two.tree["posterior"].to_dataset())
    assert input_hash(one.statistics) == input_hash(two.statistics)


def test_the_file_says_what_it_is(posterior: LatencyPosterior, path: Path) -> None:
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        header = json.loads(tree.attrs["hfdtl_bayes"])
    assert header["donors"] == ["one", "two"]
    assert header["target"] == "three"
    assert header["rows"] == {"one": 12_000, "two": 12_000, "three": 12_000}
    assert header["features"]["prefill"]["unit"] == "token"
    assert header["features"]["prefill"]["reference"] == 2e-5
    assert header["priors"]["deviation"] == {"low": 0.15, "high": 0.7}
    assert (header["seed"], header["input_hash"]) == (5, posterior.input_hash)


def test_a_file_that_cannot_be_written_leaves_the_old_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("no space left on device")

    # The disk fills up at the last moment.
    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        three_fitted().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_file_may_be_read_by_whom_others_may(posterior: LatencyPosterior, tmp_path: Path) -> None:
    path = posterior.save(tmp_path / "posterior.nc")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_no_file_is_no_posterior(tmp_path: Path) -> None:
    for missing in (tmp_path / "none.nc", tmp_path):
        with pytest.raises(MissingInputError, match="no posterior at"):
            LatencyPosterior.load(missing)


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, content: bytes, kept: float) -> None:
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    refused(path, "cannot be read as a posterior|not a complete posterior")


@pytest.mark.parametrize("other", [b"step_id,step_time_s\n1,0.02\n", b"PAR1" + bytes(100), bytes(4096)])
def test_a_file_of_another_kind_is_refused(path: Path, other: bytes) -> None:
    path.write_bytes(other)
    refused(path, "cannot be read as a posterior")


def test_foreign_netcdf_is_refused(path: Path) -> None:
    xr.Dataset({"temperature": ("time", [1.0, 2.0])}).to_netcdf(path, engine="h5netcdf")
    refused(path, "not a posterior written by hfdtl_bayes")


@pytest.mark.parametrize("text", ["{", "null", "[1]", '"x"', "3"])
def test_a_damaged_header_is_refused(path: Path, text: str) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["hfdtl_bayes"] = text
    refused(path, "cannot be read as a posterior|not a complete posterior")


def rewrite_header(path: Path, **changes: object) -> None:
    with h5py.File(path, "r+") as file:
        header = json.loads(file.attrs["hfdtl_bayes"]) | changes
        file.attrs["hfdtl_bayes"] = json.dumps({k: v for k, v in header.items() if v is not ...})


def test_another_file_format_is_refused(path: Path) -> None:
    rewrite_header(path, format=99, package_version="9.9")
    refused(path, r"file format 99, written by version 9\.9; this version reads format 4")


@pytest.mark.parametrize(
    "name", ["features", "fingerprint", "priors", "configs", "input_hash", "seed", "target", "feature_set", "quantity"]
)
def test_a_header_with_a_hole_is_refused(path: Path, name: str) -> None:
    rewrite_header(path, **{name: ...})
    refused(path, f"not a complete posterior: .*{name}")


def test_bad_priors_are_refused(path: Path) -> None:
    rewrite_header(path, priors={"deviation": {"low": 2.0, "high": 1.0}})
    refused(path, "not a complete posterior: range")
    rewrite_header(path, priors={"surprise": 1.0})
    refused(path, "not a complete posterior: .*surprise")


@pytest.mark.parametrize("name", ["triangle", "count", "rows", "pilot", "floor_s", "config_row", "multiplier", "log_scale_sum"])
def test_altered_statistics_are_refused(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        values = file[f"statistics/two/{name}"]
        changed = np.array(values[()])
        changed[(0,) * changed.ndim] += 1 if changed.dtype.kind == "i" else 1e-9
        values[...] = changed
    refused(path, "the statistics do not match their hash; the file was altered")


@pytest.mark.parametrize(
    "gone",
    ["posterior", "sample_stats", "observed_data", "calibration", "statistics/two", "posterior/theta", "posterior/omega_spread"],
)
def test_a_missing_part_is_refused(path: Path, gone: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[gone]
    refused(path, f"not a complete posterior: .*{Path(gone).name}|cannot be read")


def test_configurations_in_another_order_are_refused(path: Path) -> None:
    """theta is by position: statistics in another order would give each configuration another's coefficients."""
    one, two, three = three_fitted().statistics
    rewrite_header(path, configs=["two", "one", "three"], input_hash=input_hash([two, one, three]))
    refused(path, "the draws have for config, in this order, one, two, three, not two, one, three")


CHANGED = {
    "another reference": {"reference": 3e-5},
    "another prior": {"prior": PriorRange(0.4, 2.1)},
    "another unit": {"unit": "kilotoken"},
    "another formula": {"formula": "prefill_tokens + 1"},
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_feature_that_changed_is_named(path: Path, change: str) -> None:
    prefill, *others = TINY.features
    exchange(replace(TINY, features=(replace(prefill, **CHANGED[change]), *others)))
    refused(path, r"where feature\(s\) prefill of 'tiny' were defined otherwise")


def test_a_constant_behind_the_same_text_is_noticed(path: Path) -> None:
    prefill, *others = TINY.features
    compute = prefill.compute
    same = replace(prefill, compute=lambda frame, c: compute(frame, c) * (1 + 1e-9))
    exchange(replace(TINY, features=(same, *others)))
    LatencyPosterior.load(path)
    exchange(replace(TINY, features=(replace(prefill, compute=lambda frame, c: compute(frame, c) * 1.001), *others)))
    refused(path, r"where feature\(s\) prefill of 'tiny' were defined otherwise")
    floor = TINY.noise_floor
    exchange(replace(TINY, noise_floor=lambda c: 2 * floor(c)))
    refused(path, "noise floor of 'tiny' were defined otherwise")


@pytest.mark.parametrize("fingerprint", [None, [], {}, {"prefill": "x"}, {"prefill": [1.0]}])
def test_a_damaged_fingerprint_is_refused(path: Path, fingerprint: object) -> None:
    rewrite_header(path, fingerprint=fingerprint)
    refused(path, "not a complete posterior|were defined otherwise")


def test_a_feature_more_or_less_is_named(path: Path) -> None:
    prefill, decode, inverse_tp, constant = TINY.features
    exchange(replace(TINY, features=(prefill, decode, constant)))
    refused(path, "inverse_tp")
    exchange(replace(TINY, features=(prefill, decode, inverse_tp, constant, replace(prefill, name="more"))))
    refused(path, r"feature\(s\) more")


def test_features_in_another_order_are_refused(path: Path) -> None:
    prefill, decode, inverse_tp, constant = TINY.features
    exchange(replace(TINY, features=(decode, prefill, inverse_tp, constant)))
    refused(path, "the draws have for .*, in this order, prefill, decode.*, not decode, prefill")


def test_draws_that_are_not_numbers_are_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["posterior/tau"][0, 0, 0] = np.nan
    refused(path, "draws of tau are not finite")


def test_a_set_that_nobody_registered_is_refused(path: Path) -> None:
    registry._SETS.pop((TINY.name, TINY.quantity))
    refused(path, "unknown feature set 'tiny'")
