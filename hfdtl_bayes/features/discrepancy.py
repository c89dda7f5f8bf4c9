"""The roofline with a model discrepancy: what physics leaves, as a smooth function of the batch that is small by belief.

Kernels change with the size of the batch: tiles of 64 or 128 rows, other kernels above 16 or 32 sequences, waves of thread blocks. Measured
step times bend around the roofline by 2 to 5 % for it, in other places on other GPUs and models. Without a term for that, a
hundred rows or more force the bends into the coefficients, which then are surer than they are right (Kennedy & O'Hagan 2001,
doi:10.1111/1467-9868.00294; Brynjarsdottir & O'Hagan 2014, doi:10.1088/0266-5611/30/11/114007).

`discrepancy_64` is the relative error of the roofline for steps of 64 tokens; it falls linearly in log2(tokens) to nothing at 32 and 128. All
together are a piecewise linear function of log2(tokens) times the time that the prior means give to the step. Each configuration has its
own (`Level.DISCREPANCY`), around zero with a fixed sd: where the bends of donors lie says little of the next configuration's,
and a pooled sd for each knot was twenty times slower to sample and worse zero-shot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.features import physics, roofline
from hfdtl_bayes.features.feature import Feature, FeatureSet, Level, PriorRange, rows
from hfdtl_bayes.features.sharing import once

FloatArray = NDArray[np.float64]

KNOTS = tuple(2**k for k in range(12))
"""Tokens of a step; below the first and above the last the function is constant."""
BELIEVED = PriorRange(-0.05, 0.05)
"""An sd of 3 %. With half and twice that, GPU steps composed of measured kernels were predicted about as well; with half, intervals were
too narrow more often."""


@once
def roofline_s(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
    """Return the step time that the roofline's prior means give, seconds, shape (n,)."""
    total = np.zeros(len(frame))
    for f in roofline.STEP_TIME.features:
        of_rows = f.level is not Level.CONFIG
        total += f.prior.mean * f.reference * np.asarray(f.compute(frame if of_rows else None, configuration))
    return total


@once
def log2_tokens(frame: pd.DataFrame) -> FloatArray:
    """Return log2 of the tokens of each step, shape (n,)."""
    return np.log2(np.maximum(physics.batch_tokens(frame), 1.0))


def hat(place: int) -> Callable[[pd.DataFrame, ServingConfiguration], FloatArray]:
    """Return the formula of one knot: the roofline's time, weighed by how near log2(tokens) is."""
    weight = np.zeros(len(KNOTS))
    weight[place] = 1.0
    at = np.log2(KNOTS)

    def formula(frame: pd.DataFrame, configuration: ServingConfiguration) -> FloatArray:
        return np.interp(log2_tokens(frame), at, weight) * roofline_s(frame, configuration)

    return formula


STEP_TIME: FeatureSet = replace(
    roofline.STEP_TIME,
    name="roofline-discrepancy",
    description="The roofline, and a relative error of a few per cent that depends on the tokens of the step.",
    features=(
        *roofline.STEP_TIME.features,
        *(
            Feature(
                f"discrepancy_{tokens}", Level.DISCREPANCY, "s",
                f"max(0, 1 - |log2(tokens) - {place}|) * step time at the roofline's prior means",
                rows(hat(place)), BELIEVED, roofline.STEP_TIME.columns,
            )
            for place, tokens in enumerate(KNOTS)
        ),
    ),
)  # fmt: skip
