"""What the task gains against what is forgotten, by the strength of the tuning, and the strength to use.

The task's gain is counted in scores of its answers where they got better, and in loss otherwise: loss falls long before
an answer turns right, so that most of the gain in loss may be a small part of the answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import LOSSES, Answers
from jaxtune.evaluate.evaluation import Options, Progress, dtype_of, last_step, run_config, silent, write_part
from jaxtune.evaluate.forgetting import General
from jaxtune.evaluate.kept import Kept
from jaxtune.evaluate.statistics import Interval
from jaxtune.evaluate.strengths import ENDS, Scores, Tuning, sampled
from jaxtune.evaluate.systems import pair

STRENGTHS = tuple(i / 10 for i in range(13))  # 0, 0.1 ... 1.2


class Chosen(NamedTuple):
    """The strength that keeps most of the gain and forgets least.

    Attributes:
        strength: None where no one does what was asked.
        why: a sentence.
    """

    strength: float | None
    why: str


def by_cost(strengths: Sequence[float], cost: Sequence[float]) -> list[int]:
    """Indices of the strengths up to the tuned model's, which keeps all of the gain, the least forgetful first."""
    order = sorted(range(len(cost)), key=lambda i: (cost[i], strengths[i]))
    return order[: order.index(strengths.index(1.0)) + 1]


def bisect(order: Sequence[int], share: Callable[[int], float], keep: float) -> int:
    """The first of `order` whose share of the gain is at least `keep`, where those of all after it are, too.

    Args:
        order: of strengths, from `by_cost`; the last keeps all.
        share: measures the share that a strength keeps.
        keep: see `choose`.
    """
    low, high = 0, len(order) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(order[middle]) >= keep - 1e-9 else (middle + 1, high)
    return order[low]


def choose(
    strengths: Sequence[float],
    kept: Mapping[int, float],
    cost: Sequence[float],
    keep: float = 0.9,
    within: float | None = None,
    of: str = "the task's gain",
) -> Chosen:
    """Choose the strength with the least loss on general text among those that keep enough of the task's gain.

    Args:
        strengths: among them 0, the base, and 1, the tuned model.
        kept: index of a strength -> the share of the gain that it keeps, of those for which it was measured.
        cost: nats a token by which general text is worse than under the base.
        keep: the share of the task's gain, from the base to the tuned model, that has to be kept.
        within: the most that general text may cost; None: any.
        of: what the gain is.
    """
    full = strengths.index(1.0)
    best = next(i for i in by_cost(strengths, cost) if kept.get(i, 0.0) >= keep - 1e-9)
    if within is not None and cost[best] > within:
        fits = [i for i in kept if cost[i] <= within]
        most = max(fits, key=lambda i: kept[i])
        return Chosen(
            None,
            f"No scale keeps {keep:.0%} of {of} within {within:g} nats of the base: at {strengths[best]:g} general "
            f"text costs {_signed(cost[best])}, and within {within:g} at most {kept[most]:.0%} of the gain is kept, "
            f"at {strengths[most]:g}.",
        )
    return Chosen(
        strengths[best],
        f"At scale {strengths[best]:g} the model keeps {kept[best]:.0%} of {of}, and general text costs "
        f"{_signed(cost[best])} nats a token against the base ({_signed(cost[full])} at full strength).",
    )


def _signed(x: float) -> str:
    return f"{'+' if x >= 0 else '−'}{abs(x):.3f}"


class _Gain:
    """The shares of a gain that strengths keep, with intervals.

    Attributes:
        kept: index of a strength -> the share, of those that were measured.
        intervals: the same with an interval.
    """

    def __init__(self, strengths: Sequence[float], means: Callable[[Sequence[float]], statistics.Means]):
        """Take (strengths) -> the means on the task of those."""
        self.strengths, self.means = strengths, means
        self.kept: dict[int, float] = {}
        self.intervals: dict[int, Interval] = {}

    def share(self, index: int) -> float:
        """The share that a strength keeps."""
        if index not in self.kept:
            found = self.means([*ENDS, self.strengths[index]])
            (before, after, here), (d0, d1, d) = found.whole, found.draws.T
            self.kept[index] = float((here - before) / (after - before))
            with np.errstate(divide="ignore", invalid="ignore"):
                drawn = (d - d0) / (d1 - d0)
            self.intervals[index] = statistics.interval_of(self.kept[index], drawn[np.isfinite(drawn)])
        return self.kept[index]


def frontier(
    source: Any,
    options: Options,
    general: Sequence[str] | None,
    out: Path | None = None,
    *,
    keep: float = 0.9,
    within: float | None = None,
    strengths: Sequence[float] = STRENGTHS,
    say: Callable[[str], None] = print,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Measure the task and loss on general text by the strength of the tuning, and choose a strength.

    Args:
        source: from `infer.source.find`.
        options: `data` are rows of the task; None: what the run held out. `rows` limits both. The first of `metrics`
            is what the gain is counted by, "loss" too; None: see `strengths.Scores`.
        general: files outside the tuning data; None: the held-out part of mixed-in sources.
        out: folder for eval.json and eval/; None: nothing is written.
        keep: see `choose`.
        within: see `choose`.
        strengths: among them 0 and 1.
        say: called with each sentence on the data, before anything is measured.
        progress: see `evaluation.Progress`.

    Returns:
        The part `frontier` of eval.json.

    Raises:
        UserError: as `evaluate`; or the strength cannot vary.
    """
    from jaxtune.train.runtime import prepare_jax

    began, step = time.time(), last_step(source)
    if not 0 < keep <= 1 or (within is not None and within < 0):
        raise UserError(f"--keep={keep:g} is a share above 0, up to 1, and --within nats a token, 0 or more.")
    prepare_jax()
    cfg = run_config(source)
    if options.metrics is not None and len(options.metrics) > 1:
        raise UserError(f"--frontier counts by one metric, not by {','.join(options.metrics)}; name one of them.")
    asked = options.metrics and [name for name in options.metrics if name not in LOSSES]
    task = Answers(source, cfg, options if options.metrics is None else replace(options, metrics=asked or ["loss"]))
    other = General(source, cfg, Options(data=general, metrics=["loss"], rows=options.rows), "--frontier")
    for line in (*task.lines, *other.lines):
        say(line)
    tuning = Tuning(pair(source, "--frontier", dtype_of(cfg)))
    found = {}
    with Kept(out and out / "eval" / "kept.jsonl") as kept:
        for name, evaluator in (("task", task), ("general", other)):
            done = progress(f"{name}: loss at {len(strengths)} strengths", len(evaluator.rows))
            nats = tuning.losses(evaluator.rows, strengths, kept, done)
            found[name] = statistics.means(nats, np.array([sum(row.mask) for row in evaluator.rows], float))
        cost = found["general"].whole - found["general"].whole[strengths.index(0.0)]
        scores = Scores(tuning, task, asked, kept, progress)
        chosen, gain = _chosen(strengths, found["task"], scores, cost, keep, within)
    report = {
        "target": str(source.run or source.adapter),
        "data": task.names,
        "general": other.names,
        "rows": len(task.rows),
        "general_rows": len(other.rows),
        "strengths": list(strengths),
        "losses": {name: [i._asdict() for i in means.intervals()] for name, means in found.items()},
        "kept": [i._asdict() if (i := gain.intervals.get(k)) else None for k in range(len(strengths))],
        "keep": keep,
        "within": within,
        "chosen": chosen.strength,
        "why": chosen.why,
        "notes": list(dict.fromkeys([*task.notes, *other.notes, *sampled(task.rows, other.rows)])),
        "seconds": round(time.time() - began, 2),
    }
    if scores.name is not None:
        report["score"] = _score(strengths, scores)
    if out is not None:
        write_part(source, out, "frontier", report, step)
    return report


def _chosen(
    strengths: Sequence[float],
    losses: statistics.Means,
    scores: Scores,
    cost: Sequence[float],
    keep: float,
    within: float | None,
) -> tuple[Chosen, _Gain]:
    """The strength, by scores where answers got better; and what is kept at those that were measured."""
    order, whole = by_cost(strengths, cost), range(len(strengths))
    if scores.name is None:
        gain = _Gain(strengths, lambda some: losses.columns([strengths.index(s) for s in some]))
        if losses.whole[strengths.index(1.0)] >= losses.whole[strengths.index(0.0)]:
            why = "The tuned model is not better on the task than its base, at no cost worth paying."
            return Chosen(None, why), gain
        for i in whole:
            gain.share(i)
        return choose(strengths, gain.kept, cost, keep, within, "the task's gain in loss"), gain

    def means(some: Sequence[float]) -> statistics.Means:
        values = np.stack([scores.at_strength(s) for s in some], 1)
        return statistics.means(values, np.ones(len(values)))

    gain = _Gain(strengths, means)
    before, after = means(ENDS).whole
    if after <= before:
        why = f"The tuned model is not better than its base by {scores.column.label}, at no cost worth paying."
        return Chosen(None, why), gain
    for s in ENDS:
        gain.share(strengths.index(s))
    best = bisect(order, gain.share, keep)
    if within is not None and cost[best] > within:  # how much can be kept
        gain.share(max((i for i in whole if cost[i] <= within), key=lambda i: cost[i]))
    return choose(strengths, gain.kept, cost, keep, within, f"the task's gain ({scores.column.label})"), gain


def _score(strengths: Sequence[float], scores: Scores) -> dict[str, Any]:
    """The scores at the strengths that were measured, and of how many rows; None elsewhere."""
    values: list[dict[str, float | None] | None] = []
    for strength in strengths:
        own = scores.found.get(strength)
        if own is None:
            values.append(None)
            continue
        (found,) = statistics.means(own[:, None], np.ones(len(own))).intervals()
        if scores.column.share:
            found = statistics.exact_at_the_edge(found, scores.measured[strength])
        values.append(found._asdict())
    rows = [scores.measured.get(strength) for strength in strengths]
    return {
        "metric": scores.name,
        "label": scores.column.label,
        "share": scores.column.share,
        "values": values,
        "rows": rows,
    }
