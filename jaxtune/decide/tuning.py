"""Tuned candidates: a run of its own for each, made by the config of the decision; killed ones resume."""

import io
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import config
from jaxtune.decide.candidates import TUNED, Answerer, Outcome, Questions, answered
from jaxtune.errors import UserError
from jaxtune.evaluate.asks import Ask
from jaxtune.evaluate.kept import Kept
from jaxtune.files import atomic_write_text
from jaxtune.reading import read_json

LEAST = 1 / 3  # of the steps of a training on all rows, that one on few rows has
NOT_MEASURED = {  # of a config: what a training beside others leaves out
    "data.eval": None,
    "data.eval_fraction": 0.0,
    "data.weights": None,
    "train.eval_every": 0,
    "train.eval_batches": 0,
    "train.early_stop": 0,
    "train.best": "eval/loss",
    "evaluate.samples": 0,
    "evaluate.prompts": None,
    "evaluate.metrics": None,
    "evaluate.general": None,
    "evaluate.known": None,
    "log.tensorboard": False,
    "log.wandb": False,
    "log.progress": False,
}


def sizes(rows: int, asked: Sequence[int] | None = None, count: int = 3) -> list[int]:
    """How many rows LoRA is tuned on: a sixteenth, a quarter and all, of 16 rows or more.

    Raises:
        UserError: there are fewer rows than were asked for.
    """
    if asked is None:
        return sorted({max(min(16, rows), rows // 4**i) for i in range(count)})
    wrong = next((n for n in asked if not 1 <= n <= rows), None)
    if wrong is not None:
        raise UserError(f"--sizes={wrong}: there are {rows:,} training rows beside the held-out ones.")
    return sorted(set(asked))


def config_for(cfg: Any, file: Path, rows: int, of: int, **values: Any) -> Any:
    """The config of a training on some of the rows: as many passes as on all, but at least a third of its steps.

    Args:
        cfg: of the decision.
        file: the rows.
        rows: how many.
        of: how many there are in all.
        values: other settings, with "__" for dots.
    """
    changed = NOT_MEASURED | {"data.train": (str(file),)} | {name.replace("__", "."): v for name, v in values.items()}
    share = max(LEAST, rows / of)
    if cfg.train.steps is not None:
        changed["train.steps"] = max(1, round(cfg.train.steps * share))
    else:
        changed["train.epochs"] = cfg.train.epochs * share * of / rows
    return config.replaced(cfg, changed)


def train(cfg: Any, workdir: Path) -> None:
    """Train a run in its directory, or resume it; a finished one is left as it is. What it says goes to its log.

    Raises:
        UserError, RunFailed, Interrupted: as `jaxtune train`.
    """
    from jaxtune.commands.train import Clock
    from jaxtune.config.recipe import experiment
    from jaxtune.run import fit, running
    from jaxtune.run.experiment import open_data
    from jaxtune.run.training import build
    from jaxtune.run.workdir import as_begun, check_room, check_workdir, dated, explained_disk, held

    if (workdir / "summary.json").is_file():
        return
    clock, said = Clock(time.time()), io.StringIO()
    argv = ["jaxtune", "train", f"--config={workdir / 'config.json'}", f"--workdir={workdir}"]
    try:
        with ExitStack() as stack:
            stack.enter_context(held(workdir))
            stack.enter_context(redirect_stdout(said))
            stack.enter_context(redirect_stderr(said))
            cfg = as_begun(cfg, workdir)
            check_workdir(workdir, cfg)
            run = experiment(cfg)
            rows = open_data(run)
            check_workdir(workdir, cfg, rows.report.fingerprint, run.base.files)
            cfg = dated(cfg, rows)
            if cfg.train.micro_batch == "auto":
                cfg = config.replaced(cfg, fit.resolve_micro_batch(experiment(cfg), rows)[0])
            run = experiment(cfg)
            job = build([run], rows)
            check_room(workdir, job)
            stack.enter_context(fit.explained_memory(run))
            stack.enter_context(explained_disk(workdir))
            running.alone(job, workdir, argv, clock)
    finally:
        if said.getvalue() and workdir.is_dir():
            atomic_write_text(workdir / "jaxtune.log", said.getvalue())


def training_of(workdir: Path) -> dict[str, Any]:
    """What the training of a finished run took."""
    from jaxtune.train.log import read_metrics

    summary = read_json(workdir / "summary.json")
    tokens = max((m["train/tokens"] for m in read_metrics(workdir) if "train/tokens" in m), default=0)
    seconds = summary["seconds"]
    return {
        "seconds": round(sum(seconds.get(part, 0.0) for part in ("features", "setup", "train")), 3),
        "tokens": int(tokens),
        "trainable": summary["trainable"],
        "folder": str(workdir),
    }


def measure_text(
    name: str,
    what: str,
    workdir: Path,
    rows: int,
    questions: Questions,
    kept: Kept,
    stop: str,
    leader: Sequence[float] | None,
    batch_size: int = 32,
) -> Outcome:
    """Let a finished run that continues text answer the held-out rows, which it reads without any instruction."""
    from jaxtune.evaluate import evaluation
    from jaxtune.evaluate.answers import _virtual
    from jaxtune.evaluate.systems import systems
    from jaxtune.infer.source import eos_ids, find, tokenizer_of

    source = find(workdir)
    [system] = systems(source, base=False, dtype=evaluation.dtype_of(evaluation.run_config(source)))
    tokenizer = tokenizer_of(source)
    virtual = _virtual(source)
    questions = replace(questions, positions=questions.positions - virtual)
    answerer = Answerer(
        system, tokenizer, kept, questions.max_new_tokens, eos_ids(tokenizer, source), stop, batch_size=batch_size
    )
    own = {"needs": rows, "training": training_of(workdir), "virtual": virtual}
    return answered(name, TUNED, what, questions, questions.rows(None), answerer, leader, **own)


def measure_labels(
    name: str,
    what: str,
    workdir: Path,
    rows: int,
    questions: Questions,
    file: Path,
    columns: dict[str, str] | None,
) -> Outcome:
    """Let a finished run with a label head predict the labels of the held-out rows.

    Args:
        name: of the candidate.
        what: in words.
        workdir: of the run.
        rows: that it was trained on.
        questions: what is asked, of one label each.
        file: the held-out rows, one a line, in their order.
        columns: of the file.
    """
    from jaxtune.evaluate.classifiers import Classes
    from jaxtune.evaluate.evaluation import Options, run_config, silent
    from jaxtune.infer.source import find

    source = find(workdir)
    evaluator = Classes(source, run_config(source), Options(data=[str(file)], columns=columns, base=False))
    [system] = evaluator.systems()
    seconds = []
    for _ in range(2):  # the first compiles
        began = time.perf_counter()
        found = evaluator.measure(system, Kept(), silent)
        seconds.append(time.perf_counter() - began)
    answers = [""] * len(questions.asks)
    for place, prediction in zip(evaluator.rows.origin.tolist(), found, strict=True):
        answers[int(place) - 1] = evaluator.form.names[prediction.labels[0]]
    scores = questions.scored(0, answers)
    return Outcome(
        name,
        TUNED,
        what,
        scores,
        read=evaluator.tokens / max(1, len(evaluator.rows)),
        written=0.0,
        seconds=seconds[-1] / len(scores),
        latency=_one(evaluator, system),
        needs=rows,
        training=training_of(workdir),
    )


def _one(evaluator: Any, system: Any) -> float:
    """Seconds of a text that is read alone."""
    from jaxtune.evaluate.classifiers import classify

    first = evaluator.rows.select(np.arange(len(evaluator.rows)) == 0)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        classify(system, first, evaluator.form, Kept())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def forgotten(workdir: Path, files: Sequence[str], rows: int) -> dict[str, Any]:
    """What a finished run lost on general text, as `jaxtune eval --forgetting` measures it and keeps it in the run.

    Args:
        workdir: of the run.
        files: with general text.
        rows: of it at most.

    Returns:
        loss (the change a token, with its interval), lost and gained (answers that turned wrong and right; None where
        the text has no answers), rows.
    """
    from jaxtune.evaluate.evaluation import Options, evaluate
    from jaxtune.evaluate.forgetting import FORGETTING
    from jaxtune.infer.source import find

    options = Options(data=list(files), rows=rows)
    report = evaluate(find(workdir), options, workdir, part=FORGETTING, say=lambda line: None)
    flips = next(iter(report.get("flips", {}).values()), {})
    return {
        "loss": report["metrics"]["loss"]["difference"],
        "lost": flips.get("lost"),
        "gained": flips.get("gained"),
        "rows": report["rows"],
    }


def eval_loss(workdir: Path) -> float:
    """The last held-out loss of a finished run; infinite where it is none."""
    losses = [
        entry["eval/loss"]
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if "eval/loss" in (entry := json.loads(line))
    ]
    return losses[-1] if losses and losses[-1] is not None else float("inf")


def subset(folder: Path, name: str, text: str) -> Path:
    """Write rows for a training, unless the file has them already."""
    file = folder / name
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        atomic_write_text(file, text)
    return file


def asks_of(asks: Sequence[Ask], rows: int) -> list[Ask]:
    """The first rows, so that a smaller training set is part of a larger one."""
    return list(asks[:rows])
