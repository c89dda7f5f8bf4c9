"""BLIS's own step time, restated: what a vector will do once BLIS has it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.export.vectors import BETA_LABELS, FEATURE_OF_BETA, MICRO
from hfdtl_bayes.features import feature_set

# The order in which BLIS adds its terms; in another order the last bit, and so a truncated microsecond, may differ.
_ORDER = ("b1a", "b1b", "b2a", "b2b", "b3", "b4", "b_EP", "b5", "b6", "b7", "b8")


def blis_step_time_us(beta: Sequence[float], frame: pd.DataFrame, configuration: ServingConfiguration) -> NDArray[np.int64]:
    """Return the step time BLIS computes for each batch, shape (n,), in whole microseconds.

    max(1, trunc(sum of beta * basis)): b1a*pf_compute + b1b*pf_kv + b2a*dc_compute + b2b*dc_kv + b3*weight + b4*tp_comm +
    b_EP*ep + b5*L + b6*B + b7 + b8*nM. Equal to BLIS to the microsecond on recorded runs.

    Parameters
    ----------
    beta : sequence of 10 or 11 float
        In the order of `BETA_LABELS`; with ten, b_EP is b4, as in BLIS.
    frame : DataFrame, n rows
        Columns of a step trace.
    configuration : ServingConfiguration
        Its hardware figures are taken for those of BLIS's hardware file.

    Raises
    ------
    InputError
        If there are not 10 or 11 values (with fewer BLIS computes another model), a step time does not fit 64 bits, or a
        column is missing.
    """
    if len(beta) not in (10, 11):
        raise InputError(f"beta has {len(beta)} values; accepted are 10, or 11 with b_EP last")
    by_label = dict(zip(BETA_LABELS, map(float, beta), strict=False))
    by_label.setdefault("b_EP", by_label["b4"])
    basis = feature_set("blis-physics")
    missing = [c for c in basis.columns if c not in frame.columns]
    if missing:
        raise InputError(f"BLIS's step time needs the column(s) {', '.join(missing)}; found {', '.join(map(str, frame.columns))}")
    total = np.zeros(len(frame))
    for label in _ORDER:
        feature = basis[FEATURE_OF_BETA[label]]
        column = np.asarray(feature.compute(frame, configuration), dtype=float)
        total = total + by_label[label] * (column * MICRO if feature.unit == "s" else column)
    return truncated_us(total)


def truncated_us(total_us: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return step times as BLIS keeps them, shape (n,): whole microseconds, at least 1.

    Raises
    ------
    InputError
        If one does not fit 64 bits.
    """
    if not (np.abs(total_us) < 2.0**63).all():
        raise InputError(f"a step time of {np.max(np.abs(total_us)):.3g} us does not fit 64 bits; check the coefficients' units")
    return np.maximum(1, np.trunc(total_us)).astype(np.int64)
