"""Bayesian transfer of LLM serving latency models: from vLLM traces to BLIS coefficients with error bars.

The verbs of the command line under their Python names: `fit_donors`, `calibrate`, `LatencyPosterior.predict`, `verdict`,
`blis_vectors` (export), `simulate`, `select_rows`, `plan_traffic`, `run_demo`. Names load on first use, so that importing the
package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfdtl_bayes.cli.demo import run_demo
    from hfdtl_bayes.configuration import ServingConfiguration, configuration_from_huggingface, gpu, read_configuration
    from hfdtl_bayes.design import Acquisition, ClosedLoop, Selection, TrafficGrid, TrafficPlan, plan_traffic, select_rows
    from hfdtl_bayes.errors import HfdtlError, RejectedRowsWarning
    from hfdtl_bayes.export import blis_ensemble, blis_flags, blis_vectors, blis_yaml, coefficient_card, go_source
    from hfdtl_bayes.features import Feature, FeatureSet, feature_set, operating_points, register_candidate, register_feature_set
    from hfdtl_bayes.model import (
        LatencyPosterior,
        PriorSettings,
        SamplerSettings,
        fit,
        prior_predictive,
        read_priors,
        sensitivity,
    )
    from hfdtl_bayes.sample import sample_store_path
    from hfdtl_bayes.simulation import Workload, overhead_draws, simulate, speed_drift
    from hfdtl_bayes.statistics import statistics_from_rows
    from hfdtl_bayes.traces import TraceStore, read_requests, read_steps, write_store
    from hfdtl_bayes.traces.readers import ingest
    from hfdtl_bayes.transfer import (
        CrossValidationSettings,
        VerdictSettings,
        calibrate,
        combine_donors,
        cross_validate,
        discover,
        evaluate,
        fit_donors,
        forget,
        held_out_rows,
        promote,
        rank_donors,
        usable_rows,
        variance_sources,
        verdict,
    )

__version__: str

# Where each public name lives; kept equal to the imports above by a test.
_HOME = {
    "Acquisition": "design",
    "ClosedLoop": "design",
    "CrossValidationSettings": "transfer",
    "Feature": "features",
    "FeatureSet": "features",
    "HfdtlError": "errors",
    "LatencyPosterior": "model",
    "PriorSettings": "model",
    "RejectedRowsWarning": "errors",
    "SamplerSettings": "model",
    "Selection": "design",
    "ServingConfiguration": "configuration",
    "TraceStore": "traces",
    "TrafficGrid": "design",
    "TrafficPlan": "design",
    "VerdictSettings": "transfer",
    "Workload": "simulation",
    "blis_ensemble": "export",
    "blis_flags": "export",
    "blis_vectors": "export",
    "blis_yaml": "export",
    "calibrate": "transfer",
    "coefficient_card": "export",
    "combine_donors": "transfer",
    "configuration_from_huggingface": "configuration",
    "cross_validate": "transfer",
    "discover": "transfer",
    "evaluate": "transfer",
    "feature_set": "features",
    "fit": "model",
    "fit_donors": "transfer",
    "forget": "transfer",
    "go_source": "export",
    "gpu": "configuration",
    "held_out_rows": "transfer",
    "ingest": "traces.readers",
    "operating_points": "features",
    "overhead_draws": "simulation",
    "plan_traffic": "design",
    "prior_predictive": "model",
    "promote": "transfer",
    "rank_donors": "transfer",
    "read_configuration": "configuration",
    "read_priors": "model",
    "read_requests": "traces",
    "read_steps": "traces",
    "register_candidate": "features",
    "register_feature_set": "features",
    "run_demo": "cli.demo",
    "sample_store_path": "sample",
    "select_rows": "design",
    "sensitivity": "model",
    "simulate": "simulation",
    "speed_drift": "simulation",
    "statistics_from_rows": "statistics",
    "usable_rows": "transfer",
    "variance_sources": "transfer",
    "verdict": "transfer",
    "write_store": "traces",
}

__all__ = [
    "Acquisition",
    "ClosedLoop",
    "CrossValidationSettings",
    "Feature",
    "FeatureSet",
    "HfdtlError",
    "LatencyPosterior",
    "PriorSettings",
    "RejectedRowsWarning",
    "SamplerSettings",
    "Selection",
    "ServingConfiguration",
    "TraceStore",
    "TrafficGrid",
    "TrafficPlan",
    "VerdictSettings",
    "Workload",
    "__version__",
    "blis_ensemble",
    "blis_flags",
    "blis_vectors",
    "blis_yaml",
    "calibrate",
    "coefficient_card",
    "combine_donors",
    "configuration_from_huggingface",
    "cross_validate",
    "discover",
    "evaluate",
    "feature_set",
    "fit",
    "fit_donors",
    "forget",
    "go_source",
    "gpu",
    "held_out_rows",
    "ingest",
    "operating_points",
    "overhead_draws",
    "plan_traffic",
    "prior_predictive",
    "promote",
    "rank_donors",
    "read_configuration",
    "read_priors",
    "read_requests",
    "read_steps",
    "register_candidate",
    "register_feature_set",
    "run_demo",
    "sample_store_path",
    "select_rows",
    "sensitivity",
    "simulate",
    "speed_drift",
    "statistics_from_rows",
    "usable_rows",
    "variance_sources",
    "verdict",
    "write_store",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its room on first use."""
    value: Any
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  (loaded on first use)

        try:
            value = version("hfdtl-bayes")
        except PackageNotFoundError:
            value = "unknown"
    elif name in _HOME:
        value = getattr(importlib.import_module(f"hfdtl_bayes.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'hfdtl_bayes' has no attribute {name!r}; public are {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted({*globals(), *__all__})
