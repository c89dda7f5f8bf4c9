"""`discover`: evidence and held-out scores against dense algebra, planted terms found, nothing named where nothing is, bad input."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
from scipy.special import gammaln
from scipy.stats import multivariate_normal
from simulation import PRIORS, THREE, TINY, batches, error_covariance, group_sd_prior, pilot_of, simulate

import hfdtl_bayes as hb
from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.features import Feature, Level, PriorRange, candidate, feature_set
from hfdtl_bayes.features.candidates import as_candidate
from hfdtl_bayes.model import ExactDensity
from hfdtl_bayes.model.scale_coordinates import scale_coordinates
from hfdtl_bayes.sample import DONORS, sample_store_path
from hfdtl_bayes.statistics import statistics_from_rows
from hfdtl_bayes.transfer import DiscoverySettings, term_validation
from hfdtl_bayes.transfer.discovery import discover, usable_candidates
from hfdtl_bayes.transfer.term_evidence import Problem, Traces, chosen_statistics, fit_model, model, overlap, screen
from hfdtl_bayes.transfer.term_search import search
from hfdtl_bayes.transfer.term_validation import Gain, held_out_gains, together

STORE = sample_store_path()


def benchmark() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "discover.py"
    spec = importlib.util.spec_from_file_location("benchmark_discover", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


simulation = benchmark()


def residual(name: str, column: str, reference: float) -> Feature:
    return Feature(name, Level.RESIDUAL, "token", column, lambda f, _c: f[column].to_numpy(float), PriorRange(-1.0, 1.0), (column,),
                   reference)  # fmt: skip


WIGGLE = residual("wiggle", "wiggle", 2e-3)
PRODUCT = Feature("product", Level.RESIDUAL, "token^2", "prefill_tokens * decode_tokens",
                  lambda f, _c: (f["prefill_tokens"] * f["decode_tokens"]).to_numpy(float), PriorRange(-1.0, 1.0),
                  ("prefill_tokens", "decode_tokens"), 1e-6)  # fmt: skip
TWIN = replace(PRODUCT, name="twin", reference=2e-6)


def tiny(seed: int, planted: float = 0.0, rows: int = 300) -> list[tuple[pd.DataFrame, hb.ServingConfiguration]]:
    """Three simulated configurations; `planted` times the reference of PRODUCT added to every step."""
    data = simulate(seed, THREE, TINY, PRIORS, rows=rows, block=20)
    found = []
    for frame, own in zip(data.frames, data.configurations, strict=True):
        wiggle = np.random.default_rng(seed).standard_normal(len(frame))
        term = planted * PRODUCT.reference * PRODUCT.compute(frame, own)
        found.append((frame.assign(wiggle=wiggle, step_time_s=np.maximum(frame["step_time_s"] + term, 1e-4)), own))
    return found


def problem_of(recordings, features=TINY, candidates=(WIGGLE, PRODUCT, TWIN)) -> Problem:
    own = [as_candidate(c) for c in candidates]
    columns = [*features.features, *candidates]
    return Problem.of(features, own, [Traces.of(f, c, columns, 20) for f, c in recordings], PRIORS)


# Evidence


def test_choosing_columns_gives_the_statistics_of_the_subset():
    problem = problem_of(tiny(1))
    full = problem.statistics()
    for count in range(3):
        for terms in itertools.combinations(("wiggle", "product", "twin"), count):
            features = problem.extended(terms)
            for trace, own in zip(problem.traces, full, strict=True):
                chosen = chosen_statistics(own, features)
                direct = statistics_from_rows(trace.frame, trace.configuration, features, block_length=20, scaling=chosen.scaling)
                assert chosen.log_scale_sum == pytest.approx(direct.log_scale_sum)
                np.testing.assert_array_equal(chosen.config_row, direct.config_row)
                for a, b in zip(chosen.strata, direct.strata, strict=True):
                    assert (a.multiplier, a.count) == (b.multiplier, b.count)
                    gram = b.triangle.T @ b.triangle
                    np.testing.assert_allclose(a.triangle.T @ a.triangle, gram, rtol=1e-9, atol=1e-12 * np.abs(gram).max())


def test_evidence_by_laplace_is_that_of_importance_sampling():
    problem = problem_of(tiny(6, planted=0.1))
    full = problem.statistics()
    found = []
    for terms in ((), ("product",)):
        features = problem.extended(terms)
        statistics = [chosen_statistics(s, features) for s in full]
        laplace = fit_model(statistics, features, PRIORS, terms).log_evidence
        coordinates = scale_coordinates(ExactDensity(statistics, features, PRIORS))
        rng = np.random.default_rng(0)
        # Wider than the posterior, so that weights are bounded.
        q = 1.15 * rng.standard_normal((20_000, coordinates.size))
        log_q = -0.5 * (q / 1.15) ** 2 - np.log(1.15) - 0.5 * np.log(2 * np.pi)
        logs = coordinates.log_density(q)[0] + np.linalg.slogdet(coordinates.factor)[1] - log_q.sum(axis=1)
        k = len(features.coef_names)
        # What the engine leaves out of the prior of each group sd.
        shape, rate = group_sd_prior(PRIORS.deviation)
        sampled = np.logaddexp.reduce(logs) - np.log(len(q)) + k * (shape * np.log(rate) - gammaln(shape))
        found.append((laplace, sampled))
    (laplace_without, without), (laplace_with, with_) = found
    assert laplace_with - laplace_without == pytest.approx(with_ - without, abs=0.3)
    # Larger than the error of either by far.
    assert with_ - without > 5


def test_screening_understates_and_ranks():
    problem = problem_of(tiny(6, planted=0.1))
    full = problem.statistics()
    base = model(problem, full, ())
    names = ("wiggle", "product", "twin")
    quick = screen(problem, full, base, names)
    refined = np.array([model(problem, full, (n,)).log_evidence - base.log_evidence for n in names])
    assert np.argmax(refined) in (1, 2)
    assert quick[0] < 0 < min(quick[1:])
    np.testing.assert_allclose(quick, refined, atol=3)
    assert (quick[1:] <= refined[1:] + 0.5).all()


def test_columns_that_are_one_are_told():
    problem = problem_of(tiny(1), candidates=(WIGGLE, PRODUCT, TWIN, replace(WIGGLE, name="same", compute=lambda f, _c:
                                                                           3.0 * f["prefill_tokens"].to_numpy(float))))  # fmt: skip
    full = problem.statistics()
    found = overlap(full, model(problem, full, ()), [c.name for c in problem.candidates])
    assert found.left[3] < 1e-12 < 0.5 < found.left[0]
    assert found.correlation[1, 2] == pytest.approx(1)
    assert abs(found.correlation[0, 1]) < 0.2
    # Against a fit of all rows in plain least squares, each block's drift as a column of its own where it is large.
    assert found.information[1] == pytest.approx(4 * found.information[2] / 16)


# Held-out scores


def test_scores_of_blocks_are_those_of_the_dense_normal():
    rng = np.random.default_rng(5)
    blocks = np.repeat(np.arange(4), [20, 7, 1, 12])
    n, k = len(blocks), 3
    design, mean = rng.standard_normal((n, k)), rng.standard_normal(k)
    root = rng.standard_normal((k, k))
    covariance = root @ root.T + 0.1 * np.eye(k)
    scale, observed = rng.uniform(0.5, 2, n), rng.standard_normal(n)
    scores = term_validation._block_scores(design, observed, scale, blocks, (mean, covariance), (0.3, 0.7))
    for b in range(4):
        own = blocks == b
        errors = np.outer(scale[own], scale[own]) * error_covariance(blocks[own], 0.3, 0.7)
        dense = multivariate_normal(design[own] @ mean, design[own] @ covariance @ design[own].T + errors)
        assert scores[b] == pytest.approx(dense.logpdf(observed[own]), rel=1e-9)


def test_coefficients_given_calibration_rows_are_those_of_the_dense_normal():
    ((frame, own), *_) = tiny(2, rows=60)
    own_statistics = statistics_from_rows(frame, own, TINY, block_length=20, pilot=pilot_of(TINY, own))
    k = len(TINY.coef_names)
    mean, covariance = np.array([1.0, 1.1, 0.9]), np.diag([0.1, 0.2, 0.3]) + 0.02
    calibrated = term_validation._Calibrated.of(own_statistics, mean, covariance)
    scale = np.maximum(TINY.design(frame, own) @ pilot_of(TINY, own), 1e-3)
    rows, z = TINY.design(frame, own) / scale[:, None], frame["step_time_s"].to_numpy() / scale
    blocks = frame["step_id"].to_numpy() // 20
    found = []
    for sigma, omega in ((0.1, 0.2), (0.3, 0.01)):
        errors = error_covariance(blocks, sigma, omega)
        precision = np.linalg.inv(covariance) + rows.T @ np.linalg.solve(errors, rows)
        expected = mean + np.linalg.solve(precision, rows.T @ np.linalg.solve(errors, z - rows @ mean))
        got_mean, got_covariance = calibrated.coefficients(sigma, omega)
        np.testing.assert_allclose(got_mean, expected, rtol=1e-8)
        np.testing.assert_allclose(got_covariance, np.linalg.inv(precision), rtol=1e-7)
        dense = multivariate_normal(rows @ mean, rows @ covariance @ rows.T + errors).logpdf(z)
        found.append((float(calibrated.solved(np.array([sigma]), np.array([omega]))[0][0]), dense))
    assert len(mean) == k
    assert found[0][0] - found[1][0] == pytest.approx(found[0][1] - found[1][1], rel=1e-8)


def test_a_term_that_is_there_helps_where_it_was_not_fitted_and_noise_does_not():
    problem = problem_of(tiny(7, planted=0.4))
    full = problem.statistics()
    there = together(list(held_out_gains(problem, full, (), ("product",), 100).values()))
    noise = together(list(held_out_gains(problem, full, (), ("wiggle",), 100).values()))
    assert there.improves(2.0)
    assert there.mape < there.mape_before
    assert not noise.improves(2.0)


def test_a_gain_is_one_that_beats_its_error_without_harm_to_the_other_score():
    def gain(nats: float, points: float) -> Gain:
        return Gain(100, nats, 1.0, 0.10, 0.10 - points / 100, 0.01)

    assert gain(1.5, 0.0).improves(1.0)
    assert gain(0.0, 1.5).improves(1.0)
    assert not gain(0.5, 0.5).improves(1.0)
    assert not gain(9.0, -2.5).improves(1.0)
    assert not gain(-2.5, 9.0).improves(1.0)
    added = together([gain(3.0, 1.0), gain(-1.0, 3.0)])
    assert (added.rows, added.nats, added.points) == (200, 2.0, pytest.approx(2.0))
    assert added.nats_se == pytest.approx(np.sqrt(2))
    assert added.points_se == pytest.approx(np.sqrt(2) / 2)


# The whole procedure on simulated steps


def test_a_planted_term_and_its_twin_are_named_as_one_of_these():
    found = discover(tiny(7, planted=0.4), None, TINY, candidates=[WIGGLE, PRODUCT, TWIN], priors=PRIORS)
    (term,) = found.terms
    assert {n for n, _ in term.one_of} == {"product", "twin"}
    assert term.name in {"product", "twin"}
    assert sum(p for _, p in term.one_of) > 0.95
    assert found.feature_set.name == f"tiny+{term.name}"
    assert found.feature_set.coef_names == (*TINY.coef_names, term.name)
    planted = 0.4 * PRODUCT.reference
    assert abs(term.mean - planted) < 3 * term.sd + 0.1 * planted
    assert found.explained > 0.8
    assert any("the rows cannot tell them apart" in s for s in found.sentences())
    # The extended set is one to fit.
    data = tiny(7, planted=0.4)
    statistics = [statistics_from_rows(f, c, found.feature_set) for f, c in data]
    assert statistics[0].coef_names[-1] == term.name


def test_nothing_is_named_where_nothing_is_missing():
    named = [discover(tiny(s), None, TINY, candidates=[WIGGLE, PRODUCT, TWIN], priors=PRIORS).terms for s in range(12)]
    # Each of 12 looks names something with probability below 1 / 20: two do so in 2 % of runs.
    assert sum(bool(n) for n in named) <= 1


def test_a_candidate_of_the_package_is_found_in_steps_simulated_on_real_batches():
    on = simulation.scene(str(STORE), DONORS[:1], "roofline")
    for seed, planted in enumerate(("has_prefill", "prefill_decode")):
        found = search(simulation.simulated(on, planted, 0.08, np.random.default_rng(seed)), DiscoverySettings())
        assert planted in {n for f in found.terms for n, _ in f.one_of}


@pytest.mark.slow
def test_rates_on_gpu_steps(shared_data: Path):
    results = simulation.run([shared_data / "gpu_steps"], ["gpu", "gpu target"], "roofline", 20, 2, DiscoverySettings())
    planted = results["planted"] != ""
    assert planted.sum() == 40
    # At rates of 95 % and 5 % fewer than 36 of 40, or more than 4, would be seen in one run of a hundred (binomial).
    assert results.loc[planted, "found"].sum() >= 35
    assert (results.loc[~planted, "named"] > 0).sum() <= 5


def test_hfdtl_lacks_what_roofline_has(shared_data: Path):
    store = hb.TraceStore(shared_data / "gpu_steps")
    found = hb.discover(store, ["llama3-8b_h100-sxm_tp1_vllm0.24.0"], "hfdtl")
    assert {t.name for t in found.terms} == {"kv_read", "prefill_attention", "gemm_excess"}
    for t in found.terms:
        assert t.gain.improves(2.0)
        assert t.sizes["llama3-8b_h100-sxm_tp1_vllm0.24.0"].mean == pytest.approx(1.3, abs=0.5)
    assert found.gain.points > 1.5
    by_name = {t.name: t for t in found.terms}
    assert by_name["kv_read"].blis == "b2b"
    assert "BLIS's basis has no such term" in by_name["gemm_excess"].consequence()
    assert found.blis_error < 0.05
    assert "weight_read" in found.not_tested


# Bad input


def test_names_nobody_knows():
    with pytest.raises(UnknownNameError, match=r"unknown candidate 'kv_raed'"):
        discover(tiny(1), None, TINY, candidates=["kv_raed"])
    with pytest.raises(InputError, match=r"no rows of four are given; there are one, two, three"):
        discover(tiny(1), ["one", "four"], TINY)
    with pytest.raises(UnknownNameError):
        discover(hb.TraceStore(STORE), ["nobody"])
    with pytest.raises(InputError, match=r"named twice: c11_moe_base"):
        discover(hb.TraceStore(STORE), [DONORS[1], DONORS[1]])
    with pytest.raises(InputError, match=r"given twice: one"):
        discover([tiny(1)[0], tiny(1)[0]], None, TINY)
    with pytest.raises(InputError, match=r"no configuration to look at"):
        discover(hb.TraceStore(STORE), [])
    with pytest.raises(InputError, match=r"given twice: wiggle"):
        discover(tiny(1), None, TINY, candidates=[WIGGLE, WIGGLE])
    with pytest.raises(InputError, match=r"no candidate to test"):
        discover(tiny(1), None, TINY, candidates=[])
    with pytest.raises(InputError, match=r"kv_usage_squared explain another quantity than step_time"):
        discover(tiny(1), None, TINY, candidates=[candidate("kv_usage_squared", "queue_delay")])


def test_a_candidate_without_its_columns_is_skipped_visibly_and_refused_if_asked_for():
    with pytest.raises(InputError, match=r"'waiting' needs the column\(s\) waiting_requests.*'one'.*do not ask"):
        discover(tiny(1), None, TINY, candidates=["waiting"])
    usable, reasons = usable_candidates([candidate("waiting"), as_candidate(WIGGLE)], TINY, tiny(1))
    assert [c.name for c in usable] == ["wiggle"]
    assert "needs the column(s) waiting_requests" in reasons["waiting"]


def test_candidates_that_tell_nothing_are_left_out_with_the_reason():
    nil = replace(WIGGLE, name="nil", compute=lambda f, _c: np.zeros(len(f)))
    copy = replace(WIGGLE, name="copy", compute=lambda f, _c: 2.0 * f["decode_tokens"].to_numpy(float))
    config = Feature("tp", Level.CONFIG, "1", "tp", lambda _f, c: float(c.engine.tensor_parallel), PriorRange(-1.0, 1.0))
    own = replace(WIGGLE, name="decode")
    found = discover(tiny(1)[:2], None, TINY, candidates=[WIGGLE, nil, copy, config, own], priors=PRIORS)
    assert found.tested == ("wiggle",)
    assert "zero in every row" in found.not_tested["nil"]
    assert "condition index" in found.not_tested["copy"]
    assert "2 configuration(s) cannot tell" in found.not_tested["tp"]
    assert "a feature of tiny already" in found.not_tested["decode"]
    said = " ".join(found.sentences())
    assert all(n in said for n in ("nil", "copy", "tp", "decode"))


def test_a_candidate_that_is_not_finite_is_named():
    broken = replace(WIGGLE, name="broken", compute=lambda f, _c: np.full(len(f), np.nan))
    with pytest.raises(InputError, match=r"'broken' is not finite in 300 row\(s\) of 'one'"):
        discover(tiny(1), None, TINY, candidates=[broken])


def test_too_few_rows():
    with pytest.raises(InputError, match=r"has 2 usable row\(s\) for the 3 coefficients"):
        discover([(f[:2], c) for f, c in tiny(1)], None, TINY, candidates=[WIGGLE])
    with pytest.raises(InputError, match=r"'one' has 100 usable rows in 5 time blocks, too few"):
        discover([(f[:100], c) for f, c in tiny(1)[:1]], None, TINY, candidates=[WIGGLE])


def test_one_configuration_is_judged_on_its_own_time_blocks():
    found = discover(tiny(11, planted=0.4, rows=600)[:1], None, TINY, candidates=[WIGGLE, PRODUCT], priors=PRIORS)
    assert [t.name for t in found.terms] == ["product"]
    assert set(found.terms[0].gains) == {"one"}
    assert found.terms[0].gain.rows == 600


@pytest.mark.parametrize(
    ("field", "value"), [("max_terms", 0), ("bayes_factor", 0.5), ("set_probability", 1.5), ("improvement", -1), ("same", 2.0)]
)
def test_thresholds_that_mean_nothing(field: str, value: float):
    with pytest.raises(InputError, match=field):
        DiscoverySettings(**{field: value})


def test_delays_have_candidates_of_their_own():
    store = hb.TraceStore(STORE)
    found = discover(store, list(DONORS[:2]), "roofline", "api_delay")
    assert found.quantity == "api_delay"
    assert "queue_depth_kv_usage" in (*found.tested, *found.not_tested)
    assert found.blis_error is None


def test_batches_of_the_simulation_have_the_columns_the_tests_use():
    assert {"prefill_tokens", "decode_tokens"} <= set(batches(np.random.default_rng(0), 5).columns)
    assert feature_set("roofline").quantity == "step_time"
