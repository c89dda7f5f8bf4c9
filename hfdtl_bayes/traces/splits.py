"""Splits of a trace into calibration and held-out rows: by regime or by time block, never by random row.

Requests that run together share steps, and the machine's speed drifts, so neighbouring rows are not independent: a
random split would test a model on rows it has all but seen.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.errors import InputError

WARMUP_REGIMES = ("warmup", "drain")
"""Regimes that are not steady serving: compilation and cache warm-up before, the tail after the last arrival."""


def drop_warmup(frame: pd.DataFrame, regimes: Collection[str] = WARMUP_REGIMES) -> pd.DataFrame:
    """Return the rows whose regime is not a warm-up regime."""
    return frame[~frame["regime"].isin(list(regimes))]


def time_blocks(frame: pd.DataFrame, block_length: int) -> NDArray[np.int64]:
    """Assign rows to blocks of `block_length` rows, or of steps where `step_id` is known; none spans two regimes.

    By step number, a thinned selection keeps the blocks of the full recording, and rows on two sides of a gap of
    `block_length` steps are never in one block.

    Returns
    -------
    ndarray of int, shape (n,)
        Block number of each row, increasing along the frame.

    Raises
    ------
    InputError
        If `block_length` is below 1.
    """
    if block_length < 1:
        raise InputError(f"block_length must be at least 1 row, found {block_length}")
    n = len(frame)
    if n == 0:
        return np.zeros(0, dtype=np.int64)
    new_stretch = np.zeros(n, dtype=bool)
    regime = frame["regime"].to_numpy()
    new_stretch[1:] = regime[1:] != regime[:-1]
    if "step_id" in frame.columns:
        key = np.floor_divide(frame["step_id"].to_numpy(), block_length)
        change = new_stretch.copy()
        change[1:] |= key[1:] != key[:-1]
        return np.cumsum(change).astype(np.int64)
    position = np.arange(n) - np.maximum.accumulate(np.where(new_stretch, np.arange(n), 0))
    change = new_stretch | ((position % block_length == 0) & (position > 0))
    return np.cumsum(change).astype(np.int64)


def split_by_regime(frame: pd.DataFrame, calibration_regimes: str | Collection[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into (rows of the given regimes, all others).

    Raises
    ------
    InputError
        If a regime is not in the frame or one side would be empty.
    """
    if isinstance(calibration_regimes, str):
        calibration_regimes = [calibration_regimes]
    known = sorted(set(frame["regime"]))
    unknown = [r for r in calibration_regimes if r not in known]
    if unknown:
        raise InputError(f"unknown regime(s) {', '.join(unknown)}; the trace has {', '.join(known)}")
    inside = frame["regime"].isin(list(calibration_regimes))
    if inside.all() or not inside.any():
        raise InputError(
            f"splitting by regimes {', '.join(calibration_regimes)} leaves no {'held-out' if inside.all() else 'calibration'} "
            f"rows; the trace has {', '.join(known)}"
        )
    return frame[inside], frame[~inside]


def split_by_blocks(frame: pd.DataFrame, held_out_fraction: float, block_length: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split into (calibration, held-out) rows, holding out the last blocks of every regime.

    Raises
    ------
    InputError
        If the fraction is not within (0, 1) or one side would be empty.
    """
    if not 0 < held_out_fraction < 1:
        raise InputError(f"held_out_fraction must lie between 0 and 1, found {held_out_fraction}")
    blocks = time_blocks(frame, block_length)
    held = np.zeros(len(frame), dtype=bool)
    for regime in pd.unique(frame["regime"]):
        inside = np.flatnonzero((frame["regime"] == regime).to_numpy())
        own = np.unique(blocks[inside])
        out = own[len(own) - round(held_out_fraction * len(own)) :]
        held[inside] = np.isin(blocks[inside], out)
    if held.all() or not held.any():
        raise InputError(
            f"a trace of {len(frame)} rows in blocks of {block_length} cannot be split {held_out_fraction:.0%}: give more "
            "rows or a shorter block"
        )
    return frame[~held], frame[held]
