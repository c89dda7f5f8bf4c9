"""The posterior object: what a fit knows, how it predicts, how it is kept."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import HfdtlError, InputError, MissingInputError, PosteriorFileError, StatisticsError, UnknownNameError
from hfdtl_bayes.features import FeatureSet, PriorRange, feature_set, fingerprint, fingerprint_differences
from hfdtl_bayes.files import atomic
from hfdtl_bayes.model.diagnostics import Convergence, ConvergenceSettings, convergence, mixing
from hfdtl_bayes.model.draws import Draws
from hfdtl_bayes.model.exact_engine import sample_exact
from hfdtl_bayes.model.layout import check_posterior, hardware_names, in_order
from hfdtl_bayes.model.likelihoods import SHAPES, check_likelihood
from hfdtl_bayes.model.priors import PositiveRange, PriorSettings, deviation_scale
from hfdtl_bayes.model.sampling import SamplerSettings
from hfdtl_bayes.statistics import (
    ConfigStatistics,
    EffectiveRows,
    ScaledRows,
    config_to_constant,
    effective_rows,
    input_hash,
    package_version,
    rows_from_dataset,
    rows_to_dataset,
    statistics_from_dataset,
    statistics_to_dataset,
)

FloatArray = NDArray[np.float64]

FILE_FORMAT = 4
ENGINES = ("exact", "pymc", "rows")
_QUANTILES = (0.025, 0.5, 0.975)


@dataclass(frozen=True, repr=False)
class LatencyPosterior:
    """The posterior of the hierarchical latency model.

    Attributes
    ----------
    tree : DataTree
        Groups `posterior`, `sample_stats`, `observed_data` with ArviZ's conventions.
    feature_set : FeatureSet
    priors : PriorSettings
    statistics : tuple of ConfigStatistics
        Of every configuration fitted, donors first.
    target : str or None
        config_id of the calibrated target; None for a fit of donors alone.
    seed : int
    calibration_rows : ndarray of int
        Row numbers, in the frame the target was calibrated from, of its calibration rows; empty for a fit of donors alone.
    likelihood : str
        How single rows are distributed; see `hfdtl_bayes.model.likelihoods`.
    rows : tuple of ScaledRows
        Of the engine "rows", what it was fitted to; empty for the others.
    """

    tree: xr.DataTree
    feature_set: FeatureSet
    priors: PriorSettings
    statistics: tuple[ConfigStatistics, ...]
    target: str | None
    seed: int
    calibration_rows: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    likelihood: str = "gaussian"
    rows: tuple[ScaledRows, ...] = ()

    def __repr__(self) -> str:
        """Return one line: what was fitted to what, and whether the sampler converged."""
        target = f", target {self.target}" if self.target else ""
        likelihood = "" if self.likelihood == "gaussian" else f", {self.likelihood}"
        less = dict(self.priors.discounts)
        donors = (f"{d} (counts for {less[d]:.3g})" if d in less else d for d in self.donors)
        return (
            f"<LatencyPosterior of {self.feature_set.quantity}, {self.feature_set.name}{likelihood}: donors {', '.join(donors)}{target}; "
            f"{self.convergence()}>"
        )

    @property
    def config_ids(self) -> tuple[str, ...]:
        """Configurations fitted, in order."""
        return tuple(s.config_id for s in self.statistics)

    @property
    def engine(self) -> str:
        """What made the draws: an engine of `fit`, or reweighting of donors' draws.

        "conditional" where they were conditioned on a target's rows, "reweighted" where a donor was forgotten.
        """
        return str(self.tree["sample_stats"].attrs.get("engine", "exact"))

    @property
    def donors(self) -> tuple[str, ...]:
        """Donor configurations."""
        return tuple(c for c in self.config_ids if c != self.target)

    @property
    def donor_statistics(self) -> tuple[ConfigStatistics, ...]:
        """Statistics of the donors."""
        return tuple(s for s in self.statistics if s.config_id != self.target)

    @property
    def donor_rows(self) -> tuple[ScaledRows, ...]:
        """Rows of the donors; empty unless the engine was "rows"."""
        return tuple(r for r in self.rows if r.config_id != self.target)

    @property
    def input_hash(self) -> str:
        """SHA-256 of the statistics."""
        return input_hash(self.statistics)

    def draws_of(self, name: str) -> FloatArray:
        """Return all draws of a variable, shape (S, ...); those of the drift are zero where the priors say that there is none."""
        if name.startswith("omega") and self.priors.drift is None:
            return np.zeros_like(self.draws_of(name.replace("omega", "sigma")))
        values = self.tree["posterior"][name].to_numpy()
        return np.asarray(values.reshape(-1, *values.shape[2:]), dtype=float)

    def convergence(self, settings: ConvergenceSettings | None = None) -> Convergence:
        """Return the sampler's diagnostics, judged by `settings`."""
        return convergence(self.tree, settings, self._mixing)

    @cached_property
    def _mixing(self) -> tuple[float, float, float]:
        # Half a second, asked for by calibration, verdict and command line alike; draws are never changed in place.
        return mixing(self.tree)

    def configuration(self, config_id: str) -> ServingConfiguration:
        """Return a fitted configuration.

        Raises
        ------
        InputError
            If it was not fitted.
        """
        for s in self.statistics:
            if s.config_id == config_id:
                return s.configuration
        raise InputError(f"configuration {config_id!r} was not fitted; this posterior holds {', '.join(self.config_ids)}")

    def draws(self, configuration: ServingConfiguration, seed: int = 0) -> Draws:
        """Return draws for a configuration: its own if it was fitted, otherwise those of a NEW one from the population.

        For a new configuration theta = A phi + w_h + sqrt(1 - rho) * tau * scale * Normal(0, 1), with A phi the population's
        coefficients for these config features and w_h the effect of its hardware, drawn anew from Normal(0, rho (tau *
        scale)^2) if no fitted configuration runs on it, and its discrepancy from its prior; log sigma and log omega are drawn around
        their typical values. No fitted group is reused.

        Parameters
        ----------
        configuration : ServingConfiguration
        seed : int
            For the draws of a new configuration.

        Raises
        ------
        InputError
            If a configuration of this name was fitted but differs from the one given.
        """
        if configuration.config_id in self.config_ids:
            if self.configuration(configuration.config_id) != configuration:
                raise InputError(
                    f"configuration {configuration.config_id!r} differs from the one of that name that was fitted; give "
                    "the new one another config_id"
                )
            c = self.config_ids.index(configuration.config_id)
            theta = self.draws_of("theta")[:, c]
            errors = self.draws_of("sigma")[:, c], self.draws_of("omega")[:, c]
            return Draws(theta, theta.mean(axis=0), *errors, True, self.likelihood, self.shape_draws())
        # Two new configurations deviate from the population independently of each other.
        rng = np.random.default_rng([seed, zlib.crc32(configuration.config_id.encode())])
        centre = self.population_draws(configuration)
        theta = centre + self.deviation_sd(configuration) * rng.standard_normal(centre.shape)
        return Draws(theta, centre.mean(axis=0), *self.new_errors(rng), False, self.likelihood, self.shape_draws())

    def shape_draws(self) -> dict[str, FloatArray]:
        """Return draws of what gives the likelihood its shape, by name, shape (S,); empty for the Gaussian."""
        return {name: self.draws_of(name) for name in SHAPES[self.likelihood]}

    def new_errors(self, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
        """Return draws of sigma and omega of a configuration drawn from the population, shapes (S,)."""

        def drawn(name: str) -> FloatArray:
            spread = self.draws_of(f"{name}_spread")
            return np.asarray(self.draws_of(f"{name}_typical") * np.exp(spread * rng.standard_normal(spread.shape)))

        return drawn("sigma"), drawn("omega")

    def _hardware(self, configuration: ServingConfiguration) -> int | None:
        """Return the index of a configuration's hardware among those fitted; None if it is new."""
        names = hardware_names(self.statistics)
        name = configuration.hardware.name
        return names.index(name) if name in names else None

    def population_draws(self, configuration: ServingConfiguration) -> FloatArray:
        """Return draws of the centre that a configuration's coefficients deviate from, shape (S, K).

        A phi, plus the effect of its hardware where a fitted configuration runs on it; zero for the discrepancy.
        """
        centre = np.concatenate([self.draws_of("beta"), self.draws_of("delta")], axis=1)
        if self.feature_set.config:
            gamma = self.draws_of("gamma")
            centre[:, len(self.feature_set.base)] += gamma @ config_to_constant(self.feature_set, configuration)
        h = self._hardware(configuration)
        centre = centre if h is None else centre + self.draws_of("hardware_effect")[:, h]
        return np.pad(centre, ((0, 0), (0, len(self.feature_set.discrepancy))))

    def deviation_sd(self, configuration: ServingConfiguration) -> FloatArray:
        """Return draws of the sd of a configuration's coefficients around `population_draws`, shape (S, K)."""
        own = self.draws_of("tau") * deviation_scale(self.feature_set)
        if self._hardware(configuration) is not None:
            own = np.sqrt(1.0 - self.draws_of("hardware_share"))[:, None] * own
        sd = self.feature_set.discrepancy_sd
        return np.concatenate([own, np.broadcast_to(sd, (len(own), len(sd)))], axis=1)

    def _design(self, frame: pd.DataFrame, configuration: ServingConfiguration) -> tuple[FloatArray, NDArray[np.bool_]]:
        """Return the design of rows, zero outside the feature set's support, and which rows it supports."""
        supported = self.feature_set.supported(frame, configuration)
        return np.where(supported[:, None], self.feature_set.design(frame, configuration), 0.0), supported

    def expected_s(self, frame: pd.DataFrame, configuration: ServingConfiguration, seed: int = 0) -> FloatArray:
        """Return the posterior mean of the expected value of each row, shape (n,), in seconds; `mean_s` of `predict`."""
        design, _ = self._design(frame, configuration)
        return np.asarray(design @ self.draws(configuration, seed).mean)

    def scale_s(self, expected_s: FloatArray, configuration: ServingConfiguration) -> FloatArray:
        """Return the scale s that errors are relative to, shape (n,): the expected value or the floor, the larger."""
        return np.maximum(expected_s, self.feature_set.noise_floor(configuration))

    def predict(self, frame: pd.DataFrame, configuration: ServingConfiguration, *, seed: int = 0) -> pd.DataFrame:
        """Predict rows of a configuration, fitted or never seen.

        Parameters
        ----------
        frame : DataFrame, n rows
            Batch compositions: the columns the feature set reads.
        configuration : ServingConfiguration
        seed : int

        Returns
        -------
        DataFrame, n rows
            Of a new observation: `mean_s`, `sd_s`, `q2.5_s`, `q50_s`, `q97.5_s`; of its expected value: `sd_mean_s`,
            `q2.5_mean_s`, `q50_mean_s`, `q97.5_mean_s`. Seconds. The sd of a new observation includes noise and drift. All zero in
            rows outside the feature set's support.

        Raises
        ------
        InputError
            If columns are missing or not finite.
        """
        draws = self.draws(configuration, seed)
        design, supported = self._design(frame, configuration)
        expected = design @ draws.mean
        scale = np.where(supported, self.scale_s(expected, configuration), 0.0)
        error_sd = np.hypot(draws.sigma, draws.omega)
        out = {name: np.empty(len(frame)) for name in PREDICTION_COLUMNS}
        for part, mean, new in draws.predictive(design, scale, seed):
            out["mean_s"][part] = expected[part]
            # Var of a new observation = Var of the mean + mean of the error variance; exact, where draws are noisy.
            error_variance = float(np.mean(error_sd**2)) * scale[part] ** 2
            out["sd_mean_s"][part] = mean.std(axis=0)
            out["sd_s"][part] = np.sqrt(mean.var(axis=0) + error_variance)
            for suffix, values in (("_s", new), ("_mean_s", mean)):
                low, middle, high = np.quantile(values, _QUANTILES, axis=0)
                out[f"q2.5{suffix}"][part], out[f"q50{suffix}"][part] = low, middle
                out[f"q97.5{suffix}"][part] = high
        return pd.DataFrame(out, index=frame.index)

    def predictive_draws(
        self, frame: pd.DataFrame, configuration: ServingConfiguration, *, seed: int = 0
    ) -> Iterator[tuple[slice, FloatArray]]:
        """Yield draws of new observations part by part: which rows, and the draws, shape (S, rows), seconds.

        They are those that `predict` summarises, so parameters and errors are the same.
        """
        draws = self.draws(configuration, seed)
        design, supported = self._design(frame, configuration)
        scale = np.where(supported, self.scale_s(design @ draws.mean, configuration), 0.0)
        for part, _, new in draws.predictive(design, scale, seed):
            yield part, new

    def predict_block_means(
        self, frame: pd.DataFrame, configuration: ServingConfiguration, blocks: NDArray[np.int64], *, seed: int = 0
    ) -> pd.DataFrame:
        """Predict the mean of each block of rows, which share one drift; rows outside the feature set's support count as zero.

        Returns
        -------
        DataFrame, one row per block, indexed by block number
            `rows`, `mean_s`, `sd_s`, `q2.5_s`, `q97.5_s` of the mean over the block of new observations.
        """
        draws = self.draws(configuration, seed)
        design, supported = self._design(frame, configuration)
        scale = np.where(supported, self.scale_s(design @ draws.mean, configuration), 0.0)
        numbers, index, counts = np.unique(blocks, return_inverse=True, return_counts=True)
        rng = np.random.default_rng([seed, 2])
        mean_design = np.zeros((len(numbers), design.shape[1]))
        np.add.at(mean_design, index, design)
        mean_design /= counts[:, None]
        mean_scale = np.bincount(index, scale) / counts
        root_square = np.sqrt(np.bincount(index, scale**2)) / counts
        if draws.likelihood == "gaussian":
            new = draws.theta @ mean_design.T
            new += draws.omega[:, None] * mean_scale * rng.standard_normal(new.shape)
            new += draws.sigma[:, None] * root_square * rng.standard_normal(new.shape)
        else:
            new = draws.block_means(draws.theta @ design.T, scale, index, rng)
        low, high = np.quantile(new, (0.025, 0.975), axis=0)
        return pd.DataFrame(
            {"rows": counts, "mean_s": mean_design @ draws.mean, "sd_s": new.std(axis=0), "q2.5_s": low, "q97.5_s": high},
            index=pd.Index(numbers, name="block"),
        )

    def effective_rows(self) -> tuple[EffectiveRows, ...]:
        """Return how many independent rows the rows of each configuration are worth; empty unless errors are Gaussian."""
        if self.likelihood != "gaussian":
            return ()
        sigma, omega = self.draws_of("sigma"), self.draws_of("omega")
        return tuple(effective_rows(s, sigma[:, c], omega[:, c]) for c, s in enumerate(self.statistics))

    def coefficient_table(self) -> pd.DataFrame:
        """Return every pooled coefficient with level, unit, posterior mean, sd, 95 % interval and P(< 0).

        The discrepancy is left out: it is what the model gets wrong in one configuration, and no number to be used elsewhere. In
        physical units (the reference multiplied in). Rows: population coefficients, then each configuration's own.
        """
        rows = []

        def add(config: str, feature_name: str, values: FloatArray) -> None:
            f = self.feature_set[feature_name]
            low, high = np.quantile(values, (0.025, 0.975))
            rows.append(
                {
                    "config": config,
                    "feature": f.name,
                    "level": str(f.level),
                    "unit": f.coefficient_unit,
                    "mean": values.mean() * f.reference,
                    "sd": values.std() * f.reference,
                    "q2.5": low * f.reference,
                    "q97.5": high * f.reference,
                    "p_negative": float(np.mean(values < 0)),
                }
            )

        for name, features in (
            ("beta", self.feature_set.base),
            ("gamma", self.feature_set.config),
            ("delta", self.feature_set.residual),
        ):
            draws = self.draws_of(name) if features else np.empty((0, 0))
            for i, f in enumerate(features):
                add("population", f.name, draws[:, i])
        theta = self.draws_of("theta")
        for c, config_id in enumerate(self.config_ids):
            for k, name in enumerate(self.feature_set.pooled_names):
                add(config_id, name, theta[:, c, k])
        return pd.DataFrame(rows)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the posterior as netCDF, atomically; returns the path."""
        path = Path(path)
        tree = self.tree.copy()
        for s in self.statistics:
            dataset = statistics_to_dataset(s, self.feature_set)
            tree[f"statistics/{s.config_id}"] = xr.DataTree(dataset)
        for r in self.rows:
            tree[f"rows/{r.config_id}"] = xr.DataTree(rows_to_dataset(r))
        tree["calibration"] = xr.DataTree(xr.Dataset({"row": ("calibration_row", self.calibration_rows)}))
        tree.attrs["hfdtl_bayes"] = json.dumps(self._header())
        # Made in memory, for HDF5 brings the whole process down when the disk it writes to is full.
        with tree.to_netcdf(engine="h5netcdf") as view:
            content = bytes(view)
        with atomic(path) as part:
            part.write_bytes(content)
        return path

    def _header(self) -> dict[str, Any]:
        return {
            "format": FILE_FORMAT,
            "package_version": package_version(),
            "feature_set": self.feature_set.name,
            "quantity": self.feature_set.quantity,
            "features": feature_card(self.feature_set),
            "fingerprint": fingerprint(self.feature_set),
            "own_priors": {n: asdict(self.feature_set[n].prior) for n in self.feature_set.own_priors},
            "priors": asdict(self.priors),
            "donors": list(self.donors),
            "target": self.target,
            "configs": list(self.config_ids),
            "rows": {s.config_id: s.rows for s in self.statistics},
            "input_hash": self.input_hash,
            "seed": self.seed,
            "likelihood": self.likelihood,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyPosterior:
        """Read a posterior and check it.

        Raises
        ------
        MissingInputError
            If there is no such file.
        PosteriorFileError
            If it is cut short, not a posterior of this package, of another file format, of a feature set that is not
            registered or has changed (be it in a constant behind a formula), if its statistics do not match their hash, or if
            its draws do not belong to them.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingInputError(f"no posterior at {path}")
        try:
            with xr.open_datatree(path, engine="h5netcdf") as opened:
                tree = opened.load()
            header = json.loads(tree.attrs["hfdtl_bayes"])
        except KeyError:
            raise PosteriorFileError(f"{path} is netCDF but not a posterior written by hfdtl_bayes") from None
        except Exception as error:  # what HDF5 and xarray raise for damaged files has no common type
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PosteriorFileError(f"{path} cannot be read as a posterior: {reason}. Copy or fit it again") from None
        try:
            return cls._rebuild(tree, header, path)
        except PosteriorFileError:
            raise
        except (HfdtlError, KeyError, TypeError, ValueError) as error:
            raise PosteriorFileError(f"{path} is not a complete posterior: {error}. Fit it again") from error

    @classmethod
    def _rebuild(cls, tree: xr.DataTree, header: dict[str, Any], path: Path) -> LatencyPosterior:
        if not isinstance(header, dict):
            raise PosteriorFileError(f"{path} is not a complete posterior: its header is damaged. Fit it again")
        if header.get("format") != FILE_FORMAT:
            raise PosteriorFileError(
                f"{path} has file format {header.get('format')!r}, written by version {header.get('package_version')}; this "
                f"version reads format {FILE_FORMAT}. Fit it again"
            )
        features = feature_set(header["feature_set"], header["quantity"])
        features = features.with_priors({n: PriorRange(**r) for n, r in header.get("own_priors", {}).items()})
        stored, now = header["features"], feature_card(features)
        changed = sorted(n for n in {*stored, *now} if stored.get(n) != now.get(n))
        # The formula's text may be the same and a constant in it another.
        changed = changed or fingerprint_differences(header["fingerprint"], fingerprint(features))
        if changed:
            raise PosteriorFileError(
                f"{path} was fitted with version {header['package_version']}, where feature(s) {', '.join(changed)} of "
                f"{features.name!r} were defined otherwise; its coefficients would be misread. Fit it again"
            )
        settings: dict[str, Any] = {k: PositiveRange(**v) if isinstance(v, dict) else v for k, v in header["priors"].items()}
        priors = PriorSettings(**settings)
        nodes = (tree[f"statistics/{c}"] for c in header["configs"])
        statistics = tuple(statistics_from_dataset(n.to_dataset(inherit=False)) for n in nodes if isinstance(n, xr.DataTree))
        if input_hash(statistics) != header["input_hash"]:
            raise PosteriorFileError(f"{path}: the statistics do not match their hash; the file was altered. Fit it again")
        kept = {name: tree[name].to_dataset() for name in ("posterior", "sample_stats", "observed_data")}
        kept["posterior"] = in_order(kept["posterior"])
        likelihood = header.get("likelihood", "gaussian")
        check_likelihood(likelihood)
        check_posterior(kept["posterior"], statistics, features, likelihood, drift=priors.drift is not None)
        stored_rows = [tree[f"rows/{c}"] for c in header["configs"]] if "rows" in tree else []
        rows = tuple(
            rows_from_dataset(n.to_dataset(inherit=False), s)
            for n, s in zip(stored_rows, statistics, strict=False)
            if isinstance(n, xr.DataTree)
        )
        return cls(
            xr.DataTree.from_dict(kept),
            features,
            priors,
            statistics,
            header["target"],
            int(header["seed"]),
            tree["calibration"]["row"].to_numpy().astype(np.int64),
            likelihood,
            rows,
        )


PREDICTION_COLUMNS = (
    "mean_s",
    "sd_s",
    "q2.5_s",
    "q50_s",
    "q97.5_s",
    "sd_mean_s",
    "q2.5_mean_s",
    "q50_mean_s",
    "q97.5_mean_s",
)


def feature_card(features: FeatureSet) -> dict[str, dict[str, Any]]:
    """Return what defines the meaning of each coefficient: level, unit, formula, reference and prior."""
    return {
        f.name: {
            "level": str(f.level),
            "unit": f.unit,
            "coefficient_unit": f.coefficient_unit,
            "formula": f.formula,
            "reference": f.reference,
            "prior": [f.prior.low, f.prior.high],
        }
        for f in features.features
    }


def fit(
    statistics: Sequence[ConfigStatistics],
    features: FeatureSet,
    priors: PriorSettings | None = None,
    settings: SamplerSettings | None = None,
    *,
    target: str | None = None,
    engine: str = "exact",
    likelihood: str = "gaussian",
    rows: Sequence[ScaledRows] = (),
    seed: int = 0,
    show_progress: bool = True,
) -> LatencyPosterior:
    """Fit the hierarchical model to the statistics of donors, and of a target if one is named.

    Parameters
    ----------
    statistics : sequence of ConfigStatistics
        One per configuration.
    features : FeatureSet
        The set the statistics were built with.
    priors : PriorSettings, optional
        Discounts of configurations that are not fitted, or of the target, are left out.
    settings : SamplerSettings, optional
    target : str, optional
        config_id of the statistics that are a target's.
    engine : {"exact", "pymc", "rows"}
        "exact" integrates the coefficients out and samples only the scales; "pymc" samples the PyMC model, the definition; "rows"
        the PyMC model on rows. With the Gaussian likelihood all have the same posterior; see `hfdtl_bayes.model.exact`.
    likelihood : {"gaussian", "student_t", "lognormal", "outliers"}
        How single rows are distributed; others than the Gaussian need the engine "rows".
    rows : sequence of ScaledRows
        For the engine "rows": those that `statistics` are of, see `scaled_rows`.
    seed : int
    show_progress : bool

    Returns
    -------
    LatencyPosterior

    Raises
    ------
    StatisticsError
        If the statistics cannot be fitted together, or the rows are not theirs.
    UnknownNameError
        If there is no such engine or likelihood, or the engine cannot fit the likelihood, or not with donors discounted.
    ConvergenceError
        If the sampler cannot run.
    """
    if engine not in ENGINES:
        raise UnknownNameError(f"unknown engine {engine!r}; known are {', '.join(ENGINES)}")
    check_likelihood(likelihood, engine)
    # A target counts in full, whatever was said of it as a donor.
    priors = (priors or PriorSettings()).discounts_of([s.config_id for s in statistics if s.config_id != target])
    if engine == "rows" and priors.discounts:
        raise UnknownNameError(
            f'engine "rows" cannot discount donors ({", ".join(c for c, _ in priors.discounts)}): the coefficients of a donor that counts '
            "for less are integrated out, for which its errors must be Gaussian; use engine exact or pymc"
        )
    label = f"sampling {target}" if target else f"sampling {len(statistics)} donors"
    if engine == "rows":
        from hfdtl_bayes.model.rows_engine import sample_rows  # noqa: PLC0415  (PyMC takes seconds to import)

        if input_hash([r.statistics for r in rows]) != input_hash(statistics):
            raise StatisticsError(
                f'engine "rows" needs the rows that the statistics of {", ".join(s.config_id for s in statistics)} are of, found those '
                f"of {', '.join(r.config_id for r in rows) or 'none'}; give rows=[...] from scaled_rows, and their statistics"
            )
        tree = sample_rows(
            rows, features, priors, settings, likelihood=likelihood, seed=seed, show_progress=show_progress, label=label
        )
        return LatencyPosterior(tree, features, priors, tuple(statistics), target, seed, likelihood=likelihood, rows=tuple(rows))
    if engine == "pymc":
        from hfdtl_bayes.model.pymc_engine import sample_pymc as sample  # noqa: PLC0415
    else:
        sample = sample_exact
    tree = sample(statistics, features, priors, settings, seed=seed, show_progress=show_progress, label=label)
    return LatencyPosterior(tree, features, priors, tuple(statistics), target, seed)
