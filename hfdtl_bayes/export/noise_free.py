"""Recordings without noise: coefficients that give every step time to the whole microsecond BLIS truncated it to.

BLIS's own runs have no noise unless it is asked for, and are what people have who move from one backend to another. Truncation is then the
only error, and it is not independent from step to step: all steps of one composition are cut by the same amount, so a regression is
surely wrong by up to a microsecond over the few compositions there are. But each step says d <= x'b < d + 1 for certain. Where
coefficients satisfy all of these, the posterior is the prior on that polytope, and a point well inside is taken. Where none do, as in
every measured trace, there is noise, and the fit stands.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog

FloatArray = NDArray[np.float64]

_WHOLE = 1e-3
"""Microseconds within which a time counts as whole: what seconds in double precision leave of it."""


@dataclass(frozen=True)
class NoiseFree:
    """Non-negative coefficients that reproduce a recording exactly, shapes (J,): a point in their midst, and the bounds of each."""

    centre: FloatArray
    low: FloatArray
    high: FloatArray


def noise_free_coefficients(design: FloatArray, observed_us: FloatArray) -> NoiseFree | None:
    """Return the coefficients b >= 0 with trunc(design b) equal to every observed time.

    Parameters
    ----------
    design : ndarray, shape (n, J)
        Microseconds per unit coefficient.
    observed_us : ndarray, shape (n,)

    Returns
    -------
    NoiseFree or None
        None if times are not whole microseconds, no coefficients give them all, the compositions do not tell all coefficients apart, or
        those that give them all differ by no more than rounding.
    """
    whole = np.rint(observed_us)
    if not (np.abs(observed_us - whole) < _WHOLE).all():
        return None
    seen = np.unique(np.column_stack([design, whole]), axis=0)
    if len(seen) > len(np.unique(seen[:, :-1], axis=0)):
        return None  # one composition took two times: noise
    x, y = seen[:, :-1], seen[:, -1]
    size = np.abs(x).max(axis=0)
    if (size == 0).any() or np.linalg.matrix_rank(x / size) < x.shape[1]:
        return None
    x = x / size
    # Slack t, the same for both sides of every step, and at most half a microsecond.
    rows = np.vstack([np.column_stack([x, np.ones(len(x))]), np.column_stack([-x, np.ones(len(x))])])
    limit = np.concatenate([y + 1.0, -y])
    found = linprog([*np.zeros(x.shape[1]), -1.0], A_ub=rows, b_ub=limit, bounds=[(0, None)] * x.shape[1] + [(None, None)])
    if found.x is None or found.x[-1] <= 0:
        return None
    bounds = np.empty((2, x.shape[1]))
    inside = [found.x[:-1]]
    for k in range(x.shape[1]):
        for side, sign in enumerate((1.0, -1.0)):
            goal = np.zeros(x.shape[1])
            goal[k] = sign
            edge = linprog(goal, A_ub=rows[:, :-1], b_ub=limit, bounds=(0, None))
            assert edge.x is not None, edge.message  # the polytope has a deepest point, so it is not empty
            bounds[side, k] = edge.x[k]
            inside.append(edge.x)
    # The mean of the deepest point and the extremes, of which there may be many as deep: inside, because the polytope is convex.
    centre = np.mean(inside, axis=0) / size
    if not (np.trunc(design @ centre) == whole).all():
        return None  # thinner than rounding: times that were whole before they were cut
    return NoiseFree(centre, bounds[0] / size, bounds[1] / size)
