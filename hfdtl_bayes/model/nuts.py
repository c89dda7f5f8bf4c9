"""NUTS on a log density, by nutpie: what samples the PyMC models."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.errors import ConvergenceError
from hfdtl_bayes.model.progress import progress
from hfdtl_bayes.model.sampling import SamplerRun, SamplerSettings

FloatArray = NDArray[np.float64]


def run_nuts(
    log_density: Callable[[FloatArray], tuple[float, FloatArray]],
    start: FloatArray,
    settings: SamplerSettings,
    *,
    seed: int,
    label: str,
    show_progress: bool,
) -> SamplerRun:
    """Sample a log density.

    Parameters
    ----------
    log_density : callable
        Coordinates to (value, gradient).
    start : ndarray, shape (dimensions,)
        Centre of the starting points, which lie within 0.3 of it.
    settings : SamplerSettings
    seed : int
        The same seed gives the same draws.
    label : str
        What the progress bar calls the work.
    show_progress : bool

    Raises
    ------
    ConvergenceError
        If the sampler cannot start or breaks down.
    """
    import nutpie  # noqa: PLC0415  (half a second to import, and only fitting needs it)
    from nutpie.compiled_pyfunc import from_pyfunc  # noqa: PLC0415

    def guarded(x: FloatArray) -> tuple[float, FloatArray]:
        # A trajectory may run to where numbers overflow; there the density is zero and the step is rejected as divergent.
        with np.errstate(all="ignore"):
            try:
                value, gradient = log_density(x)
            except np.linalg.LinAlgError:
                return -np.inf, np.zeros(len(x))
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            return -np.inf, np.zeros(len(x))
        return value, gradient

    def initial_point(seed: int) -> FloatArray:
        return np.asarray(start + np.random.default_rng(seed).uniform(-0.3, 0.3, len(start)))

    total = settings.chains * (settings.draws + settings.tune)
    with progress(label, total, enabled=show_progress) as advance:

        def expand(x: FloatArray) -> dict[str, FloatArray]:
            advance()
            return {"x": x}

        runnable = from_pyfunc(
            len(start),
            lambda: guarded,
            lambda *_: expand,
            [np.dtype("float64")],
            [(len(start),)],
            ["x"],
            make_initial_point_fn=initial_point,
        )
        try:
            trace = nutpie.sample(
                runnable,
                draws=settings.draws,
                tune=settings.tune,
                chains=settings.chains,
                cores=1,
                seed=seed,
                target_accept=settings.target_accept,
                save_warmup=False,
                progress_bar=False,
            )
        except RuntimeError as error:
            raise ConvergenceError(f"the sampler could not run: {error}. Check the statistics and the priors") from error
    x = trace["posterior"]["x"].to_numpy()
    if x.shape[:2] != (settings.chains, settings.draws) or not np.isfinite(x).all():
        # nutpie answers Ctrl-C by returning the draws made so far, chains not begun filled with NaN.
        raise KeyboardInterrupt
    keep = [n for n in ("diverging", "energy", "logp", "n_steps", "depth", "step_size") if n in trace["sample_stats"]]
    stats = trace["sample_stats"].to_dataset()[keep].rename({"logp": "lp"} if "logp" in keep else {})
    return SamplerRun(x.reshape(-1, x.shape[-1]), stats, f"nutpie {nutpie.__version__} NUTS")
