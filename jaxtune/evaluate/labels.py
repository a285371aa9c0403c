"""Scores of label tasks over plain sequences: accuracy, macro-F1, calibration, the confusion matrix. numpy alone."""

from collections.abc import Hashable, Sequence

import numpy as np

from jaxtune.evaluate import statistics


def accuracy(true: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Share of predictions that are right."""
    return float(np.mean([t == p for t, p in zip(true, predicted, strict=True)]))


def confusion(true: Sequence[Hashable], predicted: Sequence[Hashable], labels: Sequence[Hashable]) -> np.ndarray:
    """Counts i64[L, L]: row the true label, column the predicted one, both in the order of `labels`.

    Raises:
        ValueError: a label of the data is not among `labels`.
    """
    place = {label: i for i, label in enumerate(labels)}
    counts = np.zeros((len(place), len(place)), np.int64)
    for t, p in zip(true, predicted, strict=True):
        if t not in place or p not in place:
            raise ValueError(f"label {t if t not in place else p!r} is not among {list(labels)}")
        counts[place[t], place[p]] += 1
    return counts


def macro_f1(true: Sequence[Hashable], predicted: Sequence[Hashable]) -> float:
    """Mean over the labels, those that occur in either, of F1 = 2 TP / (2 TP + FP + FN)."""
    ids = {label: i for i, label in enumerate(dict.fromkeys([*true, *predicted]))}
    return macro_f1_ids(np.array([ids[t] for t in true]), np.array([ids[p] for p in predicted]))


def macro_f1_ids(true: np.ndarray, predicted: np.ndarray) -> float:
    """`macro_f1` of labels that are small integers, i64[N] each."""
    size = int(max(true.max(), predicted.max())) + 1
    right = np.bincount(true[true == predicted], minlength=size)
    seen = np.bincount(true, minlength=size) + np.bincount(predicted, minlength=size)
    return float(np.mean(2 * right[seen > 0] / seen[seen > 0]))


def ece(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: the mean gap between confidence and accuracy over `bins` bins of equal width.

    Guo et al. 2017, arXiv:1706.04599, equation 3. A bin holds its upper edge and not its lower one; 0 is in the first.

    Args:
        confidence: the probability of the predicted label, in [0, 1].
        right: whether that prediction is right.
        bins: how many of equal width.
    """
    return float(np.abs(gap_bins(confidence, right, bins)).sum() / len(right))


def ece_by_chance(confidence: Sequence[float], bins: int = 10, draws: int = 400, seed: int = 0) -> float:
    """The mean calibration error of predictions that are right exactly as often as their confidence says.

    It is above 0, the more so the fewer there are (Broecker and Smith 2007, Weather and Forecasting 22: 651-661).
    """
    confidence = np.asarray(confidence, float)
    right = np.random.default_rng(seed).random((draws, len(confidence))) < confidence
    return float(np.mean([ece(confidence, draw, bins) for draw in right]))


def ece_interval(confidence: Sequence[float], right: Sequence[bool], bins: int = 10) -> statistics.Interval:
    """The calibration error with its interval, see `statistics.gaps_interval`."""
    parts = np.stack([gap_bins([c], [r], bins) for c, r in zip(confidence, right, strict=True)])
    return statistics.gaps_interval(parts, len(parts))


def gap_bins(confidence: Sequence[float], right: Sequence[bool], bins: int) -> np.ndarray:
    """Confidence minus correctness, summed over each bin of `ece`, f64[bins]."""
    confidence, right = np.asarray(confidence, float), np.asarray(right, float)
    at = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return np.bincount(at, confidence - right, bins)
