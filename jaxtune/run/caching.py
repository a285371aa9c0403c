"""Decide whether a run's features are computed once: if that is possible, saves time and fits on disk."""

from typing import Any

from jaxtune.errors import UserError
from jaxtune.run.experiment import Data, Experiment
from jaxtune.train import processes
from jaxtune.train.features import GIB, Extractor, OncePerRow, Store, by_length_of_batch, find_cut
from jaxtune.train.parallel import DATA

PAYS = 1.5  # passes over the data from which caching saves time, as computing features takes one


def plan(
    experiment: Experiment, rows: Data, mask: Any, frozen: Any, passes: float, mesh: Any
) -> tuple[Extractor | None, str | None]:
    """Decide whether a run caches features: (what computes them or None, a line for the user or None).

    Args:
        experiment: the run's.
        rows: its data.
        mask: which parameters are trained.
        frozen: the parameters that are not.
        passes: how often the run sees a token, on average.
        mesh: whose devices share the rows.

    Raises:
        UserError: train.cache_features=on, but they cannot be cached.
    """
    asked, why, module = experiment.train.cache_features, None, experiment.module
    if asked == "off" or (asked == "auto" and passes < PAYS):
        return None, None
    cut = find_cut(module, mask) if experiment.task.features else None
    if not experiment.task.features:
        why = "batches of this task hold tokens only"
    elif rows.streamed is not None:
        why = "data.streaming keeps rows on disk"
    elif processes.several():
        why = "several processes share the run"
    elif set(mesh.shape) != {DATA}:
        why = "the mesh splits weights, and the forward pass that fills the cache reads whole ones"
    elif cut is None:
        why = f"tune.method={experiment.method} trains something in or below the first block, so nothing lies below"
    elif experiment.data.packing and by_length_of_batch(module, cut):
        why = "the rotary embedding depends on what is packed together; set data.packing=false"
    else:
        extractor = Extractor(module, cut, frozen, Store(int(experiment.train.cache_gib * GIB)), mesh)
        sizes = extractor.sizes(rows.sets)
        why = extractor.store.why_not(sizes)
        if why is None:
            return extractor, _kept(
                extractor, rows, f"Features of {{:,}} rows ({cut}; {{:.3g}} GiB)", "train.cache_features"
            )
    if asked == "on":
        raise UserError(f"train.cache_features=on: {why}.")
    return None, f"Features are not cached: {why}." if cut else None


def plan_once(experiment: Experiment, rows: Data, base: Any, mesh: Any) -> tuple[OncePerRow | None, str | None]:
    """What computes of each row what the task keeps of it, or None; and a line on that.

    Args:
        experiment: the run's.
        rows: the run's.
        base: the base's parameters.
        mesh: whose devices share the rows.

    Raises:
        UserError: there is no room for it.
    """
    if experiment.task.once is None:
        return None, None
    once = experiment.task.once(base, Store(int(experiment.train.cache_gib * GIB)), mesh)
    if why := once.store.why_not(once.sizes(rows.sets)):
        raise UserError(f"The {once.what} cannot be kept: {why}; or {once.store.off}.")
    return once, _kept(once, rows, f"The {once.what} of {{:,}} rows ({{:.3g}} GiB)", "train.cache_gib is the most")


def _kept(once: OncePerRow, rows: Data, words: str, setting: str) -> str:
    sizes = once.sizes(rows.sets)
    found = all(once.store.has(key, size) for key, size in sizes.items())
    count, gib = sum(len(part) for parts in rows.sets for part in parts), sum(sizes.values()) / GIB
    how = "found" if found else "computed once and kept"
    return f"{words.format(count, gib)} are {how} in {once.store.folder} ({setting})."


def passes(experiment: Experiment, rows: Data, batches: Any, held_out: Any, steps: int) -> float:
    """How often training and evaluations see a token, on average over both sets."""
    train = sum(int(part.length.sum()) for part in rows.train)
    seen = train * batches.epoch(steps)
    if held_out is None:
        return seen / train
    every = experiment.train.eval_every or max(1, round(batches.steps_per_epoch))
    share = min(1.0, (experiment.train.eval_batches or len(held_out)) / len(held_out))
    size = int(rows.eval.length.sum())
    return (seen + size * share * (1 + -(-steps // every))) / (train + size)
