"""What the task gains against what is forgotten, by the strength of the tuning: one pass for all strengths.

Of LoRA the strength is one number a layer, so the strengths are vmapped over shared weights; of whole models each in
turn is a mixture of both, see `jaxtune.weights.strength`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import statistics
from jaxtune.evaluate.answers import Answers
from jaxtune.evaluate.evaluation import Options, Progress, dtype_of, last_step, run_config, silent, write_part
from jaxtune.evaluate.forgetting import General
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.rows import Row
from jaxtune.evaluate.systems import Pair, pair
from jaxtune.infer.generation import bucket
from jaxtune.infer.logprobs import batches_by_length, most_tokens
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.token_nats import token_nats
from jaxtune.weights.strength import at_strength, off_the_scale

STRENGTHS = tuple(i / 10 for i in range(13))  # 0, 0.1 ... 1.2


class Chosen(NamedTuple):
    """The strength that keeps most of the gain and forgets least.

    Attributes:
        strength: None where no one does what was asked.
        why: a sentence.
    """

    strength: float | None
    why: str


@partial(jax.jit, static_argnames=("module", "in_turn"))
def _nats(module, tuned, below, strengths, tokens, targets, where, in_turn: bool) -> jax.Array:
    """Nats of each row at each strength, f32[K, B]; tokens, targets i32[B, T], where bool[B, T]."""
    members = 1 if in_turn else len(strengths)

    def of(strength):
        params = at_strength(tuned, below, strength)
        hidden = module.apply({"params": params}, tokens, method="hidden")
        project = partial(head_logits, spec=module.spec)
        return token_nats(project, head_leaf(params), hidden, targets, where, members=members).sum(1)

    return jax.lax.map(of, strengths) if in_turn else jax.vmap(of)(strengths)


def nats_by_strength(
    models: Pair, rows: Sequence[Row], strengths: Sequence[float], kept: Kept, done: Callable[[int], None]
) -> np.ndarray:
    """The nats of each row's trained tokens at each strength, f64[N, K]."""
    below = off_the_scale(models.base, models.tuned)
    module, at = models.module, jnp.array(strengths, jnp.float32)

    def nats(batch):
        width = min(bucket(max(len(rows[i].tokens) - 1 for i in batch)), module.spec.positions)
        size = 1 << (len(batch) - 1).bit_length()
        tokens, targets = np.zeros((2, size, width), np.int32)
        where = np.zeros((size, width), bool)
        for k, i in enumerate(batch):
            row, n = rows[i], len(rows[i].tokens) - 1
            tokens[k, :n], targets[k, :n], where[k, :n] = row.tokens[:-1], row.tokens[1:], row.mask[1:]
        found = _nats(module, models.tuned, below, at, tokens, targets, where, in_turn=bool(below))
        return np.asarray(found, np.float64).T[: len(batch)].tolist()

    keys = [key_of("strengths", models.identity, list(strengths), row.tokens, row.mask) for row in rows]
    batches = batches_by_length([len(row.tokens) for row in rows], most_tokens() // 4)
    return np.array(in_batches(kept, keys, batches, nats, done))


def choose(
    strengths: Sequence[float],
    task: Sequence[float],
    general: Sequence[float],
    keep: float = 0.9,
    within: float | None = None,
) -> Chosen:
    """Choose the strength with the least loss on general text among those that keep enough of the task's gain.

    Args:
        strengths: among them 0, the base, and 1, the tuned model.
        task: losses a token on the task.
        general: the same on general text.
        keep: the share of the task's gain, from the base to the tuned model, that has to be kept.
        within: nats a token by which general text may be worse than under the base; None: any.
    """
    at = {s: i for i, s in enumerate(strengths)}
    gain = task[at[0.0]] - task[at[1.0]]
    if gain <= 0:
        return Chosen(None, "The tuned model is not better on the task than its base, at no cost worth paying.")
    kept = [(task[at[0.0]] - loss) / gain for loss in task]
    cost = [loss - general[at[0.0]] for loss in general]
    enough = [i for i, share in enumerate(kept) if share >= keep - 1e-9]
    best = min(enough, key=lambda i: (cost[i], strengths[i]))
    full = f"{_signed(cost[at[1.0]])} at full strength"
    told = (
        f"At scale {strengths[best]:g} the model keeps {kept[best]:.0%} of the task's gain, and general text costs "
        f"{_signed(cost[best])} nats a token against the base ({full})"
    )
    if within is not None and cost[best] > within:
        fits = [i for i in range(len(cost)) if cost[i] <= within]
        most = max(fits, key=lambda i: kept[i])
        return Chosen(
            None,
            f"No scale keeps {keep:.0%} of the task's gain within {within:g} nats of the base: at "
            f"{strengths[best]:g} general text costs {_signed(cost[best])}, and within {within:g} at most "
            f"{kept[most]:.0%} of the gain is kept, at {strengths[most]:g}.",
        )
    return Chosen(strengths[best], f"{told}.")


def _signed(x: float) -> str:
    return f"{'+' if x >= 0 else '−'}{abs(x):.3f}"


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
    """Measure loss on the task and on general text at each strength of the tuning.

    Args:
        source: from `infer.source.find`.
        options: `data` are rows of the task; None: what the run held out. `rows` limits both.
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
    task = Answers(source, cfg, replace(options, metrics=["loss"]))
    other = General(source, cfg, Options(data=general, metrics=["loss"], rows=options.rows), "--frontier")
    for line in (*task.lines, *other.lines):
        say(line)
    models = pair(source, "--frontier", dtype_of(cfg))
    found = {}
    with Kept(out and out / "eval" / "kept.jsonl") as kept:
        for name, evaluator in (("task", task), ("general", other)):
            done = progress(f"{name}: loss at {len(strengths)} strengths", len(evaluator.rows))
            nats = nats_by_strength(models, evaluator.rows, strengths, kept, done)
            counts = np.array([sum(row.mask) for row in evaluator.rows], float)
            found[name] = [statistics.interval(np.stack([n, counts], 1)) for n in nats.T]
    chosen = choose(strengths, *([i.value for i in found[name]] for name in ("task", "general")), keep, within)
    report = {
        "target": str(source.run or source.adapter),
        "data": task.names,
        "general": other.names,
        "rows": len(task.rows),
        "general_rows": len(other.rows),
        "strengths": list(strengths),
        "losses": {name: [interval._asdict() for interval in intervals] for name, intervals in found.items()},
        "keep": keep,
        "within": within,
        "chosen": chosen.strength,
        "why": chosen.why,
        "notes": list(dict.fromkeys([*task.notes, *other.notes])),
        "seconds": round(time.time() - began, 2),
    }
    if out is not None:
        write_part(source, out, "frontier", report, step)
    return report
