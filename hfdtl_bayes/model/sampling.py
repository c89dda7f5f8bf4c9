"""How a sampler runs and what a run leaves, whatever the engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SamplerSettings:
    """How a sampler runs: Hamiltonian Monte Carlo of the exact engine, NUTS of the others."""

    draws: int = 500
    """Draws kept per chain."""
    tune: int = 150
    """Draws per chain used to adapt, then dropped."""
    chains: int = 8
    """Chains from different starting points: what R-hat compares. The exact engine moves them in step, so that eight cost little more
    than two."""
    target_accept: float = 0.95
    """Share of proposals to be accepted. More, up to 0.99, takes smaller steps where divergences are reported."""
    thin: int = 1
    """Draws made for each one kept, in the exact engine: more for a posterior of which chains only slowly see the whole."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be run or judged.

        Raises
        ------
        InputError
            Unless draws and tune are at least 50, chains at least 2, thin at least 1 and target_accept within (0.5, 1).
        """
        if self.draws < 50 or self.tune < 50:
            raise InputError(f"draws ({self.draws}) and tune ({self.tune}) must both be at least 50")
        if self.chains < 2:
            raise InputError(f"chains must be at least 2, found {self.chains}: R-hat compares chains")
        if self.thin < 1:
            raise InputError(f"thin must be at least 1, found {self.thin}")
        if not 0.5 < self.target_accept < 1:
            raise InputError(f"target_accept must lie between 0.5 and 1, found {self.target_accept}")


@dataclass(frozen=True)
class SamplerRun:
    """What a run left.

    Attributes
    ----------
    x : ndarray, shape (chains * draws, dimensions)
        Unconstrained coordinates, chain by chain.
    sample_stats : Dataset
        Dims chain, draw: diverging, energy, lp, n_steps, depth, step_size.
    sampler : str
        Name and version.
    """

    x: FloatArray
    sample_stats: xr.Dataset
    sampler: str
