"""Scores of what was left out, against brute force: dense normals, quadrature, refits, and closed forms."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray
from scipy import stats
from scipy.integrate import quad
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from simulation import PRIORS, THREE, TINY, dense, error_covariance, pilot_of, simulate

from hfdtl_bayes.errors import InputError, UnknownNameError
from hfdtl_bayes.model import ExactDensity, LatencyPosterior, SamplerSettings, fit
from hfdtl_bayes.model.likelihoods import SHAPES, log_density
from hfdtl_bayes.statistics import ScaledRows, scaled_rows
from hfdtl_bayes.transfer import (
    block_log_density,
    calibrate,
    compare_fits,
    crps,
    crps_of_draws,
    crps_of_normals,
    leave_one_configuration_out,
    left_out_score,
    loo_blocks,
    loo_rows,
    marginal_log_density,
    row_log_density,
)

FloatArray = NDArray[np.float64]

NO_DRIFT = replace(PRIORS, drift=None)
SAMPLER = SamplerSettings(draws=500, tune=300, chains=2)
DATA = simulate(61, rows=(120, 90, 100))


def rows_of(keep: tuple[NDArray[np.bool_], ...] | None = None) -> list[ScaledRows]:
    frames = DATA.frames if keep is None else [f[k] for f, k in zip(DATA.frames, keep, strict=True)]
    return [
        scaled_rows(f, c, TINY, block_length=DATA.block, pilot=pilot_of(TINY, c), rows=None)
        for f, c in zip(frames, THREE, strict=True)
    ]


@cache
def fitted(drift: bool = True) -> LatencyPosterior:
    priors = PRIORS if drift else NO_DRIFT
    return fit([r.statistics for r in rows_of()], TINY, priors, SAMPLER, seed=1, show_progress=False)


def as_if(likelihood: str, posterior: LatencyPosterior) -> LatencyPosterior:
    """The same draws under another likelihood, with a shape for each."""
    rng = np.random.default_rng(62)
    size = posterior.draws_of("hardware_share").size
    given = {
        "nu": rng.uniform(2.5, 8, size),
        "outlier_share": rng.uniform(0.01, 0.2, size),
        "outlier_ratio": rng.uniform(3, 9, size),
    }
    tree = posterior.tree["posterior"].to_dataset()
    chains = tree.sizes["chain"]
    own = {n: (("chain", "draw"), given[n].reshape(chains, -1)) for n in SHAPES[likelihood]}
    return replace(posterior, tree=xr.DataTree.from_dict({"posterior": tree.assign(own)}), likelihood=likelihood)


@pytest.mark.parametrize("likelihood", SHAPES)
def test_a_blocks_density_is_the_integral_over_its_drift(likelihood: str) -> None:
    posterior, rows = as_if(likelihood, fitted()), rows_of()[1]
    chosen = np.array([3, 250, 777])
    found = block_log_density(posterior, rows, chosen)
    assert found.shape == (3, len(rows.starts))
    draws = posterior.draws(THREE[1])
    for s, draw in enumerate(chosen):
        shape = {n: v[[draw]] for n, v in draws.shape.items()}
        sigma, omega = draws.sigma[[draw]], float(draws.omega[draw])
        for b in (0, 4, len(rows.starts) - 1):
            inside = rows.block == b
            y, mean = rows.observed[inside], rows.design[inside] @ draws.theta[draw]

            d = np.linspace(-8 * omega, 8 * omega, 20_001)
            logs = log_density(likelihood, shape, y, mean[None, None] + d[None, :, None], sigma)[0].sum(axis=1)
            logs += stats.norm(0, omega).logpdf(d)
            expected = logs.max() + np.log(np.trapezoid(np.exp(logs - logs.max()), d))
            assert found[s, b] == pytest.approx(expected - np.log(rows.scale[inside]).sum(), abs=1e-5)


def test_a_gaussian_blocks_density_is_the_dense_normal() -> None:
    rows, draws = rows_of()[0], fitted().draws(THREE[0])
    found = block_log_density(fitted(), rows, np.array([10]))[0]
    theta, sigma, omega = draws.theta[10], draws.sigma[10], draws.omega[10]
    for b in range(len(rows.starts)):
        inside = rows.block == b
        cov = error_covariance(rows.block[inside], sigma, omega) * np.outer(rows.scale[inside], rows.scale[inside])
        y, mean = (v[inside] * rows.scale[inside] for v in (rows.observed, rows.design @ theta))
        assert found[b] == pytest.approx(multivariate_normal.logpdf(y, mean, cov), rel=1e-9)


def test_without_drift_a_block_is_the_sum_of_its_rows() -> None:
    rows = rows_of()[2]
    by_row = row_log_density(fitted(drift=False), rows)
    by_block = block_log_density(fitted(drift=False), rows)
    np.testing.assert_allclose(np.add.reduceat(by_row, rows.starts, axis=1), by_block, rtol=1e-12)


def test_leaving_out_blocks_by_weights_is_refitting_without_them() -> None:
    """Where Pareto k allows it, the importance-weighted score is that of a refit: the five of highest k that do, and two others."""
    rows = rows_of()
    found = loo_blocks(fitted(), rows)
    every = [(c, b) for c, r in enumerate(rows) for b in range(len(r.starts))]
    pareto = found.pareto_k.to_numpy()
    allowed = [int(i) for i in np.argsort(-pareto) if pareto[i] < found.good_k]
    assert len(allowed) >= len(every) - 1
    for unit in [*allowed[:5], *allowed[-2:]]:
        c, b = every[unit]
        keep = tuple(r.block != b if i == c else np.ones(len(r.block), bool) for i, r in enumerate(rows))
        without = fit([r.statistics for r in rows_of(keep)], TINY, PRIORS, SAMPLER, seed=2, show_progress=False)
        logs = block_log_density(without, rows[c])[:, b]
        refitted = logsumexp(logs) - np.log(len(logs))
        # Monte Carlo error of both: sds of the densities over the root of some 500 effective draws.
        error = np.std(np.exp(logs - logs.max())) / np.mean(np.exp(logs - logs.max())) * np.sqrt(2 / 400)
        assert float(found.elpd_i[unit]) == pytest.approx(refitted, abs=4 * error + 0.02)


def test_rows_can_be_left_out_only_without_drift() -> None:
    rows = rows_of()
    found = loo_rows(fitted(drift=False), rows)
    assert found.elpd_i.size == 310
    with pytest.raises(InputError, match="share its drift"):
        loo_rows(fitted(), rows)
    with pytest.raises(InputError, match="rows of 'one' are not those that were fitted"):
        loo_blocks(fitted(), rows_of((np.arange(120) < 60, np.ones(90, bool), np.ones(100, bool))))
    with pytest.raises(InputError, match="'four' was not fitted"):
        row_log_density(fitted(drift=False), replace(rows[0], statistics=replace(rows[0].statistics, configuration=renamed())))
    with pytest.raises(InputError, match="no fit to compare"):
        compare_fits({}, rows)


def renamed():
    return THREE[0].model_copy(update={"config_id": "four"})


def test_comparison_is_paired_by_block_and_sees_the_missing_drift() -> None:
    rows = rows_of()
    table = compare_fits({"none": fitted(drift=False), "drift": fitted()}, rows)
    assert list(table.index) == ["drift", "none"]
    a, b = (loo_blocks(p, rows).elpd_i.to_numpy() for p in (fitted(), fitted(drift=False)))
    assert table.loc["none", "behind"] == pytest.approx((a - b).sum())
    assert table.loc["none", "se_behind"] == pytest.approx(np.sqrt(len(a)) * (a - b).std(ddof=1))
    assert table.loc["drift", ["behind", "se_behind"]].tolist() == [0, 0]
    assert table.loc["none", "behind"] > 2 * table.loc["none", "se_behind"]
    found = loo_blocks(fitted(), rows)
    assert table.loc["drift", "bad_k"] == (found.pareto_k > found.good_k).sum()
    assert (table["blocks"] == 31).all()


@pytest.mark.parametrize("target", [0, 1, 2])
def test_a_left_out_configurations_density_is_that_of_the_dense_normal(target: int) -> None:
    """log p(its rows | the others' rows, scales) = log p(all) - log p(others), as multivariate normals."""
    others = [c for c in range(3) if c != target]
    statistics = [r.statistics for r in rows_of()]
    scales = {n: fitted().draws_of(n)[20] for n in ("tau", "hardware_share", "sigma", "omega")}
    part = replace(DATA, configurations=tuple(THREE[c] for c in others), frames=tuple(DATA.frames[c] for c in others))
    of_others = scales | {n: scales[n][others] for n in ("sigma", "omega")}
    whole, rest = dense(DATA, scales), dense(part, of_others)
    expected = multivariate_normal.logpdf(whole.observed, whole.mean, whole.covariance)
    expected -= multivariate_normal.logpdf(rest.observed, rest.mean, rest.covariance)
    density = ExactDensity([statistics[c] for c in others], TINY, PRIORS)
    x = density.join(
        scales["tau"][None], np.atleast_1d(scales["hardware_share"]), of_others["sigma"][None], of_others["omega"][None],
        [np.ones(1)] * 4,
    )  # fmt: skip
    mean, covariance = density.predictive(x, THREE[target])
    own = ExactDensity([statistics[target]], TINY, PRIORS).info
    found = marginal_log_density(own, mean, covariance, *(np.log(scales[n][[target]]) for n in ("sigma", "omega")))
    assert float(found[0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("drift", [True, False])
def test_left_out_score_is_the_average_over_noise_and_drift_on_a_grid(drift: bool) -> None:
    statistics = [r.statistics for r in rows_of()]
    priors = PRIORS if drift else NO_DRIFT
    donors = fit(statistics[:2], TINY, priors, SAMPLER, seed=3, show_progress=False)
    score, error = left_out_score(donors, statistics[2])
    assert 0 < error < 0.2
    draws = np.unique(np.linspace(0, 999, 100).astype(int))
    names = ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")
    middle, spread, drift_middle, drift_spread = (donors.draws_of(n)[draws] for n in names)
    density = ExactDensity(statistics[:2], TINY, priors)
    scales = [donors.draws_of(n)[draws] for n in ("tau", "hardware_share", "sigma", "omega")]
    mean, covariance = density.predictive(density.join(*scales, [middle, spread, drift_middle, drift_spread]), THREE[2])
    own = ExactDensity([statistics[2]], TINY, priors).info
    noise = np.linspace(np.log(0.02), np.log(0.4), 60)
    drifts = np.linspace(np.log(0.002), np.log(1.5), 30) if drift else np.array([-50.0])
    logs = []
    for a in noise:
        for b in drifts:
            each = marginal_log_density(own, mean, covariance, np.full(len(draws), a), np.full(len(draws), b))
            each = each + stats.norm(np.log(middle), spread).logpdf(a) + np.log(noise[1] - noise[0])
            if drift:
                each = each + stats.norm(np.log(drift_middle), drift_spread).logpdf(b) + np.log(drifts[1] - drifts[0])
            logs.append(each)
    by_draw = logsumexp(logs, axis=0)
    expected = logsumexp(by_draw) - np.log(len(draws)) - statistics[2].log_scale_sum
    weights = np.exp(by_draw - by_draw.max())
    coarse = weights.std() / weights.mean() / np.sqrt(len(draws) / 3)
    assert score == pytest.approx(expected, abs=4 * np.hypot(error, coarse))


def test_each_configuration_is_scored_by_the_others() -> None:
    statistics = [r.statistics for r in rows_of()]
    table = leave_one_configuration_out(statistics, TINY, PRIORS, SAMPLER, seed=3, show_progress=False)
    donors = fit(statistics[:2], TINY, PRIORS, SAMPLER, seed=3, show_progress=False)
    assert table.loc["three", "log_score"] == left_out_score(donors, statistics[2], seed=3)[0]
    assert table["rows"].tolist() == [120, 90, 100]
    np.testing.assert_allclose(table["per_row"], table["log_score"] / table["rows"])
    with pytest.raises(InputError, match="needs two, found 1"):
        leave_one_configuration_out(statistics[:1], TINY, PRIORS)
    with pytest.raises(InputError, match="'one' was fitted, so its score would praise itself"):
        left_out_score(donors, statistics[0])
    with pytest.raises(InputError, match="errors are student_t"):
        left_out_score(as_if("student_t", donors), statistics[2])


# --- CRPS. ---


def test_crps_of_draws_has_no_bias_and_is_the_integral_of_the_brier_score() -> None:
    rng = np.random.default_rng(63)
    draws, y = rng.gamma(2.0, size=(40, 3)), np.array([0.1, 2.0, 9.0])
    found = crps_of_draws(draws, y)
    pairs = np.abs(draws[:, None] - draws[None]).sum(axis=(0, 1)) / (2 * 40 * 39)
    np.testing.assert_allclose(found, np.abs(draws - y).mean(axis=0) - pairs)
    # Of ten draws, averaged over many sets of ten: the same as of very many.
    sets = np.array([crps_of_draws(rng.gamma(2.0, size=(10, 1)), y[1:2])[0] for _ in range(4000)])
    distribution = stats.gamma(2.0)
    brier = quad(lambda x: (distribution.cdf(x) - (x >= 2.0)) ** 2, 0, 40, points=[2.0], limit=200)[0]
    assert sets.mean() == pytest.approx(brier, abs=4 * sets.std() / np.sqrt(4000))
    with pytest.raises(InputError, match="at least two draws"):
        crps_of_draws(draws[:1], y)


def test_crps_of_normals_in_closed_form() -> None:
    mean, sd, y = np.array([[1.0], [3.0], [3.5]]), np.array([[0.5], [1.0], [0.2]]), np.array([2.0])

    def cdf(x: float) -> float:
        return float(np.mean(stats.norm(mean[:, 0], sd[:, 0]).cdf(x)))

    brier = quad(lambda x: (cdf(x) - (x >= 2.0)) ** 2, -8, 12, points=[2.0], limit=400)[0]
    assert crps_of_normals(mean, sd, y)[0] == pytest.approx(brier, abs=1e-7)
    # One normal: Gneiting & Raftery (2007), equation 21.
    z = (2.0 - 1.0) / 0.5
    one = 0.5 * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))
    assert crps_of_normals(mean[:1], sd[:1], y)[0] == pytest.approx(one)


def test_crps_of_predictions_is_that_of_the_mixture_they_are_drawn_from() -> None:
    posterior, frame = fitted(), DATA.frames[0].iloc[:40]
    seconds, relative = crps(posterior, frame, THREE[0])
    draws = posterior.draws(THREE[0])
    design = TINY.design(frame, THREE[0])
    scale = posterior.scale_s(design @ draws.mean, THREE[0])
    keep = slice(None, None, 5)
    y = frame["step_time_s"].to_numpy()
    sd = np.hypot(draws.sigma, draws.omega)[keep, None] * scale
    exact = crps_of_normals(draws.theta[keep] @ design.T, sd, y).mean()
    assert seconds == pytest.approx(exact, rel=0.03)
    assert relative == pytest.approx(seconds / y.mean())
    with pytest.raises(InputError, match="no rows of 'one' to score"):
        crps(posterior, frame.iloc[:0], THREE[0])


def test_calibration_with_rows_needs_donors_with_rows() -> None:
    frame = DATA.frames[0]
    with pytest.raises(InputError, match=r'their rows are not kept; to calibrate with the engine "rows", fit them with it too'):
        calibrate(fitted(), frame, renamed(), engine="rows", show_progress=False)
    with pytest.raises(
        UnknownNameError, match="engine 'exact' fits sufficient statistics, which only the gaussian likelihood has"
    ):
        calibrate(fitted(), frame, renamed(), engine="exact", likelihood="student_t", show_progress=False)
