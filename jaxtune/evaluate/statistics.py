"""How sure a measured difference is: bootstrap intervals, and a paired test between base and tuned.

Intervals are percentile bootstrap over rows (Efron and Tibshirani 1993, chapter 13). Where all rows agree, all
resamples are the same; `exact_at_the_edge` and `paired_at_the_edge` then give the interval of a share. The test is
approximate randomisation (Noreen 1989; for language tasks Dror et al. 2018, aclanthology.org/P18-1128): if the two
models were alike, each row's pair of results could as well be swapped. Several tests are corrected by Holm's procedure.
Draws come from a fixed seed, so that the same results give the same verdict.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
FEWEST = 2  # rows from which there is an interval
AT_ONCE = 2**20  # numbers of resampled rows in memory

Statistic = Callable[[np.ndarray], np.ndarray]  # draws of per-row values [R, N, ...] -> f64[R]


class Interval(NamedTuple):
    """A value with the interval that holds it at `LEVEL`; low and high None with fewer than two rows."""

    value: float
    low: float | None
    high: float | None


class Paired(NamedTuple):
    """The results of two models on the same rows. `p`: how likely so large a difference is if they were alike."""

    base: Interval
    tuned: Interval
    difference: Interval
    p: float | None


def mean(values: np.ndarray) -> np.ndarray:
    """Rows [R, N] -> their means; rows [R, N, 2] of (value, weight) -> the sums of values by the sums of weights."""
    return values.mean(1) if values.ndim == 2 else values[..., 0].sum(1) / values[..., 1].sum(1)


def each(score: Callable[[np.ndarray], float]) -> Statistic:
    """A statistic that applies `score` to each draw [N, ...] in turn."""
    return lambda values: np.array([score(draw) for draw in values])


def interval(values: np.ndarray, statistic: Statistic = mean, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The statistic of rows [N, ...] with its bootstrap interval."""
    drawn = [statistic(values[rows]) for rows in _resampled(len(values), resamples, seed)]
    return _interval(_whole(statistic, values), drawn)


class Means(NamedTuple):
    """Weighted means of columns, and the same of resampled rows.

    Attributes:
        whole: f64[K].
        draws: f64[R, K]; R is 0 with fewer than two rows.
    """

    whole: np.ndarray
    draws: np.ndarray

    def columns(self, index: Sequence[int]) -> "Means":
        """Some of the columns."""
        return Means(self.whole[list(index)], self.draws[:, list(index)])

    def intervals(self) -> list[Interval]:
        """Each mean with its bootstrap interval."""
        return [interval_of(float(value), draws) for value, draws in zip(self.whole, self.draws.T, strict=True)]


def means(values: np.ndarray, weights: np.ndarray, resamples: int = RESAMPLES) -> Means:
    """The sums of values [N, K] by that of weights [N], over the resamples of `interval`, all columns in one pass."""
    n, drawn = len(values), [np.zeros((0, values.shape[1]))]
    for rows in _resampled(n, resamples, 0):
        times = np.bincount((rows + n * np.arange(len(rows))[:, None]).ravel(), minlength=n * len(rows))
        times = times.reshape(len(rows), n).astype(np.float64)
        drawn.append(times @ values / (times @ weights)[:, None])
    return Means(values.sum(0) / weights.sum(), np.concatenate(drawn))


def interval_of(value: float, drawn: np.ndarray) -> Interval:
    """A value with the percentiles of its resamples [R]; None without any."""
    return _interval(value, [drawn] if len(drawn) else [])


def paired(
    base: np.ndarray,
    tuned: np.ndarray,
    statistic: Statistic = mean,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Paired:
    """Compare the results of two models on the same rows: base and tuned [N, ...].

    The difference (tuned - base) is resampled by pairs of rows (Koehn 2004, aclanthology.org/W04-3250); p is two-sided.
    """
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} and {len(tuned)} rows; a paired test needs the same")
    drawn = [(statistic(base[rows]), statistic(tuned[rows])) for rows in _resampled(len(base), resamples, seed)]
    before, after = _whole(statistic, base), _whole(statistic, tuned)
    return Paired(
        _interval(before, [b for b, _ in drawn]),
        _interval(after, [t for _, t in drawn]),
        _interval(after - before, [t - b for b, t in drawn]),
        _randomisation(base, tuned, statistic, after - before, resamples, seed),
    )


def _whole(statistic: Statistic, values: np.ndarray) -> float:
    return float(statistic(values[None])[0])


def _randomisation(base, tuned, statistic: Statistic, difference: float, resamples: int, seed: int) -> float | None:
    """The share of random swaps (counting the identity) that give a difference at least as large."""
    if len(base) < FEWEST:
        return None
    rng = np.random.default_rng([seed, 1])
    as_large = 0
    for count in _chunks(len(base), resamples):
        swap = rng.random((count, len(base))) < 0.5
        swap = swap.reshape(*swap.shape, *[1] * (base.ndim - 1))
        swapped = statistic(np.where(swap, base, tuned)) - statistic(np.where(swap, tuned, base))
        as_large += int((np.abs(swapped) >= abs(difference) * (1 - 1e-9)).sum())
    return (as_large + 1) / (resamples + 1)


def _resampled(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield indices of rows drawn with replacement, i64[R, N], for some of the resamples at a time."""
    rng = np.random.default_rng([seed, 0])
    for count in _chunks(n, resamples) if n >= FEWEST else ():
        yield rng.integers(0, n, (count, n))


def _chunks(n: int, resamples: int) -> list[int]:
    size = max(1, AT_ONCE // n)
    return [min(size, resamples - at) for at in range(0, resamples, size)]


def _interval(value: float, drawn: Sequence[np.ndarray]) -> Interval:
    if not drawn:
        return Interval(value, None, None)
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def gaps_interval(parts: np.ndarray, total: float) -> Interval:
    """The sum of gaps |sum of parts / total| with an interval: of a calibration error, whose gaps are those of bins.

    Chance adds to every gap, so that the sum lies above the true one, and that of resamples above it again. The test is
    therefore inverted: the interval holds the sums under which one as large, or as small, as the measured has a chance
    of 2.5% or more. Of all true gaps those in the proportions of the measured ones stand for the others, and for the
    upper end also the same gap in all bins, since a measured one may have the wrong sign by chance; each spreads by the
    variance over rows, and no less than shares of one right and one wrong answer more would.

    Args:
        parts: what each row adds to each gap, f64[N, K]; 0 where it is in another bin.
        total: what the sums are divided by.
    """
    n = len(parts)
    gaps, within = parts.sum(0) / total, np.count_nonzero(parts, axis=0)
    value = float(np.abs(gaps).sum())
    if n < FEWEST:
        return Interval(value, None, None)
    if value == 0:
        return exact_at_the_edge(Interval(0.0, 0.0, 0.0), n)
    least = within * (within + 1) / (within + 2) ** 2
    spread = np.sqrt(np.maximum(n * parts.var(0, ddof=1), least)) / total
    noise = np.random.default_rng([0, 4]).normal(size=(RESAMPLES, parts.shape[1])) * spread
    rare = (1 - LEVEL) / 2

    def sums(scale: float, gaps: np.ndarray = gaps) -> np.ndarray:
        return np.abs(scale * gaps + noise).sum(1)

    def edge(beyond: Callable[[float], bool], low: float, high: float) -> float:
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (low, middle) if beyond(middle) else (middle, high)
        return low

    low = edge(lambda scale: (sums(scale) >= value).mean() >= rare, 0.0, 1.0)
    even = value * within / within.sum()
    high = max(edge(lambda s, g=g: (sums(s, g) <= value).mean() < rare, 1.0, 4.0) for g in (gaps, even))
    return Interval(value, low * value, high * value)


def exact_at_the_edge(interval: Interval, n: int) -> Interval:
    """The exact binomial interval of a share of n rows that is 0 or 1, for which a bootstrap gives no interval.

    Clopper and Pearson 1934; at the edge it has a closed form.
    """
    if n < FEWEST or interval.value not in (0.0, 1.0):
        return interval
    least = ((1 - LEVEL) / 2) ** (1 / n)
    return Interval(0.0, 0.0, 1 - least) if interval.value == 0 else Interval(1.0, least, 1.0)


def paired_at_the_edge(result: Paired, base: np.ndarray, tuned: np.ndarray) -> Interval:
    """The interval of a difference of two shares where all bootstrap resamples agree (all rows became right, say).

    Newcombe 1998 (Statistics in Medicine 17: 2635-2650), method 10: Wilson's intervals of both shares, put together
    with the correlation of the pairs. Any other difference is returned unchanged.

    Args:
        result: the bootstrap's.
        base: 1 for each row that the base has right, else 0, [N]; with other values, a mean of 0 or 1 stands for all
            rows.
        tuned: the same of the tuned model.
    """
    n, difference = len(base), result.difference
    if difference.low is None or difference.low < difference.high:
        return difference
    right = [_right(values, interval.value) for values, interval in ((base, result.base), (tuned, result.tuned))]
    if any(values is None for values in right):
        return difference
    before, after = right
    p1, p2 = after.mean(), before.mean()
    (low1, high1), (low2, high2) = wilson(p1, n), wilson(p2, n)
    both, neither = int((before & after).sum()), int((~before & ~after).sum())
    product = both * neither - int((after & ~before).sum()) * int((before & ~after).sum())
    if product > 0:
        product = max(product - n / 2, 0)  # Newcombe's continuity correction
    spread = n * n * np.sqrt(p1 * (1 - p1) * p2 * (1 - p2))
    phi = product / spread if spread else 0.0

    def reach(one: float, other: float) -> float:
        return float(np.sqrt(max(0.0, one**2 - 2 * phi * one * other + other**2)))

    low, high = reach(p1 - low1, high2 - p2), reach(high1 - p1, p2 - low2)
    return Interval(difference.value, max(-1.0, difference.value - low), min(1.0, difference.value + high))


def _right(values: np.ndarray, share: float) -> np.ndarray | None:
    """Which rows are right, bool[N]; None where the values do not tell."""
    if share in (0.0, 1.0):
        return np.full(len(values), bool(share))
    return values.astype(bool) if values.ndim == 1 and np.isin(values, (0, 1)).all() else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """The interval of a share of n rows by the score test (Wilson 1927)."""
    z2 = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = float(np.sqrt(z2 * share * (1 - share) / n + z2**2 / (4 * n * n))) / (1 + z2 / n)
    return middle - reach, middle + reach


def auc(members: np.ndarray, others: np.ndarray) -> Interval:
    """The chance that a member scores higher than another, ties by half: the area under the ROC curve.

    The interval is DeLong's (DeLong et al. 1988, Biometrics 44: 837-845) on the scale of the logit, where it keeps its
    level near 0 and 1 (Qin and Hotilovac 2008); of scores that part the two wholly it is the exact binomial one of the
    smaller side.

    Args:
        members: their scores, f64[M].
        others: theirs, f64[N].
    """
    m, n = len(members), len(others)
    above = _below(members, others)  # of each member, the share of the others that it beats
    below = 1 - _below(others, members)
    value = float(above.mean())
    if min(m, n) < FEWEST:
        return Interval(value, None, None)
    if value in (0.0, 1.0):
        return exact_at_the_edge(Interval(value, value, value), min(m, n))
    spread = np.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    middle = np.log(value / (1 - value))
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * spread / (value * (1 - value))
    low, high = 1 / (1 + np.exp(-(middle - reach))), 1 / (1 + np.exp(-(middle + reach)))
    return Interval(value, float(low), float(high))


def higher(members: np.ndarray, others: np.ndarray) -> float:
    """How likely members score so much higher than others by chance: the one-sided test of Mann and Whitney 1947.

    By its normal approximation with ties, as of scipy.stats.mannwhitneyu, without correction for continuity.

    Args:
        members: their scores, f64[M].
        others: theirs, f64[N].
    """
    m, n = len(members), len(others)
    total = m + n
    _, ties = np.unique(np.concatenate([members, others]), return_counts=True)
    spread = m * n / 12 * (total + 1 - float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1)))
    if spread <= 0:  # all are equal
        return 1.0
    above = float(_below(members, others).sum()) * n
    return NormalDist().cdf(-(above - m * n / 2) / math.sqrt(spread))


def _below(scores: np.ndarray, among: np.ndarray) -> np.ndarray:
    """For each score the share of `among` that is lower, ties by half."""
    among = np.sort(among)
    return (np.searchsorted(among, scores, "left") + np.searchsorted(among, scores, "right")) / (2 * len(among))


class Flips(NamedTuple):
    """Rows that a model got right and another wrong, and back.

    `p`: how likely so uneven a number of both is if each flip went either way with the same chance; 1 without any.
    """

    lost: int
    gained: int
    p: float


def mcnemar(base: np.ndarray, tuned: np.ndarray) -> Flips:
    """McNemar's exact test (1947; the two-sided binomial one): base, tuned bool[N], which rows are right."""
    from scipy.special import bdtr  # takes a third of a second

    base, tuned = np.asarray(base, bool), np.asarray(tuned, bool)
    lost, gained = int((base & ~tuned).sum()), int((~base & tuned).sum())
    return Flips(lost, gained, float(min(1.0, 2 * bdtr(min(lost, gained), lost + gained, 0.5))))


def spread_out(known: np.ndarray, sample: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Values of all rows, [N, K], where some were measured: their mean estimates that of all, and is spread as it is.

    A value is predicted from what is known of its row, by least squares over the measured ones, and the measured rows
    carry what they lie beside their prediction, for as many rows as they stand for. This is the generalised regression
    estimator of survey sampling (Cassel, Särndal and Wretman 1976, Biometrika 63: 615-620), written row by row.

    Args:
        known: of every row, f64[N, F].
        sample: indices of the measured rows, drawn by chance, [n].
        measured: their values, f64[n, K].
    """
    slopes = np.linalg.lstsq(known[sample], measured, rcond=None)[0]
    values = known @ slopes
    values[sample] += (measured - values[sample]) * (len(known) / len(sample))
    return values


def more_often(found: int, of: int, others: int, of_others: int) -> float:
    """Fisher's exact test, one-sided: how likely so many `found` are, if they occur as often among the others.

    Args:
        found: how many there are.
        of: among so many rows.
        others: how many there are of other rows.
        of_others: among so many of those.
    """
    both, total = found + others, of + of_others
    ways = [math.comb(both, k) * math.comb(total - both, of - k) for k in range(found, min(both, of) + 1)]
    return float(Fraction(sum(ways), math.comb(total, of)))


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """p-values of several tests, adjusted so that one limit holds for all of them together (Holm 1979).

    None, a test that could not be made, stays None and does not count.
    """
    adjusted: list[float | None] = list(ps)
    order = sorted((i for i, p in enumerate(ps) if p is not None), key=lambda i: ps[i])
    highest = 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = highest
    return adjusted


def verdict(difference: float, p: float | None, better: int) -> str:
    """ "better", "worse" or "no evidence", at a level of 5%; "changed" for a metric without a better direction.

    Args:
        difference: tuned minus base.
        p: p-value of the test that the difference is 0; None: there is no test.
        better: 1 where more is better, -1 where less is, 0 where neither is.
    """
    if p is None or p >= 1 - LEVEL or difference == 0:
        return "no evidence"
    if not better:
        return "changed"
    return "better" if difference * better > 0 else "worse"
