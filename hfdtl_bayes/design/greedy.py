"""Greedy selection: the row of the largest gain, what it changes, the next.

The gain of information is monotone and submodular over rows of different blocks, so greedy selection reaches at least 1 - 1/e of the best
set's (Nemhauser, Wolsey & Fisher 1978, doi:10.1007/BF01588971; Krause & Guestrin 2008), and a gain computed earlier bounds the gain now: only
the rows whose bound is largest are looked at again (Minoux 1978). A row picked in a block can raise what its fellows tell, since two rows
that share a drift say by their difference what neither says alone; so their bounds are dropped with each pick. Everything else keeps
its bound, and the lazy choice is the greedy one exactly. The gains for a deployment mix are not submodular: of variance removed every
candidate is evaluated for every pick, as two quadratic forms per draw; of EPIG a bound is, and the gain where the bound asks for it.

Rows within `TIE` of the best are as good, and the earliest of them is taken: rounding does not choose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hfdtl_bayes.design.acquisition import (
    Acquisition,
    information_gain,
    predictive_information,
    predictive_information_bound,
    variance_reduction,
)
from hfdtl_bayes.design.belief import Belief
from hfdtl_bayes.design.candidates import Candidates
from hfdtl_bayes.errors import InputError

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

TIE = 1e-9
"""Relative difference of gains that is none."""

MEAN_ABSOLUTE = float(np.sqrt(2.0 / np.pi))
"""Mean absolute value of a standard normal: what a relative sd is worth in MAPE."""

_LOOKED_AT = 256
"""Rows evaluated at once where bounds decide which: the cost of a few is that of one."""


def mix_weights(weights: Sequence[float] | FloatArray | None, rows: int) -> FloatArray:
    """Return the weights of a deployment mix's rows, shape (rows,), equal by default.

    Raises
    ------
    InputError
        If there are not as many as rows, one is negative or not finite, or all are 0.
    """
    given = np.ones(rows) if weights is None else np.asarray(weights, dtype=float)
    if given.shape != (rows,) or not (np.isfinite(given) & (given >= 0)).all() or not given.sum() > 0:
        raise InputError(
            f"the deployment mix has {rows} rows and needs as many weights of 0 or more, not all 0; found shape {given.shape}, from "
            f"{given.min() if given.size else 'nothing'}"
        )
    return given


@dataclass(frozen=True, eq=False)
class DeploymentMix:
    """Traffic whose predictions matter.

    Attributes
    ----------
    moments : ndarray, shape (K, K)
        T = sum w_j x_j x_j' over all its rows: the mean relative variance of the mix is the trace of T M.
    design : ndarray, shape (J, K)
        Rows that stand for it one by one; as of `Candidates`.
    weights : ndarray, shape (J,)
        Of those, adding up to one.
    rows : ndarray of int, shape (J,)
        Which rows of the mix they are.
    """

    moments: FloatArray
    design: FloatArray
    weights: FloatArray
    rows: IntArray

    @classmethod
    def of(cls, design: FloatArray, weights: FloatArray, most: int) -> DeploymentMix:
        """Return the mix of rows with weights, of which at most so many stand for it one by one: evenly spaced in weight."""
        weights = weights / weights.sum()
        moments = np.asarray(design.T @ (weights[:, None] * design))
        if len(design) <= most:
            return cls(moments, design, weights, np.arange(len(design)))
        places = (np.arange(most) + 0.5) / most
        at = np.minimum(np.searchsorted(np.cumsum(weights), places), len(design) - 1)
        return cls(moments, design[at], np.full(most, 1.0 / most), at)

    def mean_square(self, covariance: FloatArray) -> float:
        """Return the mean relative variance of the expected value, over the mix and draws."""
        return float((self.moments * covariance.mean(axis=0)).sum())

    def variances(self, covariance: FloatArray) -> FloatArray:
        """Return the relative variance of each row's expected value under each draw, shape (J, S)."""
        along = self.design @ covariance
        return np.maximum((along * self.design).sum(axis=2).T, 0.0)


class Knowledge:
    """What is known of the coefficients as rows are chosen.

    Parameters
    ----------
    belief : Belief
    candidates : Candidates
        Rows taken already count towards the drift of their blocks; the belief holds what they said.
    """

    def __init__(self, belief: Belief, candidates: Candidates) -> None:
        self.belief, self.candidates = belief, candidates
        k = candidates.design.shape[1]
        self.whitened = np.broadcast_to(np.eye(k), (belief.draws, k, k)).copy()
        _, self._block = np.unique(candidates.blocks, return_inverse=True)
        self._order = np.argsort(self._block, kind="stable")
        self._edges = np.r_[0, np.cumsum(np.bincount(self._block))]
        self._sums = np.zeros((len(self._edges) - 1, k))
        self._counts = np.zeros(len(self._edges) - 1, dtype=np.int64)
        for row in candidates.taken:
            self._count(int(row))

    def _count(self, row: int) -> None:
        self._sums[self._block[row]] += self.candidates.design[row]
        self._counts[self._block[row]] += 1

    def block_of(self, row: int) -> IntArray:
        """Return the rows of a row's block."""
        b = self._block[row]
        return self._order[self._edges[b] : self._edges[b + 1]]

    @property
    def touched(self) -> IntArray:
        """Rows in whose block one was chosen or taken."""
        found = [self._order[self._edges[b] : self._edges[b + 1]] for b in np.flatnonzero(self._counts)]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    @property
    def covariance(self) -> FloatArray:
        """Covariance M of the coefficients given all rows chosen, shape (S, K, K)."""
        factor = self.belief.factor
        return np.asarray(factor @ self.whitened @ np.swapaxes(factor, 1, 2))

    def effective(self, rows: IntArray) -> tuple[FloatArray, FloatArray]:
        """Return design, shape (S, r, K), and noise variance, shape (r, S), of rows given the others chosen in their blocks."""
        own = self._block[rows]
        if not self._counts[own].any():
            design = np.broadcast_to(
                self.candidates.design[rows], (self.belief.draws, len(rows), self.candidates.design.shape[1])
            )
            return design, np.broadcast_to(self.belief.noise_variance(0), (len(rows), self.belief.draws))
        weight = self.belief.weight_on_block(self._counts[own])
        design = self.candidates.design[rows] - weight.T[:, :, None] * self._sums[own]
        return design, self.belief.noise_variance(self._counts[own])

    def take(self, row: int) -> None:
        """Update the covariance by a row, whatever it will show."""
        design, noise = self.effective(np.array([row]))
        along = np.matvec(np.swapaxes(self.belief.factor, 1, 2), design[:, 0])
        step = np.matvec(self.whitened, along)
        step /= np.sqrt(noise[0] + np.vecdot(step, along))[:, None]
        self.whitened -= step[:, :, None] * step[:, None, :]
        self._count(row)


@dataclass(frozen=True)
class Rules:
    """What is chosen, and within which limits.

    Attributes
    ----------
    acquisition : Acquisition
    budget : int
        Most rows.
    budget_s : float
        Most seconds.
    per_second : bool
        Whether gains are divided by costs.
    per_bin : int
        Rows wanted of each bin that holds so many; of others all.
    lazy : bool
        False evaluates every candidate for every pick: the same picks, slower.
    """

    acquisition: Acquisition
    budget: int
    budget_s: float = float("inf")
    per_second: bool = False
    per_bin: int = 0
    lazy: bool = True


@dataclass(frozen=True, eq=False)
class Path:
    """Rows in the order they were picked, and what was known after each.

    Attributes
    ----------
    rows : ndarray of int, shape (P,)
    gains : ndarray, shape (P,)
        Of each pick, in the unit of the acquisition; NaN for baselines.
    sds : ndarray, shape (P + 1, J)
        Relative sd of the expected value of each row of the mix, averaged over draws, before any pick and after each.
    mean_square : ndarray, shape (P + 1,)
        Mean relative variance over the mix and draws.
    """

    rows: IntArray
    gains: FloatArray
    sds: FloatArray
    mean_square: FloatArray


class _Gains:
    """Gains of candidates at the present state of knowledge, all at once or of a few."""

    def __init__(self, rule: Acquisition, knowledge: Knowledge, mix: DeploymentMix) -> None:
        self.rule, self.knowledge, self.mix = rule, knowledge, mix

    def update(self) -> None:
        """Take note of what is known now."""
        self.covariance = self.knowledge.covariance
        if self.rule is Acquisition.EPIG:
            self.mix_variance = self.mix.variances(self.covariance) + self.knowledge.belief.noise_variance(0)

    def of(self, rows: IntArray) -> FloatArray:
        """Return the gains of some rows, shape (r,)."""
        if self.rule is Acquisition.EPIG and len(rows) > _LOOKED_AT:
            parts = np.array_split(rows, -(-len(rows) // _LOOKED_AT))
            return np.concatenate([self.of(p) for p in parts])
        design, noise = self.knowledge.effective(rows)
        along = design @ self.covariance
        variance = (along * design).sum(axis=2).T
        if self.rule is Acquisition.INFORMATION:
            return information_gain(variance, noise)
        if self.rule is Acquisition.VARIANCE:
            return np.asarray(variance.mean(axis=1))
        if self.rule is Acquisition.DEPLOYMENT:
            return variance_reduction(((along @ self.mix.moments) * along).sum(axis=2).T, variance, noise)
        shared = np.moveaxis(along @ self.mix.design.T, 0, 2)
        return predictive_information(shared**2 / ((noise + variance)[:, None] * self.mix_variance), self.mix.weights)

    def bounds(self) -> tuple[FloatArray, BoolArray]:
        """Return an upper bound of every gain, shape (n,), and whether it is the gain."""
        m = self.covariance
        draws = len(m)
        forms = [m]
        if self.rule is Acquisition.DEPLOYMENT:
            forms.append(m @ self.mix.moments @ m)
        elif self.rule is Acquisition.EPIG:
            weight = self.mix.weights[:, None] / self.mix_variance
            forms.append(m @ np.einsum("js,jk,jl->skl", weight, self.mix.design, self.mix.design, optimize=True) @ m)
        noise = self.knowledge.belief.noise_variance(0)
        values = np.empty(len(self.knowledge.candidates.design))
        for part, found in self.knowledge.candidates.quadratic_forms(np.concatenate(forms)):
            variance = found[:, :draws]
            if self.rule is Acquisition.INFORMATION:
                values[part] = information_gain(variance, noise)
            elif self.rule is Acquisition.VARIANCE:
                values[part] = variance.mean(axis=1)
            elif self.rule is Acquisition.DEPLOYMENT:
                values[part] = variance_reduction(found[:, draws:], variance, noise)
            else:
                share = (1.0 - noise / self.mix_variance).max(axis=0)
                values[part] = predictive_information_bound(found[:, draws:] / (noise + variance), variance, noise, share)
        exact = np.full(len(values), self.rule is not Acquisition.EPIG)
        touched = self.knowledge.touched
        if len(touched):
            values[touched], exact[touched] = self.of(touched), True
        return values, exact


def _best(
    bound: FloatArray, exact: BoolArray, of: Callable[[IntArray], FloatArray], allowed: BoolArray, cost_s: FloatArray | None
) -> int:
    """Return the allowed row of the largest gain, or gain per second; bounds that were looked into become gains in place."""
    looked_at = _LOOKED_AT
    while True:
        value = bound if cost_s is None else bound / cost_s
        value = np.where(allowed, value, -np.inf)
        known = np.where(exact, value, -np.inf).max()
        reach = value >= (known * (1.0 - TIE) if np.isfinite(known) else -np.inf)
        open_rows = np.flatnonzero(reach & ~exact & allowed)
        if not len(open_rows):
            return int(np.argmax(reach & allowed))
        if len(open_rows) > looked_at:
            open_rows = open_rows[np.argpartition(-value[open_rows], looked_at)[:looked_at]]
            # Where bounds say little, many rows need a look, and looking for them costs as much as looking at them.
            looked_at *= 2
        bound[open_rows], exact[open_rows] = of(open_rows), True


def unmet(candidates: Candidates, per_bin: int) -> IntArray:
    """Return how many rows each bin lacks of `per_bin`, or of all it holds if these are fewer; rows taken already count."""
    held = np.bincount(candidates.bins)
    done = np.bincount(candidates.bins[candidates.taken], minlength=len(held))
    return np.asarray(np.maximum(np.minimum(per_bin, held) - done, 0))


class _Limits:
    """Which candidates may be picked next."""

    def __init__(self, candidates: Candidates, rules: Rules) -> None:
        self.left = np.ones(len(candidates.design), dtype=bool)
        self.left[candidates.taken] = False
        self.cost_s, self.bins, self.rules = candidates.cost_s, candidates.bins, rules
        self.picks, self.seconds = rules.budget, rules.budget_s
        self.unmet = unmet(candidates, rules.per_bin)

    def allowed(self) -> BoolArray:
        """Return which rows may be picked: affordable, and of a bin still unmet where all picks left are needed for those."""
        found = self.left & (self.cost_s <= self.seconds) if np.isfinite(self.seconds) else self.left
        return found & (self.unmet[self.bins] > 0) if 0 < self.unmet.sum() >= self.picks else found

    def pick(self, row: int) -> None:
        """Count a row."""
        self.left[row] = False
        self.picks -= 1
        self.seconds -= float(self.cost_s[row])
        self.unmet[self.bins[row]] = max(self.unmet[self.bins[row]] - 1, 0)


def fixed_order(rule: Acquisition, candidates: Candidates, residuals: FloatArray | None, seed: int) -> FloatArray:
    """Return the rank by which a baseline picks, largest first, shape (n,)."""
    rng = np.random.default_rng([seed, 22])
    at_random = rng.permutation(len(candidates.design)).astype(float)
    if rule is Acquisition.RESIDUAL:
        assert residuals is not None
        return np.asarray(np.abs(residuals))
    if rule is Acquisition.RANDOM:
        return at_random
    # Each bin in turn: the first of every bin before the second of any.
    order = np.lexsort((at_random, candidates.bins))
    starts = np.r_[0, np.cumsum(np.bincount(candidates.bins))[:-1]]
    turn = np.empty(len(order))
    turn[order] = np.arange(len(order)) - starts[candidates.bins[order]]
    return np.asarray(-turn * len(order) + at_random)


def choose(
    belief: Belief,
    candidates: Candidates,
    mix: DeploymentMix,
    rules: Rules,
    *,
    residuals: FloatArray | None = None,
    seed: int = 0,
) -> Path:
    """Pick rows one after the other.

    Parameters
    ----------
    belief : Belief
    candidates : Candidates
    mix : DeploymentMix
    rules : Rules
    residuals : ndarray, shape (n,), optional
        For the residual rule: seconds.
    seed : int
        For the random rules.
    """
    knowledge, limits = Knowledge(belief, candidates), _Limits(candidates, rules)
    rule = rules.acquisition
    gains = None if rule.baseline else _Gains(rule, knowledge, mix)
    order = fixed_order(rule, candidates, residuals, seed) if gains is None else None
    cost_s = candidates.cost_s if rules.per_second else None
    bound, exact = np.zeros(0), np.zeros(0, dtype=bool)
    picked: list[int] = []
    told: list[float] = []
    sds, mean_square = [], []

    def note() -> None:
        covariance = knowledge.covariance
        sds.append(np.sqrt(mix.variances(covariance)).mean(axis=1))
        mean_square.append(mix.mean_square(covariance))

    note()
    while limits.picks > 0:
        allowed = limits.allowed()
        if not allowed.any():
            break
        if gains is None:
            assert order is not None
            row = int(np.argmax(np.where(allowed, order, -np.inf)))
            told.append(float("nan"))
        else:
            gains.update()
            if not picked or not (rule.lazy and rules.lazy):
                bound, exact = gains.bounds()
                if not rules.lazy:
                    bound, exact = gains.of(np.arange(len(bound))), np.ones(len(bound), dtype=bool)
            row = _best(bound, exact, gains.of, allowed, cost_s)
            told.append(float(bound[row]))
        knowledge.take(row)
        limits.pick(row)
        picked.append(row)
        note()
        if gains is not None and rule.lazy and rules.lazy:
            exact[:] = False
            bound[knowledge.block_of(row)] = np.inf
    return Path(np.array(picked, dtype=np.int64), np.array(told), np.array(sds), np.array(mean_square))
