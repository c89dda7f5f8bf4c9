"""Folds of a cross-validation over configurations: which donors stay, which are left out, and what of their rows is seen.

A fold leaves out everything that shares one value: a configuration, an LLM, a kind of hardware, a tensor-parallel degree, or a
workload (a regime label; then one configuration as well, so that what is predicted is new in both).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from hfdtl_bayes.configuration import ServingConfiguration
from hfdtl_bayes.errors import InputError
from hfdtl_bayes.statistics import ConfigStatistics
from hfdtl_bayes.traces import time_blocks

LEAVE_OUT = ("configuration", "model", "hardware", "tp", "workload")


@dataclass(frozen=True)
class Fold:
    """One refit and whom it predicts.

    Attributes
    ----------
    leave_out : str
        One of `LEAVE_OUT`.
    value : str
        What is left out: a config_id, the name of an LLM or of hardware, "tp2", or a regime.
    donors, left_out : tuple of str
        config_ids that stay, and those predicted.
    regime : str or None
        The regime whose rows neither donors nor calibration see, and which alone is predicted.
    """

    leave_out: str
    value: str
    donors: tuple[str, ...]
    left_out: tuple[str, ...]
    regime: str | None = None


@dataclass(frozen=True)
class Skipped:
    """What a cross-validation could not score, and why.

    Attributes
    ----------
    leave_out, value : str
        As of `Fold`.
    config : str
        The configuration concerned; empty for the fold as a whole.
    reason : str
    """

    leave_out: str
    value: str
    config: str
    reason: str

    def __str__(self) -> str:
        """Return one line for a person."""
        own = f", {self.config}" if self.config and self.config != self.value else ""
        return f"leave out {self.leave_out} {self.value}{own}: {self.reason}"


def _value(kind: str, configuration: ServingConfiguration) -> str:
    if kind == "model":
        return configuration.llm.name
    if kind == "hardware":
        return configuration.hardware.name
    return f"tp{configuration.engine.tensor_parallel}" if kind == "tp" else configuration.config_id


def plan_folds(
    kind: str, configurations: Sequence[ServingConfiguration], regimes: Mapping[str, Sequence[str]]
) -> tuple[list[Fold], list[Skipped]]:
    """Return the folds of one way of leaving out, and those that cannot be, with the reason.

    Parameters
    ----------
    kind : str
        One of `LEAVE_OUT`.
    configurations : sequence of ServingConfiguration
        Donors.
    regimes : mapping of str to sequence of str
        Labels in the rows of each configuration whose rows are there.
    """
    ids = [c.config_id for c in configurations]
    found: list[Fold] = []
    skipped: list[Skipped] = []
    if kind == "workload":
        for regime in dict.fromkeys(r for own in regimes.values() for r in own):
            inside = [c for c in ids if regime in regimes.get(c, ())]
            found += [Fold(kind, regime, tuple(d for d in ids if d != c), (c,), regime) for c in inside]
        return found, skipped
    for value in dict.fromkeys(_value(kind, c) for c in configurations):
        out = tuple(c.config_id for c in configurations if _value(kind, c) == value)
        rest = tuple(c for c in ids if c not in out)
        if rest:
            found.append(Fold(kind, value, rest, out))
        else:
            reason = f"all {len(out)} donors share it, so none is left to predict from; add donors without it"
            skipped.append(Skipped(kind, value, "", reason))
    return found, skipped


def refuse_twins(statistics: Sequence[ConfigStatistics]) -> None:
    """Refuse donors that are one configuration under two names: each would be predicted from its own rows.

    Raises
    ------
    InputError
        Names the two and what is the same: the configuration but for its config_id, or the statistics of the rows.
    """
    for i, one in enumerate(statistics):
        for other in statistics[:i]:
            same = ""
            if one.configuration.model_copy(update={"config_id": other.config_id}) == other.configuration:
                same = "the same configuration but for their names"
            elif _same_rows(one, other):
                same = "of the same rows"
            if same:
                raise InputError(
                    f"donors {other.config_id!r} and {one.config_id!r} are {same}: each would be predicted from itself and the transfer "
                    "error come out too small. Leave one of them out, or merge their statistics (`hfdtl-bayes merge`)"
                )


def _same_rows(one: ConfigStatistics, other: ConfigStatistics) -> bool:
    # Observations are the last column of the factors; durations measured twice never agree to the last digit.
    if (one.rows, one.total_s) != (other.rows, other.total_s) or len(one.strata) != len(other.strata):
        return False
    pairs = zip(one.strata, other.strata, strict=True)
    return all(a.multiplier == b.multiplier and np.array_equal(a.triangle, b.triangle) for a, b in pairs)


def whole_blocks(frame: pd.DataFrame, block_length: int, most: int) -> pd.DataFrame:
    """Return rows in whole time blocks, evenly spread over the frame, about `most` of them at most; one block at least."""
    if len(frame) <= most:
        return frame
    blocks = time_blocks(frame, block_length)
    numbers = np.unique(blocks)
    kept = max(1, int(len(numbers) * most / len(frame)))
    chosen = numbers[np.unique(np.linspace(0, len(numbers) - 1, kept).round().astype(int))]
    return frame[np.isin(blocks, chosen)]


def drawing_order(frame: pd.DataFrame, block_length: int, unit: str, rng: np.random.Generator) -> NDArray[np.int64]:
    """Return an order in which rows are taken to calibrate, shape (n,): its first n are the rows drawn, for any n.

    So what is drawn at 25 rows is among what is drawn at 50.

    Parameters
    ----------
    frame : DataFrame
    block_length : int
    unit : {"block", "row"}
        Whole time blocks in random order, their rows in time order; or single rows.
    rng : Generator
    """
    if unit == "row":
        return rng.permutation(len(frame)).astype(np.int64)
    blocks = time_blocks(frame, block_length)
    place = rng.permutation(int(blocks.max()) + 1)[blocks] if len(blocks) else blocks
    return np.argsort(place, kind="stable").astype(np.int64)
