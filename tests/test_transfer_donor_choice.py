"""Choosing donors: the closed form against the exact density and dense matrices, what a donor is worth, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulation import PRIORS, TINY, Simulated, batches, configuration, dense, loading, simulate

from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_mapping
from hfdtl_bayes.configuration import gpu as facts
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import feature_set, operating_points
from hfdtl_bayes.model import ExactDensity, PriorSettings
from hfdtl_bayes.sample import DONORS, TARGET, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows, write_statistics
from hfdtl_bayes.traces import TraceStore, write_store
from hfdtl_bayes.transfer import DonorChoiceSettings, DonorRanking, rank_donors
from hfdtl_bayes.transfer.donor_information import DonorInformation, DonorScales, TargetTraffic
from hfdtl_bayes.transfer.donor_search import RankingProblem, best_subsets, exchanged

FIVE = (
    configuration("one", "H100", 1),
    configuration("two", "H100", 2),
    configuration("three", "L4", 1),
    configuration("four", "A100", 4),
    configuration("five", "L4", 4),
)
NEW = (configuration("known", "H100", 4), configuration("other", "B200", 2))
DATA = simulate(81, FIVE, rows=(60, 40, 80, 50, 30))
PRIOR = DonorChoiceSettings(scales="prior", checked=False)


def scales(seed: int, count: int = 2) -> DonorScales:
    rng = np.random.default_rng(seed)
    shape = (count, len(FIVE))
    return DonorScales(
        rng.uniform(0.02, 0.5, (count, 3)),
        rng.uniform(0.1, 0.9, count),
        rng.uniform(0.02, 0.2, shape),
        rng.uniform(0.0, 0.2, shape),
    )


def masks(*subsets: tuple[int, ...]) -> np.ndarray:
    chosen = np.zeros((len(subsets), len(FIVE)), dtype=bool)
    for row, subset in zip(chosen, subsets, strict=True):
        row[list(subset)] = True
    return chosen


def traffic_of(own: ServingConfiguration, rows: int = 20) -> TargetTraffic:
    design = TINY.design(batches(np.random.default_rng(5), rows), own)
    return TargetTraffic(own, design / (design @ np.array([1.0, 1.0, 1.5]))[:, None])


def problem_of(own: DonorScales, *, checked: bool = False) -> RankingProblem:
    information = DonorInformation(DATA.statistics, TINY, PRIORS, own)
    return RankingProblem(DATA.statistics, information, (traffic_of(NEW[0]),), tuple(traffic_of(c) for c in FIVE), checked)


# --- the closed form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", NEW, ids=lambda c: c.config_id)
def test_the_covariance_of_any_subset_is_that_of_a_density_of_these_donors(new: ServingConfiguration) -> None:
    own = scales(1)
    information = DonorInformation(DATA.statistics, TINY, PRIORS, own)
    subsets = [(0,), (2,), (0, 1), (1, 2, 3), (0, 1, 2, 3, 4)]
    means, found = information.predictive(masks(*subsets), new)
    for m, subset in enumerate(subsets):
        c = list(subset)
        density = ExactDensity([DATA.statistics[i] for i in c], TINY, PRIORS)
        x = density.join(own.tau, own.share, own.sigma[:, c], np.maximum(own.omega[:, c], 1e-12), [np.ones(2)] * 4)
        expected = density.predictive(x, new)
        np.testing.assert_allclose(means[:, m], expected[0], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(found[:, m], expected[1], rtol=1e-8, atol=1e-12)


def test_a_discounted_donor_says_as_much_as_in_the_density() -> None:
    priors, own = PRIORS.with_discounts({"two": 0.3}), scales(2)
    density = ExactDensity(DATA.statistics, TINY, priors)
    x = density.join(own.tau, own.share, own.sigma, own.omega, [np.ones(2)] * 4)
    found = DonorInformation(DATA.statistics, TINY, priors, own).covariance(masks((0, 1, 2, 3, 4)), NEW[0])
    np.testing.assert_allclose(found[:, 0], density.predictive(x, NEW[0])[1], rtol=1e-8)


def test_the_expected_error_is_that_of_dense_matrices() -> None:
    """From the joint normal of all coefficients and rows: sqrt(2 / pi) sd / mean, averaged over rows."""
    own = scales(3, 1)
    chosen = (0, 2, 4)
    part = Simulated(tuple(FIVE[c] for c in chosen), TINY, PRIORS, DATA.truth, tuple(DATA.frames[c] for c in chosen), DATA.block)
    at = {
        "tau": own.tau[0],
        "hardware_share": own.share[0],
        "sigma": own.sigma[0, list(chosen)],
        "omega": own.omega[0, list(chosen)],
    }
    _, covariance = dense(part, at).conditional()
    size = own.tau[0] * np.array([max(abs(f.prior.mean), f.prior.sd) for f in TINY.varying])
    # The latent vector begins with the four population coefficients and the effects of H100 and L4.
    pick = np.zeros((3, len(covariance)))
    pick[:, :4] = loading(TINY, NEW[0])
    pick[:, 4:7] = np.eye(3)
    of_new = pick @ covariance @ pick.T + np.diag((1 - own.share[0]) * size**2)
    target = traffic_of(NEW[0])
    sd = np.sqrt(np.einsum("ik,kl,il->i", target.rows, of_new, target.rows))
    information = DonorInformation(DATA.statistics, TINY, PRIORS, own)
    assert information.errors(masks(chosen), [target])[0, 0] == pytest.approx(np.sqrt(2 / np.pi) * sd.mean(), rel=1e-6)


@given(st.integers(0, 10**6), st.sets(st.integers(0, 4), min_size=1, max_size=4), st.integers(0, 4))
def test_a_donor_more_never_makes_the_variance_larger(seed: int, subset: set[int], more: int) -> None:
    information = DonorInformation(DATA.statistics, TINY, PRIORS, scales(seed))
    without, with_it = tuple(sorted(subset)), tuple(sorted(subset | {more}))
    for new in NEW:
        before, after = np.swapaxes(information.covariance(masks(without, with_it), new), 0, 1)
        smallest = np.linalg.eigvalsh(before - after)[:, 0]
        assert (smallest > -1e-9 * np.linalg.norm(before, axis=(1, 2))).all()
    targets = [traffic_of(n) for n in NEW]
    errors = information.errors(masks(without, with_it), targets)
    assert (errors[1] <= errors[0] * (1 + 1e-9)).all()
    assert (information.floor(targets) <= errors[1] * (1 + 1e-9)).all()


def test_coefficients_add_up_to_the_variance() -> None:
    information, target = DonorInformation(DATA.statistics, TINY, PRIORS, scales(4)), traffic_of(NEW[1])
    parts = information.by_coefficient(masks((0, 1), (2,)), target)
    covariance = information.covariance(masks((0, 1), (2,)), NEW[1])
    for m in range(2):
        expected = np.mean([np.mean([x @ c @ x for x in target.rows]) for c in covariance[:, m]])
        assert parts[m].sum() == pytest.approx(expected)


def test_errors_are_the_same_however_many_subsets_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [s for k in (1, 2, 3) for s in itertools.combinations(range(5), k)]
    information, targets = DonorInformation(DATA.statistics, TINY, PRIORS, scales(5)), [traffic_of(n) for n in NEW]
    at_once = information.errors(masks(*every), targets)
    monkeypatch.setattr("hfdtl_bayes.transfer.donor_information._AT_ONCE", 1)
    np.testing.assert_allclose(information.errors(masks(*every), targets), at_once, rtol=1e-12)


# --- the search --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_greedy_with_exchanges_finds_the_best_of_all(seed: int) -> None:
    problem = problem_of(scales(seed))
    for size in (2, 3):
        every, searched = best_subsets(problem, size, [], PRIOR)
        assert searched == f"all {len(list(itertools.combinations(range(5), size)))} subsets"
        found, searched = best_subsets(problem, size, [], replace(PRIOR, max_subsets=1))
        assert searched == "greedy with exchanges"
        assert found[0] == every[0]


def test_what_is_to_be_kept_is_kept() -> None:
    problem = problem_of(scales(1))
    for settings in (PRIOR, replace(PRIOR, max_subsets=1)):
        subsets, _ = best_subsets(problem, 3, [3], settings)
        assert all(3 in s and len(s) == 3 for s in subsets)
    assert exchanged(problem, 1, [3], [0, 1, 2, 4]) == [(3,)]


@pytest.mark.parametrize("checked", [False, True])
def test_candidates_outside_check_a_subset(checked: bool) -> None:
    """Observed over expected error, each by hand from the exact density of the subset, and one ratio of 1."""
    own = scales(6)
    problem = problem_of(own, checked=checked)
    subset, outside = (0, 3), (1, 2, 4)
    density = ExactDensity([DATA.statistics[i] for i in subset], TINY, PRIORS)
    chosen = list(subset)
    x = density.join(own.tau, own.share, own.sigma[:, chosen], np.maximum(own.omega[:, chosen], 1e-12), [np.ones(2)] * 4)
    logs = []
    for c in outside:
        rows = problem.witnesses[c].rows
        mean, covariance = density.predictive(x, FIVE[c])
        fitted = ExactDensity([DATA.statistics[c]], TINY, PRIORS).info.reference[0]
        observed = np.mean([np.abs(rows @ (m - fitted)).mean() for m in mean])
        sd = [np.sqrt(np.einsum("ik,kl,il->i", rows, v, rows)).mean() for v in covariance]
        logs.append(np.log(observed / (np.sqrt(2 / np.pi) * np.mean(sd))))
    found = problem.ratios([subset, (0, 1, 2, 3, 4)])
    assert found == pytest.approx([np.exp(sum(logs) / 4) if checked else 1.0, 1.0])
    assert problem.scores([subset])[0] == pytest.approx(problem.errors([subset]).mean() * found[0])


# --- on stores ---------------------------------------------------------------------------------------------------------------


def kind(config_id: str, *, experts: int = 0, gpu: str = "h100_sxm", tp: int = 1) -> ServingConfiguration:
    """A model of a few billion parameters, dense or with experts, on a real GPU."""
    llm = {
        "name": f"toy-{experts}", "num_layers": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 32000, "max_context_tokens": 32768,
    }  # fmt: skip
    if experts:
        llm |= {"num_experts": experts, "num_experts_per_token": 2}
    engine = {
        "tensor_parallel": tp, "max_num_seqs": 128, "max_num_batched_tokens": 4096, "kv_capacity_tokens": 200_000,
    }  # fmt: skip
    hardware = facts(gpu).model_dump()
    return configuration_from_mapping({"config_id": config_id, "llm": llm, "hardware": hardware, "engine": engine})


CANDIDATES = (
    kind("dense-1"), kind("dense-2", tp=2), kind("dense-4", tp=4), kind("dense-old", gpu="a100_sxm"), kind("experts", experts=8, tp=2),
)  # fmt: skip
MOE_TARGET, DENSE_TARGET = kind("wanted-experts", experts=16, tp=2), kind("wanted-dense", tp=8)


def traces(own: ServingConfiguration, seed: int) -> pd.DataFrame:
    """Rows of the prior's mean with some noise."""
    rng, features = np.random.default_rng([82, seed]), feature_set("roofline", "step_time")
    frame = operating_points(own)
    frame = frame.iloc[rng.integers(0, len(frame), 400)].assign(step_id=np.arange(400), regime="mixed")
    mean = features.design(frame, own) @ np.array([f.prior.mean for f in features.varying])
    return frame.assign(step_time_s=mean * np.exp(rng.normal(0, 0.05, 400)))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> TraceStore:
    path = tmp_path_factory.mktemp("donors")
    for i, own in enumerate(CANDIDATES):
        write_store(path, own, traces(own, i))
    return TraceStore(path)


IDS = [c.config_id for c in CANDIDATES]


def ranked(store: TraceStore, *targets: ServingConfiguration | str, **how) -> DonorRanking:
    how = {"settings": PRIOR, "show_progress": False, "sizes": (2, 3)} | how
    return rank_donors(store, how.pop("candidates", IDS), targets, **how)


def test_a_donor_with_experts_is_in_every_good_subset_for_a_target_with_experts(store: TraceStore) -> None:
    found = ranked(store, MOE_TARGET, sizes=(1, 2, 3))
    first = found.table[found.table["rank"] == 1].set_index("size")["donors"]
    assert first[1] == "experts"
    assert all("experts" in donors.split(",") for donors in first)
    pairs = found.table[found.table["size"] == 2]
    with_experts = pairs["donors"].str.contains("experts")
    assert pairs.loc[with_experts, "expected_error"].max() < pairs.loc[~with_experts, "expected_error"].min()
    assert found.floor < found.table["model_error"].min()
    assert (found.table["ratio"] == 1).all()
    (said,) = (r for r in found.reasons if r.startswith("experts:"))
    assert "the only one with experts, as 1 of the 1 target(s)" in said
    top = found.contributions.query("donor == 'experts'").sort_values("share")["coefficient"].iloc[-1]
    assert "expert" in top


def test_what_a_donor_says_of_experts_is_worth_nothing_to_a_dense_target(store: TraceStore) -> None:
    found = ranked(store, DENSE_TARGET)
    experts = found.contributions["coefficient"].str.contains("expert")
    assert experts.sum() >= 3
    assert found.contributions.loc[experts, "share"].abs().max() < 1e-9
    assert found.contributions.groupby("donor")["share"].sum().to_numpy() == pytest.approx(1.0)
    assert found.candidates == tuple(IDS)
    assert found.targets == ("wanted-dense",)


def test_a_donor_not_yet_traced_is_judged_by_its_configuration(store: TraceStore) -> None:
    dense_only = [i for i in IDS if i != "experts"]
    imagined = kind("not-yet", experts=8, tp=2)
    found = ranked(
        store, MOE_TARGET, candidates=dense_only, hypothetical=[imagined, kind("not-yet-dense", gpu="l40s")], sizes=(2,)
    )
    first = found.additional.iloc[0]
    assert (first["donor"], bool(first["traced"])) == ("not-yet", False)
    assert first["gain"] > 5 * found.additional["gain"].iloc[1]
    assert any("not-yet, not yet traced, would inform most" in r for r in found.reasons)
    # Once traced over the same batches, it is worth what was foretold.
    traced = ranked(store, MOE_TARGET, keep=found.best, sizes=(2,))
    gain = traced.additional.set_index("donor").loc["experts", "gain"]
    assert gain == pytest.approx(first["gain"], rel=0.05)


def test_traffic_decides_what_a_donor_is_worth(store: TraceStore) -> None:
    """Where a target only decodes one request, tensor parallelism matters as it does not for long prefills."""
    points = operating_points(DENSE_TARGET)
    by_traffic = {}
    for regime in ("decode", "prefill"):
        own = {"wanted-dense": points[points["regime"] == regime]}
        by_traffic[regime] = ranked(store, DENSE_TARGET, traffic=own).table.set_index("donors")["expected_error"]
    assert not np.allclose(
        by_traffic["decode"].sort_index(), by_traffic["prefill"].reindex(by_traffic["decode"].sort_index().index)
    )
    with pytest.raises(InputError, match="the traffic of target 'wanted-dense' has no rows"):
        ranked(store, DENSE_TARGET, traffic={"wanted-dense": points.iloc[:0]})


def test_a_donor_that_misleads_is_found_out_by_the_others(tmp_path: Path) -> None:
    """One candidate three times as slow as its kind informs as well as any; only a check on the rest can tell."""
    many = (
        *CANDIDATES[:3],
        kind("h200-1", gpu="h200_sxm"),
        kind("h200-2", gpu="h200_sxm", tp=2),
        kind("l40s-1", gpu="l40s"),
        kind("l40s-2", gpu="l40s", tp=2),
    )
    for i, own in enumerate(many):
        frame = traces(own, i)
        write_store(tmp_path, own, frame.assign(step_time_s=(3.0 if own.config_id == "dense-4" else 1.0) * frame["step_time_s"]))
    spoilt, ids = TraceStore(tmp_path), [c.config_id for c in many]
    trusting = ranked(spoilt, DENSE_TARGET, candidates=ids, sizes=(2,))
    assert "dense-4" in trusting.best
    found = ranked(spoilt, DENSE_TARGET, candidates=ids, sizes=(2,), settings=DonorChoiceSettings(scales="prior", kept=21))
    assert "dense-4" not in found.best
    table = found.table.set_index("donors")
    assert table["expected_error"].to_numpy() == pytest.approx(table["model_error"] * table["ratio"])
    with_it = table.index.str.contains("dense-4")
    assert table.loc[with_it, "ratio"].min() > table.loc[~with_it, "ratio"].max()
    assert any("for what candidates outside showed" in r for r in found.reasons)


def test_statistics_stand_in_for_traces(store: TraceStore, tmp_path: Path) -> None:
    features = feature_set("roofline", "step_time")
    for own in CANDIDATES[:3]:
        frame = store.steps(own.config_id).frame
        write_store(tmp_path, own, frame)
        if own.config_id == "dense-2":
            folder = tmp_path / own.config_id
            write_statistics(folder / "statistics.nc", statistics_from_rows(frame, own, features), features)
            (folder / "steps.parquet").unlink()
    found = ranked(TraceStore(tmp_path), DENSE_TARGET, candidates=IDS[:3], sizes=(2,))
    pd.testing.assert_frame_equal(found.table, ranked(store, DENSE_TARGET, candidates=IDS[:3], sizes=(2,)).table)


def test_refits_on_the_embedded_sample_tell_expected_and_actual_error() -> None:
    settings = DonorChoiceSettings(judged_rows=300)
    found = rank_donors(
        TraceStore(sample_store_path()), DONORS, [TARGET], sizes=(2, 3), refit=1, settings=settings, show_progress=False
    )
    assert len(found.table) == 4
    first = found.table.loc[found.table["expected_error"].idxmin()]
    assert first["donors"] == ",".join(found.best)
    assert found.table.set_index("size").loc[3, "ratio"] == 1
    assert 0 < first["refit_error"] < 1
    assert 0 < first["actual_mape"] < 1
    assert found.table["refit_error"].notna().sum() == 1
    assert any("measured on the targets' traces" in r for r in found.reasons)


# --- what is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"candidates": ["dense-1"]}, "needs two candidates at least, found dense-1"),
        ({"candidates": []}, "needs two candidates at least, found none"),
        ({"candidates": ["dense-1", "dense-1"]}, r"candidate\(s\) listed twice: dense-1"),
        ({"keep": ["nobody"]}, "to keep are not among the candidates: nobody"),
        ({"sizes": ()}, "sizes of subsets must be from 1, found none"),
        ({"sizes": (0, 2)}, "sizes of subsets must be from 1, found 0, 2"),
        ({"sizes": (9,)}, "no subset of size 9 can be made of 5 candidates"),
        ({"features": feature_set("hfdtl", "queue_delay")}, "donors are chosen for step_time"),
    ],
)
def test_what_cannot_be_ranked_is_refused(store: TraceStore, how: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ranked(store, DENSE_TARGET, **how)


def test_targets_that_are_candidates_absent_or_repeated_are_refused(store: TraceStore) -> None:
    with pytest.raises(InputError, match="no target given"):
        ranked(store)
    with pytest.raises(InputError, match=r"target\(s\) listed twice: wanted-dense"):
        ranked(store, DENSE_TARGET, DENSE_TARGET)
    with pytest.raises(InputError, match="target 'dense-1' is the candidate 'dense-1'; leave it out"):
        ranked(store, "dense-1")
    with pytest.raises(InputError, match="target 'alias' is the candidate 'dense-2' under another name"):
        ranked(store, kind("alias", tp=2))
    with pytest.raises(InputError, match="hypothetical donor 'alias' is the candidate 'dense-2' under another name"):
        ranked(store, DENSE_TARGET, hypothetical=[kind("alias", tp=2)])
    with pytest.raises(UnknownNameError, match="'nobody' is not in the trace store"):
        ranked(store, "nobody")
    with pytest.raises(UnknownNameError, match="'nobody' is not in the trace store"):
        ranked(store, DENSE_TARGET, candidates=["dense-1", "nobody"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"scales": "guess"}, "scales must be"), ({"scale_draws": 0}, "scale_draws must"), ({"kept": 0}, "kept must")],
)
def test_settings_that_mean_nothing_are_refused(wrong: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        DonorChoiceSettings(**wrong)


def test_priors_without_drift_rank_too(store: TraceStore) -> None:
    assert len(ranked(store, DENSE_TARGET, priors=PriorSettings(drift=None)).table) == 20
