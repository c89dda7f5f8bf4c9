"""Feature sets by name: the package's own, a user's, and names nobody registered."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import FeatureSet, feature_set, feature_set_names, register_feature_set, registry, response


@pytest.fixture
def mine() -> Iterator[FeatureSet]:
    """A user's feature set: the blackbox features under another name; forgotten after the test."""
    yield replace(feature_set("blis-blackbox"), name="mine")
    registry._SETS.pop(("mine", "step_time"), None)


def test_the_sets_that_the_documents_name_exist() -> None:
    # In a process of its own: other tests register sets.
    code = "from hfdtl_bayes.features import feature_set_names; print(*feature_set_names())"
    named = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(named) == {"roofline", "hfdtl", "hfdtl-interactions", "blis-physics", "blis-blackbox", "roofline-discrepancy"}
    for quantity in ("queue_delay", "api_delay"):
        assert set(feature_set_names(quantity)) == {"roofline", "hfdtl", "hfdtl-interactions"}
        assert feature_set("roofline", quantity).quantity == quantity


def test_the_default_comes_first() -> None:
    assert feature_set_names()[0] == "roofline"


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"rooflin'.*roofline, hfdtl"):
        feature_set("rooflin")
    with pytest.raises(UnknownNameError, match=r"known are step_time, queue_delay, api_delay"):
        feature_set("roofline", "speed")
    with pytest.raises(UnknownNameError, match="blis-physics"):
        feature_set("blis-physics", "queue_delay")


def test_a_user_s_set_is_found_by_name(mine: FeatureSet) -> None:
    assert register_feature_set(mine) is mine
    assert feature_set("mine") is mine
    assert "mine" in feature_set_names()
    register_feature_set(mine)


def test_a_name_is_taken_once_unless_replaced_on_purpose(mine: FeatureSet) -> None:
    register_feature_set(mine)
    again = replace(mine, description="second thoughts")
    with pytest.raises(InputError, match="replace=True"):
        register_feature_set(again)
    assert feature_set("mine") is mine
    register_feature_set(again, replace=True)
    assert feature_set("mine") is again


@pytest.mark.parametrize("force", [False, True])
def test_the_package_s_own_sets_cannot_be_replaced(force: bool) -> None:
    own = feature_set("roofline")
    with pytest.raises(InputError, match="stays as it is"):
        register_feature_set(replace(own, description="other"), replace=force)
    assert feature_set("roofline") is own


def test_an_unknown_quantity_is_refused(mine: FeatureSet) -> None:
    with pytest.raises(InputError, match="accepted quantities"):
        register_feature_set(replace(mine, quantity="speed"))


def test_a_set_needs_unique_names_and_a_constant(mine: FeatureSet) -> None:
    with pytest.raises(InputError, match="repeated: constant"):
        replace(mine, features=(*mine.features, mine["constant"]))
    with pytest.raises(InputError, match="'constant'"):
        replace(mine, features=mine.base)


def test_references_are_positive_constants() -> None:
    for name in feature_set_names():
        assert (feature_set(name).references > 0).all()
        assert np.isfinite(feature_set(name).references).all()


def test_the_response_is_the_difference_of_its_times() -> None:
    requests = pd.DataFrame({"arrival_s": [1.0, 2.0], "queued_s": [1.25, 1.9995], "scheduled_s": [1.75, 2.5]})
    np.testing.assert_allclose(response(requests, "queue_delay"), [0.5, 0.5005])
    # Half a millisecond backwards is one of clocks.
    np.testing.assert_allclose(response(requests, "api_delay"), [0.25, 0.0])
    np.testing.assert_allclose(response(pd.DataFrame({"step_time_s": [0.02]}), "step_time"), [0.02])
    with pytest.raises(InputError, match=r"api_delay needs the column\(s\) arrival_s; found queued_s, scheduled_s"):
        response(requests.drop(columns="arrival_s"), "api_delay")
