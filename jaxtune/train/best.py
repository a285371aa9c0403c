"""Which of two evaluations is better, by the metric that a run is judged by. Nothing here imports jax."""

import math

LOWER = ("loss", "perplexity", "kl")  # the metrics of which less is better


def sign(metric: str) -> int:
    """1: more of this metric of evaluations is better; -1: less."""
    return -1 if metric.rpartition("/")[2] in LOWER else 1


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a value of a metric is better than another; any number is better than NaN."""
    return sign(metric) * value > sign(metric) * than or (math.isnan(than) and not math.isnan(value))
