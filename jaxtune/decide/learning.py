"""The learning curve of a method: its error over training rows as a power law, error = a n^-b, with intervals.

Hestness et al. 2017, arXiv:1712.00409; Kaplan et al. 2020, arXiv:2001.08361. The exponent and the error at other sizes
have bootstrap intervals over held-out rows, which are the same at all sizes, so that their common luck cancels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxtune.decide.race import interval
from jaxtune.evaluate.statistics import LEVEL, Interval

RESAMPLES = 2000
FEWEST = 3  # sizes, since two always fit
AT_ONCE = 2**22  # resampled rows in memory


class Curve(NamedTuple):
    """A fitted power law.

    Attributes:
        rows: the sizes it was fitted to.
        a, b: of error = a n^-b.
        draws: (log a, b) of each resample, f64[R, 2].
        holds: the intervals of the curve and of the measured scores overlap at all sizes.
    """

    rows: list[int]
    a: float
    b: float
    draws: np.ndarray
    holds: bool = True

    def score(self, rows: float) -> Interval:
        """1 - error after training on so many rows, with its interval."""
        errors = np.exp(np.minimum(self.draws[:, 0] - self.draws[:, 1] * np.log(rows), 0.0))
        low, high = np.quantile(1 - errors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(1 - min(1.0, self.a * rows**-self.b), float(low), float(high))

    def rows_for(self, score: float) -> Interval:
        """How many rows give this score; infinite where more rows do not help."""

        def needed(log_a, b):
            with np.errstate(divide="ignore", over="ignore"):
                return np.where(b > 1e-3, np.exp((log_a - np.log(1 - score)) / np.maximum(b, 1e-3)), np.inf)

        draws = np.sort(needed(*self.draws.T))
        at = [int(np.clip(q * len(draws), 0, len(draws) - 1)) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2)]
        return Interval(float(needed(np.log(self.a), self.b)), float(draws[at[0]]), float(draws[at[1]]))


def fit(rows: Sequence[int], scores: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> Curve | None:
    """Fit error = a n^-b to the scores of models tuned on several numbers of rows.

    Logarithms of the errors are fitted by least squares, weighted by their precision.

    Args:
        rows: training rows of each model, [S].
        scores: from 0 to 1, of each model on the same held-out rows, [S, N].
        resamples: of held-out rows.
        seed: of them.

    Returns:
        None where there are fewer than three sizes, or no model makes an error.
    """
    scores = np.asarray(scores, float)
    if len(set(rows)) < FEWEST or not (scores < 1).any():
        return None
    n = scores.shape[1]
    rng = np.random.default_rng([seed, 2])
    drawn = []
    for at in range(0, resamples, size := max(1, AT_ONCE // n)):
        index = rng.integers(0, n, (min(size, resamples - at), n))
        drawn.append((1 - scores)[:, index].mean(2).T)
    whole = (1 - scores).mean(1)[None]
    a, b = _line(rows, whole, n)[0]
    curve = Curve(list(rows), float(np.exp(a)), float(b), _line(rows, np.concatenate(drawn), n))
    fitted, measured = [curve.score(r) for r in rows], [interval(own) for own in scores]
    overlap = (f.low <= m.high and m.low <= f.high for f, m in zip(fitted, measured, strict=True))
    return curve._replace(holds=n >= 2 and all(overlap))


def _line(rows: Sequence[int], errors: np.ndarray, n: int) -> np.ndarray:
    """errors [R, S] of n rows each -> (log a, b) [R, 2]."""
    errors = (errors * n + 0.5) / (n + 1)  # an error of 0 has no logarithm
    x, y = np.log(np.asarray(rows, float)), np.log(errors)
    weight = errors / (1 - errors)  # 1 / the variance of log error
    weight = weight / weight.sum(1, keepdims=True)
    mean_x, mean_y = (weight * x).sum(1), (weight * y).sum(1)
    slope = (weight * (x - mean_x[:, None]) * (y - mean_y[:, None])).sum(1)
    slope /= (weight * (x - mean_x[:, None]) ** 2).sum(1)
    return np.stack([mean_y - slope * mean_x, -slope], 1)
