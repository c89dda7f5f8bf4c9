"""What `inference.py` compares: one method fits the donors of a trace store in a process of its own.

    python benchmarks/inference_methods.py METHOD STORE OUT.npz [--draws N] [--tune N] [--chains N] [--seed N]

Every sampler has the same model, that of `hfdtl_bayes.model.pymc_model` without drift, and the same rows divided by the same scale. The
competitors have it written out as a careful user of theirs would: on the rows, coefficients centered, which is right where configurations
have thousands of rows, and effects of hardware non-centered, which few configurations inform (they
mix worse centered). A configuration's mean is one product of its own rows, not a gather over all, which serves every one of them.
What differs elsewhere is said where it does. OUT.npz holds the draws by variable, shape
(chain, draw, ...), or point estimates; beside it, OUT.json what was measured.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

Draws = dict[str, np.ndarray]


def cpu_seconds() -> float:
    """Return CPU seconds of this process and of the children it has waited for."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


@dataclass
class Record:
    """What a method found and what it took."""

    draws: Draws = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure wall and CPU seconds of a stage: prepare, compile or sample."""
        wall, cpu = time.perf_counter(), cpu_seconds()
        yield
        self.seconds[name] = {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}

    def move(self, wall: float, cpu: float) -> None:
        """Count part of the sampling as compilation: of samplers that compile when they are first called."""
        for kind, value in (("wall", wall), ("cpu", cpu)):
            self.seconds["sample"][kind] -= value
            self.seconds.setdefault("compile", {"wall": 0.0, "cpu": 0.0})[kind] += value

    def keep(self, variables: Any, stats: Any, steps: str = "n_steps") -> None:
        """Keep draws and the sampler's statistics, from xarray datasets or plain mappings."""
        self.draws = {str(n): np.asarray(v, dtype=float) for n, v in variables.items()}
        self.facts |= {"divergences": int(np.sum(stats["diverging"])), "gradients_per_draw": float(np.mean(stats[steps]))}


@dataclass(frozen=True)
class Task:
    """The data of a store and how long to sample."""

    store: Path
    draws: int
    tune: int
    chains: int
    seed: int
    drift: bool

    @cached_property
    def features(self) -> Any:
        """The default feature set."""
        from hfdtl_bayes.features import feature_set  # noqa: PLC0415  (nobody pays for imports of others)

        return feature_set("roofline")

    @cached_property
    def priors(self) -> Any:
        """The default priors, without drift unless it is asked for."""
        from hfdtl_bayes.model import PriorSettings  # noqa: PLC0415

        return PriorSettings() if self.drift else PriorSettings(drift=None)

    @property
    def settings(self) -> Any:
        """How to sample, for our engines."""
        from hfdtl_bayes.model import SamplerSettings  # noqa: PLC0415

        return SamplerSettings(draws=self.draws, tune=self.tune, chains=self.chains)

    def frames(self) -> list[tuple[Any, Any]]:
        """Return rows and configuration of each donor."""
        from hfdtl_bayes.traces import TraceStore, drop_warmup  # noqa: PLC0415

        store = TraceStore(self.store)
        return [(drop_warmup(store.steps(c).frame), store.configuration(c)) for c in store.config_ids]

    def statistics(self) -> list[Any]:
        """Return the sufficient statistics of each donor."""
        from hfdtl_bayes.statistics import statistics_from_rows  # noqa: PLC0415

        return [statistics_from_rows(frame, c, self.features) for frame, c in self.frames()]

    def rows(self) -> list[Any]:
        """Return all rows of each donor, scaled as the statistics are."""
        from hfdtl_bayes.statistics import scaled_rows  # noqa: PLC0415

        return [scaled_rows(frame, c, self.features, rows=None) for frame, c in self.frames()]

    @cached_property
    def model(self) -> Model:
        """The model as plain arrays."""
        return Model.of(self)


@dataclass(frozen=True)
class Model:
    """The model as arrays: what a user of another package has in hand.

    Attributes
    ----------
    x, y : list of ndarray
        Scaled design, shape (n, K), and scaled step times, shape (n,), of each configuration.
    g : ndarray, shape (C, G)
        Config features as multiples of the constant, which they shift.
    hardware : ndarray of int, shape (C,)
    scale : ndarray, shape (K,)
        What tau is relative to.
    mean, sd : ndarray, shape (B + G + D,)
        Of the normal priors of beta, gamma, delta.
    base : int
        B; the constant is column B of x.
    priors : PriorSettings
    """

    x: list[np.ndarray]
    y: list[np.ndarray]
    g: np.ndarray
    hardware: np.ndarray
    scale: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    base: int
    priors: Any

    @classmethod
    def of(cls, task: Task) -> Model:
        """Collect the arrays."""
        from hfdtl_bayes.model.layout import hardware_index  # noqa: PLC0415
        from hfdtl_bayes.model.priors import deviation_scale, population_mean, population_sd  # noqa: PLC0415

        rows = task.rows()
        statistics = [r.statistics for r in rows]
        return cls(
            [r.design for r in rows],
            [r.observed for r in rows],
            np.array([s.config_row for s in statistics]),
            hardware_index(statistics),
            deviation_scale(task.features),
            population_mean(task.features),
            population_sd(task.features),
            len(task.features.base),
            task.priors,
        )

    @property
    def population(self) -> np.ndarray:
        """Indices, in `mean`, of the columns of x: beta and delta."""
        return np.delete(np.arange(len(self.mean)), np.s_[self.base : self.base + self.g.shape[1]])

    @property
    def widened(self) -> np.ndarray:
        """Columns of the population's coefficients, shape (n, B + G + D): those of x with g times the constant between."""
        parts = [np.insert(x, [self.base], x[:, [self.base]] * g, axis=1) for x, g in zip(self.x, self.g, strict=True)]
        return np.vstack(parts)


def exact(task: Task, record: Record) -> None:
    """Sample with our default engine."""
    from hfdtl_bayes.model import sample_exact  # noqa: PLC0415

    with record.stage("prepare"):
        statistics = task.statistics()
    with record.stage("sample"):
        tree = sample_exact(statistics, task.features, task.priors, task.settings, seed=task.seed, show_progress=False)
    record.keep(tree["posterior"].data_vars, tree["sample_stats"])


def pymc(task: Task, record: Record) -> None:
    """Sample our PyMC model on the pseudo-rows of the statistics."""
    from hfdtl_bayes.model import pymc_engine, pymc_model  # noqa: PLC0415

    with record.stage("prepare"):
        statistics = task.statistics()
    with record.stage("compile"):
        compiled = _compiled(pymc_model.build_model(statistics, task.features, task.priors))
        pymc_engine._COMPILED[task.features, task.priors] = compiled
    with record.stage("sample"):
        tree = pymc_engine.sample_pymc(statistics, task.features, task.priors, task.settings, seed=task.seed, show_progress=False)
    record.keep(tree["posterior"].data_vars, tree["sample_stats"])


def rows(task: Task, record: Record) -> None:
    """Sample our PyMC model on rows, Gaussian, in our coordinates."""
    from hfdtl_bayes.model import rows_engine, rows_model  # noqa: PLC0415

    with record.stage("prepare"):
        data = task.rows()
    with record.stage("compile"):
        compiled = _compiled(rows_model.build_rows_model(data, task.features, task.priors, "gaussian"))
        rows_engine._COMPILED[task.features, task.priors, "gaussian"] = compiled
    with record.stage("sample"):
        tree = rows_engine.sample_rows(data, task.features, task.priors, task.settings, seed=task.seed, show_progress=False)
    record.keep(tree["posterior"].data_vars, tree["sample_stats"])


def _compiled(model: Any) -> Any:
    """Compile one of our PyMC models; Numba compiles at the first evaluation."""
    from hfdtl_bayes.model.pymc_engine import compile_model  # noqa: PLC0415

    compiled = compile_model(model)
    start = model.initial_point()
    compiled.density(*(np.asarray(start[n], dtype=float) for n in compiled.names))
    return compiled


def pymc_rows_model(model: Model) -> Any:
    """Return the model as a user of PyMC writes it."""
    import pymc as pm  # noqa: PLC0415
    import pytensor.tensor as pt  # noqa: PLC0415

    priors, b, (count, n_config) = model.priors, model.base, model.g.shape
    k, n_hardware = len(model.scale), model.hardware.max() + 1

    def lognormal(name: str, prior: Any, **kwargs: Any) -> Any:
        return pm.LogNormal(name, prior.log_mean, prior.log_sd, **kwargs)

    with pm.Model() as built:
        beta = pm.Normal("beta", model.mean[:b], model.sd[:b])
        gamma = pm.Normal("gamma", model.mean[b : b + n_config], model.sd[b : b + n_config])
        delta = pm.Normal("delta", model.mean[b + n_config :], model.sd[b + n_config :])
        tau = lognormal("tau", priors.deviation, shape=k) * model.scale
        share = pm.Beta("hardware_share", priors.hardware_share, priors.hardware_share)
        effect = pt.sqrt(share) * tau * pm.Normal("hardware_effect_z", shape=(n_hardware, k))
        pm.Deterministic("hardware_effect", effect)
        centre = pt.concatenate([beta, delta]) + effect[model.hardware]
        centre = centre[:, b].inc(pt.dot(model.g, gamma))
        theta = pm.Normal("theta", centre, pt.sqrt(1 - share) * tau, shape=(count, k))
        typical, spread = lognormal("sigma_typical", priors.noise), lognormal("sigma_spread", priors.noise_spread)
        sigma = pm.LogNormal("sigma", pt.log(typical), spread, shape=count)
        for c, (x, y) in enumerate(zip(model.x, model.y, strict=True)):
            pm.Normal(f"y_{c}", pt.dot(x, theta[c]), sigma[c], observed=y)
    return built


def _nutpie(built: Any, task: Task, record: Record) -> Any:
    """Sample as `pm.sample` does where nutpie is installed; the two halves of it apart."""
    import nutpie  # noqa: PLC0415

    with record.stage("compile"):
        compiled = nutpie.compile_pymc_model(built)
    with record.stage("sample"):
        trace = nutpie.sample(
            compiled, draws=task.draws, tune=task.tune, chains=task.chains, cores=1, seed=task.seed, progress_bar=False
        )
    return trace


def pymc_nutpie(task: Task, record: Record) -> None:
    """Sample PyMC on rows with nutpie, which `pm.sample` chooses."""
    with record.stage("prepare"):
        built = pymc_rows_model(task.model)
    trace = _nutpie(built, task, record)
    record.keep(trace["posterior"].data_vars, trace["sample_stats"])


def pymc_nuts(task: Task, record: Record) -> None:
    """Sample PyMC on rows with its own NUTS."""
    import pymc as pm  # noqa: PLC0415

    with record.stage("prepare"):
        built = pymc_rows_model(task.model)
    first: list[float] = []

    def watch(**_: Any) -> None:
        if not first:
            first.extend((time.perf_counter(), cpu_seconds()))

    with record.stage("sample"):
        began = time.perf_counter(), cpu_seconds()
        trace = pm.sample(
            task.draws, tune=task.tune, chains=task.chains, cores=1, random_seed=task.seed, nuts_sampler="pymc",
            model=built, callback=watch, progressbar=False, compute_convergence_checks=False,
        )  # fmt: skip
    # It compiles before the first draw.
    record.move(first[0] - began[0], first[1] - began[1])
    record.keep(trace["posterior"].data_vars, trace["sample_stats"])


def covered(intervals: list[tuple[float, float]]) -> float:
    """Return how long at least one of some intervals lasts: what JAX compiles within something it compiles is counted once."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return float(total)


def numpyro(task: Task, record: Record) -> None:
    """Sample NumPyro on rows, in double precision, chains in sequence."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415
    import numpyro as npr  # noqa: PLC0415
    import numpyro.distributions as dist  # noqa: PLC0415

    npr.enable_x64()
    with record.stage("prepare"):
        model = task.model
    priors, b, (count, n_config), k = model.priors, model.base, model.g.shape, len(model.scale)

    def lognormal(name: str, prior: Any, shape: tuple[int, ...] = ()) -> Any:
        return npr.sample(name, dist.LogNormal(prior.log_mean, prior.log_sd).expand(shape).to_event(len(shape)))

    def normal(name: str, mean: Any, sd: Any) -> Any:
        mean, sd = jnp.broadcast_arrays(mean, sd)
        return npr.sample(name, dist.Normal(mean, sd).to_event(mean.ndim))

    def hierarchy(g: Any, hardware: Any, x: Any, y: Any) -> None:
        beta = normal("beta", model.mean[:b], model.sd[:b])
        gamma = normal("gamma", model.mean[b : b + n_config], model.sd[b : b + n_config])
        delta = normal("delta", model.mean[b + n_config :], model.sd[b + n_config :])
        tau = lognormal("tau", priors.deviation, (k,)) * model.scale
        share = npr.sample("hardware_share", dist.Beta(priors.hardware_share, priors.hardware_share))
        effect = jnp.sqrt(share) * tau * normal("hardware_effect_z", jnp.zeros((model.hardware.max() + 1, k)), 1.0)
        npr.deterministic("hardware_effect", effect)
        centre = (jnp.concatenate([beta, delta]) + effect[hardware]).at[:, b].add(g @ gamma)  # noqa: PD008  (JAX)
        theta = normal("theta", centre, jnp.sqrt(1 - share) * tau)
        typical, spread = lognormal("sigma_typical", priors.noise), lognormal("sigma_spread", priors.noise_spread)
        sigma = npr.sample("sigma", dist.LogNormal(jnp.log(typical), spread).expand((count,)).to_event(1))
        for c in range(count):
            npr.sample(f"y_{c}", dist.Normal(x[c] @ theta[c], sigma[c]), obs=y[c])

    compiling: list[tuple[float, float]] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            ended = time.perf_counter()
            compiling.append((ended - duration, ended))

    jax.monitoring.register_event_duration_secs_listener(listen)
    with record.stage("sample"):
        mcmc = npr.infer.MCMC(
            npr.infer.NUTS(hierarchy), num_warmup=task.tune, num_samples=task.draws, num_chains=task.chains,
            chain_method="sequential", progress_bar=False,
        )  # fmt: skip
        arrays = [jnp.asarray(a) for a in (model.g, model.hardware)]
        mcmc.run(
            jax.random.PRNGKey(task.seed), *arrays, [jnp.asarray(a) for a in model.x], [jnp.asarray(a) for a in model.y],
            extra_fields=("num_steps", "diverging"),
        )  # fmt: skip
        found = {n: np.asarray(v) for n, v in mcmc.get_samples(group_by_chain=True).items()}
    # JAX says how long it compiled in wall seconds; of CPU seconds that is the same part.
    spent, took = covered(compiling), record.seconds["sample"]
    record.move(spent, spent / took["wall"] * took["cpu"])
    record.keep(found, mcmc.get_extra_fields(group_by_chain=True), "num_steps")


def bambi(task: Task, record: Record) -> None:
    """Sample Bambi with nutpie: varying slopes and varying log noise by configuration.

    Without the effects of hardware: the deviations of a configuration are one normal of sd tau. They would be a second grouping, whose
    sds Bambi cannot tie to the first's.
    """
    import bambi as bmb  # noqa: PLC0415
    import pandas as pd  # noqa: PLC0415

    with record.stage("prepare"):
        model = task.model
        p = model.priors
        names = [f"x{j}" for j in range(len(model.mean))]
        varying = [names[j] for j in model.population]
        frame = pd.DataFrame(model.widened, columns=names)
        frame["y"] = np.concatenate(model.y)
        frame["config"] = np.repeat([f"c{c}" for c in range(len(model.x))], [len(y) for y in model.y])

        def lognormal(prior: Any, factor: float = 1.0) -> Any:
            return bmb.Prior("LogNormal", mu=prior.log_mean + np.log(factor), sigma=prior.log_sd)

        priors: dict[str, Any] = {
            n: bmb.Prior("Normal", mu=m, sigma=s) for n, m, s in zip(names, model.mean, model.sd, strict=True)
        }
        for name, scale in zip(varying, model.scale, strict=True):
            priors[f"{name}|config"] = bmb.Prior("Normal", mu=0, sigma=lognormal(p.deviation, scale))
        priors["sigma"] = {
            "Intercept": bmb.Prior("Normal", mu=p.noise.log_mean, sigma=p.noise.log_sd),
            "1|config": bmb.Prior("Normal", mu=0, sigma=lognormal(p.noise_spread)),
        }
        formula = bmb.Formula(
            f"y ~ 0 + {' + '.join(names)} + {' + '.join(f'(0 + {n}|config)' for n in varying)}", "sigma ~ 1 + (1|config)"
        )
        fitted = bmb.Model(formula, frame, priors=priors, noncentered=False)
        fitted.build()
    trace = _nutpie(fitted.backend.model, task, record)
    found = trace["posterior"]
    population = np.stack([found[n].to_numpy() for n in names], axis=-1)
    deviations = np.stack([found[f"{n}|config"].to_numpy() for n in varying], axis=-1)
    theta = population[:, :, None, model.population] + deviations
    theta[..., model.base] += np.einsum("cg,abg->abc", model.g, population[..., model.base : model.base + model.g.shape[1]])
    tau = np.stack([found[f"{n}|config_sigma"].to_numpy() for n in varying], axis=-1) / model.scale
    log_sigma = found["sigma_Intercept"].to_numpy()[..., None] + found["sigma_1|config"].to_numpy()
    variables = _split(population, model) | {
        "theta": theta,
        "tau": tau,
        "sigma": np.exp(log_sigma),
        "sigma_typical": np.exp(found["sigma_Intercept"].to_numpy()),
        "sigma_spread": found["sigma_1|config_sigma"].to_numpy(),
    }
    record.keep(variables, trace["sample_stats"])


def _split(population: np.ndarray, model: Model) -> Draws:
    ends = [model.base, model.base + model.g.shape[1]]
    return dict(zip(("beta", "gamma", "delta"), np.split(population, ends, axis=-1), strict=True))


def mixedlm(task: Task, record: Record) -> None:
    """Fit the mixed model of statsmodels by REML: a point estimate.

    One noise for all configurations, no priors, no effects of hardware, independent varying slopes. With five
    configurations most of its group sds lie on the boundary, where they are no estimates; it gives none of them an error.
    """
    import warnings  # noqa: PLC0415

    from statsmodels.regression.mixed_linear_model import MixedLM, MixedLMParams  # noqa: PLC0415

    with record.stage("prepare"):
        model = task.model
        fixed, varying, observed = model.widened, np.vstack(model.x), np.concatenate(model.y)
        groups = np.repeat(np.arange(len(model.x)), [len(y) for y in model.y])
    k = varying.shape[1]
    with record.stage("sample"), warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        free = MixedLMParams.from_components(np.ones(fixed.shape[1]), np.eye(k))
        result = MixedLM(observed, fixed, groups, exog_re=varying).fit(reml=True, free=free, method="lbfgs")
    effects = np.array([result.random_effects[c].to_numpy() for c in range(len(model.x))])
    theta = result.fe_params[model.population] + effects
    theta[:, model.base] += model.g @ result.fe_params[model.base : model.base + model.g.shape[1]]
    record.draws = _split(np.asarray(result.fe_params), model) | {
        "theta": theta,
        "tau": np.sqrt(np.diag(result.cov_re)) / model.scale,
    }
    record.facts["converged"] = bool(result.converged)
    record.facts["warnings"] = sorted({type(w.message).__name__ for w in raised})


def ridge(task: Task, record: Record) -> None:
    """Fit the original design's first stage on the same features: one slope for all donors, absolute errors, a point estimate."""
    from hfdtl_bayes.transfer import fit_ridge_donors  # noqa: PLC0415

    with record.stage("prepare"):
        frames = task.frames()
    with record.stage("sample"):
        fitted = fit_ridge_donors(frames, features="roofline")
    base = len(task.features.base)
    record.draws = {"beta": fitted.donors.coefficients[:base], "gamma": fitted.donors.coefficients[base:]}


METHODS: dict[str, Callable[[Task, Record], None]] = {
    f.__name__: f for f in (exact, pymc, rows, pymc_nutpie, pymc_nuts, numpyro, bambi, mixedlm, ridge)
}


def main() -> None:
    """Run one method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--tune", type=int, default=500)
    parser.add_argument("--chains", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drift", action="store_true", help="the model with drift; our engines only")
    arguments = parser.parse_args()
    task = Task(arguments.store, arguments.draws, arguments.tune, arguments.chains, arguments.seed, arguments.drift)
    record = Record()
    METHODS[arguments.method](task, record)
    np.savez(arguments.out, **record.draws)
    arguments.out.with_suffix(".json").write_text(json.dumps({"seconds": record.seconds, **record.facts}))


if __name__ == "__main__":
    main()
