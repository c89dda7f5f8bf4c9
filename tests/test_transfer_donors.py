"""Donors promoted, forgotten, discounted and combined: each gives the posterior of a fresh fit, and bad input is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from agreement import Verdict, compare, judge, made, many
from numpy.typing import NDArray
from simulation import PRIORS, TINY, Simulated, configuration, pilot_of, tiny_features

from hfdtl_bayes.errors import InputError
from hfdtl_bayes.features import FeatureSet, PriorRange
from hfdtl_bayes.model import LatencyPosterior, PositiveRange, PriorSettings, SamplerSettings, fit
from hfdtl_bayes.model.conditional import ConditionalSettings
from hfdtl_bayes.model.forgetting import reweighted_without
from hfdtl_bayes.statistics import ConfigStatistics, statistics_from_rows
from hfdtl_bayes.transfer import calibrate_statistics, combine_donors, discounts_from, forget, promote
from hfdtl_bayes.transfer.donors import with_discounts_of_donors

SAMPLER = SamplerSettings(draws=300, tune=100, chains=8)
FEW = SamplerSettings(draws=100, tune=100, chains=2)
EVERY_DRAW = ConditionalSettings(first_draws=10**6)
QUIET = {"show_progress": False}


@cache
def data() -> Simulated:
    return made(8, many(4), 200)


def of(*indices: int) -> list[ConfigStatistics]:
    return [statistics()[i] for i in indices]


@cache
def statistics() -> tuple[ConfigStatistics, ...]:
    return data().statistics


@cache
def fitted(*indices: int, seed: int = 1, target: str | None = None, priors: PriorSettings = PRIORS) -> LatencyPosterior:
    return fit(of(*indices), TINY, priors, SAMPLER, target=target, seed=seed, **QUIET)


@cache
def reconfigured() -> LatencyPosterior:
    """Donors c0, c1, c2 conditioned on the target c3."""
    donors = fit(of(0, 1, 2), TINY, PRIORS, replace(SAMPLER, draws=1500), seed=2, **QUIET)
    return calibrate_statistics(donors, of(3)[0], engine="conditional", limits=EVERY_DRAW, seed=3)


def draws(posterior: LatencyPosterior) -> dict[str, NDArray[np.float64]]:
    return {str(n): v.to_numpy() for n, v in posterior.tree["posterior"].to_dataset().data_vars.items()}


def judged(*pairs: tuple[LatencyPosterior, LatencyPosterior]) -> Verdict:
    return judge([compare(str(i), draws(a), draws(b)) for i, (a, b) in enumerate(pairs)])


def agree(*pairs: tuple[LatencyPosterior, LatencyPosterior]) -> None:
    verdict = judged(*pairs)
    print(verdict)
    assert verdict.p > 1e-3, str(verdict)
    assert verdict.root_mean_square < 1.15, str(verdict)


# --- Promotion. ---


def test_promotion_keeps_draws_that_may_be_used_and_nothing_else_changes() -> None:
    target = replace(fitted(0, 1, 2, 3, target="c3"), calibration_rows=np.arange(200))
    promoted = promote(target, **QUIET)
    assert (promoted.donors, promoted.target, promoted.calibration_rows.size) == (("c0", "c1", "c2", "c3"), None, 0)
    assert promoted.input_hash == target.input_hash
    for name, values in draws(promoted).items():
        np.testing.assert_array_equal(values, draws(target)[name])
    assert promoted.convergence().note == "c3 promoted to donor, its posterior's draws kept"
    # The target's own file says nothing of it.
    assert (target.target, target.convergence().note) == ("c3", "")


def test_a_conditioned_target_promoted_is_the_fresh_fit_of_all_donors() -> None:
    promoted = promote(reconfigured(), **QUIET)
    assert promoted.engine == "conditional"
    assert "draws kept" in promoted.convergence().note
    agree((promoted, fitted(0, 1, 2, 3)))


def test_draws_not_to_be_relied_upon_are_not_promoted() -> None:
    promoted = promote(reconfigured(), limits=ConditionalSettings(min_effective=1e6), settings=SAMPLER, **QUIET)
    assert promoted.engine == "exact"
    note = promoted.convergence().note
    assert note.startswith("c3 promoted to donor and refitted, since only ")
    assert note.endswith("draws are effective, 1000000 needed")
    agree((promoted, fitted(0, 1, 2, 3, seed=9)))


def test_promotion_with_more_rows() -> None:
    some = data().frames[3].iloc[:100]
    own = data().configurations[3]
    less = statistics_from_rows(some, own, TINY, block_length=data().block, pilot=pilot_of(TINY, own))
    target = fit([*of(0, 1, 2), less], TINY, PRIORS, FEW, target="c3", **QUIET)
    promoted = promote(target, of(3)[0], settings=SAMPLER, seed=4, **QUIET)
    assert promoted.statistics[-1].rows == 200
    assert promoted.convergence().note == "c3 promoted to donor and refitted with 200 rows in place of 100"
    assert promoted.input_hash == fitted(0, 1, 2, 3).input_hash
    agree((promoted, fitted(0, 1, 2, 3)))
    with pytest.raises(InputError, match=r"hold 100 rows, fewer than the 200 that 'c3' was calibrated on.*merge them"):
        promote(fitted(0, 1, 2, 3, target="c3"), less)
    with pytest.raises(InputError, match="the statistics are of 'c2', the target is 'c3'"):
        promote(target, of(2)[0])
    moved = replace(of(3)[0], configuration=configuration("c3", "L40S"))
    with pytest.raises(InputError, match="of 'c3' with another configuration"):
        promote(target, moved)
    with pytest.raises(InputError, match="are of feature set 'other'"):
        promote(target, replace(of(3)[0], feature_set="other"))


@pytest.mark.slow
def test_a_target_calibrated_on_promoted_donors_is_the_joint_fit() -> None:
    """Conditioning twice, a promotion between: the draws are worth less each time, and say so."""
    start = fit(of(0, 1), TINY, PRIORS, replace(SAMPLER, draws=4000), seed=5, **QUIET)
    once = calibrate_statistics(start, of(2)[0], engine="conditional", limits=EVERY_DRAW, seed=6)
    promoted = promote(once, **QUIET)
    twice = calibrate_statistics(promoted, of(3)[0], engine="conditional", limits=EVERY_DRAW, seed=7)
    first, second = (p.convergence().reweighting for p in (once, twice))
    assert first is not None
    assert second is not None
    assert second.effective <= first.effective / first.draws * second.draws
    agree((twice, fitted(0, 1, 2, 3)))


def test_donors_without_a_target_are_not_promoted() -> None:
    with pytest.raises(InputError, match=r"holds donors alone \(c0, c1, c2\).*calibrate one first"):
        promote(fitted(0, 1, 2))


def test_a_donor_under_another_name_is_not_promoted() -> None:
    twin = replace(of(0)[0], configuration=of(0)[0].configuration.model_copy(update={"config_id": "again"}))
    target = fit([*of(0, 1), twin], TINY, PRIORS, FEW, target="again", **QUIET)
    with pytest.raises(InputError, match="'again' is the same rows as 'c0' of the donors under another name"):
        promote(target)
    other_rows = replace(twin, total_s=1.0)
    with pytest.raises(InputError, match="'again' is the same configuration as 'c0' of the donors under another name"):
        promote(replace(target, statistics=(*target.statistics[:2], other_rows)))


# --- Forgetting. ---


@pytest.mark.parametrize("gone", [0, 2])
def test_weights_make_the_fit_without_a_donor(gone: int) -> None:
    found = reweighted_without(fitted(0, 1, 2, 3), f"c{gone}", seed=3)
    assert found.reweighting.pareto_k < 0.7
    assert found.posterior.engine == "reweighted"
    kept = [i for i in range(4) if i != gone]
    assert found.posterior.config_ids == tuple(f"c{i}" for i in kept)
    agree((found.posterior, fitted(*kept)))


def test_weights_of_another_configuration_are_noticed() -> None:
    """The comparison would see draws that were not reweighted."""
    found = forget(fitted(0, 1, 2, 3), "c0", limits=ConditionalSettings(min_effective=100), **QUIET)
    assert judged((found, fitted(1, 2, 3))).p > 1e-3
    whole = fitted(0, 1, 2, 3)
    dataset = whole.tree["posterior"].to_dataset().isel(config=[1, 2, 3])
    names = ("beta", "gamma", "delta", "tau", "sigma_typical", "omega_typical")
    shared = {n: dataset[n].to_numpy() for n in names}
    assert judge([compare("", shared, {n: draws(fitted(1, 2, 3))[n] for n in names})]).p < 1e-3


def test_forgetting_refits_where_weights_degenerate_or_on_request() -> None:
    limits = ConditionalSettings(min_effective=1e6)
    found = forget(fitted(0, 1, 2, 3), "c1", limits=limits, settings=SAMPLER, seed=8, **QUIET)
    assert found.engine == "exact"
    assert found.convergence().note.startswith("donor c1 forgotten and the others refitted, since ")
    asked = forget(fitted(0, 1, 2, 3), "c1", refit=True, settings=SAMPLER, seed=8, **QUIET)
    assert asked.convergence().note == "donor c1 forgotten and the others refitted, since a refit was asked for"
    np.testing.assert_array_equal(draws(asked)["theta"], draws(found)["theta"])
    agree((found, fitted(0, 2, 3)))


@pytest.mark.slow
def test_forgetting_keeps_target_discounts_and_draws_that_can_be_calibrated_from() -> None:
    priors = PRIORS.with_discounts({"c0": 0.5, "c1": 0.4})
    whole = replace(fitted(0, 1, 2, 3, target="c3", priors=priors), calibration_rows=np.arange(200))
    left = forget(whole, "c0", limits=ConditionalSettings(min_effective=100), settings=SAMPLER, **QUIET)
    assert (left.donors, left.target, left.calibration_rows.size) == (("c1", "c2"), "c3", 200)
    assert left.priors.discounts == (("c1", 0.4),)
    # A donor that counts for little is forgotten at little cost.
    agree((left, fit(of(1, 2, 3), TINY, priors, SAMPLER, target="c3", seed=5, **QUIET)))
    donors = reweighted_without(fitted(0, 1, 2, 3), "c2", seed=3).posterior
    back = calibrate_statistics(donors, of(2)[0], seed=6, **QUIET)
    assert back.target == "c2"
    order = ("c0", "c1", "c3", "c2")
    assert back.config_ids == order
    agree((back, fit(of(0, 1, 3, 2), TINY, PRIORS, SAMPLER, seed=7, **QUIET)))


def test_forgetting_without_drift() -> None:
    priors = replace(PRIORS, drift=None)
    whole = fit(of(0, 1, 2, 3), TINY, priors, SAMPLER, **QUIET)
    found = reweighted_without(whole, "c0", seed=1)
    assert "omega" not in found.posterior.tree["posterior"]
    assert found.reweighting.pareto_k < 0.7
    agree((found.posterior, fit(of(1, 2, 3), TINY, priors, SAMPLER, seed=2, **QUIET)))


@pytest.mark.parametrize(
    ("posterior", "donor", "message"),
    [
        (lambda: fitted(0, 1, 2), "c9", r"'c9' is not fitted here, not a donor; donors are c0, c1, c2$"),
        (
            lambda: fitted(0, 1, 2, 3, target="c3"),
            "c3",
            "'c3' is the calibrated target, not a donor.*the file it was calibrated from",
        ),
        (lambda: fit(of(0), TINY, PRIORS, FEW, **QUIET), "c0", "'c0' is the only donor.*nothing is left to transfer from"),
        (lambda: fit(of(0, 1), TINY, PRIORS, FEW, target="c1", **QUIET), "c0", "'c0' is the only donor"),
    ],
    ids=["unknown", "target", "only donor", "only donor beside a target"],
)
def test_what_cannot_be_forgotten(posterior: Callable[[], LatencyPosterior], donor: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        forget(posterior(), donor)


def test_a_target_conditioned_on_discounted_donors_is_the_joint_fit() -> None:
    priors = PRIORS.with_discounts({"c0": 0.5, "c1": 0.2})
    donors = fit(of(0, 1, 2), TINY, priors, replace(SAMPLER, draws=1000), seed=2, **QUIET)
    found = calibrate_statistics(donors, of(3)[0], engine="conditional", limits=EVERY_DRAW, seed=3)
    assert found.priors.discounts == (("c0", 0.5), ("c1", 0.2))
    agree((found, fitted(0, 1, 2, 3, target="c3", priors=priors)))


# --- Combination. ---


def test_two_fits_combined_are_the_fit_of_all_donors() -> None:
    priors = PRIORS.with_discounts({"c2": 0.5})
    one, other = fitted(0, 1), fitted(2, 3, priors=priors)
    found = combine_donors(one, other, discounts={"c0": 0.8}, settings=SAMPLER, seed=4, **QUIET)
    assert found.priors.discounts == (("c0", 0.8), ("c2", 0.5))
    assert found.convergence().note == "donors of two fits combined: c0, c1 and c2, c3"
    agree((found, fit(of(0, 1, 2, 3), TINY, PRIORS.with_discounts({"c0": 0.8, "c2": 0.5}), SAMPLER, seed=5, **QUIET)))


def other_priors(features: FeatureSet = TINY, priors: PriorSettings = PRIORS) -> LatencyPosterior:
    return fit(of(2, 3), features, priors, FEW, **QUIET)


def renamed(posterior: LatencyPosterior, **change: object) -> LatencyPosterior:
    twin = replace(of(0)[0], configuration=of(0)[0].configuration.model_copy(update={"config_id": "again"}), **change)
    return replace(posterior, statistics=(posterior.statistics[0], twin))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: fitted(1, 2), r"donor\(s\) c1 are in both posteriors.*forget them in one of the two first"),
        (lambda: fitted(0, 1, 2, 3, target="c3"), "one of the posteriors holds the target 'c3'; promote it first"),
        (lambda: renamed(fitted(2, 3)), "'again' is the same rows as 'c0' of the other posterior under another name"),
        (lambda: renamed(fitted(2, 3), rows=7), "'again' is the same configuration as 'c0' of the other posterior under another name"),
        (
            lambda: replace(fitted(2, 3), feature_set=replace(TINY, name="mine")),
            "different features: tiny for step_time and mine for step_time",
        ),
        (
            lambda: replace(fitted(2, 3), feature_set=tiny_features(references=(1e-5, 1e-4, 2e-3, 5e-3))),
            "different reference of feature prefill: 2e-05 and 1e-05",
        ),
        (
            lambda: other_priors(TINY.with_priors({"decode": PriorRange(0.1, 3.0)})),
            "different prior of feature decode",
        ),
        (
            lambda: other_priors(priors=replace(PRIORS, noise=PositiveRange(0.01, 0.2))),
            'different priors: "90 % of the typical relative noise of one row lies between 0.02 and 0.3" and',
        ),
        (lambda: other_priors(priors=replace(PRIORS, drift=None)), "different priors: .*there is no drift"),
        (lambda: replace(fitted(2, 3), likelihood="student_t"), "the posterior of c2, c3 has student_t errors"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined(other: Callable[[], LatencyPosterior], message: str) -> None:
    with pytest.raises(InputError, match=message):
        combine_donors(fitted(0, 1), other())


# --- Discounts by rule. ---


def versions() -> list:
    found = zip(("a", "b", "c", "d"), ("0.9.2", "v0.19.1rc1", "0.20", "0.20.1"), strict=True)
    return [
        configuration(c).model_copy(update={"engine": configuration(c).engine.model_copy(update={"version": v})})
        for c, v in found
    ]


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ([], {}),
        (["a=0.5"], {"a": 0.5}),
        (["version<0.20=0.5"], {"a": 0.5, "b": 0.5}),
        (["version<0.20.0=0.5"], {"a": 0.5, "b": 0.5}),
        (["version<0.20=0.5", "version<0.10=0.2"], {"a": 0.2, "b": 0.5}),
        (["b=1", "version<0.20.1=0.3", "d=.1"], {"a": 0.3, "b": 1.0, "c": 0.3, "d": 0.1}),
    ],
)
def test_rules_of_discounts(rules: list[str], expected: dict[str, float]) -> None:
    assert discounts_from(rules, versions()) == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("a", "discount 'a' cannot be read; give DONOR=NUMBER or version<VERSION=NUMBER"),
        ("=0.5", "cannot be read"),
        ("a=half", "cannot be read"),
        ("a=0", r"discount 'a=0': the number must lie in \(0, 1\]"),
        ("a=1.5", r"must lie in \(0, 1\]"),
        ("a=nan", r"must lie in \(0, 1\]"),
        ("e=0.5", "'e' is not among the donors a, b, c, d"),
        ("version<0.5=0.5", r"no donor has an engine that old \(a 0.9.2, b v0.19.1rc1"),
        ("version<new=0.5", "the engine version 'new' cannot be compared"),
    ],
)
def test_rules_that_mean_nothing(rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        discounts_from([rule], versions())


def test_a_rule_twice_a_version_unknown_and_a_discount_of_nobody() -> None:
    with pytest.raises(InputError, match="discount of 'a' is given twice"):
        discounts_from(["a=0.5", "a=0.4"], versions())
    with pytest.raises(InputError, match="donor 'c0': the engine version 'unknown' cannot be compared"):
        discounts_from(["version<0.20=0.5"], [configuration("c0")])
    with pytest.raises(InputError, match="discount of 'c9', not among the donors c0, c1"):
        with_discounts_of_donors(PRIORS, {"c9": 0.5}, ["c0", "c1"])
