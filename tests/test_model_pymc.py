"""The PyMC model is the exact engine's model: the same names, and the same joint density, without sampling either."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pymc as pm
import pytensor
import pytest
from numpy.typing import NDArray
from pytensor.compile.mode import Mode
from scipy.stats import multivariate_normal
from simulation import PRIORS, THREE, TINY, Simulated, configuration, dense, simulate

from hfdtl_bayes.errors import StatisticsError
from hfdtl_bayes.features import FeatureSet, Level
from hfdtl_bayes.model import ExactDensity, SamplerSettings, build_model, pymc_engine, sample_exact, sample_pymc
from hfdtl_bayes.model.layout import VARIABLE_DIMS, coordinate_values
from hfdtl_bayes.statistics import ConfigStatistics

FloatArray = NDArray[np.float64]

PLAIN = Mode(linker="py", optimizer="fast_compile")
"""NumPy instead of machine code: slow to run but ready in a second."""

PROBLEMS = {
    "three configurations, two hardware": simulate(1),
    "one configuration": simulate(2, THREE[:1], rows=(50,)),
    "two configurations, one hardware": simulate(3, THREE[:2], rows=(30, 50)),
    "two rows": simulate(5, THREE[:1], rows=(2,)),
    "fewer rows than coefficients beside many": simulate(6, rows=(1, 2, 90)),
}


@dataclass(frozen=True)
class Model:
    """The PyMC model of a problem as functions of its unconstrained values."""

    model: pm.Model
    density: Callable[..., FloatArray]
    plain_density: Callable[..., FloatArray]
    variables: Callable[..., list[FloatArray]]
    outputs: tuple[str, ...]

    def at(self, values: dict[str, FloatArray]) -> tuple[float, float, dict[str, FloatArray]]:
        """Log density with and without Jacobians, and every variable."""
        ordered = [np.asarray(values[v.name], dtype=float) for v in self.model.value_vars]
        named = dict(zip(self.outputs, self.variables(*ordered), strict=True))
        return float(self.density(*ordered)), float(self.plain_density(*ordered)), named


def built(data: Simulated) -> Model:
    model = build_model(data.statistics, data.features, data.priors)
    values = model.value_vars
    rvs = [*model.free_RVs, *model.deterministics]
    outputs = model.replace_rvs_by_values(rvs)
    return Model(
        model,
        pytensor.function(values, model.logp(), mode=PLAIN),
        pytensor.function(values, model.logp(jacobian=False), mode=PLAIN),
        pytensor.function(values, outputs, mode=PLAIN, on_unused_input="ignore"),
        tuple(v.name for v in rvs),
    )


def values_at(density: ExactDensity, features: FeatureSet, x: FloatArray, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Unconstrained values of the PyMC model: scales from the exact engine's coordinates, the rest at random."""
    log_tau, logit, log_sigma, log_omega, *populations = density.split(x)
    c, k = density.count_config, density.count_coef
    names = ("sigma_typical", "sigma_spread", "omega_typical", "omega_spread")
    values = {f"{n}_log__": v for n, v in zip(names, populations, strict=True)}
    values |= {"tau_log__": log_tau, "hardware_share_logodds__": logit, "sigma_log__": log_sigma, "omega_log__": log_omega}
    values |= {"theta_eta__": rng.standard_normal((c, k)), "hardware_effect_z": rng.standard_normal((len(density.membership), k))}
    for name, own in (("beta", features.base), ("gamma", features.config), ("delta", features.residual)):
        values[name] = np.array([rng.normal(f.prior.mean, f.prior.sd) for f in own])
    return values


@pytest.mark.parametrize("name", PROBLEMS)
def test_joint_density_is_the_exact_marginal_times_the_conditional(name: str) -> None:
    """log p(rows, coefficients, scales) - log p(coefficients | scales, rows) = log p(rows, scales), up to one constant.

    The first term is PyMC's, the second that of the dense Gaussian, the right side the exact engine's: so both engines have
    the same posterior, of the scales and of the coefficients.
    """
    data = PROBLEMS[name]
    model, density = built(data), ExactDensity(data.statistics, data.features, data.priors)
    rng = np.random.default_rng(21)
    differences, sizes = [], []
    for _ in range(6):
        x = density.start + 0.7 * rng.standard_normal(density.size)
        _, joint, found = model.at(values_at(density, data.features, x, rng))
        # Densities of positive scales in their logarithm, of the share in its log odds, of effects instead of scores.
        jacobian = sum(np.log(found[n]).sum() for n in ("tau", "sigma", "omega", "sigma_typical", "sigma_spread"))
        jacobian += sum(np.log(found[n]) for n in ("omega_typical", "omega_spread"))
        share = float(found["hardware_share"])
        jacobian += np.log(share) + np.log1p(-share)
        jacobian -= len(density.membership) * np.log(np.sqrt(share) * found["tau"] * density.scale).sum()
        mean, covariance = dense(data, {n: found[n] for n in ("tau", "hardware_share", "sigma", "omega")}).conditional()
        names = ("beta", "gamma", "delta", "hardware_effect", "theta")
        coefficients = np.concatenate([found[n].ravel() for n in names])
        sd = np.sqrt(np.diag(covariance))
        conditional = multivariate_normal.logpdf((coefficients - mean) / sd, cov=covariance / np.outer(sd, sd)) - np.log(sd).sum()
        differences.append(joint + jacobian - conditional - density.log_density(x)[0])
        sizes.append(abs(joint) + abs(conditional))
    np.testing.assert_allclose(differences, differences[0], rtol=0, atol=1e-9 * max(sizes) + 1e-5)


@pytest.mark.parametrize("name", ["three configurations, two hardware", "two rows"])
def test_the_coordinates_of_the_sampler_have_their_jacobian(name: str) -> None:
    """theta is an affine function of eta: the determinant of its matrix is what PyMC adds to the log density."""
    data = PROBLEMS[name]
    model, density = built(data), ExactDensity(data.statistics, data.features, data.priors)
    rng = np.random.default_rng(22)
    x = density.start + 0.7 * rng.standard_normal(density.size)
    values = values_at(density, data.features, x, rng)
    with_jacobian, without, found = model.at(values)
    eta = values["theta_eta__"]
    matrix = np.empty((eta.size, eta.size))
    for i in range(eta.size):
        moved = eta.copy()
        moved.flat[i] += 1.0
        matrix[:, i] = (model.at(values | {"theta_eta__": moved})[2]["theta"] - found["theta"]).ravel()
    others = sum(np.log(found[n]).sum() for n in ("tau", "sigma", "omega", "sigma_typical", "sigma_spread"))
    others += sum(np.log(found[n]) for n in ("omega_typical", "omega_spread"))
    others += np.log(found["hardware_share"]) + np.log1p(-found["hardware_share"])
    assert with_jacobian - without - others == pytest.approx(np.linalg.slogdet(matrix)[1], abs=1e-6)


def test_eta_is_standard_normal_at_the_reference() -> None:
    """Where noise, drift and deviations are as the coordinates assume, the density falls like exp(-eta^2 / 2)."""
    data = PROBLEMS["three configurations, two hardware"]
    model, density = built(data), ExactDensity(data.statistics, data.features, data.priors)
    rng = np.random.default_rng(23)
    values = values_at(density, data.features, density.start, rng)
    # The coordinates take all deviation to be the configuration's own.
    values["hardware_share_logodds__"] = np.array(-30.0)
    at_zero = model.at(values | {"theta_eta__": np.zeros((3, 3))})[0]
    for _ in range(3):
        eta = rng.standard_normal((3, 3))
        assert model.at(values | {"theta_eta__": eta})[0] - at_zero == pytest.approx(-0.5 * (eta**2).sum(), abs=1e-6)


def test_names_and_dimensions_are_those_of_the_layout() -> None:
    data = PROBLEMS["three configurations, two hardware"]
    model = build_model(data.statistics, data.features, data.priors)
    named = {v.name: tuple(model.named_vars_to_dims.get(v.name, ())) for v in (*model.free_RVs, *model.deterministics)}
    assert named == dict(VARIABLE_DIMS)
    for name, labels in coordinate_values(data.statistics, data.features).items():
        assert list(model.coords[name]) == labels


def test_a_set_without_config_features_has_no_gamma() -> None:
    features = replace(TINY, name="plain", features=tuple(f for f in TINY.features if f.level is not Level.CONFIG))
    data = simulate(24, features=features)
    model, density = built(data), ExactDensity(data.statistics, features, PRIORS)
    assert "gamma" not in {v.name for v in model.model.free_RVs}
    rng = np.random.default_rng(25)
    values = values_at(density, features, density.start, rng)
    assert np.isfinite(model.at(values)[0])
    tree = sample_exact(data.statistics, features, PRIORS, SamplerSettings(draws=50, tune=50, chains=2), show_progress=False)
    assert "gamma" not in tree["posterior"]


@pytest.mark.parametrize("name", ["three configurations, two hardware", "two rows"])
def test_gradient_is_finite_and_that_of_the_density(name: str) -> None:
    data = PROBLEMS[name]
    model = built(data)
    values = model.model.value_vars
    gradient = pytensor.function(values, pytensor.grad(model.model.logp(), values), mode=PLAIN)
    density = ExactDensity(data.statistics, data.features, data.priors)
    rng = np.random.default_rng(26)
    for width in (0.0, 0.5, 2.0):
        at = values_at(density, data.features, density.start + width * rng.standard_normal(density.size), rng)
        slopes = gradient(*(np.asarray(at[v.name], dtype=float) for v in values))
        direction = {n: rng.standard_normal(np.shape(v)) for n, v in at.items()}
        step = 1e-6
        high, low = ({n: v + sign * step * direction[n] for n, v in at.items()} for sign in (1, -1))
        expected = (model.at(high)[0] - model.at(low)[0]) / (2 * step)
        along = sum(float((g * direction[v.name]).sum()) for g, v in zip(slopes, values, strict=True))
        assert all(np.isfinite(g).all() for g in slopes)
        assert along == pytest.approx(expected, rel=1e-4, abs=1e-3)


def test_the_model_refuses_what_the_exact_engine_refuses() -> None:
    one, two, _ = PROBLEMS["three configurations, two hardware"].statistics
    for build in (build_model, sample_pymc):
        with pytest.raises(StatisticsError, match="named twice: one"):
            build([one, one], TINY)
        with pytest.raises(StatisticsError, match="build both with the same set"):
            build([one, replace(two, feature_set="other")], TINY)
        with pytest.raises(StatisticsError, match="no configuration"):
            build([], TINY)


# --- Sampling it: compilation to machine code takes a quarter of a minute. ---

FEW = SamplerSettings(draws=100, tune=150, chains=2)


@pytest.mark.slow
def test_one_compilation_serves_any_number_of_configurations_and_rows() -> None:
    features = replace(TINY, name="compiled once")
    before = len(pymc_engine._COMPILED)

    def fitted(statistics: tuple[ConfigStatistics, ...], seed: int = 1):
        return sample_pymc(statistics, features, PRIORS, FEW, seed=seed, show_progress=False)

    first = fitted(simulate(31, features=features).statistics)
    compiled = pymc_engine._COMPILED[features, PRIORS]
    for configurations, rows in ((THREE[:2], 30), (THREE[:1], 2), ([*THREE, configuration("four", "B200")], 90)):
        tree = fitted(simulate(32, configurations, features=features, rows=rows).statistics)
        assert list(tree["posterior"]["config"].to_numpy()) == [c.config_id for c in configurations]
    assert pymc_engine._COMPILED[features, PRIORS] is compiled
    assert len(pymc_engine._COMPILED) == before + 1
    # What was fitted in between leaves no trace.
    same, other = (fitted(simulate(31, features=features).statistics, seed)["posterior"].to_dataset() for seed in (1, 2))
    assert same.identical(first["posterior"].to_dataset())
    assert not other.equals(same)


@pytest.mark.slow
def test_both_engines_give_the_same_posterior_in_the_same_form() -> None:
    data = PROBLEMS["three configurations, two hardware"]
    settings = SamplerSettings(draws=2000, tune=500, chains=4)
    exact, sampled = (
        engine(data.statistics, TINY, PRIORS, settings, seed=3, show_progress=False)["posterior"].to_dataset()
        for engine in (sample_exact, sample_pymc)
    )
    assert {n: v.dims for n, v in exact.data_vars.items()} == {n: v.dims for n, v in sampled.data_vars.items()}
    for name, coordinate in exact.coords.items():
        assert coordinate.equals(sampled.coords[name])
    for name in exact.data_vars:
        positive = str(name).startswith(("tau", "sigma", "omega"))
        a, b = (np.log(d[name]) if positive else d[name] for d in (exact, sampled))
        sd = a.std(("chain", "draw"))
        # At least 400 effective draws each: sd / 14 is five standard errors of the difference of two means.
        assert float((abs(a.mean(("chain", "draw")) - b.mean(("chain", "draw"))) / sd).max()) < 5 * np.sqrt(2 / 400), name
        assert float(abs(np.log(b.std(("chain", "draw")) / sd)).max()) < 5 / np.sqrt(400), name
