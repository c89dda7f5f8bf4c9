"""What a configuration's rows can tell apart: absent columns, dependent columns, condition numbers, nearly collinear groups.

The triangles of the statistics stack to a matrix with the same R'R as the scaled rows, so everything here is that of the rows
themselves. Columns are brought to unit length first, which takes units out. With singular values mu_1 >= ... >= mu_K and right
singular vectors v_j, the condition indexes are mu_1 / mu_j and column k's share of variance that goes through index j is

    pi_jk = (v_kj^2 / mu_j^2) / sum_j (v_kj^2 / mu_j^2).

Columns with more than half of their variance in one large index are a nearly collinear group. Belsley, Kuh & Welsch (1980),
Regression Diagnostics, chapter 3.

None of this is an error: every coefficient has a proper prior, so the posterior is proper whatever the rows leave open. What the rows
leave open must be told, for the prior decides it. Two cases differ in what can be done. Where no batch of the configuration
can tell columns apart (weights are read in every step, and so is the constant there; a dense LLM has no experts) the structure is
the model's. Where other batches could, the traffic is at fault and recording more of it is the cure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.errors import HfdtlError, StatisticsError
from hfdtl_bayes.features import FeatureSet, operating_points
from hfdtl_bayes.statistics.sufficient import ConfigStatistics

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class CollinearitySettings:
    """Limits of the diagnosis, each with its reason."""

    large_index: float = 30.0
    """Condition index from which a dependency is called strong: 30 to 100 in Belsley, Kuh & Welsch; an error of one part in a
    thousand of the rows becomes one of three per cent in a coefficient."""
    large_share: float = 0.5
    """A column belongs to a dependency if more than this share of its variance goes through it; theirs as well."""
    competing: float = 3.0
    """Large indexes within this factor of each other are taken together: variance is spread over them at will."""
    dependent: float = 1e-8
    """Singular value, relative to the largest, that is rounding error: statistics drop what is below 1e-9."""


@dataclass(frozen=True)
class Dependency:
    """Columns that the rows cannot tell apart, exactly or nearly.

    Attributes
    ----------
    columns : tuple of str
    condition_index : float
        Infinite if exact.
    by_structure : bool or None
        True if no batch of the configuration could tell them apart, False if others could, None if that is not known (delays, and
        near dependencies).
    """

    columns: tuple[str, ...]
    condition_index: float
    by_structure: bool | None

    @property
    def exact(self) -> bool:
        """Whether the columns are dependent to rounding error."""
        return not np.isfinite(self.condition_index)

    def sentence(self) -> str:
        """Return what it means, in words."""
        names = " and ".join(self.columns) if len(self.columns) == 2 else ", ".join(self.columns)
        if not self.exact:
            return (
                f"{names} move nearly together in these rows (condition index {self.condition_index:.0f}): small errors shift "
                "weight from one to the other"
            )
        cure = {
            True: "no batch of this configuration could; other configurations and the prior decide how it splits",
            False: "other batches could: record steps in which they differ, or the prior decides how it splits",
            None: "the prior and other configurations decide how it splits",
        }[self.by_structure]
        return f"the rows decide a combination of {names} but cannot tell them apart; {cure}"


@dataclass(frozen=True)
class DesignCondition:
    """What the rows of one configuration can tell apart.

    Attributes
    ----------
    config_id : str
    rank, columns : int
        Independent columns, of how many.
    condition_number : float
        Of the columns at unit length, absent ones left out; infinite if some are dependent.
    identified_condition_number : float
        The same within the space the rows span: largest over smallest singular value that is not zero.
    not_applicable : tuple of str
        Columns that are zero in every batch of this configuration.
    absent : tuple of str
        Columns that are zero in these rows but would not be in others.
    dependencies : tuple of Dependency
        Exact ones first.
    """

    config_id: str
    rank: int
    columns: int
    condition_number: float
    identified_condition_number: float
    not_applicable: tuple[str, ...]
    absent: tuple[str, ...]
    dependencies: tuple[Dependency, ...]

    @property
    def by_traffic(self) -> bool:
        """Whether other traffic of the same configuration would tell more."""
        return bool(self.absent) or any(d.by_structure is False for d in self.dependencies)

    def sentences(self) -> tuple[str, ...]:
        """Return what is not told apart, in words; empty if everything is."""
        said = []
        if self.not_applicable:
            said.append(f"not part of this configuration, so its rows say nothing of them: {', '.join(self.not_applicable)}")
        if self.absent:
            said.append(self._absence())
        return (*said, *(d.sentence() for d in self.dependencies))

    def warnings(self) -> tuple[str, ...]:
        """Return what other traffic could mend, in words: absent columns and exact dependencies that no structure explains."""
        exact = [d.sentence() for d in self.dependencies if d.exact and not d.by_structure]
        return (*([self._absence()] if self.absent else []), *exact)

    def _absence(self) -> str:
        return f"absent from these rows, so prior and other configurations decide: {', '.join(self.absent)}; record steps that have them"


def stacked_design(statistics: ConfigStatistics) -> FloatArray:
    """Return a matrix with the R'R of the scaled rows of one configuration, shape (P, K).

    Raises
    ------
    StatisticsError
        If it is not finite; the columns are named.
    """
    k = len(statistics.coef_names)
    design = np.vstack([s.triangle[:, :k] for s in statistics.strata])
    finite = np.isfinite(design).all(axis=0)
    if not finite.all():
        bad = [n for n, good in zip(statistics.coef_names, finite, strict=True) if not good]
        raise StatisticsError(
            f"statistics of {statistics.config_id!r} are not finite in column(s) {', '.join(bad)}; build them again from the rows"
        )
    return np.asarray(design)


def _possible_design(statistics: ConfigStatistics, feature_set: FeatureSet) -> FloatArray | None:
    """Return the design over every kind of batch the configuration can run; None where such a list is not known."""
    if feature_set.quantity != "step_time":
        return None
    try:
        possible = feature_set.design(operating_points(statistics.configuration), statistics.configuration)
        return possible[:, : len(feature_set.pooled)]
    except HfdtlError:  # a user's set may read columns that no operating point has
        return None


def _unit_columns(design: FloatArray) -> tuple[FloatArray, NDArray[np.bool_]]:
    """Return the columns that are not zero at unit length, and which those are."""
    length = np.linalg.norm(design, axis=0)
    present = length > 0
    return design[:, present] / length[present], present


def _null_space(unit: FloatArray, dependent: float) -> FloatArray:
    """Return an orthonormal basis of the combinations of unit columns that vanish, shape (K, nullity)."""
    _, singular, transposed = np.linalg.svd(unit, full_matrices=True)
    rank = int((singular > dependent * singular[0]).sum())
    return np.asarray(transposed[rank:].T)


def _exact_groups(null: FloatArray) -> list[list[int]]:
    """Return the groups of columns that take part in the same dependencies.

    Two columns belong together if the projector on the null space has an entry for the pair, directly or through others.
    """
    linked = np.abs(null @ null.T) > 1e-6
    left, groups = {i for i in range(len(null)) if linked[i, i]}, []
    while left:
        group, waiting = set(), [min(left)]
        while waiting:
            i = waiting.pop()
            if i not in group:
                group.add(i)
                waiting += [int(j) for j in np.flatnonzero(linked[i]) if int(j) in left]
        left -= group
        groups.append(sorted(group))
    return groups


def _near_groups(unit: FloatArray, settings: CollinearitySettings) -> list[tuple[float, list[int]]]:
    """Return nearly collinear groups with their largest condition index, by variance-decomposition proportions."""
    _, singular, transposed = np.linalg.svd(unit, full_matrices=False)
    kept = singular > settings.dependent * singular[0]
    singular, vectors = singular[kept], transposed[kept].T
    parts = vectors**2 / singular**2
    proportions = parts / parts.sum(axis=1, keepdims=True)
    index = singular[0] / singular
    large = np.flatnonzero(index >= settings.large_index)
    found: list[tuple[float, list[int]]] = []
    together: list[int] = []
    for j in large:
        if together and index[j] > settings.competing * index[together[-1]]:
            together = []
        together.append(int(j))
        last = j == large[-1] or index[j + 1] > settings.competing * index[j]
        if last:
            group = np.flatnonzero(proportions[:, together].sum(axis=1) > settings.large_share)
            if len(group) > 1:
                found.append((float(index[together].max()), [int(i) for i in group]))
    return found


def design_condition(
    statistics: ConfigStatistics, feature_set: FeatureSet, settings: CollinearitySettings | None = None
) -> DesignCondition:
    """Diagnose what the rows of one configuration can tell apart, of the pooled coefficients.

    Those of the discrepancy repeat the other columns by construction, and are told apart by belief.

    Parameters
    ----------
    statistics : ConfigStatistics
    feature_set : FeatureSet
        The set they were built with; its design over the configuration's operating points says what other traffic could tell.
    settings : CollinearitySettings, optional

    Returns
    -------
    DesignCondition

    Raises
    ------
    StatisticsError
        If the statistics are not finite, or every column is zero: such rows say nothing.
    """
    settings = settings or CollinearitySettings()
    names = np.array(feature_set.pooled_names)
    unit, present = _unit_columns(stacked_design(statistics)[:, : len(names)])
    if not present.any():
        raise StatisticsError(
            f"configuration {statistics.config_id!r}: every column of feature set {statistics.feature_set!r} is zero in every row; "
            "check the columns the set reads"
        )
    possible = _possible_design(statistics, feature_set)
    never = np.zeros(len(names), dtype=bool) if possible is None else ~np.any(possible != 0.0, axis=0)
    null = _null_space(unit, settings.dependent)
    singular = np.linalg.svd(unit, compute_uv=False)
    rank = unit.shape[1] - null.shape[1]
    own = names[present]
    dependencies = []
    for group in _exact_groups(null):
        columns = tuple(str(n) for n in own[group])
        by_structure = None
        if possible is not None:
            chosen, there = _unit_columns(possible[:, np.flatnonzero(present)[group]])
            nullity = _null_space(chosen, settings.dependent).shape[1] + int((~there).sum()) if there.any() else len(group)
            by_structure = bool(nullity >= _null_space(unit[:, group], settings.dependent).shape[1])
        dependencies.append(Dependency(columns, float("inf"), by_structure))
    dependencies += [Dependency(tuple(str(n) for n in own[g]), i, None) for i, g in _near_groups(unit, settings)]
    identified = float(singular[0] / singular[rank - 1])
    return DesignCondition(
        config_id=statistics.config_id,
        rank=rank,
        columns=len(names),
        condition_number=float("inf") if null.shape[1] else identified,
        identified_condition_number=identified,
        not_applicable=tuple(str(n) for n in names[~present & never]),
        absent=tuple(str(n) for n in names[~present & ~never]),
        dependencies=tuple(dependencies),
    )
