"""The model card, README.md of an exported directory: front matter for the hub, facts of the run, how to load it."""

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxtune.files import atomic_write_text

AUTO = {  # objective.name -> the class of transformers that loads the result
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
}


def loading(base: str, here: str, *, adapter: bool, auto: str = AUTO["causal_lm"]) -> dict[str, str]:
    """Code to paste that loads a result: library -> lines.

    Args:
        base: hub id or path of the model that was tuned.
        here: the directory of the adapter or the model.
        auto: the class of transformers that loads it.
    """
    base, here = json.dumps(base), json.dumps(here)
    if adapter:
        return {
            "peft": "from peft import PeftModel\n"
            f"from transformers import {auto}, AutoTokenizer\n\n"
            f"base = {auto}.from_pretrained({base})\n"
            f"model = PeftModel.from_pretrained(base, {here})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({here})",
            "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({base})\n"
            f"params, mask, config = jaxtune.load_adapter(module, params, {here}, base={base})",
        }
    return {
        "transformers": f"from transformers import {auto}, AutoTokenizer\n\n"
        f"model = {auto}.from_pretrained({here})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({here})",
        "jaxtune": f"import jaxtune\n\nmodule, params = jaxtune.load({here})",
    }


_ADAPTERS = {"lora": "A LoRA adapter", "ia3": "An (IA)³ adapter", "prompt_tuning": "A tuned prompt"}
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModel": "feature-extraction",
    "AutoModelForImageClassification": "image-classification",
}


def model_card(
    *,
    name: str,
    base: str,
    adapter: str | None,
    facts: Mapping[str, Any] | None = None,
    notes: Iterable[str] = (),
    auto: str = "AutoModelForCausalLM",
) -> str:
    """Return the text of README.md.

    Args:
        name: of the directory.
        base: hub id or path of the model that was tuned.
        adapter: for a PEFT directory rather than a whole model, its kind, "lora".
        facts: what to tell about the run, label -> value, in order; see `run_facts`.
        notes: sentences on what a reader would not expect.
        auto: the class of transformers that loads the model.
    """
    library = "peft" if adapter else "transformers"
    tags = ["jaxtune", *([adapter, f"base_model:adapter:{base}"] if adapter else [])]
    front = [
        f"base_model: {json.dumps(base)}",
        f"library_name: {library}",
        f"pipeline_tag: {_PIPELINES[auto]}",
        "tags:",
        *(f"- {json.dumps(tag)}" for tag in tags),
    ]
    what = f"{_ADAPTERS.get(adapter, 'An adapter')} for" if adapter else "A fine-tuned version of"
    blocks = ["\n".join(["---", *front, "---"]), f"# {name}", f"{what} `{base}`, made with jaxtune."]
    blocks += notes
    if facts:
        rows = [f"| {label} | {_cell(value)} |" for label, value in facts.items()]
        blocks.append("\n".join(["## The run", "", "| | |", "|---|---|", *rows]))
    code = loading(base, name, adapter=bool(adapter), auto=auto)
    blocks.append("\n\n".join(["## How to load it", *(f"```python\n{lines}\n```" for lines in code.values())]))
    return "\n\n".join(blocks) + "\n"


_BEGIN, _END = "<!-- evaluation -->", "<!-- end of evaluation -->"


def carry_evaluation(run: Path, out: Path) -> None:
    """Put what `jaxtune eval` measured of a run's last step into the card of its result, which lies in `out`."""
    from jaxtune.report.evaluation import read_evaluation
    from jaxtune.train.log import read_metrics

    steps = [m["step"] for m in read_metrics(run)] if (run / "metrics.jsonl").is_file() else []
    evaluation = read_evaluation(run, max(steps, default=None))
    if evaluation and (out / "README.md").is_file():
        put_evaluation(out / "README.md", evaluation)


def put_evaluation(card: Path, evaluation: Mapping[str, Any]) -> None:
    """Put the results of eval.json into a card that `model_card` wrote, before how to load it; older ones go."""
    text = card.read_text(encoding="utf-8")
    head, found, rest = text.partition(_BEGIN)
    if found:
        text = head + rest.partition(_END)[2].lstrip("\n")
    head, heading, rest = text.partition("## How to load it")
    block = evaluation_block(evaluation)
    if heading and block:
        atomic_write_text(card, f"{head}{_BEGIN}\n{block}\n{_END}\n\n{heading}{rest}")


def evaluation_block(evaluation: Mapping[str, Any]) -> str:
    """The results of eval.json in Markdown; empty where there are none."""
    from jaxtune.report.evaluation import difference, value, verdict, who

    blocks = []
    held_out = evaluation.get("held_out")
    if held_out:
        entries = held_out["metrics"]
        names = who(entries)
        both = len(names) == 2
        heads = [f"{held_out['rows']:,} held-out rows", *names, *(["difference", "verdict"] if both else [])]
        rows = [
            [entry["label"], *(value(entry, n) for n in names), *([difference(entry), verdict(entry)] if both else [])]
            for entry in entries.values()
        ]
        blocks.append("\n".join(_table([heads, *rows])))
        blocks.append(
            "Intervals hold 95% (bootstrap over rows; where no row differs, binomial); verdicts are those of a paired "
            "randomisation test."
        )
    tasks = evaluation.get("tasks")
    if tasks:
        results = tasks["results"]
        rows = [["task of lm-evaluation-harness", "metric", *results]]
        for task, metrics in next(iter(results.values())).items():
            for metric in metrics:
                rows.append([task, metric, *(f"{results[who][task][metric]['value']:.4f}" for who in results)])
        blocks.append("\n".join(_table(rows)))
    return "\n\n".join(["## Evaluation", *blocks]) if blocks else ""


def _table(rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def _cell(value: Any) -> str:
    return _text(value).replace("|", "\\|").replace("\n", " ")


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_text(v)}" for k, v in value.items())
    return str(value)


def run_facts(
    config: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]] = (), summary: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Choose what a card tells about a run, which is what its page tells: label -> value.

    Args:
        config: the resolved config, a mapping of sections.
        metrics: the records of metrics.jsonl, in order.
        summary: that of summary.json.
    """
    from jaxtune.report.run import as_run
    from jaxtune.report.sentences import costs, findings, measured

    run = as_run(config, metrics, summary)
    settings = run.settings
    facts: dict[str, Any] = {"method": settings["tune.method"]}
    if settings["tune.method"] == "lora":
        facts |= {label: settings[f"tune.lora.{label}"] for label in _LORA}
    fraction, lr = settings["data.eval_fraction"], settings["optim.lr"]
    facts |= {
        "data": settings["data.train"],
        "held-out data": settings["data.eval"] or (f"{fraction:g} of it" if fraction else "none"),
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


_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules")


def _before_and_after(metrics: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    from jaxtune.report.evaluation import value

    for entry in metrics.values():
        told = [value(entry, who) for who in ("base", "tuned") if who in entry]
        yield entry["label"], " before, ".join(told) + " after" if len(told) == 2 else told[0]


def _versions(recorded: Mapping[str, str] | None) -> list[str]:
    if not recorded:
        recorded = {name: metadata.version(name) for name in ("jax", "flax", "optax", "transformers")}
    # A run also records the fingerprint of its data there, and where its features end.
    return [f"{name} {version}" for name, version in recorded.items() if name not in ("data", "features")]
