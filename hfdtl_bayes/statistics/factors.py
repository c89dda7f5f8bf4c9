"""Factors of whole blocks of rows without a down-weighted one: from Gram matrices where that is accurate, by QR elsewhere.

Divided by their scale, the pilot's fit s = X b, the columns of a design are dependent, X b / s = 1 in every row, and the
observations are y / s = 1 + r with r the relative residual. So one column is replaced by the constant 1 and y by r: within blocks the 1
drops out, what is left is far better conditioned than the rows as they are, and its Cholesky factor loses few digits.
Where it would lose many, because columns are dependent or hardly vary within blocks, the rows themselves are factored.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

_SMALLEST_PIVOT = 1e-5
"""Share of a column's square that must be left of it, its mean and the columns before it taken out, for a factor from the Gram matrix:
the rounding of squares, some 1e-16 of them, is then 1e-11 of what is left."""
_QR_ROWS = 12_000
"""Rows factored at once by QR: with a dozen columns they stay in a processor's own cache."""


@dataclass(frozen=True)
class Rows:
    """Consecutive rows: the columns from which their design follows, and room to scale them in place.

    Attributes
    ----------
    columns : ndarray, shape (v + 2, n)
        Row 0 and row v + 1 are free; between them the columns that vary, seconds per unit coefficient.
    expansion : ndarray, shape (v + 1, K)
        design = [1, columns that vary] @ expansion.
    observed : ndarray, shape (n,)
        Seconds.
    """

    columns: FloatArray
    expansion: FloatArray
    observed: FloatArray

    @classmethod
    def of(cls, design: FloatArray, observed: FloatArray) -> Rows:
        """Return the rows of a design, shape (n, K)."""
        n, k = design.shape
        columns = np.empty((k + 2, n))
        columns[1:-1] = design.T
        return cls(columns, np.vstack([np.zeros(k), np.eye(k)]), observed)

    def __getitem__(self, rows: slice | NDArray[np.bool_]) -> Rows:
        """Return some of the rows: a view of a slice."""
        return Rows(self.columns[:, rows], self.expansion, self.observed[rows])

    @property
    def design(self) -> FloatArray:
        """The design, shape (n, K)."""
        return np.asarray(self.columns[1:-1].T @ self.expansion[1:] + self.expansion[0])

    def fitted(self, coefficients: FloatArray) -> FloatArray:
        """Return design @ coefficients, shape (n,)."""
        constant, *varying = self.expansion @ coefficients
        return np.asarray(np.array(varying) @ self.columns[1:-1] + constant)


def block_factors(
    rows: Rows, pilot: FloatArray, fitted: FloatArray, scale: FloatArray, sizes: NDArray[np.int64]
) -> dict[int, tuple[int, tuple[FloatArray, ...]]]:
    """Factor whole blocks of rows of equal noise; the columns of `rows` are overwritten.

    The mean of its block is taken from every row; what is left has the Gram matrix of the block's contrasts, for sum of (x -
    mean)(x - mean)' = sum of c c' over the m - 1 Helmert contrasts c of m rows.

    Parameters
    ----------
    rows : Rows
    pilot : ndarray, shape (K,)
    fitted, scale : ndarray, shape (n,)
        The pilot's fit, and what rows are divided by: the same, or a floor above it.
    sizes : ndarray of int, shape (B,)
        Rows of each block, adding up to n.

    Returns
    -------
    dict of int to (int, tuple of ndarray)
        By multiplier: number of independent rows, and a matrix that has their Gram matrix, shape (., K + 1); the contrasts under 0
        and the totals, sum / sqrt(m), under the size m of their blocks.
    """
    columns, expansion, of_one = _scaled(rows, pilot, fitted, scale)
    n, m = len(scale), int(sizes[0])
    alike = bool((sizes == m).all())
    # The product is five times as fast, but for blocks of one size only.
    by_block = columns.reshape(len(columns), len(sizes), m) if alike else None
    sums = np.add.reduceat(columns, np.cumsum(sizes) - sizes, axis=1) if by_block is None else by_block @ np.ones(m)
    factors: dict[int, tuple[int, tuple[FloatArray, ...]]] = {}
    totals_expansion = expansion if of_one is None else np.vstack([of_one, expansion])
    for size in [m] if alike else np.unique(sizes).tolist():
        totals = (sums if alike else sums[:, sizes == size]) / np.sqrt(size)
        if of_one is not None:
            totals = np.vstack([np.full(totals.shape[1], np.sqrt(size)), totals])
        gram = totals @ totals.T
        triangle = _cholesky(gram, gram.diagonal())
        if triangle is None:
            triangle = _qr(totals)
        factors[size] = (totals.shape[1], (triangle @ totals_expansion,))
    if n > len(sizes):
        gram, means = columns @ columns.T, sums / sizes
        triangle = _cholesky(gram - sums @ means.T, gram.diagonal())
        if triangle is None:
            columns -= np.repeat(means, sizes, axis=1)
            triangle = _qr(columns)
        factors[0] = (n - len(sizes), (triangle @ expansion,))
    return factors


def _scaled(
    rows: Rows, pilot: FloatArray, fitted: FloatArray, scale: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray | None]:
    """Divide rows by their scale, in place.

    Returns
    -------
    columns : ndarray, shape (w, n)
    expansion : ndarray, shape (w, K + 1)
    of_one : ndarray, shape (K + 1,), or None
        [X, y] / s = columns.T @ expansion + of_one; None if no row is the constant 1.
    """
    columns = rows.columns
    share = np.append(rows.expansion @ pilot, 0.0)
    # The column with the largest part in the fit is the one that follows best from the others.
    sizes = np.abs(share[1:-1]) * np.abs(columns[1:-1, :: len(scale) // 64 + 1]).mean(axis=1)
    replaced = int(np.argmax([abs(share[0]), *sizes]))
    np.subtract(rows.observed, fitted, out=columns[-1])
    np.divide(1.0, scale, out=columns[0])
    columns[1:] *= columns[0]
    expansion = np.zeros((len(columns), rows.expansion.shape[1] + 1))
    expansion[:-1, :-1], expansion[-1, -1] = rows.expansion, 1.0
    if not (scale == fitted).all():
        expansion[:-1, -1] = share[:-1]
        return columns, expansion, None
    # With u the scaled columns, 1 / s among them, and c their shares, u_j = (1 - sum of c_i u_i over the others) / c_j.
    of_one = expansion[replaced] / share[replaced]
    expansion -= np.outer(share, of_one)
    of_one[-1] = 1.0
    if replaced:
        columns[replaced], expansion[replaced] = columns[0], expansion[0]
    return columns[1:], expansion[1:], of_one


def _cholesky(gram: FloatArray, squares: FloatArray) -> FloatArray | None:
    """Return the triangle R with R'R = gram, or None where it would be inaccurate.

    Parameters
    ----------
    gram : ndarray, shape (w, w)
    squares : ndarray, shape (w,)
        Sums of squares whose rounding errors `gram` carries.
    """
    if not squares.min() > 0.0:
        return None
    norm = np.sqrt(squares)
    try:
        lower = np.linalg.cholesky(gram / np.outer(norm, norm))
    except np.linalg.LinAlgError:
        return None
    return None if (lower.diagonal() ** 2).min() < _SMALLEST_PIVOT else lower.T * norm


def _qr(columns: FloatArray) -> FloatArray:
    """Return the triangle R with R'R = columns @ columns.T of columns of shape (w, n)."""
    parts = [np.linalg.qr(columns[:, at : at + _QR_ROWS].T, mode="r") for at in range(0, columns.shape[1], _QR_ROWS)]
    return parts[0] if len(parts) == 1 else np.linalg.qr(np.vstack(parts), mode="r")
