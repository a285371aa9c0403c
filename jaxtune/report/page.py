"""The page of one run: result, findings, curves, samples, cost, how to use and repeat it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxtune.config import ADAPTERS, BY_PATH
from jaxtune.evaluate.known import CLASSES, LOSS, SURENESS
from jaxtune.hf.card import loading
from jaxtune.objectives.task import TASKS
from jaxtune.report import evaluation
from jaxtune.report.chart import Chart, Series, chart, smooth
from jaxtune.report.data import data_view
from jaxtune.report.render import render
from jaxtune.report.run import Measured, RunRecord, read_object
from jaxtune.report.samples import sample
from jaxtune.report.sentences import costs, findings, measured, summary
from jaxtune.report.verdict import verdict
from jaxtune.report.words import number, setting

MOST_SAMPLES = 20
HEADLINE = (
    *("loss", "json_exact", "numeric", "accuracy", "entity_f1"),
    *("exact_match", "rouge_l", "json_valid", "margins", "perplexity"),
)  # the headline of a page: the first two that were measured


def run_page(run: RunRecord) -> str:
    """Return the HTML of a run's page."""
    held_out = run.evaluation.get("held_out")
    forgetting, confidence = run.evaluation.get("forgetting"), run.evaluation.get("confidence")
    metrics = measured(run)
    return render(
        "run.html",
        title=run.name,
        run=run,
        kind=f"{run.settings['tune.method']} · {run.model}",
        summary=summary(run),
        verdict=verdict(run),
        headline=[_headline(run, metrics[key]) for key in HEADLINE if key in metrics][:2],
        costs=costs(run),
        best=run.best(),
        findings=findings(run),
        held_out=held_out,
        who=evaluation.who(metrics),
        results=evaluation.by_label(metrics) if evaluation.who(metrics) != ["tuned"] or held_out else [],
        evaluate=shlex.join(["jaxtune", "eval", str(run.folder)]),
        groups=evaluation.groups(held_out or {}),
        gaps=evaluation.gaps(held_out or {}),
        confusions=evaluation.confusions(held_out or {}),
        forgetting=forgetting,
        forgotten=evaluation.by_label(forgetting["metrics"]) if forgetting else [],
        forgotten_groups=evaluation.groups(forgetting or {}),
        confidence=confidence,
        sureness=evaluation.by_label(run.evaluation["confidence"]["metrics"]) if "confidence" in run.evaluation else [],
        confidence_who=evaluation.who(run.evaluation["confidence"]["metrics"])
        if "confidence" in run.evaluation
        else [],
        risk_charts=risk_charts(run.evaluation.get("confidence")),
        memory=run.evaluation.get("memory"),
        memory_tables=evaluation.memory_tables(run.evaluation["memory"]) if "memory" in run.evaluation else [],
        frontier=run.evaluation.get("frontier"),
        strengths=evaluation.strengths(run.evaluation["frontier"]) if "frontier" in run.evaluation else None,
        frontier_charts=frontier_charts(run.evaluation.get("frontier")),
        flips=evaluation.flips(forgetting or {}),
        tasks=evaluation.task_rows(run.evaluation["tasks"]) if "tasks" in run.evaluation else None,
        charts=curves(run),
        evaluations=_evaluations(run),
        samples=_samples(run),
        data=data_view(run.data, f"{run.folder}: the report on its data"),
        data_lines=run.facts("data", str),
        times=_times(run),
        modules=_modules(run),
        settings=settings_rows(run.overrides),
        result=_result(run),
        use=_use(run),
        again=reproduce(run),
    )


def _headline(run: RunRecord, entry: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """(what, before or "", after, a note)."""
    names = [who for who in ("base", "tuned", "model") if who in entry]
    shown = [evaluation.value(entry, who).partition(" [")[0] for who in names]
    note = f"on {entry['rows']:,} held-out rows" if entry["rows"] else ""
    if not note and entry["label"] == LOSS and run.best():
        note = f"the best, at step {run.best().step:,}"
    return entry["label"], shown[0] if len(shown) > 1 else "", shown[-1] if shown else "", note


# ------------------------------------------------------------------------------------------------------------- curves


def curves(run: RunRecord) -> list[Chart]:
    """The charts of the losses and of related metrics."""
    loss, evals, best = run.series("train/loss"), run.series("eval/loss"), run.best()
    note = f"best {number(best.value)} at step {best.step:,}" if best else ""
    held_out = Series("held out", evals, 2, "dots", mark=best.step if best else None, note=note)
    general = Series("general text", run.series("eval/general_loss"), 3, "dots")
    charts = [
        chart("Loss", [*train_loss_series(loss), held_out], wide=True),
        chart("Loss on general text", [general]),
        *_remembered(run),
        *_answers(run),
        chart("Learning rate", [Series("learning rate", run.series("train/lr"), 1)], zero=True),
        chart("Gradient norm", [Series("gradient norm", run.series("train/grad_norm"), 1)]),
        chart("Tokens a second", [Series("tokens a second", run.series("train/tokens_per_second"), 1)], zero=True),
    ]
    return [c for c in charts if c]


def _remembered(run: RunRecord) -> list[Chart | None]:
    """What training rows, canaries and questions by what the base knew of them say of a run's memory."""
    times = run.settings["data.canaries"] or ()
    exposed = [
        Series(
            {0: "never", 1: "once"}.get(n, f"{n:,} times"), run.series(f"eval/canaries/{n}"), i + 1 if n else 0, "dots"
        )
        for i, n in enumerate(sorted(times))
    ]
    apart = [Series("AUC", run.series("eval/memory/auc"), 1, "dots")]
    same = [
        Series("training rows", run.series("eval/memory/verbatim"), 1, "dots"),
        Series("held-out rows", run.series("eval/memory/verbatim_held_out"), 2, "dots"),
    ]
    charts = [
        chart("Training rows told from held-out ones by their loss (0.5: not at all)", apart),
        chart("Rows that go on word for word", same, zero=True),
        chart("Exposure of canaries, bits", exposed, zero=True),
    ]
    for side, title in (("train", "trained rows"), ("held_out", "other rows")):
        lines = [
            Series(name, run.series(f"eval/known/{side}/{name}"), colour, "dots")
            for colour, name in enumerate(CLASSES, 1)
        ]
        charts.append(chart(f"Right answers to {title}, by what the base knew", lines, zero=True))
    return charts


def _answers(run: RunRecord) -> list[Chart | None]:
    """What a run over better and worse answers has beside its loss."""

    def both(name: str, label: str, colour: int) -> list[Series]:
        return [
            Series(label, run.series(f"train/{name}"), colour, "faint"),
            Series(f"{label}, held out", run.series(f"eval/{name}"), colour, "dots"),
        ]

    return [
        chart("Margin of the rewards", both("margins", "chosen - rejected", 1), zero=True),
        chart("Rewards", [*both("rewards/chosen", "chosen", 1), *both("rewards/rejected", "rejected", 2)], zero=True),
        chart("Accuracy", both("accuracy", "right way round", 1)),
        chart("KL to the reference or teacher", both("kl", "nats", 1), zero=True),
    ]


def frontier_charts(part: Mapping[str, Any] | None) -> list[Chart]:
    """Loss on the task over loss on general text, and both over the strength of the tuning."""
    if part is None:
        return []
    scales, chosen = part["strengths"], part["chosen"]
    task, general = ([i["value"] for i in part["losses"][name]] for name in ("task", "general"))
    at = None if chosen is None else general[scales.index(chosen)]
    path = Series("scales 0 to 1.2", [Measured(x, y) for x, y in zip(general, task)], 1, "dots", mark=at)
    found = [chart("Loss on the task over loss on general text", [path], by="loss on general text", wide=True)]
    if score := part.get("score"):
        points = [Measured(x, i["value"]) for x, i in zip(scales, score["values"]) if i is not None]
        title = f"{score['label'].capitalize()} by scale"
        found.append(chart(title, [Series(score["label"], points, 2, "dots", mark=chosen)], by="scale", zero=True))
    for name, values, colour in (("Loss on the task", task, 1), ("Loss on general text", general, 3)):
        points = [Measured(scale, value) for scale, value in zip(scales, values)]
        found.append(chart(name, [Series(name, points, colour, "dots", mark=chosen)], by="scale"))
    return [c for c in found if c]


def risk_charts(part: Mapping[str, Any] | None) -> list[Chart]:
    """The share of wrong answers among the surest, for each confidence."""
    if part is None:
        return []
    found = []
    for kind, curves in part["risk_coverage"].items():
        series = [
            Series(name, [Measured(*point) for point in points], {"base": 0}.get(name, 1))
            for name, points in curves.items()
        ]
        found.append(
            chart(f"Wrong among the surest, by {SURENESS.get(kind, kind)}", series, by="share answered", zero=True)
        )
    return [c for c in found if c]


def train_loss_series(loss: Sequence[Any]) -> list[Series]:
    """The logged loss, faint, under its moving average; a short one without the average."""
    if len(loss) < 25:
        return [Series("training", loss, 1)]
    return [Series("training", loss, 1, "faint"), Series("training, smoothed", smooth(loss), 1)]


def _evaluations(run: RunRecord) -> list[tuple[int, list[float | None]]]:
    """(step, training loss, held-out loss, perplexity) of each evaluation, where there are two or more."""
    columns = [dict(run.series(key)) for key in ("train/loss", "eval/loss", "eval/perplexity")]
    steps = sorted(columns[1])
    return [(step, [column.get(step) for column in columns]) for step in steps] if len(steps) > 1 else []


def _times(run: RunRecord) -> list[tuple[str, float, float]]:
    """(part, seconds, share of all)."""
    parts = run.seconds_by_part()
    total = sum(parts.values()) or 1.0
    return [(name, seconds, seconds / total) for name, seconds in parts.items()]


def _modules(run: RunRecord) -> list[tuple[str, int, int]]:
    """(module, trained, all) parameters, those that are trained most first, all that is frozen together."""
    groups = run.groups()
    found = [(name, trained, total) for name, (trained, total) in groups.items() if trained]
    frozen = sum(total for trained, total in groups.values() if not trained)
    return sorted(found, key=lambda entry: -entry[1]) + ([("all others", 0, frozen)] if frozen else [])


def _samples(run: RunRecord) -> list[Any]:
    held_out = run.evaluation.get("held_out", {})
    answered = [s for s in held_out.get("samples", ()) if isinstance(s, dict) and "after" in s]
    samples = (answered or run.facts("samples", dict) or run.sampled)[:MOST_SAMPLES]
    with_before = any(entry.get("before") for entry in samples)
    laid_out = [sample(entry, with_before=with_before) for entry in samples]
    return [s for s in laid_out if s.texts or s.prompt is not None]


# ------------------------------------------------------------------------------------------------- facts and next steps


class Snippet(NamedTuple):
    """Code to paste, with what it is for."""

    title: str
    code: str


def _result(run: RunRecord) -> Path:
    """The exported directory: the existing one, or the one that the method will write."""
    there = [run.folder / name for name in ("adapter", "model") if (run.folder / name).is_dir()]
    return there[0] if there else run.folder / ("adapter" if run.settings["tune.method"] in ADAPTERS else "model")


def _use(run: RunRecord) -> list[Snippet]:
    """How to try and load the result; empty before it exists."""
    result = _result(run)
    if not result.is_dir():
        return []
    auto = (
        run.summary.get("auto_class") or TASKS[run.settings["objective.name"]].auto_class
    )  # older runs do not record it
    folder, base = shlex.quote(str(run.folder)), str(run.settings["model.path"])
    snippets = [Snippet("on the command line", f"jaxtune generate {folder} --prompt='...'")]
    kept = result / "config.json"  # of an adapter: names the labels of its head
    labels = read_object(kept, "a run") if result.name == "adapter" and kept.is_file() else None
    vectors = (result / "modules.json").is_file()
    code = loading(base, str(result), adapter=result.name == "adapter", auto=auto, config=labels, vectors=vectors)
    snippets += [Snippet(f"with {name}", lines) for name, lines in code.items()]
    continues = run.summary.get("continues", auto == "AutoModelForCausalLM")
    return snippets if continues else snippets[1:]


def reproduce(run: RunRecord) -> list[Snippet]:
    """The command as it was typed, or one that trains a point of a sweep alone; and one with every setting."""
    argv = run.facts("argv", str)
    typed = "alone, outside the sweep" if "point" in run.summary else "as it was started"
    config, workdir = run.folder / "config.json", run.folder.with_name(f"{run.name}-again")
    command = shlex.join(["jaxtune", "train", f"--config={config}", f"--workdir={workdir}"])
    snippets = [Snippet(typed, shlex.join(argv))] if argv else []
    return [*snippets, Snippet("with every setting of this run", command)]


def settings_rows(values: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(path, value, default, meaning) of settings."""
    rows = []
    for path, value in values.items():
        default = BY_PATH[path].default
        shown = "–" if default is None or default == {} else setting(default)
        rows.append((path, setting(value), shown, BY_PATH[path].doc.removesuffix(" (required)")))
    return rows
