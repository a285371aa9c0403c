"""The parts of a model card on a run and its evaluation."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtune.hf.card import cell, put_evaluation
from jaxtune.report.evaluation import difference, read_evaluation, value, verdict, who
from jaxtune.report.run import as_run, read_run
from jaxtune.report.sentences import costs, findings, measured
from jaxtune.report.verdict import verdict as verdict_of
from jaxtune.train.log import read_metrics


def carry_evaluation(run: Path, out: Path) -> None:
    """Put the results of `jaxtune eval` for a run's last step into the model card in `out`."""
    steps = [m["step"] for m in read_metrics(run)] if (run / "metrics.jsonl").is_file() else []
    evaluation = read_evaluation(run, max(steps, default=None))
    if not (out / "README.md").is_file():
        return
    block = evaluation_block(evaluation)
    if steps:
        record = read_run(run)
        told = " ".join(verdict_of(replace(record, folder=Path(record.name))))  # a card names no folder of this machine
        block = block.replace("## Evaluation", f"## Evaluation\n\n{told}", 1) if block else f"## Evaluation\n\n{told}"
    if block:
        put_evaluation(out / "README.md", block)


def evaluation_block(evaluation: Mapping[str, Any]) -> str:
    """The results of eval.json in Markdown; empty where there are none."""
    blocks = []
    held_out, forgetting = evaluation.get("held_out"), evaluation.get("forgetting")
    if held_out:
        blocks.append(_results(held_out, "held-out rows"))
    if forgetting:
        blocks.append(_results(forgetting, "rows outside the task"))
        if flips := forgetting.get("flips"):
            heads = ["answers that flipped", "rows", "right to wrong", "wrong to right", "verdict"]
            rows = [
                [e["label"], *(f"{e[k]:,}" for k in ("rows", "lost", "gained")), verdict(e)] for e in flips.values()
            ]
            blocks.append("\n".join(_table([heads, *rows])))
    if held_out or forgetting:
        blocks.append(
            "Intervals hold 95% (bootstrap over rows; where no row differs, binomial); verdicts are those of a paired "
            "randomisation test."
        )
    if frontier := evaluation.get("frontier"):
        blocks.append(frontier["why"])
    if memory := evaluation.get("memory"):
        blocks.append(memory["why"])
    tasks = evaluation.get("tasks")
    if tasks:
        results = tasks["results"]
        rows = [["task of lm-evaluation-harness", "metric", *results]]
        for task, metrics in next(iter(results.values())).items():
            for metric in metrics:
                rows.append([task, metric, *(f"{results[who][task][metric]['value']:.4f}" for who in results)])
        blocks.append("\n".join(_table(rows)))
    return "\n\n".join(["## Evaluation", *blocks]) if blocks else ""


def _results(part: Mapping[str, Any], of: str) -> str:
    """The table of a part's metrics; `of`: its rows, in words."""
    entries = part["metrics"]
    names = who(entries)
    both = len(names) == 2
    heads = [f"{part['rows']:,} {of}", *names, *(["difference", "verdict"] if both else [])]
    rows = [
        [entry["label"], *(value(entry, n) for n in names), *([difference(entry), verdict(entry)] if both else [])]
        for entry in entries.values()
    ]
    return "\n".join(_table([heads, *rows]))


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def run_facts(
    config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]] = (), summary: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The facts on a run for its model card, the same as on its page: label -> value.

    Args:
        config: the resolved config, a mapping of sections.
        metrics: the records of metrics.jsonl, in order.
        summary: that of summary.json.
    """
    run = as_run(config, metrics, summary)
    settings = run.settings
    facts: dict[str, Any] = {"method": settings["tune.method"]}
    if settings["tune.method"] == "lora":
        facts |= {label: settings[f"tune.lora.{label}"] for label in _LORA}
        if experts := settings.get("tune.lora.target_parameters"):
            facts["target_parameters"] = experts
    fraction, lr = settings["data.eval_fraction"], settings["optim.lr"]
    facts |= {
        "data": _public(settings["data.train"]),
        "held-out data": _public(settings["data.eval"]) or (f"{fraction:g} of it" if fraction else "none"),
        "optimizer": f"{settings['optim.name']}, learning rate {lr:g}, {settings['optim.schedule']} schedule",
        "batch size": settings["train.batch_size"],
        "seed": settings["train.seed"],
    }
    if run.metrics:
        facts["steps"] = run.last_step()
    losses = run.series("train/loss")
    if losses:
        first, last = losses[0], losses[-1]
        facts["training loss"] = f"{first.value:.4f} (step {first.step}) to {last.value:.4f} (step {last.step})"
    best, metrics = run.best(), measured(run)
    if best:
        facts["best held-out loss"] = f"{best.value:.4f} (step {best.step})"
        metrics = metrics if "base" in metrics["loss"] else {k: entry for k, entry in metrics.items() if k != "loss"}
    facts |= dict(_before_and_after(metrics))
    facts |= {cost.label.lower(): f"{cost.figure} ({cost.note})" if cost.note else cost.figure for cost in costs(run)}
    facts |= {f"found in the run, {f['check']}": f"{f['message']} {f['fix']}".strip() for f in findings(run)}
    for entry in run.data.get("findings", ()):
        if entry.get("severity") in ("error", "warning"):
            facts[f"found in the data, {entry.get('check')}"] = entry.get("message")
    return facts | {"versions": _versions(run.versions)}


def _public(source: Any) -> Any:
    """The name of a data source, without folders of this machine."""
    if isinstance(source, list | tuple):
        return [_public(one) for one in source]
    return Path(source).name if isinstance(source, str) and source.startswith(("/", "~", ".")) else source


_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules")


def _before_and_after(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    for entry in metrics.values():
        values = [value(entry, who) for who in ("base", "tuned") if who in entry]
        yield entry["label"], " before, ".join(values) + " after" if len(values) == 2 else values[0]


def _versions(recorded: Mapping[str, str] | None) -> list[str]:
    if not recorded:
        recorded = {name: metadata.version(name) for name in ("jax", "flax", "optax", "transformers")}
    # A run also records the fingerprint of its data there, and where its features end, and other files.
    return [
        f"{name} {version}" for name, version in recorded.items() if name not in ("rows", "data", "features", "others")
    ]
